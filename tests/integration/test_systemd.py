"""
A daemon under a service manager: what it tells, its watchdog, its socket, its unit.

First with a manager that the test plays, then with systemd's own programs, and in
the end with a whole systemd, where one can be booted (``manager.why_not``).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import trustme
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.integration.case import DaemonTestCase
from tests.integration.daemon import (
    CHECKOUT,
    TWISTD,
    WAIT_SECONDS,
    Connection,
    Daemon,
    temporary_directory,
    wait_until,
)
from tests.integration.manager import Manager, why_not

WATCHDOG_SECONDS: Final = 2.0
HIGHEST_EXPOSURE: Final = 1.0
HIGHEST_GATEWAY_EXPOSURE: Final = 1.1
"""It raises its limit of open files, for which it needs @resources."""
LOADING_THREADS: Final = 4
OWN_TASK: Final = "from taskd import task\n@task\ndef own(): pass\n"
SLOW_TASKS: Final = """
import os, time
from taskd import task
@task
def own(): pass
if os.path.exists("rehearsed"):  # by the zygote; this is the worker
    while not os.path.exists("go"):
        time.sleep(0.01)
open("rehearsed", "w").close()
"""
PORT: Final = 12345
TOKEN: Final = "0123456789abcdef0123456789abcdef"
SERVED: Final = "served"
TOLD_TO_COME_AGAIN: Final = "shutting-down"
"""The answer, which nobody loses, to who was accepted just before the stop and asked just after."""

UNITS: Final = CHECKOUT / "etc"
VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID")


class Listener:
    """
    A service manager's end of the notification socket.

    Attributes:
        heard: Every message so far, and when it was read.
    """

    def __init__(self, test: SynchronousTestCase, address: str = "") -> None:
        self.address = address or str(temporary_directory(test) / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address.replace("@", "\0", 1))
        test.addCleanup(self._socket.close)
        self.heard: list[tuple[float, dict[str, str]]] = []

    def listen(self) -> list[dict[str, str]]:
        """Read what has come, and give all messages so far."""
        while True:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT).decode()
            except BlockingIOError:
                return [message for _, message in self.heard]
            message = dict(line.split("=", 1) for line in data.splitlines())
            self.heard.append((time.monotonic(), message))

    def events(self) -> list[str]:
        """Give the names of what was told, but for figures and signs of life."""
        names = ("READY", "RELOADING", "STOPPING")
        return [name for message in self.listen() for name in names if name in message]

    def wait_for(self, name: str, nth: int = 1, pattern: str = "") -> dict[str, str]:
        """Wait for the nth message that has a member like that, and give it."""

        def found() -> dict[str, str] | None:
            fit = [m for m in self.listen() if name in m and re.search(pattern, m[name])]
            return fit[nth - 1] if len(fit) >= nth else None

        return wait_until(found, what=f"{name}={pattern}, number {nth}") or {}

    def feedings(self) -> list[float]:
        """Tell when the watchdog was fed."""
        self.listen()
        return [when for when, message in self.heard if message.get("WATCHDOG") == "1"]

    def wait_for_feedings(self, count: int) -> list[float]:
        """Wait until the watchdog is fed so often from now on, and tell when that was."""
        before = len(self.feedings())
        wait_until(lambda: len(self.feedings()) >= before + count, what=f"{count} feedings")
        return self.feedings()[before:]

    def wait_for_silence(self, seconds: float) -> None:
        """Wait until the watchdog has not been fed for so long."""
        began = time.monotonic()
        wait_until(
            lambda: time.monotonic() - max(began, *self.feedings()) > seconds, what="no feeding"
        )


class NotifyTests(DaemonTestCase):
    """What a daemon tells a service manager, which the test plays."""

    def setUp(self) -> None:
        self.manager = Listener(self)

    def environ(self, **more: str) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.manager.address, **more}

    def start_told(self, *options: str, **more: Any) -> Daemon:
        """Start a daemon that has a manager."""
        return self.start(*options, **{"environ": self.environ(), **more})

    def test_a_start(self) -> None:
        """It tells what it does, and is ready when the first worker accepts, not before."""
        daemon = Daemon(
            "--no-preload", tasks="slow.py", files={"slow.py": SLOW_TASKS}, environ=self.environ()
        )
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        self.manager.wait_for("STATUS", pattern="^starting: the task modules are imported$")
        self.manager.wait_for("STATUS", pattern="^starting: . workers?: .*0 idle, 0 busy")
        self.assertEqual(self.manager.events(), [])
        (daemon.directory / "go").touch()
        self.manager.wait_for("READY")
        self.manager.wait_for("STATUS", pattern="^1 worker: 1 idle, 0 busy; 0 tasks wait; ")
        self.assertEqual(self.manager.events(), ["READY"])

    def test_figures(self) -> None:
        """The status has what workers do, what waits, and what has ended and how."""
        daemon = self.start_told(procs=1)
        told = self.manager.wait_for("STATUS", pattern="^1 worker: .*[1-9] done, 0 failed$")
        done = int(re.findall(r"(\d+) done", told["STATUS"])[0])  # whoever asks how it is counts
        connection = self.connect(daemon)
        connection.ask("fail", ["on purpose"])
        self.manager.wait_for("STATUS", pattern="^1 worker: 1 idle, 0 busy; .* done, 1 failed$")
        path = self.begin(daemon, connection, "hold")
        connection.request("add", [1, 2])
        self.manager.wait_for("STATUS", pattern="^1 worker: 0 idle, 1 busy; 1 task waits; ")
        Path(path).touch()
        last = f"^1 worker: 1 idle, 0 busy; 0 tasks wait; {done + 2} done, 1 failed$"
        self.manager.wait_for("STATUS", pattern=last)

    def test_a_reload(self) -> None:
        """A reload begins at SIGHUP and is over when no old worker is left to be replaced."""
        daemon = self.start_told()
        before = daemon.workers()
        self.manager.wait_for("READY")
        earliest = time.monotonic()
        daemon.signal(signal.SIGHUP)
        told = self.manager.wait_for("RELOADING")
        self.assertTrue(earliest <= int(told["MONOTONIC_USEC"]) / 1e6 <= time.monotonic())
        self.manager.wait_for("READY", 2)
        self.assertEqual(set(daemon.serving().values()) & set(before.values()), set())
        self.assertEqual(self.manager.events(), ["READY", "RELOADING", "READY"])

    def test_a_reload_that_fails(self) -> None:
        """A reload whose code cannot be imported is over, and the status says why."""
        daemon = self.start_told(tasks="own.py", files={"own.py": OWN_TASK})
        self.manager.wait_for("READY")
        (daemon.directory / "own.py").write_text("import nowhere_to_be_found\n")
        daemon.signal(signal.SIGHUP)
        told = self.manager.wait_for("READY", 2)
        self.assertRegex(told["STATUS"], "old code serves on: .*nowhere_to_be_found")
        (daemon.directory / "own.py").write_text(OWN_TASK)
        daemon.signal(signal.SIGHUP)
        self.assertNotIn("failed,", self.manager.wait_for("READY", 3)["STATUS"])
        self.assertEqual(self.manager.events(), ["READY", *("RELOADING", "READY") * 2])

    def test_a_stop(self) -> None:
        """A stop asks for the time that its tasks may take, and tells how it gets on."""
        daemon = self.start_told("--grace", "100")
        path = self.begin(daemon, self.connect(daemon), "hold")
        daemon.signal(signal.SIGTERM)
        told = self.manager.wait_for("STOPPING")
        self.assertEqual(told["STOPPING"], "1")
        self.assertEqual(int(told["EXTEND_TIMEOUT_USEC"]) / 1e6, 100 + 2 + 2 + 5)
        self.manager.wait_for("STATUS", pattern="^stopping: .* 1 draining")
        daemon.signal(signal.SIGHUP)
        Path(path).touch()
        daemon.wait_until_gone()
        self.assertEqual(self.manager.events(), ["READY", "STOPPING"])
        self.assertTrue(self.has_ended(path))

    def test_tasks_know_nothing_of_it(self) -> None:
        """Neither the environment of a task nor that of its process has what is the daemon's."""
        daemon = self.start_told(
            procs=1,
            environ=self.environ(WATCHDOG_USEC="5000000", LISTEN_FDNAMES="x", TASKD_OTHER="kept"),
        )
        for name in VARIABLES:
            self.assertIsNone(daemon.ask("environment", [name]), name)
        self.assertEqual(daemon.ask("environment", ["TASKD_OTHER"]), "kept")
        for pid in (daemon.zygote, *daemon.workers().values()):
            given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0].decode() for entry in given}
            self.assertEqual(names & {*VARIABLES, "LISTEN_FDNAMES"}, set())
            self.assertIn("TASKD_OTHER", names)

    def test_it_is_taken_from_the_environment(self) -> None:
        """Once the service is made, its process has no such variables any more either."""
        code = (
            "import os; from taskd.tap import Options, makeService; options = Options(); "
            "options.parseOptions(['--port', '0']); makeService(options); print(sorted(os.environ))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=CHECKOUT,
            env={"HOME": "/", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "5", **self.environ()},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=True,
        )
        self.assertIn("'HOME'", done.stdout)
        for name in ("NOTIFY", "WATCHDOG"):
            self.assertNotIn(name, done.stdout)

    def test_an_abstract_address(self) -> None:
        """An address that is on no disk is understood."""
        self.manager = Listener(self, f"@taskd-test-{os.getpid()}")
        self.start_told()
        self.manager.wait_for("READY")

    def test_nobody_listens(self) -> None:
        """A daemon whose manager is not there, or of an unknown kind, serves all the same."""
        for address in ("/nowhere/to/be/found", "/" + 200 * "x", "vsock:1:2", "relative"):
            environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}
            daemon = self.start(procs=1, environ=environ)
            self.assertEqual(daemon.ask("add", [1, 2]), 3)
            daemon.stop()
            self.assertNotIn("Traceback", daemon.errors)

    def test_a_manager_that_reads_late(self) -> None:
        """What a daemon had to say while nobody read is said when somebody does."""
        daemon = Daemon(procs=1, environ=self.environ())
        self.addCleanup(daemon.stop)
        os.rename(self.manager.address, self.manager.address + ".away")
        daemon.start()
        os.rename(self.manager.address + ".away", self.manager.address)
        self.manager.wait_for("READY")


