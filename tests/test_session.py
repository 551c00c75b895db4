"""One peer's conversation: order, ids, limits, and its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import Grant
from taskd.call import Call, Origin
from taskd.errors import CallError, Cancelled, Overloaded, TaskFailed, WorkerLost
from taskd.functions import Function, Kind, task
from taskd.session import Session
from taskd.wire import NO_TERMS, Terms, encode_progress, encode_result
from tests.support import line_of, registry_of

ANYTHING = Grant("")
"""What a caller may do that is not asked who it is."""


@task(blocking=False)
def now(value: Any = None) -> Any:
    """Give the value back at once."""
    return value


def later(label: str) -> None:
    """Stand for a task that goes on until the test ends it."""


@task(timeout=30)
def limited(label: str) -> None:
    """Stand for a task that has a time limit of its own."""


class NotedBooks:
    """
    Takes what calls come to, and counts nothing.

    Attributes:
        noted: The function and what became of it, of each call.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[str, str]] = []

    def done(self, label: bytes, seconds: float) -> None:
        self.noted.append((label.rstrip(b"\0").decode(), "done"))

    def failed(self, call: Call) -> None:
        self.noted.append((call.function.name, str(call.code)))

    def refused(self, function: Function, error: CallError) -> None:
        self.noted.append((function.name, error.code))


class HeldRunner:
    """Answers what is quick, and holds every other call until the test ends it."""

    def __init__(self) -> None:
        self.ledger = NotedBooks()
        self.held: dict[str, Call] = {}
        self.sent_on: list[Call] = []
        self.abandoned: list[str] = []

    def call_now(
        self,
        function: Function,
        positional: list[Any],
        keywords: dict[str, Any],
        id_json: str,
        origin: Origin | None,
    ) -> bytes | Deferred[Any]:
        return encode_result(id_json, function.call(*positional, **keywords))

    def start(self, call: Call, pending: Deferred[Any] | None) -> None:
        label = call.positional[0]
        self.held[label] = call
        call.abandon = lambda call: self.abandoned.append(label)

    def send_on(self, call: Call) -> None:
        self.sent_on.append(call)

    def finish(self, label: str) -> None:
        """End a call with its label as the result."""
        call = self.held[label]
        call.end(encode_result(call.id_json, label), 0.5)


class Conversation:
    """
    A session, and the test as its peer.

    Attributes:
        reports: The progress messages.
        cut_offs: The protocols that it was cut off for.
        refusals: What was called and not allowed, and on which grant.
        questions: The tokens that were shown, and what takes the answer.
        holds: Whether to stop reading, each time that this was said.
        quiet: How many calls were in flight, each time that nothing was owed.
    """

    def __init__(self, max_in_flight: int = 1000, grant: Grant | None = ANYTHING) -> None:
        self.runner = HeldRunner()
        self.sent: list[bytes] = []
        self.reports: list[bytes] = []
        self.cut_offs: list[str] = []
        self.refusals: list[tuple[str, Grant | None]] = []
        self.questions: list[tuple[str, Callable[[Grant | None], None]]] = []
        self.hang_ups = 0
        self.holds: list[bool] = []
        self.quiet: list[bool] = []
        functions = registry_of(now, later, limited)
        functions.add(Function("taskd.ping", lambda: "draining", Kind.REACTOR))
        self.session = Session(functions, self.runner, self, max_in_flight, grant)
        self.session.on_quiet = lambda: self.quiet.append(self.session.owes_replies)

    def write(self, line: bytes) -> None:
        self.sent.append(line)

    def report(self, line: bytes) -> None:
        self.sent.append(line)
        self.reports.append(line)

    def hang_up(self) -> None:
        self.hang_ups += 1

    def cut_off(self, protocol: str) -> None:
        self.cut_offs.append(protocol)

    def hold_while_full(self, is_on: bool) -> None:
        self.holds.append(is_on)

    def identify(self, token: str, done: Callable[[Grant | None], None]) -> None:
        self.questions.append((token, done))

    def turned_down(self, name: str, grant: Grant | None) -> None:
        self.refusals.append((name, grant))

    def ask(self, function: str, *args: Any, **members: Any) -> None:
        self.session.receive(line_of(function, *args, **members).rstrip(b"\n"))

    @property
    def replies(self) -> list[Any]:
        return [json.loads(line) for line in self.sent]

    @property
    def gist(self) -> list[Any]:
        """The replies, each error by its code alone."""
        return [_gist(reply) for reply in self.replies]


def _gist(reply: Any) -> Any:
    if isinstance(reply, dict) and "error" in reply:
        code = reply["error"]["code"]
        return (reply["id"], code) if "id" in reply else code
    return (reply["id"], reply["result"]) if isinstance(reply, dict) else reply


class SessionTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.peer = Conversation()
        self.session = self.peer.session
        self.runner = self.peer.runner
        self.ask = self.peer.ask


class OrderTests(SessionTestCase):
    def test_without_ids_the_order_is_that_of_the_requests(self) -> None:
        """Replies without an id wait for those before them, however quick they are."""
        self.ask("later", "a")
        self.ask("now", "b")
        self.ask("later", "c")
        self.runner.finish("c")
        self.assertEqual(self.peer.replies, [])
        self.runner.finish("a")
        self.assertEqual(self.peer.replies, ["a", "b", "c"])

    def test_a_late_reply_lets_go_only_what_is_behind_it(self) -> None:
        """A reply without an id lets out what is ready, up to the next that is not."""
        for label in "abc":
            self.ask("later", label)
        self.ask("now", "d")
        self.runner.finish("a")
        self.assertEqual(self.peer.replies, ["a"])
        self.runner.finish("b")
        self.assertEqual(self.peer.replies, ["a", "b"])
        self.runner.finish("c")
        self.assertEqual(self.peer.replies, ["a", "b", "c", "d"])

    def test_errors_keep_the_order(self) -> None:
        """An error without an id waits for its turn like a result."""
        self.ask("later", "a")
        self.ask("nowhere")
        self.ask("now", 1, 2, 3)
        self.ask("later", "b")
        self.ask("now", "z")
        self.runner.held["b"].fail(TaskFailed("broken"))
        self.assertEqual(self.peer.replies, [])
        self.runner.finish("a")
        self.assertEqual(
            self.peer.gist, ["a", "unknown-function", "bad-arguments", "task-failed", "z"]
        )

    def test_with_ids_the_order_is_that_of_the_ends(self) -> None:
        """A reply with an id leaves as soon as it is there."""
        self.ask("later", "a", id=1)
        self.ask("later", "b", id=2)
        self.ask("now", "c", id=3)
        self.runner.finish("b")
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(3, "c"), (2, "b"), (1, "a")])

    def test_an_error_with_an_id_waits_for_nothing(self) -> None:
        """An error with an id passes the replies without one that are not ready."""
        self.ask("later", "a")
        self.ask("nowhere", id="x")
        self.ask("now", 1, 2, 3, id="y")
        self.assertEqual(self.peer.gist, [("x", "unknown-function"), ("y", "bad-arguments")])

    def test_ids_are_any_json(self) -> None:
        """An id comes back as it was, whatever JSON value it is."""
        ids = [0, -1, 1.5, "", "é", None, True, [1, [2]], {"a": {"b": None}}]
        for id_ in ids:
            self.ask("now", id=id_)
        self.assertEqual([reply["id"] for reply in self.peer.replies], ids)

    def test_two_requests_may_have_one_id(self) -> None:
        """Each of two requests with the same id gets its own reply under it."""
        self.ask("later", "a", id=1)
        self.ask("later", "b", id=1)
        self.runner.finish("b")
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(1, "b"), (1, "a")])


