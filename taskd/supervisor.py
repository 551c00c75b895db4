"""
The supervisor: bind the ports, spawn the zygote, keep N workers alive, stop them.

It runs in the twistd process. It never runs a task and never imports a task
module, so nothing that a task does can take it down. How soon something is
started again is decided in ``policy``; what a worker does is ``worker``'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from taskd.children import Worker, Zygote
from taskd.errors import StartFailed
from taskd.lines import OneConnection
from taskd.policy import YOUNG_SECONDS, Births
from taskd.process import Title, adopt_orphans
from taskd.scoreboard import Scoreboard
from taskd.settings import Settings

__all__ = ["Supervisor", "bind"]

_BACKLOG: Final = 4096
"""Connections that the kernel holds until a worker accepts; net.core.somaxconn caps it."""

_KILL_AFTER_GRACE_SECONDS: Final = 2.0
_KILL_AFTER_LINK_SECONDS: Final = 1.0
_STRAYS_SECONDS: Final = 5.0


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
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise StartFailed(f"--interface {interface}: {why}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What is accepted inherits it: replies are whole, waiting could only delay them.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: "another process listens there",
            errno.EACCES: "not allowed; ports below 1024 need a privilege",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }
        why = reasons.get(error.errno or 0, error.strerror)
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
        self._zygote: Zygote | None = None
        self._zygote_births = Births()
        self._preload = settings.preload
        self._workers: dict[int, Worker] = {}
        self._wanted: set[int] = set()
        self._requested: set[int] = set()
        self._started_at = 0.0
        self._has_been_whole = False
        self._stopped: Deferred[None] | None = None
        self._strays: IDelayedCall | None = None

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
        super().startService()  # type: ignore[no-untyped-call]
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
        super().stopService()  # type: ignore[no-untyped-call]
        self._stopped = Deferred()
        self._wanted.clear()
        if self._listening is not None:
            self._listening.close()
        if self._zygote is not None and self._zygote.is_loaded:
            self._zygote.unlisten()
        busy = sum(self._scoreboard.slot(w.number).is_working for w in self._workers.values())
        if busy:
            self._log.info(
                "{busy} workers are busy; they get {grace:g} s",
                busy=busy,
                grace=self._settings.grace_seconds,
            )
        for worker in list(self._workers.values()):
            worker.drain()
        self._reactor.callLater(
            self._settings.grace_seconds + _KILL_AFTER_GRACE_SECONDS, self._kill_all
        )
        self._check_stopped()
        return self._stopped

    # The zygote.

    def _spawn_zygote(self) -> Zygote:
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
        self._zygote = Zygote(self, self._reactor, spec, self._scoreboard_fd, [self._listening])
        return self._zygote

    def zygote_loaded(self, zygote: Zygote) -> None:
        """Have the loaded zygote fork every worker that is wanted and not there."""
        zygote.loaded_at = self._clock()
        self._fork(zygote, self._wanted)

    def zygote_cannot_preload(self, reason: str) -> None:
        """Remember, for every zygote to come, that the task modules cannot be shared."""
        self._log.warn("{reason}: each worker imports them after its fork", reason=reason)
        self._preload = False

    def zygote_failed(self, zygote: Zygote, reason: str) -> None:
        """Let a zygote go that could not import the task modules; the next one tries again."""
        self._log.error("the zygote cannot start: {reason}", reason=reason)
        zygote.dismiss()

    def zygote_gone(self, zygote: Zygote, status: int) -> None:
        """Replace a zygote that died; the workers serve on, as children of this process."""
        self._zygote = None
        self._requested.clear()
        for worker in list(self._workers.values()):  # one that is dead is reaped at once
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
        self._reap_strays()

    def _respawn_zygote(self) -> None:
        if self._stopped is not None:
            return
        try:
            self._spawn_zygote().begin()
        except OSError as error:
            delay = self._zygote_births.died(0.0)
            self._log.error(
                "no zygote can be spawned: {why}; next try in {delay:g} s", why=error, delay=delay
            )
            self._reactor.callLater(delay, self._respawn_zygote)

    def _reap_strays(self) -> None:
        """
        Reap, from now on, what the tasks of orphaned workers leave behind.

        Such a process becomes a child of this one, and Twisted reaps only what
        it has spawned itself.
        """
        known = {*self._workers, self._zygote and self._zygote.pid}
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if dead.si_pid in known:
                    break  # Twisted is about to
                os.waitpid(dead.si_pid, 0)
        if self._strays is None or not self._strays.active():
            self._strays = self._reactor.callLater(_STRAYS_SECONDS, self._reap_strays)

    # The workers.

    def worker_forked(self, zygote: Zygote, number: int, pid: int, fd: int) -> None:
        """Take in a worker that a zygote has forked."""
        self._requested.discard(number)
        worker = Worker(self, number, pid)
        self._workers[pid] = worker
        self._reactor.adoptStreamConnection(fd, socket.AF_UNIX, OneConnection(worker))
        os.close(fd)
        if zygote is not self._zygote:  # these were its last words
            worker.await_death()
        if self._stopped is not None:
            worker.drain()

    def worker_not_forked(self, number: int, reason: str) -> None:
        """Try again later what the kernel refused."""
        self._requested.discard(number)
        delay = self._births.died(0.0)
        self._log.error(
            "worker {number} cannot be forked: {reason}; next try in {delay:g} s",
            number=number,
            reason=reason,
            delay=delay,
        )
        self._reactor.callLater(delay, self._replace, number)

    def worker_ready(self, worker: Worker) -> None:
        """Take note that a worker accepts."""
        worker.ready_at = self._clock()
        if not self._has_been_whole:
            ready = sum(w.ready_at is not None for w in self._workers.values())
            if ready == self._settings.procs and self._listening and self._stopped is None:
                self._has_been_whole = True
                self._log.info(
                    "{procs} workers serve {address} after {seconds:.2f} s",
                    procs=ready,
                    address="{} port {}".format(*self._listening.getsockname()[:2]),
                    seconds=self._clock() - self._started_at,
                )

    def worker_gone(self, worker: Worker) -> None:
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
            self._reactor.callLater(delay, self._replace, worker.number)
        else:
            self._replace(worker.number)

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

    def _replace(self, number: int) -> None:
        # Without a zygote the next one forks all that is missing, when it is loaded.
        if self._zygote is not None and self._zygote.is_loaded:
            self._fork(self._zygote, {number})

    def _fork(self, zygote: Zygote, numbers: set[int]) -> None:
        present = {worker.number for worker in self._workers.values() if not worker.is_gone}
        missing = (numbers & self._wanted) - present - self._requested
        if missing:
            self._requested |= missing
            zygote.fork(missing)

    def kill(self, worker: Worker) -> None:
        """End a worker's process now, if it has not been reaped."""
        if worker.pid not in self._workers:
            return
        if worker.is_orphan:
            os.kill(worker.pid, signal.SIGKILL)
        elif self._zygote is not None:
            self._zygote.kill(worker.pid)

    def _kill_all(self) -> None:
        for worker in list(self._workers.values()):
            self._log.warn("worker {number} is killed: its grace is over", number=worker.number)
            self.kill(worker)
        if self._workers:
            self._reactor.callLater(_KILL_AFTER_GRACE_SECONDS, self._kill_zygote)
        else:
            self._kill_zygote()

    def _kill_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.end()

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
