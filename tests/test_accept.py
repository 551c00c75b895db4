"""The shared port and the connections that it makes, on real sockets and without a fork."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IReadDescriptor
from twisted.internet.protocol import Factory
from twisted.internet.task import Clock
from twisted.internet.testing import AccumulatingProtocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from taskd.accept import EagerServer, SharedPort, SharingReactor
from taskd.functions import task
from taskd.policy import (
    ACCEPT_PAUSE_CEILING_SECONDS,
    FREE_ACCEPTS,
    NO_ROOM_PAUSE_SECONDS,
    RESERVED_FDS,
)
from tests.support import MemoryDaemon, line_of, log_of, temporary_directory

LONG = 8 * 1024 * 1024
"""More bytes than the kernel takes for a peer that does not read."""


class WatchedReactor(Clock):
    """A reactor that knows what it should watch, and leaves the watching to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[Any] = []
        self.writers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        if reader not in self.readers:
            self.readers.append(reader)

    add_shared_reader = addReader

    def removeReader(self, reader: Any) -> None:
        if reader in self.readers:
            self.readers.remove(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)


class GuestProtocol(AccumulatingProtocol):
    """
    Keeps what comes.

    Attributes:
        came_from: How it was told that it came: ``accepted``, or what was sent along elsewhere.
    """

    def __init__(self) -> None:
        self.came_from: list[str | bytes] = []

    def accepted(self) -> None:
        assert self.transport is not None
        self.came_from.append("accepted")

    def adopted(self, luggage: bytes) -> None:
        assert self.transport is not None
        self.came_from.append(luggage)


class CountingFactory:
    """Makes protocols, and counts the connections that the test has not ended."""

    def __init__(self) -> None:
        self.on_room: Callable[[], None] = lambda: None
        self.made: list[GuestProtocol] = []
        self.addresses: list[Any] = []
        self.open_connections = 0

    def buildProtocol(self, addr: Any) -> GuestProtocol:
        self.addresses.append(addr)
        self.made.append(GuestProtocol())
        self.open_connections += 1
        return self.made[-1]

    def lose_one(self) -> None:
        self.open_connections -= 1
        self.on_room()


def listening_socket(case: SynchronousTestCase) -> socket.socket:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    case.addCleanup(listening.close)
    return listening


def lowest_free_fd() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


def connect_to(case: SynchronousTestCase, listening: socket.socket) -> socket.socket:
    peer = socket.create_connection(listening.getsockname())
    case.addCleanup(peer.close)
    return peer


def reset_by(peer: socket.socket) -> None:
    """End a connection at once and by force, as its peer."""
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    peer.close()


class SharedPortTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.listening = listening_socket(self)
        self.reactor = WatchedReactor()
        self.factory = CountingFactory()
        self.port = self.new_port()

    def new_port(self, **options: Any) -> SharedPort:
        port = SharedPort(self.listening.fileno(), self.factory, self.reactor, **options)
        self.addCleanup(port.close)
        return port

    def connect(self) -> socket.socket:
        return connect_to(self, self.listening)

    def accept(self) -> None:
        """Connect and have it accepted."""
        self.connect()
        before = len(self.factory.made)
        self.port.doRead()
        self.assertEqual(len(self.factory.made), before + 1)
        transport = self.factory.made[-1].transport
        self.addCleanup(transport.connectionLost, Failure(ConnectionDone()))

    def accept_until_it_pauses(self) -> int:
        """Accept connections that stay; tell how many it took."""
        number = 0
        while self.is_accepting:
            self.assertLess(number, 200, "it does not pause")
            self.accept()
            number += 1
        return number

    @property
    def is_accepting(self) -> bool:
        return self.port in self.reactor.readers

    def test_it_accepts(self) -> None:
        """A connection that comes gets a protocol, which hears what the peer sends."""
        self.assertTrue(self.is_accepting)
        peer = self.connect()
        self.port.doRead()
        (protocol,) = self.factory.made
        self.assertEqual(protocol.came_from, ["accepted"])
        peer.sendall(b"hello")
        protocol.transport.doRead()
        self.assertEqual(protocol.data, b"hello")
        self.assertEqual(protocol.transport.getPeer().port, peer.getsockname()[1])
        protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_what_is_there_already(self) -> None:
        """What a peer has sent by the time that it is accepted is heard at once."""
        self.connect().sendall(b"hello")
        self.port.doRead()
        (protocol,) = self.factory.made
        self.assertEqual((protocol.came_from, protocol.data), (["accepted"], b"hello"))
        protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_an_end_that_is_there_already(self) -> None:
        """A peer that has gone by the time that it is accepted is the reactor's to notice."""
        for end in (socket.socket.close, reset_by):
            end(self.connect())
            self.port.doRead()
            protocol = self.factory.made[-1]
            self.assertEqual((protocol.data, protocol.closed), (b"", 0))
            protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_one_connection_a_wake_up(self) -> None:
        """Of two connections that wait one is accepted; the other may be a sibling's."""
        self.connect()
        self.accept()
        self.assertEqual(len(self.factory.made), 1)
        self.port.doRead()
        self.assertEqual(len(self.factory.made), 2)
        for protocol in self.factory.made[1:]:
            protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_a_sibling_was_quicker(self) -> None:
        """A wake-up for a connection that a sibling has taken is no error and no pause."""
        self.port.doRead()
        self.assertEqual(self.factory.made, [])
        self.assertTrue(self.is_accepting)

    def test_connections_that_stay_lead_to_pauses(self) -> None:
        """After a number of connections that stay, each next one is followed by a pause."""
        self.assertEqual(self.accept_until_it_pauses(), FREE_ACCEPTS + 1)
        self.reactor.advance(ACCEPT_PAUSE_CEILING_SECONDS)
        self.assertTrue(self.is_accepting)
        self.assertEqual(self.accept_until_it_pauses(), 1)

    def test_connections_that_go_do_not(self) -> None:
        """Connections that go again cost no pause, however many they are."""
        for _ in range(5 * FREE_ACCEPTS):
            self.accept()
            self.assertTrue(self.is_accepting)
            self.factory.lose_one()

    def test_a_pause_is_kept(self) -> None:
        """A pause goes on to its end though a connection has gone."""
        self.accept_until_it_pauses()
        self.factory.lose_one()
        self.assertFalse(self.is_accepting)
        self.reactor.advance(ACCEPT_PAUSE_CEILING_SECONDS)
        self.assertTrue(self.is_accepting)

    def test_it_is_full(self) -> None:
        """At its limit of connections it accepts no more until one has gone."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        most = lowest_free_fd() + 10
        resource.setrlimit(resource.RLIMIT_NOFILE, (RESERVED_FDS + most, limits[1]))
        self.port.close()
        self.port = self.new_port()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        while self.factory.open_connections < most:
            self.assertTrue(self.is_accepting)
            self.accept()
            self.reactor.advance(ACCEPT_PAUSE_CEILING_SECONDS)
        self.assertFalse(self.is_accepting)
        self.reactor.advance(60)
        self.assertFalse(self.is_accepting)
        self.factory.lose_one()
        self.assertTrue(self.is_accepting)

    def test_the_system_is_full(self) -> None:
        """A connection that there is no room for is left for a sibling, or for later."""
        peer = self.connect()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_fd(), limits[1]))
        self.port.doRead()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual(self.factory.made, [])
        self.assertFalse(self.is_accepting)
        self.reactor.advance(NO_ROOM_PAUSE_SECONDS)
        self.assertTrue(self.is_accepting)
        self.port.doRead()
        (protocol,) = self.factory.made
        self.assertEqual(protocol.transport.getPeer().port, peer.getsockname()[1])
        protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_the_system_stays_full(self) -> None:
        """However often there is no room that is logged once a minute, with how it is."""
        log = log_of(self, "accept")
        self.connect()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_fd(), limits[1]))
        for _ in range(5):
            self.port.doRead()
            self.reactor.advance(NO_ROOM_PAUSE_SECONDS)
        told = "error: no connection can be accepted: Too many open files"
        self.assertEqual(log, [told])
        self.reactor.advance(60)
        self.port.doRead()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual(log, [told, told])

    def test_alone(self) -> None:
        """Where there is no sibling to leave it to, it never pauses."""
        self.port.close()
        self.port = self.new_port(is_alone=True)
        for _ in range(10 * FREE_ACCEPTS):
            self.accept()
            self.assertTrue(self.is_accepting)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_where_they_come_from(self) -> None:
        """Who makes the protocol is told the peer's address."""
        peer = self.connect()
        self.accept()
        self.assertEqual(self.factory.addresses[0], IPv4Address("TCP", *peer.getsockname()))
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
            port = SharedPort(listening.fileno(), self.factory, self.reactor)
            self.addCleanup(port.close)
            with socket.create_connection(listening.getsockname()[:2]) as other:
                port.doRead()
                self.assertEqual(
                    self.factory.addresses[1], IPv6Address("TCP", *other.getsockname())
                )
        self.addCleanup(self.factory.made[1].transport.connectionLost, Failure(ConnectionDone()))

    def test_over_tls(self) -> None:
        """Where TLS is spoken it stands between the socket and the protocol, which is told all."""
        wrapped: list[Any] = []

        def wrap(protocol: Any) -> ProtocolWrapper:
            wrapped.append(protocol)
            return ProtocolWrapper(WrappingFactory(Factory()), protocol)

        self.port.close()
        self.port = self.new_port(wrap=wrap)
        peer = self.connect()
        self.port.doRead()
        (protocol,) = self.factory.made
        self.assertEqual((wrapped, protocol.came_from), ([protocol], ["accepted"]))
        self.assertIsInstance(protocol.transport, ProtocolWrapper)
        server: Any = protocol.transport.transport
        self.assertIsInstance(server, EagerServer)
        peer.sendall(b"hello")
        server.doRead()
        self.assertEqual(protocol.data, b"hello")
        self.port.adopt(self.moving()[0], b" ")
        self.assertIsInstance(self.factory.made[1].transport, EagerServer)
        self.assertEqual(wrapped, [protocol])
        for transport in (server, self.factory.made[1].transport):
            transport.connectionLost(Failure(ConnectionDone()))

    def test_stepping_back(self) -> None:
        """Who steps back is registered anew, behind the others."""
        sibling = self.new_port()
        self.port.step_back()
        self.assertEqual(self.reactor.readers, [sibling, self.port])

    def test_stepping_back_keeps_a_pause(self) -> None:
        """Stepping back ends no pause."""
        self.accept_until_it_pauses()
        self.port.step_back()
        self.assertFalse(self.is_accepting)

    def test_leaving(self) -> None:
        """Who has left accepts nothing until it comes back, as often as each is said."""
        for _ in range(2):
            self.port.leave()
            self.assertFalse(self.is_accepting)
        for _ in range(2):
            self.port.come_back()
            self.assertEqual(self.reactor.readers, [self.port])
        self.accept()

    def test_what_would_bring_it_back(self) -> None:
        """Neither the end of a pause, nor room, nor stepping back, brings back who has left."""
        self.accept_until_it_pauses()
        self.port.leave()
        self.reactor.advance(ACCEPT_PAUSE_CEILING_SECONDS)
        self.factory.lose_one()
        self.port.step_back()
        self.assertFalse(self.is_accepting)
        self.port.come_back()
        self.assertTrue(self.is_accepting)

    def test_coming_back_in_a_pause(self) -> None:
        """Who comes back in a pause accepts again when it is over."""
        self.accept_until_it_pauses()
        self.port.leave()
        self.port.come_back()
        self.assertFalse(self.is_accepting)
        self.reactor.advance(ACCEPT_PAUSE_CEILING_SECONDS)
        self.assertTrue(self.is_accepting)

    def test_coming_back_to_a_closed_port(self) -> None:
        """A port that was closed meanwhile is not accepted from again."""
        self.port.leave()
        self.port.close()
        self.port.come_back()
        self.assertEqual(self.reactor.readers, [])

    def test_accepting_is_told(self) -> None:
        """Each connection that was accepted is told of, and a wake-up in vain is not."""
        told = []
        self.port.on_accept = lambda: told.append(self.factory.open_connections)
        self.port.doRead()
        self.assertEqual(told, [])
        self.accept()
        self.accept()
        self.assertEqual(told, [1, 2])

    def moving(self) -> tuple[int, socket.socket]:
        """Give a connection that another process has accepted, and its peer."""
        peer = self.connect()
        accepted, _ = self.listening.accept()
        return accepted.detach(), peer

    def test_adopting(self) -> None:
        """A connection of another process goes on here, and is told what was read of it there."""
        fd, peer = self.moving()
        self.port.adopt(fd, b"hel")
        (protocol,) = self.factory.made
        self.assertEqual((protocol.came_from, protocol.data), ([b"hel"], b""))
        self.assertEqual(protocol.transport.getPeer().port, peer.getsockname()[1])
        self.assertIn(protocol.transport, self.reactor.readers)
        peer.sendall(b"lo")
        protocol.transport.doRead()
        self.assertEqual(protocol.data, b"lo")
        protocol.transport.write(b"welcome")
        self.assertEqual(peer.recv(100), b"welcome")
        protocol.transport.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(peer.recv(100), b"")

    def test_adopting_is_no_accepting(self) -> None:
        """However many connections are adopted, that leads to no pause and is not told."""
        told: list[None] = []
        self.port.on_accept = lambda: told.append(None)
        for _ in range(3 * FREE_ACCEPTS):
            self.port.adopt(self.moving()[0], b"")
        self.assertTrue(self.is_accepting)
        self.assertEqual(told, [])
        for protocol in self.factory.made:
            protocol.transport.connectionLost(Failure(ConnectionDone()))

    def test_adopting_too_late(self) -> None:
        """A connection whose peer has gone meanwhile is closed, and nobody is told of it."""
        fd, peer = self.moving()
        reset_by(peer)
        self.port.adopt(fd, b"hel")
        self.assertEqual(self.factory.made, [])
        with self.assertRaises(OSError):
            os.fstat(fd)

    def test_close(self) -> None:
        """Who closes accepts no more, and the siblings go on."""
        sibling = self.new_port()
        self.port.close()
        self.assertEqual(self.reactor.readers, [sibling])
        self.port = sibling
        self.accept()

    def test_close_in_a_pause(self) -> None:
        """A port that is closed in a pause does not come back, and leaves nothing behind."""
        self.accept_until_it_pauses()
        self.port.close()
        self.assertEqual(self.reactor.getDelayedCalls(), [])
        self.factory.lose_one()
        self.assertFalse(self.is_accepting)

    def test_close_twice(self) -> None:
        """Closing again does nothing."""
        self.port.close()
        self.port.close()
        self.assertFalse(self.is_accepting)


