"""The dashboard's files: what ``dashboard.js`` knows without a document, in Node.js."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from twisted.trial.unittest import SynchronousTestCase

from taskd.gateway.history import percentiles

DASHBOARD: Final = Path(str(files("taskd.gateway"))) / "dashboard"
SCRIPT: Final = DASHBOARD / "dashboard.js"

NONE: Final = "\N{EN DASH}"
"""What stands where nothing is known."""

_PROGRAM: Final = """
const page = require(process.argv[1]);
const plain = (_, value) => (value instanceof Map ? [...value] : value);
const {name, calls} = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(calls.map((args) => page[name](...args)), plain));
"""

_SECONDS: Final = 30.0


class ScriptTestCase(SynchronousTestCase):
    """Base of tests that have Node.js run a function of ``dashboard.js``."""

    def node(self, *words: str, told: str = "") -> str:
        """Run Node.js, and give what it writes."""
        program = shutil.which("node")
        if program is None:
            self.fail("there is no node to try dashboard.js with: apt-get install nodejs")
        ended = subprocess.run(
            [program, *words], input=told, capture_output=True, text=True, timeout=_SECONDS
        )
        self.assertEqual(ended.returncode, 0, ended.stderr)
        return ended.stdout

    def call(self, name: str, *calls: Any) -> list[Any]:
        """Call a function once for each list of arguments, and give its results."""
        # JSON has no infinity, but numbers that are too long come to it.
        told = json.dumps({"name": name, "calls": calls}).replace("Infinity", "1e999")
        return json.loads(self.node("-e", _PROGRAM, str(SCRIPT), told=told))

    def assert_results(self, name: str, cases: dict[Any, Any]) -> None:
        """A function of one argument gives these results."""
        results = self.call(name, *([argument] for argument in cases))
        self.assertEqual(dict(zip(cases, results, strict=True)), cases)


class WordTests(ScriptTestCase):
    def test_syntax(self) -> None:
        """It is JavaScript."""
        self.node("--check", str(SCRIPT))

    def test_visible(self) -> None:
        """What steers or hides is written out, everything else is left as it is."""
        cases = {
            "plain <b>text</b> & more": "plain <b>text</b> & more",
            "çãé 漢字 🙂": "çãé 漢字 🙂",
            "a\tb\nc\rd\0": "a⟨TAB⟩b⟨LF⟩c⟨CR⟩d⟨NUL⟩",
            "\x1b[31m\x7f\x85": "⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩",
            "\u202egnp.exe": "⟨U+202E⟩gnp.exe",
            "\u2066\u2069\u200f\u061c": "⟨U+2066⟩⟨U+2069⟩⟨U+200F⟩⟨U+061C⟩",
            "\u200b\ufeff\u00ad\u3164": "⟨U+200B⟩⟨U+FEFF⟩⟨U+00AD⟩⟨U+3164⟩",
            "\u2028\u2029": "⟨U+2028⟩⟨U+2029⟩",
            "\U000e0041\ue000": "⟨U+E0041⟩⟨U+E000⟩",
            "\ud800x": "⟨U+D800⟩x",
            "": "",
        }
        self.assert_results("visible", cases)

    def test_visible_cut(self) -> None:
        """A long text is cut, not in the midst of a character, and shows that it was."""
        results = self.call(
            "visible",
            ["x" * 8192],
            ["abcdef", 3],
            ["abc", 3],
            ["ab🙂d", 3],
            [None],
            [7],
            [{}],
        )
        self.assertEqual(results[0], "x" * 4000 + "…")
        self.assertEqual(results[1:], ["abc…", "abc", "ab…", "null", "7", "[object Object]"])

    def test_count(self) -> None:
        """Counts are whole, and short."""
        self.assert_results(
            "count",
            {
                0: "0",
                7: "7",
                1234: "1,234",
                9999999: "9,999,999",
                12345678: "12.3 M",
                None: NONE,
                "7": NONE,
                float("inf"): NONE,
            },
        )

    def test_rate(self) -> None:
        """Rates have a decimal where it matters, and what is not zero is not shown as zero."""
        self.assert_results(
            "rate",
            {0: "0", 0.001: "< 0.1", 0.3: "0.3", 9.44: "9.4", 10: "10", 148.6: "149", None: NONE},
        )

    def test_share(self) -> None:
        """Shares are per cent; of nothing there is none."""
        results = self.call(
            "share", [0, 10], [1, 3], [1, 10], [1, 5000], [5, 5], [0, 0], [None, 5], [1, None]
        )
        self.assertEqual(results, ["0 %", "33 %", "10 %", "< 0.1 %", "100 %", NONE, NONE, NONE])

    def test_duration(self) -> None:
        """Durations have three digits at most, and the unit that fits."""
        self.assert_results(
            "duration",
            {
                0.0: "0 µs",
                1.2e-5: "12 µs",
                0.0012: "1.2 ms",
                0.0999: "100 ms",
                0.4567: "457 ms",
                1.234: "1.23 s",
                12.34: "12.3 s",
                300.0: "5.0 min",
                7200.0: "2.0 h",
                None: NONE,
            },
        )

    def test_elapsed(self) -> None:
        """What goes on is told in whole seconds, the two largest units of it."""
        self.assert_results(
            "elapsed",
            {
                0.2: "< 1 s",
                1.9: "1 s",
                61: "1 min 1 s",
                3600: "1 h 0 min",
                90061: "1 d 1 h",
                None: NONE,
            },
        )


class FigureTests(ScriptTestCase):
    def test_percentile(self) -> None:
        """Percentiles are those of the gateway's history, which has the same buckets."""
        for counts in (
            {1024: 10},
            {64: 90, 1024: 9, 65536: 1},
            {2: 1, 2**31: 1},
            {2**power: power for power in range(1, 32)},
        ):
            wanted = percentiles(counts)
            got = self.call("percentile", *([counts, share] for share in (0.5, 0.95, 0.99)))
            for (name, value), other in zip(wanted.items(), got, strict=True):
                assert value is not None
                self.assertAlmostEqual(value, other, delta=value * 0.001 + 1e-7, msg=name)
        self.assertEqual(
            self.call("percentile", [{}, 0.5], [None, 0.5], [{"x": 1, "8": 0}, 0.5]), [None] * 3
        )

    def node_of(self, name: str, *functions: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"name": name, "error": None, "status": {"functions": functions}, **more}

    def test_sum_functions(self) -> None:
        """Functions of all daemons are summed by name, odd names too; one may be away."""
        one = {
            "name": "add",
            "done": 3,
            "failed": 1,
            "errors": {"task-failed": 1},
            "seconds": 2.0,
            "latency": {"1024": 4},
        }
        other = {**one, "errors": {"time-limit": 1}, "done": 5, "failed": 3}
        odd = {**one, "name": "__proto__", "done": 0, "failed": 0, "errors": {}, "latency": {}}
        nodes = [
            self.node_of("a", one, odd),
            self.node_of("b", other),
            {"name": "c", "status": None, "error": "away"},
            {"name": "d", "status": {}},
        ]
        (sums,) = self.call("sumFunctions", [nodes])
        self.assertEqual([entry["name"] for entry in sums], ["add", "__proto__"])
        add, nothing = sums
        self.assertEqual((add["done"], add["failed"], add["calls"]), (8, 4, 12))
        self.assertAlmostEqual(add["share"], 1 / 3)
        self.assertAlmostEqual(add["mean"], 4 / 12)
        self.assertEqual(dict(add["errors"]), {"task-failed": 1, "time-limit": 1})
        self.assertGreater(add["p95"], add["p50"])
        self.assertEqual([nothing[key] for key in ("share", "mean", "p50", "p95")], [None] * 4)

    def test_ended_of(self) -> None:
        """What a daemon is asked about itself is no work; an older one counts all."""
        totals = {"done": 100, "failed": 2}
        functions = [{"done": 3, "failed": 1}, {"done": 4, "failed": 0}]
        results = self.call(
            "endedOf",
            [{"totals": totals, "functions": functions}],
            [{"totals": totals, "functions": []}],
            [{"totals": totals}],
            [{}],
            [None],
        )
        self.assertEqual(
            results,
            [{"done": 7, "failed": 1}, {"done": 0, "failed": 0}, totals, {}, {}],
        )

    def test_call_rates(self) -> None:
        """Rates are differences; who came, went or began anew in between counts nothing."""

        def note(seconds: float, *nodes: dict[str, Any]) -> dict[str, Any]:
            return {"seconds": seconds, "nodes": nodes}

        def at(name: str, done: int) -> dict[str, Any]:
            return self.node_of(name, {"name": "add", "done": done, "failed": 1})

        away = {"name": "a", "status": None}
        results = self.call(
            "callRates",
            [note(1, at("a", 10)), note(3, at("a", 30))],
            [note(1, at("a", 10), at("b", 0)), note(2, at("a", 12), at("b", 5))],
            [note(1, at("a", 10)), note(2, at("a", 3))],
            [note(1, away), note(2, at("a", 3))],
            [note(1, at("a", 3)), note(2, away)],
            [note(1), note(2, at("a", 3))],
            [note(1, at("a", 3)), note(1, at("a", 3))],
            [None, None],
        )
        self.assertEqual(results, [[["add", 10]], [["add", 7]], [], [], [], [], [], []])

    def test_ordered(self) -> None:
        """Rows are in order by a column; equals are by name, what has no value is last."""
        rows = [
            {"name": "b", "done": 1, "mean": None},
            {"name": "a", "done": 1, "mean": 2.0},
            {"name": "c", "done": 5, "mean": 1.0},
        ]
        results = self.call(
            "ordered",
            [rows, "name", False],
            [rows, "name", True],
            [rows, "done", True],
            [rows, "done", False],
            [rows, "mean", True],
            [rows, "mean", False],
        )
        names = ["".join(row["name"] for row in ordered) for ordered in results]
        self.assertEqual(names, ["abc", "cba", "cab", "abc", "acb", "cab"])

    def test_failures(self) -> None:
        """Failures of all daemons are in one list, the newest first, each with a key of its own."""
        alike = {"at": 5.0, "function": "f", "worker": 1, "code": "task-failed"}
        nodes = [
            {"name": "a", "failures": [alike, alike, {**alike, "at": 3.0}]},
            {"name": "b", "failures": [{**alike, "at": 9.0}]},
            {"name": "c", "failures": None},
        ]
        together, none, empty = self.call(
            "allFailures", [nodes], [[{"name": "c", "failures": None}]], [[{"failures": []}]]
        )
        self.assertEqual([failure["at"] for failure in together], [9, 5, 5, 3])
        self.assertEqual([failure["node"] for failure in together], ["b", "a", "a", "a"])
        self.assertEqual(len({failure["key"] for failure in together}), 4)
        self.assertEqual((none, empty), (None, []))


