"""The options of ``twistd taskd``, and what is made of them."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from twisted.application.service import Application, IService
from twisted.logger import ILogObserver, LogLevel
from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from taskd.errors import SettingsError, StartFailed
from taskd.settings import DEFAULT_MAX_LINE_BYTES, Settings, SmtpSettings
from taskd.supervisor import Supervisor
from taskd.tap import Options, makeService, settings_from
from tests.support import temporary_directory, write_secret


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
                drain_seconds=0.0,
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
            *("--drain-seconds", "2.5"),
            *("--backlog", "7", "--max-in-flight", "8", "--max-connections", "9"),
            *("--first-line-timeout", "2.5", "--idle-timeout", "3.5"),
            *("--max-tasks", "1000", "--max-rss", "1.5"),
            *("--smtp", "mx:25", "--no-preload", "--debug"),
            *("--tls", "cert.pem", "--key", "key.pem", "--tls-port", "12346"),
            *("--client-ca", "ca.pem", "--token-file", "tokens", "--allow", "web=echo"),
            *("--listen", "unix:/run/taskd.sock", "--socket-owner", ":web", "--insecure"),
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
                drain_seconds=2.5,
                backlog=7,
                max_in_flight=8,
                max_connections=9,
                first_line_seconds=2.5,
                idle_seconds=3.5,
                max_tasks=1000,
                max_rss_bytes=3 * 2**19,
                debug=True,
                smtp=SmtpSettings(host="mx", port=25),
                certificate=os.path.abspath("cert.pem"),
                key=os.path.abspath("key.pem"),
                tls_port=12346,
                client_ca=os.path.abspath("ca.pem"),
                token_file=os.path.abspath("tokens"),
                allow=(("web", ("echo",)),),
                listen=("unix:/run/taskd.sock",),
                socket_owner=":web",
                insecure=True,
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
            ("--drain-seconds", 0, 86400, 0.5),
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

    def test_an_empty_value(self) -> None:
        """An option with nothing for its value, as an unset variable leaves it, is refused."""
        for name in ("token-file", "client-ca", "tls", "interface", "smtp", "socket-owner"):
            self.assertIn(f"--{name}: a value is needed", self.refused(f"--{name}", ""))

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


class AllowTests(TapTestCase):
    def allow(self, *rules: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return self.settings(*(word for rule in rules for word in ("--allow", rule))).allow

    def test_rules(self) -> None:
        """A rule lets an identity call some functions; there may be several, in their order."""
        self.assertEqual(
            self.allow("web=send_mail,echo", " ops = * ", "web=image.*, ,mail"),
            (
                ("web", ("send_mail", "echo")),
                ("ops", ("*",)),
                ("web", ("image.*", "mail")),
            ),
        )

    def test_a_subject(self) -> None:
        """An identity may be the subject of a certificate: its last = is the rule's."""
        self.assertEqual(self.allow("O=acme,OU=web=echo"), (("O=acme,OU=web", ("echo",)),))

    def test_what_is_no_rule(self) -> None:
        """A rule without an identity or without a function is refused with an example."""
        for rule in ("web", "web=", "=echo", " =echo", "web= , ", ""):
            self.assertIn(f"--allow {rule}: give IDENTITY=", self.refused("--allow", rule))

    def test_two_parsings(self) -> None:
        """What one parsing has collected is not the next one's."""
        self.allow("web=echo")
        self.assertEqual(self.allow(), ())


class ListenTests(TapTestCase):
    def test_where_nothing_is_said(self) -> None:
        """The port has its default unless it is said where to listen."""
        self.assertEqual((self.settings().port, self.settings().listen), (12345, ()))
        settings = self.settings("--listen", "tcp:0", "--listen", "unix:/run/x")
        self.assertEqual((settings.port, settings.listen), (None, ("tcp:0", "unix:/run/x")))
        self.assertEqual(self.settings("--listen", "tcp:0", "--port", "7").port, 7)
        self.assertEqual(self.settings().listen, ())

    def test_what_is_no_endpoint(self) -> None:
        """A description that is none is refused before anything starts."""
        self.assertIn("--listen nowhere:", self.refused("--listen", "nowhere:"))

    def test_tls(self) -> None:
        """A certificate without its key is refused, by the names of the options."""
        self.assertIn("--tls and --key: give both", self.refused("--tls", "cert.pem"))
        self.assertIn("--tls-port is of no use", self.refused("--tls-port", "1"))


