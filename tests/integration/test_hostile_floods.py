"""Callers that ask for much more than anybody can have, and callers that do not read."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.case import lines_of
from tests.integration.crowd import Crowd, HostileTestCase
from tests.integration.daemon import wait_until

LETTERS = "x" * 100_000


def requests(function: str, args: list[Any], count: int | None = None) -> Iterator[bytes]:
    """Make requests with the ids 0, 1 and so on; endlessly if there is no count."""
    for number in itertools.count() if count is None else range(count):
        yield json.dumps({"function": function, "args": args, "id": number}).encode() + b"\n"


class UnreadTests(HostileTestCase):
    """Callers that ask and never read."""

    def test_large_replies(self) -> None:
        """20 who ask for 100 KB again and again, and never read, cost some MB until they go."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=64) as others:
            crowd = Crowd()
            for _ in range(20):
                crowd += self.crowd(daemon, 1, requests("echo", [LETTERS]))
            crowd.push_until_still()
            others.wait_for_more()
            self.tell(f"{sum(peer.sent for peer in crowd) / 2**20:.0f} MiB of requests were taken")
            crowd.close()

    def test_large_replies_of_tasks(self) -> None:
        """So do those whose replies come from threads, as ``--max-in-flight`` allows."""
        daemon = self.start("--max-in-flight", "16", procs=2)
        with self.unharmed(daemon, most_mib=128) as others:
            crowd = Crowd()
            for _ in range(20):
                crowd += self.crowd(daemon, 1, requests("letters", [len(LETTERS)], 200))
            crowd.push_until_still()
            others.wait_for_more()
            crowd.close()

    def test_one_after_the_other(self) -> None:
        """60 who come one by one, and leave most of 8 MB unread, cost no more than a few."""
        daemon = self.start(procs=2)
        with self.unharmed(daemon, most_mib=128):
            for number in range(60):
                (peer,) = crowd = self.crowd(daemon, 1, requests("letters", [8_000_000], 1))
                crowd.push()
                wait_until(lambda peer=peer: peer.socket.recv(1), what="the reply's beginning")
                (peer.reset if number % 2 else peer.close)()

    def test_reports_from_thread(self) -> None:
        """Reports of a task's thread that its caller does not read are not kept; the reply is."""
        self.check_reports("report_quickly")

    def test_reports_on_reactor(self) -> None:
        """Nor are those of a coroutine."""
        self.check_reports("report_quickly_on_reactor")

    def check_reports(self, function: str) -> None:
        """Ask for 80 MB of reports, and read them when the task is over."""
        daemon = self.start(procs=2)
        with self.unharmed(daemon, most_mib=16) as others:
            path = self.path(daemon)
            request = {"function": function, "args": [path, 20_000, 4000]}
            line = json.dumps({**request, "id": 1, "progress": True}).encode() + b"\n"
            crowd = self.crowd(daemon, 1, [line])
            crowd.push()
            wait_until(lambda: os.path.exists(path + ".ended"), 60, what="the task's end")
            others.wait_for_more()
            (peer,) = crowd
            wait_until(lambda: [peer.hear(), b'"result"' in peer.heard[-200:]][1], what="all")
            *reports, reply = peer.replies()
            self.assertEqual(reply, {"id": 1, "result": 20_000})
            done = [report["progress"]["done"] for report in reports]
            self.assertEqual(done, sorted(set(done)))
            self.assertLess(len(done), 20_000)
            self.tell(f"{len(reports)} reports of 20000 came")
            crowd.close()


class FloodTests(HostileTestCase):
    def assert_all_answered(self, crowd: Crowd, count: int, result: Any) -> None:
        """Read, while the rest is sent; everybody has the right reply to each request, once."""
        wait_until(lambda: crowd.have_heard(count), 60, what="all replies")
        for peer in crowd:
            replies = peer.replies()
            self.assertEqual(Counter(r["id"] for r in replies), Counter(range(count)))
            self.assertFalse([r for r in replies if r.get("result") != result])

    def test_burst(self) -> None:
        """100 000 requests in one burst, of which no reply is read meanwhile, are all answered."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=32) as others:
            crowd = self.crowd(daemon, 1, requests("at_once", [7], 100_000))
            crowd.push_until_still()
            others.wait_for_more()
            self.assert_all_answered(crowd, 100_000, 7)
            crowd.close()

    def test_bursts(self) -> None:
        """So are those of 20 at once, for tasks that run in threads."""
        daemon = self.start(procs=2)
        with self.unharmed(daemon, most_mib=96) as others:
            crowd = Crowd()
            for _ in range(20):
                crowd += self.crowd(daemon, 1, requests("add", [3, 4], 2000))
            crowd.push_until_still()
            others.wait_for_more()
            self.assert_all_answered(crowd, 2000, 7)
            crowd.close()

    def test_beyond_the_backlog(self) -> None:
        """Of 2000 requests 100 wait, as ``--backlog`` says; each of the others is refused."""
        daemon = self.start("--backlog", "100", procs=2)
        # The other caller asks for what blocks, too, and would be refused.
        with self.unharmed(daemon, most_mib=48, windows=()):
            holders = self.connect_to_each(daemon)
            held = [self.begin(daemon, holder, "hold") for holder in holders.values()]
            notes = self.path(daemon)
            crowd = Crowd()
            for name in range(20):
                word = f"{name}"
                crowd += self.crowd(daemon, 1, requests("record", [notes, word], 100))
            wait_until(lambda: self.refused(crowd) >= 1900, what="1900 refusals")
            self.assertEqual(daemon.ask("at_once", [5]), 5)
            self.wait_for_waiting(daemon, 100)
            for path in held:
                Path(path).touch()
            wait_until(lambda: crowd.have_heard(100), what="all replies")
            for holder in holders.values():
                self.assertEqual(holder.reply(), "released")
                holder.close()
            self.check_fates(crowd, lines_of(notes))
            crowd.close()

    def refused(self, crowd: Crowd) -> int:
        crowd.push()
        crowd.hear()
        return sum(peer.heard.count(b'"overloaded"') for peer in crowd)

    def check_fates(self, crowd: Crowd, notes: list[str]) -> None:
        """Each request has one reply, and those that were not refused have run once."""
        ran: Counter[str] = Counter()
        for name, peer in enumerate(crowd):
            replies = peer.replies()
            self.assertEqual(Counter(r["id"] for r in replies), Counter(range(100)))
            for reply in replies:
                if "error" in reply:
                    self.assert_error(reply, "overloaded")
                else:
                    ran[reply["result"]] += 1
                    self.assertEqual(reply["result"], f"{name}")
        self.assertEqual(ran, Counter(notes))
        self.assertEqual(ran.total(), 100)
