"""One browser's conversation: order, limits, who it is, and its ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import Grant, digest_of
from taskd.errors import ConnectFailed, ConnectionLost, Overloaded, TaskFailed, UnknownFunction
from taskd.gateway.backend import Backend
from taskd.gateway.conversation import (
    GOING_AWAY,
    POLICY,
    RESTART,
    UNAUTHORIZED,
    Conversation,
    Limits,
)
from tests.support import Loop, log_of
from tests.test_gateway_site import new_figures

ANYTHING = Grant("")
TOKEN = "web's token 0123"
WEB = Grant("web", digest_of(TOKEN), lambda name: name != "secret")


class HeldCall:
    """
    A call that the conversation has made, which the test ends.

    Attributes:
        token: Whose connections it took.
        name: The function.
        args: Its arguments.
        terms: All else that was asked for.
        is_cancelled: Whether the conversation has taken it back.
    """

    def __init__(self, token: str | None, name: str, args: Any, terms: dict[str, Any]) -> None:
        self.token = token
        self.name = name
        self.args = args
        self.terms = terms
        self.is_cancelled = False
        self.ended: Deferred[Any] = Deferred(self._cancel)

    def _cancel(self, _: object) -> None:
        self.is_cancelled = True

    @property
    def label(self) -> Any:
        return self.args[0]


class HeldClient:
    """Connections on which every call goes on until the test ends it."""

    unsent_bytes = 0

    def __init__(self, calls: list[HeldCall], token: str | None) -> None:
        self._calls = calls
        self._token = token

    def call_with(self, function: str, args: Any, **terms: Any) -> Deferred[Any]:
        call = HeldCall(self._token, function, args, terms)
        self._calls.append(call)
        return call.ended

    def close(self) -> Deferred[None]:
        return succeed(None)


class Browser:
    """
    A conversation, and the test as its browser and as the daemon.

    Attributes:
        replies: What was sent, but for progress.
        reports: The progress that was sent.
        hang_ups: The codes and reasons that it was closed with.
        questions: The tokens that were shown, and what takes the answer.
        refusals: What was called and not allowed.
        calls: The calls that were made, by way of whichever connections.
    """

    def __init__(
        self,
        grant: Grant | None = ANYTHING,
        *,
        max_in_flight: int = 100,
        max_rate: float = 1e6,
        max_calls: int = 1000,
        token: str = "",
    ) -> None:
        self.loop = Loop()
        self.calls: list[HeldCall] = []
        self.replies: list[Any] = []
        self.reports: list[Any] = []
        self.hang_ups: list[tuple[int, str]] = []
        self.questions: list[tuple[str, Callable[[Grant | None], None]]] = []
        self.refusals: list[tuple[str, Grant | None]] = []
        self.figures = new_figures()
        self.tenants: list[Any] = []
        self.backend = Backend(
            self.loop,
            self._connect,
            None,
            passes_on=True,
            max_calls=max_calls,
            figures=self.figures,
        )
        self.conversation = Conversation(
            self,
            self.backend,
            Limits(max_in_flight, max_rate),
            self.figures,
            self.loop.seconds,
            "192.0.2.1",
            grant,
            token,
        )

    def _connect(self, token: str | None) -> Any:
        return HeldClient(self.calls, token)

    # What the conversation tells.

    def send(self, message: bytes) -> None:
        assert not self.hang_ups, message
        assert not message.endswith(b"\n")
        self.replies.append(json.loads(message))

    def report(self, message: bytes) -> None:
        assert not self.hang_ups, message
        self.reports.append(json.loads(message))

    def hang_up(self, code: int, reason: str) -> None:
        self.hang_ups.append((code, reason))

    def identify(self, token: str, done: Callable[[Grant | None], None]) -> None:
        self.questions.append((token, done))

    def turned_down(self, name: str, grant: Grant | None) -> None:
        self.refusals.append((name, grant))

    # What the browser and the daemon do.

    def ask(self, function: str, *args: Any, **members: Any) -> None:
        message = {"function": function, "args": args, **members}
        self.conversation.receive(json.dumps(message).encode())

    def auth(self, token: str = TOKEN, **members: Any) -> None:
        self.ask("taskd.auth", token, **members)

    def identified(self, grant: Grant | None) -> None:
        self.questions.pop(0)[1](grant)

    def pending(self) -> list[HeldCall]:
        return [call for call in self.calls if not call.ended.called]

    def call(self, label: Any) -> HeldCall:
        (call,) = [call for call in self.pending() if call.label == label]
        return call

    def finish(self, label: Any) -> None:
        self.call(label).ended.callback(label)

    def fail(self, label: Any, error: Exception) -> None:
        self.call(label).ended.errback(Failure(error))

    @property
    def gist(self) -> list[Any]:
        """The replies, each error by its code alone."""
        return [_gist(reply) for reply in self.replies]

    def figure(self, name: str) -> int:
        return self.figures.get(name)

    @property
    def visitors(self) -> int:
        """How many are at all tenants together."""
        return sum(tenant.visitors for tenant in self.backend._tenants.values())


def _gist(reply: Any) -> Any:
    if isinstance(reply, dict) and "error" in reply:
        code = reply["error"]["code"]
        return (reply["id"], code) if "id" in reply else code
    return (reply["id"], reply["result"]) if isinstance(reply, dict) else reply


class ConversationTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.log = log_of(self, "gateway")
        self.meet()

    def meet(self, *args: Any, **keywords: Any) -> Browser:
        self.browser = Browser(*args, **keywords)
        self.conversation = self.browser.conversation
        self.ask = self.browser.ask
        self.finish = self.browser.finish
        return self.browser

    def assertGist(self, *expected: Any) -> None:
        self.assertEqual(self.browser.gist, list(expected))


class OrderTests(ConversationTestCase):
    def test_without_ids(self) -> None:
        """Replies without an id come in the order of the requests."""
        for label in "abc":
            self.ask("f", label)
        self.finish("c")
        self.assertGist()
        self.finish("a")
        self.assertGist("a")
        self.finish("b")
        self.assertGist("a", "b", "c")

    def test_with_ids(self) -> None:
        """Replies with an id come when they are ready, past those without."""
        self.ask("f", "a")
        self.ask("f", "b", id=1)
        self.ask("f", "c", id={"x": [1]})
        self.finish("c")
        self.finish("b")
        self.finish("a")
        self.assertEqual(
            self.browser.replies,
            [{"id": {"x": [1]}, "result": "c"}, {"id": 1, "result": "b"}, "a"],
        )

    def test_refusals_keep_the_order(self) -> None:
        """What is refused without an id waits for its turn, too."""
        self.meet(WEB)
        self.ask("f", "a")
        self.ask("secret")
        self.ask("f", "b", priority=1)
        self.ask("taskd.cancel", 7)
        self.ask("f", "c")
        self.assertGist()
        self.finish("c")
        self.finish("a")
        self.assertGist("a", "unauthorized", "unauthorized", False, "c")

    def test_refusals_with_ids(self) -> None:
        """What is refused with an id is told at once."""
        self.ask("f", "a")
        self.ask("f", "b", priority=1, id=2)
        self.assertGist((2, "unauthorized"))

    def test_failures(self) -> None:
        """A failure is told as on the wire, and no other ends by it."""
        self.ask("f", "a", id=1)
        self.ask("f", "b", id=2)
        self.browser.fail("a", TaskFailed("it broke", type="ValueError"))
        self.assertEqual(
            self.browser.replies,
            [
                {
                    "id": 1,
                    "error": {
                        "code": "task-failed",
                        "message": "it broke",
                        "retryable": False,
                        "type": "ValueError",
                    },
                }
            ],
        )
        self.finish("b")
        self.assertEqual(self.browser.figure("failed"), 1)
        self.assertEqual(self.browser.hang_ups, [])

    def test_what_the_call_is(self) -> None:
        """The function, its arguments and what else was asked for go to the daemon."""
        self.ask("f", 1, "é", timeout=2.5, priority=-3, cancel_on_disconnect=True)
        self.conversation.receive(b'{"function": "g", "args": {"from": 1}}')
        first, second = self.browser.calls
        self.assertEqual((first.name, first.args, first.token), ("f", [1, "é"], None))
        self.assertEqual(
            first.terms,
            {
                "timeout": 2.5,
                "on_progress": None,
                "priority": -3,
                "cancel_on_disconnect": True,
            },
        )
        self.assertEqual((second.args, second.terms["priority"]), ({"from": 1}, 0))
        self.assertIsNone(second.terms["timeout"])

    def test_a_lost_daemon(self) -> None:
        """What a call fails with on the gateway's side is told without where that is."""
        self.ask("f", "a", id=1)
        self.ask("f", "b", id=2)
        self.browser.fail("a", ConnectFailed("tcp:10.0.0.7:12345"))
        self.browser.fail("b", ConnectionLost("tcp:10.0.0.7:12345"))
        self.assertGist((1, "worker-lost"), (2, "worker-lost"))
        self.assertNotIn("10.0.0.7", json.dumps(self.browser.replies))

    def test_keep_alive(self) -> None:
        """An empty message is not answered, and no call."""
        for _ in range(5):
            self.conversation.receive(b"")
        self.assertGist()
        self.assertEqual((self.browser.calls, self.browser.figure("messages")), ([], 0))


