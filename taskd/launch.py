"""
What twistd makes of a start: one line when it fails, and a log as it was ordered.

It is the same for ``twistd taskd`` and for ``twistd taskd-gateway``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from twisted.application.service import Service
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.components import Componentized

from taskd.errors import StartFailed

__all__ = ["WritesItsLog", "in_one_line", "one_line_for_failed_starts"]


def in_one_line(command: str, error: usage.UsageError) -> SystemExit:
    """
    Say in one line what is wrong with the options; the list of all of them would bury it.

    Args:
        command: The name behind ``twistd``.
        error: What is wrong.
    """
    told = str(error).removeprefix("Parameter type enforcement failed: ")
    return SystemExit(f"twistd {command}: {told}; see twistd {command} --help")


class WritesItsLog(Service):
    """
    A service which has its application write the log as it was told.

    Attributes:
        observer: Makes what writes it, or gives None: that is left to twistd.
    """

    observer: Callable[[], ILogObserver | None]

    def setServiceParent(self, parent: Any) -> None:  # noqa: N802
        """Become part of an application, which twistd asks then for an observer."""
        if isinstance(parent, Componentized) and (observer := self.observer()) is not None:
            parent.setComponent(ILogObserver, observer)
        super().setServiceParent(parent)  # type: ignore[no-untyped-call]


_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def one_line_for_failed_starts(command: str, previous: _Hook) -> _Hook:
    """
    Make twistd end with one line, instead of a traceback, when the daemon cannot start.

    twistd lets the exception through, so that its own cleaning up is done and
    the exit status is 1; only what is shown is left to us.

    Args:
        command: The name behind ``twistd``.
        previous: What shows all other exceptions.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, StartFailed):
            previous(kind, error, trace)
            return
        print(f"twistd {command}: {error}", file=sys.__stderr__)
        if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
            # A daemon has no terminal any more, and twistd says to look at the log.
            Logger(namespace="taskd").critical("cannot start: {reason}", reason=error)

    return hook
