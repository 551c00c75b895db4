"""What the processes of one gateway count, in memory that they share."""

from __future__ import annotations

import os

from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.figures import COUNTERS, GAUGES, Figures


class FiguresTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.fd = Figures.create(3)
        self.addCleanup(os.close, self.fd)
        self.rows = [Figures(self.fd, row) for row in range(3)]

    def test_nothing(self) -> None:
        """At the start every figure is zero."""
        self.assertEqual(self.rows[0].totals(), dict.fromkeys([*GAUGES, *COUNTERS], 0))

    def test_every_name(self) -> None:
        """Every figure has a place of its own, in every row."""
        names = [*GAUGES, *COUNTERS]
        for row, figures in enumerate(self.rows):
            for place, name in enumerate(names):
                figures.add(name, 100 * row + place)
        for row, figures in enumerate(self.rows):
            self.assertEqual(
                [figures.get(name) for name in names],
                [100 * row + place for place in range(len(names))],
            )
        self.assertEqual(
            self.rows[1].totals(), {name: 300 + 3 * place for place, name in enumerate(names)}
        )

    def test_up_and_down(self) -> None:
        """A gauge goes up and down, by one or more."""
        figures = self.rows[1]
        figures.add("websockets")
        figures.add("websockets", 5)
        figures.add("websockets", -6)
        self.assertEqual(figures.get("websockets"), 0)

    def test_more_than_32_bits(self) -> None:
        """A counter takes what four bytes do not hold."""
        self.rows[2].add("messages", 2**40)
        self.rows[2].add("messages")
        self.assertEqual(self.rows[0].totals()["messages"], 2**40 + 1)

    def test_a_successor(self) -> None:
        """A process that takes a row has nothing of its predecessor's open, and its counts."""
        for name in (*GAUGES, *COUNTERS):
            self.rows[1].add(name, 7)
        Figures(self.fd, 1).begin()
        self.assertEqual(
            {name: self.rows[1].get(name) for name in GAUGES},
            {name: int(name == "processes") for name in GAUGES},
        )
        self.assertEqual({self.rows[1].get(name) for name in COUNTERS}, {7})

    def test_a_death(self) -> None:
        """What a dead process had open is no more; what it counted is, and other rows stay."""
        for figures in self.rows:
            figures.begin()
            figures.add("websockets", 2)
            figures.add("opened", 3)
        self.rows[0].clear(1)
        totals = self.rows[2].totals()
        self.assertEqual((totals["processes"], totals["websockets"], totals["opened"]), (2, 4, 9))
        self.assertEqual(self.rows[1].get("websockets"), 0)

    def test_the_descriptor(self) -> None:
        """The memory stays when the descriptor is closed, and is inherited only by who is to."""
        fd = Figures.create(1)
        self.assertFalse(os.get_inheritable(fd))
        figures, other = Figures(fd), Figures(fd)
        os.close(fd)
        figures.add("failed")
        self.assertEqual(other.get("failed"), 1)

    def test_another_process(self) -> None:
        """What a child counts its parent sees."""
        pid = os.fork()
        if not pid:
            self.rows[2].add("http_calls", 4)
            os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(self.rows[0].totals()["http_calls"], 4)
