"""The dashboard in a real browser: what it shows of real daemons, and of their troubles."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.integration.browser import Browser
from tests.integration.daemon import Daemon, children_of, touch_if_possible, wait_until
from tests.integration.gateway import Gateway, GatewayTestCase

__all__ = ["NONE", "DashboardTestCase", "Page"]

NONE: Final = "\N{EN DASH}"
"""What stands where nothing is known."""

_LISTEN: Final = """
    window.violations = [];
    window.uncaught = [];
    addEventListener("securitypolicyviolation", (event) => {
        violations.push(`${event.effectiveDirective} ${event.blockedURI}`);
    });
    for (const kind of ["error", "unhandledrejection"]) {
        addEventListener(kind, (event) => uncaught.push(String(event.message || event.reason)));
    }
"""

_TILES: Final = """
    return [...document.querySelectorAll("#nodes .tile")].map((tile) => [
        Number(tile.dataset.worker),
        tile.dataset.state,
        tile.querySelector(".task").textContent,
    ]);
"""

_ROWS: Final = """
    return [...document.querySelectorAll(`${arguments[0]} tbody tr`)].map(
        (row) => [...row.cells].map((cell) => cell.textContent));
"""

_CARDS: Final = """
    return [...document.querySelectorAll("#daemons .card")].map((card) => [
        card.querySelector("h3").textContent,
        [...card.querySelectorAll("dt")].map((word) => [
            word.textContent, word.nextElementSibling.textContent]),
    ]);
