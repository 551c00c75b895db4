"""What the operator may decide."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import SettingsError
from taskd.settings import SMTP_TLS, Settings, SmtpSettings

BOUNDS: dict[str, tuple[str, float, float]] = {
    "port": ("--port", 0, 65535),
    "tls_port": ("--tls-port", 0, 65535),
    "procs": ("--procs", 1, 1000),
    "threads": ("--threads", 1, 100),
    "max_line_bytes": ("--max-line", 1024, 1024**3),
    "grace_seconds": ("--grace", 0, 86400),
    "drain_seconds": ("--drain-seconds", 0, 86400),
    "backlog": ("--backlog", 0, 1_000_000),
    "max_in_flight": ("--max-in-flight", 1, 1_000_000),
    "max_connections": ("--max-connections", 1, 10_000_000),
    "first_line_seconds": ("--first-line-timeout", 0.1, 86400),
    "idle_seconds": ("--idle-timeout", 0.1, 864000),
    "max_tasks": ("--max-tasks", 1, 10**12),
}


def settings(**fields: Any) -> Settings:
    """Make settings of which only *fields* matter."""
    needed = {"certificate": "cert.pem", "key": "key.pem"} if "tls_port" in fields else {}
    return Settings(**{"port": 12345, **needed, **fields})


class SettingsTests(SynchronousTestCase):
    """The daemon's own settings."""

    def test_defaults(self) -> None:
        """Unless told otherwise, a daemon listens on loopback only and has one worker."""
        made = settings()
        self.assertEqual((made.interface, made.procs, made.threads), ("127.0.0.1", 1, 1))
        self.assertEqual((made.task_modules, made.smtp, made.debug), ((), None, False))
        self.assertEqual((made.backlog, made.max_in_flight), (10_000, 1024))
        self.assertEqual((made.first_line_seconds, made.idle_seconds), (30.0, None))
        self.assertEqual(
            (made.max_connections, made.max_tasks, made.max_rss_bytes), (None, None, None)
        )

    def test_bounds(self) -> None:
        """Each number may reach its bounds."""
        for field, (_, least, most) in BOUNDS.items():
            for value in (least, most):
                self.assertEqual(getattr(settings(**{field: value}), field), value)

    def test_out_of_bounds(self) -> None:
        """A number outside its bounds, or not a number, is refused with the option's name."""
        for field, (option, least, most) in BOUNDS.items():
            for value in (least - 1, most + 1, float("nan"), float("inf")):
                error = self.assertRaises(SettingsError, settings, **{field: value})
                self.assertIn(f"{option}: a number from {least} to {most}", str(error))

    def test_the_bounds_of_memory(self) -> None:
        """The limit of a worker's memory goes from a MiB to 2**30 of them, and is told in MiB."""
        for value in (2**20, 2**50):
            self.assertEqual(settings(max_rss_bytes=value).max_rss_bytes, value)
        for value in (0, 2**20 - 1, 2**50 + 2**20):
            error = self.assertRaises(SettingsError, settings, max_rss_bytes=value)
            self.assertIn("--max-rss: a number from 1 to 1073741824, not", str(error))

    def test_limits_that_may_be_absent(self) -> None:
        """Where a limit may be absent, None is one that is."""
        for field in ("max_connections", "idle_seconds", "max_tasks", "max_rss_bytes"):
            self.assertIsNone(getattr(settings(**{field: None}), field))

    def test_task_modules(self) -> None:
        """Dotted names and paths of Python files can hold tasks."""
        names = ("tasks", "my.tasks", "_x.y2", "/srv/my tasks/mail.py", "./a.py", "überweisung")
        self.assertEqual(settings(task_modules=names).task_modules, names)

    def test_what_is_no_task_module(self) -> None:
        """What is neither a dotted name nor a path of a Python file is refused, by its name."""
        for name in ("", ".", "a.", ".a", "a..b", "2a", "a-b", "/srv/tasks", "a b", "tasks\n"):
            error = self.assertRaises(SettingsError, settings, task_modules=("good", name))
            self.assertIn(f"--tasks: {name!r}", str(error))

    def test_identity_defaults(self) -> None:
        """Unless told otherwise, a daemon speaks no TLS, asks nobody, and is not to be exposed."""
        made = settings()
        self.assertEqual((made.certificate, made.key, made.client_ca), ("", "", ""))
        self.assertEqual((made.token_file, made.allow, made.insecure), ("", (), False))
        self.assertEqual((made.tls_port, made.listen, made.socket_owner), (None, (), ""))

    def test_tls(self) -> None:
        """A certificate and its key go together, on the port or on one of its own."""
        pair = {"certificate": "cert.pem", "key": "key.pem"}
        for fields in ({}, {"tls_port": 0}, {"port": None, "tls_port": 12346}):
            self.assertEqual(settings(**pair, **fields).key, "key.pem")
        for fields in ({"certificate": "cert.pem"}, {"key": "key.pem"}):
            error = self.assertRaises(SettingsError, settings, **fields)
            self.assertIn("--tls and --key: give both", str(error))

    def test_tls_of_no_use(self) -> None:
        """A port for TLS without a certificate, and a certificate without a port, are refused."""
        error = self.assertRaises(SettingsError, Settings, 12345, tls_port=12346)
        self.assertIn("--tls-port is of no use without --tls", str(error))
        fields = {"certificate": "cert.pem", "key": "key.pem", "listen": ("unix:/run/x",)}
        error = self.assertRaises(SettingsError, settings, port=None, **fields)
        self.assertIn("--tls is of no use without a port", str(error))

    def test_frozen(self) -> None:
        """Settings cannot be changed once they are made."""
        with self.assertRaises(dataclasses.FrozenInstanceError):
            settings().port = 1  # type: ignore[misc]

    def test_another_process_gets_the_same(self) -> None:
        """Settings that went through JSON are equal to what they were."""
        smtp = SmtpSettings("mail.example", 587, "starttls", "me", "secret", 5.0)
        for made in (
            settings(),
            settings(task_modules=("a", "b.py"), preload=False, grace_seconds=0.5, smtp=smtp),
            settings(
                backlog=0,
                max_in_flight=2,
                max_connections=3,
                first_line_seconds=0.5,
                idle_seconds=4.5,
                max_tasks=5,
                max_rss_bytes=6 * 2**20,
            ),
            settings(
                listen=("unix:/run/x", "tcp:0"),
                tls_port=0,
                client_ca="ca.pem",
                token_file="tokens",
                allow=(("web", ("echo", "image.*")), ("*", ("mail",))),
                socket_owner=":web",
                insecure=True,
            ),
        ):
            again = Settings.from_json(json.loads(json.dumps(made.to_json())))
            self.assertEqual(again, made)
            self.assertIs(type(again.task_modules), tuple)
            self.assertEqual(hash(again.allow), hash(made.allow))

    def test_another_process_checks_again(self) -> None:
        """Settings from JSON are checked like all others."""
        fields = settings().to_json()
        self.assertRaises(SettingsError, Settings.from_json, {**fields, "procs": 0})