class LimitTests(ConversationTestCase):
    def test_in_flight(self) -> None:
        """So many calls may be in flight; the next is refused, until one of them has ended."""
        self.meet(max_in_flight=2)
        for label in "abc":
            self.ask("f", label, id=label)
        self.assertGist(("c", "overloaded"))
        self.assertEqual(self.browser.replies[0]["error"]["retry_after"], 0.5)
        self.assertEqual(self.browser.figure("refused_room"), 1)
        self.finish("b")
        self.ask("f", "d", id="d")
        self.ask("f", "e", id="e")
        self.assertGist(("c", "overloaded"), ("b", "b"), ("e", "overloaded"))
        self.assertEqual(self.browser.figure("in_flight"), 2)

    def test_what_waits_for_its_turn(self) -> None:
        """Answers that wait for their turn take the room of calls."""
        self.meet(max_in_flight=2)
        self.ask("f", "a")
        self.ask("f", "b")
        self.finish("b")
        self.ask("f", "c", id=1)
        self.assertGist((1, "overloaded"))
        self.finish("a")
        self.ask("f", "c", id=2)
        self.assertEqual([call.label for call in self.browser.pending()], ["c"])

    def test_a_rate(self) -> None:
        """Who is too quick is refused, and told how long to wait."""
        self.meet(max_rate=2.0)
        for number in range(5):
            self.ask("f", number, id=number)
        self.assertGist((4, "overloaded"))
        self.assertEqual(self.browser.replies[0]["error"]["retry_after"], 0.5)
        self.assertEqual(self.browser.figure("refused_rate"), 1)
        self.browser.loop.advance(1.0)
        self.ask("f", 5, id=5)
        self.assertEqual(len(self.browser.calls), 5)

    def test_out_of_patience(self) -> None:
        """Who goes on although refused is answered once more, and hung up on after the rest."""
        self.meet(max_rate=2.0)
        for number in range(20):
            self.ask("f", number, id=number)
        self.assertGist(*((number, "overloaded") for number in range(4, 9)))
        self.assertEqual(self.browser.hang_ups, [])
        for number in range(4):
            self.finish(number)
        self.assertEqual(self.browser.gist[5:], [(n, n) for n in range(4)])
        self.assertEqual(self.browser.hang_ups, [(POLICY, "overloaded")])

    def test_cancelling_counts(self) -> None:
        """All messages count, whatever they ask for."""
        self.meet(max_rate=1.0)
        for _ in range(3):
            self.ask("taskd.cancel", 1, id=0)
        self.assertGist((0, False), (0, False), (0, "overloaded"))

    def test_too_many_keep_alives(self) -> None:
        """Keep-alives that come too quickly are not answered; with a flood patience ends."""
        self.meet(max_rate=2.0)
        for _ in range(8):
            self.conversation.receive(b"")
        self.assertEqual((self.browser.replies, self.browser.hang_ups), ([], []))
        self.conversation.receive(b"")
        self.assertGist("overloaded")
        self.assertEqual(self.browser.hang_ups, [(POLICY, "overloaded")])

    def test_priority(self) -> None:
        """A browser may step back and not push ahead."""
        for priority, is_taken in ((-5, True), (0, True), (1, False), (10**9, False)):
            before = len(self.browser.calls)
            self.ask("f", "a", priority=priority, id=priority)
            self.assertIs(len(self.browser.calls) > before, is_taken)
        self.assertGist((1, "unauthorized"), (10**9, "unauthorized"))


