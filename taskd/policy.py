"""
The arithmetic of waiting: accepting, restarting, reconnecting, trying again.

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
    "is_hung",
    "jittered",
    "reconnect_delay",
    "retry_after",
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

_HUNG_SILENT_SECONDS: Final = 1.5
"""Longer than a busy machine keeps a reactor from its turn."""

_HUNG_OVERDUE_SECONDS: Final = 0.25

_RETRY_AFTER_FLOOR_SECONDS: Final = 0.1
_RETRY_AFTER_CEILING_SECONDS: Final = 60.0
_RETRY_AFTER_UNKNOWN_SECONDS: Final = 1.0

_JITTER_SHARE: Final = 0.2
"""By so much of itself a worker's limit is lowered at most."""

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


def is_hung(now: float, silent_since: float | None, due: float) -> bool:
    """
    Decide whether a worker will not come to its senses by itself.

    Its reactor does not run, and its task's time is over, which a running
    reactor would have seen to.

    Args:
        now: CLOCK_MONOTONIC seconds.
        silent_since: When its reactor was asked for a sign of life that has not
            come, or None.
        due: When its task must have ended, or 0.0: it may take as long as it likes.
    """
    if silent_since is None or due == 0.0:
        return False
    return now > due + _HUNG_OVERDUE_SECONDS and now > silent_since + _HUNG_SILENT_SECONDS


def retry_after(waiting: int, rate: float) -> float:
    """
    Return how long a caller whose task was refused should stay away.

    As long as the queue takes, at the pace of late, until what waits now has
    been started.

    Args:
        waiting: Tasks that wait, from 0.
        rate: Tasks a second that have left the queue of late, from 0.0; 0.0 if
            that is unknown.

    Returns:
        Seconds, from 0.1 to 60.0, rounded to hundredths.
    """
    seconds = waiting / rate if rate > 0 else _RETRY_AFTER_UNKNOWN_SECONDS
    return round(min(_RETRY_AFTER_CEILING_SECONDS, max(_RETRY_AFTER_FLOOR_SECONDS, seconds)), 2)


def jittered(limit: int, *, jitter: float) -> int:
    """
    Return one worker's own limit, a little below the one that all were given.

    Workers that were forked together and share their work evenly would come to
    the same limit together, and all be replaced at once.

    Args:
        limit: What all were given, from 1.
        jitter: A draw from [0.0, 1.0).

    Returns:
        From four fifths of *limit*, and 1, to *limit*.
    """
    return max(1, limit - int(limit * _JITTER_SHARE * jitter))


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
