"""
The scoreboard: one page of shared memory in which every worker shows what it does.

A slot for each worker, so that status and "is anyone idle?" cost no message. Slot 0
belongs to the supervisor; the workers count from 1. There are more slots than
workers in a whole pool, for those that are being replaced.

What the numbers are used for is decided elsewhere.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from typing import Any, Final

from taskd.failures import FAILURES_BYTES, Failures, latest
from taskd.slots import (
    BORN,
    BUCKETS,
    CONNECTIONS,
    FAILED,
    FAILURE,
    LATENCY,
    NAME,
    ON_THREADS,
    SLOT_WORDS,
    STATE,
    WAITING,
    WORD,
    Slot,
    SupervisorSlot,
)
from taskd.states import State
from taskd.tally import TALLY_BYTES, Tally, functions_of

__all__ = ["SPARE_SLOTS", "Scoreboard"]

SPARE_SLOTS: Final = 3
"""For each worker of a whole pool there are so many slots more."""

_SLOT_BYTES: Final = SLOT_WORDS * WORD
_PAGE_BYTES: Final = 4096
_BOOKS_BYTES: Final = -(-(TALLY_BYTES + FAILURES_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
"""A slot's tally and failures, in pages of their own: what is not touched costs nothing."""

_STATES: Final = ("starting", "idle", "busy", "draining")


class Scoreboard:
    """
    All slots.

    Args:
        fd: A file descriptor from ``create``. It may be closed afterwards.

    Attributes:
        slots: How many there are for workers; they count from 1.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0, mmap.MAP_SHARED)
        everything = memoryview(self._memory)
        count = len(everything) // (_BOOKS_BYTES + _SLOT_BYTES)
        self.slots = count - 1
        self._books = everything[: count * _BOOKS_BYTES]
        self._bytes = everything[count * _BOOKS_BYTES :]
        self._words = self._bytes.cast("Q")
        self._seconds: Any = self._bytes.cast("d")
        # The same word of every slot, to be read at one go.
        self._states = self._words[STATE::SLOT_WORDS]
        self._on_threads = self._words[ON_THREADS::SLOT_WORDS]
        self._open = self._words[CONNECTIONS::SLOT_WORDS]
        self._failed = self._words[FAILED::SLOT_WORDS]
        self._born = self._seconds[BORN::SLOT_WORDS]

    @classmethod
    def create(cls, procs: int) -> int:
        """
        Make the shared memory.

        Args:
            procs: How many workers a whole pool has, from 1.

        Returns:
            A file descriptor, which a child can inherit.
        """
        fd = os.memfd_create("taskd-scoreboard")
        os.ftruncate(fd, (1 + procs * (1 + SPARE_SLOTS)) * (_BOOKS_BYTES + _SLOT_BYTES))
        return fd

    def slot(self, number: int) -> Slot:
        """
        Give one worker's slot to write on.

        Args:
            number: 1 to ``slots``.
        """
        return Slot(number, *self._parts(number, NAME))

    def supervisor_slot(self) -> SupervisorSlot:
        """Give the supervisor's slot to write on."""
        return SupervisorSlot(0, *self._parts(0, FAILURE))

    def tally(self, number: int) -> Tally:
        """Give the tally of a slot; 0 is the supervisor's."""
        first = number * _BOOKS_BYTES
        return Tally(self._books[first : first + TALLY_BYTES])

    def failures(self, number: int) -> Failures:
        """Give the recent failures of a slot; 0 is the supervisor's."""
        first = number * _BOOKS_BYTES + TALLY_BYTES
        return Failures(self._books[first : first + FAILURES_BYTES])

    def latest_failures(self, limit: int) -> list[dict[str, Any]]:
        """
        Give the latest failures that any process has seen, the newest first.

        Args:
            limit: How many at most, from 0.
        """
        return latest(map(self.failures, self._used()), limit)

    def _used(self) -> list[int]:
        """Give the slots that have ever had a process: the others' pages are left alone."""
        return [number for number, born in enumerate(self._born.tolist()) if born]

    def _parts(self, number: int, text: int) -> tuple[memoryview, Any, memoryview]:
        """Give a slot's words, the same as seconds, and its text, which begins at a word."""
        first, last = number * SLOT_WORDS, (number + 1) * SLOT_WORDS
        return (
            self._words[first:last],
            self._seconds[first:last],
            self._bytes[(first + text) * WORD : last * WORD],
        )

    @property
    def waiting(self) -> int:
        """Tell how many tasks wait in the supervisor's queue."""
        return self._words[WAITING]

    def idle_threads(self, threads: int) -> int:
        """
        Tell how many blocking tasks the workers could start now.

        Args:
            threads: How many each can run at a time, from 1.
        """
        free = 0
        for state, taken in zip(
            self._states.tolist()[1:], self._on_threads.tolist()[1:], strict=True
        ):
            if state == State.READY and taken < threads:
                free += threads - taken
        return free

    def occupied(self) -> memoryview:
        """Give how many blocking calls each worker has, by slot number, as it changes."""
        return self._on_threads

    def connections(self) -> list[int]:
        """Give how many connections each worker holds, by slot number."""
        return self._open.tolist()

    def figures(self) -> dict[str, int]:
        """
        Tell in short what all workers do, which is quicker to tell than ``status``.

        Returns:
            How many workers are in each state (``starting``, ``idle``, ``busy``,
            ``draining``), and how many tasks are ``waiting``, ``done`` and ``failed``.
        """
        figures = dict.fromkeys(_STATES, 0)
        for number, state in enumerate(self._states.tolist()[1:], 1):
            if state:
                figures[self.slot(number).state_name] += 1
        failed = sum(self._failed.tolist()[1:])
        words = self._words
        ended = sum(
            sum(words[first : first + BUCKETS].tolist())
            for first in range(SLOT_WORDS + LATENCY, len(words), SLOT_WORDS)
        )
        return {
            **figures,
            "waiting": self.waiting,
            "done": ended - failed,
            "failed": failed,
        }

    def status(self, now: float) -> dict[str, Any]:
        """
        Tell what all processes do, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.

        Returns:
            ``supervisor``, ``queue``, ``workers`` (one object for each that has a
            process), ``totals`` and ``functions``.
        """
        slots = [self.slot(number) for number in range(1, self.slots + 1)]
        counted = [slot.status(now) for slot in slots]
        workers = [worker for worker in counted if worker["pid"] is not None]
        totals: dict[str, Any] = {
            # What those counted that are no more is counted as well.
            name: sum(worker[name] for worker in counted)
            for name in ("in_flight", "connections", "accepted", "done", "failed")
        }
        callers: Counter[str] = Counter()
        for worker in workers:
            callers.update(worker["callers"])
        totals["callers"] = dict(callers)
        totals["workers"] = {
            state: sum(worker["state"] == state for worker in workers) for state in _STATES
        }
        supervisor, queue, restarts = self.supervisor_slot().summary(now)
        totals["restarts"] = restarts
        return {
            "supervisor": supervisor,
            "queue": queue,
            "workers": workers,
            "totals": totals,
            "functions": functions_of(map(self.tally, self._used())),
        }
