"""
What a caller asks for, until there is a connection to send it over.

Here are the checks that need no daemon, the wait for a connection, and the time
that passes meanwhile. Connections themselves are ``connection``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.interfaces import IDelayedCall

from taskd.errors import BadArguments, TimeLimitExceeded, UnknownFunction
from taskd.wire import MAX_PRIORITY, Args, Terms

__all__ = [
    "Asked",
    "Caller",
    "Gate",
    "Line",
    "OnProgress",
    "Outstanding",
    "stop",
    "stopping",
]

OnProgress = Callable[[float, float | None, str | None], object]
"""Takes what a task reports: how much is done, of how much or None, and a text or None."""


class Line(Protocol):
    """What a call is sent over: a ``connection.TaskClientProtocol``."""

    def call(
        self, function: str, args: Args, terms: Terms, on_progress: OnProgress | None
    ) -> Deferred[Any]:
        """Send one request."""
        ...


Gate = Deferred[Any]
"""Fires with a ``Line``, for a call that waits for one."""


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

    def send(self, connection: Line) -> Deferred[Any]:
        """Send it, with what is left of its time."""
        terms = self._terms
        if terms.timeout is not None:
            left = round(terms.timeout - self._waited, 3)
            terms = terms._replace(timeout=max(0.001, left))
        return connection.call(self._function, self._args, terms, self._on_progress)

    @property
    def is_late(self) -> bool:
        """Tell whether its time is over."""
        timeout = self._terms.timeout
        return timeout is not None and self._waited >= timeout

    @property
    def _waited(self) -> float:
        waited: float = self._reactor.seconds() - self._began
        return waited

    def wait_in(
        self, gates: deque[Gate], send: Callable[[Any], Deferred[Any]] | None = None
    ) -> Deferred[Any]:
        """Wait at the end of *gates* for a connection to *send* over; cancelling leaves them."""

        def leave(gate: Gate) -> None:
            if gate in gates:
                gates.remove(gate)

        gate: Gate = Deferred(leave)
        gates.append(gate)
        if self._terms.timeout is not None:
            left = max(0.0, self._terms.timeout - self._waited)
            timer = self._reactor.callLater(left, self._expire, gate, leave)
            stopping(timer, gate)
        return gate.addCallback(send or self.send)

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
