"""
What can be called in a fuzzed conversation, and what was.

The functions are plain, so that the test can call one itself to learn what has
to come back; what is registered calls them and takes note.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed

from taskd.functions import progress, task

__all__ = ["FUNCTIONS", "HELD", "LIMITS", "PLAIN", "STAGE", "Stage"]


class Stage:
    """
    What happens while one conversation goes on.

    Attributes:
        runs: Each function that was run, by name.
        held: The Deferreds that the test fires, in the order of their calls.
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.held: list[Deferred[Any]] = []

    def clear(self) -> None:
        """Forget the conversation before."""
        self.runs.clear()
        self.held.clear()


STAGE: Final = Stage()
"""The only one: what is registered is a function of a module, as everywhere in taskd."""


class _Text(str):
    pass


class _Colour(IntEnum):
    RED = 1


class _Json:
    def __json__(self) -> str:
        return "1}\n{"


def _itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


_STRANGE: Final[list[Callable[[], Any]]] = [
    lambda: math.nan,
    lambda: [-math.inf],
    lambda: b"bytes",
    lambda: {1, 2},
    lambda: {"a": {1: 2}},
    lambda: "\ud800",
    lambda: {"\udfff": 1},
    lambda: _Json(),
    lambda: {"a": [_Json()]},
    lambda: object,
    lambda: 10**4300,
    lambda: -(10**4299),
    lambda: (1, (2, [])),
    lambda: _Text("text"),
    lambda: [_Colour.RED],
    lambda: {_Text("k"): _Text("v")},
    lambda: succeed([1]),
    lambda: "\x00\x1f\x7f\u2028\u2029\ufeff\U0001f600/</",
    lambda: [1e16, 5e-324, -0.0, 1.7976931348623157e308, 0.1],
    dict,
]


def echo(value: Any = None) -> Any:
    return value


def wrap(value: Any) -> Any:
    return [{"": value}]


def keyword_only(*, a: Any, b: Any = 2) -> Any:
    return [a, b]


def positional_only(a: Any, b: Any = 0, /) -> Any:
    return [a, b]


def keywords(**named: Any) -> Any:
    return named


def both(a: Any = 0, /, **named: Any) -> Any:
    return [a, named]


def many(first: Any, *rest: Any, last: Any = None) -> Any:
    return [first, rest, last]


def reserved(from_: Any, class_: Any = None, **named: Any) -> Any:
    return [from_, class_, named]


def square(number: Any) -> Any:
    return number * number


def strange(kind: int) -> Any:
    return _STRANGE[kind]()


def broken(text: str = "") -> Any:
    raise ValueError(text)


def quits() -> Any:
    raise SystemExit(3)


def reports(done: Any = 0, total: Any = None, message: Any = None) -> Any:
    progress(done, total, message)
    return "reported"


def later(label: Any = None) -> Any:
    return _hold()


def limited(label: Any = None) -> Any:
    return _hold()


async def waits(label: Any = None) -> Any:
    return await _hold()


def _hold() -> Deferred[Any]:
    STAGE.held.append(Deferred())
    return STAGE.held[-1]


def _noting(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def noted(*args: Any, **named: Any) -> Any:
        STAGE.runs.append(plain.__name__)
        return plain(*args, **named)

    blocking = None if inspect.iscoroutinefunction(plain) else False
    return task(timeout=LIMITS.get(plain.__name__), blocking=blocking)(noted)


LIMITS: Final = {"limited": 5.0}
"""Seconds that a function may take."""

_ALL: Final = [
    *(echo, wrap, keyword_only, positional_only, keywords, both, many, reserved, square),
    *(strange, broken, quits, reports, later, limited, waits),
]
PLAIN: Final = {plain.__name__: plain for plain in _ALL}
HELD: Final = frozenset({"later", "limited", "waits"})
"""Those that go on until the test fires their Deferred."""
FUNCTIONS: Final = [_noting(plain) for plain in _ALL]
