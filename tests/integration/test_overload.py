"""Too much of everything: tasks, requests in flight, connections, silence."""

from __future__ import annotations

import json
import re
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.integration.case import DaemonTestCase, lines_of
from tests.integration.daemon import Connection, Daemon, wait_until

MOST_GROWTH_KIB = 64 * 1024
"""By so much a worker may grow at most; what it must not keep is far more."""

STALLED_SECONDS = 1.0
"""A peer that takes nothing for so long is taken not to read."""


class BacklogTests(DaemonTestCase):
    def test_backlog(self) -> None:
        """Beyond ``--backlog`` tasks are refused as overloaded, and the others are all run."""
        daemon = self.start("--backlog", "3", procs=1)
        caller, notes = self.connect(daemon), self.path(daemon)
        path = self.begin(daemon, caller, "hold", id="long")
        for number in range(10):
            caller.request("record", [notes, str(number)], id=str(number))
        refused = caller.replies_by_id(7)
        for reply in refused.values():
            error = self.assert_error(reply, "overloaded", "3 tasks wait")
            self.assertTrue(error["retryable"])
            self.assertTrue(0 < error["retry_after"] <= 60, error)
        self.assertEqual(daemon.status()["queue"]["waiting"], 3)
        wait_until(lambda: daemon.status()["queue"]["refused"] == 7, what="the count of refusals")
        Path(path).touch()
        answered = caller.replies_by_id(4)
        self.assertEqual(answered.pop("long")["result"], "released")
        self.assertEqual(set(answered), {str(n) for n in range(10)} - set(refused))
        self.assertEqual(Counter(lines_of(notes)), Counter(answered.keys()))
        self.assertEqual(caller.ask("add", [1, 2]), 3)

    def test_room_again(self) -> None:
        """Once a task that waited has been taken back, another one may wait."""
        daemon = self.start("--backlog", "1", procs=1)
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id="long")
        caller.request("add", [1, 1], id="waits")
        self.wait_for_waiting(daemon, 1)
        self.assert_error(caller.ask("add", [2, 2], id="too much"), "overloaded")
        caller.request("taskd.cancel", ["waits"], id="cancel")
        self.assertEqual(set(caller.replies_by_id(2)), {"waits", "cancel"})
        caller.request("add", [3, 3], id="waits now")
        self.wait_for_waiting(daemon, 1)
        Path(path).touch()
        self.assertEqual(caller.replies_by_id(2)["waits now"]["result"], 6)

    def test_no_backlog(self) -> None:
        """With ``--backlog 0`` idle workers are still handed tasks, and no task waits."""
        daemon = self.start("--backlog", "0", procs=4)
        caller, room = self.connect(daemon), str(self.directory(daemon))
        for number in range(4):
            caller.request("meet", [room, str(number), 4], id=number)
        pids = {reply["result"] for reply in caller.replies_by_id(4).values()}
        self.assertEqual(pids, set(daemon.workers().values()))
        paths = [self.begin(daemon, caller, "hold", id=f"hold {n}") for n in range(4)]
        self.assert_error(caller.ask("add", [1, 2], id="too much"), "overloaded")
        self.assertEqual(daemon.status()["queue"]["waiting"], 0)
        self.assertEqual(caller.ask("later", ["x"], id=1), {"id": 1, "result": "x"})
        for path in paths:
            Path(path).touch()
        self.assertEqual(set(caller.replies_by_id(4)), {f"hold {n}" for n in range(4)})

    def test_time_in_the_queue(self) -> None:
        """A caller's time runs while its task waits; one whose time is over never starts."""
        daemon = self.start()
        caller = self.connect(daemon)
        paths = [self.begin(daemon, caller, "hold", id=f"hold {n}") for n in range(2)]
        notes = self.path(daemon)
        for number in range(5):
            caller.request("record", [notes, str(number)], id=number, timeout=0.2)
        caller.request("record", [notes, "patient"], id="patient", timeout=3600)
        caller.request("record", [notes, "no limit"], id="no limit")
        for reply in caller.replies_by_id(5).values():
            self.assertIn(reply["id"], range(5))
            self.assert_error(reply, "time-limit", "0.2 s")
        self.wait_for_waiting(daemon, 2)
        for path in paths:
            Path(path).touch()
        self.assertEqual(set(caller.replies_by_id(4)), {"hold 0", "hold 1", "patient", "no limit"})
        self.assertEqual(set(lines_of(notes)), {"patient", "no limit"})
        self.assertEqual(daemon.restarts(), {})

    def test_rest_of_the_time(self) -> None:
        """A task that waited has only the rest of its caller's time, wherever it runs then."""
        daemon = self.start()
        caller = self.connect(daemon)
        long = [self.begin(daemon, caller, "hold", id=f"hold {n}") for n in range(2)]
        path = self.path(daemon)
        caller.request("hold", [path], id="late", timeout=2)
        self.wait_for_waiting(daemon, 1)
        Path(long[1]).touch()
        self.assertEqual(caller.reply()["id"], "hold 1")
        self.wait_for_begin(path)
        self.assert_error(caller.reply(), "time-limit", "2 s")
        Path(long[0]).touch()
        self.assertEqual(caller.reply(), {"id": "hold 0", "result": "released"})
        wait_until(lambda: daemon.restarts() == {"time_limit": 1}, what="a replaced worker")
        daemon.wait_until_settled()
        self.assertFalse(self.has_ended(path))


