"""The dashboard in use: by keyboard, on every screen, in light and dark, with little motion."""

from __future__ import annotations

import threading
from typing import Any, Final

from selenium.webdriver.common.keys import Keys

from tests.integration.daemon import Connection, Daemon
from tests.integration.test_dashboard import DashboardTestCase, Page
from tests.integration.test_dashboard_hostile import ScriptedDaemon

SCREENS: Final = ((360, 800), (1280, 900), (1920, 1080))
WORKERS: Final = 200

FOCUS: Final = """
    const node = document.activeElement;
    const box = node.getBoundingClientRect();
    const {outlineStyle, outlineWidth, outlineColor} = getComputedStyle(node);
    const head = node.closest("th[data-key]");
    return {
        name: head ? `sort ${head.dataset.key}`
            : node.matches(".tile") ? `tile ${node.dataset.worker}`
            : node.matches(".reader") ? `reader ${node.closest("figure").id}`
            : node.matches(".skip") ? "skip" : node.id || node.localName,
        isOutlined: outlineStyle !== "none" && parseFloat(outlineWidth) >= 2
            && outlineColor !== "rgba(0, 0, 0, 0)",
        isInSight: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth
            && box.width > 0 && box.height > 0,
    };
"""

SMALL_TARGETS: Final = """
    return [...document.querySelectorAll("button, input, .tile, .reader, summary")]
        .filter((node) => node.checkVisibility())
        .filter((node) => {
            const {width, height} = node.getBoundingClientRect();
            return Math.min(width, height) < 24;
        })
        .map((node) => node.id || node.className || node.textContent);
"""

WORDS_OUTSIDE: Final = """
    return [...document.querySelectorAll(".stage text")].filter((text) => {
        const {left, right} = text.closest(".panel").getBoundingClientRect();
        const box = text.getBoundingClientRect();
        return box.width && (box.left < left + 4 || box.right > right - 4);
    }).map((text) => text.textContent);
"""
"""Labels of plots that reach over their place's edge."""

COLUMNS: Final = ("name", "rate", "done", "failed", "share", "mean", "p50", "p95", "codes")

TAB_ORDER: Final = [
    "skip",
    "pause",
    "theme",
    *(f"reader plot-{name}" for name in ("throughput", "queue", "latency")),
    "tile 1",
    "filter",
    *(f"sort {key}" for key in COLUMNS),
    "keys",
]


