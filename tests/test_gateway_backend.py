"""The way to the daemons: whose connections a call takes, and what its failure is called."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectError, ConnectionLost
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd import errors
from taskd.client import TaskClient
from taskd.errors import CallError, InternalError, WorkerLost
from taskd.gateway.backend import Backend
from tests.support import Loop, ScriptedEndpoint, log_of
from tests.test_gateway_site import new_figures

SECRETS = ("10.0.0.7", "12345", "/run/taskd.sock", "tcp:")


class Unread(TaskClient):
    """A client whose daemons read nothing."""

    unsent_bytes = 64 * 2**20


class BackendTestCase(SynchronousTestCase):
    own_token: str | None = None
    passes_on = True

    def setUp(self) -> None:
        self.loop = Loop()
        self.made: list[tuple[str | None, ScriptedEndpoint, TaskClient]] = []
        self.log = log_of(self, "gateway")
        self.figures = new_figures()
        self.backend = Backend(
            self.loop,
            self.connect,
            self.own_token,
            passes_on=self.passes_on,
            max_calls=2,
            figures=self.figures,
        )

    def connect(self, token: str | None) -> TaskClient:
        endpoint = ScriptedEndpoint()
        client = TaskClient(
            self.loop, endpoint, token=token, pool=1, connect_timeout=5.0, jitter=lambda: 0.5
        )
        self.made.append((token, endpoint, client))
        return client

    @property
    def tokens(self) -> list[str | None]:
        """The tokens for which connections were made."""
        return [token for token, _, _ in self.made]

    def is_closed(self, client: TaskClient) -> bool:
        """Tell whether a client takes no more calls."""
        called = client.call("f")
        if called.called:
            self.failureResultOf(called, errors.ClientClosed)
            return True
        called.addErrback(lambda _: None)
        called.cancel()
        return False


class TenantTests(BackendTestCase):
    own_token = "the gateway's own"

    def test_nobody(self) -> None:
        """Nothing is made before somebody calls."""
        self.assertEqual(self.tokens, [])

    def test_each_token(self) -> None:
        """Each token has connections of its own; who shows none has the gateway's."""
        tenants = [self.backend.tenant(token) for token in ("", "a", "b", "a", "")]
        self.assertEqual(self.tokens, ["the gateway's own", "a", "b"])
        self.assertIs(tenants[0], tenants[4])
        self.assertIs(tenants[1], tenants[3])
        self.assertIsNot(tenants[1], tenants[2])
        self.assertEqual([t.visitors for t in tenants], [2, 2, 1, 2, 2])

    def test_what_is_shown_to_the_daemon(self) -> None:
        """A call of who has shown a token comes to the daemon with that token, before all else."""
        self.backend.tenant("a").client.call("f").addErrback(lambda _: None)
        daemon = self.made[0][1].accept()
        first = daemon.requests[0]
        self.assertEqual((first["function"], first["args"]), ("taskd.auth", {"token": "a"}))

    def test_lingering(self) -> None:
        """Connections are kept for a minute after the last who has shown the token has gone."""
        first, second = self.backend.tenant("a"), self.backend.tenant("a")
        first.leave()
        self.loop.advance(1000)
        self.assertFalse(self.is_closed(first.client))
        second.leave()
        self.loop.advance(59)
        self.assertFalse(self.is_closed(first.client))
        self.loop.advance(1.1)
        self.assertTrue(self.is_closed(first.client))
        self.assertIsNot(self.backend.tenant("a"), first)
        self.assertEqual(self.tokens, ["a", "a"])

    def test_who_comes_back(self) -> None:
        """Who comes back within that minute finds the connections, for as long as it stays."""
        tenant = self.backend.tenant("a")
        for _ in range(3):
            tenant.leave()
            self.loop.advance(59)
            self.assertIs(self.backend.tenant("a"), tenant)
        self.loop.advance(1000)
        self.assertFalse(self.is_closed(tenant.client))
        self.assertEqual(tenant.visitors, 1)

    def test_the_gateways_own(self) -> None:
        """The gateway's own connections are kept for good."""
        tenant = self.backend.tenant()
        tenant.leave()
        self.assertEqual(self.loop.getDelayedCalls(), [])
        self.assertFalse(self.is_closed(tenant.client))


