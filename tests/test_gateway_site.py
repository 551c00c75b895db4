"""HTTP, as far as it is the same for every page, with a real daemon behind it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from http.client import HTTPResponse
from io import BytesIO
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from taskd.access import Access, digest_of
from taskd.client import TaskClient
from taskd.door import Door
from taskd.errors import (
    BadArguments,
    CallError,
    InternalError,
    LineTooLong,
    Malformed,
    Overloaded,
    TaskFailed,
    error_from_wire,
)
from taskd.functions import Function, Kind, progress, task
from taskd.gateway.answers import answer, refuse
from taskd.gateway.backend import Backend
from taskd.gateway.calls import CallPage, Identities
from taskd.gateway.figures import Figures
from taskd.gateway.identity import Watchers
from taskd.gateway.origin import Origins
from taskd.gateway.pages import Dashboard, Gate, HealthPage, MetricsPage, static
from taskd.gateway.settings import GatewaySettings
from taskd.gateway.site import GatewaySite, Upgrade
from taskd.gateway.sockets import BrowserFactory, FeedFactory
from taskd.gateway.watch import Node, Watch
from tests.support import MemoryDaemon, MemoryEndpoint, MemoryTransport, new_slot

HOST = "127.0.0.1:8080"
OWN = f"http://{HOST}"
EVIL = "http://evil.example"
HOME = IPv4Address("TCP", "192.0.2.1", 50001)
TOKEN = "web's token 0123"
WATCHING = "a watcher's token 0123"
EVERYTHING = (("*", ("*",)),)
LONGEST = 2048


def new_figures() -> Figures:
    """Give a row of figures that nobody else reads."""
    fd = Figures.create(1)
    try:
        return Figures(fd)
    finally:
        os.close(fd)


class Tasks:
    """
    What the daemon has to offer, held by the test.

    Attributes:
        held: The tasks that go on, by label.
        cancelled: The labels of those that were cancelled.
        asked: The arguments of every call.
    """

    def __init__(self) -> None:
        self.held: dict[str, Deferred[Any]] = {}
        self.cancelled: list[str] = []
        self.asked: list[Any] = []

    def functions(self) -> list[Callable[..., Any]]:
        @task(blocking=False)
        def now(*args: Any, **keywords: Any) -> Any:
            self.asked.append(keywords or list(args))
            return keywords or list(args)

        @task(blocking=False)
        def later(label: str) -> Deferred[Any]:
            self.asked.append([label])
            self.held[label] = Deferred(lambda _: self.cancelled.append(label))
            return self.held[label]

        @task(blocking=False)
        def fails(text: str = "it broke") -> None:
            raise ValueError(text)

        @task(blocking=False)
        def reports(label: str) -> Deferred[Any]:
            progress(1, 2, "half")
            return later(label)

        return [now, later, fails, reports]


class World:
    """
    One process of a gateway, without its port, and a daemon, all in memory.

    Args:
        tokens: Those of callers, by identity.
        watchers: Those of who may see the dashboard.
        allow: What may be called.
        settings: What else the operator has decided.
    """

    def __init__(
        self,
        *,
        tokens: dict[str, str] | None = None,
        watchers: dict[str, str] | None = None,
        allow: Any = EVERYTHING,
        **settings: Any,
    ) -> None:
        self.tasks = Tasks()
        self.daemon = MemoryDaemon(*self.tasks.functions())
        self.told: dict[str, Any] = {"taskd.ping": "pong", "taskd.status": {}, "taskd.failures": []}
        for name in self.told:
            self.daemon.registry.add(Function(name, partial(self._tell, name), Kind.REACTOR))
        self.loop = self.daemon.loop
        self.endpoint: Any = MemoryEndpoint(self.daemon)
        self.shown: list[str | None] = []
        self.settings = GatewaySettings(
            token_file="x", max_message_bytes=LONGEST, grace_seconds=5.0, **settings
        )
        self.figures = new_figures()
        pairs = [(who, digest_of(token)) for who, token in (tokens or {}).items()]
        self.slot = new_slot()
        self.door = Door(Access(pairs, allow), self.slot, self.loop.seconds)
        self.origins = Origins(self.settings.origins, needs_one=self.settings.needs_origin)
        self.backend = Backend(
            self.loop,
            self.connect,
            None,
            passes_on=not self.settings.keep_tokens,
            max_calls=3,
            figures=self.figures,
        )
        watching = [(who, digest_of(token)) for who, token in (watchers or {}).items()]
        self.gate = Gate(Watchers(watching), self.figures, self.loop)
        self.watch = Watch(
            self.loop,
            [Node("daemon", self.connect(None))],
            self.figures,
            self.loop.seconds,
            self.loop.seconds,
        )
        identities = Identities(self.door, self.settings.cookie, self.loop)
        root = Dashboard(self.gate)
        self.root = root
        self.site = GatewaySite(root, self.origins, self.figures, LONGEST, self.loop)
        self.calls = CallPage(identities, self.origins, self.backend, self.figures)
        self.health = HealthPage(self.backend)
        self.browsers = BrowserFactory(
            self.settings,
            self.figures,
            self.site.left,
            self.loop,
            self.loop.seconds,
            self.backend,
            asks=self.door.asks,
        )
        self.feed = FeedFactory(
            self.settings, self.figures, self.site.left, self.loop, self.loop.seconds
        )
        self.feed.greet = self.watch.greeting
        self.watch.show = self.feed.show
        most = self.settings.max_connections
        self.upgrade = Upgrade(self.browsers, self.origins, self.figures, most, identities.prepare)
        self.live = Upgrade(self.feed, self.origins, self.figures, most, self.gate.prepare)
        for path, page in {
            b"ws": self.upgrade,
            b"live": self.live,
            b"call": self.calls,
            b"healthz": self.health,
            b"metrics": MetricsPage(self.gate, self.watch, self.figures),
            **static(),
        }.items():
            root.putChild(path, page)

    def _tell(self, name: str, limit: int = 0) -> Any:
        return self.told[name]

    def connect(self, token: str | None) -> TaskClient:
        self.shown.append(token)
        return TaskClient(
            self.loop, self.endpoint, token=token, pool=1, connect_timeout=5.0, jitter=lambda: 0.5
        )

    def settle(self, seconds: float = 0.0) -> None:
        """Let what has been begun take its way."""
        for _ in range(4):
            self.loop.run_waiting()
            self.loop.advance(0)
            self.daemon.flush()
        if seconds:
            self.loop.advance(seconds)
            self.settle()

    def finish(self, label: str, result: Any = "done") -> None:
        """Have a task end."""
        self.tasks.held.pop(label).callback(result)
        self.settle()

    def caller(self, address: Any = HOME) -> Caller:
        return Caller(self, address)

    def get(self, path: str, **headers: str) -> Answer:
        caller = self.caller()
        caller.ask("GET", path, **headers)
        return caller.answer


class Answer:
    """One answer over HTTP."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def gist(self) -> tuple[int, str]:
        return self.status, self.error["code"]


