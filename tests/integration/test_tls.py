"""The client over TLS, to a daemon behind a TLS terminator."""

from __future__ import annotations

from typing import Any

import trustme
from OpenSSL.SSL import TLS_SERVER_METHOD, Context
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IOpenSSLContextFactory
from twisted.protocols.portforward import ProxyFactory
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from taskd.client import TaskClient, call_once
from taskd.errors import ConnectFailed, ConnectionLost, TaskFailed
from tests.integration.daemon import shared_daemon, temporary_directory


@implementer(IOpenSSLContextFactory)
class _Given:
    """Give one context to every connection."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def getContext(self) -> Context:
        return self._context


class TlsTests(TestCase):
    """A relay in this process takes TLS and passes on plain TCP to the daemon."""

    timeout = 30

    def setUp(self) -> None:
        self.daemon = shared_daemon(procs=1)
        self.authority = trustme.CA()
        self.trusted = temporary_directory(self)
        self.authority.cert_pem.write_to_path(str(self.trusted / "authority.pem"))

    def endpoint(self, authority: trustme.CA, *names: str) -> str:
        """Start a relay whose certificate is for these names; describe the way to it."""
        context = Context(TLS_SERVER_METHOD)
        authority.issue_cert(*names).configure_cert(context)
        relay = ProxyFactory("127.0.0.1", self.daemon.port)
        relay.noisy = False
        port = reactor.listenSSL(0, relay, _Given(context), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        return f"tls:localhost:{port.getHost().port}:trustRoots={self.trusted}"

    async def failure_of(self, called: Deferred[Any]) -> str:
        error = await self.assertFailure(called, ConnectFailed, ConnectionLost)
        # Nothing was sent, so the task has certainly not run.
        self.assertFalse(getattr(error, "may_have_started", False))
        return str(error)

    async def test_calls(self) -> None:
        """Calls over TLS, to a server whose certificate is for its name, are served."""
        client = TaskClient(reactor, self.endpoint(self.authority, "localhost"), pool=2)
        self.assertEqual(await client.call("add", 1, 2), 3)
        calls = [client.call("at_once", n) for n in range(100)]
        self.assertEqual([await called for called in calls], list(range(100)))
        text = "é" * 400_000
        self.assertEqual(await client.call("echo", text), text)
        await self.assertFailure(client.call("fail", "why"), TaskFailed)
        await client.close()

    async def test_call_once(self) -> None:
        """One call over a TLS connection of its own is served."""
        endpoint = self.endpoint(self.authority, "localhost")
        self.assertEqual(await call_once(reactor, endpoint, "add", [1, 2]), 3)

    async def test_other_name(self) -> None:
        """A certificate for another name is refused, and the failure says so."""
        endpoint = self.endpoint(self.authority, "tasks.example.org")
        told = await self.failure_of(call_once(reactor, endpoint, "add", [1, 2]))
        self.assertRegex(told, "(?i)VerificationError|DNSMismatch|hostname|name")
        self.assertIn("localhost", told)

    async def test_unknown_authority(self) -> None:
        """A certificate that nobody trusted has signed is refused, and the failure says so."""
        endpoint = self.endpoint(trustme.CA(), "localhost")
        told = await self.failure_of(call_once(reactor, endpoint, "add", [1, 2]))
        self.assertRegex(told, "certificate verify failed|unable to get|self.signed")

    async def test_plain_server(self) -> None:
        """A server that speaks no TLS is refused."""
        endpoint = f"tls:localhost:{self.daemon.port}:trustRoots={self.trusted}"
        told = await self.failure_of(call_once(reactor, endpoint, "add", [1, 2]))
        self.assertRegex(told, "(?i)ssl|tls|version")
