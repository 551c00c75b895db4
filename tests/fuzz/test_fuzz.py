"""
A bounded run of the fuzzers, and a replay of every input that is worth keeping.

Hypothesis writes conversations that are nearly right, which random bytes never
are; ``fuzz_wire`` does the long run, and a short one here where atheris is
installed. Each file of ``corpus`` and ``corpus_client`` is one input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import skipUnless

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.answers import answer
from tests.fuzz.conversation import converse
from tests.fuzz.stage import PLAIN

_HERE = Path(__file__).parent
_RUNS = 4000
_PATIENCE_SECONDS = 120

# The same inputs each time, so that a failure is the change's and not the dice's;
# new ones are the long run's to find.
bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# What conversations are made of.

_NUMBERS = st.sampled_from(
    [
        *("0", "-0", "-0.0", "1.0", "1e5", "1E-7", "1e400", "1e-400", "5e-324", "0.1e1", "01"),
        *("1.", ".5", "+1", "- 1", "NaN", "-Infinity", "0x1", "1e", "12345678901234567890123"),
        *("9" * 4300, "9" * 4301, "1" + "0" * 309, "1.7976931348623157e308", "1.8e308"),
    ]
)
_STRINGS = st.sampled_from(
    [
        *('""', '"\\u0000"', '"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\x"', '"\t"'),
        *('"\\/"', '"é😀"', '"\u2028"', '"\x7f"', '"open sesame"', '"\\u00e9', '"\ufeff"'),
    ]
)
_CONSTANTS = st.sampled_from(["null", "true", "false", "True", "nul", "[]", "{}"])
_NAMES = st.sampled_from(["a", "b", "value", "from", "from_", "class", "label", "number", "id"])
_TEXTS = st.recursive(
    _NUMBERS | _STRINGS | _CONSTANTS | st.integers(0, 25).map(str),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(_NAMES, inner), max_size=3).map(
            lambda pairs: f"{{{','.join(f'{json.dumps(n)}: {v}' for n, v in pairs)}}}"
        )
        | st.tuples(st.integers(55, 65), inner).map(lambda d: f"{'[' * d[0]}{d[1]}{']' * d[0]}")
    ),
    max_leaves=6,
)
_PLAIN_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Hypothesis makes no halves of surrogate pairs here, but all else.
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=5,
)
_FUNCTIONS = st.sampled_from([*PLAIN, "echo", "later", "taskd.cancel", "taskd.auth", "nowhere"])
_IDS = st.integers(0, 2) | st.sampled_from(["x", 1.0, True, None, [], {"a": 1}])


@st.composite
def _requests(draw: st.DrawFn) -> bytes:
    """Write a request that is well formed."""
    message: dict[str, Any] = {"function": draw(_FUNCTIONS)}
    if draw(st.booleans()):
        message["args"] = draw(
            st.lists(_PLAIN_VALUES, max_size=3) | st.dictionaries(_NAMES, _PLAIN_VALUES, max_size=3)
        )
    if draw(st.booleans()):
        message["id"] = draw(_IDS)
        message["progress"] = draw(st.booleans())
    for name, values in (
        ("timeout", st.sampled_from([1, 0.5, 3, 1e-9, 1e8])),
        ("priority", st.integers(-3, 3)),
        ("cancel_on_disconnect", st.booleans()),
    ):
        if draw(st.integers(0, 4)) == 0:
            message[name] = draw(values)
    is_spaced, is_ascii = draw(st.booleans()), draw(st.booleans())
    separators = (", ", ": ") if is_spaced else (",", ":")
    text = json.dumps(message, separators=separators, ensure_ascii=is_ascii)
    return text.encode() + draw(st.sampled_from([b"\n", b"\r\n"]))


@st.composite
def _odd_requests(draw: st.DrawFn) -> bytes:
    """Write a request whose values may be no JSON at all."""
    function = draw(st.sampled_from(["echo", "wrap", "many", "square", "taskd.cancel"]))
    member = draw(st.sampled_from(["args", "args", "id", "timeout", "priority", "progress"]))
    value = draw(_TEXTS)
    text = f"[{value}]" if member == "args" else value
    return f'{{"function": "{function}", "{member}": {text}}}\n'.encode()


@st.composite
def _mutated(draw: st.DrawFn, lines: st.SearchStrategy[bytes]) -> bytes:
    """Change a line in a place or two."""
    line = bytearray(draw(lines))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(line)))
        line[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(line)


_EVENTS = st.sampled_from(
    [b"\xfe" + event for event in b"| e u v 0 1 6 9 ! s d m n b l".split()]
    + [b"\xfe*x\xff", b"\xfe*[\x04", b"\xfe*9\xff"]
) | st.tuples(st.sampled_from(b"rxjpc"), st.integers(0, 3)).map(lambda e: b"\xfe" + bytes(e))
_RIGHT = st.just(b'{"function": "taskd.auth", "args": ["open sesame"]}\n')
_LINES = _requests() | _odd_requests()
_SETUP = st.tuples(st.integers(0, 63), st.sampled_from([0, 0, 1, 3, 40])).map(
    lambda setup: bytes([0x40 + setup[0], 0x40 + setup[1]])
)


def _conversations(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    parts = st.lists(lines | lines | _EVENTS, max_size=12).map(b"".join)
    return st.tuples(_SETUP, st.just(b"") | _RIGHT, parts).map(b"".join)


_REPLIES = st.tuples(
    st.sampled_from(["0", "1", "2", "3", "4", "1.0", "true", '"1"', "null", "-1"]),
    st.sampled_from(["result", "error", "progress", "Result"]),
    _TEXTS
    | st.sampled_from(
        [
            '{"code":"unauthorized","message":"m","retryable":false}',
            '{"code":"worker-lost","message":"m","may_have_started":false}',
            '{"code":"nowhere"}',
            '{"code":5,"message":[],"retry_after":"x","type":{}}',
            '{"code":"overloaded","self":1,"error":2,"args":[]}',
            '{"done":1,"total":null}',
        ]
    ),
    st.booleans(),
).map(
    lambda r: (f'{{"id":{r[0]},"{r[1]}":{r[2]}}}\n' if r[3] else f'{{"{r[1]}":{r[2]}}}\n').encode()
)


class FuzzTestCase(SynchronousTestCase):
    def tearDown(self) -> None:
        # Tasks fail, and that is logged; what else is logged has been looked at.
        self.flushLoggedErrors()


class ServerTests(FuzzTestCase):
    """What a caller can do to a server."""

    @bounded
    @given(data=_conversations(_requests()))
    def test_requests(self, data: bytes) -> None:
        """Well-formed requests get what the protocol promises, whatever happens meanwhile."""
        converse(data)

    @bounded
    @given(data=_conversations(_LINES))
    def test_odd_values(self, data: bytes) -> None:
        """Odd numbers, escapes and nesting are carried exactly or refused."""
        converse(data)

    @bounded
    @given(data=_conversations(_mutated(_LINES)))
    def test_mutated_requests(self, data: bytes) -> None:
        """Requests that were changed in a place keep every promise."""
        converse(data)

    @bounded
    @given(data=st.binary(max_size=200))
    def test_raw_bytes(self, data: bytes) -> None:
        """Raw bytes keep every promise."""
        converse(data)


class ClientTests(FuzzTestCase):
    """What a server can do to a client."""

    @bounded
    @given(data=_conversations(_REPLIES))
    def test_replies(self, data: bytes) -> None:
        """Replies in any order and of any content bring each call to one end."""
        answer(data)

    @bounded
    @given(data=_conversations(_mutated(_REPLIES)))
    def test_mutated_replies(self, data: bytes) -> None:
        """Replies that were changed in a place bring each call to one end."""
        answer(data)

    @bounded
    @given(data=st.binary(max_size=200))
    def test_raw_bytes(self, data: bytes) -> None:
        """Raw bytes bring each call to one end."""
        answer(data)


class CorpusTests(FuzzTestCase):
    """Inputs that were found or written, each kept for what it reaches."""

    def replay(self, directory: str, target: Callable[[bytes], None]) -> None:
        paths = sorted((_HERE / directory).iterdir())
        self.assertNotEqual(paths, [])
        for path in paths:
            with self.subTest(path.name):
                target(path.read_bytes())

    def test_conversations(self) -> None:
        """Every conversation of the corpus keeps every promise."""
        self.replay("corpus", converse)

    def test_answers(self) -> None:
        """Every answer of the client's corpus brings each call to one end."""
        self.replay("corpus_client", answer)


@skipUnless(importlib.util.find_spec("atheris"), "atheris is not installed")
class CoverageTests(SynchronousTestCase):
    """A short run of the coverage-guided fuzzer."""

    def run_fuzzer(self, *options: str) -> None:
        # The same inputs each time here as well, as far as that can be had.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        with tempfile.TemporaryDirectory() as found:
            command = [
                *(sys.executable, str(_HERE / "fuzz_wire.py"), *options[:-1], found),
                *(str(_HERE / options[-1]), f"-runs={_RUNS}", "-seed=1"),
                f"-artifact_prefix={found}/",
            ]
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, env=environment
            )
        self.assertEqual(ended.returncode, 0, ended.stderr[-4000:] + ended.stdout[-4000:])

    def test_server(self) -> None:
        """A few thousand runs of libFuzzer break no promise of the server's."""
        self.run_fuzzer("corpus")

    def test_client(self) -> None:
        """A few thousand runs of libFuzzer leave no call of a client's without its end."""
        self.run_fuzzer("--client", "corpus_client")
