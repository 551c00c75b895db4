"""
One peer's conversation: what each line asks, and in which order replies go out.

Sans-I/O: bytes come in by ``receive`` one line at a time, and leave by the
callables that the session was given. Replies to requests with an id leave when
they are ready; replies without one leave in the order of their requests, since
nothing else tells them apart. The tasks themselves run side by side.

A caller that has to say who it is may call nothing before; then what its grant
allows. What a token grants is ``door``'s to tell.

No sockets here, no threads, no clock.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred

from taskd.access import AUTH, CANCEL, Grant
from taskd.call import Call, Origin
from taskd.errors import (
    BadArguments,
    CallError,
    Cancelled,
    LineTooLong,
    Malformed,
    ShuttingDown,
    Unauthorized,
    UnknownFunction,
)
from taskd.functions import RESERVED_PREFIX, Function, Kind, Registry
from taskd.wire import (
    ABSENT,
    NO_TERMS,
    Args,
    decode_request,
    encode,
    encode_error,
    encode_result,
)

__all__ = ["Books", "Peer", "Runner", "Session", "session_functions"]

_HTTP: Final = re.compile(
    rb"[\w!#$%&'*+.^`|~-]+ [^ ]* ?HTTP/\d|[A-Za-z][A-Za-z-]*: |[A-Z]{3,20} (/|\*|http)"
)
_TLS_HANDSHAKE: Final = b"\x16\x03"


class Books(Protocol):
    """Where it is counted what calls come to: a ``Ledger``, seen from here."""

    @property
    def done(self) -> Callable[[bytes, float], None]: ...  # noqa: D102
    def failed(self, call: Call, /) -> None: ...  # noqa: D102
    def refused(self, function: Function, error: CallError, /) -> None: ...  # noqa: D102


class Runner(Protocol):
    """What runs the tasks: an ``Executor``, seen from here."""

    @property
    def ledger(self) -> Books: ...  # noqa: D102

    def call_now(  # noqa: D102
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
        origin: Origin | None,
        /,
    ) -> bytes | Deferred[Any]: ...

    def start(self, call: Call, pending: Deferred[Any] | None, /) -> None: ...  # noqa: D102
    def send_on(self, call: Call, /) -> None: ...  # noqa: D102


class Peer(Protocol):
    """The other end of the conversation: a connection, seen from here."""

    def write(self, line: bytes, /) -> None:
        """Take a whole line."""

    def report(self, line: bytes, /) -> None:
        """Take a progress message, or drop it if its reader is behind."""

    def hang_up(self) -> None:
        """
        Close once all that was written is out.

        Called at most once, and not after ``Session.lost``.
        """

    def cut_off(self, protocol: str, /) -> None:
        """Close at once, without a word: it speaks that other protocol."""

    def hold_while_full(self, is_on: bool, /) -> None:
        """Take whether to stop reading; what has been read may still come."""

    def identify(self, token: str, done: Callable[[Grant | None], None], /) -> None:
        """Find out what a token grants; nothing is read until that is done."""

    def turned_down(self, name: str, grant: Grant | None, /) -> None:
        """Take note that a call was not allowed."""


class Session:
    """
    The server's side of one connection.

    Args:
        functions: What may be called.
        runner: Runs what is called.
        peer: Who asks.
        max_in_flight: How many calls may be in flight before it is not read from.
        grant: What may be called, or None: nothing before ``taskd.auth``.
        origin: Who asks, for the log.

    Attributes:
        on_quiet: Called when nothing is owed any more, once the session is passed on.
        grant: As it was given, or shown since then.
    """

    def __init__(
        self,
        functions: Registry,
        runner: Runner,
        peer: Peer,
        max_in_flight: int,
        grant: Grant | None,
        origin: Origin | None = None,
    ) -> None:
        self._find = functions.find
        self._runner = runner
        self._ledger = runner.ledger
        self._done = runner.ledger.done
        self._peer = peer
        self._write = peer.write
        self._max_in_flight = max_in_flight
        self._origin = origin
        self.grant: Grant | None = None
        self._who_first = "say first who you are"
        self.admit(grant)
        self._is_held = False
        self._in_flight: set[Call] = set()
        self._in_order: deque[Call | _Answered] = deque()
        self._is_ending = False
        self._is_draining = False
        self._says_goodbye = False
        self._is_passed_on = False
        self._is_late = False
        self._is_gone = False
        self._is_in_question = False
        self.on_quiet: Callable[[], None] = lambda: None

    def admit(self, grant: Grant | None) -> None:
        """Have what a grant allows be called from now on; None: nothing but ``taskd.auth``."""
        if grant is None and self.grant is not None and self.grant.identity:
            self._who_first = "what was shown here counts no more; say anew who you are"
        self.grant = grant
        self._may_call = _only_auth if grant is None else grant.may_call

    @property
    def owes_replies(self) -> bool:
        """Tell whether a request still waits for its reply."""
        return bool(self._in_flight) or self._is_in_question

    def receive(self, line: bytes) -> None:
        """
        Take one line from the peer.

        Args:
            line: Without its line feed. An empty one is a keep-alive.
        """
        if self._is_ending or not line:
            return
        id_json = ABSENT
        try:
            name, args, id_json, terms = decode_request(line)
            if self._may_call is not None and not self._may_call(name):
                self._turn_down(name, id_json)
                return
            if self._is_late and name not in _ANSWERED_TO_THE_END:
                function, positional, keywords = self._find_elsewhere(name, args)
            else:
                function = self._find(name)
                positional, keywords = function.bind(args)
        except Malformed as error:
            # Without the carriage return it may have been a keep-alive.
            if not self.cut_off_if_foreign(line) and line.rstrip(b"\r"):
                self._refuse(error.id_json, error)
            return
        except CallError as error:
            if (known := self._known(name)) is not None:
                self._ledger.refused(known, error)
            self._answer_error(id_json, error)
            return
        pending = None
        # The daemon's own functions are over at once: a limit is nothing to them.
        if function.runs_at_once and (terms is NO_TERMS or name.startswith(RESERVED_PREFIX)):
            outcome = self._runner.call_now(function, positional, keywords, id_json, self._origin)
            if isinstance(outcome, bytes):
                if id_json or not self._in_order:
                    self._write(outcome)
                else:
                    self._in_order.append(_Answered(outcome))
                    self._hold_if_full()
                return
            pending = outcome
        elif function.kind is Kind.SESSION:
            function.call(self, id_json, *positional, **keywords)
            return
        send_progress = self._send_progress if terms.wants_progress else None
        call = Call(
            function,
            positional,
            keywords,
            id_json,
            terms,
            self._ended,
            send_progress,
            self._origin,
        )
        in_flight = self._in_flight
        in_flight.add(call)
        if not id_json:
            self._in_order.append(call)
        if len(in_flight) >= self._max_in_flight or len(self._in_order) >= self._max_in_flight:
            self._hold_if_full()
        if self._is_late:
            self._runner.send_on(call)
        else:
            self._runner.start(call, pending)

    def _known(self, name: str) -> Function | None:
        """Give the function of a name, or None: what is made up by callers is not counted."""
        try:
            return self._find(name)
        except UnknownFunction:
            return None

    def _turn_down(self, name: str, id_json: str) -> None:
        """Answer a call that is not allowed; who is not known yet has had its say."""
        grant = self.grant
        self._peer.turned_down(name, grant)
        if grant is None:
            why = f"{self._who_first}: call {AUTH} with a token"
        else:
            who = grant.identity or "whoever has not said who it is"
            why = f"{who} may not call {name!a:.140}; the daemon's --allow says so"
        self._answer_error(id_json, Unauthorized(why))

    def _find_elsewhere(self, name: str, args: Args) -> tuple[Function, list[Any], dict[str, Any]]:
        """Let a name and arguments pass that another worker, of newer code perhaps, knows."""
        if self._is_draining:
            raise ShuttingDown("the daemon is stopping; the task was not started")
        function = Function(name, _run_elsewhere, Kind.THREAD)
        return (function, [], args) if isinstance(args, dict) else (function, args, {})

    def cut_off_if_foreign(self, beginning: bytes) -> bool:
        """
        End it without a word if a line begins as another protocol's; tell whether it does.

        Whoever is owed a reply has spoken ours, and made a mistake.
        """
        protocol = "" if self.owes_replies else _other_protocol(beginning)
        if protocol:
            self._is_ending = True
            self._peer.cut_off(protocol)
        return bool(protocol)

    def receive_too_much(self, limit: int, beginning: bytes = b"") -> None:
        """Answer a line that is longer than *limit* bytes, and begins so."""
        is_known = self.grant is not None
        why = "; the daemon's --max-line sets it" if is_known else " until it is known who calls"
        self.turn_away(LineTooLong(f"a line may have {limit} bytes{why}"), beginning)

    def turn_away(self, error: CallError, beginning: bytes = b"") -> None:
        """Answer a peer that may not stay, whatever it has begun to send, and hang up."""
        if not self._is_ending and not self.cut_off_if_foreign(beginning):
            self._refuse(ABSENT, error)

    def receive_end(self, is_mid_line: bool) -> None:
        """
        Take the end of the peer's sending; what is owed is still answered.

        A peer that has closed looks like one that has only ended its sending, so
        the tasks that are to end with their callers do so now.

        Args:
            is_mid_line: True if it came before a line's line feed.
        """
        if is_mid_line and not self._is_ending:
            self._refuse(ABSENT, Malformed("the last line was not ended by a line feed"))
        self._is_ending = True
        self._end_with_caller()
        self._hang_up_if_done()

    def drain(self, *, says_goodbye: bool = False) -> None:
        """
        Start nothing more; hang up when nothing is owed.

        Args:
            says_goodbye: True: say so before, for who cannot tell this end from a crash.
        """
        self._says_goodbye = says_goodbye
        self._is_draining = self._is_late = True
        self._hang_up_if_done()

    def pass_on(self) -> None:
        """Have every task that comes from now on run by another worker."""
        self._is_passed_on = self._is_late = True

    @property
    def can_move(self) -> bool:
        """Tell whether nothing of the conversation is here but what has not been read."""
        return not (self.owes_replies or self._in_order or self._is_ending)

    def lost(self) -> None:
        """
        Take it that the connection is gone.

        Tasks go on, unless their callers wanted otherwise; their replies are dropped.
        """
        self._is_gone = self._is_ending = True
        self._end_with_caller()

    def _end_with_caller(self) -> None:
        for call in [c for c in self._in_flight if c.terms.ends_with_caller]:
            call.fail(Cancelled(f"the connection of {call.function.name}'s caller has ended"))

    def abandon(self, error: CallError) -> None:
        """End every call in flight with an error."""
        for call in list(self._in_flight):
            call.fail(error)

    # The daemon's functions that concern a connection; each answers for itself.

    def cancel(self, id_json: str, id: Any) -> None:  # noqa: A002
        """Cancel what this connection has in flight under an id; tell whether there was any."""
        wanted = encode(id)
        found = [call for call in self._in_flight if call.id_json == wanted]
        self._is_in_question = True  # nothing ends before this answer, either
        for call in found:
            call.fail(Cancelled(f"{call.function.name} was cancelled by its caller"))
        self._is_in_question = False
        self._emit(id_json, encode_result(id_json, bool(found)))
        self._rest_if_quiet()

    def auth(self, id_json: str, token: str) -> None:
        """Say who calls over this connection; tell the identity that the token stands for."""
        if isinstance(token, str):
            self._is_in_question = True
            self._peer.identify(token, partial(self._identified, id_json))
        else:
            self._answer_error(id_json, BadArguments(f"{AUTH}: a token is a string"))

    def _identified(self, id_json: str, grant: Grant | None) -> None:
        self._is_in_question = False
        if self._is_gone:
            return
        if grant is None:
            self._refuse(id_json, Unauthorized("nobody has this token"))
        else:
            self._emit(id_json, encode_result(id_json, grant.identity or None))
            self._rest_if_quiet()

    def _answer_error(self, id_json: str, error: CallError) -> None:
        """Answer what has come to nothing; who is not known yet gets no second attempt."""
        if self.grant is None:
            self._refuse(id_json, error)
        else:
            self._emit(id_json, encode_error(id_json, error))

    def _refuse(self, id_json: str, error: CallError) -> None:
        """Answer what breaks the conversation; nothing behind it is ever looked at."""
        self._is_ending = True
        self._emit(id_json, encode_error(id_json, error))
        self._hang_up_if_done()

    def _ended(self, call: Call) -> None:
        self._in_flight.discard(call)
        # What has run is known where it ran, even if it is not here.
        if call.code is None:
            self._done(call.function.label, call.seconds or 0.0)
        elif call.seconds is not None or self._known(call.function.name) is not None:
            self._ledger.failed(call)
        if self._is_gone:
            return
        if call.id_json and call.reply is not None:
            self._write(call.reply)
        else:
            self._write_in_order()
        # Half of them: whoever stops for every line splits what has been read each time.
        if self._is_held and 2 * self._owed <= self._max_in_flight:
            self._is_held = False
            self._peer.hold_while_full(False)
        if not self._in_flight:
            self._rest_if_quiet()

    def _rest_if_quiet(self) -> None:
        self._hang_up_if_done()
        if self._is_passed_on and not self.owes_replies:
            self.on_quiet()

    def _emit(self, id_json: str, reply: bytes) -> None:
        if id_json or not self._in_order:
            self._write(reply)
        else:
            self._in_order.append(_Answered(reply))
            self._hold_if_full()

    @property
    def _owed(self) -> int:
        """How many replies are not written yet: what has to wait for its turn counts as well."""
        return max(len(self._in_flight), len(self._in_order))

    def _hold_if_full(self) -> None:
        if self._owed >= self._max_in_flight and not self._is_held:
            self._is_held = True
            self._peer.hold_while_full(True)

    def _write_in_order(self) -> None:
        turns = self._in_order
        while turns and (reply := turns[0].reply) is not None:
            turns.popleft()
            self._write(reply)

    def _send_progress(self, line: bytes) -> None:
        if not self._is_gone:
            self._peer.report(line)

    def _hang_up_if_done(self) -> None:
        if self._is_gone or not (self._is_ending or self._is_draining):
            return
        if not self.owes_replies:
            if self._says_goodbye and not self._is_ending:
                self._write(encode_error(ABSENT, ShuttingDown("goodbye: no more is answered here")))
            self._is_gone = self._is_ending = True
            self._peer.hang_up()


class _Answered:
    """A reply that has to wait for those before it."""

    __slots__ = ("reply",)

    def __init__(self, reply: bytes) -> None:
        self.reply = reply


def _run_elsewhere(*args: Any, **keywords: Any) -> None:
    """Stand for a function that another worker knows."""


def _only_auth(name: str) -> bool:
    return name == AUTH


def _other_protocol(line: bytes) -> str:
    """Tell what somebody speaks who has come to the wrong port, or give ''."""
    if _HTTP.match(line):
        return "HTTP"
    return "TLS" if line.startswith(_TLS_HANDSHAKE) else ""


_ANSWERED_TO_THE_END: Final = frozenset({CANCEL, AUTH, "taskd.ping"})


def session_functions() -> list[Function]:
    """Give the daemon's functions that concern the connection they come over."""
    return [
        Function(CANCEL, Session.cancel, Kind.SESSION, skip=2),
        Function(AUTH, Session.auth, Kind.SESSION, skip=2),
    ]
