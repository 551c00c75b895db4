"""
Callers for tasks that take their time: each request is timed by itself.

``lineload.c`` asks as fast as it can; here requests have their moments, and the
rates are such that one Python process keeps up.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errors import BenchmarkError

__all__ = ["Ask", "Outcome", "ask_all"]

ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Ask:
    """
    One request.

    Attributes:
        at: When to send it, in seconds from the start.
        function: What to call.
        args: Its arguments.
    """

    at: float
    function: str
    args: tuple[Any, ...] = ()


@dataclass
class Outcome:
    """
    What became of one request.

    Attributes:
        seconds: From its moment, kept or not, to its reply; None if none came.
        error: The code that it was answered, or "".
    """

    seconds: float | None = None
    error: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it was answered with a result."""
        return self.seconds is not None and not self.error


def ask_all(port: int, asks: Sequence[Ask], connections: int) -> list[Outcome]:
    """
    Send requests at their moments over connections that are open, and time the replies.

    Args:
        port: Where, on 127.0.0.1.
        asks: Sorted by their moments.
        connections: How many to spread them over, in turn.

    Returns:
        An outcome for each request.

    Raises:
        BenchmarkError: The replies have not come within a minute of the last request.
    """
    return asyncio.run(_Crowd(port, asks, connections).run())


class _Crowd:
    def __init__(self, port: int, asks: Sequence[Ask], connections: int) -> None:
        self._port = port
        self._asks = asks
        self._connections = connections
        self._outcomes = [Outcome() for _ in asks]
        self._began = 0.0

    async def run(self) -> list[Outcome]:
        """Ask, and wait for all replies, or the end of all connections."""
        opened = [
            await asyncio.open_connection("127.0.0.1", self._port) for _ in range(self._connections)
        ]
        requests = [
            json.dumps({"id": number, "function": ask.function, "args": ask.args}).encode() + b"\n"
            for number, ask in enumerate(self._asks)
        ]
        self._began = time.perf_counter()
        readers = [
            asyncio.create_task(self._read(reader, self._asks[n :: self._connections]))
            for n, (reader, _) in enumerate(opened)
        ]
        for number, ask in enumerate(self._asks):
            wait = ask.at - (time.perf_counter() - self._began)
            if wait > 0:
                await asyncio.sleep(wait)
            opened[number % len(opened)][1].write(requests[number])
        _, pending = await asyncio.wait(readers, timeout=ANSWER_SECONDS)
        for _, writer in opened:
            writer.close()
        if pending:
            raise BenchmarkError(f"not all replies came within {ANSWER_SECONDS:.0f} s")
        return self._outcomes

    async def _read(self, reader: asyncio.StreamReader, asks: Sequence[Ask]) -> None:
        for _ in asks:
            try:
                line = await reader.readline()
            except ConnectionError:
                return
            if not line:
                return
            reply = json.loads(line)
            number = reply["id"]
            outcome = self._outcomes[number]
            outcome.seconds = time.perf_counter() - self._began - self._asks[number].at
            outcome.error = reply["error"]["code"] if "error" in reply else ""