class _Flood:
    """
    Requests that are sent as far as they are taken, then while replies are read.

    Args:
        port: The daemon's.
        lines: What is sent.
    """

    def __init__(self, port: int, lines: Iterator[bytes]) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._lines = lines
        self._rest = b""
        self.is_all_sent = False

    def send_what_is_taken(self) -> None:
        """Send until the daemon has stopped to read, or there is nothing more."""
        self._socket.setblocking(False)
        while not self.is_all_sent:
            if not self._rest:
                self._rest = next(self._lines, b"")
                self.is_all_sent = not self._rest
            try:
                self._rest = self._rest[self._socket.send(self._rest) :]
            except BlockingIOError:
                if not select.select([], [self._socket], [], STALLED_SECONDS)[1]:
                    return

    def read(self, count: int) -> Iterator[dict[str, object]]:
        """Send the rest meanwhile, and give that many replies."""
        self._socket.settimeout(60)
        sending = threading.Thread(target=self._send_rest, daemon=True)
        sending.start()
        with self._socket.makefile("rb") as lines:
            for _ in range(count):
                yield json.loads(lines.readline())
        sending.join()

    def _send_rest(self) -> None:
        self._socket.sendall(self._rest)
        for line in self._lines:
            self._socket.sendall(line)

    def close(self) -> None:
        self._socket.close()


