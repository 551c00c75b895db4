"""
The time that calls have, and what happens when it is over.

A caller's time runs from the coming of its request. A function's own limit runs
from when it is called, which for a blocking one only its thread knows. Whatever
comes first ends the call; how its task is stopped is ``executor``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from twisted.internet.interfaces import IDelayedCall

from taskd.call import Call
from taskd.errors import TimeLimitExceeded
from taskd.slots import Slot

__all__ = ["Deadlines", "Timer"]


class Timer(Protocol):
    """What calls back later: a reactor, seen from here."""

    def callLater(  # noqa: N802, D102
        self, delay: float, f: Callable[..., object], /, *args: object
    ) -> IDelayedCall: ...


class Deadlines:
    """
    End the calls whose time is over.

    Args:
        loop: Calls back later.
        slot: Where it is shown until when the running task must have ended, so
            that the supervisor can act if this process cannot.
        clock: Gives CLOCK_MONOTONIC seconds.
    """

    def __init__(self, loop: Timer, slot: Slot, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._slot = slot
        self._clock = clock
        self._shown: dict[Call, float] = {}

    def keep(self, call: Call) -> None:
        """End a call if its time is over, else look again when it will be."""
        call.timer = None
        now = self._clock()
        due = self._due(call, now if call.began is None else call.began)
        if due > now:
            call.timer = self._loop.callLater(due - now, self.keep, call)
        else:
            self.forget(call)
            limit = call.function.timeout
            self._end(call, call.terms.timeout if limit is None or due == call.deadline else limit)

    def keep_callers(self, call: Call) -> None:
        """As ``keep``, for a call that is run elsewhere: its caller's time alone."""
        call.timer = None
        if call.deadline is None:
            return
        left = call.deadline - self._clock()
        if left > 0:
            call.timer = self._loop.callLater(left, self.keep_callers, call)
        else:
            self._end(call, call.terms.timeout)

    def _end(self, call: Call, seconds: float | None) -> None:
        call.fail(TimeLimitExceeded(f"{call.function.name} was not done within {seconds:g} s"))

    def _due(self, call: Call, began: float) -> float:
        """Tell when a call must have ended, if its function is called at *began*."""
        limit, deadline = call.function.timeout, call.deadline
        due = math.inf if limit is None else began + limit
        return due if deadline is None else min(due, deadline)

    def show(self, call: Call, began: float) -> None:
        """Show until when a call must have ended; a thread may do this."""
        self._shown[call] = self._due(call, began)
        self._slot.must_end(min(list(self._shown.values())))

    def forget(self, call: Call) -> None:
        """Show it no longer; without effect if it was not shown."""
        if self._shown.pop(call, None) is not None:
            self._slot.must_end(min(list(self._shown.values()), default=0.0))
