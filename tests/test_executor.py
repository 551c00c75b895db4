"""Running functions: in threads and on the reactor, until their time limits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from threading import Event
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.errors import Cancelled
from taskd.executor import Executor
from taskd.functions import Function, Kind, progress
from tests.support import PATIENCE, Loop, counts_of, new_slot

_NOTHING = {"in_flight": 0, "done": 0, "failed": 0}


class Gate:
    """A blocking task that goes on until the test lets it."""

    def __init__(self, case: SynchronousTestCase) -> None:
        self._begun = Event()
        self._open = Event()
        case.addCleanup(self.open)

    def hold(self) -> str:
        self._begun.set()
        self._open.wait(PATIENCE)
        return "let through"

    def wait_until_begun(self) -> None:
        assert self._begun.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


class ExecutorTestCase(SynchronousTestCase):
    threads = 1
    kind = Kind.THREAD

    def setUp(self) -> None:
        self.loop = Loop()
        self.slot = new_slot()
        self.executor = Executor(
            self.loop, self.slot, threads=self.threads, clock=self.loop.seconds
        )
        self.sent: list[bytes] = []

    def start(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        id_json: str = "1",
    ) -> Call:
        """Start a call whose reports and reply go to ``sent``."""
        call = self.make(function, *args, timeout=timeout, id_json=id_json)
        self.executor.start(call)
        return call

    def make(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        id_json: str = "1",
    ) -> Call:
        called = Function(function.__name__, function, self.kind)
        return Call(called, list(args), {}, id_json, timeout, self.ended, self.sent.append)

    def ended(self, call: Call) -> None:
        assert call.reply is not None
        self.sent.append(call.reply)

    def reply_to(self, call: Call) -> Any:
        """Wait for a call's reply; give its result, or the code and the type of its error."""
        self.loop.run_until(lambda: call.reply)
        assert call.reply is not None
        reply = json.loads(call.reply)
        if "result" in reply:
            return reply["result"]
        return reply["error"]["code"], reply["error"].get("type")

    def run_until_idle(self) -> None:
        idle = self.executor.when_idle()
        self.loop.run_until(lambda: idle.called)

    @property
    def messages(self) -> list[Any]:
        """What was sent: each reply's result or error code, each report's progress."""
        bodies = [json.loads(line) for line in self.sent]
        return [
            body["error"]["code"] if "error" in body else body.get("result", body.get("progress"))
            for body in bodies
        ]


def report(*done: float) -> str:
    """Report progress, and be done."""
    for value in done:
        progress(value)
    return "done"


