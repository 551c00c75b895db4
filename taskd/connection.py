"""
One connection to a daemon, and the calls that are in flight on it.

The caller's side of the protocol: requests out, replies to the Deferreds that
they are for. Which of several connections a call takes is ``client``'s.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IAddress, IConnector, IDelayedCall
from twisted.internet.protocol import ClientFactory, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd.errors import (
    BadArguments,
    CallError,
    ClientClosed,
    ConnectFailed,
    ConnectionLost,
    Malformed,
    NotJson,
    TimeLimitExceeded,
    UnknownFunction,
    error_from_wire,
)
from taskd.lines import LongLineReceiver
from taskd.wire import MAX_PRIORITY, NO_TERMS, Args, Terms, decode_reply, encode_request

__all__ = [
    "Asked",
    "Caller",
    "Gate",
    "OnProgress",
    "Outstanding",
    "TaskClientFactory",
    "TaskClientProtocol",
    "stop",
    "stopping",
]

OnProgress = Callable[[float, float | None, str | None], object]
"""Takes what a task reports: how much is done, of how much or None, and a text or None."""

_ANSWER_GRACE_SECONDS: Final = 0.25
"""How long the daemon's own time-limit answer is waited for, which says more than ours."""

_CLOSE_SECONDS: Final = 5.0
"""How long a daemon may take over closing a connection; TLS would wait for ever."""

_LONGEST_REPLY_BYTES: Final = 64 * 1024 * 1024

_Notify = Callable[["TaskClientProtocol"], None]