class TokenFileTests(TapTestCase):
    def token_file(self, *args: str, **environ: str) -> str:
        return settings_from(self.parsed(*args), environ).token_file

    def test_systemds_credential(self) -> None:
        """Where systemd passes a file of tokens it is taken, unless another one is named."""
        directory = str(self.directory)
        self.assertEqual(self.token_file(CREDENTIALS_DIRECTORY=directory), "")
        path = self.directory / "taskd.token"
        path.write_text("a token 0123456789")
        self.assertEqual(self.token_file(CREDENTIALS_DIRECTORY=directory), str(path))
        named = self.token_file("--token-file", "mine", CREDENTIALS_DIRECTORY=directory)
        self.assertEqual(named, os.path.abspath("mine"))

    def test_the_working_directory(self) -> None:
        """A file of that name that happens to be in the working directory is none of systemd's."""
        (self.directory / "taskd.token").write_text("a token 0123456789")
        self.assertEqual(self.token_file(), "")
        self.assertEqual(self.token_file(CREDENTIALS_DIRECTORY=""), "")
        self.assertEqual(self.token_file(CREDENTIALS_DIRECTORY="."), "")


class InterfaceTests(TapTestCase):
    def test_loopback(self) -> None:
        """Every address of this machine alone is safe."""
        for interface in ("127.0.0.1", "127.255.0.1", "::1", "localhost"):
            self.assertEqual(self.settings("--interface", interface).interface, interface)

    def test_what_others_can_reach(self) -> None:
        """An address that others can reach is looked at when it is bound, and taken until then."""
        for interface in ("0.0.0.0", "::", "192.168.0.1", "example.org", "127.1", "0177.0.0.1"):
            settings = self.settings("--interface", interface)
            self.assertEqual((settings.interface, settings.insecure), (interface, False))
            service = makeService(self.parsed("--interface", interface))
            self.assertFalse(service.running)

    def test_insecure(self) -> None:
        """An operator may say that exposed addresses are meant."""
        self.assertTrue(self.settings("--interface", "0.0.0.0", "--insecure").insecure)


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
        write_secret(self.directory / "login", "me:secret")
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
        write_secret(file, "me@example.org:pass:word\n")
        smtp = self.smtp("--smtp-login", str(file))
        self.assertEqual((smtp.user, smtp.password), ("me@example.org", "pass:word"))

    def test_a_login_from_the_environment(self) -> None:
        """The login may come from the environment; a file is stronger."""
        environ = {"TASKD_SMTP_LOGIN": "me:secret"}
        smtp = self.smtp(environ=environ)
        self.assertEqual((smtp.user, smtp.password), ("me", "secret"))
        file = self.directory / "login"
        write_secret(file, "you:word")
        self.assertEqual(self.smtp("--smtp-login", str(file), environ=environ).user, "you")

    def test_what_is_no_login(self) -> None:
        """A login without a user, or a file that cannot be read, is refused and not shown."""
        for login in ("secret", ":secret"):
            with self.assertRaises(SettingsError) as caught:
                self.smtp(environ={"TASKD_SMTP_LOGIN": login})
            self.assertNotIn("secret", str(caught.exception))
            self.assertTrue(str(caught.exception).startswith("TASKD_SMTP_LOGIN: "))
        write_secret(self.directory / "colonless", "secret")
        refused = self.refused("--smtp", "mx:25", "--smtp-login", "colonless")
        self.assertIn("--smtp-login colonless: the login", refused)
        self.assertNotIn("secret", refused)
        (self.directory / "binary").write_bytes(b"\xff\xfe")
        (self.directory / "binary").chmod(0o600)
        write_secret(self.directory / "open to all", "me:secret", 0o644)
        for name in ("nowhere", "binary", "open to all"):
            refused = self.refused("--smtp", "mx:25", "--smtp-login", name)
            self.assertIn(f"--smtp-login {name}", refused)

    def test_the_password_is_not_shown(self) -> None:
        """Settings that are printed do not show the password."""
        smtp = self.smtp(environ={"TASKD_SMTP_LOGIN": "me:secret"})
        self.assertIn("me", repr(smtp))
        self.assertNotIn("secret", repr(smtp))