class ThreadTests(ExecutorTestCase):
    def test_a_result(self) -> None:
        """What a blocking function returns is its call's result."""
        call = self.start(pow, 2, 10)
        self.assertEqual(self.reply_to(call), 1024)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 1})

    def test_exceptions(self) -> None:
        """Whatever a task raises is told to its caller, is logged, and ends nothing else."""

        def broken(error: BaseException) -> None:
            raise error

        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt(), StopIteration()):
            call = self.start(broken, error)
            self.assertEqual(self.reply_to(call), ("task-failed", type(error).__name__))
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)
        self.assertEqual(self.reply_to(self.start(pow, 2, 2)), 4)
        self.assertEqual(counts_of(self.slot), {"in_flight": 0, "done": 1, "failed": 4})

    def test_a_result_that_json_cannot_carry(self) -> None:
        """A task whose result JSON cannot carry has failed."""
        for value in ({1, 2}, b"bytes", float("nan"), {1: 2}, object()):
            call = self.start(lambda value: value, value)
            self.assertEqual(self.reply_to(call), ("task-failed", "NotJson"))
        self.assertEqual(len(self.flushLoggedErrors()), 5)
        self.assertEqual(counts_of(self.slot)["failed"], 5)

    def test_a_deferred_from_a_thread(self) -> None:
        """A Deferred from a thread is refused, with what to do about it."""
        call = self.start(lambda: succeed(1))
        self.assertEqual(self.reply_to(call), ("task-failed", "TypeError"))
        self.assertIn(b"@task(blocking=False)", self.sent[0])
        self.flushLoggedErrors(TypeError)

    def test_one_at_a_time(self) -> None:
        """A single thread runs the calls one behind the other, in their order."""
        gate, order = Gate(self), []
        self.start(gate.hold)
        for number in range(5):
            self.start(order.append, number)
        gate.wait_until_begun()
        self.assertEqual(counts_of(self.slot)["in_flight"], 6)
        self.assertEqual(order, [])
        gate.open()
        self.run_until_idle()
        self.assertEqual(order, [0, 1, 2, 3, 4])

    def test_what_runs_is_shown(self) -> None:
        """While a task runs the scoreboard has its name, and afterwards the time it took."""
        gate = Gate(self)
        self.slot.ready()
        call = self.start(gate.hold)
        gate.wait_until_begun()
        self.loop.advance(2)
        status = self.slot.status(self.loop.seconds())
        self.assertEqual((status["state"], status["task"]), ("busy", "hold"))
        gate.open()
        self.reply_to(call)
        self.assertEqual(self.slot.status(self.loop.seconds())["state"], "idle")
        self.assertEqual(self.slot.latency(), {str(2**21): 1})

    def test_a_batch_is_delivered_together(self) -> None:
        """What is done when the reactor comes is delivered by a single call from the thread."""
        gate, delivered = Gate(self), []
        self.executor.on_delivered = lambda: delivered.append(
            (len(self.sent), self.executor.is_delivering)
        )
        for number in range(3):
            self.start(abs, number)
        self.start(gate.hold)
        gate.wait_until_begun()
        self.assertEqual(self.loop.calls_waiting, 1)
        self.loop.run_next()
        self.assertEqual(delivered, [(3, False)])

    def test_it_is_delivering_meanwhile(self) -> None:
        """While a batch is delivered the executor says so."""
        seen = []
        call = self.make(abs, -1)
        call.on_end = lambda call: seen.append(self.executor.is_delivering)
        self.executor.start(call)
        self.run_until_idle()
        self.assertEqual(seen, [True])
        self.assertFalse(self.executor.is_delivering)


class ThreadLimitTests(ExecutorTestCase):
    def test_a_limit_that_is_kept(self) -> None:
        """A task that is done in time leaves no timer behind."""
        call = self.start(abs, -1, timeout=5)
        self.assertEqual(self.reply_to(call), 1)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_limit_while_it_waits(self) -> None:
        """A call that comes to its limit while it waits for the thread is never started."""
        gate, started = Gate(self), []
        self.start(gate.hold)
        call = self.start(started.append, 1, timeout=5)
        self.loop.advance(5)
        self.assertEqual(self.reply_to(call), ("time-limit", None))
        gate.open()
        self.run_until_idle()
        self.assertEqual(started, [])
        self.assertEqual(self.messages, ["time-limit", "let through"])

    def test_a_limit_while_it_runs(self) -> None:
        """A call that comes to its limit while it runs is answered once."""
        gate = Gate(self)
        self.start(gate.hold, timeout=5)
        gate.wait_until_begun()
        self.loop.advance(4.9)
        self.assertEqual(self.messages, [])
        self.loop.advance(0.1)
        self.assertEqual(self.messages, ["time-limit"])
        gate.open()
        self.run_until_idle()
        self.assertEqual(self.messages, ["time-limit"])

    def test_a_late_exception_is_nobodys_reply(self) -> None:
        """What a task raises after its limit is not told to anybody."""
        gate = Gate(self)

        def break_late() -> None:
            gate.hold()
            raise ValueError("too late")

        self.start(break_late, timeout=5)
        gate.wait_until_begun()
        self.loop.advance(5)
        gate.open()
        self.run_until_idle()
        self.assertEqual(self.messages, ["time-limit"])

    def test_it_is_busy_until_the_function_returns(self) -> None:
        """A call that was answered with its limit is in flight until its function is done."""
        gate = Gate(self)
        self.start(gate.hold, timeout=5)
        gate.wait_until_begun()
        self.loop.advance(5)
        idle = self.executor.when_idle()
        self.assertNoResult(idle)
        self.assertEqual(counts_of(self.slot)["in_flight"], 1)
        gate.open()
        self.loop.run_until(lambda: idle.called)
        self.assertEqual(counts_of(self.slot)["in_flight"], 0)

    def test_a_call_past_its_limit_has_failed(self) -> None:
        """A call whose caller got an error counts as failed, started or not."""
        gate = Gate(self)
        self.start(gate.hold, timeout=5)
        gate.wait_until_begun()
        self.start(abs, -1, timeout=5)
        self.loop.advance(5)
        gate.open()
        self.run_until_idle()
        self.assertEqual(counts_of(self.slot), {"in_flight": 0, "done": 0, "failed": 2})

    def test_a_cancelled_call_is_not_started(self) -> None:
        """A call that is cancelled while it waits for the thread is never started."""
        gate, started = Gate(self), []
        self.start(gate.hold)
        self.start(started.append, 1).fail(Cancelled("taken back"))
        gate.open()
        self.run_until_idle()
        self.assertEqual(started, [])
        self.assertEqual(self.messages, ["cancelled", "let through"])