class WatchdogTests(DaemonTestCase):
    """The watchdog of a manager that the test plays."""

    def setUp(self) -> None:
        self.manager = Listener(self)

    def start_watched(self, *options: str, procs: int = 2, **more: str) -> Daemon:
        environ = {
            "NOTIFY_SOCKET": self.manager.address,
            "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6)),
            **more,
        }
        return self.start(*options, procs=procs, environ=environ)

    def assert_fed_in_time(self, feedings: list[float]) -> None:
        """No two feedings lie further apart than systemd waits."""
        gaps = [later - sooner for sooner, later in pairwise(feedings)]
        self.assertLess(max(gaps), WATCHDOG_SECONDS, gaps)

    def freeze(self, daemon: Daemon, *pids: int) -> None:
        for pid in pids:
            daemon.signal(signal.SIGSTOP, pid)

    def test_an_idle_daemon(self) -> None:
        """A daemon that has nothing to do is alive, though its workers sleep."""
        self.start_watched()
        self.assert_fed_in_time(self.manager.wait_for_feedings(6))

    def test_a_worker_that_does_not_answer(self) -> None:
        """One worker of two that does not answer, whichever it is, does not matter."""
        daemon = self.start_watched()
        for pid in daemon.workers().values():
            self.freeze(daemon, pid)
            self.assert_fed_in_time(self.manager.wait_for_feedings(6))
            daemon.signal(signal.SIGCONT, pid)

    def test_no_worker_answers(self) -> None:
        """A pool in which nobody answers is not fed, and is again when somebody does."""
        daemon = self.start_watched()
        self.manager.wait_for_feedings(2)
        pids = daemon.workers().values()
        self.freeze(daemon, *pids)
        self.manager.wait_for_silence(2 * WATCHDOG_SECONDS)
        daemon.signal(signal.SIGCONT, next(iter(pids)))
        self.manager.wait_for_feedings(2)
        for pid in pids:
            daemon.signal(signal.SIGCONT, pid)

    def test_a_task_that_holds_the_lock(self) -> None:
        """A task that keeps its worker from answering does not have the daemon killed."""
        daemon = self.start_watched()
        self.begin(daemon, self.connect(daemon), "hold_lock")
        self.assert_fed_in_time(self.manager.wait_for_feedings(6))
        for pid in daemon.workers().values():
            daemon.kill(pid)

    def test_a_stop(self) -> None:
        """While it stops, it is fed whatever its last worker does."""
        daemon = self.start_watched("--grace", "5", procs=1)
        self.begin(daemon, self.connect(daemon), "hold_lock")
        daemon.signal(signal.SIGTERM)
        self.manager.wait_for("STOPPING")
        self.assert_fed_in_time(self.manager.wait_for_feedings(5))
        daemon.wait_until_gone()

    def test_another_process(self) -> None:
        """A watchdog that is another process's is not fed."""
        daemon = self.start_watched(WATCHDOG_PID="1")
        for number in range(1, 4):
            daemon.ask("fail", ["on purpose"])
            self.manager.wait_for("STATUS", pattern=f"{number} failed")
        self.assertEqual(self.manager.feedings(), [])


