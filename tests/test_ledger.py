"""What became of calls: counted once, by whoever answers, and kept if it matters."""

from __future__ import annotations

import json
import os
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.errors import (
    BadArguments,
    CallError,
    Cancelled,
    InternalError,
    NotJson,
    Overloaded,
    ShuttingDown,
    TimeLimitExceeded,
    WorkerLost,
)
from taskd.functions import Function, Kind, task
from taskd.ledger import Ledger
from taskd.relay import Relay
from taskd.scoreboard import Scoreboard
from taskd.wire import NO_TERMS, encode_error
from tests.support import FakePool, MemoryDaemon, counts_of, line_of


class Books:
    """
    The books of a worker, and what they show.

    Attributes:
        board: The scoreboard that they are a part of.
        ledger: What writes them.
        now: CLOCK_MONOTONIC seconds; the epoch's are 1000 more.
    """

    def __init__(self, number: int = 1, **options: Any) -> None:
        fd = Scoreboard.create(1)
        self.board = Scoreboard(fd)
        os.close(fd)
        self.board.slot(number).open(4711, 1.0)
        self.now = 50.0
        self.ledger = Ledger(
            self.board.tally(number),
            self.board.failures(number),
            number,
            clock=lambda: self.now,
            wall_clock=lambda: self.now + 1000.0,
            **options,
        )

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        return {f["name"]: f for f in self.board.status(1.0)["functions"]}

    @property
    def failures(self) -> list[dict[str, Any]]:
        return self.board.latest_failures(50)


class LedgerTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.books = Books()
        self.ledger = self.books.ledger
        self.function = Function("add", lambda a, b: a + b, Kind.THREAD)

    def failed(self, error: CallError, began: float | None = None) -> None:
        """Have a call fail, and taken note of."""
        call = Call(self.function, [1, 2], {}, "7", NO_TERMS, self.ledger.failed, None)
        call.began = began
        call.fail(error)

    def test_what_is_kept(self) -> None:
        """What the daemon's own limits and faults end is kept; what callers cause is counted."""
        kept = (TimeLimitExceeded("too long"), InternalError("a bug"))
        others = (Cancelled("x"), WorkerLost("x"), Overloaded("x"), ShuttingDown("x"))
        for error in (*others, *kept):
            self.failed(error)
            self.books.now += 1
        self.assertEqual(
            self.books.functions["add"]["errors"],
            {error.code: 1 for error in (*others, *kept)},
        )
        self.assertEqual(
            self.books.failures,
            [
                {
                    "at": at,
                    "function": "add",
                    "code": code,
                    "type": None,
                    "message": message,
                    "worker": 1,
                }
                for at, code, message in (
                    (1055.0, "internal", "a bug"),
                    (1054.0, "time-limit", "too long"),
                )
            ],
        )

    def test_what_ran(self) -> None:
        """A call that has failed while it ran has run for so long; another one has not run."""
        self.failed(TimeLimitExceeded("too long"), 47.5)
        self.failed(TimeLimitExceeded("too long"))
        add = self.books.functions["add"]
        self.assertEqual((add["seconds"], add["latency"]), (2.5, {str(2**22): 1}))
        self.assertEqual(add["errors"], {"time-limit": 2})

    def test_another_workers_reply(self) -> None:
        """A call that has failed elsewhere is counted and kept by what its reply says."""
        call = Call(self.function, [1, 2], {}, "", NO_TERMS, self.ledger.failed, None)
        call.end(encode_error("", TimeLimitExceeded("too long")), 0.5, "time-limit")
        self.assertEqual(self.books.functions["add"]["seconds"], 0.5)
        self.assertEqual([f["message"] for f in self.books.failures], ["too long"])

    def test_refused(self) -> None:
        """What does not come to be a call is counted, and neither kept nor run."""
        self.ledger.refused(self.function, BadArguments("three"))
        add = self.books.functions["add"]
        self.assertEqual((add["errors"], add["latency"]), ({"bad-arguments": 1}, {}))
        self.assertEqual(self.books.failures, [])

    def test_an_exception(self) -> None:
        """What a task raises is logged, told and kept; it is counted by who answers."""
        for error, kind, message in (
            (ValueError("no"), "ValueError", "no"),
            (SystemExit(), "SystemExit", "SystemExit"),
            (NotJson("a set"), "NotJson", "add returned what JSON cannot carry: a set"),
        ):
            reply = self.ledger.explain(self.function, "7", None, error, 49.0)
            self.assertEqual(len(self.flushLoggedErrors(type(error))), 1)
            told = json.loads(reply)["error"]
            self.assertEqual((told["type"], told["message"]), (kind, message))
            self.assertNotIn("traceback", told)
            kept = self.books.failures[0]
            self.assertEqual(
                (kept["code"], kept["type"], kept["message"]), ("task-failed", kind, message)
            )
            self.books.now += 1
        self.assertEqual(self.books.functions, {})

    def test_tracebacks(self) -> None:
        """With ``--debug`` tracebacks are told to the caller, and never kept."""
        books = Books(debug=True)
        reply = books.ledger.explain(self.function, "7", None, ValueError("no"), None)
        self.flushLoggedErrors(ValueError)
        self.assertIn("ValueError: no", json.loads(reply)["error"]["traceback"])
        self.assertEqual(books.failures[0]["message"], "no")

    def test_the_daemons_own(self) -> None:
        """A function of the daemon's own that fails is no task that has failed."""
        own = Function("taskd.failures", lambda: None, Kind.REACTOR)
        self.ledger.explain(own, "7", None, ValueError("no"), None)
        self.ledger.buried(7, "taskd.status", "died", is_counted=False)
        self.flushLoggedErrors(ValueError)
        self.assertEqual((self.books.failures, self.books.functions), ([], {}))

    def test_a_death(self) -> None:
        """A worker's death is kept, and its task counted unless others do that."""
        books = Books(0)
        books.ledger.buried(7, "add", "was killed by SIGKILL", is_counted=False)
        books.ledger.buried(8, "echo", "exited with status 1", is_counted=True)
        self.assertEqual(
            {name: f["errors"] for name, f in books.functions.items()}, {"add": {"worker-lost": 1}}
        )
        self.assertEqual(
            sorted((f["worker"], f["function"], f["message"]) for f in books.failures),
            [
                (7, "add", "worker 7 was killed by SIGKILL"),
                (8, "echo", "worker 8 exited with status 1"),
            ],
        )


