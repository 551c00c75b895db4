"""What is done less often than it is asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.throttle import Penalties, Throttle

NOW = 1000.0


class ThrottleTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.throttle = Throttle()

    def test_the_first(self) -> None:
        """The first is let through, and nothing was left out before it."""
        self.assertEqual(self.throttle.admit("a", NOW), 0)
        self.assertEqual(Throttle().admit("a", 0.0), 0)

    def test_within_a_minute(self) -> None:
        """None is let through for a minute, then one that tells how many were not."""
        self.throttle.admit("a", NOW)
        for seconds in (0, 0, 1, 59.9):
            self.assertIsNone(self.throttle.admit("a", NOW + seconds))
        self.assertEqual(self.throttle.admit("a", NOW + 60), 4)
        self.assertIsNone(self.throttle.admit("a", NOW + 61))
        self.assertEqual(self.throttle.admit("a", NOW + 120), 1)

    def test_keys_are_apart(self) -> None:
        """Each key has its own minute and its own count."""
        self.throttle.admit("a", NOW)
        self.throttle.admit("a", NOW)
        self.assertEqual(self.throttle.admit(("b", 1), NOW + 1), 0)
        self.assertEqual(self.throttle.admit("a", NOW + 60), 1)
        self.assertIsNone(self.throttle.admit(("b", 1), NOW + 60))

    def test_the_oldest_is_forgotten(self) -> None:
        """Of more than 1024 keys the one that was said longest ago is forgotten."""
        for number in range(1024):
            self.throttle.admit(number, NOW)
        self.assertIsNone(self.throttle.admit(0, NOW))
        self.throttle.admit("one more", NOW)
        self.assertEqual(self.throttle.admit(0, NOW), 0)
        self.assertIsNone(self.throttle.admit(2, NOW))

    def test_what_was_said_again_is_young(self) -> None:
        """A key that was said again is not the oldest any more."""
        for number in range(1024):
            self.throttle.admit(number, NOW)
        self.throttle.admit(0, NOW + 60)
        self.throttle.admit("one more", NOW + 60)
        self.assertIsNone(self.throttle.admit(0, NOW + 60))

    @given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 50)), max_size=60))
    def test_nothing_is_lost(self, steps: list[tuple[int, float]]) -> None:
        """Whatever comes when, what is let through and what is counted are all that came."""
        throttle, now = Throttle(), NOW
        told = dict.fromkeys(range(3), 0)
        for key, seconds in steps:
            now += seconds
            left_out = throttle.admit(key, now)
            if left_out is not None:
                told[key] += 1 + left_out
        for key, count in told.items():
            came = sum(one == key for one, _ in steps)
            left_out = throttle.admit(key, now + 60)
            self.assertEqual(count + (left_out or 0), came)


class PenaltiesTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.penalties = Penalties()

    def guess(self, who: object = "a", times: int = 1, now: float = NOW) -> None:
        for _ in range(times):
            self.penalties.failed(who, now)

    def test_who_has_not_guessed(self) -> None:
        """Who has not guessed wrongly does not wait, whoever else has."""
        self.guess("a")
        self.assertEqual(self.penalties.seconds("b", NOW), 0.0)

    def test_ever_longer(self) -> None:
        """Each wrong guess doubles the wait, from half a second up to four."""
        waits = []
        for _ in range(6):
            self.guess()
            waits.append(self.penalties.seconds("a", NOW))
        self.assertEqual(waits, [0.5, 1.0, 2.0, 4.0, 4.0, 4.0])

    def test_never_longer_than_that(self) -> None:
        """However often somebody guesses, the wait stays four seconds."""
        self.guess(times=5000)
        self.assertEqual(self.penalties.seconds("a", NOW), 4.0)

    def test_forgiven(self) -> None:
        """A minute after the last wrong guess nobody waits any more, and all begins anew."""
        self.guess(times=3)
        self.assertEqual(self.penalties.seconds("a", NOW + 60), 2.0)
        self.assertEqual(self.penalties.seconds("a", NOW + 60.1), 0.0)
        self.guess(now=NOW + 60.1)
        self.assertEqual(self.penalties.seconds("a", NOW + 60.1), 0.5)

    def test_asking_is_no_guess(self) -> None:
        """To ask how long one waits makes it neither longer nor shorter."""
        self.guess()
        self.assertEqual([self.penalties.seconds("a", NOW) for _ in range(3)], [0.5] * 3)

    def test_the_oldest_is_forgiven_first(self) -> None:
        """Of more than 1024 who guess, the one whose last guess is oldest is forgiven."""
        for number in range(1024):
            self.guess(number)
        self.guess(0)
        self.guess("one more")
        self.assertEqual(self.penalties.seconds(1, NOW), 0.0)
        self.assertEqual(self.penalties.seconds(0, NOW), 1.0)
        self.assertEqual(self.penalties.seconds("one more", NOW), 0.5)
