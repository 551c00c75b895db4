"""The gateway's supervisor: its port, its processes, reloads and the stop."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import digest_of
from taskd.errors import StartFailed
from taskd.gateway.figures import Figures
from taskd.gateway.secrets import Secrets
from taskd.gateway.settings import GatewaySettings
from taskd.gateway.supervisor import GatewaySupervisor
from tests.support import Loop, log_of, temporary_directory, write_secret
from tests.test_tls import AUTHORITY, COMMON, DAY, NOW, PAIR, issued, pair_of

TOKEN = "a caller's token 0123"
NEXT = "another caller's token 0"
KILLED = int(signal.SIGKILL)


class FakeProcess:
    """
    A process of the gateway's, played by the test.

    Attributes:
        told: The lines that it was told.
        pipes: Those to it that are open.
        signals: The signals that it was sent.
        is_gone: Whether it has ended.
    """

    def __init__(self, machine: Machine, protocol: Any, pid: int, **spawned: Any) -> None:
        self._machine = machine
        self._protocol = protocol
        self.pid: int | None = pid
        self.spawned = spawned
        self.told: list[bytes] = []
        self.signals: list[str] = []
        self.pipes: dict[int, Any] = {0: None, 1: None, 2: None}
        self.is_gone = False
        fds = spawned["childFDs"]
        self.figures = Figures(fds[3])
        self.listening = os.fstat(fds[4]).st_ino

    # What Twisted gives.

    def writeToChild(self, fd: int, data: bytes) -> None:
        assert fd in self.pipes
        self.told += data.splitlines()

    def signalProcess(self, name: str) -> None:
        self.signals.append(name)

    # What it does.

    @property
    def spec(self) -> Any:
        return json.loads(self.told[0])

    @property
    def number(self) -> int:
        return int(self.spec["number"])

    @property
    def is_draining(self) -> bool:
        return b"drain" in self.told[1:]

    def print(self, data: bytes, fd: int = 1) -> None:
        self._protocol.childDataReceived(fd, data)

    def ready(self) -> None:
        self.print(b"ready\n")

    def end(self, status: int = 0) -> None:
        self.is_gone = True
        self.pid = None
        reason = ProcessTerminated(status=status) if status else ProcessDone(0)
        self._protocol.processEnded(Failure(reason))


class Machine(Loop):
    """
    What the gateway lives on.

    Attributes:
        spawned: Every process so far.
        spawn_errors: What the next spawnings fail with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spawned: list[FakeProcess] = []
        self.spawn_errors: list[OSError] = []

    def spawnProcess(
        self, protocol: Any, executable: str, args: Any, **spawned: Any
    ) -> FakeProcess:
        if self.spawn_errors:
            raise self.spawn_errors.pop()
        process = FakeProcess(self, protocol, 100 + len(self.spawned), args=args, **spawned)
        self.spawned.append(process)
        return process

    @property
    def alive(self) -> list[FakeProcess]:
        return [process for process in self.spawned if not process.is_gone]

    @property
    def staying(self) -> list[FakeProcess]:
        return [process for process in self.alive if not process.is_draining]


class SupervisorTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.log = log_of(self, "gateway")
        self.machine = Machine()
        self.said: list[bytes] = []
        self.handlers: dict[int, Callable[..., None]] = {}

    def make(self, **settings: Any) -> GatewaySupervisor:
        self.gateway = GatewaySupervisor(
            GatewaySettings(**{"port": 0, "grace_seconds": 10.0, **settings}),
            self.machine,
            self.said.append,
            self.handlers.__setitem__,
        )
        self.addCleanup(self._close)
        return self.gateway

    def _close(self) -> None:
        if self.gateway._socket is not None:
            self.gateway._socket.close()
        fd = self.gateway.__dict__.pop("_figures_fd", None)
        if fd is not None:
            os.close(fd)

    def start(self, **settings: Any) -> list[FakeProcess]:
        self.make(**settings).privilegedStartService()
        self.gateway.startService()
        return self.machine.spawned

    def serving(self, **settings: Any) -> list[FakeProcess]:
        """Start, and have all processes ready and grown up."""
        for process in self.start(**settings):
            process.ready()
        self.machine.advance(60)
        return list(self.machine.spawned)

    def signal(self, number: int) -> None:
        self.handlers[number](number, None)
        self.machine.run_waiting()

    def reload(self) -> None:
        self.signal(signal.SIGHUP)

    def file(self, name: str, text: str) -> str:
        path = Path(self.directory, name)
        write_secret(path, text)
        return str(path)

    def port(self) -> int:
        assert self.gateway._socket is not None
        return int(self.gateway._socket.getsockname()[1])

    def not_started(self, **settings: Any) -> str:
        self.make(**settings)
        with self.assertRaises(StartFailed) as caught:
            self.gateway.privilegedStartService()
        return str(caught.exception)


