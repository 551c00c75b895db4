"""Where the daemon listens: Unix sockets, sockets of systemd's, several, and none unsafe."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import sys
import unittest
from pathlib import Path
from typing import Any, Final

from tests.integration.callers import by_token, by_unix
from tests.integration.case import DaemonTestCase, RefusedTestCase
from tests.integration.daemon import Connection, Daemon, temporary_directory, wait_until

SOCKET: Final = "taskd.sock"
UNIX: Final = f"--listen=unix:{SOCKET}"
TOKEN: Final = "web-0123456789abcdef0123456789"

_PASS_ON: Final = """
import os, socket, sys
path, count = sys.argv[1], int(sys.argv[2])
made = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
made[1].bind(path)
made[1].listen()
kept = [os.dup(one.fileno()) for one in made]
high = [os.dup2(fd, 50 + n) for n, fd in enumerate(kept)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number)
for fd in range(3 + count, 60):
    try:
        os.close(fd)
    except OSError:
        pass
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES="port:file")
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Do as systemd does: pass on sockets that listen, with their names."""


def is_socket(path: Path) -> bool:
    """Tell whether a Unix socket's file is there."""
    return path.exists() and stat.S_ISSOCK(path.stat().st_mode)


class UnixTests(DaemonTestCase):
    def start_unix(self, *options: str, **more: Any) -> Daemon:
        more.setdefault("caller", by_unix(SOCKET))
        return self.start(*(options or (UNIX,)), port=None, **more)

    def mode(self, daemon: Daemon) -> int:
        return stat.S_IMODE((daemon.directory / SOCKET).stat().st_mode)

    def test_file(self) -> None:
        """A Unix socket is served, for its owner and group alone, and its file goes at the stop."""
        kept = temporary_directory(self)
        path = str(kept / SOCKET)
        daemon = self.start_unix(f"--listen=unix:{path}", caller=by_unix(path))
        self.assertEqual(daemon.addresses, path)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o660)
        daemon.stop()
        self.assertEqual(os.listdir(kept), [])

    def test_owner(self) -> None:
        """``mode=`` sets the file's permissions, and ``--socket-owner`` gives it away."""
        own = f"{os.getuid()}:{os.getgid()}"
        daemon = self.start_unix(f"{UNIX}:mode=600", "--socket-owner", own, procs=1)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        found = (daemon.directory / SOCKET).stat()
        self.assertEqual((found.st_uid, found.st_gid), (os.getuid(), os.getgid()))
        self.assertEqual(self.mode(daemon), 0o600)
        if os.getuid() == 0:
            daemon = self.start_unix(UNIX, "--socket-owner", "daemon:12345", procs=1)
            found = (daemon.directory / SOCKET).stat()
            self.assertEqual((found.st_uid, found.st_gid), (1, 12345))

    def test_file_that_was_left_behind(self) -> None:
        """A file that nobody listens on any more is replaced."""
        directory = temporary_directory(self)
        path = str(directory / SOCKET)
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(path)
            left.listen()
        daemon = self.start_unix(f"--listen=unix:{path}", caller=by_unix(path), procs=1)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_reload(self) -> None:
        """The file stays as it is at a reload, and connections change workers as over TCP."""
        daemon = self.start_unix()
        path, before = daemon.directory / SOCKET, daemon.workers()
        inode = path.stat().st_ino
        callers = [self.connect(daemon) for _ in range(4)]
        for caller in callers:
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.load_anew(daemon)
        self.wait_for_end_of(*before.values())
        for caller in (*callers, self.connect(daemon)):
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.assertEqual(path.stat().st_ino, inode)

    def test_death_of_the_supervisor(self) -> None:
        """After a ``kill -9`` of the supervisor the next start takes the file that is left."""
        daemon = self.start_unix()
        path = daemon.directory / SOCKET
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        daemon.kill(daemon.pid)
        daemon.wait_until_gone()
        self.assertTrue(is_socket(path))
        daemon.start()
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertEqual(self.mode(daemon), 0o660)
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        self.assertFalse(path.exists())

    def test_token(self) -> None:
        """Over a Unix socket a token is asked for as well, and a wrong one is logged."""
        tokens = {"tokens": f"web:{TOKEN}\n"}
        daemon = self.start(UNIX, "--token-file=tokens", secrets=tokens, caller=by_token(TOKEN))
        with by_unix(SOCKET)(daemon) as caller:
            self.assertEqual(caller.ask("taskd.auth", [TOKEN]), "web")
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        with by_unix(SOCKET)(daemon) as caller:
            self.assert_error(caller.ask("taskd.auth", ["x" * 30]), "unauthorized")
        self.wait_for_log(daemon, "a Unix socket: a wrong token")


