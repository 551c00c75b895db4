"""The caller's side: one connection, a pool of them, and one call."""

from __future__ import annotations

import json
from typing import Any

from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectError, ConnectionAborted, ConnectionDone
from twisted.internet.error import ConnectionLost as TwistedConnectionLost
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from taskd import errors
from taskd.balance import MOST_SENDS
from taskd.client import TaskClient, TaskClientFactory, TaskClientProtocol, call_once
from taskd.errors import (
    BadArguments,
    Cancelled,
    ClientCertificateRefused,
    ClientClosed,
    ConnectFailed,
    ConnectionLost,
    InternalError,
    Malformed,
    Overloaded,
    ShuttingDown,
    TaskFailed,
    TimeLimitExceeded,
    TlsFailed,
    Unauthorized,
    UnknownFunction,
    WorkerLost,
    WrongServerName,
)
from taskd.functions import progress, task
from taskd.wire import ALPN, MAX_PRIORITY, Terms
from tests.support import (
    Loop,
    MemoryDaemon,
    MemoryEndpoint,
    MemoryTransport,
    ScriptedDaemon,
    ScriptedEndpoint,
)

_HALF = 0.5
"""What the dice show, always: so the delays are 0.05 s, 0.1 s, 0.2 s and so on."""

_DEAD = ConnectError(string="nobody listens there")
_GOODBYE = {"code": "shutting-down", "message": "goodbye", "retryable": True}


_NO_TLS = SSL.Error([("SSL routines", "", "wrong version number")])
_NO_CERTIFICATE = SSL.Error([("SSL routines", "", "tlsv13 alert certificate required")])


@implementer(ISSLTransport)
class TlsTransport(MemoryTransport):
    """A connection over TLS whose handshake the test makes."""

    def getHandle(self) -> object:
        return object()

    def getPeerCertificate(self) -> None:
        return None


class TlsDaemon(ScriptedDaemon):
    """The far end of a connection over TLS."""

    def __init__(self, client: TaskClientProtocol) -> None:
        self.client = client
        self.transport = TlsTransport()
        client.makeConnection(self.transport)

    def shake_hands(self, protocol: bytes | None = ALPN) -> None:
        """Complete the handshake, in which a protocol was agreed upon, or none."""
        self.transport.negotiatedProtocol = protocol
        self.client.handshakeCompleted()


class TlsEndpoint(ScriptedEndpoint):
    """Where a client connects to over TLS; its attempts succeed before the handshake."""

    def accept(self, number: int = -1) -> Any:
        daemon = TlsDaemon(self._factories[number].buildProtocol(None))
        self.attempts[number].callback(daemon.client)
        return daemon


class ClientTestCase(SynchronousTestCase):
    pool = 1
    connect_timeout = 10.0

    def setUp(self) -> None:
        self.loop = Loop()
        self.endpoint = ScriptedEndpoint()
        self.client = TaskClient(
            self.loop,
            self.endpoint,
            pool=self.pool,
            connect_timeout=self.connect_timeout,
            jitter=lambda: _HALF,
        )

    def connected(self) -> ScriptedDaemon:
        """Have a connection made by a first call, which is answered."""
        called = self.client.call("ping")
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="pong")
        self.assertEqual(self.successResultOf(called), "pong")
        return daemon

    def assertNothingIsLeft(self) -> None:
        self.assertEqual(self.loop.getDelayedCalls(), [])
        self.assertEqual(self.endpoint.open_attempts, [])