class MalformedTests(ConversationTestCase):
    def test_it_is_answered(self) -> None:
        """What is no request is answered, with its id if it has one, and the end of it all."""
        for message, expected in (
            (b"x", "malformed"),
            (b"[]", "malformed"),
            (b"\xff", "malformed"),
            (b"{}", "malformed"),
            (b'{"id": 3}', (3, "malformed")),
            (b'{"function": "f", "id": 4, "args": 1}', (4, "malformed")),
            (b'{"function": "f", "progress": true}', "malformed"),
            (b'{"function": "f", "function": "f"}', "malformed"),
            (b'{"function": "f"}\n{"function": "f"}', "malformed"),
            (b"GET / HTTP/1.1", "malformed"),
        ):
            self.meet()
            self.conversation.receive(message)
            self.assertGist(expected)
            self.assertEqual(self.browser.hang_ups, [(POLICY, "malformed")])
            self.ask("f", "a")
            self.assertGist(expected)
            self.assertEqual(self.browser.calls, [])

    def test_what_is_in_flight(self) -> None:
        """All that was asked before it is answered first, in its order."""
        self.ask("f", "a")
        self.ask("f", "b", id=1)
        self.conversation.receive(b"x")
        self.ask("f", "c", id=2)
        self.assertEqual((self.browser.replies, self.browser.hang_ups), ([], []))
        self.finish("a")
        self.assertGist("a", "malformed")
        self.assertEqual(self.browser.hang_ups, [])
        self.finish("b")
        self.assertGist("a", "malformed", (1, "b"))
        self.assertEqual(self.browser.hang_ups, [(POLICY, "malformed")])