def peak_kib(pid: int) -> int:
    """Tell how much memory a process has had resident at most."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(peak)


class FloodTests(DaemonTestCase):
    """Callers that send much more than the daemon may keep."""

    def start_and_measure(self, *options: str) -> tuple[Daemon, dict[int, int]]:
        """Start one worker; give also what it and the supervisor have had resident so far."""
        daemon = self.start(*options, procs=1)
        pids = [daemon.pid, *daemon.workers().values()]
        return daemon, {pid: peak_kib(pid) for pid in pids}

    def assert_bounded(self, before: dict[int, int]) -> None:
        for pid, peak in before.items():
            self.assertLess(peak_kib(pid) - peak, MOST_GROWTH_KIB)

    def flood(self, daemon: Daemon, function: str, args: list[object], count: int) -> _Flood:
        lines = (
            json.dumps({"function": function, "args": args, "id": number}).encode() + b"\n"
            for number in range(count)
        )
        flood = _Flood(daemon.port, lines)
        self.addCleanup(flood.close)
        return flood

    def test_max_in_flight(self) -> None:
        """With ``--max-in-flight`` calls in flight a caller is not read from, and loses nothing."""
        daemon, before = self.start_and_measure("--max-in-flight", "64")
        path = self.begin(daemon, self.connect(daemon), "hold")
        flood = self.flood(daemon, "record", ["/dev/null", "x" * 20_000], 10_000)
        flood.send_what_is_taken()
        self.assertFalse(flood.is_all_sent)
        self.wait_for_waiting(daemon, 64)
        Path(path).touch()
        came = Counter(reply["id"] for reply in flood.read(10_000) if "result" in reply)
        self.assertEqual(came, Counter(range(10_000)))
        self.assert_bounded(before)

    def test_replies_that_nobody_reads(self) -> None:
        """A caller that reads no replies is not read from, and gets all when it does."""
        daemon, before = self.start_and_measure("--max-in-flight", "64")
        flood = self.flood(daemon, "letters", [100_000], 2000)
        flood.send_what_is_taken()
        self.wait_until_still(daemon)
        self.assertLess(daemon.status()["totals"]["done"], 1000)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        came = Counter(reply["id"] for reply in flood.read(2000) if reply["result"])
        self.assertEqual(came, Counter(range(2000)))
        self.assert_bounded(before)

    def test_replies_at_once_that_nobody_reads(self) -> None:
        """That holds for what does not block as well, though it is never in flight."""
        daemon, before = self.start_and_measure()
        flood = self.flood(daemon, "echo", ["x" * 20_000], 10_000)
        flood.send_what_is_taken()
        self.assertFalse(flood.is_all_sent)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        came = Counter(reply["id"] for reply in flood.read(10_000) if reply["result"])
        self.assertEqual(came, Counter(range(10_000)))
        self.assert_bounded(before)

    def wait_until_still(self, daemon: Daemon) -> None:
        """Wait until no more tasks are done, but those that are asked for here."""
        seen: list[int] = []

        def is_still() -> bool:
            with daemon.connect() as connection:
                done = [connection.ask("taskd.status")["totals"]["done"] for _ in range(2)]
            seen.append(done[0])
            # Each look adds two.
            return len(seen) > 30 and seen[-1] - seen[-30] == 2 * 29

        wait_until(is_still, what="a worker that does nothing")


class ConnectionLimitTests(DaemonTestCase):
    def test_max_connections(self) -> None:
        """Beyond ``--max-connections`` a caller is told to come back, and others are served."""
        daemon = self.start("--max-connections", "5")
        first = self.connect(daemon)
        wait_until(
            lambda: first.ask("taskd.status")["totals"]["connections"] == 1, what="no other caller"
        )
        callers = [first, *(self.connect(daemon) for _ in range(4))]
        for caller in callers:
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        for _ in range(3):
            late = self.connect(daemon)
            error = self.assert_error(late.reply(), "overloaded", "--max-connections")
            self.assertTrue(error["retryable"])
            self.assertGreater(error["retry_after"], 0)
            self.assertEqual(late.rest(), b"")
            late.close()
        for caller in callers:
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        callers[3].close()
        wait_until(lambda: self.is_served(daemon), what="room for another caller")

    def is_served(self, daemon: Daemon) -> bool:
        try:
            return bool(daemon.ask("taskd.ping") == "pong")
        except EOFError:
            return False

    def test_first_line_timeout(self) -> None:
        """``--first-line-timeout`` ends who sends no complete line, and nobody else."""
        daemon = self.start("--first-line-timeout", "1.5")
        speaking, working = self.connect(daemon), self.connect(daemon)
        self.assertEqual(speaking.ask("taskd.ping"), "pong")
        path = self.begin(daemon, working, "hold")
        silent, halfway = self.connect(daemon), self.connect(daemon)
        halfway.send('{"function": "add", ')
        for caller in (silent, halfway):
            self.assert_error(caller.reply(), "malformed", "1.5 s")
            self.assertEqual(caller.rest(), b"")
        self.assertEqual(speaking.ask("add", [1, 2]), 3)
        Path(path).touch()
        self.assertEqual(working.reply(), "released")

    def test_first_line_timeout_of_gone_caller(self) -> None:
        """A silent caller that has gone before its time leaves nothing behind."""
        daemon = self.start("--first-line-timeout", "0.5")
        for _ in range(20):
            daemon.connect().close()
        wait_until(
            lambda: daemon.status()["totals"]["connections"] == 1, what="the end of the silent"
        )
        self.assertNotIn("Traceback", daemon.log)

    def test_idle_timeout(self) -> None:
        """``--idle-timeout`` ends who asks nothing, but not while a task is in flight."""
        daemon = self.start("--idle-timeout", "1")
        working, idle = self.connect(daemon), self.connect(daemon)
        self.assertEqual(idle.ask("add", [1, 2]), 3)
        path = self.begin(daemon, working, "hold")
        elsewhere = self.begin(daemon, working, "hold")
        # Both workers have looked for idle callers when these are gone.
        for caller in (idle, *self.idle_ones(daemon)):
            self.assertEqual(caller.rest(), b"")
        for held in (path, elsewhere):
            Path(held).touch()
            self.assertEqual(working.reply(), "released")
        self.assertEqual(working.rest(), b"")

    def idle_ones(self, daemon: Daemon) -> list[Connection]:
        return list(self.connect_to_each(daemon).values())
