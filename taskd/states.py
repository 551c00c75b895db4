"""
What becomes of a worker: the states it can be in, and why it is replaced.

Names for numbers on the scoreboard, and nothing else.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Cause", "State"]


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


class Cause(IntEnum):
    """Why a worker was replaced."""

    DIED = 0
    """It died, or was killed from outside."""
    TIME_LIMIT = 1
    """A blocking task of its was at its time limit, or was cancelled, and cannot be stopped."""
    HUNG = 2
    """It did not answer any more, and its task was past its limit."""
    MAX_TASKS = 3
    """It had run as many tasks as ``--max-tasks`` allows."""
    MAX_RSS = 4
    """It had grown beyond ``--max-rss``."""
    RELOAD = 5
    """New code was loaded."""