class KeyboardTests(DashboardTestCase):
    def focus(self, page: Page) -> str:
        """Give what has the focus, which has to be seen."""
        seen = page.js(FOCUS)
        self.assertTrue(seen["isOutlined"], seen)
        page.wait(lambda: page.js(FOCUS)["isInSight"], f"{seen['name']} in sight")
        return seen["name"]

    def test_tab(self) -> None:
        """Tab reaches everything that can be used, in order, and one sees where one is."""
        daemon, page = self.start_all(procs=3)
        daemon.ask("add", [1, 2])
        page.wait(page.functions, "a function")
        order = []
        for _ in TAB_ORDER:
            page.press(Keys.TAB)
            order.append(self.focus(page))
        self.assertEqual(order, TAB_ORDER)

    def test_skip(self) -> None:
        """The first stop skips the head of the page."""
        _, page = self.start_all()
        page.press(Keys.TAB)
        self.assertEqual(self.focus(page), "skip")
        page.wait(
            lambda: page.driver.find_element("class name", "skip").rect["y"] >= 0, "the skip link"
        )
        page.press(Keys.ENTER)
        self.assertEqual(page.js("return document.activeElement.id"), "main")
        page.press(Keys.TAB)
        self.assertEqual(self.focus(page), "reader plot-throughput")

    def test_tiles(self) -> None:
        """The arrow keys go from worker to worker, each of which is told of below."""
        daemon, page = self.start_all(procs=12)
        last = max(daemon.workers())
        page.wait_for_tiles({"idle": 12})
        page.js("document.querySelector('.tile').focus()")
        for key, number in (
            (Keys.ARROW_RIGHT, 2),
            (Keys.ARROW_RIGHT, 3),
            (Keys.ARROW_LEFT, 2),
            (Keys.END, last),
            (Keys.ARROW_RIGHT, last),
            (Keys.HOME, 1),
            (Keys.ARROW_LEFT, 1),
        ):
            page.press(key)
            self.assertEqual(self.focus(page), f"tile {number}")
            page.wait_for("#worker-detail", f"Worker {number} ", "process ", "idle")
            self.assertIn(str(daemon.workers()[number]), page.text("#worker-detail"))
        page.press(Keys.ARROW_DOWN)
        below = self.focus(page)
        self.assertNotEqual(below, "tile 1")
        page.press(Keys.ARROW_UP)
        self.assertEqual(self.focus(page), "tile 1")
        self.assertEqual(
            page.js("return document.querySelectorAll('.tile[tabindex=\"0\"]').length"), 1
        )
        # The worker under the focus goes; the focus stays among the workers.
        daemon.kill(daemon.workers()[1])
        page.wait(lambda: page.cards()[page.text("#about")].get("Replaced workers"), "the kill")
        daemon.wait_until_settled()
        page.wait(lambda: set(page.tiles()) == set(daemon.workers()), "the new worker")
        self.assertTrue(self.focus(page).startswith("tile "))

    def test_plots(self) -> None:
        """A plot is read by the arrow keys, which tell time and values."""
        daemon, page = self.start_all()
        daemon.ask("add", [1, 2])
        reader = "#plot-throughput .reader"
        page.wait(lambda: int(page.attribute(reader, "aria-valuemax") or 0) > 3, "some samples")
        for plot, words in (
            ("throughput", ("done ", "failed ")),
            ("queue", ("waiting ",)),
            ("latency", ("p50 ", "p95 ", "p99 ")),
        ):
            reader = f"#plot-{plot} .reader"
            page.js("document.querySelector(arguments[0]).focus()", reader)
            page.press(Keys.HOME)
            self.assertEqual(self.focus(page), f"reader plot-{plot}")
            self.assertEqual(page.attribute(reader, "aria-valuenow"), "0")
            first = page.attribute(reader, "aria-valuetext") or ""
            for word in words:
                self.assertIn(word, first)
            page.press(Keys.ARROW_RIGHT)
            self.assertEqual(page.attribute(reader, "aria-valuenow"), "1")
            self.assertNotEqual(page.attribute(reader, "aria-valuetext"), first)
            page.press(Keys.ARROW_LEFT)
            self.assertEqual(page.attribute(reader, "aria-valuetext"), first)
            self.assertIn(page.text(f"#plot-{plot} .moment"), first)
            self.assertEqual(page.attribute(f"#plot-{plot} .thread", "visibility"), "visible")
            page.press(Keys.ESCAPE)
            self.assertEqual(page.attribute(f"#plot-{plot} .thread", "visibility"), "hidden")
        self.assert_clean(page)

    def test_pause_key(self) -> None:
        """P pauses and goes on; not while one types, not with Ctrl, not when it is off."""
        _, page = self.start_all()

        def is_paused() -> bool:
            return page.attribute("#pause", "aria-pressed") == "true"

        page.press("p")
        page.wait(is_paused, "a pause")
        page.wait_for("#link-text", "paused at")
        page.press("P")
        page.wait(lambda: not is_paused(), "the end of the pause")
        page.part("filter").send_keys("pp")
        self.assertFalse(is_paused())
        page.part("filter").clear()
        page.click("#keys")
        page.press("p")
        self.assertFalse(is_paused())
        page.driver.refresh()
        page.wait_for_link("live")
        self.assertFalse(page.part("keys").is_selected())
        page.press("p")
        self.assertFalse(is_paused())
        page.click("#keys")
        page.press("p")
        page.wait(is_paused, "a pause")


