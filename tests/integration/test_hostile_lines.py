"""Lines that are too long, too deep, not UTF-8, not JSON, or nothing at all."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from tests.integration.crowd import Crowd, HostileTestCase, cpu_seconds
from tests.integration.daemon import Connection, wait_until

MEBIBYTE = 2**20
FRAME = b'{"function":"echo","args":["%s"]}'
MOST = 2000
SEED = 0


def line_of(length: int) -> bytes:
    """Make a request of that many bytes, its end not counted."""
    return FRAME % (b"x" * (length - len(FRAME % b"")))


class LongLineTests(HostileTestCase):
    def in_pieces(self, connection: Connection, data: bytes, dice: random.Random) -> None:
        """Send in pieces of all sizes."""
        ends = sorted(dice.choices(range(len(data)), k=dice.randrange(4)))
        for begin, end in itertools.pairwise([0, *ends, len(data)]):
            connection.send(data[begin:end])

    def test_just_short_enough(self) -> None:
        """Lines up to ``--max-line`` are taken, however they are cut and ended."""
        daemon, dice = self.start("--max-line", str(MOST), procs=1), random.Random(SEED)
        with self.unharmed(daemon, most_mib=16), daemon.connect() as connection:
            for _ in range(60):
                lengths = [MOST - dice.randrange(3) for _ in range(3)]
                lines = [line_of(n) + dice.choice((b"\n", b"\r\n")) for n in lengths]
                self.in_pieces(connection, b"".join(lines), dice)
                for length in lengths:
                    self.assertEqual(len(connection.reply()), length - len(FRAME % b""))

    def test_just_too_long(self) -> None:
        """A line one byte longer is refused, however it is cut, and nothing behind it is read."""
        daemon, dice = self.start("--max-line", str(MOST), procs=1), random.Random(SEED)
        with self.unharmed(daemon, most_mib=16):
            for number in range(300):
                with daemon.connect() as connection:
                    end = (b"\n", b"\r\n", b"\rx", b"x")[number % 4]
                    before = (b"", line_of(MOST) + b"\r\n")[number % 2]
                    data = before + line_of(MOST + 1) + end
                    self.in_pieces(connection, data + line_of(100) * (number % 3), dice)
                    if before:
                        self.assertEqual(len(connection.reply()), MOST - len(FRAME % b""))
                    self.assert_error(connection.reply(), "line-too-long", str(MOST))
                    self.assertEqual(connection.rest(), b"")

    def test_line_without_an_end(self) -> None:
        """Who streams without an end is told so and cut off, and nothing of it is kept."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=24) as others:
            crowd = self.crowd(daemon, 4, itertools.repeat(b"x" * MEBIBYTE))
            wait_until(lambda: self.are_cut_off(crowd), what="the end of those that stream")
            others.wait_for_more()
            streamed = sum(peer.sent for peer in crowd) / MEBIBYTE
            self.assertGreater(streamed, 100)
            self.tell(f"{streamed:.0f} MiB were thrown away")
            for peer in crowd:
                (reply,) = peer.replies()
                self.assert_error(reply, "line-too-long")

    def are_cut_off(self, crowd: Crowd) -> bool:
        crowd.push()
        crowd.hear()
        return all(peer.is_cut_off for peer in crowd)


def echo_of(text: bytes) -> bytes:
    """Ask for the echo of a value."""
    return b'{"function":"echo","args":[%s]}' % text


