"""One call in flight: it ends once, whoever ends it."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call, task_failed
from taskd.errors import (
    CallError,
    Cancelled,
    InternalError,
    NotJson,
    Overloaded,
    TimeLimitExceeded,
    WorkerLost,
)
from taskd.functions import Function, Kind
from taskd.wire import NO_TERMS, encode_error
from tests.support import log_of


def nothing() -> None:
    """Do nothing."""


class CallTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.ended: list[Call] = []
        function = Function("nothing", nothing, Kind.THREAD)
        self.call = Call(function, [], {}, "7", NO_TERMS, self.ended.append, None)

    def test_it_ends_once(self) -> None:
        """The first reply stays, and the call's end is told once."""
        self.call.end(b"first\n")
        self.call.end(b"second\n")
        self.call.fail(Cancelled("third"))
        self.assertEqual(self.call.reply, b"first\n")
        self.assertEqual(self.ended, [self.call])

    def test_the_reply_is_there_when_the_end_is_told(self) -> None:
        """Who is told of the end finds the reply."""
        seen: list[bytes | None] = []
        self.call.on_end = lambda call: seen.append(call.reply)
        self.call.end(b"reply\n")
        self.assertEqual(seen, [b"reply\n"])

    def test_how_it_ended(self) -> None:
        """Who is told of the end finds what its caller is told, and how long it ran."""
        self.call.end(b"done\n", 0.5)
        self.call.fail(Cancelled("later"))
        self.assertEqual((self.call.code, self.call.ran_seconds(9.0)), (None, 0.5))

    def test_how_it_failed(self) -> None:
        """A call that was not begun has not run; one that fails has run until then."""
        seen: list[tuple[str | None, float | None]] = []
        self.call.on_end = lambda call: seen.append((call.code, call.ran_seconds(9.0)))
        self.call.fail(Cancelled("taken back"))
        self.call.reply, self.call.began = None, 7.5
        self.call.fail(TimeLimitExceeded("too long"))
        self.assertEqual(seen, [("cancelled", None), ("time-limit", 1.5)])

    def test_a_failure_carries_the_id(self) -> None:
        """A call that fails ends in its error, under its id."""
        error = Cancelled("taken back")
        self.call.fail(error)
        self.assertEqual(self.call.reply, encode_error("7", error))

    def test_a_failure_abandons_the_task_once(self) -> None:
        """The task is stopped by the first failure, and by no later one."""
        abandoned: list[Call] = []
        self.call.abandon = abandoned.append
        self.call.fail(Cancelled("once"))
        self.call.fail(Cancelled("twice"))
        self.assertEqual(abandoned, [self.call])

    def test_an_ordinary_end_abandons_nothing(self) -> None:
        """A task that is done is not stopped."""
        abandoned: list[Call] = []
        self.call.abandon = abandoned.append
        self.call.end(b"done\n")
        self.assertEqual(abandoned, [])

    def test_its_timer_goes_with_it(self) -> None:
        """The time limit of a call that has ended is no longer kept."""
        clock = Clock()
        self.call.timer = clock.callLater(5, self.fail)
        self.call.end(b"done\n")
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_its_time_can_be_stopped(self) -> None:
        """A call whose timer is stopped is in flight without a limit, and can be stopped again."""
        clock = Clock()
        self.call.timer = clock.callLater(5, self.fail)
        for _ in range(2):
            self.call.stop_timer()
            self.assertIsNone(self.call.timer)
        self.assertEqual(clock.getDelayedCalls(), [])
        self.assertIsNone(self.call.reply)

    def test_the_end_is_told_before_the_task_is_stopped(self) -> None:
        """Who stops the task of a call that failed finds that it has been answered."""
        told: list[str] = []
        self.call.on_end = lambda call: told.append("end")
        self.call.abandon = lambda call: told.append(f"abandon {call.reply is not None}")
        self.call.fail(Cancelled("taken back"))
        self.assertEqual(told, ["end", "abandon True"])

    def test_its_timer_can_end_it(self) -> None:
        """A call can be ended by the very timer that it would stop."""
        clock = Clock()
        self.call.timer = clock.callLater(5, self.call.fail, Cancelled("too late"))
        clock.advance(5)
        self.assertEqual(self.ended, [self.call])


class LogTests(SynchronousTestCase):
    def logged(self, error: CallError) -> list[str]:
        """Give what is logged of a call that fails, and then once more."""
        log = log_of(self, "call")
        call = Call(Function("f", nothing, Kind.THREAD), [], {}, "", NO_TERMS, id, None)
        call.fail(error)
        call.fail(error)
        return log

    def test_failures(self) -> None:
        """That a call has failed without its task's doing is logged once, as loud as it is bad."""
        for error, level in (
            (Cancelled("{x}"), "info"),
            (TimeLimitExceeded("{x}"), "warn"),
            (WorkerLost("{x}"), "warn"),
            (InternalError("{x}"), "error"),
        ):
            self.assertEqual(self.logged(error), [f"{level}: {{x}}"])

    def test_what_is_not_logged(self) -> None:
        """What callers can bring about without end is not logged for each call."""
        self.assertEqual(self.logged(Overloaded("full", retry_after=1.0)), [])

    def test_an_ordinary_end(self) -> None:
        """A call that ends in a reply leaves no line."""
        log = log_of(self, "call")
        Call(Function("f", nothing, Kind.THREAD), [], {}, "", NO_TERMS, id, None).end(b"1\n")
        self.assertEqual(log, [])


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class TaskFailedTests(SynchronousTestCase):
    def failed(self, error: BaseException, debug: bool = False) -> dict[str, Any]:
        """Raise an error and describe it."""
        try:
            raise error
        except BaseException as raised:
            described = task_failed("render", raised, debug)
        return {"message": described.message, **described.details}

    def test_the_exception_is_named(self) -> None:
        """The caller is told the exception's class and text, and nothing else."""
        self.assertEqual(
            self.failed(ValueError("no such page")),
            {"message": "no such page", "type": "ValueError"},
        )

    def test_a_message_is_never_empty(self) -> None:
        """An exception without a text is described by its class."""
        self.assertEqual(self.failed(KeyboardInterrupt())["message"], "KeyboardInterrupt")

    def test_a_message_that_cannot_be_had(self) -> None:
        """An exception whose text cannot be had is described all the same."""
        self.assertEqual(
            self.failed(Unspeakable()),
            {"message": "(its message cannot be shown)", "type": "Unspeakable"},
        )

    def test_a_long_message_is_cut(self) -> None:
        """No more than 8192 characters of an exception's text are told."""
        self.assertEqual(self.failed(ValueError("x" * 10_000))["message"], "x" * 8192)

    def test_a_result_that_json_cannot_carry(self) -> None:
        """The caller learns which function returned something of which type."""
        told = self.failed(NotJson("the value is of type set"))["message"]
        self.assertEqual(told, "render returned what JSON cannot carry: the value is of type set")

    def test_the_traceback_is_for_debugging(self) -> None:
        """With debug the caller is told the traceback, which ends in the exception."""
        told = self.failed(ValueError("no such page"), debug=True)["traceback"]
        self.assertIn(__file__, told)
        self.assertTrue(told.endswith("ValueError: no such page\n"))
