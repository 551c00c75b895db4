"""
One connection to a daemon, and the calls that are in flight on it.

The caller's side of the protocol: requests out, replies to the Deferreds that
they are for. Which of several connections a call takes is ``client``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IConnector,
    IDelayedCall,
    IHandshakeListener,
    ISSLTransport,
)
from twisted.internet.protocol import ClientFactory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.errand import Asked, Caller, Gate, OnProgress, Outstanding, stop
from taskd.errors import (
    BadArguments,
    CallError,
    ClientClosed,
    ClientError,
    ConnectFailed,
    ConnectionLost,
    Malformed,
    NotJson,
    ShuttingDown,
    TimeLimitExceeded,
    Unauthorized,
    UnknownFunction,
    error_from_wire,
)
from taskd.lines import LongLineReceiver, write_at_once
from taskd.trust import GREETING_ID, failure_of_handshake, greeting, refused_certificate
from taskd.wire import ALPN, NO_TERMS, Args, Terms, decode_reply, encode_request

__all__ = ["TaskClientFactory", "TaskClientProtocol"]

_ANSWER_GRACE_SECONDS: Final = 0.25
"""How long the daemon's own time-limit answer is waited for, which says more than ours."""

_CLOSE_SECONDS: Final = 5.0
"""How long a daemon may take over closing a connection; TLS would wait for ever."""

_HANDSHAKE_SECONDS: Final = 30.0
"""How long a TLS handshake may take; so long Twisted waits for a TCP connection, too."""

_LONGEST_REPLY_BYTES: Final = 64 * 1024 * 1024

_Notify = Callable[["TaskClientProtocol"], None]