class AuthTests(ConversationTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.meet(None)

    def test_a_stranger(self) -> None:
        """Who calls something before it has said who it is is told so, and hung up on."""
        for name in ("f", "taskd.ping", "taskd.cancel"):
            self.meet(None)
            self.ask(name, 1, id=1)
            self.assertGist((1, "unauthorized"))
            self.assertEqual(self.browser.hang_ups, [(UNAUTHORIZED, "unauthorized")])
            self.assertEqual(self.browser.refusals, [(name, None)])
            self.assertEqual(self.browser.calls, [])
            self.assertEqual(self.browser.figure("refused_identity"), 1)

    def test_the_right_token(self) -> None:
        """The right token is answered with whose it is, and its connections are taken."""
        self.assertFalse(self.conversation.is_known)
        self.browser.auth(id=1)
        self.assertEqual(self.browser.questions[0][0], TOKEN)
        self.assertGist()
        self.browser.identified(WEB)
        self.assertGist((1, "web"))
        self.assertTrue(self.conversation.is_known)
        self.ask("f", "a")
        self.assertEqual(self.browser.call("a").token, TOKEN)
        self.assertEqual(self.browser.visitors, 1)

    def test_nobodys_name(self) -> None:
        """An identity without a name is null."""
        self.browser.auth(id=1)
        self.browser.identified(ANYTHING)
        self.assertGist((1, None))

    def test_what_comes_meanwhile(self) -> None:
        """Messages that come before the answer wait, and keep their order."""
        self.browser.auth()
        self.ask("f", "a")
        self.ask("secret")
        self.ask("f", "b", id=1)
        self.conversation.receive(b"")
        self.assertEqual(self.browser.calls, [])
        self.browser.identified(WEB)
        self.assertGist("web")
        self.assertEqual([call.label for call in self.browser.calls], ["a", "b"])
        self.finish("b")
        self.finish("a")
        self.assertGist("web", (1, "b"), "a", "unauthorized")

    def test_two_at_once(self) -> None:
        """A second token waits for the first, and what is behind it for both."""
        self.browser.auth(id=1)
        self.browser.auth("other", id=2)
        self.ask("f", "a")
        self.assertEqual(len(self.browser.questions), 1)
        self.browser.identified(WEB)
        self.assertEqual([token for token, _ in self.browser.questions], ["other"])
        self.assertEqual(self.browser.calls, [])
        self.browser.identified(Grant("ops", digest_of("other")))
        self.assertGist((1, "web"), (2, "ops"))
        self.assertEqual(self.browser.call("a").token, "other")

    def test_a_wrong_token(self) -> None:
        """A wrong token is answered, and hung up on; what came behind it is never looked at."""
        self.browser.auth("wrong", id=1)
        self.ask("f", "a")
        self.browser.auth(id=2)
        self.browser.identified(None)
        self.assertGist((1, "unauthorized"))
        self.assertEqual(self.browser.hang_ups, [(UNAUTHORIZED, "unauthorized")])
        self.assertEqual((self.browser.calls, self.browser.questions), ([], []))
        self.assertNotIn("wrong", json.dumps(self.browser.replies))

    def test_a_wrong_token_of_somebody_known(self) -> None:
        """Who is known and shows a wrong token then gets its answers, and is hung up on."""
        self.meet(WEB)
        self.ask("f", "a", id=1)
        self.browser.auth("wrong", id=2)
        self.browser.identified(None)
        self.assertGist((2, "unauthorized"))
        self.assertEqual(self.browser.hang_ups, [])
        self.finish("a")
        self.assertEqual(self.browser.hang_ups, [(UNAUTHORIZED, "unauthorized")])

    def test_an_answer_in_its_turn(self) -> None:
        """Who is known and shows another token is answered in its turn."""
        self.meet(WEB)
        self.ask("f", "a")
        self.browser.auth()
        self.browser.identified(Grant("ops", digest_of("other")))
        self.assertGist()
        self.finish("a")
        self.assertGist("a", "ops")

    def test_calls_of_before(self) -> None:
        """A call goes on over the connections that it took, whoever its caller is by now."""
        self.meet(WEB, token=TOKEN)
        self.ask("f", "a")
        self.browser.auth("other")
        self.browser.identified(Grant("ops", digest_of("other")))
        self.ask("f", "b")
        self.assertEqual([call.token for call in self.browser.calls], [TOKEN, "other"])

    def test_where_nobody_is_asked(self) -> None:
        """A token that was not looked at is answered with null, and goes nowhere."""
        self.meet(ANYTHING)
        self.browser.auth("other", id=1)
        self.browser.identified(ANYTHING)
        self.ask("f", "a")
        self.assertGist((1, None))
        self.assertIsNone(self.browser.call("a").token)

    def test_a_stranger_has_one_say(self) -> None:
        """Who is not known yet is hung up on after any error."""
        self.meet(None)
        self.ask("taskd.auth", id=1)
        self.assertGist((1, "bad-arguments"))
        self.assertEqual(self.browser.hang_ups, [(UNAUTHORIZED, "bad-arguments")])

    def test_answers_that_wait(self) -> None:
        """Behind a call without an id so many answers wait, and then it is over."""
        self.meet(max_rate=1e6)
        self.ask("f", "a")
        for _ in range(5000):
            self.ask("taskd.cancel", 7)
        self.assertEqual(self.browser.hang_ups, [])
        self.finish("a")
        self.assertEqual(self.browser.hang_ups[0][0], POLICY)
        self.assertLess(len(self.browser.replies), 1500)

    def test_what_is_no_token(self) -> None:
        """A token is one string."""
        self.meet(WEB)
        for args in ([], [1], [None], ["a", "b"], [["a"]], {"x": "a"}, {"token": "a", "x": 1}, {}):
            self.ask("taskd.auth", id=1)
            self.conversation.receive(
                json.dumps({"function": "taskd.auth", "args": args, "id": 1}).encode()
            )
        self.assertEqual({str(gist) for gist in self.browser.gist}, {"(1, 'bad-arguments')"})
        self.assertEqual((self.browser.questions, self.browser.hang_ups), ([], []))
        self.conversation.receive(b'{"function": "taskd.auth", "args": {"token": "a"}}')
        self.assertEqual(self.browser.questions[0][0], "a")

    def test_who_has_gone_meanwhile(self) -> None:
        """Who has gone before the answer gets none, and nothing of it stays."""
        self.browser.auth()
        self.ask("f", "a")
        self.conversation.lost()
        self.browser.identified(WEB)
        self.assertGist()
        self.assertEqual((self.browser.calls, self.browser.visitors), ([], 0))

    def test_a_stop_meanwhile(self) -> None:
        """A stop waits for the answer; what came behind it is answered as stopping."""
        self.browser.auth(id=1)
        self.ask("f", "a", id=2)
        self.conversation.drain()
        self.assertEqual(self.browser.hang_ups, [])
        self.browser.identified(WEB)
        self.assertGist((1, "web"), (2, "shutting-down"))
        self.assertEqual([code for code, _ in self.browser.hang_ups], [RESTART])


class AllowedTests(ConversationTestCase):
    def test_what_is_not_allowed(self) -> None:
        """What a grant does not allow is refused, and the conversation goes on."""
        self.meet(WEB)
        self.ask("secret", id=1)
        self.ask("f", "a", id=2)
        self.finish("a")
        self.assertGist((1, "unauthorized"), (2, "a"))
        self.assertIn("web may not call 'secret'", self.browser.replies[0]["error"]["message"])
        self.assertEqual(self.browser.refusals, [("secret", WEB)])
        self.assertEqual(self.browser.hang_ups, [])

    def test_a_long_name(self) -> None:
        """Of a name that is not allowed an end is told, in ASCII."""
        self.meet(Grant("", may_call=lambda name: False))
        self.ask("é" * 10_000, id=1)
        message = self.browser.replies[0]["error"]["message"]
        self.assertLess(len(message), 300)
        self.assertTrue(message.isascii())
        self.assertTrue(message.startswith("a browser that shows no token may not call"))


class ProgressTests(ConversationTestCase):
    def test_reports(self) -> None:
        """Who asks for progress gets it, under its id."""
        self.ask("f", "a", id=1, progress=True)
        self.ask("f", "b", id=2)
        tell = self.browser.call("a").terms["on_progress"]
        tell(1, 2.5, "é")
        tell(2, None, None)
        self.assertEqual(
            self.browser.reports,
            [
                {"id": 1, "progress": {"done": 1, "total": 2.5, "message": "é"}},
                {"id": 1, "progress": {"done": 2, "total": None, "message": None}},
            ],
        )
        self.assertIsNone(self.browser.call("b").terms["on_progress"])

    def test_who_has_gone(self) -> None:
        """Who has gone gets none."""
        self.ask("f", "a", id=1, progress=True)
        self.conversation.lost()
        self.browser.call("a").terms["on_progress"](1, 2, None)
        self.assertEqual(self.browser.reports, [])


class CancelTests(ConversationTestCase):
    def test_one_call(self) -> None:
        """A call is cancelled by its id, and both are answered."""
        self.ask("f", "a", id=1)
        self.ask("f", "b", id=2)
        self.ask("taskd.cancel", 1, id=3)
        self.assertCountEqual(self.browser.gist, [(1, "cancelled"), (3, True)])
        self.assertTrue(self.browser.calls[0].is_cancelled)
        self.finish("b")
        self.assertEqual(self.browser.gist[-1], (2, "b"))
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_nothing(self) -> None:
        """What is not in flight cannot be cancelled, nor what has no id."""
        self.ask("f", "a")
        self.ask("f", "b", id=1)
        self.finish("b")
        for wanted in (1, "1", None, 2, [1], ""):
            self.ask("taskd.cancel", wanted, id=9)
        self.assertEqual(self.browser.gist[1:], [(9, False)] * 6)
        self.assertFalse(any(call.is_cancelled for call in self.browser.calls))

    def test_ids_of_all_kinds(self) -> None:
        """An id is known by its value, whatever JSON it is, and however it is written."""
        for id_ in (0, "é", None, [1, {"a": 2}], {"x": "/"}, -1.5, True, 10**30):
            self.meet()
            self.ask("f", "a", id=id_)
            self.conversation.receive(
                b'{"function":"taskd.cancel","args":{"id" :  %b},"id":"c"}'
                % json.dumps(id_).encode()
            )
            self.assertTrue(self.browser.calls[0].is_cancelled, id_)

    def test_several_of_one_id(self) -> None:
        """All that have the id are cancelled."""
        for label in "ab":
            self.ask("f", label, id=1)
        self.ask("taskd.cancel", 1, id=2)
        self.assertCountEqual(self.browser.gist, [(1, "cancelled"), (1, "cancelled"), (2, True)])
        self.assertEqual(self.browser.figure("in_flight"), 0)

    def test_wrong_arguments(self) -> None:
        """It takes one argument."""
        self.ask("taskd.cancel", id=1)
        self.ask("taskd.cancel", 1, 2, id=2)
        self.assertGist((1, "bad-arguments"), (2, "bad-arguments"))

    def test_at_a_stop(self) -> None:
        """Who cancels its last call while the gateway stops hears of both."""
        self.ask("f", "a", id=1)
        self.conversation.drain()
        self.ask("taskd.cancel", 1, id=2)
        self.assertCountEqual(self.browser.gist, [(1, "cancelled"), (2, True)])
        self.assertEqual(len(self.browser.hang_ups), 1)


class EndTests(ConversationTestCase):
    def test_who_goes(self) -> None:
        """Tasks go on whose caller has gone, but for those that were to end with it."""
        self.ask("f", "a", id=1)
        self.ask("f", "b", id=2, cancel_on_disconnect=True)
        self.ask("f", "c", cancel_on_disconnect=True)
        self.conversation.lost()
        cancelled = [call.label for call in self.browser.calls if call.is_cancelled]
        self.assertEqual(cancelled, ["b", "c"])
        self.finish("a")
        self.assertGist()
        self.assertEqual(self.browser.hang_ups, [])
        self.assertEqual((self.browser.figure("in_flight"), self.browser.visitors), (0, 0))

    def test_what_is_logged_of_that(self) -> None:
        """That a caller has gone is no failure: nothing is logged of it, nor counted."""
        self.ask("f", "a", cancel_on_disconnect=True)
        self.ask("f", "b")
        self.conversation.lost()
        self.browser.fail("b", ConnectFailed("nobody there"))
        self.assertEqual((self.log, self.flushLoggedErrors()), ([], []))
        self.assertEqual(self.browser.figure("failed"), 0)

    def test_a_stop_with_nothing_in_flight(self) -> None:
        """At a stop who has nothing in flight is hung up on, so that it comes back elsewhere."""
        self.conversation.drain()
        self.assertEqual(self.browser.hang_ups, [(RESTART, "the gateway is stopping")])
        self.ask("f", "a")
        self.assertEqual((self.browser.replies, self.browser.calls), ([], []))

    def test_a_stop(self) -> None:
        """At a stop nothing more is started; what is in flight is answered, then it ends."""
        self.ask("f", "a")
        self.ask("f", "b", id=1)
        self.conversation.drain()
        self.ask("f", "c", id=2)
        self.ask("f", "d")
        self.assertGist((2, "shutting-down"))
        self.finish("a")
        self.assertGist((2, "shutting-down"), "a", "shutting-down")
        self.assertEqual(self.browser.hang_ups, [])
        self.finish("b")
        self.assertEqual(len(self.browser.hang_ups), 1)
        self.assertEqual([call.label for call in self.browser.calls], ["a", "b"])

    def test_a_stop_and_a_mistake(self) -> None:
        """Who makes a mistake is hung up on for it, also while the gateway stops, and once."""
        self.ask("f", "a", id=1)
        self.conversation.receive(b"x")
        self.conversation.drain()
        self.conversation.drain()
        self.finish("a")
        self.assertEqual(self.browser.hang_ups, [(POLICY, "malformed")])

    def test_a_failed_call_at_a_stop(self) -> None:
        """A last call that fails ends it as well."""
        self.ask("f", "a", id=1)
        self.conversation.drain()
        self.browser.fail("a", UnknownFunction("no f"))
        self.assertEqual(
            (self.browser.gist, len(self.browser.hang_ups)), ([(1, "unknown-function")], 1)
        )

    def test_codes(self) -> None:
        """Codes are those that browsers know, and one of ours."""
        self.assertEqual((GOING_AWAY, POLICY, RESTART), (1001, 1008, 1012))
        self.assertGreaterEqual(UNAUTHORIZED, 4000)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.booleans(), st.booleans()),
        st.tuples(st.just("ask"), st.booleans(), st.booleans()),
        st.tuples(st.sampled_from(["secret", "push", "auth", "keep"]), st.booleans()),
        st.tuples(st.just("bad")),
        st.tuples(st.just("cancel"), st.booleans(), st.integers(0, 9)),
        st.tuples(st.sampled_from(["finish", "fail", "lose", "tell"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["right", "right", "wrong"])),
        st.tuples(st.just("wait"), st.floats(0, 3)),
        st.tuples(st.sampled_from(["drain", "lost"])),
    ),
    max_size=40,
)


