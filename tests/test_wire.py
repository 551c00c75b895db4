"""Messages to bytes and back, held against an independent strict reader."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import json
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import Malformed, NotJson, TaskFailed
from taskd.wire import (
    ABSENT,
    MAX_DEPTH,
    MAX_PRIORITY,
    NO_TERMS,
    Terms,
    decode,
    decode_reply,
    decode_request,
    encode,
    encode_error,
    encode_progress,
    encode_request,
    encode_result,
)

_REPORTED = Terms(wants_progress=True)
_NEWER_MEMBERS = ("priority", "cancel_on_disconnect")

many = settings(max_examples=150, deadline=None)
some = settings(max_examples=50, deadline=None)

# The reference: the standard library's reader, and nothing that it is lenient in.


def reference(line: bytes) -> dict[str, Any]:
    """Read a line strictly; ValueError if it is not a message."""
    value = json.loads(
        line.decode("utf-8"),
        object_pairs_hook=_unique,
        parse_constant=_refuse,
        parse_float=_finite,
    )
    if not isinstance(value, dict) or _depth(value) > MAX_DEPTH or _has_half_a_pair(value):
        raise ValueError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError
    return dict(pairs)


def _refuse(name: str) -> Any:
    raise ValueError(name)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(text)
    return float(text)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(_depth, _children(value)), default=0)


def _has_half_a_pair(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    names = list(value) if isinstance(value, dict) else []
    return any(map(_has_half_a_pair, names + _children(value)))


def outcome(read: Callable[[bytes], Any], line: bytes, refusal: type[Exception]) -> str:
    """
    Tell what a reader makes of a line.

    By ``repr``, which tells 1 from 1.0 and True, 0.0 from -0.0, and one order
    of names from another.
    """
    try:
        return repr(read(line))
    except refusal:
        return "refused"


# What lines are made of.

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Hypothesis makes no halves of surrogate pairs here, but all else.
    | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=6), PLAIN, max_size=3)

FORMATS: list[dict[str, Any]] = [
    {"separators": (",", ":"), "ensure_ascii": False},
    {"separators": (", ", ": "), "ensure_ascii": False},
    {"separators": (",", ":")},
    {},
    {"separators": (" ,\t", ":\r "), "ensure_ascii": False},
    {"indent": 1},
    {"separators": (",", ": ")},
]


def written(value: dict[str, Any], form: dict[str, Any], escapes_slashes: bool) -> bytes:
    """Write a value in one of the forms that real callers use."""
    text = json.dumps(value, **form)
    return (text.replace("/", "\\/") if escapes_slashes else text).encode()


VALID = st.builds(written, OBJECTS, st.sampled_from(FORMATS), st.booleans())

NUMBERS_IN_TEXT = """
    0 -0 0.0 -0.0 1 -1 1.5 1e5 1E5 1e+5 1e-5 1.0e5 1e22 1e16 100000.0 1e308 1e309 1e400 -1e400
    1e-400 0e999 01 -01 00 1. -1. .5 - + +1 1e 1e+ 0x10 1_000 0.1e1.0 1.7976931348623157e308
    1.7976931348623159e308 4.9e-324 0.1 0.10 9007199254740993 9007199254740993.0
    9223372036854775807 9223372036854775808 -9223372036854775809 18446744073709551616
    123456789012345678901234567890.0 NaN -NaN nan Infinity -Infinity inf
"""
ZEROS, NINES = "0" * 400, "9" * 4300
NUMBERS = [
    *NUMBERS_IN_TEXT.split(),
    "\u0661",
    f"1{ZEROS}",
    f"-1{ZEROS}",
    NINES,
    f"-{NINES}",
    f"9{NINES}",
]

STRINGS_IN_TEXT = r"""
    "" "a" "\u0061" "\ud83d\ude00" "\uD83D\uDE00" "\ud800" "\udfff" "\ude00\ud83d" "\ud83dx"
    "\ud83d\u0041" "\u0000" "\u001f" "\u007f" "\n" "\/" "/" "\\" "\"" "\x" "\u12" "\u12g4"
    "\U0041" "\u+041" "[[" "]}" "\\\"[" "\\" 'a' "a "b" " \