@task
def add(a: int, b: int) -> int:
    return a + b


@task
def broken() -> None:
    raise ValueError("no")


@task(blocking=False)
def at_once(value: Any) -> Any:
    return value


@task(blocking=False)
def broken_at_once() -> None:
    raise ArithmeticError("no")


@task(timeout=5)
async def endless() -> None:
    await Deferred()


class WorkerTestCase(SynchronousTestCase):
    """A whole worker, whose callers are the test."""

    def setUp(self) -> None:
        self.books = Books()
        self.daemon = MemoryDaemon(
            add, broken, at_once, broken_at_once, endless, ledger=self.books.ledger
        )
        self.protocol, self.transport = self.daemon.connect()

    def ask(self, function: str, *args: Any, **members: Any) -> None:
        self.protocol.dataReceived(line_of(function, *args, **members))

    def wait_for(self, replies: int) -> None:
        self.daemon.loop.run_until(lambda: len(self.transport.messages) >= replies)

    def counted(self) -> dict[str, tuple[int, dict[str, int], int]]:
        """Give what is counted: how many are done, have failed, have run."""
        return {
            name: (f["done"], f["errors"], sum(f["latency"].values()))
            for name, f in self.books.functions.items()
        }


class WorkerTests(WorkerTestCase):
    """A worker that answers for itself."""

    def test_each_once(self) -> None:
        """Each call is counted once, with or without an id, wherever it runs."""
        for number in range(3):
            self.ask("add", 1, 2)
            self.ask("add", 1, 2, id=number)
            self.ask("at_once", 1)
            self.ask("at_once", 1, id=number, timeout=5)
        self.wait_for(12)
        self.assertEqual(self.counted(), {"add": (6, {}, 6), "at_once": (6, {}, 6)})
        self.assertEqual(counts_of(self.daemon.slot)["done"], 12)

    def test_exceptions(self) -> None:
        """What tasks raise is counted once, and kept once."""
        self.ask("broken", id=1)
        self.ask("broken_at_once", id=2)
        self.ask("broken_at_once", id=3, timeout=5)
        self.wait_for(3)
        self.assertEqual(len(self.flushLoggedErrors(ValueError, ArithmeticError)), 3)
        self.assertEqual(
            self.counted(),
            {
                "broken": (0, {"task-failed": 1}, 1),
                "broken_at_once": (0, {"task-failed": 2}, 2),
            },
        )
        kept = sorted((f["function"], f["type"]) for f in self.books.failures)
        self.assertEqual(
            kept, [("broken", "ValueError"), *[("broken_at_once", "ArithmeticError")] * 2]
        )

    def test_limits_and_cancels(self) -> None:
        """A call that is ended from outside is counted once, as its caller is told."""
        self.ask("endless", id=1)
        self.daemon.loop.advance(2)
        self.ask("endless", id=2)
        self.ask("taskd.cancel", 2, id=3)
        self.daemon.loop.advance(4)
        self.wait_for(3)
        self.assertEqual(self.counted(), {"endless": (0, {"time-limit": 1, "cancelled": 1}, 2)})
        self.assertEqual([f["code"] for f in self.books.failures], ["time-limit"])

    def test_what_is_refused(self) -> None:
        """Arguments that do not fit a function are counted; a name that is none is not."""
        self.ask("add", 1, id=1)
        self.ask("at_once", id=2)
        self.ask("nothing", id=3)
        self.ask("taskd.ping", 1, id=4)
        self.assertEqual(len(self.transport.messages), 4)
        expected = (0, {"bad-arguments": 1}, 0)
        self.assertEqual(self.counted(), {"add": expected, "at_once": expected})
        self.assertEqual(self.books.failures, [])

    def test_while_it_stops(self) -> None:
        """What comes too late is counted as such, if there is such a function."""
        self.ask("endless", id=1)
        self.daemon.factory.drain()
        self.ask("add", 1, 2, id=2)
        self.ask("nothing", id=3)
        self.assertEqual(self.counted(), {"add": (0, {"shutting-down": 1}, 0)})

    def test_nobody_listens(self) -> None:
        """A call whose caller has gone is counted all the same."""
        self.ask("add", 1, 2, id=1)
        self.protocol.connectionLost()
        self.daemon.loop.run_until(self.counted)
        self.assertEqual(self.counted(), {"add": (1, {}, 1)})