class StartTests(SupervisorTestCase):
    def test_the_processes(self) -> None:
        """Each gets the port, the figures, and by its input what it is to be."""
        path = self.file("tokens", f"web:{TOKEN}")
        processes = self.start(procs=3, token_file=path)
        self.assertEqual([process.number for process in processes], [1, 2, 3])
        assert self.gateway._socket is not None
        listening = os.fstat(self.gateway._socket.fileno()).st_ino
        for process in processes:
            self.assertEqual(process.listening, listening)
            self.assertEqual(GatewaySettings.from_json(process.spec["settings"]).token_file, path)
            secrets = Secrets.from_json(process.spec["secrets"])
            self.assertEqual(secrets.tokens, (("web", digest_of(TOKEN)),))
            self.assertNotIn(digest_of(TOKEN), str(process.spawned["args"]))
            self.assertEqual(set(process.spawned["childFDs"]), {0, 1, 2, 3, 4})
        self.assertEqual(len({process.spec["row"] for process in processes}), 3)

    def test_the_environment(self) -> None:
        """What is the supervisor's own is not in theirs."""
        os.environ["NOTIFY_SOCKET"] = "/nowhere"
        os.environ["A_VARIABLE"] = "1"
        self.addCleanup(os.environ.pop, "NOTIFY_SOCKET", None)
        self.addCleanup(os.environ.pop, "A_VARIABLE", None)
        (process,) = self.start()
        self.assertNotIn("NOTIFY_SOCKET", process.spawned["env"])
        self.assertEqual(process.spawned["env"]["A_VARIABLE"], "1")

    def test_ready(self) -> None:
        """It is ready, once, when the first process is; and the log says where it listens."""
        first, second = self.start(procs=2)
        self.assertEqual((self.said, self.log), ([], []))
        second.ready()
        first.ready()
        self.assertEqual(self.said, [b"READY=1"])
        where = f"127.0.0.1 port {self.port()}"
        self.assertEqual(self.log, [f"info: listening on {where}, for tcp:127.0.0.1:12345"])

    def test_they_share_figures(self) -> None:
        """What one counts the supervisor, and so every other, sees."""
        first, second = self.start(procs=2)
        first.figures.add("messages", 3)
        self.assertEqual(second.figures.totals()["messages"], 3)

    def test_a_port_that_is_taken(self) -> None:
        """A port that cannot be had ends the start, in one line."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            told = self.not_started(port=taken.getsockname()[1])
        self.assertNotIn("\n", told)
        self.assertEqual(self.machine.spawned, [])

    def test_no_process(self) -> None:
        """If none can be spawned the start has failed."""
        self.make().privilegedStartService()
        self.machine.spawn_errors = [OSError(11, "Resource temporarily unavailable")]
        with self.assertRaises(StartFailed) as caught:
            self.gateway.startService()
        self.assertIn("Resource temporarily unavailable", str(caught.exception))

    def test_without_a_port(self) -> None:
        """Who starts it without opening its port is told so."""
        with self.assertRaises(StartFailed):
            self.make().startService()

    def test_files(self) -> None:
        """A file that cannot be used, or a description of no endpoint, ends the start."""
        self.assertIn("--token-file", self.not_started(token_file="/nowhere"))
        self.assertIn("--tasks nonsense", self.not_started(tasks=("nonsense",)))
        self.assertIn("--tasks tcp:a", self.not_started(tasks=("tcp:a",)))

    def test_certificates(self) -> None:
        """That TLS is spoken is told, and that a certificate has expired."""
        expired = pair_of(*issued(AUTHORITY, (COMMON, "tasks.example"), expires=NOW - DAY))
        for pair, warnings in ((PAIR, 0), (expired, 1)):
            self.machine = Machine()
            self.log.clear()
            (process,) = self.start(
                certificate=self.file("cert.pem", pair.certificate),
                key=self.file("key.pem", pair.key),
            )
            process.ready()
            self.assertIn("(TLS)", self.log[-1])
            self.assertEqual(len(self.log), 1 + warnings)
            if warnings:
                self.assertIn("the certificate has expired", self.log[0])
            self._close()


class ExposedTests(SupervisorTestCase):
    def test_what_others_can_reach(self) -> None:
        """Where other machines can call it does not start, unless they are asked who they are."""
        path = self.file("tokens", f"web:{TOKEN}")
        for settings, option in (
            ({}, "--token-file"),
            ({"dashboard": False}, "--token-file"),
            ({"token_file": path}, "--dashboard-token"),
            ({"token_file": path, "dashboard": False}, "--dashboard-token"),
            ({"dashboard_token_file": path}, "--token-file"),
        ):
            told = self.not_started(interface="0.0.0.0", **settings)
            self.assertIn(option, told)
            self.assertIn("--insecure", told)
            self.assertEqual(self.log, [])

    def test_what_is_safe(self) -> None:
        """With tokens for both it starts; without TLS that is told."""
        path = self.file("tokens", f"web:{TOKEN}")
        for has_page in (True, False):
            self.log.clear()
            self.make(
                interface="0.0.0.0",
                token_file=path,
                dashboard_token_file=path,
                dashboard=has_page,
            ).privilegedStartService()
            (line,) = self.log
            self.assertIn("speaks no TLS", line)
            self._close()

    def test_insecure(self) -> None:
        """Who says that this is meant is warned."""
        self.make(interface="0.0.0.0", insecure=True).privilegedStartService()
        self.assertTrue(self.log[0].startswith("warn: --insecure: "), self.log)

    def test_loopback(self) -> None:
        """On loopback nobody is warned of anything."""
        self.make().privilegedStartService()
        self.assertEqual(self.log, [])


class DeathTests(SupervisorTestCase):
    def test_it_is_replaced(self) -> None:
        """A process that dies is replaced at once, in its place, and its open figures go."""
        first, second = self.serving(procs=2)
        row = first.spec["row"]
        Figures(first.spawned["childFDs"][3], row).add("websockets", 5)
        first.end(KILLED)
        self.assertEqual(second.figures.totals()["websockets"], 0)
        self.machine.advance(0)
        third = self.machine.spawned[2]
        self.assertEqual((third.number, third.spec["row"]), (1, row))
        self.assertIn("process 1 (pid 100) was killed by SIGKILL", self.log[-1])
        self.assertFalse(second.is_draining)

    def test_those_that_die_young(self) -> None:
        """Those that die young are replaced ever later, and others are not touched."""
        self.start(procs=2)
        delays = []
        for _ in range(5):
            self.machine.alive[-1].end(KILLED)
            began, count = self.machine.seconds(), len(self.machine.spawned)
            while len(self.machine.spawned) == count:
                self.machine.advance(0.05)
            delays.append(self.machine.seconds() - began)
        self.assertEqual(delays, sorted(delays))
        self.assertGreater(delays[-1], 4 * delays[0])
        self.assertEqual([process.number for process in self.machine.alive], [1, 2])

    def test_no_process_can_be_spawned(self) -> None:
        """If none can be spawned it is tried again."""
        (first,) = self.serving()
        self.machine.spawn_errors = [OSError(12, "Cannot allocate memory")] * 2
        first.end(KILLED)
        self.machine.advance(0)
        self.assertIn("Cannot allocate memory", self.log[-1])
        self.machine.pump([0.5] * 20)
        self.assertEqual(len(self.machine.alive), 1)

    def test_one_that_never_serves(self) -> None:
        """A process that does not serve within a minute is killed; one that does is not."""
        first, second = self.start(procs=2)
        second.ready()
        self.machine.advance(59)
        self.assertEqual(first.signals, [])
        self.machine.advance(2)
        self.assertEqual((first.signals, second.signals), (["KILL"], []))
        self.assertIn("process 1 does not begin", self.log[-1])

    def test_one_that_is_just_dying(self) -> None:
        """A process whose input has ended is told nothing more, and nothing breaks."""
        (first,) = self.serving()
        del first.pipes[0]
        stopped = self.gateway.stopService()
        first.end(KILLED)
        self.successResultOf(stopped)

    def test_its_output(self) -> None:
        """What it prints is logged, line by line, in whatever pieces it comes."""
        (first,) = self.serving()
        self.log.clear()
        first.print(b"a warn", 2)
        first.print(b"ing\nand \xff\n\n", 2)
        first.print(b"an answer\n")
        self.assertEqual(
            self.log,
            [
                "warn: process 1: a warning",
                "warn: process 1: and \\xff",
                "warn: process 1: an answer",
            ],
        )

    def test_a_line_without_an_end(self) -> None:
        """A line without an end is logged at a megabyte, and not kept for ever."""
        (first,) = self.serving()
        self.log.clear()
        for _ in range(5):
            first.print(b"x" * 2**19, 2)
        self.assertEqual(len(self.log), 1)


class ReloadTests(SupervisorTestCase):
    def test_successors(self) -> None:
        """Each process gets a successor, and goes when that serves."""
        old = self.serving(procs=2)
        self.reload()
        new = self.machine.spawned[2:]
        self.assertEqual([process.number for process in new], [1, 2])
        self.assertFalse(any(process.is_draining for process in old))
        new[1].ready()
        self.assertEqual([process.is_draining for process in old], [False, True])
        new[0].ready()
        self.assertTrue(all(process.is_draining for process in old))
        for process in old:
            process.end()
        self.machine.advance(60)
        self.assertEqual(self.machine.alive, new)
        self.assertEqual(self.said, [b"READY=1"])

    def test_tokens(self) -> None:
        """Successors have tokens that were read anew."""
        path = self.file("tokens", f"web:{TOKEN}")
        self.serving(token_file=path)
        self.file("tokens", f"web:{NEXT}")
        self.reload()
        secrets = Secrets.from_json(self.machine.spawned[1].spec["secrets"])
        self.assertEqual(secrets.tokens, (("web", digest_of(NEXT)),))
        self.machine.spawned[1].end(KILLED)
        self.machine.spawned[0].end(KILLED)
        self.machine.advance(10)
        secrets = Secrets.from_json(self.machine.spawned[2].spec["secrets"])
        self.assertEqual(secrets.tokens, (("web", digest_of(NEXT)),))

    def test_a_file_that_cannot_be_read(self) -> None:
        """If a file cannot be used all stays as it was, and the log says why."""
        path = self.file("tokens", f"web:{TOKEN}")
        self.serving(token_file=path)
        os.unlink(path)
        self.reload()
        self.assertEqual(len(self.machine.spawned), 1)
        self.assertIn("error: no reload, all stays as it was: --token-file", self.log[-1])

    def test_a_successor_that_dies(self) -> None:
        """If a successor dies before it serves its predecessor goes on."""
        (old,) = self.serving()
        self.reload()
        self.machine.spawned[1].end(KILLED)
        self.assertEqual((self.machine.alive, old.is_draining), ([old], False))
        self.assertIn("was killed by SIGKILL", self.log[-1])
        self.assertIn("the earlier one serves on", self.log[-1])

    def test_it_is_tried_again(self) -> None:
        """Then it is tried again some seconds later, until one serves."""
        (old,) = self.serving()
        self.reload()
        for count in (2, 3, 4):
            self.machine.spawned[-1].end(KILLED)
            self.machine.advance(4.9)
            self.assertEqual(len(self.machine.spawned), count)
            self.machine.advance(60)
            self.assertEqual(len(self.machine.spawned), count + 1)
            self.assertFalse(old.is_draining)
        self.machine.spawned[-1].ready()
        self.assertTrue(old.is_draining)
        old.end()
        self.machine.advance(60)
        self.assertEqual(self.machine.alive, self.machine.spawned[-1:])

    def test_another_reload_meanwhile(self) -> None:
        """It is not tried again if another reload has done it by then."""
        self.serving()
        self.reload()
        self.machine.spawned[1].end(KILLED)
        self.reload()
        self.machine.advance(30)
        self.assertEqual(len(self.machine.spawned), 3)

    def test_a_successor_that_dies_later(self) -> None:
        """If one dies while its predecessor still drains it is replaced all the same."""
        (old,) = self.serving()
        self.reload()
        self.machine.spawned[1].ready()
        self.machine.spawned[1].end(KILLED)
        self.machine.advance(5)
        self.assertEqual(len(self.machine.staying), 1)
        old.end()
        self.machine.advance(60)
        self.assertEqual(len(self.machine.staying), 1)

    def test_a_predecessor_that_dies(self) -> None:
        """If a predecessor dies before its successor serves nobody else is spawned."""
        (old,) = self.serving()
        self.reload()
        old.end(KILLED)
        self.assertFalse([line for line in self.log if "serves on" in line])
        self.machine.spawned[1].ready()
        self.machine.advance(60)
        self.assertEqual(self.machine.alive, self.machine.spawned[1:])
        self.assertEqual(len(self.machine.spawned), 2)

    def test_two_in_a_row(self) -> None:
        """Of two reloads in a row the later one's processes stay, whoever serves first."""
        for order in ((1, 2), (2, 1)):
            self.machine = Machine()
            self.serving()
            self.reload()
            self.reload()
            for number in order:
                self.machine.spawned[number].ready()
            draining = [process.is_draining for process in self.machine.spawned]
            self.assertEqual(draining, [True, True, False])
            self._close()

    def test_too_many(self) -> None:
        """While processes of three generations are there no more are made."""
        self.serving(procs=2)
        for _ in range(6):
            self.reload()
            for process in self.machine.spawned[-2:]:
                process.ready()
        self.assertEqual(len(self.machine.spawned), 8)
        self.assertIn("no reload", self.log[-1])
        rows = [process.spec["row"] for process in self.machine.alive]
        self.assertEqual(sorted(rows), list(range(8)))
        for process in self.machine.spawned[:6]:
            process.end()
        self.reload()
        self.assertEqual(len(self.machine.spawned), 10)