class Transport(MemoryTransport):
    """
    A connection's socket, as strict as the kernel's and no stricter.

    Attributes:
        is_aborted: True once it was closed by force.
    """

    is_aborted = False

    @property
    def has_unsent(self) -> bool:
        return self.unsent_bytes > 0

    def unregisterProducer(self) -> None:
        self.producer = self.streaming = None

    def resumeProducing(self) -> None:
        if not self.disconnecting:
            super().resumeProducing()

    def pauseProducing(self) -> None:
        if not self.disconnecting:
            super().pauseProducing()

    def abortConnection(self) -> None:
        self.is_aborted = self.disconnecting = True


class _Socket:
    def __init__(self, file: BytesIO) -> None:
        self._file = file

    def makefile(self, *_: Any) -> Any:
        self._file.close = lambda: None  # type: ignore[method-assign]
        return self._file


class Caller:
    """One connection to the gateway, whose other end is the test."""

    def __init__(self, world: World, address: Any = HOME) -> None:
        self._world = world
        channel: Any = world.site.buildProtocol(address)
        self.channel = channel
        self.transport = Transport(channel)
        self.transport.peerAddr = address
        channel.makeConnection(self.transport)
        channel.accepted()
        self._methods: list[str] = []

    def say(self, data: bytes) -> None:
        """Send bytes."""
        self.transport.protocol.dataReceived(data)
        self._world.settle()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> None:
        """Send a request; a header's name has _ for -, and one that is '' is left out."""
        self._methods.append(method)
        told = {"host": HOST, **{name.replace("_", "-"): v for name, v in headers.items()}}
        if body is not None:
            told.setdefault("content-type", "application/json")
            if "transfer-encoding" not in told:
                told.setdefault("content-length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in told.items() if v)]
        self.say("\r\n".join([*lines, "", ""]).encode() + (body or b""))

    def call(self, function: str, body: bytes = b"[]", **headers: str) -> None:
        self.ask("POST", f"/call/{function}", body, **headers)

    @property
    def answers(self) -> list[Answer]:
        """All answers so far."""
        file = BytesIO(self.transport.value())
        found = []
        methods = iter(self._methods)
        while file.tell() < len(file.getvalue()):
            response = HTTPResponse(_Socket(file), method=next(methods, "GET"))  # type: ignore[arg-type]
            response.begin()
            found.append(Answer(response))
        return found

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer

    def go(self, reason: Exception | None = None) -> None:
        """End the connection, as its peer or the network does."""
        self.transport.protocol.connectionLost(Failure(reason or ConnectionDone()))
        self._world.settle()


class SiteTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.world = World()
        self.figures = self.world.figures

    def refused(self, code: int, error: str, method: str, path: str, **headers: str) -> Answer:
        caller = self.world.caller()
        caller.ask(method, path, **headers)
        self.assertEqual(caller.answer.gist, (code, error), (method, path, headers))
        return caller.answer


class HeaderTests(SiteTestCase):
    def test_every_answer(self) -> None:
        """Every answer, refusals too, forbids what a browser could make of it."""
        for path, host in (
            *(("/", HOST), ("/metrics", HOST), ("/healthz", HOST), ("/dashboard.js", HOST)),
            *(("/nothing", HOST), ("/ws", HOST), ("/call/f", HOST), ("/", "evil.example")),
        ):
            headers = self.world.get(path, host=host).headers
            for name, value in (
                ("server", "taskd"),
                ("cache-control", "no-store"),
                ("x-content-type-options", "nosniff"),
                ("referrer-policy", "no-referrer"),
                ("cross-origin-resource-policy", "same-origin"),
                ("cross-origin-opener-policy", "same-origin"),
            ):
                self.assertEqual(headers.get(name), value, (path, host))
            policy = headers["content-security-policy"]
            self.assertIn("default-src 'none'", policy)
            self.assertIn("frame-ancestors 'none'", policy)
            self.assertNotIn("unsafe", policy)
            self.assertFalse([name for name in headers if name.startswith("access-control")])

    def test_nothing_there(self) -> None:
        """What is at no path is told so, in JSON, and reveals no more."""
        for path in ("/nothing", "/a/b", "//", "/dashboard", "/ws/", "/%2e%2e/etc/passwd"):
            caller = self.world.caller()
            caller.ask("GET", path)
            self.assertIn(caller.answer.status, (404, 426), path)
            self.assertIn("error", caller.answer.json)


class HostTests(SiteTestCase):
    def test_other_names(self) -> None:
        """A request for another name is refused, whatever it asks for, and nothing is run."""
        for host in ("evil.example", "evil.example:8080", "localhost.", "127.0.0.1.nip.io", ""):
            for method, path in (
                *(("GET", "/"), ("GET", "/metrics"), ("GET", "/dashboard.js"), ("GET", "/nothing")),
                *(
                    ("GET", "/ws"),
                    ("GET", "/live"),
                    ("POST", "/call/now"),
                    ("OPTIONS", "/call/now"),
                ),
            ):
                self.refused(403, "unauthorized", method, path, host=host)
        self.assertEqual(self.figures.get("refused_origin"), 40)
        self.assertEqual(self.world.tasks.asked, [])

    def test_own_names(self) -> None:
        """Numbers and localhost are names of this place."""
        for host in ("127.0.0.1", "localhost:8080", "[::1]:8080", "192.0.2.1"):
            self.assertEqual(self.world.get("/", host=host).status, 200)
        self.assertEqual(self.figures.get("refused_origin"), 0)

    def test_health(self) -> None:
        """A balancer's check may name any host, or none."""
        for host in ("", "evil.example"):
            self.assertEqual(self.world.get("/healthz", host=host).json, {"status": "ok"})
        self.refused(403, "unauthorized", "GET", "/healthz/", host="evil.example")

    def test_two_hosts(self) -> None:
        """Who names two hosts names none."""
        caller = self.world.caller()
        caller.say(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
        self.assertEqual(caller.answer.gist, (403, "unauthorized"))

    def test_a_host_that_is_no_text(self) -> None:
        """Bytes that are no UTF-8 name no host, and are no fault of the gateway's."""
        caller = self.world.caller()
        caller.say(b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n")
        self.assertEqual(caller.answer.gist, (403, "unauthorized"))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_http_1_0(self) -> None:
        """Who speaks HTTP/1.0 and names no host is refused as well."""
        caller = self.world.caller()
        caller.say(b"GET / HTTP/1.0\r\n\r\n")
        self.assertEqual(caller.answer.gist, (403, "unauthorized"))

    def test_whole_addresses(self) -> None:
        """A proxy's form of a request is none for here."""
        caller = self.world.caller()
        caller.say(b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        self.assertIn(caller.answer.status, (400, 404))


class LengthTests(SiteTestCase):
    def test_the_longest(self) -> None:
        """A body of the longest length is taken."""
        text = "x" * (LONGEST - 4)
        caller = self.world.caller()
        caller.call("now", json.dumps([text]).encode())
        self.assertEqual(caller.answer.json, {"result": [text]})

    def assertTooLong(self, caller: Caller) -> None:
        first, *more = caller.answers
        self.assertEqual(first.gist, (413, "line-too-long"))
        self.assertEqual(more, [])
        self.assertIn(str(LONGEST), first.error["message"])
        self.assertEqual(first.headers["connection"], "close")
        self.assertTrue(caller.transport.disconnecting)
        self.assertEqual(self.world.tasks.asked, [])

    def test_by_its_announcement(self) -> None:
        """What is announced to be longer is refused before it comes, and never read."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", content_length=str(LONGEST + 1))
        self.assertTooLong(caller)
        caller.say(b"[" + b"1" * (LONGEST + 1))
        caller.say(b"POST /call/now HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        self.assertTooLong(caller)

    def test_a_body_behind_it(self) -> None:
        """What comes with a body that is too long, and behind it, is no request."""
        caller = self.world.caller()
        body = b"[" + b" " * LONGEST + b"]"
        request = b"POST /call/now HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
        caller.say(request % len(body) + body + request % 2 + b"[]")
        self.assertTooLong(caller)

    def test_by_chunks(self) -> None:
        """What says no length is refused at the chunk that is too much."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", transfer_encoding="chunked")
        caller.say(b"400\r\n" + b"1" * 1024 + b"\r\n")
        caller.say(b"400\r\n" + b"1" * 1024 + b"\r\n")
        self.assertEqual(caller.answers, [])
        caller.say(b"1\r\n1\r\n")
        self.assertTooLong(caller)
        caller.say(b"1\r\n1\r\n0\r\n\r\n")
        self.assertTooLong(caller)

    def test_chunks_of_the_longest_length(self) -> None:
        """Chunks that are not too long together are a body."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", transfer_encoding="chunked")
        caller.say(b"1\r\n[\r\n")
        caller.say(b"%x\r\n" % (LONGEST - 2) + b"1" * (LONGEST - 2) + b"\r\n1\r\n]\r\n0\r\n\r\n")
        self.assertEqual(caller.answer.json, {"result": [int("1" * (LONGEST - 2))]})

    def test_the_end(self) -> None:
        """Who does not close then is cut off five seconds later."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", content_length="1000000")
        self.world.settle(4.9)
        self.assertFalse(caller.transport.is_aborted)
        self.world.settle(0.2)
        self.assertTrue(caller.transport.is_aborted)
        caller.go(ConnectionLost())
        self.assertEqual(self.world.site.open_connections, 0)

    def test_an_end_that_is_read(self) -> None:
        """An answer that is read goes on being sent; who reads no more is cut off."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", content_length="1000000")
        for unsent, is_over in ((900, False), (500, False), (499, False), (499, True)):
            caller.transport.unsent_bytes = unsent
            self.world.settle(5.01)
            self.assertIs(caller.transport.is_aborted, is_over)

    def test_who_asks_first_whether_to_send_it(self) -> None:
        """Who waits to be told to go on with a body that is too long is not."""
        caller = self.world.caller()
        caller.ask("POST", "/call/now", b"", content_length=str(LONGEST + 1), expect="100-continue")
        self.assertNotIn(b"100 Continue", caller.transport.value())
        self.assertTooLong(caller)


class TimeTests(SiteTestCase):
    def test_who_says_nothing(self) -> None:
        """A connection on which no request comes ends after half a minute."""
        caller = self.world.caller()
        self.world.settle(29.9)
        self.assertFalse(caller.transport.disconnecting)
        self.world.settle(0.2)
        self.assertTrue(caller.transport.disconnecting)

    def test_bytes_buy_no_time(self) -> None:
        """Who sends a request byte by byte has half a minute for all of it."""
        for beginning in (b"", b"POST /call/now HTTP/1.1\r\nContent-Length: 100\r\n\r\n"):
            caller = self.world.caller()
            caller.say(beginning)
            for _ in range(29):
                caller.say(b"G")
                self.world.settle(1)
            self.assertFalse(caller.transport.disconnecting)
            self.world.settle(1.1)
            self.assertTrue(caller.transport.disconnecting)
            self.world.settle(5.1)
            self.assertTrue(caller.transport.is_aborted)

    def test_a_call_that_takes_long(self) -> None:
        """The time that a call takes is not its caller's."""
        caller = self.world.caller()
        caller.call("later", b'["a"]')
        self.world.settle(3600)
        self.assertFalse(caller.transport.disconnecting)
        self.world.finish("a")
        self.assertEqual(caller.answer.json, {"result": "done"})

    def test_the_next_request(self) -> None:
        """A connection is kept for another request, which has half a minute again."""
        caller = self.world.caller()
        for number in range(3):
            self.world.settle(29)
            caller.call("now", b"[%d]" % number)
        self.assertEqual([a.json["result"] for a in caller.answers], [[0], [1], [2]])
        self.world.settle(30.1)
        self.assertTrue(caller.transport.disconnecting)

    def test_requests_in_a_row(self) -> None:
        """Requests that are sent at once are answered in their order, one after the other."""
        caller = self.world.caller()
        caller.call("later", b'["a"]')
        caller.call("now", b"[1]")
        self.assertEqual(caller.answers, [])
        self.world.finish("a")
        self.assertEqual([a.json["result"] for a in caller.answers], ["done", [1]])


class ConnectionTests(SiteTestCase):
    def test_who_does_not_read(self) -> None:
        """Who leaves its answers unread gets no further request answered, and is cut off."""
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for unsent, answers in ((256 * 1024, 2), (256 * 1024 + 1, 1)):
            caller = self.world.caller()
            caller.transport.unsent_bytes = unsent
            caller.say(request * 2)
            self.assertEqual(len(caller.answers), answers)
        for left, is_over in ((256, False), (255, False), (255, True)):
            caller.transport.unsent_bytes = left
            self.world.settle(30.1)
            self.assertIs(caller.transport.is_aborted, is_over)

    def test_who_reads_late(self) -> None:
        """Who reads its answers after all has the next request answered."""
        request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        caller = self.world.caller()
        caller.transport.unsent_bytes = 2**20
        caller.say(request * 2)
        self.world.settle(0.1)
        self.assertEqual(len(caller.answers), 1)
        caller.transport.unsent_bytes = 0
        caller.transport.producer.resumeProducing()
        self.world.settle(0.1)
        self.assertEqual(len(caller.answers), 2)
        self.world.settle(29)
        self.assertFalse(caller.transport.is_aborted)

    def test_hanging_up(self) -> None:
        """All connections that speak HTTP can be ended once what was answered is out."""
        one, other = self.world.caller(), self.world.caller()
        self.assertFalse(self.world.site.has_unsent)
        other.transport.unsent_bytes = 5
        self.assertTrue(self.world.site.has_unsent)
        self.world.site.hang_up()
        self.assertTrue(one.transport.disconnecting and other.transport.disconnecting)
        other.go()
        self.assertFalse(self.world.site.has_unsent)

    def test_their_number(self) -> None:
        """Every connection is counted until it has gone, and it is told when there is room."""
        told: list[int] = []
        site = self.world.site
        site.on_room = lambda: told.append(site.open_connections)
        one, other = self.world.caller(), self.world.caller()
        self.assertEqual(site.open_connections, 2)
        one.go()
        self.assertEqual((site.open_connections, told), (1, [1]))
        other.ask("GET", "/")
        other.go(ConnectionLost())
        self.assertEqual((site.open_connections, told), (0, [1, 0]))

    def test_garbage(self) -> None:
        """What is no HTTP ends the connection and nothing else."""
        for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"{}\n{}\n\n", b"GET\r\n\r\n", b"\0" * 9):
            caller = self.world.caller()
            caller.say(data + b"\r\n\r\n")
            caller.go()
        self.assertEqual(self.world.site.open_connections, 0)
        self.assertEqual(self.flushLoggedErrors(), [])

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.sampled_from(
                [
                    *(
                        b"POST /call/now HTTP/1.1\r\n",
                        b"GET / HTTP/1.1\r\n",
                        b"Host: localhost\r\n",
                    ),
                    *(
                        b"Content-Length: 2\r\n",
                        b"Content-Length: 99999\r\n",
                        b"Expect: 100-continue\r\n",
                    ),
                    *(b"Transfer-Encoding: chunked\r\n", b"Content-Type: application/json\r\n"),
                    *(
                        b"\r\n",
                        b"[]",
                        b"2\r\n[]\r\n",
                        b"0\r\n\r\n",
                        b"Origin: null\r\n",
                        b"\xff: \xff\r\n",
                    ),
                    *(b"Upgrade: websocket\r\n", b"Connection: close\r\n", b"GET /ws HTTP/1.1\r\n"),
                ]
            ),
            max_size=12,
        )
    )
    def test_whatever_is_sent(self, pieces: list[bytes]) -> None:
        """Whatever is sent, nothing breaks, and the connection is let go of in the end."""
        world = World()
        caller = world.caller()
        for piece in pieces:
            if caller.transport.disconnecting:
                break
            caller.say(piece)
        caller.go()
        self.assertEqual(world.site.open_connections, 0)
        self.assertEqual(world.figures.get("in_flight"), 0)
        self.assertEqual(self.flushLoggedErrors(), [])