class SmtpSettingsTests(SynchronousTestCase):
    """The way to the mail server."""

    def test_every_way_to_protect_mail(self) -> None:
        """Mail can go plain, by STARTTLS, or by TLS from the first byte."""
        self.assertEqual(SMTP_TLS, ("none", "starttls", "tls"))
        for tls in SMTP_TLS:
            self.assertEqual(SmtpSettings("mail.example", 25, tls).tls, tls)

    def test_what_cannot_be(self) -> None:
        """A server without name or port, another protection, or no time to wait is refused."""
        for option, fields in (
            ("--smtp:", {"host": "", "port": 25}),
            ("--smtp:", {"host": "mail", "port": 0}),
            ("--smtp:", {"host": "mail", "port": 65536}),
            ("--smtp-tls:", {"host": "mail", "port": 25, "tls": "ssl"}),
            ("--smtp-tls:", {"host": "mail", "port": 25, "tls": ""}),
            ("--smtp:", {"host": "mail", "port": 25, "timeout_seconds": 0}),
            ("--smtp:", {"host": "mail", "port": 25, "timeout_seconds": -1.0}),
        ):
            error = self.assertRaises(SettingsError, lambda f=fields: SmtpSettings(**f))
            self.assertIn(option, str(error))

    def test_the_password_is_not_shown(self) -> None:
        """The password stands in no text that is made from the settings."""
        smtp = SmtpSettings("mail", 25, user="me", password="xyzzy")
        self.assertNotIn("xyzzy", f"{smtp!r} {smtp} {settings(smtp=smtp)!r}")
