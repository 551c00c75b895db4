"""
Measure taskd beside a bare echo server and hold the figures against their targets.

    python benchmarks/run.py                     everything: six to eight minutes
    python benchmarks/run.py connect latency     some sections
    python benchmarks/run.py --quick             a first impression
    python benchmarks/run.py --calibrate         bare against bare: the noise of the machine

README.rst, beside this file, tells how to read the output.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import QUIET_SHARE, Bench, Section
from burst import burst
from compare import connect, latency, pipelined
from errors import BenchmarkError
from gateway import gateway
from generator import Generator
from machine import CpuUse, describe_machine, foreign_share
from report import Row
from scheduling import behind, limit, mixed, replace, spread
from startup import startup

__all__ = ["main"]

LISTEN_SECONDS = 0.5
"""How long the machine is watched before each section."""

EXIT_MISSED = 1
EXIT_BROKEN = 2

FULL_SECONDS, FULL_WARM_UP_SECONDS, FULL_ROUNDS = 3.0, 1.0, 3
QUICK_SECONDS, QUICK_WARM_UP_SECONDS, QUICK_ROUNDS = 1.0, 0.5, 1

SECTIONS: Mapping[str, Section] = {
    "startup": Section(
        "from the twistd command to all workers ready, and the memory of all processes then",
        startup,
        has_reference=False,
    ),
    "connect": Section("a connection for each task, 8 callers: rate", connect),
    "burst": Section(
        "200 connections that stay, opened at once, 8 workers", burst, has_reference=False
    ),
    "pipelined": Section(
        "64 connections, 64 requests in flight on each, 2 workers, replies by id: rate", pipelined
    ),
    "latency": Section("1 connection, 1 request at a time, 2 workers: median latency", latency),
    "spread": Section(
        "a crowd of tasks of 0.25 s, by connections: time until the last reply, beside the ideal",
        spread,
        has_reference=False,
    ),
    "behind": Section(
        "quick tasks behind a long one on the same connection", behind, has_reference=False
    ),
    "mixed": Section(
        "90 % of 1 ms, 9 % of 50 ms, 1 % of 1 s, together 70 % of what the workers can do",
        mixed,
        has_reference=False,
    ),
    "limit": Section(
        "a worker whose thread is lost to a time limit, and one that is killed",
        limit,
        has_reference=False,
    ),
    "replace": Section(
        "1000 tasks/s over 8 connections while all 8 workers are replaced",
        replace,
        has_reference=False,
    ),
    "gateway": Section(
        "5000 WebSockets that stay, and the round trip of one beside that of a line, 2 workers",
        gateway,
        has_reference=False,
    ),
}


def _section(name: str) -> str:
    if name not in SECTIONS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SECTIONS)}")
    return name


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0.1 and 600")
    return value


def _parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description="Measure taskd beside a bare echo server."
    )
    parser.add_argument(
        "sections",
        metavar="SECTION",
        nargs="*",
        type=_section,
        default=list(SECTIONS),
        help=f"one or more of {', '.join(SECTIONS)}; all of them by default",
    )
    parser.add_argument("--rounds", type=_count, help="repetitions (default 3, quick: 1)")
    parser.add_argument("--seconds", type=_seconds, help="of one measurement (default 3, quick: 1)")
    parser.add_argument("--quick", action="store_true", help="short runs, more noise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="put a second bare server in the daemon's place: the ratios should be 1",
    )
    return parser.parse_args(arguments)


def _run_sections(bench: Bench, names: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Run the sections, print each as it ends; return the rows and what broke."""
    rows: list[Row] = []
    failures: list[str] = []
    for name in names:
        section = SECTIONS[name]
        if bench.is_calibration and not section.has_reference:
            continue
        print(f"\n{name}: {section.title}", flush=True)
        _warn_if_not_quiet()
        try:
            for row in section.measure(bench):
                rows.append(row)
                print(row.as_text(), flush=True)
        except (BenchmarkError, OSError) as error:
            failures.append(f"{name}: {error}")
            print(f"  BROKEN  {error}", flush=True)
    return rows, failures


def _warn_if_not_quiet() -> None:
    before = CpuUse.until_now()
    time.sleep(LISTEN_SECONDS)
    share = foreign_share(before, CpuUse.until_now())
    if share > QUIET_SHARE:
        print(f"  warning: something else is using {share:.0%} of all cores", flush=True)


def _exit_on_signals() -> None:
    """Turn the first signal into an exception, so that every server is stopped on the way out."""

    def leave(number: int, _frame: object) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, leave)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    Args:
        arguments: The command line without the program; by default the real one.

    Returns:
        The exit status: 0, 1 if a target was missed, 2 if something could not be measured.
    """
    options = _parse_options(sys.argv[1:] if arguments is None else arguments)
    _exit_on_signals()
    try:
        return _run(options)
    except BenchmarkError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return EXIT_BROKEN


def _run(options: argparse.Namespace) -> int:
    seconds = options.seconds or (QUICK_SECONDS if options.quick else FULL_SECONDS)
    warm_up_seconds = QUICK_WARM_UP_SECONDS if options.quick else FULL_WARM_UP_SECONDS
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else FULL_ROUNDS)
    machine = describe_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"rounds: {rounds} of {seconds:g} s; the median of the rounds, (their range), the target")
    if options.calibrate:
        print("calibration: a second bare server is in the place of each daemon")
    with tempfile.TemporaryDirectory(prefix="taskd-bench-") as name:
        directory = Path(name)
        generator = Generator(directory, seconds=seconds, warm_up_seconds=warm_up_seconds)
        bench = Bench(directory, generator, rounds, options.calibrate)
        rows, failures = _run_sections(bench, options.sections)
    missed = [row for row in rows if not row.has_passed]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} targets reached")
    if options.json is not None:
        report = {
            "machine": machine,
            "rounds": rounds,
            "seconds": seconds,
            "calibration": options.calibrate,
            "rows": [row.as_json() for row in rows],
            "failures": failures,
        }
        options.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if failures:
        return EXIT_BROKEN
    return EXIT_MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
