"""The supervisor's decisions, with a zygote and workers that the test plays."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.process import reapAllProcesses
from twisted.internet.task import Clock
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.children import Worker
from taskd.credentials import Credentials
from taskd.endpoints import listeners_from
from taskd.errors import StartFailed
from taskd.link import Offer
from taskd.notify import Notifier
from taskd.ports import Ports
from taskd.process import Title
from taskd.scoreboard import Scoreboard
from taskd.settings import Settings
from taskd.slots import NAME_BYTES, Slot
from taskd.states import State
from taskd.supervisor import Supervisor
from taskd.zygote import CONTROL_FD, LISTENING_FD, SCOREBOARD_FD
from tests.support import MemoryTransport

_PR_SET_CHILD_SUBREAPER = 36

GRACE = 30.0
KILLED = int(signal.SIGKILL)
LABEL = b"report".ljust(NAME_BYTES, b"\0")


def retire(credentials: Credentials) -> bytes:
    """Write what a worker is told that is to leave all to those with these credentials."""
    rules = {"tokens": credentials.tokens, "client_ca": credentials.client_ca}
    return b"retire " + json.dumps(rules).encode()


RETIRE = retire(Credentials())
"""The same, where nobody is asked who they are."""


def exited(status: int) -> int:
    """Give the wait status of a process that has exited."""
    return status << 8


class FakeZygote:
    """
    A zygote's process, played by the test.

    Attributes:
        pid: Its process id.
        pipes: What Twisted has of its output; nothing here.
        signals: The signals that it was sent.
        scoreboard: The scoreboard that it and its workers were given.
        listening: The listening socket that it was given.
    """

    def __init__(self, machine: Machine, protocol: Any, pid: int, fds: dict[int, Any]) -> None:
        self._machine = machine
        self._protocol = protocol
        self._control = socket.socket(fileno=os.dup(fds[CONTROL_FD]))
        self._link: Any = None
        self._told = 0
        self.pid = pid
        self.pipes: dict[int, Any] = {}
        self.signals: list[str] = []
        self.scoreboard = Scoreboard(fds[SCOREBOARD_FD])
        self.listening = socket.socket(fileno=os.dup(fds[LISTENING_FD]))

    def close(self) -> None:
        self._control.close()
        self.listening.close()

    def die_importing(self) -> None:
        self._control.shutdown(socket.SHUT_WR)

    def signalProcess(self, name: str) -> None:
        self.signals.append(name)

    def take_link(self, link: Any) -> None:
        self._link = link

    def print(self, data: bytes) -> None:
        """Have it, or a worker, print something."""
        self._protocol.childDataReceived(1, data)

    @property
    def orders(self) -> list[Any]:
        """What it was told since this was last asked."""
        lines = b""
        with contextlib.suppress(BlockingIOError):
            lines = self._control.recv(65536, socket.MSG_DONTWAIT)
        if self._link is not None:
            lines += self._link.transport.value()[self._told :]
            self._told = len(self._link.transport.value())
        return [json.loads(line) for line in lines.splitlines()]

    @property
    def is_dismissed(self) -> bool:
        return self._link is not None and self._link.transport.disconnecting

    def say(self, **message: Any) -> None:
        line = json.dumps(message).encode() + b"\n"
        if self._link is None:
            self._control.sendall(line)
        else:
            self._link.dataReceived(line)

    def fork(self, number: int) -> FakeWorker:
        """Announce a worker."""
        self._machine.last_pid += 1
        self._link.fileDescriptorReceived(os.open(os.devnull, os.O_RDWR))
        self.say(forked=number, pid=self._machine.last_pid)
        return FakeWorker(
            self._machine, self, number, self._machine.last_pid, self._machine.links[-1]
        )

    def end(self, status: int = 0) -> None:
        """End the process."""
        reason = ProcessTerminated(status=status) if status else ProcessDone(0)
        self._protocol.processExited(Failure(reason))
        self._protocol.processEnded(Failure(reason))


class FakeWorker:
    """
    A worker, played by the test.

    Attributes:
        number: Its slot's number.
        pid: Its process id.
        slot: Its slot on the scoreboard.
    """

    def __init__(
        self, machine: Machine, zygote: FakeZygote, number: int, pid: int, link: Any
    ) -> None:
        self._zygote = zygote
        self._link = link
        self.number = number
        self.pid = pid
        self.slot: Slot = zygote.scoreboard.slot(number)
        self.slot.open(pid, machine.seconds())

    @property
    def orders(self) -> list[bytes]:
        """What it was told so far, but for asking whether it is alive."""
        return [line for line in self._link.transport.value().splitlines() if line != b"beat"]

    @property
    def times_asked(self) -> int:
        """How often it was asked whether it is alive."""
        return self._link.transport.value().splitlines().count(b"beat")

    @property
    def adopted(self) -> list[tuple[bytes, list[int]]]:
        """The connections that it was given since this was last asked, with their messages."""
        return self._link.transport.received()

    def say(self, *lines: bytes) -> None:
        self._link.dataReceived(b"".join(line + b"\n" for line in lines))

    def become_ready(self) -> FakeWorker:
        self.slot.ready()
        self.say(b"ready")
        return self

    def offer(self, ticket: int, *, priority: int = 0, deadline: float | None = None) -> None:
        """Hand over a task, which is named by its ticket."""
        line = b'{"function":"task%d"}\n' % ticket
        self.say(Offer(ticket, priority, deadline, False, line).encode().rstrip(b"\n"))

    def move(self, fd: int, unread: bytes) -> None:
        """Part with a connection."""
        inode = os.fstat(fd).st_ino
        self._link.fileDescriptorReceived(fd)
        self.say(b"moved %d %s" % (inode, b64encode(unread)))

    def lose_link(self) -> None:
        self._link.connectionLost(Failure(ConnectionDone()))

    def exit(self, status: int = 0) -> None:
        """End, and have it told by the zygote."""
        self._zygote.say(exited=self.pid, status=status)

    def die(self, status: int = KILLED) -> None:
        """Lose the link and end."""
        self.lose_link()
        self.exit(status)

    def leave(self) -> None:
        """Say that nothing is left to do, and end as a worker does that may go."""
        self.say(b"leaving")
        assert self.orders[-1] == b"go"
        self.die(exited(0))


class LinkTransport(MemoryTransport):
    """A link's socket: what is written is kept, and what comes with a descriptor is sent."""

    has_unsent = False

    def __init__(self) -> None:
        super().__init__()
        self.socket, self._far_end = socket.socketpair()
        self._far_end.setblocking(False)

    def received(self) -> list[tuple[bytes, list[int]]]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._far_end, 65536, 1)
                found.append((data, list(fds)))
        return found

    def close(self) -> None:
        self.socket.close()
        self._far_end.close()


