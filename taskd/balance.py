"""
Which of several daemons a call goes to, and whether it is sent again.

Decisions only: loads, failures, time and dice come in as arguments. Connections
are ``node``'s, and what waits for them is ``client``'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Final, NamedTuple

from taskd.errors import ConnectFailed, Overloaded, ShuttingDown, Unauthorized, WorkerLost
from taskd.policy import reconnect_delay

__all__ = ["MOST_SENDS", "Health", "Load", "Tier", "Tries", "least_loaded", "was_not_run"]

MOST_SENDS: Final = 4
"""So often one call is sent at most, whatever happens to it."""

_MOST_RISKS: Final = 3
"""So often a call that may be run twice is sent again after a loss, in however large a cluster."""

_RECONNECT_BASE_SECONDS: Final = 0.1
_RECONNECT_CAP_SECONDS: Final = 5.0

_LONGEST_REST_SECONDS: Final = 5.0
"""A daemon that is overloaded for a minute is asked earlier: the others may be by then, too."""


class Tier(IntEnum):
    """How gladly a daemon is used; a worse tier only while a better one has nobody."""

    SERVES = 0
    RESTS = 1  # it is overloaded, and would say so again
    OUT = 2  # it cannot be reached, has lost connections, or is stopping


class Load(NamedTuple):
    """
    What one daemon has to do for us.

    Attributes:
        number: Its place among the daemons, from 0.
        tier: How gladly it is used.
        in_flight: Our calls that it has not answered.
        connections: Ours to it, those that are being made included.
    """

    number: int
    tier: Tier
    in_flight: int
    connections: int


def least_loaded(loads: Iterable[Load], turn: int) -> int | None:
    """
    Choose the daemon that the next call is for.

    Of the best tier that there is, the one with the fewest calls in flight; of
    several, the one with the fewest connections; of several again, the next in turn.

    Args:
        loads: Those of the daemons that come into question.
        turn: The number of the daemon whose turn it is.

    Returns:
        Its number, or None if *loads* is empty.
    """
    best = min(
        loads,
        key=lambda load: (
            load.tier,
            load.in_flight,
            load.connections,
            load.number < turn,
            load.number,
        ),
        default=None,
    )
    return None if best is None else best.number


class Health:
    """
    Tell whether one daemon is to be used, and when to try again if not.

    It is *out* from a failure on, for a delay that grows with the failures in a
    row and is random in full; then it may be tried. It *rests* for as long as an
    overloaded daemon asked for.

    Attributes:
        failures: How many there were in a row.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._is_out = False
        self._rests_until = float("-inf")

    @property
    def is_out(self) -> bool:
        """Tell whether it is not to be connected to now."""
        return self._is_out

    def failed(self, jitter: float) -> float | None:
        """
        Take note of a failure.

        Args:
            jitter: A draw from [0.0, 1.0).

        Returns:
            Seconds until it may be tried again by ``back``, or None: a delay that
            began before has not ended.
        """
        self.failures += 1
        if self._is_out:
            return None
        self._is_out = True
        return reconnect_delay(
            self.failures,
            base=_RECONNECT_BASE_SECONDS,
            cap=_RECONNECT_CAP_SECONDS,
            jitter=jitter,
        )

    def answered(self) -> None:
        """Take note that there was an answer since the last failure."""
        self.failures = 0

    def back(self) -> None:
        """Take it that the delay is over."""
        self._is_out = False

    def rest(self, now: float, retry_after: float) -> None:
        """
        Take note that it is overloaded.

        Args:
            now: Seconds of a clock that never goes back.
            retry_after: How many seconds it asks to be left alone; 0.0 if it does not tell.
        """
        seconds = min(_LONGEST_REST_SECONDS, retry_after or _RECONNECT_BASE_SECONDS)
        self._rests_until = max(self._rests_until, now + seconds)

    def tier(self, now: float) -> Tier:
        """Tell how gladly it is used at a time, of the same clock."""
        if self._is_out:
            return Tier.OUT
        return Tier.RESTS if now < self._rests_until else Tier.SERVES


class Tries:
    """
    Decide whether one call is sent again.

    Args:
        daemons: How many there are, from 1.
        is_idempotent: True: it does no harm if the call is run twice.
        connections: How many there may be to each daemon, from 1.

    Attributes:
        sends: How often it was sent.
        lost: The loss after which it was sent again though it may have been run,
            or None.
    """

    def __init__(self, daemons: int, is_idempotent: bool, connections: int = 1) -> None:
        self._daemons = daemons
        self._is_idempotent = is_idempotent
        self._connections = connections
        self._risks = 0
        self._stops = 0
        self.sends = 0
        self.lost: WorkerLost | None = None

    def may_go_on(self, error: BaseException, *, is_refusal: bool, another_serves: bool) -> bool:
        """
        Decide after the latest send has failed.

        What certainly was not run is sent again: one daemon's connection has ended,
        or it stops; or it does not take us, and there are others; or it is overloaded,
        and another one serves. What may have been run is sent again only if that does
        no harm, once for each daemon at most.

        A lone daemon that stops may be one of several behind a balancer, and any of
        our connections may lead to it: so many refusals do not count as sends.

        Args:
            error: What it failed with.
            is_refusal: True if a daemon has refused not the call, but its connection.
            another_serves: True if there is a daemon that does not rest and is not out.
        """
        stops = isinstance(error, ShuttingDown)
        if stops and self._daemons == 1 and self._stops < self._connections:
            self._stops += 1
        if self.sends >= MOST_SENDS + self._stops:
            return False
        if isinstance(error, WorkerLost):
            if not error.may_have_started:
                return True
            self._risks += 1
            if self._is_idempotent and self._risks <= min(self._daemons, _MOST_RISKS):
                self.lost = error
                return True
            return False
        if stops:
            return True
        if self._daemons == 1:
            return False
        if isinstance(error, Overloaded):
            return another_serves
        return is_refusal or isinstance(error, ConnectFailed)

    def verdict(self, error: BaseException) -> BaseException:
        """
        Tell what the caller is told of a call that has failed for good.

        That it was not run the last time does not mean that it was not run before.
        """
        return self.lost if self.lost is not None and was_not_run(error) else error


def was_not_run(error: BaseException) -> bool:
    """Tell whether a failure says that its call certainly was not run, that time."""
    if isinstance(error, WorkerLost):
        return not error.may_have_started
    return isinstance(error, ConnectFailed | Overloaded | ShuttingDown | Unauthorized)
