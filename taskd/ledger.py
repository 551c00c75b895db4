"""
What became of calls: each is counted once, and what went wrong is logged and kept.

A call is counted by the worker that answers its caller, under what that caller was
told. Who runs it may be another worker, which says how long it ran; two that end one
call at the same moment (its task, its caller's time, a cancel) could not count it
once. A call that died with its worker is counted by the supervisor.

Recent failures are kept where they are known best: a task's own exception where the
task ran, a time limit and an internal error by the worker that answers, the death of
a worker by the supervisor. Others are only counted: a caller who brings them about
(bad arguments, a cancel, a flood that is refused) would push out what matters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from taskd.call import Call, Origin, about, task_failed
from taskd.errors import CallError, InternalError, TimeLimitExceeded, WorkerLost
from taskd.failures import Failures
from taskd.functions import RESERVED_PREFIX, Function, label_of
from taskd.tally import Tally
from taskd.wire import encode_error

__all__ = ["Ledger"]

_KEPT: Final = frozenset({TimeLimitExceeded.code, InternalError.code})
"""Failures that are kept by who answers."""


class Ledger:
    """
    The books of one process.

    Args:
        tally: Where it counts.
        failures: Where it keeps failures.
        worker: Its slot.
        debug: True: callers are told tracebacks.
        clock: Gives CLOCK_MONOTONIC seconds.
        wall_clock: Gives seconds since the epoch.

    Attributes:
        done: As the tally's.
        count_failed: As the tally's ``failed``.
    """

    _log = Logger(namespace="taskd.ledger")

    def __init__(
        self,
        tally: Tally,
        failures: Failures,
        worker: int,
        *,
        debug: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.done = tally.done
        self.count_failed = tally.failed
        self._failures = failures
        self._worker = worker
        self._debug = debug
        self._clock = clock
        self._wall_clock = wall_clock

    def failed(self, call: Call) -> None:
        """Count a call that has failed, of one of this worker's callers; keep what is ours."""
        code = call.code or ""
        self.count_failed(call.function.label, code, call.ran_seconds(self._clock()))
        if code in _KEPT:
            # The reply may be another worker's; nothing else of its error has come here.
            error = json.loads(call.reply or b"")["error"]
            self._note(self._worker, call.function.name, code, None, error["message"])

    def refused(self, function: Function, error: CallError) -> None:
        """Count a call that has come to nothing before it was one."""
        self.count_failed(function.label, error.code, None)

    def explain(
        self,
        function: Function,
        id_json: str,
        origin: Origin | None,
        error: BaseException,
        began: float | None,
    ) -> bytes:
        """
        Log what a task has raised, keep it, and make the reply that says so.

        Args:
            function: What was called.
            id_json: The caller's id as JSON, or ''.
            origin: Where the call comes from; None: from another worker.
            error: What was raised.
            began: When it was called, in CLOCK_MONOTONIC seconds, if that is known.
        """
        more: dict[str, Any] = about(function, id_json, origin)
        if began is not None:
            more["seconds"] = self._clock() - began
        self._log.failure("{function} failed", Failure(error), LogLevel.warn, **more)
        failed = task_failed(function.name, error, self._debug)
        self._note(self._worker, function.name, failed.code, failed.type, failed.message)
        return encode_error(id_json, failed)

    def raised(self, call: Call, error: BaseException) -> bytes:
        """Take what a call's task has raised; as ``explain``."""
        return self.explain(call.function, call.id_json, call.origin, error, call.began)

    def buried(self, worker: int, function: str, end: str, *, is_counted: bool) -> None:
        """
        Keep that a worker has died with a task.

        Args:
            worker: Its slot.
            function: What it ran.
            end: How it ended, as ``describe_end`` says it.
            is_counted: True if those count the call who answer its caller; False:
                that was the dead worker itself.
        """
        if not is_counted:
            self.count_failed(label_of(function), WorkerLost.code, None)
        self._note(worker, function, WorkerLost.code, None, f"worker {worker} {end}")

    def _note(self, worker: int, function: str, code: str, kind: str | None, message: str) -> None:
        if not function.startswith(RESERVED_PREFIX):
            self._failures.note(self._wall_clock(), worker, function, code, kind, message)
