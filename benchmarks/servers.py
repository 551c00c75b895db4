"""
The servers under test, as real processes: started, waited for, and surely stopped.

``BareServer`` is the reference, ``TaskdServer`` the daemon as an operator runs it.
Both are context managers: on the way out the whole process tree is gone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from errors import BenchmarkError
from machine import Process, find_free_port, generations, session_members

__all__ = ["BareServer", "Caller", "Server", "TaskdServer"]

HERE = Path(__file__).resolve().parent
POLL_SECONDS = 0.005
READY_SECONDS = 30.0
ANSWER_SECONDS = 10.0
STOP_SECONDS = 15.0
REAP_SECONDS = 3.0
LOG_TAIL_CHARACTERS = 2000
NOT_READY = {"starting", "dead"}


class Caller:
    """One blocking connection that asks one question at a time."""

    def __init__(self, port: int, timeout_seconds: float = ANSWER_SECONDS) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_seconds)
        self._stream = self._socket.makefile("rb")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def ask(self, function: str) -> Any:
        """
        Call a function without arguments and return its result.

        Raises:
            OSError: The connection broke, or there was no answer in time.
            BenchmarkError: The answer is an error.
        """
        answer = self.send(function, [])
        if isinstance(answer, dict) and "error" in answer:
            raise BenchmarkError(f"{function} failed: {answer['error']}")
        return answer

    def send(self, function: str, args: list[Any]) -> Any:
        """
        Call a function and return the answer, whatever it is.

        Raises:
            OSError: The connection broke, or there was no answer in time.
        """
        request = {"function": function, "args": args}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("closed before the answer")
        return json.loads(line)


class Server:
    """
    A server process and its children, from start to stop.

    Subclasses say what to run and when it is ready. The program runs in a session
    of its own, so a Ctrl-C in the terminal reaches only the benchmark, which then
    stops it in order.

    Args:
        directory: An existing directory for its log and as its working directory.

    Attributes:
        name: What to call it in messages, and its log file.
        port: Where it listens on 127.0.0.1.
        answered_after: Seconds from the start of the program to its first answer.
        ready_after: Seconds from the start of the program until it was ready.
    """

    name = "server"

    def __init__(self, directory: Path) -> None:
        self.port = find_free_port()
        self.answered_after = 0.0
        self.ready_after = 0.0
        self._directory = directory
        self._log = directory / f"{self.name}-{self.port}.log"

    @property
    def command(self) -> list[str]:
        """The program and its arguments."""
        raise NotImplementedError

    def is_ready(self, caller: Caller) -> bool:
        """Ask whether all of the server is there; to answer at all may be enough."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The root of the process tree."""
        return self._process.pid

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            started = time.monotonic()
            self._process = subprocess.Popen(
                self.command,
                cwd=self._directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(started)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _environment(self) -> dict[str, str]:
        """
        Return the variables of the program: this checkout, compiled as if it were installed.

        An installed package has its bytecode beside it. A checkout has it after the
        first start, unless the environment forbids; so it is kept in the directory of
        the benchmark, for all starts of this run.
        """
        path = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONPYCACHEPREFIX": str(self._directory / "bytecode"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment

    def _wait_until_ready(self, started: float) -> None:
        deadline = started + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchmarkError(self._complaint("ended before it was ready"))
            try:
                # A worker may die with this connection; then there is another attempt.
                with Caller(self.port, timeout_seconds=1.0) as caller:
                    caller.ask("taskd.ping")
                    self.answered_after = time.monotonic() - started
                    while time.monotonic() < deadline:
                        if self.is_ready(caller):
                            self.ready_after = time.monotonic() - started
                            return
                        time.sleep(POLL_SECONDS)
            except OSError:
                time.sleep(POLL_SECONDS)
        raise BenchmarkError(self._complaint(f"was not ready within {READY_SECONDS:.0f} s"))

    def _complaint(self, what: str) -> str:
        tail = self._log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
        return f"{self.name} {what}; the end of its log:\n{tail}"

    def _stop(self) -> None:
        """Ask the root to stop, then end by force whatever is left of the tree."""
        has_ended = self._process.poll() is not None  # then its pid may be another's by now
        tiers = [] if has_ended else generations(self.pid)
        family = [one for tier in tiers for one in tier]
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not stop on SIGTERM: killed", file=sys.stderr)
        finally:  # also when a signal cuts the wait short
            self._process.kill()  # does nothing to a process that has been waited for
            self._process.wait()
            for straggler in self._wait_for_stragglers(family):
                print(f"{self.name} left process {straggler.pid} behind: killed", file=sys.stderr)
                straggler.kill()

    def _wait_for_stragglers(self, family: list[Process]) -> set[Process]:
        """Give the rest of the family a moment to go; return who has not gone."""
        sessions = {self.pid, *(one.session for one in family)}
        deadline = time.monotonic() + REAP_SECONDS
        while True:
            left = {one for one in family if one.is_alive} | set(session_members(sessions))
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(POLL_SECONDS)


class BareServer(Server):
    """The reference, bare_echo.py."""

    name = "bare"

    @property
    def command(self) -> list[str]:
        """The reference server, by the interpreter that runs this."""
        return [sys.executable, str(HERE / "bare_echo.py"), str(self.port)]

    def is_ready(self, caller: Caller) -> bool:
        """Have an empty list echoed: one process is there or not."""
        return bool(caller.ask("echo") == [])


class TaskdServer(Server):
    """
    The daemon, run by the ``twistd`` beside this interpreter.

    Args:
        directory: As for every server.
        procs: How many workers.
        more: Further options of the daemon's.
    """

    name = "taskd"

    def __init__(self, directory: Path, procs: int, *more: str) -> None:
        super().__init__(directory)
        self.procs = procs
        self.more = more

    @property
    def command(self) -> list[str]:
        """The command line of an operator, with the benchmark's task module."""
        twistd = Path(sys.executable).with_name("twistd")
        options = {"port": self.port, "procs": self.procs, "tasks": HERE / "bench_tasks.py"}
        words = [f"--{name}={value}" for name, value in options.items()]
        return [str(twistd), "--nodaemon", "--pidfile=", "taskd", *words, *self.more]

    def is_ready(self, caller: Caller) -> bool:
        """Ask for the state of every worker."""
        states = [worker["state"] for worker in caller.ask("taskd.status")["workers"]]
        return sum(state not in NOT_READY for state in states) == self.procs