"""
MORE_STRINGS = ['" "', '"\\u 041"', '"\x7f"', '"\x85"', '"\u2028"', '"é"', '"e\u0301"', '"😀"']
STRINGS = [*STRINGS_IN_TEXT.split(), *MORE_STRINGS]

WORDS = ["true", "false", "null", "True", "None", "nul", "truefalse", "", "[]", "{}", "[", "}"]

NOT_UTF_8 = [
    *(b'"\xed\xa0\x80"', b'"\xed\xb0\x80"', b'"\xff"', b'"\xc0\xaf"', b'"\xf5\x80\x80\x80"'),
    *(b'"\xc3"', b"\x80"),
]
CONTROLS = [b'"\x00"', b'"\x1f"', b'"\t"', b'"\n"', b"\x00", b"\xef\xbb\xbf", b"\xc2\xa0"]
EVERY_ATOM = [*(text.encode() for text in (*NUMBERS, *STRINGS, *WORDS)), *NOT_UTF_8, *CONTROLS]

ATOMS = st.sampled_from(EVERY_ATOM)
NAMES = st.sampled_from([b'"a"', b'"a"', b'"\\u0061"', b'"b"', b'"c"', b'""', b'"\\ud800"', b"a"])
SPACES = st.sampled_from([b"", b"", b"", b" ", b"\t", b"\r", b"\n", b"  ", b"\x0c", b"\xc2\xa0"])


def _array(items: list[bytes], space: bytes, comma: bytes) -> bytes:
    return b"[" + comma.join(items) + space + b"]"


def _object(items: list[tuple[bytes, bytes]], space: bytes, colon: bytes) -> bytes:
    return b"{" + b",".join(name + colon + value for name, value in items) + space + b"}"


COMMAS = st.sampled_from([b",", b",", b", ", b" ,", b",,", b" "])
COLONS = st.sampled_from([b":", b":", b": ", b" : ", b"=", b""])
ODD = st.recursive(
    ATOMS,
    lambda parts: (
        st.builds(_array, st.lists(parts, max_size=3), SPACES, COMMAS)
        | st.builds(_object, st.lists(st.tuples(NAMES, parts), max_size=3), SPACES, COLONS)
    ),
    max_leaves=4,
)
ODD_LINES = st.builds(
    lambda before, items, after: before + _object(items, b"", b":") + after,
    SPACES,
    st.lists(st.tuples(st.sampled_from([b'"a"', b'"b"', b'"c"']), ODD), min_size=1, max_size=2),
    SPACES | st.just(b"x") | ATOMS,
)

CHUNKS = st.sampled_from(
    [bytes([byte]) for byte in b'\x00\x1f "\\,:[]{}-+.019eEntfu/\x7f\x80\xff']
    + [b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\u", b"\\ud800", b"\\n", b'""', b"[]", b'"a":1,']
)


def _mutated(line: bytes, place: int, removed: int, chunk: bytes) -> bytes:
    place %= len(line) + 1
    return line[:place] + chunk + line[place + removed :]


WHOLE = st.sampled_from(
    [
        b'{"function":"add","args":[1,2],"id":"x"}',
        b'{"function": "add", "args": {"a": -1.5e-7, "b": true}, "timeout": 0.25}',
        b'{"a":"\\u00e9\\ud83d\\ude00\\n\\/","b":[[],{}],"":null}',
        '{"é":"\u2028😀","n":[0,-0.0,1e5,123456789012345678901]}'.encode(),
    ]
)
MUTATED = st.builds(
    _mutated, WHOLE, st.integers(0, 80), st.integers(0, 2), CHUNKS | st.binary(max_size=3)
)

LEVELS = st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b'{"a": ', b"}"), (b"[1,", b"]")])


def _nested(levels: list[tuple[bytes, bytes]], core: bytes) -> bytes:
    opening = b"".join(first for first, _ in levels)
    closing = b"".join(last for _, last in reversed(levels))
    return b'{"a":' + opening + core + closing + b"}"


NESTED = st.builds(
    _nested,
    st.integers(MAX_DEPTH - 4, MAX_DEPTH + 2).flatmap(
        lambda n: st.lists(LEVELS, min_size=3, max_size=3).map(lambda few: (few * n)[:n])
    ),
    st.sampled_from([b"1", b"[]", b"{}", b'"[[[["', b'"\\"[["', b'"\\\\"', b"[1]", b'[[],"]]"]']),
)


class DecodeTests(SynchronousTestCase):
    """Reading one line as a strict JSON object."""

    def _agree(self, line: bytes) -> None:
        self.assertEqual(outcome(decode, line, Malformed), outcome(reference, line, ValueError))

    @many
    @given(line=VALID)
    def test_valid_lines(self, line: bytes) -> None:
        """A valid line gives what the reference gives, in every usual way of writing it."""
        self._agree(line)

    @many
    @given(line=ODD_LINES)
    def test_odd_lines(self, line: bytes) -> None:
        """Odd numbers, strings, names and spaces are taken or refused as the reference does."""
        self._agree(line)

    @many
    @given(line=MUTATED)
    def test_mutated_lines(self, line: bytes) -> None:
        """A valid line with some bytes changed is taken or refused as the reference does."""
        self._agree(line)

    @some
    @given(line=NESTED)
    def test_nested_lines(self, line: bytes) -> None:
        """Nesting around the limit is taken or refused as the reference does."""
        self._agree(line)

    def test_every_odd_atom(self) -> None:
        """Each odd spelling is taken or refused as the reference does, wherever it stands."""
        for atom in EVERY_ATOM:
            for line in (b'{"a":%b}', b'{"a": [%b]}', b'{"a":{"b":%b}}', b"{%b:1}", b"%b", b"[%b]"):
                self._agree(line % atom)
            self._agree(b'{"a":1}' + atom)
            self._agree(atom + b'{"a":1}')

    def test_what_is_taken(self) -> None:
        """These lines mean these values, to the type."""
        for line, value in (
            (b"{}", {}),
            (b' {"a" : 1}\r', {"a": 1}),
            (b'{"a":1e5}', {"a": 100000.0}),
            (b'{"a":-0.0}', {"a": -0.0}),
            (b'{"a":-0}', {"a": 0}),
            (b'{"a":1e-400}', {"a": 0.0}),
            (b'{"a":1%b}' % (b"0" * 400), {"a": 10**400}),
            (b'{"a":9007199254740993}', {"a": 2**53 + 1}),
            (b'{"a":[true,null]}', {"a": [True, None]}),
            (b'{"a":"\\ud83d\\ude00\\/"}', {"a": "\U0001f600/"}),
            (b'{"a":"\\u0000"}', {"a": "\0"}),
            (b'{"a":"\x7f"}', {"a": "\x7f"}),
            ('{"é":"\u2028"}'.encode(), {"é": "\u2028"}),
            (b'{"b":1,"a":{"b":1}}', {"b": 1, "a": {"b": 1}}),
        ):
            self.assertEqual(repr(decode(line)), repr(value))
            self.assertEqual(repr(reference(line)), repr(value))

    def test_what_is_refused(self) -> None:
        """These lines are refused, with words that name the reason."""
        for line, words in (
            (b"", "not JSON"),
            (b"hello", "not JSON"),
            (b"GET / HTTP/1.1", "not JSON"),
            (b'{"a":1', "not JSON"),
            (b'{"a":1} {"a":2}', "Extra data"),
            (b'{"a":01}', "not JSON"),
            (b'{"a":"\x00"}', "control character"),
            (b'{"a":%b}' % (b"9" * 4301), "4300"),
            (b'\xef\xbb\xbf{"a":1}', "not JSON"),
            (b"[]", "JSON object"),
            (b"3", "JSON object"),
            (b'"a"', "JSON object"),
            (b"null", "JSON object"),
            (b'{"a":1,"a":1}', "'a' stands twice"),
            (b'{"x":[{"a":1,"\\u0061":2}]}', "'a' stands twice"),
            (b'{"a":NaN}', "NaN"),
            (b'{"a":-Infinity}', "-Infinity"),
            (b'{"a":1e400}', "1e400"),
            (b'{"a":"\\ud800"}', "surrogate"),
            (b'{"\\udc00":1}', "surrogate"),
            (b'{"a":"\xed\xa0\x80"}', "not UTF-8"),
            (b'{"a":"\xff"}', "not UTF-8: invalid start byte at byte 6"),
        ):
            error = self.assertRaises(Malformed, decode, line)
            self.assertIn(words, error.message)
            self.assertRaises(ValueError, reference, line)

    def test_the_limit_of_nesting(self) -> None:
        """``MAX_DEPTH`` levels are read, one more is refused, with and without other content."""
        for first, last in ((b"[", b"]"), (b'{"a":', b"}"), (b'["x[",', b"]"), (b"[ ", b" ]")):
            for core in (b"[]", b"{}", b'["]"]'):
                fits = b'{"a":' + first * (MAX_DEPTH - 2) + core + last * (MAX_DEPTH - 2) + b"}"
                self.assertEqual(_depth(decode(fits)), MAX_DEPTH)
                deeper = b'{"a":[' + fits[5:-1] + b"]}"
                error = self.assertRaises(Malformed, decode, deeper)
                self.assertIn(f"deeper than {MAX_DEPTH}", error.message)

    def test_an_integer_that_is_too_long(self) -> None:
        """An integer beyond what Python reads is refused in words for its sender."""
        error = self.assertRaises(Malformed, decode, b'{"a":%s}' % (b"9" * 4301))
        self.assertEqual(error.message, "not JSON: an integer of more than 4300 digits")

    def test_breadth_is_not_nesting(self) -> None:
        """Thousands of brackets beside each other, or in a string, are no nesting."""
        for body in (b"[" + b",".join([b"[]"] * 5000) + b"]", b'"' + b"[{" * 5000 + b'"'):
            self._agree(b'{"a":%b}' % body)
            self.assertLessEqual(_depth(decode(b'{"a":%b}' % body)), 3)

    def test_a_bomb_of_brackets(self) -> None:
        """A million brackets are refused, with or without their ends."""
        for bomb in (b"[" * 10**6, b"[" * 10**6 + b"]" * 10**6, b'{"a":' * 10**6):
            self.assertRaises(Malformed, decode, bomb)
            self.assertRaises(Malformed, decode, b'{"a":%b}' % bomb)


class EncodeTests(SynchronousTestCase):
    """Writing values as JSON that every strict reader accepts."""

    @many
    @given(value=PLAIN)
    def test_plain_values_survive(self, value: Any) -> None:
        """Any plain value comes back equal, in value and type, on one line."""
        line = encode_result(ABSENT, value)
        self.assertEqual(line.index(b"\n"), len(line) - 1)
        self.assertEqual(repr(json.loads(line)), repr(value))

    @many
    @given(value=PLAIN, id_json=st.sampled_from(["1", '"x"', "null", '{"a":[]}']))
    def test_our_own_reader_takes_it(self, value: Any, id_json: str) -> None:
        """A reply with an id is read back by the client's own reader."""
        reply = decode_reply(encode_result(id_json, value)[:-1])
        self.assertEqual(repr(reply), repr({"id": json.loads(id_json), "result": value}))

    @some
    @given(number=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70))
    def test_numbers_are_exact(self, number: float) -> None:
        """Every finite float comes back bit for bit, every integer exactly, in any container."""
        for value in (number, [number], {"a": number}, [[number], number]):
            self.assertEqual(repr(json.loads(encode(value))), repr(value))

    def test_numbers_at_the_edges(self) -> None:
        """The largest, the smallest and the longest numbers come back as they were."""
        powers = [2**bits + off for bits in (31, 53, 63, 64) for off in (-1, 0, 1)]
        for number in (
            *powers,
            *(-power for power in powers),
            *(10**400, -(10**400), 10**4299, -(10**4299)),
            *(1.7976931348623157e308, 5e-324, 2.2250738585072014e-308, -0.0, 0.1, 1e16, 1e22, 1e-7),
        ):
            self.assertEqual(repr(json.loads(encode([number]))), repr([number]))

    def test_subclasses(self) -> None:
        """A subclass of a plain type is written as that type, whatever it says of itself."""

        class Loud(int):
            def __str__(self) -> str:
                return "boo"

            __repr__ = __str__

        class Custom(str):
            __slots__ = ()

            def __json__(self) -> str:
                return "boo"

        class Table(dict[str, Any]):
            def __json__(self) -> str:
                return "boo"

            def toDict(self) -> dict[str, Any]:
                return {"other": 1}

        class Row(list[Any]):
            def __json__(self) -> str:
                return "boo"

        class Size(enum.IntEnum):
            HUGE = 2**70

        class Color(enum.StrEnum):
            RED = "red"

        point = namedtuple("point", "x y")
        for value, text in (
            (Loud(5), "5"),
            (Loud(2**70), str(2**70)),
            (Custom("a"), '"a"'),
            (Table(a=1), '{"a":1}'),
            (Row([1, 2]), "[1,2]"),
            (Size.HUGE, str(2**70)),
            (Color.RED, '"red"'),
            ({Color.RED: 1}, '{"red":1}'),
            ((1, (2,), ()), "[1,[2],[]]"),
            (point(1, 2), "[1,2]"),
            (OrderedDict(b=1, a=2), '{"b":1,"a":2}'),
        ):
            self.assertEqual(encode(value), text)
            self.assertEqual(encode([value]), f"[{text}]")

    def test_what_json_cannot_carry(self) -> None:
        """Nothing is converted silently: each refusal names the type or the place."""

        class Json:
            def __json__(self) -> str:
                return "1"

        class ToDict:
            def toDict(self) -> dict[str, Any]:
                return {}

        circle: list[Any] = []
        circle.append(circle)
        round_dict: dict[str, Any] = {}
        round_dict["me"] = [round_dict]
        for value, words in (
            (math.nan, "NaN"),
            (math.inf, "Infinity"),
            (-math.inf, "Infinity"),
            (b"bytes", "bytes"),
            (bytearray(b""), "bytearray"),
            ({1, 2}, "set"),
            (frozenset(), "frozenset"),
            (decimal.Decimal(1), "decimal.Decimal"),
            (datetime.datetime(2000, 1, 1), "datetime.datetime"),
            (datetime.date(2000, 1, 1), "datetime.date"),
            (1j, "complex"),
            (range(3), "range"),
            ({}.keys(), "dict_keys"),
            (iter([]), "list_iterator"),
            (object(), "object"),
            (ValueError, "type"),
            (Json(), "Json"),
            (ToDict(), "ToDict"),
            ({1: 2}, "the key 1"),
            ({None: 2}, "the key None"),
            ({True: 2}, "the key True"),
            ({1.5: 2}, "the key 1.5"),
            ({(1, 2): 3}, "the key (1, 2)"),
            ({b"a": 3}, "the key b'a'"),
            (circle, "contains itself"),
            (round_dict, "contains itself"),
            (10**4999, "4300 digits"),
            (-(10**4999), "4300 digits"),
        ):
            for nested in (value, [value], (value,), {"a": value}, [1, {"a": ["x", value]}]):
                error = self.assertRaises(NotJson, encode_result, ABSENT, nested)
                self.assertIn(words, str(error))

    def test_the_place_is_named(self) -> None:
        """The message leads through names and positions to the value that cannot be."""
        for value, place in (
            (b"", "the value is"),
            ([1, b""], "the value[1] is"),
            ({"a": [{}, {"b": b""}]}, "the value['a'][1]['b'] is"),
            ([{"a": {2: 3}}], "the value[0]['a'] has the key 2"),
        ):
            self.assertIn(place, str(self.assertRaises(NotJson, encode, value)))

    def test_long_names_are_cut(self) -> None:
        """A message about a value under a name of a megabyte stays short."""
        for value in ({"x" * 10**6: b""}, {("x" * 10**6,): 1}):
            self.assertLess(len(str(self.assertRaises(NotJson, encode, value))), 200)

    def test_half_a_surrogate_pair(self) -> None:
        """Half of a surrogate pair is refused in a value, a name, a request and a progress."""
        half: str = "a\udfff"
        for write in (
            lambda: encode_result(ABSENT, half),
            lambda: encode_result("1", [half]),
            lambda: encode_result("1", {half: 1}),
            lambda: encode_result("1", {"a": [half]}),
            lambda: encode_request((half, [], ABSENT, NO_TERMS)),
            lambda: encode_request(("f", [half], ABSENT, NO_TERMS)),
            lambda: encode_request(("f", {half: 1}, "1", NO_TERMS)),
            lambda: encode_progress("1", 1, None, half),
        ):
            self.assertIn("surrogate", str(self.assertRaises(NotJson, write)))

    def test_what_is_no_number(self) -> None:
        """What is no finite number is named in our own words."""
        for value in (math.nan, math.inf, [-math.inf], {"a": [math.nan]}):
            error = self.assertRaises(NotJson, encode, value)
            self.assertEqual(str(error), "it holds NaN or Infinity")

    def test_the_limit_of_nesting(self) -> None:
        """What is written can be read: as deep as the reader goes, and no deeper."""
        for wrap in (lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: [1, v]):
            value = wrap(1)
            for _ in range(MAX_DEPTH - 2):
                value = wrap(value)
            self.assertEqual(_depth(decode(encode_result("1", value)[:-1])), MAX_DEPTH)
            line = encode_request(("f", value, ABSENT, NO_TERMS))
            self.assertEqual(_depth(decode(line[:-1])), MAX_DEPTH)
            self.assertIn("nested", str(self.assertRaises(NotJson, encode, wrap(value))))

    def test_a_bomb_of_lists(self) -> None:
        """A list within a list, a hundred thousand times, is refused."""
        bomb: list[Any] = []
        for _ in range(100_000):
            bomb = [bomb]
        self.assertIn("nested", str(self.assertRaises(NotJson, encode, bomb)))