class PlotTests(ScriptTestCase):
    def test_extended(self) -> None:
        """Samples are kept for five minutes; one is not kept twice; a clock may be put back."""

        def samples(*ats: float) -> list[dict[str, float]]:
            return [{"at": at} for at in ats]

        results = self.call(
            "extended",
            [samples(1, 2), {"at": 3}],
            [samples(1, 2), {"at": 2}],
            [samples(1, 2), {"at": 1.5}],
            [samples(1, 200), {"at": 310}],
            [samples(1), None],
            [samples(1), {"at": "2"}],
            [[], {"at": 1}],
        )
        self.assertEqual(
            results,
            [
                samples(1, 2, 3),
                samples(1, 2),
                samples(1.5),
                samples(200, 310),
                samples(1),
                samples(1),
                samples(1),
            ],
        )

    def test_runs(self) -> None:
        """A line is parted where a value is missing, or nothing came for long."""
        results = self.call(
            "runs",
            [[[1, 5], [2, 6], [3, None], [4, 7]], 3],
            [[[1, 5], [9, 6]], 3],
            [[], 3],
            [[[1, None]], 3],
        )
        self.assertEqual(results, [[[[1, 5], [2, 6]], [[4, 7]]], [[[1, 5]], [[9, 6]]], [], []])

    def test_even_ticks(self) -> None:
        """Ticks begin at 0, are even and whole, and reach what is highest; they are few."""
        for highest, ticks in zip(
            (0, 1, 3, 10, 148, 1e6, 1e9, 0.2),
            self.call("evenTicks", *([n] for n in (0, 1, 3, 10, 148, 1e6, 1e9, 0.2))),
            strict=True,
        ):
            self.assertEqual(ticks[0], 0)
            self.assertGreaterEqual(ticks[-1], highest)
            self.assertTrue(2 <= len(ticks) <= 5, ticks)
            steps = {b - a for a, b in pairwise(ticks)}
            self.assertEqual(len(steps), 1)
            self.assertEqual(steps.pop() % 1, 0)

    def test_decades(self) -> None:
        """Decades are around all values, one at least."""
        results = self.call("decades", [0.002, 0.5], [0.01, 0.01], [1e-6, 100.0])
        for got, wanted in zip(
            results, ([1e-3, 0.01, 0.1, 1], [0.01, 0.1], [10**n for n in range(-6, 3)]), strict=True
        ):
            self.assertEqual(len(got), len(wanted))
            for one, other in zip(got, wanted, strict=True):
                self.assertAlmostEqual(one / other, 1)

    def test_retry_delay(self) -> None:
        """The wait before another attempt grows to a bound, is never nothing, and is drawn."""
        draws = [[attempt, drawn] for attempt in (0, 3, 10, 2000) for drawn in (0.0, 0.5, 1.0)]
        results = self.call("retryDelay", *draws)
        self.assertEqual(
            results,
            [0.25, 0.75, 1.25, 0.25, 4.25, 8.25, *([0.25, 15.25, 30.25] * 2)],
        )


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


