"""
The scoreboard: one page of shared memory in which every worker shows what it does.

A fixed slot for each worker, written by that worker alone and read by all, so
that status and "is anyone idle?" cost no message. Every field is one aligned
machine word, so a reader never sees half of a value; two fields may be a moment
apart. Slot 0 belongs to the supervisor; the workers count from 1.

What the numbers are used for is decided elsewhere.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from typing import Any, Final

__all__ = ["NAME_BYTES", "Scoreboard", "Slot", "State"]

_WORD: Final = 8
_SLOT_WORDS: Final = 64
_SLOT_BYTES: Final = _SLOT_WORDS * _WORD

# Words of a slot. Times are CLOCK_MONOTONIC, which all processes share.
_PID: Final = 0
_STATE: Final = 1
_BORN: Final = 2
_BEGAN: Final = 3
_IN_FLIGHT: Final = 4
_CONNECTIONS: Final = 5
_ACCEPTED: Final = 6
_DONE: Final = 7
_FAILED: Final = 8
_RESTARTS: Final = 9
_LATENCY: Final = 16
_BUCKETS: Final = 32
_SLOWEST: Final = _LATENCY + _BUCKETS - 1
_NAME: Final = 48
NAME_BYTES: Final = (_SLOT_WORDS - _NAME) * _WORD
"""Room for a task's name: as many characters as a name may have."""


class State(IntEnum):
    """What a slot's process is; whether it is idle or busy shows in what it runs."""

    DEAD = 0
    """No process has this slot now."""
    STARTING = 1
    """Forked, not yet accepting."""
    READY = 2
    """Accepting."""
    DRAINING = 3
    """Finishing what it has; it accepts nothing more."""


_STATES: Final = ("dead", "starting", "idle", "busy", "draining")


