"""A worker's dealings with the others: what goes out, and what comes in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.errors import Cancelled
from taskd.executor import Executor
from taskd.functions import progress, task
from taskd.lane import HANDOVER_SECONDS, PATIENCE_SECONDS
from taskd.link import Offer
from taskd.relay import Relay
from taskd.scoreboard import Scoreboard
from taskd.wire import NO_TERMS, Terms
from tests.support import Loop, log_of, new_ledger, registry_of


class SteppedExecutor(Executor):
    """The executor, whose thread takes a call, and runs it, when the test says so."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.taken: Call | None = None

    def _start_thread(self) -> bool:
        self._threads_to_start -= 1
        return True

    def take_next(self) -> None:
        """Have the thread take the next call, and be slow to run it."""
        self.taken = self._waiting.get_nowait()

    def run_next(self) -> None:
        """Have the thread run the call that it has taken, or else the next one, to its end."""
        call = self.taken or self._waiting.get_nowait()
        self.taken = None
        waiting, self._waiting = self._waiting, SimpleQueue()
        self._waiting.put(call)
        self._waiting.put(None)
        self._work()
        self._waiting = waiting


class RelayTestCase(SynchronousTestCase):
    threads = 1
    is_verbose = False

    def setUp(self) -> None:
        fd = Scoreboard.create(2)
        self.scoreboard = Scoreboard(fd)
        os.close(fd)
        self.slot = self.scoreboard.slot(1)
        self.slot.open(4711, 0.0)
        self.slot.ready()
        self.loop = Loop()
        self.executor = SteppedExecutor(
            self.loop, self.slot, new_ledger(), threads=self.threads, clock=self.loop.seconds
        )
        self.ran: list[Any] = []
        self.deferred: Deferred[Any] = Deferred()
        self.registry = registry_of(*self.functions())
        self.told: list[bytes] = []
        self.heard: list[str] = []
        self.relay = Relay(
            self.registry,
            self.executor,
            self.scoreboard,
            self.told.append,
            is_verbose=self.is_verbose,
            clock=self.loop.seconds,
        )
        for name in ("filled", "freed", "stuck", "quiet"):
            setattr(self.relay, f"on_{name}", lambda name=name: self.heard.append(name))
        self.replies: list[Any] = []
        self.reports: list[bytes] = []

    def functions(self) -> list[Callable[..., Any]]:
        def work(value: Any) -> Any:
            self.ran.append(value)
            return value

        @task(blocking=False)
        def at_once(value: Any) -> Any:
            return value

        @task(blocking=False)
        def later() -> Deferred[Any]:
            return self.deferred

        def reporting() -> str:
            progress(1, 2)
            return "reported"

        return [work, at_once, later, reporting]

    # This worker's own callers.

    def call(
        self,
        value: Any = 0,
        terms: Terms = NO_TERMS,
        *,
        id_json: str = "1",
        keywords: dict[str, Any] | None = None,
    ) -> Call:
        function = self.registry.find("work")
        positional = [] if keywords else [value]
        return Call(
            function,
            positional,
            keywords or {},
            id_json,
            terms,
            self.ended,
            self.reports.append if terms.wants_progress else None,
        )

    def start(self, value: Any = 0, terms: Terms = NO_TERMS) -> Call:
        call = self.call(value, terms)
        self.executor.start(call)
        return call

    def ended(self, call: Call) -> None:
        assert call.reply is not None
        self.replies.append(json.loads(call.reply))

    def send_on(self, value: Any = 0, terms: Terms = NO_TERMS) -> Call:
        """Have a call go out, and forget what was told of that."""
        call = self.call(value, terms)
        self.executor.send_on(call)
        self.take_told()
        return call

    # The supervisor.

    def hear(self, message: bytes) -> None:
        verb, _, rest = message.partition(b" ")
        self.relay.readers[verb](rest)

    def take_told(self) -> bytes:
        told = b"".join(self.told)
        self.told.clear()
        return told

    def run_here(self, number: int, line: bytes, due: bytes = b"-") -> None:
        self.hear(b"run %d %s %s" % (number, due, line))

    def start_long(self) -> None:
        """Have the thread take a call that takes long."""
        self.start(0)
        self.executor.take_next()

    def wait_long(self) -> None:
        """Let pass what shows that a call takes long."""
        self.loop.pump([HANDOVER_SECONDS] * round(2 * PATIENCE_SECONDS / HANDOVER_SECONDS))

    def finish(self) -> None:
        """Have the thread run the next call, and the reactor deliver it."""
        self.executor.run_next()
        self.loop.run_waiting()


