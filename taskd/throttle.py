"""
What is done less often than it is asked for: log lines, and guesses at a token.

Both keep a little memory for each key, bounded, since the keys are chosen by
whoever is to be slowed down. Time is an argument.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

__all__ = ["Penalties", "Throttle"]

_MOST_KEYS: Final = 1024
"""So many are remembered; the oldest is forgotten first."""

_QUIET_SECONDS: Final = 60.0

_PENALTY_SECONDS: Final = 0.5
_LONGEST_PENALTY_SECONDS: Final = 4.0
_FORGIVEN_AFTER_SECONDS: Final = 60.0


class Throttle:
    """Let one line through for each key, then none for a minute."""

    def __init__(self) -> None:
        self._since: dict[Hashable, tuple[float, int]] = {}

    def admit(self, key: Hashable, now: float) -> int | None:
        """
        Tell whether something may be said.

        Args:
            key: What it is about.
            now: Seconds that never go back.

        Returns:
            How often it was not said since the last time, or None: not now.
        """
        since, left_out = self._since.get(key, (None, 0))
        if since is not None and now - since < _QUIET_SECONDS:
            self._since[key] = since, left_out + 1
            return None
        _remember(self._since, key, (now, 0))
        return left_out


class Penalties:
    """
    Tell how long whoever has guessed wrongly has to wait.

    What makes guessing hopeless is the length of a token; this makes it slow, and
    no caller with the right one waits longer than ``_LONGEST_PENALTY_SECONDS``,
    even if it shares its address with one that guesses.
    """

    def __init__(self) -> None:
        self._failures: dict[Hashable, tuple[float, int]] = {}

    def seconds(self, who: Hashable, now: float) -> float:
        """
        Tell how long the next attempt waits before it is looked at.

        Args:
            who: Where it comes from.
            now: Seconds that never go back.
        """
        since, failures = self._failures.get(who, (now, 0))
        if not failures or now - since > _FORGIVEN_AFTER_SECONDS:
            return 0.0
        return min(_LONGEST_PENALTY_SECONDS, _PENALTY_SECONDS * 2.0 ** min(failures - 1, 16))

    def failed(self, who: Hashable, now: float) -> None:
        """Take note of a wrong attempt."""
        since, failures = self._failures.get(who, (now, 0))
        if now - since > _FORGIVEN_AFTER_SECONDS:
            failures = 0
        _remember(self._failures, who, (now, failures + 1))


def _remember(
    memory: dict[Hashable, tuple[float, int]], key: Hashable, value: tuple[float, int]
) -> None:
    memory.pop(key, None)  # what is written last is forgotten last
    memory[key] = value
    if len(memory) > _MOST_KEYS:
        del memory[next(iter(memory))]
