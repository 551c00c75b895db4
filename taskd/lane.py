"""
One worker's blocking tasks: which run here, and which go to the supervisor.

A free worker runs its own tasks at once, and quick ones behind each other stay
where they are: they are gone before anybody else could have had them. What
stands behind a task that takes longer is handed over, so that another worker
can have it. That is decided here, by counts and times that the caller brings;
the threads are ``executor``'s, and what becomes of a call that was handed over
is ``dispatcher``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

__all__ = ["HANDOVER_SECONDS", "PATIENCE_SECONDS", "Lane", "Look"]

HANDOVER_SECONDS: Final = 0.001
"""So long a task may run before what waits behind it goes to a worker that idles."""

PATIENCE_SECONDS: Final = 0.010
"""
So long a task may run before what waits behind it joins the queue of a pool in
which nobody idles. Longer than ``HANDOVER_SECONDS``, since a machine with more
processes than cores keeps quick tasks waiting for a few milliseconds, and a
thousand of them are sooner done here than sent around.
"""


class Look(Enum):
    """What has been found by looking at a lane."""

    FREE = "free"
    """A thread is free: there is nothing to watch until the next call."""
    MOVING = "moving"
    """Calls come to an end; look again after ``HANDOVER_SECONDS``."""
    FULL = "full"
    """What waits, and what comes, has to be handed over."""


class Lane:
    """
    Decide, for one worker, which blocking calls it runs itself.

    Args:
        threads: How many it can run at a time, from 1.

    Attributes:
        occupied: Calls that run or wait here; counted by who runs them.
        is_wary: False while every call of the usual priority can be run here
            without asking ``sends_on``, which is what makes the usual case cheap.
    """

    __slots__ = (
        "_is_asking",
        "_is_full",
        "_is_retired",
        "_seen",
        "_since",
        "is_wary",
        "occupied",
        "threads",
    )

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.occupied = 0
        self.is_wary = False
        self._is_full = False
        self._is_retired = False
        self._is_asking = False
        self._since = 0.0
        self._seen = 0

    @property
    def is_full(self) -> bool:
        """Tell whether what waits here was handed over, and what comes will be."""
        return self._is_full

    @property
    def is_retired(self) -> bool:
        """Tell whether nothing is started here any more."""
        return self._is_retired

    def sends_on(self, priority: int) -> bool:
        """
        Decide whether a call that has just come goes to the supervisor.

        Args:
            priority: The call's. One above 0 never waits here, since here
                calls are run in the order of their coming.
        """
        return (
            self._is_full
            or self._is_retired
            # The thread that is free was promised to the oldest task of all.
            or (self._is_asking and self.occupied < self.threads)
            or (priority > 0 and self.occupied >= self.threads)
        )

    def watch(self, now: float, ended: int) -> None:
        """
        Begin to watch; the first look is due after ``HANDOVER_SECONDS``.

        Args:
            now: Seconds, on a clock that never goes back.
            ended: How many calls have come to an end here so far.
        """
        self._since = now
        self._seen = ended

    def look(self, now: float, ended: int, is_anyone_idle: Callable[[], bool]) -> Look:
        """
        Find out whether the calls that run take long.

        If all threads are taken and none of their calls has ended for a while,
        each has been running for that while.

        Args:
            now: Seconds, on the clock of ``watch``.
            ended: How many calls have come to an end here so far.
            is_anyone_idle: Tells whether another worker could start a task now;
                asked only if that matters.

        Returns:
            What was found; ``FULL`` once, until ``reopen``.
        """
        if self.occupied < self.threads or self._is_full or self._is_retired:
            return Look.FREE
        if ended != self._seen:
            self.watch(now, ended)
            return Look.MOVING
        ran = now - self._since
        if ran >= PATIENCE_SECONDS or (ran >= HANDOVER_SECONDS and is_anyone_idle()):
            self._is_full = True
            self._update()
            return Look.FULL
        return Look.MOVING

    def reopens(self) -> bool:
        """Take note that calls have ended; tell whether that ends a time of being full."""
        if not self._is_full or self.occupied >= self.threads:
            return False
        self._is_full = False
        self._update()
        return True

    def asks(self) -> bool:
        """
        Decide whether to ask the supervisor, which has tasks that wait, for one.

        A worker that is not full asks even while quick tasks of its own wait
        here, since those of others would otherwise wait for ever.
        """
        if self._is_full or self._is_retired or self._is_asking:
            return False
        self._is_asking = True
        self._update()
        return True

    def answered(self) -> None:
        """Take note that the supervisor has answered."""
        self._is_asking = False
        self._update()

    def retire(self) -> None:
        """Start nothing more here."""
        self._is_retired = True
        self._update()

    def _update(self) -> None:
        self.is_wary = self._is_full or self._is_retired or self._is_asking
