"""
The shared port: how many processes take turns at one listening socket.

The socket is registered with EPOLLEXCLUSIVE, so a new connection wakes one
worker and not all of them, and each worker pauses after an accept, the longer
the more connections it holds, so that connections which stay spread evenly.

Nothing here knows what is spoken on a connection.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from twisted.internet import tcp
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress, IDelayedCall, IProtocol, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.lines import EagerWrites
from taskd.policy import NO_ROOM_PAUSE_SECONDS, accept_pause, connection_ceiling
from taskd.throttle import Throttle

__all__ = ["Accepting", "EagerServer", "Guest", "SharedPort", "SharingReactor"]


class Guest(Protocol):
    """A connection's protocol, seen from the port."""

    def makeConnection(self, transport: Any, /) -> None:
        """Begin."""

    def accepted(self) -> None:
        """Take note that the connection has just come."""

    def adopted(self, luggage: bytes, /) -> None:
        """Take note that it came from another process, with what that one has sent along."""


class Accepting(Protocol):
    """
    A factory that knows how much it holds.

    Attributes:
        open_connections: How many connections are open.
        on_room: Called when a connection has gone.
    """

    on_room: Callable[[], None]

    @property
    def open_connections(self) -> int: ...  # noqa: D102

    def buildProtocol(self, addr: IAddress, /) -> Guest: ...  # noqa: D102


