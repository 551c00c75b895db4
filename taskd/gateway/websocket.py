"""
One WebSocket, whatever is said over it: autobahn's protocol, with limits.

Autobahn's own limits are all off; here they are set. What it does not have is added:
a browser that does not read is not read from, and cut off when it never reads.
Whether a request may become a WebSocket at all is ``site``'s to say, and what it is
good for is ``sockets``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet.interfaces import IDelayedCall, IPushProducer
from zope.interface import implementer

from taskd.errand import stop
from taskd.gateway.figures import Figures
from taskd.gateway.rate import Rate, Reading
from taskd.gateway.settings import GatewaySettings

__all__ = ["Socket", "SocketFactory"]

_SUBPROTOCOL: Final = "taskd"
"""A browser that names subprotocols must be given one, or it fails the connection."""

_MOST_UNSENT_BYTES: Final = 64 * 2**20
"""So much may wait for a browser that is slow to read."""

_MORE_FRAMES_A_SECOND: Final = 1000
"""So many frames may come, pings and parts of messages, beside the messages."""

_READ_BYTES: Final = 8192
"""What is taken from one browser at a time, until it is another's turn."""

_HANDSHAKE_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 2.0


class _Quiet:
    """
    Takes what autobahn logs: a line, or more, for each frame that is wrong.

    Strangers would write the log; what matters is counted.
    """

    def _drop(self, *args: Any, **fields: Any) -> None:
        """Say nothing."""

    trace = debug = info = warn = error = critical = failure = _drop


_TEXT: Final = 0x81
_MASKED: Final = 0x80
_LONG: Final = 126
_LONGER: Final = 127
_LEAST_FRAME_BYTES: Final = 6
"""A text message in one frame: its first byte, and how its length is told (RFC 6455, 5.2)."""


def _text_frame(message: bytes) -> bytes:
    size = len(message)
    if size < _LONG:
        return b"%c%c%b" % (_TEXT, size, message)
    if size < 2**16:
        return b"%c%c%b%b" % (_TEXT, _LONG, size.to_bytes(2, "big"), message)
    return b"%c%c%b%b" % (_TEXT, _LONGER, size.to_bytes(8, "big"), message)


