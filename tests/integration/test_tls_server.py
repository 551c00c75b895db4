"""The daemon over TLS: what it shows, whom it lets in, and how its connections end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Final

import trustme

from tests.integration.callers import (
    HOST,
    by_tls,
    certificate_pem,
    context_of,
    files_of,
    key_pem,
    ports_of,
    secure,
    with_token,
)
from tests.integration.case import DaemonTestCase, RefusedTestCase, lines_of, number_of_fds
from tests.integration.crowd import Crowd, HostileTestCase, Peer
from tests.integration.daemon import (
    WAIT_SECONDS,
    Connection,
    Daemon,
    temporary_directory,
    wait_until,
    write_secret,
)

CERTIFICATE: Final = "server.pem"
KEY: Final = "server.key"
CLIENT_CA: Final = "clients.pem"
OPTIONS: Final = ("--tls", CERTIFICATE, "--key", KEY)

TOKEN: Final = "web-0123456789abcdef0123456789"
LETTERS: Final = "x" * 100_000

PASSPHRASE: Final = "not a secret"


def half_a_hello() -> bytes:
    """Give the first half of what a client says first."""
    said, heard = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.wrap_bio(heard, said, server_hostname=HOST).do_handshake()
    except ssl.SSLWantReadError:
        hello = said.read()
    return hello[: len(hello) // 2]


class TlsServerTestCase(DaemonTestCase):
    """Base of tests of daemons whose certificate is the authority's."""

    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.issued = self.authority.issue_cert(HOST)
        self.context = context_of(self.authority)

    def start_secure(self, *options: str, **more: Any) -> Daemon:
        files = {CERTIFICATE: certificate_pem(self.issued), **more.pop("files", {})}
        secrets = {KEY: key_pem(self.issued), **more.pop("secrets", {})}
        more.setdefault("caller", by_tls(self.context))
        return self.start(*OPTIONS, *options, files=files, secrets=secrets, **more)

    def secure(self, daemon: Daemon, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        """Connect over TLS."""
        sock = secure(context or self.context, daemon.port)
        self.addCleanup(sock.close)
        return sock

    def serial(self, daemon: Daemon) -> str:
        """Tell the number of the certificate that a new connection is shown."""
        with self.secure(daemon) as sock:
            shown = sock.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])

    def renew(self, daemon: Daemon) -> None:
        """Put a new certificate of the same name in the place of the old one."""
        self.issued = self.authority.issue_cert(HOST)
        write_secret(daemon.directory / KEY, key_pem(self.issued))
        write_secret(daemon.directory / CERTIFICATE, certificate_pem(self.issued))

    def assert_ends_in_order(self, connection: Connection) -> None:
        """It is ended by TLS's goodbye; anything else would be an exception."""
        self.assertEqual(connection.rest(), b"")

    def is_given_up(self, sock: socket.socket) -> bool:
        """Wait until a socket is hung up on, whatever is said on it before."""
        self.all_that_is_said(sock)
        return True

    def all_that_is_said(self, sock: socket.socket) -> bytes:
        """Read until the daemon hangs up, orderly or not."""
        heard = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(65536):
                heard += data
        return heard