class ThreadProgressTests(ExecutorTestCase):
    def test_the_latest_report_wins(self) -> None:
        """Of the reports that come faster than they are sent the last one is sent."""
        gate = Gate(self)
        self.start(report, 1, 2, 3)
        self.start(gate.hold)
        gate.wait_until_begun()
        self.loop.run_waiting()
        self.assertEqual(self.messages, [{"done": 3, "total": None, "message": None}, "done"])

    def test_the_last_report_comes_before_the_reply(self) -> None:
        """However the reactor and the thread meet, the last report is sent, before the reply."""
        for _ in range(20):
            self.sent.clear()
            self.reply_to(self.start(report, *range(5)))
            *reports, reply = self.messages
            done = [told["done"] for told in reports]
            self.assertEqual(reply, "done")
            self.assertEqual(done[-1], 4)
            self.assertEqual(done, sorted(set(done)))

    def test_reports_go_to_their_own_callers(self) -> None:
        """Each call's reports carry its id."""
        gate = Gate(self)
        self.start(report, 1, id_json="1")
        self.start(report, 2, id_json="2")
        self.start(gate.hold)
        gate.wait_until_begun()
        self.loop.run_waiting()
        ids = {
            (told["id"], told["progress"]["done"])
            for told in map(json.loads, self.sent)
            if "progress" in told
        }
        self.assertEqual(ids, {(1, 1), (2, 2)})

    def test_nothing_is_reported_after_the_end(self) -> None:
        """A task that goes on after its limit reports to nobody."""
        gate = Gate(self)

        def report_late() -> None:
            gate.hold()
            progress(1)

        self.start(report_late, timeout=5)
        gate.wait_until_begun()
        self.loop.advance(5)
        gate.open()
        self.run_until_idle()
        self.assertEqual(self.messages, ["time-limit"])

    def test_who_did_not_ask_is_told_nothing(self) -> None:
        """Progress costs a caller that did not ask for it nothing, even behind one that did."""
        self.start(report, 1)
        self.run_until_idle()
        self.sent.clear()
        call = self.make(report, 2)
        call.send_progress = None
        self.executor.start(call)
        self.reply_to(call)
        self.assertEqual(self.messages, ["done"])

    def test_a_report_that_json_cannot_carry(self) -> None:
        """A task that reports what JSON cannot carry has failed."""
        call = self.start(report, float("nan"))
        self.assertEqual(self.reply_to(call), ("task-failed", "NotJson"))
        self.assertEqual(len(self.flushLoggedErrors()), 1)


class SeveralThreadsTests(ExecutorTestCase):
    threads = 3

    def test_so_many_run_at_a_time(self) -> None:
        """As many tasks run side by side as there are threads, and no more."""
        gates = [Gate(self) for _ in range(3)]
        for gate in gates:
            self.start(gate.hold)
        for gate in gates:
            gate.wait_until_begun()
        fourth = self.start(abs, -4)
        gates[1].open()
        self.assertEqual(self.reply_to(fourth), 4)
        self.assertEqual(self.messages, ["let through", 4])
        for gate in gates:
            gate.open()
        self.run_until_idle()
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 4})

    def test_many_calls_are_all_answered(self) -> None:
        """Every one of many calls is answered with its own result."""
        calls = [self.start(abs, -number) for number in range(300)]
        self.run_until_idle()
        self.assertEqual([self.reply_to(call) for call in calls], list(range(300)))
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 300})


