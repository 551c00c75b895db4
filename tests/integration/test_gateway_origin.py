"""Pages of somebody else's, and names of somebody else's that lead here: they get nothing."""

from __future__ import annotations

import http
import json
from pathlib import Path
from typing import Any, Final

from websockets.exceptions import InvalidStatus

from tests.integration.daemon import Daemon, shared_daemon
from tests.integration.gateway import Gateway, GatewayTestCase, shared_gateway

FOREIGN: Final = "https://evil.example"
FRIEND: Final = "https://example.org"
OPTIONS: Final = ("--allow=*", f"--origin={FRIEND}", "--origin=http://localhost:3000")

TOKEN: Final = "web-0123456789abcdef0123456789"
COOKIE: Final = {"Cookie": f"session={TOKEN}"}
CALLS: Final = ("--allow=*", "--token-file=tokens", "--cookie=session", f"--origin={FRIEND}")


class OriginTestCase(GatewayTestCase):
    """Base of tests of who is let in."""

    daemon: Daemon
    gateway: Gateway

    def assert_closed_to(self, origin: str | None, path: str = "/ws", **more: Any) -> None:
        """A page of this origin gets no WebSocket."""
        with self.assertRaises(InvalidStatus) as raised:
            self.gateway.open(path, origin=origin, **more)
        response = raised.exception.response
        self.assertEqual(response.status_code, http.HTTPStatus.FORBIDDEN, origin)
        assert response.body is not None
        self.assert_error(json.loads(response.body), "unauthorized", "origin")

    def assert_open_to(self, origin: str | None, path: str = "/ws", **more: Any) -> None:
        """A page of this origin may call."""
        opened = self.open(self.gateway, path, origin=origin, **more)
        self.assertEqual(opened.ask("add", [1, 2]), 3, origin)


class WebSocketTests(OriginTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway(*OPTIONS)

    def test_own_and_named(self) -> None:
        """The gateway's own pages may call, and those that --origin names."""
        for origin in (self.gateway.origin, FRIEND, f"{FRIEND}:443", "http://localhost:3000"):
            self.assert_open_to(origin)

    def test_foreign(self) -> None:
        """All others get 403, whatever their names look like; what names none as well."""
        refused = self.gateway.metrics()['taskd_gateway_refused_total{reason="origin"}']
        origins = (
            FOREIGN,
            "null",
            None,
            "",
            "http://example.org",
            f"{FRIEND}:8443",
            f"{FRIEND}.evil.example",
            f"{FRIEND}/",
            f"{FRIEND}@evil.example",
            "https://evil.example#https://example.org",
            "http://localhost",
            f"http://localhost:{self.gateway.port}",
            "http://127.0.0.1",
            f"http://127.0.0.1:{self.gateway.port + 1}",
            f"{self.gateway.origin}.evil.example",
            f"{self.gateway.origin}, {FOREIGN}",
            "file://",
            "chrome-extension://abcdef",
        )
        for origin in origins:
            if origin == "":
                raw = self.raw(self.gateway)
                self.assertEqual(raw.upgrade(headers={"Origin": ""}).status, 403)
            else:
                self.assert_closed_to(origin)
        self.gateway.wait_for_figure('refused_total{reason="origin"}', refused + len(origins))

    def test_two_origins(self) -> None:
        """A request with two origins has none."""
        raw = self.raw(self.gateway)
        answer = raw.upgrade(headers={"Origin": f"{FRIEND}\r\nOrigin: {FRIEND}"})
        self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)

    def test_feed(self) -> None:
        """So it is with the dashboard's feed."""
        for origin in (FOREIGN, "null", None):
            self.assert_closed_to(origin, "/live")
        self.assertEqual(self.open(self.gateway, "/live").reply()["kind"], "hello")

    def test_rebinding(self) -> None:
        """A foreign name that leads here opens nothing, though a page of that name asks."""
        for host in (
            "evil.example",
            f"evil.example:{self.gateway.port}",
            "example.org.evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "evil.example@127.0.0.1",
            "",
        ):
            headers = {"Host": host, "Origin": f"http://{host}"}
            for path in ("/ws", "/live"):
                answer = self.raw(self.gateway).upgrade(path, headers)
                self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN, host)
            for path in ("/", "/metrics", "/dashboard.js", "/no/such/page"):
                answer = self.gateway.get(path, Host=host)
                self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN, (host, path))
                self.assert_error(answer.json, "unauthorized", "is no name of this place")
            self.assertEqual(self.gateway.get("/healthz", Host=host).json, {"status": "ok"})
            path = self.path(self.daemon)
            answer = self.gateway.call("touch", [path], headers=headers)
            self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN, host)
            self.assertFalse(Path(path).exists())

    def test_own_names(self) -> None:
        """This machine's numbers, localhost and the hosts of --origin are the gateway's names."""
        for host in (
            "127.0.0.1",
            "localhost",
            "LOCALHOST:1",
            "[::1]:80",
            "10.1.2.3",
            "example.org",
        ):
            self.assertEqual(self.gateway.get("/", Host=host).status, http.HTTPStatus.OK, host)
            headers = {"Host": host, "Origin": FRIEND}
            answer = self.raw(self.gateway).upgrade(headers=headers)
            self.assertEqual(answer.status, http.HTTPStatus.SWITCHING_PROTOCOLS, host)

    def test_behind_a_proxy(self) -> None:
        """A page on the usual port, whose Host names none, is the gateway's own as well."""
        for host, origin in (
            ("example.org", "https://example.org"),
            ("10.1.2.3", "https://10.1.2.3"),
            ("localhost:80", "http://localhost"),
        ):
            answer = self.raw(self.gateway).upgrade(headers={"Host": host, "Origin": origin})
            self.assertEqual(answer.status, http.HTTPStatus.SWITCHING_PROTOCOLS, origin)
        # But where --origin names it by https alone, whoever is on the way could make that page.
        headers = {"Host": "example.org", "Origin": "http://example.org"}
        answer = self.raw(self.gateway).upgrade(headers=headers)
        self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)

    def test_no_host(self) -> None:
        """Who names no host, or two, gets no page."""
        for hosts in ("", "Host: 127.0.0.1\r\nHost: evil.example\r\n"):
            raw = self.raw(self.gateway)
            raw.send(f"GET / HTTP/1.1\r\n{hosts}\r\n")
            self.assertEqual(raw.answer().status, http.HTTPStatus.FORBIDDEN, hosts)


