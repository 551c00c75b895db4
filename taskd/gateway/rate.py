"""
How often somebody may do something, and whether somebody still reads. No I/O here.

Time is an argument.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Rate", "Reading"]

_BURST_SECONDS: Final = 2.0
"""What was not used is kept for so long."""

_PATIENCE_SECONDS: Final = 2.0
"""So far ahead of the rate somebody may get who goes on although refused."""


class Rate:
    """
    Tell who is too quick.

    Args:
        per_second: How often, above 0.
    """

    __slots__ = ("_per_second", "_room", "_since")

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._room = self._most
        self._since: float | None = None

    @property
    def _most(self) -> float:
        return max(1.0, self._per_second * _BURST_SECONDS)

    def wait(self, now: float) -> float:
        """
        Count one more time.

        Args:
            now: Seconds that never go back.

        Returns:
            Seconds until it would have been in time, 0.0 if it is; those who are
            refused fall behind further.
        """
        if self._since is not None:
            self._room = min(self._most, self._room + (now - self._since) * self._per_second)
        self._since = now
        self._room -= 1.0
        return 0.0 if self._room >= 0.0 else -self._room / self._per_second

    def is_out_of_patience(self) -> bool:
        """Tell whether somebody goes on and on although refused."""
        return self._room < -max(1.0, self._per_second * _PATIENCE_SECONDS)


class Reading:
    """Tell whether somebody reads on, by what waits to be sent from one look to the next."""

    __slots__ = ("_unsent",)

    def __init__(self) -> None:
        self._unsent = 0

    def goes_on(self, unsent: int) -> bool:
        """
        Look once more.

        Args:
            unsent: Bytes that wait now.

        Returns:
            Whether something waits, and it is not what has waited at the last look.
        """
        before, self._unsent = self._unsent, unsent
        return unsent > 0 and unsent != before