class LoadTests(BackendTestCase):
    """What all callers together may have in flight."""

    def test_calls(self) -> None:
        """So many calls may be in flight, whoever made them; the next is told to come again."""
        first, second = self.backend.tenant("a"), self.backend.tenant("b")
        calls = [first.call("f", [1], 10, "x"), second.call("f", [2], 10, "y", timeout=3.0)]
        error: Any = self.failureResultOf(second.call("f", [3], 10, "z"), errors.Overloaded).value
        self.assertEqual((error.retry_after, error.retryable), (1.0, True))
        self.assertEqual(self.figures.get("outstanding"), 2)
        self.assertEqual(self.figures.get("refused_room"), 1)
        self.loop.advance(3.1)
        self.failureResultOf(calls[1], errors.TimeLimitExceeded)
        self.assertEqual(self.figures.get("outstanding"), 1)
        calls.append(second.call("f", [3], 10, "z"))
        self.assertNoResult(calls[2])
        for call in (calls[0], calls[2]):
            call.addErrback(lambda _: None)
            call.cancel()
        self.assertEqual(self.figures.get("outstanding"), 0)

    def test_bytes(self) -> None:
        """So many bytes of requests may be on their way, and no more."""
        tenant = self.backend.tenant()
        most = 64 * 2**20
        call = tenant.call("f", [1], most, "x")
        self.failureResultOf(tenant.call("f", [2], 1, "y"), errors.Overloaded)
        self.failureResultOf(self.backend.tenant("a").call("f", [2], 1, "y"), errors.Overloaded)
        call.addErrback(lambda _: None)
        call.cancel()
        self.failureResultOf(tenant.call("f", [1], most + 1, "x"), errors.Overloaded)
        again = tenant.call("f", [2], most, "x")
        self.assertNoResult(again)
        again.addErrback(lambda _: None)

    def test_shares(self) -> None:
        """Nobody may have more than half of all, whatever connections it takes."""
        first, second = self.backend.tenant("a"), self.backend.tenant("b")
        call = first.call("f", [1], 10, "x")
        self.failureResultOf(second.call("f", [2], 10, "x"), errors.Overloaded)
        self.assertNoResult(second.call("f", [3], 10, "y"))
        call.addErrback(lambda _: None)
        call.cancel()
        self.assertNoResult(first.call("f", [4], 10, "x"))

    def test_what_is_not_read(self) -> None:
        """What is over already and was never read takes room all the same."""
        backend = Backend(
            self.loop,
            lambda _: Unread(self.loop, ScriptedEndpoint()),
            None,
            passes_on=True,
            max_calls=2,
            figures=self.figures,
        )
        tenant = backend.tenant()
        self.assertFalse(tenant.is_stuck)
        self.failureResultOf(tenant.call("f", [1], 1, "x"), errors.Overloaded)

    def test_what_cannot_be_asked(self) -> None:
        """What fails at once takes no room."""
        tenant = self.backend.tenant()
        for _ in range(5):
            self.failureResultOf(tenant.call("f", [], 10, "x", timeout=-1.0), ValueError)
        self.assertEqual(self.figures.get("outstanding"), 0)


class NoTokenTests(BackendTestCase):
    def test_none(self) -> None:
        """A gateway without a token shows none."""
        self.backend.tenant()
        self.assertEqual(self.tokens, [None])