class BooksTests(SessionTestCase):
    def test_what_is_counted(self) -> None:
        """Each call of a known function is taken note of once, as its caller is told."""
        self.ask("later", "a", id=1)
        self.ask("later", "b", id=2)
        self.ask("later", id=3)
        self.ask("nothing", id=4)
        self.runner.finish("a")
        self.runner.finish("a")
        self.runner.held["b"].fail(Cancelled("taken back"))
        self.runner.finish("b")
        self.assertEqual(
            self.runner.ledger.noted,
            [("later", "bad-arguments"), ("later", "done"), ("later", "cancelled")],
        )

    def test_nobody_listens(self) -> None:
        """What has ended when its caller has gone is taken note of all the same."""
        self.ask("later", "a", id=1)
        self.session.lost()
        self.runner.finish("a")
        self.assertEqual(self.runner.ledger.noted, [("later", "done")])


class LineTests(SessionTestCase):
    def test_empty_lines_are_keep_alives(self) -> None:
        """A line of nothing, or of carriage returns, is answered by nothing and ends nothing."""
        for line in (b"", b"\r", b"\r\r"):
            self.session.receive(line)
        self.ask("now", "still here")
        self.assertEqual(self.peer.replies, ["still here"])
        self.assertEqual(self.peer.hang_ups, 0)

    def test_carriage_returns_are_stripped(self) -> None:
        """A request may end in carriage returns."""
        self.session.receive(b'{"function": "now", "args": ["x"]}\r')
        self.session.receive(b'{"function": "now", "args": ["y"]}\r\r')
        self.assertEqual(self.peer.replies, ["x", "y"])

    def test_nothing_behind_a_malformed_line_is_read(self) -> None:
        """A malformed line is answered, the peer is hung up on, and what follows is not read."""
        for line in (
            b"POST",
            b" ",
            b"[]",
            b'{"function": 1}',
            b'{"fun": "now"}',
            b"\xff",
        ):
            peer = Conversation()
            peer.session.receive(line)
            peer.ask("now", "smuggled")
            peer.session.receive(b"more rubbish")
            self.assertEqual(peer.gist, ["malformed"], line)
            self.assertEqual(peer.hang_ups, 1, line)

    def test_a_malformed_request_is_refused_by_its_id(self) -> None:
        """A request that is JSON but no request is answered under its id if it has one."""
        self.session.receive(b'{"function": 5, "id": 12}')
        self.assertEqual(self.peer.gist, [(12, "malformed")])

    def test_what_is_owed_is_paid_before_hanging_up(self) -> None:
        """After a malformed line the replies that are owed still leave, its own in its turn."""
        self.ask("later", "a")
        self.ask("later", "b", id=1)
        self.session.receive(b"rubbish")
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))
        self.runner.finish("a")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["a", "malformed"], 0))
        self.runner.finish("b")
        self.assertEqual((self.peer.gist[2:], self.peer.hang_ups), ([(1, "b")], 1))

    def test_a_line_too_long_is_answered_and_ends_it(self) -> None:
        """A line that is too long is answered with the limit, and nothing behind it is read."""
        self.session.receive_too_much(1024)
        self.ask("now", "smuggled")
        self.assertEqual(self.peer.gist, ["line-too-long"])
        self.assertIn("1024 bytes", self.peer.replies[0]["error"]["message"])
        self.assertEqual(self.peer.hang_ups, 1)

    def test_the_rest_of_a_line_too_long_is_not_answered(self) -> None:
        """A line that goes on and on is answered once, even while replies are owed."""
        self.ask("later", "a", id=1)
        self.session.receive_too_much(1024)
        self.session.receive_too_much(1024)
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, ["line-too-long", (1, "a")])


