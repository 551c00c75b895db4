"""The supervisor's decisions, with a zygote and workers that the test plays."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.process import reapAllProcesses
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import StartFailed
from taskd.process import Title
from taskd.scoreboard import Scoreboard, Slot
from taskd.settings import Settings
from taskd.supervisor import Supervisor, bind
from taskd.zygote import CONTROL_FD, LISTENING_FD, SCOREBOARD_FD
from tests.support import MemoryTransport

_PR_SET_CHILD_SUBREAPER = 36

GRACE = 30.0
KILLED = int(signal.SIGKILL)


def exited(status: int) -> int:
    """Give the wait status of a process that has exited."""
    return status << 8


class BindTests(SynchronousTestCase):
    def bound(self, interface: str, port: int = 0) -> socket.socket:
        listening = bind(interface, port)
        self.addCleanup(listening.close)
        return listening

    def refused(self, interface: str, port: int = 0) -> str:
        with self.assertRaises(StartFailed) as caught:
            bind(interface, port)
        return str(caught.exception)

    def test_it_listens(self) -> None:
        """What is bound takes connections, does not block, and sends replies undelayed."""
        listening = self.bound("127.0.0.1")
        self.assertFalse(listening.getblocking())
        with socket.create_connection(listening.getsockname()):
            connection, _ = listening.accept()
        with connection:
            self.assertTrue(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_names_and_families(self) -> None:
        """A name is as good as an address, and IPv6 as IPv4."""
        self.assertEqual(self.bound("::1").family, socket.AF_INET6)
        self.assertIn(self.bound("localhost").getsockname()[0], ("127.0.0.1", "::1"))

    def test_a_port_that_is_taken(self) -> None:
        """A port that another process listens on is refused, and the message says so."""
        port = self.bound("127.0.0.1").getsockname()[1]
        self.assertEqual(
            self.refused("127.0.0.1", port),
            f"cannot listen on 127.0.0.1 port {port}: another process listens there",
        )

    def test_an_address_of_another_machine(self) -> None:
        """An address that this machine has not is refused, and the message says so."""
        self.assertIn("this machine has no such address", self.refused("192.0.2.1"))

    def test_a_name_that_is_none(self) -> None:
        """An interface that cannot be resolved is refused by its option."""
        for interface in ("fe80::1%nosuch", "a..b", "x" * 70):
            self.assertIn("--interface", self.refused(interface))


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

    def take_link(self, link: Any) -> bool:
        """Take the first link that is made as the zygote's own; tell whether it was."""
        if self._link is None:
            self._link = link
        return self._link is link

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
        return FakeWorker(self, number, self._machine.last_pid, self._machine.links[-1])

    def end(self, status: int = 0) -> None:
        """End the process."""
        reason = ProcessTerminated(status=status) if status else ProcessDone(0)
        self._protocol.processExited(Failure(reason))
        self._protocol.processEnded(Failure(reason))


class FakeWorker:
    """
    A worker, played by the test.

    Attributes:
        pid: Its process id.
        slot: Its slot on the scoreboard.
    """

    def __init__(self, zygote: FakeZygote, number: int, pid: int, link: Any) -> None:
        self._zygote = zygote
        self._link = link
        self.pid = pid
        self.slot: Slot = zygote.scoreboard.slot(number)

    @property
    def orders(self) -> list[Any]:
        return self._link.transport.messages

    def become_ready(self) -> FakeWorker:
        self._link.dataReceived(b'{"ready": true}\n')
        return self

    def lose_link(self) -> None:
        self._link.connectionLost(Failure(ConnectionDone()))

    def exit(self, status: int = 0) -> None:
        """End, and have it told by the zygote."""
        self._zygote.say(exited=self.pid, status=status)

    def die(self, status: int = KILLED) -> None:
        """Lose the link and end."""
        self.lose_link()
        self.exit(status)


