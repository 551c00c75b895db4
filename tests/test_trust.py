"""Whom a caller trusts: real handshakes in memory, and what is said of those that fail."""

from __future__ import annotations

import datetime
import json
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from OpenSSL.crypto import X509, PKey
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import Certificate as TrustedCertificate
from twisted.internet.ssl import (
    CertificateOptions,
    TLSVersion,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, connect
from twisted.trial.unittest import SynchronousTestCase

from taskd.client import TaskClientFactory
from taskd.errors import (
    CertificateExpired,
    CertificateNotTrusted,
    ClientCertificateRefused,
    TlsFailed,
    WrongServerName,
)
from taskd.trust import (
    Verified,
    failure_of_handshake,
    greeting,
    refused_certificate,
    words_of,
)
from tests.support import Loop

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def loaded(pem: trustme.Blob) -> X509:
    return X509.from_cryptography(x509.load_pem_x509_certificate(pem.bytes()))


def shown(issued: trustme.LeafCert) -> dict[str, Any]:
    """Give the options by which one side shows a certificate, its chain included."""
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    leaf, *chain = (loaded(pem) for pem in issued.cert_chain_pems)
    return {
        "certificate": leaf,
        "privateKey": PKey.from_cryptography_key(key),
        "extraCertChain": chain,
    }


def trusting(*authorities: trustme.CA) -> dict[str, Any]:
    """Give the options by which one side trusts authorities."""
    certificates = [TrustedCertificate(loaded(authority.cert_pem)) for authority in authorities]
    return {"trustRoot": trustRootFromCertificates(certificates)}


def certificate_for(authority: trustme.CA, *names: x509.GeneralName) -> dict[str, Any]:
    """Issue what trustme would refuse to: a certificate with any names, or with none."""
    key = generate_private_key(SECP256R1())
    signer: PrivateKeyTypes = load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tasks.example.org")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = builder.sign(signer, hashes.SHA256())
    return {
        "certificate": X509.from_cryptography(made),
        "privateKey": PKey.from_cryptography_key(key),
    }


class _Daemon(Protocol):
    """The far end of a connection in memory, which keeps what it is sent."""

    def __init__(self) -> None:
        self.received = b""
        self.lost: Failure | None = None

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost = reason


class Meeting:
    """
    One connection in memory, with TLS on both sides, and a call on it.

    Args:
        client: The client's terms of TLS.
        server: The server's.
        host: Whom the client wants to talk to.
    """

    def __init__(
        self,
        client: CertificateOptions,
        server: CertificateOptions,
        host: str = "tasks.example.org",
        creator: Any = None,
    ) -> None:
        self.loop = Loop()
        self.daemon = _Daemon()
        self.factory = TaskClientFactory(self.loop)
        self.called = self.factory.call("add", 1, 2)
        self.failure: list[Any] = []
        self.called.addErrback(lambda failure: self.failure.append(failure.value))
        over_tls = TLSMemoryBIOFactory(
            creator or Verified(client, host), True, self.factory, clock=self.loop
        )
        served = Factory.forProtocol(_Daemon)
        served.buildProtocol = lambda _: self.daemon  # type: ignore[method-assign]
        near = over_tls.buildProtocol(None)
        far = TLSMemoryBIOFactory(server, False, served, clock=self.loop).buildProtocol(None)
        self.near = near
        self.pump = connect(
            far,
            FakeTransport(far, isServer=True),
            near,
            FakeTransport(near, isServer=False),
            clock=self.loop,
        )
        self.flush()

    def flush(self) -> None:
        """Carry what is to be carried, until nothing moves."""
        moved = True
        while moved:
            moved = self.pump.flush()
            self.loop.advance(0.001)  # small writes go out in the reactor's next round
            moved = self.pump.flush() or moved

    @property
    def requests(self) -> list[str]:
        """The names of the functions that came through."""
        return [json.loads(line)["function"] for line in self.daemon.received.splitlines()]


class HandshakeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.client = CertificateOptions(**trusting(self.authority))

    def meet(self, *names: str, host: str = "tasks.example.org", **terms: Any) -> Meeting:
        """Connect to a server whose certificate has these names."""
        server = CertificateOptions(**shown(self.authority.issue_cert(*names, **terms)))
        return Meeting(self.client, server, host)

    def assertNothingWasSent(self, meeting: Meeting, kind: type[TlsFailed], *words: str) -> None:
        (error,) = meeting.failure
        self.assertIs(type(error), kind, error)
        self.assertEqual(meeting.daemon.received, b"")
        for word in words:
            self.assertIn(word, str(error))
        failure = self.failureResultOf(meeting.factory.call("again"), kind)
        self.assertIs(failure.value, error)
        self.assertEqual(meeting.loop.getDelayedCalls(), [])

    def test_the_right_server(self) -> None:
        """A call goes out to a server whose certificate has the name that was asked for."""
        for names, host in (
            (("tasks.example.org",), "tasks.example.org"),
            (("*.example.org",), "tasks.example.org"),
            (("a.example", "TASKS.example.org"), "tasks.EXAMPLE.org"),
            (("127.0.0.1",), "127.0.0.1"),
            (("::1",), "::1"),
            (("bücher.example",), "bücher.example"),
        ):
            meeting = self.meet(*names, host=host)
            self.assertEqual(meeting.requests, ["add"], host)
            self.assertEqual(meeting.failure, [])

    def test_its_terms(self) -> None:
        """The connection is TLS 1.2 at least, without compression, and names the server."""
        meeting = self.meet("tasks.example.org")
        tls = meeting.near.getHandle()
        self.assertEqual(tls.get_protocol_version_name(), "TLSv1.3")
        self.assertEqual(tls.get_servername(), b"tasks.example.org")
        context = CertificateOptions(**trusting(self.authority)).getContext()
        self.assertTrue(context.set_options(0) & SSL.OP_NO_COMPRESSION)
        for old in (SSL.OP_NO_SSLv3, SSL.OP_NO_TLSv1, SSL.OP_NO_TLSv1_1):
            self.assertTrue(context.set_options(0) & old)

    def test_an_address_is_not_told_as_a_name(self) -> None:
        """No server name is sent for an IP address, as the standard wants it."""
        meeting = self.meet("127.0.0.1", host="127.0.0.1")
        self.assertIsNone(meeting.near.getHandle().get_servername())

    def test_tls_1_2(self) -> None:
        """A server that speaks TLS 1.2 and no later version is served, too."""
        server = CertificateOptions(
            **shown(self.authority.issue_cert("tasks.example.org")),
            lowerMaximumSecurityTo=TLSVersion.TLSv1_2,
        )
        meeting = Meeting(self.client, server)
        self.assertEqual(meeting.requests, ["add"])
        self.assertEqual(meeting.near.getHandle().get_protocol_version_name(), "TLSv1.2")

    def test_an_old_version(self) -> None:
        """A server that speaks older versions alone is refused, and the error says so."""
        server = CertificateOptions(
            **shown(self.authority.issue_cert("tasks.example.org")),
            insecurelyLowerMinimumTo=TLSVersion.TLSv1_0,
            lowerMaximumSecurityTo=TLSVersion.TLSv1_1,
        )
        self.assertNothingWasSent(Meeting(self.client, server), TlsFailed)

    def test_another_name(self) -> None:
        """A certificate for other names is refused, and the error tells which it has."""
        meeting = self.meet("a.example", "10.0.0.1")
        told = ("a.example, 10.0.0.1", "tasks.example.org")
        self.assertNothingWasSent(meeting, WrongServerName, *told)

    def test_many_other_names(self) -> None:
        """Of many names the error tells a few."""
        meeting = self.meet(*(f"n{number}.example" for number in range(9)))
        self.assertNothingWasSent(meeting, WrongServerName, "n4.example, … and not for")

    def test_another_address(self) -> None:
        """A certificate for another IP address is refused, and one whose name looks like it."""
        self.assertNothingWasSent(
            self.meet("127.0.0.2", host="127.0.0.1"), WrongServerName, "127.0.0.2"
        )

    def test_names_against_the_rules(self) -> None:
        """A name that cannot be is no reason to take a certificate for any other name."""
        for names in ((x509.DNSName("127.0.0.1"),), (x509.DNSName("*"),), ()):
            server = CertificateOptions(**certificate_for(self.authority, *names))
            meeting = Meeting(self.client, server)
            self.assertNothingWasSent(meeting, WrongServerName, "subject alternative name")

    def test_the_common_name_does_not_count(self) -> None:
        """A name that stands in the subject only is not the server's."""
        server = CertificateOptions(
            **certificate_for(self.authority, x509.DNSName("other.example"))
        )
        self.assertNothingWasSent(Meeting(self.client, server), WrongServerName, "other.example")

    def test_expired(self) -> None:
        """A certificate that has expired is refused, and the error tells when it has."""
        meeting = self.meet("tasks.example.org", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
        when = f"{NOW - DAY:%Y-%m-%d %H:%M} UTC"
        self.assertNothingWasSent(meeting, CertificateExpired, "has expired", when)

    def test_not_yet_valid(self) -> None:
        """A certificate that is not valid yet is refused, and the error asks for the clock."""
        meeting = self.meet("tasks.example.org", not_before=NOW + DAY, not_after=NOW + 9 * DAY)
        self.assertNothingWasSent(meeting, CertificateExpired, "not valid before", "clock")

    def test_self_signed(self) -> None:
        """A certificate that signed itself is refused, and the error says what can be done."""
        own = trustme.CA()
        server = CertificateOptions(
            certificate=loaded(own.cert_pem),
            privateKey=PKey.from_cryptography_key(
                load_pem_private_key(own.private_key_pem.bytes(), None)
            ),
        )
        meeting = Meeting(self.client, server)
        self.assertNothingWasSent(meeting, CertificateNotTrusted, "self-signed", "as ca")

    def test_unknown_authority(self) -> None:
        """A certificate of an authority that is not trusted is refused, and the error names it."""
        server = CertificateOptions(**shown(trustme.CA().issue_cert("tasks.example.org")))
        meeting = Meeting(self.client, server)
        self.assertNothingWasSent(meeting, CertificateNotTrusted, "issued by", "trustme", "as ca")

    def test_an_authority_between(self) -> None:
        """A chain with an authority between is trusted if the server sends it, and only then."""
        between = self.authority.create_child_ca()
        terms = shown(between.issue_cert("tasks.example.org"))
        self.assertEqual(Meeting(self.client, CertificateOptions(**terms)).requests, ["add"])
        del terms["extraCertChain"]
        meeting = Meeting(self.client, CertificateOptions(**terms))
        self.assertNothingWasSent(meeting, CertificateNotTrusted, "all of its chain")

    def test_the_server_hears_why(self) -> None:
        """A server that is not trusted is told by an alert."""
        server = CertificateOptions(**shown(trustme.CA().issue_cert("tasks.example.org")))
        lost = Meeting(self.client, server).daemon.lost
        assert lost is not None
        self.assertIn("unknown ca", words_of(lost.value))

    def test_an_endpoint_of_somebody_elses(self) -> None:
        """Where Twisted's own checks are used, a wrong name and a failed handshake are told."""
        for names, authority, kind in (
            ("a.example", self.authority, WrongServerName),
            ("tasks.example.org", trustme.CA(), TlsFailed),
        ):
            creator = optionsForClientTLS("tasks.example.org", **trusting(self.authority))
            server = CertificateOptions(**shown(authority.issue_cert(names)))
            meeting = Meeting(self.client, server, creator=creator)
            self.assertNothingWasSent(meeting, kind)


class ClientCertificateTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.clients = trustme.CA()

    def meet(self, shows: trustme.LeafCert | None, **terms: Any) -> Meeting:
        """Connect to a server that wants a certificate."""
        server = CertificateOptions(
            **shown(self.authority.issue_cert("tasks.example.org")),
            **trusting(self.clients),
            **terms,
        )
        own = {} if shows is None else shown(shows)
        return Meeting(CertificateOptions(**trusting(self.authority), **own), server)

    def assertRefused(self, meeting: Meeting, *words: str) -> None:
        (error,) = meeting.failure
        self.assertIs(type(error), ClientCertificateRefused, error)
        self.assertEqual(meeting.daemon.received, b"")
        for word in words:
            self.assertIn(word, str(error))

    def test_one_that_is_taken(self) -> None:
        """A call goes out with a certificate that the server trusts."""
        self.assertEqual(self.meet(self.clients.issue_cert("client")).requests, ["add"])

    def test_an_authority_between(self) -> None:
        """The authorities between are sent along."""
        between = self.clients.create_child_ca()
        self.assertEqual(self.meet(between.issue_cert("client")).requests, ["add"])

    def test_none(self) -> None:
        """Without a certificate the call fails, and the error says that one is wanted."""
        self.assertRefused(self.meet(None), "got none", "as certificate")

    def test_one_that_is_not_trusted(self) -> None:
        """A certificate of another authority is refused, and so is one that has expired."""
        self.assertRefused(self.meet(trustme.CA().issue_cert("client")), "unknown ca")
        old = self.clients.issue_cert("client", not_before=NOW - 9 * DAY, not_after=NOW - DAY)
        self.assertRefused(self.meet(old), "certificate expired")

    def test_in_tls_1_2(self) -> None:
        """In TLS 1.2, where it ends the handshake, a certificate is refused alike."""
        meeting = self.meet(
            trustme.CA().issue_cert("client"), lowerMaximumSecurityTo=TLSVersion.TLSv1_2
        )
        self.assertRefused(meeting, "unknown ca")

    def test_none_in_tls_1_2(self) -> None:
        """In TLS 1.2, whose alert does not tell it, the error hints at a missing certificate."""
        (error,) = self.meet(None, lowerMaximumSecurityTo=TLSVersion.TLSv1_2).failure
        self.assertIsInstance(error, TlsFailed)
        self.assertIn("client certificate", str(error))


class _Lost:
    """A transport whose TLS has nothing to tell."""

    def getHandle(self) -> object:
        return object()


class FailureTests(SynchronousTestCase):
    """What is made of the reasons that Twisted gives."""

    def failure(self, reason: Exception) -> TlsFailed:
        return failure_of_handshake(_Lost(), Failure(reason))

    def error(self, *words: str) -> SSL.Error:
        return SSL.Error([("SSL routines", "", text) for text in words])

    def test_a_server_without_tls(self) -> None:
        """A server that speaks no TLS is told from one that speaks it wrongly."""
        for words in ("wrong version number", "packet length too long"):
            error = self.failure(self.error(words))
            self.assertIs(type(error), TlsFailed)
            self.assertIn("does not speak TLS", str(error))
            self.assertIn(words, str(error))

    def test_no_common_version(self) -> None:
        """Without a common version of TLS the error says which ones would do."""
        for words in ("unsupported protocol", "tlsv1 alert protocol version"):
            self.assertIn("TLS 1.2 nor TLS 1.3", str(self.failure(self.error(words))))

    def test_other_words(self) -> None:
        """Whatever else OpenSSL says is told as it is."""
        error = self.failure(self.error("no shared cipher", "", "moon phase"))
        self.assertIs(type(error), TlsFailed)
        self.assertIn("no shared cipher; moon phase", str(error))
        self.assertIn("no reason is known", str(self.failure(SSL.Error([]))))
        self.assertIn("SysCallError", str(self.failure(SSL.SysCallError())))

    def test_an_end_without_a_word(self) -> None:
        """A server that ends the connection without a word may speak no TLS, or have stopped."""
        for reason in (ConnectionDone(), ConnectionLost()):
            error = self.failure(reason)
            self.assertIs(type(error), TlsFailed)
            self.assertIn("ended during the TLS handshake", str(error))

    def test_alerts(self) -> None:
        """The alerts for a client's certificate are known in the words of every OpenSSL."""
        for words in (
            "tlsv13 alert certificate required",
            "tlsv1 alert unknown ca",
            "sslv3 alert bad certificate",
            "ssl/tls alert bad certificate",
            "ssl/tls alert unsupported certificate",
            "sslv3 alert certificate revoked",
            "sslv3 alert certificate expired",
            "sslv3 alert certificate unknown",
            "tlsv1 alert access denied",
            "tlsv1 alert decrypt error",
        ):
            failure = Failure(self.error(words))
            self.assertIsInstance(refused_certificate(failure), ClientCertificateRefused, words)
            self.assertIsInstance(self.failure(failure.value), ClientCertificateRefused)

    def test_what_is_no_such_alert(self) -> None:
        """Other reasons are not taken for a refused certificate."""
        for reason in (
            ConnectionDone(),
            ValueError("alert unknown ca"),
            self.error("sslv3 alert handshake failure"),
            self.error("certificate verify failed"),
            self.error("tlsv1 alert internal error"),
        ):
            self.assertIsNone(refused_certificate(Failure(reason)))


class GreetingTests(SynchronousTestCase):
    def test_a_token(self) -> None:
        """A token is shown by a request whose id no call has."""
        self.assertEqual(
            json.loads(greeting('s3"crét')),
            {"function": "taskd.auth", "args": {"token": 's3"crét'}, "id": 0},
        )

    def test_none(self) -> None:
        """Without a token nothing is sent."""
        self.assertEqual(greeting(None), b"")

    def test_what_cannot_be_a_token(self) -> None:
        """What cannot be a token is refused, and the message does not tell it."""
        for token in ("", b"secret", 5, ["secret"], "secret\n", "\x00secret", "secret\ud800"):
            with self.assertRaises(ValueError) as caught:
                greeting(token)  # type: ignore[arg-type]
            self.assertNotIn("secret", str(caught.exception))