class RequestTests(ClientTestCase):
    def request(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        """Make a call, and give what is asked for it without its id."""
        daemon = self.connected()
        self.client.call(*args, **keywords).addErrback(lambda _: None)
        request = daemon.requests[-1]
        self.assertIsInstance(request.pop("id"), int)
        return request

    def test_positional_arguments(self) -> None:
        """Positional arguments are sent as an array."""
        self.assertEqual(self.request("f", 1, "é"), {"function": "f", "args": [1, "é"]})

    def test_keyword_arguments(self) -> None:
        """Keyword arguments are sent as an object."""
        self.assertEqual(self.request("f", to="x"), {"function": "f", "args": {"to": "x"}})

    def test_no_arguments(self) -> None:
        """A call without arguments sends an empty array."""
        self.assertEqual(self.request("f"), {"function": "f", "args": []})

    def test_a_limit_and_progress(self) -> None:
        """The time limit and the wish for progress are sent if they are given."""
        request = self.request("f", timeout=5, on_progress=lambda *_: None)
        expected = {"function": "f", "args": [], "timeout": 5, "progress": True}
        self.assertEqual(request, expected)

    def test_priority_and_the_end_of_the_connection(self) -> None:
        """A priority, and that the task is to end with the connection, are sent if they matter."""
        daemon = self.connected()
        self.client.call_with("f", [1], priority=-3, cancel_on_disconnect=True)
        self.client.call_with("f", [1], priority=0, cancel_on_disconnect=False)
        first, second = daemon.requests[-2:]
        for request, further in (
            (first, {"priority": -3, "cancel_on_disconnect": True}),
            (second, {}),
        ):
            request.pop("id")
            self.assertEqual(request, {"function": "f", "args": [1], **further})

    def test_arguments_that_have_an_options_name(self) -> None:
        """A task that has a parameter named as an option is called by ``call_with``."""
        daemon = self.connected()
        self.client.call_with("f", {"timeout": 3, "function": 4})
        self.assertEqual(daemon.requests[-1]["args"], {"timeout": 3, "function": 4})
        self.assertNotIn("timeout", daemon.requests[-1])

    def test_both_kinds_of_arguments(self) -> None:
        """Positional and keyword arguments together are refused here."""
        self.failureResultOf(self.client.call("f", 1, a=2), BadArguments)

    def test_every_call_has_its_own_id(self) -> None:
        """No two requests on a connection have the same id."""
        daemon = self.connected()
        for _ in range(20):
            self.client.call("f")
        self.assertEqual(len({request["id"] for request in daemon.requests}), 21)


class ReplyTests(ClientTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.daemon = self.connected()

    def call(self, *args: Any, **keywords: Any) -> tuple[Deferred[Any], int]:
        """Make a call; give its Deferred and its id."""
        called = self.client.call(*args, **keywords)
        return called, self.daemon.requests[-1]["id"]

    def test_results(self) -> None:
        """A call fires with its result, whatever JSON value that is."""
        for value in (None, False, 0, "", [], {}, {"error": {"code": 1}}, [1, {"a": "é"}]):
            called, number = self.call("f")
            self.daemon.send(id=number, result=value)
            self.assertEqual(self.successResultOf(called), value)

    def test_replies_in_any_order(self) -> None:
        """Replies find their calls in whatever order they come."""
        calls = [self.call("f", number) for number in range(10)]
        for place in (3, 9, 0, 1, 8, 2, 7, 4, 6, 5):
            self.daemon.send(id=calls[place][1], result=place)
        for place, (called, _) in enumerate(calls):
            self.assertEqual(self.successResultOf(called), place)

    def test_errors_of_the_daemon(self) -> None:
        """Every code on the wire fails the call with the exception of that code."""
        kinds = [
            kind
            for kind in vars(errors).values()
            if isinstance(kind, type) and hasattr(kind, "code")
        ]
        for told_otherwise in (ConnectionLost, ShuttingDown):
            kinds.remove(told_otherwise)
        self.assertEqual(len(kinds), 11)
        for kind in kinds:
            called, number = self.call("f")
            error = {"code": kind.code, "message": "because", "retryable": kind.retryable}
            self.daemon.send(id=number, error=error)
            failure = self.failureResultOf(called, kind)
            self.assertIs(type(failure.value), kind)
            self.assertEqual(failure.value.message, "because")

    def failed(self, **error: Any) -> Any:
        """Make a call that fails with an error object; give the exception."""
        called, number = self.call("f")
        self.daemon.send(id=number, error={"message": "because", **error})
        return self.failureResultOf(called).value

    def test_details_of_errors(self) -> None:
        """What an error tells besides its code is told to the caller."""
        failed = self.failed(code="task-failed", type="ValueError", traceback="line 1")
        self.assertEqual((failed.type, failed.traceback), ("ValueError", "line 1"))
        self.assertEqual(self.failed(code="overloaded", retry_after=1.5).retry_after, 1.5)
        self.assertTrue(self.failed(code="worker-lost").may_have_started)

    def test_an_unknown_code(self) -> None:
        """A code of a later version is an internal error that names it."""
        failed = self.failed(code="moon-phase")
        self.assertIsInstance(failed, InternalError)
        self.assertEqual(failed.message, "moon-phase: because")

    def test_unknown_ids_are_dropped(self) -> None:
        """A reply that no call waits for is dropped, even if its id looks like one."""
        called, number = self.call("f")
        for id_ in (number + 100, str(number), float(number), [number], None, True, "x"):
            self.daemon.send(id=id_, result="wrong")
            self.daemon.send(id=id_, progress={"done": 1})
        self.assertNoResult(called)
        self.daemon.send(id=number, result="right")
        self.daemon.send(id=number, result="again")
        self.assertEqual(self.successResultOf(called), "right")

    def test_progress(self) -> None:
        """What a task reports is told while the call goes on, with what is not told left open."""
        told: list[Any] = []
        called, number = self.call("f", on_progress=lambda *report: told.append(report))
        self.daemon.send(id=number, progress={"done": 1, "total": 4, "message": "first"})
        self.daemon.send(id=number, progress={"done": 2.5})
        self.assertNoResult(called)
        self.daemon.send(id=number, result=None)
        self.daemon.send(id=number, progress={"done": 4})
        self.assertEqual(told, [(1, 4, "first"), (2.5, None, None)])

    def test_a_callback_for_progress_that_fails(self) -> None:
        """What a progress callback raises is logged, and the call goes on."""
        called, number = self.call("f", on_progress=lambda *_: 1 / 0)
        self.daemon.send(id=number, progress={"done": 1})
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.daemon.send(id=number, result="done")
        self.assertEqual(self.successResultOf(called), "done")

    def test_progress_that_nobody_asked_for(self) -> None:
        """Progress that nobody asked for is dropped."""
        called, number = self.call("f")
        self.daemon.send(id=number, progress={"done": 1})
        self.daemon.send(id=number, result="done")
        self.assertEqual(self.successResultOf(called), "done")

    def test_however_the_bytes_come(self) -> None:
        """Replies are taken alike wherever the network cuts them."""
        length = 0
        for cut in range(200):
            first, second = self.call("f"), self.call("f")
            replies = b"".join(
                json.dumps({"id": number, "result": "é"}, ensure_ascii=False).encode() + b"\r\n"
                for _, number in (first, second)
            )
            length = max(length, len(replies))
            self.daemon.client.dataReceived(replies[:cut])
            self.daemon.client.dataReceived(replies[cut:])
            self.assertEqual(self.successResultOf(first[0]), "é")
            self.assertEqual(self.successResultOf(second[0]), "é")
        self.assertLess(length, 200)


class LossTests(ClientTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.daemon = self.connected()

    def test_calls_in_flight(self) -> None:
        """When the connection is lost every call in flight fails; each may have been started."""
        calls = [self.client.call("f") for _ in range(3)]
        self.daemon.hang_up()
        for called in calls:
            failure = self.failureResultOf(called, ConnectionLost)
            self.assertTrue(failure.value.may_have_started)
            self.assertTrue(failure.value.retryable)

    def test_it_is_a_lost_worker(self) -> None:
        """Who catches lost workers catches lost connections too."""
        called = self.client.call("f")
        self.daemon.hang_up(TwistedConnectionLost())
        self.failureResultOf(called, WorkerLost)

    def test_an_error_for_the_whole_connection(self) -> None:
        """
        An error without an id is the oldest unanswered call's.

        Those behind it never began, and are sent again.
        """
        before, culprit = self.client.call("f"), self.client.call("f")
        behind = self.client.call("behind")
        numbers = [request["id"] for request in self.daemon.requests[1:]]
        self.daemon.send(error={"code": "line-too-long", "message": "1 MiB at most"})
        self.daemon.send(id=numbers[0], result="answered")
        self.daemon.hang_up()
        self.assertEqual(self.successResultOf(before), "answered")
        self.failureResultOf(culprit, errors.LineTooLong)
        self.assertNoResult(behind)
        names = [request["function"] for request in self.endpoint.accept().requests]
        self.assertEqual(names, ["behind"])

    def test_what_never_began(self) -> None:
        """A call whose worker was lost before it began is sent again, but not for ever."""
        called = self.client.call("f")
        for sends in range(1, MOST_SENDS + 1):
            self.assertNoResult(called)
            self.assertEqual(len(self.daemon.requests), 1 + sends)
            error = {"code": "worker-lost", "message": "", "may_have_started": False}
            self.daemon.send(id=self.daemon.requests[-1]["id"], error=error)
        self.assertFalse(self.failureResultOf(called, WorkerLost).value.may_have_started)

    def test_goodbye(self) -> None:
        """What a daemon that says goodbye has not answered is sent again, with what is left."""
        answered, called = self.client.call("f"), self.client.call("g", timeout=5)
        self.loop.advance(2)
        self.daemon.send(id=self.daemon.requests[1]["id"], result="done")
        self.daemon.send(error=_GOODBYE)
        later = self.client.call("h")
        self.assertEqual(len(self.daemon.requests), 3)
        self.assertEqual(self.successResultOf(answered), "done")
        daemon = self.endpoint.accept()
        self.daemon.hang_up()
        self.assertEqual([request["function"] for request in daemon.requests], ["h", "g"])
        self.assertEqual(daemon.requests[1]["timeout"], 3)
        for request, called_ in zip(daemon.requests, (later, called), strict=True):
            daemon.send(id=request["id"], result=request["function"])
            self.assertEqual(self.successResultOf(called_), request["function"])
        self.assertNothingIsLeft()

    def test_refused_as_it_stops(self) -> None:
        """What a daemon that stops refuses waits for a new connection, as long as it may."""
        for stays_away in (False, True):
            called = self.client.call("f")
            self.daemon.send(id=self.daemon.requests[-1]["id"], error=_GOODBYE)
            self.assertTrue(self.daemon.transport.disconnecting)
            self.daemon.hang_up()
            if stays_away:
                break
            self.daemon = self.endpoint.accept()
            self.daemon.send(id=self.daemon.requests[-1]["id"], result="done")
            self.assertEqual(self.successResultOf(called), "done")
        self.endpoint.refuse(_DEAD)
        self.loop.advance(10)
        self.failureResultOf(called, ConnectFailed)
        self.successResultOf(self.client.close())
        self.assertNothingIsLeft()

    def test_refused_for_ever(self) -> None:
        """A daemon that takes connections only to refuse calls is soon told of, without a storm."""
        calls = [self.client.call("f") for _ in range(10)]
        began = self.loop.seconds()
        while not self.endpoint.attempts[-1].called or self.daemon.client.in_flight:
            if not self.endpoint.attempts[-1].called:
                self.daemon = self.endpoint.accept()
            for request in self.daemon.requests[-10:]:
                self.daemon.send(id=request["id"], error=_GOODBYE)
            self.daemon.hang_up()
            self.loop.advance(1)
        for called in calls:
            self.failureResultOf(called, ShuttingDown)
        self.assertEqual(len(self.endpoint.attempts), 1 + MOST_SENDS)
        self.assertGreaterEqual(self.loop.seconds() - began, MOST_SENDS - 1)

    def test_nothing_was_ever_heard(self) -> None:
        """Who has never had a reply is told what may be there instead of a daemon."""
        called = self.client.call("f")
        self.daemon.hang_up()
        self.assertNotIn("tls:", self.failureResultOf(called).value.message)
        called = self.client.call("f")
        self.endpoint.accept().hang_up()
        message = self.failureResultOf(called, ConnectionLost).value.message
        self.assertTrue(message.endswith(" Does it speak TLS there (tls:), or is it no taskd?"))
        called = self.client.call("f")
        self.loop.advance(1)
        other = self.endpoint.accept()
        other.client.dataReceived(b"HTTP/1.1 400 Bad Request\r\n")
        other.hang_up()
        self.assertIn("no taskd?", self.failureResultOf(called, Malformed).value.message)

    def test_goodbye_and_no_return(self) -> None:
        """A call that a goodbye has kept from being run fails in time if the daemon stays away."""
        called = self.client.call("f")
        self.daemon.send(error=_GOODBYE)
        self.daemon.hang_up()
        self.endpoint.refuse(_DEAD)
        self.loop.advance(10)
        self.failureResultOf(called, ConnectFailed)
        self.successResultOf(self.client.close())
        self.assertNothingIsLeft()

    def test_an_idempotent_call(self) -> None:
        """A call that may be run twice is sent once more after a loss, and not twice."""
        called = self.client.call_with("f", idempotent=True)
        self.daemon.hang_up()
        self.assertNoResult(called)
        self.endpoint.accept().hang_up()
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_an_idempotent_call_that_was_perhaps_run(self) -> None:
        """A call that was lost is told of as such, though its second sending came to nothing."""
        called = self.client.call_with("f", idempotent=True)
        self.daemon.hang_up()
        self.endpoint.refuse(_DEAD)
        self.loop.advance(10)
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_an_idempotent_call_without_time(self) -> None:
        """A call whose time is over is not sent again."""
        called = self.client.call_with("f", idempotent=True, timeout=5)
        self.loop.advance(5.1)
        self.daemon.hang_up()
        self.failureResultOf(called, ConnectionLost)
        self.assertNothingIsLeft()

    def test_cancelled_before_the_second_sending(self) -> None:
        """A call that is cancelled while it waits to be sent again is sent no more."""
        called = self.client.call_with("f", idempotent=True)
        self.daemon.hang_up()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.assertEqual(self.endpoint.accept().requests, [])
        self.assertNothingIsLeft()

    def test_cancelled_after_the_second_sending(self) -> None:
        """A call that was sent again is cancelled where it is."""
        called = self.client.call_with("f", idempotent=True)
        self.daemon.hang_up()
        daemon = self.endpoint.accept()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.assertEqual([r["function"] for r in daemon.requests], ["f", "taskd.cancel"])

    def test_closed_before_the_second_sending(self) -> None:
        """Closing waits for a call that is being sent again."""
        called = self.client.call_with("f", idempotent=True)
        closed = self.client.close()
        self.daemon.hang_up()
        self.assertNoResult(closed)
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="done")
        self.assertEqual(self.successResultOf(called), "done")
        daemon.hang_up()
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_idempotent_or_not(self) -> None:
        """What is neither idempotent nor not is refused."""
        called = self.client.call_with("f", idempotent=1)  # type: ignore[arg-type]
        self.failureResultOf(called, ValueError)

    def test_a_reply_without_an_end(self) -> None:
        """A reply that is longer than any may be ends the connection, and the calls on it."""
        called = self.client.call("f")
        self.daemon.client.MAX_LENGTH = 1000
        self.daemon.client.dataReceived(b"x" * 1001)
        self.assertTrue(self.daemon.transport.disconnected)
        self.daemon.hang_up(ConnectionAborted())
        self.failureResultOf(called, Malformed)

    def test_what_we_gave_up_on_may_have_run(self) -> None:
        """Calls on a connection that ended over one unreadable reply are not sent again."""
        for said in (b"not json\n", b"x" * 1001):
            calls = [self.client.call("pay", number) for number in (1, 2)]
            daemon = self.endpoint.accept() if self.daemon.transport.disconnected else self.daemon
            daemon.client.MAX_LENGTH = 1000
            daemon.client.dataReceived(said)
            daemon.hang_up(ConnectionAborted())
            self.failureResultOf(calls[0], Malformed)
            self.assertTrue(self.failureResultOf(calls[1], ConnectionLost).value.may_have_started)

    def test_timers_go_with_the_calls(self) -> None:
        """The time limits of lost calls are no longer kept."""
        called = self.client.call("f", timeout=5)
        self.daemon.hang_up()
        self.failureResultOf(called, ConnectionLost)
        self.assertNothingIsLeft()

    def test_the_next_call_connects_again(self) -> None:
        """A call after a loss is sent on a new connection."""
        self.daemon.hang_up()
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="again")
        self.assertEqual(self.successResultOf(called), "again")

    def test_a_retry_from_the_errback(self) -> None:
        """A call that is made again the moment it failed is sent on a new connection."""
        called = self.client.call("f").addErrback(lambda _: self.client.call("f"))
        self.daemon.hang_up()
        self.assertNoResult(called)
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="again")
        self.assertEqual(self.successResultOf(called), "again")