def free_port() -> int:
    """Find a TCP port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def program(name: str) -> str:
    """Find a program of systemd's, or skip the test."""
    found = shutil.which(name)
    if found is None:
        raise SkipTest(f"{name} is not installed")
    return found


class Load:
    """
    Callers that connect for one task each, one after the other, until they are told to stop.

    Attributes:
        outcomes: How often which came: ``SERVED``, or an error's code or name.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._stops = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._call) for _ in range(LOADING_THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        for thread in self._threads:
            thread.join()

    @property
    def served(self) -> int:
        """How many were answered so far."""
        return self.outcomes[SERVED]

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more have been answered."""
        before = self.served
        wait_until(lambda: self.served >= before + count, what="callers that are served")

    def _call(self) -> None:
        while not self._stops.is_set():
            try:
                with Connection("127.0.0.1", self._port) as connection:
                    reply = connection.ask("add", [1, 2])
                    is_served = reply == 3
                    outcome = SERVED if is_served else reply["error"]["code"]
            except (OSError, EOFError) as error:
                outcome = type(error).__name__
            self.outcomes[outcome] += 1


class SocketTests(DaemonTestCase):
    """Sockets that somebody else listens on."""

    LISTEN = ("--listen", "systemd:domain=INET:index=0")

    def test_activation(self) -> None:
        """systemd-socket-activate starts the daemon for the first caller, who is served."""
        port = free_port()
        activate = [program("systemd-socket-activate"), "-E", "TASKD_TEST_MARK", "--fdname=taskd"]
        daemon = Daemon(*self.LISTEN, port=None, under=[*activate, "-l", f"127.0.0.1:{port}"])
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        with wait_until(lambda: Connection("127.0.0.1", port), what="a socket") as first:
            self.assertEqual(first.ask("add", [1, 2]), 3)
        daemon.port = port
        daemon.wait_until_whole()
        self.assertEqual(daemon.ask("add", [3, 4]), 7)

    def test_a_restart(self) -> None:
        """Who connects while one daemon goes and the next one comes waits, and is served."""
        listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.addCleanup(listening.close)
        port = listening.getsockname()[1]
        fd = listening.fileno()
        script = f'exec 3<&{fd}; LISTEN_FDS=1 LISTEN_FDNAMES=x LISTEN_PID=$$ exec "$@"'
        under = ["bash", "-c", script, "bash"]
        first, second = (
            Daemon(*self.LISTEN, procs=2, port=None, under=under, fds=[fd]) for _ in range(2)
        )
        for daemon in (first, second):
            self.addCleanup(daemon.stop)
        first.start()
        with Load(port) as load:
            load.wait_for_more(200)
            first.stop()
            second.start()
            load.wait_for_more(200)
        self.assertEqual(set(load.outcomes) - {SERVED, TOLD_TO_COME_AGAIN}, set(), load.outcomes)


