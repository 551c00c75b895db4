"""The dashboard behind ``--dashboard-token``: who sees it, and what ends that."""

from __future__ import annotations

import http
import signal
from typing import Any, Final

from tests.integration.daemon import write_secret
from tests.integration.gateway import Gateway
from tests.integration.test_dashboard import DashboardTestCase, Page
from tests.integration.test_dashboard_hostile import serve

TOKEN: Final = "ops-0123456789abcdef0123456789"
NEW_TOKEN: Final = "ops-fedcba9876543210fedcba9876"
COOKIE: Final = "taskd_dashboard"

LOOK: Final = """
<!doctype html><script>
window.heard = "nothing yet";
const socket = new WebSocket("ws://127.0.0.1:%d/live");
socket.onmessage = ({data}) => { heard = data; };
socket.onclose = ({code}) => { heard = String(code); };
</script>
"""


class TokenTests(DashboardTestCase):
    def start_with_token(self) -> Gateway:
        daemon = self.start(procs=2)
        self.gateway = self.start_gateway(
            daemon, "--dashboard-token=watchers", secrets={"watchers": f"ops:{TOKEN}\n"}
        )
        self.daemon = daemon
        return self.gateway

    def url(self, token: str) -> str:
        """Name the page, and a token as the password, as a browser's user gives it."""
        return f"http://me:{token}@127.0.0.1:{self.gateway.port}/"

    def change_token(self) -> None:
        """Give the gateway another token in the place of the one that it has."""
        before = self.gateway.serving()
        write_secret(self.gateway.directory / "watchers", f"ops:{NEW_TOKEN}\n")
        self.gateway.signal(signal.SIGHUP)
        self.gateway.wait_until_new(before)

    def cookies(self, page: Page) -> dict[str, dict[str, Any]]:
        """Give the cookies that the browser has."""
        return {cookie["name"]: cookie for cookie in page.driver.get_cookies()}

    def test_sign_in(self) -> None:
        """Who has the token sees the page, and gets a cookie that no script reads."""
        gateway = self.start_with_token()
        self.assertEqual(gateway.get("/").status, http.HTTPStatus.UNAUTHORIZED)
        page = Page(self, width=1280, height=900)
        page.open(self.url(TOKEN))
        page.wait_for_link("live")
        page.wait_for_tiles({"idle": 2})
        cookie = self.cookies(page)[COOKIE]
        self.assertEqual((cookie["httpOnly"], cookie["sameSite"]), (True, "Strict"))
        self.assertNotIn(TOKEN, cookie["value"])
        self.assertEqual(page.js("return document.cookie"), "")
        self.assertNotIn(TOKEN, page.driver.page_source)
        # The cookie alone is enough, also for the feed.
        page.driver.get(gateway.origin + "/")
        page.wait_for_link("live")
        page.wait_for_tiles({"idle": 2})
        self.assert_clean(page)

    def test_without(self) -> None:
        """Who has none, or a wrong one, sees nothing of it, and the feed says why it closes."""
        gateway = self.start_with_token()
        page = Page(self)
        for url in (gateway.origin + "/", self.url("ops-wrong-wrong-wrong-wrong-wrong")):
            page.driver.get(url)
            self.assertEqual(page.driver.find_elements("id", "main"), [])
            self.assertEqual(self.cookies(page), {})

        # The page's own files are no secret; what they are fed with is.
        page.open(gateway.origin + "/dashboard.js")
        closed = page.driver.execute_async_script(
            "const done = arguments[0]; const heard = [];"
            "const socket = new WebSocket(`ws://${location.host}/live`);"
            "socket.onmessage = ({data}) => heard.push(data);"
            "socket.onclose = ({code}) => done([code, heard]);"
        )
        self.assertEqual(closed, [4401, []])

    def test_new_token(self) -> None:
        """When the token is changed the page says that one has to sign in again, and why."""
        self.start_with_token()
        page = Page(self, width=1280, height=900)
        page.open(self.url(TOKEN))
        page.wait_for_link("live")
        page.wait_for_tiles({"idle": 2})
        old = self.cookies(page)[COOKIE]["value"]
        self.change_token()
        self.assert_banner(page, "signin", "Sign in again.", "What you see is from")
        self.assertEqual(page.part("banner-button").text, "Reload the page")
        self.assertEqual(page.text("#banner-retry"), "")
        self.assertEqual(len(page.tiles()), 2)
        page.screenshot("dashboard-signin")
        # It does not knock again: that would be in vain, and soon.
        page.js(
            "window.since = performance.now(); window.opened = 0;"
            "window.WebSocket = class { constructor() { opened += 1; } }"
        )
        page.wait(lambda: page.js("return performance.now() - since > 2000"), "two seconds")
        self.assertEqual((page.js("return opened"), page.link), (0, "signin"))

        page.driver.get(self.url(NEW_TOKEN))
        self.assert_no_banner(page)
        page.wait_for_tiles({"idle": 2})
        self.assertNotEqual(self.cookies(page)[COOKIE]["value"], old)
        self.assert_clean(page)

    def test_unchanged_token(self) -> None:
        """A reload that leaves the token as it is lets the page go on by itself."""
        gateway = self.start_with_token()
        page = Page(self, width=1280, height=900)
        page.open(self.url(TOKEN))
        page.wait_for_link("live")
        before = gateway.serving()
        gateway.signal(signal.SIGHUP)
        page.wait(lambda: page.link != "live", "the old process's end")
        gateway.wait_until_new(before)
        self.assert_no_banner(page)
        self.daemon.ask("add", [1, 2])
        page.wait(lambda: "add" in page.functions(), "news")

    def test_hijack(self) -> None:
        """The cookie goes along with a page of another port, which gets no feed all the same."""
        gateway = self.start_with_token()
        page = Page(self)
        page.open(self.url(TOKEN))
        page.wait_for_link("live")
        page.driver.get(f"http://127.0.0.1:{serve(self, {'/': LOOK % gateway.port})}/")
        # Cookies know no ports.
        self.assertIn(COOKIE, self.cookies(page))
        page.wait(lambda: page.js("return heard") != "nothing yet", "an answer")
        self.assertEqual(page.js("return heard"), "1006")
