"""Every example, run as its text says."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent
from typing import Final

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.callers import Caller, with_token
from tests.integration.daemon import (
    CHECKOUT,
    WAIT_SECONDS,
    Connection,
    Daemon,
    temporary_directory,
)
from tests.integration.mail_server import MailServer

EXAMPLES = CHECKOUT / "examples"
LONGEST_RUN_SECONDS = 60.0
MAILS = 1000

SHOWN_PORT: Final = "12345"
SHOWN_HOST: Final = "tasks.example.org"

CALL_ADD: Final = """
import sys
from twisted.internet.task import react
from taskd.client import TaskClient

async def main(reactor, port, name, value):
    client = TaskClient(reactor, f"tls:127.0.0.1:{port}", ca="ca.pem", **{name: value})
    print(await client.call("add", 1, 2))
    await client.close()

react(main, sys.argv[1:])
"""


def free_port() -> str:
    """Give a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return str(listening.getsockname()[1])


class ExamplesTestCase(SynchronousTestCase):
    """Base of tests that have a mail server, and a daemon that runs the example's tasks."""

    procs = 2

    def setUp(self) -> None:
        self.server = MailServer()
        self.server.start()
        self.addCleanup(self.server.stop)
        self.daemon = self.start()

    def start(self, *options: str, caller: Caller | None = None) -> Daemon:
        """Start a daemon."""
        daemon = Daemon(
            *("--smtp", f"127.0.0.1:{self.server.port}", *options),
            procs=self.procs,
            caller=caller,
            tasks=str(EXAMPLES / "tasks.py"),
        )
        self.addCleanup(daemon.stop)
        return daemon.start()

    def run_example(
        self,
        *command: str,
        package: str = "",
        status: int = 0,
        directory: Path = EXAMPLES,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """
        Run a program.

        Args:
            command: The program and its arguments.
            package: The Debian package that has the program.
            status: The exit status that it must have.
            directory: Where it runs.
            environ: What is added to the environment.
        """
        program = shutil.which(command[0])
        if program is None:
            self.fail(f"{command[0]} is missing: apt-get install {package}")
        done = subprocess.run(
            [program, *command[1:]],
            cwd=directory,
            env={**os.environ, **(environ or {})},
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


class CallerTestCase(ExamplesTestCase):
    """Base of tests of programs that send the one mail of the example."""

    def assert_mail(self) -> str:
        """Exactly one mail has come, as the examples send it; give its id."""
        (mail,) = self.server.mails
        self.assertEqual((mail.sender, mail.recipients), ("me@example.org", ["you@example.org"]))
        self.assertEqual(mail.message.get_content().strip(), "Olá!")
        return str(mail.message["Message-ID"])

    def assert_one_line(self, done: subprocess.CompletedProcess[str], words: str) -> None:
        """A program has said one line, on stderr."""
        self.assertEqual(done.stdout, "")
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn(words, done.stderr)


class CallerTests(CallerTestCase):
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
        done = self.run_example("php", "caller.php", free_port(), package="php-cli", status=1)
        self.assert_one_line(done, "Connection refused")

    def test_node(self) -> None:
        """Node.js sends the mail and prints the result."""
        command = ("node", "caller.js", str(self.daemon.port))
        done = self.run_example(*command, package="nodejs")
        self.assertIn(self.assert_mail(), done.stdout)
        self.assert_failure_shows(*command, package="nodejs")
        done = self.run_example("node", "caller.js", free_port(), package="nodejs", status=1)
        self.assert_one_line(done, "ECONNREFUSED")

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


class SecureCallerTests(CallerTestCase):
    """Callers over TLS, with the files that the README's commands make."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        text = (CHECKOUT / "README.rst").read_text(encoding="utf-8")
        (commands,) = re.findall(r"^( +new\(\) \{.*?)\n\n", text, re.MULTILINE | re.DOTALL)
        self.run_example(
            *("bash", "-e", "-c", dedent(commands)), package="bash", directory=self.directory
        )
        self.token = self.path("tokens").read_text(encoding="utf-8").strip().removeprefix("web:")
        self.context = ssl.create_default_context(cafile=self.path("ca.pem"))
        super().setUp()
        self.environ = {"TASKD_CA": str(self.path("ca.pem")), "TASKD_TOKEN": self.token}

    def start(self, *options: str, caller: Caller | None = None) -> Daemon:
        options = options or ("--token-file", str(self.path("tokens")))
        files = ("--tls", str(self.path("server.pem")), "--key", str(self.path("server.key")))
        return super().start(
            *files,
            *options,
            caller=caller or (lambda daemon: with_token(self.secure(daemon), self.token)),
        )

    def path(self, name: str) -> Path:
        return self.directory / name

    def secure(self, daemon: Daemon) -> Connection:
        """Connect over TLS, to the name that the certificate has."""
        connected = socket.create_connection(("127.0.0.1", daemon.port), WAIT_SECONDS)
        return Connection.over(self.context.wrap_socket(connected, server_hostname=SHOWN_HOST))

    def assert_secure(self, *command: str, package: str) -> None:
        """It sends the mail, and says what is wrong with its token, and with the daemon."""
        command = (*command, str(self.daemon.port), "127.0.0.1")
        done = self.run_example(*command, package=package, environ=self.environ)
        self.assertIn(self.assert_mail(), done.stdout)
        other_name = (*command[:-1], "localhost")
        done = self.run_example(*other_name, package=package, environ=self.environ, status=1)
        self.assert_one_line(done, "match")
        for environ, words in (
            ({**self.environ, "TASKD_TOKEN": "x" * 32}, "nobody has this token"),
            ({**self.environ, "TASKD_TOKEN": ""}, "say first who you are"),
        ):
            done = self.run_example(*command, package=package, environ=environ, status=1)
            self.assertIn(words, done.stdout)
        plain = {**self.environ, "TASKD_CA": ""}
        done = self.run_example(*command, package=package, environ=plain, status=1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assert_mail()

    def test_php(self) -> None:
        """PHP calls over TLS, with a token."""
        self.assert_secure("php", "caller.php", package="php-cli")

    def test_node(self) -> None:
        """Node.js calls over TLS, with a token."""
        self.assert_secure("node", "caller.js", package="nodejs")

    def test_openssl(self) -> None:
        """The commands that both READMEs show call over TLS, with a token."""
        for page in (CHECKOUT / "README.rst", EXAMPLES / "README.rst"):
            text = page.read_text(encoding="utf-8")
            (command,) = re.findall(
                r"^ +(?:\$ )?(\(printf .*?openssl s_client.*?[^\\])\n", text, re.M | re.S
            )
            self.assertEqual(command.count(f":{SHOWN_PORT}"), 1)
            done = self.run_example(
                *(
                    "bash",
                    "-c",
                    command.replace(SHOWN_PORT, str(self.daemon.port)).replace(
                        "sleep 1", "sleep 3"
                    ),
                ),
                package="bash",
                directory=self.directory,
                environ=self.environ,
            )
            self.assertEqual((done.stdout, done.stderr), ('"web"\n3\n', "DONE\n"))

    def test_client(self) -> None:
        """``TaskClient`` calls with the token, and with the certificate."""
        self.assert_adds(self.daemon, "token", self.token)
        own = self.path("client.pem")
        self.context.load_cert_chain(own)
        daemon = self.start("--client-ca", str(self.path("ca.pem")), caller=self.secure)
        self.assert_adds(daemon, "certificate", str(own))
        self.assertIn("web", daemon.status()["totals"]["callers"])

    def assert_adds(self, daemon: Daemon, *shown: str) -> None:
        command = (sys.executable, "-c", CALL_ADD, str(daemon.port), *shown)
        done = self.run_example(*command, directory=self.directory)
        self.assertEqual(done.stdout, "3\n", done.stderr)


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
