"""
HTTP, as far as it is the same for every page: limits, headers, who may come in.

twisted.web puts no bound on a body, and counts a connection as alive for every byte
that comes; here a request has its length, and its time, as a whole. A request that
becomes a WebSocket leaves HTTP by ``Upgrade``.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

from autobahn.twisted.resource import WebSocketResource
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from taskd.door import host_of
from taskd.errand import stop
from taskd.gateway.answers import Refusal
from taskd.gateway.figures import Figures
from taskd.gateway.identity import header_of
from taskd.gateway.origin import Origins
from taskd.gateway.rate import Reading
from taskd.throttle import Throttle

__all__ = ["GatewayChannel", "GatewayRequest", "GatewaySite", "Upgrade"]

_REQUEST_SECONDS: Final = 30.0
"""A request has come within so long, or its connection ends; the next one too."""

_ABORT_SECONDS: Final = 5.0
"""So long an end may take during which nothing that was sent is read."""

_MOST_UNSENT_BYTES: Final = 256 * 1024
"""With more than that to be sent a connection gets no further request answered yet."""

_HEADERS: Final = {
    b"server": b"taskd",
    b"cache-control": b"no-store",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}
"""What every answer says; a page says more of the last one."""

_LONGEST_SHOWN: Final = 100

_NO_HOST_NEEDED: Final = b"/healthz"
"""A balancer's check may name no host, and learns nothing there."""


class GatewayRequest(Request):
    """One request."""

    site: Any
    channel: Any
    _is_too_long = False

    def gotLength(self, length: int | None) -> None:
        """Take the length that is announced, and refuse what is too long before it comes."""
        self.content = BytesIO()
        if length is not None and length > self.channel.site.max_body_bytes:
            self._refuse_length()

    def handleContentChunk(self, data: bytes) -> None:
        """Take a part of the body, as long as it is not too long."""
        if self._is_too_long:
            return
        assert isinstance(self.content, BytesIO)
        if self.content.tell() + len(data) > self.channel.site.max_body_bytes:
            self._refuse_length()
        else:
            super().handleContentChunk(data)  # type: ignore[no-untyped-call]

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Look at the request, now that all of it is there."""
        if not self._is_too_long:
            super().requestReceived(command, path, version)  # type: ignore[no-untyped-call]

    def _refuse_length(self) -> None:
        self._is_too_long = True
        self.requestHeaders.removeHeader(b"expect")  # or it would be told to go on
        self.channel.refuse_length()

    def render(self, resource: Any) -> None:
        """Have a page made, if the request was meant for this place."""
        for name, value in _HEADERS.items():
            self.setHeader(name, value)  # type: ignore[no-untyped-call]
        host = header_of(self, "host")
        if self.path != _NO_HOST_NEEDED and not self.site.origins.admits_host(host):
            self.site.refused("name", host or "", self)
            resource = Refusal(
                403,
                "unauthorized",
                f"{host!a:.100} is no name of this place; --origin https://NAME makes it one",
            )
        super().render(resource)  # type: ignore[no-untyped-call]


class GatewayChannel(http.HTTPChannel):
    """One connection, as long as it speaks HTTP."""

    site: GatewaySite
    transport: Any
    _abortingCall: Any
    _dataBuffer: list[bytes]
    _buffer: bytes
    _waiting: Any = None
    _stalled: Any = None
    _reading: Reading

    def accepted(self) -> None:
        """Take note that the connection has just come (``accept.Guest``)."""

    def adopted(self, luggage: bytes) -> None:
        """Take note that it came from another process, which none does here."""

    def connectionMade(self) -> None:
        """Begin."""
        self.site.came()
        self.site.channels.add(self)
        super().connectionMade()  # type: ignore[no-untyped-call]

    def dataReceived(self, data: bytes) -> None:
        """Take bytes; they buy no time, and behind the end they are nothing."""
        if self._abortingCall is None:
            LineReceiver.dataReceived(self, data)

    def requestDone(self, request: Any) -> None:
        """Go on to the next request, once most of the answers before it are on their way."""
        if self.persistent and self.transport.unsent_bytes > _MOST_UNSENT_BYTES:
            self._waiting = request
            self._reading = Reading()
            self._look_whether_read()
        else:
            super().requestDone(request)  # type: ignore[no-untyped-call]

    def resumeProducing(self) -> None:
        """Go on: what was written is out."""
        super().resumeProducing()  # type: ignore[no-untyped-call]
        request, self._waiting = self._waiting, None
        if request is not None:
            stop(self._stalled)
            super().requestDone(request)  # type: ignore[no-untyped-call]

    def _look_whether_read(self) -> None:
        self._stalled = self.callLater(_REQUEST_SECONDS, self._abort_if_stalled)  # type: ignore[no-untyped-call]

    def _abort_if_stalled(self) -> None:
        if self._reading.goes_on(self.transport.unread_bytes):
            self._look_whether_read()
        else:
            self.transport.abortConnection()

    def timeoutConnection(self) -> None:
        """End a connection whose request has not come in time, or that has idled."""
        self.loseConnection()

    def hang_up(self) -> None:
        """End the connection, once what was answered is out."""
        self.loseConnection()

    def loseConnection(self) -> None:
        """
        End the connection once what was answered is out, as long as that is read.

        Over TLS, and to who does not read, Twisted's own end may never come.
        """
        if self._abortingCall is None:
            self._reading = Reading()
            self._abort_soon()
            super().loseConnection()  # type: ignore[no-untyped-call]

    def _abort_soon(self) -> None:
        self._abortingCall = self.callLater(_ABORT_SECONDS, self._abort_unless_read)  # type: ignore[no-untyped-call]

    def _abort_unless_read(self) -> None:
        if self._reading.goes_on(self.transport.unread_bytes):
            self._abort_soon()
        else:
            self._abortingCall = None
            self.transport.abortConnection()

    def refuse_length(self) -> None:
        """Answer what is too long, and end the connection."""
        body = b'{"error": {"code": "line-too-long", "message": "a body may have %d bytes"}}\n'
        body %= self.site.max_body_bytes
        self.transport.write(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.timeoutConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Let go."""
        super().connectionLost(reason)  # type: ignore[no-untyped-call]
        stop(self._stalled)
        self.site.channels.discard(self)
        self.site.left()

    @property
    def has_more(self) -> bool:
        """Tell whether something has come behind the request that is being answered."""
        return bool(self._dataBuffer or self._buffer)

    def upgrade(self) -> None:
        """Leave the connection to somebody else."""
        self.site.channels.discard(self)
        self.setTimeout(None)  # type: ignore[no-untyped-call]
        self.transport.unregisterProducer()