class TaskClientProtocol(LongLineReceiver):
    """
    One connection to a daemon, and the calls that are in flight on it.

    Made by ``TaskClientFactory``.

    Args:
        reactor: Keeps the time limits.
        on_connected: Called with this protocol when the connection stands.
        on_lost: Called with it when the connection is gone, before its calls fail.

    Attributes:
        has_answered: True once the daemon has said anything.
    """

    _log = Logger(namespace="taskd.client")
    MAX_LENGTH = _LONGEST_REPLY_BYTES

    def __init__(self, reactor: Any, on_connected: _Notify, on_lost: _Notify) -> None:
        super().__init__()
        self._reactor = reactor
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._closed: Deferred[None] | None = None
        self._abort: IDelayedCall | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._last_words: CallError | None = None
        self.has_answered = False

    @property
    def in_flight(self) -> int:
        """Tell how many calls have no reply yet."""
        return len(self._pending)

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
        number = next(self._numbers)
        timeout = terms.timeout
        try:
            line = encode_request((function, args, str(number), terms))
        except NotJson as error:
            return fail(BadArguments(f"{function}: {error}"))
        if not self.connected:
            return fail(ConnectionLost("the connection was lost", may_have_started=False))
        pending = _Pending(Deferred(lambda _: self._cancel(number)), on_progress)
        if timeout is not None:
            pending.timer = self._reactor.callLater(
                timeout + _ANSWER_GRACE_SECONDS, self._expire, number, function, timeout
            )
        self._pending[number] = pending
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
            self._abort = self._reactor.callLater(_CLOSE_SECONDS, self.transport.abortConnection)
            self.transport.loseConnection()
        return self._closed

    def connectionMade(self) -> None:
        """Tell that calls can be sent."""
        self._on_connected(self)

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
                encode_request(("taskd.cancel", {"id": number}, str(next(self._numbers)), NO_TERMS))
            )

    def _expire(self, number: int, function: str, timeout: float) -> None:
        deferred = self._pending[number].deferred
        self._cancel(number)
        deferred.errback(TimeLimitExceeded(f"no answer to {function} within {timeout:g} s"))

    def lineReceived(self, line: bytes) -> None:
        """Fire the Deferred that a reply is for."""
        try:
            reply = decode_reply(line)
        except Malformed as error:
            self._last_words = error
            self.transport.abortConnection()
            return
        self.has_answered = True
        if "progress" in reply:
            self._report(reply["id"], reply["progress"])
        elif "id" not in reply:
            self._last_words = error_from_wire(reply["error"])
        elif (pending := self._take(reply["id"])) is not None:
            if "result" in reply:
                pending.deferred.callback(reply["result"])
            else:
                pending.deferred.errback(error_from_wire(reply["error"]))

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
        self._last_words = Malformed(f"a reply of more than {self.MAX_LENGTH} bytes")
        self.transport.abortConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Fail every call that has no reply; none is left hanging."""
        self.connected = 0
        # First of all, so that whoever tries again at once is not sent here.
        self._on_lost(self)
        # What ends a connection by anything but its close is a failed handshake.
        may_have_started = reason.check(ConnectionClosed) is not None
        error: CallError = ConnectionLost(
            f"the connection ended before the reply: {reason.getErrorMessage()}",
            may_have_started=may_have_started,
        )
        # An answer without an id is to the oldest request that has none: those
        # before it were answered, those behind it were never read.
        for number in list(self._pending):
            pending = self._take(number)
            if pending is None:
                continue
            if self._last_words is not None:
                error, self._last_words = self._last_words, None
                pending.deferred.errback(error)
                error = ConnectionLost(
                    f"the daemon closed the connection: {error.message}", may_have_started=False
                )
            else:
                pending.deferred.errback(error)
        stop(self._abort)
        if self._closed is not None:
            self._closed.callback(None)


class _Pending:
    """One call in flight."""

    __slots__ = ("deferred", "on_progress", "timer")

    def __init__(self, deferred: Deferred[Any], on_progress: OnProgress | None) -> None:
        self.deferred = deferred
        self.on_progress = on_progress
        self.timer: IDelayedCall | None = None


class Caller:
    """The short form of a call, for whoever has the long one."""

    call_with: Callable[..., Deferred[Any]]

    def call(
        self,
        function: str,
        /,
        *args: Any,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **keywords: Any,
    ) -> Deferred[Any]:
        """
        Ask for a task: ``client.call("send_mail", to="…", subject="…", timeout=10)``.

        Args:
            function: The task's name.
            args: Its positional arguments; or
            timeout: As in ``call_with``. A task that has a parameter of this
                name, or of the next one's, is called by ``call_with``.
            on_progress: As in ``call_with``.
            keywords: its keyword arguments.

        Returns:
            As ``call_with``.

        Raises:
            BadArguments: Both positional and keyword arguments are given.
            TaskdError: As ``call_with``.
        """
        if args and keywords:
            return fail(
                BadArguments(f"{function}: give all arguments by position or all by keyword")
            )
        return self.call_with(function, keywords or args, timeout=timeout, on_progress=on_progress)


class TaskClientFactory(ClientFactory, Caller):
    """
    One connection and its calls, for ``reactor.connectTCP`` and for endpoints.

    Calls may be made before the connection stands; they wait for it. When it
    cannot be made, or is lost, they fail; the factory does not connect again.

    Args:
        reactor: Keeps the time limits.
        on_lost: Called with the protocol when the connection is gone.
    """

    noisy = False

    def __init__(self, reactor: Any, on_lost: _Notify = lambda _: None) -> None:
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
        return TaskClientProtocol(self._reactor, self._connected, self._lost)

    def _connected(self, connection: TaskClientProtocol) -> None:
        self._connection = connection
        if self._failure is not None:
            connection.close()
        while self._gates:
            self._gates.popleft().callback(connection)

    def _lost(self, connection: TaskClientProtocol) -> None:
        if self._failure is None:
            self._failure = ConnectionLost("the connection was lost", may_have_started=False)
        self._on_lost(connection)

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


Gate = Deferred[TaskClientProtocol]
"""Fires with a connection, for a call that waits for one."""


class Asked:
    """
    What one call asks for, until there is a connection to send it over.

    Attributes:
        failure: Why it cannot be asked at all, or None.
    """

    def __init__(
        self,
        reactor: Any,
        function: str,
        args: Args | tuple[Any, ...],
        terms: Terms,
        on_progress: OnProgress | None,
    ) -> None:
        self._reactor = reactor
        self._function = function
        self._args: Args = list(args) if isinstance(args, tuple) else args
        self._terms = terms
        self._on_progress = on_progress
        self._began = reactor.seconds()
        self.failure = self._why_not()

    def _why_not(self) -> Exception | None:
        """Tell what is wrong with it: the daemon would hang up on everybody who shares the line."""
        timeout, priority = self._terms.timeout, self._terms.priority
        if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < 1e9):
            return ValueError(f"timeout must be seconds above 0 and below 1e9, not {timeout!r}")
        if type(priority) is not int or abs(priority) > MAX_PRIORITY:
            return ValueError(
                f"priority must be an integer within +-{MAX_PRIORITY}, not {priority!r}"
            )
        if type(self._terms.ends_with_caller) is not bool:
            return ValueError("cancel_on_disconnect must be True or False")
        if type(self._args) not in (list, dict):
            return BadArguments(
                f"{self._function}: args must be a list, tuple or dict, not {self._args!r:.60}"
            )
        if type(self._function) is not str:
            return UnknownFunction(f"a function's name is a string, not {self._function!r:.60}")
        return None

    def send(self, connection: TaskClientProtocol) -> Deferred[Any]:
        """Send it, with what is left of its time."""
        terms = self._terms
        if terms.timeout is not None:
            waited = self._reactor.seconds() - self._began
            terms = terms._replace(timeout=max(0.001, round(terms.timeout - waited, 3)))
        return connection.call(self._function, self._args, terms, self._on_progress)

    def wait_in(self, gates: deque[Gate]) -> Deferred[Any]:
        """Wait for a connection, at the end of *gates*; cancelling leaves the queue."""

        def leave(gate: Gate) -> None:
            if gate in gates:
                gates.remove(gate)

        gate: Gate = Deferred(leave)
        gates.append(gate)
        if self._terms.timeout is not None:
            timer = self._reactor.callLater(self._terms.timeout, self._expire, gate, leave)
            stopping(timer, gate)
        return gate.addCallback(self.send)

    def _expire(self, gate: Gate, leave: Callable[[Gate], None]) -> None:
        leave(gate)
        gate.errback(
            TimeLimitExceeded(
                f"no connection for {self._function} within {self._terms.timeout:g} s"
            )
        )


class Outstanding:
    """Count the calls whose Deferreds have not fired."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: list[Deferred[None]] = []

    def add(self, called: Deferred[Any]) -> Deferred[Any]:
        """Count a call until it has fired."""
        self._count += 1
        return called.addBoth(self._done)

    def _done(self, result: Any) -> Any:
        self._count -= 1
        if not self._count:
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:
                waiter.callback(None)
        return result

    def none_left(self) -> Deferred[None]:
        """Wait until there is none."""
        if not self._count:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        return waiter


def stop(timer: IDelayedCall | None) -> None:
    """Stop a timer, if there is one and it has not fired."""
    if timer is not None and timer.active():
        timer.cancel()


def stopping(timer: IDelayedCall, deferred: Deferred[Any]) -> Deferred[Any]:
    """Stop a timer when a Deferred fires."""

    def stop_and_pass(result: Any) -> Any:
        stop(timer)
        return result

    return deferred.addBoth(stop_and_pass)
