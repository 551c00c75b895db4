"""How connections leave a worker that retires, with connections that the test plays."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from taskd.departure import Departure


class Guest:
    """
    A connection that is to leave.

    Attributes:
        told: What it was told, in order.
        is_owed: True: it cannot leave yet.
    """

    def __init__(self, present: set[Guest], *, is_owed: bool = False) -> None:
        self._present = present
        self.told: list[str] = []
        self.is_owed = is_owed
        present.add(self)

    @property
    def is_still(self) -> bool:
        """Whether it is not read from."""
        steps = [word for word in self.told if word in ("still", "on")]
        return steps[-1:] == ["still"]

    def pass_on(self) -> None:
        self.told.append("pass on")
        self.move()

    def move(self) -> None:
        self.told.append("move")
        if not self.is_owed:
            self._present.discard(self)

    def hold_still(self, is_on: bool, /) -> None:
        self.told.append("still" if is_on else "on")

    def leave(self) -> None:
        """Be owed nothing more, and go."""
        self.is_owed = False
        self.move()


class DepartureTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.present: set[Guest] = set()

    def guest(self, *, is_owed: bool = False) -> Guest:
        return Guest(self.present, is_owed=is_owed)

    def depart(self) -> None:
        Departure(lambda: self.present, self.clock.callLater)

    def test_nobody(self) -> None:
        """Where nobody is nothing is left to do."""
        self.depart()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_who_is_owed_nothing(self) -> None:
        """Those who are owed nothing go at once, are never held, and leave nothing behind."""
        guests = [self.guest() for _ in range(3)]
        self.depart()
        self.assertEqual([guest.told for guest in guests], [["pass on", "move"]] * 3)
        self.assertEqual((self.present, self.clock.getDelayedCalls()), (set(), []))

    def test_who_is_owed_something(self) -> None:
        """The others are told once to run all elsewhere, and are held still 50 ms, then let go."""
        guest = self.guest(is_owed=True)
        self.guest()
        self.depart()
        self.assertEqual(self.present, {guest})
        self.assertTrue(guest.is_still)
        self.clock.advance(0.049)
        self.assertTrue(guest.is_still)
        self.clock.advance(0.001)
        self.assertFalse(guest.is_still)
        self.clock.pump([1.0] * 30)
        self.assertEqual(guest.told.count("pass on"), 1)

    def test_again_and_less_often(self) -> None:
        """They are held again after 0.1 s, and each time twice as long after, 5 s at most."""
        guest = self.guest(is_owed=True)
        self.depart()
        pauses = []
        for _ in range(9):
            self.clock.advance(0.05)
            self.assertFalse(guest.is_still)
            (again,) = self.clock.getDelayedCalls()
            pauses.append(round(again.getTime() - self.clock.seconds(), 3))
            self.clock.advance(pauses[-1] - 0.001)
            self.assertFalse(guest.is_still)
            self.clock.advance(0.001 + 1e-9)
            self.assertTrue(guest.is_still)
        self.assertEqual(pauses, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])

    def test_another_attempt(self) -> None:
        """Before they are held each time those go that can by now."""
        guest = self.guest(is_owed=True)
        self.depart()
        guest.is_owed = False
        self.clock.advance(0.05)
        self.assertEqual(self.present, {guest})
        self.clock.advance(0.1)
        self.assertEqual(self.present, set())

    def test_gone_while_still(self) -> None:
        """Who goes while all are held is told nothing more, and the others are let go."""
        gone, stays = (self.guest(is_owed=True) for _ in range(2))
        self.depart()
        gone.leave()
        self.clock.advance(0.05)
        self.assertEqual(gone.told[-1], "move")
        self.assertFalse(stays.is_still)

    def test_the_last_one(self) -> None:
        """When the last has gone the rounds end."""
        guest = self.guest(is_owed=True)
        self.depart()
        guest.leave()
        self.clock.pump([0.05, 0.1])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_who_comes_meanwhile(self) -> None:
        """Who comes in between is held still in the next round, and let go with the others."""
        self.guest(is_owed=True)
        self.depart()
        late = self.guest(is_owed=True)
        self.clock.advance(0.05)
        self.assertEqual(late.told, [])
        self.clock.advance(0.1)
        self.assertEqual(late.told, ["move", "still"])
        self.clock.advance(0.05)
        self.assertFalse(late.is_still)
