"""From what the operator decided to the places where the daemon listens."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from twisted.trial.unittest import SynchronousTestCase

from taskd.endpoints import Listener, listeners_from
from taskd.errors import SettingsError, StartFailed
from taskd.listening import BACKLOG, address_text, bind_tcp, is_exposed, listen
from taskd.settings import Settings
from tests.support import temporary_directory

ROOT = Path(__file__).parent.parent

FROM_SYSTEMD = """
import json, os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from taskd.endpoints import listeners_from
from taskd.errors import SettingsError
from taskd.listening import address_text, listen
from taskd.settings import Settings

given = json.loads(sys.argv[1])
try:
    listeners = listeners_from(Settings(port=None, listen=tuple(given)))
except SettingsError as error:
    print(json.dumps(str(error)))
else:
    for number, listener in enumerate(listeners):
        with listener.bind() as sock:
            listen(sock, listener.backlog)
            sock.setblocking(True)
            connection, _ = sock.accept()
            with connection:
                connection.sendall(b"socket %d" % number)
            listener.remove_file()
    print(json.dumps([listener.text for listener in listeners]))
"""
"""A process that systemd started: takes over, and answers one caller on each socket."""

PLUGINS = """
from twisted.internet.defer import Deferred, execute
from twisted.internet.interfaces import IStreamServerEndpoint, IStreamServerEndpointStringParser
from twisted.internet.protocol import Factory
from twisted.internet.ssl import CertificateOptions
from twisted.plugin import IPlugin
from zope.interface import implementer

@implementer(IStreamServerEndpoint)
class Endpoint:
    def __init__(self, listen):
        self.listen = listen

@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    def __init__(self, prefix, act):
        self.prefix = prefix
        self.act = act

    def parseStreamServer(self, reactor, *args):
        return Endpoint(lambda factory: execute(self.act, reactor, factory))

def twice(reactor, factory):
    reactor.listenTCP(1, factory)
    reactor.listenTCP(2, factory)

plain = Parser("plain", lambda reactor, factory: reactor.listenTCP(12345, factory))
wraps = Parser("wraps", lambda reactor, factory: reactor.listenTCP(1, Factory.forProtocol(object)))
twofold = Parser("twofold", twice)
waits = Parser("waits", lambda reactor, factory: Deferred())
clever = Parser("clever", lambda reactor, factory: reactor.callLater(1, int))
secret = Parser("secret", lambda reactor, factory: reactor.listenSSL(
    1, factory, contextFactory=CertificateOptions()))
"""
"""Other people's endpoints."""

WITH_PLUGINS = """
import json, sys
from taskd.endpoints import listeners_from
from taskd.errors import SettingsError
from taskd.settings import Settings

def told(description):
    try:
        return [one.text for one in listeners_from(Settings(port=None, listen=(description,)))]
    except SettingsError as error:
        return str(error)

print(json.dumps({name: told(name + ":") for name in sys.argv[1:]}))
"""


def settings(*listen: str, **fields: Any) -> Settings:
    """Make settings of a daemon that listens where it is told to, and nowhere else."""
    return Settings(**{"port": None, "listen": listen, **fields})


def run(script: str, *args: str, fds: tuple[int, ...] = (), **environment: str) -> Any:
    """Run a script in a process that has file descriptors from 3 on, and read what it printed."""

    def place() -> None:
        high = [os.dup2(fd, 100 + n) for n, fd in enumerate(fds)]
        for n, fd in enumerate(high):
            os.dup2(fd, 3 + n)

    process = subprocess.run(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        preexec_fn=place,
        pass_fds=range(3, 3 + len(fds)),
    )
    return json.loads(process.stdout)


