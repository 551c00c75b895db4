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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.main import installReactor
from twisted.internet.protocol import connectionDone
from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, globalLogBeginner
from twisted.python.failure import Failure
from twisted.python.threadable import isInIOThread

from taskd import __version__
from taskd.accept import SharedPort, SharingReactor
from taskd.errors import WorkerLost
from taskd.executor import Executor
from taskd.functions import Function, Kind, Registry
from taskd.lines import LongLineReceiver, OneConnection
from taskd.loading import load_tasks
from taskd.mail import Mailer
from taskd.process import Title
from taskd.scoreboard import Scoreboard, Slot
from taskd.server import TaskServerFactory
from taskd.session import session_functions
from taskd.settings import Settings

__all__ = ["Introspection", "Prepared", "prepare", "rehearse", "run"]

_TITLE_ROOM: Final = 64
"""Bytes of a task's name that a process title shows."""

_FLUSH_SECONDS: Final = 0.1
"""How long the last replies get to leave after the grace is over."""


@dataclass(frozen=True)
class Prepared:
    """
    What all workers have in common, made before the fork.

    Attributes:
        settings: What the operator decided.
        registry: What a worker can call.
        introspection: What answers for the daemon itself.
    """

    settings: Settings
    registry: Registry
    introspection: Introspection


