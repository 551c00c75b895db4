"""
The server's protocol: bytes to lines, lines to a session, replies to bytes.

What a line means is the session's; who accepts connections is ``accept``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall, IHalfCloseableProtocol
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.errors import CallError
from taskd.executor import Executor, Loop
from taskd.functions import Registry
from taskd.lines import LongLineReceiver
from taskd.scoreboard import Slot
from taskd.session import Session

__all__ = ["TaskProtocol", "TaskServerFactory"]

_LINGER_SECONDS: Final = 2.0
"""How long a peer may go on sending what nobody reads before it is cut off."""


@implementer(IHalfCloseableProtocol)
class TaskProtocol(LongLineReceiver):
    """
    One caller's connection.

    A caller that shuts down its sending side (``nc -N``) still gets its replies.
    """

    _log = Logger(namespace="taskd.connection")

    def __init__(self, factory: TaskServerFactory) -> None:
        super().__init__()
        self.MAX_LENGTH = factory.max_line_bytes
        self._factory = factory
        self._session = Session(factory.functions, factory.executor, self._write, self._hang_up)
        # One call less for each line.
        self.lineReceived = self._session.receive  # type: ignore[method-assign]
        self._replies: list[bytes] = []
        self._is_receiving = False
        self._linger: IDelayedCall | None = None
        self._has_peer_ended = False
        self._is_hanging_up = False

    def connectionMade(self) -> None:
        """Join the factory's connections."""
        self._factory.joined(self)

    def dataReceived(self, data: bytes) -> None:
        """Take what came; replies that are ready at once leave in one write."""
        if self._is_hanging_up:
            return
        self._is_receiving = True
        try:
            super().dataReceived(data)
        except Exception:
            self._log.failure("a bug in taskd: a connection is closed for it")
            self.transport.abortConnection()
        self._is_receiving = False
        self.flush()

    def flush(self) -> None:
        """Send what waits for the end of a batch."""
        replies = self._replies
        if replies:
            self.transport.write(b"".join(replies) if len(replies) > 1 else replies[0])
            replies.clear()

    def lineLengthExceeded(self, line: bytes) -> None:
        """Answer, then hang up; the rest of the line is never kept."""
        self._session.receive_too_much(self.MAX_LENGTH)

    def readConnectionLost(self) -> None:
        """Answer what is owed, then close (``IHalfCloseableProtocol``)."""
        self._has_peer_ended = True
        if self._is_hanging_up:
            self.transport.loseConnection()
        self._session.receive_end(self.is_mid_line)

    def writeConnectionLost(self) -> None:
        """Give the peer, who has our last word now, a moment (``IHalfCloseableProtocol``)."""
        self._linger = self._factory.loop.callLater(_LINGER_SECONDS, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Leave the factory's connections; what runs goes on."""
        if self._linger is not None and self._linger.active():
            self._linger.cancel()
        self._session.lost()
        self._factory.left(self)

    def drain(self) -> None:
        """Start nothing more, and hang up when nothing is owed."""
        self._session.drain()

    def abandon(self, error: CallError) -> None:
        """End every call in flight with an error."""
        self._session.abandon(error)

    def _write(self, line: bytes) -> None:
        self._replies.append(line)
        if self._is_receiving:
            return
        if self._factory.executor.is_delivering:
            self._factory.unflushed.add(self)
        else:
            self.flush()

    def _hang_up(self) -> None:
        """
        Close, in a way that lets the last reply arrive.

        A close while unread bytes lie in the socket resets the connection, and
        the peer may lose our answer to it. So our side is shut first, and what
        still comes is thrown away for a moment.
        """
        self.flush()
        self._is_hanging_up = True
        half_close = getattr(self.transport, "loseWriteConnection", None)
        if self._has_peer_ended or half_close is None:  # TLS has no half of a close
            self.transport.loseConnection()
        else:
            half_close()


class TaskServerFactory(Factory):
    """
    All connections of one worker.

    Args:
        loop: The reactor.
        functions: What may be called.
        executor: What runs it.
        slot: Where the worker shows what it does.
        max_line_bytes: Longest request line, from 1.

    Attributes:
        on_room: Called when a connection has gone, for who waits for room.
        unflushed: Connections that have replies of the batch that is being delivered.
    """

    noisy = False

    def __init__(
        self,
        loop: Loop,
        functions: Registry,
        executor: Executor,
        slot: Slot,
        max_line_bytes: int,
    ) -> None:
        self.loop = loop
        self.functions = functions
        self.executor = executor
        self.max_line_bytes = max_line_bytes
        self.on_room: Callable[[], None] = lambda: None
        self._slot = slot
        self._connections: set[TaskProtocol] = set()
        self._empty: Deferred[None] | None = None
        self.unflushed: set[TaskProtocol] = set()
        executor.on_delivered = self._flush

    def _flush(self) -> None:
        while self.unflushed:
            self.unflushed.pop().flush()

    @property
    def open_connections(self) -> int:
        """Tell how many connections are open."""
        return len(self._connections)

    def buildProtocol(self, addr: Any) -> TaskProtocol:
        """Make the protocol of a new connection."""
        return TaskProtocol(self)

    def joined(self, connection: TaskProtocol) -> None:
        """Count a connection that came."""
        self._connections.add(connection)
        self._slot.connected(len(self._connections))

    def left(self, connection: TaskProtocol) -> None:
        """Count a connection that went."""
        self._connections.discard(connection)
        self._slot.disconnected(len(self._connections))
        self.on_room()
        if self._empty is not None and not self._connections:
            self._empty.callback(None)

    def drain(self) -> Deferred[None]:
        """
        Close every connection once it is owed nothing.

        Call it once.

        Returns:
            Fires with None when the last one is closed.
        """
        if not self._connections:
            return succeed(None)
        self._empty = Deferred()
        for connection in list(self._connections):
            connection.drain()
        return self._empty

    def abandon(self, error: CallError) -> None:
        """End every call in flight with an error, on every connection."""
        for connection in list(self._connections):
            connection.abandon(error)
