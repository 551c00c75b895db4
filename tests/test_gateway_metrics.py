"""What Prometheus is told, read back as Prometheus reads it."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families
from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.figures import COUNTERS, GAUGES
from taskd.gateway.metrics import exposition

NO_FIGURES = dict.fromkeys([*GAUGES, *COUNTERS], 0)

STATUS: dict[str, Any] = {
    "supervisor": {"uptime": 12.5},
    "queue": {
        "waiting": 4,
        "oldest_seconds": 1.5,
        "handed_over": 5,
        "refused": 6,
        "expired": 7,
    },
    "totals": {
        "workers": {"starting": 0, "idle": 3, "busy": 2, "draining": 1},
        "restarts": {"died": 8, "max_tasks": 9},
        "connections": 10,
        "accepted": 11,
        "in_flight": 12,
    },
    "functions": [
        {
            "name": "send_mail",
            "done": 20,
            "failed": 3,
            "errors": {"task-failed": 2, "time-limit": 1},
            "seconds": 2.25,
            "latency": {"64": 1, "128": 2, "256": 3, "512": 4, "1073741824": 5},
        },
    ],
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

ACCEPTS = (
    *("", "*/*", "text/plain", "application/openmetrics-text"),
    "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1",
)


def samples_of(
    statuses: dict[str, Any], figures: dict[str, int] | None = None, accept: str = ""
) -> Samples:
    """Write metrics, and read them back."""
    text, kind = exposition(statuses, figures or NO_FIGURES, accept)
    parse = open_families if "openmetrics" in kind else text_string_to_metric_families
    found: Samples = {}
    for family in parse(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def key_of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


class MetricsTests(SynchronousTestCase):
    def assertTold(self, found: Samples, name: str, value: float, **labels: str) -> None:
        self.assertEqual(found.get(key_of(name, **labels)), value, (name, labels))

    def test_a_daemon(self) -> None:
        """All that a daemon tells is told on, under its name, in both of Prometheus's formats."""
        for accept in ACCEPTS:
            found = samples_of({"n": STATUS}, accept=accept)
            for name, value in (
                ("taskd_up", 1),
                ("taskd_connections", 10),
                ("taskd_connections_accepted_total", 11),
                ("taskd_tasks_in_flight", 12),
                ("taskd_uptime_seconds", 12.5),
                ("taskd_queue_waiting", 4),
                ("taskd_queue_oldest_seconds", 1.5),
                ("taskd_queue_handed_over_total", 5),
                ("taskd_queue_refused_total", 6),
                ("taskd_queue_expired_total", 7),
            ):
                self.assertTold(found, name, value, node="n")
            for state, count in (("starting", 0), ("idle", 3), ("busy", 2), ("draining", 1)):
                self.assertTold(found, "taskd_workers", count, node="n", state=state)
            for cause, count in (("died", 8), ("max_tasks", 9)):
                self.assertTold(found, "taskd_worker_restarts_total", count, node="n", cause=cause)
            for outcome, count in (("done", 20), ("task-failed", 2), ("time-limit", 1)):
                self.assertTold(
                    found,
                    "taskd_tasks_total",
                    count,
                    node="n",
                    function="send_mail",
                    outcome=outcome,
                )

    def test_the_histogram(self) -> None:
        """A bucket counts all that took no longer, the last one all, and there is their sum."""
        found = samples_of({"n": STATUS})
        labels = {"node": "n", "function": "send_mail"}
        for bound, count in (
            ("0.000128", 3),
            ("0.000512", 10),
            ("0.002048", 10),
            ("536.870912", 10),
            ("+Inf", 15),
        ):
            self.assertTold(found, "taskd_task_seconds_bucket", count, le=bound, **labels)
        self.assertTold(found, "taskd_task_seconds_sum", 2.25, **labels)
        self.assertTold(found, "taskd_task_seconds_count", 15, **labels)

    def test_a_daemon_that_does_not_answer(self) -> None:
        """Of a daemon that does not answer just that is told."""
        found = samples_of({"n": None, "m": STATUS})
        about = {name: value for (name, labels), value in found.items() if ("node", "n") in labels}
        self.assertEqual(about, {"taskd_up": 0.0})
        self.assertTold(found, "taskd_up", 1, node="m")

    def test_an_older_daemon(self) -> None:
        """A daemon that tells less has what it does not tell at zero."""
        found = samples_of({"n": {"queue": {"oldest_seconds": None}}})
        self.assertTold(found, "taskd_up", 1, node="n")
        self.assertTold(found, "taskd_queue_oldest_seconds", 0, node="n")
        self.assertTold(found, "taskd_uptime_seconds", 0, node="n")

    def test_the_gateway(self) -> None:
        """Every figure of the gateway's own is told, refusals by reason."""
        figures = {name: 100 + n for n, name in enumerate([*GAUGES, *COUNTERS])}
        for accept in ACCEPTS:
            found = samples_of({}, figures, accept)
            self.assertEqual(len(found), len(figures))
            for name, value in figures.items():
                if name in GAUGES:
                    self.assertTold(found, f"taskd_gateway_{name}", value)
                elif name.startswith("refused_"):
                    reason = name.removeprefix("refused_")
                    self.assertTold(found, "taskd_gateway_refused_total", value, reason=reason)
                else:
                    self.assertTold(found, f"taskd_gateway_{name}_total", value)

    def test_content_types(self) -> None:
        """Prometheus gets the format that it asks for, and others the plain one."""
        for accept in ACCEPTS:
            _, kind = exposition({}, NO_FIGURES, accept)
            wanted = "application/openmetrics-text" if "open" in accept else "text/plain"
            self.assertEqual(kind.partition(";")[0], wanted, accept)

    def test_names(self) -> None:
        """Names are Prometheus's kind: a prefix, base units, _total for counters alone, help."""
        text, _ = exposition({"n": STATUS}, NO_FIGURES, "")
        for family in text_string_to_metric_families(text.decode()):
            name = family.name
            self.assertRegex(name, r"^taskd(_[a-z]+)+$")
            self.assertTrue(family.documentation.endswith("."), name)
            for word in ("ms", "millis", "micros", "minutes", "kb", "mb", "gauge", "counter"):
                self.assertNotIn(word, name.split("_"))
            for ending in ("_total", "_count", "_sum", "_bucket", "_info"):
                self.assertFalse(name.endswith(ending), name)
            for sample in family.samples:
                self.assertIs(sample.name.endswith("_total"), family.type == "counter")
                for label in sample.labels:
                    self.assertRegex(label, r"^[a-z]+$")
                    self.assertNotIn(label, name.split("_"))
        self.assertEqual(text[-1:], b"\n")

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
                st.text('"\\\n{},=#é …\r', max_size=8),
            ),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    def test_hostile_names(self, names: list[str]) -> None:
        """A function's name, whatever is in it, stays one label and makes no line of its own."""
        functions = [
            {"name": name, "done": 1, "failed": 0, "errors": {}, "seconds": 0.5, "latency": {}}
            for name in names
        ]
        honest = functions_called("honest" * len(names), len(names))
        text, _ = exposition({"n": {"functions": functions}}, NO_FIGURES, "")
        plain, _ = exposition({"n": {"functions": honest}}, NO_FIGURES, "")
        self.assertEqual(text.count(b"\n"), plain.count(b"\n"))
        for line in text.decode().split("\n"):
            self.assertRegex(line, r"^(# (HELP|TYPE) )?taskd_|^$")
        if not any(re.search(r"[\n\r\\]|[^\x20-\x7e]", name) for name in names):
            found = samples_of({"n": {"functions": functions}})
            for name in names:
                self.assertTold(
                    found, "taskd_tasks_total", 1, node="n", function=name, outcome="done"
                )

    def test_escapes(self) -> None:
        """What has to be escaped in a label comes back as it was."""
        name = 'a"b\\c\nd{e="f"} 7\n# TYPE taskd_up counter'
        functions = [{**functions_called("x", 1)[0], "name": name}]
        for accept in ("", "application/openmetrics-text"):
            found = samples_of({"n": {"functions": functions}}, accept=accept)
            self.assertTold(found, "taskd_tasks_total", 1, node="n", function=name, outcome="done")
            self.assertTold(found, "taskd_up", 1, node="n")


def functions_called(prefix: str, count: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{prefix}{n}",
            "done": 1,
            "failed": 0,
            "errors": {},
            "seconds": 0.5,
            "latency": {},
        }
        for n in range(count)
    ]