class PortTests(TlsServerTestCase):
    def test_in_place_of_the_plain_port(self) -> None:
        """With ``--tls`` the port speaks TLS, and who speaks plain text to it is cut off."""
        daemon = self.start_secure(procs=1)
        self.assertEqual(daemon.addresses, f"127.0.0.1 port {daemon.port} (TLS)")
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        path = self.path(daemon)
        text = "x" * 1_000_000
        self.assertEqual(daemon.ask("echo", [text]), text)
        with Connection("127.0.0.1", daemon.port) as plain:
            plain.request("touch", [path])
            plain.request("touch", [path])
            self.assertNotIn(b"result", self.all_of(plain))
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(path))
        self.wait_for_log(daemon, "no TLS handshake")
        self.assertNotIn("Traceback", daemon.log)

    def all_of(self, connection: Connection) -> bytes:
        try:
            return connection.rest()
        except ConnectionError:
            return b""

    def test_beside_the_plain_port(self) -> None:
        """With ``--tls-port`` there is a port of each kind, with the same tasks behind them."""
        daemon = self.start_secure("--tls-port", "0", caller=None, procs=1)
        (plain,), (tls,) = (ports_of(daemon, tls=kind) for kind in (False, True))
        self.assertNotEqual(plain, tls)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        with by_tls(self.context, tls)(daemon) as caller:
            self.assertEqual(caller.ask("add", [1, 2]), 3)

    def test_tls_to_the_plain_port(self) -> None:
        """Who speaks TLS to the plain port is cut off, without a word."""
        daemon = self.start(procs=1)
        with self.assertRaises((ssl.SSLError, ConnectionError)) as caught:
            self.secure(daemon)
        self.assertNotIn("WRONG_VERSION", str(caught.exception))
        with socket.create_connection(("127.0.0.1", daemon.port), WAIT_SECONDS) as half:
            half.sendall(half_a_hello().replace(b"\n", b"\r"))
            self.assertEqual(self.all_that_is_said(half), b"")
        self.wait_for_log(daemon, "it speaks TLS, and is cut off")

    def test_endpoint(self) -> None:
        """``--listen ssl:`` speaks TLS, and sends the chain that it was given."""
        child = self.authority.create_child_ca()
        issued = child.issue_cert(HOST)
        own, *chain = (pem.bytes().decode() for pem in issued.cert_chain_pems)
        daemon = self.start(
            f"--listen=ssl:0:privateKey={KEY}:certKey={CERTIFICATE}:interface=127.0.0.1"
            ":extraCertChain=chain.pem",
            port=None,
            files={CERTIFICATE: own, "chain.pem": "".join(chain)},
            secrets={KEY: key_pem(issued)},
            caller=by_tls(self.context),
        )
        self.assertEqual(daemon.addresses, f"127.0.0.1 port {daemon.port} (TLS)")
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_chain(self) -> None:
        """An authority between the server's certificate and the root is sent along."""
        self.issued = self.authority.create_child_ca().issue_cert(HOST)
        daemon = self.start_secure(procs=1)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        with self.assertRaises(ssl.SSLCertVerificationError):
            self.secure(daemon, context_of(trustme.CA()))

    def test_token(self) -> None:
        """A token is asked for over TLS as well."""
        call = by_tls(self.context)
        daemon = self.start_secure(
            "--token-file",
            "tokens",
            secrets={"tokens": f"web:{TOKEN}\n"},
            caller=lambda daemon: with_token(call(daemon), TOKEN),
        )
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        with call(daemon) as caller:
            self.assert_error(caller.ask("add", [1, 2]), "unauthorized")
            self.assert_ends_in_order(caller)


