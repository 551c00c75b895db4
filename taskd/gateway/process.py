"""
One process of a gateway, put together: the port it shares, the pages, the daemons.

Its supervisor has spawned it, with the listening socket, and says on the standard
input what it is to be: a line of JSON, then ``drain``. When that ends, the
supervisor has gone, and so it drains as well. What it has to say is a line on the
standard output.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import time
from typing import Any, Final

from twisted.internet import main as twisted_main
from twisted.internet.protocol import connectionDone
from twisted.internet.stdio import StandardIO
from twisted.logger import globalLogBeginner
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure

from taskd.accept import SharedPort, SharingReactor
from taskd.access import Access
from taskd.client import TaskClient
from taskd.door import Door
from taskd.gateway.backend import Backend
from taskd.gateway.calls import CallPage, Identities
from taskd.gateway.figures import Figures
from taskd.gateway.identity import Watchers
from taskd.gateway.origin import Origins
from taskd.gateway.pages import Dashboard, Gate, HealthPage, MetricsPage, static
from taskd.gateway.secrets import Secrets
from taskd.gateway.settings import FIGURES_FD, LISTENING_FD, GatewaySettings
from taskd.gateway.site import GatewaySite, Upgrade
from taskd.gateway.sockets import BrowserFactory, FeedFactory
from taskd.gateway.watch import Node, Watch
from taskd.logs import Forwarder
from taskd.process import Title
from taskd.tls import Secure

__all__ = ["Gateway", "main"]

_CONNECT_SECONDS: Final = 5.0
"""A browser is told sooner than a program that there is no daemon."""

_LEAST_POOL: Final = 4
_CALLS_PER_CONNECTION: Final = 512
"""A daemon reads no more from a connection that has ``--max-in-flight`` calls, 1024 by default."""

_HTTP: Final = b"http/1.1"
_MORE_FDS: Final = 1024
_LINE_BYTES: Final = 2**24
_CLOSE_SECONDS: Final = 2.0


class _Anonymous:
    """Takes what a daemon's worker would show on the scoreboard: whose connections it has."""

    def show_callers(self, callers: str) -> None:
        """Show it nowhere."""


