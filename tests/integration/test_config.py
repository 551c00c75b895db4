"""A daemon that is told by a file what it is to be, and one that only says whether it could be."""

from __future__ import annotations

import os
import socket
from typing import Any

from tests.integration.case import QUICK_SECONDS, DaemonTestCase, RefusedTestCase
from tests.integration.daemon import CHECKOUT, Daemon, Ended, temporary_directory

TASKS = """
from taskd import task

@task
def add(a, b):
    return a + b
"""

FILE = """
port = 0
procs = 2
tasks = ["my_tasks.py"]
token-file = "tokens"
debug = true

[allow]
web = ["add", "taskd.*"]
"""

TOKEN = "0123456789abcdef0123456789abcdef"


class ConfigTests(DaemonTestCase):
    def from_file(self, *options: str, text: str = FILE, **more: Any) -> Daemon:
        """Make a daemon that is told everything by a file in a directory of its own."""
        return Daemon(
            *("--config", "conf/taskd.toml", *options),
            files={"conf/taskd.toml": text, "conf/my_tasks.py": TASKS},
            secrets={"conf/tokens": f"web:{TOKEN}\n"},
            tasks=None,
            port=None,
            **{"procs": None, **more},
        )

    def test_a_daemon_from_a_file(self) -> None:
        """A daemon is what its file says: its tasks, its tokens, and who may call what."""
        daemon = self.from_file()
        daemon.procs = 2
        daemon.procs = 2
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        self.wait_for_log(daemon, "workers serve")
        port = int(daemon.log.partition(" port ")[2].partition(" ")[0])
        daemon.port = port
        connection = self.connect(daemon)
        self.assertEqual(connection.ask("taskd.auth", {"token": TOKEN}), "web")
        self.assertEqual(connection.ask("add", [1, 2]), 3)
        error = self.assert_error(connection.ask("add", ["a", 2]), "task-failed")
        self.assertIn("TypeError", error["traceback"])
        self.assert_error(connection.ask("echo", ["x"]), "unauthorized", "--allow")
        self.assertEqual(len(connection.ask("taskd.status")["workers"]), 2)

    def test_the_command_line(self) -> None:
        """The command line wins over the file."""
        text = FILE.partition("token-file")[0]
        daemon = self.from_file("--tasks", "conf/my_tasks.py", text=text, procs=1)
        self.addCleanup(daemon.stop)
        daemon.start()
        self.assertEqual(len(daemon.status()["workers"]), 1)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)


class RefusedConfigTests(RefusedTestCase):
    def test_files_that_cannot_be(self) -> None:
        """A file that cannot be ends the start in one line, with the file and the key."""
        for text, words in (
            ("threads = '2'", ("c.toml", "threads", "a whole number")),
            ("threads = 1000", ("c.toml", "threads", "100")),
            ("colour = 1", ("c.toml", "colour")),
            ("port = 1\nport = 2\n", ("c.toml", "line 2")),
        ):
            ended = self.refuse("--config", "c.toml", files={"c.toml": text})
            self.assert_refused(ended, *words)


class CheckTests(RefusedTestCase):
    def check(self, *options: str, **more: Any) -> Ended:
        """Run a check, after which no process is left."""
        return Daemon("--check", *options, **more).run(QUICK_SECONDS)

    def test_good(self) -> None:
        """What could be started is told in one line, with status 0, and nothing is bound."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            ended = self.check(port=port, procs=3, tasks="t.py", files={"t.py": TASKS})
        good = (
            "taskd: the configuration is good: 3 workers, tasks: add, echo, send_mail; "
            f"listens on 127.0.0.1 port {port}\n"
        )
        self.assertEqual((ended.status, ended.output, ended.errors), (0, good, ""))

    def test_the_example(self) -> None:
        """The example of a file is one that a daemon could be started with."""
        example = str(CHECKOUT / "etc" / "taskd.toml")
        ended = self.check("--config", example, tasks=None, procs=None, port=None)
        self.assertEqual((ended.status, ended.errors), (0, ""))
        self.assertIn("tasks: echo, send_mail; listens on 127.0.0.1 port 12345", ended.output)

    def test_what_cannot_be(self) -> None:
        """What cannot be is told in one line, with status 1."""
        for options, more, words in (
            ((), {"tasks": "t.py", "files": {"t.py": "1 / 0\n"}}, ("t.py", "ZeroDivisionError")),
            (("--token-file", "tokens"), {"files": {"tokens": "web:x\n"}}, ("tokens",)),
            (("--tls", "a.pem", "--key", "a.key"), {}, ("/a.pem: No such file",)),
            (("--interface", "0.0.0.0"), {}, ("could run tasks", "--token-file")),
            (("--listen", "nowhere:1"), {}, ("--listen nowhere:1",)),
        ):
            self.assert_refused(self.check(*options, **more), *words)

    def test_no_trace(self) -> None:
        """A check leaves nothing behind in the directory where it runs."""
        directory = temporary_directory(self)
        (directory / "t.py").write_text(TASKS)
        options = ("--config", str(directory / "c.toml"), "--listen", f"unix:{directory}/socket")
        (directory / "c.toml").write_text('tasks = ["t.py"]\n')
        self.assertEqual(self.check(*options, tasks=None).status, 0)
        self.assertEqual(sorted(os.listdir(directory)), ["c.toml", "t.py"])