class EncodeErrorTests(SynchronousTestCase):
    """Writing the reply to a call that failed."""

    def test_the_shape(self) -> None:
        """An error is an object under ``error``, behind the id if there was one."""
        error = TaskFailed("no such file", type="OSError")
        fields = {
            "code": "task-failed",
            "message": "no such file",
            "retryable": False,
            "type": "OSError",
        }
        self.assertEqual(json.loads(encode_error(ABSENT, error)), {"error": fields})
        self.assertEqual(json.loads(encode_error("7", error)), {"id": 7, "error": fields})

    @some
    @given(text=st.text(st.characters(), max_size=20))
    def test_any_text_can_be_sent(self, text: str) -> None:
        """Whatever a task's exception says, its error is one line of JSON that carries it."""
        error = TaskFailed(text, type=text, traceback=text)
        line = encode_error("1", error)
        self.assertEqual(line.index(b"\n"), len(line) - 1)
        fields = reference(line)["error"]
        carried = text.encode("utf-8", "backslashreplace").decode()
        self.assertEqual([fields[n] for n in ("message", "type", "traceback")], [carried] * 3)

    def test_half_a_surrogate_pair(self) -> None:
        """Half of a surrogate pair in an exception's text is sent escaped."""
        line = encode_error(ABSENT, TaskFailed("a\ud800b", traceback="\udfff"))
        fields = json.loads(line)["error"]
        self.assertEqual((fields["message"], fields["traceback"]), ("a\\ud800b", "\\udfff"))