class Machine(Clock):
    """
    A reactor whose processes are played by the test.

    Attributes:
        zygotes: Every zygote that was spawned.
        links: Every worker's link.
        transports: Every link's socket.
        last_pid: The latest process id; none of these can be a process of this machine.
        first_words: What the first zygote says while it is waited for.
        dies_importing: True: it ends its connection then.
        spawn_error: What the next spawning fails with.
        scoreboard_fd: The scoreboard's, once a zygote was spawned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rightNow = 1000.0  # no machine's clock stands at zero
        self.zygotes: list[FakeZygote] = []
        self.links: list[Worker] = []
        self.transports: list[LinkTransport] = []
        self._handlers: dict[int, Callable[..., object]] = {}
        self.last_pid = 2**30
        self.first_words: list[dict[str, Any]] = [{"loaded": True}]
        self.dies_importing = False
        self.spawn_error: OSError | None = None
        self.scoreboard_fd: int | None = None

    def spawnProcess(
        self, protocol: Any, executable: str, args: list[str], env: Any, childFDs: Any
    ) -> FakeZygote:
        if self.spawn_error is not None:
            error, self.spawn_error = self.spawn_error, None
            raise error
        self.last_pid += 1
        zygote = FakeZygote(self, protocol, self.last_pid, childFDs)
        self.zygotes.append(zygote)
        self.scoreboard_fd = childFDs[SCOREBOARD_FD]
        while self.first_words:
            zygote.say(**self.first_words.pop(0))
        if self.dies_importing:
            zygote.die_importing()
        return zygote

    def adopt(self, reactor: Any, fd: int, link: Any) -> None:
        link.makeConnection(LinkTransport())
        self.transports.append(link.transport)
        if isinstance(link, Worker):
            self.links.append(link)
        else:
            self.zygotes[-1].take_link(link)

    def set_signal(self, number: int, handler: Callable[..., object]) -> None:
        self._handlers[number] = handler

    def interrupt(self, number: signal.Signals) -> None:
        """Have this process get a signal."""
        self._handlers[number](number, None)

    @property
    def signals(self) -> set[int]:
        """The signals that something was set for."""
        return set(self._handlers)

    def callFromThread(self, f: Callable[..., object], /, *args: object) -> None:
        f(*args)

    def end_dismissed(self) -> None:
        """Let every zygote end whose connection was closed, as a real one does."""
        for zygote in self.zygotes:
            if zygote.is_dismissed:
                zygote.end()


class SupervisorTestCase(SynchronousTestCase):
    procs = 2
    drain_seconds = 0.0
    watchdog_seconds: float | None = None

    def setUp(self) -> None:
        self.noted: list[str] = []
        self._keep_this_process_as_it_is()
        self.machine = Machine()
        settings = Settings(
            port=0,
            procs=self.procs,
            grace_seconds=GRACE,
            drain_seconds=self.drain_seconds,
            backlog=2,
        )
        self.supervisor = Supervisor(
            settings,
            Ports(settings, listeners_from(settings)),
            self.machine,
            clock=self.machine.seconds,
            adopt=self.machine.adopt,
            set_signal=self.machine.set_signal,
            notifier=Notifier(self._note, self.watchdog_seconds),
        )
        self.addCleanup(self._close)

    def _note(self, message: bytes) -> bool:
        self.noted.append(message.decode())
        return True

    def _keep_this_process_as_it_is(self) -> None:
        """Take back what a supervisor tells the kernel about its process."""
        arguments = Path("/proc/self/cmdline").read_bytes()
        name = Path("/proc/self/comm").read_text().strip()

        def restore() -> None:
            memory = Title(name).window("", len(arguments))
            memory[:] = arguments[: len(memory)]
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

        self.addCleanup(restore)

    def _close(self) -> None:
        if self.supervisor.running and self.machine.zygotes:
            self.supervisor.stopService()
        reapAllProcesses()
        for zygote in self.machine.zygotes:
            zygote.close()
        for transport in self.machine.transports:
            transport.close()
        if self.machine.scoreboard_fd is not None:
            os.close(self.machine.scoreboard_fd)

    def start(self) -> FakeZygote:
        """Start the service, as twistd does."""
        self.supervisor.privilegedStartService()
        self.supervisor.startService()
        return self.machine.zygotes[0]

    def start_whole(self) -> tuple[FakeZygote, list[FakeWorker]]:
        """Start, and have every worker serve for a while."""
        zygote = self.start()
        workers = [zygote.fork(number).become_ready() for number in range(1, self.procs + 1)]
        self.machine.advance(60)
        self.assertEqual(zygote.orders[1:], [{"fork": list(range(1, self.procs + 1))}])
        return zygote, workers

    @property
    def status(self) -> dict[str, Any]:
        return self.machine.zygotes[0].scoreboard.status(self.machine.seconds())

    @property
    def errors(self) -> dict[str, dict[str, int]]:
        """What is counted of calls that have failed, by function."""
        return {function["name"]: function["errors"] for function in self.status["functions"]}

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What is kept of failures."""
        return self.machine.zygotes[0].scoreboard.latest_failures(50)

    @property
    def restarts(self) -> dict[str, int]:
        """How many workers were replaced, by the causes that there were."""
        counted = self.status["totals"]["restarts"]
        return {cause: count for cause, count in counted.items() if count}


