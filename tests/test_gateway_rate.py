"""How often somebody may do something, held against a model that counts in another way."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.rate import Rate, Reading

examples = settings(max_examples=200, deadline=None)


class RateTests(SynchronousTestCase):
    def test_a_burst(self) -> None:
        """What two seconds allow may come at once, and the next waits for its turn."""
        rate = Rate(10)
        self.assertEqual([rate.wait(5.0) for _ in range(20)], [0.0] * 20)
        self.assertEqual(rate.wait(5.0), 0.1)

    def test_steadily(self) -> None:
        """Who keeps to the rate is never refused, also after a burst."""
        rate = Rate(4)
        for _ in range(8):
            rate.wait(0.0)
        waits = [rate.wait(0.25 * n) for n in range(1, 1000)]
        self.assertEqual(set(waits), {0.0})

    def test_what_is_kept(self) -> None:
        """However long somebody was quiet, two seconds' worth may come at once."""
        rate = Rate(3)
        rate.wait(0.0)
        self.assertEqual([rate.wait(1e9) for _ in range(7)], [0.0] * 6 + [1 / 3])

    def test_a_slow_rate(self) -> None:
        """Even of a rate below one in two seconds one may come."""
        rate = Rate(0.1)
        self.assertEqual(rate.wait(0.0), 0.0)
        self.assertEqual(rate.wait(0.0), 10.0)
        self.assertEqual(rate.wait(10.0), 10.0)

    def test_who_goes_on_falls_behind(self) -> None:
        """Each attempt that is refused makes the wait longer."""
        rate = Rate(2)
        waits = [rate.wait(0.0) for _ in range(8)]
        self.assertEqual(waits, [0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0])

    def test_who_waits_as_told(self) -> None:
        """Who comes again after the time that it was told is in time."""
        rate = Rate(2)
        now = 0.0
        for _ in range(50):
            while not (wait := rate.wait(now)):
                pass
            now += wait + 0.5  # its attempt then takes its own turn
            self.assertEqual(rate.wait(now), 0.0)

    def test_patience(self) -> None:
        """Patience ends with who is refused as often again as it was let in at once."""
        rate = Rate(5)
        for _ in range(20):
            rate.wait(0.0)
            self.assertFalse(rate.is_out_of_patience())
        rate.wait(0.0)
        self.assertTrue(rate.is_out_of_patience())

    def test_patience_with_a_slow_rate(self) -> None:
        """Who has a rate near zero is refused once before patience ends."""
        rate = Rate(0.1)
        found = []
        for _ in range(3):
            rate.wait(0.0)
            found.append(rate.is_out_of_patience())
        self.assertEqual(found, [False, False, True])

    @examples
    @given(
        st.integers(1, 20),
        st.lists(st.integers(0, 40).map(lambda n: Fraction(n, 8)), max_size=80),
    )
    def test_the_model(self, per_second: int, steps: list[Fraction]) -> None:
        """It does what the exact sum of all that was earned and spent says."""
        rate = Rate(per_second)
        most = Fraction(2 * per_second)
        room, now = most, Fraction(0)
        for number, step in enumerate(steps):
            now += step
            if number:
                room = min(most, room + step * per_second)
            room -= 1
            wait = rate.wait(float(now))
            self.assertAlmostEqual(wait, float(max(Fraction(0), -room / per_second)), places=6)
            if abs(room + most) > Fraction(1, 10**6):
                self.assertIs(rate.is_out_of_patience(), room < -most)

    @examples
    @given(st.integers(1, 20), st.lists(st.floats(0, 2), min_size=1, max_size=100))
    def test_in_the_long_run(self, per_second: int, steps: list[float]) -> None:
        """Within any time no more is let in than the rate, and a burst, allow."""
        rate = Rate(per_second)
        now, times = 0.0, []
        for step in steps:
            now += step
            if not rate.wait(now):
                times.append(now)
        for first, began in enumerate(times):
            for last in range(first, len(times)):
                let_in = last - first + 1
                self.assertLessEqual(let_in, (times[last] - began + 2) * per_second + 1e-6)


class ReadingTests(SynchronousTestCase):
    def test_who_reads_on(self) -> None:
        """Who has less, or other, unread than at the last look reads on; who has none does not."""
        reading = Reading()
        looks = [100, 90, 90, 95, 0, 0, 95, 95]
        self.assertEqual(
            [reading.goes_on(unsent) for unsent in looks],
            [True, True, False, True, False, False, True, False],
        )