class ForeignClientTests(TlsServerTestCase):
    """``openssl s_client`` calls."""

    def call(self, daemon: Daemon, *options: str) -> tuple[int, list[bytes], str]:
        """Ask once, then say what makes the daemon hang up; give status, lines and errors."""
        ca = daemon.directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(ca))
        ended = subprocess.run(
            [
                *("openssl", "s_client", "-quiet", "-verify_return_error", "-servername", HOST),
                *("-connect", f"127.0.0.1:{daemon.port}", "-CAfile", str(ca), *options),
            ],
            input=b'{"function": "add", "args": [1, 2]}\n[]\n',
            capture_output=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
        return ended.returncode, ended.stdout.splitlines(), ended.stderr.decode()

    def test_versions(self) -> None:
        """TLS 1.3 and 1.2 are spoken, and TLS 1.1 is refused."""
        daemon = self.start_secure(procs=1)
        for version in ("-tls1_3", "-tls1_2"):
            status, lines, errors = self.call(daemon, version)
            self.assertEqual(lines[:1], [b"3"], errors)
            self.assertIn(b"malformed", lines[1])
            self.assertEqual(status, 0, errors)
        status, lines, errors = self.call(daemon, "-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0")
        self.assertEqual((status, lines), (1, []))
        self.assertIn("alert protocol version", errors)
        self.wait_for_log(daemon, "no TLS handshake: unsupported protocol")

    def test_client_certificate(self) -> None:
        """With ``--client-ca`` it is served with a certificate, and refused without one."""
        clients = trustme.CA()
        own = clients.issue_cert("web.example", common_name="web")
        pem = clients.cert_pem.bytes().decode()
        call = by_tls(context_of(self.authority, own))
        daemon = self.start_secure("--client-ca", CLIENT_CA, files={CLIENT_CA: pem}, caller=call)
        certificate, key = files_of(daemon.directory, "own", own)
        _, lines, errors = self.call(daemon, "-cert", certificate, "-key", key)
        self.assertEqual(lines[:1], [b"3"], errors)
        _, lines, errors = self.call(daemon)
        self.assertEqual(lines, [])
        self.assertIn("certificate required", errors)


class ClientCertificateTests(TlsServerTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.clients = trustme.CA()

    def own(self, name: str, authority: trustme.CA | None = None) -> ssl.SSLContext:
        """Show a certificate of that common name."""
        issued = (authority or self.clients).issue_cert("client.example", common_name=name)
        return context_of(self.authority, issued)

    def start_knowing(self, *options: str, **more: Any) -> Daemon:
        pem = self.clients.cert_pem.bytes().decode()
        return self.start_secure(
            "--client-ca",
            CLIENT_CA,
            *options,
            files={CLIENT_CA: pem},
            caller=by_tls(self.own("ops")),
            **more,
        )

    def test_identity(self) -> None:
        """A certificate's common name is the identity that status, log and ``--allow`` know."""
        daemon = self.start_knowing("--allow=web*=add,mail.*", "--allow=ops=*", procs=1)
        callers = [Connection.over(self.secure(daemon, self.own("web 1"))) for _ in range(2)]
        for caller in callers:
            self.addCleanup(caller.close)
            self.assertEqual(caller.ask("add", [1, 2]), 3)
            self.assert_error(caller.ask("echo", [1]), "unauthorized", "web 1 may not call")
            self.assertEqual(caller.ask("taskd.ping"), "pong")
        (worker,) = daemon.status()["workers"]
        self.assertEqual(worker["callers"], {"web 1": 2, "ops": 1})
        self.wait_for_log(daemon, ": it is web 1")
        between = self.own("web 2", self.clients.create_child_ca())
        with Connection.over(self.secure(daemon, between)) as caller:
            self.assertEqual(caller.ask("add", [1, 2]), 3)

    def test_strangers(self) -> None:
        """Without a certificate of that authority nothing is run, and the log says why."""
        daemon = self.start_knowing(procs=1)
        path = self.path(daemon)
        for context, words in (
            (self.context, "peer did not return a certificate"),
            (self.own("ops", trustme.CA()), "certificate verify failed"),
        ):
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context.maximum_version = version
                with self.assertRaises((ssl.SSLError, ConnectionError)):
                    stranger = Connection.over(self.secure(daemon, context))
                    self.addCleanup(stranger.close)
                    stranger.request("touch", [path])
                    self.assertEqual(stranger.line(), b"")
                    raise ConnectionError("the daemon hung up")
            self.wait_for_log(daemon, f"no TLS handshake: {words}")
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(path))

    def test_token_of_another(self) -> None:
        """Who is known by a certificate needs no token, and may show another identity's."""
        daemon = self.start_knowing(
            "--token-file", "tokens", "--allow=ops=*", "--allow=web=add",
            secrets={"tokens": f"web:{TOKEN}\n"},
        )  # fmt: skip
        with daemon.connect() as caller:
            self.assertEqual(caller.ask("echo", [1]), 1)
            self.assertEqual(caller.ask("taskd.auth", [TOKEN]), "web")
            self.assert_error(caller.ask("echo", [1]), "unauthorized")


class _Recorder(threading.Thread):
    """
    Has one note after the other written, and asks again for what was not run.

    After an end in order what had no answer was not run; any other end is a
    failure.
    """

    def __init__(self, daemon: Daemon, name: str, path: str, window: int) -> None:
        super().__init__(daemon=True)
        self._daemon, self._name, self._path, self._window = daemon, name, path, window
        self._is_stopping = False
        self.asked: set[str] = set()
        self.answered: set[str] = set()
        self.connections = 0
        self.failures: list[str] = []

    def stop(self) -> None:
        self._is_stopping = True
        self.join()

    def run(self) -> None:
        try:
            while not self._is_stopping or self.asked != self.answered:
                self._use(self._daemon.connect())
                self.connections += 1
        except (OSError, ValueError, KeyError) as error:
            self.failures.append(repr(error))

    def _use(self, connection: Connection) -> None:
        with connection:
            for word in self.asked - self.answered:
                connection.request("record", [self._path, word], id=word)
            while True:
                while not self._is_stopping and len(self.asked - self.answered) < self._window:
                    word = f"{self._name}{len(self.asked)}"
                    self.asked.add(word)
                    connection.request("record", [self._path, word], id=word)
                if self.asked == self.answered:
                    return
                line = connection.line()
                if not line:
                    return  # in order: else it would have raised
                reply = json.loads(line)
                if reply["result"] != reply["id"] or reply["id"] in self.answered:
                    self.failures.append(f"not asked for: {reply}")
                self.answered.add(reply["id"])


class ReloadTests(TlsServerTestCase):
    def test_certificate_under_load(self) -> None:
        """New connections see a new certificate; what old ones asked is run once, none lost."""
        daemon = self.start_secure(procs=3)
        path = str(daemon.directory / "notes")
        recorders = [_Recorder(daemon, f"{n}-", path, n) for n in (1, 2, 8, 32)]
        for recorder in recorders:
            recorder.start()
        serials = {self.serial(daemon)}
        for _ in range(2):
            self.renew(daemon)
            self.load_anew(daemon)
            counts = [(len(one.answered), one.connections) for one in recorders]
            serials.add(self.serial(daemon))
            self.wait_for_more(recorders, counts)
        for recorder in recorders:
            recorder.stop()
        self.assertEqual([one.failures for one in recorders], [[]] * 4)
        self.assertEqual(len(serials), 3)
        wanted = Counter(word for one in recorders for word in one.asked)
        self.assertEqual(Counter(lines_of(path)), wanted)
        self.assertEqual(daemon.settled_restarts(), {"reload": 6})

    def wait_for_more(self, recorders: list[_Recorder], counts: list[tuple[int, int]]) -> None:
        """Wait until each has had replies, over a new connection."""
        wait_until(
            lambda: all(
                one.failures or (len(one.answered) > answered + 50 and one.connections)
                for one, (answered, _) in zip(recorders, counts, strict=True)
            ),
            what="more replies",
        )

    def test_owed(self) -> None:
        """A connection is told goodbye once it is owed nothing, at once if that is so."""
        daemon = self.start_secure()
        owed, idle = self.connect(daemon), self.connect(daemon)
        self.assertEqual(idle.ask("add", [1, 2]), 3)
        path = self.begin(daemon, owed, "hold", id="hold")
        self.load_anew(daemon)
        self.assert_ends_in_order(idle)
        self.assertEqual(owed.ask("add", [1, 2], id=1), {"id": 1, "result": 3})
        Path(path).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})
        self.assert_ends_in_order(owed)

    def test_unusable_certificate(self) -> None:
        """With a certificate that cannot be used the old serves on; log and status say why."""
        daemon = self.start_secure()
        before, serial, caller = daemon.workers(), self.serial(daemon), self.connect(daemon)
        certificate, key = daemon.directory / CERTIFICATE, daemon.directory / KEY
        other = self.authority.issue_cert(HOST)
        for make, words in (
            (lambda: write_secret(key, key_pem(other)), "cannot be used with this key"),
            (lambda: write_secret(key, key_pem(self.issued), 0o644), "chmod 600"),
            (lambda: write_secret(key, "nothing"), "the certificate or its key"),
            (certificate.unlink, "No such file"),
        ):
            make()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda words=words: words in self.reload_failure(daemon), what=words)
            self.wait_for_log(daemon, words)
            self.assertEqual(self.serial(daemon), serial)
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.workers(), before)
        self.renew(daemon)
        self.load_anew(daemon)
        self.assertEqual(self.reload_failure(daemon), "")
        self.assertNotEqual(self.serial(daemon), serial)

    def test_time_limit(self) -> None:
        """Callers of a worker that is replaced get what they are owed, and then a goodbye."""
        daemon = self.start_secure()
        caller, limited, path = self.connect(daemon), self.path(daemon), self.path(daemon)
        caller.request("hold_limited", [limited], id="limited")
        caller.request("hold", [path], id="hold")
        reply = caller.reply()
        self.assertEqual(reply["id"], "limited")
        self.assert_error(reply, "time-limit")
        wait_until(lambda: daemon.restarts() == {"time_limit": 1}, what="a replacement")
        self.assertEqual(caller.ask("add", [1, 2], id=1), {"id": 1, "result": 3})
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": "hold", "result": "released"})
        self.assert_ends_in_order(caller)