class SystemdTests(DaemonTestCase):
    """Sockets that were made before the daemon."""

    def passing(self, daemon_path: str, count: int = 2) -> tuple[str, ...]:
        return (sys.executable, "-c", _PASS_ON, daemon_path, str(count))

    def test_passed_sockets(self) -> None:
        """Sockets that systemd passes are served, by index and by name; their file is not ours."""
        directory = temporary_directory(self)
        path = directory / SOCKET
        daemon = self.start(
            "--listen=systemd:domain=INET:index=0",
            "--listen=systemd:domain=UNIX:name=file",
            port=None,
            under=self.passing(str(path)),
        )
        self.assertEqual(daemon.addresses, f"127.0.0.1 port {daemon.port}, {path}")
        before, caller = daemon.workers(), self.connect(daemon)
        self.assertEqual(caller.ask("add", [1, 2]), 3)
        for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            self.assertIsNone(daemon.ask("environment", [name]))
        self.load_anew(daemon)
        self.wait_for_end_of(*before.values())
        self.assertEqual(caller.ask("add", [1, 2]), 3)
        with by_unix(str(path))(daemon) as over_file:
            self.assertEqual(over_file.ask("add", [1, 2]), 3)
        caller.close()
        daemon.stop()
        self.assertTrue(is_socket(path))

    def test_the_real_one(self) -> None:
        """``systemd-socket-activate`` starts the daemon for a caller, who is served."""
        program = shutil.which("systemd-socket-activate")
        if program is None:
            raise unittest.SkipTest("systemd-socket-activate is not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        daemon = Daemon(
            "--listen=systemd:domain=INET:index=0",
            port=None,
            under=(
                program,
                f"--listen=127.0.0.1:{port}",
                "--setenv=TASKD_TEST_MARK",
                "--fdname=any",  # systemd always names them, and Twisted relies on that
            ),
        )
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        caller = wait_until(lambda: Connection("127.0.0.1", port), what="a port")
        self.addCleanup(caller.close)
        self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.wait_for_log(daemon, f"1 workers serve 127.0.0.1 port {port} after")


class SeveralTests(DaemonTestCase):
    def test_several(self) -> None:
        """All places are listened on at once, listed in the log, and have the same workers."""
        daemon = self.start(
            "--listen=tcp:0:interface=127.0.0.2",
            UNIX,
            "--listen=unix:other.sock:mode=666",
            "--listen=tcp6:0:interface=\\:\\:1",
        )
        first, second, *files, last = daemon.addresses.split(", ")
        self.assertEqual(first, f"127.0.0.1 port {daemon.port}")
        self.assertEqual(files, [str(daemon.directory / f) for f in (SOCKET, "other.sock")])
        ports = [("127.0.0.2", second), ("::1", last)]
        callers = [by_unix(name) for name in (SOCKET, "other.sock")]
        for host, address in ports:
            self.assertTrue(address.startswith(f"{host} port "), address)
            with Connection(host, int(address.split()[-1])) as caller:
                self.assertEqual(caller.ask("add", [1, 2]), 3)
        for call in callers:
            with call(daemon) as caller:
                self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        self.assertEqual([p for p in daemon.directory.iterdir() if is_socket(p)], [])


