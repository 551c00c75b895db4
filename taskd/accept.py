"""
The shared port: how many processes take turns at one listening socket.

The socket is registered with EPOLLEXCLUSIVE, so a new connection wakes one
worker and not all of them, and each worker pauses after an accept, the longer
the more connections it holds, so that connections which stay spread evenly.

Nothing here knows what is spoken on a connection.
"""

from __future__ import annotations

import resource
import select
import socket
from collections.abc import Callable
from typing import Protocol

from twisted.internet import tcp
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor

from taskd.policy import accept_pause, connection_ceiling

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


class EagerServer(tcp.Server):
    """
    A connection that sends at once what the kernel takes.

    Twisted's own asks epoll to tell when it may write, which it may, nearly
    always: two system calls and a round of the reactor for each reply.
    """

    def write(self, data: bytes) -> None:
        """Send now if nothing waits before it; what the kernel does not take goes Twisted's way."""
        if not self._tempDataBuffer and not self.dataBuffer and self.connected:
            try:
                data = data[self.socket.send(data) :]
            except OSError:
                pass  # it is full, or gone: the reactor will find out which
        if data:
            super().write(data)


class SharedPort(tcp.Port):
    """
    A listening socket that this process shares with its siblings.

    Args:
        fd: The listening socket, not blocking; it is duplicated.
        factory: Makes the protocols; it knows how many connections are open.
        reactor: Watches the socket.
    """

    # One connection a wake-up: the others have woken somebody else.
    numberAccepts = property(lambda self: 1, lambda self, value: None)  # noqa: N815
    transport = EagerServer
    _shouldShutdown = False
    _timer: IDelayedCall | None = None
    _pause_ends = 0.0
    _held_at_pause = 0
    ceiling = 1

    @classmethod
    def adopt(cls, fd: int, factory: Accepting, reactor: SharingReactor) -> SharedPort:
        """Start to accept on *fd*, for a factory that is ``Accepting``."""
        with socket.socket(fileno=socket.dup(fd)) as listening:
            family = listening.family
        port: SharedPort = cls._fromListeningDescriptor(reactor, fd, family, factory)
        port.ceiling = connection_ceiling(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        factory.on_room = port.resume
        port.startListening()
        return port

    def startReading(self) -> None:
        """Take part in accepting, together with the siblings."""
        self.reactor.add_shared_reader(self)

    def doRead(self) -> None:
        """Accept one connection, then leave the port to the siblings for a moment."""
        super().doRead()
        # Who registers anew stands behind the others in the kernel's queue of waiters.
        self.stopReading()
        self._held_at_pause = self.factory.open_connections
        pause = accept_pause(self._held_at_pause)
        if self._held_at_pause >= self.ceiling:
            return
        if not pause:
            self.startReading()
            return
        self._pause_ends = self.reactor.seconds() + pause
        if self._timer is None:
            self._timer = self.reactor.callLater(pause, self._end_pause)

    def _end_pause(self) -> None:
        self._timer = None
        left = self._pause_ends - self.reactor.seconds()
        if left > 0:
            self._timer = self.reactor.callLater(left, self._end_pause)
        else:
            self._held_at_pause = self.ceiling
            self.resume()

    def resume(self) -> None:
        """Accept again if fewer connections are held than when the pause began."""
        if (
            self.factory.open_connections < self._held_at_pause
            and self.connected
            and not self.disconnecting
        ):
            self.startReading()

    def _logConnectionLostMsg(self) -> None:  # noqa: N802
        """Say nothing: a worker that stops is the supervisor's news."""