class RubbishTests(ClientTestCase):
    def answer_by(self, rubbish: bytes) -> None:
        """Answer a call by what is no reply, and see the connection end."""
        daemon = self.connected()
        called = self.client.call("f")
        daemon.client.dataReceived(rubbish + b"\n")
        self.assertTrue(daemon.transport.disconnected, rubbish)
        daemon.hang_up(ConnectionAborted())
        self.failureResultOf(called, Malformed)

    def test_what_is_no_reply(self) -> None:
        """A line that is no reply ends the connection, and the calls on it."""
        for rubbish in (
            b"HTTP/1.1 400 Bad Request",
            b"[]",
            b"{}",
            b"\xff",
            b'{"id":1,"result":1,"error":{}}',
            b'{"id":1,"error":"no"}',
            b'{"id":1,"progress":[]}',
        ):
            self.answer_by(rubbish)

    def test_a_result_without_an_id(self) -> None:
        """A result or progress without an id, which nobody has asked for, ends it as well."""
        for rubbish in (b'{"result":1}', b'{"progress":{}}'):
            self.answer_by(rubbish)


class TimeoutTests(ClientTestCase):
    def test_the_daemons_answer_comes_first(self) -> None:
        """The daemon's own time-limit answer, which says more, is waited for a moment."""
        daemon = self.connected()
        called = self.client.call("f", timeout=5)
        self.loop.advance(5)
        self.assertNoResult(called)
        error = {"code": "time-limit", "message": "stood in line 7", "retryable": False}
        daemon.send(id=daemon.requests[-1]["id"], error=error)
        failure = self.failureResultOf(called, TimeLimitExceeded)
        self.assertEqual(failure.value.message, "stood in line 7")
        self.assertNothingIsLeft()

    def test_a_daemon_that_does_not_answer(self) -> None:
        """A call ends soon after its limit even if the daemon says nothing, and is taken back."""
        daemon = self.connected()
        called = self.client.call("f", timeout=5)
        number = daemon.requests[-1]["id"]
        self.loop.advance(6)
        self.failureResultOf(called, TimeLimitExceeded)
        self.assertEqual(daemon.requests[-1]["function"], "taskd.cancel")
        self.assertEqual(daemon.requests[-1]["args"], {"id": number})
        self.assertNothingIsLeft()

    def test_a_late_answer(self) -> None:
        """An answer that comes after the call has ended is dropped, and so is the cancel's."""
        daemon = self.connected()
        called = self.client.call("f", timeout=5)
        number = daemon.requests[-1]["id"]
        self.loop.advance(6)
        self.failureResultOf(called, TimeLimitExceeded)
        daemon.send(id=number, result="late")
        daemon.send(id=daemon.requests[-1]["id"], result=True)
        self.assertFalse(daemon.transport.disconnected)

    def test_an_answer_in_time(self) -> None:
        """A call that was answered in time leaves no timer behind."""
        daemon = self.connected()
        called = self.client.call("f", timeout=5)
        daemon.send(id=daemon.requests[-1]["id"], result="in time")
        self.assertEqual(self.successResultOf(called), "in time")
        self.assertNothingIsLeft()

    def test_the_wait_for_a_connection_counts(self) -> None:
        """The daemon is given what the wait for a connection has left of the limit."""
        self.client.call("f", timeout=5)
        self.loop.advance(3)
        daemon = self.endpoint.accept()
        self.assertAlmostEqual(daemon.requests[0]["timeout"], 2)

    def test_what_is_left_is_a_short_number(self) -> None:
        """What is left of the limit is rounded to milliseconds, and never nothing."""
        for limit in (5, 1 / 3 + 1e-9):
            self.client.call("f", timeout=limit)
        self.loop.advance(1 / 3)
        first, second = (request["timeout"] for request in self.endpoint.accept().requests)
        self.assertEqual((first, second), (4.667, 0.001))

    def test_no_connection_in_time(self) -> None:
        """A call whose limit passes while it waits for a connection is never sent."""
        called = self.client.call("f", timeout=5)
        self.loop.advance(5)
        self.failureResultOf(called, TimeLimitExceeded)
        self.assertEqual(self.endpoint.accept().requests, [])
        self.assertNothingIsLeft()


