"""
The supervisor's side of its children: one record for each process, and its link.

A record knows its process, speaks with it, and tells the supervisor what has
happened; what is done about it is the supervisor's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from twisted.internet.interfaces import IFileDescriptorReceiver
from twisted.internet.process import registerReapProcessHandler, unregisterReapProcessHandler
from twisted.internet.protocol import ProcessProtocol, connectionDone
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.errors import StartFailed
from taskd.lines import LongLineReceiver, OneConnection
from taskd.zygote import CONTROL_FD, LISTENING_FD, SCOREBOARD_FD

__all__ = ["Parent", "Worker", "Zygote"]

_NOT_FOR_CHILDREN: Final = frozenset(
    {
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "NOTIFY_SOCKET",
        "TASKD_SMTP_LOGIN",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
"""What the environment says to this process alone."""


class Parent(Protocol):
    """What the records tell the supervisor."""

    def zygote_loaded(self, zygote: Zygote, /) -> None: ...  # noqa: D102
    def zygote_cannot_preload(self, reason: str, /) -> None: ...  # noqa: D102
    def zygote_failed(self, zygote: Zygote, reason: str, /) -> None: ...  # noqa: D102
    def zygote_gone(self, zygote: Zygote, status: int, /) -> None: ...  # noqa: D102
    def worker_forked(self, zygote: Zygote, number: int, pid: int, fd: int, /) -> None: ...  # noqa: D102
    def worker_not_forked(self, number: int, reason: str, /) -> None: ...  # noqa: D102
    def worker_ready(self, worker: Worker, /) -> None: ...  # noqa: D102
    def worker_gone(self, worker: Worker, /) -> None: ...  # noqa: D102
    def worker_exited(self, pid: int, status: int, /) -> None: ...  # noqa: D102


class Worker(LongLineReceiver):
    """
    The supervisor's record of one worker, and its end of the link.

    Attributes:
        number: The worker's slot.
        pid: Its process.
        ready_at: When it began to accept, or None.
        is_gone: True once its link has ended.
        is_orphan: True if its zygote is dead, and so this process its parent.
    """

    def __init__(self, parent: Parent, number: int, pid: int) -> None:
        super().__init__()
        self.MAX_LENGTH = sys.maxsize
        self.number = number
        self.pid = pid
        self.ready_at: float | None = None
        self.is_gone = False
        self.is_orphan = False
        self._parent = parent

    def lived_seconds(self, now: float) -> float:
        """Tell how long it has served."""
        return 0.0 if self.ready_at is None else now - self.ready_at

    def drain(self) -> None:
        """Tell it to finish and go."""
        if not self.is_gone:
            self.transport.write(b'{"drain": true}\n')

    def await_death(self) -> None:
        """Reap it from now on, as its parent."""
        if not self.is_orphan:
            self.is_orphan = True
            registerReapProcessHandler(self.pid, self)

    def lineReceived(self, line: bytes) -> None:
        """Take a message of the worker's."""
        message = json.loads(line)
        if "ready" in message:
            self._parent.worker_ready(self)
        elif "log" in message:
            event = message["log"]
            Logger(namespace=event["namespace"]).emit(
                LogLevel.levelWithName(event["level"]),
                "worker {worker}: {text}",
                worker=self.number,
                text=event["text"],
            )

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take it that the worker is dead, or as good as dead."""
        if not self.is_gone:
            self.is_gone = True
            self._parent.worker_gone(self)

    # twisted.internet.process calls these on what is registered for reaping.

    def reapProcess(self) -> None:  # noqa: N802
        """Reap the process if it has died."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid:
            unregisterReapProcessHandler(self.pid, self)
            self.processEnded(status)

    def processEnded(self, status: int) -> None:
        """Take note that the process has been reaped."""
        self._parent.worker_exited(self.pid, status)


