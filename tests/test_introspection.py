"""What the daemon tells about itself."""

from __future__ import annotations

import os

from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from taskd.functions import Kind, Registry, label_of
from taskd.introspection import Introspection
from taskd.scoreboard import Scoreboard


class IntrospectionTests(SynchronousTestCase):
    def setUp(self) -> None:
        fd = Scoreboard.create(1)
        self.board = Scoreboard(fd)
        os.close(fd)
        self.introspection = Introspection(Registry())

    def serve(self) -> None:
        """Give it what a worker gives it."""
        self.introspection.scoreboard = self.board
        self.introspection.slot = self.board.slot(2)
        self.introspection.slot.open(4711, 1.0)

    def test_before_it_serves(self) -> None:
        """Before there is a worker there is nothing to tell but the version."""
        self.assertEqual(self.introspection.ping(), "pong")
        self.assertEqual(self.introspection.status(), {"version": __version__})
        self.assertEqual(self.introspection.failures(), [])

    def test_own_functions(self) -> None:
        """What callers can ask is named as the protocol says, and answers at once."""
        own = {function.name: function for function in self.introspection.own_functions()}
        names = ("failures", "functions", "ping", "status")
        self.assertEqual(sorted(own), [f"taskd.{name}" for name in names])
        self.assertEqual({function.kind for function in own.values()}, {Kind.REACTOR})
        self.assertEqual(
            own["taskd.failures"].signature, "(limit: 'int' = 50) -> 'list[dict[str, Any]]'"
        )

    def test_functions(self) -> None:
        """The status has what was counted of each function."""
        self.serve()
        self.board.tally(2).done(label_of("add"), 0.5)
        status = self.introspection.status()
        self.assertEqual(status["answered_by"], 2)
        self.assertEqual([(f["name"], f["done"]) for f in status["functions"]], [("add", 1)])

    def test_failures(self) -> None:
        """As many failures are listed as are asked for, 50 at most if it is not said how many."""
        self.serve()
        for number in range(5):
            self.board.slot(number).open(4711, 1.0)
            for at in range(16):
                self.board.failures(number).note(at, number, "add", "internal", None, "no")
        self.assertEqual(len(self.introspection.failures()), 50)
        for limit, expected in ((0, 0), (3, 3), (80, 80), (10**9, 80)):
            self.assertEqual(len(self.introspection.failures(limit)), expected)

    def test_what_is_no_limit(self) -> None:
        """What is no number of failures is refused."""
        self.serve()
        for limit in (-1, 1.5, "3", None, True):
            with self.assertRaises(ValueError):
                self.introspection.failures(limit)  # type: ignore[arg-type]