class EndTests(SessionTestCase):
    def test_the_end_of_sending_with_nothing_owed(self) -> None:
        """A peer that has sent all and is owed nothing is hung up on."""
        self.ask("now", "a")
        self.session.receive_end(False)
        self.assertEqual((self.peer.replies, self.peer.hang_ups), (["a"], 1))

    def test_the_end_of_sending_with_replies_owed(self) -> None:
        """A peer that has sent all gets every reply that it is owed before it is hung up on."""
        self.ask("later", "a", id=1)
        self.ask("later", "b")
        self.session.receive_end(False)
        self.assertTrue(self.session.owes_replies)
        self.runner.finish("b")
        self.assertEqual(self.peer.hang_ups, 0)
        self.runner.finish("a")
        self.assertFalse(self.session.owes_replies)
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["b", (1, "a")], 1))

    def test_the_end_of_sending_in_a_line(self) -> None:
        """A line that its sender's end cut off is malformed."""
        self.session.receive_end(True)
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["malformed"], 1))

    def test_the_end_of_sending_after_a_malformed_line(self) -> None:
        """A peer that was refused already is not answered again when it ends in a line."""
        self.ask("later", "a", id=1)
        self.session.receive(b"rubbish")
        self.session.receive_end(True)
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, ["malformed", (1, "a")])
        self.assertEqual(self.peer.hang_ups, 1)

    def test_drain_with_nothing_owed(self) -> None:
        """Draining hangs up at once on a peer that is owed nothing."""
        self.session.drain()
        self.assertEqual(self.peer.hang_ups, 1)

    def test_drain_starts_nothing_more(self) -> None:
        """While it drains, new requests are told to come again, and what runs is answered."""
        self.ask("later", "a")
        self.session.drain()
        self.ask("later", "b")
        self.ask("now", "c", id=1)
        self.assertEqual(list(self.runner.held), ["a"])
        self.assertEqual(self.peer.gist, [(1, "shutting-down")])
        self.assertTrue(self.peer.replies[0]["error"]["retryable"])
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(1, "shutting-down"), "a", "shutting-down"])
        self.assertEqual(self.peer.hang_ups, 1)

    def test_ping_to_the_end(self) -> None:
        """A health check is answered here, however late it is."""
        self.ask("later", "a", id=1)
        for step in (self.session.pass_on, self.session.drain):
            step()
            self.ask("taskd.ping", id=2)
            self.assertEqual(self.peer.gist[-1], (2, "draining"))

    def test_own_functions_and_limits(self) -> None:
        """What the daemon tells about itself is told at once, whatever time it is given."""
        self.ask("taskd.ping", id=1, timeout=5)
        self.assertEqual(self.peer.gist, [(1, "draining")])
        self.assertEqual(self.runner.held, {})

    def test_goodbye(self) -> None:
        """A session that is to say goodbye does so once, behind all that it owes."""
        self.ask("later", "a")
        self.ask("later", "b", id=1)
        self.session.drain(says_goodbye=True)
        self.runner.finish("b")
        self.assertEqual(self.peer.gist, [(1, "b")])
        self.runner.finish("a")
        self.ask("now", "c", id=2)
        self.assertEqual(self.peer.gist, [(1, "b"), "a", "shutting-down"])
        self.assertEqual(self.peer.hang_ups, 1)

    def test_no_goodbye(self) -> None:
        """A peer that has ended its sending, and so will ask nothing more, is told no goodbye."""
        self.ask("later", "a")
        self.session.receive_end(False)
        self.session.drain(says_goodbye=True)
        self.runner.finish("a")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["a"], 1))

    def test_a_lost_peer_is_sent_nothing(self) -> None:
        """Once the connection is lost its tasks end without a reply and without hanging up."""
        self.ask("later", "a")
        self.ask("later", "b", id=1, progress=True)
        self.session.lost()
        call = self.runner.held["b"]
        assert call.send_progress is not None
        call.send_progress(encode_progress("1", 1, 2, None))
        self.runner.finish("b")
        self.runner.finish("a")
        self.session.drain()
        self.session.receive_end(False)
        self.ask("now", "c")
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))
        self.assertFalse(self.session.owes_replies)

    def test_abandon(self) -> None:
        """Abandoning answers everything that is owed with the error, and stops the tasks."""
        self.ask("later", "a")
        self.ask("later", "b", id=1)
        self.session.abandon(WorkerLost("the grace is over"))
        self.assertCountEqual(self.peer.gist, ["worker-lost", (1, "worker-lost")])
        self.assertCountEqual(self.runner.abandoned, ["a", "b"])
        self.assertFalse(self.session.owes_replies)


class CallersEndTests(SessionTestCase):
    """Tasks that are to end with their caller's connection."""

    def test_who_wanted_it(self) -> None:
        """When the connection is lost the tasks that were to end with it are stopped, no others."""
        self.ask("later", "a", cancel_on_disconnect=True)
        self.ask("later", "b")
        self.ask("later", "c", id=1, cancel_on_disconnect=True)
        self.ask("later", "d", id=2, cancel_on_disconnect=False)
        self.session.lost()
        self.assertCountEqual(self.runner.abandoned, ["a", "c"])
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))
        for label in "bd":
            self.assertIsNone(self.runner.held[label].reply)

    def test_the_end_of_sending(self) -> None:
        """A peer that has ended its sending may have closed: the same tasks are stopped then."""
        self.ask("later", "a", cancel_on_disconnect=True)
        self.ask("later", "b", id=1)
        self.session.receive_end(False)
        self.assertEqual(self.runner.abandoned, ["a"])
        self.runner.finish("b")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["cancelled", (1, "b")], 1))

    def test_the_end_of_sending_of_all(self) -> None:
        """Where nothing else is owed the peer is hung up on once."""
        for label in "ab":
            self.ask("later", label, cancel_on_disconnect=True)
        self.session.receive_end(False)
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["cancelled", "cancelled"], 1))

    def test_what_is_done_already(self) -> None:
        """A task that has been answered is not stopped when the connection ends."""
        self.ask("later", "a", cancel_on_disconnect=True)
        self.runner.finish("a")
        self.session.lost()
        self.assertEqual(self.runner.abandoned, [])


class FullTests(SessionTestCase):
    """As many calls in flight as there may be."""

    def setUp(self) -> None:
        super().setUp()
        self.peer = Conversation(max_in_flight=4)
        self.session = self.peer.session
        self.runner = self.peer.runner
        self.ask = self.peer.ask

    def ask_for(self, labels: str) -> None:
        for label in labels:
            self.ask("later", label)

    def test_reading_is_held_at_the_limit(self) -> None:
        """Reading is held by the call that reaches the limit, and by no earlier one."""
        self.ask_for("abc")
        self.assertEqual(self.peer.holds, [])
        self.ask_for("d")
        self.assertEqual(self.peer.holds, [True])

    def test_what_has_been_read_is_still_taken(self) -> None:
        """Lines that come though reading is held are taken, and hold it no second time."""
        self.ask_for("abcdef")
        self.assertEqual(len(self.runner.held), 6)
        self.assertEqual(self.peer.holds, [True])

    def test_reading_goes_on_at_half(self) -> None:
        """Reading goes on when half of the limit is in flight, not before."""
        self.ask_for("abcde")
        for label in "abc":
            self.assertEqual(self.peer.holds, [True])
            self.runner.finish(label)
        self.assertEqual(self.peer.holds, [True, False])
        self.runner.finish("d")
        self.assertEqual(self.peer.holds, [True, False])

    def test_again_and_again(self) -> None:
        """Each time that the limit is reached reading is held anew."""
        self.ask_for("abcd")
        for label in "ab":
            self.runner.finish(label)
        self.ask_for("ef")
        self.assertEqual(self.peer.holds, [True, False, True])

    def test_a_limit_of_one(self) -> None:
        """Where one call may be in flight, reading goes on when it has ended."""
        self.peer = Conversation(max_in_flight=1)
        for label in "ab":
            self.peer.ask("later", label)
            self.peer.runner.finish(label)
        self.assertEqual(self.peer.holds, [True, False, True, False])

    def test_what_is_over_at_once(self) -> None:
        """Calls that are answered at once are not in flight, however many they are."""
        for number in range(20):
            self.ask("now", number)
            self.ask("nowhere")
        self.assertEqual(self.peer.holds, [])

    def test_what_waits_for_its_turn(self) -> None:
        """What is answered at once counts while it waits for a reply before it, of any kind."""
        for asks in (
            lambda peer: peer.ask("now", 1),
            lambda peer: peer.ask("nowhere"),
            lambda peer: peer.ask("taskd.cancel", 1),
            lambda peer: peer.ask("taskd.auth", 5),
        ):
            peer = Conversation(max_in_flight=4)
            peer.ask("later", "a")
            for _ in range(2):
                asks(peer)
                self.assertEqual(peer.holds, [])
            asks(peer)
            asks(peer)
            self.assertEqual(peer.holds, [True])
            peer.runner.finish("a")
            self.assertEqual((peer.holds, len(peer.replies)), ([True, False], 5))

    def test_calls_that_wait_for_their_turn(self) -> None:
        """Calls that have ended and wait for one before them count; reading goes on at half."""
        self.ask_for("abc")
        for label in "bc":
            self.runner.finish(label)
        self.assertEqual(self.peer.holds, [])
        self.ask("later", "d")
        self.assertEqual(self.peer.holds, [True])
        self.ask("later", "e", id=5)
        self.runner.finish("e")
        self.assertEqual(self.peer.holds, [True])
        self.runner.finish("a")
        self.assertEqual(self.peer.holds, [True, False])

    def test_with_an_id_it_waits_for_nothing(self) -> None:
        """What is answered at once under its id does not count, whatever is in flight."""
        self.ask("later", "a")
        for number in range(20):
            self.ask("now", number, id=number)
            self.ask("nowhere", id=number)
        self.assertEqual(self.peer.holds, [])

    def test_a_lost_peer(self) -> None:
        """Nobody goes on reading from a peer that is lost."""
        self.ask_for("abcd")
        self.session.lost()
        for label in "abcd":
            self.runner.finish(label)
        self.assertEqual(self.peer.holds, [True])


