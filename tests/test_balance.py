"""Which of several daemons a call goes to, and whether it is sent again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.balance import MOST_SENDS, Health, Load, Tier, Tries, least_loaded, was_not_run
from taskd.errors import (
    BadArguments,
    CertificateExpired,
    ConnectFailed,
    ConnectionLost,
    Malformed,
    Overloaded,
    ShuttingDown,
    TaskFailed,
    TimeLimitExceeded,
    Unauthorized,
    WorkerLost,
)

examples = settings(max_examples=100, deadline=None)

DICE = st.floats(0.0, 1.0, exclude_max=True)

LOADS = st.lists(
    st.tuples(st.sampled_from(Tier), st.integers(0, 3), st.integers(0, 3)), max_size=6
).map(lambda rows: [Load(number, *row) for number, row in enumerate(rows)])

NOT_STARTED = ConnectionLost("", may_have_started=False)
LOST = ConnectionLost("")
ERRORS = st.sampled_from(
    [
        NOT_STARTED,
        LOST,
        WorkerLost(""),
        WorkerLost("", may_have_started=False),
        Overloaded(""),
        ShuttingDown(""),
        ConnectFailed(""),
        CertificateExpired(""),
        Unauthorized(""),
        TaskFailed(""),
        TimeLimitExceeded(""),
        BadArguments(""),
        Malformed(""),
    ]
)


class LeastLoadedTests(SynchronousTestCase):
    """Which daemon is next."""

    @examples
    @given(LOADS, st.integers(0, 6))
    def test_nobody_is_better(self, loads: list[Load], turn: int) -> None:
        """No other is of a better tier, nor of the same with less to do."""
        chosen = least_loaded(loads, turn)
        if not loads:
            self.assertIsNone(chosen)
            return
        assert chosen is not None
        least = min(load[1:] for load in loads)
        self.assertEqual(loads[chosen][1:], least)

    @examples
    @given(st.integers(1, 6), st.integers(0, 5))
    def test_in_turn(self, daemons: int, first: int) -> None:
        """Among equals each comes once in a round, one behind the other."""
        loads = [Load(number, Tier.SERVES, 0, 1) for number in range(daemons)]
        turn, order = first % daemons, []
        for _ in range(2 * daemons):
            chosen = least_loaded(loads, turn)
            assert chosen is not None
            order.append(chosen)
            turn = chosen + 1
        self.assertEqual(order, [(first + n) % daemons for n in range(2 * daemons)])

    @examples
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 40))
    def test_balance(self, before: list[int], calls: int) -> None:
        """Calls that do not end level out what each daemon has to do."""
        in_flight, turn = list(before), 0
        for _ in range(calls):
            loads = [Load(n, Tier.SERVES, count, 1) for n, count in enumerate(in_flight)]
            chosen = least_loaded(loads, turn)
            assert chosen is not None
            in_flight[chosen] += 1
            turn = chosen + 1
        untouched = [now for now, then in zip(in_flight, before, strict=True) if now == then]
        grown = [now for now, then in zip(in_flight, before, strict=True) if now != then]
        self.assertLessEqual(max(grown) - min(grown), 1)
        self.assertTrue(all(count >= max(grown) - 1 for count in untouched))


class HealthTests(SynchronousTestCase):
    """Whether a daemon is used, and when it is tried again."""

    @examples
    @given(st.lists(st.tuples(st.sampled_from(["failed", "answered", "back"]), DICE)))
    def test_out(self, steps: list[tuple[str, float]]) -> None:
        """It is out from a failure until it is back, for a delay below 5 s that is told once."""
        health, is_out = Health(), False
        for step, jitter in steps:
            if step == "failed":
                delay = health.failed(jitter)
                self.assertEqual(delay is None, is_out)
                if delay is not None:
                    self.assertTrue(0.0 <= delay < 5.0)
                is_out = True
            elif step == "answered":
                health.answered()
                self.assertEqual(health.failures, 0)
            else:
                health.back()
                is_out = False
            self.assertEqual(health.is_out, is_out)
            self.assertEqual(health.tier(0.0) is Tier.OUT, is_out)

    def test_the_delay_grows(self) -> None:
        """Each failure in a row doubles the delay, up to a limit; an answer ends that."""
        health, delays = Health(), []
        for _ in range(8):
            delays.append(health.failed(0.5))
            health.back()
        self.assertEqual(delays, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5])
        health.answered()
        self.assertEqual(health.failed(0.5), 0.05)

    @examples
    @given(st.floats(0.0, 100.0), st.just(0.0) | st.floats(0.1, 100.0))
    def test_rest(self, now: float, retry_after: float) -> None:
        """It rests for as long as it asks, or a moment if it does not say, and 5 s at most."""
        health = Health()
        health.rest(now, retry_after)
        self.assertIs(health.tier(now), Tier.RESTS)
        self.assertIs(health.tier(now + min(5.0, retry_after or 0.1) + 0.001), Tier.SERVES)

    def test_the_longest_rest(self) -> None:
        """A shorter rest does not end a longer one, and who is out does not only rest."""
        health = Health()
        health.rest(10.0, 3.0)
        health.rest(10.0, 1.0)
        self.assertIs(health.tier(12.0), Tier.RESTS)
        health.failed(0.5)
        self.assertIs(health.tier(12.0), Tier.OUT)


class TriesTests(SynchronousTestCase):
    """Whether a call is sent again."""

    @examples
    @given(
        st.integers(1, 5),
        st.booleans(),
        st.integers(1, 4),
        st.lists(st.tuples(ERRORS, st.booleans(), st.booleans()), min_size=8, max_size=20),
    )
    def test_promises(
        self,
        daemons: int,
        is_idempotent: bool,
        connections: int,
        course: list[tuple[BaseException, bool, bool]],
    ) -> None:
        """However it goes, a call is sent a few times, and run twice only if that does no harm."""
        tries, may_have_run = Tries(daemons, is_idempotent, connections), 0
        for error, is_refusal, another_serves in course:
            tries.sends += 1
            if isinstance(error, WorkerLost) and error.may_have_started:
                may_have_run += 1
            goes_on = tries.may_go_on(error, is_refusal=is_refusal, another_serves=another_serves)
            if not goes_on:
                break
            self.assertTrue(is_idempotent or not may_have_run)
            self.assertLessEqual(may_have_run, daemons)
            if isinstance(error, TaskFailed | TimeLimitExceeded | BadArguments | Malformed):
                self.assertTrue(is_refusal and daemons > 1)
            if isinstance(error, Overloaded) and not is_refusal:
                self.assertTrue(another_serves)
        self.assertLessEqual(tries.sends, MOST_SENDS + (connections if daemons == 1 else 0))
        verdict = tries.verdict(error)
        if may_have_run:
            self.assertFalse(was_not_run(verdict))
        else:
            self.assertIs(verdict, error)

    def decide(self, daemons: int, error: BaseException, **more: bool) -> bool:
        tries = Tries(daemons, more.pop("is_idempotent", False))
        tries.sends = 1
        return tries.may_go_on(error, **{"is_refusal": False, "another_serves": True, **more})

    def test_what_was_not_run(self) -> None:
        """What the end of a connection kept from being run is sent again, by a lone daemon too."""
        for daemons in (1, 2):
            self.assertTrue(self.decide(daemons, NOT_STARTED))
            self.assertFalse(self.decide(daemons, LOST))
            self.assertTrue(self.decide(daemons, LOST, is_idempotent=True))

    def test_what_another_can_do(self) -> None:
        """What one daemon will not do, another one is asked for, if there is one."""
        for error in (Overloaded(""), CertificateExpired("")):
            self.assertFalse(self.decide(1, error))
            self.assertTrue(self.decide(2, error))
        self.assertFalse(self.decide(2, Overloaded(""), another_serves=False))
        self.assertTrue(self.decide(2, ShuttingDown(""), another_serves=False))

    def test_a_daemon_that_stops(self) -> None:
        """Who stops may be one of several behind a balancer; any connection may lead there."""
        for daemons, connections, expected in ((1, 1, 5), (1, 4, 8), (2, 4, 4)):
            tries = Tries(daemons, False, connections)
            tries.sends = 1
            while tries.may_go_on(ShuttingDown(""), is_refusal=False, another_serves=False):
                tries.sends += 1
            self.assertEqual(tries.sends, expected)

    def test_refusals(self) -> None:
        """Who is not known to one daemon may be known to another; who may not do it may not."""
        self.assertTrue(self.decide(2, Unauthorized(""), is_refusal=True))
        self.assertFalse(self.decide(1, Unauthorized(""), is_refusal=True))
        self.assertFalse(self.decide(2, Unauthorized("")))

    def test_once_for_each_daemon(self) -> None:
        """A call that kills whatever runs it, idempotent as it may be, kills no more than that."""
        for daemons, expected in ((1, 2), (2, 3), (3, 4), (9, 4)):
            tries = Tries(daemons, True)
            tries.sends = 1
            while tries.may_go_on(LOST, is_refusal=False, another_serves=True):
                tries.sends += 1
            self.assertEqual(tries.sends, expected)

    def test_the_verdict(self) -> None:
        """A call that may have been run is told as such, unless it failed for another reason."""
        tries = Tries(2, True)
        tries.sends = 1
        self.assertTrue(tries.may_go_on(LOST, is_refusal=False, another_serves=True))
        for error in (ConnectFailed(""), Overloaded(""), ShuttingDown(""), NOT_STARTED):
            self.assertIs(tries.verdict(error), LOST)
        failed = TaskFailed("")
        self.assertIs(tries.verdict(failed), failed)
