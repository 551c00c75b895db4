"""The wire's messages over a WebSocket, as a client that is not ours sends them, or none would."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Final

from tests.integration.daemon import wait_until
from tests.integration.gateway import (
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    GatewayTestCase,
    frame,
    shared_gateway,
)

MAX_MESSAGE: Final = 64 * 1024
OPTIONS: Final = ("--allow=*", f"--max-message={MAX_MESSAGE}", "--max-rate=1000000")

UNSUPPORTED: Final = 1003
PROTOCOL: Final = 1002
POLICY: Final = 1008
TOO_LONG: Final = 1009

MOST_GROWTH_MIB: Final = 24


def resident_mib(pid: int) -> float:
    """Tell how much memory a process holds."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


class ProtocolTestCase(GatewayTestCase):
    """Base of tests that share one gateway, which lets all be called."""

    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway(*OPTIONS)


class ReplyTests(ProtocolTestCase):
    def test_results(self) -> None:
        """A result is bare without an id, and an object with one; the id may be any JSON."""
        web = self.open(self.gateway)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assertEqual(web.ask("add", {"b": 1, "a": 2}), 3)
        self.assertEqual(
            web.ask("mail.from", {"from": "ä\u2028\U0001f600"})[0], "ä\u2028\U0001f600"
        )
        for name in (7, "x", None, [1, {"a": 1.5}], False):
            self.assertEqual(web.ask("add", [1, 2], id=name), {"id": name, "result": 3})
        self.assertEqual(web.ask("taskd.ping"), "pong")

    def test_errors(self) -> None:
        """What fails is told by its code, and the WebSocket stays open."""
        web = self.open(self.gateway)
        self.assert_error(web.ask("no_such_task"), "unknown-function", "no_such_task")
        self.assert_error(web.ask("add", [1]), "bad-arguments", "'b'")
        self.assert_error(web.ask("taskd.cancel", [1, 2]), "bad-arguments")
        error = self.assert_error(web.ask("fail", ["oh"]), "task-failed", "oh")
        self.assertEqual((error["type"], error["retryable"]), ("ValueError", False))
        held = self.path(self.daemon)
        reply = web.ask("hold_on_reactor", [held], timeout=0.05, id=1)
        self.assertEqual(reply["id"], 1)
        self.assert_error(reply, "time-limit")
        self.assert_error(web.ask("add", [1, 2], priority=1), "unauthorized", "priority")
        self.assertEqual(web.ask("add", [1, 2], priority=-1), 3)

    def test_progress(self) -> None:
        """Progress comes before the reply, to who asks for it."""
        web, path = self.open(self.gateway), self.path(self.daemon)
        web.request("climb", [path, 2], id=1, progress=True)
        for step in (1, 2):
            progress = {"done": step, "total": 2, "message": f"step {step}"}
            self.assertEqual(web.reply(), {"id": 1, "progress": progress})
            Path(f"{path}.{step}").touch()
        self.assertIn(web.reply()["result"], self.daemon.workers().values())
        self.assertEqual(web.ask("count", [3], id=2), {"id": 2, "result": 3})

    def test_order(self) -> None:
        """Replies without an id come in the order of the requests, those with one as they may."""
        web = self.open(self.gateway)
        path = self.begin(self.daemon, web, "hold")
        web.request("no_such_task")
        web.request("add", [1, 2])
        web.request("add", [1, 3], id=1)
        self.assertEqual(web.reply(), {"id": 1, "result": 4})
        Path(path).touch()
        self.assertEqual(web.reply(), "released")
        self.assert_error(web.reply(), "unknown-function")
        self.assertEqual(web.reply(), 3)

    def test_pipelining(self) -> None:
        """60 requests at once are all answered, by their ids or by their order."""
        web = self.open(self.gateway)
        for number in range(30):
            web.request("add", [number, 1], id=number)
            web.request("later", [number])
        replies = [web.reply() for _ in range(60)]
        by_id = {reply["id"]: reply["result"] for reply in replies if isinstance(reply, dict)}
        self.assertEqual(by_id, {number: number + 1 for number in range(30)})
        self.assertEqual([r for r in replies if not isinstance(r, dict)], list(range(30)))

    def test_cancel(self) -> None:
        """A call is cancelled by its id, in the daemon too; that of another WebSocket is not."""
        web, other = self.open(self.gateway), self.open(self.gateway)
        path = self.begin(self.daemon, web, "tell_of_cancel", id="x")
        self.assertIs(other.ask("taskd.cancel", ["x"]), False)
        web.request("taskd.cancel", ["x"], id="c")
        replies = web.replies_by_id(2)
        self.assertIs(replies["c"]["result"], True)
        self.assert_error(replies["x"], "cancelled")
        wait_until(lambda: Path(path).exists(), what="the cancel in the task")

    def test_keep_alive(self) -> None:
        """An empty message is not answered."""
        web = self.open(self.gateway)
        web.send("")
        web.request("add", [1, 2])
        web.send("")
        self.assertEqual(web.reply(), 3)
        self.assertEqual(web.ask("add", [1, 3]), 4)

    def test_long_results(self) -> None:
        """A result may be longer than the longest message that comes in."""
        web = self.open(self.gateway)
        for number in (MAX_MESSAGE, 16 * MAX_MESSAGE, 100 * MAX_MESSAGE):
            self.assertEqual(web.ask("letters", [number]), "x" * number)

    def test_longest_message(self) -> None:
        """A message may have --max-message bytes, in one frame or in many."""
        web = self.open(self.gateway)
        empty = json.dumps({"function": "echo", "args": [""]})
        text = "x" * (MAX_MESSAGE - len(empty))
        self.assertEqual(web.ask("echo", [text]), text)
        message = json.dumps({"function": "echo", "args": [text]})
        web.send(message[at : at + 1000] for at in range(0, len(message), 1000))
        self.assertEqual(web.reply(), text)

    def test_subprotocol(self) -> None:
        """The subprotocol ``taskd`` is chosen where it is offered, and none in its place."""
        for offered, chosen in ((["other", "taskd"], "taskd"), (["other"], None), (None, None)):
            web = self.open(self.gateway, subprotocols=offered)
            self.assertEqual(web.connected.subprotocol, chosen)
            self.assertEqual(web.ask("add", [1, 2]), 3)

    def test_no_compression(self) -> None:
        """What would be unpacked here is not agreed on."""
        web = self.open(self.gateway, compression="deflate")
        self.assertEqual(web.connected.protocol.extensions, [])