class PassOnTests(SessionTestCase):
    """A session whose tasks are run by another worker."""

    def sent_on(self) -> list[tuple[str, list[Any], dict[str, Any], str]]:
        return [
            (call.function.name, call.positional, call.keywords, call.id_json)
            for call in self.runner.sent_on
        ]

    def test_every_later_request_is_sent_on(self) -> None:
        """Whatever comes later is sent on as it is, names and arguments unknown here included."""
        self.ask("later", "a")
        self.session.pass_on()
        self.ask("now", 1)
        self.ask("later", "b", id=7, timeout=5, priority=2)
        self.ask("of.newer.code", 1, 2, 3)
        self.session.receive(b'{"function": "now", "args": {"no": "such", "names": 1}}')
        self.ask("taskd.status")
        self.assertEqual(
            self.sent_on(),
            [
                ("now", [1], {}, ""),
                ("later", ["b"], {}, "7"),
                ("of.newer.code", [1, 2, 3], {}, ""),
                ("now", [], {"no": "such", "names": 1}, ""),
                ("taskd.status", [], {}, ""),
            ],
        )
        self.assertEqual(self.runner.sent_on[1].terms, Terms(timeout=5, priority=2))
        self.assertEqual((list(self.runner.held), self.peer.replies), (["a"], []))

    def test_replies_keep_their_order(self) -> None:
        """Replies without an id leave in their order, wherever their tasks are run."""
        self.ask("later", "a")
        self.session.pass_on()
        for label in "bc":
            self.ask("later", label)
        for call in reversed(self.runner.sent_on):
            call.end(encode_result("", call.positional[0]))
        self.assertEqual(self.peer.replies, [])
        self.runner.finish("a")
        self.assertEqual(self.peer.replies, ["a", "b", "c"])

    def test_cancel_stays_here(self) -> None:
        """Cancelling is this connection's own matter, for calls that were sent on as well."""
        self.ask("later", "a", id=1)
        self.session.pass_on()
        self.ask("later", "b", id=2)
        self.ask("taskd.cancel", 1)
        self.ask("taskd.cancel", 2)
        self.ask("taskd.cancel", 3)
        self.assertEqual(self.peer.gist, [(1, "cancelled"), True, (2, "cancelled"), True, False])
        self.assertEqual(len(self.runner.sent_on), 1)

    def test_lines_that_are_no_requests(self) -> None:
        """Keep-alives and malformed lines are dealt with here as ever."""
        self.session.pass_on()
        self.session.receive(b"")
        self.session.receive(b"\r")
        self.assertEqual(self.peer.replies, [])
        self.session.receive(b'{"function": 5, "id": 12}')
        self.assertEqual((self.peer.gist, self.peer.hang_ups), ([(12, "malformed")], 1))
        self.assertEqual(self.runner.sent_on, [])

    def test_progress_is_sent(self) -> None:
        """What a task reports that runs elsewhere goes to who asked."""
        self.session.pass_on()
        self.ask("later", "a", id=1, progress=True)
        (call,) = self.runner.sent_on
        assert call.send_progress is not None
        call.send_progress(encode_progress("1", 1, 2, None))
        self.assertEqual(self.peer.replies[0]["progress"]["done"], 1)

    def test_draining_is_stronger(self) -> None:
        """Once all stop nothing is sent on any more."""
        self.ask("later", "a")
        self.session.pass_on()
        self.session.drain()
        self.ask("later", "b", id=1)
        self.assertEqual((self.peer.gist, self.runner.sent_on), ([(1, "shutting-down")], []))

    def test_quiet(self) -> None:
        """Each time that the last reply is owed no longer that is told, once it is passed on."""
        self.ask("later", "a")
        self.runner.finish("a")
        self.ask("later", "b")
        self.session.pass_on()
        self.ask("later", "c")
        self.assertEqual(self.peer.quiet, [])
        self.runner.finish("b")
        self.assertEqual(self.peer.quiet, [])
        self.runner.sent_on[0].end(b"null\n")
        self.assertEqual(self.peer.quiet, [False])
        self.ask("later", "d")
        self.runner.sent_on[1].end(b"null\n")
        self.assertEqual(self.peer.quiet, [False, False])

    def test_a_lost_peer_is_not_told(self) -> None:
        """Nothing is told of a session whose peer is gone."""
        self.ask("later", "a")
        self.session.pass_on()
        self.session.lost()
        self.runner.finish("a")
        self.assertEqual(self.peer.quiet, [])


class CanMoveTests(SessionTestCase):
    """Whether another process could take the conversation up."""

    def test_nothing_is_here(self) -> None:
        """A session that owes nothing can move, before its first request and between two."""
        self.assertTrue(self.session.can_move)
        self.ask("now", "a")
        self.assertTrue(self.session.can_move)
        self.ask("later", "b")
        self.assertFalse(self.session.can_move)
        self.runner.finish("b")
        self.assertTrue(self.session.can_move)

    def test_with_an_id(self) -> None:
        """A call with an id keeps it here like one without."""
        self.ask("later", "a", id=1)
        self.assertFalse(self.session.can_move)

    def test_once_it_ends(self) -> None:
        """A session that was refused, has heard its peer's end, or is lost, stays where it is."""
        for end in (
            lambda session: session.receive(b"rubbish"),
            lambda session: session.receive_end(False),
            lambda session: session.receive_too_much(1024),
            lambda session: session.turn_away(Overloaded("full")),
            lambda session: session.lost(),
        ):
            session = Conversation().session
            end(session)
            self.assertFalse(session.can_move)