class IdleTests(ExecutorTestCase):
    def test_idle_at_once(self) -> None:
        """An executor that runs nothing is idle at once."""
        self.assertIsNone(self.successResultOf(self.executor.when_idle()))

    def test_idle_after_the_last(self) -> None:
        """Everyone who waits is told when the last call has been answered."""
        gate = Gate(self)
        self.start(abs, -1)
        self.start(gate.hold)
        waiting = [self.executor.when_idle(), self.executor.when_idle()]
        gate.wait_until_begun()
        self.loop.run_waiting()
        self.assertEqual(self.messages, [1])
        self.assertNoResult(waiting[0])
        gate.open()
        self.loop.run_until(lambda: waiting[1].called)
        self.assertEqual(self.messages, [1, "let through"])
        self.assertIsNone(self.successResultOf(waiting[0]))


class OnReactorTests(ExecutorTestCase):
    kind = Kind.REACTOR

    def test_a_result(self) -> None:
        """What a function on the reactor returns is its call's result, at once."""
        self.start(abs, -1)
        self.assertEqual(self.messages, [1])
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 1})

    def test_exceptions(self) -> None:
        """Whatever it raises is told to its caller and logged, and does not get any further."""

        def broken(error: BaseException) -> None:
            raise error

        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt()):
            call = self.start(broken, error)
            self.assertEqual(self.reply_to(call), ("task-failed", type(error).__name__))
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 3})

    def test_a_fired_deferred(self) -> None:
        """The result of a Deferred that has fired is the call's result, at once."""
        self.start(lambda: succeed("ready"))
        self.assertEqual(self.messages, ["ready"])

    def test_a_late_deferred(self) -> None:
        """A Deferred's call is in flight until it fires, and ends in what it fires with."""
        pending: Deferred[str] = Deferred()
        self.start(lambda: pending)
        self.assertEqual((self.messages, counts_of(self.slot)["in_flight"]), ([], 1))
        pending.callback("late")
        self.assertEqual((self.messages, counts_of(self.slot)["in_flight"]), (["late"], 0))

    def test_a_failing_deferred(self) -> None:
        """A Deferred's failure is the task's, whether it comes at once or late."""
        pending: Deferred[str] = Deferred()
        calls = [self.start(lambda: fail(ValueError("early"))), self.start(lambda: pending)]
        pending.errback(SystemExit("late"))
        replies = [self.reply_to(call) for call in calls]
        self.assertEqual(replies, [("task-failed", "ValueError"), ("task-failed", "SystemExit")])
        self.assertEqual(len(self.flushLoggedErrors(ValueError, SystemExit)), 2)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 2})

    def test_a_late_result_that_json_cannot_carry(self) -> None:
        """A Deferred that fires with what JSON cannot carry is a task that failed."""
        call = self.start(lambda: succeed({1, 2}))
        self.assertEqual(self.reply_to(call), ("task-failed", "NotJson"))
        self.assertEqual(len(self.flushLoggedErrors()), 1)

    def test_the_limit_cancels(self) -> None:
        """At the time limit the Deferred is cancelled, and the call is answered once."""
        cancelled: list[Any] = []
        self.start(lambda: Deferred(cancelled.append), timeout=5)
        self.loop.advance(4.9)
        self.assertEqual(cancelled, [])
        self.loop.advance(0.1)
        self.assertEqual((self.messages, len(cancelled)), (["time-limit"], 1))
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 1})

    def test_cancel(self) -> None:
        """A cancelled call's Deferred is cancelled, and the call is answered once."""
        cancelled: list[Any] = []
        self.start(lambda: Deferred(cancelled.append)).fail(Cancelled("taken back"))
        self.assertEqual((self.messages, len(cancelled)), (["cancelled"], 1))
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 1})

    def test_a_limit_that_is_kept(self) -> None:
        """A Deferred that fires in time leaves no timer behind."""
        pending: Deferred[str] = Deferred()
        self.start(lambda: pending, timeout=5)
        pending.callback("in time")
        self.assertEqual(self.messages, ["in time"])
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_the_last_report_comes_before_the_reply(self) -> None:
        """What a function reports last is sent before its reply."""
        self.start(report, 1, 2)
        self.loop.run_waiting()
        self.assertEqual(self.messages, [{"done": 2, "total": None, "message": None}, "done"])


