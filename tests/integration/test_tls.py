"""The client over TLS: to a daemon behind a TLS terminator, and to servers of all kinds."""

from __future__ import annotations

import datetime
import json
import socket
import sys
from typing import Any

import trustme
from OpenSSL.SSL import (
    TLS_SERVER_METHOD,
    VERIFY_FAIL_IF_NO_PEER_CERT,
    VERIFY_PEER,
    Context,
)
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.error import ProcessTerminated
from twisted.internet.interfaces import IOpenSSLContextFactory
from twisted.internet.protocol import Factory, ProcessProtocol, Protocol
from twisted.protocols.basic import LineOnlyReceiver
from twisted.protocols.portforward import ProxyFactory
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from taskd.client import TaskClient, TaskClientFactory, call_once
from taskd.destination import endpoint_of
from taskd.errors import (
    CertificateExpired,
    CertificateNotTrusted,
    ClientCertificateRefused,
    ConnectFailed,
    ConnectionLost,
    TaskFailed,
    TlsFailed,
    Unauthorized,
    WrongServerName,
)
from taskd.wire import ALPN
from tests.integration.daemon import shared_daemon, temporary_directory

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)

MUCH_TOO_LONG_SECONDS = 1000.0
"""A time to wait for a connection, for failures that must not wait for it."""

_KILLED = """
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
with socket.create_server(("127.0.0.1", 0)) as port:
    print(port.getsockname()[1], flush=True)
    connection, _ = port.accept()
    with context.wrap_socket(connection, server_side=True) as tls:
        print(tls.recv(1000), flush=True)
        sys.stdin.read()
"""
"""A server that takes one request, and answers nothing."""