WEB = Grant("web", "digest", lambda name: name in ("now", "later", "taskd.auth", "taskd.cancel"))
"""What a caller may do that has rules."""


class StrangerTests(SynchronousTestCase):
    """A caller that has not said who it is."""

    def setUp(self) -> None:
        self.peer = Conversation(grant=None)

    def test_nothing_but_auth(self) -> None:
        """Whatever it calls is unauthorized, it is hung up on, and nothing behind that is read."""
        for request in (
            line_of("now", 1),
            line_of("nowhere", id=1),
            line_of("later", "a", priority=3),
            line_of("taskd.ping"),
            line_of("taskd.cancel", 1),
            line_of("taskd.status"),
            line_of("taskd.authentic", "token"),
            line_of("", 1),
        ):
            peer = Conversation(grant=None)
            peer.session.receive(request.rstrip())
            peer.ask("taskd.auth", "token")
            peer.ask("now", "smuggled")
            (reply,) = peer.replies
            self.assertEqual(reply["error"]["code"], "unauthorized", request)
            self.assertIn("taskd.auth", reply["error"]["message"])
            self.assertEqual(reply.get("id"), json.loads(request).get("id"))
            self.assertEqual((peer.hang_ups, peer.questions), (1, []), request)
            self.assertEqual(peer.refusals, [(json.loads(request)["function"], None)])
            self.assertEqual((peer.runner.held, peer.runner.sent_on), ({}, []))

    def test_auth_that_does_not_fit(self) -> None:
        """Arguments that do not fit are told, and it gets no second attempt."""
        for args in ([], [1], [None], [["token"]], ["a", "b"], {"tokens": "a"}, {"token": 5}):
            peer = Conversation(grant=None)
            peer.session.receive(json.dumps({"function": "taskd.auth", "args": args}).encode())
            peer.ask("taskd.auth", "token")
            self.assertEqual(peer.gist, ["bad-arguments"], args)
            self.assertEqual((peer.hang_ups, peer.questions), (1, []), args)

    def test_malformed_lines(self) -> None:
        """A line that is no request is answered as ever."""
        self.peer.session.receive(b"rubbish")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["malformed"], 1))

    def test_empty_lines(self) -> None:
        """Empty lines are no calls."""
        self.peer.session.receive(b"")
        self.peer.session.receive(b"\r")
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))

    def test_a_line_too_long(self) -> None:
        """It is told that its lines may be longer once it is known."""
        self.peer.session.receive_too_much(4096)
        (reply,) = self.peer.replies
        self.assertIn("4096 bytes until it is known who calls", reply["error"]["message"])

    def test_once_it_is_passed_on(self) -> None:
        """A connection that is to go, or to end, is no way around that."""
        for step in ("pass_on", "drain"):
            peer = Conversation(grant=None)
            if step == "drain":
                peer.ask("taskd.auth", "token")
            getattr(peer.session, step)()
            peer.ask("now", 1)
            self.assertEqual(peer.gist, ["unauthorized"])
            self.assertEqual(peer.runner.sent_on, [])


