"""The connections to one daemon, of those that a client has."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectError
from twisted.trial.unittest import SynchronousTestCase

from taskd.balance import Tier
from taskd.errors import ConnectFailed, Overloaded, ShuttingDown, TimeLimitExceeded
from taskd.node import Node
from taskd.wire import NO_TERMS, Terms
from tests.support import Loop, ScriptedDaemon, ScriptedEndpoint

_DEAD = ConnectError(string="nobody listens there")


class _Owner:
    """A client that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.has_closed = False

    def opened(self) -> None:
        self.told.append("opened")

    def not_opened(self) -> None:
        self.told.append("not opened")

    def refused(self) -> None:
        self.told.append("refused")

    def back(self, node: Node) -> None:
        self.told.append(f"{node.number} is back")

    def wants_no_more(self) -> bool:
        return self.has_closed


class NodeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.endpoint = ScriptedEndpoint()
        self.owner = _Owner()
        self.node = self.made()

    def made(self, *, has_others: bool = True, pool: int = 2) -> Node:
        return Node(self.loop, 7, self.endpoint, None, pool, has_others, lambda: 0.5, self.owner)

    def connect(self) -> ScriptedDaemon:
        self.node.open()
        return self.endpoint.accept()

    def call(self, place: int = 0) -> Any:
        return self.node.ways[place].call("f", [], NO_TERMS, None)

    def refuse(self, daemon: ScriptedDaemon, code: str, **more: Any) -> None:
        error = {"code": code, "message": "", **more}
        daemon.send(id=daemon.requests[-1]["id"], error=error)

    def test_load(self) -> None:
        """Its load tells of the calls in flight, and of connections that are being made as well."""
        self.assertEqual(self.node.load, (7, Tier.SERVES, 0, 0))
        self.connect()
        self.node.open()
        self.call().addErrback(lambda _: None)
        self.assertEqual(self.node.load, (7, Tier.SERVES, 1, 2))
        self.assertEqual(self.owner.told, ["opened"])

    def test_its_first_connection(self) -> None:
        """With others beside it, it must answer one attempt before there is a second; then not."""
        for _ in range(3):
            self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.endpoint.accept()
        for _ in range(3):
            self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 2)
        self.node = self.made(has_others=False)
        for _ in range(3):
            self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 4)

    def test_a_failed_attempt(self) -> None:
        """After a failed attempt it is out until the delay is over, and its owner is told."""
        self.node.open()
        self.endpoint.refuse(_DEAD)
        self.assertEqual(self.node.load.tier, Tier.OUT)
        self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.loop.advance(0.06)
        self.assertEqual(self.owner.told, ["not opened", "7 is back"])
        self.assertEqual(self.node.load.tier, Tier.SERVES)
        self.assertIs(self.node.last_failure, _DEAD)

    def test_a_lost_connection(self) -> None:
        """A loss takes it out for a moment if there are others; its other connections stay."""
        for has_others in (True, False):
            self.node = self.made(has_others=has_others)
            first, second = self.connect(), self.connect()
            for daemon in (first, second):
                daemon.send(error={"code": "internal", "message": "hello"})
            first.hang_up()
            self.assertEqual((self.node.is_out, len(self.node.ways)), (has_others, 1))
            self.loop.advance(1)
            self.assertFalse(self.node.is_out)

    def test_a_daemon_that_stops(self) -> None:
        """One that stops is asked no more on any connection; what it has begun it may answer."""
        first, _ = self.connect(), self.connect()
        running, refused = self.call(), self.call()
        self.refuse(first, "shutting-down")
        self.failureResultOf(refused, ShuttingDown)
        self.assertEqual((self.node.ways, self.node.load.tier), ([], Tier.OUT))
        self.assertFalse(first.transport.disconnecting)
        first.send(id=first.requests[0]["id"], result="done")
        self.assertTrue(first.transport.disconnecting)
        self.assertEqual(self.successResultOf(running), "done")
        self.loop.advance(0.06)
        again = self.connect()
        first.hang_up()
        self.assertEqual((self.node.load.tier, len(self.node.ways)), (Tier.SERVES, 1))
        again.hang_up()

    def serve(self, daemon: ScriptedDaemon) -> None:
        """Have a call over the first connection answered."""
        called = self.call()
        daemon.send(id=daemon.requests[-1]["id"], result="done")
        self.successResultOf(called)

    def test_a_late_refusal(self) -> None:
        """What was sent before a daemon stopped tells nothing of the one that has come since."""
        first = self.connect()
        refused, late = self.call(), self.call()
        self.refuse(first, "shutting-down")
        self.failureResultOf(late, ShuttingDown)
        self.loop.advance(0.06)
        self.connect()
        first.send(id=first.requests[0]["id"], error={"code": "shutting-down", "message": ""})
        self.failureResultOf(refused, ShuttingDown)
        self.assertEqual((len(self.node.ways), self.node.load.tier), (1, Tier.SERVES))

    def test_one_of_several_that_stops(self) -> None:
        """
        Without others only the connection over which it was said is used no more.

        It keeps what is in flight, and is closed then. A new one is made in its place.
        """
        self.node = self.made(has_others=False)
        first, _ = self.connect(), self.connect()
        self.serve(first)
        running, refused, late = self.call(), self.call(), self.call()
        self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 2)
        self.refuse(first, "shutting-down")
        self.failureResultOf(late, ShuttingDown)
        self.assertEqual((len(self.node.ways), self.node.is_out), (1, False))
        self.node.open()
        self.assertEqual(len(self.endpoint.attempts), 3)
        first.send(id=first.requests[2]["id"], error={"code": "shutting-down", "message": ""})
        self.failureResultOf(refused, ShuttingDown)
        self.assertFalse(first.transport.disconnecting)
        first.send(id=first.requests[1]["id"], result="done")
        self.assertEqual(self.successResultOf(running), "done")
        self.assertTrue(first.transport.disconnecting)
        first.hang_up()
        self.assertEqual((len(self.node.ways), self.node.is_out), (1, False))

    def test_a_new_connection_to_one_that_stops(self) -> None:
        """Who takes new connections only to refuse every call is connected to ever less."""
        self.node = self.made(has_others=False)
        for delay in (0.05, 0.1, 0.2, 0.4):
            daemon = self.connect()
            called = self.call()
            self.refuse(daemon, "shutting-down")
            self.failureResultOf(called, ShuttingDown)
            self.assertEqual((self.node.ways, self.node.is_out), ([], True))
            self.assertTrue(daemon.transport.disconnecting)
            daemon.hang_up()
            self.loop.advance(delay - 0.01)
            self.assertTrue(self.node.is_out)
            self.loop.advance(0.02)
            self.assertFalse(self.node.is_out)

    def test_goodbye(self) -> None:
        """A goodbye takes all its connections out of use, or that one if it has no others."""
        for has_others, left in ((True, 0), (False, 1)):
            self.node = self.made(has_others=has_others)
            first, _ = self.connect(), self.connect()
            self.serve(first)
            first.send(error={"code": "shutting-down", "message": "goodbye"})
            self.assertEqual((len(self.node.ways), self.node.is_out), (left, has_others))

    def test_an_overloaded_one(self) -> None:
        """One that is overloaded rests as long as it asks, if there are others."""
        for has_others, tier in ((True, Tier.RESTS), (False, Tier.SERVES)):
            self.node = self.made(has_others=has_others)
            daemon = self.connect()
            called = self.call()
            self.refuse(daemon, "overloaded", retry_after=2)
            self.failureResultOf(called, Overloaded)
            self.loop.advance(1.9)
            self.assertEqual(self.node.load.tier, tier)
            self.loop.advance(0.2)
            self.assertEqual(self.node.load.tier, Tier.SERVES)

    def test_in_doubt(self) -> None:
        """A connection that owes an answer is not used, until what is sent later is answered."""
        for has_others, left in ((True, 0), (False, 1)):
            self.node = self.made(has_others=has_others)
            daemon = self.connect()
            called = self.node.ways[0].call("f", [], Terms(timeout=1), None)
            self.loop.advance(1.3)
            self.failureResultOf(called, TimeLimitExceeded)
            self.assertEqual(len(self.node.ways), left)
            self.assertTrue(self.node.may_open)
            self.assertEqual(daemon.requests[-1]["function"], "taskd.cancel")
            daemon.send(id=daemon.requests[0]["id"], result="late")
            self.assertEqual(len(self.node.ways), left)
            daemon.send(id=daemon.requests[-1]["id"], result=False)
            self.assertEqual(len(self.node.ways), 1)

    def test_hopeless(self) -> None:
        """It is hopeless when it has refused us, and not when it is just not there."""
        self.node.open()
        self.endpoint.refuse(_DEAD)
        self.assertFalse(self.node.is_hopeless)
        self.node = Node(self.loop, 0, self.endpoint, "secret", 1, True, lambda: 0.5, self.owner)
        daemon = self.connect()
        self.assertFalse(self.node.is_hopeless)
        daemon.send(id=0, error={"code": "unauthorized", "message": "nobody has this token"})
        daemon.hang_up()
        self.assertTrue(self.node.is_hopeless)
        self.assertEqual(self.owner.told[-1], "refused")

    def test_close(self) -> None:
        """Closing ends attempts, delays, and connections, those of a goodbye too."""
        first = self.connect()
        first.send(error={"code": "shutting-down", "message": "goodbye"})
        self.loop.advance(0.06)
        second = self.connect()
        self.node.open()
        self.owner.has_closed = True
        closed = self.node.close()
        self.assertEqual(self.endpoint.open_attempts, [])
        for daemon in (first, second):
            self.assertNoResult(closed)
            self.assertTrue(daemon.transport.disconnecting)
            daemon.hang_up()
        self.successResultOf(closed)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_after_the_end(self) -> None:
        """A failure that nobody cares for any more begins no delay."""
        self.node.open()
        self.owner.has_closed = True
        self.endpoint.refuse(ConnectFailed("too late"))
        self.assertEqual(self.loop.getDelayedCalls(), [])
