"""
Run functions: in a thread, or on the reactor, each until its time limit.

The thread is fed by a queue, answers into a deque, and wakes the reactor once
for a whole batch of results: ``deferToThread`` costs twice as much for a single
task, and eight times for many.

Nothing is known here of connections, or of the order of replies.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd.call import Call, task_failed
from taskd.errors import TimeLimitExceeded
from taskd.functions import Function, Kind, reporting_to
from taskd.scoreboard import Slot
from taskd.wire import encode_error, encode_progress, encode_result

__all__ = ["Executor", "Loop"]


_Outcome = tuple[Call, bytes | None, BaseException | None, float]
"""A call that a thread is done with: its reply or its exception, and the time it took."""


_JSON_TYPES: Final = frozenset({dict, list, tuple, str, int, float, bool, type(None)})


class Loop(Protocol):
    """What the executor needs of a reactor."""

    def callLater(  # noqa: N802, D102
        self, delay: float, f: Callable[..., object], /, *args: object
    ) -> IDelayedCall: ...

    def callFromThread(  # noqa: N802, D102
        self, f: Callable[..., object], /, *args: object
    ) -> None: ...


class Executor:
    """
    Run the tasks of one worker.

    Args:
        loop: The reactor, where results come back to.
        slot: Where the worker shows what it does.
        threads: How many blocking tasks run at a time, from 1.
        debug: True: callers are told tracebacks.
        clock: Gives seconds that never go back.

    Attributes:
        is_delivering: True while a batch of calls is being ended.
        on_delivered: Called when a batch is through.
        on_busy: Called when the first task starts that is not over at once.
    """

    _log = Logger(namespace="taskd.task")

    def __init__(
        self,
        loop: Loop,
        slot: Slot,
        *,
        threads: int = 1,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._slot = slot
        self._debug = debug
        self._clock = clock
        self._waiting: SimpleQueue[Call] = SimpleQueue()
        self._outcomes: deque[_Outcome] = deque()
        self._reports: dict[Call, bytes] = {}
        self._is_woken = False
        self._threads_to_start = threads
        self._running = 0
        self._idle: list[Deferred[None]] = []
        self.is_delivering = False
        self.on_delivered: Callable[[], None] = lambda: None
        self.on_busy: Callable[[], None] = lambda: None

    def call_now(
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
    ) -> bytes | Deferred[Any]:
        """
        Call a function of the reactor's kind, for a call without a limit and without progress.

        Most such calls are over when they return, so nothing is made to wait for them.

        Args:
            function: What to call, of ``Kind.REACTOR``.
            positional: Its positional arguments, bound.
            keywords: Its keyword arguments, bound.
            id_json: The caller's id as JSON, or ''.

        Returns:
            The reply, or the Deferred of a task that goes on; give that to ``start``.
        """
        began = self._clock()
        self._slot.enter(function.label, began)
        try:
            value = function.call(*positional, **keywords)
            # Deferred is an abstract class of sorts, which makes isinstance slow.
            if type(value) not in _JSON_TYPES and isinstance(value, Deferred):
                return value
            reply, failed = encode_result(id_json, value), False
        except BaseException as error:  # a task may end in anything, SystemExit too
            reply, failed = self._explain(function, id_json, error), True
        self._slot.leave(failed, self._clock() - began)
        return reply

    def start(self, call: Call, pending: Deferred[Any] | None = None) -> None:
        """
        Run a call's function; the call is ended when it is done.

        Args:
            call: A fresh call.
            pending: What ``call_now`` gave, if the function was called already.
        """
        if call.timeout is not None:
            call.timer = self._loop.callLater(call.timeout, self._expire, call)
        if not self._running:
            self.on_busy()
        self._running += 1
        began = self._clock()
        self._slot.begin(call.function.label, began)
        if pending is not None:
            self._wait_for(pending, call, began)
        elif call.function.kind is Kind.THREAD:
            if self._threads_to_start:
                self._start_thread()
            self._waiting.put(call)
        else:
            self._start_on_reactor(call, began)

    def _expire(self, call: Call) -> None:
        call.fail(TimeLimitExceeded(f"{call.function.name} was not done within {call.timeout:g} s"))

    def when_idle(self) -> Deferred[None]:
        """
        Wait until nothing runs.

        Returns:
            Fires with None once the last task has ended, at once if none runs.
        """
        if not self._running:
            return succeed(None)
        waiter: Deferred[None] = Deferred()
        self._idle.append(waiter)
        return waiter

    def _finish(self, call: Call, reply: bytes | None, failed: bool, seconds: float) -> None:
        self._slot.end(failed or call.reply is not None, seconds)
        if call in self._reports:
            self._send_report(call, self._reports.pop(call))
        if reply is not None:
            call.end(reply)
        self._running -= 1
        if not self._running and self._idle:
            waiting, self._idle = self._idle, []
            for waiter in waiting:
                waiter.callback(None)

    def _explain(self, function: Function, id_json: str, error: BaseException) -> bytes:
        """Log what a task has raised, and make the reply that says so."""
        self._log.failure("{task} failed", failure=Failure(error), task=function.name)
        return encode_error(id_json, task_failed(function.name, error, self._debug))

    # On the reactor.

    def _start_on_reactor(self, call: Call, began: float) -> None:
        call_it = partial(call.function.call, *call.positional, **call.keywords)
        context = copy_context()
        if call.send_progress is not None:
            context.run(reporting_to.set, partial(self._report, call))
        try:
            value = context.run(call_it)
            if call.function.kind is Kind.COROUTINE:
                value = context.run(Deferred.fromCoroutine, value)
        except BaseException as error:  # a task may end in anything, SystemExit too
            self._settle(Failure(error), call, began)
            return
        if isinstance(value, Deferred):
            self._wait_for(value, call, began)
        else:
            self._settle(value, call, began)

    def _wait_for(self, pending: Deferred[Any], call: Call, began: float) -> None:
        call.abandon = partial(self._cancel, call, pending)
        pending.addBoth(self._settle, call, began)

    def _cancel(self, call: Call, pending: Deferred[Any]) -> None:
        try:
            pending.cancel()
        except Exception:  # a task's canceller is its own code
            self._log.failure("{task} failed while it was cancelled", task=call.function.name)

    def _settle(self, result: Any, call: Call, began: float) -> None:
        failed, reply = True, None
        if call.reply is None:
            try:
                if isinstance(result, Failure):
                    result.raiseException()
                reply, failed = encode_result(call.id_json, result), False
            except BaseException as error:  # a task may end in anything, SystemExit too
                reply = self._explain(call.function, call.id_json, error)
        self._finish(call, reply, failed, self._clock() - began)

    # In a thread.

    def _start_thread(self) -> None:
        self._threads_to_start -= 1
        threading.Thread(target=self._work, name="taskd-task", daemon=True).start()

    def _work(self) -> None:
        clock, outcomes = self._clock, self._outcomes
        while True:
            call = self._waiting.get()
            # It may have been cancelled, or come to its limit, while it waited.
            if call.reply is not None:
                outcomes.append((call, None, None, 0.0))
            else:
                began = clock()
                self._slot.run(call.function.label, began)
                try:
                    reply, error = encode_result(call.id_json, self._run_in_thread(call)), None
                except BaseException as raised:  # a task may end in anything, SystemExit too
                    reply, error = None, raised
                outcomes.append((call, reply, error, clock() - began))
            self._wake()

    def _run_in_thread(self, call: Call) -> Any:
        if call.send_progress is None:
            value = call.function.call(*call.positional, **call.keywords)
        else:
            reporting_to.set(partial(self._report, call))
            try:
                value = call.function.call(*call.positional, **call.keywords)
            finally:
                reporting_to.set(None)
        if type(value) not in _JSON_TYPES and isinstance(value, Deferred):
            raise TypeError(
                f"{call.function.name} returned a Deferred from a thread; "
                "register it with @task(blocking=False)"
            )
        return value

    def _report(self, call: Call, done: float, total: float | None, message: str | None) -> None:
        self._reports[call] = encode_progress(call.id_json, done, total, message)
        self._wake()

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._loop.callFromThread(self._deliver)

    def _deliver(self) -> None:
        # First of all: from here on, whoever adds something wakes us again.
        self._is_woken = False
        outcomes, reports = self._outcomes, self._reports
        self.is_delivering = True
        try:
            while reports:
                self._send_report(*reports.popitem())
            while outcomes:
                call, reply, error, seconds = outcomes.popleft()
                if error is not None and call.reply is None:
                    reply = self._explain(call.function, call.id_json, error)
                self._finish(call, reply, error is not None, seconds)
        finally:
            self.is_delivering = False
            self.on_delivered()

    def _send_report(self, call: Call, line: bytes) -> None:
        if call.reply is None and call.send_progress is not None:
            call.send_progress(line)