class Schedule:
    """
    One conversation under a schedule.

    Attributes:
        asked: The ids of all that was asked, in order; None: it has none.
        asked_until_the_end: How much of it was when it was hung up on, or None.
    """

    def __init__(self, is_known: bool, max_in_flight: int, max_rate: float) -> None:
        self.browser = Browser(
            WEB if is_known else None, max_in_flight=max_in_flight, max_rate=max_rate
        )
        self.conversation = self.browser.conversation
        self.asked: list[int | None] = []
        self.asked_until_the_end: int | None = None
        self.order: list[str] = []
        self.is_lost = False

    def members(self, has_id: bool) -> dict[str, Any]:
        self.asked.append(len(self.asked) if has_id else None)
        return {"id": self.asked[-1]} if has_id else {}

    def ask(self, has_id: bool, ends: bool) -> None:
        label = f"{len(self.asked)}"
        if not has_id:
            self.order.append(label)
        self.browser.ask("f", label, cancel_on_disconnect=ends, **self.members(has_id))

    def secret(self, has_id: bool) -> None:
        self.browser.ask("secret", **self.members(has_id))

    def push(self, has_id: bool) -> None:
        self.browser.ask("f", "pushed", priority=1, **self.members(has_id))

    def auth(self, has_id: bool) -> None:
        self.browser.auth(**self.members(has_id))

    def keep(self, _: bool) -> None:
        before = self.browser.figure("refused_rate")
        self.conversation.receive(b"")
        if self.browser.figure("refused_rate") > before:  # which is the end, and answered
            self.asked.append(None)

    def bad(self) -> None:
        self.asked.append(None)
        self.conversation.receive(b"{")

    def cancel(self, has_id: bool, which: int) -> None:
        self.browser.ask("taskd.cancel", which, **self.members(has_id))

    def _pick(self, which: int) -> HeldCall | None:
        pending = self.browser.pending()
        return pending[which % len(pending)] if pending else None

    def finish(self, which: int) -> None:
        if call := self._pick(which):
            call.ended.callback(call.label)

    def fail(self, which: int) -> None:
        if call := self._pick(which):
            call.ended.errback(Failure(Overloaded("no")))

    def lose(self, which: int) -> None:
        if call := self._pick(which):
            call.ended.errback(Failure(ConnectionLost("gone")))

    def tell(self, which: int) -> None:
        call = self._pick(which)
        if call and call.terms["on_progress"]:
            call.terms["on_progress"](1, None, None)

    def right(self) -> None:
        if self.browser.questions:
            self.browser.identified(WEB)

    def wrong(self) -> None:
        if self.browser.questions:
            self.browser.identified(None)

    def wait(self, seconds: float) -> None:
        self.browser.loop.advance(seconds)

    def drain(self) -> None:
        self.conversation.drain()

    def lost(self) -> None:
        self.is_lost = True
        self.conversation.lost()


