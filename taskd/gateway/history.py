"""
What the last minutes were like: samples made of what the daemons told, one a second.

The daemons count for ever, so a rate is the difference of two looks; and a daemon
that was started again counts from zero, which is no negative rate. No I/O here; the
time is an argument.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

__all__ = ["History", "is_readable", "percentiles"]

_KEPT_SAMPLES: Final = 300
_LATENCY_SAMPLES: Final = 10
"""Latencies are those of the tasks that ended within so many samples."""

_STATES: Final = ("starting", "idle", "busy", "draining")
_SHARES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


_COUNT: Final = (int, float)
_TOO_LARGE: Final = 2**63
"""No count comes to that; sums and doubles of what is larger could fail."""
_COUNTS: Final[dict[str, Any]] = {"": _COUNT}
"""A shape: any number of names, and a number for each."""

_SHAPE: Final[dict[str, Any]] = {
    "queue": {
        "waiting": _COUNT,
        "oldest_seconds": (int, float, type(None)),
        "handed_over": _COUNT,
        "refused": _COUNT,
        "expired": _COUNT,
    },
    "supervisor": {"uptime": _COUNT},
    "totals": {
        "workers": _COUNTS,
        "restarts": _COUNTS,
        "done": _COUNT,
        "failed": _COUNT,
        "connections": _COUNT,
        "accepted": _COUNT,
        "in_flight": _COUNT,
    },
    "workers": [{"latency": _COUNTS}],
    "functions": [
        {
            "name": (str,),
            "done": _COUNT,
            "failed": _COUNT,
            "errors": _COUNTS,
            "seconds": _COUNT,
            "latency": _COUNTS,
        }
    ],
}
"""What a daemon's status is taken to be, as far as it has these members."""

_LONGEST_BOUND: Final = 19
_NEEDED: Final = frozenset({"name", "done", "failed"})
"""What each of ``functions`` has."""


def is_readable(status: Any) -> bool:
    """Tell whether what a daemon has told can be a status; it may be of any version."""
    return (
        _fits(status, _SHAPE)
        and all(function.keys() >= _NEEDED for function in status.get("functions", ()))
        and all(
            bound.isascii() and bound.isdecimal() and len(bound) < _LONGEST_BOUND
            for name in ("functions", "workers")
            for one in status.get(name, ())
            for bound in one.get("latency", ())
        )
    )


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(one, shape[0]) for one in value)
    if shape is _COUNTS:
        return isinstance(value, dict) and all(_fits(one, _COUNT) for one in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            _fits(value[name], inner) for name, inner in shape.items() if name in value
        )
    if isinstance(value, int | float) and not 0 <= value < _TOO_LARGE:
        return False
    return isinstance(value, shape) and not isinstance(value, bool)


class _Look(NamedTuple):
    """What one daemon had counted at one time."""

    at: float
    done: int
    failed: int
    latency: Counter[int]


class History:
    """
    Samples of all daemons together, the oldest first.

    Attributes:
        samples: The last five minutes, at one a second.
    """

    def __init__(self) -> None:
        self.samples: deque[dict[str, Any]] = deque(maxlen=_KEPT_SAMPLES)
        self._looks: dict[str, _Look] = {}
        self._ended: deque[Counter[int]] = deque(maxlen=_LATENCY_SAMPLES)

    def add(
        self, now: float, at: float, statuses: Mapping[str, Mapping[str, Any] | None]
    ) -> dict[str, Any]:
        """
        Make a sample.

        Args:
            now: Seconds that never go back.
            at: UTC epoch seconds.
            statuses: By daemon what ``taskd.status`` told, or None.

        Returns:
            ``at``, ``waiting``, ``workers`` by state, ``done`` and ``failed`` a
            second, ``latency`` (``p50``, ``p95``, ``p99`` in seconds, or None).
        """
        told = {name: status for name, status in statuses.items() if status is not None}
        done = failed = 0.0
        ended: Counter[int] = Counter()
        for name, status in told.items():
            look, before = _look_at(now, status), self._looks.get(name)
            self._looks[name] = look
            if before is not None and now > before.at:
                seconds = now - before.at  # longer, if it did not answer in between
                done += max(0, look.done - before.done) / seconds
                failed += max(0, look.failed - before.failed) / seconds
                ended += look.latency - before.latency  # which leaves out what is below zero
        self._ended.append(ended)
        sample = {
            "at": round(at, 3),
            "waiting": sum(status.get("queue", {}).get("waiting", 0) for status in told.values()),
            "workers": {
                state: sum(
                    status.get("totals", {}).get("workers", {}).get(state, 0)
                    for status in told.values()
                )
                for state in _STATES
            },
            "done": round(done, 3),
            "failed": round(failed, 3),
            "latency": percentiles(sum(self._ended, Counter())),
        }
        if told:
            self.samples.append(sample)
        return sample


def _look_at(now: float, status: Mapping[str, Any]) -> _Look:
    """Take down what a daemon has counted; its own functions, this look too, are no work."""
    functions = status.get("functions")
    if functions is None:  # an older daemon
        totals = status.get("totals", {})
        workers = status.get("workers", ())
        return _Look(now, totals.get("done", 0), totals.get("failed", 0), _latencies(workers))
    return _Look(
        now,
        sum(function["done"] for function in functions),
        sum(function["failed"] for function in functions),
        _latencies(functions),
    )


def _latencies(each: Iterable[Mapping[str, Any]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for one in each:
        for bound, count in one.get("latency", {}).items():
            found[int(bound)] += count
    return found


def percentiles(counts: Mapping[int, int]) -> dict[str, float | None]:
    """
    Estimate percentiles from a histogram.

    Args:
        counts: How many, by upper bound in microseconds; each bound is twice the
            one before.

    Returns:
        ``p50``, ``p95`` and ``p99`` in seconds, None if there is nothing; within a
        bucket they are placed as if its values were spread evenly on a logarithmic scale.
    """
    total = sum(counts.values())
    found: dict[str, float | None] = {}
    for name, share in _SHARES.items():
        wanted, seen = share * total, 0
        found[name] = None
        for bound, count in sorted(counts.items()):
            if count and seen + count >= wanted:
                part = (wanted - seen) / count
                found[name] = round(bound / 2 * math.exp2(part) / 1e6, 7)
                break
            seen += count
    return found
