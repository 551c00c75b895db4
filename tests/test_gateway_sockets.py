"""WebSockets, with real frames over a connection in memory, and a real daemon behind them."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.error import ConnectionLost
from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.conversation import GOING_AWAY, POLICY, RESTART, UNAUTHORIZED
from tests.test_gateway_site import HOME, LONGEST, OWN, TOKEN, WATCHING, Caller, World

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
UNSUPPORTED = 1003
MASK = b"\x01\x02\x03\x04"
OTHER = "another one's token 01"


def frame(
    payload: bytes, opcode: int = TEXT, *, is_last: bool = True, is_masked: bool = True
) -> bytes:
    """Write one frame as a browser does."""
    first = (0x80 if is_last else 0) | opcode
    bit = 0x80 if is_masked else 0
    if len(payload) < 126:
        head = bytes([first, bit | len(payload)])
    elif len(payload) < 2**16:
        head = bytes([first, bit | 126]) + struct.pack(">H", len(payload))
    else:
        head = bytes([first, bit | 127]) + struct.pack(">Q", len(payload))
    if not is_masked:
        return head + payload
    return head + MASK + bytes(byte ^ MASK[n % 4] for n, byte in enumerate(payload))


def frames_in(data: bytes) -> list[tuple[int, bytes]]:
    """Read frames as a browser does: none is in parts, none is masked."""
    found = []
    while data:
        first, length = data[0], data[1]
        assert first & 0x70 == 0, "an extension that nobody asked for"
        assert first & 0x80, "a part"
        assert length < 128, "a mask"
        data = data[2:]
        if length == 126:
            length, data = struct.unpack(">H", data[:2])[0], data[2:]
        elif length == 127:
            length, data = struct.unpack(">Q", data[:8])[0], data[8:]
        assert len(data) >= length
        found.append((first & 0x0F, data[:length]))
        data = data[length:]
    return found


class Page(Caller):
    """A page that has opened a WebSocket, played by the test."""

    def __init__(self, world: World, path: str = "/ws", **headers: str) -> None:
        super().__init__(world, HOME)
        self._world = world
        told = {
            "upgrade": "websocket",
            "connection": "keep-alive, Upgrade",
            "origin": OWN,
            "sec_websocket_key": "x3JJHMbDL1EzLkh9GBhXDw==",
            "sec_websocket_version": "13",
            **headers,
        }
        self.ask("GET", path, **told)

    @property
    def handshake(self) -> dict[str, str]:
        head = self.transport.value().partition(b"\r\n\r\n")[0].decode()
        first, *lines = head.split("\r\n")
        assert first.startswith("HTTP/1.1 101 "), first
        pairs = [line.partition(": ") for line in lines]
        return {name.lower(): value for name, _, value in pairs}

    @property
    def frames(self) -> list[tuple[int, bytes]]:
        """All frames that have come."""
        return frames_in(self.transport.value().partition(b"\r\n\r\n")[2])

    @property
    def messages(self) -> list[Any]:
        return [json.loads(payload) for opcode, payload in self.frames if opcode == TEXT]

    @property
    def gist(self) -> list[Any]:
        """The messages, each error by its code alone."""
        return [
            (m.get("id"), m["error"]["code"]) if "error" in m else (m.get("id"), m.get("result"))
            for m in self.messages
        ]

    @property
    def code(self) -> int | None:
        """The code that the WebSocket was closed with, or None."""
        found = [struct.unpack(">H", data[:2])[0] for op, data in self.frames if op == CLOSE]
        assert len(found) < 2
        return found[0] if found else None

    @property
    def count(self) -> dict[int, int]:
        """How many frames of each kind have come."""
        opcodes = [opcode for opcode, _ in self.frames]
        return {opcode: opcodes.count(opcode) for opcode in set(opcodes)}

    def call_task(self, function: str, *args: Any, **members: Any) -> None:
        message = {"function": function, "args": args, **members}
        self.say(frame(json.dumps(message).encode()))

    @property
    def socket(self) -> Any:
        return self.transport.protocol


class SocketsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.meet()

    def meet(self, **keywords: Any) -> World:
        self.world = World(**keywords)
        self.figures = self.world.figures
        return self.world

    def page(self, path: str = "/ws", **headers: str) -> Page:
        return Page(self.world, path, **headers)

    def counts(self) -> tuple[int, int, int]:
        """Give how many WebSockets, calls in flight and connections there are."""
        return (
            self.figures.get("websockets"),
            self.figures.get("in_flight"),
            self.world.site.open_connections,
        )


class HandshakeTests(SocketsTestCase):
    def test_it_opens(self) -> None:
        """A page's request becomes a WebSocket, without an extension."""
        page = self.page(sec_websocket_extensions="permessage-deflate; client_max_window_bits")
        self.assertEqual(page.handshake["sec-websocket-accept"], "HSmrc0sMlYUkAGmm5OPpG2HaGWk=")
        self.assertNotIn("sec-websocket-extensions", page.handshake)
        self.assertEqual(page.frames, [])
        self.assertEqual(self.counts(), (1, 0, 1))
        self.assertEqual(self.figures.get("opened"), 1)

    def test_what_comes_behind_the_request(self) -> None:
        """What is sent before the answer is not lost: there is no WebSocket then."""
        for body in (frame(b'{"function":"now","id":1}'), b"x" * 20_000):
            caller = self.world.caller()
            caller.say(
                b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\nOrigin: http://127.0.0.1:8080\r\n"
                b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\nSec-WebSocket-Version: 13\r\n\r\n"
                + body
            )
            self.assertEqual(caller.answers[0].gist, (400, "malformed"))

    def test_subprotocols(self) -> None:
        """A browser that names subprotocols gets ours if it is one of them, and else none."""
        for offered, chosen in (
            ("taskd", "taskd"),
            ("a, taskd, b", "taskd"),
            ("a", None),
            ("", None),
        ):
            page = self.page(sec_websocket_protocol=offered)
            self.assertEqual(page.handshake.get("sec-websocket-protocol"), chosen)

    def test_what_comes_before_it_is_open(self) -> None:
        """Nothing may come behind the request before it is answered, nor in its body."""
        request = (
            b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nOrigin: http://127.0.0.1:8080\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n"
        )
        body = b"Content-Length: 2\r\n\r\n[]"
        for data in (request + body,):
            caller = self.world.caller()
            caller.say(data)
            self.assertTrue(caller.transport.value().startswith(b"HTTP/1.1 400 "))
        self.meet(tokens={"web": TOKEN})
        self.page(authorization="Bearer wrong")
        caller = self.world.caller()
        shown = b"Authorization: Bearer %b\r\n\r\n" % TOKEN.encode()
        caller.say(request + shown)  # which waits, for what was guessed before
        caller.say(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        self.world.settle(5)
        self.assertTrue(caller.transport.value().startswith(b"HTTP/1.1 400 "))
        self.assertEqual(self.figures.get("websockets"), 0)

    def test_a_stop_meanwhile(self) -> None:
        """What was to become a WebSocket when the gateway stops becomes none."""
        self.meet(tokens={"web": TOKEN})
        self.page(authorization="Bearer wrong")
        page = self.page(authorization=f"Bearer {TOKEN}")
        self.world.upgrade.close()
        self.world.settle(5)
        self.assertEqual(page.answers[0].gist, (503, "shutting-down"))

    def test_bytes_behind_it(self) -> None:
        """Frames come in whatever pieces the network makes of them."""
        page = self.page()
        data = frame(b'{"function":"now","args":[1],"id":1}') + frame(
            b'{"function":"now","args":[2],"id":2}'
        )
        for n in range(len(data)):
            page.say(data[n : n + 1])
        self.assertEqual(page.gist, [(1, [1]), (2, [2])])

    def test_no_time_limit_of_http(self) -> None:
        """HTTP's limits hold no more."""
        page = self.page()
        for _ in range(20):
            self.world.settle(10)
            page.say(frame(b""))
        page.call_task("now", id=1)
        self.assertEqual(page.gist, [(1, [])])
        self.assertIsNone(page.code)


class CallTests(SocketsTestCase):
    def test_calls(self) -> None:
        """Calls are made and answered as on the wire."""
        page = self.page()
        page.call_task("later", "a", id=1)
        page.call_task("now", "é", id=2)
        page.call_task("now", 3)
        page.call_task("nowhere", id=4)
        self.assertEqual(page.messages[:2], [{"id": 2, "result": ["é"]}, [3]])
        self.assertEqual(page.messages[2]["error"]["code"], "unknown-function")
        self.assertEqual(self.counts(), (1, 1, 1))
        self.world.finish("a")
        self.assertEqual(page.messages[3], {"id": 1, "result": "done"})
        self.assertEqual(self.counts(), (1, 0, 1))
        self.assertEqual(self.figures.get("messages"), 4)

    def test_progress(self) -> None:
        """What a task reports comes before its result."""
        page = self.page()
        page.call_task("reports", "a", id=1, progress=True)
        self.world.finish("a")
        self.assertEqual(
            page.messages,
            [
                {"id": 1, "progress": {"done": 1, "total": 2, "message": "half"}},
                {"id": 1, "result": "done"},
            ],
        )

    def test_cancel(self) -> None:
        """A page takes a call back."""
        page = self.page()
        page.call_task("later", "a", id=1)
        page.call_task("taskd.cancel", 1, id=2)
        self.assertCountEqual(page.gist, [(1, "cancelled"), (2, True)])
        self.assertEqual(self.world.tasks.cancelled, ["a"])

    def test_long_replies(self) -> None:
        """A result may be longer than a message that comes in."""
        page = self.page()
        for number in range(3):
            text = "x" * (LONGEST - 100)
            page.call_task("now", text, *[number], id=number)
        long = "x" * 70_000
        page.call_task("later", "a", id=9)
        self.world.finish("a", long)
        self.assertEqual(page.messages[-1], {"id": 9, "result": long})

    def test_parts(self) -> None:
        """A message may come in parts, with a ping between them."""
        page = self.page()
        page.say(frame(b'{"function":"now",', is_last=False))
        page.say(frame(b"are you there", PING))
        page.say(frame(b"", 0, is_last=False))
        page.say(frame(b'"args":[1],"id":1}', 0))
        self.assertEqual(page.frames[0], (PONG, b"are you there"))
        self.assertEqual(page.gist, [(1, [1])])

    def test_what_is_not_allowed(self) -> None:
        """What is not allowed is refused and logged, and the WebSocket stays open."""
        self.meet(allow=(("*", ("now",)),))
        page = self.page()
        page.call_task("later", "a", id=1)
        page.call_task("now", id=2)
        self.assertEqual(page.gist, [(1, "unauthorized"), (2, [])])
        self.assertIsNone(page.code)


class MistakeTests(SocketsTestCase):
    def assertEnds(self, page: Page, code: int, *gist: Any) -> None:
        self.assertEqual(page.gist, list(gist))
        self.assertEqual(page.code, code)
        page.say(frame(struct.pack(">H", 1000), CLOSE))
        self.assertTrue(page.transport.disconnecting)
        page.go()
        self.assertEqual(self.counts(), (0, 0, 0))
        self.assertEqual(self.world.tasks.asked, [])

    def test_malformed(self) -> None:
        """What is no request is answered, and the WebSocket closed; nothing behind it is read."""
        for message in (b"x", b"[]", b'{"function": 1}', b"\xff\xfe", b'{"function":"now"'):
            page = self.page()
            page.say(frame(message) + frame(b'{"function":"now","id":2}'))
            self.assertEnds(page, POLICY, (None, "malformed"))

    def test_binary(self) -> None:
        """Messages are text."""
        page = self.page()
        page.say(frame(b'{"function":"now","id":1}', BINARY) + frame(b'{"function":"now","id":2}'))
        self.assertEnds(page, UNSUPPORTED)

    def test_too_long(self) -> None:
        """What is too long is refused by its length, in one frame or in parts."""
        page = self.page()
        page.say(frame(b"x" * (LONGEST + 1)))
        self.assertEqual((page.gist, page.code), ([], 1009))
        page = self.page()
        page.say(frame(b"x" * LONGEST, is_last=False))
        self.assertIsNone(page.code)
        page.say(frame(b"x", 0))
        self.assertEqual((page.gist, page.code), ([], 1009))
        page = self.page()
        page.say(frame(b"x" * 2**20)[:14])  # the header alone
        self.assertEqual(page.code, 1009)

    def test_the_longest(self) -> None:
        """A message of the longest length is taken."""
        page = self.page()
        message = b'{"function":"now","id":1,"args":["%b"]}'
        page.say(frame(message % (b"x" * (LONGEST - len(message) + 2))))
        self.assertEqual(page.messages[0]["id"], 1)

    def test_broken_frames(self) -> None:
        """What breaks the protocol of WebSockets ends it."""
        for data in (
            frame(b"{}", is_masked=False),
            b"\xf1\x80" + MASK,
            frame(b"", 3),
            frame(b"x", 0),
            frame(b"x" * 126, PING),
            frame(b"x", PING, is_last=False),
            frame(b"x", is_last=False) + frame(b"x"),
            frame(b"\x00", CLOSE),
            frame(struct.pack(">H", 1005), CLOSE),
        ):
            page = self.page()
            page.say(data + frame(b'{"function":"now","id":2}'))
            self.assertIn(page.code, (1002, 1007), data)
            self.assertEqual(page.messages, [])
            page.go()
        self.assertEqual(self.counts(), (0, 0, 0))
        self.assertEqual(self.world.tasks.asked, [])

    def test_too_many_frames(self) -> None:
        """Who sends far more frames than it may send messages is cut off, without a word."""
        self.meet(max_rate=1.0)
        page = self.page()
        page.say(frame(b"", PONG) * 2000)
        self.assertFalse(page.transport.is_aborted)
        page.say(frame(b"", PONG) * 3)
        self.assertTrue(page.transport.is_aborted)
        page.go()
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_empty_parts(self) -> None:
        """Endless empty parts of a message take no memory."""
        page = self.page()
        page.say(frame(b"", is_last=False))
        page.say(frame(b"", 0, is_last=False) * 5000)
        self.assertEqual([len(d) for d in (page.socket.message_data,)], [0])

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.tuples(
                    st.sampled_from(
                        [
                            *(b'{"function":"now","id":1}', b'{"function":"later","args":["a"]}'),
                            *(b"", b"x", b'{"function":"taskd.cancel","args":[1]}', b"\x03\xe8"),
                            b'{"function":"taskd.auth","args":["no"]}',
                        ]
                    ),
                    st.sampled_from([0, TEXT, TEXT, TEXT, BINARY, CLOSE, PING, PONG, 3]),
                    st.booleans(),
                ).map(lambda each: frame(each[0], each[1], is_last=each[2])),
                st.binary(max_size=8),
                st.floats(0, 30),
            ),
            max_size=15,
        ),
        st.booleans(),
    )
    def test_whatever_is_sent(self, pieces: list[bytes | float], asks: bool) -> None:
        """Whatever comes, in whatever order and time, nothing breaks and all is let go of."""
        self.meet(tokens={"web": TOKEN} if asks else None)
        page = self.page()
        for piece in pieces:
            if isinstance(piece, float):
                self.world.settle(piece)
            elif not page.transport.disconnecting:
                page.say(piece)
        self.world.settle(1)
        page.go()
        for label in list(self.world.tasks.held):
            self.world.finish(label)
        self.assertEqual(self.counts(), (0, 0, 0))
        self.assertEqual(self.world.slot.callers, {})
        self.assertEqual(self.flushLoggedErrors(), [])