class UpgradeTests(SiteTestCase):
    def test_what_asks_for_none(self) -> None:
        """At the place of WebSockets whatever asks for none is told so."""
        for method, headers in (
            ("GET", {}),
            ("GET", {"upgrade": "h2c"}),
            ("POST", {"upgrade": "websocket"}),
            ("HEAD", {"upgrade": "websocket"}),
        ):
            caller = self.world.caller()
            caller.ask(method, "/ws", origin=OWN, connection="upgrade", **headers)
            self.assertEqual(caller.answer.status, 426)
            self.assertEqual(caller.answer.headers["upgrade"], "websocket")

    def upgrade_refused(self, code: int, error: str, **headers: str) -> None:
        told = {"upgrade": "websocket", "connection": "Upgrade", "origin": OWN, **headers}
        self.refused(code, error, "GET", "/ws", **told)
        self.assertEqual(self.figures.get("websockets"), 0)

    def test_foreign_pages(self) -> None:
        """Pages of another origin, and programs that name none, open no WebSocket."""
        for origin in (EVIL, "null", "http://127.0.0.1:8081", "", "file://"):
            self.upgrade_refused(403, "unauthorized", origin=origin)
        self.assertEqual(self.figures.get("refused_origin"), 5)

    def test_a_stop(self) -> None:
        """When the gateway stops no more are opened."""
        self.world.upgrade.close()
        self.upgrade_refused(503, "shutting-down")

    def test_no_room(self) -> None:
        """There are no more than may be."""
        self.figures.add("websockets", self.world.settings.max_connections)
        caller = self.world.caller()
        caller.ask("GET", "/ws", upgrade="websocket", connection="Upgrade", origin=OWN)
        self.assertEqual(caller.answer.gist, (503, "overloaded"))
        self.assertEqual(self.figures.get("refused_room"), 1)

    def test_autobahns_own_refusals(self) -> None:
        """A handshake that is none is refused, and its connection let go of."""
        for headers in (
            {},
            {"sec_websocket_key": "short", "sec_websocket_version": "13"},
            {"sec_websocket_key": "x3JJHMbDL1EzLkh9GBhXDw==", "sec_websocket_version": "7"},
        ):
            caller = self.world.caller()
            caller.ask(
                "GET", "/ws", upgrade="websocket", connection="Upgrade", origin=OWN, **headers
            )
            self.assertIn(b"HTTP/1.1 400", caller.transport.value())
            self.assertTrue(caller.transport.disconnecting)
            caller.go()
        self.assertEqual(self.world.site.open_connections, 0)
        self.assertEqual(self.figures.get("websockets"), 0)


