"""
Messages to bytes and back: one line of strict JSON each.

ujson is fast and lenient: it reads ``01``, ``NaN``, ``1e400``, duplicate keys
and lone surrogates, and it writes whatever an object's ``__json__`` returns.
None of that may pass. On the way in a line is taken as ujson read it only if
ujson would write the very same text again, which proves that nothing was bent;
any other line is read by a strict decoder made of the standard library's. The
two agree on all that the first one takes; a property test holds them to it. On
the way out a value's types are checked before ujson sees them.

The text for callers is docs/protocol.rst. No sockets, no order of replies, no
functions here: only single messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

import ujson

from taskd.errors import CallError, Malformed, NotJson

__all__ = [
    "ABSENT",
    "ALPN",
    "MAX_DEPTH",
    "MAX_PRIORITY",
    "NO_TERMS",
    "Args",
    "Request",
    "Terms",
    "decode",
    "decode_reply",
    "decode_request",
    "encode",
    "encode_error",
    "encode_progress",
    "encode_request",
    "encode_result",
]

MAX_DEPTH: Final = 64
"""How deep arrays and objects may nest, the message itself counted, in and out."""

ABSENT: Final = ""
"""The ``id_json`` of a request without an id; no JSON value is written so."""

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_STRING: Final = frozenset({str})
_NUMBERS: Final = (int, float)
_NUMBERS_OR_NONE: Final = (int, float, type(None))
_TEXT_OR_NONE: Final = (str, type(None))

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]')

_NO_ARGS: Final[list[Any]] = []
_USUAL_KEYS: Final = frozenset({"function", "args", "id"})
_REQUEST_KEYS: Final = _USUAL_KEYS | {"timeout", "progress", "priority", "cancel_on_disconnect"}

ALPN: Final = b"taskd/1"
"""The name of this protocol in a TLS handshake (RFC 7301)."""

MAX_PRIORITY: Final = 1_000_000_000
"""Priorities lie within so much of 0."""


Args = list[Any] | dict[str, Any]
"""Positional arguments (array) or keyword arguments (object)."""


class Terms(NamedTuple):
    """
    What a caller may ask for beside the task itself.

    Attributes:
        timeout: Seconds that the caller gives the call, above 0, or None.
        wants_progress: True: send progress messages.
        priority: Higher is earlier, among tasks that wait.
        ends_with_caller: True: the task is cancelled when the connection ends.
    """

    timeout: float | None = None
    wants_progress: bool = False
    priority: int = 0
    ends_with_caller: bool = False


NO_TERMS: Final = Terms()
"""The terms of a request that names none: nearly all of them, so it is told by identity."""

Request = tuple[str, Args, str, Terms]
"""
A request, checked: function, arguments, id as JSON or ``ABSENT``, terms. A bare
tuple, because one is made for every call, and a class would cost a tenth of the
whole decoding.
"""


def decode(line: bytes) -> dict[str, Any]:
    """
    Read one line as a strict JSON object.

    Strict is RFC 8259 and I-JSON's (RFC 7493) ban on duplicate names and lone
    surrogates, and no number outside the doubles' range; integers are exact up
    to 4300 digits, where Python itself stops.

    Args:
        line: The message without its line feed.

    Returns:
        The object.

    Raises:
        Malformed: The line is anything else; the message says what.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = _loads(line)  # from str it takes twice the time
        if '": ' in text:
            again = _dumps(value, False, False, False, False, 0, False, True, None, (", ", ": "))
        else:
            again = _dumps(value, False, False, False, False, 0, False)
        # Only what is longer than two brackets a level can nest too deep.
        if (
            again == text
            and type(value) is dict
            and (len(text) <= 2 * MAX_DEPTH or _is_flat_enough(value, text))
        ):
            return value
    except (ValueError, OverflowError):
        pass  # the strict decoder has better words for it
    return _decode_strictly(text)


# Both are called with their options by position, since naming them doubles the
# time of a short message: no escaping to ASCII, of HTML or of slashes; no
# sorting, no indent; NaN refused. With separators: bytes refused, no default.
_loads: Final[Callable[..., Any]] = ujson.loads
_dumps: Final[Callable[..., str]] = ujson.dumps


def _is_flat_enough(value: dict[str, Any], text: str) -> bool:
    return text.count("[") + text.count("{") <= MAX_DEPTH or _nests_at_most(MAX_DEPTH, value)


def _nests_at_most(levels: int, value: Any) -> bool:
    children = value.values() if type(value) is dict else value
    return levels > 0 and (
        _SCALARS.issuperset(map(type, children))
        or all(_nests_at_most(levels - 1, c) for c in children if type(c) not in _SCALARS)
    )


