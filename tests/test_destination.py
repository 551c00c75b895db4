"""Where a caller connects to: what descriptions say, and the files that TLS needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trustme
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.client import TaskClient, call_once
from taskd.destination import endpoint_of
from tests.support import temporary_directory

HOST = "tls:127.0.0.1:12345"


class DestinationTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor = MemoryReactorClock()
        self.directory = temporary_directory(self)
        self.authority = trustme.CA()
        self.ca = self.file("ca.pem", self.authority.cert_pem.bytes())

    def file(self, name: str, content: bytes) -> str:
        path = self.directory / name
        path.write_bytes(content)
        return str(path)

    def connected(self, endpoint: str, **keywords: Any) -> Any:
        """Give the TCP connection that an endpoint makes: host, port, …, timeout, bindAddress."""
        made = endpoint_of(self.reactor, endpoint, **keywords)
        made.connect(Factory.forProtocol(Protocol)).addErrback(lambda _: None)
        (connection,) = self.reactor.tcpClients
        self.reactor.tcpClients.clear()
        return connection

    def refused(self, endpoint: Any, **keywords: Any) -> str:
        """Give the reason for which no endpoint can be made."""
        with self.assertRaises(ValueError) as caught:
            endpoint_of(self.reactor, endpoint, **keywords)
        return str(caught.exception)


class DescriptionTests(DestinationTestCase):
    def test_others_are_twisteds(self) -> None:
        """A description of anything but TLS is what Twisted makes of it."""
        host, port, _, timeout, bind = self.connected("tcp:127.0.0.1:99:timeout=7")
        self.assertEqual((host, port, timeout, bind), ("127.0.0.1", 99, 7, None))

    def test_no_kind(self) -> None:
        """Who leaves out the kind is told what to put before it."""
        self.assertIn("put tcp: or tls: before it", self.refused("127.0.0.1:12345"))

    def test_no_number(self) -> None:
        """Who writes a port that is none is told so, and not what Python thinks of it."""
        for endpoint in ("tcp:localhost:abc", "tcp:port=abc:host=localhost", "tls:localhost:abc"):
            self.assertIn("a port is a number, not 'abc'", self.refused(endpoint))
        self.assertIn("a timeout is a number", self.refused("tls:localhost:1:timeout=soon"))
        self.assertIn("from 1 to 65535", self.refused("tcp:localhost:65536"))

    def test_an_endpoint(self) -> None:
        """An endpoint is taken as it is, and has no use for a certificate."""
        given = TCP4ClientEndpoint(self.reactor, "127.0.0.1", 99)
        self.assertIs(endpoint_of(self.reactor, given), given)
        self.assertIn("'tls:", self.refused(given, ca=self.ca))
        self.assertIn("'tls:", self.refused(given, certificate=self.ca))

    def test_tls(self) -> None:
        """A host and a port are enough for TLS."""
        for endpoint in ("tls:127.0.0.1:99", "TLS:host=127.0.0.1:port=99", "tls:127.0.0.1:port=99"):
            host, port, _, timeout, bind = self.connected(endpoint)
            self.assertEqual((host, port, timeout, bind), ("127.0.0.1", 99, 30, None), endpoint)

    def test_what_twisteds_tls_may_say(self) -> None:
        """All that Twisted's own ``tls:`` may say is understood, by its place and by its name."""
        _, _, _, timeout, bind = self.connected("tls:127.0.0.1:99:7:127.0.0.2")
        self.assertEqual((timeout, bind), (7, ("127.0.0.2", 0)))
        own = self.authority.issue_cert("client")
        both = self.file("own.pem", own.private_key_and_cert_chain_pem.bytes())
        key = self.file("own.key", own.private_key_pem.bytes())
        said = f"bindAddress=127.0.0.3:timeout=8:trustRoots={self.directory}:certificate={both}"
        for further in ("", f":privateKey={key}"):
            _, _, _, timeout, bind = self.connected(f"{HOST}:{said}{further}")
            self.assertEqual((timeout, bind), (8, ("127.0.0.3", 0)))

    def test_with_our_keywords(self) -> None:
        """What a ``tls:`` string says holds beside a certificate given by keyword."""
        _, _, _, timeout, bind = self.connected(f"{HOST}:timeout=8", ca=self.ca)
        self.assertEqual((timeout, bind), (8, None))

    def test_another_way(self) -> None:
        """TLS may go another way than to the host whose name is verified."""
        host, port, *_ = self.connected("tls:tasks.example.org:1:endpoint=tcp\\:127.0.0.1\\:77")
        self.assertEqual((host, port), ("127.0.0.1", 77))

    def test_an_ipv6_address(self) -> None:
        """Colons are written behind backslashes, as everywhere in Twisted."""
        endpoint_of(self.reactor, r"tls:\:\:1:99")
        self.assertIn("'tls:::1:99'", self.refused("tls:::1:99"))

    def test_what_cannot_be(self) -> None:
        """A description that has no sense is refused, and the message repeats it."""
        for endpoint in (
            "",
            "nonsense",
            "tls:",
            "tls:127.0.0.1",
            "tls::99",
            "tls:127.0.0.1:0",
            "tls:127.0.0.1:65536",
            "tls:127.0.0.1:http",
            "tls:127.0.0.1:99:timeout=soon",
            "tls:127.0.0.1:99:colour=red",
            "tls:127.0.0.1:99:port=98",
            "tls:a b:99",
            "tls:127.0.0.1:99:1:2:3:4:5:6:7",
            "tls:127.0.0.1:99:privateKey=/nowhere",
            "tls:127.0.0.1:99:endpoint=nonsense",
        ):
            self.assertIn(repr(endpoint), self.refused(endpoint))

    def test_certificates_without_tls(self) -> None:
        """Certificates for a connection without TLS are refused, and the error tells the way."""
        for endpoint in (
            "tcp:127.0.0.1:99",
            "unix:/run/taskd",
            "ssl:a.example:99:hostname=a.example",
        ):
            for keywords in ({"ca": self.ca}, {"certificate": self.ca}):
                self.assertIn("begin with tls:", self.refused(endpoint, **keywords))

    def test_ssl(self) -> None:
        """The old ``ssl:`` is refused: it verifies no name, or takes too much for the name."""
        self.assertIn("write tls:", self.refused("ssl:127.0.0.1:99"))
        self.assertIn(
            "write tls:", self.refused(f"SSL:host=a.example:port=99:caCertsDir={self.ca}")
        )
        self.assertIn("write tls:", self.refused("ssl:127.0.0.1:99:hostname=a.example"))


