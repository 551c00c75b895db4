"""
The scoreboard: one page of shared memory in which every worker shows what it does.

A slot for each worker, written by that worker alone and read by all, so that
status and "is anyone idle?" cost no message. Every field is one aligned machine
word, so a reader never sees half of a value; two fields may be a moment apart.
Slot 0 belongs to the supervisor; the workers count from 1. There are more slots
than workers in a whole pool, for those that are being replaced.

What the numbers are used for is decided elsewhere.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, Final

from taskd.states import Cause, State

__all__ = ["NAME_BYTES", "SPARE_SLOTS", "Scoreboard", "Slot", "SupervisorSlot"]

SPARE_SLOTS: Final = 3
"""For each worker of a whole pool there are so many slots more."""

_WORD: Final = 8
_SLOT_WORDS: Final = 64
_SLOT_BYTES: Final = _SLOT_WORDS * _WORD

# Words of a slot. Times are CLOCK_MONOTONIC, which all processes share.
_PID: Final = 0
_STATE: Final = 1
_BORN: Final = 2
_BEGAN: Final = 3
_ON_REACTOR: Final = 4
_CONNECTIONS: Final = 5
_ACCEPTED: Final = 6
_DONE: Final = 7
_FAILED: Final = 8
_ON_THREADS: Final = 10
_BEAT: Final = 11
_DUE: Final = 12
_LATENCY: Final = 16
_BUCKETS: Final = 32
_SLOWEST: Final = _LATENCY + _BUCKETS - 1
_NAME: Final = 48
NAME_BYTES: Final = (_SLOT_WORDS - _NAME) * _WORD
"""Room for a task's name: as many characters as a name may have."""