class CancelTests(ClientTestCase):
    def test_cancelling_tells_the_daemon(self) -> None:
        """Cancelling a call that was sent has the daemon cancel it."""
        daemon = self.connected()
        called = self.client.call("f", timeout=5)
        number = daemon.requests[-1]["id"]
        called.cancel()
        self.failureResultOf(called, CancelledError)
        request = daemon.requests[-1]
        self.assertEqual((request["function"], request["args"]), ("taskd.cancel", {"id": number}))
        self.assertNothingIsLeft()

    def test_what_is_still_answered(self) -> None:
        """Whatever is still answered to a cancelled call is dropped."""
        daemon = self.connected()
        told: list[Any] = []
        called = self.client.call("f", on_progress=lambda *report: told.append(report))
        number = daemon.requests[-1]["id"]
        called.cancel()
        self.failureResultOf(called, CancelledError)
        daemon.send(id=number, progress={"done": 1})
        daemon.send(id=number, error={"code": "cancelled", "message": ""})
        daemon.send(id=daemon.requests[-1]["id"], result=True)
        self.assertEqual(told, [])
        self.assertFalse(daemon.transport.disconnected)

    def test_cancelled_before_it_was_sent(self) -> None:
        """A call that is cancelled while it waits for a connection is never sent."""
        called, other = self.client.call("f", timeout=5), self.client.call("g")
        called.cancel()
        self.failureResultOf(called, CancelledError)
        daemon = self.endpoint.accept()
        self.assertEqual([request["function"] for request in daemon.requests], ["g"])
        daemon.send(id=daemon.requests[0]["id"], result="done")
        self.assertEqual(self.successResultOf(other), "done")
        self.assertNothingIsLeft()

    def test_cancelled_after_it_had_waited(self) -> None:
        """A call that had to wait for its connection is cancelled like any other."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.assertEqual(daemon.requests[-1]["function"], "taskd.cancel")

    def test_cancelled_by_somebody_else(self) -> None:
        """A call that was cancelled by its id on the daemon fails as cancelled."""
        daemon = self.connected()
        called = self.client.call("f")
        daemon.send(id=daemon.requests[-1]["id"], error={"code": "cancelled", "message": ""})
        self.failureResultOf(called, Cancelled)


class PoolTests(ClientTestCase):
    pool = 3

    def test_it_connects_when_needed(self) -> None:
        """No connection is made before there is a call."""
        self.assertEqual(self.endpoint.attempts, [])
        self.client.call("f")
        self.assertEqual(len(self.endpoint.attempts), 1)

    def test_an_idle_connection_is_used(self) -> None:
        """Calls one after the other share one connection."""
        daemon = self.connected()
        for _ in range(5):
            called = self.client.call("f")
            daemon.send(id=daemon.requests[-1]["id"], result=None)
            self.successResultOf(called)
        self.assertEqual(len(self.endpoint.attempts), 1)

    def test_it_grows_to_its_limit(self) -> None:
        """A call that finds every connection busy opens one more, up to the limit."""
        daemons = [self.connected()]
        self.client.call("f")
        for size in (2, 3):
            self.client.call("f")
            self.assertEqual(len(self.endpoint.attempts), size)
            daemons.append(self.endpoint.accept())
            self.client.call("f")
        for _ in range(5):
            self.client.call("f")
        self.assertEqual(len(self.endpoint.attempts), 3)

    def test_it_does_not_wait_for_a_second_connection(self) -> None:
        """While a second connection is made, calls go out on the first."""
        daemon = self.connected()
        self.client.call("f")
        self.client.call("g")
        self.assertEqual([request["function"] for request in daemon.requests[1:]], ["f", "g"])

    def test_the_least_busy_is_taken(self) -> None:
        """A call takes the connection with the fewest calls in flight."""
        first = self.connected()
        for _ in range(2):
            self.client.call("f")
        second = self.endpoint.accept()
        self.assertEqual((first.client.in_flight, second.client.in_flight), (2, 0))
        for expected in ((2, 1), (2, 2)):
            self.client.call("f")
            self.assertEqual((first.client.in_flight, second.client.in_flight), expected)
        first.send(id=first.requests[-1]["id"], result=None)
        self.client.call("f")
        self.assertEqual((first.client.in_flight, second.client.in_flight), (2, 2))

    def test_attempts_share_what_waits(self) -> None:
        """The calls that wait are shared among the attempts, in their order."""
        for number in range(7):
            self.client.call("f", number)
        self.assertEqual(len(self.endpoint.attempts), 3)
        shares = [
            [request["args"][0] for request in self.endpoint.accept(number).requests]
            for number in (1, 0, 2)
        ]
        self.assertEqual(shares, [[0, 1, 2], [3, 4], [5, 6]])

    def test_an_attempt_that_hangs_keeps_nobody(self) -> None:
        """A call that waits for a second connection takes the first one when that is idle."""
        for name in "fgh":
            self.client.call(name)
        daemon = self.endpoint.accept(0)
        names = ["f"]
        for name in "gh":
            self.assertEqual([request["function"] for request in daemon.requests], names)
            daemon.send(id=daemon.requests[-1]["id"], result=None)
            names.append(name)
        self.assertEqual([request["function"] for request in daemon.requests], names)
        self.assertEqual(self.endpoint.open_attempts, [1, 2])

    def test_a_call_behind_those_that_wait(self) -> None:
        """A call that comes while others wait is sent behind them, and not before."""
        daemon = self.connected()
        calls = [self.client.call(name) for name in "fg"]
        calls[0].addErrback(lambda _: None).cancel()
        self.client.call("h")
        names = [request["function"] for request in daemon.requests[1:]]
        self.assertEqual(names, ["f", "g", "taskd.cancel", "h"])

    def test_whoever_has_waited_long_enough(self) -> None:
        """A call whose time to wait for its own connection is over shares a busy one."""
        self.client.call("f")
        self.client.call("g")
        daemon = self.endpoint.accept(0)
        self.assertEqual([request["function"] for request in daemon.requests], ["f"])
        self.loop.advance(10)
        self.assertEqual([request["function"] for request in daemon.requests], ["f", "g"])

    def test_the_share_of_a_failed_attempt(self) -> None:
        """A call is not kept waiting for a second connection while the first one is idle."""
        first, second = self.client.call("f"), self.client.call("g")
        daemon = self.endpoint.accept(0)
        daemon.send(id=daemon.requests[0]["id"], result="first")
        self.assertEqual(self.successResultOf(first), "first")
        self.endpoint.refuse(_DEAD, 1)
        self.assertEqual([request["function"] for request in daemon.requests], ["f", "g"])
        daemon.send(id=daemon.requests[1]["id"], result="second")
        self.assertEqual(self.successResultOf(second), "second")

    def test_a_daemon_that_stops_behind_a_balancer(self) -> None:
        """The connection to it is asked no more, and another is made, though it has least to do."""
        daemon = self.connected()
        running = self.client.call("long")
        calls = [self.client.call("f")]
        other = self.endpoint.accept()
        calls += [self.client.call("f") for _ in range(2)]
        self.assertEqual((len(daemon.requests), len(other.requests)), (3, 2))
        daemon.send(id=daemon.requests[-1]["id"], error=_GOODBYE)
        calls += [self.client.call("f") for _ in range(3)]
        self.assertEqual((len(daemon.requests), len(other.requests)), (3, 6))
        fresh = self.endpoint.accept()
        calls += [self.client.call("f") for _ in range(3)]
        self.assertEqual((len(daemon.requests), len(fresh.requests)), (3, 3))
        for each in (other, fresh):
            for request in each.requests:
                each.send(id=request["id"], result="done")
        for called in calls:
            self.assertEqual(self.successResultOf(called), "done")
        self.assertFalse(daemon.transport.disconnecting)
        daemon.send(id=daemon.requests[1]["id"], result="run")
        self.assertEqual(self.successResultOf(running), "run")
        self.assertTrue(daemon.transport.disconnecting)
        daemon.hang_up()
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_lost_connection_makes_room(self) -> None:
        """A lost connection is no longer chosen, and another may take its place."""
        first = self.connected()
        self.client.call("f")
        self.client.call("f")
        second = self.endpoint.accept()
        second.send(error={"code": "internal", "message": "hello"})
        second.hang_up()
        self.client.call("f")
        self.assertEqual(len(self.endpoint.attempts), 3)
        self.assertEqual(len(first.requests), 4)


class ConnectTests(ClientTestCase):
    connect_timeout = 1000.0

    def test_no_connection_in_time(self) -> None:
        """A call fails when no connection was made in time, and the failure tells why."""
        self.client = TaskClient(self.loop, self.endpoint, connect_timeout=3, jitter=lambda: _HALF)
        called = self.client.call("f")
        self.endpoint.refuse(_DEAD)
        self.loop.advance(2.9)
        self.assertNoResult(called)
        self.loop.advance(0.1)
        failure = self.failureResultOf(called, ConnectFailed)
        self.assertIn("nobody listens there", str(failure.value))

    def test_an_attempt_that_hangs(self) -> None:
        """A call does not wait longer for an attempt that hangs."""
        called = self.client.call("f")
        self.loop.advance(1000)
        self.failureResultOf(called, ConnectFailed)
        self.assertEqual(self.endpoint.accept().requests, [])

    def test_the_delay_grows(self) -> None:
        """Attempts that fail are repeated after a delay that doubles up to a limit."""
        called = self.client.call("f")
        for delay in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5):
            attempts = len(self.endpoint.attempts)
            self.endpoint.refuse(_DEAD)
            self.loop.advance(delay - 0.01)
            self.assertEqual(len(self.endpoint.attempts), attempts, delay)
            self.loop.advance(0.02)
            self.assertEqual(len(self.endpoint.attempts), attempts + 1, delay)
        self.assertNoResult(called)
        self.assertEqual(len(self.endpoint.accept().requests), 1)

    def test_an_answer_ends_the_growth(self) -> None:
        """Once the daemon has answered, the delay begins anew."""
        self.client.call("f")
        for _ in range(4):
            self.endpoint.refuse(_DEAD)
            self.loop.advance(3)
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result=None)
        daemon.hang_up()
        self.client.call("f")
        attempts = len(self.endpoint.attempts)
        self.endpoint.refuse(_DEAD)
        self.loop.advance(0.06)
        self.assertEqual(len(self.endpoint.attempts), attempts + 1)

    def test_a_daemon_that_hangs_up_at_once(self) -> None:
        """A daemon that accepts and hangs up without an answer is as one that is not there."""
        called = self.client.call("f")
        self.endpoint.accept().hang_up()
        self.failureResultOf(called, ConnectionLost)
        again = self.client.call("f")
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.loop.advance(0.06)
        self.assertEqual(len(self.endpoint.attempts), 2)
        self.endpoint.accept().hang_up()
        self.failureResultOf(again, ConnectionLost)
        self.client.call("f")
        self.loop.advance(0.06)
        self.assertEqual(len(self.endpoint.attempts), 2)
        self.loop.advance(0.05)
        self.assertEqual(len(self.endpoint.attempts), 3)

    def test_nothing_is_tried_for_nobody(self) -> None:
        """A client that nobody asks makes no attempts."""
        self.client.call("f").addErrback(lambda _: None).cancel()
        self.endpoint.refuse(_DEAD)
        self.loop.advance(100)
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.assertNothingIsLeft()

    def test_calls_that_wait_go_out_in_order(self) -> None:
        """What waits for the daemon's return is sent, in its order, when it is there."""
        for number in range(5):
            self.client.call("f", number)
        self.endpoint.refuse(_DEAD)
        self.loop.advance(1)
        requests = self.endpoint.accept().requests
        self.assertEqual([request["args"] for request in requests], [[n] for n in range(5)])

    def test_a_call_that_fails_as_it_is_sent(self) -> None:
        """A call that fails as it is sent may cancel those behind it, sent or waiting."""
        bad, sent, waiting = (self.client.call(*args) for args in (("f", {1}), ("g",), ("h",)))
        bad.addErrback(lambda _: (waiting.cancel(), sent.cancel()))
        requests = self.endpoint.accept().requests
        self.assertEqual([request["function"] for request in requests], ["g", "taskd.cancel"])
        for called in (sent, waiting):
            self.failureResultOf(called, CancelledError)
        self.successResultOf(self.endpoint.attempts[0])