class SharingReactor(EPollReactor):
    """
    Twisted's epoll reactor, which can wait for a descriptor together with other processes.

    Twisted has no interface for epoll's flags, so this reaches into its poller.
    """

    def add_shared_reader(self, reader: IReadDescriptor) -> None:
        """
        Watch a descriptor that other processes watch too.

        Of those that wait for it with this flag, the kernel wakes one.

        Args:
            reader: What is read; it must not be watched yet, nor ever for writing.

        Source:
            epoll_ctl(2), EPOLLEXCLUSIVE. 32 workers, a connection per task:
            twice the rate (``benchmarks/run.py connect``).
        """
        fd = reader.fileno()
        if fd not in self._reads:
            self._poller.register(fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            self._reads.add(fd)
            self._selectables[fd] = reader

    def dispose(self) -> None:
        """Close what a reactor that has stopped still holds, before a fork would copy it."""
        for reader in self._internalReaders:
            reader.connectionLost(None)
        self._poller.close()


class EagerServer(EagerWrites, tcp.Server):  # type: ignore[misc]
    """
    A connection that sends at once, and can be given away to another process.

    Over a Unix socket as well: Twisted's own class for those would take in the
    file descriptors that a peer sends along.
    """

    _end: Failure | None = None
    on_sent: Callable[[], None] | None = None
    """Called when nothing waits to be sent any more."""

    def doWrite(self) -> Any:
        """Send what waits."""
        outcome = super().doWrite()  # type: ignore[no-untyped-call]
        if self.on_sent is not None and not self.has_unsent:
            self.on_sent()
        return outcome

    def read_at_once(self) -> None:
        """
        Take what is there already, and leave the rest, an end too, to the reactor.

        Most callers have asked by the time that they are accepted; a round of the
        reactor would only find that out.

        Source:
            6 to 11 % less CPU for a connection with one request, on 32 workers
            (schedstat of all processes, both in turns).
        """
        if not self.connected:
            return
        try:
            data = self.socket.recv(self.bufferSize)
        except OSError:
            return  # nothing yet; or it is gone, which the reactor finds out
        if data:
            self.protocol.dataReceived(data)

    def readConnectionLost(self, reason: Failure) -> None:
        """Take the peer's close; a shutdown before our own would tell nobody anything."""
        self._end = reason
        self._shouldShutdown = False
        super().readConnectionLost(reason)

    def loseConnection(self, *args: Any) -> None:
        """Close at once if the peer has, and nothing waits to be sent."""
        if self._end is None or self.has_unsent:
            super().loseConnection(*args)  # type: ignore[no-untyped-call]
        else:
            self.connectionLost(self._end)

    def give_away(self, take: Callable[[socket.socket], bool]) -> bool:
        """
        Part with the connection, which goes on elsewhere.

        Args:
            take: Takes the socket, for the time of the call, and tells whether
                somebody has it now.

        Returns:
            Whether it was given away; it is closed here then, and its peer
            does not notice.
        """
        if self.has_unsent or not self.connected or self.disconnecting or not take(self.socket):
            return False
        self._shouldShutdown = False
        self.connectionLost(Failure(ConnectionDone()))
        return True


Wrap = Callable[[Any], Any]
"""Takes a connection's protocol, and gives what stands between it and its socket."""

_OUT_OF_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@implementer(IReadDescriptor)
class SharedPort:
    """
    A listening socket that this process shares with its siblings.

    It accepts one connection a wake-up: each of the others has woken somebody
    else. At a limit of the system it waits; Twisted's own ``Port`` would accept
    and close what the siblings could serve, and shut the socket down for all of
    them when it is closed.

    Args:
        fd: The listening socket, not blocking; it is duplicated.
        factory: Makes the protocols, and knows how many there are.
        reactor: Watches the socket.
        wrap: Puts TLS between a protocol and its connection; None: it is plain.
        is_alone: True: no sibling shares the socket, so it is never left to them.

    Attributes:
        on_accept: Called when a connection was accepted; None: nobody wants to know.
    """

    _log = Logger(namespace="taskd.accept")

    def __init__(
        self,
        fd: int,
        factory: Accepting,
        reactor: Any,
        wrap: Wrap | None = None,
        *,
        is_alone: bool = False,
    ) -> None:
        self.socket = socket.socket(fileno=os.dup(fd))
        self._factory = factory
        self._reactor = reactor
        self._ceiling = connection_ceiling(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._wrap = wrap
        self._is_alone = is_alone
        # Twisted's transports show it.
        name = self.socket.getsockname()
        self._realPortNumber = name[1] if isinstance(name, tuple) else 0
        self._throttle = Throttle()
        self._in_a_row = 0
        self._accepted = 0
        self._pause: IDelayedCall | None = None
        self._is_away = False
        self.on_accept: Callable[[], None] | None = None
        factory.on_room = self._on_room
        reactor.add_shared_reader(self)

    def fileno(self) -> int:
        """Tell the descriptor, or -1 once it is closed."""
        return self.socket.fileno()

    def logPrefix(self) -> str:
        """Name this for the reactor's own log."""
        return "taskd"

    def doRead(self) -> None:
        """Accept one connection; if they come to stay, leave the port to the siblings."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return  # a sibling was quicker
        except OSError as error:
            if error.errno not in _OUT_OF_ROOM:
                return  # it was gone before it was ours
            # The siblings may have room for it, and closing it would help nobody.
            if self._throttle.admit(error.errno, self._reactor.seconds()) is not None:
                self._log.error("no connection can be accepted: {reason}", reason=error.strerror)
            self._leave_for(NO_ROOM_PAUSE_SECONDS)
            return
        guest, transport = self._serve(connection, address, self._wrap)
        guest.accepted()
        self._in_a_row += 1
        held = self._factory.open_connections
        pause = 0.0 if self._is_alone else accept_pause(held, self._in_a_row)
        if pause or held >= self._ceiling:
            self._leave_for(pause)
        if self.on_accept is not None:
            self.on_accept()
        transport.read_at_once()

    def _serve(
        self, connection: socket.socket, address: Any, wrap: Wrap | None
    ) -> tuple[Guest, EagerServer]:
        protocol = self._factory.buildProtocol(_address_of(connection.family, address))
        outermost = protocol if wrap is None else wrap(protocol)
        self._accepted += 1
        transport = EagerServer(
            connection,
            cast(IProtocol, outermost),
            address if isinstance(address, tuple) else _NO_ADDRESS,
            cast(Any, self),
            self._accepted,
            self._reactor,
        )
        outermost.makeConnection(transport)
        return protocol, transport

    def adopt(self, fd: int, luggage: bytes) -> None:
        """
        Go on with a plain connection that another process accepted, from whatever port.

        Args:
            fd: The connection; it is the port's from now on.
            luggage: What its protocol has sent along.
        """
        connection = socket.socket(fileno=fd)
        connection.setblocking(False)
        try:
            address = connection.getpeername()
        except OSError:
            connection.close()  # its peer has gone meanwhile
            return
        self._serve(connection, address, None)[0].adopted(luggage)

    def leave(self) -> None:
        """Accept nothing until ``come_back``, as long as the siblings do."""
        if not self._is_away:
            self._is_away = True
            self._reactor.removeReader(self)

    def come_back(self) -> None:
        """Accept again."""
        if self._is_away:
            self._is_away = False
            if self._pause is None:
                self._resume()

    def step_back(self) -> None:
        """
        Stand behind the siblings in the kernel's queue: the next connection is theirs.

        For a worker that has taken up work; the kernel would go on to wake it first.
        """
        if self._pause is None:
            self._reactor.removeReader(self)
            self._resume()

    def close(self) -> None:
        """Accept nothing more; the siblings go on."""
        if self._pause is not None and self._pause.active():
            self._pause.cancel()
        self._reactor.removeReader(self)
        self.socket.close()

    def connectionLost(self, reason: Failure) -> None:
        """Close, when the reactor drops everything."""
        self.close()

    def _leave_for(self, seconds: float) -> None:
        self._reactor.removeReader(self)
        if self._pause is None:
            self._pause = self._reactor.callLater(seconds, self._end_pause)

    def _end_pause(self) -> None:
        self._pause = None
        self._resume()

    def _on_room(self) -> None:
        self._in_a_row = 0
        if self._pause is None:
            self._resume()

    def _resume(self) -> None:
        if (
            self.fileno() >= 0
            and not self._is_away
            and self._factory.open_connections < self._ceiling
        ):
            self._reactor.add_shared_reader(self)


_NO_ADDRESS: Final = ("", 0)
"""Callers over a Unix socket have no host and no port; Twisted's transports want a pair."""


def _address_of(family: int, address: Any) -> IAddress:
    if family == socket.AF_INET6:
        return IPv6Address("TCP", *address)
    if family == socket.AF_INET:
        return IPv4Address("TCP", *address)
    return UNIXAddress(address or b"")
