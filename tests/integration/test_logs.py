"""What the log of a daemon says, in both formats, and what it never says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from typing import Any

from tests.integration.case import DaemonTestCase
from tests.integration.daemon import Connection, Daemon, wait_until

TASKS = """
import os
import time

from twisted.logger import Logger

from taskd import task

log = Logger()
print("imported")

@task
def fail(word, *rest):
    log.info("about to fail", step=1)
    raise ValueError(f"it is {word}\\n2026-01-01T00:00:00+0000 [taskd#info] no line of its own")

@task(name="fail_at_once", blocking=False)
def fail_at_once(word):
    log.info("about to fail at once")
    raise ValueError(word)

@task
async def fail_later(word):
    log.info("about to fail later")
    raise ValueError(word)

@task(timeout=0.2)
def hold(path):
    while not os.path.exists(path):
        time.sleep(0.01)

@task
def wait(path):
    open(path + ".begun", "w").close()
    while not os.path.exists(path):
        time.sleep(0.01)

@task
def say(text):
    os.write(1, text.encode() + b"\\n")
    os.write(2, b"\\xff" + text.encode() + b"\\n")
"""

TOKEN = "s3cr3t-token-of-web-0123456789abcdef"
WRONG = "wr0ng-token-that-nobody-has-0123456789"
PASSWORD = "s3cr3t-password"
ARGUMENT = "s3cr3t-argument"
OLD_LINE = "2026-01-01T00:00:00+0000 [taskd#info]"


class LogTestCase(DaemonTestCase):
    def daemon(self, *options: str, log_format: str = "json", **more: Any) -> Daemon:
        """Start a daemon whose log has that format."""
        return self.start(
            *("--log-format", log_format, *options),
            tasks="the_tasks.py",
            **{"files": {"the_tasks.py": TASKS}, **more},
        )

    def events(self, daemon: Daemon) -> list[dict[str, Any]]:
        """Give the events of a log, after it was seen that every line is one."""
        events = []
        for line in daemon.log.splitlines():
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
                continue
            self.fail(f"this is no JSON: {line!r}")
        for event in events:
            self.assertRegex(event["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")
            self.assertIn(event["level"], ("debug", "info", "warn", "error", "critical"))
            self.assertIsInstance(event["logger"], str)
            self.assertIsInstance(event["message"], str)
        return events

    def find(self, daemon: Daemon, words: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event whose message has these words, and that has these fields."""

        def look() -> dict[str, Any] | None:
            complete = daemon.log.rpartition("\n")[0]
            for line in complete.splitlines():
                event: dict[str, Any] = json.loads(line)
                if words in event["message"] and fields.items() <= event.items():
                    return event
            return None

        found = wait_until(look, what=f"{words!r} with {fields} in the log")
        assert found is not None
        return found

    def connect_as_web(self, daemon: Daemon) -> Connection:
        connection = Connection("127.0.0.1", daemon.port)
        self.addCleanup(connection.close)
        self.assertEqual(connection.ask("taskd.auth", {"token": TOKEN}), "web")
        return connection


