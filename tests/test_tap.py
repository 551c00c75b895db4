"""The options of ``twistd taskd``, and what is made of them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from twisted.application.service import IService
from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from taskd.errors import SettingsError, StartFailed
from taskd.settings import DEFAULT_MAX_LINE_BYTES, Settings, SmtpSettings
from taskd.supervisor import Supervisor
from taskd.tap import Options, makeService, settings_from
from tests.support import temporary_directory


class TapTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)

    def parsed(self, *args: str) -> Options:
        options = Options()
        options.parseOptions(args)
        return options

    def settings(self, *args: str) -> Settings:
        return self.parsed(*args).settings

    def refused(self, *args: str) -> str:
        """Give the one line with which options are refused."""
        with self.assertRaises(SystemExit) as caught:
            self.parsed(*args)
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        self.assertTrue(message.startswith("twistd taskd: "), message)
        self.assertTrue(message.endswith("; see twistd taskd --help"), message)
        return message


class DefaultTests(TapTestCase):
    def test_defaults(self) -> None:
        """Without options the daemon serves loopback with ten workers a core, and safely."""
        self.assertEqual(
            self.settings(),
            Settings(
                port=12345,
                interface="127.0.0.1",
                procs=10 * (os.cpu_count() or 1),
                task_modules=(),
                preload=True,
                threads=1,
                max_line_bytes=DEFAULT_MAX_LINE_BYTES,
                grace_seconds=30.0,
                backlog=10_000,
                max_in_flight=1024,
                max_connections=None,
                first_line_seconds=30.0,
                idle_seconds=None,
                max_tasks=None,
                max_rss_bytes=None,
                debug=False,
                smtp=None,
            ),
        )

    def test_every_option(self) -> None:
        """Every option finds its way into the settings."""
        settings = self.settings(
            *("--port", "0", "--interface", "::1", "--procs", "3", "--threads", "2"),
            *("--max-line", "2048", "--grace", "1.5", "--tasks", "mail"),
            *("--backlog", "7", "--max-in-flight", "8", "--max-connections", "9"),
            *("--first-line-timeout", "2.5", "--idle-timeout", "3.5"),
            *("--max-tasks", "1000", "--max-rss", "1.5"),
            *("--smtp", "mx:25", "--no-preload", "--debug"),
        )
        self.assertEqual(
            settings,
            Settings(
                port=0,
                interface="::1",
                procs=3,
                task_modules=("mail",),
                preload=False,
                threads=2,
                max_line_bytes=2048,
                grace_seconds=1.5,
                backlog=7,
                max_in_flight=8,
                max_connections=9,
                first_line_seconds=2.5,
                idle_seconds=3.5,
                max_tasks=1000,
                max_rss_bytes=3 * 2**19,
                debug=True,
                smtp=SmtpSettings(host="mx", port=25),
            ),
        )

    def test_short_options(self) -> None:
        """Port, interface and number of workers have a letter each."""
        settings = self.settings("-p", "1", "-i", "127.0.0.2", "-n", "4")
        self.assertEqual((settings.port, settings.procs), (1, 4))
        self.assertEqual(settings.interface, "127.0.0.2")

    def test_version(self) -> None:
        """``--version`` prints the version and ends well."""
        with redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as caught:
            self.parsed("--version")
        self.assertEqual(caught.exception.code, 0)
        self.assertEqual(out.getvalue(), f"taskd {__version__}\n")


class RangeTests(TapTestCase):
    def test_both_ends(self) -> None:
        """Every number is accepted at both ends of its range, and refused beyond, by its name."""
        for option, least, most, step in (
            ("--port", 0, 65535, 1),
            ("--procs", 1, 1000, 1),
            ("--threads", 1, 100, 1),
            ("--max-line", 1024, 1024**3, 1),
            ("--grace", 0, 86400, 0.5),
            ("--backlog", 0, 1_000_000, 1),
            ("--max-in-flight", 1, 1_000_000, 1),
            ("--max-connections", 1, 10_000_000, 1),
            ("--first-line-timeout", 0.1, 86400, 0.05),
            ("--idle-timeout", 0.1, 864000, 0.05),
            ("--max-tasks", 1, 10**12, 1),
            ("--max-rss", 1, 2**30, 0.5),
        ):
            self.settings(option, str(least))
            self.settings(option, str(most))
            for value in (least - step, most + step):
                self.assertIn(f"{option}: a number from", self.refused(option, str(value)))

    def test_what_is_no_number(self) -> None:
        """What is no number, or not a whole one where one is needed, is refused."""
        for args in (("--port", "http"), ("--procs", "1.5"), ("--grace", "soon")):
            self.assertIn(args[1], self.refused(*args))
        for args in (("--backlog", "1e3"), ("--max-tasks", "9.5"), ("--idle-timeout", "never")):
            self.assertIn(args[1], self.refused(*args))
        for option in ("--grace", "--first-line-timeout", "--idle-timeout", "--max-rss"):
            for value in ("nan", "inf", "1e308"):
                self.assertIn(option, self.refused(option, value))

    def test_memory_is_told_in_mib(self) -> None:
        """The limit of a worker's memory is told in MiB, and parts of one."""
        self.assertEqual(self.settings("--max-rss", "512").max_rss_bytes, 512 * 1024 * 1024)
        self.assertEqual(self.settings("--max-rss", "1.25").max_rss_bytes, 1280 * 1024)

    def test_unknown_options(self) -> None:
        """An option that does not exist, and an argument without an option, are refused."""
        self.assertIn("prots", self.refused("--prots", "3"))
        self.refused("stray")