class Zygote(ProcessProtocol):
    """
    The supervisor's record of one zygote.

    Args:
        parent: Who is told.
        reactor: Spawns it.
        spec: What it is told to load.
        scoreboard_fd: Inherited by it.
        listening: Inherited by it.

    Attributes:
        loaded_at: Since when it can fork, or None; set by the parent.
    """

    _output = Logger(namespace="taskd.output")

    def __init__(
        self,
        parent: Parent,
        reactor: Any,
        spec: dict[str, Any],
        scoreboard_fd: int,
        listening: list[socket.socket],
    ) -> None:
        self._parent = parent
        self._reactor = reactor
        self._spec = spec
        self.loaded_at: float | None = None
        self._unread = {1: b"", 2: b""}
        self._control, theirs = socket.socketpair()
        child_fds: dict[int, int | str] = {
            1: "r",
            2: "r",
            CONTROL_FD: theirs.fileno(),
            SCOREBOARD_FD: scoreboard_fd,
        }
        for n, sock in enumerate(listening):
            child_fds[LISTENING_FD + n] = sock.fileno()
        program = f"import sys; sys.path[:] = {sys.path!r}; from taskd.zygote import main; main()"
        try:
            with open(os.devnull, "rb") as devnull:
                child_fds[0] = devnull.fileno()
                self._process = reactor.spawnProcess(
                    self,
                    sys.executable,
                    [sys.executable, "-P", "-c", program],
                    env={k: v for k, v in os.environ.items() if k not in _NOT_FOR_CHILDREN},
                    childFDs=child_fds,
                )
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid: int = self._process.pid
        self._link: _Link | None = None
        self._send(load=spec)

    @property
    def is_loaded(self) -> bool:
        """Tell whether it can fork."""
        return self.loaded_at is not None

    def lived_seconds(self, now: float) -> float:
        """Tell how long it has been able to fork."""
        return 0.0 if self.loaded_at is None else now - self.loaded_at

    def wait_until_loaded(self) -> None:
        """
        Wait, without a reactor, until it has imported the task modules.

        What it and they print meanwhile is logged.

        Raises:
            StartFailed: It could not.
        """
        pipes = list(self._process.pipes.values())
        received = b""
        while self.loaded_at is None:
            ready, _, _ = select.select([self._control, *pipes], [], [])
            for pipe in ready:
                if pipe is not self._control and pipe.doRead() is not None:
                    pipes.remove(pipe)
            if self._control in ready:
                data = self._control.recv(65536)
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self.told(json.loads(line), self._raise)
                if not data:
                    self._raise("the zygote died while it imported the task modules")
        self.begin()

    def _raise(self, reason: str) -> None:
        self._control.close()
        raise StartFailed(reason)

    def begin(self) -> None:
        """Listen to it from the reactor from now on."""
        self._control.setblocking(False)
        self._link = _Link(self)
        self._reactor.adoptStreamConnection(
            self._control.fileno(), socket.AF_UNIX, OneConnection(self._link)
        )
        self._control.close()

    def _send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        if self._link is None:
            self._control.sendall(data)
        else:
            self._link.transport.write(data)

    def told(self, message: dict[str, Any], failed: Callable[[str], None]) -> None:
        """
        Take what it says before it can fork.

        Args:
            message: ``loaded``, ``failed`` or ``again``.
            failed: Takes the reason why it cannot go on.
        """
        if "loaded" in message:
            self._parent.zygote_loaded(self)
        elif "failed" in message:
            failed(message["failed"])
        elif "again" in message:
            self._parent.zygote_cannot_preload(message["again"])
            self._spec["preload"] = False
            self._send(load=self._spec)

    def fork(self, numbers: set[int]) -> None:
        """Ask for workers."""
        self._send(fork=sorted(numbers))

    def kill(self, pid: int) -> None:
        """Have a worker killed by the one who knows whether the pid is still its own."""
        self._send(kill=pid, signal=int(signal.SIGKILL))

    def unlisten(self) -> None:
        """Have it close its copies of the ports, so that nobody listens any more."""
        self._send(unlisten=True)

    def dismiss(self) -> None:
        """Let it go."""
        if self._link is not None:
            self._link.transport.loseConnection()

    def end(self) -> None:
        """Kill it."""
        self._process.signalProcess("KILL")

    def link_received(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take a message that came over the link."""
        if "forked" in message:
            self._parent.worker_forked(self, message["forked"], message["pid"], fds.pop(0))
        elif "exited" in message:
            self._parent.worker_exited(message["exited"], message["status"])
        elif "unforked" in message:
            self._parent.worker_not_forked(message["unforked"], message["reason"])
        else:
            self.told(message, partial(self._parent.zygote_failed, self))

    # Twisted calls these.

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N803
        """Log what the zygote and all workers print, line by line."""
        *lines, self._unread[childFD] = (self._unread[childFD] + data).split(b"\n")
        for line in lines:
            self._output.info("{line}", line=line.decode(errors="backslashreplace"))

    def processExited(self, reason: Failure) -> None:
        """
        Tell the supervisor how it ended.

        Not ``processEnded``: that would wait for the pipes, which the workers keep open.
        """
        status = getattr(reason.value, "status", None)  # ProcessDone and ProcessTerminated have it
        self._parent.zygote_gone(self, status or 0)


@implementer(IFileDescriptorReceiver)
class _Link(LongLineReceiver):
    """The supervisor's end of the socket to the zygote."""

    def __init__(self, zygote: Zygote) -> None:
        super().__init__()
        self.MAX_LENGTH = sys.maxsize
        self._zygote = zygote
        self._fds: list[int] = []

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keep a worker's socket until the message comes that says whose it is."""
        self._fds.append(descriptor)

    def lineReceived(self, line: bytes) -> None:
        """Hand a message on."""
        self._zygote.link_received(json.loads(line), self._fds)