WORK = b'{"function":"work","args":[%d],"id":1}'


class OutTests(RelayTestCase):
    def test_an_offer(self) -> None:
        """What is handed over is offered: as its caller could have sent it, under a ticket."""
        terms = Terms(5, True, -7, True)
        for call in (self.call("a"), self.call("b", terms, id_json='"x"')):
            self.executor.send_on(call)
        self.assertEqual(
            self.take_told(),
            b'offer 1 0 - 0 {"function":"work","args":["a"],"id":1}\n'
            b'offer 2 -7 1005.0 1 {"function":"work","args":["b"],"id":"x","timeout":5,'
            b'"progress":true,"priority":-7,"cancel_on_disconnect":true}\n',
        )
        self.assertFalse(self.relay.is_quiet)

    def test_without_an_id(self) -> None:
        """A call without an id goes out without one, and its arguments may have names."""
        self.executor.send_on(self.call(id_json="", keywords={"value": 1}))
        self.assertEqual(
            self.take_told(), b'offer 1 0 - 0 {"function":"work","args":{"value":1}}\n'
        )

    def test_several_in_one_message(self) -> None:
        """What is handed over together goes out in one piece, and in its order."""
        self.relay.take([self.call(n) for n in range(3)])
        self.assertEqual(len(self.told), 1)
        offers = [Offer.decode(line.partition(b" ")[2]) for line in self.told[0].splitlines()]
        self.assertEqual([offer.ticket for offer in offers], [1, 2, 3])
        self.assertEqual([json.loads(offer.line)["args"] for offer in offers], [[0], [1], [2]])

    def test_a_reply(self) -> None:
        """The reply that comes back ends the call, as it is; then all is quiet."""
        self.send_on()
        self.hear(b'ended 1 - 0.5 {"id":1,"result":"a  b"}')
        self.assertEqual(self.replies, [{"id": 1, "result": "a  b"}])
        self.assertTrue(self.relay.is_quiet)
        self.assertEqual(self.heard, ["quiet"])

    def test_how_it_ended(self) -> None:
        """With the reply comes what the call is to be counted as, and how long it ran."""
        for ticket, end, expected in (
            (1, b"- 0.25", (None, 0.25)),
            (2, b"task-failed 1.500000", ("task-failed", 1.5)),
            (3, b"unknown-function -", ("unknown-function", None)),
        ):
            call = self.send_on()
            self.hear(b"ended %d %s {}" % (ticket, end))
            self.assertEqual((call.code, call.seconds), expected)

    def test_it_is_quiet_with_the_last(self) -> None:
        """Only when nothing is out any more all is quiet."""
        self.send_on()
        self.send_on()
        self.hear(b"ended 2 - 0.5 2")
        self.assertEqual((self.heard, self.relay.is_quiet), ([], False))
        self.hear(b"ended 1 - 0.5 1")
        self.assertEqual((self.heard, self.replies), (["quiet"], [2, 1]))

    def test_an_error(self) -> None:
        """The error that comes back ends the call, all its details included."""
        self.send_on()
        self.hear(b'failed 1 {"code":"overloaded","message":"full","retry_after":2.5}')
        error = self.replies[0]["error"]
        self.assertEqual(
            (error["code"], error["message"], error["retryable"], error["retry_after"]),
            ("overloaded", "full", True, 2.5),
        )
        self.assertEqual((self.heard, self.take_told()), (["quiet"], b""))

    def test_progress(self) -> None:
        """What the task reports is passed on, if its caller asked for it."""
        self.send_on(terms=Terms(wants_progress=True))
        self.hear(b"progress 1 half")
        self.send_on()
        self.hear(b"progress 2 half")
        self.assertEqual(self.reports, [b"half\n"])

    def test_what_is_over(self) -> None:
        """What comes for a ticket that is no longer out is dropped."""
        self.send_on(terms=Terms(wants_progress=True))
        self.hear(b"ended 1 - 0.5 1")
        self.heard.clear()
        for message in (b"ended 1 - 0.5 2", b'failed 1 {"code":"internal"}', b"progress 1 x"):
            self.hear(message)
        self.hear(b"ended 4711 - 0.5 2")
        self.assertEqual((self.replies, self.reports, self.heard), ([1], [], []))

    def test_a_cancel(self) -> None:
        """A call that is cancelled while it is out ends at once, and is taken back."""
        call = self.send_on()
        call.fail(Cancelled("taken back"))
        self.assertEqual(self.replies[0]["error"]["code"], "cancelled")
        self.assertEqual((self.take_told(), self.heard), (b"cancel 1\n", ["quiet"]))
        self.hear(b"ended 1 - 0.5 1")
        self.assertEqual(len(self.replies), 1)

    def test_the_callers_time(self) -> None:
        """A call whose time is over while it is out ends at once, and is taken back."""
        self.send_on(terms=Terms(timeout=5))
        self.loop.advance(4.75)
        self.assertEqual(self.replies, [])
        self.loop.advance(0.25)
        self.assertEqual(self.replies[0]["error"]["code"], "time-limit")
        self.assertEqual(self.take_told(), b"cancel 1\n")

    def test_a_reply_stops_the_callers_time(self) -> None:
        """A call that has come back leaves no timer behind."""
        self.send_on(terms=Terms(timeout=5))
        self.hear(b"ended 1 - 0.5 1")
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_the_supervisor_is_gone(self) -> None:
        """When the supervisor is gone every call that is out ends, and nothing is taken back."""
        calls = [self.send_on(), self.send_on(terms=Terms(timeout=5))]
        self.relay.lost()
        self.assertEqual([r["error"]["code"] for r in self.replies], ["worker-lost"] * 2)
        self.assertEqual(self.take_told(), b"")
        self.assertTrue(self.relay.is_quiet)
        self.assertTrue(all(call.reply for call in calls))
        self.assertEqual(self.loop.getDelayedCalls(), [])


