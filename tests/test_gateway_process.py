"""One process of a gateway, put together as it is, with daemons in memory."""

from __future__ import annotations

from typing import Any

from twisted.internet.address import IPv4Address
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import Access, digest_of
from taskd.functions import Function, Kind
from taskd.gateway.process import Gateway
from taskd.gateway.secrets import Secrets
from taskd.gateway.settings import GatewaySettings
from tests.support import ANYBODY, Loop, MemoryDaemon
from tests.test_gateway_site import OWN, TOKEN, WATCHING, Answer, Caller, Tasks, new_figures
from tests.test_gateway_sockets import RESTART, Page

PATH = "/run/taskd.sock"
STATUS = {"queue": {"waiting": 2}, "functions": []}


class Machine(Loop):
    """
    A reactor whose Unix socket leads to a daemon in memory.

    Attributes:
        daemon: The daemon.
        running: Whether the process goes on.
    """

    daemon: MemoryDaemon
    running = True

    def connectUNIX(self, path: str, factory: Any, timeout: float, checkPID: int) -> None:
        assert path == PATH
        factory.doStart()
        self.daemon.join(factory.buildProtocol(IPv4Address("TCP", "192.0.2.2", 1)))

    def stop(self) -> None:
        self.running = False


class Process:
    """
    A gateway's process, without its port.

    Args:
        secrets: Its tokens.
        daemon_access: Whom the daemon lets in.
        settings: What else the operator has decided.
    """

    def __init__(
        self,
        secrets: Secrets | None = None,
        *,
        daemon_access: Access = ANYBODY,
        **settings: Any,
    ) -> None:
        self.tasks = Tasks()
        self.loop = Machine()
        self.daemon = self.loop.daemon = MemoryDaemon(*self.tasks.functions(), access=daemon_access)
        for name, told in (("ping", "pong"), ("status", STATUS), ("failures", [])):
            self.daemon.registry.add(
                Function(f"taskd.{name}", lambda limit=0, told=told: told, Kind.REACTOR)
            )
        self.figures = new_figures()
        self.gateway = Gateway(
            self.loop,
            GatewaySettings(
                **{
                    "tasks": (f"unix:{PATH}",),
                    "allow": (("*", ("*",)),),
                    "grace_seconds": 5.0,
                    **settings,
                }
            ),
            secrets or Secrets(),
            self.figures,
        )
        self.site = self.gateway.site

    def settle(self, seconds: float = 0.0) -> None:
        for _ in range(4):
            self.loop.run_waiting()
            self.loop.advance(0)
            self.daemon.loop.run_waiting()
            self.daemon.loop.advance(0)
            self.daemon.flush()
        if seconds:
            self.loop.advance(seconds)
            self.settle()

    def finish(self, label: str, result: Any = "done") -> None:
        self.tasks.held.pop(label).callback(result)
        self.settle()

    def caller(self) -> Caller:
        return Caller(self)  # type: ignore[arg-type]

    def page(self, path: str = "/ws", **headers: str) -> Page:
        return Page(self, path, **headers)  # type: ignore[arg-type]

    def get(self, path: str, **headers: str) -> Answer:
        caller = self.caller()
        caller.ask("GET", path, **headers)
        return caller.answer


