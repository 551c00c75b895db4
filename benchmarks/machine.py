"""
What the kernel tells about processes and ports: trees, memory, processor time, free ports.

Everything is read from /proc. A process is remembered with its start time, so that
a number which the kernel has given to somebody else is never signalled.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import signal
import socket
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from errors import BenchmarkError

__all__ = [
    "CpuUse",
    "Memory",
    "Process",
    "describe_machine",
    "find_free_port",
    "foreign_share",
    "generations",
    "session_members",
]

LOWEST_PORT = 20000
BYTES_PER_KB = 1024
BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class Process:
    """
    One process, not merely its number.

    Attributes:
        pid: Its number.
        started: Its start time in clock ticks since boot: with the pid, its identity.
        session: The session that it is in.
    """

    pid: int
    started: int
    session: int

    @property
    def is_alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        found = _read_stat(self.pid)
        return found is not None and found.started == self.started

    def kill(self) -> None:
        """Send SIGKILL, unless the process is gone."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Memory:
    """
    What one process, or several, occupy, in MB of 1 000 000 bytes.

    Attributes:
        pss: Proportional set size: a page that N processes share counts 1/N for each.
        pss_anon: The part of it that is heap, stack and other anonymous memory.
        pss_file: The part that is mapped files: the interpreter, libraries.
        pss_shmem: The part that is shared memory.
        private_dirty: Written to, and not shared with anyone (of any kind).
    """

    pss: float
    pss_anon: float
    pss_file: float
    pss_shmem: float
    private_dirty: float

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    @classmethod
    def nothing(cls) -> Memory:
        """Return the neutral element of a sum."""
        return cls(0.0, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read the memory of the process *pid* from its smaps_rollup."""
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        kilobytes = {key: int(value) for key, value in re.findall(r"(?m)^(\w+): +(\d+) kB$", text)}
        names = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem", "Private_Dirty")
        return cls(*(kilobytes[name] * BYTES_PER_KB / BYTES_PER_MB for name in names))


@dataclass(frozen=True)
class CpuUse:
    """
    Who has used the processors so far, in clock ticks of all cores together.

    Attributes:
        available: What there was to use since boot.
        by_all: What all processes used, and what the machine's own host took away.
        by_us: What the benchmark used: this process, its past children, the given trees.
    """

    available: int
    by_all: int
    by_us: int

    @classmethod
    def until_now(cls, roots: Collection[int] = ()) -> CpuUse:
        """Read the counters; *roots* are the trees of the servers under test."""
        _, *words = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, idle, iowait, irq, softirq, steal = (int(word) for word in words[:8])
        used = user + nice + system + steal
        ours = os.times()
        own_seconds = ours.user + ours.system + ours.children_user + ours.children_system
        stats = _read_all_stats()
        servers = sum(
            stats[pid].ticks for root in roots for tier in _tiers(root, stats) for pid in tier
        )
        return cls(
            available=used + idle + iowait + irq + softirq,
            by_all=used,
            by_us=servers + round(own_seconds * os.sysconf("SC_CLK_TCK")),
        )


@dataclass(frozen=True)
class _Stat:
    parent: int
    session: int
    ticks: int
    started: int


def _read_stat(pid: int) -> _Stat | None:
    """Read what is of use here; None if there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command stands in parentheses and may hold any character, these included.
    values = text[text.rindex(")") + 1 :].split()
    if values[0] in "ZX":
        return None
    return _Stat(
        parent=int(values[1]),
        session=int(values[3]),
        ticks=int(values[11]) + int(values[12]),
        started=int(values[19]),
    )


def _read_all_stats() -> dict[int, _Stat]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {pid: stat for pid in pids if (stat := _read_stat(pid)) is not None}


def _tiers(root: int, stats: Mapping[int, _Stat]) -> Iterator[list[int]]:
    current = [root] if root in stats else []
    while current:
        yield current
        parents = set(current)
        current = [pid for pid, stat in stats.items() if stat.parent in parents]


def generations(root: int) -> list[list[Process]]:
    """Return the process *root*, then its children, then theirs, down to the last."""
    stats = _read_all_stats()
    return [
        [Process(pid, stats[pid].started, stats[pid].session) for pid in tier]
        for tier in _tiers(root, stats)
    ]


def session_members(sessions: Collection[int]) -> list[Process]:
    """Return the processes of some sessions: also those that have lost their parents."""
    return [
        Process(pid, stat.started, stat.session)
        for pid, stat in _read_all_stats().items()
        if stat.session in sessions
    ]


def find_free_port() -> int:
    """
    Return a TCP port on which nobody listens.

    It lies below the range that the kernel takes source ports from. Otherwise a
    caller that polls a port on which nobody listens yet could be given that very
    port as its own, connect to itself, and take the port from the server.
    """
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    first = LOWEST_PORT + os.getpid() % 5000
    for port in itertools.chain(range(first, int(limits[0])), range(1024, first)):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", port))
                return port
    raise OSError("no free port below the ephemeral range")


def describe_machine() -> dict[str, object]:
    """
    Return what a reader of the figures must know about where they come from.

    Raises:
        BenchmarkError: This interpreter has not what taskd needs.
    """
    try:
        versions = {name: version(name) for name in ("twisted", "ujson")}
    except PackageNotFoundError as error:
        raise BenchmarkError(
            f"{sys.executable} has no {error.name}: is it the right one?"
        ) from None
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions,
    }


def foreign_share(before: CpuUse, after: CpuUse) -> float:
    """Return the share of all cores that others than the benchmark used in between."""
    foreign = (after.by_all - before.by_all) - (after.by_us - before.by_us)
    return max(0.0, foreign / max(1, after.available - before.available))
