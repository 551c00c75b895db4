"""
What a process tells the kernel about itself.

Each test asks the kernel in a fresh interpreter, since what is told cannot be taken back.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

import taskd
from taskd.process import describe_end

START = """
import ctypes, json, os, signal
from taskd.process import *
def read(name):
    with open("/proc/self/" + name) as file:
        return file.read()
def ask(option):
    answer = ctypes.c_int(-1)
    assert ctypes.CDLL(None).prctl(option, ctypes.byref(answer), 0, 0, 0) == 0
    return answer.value
PDEATHSIG, SUBREAPER = 2, 37
"""


def run(code: str) -> list[Any]:
    """Run *code* in a fresh interpreter, and give what it has shown by ``show``."""
    shown: list[Any] = []
    show = "shown = []\nshow = shown.append\n"
    done = subprocess.run(
        [sys.executable, "-c", START + show + code + "\nprint(repr(shown))"],
        cwd=os.path.dirname(os.path.dirname(taskd.__file__)),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    shown.extend(eval(done.stdout))
    return shown


class KernelTests(SynchronousTestCase):
    """Whose death ends the process, and whose children become its own."""

    def test_die_with_parent(self) -> None:
        """The kernel is told to kill the process with its parent, and told otherwise again."""
        shown = run(
            "show(ask(PDEATHSIG)); die_with_parent(True); show(ask(PDEATHSIG));"
            "die_with_parent(False); show(ask(PDEATHSIG))"
        )
        self.assertEqual(shown, [0, signal.SIGKILL, 0])

    def test_adopt_orphans(self) -> None:
        """The process becomes the one that orphans among its descendants are given to."""
        shown = run("show(ask(SUBREAPER)); adopt_orphans(); show(ask(SUBREAPER))")
        self.assertEqual(shown, [0, 1])


class ChildTests(SynchronousTestCase):
    """Children that have ended."""

    def test_how_a_process_ended(self) -> None:
        """An exit is told by its status, a signal by its name, and SIGKILL with a guess."""
        for status, words in (
            (0, "exited with status 0"),
            (3 << 8, "exited with status 3"),
            (signal.SIGSEGV, "was killed by SIGSEGV"),
            (signal.SIGSEGV | 0x80, "was killed by SIGSEGV"),  # and dumped its core
            (signal.SIGKILL, "was killed by SIGKILL; out of memory?"),
        ):
            self.assertEqual(describe_end(status), words)

    def test_a_signal_without_a_name(self) -> None:
        """A signal that Python has no name for is told as well."""
        self.assertEqual(describe_end(40), "was killed by signal 40")

    def test_children_that_nobody_waits_for(self) -> None:
        """Children that nobody knows are reaped, and one that somebody does is left to them."""
        shown = run(
            "def child():\n    pid = os.fork()\n    if pid == 0: os._exit(3)\n"
            "    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n    return pid\n"
            "def is_reaped(pid):\n    try: os.waitpid(pid, os.WNOHANG)\n"
            "    except ChildProcessError: return True\n    return False\n"
            "stray, other = child(), child(); reap_others(set())\n"
            "show([is_reaped(stray), is_reaped(other)])\n"
            "known = child(); reap_others({known}); show(is_reaped(known))"
        )
        self.assertEqual(shown, [[True, True], False])

    def test_strays(self) -> None:
        """From the first time on, strays are reaped again and again, by one timer."""
        shown = run(
            "from twisted.internet.task import Clock\nclock = Clock()\n"
            "def child():\n    pid = os.fork()\n    if pid == 0: os._exit(3)\n"
            "    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
            "def any_left():\n    try: return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)\n"
            "    except ChildProcessError: return False\n"
            "strays = Strays(clock, set)\n"
            "child(); strays.reap(); strays.reap(); show(any_left())\n"
            "child(); clock.advance(5); show(any_left()); show(len(clock.getDelayedCalls()))"
        )
        self.assertEqual(shown, [False, False, 1])

    def test_a_child_that_runs(self) -> None:
        """A child that has not ended, and having none at all, are no reason to wait."""
        shown = run(
            "reap_others(set())\npid = os.fork()\nif pid == 0: signal.pause()\n"
            "reap_others(set()); os.kill(pid, 9); show(os.waitpid(pid, 0)[1])"
        )
        self.assertEqual(shown, [signal.SIGKILL])


class MemoryTests(SynchronousTestCase):
    """What the process has resident."""

    def test_it_grows_with_what_is_used(self) -> None:
        """Memory that is written on counts, in bytes."""
        shown = run(
            "before = resident_bytes(); kept = bytearray(os.urandom(1)) * 2**26;"
            "grown = resident_bytes() - before; show(2**25 < grown < 2**27)"
        )
        self.assertEqual(shown, [True])


class TitleTests(SynchronousTestCase):
    """What ``ps`` shows."""

    def test_title(self) -> None:
        """The command line and the short name say the title, and nothing of what was there."""
        shown = run(
            "title = Title('taskd: zygote'); show(read('cmdline')); show(read('comm'));"
            "title.set('taskd: w'); show(read('cmdline'))"
        )
        self.assertEqual(shown[0].rstrip("\0"), "taskd: zygote")
        self.assertEqual(shown[1], "taskd: zygote\n")
        self.assertEqual(shown[2].rstrip("\0"), "taskd: w")

    def test_too_long(self) -> None:
        """What does not fit is cut off, and the environment behind it is left alone."""
        shown = run(
            "was = len(read('cmdline')), read('environ'); Title('x' * 1_000_000);"
            "now = read('cmdline');"
            "show(len(now) == was[0]); show(set(now[:-1])); show(now[-1]);"
            "show(read('environ') == was[1]); show(read('comm'))"
        )
        self.assertEqual(shown, [True, {"x"}, "\0", True, "x" * 15 + "\n"])

    def test_window(self) -> None:
        """What is written on the window stands behind the title, without another call."""
        shown = run(
            "window = Title('').window('taskd: worker 1 (', 8); show(len(window));"
            "show(read('cmdline')); window[:5] = b'idle)'; show(read('cmdline'))"
        )
        self.assertEqual(shown[0], 8)
        self.assertEqual(shown[1].rstrip("\0"), "taskd: worker 1 (")
        self.assertEqual(shown[2].rstrip("\0"), "taskd: worker 1 (idle)")

    def test_a_narrow_window(self) -> None:
        """Where there is no room the window is as small as the room, down to nothing."""
        shown = run(
            "room = len(read('cmdline')) - 1; title = Title('');"
            "show([len(title.window('x' * n, 8)) for n in (room - 8, room - 3, room, room + 9)]);"
            "show(len(read('cmdline')) == room + 1)"
        )
        self.assertEqual(shown, [[8, 3, 0, 0], True])

    def test_a_fork_has_a_title_of_its_own(self) -> None:
        """What a forked process shows does not change what its parent shows."""
        shown = run(
            "title = Title('parent')\npid = os.fork()\n"
            "if pid == 0:\n    title.set('child'); os._exit(read('cmdline')[:5] != 'child')\n"
            "show(os.waitpid(pid, 0)[1]); show(read('cmdline')[:6])"
        )
        self.assertEqual(shown, [0, "parent"])
