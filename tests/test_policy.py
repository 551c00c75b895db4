"""The arithmetic of waiting."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.policy import (
    ACCEPT_PAUSE_CEILING_SECONDS,
    FREE_ACCEPTS,
    RESERVED_FDS,
    YOUNG_SECONDS,
    Births,
    accept_pause,
    connection_ceiling,
    is_hung,
    jittered,
    reconnect_delay,
    retry_after,
)

examples = settings(max_examples=60, deadline=None)

DICE = st.floats(0.0, 1.0, exclude_max=True)


class AcceptPauseTests(SynchronousTestCase):
    """How long a worker leaves the port to its siblings."""

    def test_the_first_accepts_are_free(self) -> None:
        """While connections go as well as come, a worker accepts again at once."""
        for open_connections in (0, 1, 1000):
            pauses = [accept_pause(open_connections, n) for n in range(FREE_ACCEPTS + 1)]
            self.assertEqual(set(pauses), {0.0})

    def test_the_emptier_is_the_quicker(self) -> None:
        """Once they only come, the pause grows with each of them until it reaches its ceiling."""
        pauses = [accept_pause(n, FREE_ACCEPTS + 1) for n in range(1, 26)]
        self.assertEqual(pauses, sorted(set(pauses)))
        self.assertEqual(pauses[-1], ACCEPT_PAUSE_CEILING_SECONDS)
        self.assertEqual(accept_pause(10**9, 10**9), ACCEPT_PAUSE_CEILING_SECONDS)


class ConnectionCeilingTests(SynchronousTestCase):
    """How many connections fit under the limit of file descriptors."""

    def test_some_descriptors_are_kept(self) -> None:
        """A worker keeps its reserve for its tasks and takes connections with the rest."""
        self.assertEqual(connection_ceiling(1024), 1024 - RESERVED_FDS)

    def test_there_is_always_room_for_one(self) -> None:
        """Even under the smallest limit a worker serves one connection."""
        for limit in (1, RESERVED_FDS, RESERVED_FDS + 1):
            self.assertEqual(connection_ceiling(limit), 1)
        self.assertEqual(connection_ceiling(RESERVED_FDS + 2), 2)


class ReconnectDelayTests(SynchronousTestCase):
    """How long a client waits before it connects again."""

    @examples
    @given(
        failures=st.integers(1, 10**6), base=st.floats(0.001, 10), cap=st.floats(1, 99), jitter=DICE
    )
    def test_bounds(self, failures: int, base: float, cap: float, jitter: float) -> None:
        """The delay is never negative and stays below its cap, after any number of failures."""
        delay = reconnect_delay(failures, base=base, cap=cap, jitter=jitter)
        self.assertGreaterEqual(delay, 0.0)
        self.assertLess(delay, cap)

    def test_it_doubles(self) -> None:
        """Under equal dice each failure doubles the delay, up to the cap."""
        delays = [reconnect_delay(n, base=0.5, cap=3.0, jitter=0.5) for n in range(1, 6)]
        self.assertEqual(delays, [0.25, 0.5, 1.0, 1.5, 1.5])

    def test_full_jitter(self) -> None:
        """The draw goes through the whole range, from zero on."""
        delays = [reconnect_delay(1, base=8.0, cap=9.0, jitter=j) for j in (0.0, 0.25, 0.75)]
        self.assertEqual(delays, [0.0, 2.0, 6.0])


class HungTests(SynchronousTestCase):
    """Whether a worker will not come to its senses by itself."""

    def test_both_have_to_be_missed(self) -> None:
        """A worker hangs if its task is overdue and it does not answer, and only then."""
        for silent_since, due, expected in (
            (98.0, 99.0, True),
            (98.0, 99.9, False),  # overdue by less than what a reactor may be late
            (98.0, 101.0, False),  # its task still has time
            (99.0, 50.0, False),  # it may yet answer, and see to it
            (None, 50.0, False),  # it has answered
            (1.0, 0.0, False),  # its task may take as long as it likes
        ):
            self.assertIs(is_hung(100.0, silent_since, due), expected, (silent_since, due))

    def test_the_bounds(self) -> None:
        """It is given a second and a half to answer, and a quarter over its task's time."""
        self.assertIs(is_hung(101.5, 100.0, 1.0), False)
        self.assertIs(is_hung(101.51, 100.0, 1.0), True)
        self.assertIs(is_hung(100.25, 1.0, 100.0), False)
        self.assertIs(is_hung(100.26, 1.0, 100.0), True)