class GatewaySite(Site):
    """
    All connections of one process.

    Args:
        root: The pages.
        origins: Who may come in.
        figures: Where it is counted who may not.
        max_body_bytes: Longest body of a request.
        reactor: Keeps the time.

    Attributes:
        open_connections: How many connections are open, WebSockets among them.
        channels: Those that speak HTTP.
        on_room: Called when one has gone; set by who accepts them.
    """

    _log = Logger(namespace="taskd.gateway")

    protocol = GatewayChannel  # type: ignore[assignment]
    displayTracebacks = False
    noisy = False

    def __init__(
        self,
        root: Resource,
        origins: Origins,
        figures: Figures,
        max_body_bytes: int,
        reactor: Any,
    ) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            root, GatewayRequest, timeout=_REQUEST_SECONDS, reactor=reactor
        )
        self.origins = origins
        self.figures = figures
        self.max_body_bytes = max_body_bytes
        self.open_connections = 0
        self.channels: set[GatewayChannel] = set()
        self._throttle = Throttle()
        self._clock = reactor.seconds
        self.on_room: Callable[[], None] = lambda: None

    def log(self, request: Any) -> None:
        """Write no line for every request."""

    def refused(self, what: str, value: str, request: Any) -> None:
        """Count a request that came from a wrong page, or to a wrong name, and say so at times."""
        self.figures.add("refused_origin")
        left_out = self._throttle.admit((what, value), self._clock())
        if left_out is not None:
            self._log.warn(
                "{connection}: refused, since its {what} is {value}{more}",
                connection=host_of(request.getClientAddress()),
                what=what,
                value=ascii(value)[:_LONGEST_SHOWN],
                more=f" ({left_out} more were not logged)" if left_out else "",
            )

    def came(self) -> None:
        """Count a connection."""
        self.open_connections += 1

    def left(self) -> None:
        """Take it that a connection has gone."""
        self.open_connections -= 1
        self.on_room()

    @property
    def has_unsent(self) -> bool:
        """Tell whether an answer over HTTP waits to be sent."""
        return any(channel.transport.unsent_bytes for channel in self.channels)

    def hang_up(self) -> None:
        """End all connections that speak HTTP, once what was answered is out."""
        for channel in list(self.channels):
            channel.hang_up()


