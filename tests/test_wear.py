"""When a worker has served long enough."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.settings import Settings
from taskd.states import Cause
from taskd.wear import Wear

MIB = 2**20


def wear(*, ended: int = 0, jitter: float = 0.0, **settings: Any) -> Wear:
    """Judge a worker under an operator's limits."""
    return Wear(Settings(0, **settings), ended, lambda: jitter)


class WearTests(SynchronousTestCase):
    def test_without_limits(self) -> None:
        """A worker without limits is never replaced, and no dice are thrown for it."""
        endless = Wear(Settings(0), 0, lambda: self.fail("dice"))
        self.assertIsNone(endless.cause(10**12, 2**60))

    def test_tasks(self) -> None:
        """A worker is worn with the last task that it was given, and not before."""
        worn = wear(max_tasks=10)
        self.assertEqual([worn.cause(n, 0) for n in (0, 9)], [None, None])
        self.assertEqual([worn.cause(n, 0) for n in (10, 11)], [Cause.MAX_TASKS] * 2)

    def test_predecessors_do_not_count(self) -> None:
        """What earlier workers of its slot have run does not count."""
        worn = wear(max_tasks=10, ended=1000)
        self.assertIsNone(worn.cause(1009, 0))
        self.assertIs(worn.cause(1010, 0), Cause.MAX_TASKS)

    def test_memory(self) -> None:
        """A worker is worn above its limit of memory, not at it; what was not measured is 0."""
        worn = wear(max_rss_bytes=100 * MIB)
        self.assertEqual([worn.cause(10**9, rss) for rss in (0, 100 * MIB)], [None, None])
        self.assertIs(worn.cause(0, 100 * MIB + 1), Cause.MAX_RSS)

    def test_jitter(self) -> None:
        """By the dice a worker's limits lie up to a fifth below the operator's."""
        worn = wear(max_tasks=1000, max_rss_bytes=1000 * MIB, jitter=0.5)
        self.assertIsNone(worn.cause(899, 900 * MIB))
        self.assertIs(worn.cause(900, 0), Cause.MAX_TASKS)
        self.assertIs(worn.cause(0, 900 * MIB + 1), Cause.MAX_RSS)

    def test_each_limit_has_its_own_dice(self) -> None:
        """Tasks and memory are lowered by draws of their own."""
        draws = iter([0.0, 0.5])
        worn = Wear(Settings(0, max_tasks=100, max_rss_bytes=100 * MIB), 0, lambda: next(draws))
        self.assertIsNone(worn.cause(99, 90 * MIB))
        self.assertIs(worn.cause(100, 0), Cause.MAX_TASKS)
        self.assertIs(worn.cause(99, 90 * MIB + 1), Cause.MAX_RSS)

    def test_tasks_come_first(self) -> None:
        """Of two causes the tasks are named."""
        worn = wear(max_tasks=1, max_rss_bytes=MIB)
        self.assertIs(worn.cause(1, 2 * MIB), Cause.MAX_TASKS)

    def test_a_single_task(self) -> None:
        """A limit of one task is one task, whatever the dice say."""
        worn = wear(max_tasks=1, jitter=0.999)
        self.assertIsNone(worn.cause(0, 0))
        self.assertIs(worn.cause(1, 0), Cause.MAX_TASKS)
