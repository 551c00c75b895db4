"""The time that calls have, and what happens when it is over."""

from __future__ import annotations

import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.deadlines import Deadlines
from taskd.errors import Cancelled
from taskd.functions import Function, Kind
from taskd.wire import Terms
from tests.support import Loop, new_slot


class DeadlinesTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.slot = new_slot()
        self.deadlines = Deadlines(self.loop, self.slot, self.loop.seconds)
        self.replies: list[bytes] = []
        self.abandoned: list[Call] = []

    def call(
        self,
        *,
        limit: float | None = None,
        timeout: float | None = None,
        began: bool = False,
    ) -> Call:
        """Make a call whose request has come now."""
        call = Call(
            Function("work", lambda: None, Kind.THREAD, limit),
            [],
            {},
            "1",
            Terms(timeout),
            self.ended,
            None,
        )
        call.abandon = self.abandoned.append
        if timeout is not None:
            call.deadline = self.loop.seconds() + timeout
        if began:
            call.began = self.loop.seconds()
        return call

    def ended(self, call: Call) -> None:
        assert call.reply is not None
        self.replies.append(call.reply)

    @property
    def errors(self) -> list[Any]:
        """The code and the message of each reply."""
        errors = [json.loads(reply)["error"] for reply in self.replies]
        return [(error["code"], error["message"]) for error in errors]

    @property
    def shown(self) -> float:
        """In how many seconds the shown task must have ended, or 0.0."""
        return self.slot.due - self.loop.seconds() if self.slot.due else 0.0


class KeepTests(DeadlinesTestCase):
    def test_a_callers_time(self) -> None:
        """A caller's time is over so long after its request, not before, and ends the call."""
        call = self.call(timeout=5)
        self.deadlines.keep(call)
        self.loop.advance(4.75)
        self.assertEqual(self.errors, [])
        self.loop.advance(0.25)
        self.assertEqual(self.errors, [("time-limit", "work was not done within 5 s")])
        self.assertEqual(self.abandoned, [call])
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_functions_limit(self) -> None:
        """A function's own limit ends its call, and is named."""
        self.deadlines.keep(self.call(limit=2, began=True))
        self.loop.advance(1.75)
        self.assertEqual(self.errors, [])
        self.loop.advance(0.25)
        self.assertEqual(self.errors, [("time-limit", "work was not done within 2 s")])

    def test_the_limit_runs_from_the_beginning(self) -> None:
        """A function's limit counts from when its call began, not from when that was taken on."""
        call = self.call(limit=2)
        self.deadlines.keep(call)
        self.loop.advance(1.5)
        call.began = self.loop.seconds()
        self.loop.advance(1.75)
        self.assertEqual(self.errors, [])
        self.loop.advance(0.25)
        self.assertEqual(len(self.errors), 1)

    def test_what_has_not_begun_has_all_its_limit(self) -> None:
        """A call that waits for a thread does not come to its function's limit."""
        call = self.call(limit=2)
        self.deadlines.keep(call)
        for _ in range(5):
            self.loop.advance(2)
        self.assertEqual(self.errors, [])
        self.assertIsNotNone(call.timer)

    def test_a_callers_time_runs_while_it_waits(self) -> None:
        """A caller's time counts from the request, though the call has never begun."""
        self.deadlines.keep(self.call(limit=2, timeout=5))
        self.loop.pump([2, 2, 0.75])
        self.assertEqual(self.errors, [])
        self.loop.advance(0.25)
        self.assertEqual(self.errors, [("time-limit", "work was not done within 5 s")])

    def test_whatever_comes_first(self) -> None:
        """Of a caller's time and a function's limit the earlier one ends the call, and is named."""
        for limit, timeout, least in ((2, 5, 2), (5, 2, 2), (3, 3, 3)):
            self.replies.clear()
            self.deadlines.keep(self.call(limit=limit, timeout=timeout, began=True))
            self.loop.advance(least - 0.25)
            self.assertEqual(self.errors, [])
            self.loop.advance(0.25)
            self.assertEqual(self.errors, [("time-limit", f"work was not done within {least} s")])

    def test_a_time_that_is_over_already(self) -> None:
        """A call whose time is over when it is taken on ends at once."""
        call = self.call(timeout=1)
        self.loop.advance(1)
        self.deadlines.keep(call)
        self.assertEqual(len(self.errors), 1)
        self.assertIsNone(call.timer)

    def test_an_end_in_time(self) -> None:
        """A call that has ended leaves no timer behind."""
        call = self.call(timeout=5)
        self.deadlines.keep(call)
        call.end(b"1\n")
        self.assertEqual(self.loop.getDelayedCalls(), [])
        self.assertIsNone(call.timer)

    def test_a_cancel_in_time(self) -> None:
        """A call that was cancelled does not come to its limit as well."""
        call = self.call(timeout=5)
        self.deadlines.keep(call)
        call.fail(Cancelled("taken back"))
        self.loop.advance(9)
        self.assertEqual(self.errors, [("cancelled", "taken back")])