def _not_an_object() -> Malformed:
    return Malformed('a message is a JSON object, such as {"function": "echo"}')


def _decode_strictly(text: str) -> dict[str, Any]:
    try:
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _refuse_depth(text)
        value = _STRICT.decode(text)
    except ValueError as error:
        # Python's words for this one advise its own programmers.
        told = "an integer of more than 4300 digits" if "digits" in str(error) else str(error)
        raise Malformed(f"not JSON: {told}") from None
    if type(value) is not dict:
        raise _not_an_object()
    if "\\u" in text:
        _refuse_lone_surrogates(value)
    return value


def _refuse_depth(text: str) -> None:
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Malformed(f"nested deeper than {MAX_DEPTH} levels")
        elif token[0] in "]}":
            depth -= 1


def _object_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Malformed(f"the name {twice!a:.60} stands twice in one object")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise Malformed(f"the number {text[:40]} is out of range")
    return value


_STRICT: Final = json.JSONDecoder(
    object_pairs_hook=_object_of_unique_names,
    parse_constant=_refuse_constant,
    parse_float=_finite_float,
)


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise Malformed(f"half of a surrogate pair in a string: {half}") from None


def decode_request(line: bytes) -> Request:
    """
    Read one line as a request.

    Args:
        line: The message without its line feed.

    Returns:
        The request, with every member of the right type.

    Raises:
        Malformed: It is not a request.
    """
    message = decode(line)
    id_json = ABSENT
    if "id" in message:
        value = message["id"]
        id_json = str(value) if type(value) is int else encode(value)
    function = message.get("function")
    args = message.get("args", _NO_ARGS)
    if (
        type(function) is str
        and (type(args) is list or type(args) is dict)
        and _USUAL_KEYS.issuperset(message)
    ):
        return function, args, id_json, NO_TERMS
    return _check_request(message, id_json)


def _check_request(message: dict[str, Any], id_json: str) -> Request:
    def refuse(text: str) -> NoReturn:
        raise Malformed(text, id_json=id_json)

    unknown = message.keys() - _REQUEST_KEYS
    if unknown:
        known = ", ".join(sorted(_REQUEST_KEYS))
        refuse(f"unknown member {min(unknown)!a:.60}; a request has {known}")
    if "function" not in message:
        refuse('the member "function" is missing')
    if type(message["function"]) is not str:
        refuse('"function" must be a string')
    args = message.get("args", _NO_ARGS)
    if type(args) not in (dict, list):
        refuse('"args" must be an object or an array')
    timeout = message.get("timeout")
    if timeout is not None and (type(timeout) not in (int, float) or not 0 < timeout < 1e9):
        refuse('"timeout" must be a number of seconds above 0 and below 1e9')
    progress = message.get("progress", False)
    if type(progress) is not bool:
        refuse('"progress" must be true or false')
    if progress and not id_json:
        refuse('"progress" needs an "id": without one it could not be told apart')
    priority = message.get("priority", 0)
    if type(priority) is not int or abs(priority) > MAX_PRIORITY:
        refuse(f'"priority" must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}')
    ends_with_caller = message.get("cancel_on_disconnect", False)
    if type(ends_with_caller) is not bool:
        refuse('"cancel_on_disconnect" must be true or false')
    terms = Terms(timeout, progress, priority, ends_with_caller)
    return message["function"], args, id_json, NO_TERMS if terms == NO_TERMS else terms


def encode(value: Any) -> str:
    """
    Write a value as JSON that every strict reader accepts.

    Nothing is converted silently: a dictionary's keys must be strings, a number
    finite, and the types str, int, float, bool, None, dict, list and tuple (a
    list on the wire), or their subclasses.

    Args:
        value: What to write.

    Returns:
        JSON on one line, not escaped to ASCII. Half of a surrogate pair is
        found only when the line is made into bytes.

    Raises:
        NotJson: The value holds something else; the message names its type and place.
    """
    kind = type(value)
    if kind not in _SCALARS and not (kind is list and _SCALARS.issuperset(map(type, value))):
        _check(value, "the value", 2)  # within the message, which is level 1
    try:
        return _dumps(value, False, False, False, False, 0, False)
    except (OverflowError, ValueError) as error:
        # ujson's words for NaN and the infinities name neither.
        told = "it holds NaN or Infinity" if "double" in str(error) else str(error)
        raise NotJson(told) from None


