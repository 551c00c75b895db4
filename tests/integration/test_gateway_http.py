"""HTTP: calls and their statuses, methods, connections, health, metrics."""

from __future__ import annotations

import http
import json
import shutil
import subprocess
from http.client import HTTPConnection
from pathlib import Path
from typing import Final

from tests.integration.daemon import WAIT_SECONDS
from tests.integration.gateway import Answer, GatewayTestCase, shared_gateway

JSON: Final = {"Content-Type": "application/json"}
POLICY: Final = "default-src 'none'; frame-ancestors 'none'"


class HttpTestCase(GatewayTestCase):
    """Base of tests that share one gateway."""

    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway("--allow=*")

    def assert_fails(self, answer: Answer, status: int, code: str, *words: str) -> None:
        """It is answered with this status, and this error of the wire."""
        self.assertEqual(answer.status, status, answer)
        self.assertEqual(answer.headers["content-type"], "application/json")
        error = self.assert_error(answer.json, code, *words)
        self.assertIsInstance(error["retryable"], bool)


class CallTests(HttpTestCase):
    def test_results(self) -> None:
        """Arguments are an array, an object or nothing; the answer holds the result."""
        for function, args, result in (
            ("add", [1, 2], 3),
            ("add", {"b": 1, "a": 2}, 3),
            ("mail.from", {"from": "ä\u2028\U0001f600"}, ["ä\u2028\U0001f600", "nobody"]),
            ("later_inline", [None], None),
            ("taskd.ping", [], "pong"),
        ):
            answer = self.gateway.call(function, args)
            self.assertEqual((answer.status, answer.json), (200, {"result": result}))
            self.assertEqual(answer.headers["content-type"], "application/json")
            self.assertEqual(answer.headers["cache-control"], "no-store")
            self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
            self.assertEqual(answer.headers["content-security-policy"], POLICY)
        for body in (b"", b"  ", b"[]", b"{}"):
            answer = self.gateway.http("POST", "/call/taskd.ping", body, JSON)
            self.assertEqual(answer.json, {"result": "pong"})
        self.assertEqual(self.gateway.call("mail%2Efrom", ["x"]).json["result"], ["x", "nobody"])

    def test_errors(self) -> None:
        """Each error of the wire has its status."""
        call = self.gateway.call
        self.assert_fails(call("no_such_task"), 404, "unknown-function", "no_such_task")
        self.assert_fails(call("a/b"), 404, "unknown-function", "a/b")
        self.assert_fails(call("add", [1]), 422, "bad-arguments", "'b'")
        self.assert_fails(call("taskd.cancel", [1]), 404, "unknown-function")
        self.assert_fails(call("fail", ["oh"]), 500, "task-failed", "oh")
        self.assertEqual(call("fail", ["oh"]).json["error"]["type"], "ValueError")
        self.assert_fails(call("not_json", ["nan"]), 500, "task-failed")
        held = self.path(self.daemon)
        self.assert_fails(call("hold_on_reactor", [held], "?timeout=0.05"), 504, "time-limit")

    def test_malformed(self) -> None:
        """What is no call is told so, and runs nothing."""
        path = self.path(self.daemon)
        body = json.dumps([path])
        for data in (
            "nonsense",
            "1",
            "null",
            '"x"',
            f"{body}{body}",
            f"{body}, {body}",
            f'{body}, "function": "echo"',
            "[NaN]",
            "[" * 3000,
            "{",
        ):
            answer = self.gateway.http("POST", "/call/touch", data.encode(), JSON)
            self.assert_fails(answer, 400, "malformed")
        answer = self.gateway.http("POST", "/call/touch", b'["\xff"]', JSON)
        self.assert_fails(answer, 400, "malformed")
        for query in (
            "timeout=0",
            "timeout=-1",
            "timeout=nan",
            "timeout=inf",
            "timeout=1e9",
            "timeout=x",
            "timeout=1&timeout=2",
            "cancel_on_disconnect=1",
            "timeuot=1",
            "id=1",
        ):
            answer = self.gateway.http("POST", f"/call/touch?{query}", body.encode(), JSON)
            self.assert_fails(answer, 400, "malformed")
        for place in ("/call/", "/call"):
            self.assert_fails(self.gateway.http("POST", place, b"[]", JSON), 400, "malformed")
        self.assertEqual(self.gateway.call("add", [1, 2], "?timeout=20").json, {"result": 3})
        self.assertFalse(Path(path).exists())