class KeepTests(BackendTestCase):
    own_token = "the gateway's own"
    passes_on = False

    def test_tokens_stay_here(self) -> None:
        """Where tokens are not passed on all callers share the gateway's connections."""
        tenants = {self.backend.tenant(token) for token in ("", "a", "b")}
        self.assertEqual((len(tenants), self.tokens), (1, ["the gateway's own"]))
        for tenant in tenants:
            for _ in range(3):
                tenant.leave()
        self.assertEqual(self.loop.getDelayedCalls(), [])


class ErrorTests(BackendTestCase):
    def error_of(self, error: BaseException) -> CallError:
        told = self.backend.error_of(Failure(error))
        text = f"{told.message} {told.details}"
        for secret in SECRETS:
            self.assertNotIn(secret, text)
        return told

    def test_what_a_daemon_answers(self) -> None:
        """What a daemon has answered is told on as it is."""
        for kind in (
            *(errors.TaskFailed, errors.TimeLimitExceeded, errors.UnknownFunction),
            *(errors.BadArguments, errors.Overloaded, errors.ShuttingDown, errors.WorkerLost),
        ):
            error = kind("why", more=1)
            self.assertIs(self.error_of(error), error)
        self.assertEqual(self.log, [])

    def test_no_connection(self) -> None:
        """That no daemon can be reached is told without where it is; the log says where."""
        for kind in (
            *(errors.ConnectFailed, errors.CertificateNotTrusted, errors.WrongServerName),
            *(errors.ClientCertificateRefused, errors.ClientClosed, errors.ClientError),
        ):
            told = self.error_of(kind("no connection to tcp:10.0.0.7:12345 within 5 s"))
            self.assertIs(type(told), WorkerLost)
            self.assertTrue(told.retryable)
            self.assertIs(told.details["may_have_started"], False)
        (line,) = self.log
        self.assertIn("warn: a call came to no daemon: no connection to tcp:10.0.0.7:12345", line)

    def test_how_often_it_is_logged(self) -> None:
        """That is logged once a minute, with how often it was left out."""
        for _ in range(5):
            self.error_of(errors.ConnectFailed("tcp:10.0.0.7:12345 {x}"))
        self.loop.advance(61)
        self.error_of(errors.ConnectFailed("another"))
        self.assertEqual(len(self.log), 2)
        self.assertIn("{x}", self.log[0])
        self.assertTrue(self.log[1].endswith("another (4 more were not logged)"), self.log[1])

    def test_a_lost_connection(self) -> None:
        """A connection that was lost is a lost worker, with what is known of the task."""
        for may_have_started in (True, False):
            error = errors.ConnectionLost(
                "the connection to tcp:10.0.0.7:12345 was lost", may_have_started=may_have_started
            )
            told = self.error_of(error)
            self.assertIs(type(told), WorkerLost)
            expected = {} if may_have_started else {"may_have_started": False}
            self.assertEqual(told.details, expected)

    def test_anything_else(self) -> None:
        """What nobody foresaw is told as a bug, without what it was, and logged."""
        told = self.error_of(ValueError("10.0.0.7"))
        self.assertIs(type(told), InternalError)
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)

    def test_with_real_clients(self) -> None:
        """Whatever ends a real call, its caller reads no address."""
        for act in ("refuse", "lose", "timeout"):
            called = self.backend.tenant(act).client.call("f", timeout=2.0)
            endpoint = self.made[-1][1]
            if act == "refuse":
                for _ in range(30):
                    for number in endpoint.open_attempts:
                        endpoint.refuse(ConnectError(string="to 10.0.0.7:12345"), number)
                    self.loop.advance(0.5)
            elif act == "lose":
                daemon = endpoint.accept()
                daemon.send(id=daemon.requests[0].get("id"), result=act)
                daemon.hang_up(ConnectionLost("10.0.0.7:12345"))
            self.loop.advance(3)
            failure: Any = self.failureResultOf(called)
            told = self.error_of(failure.value)
            self.assertIn(told.code, ("worker-lost", "time-limit"))
