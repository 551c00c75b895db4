"""TLS: between browsers and the gateway, and between the gateway and daemons."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Sequence
from http.cookies import SimpleCookie
from typing import Final

import trustme

from tests.integration.callers import HOST, by_tls, certificate_pem, context_of, key_pem
from tests.integration.daemon import shared_daemon, wait_until, write_secret
from tests.integration.gateway import Gateway, GatewayTestCase

WATCHER: Final = "watch-0123456789abcdef0123456789"
OPTIONS: Final = ("--tls=server.pem", "--key=server.key", "--allow=*")


class TlsTestCase(GatewayTestCase):
    """Base of tests with an authority of their own."""

    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.issued = self.authority.issue_cert(HOST, "127.0.0.1")
        self.context = context_of(self.authority)

    def secure_gateway(self, *options: str, secrets: dict[str, str] | None = None) -> Gateway:
        """Start a gateway that speaks TLS, before the shared daemon."""
        return self.start_gateway(
            shared_daemon(procs=2),
            *OPTIONS,
            *options,
            files={"server.pem": certificate_pem(self.issued)},
            secrets={"server.key": key_pem(self.issued), **(secrets or {})},
            context=self.context,
        )

    def shake(self, gateway: Gateway, protocols: Sequence[str]) -> ssl.SSLSocket:
        """Connect over TLS, offering some protocols."""
        context = context_of(self.authority)
        if protocols:
            context.set_alpn_protocols(protocols)
        sock = socket.create_connection(("127.0.0.1", gateway.port), 20)
        self.addCleanup(sock.close)
        secure = context.wrap_socket(sock, server_hostname="127.0.0.1")
        self.addCleanup(secure.close)
        return secure

    def serial(self, gateway: Gateway) -> str:
        """Tell the number of the certificate that a new connection is shown."""
        shown = self.shake(gateway, ()).getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])


class BrowserTests(TlsTestCase):
    def test_secure(self) -> None:
        """wss and https serve all that ws and http do; large results and pages as well."""
        gateway = self.secure_gateway(
            "--dashboard-token=watchers", secrets={"watchers": f"me:{WATCHER}\n"}
        )
        self.wait_for_log(gateway, "(TLS)")
        web = self.open(gateway)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assertEqual(len(web.ask("letters", [4 * 2**20])), 4 * 2**20)
        self.assertEqual(gateway.call("add", [1, 2]).json, {"result": 3})
        self.assertEqual(
            gateway.call("add", [1, 2], headers={"Origin": gateway.origin}).status, 200
        )
        self.assertEqual(gateway.get("/healthz").json, {"status": "ok"})
        # Whoever is on the way could have made a page of this host that came without TLS.
        plain = {"Origin": f"http://127.0.0.1:{gateway.port}"}
        self.assertEqual(gateway.call("add", [1, 2], headers=plain).status, 403)
        # What is a secret goes back over TLS alone.
        answer = gateway.get("/", Authorization=f"Bearer {WATCHER}")
        ((_, cookie),) = SimpleCookie(answer.headers["set-cookie"]).items()
        self.assertTrue(cookie["secure"])
        self.assertTrue(cookie["httponly"])

    def test_alpn(self) -> None:
        """Who offers http/1.1, or nothing, is served; who speaks HTTP/2 alone is refused."""
        gateway = self.secure_gateway()
        for protocols, chosen in (
            (("http/1.1",), "http/1.1"),
            (("h2", "http/1.1"), "http/1.1"),
            ((), None),
        ):
            secure = self.shake(gateway, protocols)
            self.assertEqual(secure.selected_alpn_protocol(), chosen)
            secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            self.assertTrue(secure.recv(100).startswith(b"HTTP/1.1 200"), protocols)
        for protocols in (("h2",), ("taskd/1",)):
            with self.assertRaises(ssl.SSLError) as raised:
                # TLS 1.3's server is done before its client finds that out.
                self.shake(gateway, protocols).recv(100)
            self.assertIn(
                "no application protocol", str(raised.exception).lower().replace("_", " ")
            )

    def test_no_tls(self) -> None:
        """Who speaks no TLS there is hung up on, and nobody else notices."""
        gateway = self.secure_gateway()
        raw = self.raw(gateway)
        raw.send("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        self.assertTrue(raw.is_hung_up())
        self.assertEqual(self.open(gateway).ask("add", [1, 2]), 3)

    def test_renewal(self) -> None:
        """At a reload new connections get the new certificate."""
        gateway = self.secure_gateway()
        before = self.serial(gateway)
        self.issued = self.authority.issue_cert(HOST, "127.0.0.1")
        write_secret(gateway.directory / "server.key", key_pem(self.issued))
        write_secret(gateway.directory / "server.pem", certificate_pem(self.issued))
        gateway.signal(signal.SIGHUP)
        wait_until(lambda: self.serial(gateway) != before, what="the new certificate")
        # It may be the last connection to the old process that saw the old one.
        wait_until(lambda: len(gateway.serving()) == 1, what="the end of the old process")
        self.assertEqual(self.open(gateway).ask("add", [1, 2]), 3)


class DaemonTests(TlsTestCase):
    def test_to_the_daemon(self) -> None:
        """The gateway calls daemons over TLS, and looks whose certificate they show."""
        daemon = self.start(
            "--tls=server.pem",
            "--key=server.key",
            files={"server.pem": certificate_pem(self.issued)},
            secrets={"server.key": key_pem(self.issued)},
            caller=by_tls(self.context),
        )
        place = f"tls:localhost:{daemon.port}"
        own = self.authority.cert_pem.bytes().decode()
        other = trustme.CA().cert_pem.bytes().decode()
        gateway = self.start_gateway(place, "--allow=*", "--tasks-ca=ca.pem", files={"ca.pem": own})
        self.assertEqual(self.open(gateway).ask("add", [1, 2]), 3)
        self.assertEqual(gateway.get("/healthz").json, {"status": "ok"})
        self.assertEqual(gateway.metrics()[f'taskd_up{{node="localhost:{daemon.port}"}}'], 1)

        stranger = self.start_gateway(
            place, "--allow=*", "--tasks-ca=ca.pem", files={"ca.pem": other}
        )
        reply = self.open(stranger).ask("add", [1, 2])
        error = self.assert_error(reply, "worker-lost")
        self.assertIs(error["may_have_started"], False)
        self.assertNotIn("certificate", error["message"])
        self.wait_for_log(stranger, "certificate")
        self.assertEqual(stranger.get("/healthz").status, 503)

    def test_certificate_of_the_gateways_own(self) -> None:
        """A daemon that wants a certificate gets the gateway's."""
        mine = self.authority.issue_cert("gateway.example", common_name="gateway")
        daemon = self.start(
            "--tls=server.pem",
            "--key=server.key",
            "--client-ca=ca.pem",
            files={
                "server.pem": certificate_pem(self.issued),
                "ca.pem": self.authority.cert_pem.bytes().decode(),
            },
            secrets={"server.key": key_pem(self.issued)},
            caller=by_tls(context_of(self.authority, mine)),
        )
        gateway = self.start_gateway(
            f"tls:localhost:{daemon.port}",
            "--allow=*",
            "--tasks-ca=ca.pem",
            "--tasks-certificate=own.pem",
            files={"ca.pem": self.authority.cert_pem.bytes().decode()},
            secrets={"own.pem": certificate_pem(mine) + key_pem(mine)},
        )
        self.assertEqual(self.open(gateway).ask("add", [1, 2]), 3)
        self.assertIn("gateway", daemon.status()["totals"]["callers"])
