"""
The server's protocol: bytes to lines, lines to a session, replies to bytes.

What a line means is the session's; who accepts connections is ``accept``'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IDelayedCall, IHalfCloseableProtocol, IHandshakeListener
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.access import Access, Grant
from taskd.departure import Departure
from taskd.door import Door, Visitor
from taskd.errors import CallError, Malformed, Overloaded
from taskd.executor import Executor, Loop
from taskd.functions import Registry
from taskd.lines import LongLineReceiver
from taskd.patience import Patience, Verdict
from taskd.session import Session
from taskd.settings import Settings
from taskd.slots import Slot

__all__ = ["Move", "TaskProtocol", "TaskServerFactory"]

Move = Callable[[Any, bytes], bool]
"""Takes a socket, and what goes along with it; tells whether another worker has it now."""

_LINGER_SECONDS: Final = 2.0
"""How long a peer may go on sending what nobody reads before it is cut off."""

_HANG_UP_SECONDS: Final = 30.0
"""How long a peer may take over reading our last words."""

_MOST_UNSENT_BYTES: Final = 64 * 1024
"""A peer that leaves more than this unread is not read from meanwhile."""

_LONGEST_LINE_OF_STRANGERS: Final = 4096
_REPLIES_AT_ONCE: Final = 64

# Why a connection is not read from.
_FULL: Final = 1
_STILL: Final = 2
_UNREAD: Final = 4
_IN_QUESTION: Final = 8

_REFUSED_RETRY_SECONDS: Final = 1.0


@implementer(IHalfCloseableProtocol, IHandshakeListener)
class TaskProtocol(LongLineReceiver):
    """
    One caller's connection.

    A caller that shuts down its sending side (``nc -N``) still gets its replies.

    Args:
        factory: That of all connections of this worker.
        address: The peer's.
    """

    _log = Logger(namespace="taskd.connection")

    def __init__(self, factory: TaskServerFactory, address: Any = None) -> None:
        super().__init__()
        settings = factory.settings
        self._factory = factory
        self._visitor = Visitor(factory.door, address)
        self.turned_down = self._visitor.turned_down
        grant = factory.door.unasked
        self.MAX_LENGTH = factory.longest_line(grant)
        self._session = Session(
            factory.functions, factory.executor, self, settings.max_in_flight, grant, self._visitor
        )
        # One call less for each line.
        self.lineReceived = self._session.receive  # type: ignore[method-assign]
        self._replies: list[bytes] = []
        self._is_receiving = False
        self._linger: IDelayedCall | None = None
        self._has_peer_ended = self._is_hanging_up = False
        self._patience = Patience(settings.first_line_seconds, settings.idle_seconds)
        self._holds = 0
        self._awaits_handshake = False

    def connectionMade(self) -> None:
        """Join the factory's connections."""
        self._awaits_handshake = getattr(self.transport, "is_secure", False)
        if self._awaits_handshake:
            self._session.admit(None)
        self._factory.joined(self)

    def handshakeCompleted(self) -> None:
        """Let in whom a certificate tells (``IHandshakeListener``); nothing was read before."""
        self._awaits_handshake = False
        door, identity = self._factory.door, self.transport.peer_identity
        self._admit(door.by_certificate(identity) if identity else door.unasked)

    def accepted(self) -> None:
        """Have the time run in which a request must come; turn the peer away if it is crowded."""
        self._patience.begin(self._factory.clock())
        if self._factory.is_crowded():
            why = "as many connections are open as --max-connections allows"
            self._session.turn_away(Overloaded(why, retry_after=_REFUSED_RETRY_SECONDS))

    def adopted(self, luggage: bytes) -> None:
        """Go on where another worker has left off, with what was shown and read there."""
        self._patience.stir(self._factory.clock())
        digest, _, unread = luggage.partition(b" ")
        if digest:
            # It may not be known any more: then it has to be shown anew.
            self._admit(self._factory.door.by_digest(digest.decode()))
        if self._session.grant is None:
            self._patience.begin(self._factory.clock())
        if unread:
            self.dataReceived(unread)

    def dataReceived(self, data: bytes) -> None:
        """Take what came; replies that are ready at once leave in one write."""
        if self._is_hanging_up:
            return
        if data[:1] == b"\x16" and self.is_silent and not self.is_mid_line:
            data += b"\n"  # TLS need not have one, and is to be recognized at once
        if self._patience.awaits_line and b"\n" in data:
            # An empty line is no request.
            self._patience.awaits_line = b"\n" not in (self.unread + data).lstrip(b"\r\n")
        if self._factory.idle_seconds is not None and b"\n" in data:
            self._patience.stir(self._factory.clock())
        is_within = self._is_receiving  # a pause has ended while a line was taken
        self._is_receiving = True
        try:
            super().dataReceived(data)
        except Exception:
            self._log.failure("a bug in taskd: a connection is closed for it")
            self.transport.abortConnection()
        self._is_receiving = is_within
        if not is_within:
            self.flush()
            if self._factory.move is not None:
                self.move()

    def flush(self) -> None:
        """Send what waits for the end of a batch."""
        replies = self._replies
        if replies:
            data = b"".join(replies) if len(replies) > 1 else replies[0]
            written = self.transport.write(data)
            replies.clear()
            if self._factory.idle_seconds is not None:
                self._patience.stir(self._factory.clock())  # its peer may take its time from here
            if written is False and (unsent := self.transport.unsent_bytes) > _MOST_UNSENT_BYTES:
                self.transport.on_sent = self._read_on
                self._patience.leave_unread(unsent, len(data), self._factory.clock())
                self._hold(_UNREAD, True)

    def _read_on(self) -> None:
        self._patience.all_read()
        self._hold(_UNREAD, False)

    def lineLengthExceeded(self, line: bytes) -> None:
        """Answer, then hang up; the rest of the line is never kept."""
        self._session.receive_too_much(self.MAX_LENGTH, line)

    def readConnectionLost(self) -> None:
        """Answer what is owed, then close (``IHalfCloseableProtocol``)."""
        self._has_peer_ended = True
        if self._is_hanging_up:
            self.transport.loseConnection()
        self._session.receive_end(self.is_mid_line)

    def writeConnectionLost(self) -> None:
        """Give the peer, who has our last word now, a moment (``IHalfCloseableProtocol``)."""
        self._cut_off_after(_LINGER_SECONDS)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Leave the factory's connections; what runs goes on."""
        self.connected = 0
        self._stop_waiting()
        if self._awaits_handshake and not reason.check(ConnectionClosed):
            self._visitor.has_no_handshake(reason)
        self._session.lost()
        self.forget_unread()  # the session and its connection hold each other for a while yet
        self._visitor.left()
        self._factory.left(self)

    def drain(self) -> None:
        """Start nothing more, and hang up when nothing is owed; TLS has its own goodbye."""
        self._session.drain(says_goodbye=not getattr(self.transport, "is_secure", False))

    def abandon(self, error: CallError) -> None:
        """End every call in flight with an error."""
        self._session.abandon(error)

    @property
    def is_owed_something(self) -> bool:
        """Tell whether a request still waits for its reply."""
        return self._session.owes_replies

    @property
    def is_silent(self) -> bool:
        """Tell whether its first line has not come yet."""
        return self._patience.awaits_line

    def sweep(self, now: float) -> None:
        """Hang up if the peer has been silent for too long."""
        unsent = self.transport.unsent_bytes if self._holds & _UNREAD else 0
        verdict = self._patience.verdict(now, unsent, self.is_owed_something)
        if verdict is Verdict.UNREAD:
            self._visitor.does_not_read()
            self.transport.abortConnection()
        elif verdict is Verdict.SILENT:
            self.expire(f"no request came within {self._factory.settings.first_line_seconds:g} s")
        elif verdict is Verdict.IDLE:
            self.expire("")

    def expire(self, reason: str) -> None:
        """Hang up on a peer that has been silent for too long, and do not wait for it."""
        if reason:
            self._session.turn_away(Malformed(reason), self.unread)
        else:
            self._is_hanging_up = True  # over TLS something may still come
            self.transport.loseConnection()
        self._cut_off_after(_LINGER_SECONDS)

    def _stop_waiting(self) -> None:
        if self._linger is not None and self._linger.active():
            self._linger.cancel()

    def _cut_off_after(self, seconds: float) -> None:
        """Do not wait for a peer for ever; what was waited before counts no longer."""
        self._stop_waiting()
        self._linger = self._factory.loop.callLater(seconds, self.transport.abortConnection)

    # Who it is.

    def _admit(self, grant: Grant | None) -> None:
        self._session.admit(grant)
        self._visitor.is_let_in(grant)
        self.MAX_LENGTH = self._factory.longest_line(grant)

    def identify(self, token: str, done: Callable[[Grant | None], None]) -> None:
        """Find out what a token grants, and read nothing meanwhile."""

        def identified(grant: Grant | None) -> None:
            if self.connected:
                if grant is not None:
                    self._admit(grant)
                done(grant)
                self._hold(_IN_QUESTION, False)

        if self._factory.door.asks:
            self._hold(_IN_QUESTION, True)
            self._visitor.identify(token, self._factory.loop.callLater, identified)
        else:
            done(self._session.grant)

    def review(self, is_other_ca: bool) -> None:
        """Look again at what was granted, since the rules may be others now."""
        grant = self._session.grant
        if self._awaits_handshake and is_other_ca:
            self.transport.abortConnection()
        elif grant is not None and not self._factory.door.still_grants(grant, is_other_ca):
            self._admit(None)
            if not self.is_owed_something:
                self._patience.begin(self._factory.clock())

    def cut_off(self, protocol: str) -> None:
        """Close at once: a browser must not even learn that there is somebody."""
        self._visitor.is_foreign(protocol)
        self.transport.abortConnection()

    # Going on at another worker.

    def pass_on(self) -> None:
        """Have every task run elsewhere from now on, and go there when nothing is owed."""
        self._session.on_quiet = self.move
        self._session.pass_on()
        self.move()

    def move(self) -> None:
        """Go to another worker, if nothing is owed here."""
        move = self._factory.move
        # What is being taken is in nobody's buffer; and who has not asked yet has its time here.
        if move is None or self._is_receiving or self.is_silent:
            return
        if self._has_peer_ended or self._is_hanging_up or not self._session.can_move:
            return
        self.flush()
        give_away = getattr(self.transport, "give_away", None)
        if give_away is None:  # TLS
            self._session.drain()
        else:
            grant = self._session.grant
            token = grant.token.encode() if grant is not None else b""
            give_away(lambda socket: move(socket, token + b" " + self.unread))

    def hold_still(self, is_on: bool) -> None:
        """Read nothing for a moment, so that a peer who always asks may be owed nothing once."""
        self._hold(_STILL, is_on)

    def hold_while_full(self, is_on: bool) -> None:
        """Do not read while as many calls are in flight as may be."""
        self._hold(_FULL, is_on)

    def _hold(self, reason: int, is_on: bool) -> None:
        before = self._holds
        self._holds = before | reason if is_on else before & ~reason
        if self._holds and not before:
            self.pauseProducing()  # type: ignore[no-untyped-call]
        elif before and not self._holds:
            self.resumeProducing()  # type: ignore[no-untyped-call]

    def report(self, line: bytes) -> None:
        """Send a progress message; a peer that is behind with reading has no use for it."""
        if not self._holds & _UNREAD:
            self.write(line)

    def write(self, line: bytes) -> None:
        """Send a line, or keep it until the batch that it belongs to is complete."""
        self._replies.append(line)
        if self._is_receiving:
            if len(self._replies) >= _REPLIES_AT_ONCE:
                self.flush()
            return
        if self._factory.executor.is_delivering:
            self._factory.unflushed.add(self)
        else:
            self.flush()

    def hang_up(self) -> None:
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
            if self.connected:  # most have gone by now, and a timer is dear
                # Over TLS a silent peer would never let it end.
                is_sent = not getattr(self.transport, "has_unsent", True)
                self._cut_off_after(_LINGER_SECONDS if is_sent else _HANG_UP_SECONDS)
        else:
            self._cut_off_after(_HANG_UP_SECONDS)
            self._factory.parting(self)
            half_close()


