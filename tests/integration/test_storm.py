"""Many random deaths under load: what must be true of every request, and of what is left."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter

from tests.integration.case import DaemonTestCase, lines_of, number_of_fds
from tests.integration.daemon import Connection, Daemon, children_of, wait_until

PROCS = 6
STORM_SECONDS = 10.0
SEED = 0
LONGEST_PAUSE_SECONDS = 0.3
ZYGOTE_SHARE = 0.08
"""So many of those that are killed are the zygote."""

WHOLE_SECONDS = 60.0
"""Workers that die young one after the other are replaced ever more slowly."""


class _Caller(threading.Thread):
    """
    Asks without a pause, over a new connection whenever one ends.

    Args:
        daemon: Who is asked.
        notes: The file in which the tasks leave their ids.
        name: The caller's own, with which its ids begin.
        window: So many requests it has in flight.
    """

    def __init__(self, daemon: Daemon, notes: str, name: str, window: int) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._notes = notes
        self._name = name
        self._window = window
        self._count = 0
        self._dice = random.Random(name)
        self._in_flight: set[str] = set()
        self.is_stopping = False
        self.replies: Counter[str] = Counter()
        self.results: set[str] = set()
        self.unanswered: set[str] = set()
        self.codes: Counter[str] = Counter()
        self.oddities: list[object] = []

    def run(self) -> None:
        while not self.is_stopping:
            # Between two workers the port is full for a moment, or just closed.
            with contextlib.suppress(OSError, EOFError), self._daemon.connect() as connection:
                self._converse(connection)
            self.unanswered |= self._in_flight
            self._in_flight.clear()

    def _converse(self, connection: Connection) -> None:
        for _ in range(self._window):
            self._ask(connection)
        while self._in_flight:
            try:
                line = connection.line()
            except TimeoutError:
                self.oddities.append(f"neither replies nor an end: {self._in_flight}")
                return
            if not line.endswith(b"\n"):
                raise EOFError
            self._take(line)
            if not self.is_stopping:
                self._ask(connection)

    def _ask(self, connection: Connection) -> None:
        self._count += 1
        given = f"{self._name}.{self._count}"
        self._in_flight.add(given)
        seconds = self._dice.choice((0.0, 0.0, 0.002, 0.02, 0.1))
        members = self._dice.choice(
            ({}, {}, {"priority": 1}, {"timeout": 30}, {"cancel_on_disconnect": True})
        )
        connection.request("record", [self._notes, given, seconds], id=given, **members)

    def _take(self, line: bytes) -> None:
        reply = json.loads(line)
        given = reply["id"]
        self.replies[given] += 1
        if given not in self._in_flight:
            self.oddities.append(line)
        self._in_flight.discard(given)
        if "error" in reply:
            self.codes[reply["error"]["code"]] += 1
        elif reply["result"] == given:
            self.results.add(given)
        else:
            self.oddities.append(line)


class StormTests(DaemonTestCase):
    def test_storm(self) -> None:
        """Whoever dies, no task starts twice, each caller hears of its end, and nothing is left."""
        daemon = self.start(procs=PROCS)
        supervisor = daemon.pid
        notes = self.path(daemon)
        before = [number_of_fds(pid) for pid in (supervisor, daemon.zygote)]
        callers = [_Caller(daemon, notes, f"c{n}", 1 + 3 * (n % 3)) for n in range(8)]
        for caller in callers:
            caller.start()
        killed = self.storm(daemon)
        for caller in callers:
            caller.is_stopping = True
        for caller in callers:
            caller.join(WHOLE_SECONDS)
            self.assertFalse(caller.is_alive())
        daemon.wait_until_settled(WHOLE_SECONDS)
        self.check_replies(callers, lines_of(notes))
        self.assertGreater(killed["worker"], 10)
        self.assertEqual(set(daemon.restarts()) - {"time_limit"}, {"died"})
        # Those of callers that were hung up on come to their end as well.
        wait_until(lambda: self.is_idle(daemon), what="the end of every task")
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.check_processes(daemon)
        self.end_orphans(daemon)
        for pid, count in zip((supervisor, daemon.zygote), before, strict=True):
            wait_until(
                lambda pid=pid, count=count: number_of_fds(pid) == count,
                what=f"{count} open files, as before",
            )
        daemon.stop()

    def is_idle(self, daemon: Daemon) -> bool:
        status = daemon.status()
        return status["queue"]["waiting"] == status["totals"]["in_flight"] == 0

    def end_orphans(self, daemon: Daemon) -> None:
        """End the workers of dead zygotes, for which the supervisor keeps the pipes."""
        for child in children_of(daemon.pid):
            if child.pid != daemon.zygote:
                daemon.kill(child.pid)
                self.wait_for_end_of(child.pid)
        daemon.wait_until_settled(WHOLE_SECONDS)

    def storm(self, daemon: Daemon) -> Counter[str]:
        """Kill one process after the other, and count them."""
        dice = random.Random(SEED)
        killed: Counter[str] = Counter()
        deadline = time.monotonic() + STORM_SECONDS
        while time.monotonic() < deadline:
            time.sleep(dice.uniform(0.0, LONGEST_PAUSE_SECONDS))
            processes = [p for p in daemon.processes() if p.pid != daemon.pid]
            zygotes = [p for p in processes if p.title == "taskd: zygote"]
            workers = [p for p in processes if p.title.startswith("taskd: worker")]
            kind = "zygote" if dice.random() < ZYGOTE_SHARE else "worker"
            victims = zygotes if kind == "zygote" else workers
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    daemon.kill(dice.choice(victims).pid)
                    killed[kind] += 1
        return killed

    def check_replies(self, callers: list[_Caller], started: list[str]) -> None:
        times = Counter(started)
        self.assertEqual([given for given, count in times.items() if count > 1], [])
        for caller in callers:
            self.assertEqual(caller.oddities, [])
            self.assertEqual([g for g, count in caller.replies.items() if count > 1], [])
            self.assertEqual(caller.unanswered & set(caller.replies), set())
            # What was answered with a result has certainly run.
            self.assertEqual(caller.results - set(times), set())
            self.assertLessEqual(set(caller.codes), {"worker-lost"})
            self.assertGreater(len(caller.results), 0)

    def check_processes(self, daemon: Daemon) -> None:
        """Nobody is there but the supervisor, its zygote and its workers."""
        expected = {daemon.pid, daemon.zygote, *daemon.workers().values()}
        wait_until(
            lambda: {process.pid for process in daemon.processes()} == expected,
            what="nobody but the daemon",
        )
        for parent in (daemon.pid, daemon.zygote):
            wait_until(
                lambda parent=parent: not any(c.is_zombie for c in children_of(parent)),
                what="no zombie",
            )
