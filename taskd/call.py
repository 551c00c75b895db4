"""
One call in flight: what was asked, and the one reply that it ends in.

A call belongs to the reactor's thread. Whoever comes first ends it (its task,
its time limit, its caller's cancel); whatever comes later finds it ended.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger, LogLevel

from taskd.errors import (
    CallError,
    Cancelled,
    InternalError,
    NotJson,
    TaskFailed,
    TimeLimitExceeded,
    WorkerLost,
)
from taskd.functions import Function
from taskd.wire import Terms, encode_error

__all__ = ["Call", "Origin", "about", "task_failed"]

_LONGEST_MESSAGE: Final = 8192
"""Characters of an exception's own text that are passed on."""

_LONGEST_SHOWN_ID: Final = 128

_LEVELS: Final = {
    Cancelled: LogLevel.info,
    TimeLimitExceeded: LogLevel.warn,
    WorkerLost: LogLevel.warn,
    InternalError: LogLevel.error,
}
"""How loud it is logged that a call has failed without its task's doing."""


class Origin(Protocol):
    """Where a call comes from, for the log."""

    def about(self) -> dict[str, str]:
        """Give ``connection``, and ``caller`` if it is known who calls."""


def about(function: Function, id_json: str, origin: Origin | None) -> dict[str, str]:
    """
    Give what every line of the log says that is about one call; never its arguments.

    Args:
        function: What was called.
        id_json: The caller's id as JSON, or ''.
        origin: Where it comes from; None: from another worker.
    """
    fields = {"function": function.name}
    if id_json:
        is_short = len(id_json) <= _LONGEST_SHOWN_ID
        fields["id"] = id_json if is_short else f"{id_json[:_LONGEST_SHOWN_ID]}…"
    return fields if origin is None else {**fields, **origin.about()}


class Call:
    """
    One call whose reply is still owed.

    Args:
        function: What was called.
        positional: Its positional arguments, bound.
        keywords: Its keyword arguments, bound.
        id_json: The caller's id as JSON, or ''.
        terms: What else the caller asked for.
        on_end: Takes the call, once, when it has its reply.
        send_progress: Takes progress messages; None if its caller wants none.
        origin: Where it comes from; None: from another worker.

    Attributes:
        reply: The line to send, once it has ended; None before.
        code: What its caller is told, once it has failed; None: it is done, or not over.
        seconds: How long it ran, once that is known.
        abandon: Takes the call when it has failed, to stop its task where that
            can be done; set by who runs it.
        timer: What ends it when its time is over; set by who runs it.
        deadline: When its caller's time is over, in CLOCK_MONOTONIC seconds, or
            None; set by who runs it.
        began: When its function was called, in CLOCK_MONOTONIC seconds, or None;
            set by who runs it.
    """

    _log = Logger(namespace="taskd.call")

    __slots__ = (
        "abandon",
        "began",
        "code",
        "deadline",
        "function",
        "id_json",
        "keywords",
        "on_end",
        "origin",
        "positional",
        "reply",
        "seconds",
        "send_progress",
        "terms",
        "timer",
    )

    def __init__(
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
        terms: Terms,
        on_end: Callable[[Call], None],
        send_progress: Callable[[bytes], None] | None,
        origin: Origin | None = None,
    ) -> None:
        self.function = function
        self.positional = positional
        self.keywords = keywords
        self.id_json = id_json
        self.terms = terms
        self.on_end = on_end
        self.send_progress = send_progress
        self.origin = origin
        self.reply: bytes | None = None
        self.code: str | None = None
        self.seconds: float | None = None
        self.abandon: Callable[[Call], None] | None = None
        self.timer: IDelayedCall | None = None
        self.deadline: float | None = None
        self.began: float | None = None

    def end(self, reply: bytes, seconds: float | None = None, code: str | None = None) -> None:
        """
        End the call; without effect if it has ended before.

        Args:
            reply: The line to send.
            seconds: How long it ran, if that is known.
            code: What its caller is told if it has failed; None: it is done.
        """
        if self.reply is None:
            self.reply = reply
            self.seconds = seconds
            self.code = code
            if self.timer is not None:
                self.stop_timer()
            self.on_end(self)

    def fail(self, error: CallError) -> None:
        """End the call with an error, and stop its task where that can be done."""
        if self.reply is None:
            level = _LEVELS.get(type(error))
            if level is not None:
                what = error.message or error.code
                self._log.emit(level, "{log_text}", log_text=what, code=error.code, **self.about())
            self.end(encode_error(self.id_json, error), None, error.code)
            if self.abandon is not None:
                self.abandon(self)

    def ran_seconds(self, now: float) -> float | None:
        """
        Tell how long its function has run, or None if it was not called, or elsewhere.

        Args:
            now: CLOCK_MONOTONIC seconds.
        """
        if self.seconds is None and self.began is not None:
            return now - self.began
        return self.seconds

    def about(self) -> dict[str, str]:
        """Give what every line of the log says that is about this call."""
        return about(self.function, self.id_json, self.origin)

    def stop_timer(self) -> None:
        """Let its time run without an end."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        self.timer = None


def task_failed(name: str, error: BaseException, debug: bool) -> TaskFailed:
    """
    Describe a task's exception to its caller.

    Args:
        name: The function's name.
        error: What it raised, or ``NotJson`` for what it returned.
        debug: True: the traceback is told as well.
    """
    if isinstance(error, NotJson):
        message = f"{name} returned what JSON cannot carry: {error}"
    else:
        try:
            message = str(error)[:_LONGEST_MESSAGE]
        except BaseException:  # the task's own class wrote that __str__
            message = "(its message cannot be shown)"
    details = {"type": type(error).__qualname__}
    if debug:
        details["traceback"] = "".join(traceback.format_exception(error))
    return TaskFailed(message or details["type"], **details)
