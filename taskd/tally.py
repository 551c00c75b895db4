"""
One process's tally: what became of the calls of each function, and how long they ran.

It lies in shared memory beside the process's slot on the scoreboard, is written by
that process alone, and read by all. Each function has a row. A count is one aligned
word, so a reader never sees half of one; a row is shown once its name is whole.

Whoever takes the slot next finds the rows by their names and goes on with them, so
what was counted outlives every process, however it ended. The memory costs nothing
until it is touched: a reader leaves alone what belongs to a slot that nobody has had.

Which calls are counted, and by whom, is ``ledger``'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import add
from typing import Any, Final

from taskd.errors import (
    BadArguments,
    Cancelled,
    InternalError,
    Overloaded,
    ShuttingDown,
    TaskFailed,
    TimeLimitExceeded,
    WorkerLost,
)

__all__ = ["REST", "ROWS", "TALLY_BYTES", "Tally", "functions_of"]

ROWS: Final = 64
"""So many functions have a row of their own; the others share one more."""

REST: Final = "…"
"""The name of the row of those that share one."""

_OWN: Final = b"taskd."
"""What the daemon tells about itself is no work, and not counted."""

_CODES: Final = tuple(
    kind.code
    for kind in (
        TaskFailed,
        TimeLimitExceeded,
        Cancelled,
        BadArguments,
        WorkerLost,
        Overloaded,
        ShuttingDown,
        InternalError,
    )
)
"""What a call of a function that is known can come to, besides being done."""

_WORD: Final = 8
_ROWS_IN_USE: Final = 0
_HEADER_WORDS: Final = 8

# Words of a row. A call that is done is one count in one word: never half of it is seen.
_NAME_BYTES: Final = 128
_DONE: Final = _NAME_BYTES // _WORD
_BUCKETS: Final = 32
_NOT_DONE: Final = _DONE + _BUCKETS
_ERRORS: Final = _NOT_DONE + _BUCKETS
_SECONDS: Final = _ERRORS + len(_CODES)
_ROW_WORDS: Final = 96

_SLOWEST_DONE: Final = _NOT_DONE - 1
_SLOWEST_NOT_DONE: Final = _ERRORS - 1
_PLACES: Final = {code: place for place, code in enumerate(_CODES, _ERRORS)}

TALLY_BYTES: Final = (_HEADER_WORDS + (ROWS + 1) * _ROW_WORDS) * _WORD

_Row = tuple[memoryview, Any]
"""A row's words, and the same as seconds."""


class Tally:
    """
    The counts of one process, and of those before it in the same slot.

    Made by ``Scoreboard.tally``. Only the process that has the slot may count.

    Args:
        memory: ``TALLY_BYTES``, all of them zero at first. Nothing is touched
            before something is counted or read.
    """

    __slots__ = ("_memory", "_rows", "_seconds", "_words")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory.cast("Q")
        self._seconds: Any = memory.cast("d")
        self._rows: dict[bytes, _Row] = {}

    def done(self, label: bytes, seconds: float, power: int | None = None) -> None:
        """
        Count a call that has succeeded.

        Args:
            label: The function's name, 128 bytes long with NULs behind it.
            seconds: How long it ran.
            power: As ``Slot.leave`` gives it; None: find it out.
        """
        try:
            words, sums = self._rows[label]
        except KeyError:
            words, sums = self._find_row(label)
        if power is None:
            power = int(seconds * 1e6).bit_length()
        words[_DONE + power if power < _BUCKETS else _SLOWEST_DONE] += 1
        sums[_SECONDS] += seconds

    def failed(self, label: bytes, code: str, seconds: float | None) -> None:
        """
        Count a call that has failed.

        Args:
            label: As for ``done``.
            code: What its caller was told; without effect if a function that is
                known cannot come to that.
            seconds: How long it ran, or None if it did not.
        """
        place = _PLACES.get(code)
        if place is None:
            return
        words, sums = self._rows.get(label) or self._find_row(label)
        words[place] += 1
        if seconds is not None:
            power = int(seconds * 1e6).bit_length()
            words[_NOT_DONE + power if power < _BUCKETS else _SLOWEST_NOT_DONE] += 1
            sums[_SECONDS] += seconds

    def _find_row(self, label: bytes) -> _Row:
        """Find a function's row, of an earlier process perhaps, or take one; and keep it."""
        if label.startswith(_OWN):
            aside = memoryview(bytearray(_ROW_WORDS * _WORD))  # a row that nobody reads
            row: _Row = (aside.cast("Q"), aside.cast("d"))
        else:
            in_use = self._words[_ROWS_IN_USE]
            number = next((n for n in range(in_use) if self._name(n) == label), in_use)
            if number == in_use < ROWS:
                self._name(number)[:] = label
                # Last of all, so that nobody reads half a name, and none stays behind a kill.
                self._words[_ROWS_IN_USE] = in_use + 1
            row = self._row(number)
        self._rows[label] = row
        return row

    def _name(self, number: int) -> memoryview:
        first = (_HEADER_WORDS + number * _ROW_WORDS) * _WORD
        return self._memory[first : first + _NAME_BYTES]

    def _row(self, number: int) -> _Row:
        first = _HEADER_WORDS + number * _ROW_WORDS
        return self._words[first : first + _ROW_WORDS], self._seconds[first : first + _ROW_WORDS]

    def rows(self) -> Iterator[tuple[str, list[int], float]]:
        """Give each function that was counted: its name, its words from ``_DONE``, its seconds."""
        in_use = self._words[_ROWS_IN_USE]
        for number in range(in_use + (in_use == ROWS)):
            words, sums = self._row(number)
            counts = words[_DONE:_SECONDS].tolist()
            if any(counts):
                name = bytes(self._name(number)).rstrip(b"\0").decode() if number < ROWS else REST
                yield name, counts, sums[_SECONDS]


def functions_of(tallies: Iterable[Tally]) -> list[dict[str, Any]]:
    """
    Sum up what became of the calls of each function, as plain JSON types.

    Args:
        tallies: Of all the processes.

    Returns:
        By name: ``name``, ``done``, ``failed``, ``errors`` (by code), ``seconds``
        and ``latency`` (counts of those that ran, by upper bound in microseconds,
        a power of two); counts of 0 are left out.
    """
    counted: dict[str, list[int]] = {}
    ran: dict[str, float] = {}
    for tally in tallies:
        for name, counts, seconds in tally.rows():
            before = counted.get(name)
            if before is not None:
                counts = list(map(add, before, counts))
            counted[name] = counts
            ran[name] = ran.get(name, 0.0) + seconds
    return [_function(name, counted[name], ran[name]) for name in sorted(counted)]


def _function(name: str, counts: list[int], seconds: float) -> dict[str, Any]:
    done, not_done = counts[:_BUCKETS], counts[_BUCKETS : 2 * _BUCKETS]
    errors = counts[2 * _BUCKETS :]
    return {
        "name": name,
        "done": sum(done),
        "failed": sum(errors),
        "errors": {code: count for code, count in zip(_CODES, errors, strict=True) if count},
        "seconds": round(seconds, 6),
        "latency": {
            str(2**power): a + b
            for power, (a, b) in enumerate(zip(done, not_done, strict=True))
            if a + b
        },
    }
