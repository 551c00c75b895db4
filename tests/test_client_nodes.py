"""A client of several daemons: who is asked, who is left out, and what is sent again."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError
from twisted.trial.unittest import SynchronousTestCase

from taskd.client import TaskClient, call_once
from taskd.errors import (
    ConnectFailed,
    ConnectionLost,
    Overloaded,
    TaskFailed,
    TimeLimitExceeded,
    Unauthorized,
)
from tests.support import Loop, ScriptedDaemon, ScriptedEndpoint

_DEAD = ConnectError(string="nobody listens there")
_STOPS = {"code": "shutting-down", "message": "the daemon is stopping"}
_FULL = {"code": "overloaded", "message": "too many tasks wait", "retry_after": 2}
_LOW = 0.0
"""What the dice show, mostly: the first daemon begins, and delays are nothing."""

_HALF = 0.5


class NodesTestCase(SynchronousTestCase):
    nodes = 3
    jitter = _HALF

    def setUp(self) -> None:
        self.loop = Loop()
        self.endpoints = [ScriptedEndpoint() for _ in range(self.nodes)]
        self.client = self.made()

    def made(self, **options: Any) -> TaskClient:
        options = {"jitter": self.throw, **options}
        return TaskClient(self.loop, self.endpoints, **options)

    def throw(self) -> float:
        """Throw the dice: low for who begins, so that it is the first daemon; then half."""
        value, self.jitter_now = getattr(self, "jitter_now", _LOW), self.jitter
        return value

    def connect_all(self) -> list[ScriptedDaemon]:
        """Have one connection to each daemon; every one has answered a call."""
        calls = [self.client.call("hello", n) for n in range(self.nodes)]
        daemons = [endpoint.accept() for endpoint in self.endpoints]
        for daemon in daemons:
            self.answer(daemon)
        for called in calls:
            self.successResultOf(called)
        return daemons

    def answer(self, daemon: ScriptedDaemon, number: int = -1, **reply: Any) -> None:
        """Answer a request, by default the latest."""
        daemon.send(id=daemon.requests[number]["id"], **(reply or {"result": "done"}))

    def in_flight(self, daemons: list[ScriptedDaemon]) -> list[int]:
        return [daemon.client.in_flight for daemon in daemons]

    def attempts(self) -> list[int]:
        return [len(endpoint.attempts) for endpoint in self.endpoints]

    def assertNothingIsLeft(self) -> None:
        self.assertEqual(self.loop.getDelayedCalls(), [])
        self.assertEqual([e.open_attempts for e in self.endpoints], [[]] * self.nodes)


class BalanceTests(NodesTestCase):
    def test_endpoints(self) -> None:
        """One endpoint or several are taken, and none is refused."""
        for endpoint in (
            "tcp:127.0.0.1:1",
            ["tcp:127.0.0.1:1"],
            ("tcp:127.0.0.1:1", "tcp:127.0.0.1:2"),
        ):
            TaskClient(self.loop, endpoint)
        for endpoint in ([], ["tcp:127.0.0.1:1", "nonsense"]):
            with self.assertRaises(ValueError):
                TaskClient(self.loop, endpoint)

    def test_each_is_connected_to(self) -> None:
        """The first calls go to one daemon each, and the pool is one of each daemon."""
        for expected in ([1, 0, 0], [1, 1, 0], [1, 1, 1]):
            self.client.call("f")
            self.assertEqual(self.attempts(), expected)
        daemons = [endpoint.accept() for endpoint in self.endpoints]
        self.assertEqual(self.in_flight(daemons), [1, 1, 1])
        for _ in range(20):
            self.client.call("f")
        for number, _ in enumerate(self.endpoints):
            while self.endpoints[number].open_attempts:
                self.endpoints[number].accept(self.endpoints[number].open_attempts[0])
                self.client.call("f")
        self.assertEqual(max(self.attempts()), 4)

    def test_the_least_loaded(self) -> None:
        """A call goes to the daemon with the fewest calls in flight, or else in turn."""
        daemons = self.connect_all()
        for _ in range(6):
            self.client.call("f")
        self.assertEqual(self.in_flight(daemons), [2, 2, 2])
        self.answer(daemons[1])
        self.client.call("f")
        self.assertEqual(self.in_flight(daemons), [2, 2, 2])

    def test_where_it_begins(self) -> None:
        """With which daemon a client begins is left to the dice."""
        for dice, first in ((0.0, 0), (0.4, 1), (0.99, 2)):
            self.endpoints = [ScriptedEndpoint() for _ in range(3)]
            self.made(jitter=lambda dice=dice: dice).call("f")
            self.assertEqual(self.attempts().index(1), first)

    def test_no_call_waits_for_another_connection(self) -> None:
        """While a connection to another daemon is made, calls go where one stands."""
        self.client.call("f")
        daemon = self.endpoints[0].accept()
        self.client.call("g")
        self.assertEqual(self.attempts(), [1, 1, 0])
        self.assertEqual(daemon.client.in_flight, 2)


class EjectionTests(NodesTestCase):
    def test_one_that_refuses(self) -> None:
        """A call goes to the next daemon at once when the first cannot be reached."""
        called = self.client.call("f")
        self.endpoints[0].refuse(_DEAD)
        self.assertEqual(self.attempts(), [1, 1, 0])
        self.answer(self.endpoints[1].accept())
        self.assertEqual(self.successResultOf(called), "done")

    def test_one_that_hangs(self) -> None:
        """A call does not wait for one daemon's connection alone: the others are tried in turn."""
        called = self.client.call("f")
        for expected in ([1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]):
            self.assertEqual(self.attempts(), expected)
            self.loop.advance(0.25)
        self.answer(self.endpoints[2].accept())
        self.assertEqual(self.successResultOf(called), "done")

    def test_none_can_be_reached(self) -> None:
        """While all are out a call waits for as long as it may, and each is tried again."""
        called = self.client.call("f")
        for endpoint in self.endpoints:
            endpoint.refuse(_DEAD)
        for _ in range(95):
            self.loop.advance(0.1)
            for endpoint in self.endpoints:
                if endpoint.open_attempts:
                    endpoint.refuse(_DEAD, endpoint.open_attempts[0])
        self.assertNoResult(called)
        self.assertGreaterEqual(min(self.attempts()), 5)
        self.loop.advance(0.6)
        self.failureResultOf(called, ConnectFailed)
        self.successResultOf(self.client.close())
        self.assertNothingIsLeft()

    def test_one_comes_back(self) -> None:
        """What waits while all are out is sent to the first that is back."""
        called = self.client.call("f")
        for endpoint in self.endpoints:
            endpoint.refuse(_DEAD)
        self.loop.advance(0.06)
        self.assertEqual(self.attempts(), [2, 2, 2])
        self.answer(self.endpoints[2].accept())
        self.assertEqual(self.successResultOf(called), "done")

    def test_one_that_loses_connections(self) -> None:
        """A daemon whose connection was lost gets nothing for a while, and then is tried."""
        daemons = self.connect_all()
        daemons[1].hang_up()
        for _ in range(4):
            self.client.call("f")
        self.assertEqual(self.attempts()[1], 1)
        self.assertEqual(self.in_flight([daemons[0], daemons[2]]), [2, 2])
        self.loop.advance(0.06)
        self.client.call("f")
        self.assertEqual(self.attempts()[1], 2)
        again = self.endpoints[1].accept()
        self.client.call("f")
        self.assertEqual(again.client.in_flight, 1)

    def test_one_that_is_silent(self) -> None:
        """A daemon that lets a call's time pass gets nothing until it has said something."""
        daemons = self.connect_all()
        called = self.client.call("f", timeout=1)
        self.loop.advance(1.3)
        self.failureResultOf(called, TimeLimitExceeded)
        before = len(daemons[0].requests)
        for _ in range(6):
            self.client.call("f")
        self.assertEqual(len(daemons[0].requests), before)
        self.answer(daemons[0], result=False)
        self.client.call("f")
        self.assertEqual(len(daemons[0].requests), before + 1)

    def test_all_are_silent(self) -> None:
        """When every daemon is silent a call waits for a sign of life from one of them."""
        daemons = self.connect_all()
        for _ in range(3):
            self.client.call("f", timeout=1).addErrback(lambda _: None)
        self.loop.advance(1.3)
        called = self.client.call("g")
        self.assertNoResult(called)
        self.answer(daemons[2], result=False)
        self.loop.advance(0.25)
        self.answer(daemons[2])
        self.assertEqual(self.successResultOf(called), "done")

    def test_one_that_stops(self) -> None:
        """What a stopping daemon refuses another one does; what it runs is answered."""
        daemons = self.connect_all()
        calls = [self.client.call("f", n) for n in range(6)]
        self.answer(daemons[0], error=_STOPS)
        self.assertNoResult(calls[3])
        self.assertEqual(self.in_flight(daemons), [1, 3, 2])
        for _ in range(4):
            self.client.call("f")
        self.assertEqual(sorted(self.in_flight(daemons)), [1, 4, 5])
        self.answer(daemons[0], -2, result="run")
        self.assertEqual(self.successResultOf(calls[0]), "run")

    def test_all_stop(self) -> None:
        """When all stop a call waits for one that comes back."""
        daemons = self.connect_all()
        called = self.client.call("f")
        for number in range(3):
            self.assertNoResult(called)
            at = next(d for d in daemons if d.client.in_flight)
            self.answer(at, error=_STOPS)
            self.assertEqual(sum(self.in_flight(daemons)), 1 if number < 2 else 0)
        self.assertNoResult(called)
        self.loop.advance(0.06)
        self.answer(self.endpoints[0].accept())
        self.assertEqual(self.successResultOf(called), "done")

    def test_goodbye(self) -> None:
        """What crosses a daemon's goodbye is sent to another, as it never began."""
        daemons = self.connect_all()
        calls = [self.client.call("f", n) for n in range(3)]
        daemons[1].send(error=_STOPS)
        self.client.call("g")
        self.assertEqual(daemons[1].client.in_flight, 1)
        daemons[1].hang_up()
        self.assertEqual(self.in_flight(daemons), [2, 0, 2])
        for daemon in (daemons[0], daemons[2]):
            for number in range(1, len(daemon.requests)):
                self.answer(daemon, number)
        for called in calls:
            self.assertEqual(self.successResultOf(called), "done")

    def test_an_overloaded_one(self) -> None:
        """What one daemon has no room for another does, and it rests as long as it asks."""
        daemons = self.connect_all()
        called = self.client.call("f")
        self.answer(daemons[0], error=_FULL)
        self.assertEqual(self.in_flight(daemons), [0, 1, 0])
        for _ in range(3):
            self.client.call("f")
        self.assertEqual(self.in_flight(daemons)[0], 0)
        self.loop.advance(2.1)
        self.client.call("f")
        self.assertEqual(self.in_flight(daemons)[0], 1)
        self.answer(daemons[1], 1)
        self.assertEqual(self.successResultOf(called), "done")

    def test_all_are_overloaded(self) -> None:
        """When nobody has room a call fails at once, and tells for how long to stay away."""
        daemons = self.connect_all()
        for expected_tries in (3, 1):
            before = sum(len(daemon.requests) for daemon in daemons)
            called = self.client.call("f")
            while not called.called or isinstance(called.result, Deferred):
                at = [daemon for daemon in daemons if daemon.client.in_flight]
                if not at:
                    break
                self.answer(at[0], error=_FULL)
            self.assertEqual(self.failureResultOf(called, Overloaded).value.retry_after, 2)
            tries = sum(len(daemon.requests) for daemon in daemons) - before
            self.assertEqual(tries, expected_tries)

    def test_one_that_does_not_know_us(self) -> None:
        """A call that one daemon refuses, for it does not know the token, another one runs."""
        self.jitter_now = _LOW
        self.client = self.made(token="secret")
        called = self.client.call("f")
        refusing = self.endpoints[0].accept()
        refusing.send(id=0, error={"code": "unauthorized", "message": "nobody has this token"})
        refusing.hang_up()
        self.assertNoResult(called)
        daemon = self.endpoints[1].accept()
        self.answer(daemon)
        self.assertEqual(self.successResultOf(called), "done")

    def test_nobody_knows_us(self) -> None:
        """When every daemon refuses the token the call fails by their words, without a wait."""
        self.jitter_now = _LOW
        self.client = self.made(token="secret")
        called = self.client.call("f")
        for endpoint in self.endpoints:
            daemon = endpoint.accept()
            daemon.send(id=0, error={"code": "unauthorized", "message": "nobody has this token"})
            daemon.hang_up()
        self.failureResultOf(called, Unauthorized)

    def test_other_failures(self) -> None:
        """What a task or its caller has done wrong is wrong everywhere, and is not sent again."""
        daemons = self.connect_all()
        for code, kind in (("task-failed", TaskFailed), ("time-limit", TimeLimitExceeded)):
            called = self.client.call("f")
            at = next(daemon for daemon in daemons if daemon.client.in_flight)
            self.answer(at, error={"code": code, "message": ""})
            self.failureResultOf(called, kind)


