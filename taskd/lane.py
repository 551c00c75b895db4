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
"""So long a task may run before what waits behind it goes to workers that idle."""

PATIENCE_SECONDS: Final = 0.025
"""
So long a task may run before all that waits behind it, and all that comes, goes
to the supervisor's queue, whether anybody idles or not. Longer than a machine
with more processes than cores lets a quick task wait for its core: a thousand of
them are sooner done here than sent around.
"""


class Look(Enum):
    """What has been found by looking at a lane."""

    CLEAR = "clear"
    """Nothing waits: there is nothing to watch until something does."""
    MOVING = "moving"
    """Calls come to an end, or may yet; look again after ``HANDOVER_SECONDS``."""
    FULL = "full"
    """They do not: what waits, and what comes, is to be handed over."""


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
        "_reserves",
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
        self._reserves = False
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
            or (self._reserves and self.occupied < self.threads)
            or (priority > 0 and self.occupied >= self.threads)
        )

    def began(self, now: float, ended: int) -> None:
        """
        Take note that a thread which was free has got a call.

        Args:
            now: Seconds, on a clock that never goes back.
            ended: How many calls have come to an end here so far.
        """
        self._since = now
        self._seen = ended

    def is_held_up(self, now: float, ended: int) -> bool:
        """Tell whether the calls that hold the threads take long, if all are held; as ``look``."""
        return ended == self._seen and now - self._since >= HANDOVER_SECONDS

    def look(self, now: float, ended: int, idle: Callable[[], int]) -> tuple[Look, int]:
        """
        Find out whether the calls that run take long.

        If all threads are taken and none of their calls has ended for a while,
        each has been running for that while.

        Args:
            now: Seconds, on the clock of ``began``.
            ended: How many calls have come to an end here so far.
            idle: Tells how many tasks the other workers could start now; asked
                only if that matters.

        Returns:
            What was found, and how many of the calls that wait are to be handed
            over. While calls may yet come to an end, no more than find an idle
            worker at once; ``FULL``, with all of them, comes once until ``reopens``.
        """
        waiting = self.occupied - self.threads
        if waiting <= 0 or self._is_full or self._is_retired:
            return Look.CLEAR, 0
        if ended != self._seen:
            self.began(now, ended)  # the one that runs now, at some time since the last look
            return Look.MOVING, 0
        ran = now - self._since
        if ran >= PATIENCE_SECONDS:
            self._is_full = True
            self._update()
            return Look.FULL, waiting
        return Look.MOVING, min(waiting, idle()) if ran >= HANDOVER_SECONDS else 0

    def reopens(self) -> bool:
        """Take note that calls have ended; tell whether that ends a time of being full."""
        if not self._is_full or self.occupied >= self.threads:
            return False
        self._is_full = False
        self._update()
        return True

    def asks(self, was_full: bool) -> bool:
        """
        Decide whether to ask the supervisor, which has tasks that wait, for one.

        A worker that is not full asks even while quick tasks of its own wait
        here, since those of others would otherwise wait for ever.

        Args:
            was_full: True if it is not full any more just now. Then its tasks
                take long, and its free thread is kept for the answer: whatever
                comes meanwhile has waited less. After quick tasks it would be
                idle for longer than they take.
        """
        if self._is_full or self._is_retired or self._is_asking:
            return False
        self._is_asking = True
        self._reserves = was_full
        self._update()
        return True

    def answered(self) -> None:
        """Take note that the supervisor has answered."""
        self._is_asking = self._reserves = False
        self._update()

    def retire(self) -> None:
        """Start nothing more here."""
        self._is_retired = True
        self._update()

    def _update(self) -> None:
        self.is_wary = self._is_full or self._is_retired or self._reserves
