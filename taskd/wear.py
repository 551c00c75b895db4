"""
When a worker has served long enough: by tasks, by memory.

A decision only; what is done about it is ``worker``'s and ``supervisor``'s.
"""

from __future__ import annotations

from collections.abc import Callable

from taskd.policy import jittered
from taskd.settings import Settings
from taskd.states import Cause

__all__ = ["Wear"]


class Wear:
    """
    Decide whether one worker is to be replaced.

    Its limits lie a little below those that the operator gave, each worker's
    elsewhere, so that they do not all go at once.

    Args:
        settings: What the operator decided.
        ended: How many tasks had ended in the worker's slot before its time.
        jitter: Gives draws from [0.0, 1.0).
    """

    def __init__(self, settings: Settings, ended: int, jitter: Callable[[], float]) -> None:
        self._last_task: int | None = None
        self._most_bytes: int | None = None
        if settings.max_tasks is not None:
            self._last_task = ended + jittered(settings.max_tasks, jitter=jitter())
        if settings.max_rss_bytes is not None:
            self._most_bytes = jittered(settings.max_rss_bytes, jitter=jitter())

    def cause(self, ended: int, rss: int) -> Cause | None:
        """
        Tell why the worker is to be replaced, or None.

        Args:
            ended: How many tasks have ended in its slot.
            rss: Its resident memory in bytes, or 0 if that was not measured.
        """
        if self._last_task is not None and ended >= self._last_task:
            return Cause.MAX_TASKS
        if self._most_bytes is not None and rss > self._most_bytes:
            return Cause.MAX_RSS
        return None
