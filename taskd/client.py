"""
The caller's side: Deferreds that fire with what a task returns.

``TaskClient`` is what most programs want: a few connections to a daemon, or to
each of several, opened when they are needed and again when they were lost, with
all calls pipelined over them. ``TaskClientFactory`` is one connection and its calls.
``call_once`` is one short connection for one task.

Nothing here blocks, and nothing here raises: what goes wrong is a failure of
the Deferred that it concerns.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, gatherResults
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.python.failure import Failure

from taskd.balance import Tier, Tries, least_loaded
from taskd.connection import TaskClientFactory, TaskClientProtocol
from taskd.destination import Certificate, PemFile, endpoint_of
from taskd.errand import Asked, Caller, Gate, OnProgress, Outstanding, stop, stopping
from taskd.errors import ClientClosed, ConnectFailed
from taskd.lines import unsent_bytes_of
from taskd.node import Node, Way
from taskd.trust import greeting
from taskd.wire import Args, Terms

__all__ = [
    "Endpoint",
    "OnProgress",
    "TaskClient",
    "TaskClientFactory",
    "TaskClientProtocol",
    "call_once",
]

Endpoint = str | IStreamClientEndpoint
"""Where one daemon is."""

_NEXT_NODE_SECONDS: Final = 0.25
"""How long the first connection may take before another daemon is tried as well (RFC 8305)."""


class TaskClient(Caller):
    """
    Calls to one daemon, or to several that are alike, over a few connections that are kept.

    A connection is opened when a call finds every other one busy, up to *pool*;
    a call takes the one with the fewest calls in flight. A lost connection is
    opened again when it is needed, after a growing and random delay if the
    daemon could not be reached or did not answer. A call that was sent and not
    answered is sent again by itself only if it certainly was not run, or if its
    caller says that it is idempotent.

    Of several daemons a call goes to the one with the fewest of our calls in
    flight. One that cannot be reached, loses connections or stops is left out
    for a growing and random delay, one that is overloaded for as long as it
    asks, while there are others. What such a daemon has not begun, another one
    is asked for.

    Args:
        reactor: Makes the connections and keeps the time limits.
        endpoint: Where the daemon is: a Twisted endpoint, or its description,
            such as ``"tcp:127.0.0.1:12345"`` or ``"tls:tasks.example.org:12345"``,
            which checks the server's certificate, and its name or IP address. Or
            a list or tuple of them, one for each daemon.
        ca: Path of a PEM file with the certificates of the authorities to trust
            over TLS, instead of the platform's.
        certificate: Path of a PEM file with the certificate to show over TLS, the
            authorities' between it and the daemon's ``--client-ca`` behind it, and
            its private key, not encrypted; or a pair of paths, the key's second.
        token: What the daemon knows the caller by, shown first on every
            connection. Whoever can read a connection that is not TLS has it.
        pool: Most connections to keep to each daemon, from 1.
        connect_timeout: Seconds that a call waits for a connection, above 0.
        jitter: Gives draws from [0.0, 1.0), for the delays.

    Raises:
        ValueError: *endpoint* is not a description of an endpoint, or one of TLS
            that checks no name, or there is none; *ca* or *certificate* cannot be
            read, or is for an endpoint that is not described by ``tls:``; *token* is
            empty or has control characters; or a number is out of its range.
    """

    def __init__(
        self,
        reactor: Any,
        endpoint: Endpoint | Sequence[Endpoint],
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
        endpoints = endpoint if isinstance(endpoint, list | tuple) else [endpoint]
        if not endpoints:
            raise ValueError("give one endpoint at least")
        self._reactor = reactor
        self._name = ", ".join(e for e in endpoints if isinstance(e, str)) or "the daemon"
        greeting(token)  # which knows what a token can be
        self._nodes = [
            Node(
                reactor,
                number,
                endpoint_of(reactor, one, ca=ca, certificate=certificate),
                token,
                pool,
                len(endpoints) > 1,
                jitter,
                self,
            )
            for number, one in enumerate(endpoints)
        ]
        self._pool = pool
        self._connect_timeout = connect_timeout
        self._turn = int(jitter() * len(endpoints))  # many clients do not all begin with the first
        self._gates: deque[Gate] = deque()
        self._next_node: IDelayedCall | None = None
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
        idempotent: bool = False,
    ) -> Deferred[Any]:
        """
        Ask for a task.

        Cancelling the Deferred has the daemon cancel the task, as far as that
        can be done; whatever it still answers is dropped.

        What certainly was not run is sent again by itself, within the time of the
        call, and four times at most in all; of a single daemon, which may be several
        behind a balancer, refusals as it stops count only beyond *pool*.

        Args:
            function: The task's name.
            args: A list or tuple of positional arguments, or a dictionary of
                keyword arguments.
            timeout: Seconds until the call has failed, above 0, the wait for a
                connection included. None: no limit but the task's own.
            on_progress: Takes what the task reports. If the call is sent again,
                that may begin anew.
            priority: Higher is earlier, among tasks that wait for a worker.
            cancel_on_disconnect: True: the task is cancelled if the connection
                ends before its reply.
            idempotent: True: it does no harm if the task is run more than once, so
                the call is sent again after a loss as well, once for each daemon at
                most; what was lost may still run.

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
            Overloaded: Too many tasks wait, at every daemon that serves;
                ``retry_after`` tells for how long.
            ShuttingDown: The daemon is stopping, and so was every other that was
                asked; the task was not started.
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
            ValueError: *timeout*, *priority*, *cancel_on_disconnect* or *idempotent*
                cannot be.
            CancelledError: The Deferred was cancelled.
        """
        terms = Terms(timeout, on_progress is not None, priority, cancel_on_disconnect)
        request = Asked(self._reactor, function, args, terms, on_progress)
        if request.failure is not None:
            return fail(request.failure)
        if type(idempotent) is not bool:
            return fail(ValueError("idempotent must be True or False"))
        if self._is_closed:
            return fail(ClientClosed("the client is closed"))
        tries = Tries(len(self._nodes), idempotent, self._pool)
        return self._outstanding.add(self._dispatch(request, tries).addBoth(self._answered))

    def _dispatch(self, request: Asked, tries: Tries) -> Deferred[Any]:
        """Send a call over the best connection, or have it wait for one."""
        self._open_if_needed()
        best = self._best()  # it may stand already
        if best is not None and not self._gates:
            return self._send(request, tries, best)
        called = request.wait_in(self._gates, lambda way: self._send(request, tries, way))
        gate = self._gates[-1]
        timer = self._reactor.callLater(self._connect_timeout, self._give_up, gate)
        self._use_idle_connections()
        self._look_further_soon()
        return stopping(timer, called)

    def _send(self, request: Asked, tries: Tries, way: Way) -> Deferred[Any]:
        tries.sends += 1
        self._turn = way.node.number + 1
        return request.send(way).addErrback(self._failed, request, tries)

    def _failed(self, failure: Failure, request: Asked, tries: Tries) -> Any:
        """Send a call again that has failed, if that may be."""
        error = failure.value
        assert error is not None
        may_go_on = tries.may_go_on(
            error,
            is_refusal=any(error is node.last_failure for node in self._nodes),
            another_serves=any(n.ways and n.load.tier is Tier.SERVES for n in self._nodes),
        )
        if not may_go_on or request.is_late or self._are_hopeless():
            return failure
        self._use_idle_connections()
        return self._dispatch(request, tries).addErrback(_told_by, tries)

    def _answered(self, result: Any) -> Any:
        self._use_idle_connections()
        return result

    def _use_idle_connections(self) -> None:
        """Send what waits for a connection on its way over one that has nothing else to do."""
        while self._gates and (best := self._best()) is not None and not best.in_flight:
            self._gates.popleft().callback(best)

    @property
    def unsent_bytes(self) -> int:
        """Tell how many bytes of requests the daemons have not read."""
        return sum(
            unsent_bytes_of(way.connection.transport) for node in self._nodes for way in node.ways
        )

    def close(self) -> Deferred[None]:
        """
        Take no more calls, wait for those in flight, then close the connections.

        Returns:
            Fires with None once everything is closed.
        """
        self._is_closed = True
        return self._outstanding.none_left().addCallback(lambda _: self._close())

    def _close(self) -> Deferred[None]:
        stop(self._next_node)
        return gatherResults([node.close() for node in self._nodes]).addCallback(_nothing)

    def _give_up(self, gate: Gate) -> None:
        if gate not in self._gates:
            return
        self._gates.remove(gate)
        best = self._best()
        if best is not None:  # it has waited for one that never came
            gate.callback(best)
        elif self._are_hopeless() and all(node.is_out for node in self._nodes):
            gate.errback(self._last_failure())
        else:
            gate.errback(
                ConnectFailed(
                    f"no connection to {self._name} within {self._connect_timeout:g} s: "
                    f"{self._last_failure()}"
                )
            )

    # Which node.

    def _best(self) -> Way | None:
        """Give the connection that the next call takes, of those that stand."""
        node = self._least_loaded([node for node in self._nodes if node.ways])
        return None if node is None else node.best_way()

    def _open_if_needed(self) -> None:
        """Make one more connection, to the node that has least to do, if it has none that idles."""
        node = self._least_loaded([node for node in self._nodes if node.ways or node.may_open])
        if node is not None:
            best = node.best_way()
            if best is None or best.in_flight:
                self._turn = node.number + 1
                node.open()

    def _least_loaded(self, nodes: list[Node]) -> Node | None:
        if len(self._nodes) == 1:
            return nodes[0] if nodes else None
        number = least_loaded([node.load for node in nodes], self._turn)
        return None if number is None else self._nodes[number]

    def _look_further_soon(self) -> None:
        """Try the other nodes, one after the other, if the first one lets us wait."""
        if self._next_node is None and len(self._nodes) > 1 and self._best() is None:
            self._next_node = self._reactor.callLater(_NEXT_NODE_SECONDS, self._look_further)

    def _look_further(self) -> None:
        self._next_node = None
        self.opened()  # a connection may be in doubt no longer
        if self._gates and self._best() is None:
            self._open_if_needed()
            self._look_further_soon()

    # What the nodes tell.

    def opened(self) -> None:
        """Send what waits, but leave the connections on their way their share."""
        attempts = sum(len(node.attempts) for node in self._nodes)
        share = math.ceil(len(self._gates) / (attempts + 1))
        while share and self._gates and (best := self._best()) is not None:
            share -= 1
            self._gates.popleft().callback(best)
        self.refused()  # if it was lost again within the same breath

    def not_opened(self) -> None:
        """Send what waits where it can be sent, or try the next node."""
        self.opened()
        if self._gates and self._best() is None:
            self._open_if_needed()

    def refused(self) -> None:
        """Fail what waits, if waiting will not help."""
        if self._are_hopeless():
            failure = self._last_failure()
            for gate in list(self._gates):
                if gate in self._gates:  # those before it may have cancelled it
                    self._gates.remove(gate)
                    gate.errback(failure)

    def back(self, node: Node) -> None:
        """Try a node again, if anybody waits."""
        if self._gates:
            node.open()

    def wants_no_more(self) -> bool:
        """Tell whether nobody will ask for a connection any more."""
        return self._is_closed and not self._gates

    def _are_hopeless(self) -> bool:
        return all(node.is_hopeless for node in self._nodes)

    def _last_failure(self) -> BaseException:
        """Give the failure to tell of: one for which there is a cause, if there are several."""
        failures = [node.last_failure for node in self._nodes]
        return next((f for f in failures if not isinstance(f, ConnectFailed)), failures[-1])


def call_once(
    reactor: Any,
    endpoint: Endpoint | Sequence[Endpoint],
    function: str,
    args: Args | tuple[Any, ...] = (),
    *,
    timeout: float | None = None,
    on_progress: OnProgress | None = None,
    ca: PemFile | None = None,
    certificate: Certificate | None = None,
    token: str | None = None,
    connect_timeout: float = 10.0,
    idempotent: bool = False,
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
        idempotent: As for ``TaskClient.call_with``.

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
    called = client.call_with(
        function, args, timeout=timeout, on_progress=on_progress, idempotent=idempotent
    )

    def close(result: Any) -> Deferred[Any]:
        # Who cancels meanwhile waits no longer for the connection's end.
        done: Deferred[Any] = Deferred(lambda done: done.callback(result))
        client.close().addBoth(lambda _: None if done.called else done.callback(result))
        return done

    return called.addBoth(close)


def _told_by(failure: Failure, tries: Tries) -> Failure:
    assert failure.value is not None
    verdict = tries.verdict(failure.value)
    return failure if verdict is failure.value else Failure(verdict)


def _nothing(_: object) -> None:
    return None
