"""The options of ``twistd taskd-gateway``, and what is made of them."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from typing import Any

from twisted.application.service import Application, IService
from twisted.logger import ILogObserver, LogLevel
from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from taskd.gateway.settings import GatewaySettings
from taskd.gateway.supervisor import GatewaySupervisor
from taskd.gateway.tap import Options, makeService
from tests.support import temporary_directory

EVERY_OPTION = (
    *("--port", "0", "--interface", "::1", "--tls", "cert.pem", "--key", "key.pem"),
    *("--procs", "3", "--tasks", "tls:a:1", "--tasks", "tls:b:2", "--tasks-ca", "ca.pem"),
    *("--tasks-certificate", "own.pem", "--tasks-token", "own", "--token-file", "tokens"),
    *("--cookie", "session", "--dashboard-token", "watchers", "--max-message", "2048"),
    *(
        "--max-rate",
        "2.5",
        "--max-connections",
        "7",
        "--max-in-flight",
        "8",
        "--max-calls",
        "9",
        "--ping",
        "9.5",
    ),
    *("--grace", "1.5", "--log-format", "json", "--log-level", "warn", "--keep-tokens"),
    *("--no-origin-needed", "--insecure", "--allow", "echo", "--allow", "web=a,b"),
    *("--origin", "https://example.org", "--origin", "http://[::1]:3000"),
)


class TapTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.addCleanup(os.chdir, os.getcwd())
        self.addCleanup(setattr, sys, "excepthook", sys.excepthook)
        os.chdir(self.directory)

    def parsed(self, *args: str) -> Options:
        options = Options()
        options.parseOptions(args)
        return options

    def settings(self, *args: str) -> GatewaySettings:
        return self.parsed(*args).settings

    def refused(self, *args: str) -> str:
        """Give the one line with which options are refused."""
        with self.assertRaises(SystemExit) as caught:
            self.parsed(*args)
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        self.assertTrue(message.startswith("twistd taskd-gateway: "), message)
        self.assertTrue(message.endswith("; see twistd taskd-gateway --help"), message)
        return message


class OptionTests(TapTestCase):
    def test_defaults(self) -> None:
        """Without options all is as the settings have it."""
        self.assertEqual(self.settings(), GatewaySettings())

    def test_every_option(self) -> None:
        """Every option finds its way into the settings, and paths are whole."""
        self.assertEqual(
            self.settings(*EVERY_OPTION),
            GatewaySettings(
                port=0,
                interface="::1",
                certificate=os.path.abspath("cert.pem"),
                key=os.path.abspath("key.pem"),
                insecure=True,
                procs=3,
                tasks=("tls:a:1", "tls:b:2"),
                tasks_ca=os.path.abspath("ca.pem"),
                tasks_certificate=os.path.abspath("own.pem"),
                tasks_token_file=os.path.abspath("own"),
                keep_tokens=True,
                token_file=os.path.abspath("tokens"),
                cookie="session",
                allow=(("*", ("echo",)), ("web", ("a", "b"))),
                origins=("https://example.org", "http://[::1]:3000"),
                needs_origin=False,
                dashboard=True,
                dashboard_token_file=os.path.abspath("watchers"),
                max_message_bytes=2048,
                max_rate=2.5,
                max_connections=7,
                max_in_flight=8,
                max_calls=9,
                ping_seconds=9.5,
                grace_seconds=1.5,
                log_format="json",
                log_level="warn",
            ),
        )
        self.assertFalse(self.settings("--no-dashboard").dashboard)

    def test_no_setting_without_an_option(self) -> None:
        """There is an option for each setting: only the page is on in both examples above."""
        every, default = self.settings(*EVERY_OPTION), GatewaySettings()
        same = [
            field.name
            for field in fields(GatewaySettings)
            if getattr(every, field.name) == getattr(default, field.name)
        ]
        self.assertEqual(same, ["dashboard"])

    def test_two_parsings(self) -> None:
        """Nothing of one parsing is left in the next."""
        self.settings(*EVERY_OPTION)
        self.assertEqual(self.settings(), GatewaySettings())

    def test_short_ones(self) -> None:
        """The commonest have one letter."""
        settings = self.settings("-p", "1", "-i", "::1", "-n", "2")
        self.assertEqual((settings.port, settings.interface, settings.procs), (1, "::1", 2))

    def test_what_cannot_be(self) -> None:
        """What cannot be is refused in one line, which says what can."""
        for args, words in (
            (("--port", "x"), "--port: a number, not 'x'"),
            (("--port", "70000"), "--port"),
            (("--max-rate", "fast"), "--max-rate: a number, not 'fast'"),
            (("--max-rate", "nan"), "--max-rate"),
            (("--procs", "1.5"), "--procs: a number, not '1.5'"),
            (("--allow", "web="), "--allow web=: give FUNCTION,..."),
            (("--origin", "example.org"), "--origin example.org: give scheme and host"),
            (("--origin", "https://example.org/"), "--origin https://example.org/:"),
            (("--origin", "*"), "--origin *:"),
            (("--tls", "cert.pem"), "--tls and --key: give both"),
            (("--tasks-ca", "ca.pem"), "let each --tasks begin with tls:"),
            (("--cookie", "a"), "--cookie is of no use without --token-file"),
            (("--keep-tokens",), "--keep-tokens is of no use without --token-file"),
            (("--log-format", "xml"), "--log-format: one of text, json"),
            (("--threads", "1"), "threads"),
        ):
            self.assertIn(words, self.refused(*args))

    def test_the_version(self) -> None:
        """The version shown is taskd's."""
        with redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit) as caught:
            self.parsed("--version")
        self.assertEqual((out.getvalue(), caught.exception.code), (f"taskd {__version__}\n", 0))

    def test_help(self) -> None:
        """The help names every option, and what each is if it is not given."""
        text = " ".join(Options().getUsage(width=200).split())
        for name in [arg for arg in EVERY_OPTION if arg.startswith("--")] + ["--no-dashboard"]:
            self.assertIn(f"{name}", text)
        self.assertIn("[default: 8080]", text)


