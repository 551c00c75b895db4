"""
One peer's conversation: what each line asks, and in which order replies go out.

Sans-I/O: bytes come in by ``receive`` one line at a time, and leave by the
callables that the session was given. Replies to requests with an id leave when
they are ready; replies without one leave in the order of their requests, since
nothing else tells them apart. The tasks themselves run side by side.

No sockets here, no threads, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred

from taskd.call import Call
from taskd.errors import CallError, Cancelled, LineTooLong, Malformed, ShuttingDown
from taskd.functions import Function, Kind, Registry
from taskd.wire import (
    ABSENT,
    NO_TERMS,
    Args,
    decode_request,
    encode,
    encode_error,
    encode_result,
)

__all__ = ["Runner", "Session", "session_functions"]


class Runner(Protocol):
    """What runs the tasks: an ``Executor``, seen from here."""

    def call_now(  # noqa: D102
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
        /,
    ) -> bytes | Deferred[Any]: ...

    def start(self, call: Call, pending: Deferred[Any] | None, /) -> None: ...  # noqa: D102
    def send_on(self, call: Call, /) -> None: ...  # noqa: D102


class Session:
    """
    The server's side of one connection.

    Args:
        functions: What may be called.
        runner: Runs what is called.
        write: Takes whole lines for the peer.
        hang_up: Closes the connection once all that was written is out. Called
            at most once, and not by the session after ``lost``.
        hold: Takes whether to stop reading; what has been read may still come.
        max_in_flight: How many calls may be in flight before it is called.

    Attributes:
        on_quiet: Called when nothing is owed any more, once the session is passed on.
    """

    def __init__(
        self,
        functions: Registry,
        runner: Runner,
        write: Callable[[bytes], None],
        hang_up: Callable[[], None],
        hold: Callable[[bool], None],
        max_in_flight: int,
    ) -> None:
        self._find = functions.find
        self._runner = runner
        self._write = write
        self._hang_up = hang_up
        self._hold = hold
        self._max_in_flight = max_in_flight
        self._is_held = False
        self._in_flight: set[Call] = set()
        self._in_order: deque[Call | _Answered] = deque()
        self._is_ending = False
        self._is_draining = False
        self._is_passed_on = False
        self._is_late = False
        self._is_gone = False
        self.on_quiet: Callable[[], None] = lambda: None

    @property
    def owes_replies(self) -> bool:
        """Tell whether a request still waits for its reply."""
        return bool(self._in_flight)

    def receive(self, line: bytes) -> None:
        """
        Take one line from the peer.

        Args:
            line: Without its line feed. An empty one is a keep-alive.
        """
        if self._is_ending:
            return
        id_json = ABSENT
        try:
            name, args, id_json, terms = decode_request(line)
            if self._is_late and name not in _SESSION_NAMES:
                function, positional, keywords = self._find_elsewhere(name, args)
            else:
                function = self._find(name)
                positional, keywords = function.bind(args)
        except Malformed as error:
            if line.rstrip(b"\r"):  # else it was a keep-alive
                self._refuse(error.id_json, error)
            return
        except CallError as error:
            self._emit(id_json, encode_error(id_json, error))
            return
        pending = None
        if function.runs_at_once and terms is NO_TERMS:
            outcome = self._runner.call_now(function, positional, keywords, id_json)
            if isinstance(outcome, bytes):
                if id_json or not self._in_order:
                    self._write(outcome)
                else:
                    self._in_order.append(_Answered(outcome))
                return
            pending = outcome
        elif function.kind is Kind.SESSION:
            result = function.call(self, *positional, **keywords)
            self._emit(id_json, encode_result(id_json, result))
            return
        send_progress = self._send_progress if terms.wants_progress else None
        call = Call(function, positional, keywords, id_json, terms, self._ended, send_progress)
        in_flight = self._in_flight
        in_flight.add(call)
        if not id_json:
            self._in_order.append(call)
        if len(in_flight) >= self._max_in_flight and not self._is_held:
            self._is_held = True
            self._hold(True)
        if self._is_late:
            self._runner.send_on(call)
        else:
            self._runner.start(call, pending)

    def _find_elsewhere(self, name: str, args: Args) -> tuple[Function, list[Any], dict[str, Any]]:
        """Let a name and arguments pass that another worker, of newer code perhaps, knows."""
        if self._is_draining:
            raise ShuttingDown("the daemon is stopping; the task was not started")
        function = Function(name, _run_elsewhere, Kind.THREAD)
        return (function, [], args) if isinstance(args, dict) else (function, args, {})

    def receive_too_much(self, limit: int) -> None:
        """Answer a line that is longer than *limit* bytes."""
        self.turn_away(
            LineTooLong(f"a line may have {limit} bytes; the daemon's --max-line sets it")
        )

    def turn_away(self, error: CallError) -> None:
        """Answer a peer that may not stay, whatever it sends, and hang up."""
        if not self._is_ending:
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

    def drain(self) -> None:
        """Start nothing more; hang up when nothing is owed."""
        self._is_draining = self._is_late = True
        self._hang_up_if_done()

    def pass_on(self) -> None:
        """Have every task that comes from now on run by another worker."""
        self._is_passed_on = self._is_late = True

    @property
    def can_move(self) -> bool:
        """Tell whether nothing of the conversation is here but what has not been read."""
        return not (self._in_flight or self._in_order or self._is_ending)

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

    def cancel(self, id: Any) -> bool:  # noqa: A002
        """
        Cancel what this connection has in flight under an id.

        Returns:
            Whether there was anything.
        """
        id_json = encode(id)
        found = [call for call in self._in_flight if call.id_json == id_json]
        for call in found:
            call.fail(Cancelled(f"{call.function.name} was cancelled by its caller"))
        return bool(found)

    def _refuse(self, id_json: str, error: CallError) -> None:
        """Answer what breaks the conversation; nothing behind it is ever looked at."""
        self._is_ending = True
        self._emit(id_json, encode_error(id_json, error))
        self._hang_up_if_done()

    def _ended(self, call: Call) -> None:
        self._in_flight.discard(call)
        if self._is_gone:
            return
        if call.id_json and call.reply is not None:
            self._write(call.reply)
        else:
            self._write_in_order()
        # Half of them: whoever stops for every line splits what has been read each time.
        if self._is_held and 2 * len(self._in_flight) <= self._max_in_flight:
            self._is_held = False
            self._hold(False)
        if not self._in_flight:
            self._hang_up_if_done()
            if self._is_passed_on:
                self.on_quiet()

    def _emit(self, id_json: str, reply: bytes) -> None:
        if id_json or not self._in_order:
            self._write(reply)
        else:
            self._in_order.append(_Answered(reply))

    def _write_in_order(self) -> None:
        turns = self._in_order
        while turns and (reply := turns[0].reply) is not None:
            turns.popleft()
            self._write(reply)

    def _send_progress(self, line: bytes) -> None:
        if not self._is_gone:
            self._write(line)

    def _hang_up_if_done(self) -> None:
        if (self._is_ending or self._is_draining) and not self._in_flight and not self._is_gone:
            self._is_gone = self._is_ending = True
            self._hang_up()


class _Answered:
    """A reply that has to wait for those before it."""

    __slots__ = ("reply",)

    def __init__(self, reply: bytes) -> None:
        self.reply = reply


def _run_elsewhere(*args: Any, **keywords: Any) -> None:
    """Stand for a function that another worker knows."""


_SESSION_NAMES: Final = frozenset({"taskd.cancel"})


def session_functions() -> list[Function]:
    """Give the daemon's functions that concern the connection they come over."""
    return [Function("taskd.cancel", Session.cancel, Kind.SESSION, skip=1)]
