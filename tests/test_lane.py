"""Which blocking calls a worker runs itself: by counts and times."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from taskd.lane import HANDOVER_SECONDS, PATIENCE_SECONDS, Lane, Look

SOON = HANDOVER_SECONDS / 2


def nobody() -> int:
    """Tell that no other worker is idle."""
    return 0


class LaneTestCase(SynchronousTestCase):
    threads = 1

    def setUp(self) -> None:
        self.lane = Lane(self.threads)

    def fill(self, waiting: int = 0) -> None:
        """Have calls on all threads since time 0, and others behind them."""
        self.lane.occupied = self.threads + waiting
        self.lane.began(0.0, 0)

    def make_full(self) -> None:
        """Have it found that what runs takes long."""
        self.fill(waiting=1)
        self.assertEqual(self.lane.look(PATIENCE_SECONDS, 0, nobody), (Look.FULL, 1))
        self.lane.occupied = self.threads

    def not_to_be_asked(self) -> int:
        self.fail("it looks for idle workers, which costs time, though that does not matter")


class SendsOnTests(LaneTestCase):
    threads = 2

    def test_a_fresh_lane_keeps_all(self) -> None:
        """A free worker runs whatever comes, of whatever priority, and need not ask."""
        for occupied in (0, 1):
            self.lane.occupied = occupied
            self.assertEqual([self.lane.sends_on(p) for p in (-1, 0, 1, 10**9)], [False] * 4)
        self.assertFalse(self.lane.is_wary)

    def test_what_has_priority_does_not_wait_here(self) -> None:
        """With all threads taken a call above priority 0 goes on, and any other waits here."""
        self.lane.occupied = 2
        self.assertEqual(
            [self.lane.sends_on(p) for p in (-1, 0, 1, 10**9)], [False, False, True, True]
        )
        self.assertFalse(self.lane.is_wary)

    def test_a_full_lane_sends_all_on(self) -> None:
        """Once a lane is full whatever comes goes on, and it is wary."""
        self.make_full()
        self.assertTrue(self.lane.is_full)
        self.assertTrue(self.lane.is_wary)
        self.assertEqual([self.lane.sends_on(p) for p in (-1, 0, 1)], [True] * 3)

    def test_a_retired_lane_sends_all_on(self) -> None:
        """Once a lane is retired whatever comes goes on, though all threads be free."""
        self.assertFalse(self.lane.is_retired)
        self.lane.retire()
        self.assertTrue(self.lane.is_retired)
        self.assertTrue(self.lane.is_wary)
        self.assertEqual([self.lane.sends_on(p) for p in (-1, 0, 1)], [True] * 3)


class LookTests(LaneTestCase):
    threads = 2

    def test_nothing_waits(self) -> None:
        """While nothing waits there is nothing to watch, however long tasks run."""
        for occupied in (0, 1, 2):
            self.lane.occupied = occupied
            self.assertEqual(self.lane.look(1e6, 0, self.not_to_be_asked), (Look.CLEAR, 0))

    def test_quick_tasks_stay(self) -> None:
        """Before a task has run for long, nothing is handed over, and nobody looked for."""
        self.fill(waiting=3)
        self.assertEqual(self.lane.look(SOON, 0, self.not_to_be_asked), (Look.MOVING, 0))

    def test_as_many_as_are_idle(self) -> None:
        """After the first limit as many of those that wait go as find an idle worker."""
        for idle, handed in ((0, 0), (1, 1), (3, 3), (9, 3)):
            self.fill(waiting=3)
            found = self.lane.look(HANDOVER_SECONDS, 0, lambda idle=idle: idle)
            self.assertEqual(found, (Look.MOVING, handed))
        self.assertFalse(self.lane.is_full)

    def test_patience_ends(self) -> None:
        """After the second limit all that wait go, whether anybody is idle or not."""
        self.fill(waiting=3)
        almost = PATIENCE_SECONDS - SOON
        self.assertEqual(self.lane.look(almost, 0, nobody), (Look.MOVING, 0))
        self.assertFalse(self.lane.is_wary)
        found = self.lane.look(PATIENCE_SECONDS, 0, self.not_to_be_asked)
        self.assertEqual(found, (Look.FULL, 3))
        self.assertTrue(self.lane.is_full)

    def test_full_is_said_once(self) -> None:
        """A lane that is full already has nothing more to find, until it reopens."""
        self.fill(waiting=1)
        self.lane.look(PATIENCE_SECONDS, 0, nobody)
        self.assertEqual(self.lane.look(1e6, 0, self.not_to_be_asked), (Look.CLEAR, 0))
        self.lane.occupied = 1
        self.assertTrue(self.lane.reopens())
        self.fill(waiting=1)
        self.assertEqual(self.lane.look(PATIENCE_SECONDS, 0, nobody), (Look.FULL, 1))

    def test_every_end_begins_it_anew(self) -> None:
        """A call that ends shows that calls end: the limits count from the look that sees it."""
        self.fill(waiting=3)
        ahead = 0.0
        for ended in range(1, 6):
            ahead += 2 * PATIENCE_SECONDS
            found = self.lane.look(ahead, ended, self.not_to_be_asked)
            self.assertEqual(found, (Look.MOVING, 0))
        # Away from the exact limit, which a sum of floats may miss.
        ahead += PATIENCE_SECONDS
        self.assertEqual(self.lane.look(ahead - SOON, 5, nobody), (Look.MOVING, 0))
        self.assertEqual(self.lane.look(ahead + SOON, 5, nobody), (Look.FULL, 3))

    def test_retired(self) -> None:
        """A retired lane has handed over what waited, and finds nothing more."""
        self.fill(waiting=3)
        self.lane.retire()
        self.assertEqual(self.lane.look(1e6, 0, self.not_to_be_asked), (Look.CLEAR, 0))


class HeldUpTests(LaneTestCase):
    def test_held_up(self) -> None:
        """A call would wait for a long one if none has ended since that began, a while ago."""
        self.lane.began(1.0, 7)
        self.assertFalse(self.lane.is_held_up(1.0, 7))
        self.assertFalse(self.lane.is_held_up(1.0 + SOON, 7))
        self.assertTrue(self.lane.is_held_up(1.0 + 2 * HANDOVER_SECONDS, 7))
        self.assertFalse(self.lane.is_held_up(1.0 + 2 * HANDOVER_SECONDS, 8))


class ReopensTests(LaneTestCase):
    threads = 2

    def test_an_open_lane_does_not_reopen(self) -> None:
        """A lane that is not full has nothing to reopen."""
        for occupied in (0, 2):
            self.lane.occupied = occupied
            self.assertFalse(self.lane.reopens())

    def test_a_full_lane_reopens_with_a_free_thread(self) -> None:
        """A full lane reopens once, as soon as one of its threads is free; then it keeps calls."""
        self.make_full()
        self.assertFalse(self.lane.reopens())
        self.assertTrue(self.lane.is_full)
        self.lane.occupied = 1
        self.assertTrue(self.lane.reopens())
        self.assertFalse(self.lane.reopens())
        self.assertFalse(self.lane.is_full)
        self.assertFalse(self.lane.is_wary)
        self.assertFalse(self.lane.sends_on(0))

    def test_a_retired_lane_stays_retired(self) -> None:
        """What reopens, having retired meanwhile, still starts nothing."""
        self.make_full()
        self.lane.retire()
        self.lane.occupied = 0
        self.lane.reopens()
        self.assertTrue(self.lane.is_wary)
        self.assertTrue(self.lane.sends_on(0))


class AsksTests(LaneTestCase):
    def test_once_until_answered(self) -> None:
        """A worker asks for one task at a time."""
        self.assertTrue(self.lane.asks(False))
        self.assertFalse(self.lane.asks(False))
        self.lane.answered()
        self.assertTrue(self.lane.asks(False))

    def test_though_its_own_wait(self) -> None:
        """A worker asks even while quick tasks of its own wait."""
        self.lane.occupied = 9
        self.assertTrue(self.lane.asks(False))

    def test_not_when_full(self) -> None:
        """A full lane asks for nothing until it reopens."""
        self.make_full()
        self.assertFalse(self.lane.asks(False))
        self.lane.occupied = 0
        self.assertTrue(self.lane.reopens())
        self.assertTrue(self.lane.asks(True))

    def test_not_when_retired(self) -> None:
        """A retired lane never asks, whatever was answered."""
        self.lane.retire()
        self.assertFalse(self.lane.asks(False))
        self.lane.answered()
        self.assertFalse(self.lane.asks(False))
        self.assertTrue(self.lane.is_wary)

    def test_the_thread_is_kept_after_long_tasks(self) -> None:
        """Who was full keeps a free thread for the answer: what comes meanwhile goes on."""
        self.assertTrue(self.lane.asks(True))
        self.assertTrue(self.lane.is_wary)
        self.assertTrue(self.lane.sends_on(0))
        self.lane.answered()
        self.assertFalse(self.lane.is_wary)
        self.assertFalse(self.lane.sends_on(0))

    def test_a_thread_that_is_taken_is_not_kept(self) -> None:
        """With no thread free there is none to be kept, and a call waits here as usual."""
        self.assertTrue(self.lane.asks(True))
        self.lane.occupied = 1
        self.assertFalse(self.lane.sends_on(0))

    def test_it_is_not_kept_after_quick_tasks(self) -> None:
        """Who was not full runs what comes while it asks."""
        self.assertTrue(self.lane.asks(False))
        self.assertFalse(self.lane.is_wary)
        self.assertFalse(self.lane.sends_on(0))

    def test_an_answer_reopens_nothing(self) -> None:
        """An answer that comes to a lane which is full again leaves it full."""
        self.assertTrue(self.lane.asks(True))
        self.make_full()
        self.lane.answered()
        self.assertTrue(self.lane.is_wary)
        self.assertTrue(self.lane.sends_on(0))
