"""The section about connections that stay: how evenly workers share them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

from bench import Bench
from errors import BenchmarkError
from report import Row, at_most
from servers import Caller, TaskdServer

__all__ = ["burst"]

CONNECTIONS = 200
WORKERS = 8
SETTLE_SECONDS = 10.0
POLL_SECONDS = 0.02


def burst(bench: Bench) -> Iterator[Row]:
    """Look how evenly a burst of connections that stay spreads over the workers."""
    with TaskdServer(bench.directory, WORKERS) as server:
        spreads = [sorted(_spread(server.port)) for _ in range(bench.rounds)]
    yield Row(
        section="burst",
        name="fullest / emptiest worker",
        unit="x",
        samples=[counts[-1] / counts[0] if counts[0] else float("inf") for counts in spreads],
        target=at_most(1.5),
        detail="connections per worker: "
        + "; ".join(" ".join(str(count) for count in counts) for counts in spreads),
        raw={"connections": spreads},
    )


def _spread(port: int) -> list[int]:
    """Open the burst, wait until it is accepted, and return each worker's part of it."""
    with Caller(port) as caller, ExitStack() as stack:
        # The asking connection is one more: it is all there is before the burst.
        before = _connections_by_worker(caller, total=1)
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", port))
        after = _connections_by_worker(caller, total=1 + CONNECTIONS)
        return [now - then for now, then in zip(after, before, strict=True)]


def _connections_by_worker(caller: Caller, *, total: int) -> list[int]:
    """Ask until the workers have *total* connections together."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        counts = [worker["connections"] for worker in caller.ask("taskd.status")["workers"]]
        if sum(counts) == total:
            return counts
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{total} connections expected, the workers report {counts}")
        time.sleep(POLL_SECONDS)
