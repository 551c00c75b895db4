"""
Calls over HTTP: ``POST /call/FUNCTION``, and who it is that calls, here or by WebSocket.

What is the same for all pages is ``site``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred, succeed
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from taskd.access import AUTH, CANCEL, Grant
from taskd.door import Door, Visitor
from taskd.errors import (
    CallError,
    Malformed,
    ShuttingDown,
    TaskdError,
    Unauthorized,
    UnknownFunction,
)
from taskd.gateway.answers import NOT_KNOWN, Refusal, answer, refuse
from taskd.gateway.backend import Backend
from taskd.gateway.figures import Figures
from taskd.gateway.identity import header_of, token_of
from taskd.gateway.origin import Origins
from taskd.wire import Args, decode

__all__ = ["CallPage", "Identities"]

_OF_A_CONNECTION: Final = frozenset({AUTH, CANCEL})
_QUERY: Final = "a query has timeout=SECONDS and cancel_on_disconnect=true or false, once"


class Identities:
    """
    Find out who calls.

    Args:
        door: Who is let in.
        cookie: The name of the cookie that may hold a token, or ''.
        reactor: Keeps the delays of those who guess.
    """

    def __init__(self, door: Door, cookie: str, reactor: Any) -> None:
        self._door = door
        self._cookie = cookie
        self._reactor = reactor

    def look(self, request: Any) -> Deferred[tuple[Visitor, Grant | None, str]]:
        """
        Look at what a request shows.

        Returns:
            Fires with the visitor, what it may do (None: it is not known), and the
            token that it has shown, or ''.
        """
        visitor = Visitor(self._door, request.getClientAddress())
        token = token_of(request, self._cookie) if self._door.asks else ""
        if not token:
            return succeed((visitor, self._door.unasked, ""))
        found: Deferred[tuple[Visitor, Grant | None, str]] = Deferred()
        visitor.identify(
            token, self._reactor.callLater, lambda grant: found.callback((visitor, grant, token))
        )
        return found

    def prepare(self, request: Any) -> Deferred[dict[str, Any] | None]:
        """Find out who opens a WebSocket; one that shows a wrong token opens none."""

        def looked(found: tuple[Visitor, Grant | None, str]) -> dict[str, Any] | None:
            visitor, grant, token = found
            if grant is None and token:
                refuse(request, Unauthorized("nobody has this token"), NOT_KNOWN)
                return None
            return {"visitor": visitor, "grant": grant, "token": token}

        return self.look(request).addCallback(looked)


class _Order(NamedTuple):
    """What a call over HTTP asks for, in so many bytes."""

    function: str
    args: Args
    size: int
    timeout: float | None
    ends_with_caller: bool


class CallPage(Resource):
    """
    ``POST /call/FUNCTION``: arguments in, result out.

    Args:
        identities: Who calls.
        origins: Whose pages may.
        backend: Where the calls go.
        figures: Where they are counted.
    """

    isLeaf = True

    def __init__(
        self,
        identities: Identities,
        origins: Origins,
        backend: Backend,
        figures: Figures,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._identities = identities
        self._origins = origins
        self._backend = backend
        self._figures = figures
        self._in_flight = 0
        self._is_closed = False
        self.on_quiet: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Take no more calls."""
        self._is_closed = True

    @property
    def is_quiet(self) -> bool:
        """Tell whether no call is in flight."""
        return not self._in_flight

    def render(self, request: Any) -> int:
        """Take a call."""
        if request.method != b"POST":
            request.setHeader(b"allow", b"POST")
            return Refusal(405, "malformed", "a call is a POST").render(request)
        kind = (header_of(request, "content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # What a form of somebody else's page can send is refused by this, too.
            return Refusal(415, "malformed", "the body is application/json").render(request)
        origin = header_of(request, "origin")
        if origin is not None and not self._origins.admits(origin, header_of(request, "host")):
            request.channel.site.refused("origin", origin, request)
            return refuse(
                request,
                Unauthorized("pages of this origin may not call; --origin names those that may"),
            )
        self._figures.add("http_calls")
        try:
            order = _order_of(request)
            if self._is_closed:
                raise ShuttingDown("the gateway is stopping; the task was not started")
        except CallError as error:
            self._figures.add("failed")
            return refuse(request, error)
        self._in_flight += 1
        self._figures.add("in_flight")
        is_there = [True]
        gone = request.notifyFinish()
        called = maybeDeferred(self._identities.look, request)
        called.addCallback(self._call, request, order)

        def over() -> None:
            self._in_flight -= 1
            self._figures.add("in_flight", -1)
            if self.is_quiet:
                self.on_quiet()

        def finish(outcome: Any) -> None:
            if is_there:
                try:
                    self._answer(request, outcome)
                finally:
                    over()
            elif isinstance(outcome, Failure):
                outcome.trap(TaskdError, CancelledError)

        def end(_: Failure) -> None:
            is_there.clear()
            if order.ends_with_caller:
                called.cancel()
            over()  # whatever the task still does, nobody waits for it

        gone.addErrback(end)
        called.addBoth(finish)
        return NOT_DONE_YET

    def _call(
        self, found: tuple[Visitor, Grant | None, str], request: Any, order: _Order
    ) -> Deferred[Any]:
        visitor, grant, token = found
        if grant is None:
            request.setHeader(b"www-authenticate", b"Bearer")
            request.setResponseCode(NOT_KNOWN)
            raise Unauthorized("nobody has this token" if token else "show a token")
        if grant.may_call is not None and not grant.may_call(order.function):
            visitor.turned_down(order.function, grant)
            self._figures.add("refused_identity")
            who = grant.identity or "who shows no token"
            raise Unauthorized(f"{who} may not call {order.function!a:.140}; --allow says so")
        tenant = self._backend.tenant(token)
        called = tenant.call(
            order.function,
            order.args,
            order.size,
            grant.identity or visitor.host,
            timeout=order.timeout,
            cancel_on_disconnect=order.ends_with_caller,
        )

        def leave(outcome: Any) -> Any:
            tenant.leave()
            return outcome

        return called.addBoth(leave)

    def _answer(self, request: Any, outcome: Any) -> None:
        if not isinstance(outcome, Failure):
            answer(request, 200, {"result": outcome})
            return
        self._figures.add("failed")
        error = self._backend.error_of(outcome)
        is_unknown = isinstance(error, Unauthorized) and request.code == NOT_KNOWN
        refuse(request, error, NOT_KNOWN if is_unknown else None)


def _order_of(request: Any) -> _Order:
    """
    Read a call.

    Raises:
        Malformed: It is none.
        UnknownFunction: It can be called over a WebSocket only.
    """
    function = b"/".join(request.postpath).decode("utf-8", "replace")
    if not function:
        raise Malformed("name the function in the path: /call/FUNCTION")
    query = request.uri.partition(b"?")[2]
    if query and len(query.split(b"&")) != sum(map(len, request.args.values())):
        raise Malformed(_QUERY)  # twisted.web drops what has no value
    timeout, ends_with_caller = None, False
    for name, values in request.args.items():
        value = values[0].decode("latin-1")
        if name == b"timeout" and len(values) == 1:
            timeout = _seconds_of(value)
        elif name == b"cancel_on_disconnect" and len(values) == 1 and value in ("true", "false"):
            ends_with_caller = value == "true"
        else:
            raise Malformed(_QUERY)
    if function in _OF_A_CONNECTION:
        # Many callers share the connections to the daemon, and must not speak for it.
        raise UnknownFunction(f"{function} concerns a WebSocket; there is none here")
    body = request.content.read().strip() or b"{}"
    size = len(body)
    if body.startswith(b"{"):
        return _Order(function, decode(body), size, timeout, ends_with_caller)
    wrapped = decode(b'{"args":%b}' % body)
    if wrapped.keys() != {"args"} or type(wrapped["args"]) is not list:
        raise Malformed("the body is an object of named arguments, or an array of arguments")
    return _Order(function, wrapped["args"], size, timeout, ends_with_caller)


def _seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise Malformed("timeout must be a number of seconds above 0 and below 1e9")
    return seconds
