"""
The sections about tasks that wait: spread, behind, mixed, limit, replace.

Where an ideal can be computed, it is what a pool of that many workers would take
that share one queue and lose no time; the figure is the ratio to it.
"""

from __future__ import annotations

import heapq
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from statistics import median
from threading import Timer

from bench import Bench
from crowd import Ask, Outcome, ask_all
from errors import BenchmarkError
from report import Row, at_most
from servers import Caller, TaskdServer

__all__ = ["behind", "limit", "mixed", "replace", "spread"]

NAP_SECONDS = 0.25
LONG_SECONDS = 5.0
LEAD_SECONDS = 0.02

MIX = ((0.90, 0.001), (0.09, 0.050), (0.01, 1.0))
"""Shares of the tasks, and the seconds that each takes."""

UTILISATION = 0.7
MIX_SECONDS = 12.0

STEADY_RATE = 1000.0
STEADY_SECONDS = 6.0


def spread(bench: Bench) -> Iterator[Row]:
    """Time a crowd of equal tasks over new connections, a few open ones, and one."""
    for procs, tasks in ((16, 64), (100, 400)):
        ideal = tasks / procs * NAP_SECONDS
        with TaskdServer(bench.directory, procs) as server:
            for connections, name in ((tasks, "each"), (16, "16"), (1, "1")):
                samples = [
                    _seconds_for(server.port, tasks, connections) / ideal
                    for _ in range(bench.rounds)
                ]
                yield Row(
                    section="spread",
                    name=f"{tasks} tasks, {procs} workers, {name} conn.",
                    unit="x ideal",
                    samples=samples,
                    target=at_most(1.05),
                    detail=f"{median(samples) * ideal:.3f} s; ideal {ideal:.3f} s",
                )


def _seconds_for(port: int, tasks: int, connections: int) -> float:
    outcomes = ask_all(port, [Ask(0.0, "nap", (NAP_SECONDS,))] * tasks, connections)
    return max(_good_seconds(outcomes))


def behind(bench: Bench) -> Iterator[Row]:
    """Time quick tasks that come behind a long one on the same connection."""
    quick = [Ask(LEAD_SECONDS, "echo_thread", (n,)) for n in range(100)]
    with TaskdServer(bench.directory, 16) as server:
        samples = []
        for _ in range(bench.rounds):
            outcomes = ask_all(server.port, [Ask(0.0, "nap", (LONG_SECONDS,)), *quick], 1)
            samples.append(max(_good_seconds(outcomes)[1:]) * 1e3)
    yield Row(
        section="behind",
        name="100 quick behind one of 5 s",
        unit="ms",
        samples=samples,
        target=at_most(50),
        detail="until the last of them is answered",
    )


def mixed(bench: Bench) -> Iterator[Row]:
    """Load a pool to 70 % with tasks of very different lengths; look at the quick ones."""
    rounds, _, detail = _mix(bench, 64)
    yield Row(
        section="mixed",
        name="p99 / p50 of the quick, 64 workers",
        unit="x",
        samples=[p99 / p50 for p50, p99 in rounds],
        target=at_most(3),
        detail=detail,
    )
    rounds, ideal, detail = _mix(bench, 16)
    yield Row(
        section="mixed",
        name="p99 of the quick, 16 workers",
        unit="x ideal",
        samples=[p99 / ideal for _, p99 in rounds],
        target=at_most(1.5),
        detail=detail,
    )


def _mix(bench: Bench, procs: int) -> tuple[list[tuple[float, float]], float, str]:
    """Return the quick tasks' p50 and p99 of each round, their ideal p99, and all in words."""
    trace = _trace(procs, seed=procs)
    ideal = _percentile(_quick(trace, _ideal_seconds(trace, procs)), 0.99)
    rounds = []
    with TaskdServer(bench.directory, procs) as server:
        for _ in range(bench.rounds):
            outcomes = ask_all(server.port, [Ask(at, "nap", (s,)) for at, s in trace], 16)
            quick = _quick(trace, _good_seconds(outcomes))
            rounds.append((_percentile(quick, 0.5), _percentile(quick, 0.99)))
    detail = "\n".join(
        f"p50 {p50 * 1e3:.1f}, p99 {p99 * 1e3:.1f} ms; ideal p99 {ideal * 1e3:.1f} ms"
        for p50, p99 in rounds
    )
    return rounds, ideal, detail


def _trace(procs: int, seed: int) -> list[tuple[float, float]]:
    """Draw arrivals and lengths: a Poisson stream that keeps 70 % of the workers busy."""
    dice = random.Random(seed)  # noqa: S311 (a load, not a secret)
    rate = UTILISATION * procs / sum(share * seconds for share, seconds in MIX)
    shares, lengths = zip(*MIX, strict=True)
    trace, at = [], 0.0
    while (at := at + dice.expovariate(rate)) < MIX_SECONDS:
        trace.append((at, dice.choices(lengths, shares)[0]))
    return trace