@implementer(IOpenSSLContextFactory)
class _Given:
    """Give one context to every connection."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def getContext(self) -> Context:
        return self._context


class _Answering(LineOnlyReceiver):
    """A daemon that does what its factory says with each request."""

    delimiter = b"\n"
    factory: Any

    def lineReceived(self, line: bytes) -> None:
        request = json.loads(line)
        self.factory.requests.append(request)
        self.factory.answer(self, request)

    def send(self, **message: Any) -> None:
        self.sendLine(json.dumps(message).encode())


def _echo(connection: _Answering, request: dict[str, Any]) -> None:
    connection.send(id=request["id"], result=request["args"])


class _HangingUp(Protocol):
    """A server that has nothing to say."""

    def connectionMade(self) -> None:
        self.transport.loseConnection()


class _Plain(Protocol):
    """A server that answers in plain text."""

    def dataReceived(self, _: bytes) -> None:
        self.transport.write(b'{"error":{"code":"malformed","message":"not UTF-8"}}\n')
        self.transport.loseConnection()


class _Killed(ProcessProtocol):
    """A server in a process of its own, to be killed."""

    def __init__(self) -> None:
        self.lines: DeferredQueue[bytes] = DeferredQueue()
        self.ended: Deferred[Any] = Deferred()
        self._rest = b""

    def outReceived(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.lines.put(line)

    def processEnded(self, reason: Failure) -> None:
        self.ended.errback(reason)


class TlsTestCase(TestCase):
    """Base of tests that have certificates and servers of TLS."""

    timeout = 30

    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.directory = temporary_directory(self)
        self.ca = self.file("ca.pem", self.authority.cert_pem)

    def file(self, name: str, pem: trustme.Blob) -> str:
        path = self.directory / name
        pem.write_to_path(str(path))
        return str(path)

    def listen(
        self, factory: Any, issued: trustme.LeafCert, clients: trustme.CA | None = None
    ) -> str:
        """Start a server; describe the way to it."""
        context = Context(TLS_SERVER_METHOD)
        context.set_alpn_select_callback(lambda *_: ALPN)
        issued.configure_cert(context)
        if clients is not None:
            clients.configure_trust(context)
            context.set_verify(VERIFY_PEER | VERIFY_FAIL_IF_NO_PEER_CERT)
        factory.noisy = False
        port = reactor.listenSSL(0, factory, _Given(context), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        return f"tls:localhost:{port.getHost().port}"

    def serve(
        self,
        issued: trustme.LeafCert | None = None,
        answer: Any = _echo,
        clients: trustme.CA | None = None,
    ) -> tuple[str, list[dict[str, Any]]]:
        """Start a server that answers by a function; give the way to it, and its requests."""
        factory: Any = Factory.forProtocol(_Answering)
        factory.requests = []
        factory.answer = answer
        issued = issued or self.authority.issue_cert("localhost", "127.0.0.1")
        return self.listen(factory, issued, clients), factory.requests

    def client(self, endpoint: str, **options: Any) -> TaskClient:
        options = {"ca": self.ca, "pool": 1, "connect_timeout": MUCH_TOO_LONG_SECONDS, **options}
        client = TaskClient(reactor, endpoint, **options)
        self.addCleanup(client.close)
        return client

    async def failure_of(self, called: Deferred[Any], kind: type[Exception]) -> Any:
        error = await self.assertFailure(called, kind)
        self.assertIs(type(error), kind)
        return error


class DaemonTests(TlsTestCase):
    """A relay in this process takes TLS and passes on plain TCP to the daemon."""

    def setUp(self) -> None:
        super().setUp()
        self.daemon = shared_daemon(procs=1)

    def endpoint(self) -> str:
        relay = ProxyFactory("127.0.0.1", self.daemon.port)
        return self.listen(relay, self.authority.issue_cert("localhost"))

    async def test_calls(self) -> None:
        """Calls over TLS, to a server whose certificate is for its name, are served."""
        client = TaskClient(reactor, self.endpoint(), ca=self.ca, pool=2)
        self.assertEqual(await client.call("add", 1, 2), 3)
        calls = [client.call("at_once", n) for n in range(100)]
        self.assertEqual([await called for called in calls], list(range(100)))
        text = "é" * 400_000
        self.assertEqual(await client.call("echo", text), text)
        await self.assertFailure(client.call("fail", "why"), TaskFailed)
        await client.close()

    async def test_twisteds_own_parameters(self) -> None:
        """What a ``tls:`` string of Twisted's says is enough to be served."""
        endpoint = f"{self.endpoint()}:trustRoots={self.directory}:timeout=20"
        self.assertEqual(await call_once(reactor, endpoint, "add", [1, 2]), 3)

    async def test_call_once(self) -> None:
        """One call over a TLS connection of its own is served."""
        self.assertEqual(await call_once(reactor, self.endpoint(), "add", [1, 2], ca=self.ca), 3)

    async def test_a_daemon_without_tls(self) -> None:
        """A daemon that speaks no TLS is refused at once."""
        client = self.client(f"tls:localhost:{self.daemon.port}")
        await self.failure_of(client.call("add", 1, 2), TlsFailed)