class AuthorityTests(DestinationTestCase):
    def test_files(self) -> None:
        """One authority or many, and paths of either kind, can be given."""
        many = self.authority.cert_pem.bytes() + trustme.CA().cert_pem.bytes()
        for ca in (self.ca, Path(self.ca), self.file("many.pem", many)):
            self.connected(HOST, ca=ca)

    def test_what_cannot_be_used(self) -> None:
        """A file that has no certificate is refused with its path and the reason."""
        key = self.file("key", self.authority.private_key_pem.bytes())
        broken = self.authority.cert_pem.bytes().replace(b"MII", b"XXX")
        for ca, why in (
            ("/nowhere/ca.pem", "No such file"),
            (str(self.directory), "Is a directory"),
            (self.file("empty", b""), "no certificate in PEM"),
            (self.file("text", b"hello"), "no certificate in PEM"),
            (self.file("broken", broken), "no certificate in PEM"),
            (key, "no certificate in PEM"),
        ):
            told = self.refused(HOST, ca=ca)
            self.assertIn(ca, told)
            self.assertIn(why, told)
        self.assertIn("must be a path", self.refused(HOST, ca=5))
        self.assertIn(r"'a\ud800b'", self.refused(HOST, ca="a\ud800b"))
        self.assertIn(r"'a\x00b'", self.refused(HOST, ca="a\0b"))

    def test_a_directory(self) -> None:
        """Twisted's ``trustRoots`` is a directory, of which what cannot be read is left out."""
        self.file("text.pem", b"hello")
        self.connected(f"{HOST}:trustRoots={self.directory}")
        Path(self.ca).unlink()
        told = self.refused(f"{HOST}:trustRoots={self.directory}")
        self.assertIn("no .pem file with a certificate", told)
        self.assertIn("No such file", self.refused(f"{HOST}:trustRoots=/nowhere"))

    def test_both(self) -> None:
        """Whom to trust is said in one way."""
        self.assertIn("not both", self.refused(f"{HOST}:trustRoots={self.directory}", ca=self.ca))