class RefusedStartTests(RefusedTestCase):
    def setUp(self) -> None:
        self.issued = trustme.CA().issue_cert(HOST)
        self.pem, self.key = certificate_pem(self.issued), key_pem(self.issued)

    def test_key_that_cannot_be_used(self) -> None:
        """A key that others read, that is encrypted, or of another certificate ends the start."""
        directory = temporary_directory(self)
        _, plain = files_of(directory, "one", self.issued)
        encrypted = subprocess.run(
            ["openssl", "pkey", "-in", plain, "-aes256", "-passout", f"pass:{PASSPHRASE}"],
            capture_output=True,
            check=True,
            timeout=WAIT_SECONDS,
        ).stdout.decode()
        for key, mode, words, others in (
            (self.key, 0o644, "chmod 600", "chmod 600"),
            (encrypted, 0o600, "encrypted", "encrypted"),
            (
                key_pem(trustme.CA().issue_cert(HOST)),
                0o600,
                "cannot be used with this key",
                "do not match",
            ),
            ("", 0o600, "the certificate or its key", "no private key"),
        ):
            write_secret(directory / KEY, key, mode)
            path = str(directory / KEY)
            ended, of_endpoint = self.refuse_all(
                ("--tls", CERTIFICATE, "--key", path),
                (f"--listen=ssl:0:privateKey={path}:certKey={CERTIFICATE}",),
                files={CERTIFICATE: self.pem},
            )
            self.assert_refused(ended, words)
            self.assert_refused(of_endpoint, "--listen", others)

    def test_options_that_do_not_fit(self) -> None:
        """Options that are of no use without others are refused."""
        files, secrets = {CERTIFICATE: self.pem}, {KEY: self.key}
        cases = (
            (("--tls", CERTIFICATE), ("--tls and --key",)),
            (("--key", KEY), ("--tls and --key",)),
            (("--tls-port", "0"), ("--tls-port", "--tls CERT")),
            (("--client-ca", CERTIFICATE), ("--client-ca", "without TLS")),
            ((*OPTIONS, "--client-ca", "none"), ("--client-ca /", "/none: No such file")),
            ((*OPTIONS, "--client-ca", KEY), ("--client-ca",)),
            (("--tls", "none", "--key", KEY), ("--tls /", "/none: No such file")),
        )
        refused = self.refuse_all(*(case[0] for case in cases), files=files, secrets=secrets)
        for ended, (_, words) in zip(refused, cases, strict=True):
            self.assert_refused(ended, *words)