class ServiceTests(TapTestCase):
    def under_twistd(self, *args: str, **twistd: Any) -> Options:
        """Parse options as twistd's own options have them parsed."""
        options = Options()
        options.parent = usage.Options()
        options.parent.update({"pidfile": "other.pid", **twistd})
        options.parseOptions(args)
        return options

    def observer(self, *args: str, **twistd: Any) -> Any:
        """Give what writes the log of the application that the gateway becomes part of."""
        application = Application("taskd-gateway")
        service: Any = makeService(self.under_twistd(*args, **twistd))
        service.setServiceParent(application)
        return application.getComponent(ILogObserver, None)

    def test_the_service(self) -> None:
        """The service is the supervisor; nothing has been opened."""
        service: Any = makeService(self.parsed())
        self.assertIsInstance(service, GatewaySupervisor)
        self.assertTrue(IService.providedBy(service))
        self.assertFalse(service.running)

    def test_the_log(self) -> None:
        """The application writes the log as it was told."""
        with redirect_stdout(io.StringIO()) as out:
            write = self.observer("--log-format", "json", "--log-level", "warn", nodaemon=True)
        for level in (LogLevel.info, LogLevel.warn):
            write({"log_format": "x", "log_level": level, "log_namespace": "a", "log_time": 1.0})
        self.assertEqual(json.loads(out.getvalue())["level"], "warn")

    def test_a_logger_of_the_operators_own(self) -> None:
        """A --logger of twistd's is left to write the log, and cannot be told the format."""
        self.assertIsNone(self.observer(logger="my.logger"))
        with self.assertRaises(SystemExit) as caught:
            self.under_twistd("--log-format", "json", logger="my.logger")
        self.assertIn("of no use with twistd's --logger", str(caught.exception))

    def test_the_pid_file(self) -> None:
        """Its pid file is not the daemon's, which may run beside it; one that is named stays."""
        options: Any = self.under_twistd(pidfile="twistd.pid")
        self.assertEqual(options.parent["pidfile"], "taskd-gateway.pid")
        options = self.under_twistd(pidfile="/run/gateway.pid")
        self.assertEqual(options.parent["pidfile"], "/run/gateway.pid")

    def test_the_notify_socket(self) -> None:
        """The service manager's socket is the supervisor's alone."""
        os.environ["NOTIFY_SOCKET"] = str(self.directory / "notify")
        makeService(self.parsed())
        self.assertNotIn("NOTIFY_SOCKET", os.environ)
