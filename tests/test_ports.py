"""The sockets of one daemon, and what is asked for on each."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

import trustme
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import digest_of
from taskd.endpoints import listeners_from
from taskd.errors import StartFailed
from taskd.ports import Ports
from taskd.settings import Settings
from tests.support import log_of, temporary_directory

TOKEN = "web's token 0123"
AUTHORITY = trustme.CA()
PAIR = AUTHORITY.issue_cert("tasks.example")

EXPOSED = "0.0.0.0"
LONG_AGO = 0.0
MUCH_LATER = 1e11


class PortsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.log = log_of(self, "ports")
        self.tokens = self.write("tokens", f"web:{TOKEN}\n".encode())
        self.authority = self.write("ca.pem", AUTHORITY.cert_pem.bytes())
        self.tls: dict[str, Any] = {
            "certificate": self.write("cert.pem", PAIR.cert_chain_pems[0].bytes()),
            "key": self.write("key.pem", PAIR.private_key_pem.bytes()),
        }

    def write(self, name: str, content: bytes) -> str:
        path = Path(self.directory / name)
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)

    def ports(self, now: float = LONG_AGO, **settings: Any) -> Ports:
        made = Settings(**{"port": 0, **settings})
        ports = Ports(made, listeners_from(made), lambda: now)
        self.addCleanup(ports.close)
        return ports

    def opened(self, **settings: Any) -> Ports:
        ports = self.ports(**settings)
        ports.open()
        return ports

    def refused(self, **settings: Any) -> str:
        """Give the message of a daemon that cannot start; none of its sockets is open then."""
        ports = self.ports(**settings)
        error = self.assertRaises(StartFailed, ports.open)
        self.assertEqual(ports.sockets, [])
        return str(error)


class ExposureTests(PortsTestCase):
    def test_loopback(self) -> None:
        """On loopback, and on a Unix socket, nobody needs to be asked."""
        path = str(self.directory / "socket")
        for settings in ({}, {"interface": "::1"}, {"port": None, "listen": (f"unix:{path}",)}):
            self.opened(**settings)
        self.assertEqual(self.log, [])

    def test_exposed(self) -> None:
        """What others can reach is refused where callers are not asked, with the ways out."""
        for interface in (EXPOSED, "::"):
            message = self.refused(interface=interface)
            self.assertIn(f"whoever can reach {interface} port ", message)
            for way_out in ("--token-file", "--client-ca", "--insecure"):
                self.assertIn(way_out, message)

    def test_tls_alone(self) -> None:
        """TLS alone does not tell who calls."""
        self.assertIn("callers are not asked", self.refused(interface=EXPOSED, **self.tls))

    def test_insecure(self) -> None:
        """An operator who means it is warned, and gets it."""
        ports = self.opened(interface=EXPOSED, insecure=True)
        (warning,) = self.log
        self.assertIn("warn: --insecure: whoever can reach 0.0.0.0 port", warning)
        self.assertEqual(len(ports.sockets), 1)

    def test_insecure_where_nobody_can_reach_it(self) -> None:
        """On loopback there is nothing to warn of."""
        self.opened(insecure=True)
        self.assertEqual(self.log, [])

    def test_tokens_in_plain_text(self) -> None:
        """Where tokens are asked for without TLS it is opened, with a warning."""
        self.opened(interface=EXPOSED, token_file=self.tokens)
        (warning,) = self.log
        self.assertIn("speaks no TLS: tokens, and all that is sent there, can be read", warning)

    def test_tokens_over_tls(self) -> None:
        """Where tokens are asked for over TLS all is well."""
        self.opened(interface=EXPOSED, token_file=self.tokens, **self.tls)
        self.assertEqual(self.log, [])

    def test_certificates(self) -> None:
        """Where certificates are asked for all is well."""
        self.opened(interface=EXPOSED, client_ca=self.authority, **self.tls)
        self.assertEqual(self.log, [])

    def test_certificates_beside_a_plain_port(self) -> None:
        """A plain port beside one with certificates asks nobody, and is refused if exposed."""
        both = {"tls_port": 0, "client_ca": self.authority, **self.tls}
        self.opened(**both)
        message = self.refused(interface=EXPOSED, **both)
        self.assertIn("callers are not asked who they are", message)

    def test_one_of_several(self) -> None:
        """One exposed socket is refused, however safe the others are; it is named."""
        message = self.refused(port=0, listen=("tcp:0:interface=0.0.0.0",))
        self.assertTrue(message.startswith("--listen tcp:0:interface=0.0.0.0: "), message)

    def test_the_real_address(self) -> None:
        """It is the bound address that counts, not how it was written."""
        for interface in ("127.1", "localhost", "::ffff:127.0.0.1"):
            self.opened(interface=interface)
        self.assertIn("0.0.0.0 port", self.refused(interface="0"))


class OpeningTests(PortsTestCase):
    def test_all(self) -> None:
        """Every place is opened, in the order of the options, and takes connections."""
        path = str(self.directory / "socket")
        ports = self.opened(listen=("tcp:0:interface=127.0.0.1", f"unix:{path}"))
        self.assertEqual(len(ports.sockets), 3)
        for sock in ports.sockets:
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
            self.assertFalse(sock.getblocking())
        self.assertEqual(ports.sockets[2].getsockname(), path)

    def test_none(self) -> None:
        """If one cannot be had none is open, and no file of a Unix socket is left."""
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        path = self.directory / "socket"
        port = taken.getsockname()[1]
        message = self.refused(listen=(f"unix:{path}", f"tcp:{port}:interface=127.0.0.1"))
        self.assertIn("another process listens there", message)
        self.assertFalse(path.exists())

    def test_nobody_connects_before_all_is_well(self) -> None:
        """A port that is bound before another is refused was never listened on."""
        free = socket.create_server(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        self.refused(port=port, listen=("tcp:0:interface=0.0.0.0",))
        again = self.opened(port=port)
        self.assertEqual(again.sockets[0].getsockname()[1], port)

    def test_addresses(self) -> None:
        """Where it listens, and which of it is TLS, can be told to people."""
        path = self.directory / "socket"
        ports = self.opened(tls_port=0, listen=(f"unix:{path}",), **self.tls)
        plain, secure, unix = ports.addresses.split(", ")
        first, second = (sock.getsockname()[1] for sock in ports.sockets[:2])
        self.assertEqual(plain, f"127.0.0.1 port {first}")
        self.assertEqual(secure, f"127.0.0.1 port {second} (TLS)")
        self.assertEqual(unix, str(path))

    def test_close(self) -> None:
        """Closing, as often as it is done, closes all and removes the file of a Unix socket."""
        path = self.directory / "socket"
        ports = self.opened(listen=(f"unix:{path}",))
        self.assertTrue(stat.S_ISSOCK(path.stat().st_mode))
        fds = [sock.fileno() for sock in ports.sockets]
        for _ in range(2):
            ports.close()
            self.assertEqual(ports.sockets, [])
            self.assertFalse(path.exists())
        for fd in fds:
            self.assertRaises(OSError, os.fstat, fd)

    def test_anothers_file(self) -> None:
        """A file that somebody else has put in the place stays."""
        path = self.directory / "socket"
        ports = self.opened(listen=(f"unix:{path}",))
        path.unlink()
        path.write_text("another's")
        ports.close()
        self.assertEqual(path.read_text(), "another's")


class CredentialsTests(PortsTestCase):
    def test_nothing(self) -> None:
        """A daemon that was told none has none, and one place for a key for each socket."""
        credentials = self.ports(listen=("tcp:0",)).credentials()
        self.assertEqual((credentials.tokens, credentials.client_ca), ((), ""))
        self.assertEqual(credentials.key_pairs, (None, None))

    def test_all(self) -> None:
        """Tokens, the authorities, and the keys in the order of the sockets are read."""
        credentials = self.ports(
            tls_port=0, token_file=self.tokens, client_ca=self.authority, **self.tls
        ).credentials()
        self.assertEqual(credentials.tokens, (("web", digest_of(TOKEN)),))
        plain, secure = credentials.key_pairs
        self.assertIsNone(plain)
        assert secure is not None
        self.assertEqual(secure.certificate, Path(self.tls["certificate"]).read_text())
        self.assertEqual(credentials.client_ca, Path(self.authority).read_text())

    def test_authorities_that_are_gone(self) -> None:
        """An empty file of authorities is refused, at the start and later: it would ask nobody."""
        for more in ({}, {"token_file": self.tokens}):
            ports = self.opened(client_ca=self.authority, **self.tls, **more)
            whole = Path(self.authority).read_text()
            self.write("ca.pem", b"")
            for read in (ports.credentials, self.ports(client_ca=self.authority, **self.tls).open):
                error = self.assertRaises(StartFailed, read)
                self.assertIn("there is no certificate", str(error))
            self.write("ca.pem", whole.encode())

    def test_they_are_read_again(self) -> None:
        """What is in the files is read anew each time."""
        ports = self.opened(token_file=self.tokens, **self.tls)
        before = ports.credentials()
        self.write("tokens", b"ops:another token 0123\n")
        other = AUTHORITY.issue_cert("other.example")
        self.write("cert.pem", other.cert_chain_pems[0].bytes())
        self.write("key.pem", other.private_key_pem.bytes())
        after = ports.credentials()
        self.assertEqual(after.tokens, (("ops", digest_of("another token 0123")),))
        self.assertNotEqual(after.key_pairs, before.key_pairs)

    def test_what_cannot_be_used(self) -> None:
        """What cannot be read, or does not fit, is refused, at the start and later."""
        ports = self.opened(token_file=self.tokens, **self.tls)
        other = AUTHORITY.issue_cert("other.example").private_key_pem.bytes()
        for name, content, words in (
            ("tokens", b"web:short\n", "line 1"),
            ("tokens", b"", "no token in it"),
            ("key.pem", other, "cannot be used with this key"),
            ("key.pem", b"garbage", "the certificate or its key"),
        ):
            before = (self.directory / name).read_bytes()
            self.write(name, content)
            self.assertIn(words, str(self.assertRaises(StartFailed, ports.credentials)))
            self.assertIn(words, self.refused(token_file=self.tokens, **self.tls))
            self.write(name, before)
        ports.credentials()

    def test_garbage_for_an_authority(self) -> None:
        """Authorities that are none are refused."""
        garbage = self.write("garbage.pem", b"garbage")
        self.assertIn("--client-ca", self.refused(client_ca=garbage, **self.tls))

    def test_authorities_without_tls(self) -> None:
        """Authorities for callers are refused where no socket speaks TLS."""
        message = self.refused(client_ca=self.authority)
        self.assertIn("--client-ca is of no use without TLS", message)

    def test_an_expired_certificate(self) -> None:
        """A certificate that has expired is warned of, and used."""
        self.ports(**self.tls).credentials()
        self.assertEqual(self.log, [])
        credentials = self.ports(now=MUCH_LATER, **self.tls).credentials()
        (warning,) = self.log
        self.assertEqual(
            warning, f"warn: --tls {self.tls['certificate']}: the certificate has expired"
        )
        self.assertIsNotNone(credentials.key_pairs[0])


class AllowTests(PortsTestCase):
    def warned(self, *identities: str, **settings: Any) -> list[str]:
        """Give the identities that rules name and nobody has."""
        self.log.clear()
        allow = tuple((identity, ("echo",)) for identity in identities)
        self.ports(allow=allow, **settings).credentials()
        return [line.removeprefix("warn: --allow ").partition("=")[0] for line in self.log]

    def test_unknown_identities(self) -> None:
        """A rule for an identity that has no token is warned of."""
        self.assertEqual(self.warned("web", "wbe", token_file=self.tokens), ["wbe"])

    def test_patterns(self) -> None:
        """A rule for a pattern may be for those to come."""
        self.assertEqual(self.warned("*", "we?", "[a-z]x", token_file=self.tokens), [])

    def test_certificates(self) -> None:
        """Who has a certificate is not known before it comes."""
        self.assertEqual(self.warned("alice", client_ca=self.authority, **self.tls), [])

    def test_where_nobody_is_asked(self) -> None:
        """Where nobody is asked nobody has any identity."""
        self.assertEqual(self.warned("web"), ["web"])
