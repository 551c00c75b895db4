"""
The caller's side: Deferreds that fire with what a task returns.

``TaskClient`` is what most programs want: a few connections to one daemon,
opened when they are needed and again when they were lost, with all calls
pipelined over them. ``TaskClientFactory`` is one connection and its calls.
``call_once`` is one short connection for one task.

Nothing here blocks, and nothing here raises: what goes wrong is a failure of
the Deferred that it concerns.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, gatherResults, succeed
from twisted.internet.endpoints import clientFromString
from twisted.internet.error import ConnectionClosed
from twisted.internet.interfaces import IAddress, IConnector, IDelayedCall, IStreamClientEndpoint
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
    error_from_wire,
)
from taskd.lines import LongLineReceiver
from taskd.policy import reconnect_delay
from taskd.wire import Args, decode_reply, encode_request

__all__ = ["OnProgress", "TaskClient", "TaskClientFactory", "TaskClientProtocol", "call_once"]

OnProgress = Callable[[float, float | None, str | None], object]
"""Takes what a task reports: how much is done, of how much or None, and a text or None."""

_ANSWER_GRACE_SECONDS: Final = 0.25
"""How long the daemon's own time-limit answer is waited for, which says more than ours."""

_CLOSE_SECONDS: Final = 5.0
"""How long a daemon may take over closing a connection; TLS would wait for ever."""

_LONGEST_REPLY_BYTES: Final = 64 * 1024 * 1024

