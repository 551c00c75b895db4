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
from twisted.internet.interfaces import IReadDescriptor

from taskd.policy import accept_pause, connection_ceiling

__all__ = ["Accepting", "SharedPort", "SharingReactor"]


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
    _shouldShutdown = False

    @classmethod
    def adopt(cls, fd: int, factory: Accepting, reactor: SharingReactor) -> SharedPort:
        """Start to accept on *fd*, for a factory that is ``Accepting``."""
        with socket.socket(fileno=socket.dup(fd)) as listening:
            family = listening.family
        port: SharedPort = cls._fromListeningDescriptor(reactor, fd, family, factory)
        port.is_pausing = False
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
        held = self.factory.open_connections
        if held >= self.ceiling:
            self.stopReading()
        elif pause := accept_pause(held):
            self.stopReading()
            self.is_pausing = True
            self.reactor.callLater(pause, self._end_pause)

    def _end_pause(self) -> None:
        self.is_pausing = False
        self.resume()

    def resume(self) -> None:
        """Accept again, if nothing stands against it."""
        if (
            self.connected
            and not self.disconnecting
            and not self.is_pausing
            and self.factory.open_connections < self.ceiling
        ):
            self.startReading()

    def _logConnectionLostMsg(self) -> None:  # noqa: N802
        """Say nothing: a worker that stops is the supervisor's news."""