class ConfigTests(TapTestCase):
    def file(self, text: str, name: str = "taskd.toml") -> str:
        (self.directory / name).write_text(text)
        return name

    def test_the_command_line_wins(self) -> None:
        """What is said on the command line wins over the file, though it be the default."""
        file = self.file("threads = 5\nport = 7\ngrace = 3\ndebug = true\n")
        settings = self.settings("--config", file, "--threads", "1", "--port", "0")
        self.assertEqual((settings.threads, settings.port), (1, 0))
        self.assertEqual((settings.grace_seconds, settings.debug), (3.0, True))
        self.assertEqual(settings.backlog, Settings(port=0).backlog)

    def test_lists(self) -> None:
        """What may be repeated stands on the command line in place of the file's."""
        file = self.file('tasks = ["a", "b"]\nlisten = ["tcp:1"]\n[allow]\nweb = ["echo"]\n')
        settings = self.settings("--config", file)
        self.assertEqual((settings.task_modules, settings.listen), (("a", "b"), ("tcp:1",)))
        self.assertEqual((settings.allow, settings.port), ((("web", ("echo",)),), None))
        more = ("--tasks", "c", "--listen", "tcp:2", "--allow", "ops=*")
        settings = self.settings("--config", file, *more)
        self.assertEqual((settings.task_modules, settings.listen), (("c",), ("tcp:2",)))
        self.assertEqual(settings.allow, (("ops", ("*",)),))

    def test_flags(self) -> None:
        """A flag may be set in the file or on the command line."""
        off, on = self.file("debug = false"), self.file("debug = true", "on.toml")
        self.assertFalse(self.settings("--config", off).debug)
        self.assertTrue(self.settings("--config", off, "--debug").debug)
        self.assertTrue(self.settings("--config", on).debug)

    def test_a_login_beside_the_file(self) -> None:
        """A relative path in a file is found from wherever the daemon is started."""
        write_secret(self.directory / "login", "me:secret")
        file = self.directory / self.file('smtp = "mx:25"\nsmtp-login = "login"\n')
        os.chdir("/")
        smtp = self.settings("--config", str(file)).smtp
        assert smtp is not None
        self.assertEqual(smtp.user, "me")

    def test_what_cannot_be(self) -> None:
        """What cannot be is refused with the file and the key, or the option, where it stands."""
        for text, args, words in (
            ("threads = 0", (), "taskd.toml: threads: a number from 1 to 100, not 0"),
            ("threads = 1", ("--threads", "0"), "--threads: a number from 1 to 100, not 0"),
            ("threads = '1'", (), "taskd.toml: threads: a whole number is needed"),
            ("tls-port = 1", (), "taskd.toml: tls-port is of no use without"),
            ('listen = ["nowhere:"]', (), "taskd.toml: listen nowhere:"),
            ('log-level = "loud"', (), "taskd.toml: log-level: one of debug, info, warn, error"),
            ("thread = 1", (), "taskd.toml: there is no option 'thread'"),
            ("", ("--config", "other.toml"), "--config other.toml: there is one already"),
        ):
            refused = self.refused("--config", self.file(text), *args)
            self.assertTrue(refused.startswith(f"twistd taskd: {words}"), refused)
        self.assertIn("--config nowhere: No such file", self.refused("--config", "nowhere"))


