"""
A worker's dealings with the other workers, all of them through the supervisor.

What this worker cannot run now goes out, and its reply comes back to the
connection it belongs to; what others cannot run comes in, and its reply goes
back. When is decided in ``lane``; who gets what, in ``dispatcher``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final

from twisted.logger import Logger

from taskd.call import Call
from taskd.errors import CallError, Cancelled, Overloaded, WorkerLost, error_from_wire
from taskd.executor import Executor
from taskd.functions import RESERVED_PREFIX, Registry
from taskd.link import Offer, Reader, decode_due
from taskd.scoreboard import Scoreboard
from taskd.throttle import Throttle
from taskd.wire import ABSENT, NO_TERMS, decode_request, encode_error, encode_request

__all__ = ["Relay"]

_NOTHING: Final = b"-"
"""Stands for the code of what is done, and for the seconds of what did not run."""


class Relay:
    """
    The executor's ``Pool``, at the end of a link.

    Args:
        functions: What may be called.
        executor: Runs what comes in.
        scoreboard: Shows what the others do.
        tell: Takes messages for the supervisor.
        is_verbose: True: it is logged what is handed over.
        clock: Gives seconds that never go back.

    Attributes:
        on_filled: Called when the executor has no thread to spare.
        on_freed: Called when it has one again.
        on_stuck: Called when it has lost one.
        on_quiet: Called when nothing is out any more, and nothing of others here.
    """

    _log = Logger(namespace="taskd.relay")

    def __init__(
        self,
        functions: Registry,
        executor: Executor,
        scoreboard: Scoreboard,
        tell: Callable[[bytes], None],
        *,
        is_verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._functions = functions
        self._executor = executor
        self._scoreboard = scoreboard
        self._tell = tell
        self._is_verbose = is_verbose
        self._clock = clock
        self._throttle = Throttle()
        self._tickets = 0
        self._out: dict[int, Call] = {}
        self._ticket_of: dict[Call, int] = {}
        self._here: dict[int, Call] = {}
        self._number_of: dict[Call, int] = {}
        self._given_back = 0
        self.on_filled: Callable[[], None] = lambda: None
        self.on_freed: Callable[[], None] = lambda: None
        self.on_stuck: Callable[[], None] = lambda: None
        self.on_quiet: Callable[[], None] = lambda: None
        executor.pool = self

    @property
    def readers(self) -> dict[bytes, Reader]:
        """Give what takes the supervisor's messages about tasks, by their verbs."""
        return {
            b"run": self._run,
            b"cancel": self._cancel,
            b"nothing": lambda _: self._executor.lane.answered(),
            b"ended": self._ended,
            b"failed": self._failed,
            b"progress": self._progressed,
        }

    @property
    def is_quiet(self) -> bool:
        """Tell whether nothing of this worker is out, and nothing of others here."""
        return not (self._out or self._here)

    def lost(self) -> None:
        """Answer what is out: without a supervisor no reply will come."""
        for call in list(self._out.values()):
            self._is_back(call)
            call.fail(WorkerLost("the supervisor has died, and the task's reply is lost"))

    # The executor calls these.

    def take(self, calls: list[Call]) -> None:
        """Hand calls over; those that others had handed over are given back."""
        self._tell(b"".join([self._part_with(call) for call in calls]))
        self._tell_if_quiet()

    def _part_with(self, call: Call) -> bytes:
        number = self._number_of.get(call)
        if number is not None:
            self._forget(call)
            call.abandon = None
            call.deadline = None  # the supervisor keeps the time now
            call.stop_timer()
            self._given_back += 1
            return b"returned %d\n" % number
        if self._is_verbose:
            self._log.debug("{function} is handed over", **call.about())
        self._tickets += 1
        self._out[self._tickets] = call
        self._ticket_of[call] = self._tickets
        call.abandon = self._take_back
        line = encode_request(
            (call.function.name, call.keywords or call.positional, call.id_json, call.terms)
        )
        return Offer(
            self._tickets, call.terms.priority, call.deadline, call.terms.ends_with_caller, line
        ).encode()

    def waits(self) -> int:
        """Tell how many tasks of all workers wait."""
        # What was given back is on its way to the queue, and comes there before our question.
        return self._scoreboard.waiting or self._given_back

    def idle(self) -> int:
        """Tell how many blocking tasks the other workers could start now."""
        return self._scoreboard.idle_threads(self._executor.lane.threads)

    def ask(self) -> None:
        """Ask for a task that waits."""
        self._given_back = 0
        self._tell(b"ask\n")

    def filled(self) -> None:
        """Take note that this worker has no thread to spare."""
        self.on_filled()

    def freed(self) -> None:
        """Take note that it has one again."""
        self.on_freed()

    def stuck(self) -> None:
        """Take note that a thread is lost."""
        self.on_stuck()

    # What is out.

    def _take_back(self, call: Call) -> None:
        ticket = self._is_back(call)
        self._tell(b"cancel %d\n" % ticket)
        self._tell_if_quiet()

    def _is_back(self, call: Call) -> int:
        ticket = self._ticket_of.pop(call)
        del self._out[ticket]
        call.abandon = None
        return ticket

    def _ended(self, rest: bytes) -> None:
        ticket, code, seconds, reply = rest.split(b" ", 3)
        call = self._out.get(int(ticket))
        if call is not None:
            self._is_back(call)
            call.end(
                reply + b"\n",
                None if seconds == _NOTHING else float(seconds),
                None if code == _NOTHING else code.decode(),
            )
            self._tell_if_quiet()

    def _failed(self, rest: bytes) -> None:
        ticket, _, fields = rest.partition(b" ")
        call = self._out.get(int(ticket))
        if call is not None:
            self._is_back(call)
            error = error_from_wire(json.loads(fields))
            if isinstance(error, Overloaded):
                self._say_refused(call)
            call.fail(error)
            self._tell_if_quiet()

    def _say_refused(self, call: Call) -> None:
        """Log that the queue is full, now and then: whoever calls decides how often it is."""
        left_out = self._throttle.admit(Overloaded, self._clock())
        if left_out is not None:
            words = "the queue is full: {function} was refused"
            if left_out:
                words += " ({left_out} more were not logged)"
            more = {"left_out": left_out, "code": Overloaded.code}
            self._log.warn(words, **more, **call.about())

    def _progressed(self, rest: bytes) -> None:
        ticket, _, line = rest.partition(b" ")
        call = self._out.get(int(ticket))
        if call is not None and call.send_progress is not None:
            call.send_progress(line + b"\n")

    # What is here of others.

    def _run(self, rest: bytes) -> None:
        self._executor.lane.answered()
        digits, due, line = rest.split(b" ", 2)
        number, id_json = int(digits), ABSENT
        try:
            name, args, id_json, terms = decode_request(line)
            function = self._functions.find(name)
            positional, keywords = function.bind(args)
        except CallError as error:
            self._reply(number, error.code, None, encode_error(id_json, error))
            return
        pending = None
        # The daemon's own functions are over at once: a limit is nothing to them.
        if function.runs_at_once and (terms is NO_TERMS or name.startswith(RESERVED_PREFIX)):
            became: list[tuple[str | None, float]] = []
            outcome = self._executor.call_now(
                function, positional, keywords, id_json, None, lambda *what: became.append(what)
            )
            if isinstance(outcome, bytes):
                self._reply(number, *became[0], outcome)
                return
            pending = outcome

        def send_progress(line: bytes) -> None:
            self._tell(b"progress %d %s" % (number, line))

        report = send_progress if terms.wants_progress else None
        call = Call(function, positional, keywords, id_json, terms, self._is_done, report)
        call.deadline = decode_due(due)
        self._here[number] = call
        self._number_of[call] = number
        self._executor.start(call, pending)
        lane = self._executor.lane
        # One answer is one task, and another thread may have become free meanwhile.
        if lane.occupied < lane.threads and self.waits() and lane.asks(False):
            self.ask()

    def _is_done(self, call: Call) -> None:
        if call.reply is not None:
            seconds = call.ran_seconds(self._clock())
            self._reply(self._forget(call), call.code, seconds, call.reply)
            self._tell_if_quiet()

    def _forget(self, call: Call) -> int:
        number = self._number_of.pop(call)
        del self._here[number]
        return number

    def _reply(self, number: int, code: str | None, seconds: float | None, reply: bytes) -> None:
        told = _NOTHING if code is None else code.encode()
        ran = _NOTHING if seconds is None else b"%.6f" % seconds
        self._tell(b"ended %d %s %s %s" % (number, told, ran, reply))

    def _cancel(self, rest: bytes) -> None:
        call = self._here.get(int(rest))
        if call is not None:
            call.fail(Cancelled(f"{call.function.name} was cancelled by its caller"))

    def _tell_if_quiet(self) -> None:
        if self.is_quiet:
            self.on_quiet()