"""

_T = TypeVar("_T")


class Page(Browser):
    """The dashboard, in a browser of its own, which also takes down what the page violates."""

    def open(self, url: str) -> Page:
        """Go to an address, with an ear for violations from the very start."""
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _LISTEN})
        self.driver.get(url)
        return self

    def js(self, script: str, *args: Any) -> Any:
        """Run a script as DevTools do, and give what it returns."""
        return self.driver.execute_script(script, *args)

    def texts(self, selector: str) -> list[str]:
        """Give the texts of all such elements."""
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)",
            selector,
        )

    def text(self, selector: str) -> str:
        """Give the text of the first such element, or ''."""
        return next(iter(self.texts(selector)), "")

    def attribute(self, selector: str, name: str) -> str | None:
        """Give an attribute of the first such element."""
        return self.js(
            "return document.querySelector(arguments[0]).getAttribute(arguments[1])",
            selector,
            name,
        )

    def click(self, selector: str) -> None:
        """Click on the first such element."""
        self.driver.find_element("css selector", selector).click()

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        actions = ActionChains(self.driver)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def wait(self, condition: Callable[[], _T], what: str) -> _T:
        """Wait until a condition holds; a picture shows what was there instead."""
        try:
            return wait_until(condition, what=what)
        except AssertionError:
            self.screenshot("dashboard-missing")
            raise

    def wait_for(self, selector: str, *words: str) -> str:
        """Wait until the first such element has these words, and give its text."""

        def text() -> str:
            found = self.text(selector)
            return found if all(word in found for word in words) else ""

        return self.wait(text, f"{words} in {selector}")

    # What it shows.

    @property
    def link(self) -> str:
        """Tell how the page says that it is connected."""
        return self.js("return document.body.dataset.link")

    def wait_for_link(self, kind: str) -> None:
        """Wait until the page says that it is connected in this way."""
        self.wait(lambda: self.link == kind, f"data-link={kind}")

    def wait_for_tiles(self, expected: dict[str, int]) -> None:
        """Wait until there are so many tiles of each state, and no others."""

        def states() -> dict[str, int]:
            seen = [state for _, state, _ in self.js(_TILES)]
            return {state: seen.count(state) for state in seen}

        self.wait(lambda: states() == expected, f"tiles {expected}")

    def tiles(self) -> dict[int, tuple[str, str]]:
        """Give state and task of each worker, by number."""
        return {number: (state, task) for number, state, task in self.js(_TILES)}

    def functions(self) -> dict[str, dict[str, str]]:
        """Give what the table of functions has: a row by name, a cell by its column."""
        columns = [text.strip() for text in self.texts("#functions thead th")]
        rows = self.js(_ROWS, "#functions")
        return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}

    def failures(self) -> list[tuple[str, str, str, str]]:
        """Give function, code, message and worker of each failure that is shown."""
        return [tuple(row[1:]) for row in self.js(_ROWS, "#failures")]

    def cards(self) -> dict[str, dict[str, str]]:
        """Give what is told of each daemon, and of the gateway."""
        return {title: dict(facts) for title, facts in self.js(_CARDS)}

    def states(self) -> dict[str, str]:
        """Give the legend: how many workers are in each state."""
        words = [text.split() for text in self.texts("#states [data-state]")]
        return dict(words)


class DashboardTestCase(GatewayTestCase):
    """Base of tests of the dashboard."""

    gateway: Gateway

    def show(self, gateway: Gateway, path: str = "/", **options: Any) -> Page:
        """Open the dashboard, and wait until it is live and has shown a first look."""
        page = Page(self, **{"width": 1280, "height": 900, **options})
        page.open(gateway.origin + path)
        page.wait_for_link("live")
        page.wait(page.cards, "the daemons' cards")
        page.wait(lambda: len(page.cards()) > 1, "a first look")
        return page

    def start_all(self, *options: str, procs: int = 2, **more: Any) -> tuple[Daemon, Page]:
        """Start a daemon, a gateway and a browser that shows the dashboard."""
        daemon = self.start(*options, procs=procs, **more)
        self.gateway = self.start_gateway(daemon)
        return daemon, self.show(self.gateway)

    def assert_clean(self, page: Page, *, was_away: bool = False) -> None:
        """
        The page has violated nothing, and nothing is wrong with it.

        Args:
            page: The page.
            was_away: Whether the browser may have noted that nobody was there.
        """
        self.assertEqual(page.js("return [violations, uncaught]"), [[], []])
        console = page.console()
        if was_away:
            console = [entry for entry in console if "WebSocket connection to" not in str(entry)]
        self.assertEqual(console, [])

    def assert_banner(self, page: Page, kind: str, *words: str) -> None:
        """The banner says what is wrong, and what is shown is marked as old."""
        page.wait_for_link(kind)
        page.wait_for("#banner", *words)
        banner = page.part("banner")
        self.assertTrue(banner.is_displayed())
        self.assertEqual(banner.get_attribute("role"), "alert")
        self.assertEqual(banner.get_attribute("data-kind"), kind)
        is_stale = page.js("return document.getElementById('main').matches('.stale')")
        self.assertEqual(is_stale, kind != "some")

    def assert_no_banner(self, page: Page) -> None:
        """All is well, and the page says so."""
        page.wait_for_link("live")
        self.assertFalse(page.part("banner").is_displayed())
        self.assertFalse(page.js("return document.getElementById('main').matches('.stale')"))
        self.assertEqual(page.driver.title, "taskd")


class LifeTests(DashboardTestCase):
    def test_whole_life(self) -> None:
        """What runs, waits, is done and fails is shown as it happens."""
        daemon, page = self.start_all(procs=3)
        page.wait_for_tiles({"idle": 3})
        self.assertEqual(
            page.states(), {"busy": "0", "idle": "3", "starting": "0", "draining": "0"}
        )
        self.assertEqual(set(page.tiles()), set(daemon.workers()))
        page.wait_for("#functions-empty", "No function is known yet.")
        page.wait_for("#failures-empty", "No failure is known.")
        self.assertEqual((page.functions(), page.failures()), ({}, []))
        self.assertEqual(page.text("#fig-latency .big"), NONE)
        page.wait_for("#fig-waiting .small", "nothing waits")

        caller = self.connect(daemon)
        paths = [self.begin(daemon, caller, "hold", id=0)]
        page.wait_for_tiles({"busy": 1, "idle": 2})
        (busy,) = [n for n, (state, _) in page.tiles().items() if state == "busy"]
        self.assertEqual(page.tiles()[busy], ("busy", "hold"))
        label = page.attribute(f'.tile[data-worker="{busy}"]', "aria-label")
        self.assertEqual(label, f"Worker {busy}, busy, runs hold")
        self.assertEqual(page.text("#fig-busy .big"), "1")
        page.wait_for("#longest", f"worker {busy}", "hold")
        page.wait_for(f'.tile[data-worker="{busy}"] .for', " s")

        paths += [self.begin(daemon, caller, "hold", id=number) for number in (1, 2)]
        for number in range(5):
            caller.request("add", [number, 1], id=10 + number)
        page.wait_for_tiles({"busy": 3})
        page.wait(lambda: page.text("#fig-waiting .big") == "5", "five that wait")
        page.wait_for("#fig-waiting .small", "the oldest for")
        page.wait(lambda: page.text("#plot-queue .legend b") == "5", "the depth in the plot")
        page.wait_for("#fig-busy .small", "none to spare")

        for path in paths:
            Path(path).touch()
        self.assertEqual(len(caller.replies_by_id(8)), 8)
        page.wait_for_tiles({"idle": 3})
        page.wait(
            lambda: (
                {name: row["Done"] for name, row in page.functions().items()}
                == {"add": "5", "hold": "3"}
            ),
            "what was done",
        )
        page.wait(lambda: page.text("#fig-waiting .big") == "0", "an empty queue")
        page.wait_for("#fig-latency .small", "p50", "p99")
        self.assertNotEqual(page.text("#fig-latency .big"), NONE)
        page.wait(lambda: NONE not in page.texts("#plot-latency .legend b"), "latencies")
        for row in page.functions().values():
            self.assertEqual((row["Failed"], row["Error codes"]), ("0", NONE))
            self.assertNotIn(NONE, (row["Mean"], row["About p50"], row["About p95"]))
        self.assertEqual(page.text("#functions-note"), "2 in all")
        self.assert_clean(page)

    def test_own_questions(self) -> None:
        """That the gateway asks once a second is not shown as work."""
        _, page = self.start_all()
        page.wait(
            lambda: int(page.attribute("#plot-throughput .reader", "aria-valuemax") or 0) > 2,
            "several looks",
        )
        self.assertEqual(page.text("#fig-done .big"), "0")
        self.assertEqual(page.functions(), {})
        self.assertIn(page.cards()[page.text("#about")].get("Tasks"), (None, "0 done, 0 failed"))
        self.assertEqual(page.text("#fig-done .small"), "")
        self.assertEqual(page.text("#fig-busy .big"), "0")
        self.assertEqual(set(page.tiles().values()), {("idle", "")})

    def test_failures(self) -> None:
        """What fails is shown with time, function, code, type, message and worker; counted too."""
        daemon, page = self.start_all()
        began, workers = time.time(), {str(number) for number in daemon.workers()}
        for function in ("fail", "fail_later"):
            self.assert_error(daemon.ask(function, [f"{function}: no such thing"]), "task-failed")
        self.assert_error(daemon.ask("add", [1]), "bad-arguments")
        self.assert_error(daemon.ask("hold_limited", [self.path(daemon)]), "time-limit")
        page.wait(lambda: len(page.failures()) == 3, "three failures")
        page.wait(lambda: len(page.functions()) == 4, "four functions")
        shown = page.failures()
        self.assertEqual(
            [failure[:2] for failure in shown],
            [
                ("hold_limited", "time-limit"),
                ("fail_later", "task-failed"),
                ("fail", "task-failed"),
            ],
        )
        self.assertEqual(shown[1][2], "LookupError fail_later: no such thing")
        self.assertEqual(shown[2][2], "ValueError fail: no such thing")
        self.assertLessEqual({failure[3] for failure in shown}, workers)
        for moment in page.js(
            "return [...document.querySelectorAll('#failures time')].map((time) => time.dateTime)"
        ):
            at = datetime.fromisoformat(moment).timestamp()
            self.assertTrue(began - 1 <= at <= time.time() + 1, moment)
        functions = page.functions()
        codes = {name: row["Error codes"].split() for name, row in functions.items()}
        self.assertEqual(
            codes,
            {
                "add": ["bad-arguments", "1"],
                "fail": ["task-failed", "1"],
                "fail_later": ["task-failed", "1"],
                "hold_limited": ["time-limit", "1"],
            },
        )
        self.assertEqual(functions["fail"]["Failed share"], "100 %")

        def is_shown_as_failing() -> bool:
            daemon.ask("fail", ["again"])
            return page.text("#fig-failed .big") not in ("0", NONE)

        page.wait(is_shown_as_failing, "failures a second")
        page.wait(
            lambda: (
                daemon.ask("fail", ["again"])
                and page.attribute("#fig-failed", "data-alarm") is not None
            ),
            "an alarm",
        )
        self.assert_clean(page)

    def test_long_failure(self) -> None:
        """A long message is cut, and shown whole to who asks; it stays open then."""
        daemon, page = self.start_all()
        message = " ".join(f"word{number}" for number in range(40))
        daemon.ask("fail", [message])
        page.wait(page.failures, "a failure")
        self.assertNotIn("word39", page.driver.find_element("id", "failures").text)
        page.click("#failures summary")
        self.assertIn("word39", page.driver.find_element("id", "failures").text)
        daemon.ask("fail", ["another one"])
        page.wait(lambda: len(page.failures()) == 2, "another failure")
        self.assertIn("word39", page.driver.find_element("id", "failures").text)

    def order(self, page: Page) -> list[str]:
        return list(page.functions())

    def sorting(self, page: Page) -> dict[str, str]:
        """Give by which columns the functions are sorted, as screen readers are told."""
        heads = page.js(
            "return [...document.querySelectorAll('#functions th[data-key]')]"
            ".map((head) => [head.dataset.key, head.getAttribute('aria-sort')])"
        )
        return {key: direction for key, direction in heads if direction != "none"}

    def test_sort(self) -> None:
        """The functions are sorted by each column, up and down, by pointer and by keyboard."""
        daemon, page = self.start_all()
        caller = self.connect(daemon)
        for name, many in (("add", 3), ("later", 2), ("at_once", 1)):
            for number in range(many):
                caller.ask(name, [number, 1] if name == "add" else [number])
        caller.ask("fail", ["x"])
        page.wait(lambda: len(page.functions()) == 4, "four functions")
        self.assertEqual(self.sorting(page), {"rate": "descending"})
        by_done = ["add", "later", "at_once", "fail"]
        page.click('th[data-key="done"] button')
        page.wait(lambda: self.order(page) == by_done, "the most done first")
        self.assertEqual(self.sorting(page), {"done": "descending"})
        page.press(Keys.ENTER)
        page.wait(lambda: self.order(page) == by_done[::-1], "the least done first")
        self.assertEqual(self.sorting(page), {"done": "ascending"})
        page.click('th[data-key="name"] button')
        page.wait(lambda: self.order(page) == sorted(by_done), "by name")
        self.assertEqual(self.sorting(page), {"name": "ascending"})
        page.press(Keys.SPACE)
        page.wait(lambda: self.order(page) == sorted(by_done, reverse=True), "by name, from z")
        for key in ("rate", "failed", "share", "mean", "p50", "p95", "codes"):
            page.click(f'th[data-key="{key}"] button')
            page.wait(lambda key=key: self.sorting(page) == {key: "descending"}, f"sorted by {key}")
            self.assertEqual(sorted(self.order(page)), sorted(by_done))
        page.click('th[data-key="failed"] button')
        page.wait(lambda: self.order(page)[0] == "fail", "the most failed first")
        focused = page.js("return document.activeElement.closest('th').dataset.key")
        self.assertEqual(focused, "failed")

    def test_filter(self) -> None:
        """The filter leaves the functions whose names have a word, in any case."""
        daemon, page = self.start_all()
        for function in ("later", "later_inline", "at_once"):
            daemon.ask(function, [1])
        page.wait(lambda: len(page.functions()) == 3, "three functions")
        page.fill("filter", "LATE")
        page.wait(lambda: set(page.functions()) == {"later", "later_inline"}, "what is left")
        self.assertEqual(page.text("#functions-note"), "2 of 3")
        page.fill("filter", ".*")
        page.wait(lambda: page.functions() == {}, "nothing")
        self.assertEqual(page.part("functions-empty").text, "No function has such a name.")
        page.fill("filter", "p")
        self.assertEqual(page.attribute("#pause", "aria-pressed"), "false")
        page.press(Keys.BACKSPACE)
        page.wait(lambda: len(page.functions()) == 3, "all again")

    def test_many_functions(self) -> None:
        """Of many functions the first are shown, and all once asked; odd names are names."""
        odd = ["__proto__", "constructor", "toString", "hasOwnProperty", "x" * 128]
        names = [f"function-{number:02}" for number in range(40)] + odd
        module = "from taskd import task\n" + "".join(
            f"@task(name={name!r}, blocking=False)\ndef f{number}():\n    return 1\n"
            for number, name in enumerate(names)
        )
        daemon, page = self.start_all(tasks="many.py", files={"many.py": module})
        caller = self.connect(daemon)
        for name in names:
            self.assertEqual(caller.ask(name), 1)
        page.wait_for("#functions-note", f"{len(names)} in all")
        page.click('th[data-key="name"] button')
        page.wait(lambda: self.order(page)[0] == "__proto__", "by name")
        self.assertEqual(len(page.functions()), 25)
        page.click("#functions-more")
        page.wait(lambda: len(page.functions()) == len(names), "all")
        self.assertEqual(page.attribute("#functions-more", "aria-expanded"), "true")
        self.assertEqual({row["Done"] for row in page.functions().values()}, {"1"})
        page.click("#functions-more")
        page.wait(lambda: len(page.functions()) == 25, "the first again")
        self.assert_clean(page)

    def test_pause(self) -> None:
        """What is paused stays as it is, and says since when; then it is as it would be."""
        daemon, page = self.start_all()
        page.click("#pause")
        page.wait_for("#link-text", "paused at")
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold")
        feed = self.open(self.gateway, "/live")
        page.wait(lambda: "hold" in str(feed.reply().get("nodes")), "news that are not shown")
        page.wait_for_tiles({"idle": 2})
        self.assertEqual(page.text("#fig-busy .big"), "0")
        page.click("#pause")
        page.wait_for_tiles({"busy": 1, "idle": 1})
        page.wait_for("#link-text", "live")
        Path(path).touch()
        self.assert_clean(page)


class TroubleTests(DashboardTestCase):
    def test_worker_killed(self) -> None:
        """A worker that is killed is replaced, what it ran is a failure, and both are shown."""
        daemon, page = self.start_all()
        caller = self.connect(daemon)
        self.begin(daemon, caller, "hold")
        page.wait_for_tiles({"busy": 1, "idle": 1})
        (busy,) = [n for n, (state, _) in page.tiles().items() if state == "busy"]
        daemon.kill(daemon.workers()[busy])
        page.wait(page.failures, "the failure")
        self.assertEqual(page.failures()[0][:2], ("hold", "worker-lost"))
        page.wait_for_tiles({"idle": 2})
        daemon.wait_until_settled()
        page.wait(lambda: set(page.tiles()) == set(daemon.workers()), "the new worker")
        page.wait(
            lambda: page.cards()[page.text("#about")].get("Replaced workers") == "died 1",
            "the count of replaced workers",
        )
        page.wait(
            lambda: page.functions()["hold"]["Error codes"].split() == ["worker-lost", "1"],
            "the function's errors",
        )
        self.assert_no_banner(page)
        self.assert_clean(page)

    def test_reload(self) -> None:
        """At a reload the old worker that still has a task is shown as draining."""
        daemon, page = self.start_all()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold")
        page.wait_for_tiles({"busy": 1, "idle": 1})
        (busy,) = [n for n, (state, _) in page.tiles().items() if state == "busy"]
        daemon.signal(signal.SIGHUP)
        page.wait(lambda: page.tiles().get(busy) == ("draining", "hold"), "a tile that drains")
        page.wait_for_tiles({"draining": 1, "idle": 2})
        page.wait(lambda: page.states()["draining"] == "1", "the legend")
        page.wait_for("#fig-busy .small", "1 draining")
        Path(path).touch()
        page.wait_for_tiles({"idle": 2})
        page.wait(
            lambda: "went well" in page.cards()[page.text("#about")].get("Last reload", ""),
            "the reload",
        )
        self.assert_clean(page)

    def test_daemon_away(self) -> None:
        """While the daemon is away the page says so, and shows what was; then what is new."""
        daemon, page = self.start_all()
        daemon.ask("add", [1, 2])
        page.wait(lambda: "add" in page.functions(), "a function")
        daemon.stop()
        self.assert_banner(page, "daemon", "The daemon is away.", "cannot be reached")
        self.assertIn("add", page.functions())
        self.assertEqual(len(page.tiles()), 2)
        self.assertIn("daemon away", page.driver.title)
        page.screenshot("dashboard-daemon-away")
        again = self.start(procs=3, port=daemon.port)
        self.assert_no_banner(page)
        page.wait_for_tiles({"idle": 3})
        page.wait(lambda: page.functions() == {}, "the new daemon's figures")
        again.ask("later", [1])
        page.wait(lambda: "later" in page.functions(), "a new function")
        self.assertNotIn("-", page.text("#fig-done .big"))
        self.assert_clean(page)

    def test_gateway_away(self) -> None:
        """While the gateway is away the page says so, and comes back by itself, with news."""
        daemon = self.start(procs=2)
        gateway = self.start_gateway(daemon)
        page = self.show(gateway)
        gateway.stop()
        self.assert_banner(page, "gateway", "The gateway is away.", "Trying again by itself.")
        self.assertEqual(len(page.tiles()), 2)
        page.screenshot("dashboard-gateway-away")
        daemon.ask("add", [1, 2])
        again = self.start_gateway(daemon, port=gateway.port)
        self.assert_no_banner(page)
        page.wait(lambda: "add" in page.functions(), "news")

        # One of its processes dies, and is replaced.
        before = again.serving()
        again.kill(before[1])
        page.wait(lambda: page.link != "live", "the process's end")
        self.assert_no_banner(page)
        self.assertNotEqual(again.wait_until_whole(), before)
        daemon.ask("later", [1])
        page.wait(lambda: "later" in page.functions(), "news of the new process")
        self.assert_clean(page, was_away=True)

    def test_try_now(self) -> None:
        """The banner's button has the page try at once; so it is soon back."""
        daemon = self.start(procs=2)
        gateway = self.start_gateway(daemon)
        page = self.show(gateway)
        gateway.stop()
        self.assert_banner(page, "gateway", "Try now")
        # So that no attempt is due for long.
        page.js("Math.random = () => 1e6")
        page.wait_for("#banner-retry", "in ", "000 s")
        self.start_gateway(daemon, port=gateway.port)
        page.click("#banner-button")
        self.assert_no_banner(page)

    def test_silence(self) -> None:
        """A gateway that says nothing any more is not shown as one that is well."""
        daemon = self.start(procs=2)
        gateway = self.start_gateway(daemon)
        page = self.show(gateway)
        (process,) = children_of(gateway.pid)
        gateway.signal(signal.SIGSTOP, process.pid)
        self.addCleanup(self.go_on, gateway, process.pid)
        self.assert_banner(page, "silent", "The gateway is silent.", "What you see is from")
        self.go_on(gateway, process.pid)
        self.assert_no_banner(page)

    def go_on(self, gateway: Gateway, pid: int) -> None:
        if gateway.directory.exists():
            gateway.signal(signal.SIGCONT, pid)


