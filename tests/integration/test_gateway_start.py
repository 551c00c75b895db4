"""Starts of a gateway that are refused: one line on stderr, status 1, and no process left."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import trustme

from tests.integration.callers import certificate_pem, key_pem
from tests.integration.case import QUICK_SECONDS, RefusedTestCase
from tests.integration.daemon import Ended, shared_daemon, temporary_directory, write_secret
from tests.integration.gateway import Gateway, GatewayTestCase

NOWHERE: Final = "tcp:127.0.0.1:1"
"""No daemon is there; a gateway that is refused does not get as far."""

TOKENS: Final = "web:web-0123456789abcdef0123456789\n"
EXPOSED: Final = "--interface=0.0.0.0"
STARTS_AT_ONCE: Final = 4


class RefusedTests(RefusedTestCase):
    def refuse_gateways(self, *starts: Sequence[str], **more: Any) -> list[Ended]:
        """Start gateways that cannot be, a few at a time, and see them end."""

        def refuse(options: Sequence[str]) -> Ended:
            return Gateway(NOWHERE, *options, **more).run(QUICK_SECONDS)

        with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            return list(pool.map(refuse, starts))

    def assert_each_refused(self, starts: dict[tuple[str, ...], str], **more: Any) -> None:
        """Each start is refused with its words, and says which program it is."""
        for (options, words), ended in zip(
            starts.items(), self.refuse_gateways(*starts, **more), strict=True
        ):
            self.assert_refused(ended, "taskd-gateway", words)
            self.assertNotIn("listening", ended.output, options)

    def test_exposed(self) -> None:
        """Where other machines can call, callers are asked who they are, unless --insecure."""
        self.assert_each_refused(
            {
                (EXPOSED,): "--token-file",
                (EXPOSED, "--no-dashboard"): "--token-file",
                (EXPOSED, "--token-file=tokens"): "--dashboard-token",
                (EXPOSED, "--token-file=tokens", "--no-dashboard"): "--dashboard-token",
                (EXPOSED, "--dashboard-token=tokens"): "--token-file",
                ("--interface=::",): "--insecure",
            },
            secrets={"tokens": TOKENS},
        )

    def test_options(self) -> None:
        """A bad option is told in one line."""
        self.assert_each_refused(
            {
                ("--nonsense",): "nonsense",
                ("nonsense",): "",
                ("--port=x",): "--port: a number, not 'x'",
                ("--procs=0",): "--procs",
                ("--max-message=10",): "--max-message",
                ("--max-rate=nan",): "--max-rate",
                ("--ping=inf",): "--ping",
                ("--grace=-1",): "--grace",
                ("--allow=",): "--allow",
                ("--origin=example.org",): "--origin",
                ("--origin=*",): "--origin",
                ("--cookie=session",): "--token-file",
                ("--keep-tokens",): "--token-file",
                ("--tls=x",): "--key",
                ("--tasks=nonsense:1",): "--tasks nonsense:1",
                ("--tasks-ca=x",): "--tasks-ca",
                ("--log-format=xml",): "--log-format",
            },
            secrets={"tokens": TOKENS},
        )

    def test_addresses(self) -> None:
        """A port that is taken, and an address that is not this machine's, are refused."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            ended = Gateway(NOWHERE, port=port).run(QUICK_SECONDS)
        self.assert_refused(ended, f"127.0.0.1 port {port}: another process listens there")
        self.assert_each_refused(
            {
                ("--interface=192.0.2.1",): "no such address",
                ("--interface=example.invalid",): "example.invalid",
            }
        )

    def test_files(self) -> None:
        """A file that cannot be used is named, with what is wrong with it."""
        authority = trustme.CA()
        issued, other = authority.issue_cert("localhost"), authority.issue_cert("localhost")
        files = {
            "certificate": certificate_pem(issued),
            "open": TOKENS,
        }
        secrets = {
            "key": key_pem(issued),
            "other.key": key_pem(other),
            "empty": "",
            "colon": ":web-0123456789abcdef0123456789\n",
            "short": "web:short\n",
        }
        self.assert_each_refused(
            {
                ("--token-file=missing",): "No such file",
                ("--token-file=.",): "directory",
                ("--token-file=open",): "chmod 600",
                ("--token-file=colon",): "line 1",
                ("--dashboard-token=short",): "line 1",
                ("--tasks-token=missing",): "No such file",
                ("--tasks-token=empty",): "one token",
                ("--tls=missing", "--key=key"): "No such file",
                ("--tls=certificate", "--key=missing"): "No such file",
                ("--tls=certificate", "--key=open"): "chmod 600",
                ("--tls=certificate", "--key=short"): "the certificate or its key",
                ("--tls=certificate", "--key=other.key"): "cannot be used with this key",
            },
            files=files,
            secrets=secrets,
        )

    def test_files_for_the_daemons(self) -> None:
        """So it is with those that are for the way to the daemons."""
        files = {"nonsense.pem": "nonsense"}
        starts = {
            ("--tasks-ca=missing.pem",): "missing.pem",
            ("--tasks-ca=nonsense.pem",): "nonsense.pem",
            ("--tasks-certificate=missing.pem",): "missing.pem",
        }
        for options, words in starts.items():
            gateway = Gateway("tls:localhost:1", *options, files=files)
            self.assert_refused(gateway.run(QUICK_SECONDS), words)


class TakenTests(GatewayTestCase):
    def test_exposed(self) -> None:
        """With tokens for both, or --insecure, it listens where other machines can call."""
        secrets = {"tokens": TOKENS}
        daemon = shared_daemon(procs=2)
        for options in (
            ("--token-file=tokens", "--dashboard-token=tokens"),
            ("--token-file=tokens", "--dashboard-token=tokens", "--no-dashboard"),
            ("--insecure",),
        ):
            gateway = self.start_gateway(daemon, EXPOSED, *options, secrets=secrets)
            self.wait_for_log(gateway, "speaks no TLS")
            self.assertEqual("--insecure: whoever" in gateway.log, "--insecure" in options)
            self.assertEqual(gateway.get("/healthz").status, 200)

    def test_warnings(self) -> None:
        """Nothing is warned of where nobody else can call; --interface ::1 is such a place."""
        gateway = self.start_gateway(NOWHERE)
        self.wait_for_log(gateway, f"for {NOWHERE}")
        self.assertNotIn("TLS", gateway.log)
        self.assertEqual(gateway.errors, "")

    def test_secrecy(self) -> None:
        """No process shows a token to who lists processes."""
        directory = temporary_directory(self)
        write_secret(directory / "tokens", TOKENS)
        gateway = self.start_gateway(NOWHERE, f"--token-file={directory / 'tokens'}", procs=2)
        token = TOKENS.split(":")[1].strip()
        processes = gateway.processes()
        self.assertEqual(len(processes), 3)
        for process in processes:
            for name in ("cmdline", "environ"):
                with open(f"/proc/{process.pid}/{name}", "rb") as file:
                    self.assertNotIn(token.encode(), file.read())
        self.assertNotIn(token, gateway.log)