class RefusedTests(ProtocolTestCase):
    def test_binary(self) -> None:
        """A binary message closes with 1003; nothing is answered."""
        web, path = self.open(self.gateway), self.path(self.daemon)
        web.send(json.dumps({"function": "touch", "args": [path]}).encode())
        self.assertEqual(web.rest(), ([], UNSUPPORTED))
        self.assert_not_run(path)

    def assert_not_run(self, path: str) -> None:
        """What was asked for before this has not been run."""
        self.assertEqual(self.open(self.gateway).ask("add", [1, 2]), 3)
        self.assertFalse(Path(path).exists())

    def test_malformed(self) -> None:
        """What is no request is answered, then closed with 1008, and the rest is not looked at."""
        for text in (
            '{"function": "add"',
            "[]",
            "null",
            '{"function": 1}',
            '{"function": "add", "argz": []}',
            '{"function": "add", "args": [1, NaN]}',
            '{"function": "echo", "args": [1]}\n{"function": "echo", "args": [1]}',
            "POST / HTTP/1.1",
        ):
            web, path = self.open(self.gateway), self.path(self.daemon)
            web.request("later", [1], id=1)
            web.send(text)
            web.request("touch", [path])
            messages, code = web.rest()
            self.assertEqual(code, POLICY, text)
            self.assertIn({"id": 1, "result": 1}, messages)
            (error,) = (message for message in messages if "error" in message)
            self.assert_error(error, "malformed")
            self.assert_not_run(path)

    def test_no_utf8(self) -> None:
        """A text that is not UTF-8 is no request."""
        raw = self.raw_socket(self.gateway)
        raw.send_frame(TEXT, b'{"function": "echo", "args": ["\xff"]}')
        kind, data = raw.read_frame()
        self.assertEqual(kind, TEXT)
        self.assert_error(json.loads(data), "malformed")
        self.assertEqual(raw.close_code(), POLICY)

    def test_broken_frames(self) -> None:
        """Frames that RFC 6455 forbids are answered with a close of 1002, and nothing is run."""
        path = self.path(self.daemon)
        request = json.dumps({"function": "touch", "args": [path]}).encode()
        for what, data in {
            "not masked": frame(TEXT, request, is_masked=False),
            "a reserved bit": bytes([0xC1]) + frame(TEXT, request)[1:],
            "a reserved kind": frame(3, request),
            "a continuation of nothing": frame(CONTINUATION, request),
            "a message within another": frame(TEXT, b"{", ends=False) + frame(TEXT, request),
            "a ping in parts": frame(PING, b"", ends=False),
            "a long ping": frame(PING, b"x" * 126),
            "a close of one byte": frame(CLOSE, b"x"),
            "a close with a code that is none": frame(CLOSE, (1005).to_bytes(2, "big")),
        }.items():
            raw = self.raw_socket(self.gateway)
            raw.send(data)
            self.assertEqual(raw.close_code(), PROTOCOL, what)
        self.assert_not_run(path)

    def test_too_long(self) -> None:
        """A message that is too long closes with 1009, in one frame or in many."""
        text = "x" * MAX_MESSAGE
        web = self.open(self.gateway)
        web.request("echo", [text])
        self.assertEqual(web.rest(), ([], TOO_LONG))
        web = self.open(self.gateway)
        web.send(iter([text[:1000]] * 66))
        self.assertEqual(web.rest(), ([], TOO_LONG))

    def test_announced_length(self) -> None:
        """A frame that announces too much is refused before any of it comes."""
        for length in (MAX_MESSAGE + 1, 2**40, 2**63 - 1):
            raw = self.raw_socket(self.gateway)
            raw.send(bytes([0x81, 0xFF]) + length.to_bytes(8, "big") + bytes(4))
            self.assertEqual(raw.close_code(), TOO_LONG, length)