class FileTests(SynchronousTestCase):
    def setUp(self) -> None:
        page = _Page()
        page.feed((DASHBOARD / "index.html").read_text(encoding="utf-8"))
        self.tags = page.tags
        self.script = SCRIPT.read_text(encoding="utf-8")
        self.style = (DASHBOARD / "dashboard.css").read_text(encoding="utf-8")

    def test_nothing_inline(self) -> None:
        """The page holds no script and no style of its own, which its policy would forbid."""
        for tag, attributes in self.tags:
            self.assertNotEqual(tag, "style")
            self.assertFalse([name for name in attributes if name.startswith("on")], tag)
            self.assertNotIn("style", attributes)
            if tag == "script":
                self.assertEqual(attributes, {"src": "/dashboard.js"})

    def test_nothing_from_elsewhere(self) -> None:
        """Nothing is loaded from another place, and no text becomes markup or program."""
        for _, attributes in self.tags:
            for name in ("src", "href", "action"):
                place = attributes.get(name) or "/"
                self.assertRegex(place, r"^(/|#|data:image/svg\+xml,)")
                self.assertFalse(place.startswith("//"))
        self.assertNotRegex(self.style, r"@import|url\(")
        self.assertNotRegex(
            self.script,
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|"
            r"createContextualFragment|setHTML|srcdoc|cssText|\.style\b",
        )

    def test_ids(self) -> None:
        """What is looked for by an id, or referred to, is in the page, once."""
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        self.assertEqual(len(ids), len(set(ids)))
        wanted = set(re.findall(r'byId\("([a-z-]+)"\)', self.script))
        self.assertGreater(len(wanted), 20)
        self.assertLessEqual(wanted, set(ids))
        for _, attributes in self.tags:
            for name in ("aria-labelledby", "aria-controls"):
                if attributes.get(name):
                    self.assertIn(attributes[name], ids)
            if (attributes.get("href") or "").startswith("#"):
                self.assertIn((attributes["href"] or "")[1:], ids)