class TasksTests(TapTestCase):
    def modules(self, *args: str) -> tuple[str, ...]:
        return self.settings(*args).task_modules

    def test_several(self) -> None:
        """``--tasks`` may be repeated, and may hold several with commas; the order is kept."""
        self.assertEqual(
            self.modules("--tasks", "a,b.c", "--tasks", "d.py", "--tasks", " e , ,f"),
            ("a", "b.c", "d.py", "e", "f"),
        )

    def test_the_file_in_the_working_directory(self) -> None:
        """Without ``--tasks`` a tasks.py in the working directory is taken."""
        (self.directory / "tasks.py").touch()
        self.assertEqual(self.modules(), ("tasks.py",))
        self.assertEqual(self.modules("--tasks", "mail"), ("mail",))

    def test_a_directory_of_that_name(self) -> None:
        """A directory named tasks.py is no file to take."""
        (self.directory / "tasks.py").mkdir()
        self.assertEqual(self.modules(), ())

    def test_two_parsings(self) -> None:
        """What one parsing has collected is not the next one's."""
        self.modules("--tasks", "a")
        self.assertEqual(self.modules("--tasks", "b"), ("b",))

    def test_what_is_no_module(self) -> None:
        """What is neither a module's name nor a path of a .py file is refused."""
        for name in ("a/b", "a..b", "1a", "a-b", "mail.txt/"):
            self.assertIn(repr(name), self.refused("--tasks", name))


class InterfaceTests(TapTestCase):
    def test_loopback(self) -> None:
        """Every address of this machine alone is safe."""
        for interface in ("127.0.0.1", "127.255.0.1", "::1", "localhost"):
            self.assertEqual(self.settings("--interface", interface).interface, interface)

    def test_what_others_can_reach(self) -> None:
        """An address that others can reach, or that may be one, is refused."""
        for interface in ("0.0.0.0", "::", "192.168.0.1", "example.org", "127.1", "0177.0.0.1"):
            refused = self.refused("--interface", interface)
            self.assertIn(f"--interface {interface}", refused)
            self.assertIn("--insecure", refused)

    def test_insecure(self) -> None:
        """Any address is taken from an operator who says that it is meant."""
        settings = self.settings("--interface", "0.0.0.0", "--insecure")
        self.assertEqual(settings.interface, "0.0.0.0")


