"""Ten thousand callers that stay, and a daemon that has no room for those who come."""

from __future__ import annotations

import resource
import time
import unittest
from typing import Final

from tests.integration.crowd import (
    Crowd,
    HostileTestCase,
    cpu_seconds,
    proportional_kib,
    resident_kib,
)
from tests.integration.daemon import Connection, Daemon, wait_until

MANY: Final = 10_000
AT_A_TIME: Final = 1000
OPEN_SECONDS: Final = 120.0

EXHAUSTION_SECONDS: Final = 2.0
MOST_CPU_SHARE: Final = 0.2

_ASK: Final = b'{"function": "at_once", "args": [1]}\n'


class ManyTests(HostileTestCase):
    def setUp(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = MANY + 1000
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise unittest.SkipTest(f"no process may have {needed} files open here")
        if soft < needed:
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

    def test_ten_thousand_idle(self) -> None:
        """One worker holds 10 000 idle connections, serves others, and answers each that asks."""
        daemon = self.start("--first-line-timeout", "600", procs=1)
        (worker,) = daemon.workers().values()
        rss, pss = resident_kib(worker), proportional_kib(self.pids(daemon))
        with self.unharmed(daemon, most_mib=200) as others:
            crowd, began = Crowd(), time.monotonic()
            self.addCleanup(crowd.close)
            while len(crowd) < MANY:
                crowd += self.crowd(daemon, AT_A_TIME)
                self.wait_for_accepted(daemon, len(crowd), OPEN_SECONDS)
            took = time.monotonic() - began
            self.wait_for_connections(daemon, MANY + 2)  # who asks, and the other caller
            others.wait_for_more(500)
            self.tell(
                f"{MANY} connections were open after {took:.1f} s; "
                f"{(resident_kib(worker) - rss) / MANY:.2f} KiB each (RSS of the worker), "
                f"{(proportional_kib(self.pids(daemon)) - pss) / MANY:.2f} KiB each (PSS of all)"
            )
            crowd.say(_ASK)
            wait_until(lambda: crowd.have_heard(1), 60, what="an answer for all")
            self.assertEqual({bytes(peer.heard) for peer in crowd}, {b"1\n"})
            crowd.close()


class NoRoomTests(HostileTestCase):
    """Daemons whose processes may open few files."""

    def watch_exhaustion(self, daemon: Daemon, crowd: Crowd, caller: Connection) -> None:
        """See for a while that the daemon is at peace, serves, and hangs up on nobody."""
        pids = [worker["pid"] for worker in caller.ask("taskd.status")["workers"]]
        before, began = cpu_seconds(pids), time.monotonic()
        wait_until(
            lambda: time.monotonic() > began + EXHAUSTION_SECONDS, what="some time without room"
        )
        share = (cpu_seconds(pids) - before) / (time.monotonic() - began)
        lines = daemon.log.count("no connection can be accepted")
        self.tell(
            f"{len(pids)} workers took {share:.2%} of one processor while there was no room; "
            f"{lines} lines in the log"
        )
        self.assertLess(share, MOST_CPU_SHARE)
        self.assertEqual(caller.ask("add", [1, 2]), 3)
        crowd.hear()
        self.assertFalse([peer for peer in crowd if peer.is_ended])

    def answered(self, crowd: Crowd) -> int:
        return sum(bool(peer.heard) for peer in crowd)

    def wait_for_all(self, crowd: Crowd) -> None:
        """Have each go as soon as it is answered, until all are."""

        def are_all_answered() -> bool:
            crowd.hear()
            for peer in crowd:
                if peer.heard:
                    peer.close()
                self.assertFalse(peer.is_ended and not peer.heard, "accepted, then closed")
            crowd[:] = [peer for peer in crowd if not peer.heard]
            return not crowd

        wait_until(are_all_answered, 60, what="an answer for all")

    def test_few_files(self) -> None:
        """With 64 files a process, 300 callers wait for room in peace, and all are answered."""
        daemon = self.start(procs=3, most_fds=64)
        with self.unharmed(daemon, most_mib=16, windows=()), daemon.connect() as caller:
            self.assertEqual(caller.ask("add", [1, 2]), 3)
            crowd = self.crowd(daemon, 300, [_ASK])
            crowd.push()
            wait_until(
                lambda: crowd.hear() or self.answered(crowd) >= 2, what="answers where is room"
            )
            self.watch_exhaustion(daemon, crowd, caller)
            self.assertLess(self.answered(crowd), 10)
            self.wait_for_all(crowd)
            self.assertEqual(caller.ask("add", [1, 2]), 3)

    def test_no_file_left(self) -> None:
        """A worker that a task has left no file waits in peace; then all are answered."""
        daemon = self.start(procs=1, most_fds=256)
        with self.unharmed(daemon, most_mib=16, windows=()), daemon.connect() as caller:
            self.assertGreater(caller.ask("open_all_files"), 100)
            crowd = self.crowd(daemon, 300, [_ASK])
            crowd.push()
            self.watch_exhaustion(daemon, crowd, caller)
            self.assertFalse([peer for peer in crowd if peer.heard])
            self.assertGreater(caller.ask("close_all_files"), 100)
            self.wait_for_all(crowd)