class UnixTests(SynchronousTestCase):
    """Connections over a Unix socket."""

    def setUp(self) -> None:
        self.directory = temporary_directory(self)
        path = str(self.directory / "socket")
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(self.listening.close)
        self.listening.bind(path)
        self.listening.listen()
        self.listening.setblocking(False)
        self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(self.peer.close)
        self.reactor = WatchedReactor()
        self.factory = CountingFactory()
        self.port = SharedPort(self.listening.fileno(), self.factory, self.reactor)
        self.addCleanup(self.port.close)

    def accept(self) -> GuestProtocol:
        """Connect and have it accepted."""
        self.peer.connect(self.listening.getsockname())
        self.port.doRead()
        (protocol,) = self.factory.made
        self.addCleanup(protocol.transport.connectionLost, Failure(ConnectionDone()))
        return protocol

    def test_it_accepts(self) -> None:
        """A connection is accepted, and both ends hear each other."""
        protocol = self.accept()
        self.assertEqual(protocol.came_from, ["accepted"])
        self.peer.sendall(b"hello")
        protocol.transport.doRead()
        self.assertEqual(protocol.data, b"hello")
        protocol.transport.write(b"welcome")
        self.assertEqual(self.peer.recv(100), b"welcome")
        self.assertIsInstance(self.factory.addresses[0], UNIXAddress)

    def test_a_peer_with_a_name(self) -> None:
        """A peer may have bound its end to a file or a name, of whatever length."""
        for name in (str(self.directory / "x"), b"\0taskd-" + os.urandom(8).hex().encode()):
            self.factory.made.clear()
            self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.addCleanup(self.peer.close)
            self.peer.bind(name)
            protocol = self.accept()
            self.assertIsNotNone(protocol.transport.getPeer())
            self.assertIn("GuestProtocol", repr(protocol.transport))
            self.peer.sendall(b"hello")
            protocol.transport.doRead()
            self.assertEqual(protocol.data, b"hello")

    def test_descriptors_that_are_sent_along(self) -> None:
        """File descriptors that a peer sends along are taken by nobody."""
        protocol = self.accept()
        reading, writing = os.pipe()
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            socket.send_fds(self.peer, [b"hello"], [writing] * 10)
            protocol.transport.doRead()
        self.assertEqual(protocol.data, b"hello" * 3)
        self.assertEqual(os.listdir("/proc/self/fd"), before)
        os.close(writing)
        with open(reading, "rb") as pipe:  # nobody else has its other end
            self.assertEqual(pipe.read(), b"")

    def test_adopting(self) -> None:
        """A connection over a Unix socket goes on in another process like any other."""
        self.peer.connect(self.listening.getsockname())
        accepted, _ = self.listening.accept()
        self.port.adopt(accepted.detach(), b" hel")
        (protocol,) = self.factory.made
        self.addCleanup(protocol.transport.connectionLost, Failure(ConnectionDone()))
        self.assertEqual(protocol.came_from, [b" hel"])
        self.peer.sendall(b"lo")
        protocol.transport.doRead()
        self.assertEqual(protocol.data, b"lo")


