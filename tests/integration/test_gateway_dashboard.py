"""The dashboard's pages and its feed: what they say, and to whom."""

from __future__ import annotations

import base64
import http
from http.cookies import SimpleCookie
from typing import Final

from websockets.exceptions import InvalidStatus

from tests.integration.daemon import shared_daemon, wait_until
from tests.integration.gateway import Gateway, GatewayTestCase, shared_gateway

WATCHER: Final = "watch-0123456789abcdef0123456789"
WRONG: Final = "wrong-0123456789abcdef0123456789"

UNAUTHORIZED: Final = 4401
UNSUPPORTED: Final = 1003

STRICT: Final = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}


def basic(token: str) -> dict[str, str]:
    """Show a token as a browser does that was asked for a password."""
    return {"Authorization": f"Basic {base64.b64encode(f'me:{token}'.encode()).decode()}"}


class PageTests(GatewayTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway("--allow=*")

    def test_files(self) -> None:
        """The page and its two files forbid everything but themselves."""
        for path, kind in (
            ("/", "text/html"),
            ("/dashboard.js", "text/javascript"),
            ("/dashboard.css", "text/css"),
        ):
            answer = self.gateway.get(path)
            self.assertEqual(answer.status, http.HTTPStatus.OK)
            self.assertEqual(answer.headers["content-type"], f"{kind}; charset=utf-8")
            policy = answer.headers["content-security-policy"]
            rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
            self.assertEqual(rules, STRICT)
            self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
            self.assertEqual(answer.headers["referrer-policy"], "no-referrer")
            self.assertEqual(answer.headers["cross-origin-opener-policy"], "same-origin")
            self.assertNotIn("set-cookie", answer.headers)
        page = self.gateway.get("/").body.decode()
        self.assertIn("dashboard.js", page)
        self.assertIn("dashboard.css", page)
        for inline in ("<style", "style=", "onclick=", "onload=", "javascript:", "http://"):
            self.assertNotIn(inline, page.replace("http://www.w3.org/", ""))

    def test_feed(self) -> None:
        """The feed says what there was, then once a second what there is."""
        feed = self.open(self.gateway, "/live")
        hello = feed.reply()
        self.assertEqual((hello["kind"], hello["interval"]), ("hello", 1.0))
        self.assertIsInstance(hello["history"], list)
        now = feed.reply()
        self.assertEqual(now["kind"], "now")
        (node,) = now["nodes"]
        self.assertEqual(node["name"], f"127.0.0.1:{self.daemon.port}")
        self.assertEqual(len(node["status"]["workers"]), 2)
        self.assertIsNone(node["error"])
        self.assertEqual(now["gateway"]["processes"], 1)
        self.assertEqual(
            self.open(self.gateway, "/live").reply()["history"][-1].keys(), now["sample"].keys()
        )
        self.gateway.call("fail", ["what the feed shows"])
        wait_until(
            lambda: any(
                "what the feed shows" in str(failure)
                for failure in feed.reply()["nodes"][0]["failures"] or ()
            ),
            what="the failure",
        )

    def test_nothing_to_say(self) -> None:
        """A dashboard that says something is closed: nothing is called from there."""
        feed = self.open(self.gateway, "/live")
        feed.request("echo", [1])
        messages, code = feed.rest()
        self.assertEqual(code, UNSUPPORTED)
        self.assertEqual({message["kind"] for message in messages} - {"hello", "now"}, set())


class TokenTests(GatewayTestCase):
    def start_asking(self, *options: str) -> Gateway:
        return self.start_gateway(
            shared_daemon(procs=2),
            "--dashboard-token=watchers",
            *options,
            secrets={"watchers": f"me:{WATCHER}\n"},
        )

    def test_token(self) -> None:
        """Without a token there is nothing to see; the right one gives a cookie for the feed."""
        gateway = self.start_asking()
        for path in ("/", "/metrics"):
            for headers in ({}, basic(""), {"Authorization": "Basic ???"}, {"Cookie": "x=y"}):
                answer = gateway.get(path, **headers)
                self.assertEqual(answer.status, http.HTTPStatus.UNAUTHORIZED, headers)
                self.assertEqual(
                    answer.headers["www-authenticate"], 'Basic realm="taskd dashboard"'
                )
                self.assertNotIn("set-cookie", answer.headers)
        self.assert_closed(gateway, {})
        for path in ("/dashboard.js", "/dashboard.css", "/healthz"):
            self.assertEqual(gateway.get(path).status, http.HTTPStatus.OK)

        answer = gateway.get("/", **basic(WATCHER))
        self.assertEqual(answer.status, http.HTTPStatus.OK)
        ((name, cookie),) = SimpleCookie(answer.headers["set-cookie"]).items()
        self.assertTrue(cookie["httponly"])
        self.assertEqual(cookie["samesite"].lower(), "strict")
        self.assertEqual(cookie["path"], "/")
        self.assertFalse(cookie["secure"])  # it would not come back: this is no TLS
        self.assertNotIn(WATCHER, answer.headers["set-cookie"])

        headers = {"Cookie": f"{name}={cookie.value}"}
        self.assertEqual(gateway.get("/", **headers).status, http.HTTPStatus.OK)
        self.assertEqual(gateway.metrics(**headers)["taskd_gateway_processes"], 1)
        feed = self.open(gateway, "/live", headers=headers)
        self.assertEqual([feed.reply()["kind"], feed.reply()["kind"]], ["hello", "now"])
        with self.assertRaises(InvalidStatus) as raised:
            gateway.open("/live", headers=headers, origin="https://evil.example")
        self.assertEqual(raised.exception.response.status_code, http.HTTPStatus.FORBIDDEN)
        bearer = {"Authorization": f"Bearer {WATCHER}"}  # as Prometheus shows it
        self.assertEqual(gateway.metrics(**bearer)["taskd_gateway_processes"], 1)

        for wrong in ({"Cookie": f"{name}={cookie.value[:-1]}"}, {"Cookie": f"{name}={WATCHER}"}):
            self.assertEqual(gateway.get("/", **wrong).status, http.HTTPStatus.UNAUTHORIZED)
            self.assert_closed(gateway, wrong)
        # It opens the page alone: who calls is asked for by others.
        self.assertEqual(gateway.call("echo", [1]).json, {"result": 1})

    def assert_closed(self, gateway: Gateway, headers: dict[str, str]) -> None:
        """The feed says why it shows nothing, and shows nothing."""
        feed = self.open(gateway, "/live", headers=headers)
        self.assertEqual(feed.rest(), ([], UNAUTHORIZED))

    def test_wrong_token(self) -> None:
        """A wrong token is counted, and the next from there is looked at late."""
        gateway = self.start_asking()
        right = {"Authorization": f"Bearer {WATCHER}"}
        self.assertEqual(gateway.get("/", **basic(WRONG)).status, http.HTTPStatus.UNAUTHORIZED)
        # The right one is taken all the same.
        metrics = gateway.metrics(**right)
        self.assertEqual(metrics['taskd_gateway_refused_total{reason="identity"}'], 1)

    def test_no_dashboard(self) -> None:
        """With --no-dashboard there is no page, and no feed; the metrics are there."""
        gateway = self.start_gateway(shared_daemon(procs=2), "--no-dashboard")
        for path in ("/", "/live", "/dashboard.js", "/dashboard.css"):
            self.assertEqual(gateway.get(path).status, http.HTTPStatus.NOT_FOUND, path)
        with self.assertRaises(InvalidStatus) as raised:
            gateway.open("/live")
        self.assertEqual(raised.exception.response.status_code, http.HTTPStatus.NOT_FOUND)
        self.assertEqual(gateway.metrics()["taskd_gateway_processes"], 1)
        self.assertEqual(gateway.get("/healthz").json, {"status": "ok"})
        self.assertEqual(self.open(gateway).ask("echo", [1]), 1)