class AuthTests(SynchronousTestCase):
    """Saying who one is."""

    def setUp(self) -> None:
        self.peer = Conversation(grant=None)
        self.session = self.peer.session

    def answer(self, grant: Grant | None) -> None:
        """Tell what the last token grants, as the connection does."""
        _, done = self.peer.questions.pop()
        if grant is not None:
            self.session.admit(grant)
        done(grant)

    def test_the_right_token(self) -> None:
        """The identity is the answer, and from then on calls are run."""
        self.peer.ask("taskd.auth", "token", id=1)
        self.assertEqual(self.peer.questions[0][0], "token")
        self.assertEqual(self.peer.replies, [])
        self.answer(WEB)
        self.peer.ask("now", "a")
        self.assertEqual(self.peer.gist, [(1, "web"), "a"])
        self.assertIs(self.session.grant, WEB)
        self.assertEqual(self.peer.hang_ups, 0)

    def test_by_name(self) -> None:
        """The token may be given by name."""
        self.session.receive(b'{"function": "taskd.auth", "args": {"token": "x"}}')
        self.assertEqual([token for token, _ in self.peer.questions], ["x"])

    def test_a_wrong_token(self) -> None:
        """A wrong token is unauthorized, and nothing behind it is read."""
        self.peer.ask("taskd.auth", "token", id=1)
        self.answer(None)
        self.peer.ask("taskd.auth", "another")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), ([(1, "unauthorized")], 1))
        self.assertEqual(self.peer.questions, [])

    def test_where_nobody_is_asked(self) -> None:
        """Where nobody has to say who they are the answer is null."""
        self.peer = Conversation()
        self.session = self.peer.session
        self.peer.ask("taskd.auth", "token")
        self.answer(ANYTHING)
        self.assertEqual(self.peer.replies, [None])

    def test_twice(self) -> None:
        """Who is known may say to be somebody else, and is that one then."""
        for grant in (ANYTHING, WEB):
            self.peer.ask("taskd.auth", "token")
            self.answer(grant)
        self.assertEqual(self.peer.replies, [None, "web"])
        self.assertIs(self.session.grant, WEB)
        self.peer.ask("limited", "a")
        self.assertEqual(self.peer.gist[2:], ["unauthorized"])

    def test_a_wrong_token_of_who_is_known(self) -> None:
        """A wrong token ends the conversation of who was known too, and owed replies are paid."""
        self.peer = Conversation(grant=WEB)
        self.session = self.peer.session
        self.peer.ask("later", "a")
        self.peer.ask("taskd.auth", "wrong")
        self.answer(None)
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))
        self.peer.runner.finish("a")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["a", "unauthorized"], 1))

    def test_what_does_not_fit_of_who_is_known(self) -> None:
        """A token that is no string is told to who is known, and the conversation goes on."""
        self.peer = Conversation(grant=WEB)
        self.peer.ask("taskd.auth", 5, id=1)
        self.peer.ask("taskd.auth")
        self.peer.ask("now", "a")
        self.assertEqual(self.peer.gist, [(1, "bad-arguments"), "bad-arguments", "a"])
        self.assertEqual((self.peer.hang_ups, self.peer.questions), (0, []))

    def test_the_order(self) -> None:
        """The answer without an id waits for the replies before it."""
        self.peer = Conversation()
        self.session = self.peer.session
        self.peer.ask("later", "a")
        self.peer.ask("taskd.auth", "token")
        self.answer(WEB)
        self.peer.ask("now", "b")
        self.assertEqual(self.peer.replies, [])
        self.peer.runner.finish("a")
        self.assertEqual(self.peer.replies, ["a", "web", "b"])

    def test_as_it_is_answered_at_once(self) -> None:
        """It makes no difference whether the answer comes at once."""

        def identify(token: str, done: Callable[[Grant | None], None]) -> None:
            peer.session.admit(WEB)
            done(WEB)

        peer = Conversation(grant=None)
        peer.identify = identify  # type: ignore[method-assign]
        peer.ask("taskd.auth", "token")
        peer.ask("now", "a")
        self.assertEqual((peer.replies, peer.session.owes_replies), (["web", "a"], False))

    def test_an_answer_is_owed(self) -> None:
        """As long as the answer is not there it is owed, and the conversation cannot move."""
        self.peer.ask("taskd.auth", "token")
        self.assertEqual((self.session.owes_replies, self.session.can_move), (True, False))
        self.answer(WEB)
        self.assertEqual((self.session.owes_replies, self.session.can_move), (False, True))

    def test_passed_on_meanwhile(self) -> None:
        """A session that is passed on meanwhile is quiet with the answer, and is asked here."""
        self.session.pass_on()
        self.peer.ask("taskd.auth", "token")
        self.assertEqual((self.peer.quiet, self.peer.runner.sent_on), ([], []))
        self.answer(WEB)
        self.assertEqual((self.peer.replies, self.peer.quiet), (["web"], [False]))

    def test_passed_on_with_a_call_in_flight(self) -> None:
        """It is quiet when neither an answer nor a reply is owed, whichever comes last."""
        for is_auth_first in (True, False):
            self.peer = Conversation()
            self.session = self.peer.session
            self.peer.ask("later", "a", id=1)
            self.peer.ask("taskd.auth", "token", id=2)
            self.session.pass_on()
            steps = [lambda: self.answer(WEB), lambda: self.peer.runner.finish("a")]
            for step in steps if is_auth_first else reversed(steps):
                self.assertEqual(self.peer.quiet, [])
                step()
            self.assertEqual(self.peer.quiet, [False])

    def test_drained_meanwhile(self) -> None:
        """A session that drains meanwhile is hung up on after the answer."""
        for grant, gist in ((WEB, ["web"]), (None, ["unauthorized"])):
            self.peer = Conversation(grant=None)
            self.session = self.peer.session
            self.peer.ask("taskd.auth", "token")
            self.session.drain()
            self.assertEqual(self.peer.hang_ups, 0)
            self.answer(grant)
            self.assertEqual((self.peer.gist, self.peer.hang_ups), (gist, 1))

    def test_the_end_of_sending_meanwhile(self) -> None:
        """A peer that has sent all meanwhile gets the answer, and is hung up on."""
        for grant, gist in ((WEB, [(1, "web")]), (None, [(1, "unauthorized")])):
            self.peer = Conversation(grant=None)
            self.session = self.peer.session
            self.peer.ask("taskd.auth", "token", id=1)
            self.session.receive_end(False)
            self.assertEqual(self.peer.hang_ups, 0)
            self.answer(grant)
            self.assertEqual((self.peer.gist, self.peer.hang_ups), (gist, 1))

    def test_lost_meanwhile(self) -> None:
        """A peer that is lost meanwhile is answered nothing."""
        for grant in (WEB, None):
            self.peer = Conversation(grant=None)
            self.session = self.peer.session
            self.peer.ask("taskd.auth", "token")
            self.session.lost()
            self.answer(grant)
            self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))


class AllowedTests(SynchronousTestCase):
    """A caller that may not call everything."""

    def setUp(self) -> None:
        self.peer = Conversation(grant=WEB)

    def test_what_is_not_allowed(self) -> None:
        """A call that is not allowed is answered so, and the conversation goes on."""
        self.peer.ask("limited", "a", id=1)
        self.peer.ask("nowhere")
        self.peer.ask("now", "b")
        self.assertEqual(self.peer.gist, [(1, "unauthorized"), "unauthorized", "b"])
        message = self.peer.replies[0]["error"]["message"]
        self.assertEqual(message, "web may not call 'limited'; the daemon's --allow says so")
        self.assertEqual((self.peer.hang_ups, self.peer.runner.held), (0, {}))
        self.assertEqual(self.peer.refusals, [("limited", WEB), ("nowhere", WEB)])

    def test_the_order(self) -> None:
        """The answer without an id waits for its turn."""
        self.peer.ask("later", "a")
        self.peer.ask("limited", "b")
        self.assertEqual(self.peer.replies, [])
        self.peer.runner.finish("a")
        self.assertEqual(self.peer.gist, ["a", "unauthorized"])

    def test_who_shows_nothing(self) -> None:
        """Who shows nothing, and need not, is told so."""
        peer = Conversation(grant=Grant("", "", lambda name: False))
        peer.ask("now")
        (reply,) = peer.replies
        self.assertIn("whoever has not said who it is may not call", reply["error"]["message"])
        self.assertEqual(peer.hang_ups, 0)

    def test_a_name_without_end(self) -> None:
        """Of a long name only the beginning comes back, in ASCII."""
        self.peer.ask("é\x00" * 10_000)
        self.assertLess(len(self.peer.sent[0]), 400)
        self.assertTrue(self.peer.sent[0].isascii())

    def test_once_it_is_passed_on(self) -> None:
        """A connection that is to go is no way around that."""
        self.peer.session.pass_on()
        self.peer.ask("limited", "a")
        self.peer.ask("now", 1)
        self.assertEqual(self.peer.gist, ["unauthorized"])
        self.assertEqual([call.function.name for call in self.peer.runner.sent_on], ["now"])