class PartsTests(SynchronousTestCase):
    def test_all_of_it(self) -> None:
        """Calls, WebSockets, health, metrics and the page are there."""
        process = Process()
        caller = process.caller()
        caller.call("now", b"[1]")
        self.assertEqual(caller.answer.json, {"result": [1]})
        page = process.page()
        page.call_task("now", 2, id=1)
        self.assertEqual(page.messages, [{"id": 1, "result": [2]}])
        self.assertEqual(process.get("/healthz").json, {"status": "ok"})
        self.assertIn(
            b'taskd_queue_waiting{node="/run/taskd.sock"} 2.0', process.get("/metrics").body
        )
        self.assertEqual(process.get("/").status, 200)
        self.assertEqual(process.page("/live").messages[0]["kind"], "hello")

    def test_no_dashboard(self) -> None:
        """Where there is to be no page there is none, and metrics still are."""
        process = Process(dashboard=False)
        for path in ("/", "/live", "/dashboard.js", "/dashboard.css"):
            self.assertEqual(process.get(path).status, 404)
        self.assertEqual(process.get("/metrics").status, 200)

    def test_what_is_allowed(self) -> None:
        """Of the functions those that are allowed may be called."""
        process = Process(allow=(("*", ("echo",)),))
        caller = process.caller()
        caller.call("now")
        self.assertEqual(caller.answer.status, 403)
        page = process.page()
        page.call_task("now", id=1)
        self.assertEqual(page.gist, [(1, "unauthorized")])

    def test_tokens(self) -> None:
        """Callers' tokens open calls, and watchers' the page."""
        process = Process(
            Secrets(tokens=(("web", digest_of(TOKEN)),), watchers=(("ops", digest_of(WATCHING)),)),
            token_file="x",
            dashboard_token_file="x",
            cookie="session",
        )
        for headers, status in (
            ({}, 401),
            ({"authorization": f"Bearer {TOKEN}"}, 200),
            ({"cookie": f"session={TOKEN}", "origin": OWN}, 200),
        ):
            caller = process.caller()
            caller.call("now", **headers)
            self.assertEqual(caller.answer.status, status)
        for path in ("/", "/metrics"):
            self.assertEqual(process.get(path).status, 401)
            found = process.get(path, authorization=f"Bearer {WATCHING}")
            self.assertEqual(found.status, 200)

    def test_origins(self) -> None:
        """Pages of named origins may call, and programs if that is meant."""
        process = Process(origins=("https://app.example",), needs_origin=False)
        for origin in ("https://app.example", ""):
            page = process.page(origin=origin)
            page.call_task("now", id=1)
            self.assertEqual(page.gist, [(1, [])])
        self.assertEqual(process.get("/", host="app.example").status, 200)

    def test_limits(self) -> None:
        """The operator's limits hold."""
        process = Process(max_in_flight=1, max_message_bytes=1024, max_connections=1)
        page = process.page()
        for label in "ab":
            page.call_task("later", label, id=label)
        self.assertEqual(page.gist, [("b", "overloaded")])
        caller = process.caller()
        caller.ask("POST", "/call/now", b"", content_length="1025")
        self.assertEqual(caller.answer.status, 413)
        caller = process.caller()
        caller.ask("GET", "/ws", upgrade="websocket", connection="upgrade", origin=OWN)
        self.assertEqual(caller.answer.status, 503)

    def test_what_the_daemon_is_shown(self) -> None:
        """Who shows a token calls by it, and who shows none by the gateway's own."""
        own = "the gateway's own 0123"
        process = Process(
            Secrets(own_token=own),
            tasks_token_file="x",
            daemon_access=Access([("gateway", digest_of(own))], ()),
        )
        caller = process.caller()
        caller.call("now")
        self.assertEqual(caller.answer.status, 200)
        self.assertEqual(process.daemon.slot.callers, {"gateway": 1})
        for keeps, shown in ((False, {"web": 1}), (True, {"gateway": 1})):
            process = Process(
                Secrets(own_token=own, tokens=(("web", digest_of(TOKEN)),)),
                tasks_token_file="x",
                token_file="x",
                keep_tokens=keeps,
                daemon_access=Access([("web", digest_of(TOKEN)), ("gateway", digest_of(own))], ()),
            )
            caller = process.caller()
            caller.call("now", authorization=f"Bearer {TOKEN}")
            self.assertEqual(caller.answer.status, 200)
            self.assertEqual(process.daemon.slot.callers, shown)


class DrainTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.process = Process()

    def test_nothing_in_flight(self) -> None:
        """With nothing in flight it goes at once."""
        self.process.gateway.drain()
        self.process.settle()
        self.assertFalse(self.process.loop.running)

    def test_what_is_open(self) -> None:
        """Idle WebSockets are closed, and it goes when they have gone."""
        page, feed = self.process.page(), self.process.page("/live")
        self.process.gateway.drain()
        self.process.settle()
        self.assertEqual((page.code, feed.code), (RESTART, 1001))
        self.assertTrue(self.process.loop.running)
        page.go()
        self.assertFalse(self.process.loop.running)

    def test_calls_in_flight(self) -> None:
        """It goes when all that was in flight was answered, and nothing new is begun."""
        page, caller = self.process.page(), self.process.caller()
        page.call_task("later", "a", id=1)
        caller.call("later", b'["b"]')
        self.process.gateway.drain()
        page.call_task("now", id=2)
        self.assertEqual(page.gist, [(2, "shutting-down")])
        refused = self.process.caller()
        refused.call("now")
        self.assertEqual(refused.answer.status, 503)
        self.assertEqual(self.process.get("/healthz").json, {"status": "stopping"})
        self.process.finish("a")
        self.assertEqual((page.gist[-1], page.code), ((1, "done"), RESTART))
        page.go()
        self.assertTrue(self.process.loop.running)
        self.process.finish("b")
        self.assertEqual(caller.answer.json, {"result": "done"})
        self.assertFalse(self.process.loop.running)

    def test_an_answer_on_its_way(self) -> None:
        """It does not go before an answer over HTTP is out, or its reader has gone."""
        caller = self.process.caller()
        caller.call("later", b'["a"]')
        self.process.gateway.drain()
        caller.transport.unsent_bytes = 10
        self.process.finish("a")
        self.assertTrue(self.process.loop.running)
        self.assertTrue(caller.transport.disconnecting)
        caller.go()
        self.assertFalse(self.process.loop.running)

    def test_the_end_of_the_grace(self) -> None:
        """When the grace is over it goes, whatever is in flight."""
        page = self.process.page()
        page.call_task("later", "a", id=1)
        self.process.gateway.drain()
        self.process.gateway.drain()
        self.process.settle(4.9)
        self.assertIsNone(page.code)
        self.process.settle(0.2)
        self.assertEqual(page.code, RESTART)
        self.assertTrue(self.process.loop.running)
        self.process.settle(2.1)
        self.assertFalse(self.process.loop.running)