class ServerTests(TlsTestCase):
    """Which servers are taken for the right one."""

    async def test_an_address(self) -> None:
        """A server is reached by an IP address that its certificate has."""
        endpoint, _ = self.serve()
        endpoint = endpoint.replace("localhost", "127.0.0.1")
        self.assertEqual(await self.client(endpoint).call("f", 1), [1])

    async def refused(self, issued: trustme.LeafCert, kind: type[Exception]) -> str:
        """See a server refused by a client, by a single call, and by a factory."""
        endpoint, requests = self.serve(issued)
        client = self.client(endpoint)
        errors = [await self.failure_of(client.call("f"), kind) for _ in range(2)]
        once = call_once(
            reactor, endpoint, "f", ca=self.ca, token="t", connect_timeout=MUCH_TOO_LONG_SECONDS
        )
        errors.append(await self.failure_of(once, kind))
        factory = TaskClientFactory(reactor)
        calls = [factory.call("f")]
        await endpoint_of(reactor, endpoint, ca=self.ca).connect(factory)
        errors.append(await self.failure_of(calls[0], kind))
        errors.append(await self.failure_of(factory.call("f"), kind))
        self.assertEqual(requests, [])
        (told,) = {str(error) for error in errors}
        return told

    async def test_another_name(self) -> None:
        """A certificate for another name is refused, and the failure says so."""
        told = await self.refused(self.authority.issue_cert("a.example"), WrongServerName)
        self.assertIn("is for a.example and not for localhost", told)

    async def test_expired(self) -> None:
        """A certificate that has expired is refused, and the failure says so."""
        issued = self.authority.issue_cert(
            "localhost", not_before=NOW - 9 * DAY, not_after=NOW - DAY
        )
        self.assertIn("expired", await self.refused(issued, CertificateExpired))

    async def test_unknown_authority(self) -> None:
        """A certificate that nobody trusted has signed is refused, and the failure says so."""
        issued = trustme.CA().issue_cert("localhost")
        self.assertIn("issued by", await self.refused(issued, CertificateNotTrusted))

    async def test_the_platforms_authorities(self) -> None:
        """Without authorities of its own a client does not trust just anybody."""
        endpoint, requests = self.serve()
        client = TaskClient(reactor, endpoint, connect_timeout=MUCH_TOO_LONG_SECONDS)
        self.addCleanup(client.close)
        await self.failure_of(client.call("f"), CertificateNotTrusted)
        self.assertEqual(requests, [])

    async def test_a_server_that_hangs_up(self) -> None:
        """A server that ends the handshake without a word is asked about TLS by the failure."""
        port = reactor.listenTCP(0, Factory.forProtocol(_HangingUp), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        client = self.client(f"tls:localhost:{port.getHost().port}")
        error = await self.failure_of(client.call("f"), TlsFailed)
        self.assertIn("ended during the TLS handshake", str(error))

    async def test_a_server_without_tls(self) -> None:
        """A server that answers the handshake in plain text is known for it."""
        port = reactor.listenTCP(0, Factory.forProtocol(_Plain), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        client = self.client(f"tls:localhost:{port.getHost().port}")
        error = await self.failure_of(client.call("f"), TlsFailed)
        self.assertIn("does not speak TLS", str(error))

    async def test_a_server_that_is_silent(self) -> None:
        """A server that says nothing to the handshake holds up neither a call nor closing."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"tls:localhost:{silent.getsockname()[1]}"
            called = call_once(reactor, endpoint, "f", ca=self.ca, connect_timeout=0.2)
            await self.failure_of(called, ConnectFailed)


class ClientCertificateTests(TlsTestCase):
    """A server that wants to know its clients."""

    def setUp(self) -> None:
        super().setUp()
        self.clients = trustme.CA()

    def own(self, authority: trustme.CA, **terms: Any) -> tuple[str, str]:
        """Issue a certificate to a client; give the files of chain and key."""
        issued = authority.issue_cert("client", **terms)
        chain = self.directory / "client.pem"
        chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return str(chain), self.file("client.key", issued.private_key_pem)

    async def test_one_that_is_taken(self) -> None:
        """A certificate that the server trusts is taken, an authority between sent along."""
        endpoint, _ = self.serve(clients=self.clients)
        for authority in (self.clients, self.clients.create_child_ca()):
            client = self.client(endpoint, certificate=self.own(authority))
            self.assertEqual(await client.call("f", 1), [1])
        issued = self.clients.issue_cert("client")
        both = self.file("both.pem", issued.private_key_and_cert_chain_pem)
        self.assertEqual(
            await call_once(reactor, endpoint, "f", [1], ca=self.ca, certificate=both), [1]
        )
        self.assertEqual(
            await call_once(
                reactor, f"{endpoint}:trustRoots={self.directory}:certificate={both}", "f", [1]
            ),
            [1],
        )

    async def test_none(self) -> None:
        """Without a certificate all calls fail, those in flight and those that wait."""
        endpoint, requests = self.serve(clients=self.clients)
        client = self.client(endpoint, token="secret")
        calls = [client.call("f") for _ in range(3)]
        for called in calls:
            error = await self.failure_of(called, ClientCertificateRefused)
            self.assertIn("got none", str(error))
        waiting = client.call("f")
        await self.failure_of(waiting, ClientCertificateRefused)
        self.assertEqual(requests, [])

    async def test_one_that_is_not_trusted(self) -> None:
        """A certificate of another authority is refused, as is one that has expired."""
        endpoint, requests = self.serve(clients=self.clients)
        old = {"not_before": NOW - 9 * DAY, "not_after": NOW - DAY}
        for authority, terms, why in (
            (trustme.CA(), {}, "unknown ca"),
            (self.clients, old, "certificate expired"),
        ):
            own = self.own(authority, **terms)
            error = await self.failure_of(
                self.client(endpoint, certificate=own).call("f"), ClientCertificateRefused
            )
            self.assertIn(why, str(error))
            factory = TaskClientFactory(reactor)
            called = factory.call("f")
            await endpoint_of(reactor, endpoint, ca=self.ca, certificate=own).connect(factory)
            await self.failure_of(called, ClientCertificateRefused)
        self.assertEqual(requests, [])


class EndTests(TlsTestCase):
    """How a connection over TLS ends, and what that says."""

    async def test_a_close(self) -> None:
        """A server that closes in order has not started what it did not answer."""
        endpoint, _ = self.serve(answer=lambda connection, _: connection.transport.loseConnection())
        error = await self.failure_of(self.client(endpoint).call("f"), ConnectionLost)
        self.assertFalse(error.may_have_started)

    async def test_an_abort(self) -> None:
        """A server that breaks off may have started what it did not answer."""
        endpoint, _ = self.serve(
            answer=lambda connection, _: connection.transport.transport.abortConnection()
        )
        error = await self.failure_of(self.client(endpoint).call("f"), ConnectionLost)
        self.assertTrue(error.may_have_started)

    async def test_a_bare_end(self) -> None:
        """An end of the TCP stream without the close alert says nothing of what was started."""
        endpoint, _ = self.serve(
            answer=lambda connection, _: connection.transport.transport.loseConnection()
        )
        error = await self.failure_of(self.client(endpoint).call("f"), ConnectionLost)
        self.assertTrue(error.may_have_started)

    async def test_a_killed_server(self) -> None:
        """A server that is killed may have started what it did not answer."""
        issued = self.authority.issue_cert("localhost")
        pem = self.file("server.pem", issued.private_key_and_cert_chain_pem)
        server = _Killed()
        process = reactor.spawnProcess(
            server, sys.executable, [sys.executable, "-c", _KILLED, pem], env=None
        )
        port = int(await server.lines.get())
        called = self.client(f"tls:localhost:{port}").call("f")
        self.assertIn(b'"function":"f"', await server.lines.get())
        process.signalProcess("KILL")
        error = await self.failure_of(called, ConnectionLost)
        self.assertTrue(error.may_have_started)
        await self.assertFailure(server.ended, ProcessTerminated)


class TokenTests(TlsTestCase):
    """A server that wants a token."""

    def answer(self, connection: Any, request: dict[str, Any]) -> None:
        if request["function"] != "taskd.auth":
            _echo(connection, request)
        elif request["args"] == {"token": "right"}:
            connection.send(id=request["id"], result=True)
        else:
            error = {"code": "unauthorized", "message": "nobody has this token"}
            connection.send(id=request["id"], error=error)
            connection.transport.loseConnection()

    async def test_the_right_one(self) -> None:
        """The token is shown once on a connection, before its calls."""
        endpoint, requests = self.serve(answer=self.answer)
        client = self.client(endpoint, token="right")
        self.assertEqual(await client.call("f", 1), [1])
        self.assertEqual(await client.call("g", 2), [2])
        self.assertEqual([r["function"] for r in requests], ["taskd.auth", "f", "g"])

    async def test_a_wrong_one(self) -> None:
        """With a wrong token all calls fail by the daemon's words, however they are made."""
        endpoint, _ = self.serve(answer=self.answer)
        client = self.client(endpoint, token="wrong")
        calls = [client.call("f") for _ in range(3)]
        calls.append(call_once(reactor, endpoint, "f", ca=self.ca, token="wrong"))
        factory = TaskClientFactory(reactor, token="wrong")
        calls.append(factory.call("f"))
        await endpoint_of(reactor, endpoint, ca=self.ca).connect(factory)
        for called in calls:
            error = await self.failure_of(called, Unauthorized)
            self.assertEqual(str(error), "nobody has this token")