FOREIGN: list[tuple[str, bytes, str]] = [
    ("a browser", b"GET / HTTP/1.1\r", "HTTP"),
    ("a browser that asks with a query", b"GET /?a=b%20c&d HTTP/1.1\r", "HTTP"),
    ("a form", b"POST /submit HTTP/1.1\r", "HTTP"),
    ("a preflight", b"OPTIONS / HTTP/1.1\r", "HTTP"),
    ("the server's options", b"OPTIONS * HTTP/1.1\r", "HTTP"),
    ("fetch() with a method of its own", b"DELETE /x HTTP/1.1\r", "HTTP"),
    ("a browser with a proxy", b"GET http://localhost:12345/ HTTP/1.1\r", "HTTP"),
    ("a browser with a proxy, over TLS", b"CONNECT localhost:12345 HTTP/1.1\r", "HTTP"),
    ("curl", b"HEAD / HTTP/1.1\r", "HTTP"),
    ("curl --http1.0", b"GET /index.html HTTP/1.0\r", "HTTP"),
    ("curl --http2-prior-knowledge", b"PRI * HTTP/2.0\r", "HTTP"),
    ("curl -X of anything", b"PROPFIND /dav HTTP/1.1\r", "HTTP"),
    ("fetch() with a method of any name", b"my-Method.1 /x HTTP/1.1\r", "HTTP"),
    ("a path with spaces", b"GET /a b HTTP/1.1\r", "HTTP"),
    ("HTTP/0.9", b"GET /", "HTTP"),
    ("without carriage returns", b"GET / HTTP/1.1", "HTTP"),
    ("a WebSocket", b"GET /chat HTTP/1.1\r", "HTTP"),
    ("a header", b"Host: localhost:12345\r", "HTTP"),
    ("another header", b"Content-Type: text/plain;charset=UTF-8\r", "HTTP"),
    ("a header in small letters", b"sec-fetch-mode: no-cors\r", "HTTP"),
    ("a browser over TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),
    ("a client that speaks TLS 1.0", b"\x16\x03\x00\x00", "TLS"),
]
"""Who comes to the wrong port, how they begin, and what that is."""

NEITHER: list[tuple[str, bytes]] = [
    ("SMTP", b"EHLO mail.example.org\r"),
    ("SMTP", b"MAIL FROM:<a@example.org>\r"),
    ("POP3", b"USER someone\r"),
    ("IMAP", b"a001 LOGIN someone secret\r"),
    ("Redis", b"*1\r"),
    ("Redis, by hand", b"PING\r"),
    ("memcached", b"get key\r"),
    ("memcached", b"set key 0 900 5\r"),
    ("SSH", b"SSH-2.0-OpenSSH_9.6\r"),
    ("PROXY", b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 12345\r"),
    ("a request that was cut", b'"function": "now"}'),
    ("a text", b"hello"),
    ("TLS of no record type", b"\x17\x03\x03\x00\x10"),
]
"""Who else comes there; nobody's browser does."""


class ForeignTests(SynchronousTestCase):
    """Who speaks something else."""

    def test_who_is_cut_off(self) -> None:
        """HTTP and TLS are cut off without an answer, and nothing behind is read."""
        for who, line, protocol in FOREIGN:
            for grant in (ANYTHING, None):
                peer = Conversation(grant=grant)
                peer.session.receive(line)
                peer.ask("taskd.auth", "guessed")
                peer.ask("now", "smuggled")
                peer.session.receive(line)
                self.assertEqual((peer.sent, peer.cut_offs), ([], [protocol]), who)
                self.assertEqual((peer.hang_ups, peer.questions), (0, []), who)

    def test_who_is_answered(self) -> None:
        """Whatever else is no request is answered, so that people see what is wrong."""
        for who, line in NEITHER:
            peer = Conversation()
            peer.session.receive(line)
            self.assertEqual((peer.gist, peer.cut_offs), (["malformed"], []), who)

    def test_requests(self) -> None:
        """No request is taken for something else, whatever is in it."""
        for _, line, _ in FOREIGN:
            peer = Conversation()
            peer.ask("now", line.decode("latin-1"))
            self.assertEqual(peer.replies, [line.decode("latin-1")])
            self.assertEqual(peer.cut_offs, [])

    def test_lines_that_do_not_end(self) -> None:
        """They are cut off as well where a line is too long, or takes too long."""
        for who, line, protocol in FOREIGN:
            for grant in (ANYTHING, None):
                peer = Conversation(grant=grant)
                peer.session.receive_too_much(1024, line)
                peer.session.turn_away(Overloaded("full"), line)
                self.assertEqual((peer.sent, peer.cut_offs), ([], [protocol]), who)
                peer = Conversation(grant=grant)
                peer.session.turn_away(Overloaded("full"), line)
                self.assertEqual((peer.sent, peer.cut_offs), ([], [protocol]), who)

    def test_later_lines(self) -> None:
        """It makes no difference what came before, unless something is owed: that is paid."""
        peer = Conversation()
        peer.ask("later", "a")
        peer.runner.finish("a")
        peer.session.receive(b"")
        peer.session.receive(b"GET / HTTP/1.1\r")
        self.assertEqual((peer.gist, peer.cut_offs, peer.hang_ups), (["a"], ["HTTP"], 0))
        self.assertFalse(peer.session.can_move)
        peer = Conversation()
        peer.ask("later", "a")
        peer.session.receive(b"GET / HTTP/1.1\r")
        self.assertEqual((peer.cut_offs, peer.hang_ups), ([], 0))
        peer.runner.finish("a")
        self.assertEqual((peer.gist, peer.hang_ups), (["a", "malformed"], 1))


class TurnAwayTests(SessionTestCase):
    def test_a_peer_that_may_not_stay(self) -> None:
        """A peer that is turned away is told why and hung up on, and its requests are not read."""
        self.session.turn_away(Overloaded("too many connections", retry_after=1.0))
        self.ask("now", "smuggled")
        (reply,) = self.peer.replies
        self.assertEqual(reply["error"]["code"], "overloaded")
        self.assertEqual(reply["error"]["retry_after"], 1.0)
        self.assertEqual(self.peer.hang_ups, 1)

    def test_what_is_owed_is_paid(self) -> None:
        """What is owed to it is paid first, and the answer waits for its turn."""
        self.ask("later", "a")
        self.session.turn_away(Overloaded("too many connections"))
        self.assertEqual((self.peer.replies, self.peer.hang_ups), ([], 0))
        self.runner.finish("a")
        self.assertEqual((self.peer.gist, self.peer.hang_ups), (["a", "overloaded"], 1))

    def test_once(self) -> None:
        """A peer whose conversation ends already is not turned away as well."""
        self.ask("later", "a")
        self.session.receive(b"rubbish")
        self.session.turn_away(Overloaded("too many connections"))
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, ["a", "malformed"])


class CancelTests(SessionTestCase):
    def test_cancel(self) -> None:
        """A cancelled call is answered so, its task is stopped, and the canceller is told."""
        self.ask("later", "a", id=1)
        self.ask("taskd.cancel", 1, id=2)
        self.assertEqual(self.peer.gist, [(1, "cancelled"), (2, True)])
        self.assertEqual(self.runner.abandoned, ["a"])

    def test_cancel_by_keyword(self) -> None:
        """The id to cancel may be given by name."""
        self.ask("later", "a", id="x")
        self.session.receive(b'{"function": "taskd.cancel", "args": {"id": "x"}}')
        self.assertEqual(self.peer.gist, [("x", "cancelled"), True])

    def test_cancel_of_nothing(self) -> None:
        """Cancelling what is not in flight, or no longer, finds nothing."""
        self.ask("later", "a", id=1)
        self.runner.finish("a")
        self.ask("taskd.cancel", 1)
        self.ask("taskd.cancel", 99)
        self.assertEqual(self.peer.gist, [(1, "a"), False, False])

    def test_ids_of_different_types_are_different(self) -> None:
        """The ids 1, true, "1" and 1.0 are four ids, and each cancels its own call."""
        ids = [1, True, "1", 1.0, [1], None]
        for number, id_ in enumerate(ids):
            self.ask("later", str(number), id=id_)
        for number, id_ in enumerate(ids):
            self.runner.abandoned.clear()
            self.ask("taskd.cancel", id_)
            self.assertEqual(self.runner.abandoned, [str(number)])

    def test_equal_ids_are_cancelled_together(self) -> None:
        """Every call under the id is cancelled."""
        for label in "abc":
            self.ask("later", label, id=[label == "b"])
        self.ask("taskd.cancel", [False])
        self.assertCountEqual(self.runner.abandoned, ["a", "c"])

    def test_calls_without_an_id_cannot_be_cancelled(self) -> None:
        """No id cancels a call that has none."""
        self.ask("later", "a")
        for id_ in ("", None):
            self.ask("taskd.cancel", id_, id=0)
        self.assertEqual(self.peer.gist, [(0, False), (0, False)])

    def test_cancel_keeps_the_order(self) -> None:
        """The answer to a cancel without an id waits for its turn."""
        self.ask("later", "a")
        self.ask("later", "b", id=1)
        self.ask("taskd.cancel", 1)
        self.assertEqual(self.peer.gist, [(1, "cancelled")])
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(1, "cancelled"), "a", True])

    def test_what_still_comes_from_a_cancelled_task(self) -> None:
        """A cancelled call is not answered again when its task is done."""
        self.ask("later", "a", id=1)
        self.session.cancel("", 1)
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(1, "cancelled"), True])


