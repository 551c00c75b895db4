"""The pages: health, metrics and the dashboard, and who may see them."""

from __future__ import annotations

import gc
from base64 import b64encode
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectError
from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.pages import MetricsPage
from taskd.gateway.watch import Node, Watch
from tests.support import ScriptedEndpoint
from tests.test_gateway_site import EVIL, OWN, WATCHING, Answer, Caller, World

REALM = 'Basic realm="taskd dashboard"'


def basic(token: str) -> str:
    return "Basic " + b64encode(f"me:{token}".encode()).decode()


class PagesTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.meet()

    def meet(self, **keywords: Any) -> World:
        self.world = World(**keywords)
        return self.world

    def assertNoErrors(self) -> None:
        """No Deferred has failed and found nobody who cared."""
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def get(self, path: str, **headers: str) -> Answer:
        return self.world.get(path, **headers)


class HealthTests(PagesTestCase):
    def test_a_daemon_that_serves(self) -> None:
        """It is well if a daemon says that it serves."""
        found = self.get("/healthz")
        self.assertEqual((found.status, found.json), (200, {"status": "ok"}))
        self.assertEqual(self.world.backend.tenant().visitors, 1)

    def test_a_daemon_that_stops(self) -> None:
        """It is not well if the daemon is about to stop."""
        self.world.told["taskd.ping"] = "draining"
        found = self.get("/healthz")
        self.assertEqual((found.status, found.json), (503, {"status": "draining"}))

    def test_no_daemon(self) -> None:
        """It is not well without a daemon, which is told within two seconds."""
        self.world.endpoint = ScriptedEndpoint()
        caller = self.world.caller()
        caller.ask("GET", "/healthz")
        self.world.settle(1.9)
        self.assertEqual(caller.answers, [])
        self.world.settle(0.2)
        self.assertEqual(caller.answer.status, 503)
        self.assertEqual(caller.answer.json, {"status": "unreachable"})

    def test_a_refused_connection(self) -> None:
        """The answer does not tell where the daemon is."""
        self.world.endpoint = ScriptedEndpoint()
        caller = self.world.caller()
        caller.ask("GET", "/healthz")
        self.world.endpoint.refuse(ConnectError(string="10.0.0.7"))
        self.world.settle(5)
        self.assertEqual(caller.answer.json, {"status": "unreachable"})

    def test_a_stop(self) -> None:
        """From the stop on it is not well, and no daemon is asked."""
        self.world.health.close()
        found = self.get("/healthz")
        self.assertEqual((found.status, found.json), (503, {"status": "stopping"}))

    def test_who_has_gone(self) -> None:
        """Who goes before the answer gets none, and nothing stays of it."""
        self.world.endpoint = ScriptedEndpoint()
        caller = self.world.caller()
        caller.ask("GET", "/healthz")
        caller.go()
        self.world.settle(5)
        self.assertEqual(caller.transport.value(), b"")
        self.assertEqual(self.world.backend.tenant().visitors, 1)
        self.assertNoErrors()

    def test_head(self) -> None:
        """A check that asks for the head alone gets it."""
        caller = self.world.caller()
        caller.ask("HEAD", "/healthz")
        self.assertEqual((caller.answer.status, caller.answer.body), (200, b""))

    def test_no_token_is_needed(self) -> None:
        """A balancer shows no token."""
        self.meet(watchers={"ops": WATCHING}, tokens={"web": WATCHING})
        self.assertEqual(self.get("/healthz").status, 200)


