"""
Which call it is that something is logged of, found out only when it is.

A task is not told what it is called for, and nothing is noted for each call: that
would make all of them dearer. Whoever runs a blocking call has it noted already; a
coroutine carries it in its context; and a function that is called at once is found
on the stack.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from types import CodeType
from typing import Final

from taskd.call import Call, about

__all__ = ["about_now", "running", "stack_of"]

running: Final[ContextVar[Call | None]] = ContextVar("running", default=None)
"""The call whose task runs in this context, on the reactor."""

_Threads = Mapping[int, list[Call | None]]
"""What each thread runs, by its identity."""


def about_now(threads: _Threads, at_once: CodeType) -> dict[str, str]:
    """
    Tell which call's task asks.

    Args:
        threads: What each thread runs.
        at_once: The code of ``Executor.call_now``.

    Returns:
        What ``call.about`` gives; nothing if no task asks.
    """
    mine = threads.get(threading.get_ident())
    call = mine[0] if mine is not None else running.get()
    if call is not None:
        return call.about()
    frame = sys._getframe()
    while frame.f_code is not at_once:
        if frame.f_back is None:
            return {}
        frame = frame.f_back
    called = frame.f_locals
    return about(called["function"], called["id_json"], called["origin"])


def stack_of(call: Call, threads: _Threads) -> str:
    """Tell where the thread stands that runs a call."""
    frames = sys._current_frames()
    return "".join(
        "".join(traceback.format_stack(frames[thread]))
        for thread, (runs,) in list(threads.items())
        if runs is call and thread in frames
    )