class RetryAfterTests(SynchronousTestCase):
    """How long a caller whose task was refused stays away."""

    def test_at_the_pace_of_late(self) -> None:
        """It is told the time that the queue takes, rounded to hundredths."""
        self.assertEqual(retry_after(100, 10.0), 10.0)
        self.assertEqual(retry_after(10, 3.0), 3.33)

    def test_an_unknown_pace(self) -> None:
        """Where nothing has left the queue of late it is told one second."""
        self.assertEqual([retry_after(waiting, 0.0) for waiting in (0, 10_000)], [1.0, 1.0])

    @examples
    @given(waiting=st.integers(0, 10**9), rate=st.floats(0.0, 1e9))
    def test_bounds(self, waiting: int, rate: float) -> None:
        """It is never less than a tenth of a second, and never more than a minute."""
        seconds = retry_after(waiting, rate)
        self.assertTrue(0.1 <= seconds <= 60.0)
        self.assertEqual(seconds, round(seconds, 2))


class JitteredTests(SynchronousTestCase):
    """One worker's own limit."""

    def test_by_the_dice(self) -> None:
        """The lowest draw leaves the limit as it is, and higher ones lower it evenly."""
        limits = [jittered(1000, jitter=jitter) for jitter in (0.0, 0.25, 0.5, 0.999)]
        self.assertEqual(limits, [1000, 950, 900, 801])

    @examples
    @given(limit=st.integers(1, 10**12), jitter=DICE)
    def test_bounds(self, limit: int, jitter: float) -> None:
        """It stays between four fifths of what all were given, and 1, and what they were given."""
        own = jittered(limit, jitter=jitter)
        self.assertIs(type(own), int)
        self.assertTrue(max(1, limit * 0.8 - 1e-3) <= own <= limit)

    def test_small_limits(self) -> None:
        """A limit of few is a limit of few for everybody, and never none."""
        self.assertEqual({jittered(1, jitter=0.999), jittered(1, jitter=0.0)}, {1})
        self.assertEqual({jittered(4, jitter=0.999), jittered(4, jitter=0.0)}, {4})


class BirthsTests(SynchronousTestCase):
    """How soon a dead worker is replaced."""

    def test_who_has_worked_is_replaced_at_once(self) -> None:
        """A worker that lived long enough costs no wait."""
        births = Births()
        self.assertEqual([births.died(YOUNG_SECONDS), births.died(86400.0)], [0.0, 0.0])

    def test_young_deaths_in_a_row_wait_ever_longer(self) -> None:
        """Each young death in a row doubles the wait, from 0.1 to 30 seconds."""
        births = Births()
        waits = [births.died(0.0) for _ in range(11)]
        self.assertEqual(waits[:4], [0.1, 0.2, 0.4, 0.8])
        self.assertEqual(waits[-2:], [30.0, 30.0])
        self.assertEqual(waits, sorted(waits))

    def test_the_waits_have_an_end(self) -> None:
        """Thousands of young deaths in a row overflow nothing."""
        births = Births()
        self.assertEqual(
            {births.died(0.5) for _ in range(3000)} - {30.0}, {0.1 * 2**n for n in range(9)}
        )

    def test_one_that_lives_clears_the_row(self) -> None:
        """After a worker that lived, the next young death waits as little as the first."""
        births = Births()
        waits = [births.died(lived) for lived in (0.0, 0.0, YOUNG_SECONDS, 0.0)]
        self.assertEqual(waits, [0.1, 0.2, 0.0, 0.1])
