"""The section about the start: how long it takes, and what the processes then occupy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from bench import Bench
from machine import Memory, generations
from report import Row, at_most
from servers import TaskdServer

__all__ = ["startup"]

SETTLE_SECONDS = 0.5
LIMITS = {32: (0.6, 180.0), 100: (1.0, 450.0)}
"""By number of workers: seconds until they are ready, MB of the whole process tree."""


@dataclass(frozen=True)
class _Start:
    """One start of the daemon: how long it took, and what it occupied when ready."""

    answered_after: float
    ready_after: float
    supervisor: Memory
    zygote: Memory
    workers: Sequence[Memory]

    @property
    def pss(self) -> float:
        return sum((self.supervisor, self.zygote, *self.workers), Memory.nothing()).pss

    @property
    def typical_worker(self) -> Memory:
        return sorted(self.workers, key=lambda worker: worker.pss)[len(self.workers) // 2]


def startup(bench: Bench) -> Iterator[Row]:
    """Time the way from the twistd command to all workers ready; weigh the tree then."""
    starts: dict[int, list[_Start]] = {procs: [] for procs in LIMITS}
    _start_once(bench, 1)  # compiles what is not compiled yet, and fills the page cache
    for turn in range(bench.rounds):
        for procs in sorted(starts, reverse=bool(turn % 2)):
            starts[procs].append(_start_once(bench, procs))
    for procs, (seconds, _) in LIMITS.items():
        yield _ready_row(procs, starts[procs], seconds)
    for procs, (_, megabytes) in LIMITS.items():
        yield _memory_row(procs, starts[procs], megabytes)


def _start_once(bench: Bench, procs: int) -> _Start:
    with TaskdServer(bench.directory, procs) as server:
        time.sleep(SETTLE_SECONDS)
        memory = [[Memory.of(one.pid) for one in tier] for tier in generations(server.pid)]
        supervisor, children, *descendants = memory
        return _Start(
            answered_after=server.answered_after,
            ready_after=server.ready_after,
            supervisor=supervisor[0],
            zygote=sum(children, Memory.nothing()),
            workers=[worker for tier in descendants for worker in tier],
        )


def _ready_row(procs: int, starts: Sequence[_Start], limit: float) -> Row:
    ready = [start.ready_after for start in starts]
    answered = [start.answered_after for start in starts]
    return Row(
        section="startup",
        name=f"{procs} workers ready",
        unit="s",
        samples=ready,
        target=at_most(limit),
        detail=f"best {min(ready):.2f} s; first answer after {median(answered):.2f} s",
        raw={"ready_seconds": ready, "answered_seconds": answered},
    )


def _memory_row(procs: int, starts: Sequence[_Start], limit: float) -> Row:
    last = starts[-1]
    worker = last.typical_worker
    workers = sum(last.workers, Memory.nothing())
    detail = (
        f"supervisor {last.supervisor.pss:.1f}, zygote {last.zygote.pss:.1f}, "
        f"{len(last.workers)} workers {workers.pss:.1f}\n"
        f"one worker {worker.pss:.2f} = anon {worker.pss_anon:.2f} + file {worker.pss_file:.2f} "
        f"+ shmem {worker.pss_shmem:.2f}; private dirty {worker.private_dirty:.2f}"
    )
    miscounted = len(last.workers) != procs
    return Row(
        section="startup",
        name=f"PSS of all, {procs} workers",
        unit="MB",
        samples=[start.pss for start in starts],
        target=at_most(limit),
        detail=detail,
        warnings=[f"{len(last.workers)} workers found in the process tree"] if miscounted else [],
        raw={
            "supervisor": asdict(last.supervisor),
            "zygote": asdict(last.zygote),
            "workers": asdict(workers),
            "one_worker": asdict(worker),
        },
    )