class CheckTests(TapTestCase):
    def check(self, *args: str) -> tuple[Any, str, str]:
        """Give the exit status, or the message in its place, and what is shown on both streams."""
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors), self.assertRaises(SystemExit) as caught:
            self.parsed("--check", *args)
        return caught.exception.code, out.getvalue(), errors.getvalue()

    def test_good(self) -> None:
        """What could be started is told in one line, with status 0."""
        told = self.check("--procs", "3", "--listen", "unix:/run/x", "--port", "5")
        good = (
            "taskd: the configuration is good: 3 workers, tasks: echo, send_mail; "
            "listens on 127.0.0.1 port 5, unix:/run/x\n"
        )
        self.assertEqual(told, (0, good, ""))

    def test_warnings(self) -> None:
        """What could be started, but is not safe perhaps, is told as well."""
        status, good, warnings = self.check("--interface", "0.0.0.0", "--insecure")
        self.assertEqual((status, good.count("\n"), warnings.count("\n")), (0, 1, 1))
        self.assertIn("taskd: --insecure: whoever can reach 0.0.0.0 port", warnings)

    def test_what_cannot_be(self) -> None:
        """What cannot be started is told in one line, which is no 0 for an exit status."""
        for args, words in (
            (("--tasks", "no_such_module"), "--tasks no_such_module"),
            (("--token-file", "nowhere"), "/nowhere: No such file"),
            (("--interface", "0.0.0.0"), "whoever can reach 0.0.0.0 port 12345 could run tasks"),
            (("--threads", "0"), "--threads: a number from"),
        ):
            message, out, errors = self.check(*args)
            self.assertTrue(message.startswith("twistd taskd: "), message)
            self.assertIn(words, message)
            self.assertEqual((message.count("\n"), out, errors), (0, "", ""))


class LogTests(TapTestCase):
    def under_twistd(self, *args: str, **twistd: Any) -> Options:
        """Parse options as twistd's own options have them parsed."""
        options = Options()
        options.parent = usage.Options()
        options.parent.update(twistd)
        options.parseOptions(args)
        return options

    def observer(self, *args: str, **twistd: Any) -> Any:
        """Give what writes the log of the application that the daemon becomes part of."""
        self.addCleanup(setattr, sys, "excepthook", sys.excepthook)
        application = Application("taskd")
        makeService(self.under_twistd(*args, **twistd)).setServiceParent(application)
        return application.getComponent(ILogObserver, None)

    def test_json(self) -> None:
        """The application writes the log in the format, and from the level, that was asked for."""
        with redirect_stdout(io.StringIO()) as out:
            write = self.observer("--log-format", "json", "--log-level", "warn", nodaemon=True)
        for level in (LogLevel.info, LogLevel.warn):
            write({"log_format": "x", "log_level": level, "log_namespace": "a", "log_time": 1.0})
        self.assertEqual(json.loads(out.getvalue())["level"], "warn")

    def test_text(self) -> None:
        """Unless told otherwise the log is text, from the level info."""
        with redirect_stdout(io.StringIO()) as out:
            write = self.observer(nodaemon=True)
        for level in (LogLevel.debug, LogLevel.info):
            write({"log_format": "x", "log_level": level, "log_namespace": "a", "log_time": 1.0})
        self.assertIn(" [a#info] x\n", out.getvalue())
        self.assertEqual(out.getvalue().count("\n"), 1)

    def test_a_logger_of_the_operators_own(self) -> None:
        """A --logger of twistd's is left to write the log, and cannot be told the format."""
        self.assertIsNone(self.observer(logger="my.logger"))
        with self.assertRaises(SystemExit) as caught:
            self.under_twistd("--log-format", "json", logger="my.logger")
        self.assertIn(
            "--log-format json is of no use with twistd's --logger", str(caught.exception)
        )

    def test_without_twistd(self) -> None:
        """In another program's tree of services the log is that program's."""
        application = Application("other")
        self.addCleanup(setattr, sys, "excepthook", sys.excepthook)
        makeService(self.parsed()).setServiceParent(application)
        self.assertIsNone(application.getComponent(ILogObserver, None))

    def test_what_cannot_be(self) -> None:
        """Another format or level is refused with those that there are."""
        self.assertIn("--log-format: one of text, json", self.refused("--log-format", "xml"))
        self.assertIn("one of debug, info, warn, error", self.refused("--log-level", "loud"))


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