class EndpointCase(SynchronousTestCase):
    """What the tests below share."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def only(self, description: str, **fields: Any) -> Listener:
        (listener,) = listeners_from(settings(description, **fields))
        return listener

    def bound(self, listener: Listener) -> socket.socket:
        made = listener.bind()
        self.addCleanup(made.close)
        return made

    def refused(self, *listen: str, **fields: Any) -> str:
        with self.assertRaises(SettingsError) as caught:
            listeners_from(settings(*listen, **fields))
        return str(caught.exception)

    def assert_refused(self, description: str, why: str, **fields: Any) -> None:
        message = self.refused(description, **fields)
        self.assertTrue(message.startswith(f"--listen {description}: "), message)
        self.assertIn(why, message)
        self.assertNotIn("\n", message)


class PortTests(EndpointCase):
    """The ports of --port and --tls-port."""

    def setUp(self) -> None:
        super().setUp()
        issued = trustme.CA().issue_cert("localhost")
        self.certificate, self.key = self.path("cert.pem"), self.path("key.pem")
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        issued.private_key_pem.write_to_path(self.key)
        os.chmod(self.key, 0o600)

    def listeners(self, **fields: Any) -> list[Listener]:
        return listeners_from(settings(**fields))

    def test_a_plain_port(self) -> None:
        """Without a certificate the port is plain; it is bound only when it is asked for."""
        (listener,) = self.listeners(port=0)
        self.assertEqual(
            (listener.text, listener.backlog), ("--interface 127.0.0.1 --port 0", BACKLOG)
        )
        self.assertIsNone(listener.read_keys)
        sock = self.bound(listener)
        self.assertEqual(sock.getsockname()[0], "127.0.0.1")
        self.assertFalse(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        listener.remove_file()

    def test_tls_on_the_port(self) -> None:
        """With a certificate and no port for TLS, the port speaks TLS."""
        (listener,) = self.listeners(port=0, certificate=self.certificate, key=self.key)
        assert listener.read_keys is not None
        self.assertEqual(listener.read_keys().key, Path(self.key).read_text())

    def test_tls_beside_the_port(self) -> None:
        """With a port for TLS, the port is plain and the other speaks TLS, on one interface."""
        plain, secure = self.listeners(
            port=0, tls_port=0, certificate=self.certificate, key=self.key, interface="::1"
        )
        self.assertEqual(
            (plain.text, secure.text), ("--interface ::1 --port 0", "--interface ::1 --tls-port 0")
        )
        self.assertIsNone(plain.read_keys)
        assert secure.read_keys is not None
        self.assertEqual(secure.read_keys().certificate, Path(self.certificate).read_text())
        for listener in (plain, secure):
            self.assertEqual(self.bound(listener).getsockname()[0], "::1")

    def test_no_interface(self) -> None:
        """An empty interface means all addresses, as in a description."""
        (listener,) = self.listeners(port=0, interface="")
        self.assertTrue(is_exposed(self.bound(listener)))

    def test_a_port_that_is_taken(self) -> None:
        """A port that is taken is found out when it is bound."""
        with bind_tcp("127.0.0.1", 0) as other:
            listen(other)
            (listener,) = self.listeners(port=other.getsockname()[1])
            with self.assertRaises(StartFailed):
                listener.bind()

    def test_order(self) -> None:
        """The ports come first, then the descriptions in their order."""
        made = self.listeners(port=1, listen=("tcp:2", f"unix:{self.path('s')}"))
        texts = [
            "--interface 127.0.0.1 --port 1",
            "--listen tcp:2",
            f"--listen unix:{self.path('s')}",
        ]
        self.assertEqual([one.text for one in made], texts)

    def test_nowhere(self) -> None:
        """A daemon that would listen nowhere is refused."""
        self.assertEqual(self.refused(), "there is nowhere to listen: give --port or --listen")

    def test_one_address_twice(self) -> None:
        """An address that is asked for twice is refused; free ports may be as many as one likes."""
        twice = "tcp:12499:interface=127.0.0.1"
        self.assertIn("listens there already", self.refused(twice, twice))


class TcpTests(EndpointCase):
    """tcp: and tcp6:."""

    def test_an_interface(self) -> None:
        """A description's interface is bound, and escapes are Twisted's."""
        sock = self.bound(self.only("tcp:0:interface=127.0.0.1"))
        self.assertEqual(sock.getsockname()[0], "127.0.0.1")
        sock = self.bound(self.only(r"tcp:port=0:interface=\:\:1"))
        self.assertEqual(sock.getsockname()[0], "::1")

    def test_no_interface(self) -> None:
        """Without an interface, all addresses are meant, which is exposed."""
        for description, host in (("tcp:0", "0.0.0.0"), ("tcp6:0", "::")):
            sock = self.bound(self.only(description))
            self.assertEqual(sock.getsockname()[0], host)
            self.assertTrue(is_exposed(sock))

    def test_ipv6(self) -> None:
        """tcp6: binds addresses of IPv6."""
        sock = self.bound(self.only(r"tcp6:0:interface=\:\:1"))
        self.assertEqual(sock.family, socket.AF_INET6)
        self.assertFalse(is_exposed(sock))

    def test_plain(self) -> None:
        """Such a port speaks no TLS, even if --port does."""
        made = listeners_from(settings("tcp:0", port=0, certificate="c", key="k"))
        self.assertEqual([one.read_keys is None for one in made], [False, True])

    def test_backlog(self) -> None:
        """A larger backlog than Twisted's default is honoured; else it is ours."""
        for text, expected in (
            ("", BACKLOG),
            (":backlog=10", BACKLOG),
            (":backlog=50", BACKLOG),
            (":backlog=51", 51),
            (":backlog=65535", 65535),
        ):
            self.assertEqual(self.only(f"tcp:0{text}").backlog, expected)

    def test_wrong_ones(self) -> None:
        """What Twisted cannot make an endpoint of is refused in one line."""
        for description, why in (
            ("", "Unknown endpoint type: ''"),
            ("12345", "Unknown endpoint type: '12345'"),
            ("nosuch:1", "Unknown endpoint type: 'nosuch'"),
            ("tcp:", "invalid literal"),
            ("tcp:http", "invalid literal"),
            ("tcp:1:interfaces=x", "unexpected keyword"),
            ("tcp:65536", "a port is a number from 0 to 65535, not 65536"),
            ("tcp:-1", "not -1"),
            ("tcp:1\\", "server endpoint of Twisted"),
        ):
            self.assert_refused(description, why)


