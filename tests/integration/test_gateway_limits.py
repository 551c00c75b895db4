"""Browsers that want too much, or are too slow."""

from __future__ import annotations

import http
import json
from pathlib import Path
from typing import Any, Final

from websockets.exceptions import InvalidStatus

from tests.integration.daemon import shared_daemon, wait_until
from tests.integration.gateway import (
    TEXT,
    Gateway,
    GatewayTestCase,
    RawSocket,
    frame,
    shared_gateway,
)
from tests.integration.test_gateway_protocol import resident_mib

JSON: Final = {"Content-Type": "application/json"}
POLICY: Final = 1008
MEBIBYTE: Final = 2**20

HURRY: Final = """
import taskd.gateway.site
taskd.gateway.site._REQUEST_SECONDS = 0.5
"""
"""As ``sitecustomize``: each process of the gateway gives a request half a second, not 30."""


class HasteTests(GatewayTestCase):
    def test_rate(self) -> None:
        """Who sends more than --max-rate is told for how long to stay away, then closed."""
        gateway = self.start_gateway(shared_daemon(procs=2), "--max-rate=0.1")
        web, other = self.open(gateway), self.open(gateway)
        for number in range(5):
            web.request("echo", [number], id=number)
        messages, code = web.rest()
        self.assertEqual(code, POLICY)
        replies = {reply["id"]: reply for reply in messages}
        self.assertEqual((len(messages), sorted(replies)), (3, [0, 1, 2]))
        self.assertEqual(replies[0], {"id": 0, "result": 0})
        for number in (1, 2):
            error = self.assert_error(replies[number], "overloaded", "too many messages")
            self.assertGreater(error["retry_after"], 0)
            self.assertTrue(error["retryable"])
        self.assertEqual(other.ask("echo", [1]), 1)
        gateway.wait_for_figure('refused_total{reason="rate"}', 2)

    def test_keep_alives_count(self) -> None:
        """Empty messages are messages as well."""
        gateway = self.start_gateway(shared_daemon(procs=2), "--max-rate=0.1")
        web = self.open(gateway)
        for _ in range(5):
            web.send("")
        _, code = web.rest()
        self.assertEqual(code, POLICY)


class RoomTests(GatewayTestCase):
    def test_in_flight(self) -> None:
        """Beyond --max-in-flight a call is ``overloaded``; once others are done there is room."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", "--max-in-flight=2")
        web, other, path = self.open(gateway), self.open(gateway), self.path(daemon)
        for number in (1, 2):
            web.request("hold_on_reactor", [path], id=number)
        reply = web.ask("echo", [1], id=3)
        self.assertEqual(reply["id"], 3)
        error = self.assert_error(reply, "overloaded", "2 calls are in flight")
        self.assertGreater(error["retry_after"], 0)
        self.assertEqual(other.ask("echo", [1]), 1)
        self.assertIs(web.ask("taskd.cancel", ["none"]), False)
        Path(path).touch()
        self.assertEqual({web.reply()["id"], web.reply()["id"]}, {1, 2})
        self.assertEqual(web.ask("echo", [1]), 1)
        # Answers that wait for their turn take room as well.
        path = self.begin(daemon, web, "hold")
        web.request("echo", [1])
        web.request("echo", [2])
        Path(path).touch()
        self.assertEqual([web.reply(), web.reply()], ["released", 1])
        self.assert_error(web.reply(), "overloaded")

    def test_connections(self) -> None:
        """Beyond --max-connections a WebSocket gets 503; so does a call beyond one's share."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", "--max-connections=2", "--max-calls=4")
        first, _ = self.open(gateway), self.open(gateway, "/live")
        for path in ("/ws", "/live"):
            with self.assertRaises(InvalidStatus) as raised:
                gateway.open(path)
            response = raised.exception.response
            self.assertEqual(response.status_code, http.HTTPStatus.SERVICE_UNAVAILABLE)
            assert response.body is not None
            self.assert_error(json.loads(response.body), "overloaded")
        self.assertEqual(first.ask("echo", [1]), 1)
        first.close()
        wait_until(lambda: self.is_let_in(gateway), what="room")
        held = self.path(daemon)
        callers = [self.call(gateway, "hold_on_reactor", [held]) for _ in range(2)]
        gateway.wait_for_figure("in_flight", 2)
        answer = gateway.call("echo", [1])
        self.assertEqual(answer.status, http.HTTPStatus.SERVICE_UNAVAILABLE)
        self.assertEqual(answer.headers["retry-after"], "1")
        self.assertGreater(self.assert_error(answer.json, "overloaded")["retry_after"], 0)
        Path(held).touch()
        for raw in callers:
            self.assertEqual(raw.answer().json, {"result": "released"})
        self.assertEqual(gateway.call("echo", [1]).status, http.HTTPStatus.OK)
        self.assertGreaterEqual(gateway.metrics()['taskd_gateway_refused_total{reason="room"}'], 3)

    def is_let_in(self, gateway: Gateway) -> bool:
        try:
            gateway.open().close()
        except InvalidStatus:
            return False
        return True

    def call(self, gateway: Gateway, function: str, args: Any) -> RawSocket:
        """Call by HTTP, and wait for no answer."""
        raw, body = self.raw(gateway), json.dumps(args).encode()
        raw.request("POST", f"/call/{function}", {**JSON, "Content-Length": str(len(body))}, body)
        return raw