class Upgrade(Resource):
    """
    The place where a request becomes a WebSocket.

    Args:
        factory: Makes the WebSockets.
        origins: Whose pages may.
        figures: Where it is counted whose may not.
        max_sockets: How many may be open.
        prepare: Takes a request; fires with what the WebSocket's protocol gets as
            attributes, or with None: the request was answered.
    """

    isLeaf = True

    def __init__(
        self,
        factory: Any,
        origins: Origins,
        figures: Figures,
        max_sockets: int,
        prepare: Callable[[Any], Deferred[dict[str, Any] | None]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._factory = factory
        self._origins = origins
        self._figures = figures
        self._max_sockets = max_sockets
        self._prepare = prepare
        self._is_closed = False

    def close(self) -> None:
        """Open no more."""
        self._is_closed = True

    def render(self, request: Any) -> int:
        """Let a request become a WebSocket, or say why not."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal.render(request)
        is_there = [True]
        request.notifyFinish().addErrback(lambda _: is_there.clear())

        def go_on(attributes: dict[str, Any] | None) -> None:
            if attributes is None or not is_there:
                return
            refusal = self._refusal(request)  # that may have taken a while
            if refusal is not None:
                refusal.render(request)
            else:
                self._upgrade(request, attributes)

        self._prepare(request).addCallback(go_on)
        return NOT_DONE_YET

    def _refusal(self, request: Any) -> Refusal | None:
        if (header_of(request, "upgrade") or "").lower() != "websocket" or request.method != b"GET":
            request.setHeader(b"upgrade", b"websocket")
            return Refusal(426, "malformed", "this is the place for WebSockets")
        origin = header_of(request, "origin")
        if not self._origins.admits(origin, header_of(request, "host")):
            request.channel.site.refused("origin", origin or "", request)
            return Refusal(
                403,
                "unauthorized",
                "no origin is named; --no-origin-needed lets programs in"
                if origin is None
                else "pages of this origin may not call; --origin names those that may",
            )
        if request.content.read(1) or request.channel.has_more:
            return Refusal(400, "malformed", "nothing comes behind the request for a WebSocket")
        if self._is_closed:
            return Refusal(503, "shutting-down", "the gateway is stopping")
        if self._figures.get("websockets") >= self._max_sockets:
            self._figures.add("refused_room")
            return Refusal(503, "overloaded", "no more WebSockets can be opened")
        return None

    def _upgrade(self, request: Any, attributes: dict[str, Any]) -> None:
        request.channel.upgrade()
        _Handover(self._factory, attributes).render(request)  # type: ignore[no-untyped-call]


class _Handover(WebSocketResource):
    """Autobahn's way out of twisted.web, with something to take along."""

    def __init__(self, factory: Any, attributes: dict[str, Any]) -> None:
        super().__init__(self)  # type: ignore[no-untyped-call]
        self._makes = factory
        self._attributes = attributes

    def buildProtocol(self, addr: IAddress) -> Any:
        """
        Make the protocol (this is the factory that autobahn asks).

        Autobahn reads the headers once more, less strictly: nothing that decides
        who may come in is taken from what it has read.
        """
        protocol = self._makes.buildProtocol(addr)
        for name, value in self._attributes.items():
            setattr(protocol, name, value)
        return protocol