class EncodeProgressTests(SynchronousTestCase):
    """Writing a progress message."""

    def test_the_shape(self) -> None:
        """Progress is an object of three members, of which two may be null."""
        for done, total, message in ((1, 3, "mail 1"), (0.5, None, None)):
            line = encode_progress('"x"', done, total, message)
            progress = {"done": done, "total": total, "message": message}
            self.assertEqual(json.loads(line), {"id": "x", "progress": progress})
            self.assertTrue(line.endswith(b"}\n"))

    def test_what_is_no_progress(self) -> None:
        """A count that is no finite number, and a message that is no text, are refused."""
        taken = []
        for done, total, message in (
            (math.nan, None, None),
            (1, math.inf, None),
            (b"1", None, None),
            (1, {2}, None),
            (1, None, b"mail"),
            (None, None, None),
            ("half", None, None),
            (1, "3", None),
            (1, None, 3),
            ([1], None, None),
            (1, None, {"text": "mail"}),
        ):
            with contextlib.suppress(NotJson):
                taken.append(encode_progress("1", done, total, message))  # type: ignore[arg-type]
        self.assertEqual(taken, [])


class RequestTests(SynchronousTestCase):
    """Reading and writing requests."""

    def test_what_a_request_can_be(self) -> None:
        """Each member is optional but the function, and comes back as it was given."""
        for line, request in (
            (b'{"function":"f"}', ("f", [], ABSENT, NO_TERMS)),
            (b'{"function":""}', ("", [], ABSENT, NO_TERMS)),
            (b'{"function":"f","args":[]}', ("f", [], ABSENT, NO_TERMS)),
            (b'{"args": {}, "function": "f"}', ("f", {}, ABSENT, NO_TERMS)),
            (b'{"function":"f","args":[1,"a"]}', ("f", [1, "a"], ABSENT, NO_TERMS)),
            (b'{"function":"f","args":{"from":1}}', ("f", {"from": 1}, ABSENT, NO_TERMS)),
            (b'{"function":"f","timeout":5}', ("f", [], ABSENT, Terms(timeout=5))),
            (b'{"function":"f","timeout":1e-3}', ("f", [], ABSENT, Terms(timeout=0.001))),
            (b'{"function":"f","id":1,"progress":true}', ("f", [], "1", _REPORTED)),
            (b'{"function":"f","id":"","progress":true}', ("f", [], '""', _REPORTED)),
            (b'{"function":"f","id":null,"progress":true}', ("f", [], "null", _REPORTED)),
            (b'{"function":"f","priority":-7}', ("f", [], ABSENT, Terms(priority=-7))),
            (
                b'{"function":"f","cancel_on_disconnect":true}',
                ("f", [], ABSENT, Terms(ends_with_caller=True)),
            ),
            (
                b'{"priority":3,"cancel_on_disconnect":true,"timeout":0.5,"progress":true,'
                b'"id":1,"function":"f"}',
                ("f", [], "1", Terms(0.5, True, 3, True)),
            ),
            (b'{"function":"f"}\r', ("f", [], ABSENT, NO_TERMS)),
        ):
            self.assertEqual(repr(decode_request(line)), repr(request))

    def test_terms_that_say_nothing(self) -> None:
        """A request whose terms are those of one without any is told by identity."""
        for members in (
            *("", ',"args":[]', ',"timeout":null', ',"progress":false', ',"priority":0'),
            *(',"priority":-0', ',"cancel_on_disconnect":false'),
            ',"timeout":null,"progress":false,"priority":0,"cancel_on_disconnect":false',
        ):
            terms = decode_request(f'{{"function":"f"{members}}}'.encode())[3]
            self.assertIs(terms, NO_TERMS, members)

    def test_the_bounds_of_priorities(self) -> None:
        """A priority may reach its bounds on both sides, and comes back exactly."""
        for priority in (-MAX_PRIORITY, -1, 1, MAX_PRIORITY):
            line = f'{{"function":"f","priority":{priority}}}'.encode()
            self.assertEqual(decode_request(line)[3], Terms(priority=priority))

    def test_what_is_no_request(self) -> None:
        """What is not a request is refused with the reason, and with its id where it had one."""
        for members, words in (
            ('"args":[]', '"function" is missing'),
            ('"function":5', '"function" must be a string'),
            ('"function":null', '"function" must be a string'),
            ('"function":["f"]', '"function" must be a string'),
            ('"function":"f","args":5', '"args" must be'),
            ('"function":"f","args":null', '"args" must be'),
            ('"function":"f","args":"a"', '"args" must be'),
            ('"function":"f","arg":[]', "unknown member 'arg'"),
            ('"function":"f","Args":[]', "unknown member 'Args'"),
            ('"function":"f","":[]', "unknown member ''"),
            ('"function":"f","timeout":0', '"timeout" must be'),
            ('"function":"f","timeout":-0.0', '"timeout" must be'),
            ('"function":"f","timeout":-1', '"timeout" must be'),
            ('"function":"f","timeout":true', '"timeout" must be'),
            ('"function":"f","timeout":"5"', '"timeout" must be'),
            ('"function":"f","timeout":[]', '"timeout" must be'),
            ('"function":"f","timeout":1e300', '"timeout" must be'),
            ('"function":"f","timeout":1%s' % ("0" * 400), '"timeout" must be'),
            ('"function":"f","progress":1', '"progress" must be'),
            ('"function":"f","progress":"yes"', '"progress" must be'),
            ('"function":"f","progress":null', '"progress" must be'),
            ('"function":"f","priority":1.0', '"priority" must be'),
            ('"function":"f","priority":true', '"priority" must be'),
            ('"function":"f","priority":false', '"priority" must be'),
            ('"function":"f","priority":"1"', '"priority" must be'),
            ('"function":"f","priority":null', '"priority" must be'),
            (f'"function":"f","priority":{MAX_PRIORITY + 1}', '"priority" must be'),
            (f'"function":"f","priority":-{MAX_PRIORITY + 1}', '"priority" must be'),
            ('"function":"f","cancel_on_disconnect":1', '"cancel_on_disconnect" must be'),
            ('"function":"f","cancel_on_disconnect":null', '"cancel_on_disconnect" must be'),
            ('"function":"f","cancel_on_disconnect":"no"', '"cancel_on_disconnect" must be'),
        ):
            for text, id_json in (
                (f"{{{members}}}", ABSENT),
                (f'{{{members},"id":7}}', "7"),
                (f'{{"id": "x", {members}}}', '"x"'),
            ):
                error = self.assertRaises(Malformed, decode_request, text.encode())
                self.assertIn(words, error.message)
                self.assertEqual(error.id_json, id_json)

    def test_progress_needs_an_id(self) -> None:
        """Progress without an id is refused: nobody could tell what it is of."""
        line = b'{"function":"f","progress":true}'
        error = self.assertRaises(Malformed, decode_request, line)
        self.assertIn('needs an "id"', error.message)

    def test_a_line_that_is_no_json_has_no_id(self) -> None:
        """Where the JSON itself is broken, no id is believed."""
        for line in (b'{"id":7,"function":"f"', b'{"id":7,"timeout":1e400}', b'{"id":7,"id":7}'):
            self.assertEqual(self.assertRaises(Malformed, decode_request, line).id_json, ABSENT)

    def test_an_id_of_any_type_comes_back(self) -> None:
        """An id of every JSON type is given back equal to what it was."""
        for text in (
            *("0", "-7", "1.5", "-0.0", "1e22", "123456789012345678901234567890", "9" * 4300),
            *('""', '"a\\"b"', '"\\u00e9\\n"', "true", "false", "null", "[]", "{}"),
            *('[1,{"a":[null]}]', '{"b":1,"a":2}', "[" * 63 + "]" * 63),
        ):
            id_json = decode_request(f'{{"function":"f","id":{text}}}'.encode())[2]
            self.assertEqual(repr(json.loads(id_json)), repr(json.loads(text)))
            echoed = decode_reply(encode_result(id_json, 1)[:-1])["id"]
            self.assertEqual(repr(echoed), repr(json.loads(text)))

    @many
    @given(line=st.binary(max_size=60))
    def test_random_bytes(self, line: bytes) -> None:
        """Random bytes are a request or malformed, and nothing else happens."""
        self.assertIn(len(self._read_or_refuse(line)), (0, 4))

    @many
    @given(
        members=st.dictionaries(
            st.sampled_from(
                [*("function", "args", "id", "timeout", "progress", "other"), *_NEWER_MEMBERS]
            ),
            PLAIN,
        ),
        form=st.sampled_from(FORMATS),
    )
    def test_random_members(self, members: dict[str, Any], form: dict[str, Any]) -> None:
        """Members of random types are a request or malformed, and what is read is of its type."""
        request = self._read_or_refuse(json.dumps(members, **form).encode())
        if request:
            function, args, id_json, terms = request
            self.assertEqual(function, members["function"])
            self.assertEqual(repr(args), repr(members.get("args", [])))
            self.assertEqual("id" in members, id_json != ABSENT)
            self.assertEqual(repr(terms.timeout), repr(members.get("timeout")))
            self.assertIs(terms.wants_progress, members.get("progress", False))
            self.assertEqual(repr(terms.priority), repr(members.get("priority", 0)))
            self.assertIs(terms.ends_with_caller, members.get("cancel_on_disconnect", False))

    def _read_or_refuse(self, line: bytes) -> tuple[Any, ...]:
        try:
            return decode_request(line)
        except Malformed:
            return ()

    @many
    @given(
        function=st.text(max_size=8),
        args=st.lists(PLAIN, max_size=4) | OBJECTS,
        id_json=st.just(ABSENT) | PLAIN.map(encode),
        terms=st.just(NO_TERMS)
        | st.builds(
            Terms,
            timeout=st.none() | st.floats(1e-6, 1e6) | st.integers(1, 10**6),
            wants_progress=st.booleans(),
            priority=st.integers(-3, 3) | st.integers(-MAX_PRIORITY, MAX_PRIORITY),
            ends_with_caller=st.booleans(),
        ),
    )
    def test_round_trip(self, function: str, args: Any, id_json: str, terms: Terms) -> None:
        """What a client writes is what the server reads, and no terms are read as none."""
        if id_json == ABSENT:
            terms = terms._replace(wants_progress=False)
        request = (function, args, id_json, terms)
        line = encode_request(request)
        self.assertEqual(line.index(b"\n"), len(line) - 1)
        again = decode_request(line[:-1])
        self.assertEqual(repr(again), repr(request))
        self.assertIs(again[3] is NO_TERMS, terms == NO_TERMS)

    def test_arguments_that_cannot_be_sent(self) -> None:
        """A client is told which argument JSON cannot carry."""
        for args, words in (
            ([1, {2}], "the value[1] is of type set"),
            ({"when": datetime.date(2000, 1, 1)}, "the value['when'] is of type datetime.date"),
            ({1: 2}, "the key 1"),
            ([math.nan], "NaN"),
        ):
            request = ("f", args, "1", NO_TERMS)
            error = self.assertRaises(NotJson, encode_request, request)
            self.assertIn(words, str(error))


