"""What the last minutes were like, out of what daemons count for ever."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.history import History, is_readable, percentiles

examples = settings(max_examples=200, deadline=None)

NOTHING = {"p50": None, "p95": None, "p99": None}


def status(
    done: int = 0,
    failed: int = 0,
    latency: dict[str, int] | None = None,
    waiting: int = 0,
    **workers: int,
) -> dict[str, Any]:
    """Give what a daemon tells that has one function."""
    function = {"name": "f", "done": done, "failed": failed, "latency": latency or {}}
    return {
        "queue": {"waiting": waiting},
        "totals": {"workers": workers, "done": 999 * done, "failed": 999 * failed},
        "workers": [{"latency": {"2": 12345 + done}}],
        "functions": [function],
    }


class ReadableTests(SynchronousTestCase):
    def test_what_is(self) -> None:
        """A status of any version is, and what has not all members."""
        for one in ({}, {"functions": []}, {"queue": {}}, status(1, 2, {"8": 3}, idle=1)):
            self.assertTrue(is_readable(one), one)

    def test_what_is_not(self) -> None:
        """Nothing else is that a daemon, or who passes for one, might tell."""
        for one in (
            *("x", None, [], 1, {"functions": {}}, {"functions": [1]}, {"functions": [{}]}),
            *({"queue": []}, {"queue": {"waiting": "many"}}, {"queue": {"waiting": None}}),
            *({"queue": {"waiting": True}}, {"queue": {"waiting": -1}}, {"totals": 3}),
            *({"totals": {"workers": {"idle": "x"}}}, {"totals": {"workers": [1]}}),
            *({"workers": [{"latency": {"x": 1}}]}, {"supervisor": {"uptime": 10**400}}),
            *(status(10**400), status(0, 0, {"8": 2**63}), status(0, 0, {"9" * 5000: 1})),
            *(status(0, 0, {"\u0663": 1}), {"functions": [{"name": 1, "done": 1, "failed": 1}]}),
        ):
            self.assertFalse(is_readable(one), str(one)[:80])


class HistoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.history = History()

    def add(self, now: float, **statuses: Any) -> dict[str, Any]:
        return self.history.add(now, 1e9 + now, statuses)

    def rates(self, now: float, **statuses: Any) -> tuple[float, float]:
        sample = self.add(now, **statuses)
        return sample["done"], sample["failed"]

    def test_the_first_look(self) -> None:
        """At the first look there is no rate and no latency, whatever was counted before."""
        sample = self.add(5.0, a=status(700, 7, {"1024": 700}, waiting=3, idle=2, busy=1))
        self.assertEqual(
            sample,
            {
                "at": 1000000005.0,
                "waiting": 3,
                "workers": {"starting": 0, "idle": 2, "busy": 1, "draining": 0},
                "done": 0.0,
                "failed": 0.0,
                "latency": NOTHING,
            },
        )
        self.assertEqual(list(self.history.samples), [sample])

    def test_a_rate(self) -> None:
        """A rate is what has come since the last look, by the seconds since then."""
        self.add(10.0, a=status(100, 10))
        self.assertEqual(self.rates(11.0, a=status(150, 12)), (50.0, 2.0))
        self.assertEqual(self.rates(13.0, a=status(151, 12)), (0.5, 0.0))
        self.assertEqual(self.rates(13.5, a=status(151, 13)), (0.0, 2.0))

    def test_the_daemons_own_functions(self) -> None:
        """What a daemon's workers have answered about itself is no work."""
        self.add(0.0, a=status(1))
        asked = status(1)
        asked["totals"]["done"] += 1000
        asked["workers"][0]["latency"]["2"] += 1000
        sample = self.add(1.0, a=asked)
        self.assertEqual((sample["done"], sample["latency"]), (0.0, NOTHING))

    def test_several_daemons(self) -> None:
        """Those of all daemons are added up."""
        self.add(0.0, a=status(100), b=status(1000))
        sample = self.add(
            1.0,
            a=status(101, 1, waiting=2, idle=1),
            b=status(1010, 2, waiting=5, idle=3, draining=1),
        )
        self.assertEqual((sample["done"], sample["failed"], sample["waiting"]), (11.0, 3.0, 7))
        self.assertEqual(sample["workers"], {"starting": 0, "idle": 4, "busy": 0, "draining": 1})

    def test_a_daemon_that_was_started_again(self) -> None:
        """Counts that have fallen are no negative rate, and take nothing from the others'."""
        self.add(0.0, a=status(1000, 100, {"64": 1000}), b=status(0))
        sample = self.add(1.0, a=status(3, 0, {"64": 3}), b=status(20))
        self.assertEqual((sample["done"], sample["failed"]), (20.0, 0.0))
        self.assertEqual(sample["latency"], NOTHING)
        self.assertEqual(self.rates(2.0, a=status(10, 1), b=status(20)), (7.0, 1.0))

    def test_a_daemon_that_does_not_answer(self) -> None:
        """What happened while a daemon did not answer is spread over all of that time."""
        self.add(0.0, a=status(100), b=status(0))
        self.assertEqual(self.rates(1.0, a=None, b=status(5)), (5.0, 0.0))
        self.assertEqual(self.rates(2.0, a=None, b=status(10)), (5.0, 0.0))
        self.assertEqual(self.rates(3.0, a=status(130), b=status(15)), (15.0, 0.0))

    def test_none_answers(self) -> None:
        """Where no daemon answers there is nothing to keep."""
        sample = self.add(0.0, a=None)
        self.assertEqual((sample["waiting"], sample["done"]), (0, 0.0))
        self.assertEqual(list(self.history.samples), [])

    def test_a_daemon_that_comes_later(self) -> None:
        """The counts of a daemon that is seen for the first time are no rate."""
        self.add(0.0, a=status(10), b=None)
        self.assertEqual(self.rates(1.0, a=status(12), b=status(10_000)), (2.0, 0.0))

    def test_no_time_between(self) -> None:
        """Two looks at one time make no rate."""
        self.add(1.0, a=status(0))
        self.assertEqual(self.rates(1.0, a=status(5)), (0.0, 0.0))

    def test_an_older_daemon(self) -> None:
        """Of a daemon that tells of no functions the totals are taken, and the workers'."""
        for now, done in ((0.0, 10), (1.0, 14)):
            sample = self.add(
                now,
                a={
                    "totals": {"done": done, "failed": 1, "workers": {"idle": 1}},
                    "workers": [{"latency": {"1024": done}}, {}],
                },
            )
        self.assertEqual((sample["done"], sample["workers"]["idle"]), (4.0, 1))
        self.assertEqual(sample["latency"], percentiles({1024: 4}))

    def test_a_daemon_that_tells_nothing(self) -> None:
        """An answer without any of that is taken as one of a daemon that does nothing."""
        sample = self.add(0.0, a={})
        self.assertEqual((sample["waiting"], sample["done"]), (0, 0.0))

    def test_latency(self) -> None:
        """Latencies are those of the tasks of the last ten samples."""
        self.add(0.0, a=status(0, 0, {"1024": 50}))
        first = self.add(1.0, a=status(0, 0, {"1024": 53, "4096": 1}))
        self.assertEqual(first["latency"], percentiles({1024: 3, 4096: 1}))
        for now in range(2, 11):
            same = self.add(float(now), a=status(0, 0, {"1024": 53, "4096": 1}))
            self.assertEqual(same["latency"], first["latency"])
        last = self.add(11.0, a=status(0, 0, {"1024": 53, "4096": 1}))
        self.assertEqual(last["latency"], NOTHING)

    def test_five_minutes(self) -> None:
        """The last 300 samples are kept, the oldest first."""
        for now in range(310):
            self.add(float(now), a=status())
        kept = [sample["at"] for sample in self.history.samples]
        self.assertEqual(kept, [1e9 + now for now in range(10, 310)])