class WrapperTests(EndpointCase):
    """Endpoints that do more than listen."""

    def test_twisteds(self) -> None:
        """Twisted's own that wrap, or do not listen, are refused with what to use instead."""
        for description, why in (
            ("haproxy:tcp:8080", "pass plain TCP"),
            ("HAProxy:unix:/tmp/x", "pass plain TCP"),
            ("tls:/etc/certificates:443", "use ssl:"),
            ("stdio:", "takes no connections"),
        ):
            self.assert_refused(description, why)

    def test_plugins(self) -> None:
        """An endpoint of a plugin is taken if it only listens, and once."""
        plugins = self.directory / "twisted" / "plugins"
        plugins.mkdir(parents=True)
        (plugins / "for_test_endpoints.py").write_text(PLUGINS)
        names = ("plain", "wraps", "twofold", "waits", "clever", "secret")
        told = run(WITH_PLUGINS, *names, PYTHONPATH=str(self.directory))
        self.assertEqual(told.pop("plain"), ["--listen plain:"])
        for name, why in (
            ("wraps", "it changes what is said on a connection"),
            ("twofold", "it does not listen"),
            ("waits", "it does not listen"),
            ("clever", "callLater"),
            ("secret", "its key cannot be read again"),
        ):
            self.assertIn(f"--listen {name}:: ", told[name])
            self.assertIn(why, told[name])


