"""What a caller asks for, until there is a connection to send it over."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.trial.unittest import SynchronousTestCase

from taskd.errand import Asked, Gate, Outstanding, stop, stopping
from taskd.errors import BadArguments, TimeLimitExceeded, UnknownFunction
from taskd.wire import NO_TERMS, Terms
from tests.support import Loop


class _Line:
    """A connection that keeps what it is to send."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def call(self, *call: Any) -> Deferred[Any]:
        self.calls.append(call)
        return succeed("sent")


class ErrandTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.line = _Line()
        self.gates: deque[Gate] = deque()

    def asked(self, args: Any = (), terms: Terms = NO_TERMS, function: Any = "f") -> Asked:
        return Asked(self.loop, function, args, terms, None)


class AskedTests(ErrandTestCase):
    def test_send(self) -> None:
        """What is asked for is sent as it is, a tuple as a list."""
        sent = self.asked((1, 2)).send(self.line)
        self.assertEqual(self.successResultOf(sent), "sent")
        self.assertEqual(self.line.calls, [("f", [1, 2], NO_TERMS, None)])

    def test_the_time_that_passed(self) -> None:
        """The limit is sent less the time that has passed, and never as nothing."""
        asked = self.asked(terms=Terms(timeout=5))
        for passed, left in ((2, 3), (2, 1), (9, 0.001)):
            self.loop.advance(passed)
            asked.send(self.line)
            self.assertEqual(self.line.calls[-1][2].timeout, left)

    def test_what_cannot_be_asked(self) -> None:
        """What no daemon would take is known before it is sent."""
        for asked, kind in (
            (self.asked(), type(None)),
            (self.asked(terms=Terms(timeout=-1)), ValueError),
            (self.asked(terms=Terms(priority=True)), ValueError),
            (self.asked(terms=Terms(ends_with_caller=1)), ValueError),  # type: ignore[arg-type]
            (self.asked("text"), BadArguments),
            (self.asked(function=5), UnknownFunction),
        ):
            self.assertIs(type(asked.failure), kind)

    def test_the_wait(self) -> None:
        """Whoever waits is sent over the connection that comes, in their order."""
        sent = [self.asked([n]).wait_in(self.gates) for n in range(3)]
        while self.gates:
            self.gates.popleft().callback(self.line)
        self.assertEqual([call[1] for call in self.line.calls], [[0], [1], [2]])
        self.assertEqual([self.successResultOf(called) for called in sent], ["sent"] * 3)

    def test_leaving(self) -> None:
        """Whoever is cancelled, or waits beyond the limit, waits no more and is never sent."""
        cancelled = self.asked().wait_in(self.gates)
        late = self.asked(terms=Terms(timeout=5)).wait_in(self.gates)
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        self.assertEqual(len(self.gates), 1)
        self.loop.advance(5)
        self.failureResultOf(late, TimeLimitExceeded)
        self.assertEqual((len(self.gates), self.line.calls), (0, []))
        self.assertEqual(self.loop.getDelayedCalls(), [])


class OutstandingTests(ErrandTestCase):
    def test_none_left(self) -> None:
        """Everybody who waits for the end of all calls is told when the last has fired."""
        outstanding = Outstanding()
        self.assertIsNone(self.successResultOf(outstanding.none_left()))
        calls: list[Deferred[Any]] = [Deferred(), Deferred()]
        results = [outstanding.add(called) for called in calls]
        waiting = [outstanding.none_left(), outstanding.none_left()]
        calls[0].callback("first")
        for waiter in waiting:
            self.assertNoResult(waiter)
        calls[1].errback(ValueError())
        for waiter in waiting:
            self.assertIsNone(self.successResultOf(waiter))
        self.assertEqual(self.successResultOf(results[0]), "first")
        self.failureResultOf(results[1], ValueError)


class TimerTests(ErrandTestCase):
    def test_stop(self) -> None:
        """A timer is stopped once, and one that is not there does no harm."""
        timer = self.loop.callLater(1, self.fail)
        for given in (timer, timer, None):
            stop(given)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_stopping(self) -> None:
        """A timer stops when its Deferred fires, and the result goes on."""
        deferred: Deferred[Any] = Deferred()
        stopping(self.loop.callLater(1, self.fail), deferred)
        deferred.callback("result")
        self.assertEqual(self.successResultOf(deferred), "result")
        self.assertEqual(self.loop.getDelayedCalls(), [])
