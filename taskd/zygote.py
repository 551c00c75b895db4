"""
The zygote: import once, fork a worker each time the supervisor asks, reap.

It runs no reactor, no thread and no task, so it can always be forked and always
answers. Its one connection is the socket to the supervisor; when that ends, it
sees to it that no worker stays behind. Only the standard library is used here;
what a worker is comes by name, from the supervisor.

Lines of JSON pass between the two. To the zygote: ``load``, ``fork``, ``kill``,
``unlisten``.
From it: ``loaded``, ``failed``, ``again`` (the imports cannot be forked: load
without them), ``forked`` (with the supervisor's end of the worker's socket
attached), ``unforked``, ``exited``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, Final, NoReturn

from taskd.errors import StartFailed
from taskd.process import Title, adopt_orphans, die_with_parent

__all__ = ["CONTROL_FD", "LISTENING_FD", "SCOREBOARD_FD", "main"]

CONTROL_FD: Final = 3
SCOREBOARD_FD: Final = 4
LISTENING_FD: Final = 5
"""The first of the listening sockets; the others follow it."""

_KILL_AFTER_GRACE_SECONDS: Final = 1.0

_SUCCESS: Final = "+"
"""What a child says that could import the task modules; dying says nothing."""


def main() -> NoReturn:
    """Be the zygote of the process that holds the other end of ``CONTROL_FD``."""
    # Until the imports are done nobody reads the socket, so the kernel has to watch.
    die_with_parent(True)
    adopt_orphans()
    # What is freed here leaves holes, which the workers would fill, each on its
    # own copy of the page.
    gc.disable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # The workers inherit both: what a crash, and a signal before a kill, print of them.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    title = Title("taskd: zygote")
    if os.getsid(0) != os.getpid():
        os.setsid()  # a terminal's Ctrl-C is for the supervisor
    zygote = _Zygote(socket.socket(fileno=CONTROL_FD), title)
    try:
        zygote.run()
    except BrokenPipeError:
        pass
    finally:
        zygote.end()
    os._exit(0)


class _Zygote:
    def __init__(self, control: socket.socket, title: Title) -> None:
        self._control = control
        self._title = title
        self._unread = b""
        self._is_orphaned = False
        self._children: set[int] = set()
        self._boot: Any = None
        self._prepared: Any = None
        self._spec: dict[str, Any] = {}
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Obey until the supervisor is gone."""
        self._watch_children()
        while True:
            select.select([self._control.fileno(), self._woken], [], [])
            self._reap()
            if not self._obey():
                return

    def _watch_children(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _obey(self) -> bool:
        """Do what has been asked; tell whether the supervisor is still there."""
        try:
            data = self._control.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "load" in message:
                self._load(message["load"])
            elif "fork" in message:
                for number in message["fork"]:
                    self._fork(number)
            elif "unlisten" in message:
                self._close_ports()
            elif "kill" in message and message["kill"] in self._children:
                _send_signal(message["kill"], message["signal"])
        return bool(data)

    def _tell(self, fd: int | None = None, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        sent = socket.send_fds(self._control, [data], [] if fd is None else [fd])
        self._control.sendall(data[sent:])

    # Load.

    def _load(self, spec: dict[str, Any]) -> None:
        """Import what the workers need, as far as it can be shared by a fork."""
        self._spec = spec
        self._boot = importlib.import_module(spec["boot"])
        sys.path.insert(0, spec["directory"])
        try:
            if spec["preload"]:
                self._prepared = self._boot.prepare(spec)
            else:
                self._try_in_child()
        except StartFailed as error:
            self._tell(failed=str(error))
            return
        self._watch_children()  # a task module may have had its own way with signals
        if reason := _why_not_to_fork():
            # What has been imported cannot be undone, so start over without it.
            self._tell(again=reason)
            sys.stdout.flush()
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 (itself, without a shell)
        if self._prepared is not None:
            self._boot.rehearse(self._prepared)
        gc.freeze()
        die_with_parent(False)
        self._tell(loaded=True)

    def _try_in_child(self) -> None:
        """Find out whether the imports succeed without doing them here."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            die_with_parent(True)  # a fork clears it
            os.close(reader)
            self._close_ports()
            told = _SUCCESS
            try:
                self._boot.prepare(self._spec)
            except StartFailed as error:
                told = str(error)
            os.write(writer, told.encode()[: select.PIPE_BUF])
            os._exit(0)
        os.close(writer)
        # One read, not until the end: the modules may have started what keeps the pipe open.
        told = os.read(reader, select.PIPE_BUF).decode(errors="replace")
        os.close(reader)
        os.waitpid(pid, 0)
        if told != _SUCCESS:
            raise StartFailed(told or "the process died while it imported the task modules")

    # Fork and reap.

    def _fork(self, number: int) -> None:
        try:
            theirs, ours = socket.socketpair()
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                theirs.close()
                raise
        except OSError as error:
            self._tell(unforked=number, reason=str(error))
            return
        if pid == 0:
            theirs.close()
            self._become_worker(number, ours)
        ours.close()
        self._children.add(pid)
        self._tell(theirs.fileno(), forked=number, pid=pid)
        theirs.close()

    def _become_worker(self, number: int, link: socket.socket) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for inherited in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(inherited, signal.SIG_DFL)
            os.close(self._woken)
            os.close(self._wake)
            self._control.close()
            listening = [LISTENING_FD + n for n in range(self._spec["listening"])]
            gc.enable()
            prepared = self._prepared or self._spec
            self._boot.run(number, prepared, link, listening, SCOREBOARD_FD, self._title)
            status = 0
        except StartFailed as error:
            print(error, file=sys.stderr)  # noqa: T201 (read and logged by the supervisor)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            # The zygote's own frames are below: this process must not return into them.
            os._exit(status)

    def _close_ports(self) -> None:
        for n in range(self._spec.get("listening", 0)):
            os.close(LISTENING_FD + n)
        self._spec["listening"] = 0

    def _reap(self) -> None:
        try:
            while os.read(self._woken, 4096):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # Others are what dead workers' tasks have left behind.
            if pid in self._children:
                self._children.discard(pid)
                if not self._is_orphaned:
                    self._tell(exited=pid, status=status)

    def end(self) -> None:
        """Wait until the workers have drained, kill what has not, and reap it."""
        self._is_orphaned = True
        self._close_ports()
        deadline = time.monotonic() + self._spec.get("grace_seconds", 0) + _KILL_AFTER_GRACE_SECONDS
        is_killing = False
        self._reap()  # those whose end could not be told
        while self._children:
            left = deadline - time.monotonic()
            if left <= 0 and not is_killing:
                is_killing = True
                for pid in self._children:
                    _send_signal(pid, signal.SIGKILL)
            select.select([self._woken], [], [], None if is_killing else max(0.0, left))
            self._reap()


def _send_signal(pid: int, number: int) -> None:
    """Send a signal to a child, if it has not been reaped behind our back."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _why_not_to_fork() -> str:
    """Tell what the imports have set going that would not survive a fork, or ''."""
    threads = len(os.listdir("/proc/self/task")) - 1
    if threads:
        return f"the task modules start {threads} thread{'s' * (threads > 1)} when imported"
    if "twisted.internet.reactor" in sys.modules:
        return "the task modules install a reactor when imported"
    return ""