class TaskServerFactory(Factory):
    """
    All connections of one worker.

    Args:
        loop: The reactor.
        functions: What may be called.
        executor: What runs it.
        slot: Where the worker shows what it does.
        settings: What the operator decided.
        access: Who may do what.
        open_everywhere: Tells how many connections all workers hold.
        clock: Gives seconds that never go back.

    Attributes:
        clock: As it was given.
        door: Who is let in.
        idle_seconds: How long a connection may stay unused, or None.
        move: Where connections go once they are passed on.
        on_empty: Called when the last connection has gone; None: nobody wants to know.
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
        settings: Settings,
        access: Access,
        open_everywhere: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loop = loop
        self.functions = functions
        self.executor = executor
        self.settings = settings
        self.on_room: Callable[[], None] = lambda: None
        self.on_empty: Callable[[], None] | None = None
        self.move: Move | None = None
        self._slot = slot
        self._open_everywhere = open_everywhere
        self.clock = clock
        self.door = Door(access, slot, clock)
        self.idle_seconds = settings.idle_seconds
        self._connections: set[TaskProtocol] = set()
        self._parting: set[TaskProtocol] = set()
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
        return TaskProtocol(self, addr)

    def is_crowded(self) -> bool:
        """Tell whether there are more connections than the operator allows."""
        most = self.settings.max_connections
        return most is not None and self._open_everywhere() > most

    def longest_line(self, grant: Grant | None) -> int:
        """Tell how many bytes a line may have of somebody who is known, or not."""
        most = self.settings.max_line_bytes
        return most if grant is not None else min(most, _LONGEST_LINE_OF_STRANGERS)

    @property
    def _counted(self) -> int:
        """How many connections are in use: those that have had their last word are not."""
        return len(self._connections) - len(self._parting)

    def joined(self, connection: TaskProtocol) -> None:
        """Count a connection that came."""
        self._connections.add(connection)
        self._slot.connected(self._counted)

    def parting(self, connection: TaskProtocol) -> None:
        """Count no longer a connection that has had its last word, and waits for its peer to go."""
        self._parting.add(connection)
        self._slot.disconnected(self._counted)

    def left(self, connection: TaskProtocol) -> None:
        """Count a connection that went."""
        self._connections.discard(connection)
        self._parting.discard(connection)
        self._slot.disconnected(self._counted)
        self.on_room()
        if self.on_empty is not None and not self._connections:
            self.on_empty()

    def sweep(self) -> None:
        """Hang up on those who have been silent for too long."""
        now = self.clock()
        for connection in list(self._connections):
            connection.sweep(now)

    def drain(self) -> None:
        """Close every connection once it is owed nothing."""
        for connection in list(self._connections):
            connection.drain()

    def pass_on(
        self, move: Move, access: Access | None = None, *, is_other_ca: bool = False
    ) -> None:
        """
        Have every connection leave, on the terms of those who stay.

        Args:
            move: Where to.
            access: Who may do what from now on; None: as before.
            is_other_ca: True: certificates that were verified here count no more.
        """
        is_first, self.move = self.move is None, move
        if access is not None:
            self.door.revise(access)
            for connection in list(self._connections):
                connection.review(is_other_ca)
        if is_first:
            Departure(lambda: self._connections, self.loop.callLater)

    def cut_off(self) -> None:
        """Close those whose peers do not read; who has not asked yet has a limit of its own."""
        for connection in list(self._connections):
            if not (connection.is_owed_something or connection.is_silent):
                connection.transport.abortConnection()

    def abandon(self, error: CallError) -> None:
        """End every call in flight with an error, on every connection."""
        for connection in list(self._connections):
            connection.abandon(error)