counts = st.dictionaries(st.integers(0, 30).map(lambda n: 2**n), st.integers(0, 50), max_size=8)


class PercentileTests(SynchronousTestCase):
    def test_nothing(self) -> None:
        """Of nothing there are no percentiles."""
        self.assertEqual(percentiles({}), NOTHING)
        self.assertEqual(percentiles({1024: 0}), NOTHING)

    def test_one_bucket(self) -> None:
        """Within a bucket the middle is the geometric one, and the end is its bound."""
        found = percentiles({1024: 100})
        self.assertAlmostEqual(found["p50"] or 0, 512e-6 * math.sqrt(2), places=6)
        self.assertAlmostEqual(found["p99"] or 0, 512e-6 * 2**0.99, places=6)

    def test_where_two_buckets_meet(self) -> None:
        """Half in one bucket and half in a higher one: the median is the border."""
        found = percentiles({1024: 10, 2**20: 10})
        self.assertEqual(found["p50"], 0.001024)
        self.assertGreater(found["p95"] or 0, 2**19 / 1e6)

    @examples
    @given(st.lists(st.integers(1, 2**24), min_size=1, max_size=200))
    def test_the_exact_ones(self, micros: list[int]) -> None:
        """Each is within the bucket in which the exact percentile lies."""
        bounds = Counter(1 << value.bit_length() for value in micros)  # value < bound
        found = percentiles(bounds)
        ordered = sorted(micros)
        for name, share in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99)):
            exact = ordered[math.ceil(share * len(ordered)) - 1]
            bound = 1 << exact.bit_length()
            told = (found[name] or 0) * 1e6
            self.assertLessEqual(told, bound + 0.1)
            self.assertGreaterEqual(told, bound / 2 - 0.1)

    @examples
    @given(counts)
    def test_their_order(self, counts: dict[int, int]) -> None:
        """They rise, and there are either all of them or none."""
        found = percentiles(counts)
        values = [found[name] for name in ("p50", "p95", "p99")]
        if any(counts.values()):
            self.assertEqual(values, sorted(value or -1 for value in values))
            self.assertGreater(values[0] or -1, 0)
        else:
            self.assertEqual(values, [None] * 3)
