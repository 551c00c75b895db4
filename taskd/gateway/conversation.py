"""
One browser's conversation: the wire's messages, one to a WebSocket message.

Sans-I/O: messages come in by ``receive`` and leave by the peer that the conversation
was given. What they may be, and in which order replies go out, is as on the wire
(docs/protocol.rst); the tasks run wherever the daemons are. A browser is trusted
less than a program: it may call what is allowed, so many things at a time, so many
a second, and push ahead of nobody.

No sockets here; the time comes from a clock that is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from taskd.access import AUTH, CANCEL, Grant
from taskd.errors import (
    BadArguments,
    CallError,
    Cancelled,
    Malformed,
    Overloaded,
    ShuttingDown,
    Unauthorized,
)
from taskd.gateway.backend import Backend
from taskd.gateway.figures import Figures
from taskd.gateway.rate import Rate
from taskd.wire import (
    ABSENT,
    Args,
    Terms,
    decode_request,
    encode,
    encode_error,
    encode_progress,
    encode_result,
)

__all__ = ["GOING_AWAY", "POLICY", "RESTART", "UNAUTHORIZED", "Conversation", "Limits", "Peer"]

GOING_AWAY: Final = 1001
POLICY: Final = 1008
RESTART: Final = 1012
UNAUTHORIZED: Final = 4401
"""Codes that a WebSocket is closed with (RFC 6455, section 7.4; 4000 and above are ours)."""

_MOST_ANSWERS: Final = 1000
"""So many answers may wait for their turn, beside those of calls."""

_TRY_AGAIN_SECONDS: Final = 0.5


class Limits(NamedTuple):
    """
    What one conversation may take.

    Attributes:
        max_in_flight: Calls at a time, from 1.
        max_rate: Messages a second, above 0.
    """

    max_in_flight: int
    max_rate: float


class Peer(Protocol):
    """The other end of the conversation: a WebSocket, seen from here."""

    def send(self, message: bytes, /) -> None:
        """Take a message, without a line feed."""

    def report(self, message: bytes, /) -> None:
        """Take a progress message, or drop it if its reader is behind."""

    def hang_up(self, code: int, reason: str, /) -> None:
        """Close once all that was sent is out."""

    def identify(self, token: str, done: Callable[[Grant | None], None], /) -> None:
        """Find out what a token grants; possibly later."""

    def turned_down(self, name: str, grant: Grant | None, /) -> None:
        """Take note that a call was not allowed."""


class Conversation:
    """
    The gateway's side of one WebSocket.

    Args:
        peer: Who asks.
        backend: Where the calls go.
        limits: How much it may ask for.
        figures: Where it is counted.
        clock: Gives seconds that never go back.
        host: Where it is, for what nobody may have too much of.
        grant: What may be called, or None: nothing before ``taskd.auth``.
        token: What was shown for it, or ''.
    """

    def __init__(
        self,
        peer: Peer,
        backend: Backend,
        limits: Limits,
        figures: Figures,
        clock: Callable[[], float],
        host: str,
        grant: Grant | None,
        token: str = "",
    ) -> None:
        self._peer = peer
        self._backend = backend
        self._max_in_flight = limits.max_in_flight
        self._figures = figures
        self._clock = clock
        self._grant = grant
        self._who = (grant.identity if grant is not None else "") or host
        self._tenant = backend.tenant(token)
        self._rate = Rate(limits.max_rate)
        self._in_flight: set[_Call] = set()
        self._in_order: deque[_Call] = deque()
        self._unread: deque[bytes] | None = None
        self._close_with = GOING_AWAY, ""
        self._is_ending = self._is_draining = self._has_hung_up = self._is_gone = False

    @property
    def is_known(self) -> bool:
        """Tell whether something may be called."""
        return self._grant is not None

    def receive(self, message: bytes) -> None:
        """
        Take one message.

        Args:
            message: A request in JSON. An empty one is a keep-alive.
        """
        if self._is_ending:
            return
        if self._unread is not None:
            self._unread.append(message)
            return
        wait = self._rate.wait(self._clock())
        if not message:
            if self._rate.is_out_of_patience():
                self._refuse_haste(ABSENT, wait)
            return
        self._figures.add("messages")
        id_json = ABSENT
        try:
            name, args, id_json, terms = decode_request(message)
            if wait:
                self._refuse_haste(id_json, wait)
            elif not self._is_allowed(name):
                self._turn_down(name, id_json)
            elif name == CANCEL:
                self._cancel(id_json, _only("id", name, args))
            elif name == AUTH:
                self._authenticate(id_json, _only("token", name, args))
            else:
                self._start(name, args, id_json, terms, len(message))
        except Malformed as error:
            self._end(error.id_json, error, POLICY)
        except CallError as error:
            if self._grant is None:  # who is not known has had its say
                self._end(id_json, error, UNAUTHORIZED)
            else:
                self._fail(id_json, error)

    def _is_allowed(self, name: str) -> bool:
        grant = self._grant
        if grant is None:
            return name == AUTH
        return grant.may_call is None or grant.may_call(name)

    def _turn_down(self, name: str, id_json: str) -> None:
        self._figures.add("refused_identity")
        self._peer.turned_down(name, self._grant)
        if self._grant is None:
            error = Unauthorized(f"say first who you are: call {AUTH} with a token")
            self._end(id_json, error, UNAUTHORIZED)
            return
        who = self._grant.identity or "a browser that shows no token"
        raise Unauthorized(f"{who} may not call {name!a:.140}; the gateway's --allow says so")

    def _refuse_haste(self, id_json: str, wait: float) -> None:
        self._figures.add("refused_rate")
        error = Overloaded("too many messages a second", retry_after=round(wait, 3))
        if self._rate.is_out_of_patience():
            self._end(id_json, error, POLICY)
        else:
            raise error

    def _start(self, name: str, args: Args, id_json: str, terms: Terms, size: int) -> None:
        if self._is_draining:
            raise ShuttingDown("the gateway is stopping; the task was not started")
        if max(len(self._in_flight), len(self._in_order)) >= self._max_in_flight:
            self._figures.add("refused_room")
            raise Overloaded(
                f"{self._max_in_flight} calls are in flight", retry_after=_TRY_AGAIN_SECONDS
            )
        if terms.priority > 0:
            raise Unauthorized('a browser may not push ahead: "priority" is 0 at most')
        call = _Call(name, id_json, terms)
        self._in_flight.add(call)
        self._figures.add("in_flight")
        if not id_json:
            self._in_order.append(call)
        call.task = self._tenant.call(
            name,
            args,
            size,
            self._who,
            timeout=terms.timeout,
            on_progress=self._reporter(id_json) if terms.wants_progress else None,
            priority=terms.priority,
            cancel_on_disconnect=terms.ends_with_caller,
        )
        call.task.addCallbacks(
            self._succeeded, self._failed, callbackArgs=(call,), errbackArgs=(call,)
        )

    def _reporter(self, id_json: str) -> Callable[[Any, Any, Any], None]:
        def report(done: Any, total: Any, message: Any) -> None:
            if not self._is_gone:
                self._peer.report(encode_progress(id_json, done, total, message)[:-1])

        return report

    def _succeeded(self, result: Any, call: _Call) -> None:
        self._finish(call, encode_result(call.id_json, result))

    def _failed(self, failure: Failure, call: _Call) -> None:
        if call not in self._in_flight:  # its caller has gone, and may have it cancelled by that
            return
        if call.is_cancelled:
            error: CallError = Cancelled(f"{call.name} was cancelled by its caller")
        else:
            error = self._backend.error_of(failure)
        self._figures.add("failed")
        self._finish(call, encode_error(call.id_json, error))

    def _finish(self, call: _Call, reply: bytes) -> None:
        if call not in self._in_flight:  # its caller has gone
            return
        self._in_flight.remove(call)
        self._figures.add("in_flight", -1)
        call.reply = reply[:-1]
        if call.id_json:
            self._peer.send(call.reply)
        else:
            self._send_in_order()
        self._hang_up_if_done()

    def _send_in_order(self) -> None:
        turns = self._in_order
        while turns and (reply := turns[0].reply) is not None:
            turns.popleft()
            self._peer.send(reply)

    def _emit(self, id_json: str, reply: bytes) -> None:
        """Send an answer, in its turn if it has no id."""
        if id_json or not self._in_order:
            self._peer.send(reply[:-1])
        else:
            turn = _Call("", ABSENT, _NO_TERMS)
            turn.reply = reply[:-1]
            self._in_order.append(turn)
            if len(self._in_order) > self._max_in_flight + _MOST_ANSWERS and not self._is_ending:
                self._is_ending = True
                self._close_with = POLICY, "too many answers wait for their turn"

    def _fail(self, id_json: str, error: CallError) -> None:
        self._figures.add("failed")
        self._emit(id_json, encode_error(id_json, error))

    def _end(self, id_json: str, error: CallError, code: int) -> None:
        """Answer what breaks the conversation; what is in flight is answered, then it closes."""
        self._fail(id_json, error)
        self._is_ending = True
        self._close_with = code, error.code
        self._hang_up_if_done()

    # What concerns the conversation itself.

    def _cancel(self, id_json: str, wanted: Any) -> None:
        wanted_json = encode(wanted)
        found = [call for call in self._in_flight if call.id_json == wanted_json]
        # First, since with the last call in flight the conversation may be over.
        self._emit(id_json, encode_result(id_json, bool(found)))
        for call in found:
            call.is_cancelled = True
            if call.task is not None:
                call.task.cancel()

    def _authenticate(self, id_json: str, token: Any) -> None:
        if not isinstance(token, str):
            raise BadArguments(f"{AUTH}: a token is a string")
        self._unread = deque()

        def done(grant: Grant | None) -> None:
            unread, self._unread = self._unread, None
            if self._is_gone:
                return
            if grant is None:
                self._figures.add("refused_identity")
                self._end(id_json, Unauthorized("nobody has this token"), UNAUTHORIZED)
                return
            self._grant = grant
            self._who = grant.identity or self._who
            self._tenant.leave()
            # Where nobody is asked for a token, none was looked at.
            self._tenant = self._backend.tenant(token if grant.token else "")
            self._emit(id_json, encode_result(id_json, grant.identity or None))
            for message in unread or ():
                self.receive(message)
            self._hang_up_if_done()

        self._peer.identify(token, done)

    def drain(self) -> None:
        """Start nothing more; hang up when nothing is in flight."""
        self._is_draining = True
        if not self._is_ending:
            self._close_with = RESTART, "the gateway is stopping"
        self._hang_up_if_done()

    def lost(self) -> None:
        """
        Take it that the browser has gone.

        Its tasks go on, unless it wanted otherwise; their replies are dropped.
        """
        self._is_gone = self._is_ending = True
        left, self._in_flight = self._in_flight, set()
        self._figures.add("in_flight", -len(left))
        for call in left:
            if call.terms.ends_with_caller and call.task is not None:
                call.task.cancel()
        self._tenant.leave()

    def _hang_up_if_done(self) -> None:
        if not (self._is_ending or self._is_draining) or self._in_flight:
            return
        if self._unread is not None:  # who it is will be answered
            return
        if not (self._is_gone or self._has_hung_up):
            self._is_ending = self._has_hung_up = True
            self._peer.hang_up(*self._close_with)


_NO_TERMS: Final = Terms()


class _Call:
    """One call in flight, or an answer that waits for its turn."""

    __slots__ = ("id_json", "is_cancelled", "name", "reply", "task", "terms")

    def __init__(self, name: str, id_json: str, terms: Terms) -> None:
        self.name = name
        self.id_json = id_json
        self.terms = terms
        self.task: Deferred[None] | None = None
        self.reply: bytes | None = None
        self.is_cancelled = False


def _only(parameter: str, name: str, args: Args) -> Any:
    """Bind the one argument that a function of the conversation takes."""
    if isinstance(args, dict) and args.keys() == {parameter}:
        return args[parameter]
    if isinstance(args, list) and len(args) == 1:
        return args[0]
    raise BadArguments(f"{name} takes one argument, {parameter}")
