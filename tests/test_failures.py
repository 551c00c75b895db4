"""One process's recent failures: a ring of records, which outlives the process."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.failures import FAILURES_BYTES, KEPT, RECORD_BYTES, Failures, latest
from tests.support import WatchedMemory

examples = settings(max_examples=100, deadline=None)


class FailuresTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.memory = memoryview(bytearray(FAILURES_BYTES))
        self.failures = Failures(self.memory)

    def note(self, at: float, message: str = "no", kind: str | None = "ValueError") -> None:
        self.failures.note(at, 7, "add", "task-failed", kind, message)

    def records(self, limit: int = 50) -> list[dict[str, Any]]:
        return latest([Failures(self.memory)], limit)

    def times(self, limit: int = 50) -> list[float]:
        return [record["at"] for record in self.records(limit)]

    def test_fresh(self) -> None:
        """Where nothing has failed nothing is listed."""
        self.assertEqual(self.records(), [])

    def test_one(self) -> None:
        """A failure is listed with all that was said of it."""
        self.note(1_700_000_000.1234564, 'über "alles"\n', None)
        expected = {
            "at": 1_700_000_000.123456,
            "function": "add",
            "code": "task-failed",
            "type": None,
            "message": 'über "alles"\n',
            "worker": 7,
        }
        self.assertEqual(self.records(), [expected])

    def test_the_newest_first(self) -> None:
        """The latest failures of all processes come first, as many as are asked for."""
        others = Failures(memoryview(bytearray(FAILURES_BYTES)))
        for at in (3.0, 1.0, 5.0):
            self.note(at)
        for at in (4.0, 2.0):
            others.note(at, 0, "add", "worker-lost", None, "dead")
        told = latest([self.failures, others], 50)
        self.assertEqual([record["at"] for record in told], [5.0, 4.0, 3.0, 2.0, 1.0])
        self.assertEqual(latest([self.failures, others], 2), told[:2])
        self.assertEqual(latest([self.failures, others], 0), [])

    def test_at_one_moment(self) -> None:
        """Of what one process has seen at the same time the later comes first."""
        for number in range(KEPT + 3):
            self.note(1.0, f"{number}")
        told = [record["message"] for record in self.records()]
        self.assertEqual(told, [f"{number}" for number in reversed(range(3, KEPT + 3))])

    def test_a_full_ring(self) -> None:
        """The oldest ones make room, for a successor's too."""
        for at in range(KEPT + 3):
            self.note(float(at))
        self.assertEqual(self.times(), [float(at) for at in reversed(range(3, KEPT + 3))])
        self.failures = Failures(self.memory)
        self.note(100.0)
        self.assertEqual(self.times()[:2], [100.0, KEPT + 2.0])
        self.assertEqual(len(self.times()), KEPT)

    def test_half_a_record(self) -> None:
        """A record that is being written is skipped."""
        for at in (1.0, 2.0):
            self.note(at)
        first = FAILURES_BYTES - KEPT * RECORD_BYTES
        half = bytes(self.memory[first : first + 20])
        for torn in (b"\0" + half[1:], half):
            self.memory[first : first + RECORD_BYTES] = torn.ljust(RECORD_BYTES, b"\0")
            self.assertEqual(self.times(), [2.0])

    def test_a_reader_in_between(self) -> None:
        """Whenever one reads, each record is whole: the one that goes, the new one, or neither."""
        for at in range(KEPT):
            self.note(float(at), "an old message", "OldError")
        seen: set[tuple[int, float, str, str]] = set()

        def look() -> None:
            records = self.records()
            newest, oldest = records[0], records[-1]
            for record in (newest, oldest):
                seen.add((len(records), record["at"], record["type"], record["message"]))

        self.failures = Failures(WatchedMemory(self.memory, look))  # type: ignore[arg-type]
        self.note(100.0, "a new one", "NewError")
        self.assertEqual(
            seen,
            {
                (KEPT - 1, KEPT - 1.0, "OldError", "an old message"),
                (KEPT - 1, 1.0, "OldError", "an old message"),
                (KEPT, 100.0, "NewError", "a new one"),
                (KEPT, 1.0, "OldError", "an old message"),
            },
        )

    def test_a_kill(self) -> None:
        """A kill while a record is written costs no other but the one it takes the place of."""
        for at in range(KEPT):
            self.note(float(at))
        first = FAILURES_BYTES - KEPT * RECORD_BYTES
        self.memory[first : first + 1] = b"\0"
        self.failures = Failures(self.memory)
        self.note(100.0)
        self.assertEqual(self.times(), [100.0, *(float(at) for at in reversed(range(1, KEPT)))])

    def test_long_texts(self) -> None:
        """A message is cut where the record ends, and a class's name before it pushes that out."""
        self.note(1.0, "m" * 9000, "K" * 9000)
        (record,) = self.records()
        self.assertEqual(set(record["type"]), {"K"})
        self.assertGreater(len(record["message"]), 100)
        self.assertEqual(len(json.dumps(record)), RECORD_BYTES)

    @examples
    @given(st.text(max_size=700), st.text(max_size=200), st.integers(1, 128))
    def test_any_texts(self, message: str, kind: str, length: int) -> None:
        """Whatever the texts, the record is whole, and tells as much of each as there is room."""
        name = "f" * length
        failures = Failures(memoryview(bytearray(FAILURES_BYTES)))
        failures.note(1.0, 7, name, "task-failed", kind, message)
        (record,) = latest([failures], 50)
        self.assertEqual(record["function"], name)
        self.assertLessEqual(len(json.dumps(record)), RECORD_BYTES)
        for told, meant in ((record["message"], message), (record["type"], kind)):
            self.assertTrue(meant.encode(errors="replace").decode().startswith(told))
        # No more than one character would have fitted that is not there.
        if len(json.dumps(record)) <= RECORD_BYTES - len(r"\ud83d\ude00"):
            self.assertEqual(record["message"], message.encode(errors="replace").decode())

    def test_half_a_character(self) -> None:
        """Half of a surrogate pair, which JSON's readers would refuse, is replaced."""
        self.note(1.0, "a\udc80b")
        self.assertEqual(self.records()[0]["message"], "a?b")
