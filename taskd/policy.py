"""
The arithmetic of waiting: accepting, restarting, reconnecting.

Pure functions and one small record; time and dice are arguments. Nothing here
waits, and nothing here knows what waits for it.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ACCEPT_PAUSE_CEILING_SECONDS",
    "ACCEPT_PAUSE_SECONDS_PER_CONNECTION",
    "FREE_ACCEPTS",
    "NO_ROOM_PAUSE_SECONDS",
    "RESERVED_FDS",
    "YOUNG_SECONDS",
    "Births",
    "accept_pause",
    "connection_ceiling",
    "reconnect_delay",
]

FREE_ACCEPTS: Final = 8
"""So many connections in a row a worker takes without a pause."""

ACCEPT_PAUSE_SECONDS_PER_CONNECTION: Final = 0.0002
ACCEPT_PAUSE_CEILING_SECONDS: Final = 0.005

NO_ROOM_PAUSE_SECONDS: Final = 0.1
"""How long a worker leaves the port alone when the system has no room for a connection."""

RESERVED_FDS: Final = 64
"""File descriptors that a worker keeps for its tasks and itself."""

YOUNG_SECONDS: Final = 1.0
"""A worker that dies younger than this died of its start, not of its work."""

_BIRTH_DELAY_BASE_SECONDS: Final = 0.1
_BIRTH_DELAY_CEILING_SECONDS: Final = 30.0


def accept_pause(open_connections: int, in_a_row: int) -> float:
    """
    Return how long a worker leaves the shared port to its siblings after an accept.

    The kernel wakes the same worker again and again, so connections that stay
    would pile up on a few. A worker that holds more waits longer, so the
    emptiest is the quickest. While connections also go, nothing piles up: with
    a connection per task a pause would only send the next one to a process
    whose memory is cold.

    Args:
        open_connections: How many connections the worker holds, from 0.
        in_a_row: How many it has accepted since the last one went, from 0.

    Returns:
        Seconds, from 0.0 to ``ACCEPT_PAUSE_CEILING_SECONDS``.

    Source:
        200 connections at once on 8 workers: 0 to 113 each without a pause, 24
        to 26 each with it (``benchmarks/run.py burst``). A connection per task
        on 100 workers: half the rate if every accept is followed by a pause
        (``benchmarks/run.py connect``).
    """
    if in_a_row <= FREE_ACCEPTS:
        return 0.0
    return min(ACCEPT_PAUSE_CEILING_SECONDS, ACCEPT_PAUSE_SECONDS_PER_CONNECTION * open_connections)


def connection_ceiling(fd_limit: int) -> int:
    """
    Return how many connections a worker may hold before it stops accepting.

    At its limit of file descriptors a worker would have to accept and close
    what its siblings could serve; so it stops well before.

    Args:
        fd_limit: The soft RLIMIT_NOFILE, above 0.

    Returns:
        At least 1.
    """
    return max(1, fd_limit - RESERVED_FDS)


def reconnect_delay(failures: int, *, base: float, cap: float, jitter: float) -> float:
    """
    Return how long a client waits before it connects again.

    Full jitter: the delay is drawn evenly from zero to the capped exponential,
    so a thousand clients that a restart cut off do not come back together.

    Args:
        failures: Attempts that have failed in a row, from 1.
        base: Ceiling of the first delay, in seconds.
        cap: Ceiling of every delay, in seconds.
        jitter: A draw from [0.0, 1.0).

    Returns:
        Seconds, in [0.0, cap).

    Source:
        M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return jitter * min(cap, base * 2.0 ** min(failures - 1, 64))


class Births:
    """
    Decide how soon a dead worker is replaced.

    One that had worked for a while is replaced at once. Those that die young
    one after the other, whichever slot they were born for, have one cause, so
    their replacement waits, ever longer, until one lives.
    """

    def __init__(self) -> None:
        self.young_deaths = 0

    def died(self, lived_seconds: float) -> float:
        """
        Take note of a death.

        Args:
            lived_seconds: How long the process had been serving; 0.0 if it
                never became ready.

        Returns:
            Seconds to wait before the replacement, from 0.0 to 30.0.
        """
        if lived_seconds >= YOUNG_SECONDS:
            self.young_deaths = 0
            return 0.0
        self.young_deaths += 1
        return min(
            _BIRTH_DELAY_CEILING_SECONDS,
            _BIRTH_DELAY_BASE_SECONDS * 2.0 ** min(self.young_deaths - 1, 64),
        )
