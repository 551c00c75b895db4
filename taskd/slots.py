"""
One process's part of the scoreboard: what it shows of itself, word by word.

A slot is written by its process alone and read by all. Every field is one aligned
machine word, so a reader never sees half of a value; two fields may be a moment
apart.
"""

from __future__ import annotations

import json
from typing import Any, Final

from taskd.states import Cause, State

__all__ = [
    "BORN",
    "BUCKETS",
    "CALLERS_BYTES",
    "CONNECTIONS",
    "FAILED",
    "FAILURE",
    "LATENCY",
    "NAME",
    "NAME_BYTES",
    "ON_THREADS",
    "SLOT_WORDS",
    "STATE",
    "WAITING",
    "WORD",
    "Slot",
    "SupervisorSlot",
]

WORD: Final = 8
SLOT_WORDS: Final = 96

# Words of a slot. Times are CLOCK_MONOTONIC, which all processes share.
_PID: Final = 0
STATE: Final = 1
BORN: Final = 2
_BEGAN: Final = 3
_ON_REACTOR: Final = 4
CONNECTIONS: Final = 5
_ACCEPTED: Final = 6
FAILED: Final = 8
ON_THREADS: Final = 10
_BEAT: Final = 11
_DUE: Final = 12
LATENCY: Final = 16
BUCKETS: Final = 32
_SLOWEST: Final = LATENCY + BUCKETS - 1
NAME: Final = 48
_CALLERS: Final = 64
NAME_BYTES: Final = (_CALLERS - NAME) * WORD
"""Room for a task's name: as many characters as a name may have."""
CALLERS_BYTES: Final = (SLOT_WORDS - _CALLERS) * WORD
"""Room for the names of those whose connections a worker has."""

# Words of slot 0 alone, where a worker has its latencies.
WAITING: Final = 16
_OLDEST: Final = 17
_HANDED_OVER: Final = 18
_REFUSED: Final = 19
_EXPIRED: Final = 20
_RELOADED: Final = 21
_CAUSES: Final = 24
FAILURE: Final = 32
_FAILURE_BYTES: Final = (_CALLERS - FAILURE) * WORD