class ExposureTests(RefusedTestCase, DaemonTestCase):
    def test_exposed(self) -> None:
        """Where other machines reach it, it refuses to start without identity."""
        starts = (
            ("--interface", "0.0.0.0"),
            ("--interface", "::"),
            ("--listen=tcp:0",),
            ("--listen=tcp:0:interface=0.0.0.0",),
            ("--listen=tcp6:0",),
        )
        for ended, options in zip(self.refuse_all(*starts), starts, strict=True):
            where = " ".join(options).replace("=", " ", 1)
            self.assert_refused(ended, where, "--token-file", "--insecure")

    def test_one_of_several(self) -> None:
        """One unsafe place among others is enough, and nothing of the others is left."""
        directory = temporary_directory(self)
        ended = self.refuse(f"--listen=unix:{directory / SOCKET}", "--listen=tcp:0")
        self.assert_refused(ended, "--listen tcp:0", "--insecure")
        self.assertEqual(os.listdir(directory), [])

    def test_insecure(self) -> None:
        """With ``--insecure`` it starts, and warns."""
        daemon = self.start("--listen=tcp:0", "--insecure", port=None, procs=1)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.wait_for_log(daemon, "--insecure: whoever can reach")

    def test_token(self) -> None:
        """With tokens it starts, and warns that they can be read on the way."""
        daemon = self.start(
            "--interface=0.0.0.0",
            "--token-file=tokens",
            procs=1,
            secrets={"tokens": f"web:{TOKEN}\n"},
            caller=by_token(TOKEN),
        )
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.wait_for_log(daemon, "speaks no TLS")
        self.assertNotIn("--insecure", daemon.log)


class RefusedEndpointTests(RefusedTestCase):
    def test_endpoints_that_cannot_be(self) -> None:
        """What cannot be listened on is refused in one line that names it."""
        cases = (
            ("haproxy:tcp:0", "PROXY protocol"),
            ("tls:0", "use ssl:"),
            ("stdio:", "takes no connections"),
            ("nonsense:0", "server endpoint"),
            ("tcp:many", "many"),
            ("tcp:70000:interface=127.0.0.1", "65535"),
            ("tcp:0:interface=127.0.0.1:colour=red", "colour"),
            ("unix:", "path"),
            ("unix:x:mode=1777", "mode=1777"),
            ("unix:x:mode=rw", "rw"),
            ("unix:" + "x" * 120, "107"),
            ("unix:no/such/directory/x", "no such directory"),
            ("ssl:0", "server.pem"),
            ("systemd:domain=INET:index=0", "systemd passed no such socket"),
            ("tcp:0:interface=192.0.2.1", "192.0.2.1", "no such address"),
        )
        refused = self.refuse_all(*((f"--listen={endpoint}",) for endpoint, *_ in cases), port=None)
        for ended, (_, *words) in zip(refused, cases, strict=True):
            self.assert_refused(ended, *words)

    def test_passed_socket_that_is_not_there(self) -> None:
        """A socket that systemd did not pass, or one for two endpoints, is refused."""
        path = str(temporary_directory(self) / SOCKET)
        under = (sys.executable, "-c", _PASS_ON, path, "1")
        listen = "--listen=systemd:domain=INET:index="
        self.assert_refused(self.refuse(f"{listen}1", under=under), "no such socket")
        os.unlink(path)
        ended = self.refuse(f"{listen}0", f"{listen}0", under=under)
        self.assert_refused(ended, "--listen systemd:domain=INET:index=0", "already")

    def test_owner_that_cannot_be(self) -> None:
        """``--socket-owner`` is refused without a Unix socket, or if there is no such user."""
        starts = (
            ("--socket-owner", "root"),
            (UNIX, "--socket-owner", "no-such-user"),
            (UNIX, "--socket-owner", ":no-such-group"),
        )
        words = ("unix:", "no user 'no-such-user'", "no group 'no-such-group'")
        for ended, why in zip(self.refuse_all(*starts), words, strict=True):
            self.assert_refused(ended, "--socket-owner", why)

    def test_path_in_use(self) -> None:
        """A path that another process listens on, or that is no socket, is left as it is."""
        directory = temporary_directory(self)
        path = directory / SOCKET
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            ended = self.refuse(f"--listen=unix:{path}")
            self.assert_refused(ended, str(path), "another process listens there")
            with socket.socket(socket.AF_UNIX) as caller:
                caller.connect(str(path))
        path.unlink()
        path.write_text("precious", encoding="utf-8")
        self.assert_refused(self.refuse(f"--listen=unix:{path}"), "no socket")
        self.assertEqual(path.read_text(encoding="utf-8"), "precious")
        self.assertEqual(os.listdir(directory), [SOCKET])
