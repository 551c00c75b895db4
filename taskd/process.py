"""
What a process tells the kernel about itself: its title, and whose death ends it.

Linux only, through ctypes. No processes are started here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from functools import cache
from typing import Any, Final

__all__ = [
    "Strays",
    "Title",
    "adopt_orphans",
    "describe_end",
    "die_with_parent",
    "reap_others",
    "resident_bytes",
]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36

_STRAYS_SECONDS: Final = 5.0
"""So long a stray stays a zombie at most."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int | bytes) -> None:
    if _libc().prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def die_with_parent(is_on: bool) -> None:
    """
    Have the kernel kill this process when the thread that spawned it dies.

    Args:
        is_on: False takes it back.

    Source:
        prctl(2), PR_SET_PDEATHSIG. A fork clears it in the child.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL) if is_on else 0)


def adopt_orphans() -> None:
    """
    Become the parent of every descendant whose own parent dies.

    So a worker whose zygote was killed stays a child of the daemon, and can be
    reaped; and what a task left behind ends in no other process's list.

    Source:
        prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def resident_bytes() -> int:
    """
    Tell how much memory this process has resident.

    Source:
        proc(5): /proc/pid/statm, second field, in pages.
    """
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Title:
    """
    The command line that ``ps`` shows for this process.

    It is written over the memory in which the kernel keeps the arguments, so a
    change costs no system call; it can be no longer than they were. A process
    and what it forks have a title each.

    Args:
        text: The title; what does not fit is cut off.

    Source:
        proc(5): /proc/pid/cmdline, and arg_start and arg_end in /proc/pid/stat.
    """

    def __init__(self, text: str) -> None:
        with open("/proc/self/stat", "rb") as stat:
            # The second field is the name in brackets, which may hold anything.
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        self._memory = memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B")
        self.set(text)

    def set(self, text: str) -> None:
        """Show *text* from now on."""
        self.window(text, 0)

    def window(self, text: str, width: int) -> memoryview:
        """
        Show *text*, and give its end to write on directly.

        Args:
            text: The title.
            width: Bytes behind it that will be written.

        Returns:
            Those bytes; fewer than *width* if there is no room for them.
        """
        size = len(self._memory) - 1
        head = text.encode()[:size]
        self._memory[:] = head.ljust(size + 1, b"\0")
        _prctl(_PR_SET_NAME, head[:15])
        return self._memory[len(head) : min(size, len(head) + width)]


def describe_end(status: int) -> str:
    """
    Say how a process ended.

    Args:
        status: Its wait status, as ``os.waitpid`` gives it.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = "; out of memory?" if number == signal.SIGKILL else ""
        # Most of the real-time signals have no name.
        named = number in list(signal.Signals)
        name = signal.Signals(number).name if named else f"signal {number}"
        return f"was killed by {name}{hint}"
    return f"exited with status {os.WEXITSTATUS(status)}"


def reap_others(known: set[int]) -> None:
    """
    Reap the dead children of this process that nobody waits for.

    Args:
        known: The pids of those that somebody does.
    """
    with contextlib.suppress(ChildProcessError):
        while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if dead.si_pid in known:
                break  # it is about to be
            os.waitpid(dead.si_pid, 0)


class Strays:
    """
    Reap what becomes this process's child without having been started by it.

    Twisted reaps only what it has spawned itself.

    Args:
        reactor: Keeps the delays.
        known: Gives the pids of those that somebody else waits for.
    """

    def __init__(self, reactor: Any, known: Callable[[], set[int]]) -> None:
        self._reactor = reactor
        self._known = known
        self._next: Any = None

    def reap(self) -> None:
        """Reap them, from now on."""
        reap_others(self._known())
        if self._next is None or not self._next.active():
            self._next = self._reactor.callLater(_STRAYS_SECONDS, self.reap)