class CloseTests(ClientTestCase):
    pool = 2

    def test_nothing_to_close(self) -> None:
        """A client that was never used is closed at once."""
        self.assertIsNone(self.successResultOf(self.client.close()))
        self.assertEqual(self.endpoint.attempts, [])

    def test_calls_after_it(self) -> None:
        """A call after closing fails, and is not sent."""
        daemon = self.connected()
        self.client.close()
        self.failureResultOf(self.client.call("f"), ClientClosed)
        self.assertEqual(len(daemon.requests), 1)

    def test_it_waits_for_the_calls(self) -> None:
        """Closing waits for the calls in flight, then for the connections."""
        daemon = self.connected()
        called = self.client.call("f")
        closed = self.client.close()
        self.assertFalse(daemon.transport.disconnecting)
        daemon.send(id=daemon.requests[-1]["id"], result="done")
        self.assertEqual(self.successResultOf(called), "done")
        self.assertTrue(daemon.transport.disconnecting)
        self.assertNoResult(closed)
        daemon.hang_up()
        self.assertIsNone(self.successResultOf(closed))
        self.assertNothingIsLeft()

    def test_it_waits_for_every_connection(self) -> None:
        """Closing is over when the last connection is closed."""
        first = self.connected()
        calls = [self.client.call("f") for _ in range(2)]
        second = self.endpoint.accept()
        for called in calls:
            called.addErrback(lambda _: None).cancel()
        closed = self.client.close()
        second.hang_up()
        self.assertNoResult(closed)
        first.hang_up()
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_twice(self) -> None:
        """Closing again fires when the first closing does."""
        daemon = self.connected()
        closings = [self.client.close(), self.client.close()]
        daemon.hang_up()
        closings.append(self.client.close())
        for closed in closings:
            self.assertIsNone(self.successResultOf(closed))
        self.assertNothingIsLeft()

    def test_a_daemon_that_does_not_take_part(self) -> None:
        """A connection that the daemon does not let end is ended by force."""
        daemon = self.connected()
        closed = self.client.close()
        self.loop.advance(4.9)
        self.assertFalse(daemon.transport.disconnected)
        self.loop.advance(0.1)
        self.assertTrue(daemon.transport.disconnected)
        daemon.hang_up(ConnectionAborted())
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_while_it_connects(self) -> None:
        """Closing while connections are made lets the waiting calls come to their end."""
        called = self.client.call("f")
        closed = self.client.close()
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="done")
        self.assertEqual(self.successResultOf(called), "done")
        daemon.hang_up()
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_while_it_connects_for_nobody(self) -> None:
        """Closing gives up attempts that nobody waits for any more."""
        self.client.call("f").addErrback(lambda _: None).cancel()
        self.assertEqual(self.endpoint.open_attempts, [0])
        self.successResultOf(self.client.close())
        self.assertNothingIsLeft()

    def test_while_it_backs_off(self) -> None:
        """Closing while the daemon is not there waits for the calls, and leaves nothing behind."""
        called = self.client.call("f")
        self.endpoint.refuse(_DEAD)
        closed = self.client.close()
        self.loop.advance(10)
        self.failureResultOf(called, ConnectFailed)
        self.successResultOf(closed)
        self.assertNothingIsLeft()

    def test_while_it_backs_off_for_nobody(self) -> None:
        """Closing ends a delay that nobody waits for."""
        self.client.call("f").addErrback(lambda _: None).cancel()
        self.endpoint.refuse(_DEAD)
        self.successResultOf(self.client.close())
        self.assertNothingIsLeft()

    def test_a_lost_connection(self) -> None:
        """Closing a client whose calls are lost meanwhile comes to its end."""
        daemon = self.connected()
        called = self.client.call("f")
        closed = self.client.close()
        daemon.hang_up()
        self.failureResultOf(called, ConnectionLost)
        self.successResultOf(closed)
        self.assertNothingIsLeft()


class TlsTestCase(ClientTestCase):
    connect_timeout = 1000.0

    def setUp(self) -> None:
        super().setUp()
        self.endpoint = TlsEndpoint()
        self.client = self.made()

    def made(self, **options: Any) -> TaskClient:
        options = {"pool": self.pool, "connect_timeout": self.connect_timeout, **options}
        return TaskClient(self.loop, self.endpoint, jitter=lambda: _HALF, **options)

    def connected(self) -> ScriptedDaemon:
        called = self.client.call("ping")
        daemon = self.endpoint.accept()
        daemon.shake_hands()
        daemon.send(id=daemon.requests[0]["id"], result="pong")
        self.assertEqual(self.successResultOf(called), "pong")
        return daemon


class HandshakeTests(TlsTestCase):
    """Over TLS a connection stands when the handshake is over, and not before."""

    def test_nothing_is_sent_before(self) -> None:
        """Nothing is sent before the handshake is over, and then the token is sent first."""
        self.client = self.made(token="secret")
        self.client.call("f")
        daemon = self.endpoint.accept()
        self.client.call("g")
        self.assertEqual(daemon.requests, [])
        daemon.shake_hands()
        names = [request["function"] for request in daemon.requests]
        self.assertEqual(names, ["taskd.auth", "f", "g"])

    def test_an_attempt_until_then(self) -> None:
        """A connection in its handshake is an attempt, and counts for the size of the pool."""
        for name in "fg":
            self.client.call(name)
        daemon = self.endpoint.accept()
        self.client.call("h")
        self.assertEqual(len(self.endpoint.attempts), 1)
        daemon.shake_hands()
        self.assertEqual(len(daemon.requests), 3)

    def test_a_handshake_that_fails(self) -> None:
        """When TLS fails, what waits fails by its reason at once, and the delay grows."""
        for delay in (0.05, 0.1, 0.2):
            calls = [self.client.call("f"), self.client.call("g")]
            self.loop.advance(delay + 0.01)
            self.endpoint.accept().hang_up(_NO_TLS)
            for called in calls:
                error = self.failureResultOf(called, TlsFailed).value
                self.assertIn("wrong version number", str(error))
        self.assertEqual(len(self.endpoint.attempts), 3)

    def test_the_cause(self) -> None:
        """The cause that was found is the exception that the calls fail with."""
        for reason, kind in (
            (VerificationError(errors=[]), WrongServerName),
            (_NO_CERTIFICATE, ClientCertificateRefused),
            (_NO_TLS, TlsFailed),
            (TwistedConnectionLost(), TlsFailed),
        ):
            called = self.client.call("f")
            self.loop.advance(10)
            self.endpoint.accept().hang_up(reason)
            self.assertIs(type(self.failureResultOf(called).value), kind)

    def test_calls_between_attempts(self) -> None:
        """A call that may not wait for the next attempt fails by the reason of the last one."""
        self.client = self.made(connect_timeout=0.01)
        self.client.call("f").addErrback(lambda _: None)
        self.endpoint.accept().hang_up(_NO_TLS)
        called = self.client.call("g")
        self.assertNoResult(called)
        self.loop.advance(0.01)
        self.failureResultOf(called, TlsFailed)

    def test_a_call_again_at_once(self) -> None:
        """A call that is made again the moment it failed waits for the next attempt."""
        called = self.client.call("f").addErrback(lambda _: self.client.call("f"))
        self.endpoint.accept().hang_up(_NO_TLS)
        self.assertNoResult(called)
        self.loop.advance(0.06)
        daemon = self.endpoint.accept()
        daemon.shake_hands()
        self.assertEqual([request["function"] for request in daemon.requests], ["f"])

    def test_those_behind_may_be_cancelled(self) -> None:
        """A call that fails with its connection may cancel those that wait behind it."""
        first, second = self.client.call("f"), self.client.call("g")
        first.addErrback(lambda _: second.cancel())
        self.endpoint.accept().hang_up(_NO_TLS)
        self.failureResultOf(second, CancelledError)
        self.assertIsNone(self.successResultOf(first))

    def test_a_handshake_without_an_end(self) -> None:
        """A handshake that comes to no end is broken off, and fails what waits for it."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        self.loop.advance(29.9)
        self.assertFalse(daemon.transport.disconnected)
        self.loop.advance(0.1)
        self.assertTrue(daemon.transport.disconnected)
        daemon.hang_up(ConnectionAborted())
        self.failureResultOf(called, TlsFailed)
        self.client.call("f")
        self.loop.advance(0.06)
        self.assertEqual(len(self.endpoint.attempts), 2)

    def test_no_timer_is_left(self) -> None:
        """A handshake that is over leaves no timer behind."""
        self.connected()
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_handshake_that_comes_too_late(self) -> None:
        """A handshake that completes on a connection that is given up does not count."""
        self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.transport.disconnecting = True
        daemon.shake_hands()
        self.assertEqual(daemon.requests, [])

    def test_close(self) -> None:
        """Closing gives up a handshake that nobody waits for."""
        self.client.call("f").addErrback(lambda _: None).cancel()
        daemon = self.endpoint.accept()
        self.assertIsNone(self.successResultOf(self.client.close()))
        self.assertTrue(daemon.transport.disconnected)
        daemon.hang_up(ConnectionAborted())
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_call_once(self) -> None:
        """``call_once`` fails by the reason at once, and leaves nothing behind."""
        called = call_once(self.loop, self.endpoint, "f")
        self.endpoint.accept().hang_up(_NO_TLS)
        self.failureResultOf(called, TlsFailed)
        self.assertEqual(self.loop.getDelayedCalls(), [])


class HandshakePoolTests(TlsTestCase):
    pool = 2

    def test_another_connection(self) -> None:
        """While another connection stands, a failed handshake fails nothing."""
        daemon = self.connected()
        self.client.call("f")
        called = self.client.call("g")
        self.endpoint.accept().hang_up(_NO_TLS)
        self.assertNoResult(called)
        daemon.send(id=daemon.requests[-1]["id"], result=None)
        self.assertEqual([request["function"] for request in daemon.requests][1:], ["f", "g"])

    def test_another_attempt(self) -> None:
        """While another attempt is under way, a failed handshake fails nothing either."""
        calls = [self.client.call(name) for name in "fg"]
        first, second = self.endpoint.accept(0), self.endpoint.accept(1)
        first.hang_up(_NO_TLS)
        for called in calls:
            self.assertNoResult(called)
        second.hang_up(_NO_TLS)
        for called in calls:
            self.failureResultOf(called, TlsFailed)


class TlsEndTests(TlsTestCase):
    """What the end of a connection over TLS says of the calls in flight."""

    def lost(self, reason: Exception, *, answered: bool) -> Any:
        if answered:
            daemon = self.connected()
        else:
            self.client.call("first").addErrback(lambda _: None)
            daemon = self.endpoint.accept()
            daemon.shake_hands()
        called = self.client.call("f")
        daemon.hang_up(reason)
        self.loop.advance(10)
        return self.failureResultOf(called).value

    def test_a_close(self) -> None:
        """What a daemon that closes in order did not answer, it did not start."""
        connection = TaskClientFactory(self.loop).buildProtocol(None)
        daemon = TlsDaemon(connection)
        daemon.shake_hands()
        called = connection.call("f", [])
        daemon.hang_up(ConnectionDone())
        self.assertFalse(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_a_call_after_a_close(self) -> None:
        """What a daemon that closes in order did not answer is sent again."""
        daemon = self.connected()
        called = self.client.call("f")
        daemon.hang_up(ConnectionDone())
        again = self.endpoint.accept()
        again.shake_hands()
        again.send(id=again.requests[0]["id"], result="run")
        self.assertEqual(self.successResultOf(called), "run")
        self.assertNothingIsLeft()

    def test_a_loss(self) -> None:
        """What was in flight as the connection broke may have been started."""
        for reason in (TwistedConnectionLost(), SSL.Error([("", "", "bad record mac")])):
            for answered in (False, True):
                error = self.lost(reason, answered=answered)
                self.assertIs(type(error), ConnectionLost)
                self.assertTrue(error.may_have_started)

    def test_a_close_of_something_in_between(self) -> None:
        """The close of what does not speak for the daemon says nothing of what was started."""
        connection = TaskClientFactory(self.loop).buildProtocol(None)
        daemon = TlsDaemon(connection)
        daemon.shake_hands(None)
        called = connection.call("f", [])
        daemon.hang_up(ConnectionDone())
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_our_own_close(self) -> None:
        """When it was us who closed, the daemon's close says nothing of the calls."""
        connection = TaskClientFactory(self.loop).buildProtocol(None)
        daemon = TlsDaemon(connection)
        daemon.shake_hands()
        called = connection.call("f", [])
        connection.close()
        daemon.hang_up(ConnectionDone())
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)

    def test_a_refused_certificate(self) -> None:
        """In TLS 1.3 a certificate is refused behind the handshake, before any answer."""
        error = self.lost(_NO_CERTIFICATE, answered=False)
        self.assertIs(type(error), ClientCertificateRefused)

    def test_a_refused_certificate_is_a_failed_attempt(self) -> None:
        """A refused certificate fails what waits, and delays the next attempt."""
        self.client.call("f").addErrback(lambda _: None)
        daemon = self.endpoint.accept()
        daemon.shake_hands()
        waiting = []
        self.client.call("g").addErrback(lambda _: waiting.append(self.client.call("h")))
        daemon.hang_up(_NO_CERTIFICATE)
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.loop.advance(0.06)
        self.endpoint.accept().hang_up(_NO_CERTIFICATE)
        self.failureResultOf(waiting[0], ClientCertificateRefused)

    def test_an_alert_after_an_answer(self) -> None:
        """An alert that comes after an answer is no refusal: what was in flight may have run."""
        error = self.lost(_NO_CERTIFICATE, answered=True)
        self.assertIs(type(error), ConnectionLost)
        self.assertTrue(error.may_have_started)


