"""Running functions: in threads and on the reactor, until their time limits."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from threading import Event
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.errors import Cancelled
from taskd.executor import Executor
from taskd.functions import Function, Kind, progress
from taskd.lane import HANDOVER_SECONDS, PATIENCE_SECONDS
from taskd.wire import NO_TERMS, Terms
from tests.support import PATIENCE, FakePool, Loop, counts_of, new_ledger, new_slot

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
            self.loop, self.slot, new_ledger(), threads=self.threads, clock=self.loop.seconds
        )
        self.addCleanup(lambda: self.executor.close())
        self.sent: list[bytes] = []

    def start(self, function: Callable[..., Any], *args: Any, **options: Any) -> Call:
        """Start a call, as ``make`` makes it."""
        call = self.make(function, *args, **options)
        self.executor.start(call)
        return call

    def make(
        self,
        function: Callable[..., Any],
        *args: Any,
        limit: float | None = None,
        id_json: str = "1",
        **terms: Any,
    ) -> Call:
        """
        Make a call whose reports and reply go to ``sent``.

        Args:
            function: What to call.
            args: Its arguments.
            limit: The function's own limit.
            id_json: The call's id.
            terms: The caller's terms.
        """
        called = Function(function.__name__, function, self.kind, limit)
        asked = Terms(**terms) if terms else NO_TERMS
        return Call(called, list(args), {}, id_json, asked, self.ended, self.sent.append)

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
        """Run until nothing is in flight, given up or not."""
        self.loop.run_until(lambda: not counts_of(self.slot)["in_flight"])

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
        self.assertEqual(self.slot.due, 0.0)

    def test_a_callers_limit_runs_from_the_coming(self) -> None:
        """The time that a caller gives runs from when its call comes, also while it waits."""
        gate, behind = Gate(self), Gate(self)
        self.start(gate.hold)
        self.start(behind.hold, timeout=5)
        self.loop.advance(3)
        gate.open()
        behind.wait_until_begun()
        self.loop.run_waiting()
        self.loop.advance(1.9)
        self.assertEqual(self.messages, ["let through"])
        self.loop.advance(0.1)
        self.assertEqual(self.messages, ["let through", "time-limit"])

    def test_a_functions_limit_runs_from_its_beginning(self) -> None:
        """A function's own limit runs from when it is called, however long its call has waited."""
        gate, behind = Gate(self), Gate(self)
        self.start(gate.hold)
        self.start(behind.hold, limit=5)
        self.loop.advance(3)
        gate.open()
        behind.wait_until_begun()
        self.loop.run_waiting()
        for seconds in (2, 2.9):
            self.loop.advance(seconds)
            self.assertEqual(self.messages, ["let through"])
        self.loop.advance(0.1)
        self.assertEqual(self.messages, ["let through", "time-limit"])

    def test_a_time_that_is_over_already(self) -> None:
        """A call that comes when its caller's time is over is answered, and never started."""
        started: list[int] = []
        call = self.make(started.append, 1, timeout=5)
        call.deadline = self.loop.seconds()
        self.executor.start(call)
        self.assertEqual(self.messages, ["time-limit"])
        self.assertTrue(self.executor.is_idle)
        self.assertEqual((started, counts_of(self.slot)), ([], _NOTHING))

    def test_when_it_is_due_is_shown(self) -> None:
        """While a call with a limit runs it is shown until when it must have ended."""
        gate = Gate(self)
        call = self.start(gate.hold, limit=5)
        gate.wait_until_begun()
        self.assertEqual(self.slot.due, 1005.0)
        gate.open()
        self.reply_to(call)
        self.assertEqual(self.slot.due, 0.0)

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
        self.assertEqual(counts_of(self.slot)["in_flight"], 1)
        gate.open()
        self.run_until_idle()
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