class Gateway:
    """
    The parts of one process, and its way from serving to its end.

    Args:
        reactor: The reactor.
        settings: What the operator decided.
        secrets: Tokens and key.
        figures: Where it counts.
    """

    def __init__(
        self,
        reactor: Any,
        settings: GatewaySettings,
        secrets: Secrets,
        figures: Figures,
    ) -> None:
        self._reactor = reactor
        self._settings = settings
        self._figures = figures
        self._pair = secrets.pair
        own_token = secrets.own_token or None
        access = Access(secrets.tokens, settings.allow)
        door = Door(access, _Anonymous(), time.monotonic)
        origins = Origins(
            settings.origins,
            needs_one=settings.needs_origin,
            is_secure=self._pair is not None,
        )
        self._backend = Backend(
            reactor,
            self._connect,
            own_token,
            passes_on=not settings.keep_tokens,
            max_calls=settings.max_calls,
            figures=figures,
        )
        self._watch = Watch(
            reactor,
            [
                Node(endpoint.partition(":")[2], self._connect(own_token, endpoint, 1))
                for endpoint in settings.tasks
            ],
            figures,
            time.monotonic,
            time.time,
        )
        identities = Identities(door, settings.cookie, reactor)
        gate = Gate(Watchers(secrets.watchers), figures, reactor)
        self._calls = CallPage(identities, origins, self._backend, figures)
        self._health = HealthPage(self._backend)
        root = Dashboard(gate if settings.dashboard else None)
        self.site = GatewaySite(root, origins, figures, settings.max_message_bytes, reactor)
        self._browsers = BrowserFactory(
            settings,
            figures,
            self.site.left,
            reactor,
            time.monotonic,
            self._backend,
            asks=door.asks,
        )
        self._feed = FeedFactory(settings, figures, self.site.left, reactor, time.monotonic)
        self._feed.greet = self._watch.greeting
        self._watch.show = self._feed.show
        most = settings.max_connections
        self._upgrades = [Upgrade(self._browsers, origins, figures, most, identities.prepare)]
        root.putChild(b"ws", self._upgrades[0])
        root.putChild(b"call", self._calls)
        root.putChild(b"healthz", self._health)
        root.putChild(b"metrics", MetricsPage(gate, self._watch, figures))
        if settings.dashboard:
            self._upgrades.append(Upgrade(self._feed, origins, figures, most, gate.prepare))
            root.putChild(b"live", self._upgrades[1])
            for path, file in static().items():
                root.putChild(path, file)
        self._port: SharedPort | None = None
        self._is_draining = self._is_going = False

    def _connect(
        self, token: str | None, endpoint: str | None = None, pool: int | None = None
    ) -> TaskClient:
        settings = self._settings
        enough = max(_LEAST_POOL, math.ceil(settings.max_calls / _CALLS_PER_CONNECTION))
        return TaskClient(
            self._reactor,
            list(settings.tasks) if endpoint is None else endpoint,
            ca=settings.tasks_ca or None,
            certificate=settings.tasks_certificate or None,
            token=token,
            pool=pool or enough,
            connect_timeout=_CONNECT_SECONDS,
        )

    def serve(self, listening_fd: int) -> None:
        """Accept connections from now on."""
        wrap = Secure(self._pair, protocol=_HTTP).wrap if self._pair is not None else None
        self.site.startFactory()
        self._figures.begin()
        self._port = SharedPort(
            listening_fd,
            self.site,
            self._reactor,
            wrap,
            is_alone=self._settings.procs == 1,
        )
        if self._settings.dashboard:
            self._watch.start()

    def drain(self) -> None:
        """Accept nothing more, let the calls in flight end within the grace, then go."""
        if self._is_draining:
            return
        self._is_draining = True
        if self._port is not None:
            self._port.close()
        for upgrade in self._upgrades:
            upgrade.close()
        self._calls.close()
        self._health.close()
        self._feed.end()
        self._reactor.callLater(self._settings.grace_seconds, self._end)
        self.site.on_room = self._go_if_quiet
        self._calls.on_quiet = self._go_if_quiet
        self._browsers.drain()
        self._go_if_quiet()

    def _go_if_quiet(self) -> None:
        if self._calls.is_quiet and not self._browsers.sockets:
            self.site.hang_up()  # the last answers may be on their way still
            if not self.site.has_unsent:
                self._go()

    def _end(self) -> None:
        self._browsers.end()
        self._reactor.callLater(_CLOSE_SECONDS, self._go)

    def _go(self) -> None:
        if not self._is_going:
            self._is_going = True
            self._reactor.callLater(0, self._stop)

    def _stop(self) -> None:
        if self._reactor.running:
            self._reactor.stop()


class _Supervisor(LineReceiver):
    """The supervisor, seen from here."""

    delimiter = b"\n"
    MAX_LENGTH = _LINE_BYTES
    transport: Any

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._gateway: Gateway | None = None

    def lineReceived(self, line: bytes) -> None:
        """Begin, or drain."""
        if self._gateway is None:
            self._begin(json.loads(line))
        else:
            self._gateway.drain()

    def _begin(self, told: dict[str, Any]) -> None:
        settings = GatewaySettings.from_json(told["settings"])
        forwarder: Any = Forwarder(settings.log_level, self.transport.write)
        globalLogBeginner.beginLoggingTo([forwarder], redirectStandardIO=False)
        _allow_files(2 * settings.max_connections + _MORE_FDS)
        self._gateway = Gateway(
            self._reactor,
            settings,
            Secrets.from_json(told["secrets"]),
            Figures(FIGURES_FD, told["row"]),
        )
        self._gateway.serve(LISTENING_FD)
        os.close(LISTENING_FD)  # of which it has its own, which alone keeps the port open then
        drain = self._gateway.drain
        signal.signal(signal.SIGTERM, lambda *_: self._reactor.callFromThread(drain))
        Title(f"taskd-gateway: process {told['number']}")
        gc.freeze()
        self.transport.write(b"ready\n")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Drain: the supervisor has gone."""
        if self._gateway is not None:
            self._gateway.drain()
        elif self._reactor.running:
            self._reactor.stop()


def _allow_files(wanted: int) -> None:
    """
    Set how many files may be open, as far as that is allowed.

    As many for connections that speak HTTP as for WebSockets: the port accepts no more
    when they are used up.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def main() -> None:
    """Be one process of a gateway."""
    # A terminal's Ctrl-C is for the supervisor, who will say so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reactor: Any = SharingReactor()  # type: ignore[no-untyped-call]
    twisted_main.installReactor(reactor)
    StandardIO(_Supervisor(reactor), reactor=reactor)
    reactor.run(installSignalHandlers=False)
