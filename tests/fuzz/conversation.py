"""
A conversation with a real server in memory, held to docs/protocol.rst at each step.

``converse`` lets its input choose what is said and what happens (see ``script``),
and keeps a record of its own of what is owed: each request's fate is foretold
when the server takes its line, by rules that are written from the page alone.
What was foretold has to come, at once where it can; and nothing else may.

A line that looks like another protocol's may be cut off instead of answered, since
only the daemon says what looks so; what certainly does has to be.

Not here: threads, TLS and more than one worker's process. A task that is handed
over to other workers ends when the test says so.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from taskd.access import Access, digest_of
from taskd.call import Call
from taskd.errors import WorkerLost
from taskd.server import TaskProtocol
from taskd.wire import encode_result
from tests.fuzz.promises import (
    Broken,
    Outcome,
    Owed,
    bind,
    check,
    fits_bare,
    is_error,
    is_progress,
    value_of,
)
from tests.fuzz.reading import Refused, Request, read, read_request
from tests.fuzz.script import Flags, steps_of
from tests.fuzz.stage import FUNCTIONS, HELD, LIMITS, PLAIN, STAGE
from tests.support import FakePool, MemoryDaemon, MemoryTransport, counts_of, registry_of

__all__ = ["converse"]

TOKEN: Final = "open sesame"
ALLOWED: Final = ("echo", "later", "waits", "b*")
LONGEST_LINE: Final = 6000
LONGEST_LINE_OF_STRANGERS: Final = 4096
FEW_IN_FLIGHT: Final = 4
FIRST_LINE_SECONDS: Final = 30.0
IDLE_SECONDS: Final = 5.0
UNREAD_BYTES: Final = 70_000
UNREAD_SECONDS: Final = 60.0
LIKELY_TIE_SECONDS: Final = 1e-3
"""Whether a limit has passed is not asked so near to it."""

_SECONDS: Final = {"0": 0.05, "1": 1.0, "6": 6.0, "9": 31.0, "!": 61.0}
_ERROR_BYTES: Final = 600
_TRACEBACK_BYTES: Final = 8000
_GROWTH: Final = 8
_OTHER_PROTOCOL: Final = re.compile(rb"\x16\x03|(GET|POST|HEAD|PUT) /[!-~]* HTTP/1\.[01]\r?$")
_LIKE_OTHER_PROTOCOL: Final = re.compile(rb"\x16\x03|[A-Z]{2,20} |[A-Za-z][A-Za-z-]*: ")

_REGISTRY: Final = registry_of(*FUNCTIONS)
_GOODBYE: Final = Owed(None, None, Outcome("shutting-down"))
_ASKING: Final = [("anna", digest_of(TOKEN))]
_ALLOWING: Final = [("*", ALLOWED)]


class Wire(MemoryTransport):
    """The server's socket: tells at once what is written, and takes a pause at any time."""

    def __init__(self, protocol: Any, on_write: Callable[[bytes], None]) -> None:
        super().__init__(protocol)
        self._lenient = True
        self._on_write = on_write
        self.is_lost = False

    def write(self, data: bytes) -> bool:
        self._on_write(data)
        return not self.unsent_bytes

    @property
    def is_over(self) -> bool:
        """Whether the server has closed both ways, and all is sent."""
        return self.disconnected or (self.disconnecting and not self.unsent_bytes)

    @property
    def is_closed_by_server(self) -> bool:
        """Whether the server has ended the conversation."""
        return self.is_half_closed or self.disconnecting or self.disconnected


