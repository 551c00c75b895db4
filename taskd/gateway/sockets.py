"""
What WebSockets are for: a browser's conversation, and the dashboard's feed.

How messages come and go is ``websocket``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, cast

from twisted.internet.interfaces import IDelayedCall

from taskd.access import Grant
from taskd.door import Visitor
from taskd.errand import stop
from taskd.gateway.backend import Backend
from taskd.gateway.conversation import (
    GOING_AWAY,
    RESTART,
    UNAUTHORIZED,
    Conversation,
    Limits,
)
from taskd.gateway.figures import Figures
from taskd.gateway.settings import GatewaySettings
from taskd.gateway.websocket import Socket, SocketFactory

__all__ = ["BrowserFactory", "BrowserSocket", "FeedFactory", "FeedSocket"]

_UNSUPPORTED: Final = 1003

_FIRST_MESSAGE_SECONDS: Final = 30.0
"""Who has to say who it is has said so by then."""


class BrowserSocket(Socket):
    """One WebSocket over which tasks are called."""

    conversation: Conversation | None = None
    grant: Grant | None = None
    token = ""
    visitor: Visitor
    _deadline: IDelayedCall | None = None

    def begun(self) -> None:
        """Begin the conversation, with what the handshake has shown."""
        self.visitor.is_let_in(self.grant)
        self.conversation = self.factory.conversation(self)
        if self.grant is None:
            self._deadline = self.factory.call_later(_FIRST_MESSAGE_SECONDS, self._end_stranger)

    def _end_stranger(self) -> None:
        if self.conversation is not None and not self.conversation.is_known:
            self.hang_up(UNAUTHORIZED, "it was not said who calls")

    def ended(self) -> None:
        """Tell the conversation, which is over."""
        stop(self._deadline)
        self.visitor.left()
        if self.conversation is not None:
            self.conversation.lost()

    def onMessage(self, payload: bytes, is_binary: bool) -> None:
        """Take a message."""
        assert self.conversation is not None
        if is_binary:
            self.hang_up(_UNSUPPORTED, "messages are text")
        elif self.state == self.STATE_OPEN:
            self.conversation.receive(payload)

    def identify(self, token: str, done: Callable[[Grant | None], None]) -> None:
        """Find out what a token grants, and read nothing meanwhile."""
        if not self.factory.asks:
            done(self.grant)
            return
        self.hold(True)

        def identified(grant: Grant | None) -> None:
            if self.has_begun:
                self.hold(False)
                self.visitor.is_let_in(grant)
            done(grant)

        self.visitor.identify(token, self.factory.call_later, identified)

    def turned_down(self, name: str, grant: Grant | None) -> None:
        """Take note that a call was not allowed."""
        self.visitor.turned_down(name, grant)


class BrowserFactory(SocketFactory):
    """
    All WebSockets over which tasks are called.

    Args:
        settings: What the operator decided.
        figures: Where they are counted.
        gone: Called when a connection has gone that was to be a WebSocket.
        reactor: Keeps the delays.
        clock: Gives seconds that never go back.
        backend: Where the calls go.
        asks: Whether callers must show a token; otherwise none is looked at.
    """

    protocol = BrowserSocket

    def __init__(
        self,
        settings: GatewaySettings,
        figures: Figures,
        gone: Callable[[], None],
        reactor: Any,
        clock: Callable[[], float],
        backend: Backend,
        *,
        asks: bool,
    ) -> None:
        super().__init__(settings, figures, gone, reactor, clock)
        self._backend = backend
        self.asks = asks
        self._limits = Limits(settings.max_in_flight, settings.max_rate)

    def conversation(self, socket: BrowserSocket) -> Conversation:
        """Make a WebSocket's conversation."""
        return Conversation(
            socket,
            self._backend,
            self._limits,
            self.figures,
            self.clock,
            socket.visitor.host,
            socket.grant,
            socket.token,
        )

    def drain(self) -> None:
        """Start nothing more; close each when nothing is in flight on it."""
        for socket in list(self.sockets):
            if socket.conversation is not None:
                socket.conversation.drain()

    def end(self) -> None:
        """Close all, whatever is in flight."""
        for socket in list(self.sockets):
            socket.hang_up(RESTART, "the gateway is stopping")


class FeedSocket(Socket):
    """One dashboard that is open."""

    is_allowed = False

    def begun(self) -> None:
        """Show what there was, to who may see it."""
        if self.is_allowed:
            self.send(self.factory.greeting())
        else:
            # Before the handshake nobody could tell the page why.
            self.hang_up(UNAUTHORIZED, "a token is needed here")

    def send(self, message: bytes) -> None:
        """Send a text message, to who may see it."""
        if self.is_allowed:
            super().send(message)

    def onMessage(self, payload: bytes, is_binary: bool) -> None:
        """Take no message: a dashboard looks on."""
        self.hang_up(_UNSUPPORTED, "nothing is to be said here")


class FeedFactory(SocketFactory):
    """
    All dashboards that are open.

    Attributes:
        greet: Gives what a new one is shown first.
    """

    protocol = FeedSocket
    greet: Callable[[], dict[str, Any]]

    def greeting(self) -> bytes:
        """Give what a new one is shown first."""
        return _as_message(self.greet())

    def show(self, news: dict[str, Any]) -> None:
        """Show all of them something; who is behind with reading misses it."""
        if self.sockets:
            message = _as_message(news)
            for socket in list(self.sockets):
                cast(FeedSocket, socket).report(message)

    def end(self) -> None:
        """Close all."""
        for socket in list(self.sockets):
            socket.hang_up(GOING_AWAY, "the gateway is stopping")


def _as_message(news: dict[str, Any]) -> bytes:
    """Write something for the page, in ASCII."""
    return json.dumps(news, separators=(",", ":")).encode()