class Raiser(Resource):
    """A page that answers with an error of the wire."""

    isLeaf = True
    error: CallError

    def render(self, request: Any) -> int:
        return refuse(request, self.error)


class Teller(Resource):
    isLeaf = True

    def render(self, request: Any) -> int:
        assert answer(request, 202, {"told": "é"}) == NOT_DONE_YET
        return NOT_DONE_YET


class AnswerTests(SiteTestCase):
    def test_errors(self) -> None:
        """Each error of the wire has a status, and says what it says on the wire."""
        page = Raiser()
        self.world.root.putChild(b"error", page)
        for code, status in (
            *(("malformed", 400), ("line-too-long", 413), ("unknown-function", 404)),
            *(("bad-arguments", 422), ("task-failed", 500), ("time-limit", 504)),
            *(("cancelled", 409), ("worker-lost", 502), ("overloaded", 503)),
            *(("shutting-down", 503), ("unauthorized", 403), ("internal", 500)),
        ):
            page.error = error_from_wire({"code": code, "message": "why"})
            found = self.world.get("/error")
            self.assertEqual(found.gist, (status, code))
            self.assertEqual(found.error["message"], "why")
            self.assertIs(found.error["retryable"], page.error.retryable)

    def test_details(self) -> None:
        """What an error tells besides is told on; when to come again also in HTTP's way."""
        page = Raiser()
        self.world.root.putChild(b"error", page)
        page.error = TaskFailed("why", type="ValueError")
        self.assertEqual(self.world.get("/error").error["type"], "ValueError")
        for seconds, header in ((0.2, "1"), (3.0, "3"), (3.1, "4"), (0, None)):
            page.error = Overloaded("why", retry_after=seconds)
            found = self.world.get("/error")
            self.assertEqual(found.headers.get("retry-after"), header)
            self.assertEqual(found.error["retry_after"], seconds)

    def test_json(self) -> None:
        """An answer is JSON of a length that is told; who asks for the head gets no body."""
        self.world.root.putChild(b"tell", Teller())
        found = self.world.get("/tell")
        self.assertEqual((found.status, found.json), (202, {"told": "é"}))
        self.assertEqual(found.headers["content-type"], "application/json")
        caller = self.world.caller()
        caller.ask("HEAD", "/tell")
        self.assertEqual(int(caller.answer.headers["content-length"]), len(found.body))
        self.assertEqual(caller.answer.body, b"")

    def test_kinds(self) -> None:
        """An error's class does not matter where its code is the same."""
        for kind in (BadArguments, InternalError, LineTooLong, Malformed):
            page = Raiser()
            page.error = kind("text")
            self.world.root.putChild(b"error", page)
            self.assertEqual(self.world.get("/error").error["code"], kind.code)
