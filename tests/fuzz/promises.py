"""
What a request is owed, and the shapes that replies have, as docs/protocol.rst has them.

Everything here is told from the request alone; what happens to a connection is
``conversation``'s.
"""

from __future__ import annotations

import inspect
import keyword
from typing import Any, Final

from twisted.internet.defer import Deferred

from tests.fuzz.reading import NotCarried, Request, carried
from tests.fuzz.stage import PLAIN

__all__ = [
    "RETRYABLE",
    "Broken",
    "Outcome",
    "Owed",
    "bind",
    "check",
    "fits_bare",
    "is_error",
    "is_progress",
    "value_of",
]

RETRYABLE: Final = {
    "malformed": False,
    "line-too-long": False,
    "unauthorized": False,
    "unknown-function": False,
    "bad-arguments": False,
    "task-failed": False,
    "time-limit": False,
    "cancelled": False,
    "worker-lost": True,
    "overloaded": True,
    "shutting-down": True,
}
"""All codes of the page but ``internal``, which is a bug."""

_SIGNATURES: Final = {name: inspect.signature(plain) for name, plain in PLAIN.items()}


class Broken(AssertionError):
    """A promise of the protocol is broken."""


def check(is_kept: object, promise: str, *facts: object) -> None:
    """Raise ``Broken`` unless a promise is kept."""
    if not is_kept:
        raise Broken(f"{promise}: {' | '.join(f'{fact!r:.600}' for fact in facts)}")


class Outcome:
    """
    What a request ends in.

    Attributes:
        code: The error's code, or ''.
        shown: The repr of the result.
        kind: The error's ``type``, or '' if it may be any.
    """

    def __init__(self, code: str = "", shown: str = "", kind: str = "") -> None:
        self.code = code
        self.shown = shown
        self.kind = kind

    @classmethod
    def of_result(cls, value: Any) -> Outcome:
        """Give what comes of a value that a task has returned."""
        try:
            return cls(shown=repr(carried(value)))
        except NotCarried:
            return cls("task-failed", kind="NotJson")
        except RecursionError:  # it contains itself
            return cls("task-failed", kind="NotJson")

    @classmethod
    def of_error(cls, error: BaseException) -> Outcome:
        """Give what comes of an exception that a task has raised."""
        return cls("task-failed", kind=type(error).__name__)

    def fits(self, is_error: bool, body: Any) -> bool:
        """Tell whether a reply is this."""
        if not self.code:
            return not is_error and repr(body) == self.shown
        if not is_error or body["code"] != self.code:
            return False
        return not self.kind or body.get("type") == self.kind

    def __repr__(self) -> str:
        return self.code + self.kind or self.shown


class Owed:
    """
    A request that has no reply yet.

    Attributes:
        outcomes: What it may have ended in; empty while it has not.
        may_wait: True if it is not certain that it has ended.
        due: When its time is over, or None.
        label: What a held task gives when it is fired.
    """

    def __init__(self, request: Request | None, shown_id: str | None, *outcomes: Outcome) -> None:
        self.request = request
        self.shown_id = shown_id
        self.outcomes = list(outcomes)
        self.may_wait = False
        self.due: float | None = None
        self.label: Any = None
        self.is_held = False

    def end(self, outcome: Outcome) -> None:
        """Foretell its reply, unless that is certain already."""
        if self.is_open:
            self.outcomes = [*self.outcomes, outcome] if self.may_wait else [outcome]
            self.may_wait = False

    @property
    def is_open(self) -> bool:
        """Whether it may still wait for its end."""
        return self.is_held and (self.may_wait or not self.outcomes)

    def __repr__(self) -> str:
        return f"<{self.request} {self.shown_id} -> {self.outcomes}>"


def bind(name: str, args: Any) -> inspect.BoundArguments:
    """Bind arguments as Python does, once reserved names are theirs."""
    signature = _SIGNATURES[name]
    if isinstance(args, list):
        return signature.bind(*args)
    named: dict[str, Any] = {}
    parameters = signature.parameters
    for given, value in args.items():
        is_reserved = keyword.iskeyword(given) and f"{given}_" in parameters
        bound = f"{given}_" if is_reserved else given
        if bound in named:
            raise TypeError("given twice")
        named[bound] = value
    return signature.bind(**named)


def value_of(name: str, bound: inspect.BoundArguments, wants_progress: bool) -> Any:
    """Give what a function returns; a Deferred of the stage has fired already."""
    if name == "reports":
        told = [bound.arguments.get(n) for n in ("done", "total", "message")]
        if wants_progress and not _can_report(bound.arguments.get("done", 0), *told[1:]):
            return float("nan")  # refused as what JSON cannot carry
        return "reported"
    value = PLAIN[name](*bound.args, **bound.kwargs)
    if isinstance(value, Deferred):
        fired: list[Any] = []
        value.addCallback(fired.append)
        return fired[0]
    return value


def _can_report(done: Any, total: Any, message: Any) -> bool:
    is_text = message is None or isinstance(message, str)
    return (
        isinstance(done, (int, float)) and isinstance(total, (int, float, type(None))) and is_text
    )


def fits_bare(owed: Owed, value: Any) -> bool:
    is_failure = isinstance(value, dict) and value.keys() == {"error"} and is_error(value["error"])
    return any(
        outcome.fits(False, value) or (is_failure and outcome.fits(True, value["error"]))
        for outcome in owed.outcomes
    )


def is_error(body: Any) -> bool:
    """Tell whether an error object has what the page says that it has."""
    return (
        isinstance(body, dict)
        and body.keys() >= {"code", "message", "retryable"}
        and body.keys() <= {"code", "message", "retryable", "type", "traceback", "retry_after"}
        and body["code"] in RETRYABLE
        and body["retryable"] is RETRYABLE[body["code"]]
        and isinstance(body["message"], str)
        and body["message"] != ""
    )


def is_progress(body: Any) -> bool:
    return (
        isinstance(body, dict)
        and body.keys() == {"done", "total", "message"}
        and _can_report(body["done"], body["total"], body["message"])
    )