class TwoDaemonsTests(DashboardTestCase):
    def test_two(self) -> None:
        """Two daemons: their workers in groups, their functions in sum; one may be away."""
        daemons = [self.start(procs=2), self.start(procs=3)]
        gateway = self.start_gateway([*daemons])
        page = self.show(gateway)
        names = [f"127.0.0.1:{daemon.port}" for daemon in daemons]
        self.assertEqual(page.text("#about"), "2 daemons")
        self.assertEqual(page.texts("#nodes .node > h3"), names)
        for name, daemon in zip(names, daemons, strict=True):
            tiles = page.texts(f'.node[data-node="{name}"] .tile .no')
            self.assertEqual(tiles, [str(number) for number in sorted(daemon.workers())])
        for daemon, many in zip(daemons, (2, 3), strict=True):
            for number in range(many):
                daemon.ask("add", [number, 1])
            daemon.ask("fail", [f"of {daemon.port}"])
        page.wait(
            lambda: (
                {n: (r["Done"], r["Failed"]) for n, r in page.functions().items()}
                == {"add": ("5", "0"), "fail": ("0", "2")}
            ),
            "sums",
        )
        page.wait(lambda: len(page.failures()) == 2, "both failures")
        self.assertEqual({failure[3].split(" of ")[1] for failure in page.failures()}, set(names))
        self.assertEqual(set(page.cards()), {*names, "The gateway"})
        page.screenshot("dashboard-two")

        path = self.begin(daemons[1], self.connect(daemons[1]), "hold")
        daemons[0].stop()
        self.assert_banner(page, "some", "1 of 2 daemons away.", names[0])
        page.wait_for(f'.node[data-node="{names[0]}"] .wrong', "away")
        self.assertEqual(page.js("return document.querySelectorAll('.tiles.stale').length"), 1)
        page.wait(lambda: "hold" in [task for _, task in page.tiles().values()], "the other's task")
        self.assertIn("away", page.cards()[names[0]]["State"])
        page.screenshot("dashboard-two-one-away")
        touch_if_possible(Path(path))
        self.start(procs=2, port=daemons[0].port)
        self.assert_no_banner(page)
        page.wait_for_tiles({"idle": 5})
        self.assert_clean(page)