class AgainTests(NodesTestCase):
    """Calls in flight on a daemon that is lost."""

    def setUp(self) -> None:
        super().setUp()
        self.daemons = self.connect_all()

    def test_not_idempotent(self) -> None:
        """A call that may have been run is not sent again by itself."""
        called = self.client.call("f")
        self.daemons[0].hang_up()
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)
        self.assertEqual(self.in_flight(self.daemons[1:]), [0, 0])

    def test_idempotent(self) -> None:
        """One that may be run twice is, elsewhere, and its progress begins anew."""
        told: list[Any] = []
        called = self.client.call_with(
            "f", idempotent=True, on_progress=lambda done, *_: told.append(done)
        )
        self.daemons[0].send(id=self.daemons[0].requests[-1]["id"], progress={"done": 2})
        self.daemons[0].hang_up()
        self.assertEqual(self.in_flight(self.daemons[1:]), [1, 0])
        self.daemons[1].send(id=self.daemons[1].requests[-1]["id"], progress={"done": 1})
        self.answer(self.daemons[1])
        self.assertEqual((self.successResultOf(called), told), ("done", [2, 1]))

    def test_once_for_each(self) -> None:
        """One that ends each daemon which runs it fails after the last has been tried."""
        called = self.client.call_with("f", idempotent=True)
        for daemon in self.daemons:
            self.assertNoResult(called)
            daemon.hang_up()
        self.assertNoResult(called)
        self.loop.advance(0.06)
        self.endpoints[0].accept().hang_up()
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_its_time(self) -> None:
        """It is sent again with what is left of its time, and not when nothing is."""
        called = self.client.call_with("f", timeout=5, idempotent=True)
        self.loop.advance(3)
        self.daemons[0].hang_up()
        self.assertEqual(self.daemons[1].requests[-1]["timeout"], 2)
        self.loop.advance(2.1)
        self.daemons[1].hang_up()
        self.failureResultOf(called, ConnectionLost)

    def test_cancel(self) -> None:
        """It is cancelled where it is, whatever it has gone through."""
        called = self.client.call_with("f", idempotent=True)
        self.daemons[0].hang_up()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.assertEqual(self.daemons[1].requests[-1]["function"], "taskd.cancel")

    def test_cancel_while_all_are_out(self) -> None:
        """It is cancelled while it waits for a daemon that comes back, and is sent no more."""
        called = self.client.call_with("f", idempotent=True)
        for daemon in self.daemons:
            daemon.hang_up()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.loop.advance(1)
        self.assertEqual(self.attempts(), [1, 1, 1])
        self.assertNothingIsLeft()

    def test_close(self) -> None:
        """Closing waits for it, then closes every connection."""
        called = self.client.call_with("f", idempotent=True)
        closed = self.client.close()
        self.daemons[0].hang_up()
        self.assertNoResult(closed)
        self.answer(self.daemons[1])
        self.assertEqual(self.successResultOf(called), "done")
        for daemon in self.daemons[1:]:
            self.assertNoResult(closed)
            daemon.hang_up()
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_close_while_all_are_out(self) -> None:
        """Closing while no daemon is there comes to its end with the calls that wait."""
        called = self.client.call_with("f", idempotent=True)
        closed = self.client.close()
        for daemon in self.daemons:
            daemon.hang_up()
        self.loop.advance(10)
        self.failureResultOf(called, ConnectionLost)
        self.successResultOf(closed)
        self.assertNothingIsLeft()


class OneStopsTests(NodesTestCase):
    nodes = 1

    def test_a_list_of_one(self) -> None:
        """A list of one endpoint is as that one: what it has no room for is told at once."""
        (daemon,) = self.connect_all()
        called = self.client.call("f")
        self.answer(daemon, error=_FULL)
        self.failureResultOf(called, Overloaded)


class OnceTests(NodesTestCase):
    def test_call_once(self) -> None:
        """A single call goes to the next daemon if one is not there, and leaves nothing behind."""
        called = call_once(self.loop, self.endpoints, "f", idempotent=True)
        first = next(n for n, count in enumerate(self.attempts()) if count)
        self.endpoints[first].refuse(_DEAD)
        second = next(n for n, e in enumerate(self.endpoints) if e.open_attempts)
        daemon = self.endpoints[second].accept()
        self.answer(daemon)
        daemon.hang_up()
        self.assertEqual(self.successResultOf(called), "done")
        self.assertNothingIsLeft()