# Words of slot 0 alone, where a worker has its latencies.
_WAITING: Final = 16
_OLDEST: Final = 17
_HANDED_OVER: Final = 18
_REFUSED: Final = 19
_EXPIRED: Final = 20
_RELOADED: Final = 21
_CAUSES: Final = 24
_FAILURE: Final = 32
_FAILURE_BYTES: Final = (_SLOT_WORDS - _FAILURE) * _WORD


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
        self._bytes = memoryview(self._memory)
        self._words = self._bytes.cast("Q")
        self._seconds: Any = self._bytes.cast("d")
        self.slots = len(self._bytes) // _SLOT_BYTES - 1
        # The same word of every slot, to be read at one go.
        self._states = self._words[_STATE::_SLOT_WORDS]
        self._on_threads = self._words[_ON_THREADS::_SLOT_WORDS]
        self._open = self._words[_CONNECTIONS::_SLOT_WORDS]

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
        os.ftruncate(fd, (1 + procs * (1 + SPARE_SLOTS)) * _SLOT_BYTES)
        return fd

    def slot(self, number: int) -> Slot:
        """
        Give one worker's slot to write on.

        Args:
            number: 1 to ``slots``.
        """
        return Slot(number, *self._parts(number, _NAME))

    def supervisor_slot(self) -> SupervisorSlot:
        """Give the supervisor's slot to write on."""
        return SupervisorSlot(0, *self._parts(0, _FAILURE))

    def _parts(self, number: int, text: int) -> tuple[memoryview, Any, memoryview]:
        """Give a slot's words, the same as seconds, and its text, which begins at a word."""
        first, last = number * _SLOT_WORDS, (number + 1) * _SLOT_WORDS
        return (
            self._words[first:last],
            self._seconds[first:last],
            self._bytes[(first + text) * _WORD : last * _WORD],
        )

    @property
    def waiting(self) -> int:
        """Tell how many tasks wait in the supervisor's queue."""
        return self._words[_WAITING]

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

    def occupied(self) -> list[int]:
        """Give how many blocking calls each worker has, by slot number."""
        return self._on_threads.tolist()

    def connections(self) -> list[int]:
        """Give how many connections each worker holds, by slot number."""
        return self._open.tolist()

    def status(self, now: float) -> dict[str, Any]:
        """
        Tell what all processes do, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.

        Returns:
            ``supervisor``, ``queue``, ``workers`` (one object for each that has a
            process) and ``totals``.
        """
        slots = [self.slot(number) for number in range(1, self.slots + 1)]
        counted = [slot.status(now) for slot in slots]
        workers = [worker for worker in counted if worker["pid"] is not None]
        totals: dict[str, Any] = {
            # What those counted that are no more is counted as well.
            name: sum(worker[name] for worker in counted)
            for name in ("in_flight", "connections", "accepted", "done", "failed")
        }
        totals["workers"] = {
            state: sum(worker["state"] == state for worker in workers) for state in _STATES
        }
        supervisor, queue, restarts = self.supervisor_slot().summary(now)
        totals["restarts"] = restarts
        return {"supervisor": supervisor, "queue": queue, "workers": workers, "totals": totals}


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
        "_label",
        "_name",
        "_on_reactor",
        "_on_threads",
        "_seconds",
        "_title",
        "_titled",
        "_words",
        "number",
    )

    def __init__(self, number: int, words: memoryview, seconds: Any, name: memoryview) -> None:
        self.number = number
        self._words = words
        self._seconds = seconds
        self._name = name
        self._on_reactor = 0
        self._on_threads = 0
        self._label = b""
        self._current = (b"", 0.0)
        self._title = memoryview(bytearray(0))
        self._titled = b""

    def open(self, pid: int, now: float) -> None:
        """Take the slot for a new process; what its predecessor counted is kept."""
        words = self._words
        words[_ON_REACTOR] = words[_ON_THREADS] = words[_CONNECTIONS] = 0
        words[_PID] = pid
        words[_STATE] = State.STARTING
        self._seconds[_BORN] = self._seconds[_BEAT] = now
        self._seconds[_BEGAN] = self._seconds[_DUE] = 0.0

    def close(self) -> None:
        """Mark the slot as without a process."""
        words = self._words
        words[_STATE] = State.DEAD
        words[_ON_REACTOR] = words[_ON_THREADS] = words[_CONNECTIONS] = words[_PID] = 0
        self._seconds[_BEGAN] = self._seconds[_DUE] = 0.0

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
        words = self._words
        return bool(words[_ON_THREADS] or words[_ON_REACTOR] or self._seconds[_BEGAN])

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
        if self._on_threads or self._on_reactor:
            self.enter(*self._current)
        else:
            self._seconds[_BEGAN] = 0.0

    def run(self, label: bytes, now: float) -> None:
        """Show which of the tasks that were taken on runs; then as ``enter``."""
        self._current = (label, now)
        self.enter(label, now)
        if label is not self._titled and self._title:
            self._titled = label
            self._write_title(label.rstrip(b"\0") + b")")

    def begin(self, label: bytes, now: float) -> None:
        """Show that a task runs on the reactor which will not end at once; then as ``enter``."""
        self._on_reactor += 1
        self._words[_ON_REACTOR] = self._on_reactor
        if self._on_reactor + self._on_threads == 1:
            self.run(label, now)

    def take(self, label: bytes, now: float) -> None:
        """Show that a blocking task was taken on; then as ``enter``."""
        self._on_threads += 1
        self._words[_ON_THREADS] = self._on_threads
        if self._on_reactor + self._on_threads == 1:
            self.run(label, now)

    def end(self, failed: bool, seconds: float) -> None:
        """Show that what ``begin`` showed has ended; then as ``leave``."""
        self._on_reactor -= 1
        self._words[_ON_REACTOR] = self._on_reactor
        self.leave(failed, seconds)
        self._show_if_idle()

    def finish(self, failed: bool, seconds: float) -> None:
        """Show that what ``take`` showed has ended; then as ``leave``."""
        self._on_threads -= 1
        self._words[_ON_THREADS] = self._on_threads
        self.leave(failed, seconds)
        self._show_if_idle()

    def hand_over(self) -> None:
        """Show that what ``take`` showed was not run here, and is no longer here."""
        self._on_threads -= 1
        self._words[_ON_THREADS] = self._on_threads
        self.show_the_rest()
        self._show_if_idle()

    def _show_if_idle(self) -> None:
        if not (self._on_threads or self._on_reactor) and self._title:
            self._titled = b""
            self._write_title(b"idle)" if self._words[_STATE] == State.READY else b"draining)")

    @property
    def beat(self) -> float:
        """Tell when the process has last shown that its reactor runs."""
        return float(self._seconds[_BEAT])

    def beats(self, now: float) -> None:
        """Show that the reactor runs."""
        self._seconds[_BEAT] = now

    @property
    def due(self) -> float:
        """Tell until when the running task must have ended, or give 0.0."""
        return float(self._seconds[_DUE])

    @property
    def task(self) -> str:
        """Tell the name of the task that is shown."""
        return bytes(self._name).rstrip(b"\0").decode()

    def must_end(self, due: float) -> None:
        """Show until when the running task must have ended; 0.0: there is no such time."""
        self._seconds[_DUE] = due

    @property
    def ended(self) -> int:
        """Tell how many tasks have ended in this slot, its earlier processes' included."""
        return self._words[_DONE] + self._words[_FAILED]

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
            "task": self.task if began else None,
            "task_seconds": round(now - began, 6) if began else None,
            "uptime": round(now - self._seconds[_BORN], 3) if state else 0.0,
            "in_flight": words[_ON_REACTOR] + words[_ON_THREADS],
            "connections": words[_CONNECTIONS],
            "accepted": words[_ACCEPTED],
            "done": words[_DONE],
            "failed": words[_FAILED],
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


