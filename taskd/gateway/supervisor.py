"""
The service: one listening socket, and the processes that share it.

It accepts nothing itself and imports none of what serves browsers. A process that
dies is replaced; at a reload each gets a successor, with tokens and keys read anew,
and goes once that one serves and nothing is in flight on it any more.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure

from taskd.children import NOT_FOR_CHILDREN
from taskd.destination import endpoint_of
from taskd.errand import stop
from taskd.errors import StartFailed
from taskd.gateway.figures import Figures
from taskd.gateway.secrets import Secrets
from taskd.gateway.settings import FIGURES_FD, LISTENING_FD, GatewaySettings
from taskd.listening import address_text, bind_tcp, is_exposed, listen
from taskd.logs import from_worker
from taskd.policy import Births
from taskd.process import Title, describe_end
from taskd.tls import Secure

__all__ = ["GatewaySupervisor"]

_GENERATIONS: Final = 4
"""So many processes there may be for each of ``--procs``, with those that still drain."""

_KILL_AFTER_GRACE_SECONDS: Final = 5.0
_PROGRAM: Final = "from taskd.gateway.process import main; main()"
_READY_SECONDS: Final = 60.0
_STARTS_AT_A_TIME: Final = 8
"""A process that does not serve by then never will; many that start at once take longer."""

_RELOAD_SECONDS: Final = 5.0
_LONGEST_UNENDED: Final = 2**20


class GatewaySupervisor(Service):
    """
    The gateway, as twistd starts and stops it.

    Args:
        settings: What the operator decided.
        reactor: Spawns the processes, keeps the delays.
        say: Tells the service manager something; what it is not told is lost.
        set_signal: Sets a signal's handler.
    """

    _log = Logger(namespace="taskd.gateway")

    def __init__(
        self,
        settings: GatewaySettings,
        reactor: Any,
        say: Callable[[bytes], object] = lambda _: None,
        set_signal: Callable[[int, Callable[..., None]], object] = signal.signal,
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._say = say
        self._set_signal = set_signal
        self._socket: socket.socket | None = None
        self._processes: list[_Process] = []  # the oldest first
        self._births = [Births() for _ in range(settings.procs)]
        self._is_ready = False
        self._generation = 0
        self._stopped: Deferred[None] | None = None

    def privilegedStartService(self) -> None:
        """
        Open the port, while that is still allowed.

        Raises:
            StartFailed: It cannot be had, or is not safe, or a file cannot be used.
        """
        self._secrets = self._read_secrets()
        bound = bind_tcp(self._settings.interface, self._settings.port)
        try:
            self._check_exposed(bound)
            listen(bound)
        except StartFailed:
            bound.close()
            raise
        self._socket = bound

    def startService(self) -> None:
        """
        Spawn the processes.

        Raises:
            StartFailed: They cannot be spawned.
        """
        super().startService()  # type: ignore[no-untyped-call]
        if self._socket is None:
            raise StartFailed("no port is open: privilegedStartService was not called")
        self._figures_fd = Figures.create(self._settings.procs * _GENERATIONS)
        self._figures = Figures(self._figures_fd)
        try:
            for number in range(self._settings.procs):
                self._spawn(number)
        except OSError as error:
            raise StartFailed(f"no process can be started: {error.strerror}") from None
        self._on_signal(signal.SIGHUP, self.reload)
        Title("taskd-gateway: supervisor")

    def _on_signal(self, number: signal.Signals, act: Callable[[], None]) -> None:
        self._set_signal(number, lambda *_: self._reactor.callFromThread(act))

    def _read_secrets(self) -> Secrets:
        settings = self._settings
        secrets = Secrets.read(settings)
        if secrets.pair is not None and Secure(secrets.pair).is_expired(time.time()):
            self._log.warn("{origin}: the certificate has expired", origin=secrets.pair.origin)
        for endpoint in settings.tasks:
            try:
                endpoint_of(
                    self._reactor,
                    endpoint,
                    ca=settings.tasks_ca or None,
                    certificate=settings.tasks_certificate or None,
                )
            except ValueError as error:
                raise StartFailed(f"--tasks {endpoint}: {error}") from None
        return secrets

    def _check_exposed(self, bound: socket.socket) -> None:
        if not is_exposed(bound):
            return
        settings, where = self._settings, address_text(bound)
        missing = []
        if not settings.token_file:
            missing.append(
                "call what is allowed, since callers are not asked who they are; give --token-file"
            )
        if not settings.dashboard_token_file:
            missing.append("see what the workers do; give --dashboard-token")
        if missing and not settings.insecure:
            raise StartFailed(
                f"whoever can reach {where} could {missing[0]}; or say --insecure if that is meant"
            )
        if missing:
            self._log.warn(
                "--insecure: whoever can reach {where} can use it without being asked", where=where
            )
        if not settings.certificate:
            self._log.warn(
                "{where} speaks no TLS: tokens, and all that is sent there, can be read on the way",
                where=where,
            )

    # The processes.

    @property
    def _is_full(self) -> bool:
        """Tell whether there might be no row of figures for a successor of each process."""
        return len(self._processes) > self._settings.procs * (_GENERATIONS - 1)

    def _spawn(self, number: int) -> None:
        assert self._socket is not None
        taken = {process.row for process in self._processes}
        rows = self._settings.procs * _GENERATIONS
        row = min(set(range(rows)) - taken)
        told = {
            "settings": self._settings.to_json(),
            "secrets": self._secrets.to_json(),
            "number": number + 1,
            "row": row,
        }
        patience = _READY_SECONDS * (1 + self._settings.procs // _STARTS_AT_A_TIME)
        process = _Process(self, self._reactor, number, row, told, patience)
        process.spawn(self._figures_fd, self._socket.fileno())
        self._processes.append(process)

    def process_ready(self, process: _Process) -> None:
        """Let those go whose place a process takes, since it serves: the older ones."""
        if self._stopped is not None or process.is_ready:
            return
        process.is_ready = True
        for other in self._processes[: self._processes.index(process)]:
            if other.number == process.number:
                other.drain()
        if self._generation and all(p.is_ready for p in self._processes):
            self._log.info("reloaded")
        if not self._is_ready and self._socket is not None:
            self._is_ready = True
            self._say(b"READY=1")
            self._log.info(
                "listening on {where}{tls}, for {tasks}",
                where=address_text(self._socket),
                tls=" (TLS)" if self._settings.certificate else "",
                tasks=", ".join(self._settings.tasks),
            )

    def process_gone(self, process: _Process, status: int) -> None:
        """Replace a process that has died; what was meant to go has gone."""
        self._processes.remove(process)
        self._figures.clear(process.row)
        if self._stopped is not None:
            self._check_stopped()
            return
        if process.is_draining:
            return
        if self._has_one(process.number):
            if not process.is_ready:
                self._reload_failed(process, describe_end(status))
            else:
                self._log.error(
                    "process {number} (pid {pid}) {end}, while its successor begins",
                    number=process.number + 1,
                    pid=process.pid,
                    end=describe_end(status),
                )
            return
        lived = self._reactor.seconds() - process.born
        delay = self._births[process.number].died(lived)
        self._log.error(
            "process {number} (pid {pid}) {end}; another one is started{when}",
            number=process.number + 1,
            pid=process.pid,
            end=describe_end(status),
            when=f" in {delay:g} s" if delay else "",
        )
        self._reactor.callLater(delay, self._respawn, process.number)

    def _reload_failed(self, process: _Process, end: str) -> None:
        """Say that a process did not come to take another one's place, and try again."""
        delay = max(_RELOAD_SECONDS, self._births[process.number].died(0.0))
        self._log.error(
            "reload: the process that was to replace number {number} {end}; the earlier one "
            "serves on, with the tokens and keys of before; next try in {delay:g} s",
            number=process.number + 1,
            end=end,
            delay=delay,
        )
        self._reactor.callLater(delay, self._try_again, process.number, self._generation)

    def _try_again(self, number: int, generation: int) -> None:
        if self._stopped is not None or generation != self._generation:
            return  # another reload has seen to it
        newest = [process for process in self._processes if process.number == number][-1:]
        if self._is_full:
            self._reactor.callLater(_RELOAD_SECONDS, self._try_again, number, generation)
        elif newest and newest[0].is_ready:
            try:
                self._spawn(number)
            except OSError as error:
                self._log.error("no reload: {reason}", reason=error.strerror)

    def _has_one(self, number: int) -> bool:
        """Tell whether a place is taken by one that is to stay."""
        return any(p.number == number and not p.is_draining for p in self._processes)

    def _respawn(self, number: int) -> None:
        if self._stopped is not None or self._has_one(number):
            return
        try:
            self._spawn(number)
        except OSError as error:
            delay = self._births[number].died(0.0)
            self._log.error(
                "no process can be started: {reason}; next try in {delay:g} s",
                reason=error.strerror,
                delay=delay,
            )
            self._reactor.callLater(delay, self._respawn, number)

    def reload(self) -> None:
        """Read tokens and keys anew, and replace each process by one that has them."""
        if self._stopped is not None:
            return
        if self._is_full:
            self._log.warn("no reload: processes of earlier ones still have calls in flight")
            return
        try:
            secrets = self._read_secrets()
            if self._socket is not None:
                self._check_exposed(self._socket)
        except StartFailed as error:
            self._log.error("no reload, all stays as it was: {reason}", reason=str(error))
            return
        self._secrets = secrets
        self._generation += 1
        self._log.info("reloading")
        for number in range(self._settings.procs):
            try:
                self._spawn(number)
            except OSError as error:
                self._log.error("no reload: {reason}", reason=error.strerror)

    # The stop.

    def stopService(self) -> Deferred[None]:
        """
        Accept nothing more, let the calls in flight end within the grace, kill the rest.

        Returns:
            Fires with None when the last process has been reaped.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        self._say(b"STOPPING=1")
        self._stopped = Deferred()
        if self._socket is not None:
            self._socket.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._on_signal(number, self.hurry)
        for process in self._processes:
            process.drain()
        grace = self._settings.grace_seconds + _KILL_AFTER_GRACE_SECONDS
        self._kill = self._reactor.callLater(grace, self.hurry)
        stopped = self._stopped
        self._check_stopped()
        return stopped

    def hurry(self) -> None:
        """Kill what has not gone."""
        for process in self._processes:
            process.kill()

    def _check_stopped(self) -> None:
        if not self._processes and self._stopped is not None and not self._stopped.called:
            if self._kill.active():
                self._kill.cancel()
            self._stopped.callback(None)


class _Process(ProcessProtocol):
    """
    The supervisor's record of one process.

    Args:
        owner: Is told of it.
        reactor: Spawns it.
        number: Its place, from 0.
        row: Its row of figures.
        told: What it is to be.
        patience: Seconds until it must serve.

    Attributes:
        pid: Its pid, once it is spawned.
        born: When it was, in seconds.
        is_ready: Whether it serves.
        is_draining: Whether it was told to go.
    """

    _log = Logger(namespace="taskd.gateway")

    def __init__(
        self,
        owner: GatewaySupervisor,
        reactor: Any,
        number: int,
        row: int,
        told: dict[str, Any],
        patience: float,
    ) -> None:
        self._owner = owner
        self._reactor = reactor
        self._told = told
        self._patience = patience
        self.number = number
        self.row = row
        self.born = reactor.seconds()
        self.pid = 0
        self.is_ready = self.is_draining = False
        self._deadline: IDelayedCall | None = None
        self._unread = {1: b"", 2: b""}

    def spawn(self, figures_fd: int, listening_fd: int) -> None:
        """
        Start it.

        Raises:
            OSError: It cannot be started.
        """
        program = f"import sys; sys.path[:] = {sys.path!r}; {_PROGRAM}"
        self._process = self._reactor.spawnProcess(
            self,
            sys.executable,
            [sys.executable, "-P", "-c", program],
            env={k: v for k, v in os.environ.items() if k not in NOT_FOR_CHILDREN},
            childFDs={0: "w", 1: "r", 2: "r", FIGURES_FD: figures_fd, LISTENING_FD: listening_fd},
        )
        self.pid = self._process.pid
        self._deadline = self._reactor.callLater(self._patience, self._end_if_not_ready)
        self._write(json.dumps(self._told).encode() + b"\n")
        self._told = {}

    def _write(self, line: bytes) -> None:
        if 0 in self._process.pipes:  # or it is just dying
            self._process.writeToChild(0, line)

    def _end_if_not_ready(self) -> None:
        if not self.is_ready:
            self._log.error(
                "process {number} does not begin, and is killed", number=self.number + 1
            )
            self.kill()

    def drain(self) -> None:
        """Have it go when nothing is in flight on it."""
        if not self.is_draining:
            self.is_draining = True
            self._write(b"drain\n")

    def kill(self) -> None:
        """Kill it."""
        if self._process.pid is not None:
            self._process.signalProcess("KILL")

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N803
        """Take what it says on its standard output, and log what it prints otherwise."""
        *lines, rest = (self._unread[childFD] + data).split(b"\n")
        if len(rest) > _LONGEST_UNENDED:
            lines.append(rest)
            rest = b""
        self._unread[childFD] = rest
        for line in lines:
            if childFD == 1 and line == b"ready":
                self._owner.process_ready(self)
            elif childFD == 1 and line.startswith(b"log {"):
                globalLogPublisher(from_worker(self.number + 1, self.pid, line[4:], "process"))
            elif line.strip():
                text = line.decode(errors="backslashreplace")
                self._log.warn(
                    "process {number}: {log_text}", number=self.number + 1, log_text=text
                )

    def processEnded(self, reason: Failure) -> None:
        """Take note that it has gone, and that all that it said was read."""
        stop(self._deadline)
        self._owner.process_gone(self, getattr(reason.value, "status", None) or 0)