_WRONG_TOKEN = {"code": "unauthorized", "message": "nobody has this token"}


class TokenTests(ClientTestCase):
    """A client that shows a token."""

    connect_timeout = 1000.0

    def setUp(self) -> None:
        super().setUp()
        self.client = self.made("secret")

    def made(self, token: str | None, pool: int = 1) -> TaskClient:
        return TaskClient(
            self.loop,
            self.endpoint,
            token=token,
            pool=pool,
            connect_timeout=self.connect_timeout,
            jitter=lambda: _HALF,
        )

    def test_it_is_shown_first(self) -> None:
        """The token is the first that is sent on a connection, and calls do not wait for more."""
        self.client.call("f").addErrback(lambda _: None)
        daemon = self.endpoint.accept()
        auth, call = daemon.requests
        expected = {"function": "taskd.auth", "args": {"token": "secret"}, "id": 0}
        self.assertEqual(auth, expected)
        self.assertEqual(call["function"], "f")
        daemon.send(id=0, result={"identity": "me"})
        self.client.call("g").addErrback(lambda _: None)
        self.assertEqual(daemon.requests[-1]["function"], "g")
        daemon.hang_up()
        self.client.call("h")
        self.assertEqual(self.endpoint.accept().requests[0], expected)

    def test_a_wrong_one(self) -> None:
        """A wrong token ends the connection, and every call on it fails by the daemon's words."""
        calls = [self.client.call("f", timeout=5) for _ in range(3)]
        daemon = self.endpoint.accept()
        self.loop.advance(4)
        daemon.send(id=0, error=_WRONG_TOKEN)
        self.assertTrue(daemon.transport.disconnected)
        calls.append(self.client.call("too late"))
        daemon.hang_up(ConnectionAborted())
        for called in calls:
            error = self.failureResultOf(called, Unauthorized).value
            self.assertEqual(error.message, "nobody has this token")

    def test_answers_behind_it(self) -> None:
        """A daemon that refuses each call as well is understood."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.send(id=0, error=_WRONG_TOKEN)
        daemon.send(id=daemon.requests[1]["id"], error={**_WRONG_TOKEN, "message": "first auth"})
        self.failureResultOf(called, Unauthorized)
        daemon.hang_up()

    def test_a_wrong_one_is_a_failed_attempt(self) -> None:
        """After a wrong token the next attempt waits, ever longer; then what waits fails, too."""
        self.client.call("f").addErrback(lambda _: None)
        for delay in (0.05, 0.1, 0.2):
            daemon = self.endpoint.accept()
            daemon.send(id=0, error=_WRONG_TOKEN)
            daemon.hang_up()
            attempts = len(self.endpoint.attempts)
            self.client.call("f").addErrback(lambda _: None)
            self.loop.advance(delay - 0.01)
            self.assertEqual(len(self.endpoint.attempts), attempts)
            self.loop.advance(0.02)
            self.assertEqual(len(self.endpoint.attempts), attempts + 1)

    def test_calls_that_wait(self) -> None:
        """While another attempt is under way, a wrong token fails nothing that waits for it."""
        self.client = self.made("secret", pool=2)
        calls = [self.client.call(name) for name in "fg"]
        for number, called in enumerate(calls):
            self.assertNoResult(called)
            daemon = self.endpoint.accept(number)
            daemon.send(id=0, error=_WRONG_TOKEN)
            daemon.hang_up()
            self.failureResultOf(called, Unauthorized)
        self.assertEqual(len(self.endpoint.attempts), 2)

    def test_another_error(self) -> None:
        """Any other error that the token gets is every call's as well."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.send(id=0, error={"code": "overloaded", "message": "later"})
        daemon.hang_up()
        self.failureResultOf(called, Overloaded)

    def test_a_daemon_that_knows_no_tokens(self) -> None:
        """An older daemon, which does not know what a token is, goes on to serve."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.send(id=0, error={"code": "unknown-function", "message": "taskd.auth"})
        daemon.send(id=daemon.requests[1]["id"], result="served")
        self.assertEqual(self.successResultOf(called), "served")
        self.assertFalse(daemon.transport.disconnected)

    def test_an_id_that_looks_like_it(self) -> None:
        """Only the answer with the token's own id is its answer."""
        called = self.client.call("f")
        daemon = self.endpoint.accept()
        for id_ in (False, 0.0, "0", None):
            daemon.send(id=id_, error=_WRONG_TOKEN)
        self.assertFalse(daemon.transport.disconnected)
        self.assertNoResult(called)
        self.client = self.made(None)
        other = self.client.call("f")
        daemon = self.endpoint.accept()
        daemon.send(id=0, error=_WRONG_TOKEN)
        self.assertFalse(daemon.transport.disconnected)
        self.assertNoResult(other)

    def test_a_factory(self) -> None:
        """A factory shows its token, too, and its calls fail by the daemon's words."""
        factory = TaskClientFactory(self.loop, token="secret")
        calls = [factory.call("f")]
        daemon = ScriptedDaemon(factory.buildProtocol(None))
        self.assertEqual(daemon.requests[0]["args"], {"token": "secret"})
        daemon.send(id=0, error=_WRONG_TOKEN)
        daemon.hang_up()
        calls.append(factory.call("f"))
        for called in calls:
            self.failureResultOf(called, Unauthorized)

    def test_it_is_not_told(self) -> None:
        """The token stands in no representation, and in no failure."""
        called = self.client.call("f")
        factory = TaskClientFactory(self.loop, token="secret")
        connection = factory.buildProtocol(None)
        daemon = self.endpoint.accept()
        daemon.send(id=0, error=_WRONG_TOKEN)
        daemon.hang_up()
        told = self.failureResultOf(called)
        for thing in (self.client, factory, connection, told, told.getTraceback()):
            self.assertNotIn("secret", repr(thing))

    def test_what_cannot_be(self) -> None:
        """A token that cannot be is refused when it is given."""
        for token in ("", "line\n"):
            with self.assertRaises(ValueError):
                self.made(token)
            with self.assertRaises(ValueError):
                TaskClientFactory(self.loop, token=token)
            self.failureResultOf(call_once(self.loop, self.endpoint, "f", token=token), ValueError)


