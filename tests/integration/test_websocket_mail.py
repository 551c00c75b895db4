"""``examples/websocket_mail``, whole: browser, WebSocket service, daemon, mail server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import urlopen

from aiosmtpd.smtp import Envelope, Session
from twisted.trial.unittest import SynchronousTestCase
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.integration.browser import Browser
from tests.integration.daemon import (
    CHECKOUT,
    WAIT_SECONDS,
    Daemon,
    temporary_directory,
    wait_until,
)
from tests.integration.mail_server import UNWANTED, MailServer

EXAMPLE: Final = CHECKOUT / "examples" / "websocket_mail"
PROCS: Final = 8
MAILS: Final = 1000
HELD_AT: Final = 420
MAILS_SECONDS: Final = 120.0
"""How long a thousand mails may take on a machine that has much else to do."""

MESSAGE: Final = {"from": "me@example.org", "subject": "s", "contents": "c"}


class HeldMailServer(MailServer):
    """
    A mail server that takes so many mails, and lets the others wait.

    Args:
        most: How many it takes before ``go_on``.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._begun = 0
        self._may_go_on = asyncio.Event()

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        """Take a mail when it may be."""
        self._begun += 1
        if self._begun > self._most:
            await self._may_go_on.wait()
        return await super().handle_DATA(server, session, envelope)

    def go_on(self) -> None:
        """Take all that waits, and all that comes."""
        gone_on = threading.Event()
        self.loop.call_soon_threadsafe(self._may_go_on.set)
        self.loop.call_soon_threadsafe(gone_on.set)
        gone_on.wait(WAIT_SECONDS)


