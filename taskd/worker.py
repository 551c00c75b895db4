"""
One worker process: adopt the port, build the tree, run.

The zygote calls ``prepare`` once, before it forks, and ``run`` in each child.
Everything that a worker is made of is put together here and nowhere else.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

from twisted.internet.defer import Deferred
from twisted.internet.main import installReactor
from twisted.internet.protocol import connectionDone
from twisted.logger import ILogObserver, globalLogBeginner
from twisted.python.failure import Failure
from twisted.python.threadable import isInIOThread

from taskd.accept import SharedPort, SharingReactor
from taskd.access import Access
from taskd.credentials import Credentials, KeyPair
from taskd.errors import WorkerLost
from taskd.executor import Executor
from taskd.functions import Function, Kind, Registry
from taskd.introspection import Introspection
from taskd.ledger import Ledger
from taskd.lines import LongLineReceiver, OneConnection
from taskd.link import Link, Reader, adopt_link
from taskd.loading import load_tasks
from taskd.logs import Forwarder
from taskd.mail import Mailer
from taskd.process import Title, resident_bytes
from taskd.relay import Relay
from taskd.scoreboard import Scoreboard
from taskd.server import TaskServerFactory
from taskd.session import session_functions
from taskd.settings import Settings
from taskd.states import Cause
from taskd.tls import Secure
from taskd.wear import Wear

__all__ = ["Prepared", "prepare", "rehearse", "run"]

_TITLE_ROOM: Final = 64
"""Bytes of a task's name that a process title shows."""

_REFUSALS_SECONDS: Final = 0.1
"""How long the supervisor may take, at the end of the grace, to refuse what was never started."""

_CUT_OFF_SECONDS: Final = 30.0

_FLUSH_SECONDS: Final = 0.1
"""How long the last replies get to leave after the grace is over."""


@dataclass(frozen=True)
class Prepared:
    """
    What all workers have in common, made before the fork.

    Attributes:
        settings: What the operator decided.
        credentials: What callers are shown, and have to show.
        registry: What a worker can call.
        introspection: What answers for the daemon itself.
    """

    settings: Settings
    credentials: Credentials
    registry: Registry
    introspection: Introspection


def prepare(spec: dict[str, Any]) -> Prepared:
    """
    Import the task modules and register what they offer, and what is built in.

    Args:
        spec: ``settings`` and ``credentials``, as their ``to_json`` gives them.

    Returns:
        What ``run`` needs.

    Raises:
        StartFailed: A task module is not usable.
    """
    settings = Settings.from_json(spec["settings"])
    registry = Registry()
    introspection = Introspection(registry)
    for function in (
        Function("echo", _echo, Kind.REACTOR),
        Function("send_mail", Mailer(settings.smtp).send_mail, Kind.THREAD),
        *introspection.own_functions(),
        *session_functions(),
    ):
        registry.add(function)
    load_tasks(settings.task_modules, registry)
    credentials = Credentials.from_json(spec["credentials"])
    return Prepared(settings, credentials, registry, introspection)


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
    port, caller = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        # Gone before it serves, so that nobody else can call: it asks nobody who they are.
        with TemporaryDirectory(prefix="taskd-") as private:
            port.bind(f"{private}/rehearsal")
            port.listen()
            caller.connect(port.getsockname())
    except OSError:
        return  # nowhere to write, or too deep: it goes without
    reactor = SharingReactor()  # type: ignore[no-untyped-call]
    scoreboard_fd = Scoreboard.create(1)
    everybody = replace(
        prepared, credentials=Credentials(), settings=replace(prepared.settings, allow=())
    )
    worker = _Worker(1, everybody, scoreboard_fd, reactor, memoryview(bytearray(64)))
    os.close(scoreboard_fd)
    ours, theirs = socket.socketpair()
    with ours, port, caller:
        port.setblocking(False)
        worker.serve(theirs, [os.dup(port.fileno())], [None])
        caller.setblocking(False)
        rehearsal = _Rehearsal(ours.sendall)
        reactor.adoptStreamConnection(caller.fileno(), socket.AF_UNIX, OneConnection(rehearsal))  # type: ignore[no-untyped-call]
        reactor.run(installSignalHandlers=False)
    signal.alarm(0)
    reactor.dispose()