class WholeFrameTests(SocketsTestCase):
    """What is one whole frame goes past autobahn, and nobody can tell the difference."""

    def outcome(self, data: bytes, cuts: list[int], *, by_autobahn: bool) -> tuple[Any, ...]:
        """Send bytes in pieces; give what came back, and what the conversation took."""
        self.meet()
        page = self.page()
        socket = page.socket
        if by_autobahn:
            socket._take_whole = lambda given: given
        taken: list[bytes] = []
        receive = socket.conversation.receive

        def take(message: bytes) -> None:
            taken.append(message)
            receive(message)

        socket.conversation.receive = take
        for begin, end in pairwise([0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]):
            if not page.transport.disconnecting:
                page.say(data[begin:end])
        self.world.settle(1)
        frames, state = page.frames, socket.state
        page.go()
        self.flushLoggedErrors()
        return taken, frames, state

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(
                    [
                        *(b"", b'{"function":"now","id":1}', b"x", b"\x03\xe8", b"\xff"),
                        *(b" " * 125, b" " * 126, b" " * 300, b" " * (LONGEST + 1)),
                        b'{"function":"taskd.cancel","args":[1],"id":2}',
                    ]
                ),
                st.sampled_from([TEXT, TEXT, TEXT, TEXT, 0, BINARY, CLOSE, PING, PONG, 3]),
                st.sampled_from([True, True, True, False]),
                st.sampled_from([True, True, True, True, True, False]),
            ).map(lambda each: frame(each[0], each[1], is_last=each[2], is_masked=each[3])),
            max_size=8,
        ).map(b"".join),
        st.lists(st.integers(0, 4000), max_size=4),
    )
    def test_like_autobahn(self, data: bytes, cuts: list[int]) -> None:
        """The same messages come of the same bytes, cut wherever, and the same answers."""
        self.assertEqual(
            self.outcome(data, cuts, by_autobahn=False), self.outcome(data, cuts, by_autobahn=True)
        )

    def test_it_is_taken(self) -> None:
        """A whole frame does go past autobahn, of every length that it can have."""
        self.meet()
        page = self.page()
        page.socket._dataReceived = self.fail
        for size in (60, 125, 126, 127, 1000):
            message = b'{"function":"taskd.cancel","args":["%b"]}'
            page.say(frame(message % (b"a" * (size - len(message) + 2))))
        self.assertEqual(page.messages, [False] * 5)