class WebSocketMailTestCase(SynchronousTestCase):
    """Base of tests that have a mail server, a daemon, and the service in a process."""

    def start(self, held_at: int = MAILS) -> None:
        """Start them; after *held_at* mails the mail server takes no more for the time being."""
        self.server = HeldMailServer(held_at)
        self.server.start()
        self.addCleanup(self.server.stop)
        self.daemon = Daemon(*("--smtp", f"127.0.0.1:{self.server.port}"), procs=PROCS, tasks=None)
        self.addCleanup(self.daemon.stop)
        self.daemon.start()
        self.start_service(f"tcp:127.0.0.1:{self.daemon.port}")

    def start_service(self, endpoint: str) -> None:
        directory = temporary_directory(self)
        self.errors = directory / "stderr"
        output = directory / "stdout"
        with output.open("wb") as stdout, self.errors.open("wb") as stderr:
            service = subprocess.Popen(
                [sys.executable, EXAMPLE / "service.py", endpoint, "--port", "0"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self.addCleanup(self.stop_service, service)
        said = wait_until(
            lambda: (
                re.search(r"open (http://127\.0\.0\.1:\d+)/\n", output.read_text())
                or self.assertIsNone(service.poll(), self.errors.read_text())
            ),
            what="the service's address",
        )
        self.origin = said[1]

    def stop_service(self, service: subprocess.Popen[bytes]) -> None:
        """It ends as it is told, and has had nothing to complain of."""
        service.terminate()
        self.assertEqual(service.wait(WAIT_SECONDS), 0)
        self.assertEqual(self.errors.read_text(), "")

    def open(self, **options: Any) -> Browser:
        """Start a browser, and open the page."""
        browser = Browser(self, **options)
        browser.driver.get(self.origin + "/")
        return browser

    def send(self, browser: Browser, many: int) -> None:
        """Fill in the form for so many recipients, and send it."""
        browser.fill("from", "me@example.org")
        browser.fill("subject", "Notícias")
        browser.fill("contents", "Olá!\n<b>2 < 3</b>")
        browser.fill("many", str(many))
        browser.part("fill").click()
        browser.wait_for_text("count", f"{many:,} recipient")
        browser.part("send").click()

    def progress(self, browser: Browser) -> tuple[int, int]:
        """Give how far the progress bar is, and its end."""
        bar = browser.part("bar")
        return int(bar.get_property("value")), int(bar.get_property("max"))

    def assert_clean(self, browser: Browser) -> None:
        """Nothing was written to the console."""
        self.assertEqual(browser.console(), [])

    def recipients(self) -> Counter[str]:
        """Give who has got mail, and how many."""
        return Counter(address for mail in self.server.mails for address in mail.recipients)


class PageTests(WebSocketMailTestCase):
    def test_thousand(self) -> None:
        """A thousand mails go out, each once; the bar moves, the page says that it is done."""
        self.start(HELD_AT)
        browser = self.open()
        browser.screenshot("websocket-mail-empty")
        self.send(browser, MAILS)
        wait_until(
            lambda: self.progress(browser) == (HELD_AT, MAILS),
            MAILS_SECONDS,
            what="a bar that has moved",
        )
        self.assertEqual(browser.part("numbers").text, f"{HELD_AT} of 1,000")
        self.assertEqual(browser.part("status").text, "Sending…")
        self.take_pictures(browser, "halfway")
        self.server.go_on()
        wait_until(
            lambda: browser.part("status").text.startswith("Done"), MAILS_SECONDS, what="Done"
        )
        self.assertEqual(browser.part("status").text, "Done. 1,000 of 1,000 mails sent.")
        self.assertEqual(self.progress(browser), (MAILS, MAILS))
        self.assertFalse(browser.part("failed").is_displayed())
        self.take_pictures(browser, "done")
        self.assertEqual(
            self.recipients(), Counter(f"user{n + 1}@example.org" for n in range(MAILS))
        )
        mail = self.server.mails[-1]
        self.assertEqual(mail.message["Subject"], "Notícias")
        self.assertEqual(mail.message.get_content().split(), ["Olá!", "<b>2", "<", "3</b>"])
        self.assert_clean(browser)

    def take_pictures(self, browser: Browser, name: str) -> None:
        """Save how it looks, in both colours, and on a telephone."""
        for width, height in ((1024, 800), (360, 1100)):
            for is_dark in (False, True):
                browser.shape(width=width, height=height, is_dark=is_dark)
                colour = "dark" if is_dark else "light"
                browser.screenshot(f"websocket-mail-{name}-{width}-{colour}")
                wide = browser.driver.execute_script("return document.body.scrollWidth")
                self.assertLessEqual(wide, width)

    def test_close(self) -> None:
        """When the tab is closed, what was not handed out is not sent; others are served on."""
        self.start(held_at=100)
        browser = self.open()
        self.send(browser, MAILS)
        wait_until(lambda: self.progress(browser) == (100, MAILS), MAILS_SECONDS, what="100 mails")
        self.assert_clean(browser)
        first = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        second = browser.driver.current_window_handle
        browser.driver.switch_to.window(first)
        browser.driver.close()
        browser.driver.switch_to.window(second)
        wait_until(self.is_idle, what="the end of all that was asked for")
        self.daemon.wait_until_settled()
        self.server.go_on()

        browser.shape()
        browser.driver.get(self.origin + "/")
        browser.fill("recipients", "later@example.org")
        browser.part("send").click()
        browser.wait_for_text("status", "Done. 1 of 1 mails sent.")
        # What the workers held when they were replaced may have been taken, or not.
        self.assertLessEqual(len(self.server.mails), 100 + PROCS + 1)
        self.assertEqual(self.recipients()["later@example.org"], 1)
        self.assertTrue(self.is_idle())

    def is_idle(self) -> bool:
        """Nothing waits in the daemon, and nothing runs."""
        status = self.daemon.status()
        in_flight = sum(worker["in_flight"] for worker in status["workers"])
        return in_flight == 0 and status["queue"]["waiting"] == 0

    def test_stop(self) -> None:
        """The Stop button stops as well, and the page sends again afterwards."""
        self.start(held_at=10)
        browser = self.open()
        self.send(browser, 50)
        wait_until(lambda: self.progress(browser) == (10, 50), what="ten mails")
        browser.part("stop").click()
        browser.wait_for_text("status", "Stopped at 10 of 50.")
        wait_until(self.is_idle, what="the end of all that was asked for")
        self.server.go_on()
        self.send(browser, 2)
        browser.wait_for_text("status", "Done. 2 of 2 mails sent.")
        self.assertLessEqual(len(self.server.mails), 10 + PROCS + 2)
        self.assert_clean(browser)

    def test_bad_input(self) -> None:
        """What the service cannot take, it says in the page; nothing is sent, markup is text."""
        self.start()
        browser = self.open()
        for recipients, words in (
            ("ana@example.org\nnobody", "“nobody” is not a mail address."),
            ("<b>x</b>", "“<b>x</b>” is not a mail address."),
        ):
            browser.fill("recipients", recipients)
            browser.part("send").click()
            browser.wait_for_text("status", words)
        browser.screenshot("websocket-mail-bad-input")
        self.assertFalse(browser.part("run").is_displayed())
        self.assertFalse(browser.part("stop").is_displayed())
        many = "\n".join(f"u{n}@example.org" for n in range(MAILS + 1))
        browser.driver.execute_script(
            "document.getElementById('recipients').value = arguments[0]", many
        )
        browser.part("send").click()
        browser.wait_for_text("status", "1001 recipients are too many: 1000 at most.")
        self.assertEqual(self.server.mails, [])
        self.assert_clean(browser)

    def test_failures(self) -> None:
        """Who could not be sent to is listed, with the reason; the keyboard is enough for all."""
        self.start()
        browser = self.open(is_dark=True)
        recipients = ["ana@example.org", f"{UNWANTED}1@example.org", f"{UNWANTED}2@example.org"]
        browser.fill("recipients", "\n".join(recipients))
        browser.part("from").send_keys("\ue007")
        browser.wait_for_text("status", "Done. 1 of 3 mails sent.")
        self.assertEqual(browser.part("failed-title").text, "Not sent: 2")
        for recipient in recipients[1:]:
            self.assertIn(recipient, browser.part("failures").text)
        self.assertIn("nobody of that name", browser.part("failures").text)
        browser.screenshot("websocket-mail-failures-dark")
        self.assertEqual(self.recipients(), Counter(["ana@example.org"]))
        self.assert_clean(browser)


class ServiceTests(WebSocketMailTestCase):
    def test_headers(self) -> None:
        """The page's files forbid the browser whatever is not theirs; nothing else is served."""
        self.start_service("tcp:127.0.0.1:1")
        for path, kind in (("", "html"), ("page.js", "javascript"), ("page.css", "css")):
            with urlopen(f"{self.origin}/{path}", timeout=WAIT_SECONDS) as reply:
                self.assertIn(kind, reply.headers["Content-Type"])
                self.assertIn("default-src 'none';", reply.headers["Content-Security-Policy"])
                self.assertNotIn("unsafe", reply.headers["Content-Security-Policy"])
                self.assertEqual(reply.headers["X-Content-Type-Options"], "nosniff")
        for path in ("service.py", "README.rst", "../service.py", "page.js/x", "ws"):
            with self.assertRaises(HTTPError, msg=path) as caught:
                urlopen(f"{self.origin}/{path}", timeout=WAIT_SECONDS)
            caught.exception.close()

    def connect(self, origin: str | None) -> ClientConnection:
        """Open a WebSocket as a page of that origin does."""
        url = self.origin.replace("http:", "ws:") + "/ws"
        return self.enterContext(connect(url, origin=origin, proxy=None, open_timeout=WAIT_SECONDS))

    def ask(self, connection: ClientConnection, **message: Any) -> Any:
        """Send a message and wait for the next one."""
        connection.send(json.dumps(message))
        return json.loads(connection.recv(WAIT_SECONDS))

    def test_foreign_origin(self) -> None:
        """Pages of other origins are refused, and so are those of none."""
        self.start()
        port = self.origin.rpartition(":")[2]
        for origin in (
            "http://page.example",
            f"http://page.example:{port}",
            f"https://127.0.0.1:{port}",
            "http://127.0.0.1",
            f"http://127.0.0.1.page.example:{port}",
            "null",
        ):
            with self.assertRaises(InvalidStatus, msg=origin):
                self.connect(origin)
        for origin in (self.origin, f"http://localhost:{port}"):
            reply = self.ask(self.connect(origin), **MESSAGE, recipients=[])
            self.assertEqual(reply, {"error": "There is no recipient."})

    def test_bad_messages(self) -> None:
        """Whatever else is sent is answered with an error, or ends the connection."""
        self.start()
        connection = self.connect(self.origin)
        good = {**MESSAGE, "recipients": ["you@example.org"]}
        for message in (
            *("", "{", "[]", "1", '"x"', "null", "[" * 100_000, b"\xff", b"\0"),
            *(json.dumps({**good, name: None}) for name in good),
            *(json.dumps({k: v for k, v in good.items() if k != name}) for name in good),
            json.dumps({**good, "recipients": [["x"]]}),
            json.dumps({**good, "recipients": ["you@example.org", 1]}),
            json.dumps({**good, "from": "me@example.org\r\nBcc: x@example.org"}),
            json.dumps({**good, "subject": "a\nb"}),
            json.dumps({**good, "contents": "x" * 20_001}),
        ):
            connection.send(message)
            self.assertEqual(list(json.loads(connection.recv(WAIT_SECONDS))), ["error"], message)
        # Each recipient once, whatever the message has; and one message a connection.
        news = [self.ask(connection, **{**good, "recipients": ["you@example.org"] * 3})]
        news.append(json.loads(connection.recv(WAIT_SECONDS)))
        self.assertEqual(
            news,
            [{"done": done, "failed": 0, "total": 1, "failures": []} for done in (0, 1)],
        )
        self.assertIn("already", self.ask(connection, **good)["error"])
        self.assertEqual(self.recipients(), Counter(["you@example.org"]))
        connection.send("x" * 600_000)
        with self.assertRaises(ConnectionClosedError) as caught:
            connection.recv(WAIT_SECONDS)
        self.assertEqual(caught.exception.rcvd and caught.exception.rcvd.code, 1009)
