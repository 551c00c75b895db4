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

import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, gatherResults
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.python.failure import Failure

from taskd.connection import TaskClientFactory, TaskClientProtocol
from taskd.destination import Certificate, PemFile, endpoint_of
from taskd.errand import Asked, Caller, Gate, OnProgress, Outstanding, stop, stopping
from taskd.errors import CallError, ClientClosed, ConnectFailed, TlsFailed
from taskd.policy import reconnect_delay
from taskd.trust import greeting
from taskd.wire import Args, Terms

__all__ = ["OnProgress", "TaskClient", "TaskClientFactory", "TaskClientProtocol", "call_once"]

_RECONNECT_BASE_SECONDS: Final = 0.1
_RECONNECT_CAP_SECONDS: Final = 5.0

_NO_ANSWER: Final = ConnectFailed("it did not answer")


class TaskClient(Caller):
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
            which checks the server's certificate, and its name or IP address.
        ca: Path of a PEM file with the certificates of the authorities to trust
            over TLS, instead of the platform's.
        certificate: Path of a PEM file with the certificate to show over TLS, the
            authorities' between it and the daemon's ``--client-ca`` behind it, and
            its private key, not encrypted; or a pair of paths, the key's second.
        token: What the daemon knows the caller by, shown first on every
            connection. Whoever can read a connection that is not TLS has it.
        pool: Most connections to keep, from 1.
        connect_timeout: Seconds that a call waits for a connection, above 0.
        jitter: Gives draws from [0.0, 1.0), for the delays.

    Raises:
        ValueError: *endpoint* is not a description of an endpoint, or one of TLS
            that checks no name; *ca* or *certificate* cannot be read, or is for an
            endpoint that is not described by ``tls:``; *token* is empty or has
            control characters; or a number is out of its range.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: str | IStreamClientEndpoint,
        *,
        ca: PemFile | None = None,
        certificate: Certificate | None = None,
        token: str | None = None,
        pool: int = 4,
        connect_timeout: float = 10.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if pool < 1 or connect_timeout <= 0:
            raise ValueError("pool must be at least 1, and connect_timeout above 0")
        self._reactor = reactor
        self._name = endpoint if isinstance(endpoint, str) else "the daemon"
        self._endpoint = endpoint_of(reactor, endpoint, ca=ca, certificate=certificate)
        greeting(token)  # which knows what a token can be
        self._token = token
        self._pool = pool
        self._connect_timeout = connect_timeout
        self._jitter = jitter
        self._connections: list[TaskClientProtocol] = []
        self._attempts: set[Deferred[Any]] = set()
        self._gates: deque[Gate] = deque()
        self._failures = 0
        self._last_failure: BaseException = _NO_ANSWER
        self._back_off: IDelayedCall | None = None
        self._is_closed = False
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
            priority: Higher is earlier, among tasks that wait for a worker.
            cancel_on_disconnect: True: the task is cancelled if the connection
                ends before its reply.

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
                connection was seen. Over TLS a daemon that ends it in order has
                answered all that it began.
            Overloaded: Too many tasks wait; ``retry_after`` tells for how long.
            ShuttingDown: The daemon is stopping; the task was not started.
            Malformed: The daemon does not read such a request.
            LineTooLong: The request is longer than the daemon reads.
            Unauthorized: The caller may not do this, or the daemon does not know
                it, by its *token* or otherwise; nothing was run.
            InternalError: A bug in the daemon.
            ConnectFailed: No connection in time; nothing was run.
            WrongServerName: A ``ConnectFailed``, like those that follow: the
                certificate is for another name. They do not wait for that time.
            CertificateExpired: The server's certificate is not valid now.
            CertificateNotTrusted: Nobody whom *ca* trusts has signed it.
            ClientCertificateRefused: The daemon does not take *certificate*, or
                wants one.
            TlsFailed: TLS failed otherwise, which is what these four are, too.
            ClientClosed: ``close`` has been called; nothing was sent.
            ValueError: *timeout* or *priority* cannot be.
            CancelledError: The Deferred was cancelled.
        """
        terms = Terms(timeout, on_progress is not None, priority, cancel_on_disconnect)
        request = Asked(self._reactor, function, args, terms, on_progress)
        if request.failure is not None:
            return fail(request.failure)
        if self._is_closed:
            return fail(ClientClosed("the client is closed"))
        best = self._least_busy()
        if best is None or best.in_flight:
            self._open_if_allowed()
            best = self._least_busy()  # it may stand already
        if best is not None and not self._gates:
            return self._outstanding.add(request.send(best).addBoth(self._answered))
        called = request.wait_in(self._gates)
        gate = self._gates[-1]
        timer = self._reactor.callLater(self._connect_timeout, self._give_up, gate)
        self._use_idle_connections()
        return self._outstanding.add(stopping(timer, called).addBoth(self._answered))

    def _answered(self, result: Any) -> Any:
        self._use_idle_connections()
        return result

    def _use_idle_connections(self) -> None:
        """Send what waits for a connection on its way over one that has nothing else to do."""
        while self._gates and (best := self._least_busy()) is not None and not best.in_flight:
            self._gates.popleft().callback(best)

    def close(self) -> Deferred[None]:
        """
        Take no more calls, wait for those in flight, then close the connections.

        Returns:
            Fires with None once everything is closed.
        """
        self._is_closed = True
        return self._outstanding.none_left().addCallback(lambda _: self._close())

    def _close(self) -> Deferred[None]:
        stop(self._back_off)
        for attempt in list(self._attempts):
            attempt.cancel()
        return gatherResults([c.close() for c in list(self._connections)]).addCallback(_nothing)

    def _give_up(self, gate: Gate) -> None:
        if gate not in self._gates:
            return
        self._gates.remove(gate)
        best = self._least_busy()
        if best is not None:  # it has waited for one that never came
            gate.callback(best)
        elif self._back_off is not None and _is_final(self._last_failure):
            gate.errback(self._last_failure)
        else:
            gate.errback(
                ConnectFailed(
                    f"no connection to {self._name} within {self._connect_timeout:g} s: "
                    f"{self._last_failure}"
                )
            )

    def _open_if_allowed(self) -> None:
        if self._back_off is None and len(self._connections) + len(self._attempts) < self._pool:
            factory = TaskClientFactory(self._reactor, self._lost, token=self._token)
            attempt: Deferred[Any] = self._endpoint.connect(factory)
            attempt.addCallback(_standing)
            self._attempts.add(attempt)
            attempt.addBoth(self._attempted, attempt)
            attempt.addCallbacks(self._connected, self._not_connected)

    def _attempted(self, result: Any, attempt: Deferred[Any]) -> Any:
        self._attempts.discard(attempt)
        return result

    def _connected(self, connection: Any) -> None:
        if not connection.connected:
            self._turn_away()  # lost again within the same breath
            return
        self._connections.append(connection)
        self._open_gates()

    def _not_connected(self, reason: Failure) -> None:
        assert reason.value is not None
        self._wait_before_the_next(reason.value)
        self._open_gates()
        self._turn_away()

    def _turn_away(self) -> None:
        """Fail what waits, if waiting will not help: nobody will mend a certificate so soon."""
        failure = self._last_failure
        if self._connections or self._attempts or not _is_final(failure):
            return
        for gate in list(self._gates):
            if gate in self._gates:  # those before it may have cancelled it
                self._gates.remove(gate)
                gate.errback(failure)

    def _open_gates(self) -> None:
        """Send what waits, but leave the connections on their way their share."""
        share = math.ceil(len(self._gates) / (len(self._attempts) + 1))
        while share and self._gates and (best := self._least_busy()) is not None:
            share -= 1
            self._gates.popleft().callback(best)

    def _least_busy(self) -> TaskClientProtocol | None:
        return min(self._connections, key=lambda c: c.in_flight, default=None)

    def _lost(self, connection: TaskClientProtocol) -> None:
        if not connection.has_stood:
            return  # which its attempt tells
        if connection in self._connections:
            self._connections.remove(connection)
        if connection.refusal is not None:
            self._wait_before_the_next(connection.refusal)
            self._turn_away()
        elif connection.has_answered:
            self._failures = 0
            self._last_failure = _NO_ANSWER
        else:
            self._wait_before_the_next(_NO_ANSWER)

    def _wait_before_the_next(self, failure: BaseException) -> None:
        """Connect no more for a while; a daemon that hangs up on us is as one that is not there."""
        self._last_failure = failure
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
    ca: PemFile | None = None,
    certificate: Certificate | None = None,
    token: str | None = None,
    connect_timeout: float = 10.0,
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
        ca: As for ``TaskClient``, like all that follow.
        certificate: Path of a PEM file, or a pair of paths, or None.
        token: What the daemon knows the caller by, or None.
        connect_timeout: Seconds, above 0.

    Returns:
        Fires with the result, when the connection is closed again.

    Raises:
        TaskdError: As ``TaskClient.call_with``.
        ValueError: As ``TaskClient``, or a number of seconds cannot be.
    """
    try:
        client = TaskClient(
            reactor,
            endpoint,
            ca=ca,
            certificate=certificate,
            token=token,
            pool=1,
            connect_timeout=connect_timeout,
        )
    except ValueError as error:
        return fail(error)
    called = client.call_with(function, args, timeout=timeout, on_progress=on_progress)

    def close(result: Any) -> Deferred[Any]:
        return client.close().addCallback(lambda _: result)

    return called.addBoth(close)


def _standing(connection: TaskClientProtocol) -> Deferred[TaskClientProtocol]:
    return connection.standing()


def _is_final(failure: BaseException) -> bool:
    """Tell whether a failure to connect is one that somebody has to mend."""
    return isinstance(failure, TlsFailed | CallError)


def _nothing(_: object) -> None:
    return None