class EndTests(SocketsTestCase):
    def test_who_closes(self) -> None:
        """Who closes has its close answered, and its calls go on."""
        page = self.page()
        page.call_task("later", "a", id=1)
        page.call_task("later", "b", id=2, cancel_on_disconnect=True)
        page.say(frame(struct.pack(">H", 1000), CLOSE))
        self.assertEqual(page.code, 1000)
        page.go()
        self.assertEqual(self.counts(), (0, 0, 0))
        self.assertEqual(self.world.tasks.cancelled, ["b"])
        self.world.finish("a")
        self.assertEqual(page.messages, [])
        self.assertEqual(self.world.backend.tenant().visitors, 1)

    def test_who_vanishes(self) -> None:
        """A connection that ends without a close is let go of, once."""
        left: list[int] = []
        self.world.site.on_room = lambda: left.append(1)
        page = self.page()
        page.call_task("later", "a", id=1)
        page.go(ConnectionLost())
        self.assertEqual((self.counts(), left), ((0, 0, 0), [1]))
        self.world.finish("a")
        self.assertEqual(self.world.loop.getDelayedCalls(), [])

    def test_a_close_that_is_not_answered(self) -> None:
        """Who does not answer a close is cut off two seconds later."""
        page = self.page()
        page.say(frame(b"x"))
        self.assertEqual(page.code, POLICY)
        self.world.settle(1.5)
        self.assertFalse(page.transport.disconnecting)
        self.world.settle(1)
        self.assertTrue(page.transport.disconnecting)

    def test_a_stop(self) -> None:
        """At a stop who has nothing in flight is closed at once, the others when they have not."""
        idle, busy = self.page(), self.page()
        busy.call_task("later", "a", id=1)
        self.world.browsers.drain()
        self.assertEqual((idle.code, busy.code), (RESTART, None))
        busy.call_task("now", id=2)
        self.assertEqual(busy.gist, [(2, "shutting-down")])
        self.world.finish("a")
        self.assertEqual((busy.gist[-1], busy.code), ((1, "done"), RESTART))

    def test_the_end_of_the_grace(self) -> None:
        """When the grace is over all are closed, whatever is in flight."""
        page = self.page()
        page.call_task("later", "a", id=1)
        self.world.browsers.end()
        self.assertEqual(page.code, RESTART)
        self.world.finish("a")
        self.assertEqual(page.messages, [])
        page.go()
        self.assertEqual(self.counts(), (0, 0, 0))