class KeepCallersTests(DeadlinesTestCase):
    def test_a_callers_time(self) -> None:
        """A call that is run elsewhere ends with its caller's time."""
        call = self.call(timeout=5, limit=2)
        self.deadlines.keep_callers(call)
        self.loop.pump([2, 2, 0.75])
        self.assertEqual(self.errors, [])
        self.loop.advance(0.25)
        self.assertEqual(self.errors, [("time-limit", "work was not done within 5 s")])
        self.assertEqual(self.abandoned, [call])

    def test_no_callers_time(self) -> None:
        """A call that is run elsewhere, and whose caller set no time, is left to others."""
        call = self.call(limit=2)
        self.deadlines.keep_callers(call)
        self.assertIsNone(call.timer)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_time_that_is_over_already(self) -> None:
        """A call whose caller's time is over when it is handed over ends at once."""
        call = self.call(timeout=1)
        self.loop.advance(1)
        self.deadlines.keep_callers(call)
        self.assertEqual(len(self.errors), 1)


class ShowTests(DeadlinesTestCase):
    def test_nothing_is_shown(self) -> None:
        """A fresh slot shows no time."""
        self.assertEqual(self.slot.due, 0.0)

    def test_what_is_shown(self) -> None:
        """The time is shown at which a call must have ended: its function's or its caller's."""
        for limit, timeout, due in ((2, None, 2), (None, 5, 5), (2, 5, 2), (5, 2, 2)):
            call = self.call(limit=limit, timeout=timeout, began=True)
            self.deadlines.show(call, self.loop.seconds())
            self.assertEqual(self.shown, due)
            self.deadlines.forget(call)
            self.assertEqual(self.slot.due, 0.0)

    def test_the_earliest_is_shown(self) -> None:
        """Of several calls the one is shown that must end first, until it is forgotten."""
        calls = [self.call(limit=limit, began=True) for limit in (3, 2, 4)]
        for call in calls:
            self.deadlines.show(call, self.loop.seconds())
        self.assertEqual(self.shown, 2)
        self.deadlines.forget(calls[1])
        self.assertEqual(self.shown, 3)
        self.deadlines.forget(calls[2])
        self.assertEqual(self.shown, 3)
        self.deadlines.forget(calls[0])
        self.assertEqual(self.shown, 0.0)

    def test_forgetting_what_was_not_shown(self) -> None:
        """To forget a call that was not shown changes nothing."""
        shown, other = self.call(limit=2, began=True), self.call(limit=1, began=True)
        self.deadlines.show(shown, self.loop.seconds())
        self.deadlines.forget(other)
        self.assertEqual(self.shown, 2)
        self.deadlines.forget(shown)
        self.deadlines.forget(shown)
        self.assertEqual(self.slot.due, 0.0)

    def test_the_end_is_no_longer_shown(self) -> None:
        """A call that has come to its limit is not shown any more."""
        call = self.call(limit=2, began=True)
        self.deadlines.keep(call)
        self.deadlines.show(call, self.loop.seconds())
        self.loop.advance(2)
        self.assertEqual(len(self.errors), 1)
        self.assertEqual(self.slot.due, 0.0)