class MemoryTests(ProtocolTestCase):
    def setUp(self) -> None:
        super().setUp()
        (self.pid,) = self.gateway.serving().values()
        self.before = resident_mib(self.pid)

    def assert_small(self, most_mib: float = MOST_GROWTH_MIB) -> None:
        """The gateway goes on, and has not grown."""
        self.assertEqual(self.open(self.gateway).ask("add", [1, 2]), 3)
        self.assertLess(resident_mib(self.pid) - self.before, most_mib)

    def test_parts_without_an_end(self) -> None:
        """A message of parts without an end is refused once it is too long; small ones, too."""
        for part in (b"x" * 1000, b"x"):
            raw = self.raw_socket(self.gateway)
            raw.send(frame(TEXT, b"x", ends=False))
            parts = frame(CONTINUATION, part, ends=False) * (2**20 // len(part) // 8)
            with contextlib.suppress(ConnectionError):  # it is cut off, if it is not too late
                for _ in range(32):
                    raw.send(parts)
            self.assertTrue(raw.is_hung_up())
            self.assert_small()

    def test_empty_parts(self) -> None:
        """Of empty parts a message may have as many as there are: they cost nothing."""
        raw = self.raw_socket(self.gateway)
        raw.send(frame(TEXT, b"", ends=False))
        parts = frame(CONTINUATION, b"", ends=False) * 100_000
        for _ in range(6):
            raw.send(parts)
        raw.send(frame(PING))
        self.assertEqual(raw.read_frame()[0], PONG)
        self.assert_small(3)
        raw.send(frame(CONTINUATION, b'{"function": "add", "args": [1, 2]}'))
        self.assertEqual(raw.read_frame(), (TEXT, b"3"))

    def test_pings_of_who_does_not_read(self) -> None:
        """Who pings without an end, and reads nothing of the answers, is not read from."""
        raw = self.raw_socket(self.gateway, receive_bytes=4096)
        raw.socket.setblocking(False)
        pings = frame(PING, b"x" * 125) * 500
        sent = 0

        def is_stuck() -> bool:
            nonlocal sent
            try:
                sent += raw.socket.send(pings)
            except BlockingIOError:
                return True
            return sent > 256 * 2**20

        wait_until(is_stuck, what="an end of reading")
        self.assertLess(sent, 256 * 2**20)
        self.assert_small()
