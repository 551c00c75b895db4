"""TLS on the daemon's side: real handshakes in memory, and keys that are no good."""

from __future__ import annotations

import datetime
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from twisted.internet.error import ConnectionClosed, ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, IOpenSSLClientConnectionCreator
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, connect
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from taskd.credentials import KeyPair
from taskd.errors import StartFailed
from taskd.tls import Secure, SecureTransport, identity_of, reason_of
from taskd.wire import ALPN
from tests.support import Loop

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
COMMON, UNIT, ORGANIZATION = (
    NameOID.COMMON_NAME,
    NameOID.ORGANIZATIONAL_UNIT_NAME,
    NameOID.ORGANIZATION_NAME,
)


def pem_of(key: Any, encryption: Any = None) -> str:
    """Write a private key."""
    encryption = encryption or NoEncryption()
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption).decode())


def issued(
    authority: trustme.CA,
    *subject: tuple[x509.ObjectIdentifier, str],
    key: Any = None,
    expires: datetime.datetime = NOW + DAY,
) -> tuple[x509.Certificate, str]:
    """Issue a certificate with any subject; give it, and its private key."""
    key = key or generate_private_key(SECP256R1())
    signer: Any = load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(oid, value) for oid, value in subject]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 2 * DAY)
        .not_valid_after(expires)
        .sign(signer, hashes.SHA256())
    )
    return certificate, pem_of(key)


def pair_of(certificate: x509.Certificate, key: str, *chain: str) -> KeyPair:
    own = certificate.public_bytes(Encoding.PEM).decode()
    return KeyPair("".join([own, *chain]), key, "--tls cert.pem")


AUTHORITY = trustme.CA()
PAIR = pair_of(*issued(AUTHORITY, (COMMON, "tasks.example")))


def pem_of_authority(authority: trustme.CA) -> str:
    return authority.cert_pem.bytes().decode()


@implementer(IHandshakeListener)
class Listener(Protocol):
    """
    What stands on one end of a connection, and keeps what happens.

    Attributes:
        received: The bytes that came.
        lost: Why the connection ended.
        handshakes: What had come when each was complete.
    """

    def __init__(self) -> None:
        self.received = b""
        self.lost: Any = None
        self.handshakes: list[bytes] = []

    def handshakeCompleted(self) -> None:
        self.handshakes.append(self.received)

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.lost = reason.value


class MemorySocket(FakeTransport):
    """
    The daemon's socket, as an ``EagerServer`` is one; it never says half of a goodbye.

    Attributes:
        unsent_bytes: How much the kernel has not taken, as the test says.
        is_aborted: True once it was closed by force.
    """

    on_sent: Any = None
    unsent_bytes = 0
    is_aborted = False

    @property
    def has_unsent(self) -> bool:
        return bool(self.unsent_bytes)

    def give_away(self, take: Any) -> bool:
        raise AssertionError("it would go on in plain text")

    def loseWriteConnection(self) -> None:
        raise AssertionError("it would end behind TLS's back")

    def abortConnection(self) -> None:
        self.is_aborted = True
        self.disconnect_done = True
        self.disconnecting = True


@implementer(IOpenSSLClientConnectionCreator)
class CallersTerms:
    """
    What a caller wants of TLS.

    Args:
        shows: A certificate and its key, or None.
        versions: The lowest and the highest version that it speaks, or None.
        protocols: The names that it gives (ALPN).
    """

    def __init__(
        self,
        shows: tuple[x509.Certificate, str] | None = None,
        versions: tuple[int, int] | None = None,
        protocols: tuple[bytes, ...] = (),
    ) -> None:
        self.context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        if protocols:
            self.context.set_alpn_protos(list(protocols))
        if versions is not None:
            self.context.set_cipher_list(b"ALL:@SECLEVEL=0")
            self.context.set_min_proto_version(versions[0])
            self.context.set_max_proto_version(versions[1])
        if shows is not None:
            certificate, key = shows
            self.context.use_certificate(certificate)
            self.context.use_privatekey(load_pem_private_key(key.encode(), None))  # type: ignore[arg-type]

    def clientConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        return SSL.Connection(self.context, None)


