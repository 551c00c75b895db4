"""What the operator of a gateway decided: ranges, combinations, rules, and the way to a process."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import SettingsError
from taskd.gateway.settings import ALLOWED_BY_DEFAULT, GatewaySettings, rule_of


class SettingsTests(SynchronousTestCase):
    def refused(self, **settings: Any) -> str:
        with self.assertRaises(SettingsError) as caught:
            GatewaySettings(**settings)
        return str(caught.exception)

    def test_defaults(self) -> None:
        """By default it listens on loopback, asks every page for its origin, and allows echo."""
        settings = GatewaySettings()
        self.assertEqual((settings.interface, settings.port), ("127.0.0.1", 8080))
        self.assertTrue(settings.needs_origin)
        self.assertFalse(settings.insecure or settings.origins or settings.keep_tokens)
        self.assertEqual(settings.allow, ALLOWED_BY_DEFAULT)
        self.assertEqual(settings.allow, (("*", ("echo",)),))

    def test_ranges(self) -> None:
        """Each number has its range, whose ends are in it, and what is outside is named."""
        for name, option, least, most, below, above in (
            ("port", "--port", 0, 65535, -1, 65536),
            ("procs", "--procs", 1, 100, 0, 101),
            ("max_message_bytes", "--max-message", 1024, 2**30, 1023, 2**30 + 1),
            ("max_rate", "--max-rate", 0.1, 1e6, 0.09, 1e6 + 1),
            ("max_connections", "--max-connections", 1, 1_000_000, 0, 1_000_001),
            ("max_calls", "--max-calls", 1, 100_000, 0, 100_001),
            ("max_in_flight", "--max-in-flight", 1, 100_000, 0, 100_001),
            ("ping_seconds", "--ping", 0.1, 86400, 0, 86401),
            ("grace_seconds", "--grace", 0, 86400, -0.1, 86401),
        ):
            for value in (least, most):
                self.assertEqual(getattr(GatewaySettings(**{name: value}), name), value)
            for value in (below, above, float("nan")):
                self.assertIn(option, self.refused(**{name: value}))

    def test_choices(self) -> None:
        """The log's format and level are of those that there are."""
        self.assertIn("--log-format", self.refused(log_format="xml"))
        self.assertIn("--log-level", self.refused(log_level="loud"))

    def test_what_needs_something_else(self) -> None:
        """What is of no use alone is refused, and told which option is missing."""
        for told, settings in (
            ("--tls and --key", {"certificate": "c"}),
            ("--tls and --key", {"key": "k"}),
            ("--tasks:", {"tasks": ()}),
            ("--tasks-ca", {"tasks_ca": "ca"}),
            ("--tasks-certificate", {"tasks_certificate": "c"}),
            ("--tasks-ca", {"tasks_ca": "ca", "tasks": ("tls:a:1", "tcp:a:1")}),
            ("--cookie", {"cookie": "c"}),
            ("--keep-tokens", {"keep_tokens": True}),
        ):
            self.assertIn(told, self.refused(**settings))
        GatewaySettings(
            certificate="c",
            key="k",
            tasks=("tls:a:1", "tls:b:1"),
            tasks_ca="ca",
            tasks_certificate="c",
            cookie="c",
            token_file="t",
            keep_tokens=True,
            dashboard_token_file="f",
        )

    def test_to_another_process(self) -> None:
        """They are the same again when they have been JSON."""
        for settings in (
            GatewaySettings(),
            GatewaySettings(
                tasks=("tcp:a:1", "tcp:b:2"),
                allow=(("web", ("a", "b*")), ("*", ("echo",))),
                origins=("https://example.org",),
                needs_origin=False,
                max_rate=0.5,
                token_file="/t",
                cookie="c",
            ),
        ):
            again = GatewaySettings.from_json(json.loads(json.dumps(settings.to_json())))
            self.assertEqual(again, settings)
            self.assertEqual(hash(again), hash(settings))

    def test_frozen(self) -> None:
        """Nobody changes them afterwards."""
        with self.assertRaises(dataclasses.FrozenInstanceError):
            GatewaySettings().port = 1  # type: ignore[misc]


class RuleTests(SynchronousTestCase):
    def test_rules(self) -> None:
        """A rule names functions, for everybody or for an identity."""
        for text, rule in (
            ("echo", ("*", ("echo",))),
            ("send_mail,echo", ("*", ("send_mail", "echo"))),
            (" a , b ,", ("*", ("a", "b"))),
            ("web=echo", ("web", ("echo",))),
            (" web = a, b*", ("web", ("a", "b*"))),
            ("*=taskd.status", ("*", ("taskd.status",))),
            ("O=acme,OU=web=echo", ("O=acme,OU=web", ("echo",))),
        ):
            self.assertEqual(rule_of(text), rule, text)

    def test_what_is_no_rule(self) -> None:
        """Without a function, or with an identity that is missing, it is none."""
        for text in ("", " ", ",", " , ,", "web=", "web= ,", "=echo", " =echo", "="):
            with self.assertRaises(SettingsError) as caught:
                rule_of(text)
            self.assertTrue(str(caught.exception).startswith(f"--allow {text}: "), text)

    def test_identities_without_tokens(self) -> None:
        """A rule for an identity is refused where nobody has one."""
        with self.assertRaises(SettingsError) as caught:
            GatewaySettings(allow=(("web", ("echo",)),))
        self.assertIn("--token-file", str(caught.exception))
        GatewaySettings(allow=(("web", ("echo",)),), token_file="/tokens")
        GatewaySettings(allow=(("*", ("echo",)),))
