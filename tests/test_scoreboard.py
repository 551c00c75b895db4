"""The shared slots."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.functions import Function, Kind
from taskd.scoreboard import NAME_BYTES, Scoreboard, Slot, State

examples = settings(max_examples=100, deadline=None)

COUNTS = ("in_flight", "connections", "accepted", "done", "failed", "restarts")


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

    def test_fresh(self) -> None:
        """A fresh scoreboard has its slots, and all of them are dead and zero."""
        self.assertEqual(self.board.procs, 3)
        status = self.board.status(100.0)
        self.assertEqual([worker["worker"] for worker in status["workers"]], [1, 2, 3])
        for worker in status["workers"]:
            self.assertEqual((worker["state"], worker["pid"], worker["task"]), ("dead", None, None))
            self.assertEqual([worker[name] for name in COUNTS], [0] * 6)
            self.assertEqual((worker["uptime"], worker["latency"]), (0.0, {}))

    def test_everybody_reads_what_one_writes(self) -> None:
        """What is written through one mapping is read through another one of the same memory."""
        other = Scoreboard(self.fd)
        self.board.slot(2).open(4711, 1.0)
        self.assertEqual(other.status(2.0)["workers"][1]["pid"], 4711)
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
        self.assertEqual(self.board.status(2.0)["workers"][2]["pid"], pid)

    def test_slots_are_apart(self) -> None:
        """What one slot shows, its longest name included, touches no other."""
        before = self.board.status(9.0)
        slot = self.board.slot(2)
        slot.open(4711, 1.0)
        slot.begin(b"x" * NAME_BYTES, 2.0)
        slot.connected(9)
        slot.end(True, 1e9)
        slot.count_restart()
        after = self.board.status(9.0)
        self.assertNotEqual(after["workers"][1], before["workers"][1])
        for untouched in (0, 2):
            self.assertEqual(after["workers"][untouched], before["workers"][untouched])
        self.assertEqual(after["supervisor"], before["supervisor"])

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
        slot.count_restart()
        totals = self.board.status(2.0)["totals"]
        self.assertEqual([totals[name] for name in COUNTS], [1, 3, 2, 1, 1, 1])
        states = {"dead": 1, "starting": 0, "idle": 1, "busy": 1, "draining": 0}
        self.assertEqual(totals["workers"], states)

    def test_the_supervisors_slot(self) -> None:
        """Slot 0 is the supervisor's: it is no worker and counts in no total."""
        self.board.slot(0).open(99, 10.0)
        status = self.board.status(15.5)
        self.assertEqual(status["supervisor"], {"pid": 99, "uptime": 5.5})
        self.assertEqual(sum(status["totals"]["workers"].values()), 3)
        self.assertEqual(status["totals"]["workers"]["starting"], 0)

    def test_the_status_is_json(self) -> None:
        """The status is made of plain JSON types."""
        slot = self.board.slot(1)
        slot.open(4711, 1.0)
        slot.begin(label("send_mail"), 2.0)
        slot.end(False, 0.5)
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

    def test_a_successor(self) -> None:
        """A new process in the slot keeps what was counted, and inherits no task or connection."""
        self.slot.ready()
        self.slot.connected(1)
        self.slot.begin(label("f"), 11.0)
        self.slot.end(True, 1.0)
        self.slot.begin(label("g"), 12.0)
        self.slot.count_restart()
        self.slot.open(4712, 15.0)
        self.assertEqual(
            self.status("pid", "state", "uptime", "task"), [4712, "starting", 5.0, None]
        )
        counts = self.status("in_flight", "connections", "accepted", "failed", "restarts")
        self.assertEqual(counts, [0, 0, 1, 1, 1])
        self.assertFalse(self.slot.is_working)

    def test_closed(self) -> None:
        """A slot without a process shows no task and no connection, and keeps what was counted."""
        self.slot.connected(3)
        self.slot.begin(label("f"), 11.0)
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
