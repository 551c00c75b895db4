"""
HTTP, as far as it is the same for every page: limits, headers, who may come in.

twisted.web puts no bound on a body, and counts a connection as alive for every byte
that comes; here a request has its length, and its time, as a whole. A request that
becomes a WebSocket leaves HTTP by ``Upgrade``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import BytesIO
from typing import Any, Final

from autobahn.twisted.resource import WebSocketResource
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import connectionDone
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from taskd.errors import CallError, Overloaded
from taskd.gateway.figures import Figures
from taskd.gateway.identity import header_of
from taskd.gateway.origin import Origins
from taskd.gateway.rate import Reading

__all__ = [
    "NOT_KNOWN",
    "GatewayChannel",
    "GatewayRequest",
    "GatewaySite",
    "Refusal",
    "Upgrade",
    "answer",
    "refuse",
]

_REQUEST_SECONDS: Final = 30.0
"""A request has come within so long, or its connection ends; the next one too."""

_ABORT_SECONDS: Final = 5.0
"""So long an end may take during which nothing that was sent is read."""

_MOST_UNREAD_BYTES: Final = 256 * 1024
"""With more than that on its way a connection gets no further request answered."""

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

_STATUSES: Final = {
    "malformed": 400,
    "line-too-long": 413,
    "unknown-function": 404,
    "bad-arguments": 422,
    "task-failed": 500,
    "time-limit": 504,
    "cancelled": 409,
    "worker-lost": 502,
    "overloaded": 503,
    "shutting-down": 503,
    "unauthorized": 403,
    "internal": 500,
}
"""The HTTP status of each error of the wire."""

NOT_KNOWN: Final = 401
"""The HTTP status for who has shown nothing, or what nobody knows."""

_NO_HOST_NEEDED: Final = b"/healthz"
"""A balancer's check may name no host, and learns nothing there."""


def answer(request: Any, status: int, body: object) -> int:
    """
    Answer a request in JSON.

    Args:
        request: The request.
        status: The HTTP status.
        body: What JSON can carry.

    Returns:
        What ``render`` returns for it.
    """
    request.setResponseCode(status)
    request.setHeader(b"content-type", b"application/json")
    content = json.dumps(body).encode() + b"\n"
    request.setHeader(b"content-length", b"%d" % len(content))
    if request.method != b"HEAD":
        request.write(content)
    request.finish()
    return NOT_DONE_YET


def refuse(request: Any, error: CallError, status: int | None = None) -> int:
    """
    Answer a request with an error of the wire.

    Args:
        request: The request.
        error: What is wrong.
        status: The HTTP status; None: that of the error.

    Returns:
        What ``render`` returns for it.
    """
    fields = {
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        **error.details,
    }
    if isinstance(error, Overloaded) and error.retry_after:
        request.setHeader(b"retry-after", b"%d" % math.ceil(error.retry_after))
    return answer(request, status or _STATUSES[error.code], {"error": fields})


class Refusal(Resource):
    """
    Answers whatever is asked with an error.

    Args:
        status: The HTTP status.
        code: What is wrong, for programs.
        message: What is wrong, for people.
    """

    isLeaf = True

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._status = status
        self._error = {"code": code, "message": message, "retryable": False}

    def render(self, request: Any) -> int:
        """Answer."""
        return answer(request, self._status, {"error": self._error})


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
            self.site.figures.add("refused_origin")
            resource = Refusal(
                403, "unauthorized", "this place has another name; the gateway's --origin names it"
            )
        super().render(resource)  # type: ignore[no-untyped-call]


class GatewayChannel(http.HTTPChannel):
    """One connection, as long as it speaks HTTP."""

    site: GatewaySite
    transport: Any
    _abortingCall: Any
    _dataBuffer: list[bytes]
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
        """Go on to the next request, unless the answers to those before are not read."""
        if self.transport.unsent_bytes > _MOST_UNREAD_BYTES:
            self.persistent = False
        super().requestDone(request)  # type: ignore[no-untyped-call]

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
        if self._reading.goes_on(self.transport.unsent_bytes):
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
        self.site.channels.discard(self)
        self.site.left()

    @property
    def has_more(self) -> bool:
        """Tell whether something has come behind the request that is being answered."""
        return bool(self._dataBuffer)

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
        self.on_room: Callable[[], None] = lambda: None

    def log(self, request: Any) -> None:
        """Write no line for every request."""

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
        if not self._origins.admits(header_of(request, "origin"), header_of(request, "host")):
            self._figures.add("refused_origin")
            return Refusal(
                403,
                "unauthorized",
                "pages of this origin may not call; --origin names those that may",
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
