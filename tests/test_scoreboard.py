"""The shared slots."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.failures import KEPT
from taskd.functions import Function, Kind
from taskd.scoreboard import SPARE_SLOTS, Scoreboard
from taskd.slots import CALLERS_BYTES, NAME_BYTES, SLOT_WORDS, Slot, SupervisorSlot
from taskd.states import Cause, State
from taskd.tally import ROWS

examples = settings(max_examples=100, deadline=None)

COUNTS = ("in_flight", "connections", "accepted", "done", "failed")


def label(name: str) -> bytes:
    """Give a task's name as a registered function has it."""
    return Function(name, lambda: None, Kind.THREAD).label


class ScoreboardTests(SynchronousTestCase):
    """All slots together."""

    def setUp(self) -> None:
        """Make a scoreboard for three workers."""
        self.fd = Scoreboard.create(3)
        self.addCleanup(os.close, self.fd)
        self.board = Scoreboard(self.fd)

    def worker(self, number: int, now: float = 2.0) -> dict[str, Any]:
        """Give what the status says of one worker."""
        (worker,) = (w for w in self.board.status(now)["workers"] if w["worker"] == number)
        return worker

    def test_functions(self) -> None:
        """The status sums up what became of calls, those of slots without a process included."""
        for number in (0, 2, 12):
            slot = self.board.slot(number)
            slot.open(4711, 1.0)
            self.board.tally(number).done(label("add"), 0.25)
            slot.close()
        self.board.tally(12).failed(label("echo"), "cancelled", None)
        add, echo = Scoreboard(self.fd).status(2.0)["functions"]
        self.assertEqual((add["name"], add["done"], add["seconds"]), ("add", 3, 0.75))
        self.assertEqual((echo["name"], echo["errors"]), ("echo", {"cancelled": 1}))

    def test_failures(self) -> None:
        """The latest failures of all slots are listed, those without a process included."""
        for number in (0, 2, 12):
            slot = self.board.slot(number)
            slot.open(4711, 1.0)
            self.board.failures(number).note(100.0 + number, number, "add", "internal", None, "no")
            slot.close()
        told = Scoreboard(self.fd).latest_failures(2)
        self.assertEqual([(f["at"], f["worker"]) for f in told], [(112.0, 12), (102.0, 2)])

    def test_books_are_apart(self) -> None:
        """What one slot counts and keeps, however much, touches no other, nor what it shows."""
        for number in (1, 2, 3):
            self.board.slot(number).open(number, 1.0)
        before = self.board.status(9.0)
        for number in range(ROWS + 1):
            self.board.tally(2).failed(label(f"f{number}"), "internal", 1e9)
        for _ in range(2 * KEPT):
            self.board.failures(2).note(1.0, 2, "x" * NAME_BYTES, "internal", None, "m" * 1000)
        after = self.board.status(9.0)
        self.assertEqual({**after, "functions": []}, before)
        for number in (0, 1, 3):
            self.assertEqual(list(self.board.tally(number).rows()), [])
            self.assertEqual(self.board.failures(number).read(), [])
        self.assertEqual(len(self.board.failures(2).read()), KEPT)
        rows = list(self.board.tally(2).rows())
        self.assertEqual([seconds for _, _, seconds in rows], [1e9] * (ROWS + 1))

    def test_memory(self) -> None:
        """What belongs to a slot that has had no process is not touched, whoever reads."""
        page = 4096
        for number in range(1 + self.board.slots):
            self.board.tally(number)
            self.board.failures(number)
        self.board.status(2.0)
        self.board.latest_failures(50)
        shown = os.fstat(self.fd).st_blocks * 512
        self.assertLessEqual(shown, (2 + (1 + self.board.slots) * SLOT_WORDS * 8 // page) * page)
        self.board.slot(2).open(4711, 1.0)
        self.board.tally(2).done(label("add"), 0.25)
        self.board.status(2.0)
        self.assertLessEqual(os.fstat(self.fd).st_blocks * 512 - shown, page)

    def test_fresh(self) -> None:
        """A fresh scoreboard shows no worker and counts nothing, whatever number it has."""
        self.assertEqual(self.board.slots, 3 * (1 + SPARE_SLOTS))
        status = self.board.status(100.0)
        self.assertEqual(status["workers"], [])
        self.assertEqual([status["totals"][name] for name in COUNTS], [0] * 5)
        self.assertEqual(set(status["totals"]["workers"].values()), {0})
        for number in range(1, self.board.slots + 1):
            slot = self.board.slot(number).status(100.0)
            self.assertEqual((slot["state"], slot["pid"], slot["task"]), ("dead", None, None))
            self.assertEqual([slot[name] for name in COUNTS], [0] * 5)
            self.assertEqual((slot["uptime"], slot["latency"]), (0.0, {}))

    def test_only_living_workers_are_shown(self) -> None:
        """The status has one object for each slot that has a process, in their order."""
        for number in (1, 7, 12):
            self.board.slot(number).open(4711 + number, 1.0)
        self.board.slot(7).close()
        shown = [(w["worker"], w["pid"]) for w in self.board.status(2.0)["workers"]]
        self.assertEqual(shown, [(1, 4712), (12, 4723)])

    def test_everybody_reads_what_one_writes(self) -> None:
        """What is written through one mapping is read through another one of the same memory."""
        other = Scoreboard(self.fd)
        self.board.slot(2).open(4711, 1.0)
        self.assertEqual(other.status(2.0)["workers"][0]["pid"], 4711)
        self.assertEqual(other.slot(2).state, State.STARTING)

    def test_the_descriptor_may_be_closed(self) -> None:
        """The memory outlives its file descriptor."""
        fd = Scoreboard.create(1)
        board = Scoreboard(fd)
        os.close(fd)
        board.slot(1).open(4711, 1.0)
        self.assertEqual(board.status(2.0)["workers"][0]["pid"], 4711)

    def test_a_fork_shares_it(self) -> None:
        """What a forked process writes on its slot is seen by its parent."""
        pid = os.fork()
        if pid == 0:
            try:
                self.board.slot(3).open(os.getpid(), 1.0)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(self.worker(3)["pid"], pid)

    def test_slots_are_apart(self) -> None:
        """What one slot shows, its longest name included, touches no other."""
        for number in (1, 3):
            self.board.slot(number).open(number, 1.0)
        before = self.board.status(9.0)
        slot = self.board.slot(2)
        slot.open(4711, 1.0)
        slot.take(b"x" * NAME_BYTES, 2.0)
        slot.begin(b"x" * NAME_BYTES, 2.0)
        slot.connected(9)
        slot.end(True, 1e9)
        slot.must_end(1e9)
        slot.beats(8.0)
        after = self.board.status(9.0)
        self.assertEqual(after["workers"].pop(1)["worker"], 2)
        for untouched in ("workers", "supervisor", "queue"):
            self.assertEqual(after[untouched], before[untouched])

    def test_the_supervisors_slot_is_apart(self) -> None:
        """What the supervisor shows, its longest failure included, touches no worker's slot."""
        self.board.slot(1).open(4711, 1.0)
        before = self.board.status(9.0)
        slot = self.board.supervisor_slot()
        slot.open(99, 1.0)
        slot.show_waiting(2**60)
        slot.show_queue(1.0, 2**60, 2**60, 2**60)
        slot.show_reload(2.0, "x" * 10_000)
        for cause in Cause:
            slot.count_restart(cause)
        after = self.board.status(9.0)
        self.assertEqual(after["workers"], before["workers"])
        self.assertEqual(
            [after["totals"][name] for name in COUNTS], [before["totals"][name] for name in COUNTS]
        )

    def test_figures(self) -> None:
        """The figures are the same as those of the totals, and what waits."""
        for number in (1, 2, 3, 4, 5):
            slot = self.board.slot(number)
            slot.open(number, 1.0)
            slot.leave(number > 2, 0.1)
            if number > 1:
                slot.ready()
        self.board.slot(2).take(label("f"), 2.0)
        self.board.slot(3).drain()
        self.board.slot(4).close()
        self.board.supervisor_slot().open(99, 1.0)
        self.board.supervisor_slot().show_waiting(7)
        figures = self.board.figures()
        self.assertEqual(
            figures,
            {
                "starting": 1,
                "idle": 1,
                "busy": 1,
                "draining": 1,
                "waiting": 7,
                "done": 2,
                "failed": 3,
            },
        )
        totals = self.board.status(3.0)["totals"]
        told = {**totals["workers"], **{name: totals[name] for name in ("done", "failed")}}
        self.assertEqual(told, {name: figures[name] for name in told})

    def test_totals(self) -> None:
        """The totals are the sums over all workers, and the workers counted by their state."""
        for number in (1, 2):
            slot = self.board.slot(number)
            slot.open(number, 1.0)
            slot.ready()
            slot.connected(number)
            slot.begin(label("f"), 1.0)
        slot.end(False, 0.1)
        slot.leave(True, 0.1)
        totals = self.board.status(2.0)["totals"]
        self.assertEqual([totals[name] for name in COUNTS], [1, 3, 2, 1, 1])
        states = {"starting": 0, "idle": 1, "busy": 1, "draining": 0}
        self.assertEqual(totals["workers"], states)

    def test_callers_are_summed_up(self) -> None:
        """The totals tell how many connections each identity has at all workers together."""
        for number, callers in ((1, '{"web": 2, "ops": 1}'), (2, '{"web": 1, "…": 3}'), (3, "")):
            slot = self.board.slot(number)
            slot.open(number, 1.0)
            slot.show_callers(callers)
        self.assertEqual(self.board.status(2.0)["totals"]["callers"], {"web": 3, "ops": 1, "…": 3})
        self.assertEqual(self.worker(1)["callers"], {"web": 2, "ops": 1})
        self.assertEqual(self.worker(3)["callers"], {})

    def test_totals_of_those_who_are_no_more(self) -> None:
        """What workers have counted that are no more stays in the totals."""
        slot = self.board.slot(1)
        slot.open(4711, 1.0)
        slot.connected(3)
        slot.leave(False, 0.1)
        slot.close()
        totals = self.board.status(2.0)["totals"]
        self.assertEqual([totals[name] for name in COUNTS], [0, 0, 1, 1, 0])
        self.assertEqual(sum(totals["workers"].values()), 0)

    def test_idle_threads(self) -> None:
        """Those that accept, and no others, can start as many tasks as they have free threads."""
        self.assertEqual(self.board.idle_threads(1), 0)
        slots = [self.board.slot(number) for number in (1, 2, 12)]
        for slot in slots:
            slot.open(slot.number, 1.0)
            self.assertEqual(self.board.idle_threads(1), 0)
        for free, slot in enumerate(slots, 1):
            slot.ready()
            self.assertEqual(self.board.idle_threads(1), free)
        self.assertEqual(self.board.idle_threads(4), 12)
        slots[0].take(label("f"), 1.0)
        slots[0].take(label("f"), 1.0)  # it waits, and another one's thread does not run it
        slots[2].begin(label("g"), 1.0)  # the reactor's task leaves the thread free
        self.assertEqual(self.board.idle_threads(1), 2)
        self.assertEqual(self.board.idle_threads(4), 10)
        slots[1].drain()
        self.assertEqual(self.board.idle_threads(4), 6)
        slots[2].close()
        self.assertEqual(self.board.idle_threads(4), 2)

    def test_the_supervisor_is_not_idle(self) -> None:
        """The supervisor, which is always ready, could start no task."""
        slot = self.board.supervisor_slot()
        slot.open(99, 1.0)
        slot.ready()
        self.assertEqual(self.board.idle_threads(1), 0)

    def test_by_slot(self) -> None:
        """What workers have of blocking calls and connections is given by their numbers."""
        for number in (2, 12):
            slot = self.board.slot(number)
            slot.open(number, 1.0)
            slot.connected(10 * number)
            slot.take(label("f"), 1.0)
            slot.begin(label("g"), 1.0)
        slot.take(label("f"), 1.0)
        for shown, expected in (
            (self.board.occupied(), {2: 1, 12: 2}),
            (self.board.connections(), {2: 20, 12: 120}),
        ):
            self.assertEqual(len(shown), 1 + self.board.slots)
            self.assertEqual({n: v for n, v in enumerate(shown) if v}, expected)

    def test_what_waits(self) -> None:
        """How many tasks wait is seen by everybody at once."""
        other = Scoreboard(self.fd)
        self.assertEqual(other.waiting, 0)
        self.board.supervisor_slot().show_waiting(3)
        self.assertEqual((other.waiting, other.status(2.0)["queue"]["waiting"]), (3, 3))

    def test_the_supervisors_slot(self) -> None:
        """The supervisor is no worker and counts in no total."""
        self.board.supervisor_slot().open(99, 10.0)
        status = self.board.status(15.5)
        self.assertEqual(status["supervisor"], {"pid": 99, "uptime": 5.5, "reload": None})
        self.assertEqual(status["workers"], [])
        self.assertEqual(sum(status["totals"]["workers"].values()), 0)

    def test_restarts_are_among_the_totals(self) -> None:
        """The totals tell how many workers were replaced, by cause."""
        self.board.supervisor_slot().count_restart(Cause.MAX_RSS)
        restarts = self.board.status(1.0)["totals"]["restarts"]
        self.assertEqual({cause for cause, count in restarts.items() if count}, {"max_rss"})

    def test_the_status_is_json(self) -> None:
        """The status is made of plain JSON types."""
        slot = self.board.slot(1)
        slot.open(4711, 1.0)
        slot.begin(label("send_mail"), 2.0)
        slot.end(False, 0.5)
        supervisor = self.board.supervisor_slot()
        supervisor.show_waiting(1)
        supervisor.show_queue(1.5, 1, 2, 3)
        supervisor.show_reload(2.0, "no")
        status = self.board.status(3.0)
        self.assertEqual(json.loads(json.dumps(status)), status)


class SlotTests(SynchronousTestCase):
    """One process's slot."""

    def setUp(self) -> None:
        """Open a slot for a process that was born at 10 seconds."""
        fd = Scoreboard.create(1)
        self.addCleanup(os.close, fd)
        self.slot: Slot = Scoreboard(fd).slot(1)
        self.slot.open(4711, 10.0)

    def status(self, *names: str, now: float = 20.0) -> list[Any]:
        """Give some members of the slot's status."""
        return [self.slot.status(now)[name] for name in names]

    def test_a_life(self) -> None:
        """A worker starts, is idle, drains and is dead, in the order in which it says so."""
        shown = []
        for step in (lambda: None, self.slot.ready, self.slot.drain, self.slot.close):
            step()
            shown.append((self.slot.state, *self.status("state", "pid", "uptime")))
        self.assertEqual(
            shown,
            [
                (State.STARTING, "starting", 4711, 10.0),
                (State.READY, "idle", 4711, 10.0),
                (State.DRAINING, "draining", 4711, 10.0),
                (State.DEAD, "dead", None, 0.0),
            ],
        )

    def test_busy(self) -> None:
        """A worker that accepts is busy from the begin of a task to its end."""
        self.slot.ready()
        self.slot.begin(label("report"), 12.0)
        self.assertTrue(self.slot.is_working)
        self.assertEqual(
            self.status("state", "task", "task_seconds", "in_flight"), ["busy", "report", 8.0, 1]
        )
        self.slot.end(False, 8.0)
        self.assertFalse(self.slot.is_working)
        self.assertEqual(
            self.status("state", "task", "task_seconds", "in_flight"), ["idle", None, None, 0]
        )

    def test_a_short_task(self) -> None:
        """A task that is over at once shows while it runs, and is not in flight."""
        self.slot.ready()
        self.slot.enter(label("add"), 19.5)
        self.assertTrue(self.slot.is_working)
        self.assertEqual(
            self.status("state", "task", "task_seconds", "in_flight"), ["busy", "add", 0.5, 0]
        )
        self.slot.leave(False, 0.5)
        self.assertFalse(self.slot.is_working)
        self.assertEqual(self.status("state", "task", "done"), ["idle", None, 1])

    def test_draining_with_a_task(self) -> None:
        """A worker that drains is not called busy, and shows what it still runs."""
        self.slot.ready()
        self.slot.begin(label("report"), 12.0)
        self.slot.drain()
        self.assertEqual(self.status("state", "task"), ["draining", "report"])

    def test_several_tasks(self) -> None:
        """Of several tasks in flight the first is shown, until the last has ended."""
        for number, name in enumerate(("first", "second", "third"), 1):
            self.slot.begin(label(name), 10.0 + number)
            self.assertEqual(self.status("in_flight"), [number])
        for left in (2, 1):
            self.slot.end(False, 1.0)
            self.assertEqual(self.status("in_flight", "task"), [left, "first"])
        self.slot.end(False, 1.0)
        self.assertEqual(self.status("in_flight", "task"), [0, None])

    def test_a_short_task_beside_a_long_one(self) -> None:
        """When a short task is over, the long one beside it is what runs, and since when."""
        self.slot.begin(label("report"), 12.0)
        self.slot.enter(label("taskd.status"), 19.0)
        self.slot.leave(False, 0.0)
        self.assertEqual(self.status("task", "task_seconds"), ["report", 8.0])

    def test_blocking_tasks(self) -> None:
        """Blocking tasks are in flight from when they are taken on until they are finished."""
        self.slot.ready()
        for number, name in enumerate(("first", "second"), 1):
            self.slot.take(label(name), 10.0 + number)
            self.assertEqual(self.status("state", "task", "in_flight"), ["busy", "first", number])
        self.assertTrue(self.slot.is_working)
        self.slot.finish(True, 1.0)
        self.assertEqual(self.status("task", "in_flight", "failed"), ["first", 1, 1])
        self.slot.finish(False, 1.0)
        self.assertEqual(self.status("state", "task", "in_flight", "done"), ["idle", None, 0, 1])
        self.assertFalse(self.slot.is_working)

    def test_tasks_of_both_kinds(self) -> None:
        """Tasks in threads and on the reactor are in flight together."""
        self.slot.take(label("first"), 11.0)
        self.slot.begin(label("second"), 12.0)
        self.assertEqual(self.status("task", "in_flight"), ["first", 2])
        self.slot.finish(False, 1.0)
        self.assertEqual(self.status("in_flight"), [1])
        self.slot.end(False, 1.0)
        self.assertEqual(self.status("task", "in_flight", "done"), [None, 0, 2])

    def test_another_one_runs(self) -> None:
        """Of the tasks that were taken on the one is shown that is said to run, and since when."""
        for number in (1, 2):
            self.slot.take(label(f"task{number}"), 10.0 + number)
        self.slot.run(label("task2"), 15.0)
        self.assertEqual(self.status("task", "task_seconds"), ["task2", 5.0])
        self.slot.enter(label("taskd.status"), 19.0)
        self.slot.leave(False, 0.0)
        self.assertEqual(self.status("task", "task_seconds"), ["task2", 5.0])

    def test_what_was_handed_over(self) -> None:
        """What was taken on and handed over is in flight no longer, and counts as nothing."""
        self.slot.ready()
        for _ in range(2):
            self.slot.take(label("f"), 12.0)
        self.slot.hand_over()
        self.assertEqual(self.status("state", "task", "in_flight"), ["busy", "f", 1])
        self.slot.hand_over()
        self.assertEqual(self.status("state", "task", "in_flight"), ["idle", None, 0])
        self.assertEqual(self.status("done", "failed", "latency"), [0, 0, {}])
        self.assertEqual(self.slot.ended, 0)

    def test_a_question_is_no_work(self) -> None:
        """Who asks for the status is not shown by it, and what runs beside it is."""
        self.slot.ready()
        self.slot.enter(label("taskd.status"), 19.0)
        self.slot.show_the_rest()
        self.assertEqual(self.status("state", "task"), ["idle", None])
        self.slot.take(label("report"), 12.0)
        self.slot.enter(label("taskd.status"), 19.0)
        self.slot.show_the_rest()
        self.assertEqual(self.status("state", "task", "task_seconds"), ["busy", "report", 8.0])

    def test_beats(self) -> None:
        """A process has beaten when it was born, and whenever it has said so since."""
        self.assertEqual(self.slot.beat, 10.0)
        self.slot.beats(12.5)
        self.assertEqual(self.slot.beat, 12.5)
        self.slot.open(4712, 15.0)
        self.assertEqual(self.slot.beat, 15.0)

    def test_due(self) -> None:
        """Until when the running task must have ended is shown until there is no such time."""
        self.assertEqual(self.slot.due, 0.0)
        for due in (12.5, 11.25, 0.0, 13.0):
            self.slot.must_end(due)
            self.assertEqual(self.slot.due, due)
        self.slot.close()
        self.assertEqual(self.slot.due, 0.0)

    def test_a_successor_owes_nothing(self) -> None:
        """A new process in the slot has no task that must have ended."""
        self.slot.must_end(12.5)
        self.slot.open(4712, 15.0)
        self.assertEqual(self.slot.due, 0.0)

    def test_what_has_ended(self) -> None:
        """All tasks that have ended in the slot are counted together, whoever ran them."""
        self.slot.leave(True, 0.1)
        self.slot.take(label("f"), 12.0)
        self.slot.finish(False, 0.1)
        self.slot.open(4712, 15.0)
        self.slot.begin(label("f"), 16.0)
        self.slot.end(False, 0.1)
        self.assertEqual(self.slot.ended, 3)

    def test_the_task_by_name(self) -> None:
        """The name of the task that is shown can be read by itself."""
        for name in ("send_mail", "x" * NAME_BYTES, "a"):
            self.slot.enter(label(name), 12.0)
            self.assertEqual(self.slot.task, name)

    def test_names(self) -> None:
        """A name is shown whole, up to the longest, and leaves nothing in the next one's."""
        for name in ("x" * NAME_BYTES, "add", "send_mail", "send_mail", "a"):
            self.slot.begin(label(name), 12.0)
            self.assertEqual(self.status("task"), [name])
            self.slot.end(False, 0.0)

    def test_counting(self) -> None:
        """Every task that ended is counted once, by whether its caller got an error."""
        for failed in (False, True, True):
            self.slot.begin(label("f"), 12.0)
            self.slot.end(failed, 0.0)
            self.slot.enter(label("g"), 12.0)
            self.slot.leave(failed, 0.0)
        self.assertEqual(self.status("done", "failed"), [2, 4])

    def test_connections(self) -> None:
        """The slot shows how many connections there are, and how many there have been."""
        for count in (1, 2):
            self.slot.connected(count)
        self.slot.disconnected(1)
        self.slot.connected(2)
        self.assertEqual(self.status("connections", "accepted"), [2, 3])

    def test_callers(self) -> None:
        """The slot shows whose connections these are, up to its last byte, and beside the task."""
        self.slot.begin(label("f"), 11.0)
        self.assertEqual(self.slot.callers, {})
        full = json.dumps({"x" * (CALLERS_BYTES - 8): 12})
        self.assertEqual(len(full), CALLERS_BYTES)
        for shown in ('{"web": 1}', full, '{"ops": 2}'):
            self.slot.show_callers(shown)
            self.assertEqual(self.status("callers", "task"), [json.loads(shown), "f"])
        self.slot.show_callers("")
        self.assertEqual(self.slot.callers, {})

    def test_callers_that_do_not_fit(self) -> None:
        """Of what has no room, or is half written, nothing is shown."""
        self.slot.show_callers('{"web": 1}')
        self.slot.show_callers(json.dumps({"x" * (CALLERS_BYTES - 7): 12}))
        self.assertEqual(self.slot.callers, {})
        self.slot.show_callers('{"web": 1, "o')
        self.assertEqual(self.slot.callers, {})

    def test_nobodys_callers(self) -> None:
        """A slot whose process has gone shows no callers, nor does its successor's."""
        for step in (self.slot.close, lambda: self.slot.open(4712, 15.0)):
            self.slot.show_callers('{"web": 1}')
            step()
            self.assertEqual(self.slot.callers, {})

    def test_a_successor(self) -> None:
        """A new process in the slot keeps what was counted, and inherits no task or connection."""
        self.slot.ready()
        self.slot.connected(1)
        self.slot.begin(label("f"), 11.0)
        self.slot.end(True, 1.0)
        self.slot.begin(label("g"), 12.0)
        self.slot.take(label("h"), 12.0)
        self.slot.open(4712, 15.0)
        self.assertEqual(
            self.status("pid", "state", "uptime", "task"), [4712, "starting", 5.0, None]
        )
        counts = self.status("in_flight", "connections", "accepted", "failed")
        self.assertEqual(counts, [0, 0, 1, 1])
        self.assertFalse(self.slot.is_working)

    def test_closed(self) -> None:
        """A slot without a process shows no task and no connection, and keeps what was counted."""
        self.slot.connected(3)
        self.slot.begin(label("f"), 11.0)
        self.slot.take(label("f"), 11.0)
        self.slot.close()
        names = ("pid", "task", "task_seconds", "in_flight", "connections", "accepted")
        self.assertEqual(self.status(*names), [None, None, None, 0, 0, 1])

    @examples
    @given(seconds=st.floats(0.0, 2000.0))
    def test_latency(self, seconds: float) -> None:
        """A task is counted under the least power of two that its microseconds stay below."""
        before = self.slot.latency()
        self.slot.leave(False, seconds)
        after = self.slot.latency()
        (bound,) = (int(b) for b in after if after[b] != before.get(b, 0))
        self.assertEqual(bound.bit_count(), 1)
        self.assertLess(int(seconds * 1e6), bound)
        self.assertLessEqual(bound // 2, int(seconds * 1e6))

    def test_the_slowest(self) -> None:
        """Tasks of hours and days are counted together, in the last place."""
        for seconds in (1500.0, 86400.0, 1e9):
            self.slot.leave(False, seconds)
        self.assertEqual(self.slot.latency(), {str(2**31): 3})

    def test_the_title(self) -> None:
        """The process's title says idle, the name of the running task, or draining."""
        memory = bytearray(b"-" * 12)
        shown = []
        self.slot.show_on(memoryview(memory))
        for step in (
            self.slot.ready,
            lambda: self.slot.begin(label("add"), 1.0),
            lambda: self.slot.begin(label("second"), 1.0),
            lambda: self.slot.end(False, 0.0),
            lambda: self.slot.end(False, 0.0),
            lambda: self.slot.begin(label("x" * 128), 1.0),
            self.slot.drain,
            lambda: self.slot.end(False, 0.0),
        ):
            step()
            shown.append(bytes(memory).rstrip(b"\0").decode())
        self.assertEqual(
            shown,
            ["idle)", "add)", "add)", "add)", "idle)", "x" * 12, "draining)", "draining)"],
        )
        self.assertEqual(len(memory), 12)

    def test_the_title_follows(self) -> None:
        """The title names the task that is said to run, through all that comes and goes."""
        memory = bytearray(b"-" * 12)
        shown = []
        self.slot.ready()
        self.slot.show_on(memoryview(memory))
        one, two = label("one"), label("two")
        for step in (
            lambda: self.slot.take(one, 1.0),
            lambda: self.slot.take(two, 1.0),
            lambda: self.slot.run(one, 1.0),
            lambda: self.slot.run(two, 1.0),
            lambda: self.slot.enter(label("quick"), 1.0),
            lambda: self.slot.leave(False, 0.0),
            lambda: self.slot.finish(False, 0.0),
            lambda: self.slot.hand_over(),
            lambda: self.slot.take(two, 1.0),
        ):
            step()
            shown.append(bytes(memory).rstrip(b"\0").decode())
        self.assertEqual(
            shown,
            ["one)", "one)", "one)", "two)", "two)", "two)", "two)", "idle)", "two)"],
        )


class SupervisorSlotTests(SynchronousTestCase):
    """What the supervisor shows."""

    def setUp(self) -> None:
        """Open the slot of a supervisor that was born at 10 seconds."""
        fd = Scoreboard.create(1)
        self.addCleanup(os.close, fd)
        self.slot: SupervisorSlot = Scoreboard(fd).supervisor_slot()
        self.slot.open(99, 10.0)

    def test_a_fresh_one(self) -> None:
        """At first there is no reload, the queue is empty, and nobody was replaced."""
        supervisor, queue, restarts = self.slot.summary(15.5)
        self.assertEqual(supervisor, {"pid": 99, "uptime": 5.5, "reload": None})
        self.assertEqual(
            queue,
            {"waiting": 0, "oldest_seconds": None, "handed_over": 0, "refused": 0, "expired": 0},
        )
        self.assertEqual(restarts, {cause.name.lower(): 0 for cause in Cause})

    def test_a_reload(self) -> None:
        """The last reload is told with its age and, if it went wrong, with the reason."""
        self.slot.show_reload(11.0, "--tasks x: no módule \ud800")
        reload = self.slot.summary(15.5)[0]["reload"]
        self.assertEqual(reload, {"seconds_ago": 4.5, "failure": "--tasks x: no módule \\ud800"})
        self.slot.show_reload(12.0, "")
        reload = self.slot.summary(15.5)[0]["reload"]
        self.assertEqual(reload, {"seconds_ago": 3.5, "failure": None})

    def test_a_long_failure(self) -> None:
        """A reason that has no room is cut off, in the middle of a character too."""
        for text in ("x" * 1000, "é" * 1000, "x" + "é" * 1000):
            self.slot.show_reload(11.0, text)
            failure = self.slot.summary(12.0)[0]["reload"]["failure"]
            self.assertEqual(failure.rstrip("\ufffd"), text[: len(failure.rstrip("\ufffd"))])
            self.assertGreater(len(failure), 100)

    def test_the_queue(self) -> None:
        """The queue is told with its length, its oldest task's age, and what became of tasks."""
        self.slot.show_waiting(2)
        self.slot.show_queue(12.25, 30, 4, 5)
        self.assertEqual(
            self.slot.summary(15.5)[1],
            {
                "waiting": 2,
                "oldest_seconds": 3.25,
                "handed_over": 30,
                "refused": 4,
                "expired": 5,
            },
        )

    def test_an_oldest_task_of_late(self) -> None:
        """The oldest task has no age once nothing waits, and never one below zero."""
        self.slot.show_queue(12.25, 1, 0, 0)
        self.assertIsNone(self.slot.summary(15.5)[1]["oldest_seconds"])
        self.slot.show_waiting(1)
        self.assertEqual(self.slot.summary(12.0)[1]["oldest_seconds"], 0.0)
        self.slot.show_queue(None, 1, 0, 0)
        self.assertIsNone(self.slot.summary(15.5)[1]["oldest_seconds"])

    def test_causes(self) -> None:
        """Each cause of a replacement is counted by itself."""
        for times, cause in enumerate(Cause, 1):
            for _ in range(times):
                self.slot.count_restart(cause)
        self.assertEqual(
            self.slot.summary(15.5)[2],
            {
                "died": 1,
                "time_limit": 2,
                "hung": 3,
                "max_tasks": 4,
                "max_rss": 5,
                "reload": 6,
            },
        )