class SupervisorSlot(Slot):
    """
    The supervisor's part of the scoreboard.

    Made by ``Scoreboard.supervisor_slot``.
    """

    __slots__ = ()

    def show_waiting(self, waiting: int) -> None:
        """Show how many tasks wait in the queue."""
        self._words[_WAITING] = waiting

    def show_queue(
        self, oldest: float | None, handed_over: int, refused: int, expired: int
    ) -> None:
        """
        Show how the queue gets on.

        Args:
            oldest: When its oldest task came, in CLOCK_MONOTONIC seconds, or None.
            handed_over: How many tasks it was given, like all that follow.
            refused: How many it was not, because it was full.
            expired: How many waited in it until their time was over.
        """
        words = self._words
        self._seconds[_OLDEST] = oldest or 0.0
        words[_HANDED_OVER], words[_REFUSED], words[_EXPIRED] = handed_over, refused, expired

    def count_restart(self, cause: Cause) -> None:
        """Count that a worker is replaced."""
        self._words[_CAUSES + cause] += 1

    def show_reload(self, now: float, failure: str) -> None:
        """
        Show how the last reload went.

        Args:
            now: CLOCK_MONOTONIC seconds.
            failure: Why the old code serves on, or ''.
        """
        text = failure.encode(errors="backslashreplace")[:_FAILURE_BYTES]
        self._name[:] = text.ljust(_FAILURE_BYTES, b"\0")
        self._seconds[_RELOADED] = now

    def summary(self, now: float) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
        """
        Tell what the slot shows, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.

        Returns:
            The supervisor, its queue, and how many workers were replaced, by cause.
        """
        words, seconds = self._words, self._seconds
        oldest, reloaded = seconds[_OLDEST], seconds[_RELOADED]
        failure = bytes(self._name).rstrip(b"\0").decode(errors="replace")
        supervisor = {
            "pid": words[_PID] or None,
            "uptime": round(now - seconds[_BORN], 3) if words[_STATE] else 0.0,
            "reload": {"seconds_ago": round(now - reloaded, 3), "failure": failure or None}
            if reloaded
            else None,
        }
        waiting = words[_WAITING]
        queue = {
            "waiting": waiting,
            "oldest_seconds": round(max(0.0, now - oldest), 6) if waiting and oldest else None,
            "handed_over": words[_HANDED_OVER],
            "refused": words[_REFUSED],
            "expired": words[_EXPIRED],
        }
        restarts = {cause.name.lower(): words[_CAUSES + cause] for cause in Cause}
        return supervisor, queue, restarts
