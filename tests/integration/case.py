"""What the tests of real daemons have in common: to start, to connect, to hold a task."""

from __future__ import annotations

import json
import os
import signal
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import (
    Connection,
    Daemon,
    Ended,
    Process,
    touch_if_possible,
    wait_until,
)

__all__ = ["QUICK_SECONDS", "DaemonTestCase", "RefusedTestCase", "lines_of", "number_of_fds"]

QUICK_SECONDS: Final = 10.0
"""How soon a start that fails must be over; a busy machine needs most of it."""

_STARTS_AT_ONCE: Final = 4


def number_of_fds(pid: int) -> int:
    """Tell how many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def lines_of(path: str) -> list[str]:
    """Give what ``record`` has written; nothing if it has not."""
    return Path(path).read_text(encoding="utf-8").splitlines() if os.path.exists(path) else []


class DaemonTestCase(SynchronousTestCase):
    """Base of tests that have a daemon to themselves."""

    def start(self, *options: str, procs: int = 2, age: float = 0.0, **more: Any) -> Daemon:
        """Start a daemon, which ends with the test; its workers are *age* seconds old then."""
        daemon = Daemon(*options, procs=procs, **more)
        self.addCleanup(daemon.stop)
        daemon.start()
        if age:
            wait_until(
                lambda: all(w["uptime"] > age for w in daemon.status()["workers"]), what="age"
            )
        return daemon

    def connect(self, daemon: Daemon) -> Connection:
        connection = daemon.connect()
        self.addCleanup(connection.close)
        return connection

    def connect_to_each(self, daemon: Daemon) -> dict[int, Connection]:
        connections = daemon.connect_to_each()
        for connection in connections.values():
            self.addCleanup(connection.close)
        return connections

    def path(self, daemon: Daemon) -> str:
        """Name a file that is not there; at the end it is, so that no task holds for it."""
        path = daemon.directory / uuid.uuid4().hex
        self.addCleanup(touch_if_possible, path)
        return str(path)

    def directory(self, daemon: Daemon) -> Path:
        """Make a directory that ends with the daemon."""
        path = daemon.directory / uuid.uuid4().hex
        path.mkdir()
        return path

    def begin(self, daemon: Daemon, connection: Connection, function: str, **members: Any) -> str:
        """Start a task that leaves a note when it has begun, and wait for that."""
        path = self.path(daemon)
        connection.request(function, [path], **members)
        self.wait_for_begin(path)
        return path

    def wait_for_begin(self, path: str) -> None:
        """Wait until the task has begun that was given this path."""
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")

    def has_ended(self, path: str) -> bool:
        """Tell whether the task that held for this path has come to its own end."""
        return os.path.exists(path + ".ended")

    def wait_for_waiting(self, daemon: Daemon, count: int) -> None:
        """Wait until that many tasks wait in the pool's queue."""
        wait_until(
            lambda: daemon.status()["queue"]["waiting"] == count, what=f"{count} tasks that wait"
        )

    def wait_for_end_of(self, *pids: int) -> None:
        """Wait until nothing is left of these processes, not even a zombie."""
        for pid in pids:
            wait_until(lambda pid=pid: Process.read(pid) is None, what=f"the end of {pid}")

    def reload_failure(self, daemon: Daemon) -> str:
        """Tell why the last reload has failed, or ''."""
        reload = daemon.status()["supervisor"]["reload"]
        return (reload and reload["failure"]) or ""

    def load_anew(self, daemon: Daemon) -> None:
        """Have the daemon load all anew, and wait until its new workers have taken over."""
        before = daemon.workers()
        daemon.signal(signal.SIGHUP)
        daemon.wait_until_new(before)

    def wait_for_log(self, daemon: Daemon, *words: str) -> None:
        """Wait until the daemon's log has each of these."""
        for word in words:
            wait_until(lambda word=word: word in daemon.log, what=f"{word!r} in the log")

    def assert_error(self, reply: Any, code: str, *words: str) -> dict[str, Any]:
        """The reply is an error of that code, and its message has these words; give it."""
        self.assertIsInstance(reply, dict)
        self.assertIn("error", reply)
        error: dict[str, Any] = reply["error"]
        self.assertEqual(error["code"], code, reply)
        for word in words:
            self.assertIn(word, error["message"])
        return error

    def assert_goodbye(self, connection: Connection) -> None:
        """The daemon says that it will answer no more, and nothing else, and hangs up."""
        (line,) = connection.rest().splitlines()
        self.assert_error(json.loads(line), "shutting-down", "goodbye")

    def assert_port_is_free(self, daemon: Daemon) -> None:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", daemon.port))
            again.listen()


class RefusedTestCase(SynchronousTestCase):
    """Base of tests of starts that fail: one line on stderr, status 1, no process left."""

    def refuse(self, *options: str, tasks: str | None = None, **more: Any) -> Ended:
        """Start a daemon that cannot be, and see it end."""
        return Daemon(*options, tasks=tasks, **more).run(QUICK_SECONDS)

    def refuse_all(self, *starts: Sequence[str], **more: Any) -> list[Ended]:
        """Start daemons that cannot be, a few at a time, and see them end."""
        with ThreadPoolExecutor(_STARTS_AT_ONCE) as pool:
            return list(pool.map(lambda options: self.refuse(*options, **more), starts))

    def assert_refused(self, ended: Ended, *words: str) -> None:
        self.assertEqual(ended.status, 1, ended)
        lines = ended.errors.splitlines()
        self.assertEqual(len(lines), 1, ended.errors)
        for word in words:
            self.assertIn(word, lines[0])
        self.assertNotIn("Traceback", ended.output)
        self.assertNotIn("Unhandled", ended.output)