class StuckTests(ExecutorTestCase):
    """Threads of calls that were given up."""

    def setUp(self) -> None:
        super().setUp()
        self.pool = self.executor.pool = FakePool()
        self.gate = Gate(self)
        self.warnings: list[dict[str, Any]] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)

    def observe(self, event: Any) -> None:
        if event.get("log_level") is LogLevel.warn and "traceback" in event:
            self.warnings.append(event)

    def test_one_that_goes_on(self) -> None:
        """A thread that goes on after its call's limit is lost: the log shows where it stands."""
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.loop.advance(5)
        self.assertEqual((self.messages, self.pool.told), (["time-limit"], []))
        self.loop.advance(0.009)
        self.assertEqual(self.pool.told, [])
        self.loop.advance(0.002)
        self.assertEqual(self.pool.told, ["stuck"])
        self.assertTrue(self.executor.lane.is_retired)
        (warning,) = self.warnings
        self.assertEqual(formatEvent(warning), "hold was given up and goes on")
        self.assertIn("self._open.wait(PATIENCE)", warning["traceback"])

    def test_what_the_log_says_of_it(self) -> None:
        """The log says whose call it is whose task goes on."""
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.loop.advance(5)
        self.loop.advance(0.02)
        (warning,) = self.warnings
        self.assertEqual((warning["function"], warning["id"]), ("hold", "1"))

    def test_one_that_was_cancelled(self) -> None:
        """The same is so for a call that is cancelled."""
        call = self.start(self.gate.hold)
        self.gate.wait_until_begun()
        call.fail(Cancelled("taken back"))
        self.loop.advance(0.011)
        self.assertEqual((self.messages, self.pool.told), (["cancelled"], ["stuck"]))

    def test_one_that_comes_back(self) -> None:
        """A thread that comes back within ten milliseconds is not lost."""
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.loop.advance(5)
        self.gate.open()
        self.run_until_idle()
        self.loop.advance(1)
        self.assertEqual((self.pool.told, self.warnings), ([], []))
        self.assertFalse(self.executor.lane.is_retired)

    def test_one_that_was_not_begun(self) -> None:
        """A call that is given up before it has begun holds no thread."""
        self.start(self.gate.hold)
        self.gate.wait_until_begun()
        self.start(abs, -1).fail(Cancelled("taken back"))
        self.loop.advance(0.0005)
        self.assertEqual((self.pool.told, self.warnings), ([], []))

    def test_what_is_stuck_keeps_nobody(self) -> None:
        """What is stuck is no reason not to be idle; who waits for that is told."""
        told: list[bool] = []
        self.executor.on_idle = lambda: told.append(self.executor.is_idle)
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.assertFalse(self.executor.is_idle)
        self.loop.advance(5)
        self.loop.advance(0.011)
        self.assertEqual(told, [True])
        self.assertTrue(self.executor.is_idle)
        self.assertEqual(counts_of(self.slot)["in_flight"], 1)

    def test_nothing_more_is_started(self) -> None:
        """Once a thread is lost every blocking call is handed over, though it came back at last."""
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.loop.advance(5)
        self.loop.advance(0.011)
        self.gate.open()
        self.run_until_idle()
        call = self.start(abs, -1)
        self.assertEqual(self.pool.taken, [call])

    def test_without_a_pool(self) -> None:
        """Without other workers the thread takes up its work again when it comes back."""
        self.executor.pool = None
        self.start(self.gate.hold, timeout=5)
        self.gate.wait_until_begun()
        self.loop.advance(5)
        self.loop.advance(0.011)
        call = self.start(abs, -1)
        self.gate.open()
        self.assertEqual(self.reply_to(call), 1)