class UnixTests(EndpointCase):
    """unix:."""

    def bound_file(self, description: str, **fields: Any) -> tuple[Listener, os.stat_result]:
        listener = self.only(description, **fields)
        self.bound(listener)
        return listener, os.stat(self.path("sock"))

    def test_it_listens(self) -> None:
        """A Unix socket is bound when it is asked for, and its file goes at the end."""
        path = self.path("sock")
        listener = self.only(f"unix:{path}")
        self.assertFalse(os.path.exists(path))
        listener.remove_file()
        sock = self.bound(listener)
        listen(sock, listener.backlog)
        self.assertEqual(address_text(sock), path)
        listener.remove_file()
        self.assertFalse(os.path.exists(path))

    def test_mode(self) -> None:
        """Owner and group may connect, unless the description says who."""
        path = self.path("sock")
        for text, mode in (
            ("", 0o660),
            (":mode=600", 0o600),
            (":mode=666", 0o666),
            (":666", 0o666),
            (":lockfile=0", 0o660),
            (":lockfile=1:backlog=100", 0o660),
        ):
            listener, found = self.bound_file(f"unix:{path}{text}")
            self.assertEqual(stat.S_IMODE(found.st_mode), mode, text)
            listener.remove_file()
            self.assertEqual(os.listdir(self.directory), [])

    def test_a_path_that_looks_like_a_mode(self) -> None:
        """What is escaped belongs to the path and says no mode."""
        listener = self.only(f"unix:{self.directory}/a\\:mode\\=666")
        self.bound(listener)
        found = os.stat(self.path("a:mode=666"))
        self.assertEqual(stat.S_IMODE(found.st_mode), 0o660)

    def test_owner(self) -> None:
        """The file is given to whom --socket-owner says."""
        owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        _, found = self.bound_file(f"unix:{self.path('sock')}", socket_owner="{}:{}".format(*owner))
        self.assertEqual((found.st_uid, found.st_gid), owner)

    def test_an_owner_of_nothing(self) -> None:
        """--socket-owner without a Unix socket is refused."""
        self.assertIn("--socket-owner is of no use", self.refused("tcp:1", socket_owner="root"))

    def test_relative(self) -> None:
        """A path is meant from where the daemon is started, wherever it goes later."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        listener = self.only("unix:sock")
        os.chdir("/")
        self.assertEqual(address_text(self.bound(listener)), self.path("sock"))
        listener.remove_file()
        self.assertEqual(os.listdir(self.directory), [])

    def test_wrong_ones(self) -> None:
        """A description without a path, or with modes that are none, is refused."""
        for description, why in (
            ("unix:", "give the path of its file"),
            ("unix:/tmp/x:mode=rw", "invalid literal"),
            ("unix:/tmp/x:mode=10000", "mode=10000: give permissions such as mode=660"),
            ("unix:/tmp/x:mode=-1", "give permissions"),
        ):
            self.assert_refused(description, why)


class SslTests(EndpointCase):
    """ssl:."""

    def setUp(self) -> None:
        super().setUp()
        self.authority = trustme.CA()
        self.issue()

    def issue(self, name: str = "localhost") -> None:
        issued = self.authority.issue_cert(name)
        self.certificate = issued.cert_chain_pems[0].bytes().decode()
        self.key = issued.private_key_pem.bytes().decode()
        self.write("cert.pem", self.certificate)
        self.write("key.pem", self.key)

    def write(self, name: str, text: str, mode: int = 0o600) -> str:
        path = self.path(name)
        Path(path).write_text(text)
        os.chmod(path, mode)
        return path

    def describe(self, key: str = "key.pem", certificate: str = "cert.pem", more: str = "") -> str:
        return (
            f"ssl:0:privateKey={self.path(key)}:certKey={self.path(certificate)}"
            f":interface=127.0.0.1{more}"
        )

    def read(self, description: str) -> tuple[str, str]:
        listener = self.only(description)
        assert listener.read_keys is not None
        pair = listener.read_keys()
        self.assertEqual(pair.origin, f"--listen {description}")
        return pair.certificate, pair.key

    def assert_same_key(self, text: str, other: str) -> None:
        numbers = [
            load_pem_private_key(pem.encode(), None).private_numbers() for pem in (text, other)
        ]
        self.assertEqual(numbers[0], numbers[1])

    def test_two_files(self) -> None:
        """Certificate and key are those of the two files; the port is bound like a plain one."""
        certificate, key = self.read(self.describe())
        self.assertEqual(certificate.split(), self.certificate.split())
        self.assert_same_key(key, self.key)
        sock = self.bound(self.only(self.describe(more=":backlog=60")))
        self.assertEqual(sock.getsockname()[0], "127.0.0.1")
        self.assertEqual(self.only(self.describe(more=":backlog=60")).backlog, 60)

    def test_one_file(self) -> None:
        """Without certKey=, the key's file holds the certificate too, in either order."""
        for text in (self.key + self.certificate, self.certificate + self.key):
            path = self.write("both.pem", text)
            for description in (f"ssl:0:privateKey={path}", f"ssl:0:{path}"):
                certificate, key = self.read(description)
                self.assertEqual(certificate.split(), self.certificate.split())
                self.assert_same_key(key, self.key)

    def test_the_file_by_default(self) -> None:
        """Without privateKey= too, it is server.pem, as Twisted has it."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        self.assert_refused("ssl:0", "server.pem")
        self.write("server.pem", self.key + self.certificate)
        self.assertEqual(self.read("ssl:0")[0].split(), self.certificate.split())

    def test_chain(self) -> None:
        """Those that vouch for the certificate stand behind it."""
        authority = self.authority.cert_pem.bytes().decode()
        self.write("chain.pem", authority, 0o644)
        certificate, _ = self.read(self.describe(more=f":extraCertChain={self.path('chain.pem')}"))
        self.assertEqual(certificate.split(), (self.certificate + authority).split())

    def test_renewed(self) -> None:
        """Each time that the keys are read, the files are read anew."""
        listener = self.only(self.describe())
        assert listener.read_keys is not None
        self.issue("other.example")
        self.assertEqual(listener.read_keys().certificate.split(), self.certificate.split())
        os.unlink(self.path("key.pem"))
        with self.assertRaises(StartFailed) as caught:
            listener.read_keys()
        self.assertIn("key.pem: No such file", str(caught.exception))

    def test_a_key_that_others_may_read(self) -> None:
        """A key that others may read is refused, in whichever file it is."""
        os.chmod(self.path("key.pem"), 0o644)
        self.assert_refused(self.describe(), "chmod 600")
        os.chmod(self.path("key.pem"), 0o640)
        self.only(self.describe())
        self.write("both.pem", self.certificate + self.key, 0o644)
        self.assert_refused(self.describe(certificate="both.pem"), "chmod 600")

    def test_an_encrypted_key(self) -> None:
        """A key with a passphrase is refused, and nobody is asked for the passphrase."""
        key = load_pem_private_key(self.key.encode(), None)
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            text = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret"))
            self.write("locked.pem", text.decode())
            self.assert_refused(self.describe("locked.pem"), "is encrypted")
            # Twisted reads the certificate's file first, and would find this key in it.
            self.write("both.pem", self.certificate + text.decode())
            self.assert_refused(self.describe(certificate="both.pem"), "is encrypted")

    def test_files_that_do_not_fit(self) -> None:
        """No key, no certificate, no file, or those of two pairs: each is refused."""
        self.write("empty.pem", "")
        self.assert_refused(self.describe("empty.pem"), "there is no private key in")
        self.assert_refused(self.describe(certificate="empty.pem"), "there is no certificate")
        self.assert_refused(self.describe("none.pem"), "none.pem: No such file")
        self.assert_refused(self.describe(more=":extraCertChain=/nosuch"), "No such file")
        old = self.write("old.pem", self.key)
        self.issue()
        self.assert_refused(self.describe(os.path.basename(old)), "do not match")

    def test_what_cannot_be_honoured(self) -> None:
        """A method of SSL or parameters of Diffie-Hellman are refused, named or not."""
        for argument in ("sslmethod=TLSv1_METHOD", "dhParameters=/etc/dh.pem"):
            name = argument.partition("=")[0]
            self.assert_refused(self.describe(more=f":{argument}"), f"leave {name}= out")
        self.assert_refused("ssl:0:key:cert:TLSv1_METHOD", "leave sslmethod= out")


class SystemdTests(EndpointCase):
    """systemd:, in a process that is given sockets as systemd would."""

    def start(self, listen: list[str], given: Mapping[str, socket.socket]) -> Any:
        return run(
            FROM_SYSTEMD,
            json.dumps(listen),
            fds=tuple(sock.fileno() for sock in given.values()),
            LISTEN_FDS=str(len(given)),
            LISTEN_FDNAMES=":".join(given),
        )

    def port(self) -> socket.socket:
        made = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(made.close)
        return made

    def call(self, family: int, address: Any) -> socket.socket:
        caller = socket.socket(family)
        self.addCleanup(caller.close)
        caller.settimeout(30)
        caller.connect(address)
        return caller

    def test_taken_over(self) -> None:
        """Sockets are taken over by name and number, Unix sockets too, whose files stay."""
        port, unix = self.port(), socket.socket(socket.AF_UNIX)
        self.addCleanup(unix.close)
        unix.bind(self.path("sock"))
        unix.listen()
        first = self.call(socket.AF_UNIX, self.path("sock"))
        second = self.call(socket.AF_INET, port.getsockname())
        listen = ["systemd:domain=UNIX:name=local", "systemd:domain=INET:index=0"]
        told = self.start(listen, {"net": port, "local": unix})
        self.assertEqual(told, [f"--listen {text}" for text in listen])
        self.assertEqual((first.recv(100), second.recv(100)), (b"socket 0", b"socket 1"))
        self.assertTrue(os.path.exists(self.path("sock")))

    def test_twice(self) -> None:
        """A socket can be taken over once; a second description of it is refused."""
        listen = [f"systemd:domain=INET:{which}" for which in ("index=1", "index=0", "name=b")]
        told = self.start(listen, {"a": self.port(), "b": self.port()})
        self.assertRegex(told, r"^--listen systemd:domain=INET:name=b: .*already")

    def test_none(self) -> None:
        """A socket that was not passed, or does not listen, is refused."""
        for which in ("index=1", "name=other"):
            told = self.start([f"systemd:domain=INET:{which}"], {"net": self.port()})
            self.assertIn("systemd passed no such socket", told)
        with socket.socket() as silent:
            told = self.start(["systemd:domain=INET:index=0"], {"net": silent})
        self.assertIn("no stream socket that listens", told)

    def test_without_systemd(self) -> None:
        """Where systemd passed nothing, its sockets are refused."""
        self.assert_refused("systemd:domain=INET:index=0", "systemd passed no such socket")
        self.assert_refused("systemd:domain=INET", "exactly one")