class Slot:
    """
    One process's part of the scoreboard.

    Made by ``Scoreboard.slot``. Only the process that the slot stands for may
    write on it, or the supervisor while there is none.

    Attributes:
        number: Its place, from 1 for workers.
    """

    __slots__ = (
        "_callers",
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

    def __init__(self, number: int, words: memoryview, seconds: Any, text: memoryview) -> None:
        self.number = number
        self._words = words
        self._seconds = seconds
        self._name = text[: len(text) - CALLERS_BYTES]
        self._callers = text[len(text) - CALLERS_BYTES :]
        self._on_reactor = 0
        self._on_threads = 0
        self._label = b""
        self._current = (b"", 0.0)
        self._title = memoryview(bytearray(0))
        self._titled = b""

    def open(self, pid: int, now: float) -> None:
        """Take the slot for a new process; what its predecessor counted is kept."""
        words = self._words
        words[_ON_REACTOR] = words[ON_THREADS] = words[CONNECTIONS] = 0
        self.show_callers("")
        words[_PID] = pid
        words[STATE] = State.STARTING
        self._seconds[BORN] = self._seconds[_BEAT] = now
        self._seconds[_BEGAN] = self._seconds[_DUE] = 0.0

    def close(self) -> None:
        """Mark the slot as without a process."""
        words = self._words
        words[STATE] = State.DEAD
        words[_ON_REACTOR] = words[ON_THREADS] = words[CONNECTIONS] = words[_PID] = 0
        self._seconds[_BEGAN] = self._seconds[_DUE] = 0.0
        self.show_callers("")

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
        return State(self._words[STATE])

    @property
    def state_name(self) -> str:
        """Tell what the slot's process is, and of one that accepts whether a task runs."""
        state = self.state
        if state is State.READY:
            return "busy" if self.is_working else "idle"
        return state.name.lower()

    @property
    def is_working(self) -> bool:
        """Tell whether at least one task runs."""
        words = self._words
        return bool(words[ON_THREADS] or words[_ON_REACTOR] or self._seconds[_BEGAN])

    def ready(self) -> None:
        """Show that the worker accepts."""
        self._words[STATE] = State.READY

    def drain(self) -> None:
        """Show that the worker accepts nothing more."""
        self._words[STATE] = State.DRAINING
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

    def leave(self, failed: bool, seconds: float) -> int:
        """
        Count a task that has ended.

        Args:
            failed: True if its caller got an error.
            seconds: How long it took.

        Returns:
            Under which power of two microseconds it is counted.
        """
        # That one is done is counted by its latency alone: it is called for every task.
        words = self._words
        bucket = int(seconds * 1e6).bit_length()
        if bucket >= BUCKETS:
            bucket = BUCKETS - 1
        words[LATENCY + bucket] += 1
        if failed:
            words[FAILED] += 1
        if self._on_threads or self._on_reactor:
            self.show_the_rest()
        else:
            self._seconds[_BEGAN] = 0.0
        return bucket

    def show_the_rest(self) -> None:
        """Show what runs besides the call that is being answered, or nothing."""
        if self._on_threads or self._on_reactor:
            self.enter(*self._current)
        else:
            self._seconds[_BEGAN] = 0.0

    def run(self, label: bytes, now: float) -> None:
        """Show which of the tasks that were taken on runs; then as ``enter``."""
        self._current = (label, now)
        # This is ``enter``, written out: it is called for every blocking task.
        if label is not self._label:
            self._label = label
            self._name[:] = label
        self._seconds[_BEGAN] = now
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
        self._words[ON_THREADS] = self._on_threads
        if self._on_reactor + self._on_threads == 1:
            self.run(label, now)

    def end(self, failed: bool, seconds: float) -> None:
        """Show that what ``begin`` showed has ended; then as ``leave``."""
        self._on_reactor -= 1
        self._words[_ON_REACTOR] = self._on_reactor
        self.leave(failed, seconds)
        self._show_if_idle()

    def finish(self, failed: bool, seconds: float) -> None:
        """
        Show that what ``take`` showed has ended, and count it.

        What its thread runs now is shown by ``run``.
        """
        words = self._words
        self._on_threads -= 1
        words[ON_THREADS] = self._on_threads
        # Counted as in ``leave``, written out for the same reason as in ``run``.
        if failed:
            words[FAILED] += 1
        bucket = int(seconds * 1e6).bit_length()
        words[LATENCY + bucket if bucket < BUCKETS else _SLOWEST] += 1
        if not (self._on_threads or self._on_reactor):
            self._seconds[_BEGAN] = 0.0
            self._show_if_idle()

    def hand_over(self) -> None:
        """Show that what ``take`` showed was not run here, and is no longer here."""
        self._on_threads -= 1
        self._words[ON_THREADS] = self._on_threads
        self.show_the_rest()
        self._show_if_idle()

    def _show_if_idle(self) -> None:
        if self._title and not (self._on_threads or self._on_reactor):
            self._titled = b""
            self._write_title(b"idle)" if self._words[STATE] == State.READY else b"draining)")

    @property
    def is_in_use(self) -> bool:
        """Tell whether the process has a task or a connection."""
        return self.is_working or bool(self._words[CONNECTIONS])

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
        return sum(self._words[LATENCY : LATENCY + BUCKETS])

    def connected(self, open_connections: int) -> None:
        """Show that a connection came, and how many there are now."""
        self._words[_ACCEPTED] += 1
        self._words[CONNECTIONS] = open_connections

    def disconnected(self, open_connections: int) -> None:
        """Show that a connection went, and how many there are now."""
        self._words[CONNECTIONS] = open_connections

    def show_callers(self, callers: str) -> None:
        """
        Show whose connections these are.

        Args:
            callers: A JSON object in ASCII: how many each identity has; '': none
                has an identity. Of a longer one nothing is shown.
        """
        text = callers.encode()
        # A reader in between sees what is no JSON, and takes it for nothing.
        self._callers[:] = (text if len(text) <= CALLERS_BYTES else b"").ljust(CALLERS_BYTES, b"\0")

    @property
    def callers(self) -> dict[str, int]:
        """Tell how many connections each identity has; those without one are left out."""
        text = bytes(self._callers).rstrip(b"\0")
        try:
            return json.loads(text) if text else {}
        except ValueError:
            return {}

    def status(self, now: float) -> dict[str, Any]:
        """
        Tell what the slot shows, as plain JSON types.

        Args:
            now: CLOCK_MONOTONIC seconds.
        """
        words, began, state = self._words, self._seconds[_BEGAN], self.state
        return {
            "worker": self.number,
            "pid": words[_PID] or None,
            "state": self.state_name,
            "task": self.task if began else None,
            "task_seconds": round(now - began, 6) if began else None,
            "uptime": round(now - self._seconds[BORN], 3) if state else 0.0,
            "in_flight": words[_ON_REACTOR] + words[ON_THREADS],
            "connections": words[CONNECTIONS],
            "callers": self.callers,
            "accepted": words[_ACCEPTED],
            "done": self.ended - words[FAILED],
            "failed": words[FAILED],
            "latency": self.latency(),
        }

    def latency(self) -> dict[str, int]:
        """
        Tell how many tasks took how long.

        Returns:
            Counts by upper bound in microseconds (a power of two), empty ones left out.
        """
        counts = self._words[LATENCY : LATENCY + BUCKETS]
        return {str(2**power): count for power, count in enumerate(counts) if count}


class SupervisorSlot(Slot):
    """
    The supervisor's part of the scoreboard.

    Made by ``Scoreboard.supervisor_slot``.
    """

    __slots__ = ()

    def show_waiting(self, waiting: int) -> None:
        """Show how many tasks wait in the queue."""
        self._words[WAITING] = waiting

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

    @property
    def reload_failure(self) -> str:
        """Tell why the last reload has failed, or give ''."""
        return bytes(self._name).rstrip(b"\0").decode(errors="replace")

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
        supervisor = {
            "pid": words[_PID] or None,
            "uptime": round(now - seconds[BORN], 3) if words[STATE] else 0.0,
            "reload": {
                "seconds_ago": round(now - reloaded, 3),
                "failure": self.reload_failure or None,
            }
            if reloaded
            else None,
        }
        waiting = words[WAITING]
        queue = {
            "waiting": waiting,
            "oldest_seconds": round(max(0.0, now - oldest), 6) if waiting and oldest else None,
            "handed_over": words[_HANDED_OVER],
            "refused": words[_REFUSED],
            "expired": words[_EXPIRED],
        }
        restarts = {cause.name.lower(): words[_CAUSES + cause] for cause in Cause}
        return supervisor, queue, restarts