@implementer(IPushProducer)
class Socket(WebSocketServerProtocol):
    """
    One WebSocket: what all of them need.

    Attributes:
        has_begun: Whether messages can be sent.
    """

    has_begun = False
    log = _Quiet()
    autoPingTimeout: float
    maxMessagePayloadSize: int  # noqa: N815
    closeHandshakeTimeout: float
    _is_behind = _is_held = False
    _frames: Rate
    _reading: Reading
    _abort: IDelayedCall | None = None
    factory: Any
    transport: Any

    def onConnect(self, request: Any) -> str | None:
        """Choose the subprotocol."""
        return _SUBPROTOCOL if _SUBPROTOCOL in request.protocols else None

    def onOpen(self) -> None:
        """Begin: the handshake is done."""
        self.has_begun = True
        self._frames = Rate(self.factory.max_frame_rate)
        self._reading = Reading()
        below = getattr(self.transport, "transport", None) or self.transport  # of TLS
        below.bufferSize = _READ_BYTES
        self.transport.registerProducer(self, True)
        self.factory.opened(self)
        self.begun()

    def begun(self) -> None:
        """Begin; for those that are more than this."""

    def dataReceived(self, data: bytes) -> None:
        """Take bytes; autobahn's own method first puts together what it would log of them."""
        if self.state == self.STATE_OPEN and self.current_frame is None and not self.data:
            data = self._take_whole(data)
            if not data:
                return
        self._dataReceived(data)

    def onFrameBegin(self) -> None:
        """Take the beginning of a frame, unless there are far too many: pings cost as well."""
        if self._frames.wait(self.factory.clock()):
            self.dropConnection(abort=True)
        else:
            super().onFrameBegin()

    def onMessageFrame(self, payload: Any) -> None:
        """Take a frame's parts; autobahn would keep empty ones, too, of which there is no end."""
        super().onMessageFrame(cast(Any, [part for part in payload if part]))

    def _take_whole(self, data: bytes) -> bytes:
        """
        Take the messages that come first and are one whole frame each; give what is behind them.

        Nearly all are. Autobahn, which takes the rest, is in no hurry with them.

        Source:
            64 calls in flight: 44 us of CPU for each instead of 58 (schedstat).
        """
        start, end = 0, len(data)
        while end - start >= _LEAST_FRAME_BYTES and data[start] == _TEXT:
            size, mask_at = data[start + 1] - _MASKED, start + 2
            if size == _LONG:
                mask_at += 2
                size = int.from_bytes(data[start + 2 : mask_at], "big")
                if size < _LONG:
                    break
            elif not 0 <= size < _LONG:
                break
            begin = mask_at + 4
            if self.inside_message or size > self.maxMessagePayloadSize or end - begin < size:
                break
            start = begin + size
            mask = (data[mask_at:begin] * (size // 4 + 1))[:size]
            payload = int.from_bytes(data[begin:start], "little") ^ int.from_bytes(mask, "little")
            if self._frames.wait(self.factory.clock()):
                self.dropConnection(abort=True)
                return b""
            if self.autoPingTimeoutCall is not None and self.autoPingRestartOnAnyTraffic:
                self._cancelAutoPingTimeoutCall()
            self.onMessage(payload.to_bytes(size, "little"), False)
            if self.state != self.STATE_OPEN:
                break
        return data[start:]

    def onMessageEnd(self) -> None:
        """Give a message; autobahn's own method makes two Deferreds more, for its listeners."""
        if not self.failedByMe:
            self.onMessage(b"".join(self.message_data), self.message_is_binary)
        self.message_data = []

    def onClose(self, was_clean: bool, code: int | None, reason: str | None) -> None:
        """Take it that the connection is gone; nothing comes behind this."""
        stop(self._abort)
        if self.has_begun:
            self.has_begun = False
            self.factory.closed(self)
            self.ended()
        self.factory.gone()

    def ended(self) -> None:
        """Let go; for those that are more than this."""

    def send(self, message: bytes) -> None:
        """Send a text message, unless it is too late for that."""
        if self.has_begun and self.state == self.STATE_OPEN:
            # Autobahn's sendMessage would hold it to the limit for what comes in.
            is_sent = self.transport.write(_text_frame(message))
            if not is_sent and self.transport.unsent_bytes > _MOST_UNSENT_BYTES:
                self.transport.abortConnection()

    def report(self, message: bytes) -> None:
        """Send a text message if what was sent before it is out."""
        if not self._is_behind:
            self.send(message)

    def hang_up(self, code: int, reason: str) -> None:
        """Close in order."""
        if self.state == self.STATE_OPEN:
            self.hold(False)  # or its answer to this would never be read
            self.sendCloseFrame(code=code, reasonUtf8=reason.encode()[:123], isReply=False)

    # Who does not read is not read from.

    def pauseProducing(self) -> None:
        """Read nothing more: what was sent is not read either."""
        self._is_behind = True
        self._read_or_not()

    def resumeProducing(self) -> None:
        """Read again."""
        self._is_behind = False
        self._read_or_not()

    def stopProducing(self) -> None:
        """Take it that the connection is ending."""

    def hold(self, is_on: bool) -> None:
        """Read nothing for a while, or go on."""
        self._is_held = is_on
        self._read_or_not()

    def _read_or_not(self) -> None:
        if self._is_behind or self._is_held:
            self.transport.pauseProducing()
        elif not self.transport.disconnecting:
            self.transport.resumeProducing()

    def onAutoPingTimeout(self) -> None:
        """Drop a browser that gave no sign of life; one that still reads gives one by that."""
        if self._reading.goes_on(self.transport.unread_bytes):
            self.autoPingTimeoutCall = self.factory.call_later(
                self.autoPingTimeout, self.onAutoPingTimeout
            )
            return
        self.factory.was_silent()
        self.autoPingTimeoutCall = None
        self.transport.abortConnection()

    def onCloseHandshakeTimeout(self) -> None:
        """Drop a browser that does not take part in the end, unless it still reads."""
        if self._reading.goes_on(self.transport.unread_bytes):
            self.closeHandshakeTimeoutCall = self.factory.call_later(
                self.closeHandshakeTimeout, self.onCloseHandshakeTimeout
            )
        else:
            super().onCloseHandshakeTimeout()

    def _closeConnection(self, abort: bool = False) -> None:
        """Close the connection; over TLS an orderly end may never come."""
        super()._closeConnection(abort)
        if not abort:
            self._abort = self.factory.call_later(_CLOSE_SECONDS, self.transport.abortConnection)


class _Timers:
    """
    Autobahn's delays, kept by the reactor.

    Its own are up to a second too short, and so none at all where they were less.

    Args:
        reactor: Keeps them.
    """

    def __init__(self, reactor: Any) -> None:
        self.call_later = reactor.callLater


class SocketFactory(WebSocketServerFactory):
    """
    What the WebSockets of one kind have in common.

    Args:
        settings: What the operator decided.
        figures: Where they are counted.
        gone: Called when a connection has gone that was to be a WebSocket.
        reactor: Keeps the delays.
        clock: Gives seconds that never go back.
    """

    noisy = False

    def __init__(
        self,
        settings: GatewaySettings,
        figures: Figures,
        gone: Callable[[], None],
        reactor: Any,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(reactor=reactor, protocols=[_SUBPROTOCOL], server="taskd")  # type: ignore[no-untyped-call]
        self._batched_timer = _Timers(reactor)
        self.max_frame_rate = settings.max_rate + _MORE_FRAMES_A_SECOND
        self.call_later = reactor.callLater
        self.clock = clock
        self.figures = figures
        self.gone = gone
        self.sockets: set[Any] = set()
        self.setProtocolOptions(  # type: ignore[no-untyped-call]
            # Which origins may is decided before, by ``origin``.
            allowedOrigins=["*"],
            allowNullOrigin=True,
            webStatus=False,
            utf8validateIncoming=False,  # the decoder does
            maxFramePayloadSize=settings.max_message_bytes,
            maxMessagePayloadSize=settings.max_message_bytes,
            failByDrop=False,
            openHandshakeTimeout=_HANDSHAKE_SECONDS,
            closeHandshakeTimeout=_CLOSE_SECONDS,
            autoPingInterval=settings.ping_seconds,
            autoPingTimeout=settings.ping_seconds,
            tcpNoDelay=False,  # the listening socket has set it
        )

    def opened(self, socket: Any) -> None:
        """Take in one more."""
        self.sockets.add(socket)
        self.figures.add("websockets")
        self.figures.add("opened")

    def closed(self, socket: Any) -> None:
        """Let one go."""
        self.sockets.discard(socket)
        self.figures.add("websockets", -1)

    def was_silent(self) -> None:
        """Count one that gave no sign of life."""
        self.figures.add("silent")
