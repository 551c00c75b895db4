"""One peer's conversation: order, ids, limits, and its end."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.errors import Cancelled, TaskFailed, WorkerLost
from taskd.functions import Function, task
from taskd.session import Session
from taskd.wire import encode_progress, encode_result
from tests.support import line_of, registry_of


@task(blocking=False)
def now(value: Any = None) -> Any:
    """Give the value back at once."""
    return value


def later(label: str) -> None:
    """Stand for a task that goes on until the test ends it."""


@task(timeout=30)
def limited(label: str) -> None:
    """Stand for a task that has a time limit of its own."""


class HeldRunner:
    """Answers what is quick, and holds every other call until the test ends it."""

    def __init__(self) -> None:
        self.held: dict[str, Call] = {}
        self.abandoned: list[str] = []

    def call_now(
        self, function: Function, positional: list[Any], keywords: dict[str, Any], id_json: str
    ) -> bytes | Deferred[Any]:
        return encode_result(id_json, function.call(*positional, **keywords))

    def start(self, call: Call, pending: Deferred[Any] | None) -> None:
        label = call.positional[0]
        self.held[label] = call
        call.abandon = lambda: self.abandoned.append(label)

    def finish(self, label: str) -> None:
        """End a call with its label as the result."""
        call = self.held[label]
        call.end(encode_result(call.id_json, label))


class Conversation:
    """A session, and the test as its peer."""

    def __init__(self) -> None:
        self.runner = HeldRunner()
        self.sent: list[bytes] = []
        self.hang_ups = 0
        self.session = Session(
            registry_of(now, later, limited), self.runner, self.sent.append, self._hang_up
        )

    def _hang_up(self) -> None:
        self.hang_ups += 1

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
            b"POST / HTTP/1.1",
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
        self.session.cancel(1)
        self.runner.finish("a")
        self.assertEqual(self.peer.gist, [(1, "cancelled")])


class RequestTests(SessionTestCase):
    def call(self, function: str, **members: Any) -> Call:
        self.ask(function, "a", **members)
        return self.runner.held["a"]

    def test_no_limit(self) -> None:
        """A call that nobody limits has no limit."""
        self.assertIsNone(self.call("later").timeout)

    def test_the_callers_limit(self) -> None:
        """A caller's limit is kept for a task that has none."""
        self.assertEqual(self.call("later", timeout=5).timeout, 5)

    def test_the_shorter_limit_counts(self) -> None:
        """Of the task's limit and the caller's the shorter one is kept."""
        self.assertEqual(self.call("limited").timeout, 30)
        self.assertEqual(self.call("limited", timeout=5).timeout, 5)
        self.assertEqual(self.call("limited", timeout=500).timeout, 30)

    def test_a_quick_function_with_a_limit_is_a_call(self) -> None:
        """A function that could be answered at once is started as a call if it is limited."""
        self.assertEqual(self.call("now", timeout=5).timeout, 5)

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