class ElsewhereTests(WorkerTestCase):
    """A worker that has retired, and what others tell it; and they themselves."""

    def setUp(self) -> None:
        super().setUp()
        self.pool = FakePool()
        self.daemon.executor.pool = self.pool

    def retire(self) -> None:
        self.protocol.pass_on()

    def sent_on(self, function: str, *args: Any) -> Call:
        """Ask for what this worker runs no more, and give what it has handed over."""
        self.ask(function, *args, id=len(self.pool.taken))
        return self.pool.taken[-1]

    def test_it_ran_elsewhere(self) -> None:
        """What ran elsewhere is counted here, where its caller is told, by what is said of it."""
        self.retire()
        self.sent_on("add", 1, 2).end(b"3\n", 0.5)
        self.sent_on("add", 1, 2).end(b"{}\n", 0.25, "task-failed")
        self.sent_on("add", 1).end(b"{}\n", None, "bad-arguments")
        add = self.books.functions["add"]
        self.assertEqual(
            (add["done"], add["errors"], add["seconds"]),
            (1, {"task-failed": 1, "bad-arguments": 1}, 0.75),
        )

    def test_it_did_not_run(self) -> None:
        """What nobody runs is counted where its caller is told, once, whatever comes later."""
        self.retire()
        call = self.sent_on("add", 1, 2)
        call.fail(Overloaded("too many"))
        call.end(b"3\n", 0.5)
        self.assertEqual(self.counted()["add"], (0, {"overloaded": 1}, 0))

    def test_what_newer_code_knows(self) -> None:
        """A function that only others know is counted if it ran; a made-up name never is."""
        self.retire()
        self.sent_on("newer", 1, 2).end(b"3\n", 0.5)
        self.sent_on("newest", 1, 2).end(b"{}\n", 0.5, "task-failed")
        self.sent_on("made_up").end(b"{}\n", None, "unknown-function")
        self.sent_on("made_up").fail(Overloaded("too many"))
        self.assertEqual(
            self.counted(), {"newer": (1, {}, 1), "newest": (0, {"task-failed": 1}, 1)}
        )

    def test_it_runs_for_others(self) -> None:
        """What a worker runs for others it does not count, but keeps what it has raised."""
        told: list[bytes] = []
        relay = Relay(
            self.daemon.registry,
            self.daemon.executor,
            self.books.board,
            told.append,
            clock=self.daemon.loop.seconds,
        )
        run = relay.readers[b"run"]
        for number, (name, *args) in enumerate(
            (("add", 1, 2), ("broken",), ("at_once", 1), ("broken_at_once",), ("nothing",))
        ):
            run(b"%d - %s" % (number, line_of(name, *args, id=1).rstrip()))
        self.daemon.loop.run_until(lambda: len(told) == 5)
        self.flushLoggedErrors(ValueError, ArithmeticError)
        ends = sorted(line.split(b" ")[1:4] for line in told)
        self.assertEqual(
            [(number, code, seconds != b"-") for number, code, seconds in ends],
            [
                (b"0", b"-", True),
                (b"1", b"task-failed", True),
                (b"2", b"-", True),
                (b"3", b"task-failed", True),
                (b"4", b"unknown-function", False),
            ],
        )
        self.assertEqual(self.counted(), {})
        self.assertEqual(
            sorted(f["function"] for f in self.books.failures), ["broken", "broken_at_once"]
        )