class JsonTests(LogTestCase):
    def test_a_whole_life(self) -> None:
        """From its start to its end, whatever happens, every line is one JSON object."""
        daemon = self.daemon("--log-level", "debug", "--grace", "1")
        for name in ("fail", "fail_at_once", "fail_later"):
            self.assert_error(daemon.ask(name, ["a\nb"]), "task-failed")
        self.assert_error(daemon.ask("hold", [self.path(daemon)]), "time-limit")
        self.wait_for_log(daemon, "was replaced: time-limit")
        daemon.ask("say", ["one\rtwo \x1b[31m"])
        before = daemon.wait_until_settled()
        victim = min(before)
        daemon.kill(before[victim])
        daemon.wait_until_new({victim: before[victim]})
        self.load_anew(daemon)
        with Connection("127.0.0.1", daemon.port) as connection:
            connection.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            connection.is_hung_up()
        self.find(daemon, "it speaks HTTP")
        self.find(daemon, "imported", logger="taskd.output", stream="stdout")
        self.find(daemon, "\\xffone", logger="taskd.output", stream="stderr")
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        events = self.events(daemon)
        messages = "\n".join(event["message"] for event in events)
        for words in (
            *("starting up", "imported", "workers serve", "was replaced: time-limit"),
            *("was killed by SIGKILL", "the new code is loaded", "was replaced: reload"),
            *("Received SIGTERM", "Server Shut Down"),
        ):
            self.assertIn(words, messages)
        self.assertEqual(daemon.errors, "")

    def test_a_task_that_fails(self) -> None:
        """A failure says which call's it is, from where and by whom, with its traceback."""
        daemon = self.daemon(
            "--token-file",
            "tokens",
            secrets={"tokens": f"web:{TOKEN}\n"},
            caller=self.connect_as_web,
        )
        connection = self.connect_as_web(daemon)
        for name in ("fail", "fail_at_once", "fail_later"):
            connection.ask(name, ["x"], id={"of": name})
            event = self.find(daemon, f"{name} failed", function=name)
            self.assertEqual(event["id"], f'{{"of":"{name}"}}')
            self.assertRegex(event["connection"], r"^127\.0\.0\.1 port \d+$")
            self.assertEqual((event["caller"], event["level"]), ("web", "warn"))
            self.assertIn(event["worker"], (1, 2))
            self.assertEqual(event["pid"], daemon.workers()[event["worker"]])
            self.assertEqual(event["logger"], "taskd.ledger")
            self.assertLess(event["seconds"], 10)
            self.assertTrue(event["error"].startswith("ValueError: "))
            self.assertIn("the_tasks.py", event["traceback"])

    def test_what_a_task_logs(self) -> None:
        """What a task logs itself, wherever it runs, says which call's it is."""
        daemon = self.daemon()
        with daemon.connect() as connection:
            for name, words in (
                ("fail", "about to fail"),
                ("fail_at_once", "about to fail at once"),
                ("fail_later", "about to fail later"),
            ):
                connection.ask(name, ["x"], id=name)
                event = self.find(daemon, words, function=name)
                self.assertEqual((event["id"], event["logger"]), (f'"{name}"', "the_tasks"))
                self.assertIn("127.0.0.1 port", event["connection"])
        self.assertEqual(self.find(daemon, "about to fail", function="fail")["step"], 1)

    def test_a_time_limit(self) -> None:
        """A task that comes to its limit is told, and where its thread stands."""
        daemon = self.daemon()
        self.assert_error(daemon.ask("hold", [self.path(daemon)], id=7), "time-limit")
        event = self.find(daemon, "hold was not done within 0.2 s", id="7", level="warn")
        self.assertEqual((event["code"], event["function"]), ("time-limit", "hold"))
        event = self.find(daemon, "hold was given up and goes on", id="7", level="warn")
        self.assertIn("time.sleep", event["traceback"])

    def test_a_task_that_is_cancelled(self) -> None:
        """A task that its caller cancels is told."""
        daemon = self.daemon()
        path = self.path(daemon)
        with daemon.connect() as connection:
            connection.request("wait", [path], id=5)
            self.wait_for_begin(path)
            connection.request("taskd.cancel", [5])
            event = self.find(daemon, "wait was cancelled by its caller", id="5")
            self.assertEqual((event["code"], event["level"]), ("cancelled", "info"))

    def test_a_worker_that_dies(self) -> None:
        """A worker that dies is told, with the task that it ran."""
        daemon = self.daemon()
        path = self.path(daemon)
        with daemon.connect() as connection:
            connection.request("wait", [path])
            self.wait_for_begin(path)
            (worker,) = (w for w in daemon.status()["workers"] if w["task"] == "wait")
            daemon.kill(worker["pid"])
            event = self.find(daemon, "was killed by SIGKILL", worker=worker["worker"])
        self.assertEqual((event["function"], event["pid"]), ("wait", worker["pid"]))
        self.assertIn("it ran wait", event["message"])

    def test_a_task_that_is_handed_over(self) -> None:
        """What happens to a task on another worker says whose it is, and hand-overs are told."""
        daemon = self.daemon("--log-level", "debug", procs=2)
        path = self.path(daemon)
        with daemon.connect() as connection:
            connection.request("wait", [path], id="first")
            self.wait_for_begin(path)
            connection.request("fail", ["x"], id="second")
            self.assert_error(connection.reply(), "task-failed")
            handed = self.find(daemon, "fail is handed over", id='"second"', level="debug")
            failed = self.find(daemon, "fail failed", id='"second"')
            self.assertNotEqual(failed["worker"], handed["worker"])
            self.assertIn("connection", handed)
            said = self.find(daemon, "about to fail", worker=failed["worker"])
            self.assertEqual(said["id"], '"second"')
            open(path, "w").close()

    def test_a_level(self) -> None:
        """Below the lowest level nothing is written, by whichever process."""
        daemon = Daemon(
            *("--log-format", "json", "--log-level", "error"),
            tasks="the_tasks.py",
            files={"the_tasks.py": TASKS},
            port=self.free_port(),
        )
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        wait_until(daemon.connect, what="the port").close()
        daemon.ask("fail", ["x"])
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        self.assertEqual(daemon.log, "")

    def free_port(self) -> int:
        """Give a port that was free a moment ago: this daemon will not say which one it has."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            return int(server.getsockname()[1])

    def test_in_the_background(self) -> None:
        """In the background every line of the log's file is JSON; so is why a start failed."""
        daemon = self.daemon(in_background=True)
        self.find(daemon, "workers serve")
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        self.events(daemon)
        refused = Daemon(
            *("--log-format", "json", "--tasks", "no_such_module"), tasks=None, in_background=True
        )
        ended = refused.run()
        lines = [json.loads(line) for line in ended.output.splitlines()]
        self.assertIn("no_such_module", lines[-1]["message"] + lines[-2]["message"])