class BodyTests(GatewayTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway("--allow=*", "--max-message=2048")

    def assert_too_long(self, raw: RawSocket) -> None:
        """It is answered with 413, and hung up on."""
        answer = raw.answer()
        self.assertEqual(answer.status, http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        self.assert_error(answer.json, "line-too-long", "2048")
        self.assertTrue(raw.is_hung_up())

    def test_longest(self) -> None:
        """A body may have --max-message bytes, with its length announced or in chunks."""
        text = "x" * (2048 - len(json.dumps([""])))
        self.assertEqual(self.gateway.call("echo", [text]).json, {"result": text})
        raw = self.raw(self.gateway)
        raw.request("POST", "/call/echo", {**JSON, "Transfer-Encoding": "chunked"})
        body = json.dumps([text])
        for at in range(0, len(body), 100):
            piece = body[at : at + 100]
            raw.send(f"{len(piece):x}\r\n{piece}\r\n")
        raw.send("0\r\n\r\n")
        self.assertEqual(raw.answer().json, {"result": text})

    def test_announced(self) -> None:
        """A longer one is refused before it comes."""
        for length in (2049, 2**40):
            raw = self.raw(self.gateway)
            raw.request("POST", "/call/echo", {**JSON, "Content-Length": str(length)})
            self.assert_too_long(raw)

    def test_chunked(self) -> None:
        """So is one in chunks as soon as it is too long, and what stands behind it is not read."""
        path = self.path(self.daemon)
        raw = self.raw(self.gateway)
        raw.request("POST", "/call/echo", {**JSON, "Transfer-Encoding": "chunked"})
        raw.send("400\r\n" + "x" * 1024 + "\r\n")
        body = json.dumps([path])
        raw.send(
            "401\r\n" + "x" * 1025 + "\r\n0\r\n\r\nPOST /call/touch HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        self.assert_too_long(raw)
        self.assertEqual(self.gateway.call("add", [1, 2]).json, {"result": 3})
        self.assertFalse(Path(path).exists())

    def test_without_an_end(self) -> None:
        """Headers, chunks and chunk sizes without an end are cut off."""
        call = "POST /call/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
        for head, rest in (
            ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", "X: " + "x" * 1000 + "\r\n"),
            ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", "x" * 1000),
            ("GET /", "x" * 1000),
            (f"{call}{next(iter(JSON))}: application/json\r\n\r\n", "1\r\nx\r\n" * 100),
            (f"{call}\r\n", "0" * 1000),
            (f"{call}\r\n", "1;" + "x" * 1000),
        ):
            raw = self.raw(self.gateway)
            raw.send(head)
            raw.socket.settimeout(0.05)
            self.assertTrue(self.is_cut_off(raw, rest.encode()), head)

    def is_cut_off(self, raw: RawSocket, rest: bytes) -> bool:
        """Send without an end, until it cannot be sent."""
        sent = 0
        while sent < 64 * MEBIBYTE:
            try:
                sent += raw.socket.send(rest * 64)
            except OSError:
                return True
        return False


class SlowTests(GatewayTestCase):
    def test_slow_requests(self) -> None:
        """Whoever is slow with a request, or idles behind one, does not keep the connection."""
        daemon = shared_daemon(procs=2)
        library = self.directory(daemon)
        (library / "sitecustomize.py").write_text(HURRY, encoding="utf-8")
        gateway = self.start_gateway(daemon, "--allow=*", environ={"PYTHONPATH": str(library)})
        post = "POST /call/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        beginnings = {
            "nothing": ("", ""),
            "headers": ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", "x"),
            "lines": ("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", "X: x\r\n"),
            "body": (f"{post}Content-Length: 100000\r\n\r\n[", " "),
            "chunks": (f"{post}Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"),
            "idle": ("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", ""),
            "an upgrade": ("GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n", "\r"),
        }
        raws = {what: self.raw(gateway) for what in beginnings}
        for what, (beginning, _) in beginnings.items():
            raws[what].send(beginning)
        # Its task takes longer than a request may.
        path = self.path(daemon)
        body = json.dumps([path]).encode()
        waits = self.raw(gateway)
        headers = {**JSON, "Content-Length": str(len(body))}
        waits.request("POST", "/call/hold_on_reactor", headers, body)
        web = self.open(gateway)
        for what, raw in raws.items():
            more = beginnings[what][1]
            wait_until(
                lambda raw=raw, more=more: self.has_gone(gateway, raw, more), what=f"an end: {what}"
            )
        Path(path).touch()
        self.assertEqual(waits.answer().json, {"result": "released"})
        self.assertEqual(web.ask("echo", [1]), 1)

    def has_gone(self, gateway: Gateway, raw: RawSocket, more: str) -> bool:
        """Send a little more, and tell whether that is in vain."""
        try:
            raw.send(more)
        except ConnectionError:
            return True
        return gateway.process_of(raw.socket) is None


class UnreadTests(GatewayTestCase):
    def test_large_results(self) -> None:
        """Who reads nothing of what it asks for costs a bounded amount of memory, then its end."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*")
        (pid,) = gateway.serving().values()
        before = resident_mib(pid)
        raw = self.raw_socket(gateway, receive_bytes=4096)
        # All at once: when the first reply is not read, nothing more is read from here.
        asked = [
            json.dumps({"function": "letters", "args": [8 * MEBIBYTE], "id": number}).encode()
            for number in range(30)
        ]
        raw.send(b"".join(frame(TEXT, request) for request in asked))
        most = 0.0

        def is_dropped() -> bool:
            nonlocal most
            most = max(most, resident_mib(pid) - before)
            return gateway.process_of(raw.socket) is None

        wait_until(is_dropped, what="the end of who does not read")
        gateway.wait_for_figure("websockets", 0)
        self.assertLess(most, 220)
        self.assertEqual(self.open(gateway).ask("add", [1, 2]), 3)
        wait_until(lambda: daemon.status()["totals"]["in_flight"] == 1, what="the tasks' ends")

    def test_silence(self) -> None:
        """Who answers no ping is dropped, and counted; so is who reads nothing."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", "--ping=0.3")
        raw = self.raw_socket(gateway)
        self.assertIsNone(raw.close_code())
        gateway.wait_for_figure("silent_total", 1)
        unread = self.raw_socket(gateway, receive_bytes=4096)
        unread.ask("letters", [16 * MEBIBYTE])
        wait_until(lambda: gateway.process_of(unread.socket) is None, what="the second's end")
        feed = self.raw_socket(gateway, "/live")
        self.assertIsNone(feed.close_code())
        gateway.wait_for_figure("silent_total", 3)
        gateway.wait_for_figure("websockets", 0)

    def test_signs_of_life(self) -> None:
        """Who answers pings stays, though it says nothing."""
        gateway = self.start_gateway(shared_daemon(procs=2), "--ping=1")
        web = self.open(gateway)
        feed = self.open(gateway, "/live")
        raw = self.raw_socket(gateway)
        self.assertIsNone(raw.close_code())  # it was pinged, and waited for
        gateway.wait_for_figure("silent_total", 1)
        self.assertEqual(web.ask("echo", [1]), 1)
        self.assertEqual(feed.reply()["kind"], "hello")
        self.assertEqual(gateway.metrics()["taskd_gateway_websockets"], 2)