class LaneTests(RelayTestCase):
    """What the executor hands over, and when it asks."""

    def test_what_waits_behind_a_long_task(self) -> None:
        """What waits behind a long task goes out, and so does what comes after it."""
        self.start_long()
        self.start(1)
        self.start(2)
        self.assertEqual(self.take_told(), b"")
        self.wait_long()
        self.assertEqual([json.loads(line[14:])["args"] for line in self.offers()], [[1], [2]])
        self.assertEqual(self.heard, ["filled"])
        self.start(3)
        self.assertEqual(len(self.offers()), 1)
        self.assertEqual(self.scoreboard.occupied()[1], 1)

    def offers(self) -> list[bytes]:
        lines = self.take_told().splitlines()
        self.assertTrue(all(line.startswith(b"offer ") for line in lines), lines)
        return lines

    def test_somebody_idles(self) -> None:
        """While another one idles, as many go out after a short while as can be begun."""
        self.scoreboard.slot(2).open(4712, 0.0)
        self.scoreboard.slot(2).ready()
        self.assertEqual(self.relay.idle(), 2)
        self.start_long()
        self.start(1)
        self.start(2)
        self.assertEqual(self.relay.idle(), 1)
        self.loop.advance(1.25 * HANDOVER_SECONDS)
        self.assertEqual([json.loads(line[14:])["args"] for line in self.offers()], [[1]])
        self.assertEqual(self.heard, [])

    def test_priority(self) -> None:
        """A call above priority 0 does not wait here."""
        self.start(0, Terms(priority=1))
        self.assertEqual(self.take_told(), b"")
        self.start(1, Terms(priority=1))
        self.assertEqual(len(self.offers()), 1)
        self.start(2, Terms(priority=-1))
        self.assertEqual(self.take_told(), b"")

    def test_a_free_thread_asks(self) -> None:
        """A worker whose task has ended asks for one if tasks wait, once until the answer."""
        self.scoreboard.supervisor_slot().show_waiting(3)
        self.assertEqual(self.relay.waits(), 3)
        self.start(0)
        self.start(1)
        self.finish()
        self.assertEqual((self.take_told(), self.executor.lane.occupied), (b"ask\n", 1))
        self.finish()
        self.assertEqual(self.take_told(), b"")
        self.hear(b"nothing")
        self.start(2)
        self.finish()
        self.assertEqual(self.take_told(), b"ask\n")

    def test_nothing_waits(self) -> None:
        """A worker does not ask while nothing waits."""
        self.start(0)
        self.finish()
        self.assertEqual(self.take_told(), b"")

    def test_free_again(self) -> None:
        """When a long task has ended, the worker runs its own again."""
        self.start_long()
        self.start(1)
        self.wait_long()
        self.take_told()
        self.finish()
        self.assertEqual(self.heard, ["filled", "freed"])
        self.start(2)
        self.assertEqual((self.take_told(), self.executor.lane.occupied), (b"", 1))