def _line(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _half_a_pair() from None


def _half_a_pair() -> NotJson:
    return NotJson("a string holds half of a surrogate pair")


def _check(value: Any, place: str, depth: int) -> None:
    """Refuse what ujson would write in its own way, or would fail on without saying where."""
    if depth > MAX_DEPTH:
        raise NotJson(f"nested deeper than {MAX_DEPTH} levels (or it contains itself)")
    if isinstance(value, dict):
        if not _STRING.issuperset(map(type, value)):
            for key in value:
                if not isinstance(key, str):
                    raise NotJson(f"{place} has the key {key!r:.60}: JSON's keys are strings")
        items: Any = value.items()
        children: Any = value.values()
    elif isinstance(value, (list, tuple)):
        items, children = enumerate(value), value
    elif isinstance(value, (str, int, float)) or value is None:
        return
    else:
        kind = type(value)
        name = (
            kind.__qualname__
            if kind.__module__ == "builtins"
            else f"{kind.__module__}.{kind.__qualname__}"
        )
        raise NotJson(f"{place} is of type {name}, which JSON cannot carry")
    if not _SCALARS.issuperset(map(type, children)):
        for key, child in items:
            if type(child) not in _SCALARS:
                _check(child, f"{place}[{key!r:.60}]", depth + 1)


def encode_result(id_json: str, value: Any) -> bytes:
    """
    Write the reply to a call that succeeded.

    Args:
        id_json: The request's id as JSON, or ``ABSENT`` for a bare result.
        value: What the function returned.

    Returns:
        The whole line, its line feed included.

    Raises:
        NotJson: JSON cannot carry the value.
    """
    text = encode(value)
    try:
        return f'{{"id":{id_json},"result":{text}}}\n'.encode() if id_json else f"{text}\n".encode()
    except UnicodeEncodeError:
        raise _half_a_pair() from None


def encode_error(id_json: str, error: CallError) -> bytes:
    """
    Write the reply to a call that failed.

    Args:
        id_json: The request's id as JSON, or ``ABSENT``.
        error: The failure; text in it that UTF-8 cannot carry is escaped.

    Returns:
        The whole line, its line feed included.
    """
    fields = {
        "code": error.code,
        "message": _sendable(error.message),
        "retryable": error.retryable,
        **{name: _sendable(value) for name, value in error.details.items()},
    }
    body = encode(fields)
    if id_json:
        return f'{{"id":{id_json},"error":{body}}}\n'.encode()
    return f'{{"error":{body}}}\n'.encode()


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def encode_progress(id_json: str, done: float, total: float | None, message: str | None) -> bytes:
    """
    Write a progress message.

    Args:
        id_json: The request's id as JSON.
        done: How much is done, in the task's own unit.
        total: How much there is to do, or None if unknown.
        message: What the task is doing, or None.

    Returns:
        The whole line, its line feed included.

    Raises:
        NotJson: One of them is not of its type.
    """
    for value, kinds in ((done, _NUMBERS), (total, _NUMBERS_OR_NONE), (message, _TEXT_OR_NONE)):
        if not isinstance(value, kinds):
            raise NotJson(f"progress takes numbers and a text, not {value!r:.60}")
    body = encode({"done": done, "total": total, "message": message})
    return _line(f'{{"id":{id_json},"progress":{body}}}\n')


def encode_request(request: Request) -> bytes:
    """
    Write a request, for a client.

    Args:
        request: What to ask.

    Returns:
        The whole line, its line feed included.

    Raises:
        NotJson: JSON cannot carry the arguments.
    """
    function, args, id_json, terms = request
    parts = [f'{{"function":{encode(function)},"args":{encode(args)}']
    if id_json:
        parts.append(f'"id":{id_json}')
    if terms.timeout is not None:
        parts.append(f'"timeout":{encode(terms.timeout)}')
    if terms.wants_progress:
        parts.append('"progress":true')
    if terms.priority:
        parts.append(f'"priority":{terms.priority}')
    if terms.ends_with_caller:
        parts.append('"cancel_on_disconnect":true')
    return _line(",".join(parts) + "}\n")


def decode_reply(line: bytes) -> dict[str, Any]:
    """
    Read one reply to a request that had an id, for a client.

    Args:
        line: The message without its line feed.

    Returns:
        An object with ``id`` and one of ``result``, ``error``, ``progress``;
        or without ``id`` an ``error`` that concerns the whole connection.

    Raises:
        Malformed: It is anything else.
    """
    reply = decode(line)
    body = reply.keys() - {"id"}
    if len(body) != 1 or not body <= {"result", "error", "progress"}:
        raise Malformed("not a reply: it needs one of result, error and progress")
    if "id" not in reply and "error" not in reply:
        raise Malformed('not a reply: it needs an "id"')
    for name in ("error", "progress"):
        if name in reply and type(reply[name]) is not dict:
            raise Malformed(f'not a reply: "{name}" must be an object')
    return reply