class SilentTests(TlsServerTestCase):
    def test_silence(self) -> None:
        """Who does not come to the end of the handshake, or of a line, is given up in time."""
        daemon = self.start_secure("--first-line-timeout", "1", procs=1)
        (worker,) = daemon.workers().values()
        before = number_of_fds(worker)
        silent = []
        for said in (b"", half_a_hello(), b"\x16", b"\x16\x03\x01\x40\x00"):
            sock = socket.create_connection(("127.0.0.1", daemon.port), WAIT_SECONDS)
            self.addCleanup(sock.close)
            sock.sendall(said)
            silent.append(sock)
        shaken = [Connection.over(self.secure(daemon)) for _ in range(2)]
        shaken[1].send('{"function"')
        for sock in silent:
            self.assertTrue(self.is_given_up(sock))
        for connection in shaken:
            self.assert_error(json.loads(connection.line()), "malformed", "1 s")
            self.assert_ends_in_order(connection)
            connection.close()
        wait_until(lambda: number_of_fds(worker) <= before, what="closed files")
        self.assertNotIn("Traceback", daemon.log)

    def test_stop(self) -> None:
        """Neither idle connections nor silent ones hold up the end, however long the grace."""
        daemon = self.start_secure("--grace", "3600", "--first-line-timeout", "3600")
        idle = [self.connect(daemon) for _ in range(20)]
        for connection in idle:
            self.assertEqual(connection.ask("add", [1, 2]), 3)
        for said in (b"", half_a_hello()):
            sock = socket.create_connection(("127.0.0.1", daemon.port), WAIT_SECONDS)
            self.addCleanup(sock.close)
            sock.sendall(said)
        self.secure(daemon)
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        for connection in idle:
            self.assert_ends_in_order(connection)
        self.assertNotIn("is killed", daemon.log)
        self.assert_port_is_free(daemon)

    def test_stop_with_a_task(self) -> None:
        """A stop waits for what runs, answers it, and says goodbye."""
        daemon = self.start_secure()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id="hold")
        daemon.signal(signal.SIGTERM)
        self.wait_for_log(daemon, "busy workers: 1")
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": "hold", "result": "released"})
        self.assert_ends_in_order(caller)
        caller.close()
        daemon.wait_until_gone()