def filled(text: bytes) -> bytes:
    """Repeat a value within an array until it fills a line."""
    return b"[" + b",".join([text] * (1_040_000 // (len(text) + 1))) + b"]"


DEEP = 100_000

RIGHT: dict[str, tuple[bytes, Any]] = {
    "zero below zero": (b"-0", 0),
    "largest integer": (b"1" + b"0" * 4299, 10**4299),
    "smallest integer": (b"-1" + b"0" * 4299, -(10**4299)),
    "largest double": (b"1.7976931348623157e308", 1.7976931348623157e308),
    "nearly nothing": (b"1e-400", 0.0),
    "a million digits behind the point": (b"0." + b"1" * 1_000_000, 1 / 9),
    "brackets in a string": (b'"' + b"[" * DEEP + b'"', "[" * DEEP),
    "escaped quotes": (b'"' + b'\\"' * DEEP + b'"', '"' * DEEP),
    "escaped NUL": (b'"\\u0000"', "\0"),
    "a pair of surrogates": (b'"\\ud83d\\ude00"', "\U0001f600"),
    "byte order mark in a string": (b'"\xef\xbb\xbf"', "\ufeff"),
    "63 brackets": (b"[" * 62 + b"]" * 62, None),
}

DEAR: dict[str, bytes] = {
    name: filled(text)
    for name, text in {
        "empty objects": b"{}",
        "empty arrays": b"[]",
        "numbers": b"1.0e0",
        "long integers": b"1" * 4299,
        "escapes": b'"\\u0041"',
    }.items()
}

MALFORMED: dict[str, bytes] = {
    "brackets": b"[" * DEEP,
    "brackets that end": echo_of(b"[" * DEEP + b"]" * DEEP),
    "objects in objects": echo_of(b'{"a":' * DEEP),
    "64 brackets": echo_of(b"[" * 63 + b"]" * 63),
    "a million digits": echo_of(b"1" * 1_000_000),
    "4301 digits": echo_of(b"1" + b"0" * 4300),
    "a million digits as an id": b'{"function":"echo","id":' + b"1" * 1_000_000 + b"}",
    "1e400": echo_of(b"1e400"),
    "-1e400": echo_of(b"-1e400"),
    "a million digits in the exponent": echo_of(b"1e" + b"9" * 1_000_000),
    "NaN": echo_of(b"NaN"),
    "-Infinity": echo_of(b"-Infinity"),
    "invalid UTF-8": echo_of(b'"\xff"'),
    "overlong UTF-8": echo_of(b'"\xc0\xaf"'),
    "surrogate in UTF-8": echo_of(b'"\xed\xa0\x80"'),
    "UTF-8 that is cut": echo_of(b'"\xf0\x9f\x98"'),
    "UTF-16": echo_of(b"1").decode().encode("utf-16-le"),
    "byte order mark": b"\xef\xbb\xbf" + echo_of(b"1"),
    "NUL bytes": b"\0" * 1_000_000,
    "NUL in a string": echo_of(b'"\0"'),
    "NUL behind it": echo_of(b"1") + b"\0",
    "half a pair": echo_of(b'"\\ud800"'),
    "half a pair as a name": b'{"function":"echo","args":{"\\udc00":1}}',
    "half a pair as the function": b'{"function":"\\ud800"}',
    "half a pair as an id": b'{"function":"echo","args":[1],"id":"\\udfff"}',
    "the same name twice": b'{"function":"add","function":"echo","args":[1]}',
    "the same name twice inside": echo_of(b'{"a":1,"a":1}'),
    "the same name twice, once escaped": echo_of(b'{"a":1,"\\u0061":1}'),
    "a long name twice": echo_of(b'{"%s":1,"%s":1}' % ((b"\xf0\x9f\x98\x80" * DEEP,) * 2)),
    "100 000 times the same name": echo_of(b"{" + b",".join([b'"a":1'] * DEEP) + b"}"),
    "tab in a string": echo_of(b'"\t"'),
    "escape in a string": echo_of(b'"\x1b[2J"'),
    "carriage return in a string": echo_of(b'"\r"'),
    "quotes": b'"' * 1_000_000,
    "backslashes": echo_of(b'"' + b"\\" * 1_000_000),
    "blanks": b" " * 1_000_000,
}


class HostileLineTests(HostileTestCase):
    def test_right(self) -> None:
        """What is odd, and JSON all the same, is understood exactly."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=64), daemon.connect() as caller:
            for name, (text, value) in RIGHT.items():
                caller.send(echo_of(text) + b"\n")
                reply = caller.reply()
                if value is not None:
                    self.assertEqual(reply, value, name)
                self.assertEqual(type(reply), type(value if value is not None else []), name)

    def test_malformed(self) -> None:
        """What is no request is told so, in few words, and its sender is hung up on."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=64):
            for name, line in MALFORMED.items():
                with daemon.connect() as caller:
                    caller.send(line + b"\n")
                    answer = caller.rest()
                self.assertIn(b'"code":"malformed"', answer, name)
                self.assertLess(len(answer), 1000, name)

    def test_long_names(self) -> None:
        """Neither a refusal nor the log repeats at length what was refused."""
        name = "\U0001f600" * 250_000
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=64):
            for request in (
                {"function": name},
                {"function": "add", "args": {name: 1}},
                {"function": "add", name: 1},
            ):
                line = json.dumps(request, ensure_ascii=False)
                with daemon.connect() as caller:
                    caller.send(line + "\n")
                    self.assertLess(len(caller.line()), 2000, line[:60])
        self.assertLess(len(daemon.log), 100_000)

    def test_dear_lines(self) -> None:
        """Lines of 1 MiB that are the dearest to read are answered, and others between them."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=192) as others:
            for text in DEAR.values():
                with daemon.connect() as caller:
                    caller.send(echo_of(text) + b"\n")
                    others.wait_for_more(1)
                    reply = caller.line()
                    self.assertEqual(reply.count(b","), text.count(b","))

    def test_empty_lines(self) -> None:
        """A million empty lines have no answer, and others are answered between them."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=16) as others:
            workers = daemon.workers().values()
            before = cpu_seconds(workers)
            crowd = self.crowd(daemon, 1, [b"\n" * 1_000_000, echo_of(b"1") + b"\n"])
            crowd.push()
            others.wait_for_more(3)
            wait_until(lambda: crowd.have_heard(1), what="the answer behind them")
            self.assertEqual(crowd[0].heard, b"1\n")
            self.tell(f"{cpu_seconds(workers) - before:.1f} s of a processor, the others included")
            crowd.close()
