"""One process's tally: a row for each function, which outlives the process."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.functions import label_of
from taskd.slots import NAME_BYTES
from taskd.tally import REST, ROWS, TALLY_BYTES, Tally, functions_of
from tests.support import WatchedMemory, new_slot

examples = settings(max_examples=60, deadline=None)

CODES = (
    "task-failed",
    "time-limit",
    "cancelled",
    "bad-arguments",
    "worker-lost",
    "overloaded",
    "shutting-down",
    "internal",
)
LONGEST_NAME = "x" * NAME_BYTES

outcomes = st.tuples(
    st.sampled_from(["add", "add2", "send_mail", LONGEST_NAME]),
    st.none() | st.sampled_from(CODES),
    # Sums of quarters of seconds are exact, in any order.
    st.none() | st.integers(0, 2**40).map(lambda quarters: quarters / 4),
)


def new_memory() -> memoryview:
    return memoryview(bytearray(TALLY_BYTES))


def count(tally: Tally, name: str, code: str | None, seconds: float | None) -> None:
    """Count a call as whoever counts does: what is done has run."""
    if code is None:
        tally.done(label_of(name), seconds or 0.0)
    else:
        tally.failed(label_of(name), code, seconds)


class TallyTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.memory = new_memory()
        self.tally = Tally(self.memory)

    def functions(self) -> list[dict[str, Any]]:
        return functions_of([Tally(self.memory)])

    def names(self) -> list[str]:
        return [function["name"] for function in self.functions()]

    def test_fresh(self) -> None:
        """Where nothing was counted no function is shown."""
        self.assertEqual(self.functions(), [])

    def test_done(self) -> None:
        """Calls that are done are counted, with their seconds, by how long they ran."""
        for seconds in (0.0, 0.000_001, 0.000_003, 0.25, 0.5):
            self.tally.done(label_of("add"), seconds)
        self.assertEqual(
            self.functions(),
            [
                {
                    "name": "add",
                    "done": 5,
                    "failed": 0,
                    "errors": {},
                    "seconds": 0.750004,
                    "latency": {"1": 1, "2": 1, "4": 1, "262144": 1, "524288": 1},
                }
            ],
        )

    def test_failed(self) -> None:
        """Each code is counted by itself; only what has run has a latency."""
        for number, code in enumerate(CODES, 1):
            for _ in range(number):
                self.tally.failed(label_of("add"), code, None)
        self.tally.failed(label_of("add"), "task-failed", 0.25)
        (add,) = self.functions()
        self.assertEqual((add["done"], add["failed"]), (0, sum(range(1, 9)) + 1))
        expected = {code: number for number, code in enumerate(CODES, 1)}
        self.assertEqual(add["errors"], {**expected, "task-failed": 2})
        self.assertEqual((add["seconds"], add["latency"]), (0.25, {"262144": 1}))

    def test_the_slowest(self) -> None:
        """What takes longer than the last bucket's bound is in the last one, and nowhere else."""
        self.tally.done(label_of("add"), 1e9)
        self.tally.failed(label_of("add"), "time-limit", 1e9)
        (add,) = self.functions()
        self.assertEqual(add["latency"], {str(2**31): 2})
        self.assertEqual((add["done"], add["errors"]), (1, {"time-limit": 1}))

    def test_as_the_slot_counts(self) -> None:
        """A slot and a tally count under the same powers of two, whoever finds them out."""
        slot = new_slot()
        for seconds in (0.0, 0.000_001, 0.000_999, 0.25, 7.0, 2147.0, 2148.0, 1e9):
            self.tally.done(label_of("add"), seconds)
            self.tally.done(label_of("echo"), seconds, slot.leave(False, seconds))
        add, echo = self.functions()
        self.assertEqual(add["latency"], slot.latency())
        self.assertEqual(echo["latency"], slot.latency())

    def test_what_is_no_call_of_a_function(self) -> None:
        """What only callers can come to that ask for nothing known is not counted."""
        for code in ("unknown-function", "unauthorized", "malformed", "line-too-long", ""):
            self.tally.failed(label_of("add"), code, None)
        self.assertEqual(self.functions(), [])

    def test_the_daemons_own(self) -> None:
        """What the daemon tells about itself is counted nowhere."""
        for _ in range(2):
            self.tally.done(label_of("taskd.status"), 0.1)
            self.tally.failed(label_of("taskd.failures"), "task-failed", 0.1)
        self.assertEqual(bytes(self.memory), bytes(TALLY_BYTES))

    def test_sorted(self) -> None:
        """Functions are given by name, whatever came first; the longest name is whole."""
        names = ["send_mail", LONGEST_NAME, "add", "echo"]
        for name in names:
            self.tally.done(label_of(name), 0.1)
        self.assertEqual(self.names(), sorted(names))

    def test_a_successor(self) -> None:
        """Whoever takes the slot next goes on counting in the same rows."""
        self.tally.done(label_of("add"), 0.5)
        self.tally.failed(label_of("echo"), "cancelled", None)
        successor = Tally(self.memory)
        for name in ("echo", "add", "new"):
            successor.done(label_of(name), 0.25)
        self.assertEqual(
            [(f["name"], f["done"], f["failed"], f["seconds"]) for f in self.functions()],
            [("add", 2, 0, 0.75), ("echo", 1, 1, 0.25), ("new", 1, 0, 0.25)],
        )

    def test_a_name_that_is_not_whole(self) -> None:
        """A row whose name is being written is not shown; a kill then leaves it to the next."""
        self.tally.done(label_of("add"), 0.5)
        # The second row's name, of which half is there.
        second = 64 + 96 * 8
        self.memory[second : second + 4] = b"half"
        self.assertEqual(self.names(), ["add"])
        Tally(self.memory).done(label_of("echo"), 0.5)
        self.assertEqual(self.names(), ["add", "echo"])

    def test_a_reader_in_between(self) -> None:
        """Whenever one reads, a name is whole, and a call that is done is counted once or not."""
        seen: list[tuple[tuple[str, int, int], ...]] = []

        def look() -> None:
            in_use = self.memory.cast("Q")[0]
            labels = {bytes(self.memory[64 + n * 768 :][:NAME_BYTES]) for n in range(in_use)}
            self.assertLessEqual(labels, {label_of("add"), label_of("echo")})
            functions = self.functions()
            seen.append(
                tuple((f["name"], f["done"], sum(f["latency"].values())) for f in functions)
            )

        watched = Tally(WatchedMemory(self.memory, look))  # type: ignore[arg-type]
        for name in ("add", "echo", "add"):
            watched.done(label_of(name), 0.5)
        add, echo = ("add", 1, 1), ("echo", 1, 1)
        self.assertEqual(
            list(dict.fromkeys(seen)), [(), (add,), (add, echo), (("add", 2, 2), echo)]
        )

    def test_a_name_without_counts(self) -> None:
        """A row in which nothing was counted yet is not shown."""
        self.tally.failed(label_of("add"), "cancelled", None)
        self.memory[64 + NAME_BYTES :] = bytes(TALLY_BYTES - 64 - NAME_BYTES)
        self.assertEqual(self.functions(), [])

    def test_a_kill(self) -> None:
        """What a process has counted that is killed is there."""
        with mmap.mmap(-1, TALLY_BYTES) as shared, memoryview(shared) as memory:
            pid = os.fork()
            if pid == 0:
                Tally(memory[:]).done(label_of("add"), 0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            os.waitpid(pid, 0)
            functions = functions_of([Tally(memoryview(bytes(memory)))])
        self.assertEqual([(f["name"], f["done"]) for f in functions], [("add", 1)])

    def test_full(self) -> None:
        """Functions for which no row is left share one, which others' rows do not notice."""
        for number in range(ROWS + 3):
            for tally in (self.tally, Tally(self.memory)):
                tally.done(label_of(f"f{number:03}"), 0.25)
        functions = self.functions()
        self.assertEqual(
            [(f["name"], f["done"]) for f in functions],
            [*((f"f{number:03}", 2) for number in range(ROWS)), (REST, 6)],
        )
        self.assertEqual(functions[-1]["seconds"], 1.5)

    def test_full_to_the_last_row(self) -> None:
        """As long as each function has a row nothing is counted as the rest."""
        for number in range(ROWS):
            self.tally.done(label_of(f"f{number}"), 0.25)
        self.assertEqual(len(self.names()), ROWS)
        self.assertNotIn(REST, self.names())

    @examples
    @given(st.lists(outcomes), st.integers(0, 2))
    def test_sums(self, calls: list[tuple[str, str | None, float | None]], shift: int) -> None:
        """Whichever process counts a call, the sums over all of them are the same."""
        memories = [new_memory() for _ in range(3)]
        for number, call in enumerate(calls):
            # Each time by a new process in its slot.
            count(Tally(memories[(number + shift) % 3]), *call)
        functions = {f["name"]: f for f in functions_of(map(Tally, memories))}
        self.assertEqual(set(functions), {name for name, _, _ in calls})
        done = Counter(name for name, code, _ in calls if code is None)
        errors = Counter((name, code) for name, code, _ in calls if code is not None)
        for name, function in functions.items():
            self.assertEqual(function["done"], done[name])
            told = {code: errors[name, code] for code in CODES if errors[name, code]}
            self.assertEqual((function["errors"], function["failed"]), (told, sum(told.values())))
            ran = [s or 0.0 for n, c, s in calls if n == name and (c is None or s is not None)]
            self.assertEqual(function["seconds"], sum(ran))
            self.assertEqual(sum(function["latency"].values()), len(ran))
        self.assertEqual(json.loads(json.dumps(functions)), functions)