class ScheduleTests(SynchronousTestCase):
    @settings(max_examples=400, deadline=None)
    @given(
        steps,
        st.booleans(),
        st.sampled_from([1, 2, 5, 100]),
        st.sampled_from([1.0, 10.0, 1e6]),
    )
    def test_whatever_happens(
        self, steps: list[Any], is_known: bool, max_in_flight: int, max_rate: float
    ) -> None:
        """
        Whatever happens, in whatever order:

        what is asked is answered once, in its order if it has no id, unless the
        browser has gone, or was hung up on for something that came before; and
        when all is over nothing is left in flight.
        """
        run = Schedule(is_known, max_in_flight, max_rate)
        browser = run.browser
        for name, *args in steps:
            if run.is_lost and name not in ("finish", "fail", "lose", "tell", "right", "wrong"):
                continue
            if browser.hang_ups and name == "keep":
                continue
            getattr(run, name)(*args)
            if not browser.hang_ups or run.asked_until_the_end is None:
                run.asked_until_the_end = len(run.asked) if browser.hang_ups else None
            self.assertLessEqual(browser.figure("in_flight"), max_in_flight)
            self.assertEqual(browser.visitors, 0 if run.is_lost else 1)
            if not run.is_lost:
                self.assertEqual(browser.figure("in_flight"), len(browser.pending()))
        while browser.questions or browser.pending():
            run.right()
            run.finish(0)
        if not run.is_lost:
            self._check_answers(run)
            run.lost()
        self.assertEqual((browser.figure("in_flight"), browser.visitors), (0, 0))
        self.assertLessEqual(len(browser.hang_ups), 1)
        self.assertEqual(self.flushLoggedErrors(), [])

    def _check_answers(self, run: Schedule) -> None:
        gist = run.browser.gist
        ids = sorted(each[0] for each in gist if isinstance(each, tuple))
        without = [each for each in gist if not isinstance(each, tuple)]
        # All up to what it was hung up on for, and nothing behind it.
        answered = run.asked[: len(gist)] if run.browser.hang_ups else run.asked
        if run.browser.hang_ups and run.browser.hang_ups[0][0] == RESTART:
            until = run.asked_until_the_end
            self.assertEqual(len(gist), len(run.asked) if until is None else until)
        self.assertEqual(ids, [id_ for id_ in answered if id_ is not None])
        self.assertEqual(len(without), answered.count(None))
        labels = [each for each in without if each in run.order]
        self.assertEqual(labels, sorted(labels, key=int))
