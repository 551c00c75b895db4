"""
Run functions: in a thread, or on the reactor, each until its time limit.

The thread is fed by a queue, answers into a deque, and wakes the reactor once
for a whole batch of results: ``deferToThread`` costs twice as much for a single
task, and eight times for many. Which blocking calls are run here is decided by
``lane``; the others are handed over.

Nothing is known here of connections, of the order of replies, or of who takes
what is handed over.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from taskd.call import Call, Origin
from taskd.deadlines import Deadlines, Timer
from taskd.errors import InternalError, TaskFailed
from taskd.functions import Function, Kind, reporting_to
from taskd.lane import HANDOVER_SECONDS, Lane, Look
from taskd.ledger import Ledger
from taskd.pool import Pool
from taskd.slots import Slot
from taskd.tracing import about_now, running, stack_of
from taskd.wire import NO_TERMS, encode_progress, encode_result

__all__ = ["Executor", "Loop"]

_LAST_MOMENT_SECONDS: Final = 0.01
"""How long a thread may take to come to its own end when its call is given up."""

_Outcome = tuple[Call, bytes | None, BaseException | None, float]
"""A call that a thread is done with: its reply or its exception, and the time it took."""

_JSON_TYPES: Final = frozenset({dict, list, tuple, str, int, float, bool, type(None)})


class Loop(Timer, Protocol):
    """What the executor needs of a reactor."""

    def callFromThread(  # noqa: N802, D102
        self, f: Callable[..., object], /, *args: object
    ) -> None: ...


class Executor:
    """
    Run the tasks of one worker.

    Args:
        loop: The reactor, where results come back to.
        slot: Where the worker shows what it does.
        ledger: Takes what became of calls.
        threads: How many blocking tasks run at a time, from 1.
        clock: Gives CLOCK_MONOTONIC seconds.

    Attributes:
        ledger: As it was given.
        lane: Decides which blocking calls run here.
        pool: Takes the others; None: there are no others.
        is_delivering: True while a batch of calls is being ended.
        on_delivered: Called when a batch is through.
        on_busy: Called when the first task starts that is not over at once.
        on_idle: Called when the last task has ended; None: nobody wants to know.
        ended: How many blocking calls have come to an end here.
        is_relieved: True while others do for this worker what it has no thread
            for; its pool is told when it has one again.
    """

    _log = Logger(namespace="taskd.task")

    def __init__(
        self,
        loop: Loop,
        slot: Slot,
        ledger: Ledger,
        *,
        threads: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._slot = slot
        self.ledger = ledger
        self._done = ledger.done
        self._clock = clock
        self._waiting: SimpleQueue[Call | None] = SimpleQueue()
        self._outcomes: deque[_Outcome] = deque()
        self._reports: dict[Call, bytes] = {}
        self._is_woken = False
        self._threads_to_start = threads
        self._threads: dict[int, list[Call | None]] = {}
        self._on_reactor: dict[Call, None] = {}
        self._failures: WeakKeyDictionary[Deferred[Any], Failure] = WeakKeyDictionary()
        self._stuck: set[Call] = set()
        self._deadlines = Deadlines(loop, slot, clock)
        self._watch: IDelayedCall | None = None
        self._abandon = self._give_up  # bound once, not for each call
        self.lane = Lane(threads)
        self.pool: Pool | None = None
        self.ended = 0
        self.is_relieved = False
        self.is_delivering = False
        self.on_delivered: Callable[[], None] = lambda: None
        self.on_busy: Callable[[], None] = lambda: None
        self.on_idle: Callable[[], None] | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing runs or waits here; what is stuck does not count."""
        return not self._on_reactor and self.lane.occupied == len(self._stuck)

    def call_now(
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
        origin: Origin | None = None,
        tell: Callable[[str | None, float], None] | None = None,
    ) -> bytes | Deferred[Any]:
        """
        Call a function of the reactor's kind, for a call without a limit and without progress.

        Most such calls are over when they return, so nothing is made to wait for them.

        Args:
            function: What to call, of ``Kind.REACTOR``.
            positional: Its positional arguments, bound.
            keywords: Its keyword arguments, bound.
            id_json: The caller's id as JSON, or ''.
            origin: Where the call comes from, for the log.
            tell: Takes what becomes of it: what its caller is told, or None if it
                is done, and how long it ran. None: it is counted here.

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
            reply, code = encode_result(id_json, value), None
        except BaseException as error:  # a task may end in anything, SystemExit too
            reply = self.ledger.explain(function, id_json, origin, error, began)
            code = TaskFailed.code
        seconds = self._clock() - began
        power = self._slot.leave(code is not None, seconds)
        if tell is not None:
            tell(code, seconds)
        elif code is None:
            self._done(function.label, seconds, power)
        else:
            self.ledger.count_failed(function.label, code, seconds)
        return reply

    def start(self, call: Call, pending: Deferred[Any] | None = None) -> None:
        """
        Run a call's function, or have it run; the call is ended when it is done.

        Args:
            call: A fresh call, or one that another worker handed over.
            pending: What ``call_now`` gave, if the function was called already.
        """
        function, lane = call.function, self.lane
        now = self._clock()
        if call.terms is not NO_TERMS and not self._admits(call, now):
            return
        if function.kind is not Kind.THREAD:
            self._start_here(call, pending, now)
            return
        if (
            (lane.is_wary or call.terms is not NO_TERMS)
            and self.pool is not None
            and lane.sends_on(call.terms.priority)
        ):
            self._hand_over([call])
            return
        if self._threads_to_start and not self._start_thread():
            call.fail(InternalError("the system lets this worker start no thread; try again"))
            return
        occupied = lane.occupied
        if occupied < lane.threads:
            lane.began(now, self.ended)
            if not occupied and not self._on_reactor:
                self.on_busy()
        lane.occupied = occupied + 1
        self._slot.take(function.label, now)
        call.abandon = self._abandon
        if function.timeout is not None or call.deadline is not None:
            self._deadlines.keep(call)
        self._waiting.put(call)
        if occupied >= lane.threads and self._watch is None and self.pool is not None:
            self._look()

    def _admits(self, call: Call, now: float) -> bool:
        """Have the time run that a caller gives a call; tell whether any is left."""
        if call.terms.timeout is not None and call.deadline is None:
            call.deadline = now + call.terms.timeout
        if call.deadline is not None and call.deadline <= now:  # it was on its way for too long
            self._deadlines.keep(call)
            return False
        return True

    def _start_here(self, call: Call, pending: Deferred[Any] | None, now: float) -> None:
        """Run a call on the reactor."""
        if self.is_idle:
            self.on_busy()
        self._on_reactor[call] = None
        call.began = now
        self._slot.begin(call.function.label, now)
        if call.function.timeout is not None or call.deadline is not None:
            self._deadlines.keep(call)
            self._deadlines.show(call, now)
        if pending is not None:
            self._wait_for(pending, call, now)
        else:
            self._start_on_reactor(call, now)

    def send_on(self, call: Call) -> None:
        """Have others run a call, whatever it is."""
        if self._admits(call, self._clock()):
            self._hand_over([call])

    # What cannot be stopped.

    def _give_up(self, call: Call) -> None:
        """Find out whether the thread of a call that has failed comes to an end all the same."""
        self._deadlines.forget(call)
        if call.began is not None:
            self._stuck.add(call)  # it holds up nobody's end any more
            self._loop.callLater(_LAST_MOMENT_SECONDS, self._report_stuck, call)

    def _report_stuck(self, call: Call) -> None:
        if call not in self._stuck:
            return
        stack = stack_of(call, self._threads)
        self._log.warn("{function} was given up and goes on", traceback=stack, **call.about())
        self.lane.retire()
        if self.pool is not None:
            self.pool.stuck()
        self._rest()

    def about_now(self) -> dict[str, str]:
        """Tell which call it is whose task asks, for the log; nothing if it is none."""
        return about_now(self._threads, Executor.call_now.__code__)

    # What is handed over.

    @property
    def is_held_up(self) -> bool:
        """Tell whether a blocking call that came now would have to wait for a long one."""
        lane = self.lane
        return lane.occupied >= lane.threads and lane.is_held_up(
            self._clock(), self.ended + len(self._outcomes)
        )

    def _look(self) -> None:
        """See to what waits; a timer costs more than a quick task, so there is one only then."""
        self._watch = None
        pool, lane = self.pool, self.lane
        if pool is None:
            return
        ended = self.ended + len(self._outcomes)
        found, handed = lane.look(self._clock(), ended, pool.idle)
        if handed:
            self._hand_over_waiting(handed)
        if found is Look.MOVING:
            self._watch = self._loop.callLater(HANDOVER_SECONDS, self._look)
        elif found is Look.FULL:
            self.is_relieved = True
            pool.filled()

    def hand_over_all(self) -> None:
        """Have others run every blocking call that no thread here has begun."""
        self._hand_over_waiting(self.lane.occupied)

    def _hand_over_waiting(self, most: int) -> None:
        calls: list[Call] = []
        with suppress(Empty):
            while len(calls) < most and (call := self._waiting.get_nowait()) is not None:
                calls.append(call)
        self.lane.occupied -= len(calls)
        for call in calls:
            self._slot.hand_over()
            call.stop_timer()
        self._hand_over([call for call in calls if call.reply is None])

    def _hand_over(self, calls: list[Call]) -> None:
        if self.pool is None or not calls:
            return
        self.pool.take(calls)
        for call in calls:
            if call.deadline is not None:
                self._deadlines.keep_callers(call)

    # On the reactor.

    def _start_on_reactor(self, call: Call, began: float) -> None:
        try:
            value = copy_context().run(self._call_in_context, call)
        except BaseException as error:  # a task may end in anything, SystemExit too
            self._settle(Failure(error), call, began)
            return
        if isinstance(value, Deferred):
            self._wait_for(value, call, began)
        else:
            self._settle(value, call, began)

    def _call_in_context(self, call: Call) -> Any:
        running.set(call)
        if call.send_progress is not None:
            reporting_to.set(partial(self._report, call))
        value = call.function.call(*call.positional, **call.keywords)
        return Deferred.fromCoroutine(value) if call.function.kind is Kind.COROUTINE else value

    def _wait_for(self, pending: Deferred[Any], call: Call, began: float) -> None:
        call.abandon = partial(self._cancel, pending)
        pending.addBoth(self._settle_pending, pending, call, began)

    def _settle_pending(self, result: Any, pending: Deferred[Any], call: Call, began: float) -> Any:
        """Take what a Deferred has fired with, which its task may have returned to others too."""
        if isinstance(result, Failure):
            # Left in the Deferred it would be logged as nobody's; the next one gets it from here.
            self._failures[pending] = result
        else:
            result = self._failures.get(pending, result)
        self._settle(result, call, began)
        return None if isinstance(result, Failure) else result

    def _cancel(self, pending: Deferred[Any], call: Call) -> None:
        try:
            pending.cancel()
        except Exception:  # a task's canceller is its own code
            words = "{function} failed while it was cancelled"
            self._log.failure(words, None, LogLevel.warn, **call.about())

    def _settle(self, result: Any, call: Call, began: float) -> None:
        code, reply = call.code, None
        if call.reply is None:
            try:
                if isinstance(result, Failure):
                    result.raiseException()
                reply = encode_result(call.id_json, result)
            except BaseException as error:  # a task may end in anything, SystemExit too
                reply = self.ledger.raised(call, error)
                code = TaskFailed.code
        self._on_reactor.pop(call, None)
        self._deadlines.forget(call)
        seconds = self._clock() - began
        self._slot.end(code is not None or call.reply is not None, seconds)
        if call in self._reports:
            self._send_report(call, self._reports.pop(call))
        if reply is not None:
            call.end(reply, seconds, code)
        self._rest()

    def _rest(self) -> None:
        """Take note that tasks have ended: nothing runs now, or show the oldest that does."""
        if self.is_idle:
            if self.on_idle is not None:
                self.on_idle()
        elif self._on_reactor or self.lane.threads > 1:
            running = [call for (call,) in list(self._threads.values()) if call is not None]
            running += list(self._on_reactor)[:1]
            if running:
                oldest = min(running, key=lambda call: call.began or math.inf)
                self._slot.run(oldest.function.label, oldest.began or self._clock())

    # In a thread.

    def _start_thread(self) -> bool:
        """Start one more thread; tell whether there is any."""
        thread = threading.Thread(target=self._work, name="taskd-task", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system's limit of processes
            self._log.error("no thread can be started: {reason}", reason=error)
        else:
            self._threads_to_start -= 1
        return self._threads_to_start < self.lane.threads

    def close(self) -> None:
        """Have the threads end, each when it has nothing more to run."""
        for _ in range(self.lane.threads - self._threads_to_start):
            self._waiting.put(None)

    def _work(self) -> None:
        clock, outcomes, running = self._clock, self._outcomes, self._threads
        show, waiting = self._slot.run, self._waiting
        mine: list[Call | None] = [None]
        running[threading.get_ident()] = mine
        while (call := waiting.get()) is not None:
            call.began = began = clock()
            # It may have been cancelled, or come to its limit, while it waited.
            # Whoever does that looks for the beginning afterwards, and this the
            # other way round, so that one sees the other.
            if call.reply is not None:
                outcomes.append((call, None, None, 0.0))
            else:
                mine[0] = call
                show(call.function.label, began)
                if call.timer is not None:
                    self._deadlines.show(call, began)
                try:
                    if call.send_progress is None:
                        value = call.function.call(*call.positional, **call.keywords)
                    else:
                        value = self._call_reporting(call)
                    if type(value) not in _JSON_TYPES and isinstance(value, Deferred):
                        raise TypeError(
                            f"{call.function.name} returned a Deferred from a thread; "
                            "register it with @task(blocking=False)"
                        )
                    reply, error = encode_result(call.id_json, value), None
                except BaseException as raised:  # a task may end in anything, SystemExit too
                    reply, error = None, raised
                mine[0] = None
                outcomes.append((call, reply, error, clock() - began))
            self._wake()

    def _call_reporting(self, call: Call) -> Any:
        reporting_to.set(partial(self._report, call))
        try:
            return call.function.call(*call.positional, **call.keywords)
        finally:
            reporting_to.set(None)

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
        outcomes, reports, lane = self._outcomes, self._reports, self.lane
        finish = self._slot.finish
        self.is_delivering = True
        try:
            while reports:
                self._send_report(*reports.popitem())
            while outcomes:
                call, reply, error, seconds = outcomes.popleft()
                lane.occupied -= 1
                self.ended += 1
                if call.timer is not None or call.reply is not None:
                    self._deadlines.forget(call)
                    self._stuck.discard(call)
                finish(error is not None or call.reply is not None, seconds)
                code = None
                if error is not None and call.reply is None:
                    reply, code = self.ledger.raised(call, error), TaskFailed.code
                if reports and call in reports:  # the last one comes before the reply
                    self._send_report(call, reports.pop(call))
                if reply is not None:
                    call.end(reply, seconds, code)
        finally:
            self.is_delivering = False
            self.on_delivered()
        if self.pool is not None:
            self._look_around(self.pool)
        self._rest()

    def _look_around(self, pool: Pool) -> None:
        """Take note that threads have become free, and think of those who wait elsewhere."""
        was_full = self.lane.reopens()
        if self.is_relieved and self.lane.occupied < self.lane.threads:
            self.is_relieved = False
            pool.freed()
        if pool.waits() and self.lane.asks(was_full):
            pool.ask()

    def _send_report(self, call: Call, line: bytes) -> None:
        if call.reply is None and call.send_progress is not None:
            call.send_progress(line)
