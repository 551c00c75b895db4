"""Who goes away before the answer, and daemons that do."""

from __future__ import annotations

import http
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.integration.daemon import Daemon, touch_if_possible, wait_until
from tests.integration.gateway import (
    Answer,
    Gateway,
    GatewayTestCase,
    RawSocket,
    WebSocket,
    shared_gateway,
)

JSON = {"Content-Type": "application/json"}


class LeavingTests(GatewayTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway("--allow=*")

    def call(self, function: str, path: str, query: str = "") -> RawSocket:
        """Call by HTTP, and wait until the task has begun, but for no answer."""
        body = json.dumps([path]).encode()
        raw = self.raw(self.gateway)
        headers = {**JSON, "Content-Length": str(len(body))}
        raw.request("POST", f"/call/{function}{query}", headers, body)
        self.wait_for_begin(path)
        return raw

    def assert_cancelled(self, path: str) -> None:
        """The task sees that it is cancelled."""
        wait_until(lambda: os.path.exists(path), what="the cancel in the task")

    def assert_goes_on(self, path: str) -> None:
        """The task runs to its end."""
        self.assertFalse(self.has_ended(path))
        Path(path).touch()
        wait_until(lambda: self.has_ended(path), what="the task's own end")

    def test_cancel_on_disconnect(self) -> None:
        """What a browser that goes wanted cancelled is cancelled in the daemon."""
        for is_orderly in (True, False):
            web = self.open(self.gateway)
            path = self.begin(self.daemon, web, "tell_of_cancel", id=1, cancel_on_disconnect=True)
            if is_orderly:
                web.close()
            else:
                web.connected.socket.shutdown(socket.SHUT_RDWR)
            self.assert_cancelled(path)

    def test_no_cancel(self) -> None:
        """Without that a task runs to its end, though nobody waits for it."""
        web = self.open(self.gateway)
        path = self.begin(self.daemon, web, "hold", id=1)
        web.close()
        self.gateway.wait_for_figure("in_flight", 0)
        self.assert_goes_on(path)

    def test_one_of_two(self) -> None:
        """Only the calls of who has gone are cancelled."""
        going, staying = self.open(self.gateway), self.open(self.gateway)
        going_path, staying_path = (
            self.begin(self.daemon, web, "tell_of_cancel", id=1, cancel_on_disconnect=True)
            for web in (going, staying)
        )
        going.close()
        self.assert_cancelled(going_path)
        self.assertEqual(staying.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(staying_path))

    def test_http_cancel_on_disconnect(self) -> None:
        """So it is with a call over HTTP."""
        path = self.path(self.daemon)
        self.call("tell_of_cancel", path, "?cancel_on_disconnect=true").close()
        self.assert_cancelled(path)

    def test_http_no_cancel(self) -> None:
        """And without the wish."""
        for query in ("", "?cancel_on_disconnect=false"):
            path = self.path(self.daemon)
            raw = self.call("hold", path, query)
            raw.socket.shutdown(socket.SHUT_RDWR)
            wait_until(
                lambda raw=raw: self.gateway.process_of(raw.socket) is None, what="a noticed end"
            )
            self.assert_goes_on(path)

    def test_nothing_is_left(self) -> None:
        """30 browsers that go without a word, each with a call in flight, leave nothing behind."""
        before = self.gateway.metrics()["taskd_gateway_websockets"]
        path = self.path(self.daemon)
        for _ in range(30):
            raw = self.raw_socket(self.gateway)
            raw.ask("hold_on_reactor", [path], id=1)
            raw.close()
        self.gateway.wait_for_figure("websockets", before)
        self.gateway.wait_for_figure("in_flight", 0)
        Path(path).touch()
        self.assertEqual(self.open(self.gateway).ask("add", [1, 2]), 3)
        self.assertNotIn("Traceback", self.gateway.log)
        self.assertNotIn("Unhandled", self.gateway.log)


class DaemonAwayTests(GatewayTestCase):
    def assert_lost(self, reply: Any, daemon: Daemon, *, may_have_started: bool) -> None:
        """It is ``worker-lost``, and does not tell where the daemon is."""
        error = self.assert_error(reply, "worker-lost")
        self.assertTrue(error["retryable"])
        self.assertEqual(error.get("may_have_started", True), may_have_started)
        for word in ("127.0.0.1", "localhost", str(daemon.port), "refused"):
            self.assertNotIn(word, error["message"])

    def end(self, daemon: Daemon) -> None:
        """Stop a daemon, whose directory stays."""
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()

    def kill_all(self, daemon: Daemon) -> None:
        """Kill all of a daemon's processes, the supervisor first."""
        daemon.kill(daemon.pid)
        for process in daemon.processes():
            daemon.kill(process.pid)
        daemon.wait_until_gone()

    def up(self, gateway: Gateway, *daemons: Daemon) -> list[float]:
        """Tell what /metrics says of some daemons."""
        metrics = gateway.metrics()
        return [metrics[f'taskd_up{{node="127.0.0.1:{daemon.port}"}}'] for daemon in daemons]

    def node(self, feed: WebSocket) -> dict[str, Any]:
        """Wait for what the dashboard is shown next of the one daemon."""
        while (news := feed.reply())["kind"] != "now":
            pass
        (node,) = news["nodes"]
        return dict(node)

    def test_away_and_back(self) -> None:
        """Without its daemon a gateway says so, in every way; when it comes back, all is well."""
        first = self.start()
        gateway = self.start_gateway(first, "--allow=*")
        web = self.open(gateway)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assertEqual(self.up(gateway, first), [1])
        feed = self.open(gateway, "/live")
        self.assertIsNone(self.node(feed)["error"])
        self.end(first)
        with ThreadPoolExecutor(4) as pool:  # each waits for a connection for a while
            called = pool.submit(gateway.call, "add", [1, 2])
            health = pool.submit(gateway.get, "/healthz")
            up = pool.submit(self.up, gateway, first)
            self.call_and_leave(gateway)
            self.assert_lost(web.ask("add", [1, 2]), first, may_have_started=False)
            answer: Answer = called.result()
            self.assertEqual(answer.status, http.HTTPStatus.BAD_GATEWAY)
            self.assert_lost(answer.json, first, may_have_started=False)
            self.assertEqual(health.result().status, http.HTTPStatus.SERVICE_UNAVAILABLE)
            self.assertEqual(health.result().json, {"status": "unreachable"})
            self.assertEqual(up.result(), [0])
        wait_until(
            lambda: "cannot be reached" in (self.node(feed)["error"] or ""),
            what="the loss in the feed",
        )
        self.wait_for_log(gateway, "a call came to no daemon")
        self.start(port=first.port)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        wait_until(lambda: gateway.get("/healthz").json == {"status": "ok"}, what="health")
        wait_until(lambda: self.up(gateway, first) == [1], what="it in the metrics")
        wait_until(lambda: self.node(feed)["status"], what="the status in the feed")
        gateway.wait_for_figure("in_flight", 0)
        for word in ("Traceback", "Unhandled"):
            self.assertNotIn(word, gateway.log)

    def call_and_leave(self, gateway: Gateway) -> None:
        """Call by HTTP, and go before the answer."""
        raw = self.raw(gateway)
        raw.request("POST", "/call/echo", {**JSON, "Content-Length": "3"}, b"[1]")
        raw.socket.shutdown(socket.SHUT_RDWR)

    def test_lost_in_flight(self) -> None:
        """A call that was in flight when its daemon died may have run in part."""
        daemon = self.start()
        gateway = self.start_gateway(daemon, "--allow=*")
        web = self.open(gateway)
        path = self.begin(daemon, web, "hold", id=1)
        self.kill_all(daemon)
        reply = web.reply()
        self.assertEqual(reply["id"], 1)
        self.assert_lost(reply, daemon, may_have_started=True)
        touch_if_possible(Path(path))

    def test_a_worker_that_dies(self) -> None:
        """So is the call whose worker died; the next one is run by another."""
        daemon, gateway = shared_gateway("--allow=*")
        self.addCleanup(daemon.wait_until_settled)
        web = self.open(gateway)
        self.assert_lost(web.ask("die", [1]), daemon, may_have_started=True)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        answer = gateway.call("die", [1])
        self.assertEqual(answer.status, http.HTTPStatus.BAD_GATEWAY)
        self.assert_lost(answer.json, daemon, may_have_started=True)

    def test_several(self) -> None:
        """Calls go to all daemons; when one goes, to those that are left."""
        daemons = [self.start(), self.start()]
        gateway = self.start_gateway(list(daemons), "--allow=*")
        web = self.open(gateway)
        wait_until(
            lambda: (
                {web.ask("pid_of_async") for _ in range(4)} & set(daemons[0].workers().values())
                and {web.ask("pid_of_async") for _ in range(4)} & set(daemons[1].workers().values())
            ),
            what="calls at both daemons",
        )
        self.assertEqual(self.up(gateway, *daemons), [1, 1])
        self.end(daemons[0])
        for _ in range(20):
            self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assertEqual(gateway.get("/healthz").json, {"status": "ok"})