class CoroutineTests(ExecutorTestCase):
    kind = Kind.COROUTINE

    def test_a_coroutine(self) -> None:
        """A coroutine runs until it is done, and what it returns is its call's result."""
        pending: Deferred[int] = Deferred()

        async def double() -> int:
            return 2 * await pending

        self.start(double)
        self.assertEqual(self.messages, [])
        pending.callback(21)
        self.assertEqual(self.messages, [42])
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 1})

    def test_exceptions(self) -> None:
        """Whatever a coroutine raises is told to its caller and logged."""

        async def broken(error: BaseException) -> None:
            await succeed(None)
            raise error

        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt()):
            call = self.start(broken, error)
            self.assertEqual(self.reply_to(call), ("task-failed", type(error).__name__))
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 3})

    def test_the_limit_cancels(self) -> None:
        """At the time limit a coroutine sees its wait cancelled, and can clean up."""
        cleaned = []

        async def careful() -> None:
            try:
                await Deferred()
            finally:
                cleaned.append(True)

        self.start(careful, timeout=5)
        self.loop.advance(5)
        self.assertEqual((self.messages, cleaned), (["time-limit"], [True]))
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 1})

    def test_one_that_will_not_be_cancelled(self) -> None:
        """A coroutine that goes on after its limit is answered once, and in flight to its end."""
        rest: Deferred[str] = Deferred()

        async def stubborn() -> str:
            with contextlib.suppress(CancelledError):
                await Deferred()
            return await rest

        self.start(stubborn, timeout=5)
        self.loop.advance(5)
        idle = self.executor.when_idle()
        self.assertEqual(self.messages, ["time-limit"])
        self.assertNoResult(idle)
        rest.callback("at last")
        self.assertEqual(self.messages, ["time-limit"])
        self.successResultOf(idle)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 1})

    def test_reports_go_to_their_own_callers(self) -> None:
        """Coroutines that run side by side each report to their own caller."""
        waits: list[Deferred[None]] = [Deferred(), Deferred()]

        async def reporting(number: int) -> None:
            await waits[number]
            progress(number)
            await Deferred()

        for number in range(2):
            self.start(reporting, number, id_json=f'"call {number}"')
        for wait in reversed(waits):
            wait.callback(None)
            self.loop.run_waiting()
        told = [(report["id"], report["progress"]["done"]) for report in map(json.loads, self.sent)]
        self.assertEqual(told, [("call 1", 1), ("call 0", 0)])


class CallNowTests(ExecutorTestCase):
    kind = Kind.REACTOR

    def call_now(self, function: Callable[..., Any], *args: Any, id_json: str = "") -> Any:
        called = Function(function.__name__, function, Kind.REACTOR)
        return self.executor.call_now(called, list(args), {}, id_json)

    def test_a_result(self) -> None:
        """A function that is over at once is answered at once, with its id or without."""
        self.assertEqual(self.call_now(abs, -1), b"1\n")
        self.assertEqual(self.call_now(abs, -1, id_json="7"), b'{"id":7,"result":1}\n')
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 2})
        self.assertFalse(self.slot.is_working)

    def test_exceptions(self) -> None:
        """Whatever it raises is told to its caller and logged, and does not get any further."""

        def broken(error: BaseException) -> None:
            raise error

        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt()):
            reply = json.loads(self.call_now(broken, error))
            self.assertEqual(reply["error"]["type"], type(error).__name__)
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "failed": 3})

    def test_a_result_that_json_cannot_carry(self) -> None:
        """A result that JSON cannot carry is a task that failed."""
        reply = json.loads(self.call_now(lambda: {1, 2}))
        self.assertEqual(reply["error"]["type"], "NotJson")
        self.assertEqual(len(self.flushLoggedErrors()), 1)

    def test_a_deferred_goes_on_as_a_call(self) -> None:
        """A Deferred is handed back; started as a call it ends in what it fires with, once."""
        pending: Deferred[str] = Deferred()
        calls: list[None] = []

        def slow() -> Deferred[str]:
            calls.append(None)
            return pending

        self.assertIs(self.call_now(slow), pending)
        self.executor.start(self.make(slow), pending)
        self.assertEqual(counts_of(self.slot)["in_flight"], 1)
        pending.callback("late")
        self.assertEqual((self.messages, len(calls)), (["late"], 1))
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": 1})

    def test_tracebacks_are_for_debugging(self) -> None:
        """An executor that debugs tells the caller where the task failed."""
        self.executor = Executor(self.loop, self.slot, debug=True, clock=self.loop.seconds)
        reply = json.loads(self.call_now(lambda: 1 / 0))
        self.assertIn("ZeroDivisionError", reply["error"]["traceback"])
        self.flushLoggedErrors(ZeroDivisionError)