class UnauthorizedTests(ClientTestCase):
    """A daemon that does not know the caller, or has a function that is not for it."""

    connect_timeout = 1000.0

    def asked(self, count: int) -> tuple[list[Deferred[Any]], ScriptedDaemon]:
        calls = [self.client.call("f", n) for n in range(count)]
        return calls, self.endpoint.accept()

    def refuse(self, daemon: ScriptedDaemon, number: int) -> None:
        error = {"code": "unauthorized", "message": "show a token"}
        daemon.send(id=daemon.requests[number]["id"], error=error)

    def test_and_then_the_end(self) -> None:
        """When all that the daemon said is that it knows nobody, it has run nothing."""
        calls, daemon = self.asked(3)
        self.refuse(daemon, 0)
        daemon.hang_up()
        for called in calls:
            error = self.failureResultOf(called, Unauthorized).value
            self.assertEqual(error.message, "show a token")

    def test_without_an_id(self) -> None:
        """The same is so if it did not say which request it meant."""
        calls, daemon = self.asked(3)
        daemon.send(error={"code": "unauthorized", "message": "show a token"})
        daemon.hang_up()
        for called in calls:
            self.failureResultOf(called, Unauthorized)

    def test_it_is_a_failed_attempt(self) -> None:
        """A daemon that knows nobody is not asked again at once."""
        calls, daemon = self.asked(1)
        self.refuse(daemon, 0)
        self.failureResultOf(calls[0], Unauthorized)
        daemon.hang_up()
        self.client.call("f")
        self.assertEqual(len(self.endpoint.attempts), 1)
        self.loop.advance(0.06)
        self.assertEqual(len(self.endpoint.attempts), 2)

    def test_a_function_that_is_not_for_us(self) -> None:
        """A function that is not for the caller fails alone, and the others go on."""
        calls, daemon = self.asked(3)
        self.refuse(daemon, 1)
        self.failureResultOf(calls[1], Unauthorized)
        daemon.send(id=daemon.requests[0]["id"], result="served")
        self.assertEqual(self.successResultOf(calls[0]), "served")
        daemon.hang_up()
        self.assertTrue(self.failureResultOf(calls[2], ConnectionLost).value.may_have_started)

    def test_progress_before_it(self) -> None:
        """A daemon that has run anything knows the caller, so its end is a plain loss."""
        calls, daemon = self.asked(2)
        daemon.send(id=daemon.requests[0]["id"], progress={"done": 1})
        self.refuse(daemon, 1)
        self.failureResultOf(calls[1], Unauthorized)
        daemon.hang_up()
        self.assertTrue(self.failureResultOf(calls[0], ConnectionLost).value.may_have_started)

    def test_calls_after_it(self) -> None:
        """A call that was sent since then may have been started: the daemon had not closed."""
        calls, daemon = self.asked(1)
        self.refuse(daemon, 0)
        self.failureResultOf(calls[0], Unauthorized)
        later = self.client.call("g")
        daemon.hang_up()
        self.assertTrue(self.failureResultOf(later, ConnectionLost).value.may_have_started)


class OddInputTests(ClientTestCase):
    """Whatever a program hands over, it comes back as a failure, never as an exception."""

    def test_a_timeout_that_cannot_be(self) -> None:
        """A timeout that is no number of seconds above zero fails the call, and nothing is sent."""
        daemon = self.connected()
        for timeout in (0, -1, float("nan"), float("inf"), 1e300, "5", [], 1j, object()):
            called = self.client.call("f", timeout=timeout)
            self.failureResultOf(called, ValueError)
        self.assertEqual(len(daemon.requests), 1)

    def test_arguments_that_json_cannot_carry(self) -> None:
        """Arguments that JSON cannot carry fail the call, and nothing is sent."""
        daemon = self.connected()
        endless: list[Any] = []
        endless.append(endless)
        for value in ({1}, b"x", object(), float("nan"), {1: 2}, "\ud800", endless, 10**5000):
            for called in (self.client.call("f", value), self.client.call("f", a=value)):
                self.failureResultOf(called, BadArguments)
        self.assertEqual(len(daemon.requests), 1)
        self.assertEqual(daemon.client.in_flight, 0)

    def test_a_priority_that_cannot_be(self) -> None:
        """A priority that is no integer within the bounds fails the call, and nothing is sent."""
        daemon = self.connected()
        for priority in (MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 1.0, True, "1", None, object()):
            called = self.client.call_with("f", priority=priority)
            self.failureResultOf(called, ValueError)
        self.assertEqual(len(daemon.requests), 1)

    def test_an_end_that_cannot_be(self) -> None:
        """Anything but true and false for the end of the connection fails the call."""
        daemon = self.connected()
        for value in (1, 0, "yes", None):
            called = self.client.call_with("f", cancel_on_disconnect=value)
            self.failureResultOf(called, ValueError)
        self.assertEqual(len(daemon.requests), 1)

    def test_arguments_of_a_wrong_type(self) -> None:
        """Arguments that are no list, tuple or dictionary fail the call, and nothing is sent."""
        daemon = self.connected()
        for args in ({1, 2}, b"x", object(), iter(()), None, 5, "text"):
            self.failureResultOf(self.client.call_with("f", args), BadArguments)
        self.assertEqual(len(daemon.requests), 1)

    def test_a_function_that_is_no_name(self) -> None:
        """A function that is no string, or none that can be sent, fails the call."""
        daemon = self.connected()
        for function in (object(), b"f", {1}, None, 5, ["f"]):
            self.failureResultOf(self.client.call(function), UnknownFunction)
        self.failureResultOf(self.client.call("\ud800"), BadArguments)
        self.assertEqual(len(daemon.requests), 1)

    def test_without_a_connection(self) -> None:
        """What cannot be sent fails when its connection stands, and does no harm to others."""
        bad, good = self.client.call("f", {1}), self.client.call("g")
        daemon = self.endpoint.accept()
        self.failureResultOf(bad, BadArguments)
        daemon.send(id=daemon.requests[0]["id"], result="fine")
        self.assertEqual(self.successResultOf(good), "fine")

    def test_a_client_that_cannot_be(self) -> None:
        """A client is refused an endpoint and numbers that cannot be."""
        for keywords in ({"pool": 0}, {"connect_timeout": 0}, {"connect_timeout": -1.0}):
            with self.assertRaises(ValueError):
                TaskClient(self.loop, self.endpoint, **keywords)
        for description in ("", "nonsense", "tcp:127.0.0.1", "tcp:127.0.0.1:http!", "tls:"):
            with self.assertRaises(ValueError, msg=description):
                TaskClient(self.loop, description)


class FactoryTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.lost: list[TaskClientProtocol] = []
        self.factory = TaskClientFactory(self.loop, self.lost.append)

    def connect(self) -> ScriptedDaemon:
        return ScriptedDaemon(self.factory.buildProtocol(None))

    def test_calls_before_it_stands(self) -> None:
        """Calls made before the connection stands are sent, in their order, when it does."""
        self.factory.call("f", 1)
        self.factory.call_with("f", {"a": 2})
        daemon = self.connect()
        self.factory.call("f", 3)
        self.assertEqual([request["args"] for request in daemon.requests], [[1], {"a": 2}, [3]])

    def test_no_connection(self) -> None:
        """When no connection can be made all calls fail, early and late."""
        early = self.factory.call("f", timeout=5)
        self.factory.clientConnectionFailed(None, Failure(_DEAD))
        for called in (early, self.factory.call("f")):
            failure = self.failureResultOf(called, ConnectFailed)
            self.assertIn("nobody listens there", str(failure.value))
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_no_connection_in_time(self) -> None:
        """A call whose limit passes before the connection stands is never sent."""
        called = self.factory.call("f", timeout=5)
        self.loop.advance(5)
        self.failureResultOf(called, TimeLimitExceeded)
        self.assertEqual(self.connect().requests, [])

    def test_an_endpoint_that_cannot_connect(self) -> None:
        """When an endpoint gives up, which tells the factory only to stop, all calls fail."""
        early = self.factory.call("f", timeout=5)
        self.factory.doStart()
        self.assertNoResult(early)
        self.factory.doStop()
        for called in (early, self.factory.call("f")):
            self.failureResultOf(called, ConnectFailed)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_real_endpoint_that_cannot_connect(self) -> None:
        """The same is so for an endpoint of Twisted's whose connection is refused."""
        reactor = MemoryReactorClock()
        attempt = TCP4ClientEndpoint(reactor, "127.0.0.1", 1).connect(self.factory)
        called = self.factory.call("f")
        _, _, wrapper, _, _ = reactor.tcpClients[0]
        wrapper.doStart()
        wrapper.clientConnectionFailed(None, Failure(_DEAD))
        wrapper.doStop()
        self.failureResultOf(attempt, ConnectError)
        self.failureResultOf(called, ConnectFailed)

    def test_stopping_after_a_connection(self) -> None:
        """A factory that stops after its connection has gone says what had happened before."""
        self.factory.doStart()
        self.connect().hang_up()
        self.factory.doStop()
        self.failureResultOf(self.factory.call("f"), ConnectionLost)

    def test_the_same_terms(self) -> None:
        """What a call may ask for is what a client's may."""
        daemon = self.connect()
        self.factory.call_with("f", priority=2, cancel_on_disconnect=True)
        request = daemon.requests[0]
        self.assertEqual((request["priority"], request["cancel_on_disconnect"]), (2, True))

    def test_a_lost_connection(self) -> None:
        """Calls after a loss fail, certainly not started, and the loss is told once."""
        daemon = self.connect()
        called = self.factory.call("f")
        daemon.hang_up()
        self.assertTrue(self.failureResultOf(called, ConnectionLost).value.may_have_started)
        later = self.failureResultOf(self.factory.call("f"), ConnectionLost)
        self.assertFalse(later.value.may_have_started)
        self.assertEqual(self.lost, [daemon.client])

    def test_close(self) -> None:
        """Closing waits for the calls in flight, and takes no more once it closes."""
        daemon = self.connect()
        called = self.factory.call("f")
        closed = self.factory.close()
        self.assertFalse(daemon.transport.disconnecting)
        daemon.send(id=daemon.requests[0]["id"], result="done")
        self.assertEqual(self.successResultOf(called), "done")
        self.assertTrue(daemon.transport.disconnecting)
        self.failureResultOf(self.factory.call("f"), ClientClosed)
        daemon.hang_up()
        self.assertIsNone(self.successResultOf(closed))
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_close_before_it_stands(self) -> None:
        """A connection that comes after closing is closed, not kept."""
        self.successResultOf(self.factory.close())
        self.assertTrue(self.connect().transport.disconnecting)

    def test_odd_input(self) -> None:
        """What cannot be sent fails the call."""
        self.connect()
        self.failureResultOf(self.factory.call("f", {1}), BadArguments)
        self.failureResultOf(self.factory.call("f", timeout=float("nan")), ValueError)
        self.failureResultOf(self.factory.call_with("f", priority=0.5), ValueError)
        self.failureResultOf(self.factory.call_with("f", "text"), BadArguments)
        self.failureResultOf(self.factory.call_with(5), UnknownFunction)
        self.failureResultOf(self.factory.call("f", 1, a=2), BadArguments)


class CallOnceTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.endpoint = ScriptedEndpoint()

    def test_a_result_that_is_not_waited_for(self) -> None:
        """Who cancels while the connection is closed has the result, and waits no longer."""
        called = call_once(self.loop, self.endpoint, "f", [1])
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], result="once")
        self.assertNoResult(called)
        called.cancel()
        self.assertEqual(self.successResultOf(called), "once")
        daemon.hang_up()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_result(self) -> None:
        """The result comes when the connection is closed again."""
        called = call_once(self.loop, self.endpoint, "f", [1], timeout=5)
        daemon = self.endpoint.accept()
        self.assertEqual(daemon.requests[0]["args"], [1])
        daemon.send(id=daemon.requests[0]["id"], result="once")
        self.assertTrue(daemon.transport.disconnecting)
        self.assertNoResult(called)
        daemon.hang_up()
        self.assertEqual(self.successResultOf(called), "once")
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_failures(self) -> None:
        """A failure comes when the connection is closed again."""
        called = call_once(self.loop, self.endpoint, "f")
        daemon = self.endpoint.accept()
        daemon.send(id=daemon.requests[0]["id"], error={"code": "overloaded", "message": ""})
        daemon.hang_up()
        self.failureResultOf(called, Overloaded)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_no_connection(self) -> None:
        """Without a connection in time it fails, and leaves nothing behind."""
        called = call_once(self.loop, self.endpoint, "f")
        self.loop.advance(10)
        self.failureResultOf(called, ConnectFailed)
        self.assertEqual(self.loop.getDelayedCalls(), [])
        self.assertEqual(self.endpoint.open_attempts, [])

    def test_the_wait_for_a_connection(self) -> None:
        """How long it waits for its connection may be told."""
        called = call_once(self.loop, self.endpoint, "f", connect_timeout=2.5)
        self.loop.advance(2.4)
        self.assertNoResult(called)
        self.loop.advance(0.1)
        self.failureResultOf(called, ConnectFailed)
        self.failureResultOf(
            call_once(self.loop, self.endpoint, "f", connect_timeout=0), ValueError
        )

    def test_cancel(self) -> None:
        """Cancelling it tells the daemon, and closes the connection."""
        called = call_once(self.loop, self.endpoint, "f")
        daemon = self.endpoint.accept()
        called.cancel()
        self.assertEqual(daemon.requests[-1]["function"], "taskd.cancel")
        self.assertTrue(daemon.transport.disconnecting)
        daemon.hang_up()
        self.failureResultOf(called, CancelledError)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_odd_input(self) -> None:
        """What cannot be is a failure, not an exception."""
        failed = call_once(self.loop, self.endpoint, "f", timeout=float("nan"))
        self.failureResultOf(failed, ValueError)
        self.assertEqual(self.endpoint.attempts, [])
        for description in ("", "nonsense", "tcp:127.0.0.1", "tcp:127.0.0.1:http!", "tls:"):
            self.failureResultOf(call_once(self.loop, description, "f"), ValueError)


@task(blocking=False)
def echo(value: Any = None) -> Any:
    """Give the value back."""
    return value


def render(pages: int) -> str:
    """Report each page, from a thread."""
    for page in range(pages):
        progress(page, pages)
    progress(pages, pages)
    return "rendered"


def broken() -> None:
    """Fail."""
    raise ValueError("no such page")


class RealDaemonTests(SynchronousTestCase):
    """The client against the server's own code, joined in memory."""

    def setUp(self) -> None:
        self.late: list[Deferred[Any]] = []

        @task(blocking=False)
        def later() -> Deferred[Any]:
            self.late.append(Deferred())
            return self.late[-1]

        self.daemon = MemoryDaemon(echo, render, broken, later, max_line_bytes=1024)
        self.client = TaskClient(self.daemon.loop, MemoryEndpoint(self.daemon), pool=2)

    def result_of(self, called: Deferred[Any]) -> Any:
        self.daemon.flush()
        while not called.called:
            self.daemon.loop.run_next()
            self.daemon.flush()
        return self.successResultOf(called)

    def failure_of(self, called: Deferred[Any], kind: type[Exception]) -> Any:
        outcome: list[Any] = []
        called.addErrback(outcome.append)
        self.result_of(called)
        self.assertIs(type(outcome[0].value), kind)
        return outcome[0].value

    def test_results(self) -> None:
        """A value comes back as it was."""
        for value in (None, 1.5, "é\n", [1, [2]], {"a": {"b": []}}):
            self.assertEqual(self.result_of(self.client.call("echo", value)), value)

    def test_many_calls(self) -> None:
        """Each of many calls at once gets its own result."""
        calls = [self.client.call("echo", number) for number in range(200)]
        self.assertEqual([self.result_of(called) for called in calls], list(range(200)))

    def test_failures(self) -> None:
        """What goes wrong at the daemon is the exception that stands for it."""
        failed = self.failure_of(self.client.call("broken"), TaskFailed)
        self.assertEqual((failed.message, failed.type), ("no such page", "ValueError"))
        self.flushLoggedErrors(ValueError)
        self.failure_of(self.client.call("nowhere"), UnknownFunction)
        self.failure_of(self.client.call("echo", 1, 2, 3), BadArguments)

    def test_progress(self) -> None:
        """A blocking task's reports arrive, the last one for certain, before its result."""
        told: list[Any] = []
        called = self.client.call("render", 5, on_progress=lambda *report: told.append(report))
        self.assertEqual(self.result_of(called), "rendered")
        self.assertEqual(told[-1], (5, 5, None))
        self.assertEqual(told, sorted(told))

    def test_time_limits(self) -> None:
        """The daemon's own answer to a time limit arrives before the client gives up."""
        called = self.client.call("later", timeout=5)
        self.daemon.flush()
        self.daemon.loop.advance(5)
        failed = self.failure_of(called, TimeLimitExceeded)
        self.assertIn("was not done within", failed.message)

    def test_cancel(self) -> None:
        """Cancelling a call cancels the task at the daemon."""
        called = self.client.call("later")
        self.daemon.flush()
        called.cancel()
        self.failureResultOf(called, CancelledError)
        self.daemon.flush()
        self.assertTrue(self.late[0].called)

    def test_a_request_that_is_too_long(self) -> None:
        """A request that is too long fails by its name; a later call connects again."""
        fine = self.client.call("echo", "before")
        self.failure_of(self.client.call("echo", "x" * 1000), errors.LineTooLong)
        self.assertEqual(self.result_of(fine), "before")
        self.assertEqual(self.result_of(self.client.call("echo", "after")), "after")

    def test_what_the_daemon_does_not_read(self) -> None:
        """A request that the daemon does not read fails as malformed, by the daemon's own words."""
        connection = TaskClientFactory(self.daemon.loop).buildProtocol(None)
        self.daemon.join(connection)
        called = connection.call("echo", [], Terms(priority=MAX_PRIORITY + 1))
        failed = self.failure_of(called, Malformed)
        self.assertIn('"priority" must be', failed.message)

    def test_a_daemon_that_stops(self) -> None:
        """A daemon that drains answers what runs, refuses what comes, and ends the connection."""
        endpoint = MemoryEndpoint(self.daemon)
        self.client = TaskClient(self.daemon.loop, endpoint, pool=1)
        running = self.client.call("later")
        self.daemon.flush()
        endpoint.connect = lambda _: fail(_DEAD)
        left: list[bool] = []
        self.daemon.factory.on_empty = lambda: left.append(True)
        self.daemon.factory.drain()
        refused = self.client.call_with("echo", timeout=1)
        self.late[0].callback("finished")
        self.assertEqual(self.result_of(running), "finished")
        self.daemon.flush()
        self.assertEqual(left, [True])
        self.daemon.loop.advance(1)
        self.failure_of(refused, TimeLimitExceeded)

    def test_close(self) -> None:
        """A client that is closed leaves neither connections nor delayed calls behind."""
        self.result_of(self.client.call("echo"))
        self.result_of(self.client.close())
        self.assertEqual(self.daemon.factory.open_connections, 0)
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_one_call(self) -> None:
        """A single call leaves no connection behind."""
        called = call_once(self.daemon.loop, MemoryEndpoint(self.daemon), "echo", ["once"])
        self.assertEqual(self.result_of(called), "once")
        self.assertEqual(self.daemon.factory.open_connections, 0)
