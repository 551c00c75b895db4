"""
The shared port: how many processes take turns at one listening socket.

The socket is registered with EPOLLEXCLUSIVE, so a new connection wakes one
worker and not all of them, and each worker pauses after an accept, the longer
the more connections it holds, so that connections which stay spread evenly.

Nothing here knows what is spoken on a connection.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
from collections.abc import Callable
from typing import Final, Protocol

from twisted.internet import tcp
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor

from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd.policy import NO_ROOM_PAUSE_SECONDS, accept_pause, connection_ceiling

__all__ = ["Accepting", "EagerServer", "SharedPort", "SharingReactor"]


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


class EagerServer(tcp.Server):
    """
    A connection that sends at once what the kernel takes.

    Twisted's own asks epoll to tell when it may write, which it may, nearly
    always: two system calls and a round of the reactor for each reply.
    """

    def readConnectionLost(self, reason: Failure) -> None:
        """Take the peer's close; a shutdown before our own would tell nobody anything."""
        self._shouldShutdown = False
        super().readConnectionLost(reason)

    def write(self, data: bytes) -> None:
        """Send now if nothing waits before it; what the kernel does not take goes Twisted's way."""
        if not self._tempDataBuffer and not self.dataBuffer and self.connected:
            try:
                data = data[self.socket.send(data) :]
            except OSError:
                pass  # it is full, or gone: the reactor will find out which
        if data:
            super().write(data)


_OUT_OF_ROOM: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class SharedPort(tcp.Port):
    """
    A listening socket that this process shares with its siblings.

    It accepts one connection a wake-up: each of the others has woken somebody
    else. At a limit of the system it waits; Twisted's own would accept and
    close what the siblings could serve.

    Args:
        fd: The listening socket, not blocking; it is duplicated.
        factory: Makes the protocols; it knows how many connections are open.
        reactor: Watches the socket.
    """

    _log = Logger(namespace="taskd.accept")
    _shouldShutdown = False
    _pause: IDelayedCall | None = None
    _in_a_row = 0
    ceiling = 1

    @classmethod
    def adopt(cls, fd: int, factory: Accepting, reactor: SharingReactor) -> SharedPort:
        """Start to accept on *fd*, for a factory that is ``Accepting``."""
        with socket.socket(fileno=socket.dup(fd)) as listening:
            family = listening.family
        port: SharedPort = cls._fromListeningDescriptor(reactor, fd, family, factory)
        port.ceiling = connection_ceiling(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        factory.on_room = port._on_room
        port.startListening()
        return port

    def startReading(self) -> None:
        """Take part in accepting, together with the siblings."""
        self.reactor.add_shared_reader(self)

    def doRead(self) -> None:
        """Accept one connection; if they come to stay, leave the port to the siblings for a while."""
        try:
            connection, address = self.socket.accept()
        except BlockingIOError:
            return  # a sibling was quicker
        except OSError as error:
            if error.errno not in _OUT_OF_ROOM:
                return  # it was gone before it was ours
            # The siblings may have room for it, and closing it would help nobody.
            self._log.error("no connection can be accepted: {why}", why=error.strerror)
            self._leave_for(NO_ROOM_PAUSE_SECONDS)
            return
        protocol = self.factory.buildProtocol(self._buildAddr(address))
        self.sessionno += 1
        protocol.makeConnection(
            EagerServer(connection, protocol, address, self, self.sessionno, self.reactor)
        )
        self._in_a_row += 1
        held = self.factory.open_connections
        pause = accept_pause(held, self._in_a_row)
        if pause or held >= self.ceiling:
            self._leave_for(pause)

    def _leave_for(self, seconds: float) -> None:
        self.stopReading()
        if self._pause is None:
            self._pause = self.reactor.callLater(seconds, self._end_pause)

    def step_back(self) -> None:
        """
        Stand behind the siblings in the kernel's queue: the next connection is theirs.

        For a worker that has taken up work; the kernel would go on to wake it first.
        """
        if self._pause is None and self.connected and not self.disconnecting:
            self.stopReading()
            self._resume()

    def _end_pause(self) -> None:
        self._pause = None
        self._resume()

    def _on_room(self) -> None:
        self._in_a_row = 0
        if self._pause is None:
            self._resume()

    def _resume(self) -> None:
        if (
            self.factory.open_connections < self.ceiling
            and self.connected
            and not self.disconnecting
        ):
            self.startReading()

    def _logConnectionLostMsg(self) -> None:  # noqa: N802
        """Say nothing: a worker that stops is the supervisor's news."""
