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
from typing import Any, Protocol

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd.call import Call, task_failed
from taskd.errors import TimeLimitExceeded
from taskd.functions import Kind, reporting_to
from taskd.scoreboard import Slot
from taskd.wire import encode_error, encode_progress, encode_result

__all__ = ["Executor", "Loop"]


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
        self._outcomes: deque[tuple[Call, _Outcome | None]] = deque()
        self._reports: dict[Call, bytes] = {}
        self._is_woken = False
        self._threads_to_start = threads
        self._running = 0
        self._idle: list[Deferred[None]] = []

    def start(self, call: Call) -> None:
        """Run a call's function; the call is ended when it is done."""
        if call.timeout is not None:
            call.timer = self._loop.callLater(call.timeout, self._expire, call)
        self._running += 1
        began = self._clock()
        self._slot.begin(call.function.label, began)
        if call.function.kind is Kind.THREAD:
            if self._threads_to_start:
                self._start_thread()
            self._waiting.put(call)
        else:
            self._start_on_reactor(call, began)

    def _expire(self, call: Call) -> None:
        call.fail(
            TimeLimitExceeded(f"{call.function.name} was not done within {call.timeout:g} s")
        )

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

    def _finish(self, call: Call, outcome: _Outcome | None) -> None:
        if outcome is None:
            self._slot.end(True, 0.0)
        else:
            self._slot.end(outcome.error is not None, outcome.seconds)
            if outcome.error is not None and call.reply is None:
                self._log.failure(
                    "{task} failed", failure=Failure(outcome.error), task=call.function.name
                )
            call.end(outcome.reply)
        self._running -= 1
        if not self._running and self._idle:
            waiting, self._idle = self._idle, []
            for waiter in waiting:
                waiter.callback(None)

    def _outcome(self, call: Call, began: float, work: Callable[[], Any]) -> _Outcome:
        """Make the reply out of what a piece of the task's own code returns or raises."""
        try:
            reply, error = encode_result(call.id_json, work()), None
        except BaseException as raised:  # a task may end in anything, SystemExit too
            error = raised
            reply = encode_error(
                call.id_json, task_failed(call.function.name, raised, self._debug)
            )
        return _Outcome(reply, error, self._clock() - began)

    # On the reactor.

    def _start_on_reactor(self, call: Call, began: float) -> None:
        invoke = partial(self._invoke, call)
        if call.send_progress is not None:
            context = copy_context()
            context.run(reporting_to.set, partial(self._report, call))
            invoke = partial(context.run, invoke)
        pending: list[Deferred[Any]] = []

        def work() -> Any:
            value = invoke()
            if isinstance(value, Deferred):
                pending.append(value)
                return None
            return value

        outcome = self._outcome(call, began, work)
        if pending:
            call.abandon = pending[0].cancel
            pending[0].addBoth(self._settle, call, began)
        else:
            self._finish(call, outcome)

    def _invoke(self, call: Call) -> Any:
        value = call.function.call(*call.positional, **call.keywords)
        if call.function.kind is Kind.COROUTINE:
            return Deferred.fromCoroutine(value)
        return value

    def _settle(self, result: Any, call: Call, began: float) -> None:
        def work() -> Any:
            if isinstance(result, Failure):
                result.raiseException()
            return result

        self._finish(call, self._outcome(call, began, work))

    # In a thread.

    def _start_thread(self) -> None:
        self._threads_to_start -= 1
        threading.Thread(target=self._work, name="taskd-task", daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self._waiting.get()
            outcome = None
            # It may have been cancelled, or come to its limit, while it waited.
            if call.reply is None:
                began = self._clock()
                self._slot.enter(call.function.label, began)
                outcome = self._outcome(call, began, partial(self._run_in_thread, call))
            self._outcomes.append((call, outcome))
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
        if isinstance(value, Deferred):
            raise TypeError(
                f"{call.function.name} returned a Deferred from a thread; "
                "register it with @task(blocking=False)"
            )
        return value

    def _report(
        self, call: Call, done: float, total: float | None, message: str | None
    ) -> None:
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
        while reports:
            self._send_report(*reports.popitem())
        while outcomes:
            call, outcome = outcomes.popleft()
            if call in reports:
                self._send_report(call, reports.pop(call))
            self._finish(call, outcome)

    def _send_report(self, call: Call, line: bytes) -> None:
        if call.reply is None and call.send_progress is not None:
            call.send_progress(line)


class _Outcome:
    """What became of a task that ran: the reply, the exception if any, the time."""

    __slots__ = ("error", "reply", "seconds")

    def __init__(self, reply: bytes, error: BaseException | None, seconds: float) -> None:
        self.reply = reply
        self.error = error
        self.seconds = seconds