_RECONNECT_BASE_SECONDS: Final = 0.1
_RECONNECT_CAP_SECONDS: Final = 5.0


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
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Deferred[Any]:
        """
        Send one request.

        Args, result and failures are those of ``TaskClient.call_with``.
        """
        number = next(self._numbers)
        try:
            line = encode_request((function, args, str(number), timeout, on_progress is not None))
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
            _stop(pending.timer)
        return pending

    def _cancel(self, number: int) -> None:
        if self._take(number) is not None and self.connected:
            # The answer to this is of no interest, so its number is not kept.
            self.transport.write(
                encode_request(
                    ("taskd.cancel", {"id": number}, str(next(self._numbers)), None, False)
                )
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
        _stop(self._abort)
        if self._closed is not None:
            self._closed.callback(None)


class _Pending:
    """One call in flight."""

    __slots__ = ("deferred", "on_progress", "timer")

    def __init__(self, deferred: Deferred[Any], on_progress: OnProgress | None) -> None:
        self.deferred = deferred
        self.on_progress = on_progress
        self.timer: IDelayedCall | None = None


class _Caller:
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


class TaskClientFactory(ClientFactory, _Caller):
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
        self._gates: deque[_Gate] = deque()
        self._outstanding = _Outstanding()

    def call_with(
        self,
        function: str,
        args: Args | tuple[Any, ...] = (),
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Deferred[Any]:
        """Ask for a task, as ``TaskClient.call_with`` does."""
        request = _Request(self._reactor, function, args, timeout, on_progress)
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
        """Fail every call that waits for the connection."""
        self._failure = ConnectFailed(f"no connection: {reason.getErrorMessage()}")
        while self._gates:
            self._gates.popleft().errback(self._failure)


class TaskClient(_Caller):
    """
    Calls to one daemon, over a few connections that are kept.

    A connection is opened when a call finds every other one busy, up to *pool*;
    a call takes the one with the fewest calls in flight. A lost connection is
    opened again when it is needed, after a growing and random delay if the
    daemon could not be reached or did not answer. A call that was sent and not
    answered is never sent again by itself: it may have been run.

    Args:
        reactor: Makes the connections and keeps the time limits.
        endpoint: Where the daemon is: a Twisted endpoint, or its description,
            such as ``"tcp:127.0.0.1:12345"`` or ``"tls:tasks.example.org:12345"``,
            which checks the server's name.
        pool: Most connections to keep, from 1.
        connect_timeout: Seconds that a call waits for a connection, above 0.
        jitter: Gives draws from [0.0, 1.0), for the delays.

    Raises:
        ValueError: *endpoint* is not a description of an endpoint, or a number
            is out of its range.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: str | IStreamClientEndpoint,
        *,
        pool: int = 4,
        connect_timeout: float = 10.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if pool < 1 or connect_timeout <= 0:
            raise ValueError("pool must be at least 1, and connect_timeout above 0")
        self._reactor = reactor
        self._name = endpoint if isinstance(endpoint, str) else "the daemon"
        self._endpoint = _endpoint_of(reactor, endpoint)
        self._pool = pool
        self._connect_timeout = connect_timeout
        self._jitter = jitter
        self._connections: list[TaskClientProtocol] = []
        self._attempts: set[Deferred[Any]] = set()
        self._gates: deque[_Gate] = deque()
        self._failures = 0
        self._last_failure = "it did not answer"
        self._back_off: IDelayedCall | None = None
        self._is_closed = False
        self._outstanding = _Outstanding()

    def call_with(
        self,
        function: str,
        args: Args | tuple[Any, ...] = (),
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Deferred[Any]:
        """
        Ask for a task.

        Cancelling the Deferred has the daemon cancel the task, as far as that
        can be done; whatever it still answers is dropped.

        Args:
            function: The task's name.
            args: A list or tuple of positional arguments, or a dictionary of
                keyword arguments.
            timeout: Seconds until the call has failed, above 0, the wait for a
                connection included. None: no limit but the task's own.
            on_progress: Takes what the task reports.

        Returns:
            Fires with the result, as JSON carries it.

        Raises:
            UnknownFunction: The daemon has no such task.
            BadArguments: The arguments do not fit, or JSON cannot carry them.
            TaskFailed: The task raised; ``type`` names the exception.
            TimeLimitExceeded: It was not done in time.
            Cancelled: It was cancelled by its id.
            WorkerLost: Its worker died; ``may_have_started`` tells what is known.
            ConnectionLost: A ``WorkerLost`` of which only the end of the
                connection was seen.
            Overloaded: Too many tasks wait; ``retry_after`` tells for how long.
            ShuttingDown: The daemon is stopping; the task was not started.
            Malformed: The daemon does not read such a request.
            LineTooLong: The request is longer than the daemon reads.
            Unauthorized: The caller may not do this.
            InternalError: A bug in the daemon.
            ConnectFailed: No connection in time; nothing was sent.
            ClientClosed: ``close`` has been called; nothing was sent.
            ValueError: *timeout* cannot be.
            CancelledError: The Deferred was cancelled.
        """
        request = _Request(self._reactor, function, args, timeout, on_progress)
        if request.failure is not None:
            return fail(request.failure)
        if self._is_closed:
            return fail(ClientClosed("the client is closed"))
        best = self._least_busy()
        if best is None or best.in_flight:
            self._open_if_allowed()
            best = self._least_busy()  # it may stand already
        if best is not None:
            return self._outstanding.add(request.send(best))
        called = request.wait_in(self._gates)
        gate = self._gates[-1]
        timer = self._reactor.callLater(self._connect_timeout, self._give_up, gate)
        return self._outstanding.add(_stopping(timer, called))

    def close(self) -> Deferred[None]:
        """
        Take no more calls, wait for those in flight, then close the connections.

        Returns:
            Fires with None once everything is closed.
        """
        self._is_closed = True
        return self._outstanding.none_left().addCallback(lambda _: self._close())

    def _close(self) -> Deferred[None]:
        _stop(self._back_off)
        for attempt in list(self._attempts):
            attempt.cancel()
        return gatherResults([c.close() for c in list(self._connections)]).addCallback(_nothing)

    def _give_up(self, gate: _Gate) -> None:
        if gate in self._gates:
            self._gates.remove(gate)
            gate.errback(
                ConnectFailed(
                    f"no connection to {self._name} within {self._connect_timeout:g} s: "
                    f"{self._last_failure}"
                )
            )

    def _open_if_allowed(self) -> None:
        if self._back_off is None and len(self._connections) + len(self._attempts) < self._pool:
            attempt = self._endpoint.connect(TaskClientFactory(self._reactor, self._lost))
            self._attempts.add(attempt)
            attempt.addBoth(self._attempted, attempt)
            attempt.addCallbacks(self._connected, self._not_connected)

    def _attempted(self, result: Any, attempt: Deferred[Any]) -> Any:
        self._attempts.discard(attempt)
        return result

    def _connected(self, connection: Any) -> None:
        if not connection.connected:
            return  # lost again within the same breath
        self._connections.append(connection)
        self._open_gates()

    def _not_connected(self, reason: Failure) -> None:
        self._last_failure = reason.getErrorMessage()
        self._wait_before_the_next()
        self._open_gates()

    def _open_gates(self) -> None:
        """Send what waits, but leave the connections on their way their share."""
        share = math.ceil(len(self._gates) / (len(self._attempts) + 1))
        while share and self._gates and (best := self._least_busy()) is not None:
            share -= 1
            self._gates.popleft().callback(best)

    def _least_busy(self) -> TaskClientProtocol | None:
        return min(self._connections, key=lambda c: c.in_flight, default=None)

    def _lost(self, connection: TaskClientProtocol) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        if connection.has_answered:
            self._failures = 0
        else:
            self._wait_before_the_next()

    def _wait_before_the_next(self) -> None:
        """Connect no more for a while; a daemon that hangs up on us is as one that is not there."""
        self._failures += 1
        if self._back_off is None and not self._is_closed_for_good():
            delay = reconnect_delay(
                self._failures,
                base=_RECONNECT_BASE_SECONDS,
                cap=_RECONNECT_CAP_SECONDS,
                jitter=self._jitter(),
            )
            self._back_off = self._reactor.callLater(delay, self._try_again)

    def _is_closed_for_good(self) -> bool:
        return self._is_closed and not self._gates

    def _try_again(self) -> None:
        self._back_off = None
        if self._gates:
            self._open_if_allowed()


def call_once(
    reactor: Any,
    endpoint: str | IStreamClientEndpoint,
    function: str,
    args: Args | tuple[Any, ...] = (),
    *,
    timeout: float | None = None,
    on_progress: OnProgress | None = None,
) -> Deferred[Any]:
    """
    Ask for one task over a connection of its own.

    The way of programs that seldom call, or that have a balancer in front of
    several daemons choose anew each time.

    Args:
        reactor: Makes the connection and keeps the time limit.
        endpoint: As for ``TaskClient``.
        function: As for ``TaskClient.call_with``, like all that follow.
        args: Its arguments.
        timeout: Seconds, or None.
        on_progress: Takes what the task reports.

    Returns:
        Fires with the result, when the connection is closed again.

    Raises:
        TaskdError: As ``TaskClient.call_with``.
        ValueError: *endpoint* or *timeout* cannot be.
    """
    try:
        client = TaskClient(reactor, endpoint, pool=1)
    except ValueError as error:
        return fail(error)
    called = client.call_with(function, args, timeout=timeout, on_progress=on_progress)

    def close(result: Any) -> Deferred[Any]:
        return client.close().addCallback(lambda _: result)

    return called.addBoth(close)


_Gate = Deferred[TaskClientProtocol]
"""Fires with a connection, for a call that waits for one."""


class _Request:
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
        timeout: float | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._reactor = reactor
        self._function = function
        self._args: Args = list(args) if isinstance(args, tuple) else args
        self._timeout = timeout
        self._on_progress = on_progress
        self._began = reactor.seconds()
        self.failure: Exception | None = None
        if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < 1e9):
            self.failure = ValueError(f"timeout must be seconds above 0, not {timeout!r}")

    def send(self, connection: TaskClientProtocol) -> Deferred[Any]:
        left = self._timeout
        if left is not None:
            left = max(0.001, left - (self._reactor.seconds() - self._began))
        return connection.call(self._function, self._args, left, self._on_progress)

    def wait_in(self, gates: deque[_Gate]) -> Deferred[Any]:
        """Wait for a connection, at the end of *gates*; cancelling leaves the queue."""

        def leave(gate: _Gate) -> None:
            if gate in gates:
                gates.remove(gate)

        gate: _Gate = Deferred(leave)
        gates.append(gate)
        if self._timeout is not None:
            timer = self._reactor.callLater(self._timeout, self._expire, gate, leave)
            _stopping(timer, gate)
        return gate.addCallback(self.send)

    def _expire(self, gate: _Gate, leave: Callable[[_Gate], None]) -> None:
        leave(gate)
        gate.errback(
            TimeLimitExceeded(f"no connection for {self._function} within {self._timeout:g} s")
        )


class _Outstanding:
    """Count the calls whose Deferreds have not fired."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: list[Deferred[None]] = []

    def add(self, called: Deferred[Any]) -> Deferred[Any]:
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
        if not self._count:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._waiting.append(waiter)
        return waiter


def _endpoint_of(reactor: Any, endpoint: str | IStreamClientEndpoint) -> IStreamClientEndpoint:
    if not isinstance(endpoint, str):
        return endpoint
    try:
        made: IStreamClientEndpoint = clientFromString(reactor, endpoint)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{endpoint!r} describes no endpoint: {error}") from None
    return made


def _nothing(_: object) -> None:
    return None


def _stop(timer: IDelayedCall | None) -> None:
    if timer is not None and timer.active():
        timer.cancel()


def _stopping(timer: IDelayedCall, deferred: Deferred[Any]) -> Deferred[Any]:
    """Stop a timer when a Deferred fires."""

    def stop(result: Any) -> Any:
        _stop(timer)
        return result

    return deferred.addBoth(stop)