class HereTests(RelayTestCase):
    def test_a_task(self) -> None:
        """A task that comes in is run, and its reply goes back under its number."""
        self.run_here(4, WORK % 7)
        self.assertFalse(self.relay.is_quiet)
        self.finish()
        self.assertEqual(
            (self.ran, self.take_told()), ([7], b'ended 4 - 0.000000 {"id":1,"result":7}\n')
        )
        self.assertEqual((self.heard, self.relay.is_quiet), (["quiet"], True))

    def test_how_long_it_ran(self) -> None:
        """With the reply goes how long the task ran."""
        self.run_here(4, b'{"function":"later","args":[],"id":2}')
        self.loop.advance(0.5)
        self.deferred.callback("late")
        self.assertIn(b"ended 4 - 0.500000 {", self.take_told())

    def test_how_long_it_ran_until_its_limit(self) -> None:
        """A task that is ended while it runs has run until then."""
        self.run_here(4, b'{"function":"later","args":[],"id":2,"timeout":5}', b"1003.0")
        self.loop.advance(3)
        self.assertIn(b"ended 4 time-limit 3.000000 {", self.take_told())

    def test_each_under_its_own_number(self) -> None:
        """Of several tasks that are here each is answered under its own number."""
        self.run_here(4, WORK % 7)
        self.run_here(5, WORK % 8)
        self.finish()
        self.assertEqual(self.take_told(), b'ended 4 - 0.000000 {"id":1,"result":7}\n')
        self.assertEqual((self.heard, self.relay.is_quiet), ([], False))
        self.finish()
        self.assertEqual(self.take_told(), b'ended 5 - 0.000000 {"id":1,"result":8}\n')

    def test_without_an_id(self) -> None:
        """A task without an id comes to a bare result."""
        self.run_here(4, b'{"function":"work","args":[7]}')
        self.finish()
        self.assertEqual(self.take_told(), b"ended 4 - 0.000000 7\n")

    def test_on_the_reactor(self) -> None:
        """A function of the reactor's kind is answered at once, or when its Deferred fires."""
        self.run_here(4, b'{"function":"at_once","args":[7],"id":1}')
        self.assertEqual(self.take_told(), b'ended 4 - 0.000000 {"id":1,"result":7}\n')
        self.run_here(5, b'{"function":"later","args":[],"id":2}')
        self.assertEqual((self.take_told(), self.relay.is_quiet), (b"", False))
        self.deferred.callback("late")
        self.assertEqual(self.take_told(), b'ended 5 - 0.000000 {"id":2,"result":"late"}\n')
        self.assertTrue(self.relay.is_quiet)

    def test_what_cannot_be_called(self) -> None:
        """What this worker's code does not know, or cannot bind, is answered so."""
        for line, code in (
            (b'{"function":"gone","args":[],"id":1}', "unknown-function"),
            (b'{"function":"work","args":[1,2,3],"id":1}', "bad-arguments"),
        ):
            self.run_here(4, line)
            head, _, reply = self.take_told().partition(b"{")
            self.assertEqual(head, b"ended 4 %s - " % code.encode())
            fields = json.loads(b"{" + reply)
            self.assertEqual((fields["id"], fields["error"]["code"]), (1, code))
        self.assertTrue(self.relay.is_quiet)

    def test_progress(self) -> None:
        """What a task reports goes back under its number, if its caller asked for it."""
        self.run_here(4, b'{"function":"reporting","args":[],"id":1,"progress":true}')
        self.finish()
        self.assertEqual(
            self.take_told(),
            b'progress 4 {"id":1,"progress":{"done":1,"total":2,"message":null}}\n'
            b'ended 4 - 0.000000 {"id":1,"result":"reported"}\n',
        )
        self.run_here(5, b'{"function":"reporting","args":[],"id":1}')
        self.finish()
        self.assertEqual(self.take_told(), b'ended 5 - 0.000000 {"id":1,"result":"reported"}\n')

    def test_a_cancel_before_it_has_begun(self) -> None:
        """A task that nobody wants any more is answered, and never begun."""
        self.start(0)
        self.run_here(4, WORK % 7)
        self.hear(b"cancel 4")
        self.assertIn(b'"code":"cancelled"', self.take_told())
        self.finish()
        self.finish()
        self.assertEqual((self.ran, self.take_told()), ([0], b""))

    def test_a_cancel_on_the_reactor(self) -> None:
        """A task on the reactor that nobody wants any more is cancelled."""
        self.run_here(4, b'{"function":"later","args":[],"id":2}')
        self.hear(b"cancel 4")
        self.assertTrue(self.deferred.called)
        self.assertIn(
            b'ended 4 cancelled 0.000000 {"id":2,"error":{"code":"cancelled"', self.take_told()
        )

    def test_a_cancel_of_what_is_over(self) -> None:
        """A cancel that comes too late changes nothing."""
        self.run_here(4, WORK % 7)
        self.finish()
        self.take_told()
        self.hear(b"cancel 4")
        self.hear(b"cancel 4711")
        self.assertEqual(self.take_told(), b"")

    def test_its_time_is_over_here(self) -> None:
        """A task's time runs from its coming to its origin; after that it is never begun."""
        line = b'{"function":"work","args":[7],"id":1,"timeout":5}'
        self.run_here(4, line, b"1002.0")
        self.loop.advance(1.75)
        self.assertEqual(self.take_told(), b"")
        self.loop.advance(0.25)
        self.assertIn(
            b'ended 4 time-limit - {"id":1,"error":{"code":"time-limit"', self.take_told()
        )
        self.finish()
        self.assertEqual((self.ran, self.take_told()), ([], b""))

    def test_it_goes_back(self) -> None:
        """A task that waits here behind a long one is given back, and left to the others."""
        line = b'{"function":"work","args":[7],"id":1,"timeout":5}'
        self.start_long()
        self.run_here(4, line, b"1005.0")
        self.wait_long()
        self.assertEqual((self.take_told(), self.heard), (b"returned 4\n", ["quiet", "filled"]))
        self.assertTrue(self.relay.is_quiet)
        self.loop.advance(9)
        self.hear(b"cancel 4")
        self.finish()
        self.assertEqual((self.ran, self.replies), ([0], [{"id": 1, "result": 0}]))
        # It asks, though the queue shows nothing yet: what it gave back may be on its way there.
        self.assertEqual(self.take_told(), b"ask\n")

    def test_it_comes_again(self) -> None:
        """A task that was given back may come again, and is run then."""
        self.start_long()
        self.run_here(4, WORK % 7)
        self.wait_long()
        self.finish()
        self.take_told()
        self.run_here(4, WORK % 7)
        self.finish()
        self.assertEqual(
            (self.ran, self.take_told()), ([0, 7], b'ended 4 - 0.000000 {"id":1,"result":7}\n')
        )

    def test_a_retired_worker_gives_all_back(self) -> None:
        """What a worker is given on the way that has retired goes back at once."""
        self.executor.lane.retire()
        self.run_here(4, WORK % 7)
        self.assertEqual((self.take_told(), self.relay.is_quiet), (b"returned 4\n", True))

    def test_an_answer_ends_the_asking(self) -> None:
        """A task that comes in is an answer: a worker may ask again."""
        self.scoreboard.supervisor_slot().show_waiting(1)
        self.assertTrue(self.executor.lane.asks(True))
        self.run_here(4, WORK % 7)
        self.assertEqual((self.take_told(), self.executor.lane.occupied), (b"", 1))
        self.finish()
        self.assertEqual(self.take_told(), b'ended 4 - 0.000000 {"id":1,"result":7}\nask\n')