class TokenTests(SocketsTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.meet(tokens={"web": TOKEN, "ops": OTHER}, cookie="session")

    def test_in_a_message(self) -> None:
        """A page says who it is in its first message; what is behind it may follow at once."""
        page = self.page()
        page.say(
            frame(json.dumps({"function": "taskd.auth", "args": [TOKEN], "id": 1}).encode())
            + frame(b'{"function":"now","id":2}')
        )
        self.assertEqual(page.gist, [(1, "web"), (2, [])])
        self.assertEqual(self.world.slot.callers, {"web": 1})
        self.assertEqual(self.world.shown[-1], TOKEN)
        page.go()
        self.assertEqual(self.world.slot.callers, {})

    def test_in_the_handshake(self) -> None:
        """A page whose browser has shown a cookie, or a program's token, is known already."""
        for headers in ({"cookie": f"session={TOKEN}"}, {"authorization": f"Bearer {TOKEN}"}):
            page = self.page(**headers)
            page.call_task("now", id=1)
            self.assertEqual(page.gist, [(1, [])])
            self.assertEqual(self.world.slot.callers, {"web": 1})
            page.go()

    def test_a_stranger(self) -> None:
        """Who calls before it has said who it is is told so, and closed."""
        page = self.page()
        page.call_task("now", id=1)
        self.assertEqual((page.gist, page.code), ([(1, "unauthorized")], UNAUTHORIZED))

    def test_who_says_nothing(self) -> None:
        """Who does not say within half a minute who it is is closed; who has said it stays."""
        silent, known = self.page(), self.page()
        known.call_task("taskd.auth", TOKEN)
        for _ in range(3):
            self.world.settle(9.9)
            silent.say(frame(b""))
            known.say(frame(b""))
        self.assertIsNone(silent.code)
        self.world.settle(0.4)
        self.assertEqual((silent.code, known.code), (UNAUTHORIZED, None))

    def test_a_stranger_that_goes(self) -> None:
        """Nothing waits for who has gone before it said who it is."""
        page = self.page()
        page.go()
        self.assertEqual(self.world.loop.getDelayedCalls(), [])

    def test_a_wrong_token(self) -> None:
        """A wrong token is answered late; until then nothing is read, and what came waits."""
        page = self.page()
        page.call_task("taskd.auth", "wrong", id=1)
        self.assertFalse(page.transport.is_read)
        page.call_task("now", id=2)
        self.world.settle(0.4)
        self.assertEqual(page.messages, [])
        self.world.settle(0.2)
        self.assertEqual((page.gist, page.code), ([(1, "unauthorized")], UNAUTHORIZED))
        self.assertTrue(page.transport.is_read)
        self.assertEqual(self.world.tasks.asked, [])

    def test_who_has_gone_meanwhile(self) -> None:
        """Who goes before its token was looked at leaves nothing behind."""
        self.page().call_task("taskd.auth", "wrong")
        self.world.settle(1)
        page = self.page()
        page.call_task("taskd.auth", TOKEN)
        page.go()
        self.world.settle(5)
        self.assertEqual(self.world.slot.callers, {})

    def test_another_token(self) -> None:
        """Who shows another token is that one's from then on."""
        page = self.page()
        page.call_task("taskd.auth", TOKEN)
        page.call_task("taskd.auth", OTHER)
        self.assertEqual(self.world.slot.callers, {"ops": 1})
        self.assertEqual(page.messages, ["web", "ops"])

    def test_a_stop_meanwhile(self) -> None:
        """A stop waits for the answer to a token."""
        page = self.page()
        page.call_task("taskd.auth", "wrong", id=1)
        self.world.browsers.drain()
        self.assertIsNone(page.code)
        self.world.settle(1)
        self.assertEqual((page.gist, page.code), ([(1, "unauthorized")], UNAUTHORIZED))


class ReadingTests(SocketsTestCase):
    """Browsers that do not read."""

    def test_not_read_from(self) -> None:
        """Who does not read is not read from, until it does."""
        page = self.page()
        page.transport.producer.pauseProducing()
        self.assertFalse(page.transport.is_read)
        page.transport.producer.resumeProducing()
        self.assertTrue(page.transport.is_read)

    def test_progress_is_left_out(self) -> None:
        """Who is behind with reading gets no progress, and every result."""
        page = self.page()
        page.transport.producer.pauseProducing()
        page.call_task("reports", "a", id=1, progress=True)
        self.world.finish("a")
        self.assertEqual(page.messages, [{"id": 1, "result": "done"}])

    def test_both(self) -> None:
        """Who is behind and in question is read from when it is neither."""
        self.meet(tokens={"web": TOKEN})
        page = self.page()
        page.call_task("taskd.auth", "wrong")
        page.transport.producer.pauseProducing()
        page.transport.producer.resumeProducing()
        self.assertFalse(page.transport.is_read)
        page.transport.producer.pauseProducing()
        self.world.settle(1)
        self.assertFalse(page.transport.is_read)
        page.transport.producer.resumeProducing()
        self.assertTrue(page.transport.is_read)

    def test_too_much(self) -> None:
        """Who leaves 64 MiB unread is cut off."""
        page = self.page()
        for unsent, is_over in ((64 * 2**20, False), (64 * 2**20 + 1, True)):
            page.transport.unsent_bytes = unsent
            page.call_task("now", id=1)
            self.assertIs(page.transport.is_aborted, is_over)


class LifeTests(SocketsTestCase):
    """Signs of life."""

    def test_a_ping(self) -> None:
        """A WebSocket is asked for a sign of life every so often."""
        page = self.page()
        self.world.settle(19.5)
        self.assertEqual(page.frames, [])
        self.world.settle(0.6)
        self.assertEqual(page.count, {PING: 1})

    def test_an_answer(self) -> None:
        """Who answers stays."""
        page = self.page()
        for _ in range(10):
            self.world.settle(20.1)
            opcode, payload = page.frames[-1]
            self.assertEqual(opcode, PING)
            page.say(frame(payload, PONG))
        self.assertFalse(page.transport.is_aborted)
        self.assertEqual(page.count, {PING: 10})
        self.assertEqual(self.figures.get("silent"), 0)

    def test_silence(self) -> None:
        """Who does not answer in the same time is cut off, and counted."""
        page = self.page()
        self.world.settle(20.1)
        self.world.settle(19.5)
        self.assertFalse(page.transport.is_aborted)
        self.world.settle(0.8)
        self.assertTrue(page.transport.is_aborted)
        self.assertEqual(self.figures.get("silent"), 1)
        page.go(ConnectionLost())
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_who_still_reads(self) -> None:
        """Who is behind, and reads on, gives a sign of life by that; who stops is cut off."""
        page = self.page()
        page.transport.unsent_bytes = 1000
        page.transport.producer.pauseProducing()
        self.world.settle(20.1)
        for left in (900, 500, 100):
            page.transport.unsent_bytes = left
            self.world.settle(20.1)
            self.assertFalse(page.transport.is_aborted)
        self.world.settle(20.1)
        self.assertTrue(page.transport.is_aborted)


class FeedTests(SocketsTestCase):
    def page(self, path: str = "/live", **headers: str) -> Page:
        return super().page(path, **headers)

    def test_what_it_shows(self) -> None:
        """A dashboard is shown what there was, and then what is new."""
        page = self.page()
        (first,) = page.messages
        self.assertEqual((first["kind"], first["history"]), ("hello", []))
        self.world.feed.show({"kind": "now", "text": "é"})
        self.assertEqual(page.messages[1], {"kind": "now", "text": "é"})
        page.go()
        self.world.feed.show({"kind": "now"})
        self.assertEqual(self.counts(), (0, 0, 0))

    def test_the_daemons(self) -> None:
        """Once a second it is shown what the daemons do; who comes later what they did."""
        self.world.told["taskd.status"] = {"queue": {"waiting": 3}, "functions": []}
        page = self.page()
        self.world.watch.start()
        for _ in range(3):
            self.world.settle(1.01)
        news = [message for message in page.messages if message["kind"] == "now"]
        self.assertGreaterEqual(len(news), 3)
        self.assertEqual(news[0]["sample"]["waiting"], 3)
        self.assertEqual(news[0]["nodes"][0]["name"], "daemon")
        self.assertEqual(news[0]["gateway"]["websockets"], 1)
        self.assertEqual(len(self.page().messages[0]["history"]), len(news))

    def test_who_is_behind(self) -> None:
        """Who is behind with reading misses what is new."""
        page = self.page()
        page.transport.producer.pauseProducing()
        self.world.feed.show({"kind": "now"})
        self.assertEqual(len(page.messages), 1)

    def test_who_may_not(self) -> None:
        """Who may not see it is shown nothing, and told so by the close."""
        self.meet(watchers={"ops": WATCHING})
        for headers in ({}, {"cookie": "taskd_dashboard=0"}, {"authorization": f"Bearer {TOKEN}"}):
            page = self.page(**headers)
            self.world.feed.show({"kind": "now"})
            self.assertEqual((page.messages, page.code), ([], UNAUTHORIZED))

    def test_who_may(self) -> None:
        """Who has the dashboard's cookie sees it."""
        self.meet(watchers={"ops": WATCHING})
        cookie = self.world.get("/", authorization=f"Bearer {WATCHING}").headers["set-cookie"]
        page = self.page(cookie=cookie.partition(";")[0])
        self.assertEqual(page.messages[0]["kind"], "hello")

    def test_who_says_something(self) -> None:
        """A dashboard looks on; one that says something is closed."""
        page = self.page()
        page.call_task("now", id=1)
        self.assertEqual((len(page.messages), page.code), (1, UNSUPPORTED))
        self.assertEqual(self.world.tasks.asked, [])

    def test_a_stop(self) -> None:
        """At a stop all are closed."""
        page = self.page()
        self.world.feed.end()
        self.assertEqual(page.code, GOING_AWAY)
