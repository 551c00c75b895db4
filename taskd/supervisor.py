"""
The supervisor: bind the ports, spawn the zygote, keep N workers alive, stop them.

It runs in the twistd process. It never runs a task and never imports a task
module, so nothing that a task does can take it down. How soon something is
started again is decided in ``policy``; what a worker does is ``worker``'s.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IFileDescriptorReceiver
from twisted.internet.process import registerReapProcessHandler, unregisterReapProcessHandler
from twisted.internet.protocol import Factory, ProcessProtocol
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.errors import StartFailed
from taskd.lines import LongLineReceiver
from taskd.policy import YOUNG_SECONDS, Births
from taskd.process import Title, adopt_orphans
from taskd.scoreboard import Scoreboard
from taskd.settings import Settings
from taskd.zygote import CONTROL_FD, LISTENING_FD, SCOREBOARD_FD

__all__ = ["Supervisor", "bind"]

_BACKLOG: Final = 4096
"""Connections that the kernel holds until a worker accepts; net.core.somaxconn caps it."""

_KILL_AFTER_GRACE_SECONDS: Final = 2.0
_KILL_AFTER_LINK_SECONDS: Final = 1.0

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


def bind(interface: str, port: int) -> socket.socket:
    """
    Make the listening socket that all workers share.

    A plain socket, never a Twisted ``Port``: closing one of those shuts the
    socket down for every process that has it.

    Args:
        interface: A numeric address, IPv4 or IPv6, or a host name.
        port: 0 to 65535.

    Returns:
        The socket, listening and not blocking.

    Raises:
        StartFailed: It cannot be had; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            interface, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartFailed(f"--interface {interface}: {error.strerror}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What is accepted inherits it: replies are whole, waiting could only delay them.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        why = {
            errno.EADDRINUSE: "another process listens there",
            errno.EACCES: "not allowed; ports below 1024 need a privilege",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }.get(error.errno or 0, error.strerror)
        raise StartFailed(f"cannot listen on {interface} port {port}: {why}") from None
    listening.setblocking(False)
    return listening