class HandOverTests(ExecutorTestCase):
    """What is run by other workers."""

    def setUp(self) -> None:
        super().setUp()
        self.pool = self.executor.pool = FakePool()
        self.gates = [Gate(self) for _ in range(self.threads)]

    def hold(self) -> list[Call]:
        """Have every thread run a call that goes on."""
        calls = [self.start(gate.hold) for gate in self.gates]
        for gate in self.gates:
            gate.wait_until_begun()
        return calls

    def fill(self) -> None:
        """Have every thread run a call that goes on, and everything else be handed over."""
        self.hold()
        self.start(abs, -1)
        for _ in range(2):
            self.loop.advance(PATIENCE_SECONDS)
        self.assertTrue(self.executor.lane.is_full)

    def finish(self) -> None:
        """Let the calls end that the threads run, and have that told."""
        for gate in self.gates:
            gate.open()
        self.run_until_idle()

    def assertInFlight(self, behind: int) -> None:
        """Calls run in every thread, so many wait behind them, and none has ended."""
        counts = {**_NOTHING, "in_flight": self.threads + behind}
        self.assertEqual(counts_of(self.slot), counts)

    @property
    def is_watching(self) -> bool:
        return bool(self.loop.getDelayedCalls())

    def test_one_call_is_not_watched(self) -> None:
        """A call that nothing waits behind costs no timer."""
        self.hold()
        self.assertFalse(self.is_watching)
        self.assertEqual(self.pool.taken, [])

    def test_quick_calls_stay(self) -> None:
        """Calls that end one after the other stay here, whoever idles."""
        self.pool.idlers = 5
        calls = [self.start(abs, -number) for number in range(50)]
        replies = [self.reply_to(call) for call in calls]
        self.assertEqual((replies, self.pool.taken), (list(range(50)), []))

    def test_to_those_who_idle(self) -> None:
        """Behind a call that takes long as many are handed over as others can start at once."""
        self.hold()
        calls = [self.start(abs, -number) for number in range(4)]
        self.pool.idlers = 3
        self.assertTrue(self.is_watching)
        self.assertEqual(self.pool.taken, [])
        self.loop.advance(1.5 * HANDOVER_SECONDS)
        self.assertEqual(self.pool.taken, calls[:3])
        self.assertInFlight(behind=1)
        self.assertEqual(self.pool.told, [])

    def test_the_last_one_is_not_watched(self) -> None:
        """When nothing waits any more there is no timer any more."""
        self.hold()
        self.start(abs, -1)
        self.pool.idlers = 1
        for _ in range(3):
            self.loop.advance(1.5 * HANDOVER_SECONDS)
        self.assertEqual(len(self.pool.taken), 1)
        self.assertFalse(self.is_watching)

    def test_nobody_idles(self) -> None:
        """Where nobody idles what waits stays for longer; then all of it is handed over."""
        self.hold()
        calls = [self.start(abs, -number) for number in range(4)]
        for _ in range(4):
            self.loop.advance(PATIENCE_SECONDS / 5)
        self.assertEqual((self.pool.taken, self.pool.told), ([], []))
        for _ in range(2):
            self.loop.advance(PATIENCE_SECONDS / 5)
        self.assertEqual((self.pool.taken, self.pool.told), (calls, ["filled"]))
        self.assertTrue(self.executor.is_relieved)
        self.assertInFlight(behind=0)

    def test_what_comes_then(self) -> None:
        """While the thread is held what comes is handed over at once."""
        self.fill()
        call = self.start(abs, -2)
        self.assertEqual(self.pool.taken[1:], [call])
        self.assertEqual(self.pool.told, ["filled"])
        self.assertFalse(self.is_watching)

    def test_the_thread_is_free_again(self) -> None:
        """When the thread has come back calls are run here again, and that is told."""
        self.fill()
        self.finish()
        self.assertEqual(self.pool.told, ["filled", "freed"])
        self.assertFalse(self.executor.is_relieved)
        self.assertEqual(self.reply_to(self.start(abs, -3)), 3)
        self.assertEqual(len(self.pool.taken), 1)

    def test_a_thread_that_is_free_asks(self) -> None:
        """A free thread asks for a task of those that wait, and is kept for the answer."""
        self.fill()
        self.pool.waiting = 2
        self.finish()
        self.assertEqual(self.pool.told, ["filled", "freed", "ask"])
        behind = self.start(abs, -3)
        self.assertEqual(self.pool.taken[1:], [behind])
        self.executor.lane.answered()
        self.pool.waiting = 0
        self.assertEqual(self.reply_to(self.start(abs, -4)), 4)

    def test_quick_tasks_ask_as_well(self) -> None:
        """After a quick task it asks too, and goes on with its own meanwhile, asking once."""
        self.pool.waiting = 1
        for number in range(3):
            self.assertEqual(self.reply_to(self.start(abs, -number)), number)
        self.assertEqual((self.pool.told, self.pool.taken), (["ask"], []))
        self.executor.lane.answered()
        self.reply_to(self.start(abs, -1))
        self.assertEqual(self.pool.told, ["ask", "ask"])

    def test_priority(self) -> None:
        """A call of a higher priority does not wait here, and is run here if it need not wait."""
        self.assertEqual(self.reply_to(self.start(abs, -1, priority=1)), 1)
        self.hold()
        first, second = self.start(abs, -1, priority=-1), self.start(abs, -1, priority=1)
        self.assertEqual(self.pool.taken, [second])
        self.assertIsNone(first.reply)

    def test_held_up(self) -> None:
        """It is known whether a call that came now would have to wait for a long one."""
        self.assertFalse(self.executor.is_held_up)
        self.hold()
        self.assertFalse(self.executor.is_held_up)
        self.loop.advance(1.5 * HANDOVER_SECONDS)
        self.assertTrue(self.executor.is_held_up)
        self.finish()
        self.assertFalse(self.executor.is_held_up)

    def test_all(self) -> None:
        """All that no thread has begun can be handed over at once."""
        held = self.hold()
        calls = [self.start(abs, -1), self.start(abs, -1, timeout=5)]
        self.executor.hand_over_all()
        self.assertEqual(self.pool.taken, calls)
        self.assertInFlight(behind=0)
        self.finish()
        self.assertEqual([self.reply_to(call) for call in held], ["let through"] * self.threads)
        self.assertEqual(counts_of(self.slot), {**_NOTHING, "done": self.threads})

    def test_what_has_ended_is_not_handed_over(self) -> None:
        """A call that was cancelled while it waited is handed over to nobody."""
        self.hold()
        first, second = self.start(abs, -1), self.start(abs, -2)
        first.fail(Cancelled("taken back"))
        self.executor.hand_over_all()
        self.assertEqual(self.pool.taken, [second])

    def test_the_callers_time(self) -> None:
        """The caller's time is kept here for what others run, from the call's coming."""
        self.hold()
        call = self.start(abs, -1, timeout=5)
        self.loop.advance(3)
        self.executor.hand_over_all()
        self.loop.advance(1.9)
        self.assertIsNone(call.reply)
        self.loop.advance(0.1)
        self.assertEqual(self.reply_to(call), ("time-limit", None))

    def test_the_functions_limit(self) -> None:
        """A function's own limit is kept by who runs it: here it stops with the handing over."""
        self.hold()
        call = self.start(abs, -1, limit=5)
        self.executor.hand_over_all()
        self.loop.advance(3600)
        self.assertIsNone(call.reply)

    def test_sending_on(self) -> None:
        """A call can be sent on whatever it is; its caller's time is kept here as well."""
        call = self.make(abs, -1, timeout=5)
        self.executor.send_on(call)
        self.assertEqual(self.pool.taken, [call])
        self.assertTrue(self.executor.is_idle)
        self.loop.advance(5)
        self.assertEqual(self.reply_to(call), ("time-limit", None))

    def test_without_a_pool(self) -> None:
        """Without other workers everything waits here, and nothing is watched."""
        self.executor.pool = None
        self.hold()
        call = self.start(abs, -1, priority=1)
        self.assertFalse(self.is_watching)
        self.gates[0].open()
        self.assertEqual(self.reply_to(call), 1)


