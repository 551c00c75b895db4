"""
The sections that compare taskd with the bare server: connect, pipelined, latency.

A machine with few cores is a noisy one, and it drifts: what is compared is measured
in turn within one round, with the reference in the middle, each round in the reverse
order of the one before. A ratio is taken within a round; the median of the rounds
counts. All servers of a section are up all the time; those not asked are idle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median

from bench import QUIET_SHARE, Bench
from generator import Load, Measurement
from machine import CpuUse, foreign_share
from report import Row, Target, at_least, at_most
from servers import BareServer, Server

__all__ = ["connect", "latency", "pipelined"]

SATURATED_CPU_SHARE = 0.9
ARGUMENTS = [1, 2]
REPLY_PART = json.dumps(ARGUMENTS, separators=(",", ":"))


@dataclass(frozen=True)
class _Contender:
    """A server and what to ask it; *target* is held against its ratio to the reference."""

    name: str
    server: Server
    line: str
    target: Target


@dataclass(frozen=True)
class _Run:
    """One run of the generator, and what others used of all cores meanwhile."""

    measured: Measurement
    foreign_share: float


@dataclass(frozen=True)
class _Comparison:
    """How to press the servers, and which figure of the measurement to compare."""

    section: str
    load: Load
    figure: str
    unit: str

    def rows(self, bench: Bench, bare: Server, contenders: Sequence[_Contender]) -> Iterator[Row]:
        """Measure all in turn; one row for each contender."""
        reference = _Contender("bare", bare, _request("echo_now"), at_least(1))
        order = [*contenders[:1], reference, *contenders[1:]]
        roots = {one.server.pid for one in order}
        found: dict[str, list[_Run]] = {one.name: [] for one in order}
        for turn in range(bench.rounds):
            for one in reversed(order) if turn % 2 else order:
                before = CpuUse.until_now(roots)
                measured = bench.generator.run(one.server.port, one.line, REPLY_PART, self.load)
                share = foreign_share(before, CpuUse.until_now(roots))
                found[one.name].append(_Run(measured, share))
        for one in contenders:
            yield self._row(one, found[one.name], found["bare"])

    def _row(
        self,
        contender: _Contender,
        runs: Sequence[_Run],
        bare_runs: Sequence[_Run],
    ) -> Row:
        values = [getattr(run.measured, self.figure) for run in runs]
        bare_values = [getattr(run.measured, self.figure) for run in bare_runs]
        p99, bare_p99 = (median(run.measured.p99_us for run in some) for some in (runs, bare_runs))
        both = [*runs, *bare_runs]
        return Row(
            section=self.section,
            name=contender.name,
            unit="x bare",
            samples=[value / bare for value, bare in zip(values, bare_values, strict=True)],
            target=contender.target,
            detail=f"{median(values):,.0f}{self.unit} beside {median(bare_values):,.0f}{self.unit};"
            f" p99 {p99:,.0f} beside {bare_p99:,.0f} us;"
            f" generator {max(run.measured.cpu_share for run in both):.0%} of a core",
            warnings=list(_warnings(both)),
            errors=sum(run.measured.errors for run in both),
            raw={
                "taskd": [asdict(run) for run in runs],
                "bare": [asdict(run) for run in bare_runs],
            },
        )


def _warnings(runs: Sequence[_Run]) -> Iterator[str]:
    """Say why the runs are not to be trusted."""
    if max(run.measured.cpu_share for run in runs) > SATURATED_CPU_SHARE:
        yield "the generator was the bottleneck; the ratio says little"
    if (share := max(run.foreign_share for run in runs)) > QUIET_SHARE:
        yield f"in one run at least, something else used {share:.0%} of all cores"
    if errors := sum(run.measured.errors for run in runs):
        yield f"{errors} errors: lost connections or wrong replies"


def _request(function: str, *, with_ids: bool = False) -> str:
    line = json.dumps({"function": function, "args": ARGUMENTS}, separators=(",", ":"))
    return f'{{"id":%ID%,{line[1:]}' if with_ids else line


def connect(bench: Bench) -> Iterator[Row]:
    """Compare the rates of 8 callers who open a connection for each task."""
    limits = {32: at_least(0.75), 100: at_least(0.70)}
    load = Load(connections=8, reconnect=True)
    with ExitStack() as stack:
        bare = stack.enter_context(BareServer(bench.directory))
        contenders = []
        for procs, target in limits.items():
            server = stack.enter_context(bench.taskd(procs))
            contenders.append(_Contender(f"{procs} workers", server, _request("echo_now"), target))
        yield from _Comparison("connect", load, "rate", "/s").rows(bench, bare, contenders)


def pipelined(bench: Bench) -> Iterator[Row]:
    """Compare the rates of 64 connections with 64 requests in flight on each."""
    comparison = _Comparison("pipelined", Load(connections=64, depth=64), "rate", "/s")
    limits = {"echo_now": at_least(0.8), "echo_thread": at_least(0.55)}
    # A stand-in for the daemon knows no ids.
    return _functions(bench, comparison, limits, with_ids=not bench.is_calibration)


def latency(bench: Bench) -> Iterator[Row]:
    """Compare the latencies of one request at a time on one connection."""
    comparison = _Comparison("latency", Load(), "p50_us", " us")
    limits = {"echo_now": at_most(1.3), "echo_thread": at_most(1.6)}
    return _functions(bench, comparison, limits, with_ids=False)


def _functions(
    bench: Bench, comparison: _Comparison, limits: dict[str, Target], *, with_ids: bool
) -> Iterator[Row]:
    """Compare functions of one daemon with two workers."""
    with ExitStack() as stack:
        bare = stack.enter_context(BareServer(bench.directory))
        taskd = stack.enter_context(bench.taskd(2))
        contenders = [
            _Contender(function, taskd, _request(function, with_ids=with_ids), target)
            for function, target in limits.items()
        ]
        yield from comparison.rows(bench, bare, contenders)