class Meeting:
    """
    One connection in memory between a caller and the daemon.

    Attributes:
        server: The daemon's protocol.
        client: The caller's.
        tls: What stands between the daemon's protocol and its socket.
        socket: The daemon's.
        callers: The caller's TLS connection.
    """

    def __init__(self, secure: Secure, terms: CallersTerms | None = None) -> None:
        terms = terms or CallersTerms()
        self.server, self.client = Listener(), Listener()
        self.tls = secure.wrap(self.server)
        called = Factory.forProtocol(Listener)
        called.buildProtocol = lambda _: self.client  # type: ignore[assignment, method-assign]
        self.loop = Loop()
        over_tls = TLSMemoryBIOFactory(terms, True, called, clock=self.loop)
        self.far: Any = over_tls.buildProtocol(None)
        self.socket = MemorySocket(self.tls, isServer=True)
        far = FakeTransport(self.far, isServer=False)
        self.pump = connect(self.tls, self.socket, self.far, far, clock=self.loop)
        self.flush()

    @property
    def callers(self) -> SSL.Connection:
        handle: SSL.Connection = self.far.getHandle()
        return handle

    def flush(self) -> None:
        """Carry what is to be carried, until nothing moves."""
        while self.pump.flush():
            pass

    def say(self, data: bytes) -> None:
        """Say something as the caller."""
        assert self.client.transport is not None
        self.client.transport.write(data)
        self.loop.advance(1)  # small writes go out in the reactor's next round
        self.flush()


class HandshakeTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.secure = Secure(PAIR)

    def test_both_hear_each_other(self) -> None:
        """What one side sends the other receives, and in between nothing of it can be read."""
        meeting = Meeting(self.secure)
        self.assertEqual(meeting.server.handshakes, [b""])
        meeting.say(b"a request")
        self.assertEqual(meeting.server.received, b"a request")
        meeting.tls.write(b"a reply")
        self.assertNotIn(b"reply", b"".join(meeting.socket.stream))
        meeting.flush()
        self.assertEqual(meeting.client.received, b"a reply")

    def test_what_is_shown(self) -> None:
        """A caller is shown the certificate, and those that vouch for it."""
        between = AUTHORITY.create_child_ca()
        certificate, key = issued(between, (COMMON, "tasks.example"))
        meeting = Meeting(Secure(pair_of(certificate, key, pem_of_authority(between))))
        chain = meeting.callers.get_peer_cert_chain(as_cryptography=True)
        assert chain is not None
        between_itself = x509.load_pem_x509_certificate(between.cert_pem.bytes())
        self.assertEqual(chain, [certificate, between_itself])

    def test_versions(self) -> None:
        """TLS 1.2 and 1.3 are spoken."""
        for version, name in ((SSL.TLS1_2_VERSION, "TLSv1.2"), (SSL.TLS1_3_VERSION, "TLSv1.3")):
            meeting = Meeting(self.secure, CallersTerms(versions=(version, version)))
            meeting.say(b"a request")
            self.assertEqual(meeting.server.received, b"a request")
            self.assertEqual(meeting.callers.get_protocol_version_name(), name)

    def test_old_versions(self) -> None:
        """A caller that speaks nothing newer than TLS 1.1 is refused."""
        for version in (SSL.TLS1_VERSION, SSL.TLS1_1_VERSION):
            meeting = Meeting(self.secure, CallersTerms(versions=(version, version)))
            self.assertEqual(meeting.server.handshakes, [])
            self.assertIsInstance(meeting.server.lost, SSL.Error)
            self.assertEqual(meeting.client.received, b"")

    def test_names_of_protocols(self) -> None:
        """A caller that names protocols, and not ours among them, has no handshake."""
        for protocols, is_ours in (
            ((), True),
            ((ALPN,), True),
            ((b"h2", ALPN), True),
            ((b"http/1.1",), False),
            ((b"h2", b"http/1.1"), False),
            ((b"taskd/2",), False),
        ):
            meeting = Meeting(self.secure, CallersTerms(protocols=protocols))
            self.assertEqual(meeting.server.handshakes, [b""] if is_ours else [], protocols)
            if is_ours:
                self.assertIsNone(meeting.server.lost)
                chosen = meeting.callers.get_alpn_proto_negotiated()
                self.assertEqual(chosen, ALPN if protocols else b"")
            else:
                self.assertIsInstance(meeting.server.lost, SSL.Error)
                words = reason_of(meeting.server.lost)
                self.assertEqual(words, "it offers other protocols than taskd/1")
                self.assertEqual(meeting.client.received, b"")

    def test_what_is_no_tls(self) -> None:
        """Who speaks plain text gets none back, and the reason is kept for the log."""
        meeting = Meeting(self.secure)
        stranger = Listener()
        tls = self.secure.wrap(stranger)
        tls.makeConnection(MemorySocket(tls, isServer=True))
        tls.dataReceived(b'{"function": "taskd.ping"}\n')
        tls.connectionLost(Failure(ConnectionDone()))
        self.assertEqual((stranger.received, stranger.handshakes), (b"", []))
        self.assertIsInstance(stranger.lost, SSL.Error)
        self.assertNotEqual(reason_of(stranger.lost), "")
        self.assertEqual(meeting.server.handshakes, [b""])

    def test_an_end_in_the_handshake(self) -> None:
        """Who goes before the handshake is complete has just gone, and failed at nothing."""
        stranger = Listener()
        tls = self.secure.wrap(stranger)
        tls.makeConnection(MemorySocket(tls, isServer=True))
        tls.connectionLost(Failure(ConnectionDone()))
        self.assertIsInstance(stranger.lost, ConnectionClosed)

    def test_nobody_is_asked(self) -> None:
        """Without authorities for callers none is asked for a certificate."""
        meeting = Meeting(self.secure, CallersTerms(shows=issued(AUTHORITY, (COMMON, "web"))))
        self.assertEqual(meeting.server.handshakes, [b""])
        self.assertEqual(meeting.tls.peer_identity, "")


class ClientAuthorityTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.other = trustme.CA()
        both = pem_of_authority(AUTHORITY) + pem_of_authority(self.other)
        self.secure = Secure(PAIR, both)

    def test_who_has_one(self) -> None:
        """A caller that shows a certificate of one of the authorities is told by its name."""
        for authority in (AUTHORITY, self.other):
            for version in (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
                shown = issued(authority, (COMMON, "web"))
                meeting = Meeting(self.secure, CallersTerms(shown, (version, version)))
                meeting.say(b"a request")
                self.assertEqual(meeting.server.received, b"a request")
                self.assertEqual(meeting.tls.peer_identity, "web")

    def test_who_has_none(self) -> None:
        """A caller without one, or with another authority's or an expired one, is not let in."""
        for shows in (
            None,
            issued(trustme.CA(), (COMMON, "web")),
            issued(AUTHORITY, (COMMON, "web"), expires=NOW - DAY),
        ):
            meeting = Meeting(self.secure, CallersTerms(shows))
            self.assertEqual(meeting.server.handshakes, [])
            self.assertIsInstance(meeting.server.lost, SSL.Error)
            self.assertIn("certif", reason_of(meeting.server.lost))


class TransportTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.meeting = Meeting(Secure(PAIR))
        self.tls: SecureTransport = self.meeting.tls

    def test_what_it_is(self) -> None:
        """It tells that it is secure, and that it can neither move nor be closed by half."""
        self.assertTrue(self.tls.is_secure)
        self.assertIsNone(self.tls.give_away)
        self.assertIsNone(self.tls.loseWriteConnection)

    def test_what_is_unsent(self) -> None:
        """What waits in the socket waits, and it is told whether all is on its way."""
        self.assertTrue(self.tls.write(b"a reply"))
        self.assertEqual((self.tls.has_unsent, self.tls.unsent_bytes), (False, 0))
        self.meeting.socket.unsent_bytes = 7
        self.assertFalse(self.tls.write(b"a reply"))
        self.assertEqual((self.tls.has_unsent, self.tls.unsent_bytes), (True, 7))

    def test_what_waits_for_the_handshake(self) -> None:
        """What is written before the handshake waits for it, and is sent then."""
        tls = Secure(PAIR).wrap(Listener())
        tls.makeConnection(MemorySocket(tls, isServer=True))
        self.assertFalse(tls.write(b"too early"))
        self.assertEqual((tls.has_unsent, tls.unsent_bytes), (True, 9))
        tls.transport.unsent_bytes = 3
        self.assertEqual(tls.unsent_bytes, 12)

    def test_who_waits_for_all_to_be_sent(self) -> None:
        """Who waits until all is sent is told by the socket."""
        self.assertIsNone(self.tls.on_sent)
        told: list[str] = []
        self.tls.on_sent = lambda: told.append("sent")
        self.meeting.socket.on_sent()
        self.assertEqual(told, ["sent"])
        self.assertIs(self.tls.on_sent, self.meeting.socket.on_sent)

    def test_an_orderly_end(self) -> None:
        """Who is hung up on gets what was written, and is told goodbye."""
        callers = self.meeting.callers
        self.tls.write(b"a reply")
        self.tls.loseConnection()
        self.assertTrue(self.tls.disconnecting)
        self.meeting.flush()
        self.assertEqual(self.meeting.client.received, b"a reply")
        self.assertTrue(callers.get_shutdown() & SSL.RECEIVED_SHUTDOWN)
        self.assertFalse(self.meeting.socket.is_aborted)

    def test_an_end_by_force(self) -> None:
        """Who is cut off is told nothing: a goodbye would say that all was answered."""
        callers = self.meeting.callers
        self.tls.abortConnection()
        self.assertTrue(self.tls.disconnecting)
        self.assertTrue(self.meeting.socket.is_aborted)
        self.assertEqual(self.meeting.socket.stream, [])
        self.meeting.flush()
        self.assertFalse(callers.get_shutdown() & SSL.RECEIVED_SHUTDOWN)

    def test_after_the_end(self) -> None:
        """After an end by force nothing is sent and nothing is heard."""
        self.tls.abortConnection()
        self.tls.dataReceived(b"a request")
        self.tls.write(b"a reply")
        self.meeting.flush()
        self.assertEqual((self.meeting.server.received, self.meeting.client.received), (b"", b""))


class IdentityTests(SynchronousTestCase):
    def identity(self, *subject: tuple[x509.ObjectIdentifier, str]) -> str:
        certificate, _ = issued(AUTHORITY, *subject)
        return identity_of(certificate)

    def test_a_common_name(self) -> None:
        """A certificate with one common name is named by it, whatever else its subject has."""
        for name in ("web", "*.example.org", "Ada Lovelace", "bücher", "a+b", "…"):
            self.assertEqual(self.identity((COMMON, name)), name)
            self.assertEqual(self.identity((ORGANIZATION, "acme"), (COMMON, name)), name)

    def test_no_common_name(self) -> None:
        """A certificate without one is named by its whole subject."""
        self.assertEqual(self.identity((UNIT, "web"), (ORGANIZATION, "acme")), "O=acme,OU=web")

    def test_two_common_names(self) -> None:
        """A certificate with two is named by its whole subject, so neither can be claimed."""
        self.assertEqual(self.identity((COMMON, "web"), (COMMON, "ops")), "CN=ops,CN=web")

    def test_what_could_be_taken_for_something_else(self) -> None:
        """A common name that could pass for a subject, or not be shown, is written as a subject."""
        for name in ("O=acme", "O=acme,OU=web", "web,ops", "=", "web\n", "web\x1b[2J", "a\u202eb"):
            identity = self.identity((COMMON, name))
            self.assertNotEqual(identity, name)
            self.assertTrue(identity.startswith("CN="), identity)

    def test_no_subject(self) -> None:
        """A certificate whose subject is empty is named ``=``, and is not one without a name."""
        self.assertEqual(self.identity(), "=")

    def test_no_two_subjects_have_one_name(self) -> None:
        """Subjects that differ in what is what have different names."""
        subjects: list[tuple[tuple[x509.ObjectIdentifier, str], ...]] = [
            ((COMMON, "O=acme"),),
            ((ORGANIZATION, "acme"),),
            ((COMMON, "acme"),),
            ((COMMON, "acme"), (COMMON, "acme")),
            ((ORGANIZATION, "acme,CN=x"),),
            ((ORGANIZATION, "acme"), (UNIT, "x")),
            ((ORGANIZATION, "x"), (UNIT, "acme")),
            ((COMMON, "CN=acme"),),
            ((COMMON, "="),),
            (),
        ]
        self.assertEqual(len({self.identity(*subject) for subject in subjects}), len(subjects))


class KeyTests(SynchronousTestCase):
    CERTIFICATE, KEY = issued(AUTHORITY, (COMMON, "tasks.example"))

    def refused(self, pair: KeyPair, client_ca: str = "") -> str:
        message = str(self.assertRaises(StartFailed, Secure, pair, client_ca))
        self.assertNotIn("PRIVATE KEY", message)
        return message

    def pair(self, certificate: str = "", key: str = "") -> KeyPair:
        good = pair_of(self.CERTIFICATE, self.KEY)
        return KeyPair(certificate or good.certificate, key or good.key, good.origin)

    def test_kinds_of_keys(self) -> None:
        """A key may be of any kind that TLS knows."""
        key = Ed25519PrivateKey.generate()
        pair = pair_of(*issued(AUTHORITY, (COMMON, "tasks.example"), key=key))
        self.assertEqual(Meeting(Secure(pair)).server.handshakes, [b""])

    def test_a_key_of_another_certificate(self) -> None:
        """A key that is not the certificate's is refused."""
        for key in (generate_private_key(SECP256R1()), Ed25519PrivateKey.generate()):
            message = self.refused(self.pair(key=pem_of(key)))
            self.assertTrue(
                message.startswith("--tls cert.pem: the certificate cannot be used with this key")
            )

    def test_an_encrypted_key(self) -> None:
        """An encrypted key is refused with the way to take its passphrase off."""
        key = load_pem_private_key(self.KEY.encode(), None)
        message = self.refused(self.pair(key=pem_of(key, BestAvailableEncryption(b"xyzzy"))))
        self.assertIn("--tls cert.pem: the private key is encrypted", message)
        self.assertIn("openssl pkey", message)

    def test_a_key_that_signs_nothing(self) -> None:
        """A key of a kind that no certificate is shown with is refused."""
        message = self.refused(self.pair(key=pem_of(X25519PrivateKey.generate())))
        self.assertTrue(message.startswith("--tls cert.pem: the certificate"), message)

    def test_garbage(self) -> None:
        """What is no PEM, or of the other kind, is refused by its origin."""
        good = self.pair()
        for pair in (
            self.pair(certificate="garbage"),
            self.pair(key="garbage"),
            self.pair(certificate=good.key),
            self.pair(key=good.certificate),
            self.pair(certificate=good.certificate[:-40]),
            self.pair(key=good.key.replace("M", "!")),
            KeyPair("", "", good.origin),
        ):
            message = self.refused(pair)
            self.assertTrue(message.startswith("--tls cert.pem: the certificate or its key: "))

    def test_garbage_for_an_authority(self) -> None:
        """Authorities that are no PEM of certificates are refused by their option."""
        for garbage in ("garbage", "\n", self.KEY):
            message = self.refused(self.pair(), garbage)
            self.assertTrue(message.startswith("--client-ca: "), message)

    def test_expiry(self) -> None:
        """A certificate is expired from the moment on that it names."""
        expires = (NOW + DAY).replace(microsecond=0)
        pair = pair_of(*issued(AUTHORITY, (COMMON, "tasks.example"), expires=expires))
        secure = Secure(pair)
        self.assertEqual(secure.expires, expires)
        moments = [expires.timestamp() + seconds for seconds in (-1, 0, 1)]
        self.assertEqual([secure.is_expired(now) for now in moments], [False, True, True])

    def test_an_expired_certificate(self) -> None:
        """A certificate that has expired can be shown all the same; callers decide."""
        pair = pair_of(*issued(AUTHORITY, (COMMON, "tasks.example"), expires=NOW - DAY))
        self.assertEqual(Meeting(Secure(pair)).server.handshakes, [b""])


class ReasonTests(SynchronousTestCase):
    def test_of_openssl(self) -> None:
        """What OpenSSL says of an error is told, without its library's names."""
        error = SSL.Error([("SSL routines", "", "no shared cipher"), ("x509", "", "expired")])
        self.assertEqual(reason_of(error), "no shared cipher; expired")
        self.assertEqual(reason_of(Failure(error)), "no shared cipher; expired")

    def test_of_anything_else(self) -> None:
        """Any other error speaks for itself."""
        self.assertEqual(reason_of(ValueError("why")), "why")
        self.assertEqual(reason_of(SSL.Error([])), "[]")
