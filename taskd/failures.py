"""
One process's recent failures: a ring of short records.

It lies in shared memory beside the process's slot on the scoreboard, is written by
that process alone, and read by all. A record is a JSON object in ASCII. Its first
byte is taken away before it is written over, and comes last, so a reader in between,
or after a kill, sees what is no JSON, and skips it.

What is worth a record is decided in ``ledger``.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["FAILURES_BYTES", "KEPT", "RECORD_BYTES", "Failures", "latest"]

KEPT: Final = 16
"""So many failures of one process, and of those before it in the same slot, are kept."""

RECORD_BYTES: Final = 512

_WORD: Final = 8
_HEADER_BYTES: Final = 64
_LONGEST_TYPE_BYTES: Final = 96

FAILURES_BYTES: Final = _HEADER_BYTES + KEPT * RECORD_BYTES


class Failures:
    """
    The recent failures that one process has seen, or those before it in the same slot.

    Made by ``Scoreboard.failures``. Only the process that has the slot may write.

    Args:
        memory: ``FAILURES_BYTES``, all of them zero at first. Nothing is touched
            before something is written or read.
    """

    __slots__ = ("_memory", "_noted")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._noted = memory[:_WORD].cast("Q")

    def note(
        self, at: float, worker: int, function: str, code: str, kind: str | None, message: str
    ) -> None:
        """
        Keep a failure, in the place of the oldest one.

        Args:
            at: When, in seconds since the epoch.
            worker: Which worker it was.
            function: What was called.
            code: What its caller was told.
            kind: The exception's class, or None.
            message: What its caller was told; the end of a long one is cut off.
        """
        record = {
            "at": round(at, 6),
            "function": function,
            "code": code,
            "type": kind if kind is None else _cut(kind, _LONGEST_TYPE_BYTES),
            "message": "",
            "worker": worker,
        }
        record["message"] = _cut(message, RECORD_BYTES - len(json.dumps(record)))
        text = json.dumps(record).encode().ljust(RECORD_BYTES, b"\0")
        place = self._place(self._noted[0] % KEPT)
        place[:1] = b"\0"
        place[1:] = text[1:]
        place[:1] = text[:1]
        self._noted[0] += 1

    def _place(self, number: int) -> memoryview:
        first = _HEADER_BYTES + number * RECORD_BYTES
        return self._memory[first : first + RECORD_BYTES]

    def read(self) -> list[dict[str, Any]]:
        """Give what is kept, the newest first."""
        noted = self._noted[0]
        records = []
        for number in range(noted - 1, max(-1, noted - 1 - KEPT), -1):
            try:
                records.append(json.loads(bytes(self._place(number % KEPT)).rstrip(b"\0")))
            except ValueError:  # it is being written
                continue
        return records


def _cut(text: str, room: int) -> str:
    """Give as much of a text, from its beginning, as has room as JSON in ASCII."""
    text = text[:room].encode(errors="replace").decode()  # no halves of surrogate pairs
    longest = bisect_right(range(len(text) + 1), room, key=lambda n: len(json.dumps(text[:n])) - 2)
    return text[: longest - 1]


def latest(rings: Iterable[Failures], limit: int) -> list[dict[str, Any]]:
    """
    Give the latest failures, the newest first, as plain JSON types.

    Args:
        rings: Of all the processes.
        limit: How many at most.
    """
    # The sort is stable, so a process's own stay in order within one moment.
    records = [record for ring in rings for record in ring.read()]
    return sorted(records, key=lambda record: record["at"], reverse=True)[:limit]
