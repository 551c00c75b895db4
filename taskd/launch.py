"""
What twistd makes of a start: options, one line when it fails, a log as it was ordered.

It is the same for ``twistd taskd`` and for ``twistd taskd-gateway``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar

from twisted.application.service import Service
from twisted.logger import ILogObserver, Logger
from twisted.python import usage
from twisted.python.components import Componentized

from taskd import __version__
from taskd.errors import SettingsError, StartFailed
from taskd.logs import observer_for

__all__ = ["CommandOptions", "WritesItsLog", "in_one_line", "one_line_for_failed_starts"]


def in_one_line(command: str, error: usage.UsageError) -> SystemExit:
    """
    Say in one line what is wrong with the options; the list of all of them would bury it.

    Args:
        command: The name behind ``twistd``.
        error: What is wrong.
    """
    told = str(error).removeprefix("Parameter type enforcement failed: ")
    return SystemExit(f"twistd {command}: {told}; see twistd {command} --help")


class CommandOptions(usage.Options):
    """
    What the options of every command have in common.

    Attributes:
        command: The name behind ``twistd``.
    """

    command: ClassVar[str]

    def opt_version(self) -> None:
        """Show taskd's version and exit."""
        print("taskd", __version__)  # noqa: T201
        sys.exit(0)

    def parseOptions(self, options: Any = None) -> None:
        """Parse, and say in one line what is wrong."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            raise in_one_line(self.command, error) from None

    @property
    def _twistd(self) -> Mapping[str, Any]:
        """Give twistd's own options."""
        return self.parent if self.parent is not None else {}

    def check_log(self) -> None:
        """
        Check that the log can be written as it is ordered.

        Raises:
            SettingsError: twistd is to write it otherwise.
        """
        if self["log-format"] == "json" and self._twistd.get("logger"):
            raise SettingsError("--log-format json is of no use with twistd's --logger")

    def observer(self) -> ILogObserver | None:
        """Make what writes the log; None: that is left to twistd."""
        if self.parent is None or self._twistd.get("logger"):
            return None
        return observer_for(self["log-format"], self["log-level"], self._twistd)


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
