"""
A real daemon for a test: started by twistd, asked over sockets, and surely stopped.

Everything that waits does it by ``wait_until``. What a daemon has started is
found by a mark in the environment, which every descendant inherits, so that
nothing can be left behind unseen.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from twisted.trial.unittest import SynchronousTestCase

__all__ = [
    "CHECKOUT",
    "SAMPLE_TASKS",
    "TWISTD",
    "WAIT_SECONDS",
    "Connection",
    "Daemon",
    "Ended",
    "Process",
    "children_of",
    "shared_daemon",
    "temporary_directory",
    "touch_if_possible",
    "wait_until",
    "write_secret",
]

CHECKOUT: Final = Path(__file__).resolve().parent.parent.parent
SAMPLE_TASKS: Final = Path(__file__).resolve().parent / "sample_tasks.py"
TWISTD: Final = Path(sys.executable).parent / "twistd"

WAIT_SECONDS: Final = 20.0
"""How long anything may take that is expected to happen; a loaded machine needs it."""

_POLL_SECONDS: Final = 0.01
_BURSTS: Final = 20
_LAST_WORDS_LENGTH: Final = 4000
_LOG_FILE: Final = "twistd.log"
_PID_FILE: Final = "twistd.pid"
_MARK: Final = "TASKD_TEST_MARK"
_PROCS_PER_CORE: Final = 10
_SERVING: Final = ("idle", "busy")

_T = TypeVar("_T")


def wait_until(
    condition: Callable[[], _T], seconds: float = WAIT_SECONDS, *, what: str = "a condition"
) -> _T:
    """
    Wait until a condition holds.

    Args:
        condition: Asked again and again; an ``OSError`` counts as "not yet".
        seconds: When to give up.
        what: What is waited for, for the message.

    Returns:
        The first true value that *condition* gave.

    Raises:
        AssertionError: It did not come in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        last: object = None
        try:
            value = condition()
            if value:
                return value
            last = value
        except OSError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not seen within {seconds:g} s (last: {last!r})")
        time.sleep(_POLL_SECONDS)


def temporary_directory(test: SynchronousTestCase) -> Path:
    """Make a directory that is removed when the test is over."""
    directory = Path(tempfile.mkdtemp(prefix="taskd-test-"))
    test.addCleanup(shutil.rmtree, directory)
    return directory


def touch_if_possible(path: Path) -> None:
    """Make an empty file, unless its directory is gone."""
    with contextlib.suppress(FileNotFoundError):
        path.touch()


