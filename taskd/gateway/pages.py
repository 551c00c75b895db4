"""
The pages: health, metrics, and the dashboard.

What is the same for all of them is ``site``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from taskd.door import host_of
from taskd.errors import InternalError, Unauthorized
from taskd.gateway.answers import NOT_KNOWN, Refusal, answer, refuse
from taskd.gateway.backend import Backend
from taskd.gateway.figures import Figures
from taskd.gateway.identity import DASHBOARD_COOKIE, Watchers, header_of
from taskd.gateway.metrics import exposition
from taskd.gateway.watch import Watch
from taskd.throttle import Penalties

__all__ = ["Dashboard", "Gate", "HealthPage", "MetricsPage", "static"]

_PING_SECONDS: Final = 2.0

_PAGE_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'"
)


class HealthPage(Resource):
    """
    ``GET /healthz`` tells whether tasks can be run by way of this process.

    Args:
        backend: Where a daemon is asked.
    """

    isLeaf = True

    def __init__(self, backend: Backend) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._backend = backend
        self._is_closed = False

    def close(self) -> None:
        """Say from now on that this process is stopping."""
        self._is_closed = True

    def render_GET(self, request: Any) -> int:
        """Ask a daemon."""
        if self._is_closed:
            return answer(request, 503, {"status": "stopping"})
        is_there = [True]
        request.notifyFinish().addErrback(lambda _: is_there.clear())
        tenant = self._backend.tenant()
        if tenant.is_stuck:
            tenant.leave()
            return answer(request, 503, {"status": "unreachable"})

        def tell(outcome: Any) -> None:
            tenant.leave()
            if isinstance(outcome, Failure):
                status, word = 503, "unreachable"
            elif outcome == "pong":
                status, word = 200, "ok"
            else:
                status, word = 503, "draining"
            if is_there:
                answer(request, status, {"status": word})

        tenant.client.call_with("taskd.ping", timeout=_PING_SECONDS).addBoth(tell)
        return NOT_DONE_YET


class Gate:
    """
    Who may see the dashboard and the metrics.

    Args:
        watchers: Who may.
        figures: Where it is counted who may not.
        reactor: Keeps the delays of those who guess.
    """

    def __init__(self, watchers: Watchers, figures: Figures, reactor: Any) -> None:
        self._watchers = watchers
        self._figures = figures
        self._reactor = reactor
        self._penalties = Penalties()

    def admit(self, request: Any, show: Callable[[], int]) -> int:
        """
        Have something shown to who may see it, and ask the others for a token.

        Args:
            request: The request.
            show: Shows it.
        """
        if not self._watchers.asks or self._watchers.knows_cookie(request):
            return show()
        token = self._watchers.token_of(request)
        host = host_of(request.getClientAddress())
        is_there = [True]
        request.notifyFinish().addErrback(lambda _: is_there.clear())

        def look() -> None:
            cookie = self._watchers.cookie_for(token) if token else None
            if cookie is not None:
                if is_there:
                    self._give_cookie(request, cookie)
                    show()
                return
            if token:
                self._figures.add("refused_identity")
                self._penalties.failed(host, self._reactor.seconds())
            self._later(host if token else None, ask)

        def ask() -> None:
            if is_there:
                request.setHeader(b"www-authenticate", b'Basic realm="taskd dashboard"')
                refuse(request, Unauthorized("a token is needed here"), NOT_KNOWN)

        self._later(host if token else None, look)
        return NOT_DONE_YET

    def _later(self, host: str | None, act: Callable[[], None]) -> None:
        """Do something, late if there were wrong tokens from a host."""
        wait = 0.0 if host is None else self._penalties.seconds(host, self._reactor.seconds())
        deferLater(self._reactor, wait, act)

    def prepare(self, request: Any) -> Deferred[dict[str, Any] | None]:
        """Find out whether who opens the feed may see it."""
        may = not self._watchers.asks or self._watchers.knows_cookie(request)
        return succeed({"is_allowed": may})

    @staticmethod
    def _give_cookie(request: Any, value: str) -> None:
        request.addCookie(
            DASHBOARD_COOKIE,
            value,
            path=b"/",
            secure=request.isSecure(),
            httpOnly=True,
            sameSite=b"strict",
        )


class MetricsPage(Resource):
    """
    ``GET /metrics``, for Prometheus.

    Args:
        gate: Who may.
        watch: Asks the daemons.
        figures: What the gateway counts.
    """

    _log = Logger(namespace="taskd.gateway")

    isLeaf = True

    def __init__(self, gate: Gate, watch: Watch, figures: Figures) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gate = gate
        self._watch = watch
        self._figures = figures

    def render_GET(self, request: Any) -> int:
        """Ask the daemons, and tell."""
        return self._gate.admit(request, lambda: self._show(request))

    def _show(self, request: Any) -> int:
        is_there = [True]
        request.notifyFinish().addErrback(lambda _: is_there.clear())

        def tell(statuses: Any) -> None:
            if is_there:
                accept = header_of(request, "accept") or ""
                text, kind = exposition(statuses, self._figures.totals(), accept)
                request.setHeader(b"content-type", kind.encode())
                request.write(text)
                request.finish()

        def fail(failure: Failure) -> None:
            self._log.failure("the metrics cannot be told", failure)
            if is_there and not request.startedWriting:
                refuse(request, InternalError("the metrics cannot be told; the log says why"))

        self._watch.statuses().addCallback(tell).addErrback(fail)
        return NOT_DONE_YET


class _File(Resource):
    """One of the dashboard's files, read at the start."""

    isLeaf = True

    def __init__(self, name: str, kind: bytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._content = files("taskd.gateway").joinpath("dashboard", name).read_bytes()
        self._kind = kind

    def render_GET(self, request: Any) -> bytes:
        """Give it."""
        request.setHeader(b"content-type", self._kind)
        request.setHeader(b"content-security-policy", _PAGE_POLICY)
        return self._content


class Dashboard(Resource):
    """
    ``/``: the page to look at, and the root of all others.

    Args:
        gate: Who may see it; None: there is no page.
    """

    def __init__(self, gate: Gate | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gate = gate
        self._page = _File("index.html", b"text/html; charset=utf-8")

    def getChild(self, path: bytes, request: Any) -> Resource:
        """Give what is at a path that has no page of its own."""
        if path == b"" and not request.postpath and self._gate is not None:
            return self
        return Refusal(404, "not-found", "there is nothing here; docs/gateway.rst says what is")

    def render_GET(self, request: Any) -> int | bytes:
        """Show the page."""
        assert self._gate is not None

        def show() -> int:
            request.write(self._page.render_GET(request))
            request.finish()
            return NOT_DONE_YET

        return self._gate.admit(request, show)


def static() -> dict[bytes, Resource]:
    """Give the dashboard's files but the page itself, by their paths."""
    return {
        b"dashboard.css": _File("dashboard.css", b"text/css; charset=utf-8"),
        b"dashboard.js": _File("dashboard.js", b"text/javascript; charset=utf-8"),
    }