class StartTests(SupervisorTestCase):
    def test_a_start(self) -> None:
        """The zygote is told what to load, and then to fork every worker."""
        load, fork = self.start().orders
        self.assertEqual(load["load"]["directory"], os.getcwd())
        self.assertEqual(load["load"]["settings"]["procs"], 2)
        self.assertTrue(load["load"]["preload"])
        self.assertEqual(fork, {"fork": [1, 2]})

    def test_the_zygote_gets_the_port(self) -> None:
        """The zygote is given the listening socket."""
        listening = self.start().listening
        self.assertTrue(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def test_a_line_that_never_ends(self) -> None:
        """What is printed without a line's end is logged in parts, and not kept."""
        said: list[str] = []

        def observe(event: Any) -> None:
            if event["log_namespace"] == "taskd.output":
                said.append(event["log_text"])

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        zygote = self.start()
        zygote.print(b"begun, ")
        zygote.print(b"ended\nnext")
        self.assertEqual(said, ["begun, ended"])
        zygote.print(b"\r" * 10_000)
        zygote.print(b"new\n")
        self.assertEqual([len(text) for text in said[1:]], [10_004, 3])

    def test_signals(self) -> None:
        """Until it is stopped only SIGHUP is the daemon's own; the others are twistd's."""
        self.start()
        self.assertEqual(self.machine.signals, {signal.SIGHUP})

    def test_the_supervisor_is_shown(self) -> None:
        """The status tells the supervisor's process, and an empty queue."""
        self.start_whole()
        status = self.status
        self.assertEqual(status["supervisor"], {"pid": os.getpid(), "uptime": 60, "reload": None})
        self.assertEqual((status["queue"]["waiting"], self.restarts), (0, {}))

    def test_imports_that_cannot_be_forked(self) -> None:
        """A zygote that cannot share its imports loads without them, and so do all after it."""
        self.machine.first_words = [{"again": "they start threads"}, {"loaded": True}]
        zygote = self.start()
        first, second, fork = zygote.orders
        self.assertTrue(first["load"]["preload"])
        self.assertFalse(second["load"]["preload"])
        self.assertEqual(fork, {"fork": [1, 2]})
        zygote.end(KILLED)
        self.machine.advance(60)
        (load,) = self.machine.zygotes[1].orders
        self.assertFalse(load["load"]["preload"])

    def test_modules_that_cannot_be_imported(self) -> None:
        """A start whose task modules cannot be imported ends with the zygote's own words."""
        self.machine.first_words = [{"failed": "--tasks nowhere: no such module"}]
        with self.assertRaises(StartFailed) as caught:
            self.start()
        self.assertEqual(str(caught.exception), "--tasks nowhere: no such module")

    def test_a_zygote_that_dies_importing(self) -> None:
        """A start whose zygote dies ends, instead of waiting for it."""
        self.machine.first_words = []
        self.machine.dies_importing = True
        with self.assertRaises(StartFailed) as caught:
            self.start()
        self.assertIn("died while it imported", str(caught.exception))

    def test_without_a_port(self) -> None:
        """A start without its privileged part is refused, with what is missing."""
        with self.assertRaises(StartFailed) as caught:
            self.supervisor.startService()
        self.assertIn("privilegedStartService", str(caught.exception))


class WorkerTests(SupervisorTestCase):
    def test_one_that_has_served(self) -> None:
        """A worker that dies after it has served for a while is replaced at once, and counted."""
        zygote, (first, _) = self.start_whole()
        first.lose_link()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        self.assertEqual(self.restarts, {"died": 1})
        self.assertEqual(first.slot.status(0.0)["state"], "dead")

    def test_one_that_is_reaped_first(self) -> None:
        """A worker whose death is told before its link ends is replaced once."""
        zygote, (first, _) = self.start_whole()
        first.exit(KILLED)
        first.lose_link()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        self.assertEqual(self.restarts, {"died": 1})

    def test_one_that_dies_young(self) -> None:
        """Workers that die at their start are replaced ever later."""
        zygote = self.start()
        zygote.fork(2).become_ready()
        self.assertEqual(len(zygote.orders), 2)
        for delay in (0.1, 0.2, 0.4, 0.8):
            zygote.fork(1).die(exited(1))
            self.machine.advance(delay - 0.01)
            self.assertEqual(zygote.orders, [])
            self.machine.advance(0.02)
            self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_one_that_its_task_kills(self) -> None:
        """A worker that dies young while a task runs is replaced at once: it was the task."""
        zygote = self.start()
        worker = zygote.fork(1).become_ready()
        self.assertEqual(len(zygote.orders), 2)
        worker.slot.take(LABEL, 1.0)
        worker.die()
        self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_its_death_is_in_the_books(self) -> None:
        """A worker that dies with a task of its own is counted and kept; an idle one is not."""
        _, (first, second) = self.start_whole()
        first.slot.take(LABEL, 1.0)
        first.die()
        second.die()
        self.assertEqual(self.errors, {"report": {"worker-lost": 1}})
        (failure,) = self.failures
        self.assertEqual(
            (failure["function"], failure["code"], failure["worker"]), ("report", "worker-lost", 1)
        )
        self.assertIn("worker 1 was killed by SIGKILL", failure["message"])

    def test_its_death_with_anothers_task(self) -> None:
        """A task that others wait for is counted by them; the death is kept all the same."""
        _, (first, second) = self.start_whole()
        second.offer(7)
        first.slot.take(LABEL, 1.0)
        first.die()
        self.assertEqual(second.orders[0].split(b" ")[0], b"failed")
        self.assertEqual(self.errors, {})
        self.assertEqual([f["worker"] for f in self.failures], [1])

    def test_its_end_after_a_time_limit(self) -> None:
        """A worker that is rid of a task that was given up has lost nobody's: that was told."""
        _, (first, second) = self.start_whole()
        second.slot.take(LABEL, 1.0)
        second.say(b"replace TIME_LIMIT")
        second.die()
        self.assertEqual((self.errors, self.failures), ({}, []))
        self.assertTrue(first.slot.state)

    def test_one_that_dies_by_a_signal_without_a_name(self) -> None:
        """A worker that is killed by a real-time signal is replaced like any other."""
        zygote, (first, _) = self.start_whole()
        first.die(40)
        self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_one_that_stays_behind_its_link(self) -> None:
        """A process that stays when its link has ended is killed, by the zygote."""
        zygote, (first, _) = self.start_whole()
        first.lose_link()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        self.machine.advance(1)
        self.assertEqual(zygote.orders, [{"kill": first.pid, "signal": KILLED}])

    def test_one_that_has_gone(self) -> None:
        """A process that has been reaped is not killed, for its number may be another's."""
        zygote, (first, _) = self.start_whole()
        first.die()
        self.machine.advance(60)
        self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_one_that_cannot_be_forked(self) -> None:
        """What the kernel refuses to fork is asked for again, ever later."""
        zygote = self.start()
        zygote.fork(2)
        self.assertEqual(len(zygote.orders), 2)
        for delay in (0.1, 0.2):
            zygote.say(unforked=1, reason="Resource temporarily unavailable")
            self.machine.advance(delay - 0.01)
            self.assertEqual(zygote.orders, [])
            self.machine.advance(0.02)
            self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_one_that_nobody_knows(self) -> None:
        """The death of a process that is no worker, or no longer, changes nothing."""
        zygote, (first, _) = self.start_whole()
        first.die()
        first.exit(KILLED)
        zygote.say(exited=12, status=0)
        self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_what_it_logs(self) -> None:
        """What a worker logs is in the log, with its number, as bad as it was."""
        _, (first, _) = self.start_whole()
        seen: list[Any] = []
        globalLogPublisher.addObserver(seen.append)
        self.addCleanup(globalLogPublisher.removeObserver, seen.append)
        first.say(
            b'log {"time": 1.5, "level": "warn", "logger": "taskd.task", "message": "hot {x}", '
            b'"fields": {}}'
        )
        (event,) = (e for e in seen if e["log_namespace"] == "taskd.task")
        self.assertEqual(event["log_level"], LogLevel.warn)
        self.assertEqual(formatEvent(event), "worker 1: hot {x}")


class QueueTests(SupervisorTestCase):
    """What workers hand over, from one link to the other."""

    def setUp(self) -> None:
        super().setUp()
        _, (self.first, self.second) = self.start_whole()
        self.first.slot.take(LABEL, 1060.0)

    def test_a_task_and_its_reply(self) -> None:
        """A task that is handed over goes to who is idle, and its reply back."""
        self.first.offer(7)
        self.assertEqual(self.second.orders, [b'run 1 - {"function":"task7"}'])
        self.second.say(b'progress 1 {"done":1}', b"ended 1 null")
        self.assertEqual(self.first.orders, [b'progress 7 {"done":1}', b"ended 7 null"])

    def test_a_task_that_waits(self) -> None:
        """A task that finds nobody waits until somebody asks, and is shown meanwhile."""
        self.second.slot.take(LABEL, 1060.0)
        self.second.say(b"ask")
        self.first.offer(7, deadline=1065.5)
        self.machine.advance(2)
        queue = self.status["queue"]
        self.assertEqual((queue["waiting"], queue["oldest_seconds"]), (1, 2.0))
        self.assertEqual(queue["handed_over"], 1)
        self.second.slot.finish(False, 1.0)
        self.second.say(b"ask")
        self.assertEqual(self.second.orders, [b"nothing", b'run 1 1065.5 {"function":"task7"}'])
        self.assertEqual(self.status["queue"]["waiting"], 0)

    def test_too_many(self) -> None:
        """A task beyond the backlog is refused with the time after which to come back."""
        self.second.slot.take(LABEL, 1060.0)
        for ticket in (7, 8, 9):
            self.first.offer(ticket)
        (failed,) = self.first.orders
        verb, ticket, fields = failed.split(b" ", 2)
        self.assertEqual((verb, ticket), (b"failed", b"9"))
        error = json.loads(fields)
        self.assertEqual((error["code"], error["retry_after"]), ("overloaded", 1.0))
        self.machine.advance(1)
        self.assertEqual(self.status["queue"]["refused"], 1)

    def test_taken_back(self) -> None:
        """A task that is taken back is cancelled where it runs, and waits no longer if it waits."""
        for ticket in (7, 8):
            self.first.offer(ticket)
            self.second.slot.take(LABEL, 1060.0)
        self.first.say(b"cancel 7", b"cancel 8")
        self.assertEqual(self.second.orders[1:], [b"cancel 1"])
        self.assertEqual(self.status["queue"]["waiting"], 0)

    def test_given_back(self) -> None:
        """A task that a worker gives back goes to another one."""
        self.first.offer(7)
        self.first.slot.finish(False, 1.0)
        self.second.say(b"returned 1")
        self.assertEqual(self.first.orders, [b'run 1 - {"function":"task7"}'])

    def test_its_time_is_over(self) -> None:
        """A task whose time is over while it waits is answered, and counted."""
        self.second.slot.take(LABEL, 1060.0)
        self.first.offer(7, deadline=1061.0)
        self.machine.advance(1)
        self.machine.advance(0.1)
        self.assertIn(b'"time-limit"', self.first.orders[0])
        self.assertEqual(self.status["queue"]["expired"], 1)

    def test_its_worker_dies(self) -> None:
        """A task whose worker dies is answered."""
        self.first.offer(7)
        self.second.die()
        self.assertIn(b'"worker-lost"', self.first.orders[0])


class ReplacingTests(SupervisorTestCase):
    """Workers that are replaced before they die."""

    def test_a_worn_worker(self) -> None:
        """A worn worker serves on until its successor accepts; then it is told to retire."""
        zygote, (first, second) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        self.assertEqual(zygote.orders, [{"fork": [3]}])
        self.assertEqual(first.orders, [])
        successor = zygote.fork(3)
        self.assertEqual(first.orders, [])
        successor.become_ready()
        self.assertEqual(first.orders, [RETIRE])
        first.leave()
        self.assertEqual((first.orders, second.orders), ([RETIRE, b"go"], []))
        self.machine.advance(60)
        self.assertEqual(zygote.orders, [])
        self.assertEqual(self.restarts, {"max_tasks": 1})
        self.assertEqual([w["worker"] for w in self.status["workers"]], [2, 3])

    def test_the_lowest_free_slot(self) -> None:
        """A successor takes the lowest slot that is free."""
        zygote, (first, second) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        zygote.fork(3).become_ready()
        first.leave()
        second.say(b"replace MAX_RSS")
        self.assertEqual(zygote.orders, [{"fork": [3]}, {"fork": [1]}])

    def test_causes(self) -> None:
        """Each cause is counted by itself, and once for each worker."""
        _, (first, second) = self.start_whole()
        for cause in (b"MAX_RSS", b"MAX_TASKS"):
            first.say(b"replace " + cause)
        second.say(b"replace TIME_LIMIT")
        self.assertEqual(self.restarts, {"max_rss": 1, "time_limit": 1})

    def test_several(self) -> None:
        """Each successor that accepts lets one worn worker retire, in their order."""
        zygote, (first, second) = self.start_whole()
        for worker in (second, first):
            worker.say(b"replace MAX_TASKS")
        self.assertEqual(zygote.orders, [{"fork": [3]}, {"fork": [4]}])
        zygote.fork(4).become_ready()
        self.assertEqual((first.orders, second.orders), ([], [RETIRE]))
        zygote.fork(3).become_ready()
        self.assertEqual((first.orders, second.orders), ([RETIRE], [RETIRE]))

    def test_one_that_dies_before(self) -> None:
        """A worn worker that dies before its successor accepts is not replaced once more."""
        zygote, (first, second) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        first.die()
        self.assertEqual(zygote.orders, [{"fork": [3]}])
        zygote.fork(3).become_ready()
        self.machine.advance(60)
        self.assertEqual((zygote.orders, second.orders), ([], []))
        self.assertEqual(self.restarts, {"max_tasks": 1})

    def test_a_successor_that_dies(self) -> None:
        """If the successor dies before it accepts, the worn worker serves on until one does."""
        zygote, (first, _) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        zygote.fork(3).die(exited(1))
        self.machine.advance(0.2)
        self.assertEqual(zygote.orders, [{"fork": [3]}, {"fork": [3]}])
        self.assertEqual(first.orders, [])
        zygote.fork(3).become_ready()
        self.assertEqual(first.orders, [RETIRE])

    def test_all_slots_are_taken(self) -> None:
        """Where those that finish hold every slot, the next successor waits for one of them."""
        zygote, worn = self.start_whole()
        worn.append(worn[1])
        for number in (3, 4, 5, 6, 7, 8):
            worn[-1].say(b"replace TIME_LIMIT")
            worn.append(zygote.fork(number).become_ready())
        self.assertEqual(len(zygote.orders), 6)
        worn[-1].say(b"replace TIME_LIMIT")
        self.assertEqual(zygote.orders, [])
        worn[3].leave()
        self.assertEqual(zygote.orders, [{"fork": [3]}])

    def test_one_that_has_no_thread(self) -> None:
        """A worker that has lost its thread is given nothing more, from the moment it says so."""
        _, (first, second) = self.start_whole()
        second.slot.take(LABEL, 1060.0)
        first.say(b"replace TIME_LIMIT")
        second.offer(7)
        self.assertEqual((first.orders, self.status["queue"]["waiting"]), ([], 1))

    def test_one_that_is_worn(self) -> None:
        """A worker that is worn out is given tasks until it retires, and none afterwards."""
        zygote, (first, second) = self.start_whole()
        second.slot.take(LABEL, 1060.0)
        first.say(b"replace MAX_RSS")
        second.offer(7)
        self.assertEqual(first.orders, [b'run 1 - {"function":"task7"}'])
        successor = zygote.fork(3).become_ready()
        successor.slot.take(LABEL, 1060.0)
        second.offer(8)
        self.assertEqual(first.orders[1:], [RETIRE])
        self.assertEqual(self.status["queue"]["waiting"], 1)

    def test_tasks_that_wait_keep_nobody(self) -> None:
        """A retired worker may go though tasks wait: others will come to them."""
        zygote, (first, second) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        zygote.fork(3).become_ready().slot.take(LABEL, 1060.0)
        second.slot.take(LABEL, 1060.0)
        second.offer(7)
        first.say(b"leaving")
        self.assertEqual(first.orders, [RETIRE, b"go"])


class HungTests(SupervisorTestCase):
    """Workers whose reactor does not run."""

    def hang(self, worker: FakeWorker) -> None:
        """Have a worker run a task whose time is over, and beat no more."""
        worker.slot.take(LABEL, self.machine.seconds())
        worker.slot.must_end(self.machine.seconds() + 1)
        worker.slot.beats(self.machine.seconds())

    def test_a_hung_worker(self) -> None:
        """It is told to show where it stands, then killed, replaced and counted."""
        zygote, (first, _) = self.start_whole()
        self.hang(first)
        self.machine.pump([0.5] * 4)  # asked after half a second; a second and a half to answer
        self.assertEqual(zygote.orders, [])
        self.machine.advance(0.125)
        self.assertEqual(zygote.orders, [{"kill": first.pid, "signal": int(signal.SIGUSR2)}])
        self.machine.advance(0.1)
        self.assertEqual(zygote.orders, [{"kill": first.pid, "signal": KILLED}])
        self.machine.advance(5)
        self.assertEqual(zygote.orders, [])
        first.die()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        self.assertEqual(self.restarts, {"hung": 1})

    def test_one_whose_reactor_runs(self) -> None:
        """A worker that beats is not killed, whatever is past its time: it sees to that itself."""
        zygote, (first, _) = self.start_whole()
        self.hang(first)
        for _ in range(20):
            self.machine.advance(0.5)
            first.slot.beats(self.machine.seconds())
        self.assertEqual(zygote.orders, [])

    def test_one_without_a_limit(self) -> None:
        """A worker that does not beat is not killed if its task may take as long as it likes."""
        zygote, (first, _) = self.start_whole()
        self.hang(first)
        first.slot.must_end(0.0)
        self.machine.pump([60.0] * 60)
        self.assertEqual(zygote.orders, [])

    def test_who_is_asked(self) -> None:
        """Workers with a task or a connection are asked twice a second; the others sleep."""
        _, (first, second) = self.start_whole()
        first.slot.take(LABEL, self.machine.seconds())
        self.machine.pump([0.5] * 10)
        self.assertEqual((first.times_asked, second.times_asked), (10, 0))
        first.slot.finish(False, 1.0)
        second.slot.connected(1)
        self.machine.pump([0.5] * 10)
        self.assertEqual((first.times_asked, second.times_asked), (10, 10))

    def test_one_that_ends_at_last(self) -> None:
        """A worker that is gone before it is killed is nobody to kill."""
        zygote, (first, _) = self.start_whole()
        self.hang(first)
        self.machine.pump([0.5] * 4)
        self.machine.advance(0.125)
        first.die()
        self.machine.advance(60)
        told = [order for order in zygote.orders if order.get("signal") == KILLED]
        self.assertEqual(told, [])


class MovingTests(SupervisorTestCase):
    """Connections on their way from one worker to another."""

    procs = 3

    def new_fd(self) -> tuple[int, int]:
        """Make a file descriptor; give it and what tells it from others."""
        fd = os.memfd_create("connection")
        return fd, os.fstat(fd).st_ino

    def adopted(self, worker: FakeWorker) -> list[tuple[bytes, int]]:
        """Give what a worker has adopted: the messages, and what came with them."""
        found = []
        for message, fds in worker.adopted:
            (fd,) = fds
            found.append((message, os.fstat(fd).st_ino))
            os.close(fd)
        return found

    def hold(self, worker: FakeWorker, connections: int) -> None:
        worker.slot.disconnected(connections)

    def test_the_emptiest_worker(self) -> None:
        """A connection goes to the worker that holds the fewest, with what was read of it."""
        _, (first, second, third) = self.start_whole()
        self.hold(second, 5)
        self.hold(third, 4)
        first.say(b"replace MAX_TASKS")
        fd, inode = self.new_fd()
        first.move(fd, b'{"func')
        message = b"adopt %d %s\n" % (inode, b64encode(b'{"func'))
        self.assertEqual(self.adopted(third), [(message, inode)])
        self.assertEqual([self.adopted(worker) for worker in (first, second)], [[], []])
        with self.assertRaises(OSError):
            os.fstat(fd)

    def test_many(self) -> None:
        """Connections that go together are spread, though none shows on the scoreboard yet."""
        zygote, workers = self.start_whole()
        for worker in workers:
            worker.say(b"replace MAX_TASKS")
        for transport in self.machine.transports:
            transport.has_unsent = True
        successors = [zygote.fork(number) for number in (4, 5)]
        for _ in range(7):
            workers[0].move(self.new_fd()[0], b"")
        self.hold(successors[0], 3)
        for transport in self.machine.transports:
            transport.has_unsent = True
        for worker in successors:
            worker.become_ready()
        self.assertEqual([self.adopted(worker) for worker in successors], [[], []])
        for transport in self.machine.transports:
            transport.has_unsent = False
        self.machine.advance(0.1)
        self.assertEqual([len(self.adopted(worker)) for worker in successors], [2, 5])

    def test_nobody_serves(self) -> None:
        """Connections wait while all workers are to go, and go to the first that accepts."""
        zygote, workers = self.start_whole()
        for worker in workers:
            worker.say(b"replace MAX_TASKS")
        fd, inode = self.new_fd()
        workers[0].move(fd, b"a")
        self.machine.advance(1)
        self.assertEqual([worker.adopted for worker in workers], [[], [], []])
        successor = zygote.fork(4)
        self.assertEqual(self.adopted(successor), [])
        successor.become_ready()
        self.assertEqual(self.adopted(successor), [(b"adopt %d YQ==\n" % inode, inode)])

    def test_no_room_on_the_way(self) -> None:
        """A connection that finds no room on a link goes there a little later."""
        _, workers = self.start_whole()
        for transport in self.machine.transports:
            transport.has_unsent = True
        workers[0].say(b"replace MAX_TASKS")
        workers[0].move(self.new_fd()[0], b"")
        for transport in self.machine.transports:
            transport.has_unsent = False
        self.assertEqual([len(self.adopted(worker)) for worker in workers[1:]], [0, 0])
        self.machine.advance(0.1)
        self.assertEqual(sum(len(self.adopted(worker)) for worker in workers[1:]), 1)

    def test_a_stop(self) -> None:
        """Connections that have no worker when the daemon stops are closed, and later ones."""
        _, workers = self.start_whole()
        for worker in workers:
            worker.say(b"replace MAX_TASKS")
        before, later = self.new_fd()[0], self.new_fd()[0]
        workers[0].move(before, b"")
        self.supervisor.stopService()
        workers[0].move(later, b"")
        for fd in (before, later):
            with self.assertRaises(OSError):
                os.fstat(fd)


class ReloadTests(SupervisorTestCase):
    """New code, while the old one serves."""

    def reload(self) -> FakeZygote:
        """Have the operator ask for it; give the new zygote."""
        before = len(self.machine.zygotes)
        self.machine.interrupt(signal.SIGHUP)
        self.assertEqual(len(self.machine.zygotes), before + 1)
        return self.machine.zygotes[-1]

    def test_a_reload(self) -> None:
        """The new zygote forks all workers anew; each that accepts lets an old one retire."""
        old, (first, second) = self.start_whole()
        new = self.reload()
        self.assertEqual([list(order) for order in new.orders], [["load"]])
        self.assertEqual((old.orders, first.orders, second.orders), ([], [], []))
        new.say(loaded=True)
        self.assertEqual(new.orders, [{"fork": [3, 4]}])
        successors = [new.fork(number) for number in (3, 4)]
        self.assertEqual((first.orders, second.orders), ([], []))
        successors[0].become_ready()
        self.assertEqual((first.orders, second.orders), ([RETIRE], []))
        successors[1].become_ready()
        self.assertEqual((first.orders, second.orders), ([RETIRE], [RETIRE]))
        self.assertEqual(self.restarts, {"reload": 2})
        self.assertEqual(self.status["supervisor"]["reload"], {"seconds_ago": 0, "failure": None})

    def test_new_credentials(self) -> None:
        """Who retires is told the tokens and authorities of those who stay."""
        _, (first, second) = self.start_whole()
        renewed = Credentials(tokens=(("web", "digest"),), client_ca="AUTHORITY")
        self.patch(self.supervisor, "credentials", lambda: renewed)
        new = self.reload()
        new.say(loaded=True)
        self.assertEqual((first.orders, second.orders), ([], []))
        for number in (3, 4):
            new.fork(number).become_ready()
        self.assertEqual((first.orders, second.orders), ([retire(renewed)], [retire(renewed)]))

    def test_new_credentials_again(self) -> None:
        """Who retires already is told the new tokens as well, when the next code is loaded."""
        _, (first, second) = self.start_whole()
        first.say(b"replace MAX_TASKS")
        self.machine.zygotes[0].fork(3).become_ready()
        renewed = Credentials(tokens=(("web", "digest"),))
        self.patch(self.supervisor, "credentials", lambda: renewed)
        new = self.reload()
        self.assertEqual((first.orders, second.orders), ([RETIRE], []))
        new.say(loaded=True)
        self.assertEqual((first.orders, second.orders), ([RETIRE, retire(renewed)], []))

    def test_the_old_zygote(self) -> None:
        """The old zygote is let go when its last worker has gone, and is not replaced."""
        old, (first, second) = self.start_whole()
        new = self.reload()
        new.say(loaded=True)
        for number in (3, 4):
            new.fork(number).become_ready()
        first.leave()
        self.assertFalse(old.is_dismissed)
        second.leave()
        self.assertTrue(old.is_dismissed)
        self.assertFalse(new.is_dismissed)
        old.end()
        self.machine.advance(60)
        self.assertEqual(len(self.machine.zygotes), 2)

    def test_who_replaces_whom(self) -> None:
        """What dies while code is loaded is replaced with the old code, and later with the new."""
        old, (first, _) = self.start_whole()
        new = self.reload()
        first.die()
        self.assertEqual(old.orders, [{"fork": [1]}])
        old.fork(1).become_ready()
        new.say(loaded=True)
        self.assertEqual(new.orders[1:], [{"fork": [3, 4]}])
        for number in (3, 4):
            worker = new.fork(number).become_ready()
        self.machine.advance(60)
        worker.die()
        self.assertEqual((old.orders, new.orders), ([], [{"fork": [4]}]))

    def test_code_that_cannot_be_loaded(self) -> None:
        """If the code cannot be loaded the old workers serve on, and the status says why."""
        old, workers = self.start_whole()
        new = self.reload()
        new.say(failed="--tasks x: SyntaxError")
        self.assertTrue(new.is_dismissed)
        new.end()
        self.machine.advance(60)
        self.assertEqual((old.orders, self.restarts), ([], {}))
        self.assertEqual([worker.orders for worker in workers], [[], []])
        told = self.status["supervisor"]["reload"]
        self.assertEqual(told, {"seconds_ago": 60.0, "failure": "--tasks x: SyntaxError"})

    def test_told_again_meanwhile(self) -> None:
        """Being told again while code is loaded loads it once more, and replaces all again."""
        _, _ = self.start_whole()
        new = self.reload()
        for _ in range(2):
            self.machine.interrupt(signal.SIGHUP)
        self.assertEqual(len(self.machine.zygotes), 2)
        new.say(loaded=True)
        self.assertEqual(len(self.machine.zygotes), 3)
        middle = [new.fork(number).become_ready() for number in (3, 4)]
        newest = self.machine.zygotes[2]
        newest.say(loaded=True)
        self.assertEqual(newest.orders[1:], [{"fork": [5, 6]}])
        for number in (5, 6):
            newest.fork(number).become_ready()
        self.assertEqual([worker.orders for worker in middle], [[RETIRE], [RETIRE]])

    def test_what_the_old_zygote_forks_late(self) -> None:
        """Workers of the old code whose fork is told after the new is loaded are replaced too."""
        old = self.start()
        new = self.reload()
        new.say(loaded=True)
        late = [old.fork(number).become_ready() for number in (1, 2)]
        self.assertEqual(new.orders[1:], [{"fork": [3]}, {"fork": [4]}])
        for number in (3, 4):
            new.fork(number).become_ready()
        self.assertEqual([worker.orders for worker in late], [[RETIRE], [RETIRE]])

    def test_one_that_is_ready_too_late(self) -> None:
        """A worker that accepts after it was told to retire is given nothing."""
        old = self.start()
        new = self.reload()
        new.say(loaded=True)
        late = old.fork(1)
        serving = new.fork(3).become_ready()
        self.assertEqual(late.orders, [RETIRE])
        late.become_ready()
        serving.slot.take(LABEL, self.machine.seconds())
        serving.offer(7)
        self.assertEqual((late.orders, self.status["queue"]["waiting"]), ([RETIRE], 1))

    def test_what_the_old_zygote_never_forks(self) -> None:
        """What an old zygote was asked to fork before it died is forked by the new one."""
        old = self.start()
        new = self.reload()
        new.say(loaded=True)
        self.assertEqual(new.orders[1:], [])
        old.end(KILLED)
        self.assertEqual(new.orders, [{"fork": [1, 2]}])

    def test_an_old_zygote_that_still_has_to_fork(self) -> None:
        """An old zygote is not let go while a worker is awaited from it."""
        old, (first, second) = self.start_whole()
        first.die()
        self.assertEqual(old.orders, [{"fork": [1]}])
        new = self.reload()
        new.say(loaded=True)
        second.die()
        self.assertFalse(old.is_dismissed)
        old.fork(1).die()
        self.assertTrue(old.is_dismissed)

    def test_a_stop_meanwhile(self) -> None:
        """A stop while code is loaded ends both zygotes, the new one with its ports closed."""
        old, workers = self.start_whole()
        new = self.reload()
        stopped = self.supervisor.stopService()
        new.say(loaded=True)
        self.assertEqual(new.orders[1:], [{"unlisten": True}])
        self.assertEqual(self.restarts, {})
        for worker in workers:
            worker.leave()
        for zygote in (old, new):
            self.assertNoResult(stopped)
            self.assertTrue(zygote.is_dismissed)
            zygote.end()
        self.assertIsNone(self.successResultOf(stopped))


class ZygoteTests(SupervisorTestCase):
    """What becomes of workers when their zygote dies."""

    procs = 1

    def load_next(self) -> FakeZygote:
        """Have the latest zygote say that it has loaded."""
        zygote = self.machine.zygotes[-1]
        zygote.say(loaded=True)
        return zygote

    def test_what_the_next_one_forks(self) -> None:
        """A new zygote forks what is missing, once it has loaded."""
        self.start().end(KILLED)
        self.machine.advance(60)
        zygote = self.machine.zygotes[1]
        self.assertEqual(len(zygote.orders), 1)
        self.load_next()
        self.assertEqual(zygote.orders, [{"fork": [1]}])

    def test_workers_serve_on(self) -> None:
        """A dead zygote's workers serve on; the new one forks again when they die."""
        zygote, (worker,) = self.start_whole()
        zygote.end(KILLED)
        # Twisted has something to say about a child that is none.
        self.assertEqual(len(self.flushLoggedErrors(ChildProcessError)), 1)
        self.machine.advance(60)
        zygote = self.load_next()
        self.assertEqual(len(zygote.orders), 1)
        worker.lose_link()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        reapAllProcesses()
        self.machine.advance(60)
        self.assertEqual(zygote.orders, [])

    def test_an_orphan_that_somebody_else_has_reaped(self) -> None:
        """An orphan that is not there any more when it is to be killed counts as reaped."""
        zygote, (worker,) = self.start_whole()
        zygote.end(KILLED)
        self.flushLoggedErrors(ChildProcessError)
        stopped = self.supervisor.stopService()
        worker.lose_link()
        self.assertNoResult(stopped)
        self.machine.advance(1)
        self.assertIsNone(self.successResultOf(stopped))

    def test_its_last_words(self) -> None:
        """A worker that is announced when its zygote is dead already is waited for all the same."""
        zygote = self.start()
        zygote.end(KILLED)
        worker = zygote.fork(1)
        self.flushLoggedErrors(ChildProcessError)
        stopped = self.supervisor.stopService()
        worker.lose_link()
        reapAllProcesses()
        self.successResultOf(stopped)

    def test_a_worker_and_its_zygote_die(self) -> None:
        """A worker that dies young, and its zygote with it, is replaced by one worker."""
        zygote = self.start()
        for delay in (0.1, 0.2):
            zygote.fork(1).die(exited(1))
            self.machine.advance(delay)
        zygote.fork(1).die(exited(1))
        zygote.end(KILLED)
        self.machine.advance(0.1)
        second = self.load_next()
        self.machine.advance(60)
        forks = [order["fork"] for order in second.orders if "fork" in order]
        self.assertEqual(forks, [[1]])

    def test_one_that_cannot_load(self) -> None:
        """A new zygote that cannot import the tasks is let go, and not the last one."""
        self.start().end(KILLED)
        self.machine.advance(60)
        self.machine.zygotes[1].say(failed="--tasks x: broken for the moment")
        self.machine.end_dismissed()
        self.machine.advance(60)
        self.assertEqual(len(self.machine.zygotes), 3)

    def test_one_that_cannot_be_spawned(self) -> None:
        """A zygote that the kernel refuses to start is started later."""
        self.start().end(KILLED)
        self.machine.spawn_error = OSError(11, "Resource temporarily unavailable")
        self.machine.advance(1)
        self.assertEqual(len(self.machine.zygotes), 1)
        self.machine.advance(60)
        self.assertEqual(len(self.machine.zygotes), 2)


class NotifyTests(SupervisorTestCase):
    """What the service manager is told."""

    def events(self) -> list[str]:
        """Give what it was told, but for figures and signs of life."""
        told = [message.partition("=")[0] for message in self.noted]
        return [name for name in told if name not in ("STATUS", "WATCHDOG")]

    def test_a_start(self) -> None:
        """It is told that the daemon is ready when the first worker accepts."""
        zygote = self.start()
        self.assertEqual(self.noted, ["STATUS=starting: the task modules are imported"])
        first, second = zygote.fork(1), zygote.fork(2)
        self.assertEqual(self.events(), [])
        first.become_ready()
        self.assertEqual(self.events(), ["READY"])
        second.become_ready()
        self.machine.advance(1)
        self.assertEqual(self.events(), ["READY"])
        self.assertIn(
            "STATUS=2 workers: 2 idle, 0 busy; 0 tasks wait; 0 done, 0 failed", self.noted
        )

    def test_a_reload(self) -> None:
        """A reload is over when every worker of the old code has been told to go."""
        self.start_whole()
        self.machine.interrupt(signal.SIGHUP)
        self.assertEqual(self.noted[-1], "RELOADING=1\nMONOTONIC_USEC=1060000000")
        self.machine.advance(1)
        new = self.machine.zygotes[1]
        new.say(loaded=True)
        new.fork(3).become_ready()
        self.machine.advance(1)
        self.assertEqual(self.events(), ["READY", "RELOADING"])
        new.fork(4).become_ready()
        self.machine.advance(1)
        self.assertEqual(self.events(), ["READY", "RELOADING", "READY"])

    def test_a_reload_that_fails(self) -> None:
        """A reload that fails is over, and the manager is told why."""
        self.start_whole()
        self.machine.interrupt(signal.SIGHUP)
        self.machine.zygotes[1].say(failed="no such module")
        self.machine.advance(1)
        self.assertEqual(self.events(), ["READY", "RELOADING", "READY"])
        self.assertTrue(self.noted[-1].endswith("the old code serves on: no such module"))

    def test_a_stop(self) -> None:
        """A stop is told, with the time until all that is left has been killed."""
        self.start_whole()
        self.supervisor.stopService()
        (told,) = (message for message in self.noted if message.startswith("STOPPING=1\n"))
        microseconds = int(told.rpartition("EXTEND_TIMEOUT_USEC=")[2])
        self.assertGreater(microseconds / 1e6, GRACE + 2 + 2)


class WatchdogTests(SupervisorTestCase):
    """The service manager's watchdog."""

    watchdog_seconds = 10.0

    def advance(self, seconds: int, *living: FakeWorker) -> int:
        """Let time pass in which these workers answer; tell how often the watchdog was fed."""
        before, asked = self.noted.count("WATCHDOG=1"), 0
        for _ in range(10 * seconds):
            self.machine.advance(0.1)
            if asked < (asked := sum(worker.times_asked for worker in living)):
                for worker in living:
                    worker.slot.beats(self.machine.seconds())
        return self.noted.count("WATCHDOG=1") - before

    def test_an_idle_pool(self) -> None:
        """Of workers that idle one is woken now and then, and the watchdog fed."""
        _, (first, second) = self.start_whole()
        first.slot.beats(self.machine.seconds())
        before = second.times_asked
        self.assertGreaterEqual(self.advance(60, first), 12)
        self.assertEqual(second.times_asked, before)
        self.assertLessEqual(first.times_asked, 20 + before)

    def test_one_that_does_not_answer(self) -> None:
        """If the one that was woken does not answer, another one does."""
        _, (first, second) = self.start_whole()
        first.slot.beats(self.machine.seconds())
        self.assertGreaterEqual(self.advance(60, second), 12)

    def test_none_answers(self) -> None:
        """A pool in which nobody answers is not fed."""
        self.start_whole()
        self.advance(20)
        self.assertEqual(self.advance(60), 0)

    def test_old_code(self) -> None:
        """Workers that wait for their successors count as well: they serve."""
        _, (first, second) = self.start_whole()
        self.machine.interrupt(signal.SIGHUP)
        self.machine.zygotes[1].say(loaded=True)
        self.advance(20, first, second)
        self.assertGreaterEqual(self.advance(60, first, second), 12)


class DrainTests(SupervisorTestCase):
    """A stop before which all goes on for a while."""

    drain_seconds = 3.0

    def is_draining(self) -> bool:
        return self.machine.zygotes[0].scoreboard.supervisor_slot().state is State.DRAINING

    def test_all_goes_on(self) -> None:
        """Until its time is over a daemon that drains listens, and replaces dead workers."""
        zygote, (first, second) = self.start_whole()
        self.assertFalse(self.is_draining())
        stopped = self.supervisor.stopService()
        self.assertTrue(self.is_draining())
        self.machine.advance(1)
        with socket.create_connection(zygote.listening.getsockname()):
            pass
        first.die()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        again = zygote.fork(1).become_ready()
        self.machine.advance(1.9)
        self.assertEqual((again.orders, second.orders), ([], []))
        self.machine.advance(0.1)
        for worker in (again, second):
            self.assertEqual(worker.orders, [b"stop"])
            worker.leave()
        zygote.end()
        self.assertIsNone(self.successResultOf(stopped))

    def test_told_again(self) -> None:
        """Told again to stop, it does so at once, and once."""
        zygote, workers = self.start_whole()
        self.supervisor.stopService()
        self.supervisor.hurry()
        for worker in workers:
            self.assertEqual(worker.orders, [b"stop"])
        killed = [{"kill": worker.pid, "signal": KILLED} for worker in workers]
        self.assertEqual([o for o in zygote.orders if "kill" in o], killed)
        self.machine.advance(5)
        for worker in workers:
            self.assertEqual(worker.orders, [b"stop"])

    def test_the_manager_knows(self) -> None:
        """The service manager is asked for the time of both, the draining and the grace."""
        self.start_whole()
        self.supervisor.stopService()
        (told,) = [note for note in self.noted if "STOPPING=1" in note]
        asked_for = int(told.partition("EXTEND_TIMEOUT_USEC=")[2].split()[0])
        self.assertGreaterEqual(asked_for, (self.drain_seconds + GRACE) * 1e6)


class StopTests(SupervisorTestCase):
    def stop(self) -> Deferred[None]:
        return self.supervisor.stopService()

    def test_a_stop(self) -> None:
        """Workers are told to finish; when the last has gone the zygote goes, and all is done."""
        zygote, workers = self.start_whole()
        stopped = self.stop()
        for worker in workers:
            self.assertEqual(worker.orders, [b"stop"])
            self.assertFalse(zygote.is_dismissed)
            worker.leave()
        self.assertTrue(zygote.is_dismissed)
        self.assertNoResult(stopped)
        zygote.end()
        self.assertIsNone(self.successResultOf(stopped))
        self.assertEqual(zygote.orders, [{"unlisten": True}])

    def test_the_port_is_closed(self) -> None:
        """Nobody can connect any more once the workers have let go of the port as well."""
        zygote, _ = self.start_whole()
        address = zygote.listening.getsockname()
        self.stop()
        zygote.listening.close()
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(address)

    def test_tasks_that_wait(self) -> None:
        """While tasks wait nobody is let go, and who has left nothing to do is given them."""
        _, (first, second) = self.start_whole()
        for worker in (first, second):
            worker.slot.take(LABEL, 1060.0)
        first.offer(7)
        self.stop()
        second.slot.finish(False, 1.0)
        second.say(b"leaving")
        self.assertEqual(second.orders, [b"stop"])
        self.machine.advance(0.1)
        self.assertEqual(second.orders[1:], [b'run 1 - {"function":"task7"}', b"go"])
        second.say(b"ended 1 null")
        self.assertEqual(first.orders, [b"stop", b"ended 7 null"])

    def test_tasks_that_wait_for_a_late_worker(self) -> None:
        """A worker that begins to accept only after the stop is given what waits."""
        zygote = self.start()
        first, second = zygote.fork(1).become_ready(), zygote.fork(2)
        first.slot.take(LABEL, 1000.0)
        self.stop()
        second.become_ready()
        first.offer(7)
        self.assertEqual(second.orders, [b"stop", b'run 1 - {"function":"task7"}'])

    def test_tasks_that_wait_too_long(self) -> None:
        """When the grace is over the tasks that wait are answered, and whoever waited may go."""
        _, (first, second) = self.start_whole()
        for worker in (first, second):
            worker.slot.take(LABEL, 1060.0)
        first.offer(7)
        self.stop()
        second.say(b"leaving")
        self.machine.advance(GRACE)
        self.machine.advance(0.1)
        self.assertIn(b'failed 7 {"code": "shutting-down"', first.orders[-1])
        self.assertEqual(second.orders, [b"stop", b"go"])

    def test_a_worker_that_does_not_go(self) -> None:
        """A worker that is not done when the grace is over, and a moment more, is killed."""
        zygote, (first, second) = self.start_whole()
        self.stop()
        first.leave()
        self.machine.advance(GRACE)
        self.assertEqual(zygote.orders, [{"unlisten": True}])
        self.machine.advance(2)
        self.assertEqual(zygote.orders, [{"kill": second.pid, "signal": KILLED}])

    def stop_twice(self, number: signal.Signals) -> None:
        """Stop, and have a signal come that says so again."""
        zygote, workers = self.start_whole()
        stopped = self.stop()
        self.assertEqual(zygote.orders, [{"unlisten": True}])
        self.machine.interrupt(number)
        kills = [{"kill": worker.pid, "signal": KILLED} for worker in workers]
        self.assertEqual(zygote.orders, kills)
        for worker in workers:
            worker.die()
        zygote.end()
        self.assertIsNone(self.successResultOf(stopped))

    def test_a_second_sigterm(self) -> None:
        """A second SIGTERM ends the grace at once."""
        self.stop_twice(signal.SIGTERM)

    def test_a_second_sigint(self) -> None:
        """So does a second Ctrl-C."""
        self.stop_twice(signal.SIGINT)

    def test_a_second_signal_too_early(self) -> None:
        """Hurrying a daemon that was not told to stop does nothing."""
        zygote, _ = self.start_whole()
        self.supervisor.hurry()
        self.assertEqual(zygote.orders, [])

    def test_a_worker_that_comes_late(self) -> None:
        """A worker whose fork is told during the stop is told to go."""
        zygote = self.start()
        stopped = self.stop()
        worker = zygote.fork(1)
        self.assertEqual(worker.orders, [b"stop"])
        worker.leave()
        zygote.end()
        self.successResultOf(stopped)

    def test_a_worker_that_is_ready_late(self) -> None:
        """Workers that become ready during the stop are no error."""
        zygote = self.start()
        workers = [zygote.fork(number) for number in (1, 2)]
        stopped = self.stop()
        for worker in workers:
            worker.become_ready()
        for worker in workers:
            worker.leave()
        zygote.end()
        self.successResultOf(stopped)

    def test_nothing_is_replaced(self) -> None:
        """What dies or wears out during the stop, or has before it, is not replaced."""
        zygote, (first, second) = self.start_whole()
        first.die()
        young = zygote.fork(1)
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        young.die(exited(1))
        self.stop()
        second.say(b"replace MAX_TASKS")
        second.die()
        zygote.end(KILLED)
        self.machine.interrupt(signal.SIGHUP)
        self.machine.advance(60)
        self.assertEqual(zygote.orders, [{"unlisten": True}])
        self.assertEqual(len(self.machine.zygotes), 1)

    def test_between_two_zygotes(self) -> None:
        """A stop while there is neither a zygote nor a worker is over at once."""
        self.start().end(KILLED)
        self.successResultOf(self.stop())
        self.machine.advance(60)
        self.assertEqual(len(self.machine.zygotes), 1)

    def test_a_zygote_that_does_not_go(self) -> None:
        """A zygote that does not go by itself is killed when the grace is over."""
        zygote, workers = self.start_whole()
        self.stop()
        for worker in workers:
            worker.leave()
        self.machine.advance(GRACE + 2)
        self.assertEqual(zygote.signals, ["KILL"])

    def test_a_zygote_that_hangs(self) -> None:
        """A zygote that kills nobody when it is told to is killed itself some time later."""
        zygote, _ = self.start_whole()
        self.stop()
        self.machine.advance(GRACE + 2)
        self.machine.advance(60)
        self.assertEqual(zygote.signals, ["KILL"])

    def test_a_zygote_that_dies_meanwhile(self) -> None:
        """If the zygote dies during the stop its workers are waited for all the same."""
        zygote, workers = self.start_whole()
        stopped = self.stop()
        zygote.end(KILLED)
        self.assertEqual(len(self.flushLoggedErrors(ChildProcessError)), len(workers))
        self.assertNoResult(stopped)
        for worker in workers:
            worker.lose_link()
        reapAllProcesses()
        self.successResultOf(stopped)

    def test_nothing_is_left(self) -> None:
        """Once all is done nothing is looked at any more."""
        zygote, workers = self.start_whole()
        stopped = self.stop()
        for worker in workers:
            worker.leave()
        zygote.end()
        self.successResultOf(stopped)
        self.machine.advance(3600)
        self.machine.advance(3600)
        self.assertEqual(self.machine.getDelayedCalls(), [])