class CallTests(OriginTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway(*OPTIONS)

    def test_content_types(self) -> None:
        """What a form can send, or a page without asking first, is refused with 415."""
        path = self.path(self.daemon)
        body = json.dumps([path]).encode()
        parts = b'--x\r\nContent-Disposition: form-data; name="["\r\n\r\n%b\r\n--x--\r\n' % body
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "text/plain; application/json",
            "application/jsonp",
            "",
            None,
        ):
            headers = {} if kind is None else {"Content-Type": kind}
            data = parts if kind and kind.startswith("multipart") else body
            answer = self.gateway.http("POST", "/call/touch", data, headers)
            self.assertEqual(answer.status, http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, kind)
            self.assert_error(answer.json, "malformed", "application/json")
        self.assertFalse(Path(path).exists())
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        self.assertEqual(self.gateway.http("POST", "/call/touch", body, headers).status, 200)
        self.assertTrue(Path(path).exists())

    def test_origins(self) -> None:
        """A page may call as by WebSocket; a program, which names no origin, may call."""
        path = self.path(self.daemon)
        for origin in (FOREIGN, "null", "http://example.org", "http://127.0.0.1"):
            answer = self.gateway.call("touch", [path], headers={"Origin": origin})
            self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN, origin)
            self.assert_error(answer.json, "unauthorized", "origin")
        self.assertFalse(Path(path).exists())
        for headers in ({"Origin": self.gateway.origin}, {"Origin": FRIEND}, {}):
            answer = self.gateway.call("add", [1, 2], headers=headers)
            self.assertEqual((answer.status, answer.json), (200, {"result": 3}), headers)

    def test_preflight(self) -> None:
        """A browser that asks whether a foreign page may is not told that it may."""
        for origin in (FOREIGN, FRIEND):
            answer = self.gateway.http(
                "OPTIONS",
                "/call/echo",
                headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
            )
            self.assertEqual(answer.status, http.HTTPStatus.METHOD_NOT_ALLOWED)
            self.assertNotIn("access-control-allow-origin", answer.headers)


class CookieTests(OriginTestCase):
    def test_cookie(self) -> None:
        """A cookie comes along by itself, so it counts only with an origin that may call."""
        self.daemon = shared_daemon(procs=2)
        self.gateway = self.start_gateway(
            self.daemon,
            *CALLS,
            "--keep-tokens",
            "--no-origin-needed",
            secrets={"tokens": f"web:{TOKEN}\n"},
        )
        path = self.path(self.daemon)
        for origin in (FOREIGN, "null"):
            self.assert_closed_to(origin, headers=COOKIE)
            answer = self.gateway.call("touch", [path], headers={**COOKIE, "Origin": origin})
            self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)
        answer = self.gateway.call("touch", [path], headers=COOKIE)
        self.assertEqual(answer.status, http.HTTPStatus.UNAUTHORIZED)
        self.assertEqual(answer.headers["www-authenticate"], "Bearer")
        without = self.open(self.gateway, origin=None, headers=COOKIE)
        self.assert_error(without.ask("touch", [path]), "unauthorized", "taskd.auth")
        self.assertFalse(Path(path).exists())
        for origin in (self.gateway.origin, FRIEND):
            self.assert_open_to(origin, headers=COOKIE)
            answer = self.gateway.call("add", [1, 2], headers={**COOKIE, "Origin": origin})
            self.assertEqual((answer.status, answer.json), (200, {"result": 3}))
        # A program shows its token where no browser puts it by itself.
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        self.assert_open_to(None, headers=bearer)
        self.assertEqual(self.gateway.call("add", [1, 2], headers=bearer).json, {"result": 3})
        self.assert_closed_to(FOREIGN, headers=bearer)


class ProgramTests(OriginTestCase):
    def test_no_origin_needed(self) -> None:
        """With --no-origin-needed what names no origin may call; foreign pages may not."""
        self.daemon = shared_daemon(procs=2)
        self.gateway = self.start_gateway(self.daemon, "--allow=*", "--no-origin-needed")
        self.assert_open_to(None)
        self.assert_open_to(self.gateway.origin)
        for origin in (FOREIGN, "null"):
            self.assert_closed_to(origin)
        raw = self.raw(self.gateway)
        answer = raw.upgrade(headers={"Origin": f"{FOREIGN}\r\nOrigin: {FOREIGN}"})
        self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)
        raw_call = self.raw(self.gateway)
        raw_call.request(
            "POST",
            "/call/echo",
            {
                "Origin": f"{FOREIGN}\r\nOrigin: {FOREIGN}",
                "Content-Type": "application/json",
                "Content-Length": "3",
            },
            b"[1]",
        )
        self.assertEqual(raw_call.answer().status, http.HTTPStatus.FORBIDDEN)