@implementer(IHandshakeListener)
class TaskClientProtocol(LongLineReceiver):
    """
    One connection to a daemon, and the calls that are in flight on it.

    Made by ``TaskClientFactory``. Over TLS the connection stands when the
    server's certificate was verified, and nothing is sent before.

    Args:
        reactor: Keeps the time limits.
        on_connected: Called with this protocol when the connection stands.
        on_lost: Called with it when the connection is gone, before its calls fail.
        greeting: What is sent first, as ``trust.greeting`` gives it.

    Attributes:
        has_stood: True once calls could be sent.
        has_answered: True once the daemon has said anything but that it does not
            know the caller.
        refusal: Why neither this nor another call would be run over such a
            connection, as soon as that is known, or None.
        on_goodbye: Called with this protocol when the daemon, which stops, has said
            that it will answer no more.
    """

    _log = Logger(namespace="taskd.client")
    MAX_LENGTH = _LONGEST_REPLY_BYTES

    def __init__(
        self, reactor: Any, on_connected: _Notify, on_lost: _Notify, greeting: bytes = b""
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._greeting = greeting
        self._says_goodbye = False
        self._has_said_goodbye = False
        self._standing: Deferred[TaskClientProtocol] | None = None
        self._closed: Deferred[None] | None = None
        self._abort: IDelayedCall | None = None
        self._last_number = GREETING_ID
        self._pending: dict[int, _Pending] = {}
        self._last_words: CallError | None = None
        self._has_given_up = False
        self._unauthorized: tuple[Unauthorized, int] | None = None  # and what was sent by then
        self.has_stood = False
        self.has_answered = False
        self.refusal: ClientError | CallError | None = None
        self._doubt: int | None = None
        self.on_goodbye: _Notify = lambda _: None

    @property
    def in_flight(self) -> int:
        """Tell how many calls have no reply yet."""
        return len(self._pending)

    @property
    def is_in_doubt(self) -> bool:
        """
        Tell whether the daemon's machine may be gone, of which TCP tells late.

        It may when a call was not ended in time, until what was sent after that is
        answered. What comes before shows only that the way from there is open.
        """
        return self._doubt is not None

    def call(
        self,
        function: str,
        args: Args,
        terms: Terms = NO_TERMS,
        on_progress: OnProgress | None = None,
    ) -> Deferred[Any]:
        """
        Send one request, on terms that its maker has checked.

        Result and failures are those of ``TaskClient.call_with``.
        """
        number = self._next_number()
        timeout = terms.timeout
        try:
            line = encode_request((function, args, str(number), terms))
        except NotJson as error:
            return fail(BadArguments(f"{function}: {error}"))
        if not self.connected or not self.has_stood or self._has_said_goodbye:
            return fail(ConnectionLost("the connection does not stand", may_have_started=False))
        pending = _Pending(Deferred(lambda _: self._cancel(number)), on_progress)
        if timeout is not None:
            pending.timer = self._reactor.callLater(
                timeout + _ANSWER_GRACE_SECONDS, self._expire, number, function, timeout
            )
        self._pending[number] = pending
        if len(self._pending) == 1:
            write_at_once(self.transport, line)
        else:  # with what else is asked in this round of the reactor
            self.transport.write(line)
        return pending.deferred

    def close(self) -> Deferred[None]:
        """
        Close the connection, by force if the daemon does not take part in it.

        Returns:
            Fires with None once it is closed.
        """
        if not self.connected:
            return succeed(None)
        if self._closed is None:
            self._closed = Deferred()
            stop(self._abort)
            self._abort = self._reactor.callLater(_CLOSE_SECONDS, self.transport.abortConnection)
            self.transport.loseConnection()
        return self._closed

    def standing(self) -> Deferred[TaskClientProtocol]:
        """
        Wait until calls can be sent; ask only once.

        Returns:
            Fires with this protocol. Cancelling it gives the connection up.

        Raises:
            TlsFailed: The connection will never stand.
        """
        if self.has_stood:
            return succeed(self)
        if self.refusal is not None:
            return fail(self.refusal)
        self._standing = Deferred(self._give_up)
        return self._standing

    def _give_up(self, _: object) -> None:
        self._standing = None
        stop(self._abort)
        self.transport.abortConnection()

    def connectionMade(self) -> None:
        """Begin, unless it is over TLS, where only the TCP connection has been made."""
        if ISSLTransport.providedBy(self.transport):
            self._abort = self._reactor.callLater(
                _HANDSHAKE_SECONDS, self.transport.abortConnection
            )
        else:
            self._begin()

    def handshakeCompleted(self) -> None:
        """Begin, since the server is who it should be."""
        if not self.transport.disconnecting:
            stop(self._abort)
            self._says_goodbye = getattr(self.transport, "negotiatedProtocol", None) == ALPN
            self._begin()

    def _begin(self) -> None:
        """Tell that calls can be sent, behind what shows who we are."""
        self.has_stood = True
        if self._greeting:
            self.transport.write(self._greeting)
        self._on_connected(self)
        if self._standing is not None:
            self._standing.callback(self)

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _take(self, number: Any) -> _Pending | None:
        """Take a call out of those in flight; later answers to it find nothing and are dropped."""
        pending = self._pending.pop(number, None) if type(number) is int else None
        if pending is not None:
            stop(pending.timer)
        return pending

    def _cancel(self, number: int) -> None:
        if self._take(number) is not None and self.connected:
            # The answer to this is of no interest, so its number is not kept.
            self.transport.write(
                encode_request(("taskd.cancel", {"id": number}, str(self._next_number()), NO_TERMS))
            )

    def _expire(self, number: int, function: str, timeout: float) -> None:
        deferred = self._pending[number].deferred
        self._cancel(number)
        if self._doubt is None:
            self._doubt = self._last_number
        deferred.errback(TimeLimitExceeded(f"no answer to {function} within {timeout:g} s"))

    def lineReceived(self, line: bytes) -> None:
        """Fire the Deferred that a reply is for."""
        try:
            reply = decode_reply(line)
        except Malformed as error:
            is_known = self.has_answered or self._unauthorized
            self._has_given_up = True
            self._last_words = error if is_known else Malformed(f"{error}. Is it no taskd?")
            self.transport.abortConnection()
            return
        told = error_from_wire(reply["error"]) if "error" in reply else None
        if isinstance(told, Unauthorized):
            self._unauthorized = (told, self._last_number)
        else:
            self.has_answered = True
        number = reply.get("id")
        if self._doubt is not None and type(number) is int and number >= self._doubt:
            self._doubt = None
        if "progress" in reply:
            self._report(number, reply["progress"])
        elif self._greeting and type(number) is int and number == GREETING_ID:
            self._greeted(told)
        elif isinstance(told, ShuttingDown) and "id" not in reply:
            self._has_said_goodbye = True
            self.on_goodbye(self)
        elif told is not None and "id" not in reply:
            self._last_words = told
        elif (pending := self._take(number)) is not None:
            if told is None:
                pending.deferred.callback(reply["result"])
            else:
                pending.deferred.errback(told)

    def _greeted(self, error: CallError | None) -> None:
        """Take the answer to the token; a daemon that asks for none may not know the function."""
        if error is not None and not isinstance(error, UnknownFunction):
            self.refusal = error
            self._unauthorized = None
            self.transport.abortConnection()

    def _report(self, number: Any, progress: dict[str, Any]) -> None:
        pending = self._pending.get(number) if type(number) is int else None
        if pending is not None and pending.on_progress is not None:
            try:
                pending.on_progress(
                    progress.get("done", 0), progress.get("total"), progress.get("message")
                )
            except Exception:
                self._log.failure("an on_progress callback failed")

    def lineLengthExceeded(self, line: bytes) -> None:
        """Give up on a daemon that sends more than anybody asked for."""
        self._has_given_up = True
        self._last_words = Malformed(f"a reply of more than {self.MAX_LENGTH} bytes")
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Fail every call that has no reply; none is left hanging."""
        self.connected = 0
        stop(self._abort)
        if self.refusal is None:
            self.refusal = self._why_refused(reason)
        # First of all, so that whoever tries again at once is not sent here.
        self._on_lost(self)
        if self._standing is not None and not self.has_stood:
            self._standing.errback(self.refusal or ConnectFailed("the connection was lost"))
        self._fail_calls(reason)
        if self._closed is not None:
            self._closed.callback(None)

    def _why_refused(self, reason: Failure) -> ClientError | CallError | None:
        if not self.has_stood:
            return failure_of_handshake(self.transport, reason)
        if self.has_answered:
            # Whatever it was, the daemon knows us. In particular a function that is
            # not for us is "unauthorized" too, and then the calls beside it may run.
            return None
        if self._unauthorized is not None:
            return self._unauthorized[0]
        return refused_certificate(reason)

    def _fail_calls(self, reason: Failure) -> None:
        # By its close alert the daemon says that it has answered all that it read, and
        # so it does by its goodbye when it stops; one that was killed sends neither. A
        # proxy would send a close alert in either case.
        was_closed = self._has_said_goodbye or (
            self._says_goodbye and self._closed is None and reason.check(ConnectionDone)
        )
        error: CallError = ConnectionLost(
            f"the connection ended before the reply: {reason.getErrorMessage()}{self._hint()}",
            may_have_started=not was_closed,
        )
        # What was sent since the daemon said "unauthorized" is another matter: if
        # it had closed the connection at that, there would hardly be any.
        refused_until = self._last_number
        if self._unauthorized is not None and self.refusal is self._unauthorized[0]:
            refused_until = self._unauthorized[1]
        # An answer without an id is to the oldest request that has none: those
        # before it were answered, those behind it were never read. Where it was us who
        # gave up on what came, all may have been.
        for number in list(self._pending):
            pending = self._take(number)
            if pending is None:
                continue
            if self.refusal is not None and number <= refused_until:
                pending.deferred.errback(self.refusal)
            elif self._last_words is not None:
                error, self._last_words = self._last_words, None
                pending.deferred.errback(error)
                who = "this program" if self._has_given_up else "the daemon"
                error = ConnectionLost(
                    f"{who} closed the connection: {error.message}",
                    may_have_started=self._has_given_up,
                )
            else:
                pending.deferred.errback(error)

    def _hint(self) -> str:
        """Tell what may be there, if nothing that a daemon says was ever heard."""
        is_known = self.has_answered or self._unauthorized or self._last_words or self._says_goodbye
        if is_known or self._closed is not None:
            return ""
        if ISSLTransport.providedBy(self.transport):
            return " Is it no taskd?"
        return " Does it speak TLS there (tls:), or is it no taskd?"


class _Pending:
    """One call in flight."""

    __slots__ = ("deferred", "on_progress", "timer")

    def __init__(self, deferred: Deferred[Any], on_progress: OnProgress | None) -> None:
        self.deferred = deferred
        self.on_progress = on_progress
        self.timer: IDelayedCall | None = None


class TaskClientFactory(ClientFactory, Caller):
    """
    One connection and its calls, for ``reactor.connectTCP`` and for endpoints.

    Calls may be made before the connection stands; they wait for it. When it
    cannot be made, or is lost, they fail; the factory does not connect again.

    Args:
        reactor: Keeps the time limits.
        on_lost: Called with the protocol when the connection is gone.
        token: As for ``TaskClient``.

    Raises:
        ValueError: *token* cannot be one.
    """

    noisy = False

    def __init__(
        self, reactor: Any, on_lost: _Notify = lambda _: None, *, token: str | None = None
    ) -> None:
        self._greeting = greeting(token)
        self._reactor = reactor
        self._on_lost = on_lost
        self._connection: TaskClientProtocol | None = None
        self._failure: Exception | None = None
        self._gates: deque[Gate] = deque()
        self._outstanding = Outstanding()

    def call_with(
        self,
        function: str,
        args: Args | tuple[Any, ...] = (),
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        priority: int = 0,
        cancel_on_disconnect: bool = False,
    ) -> Deferred[Any]:
        """Ask for a task, as ``TaskClient.call_with`` does."""
        terms = Terms(timeout, on_progress is not None, priority, cancel_on_disconnect)
        request = Asked(self._reactor, function, args, terms, on_progress)
        if (failure := request.failure or self._failure) is not None:
            return fail(failure)
        if self._connection is not None:
            return self._outstanding.add(request.send(self._connection))
        return self._outstanding.add(request.wait_in(self._gates))

    def close(self) -> Deferred[None]:
        """
        Wait for the calls in flight, then close the connection.

        Returns:
            Fires with None once it is closed, or if it was never made.
        """
        return self._outstanding.none_left().addCallback(lambda _: self._close())

    def _close(self) -> Deferred[None] | None:
        self._failure = ClientClosed("the connection was closed by this program")
        return None if self._connection is None else self._connection.close()

    def buildProtocol(self, addr: IAddress | None) -> TaskClientProtocol:
        """Make the connection's protocol."""
        return TaskClientProtocol(self._reactor, self._connected, self._lost, self._greeting)

    def _connected(self, connection: TaskClientProtocol) -> None:
        self._connection = connection
        if self._failure is not None:
            connection.close()
        while self._gates:
            self._gates.popleft().callback(connection)

    def _lost(self, connection: TaskClientProtocol) -> None:
        if self._failure is None:
            self._failure = connection.refusal or ConnectionLost(
                "the connection was lost", may_have_started=False
            )
        self._on_lost(connection)
        self._fail_gates("the connection was lost")

    def clientConnectionFailed(self, connector: IConnector, reason: Failure) -> None:
        """Fail every call that waits for the connection (``reactor.connectTCP``)."""
        self._fail_gates(f"no connection: {reason.getErrorMessage()}")

    def doStop(self) -> None:
        """Fail every call that waits for a connection which never stood (endpoints)."""
        super().doStop()  # type: ignore[no-untyped-call]
        if self._connection is None:
            self._fail_gates("no connection could be made")

    def _fail_gates(self, why: str) -> None:
        if self._failure is None:
            self._failure = ConnectFailed(why)
        while self._gates:
            self._gates.popleft().errback(self._failure)