class TextTests(LogTestCase):
    def test_what_looks_like_a_line(self) -> None:
        """Whatever a task says, no line of the log is its own invention."""
        daemon = self.daemon(log_format="text")
        daemon.ask("fail", ["x"], id=7)
        daemon.ask("say", [f"one\r{OLD_LINE} two\x1b[2J\u2028{OLD_LINE}"])
        self.wait_for_log(daemon, "fail failed (id 7, connection 127.0.0.1", r"one\r2026-")
        self.wait_for_log(daemon, r"\x1b[2J\u2028")
        for line in daemon.log.splitlines():
            self.assertFalse(line.startswith(OLD_LINE), line)
            self.assertRegex(line, r"^(\d{4}-\d\d-\d\dT\S+ \[[\w.]+#\w+\] |\t)")


class SecretTests(LogTestCase):
    def test_no_secret(self) -> None:
        """No token, password or argument is in any line, at any level, in either format."""
        for log_format in ("text", "json"):
            daemon = self.daemon(
                *("--log-level", "debug", "--token-file", "tokens", "--allow", "web=*"),
                *("--smtp", "127.0.0.1:1", "--smtp-login", "login"),
                log_format=log_format,
                secrets={"tokens": f"web:{TOKEN}\n", "login": f"me:{PASSWORD}\n"},
                caller=self.connect_as_web,
            )
            self.provoke(daemon)
            self.load_anew(daemon)
            daemon.signal(signal.SIGTERM)
            daemon.wait_until_gone()
            said = daemon.log + daemon.errors
            for words in ("a wrong token", "fail failed", "send_mail failed", "is handed over"):
                self.assertIn(words, said)
            for secret in (TOKEN, WRONG, PASSWORD, ARGUMENT):
                self.assertNotIn(secret, said)
                self.assertNotIn(secret[:12], said)
            daemon.stop()

    def provoke(self, daemon: Daemon) -> None:
        """Have everything happen in which a secret is at hand."""
        lines = (
            f'{{"function": "taskd.auth", "args": ["{WRONG}"]}}\n',
            f'{{"function": "taskd.auth", "args": ["{TOKEN}"\n',  # it is no JSON
            f'{{"function": "taskd.auth", "token": "{TOKEN}"}}\n',
            f'{{"function": "{TOKEN}", "args": []}}\n',
            f"{TOKEN}\n",
            f"{TOKEN * 1000}\n",
            f"GET /?token={TOKEN} HTTP/1.1\r\n\r\n",
            f"\x16\x03{TOKEN}\n",
        )
        for line in lines:
            with Connection("127.0.0.1", daemon.port) as connection:
                connection.send(line)
                connection.is_hung_up()
        connection = self.connect_as_web(daemon)
        connection.ask("fail", ["x", ARGUMENT])
        connection.ask("fail", {"word": "x", "nonsense": ARGUMENT})
        connection.send(f'{{"function": "fail", "args": ["{ARGUMENT}"\n')
        connection = self.connect_as_web(daemon)
        mail = {"from_": "a@b", "to": "c@d", "subject": ARGUMENT, "contents": ARGUMENT}
        self.assert_error(connection.ask("send_mail", mail), "task-failed")
        connection.ask("hold", [self.path(daemon) + ARGUMENT])
        daemon.wait_until_settled()
        path = self.path(daemon)
        connection.request("wait", [path], id=1)
        self.wait_for_begin(path)
        connection.request("fail", ["y", ARGUMENT], id=2)
        self.assertEqual(connection.reply()["id"], 2)
        connection.request("wait", [path + ARGUMENT], id=3)
        connection.request("taskd.cancel", [3], id=4)
        wait_until(lambda: connection.reply()["id"] == 4, what="the answer to the cancelling")
        open(path, "w").close()
        self.assertFalse(re.search(ARGUMENT, daemon.log))
        self.assertTrue(os.path.exists(path))