class DecodeReplyTests(SynchronousTestCase):
    """Reading replies, for a client."""

    def test_what_a_reply_can_be(self) -> None:
        """A reply has an id and one of result, error and progress; or an error alone."""
        for line, reply in (
            (b'{"id":1,"result":null}', {"id": 1, "result": None}),
            (b'{"id": "x", "result": {"error": 1}}', {"id": "x", "result": {"error": 1}}),
            (b'{"result":[],"id":null}', {"result": [], "id": None}),
            (b'{"id":1,"error":{}}', {"id": 1, "error": {}}),
            (b'{"id":1,"progress":{"done":1}}', {"id": 1, "progress": {"done": 1}}),
            (b'{"error":{"code":"line-too-long"}}', {"error": {"code": "line-too-long"}}),
        ):
            self.assertEqual(decode_reply(line), reply)

    def test_what_is_no_reply(self) -> None:
        """Anything else is malformed."""
        for line in (
            *(b"", b"3", b"[]", b"{}", b"null", b"HTTP/1.1 400 Bad Request", b'{"id":1}'),
            b'{"id":1,"result":1,"error":{}}',
            b'{"id":1,"result":1,"progress":{}}',
            b'{"id":1,"result":1,"other":2}',
            b'{"id":1,"Result":1}',
            b'{"id":1,"error":"no"}',
            b'{"id":1,"error":null}',
            b'{"id":1,"progress":5}',
            b'{"error":[]}',
            b'{"id":1,"id":1,"result":1}',
            b'{"id":1,"result":NaN}',
        ):
            self.assertRaises(Malformed, decode_reply, line)

    def test_only_an_error_may_come_without_an_id(self) -> None:
        """A result or a progress without an id is malformed: nobody can tell whose it is."""
        for line in (b'{"result":1}', b'{"progress":{"done":1}}'):
            self.assertRaises(Malformed, decode_reply, line)
