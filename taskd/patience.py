"""
How long a silent peer is put up with: before its first line, between requests, and unread.

A small record for each connection; time is an argument. What is done to a peer
that has used up its time is ``server``'s.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["MOST_UNREAD_BYTES", "UNREAD_SECONDS", "Patience", "Verdict"]

UNREAD_SECONDS: Final = 60.0
"""A peer that has much to read, and takes none of it for so long, will not come back to it."""


MOST_UNREAD_BYTES: Final = 256 * 1024 * 1024
"""Replies to calls that were in flight already go on to pile up for a peer, up to here."""


class Verdict(Enum):
    """What a look at the clock has shown."""

    WAIT = "wait"
    """There is time."""
    SILENT = "silent"
    """No line has come since the connection was made."""
    IDLE = "idle"
    """Nothing was asked and nothing was answered."""
    UNREAD = "unread"
    """What it was sent is not taken."""


class Patience:
    """
    The time that one peer has.

    Args:
        first_line_seconds: Until its first line, above 0.
        idle_seconds: Between requests, above 0, or None: no limit.

    Attributes:
        awaits_line: True until its first line has come.
    """

    __slots__ = ("_first", "_idle", "_since", "_unread_bytes", "_unread_since", "awaits_line")

    def __init__(self, first_line_seconds: float, idle_seconds: float | None) -> None:
        self._first = first_line_seconds
        self._idle = idle_seconds
        self._since = 0.0
        self._unread_since: float | None = None
        self._unread_bytes = 0
        self.awaits_line = False

    def begin(self, now: float) -> None:
        """Wait for the first line from now on."""
        self.awaits_line = True
        self._since = now

    def stir(self, now: float) -> None:
        """Take note that something was asked or answered."""
        if not self.awaits_line:
            self._since = now

    def leave_unread(self, unsent_bytes: int, added_bytes: int, now: float) -> None:
        """
        Take note that more waits until it is taken.

        Args:
            unsent_bytes: How much waits now.
            added_bytes: How much of it was just added; that alone gives nobody more time.
            now: Seconds that never go back.
        """
        if self._unread_since is None or unsent_bytes - added_bytes < self._unread_bytes:
            self._unread_since = now
        self._unread_bytes = unsent_bytes

    def all_read(self) -> None:
        """Take note that nothing waits any more."""
        self._unread_since = None

    def verdict(self, now: float, unsent_bytes: int, is_owed: bool) -> Verdict:
        """
        Tell whether its time is over, once: from then on it has time again.

        Args:
            now: Seconds that never go back.
            unsent_bytes: How much waits until the peer takes it.
            is_owed: True if a request of its has no reply yet.
        """
        if self._unread_since is not None:
            is_stuck = now - self._unread_since > UNREAD_SECONDS
            if unsent_bytes < self._unread_bytes:
                self._unread_since, self._unread_bytes = now, unsent_bytes
            elif is_stuck or unsent_bytes > MOST_UNREAD_BYTES:
                self._unread_since = now
                return Verdict.UNREAD
        limit = self._first if self.awaits_line else self._idle
        if limit is None or now - self._since <= limit or (is_owed and not self.awaits_line):
            return Verdict.WAIT
        verdict = Verdict.SILENT if self.awaits_line else Verdict.IDLE
        self.awaits_line = False
        self._since = now
        return verdict
