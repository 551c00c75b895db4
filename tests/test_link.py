"""What passes between the supervisor and a worker, and how."""

from __future__ import annotations

import os
import socket
from base64 import b64encode
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.testing import MemoryReactor
from twisted.trial.unittest import SynchronousTestCase

from taskd.link import Link, Offer, adopt_link, decode_due, encode_due

examples = settings(max_examples=100, deadline=None)

TIMES = st.none() | st.floats(0.0, 1e12)
LINES = st.text(max_size=40).map(lambda text: text.replace("\n", " ").encode() + b"\n")


class SocketTransport:
    """A link's transport, with a socket that is real."""

    disconnecting = False

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.has_unsent = False
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


class LinkTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.link = Link(
            {
                b"run": lambda rest: self.said.append(("run", rest)),
                b"nothing": lambda rest: self.said.append(("nothing", rest)),
            }
        )
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            end.setblocking(False)
            self.addCleanup(end.close)
        self.transport = SocketTransport(self.ours)

    def connect(self) -> None:
        self.link.makeConnection(self.transport)  # type: ignore[arg-type]

    def new_fd(self) -> int:
        """Open a descriptor that is closed with the test."""
        fd = os.open(os.devnull, os.O_RDONLY)
        self.addCleanup(self.close_if_open, fd)
        return fd

    def close_if_open(self, fd: int) -> None:
        if self.is_open(fd):
            os.close(fd)

    def is_open(self, fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return False
        return True


class OfferTests(SynchronousTestCase):
    def test_on_the_wire(self) -> None:
        """An offer is one line: ticket, priority, due time, whether it ends with its caller."""
        offer = Offer(7, -3, 12.5, True, b'{"function":"work"}\n')
        self.assertEqual(offer.encode(), b'offer 7 -3 12.5 1 {"function":"work"}\n')
        offer = Offer(8, 0, None, False, b"x\n")
        self.assertEqual(offer.encode(), b"offer 8 0 - 0 x\n")

    @examples
    @given(st.integers(0), st.integers(-(10**9), 10**9), TIMES, st.booleans(), LINES)
    def test_there_and_back(
        self,
        ticket: int,
        priority: int,
        deadline: float | None,
        ends_with_caller: bool,
        line: bytes,
    ) -> None:
        """What was written is read again, spaces in the request and every digit included."""
        offer = Offer(ticket, priority, deadline, ends_with_caller, line)
        verb, _, rest = offer.encode()[:-1].partition(b" ")
        self.assertEqual((verb, Offer.decode(rest)), (b"offer", offer))


class DueTests(SynchronousTestCase):
    @examples
    @given(TIMES)
    def test_exactly(self, due: float | None) -> None:
        """A time is read exactly as it was written, and so is that there is none."""
        text = encode_due(due)
        self.assertNotIn(b" ", text)
        self.assertEqual(decode_due(text), due)


class MessageTests(LinkTestCase):
    def test_by_their_verbs(self) -> None:
        """A message is taken by the reader of its verb, which gets what stands behind it."""
        self.connect()
        self.link.dataReceived(b"run 1 - a line \nnothing\nrun ")
        self.link.dataReceived(b"2\n")
        self.assertEqual(self.said, [("run", b"1 - a line "), ("nothing", b""), ("run", b"2")])

    def test_an_unknown_verb(self) -> None:
        """A verb that nobody reads, of another version, is passed over; what follows is read."""
        self.connect()
        self.link.dataReceived(b"greet\nrun 1\n")
        self.assertEqual(self.said, [("run", b"1")])

    def test_a_connection_that_the_kernel_has_closed(self) -> None:
        """A message whose descriptor did not fit into this process comes without it."""
        self.connect()
        self.assertEqual(self.link.take_connection(b"7 YQ=="), (None, b"a"))

    def test_a_long_one(self) -> None:
        """A message may have any length."""
        self.connect()
        self.link.dataReceived(b"run " + b"x" * 2**21 + b"\n")
        self.assertEqual(len(self.said[0][1]), 2**21)

    def test_tell(self) -> None:
        """What is told is written, while there is a connection; before and after it is dropped."""
        self.link.tell(b"early\n")
        self.connect()
        self.link.tell(b"ask\n")
        self.link.connected = 0
        self.link.tell(b"late\n")
        self.assertEqual(self.transport.written, [b"ask\n"])


class ConnectionTests(LinkTestCase):
    """A connection that goes over the link; the kernel carries it."""

    def receive(self, verb: bytes) -> tuple[int, bytes]:
        """Take what came over, as the other end does."""
        taken: list[tuple[int, bytes]] = []
        other = Link({verb: lambda rest: taken.append(other.take_connection(rest))})
        other.makeConnection(SocketTransport(self.theirs))  # type: ignore[arg-type]
        data, fds, _, _ = socket.recv_fds(self.theirs, 2**20, 8)
        for fd in fds:
            self.addCleanup(self.close_if_open, fd)
            other.fileDescriptorReceived(fd)
        other.dataReceived(data)
        self.assertEqual(len(taken), 1)
        return taken[0]

    def take(self, fd: int, unread: bytes) -> tuple[int | None, bytes]:
        """Have a connection's message come."""
        message = b"%d %s" % (os.fstat(fd).st_ino, b64encode(unread))
        return self.link.take_connection(message)

    def test_a_connection_and_what_was_not_read(self) -> None:
        """The other end gets the same connection, and every byte that was not looked at."""
        self.connect()
        caller, served = socket.socketpair()
        unread = bytes(range(256)) + b"\n a half lin"
        with caller, served:
            self.assertIs(self.link.give_connection(b"moved", served, unread), True)
            fd, received = self.receive(b"moved")
            self.assertEqual(received, unread)
            self.assertNotEqual(fd, served.fileno())
            caller.send(b"hello")
            self.assertEqual(os.read(fd, 9), b"hello")

    def test_it_stays_the_givers(self) -> None:
        """What was given is not closed: that is left to who gave it."""
        self.connect()
        fd = self.new_fd()
        self.assertTrue(self.link.give_connection(b"adopt", fd, b""))
        self.assertTrue(self.is_open(fd))
        received, unread = self.receive(b"adopt")
        self.assertEqual(unread, b"")
        self.assertTrue(os.path.sameopenfile(fd, received))

    def test_not_connected(self) -> None:
        """Without a connection nothing is given, and that is said."""
        fd = self.new_fd()
        self.assertIs(self.link.give_connection(b"adopt", fd, b""), False)
        self.assertTrue(self.is_open(fd))

    def test_behind_what_has_not_left(self) -> None:
        """While something waits to leave nothing is given: it would overtake that."""
        self.connect()
        self.transport.has_unsent = True
        self.assertIs(self.link.give_connection(b"adopt", self.new_fd(), b""), False)
        self.assertRaises(BlockingIOError, self.theirs.recv, 1)

    def test_a_transport_that_cannot(self) -> None:
        """Over a transport that does not tell whether something waits nothing is given."""
        self.link.makeConnection(object())  # type: ignore[arg-type]
        self.assertIs(self.link.give_connection(b"adopt", self.new_fd(), b""), False)

    def test_no_room(self) -> None:
        """If the kernel has no room nothing is given, and that is said."""
        self.connect()
        with self.assertRaises(BlockingIOError):
            while True:
                self.ours.send(b"x" * 4096)
        self.assertIs(self.link.give_connection(b"adopt", self.new_fd(), b""), False)
        self.assertEqual(self.transport.written, [])

    def test_the_other_end_is_gone(self) -> None:
        """If the other end is gone nothing is given, and that is said."""
        self.connect()
        self.theirs.close()
        self.assertIs(self.link.give_connection(b"adopt", self.new_fd(), b""), False)

    def test_a_message_that_fits_in_part(self) -> None:
        """What the kernel does not take of a message at once is written behind it."""
        self.connect()
        unread = os.urandom(2**20)
        self.assertTrue(self.link.give_connection(b"moved", self.new_fd(), unread))
        self.assertEqual(len(self.transport.written), 1)
        taken: list[tuple[int, bytes]] = []
        other = Link({b"moved": lambda rest: taken.append(other.take_connection(rest))})
        other.makeConnection(SocketTransport(self.theirs))  # type: ignore[arg-type]
        while not taken:
            try:
                data, fds, _, _ = socket.recv_fds(self.theirs, 2**16, 8)
            except BlockingIOError:
                data, fds = self.transport.written.pop(), []
            for fd in fds:
                self.addCleanup(self.close_if_open, fd)
                other.fileDescriptorReceived(fd)
            other.dataReceived(data)
        self.assertEqual(taken[0][1], unread)

    def test_each_with_its_message(self) -> None:
        """Connections that come together are taken in their order."""
        self.connect()
        fds = [self.new_fd() for _ in range(3)]
        for fd in fds:
            self.link.fileDescriptorReceived(fd)
        taken = [self.take(fd, unread) for fd, unread in zip(fds, (b"", b"a", b"bc"), strict=True)]
        self.assertEqual(taken, list(zip(fds, [b"", b"a", b"bc"], strict=True)))

    def test_that_of_another_message(self) -> None:
        """Where the kernel has closed one its message comes without, and the next has its own."""
        self.connect()
        fds = [os.memfd_create("connection") for _ in range(3)]
        for fd in fds:
            self.addCleanup(self.close_if_open, fd)
        first, _, last = fds
        for fd in (first, last):
            self.link.fileDescriptorReceived(fd)
        taken = [self.take(fd, b"of %d" % number) for number, fd in enumerate(fds)]
        self.assertEqual(taken, [(first, b"of 0"), (None, b"of 1"), (last, b"of 2")])
        self.link.close_strays()
        self.assertTrue(self.is_open(last))

    def test_the_message(self) -> None:
        """A message names its connection's inode, by which the kernel tells it from others."""
        self.connect()
        fd = self.new_fd()
        self.link.give_connection(b"moved", fd, b"a")
        expected = b"moved %d YQ==\n" % os.fstat(fd).st_ino
        self.assertEqual(self.theirs.recv(99), expected)

    def test_strays(self) -> None:
        """A connection whose message never comes is closed; one that was taken is not."""
        self.connect()
        taken, stray = self.new_fd(), self.new_fd()
        self.link.fileDescriptorReceived(taken)
        self.link.fileDescriptorReceived(stray)
        self.take(taken, b"")
        self.link.close_strays()
        self.link.close_strays()
        self.assertEqual([self.is_open(taken), self.is_open(stray)], [True, False])


class AdoptLinkTests(LinkTestCase):
    def test_a_reactor_carries_it(self) -> None:
        """A link that was adopted reads and writes its own copy of the socket, at once."""
        reactor: Any = MemoryReactor()
        adopt_link(reactor, self.ours.fileno(), self.link)
        transport: Any = self.link.transport
        self.addCleanup(transport.socket.close)
        self.ours.close()
        self.assertEqual(reactor.getReaders(), [transport])
        self.link.tell(b"ask\n")
        self.assertEqual(self.theirs.recv(99), b"ask\n")
        self.theirs.send(b"run 1\n")
        transport.doRead()
        self.assertEqual(self.said, [("run", b"1")])

    def test_connections_come_with_it(self) -> None:
        """A link that was adopted gives connections and takes them."""
        reactor: Any = MemoryReactor()
        taken: list[tuple[int, bytes]] = []
        link = Link({b"adopt": lambda rest: taken.append(link.take_connection(rest))})
        for fd, end in ((self.ours.fileno(), self.link), (self.theirs.fileno(), link)):
            adopt_link(reactor, fd, end)
            self.addCleanup(end.transport.socket.close)
        fd = self.new_fd()
        self.assertTrue(self.link.give_connection(b"adopt", fd, b"unread"))
        link.transport.doRead()
        received, unread = taken[0]
        self.addCleanup(self.close_if_open, received)
        self.assertEqual(unread, b"unread")
        self.assertTrue(os.path.sameopenfile(fd, received))