class Supervisor(Service):
    """
    The whole daemon, as a Twisted service.

    Args:
        settings: What the operator decided.
        reactor: Spawns the zygote, carries the links, keeps the delays.
        clock: Gives seconds that never go back.
    """

    name = "taskd"
    _log = Logger(namespace="taskd.supervisor")

    def __init__(
        self, settings: Settings, reactor: Any, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._clock = clock
        self._births = Births()
        self._listening: socket.socket | None = None
        self._zygote: _Zygote | None = None
        self._zygote_births = Births()
        self._preload = settings.preload
        self._workers: dict[int, _Worker] = {}
        self._wanted: set[int] = set()
        self._started_at = 0.0
        self._has_been_whole = False
        self._stopped: Deferred[None] | None = None

    # twistd calls these.

    def privilegedStartService(self) -> None:
        """
        Bind the port, while that is still allowed.

        Raises:
            StartFailed: The port cannot be had.
        """
        self._started_at = self._clock()
        self._listening = bind(self._settings.interface, self._settings.port)

    def startService(self) -> None:
        """
        Spawn the zygote and have it import the task modules, then fork the workers.

        It waits for the imports, before the reactor runs, so that a module that
        cannot be imported ends the start where the operator sees it.

        Raises:
            StartFailed: The zygote did not come up, or a task module is not usable.
        """
        super().startService()
        adopt_orphans()
        self._scoreboard_fd = Scoreboard.create(self._settings.procs)
        self._scoreboard = Scoreboard(self._scoreboard_fd)
        self._scoreboard.slot(0).open(os.getpid(), self._clock())
        self._scoreboard.slot(0).ready()
        self._wanted = set(range(1, self._settings.procs + 1))
        zygote = self._spawn_zygote()
        zygote.wait_until_loaded()
        Title("taskd: supervisor")

    def stopService(self) -> Deferred[None]:
        """
        Stop taking tasks, let the running ones finish within the grace, kill the rest.

        Returns:
            Fires with None when the last child has been reaped.
        """
        super().stopService()
        self._stopped = Deferred()
        self._wanted.clear()
        if self._listening is not None:
            self._listening.close()
        busy = sum(self._scoreboard.slot(w.number).is_working for w in self._workers.values())
        if busy:
            self._log.info(
                "{busy} workers are busy; they get {grace:g} s",
                busy=busy,
                grace=self._settings.grace_seconds,
            )
        for worker in self._workers.values():
            worker.drain()
        self._reactor.callLater(
            self._settings.grace_seconds + _KILL_AFTER_GRACE_SECONDS, self._kill_all
        )
        self._check_stopped()
        return self._stopped

    # The zygote.

    def _spawn_zygote(self) -> _Zygote:
        if self._listening is None:
            raise StartFailed("the port was never bound: privilegedStartService was not called")
        spec = {
            "boot": "taskd.worker",
            "directory": os.getcwd(),
            "preload": self._preload,
            "settings": self._settings.to_json(),
            "listening": 1,
            "grace_seconds": self._settings.grace_seconds,
        }
        self._zygote = _Zygote(self, self._reactor, spec, self._scoreboard_fd, [self._listening])
        return self._zygote

    def zygote_loaded(self, zygote: _Zygote) -> None:
        """Have the loaded zygote fork every worker that is wanted and not there."""
        present = {worker.number for worker in self._workers.values() if not worker.is_gone}
        zygote.fork(self._wanted - present)

    def zygote_cannot_preload(self, reason: str) -> None:
        """Remember, for every zygote to come, that the task modules cannot be shared."""
        self._log.warn("{reason}: each worker imports them after its fork", reason=reason)
        self._preload = False

    def zygote_failed(self, reason: str) -> None:
        """Take note that a zygote could not import the task modules."""
        self._log.error("the zygote cannot start: {reason}", reason=reason)

    def zygote_gone(self, zygote: _Zygote, status: int) -> None:
        """Replace a zygote that died; the workers serve on, as children of this process."""
        self._zygote = None
        for worker in self._workers.values():
            worker.await_death()
        if self._stopped is not None:
            self._check_stopped()
            return
        delay = self._zygote_births.died(zygote.lived_seconds(self._clock()))
        self._log.error(
            "the zygote (pid {pid}) {died}; another one starts in {delay:g} s",
            pid=zygote.pid,
            died=_describe(status),
            delay=delay,
        )
        self._reactor.callLater(delay, self._respawn_zygote)

    def _respawn_zygote(self) -> None:
        if self._stopped is None:
            self._spawn_zygote().begin()

    # The workers.

    def worker_forked(self, number: int, pid: int, fd: int) -> None:
        """Take in a worker that the zygote has forked."""
        worker = _Worker(self, number, pid)
        self._workers[pid] = worker
        self._reactor.adoptStreamConnection(fd, socket.AF_UNIX, _Once(worker))
        os.close(fd)
        if self._stopped is not None:
            worker.drain()

    def worker_not_forked(self, number: int, reason: str) -> None:
        """Try again later what the kernel refused."""
        delay = self._births.died(0.0)
        self._log.error(
            "worker {number} cannot be forked: {reason}; next try in {delay:g} s",
            number=number,
            reason=reason,
            delay=delay,
        )
        self._reactor.callLater(delay, self._fork, number)

    def worker_ready(self, worker: _Worker) -> None:
        """Take note that a worker accepts."""
        worker.ready_at = self._clock()
        if not self._has_been_whole:
            ready = sum(w.ready_at is not None for w in self._workers.values())
            if ready == self._settings.procs and self._listening is not None:
                self._has_been_whole = True
                self._log.info(
                    "{procs} workers serve {address} after {seconds:.2f} s",
                    procs=ready,
                    address="{} port {}".format(*self._listening.getsockname()[:2]),
                    seconds=self._clock() - self._started_at,
                )

    def worker_gone(self, worker: _Worker) -> None:
        """Replace a worker whose link has ended: it is dead, or as good as dead."""
        slot = self._scoreboard.slot(worker.number)
        # One that its task has killed did not die of its start, however young.
        lived = YOUNG_SECONDS if slot.is_working else worker.lived_seconds(self._clock())
        slot.close()
        # A process may stay behind its link, so it is killed if it has not gone soon.
        self._reactor.callLater(_KILL_AFTER_LINK_SECONDS, self.kill, worker)
        if self._stopped is not None:
            return
        slot.count_restart()
        delay = self._births.died(lived)
        if delay:
            self._log.error(
                "worker {number} died at its start; next try in {delay:g} s",
                number=worker.number,
                delay=delay,
            )
            self._reactor.callLater(delay, self._fork, worker.number)
        else:
            self._fork(worker.number)

    def worker_exited(self, pid: int, status: int) -> None:
        """Take note that a worker has been reaped."""
        worker = self._workers.pop(pid, None)
        if worker is None:
            return
        if not worker.is_gone:
            worker.is_gone = True
            self.worker_gone(worker)
        if status or self._stopped is None:
            self._log.warn(
                "worker {number} (pid {pid}) {died}",
                number=worker.number,
                pid=pid,
                died=_describe(status),
            )
        self._check_stopped()

    def _fork(self, number: int) -> None:
        present = {worker.number for worker in self._workers.values() if not worker.is_gone}
        if self._zygote is not None and number in self._wanted - present:
            self._zygote.fork({number})

    def kill(self, worker: _Worker) -> None:
        """End a worker's process now, if it has not been reaped."""
        if worker.pid not in self._workers:
            return
        if worker.is_orphan:
            os.kill(worker.pid, signal.SIGKILL)
        elif self._zygote is not None:
            self._zygote.kill(worker.pid)

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            self._log.warn("worker {number} is killed: its grace is over", number=worker.number)
            self.kill(worker)
        if self._zygote is not None and not self._workers:
            self._zygote.signal("KILL")

    def _check_stopped(self) -> None:
        """When the last worker is gone the zygote may go; when that is gone all is done."""
        if self._stopped is None or self._workers:
            return
        if self._zygote is not None:
            self._zygote.dismiss()
        elif not self._stopped.called:
            self._stopped.callback(None)


def _describe(status: int) -> str:
    """Say how a process ended, by its wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hint = "; out of memory?" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{hint}"
    return f"exited with status {os.WEXITSTATUS(status)}"


class _Once(Factory):
    """Give a protocol that exists already to the one connection that it is for."""

    noisy = False

    def __init__(self, protocol: LongLineReceiver) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: Any) -> LongLineReceiver:
        return self._protocol


class _Worker(LongLineReceiver):
    """
    The supervisor's record of one worker, and its end of the link.

    Attributes:
        number: The worker's slot.
        pid: Its process.
        ready_at: When it began to accept, or None.
        is_gone: True once its link has ended.
        is_orphan: True if its zygote is dead, and so this process its parent.
    """

    _logs: dict[str, Logger] = {}

    def __init__(self, supervisor: Supervisor, number: int, pid: int) -> None:
        super().__init__()
        self.MAX_LENGTH = sys.maxsize
        self.number = number
        self.pid = pid
        self.ready_at: float | None = None
        self.is_gone = False
        self.is_orphan = False
        self._supervisor = supervisor

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
            self._supervisor.worker_ready(self)
        elif "log" in message:
            event = message["log"]
            Logger(namespace=event["namespace"]).emit(
                LogLevel.levelWithName(event["level"]),
                "worker {worker}: {text}",
                worker=self.number,
                text=event["text"],
            )

    def connectionLost(self, reason: Failure) -> None:
        """Take it that the worker is dead, or as good as dead."""
        if not self.is_gone:
            self.is_gone = True
            self._supervisor.worker_gone(self)

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
        self._supervisor.worker_exited(self.pid, status)


class _Zygote(ProcessProtocol):
    """
    The supervisor's record of one zygote.

    Args:
        supervisor: Who is told.
        reactor: Spawns it.
        spec: What it is told to load.
        scoreboard_fd: Inherited by it.
        listening: Inherited by it.
    """

    _output = Logger(namespace="taskd.output")

    def __init__(
        self,
        supervisor: Supervisor,
        reactor: Any,
        spec: dict[str, Any],
        scoreboard_fd: int,
        listening: list[socket.socket],
    ) -> None:
        self._supervisor = supervisor
        self._reactor = reactor
        self._spec = spec
        self._loaded_at: float | None = None
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
        with open(os.devnull, "rb") as devnull:
            child_fds[0] = devnull.fileno()
            self._process = reactor.spawnProcess(
                self,
                sys.executable,
                [sys.executable, "-P", "-c", program],
                env={k: v for k, v in os.environ.items() if k not in _NOT_FOR_CHILDREN},
                childFDs=child_fds,
            )
        theirs.close()
        self.pid: int = self._process.pid
        self._link: _ZygoteLink | None = None
        self._send(load=spec)

    def lived_seconds(self, now: float) -> float:
        """Tell how long it has been able to fork."""
        return 0.0 if self._loaded_at is None else now - self._loaded_at

    def wait_until_loaded(self) -> None:
        """
        Wait, without a reactor, until it has imported the task modules.

        What it and they print meanwhile is logged.

        Raises:
            StartFailed: It could not.
        """
        pipes = list(self._process.pipes.values())
        received = b""
        while self._loaded_at is None:
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
        self._link = _ZygoteLink(self)
        self._reactor.adoptStreamConnection(
            self._control.fileno(), socket.AF_UNIX, _Once(self._link)
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
            self._loaded_at = time.monotonic()
            self._supervisor.zygote_loaded(self)
        elif "failed" in message:
            failed(message["failed"])
        elif "again" in message:
            self._supervisor.zygote_cannot_preload(message["again"])
            self._spec["preload"] = False
            self._send(load=self._spec)

    def fork(self, numbers: set[int]) -> None:
        """Ask for workers."""
        if numbers and self._loaded_at is not None:
            self._send(fork=sorted(numbers))

    def kill(self, pid: int) -> None:
        """Have a worker killed by the one who knows whether the pid is still its own."""
        self._send(kill=pid, signal=int(signal.SIGKILL))

    def dismiss(self) -> None:
        """Let it go."""
        if self._link is not None:
            self._link.transport.loseConnection()

    def link_received(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take a message that came over the link."""
        if "forked" in message:
            self._supervisor.worker_forked(message["forked"], message["pid"], fds.pop(0))
        elif "exited" in message:
            self._supervisor.worker_exited(message["exited"], message["status"])
        elif "unforked" in message:
            self._supervisor.worker_not_forked(message["unforked"], message["reason"])
        else:
            self.told(message, self._supervisor.zygote_failed)

    # Twisted calls these.

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N803
        """Log what the zygote and all workers print, line by line."""
        *lines, self._unread[childFD] = (self._unread[childFD] + data).split(b"\n")
        for line in lines:
            self._output.info("{line}", line=line.decode(errors="backslashreplace"))

    def processEnded(self, reason: Failure) -> None:
        """Tell the supervisor how it ended."""
        self._supervisor.zygote_gone(self, reason.value.status or 0)


@implementer(IFileDescriptorReceiver)
class _ZygoteLink(LongLineReceiver):
    """The supervisor's end of the socket to the zygote."""

    def __init__(self, zygote: _Zygote) -> None:
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
