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
from typing import Any

from taskd.call import Call
from taskd.errors import CallError, Cancelled, LineTooLong, Malformed, ShuttingDown
from taskd.functions import Function, Kind, Registry
from taskd.wire import ABSENT, encode, encode_error, encode_result, decode_request

__all__ = ["Session", "session_functions"]


class Session:
    """
    The server's side of one connection.

    Args:
        functions: What may be called.
        start: Runs a call and ends it when it is done.
        write: Takes whole lines for the peer.
        hang_up: Closes the connection once all that was written is out. Called
            at most once, and not by the session after ``lost``.
    """

    def __init__(
        self,
        functions: Registry,
        start: Callable[[Call], None],
        write: Callable[[bytes], None],
        hang_up: Callable[[], None],
    ) -> None:
        self._functions = functions
        self._start = start
        self._write = write
        self._hang_up = hang_up
        self._in_flight: set[Call] = set()
        self._in_order: deque[Call | _Answered] = deque()
        self._is_ending = False
        self._is_draining = False
        self._is_gone = False

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
        line = line.rstrip(b"\r")
        if not line:
            return
        id_json = ABSENT
        try:
            request = decode_request(line)
            id_json = request.id_json
            if self._is_draining:
                raise ShuttingDown("this worker is stopping; send the request again")
            function = self._functions.find(request.function)
            positional, keywords = function.bind(request.args)
        except Malformed as error:
            self._refuse(error.id_json, error)
            return
        except CallError as error:
            self._emit(id_json, encode_error(id_json, error))
            return
        if function.kind is Kind.SESSION:
            result = function.call(self, *positional, **keywords)
            self._emit(id_json, encode_result(id_json, result))
            return
        limits = [t for t in (request.timeout, function.timeout) if t is not None]
        call = Call(
            function,
            positional,
            keywords,
            id_json,
            min(limits, default=None),
            self._ended,
            self._send_progress if request.wants_progress else None,
        )
        self._in_flight.add(call)
        if not id_json:
            self._in_order.append(call)
        self._start(call)

    def receive_too_much(self, limit: int) -> None:
        """Answer a line that is longer than *limit* bytes."""
        error = LineTooLong(f"a line may have {limit} bytes; the daemon's --max-line sets it")
        self._refuse(ABSENT, error)

    def receive_end(self, is_mid_line: bool) -> None:
        """
        Take the end of the peer's sending; what is owed is still answered.

        Args:
            is_mid_line: True if it came before a line's line feed.
        """
        if is_mid_line and not self._is_ending:
            self._refuse(ABSENT, Malformed("the last line was not ended by a line feed"))
        self._is_ending = True
        self._hang_up_if_done()

    def drain(self) -> None:
        """Start nothing more; hang up when nothing is owed."""
        self._is_draining = True
        self._hang_up_if_done()

    def lost(self) -> None:
        """Take it that the connection is gone; tasks go on, their replies are dropped."""
        self._is_gone = self._is_ending = True

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
        self._hang_up_if_done()

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


def session_functions() -> list[Function]:
    """Give the daemon's functions that concern the connection they come over."""
    return [Function("taskd.cancel", Session.cancel, Kind.SESSION, skip=1)]