class IdleTests(TlsServerTestCase):
    def test_a_request_behind_the_goodbye(self) -> None:
        """What comes over an idle connection after its goodbye is not run: so that says."""
        daemon = self.start_secure("--idle-timeout", "0.5", procs=1)
        path = self.path(daemon)
        with self.secure(daemon) as sock:
            sock.sendall(b'{"function": "add", "args": [1, 2]}\n')
            self.assertEqual(self.all_that_is_said(sock), b"3\n")
            request = {"function": "touch", "args": [path]}
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.unwrap() as under:  # says goodbye, too: so all of it has come
                self.assertEqual(self.all_that_is_said(under), b"")
        # The one worker's one thread would have run it before this.
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(path))


class UnreadTests(TlsServerTestCase, HostileTestCase):
    def test_unread(self) -> None:
        """20 who ask for 100 KB again and again, and never read, cost some MB until they go."""
        daemon = self.start_secure(procs=1)
        line = json.dumps({"function": "echo", "args": [LETTERS], "id": 1}).encode() + b"\n"
        with self.unharmed(daemon, most_mib=96) as others:
            crowd = Crowd()
            self.addCleanup(crowd.close)
            for _ in range(20):
                crowd.append(Peer(daemon, iter(lambda: line, b""), self.secure(daemon)))
            crowd.push_until_still()
            others.wait_for_more()
            self.tell(f"{sum(peer.sent for peer in crowd) / 2**20:.0f} MiB of requests were taken")
            crowd.close()

    def test_connect_and_close(self) -> None:
        """500 who leave in the middle of the handshake, or after it, leave nothing behind."""
        daemon = self.start_secure()
        hello = half_a_hello()
        with self.unharmed(daemon, most_mib=48):
            for number in range(500):
                if number % 5:
                    peer = Peer(daemon)
                    peer.say(hello[: number % 7 * 40])
                else:
                    peer = Peer(daemon, (), self.secure(daemon))
                (peer.reset if number % 2 else peer.close)()