class StopTests(SupervisorTestCase):
    def test_a_stop(self) -> None:
        """At a stop all are told to go, the port is closed, and it is over with the last."""
        first, second = self.serving(procs=2)
        port = self.port()
        stopped = self.gateway.stopService()
        self.assertEqual(self.said[-1], b"STOPPING=1")
        self.assertTrue(first.is_draining and second.is_draining)
        first.end()
        self.assertNoResult(stopped)
        second.end(KILLED)
        self.successResultOf(stopped)
        self.assertEqual(self.machine.getDelayedCalls(), [])
        self.assertEqual(len(self.machine.spawned), 2)
        with socket.socket() as client:
            self.assertNotEqual(client.connect_ex(("127.0.0.1", port)), 0)

    def test_the_grace(self) -> None:
        """Who has not gone some seconds after the grace is killed."""
        (first,) = self.serving()
        stopped = self.gateway.stopService()
        self.machine.advance(14.9)
        self.assertEqual(first.signals, [])
        self.machine.advance(0.2)
        self.assertEqual(first.signals, ["KILL"])
        first.end(KILLED)
        self.successResultOf(stopped)

    def test_in_a_hurry(self) -> None:
        """A second signal kills them at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.machine = Machine()
            (first,) = self.serving()
            stopped = self.gateway.stopService()
            self.signal(number)
            self.assertEqual(first.signals, ["KILL"])
            first.end(KILLED)
            self.successResultOf(stopped)

    def test_nothing_more_is_spawned(self) -> None:
        """At a stop no dead process is replaced, and no reload begins."""
        first, second = self.start(procs=2)
        first.end(KILLED)
        stopped = self.gateway.stopService()
        self.reload()
        self.machine.advance(5)
        second.end()
        self.successResultOf(stopped)
        self.machine.advance(60)
        self.assertEqual(len(self.machine.spawned), 2)

    def test_before_it_has_started(self) -> None:
        """Without a process it is over at once."""
        self.make().privilegedStartService()
        self.successResultOf(self.gateway.stopService())
        self.assertEqual(self.machine.getDelayedCalls(), [])

    def test_a_reload_that_is_under_way(self) -> None:
        """All generations are told to go, each once."""
        self.serving()
        self.reload()
        stopped = self.gateway.stopService()
        for process in self.machine.spawned:
            self.assertEqual(process.told.count(b"drain"), 1)
            process.end()
        self.successResultOf(stopped)


class ScheduleTests(SupervisorTestCase):
    @examples(max_examples=50, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.sampled_from(["ready", "die", "leave"]), st.integers(0, 9)),
                st.tuples(st.just("wait"), st.floats(0, 40)),
                st.tuples(st.just("reload"), st.just(0)),
            ),
            max_size=30,
        )
    )
    def test_whatever_happens(self, steps: list[tuple[str, Any]]) -> None:
        """Whatever dies, and however often it is reloaded: in the end each place is taken."""
        self.machine = Machine()
        self.serving(procs=2)
        for name, which in steps:
            alive = self.machine.alive
            process = alive[which % len(alive)] if alive and isinstance(which, int) else None
            if name == "wait":
                self.machine.advance(which)
            elif name == "reload":
                self.reload()
            elif process is not None and name == "ready":
                process.ready()
            elif process is not None and name == "die":
                process.end(KILLED)
            elif process is not None and process.is_draining:
                process.end()
            rows = [each.spec["row"] for each in self.machine.alive]
            self.assertEqual(len(rows), len(set(rows)))
            self.assertLessEqual(len(rows), 8)
        for _ in range(4):
            self.machine.advance(31)
            for process in list(self.machine.alive):
                process.ready()
                if process.is_draining:
                    process.end()
        self.assertEqual(sorted(process.number for process in self.machine.staying), [1, 2])
        self._close()