class Scoreboard:
    """
    All slots.

    Args:
        fd: A file descriptor from ``create``. It may be closed afterwards.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0, mmap.MAP_SHARED)
        self._bytes = memoryview(self._memory)
        self._words = self._bytes.cast("Q")
        self._seconds: Any = self._bytes.cast("d")
        self.procs = len(self._bytes) // _SLOT_BYTES - 1

    @classmethod
    def create(cls, procs: int) -> int:
        """
        Make the shared memory.

        Args:
            procs: How many workers it shall have slots for, from 1.

        Returns:
            A file descriptor, which a child can inherit.
        """
        fd = os.memfd_create("taskd-scoreboard")
        os.ftruncate(fd, (procs + 1) * _SLOT_BYTES)
        return fd

    def slot(self, number: int) -> Slot:
        """
        Give one slot to write on.

        Args:
            number: 0 for the supervisor's, 1 to ``procs`` for a worker's.
        """
        first, last = number * _SLOT_WORDS, (number + 1) * _SLOT_WORDS
        return Slot(
            number,
            self._words[first:last],
            self._seconds[first:last],
            self._bytes[first * _WORD + _NAME * _WORD : last * _WORD],
        )

    def status(self, now: float) -> dict[str, Any]:
        """
        Tell what all processes do, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.

        Returns:
            ``supervisor``, ``workers`` (one object a slot) and ``totals``.
        """
        workers = [self.slot(number).status(now) for number in range(1, self.procs + 1)]
        totals: dict[str, Any] = {
            name: sum(worker[name] for worker in workers)
            for name in ("in_flight", "connections", "accepted", "done", "failed", "restarts")
        }
        totals["workers"] = {
            state: sum(worker["state"] == state for worker in workers) for state in _STATES
        }
        supervisor = self.slot(0).status(now)
        return {
            "supervisor": {"pid": supervisor["pid"], "uptime": supervisor["uptime"]},
            "workers": workers,
            "totals": totals,
        }


class Slot:
    """
    One process's part of the scoreboard.

    Made by ``Scoreboard.slot``. Only the process that the slot stands for may
    write on it, or the supervisor while there is none.

    Attributes:
        number: Its place, from 1 for workers.
    """

    __slots__ = (
        "_current",
        "_in_flight",
        "_label",
        "_name",
        "_seconds",
        "_title",
        "_words",
        "number",
    )

    def __init__(self, number: int, words: memoryview, seconds: Any, name: memoryview) -> None:
        self.number = number
        self._words = words
        self._seconds = seconds
        self._name = name
        self._in_flight = 0
        self._label = b""
        self._current = (b"", 0.0)
        self._title = memoryview(bytearray(0))

    def open(self, pid: int, now: float) -> None:
        """Take the slot for a new process; what its predecessor counted is kept."""
        words = self._words
        words[_IN_FLIGHT] = words[_CONNECTIONS] = 0
        words[_PID] = pid
        words[_STATE] = State.STARTING
        self._seconds[_BORN] = now
        self._seconds[_BEGAN] = 0.0

    def close(self) -> None:
        """Mark the slot as without a process."""
        words = self._words
        words[_STATE] = State.DEAD
        words[_IN_FLIGHT] = words[_CONNECTIONS] = words[_PID] = 0
        self._seconds[_BEGAN] = 0.0

    def count_restart(self) -> None:
        """Count that the slot's process has to be replaced."""
        self._words[_RESTARTS] += 1

    def show_on(self, title: memoryview) -> None:
        """Show the name of the running task also here, for ``ps``."""
        self._title = title
        self._write_title(b"idle)")

    def _write_title(self, text: bytes) -> None:
        width = len(self._title)
        self._title[:] = text[:width].ljust(width, b"\0")

    @property
    def state(self) -> State:
        """Tell what the slot's process is."""
        return State(self._words[_STATE])

    @property
    def is_working(self) -> bool:
        """Tell whether at least one task runs."""
        return bool(self._words[_IN_FLIGHT] or self._seconds[_BEGAN])

    def ready(self) -> None:
        """Show that the worker accepts."""
        self._words[_STATE] = State.READY

    def drain(self) -> None:
        """Show that the worker accepts nothing more."""
        self._words[_STATE] = State.DRAINING
        self._write_title(b"draining)")

    def enter(self, label: bytes, now: float) -> None:
        """
        Show which task runs from now on.

        Args:
            label: The function's name, ``NAME_BYTES`` long with NULs behind it.
            now: CLOCK_MONOTONIC seconds.
        """
        if label is not self._label:
            self._label = label
            self._name[:] = label
        self._seconds[_BEGAN] = now

    def leave(self, failed: bool, seconds: float) -> None:
        """
        Count a task that has ended.

        Args:
            failed: True if its caller got an error.
            seconds: How long it took.
        """
        words = self._words
        words[_FAILED if failed else _DONE] += 1
        bucket = int(seconds * 1e6).bit_length()
        words[_LATENCY + bucket if bucket < _BUCKETS else _SLOWEST] += 1
        self.show_the_rest()

    def show_the_rest(self) -> None:
        """Show what runs besides the call that is being answered, or nothing."""
        if self._in_flight:
            self.enter(*self._current)
        else:
            self._seconds[_BEGAN] = 0.0

    def run(self, label: bytes, now: float) -> None:
        """Show which of the tasks that ``begin`` took on runs; then as ``enter``."""
        self._current = (label, now)
        self.enter(label, now)

    def begin(self, label: bytes, now: float) -> None:
        """Show that a task was taken on which will not end at once; then as ``enter``."""
        self._in_flight += 1
        self._words[_IN_FLIGHT] = self._in_flight
        if self._in_flight == 1:
            self.run(label, now)
            if self._title:
                self._write_title(label.rstrip(b"\0") + b")")

    def end(self, failed: bool, seconds: float) -> None:
        """Show that what ``begin`` showed has ended; then as ``leave``."""
        self._in_flight -= 1
        self._words[_IN_FLIGHT] = self._in_flight
        self.leave(failed, seconds)
        if not self._in_flight and self._title:
            self._write_title(b"idle)" if self._words[_STATE] == State.READY else b"draining)")

    def connected(self, open_connections: int) -> None:
        """Show that a connection came, and how many there are now."""
        self._words[_ACCEPTED] += 1
        self._words[_CONNECTIONS] = open_connections

    def disconnected(self, open_connections: int) -> None:
        """Show that a connection went, and how many there are now."""
        self._words[_CONNECTIONS] = open_connections

    def status(self, now: float) -> dict[str, Any]:
        """
        Tell what the slot shows, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.
        """
        words, began, state = self._words, self._seconds[_BEGAN], self.state
        name = state.name.lower()
        if state is State.READY:
            name = "busy" if self.is_working else "idle"
        return {
            "worker": self.number,
            "pid": words[_PID] or None,
            "state": name,
            "task": bytes(self._name).rstrip(b"\0").decode() if began else None,
            "task_seconds": round(now - began, 6) if began else None,
            "uptime": round(now - self._seconds[_BORN], 3) if state else 0.0,
            "in_flight": words[_IN_FLIGHT],
            "connections": words[_CONNECTIONS],
            "accepted": words[_ACCEPTED],
            "done": words[_DONE],
            "failed": words[_FAILED],
            "restarts": words[_RESTARTS],
            "latency": self.latency(),
        }

    def latency(self) -> dict[str, int]:
        """
        Tell how many tasks took how long.

        Returns:
            Counts by upper bound in microseconds (a power of two), empty ones left out.
        """
        counts = self._words[_LATENCY : _LATENCY + _BUCKETS]
        return {str(2**power): count for power, count in enumerate(counts) if count}