class OwnCertificateTests(DestinationTestCase):
    def setUp(self) -> None:
        super().setUp()
        between = self.authority.create_child_ca()
        self.own = between.issue_cert("client")
        self.key_pem = self.own.private_key_pem.bytes()
        self.chain_pem = b"".join(pem.bytes() for pem in self.own.cert_chain_pems)
        self.key = self.file("own.key", self.key_pem)
        self.chain = self.file("own.pem", self.chain_pem)

    def test_files(self) -> None:
        """Chain and key can stand in one file, in either order, or in one each."""
        for certificate in (
            self.file("one.pem", self.chain_pem + self.key_pem),
            Path(self.file("other.pem", self.key_pem + self.chain_pem)),
            (self.chain, self.key),
            (Path(self.chain), Path(self.key)),
        ):
            self.connected(HOST, certificate=certificate)

    def test_what_cannot_be_used(self) -> None:
        """A file that has no certificate or no key is refused with its path and the reason."""
        for certificate, path, why in (
            ("/nowhere/own.pem", "/nowhere/own.pem", "No such file"),
            ((self.chain, "/nowhere/key"), "/nowhere/key", "No such file"),
            (self.chain, self.chain, "no private key in PEM"),
            (self.key, self.key, "no certificate in PEM"),
            ((self.key, self.chain), self.key, "no certificate in PEM"),
        ):
            told = self.refused(HOST, certificate=certificate)
            self.assertIn(path, told)
            self.assertIn(why, told)
        self.assertIn("pair of paths", self.refused(HOST, certificate=(self.chain,)))
        self.assertIn("must be a path", self.refused(HOST, certificate=[self.chain, self.key]))

    def test_a_key_that_does_not_fit(self) -> None:
        """A key of another certificate is refused, even of one in the same chain."""
        other = self.file("other.key", trustme.CA().private_key_pem.bytes())
        told = self.refused(HOST, certificate=(self.chain, other))
        self.assertIn("does not fit", told)
        self.assertIn(other, told)
        first, second = (pem.bytes() for pem in self.own.cert_chain_pems)
        backwards = self.file("backwards.pem", second + first)
        self.assertIn("does not fit", self.refused(HOST, certificate=(backwards, self.key)))

    def test_a_key_with_a_passphrase(self) -> None:
        """A key that is encrypted is refused, and nobody is asked for its passphrase."""
        key = load_pem_private_key(self.key_pem, None)
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            locked = self.file(
                "locked.key", key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x"))
            )
            told = self.refused(HOST, certificate=(self.chain, locked))
            self.assertIn("encrypted", told)
            self.assertIn(locked, told)

    def test_a_key_that_signs_nothing(self) -> None:
        """A key of a kind that TLS has no use for is refused."""
        key = X25519PrivateKey.generate()
        odd = self.file(
            "odd.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        self.assertIn(odd, self.refused(HOST, certificate=(self.chain, odd)))

    def test_both(self) -> None:
        """What to show is said in one way."""
        for said in (f"certificate={self.chain}", f"privateKey={self.key}"):
            told = self.refused(f"{HOST}:{said}", certificate=(self.chain, self.key))
            self.assertIn("not both", told)


class ClientTests(DestinationTestCase):
    """That clients pass on what they are given."""

    def test_what_cannot_be(self) -> None:
        """A client is refused what cannot be; ``call_once`` fails by it."""
        for keywords in ({"ca": "/nowhere"}, {"certificate": "/nowhere"}, {"token": ""}):
            with self.assertRaises(ValueError):
                TaskClient(self.reactor, HOST, **keywords)  # type: ignore[arg-type]
            called = call_once(self.reactor, HOST, "f", **keywords)  # type: ignore[arg-type]
            self.failureResultOf(called, ValueError)
        self.assertEqual(self.reactor.tcpClients, [])

    def test_what_can(self) -> None:
        """A client connects with what it was given; ``call_once`` does, too."""
        own = self.authority.issue_cert("client")
        both = self.file("own.pem", own.private_key_and_cert_chain_pem.bytes())
        keywords = {"ca": self.ca, "certificate": both, "token": "secret"}
        client = TaskClient(self.reactor, HOST, **keywords)  # type: ignore[arg-type]
        client.call("f").addErrback(lambda _: None)
        self.assertNotIn("secret", repr(client))
        called = call_once(self.reactor, HOST, "f", **keywords)  # type: ignore[arg-type]
        self.assertEqual(len(self.reactor.tcpClients), 2)
        called.addErrback(lambda _: None).cancel()
        for _, _, factory, _, _ in self.reactor.tcpClients:
            factory.clientConnectionFailed(None, Failure(ConnectError()))
