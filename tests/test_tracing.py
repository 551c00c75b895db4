"""Which call it is that something is logged of."""

from __future__ import annotations

from contextvars import copy_context
from threading import get_ident
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call, about
from taskd.functions import Function, Kind
from taskd.tracing import about_now, running, stack_of
from taskd.wire import NO_TERMS


def nothing() -> None:
    """Do nothing."""


class Home:
    """Where a call comes from."""

    def about(self) -> dict[str, str]:
        return {"connection": "10.0.0.1 port 5", "caller": "web"}


FUNCTION = Function("report", nothing, Kind.THREAD)
ABOUT = {"function": "report", "id": "7", "connection": "10.0.0.1 port 5", "caller": "web"}


def call() -> Call:
    """Make a call."""
    return Call(FUNCTION, [], {}, "7", NO_TERMS, lambda _: None, None, Home())


def call_at_once(function: Function, id_json: str, origin: Home | None) -> dict[str, str]:
    """Stand for ``Executor.call_now``, with a task that asks."""
    return (lambda: about_now({}, call_at_once.__code__))()


class AboutTests(SynchronousTestCase):
    def test_a_call(self) -> None:
        """Of a call it is told what was called, under which id, from where, and by whom."""
        self.assertEqual(call().about(), ABOUT)

    def test_what_is_not_known(self) -> None:
        """What a call has not is not told."""
        self.assertEqual(about(FUNCTION, "", None), {"function": "report"})

    def test_a_long_id(self) -> None:
        """Of a long id the beginning is told."""
        self.assertEqual(about(FUNCTION, "x" * 128, None)["id"], "x" * 128)
        self.assertEqual(about(FUNCTION, "x" * 129, None)["id"], "x" * 128 + "…")


class NowTests(SynchronousTestCase):
    def now(self, threads: Any = None) -> dict[str, str]:
        return about_now(threads or {}, call_at_once.__code__)

    def test_nobody(self) -> None:
        """Where no task runs there is no call."""
        self.assertEqual(self.now(), {})
        self.assertEqual(self.now({get_ident(): [None]}), {})

    def test_in_a_thread(self) -> None:
        """In a thread it is what the thread runs."""
        self.assertEqual(self.now({get_ident(): [call()], 0: [None]}), ABOUT)

    def test_in_a_context(self) -> None:
        """On the reactor it is what the context is of, and another context's is its own."""
        context = copy_context()
        context.run(running.set, call())
        self.assertEqual(context.run(self.now), ABOUT)
        self.assertEqual(self.now(), {})

    def test_at_once(self) -> None:
        """Of a function that is called at once, it is found on the stack."""
        self.assertEqual(call_at_once(FUNCTION, "7", Home()), ABOUT)
        self.assertEqual(call_at_once(FUNCTION, "", None), {"function": "report"})


class StackTests(SynchronousTestCase):
    def test_where_it_stands(self) -> None:
        """The stack is that of the thread which runs the call, and of no other."""
        mine = call()
        self.assertIn("test_where_it_stands", stack_of(mine, {get_ident(): [mine]}))
        self.assertEqual(stack_of(mine, {get_ident(): [call()]}), "")
        self.assertEqual(stack_of(mine, {1: [mine]}), "")