class PageTests(HttpTestCase):
    def test_methods(self) -> None:
        """Each page has its methods; others are told so, and HEAD has no body."""
        for path in ("/", "/healthz", "/metrics", "/dashboard.js", "/dashboard.css"):
            get, head = (self.gateway.http(method, path) for method in ("GET", "HEAD"))
            self.assertEqual((get.status, head.status), (200, 200), path)
            self.assertEqual(head.body, b"")
            self.assertEqual(head.headers["content-type"], get.headers["content-type"])
            self.assertEqual(self.gateway.http("POST", path, b"[]", JSON).status, 405, path)
            self.assertEqual(self.gateway.http("NONSENSE", path).status, 501, path)
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            answer = self.gateway.http(method, "/call/touch", b"[]", JSON)
            self.assertEqual(answer.status, http.HTTPStatus.METHOD_NOT_ALLOWED, method)
            self.assertEqual(answer.headers["allow"], "POST")
        for path in ("/ws", "/live"):
            answer = self.gateway.get(path)
            self.assertEqual(answer.status, http.HTTPStatus.UPGRADE_REQUIRED)
            self.assertEqual(answer.headers["upgrade"], "websocket")
            headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
            self.assertEqual(self.gateway.get(path, **headers).status, http.HTTPStatus.FORBIDDEN)
            headers["Origin"] = self.gateway.origin
            self.assertEqual(self.gateway.get(path, **headers).status, http.HTTPStatus.BAD_REQUEST)

    def test_not_there(self) -> None:
        """What is not there is 404, without a trace of the request in the answer."""
        for path in ("/x", "/index.html", "/dashboard.js.map", "/../etc/passwd", "//", "/ws2"):
            answer = self.gateway.get(path)
            self.assertEqual(answer.status, http.HTTPStatus.NOT_FOUND, path)
            self.assertNotIn(b"passwd", answer.body)
            self.assertEqual(answer.headers["content-security-policy"], POLICY)
        answer = self.gateway.get("/%3Cscript%3Ealert(1)%3C/script%3E")
        self.assertEqual(answer.status, http.HTTPStatus.NOT_FOUND)
        self.assertNotIn(b"script", answer.body)

    def test_health(self) -> None:
        """/healthz needs no name of this place, and no token."""
        self.assertEqual(self.gateway.get("/healthz").json, {"status": "ok"})
        raw = self.raw(self.gateway)
        raw.send("GET /healthz HTTP/1.0\r\n\r\n")
        self.assertEqual(raw.answer().json, {"status": "ok"})

    def test_curl(self) -> None:
        """curl can call."""
        if shutil.which("curl") is None:
            self.fail("curl is missing: apt-get install curl")
        url = f"{self.gateway.origin}/call/add"
        command = ("curl", "-sS", "--json", '{"a": 1, "b": 2}', url)
        done = subprocess.run(command, capture_output=True, timeout=WAIT_SECONDS, check=True)
        self.assertEqual(json.loads(done.stdout), {"result": 3})