class ScreenTests(DashboardTestCase):
    def look(self, page: Page, name: str) -> None:
        """Save how it looks on every screen; nothing is wider than the screen, or too small."""
        for width, height in SCREENS:
            for is_dark in (False, True):
                page.shape(width=width, height=height, is_dark=is_dark)
                page.wait(lambda width=width: page.js("return innerWidth") == width, "the width")
                wide = page.js("return document.scrollingElement.scrollWidth")
                self.assertLessEqual(wide, width, name)
                self.assertEqual(page.js(SMALL_TARGETS), [])
                self.assertEqual(page.js(WORDS_OUTSIDE), [])
                page.wait(lambda: page.js("return !document.getAnimations().length"), "rest")
                colour = "dark" if is_dark else "light"
                page.screenshot(f"dashboard-{name}-{width}-{colour}")
                tall = page.js("return document.scrollingElement.scrollHeight")
                page.shape(height=tall)
                page.screenshot(f"dashboard-{name}-{width}-{colour}-whole")

    def load(self, daemon: Daemon) -> None:
        """Keep a daemon at work until the test is over."""
        stopped = threading.Event()

        def work(connection: Connection) -> None:
            number = 0
            while not stopped.is_set():
                number += 1
                connection.ask("add", [number, 1])
                connection.ask("later", [number])
                connection.ask("sleep", [0.02 + 0.02 * (number % 5)])
                if number % 4 == 0:
                    connection.ask("fail", [f"mailbox {number} is full"])
                if number % 9 == 0:
                    connection.ask("fail_later", [f"no route to host {number}: " + "x " * 90])

        threads = [threading.Thread(target=work, args=(self.connect(daemon),)) for _ in range(6)]
        for thread in threads:
            thread.start()
            self.addCleanup(thread.join)
        self.addCleanup(stopped.set)

    def test_load(self) -> None:
        """At work it is readable from a telephone to a wall."""
        daemon, page = self.start_all(procs=12)
        caller = self.connect(daemon)
        for number in range(9):
            self.begin(daemon, caller, "hold", id=number)
        self.load(daemon)
        reader = "#plot-throughput .reader"
        page.wait(lambda: int(page.attribute(reader, "aria-valuemax") or 0) > 12, "some samples")
        page.wait(lambda: len(page.failures()) > 8, "failures")
        self.look(page, "load")
        self.assert_clean(page)

    def test_idle(self) -> None:
        """With nothing to show it says so."""
        _, page = self.start_all()
        self.look(page, "idle")

    def test_crowd(self) -> None:
        """Two hundred workers have small tiles, and are reached all the same."""
        states = ("busy", "busy", "busy", "idle", "starting", "draining", "odd")
        workers = [
            {
                "worker": number,
                "pid": 1000 + number,
                "state": states[number % len(states)],
                "task": "mail.send" if number % len(states) < 3 else None,
                "task_seconds": number * 1.7 if number % len(states) < 3 else None,
                "uptime": 86400.0,
                "in_flight": 1,
                "connections": 3,
                "done": 1234567 * number,
                "failed": 3,
                "latency": {},
            }
            for number in range(1, WORKERS + 1)
        ]
        status: dict[str, Any] = {
            "version": "0.1.0",
            "supervisor": {"pid": 999, "uptime": 864000.0, "reload": None},
            "queue": {"waiting": 123456, "oldest_seconds": 12.0, "refused": 1, "expired": 2},
            "workers": workers,
            "totals": {
                "done": 123456789,
                "failed": 1234,
                "connections": 600,
                "workers": {
                    state: sum(worker["state"] == state for worker in workers)
                    for state in ("starting", "idle", "busy", "draining")
                },
                "restarts": {"died": 12, "reload": 200},
            },
            "functions": [
                {
                    "name": f"department_{number}.a_function_with_a_long_name",
                    "done": 10 ** (number % 9),
                    "failed": 7 * number,
                    "errors": {"task-failed": 5 * number, "time-limit": 2 * number},
                    "seconds": 3600.0 * number,
                    "latency": {"1024": 10, "65536": 90, "134217728": 3},
                }
                for number in range(1, 31)
            ],
        }
        daemon = ScriptedDaemon(self, status=status, failures=[])
        page = self.show(self.start_gateway(daemon.endpoint))
        page.wait(lambda: len(page.tiles()) == WORKERS, "all tiles")
        self.assertEqual(page.js("return document.querySelectorAll('.crowd').length"), 1)
        self.look(page, "crowd")
        page.shape(width=1280, height=900)
        page.js("document.querySelector('.tile').focus()")
        page.press(Keys.END)
        page.wait_for("#worker-detail", f"Worker {WORKERS} ")
        self.assertTrue(page.part("worker-detail").is_displayed())
        page.screenshot("dashboard-crowd-picked")

    def test_theme(self) -> None:
        """The colours are the system's, or the chosen ones, which a reload keeps."""
        _, page = self.start_all()

        def colour() -> str:
            return page.js("return getComputedStyle(document.body).backgroundColor")

        light = colour()
        page.shape(is_dark=True)
        page.wait(lambda: colour() != light, "the system's dark")
        dark = colour()
        for theme, expected in (("light", light), ("dark", dark), ("light", light)):
            while page.attribute("html", "data-theme") != theme:
                page.click("#theme")
            self.assertEqual(page.text("#theme"), f"Theme: {theme}")
            self.assertEqual(colour(), expected)
            page.driver.refresh()
            page.wait_for_link("live")
            self.assertEqual(page.attribute("html", "data-theme"), theme)
            self.assertEqual((page.text("#theme"), colour()), (f"Theme: {theme}", expected))
        while page.attribute("html", "data-theme") is not None:
            page.click("#theme")
        self.assertEqual(colour(), dark)
        self.assert_clean(page)

    def test_reduced_motion(self) -> None:
        """Nothing moves for who does not want it; else some colours change softly."""
        _, page = self.start_all()
        moving = (
            "return [...document.querySelectorAll('*')].filter((node) => {"
            "const {transitionDuration, animationName} = getComputedStyle(node);"
            "return transitionDuration !== '0s' || animationName !== 'none'; }).length"
        )
        for wish, moves in (("reduce", False), ("no-preference", True)):
            page.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-reduced-motion", "value": wish}]},
            )
            self.assertEqual(bool(page.js(moving)), moves, wish)
