"""
How connections leave a worker that retires: each at a moment at which nothing is owed.

What leaving is, to another worker or for good, is the connection's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

__all__ = ["Departure", "Leaving"]

_STILL_SECONDS: Final = 0.05
_BETWEEN_STILLS_SECONDS: Final = 0.1
_LONGEST_BETWEEN_STILLS_SECONDS: Final = 5.0


class Leaving(Protocol):
    """A connection that is to leave."""

    def pass_on(self) -> None:
        """Have every task run elsewhere from now on, and leave when nothing is owed."""

    def move(self) -> None:
        """Leave, if nothing is owed."""

    def hold_still(self, is_on: bool, /) -> None:
        """Take whether to read nothing for a moment."""


class Departure:
    """
    Have every connection leave.

    One that is owed nothing goes at once. One whose peer always asks for more is
    held still now and then, for a moment, and goes when that comes to its last
    reply; meanwhile its tasks are run elsewhere.

    Args:
        present: Gives those that are still there.
        call_later: Calls something after so many seconds.
    """

    def __init__(
        self, present: Callable[[], Iterable[Leaving]], call_later: Callable[..., Any]
    ) -> None:
        self._present = present
        self._call_later = call_later
        for connection in list(present()):
            connection.pass_on()
        self._hold_still(_BETWEEN_STILLS_SECONDS)

    def _hold_still(self, pause: float) -> None:
        held = list(self._present())
        if not held:
            return
        for connection in held:
            connection.move()
            connection.hold_still(True)
        self._call_later(_STILL_SECONDS, self._let_go, held, pause)

    def _let_go(self, held: list[Leaving], pause: float) -> None:
        for connection in set(self._present()).intersection(held):
            connection.hold_still(False)
        longer = min(_LONGEST_BETWEEN_STILLS_SECONDS, 2 * pause)
        self._call_later(pause, self._hold_still, longer)
