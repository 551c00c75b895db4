"""
What the processes of one gateway count: a row for each in a page of shared memory.

A row is written by its process alone and read by all, so every process can tell
what all of them do. Every figure is one aligned machine word.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

__all__ = ["COUNTERS", "GAUGES", "Figures"]

GAUGES: Final = ("processes", "websockets", "in_flight", "outstanding")
"""What there is now: calls in flight that somebody waits for, and all that no daemon has
answered yet."""

COUNTERS: Final = (
    "opened",
    "messages",
    "http_calls",
    "failed",
    "refused_origin",
    "refused_identity",
    "refused_rate",
    "refused_room",
    "silent",
)
"""What has happened: WebSockets opened, messages that came over them, calls over HTTP,
calls that have failed; refusals, by what was not as it must be; WebSockets dropped
because no sign of life came."""

_NAMES: Final = (*GAUGES, *COUNTERS)
_WORD: Final = 8
_ROW_WORDS: Final = 16


class Figures:
    """
    All rows, one's own among them.

    Args:
        fd: A file descriptor from ``create``. It may be closed afterwards.
        row: One's own row, from 0.
    """

    def __init__(self, fd: int, row: int = 0) -> None:
        self._words = memoryview(mmap.mmap(fd, 0, mmap.MAP_SHARED)).cast("Q")
        self._first = row * _ROW_WORDS
        self._places = {name: self._first + place for place, name in enumerate(_NAMES)}

    @classmethod
    def create(cls, rows: int) -> int:
        """
        Make the shared memory.

        Returns:
            A file descriptor, which a child can inherit.
        """
        fd = os.memfd_create("taskd-gateway-figures")
        os.ftruncate(fd, rows * _ROW_WORDS * _WORD)
        return fd

    def begin(self) -> None:
        """Take one's row: what there was in an earlier process is no more; what it counted is."""
        for name in GAUGES:
            self._words[self._places[name]] = 0
        self._words[self._places["processes"]] = 1

    def add(self, name: str, count: int = 1) -> None:
        """Count something; a gauge also goes down."""
        self._words[self._places[name]] += count

    def get(self, name: str) -> int:
        """Tell one of one's own figures."""
        return self._words[self._places[name]]

    def clear(self, row: int) -> None:
        """Take it that a row's process is no more."""
        for place in range(len(GAUGES)):
            self._words[row * _ROW_WORDS + place] = 0

    def totals(self) -> dict[str, int]:
        """Sum up all rows."""
        return {name: sum(self._words[place::_ROW_WORDS]) for place, name in enumerate(_NAMES)}
