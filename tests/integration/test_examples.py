"""Every example, run as its text says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import CHECKOUT, Daemon
from tests.integration.mail_server import MailServer

EXAMPLES = CHECKOUT / "examples"
LONGEST_RUN_SECONDS = 60.0
MAILS = 1000


class ExamplesTestCase(SynchronousTestCase):
    """Base of tests that have a mail server, and a daemon that runs the example's tasks."""

    procs = 2

    def setUp(self) -> None:
        self.server = MailServer()
        self.server.start()
        self.addCleanup(self.server.stop)
        self.daemon = Daemon(
            *("--smtp", f"127.0.0.1:{self.server.port}"),
            procs=self.procs,
            tasks=str(EXAMPLES / "tasks.py"),
        )
        self.addCleanup(self.daemon.stop)
        self.daemon.start()

    def run_example(
        self, *command: str, package: str = "", status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """
        Run a program in the directory of the examples.

        Args:
            command: The program and its arguments.
            package: The Debian package that has the program.
            status: The exit status that it must have.
        """
        program = shutil.which(command[0])
        if program is None:
            self.fail(f"{command[0]} is missing: apt-get install {package}")
        done = subprocess.run(
            [program, *command[1:]],
            cwd=EXAMPLES,
            capture_output=True,
            text=True,
            timeout=LONGEST_RUN_SECONDS,
            check=False,
        )
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        return done


class TasksTests(ExamplesTestCase):
    def test_add(self) -> None:
        """``add`` adds, by the very command that its module shows."""
        text = (EXAMPLES / "tasks.py").read_text(encoding="utf-8")
        (command,) = re.findall(r"^ +(printf .*)$", text, re.MULTILINE)
        (shown_port,) = re.findall(r"12345$", command)
        command = command.replace(shown_port, str(self.daemon.port))
        done = self.run_example("bash", "-c", command, package="bash")
        self.assertEqual(done.stdout, "3\n", "nc is in the package netcat-openbsd" + done.stderr)

    def test_count_primes(self) -> None:
        """``count_primes`` counts, and reports how far it is."""
        with self.daemon.connect() as connection:
            connection.request("count_primes", [30_000], id=1, progress=True)
            reports = []
            while "progress" in (reply := connection.reply()):
                reports.append(reply["progress"])
        self.assertEqual(reply, {"id": 1, "result": 3245})
        self.assertEqual(
            reports[-1], {"done": 20_000, "total": 30_000, "message": "2262 primes so far"}
        )

    def test_is_open(self) -> None:
        """``is_open`` tells a port that is listened on from one that is not."""
        port = self.server.port
        self.assertIs(self.daemon.ask("is_open", ["127.0.0.1", port]), True)
        self.server.stop()
        self.assertIs(self.daemon.ask("is_open", {"host": "127.0.0.1", "port": port}), False)


class CallerTests(ExamplesTestCase):
    """Programs that send the one mail of the example."""

    def assert_mail(self) -> str:
        """Exactly one mail has come, as the examples send it; give its id."""
        (mail,) = self.server.mails
        self.assertEqual((mail.sender, mail.recipients), ("me@example.org", ["you@example.org"]))
        self.assertEqual(mail.message.get_content().strip(), "Olá!")
        return str(mail.message["Message-ID"])

    def assert_failure_shows(self, *command: str, package: str) -> None:
        """Without a mail server the program tells the error, and its status is 1."""
        self.server.stop()
        done = self.run_example(*command, package=package, status=1)
        self.assertIn("task-failed", done.stdout)

    def test_php(self) -> None:
        """PHP sends the mail and prints the result."""
        command = ("php", "caller.php", str(self.daemon.port))
        done = self.run_example(*command, package="php-cli")
        self.assertIn(self.assert_mail(), done.stdout)
        self.assert_failure_shows(*command, package="php-cli")

    def test_node(self) -> None:
        """Node.js sends the mail and prints the result."""
        command = ("node", "caller.js", str(self.daemon.port))
        done = self.run_example(*command, package="nodejs")
        self.assertIn(self.assert_mail(), done.stdout)
        self.assert_failure_shows(*command, package="nodejs")

    def test_bash(self) -> None:
        """Bash sends the mail and prints the result."""
        command = ("bash", "caller.sh", str(self.daemon.port))
        done = self.run_example(*command, package="bash")
        self.assertEqual(json.loads(done.stdout)["message_id"], self.assert_mail())
        self.assert_failure_shows(*command, package="bash")

    def test_once(self) -> None:
        """``once.py`` sends the mail over a connection of its own, and tells both steps."""
        command = (sys.executable, "once.py", f"tcp:127.0.0.1:{self.daemon.port}")
        done = self.run_example(*command)
        first, second = done.stdout.splitlines()
        self.assertEqual(first, "the task is on its way")
        self.assertIn(self.assert_mail(), second)
        self.server.stop()
        done = self.run_example(*command, status=1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)


class MailTests(ExamplesTestCase):
    procs = 8

    def test_thousand(self) -> None:
        """A thousand mails arrive, each exactly once, and the program goes on meanwhile."""
        done = self.run_example(
            *(sys.executable, "mail_1000.py", f"tcp:127.0.0.1:{self.daemon.port}"),
            *("--count", str(MAILS), "--sender", "me@example.org", "--domain", "example.net"),
        )
        # For who wants to see it, which pytest shows with -s.
        print(done.stdout)  # noqa: T201
        self.assertIn(f"sent {MAILS} of {MAILS} mails in ", done.stdout)
        self.assertRegex(done.stdout, r"\d+ ticks; the longest gap between two: [\d.]+ ms")
        came = Counter(tuple(mail.recipients) for mail in self.server.mails)
        self.assertEqual(
            came, Counter((f"user{number}@example.net",) for number in range(1, MAILS + 1))
        )
        for mail in self.server.mails:
            number = mail.recipients[0].removeprefix("user").partition("@")[0]
            self.assertEqual(mail.message["Subject"], f"News for user {number}")

    def test_failures(self) -> None:
        """What was not sent is counted, and the first reason told."""
        self.server.stop()
        done = self.run_example(
            *(sys.executable, "mail_1000.py", f"tcp:127.0.0.1:{self.daemon.port}"),
            *("--count", "3"),
            status=1,
        )
        self.assertIn("sent 0 of 3 mails", done.stdout)
        self.assertIn("the first failure: ", done.stderr)


class ListTests(SynchronousTestCase):
    def test_all_are_listed(self) -> None:
        """The README names every example."""
        text = (EXAMPLES / "README.rst").read_text(encoding="utf-8")
        for path in EXAMPLES.iterdir():
            if path.is_file() and path.name != "README.rst":
                self.assertIn(f"``{path.name}``", text)