class ConnectionTests(HttpTestCase):
    def ask(self, connection: HTTPConnection, method: str, path: str, body: str = "") -> Answer:
        connection.request(method, path, body, JSON)
        return Answer.read(connection.getresponse())

    def test_keep_alive(self) -> None:
        """One connection serves one request after the other, refused ones among them."""
        with self.gateway.http_connection() as connection:
            self.assertEqual(self.ask(connection, "POST", "/call/add", "[1, 2]").status, 200)
            kept = connection.sock
            for method, path, body, status in (
                ("POST", "/call/add", "[1]", 422),
                ("GET", "/healthz", "", 200),
                ("GET", "/no/such/page", "", 404),
                ("HEAD", "/", "", 200),
                ("POST", "/", "[]", 405),
                ("GET", "/metrics", "", 200),
                ("POST", "/call/add", "[1, 2]", 200),
            ):
                self.assertEqual(self.ask(connection, method, path, body).status, status, path)
                self.assertIs(connection.sock, kept)

    def test_pipelining(self) -> None:
        """Requests that are sent at once are answered in their order."""
        raw, path = self.raw(self.gateway), self.path(self.daemon)
        for function, args in (
            ("hold_on_reactor", [path]),
            ("add", [1, 2]),
            ("no_such_task", []),
            ("echo", ["last"]),
        ):
            body = json.dumps(args).encode()
            headers = {**JSON, "Content-Length": str(len(body))}
            raw.request("POST", f"/call/{function}", headers, body)
        self.wait_for_begin(path)
        Path(path).touch()
        answers = [raw.answer() for _ in range(4)]
        self.assertEqual([answer.status for answer in answers], [200, 200, 404, 200])
        self.assertEqual(answers[0].json, {"result": "released"})
        self.assertEqual(answers[3].json, {"result": "last"})

    def test_no_http(self) -> None:
        """What is not HTTP is not answered as if it were; nothing is run, and nobody is harmed."""
        path = self.path(self.daemon)
        call = json.dumps({"function": "touch", "args": [path]})
        body = json.dumps([path])
        both = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        for text in (
            call + "\n",
            "\x16\x03\x01\x02\x00\x01",
            "\r\n" * 1000 + "\0" * 1000 + "\r\n\r\n",
            "GET\r\n\r\n",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            f"POST /call/touch HTTP/9.9.9\r\nHost: x\r\n{both}\r\n{body}",
            f"POST /call/touch HTTP/1.1\r\nHost: 127.0.0.1\r\n{both}"
            f"Content-Length: 1\r\n\r\n{body}",
            f"POST /call/touch HTTP/1.1\r\nHost: 127.0.0.1\r\n{both}"
            f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{body}",
            f"POST /call/touch HTTP/1.1\r\nHost: 127.0.0.1\r\n{both}Bad Header\r\n\r\n{body}",
        ):
            raw = self.raw(self.gateway)
            raw.send(text)
            raw.socket.shutdown(1)
            self.assertTrue(raw.is_hung_up())
        self.assertEqual(self.gateway.call("add", [1, 2]).json, {"result": 3})
        self.assertFalse(Path(path).exists())


class MetricsTests(HttpTestCase):
    def test_promtool(self) -> None:
        """Prometheus's own tool has nothing to say against the metrics."""
        if shutil.which("promtool") is None:
            self.fail("promtool is missing: apt-get install prometheus")
        self.gateway.call("fail", ["oh"])
        self.gateway.call("add", [1, 2])
        answer = self.gateway.get("/metrics")
        self.assertTrue(answer.headers["content-type"].startswith("text/plain"))
        done = subprocess.run(
            ("promtool", "check", "metrics"),
            input=answer.body,
            capture_output=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, b""))

    def test_formats(self) -> None:
        """Who asks for OpenMetrics gets that."""
        answer = self.gateway.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
        self.assertTrue(answer.headers["content-type"].startswith("application/openmetrics-text"))
        self.assertTrue(answer.body.endswith(b"# EOF\n"))

    def test_counts(self) -> None:
        """The metrics count what was called, by function and outcome, and what came here."""
        node = f'node="127.0.0.1:{self.daemon.port}"'
        done = f'taskd_tasks_total{{function="at_once",{node},outcome="done"}}'
        failed = f'taskd_tasks_total{{function="fail_at_once",{node},outcome="task-failed"}}'
        calls = "taskd_gateway_http_calls_total"
        before = self.gateway.metrics()
        for _ in range(3):
            self.gateway.call("at_once", [1])
            self.gateway.call("fail_at_once", ["oh"])
        after = self.gateway.metrics()
        for name, more in ((done, 3), (failed, 3), (calls, 6)):
            self.assertEqual(after[name] - before.get(name, 0), more, name)
        self.assertEqual(after[f"taskd_up{{{node}}}"], 1)
        self.assertEqual(after[f'taskd_workers{{{node},state="draining"}}'], 0)
        self.assertEqual(
            after[f'taskd_task_seconds_count{{function="at_once",{node}}}'], after[done]
        )