class MetricsTests(PagesTestCase):
    def test_metrics(self) -> None:
        """Prometheus is told of the daemons and of the gateway, as text of its kind."""
        self.world.figures.add("opened", 7)
        self.world.told["taskd.status"] = {"queue": {"waiting": 3}}
        found = self.get("/metrics")
        self.assertEqual(found.status, 200)
        self.assertTrue(found.headers["content-type"].startswith("text/plain; version="))
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(found.body.decode())
            for sample in family.samples
        }
        self.assertEqual(samples["taskd_up"], 1)
        self.assertEqual(samples["taskd_queue_waiting"], 3)
        self.assertEqual(samples["taskd_gateway_opened_total"], 7)

    def test_openmetrics(self) -> None:
        """Who prefers OpenMetrics gets it."""
        found = self.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
        self.assertIn("application/openmetrics-text", found.headers["content-type"])
        self.assertTrue(found.body.endswith(b"# EOF\n"))

    def test_no_daemon(self) -> None:
        """Without a daemon there are metrics still, which say so."""
        self.world.endpoint = ScriptedEndpoint()
        self.world.watch = Watch(
            self.world.loop,
            [Node("daemon", self.world.connect(None))],
            self.world.figures,
            self.world.loop.seconds,
            self.world.loop.seconds,
        )
        page = MetricsPage(self.world.gate, self.world.watch, self.world.figures)
        self.world.root.putChild(b"metrics", page)
        caller = self.world.caller()
        caller.ask("GET", "/metrics")
        self.world.settle(7)
        self.assertIn(b'taskd_up{node="daemon"} 0.0', caller.answer.body)

    def test_who_has_gone(self) -> None:
        """Who goes before the answer gets none."""
        caller = self.world.caller()
        caller.transport.protocol.dataReceived(b"GET /metrics HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        caller.go()
        self.world.settle(10)
        self.assertEqual(caller.transport.value(), b"")
        self.assertNoErrors()


class DashboardTests(PagesTestCase):
    def test_the_page(self) -> None:
        """The page and what belongs to it come from here, with a policy that bars all else."""
        for path, kind in (
            ("/", "text/html; charset=utf-8"),
            ("/dashboard.css", "text/css; charset=utf-8"),
            ("/dashboard.js", "text/javascript; charset=utf-8"),
        ):
            found = self.get(path)
            self.assertEqual(found.status, 200)
            self.assertGreater(len(found.body), 100)
            policy = found.headers["content-security-policy"]
            for rule in (
                *("default-src 'none'", "script-src 'self'", "connect-src 'self'"),
                *("frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"),
            ):
                self.assertIn(rule, policy)
            if kind.startswith("text/html"):
                self.assertIn("text/html", found.headers["content-type"])
            else:
                self.assertEqual(found.headers["content-type"], kind)

    def test_what_it_loads(self) -> None:
        """The page loads nothing from elsewhere, and has no script of its own."""
        text = self.get("/").body.decode().lower()
        for word in ("<script>", "onclick", "onload=", "javascript:", 'src="http', 'href="http'):
            self.assertNotIn(word, text)

    def test_head(self) -> None:
        """Who asks for the head gets no body."""
        caller = self.world.caller()
        caller.ask("HEAD", "/")
        self.assertEqual((caller.answer.status, caller.answer.body), (200, b""))

    def test_methods(self) -> None:
        """Nothing can be posted there."""
        for path in ("/", "/dashboard.js", "/metrics", "/healthz"):
            caller = self.world.caller()
            caller.ask("POST", path, b"[]")
            self.assertEqual(caller.answer.status, 405)


class GateTests(PagesTestCase):
    def setUp(self) -> None:
        self.meet(watchers={"ops": WATCHING, "web": "another watcher's 01"})

    def ask(self, path: str = "/", address: Any = None, **headers: str) -> Caller:
        caller = Caller(self.world, address) if address else self.world.caller()
        caller.ask("GET", path, **headers)
        return caller

    def waits(self, token: str, address: Any = None) -> float:
        """Tell how long the answer to a token takes."""
        caller = self.ask(authorization=basic(token), address=address)
        began = self.world.loop.seconds()
        while not caller.answers:
            self.assertLess(self.world.loop.seconds() - began, 10)
            self.world.settle(0.25)
        self.assertEqual(caller.answer.status, 200 if token == WATCHING else 401)
        return self.world.loop.seconds() - began

    def test_no_token(self) -> None:
        """Who shows no token is asked for one, by the browser, without a wait."""
        for path in ("/", "/metrics"):
            for headers in ({}, {"authorization": "Digest x"}, {"cookie": "taskd_dashboard=0"}):
                found = self.get(path, **headers)
                self.assertEqual(found.gist, (401, "unauthorized"))
                self.assertEqual(found.headers["www-authenticate"], REALM)
                self.assertNotIn("set-cookie", found.headers)
                self.assertNotIn(b"<html", found.body)
        self.assertEqual(self.world.figures.get("refused_identity"), 0)

    def test_files(self) -> None:
        """The page's files are no secret."""
        for path in ("/dashboard.css", "/dashboard.js"):
            self.assertEqual(self.get(path).status, 200)

    def test_the_right_token(self) -> None:
        """Who shows a token, as Basic or Bearer, sees the page and the metrics."""
        for path in ("/", "/metrics"):
            for text in (basic(WATCHING), f"Bearer {WATCHING}", f"bearer {WATCHING}"):
                found = self.get(path, authorization=text)
                self.assertEqual(found.status, 200)

    def cookie(self) -> str:
        return self.get("/", authorization=basic(WATCHING)).headers["set-cookie"]

    def test_the_cookie(self) -> None:
        """A browser gets a cookie that is not its token, and that no script and no page sees."""
        value, *attributes = self.cookie().split("; ")
        self.assertRegex(value, "^taskd_dashboard=[0-9a-f]{64}$")
        self.assertNotIn(WATCHING, value)
        told = {attribute.lower() for attribute in attributes}
        self.assertEqual(told, {"path=/", "httponly", "samesite=strict"})
        for path in ("/", "/metrics"):
            self.assertEqual(self.get(path, cookie=value).status, 200)
            self.assertEqual(self.get(path, cookie=f"a=b; {value}; c=d").status, 200)
            self.assertEqual(self.get(path, cookie=value[:-1]).status, 401)

    def test_a_callers_token(self) -> None:
        """A token with which one may call opens no page, and the other way round."""
        self.meet(watchers={"ops": WATCHING}, tokens={"web": "a caller's token 012"})
        caller = self.ask(authorization="Bearer a caller's token 012")
        self.world.settle(5)
        self.assertEqual(caller.answer.status, 401)
        other = self.world.caller()
        other.call("now", authorization=f"Bearer {WATCHING}")
        self.world.settle(5)
        self.assertEqual(other.answer.status, 401)

    def test_wrong_tokens(self) -> None:
        """Each wrong token is looked at, and answered, later; the right one from there, too."""
        waits = [self.waits("wrong") for _ in range(6)]
        self.assertEqual(waits, [0.5, 1.5, 3, 6, 8, 8])
        self.assertEqual(self.world.figures.get("refused_identity"), 6)
        self.assertEqual(self.waits(WATCHING), 4)

    def test_from_elsewhere(self) -> None:
        """Nobody waits for what others have guessed."""
        self.waits("wrong")
        self.assertEqual(self.waits(WATCHING, IPv4Address("TCP", "192.0.2.99", 1)), 0)
        self.assertEqual(self.waits(WATCHING, IPv4Address("TCP", "192.0.2.1", 9)), 0.5)

    def test_forgiven(self) -> None:
        """A minute later it is forgotten."""
        self.waits("wrong")
        self.world.settle(61)
        self.assertEqual(self.waits(WATCHING), 0)

    def test_who_has_a_cookie(self) -> None:
        """Who has a cookie does not wait for what others have guessed at its address."""
        value = self.cookie().partition(";")[0]
        for _ in range(3):
            self.waits("wrong")
        self.assertEqual(self.get("/", cookie=value).status, 200)

    def test_who_has_gone(self) -> None:
        """Who goes before the look is counted all the same, and nothing breaks."""
        self.waits("wrong")
        for token in ("wrong", WATCHING):
            caller = self.ask(authorization=basic(token))
            caller.go()
            self.world.settle(5)
            self.assertEqual(caller.transport.value(), b"")
        self.assertEqual(self.world.figures.get("refused_identity"), 2)
        self.assertNoErrors()

    def test_foreign_pages(self) -> None:
        """A page of another name never comes so far."""
        found = self.get("/", host="evil.example", authorization=basic(WATCHING))
        self.assertEqual(found.status, 403)
        handshake = {"upgrade": "websocket", "connection": "Upgrade"}
        value = self.cookie().partition(";")[0]
        caller = self.ask("/live", origin=EVIL, cookie=value, **handshake)
        self.assertEqual(caller.answer.status, 403)
        self.assertNotEqual(OWN, EVIL)
