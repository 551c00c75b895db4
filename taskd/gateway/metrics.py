"""
What Prometheus is told: the daemons' status, and the gateway's own figures, as metrics.

Names, units and suffixes follow Prometheus's own rules; how they are written down is
prometheus-client's. No I/O here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from taskd.gateway.figures import COUNTERS, GAUGES

__all__ = ["exposition"]

_REFUSALS: Final = tuple(name for name in COUNTERS if name.startswith("refused_"))

_HELP: Final = {
    "processes": "Processes of the gateway.",
    "websockets": "Open WebSockets.",
    "in_flight": "Calls that somebody waits for.",
    "outstanding": "Calls that no daemon has answered yet, whether or not somebody waits.",
    "opened": "WebSockets that were opened.",
    "messages": "Messages that came over WebSockets.",
    "http_calls": "Calls that came over HTTP.",
    "failed": "Calls that were answered with an error.",
    "silent": "WebSockets that were dropped because no sign of life came.",
}


class _Collector:
    """Gives the metrics of one moment."""

    def __init__(
        self, statuses: Mapping[str, Mapping[str, Any] | None], figures: Mapping[str, int]
    ) -> None:
        self._statuses = statuses
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("taskd_up", "Whether the daemon answers.", labels=["node"])
        for node, status in self._statuses.items():
            up.add_metric([node], float(status is not None))
        yield up
        told = {node: status for node, status in self._statuses.items() if status is not None}
        yield from _of_pool(told)
        yield from _of_queue(told)
        yield from _of_tasks(told)
        yield from _of_gateway(self._figures)


def exposition(
    statuses: Mapping[str, Mapping[str, Any] | None], figures: Mapping[str, int], accept: str
) -> tuple[bytes, str]:
    """
    Write all metrics.

    Args:
        statuses: By daemon what ``taskd.status`` told, or None if it did not answer.
        figures: What the gateway counts.
        accept: The Accept header, which chooses between Prometheus's formats.

    Returns:
        The text, and its content type.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(statuses, figures))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


_Statuses = Mapping[str, Mapping[str, Any]]


def _of_pool(statuses: _Statuses) -> Iterator[Metric]:
    workers = GaugeMetricFamily("taskd_workers", "Workers by state.", labels=["node", "state"])
    connections = GaugeMetricFamily("taskd_connections", "Connections of callers.", labels=["node"])
    accepted = CounterMetricFamily(
        "taskd_connections_accepted", "Connections that callers have made.", labels=["node"]
    )
    in_flight = GaugeMetricFamily(
        "taskd_tasks_in_flight", "Tasks that workers have taken up.", labels=["node"]
    )
    restarts = CounterMetricFamily(
        "taskd_worker_restarts", "Workers that were replaced, by cause.", labels=["node", "cause"]
    )
    uptime = GaugeMetricFamily(
        "taskd_uptime_seconds", "How long the supervisor has run.", labels=["node"]
    )
    for node, status in statuses.items():
        totals = status.get("totals", {})
        for state, count in totals.get("workers", {}).items():
            workers.add_metric([node, state], count)
        for cause, count in totals.get("restarts", {}).items():
            restarts.add_metric([node, cause], count)
        connections.add_metric([node], totals.get("connections", 0))
        accepted.add_metric([node], totals.get("accepted", 0))
        in_flight.add_metric([node], totals.get("in_flight", 0))
        uptime.add_metric([node], status.get("supervisor", {}).get("uptime", 0.0))
    yield from (workers, connections, accepted, in_flight, restarts, uptime)


def _of_queue(statuses: _Statuses) -> Iterator[Metric]:
    waiting = GaugeMetricFamily(
        "taskd_queue_waiting", "Tasks that wait for a free worker.", labels=["node"]
    )
    oldest = GaugeMetricFamily(
        "taskd_queue_oldest_seconds", "How long the oldest of them has waited.", labels=["node"]
    )
    counters = {
        name: CounterMetricFamily(f"taskd_queue_{name}", text, labels=["node"])
        for name, text in (
            ("handed_over", "Tasks that their worker could not begin, and handed over."),
            ("refused", "Tasks that were refused because the queue was full."),
            ("expired", "Tasks whose time was over before a worker was free."),
        )
    }
    for node, status in statuses.items():
        queue = status.get("queue", {})
        waiting.add_metric([node], queue.get("waiting", 0))
        oldest.add_metric([node], queue.get("oldest_seconds") or 0.0)
        for name, counter in counters.items():
            counter.add_metric([node], queue.get(name, 0))
    yield from (waiting, oldest, *counters.values())


def _of_tasks(statuses: _Statuses) -> Iterator[Metric]:
    tasks = CounterMetricFamily(
        "taskd_tasks",
        "Tasks that were answered, by function and outcome: done, or the error's code.",
        labels=["node", "function", "outcome"],
    )
    seconds = HistogramMetricFamily(
        "taskd_task_seconds", "How long tasks ran.", labels=["node", "function"]
    )
    for node, status in statuses.items():
        for function in status.get("functions", ()):
            name = function["name"]
            tasks.add_metric([node, name, "done"], function["done"])
            for code, count in function.get("errors", {}).items():
                tasks.add_metric([node, name, code], count)
            buckets = _cumulative(function.get("latency", {}))
            seconds.add_metric([node, name], buckets, sum_value=function.get("seconds", 0.0))
    yield from (tasks, seconds)


_BOUNDS: Final = tuple(2**power for power in range(7, 31, 2))
"""In microseconds, 128 us to 18 min: a quarter as many as there are, for the sake of storage."""


def _cumulative(latency: Mapping[str, int]) -> list[tuple[str, float]]:
    """Give a histogram as Prometheus wants it: how many took at most so many seconds."""
    counts = {int(bound): count for bound, count in latency.items()}
    buckets: list[tuple[str, float]] = [
        (str(most / 1e6), float(sum(n for bound, n in counts.items() if bound <= most)))
        for most in _BOUNDS
    ]
    return [*buckets, ("+Inf", float(sum(counts.values())))]


def _of_gateway(figures: Mapping[str, int]) -> Iterable[Metric]:
    for name in GAUGES:
        yield GaugeMetricFamily(f"taskd_gateway_{name}", _HELP[name], value=figures[name])
    for name in COUNTERS:
        if name not in _REFUSALS:
            yield CounterMetricFamily(f"taskd_gateway_{name}", _HELP[name], value=figures[name])
    refused = CounterMetricFamily(
        "taskd_gateway_refused", "What was refused, by reason.", labels=["reason"]
    )
    for name in _REFUSALS:
        refused.add_metric([name.removeprefix("refused_")], figures[name])
    yield refused