class UnitTests(SynchronousTestCase):
    """The unit files, as systemd-analyze judges them."""

    def analyze(self, *words: str) -> str:
        done = subprocess.run(
            [program("systemd-analyze"), "--no-pager", *words],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(done.stderr, "")
        return done.stdout

    def units(self) -> Path:
        """Copy the units, with the drop-in, and a twistd that is there."""
        directory = temporary_directory(self)
        for name in ("taskd.service", "taskd.socket"):
            text = (UNITS / name).read_text(encoding="utf-8")
            (directory / name).write_text(text.replace("/opt/taskd/bin/twistd", str(TWISTD)))
        return directory

    def add_drop_in(self, directory: Path) -> None:
        (directory / "taskd.service.d").mkdir()
        shutil.copy(UNITS / "taskd-socket.conf", directory / "taskd.service.d" / "socket.conf")

    def test_they_are_well_formed(self) -> None:
        """Nothing in the units, alone or together, is unknown or wrong to systemd."""
        directory = self.units()
        self.analyze("verify", str(directory / "taskd.service"))
        self.add_drop_in(directory)
        told = self.analyze(
            "verify", *(str(directory / f"taskd.{n}") for n in ("service", "socket"))
        )
        self.assertEqual(told, "")

    def test_the_sandbox(self) -> None:
        """The exposure that systemd-analyze finds is at most 1.0."""
        told = self.analyze("security", "--offline=true", str(self.units() / "taskd.service"))
        exposure = re.search(r"Overall exposure level for taskd\.service: ([\d.]+)", told)
        self.assertIsNotNone(exposure, told)
        assert exposure is not None
        self.assertLessEqual(float(exposure[1]), HIGHEST_EXPOSURE, told)

    def test_the_gateway(self) -> None:
        """The gateway's unit is well-formed, and its sandbox nearly as narrow as the daemon's."""
        unit = temporary_directory(self) / "taskd-gateway.service"
        text = (UNITS / unit.name).read_text(encoding="utf-8")
        unit.write_text(text.replace("/opt/taskd/bin/twistd", str(TWISTD)))
        self.analyze("verify", str(unit))
        told = self.analyze("security", "--offline=true", str(unit))
        exposure = re.search(r"Overall exposure level for taskd-gateway\.service: ([\d.]+)", told)
        assert exposure is not None, told
        self.assertLessEqual(float(exposure[1]), HIGHEST_GATEWAY_EXPOSURE, told)

    def test_the_time_to_stop(self) -> None:
        """The service gives the daemon longer than the daemon gives its tasks."""
        text = (UNITS / "taskd.service").read_text(encoding="utf-8")
        found = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
        assert found is not None
        self.assertGreater(int(found[1]), 30 + 2 + 2)
        self.assertNotRegex(text, r"(?m)^ExecStart=.*--grace")


class ManagerTests(SynchronousTestCase):
    """The unit under a real systemd, which is booted for it."""

    def boot(self, *lines: str, files: dict[str, str] | None = None, **drop_ins: str) -> Manager:
        """Boot one; *lines* are added to the service."""
        if why_not():
            raise SkipTest(why_not())
        manager = Manager(
            {
                "taskd.service.d/test.conf": "\n".join(["[Service]", *lines, ""]),
                **{f"taskd.service.d/{name}.conf": text for name, text in drop_ins.items()},
            },
            files,
        )
        self.addCleanup(manager.stop)
        self.manager = manager
        return manager

    def wait_for(self, name: str, pattern: str) -> str:
        """Wait until a property of the service is like that."""

        def found() -> str:
            value = self.manager.show(name)
            return value if re.search(pattern, value) else ""

        return wait_until(found, what=f"{name} {pattern}: {self.manager.show(name)}")

    def start(self, unit: str = "taskd.service") -> int:
        """Start a unit, and give the supervisor's pid as systemd calls it."""
        self.assertEqual(self.manager.systemctl("start", unit), "", self.manager.log)
        return int(self.manager.show("MainPID"))

    def test_the_sandboxed_daemon(self) -> None:
        """In its whole sandbox the daemon serves, reloads, and shows its figures."""
        manager = self.boot()
        self.start()
        self.assertEqual(manager.show("ActiveState"), "active")
        self.assertEqual(manager.ask("add", [1, 2]), 3)
        self.wait_for("StatusText", "^32 workers: 32 idle, 0 busy; 0 tasks wait; 1 done, 0 failed$")
        before = {w["pid"] for w in manager.ask("taskd.status")["workers"]}
        self.assertEqual(manager.systemctl("reload", "taskd.service"), "")
        self.wait_for("SubState", "^running$")
        self.wait_for("StatusText", "^32 workers: 3[12] idle")
        wait_until(lambda: not before & {w["pid"] for w in manager.ask("taskd.status")["workers"]})
        titles = " ".join(manager.processes().values())
        self.assertRegex(titles, r"^taskd: supervisor taskd: zygote taskd: worker \d+ \(idle\)")
        self.assertEqual(manager.systemctl("stop", "taskd.service"), "")
        self.assertEqual(manager.show("Result"), "success")
        self.assertNotIn("Traceback", manager.log)

    def test_a_stop_that_takes_longer(self) -> None:
        """A task gets its grace though TimeoutStopSec= is shorter."""
        manager = self.boot("TimeoutStopSec=1")
        self.start()
        with manager.connect() as connection:
            connection.request("sleep", [4.0])
            self.wait_for("StatusText", " 1 busy")
            self.assertEqual(manager.systemctl("stop", "taskd.service"), "")
            self.assertEqual(connection.reply(), 4.0)
        self.assertEqual(manager.show("Result"), "success")

    def test_the_watchdog(self) -> None:
        """A daemon in which no worker answers is killed whole, and started anew."""
        manager = self.boot("WatchdogSec=2")
        first = self.start()
        self.wait_for("StatusText", "^32 workers: 32 idle")
        frozen = set(manager.processes())
        manager.signal(signal.SIGSTOP, "taskd: worker")
        wait_until(lambda: int(manager.show("MainPID")) not in (0, first), what="a new daemon")
        self.wait_for("ActiveState", "^active$")
        self.assertEqual(manager.show("NRestarts"), "1")
        self.assertEqual(manager.ask("add", [1, 2]), 3)
        self.assertEqual(frozen & set(manager.processes()), set())

    def test_a_restart_behind_the_socket(self) -> None:
        """Who connects while systemd restarts the daemon waits, and is served."""
        manager = self.boot(socket=(UNITS / "taskd-socket.conf").read_text(encoding="utf-8"))
        self.assertEqual(manager.systemctl("start", "taskd.socket"), "")
        self.assertEqual(manager.show("ActiveState"), "inactive")
        self.assertEqual(manager.ask("add", [1, 2]), 3)
        first = manager.show("MainPID")
        load = Load(PORT)

        def restart() -> None:
            with load:
                load.wait_for_more(200)
                self.assertEqual(manager.systemctl("restart", "taskd.service"), "")
                load.wait_for_more(200)

        manager.inside(restart)
        self.assertNotEqual(manager.show("MainPID"), first)
        self.assertEqual(set(load.outcomes) - {SERVED, TOLD_TO_COME_AGAIN}, set(), load.outcomes)

    def test_secrets(self) -> None:
        """Tokens, a certificate and its key reach the daemon from /etc/credstore."""
        authority = trustme.CA()
        identity = authority.issue_cert("tasks.example.org")
        chain = b"".join(blob.bytes() for blob in identity.cert_chain_pems)
        files = {
            "credstore/taskd.token": f"ops:{TOKEN}\n",
            "credstore/taskd.pem": chain.decode(),
            "credstore/taskd.key": identity.private_key_pem.bytes().decode(),
        }
        tls = "--tls %d/taskd.pem --key %d/taskd.key"
        manager = self.boot(f'Environment="TASKD_LISTEN=--port {PORT} {tls}"', files=files)
        self.start()
        context = ssl.create_default_context()
        authority.configure_trust(context)

        def connect() -> Connection:
            plain = socket.create_connection(("127.0.0.1", PORT), WAIT_SECONDS)
            over_tls = context.wrap_socket(plain, server_hostname="tasks.example.org")
            return Connection.over(over_tls)

        with manager.inside(connect) as stranger:
            self.assertEqual(stranger.ask("add", [1, 2])["error"]["code"], "unauthorized")
        with manager.inside(connect) as connection:
            connection.ask("taskd.auth", {"token": TOKEN})
            self.assertEqual(connection.ask("add", [1, 2]), 3)