@implementer(IHalfCloseableProtocol)
class HalfCloseable(AccumulatingProtocol):
    """Stays when its peer has sent all."""

    def readConnectionLost(self) -> None:
        pass

    def writeConnectionLost(self) -> None:
        pass


class EagerServerTests(SynchronousTestCase):
    def setUp(self) -> None:
        listening = listening_socket(self)
        self.peer = connect_to(self, listening)
        ours, address = listening.accept()
        self.reactor = WatchedReactor()
        self.protocol = AccumulatingProtocol()
        self.server = EagerServer(ours, self.protocol, address, None, 0, self.reactor)
        self.addCleanup(self.server.connectionLost, Failure(ConnectionDone()))
        self.protocol.makeConnection(self.server)

    @property
    def is_waiting(self) -> bool:
        """Whether the reactor has been asked to tell when more can be sent."""
        return self.server in self.reactor.writers

    def read_all(self) -> bytes:
        """Read as the peer, and have sent what waits, until nothing waits."""
        received = bytearray()
        while self.is_waiting:
            received += self.peer.recv(LONG)
            self.assertIsNone(self.server.doWrite())
        self.peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while data := self.peer.recv(LONG):
                received += data
        return bytes(received)

    def test_a_short_write_is_sent_at_once(self) -> None:
        """What the kernel takes is sent at once, without asking the reactor."""
        self.server.write(b"hello")
        self.assertFalse(self.is_waiting)
        self.assertEqual(self.peer.recv(100), b"hello")

    def test_what_the_kernel_does_not_take(self) -> None:
        """The rest of a write that is too long for the kernel is sent when there is room."""
        sent = os.urandom(LONG)
        self.server.write(sent)
        self.assertTrue(self.is_waiting)
        self.assertEqual(self.read_all(), sent)

    def test_the_order_is_kept(self) -> None:
        """What is written while something waits is sent behind it."""
        sent = [os.urandom(LONG), b"second", b"", b"third"]
        for data in sent:
            self.server.write(data)
        self.peer.recv(LONG)  # there is room again, and yet there is a queue
        received = self.peer.recv(100, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        self.assertNotIn(b"second", received)
        self.server.write(b"fourth")
        rest = self.read_all()
        self.assertTrue(rest.endswith(b"secondthirdfourth"))

    def test_it_is_eager_again(self) -> None:
        """Once nothing waits, writes are sent at once again."""
        self.server.write(b"x" * LONG)
        self.read_all()
        self.peer.setblocking(True)
        self.server.write(b"hello")
        self.assertFalse(self.is_waiting)
        self.assertEqual(self.peer.recv(100), b"hello")

    def test_the_peer_is_gone(self) -> None:
        """Writing to a peer that has gone raises nothing; the reactor finds out."""
        reset_by(self.peer)
        self.server.write(b"hello")
        self.assertTrue(self.is_waiting)
        self.assertIsInstance(self.server.doWrite(), Exception)

    def test_after_our_own_end(self) -> None:
        """What is written after our side was shut is dropped."""
        self.server.loseWriteConnection()
        self.server.doWrite()
        self.server.write(b"too late")
        self.assertFalse(self.is_waiting)
        self.assertEqual(self.peer.recv(100), b"")

    def test_closing_sends_what_waits(self) -> None:
        """A connection that is closed sends first what waits."""
        sent = os.urandom(LONG)
        self.server.write(sent)
        self.server.loseConnection()
        received = bytearray()
        ended = None
        while ended is None:
            received += self.peer.recv(LONG)
            ended = self.server.doWrite()
        self.server.connectionLost(Failure(ended))
        while data := self.peer.recv(LONG):
            received += data
        self.assertEqual(len(received), len(sent))
        self.assertEqual(received, sent)

    def test_who_waits_for_all_to_be_sent(self) -> None:
        """Who waits is told when the last byte has been taken, and not before."""
        told: list[bool] = []
        self.server.on_sent = lambda: told.append(self.server.has_unsent)
        self.server.write(b"x" * LONG)
        self.assertEqual(told, [])
        while self.is_waiting:
            self.assertEqual(told, [])
            self.peer.recv(LONG)
            self.server.doWrite()
        self.assertEqual(told, [False])

    def test_what_is_unsent_is_counted(self) -> None:
        """What waits is what was written without what the kernel has taken."""
        self.server.write(b"x" * LONG)
        waiting = self.server.unsent_bytes
        self.assertTrue(0 < waiting < LONG)
        self.server.write(b"y" * 10)
        self.assertEqual(self.server.unsent_bytes, waiting + 10)
        self.assertEqual(len(self.read_all()), LONG + 10)
        self.assertEqual(self.server.unsent_bytes, 0)

    def test_giving_it_away(self) -> None:
        """A connection that was given away is over here, and its peer notices nothing."""
        taken: list[socket.socket] = []

        def take(connection: socket.socket) -> bool:
            taken.append(connection.dup())
            self.addCleanup(taken[0].close)
            return True

        self.assertTrue(self.server.give_away(take))
        self.assertTrue(self.protocol.closed)
        self.assertEqual((self.reactor.readers, self.reactor.writers), ([], set()))
        self.peer.setblocking(False)
        self.assertRaises(BlockingIOError, self.peer.recv, 100)
        self.peer.sendall(b"hello")
        self.assertEqual(taken[0].recv(100), b"hello")
        taken[0].sendall(b"welcome")
        self.assertEqual(self.peer.recv(100), b"welcome")

    def test_what_nobody_takes(self) -> None:
        """A connection that nobody takes goes on here."""
        self.assertFalse(self.server.give_away(lambda connection: False))
        self.assertFalse(self.protocol.closed)
        self.peer.sendall(b"hello")
        self.server.doRead()
        self.assertEqual(self.protocol.data, b"hello")

    def test_what_cannot_be_given_away(self) -> None:
        """A connection with something unsent, or one that ends or has ended, is offered nobody."""
        offered: list[Any] = []

        def give_away() -> bool:
            return self.server.give_away(lambda connection: not offered.append(connection))

        self.server.write(b"x" * LONG)
        self.assertFalse(give_away())
        self.server.loseConnection()
        self.read_all_but_the_end()
        self.assertFalse(give_away())
        self.server.connectionLost(Failure(ConnectionDone()))
        self.assertFalse(give_away())
        self.assertEqual(offered, [])

    def read_all_but_the_end(self) -> None:
        """Read as the peer until nothing waits, and leave the connection to its end."""
        while self.server.has_unsent:
            self.peer.recv(LONG)
            self.server.doWrite()

    def test_a_peer_that_has_closed(self) -> None:
        """Closing a connection that its peer has closed needs no further round of the loop."""
        listening = listening_socket(self)
        peer = connect_to(self, listening)
        ours, address = listening.accept()
        protocol = HalfCloseable()
        server = EagerServer(ours, protocol, address, None, 0, self.reactor)
        protocol.makeConnection(server)
        peer.shutdown(socket.SHUT_WR)
        server.readConnectionLost(Failure(ConnectionDone()))
        self.assertFalse(protocol.closed)
        server.write(b"welcome")
        server.loseConnection()
        self.assertTrue(protocol.closed)
        self.assertNotIn(server, self.reactor.readers)
        self.assertEqual((peer.recv(100), peer.recv(100)), (b"welcome", b""))


class SharingReactorTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.listening = listening_socket(self)
        self.reactor = SharingReactor()
        self.addCleanup(self._close_reactor)

    def _close_reactor(self) -> None:
        for reader in self.reactor.removeAll():
            reader.connectionLost(Failure(ConnectionDone()))
        for reader in self.reactor._internalReaders:
            reader.connectionLost(Failure(ConnectionDone()))
        self.reactor._poller.close()


@implementer(IReadDescriptor)
class Reader:
    """Watches a socket and counts how often it could be read."""

    def __init__(self, sock: socket.socket) -> None:
        self.fileno = sock.fileno
        self.reads = 0

    def doRead(self) -> None:
        self.reads += 1

    def logPrefix(self) -> str:
        return "reader"

    def connectionLost(self, reason: Failure) -> None:
        pass


class SharingReactorTests(SharingReactorTestCase):
    def test_a_shared_reader_is_woken(self) -> None:
        """What is watched together with others is read when there is something to read."""
        reader = Reader(self.listening)
        self.reactor.add_shared_reader(reader)
        self.reactor.iterate(0)
        self.assertEqual(reader.reads, 0)
        connect_to(self, self.listening)
        self.reactor.iterate(0)
        self.assertEqual(reader.reads, 1)

    def test_adding_twice(self) -> None:
        """What is watched already can be added again."""
        reader = Reader(self.listening)
        self.reactor.add_shared_reader(reader)
        self.reactor.add_shared_reader(reader)
        connect_to(self, self.listening)
        self.reactor.iterate(0)
        self.assertEqual(reader.reads, 1)

    def test_removing(self) -> None:
        """What is no longer watched is not read."""
        reader = Reader(self.listening)
        self.reactor.add_shared_reader(reader)
        self.reactor.removeReader(reader)
        connect_to(self, self.listening)
        self.reactor.iterate(0)
        self.assertEqual(reader.reads, 0)


@task(blocking=False)
def long() -> str:
    """Give a result that no kernel takes at once."""
    return "x" * LONG


class WholeWayTests(SharingReactorTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.daemon = MemoryDaemon(long)
        port = SharedPort(self.listening.fileno(), self.daemon.factory, self.reactor)
        self.addCleanup(port.close)
        self.peer = connect_to(self, self.listening)

    def turn_until(self, condition: Callable[[], object]) -> None:
        """Run the reactor's loop until something is so."""
        for _ in range(10_000):
            if condition():
                return
            self.reactor.iterate(0)
        self.fail("it never came about")

    def read_to_the_end(self) -> bytes:
        received = bytearray()
        self.peer.setblocking(False)

        def has_ended() -> bool:
            try:
                data = self.peer.recv(LONG)
            except BlockingIOError:
                return False
            received.extend(data)
            return not data

        self.turn_until(has_ended)
        return bytes(received)

    def test_a_long_reply(self) -> None:
        """A long reply to a caller that stays arrives whole."""
        self.peer.sendall(line_of("long"))
        self.turn_until(lambda: self.daemon.slot.status(0.0)["done"])
        self.daemon.factory.drain()
        reply, goodbye = self.read_to_the_end().splitlines()
        self.assertEqual(len(reply), LONG + 2)
        self.assertIn(b"shutting-down", goodbye)

    def test_a_long_reply_to_a_half_closed_connection(self) -> None:
        """A long reply to a caller that has closed its sending side arrives whole."""
        self.peer.sendall(line_of("long"))
        self.peer.shutdown(socket.SHUT_WR)
        self.assertEqual(len(self.read_to_the_end()), LONG + 3)

    def test_a_refused_caller_gets_its_answer(self) -> None:
        """A caller that is hung up on while it still sends gets the answer and no reset."""
        self.peer.sendall(b"rubbish\n" + b"x" * 100_000)
        self.assertIn(b'"malformed"', self.read_to_the_end())