class Introspection:
    """
    The daemon's functions that tell about itself.

    Attributes:
        scoreboard: Where the answers come from; set by each worker.
        slot: That of the worker that answers; set by each worker.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.scoreboard: Scoreboard | None = None
        self.slot: Slot | None = None

    def ping(self) -> str:
        """Answer "pong"."""
        return "pong"

    def functions(self) -> list[dict[str, Any]]:
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

    def status(self) -> dict[str, Any]:
        """Tell what the daemon and each of its workers do."""
        if self.scoreboard is None or self.slot is None:
            return {"version": __version__}
        self.slot.show_the_rest()  # that somebody asks is no work
        status = self.scoreboard.status(time.monotonic())
        return {"version": __version__, "answered_by": self.slot.number, **status}


def prepare(fields: dict[str, Any]) -> Prepared:
    """
    Import the task modules and register what they offer, and what is built in.

    Args:
        fields: The settings, as ``Settings.to_json`` gives them.

    Returns:
        What ``run`` needs.

    Raises:
        StartFailed: A task module is not usable.
    """
    settings = Settings.from_json(fields)
    registry = Registry()
    introspection = Introspection(registry)
    for function in (
        Function("echo", _echo, Kind.REACTOR),
        Function("send_mail", Mailer(settings.smtp).send_mail, Kind.THREAD),
        Function("taskd.ping", introspection.ping, Kind.REACTOR),
        Function("taskd.functions", introspection.functions, Kind.REACTOR),
        Function("taskd.status", introspection.status, Kind.REACTOR),
        *session_functions(),
    ):
        registry.add(function)
    load_tasks(settings.task_modules, registry)
    return Prepared(settings, registry, introspection)


def _echo(*args: Any, **kwargs: Any) -> Any:
    """Return the arguments: one as it is, several as an array, named ones as an object."""
    if kwargs or not args:
        return kwargs or None
    return args[0] if len(args) == 1 else args


def rehearse(prepared: Prepared) -> None:
    """
    Be a worker for a few milliseconds, before the fork.

    What a process does for the first time writes on its memory: caches are
    filled, code is specialised. Done here, those pages stay shared by all
    workers. It serves a socket of its own, and no reactor is left behind.

    Source:
        0.8 MB less for each worker (``benchmarks/run.py startup``).
    """
    reactor = SharingReactor()  # type: ignore[no-untyped-call]
    scoreboard_fd = Scoreboard.create(1)
    worker = _Worker(1, prepared, scoreboard_fd, reactor, memoryview(bytearray(64)))
    os.close(scoreboard_fd)
    with socket.socket() as port, socket.socket() as caller:
        port.bind(("127.0.0.1", 0))
        port.listen()
        port.setblocking(False)
        ours, theirs = socket.socketpair()
        worker.serve(theirs, [os.dup(port.fileno())])
        caller.connect(port.getsockname())
        caller.setblocking(False)
        rehearsal = _Rehearsal(ours.close)
        reactor.adoptStreamConnection(caller.fileno(), socket.AF_INET, OneConnection(rehearsal))  # type: ignore[no-untyped-call]
        reactor.run(installSignalHandlers=False)
    signal.alarm(0)
    reactor.dispose()


class _Rehearsal(LongLineReceiver):
    """The caller in a rehearsal."""

    _REQUEST: Final = b'{"id":1,"function":"echo","args":["one","two"]}\n'
    _ROUNDS: Final = 16

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self._end = end
        self._rounds = 0

    def connectionMade(self) -> None:
        self._ask()

    def _ask(self) -> None:
        self.transport.write(self._REQUEST)

    def lineReceived(self, line: bytes) -> None:
        self._rounds += 1
        if self._rounds < self._ROUNDS:
            self._ask()
        else:
            self.transport.loseConnection()
            self._end()


def run(
    number: int,
    prepared: Prepared | dict[str, Any],
    link: socket.socket,
    listening: list[int],
    scoreboard_fd: int,
    title: Title,
) -> None:
    """
    Be a worker until it is told to stop, or the supervisor is gone.

    Args:
        number: The worker's slot, from 1.
        prepared: What ``prepare`` gave; or the settings, if nothing could be
            prepared before the fork.
        link: The socket to the supervisor.
        listening: File descriptors of the listening sockets.
        scoreboard_fd: The scoreboard's.
        title: Of this process.

    Raises:
        StartFailed: A task module is not usable.
    """
    faulthandler.enable()
    reactor = SharingReactor()  # type: ignore[no-untyped-call]
    installReactor(reactor)
    if not isinstance(prepared, Prepared):
        prepared = prepare(prepared)  # now that there is a reactor which it may import
    window = title.window(f"taskd: worker {number} (", _TITLE_ROOM)
    worker = _Worker(number, prepared, scoreboard_fd, reactor, window)
    worker.serve(link, listening)
    # What Twisted had to say about the port is every worker's, and nobody's news.
    globalLogBeginner.beginLoggingTo(
        [cast(ILogObserver, worker.observe)], discardBuffer=True, redirectStandardIO=False
    )
    reactor.run()


class _Worker:
    def __init__(
        self,
        number: int,
        prepared: Prepared,
        scoreboard_fd: int,
        reactor: SharingReactor,
        title: memoryview,
    ) -> None:
        settings = self._settings = prepared.settings
        self._reactor: Any = reactor
        scoreboard = Scoreboard(scoreboard_fd)
        prepared.introspection.scoreboard = scoreboard
        self._slot = prepared.introspection.slot = scoreboard.slot(number)
        self._slot.open(os.getpid(), time.monotonic())
        self._slot.show_on(title)
        self._executor = Executor(
            reactor, self._slot, threads=settings.threads, debug=settings.debug
        )
        self._executor.on_busy = self._step_back
        self._factory = TaskServerFactory(
            reactor, prepared.registry, self._executor, self._slot, settings.max_line_bytes
        )
        self._ports: list[SharedPort] = []
        self._link = _SupervisorLink(self)
        self._is_stopping = False

    def serve(self, link: socket.socket, listening: list[int]) -> None:
        """Start to accept, and tell the supervisor."""
        link.setblocking(False)
        self._reactor.adoptStreamConnection(
            link.fileno(), socket.AF_UNIX, OneConnection(self._link)
        )
        link.close()
        for fd in listening:
            self._ports.append(SharedPort(fd, self._factory, self._reactor))
            os.close(fd)
        self._reactor.addSystemEventTrigger("before", "shutdown", self._drain)
        self._slot.ready()
        self._link.tell(ready=True)

    def stop(self) -> None:
        """Drain, and end the process; without effect if that has begun."""
        if not self._is_stopping:
            self._is_stopping = True
            self._reactor.stop()

    def _drain(self) -> Deferred[Any]:
        self._is_stopping = True
        grace = self._settings.grace_seconds
        self._slot.drain()
        for port in self._ports:
            port.close()
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

    def _step_back(self) -> None:
        for port in self._ports:
            port.step_back()

    def observe(self, event: LogEvent) -> None:
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

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Finish and go: without a supervisor there is no pool."""
        self._worker.stop()