class ThreadsTests(RelayTestCase):
    threads = 2

    def test_a_second_thread_asks_as_well(self) -> None:
        """If another thread is free when the answer comes, and tasks wait, it asks again."""
        self.scoreboard.supervisor_slot().show_waiting(2)
        self.assertTrue(self.executor.lane.asks(False))
        self.run_here(4, WORK % 7)
        self.assertEqual(self.take_told(), b"ask\n")
        self.run_here(5, WORK % 8)
        self.assertEqual(self.take_told(), b"")

    def test_nothing_more_waits(self) -> None:
        """If nothing more waits, a second thread does not ask."""
        self.assertTrue(self.executor.lane.asks(False))
        self.run_here(4, WORK % 7)
        self.assertEqual(self.take_told(), b"")


class StuckTests(RelayTestCase):
    def test_a_thread_is_lost(self) -> None:
        """A task that goes on after its time costs the worker a thread, and that is told."""
        call = self.start(0)
        call.began = self.loop.seconds()
        call.fail(Cancelled("taken back"))
        self.assertEqual(self.heard, [])
        self.loop.advance(1)
        self.assertEqual(self.heard, ["stuck"])
        self.assertTrue(self.executor.lane.is_retired)


class LogTests(RelayTestCase):
    """What the log says of calls that go to others."""

    is_verbose = True

    def setUp(self) -> None:
        super().setUp()
        self.log = log_of(self, "relay")

    def refuse(self) -> None:
        """Hand a call over, and have it refused."""
        self.relay.take([self.call()])
        ticket = int(self.told[-1].split(b" ")[1])
        self.relay.readers[b"failed"](
            b'%d {"code":"overloaded","message":"full","retry_after":1}' % ticket
        )

    def test_a_hand_over(self) -> None:
        """Each call that is handed over is told, where that is wanted."""
        self.relay.take([self.call()])
        self.assertEqual(self.log, ["debug: work is handed over"])

    def test_a_full_queue(self) -> None:
        """That calls are refused is told once a minute, and how many were."""
        for _ in range(3):
            self.refuse()
        self.loop.advance(61)
        self.refuse()
        told = [line for line in self.log if not line.startswith("debug")]
        self.assertEqual(
            told,
            [
                "warn: the queue is full: work was refused",
                "warn: the queue is full: work was refused (2 more were not logged)",
            ],
        )


class QuietLogTests(RelayTestCase):
    def test_a_hand_over(self) -> None:
        """Where it is not wanted, nothing is logged of what is handed over."""
        log = log_of(self, "relay")
        self.relay.take([self.call()])
        self.assertEqual(log, [])