class Machine(Clock):
    """
    A reactor whose processes are played by the test.

    Attributes:
        zygotes: Every zygote that was spawned.
        links: Every worker's connection.
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
        self.links: list[Any] = []
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

    def adoptStreamConnection(self, fd: int, family: int, factory: Any) -> None:
        link = factory.buildProtocol(None)
        link.makeConnection(MemoryTransport())
        if not self.zygotes[-1].take_link(link):
            self.links.append(link)

    def end_dismissed(self) -> None:
        """Let every zygote end whose connection was closed, as a real one does."""
        for zygote in self.zygotes:
            if zygote.is_dismissed:
                zygote.end()


class SupervisorTestCase(SynchronousTestCase):
    procs = 2

    def setUp(self) -> None:
        self._keep_this_process_as_it_is()
        self.machine = Machine()
        settings = Settings(port=0, procs=self.procs, grace_seconds=GRACE)
        self.supervisor = Supervisor(settings, self.machine, clock=self.machine.seconds)
        self.addCleanup(self._close)

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
        if self.supervisor.running:
            self.supervisor.stopService()
        reapAllProcesses()
        for zygote in self.machine.zygotes:
            zygote.close()
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
        self.assertEqual(first.slot.status(0.0)["restarts"], 1)
        self.assertEqual(first.slot.status(0.0)["state"], "dead")

    def test_one_that_is_reaped_first(self) -> None:
        """A worker whose death is told before its link ends is replaced once."""
        zygote, (first, _) = self.start_whole()
        first.exit(KILLED)
        first.lose_link()
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        self.assertEqual(first.slot.status(0.0)["restarts"], 1)

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
        worker.slot.begin(b"x" * 128, 1.0)
        worker.die()
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


class ZygoteTests(SupervisorTestCase):
    procs = 1

    def load_next(self) -> FakeZygote:
        """Have the latest zygote say that it has loaded."""
        zygote = self.machine.zygotes[-1]
        zygote.say(loaded=True)
        return zygote

    def test_one_that_has_served(self) -> None:
        """A zygote that dies after it has served for a while is replaced at once."""
        zygote = self.start()
        self.machine.advance(60)
        zygote.end(KILLED)
        self.machine.advance(0)
        self.assertEqual(len(self.machine.zygotes), 2)

    def test_one_that_dies_young(self) -> None:
        """Zygotes that die at their start are replaced ever later."""
        self.start()
        for number, delay in enumerate((0.1, 0.2, 0.4), 2):
            self.machine.zygotes[-1].end(exited(1))
            self.machine.advance(delay - 0.01)
            self.assertEqual(len(self.machine.zygotes), number - 1)
            self.machine.advance(0.02)
            self.assertEqual(len(self.machine.zygotes), number)

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

    def test_one_that_cannot_load(self) -> None:
        """A new zygote that cannot import the tasks is not the last one."""
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


class StopTests(SupervisorTestCase):
    def stop(self) -> Deferred[None]:
        return self.supervisor.stopService()

    def test_a_stop(self) -> None:
        """Workers are told to finish; when the last has gone the zygote goes, and all is done."""
        zygote, workers = self.start_whole()
        stopped = self.stop()
        for worker in workers:
            self.assertEqual(worker.orders, [{"drain": True}])
            self.assertFalse(zygote.is_dismissed)
            worker.die(exited(0))
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

    def test_a_worker_that_does_not_go(self) -> None:
        """A worker that is not done when the grace is over, and a moment more, is killed."""
        zygote, (first, second) = self.start_whole()
        self.stop()
        first.die(exited(0))
        self.machine.advance(GRACE)
        self.assertEqual(zygote.orders, [{"unlisten": True}])
        self.machine.advance(2)
        self.assertEqual(zygote.orders, [{"kill": second.pid, "signal": KILLED}])

    def test_a_worker_that_comes_late(self) -> None:
        """A worker whose fork is told during the stop is told to go."""
        zygote = self.start()
        stopped = self.stop()
        worker = zygote.fork(1)
        self.assertEqual(worker.orders, [{"drain": True}])
        worker.die(exited(0))
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
            worker.die(exited(0))
        zygote.end()
        self.successResultOf(stopped)

    def test_nothing_is_replaced(self) -> None:
        """What dies during the stop, or has died before it, is not replaced."""
        zygote, (first, second) = self.start_whole()
        first.die()
        young = zygote.fork(1)
        self.assertEqual(zygote.orders, [{"fork": [1]}])
        young.die(exited(1))
        self.stop()
        second.die()
        zygote.end(KILLED)
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
            worker.die(exited(0))
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
