"""
One worker process: adopt the port, build the tree, run.

The zygote calls ``prepare`` once, before it forks, and ``run`` in each child.
Everything that a worker is made of is put together here and nowhere else.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from typing import Any, Final

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IAddress
from twisted.internet.main import installReactor
from twisted.internet.protocol import Factory
from twisted.logger import LogEvent, LogLevel, eventAsText, globalLogBeginner
from twisted.python.failure import Failure
from twisted.python.threadable import isInIOThread

from taskd import __version__
from taskd.accept import SharedPort, SharingReactor
from taskd.errors import WorkerLost
from taskd.executor import Executor
from taskd.functions import Function, Kind, Registry
from taskd.lines import LongLineReceiver
from taskd.loading import load_tasks
from taskd.mail import Mailer
from taskd.process import Title
from taskd.scoreboard import Scoreboard
from taskd.server import TaskServerFactory
from taskd.session import session_functions
from taskd.settings import Settings

__all__ = ["prepare", "run"]

_FLUSH_SECONDS: Final = 0.1
"""How long the last replies get to leave after the grace is over."""


def prepare(fields: dict[str, Any]) -> Registry:
    """
    Import the task modules and register what they offer, and what is built in.

    Args:
        fields: The settings, as ``Settings.to_json`` gives them.

    Returns:
        What a worker can call.

    Raises:
        StartFailed: A task module is not usable.
    """
    settings = Settings.from_json(fields)
    mailer = Mailer(settings.smtp)
    registry = Registry(
        [
            Function("echo", _echo, Kind.REACTOR),
            Function("send_mail", mailer.send_mail, Kind.THREAD),
            *session_functions(),
        ]
    )
    load_tasks(settings.task_modules, registry)
    return registry


def _echo(*args: Any, **kwargs: Any) -> Any:
    """Return the arguments: one as it is, several as an array, named ones as an object."""
    if kwargs or not args:
        return kwargs or None
    return args[0] if len(args) == 1 else args


def run(
    number: int,
    registry: Registry,
    fields: dict[str, Any],
    link: socket.socket,
    listening: list[int],
    scoreboard_fd: int,
) -> None:
    """
    Be a worker until it is told to stop, or the supervisor is gone.

    Args:
        number: The worker's slot, from 1.
        registry: What ``prepare`` gave.
        fields: The settings, as ``Settings.to_json`` gives them.
        link: The socket to the supervisor.
        listening: File descriptors of the listening sockets.
        scoreboard_fd: The scoreboard's.
    """
    faulthandler.enable()
    reactor = SharingReactor()
    installReactor(reactor)
    worker = _Worker(number, registry, Settings.from_json(fields), scoreboard_fd, reactor)
    worker.serve(link, listening)
    reactor.run()


class _Worker:
    def __init__(
        self,
        number: int,
        registry: Registry,
        settings: Settings,
        scoreboard_fd: int,
        reactor: SharingReactor,
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._scoreboard = Scoreboard(scoreboard_fd)
        self._slot = self._scoreboard.slot(number)
        self._slot.open(os.getpid(), time.monotonic())
        title = Title(f"taskd: worker {number} (starting)")
        self._slot.show_on(title.window(f"taskd: worker {number} (", 64))
        self._registry = registry
        for function in self._own_functions():
            registry.add(function)
        self._executor = Executor(
            reactor, self._slot, threads=settings.threads, debug=settings.debug
        )
        self._factory = TaskServerFactory(
            reactor, registry, self._executor, self._slot, settings.max_line_bytes
        )
        self._ports: list[SharedPort] = []
        self._link = _SupervisorLink(self)

    def serve(self, link: socket.socket, listening: list[int]) -> None:
        """Start to accept, and tell the supervisor."""
        link.setblocking(False)
        self._reactor.adoptStreamConnection(link.fileno(), socket.AF_UNIX, _Once(self._link))
        link.close()
        for fd in listening:
            self._ports.append(SharedPort.adopt(fd, self._factory, self._reactor))
            os.close(fd)
        # What Twisted had to say about the port is every worker's: nobody's news.
        globalLogBeginner.beginLoggingTo(
            [self._observe], discardBuffer=True, redirectStandardIO=False
        )
        self._reactor.addSystemEventTrigger("before", "shutdown", self._drain)
        self._slot.ready()
        self._link.tell(ready=True)

    def stop(self) -> None:
        """Drain, and end the process; without effect if that has begun."""
        if self._reactor.running and not self._reactor._stopped:
            self._reactor.stop()

    def _drain(self) -> Deferred[Any]:
        grace = self._settings.grace_seconds
        self._slot.drain()
        for port in self._ports:
            port.stopListening()
        # Even a reactor that is held up by a task does not outlive its grace.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(grace) + 2)
        done = gatherResults(
            [self._factory.drain(), self._executor.when_idle()], consumeErrors=True
        )
        timer = self._reactor.callLater(grace, self._give_up, done)
        return done.addBoth(lambda _: timer.active() and timer.cancel())

    def _give_up(self, done: Deferred[Any]) -> None:
        self._factory.abandon(
            WorkerLost(f"the task was not done {self._settings.grace_seconds:g} s after the stop")
        )
        self._reactor.callLater(_FLUSH_SECONDS, done.cancel)

    def _own_functions(self) -> list[Function]:
        return [
            Function("taskd.ping", self._ping, Kind.REACTOR),
            Function("taskd.functions", self._functions, Kind.REACTOR),
            Function("taskd.status", self._status, Kind.REACTOR),
        ]

    def _ping(self) -> str:
        """Answer "pong"."""
        return "pong"

    def _functions(self) -> list[dict[str, Any]]:
        """List what can be called: name, signature, docstring, kind, time limit."""
        return [
            {
                "name": function.name,
                "signature": function.signature,
                "doc": function.doc,
                "kind": function.kind.value,
                "timeout": function.timeout,
            }
            for function in self._registry
        ]

    def _status(self) -> dict[str, Any]:
        """Tell what the daemon and each of its workers do."""
        return {
            "version": __version__,
            "answered_by": self._slot.number,
            **self._scoreboard.status(time.monotonic()),
        }

    def _observe(self, event: LogEvent) -> None:
        """Send what is logged here to the supervisor, who has the log."""
        if event.get("log_level", LogLevel.info) < LogLevel.info:
            return
        text = eventAsText(event, includeTimestamp=False, includeSystem=False)
        message = {
            "level": event.get("log_level", LogLevel.info).name,
            "namespace": event.get("log_namespace", ""),
            # Half of a surrogate pair would stop the log's own file.
            "text": text.encode(errors="backslashreplace").decode(),
        }
        if isInIOThread():
            self._link.tell(log=message)
        else:
            self._reactor.callFromThread(self._link.tell, log=message)


class _SupervisorLink(LongLineReceiver):
    """The worker's end of the socket to the supervisor."""

    def __init__(self, worker: _Worker) -> None:
        super().__init__()
        self._worker = worker

    def tell(self, **message: Any) -> None:
        """Send one message; without effect once the supervisor is gone."""
        if self.transport is not None:
            self.transport.write(json.dumps(message).encode() + b"\n")

    def lineReceived(self, line: bytes) -> None:
        """Obey; there is one order so far."""
        if "drain" in json.loads(line):
            self._worker.stop()

    def connectionLost(self, reason: Failure) -> None:
        """Finish and go: without a supervisor there is no pool."""
        self._worker.stop()


class _Once(Factory):
    """Give a protocol that exists already to the one connection that it is for."""

    noisy = False

    def __init__(self, protocol: _SupervisorLink) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> _SupervisorLink:
        return self._protocol