class Conversation:
    """
    One conversation, and what it is owed.

    Args:
        flags: How it is set up.
    """

    def __init__(self, flags: Flags) -> None:
        STAGE.clear()
        self.asks, self.allows = flags.has(0), flags.has(1)
        self.few, self.idle, self.is_slow = flags.has(2), flags.has(3), flags.has(4)
        self.debug = flags.has(5)
        self.fault: BaseException | None = None
        self.sent = bytearray()
        self.taken = 0
        self.inbox: deque[bytes | None] = deque()
        self.is_full = self.has_said_goodbye = False
        self.is_gone = self.is_closing = False
        self.is_cut_off = self.may_be_cut_off = False
        self.is_draining = self.is_late = self.has_timed_out = False
        self.is_known = not self.asks
        self.in_order: deque[Owed] = deque()
        self.by_id: list[Owed] = []
        self.held: list[tuple[Deferred[Any], Owed]] = []
        self.passed: list[tuple[Call, Owed]] = []
        self.question: Owed | None = None
        self.daemons: list[MemoryDaemon] = []
        self.pool = FakePool()
        self.takes_moves = False
        self.lines = self.written = 0
        self.unread_since: float | None = None
        self.now = self.last_active = self.begun = 0.0
        self.open_server()
        self.protocol.accepted()

    # The server.

    def open_server(self) -> None:
        """Connect to a worker: the first, or the next one if the connection has moved."""
        self.daemon = daemon = MemoryDaemon(
            max_line_bytes=LONGEST_LINE,
            debug=self.debug,
            access=Access(_ASKING if self.asks else (), _ALLOWING if self.allows else ()),
            max_in_flight=FEW_IN_FLIGHT if self.few else 1024,
            first_line_seconds=FIRST_LINE_SECONDS,
            idle_seconds=IDLE_SECONDS if self.idle else None,
        )
        daemon.factory.functions = _REGISTRY
        daemon.executor.pool = self.pool
        self.daemons.append(daemon)
        self.protocol: TaskProtocol = daemon.factory.buildProtocol(None)
        self.wire = Wire(self.protocol, self.came)
        self.wire.is_slow = self.is_slow
        self.inner = self.protocol.lineReceived
        self.inner_too_long = self.protocol.lineLengthExceeded
        self.protocol.lineReceived = self.takes_line  # type: ignore[method-assign]
        self.protocol.lineLengthExceeded = self.takes_too_much  # type: ignore[method-assign]
        self.protocol.makeConnection(self.wire)
        if len(self.daemons) == 1:
            self.now = self.last_active = self.begun = daemon.loop.seconds()

    def moves(self, socket: Any, luggage: bytes) -> bool:
        """Take the connection to another worker, as ``accept`` does, or do not."""
        with self.keeping():
            check(not self.owed, "a connection moves only if it is owed nothing", self.owed)
            check(not self.is_closing, "a connection that ends does not move")
            unread = luggage.partition(b" ")[2]
            check(
                unread == self.sent[self.taken :],
                "what was not read goes along",
                luggage,
                self.sent[self.taken :],
            )
            if self.takes_moves:
                self.luggage = luggage
                self.wire.is_lost = True
            return self.takes_moves
        return False

    def arrive_elsewhere(self) -> None:
        """Go on at the worker that the connection has moved to."""
        self.is_late = self.is_draining = False
        luggage = self.luggage
        before = self.daemon.loop.seconds()
        self.open_server()
        self.daemon.loop.rightNow = before
        self.wire.is_lost = False
        self.last_active = self.now
        self.protocol.adopted(luggage)

    def keeping(self) -> _Keeping:
        """Keep a fault until the step is over, since the server would catch it."""
        return _Keeping(self)

    # What is foretold.

    @property
    def owed(self) -> list[Owed]:
        """All requests without a reply."""
        return [*self.in_order, *self.by_id]

    def owe(self, owed: Owed) -> None:
        """Take note that a reply has to come."""
        if owed.shown_id is None:
            self.in_order.append(owed)
        else:
            self.by_id.append(owed)

    def takes_line(self, line: bytes) -> None:
        """Foretell what comes of a line, have the server take it, and see what it ran."""
        with self.keeping():
            end = self.taken + len(line)
            check(
                self.is_deaf
                or self.sent[self.taken : end + 1] == line + b"\n"
                # TLS has no lines, and is recognized at once.
                or (line.startswith(b"\x16") and self.sent[self.taken : end] == line),
                "lines are taken as they were sent",
                line,
                self.sent[self.taken : end + 1],
            )
            self.taken = end + 1
            self.lines += 1
            check(len(line) <= self.longest_line + line.endswith(b"\r"), "no line is too long")
            self.look_whether_full()
            check(not self.is_full, "nothing is read until half of them are answered", line)
            check(self.question is None, "nothing is read while a token is looked at", line)
            before = len(STAGE.runs), len(STAGE.held), len(self.pool.taken)
            owed = self.foretell(line)
        if self.fault is None:
            self.inner(line)
            with self.keeping():
                self.compare(owed, *before)

    @property
    def is_deaf(self) -> bool:
        """Whether nothing that comes is looked at any more."""
        return self.is_closing or self.wire.is_closed_by_server

    @property
    def longest_line(self) -> int:
        return LONGEST_LINE if self.is_known else LONGEST_LINE_OF_STRANGERS

    def takes_too_much(self, line: bytes) -> None:
        """Foretell the answer to a line that is too long."""
        if self.is_deaf:  # it is dropped, like all that is behind the end
            self.inner_too_long(line)
            return
        with self.keeping():
            begin = bytes(self.sent[self.taken : self.taken + len(line)])
            check(begin == line, "a line is refused for what was sent", line, begin)
            longest = self.longest_line + line.endswith(b"\r")
            check(len(line) > longest, "a line is refused only if it is too long", len(line))
            self.is_closing = True
            self.may_be_cut_off = _LIKE_OTHER_PROTOCOL.match(line) is not None
            self.owe(Owed(None, None, Outcome("line-too-long")))
        if self.fault is None:
            self.inner_too_long(line)

    def foretell(self, line: bytes) -> Owed | None:
        """Say what has to come of a line; give what is owed for it, if it is a call."""
        self.runs_now = False
        if self.is_deaf or not line.rstrip(b"\r"):
            return None
        try:
            request = read_request(line)
        except Refused as refused:
            self.is_closing = True
            self.is_cut_off = _OTHER_PROTOCOL.match(line) is not None
            self.may_be_cut_off = _LIKE_OTHER_PROTOCOL.match(line) is not None
            if not self.is_cut_off:
                self.owe(Owed(None, refused.shown_id, Outcome("malformed")))
            return None
        owed = Owed(request, request.shown_id)
        name = request.function
        if (not self.is_known and name != "taskd.auth") or not self.may_call(name):
            owed.outcomes = [Outcome("unauthorized")]
        elif name in ("taskd.auth", "taskd.cancel"):
            self.foretell_own(owed, request)
        elif self.is_late and name != "taskd.ping":  # which is answered where it comes
            self.foretell_late(owed, request)
        else:
            self.foretell_task(owed, request)
        if not self.is_known and any(outcome.code for outcome in owed.outcomes):
            self.is_closing = True  # who is not known yet gets no second attempt
        self.owe(owed)
        return owed

    def may_call(self, name: str) -> bool:
        if not self.allows or name in ("taskd.auth", "taskd.cancel", "taskd.ping"):
            return True
        return name in ("echo", "later", "waits") or name.startswith("b")

    def foretell_own(self, owed: Owed, request: Request) -> None:
        """The daemon's own functions, which take one argument."""
        parameter = "token" if request.function == "taskd.auth" else "id"
        args = request.args
        if isinstance(args, list):
            fits = len(args) == 1
            value = args[0] if fits else None
        else:
            fits = args.keys() == {parameter}
            value = args.get(parameter)
        if not fits:
            owed.outcomes = [Outcome("bad-arguments")]
        elif parameter == "id":
            found = [o for o in self.owed if o.is_open and o.shown_id == repr(value)]
            for other in found:
                other.end(Outcome("cancelled"))
            owed.outcomes = [Outcome(shown=repr(bool(found)))]
            if any(len(other.outcomes) > 1 for other in found):
                owed.outcomes.append(Outcome(shown="False"))
        elif not isinstance(value, str):
            owed.outcomes = [Outcome("bad-arguments")]
        elif not self.asks:
            owed.outcomes = [Outcome(shown="None")]
        elif value == TOKEN:
            self.is_known = True
            owed.outcomes = [Outcome(shown=repr("anna"))]
        else:
            self.is_closing = True
            self.question = owed
            owed.outcomes = [Outcome("unauthorized")]
            owed.may_wait = True

    def foretell_late(self, owed: Owed, request: Request) -> None:
        """What comes after the worker has been told to stop, or to pass on."""
        if self.is_draining:
            owed.outcomes = [Outcome("shutting-down")]
            return
        owed.is_held = True
        self.set_due(owed, request, None)

    def foretell_task(self, owed: Owed, request: Request) -> None:
        """What comes of a function of the stage."""
        name = request.function
        if name not in PLAIN:
            owed.outcomes = [Outcome("unknown-function")]
            return
        try:
            bound = bind(name, request.args)
        except TypeError:
            owed.outcomes = [Outcome("bad-arguments")]
            return
        self.runs_now = True
        if name in HELD:
            owed.is_held = True
            owed.label = bound.arguments.get("label")
            self.set_due(owed, request, LIMITS.get(name))
            return
        try:
            value = value_of(name, bound, request.wants_progress)
        except BaseException as error:
            owed.outcomes = [Outcome.of_error(error)]
        else:
            owed.outcomes = [Outcome.of_result(value)]
        if request.timeout is not None and request.timeout < LIKELY_TIE_SECONDS:
            owed.outcomes.append(Outcome("time-limit"))

    def set_due(self, owed: Owed, request: Request, limit: float | None) -> None:
        """Say when a task's time is over."""
        limits = [s for s in (limit, request.timeout) if s is not None]
        if limits:
            owed.due = self.now + min(limits)
            self.look_at_due(owed)

    def look_at_due(self, owed: Owed) -> None:
        """Foretell that a task's time is over, or that it may be."""
        if owed.due is None or not owed.is_open:
            return
        if self.now >= owed.due + LIKELY_TIE_SECONDS:
            owed.end(Outcome("time-limit"))
        elif self.now >= owed.due - LIKELY_TIE_SECONDS and not owed.may_wait:
            owed.outcomes, owed.may_wait = [Outcome("time-limit")], True

    def compare(self, owed: Owed | None, runs: int, held: int, passed: int) -> None:
        """See whether the server has run what it should, and nothing else."""
        ran = STAGE.runs[runs:]
        name = owed.request.function if owed is not None and owed.request is not None else ""
        wanted = [name] if self.runs_now else []
        # A limit that has passed already may keep it from being run.
        may_not_run = owed is not None and any(o.code == "time-limit" for o in owed.outcomes)
        check(ran == wanted or (may_not_run and not ran), "what is asked is run, once", ran, wanted)
        for deferred in STAGE.held[held:]:
            check(owed is not None and owed.is_held, "only what was asked goes on", name)
            self.held.append((deferred, owed))  # type: ignore[arg-type]
        for call in self.pool.taken[passed:]:
            check(
                owed is not None and owed.is_held and self.is_late,
                "only what comes late is handed over",
                name,
            )
            self.passed.append((call, owed))  # type: ignore[arg-type]
        flying = sum(o.is_open and not o.may_wait for o in self.owed)
        if self.few:
            check(flying <= FEW_IN_FLIGHT, "no more are in flight than may be", flying)
            self.is_full = self.is_full or flying == FEW_IN_FLIGHT

    # What comes.

    def came(self, data: bytes) -> None:
        """Take what the server has written."""
        with self.keeping():
            check(not self.is_gone, "nothing is written to who is gone", data)
            check(not self.wire.is_closed_by_server, "nothing is written after the end", data)
            check(not self.has_said_goodbye, "nothing is written after a goodbye", data)
            check(data.endswith(b"\n"), "whole lines are written", data)
            self.written += len(data)
            self.last_active = self.now
            for line in data[:-1].split(b"\n"):
                self.came_line(line)

    def came_line(self, line: bytes) -> None:
        """Find what a line is the reply to."""
        try:
            value = read(line)
        except Refused as refused:
            raise Broken(f"a reply is strict JSON: {line!r:.300}: {refused}") from None
        if self.in_order and fits_bare(self.in_order[0], value):
            self.settle(self.in_order.popleft())
            return
        if self.may_say_goodbye and fits_bare(_GOODBYE, value):
            self.has_said_goodbye = True
            return
        check(
            isinstance(value, dict) and "id" in value, "a reply is one that is due", line, self.owed
        )
        shown_id = repr(value["id"])
        mine = [o for o in self.by_id if o.shown_id == shown_id]
        if value.keys() == {"id", "progress"}:
            wanted = any(o.request is not None and o.request.wants_progress for o in mine)
            check(wanted, "progress is sent to who wants it", line)
            check(is_progress(value["progress"]), "progress has its shape", line)
            return
        has_failed = "error" in value
        check(value.keys() == {"id", "error" if has_failed else "result"}, "a reply's shape", line)
        body = value["error"] if has_failed else value["result"]
        if has_failed:
            check(is_error(body), "an error has its shape", line)
        for owed in mine:
            if any(outcome.fits(has_failed, body) for outcome in owed.outcomes):
                self.by_id.remove(owed)
                self.settle(owed)
                return
        raise Broken(f"a reply is one that is due: {line!r:.300} of {mine!r:.600}")

    @property
    def may_say_goodbye(self) -> bool:
        """Whether a worker that stops may say so: as its last word, where nothing is owed."""
        return self.is_draining and not self.owed and not self.is_closing

    def settle(self, owed: Owed) -> None:
        """Take note that a request has its reply."""
        owed.is_held = owed.may_wait = False
        if self.question is owed:
            self.question = None
        self.look_whether_full()

    def look_whether_full(self) -> None:
        """Take note that half of what may be in flight is answered."""
        flying = sum(o.is_open and not o.may_wait for o in self.owed)
        if 2 * flying <= FEW_IN_FLIGHT:
            self.is_full = False

    def observe(self, event: dict[str, Any]) -> None:
        """Take what is logged: of what is grave, only that a task has failed."""
        if event.get("log_level") not in (LogLevel.error, LogLevel.critical):
            return
        with self.keeping():
            failure = event.get("log_failure")
            told = failure.getTraceback() if failure is not None else event.get("log_format")
            name = event.get("function") or event.get("task")
            is_task = name in PLAIN and str(event.get("log_format")).endswith("} failed")
            if not is_task:
                raise Broken(f"no bug of taskd's is logged: {told}")

    # What happens.

    def deliver(self) -> None:
        """Let the server read what it is ready to read."""
        while self.inbox and not self.is_gone and self.wire.is_read:
            if self.wire.disconnecting or self.fault is not None:
                break
            chunk = self.inbox.popleft()
            if chunk is None:
                self.deliver_end()
                break
            if not self.wire.is_half_closed:
                self.sent += chunk
                if b"\n" in chunk:
                    self.last_active = self.now
            self.protocol.dataReceived(chunk)
            if self.wire.is_lost:
                self.arrive_elsewhere()

    def deliver_end(self) -> None:
        """The peer ends its sending."""
        if self.sent[self.taken :] and not self.is_deaf:
            self.owe(Owed(None, None, Outcome("malformed")))
        self.is_closing = True
        for owed in self.owed:
            if owed.request is not None and owed.request.ends_with_caller:
                owed.end(Outcome("cancelled"))
        IHalfCloseableProtocol(self.protocol).readConnectionLost()

    def lose(self) -> None:
        """The connection is gone."""
        if not self.is_gone:
            self.is_gone = True
            self.in_order.clear()
            self.by_id.clear()
            self.protocol.connectionLost(Failure(ConnectionDone()))

    def step(self, what: str, number: bytes) -> None:
        """Have something happen, then see whether all is as it must be."""
        if what == "":
            self.inbox.append(number)
        elif what == "e":
            self.inbox.append(None)
        elif what in _SECONDS:
            self.pass_time(_SECONDS[what])
        else:
            act = getattr(self, _ACTIONS.get(what, "nothing"))
            act(number[0] if number else 0)
        self.go_on()
        self.verify()

    def go_on(self) -> None:
        """Let what was caused take its course."""
        if self.wire.is_lost and not self.is_gone:
            self.arrive_elsewhere()
        self.deliver()
        if self.wire.is_over:
            self.lose()

    def nothing(self, _: int) -> None:
        """An unknown letter is a cut, as all are."""

    def fire(self, number: int) -> None:
        """A task comes to its end."""
        if self.held:
            deferred, owed = self.held.pop(number % len(self.held))
            owed.end(Outcome.of_result(owed.label))
            deferred.callback(owed.label)

    def fail(self, number: int) -> None:
        """A task fails."""
        if self.held:
            deferred, owed = self.held.pop(number % len(self.held))
            owed.end(Outcome("task-failed", kind="KeyError"))
            deferred.errback(KeyError(number))

    def jumble(self, number: int) -> None:
        """A task ends in what JSON cannot carry."""
        if self.held:
            deferred, owed = self.held.pop(number % len(self.held))
            owed.end(Outcome("task-failed", kind="NotJson"))
            deferred.callback({"a": {number}})

    def finish_elsewhere(self, number: int) -> None:
        """A task ends that was handed over."""
        if self.passed:
            call, owed = self.passed.pop(number % len(self.passed))
            owed.end(Outcome(shown=repr("elsewhere")))
            call.end(encode_result(call.id_json, "elsewhere"))

    def leave_unread(self, _: int) -> None:
        """The peer reads nothing for a while."""
        self.wire.unsent_bytes = UNREAD_BYTES
        if self.unread_since is None:
            self.unread_since = self.now

    def read_all(self, _: int) -> None:
        """The peer reads all that there is."""
        wire = self.wire
        was_behind, wire.unsent_bytes, self.unread_since = wire.unsent_bytes, 0, None
        if self.is_gone:
            return
        if was_behind and wire.on_sent is not None:
            on_sent, wire.on_sent = wire.on_sent, None
            on_sent()
        if wire.is_half_closed and wire.is_slow:
            wire.is_slow = False
            wire.arrive()

    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        for owed in self.owed:
            self.look_at_due(owed)
        for daemon in list(self.daemons):
            daemon.loop.advance(seconds)
        if self.wire.disconnected and self.wire.is_half_closed:
            self.has_timed_out = True  # it lingered for too long

    def sweep(self, _: int) -> None:
        """The worker looks for those who are silent."""
        if self.is_gone:
            return
        was_closed = self.wire.is_closed_by_server
        silent = self.now - self.last_active
        has_line = any(line.rstrip(b"\r") for line in self.sent.split(b"\n")[:-1])
        is_mute = not has_line and self.now - self.begun > FIRST_LINE_SECONDS
        if is_mute and not self.is_deaf:
            self.is_closing = True
            self.may_be_cut_off = _LIKE_OTHER_PROTOCOL.match(self.sent[self.taken :]) is not None
            self.owe(Owed(None, None, Outcome("malformed")))
        is_idle = self.idle and silent > IDLE_SECONDS and has_line and not self.owed
        unread = self.unread_since
        is_stuck = unread is not None and self.now - unread > UNREAD_SECONDS
        if is_idle or is_stuck:
            self.has_timed_out = True
        self.daemon.factory.sweep()
        with self.keeping():
            if is_idle and not self.wire.is_closed_by_server:
                raise Broken(f"who is silent for {silent} s is hung up on")
            if self.wire.is_closed_by_server and not was_closed:
                check(self.has_timed_out or self.is_closing, "only the silent are hung up on")

    def drain(self, _: int) -> None:
        """The worker is told to stop."""
        self.is_draining = self.is_late = True
        self.daemon.factory.drain()

    def move_on(self, _: int) -> None:
        """The worker is told to pass its connections on, and another takes them."""
        self.pass_on(True)

    def stay(self, _: int) -> None:
        """The worker is told to pass its connections on, and nobody takes them."""
        self.pass_on(False)

    def pass_on(self, takes_moves: bool) -> None:
        if not self.is_gone and not self.is_draining and len(self.daemons) < 4:
            self.is_late = True
            self.takes_moves = takes_moves
            if self.daemon.factory.move is None:
                self.daemon.factory.pass_on(self.moves)

    def abandon(self, _: int) -> None:
        """The grace is over."""
        for owed in self.owed:
            owed.end(Outcome("worker-lost"))
        self.daemon.factory.abandon(WorkerLost("the grace is over"))

    def go_away(self, _: int) -> None:
        """The peer is gone without a word."""
        for owed in self.owed:
            if owed.request is not None and owed.request.ends_with_caller:
                owed.end(Outcome("cancelled"))
        self.lose()

    # What must be.

    def verify(self) -> None:
        """See whether all that can be known has come, and the connection stands as it must."""
        if self.fault is not None:
            raise self.fault
        lines = self.lines + 2
        most = _TRACEBACK_BYTES if self.debug else _ERROR_BYTES
        check(
            self.written <= _GROWTH * len(self.sent) + most * lines,
            "replies grow no more than requests",
            self.written,
            len(self.sent),
        )
        if self.is_gone:
            return
        ready = [o for o in self.by_id if o.outcomes and not o.may_wait]
        if self.in_order and self.in_order[0].outcomes and not self.in_order[0].may_wait:
            ready.append(self.in_order[0])
        if not self.wire.disconnected:
            check(not ready, "what is ready is sent", ready)
        is_done = self.is_closing or self.is_draining
        is_closed = self.wire.is_closed_by_server
        if self.is_cut_off:
            check(self.wire.disconnected, "another protocol is cut off")
        elif is_done and not self.owed:
            check(is_closed, "the connection ends when it must")
        elif not is_done or any(not o.may_wait for o in self.owed):
            check(
                not is_closed or self.has_timed_out or self.may_be_cut_off,
                "the connection ends only when it must",
                self.owed,
            )
        if self.wire.is_read and not is_closed and not self.is_closing:
            rest = self.sent[self.taken :]
            check(b"\n" not in rest, "all lines are taken", rest)
            check(len(rest) <= self.longest_line + 1, "no unfinished line is too long", len(rest))

    def finish(self) -> None:
        """End everything; see that all was answered and nothing is left."""
        self.read_all(0)
        self.go_on()
        for _ in range(6):
            while self.held or self.passed:
                self.step("r" if self.held else "p", b"\0")
            self.step("1", b"")
            self.step("6", b"")
        if self.inbox and not self.is_gone and not self.wire.disconnecting:
            check(False, "what was sent is read in the end", list(self.inbox), self.owed)
        if not self.is_gone and not self.wire.disconnected:
            check(not self.owed, "every request is answered", self.owed)
        self.lose()
        for _ in range(24):  # in which nobody is held still any more, and no guess is waited for
            for daemon in self.daemons:
                daemon.loop.advance(0.5)
        for daemon in self.daemons:
            timers = daemon.loop.getDelayedCalls()
            check(not timers, "no timer is left", [str(timer) for timer in timers])
            check(daemon.factory.open_connections == 0, "no connection is left")
            check(counts_of(daemon.slot)["in_flight"] == 0, "no task is left")
            check(daemon.executor.is_idle, "the executor is idle")
        if self.fault is not None:
            raise self.fault


class _Keeping:
    """Keeps a fault that is found while the server's code is on the stack."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is not None and self._conversation.fault is None:
            self._conversation.fault = error
        return error is not None


_ACTIONS: Final = {
    "r": "fire",
    "x": "fail",
    "j": "jumble",
    "p": "finish_elsewhere",
    "u": "leave_unread",
    "v": "read_all",
    "s": "sweep",
    "d": "drain",
    "m": "move_on",
    "n": "stay",
    "b": "abandon",
    "l": "go_away",
}


def converse(data: bytes) -> None:
    """
    Have the conversation that some bytes choose.

    Args:
        data: Any bytes; ``script`` says what they mean.

    Raises:
        Broken: A promise was not kept.
    """
    conversation = Conversation(Flags(data))
    globalLogPublisher.addObserver(conversation.observe)
    try:
        for what, number in steps_of(data):
            conversation.step(what, number)
        conversation.finish()
    finally:
        globalLogPublisher.removeObserver(conversation.observe)
