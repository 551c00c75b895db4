"""
A WebSocket service whose page sends mail to many, and shows how far it is.

The browser's message is one mail and its recipients. Each recipient becomes a task of the
daemon, so the service itself never waits for a mail server: it goes on serving everybody,
and tells the browser what has become of the tasks as they end::

    .venv/bin/twistd -n taskd --port 12345 --procs 16 --smtp 127.0.0.1:8025
    .venv/bin/python examples/websocket_mail/service.py tcp:127.0.0.1:12345
"""

# ruff: noqa: N803 - the arguments are named as autobahn names them

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from autobahn.exception import Disconnected
from autobahn.twisted.resource import WebSocketResource
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from mails import mails_of
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.task import react
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import Request, Site

from taskd.client import TaskClient

MOST_CONNECTIONS = 100
LONGEST_MESSAGE_BYTES = 512 * 1024
LONGEST_REASON = 200
PING_SECONDS = 20

HOST = "127.0.0.1"
HERE = Path(__file__).resolve().parent
FILES = {
    b"": ("page.html", b"text/html; charset=utf-8"),
    b"page.js": ("page.js", b"text/javascript; charset=utf-8"),
    b"page.css": ("page.css", b"text/css; charset=utf-8"),
}
HEADERS = {
    # The page is made of these three files and the WebSocket, and of nothing else.
    b"Content-Security-Policy": b"default-src 'none'; script-src 'self'; style-src 'self'; "
    b"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'",
    b"Referrer-Policy": b"no-referrer",
    b"X-Content-Type-Options": b"nosniff",
}


class MailProtocol(WebSocketServerProtocol):
    """The connection of one browser, which asks once, and is told until all is done."""

    calls: Sequence[Deferred[Any]] = ()

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        """Hand all mails to the daemon; this returns long before they are sent."""
        try:
            mails = mails_of(payload, is_first=not self.calls)
        except ValueError as error:
            self.tell(error=str(error))
            return
        report = Report(len(mails), self.tell)
        call = partial(self.factory.client.call_with, "send_mail", cancel_on_disconnect=True)
        self.calls = [call(mail) for mail in mails]
        for called, mail in zip(self.calls, mails, strict=True):
            called.addCallbacks(report.sent, report.failed, errbackArgs=[mail["to"]])

    def onClose(self, wasClean: bool, code: int, reason: str) -> None:
        """Cancel what is not sent yet, the last first: those have not been begun."""
        for called in reversed(self.calls):
            called.cancel()

    def tell(self, **news: Any) -> None:
        """Send news to the browser, unless it is just leaving."""
        with suppress(Disconnected):
            self.sendMessage(json.dumps(news).encode())


class Report:
    """
    What has become of one message's mails, told at each percent.

    Args:
        total: How many mails there are.
        tell: Takes ``done``, of which so many ``failed``, of this ``total``; and the
            ``failures`` since it was told last.
    """

    def __init__(self, total: int, tell: Callable[..., None]) -> None:
        self._total = total
        self._done = self._failures = 0
        self._news: list[dict[str, str]] = []
        self._tell = tell
        self._send()

    def sent(self, result: dict[str, Any]) -> None:
        """Count a mail that the mail server has taken."""
        self._count()

    def failed(self, failure: Failure, to: str) -> None:
        """Count a mail that was not sent, and note why."""
        if failure.check(CancelledError):  # by ourselves, because the browser is gone
            return
        self._failures += 1
        self._news.append({"to": to, "why": failure.getErrorMessage()[:LONGEST_REASON]})
        self._count()

    def _count(self) -> None:
        self._done += 1
        if self._done * 100 // self._total > (self._done - 1) * 100 // self._total:
            self._send()

    def _send(self) -> None:
        news, self._news = self._news, []
        self._tell(done=self._done, failed=self._failures, total=self._total, failures=news)


class Page(Resource):
    """
    One file of the page.

    Args:
        name: The file's name.
        content_type: What it is.
    """

    def __init__(self, name: str, content_type: bytes) -> None:
        super().__init__()
        self._body = (HERE / name).read_bytes()
        self._headers = {**HEADERS, b"Content-Type": content_type}

    def render_GET(self, request: Request) -> bytes:
        """Answer with the file."""
        for name, value in self._headers.items():
            request.setHeader(name, value)
        return self._body


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Send mail to many from a page.")
    parser.add_argument("endpoint", nargs="?", default="tcp:127.0.0.1:12345", help="of taskd")
    parser.add_argument("--port", type=int, default=8080, help="of the page; 0: a free one")
    return parser.parse_args(words)


async def main(reactor: Any, *words: str) -> None:
    """Serve the page and its WebSocket until Ctrl-C."""
    options = parse(words)
    factory = WebSocketServerFactory()
    factory.protocol = MailProtocol
    try:
        factory.client = TaskClient(reactor, options.endpoint)
    except ValueError as error:
        sys.exit(str(error))
    root = Resource()
    for path, (name, content_type) in FILES.items():
        root.putChild(path, Page(name, content_type))
    root.putChild(b"ws", WebSocketResource(factory))
    try:
        listening = await TCP4ServerEndpoint(reactor, options.port, interface=HOST).listen(
            Site(root)
        )
    except CannotListenError as error:
        sys.exit(str(error))
    port = listening.getHost().port
    factory.setProtocolOptions(
        # Any page of the web may open a WebSocket to here; without this it would be let in.
        allowedOrigins=[f"http://{HOST}:{port}", f"http://localhost:{port}"],
        # By default a message may have any length, and any number of browsers may come.
        maxMessagePayloadSize=LONGEST_MESSAGE_BYTES,
        maxFramePayloadSize=LONGEST_MESSAGE_BYTES,
        maxConnections=MOST_CONNECTIONS,
        # A browser that is gone without a goodbye is noticed by this alone.
        autoPingInterval=PING_SECONDS,
        autoPingTimeout=PING_SECONDS,
        # Say why a connection is closed, instead of dropping it.
        failByDrop=False,
        webStatus=False,
    )
    # A turn later: when the reactor runs, and Ctrl-C is its own.
    reactor.callLater(0, partial(print, f"open http://{HOST}:{port}/", flush=True))
    await Deferred()


if __name__ == "__main__":
    react(main, sys.argv[1:])
