"""
Arbitrary bytes to a client's connection, as an answer that nobody should give.

Only the protocol's public side is used: calls go out, bytes come in, and it ends.
"""

from __future__ import annotations

from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from taskd.client import TaskClientProtocol
from taskd.errors import TaskdError
from taskd.trust import greeting
from taskd.wire import NO_TERMS, Terms
from tests.fuzz.promises import Broken, check
from tests.fuzz.reading import Refused, read
from tests.fuzz.script import Flags, steps_of
from tests.support import MemoryTransport

__all__ = ["answer"]

_FIRST_CALLS: Final = 3
_MOST_CALLS: Final = 50
_SECONDS: Final = {"0": 0.05, "1": 1.0, "6": 6.0, "9": 31.0}


class _Answered:
    """A client's connection whose daemon says what the input holds."""

    def __init__(self, flags: Flags) -> None:
        self.clock = Clock()
        self.lost = 0
        self.sent = bytearray()
        self.results: list[tuple[int, list[Any], Deferred[Any]]] = []
        self.closed: list[Any] = []
        self.grave: list[Any] = []
        self.is_gone = False
        self.progress: list[Any] = []
        said = greeting("open sesame") if flags.has(0) else b""
        self.client = TaskClientProtocol(self.clock, lambda _: None, self.loses, said)
        self.transport = MemoryTransport(self.client)
        self.transport._lenient = True
        self.client.makeConnection(self.transport)
        self.has_timeouts, self.reports = flags.has(1), flags.has(2)
        for _ in range(_FIRST_CALLS):
            self.call()

    def loses(self, _: object) -> None:
        self.lost += 1

    def call(self) -> None:
        """Ask for something."""
        if len(self.results) >= _MOST_CALLS:
            return
        terms = Terms(timeout=2.0, wants_progress=self.reports) if self.has_timeouts else NO_TERMS
        fired: list[Any] = []
        on_progress = (lambda *told: self.progress.append(told)) if self.reports else None
        deferred = self.client.call("echo", [], terms, on_progress)
        deferred.addBoth(fired.append)
        self.results.append((len(self.results) + 1, fired, deferred))

    def step(self, what: str, number: bytes) -> None:
        """Have something happen."""
        if what == "" and not self.is_gone and not self.transport.disconnected:
            self.sent += number
            self.client.dataReceived(number)
        elif what == "c":
            self.call()
        elif what == "x":
            self.results[(number or b"\0")[0] % len(self.results)][2].cancel()
        elif what == "d" and not self.is_gone:
            self.client.close().addBoth(self.closed.append)
        elif what == "l":
            self.lose()
        elif what in _SECONDS:
            self.clock.advance(_SECONDS[what])
        if self.transport.disconnected:
            self.lose()

    def lose(self) -> None:
        """The connection ends."""
        if not self.is_gone:
            self.is_gone = True
            self.client.connectionLost(Failure(ConnectionDone()))

    def verify(self) -> None:
        """See that every call came to one end, each of a kind that it may come to."""
        check(not self.grave, "nothing grave is logged", self.grave)
        check(self.lost == 1, "the loss is told once", self.lost)
        check(self.client.in_flight == 0, "nothing is in flight any more")
        check(not self.clock.getDelayedCalls(), "no timer is left")
        shown = self.shown_results()
        for number, fired, _ in self.results:
            check(len(fired) == 1, "every call comes to one end", number, fired)
            outcome = fired[0]
            if isinstance(outcome, Failure):
                kind = outcome.check(TaskdError, CancelledError)
                check(
                    kind is not None, "a call fails with what callers know", outcome.getTraceback()
                )
            else:
                check(
                    (number, repr(outcome)) in shown, "a result is what was sent", number, outcome
                )

    def shown_results(self) -> set[tuple[int, str]]:
        """Give the results that were sent, as the standard library reads them."""
        shown = set()
        for line in self.sent.split(b"\n")[:-1]:
            try:
                value = read(bytes(line))
            except Refused:
                break
            if isinstance(value, dict) and type(value.get("id")) is int and "result" in value:
                shown.add((value["id"], repr(value["result"])))
        return shown

    def observe(self, event: dict[str, Any]) -> None:
        """Take what is logged."""
        if event.get("log_level") in (LogLevel.error, LogLevel.critical):
            failure = event.get("log_failure")
            self.grave.append(failure.getTraceback() if failure else event.get("log_format"))


def answer(data: bytes) -> None:
    """
    Answer a client with what some bytes choose.

    Args:
        data: Any bytes; ``script`` says what they mean.

    Raises:
        Broken: A promise was not kept.
    """
    answered = _Answered(Flags(data))
    globalLogPublisher.addObserver(answered.observe)
    try:
        for what, number in steps_of(data):
            answered.step(what, number)
        answered.lose()
        answered.verify()
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"no exception escapes: {error!r}") from error
    finally:
        globalLogPublisher.removeObserver(answered.observe)
