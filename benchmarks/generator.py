"""Build and run ``lineload``, the load generator that is written in C."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from errors import BenchmarkError

__all__ = ["Generator", "Load", "Measurement"]

SOURCE = Path(__file__).with_name("lineload.c")
SPARE_SECONDS = 10.0
"""How much longer than its own time a run may take before it is killed."""


@dataclass(frozen=True)
class Load:
    """
    How to press a server.

    Attributes:
        connections: How many connections, or callers when reconnecting.
        depth: Requests in flight on each of them.
        reconnect: Whether each request has a connection of its own.
    """

    connections: int = 1
    depth: int = 1
    reconnect: bool = False


@dataclass(frozen=True)
class Measurement:
    """What ``lineload`` prints; lineload.c says what each figure is."""

    requests: int
    seconds: float
    rate: float
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float
    errors: int
    cpu_share: float


class Generator:
    """
    The compiled load generator.

    Args:
        directory: Where the program is built.
        seconds: How long each run measures.
        warm_up_seconds: How long each run presses the server before that.

    Raises:
        BenchmarkError: There is no C compiler, or it failed.
    """

    def __init__(self, directory: Path, *, seconds: float, warm_up_seconds: float) -> None:
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            raise BenchmarkError("no C compiler: install gcc, or name one in the variable CC")
        self._program = directory / "lineload"
        self._seconds = seconds
        self._warm_up_seconds = warm_up_seconds
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(self._program), str(SOURCE)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            raise BenchmarkError(f"{SOURCE.name} does not compile:\n{built.stderr}")

    def run(self, port: int, line: str, expect: str, load: Load) -> Measurement:
        """
        Press the server on *port* and return what came out.

        Args:
            port: Where the server listens on 127.0.0.1.
            line: The request; ``%ID%`` in it makes replies match by id.
            expect: What a reply must contain.
            load: Connections and depth.

        Raises:
            BenchmarkError: Nothing was measured: there was no reply at all.
        """
        command = [
            str(self._program),
            f"-p{port}",
            f"-l{line}",
            f"-e{expect}",
            f"-c{load.connections}",
            f"-d{load.depth}",
            f"-t{self._seconds}",
            f"-w{self._warm_up_seconds}",
        ]
        if load.reconnect:
            command.append("-o")
        try:
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=self._warm_up_seconds + self._seconds + SPARE_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"lineload did not end in time: {command}") from error
        if not result.stdout:
            raise BenchmarkError(f"lineload printed no result: {result.stderr.strip()}")
        measurement = Measurement(**json.loads(result.stdout))
        if measurement.requests == 0:
            raise BenchmarkError(f"no reply to {line!r}: {result.stdout.strip()}")
        return measurement