def _ideal_seconds(trace: Sequence[tuple[float, float]], procs: int) -> list[float]:
    """Compute what the same tasks would take in an M/G/k queue: first come, first served."""
    free = [0.0] * procs
    seconds = []
    for at, length in trace:
        began = max(at, heapq.heappop(free))
        heapq.heappush(free, began + length)
        seconds.append(began + length - at)
    return seconds


def _quick(trace: Sequence[tuple[float, float]], seconds: Sequence[float]) -> list[float]:
    return [s for (_, length), s in zip(trace, seconds, strict=True) if length == MIX[0][1]]


def limit(bench: Bench) -> Iterator[Row]:
    """Time how long a pool of one worker is away when its only thread is lost to a time limit."""
    with TaskdServer(bench.directory, 1) as server:
        samples = [_absence_ms(server.port) for _ in range(3 * bench.rounds)]
    yield Row(
        section="limit",
        name="absence after a time limit",
        unit="ms",
        samples=samples,
        target=at_most(50),
        detail="from the answer time-limit to the next task's reply, one worker",
    )
    with TaskdServer(bench.directory, 8) as server:
        samples = [_recovery_ms(server) for _ in range(3 * bench.rounds)]
    yield Row(
        section="limit",
        name="whole again after kill -9",
        unit="ms",
        samples=samples,
        target=at_most(100),
        detail="from the signal until all of 8 workers serve again",
    )


def _absence_ms(port: int) -> float:
    with Caller(port) as stuck, Caller(port) as next_one:
        reply = stuck.send("nap_limited", [LONG_SECONDS])
        if reply.get("error", {}).get("code") != "time-limit":
            raise BenchmarkError(f"a time limit was expected, not {reply}")
        began = time.perf_counter()
        next_one.ask("echo_thread")
        return (time.perf_counter() - began) * 1e3


def _recovery_ms(server: TaskdServer) -> float:
    time.sleep(1.1)  # one that dies within a second of its start is replaced later, on purpose
    with Caller(server.port) as caller:
        status = caller.ask("taskd.status")
        victim = next(w for w in status["workers"] if w["worker"] != status["answered_by"])
        began = time.perf_counter()
        os.kill(victim["pid"], signal.SIGKILL)
        while True:
            workers = caller.ask("taskd.status")["workers"]
            serving = {w["pid"] for w in workers if w["state"] in ("idle", "busy")}
            if len(serving - {victim["pid"]}) == server.procs:
                return (time.perf_counter() - began) * 1e3


def replace(bench: Bench) -> Iterator[Row]:
    """Replace every worker under a steady load, and count what that costs its callers."""
    asks = [
        Ask(n / STEADY_RATE, "echo_thread", (n,)) for n in range(int(STEADY_SECONDS * STEADY_RATE))
    ]
    for name, options, is_reload in (
        ("nothing is replaced", (), False),
        ("a reload", (), True),
        ("recycling by --max-tasks", ("--max-tasks=300",), False),
    ):
        lost, details = [], []
        with TaskdServer(bench.directory, 8, *options) as server:
            for _ in range(bench.rounds):
                if is_reload:
                    Timer(STEADY_SECONDS / 2, os.kill, (server.pid, signal.SIGHUP)).start()
                outcomes = ask_all(server.port, asks, 8)
                lost.append(float(sum(not outcome.is_good for outcome in outcomes)))
                seconds = [o.seconds for o in outcomes if o.seconds is not None]
                with Caller(server.port) as caller:
                    restarts = caller.ask("taskd.status")["totals"]["restarts"]
                details.append(
                    f"p50 {_percentile(seconds, 0.5) * 1e3:.2f}, "
                    f"p99 {_percentile(seconds, 0.99) * 1e3:.2f}, max {max(seconds) * 1e3:.1f} ms; "
                    f"replaced so far: {sum(restarts.values())}"
                )
        yield Row(
            section="replace",
            name=f"{name}: lost or failed",
            unit="tasks",
            samples=lost,
            target=at_most(0),
            detail="\n".join(details),
        )


def _good_seconds(outcomes: Sequence[Outcome]) -> list[float]:
    seconds = [o.seconds for o in outcomes if o.is_good and o.seconds is not None]
    if len(seconds) < len(outcomes):
        errors = {o.error or "no reply" for o in outcomes if not o.is_good}
        raise BenchmarkError(f"{len(outcomes) - len(seconds)} requests failed: {errors}")
    return seconds


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