class RequestTests(SessionTestCase):
    def call(self, function: str, **members: Any) -> Call:
        self.ask(function, "a", **members)
        return self.runner.held["a"]

    def test_no_terms(self) -> None:
        """A call that names no terms has none, whatever its function's own limit is."""
        for function in ("later", "limited"):
            self.assertIs(self.call(function).terms, NO_TERMS)

    def test_the_callers_terms(self) -> None:
        """What a caller asks for is kept beside the function's own limit, whichever is shorter."""
        call = self.call("limited", timeout=500, priority=-3, cancel_on_disconnect=True)
        self.assertEqual(call.terms, Terms(500, False, -3, True))
        self.assertEqual(call.function.timeout, 30)
        self.assertEqual(self.call("limited", timeout=5).terms, Terms(timeout=5))

    def test_a_quick_function_with_terms_is_a_call(self) -> None:
        """A function that could be answered at once is started as a call if terms are named."""
        self.assertEqual(self.call("now", timeout=5).terms, Terms(timeout=5))
        self.assertEqual(self.call("now", priority=1).terms, Terms(priority=1))

    def test_progress_goes_to_who_asked(self) -> None:
        """Progress is written for a caller that asked for it."""
        call = self.call("later", id=1, progress=True)
        assert call.send_progress is not None
        call.send_progress(encode_progress("1", 1, 2, "half"))
        progress = {"done": 1, "total": 2, "message": "half"}
        self.assertEqual(self.peer.replies, [{"id": 1, "progress": progress}])

    def test_progress_that_nobody_asked_for(self) -> None:
        """There is nowhere to send progress to for a caller that did not ask."""
        self.assertIsNone(self.call("later", id=1).send_progress)
        self.assertIsNone(self.call("later", id=1, progress=False).send_progress)


_FUNCTIONS = ["now", "later", "nowhere", "taskd.cancel"]
_ENDS = ["finish", "fail", "cancel"]
_steps = st.one_of(
    st.tuples(st.sampled_from(_FUNCTIONS), st.booleans()),
    st.tuples(st.sampled_from(_ENDS), st.integers(0, 50)),
)


class PropertyTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(script=st.lists(_steps, max_size=40), dice=st.randoms(), breaks=st.booleans())
    def test_every_request_gets_one_reply(self, script: Any, dice: Any, breaks: bool) -> None:
        """However requests and ends mix, each request gets one reply, in order without an id."""
        peer = Conversation()
        asked: list[tuple[str, str, bool]] = []
        for what, detail in script:
            if what in _FUNCTIONS:
                label = f"{len(asked)}"
                arg = f"{len(asked) // 2}" if what == "taskd.cancel" else label
                asked.append((what, label, detail))
                peer.ask(what, arg, **({"id": label} if detail else {}))
            elif peer.runner.held:
                self._end(peer, what, detail)
        if breaks:
            peer.session.receive(b"rubbish")
            asked.append(("rubbish", "", False))
        peer.session.receive_end(False)
        while peer.runner.held:
            self.assertEqual(peer.hang_ups, 0 if peer.session.owes_replies else 1)
            self._end(peer, dice.choice(_ENDS), dice.randrange(50))
        self.assertEqual(peer.hang_ups, 1)

        bare = [reply for reply in peer.replies if not _has_id(reply)]
        by_id = {reply.pop("id"): reply for reply in peer.replies if _has_id(reply)}
        self.assertEqual(len(peer.sent), len(asked))
        self.assertEqual(by_id.keys(), {label for _, label, has_id in asked if has_id})
        for what, label, has_id in asked:
            body = by_id[label] if has_id else bare.pop(0)
            reply = body["result"] if has_id and "result" in body else body
            self.assertTrue(self._answers(reply, what, label), (reply, what, label))

    def _end(self, peer: Conversation, how: str, number: int) -> None:
        """End one of the calls that are held, by its number."""
        label = sorted(peer.runner.held)[number % len(peer.runner.held)]
        if how == "finish":
            peer.runner.finish(label)
        else:
            error = TaskFailed if how == "fail" else Cancelled
            peer.runner.held[label].fail(error(label))
        del peer.runner.held[label]

    def _answers(self, reply: Any, what: str, label: str) -> bool:
        error = reply["error"] if isinstance(reply, dict) else {"code": "", "message": ""}
        return {
            "now": reply == label,
            "later": label in (reply, error["message"]) or error["code"] == "cancelled",
            "nowhere": error["code"] == "unknown-function",
            "taskd.cancel": reply in (True, False),
            "rubbish": error["code"] == "malformed",
        }[what]


def _has_id(reply: Any) -> bool:
    return isinstance(reply, dict) and "id" in reply
