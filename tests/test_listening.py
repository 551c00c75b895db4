"""The listening sockets that all workers share."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Timer
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd import listening
from taskd.errors import StartFailed
from taskd.listening import (
    SocketFile,
    address_text,
    adopt,
    bind_tcp,
    bind_unix,
    is_exposed,
    listen,
)
from tests.support import temporary_directory

NOBODY = 65534


def refused(make: Callable[[], object]) -> str:
    """Give the message with which a socket is refused."""
    try:
        made = make()
    except StartFailed as error:
        return str(error)
    raise AssertionError(f"not refused: {made}")


def listens(sock: socket.socket) -> bool:
    """Ask the kernel whether a socket listens."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be nobody for a while, if root runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class BindTests(SynchronousTestCase):
    """TCP ports."""

    def bound(self, interface: str, port: int = 0) -> socket.socket:
        made = bind_tcp(interface, port)
        self.addCleanup(made.close)
        return made

    def listening(self, interface: str) -> socket.socket:
        made = self.bound(interface)
        listen(made)
        return made

    def test_it_is_bound_first(self) -> None:
        """What is bound has its port, and takes no connection before it listens."""
        bound = self.bound("127.0.0.1")
        self.assertNotEqual(bound.getsockname()[1], 0)
        self.assertFalse(listens(bound))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(bound.getsockname())

    def test_it_listens(self) -> None:
        """What listens takes connections, does not block, and sends replies undelayed."""
        listening = self.listening("127.0.0.1")
        self.assertFalse(listening.getblocking())
        with socket.create_connection(listening.getsockname()):
            connection, _ = listening.accept()
        with connection:
            self.assertTrue(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_peers_that_vanish(self) -> None:
        """The kernel asks after a minute's silence whether the peer of a connection is there."""
        listening = self.listening("127.0.0.1")
        with socket.create_connection(listening.getsockname()):
            connection, _ = listening.accept()
        with connection:
            self.assertTrue(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            self.assertEqual(idle, 60)

    def test_names_and_families(self) -> None:
        """A name is as good as an address, and IPv6 as IPv4."""
        self.assertEqual(self.bound("::1").family, socket.AF_INET6)
        self.assertIn(self.bound("localhost").getsockname()[0], ("127.0.0.1", "::1"))

    def test_a_port_that_is_taken(self) -> None:
        """A port that another process listens on is refused, and the message says so."""
        port = self.listening("127.0.0.1").getsockname()[1]
        self.assertEqual(
            refused(lambda: self.bound("127.0.0.1", port)),
            f"cannot listen on 127.0.0.1 port {port}: another process listens there",
        )

    def test_a_port_that_is_taken_meanwhile(self) -> None:
        """Of two that bound the same port, the one that listens later is refused alike."""
        quick = self.bound("127.0.0.1")
        port = quick.getsockname()[1]
        late = self.bound("127.0.0.1", port)
        listen(quick)
        self.assertEqual(
            refused(lambda: listen(late)),
            f"cannot listen on 127.0.0.1 port {port}: another process listens there",
        )

    def test_an_address_of_another_machine(self) -> None:
        """An address that this machine has not is refused, and the message says so."""
        message = refused(lambda: self.bound("192.0.2.1"))
        self.assertIn("this machine has no such address", message)

    def test_a_name_that_is_none(self) -> None:
        """An interface that cannot be resolved is refused by its name."""
        for interface in ("fe80::1%nosuch", "a..b", "x" * 70):
            message = refused(lambda name=interface: self.bound(name))
            self.assertIn(f"cannot listen on {interface} port 0: ", message)


class UnixTests(SynchronousTestCase):
    """Unix sockets."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        self.path = str(self.directory / "taskd.sock")

    def bound(self, mode: int = 0o660, owner: str = "") -> tuple[socket.socket, SocketFile]:
        made, file = bind_unix(self.path, mode, owner)
        self.addCleanup(made.close)
        return made, file

    def refused(self, mode: int = 0o660, owner: str = "") -> str:
        return refused(lambda: self.bound(mode, owner))

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory))

    def leave_stale(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
            left.bind(self.path)
            left.listen()

    def test_it_listens(self) -> None:
        """A Unix socket takes connections, does not block, and leaves nothing but its file."""
        made, _ = self.bound()
        self.assertFalse(made.getblocking())
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(self.path)
            connection, _ = made.accept()
            connection.close()
        self.assertEqual(self.names(), ["taskd.sock"])

    def test_mode(self) -> None:
        """The file has the permissions that were asked for, whatever the umask is."""
        for umask in (0o077, 0):
            self.addCleanup(os.umask, os.umask(umask))
            for mode in (0o600, 0o660, 0o666):
                made, file = self.bound(mode)
                self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), mode)
                file.remove()
                made.close()

    def test_a_link_in_its_place(self) -> None:
        """Where its file has made way for a link, the file that this leads to keeps its mode."""
        precious = self.directory / "precious"
        precious.touch(0o600)

        def swap(path: str, *_: Any) -> None:
            os.unlink(path)
            os.symlink(precious, path)

        self.patch(listening, "_give", swap)
        self.assertTrue(self.refused(0o666).startswith(f"cannot listen on {self.path}: "))
        self.assertEqual(stat.S_IMODE(precious.stat().st_mode), 0o600)

    def test_a_lock_that_is_held(self) -> None:
        """Where another process holds the lock the start fails after a while; all stays."""
        self.patch(listening, "_TURN_SECONDS", 0.05)
        lock = Path(f"{self.path}.starting")
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.assertEqual(
                self.refused(),
                f"cannot listen on {self.path}: "
                "another process that is about to listen there takes too long",
            )
            self.assertEqual(self.names(), [lock.name])
        self.bound()
        self.assertEqual(self.names(), ["taskd.sock"])

    def test_a_lock_that_is_let_go(self) -> None:
        """A lock that another process lets go of in time is waited for."""
        lock = Path(f"{self.path}.starting")
        held = lock.open("w")
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = Timer(0.1, held.close)
        timer.start()
        self.addCleanup(timer.join)
        self.bound()
        self.assertTrue(held.closed)

    def test_left_behind(self) -> None:
        """A socket that nobody listens on any more is replaced."""
        self.leave_stale()
        made, _ = self.bound()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(self.path)
        self.assertTrue(listens(made))

    def test_alive(self) -> None:
        """A socket that somebody listens on is refused, even with its backlog full, and stays."""
        with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as caller:
            other.bind(self.path)
            other.listen(0)
            message = f"cannot listen on {self.path}: another process listens there"
            self.assertEqual(self.refused(), message)
            other.accept()[0].close()
            caller.connect(self.path)
            self.assertEqual(self.refused(), message)
        self.assertEqual(self.names(), ["taskd.sock"])

    def test_alive_and_of_another_type(self) -> None:
        """A datagram socket that is in use is taken for alive."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(self.path)
            self.assertIn("another process listens there", self.refused())

    def test_a_socket_of_somebody_else(self) -> None:
        """A socket that one may not connect to is refused, as nobody knows if it is alive."""
        self.leave_stale()
        os.chmod(self.path, 0)
        os.chmod(self.directory, 0o777)
        with without_privileges():
            self.assertIn("may not be asked if it is alive", self.refused())

    def test_no_socket(self) -> None:
        """Whatever is no socket is refused, and stays: a file, a directory, a symbolic link."""
        makers: list[Callable[[Path], object]] = [
            lambda path: path.write_text("precious"),
            lambda path: path.mkdir(),
            lambda path: path.symlink_to("elsewhere"),
        ]
        for number, make in enumerate(makers):
            path = self.directory / str(number)
            make(path)
            self.path = str(path)
            self.assertEqual(
                self.refused(),
                f"cannot listen on {path}: something that is no socket is there",
            )
        self.assertEqual(self.names(), ["0", "1", "2"])
        self.assertEqual((self.directory / "0").read_text(), "precious")

    def test_paths_that_cannot_be(self) -> None:
        """A path that is too long, in no directory, or no file's is refused with its reason."""
        for path, why in (
            ("/tmp/" + "ä" * 60, "the path has 125 bytes, 107 are possible"),
            (f"{self.directory}/nosuch/taskd.sock", "there is no such directory"),
            ("", "give the path of a file"),
            ("\0abstract", "give the path of a file"),
        ):
            self.path = path
            self.assertIn(why, self.refused())

    def test_the_longest_path(self) -> None:
        """A path of 107 bytes is possible."""
        self.path = f"{self.directory}/".ljust(107, "x")
        self.assertEqual(address_text(self.bound()[0]), self.path)

    def test_a_directory_that_cannot_be_written(self) -> None:
        """A directory that one may not write to is the reason that is told."""
        os.chmod(self.directory, 0o755)
        with without_privileges():
            if os.geteuid() != NOBODY:
                os.chmod(self.directory, 0o555)
            self.assertIn("not allowed to write to its directory", self.refused())
        os.chmod(self.directory, 0o755)

    def test_owner(self) -> None:
        """The file is given to a user, a group or both, by name or number."""
        mine = (os.geteuid(), os.getegid())
        other = (NOBODY, NOBODY) if os.geteuid() == 0 else mine
        for owner, expected in (
            (f"{other[0]}:{other[1]}", other),
            (f"{other[0]}", (other[0], mine[1])),
            (f":{other[1]}", (mine[0], other[1])),
            ("", mine),
        ):
            made, file = self.bound(0o640, owner)
            found = os.stat(self.path)
            self.assertEqual((found.st_uid, found.st_gid), expected, owner)
            self.assertEqual(stat.S_IMODE(found.st_mode), 0o640)
            file.remove()
            made.close()

    def test_owner_by_name(self) -> None:
        """root is a name of user and group 0."""
        if os.geteuid() == 0:
            self.bound(0o660, "root:root")
            self.assertEqual(os.stat(self.path).st_uid, 0)

    def test_owners_that_are_none(self) -> None:
        """A user or a group that does not exist is refused by the option; nothing is left."""
        for owner, what in (
            ("nosuch-user", "user 'nosuch-user'"),
            (":nosuch-group", "group 'nosuch-group'"),
            ("4294967295", "user '4294967295'"),
            ("99999999999", "user '99999999999'"),
            ("-1", "user '-1'"),
        ):
            self.assertEqual(
                self.refused(0o660, owner), f"--socket-owner {owner}: there is no {what}"
            )
        self.assertEqual(self.names(), [])

    def test_an_owner_that_may_not_be(self) -> None:
        """Without the privilege to give a file away, the start fails, and nothing is left."""
        os.chmod(self.directory, 0o777)
        with without_privileges():
            message = self.refused(0o660, "0")
        self.assertIn("--socket-owner 0: not allowed", message)
        self.assertEqual(self.names(), [])

    def test_several_at_once(self) -> None:
        """Of several that find the same socket left behind, one has it; the others are refused."""
        self.leave_stale()
        barrier = Barrier(8)

        def start(_: int) -> str:
            barrier.wait()
            try:
                made, _file = bind_unix(self.path, 0o660)
            except StartFailed as error:
                return str(error)
            self.addCleanup(made.close)
            return ""

        with ThreadPoolExecutor(8) as threads:
            ends = sorted(threads.map(start, range(8)))
        message = f"cannot listen on {self.path}: another process listens there"
        self.assertEqual(ends, ["", *[message] * 7])
        self.assertEqual(self.names(), ["taskd.sock"])

    def test_a_lock_that_was_left_behind(self) -> None:
        """The lock's file of a start that was killed is no obstacle, and goes."""
        Path(f"{self.path}.starting").touch()
        self.bound()
        self.assertEqual(self.names(), ["taskd.sock"])

    def test_remove(self) -> None:
        """The file that was bound is removed, once."""
        _, file = self.bound()
        file.remove()
        self.assertEqual(self.names(), [])
        file.remove()

    def test_remove_what_is_not_ours(self) -> None:
        """A file that somebody else put there meanwhile stays."""
        for put_away in (os.unlink, lambda path: os.rename(path, f"{path}.old")):
            made, file = self.bound()
            put_away(self.path)
            self.leave_stale()
            file.remove()
            self.assertTrue(os.path.exists(self.path))
            made.close()


class AdoptTests(SynchronousTestCase):
    """Sockets that somebody else made."""

    def adopted(self, given: socket.socket) -> socket.socket:
        made = adopt(given.fileno())
        self.addCleanup(made.close)
        return made

    def test_a_port(self) -> None:
        """A port that is taken over is as if it had been bound here, and outlives its giver."""
        with socket.create_server(("127.0.0.1", 0)) as given:
            os.set_inheritable(given.fileno(), True)
            made = self.adopted(given)
        self.assertFalse(made.getblocking())
        self.assertFalse(made.get_inheritable())
        self.assertEqual(made.family, socket.AF_INET)
        self.assertTrue(listens(made))
        self.assertTrue(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.assertTrue(made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        self.assertEqual(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60)

    def test_a_unix_socket(self) -> None:
        """A Unix socket is taken over too."""
        with socket.socket(socket.AF_UNIX) as given:
            given.bind("")
            given.listen()
            self.assertEqual(self.adopted(given).family, socket.AF_UNIX)

    def test_its_backlog(self) -> None:
        """What listens already is left as it is: the place that it has for callers too."""
        with socket.socket(socket.AF_UNIX) as given:
            given.bind("")
            given.listen(0)
            listen(self.adopted(given))
            with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
                first.connect(given.getsockname())
                second.setblocking(False)
                with self.assertRaises(BlockingIOError):
                    second.connect(given.getsockname())

    def test_what_does_not_listen(self) -> None:
        """A socket that does not listen, or cannot, is refused, and stays open."""
        with socket.socket() as silent, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            for given in (silent, datagrams):
                message = refused(lambda given=given: self.adopted(given))
                self.assertIn("no stream socket that listens", message)
                os.fstat(given.fileno())

    def test_no_socket(self) -> None:
        """What is no socket, or not even open, is refused."""
        reading, writing = os.pipe()
        os.close(writing)
        self.assertIn("non-socket", refused(lambda: adopt(reading)))
        os.close(reading)
        self.assertIn("Bad file descriptor", refused(lambda: adopt(reading)))


class AddressTests(SynchronousTestCase):
    """What is told of a socket's address."""

    def bound(self, family: int, address: object) -> socket.socket:
        made = socket.socket(family)
        self.addCleanup(made.close)
        if address is not None:
            made.bind(address)  # type: ignore[arg-type]
        return made

    def test_exposed(self) -> None:
        """Only Unix sockets and loopback addresses cannot be reached from elsewhere."""
        path = str(temporary_directory(self) / "sock")
        for family, host, expected in (
            (socket.AF_INET, "127.0.0.1", False),
            (socket.AF_INET, "127.1.2.3", False),
            (socket.AF_INET6, "::1", False),
            (socket.AF_INET6, "::ffff:127.0.0.1", False),
            (socket.AF_INET, "0.0.0.0", True),
            (socket.AF_INET6, "::", True),
            (socket.AF_INET6, "::ffff:0.0.0.0", True),
        ):
            self.assertEqual(is_exposed(self.bound(family, (host, 0))), expected, host)
        self.assertFalse(is_exposed(self.bound(socket.AF_UNIX, path)))

    def test_another_family(self) -> None:
        """A socket of a family that is not known counts as exposed."""
        try:
            made = self.bound(socket.AF_NETLINK, None)
        except OSError:
            return
        self.assertTrue(is_exposed(made))

    def test_text(self) -> None:
        """An address is written as people know it."""
        path = str(temporary_directory(self) / "sock")
        port = self.bound(socket.AF_INET, ("127.0.0.1", 0))
        self.assertEqual(address_text(port), f"127.0.0.1 port {port.getsockname()[1]}")
        port = self.bound(socket.AF_INET6, ("::1", 0))
        self.assertEqual(address_text(port), f"::1 port {port.getsockname()[1]}")
        self.assertEqual(address_text(self.bound(socket.AF_UNIX, path)), path)
        self.assertRegex(address_text(self.bound(socket.AF_UNIX, "")), "^@")
        self.assertEqual(
            address_text(self.bound(socket.AF_UNIX, None)), "a Unix socket without a name"
        )
