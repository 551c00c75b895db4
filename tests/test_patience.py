"""How long a silent peer is put up with."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.patience import UNREAD_SECONDS, Patience, Verdict

NOW = 1000.0


class PatienceTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.patience = Patience(30.0, 10.0)

    def verdict(self, seconds: float, unsent_bytes: int = 0, is_owed: bool = False) -> Verdict:
        return self.patience.verdict(NOW + seconds, unsent_bytes, is_owed)

    def assertWaits(self, seconds: float, unsent_bytes: int = 0, is_owed: bool = False) -> None:
        self.assertIs(self.verdict(seconds, unsent_bytes, is_owed), Verdict.WAIT)


class SilentTests(PatienceTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.patience.begin(NOW)

    def test_in_time(self) -> None:
        """A peer has all of its time for the first line."""
        self.assertTrue(self.patience.awaits_line)
        self.assertWaits(30)

    def test_too_late(self) -> None:
        """A peer whose time for the first line is over is silent."""
        self.assertIs(self.verdict(30.1), Verdict.SILENT)

    def test_once(self) -> None:
        """That is told once; then its time between requests begins."""
        self.verdict(30.1)
        self.assertFalse(self.patience.awaits_line)
        self.assertWaits(40)
        self.assertIs(self.verdict(40.2), Verdict.IDLE)

    def test_what_stirs(self) -> None:
        """Nothing but the first line gives it more time: no byte, no reply, nothing owed."""
        self.patience.stir(NOW + 29)
        self.assertIs(self.verdict(30.1, is_owed=True), Verdict.SILENT)

    def test_the_first_line(self) -> None:
        """With the first line the time between requests counts."""
        self.patience.awaits_line = False
        self.patience.stir(NOW + 29)
        self.assertWaits(39)
        self.assertIs(self.verdict(39.1), Verdict.IDLE)


class IdleTests(PatienceTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.patience.stir(NOW)

    def test_in_time(self) -> None:
        """A peer has all of its time between requests."""
        self.assertWaits(10)

    def test_too_late(self) -> None:
        """A peer that asks nothing for longer is idle, which is told once."""
        self.assertIs(self.verdict(10.1), Verdict.IDLE)
        self.assertWaits(20)

    def test_each_request(self) -> None:
        """Each request or reply gives it the time anew."""
        self.patience.stir(NOW + 9)
        self.assertWaits(19)
        self.assertIs(self.verdict(19.1), Verdict.IDLE)

    def test_what_is_owed(self) -> None:
        """A peer that waits for a reply is not idle."""
        self.assertWaits(1000, is_owed=True)

    def test_no_limit(self) -> None:
        """Where there is no limit a peer may be silent for ever."""
        self.patience = Patience(30.0, None)
        self.patience.stir(NOW)
        self.assertWaits(1e9)


class UnreadTests(PatienceTestCase):
    """Peers that have much to read; they are owed something, so that they are never idle."""

    def leave(self, unsent_bytes: int, added_bytes: int, seconds: float = 0.0) -> None:
        self.patience.leave_unread(unsent_bytes, added_bytes, NOW + seconds)

    def setUp(self) -> None:
        super().setUp()
        self.patience.stir(NOW)
        self.leave(1000, 1000)

    def test_in_time(self) -> None:
        """A peer has a minute to take something."""
        self.assertWaits(UNREAD_SECONDS, 1000, True)

    def test_nothing_is_taken(self) -> None:
        """A peer that takes nothing for longer does not read, whatever it is owed."""
        self.assertIs(self.verdict(UNREAD_SECONDS + 0.1, 1000, True), Verdict.UNREAD)

    def test_once(self) -> None:
        """That is told once, then it has the time again."""
        self.verdict(60.1, 1000, True)
        self.assertWaits(120.1, 1000, True)
        self.assertIs(self.verdict(120.2, 1000, True), Verdict.UNREAD)

    def test_one_byte(self) -> None:
        """A peer that takes a byte now and then is put up with."""
        for minute in range(1, 60):
            self.assertWaits(59 * minute, 1000 - minute, True)

    def test_it_stops_again(self) -> None:
        """The minute begins with the last look that found something taken."""
        self.assertWaits(50, 999, True)
        self.assertWaits(110, 999, True)
        self.assertIs(self.verdict(110.1, 999, True), Verdict.UNREAD)

    def test_all_is_read(self) -> None:
        """A peer that has taken all has no such time any more."""
        self.patience.all_read()
        self.assertWaits(1e6, 0, True)

    def test_it_begins_anew(self) -> None:
        """What is left unread after that has a minute of its own."""
        self.patience.all_read()
        self.leave(500, 500, seconds=50)
        self.assertWaits(110, 500, True)
        self.assertIs(self.verdict(110.1, 500, True), Verdict.UNREAD)

    def test_more_to_read(self) -> None:
        """To be sent more gives a peer that reads nothing no more time."""
        for seconds in (20, 40, 59):
            self.leave(1000 + seconds, 20 if seconds < 59 else 19, seconds=seconds)
            self.assertWaits(seconds, 1000 + seconds, True)
        self.assertIs(self.verdict(60.1, 1059, True), Verdict.UNREAD)

    def test_more_to_read_than_is_read(self) -> None:
        """A peer that reads, but is sent more than that, is put up with."""
        for number in range(1, 10):
            self.leave(1000 + 99 * number, 100, seconds=50 * number)
            self.assertWaits(50 * number + 60, 1000 + 99 * number, True)

    def test_it_is_stronger_than_idleness(self) -> None:
        """A peer that neither reads nor asks is told to be the former."""
        self.assertIs(self.verdict(60.1, 1000), Verdict.UNREAD)

    @given(st.lists(st.tuples(st.floats(0, 30), st.booleans()), min_size=1, max_size=50))
    def test_who_reads_in_time(self, looks: list[tuple[float, bool]]) -> None:
        """However often one looks, a peer that took nothing for a minute is found, and no other."""
        patience = Patience(30.0, None)
        patience.leave_unread(10**6, 10**6, NOW)
        now = since = NOW
        unsent = 10**6
        for seconds, reads in looks:
            now += seconds
            unsent -= reads
            verdict = patience.verdict(now, unsent, True)
            if reads:
                since = now
            expected = Verdict.UNREAD if now - since > UNREAD_SECONDS else Verdict.WAIT
            self.assertIs(verdict, expected)
            if verdict is Verdict.UNREAD:
                since = now