class _Rehearsal(LongLineReceiver):
    """The caller in a rehearsal, and the supervisor."""

    # Nothing that a task module could have replaced: its code is not to run before the fork.
    _REQUEST: Final = b'{"id":1,"function":"taskd.functions","args":[]}\n'
    _ROUNDS: Final = 16

    def __init__(self, order: Callable[[bytes], None]) -> None:
        super().__init__()
        self._order = order
        self._rounds = 0

    def connectionMade(self) -> None:
        self._ask()

    def _ask(self) -> None:
        self.transport.write(self._REQUEST)

    def lineReceived(self, line: bytes) -> None:
        self._rounds += 1
        if self._rounds < self._ROUNDS:
            self._order(b"beat\n")
            self._ask()
        else:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._order(b"stop\ngo\n")


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
        prepared: What ``prepare`` gave; or what it takes, if nothing could be
            prepared before the fork.
        link: The socket to the supervisor.
        listening: File descriptors of the listening sockets.
        scoreboard_fd: The scoreboard's.
        title: Of this process.

    Raises:
        StartFailed: A task module is not usable.
    """
    reactor = SharingReactor()  # type: ignore[no-untyped-call]
    installReactor(reactor)
    if not isinstance(prepared, Prepared):
        prepared = prepare(prepared)  # now that there is a reactor which it may import
    window = title.window(f"taskd: worker {number} (", _TITLE_ROOM)
    worker = _Worker(number, prepared, scoreboard_fd, reactor, window)
    worker.serve(link, listening, prepared.credentials.key_pairs)
    # What Twisted had to say about the port is every worker's, and nobody's news.
    globalLogBeginner.beginLoggingTo(
        [cast(ILogObserver, worker.forwarder)], discardBuffer=True, redirectStandardIO=False
    )
    reactor.run()


class _Worker:
    """
    The parts of one worker, and its way from serving to its end.

    It serves; then it is told to stop, as all are, or to retire, so that the
    others go on and take what it has; then it has nothing left, and goes.
    """

    def __init__(
        self,
        number: int,
        prepared: Prepared,
        scoreboard_fd: int,
        reactor: SharingReactor,
        title: memoryview,
    ) -> None:
        settings = self._settings = prepared.settings
        self._client_ca = prepared.credentials.client_ca
        self._reactor: Any = reactor
        scoreboard = Scoreboard(scoreboard_fd)
        prepared.introspection.scoreboard = scoreboard
        self._slot = prepared.introspection.slot = scoreboard.slot(number)
        self._slot.open(os.getpid(), time.monotonic())
        self._slot.show_on(title)
        tally, failures = scoreboard.tally(number), scoreboard.failures(number)
        ledger = Ledger(tally, failures, number, debug=settings.debug)
        self._executor = Executor(reactor, self._slot, ledger, threads=settings.threads)
        self._factory = TaskServerFactory(
            reactor,
            prepared.registry,
            self._executor,
            self._slot,
            settings,
            Access(prepared.credentials.tokens, settings.allow),
            lambda: sum(scoreboard.connections()),
        )
        self._relay = Relay(
            prepared.registry,
            self._executor,
            scoreboard,
            self._tell,
            is_verbose=settings.log_level == "debug",
        )
        self.forwarder = Forwarder(settings.log_level, self._log, self._executor.about_now)
        self._link = _SupervisorLink(
            {
                **self._relay.readers,
                b"retire": self.retire,
                b"stop": lambda _: self.stop(),
                b"go": lambda _: self._let_go(),
                b"adopt": self._adopt,
                b"beat": lambda _: self._beat(),
            },
            self._orphaned,
        )
        self._ports: list[SharedPort] = []
        self._wear = Wear(settings, self._slot.ended, random.random)
        self._replaced_for: Cause | None = None
        self._is_stopping = self._is_retired = self._is_shutting_down = False
        self._has_said_so = self._may_go = False
        self._done: Deferred[None] = Deferred()
        self._executor.on_busy = self._step_back
        if settings.max_tasks is not None:
            self._executor.on_idle = partial(self._replace_if_worn, measure=False)
        self._relay.on_quiet = self._go_if_done
        self._relay.on_filled = self._leave_the_ports
        self._relay.on_freed = self._come_back
        self._relay.on_stuck = self._lose_a_thread

    def serve(
        self, link: socket.socket, listening: list[int], key_pairs: Sequence[KeyPair | None]
    ) -> None:
        """Start to accept, over TLS where there is a key, and tell the supervisor."""
        link.setblocking(False)
        adopt_link(self._reactor, link.fileno(), self._link)
        link.close()
        is_alone = self._settings.procs == 1
        for fd, pair in zip(listening, key_pairs, strict=True):
            wrap = Secure(pair, self._client_ca).wrap if pair is not None else None
            port = SharedPort(fd, self._factory, self._reactor, wrap, is_alone=is_alone)
            self._ports.append(port)
            os.close(fd)
        self._reactor.addSystemEventTrigger("before", "shutdown", self._shut_down)
        self._slot.ready()
        self._tell(b"ready\n")

    def _tell(self, message: bytes) -> None:
        self._link.tell(message)

    def _beat(self) -> None:
        """
        Show that the reactor runs, and see to what is due now and then.

        The supervisor says when: a timer that is always pending would cost each
        round of the reactor more.
        """
        self._slot.beats(time.monotonic())
        self._factory.sweep()
        self._replace_if_worn(measure=True)

    # While it serves.

    def _step_back(self) -> None:
        for port in self._ports:
            port.step_back()
            port.on_accept = self._leave_the_ports_if_held_up

    def _leave_the_ports_if_held_up(self) -> None:
        if self._executor.is_held_up:
            self._executor.is_relieved = True
            self._leave_the_ports()

    def _leave_the_ports(self) -> None:
        """Let those accept who can do what will be asked, as long as there are any."""
        if self._relay.idle():
            for port in self._ports:
                port.leave()

    def _come_back(self) -> None:
        for port in self._ports:
            port.come_back()

    def _replace_if_worn(self, *, measure: bool) -> None:
        rss = resident_bytes() if measure and self._settings.max_rss_bytes is not None else 0
        cause = self._wear.cause(self._slot.ended, rss)
        if cause is not None:
            self._ask_for_replacement(cause)

    def _lose_a_thread(self) -> None:
        self._executor.hand_over_all()
        self._slot.drain()  # it looks idle to nobody
        self._ask_for_replacement(Cause.TIME_LIMIT)

    def _ask_for_replacement(self, cause: Cause) -> None:
        # A lost thread is worth a second message: nothing is to be given to this worker then.
        if self._replaced_for is None or (
            cause is Cause.TIME_LIMIT and self._replaced_for is not cause
        ):
            self._replaced_for = cause
            self._tell(b"replace %s\n" % cause.name.encode())

    def _adopt(self, rest: bytes) -> None:
        fd, luggage = self._link.take_connection(rest)
        if fd is None:
            return
        if self._ports and not self._is_stopping:
            self._ports[0].adopt(fd, luggage)
        else:
            os.close(fd)

    # How it ends.

    def retire(self, rules: bytes) -> None:
        """
        Start nothing more, hand over what waits, pass on the connections, and end.

        Tasks that run are let run: nothing hurries them but their own limits.

        Args:
            rules: ``tokens`` and ``client_ca`` of those who stay, as JSON: what a
                connection has shown has to be good for them until it goes there.
        """
        if self._is_stopping:
            return
        if not self._is_retired:  # else a reload has brought other rules
            self._is_retired = True
            self._executor.on_idle = self._factory.on_empty = self._go_if_done
            self._close_ports()
            self._executor.lane.retire()
            self._executor.hand_over_all()
            self._reactor.callLater(self._settings.grace_seconds, self._cut_off)
        told = json.loads(rules)
        self._factory.pass_on(
            partial(self._link.give_connection, b"moved"),
            Access(told["tokens"], self._settings.allow),
            is_other_ca=told["client_ca"] != self._client_ca,
        )
        self._go_if_done()

    def _cut_off(self) -> None:
        """See to it, now and then, that nobody who does not read keeps this process alive."""
        self._factory.cut_off()
        self._reactor.callLater(_CUT_OFF_SECONDS, self._cut_off)

    def stop(self) -> None:
        """Start nothing more, finish within the grace, and end."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._executor.on_idle = self._factory.on_empty = self._go_if_done
        grace = self._settings.grace_seconds
        self._close_ports()
        # Even a reactor that is held up by a task does not outlive its grace.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(grace) + 2)
        self._reactor.callLater(grace + _REFUSALS_SECONDS, self._give_up)
        self._factory.drain()
        self._go_if_done()

    def _close_ports(self) -> None:
        self._slot.drain()
        for port in self._ports:
            port.close()
        self._ports.clear()

    def _orphaned(self) -> None:
        """Finish and go: without a supervisor there is no pool, and what is printed is lost."""
        if self._done.called:
            return  # it is this end that has closed
        with open(os.devnull, "wb") as devnull:
            for stream in (1, 2):
                os.dup2(devnull.fileno(), stream)
        self._may_go = True
        self._relay.lost()
        self.stop()

    def _give_up(self) -> None:
        self._factory.abandon(
            WorkerLost(f"the task was not done {self._settings.grace_seconds:g} s after the stop")
        )
        self._reactor.callLater(_FLUSH_SECONDS, self._end)

    def _go_if_done(self) -> None:
        if (
            (self._is_stopping or self._is_retired)
            and not self._factory.open_connections
            and self._executor.is_idle
            and self._relay.is_quiet
        ):
            if self._may_go and self._link.has_unsent:
                self._reactor.callLater(_FLUSH_SECONDS, self._go_if_done)  # others' replies
            elif self._may_go:
                self._end()
            elif not self._has_said_so:
                self._has_said_so = True
                self._tell(b"leaving\n")

    def _let_go(self) -> None:
        self._may_go = True
        self._go_if_done()

    def _end(self) -> None:
        if not self._done.called:
            self._done.callback(None)
            if not self._is_shutting_down:
                self._reactor.stop()

    def _shut_down(self) -> Deferred[None]:
        self._is_shutting_down = True
        if not self._done.called:
            self.stop()
        return self._done

    def _log(self, message: bytes) -> None:
        """Send something for the log, which the supervisor has; a thread may log too."""
        if isInIOThread():
            self._tell(message)
        else:
            self._reactor.callFromThread(self._tell, message)


class _SupervisorLink(Link):
    """The worker's end of the socket to the supervisor."""

    def __init__(self, readers: dict[bytes, Reader], on_lost: Callable[[], None]) -> None:
        super().__init__(readers)
        self._on_lost = on_lost

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take it that the supervisor is gone."""
        self.connected = 0
        self.close_strays()
        self._on_lost()