def write_secret(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file, in the place of one that is there, which none but its owner may read."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.chmod(mode)
    new.rename(path)


@dataclass(frozen=True)
class Process:
    """
    What /proc tells about one process.

    Attributes:
        pid: Its number.
        parent: Its parent's.
        title: Its command line; the arguments are joined by blanks.
        is_zombie: True if it has ended and nobody has reaped it.
    """

    pid: int
    parent: int
    title: str
    is_zombie: bool

    @classmethod
    def read(cls, pid: int) -> Process | None:
        """Look at one process; None if there is none."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, parent = stat.rpartition(")")[2].split()[:2]
        title = b" ".join(words).decode(errors="replace")
        return cls(pid, int(parent), title, state == "Z")


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def children_of(pid: int) -> list[Process]:
    """Give the children of a process, dead ones that nobody has reaped included."""
    processes = (Process.read(child) for child in _all_pids())
    return [process for process in processes if process is not None and process.parent == pid]


class Connection:
    """
    One plain connection to a daemon.

    Args:
        host: The daemon's address.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._talk_over(socket.create_connection((host, port), WAIT_SECONDS))

    def _talk_over(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lines = connected.makefile("rb")

    @classmethod
    def over(cls, connected: socket.socket) -> Connection:
        """Make one of a socket that is connected already, by TLS perhaps."""
        connection = cls.__new__(cls)
        connection._talk_over(connected)
        return connection

    def __enter__(self) -> Connection:
        """Give itself; it is closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: str | bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data.encode() if isinstance(data, str) else data)

    def request(self, function: str, args: Any = (), **members: Any) -> None:
        """Send one request; *members* are ``id``, ``timeout``, ``priority`` and so on."""
        self.send(json.dumps({"function": function, "args": args, **members}) + "\n")

    def line(self) -> bytes:
        """Wait for the next line; b"" if there is none because the daemon has hung up."""
        return self._lines.readline()

    def reply(self) -> Any:
        """
        Wait for the next reply.

        Raises:
            EOFError: The daemon hung up instead.
        """
        line = self.line()
        if not line.endswith(b"\n"):
            raise EOFError("the daemon hung up instead of answering")
        return json.loads(line)

    def ask(self, function: str, args: Any = (), **members: Any) -> Any:
        """Send one request and wait for the next reply."""
        self.request(function, args, **members)
        return self.reply()

    def replies_by_id(self, count: int) -> dict[Any, Any]:
        """Wait for that many replies, and give them by their ids."""
        replies = [self.reply() for _ in range(count)]
        return {reply["id"]: reply for reply in replies}

    def half_close(self) -> None:
        """Tell the daemon that nothing more will be sent, and go on to read."""
        self._socket.shutdown(socket.SHUT_WR)

    def rest(self) -> bytes:
        """Read until the daemon hangs up."""
        return self._lines.read()

    def is_hung_up(self) -> bool:
        """Wait for the daemon's hanging up, orderly or not; False if it says something."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        """Close it."""
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True)
class Ended:
    """
    How a daemon that ends by itself has ended.

    Attributes:
        status: Its exit status; negative if a signal ended it.
        output: What it wrote to stdout.
        errors: What it wrote to stderr.
    """

    status: int
    output: str
    errors: str


class Daemon:
    """
    One daemon, in a directory of its own.

    Args:
        options: Further words for ``twistd taskd``.
        procs: How many workers; None leaves it to the daemon, which takes ten a core.
        port: Where it listens; 0 lets the kernel choose. None leaves out the option.
        host: Where callers find it.
        caller: Opens a connection over which all may be asked; None: a plain one to *host*.
        tasks: Task modules; None leaves out the option.
        files: Files to write into the directory first, by name.
        secrets: As *files*, for the eyes of their owner alone.
        environ: What is added to the environment.
        twistd: The program.
        in_background: True: twistd leaves the daemon behind and ends.
        most_fds: How many files each of its processes may have open; None: as many as we.
        under: A program, and its arguments, that is to run twistd.
        fds: Further files that it inherits, under the numbers that they have here.

    Attributes:
        directory: Where it runs.
        process: The twistd process, once it has been started.
        procs: How many workers a whole pool has.
        port: Where it really listens, once it is ready; the first port, if there are several.
        addresses: All places where it listens, as the log has them.
    """

    def __init__(
        self,
        *options: str,
        procs: int | None = 1,
        port: int | None = 0,
        host: str = "127.0.0.1",
        caller: Callable[[Daemon], Connection] | None = None,
        tasks: str | None = str(SAMPLE_TASKS),
        files: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
        twistd: Path = TWISTD,
        in_background: bool = False,
        most_fds: int | None = None,
        under: Sequence[str] = (),
        fds: Sequence[int] = (),
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="taskd-test-"))
        self.port = port or 0
        self.addresses = ""
        self.procs = _PROCS_PER_CORE * (os.cpu_count() or 1) if procs is None else procs
        self.process: subprocess.Popen[bytes] | None = None
        self._host = host
        self._caller = caller
        self._is_in_background = in_background
        self._fds = tuple(fds)
        self._mark = uuid.uuid4().hex
        for name, text in (files or {}).items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for name, text in (secrets or {}).items():
            write_secret(self.directory / name, text)
        if in_background:
            twistd_options = ("--logfile", _LOG_FILE, "--pidfile", _PID_FILE)
        else:
            twistd_options = ("-n", "--pidfile=")
        self._command = [str(twistd), *twistd_options, "taskd"]
        if port is not None:
            self._command += ["--port", str(port)]
        if most_fds is not None:
            self._command = ["prlimit", f"--nofile={most_fds}", *self._command]
        if procs is not None:
            self._command += ["--procs", str(procs)]
        if tasks is not None:
            self._command += ["--tasks", tasks]
        self._command = [*under, *self._command, *options]
        self._environ = {**os.environ, **(environ or {}), _MARK: self._mark}

    # Its life.

    def _spawn(self) -> subprocess.Popen[bytes]:
        output = self.directory / "stdout"
        errors = self.directory / "stderr"
        with output.open("wb") as output_file, errors.open("wb") as errors_file:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.directory,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output_file,
                stderr=errors_file,
                start_new_session=True,
                pass_fds=self._fds,
            )
        return self.process

    def start(self) -> Daemon:
        """
        Start it, and wait until all its workers serve.

        Returns:
            Itself.

        Raises:
            AssertionError: It has not come up; the message holds what it said.
        """
        process = self._spawn()
        try:
            wait_until(lambda: self._has_said_its_port(process), what="a ready daemon")
            self.wait_until_whole()
        except BaseException as error:
            self._end_all()
            error.add_note(self._last_words())
            raise
        return self

    def start_without_waiting(self) -> None:
        """Start it, and leave it to the test to find out how it gets on."""
        self._spawn()

    def _has_said_its_port(self, process: subprocess.Popen[bytes]) -> bool:
        status = process.poll()
        if status is not None and not (status == 0 and self._is_in_background):
            raise AssertionError(f"the daemon ended with status {status}")
        said = re.search(r"workers serve (.+) after", self.log)
        if said is not None:
            self.addresses = said[1]
            ports = re.findall(r" port (\d+)", said[1])
            self.port = int(ports[0]) if ports else 0
        return said is not None

    def run(self, seconds: float = WAIT_SECONDS) -> Ended:
        """
        Start it, and wait until it has ended by itself.

        Raises:
            AssertionError: It goes on, or has left a process behind.
        """
        process = self._spawn()
        try:
            wait_until(lambda: process.poll() is not None, seconds, what="the daemon's end")
            self.wait_until_gone()
            return Ended(process.returncode, self.log, self.errors)
        finally:
            self._end_all()
            shutil.rmtree(self.directory)

    def wait_until_whole(self, seconds: float = WAIT_SECONDS) -> dict[int, int]:
        """
        Wait until as many workers serve as the daemon is to have.

        Returns:
            Their pids, by their numbers. One that has taken another's place may
            have a number above that of the whole pool's size.
        """
        return wait_until(self._workers_if_whole, seconds, what="a whole pool")

    def _workers_if_whole(self) -> dict[int, int]:
        try:
            serving = self.serving()
        except EOFError:
            return {}
        return serving if len(serving) == self.procs else {}

    def wait_until_settled(self, seconds: float = WAIT_SECONDS) -> dict[int, int]:
        """
        Wait until the pool is whole, and nobody starts or drains beside it.

        Returns:
            The workers' pids, by their numbers.
        """
        return wait_until(self._workers_if_settled, seconds, what="a settled pool")

    def _workers_if_settled(self) -> dict[int, int]:
        whole = self._workers_if_whole()
        return whole if whole and len(self.workers()) == self.procs else {}

    def wait_until_new(self, before: dict[int, int], seconds: float = WAIT_SECONDS) -> None:
        """Wait until the pool is whole, and holds none of the workers that were there before."""
        wait_until(lambda: self._is_new(before), seconds, what="a new pool")

    def _is_new(self, before: dict[int, int]) -> bool:
        whole = self._workers_if_whole()
        return bool(whole) and not set(whole.values()) & set(before.values())

    def wait_until_gone(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until no process is left of it."""
        wait_until(
            lambda: not (self.is_running or self.processes()),
            seconds,
            what="the end of every process",
        )

    def wait_for_exit(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait until the supervisor has ended, and give its exit status."""
        wait_until(lambda: not self.is_running, seconds, what="the supervisor's end")
        return self._popen.returncode

    def stop(self) -> None:
        """
        Stop it as an operator does, and clean up; without effect the second time.

        Raises:
            AssertionError: It left a process behind, which has been killed now.
        """
        if not self.directory.exists():
            return
        try:
            if self.process is not None:
                if self.processes():
                    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                        self.signal(signal.SIGTERM)
                self.wait_until_gone()
        except BaseException as error:
            error.add_note(self._last_words())
            raise
        finally:
            self._end_all()
            shutil.rmtree(self.directory)

    def _end_all(self) -> None:
        """Kill, by pid, what is left; what it has forked meanwhile as well."""
        for _ in range(10):
            left = self.processes()
            if not left:
                break
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(WAIT_SECONDS)

    # What it is made of.

    @property
    def _popen(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise AssertionError("the daemon was not started")
        return self.process

    @property
    def pid(self) -> int:
        """Give the supervisor's pid."""
        if self._is_in_background:
            return int((self.directory / _PID_FILE).read_text(encoding="utf-8"))
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Tell whether the process that was started is there."""
        return self.process is not None and self.process.poll() is None

    @property
    def zygote(self) -> int:
        """Wait for the zygote, and give its pid."""
        return wait_until(self._find_zygote, what="a zygote").pid

    def _find_zygote(self) -> Process | None:
        zygotes = [
            process
            for process in children_of(self.pid)
            if process.title == "taskd: zygote" and not process.is_zombie
        ]
        return zygotes[0] if len(zygotes) == 1 else None

    def workers(self) -> dict[int, int]:
        """Give the workers' pids, by their numbers, as the scoreboard has them now."""
        return {worker["worker"]: worker["pid"] for worker in self.status()["workers"]}

    def serving(self) -> dict[int, int]:
        """Give the pids of the workers that take tasks, by their numbers."""
        return {
            worker["worker"]: worker["pid"]
            for worker in self.status()["workers"]
            if worker["state"] in _SERVING
        }

    def restarts(self) -> dict[str, int]:
        """Give how many workers were replaced, by cause, without the causes that were not."""
        restarts = self.status()["totals"]["restarts"]
        return {cause: count for cause, count in restarts.items() if count}

    def settled_restarts(self) -> dict[str, int]:
        """Wait until the pool is settled, then as ``restarts``."""
        self.wait_until_settled()
        return self.restarts()

    def processes(self) -> list[Process]:
        """Give every live process that this daemon consists of or has started."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for pid in _all_pids():
            try:
                if mark not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    continue
            except OSError:
                continue
            process = Process.read(pid)
            if process is not None and not process.is_zombie:
                found.append(process)
        return found

    def signal(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to the supervisor, or to another process of this daemon."""
        os.kill(self.pid if pid is None else pid, number)

    def kill(self, pid: int) -> None:
        """Kill one of its processes with SIGKILL."""
        self.signal(signal.SIGKILL, pid)

    def _last_words(self) -> str:
        return f"the daemon said:\n{self.log[-_LAST_WORDS_LENGTH:]}{self.errors}"

    @property
    def log(self) -> str:
        """Give twistd's log, which is its stdout unless it runs in the background."""
        return self._text_of("stdout") + self._text_of(_LOG_FILE)

    @property
    def errors(self) -> str:
        """Give what it has written to stderr."""
        return self._text_of("stderr")

    def _text_of(self, name: str) -> str:
        path = self.directory / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # What it is asked.

    def connect(self) -> Connection:
        """Open a connection."""
        if self._caller is not None:
            return self._caller(self)
        return Connection(self._host, self.port)

    def ask(self, function: str, args: Any = (), **members: Any) -> Any:
        """Ask for one task over a connection of its own, and give the reply."""
        with self.connect() as connection:
            return connection.ask(function, args, **members)

    def status(self) -> dict[str, Any]:
        """Give what ``taskd.status`` answers."""
        return self.ask("taskd.status")

    def connect_to_each(self) -> dict[int, Connection]:
        """Open connections until there is one to each worker, and give them by number."""
        procs = self.procs
        found: dict[int, Connection] = {}
        others: list[Connection] = []
        for _ in range(_BURSTS):
            # Those that come at once, and stay, are spread.
            for connection in [self.connect() for _ in range(4 * procs)]:
                number = connection.ask("taskd.status")["answered_by"]
                if found.setdefault(number, connection) is not connection:
                    others.append(connection)
            if len(found) == procs:
                break
        for connection in others:
            connection.close()
        if len(found) < procs:
            raise AssertionError(f"only workers {sorted(found)} of {procs} take connections")
        return found


_shared: dict[tuple[Any, ...], Daemon] = {}


def shared_daemon(*options: str, procs: int = 1) -> Daemon:
    """
    Give a daemon that tests share, for those that leave it as they find it.

    There is one at a time: it lives as long as the same one is asked for. Trial
    knows no ``setUpClass``, so this is asked for in ``setUp``.

    Args:
        options: As for ``Daemon``.
        procs: How many workers.

    Returns:
        The daemon, ready.
    """
    key = (options, procs)
    if key not in _shared:
        stop_shared_daemons()
        _shared[key] = Daemon(*options, procs=procs).start()
    # A test may have had a worker replaced.
    _shared[key].wait_until_settled()
    return _shared[key]


def stop_shared_daemons() -> None:
    """Stop the shared daemon, if there is one."""
    while _shared:
        _shared.popitem()[1].stop()


atexit.register(stop_shared_daemons)
