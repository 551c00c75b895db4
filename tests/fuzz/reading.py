"""
What docs/protocol.rst lets pass, read with the standard library alone.

Written from the page and not from ``taskd.wire``, so that the two can disagree.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

__all__ = ["NotCarried", "Refused", "Request", "carried", "read", "read_request"]

MAX_DEPTH = 64
_MOST_DIGITS = 10**4300
_MEMBERS = {
    "function",
    "args",
    "id",
    "timeout",
    "progress",
    "priority",
    "cancel_on_disconnect",
}


class Refused(Exception):
    """
    A line is no message, or a message no request.

    Attributes:
        shown_id: The repr of the id that it had, or None.
    """

    def __init__(self, why: str, shown_id: str | None = None) -> None:
        super().__init__(why)
        self.shown_id = shown_id


class NotCarried(Exception):
    """JSON cannot carry a value."""


class Request(NamedTuple):
    """
    A request as the page describes it.

    Attributes:
        shown_id: The repr of its id, or None if there is none. By ``repr`` since
            that tells 1 from 1.0 and True, and one order of names from another.
    """

    function: str
    args: Any
    shown_id: str | None
    timeout: float | None
    wants_progress: bool
    ends_with_caller: bool


def read(line: bytes) -> Any:
    """Read one value strictly."""
    try:
        value = json.loads(
            line.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise Refused(str(error)) from None
    if _depth(value) > MAX_DEPTH:
        raise Refused("too deep")
    if _has_half_a_pair(value):
        raise Refused("half of a surrogate pair")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
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
    """Count levels, without the stack: what is read may be deep."""
    levels, layer = 0, [value]
    while layer := [v for v in layer if isinstance(v, (dict, list))]:
        levels += 1
        layer = [child for v in layer for child in _children(v)]
    return levels


def _has_half_a_pair(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= c <= "\udfff" for c in value)
    names = list(value) if isinstance(value, dict) else []
    return any(map(_has_half_a_pair, names + _children(value)))


def read_request(line: bytes) -> Request:
    """Read one line as a request; ``Refused`` has its id if it is JSON and has one."""
    message = read(line)
    if not isinstance(message, dict):
        raise Refused("not an object")
    shown_id = repr(message["id"]) if "id" in message else None
    function, args = message.get("function"), message.get("args", [])
    timeout, priority = message.get("timeout"), message.get("priority", 0)
    progress = message.get("progress", False)
    ends_with_caller = message.get("cancel_on_disconnect", False)
    fits = (
        message.keys() <= _MEMBERS
        and isinstance(function, str)
        and isinstance(args, (dict, list))
        and (timeout is None or (type(timeout) in (int, float) and 0 < timeout < 1e9))
        and isinstance(progress, bool)
        and not (progress and shown_id is None)
        and type(priority) is int
        and abs(priority) <= 1_000_000_000
        and isinstance(ends_with_caller, bool)
    )
    if not fits:
        raise Refused("no request", shown_id)
    return Request(str(function), args, shown_id, timeout, progress, ends_with_caller)


def carried(value: Any, level: int = 2) -> Any:
    """
    Give what a reader makes of a value that a task has returned.

    Raises:
        NotCarried: JSON cannot carry it.
    """
    if isinstance(value, (dict, list, tuple)) and level > MAX_DEPTH:
        raise NotCarried("too deep")
    if isinstance(value, dict):
        return {_key(k): carried(v, level + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [carried(item, level + 1) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _key(value)
    if isinstance(value, int) and abs(value) < _MOST_DIGITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise NotCarried(type(value).__name__)


def _key(text: Any) -> str:
    if not isinstance(text, str) or _has_half_a_pair(text):
        raise NotCarried("no text")
    return str.__str__(text)