class SmtpTests(TapTestCase):
    def smtp(self, *args: str, environ: dict[str, str] | None = None) -> SmtpSettings:
        """Give the mail settings that options and an environment make."""
        options = self.parsed("--smtp", "mx.example.org:587", *args)
        smtp = settings_from(options, environ or {}).smtp
        assert smtp is not None
        return smtp

    def test_host_and_port(self) -> None:
        """The mail server is a host and a port, an IPv6 address in brackets."""
        for text, host in (("mx:25", "mx"), ("[::1]:25", "::1"), ("10.0.0.1:25", "10.0.0.1")):
            smtp = self.settings("--smtp", text).smtp
            assert smtp is not None
            self.assertEqual((smtp.host, smtp.port, smtp.tls), (host, 25, "none"))
            self.assertEqual((smtp.user, smtp.password), ("", ""))

    def test_what_is_no_server(self) -> None:
        """A mail server without a host or a port is refused."""
        for text in ("mx", "mx:", ":25", "mx:smtp", "mx:0", "mx:65536", "mx:-1"):
            self.assertIn("HOST:PORT", self.refused("--smtp", text))

    def test_tls(self) -> None:
        """The protection is one of three."""
        for tls in ("none", "starttls", "tls"):
            self.assertEqual(self.smtp("--smtp-tls", tls).tls, tls)
        refused = self.refused("--smtp", "mx:25", "--smtp-tls", "ssl")
        self.assertIn("--smtp-tls: one of none, starttls, tls", refused)

    def test_protection_without_a_server(self) -> None:
        """How mail is protected, and a login, are refused where no mail server is named."""
        (self.directory / "login").write_text("me:secret")
        for option, value in (("--smtp-tls", "tls"), ("--smtp-tls", "none")):
            self.assertIn(f"{option} is of no use without --smtp", self.refused(option, value))
        refused = self.refused("--smtp-login", "login")
        self.assertIn("--smtp-login is of no use without --smtp", refused)

    def test_a_login_in_the_environment_without_a_server(self) -> None:
        """A login that is in the environment without a mail server is no error: nobody wrote it."""
        options = self.parsed()
        self.assertIsNone(settings_from(options, {"TASKD_SMTP_LOGIN": "me:secret"}).smtp)

    def test_a_login_from_a_file(self) -> None:
        """The login is read from a file, white space around it left out."""
        file = self.directory / "login"
        file.write_text("me@example.org:pass:word\n")
        smtp = self.smtp("--smtp-login", str(file))
        self.assertEqual((smtp.user, smtp.password), ("me@example.org", "pass:word"))

    def test_a_login_from_the_environment(self) -> None:
        """The login may come from the environment; a file is stronger."""
        environ = {"TASKD_SMTP_LOGIN": "me:secret"}
        smtp = self.smtp(environ=environ)
        self.assertEqual((smtp.user, smtp.password), ("me", "secret"))
        file = self.directory / "login"
        file.write_text("you:word")
        self.assertEqual(self.smtp("--smtp-login", str(file), environ=environ).user, "you")

    def test_what_is_no_login(self) -> None:
        """A login without a user, or a file that cannot be read, is refused and not shown."""
        for login in ("secret", ":secret"):
            with self.assertRaises(SettingsError) as caught:
                self.smtp(environ={"TASKD_SMTP_LOGIN": login})
            self.assertNotIn("secret", str(caught.exception))
            self.assertTrue(str(caught.exception).startswith("TASKD_SMTP_LOGIN: "))
        (self.directory / "colonless").write_text("secret")
        refused = self.refused("--smtp", "mx:25", "--smtp-login", "colonless")
        self.assertIn("--smtp-login colonless: the login", refused)
        self.assertNotIn("secret", refused)
        (self.directory / "binary").write_bytes(b"\xff\xfe")
        for name in ("nowhere", "binary"):
            refused = self.refused("--smtp", "mx:25", "--smtp-login", name)
            self.assertIn(f"--smtp-login {name}", refused)

    def test_the_password_is_not_shown(self) -> None:
        """Settings that are printed do not show the password."""
        smtp = self.smtp(environ={"TASKD_SMTP_LOGIN": "me:secret"})
        self.assertIn("me", repr(smtp))
        self.assertNotIn("secret", repr(smtp))


class ServiceTests(TapTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(setattr, sys, "excepthook", sys.excepthook)

    def test_the_service(self) -> None:
        """The service is the supervisor, named for twistd."""
        service = makeService(self.parsed("--procs", "1"))
        self.assertIsInstance(service, Supervisor)
        self.assertTrue(IService.providedBy(service))
        self.assertEqual(service.name, "taskd")
        self.assertFalse(service.running)

    def test_a_failed_start_is_shown_in_one_line(self) -> None:
        """A daemon that cannot start says so in one line; all else is shown as it was before."""
        shown: list[BaseException] = []

        def show(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> Any:
            shown.append(error)

        sys.excepthook = show
        makeService(self.parsed("--procs", "1"))
        bug, failed = ValueError("a bug"), StartFailed("the port is taken")
        with self.standard_error() as told:
            sys.excepthook(ValueError, bug, None)
            sys.excepthook(StartFailed, failed, None)
        self.assertEqual(shown, [bug])
        self.assertEqual(told.read_text(), "twistd taskd: the port is taken\n")

    @contextmanager
    def standard_error(self) -> Iterator[Path]:
        """Have what this process writes to its standard error go to a file."""
        path, before = self.directory / "stderr", os.dup(2)
        with path.open("w") as file:
            os.dup2(file.fileno(), 2)
        try:
            yield path
        finally:
            os.dup2(before, 2)
            os.close(before)