class SeveralHandOverTests(HandOverTests):
    """The same where it takes more than one call to hold every thread."""

    threads = 2

    def test_one_thread_is_free_again(self) -> None:
        """One thread that has come back is enough for calls to be run here again."""
        self.fill()
        self.gates[1].open()
        self.loop.run_until(lambda: "freed" in self.pool.told)
        self.assertEqual(self.reply_to(self.start(abs, -3)), 3)
        self.assertEqual(len(self.pool.taken), 1)


class NoThreadTests(ExecutorTestCase):
    def test_no_thread_can_be_started(self) -> None:
        """Where the system lets no thread be started the call is answered, and a later one runs."""
        before = threading.stack_size(2**47)  # more than there are addresses
        try:
            call = self.start(abs, -1)
        finally:
            threading.stack_size(before)
        self.assertEqual(self.reply_to(call), ("internal", None))
        self.assertEqual(counts_of(self.slot), _NOTHING)
        self.assertTrue(self.executor.is_idle)
        self.assertEqual(self.reply_to(self.start(abs, -2)), 2)


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

    def test_the_oldest_is_shown(self) -> None:
        """When the task has ended that is shown, the oldest of those that run is shown instead."""
        gates = [Gate(self) for _ in range(3)]
        for gate, name in zip(gates, ("first", "second", "third"), strict=True):
            hold = gate.hold

            def named(hold: Callable[[], str] = hold) -> str:
                return hold()

            named.__name__ = name
            self.start(named)
            gate.wait_until_begun()
            self.loop.advance(1)
        for number, expected in ((0, ("second", 2.0)), (2, ("second", 2.0)), (1, (None, None))):
            gates[number].open()
            self.loop.run_next()
            status = self.slot.status(1003.0)
            self.assertEqual((status["task"], status["task_seconds"]), expected)

    def test_one_that_fails_to_start(self) -> None:
        """Where the system lets only some threads be started, those run everything."""
        gate = Gate(self)
        self.start(gate.hold)
        gate.wait_until_begun()
        before = threading.stack_size(2**47)  # more than there are addresses
        try:
            call = self.start(abs, -1)
        finally:
            threading.stack_size(before)
        gate.open()
        self.assertEqual(self.reply_to(call), 1)

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
    def test_a_fresh_one(self) -> None:
        """An executor that runs nothing is idle."""
        self.assertTrue(self.executor.is_idle)

    def test_idle_after_the_last(self) -> None:
        """Who waits is told when the last call has been answered, and not before."""
        gate, told = Gate(self), []
        self.executor.on_idle = lambda: told.append(self.messages)
        self.start(abs, -1)
        self.start(gate.hold)
        gate.wait_until_begun()
        self.loop.run_waiting()
        self.assertEqual((self.messages, told), ([1], []))
        self.assertFalse(self.executor.is_idle)
        gate.open()
        self.loop.run_until(lambda: told)
        self.assertEqual(told, [[1, "let through"]])
        self.assertTrue(self.executor.is_idle)

    def test_on_the_reactor(self) -> None:
        """What goes on on the reactor keeps it from being idle as well."""
        told: list[bool] = []
        self.executor.on_idle = lambda: told.append(self.executor.is_idle)
        self.kind = Kind.REACTOR
        pending: Deferred[None] = Deferred()
        self.start(lambda: pending)
        self.kind = Kind.THREAD
        self.reply_to(self.start(abs, -1))
        self.assertEqual((told, self.executor.is_idle), ([], False))
        pending.callback(None)
        self.assertEqual(told, [True])

    def test_busy(self) -> None:
        """It is told when the first task starts, and none of those beside it."""
        told: list[str] = []
        self.executor.on_busy = lambda: told.append("busy")
        self.executor.on_idle = lambda: told.append("idle")
        pending: Deferred[None] = Deferred()
        self.kind = Kind.REACTOR
        self.start(lambda: pending)
        self.kind = Kind.THREAD
        self.reply_to(self.start(abs, -1))
        pending.callback(None)
        self.reply_to(self.start(abs, -1))
        self.assertEqual(told, ["busy", "idle", "busy", "idle"])


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

    def test_one_deferred_for_several(self) -> None:
        """A Deferred that a task returns to several callers ends all their calls alike."""
        pending: Deferred[str] = Deferred()
        for _ in range(3):
            self.start(lambda: pending)
        pending.callback("for all")
        self.assertEqual(self.messages, ["for all"] * 3)

    def test_one_failing_deferred_for_several(self) -> None:
        """A Deferred that fails is every caller's failure, and nothing is left unhandled."""
        pending: Deferred[str] = Deferred()
        calls = [self.start(lambda: pending) for _ in range(3)]
        pending.errback(ValueError("for all"))
        replies = [self.reply_to(call) for call in calls]
        self.assertEqual(replies, [("task-failed", "ValueError")] * 3)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 3)

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
        self.assertEqual(self.messages, ["time-limit"])
        self.assertFalse(self.executor.is_idle)
        rest.callback("at last")
        self.assertEqual(self.messages, ["time-limit"])
        self.assertTrue(self.executor.is_idle)
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
        self.executor = Executor(
            self.loop, self.slot, new_ledger(debug=True), clock=self.loop.seconds
        )
        reply = json.loads(self.call_now(lambda: 1 / 0))
        self.assertIn("ZeroDivisionError", reply["error"]["traceback"])
        self.flushLoggedErrors(ZeroDivisionError)
