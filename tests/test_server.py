"""The server's protocol: bytes to a session and back, and the end of a connection."""

from __future__ import annotations

from threading import Event
from typing import Any

from OpenSSL import SSL
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import connectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import Access, Grant, digest_of
from taskd.errors import WorkerLost
from taskd.functions import Function, Kind, progress, task
from taskd.server import TaskProtocol
from tests.support import (
    ANYBODY,
    PATIENCE,
    FakePool,
    MemoryDaemon,
    MemoryTransport,
    line_of,
    log_of,
)


class SecureTransport(MemoryTransport):
    """
    A TLS connection, as its protocol sees it.

    Attributes:
        peer_identity: Whom the peer's certificate stands for.
    """

    is_secure = True
    give_away = None  # type: ignore[assignment]
    loseWriteConnection = None  # type: ignore[assignment]
    peer_identity = ""

    @property
    def has_unsent(self) -> bool:
        return bool(self.unsent_bytes)

    def pauseProducing(self) -> None:
        """Read no more; it makes no difference to one that ends."""
        if not self.disconnecting:
            super().pauseProducing()

    def resumeProducing(self) -> None:
        """Read again; as above."""
        if not self.disconnecting:
            super().resumeProducing()


def connect_securely(
    daemon: MemoryDaemon, identity: str | None = ""
) -> tuple[TaskProtocol, SecureTransport]:
    """Open a TLS connection; an identity of None: its handshake is not complete yet."""
    protocol = daemon.factory.buildProtocol(None)
    transport = SecureTransport(protocol)
    protocol.makeConnection(transport)
    protocol.accepted()
    if identity is not None:
        transport.peer_identity = identity
        protocol.handshakeCompleted()
    return protocol, transport


@task(blocking=False)
def echo(value: Any = None) -> Any:
    """Give the value back."""
    return value


def double(number: float) -> float:
    """Give twice the number, from a thread."""
    return 2 * number


class ServerTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.late: list[Deferred[Any]] = []

        @task(blocking=False)
        def later() -> Deferred[Any]:
            """Go on until the test fires the Deferred."""
            self.late.append(Deferred())
            return self.late[-1]

        self.functions = (echo, later)
        self.daemon = self.new_daemon()
        self.protocol, self.transport = self.daemon.connect()

    def new_daemon(self, **settings: Any) -> MemoryDaemon:
        return MemoryDaemon(*self.functions, max_line_bytes=1024, **settings)

    def lose(self) -> None:
        """Let the connection be lost."""
        self.protocol.connectionLost(connectionDone)


class ReplyTests(ServerTestCase):
    def test_a_request_and_its_reply(self) -> None:
        """A line that asks is answered by a line."""
        self.protocol.dataReceived(b'{"function": "echo", "args": ["hello"]}\n')
        self.assertEqual(self.transport.value(), b'"hello"\n')

    def test_what_is_ready_at_once_leaves_together(self) -> None:
        """The replies to all requests of a chunk that are ready leave in a single write."""
        self.protocol.dataReceived(b"".join(line_of("echo", number) for number in range(50)))
        self.assertEqual(self.transport.messages, list(range(50)))
        self.assertEqual(len(self.transport.writes), 1)

    def test_many_leave_in_parts(self) -> None:
        """After 64 replies those leave, so that a long chunk is not answered only at its end."""
        self.protocol.dataReceived(b"".join(line_of("echo", number) for number in range(150)))
        self.assertEqual(self.transport.messages, list(range(150)))
        parts = [written.count(b"\n") for written in self.transport.writes]
        self.assertEqual(parts, [64, 64, 22])

    def test_nothing_is_written_for_nothing(self) -> None:
        """A chunk that calls for no reply causes no write."""
        self.protocol.dataReceived(b"\n\r\n" + line_of("later") + b'{"fun')
        self.assertEqual(self.transport.writes, [])

    def test_a_late_reply_leaves_at_once(self) -> None:
        """A reply that comes by itself is written by itself."""
        self.protocol.dataReceived(line_of("later", id=1) + line_of("later", id=2))
        for number in (1, 0):
            self.late[number].callback(number)
        self.assertEqual([reply["id"] for reply in self.transport.messages], [2, 1])
        self.assertEqual(len(self.transport.writes), 2)

    def test_a_batch_from_a_thread_leaves_together(self) -> None:
        """What a thread delivers together leaves in a single write for each connection."""
        begun, go_on = Event(), Event()
        self.addCleanup(go_on.set)

        def hold() -> None:
            begun.set()
            go_on.wait(PATIENCE)

        daemon = MemoryDaemon(double, hold)
        connections = [daemon.connect() for _ in range(2)]
        for number, (protocol, _) in enumerate(connections):
            protocol.dataReceived(line_of("double", number) * 3)
        connections[0][0].dataReceived(line_of("hold"))
        self.assertTrue(begun.wait(PATIENCE))
        daemon.loop.run_waiting()
        for number, (_, transport) in enumerate(connections):
            self.assertEqual(transport.messages, [2 * number] * 3)
            self.assertEqual(len(transport.writes), 1)

    def test_however_the_bytes_come(self) -> None:
        """Requests are answered alike wherever the network cuts them."""
        asked = line_of("echo", "é\n") + b"\r\n" + line_of("echo", 2).replace(b"\n", b"\r\n")
        for cut in range(len(asked) + 1):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(asked[:cut])
            protocol.dataReceived(asked[cut:])
            self.assertEqual(transport.messages, ["é\n", 2], cut)

    def test_progress(self) -> None:
        """What a task reports is written before its reply."""
        daemon = MemoryDaemon(_report)
        protocol, transport = daemon.connect()
        protocol.dataReceived(line_of("_report", id=1, progress=True))
        daemon.loop.run_until(lambda: len(transport.messages) == 2)
        told = {"done": 1, "total": 2, "message": "half"}
        self.assertEqual(
            transport.messages, [{"id": 1, "progress": told}, {"id": 1, "result": "done"}]
        )


def _report() -> str:
    progress(1, 2, "half")
    return "done"


class LengthTests(ServerTestCase):
    def padded(self, length: int) -> bytes:
        """Write a request of so many bytes, its line feed not counted."""
        bare = len(line_of("echo", "")) - 1
        return line_of("echo", "x" * (length - bare))

    def test_a_line_of_the_longest_length(self) -> None:
        """A line of exactly the limit is read, wherever the network cuts it."""
        line = self.padded(1024)
        for cut in range(len(line)):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(line[:cut])
            protocol.dataReceived(line[cut:] + line_of("echo", "next"))
            self.assertEqual(len(transport.messages), 2, cut)
            self.assertEqual(transport.messages[1], "next", cut)

    def test_a_line_of_one_byte_more(self) -> None:
        """A line of one byte more is refused, and the rest unread, wherever the network cuts it."""
        line = self.padded(1025)
        for cut in range(len(line)):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(line[:cut])
            protocol.dataReceived(line[cut:] + line_of("echo", "smuggled"))
            self.assertEqual(
                [reply["error"]["code"] for reply in transport.messages], ["line-too-long"], cut
            )
            self.assertTrue(transport.is_half_closed, cut)

    def test_a_line_that_does_not_end(self) -> None:
        """A line is refused as soon as it is too long, without waiting for its end."""
        self.protocol.dataReceived(b"x" * 1024)
        self.assertEqual(self.transport.messages, [])
        self.protocol.dataReceived(b"x")
        self.assertEqual(self.transport.messages[0]["error"]["code"], "line-too-long")

    def test_what_comes_before_is_answered(self) -> None:
        """The requests before a line that is too long are answered."""
        self.protocol.dataReceived(line_of("echo", 1) + line_of("echo", 2) + self.padded(1025))
        self.assertEqual(self.transport.messages[:2], [1, 2])
        self.assertEqual(len(self.transport.messages), 3)


class HalfCloseTests(ServerTestCase):
    def end_sending(self) -> None:
        """Let the peer shut its side for sending."""
        IHalfCloseableProtocol(self.protocol).readConnectionLost()

    def assertClosed(self) -> None:
        """The connection is closed as a whole, once all is sent."""
        self.assertTrue(self.transport.disconnecting)
        self.assertFalse(self.transport.disconnected)

    def test_nothing_is_owed(self) -> None:
        """A connection that owes nothing is closed when the peer has sent all."""
        self.protocol.dataReceived(line_of("echo", 1))
        self.end_sending()
        self.assertEqual(self.transport.messages, [1])
        self.assertClosed()

    def test_a_reply_is_owed(self) -> None:
        """A peer that has sent all still gets its reply; then there is nothing to linger for."""
        self.protocol.dataReceived(line_of("later"))
        self.end_sending()
        self.assertFalse(self.transport.disconnecting)
        self.late[0].callback("late")
        self.assertEqual(self.transport.messages, ["late"])
        self.assertFalse(self.transport.is_half_closed)
        self.assertClosed()
        self.lose()
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_the_end_in_a_line(self) -> None:
        """A peer that ends in a line is told so, and what is owed before it is answered."""
        self.protocol.dataReceived(line_of("later") + b'{"func')
        self.end_sending()
        self.late[0].callback("late")
        self.assertEqual(self.transport.messages[0], "late")
        self.assertEqual(self.transport.messages[1]["error"]["code"], "malformed")
        self.assertClosed()

    def test_a_refused_peer_ends(self) -> None:
        """A peer that was hung up on and ends, be it in a line, is closed without lingering."""
        for rest in (b"", b"an unfinished body"):
            self.protocol, self.transport = self.daemon.connect()
            self.protocol.dataReceived(b"rubbish\n" + rest)
            self.end_sending()
            self.assertEqual(len(self.transport.messages), 1)
            self.assertClosed()

    def test_a_refused_peer_has_ended(self) -> None:
        """A peer that ended before it was refused is closed without lingering."""
        self.protocol.dataReceived(line_of("later") + b"rubbish\n")
        self.end_sending()
        self.late[0].callback("late")
        self.assertEqual(len(self.transport.messages), 2)
        self.assertClosed()


class LingerTests(ServerTestCase):
    def test_the_answer_is_out_before_the_end(self) -> None:
        """A refused peer gets its answer and our end of sending, not an abort."""
        self.protocol.dataReceived(b"rubbish\n")
        self.assertEqual(self.transport.messages[0]["error"]["code"], "malformed")
        self.assertTrue(self.transport.is_half_closed)
        self.assertFalse(self.transport.disconnected)

    def test_what_still_comes_is_thrown_away(self) -> None:
        """What a peer sends after it was hung up on is not read."""
        self.protocol.dataReceived(b"rubbish\n")
        before = self.transport.value()
        self.protocol.dataReceived(line_of("echo", "smuggled") + b"x" * 5000)
        self.assertEqual(self.transport.value(), before)

    def test_a_peer_that_does_not_go_is_cut_off(self) -> None:
        """A peer that was hung up on and stays is cut off after two seconds."""
        self.protocol.dataReceived(b"rubbish\n")
        self.daemon.loop.advance(1.9)
        self.assertFalse(self.transport.disconnected)
        self.daemon.loop.advance(0.1)
        self.assertTrue(self.transport.disconnected)

    def test_a_slow_peer_gets_its_answer(self) -> None:
        """The two seconds begin when the peer has our last word, not before."""
        self.transport.is_slow = True
        self.protocol.dataReceived(b"rubbish\n")
        self.daemon.loop.advance(29.9)
        self.assertFalse(self.transport.disconnected)
        self.transport.arrive()
        self.daemon.loop.advance(1.9)
        self.assertFalse(self.transport.disconnected)
        self.daemon.loop.advance(0.1)
        self.assertTrue(self.transport.disconnected)

    def test_a_peer_that_does_not_read_is_cut_off(self) -> None:
        """A peer that was hung up on and does not read our last words is cut off after 30 s."""
        self.transport.is_slow = True
        self.protocol.dataReceived(b"rubbish\n")
        self.daemon.loop.advance(29.9)
        self.assertFalse(self.transport.disconnected)
        self.daemon.loop.advance(0.1)
        self.assertTrue(self.transport.disconnected)

    def test_a_peer_that_has_ended_and_does_not_read(self) -> None:
        """A peer that has sent all and does not read its reply is cut off after 30 s as well."""
        self.protocol.dataReceived(line_of("echo", 1))
        IHalfCloseableProtocol(self.protocol).readConnectionLost()
        self.daemon.loop.advance(29.9)
        self.assertFalse(self.transport.disconnected)
        self.daemon.loop.advance(0.1)
        self.assertTrue(self.transport.disconnected)

    def test_a_peer_that_goes_leaves_nothing(self) -> None:
        """Once the peer has gone nothing is left to do."""
        self.protocol.dataReceived(b"rubbish\n")
        self.lose()
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_a_transport_without_half_closing(self) -> None:
        """On a transport that can only be closed as a whole, it is closed as a whole."""
        protocol, transport = self.daemon.factory.buildProtocol(None), StringTransport()
        protocol.makeConnection(transport)
        protocol.dataReceived(b"rubbish\n")
        self.assertTrue(transport.disconnecting)
        self.assertFalse(transport.disconnected)
        self.daemon.loop.advance(30)
        self.assertTrue(transport.disconnected)


class SilenceTests(ServerTestCase):
    """Connections over which nothing comes."""

    def sweep_after(self, seconds: float) -> None:
        self.daemon.loop.advance(seconds)
        self.daemon.factory.sweep()

    def test_no_first_line(self) -> None:
        """A connection that sends no line in its time is told so, and hung up on."""
        self.sweep_after(30)
        self.assertEqual(self.transport.messages, [])
        self.sweep_after(0.1)
        (reply,) = self.transport.messages
        self.assertEqual(reply["error"]["code"], "malformed")
        self.assertEqual(reply["error"]["message"], "no request came within 30 s")
        self.assertTrue(self.transport.is_half_closed)

    def test_a_line_that_does_not_end(self) -> None:
        """Bytes without a line feed are no line, however often they come."""
        for _ in range(6):
            self.protocol.dataReceived(b"x")
            self.sweep_after(6)
        self.assertEqual(self.transport.messages[0]["error"]["code"], "malformed")
        self.assertEqual(len(self.transport.messages), 1)

    def test_a_first_line(self) -> None:
        """A connection that has sent a request may be silent from then on."""
        self.protocol.dataReceived(line_of("echo"))
        self.sweep_after(86400)
        self.assertFalse(self.transport.is_half_closed)
        self.assertFalse(self.transport.disconnecting)

    def test_empty_lines(self) -> None:
        """Empty lines are no first request, however they come."""
        for chunks in ([b"\n"], [b"\r\n"], [b"\r", b"\n"], [b"\r\n\r", b"\r", b"\n\n"]):
            protocol, transport = self.daemon.connect()
            for chunk in chunks:
                protocol.dataReceived(chunk)
            self.sweep_after(30.1)
            self.assertTrue(transport.is_half_closed, chunks)

    def test_empty_lines_before_a_request(self) -> None:
        """A first request may have empty lines before it, and may come in pieces."""
        asked = b"\n\r\n" + line_of("echo", 1)
        for cut in range(len(asked) + 1):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(asked[:cut])
            protocol.dataReceived(asked[cut:])
            self.sweep_after(30.1)
            self.assertEqual((transport.messages, transport.is_half_closed), ([1], False), cut)

    def test_each_has_its_own_time(self) -> None:
        """Each connection is given its time from its own coming."""
        self.daemon.loop.advance(20)
        _, later = self.daemon.connect()
        self.sweep_after(11)
        self.assertEqual((self.transport.is_half_closed, later.is_half_closed), (True, False))
        self.sweep_after(20)
        self.assertTrue(later.is_half_closed)

    def test_the_operators_time(self) -> None:
        """The operator decides how long that time is."""
        self.daemon = self.new_daemon(first_line_seconds=0.5)
        _, transport = self.daemon.connect()
        self.sweep_after(0.6)
        self.assertEqual(transport.messages[0]["error"]["message"], "no request came within 0.5 s")

    def test_it_is_not_waited_for(self) -> None:
        """A silent peer is cut off two seconds later, whether it takes our last words or not."""
        self.transport.is_slow = True
        self.sweep_after(30.1)
        self.daemon.loop.advance(1.9)
        self.assertFalse(self.transport.disconnected)
        self.daemon.loop.advance(0.1)
        self.assertTrue(self.transport.disconnected)

    def test_those_who_have_gone(self) -> None:
        """A connection that has gone is not hung up on."""
        self.lose()
        self.sweep_after(60)
        self.assertEqual(self.transport.messages, [])
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])


class IdlenessTests(ServerTestCase):
    """Connections over which nothing comes any more."""

    def setUp(self) -> None:
        super().setUp()
        self.daemon = self.new_daemon(idle_seconds=10)
        self.protocol, self.transport = self.daemon.connect()
        self.protocol.dataReceived(line_of("echo", 1))

    def sweep_after(self, seconds: float) -> None:
        self.daemon.loop.advance(seconds)
        self.daemon.factory.sweep()

    def test_an_idle_connection(self) -> None:
        """A connection without a request in its time is closed, and nothing is said."""
        self.sweep_after(10)
        self.assertFalse(self.transport.disconnecting)
        self.sweep_after(0.1)
        self.assertTrue(self.transport.disconnecting)
        self.assertEqual(self.transport.messages, [1])

    def test_it_is_not_waited_for(self) -> None:
        """It is cut off two seconds later if it takes no part in that."""
        self.sweep_after(10.1)
        self.daemon.loop.advance(2)
        self.assertTrue(self.transport.disconnected)

    def test_what_still_comes_over_tls(self) -> None:
        """What a TLS peer sends before it has heard the goodbye is not run: so that says."""
        protocol, transport = connect_securely(self.daemon)
        protocol.dataReceived(line_of("echo", 1) + b'{"function": "la')
        self.sweep_after(10.1)
        self.assertTrue(transport.disconnecting)
        protocol.dataReceived(b'ter"}\n' + line_of("later") + line_of("echo", 2))
        self.assertEqual((self.late, transport.messages), ([], [1]))

    def test_requests_count(self) -> None:
        """Each request, and each keep-alive, gives it the time anew."""
        for line in (line_of("echo"), b"\n"):
            self.sweep_after(9)
            self.protocol.dataReceived(line)
        self.sweep_after(9)
        self.assertFalse(self.transport.disconnecting)
        self.sweep_after(1.1)
        self.assertTrue(self.transport.disconnecting)

    def test_bytes_do_not_count(self) -> None:
        """Bytes without the end of a line give it no time, however often they come."""
        for _ in range(3):
            self.protocol.dataReceived(b" ")
            self.sweep_after(3)
        self.protocol.dataReceived(b" ")
        self.sweep_after(1.1)
        self.assertTrue(self.transport.disconnecting)

    def test_tasks_in_flight_count(self) -> None:
        """A connection that waits for its reply is not idle, however long that takes."""
        self.protocol.dataReceived(line_of("later"))
        for _ in range(5):
            self.sweep_after(10.1)
        self.assertFalse(self.transport.disconnecting)

    def test_replies_count(self) -> None:
        """The time begins with the reply, not with the request, of a task that took long."""
        self.protocol.dataReceived(line_of("later"))
        self.sweep_after(9)
        self.late[0].callback("late")
        self.sweep_after(9)
        self.assertFalse(self.transport.disconnecting)
        self.sweep_after(1.1)
        self.assertTrue(self.transport.disconnecting)

    def test_those_who_have_gone(self) -> None:
        """A connection that has gone is not closed."""
        self.lose()
        self.sweep_after(60)
        self.assertFalse(self.transport.disconnecting)
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])


class CrowdTests(ServerTestCase):
    """More connections than the operator allows."""

    def setUp(self) -> None:
        super().setUp()
        self.daemon = self.new_daemon(max_connections=2)

    def test_one_too_many(self) -> None:
        """A connection too many is told when to come back, hung up on, and not read."""
        fine = [self.daemon.connect() for _ in range(2)]
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("echo", "smuggled"))
        (reply,) = transport.messages
        self.assertEqual(reply["error"]["code"], "overloaded")
        self.assertEqual((reply["error"]["retryable"], reply["error"]["retry_after"]), (True, 1.0))
        self.assertTrue(transport.is_half_closed)
        for protocol, transport in fine:
            protocol.dataReceived(line_of("echo", 1))
            self.assertEqual(transport.messages, [1])

    def test_room_again(self) -> None:
        """When one has gone there is room for another."""
        first, _ = self.daemon.connect()
        self.daemon.connect()
        first.connectionLost(connectionDone)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("echo", 1))
        self.assertEqual(transport.messages, [1])

    def test_who_was_turned_away_takes_no_room(self) -> None:
        """A peer that has had its last word does not count, however long it stays."""
        first, _ = self.daemon.connect()
        self.daemon.connect()
        turned_away, _ = self.daemon.connect()
        self.assertEqual(self.daemon.slot.status(0.0)["connections"], 2)
        first.connectionLost(connectionDone)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("echo", 1))
        self.assertEqual(transport.messages, [1])
        turned_away.connectionLost(connectionDone)
        self.assertEqual(self.daemon.slot.status(0.0)["connections"], 2)


class FullTests(ServerTestCase):
    """Connections that are not read from for a while."""

    def test_too_many_calls(self) -> None:
        """A connection with as many calls in flight as it may have is read from at half of them."""
        self.daemon = self.new_daemon(max_in_flight=4)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(b"".join(line_of("later", id=number) for number in range(6)))
        self.assertEqual((len(self.late), transport.is_read), (4, False))
        self.late[0].callback(None)
        self.assertEqual((len(self.late), transport.is_read), (4, False))
        self.late[1].callback(None)
        self.assertEqual(len(self.late), 6)
        self.assertFalse(transport.is_read)
        for number in (2, 3):
            self.late[number].callback(None)
        self.assertTrue(transport.is_read)
        self.assertEqual([reply["id"] for reply in transport.messages], [0, 1, 2, 3])

    def test_replies_that_wait_for_their_turn(self) -> None:
        """A reply that waits for one before it counts like a call, and what came waits as well."""
        self.daemon = self.new_daemon(max_in_flight=4)
        protocol, transport = self.daemon.connect()
        asked = line_of("later") + b"".join(line_of("echo", number) for number in range(9))
        protocol.dataReceived(asked)
        self.assertEqual((transport.is_read, transport.messages), (False, []))
        self.assertEqual(protocol.unread, b"".join(line_of("echo", n) for n in range(3, 9)))
        self.late[0].callback("late")
        self.assertEqual(transport.messages, ["late", *range(9)])
        self.assertTrue(transport.is_read)

    def test_a_peer_that_does_not_read(self) -> None:
        """A peer that leaves more than 64 KiB unread is not read from until it has read all."""
        self.transport.unsent_bytes = 64 * 1024
        self.protocol.dataReceived(line_of("echo", 1))
        self.assertTrue(self.transport.is_read)
        self.transport.unsent_bytes += 1
        self.protocol.dataReceived(line_of("echo", 2))
        self.assertFalse(self.transport.is_read)
        self.transport.unsent_bytes = 0
        assert self.transport.on_sent is not None
        self.transport.on_sent()
        self.assertTrue(self.transport.is_read)
        self.protocol.dataReceived(line_of("echo", 3))
        self.assertEqual(self.transport.messages, [1, 2, 3])

    def test_what_had_come_already(self) -> None:
        """What such a peer has sent beyond 64 requests is only looked at when it has read all."""
        self.transport.unsent_bytes = 10**6
        self.protocol.dataReceived(b"".join(line_of("echo", number) for number in range(70)))
        self.assertEqual(self.transport.messages, list(range(64)))
        self.transport.unsent_bytes = 0
        assert self.transport.on_sent is not None
        self.transport.on_sent()
        self.assertEqual(self.transport.messages, list(range(70)))

    def test_two_reasons(self) -> None:
        """A connection that is held for two reasons is read from when both have gone."""
        self.daemon = self.new_daemon(max_in_flight=2)
        protocol, transport = self.daemon.connect()
        transport.unsent_bytes = 10**6
        protocol.dataReceived(line_of("echo", 1))
        protocol.dataReceived(b"")
        protocol.hold_still(True)
        transport.on_sent()
        self.assertFalse(transport.is_read)
        protocol.hold_still(False)
        self.assertTrue(transport.is_read)


class MoveTests(ServerTestCase):
    """Connections that go on at another worker."""

    def setUp(self) -> None:
        super().setUp()
        self.moved: list[tuple[Any, bytes]] = []
        self.takes = True
        self.ask_once(self.protocol, self.transport)

    def ask_once(self, protocol: TaskProtocol, transport: MemoryTransport) -> None:
        """Have a first request come, and be answered."""
        protocol.dataReceived(line_of("echo", "first"))
        transport.clear()
        transport.writes.clear()

    def move(self, socket: Any, luggage: bytes) -> bool:
        if self.takes:
            self.moved.append((socket, luggage))
        return self.takes

    def pass_on(self) -> None:
        self.daemon.factory.pass_on(self.move)

    def test_nothing_is_owed(self) -> None:
        """Connections that are owed nothing go at once, and their peers notice nothing."""
        protocol, other = self.daemon.connect()
        self.ask_once(protocol, other)
        self.pass_on()
        self.assertCountEqual(self.moved, [(self.transport, b" "), (other, b" ")])
        self.assertEqual(self.daemon.factory.open_connections, 0)
        for transport in (self.transport, other):
            self.assertFalse(transport.disconnecting)
            self.assertFalse(transport.is_half_closed)
            self.assertEqual(transport.writes, [])

    def test_one_that_has_not_asked_yet(self) -> None:
        """A connection stays, with the time that it has for its first line, until that comes."""
        protocol, transport = self.daemon.connect()
        self.pass_on()
        protocol.dataReceived(b"\n")
        self.assertEqual([moved for moved, _ in self.moved], [self.transport])
        protocol.hold_still(True)
        protocol.dataReceived(line_of("echo", 1) + b'{"func')
        self.assertIn((transport, b" \n" + line_of("echo", 1) + b'{"func'), self.moved)

    def test_what_was_read_goes_with_it(self) -> None:
        """The beginning of a line that has come goes with the connection."""
        self.protocol.dataReceived(line_of("echo", 1) + b'{"func')
        self.pass_on()
        self.assertEqual(self.moved, [(self.transport, b' {"func')])
        self.assertEqual(self.transport.messages, [1])

    def test_a_reply_is_owed(self) -> None:
        """A connection that is owed a reply gets it here, and goes then."""
        self.protocol.dataReceived(line_of("later") + line_of("later", id=1))
        self.pass_on()
        self.late[1].callback("b")
        self.assertEqual(self.moved, [])
        self.late[0].callback("a")
        self.assertEqual(self.moved, [(self.transport, b" ")])
        self.assertEqual(self.transport.messages, [{"id": 1, "result": "b"}, "a"])

    def test_a_batch_from_a_thread(self) -> None:
        """The last reply of a batch is written before the connection goes."""
        begun, go_on = Event(), Event()
        self.addCleanup(go_on.set)

        def hold() -> str:
            begun.set()
            go_on.wait(PATIENCE)
            return "held"

        self.daemon = MemoryDaemon(hold)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("hold"))
        self.assertTrue(begun.wait(PATIENCE))
        self.pass_on()
        go_on.set()
        self.daemon.loop.run_until(lambda: self.moved)
        self.assertEqual(self.moved, [(transport, b" ")])
        self.assertEqual(transport.messages, ["held"])

    def test_no_room_on_the_way(self) -> None:
        """A connection that cannot go at once is tried again, and is served meanwhile."""
        self.takes = False
        self.pass_on()
        self.assertEqual(self.daemon.factory.open_connections, 1)
        self.takes = True
        self.daemon.loop.pump([0.05, 0.1])
        self.assertEqual(self.moved, [(self.transport, b" ")])

    def test_a_peer_that_has_not_read(self) -> None:
        """A connection of which something is unsent does not go until it is sent."""
        self.transport.unsent_bytes = 1
        self.pass_on()
        self.assertEqual(self.moved, [])
        self.transport.unsent_bytes = 0
        self.daemon.loop.pump([0.05, 0.1])
        self.assertEqual(len(self.moved), 1)

    def test_a_peer_that_has_ended(self) -> None:
        """A connection whose peer has sent all stays, and is closed here after its reply."""
        self.protocol.dataReceived(line_of("later"))
        IHalfCloseableProtocol(self.protocol).readConnectionLost()
        self.pass_on()
        self.late[0].callback("late")
        self.assertEqual((self.moved, self.transport.messages), ([], ["late"]))
        self.assertTrue(self.transport.disconnecting)

    def test_a_peer_that_was_refused(self) -> None:
        """A connection that was hung up on stays."""
        self.protocol.dataReceived(b"rubbish\n")
        self.pass_on()
        self.daemon.loop.pump([0.05, 0.1])
        self.assertEqual(self.moved, [])

    def test_tls(self) -> None:
        """A TLS connection stays, and is hung up on when it is owed nothing."""
        pool = self.daemon.executor.pool = FakePool()
        self.lose()
        idle, idles = connect_securely(self.daemon)
        self.ask_once(idle, idles)
        busy, transport = connect_securely(self.daemon)
        busy.dataReceived(line_of("later"))
        _, silent = connect_securely(self.daemon)
        self.pass_on()
        self.assertTrue(idles.disconnecting)
        self.assertFalse(transport.disconnecting)
        self.daemon.loop.advance(0.05)
        busy.dataReceived(line_of("echo", 1))
        self.late[0].callback("late")
        self.assertFalse(transport.disconnecting)
        pool.taken[0].end(b"1\n")
        self.assertTrue(transport.disconnecting)
        self.assertEqual((idles.messages, transport.messages), ([], ["late", 1]))
        self.assertEqual((self.moved, silent.disconnecting), ([], False))

    def test_what_is_unread_over_tls(self) -> None:
        """What a TLS peer sends while it is held still is not run, as its goodbye tells it."""
        protocol, transport = connect_securely(self.daemon)
        protocol.dataReceived(line_of("later"))
        self.pass_on()
        protocol.dataReceived(line_of("later"))
        self.late[0].callback("late")
        self.assertTrue(transport.disconnecting)
        self.daemon.loop.advance(0.05)
        self.assertEqual((transport.messages, len(self.late)), (["late"], 1))

    def test_who_always_asks_for_more_is_held_still(self) -> None:
        """A connection that stays busy is not read from for a moment, again and again, less so."""
        self.protocol.dataReceived(line_of("later"))
        self.pass_on()
        still = []
        for _ in range(4):
            self.assertFalse(self.transport.is_read)
            self.daemon.loop.advance(0.049)
            self.assertFalse(self.transport.is_read)
            self.daemon.loop.advance(0.001)
            began = self.daemon.loop.seconds()
            while self.transport.is_read:
                self.daemon.loop.advance(0.01)
            still.append(round(self.daemon.loop.seconds() - began, 1))
        self.assertEqual(still, [0.1, 0.2, 0.4, 0.8])

    def test_the_longest_time_between(self) -> None:
        """It is held still every five seconds at least."""
        self.protocol.dataReceived(line_of("later"))
        self.pass_on()
        for _ in range(10):
            self.daemon.loop.pump([0.05, 5.0])
            self.assertFalse(self.transport.is_read)

    def test_nobody_is_left(self) -> None:
        """When the last connection has gone nobody is held still any more."""
        self.protocol.dataReceived(line_of("later"))
        self.pass_on()
        self.late[0].callback(None)
        self.daemon.loop.pump([0.05, 0.1])
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_what_comes_is_sent_on(self) -> None:
        """What comes over a connection that is to go, and cannot yet, is run elsewhere."""
        pool = self.daemon.executor.pool = FakePool()
        self.protocol.dataReceived(line_of("later"))
        self.pass_on()
        self.daemon.loop.advance(0.05)
        self.protocol.dataReceived(line_of("echo", 1))
        self.assertEqual([call.function.name for call in pool.taken], ["echo"])
        self.late[0].callback(None)
        self.assertEqual(self.moved, [])
        pool.taken[0].end(b"1\n")
        self.assertEqual((len(self.moved), self.transport.messages), (1, [None, 1]))

    def test_what_is_behind_the_last_reply(self) -> None:
        """A chunk that came together is answered to its end before the connection goes."""
        pool = self.daemon.executor.pool = FakePool()
        pool.answer = b"1\n"
        self.takes = False
        self.pass_on()
        self.daemon.loop.advance(0.05)
        self.takes = True
        self.protocol.dataReceived(line_of("echo") * 3 + b'{"func')
        self.assertEqual(self.transport.messages, [1, 1, 1])
        self.assertEqual(self.moved, [(self.transport, b' {"func')])

    def test_an_adopted_connection(self) -> None:
        """A connection that came from another worker goes on with what was read there."""
        protocol, transport = self.daemon.factory.buildProtocol(None), MemoryTransport()
        protocol.makeConnection(transport)
        protocol.adopted(b" " + line_of("echo", 1) + b'{"function":')
        protocol.dataReceived(b'"echo","args":[2]}\n')
        self.assertEqual(transport.messages, [1, 2])

    def test_an_adopted_connection_is_no_new_one(self) -> None:
        """It is not turned away for a crowd, and owes no first line: it has sent one elsewhere."""
        self.daemon = self.new_daemon(max_connections=1)
        self.daemon.connect()
        protocol, transport = self.daemon.factory.buildProtocol(None), MemoryTransport()
        protocol.makeConnection(transport)
        protocol.adopted(b" ")
        self.daemon.loop.advance(60)
        self.daemon.factory.sweep()
        self.assertEqual((transport.messages, transport.is_half_closed), ([], False))
        self.assertEqual(self.daemon.factory.open_connections, 2)

    def test_cut_off(self) -> None:
        """Cutting off ends those that have asked and are owed nothing, and no others."""
        protocol, other = self.daemon.connect()
        self.ask_once(protocol, other)
        _, silent = self.daemon.connect()
        self.protocol.dataReceived(line_of("later"))
        self.takes = False
        self.pass_on()
        self.daemon.factory.cut_off()
        cut_off = [t.disconnected for t in (self.transport, other, silent)]
        self.assertEqual(cut_off, [False, True, False])


class LostTests(ServerTestCase):
    def test_replies_are_dropped(self) -> None:
        """What is done after the connection was lost is written nowhere."""
        self.protocol.dataReceived(line_of("later") + line_of("later", id=1))
        self.lose()
        for late in self.late:
            late.callback("too late")
        self.assertEqual(self.transport.writes, [])

    def test_tasks_go_on(self) -> None:
        """A task whose connection was lost is not cancelled."""
        self.protocol.dataReceived(line_of("later"))
        self.lose()
        self.assertFalse(self.late[0].called)
        self.late[0].callback("too late")
        self.assertEqual(self.daemon.slot.status(0.0)["done"], 1)

    def test_tasks_that_end_with_their_caller(self) -> None:
        """A task that was to end with its caller's connection is cancelled, and no other."""
        self.protocol.dataReceived(
            line_of("later", cancel_on_disconnect=True) + line_of("later", id=1)
        )
        self.late[0].addErrback(lambda _: None)
        self.lose()
        self.assertEqual([late.called for late in self.late], [True, False])
        self.assertEqual(self.transport.writes, [])

    def test_a_bug_closes_its_own_connection(self) -> None:
        """An exception in taskd itself is logged, and costs the connection that met it alone."""
        broken = Function("broken", lambda session, id_json: 1 / 0, Kind.SESSION, skip=2)
        self.daemon.registry.add(broken)
        other, others = self.daemon.connect()
        self.protocol.dataReceived(line_of("echo", 1) + line_of("broken"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.transport.disconnected)
        other.dataReceived(line_of("echo", 2))
        self.assertEqual(others.messages, [2])
        self.assertFalse(others.disconnected)

    def test_what_was_not_read_is_dropped(self) -> None:
        """What came and was not taken is let go of, in a line or behind a pause."""
        for sent in (b'{"func' * 100, line_of("later") * 5 + b'{"func'):
            self.daemon = self.new_daemon(max_in_flight=2)
            self.protocol, _ = self.daemon.connect()
            self.protocol.dataReceived(sent)
            self.assertNotEqual(self.protocol.unread, b"")
            self.lose()
            self.assertEqual(self.protocol.unread, b"")


def grant_of(protocol: TaskProtocol) -> Grant | None:
    """Tell what a connection may do now."""
    return protocol._session.grant


WEB, OPS = "web's token 0123", "ops' token 01234"
ACCESS = Access([("web", digest_of(WEB)), ("ops", digest_of(OPS))], [("web", ["echo"])])


class IdentityTestCase(ServerTestCase):
    LONGEST = 100_000

    def setUp(self) -> None:
        super().setUp()
        self.log = log_of(self, "door")
        self.taken: list[bytes] = []
        self.daemon = self.new_daemon()
        self.protocol, self.transport = self.daemon.connect()

    def new_daemon(self, **settings: Any) -> MemoryDaemon:
        options = {"access": ACCESS, "max_line_bytes": self.LONGEST, **settings}
        return MemoryDaemon(*self.functions, **options)

    def gist(self, transport: MemoryTransport | None = None) -> list[Any]:
        """Give the replies, each error by its code alone."""
        messages = (transport or self.transport).messages
        return [m["error"]["code"] if isinstance(m, dict) else m for m in messages]

    def padded(self, line: bytes, length: int) -> bytes:
        """Make a request so many bytes long, its line feed not counted."""
        return line.rstrip(b"\n") + b" " * (length - len(line) + 1) + b"\n"

    def take(self, socket: Any, luggage: bytes) -> bool:
        """Take a connection, as another worker."""
        self.taken.append(luggage)
        return True

    def guess(self) -> None:
        """Have a wrong token come over a connection of its own, and be answered."""
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("taskd.auth", "wrong"))
        self.daemon.loop.advance(4)
        self.assertEqual(self.gist(transport), ["unauthorized"])

    def moved(self, luggage: bytes) -> MemoryTransport:
        """Give the transport of a connection that came from another worker."""
        self.protocol, transport = self.daemon.factory.buildProtocol(None), MemoryTransport()
        transport.protocol = self.protocol
        self.protocol.makeConnection(transport)
        self.protocol.adopted(luggage)
        return transport

    def sweep_after(self, seconds: float) -> None:
        self.daemon.loop.advance(seconds)
        self.daemon.factory.sweep()


class IdentityTests(IdentityTestCase):
    """Callers that have to say who they are."""

    def test_the_right_token(self) -> None:
        """Requests may follow a token at once; all replies leave in a single write."""
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.assertEqual((self.gist(), len(self.transport.writes)), (["web", 1], 1))
        self.assertEqual(self.daemon.slot.callers, {"web": 1})
        self.assertTrue(self.transport.is_read)
        self.lose()
        self.assertEqual(self.daemon.slot.callers, {})

    def test_no_token(self) -> None:
        """Who calls without one is refused, hung up on, and told of in the log."""
        self.protocol.dataReceived(line_of("echo", 1) + line_of("taskd.auth", WEB))
        self.assertEqual((self.gist(), self.transport.is_half_closed), (["unauthorized"], True))
        self.assertEqual(self.log, ["warn: a Unix socket: it has not said who it is"])

    def test_what_is_not_allowed(self) -> None:
        """Who is known gets an answer to what is not allowed, and is told of in the log."""
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("later"))
        self.protocol.dataReceived(line_of("echo", 1))
        self.assertEqual(self.gist(), ["web", "unauthorized", 1])
        self.assertEqual(self.log[1:], ["warn: a Unix socket: web may not call 'later'"])

    def test_the_longest_line_before(self) -> None:
        """Before it is known a caller's lines may have 4096 bytes, and not one more."""
        self.protocol.dataReceived(self.padded(line_of("taskd.auth", WEB), 4096))
        self.assertEqual(self.gist(), ["web"])
        for sent in (self.padded(line_of("taskd.auth", WEB), 4097), b"x" * 4097):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(sent)
            self.assertEqual(self.gist(transport), ["line-too-long"])
            self.assertTrue(transport.is_half_closed)

    def test_the_longest_line_after(self) -> None:
        """From then on its lines may be as long as any, in the same chunk already."""
        long = self.padded(line_of("echo", 1), self.LONGEST)
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + long)
        self.protocol.dataReceived(long)
        self.assertEqual(self.gist(), ["web", 1, 1])
        self.protocol.dataReceived(self.padded(line_of("echo", 1), self.LONGEST + 1))
        self.assertEqual(self.gist()[3:], ["line-too-long"])
        self.assertIn("--max-line", self.transport.messages[-1]["error"]["message"])

    def test_a_short_limit(self) -> None:
        """Where no line may be that long theirs may not either."""
        self.daemon = self.new_daemon(max_line_bytes=1024)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(self.padded(line_of("taskd.auth", WEB), 1025))
        self.assertEqual(self.gist(transport), ["line-too-long"])

    def test_where_nobody_is_asked(self) -> None:
        """Where nobody has to say who they are the first line may be as long as any."""
        self.daemon = MemoryDaemon(*self.functions, max_line_bytes=self.LONGEST)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(self.padded(line_of("echo", 1), self.LONGEST))
        protocol.dataReceived(line_of("taskd.auth", "whatever"))
        self.assertEqual(transport.messages, [1, None])

    def test_a_wrong_token(self) -> None:
        """A wrong token is answered late, and nothing is read meanwhile and afterwards."""
        self.protocol.dataReceived(line_of("taskd.auth", "wrong") + line_of("taskd.auth", WEB))
        self.assertFalse(self.transport.is_read)
        self.daemon.loop.advance(0.49)
        self.assertEqual(self.transport.messages, [])
        self.daemon.loop.advance(0.01)
        self.assertEqual((self.gist(), self.transport.is_half_closed), (["unauthorized"], True))
        self.daemon.loop.advance(60)
        self.assertEqual(self.gist(), ["unauthorized"])

    def test_a_token_in_question(self) -> None:
        """While a token waits to be looked at nothing is read, and what has come waits."""
        self.guess()
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1) + b'{"func')
        self.protocol.dataReceived(b'tion": "echo", "args": [2]}\n')
        self.assertEqual((self.transport.is_read, self.transport.messages), (False, []))
        self.daemon.loop.advance(0.5)
        self.assertEqual((self.transport.is_read, self.gist()), (True, ["web", 1, 2]))

    def test_lost_meanwhile(self) -> None:
        """A connection that is lost while its token is in question is nobody's."""
        self.guess()
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.lose()
        self.daemon.loop.advance(10)
        self.assertEqual((self.transport.messages, self.daemon.slot.callers), ([], {}))
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_passed_on_meanwhile(self) -> None:
        """A connection whose token is in question goes when it is answered, with what is behind."""
        self.guess()
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.daemon.factory.pass_on(self.take)
        self.daemon.loop.advance(0.49)
        self.assertEqual(self.taken, [])
        self.daemon.loop.pump([0.01, 0.25, 0.25])
        self.assertEqual(self.gist(), ["web"])
        self.assertEqual(self.taken, [digest_of(WEB).encode() + b" " + line_of("echo", 1)])
        self.assertEqual(self.daemon.slot.callers, {})

    def test_a_moved_connection(self) -> None:
        """A connection takes the digest of its token along, and what was not read behind it."""
        self.protocol.dataReceived(line_of("taskd.auth", WEB) + b'{"func')
        self.daemon.factory.pass_on(self.take)
        self.assertEqual(self.taken, [digest_of(WEB).encode() + b' {"func'])

    def test_a_moved_connection_goes_on(self) -> None:
        """Where its digest is known it need not say again who it is, and may what it might."""
        rest = line_of("echo", 1) + self.padded(line_of("later"), 5000) + b'{"func'
        transport = self.moved(digest_of(WEB).encode() + b" " + rest)
        self.protocol.dataReceived(b'tion": "echo", "args": [2]}\n')
        self.assertEqual(self.gist(transport), [1, "unauthorized", 2])
        self.assertEqual(self.daemon.slot.callers, {"web": 1})

    def test_a_token_that_is_no_longer_known(self) -> None:
        """Where its digest is not known any more it has to show a token that is."""
        luggage = digest_of("an old token 0123").encode() + b" "
        transport = self.moved(luggage + line_of("echo", 1))
        self.assertEqual(self.gist(transport), ["unauthorized"])
        self.assertTrue(transport.is_half_closed)
        transport = self.moved(luggage + line_of("taskd.auth", OPS))
        self.assertEqual(self.gist(transport), ["ops"])
        self.assertEqual(self.daemon.slot.callers, {"ops": 1})

    def test_moved_without_a_token(self) -> None:
        """Who had shown none, where none was asked for, has to where one is."""
        transport = self.moved(b" " + line_of("echo", 1))
        self.assertEqual(self.gist(transport), ["unauthorized"])

    def test_a_moved_stranger(self) -> None:
        """One that nobody knows any more has to say who it is in the time for a first line."""
        unknown = digest_of("an old token 0123").encode()
        for luggage in (unknown + b" ", b" ", unknown + b' {"func'):
            transport = self.moved(luggage)
            self.sweep_after(30)
            self.assertEqual(transport.messages, [], luggage)
            self.sweep_after(0.1)
            self.assertEqual(self.gist(transport), ["malformed"], luggage)
        transport = self.moved(unknown + b" " + line_of("taskd.auth", WEB))
        known = self.moved(digest_of(WEB).encode() + b" ")
        self.sweep_after(3600)
        self.assertEqual((self.gist(transport), self.gist(known)), (["web"], []))

    def test_a_certificate(self) -> None:
        """Who has shown a certificate in the handshake needs no token, and may what it may."""
        protocol, transport = connect_securely(self.daemon, "web")
        protocol.dataReceived(self.padded(line_of("echo", 1), 5000) + line_of("later"))
        self.assertEqual(self.gist(transport), [1, "unauthorized"])
        self.assertEqual(self.daemon.slot.callers, {"web": 1})
        protocol.connectionLost(connectionDone)
        self.assertEqual(self.daemon.slot.callers, {})

    def test_no_certificate(self) -> None:
        """Who has shown none over TLS has to show a token."""
        protocol, transport = connect_securely(self.daemon)
        protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.assertEqual(self.gist(transport), ["web", 1])
        protocol, transport = connect_securely(self.daemon)
        protocol.dataReceived(line_of("echo", 1))
        self.assertEqual((self.gist(transport), transport.disconnecting), (["unauthorized"], True))

    def test_before_the_handshake(self) -> None:
        """Before the handshake nothing is granted; after it what a peer has shown, or need not."""
        for access, identity, grant in (
            (ACCESS, "web", ACCESS.by_certificate("web")),
            (ACCESS, "", None),
            (ANYBODY, "web", ANYBODY.by_certificate("web")),
            (ANYBODY, "", ANYBODY.unasked()),
        ):
            self.daemon = self.new_daemon(access=access)
            protocol, transport = connect_securely(self.daemon, None)
            self.assertIsNone(grant_of(protocol))
            transport.peer_identity = identity
            protocol.handshakeCompleted()
            self.assertEqual(grant_of(protocol), grant)

    def test_a_token_where_nobody_is_asked(self) -> None:
        """Where nobody is asked for a token one changes nothing: a certificate's grant stays."""
        self.daemon = self.new_daemon(access=Access((), [("web", ["echo"])]))
        protocol, transport = connect_securely(self.daemon, "web")
        protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1) + line_of("later"))
        self.assertEqual(self.gist(transport), ["web", 1, "unauthorized"])
        self.assertEqual(self.daemon.slot.callers, {"web": 1})
        plain, others = self.daemon.connect()
        plain.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.assertEqual(self.gist(others), [None, "unauthorized"])
        self.assertTrue(transport.is_read and others.is_read)

    def test_a_failed_handshake(self) -> None:
        """A handshake that failed is told of in the log; an end in it, or after it, is not."""
        why = Failure(SSL.Error([("SSL routines", "", "no shared cipher")]))
        for identity, reason in (
            ("web", connectionDone),
            ("", why),
            (None, connectionDone),
            (None, Failure(ConnectionLost())),
        ):
            protocol, _ = connect_securely(self.daemon, identity)
            self.log.clear()
            protocol.connectionLost(reason)
            self.assertEqual(self.log, [])
        protocol, _ = connect_securely(self.daemon, None)
        protocol.connectionLost(why)
        self.assertEqual(self.log, ["warn: a Unix socket: no TLS handshake: no shared cipher"])

    def test_the_time_of_a_handshake(self) -> None:
        """Who takes part in no handshake is hung up on like who sends no line."""
        _, transport = connect_securely(self.daemon, None)
        self.daemon.loop.advance(30.1)
        self.daemon.factory.sweep()
        self.assertTrue(transport.disconnecting)
        self.daemon.loop.advance(2)
        self.assertTrue(transport.disconnected)

    def test_a_stranger_has_one_line(self) -> None:
        """A stranger cannot stay: whatever its first line is, it is known by it or has to go."""
        for line in (line_of("taskd.auth"), line_of("taskd.auth", 5), b" \n", line_of("x")):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(b"\r\n" + line)
            self.assertTrue(transport.is_half_closed, line)


OPS_NEXT = "ops' next token 0"


class ReviewTests(IdentityTestCase):
    """Connections of a worker that retires, while those who stay have other rules."""

    FORMER = Access([("web", digest_of(WEB)), ("ops", digest_of(OPS))], ())
    RENEWED = Access([("web", digest_of(WEB)), ("ops", digest_of(OPS_NEXT))], ())

    def setUp(self) -> None:
        super().setUp()
        self.takes = True

    def new_daemon(self, **settings: Any) -> MemoryDaemon:
        return super().new_daemon(**{"access": self.FORMER, **settings})

    def take(self, socket: Any, luggage: bytes) -> bool:
        return self.takes and super().take(socket, luggage)

    def connect_as(self, token: str) -> tuple[TaskProtocol, MemoryTransport]:
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("taskd.auth", token))
        transport.clear()
        return protocol, transport

    def pass_on(self, access: Access | None = RENEWED, *, is_other_ca: bool = False) -> None:
        self.daemon.factory.pass_on(self.take, access, is_other_ca=is_other_ca)
        self.daemon.loop.advance(0.05)  # all are held still that long

    def test_a_revoked_token(self) -> None:
        """With its token a connection loses what that granted, at once, and does not go first."""
        protocol, transport = self.connect_as(OPS)
        self.pass_on()
        self.assertEqual((self.daemon.slot.callers, self.taken), ({}, []))
        protocol.dataReceived(line_of("echo", 1) + line_of("echo", 2))
        self.assertEqual((self.gist(transport), self.taken), (["unauthorized"], []))
        self.assertTrue(transport.is_half_closed)

    def test_its_long_lines(self) -> None:
        """Its lines are a stranger's then."""
        protocol, transport = self.connect_as(OPS)
        self.pass_on()
        protocol.dataReceived(b"x" * 4097)
        self.assertEqual(self.gist(transport), ["line-too-long"])

    def test_its_call_in_flight(self) -> None:
        """What it has asked for before is answered, however long that takes; no more is run."""
        protocol, transport = self.connect_as(OPS)
        protocol.dataReceived(line_of("later", id=1))
        self.pass_on()
        self.sweep_after(3600)
        self.assertEqual((transport.messages, transport.is_half_closed), ([], False))
        self.late[0].callback("late")
        self.assertEqual(transport.messages, [{"id": 1, "result": "late"}])
        self.assertEqual(self.taken, [b" "])

    def test_a_call_behind_one_in_flight(self) -> None:
        """What it asks for meanwhile is unauthorized, and it is hung up on after its reply."""
        protocol, transport = self.connect_as(OPS)
        protocol.dataReceived(line_of("later"))
        self.pass_on()
        protocol.dataReceived(line_of("later") + line_of("echo", 1))
        self.assertEqual((transport.messages, len(self.late)), ([], 1))
        self.late[0].callback("late")
        self.assertEqual(self.gist(transport), ["late", "unauthorized"])
        self.assertEqual((transport.is_half_closed, self.taken), (True, []))

    def test_a_new_token(self) -> None:
        """A new token is good at the old worker already, and goes with the connection."""
        protocol, transport = self.connect_as(OPS)
        self.pass_on()
        protocol.dataReceived(line_of("taskd.auth", OPS_NEXT))
        self.assertEqual(self.gist(transport), ["ops"])
        self.assertEqual(self.taken, [digest_of(OPS_NEXT).encode() + b" "])

    def test_a_new_token_with_a_call_in_flight(self) -> None:
        """So it is where a call is in flight, and what is asked for behind it is run."""
        pool = self.daemon.executor.pool = FakePool()
        pool.answer = b"1\n"
        protocol, transport = self.connect_as(OPS)
        protocol.dataReceived(line_of("later"))
        self.pass_on()
        protocol.dataReceived(line_of("taskd.auth", OPS_NEXT) + line_of("echo", 1))
        self.late[0].callback("late")
        self.assertEqual(self.gist(transport), ["late", "ops", 1])
        self.assertEqual(self.taken, [digest_of(OPS_NEXT).encode() + b" "])

    def test_the_revoked_token_again(self) -> None:
        """The revoked token is wrong at the old worker as well."""
        protocol, transport = self.connect_as(OPS)
        self.pass_on()
        protocol.dataReceived(line_of("taskd.auth", OPS))
        self.daemon.loop.advance(0.5)
        self.assertEqual((self.gist(transport), self.taken), (["unauthorized"], []))

    def test_its_time(self) -> None:
        """A connection that has lost its grant has the time of a first line for a new one."""
        self.lose()
        _, transport = self.connect_as(OPS)
        self.sweep_after(100)
        self.pass_on()
        self.sweep_after(29.9)
        self.assertEqual(transport.messages, [])
        self.sweep_after(0.1)
        self.assertEqual((self.gist(transport), self.taken), (["malformed"], []))

    def test_a_token_that_stays(self) -> None:
        """Whoever has shown a token that stays keeps what it granted, and goes with it."""
        pool = self.daemon.executor.pool = FakePool()
        pool.answer = b"1\n"
        _, idles = self.connect_as(WEB)
        busy, transport = self.daemon.connect()
        busy.dataReceived(line_of("taskd.auth", WEB) + line_of("later"))
        self.pass_on()
        self.assertEqual((self.taken, idles.messages), ([digest_of(WEB).encode() + b" "], []))
        self.assertEqual(self.daemon.slot.callers, {"web": 1})
        busy.dataReceived(line_of("echo", 1))
        self.late[0].callback("late")
        self.assertEqual(self.gist(transport), ["web", "late", 1])
        self.assertEqual(self.taken, [digest_of(WEB).encode() + b" "] * 2)

    def test_a_certificate(self) -> None:
        """A certificate stays good under the same authority, and under another it is not."""
        for is_other_ca, gist in ((False, ["late", "1"]), (True, ["late", "unauthorized"])):
            self.daemon = self.new_daemon()
            pool = self.daemon.executor.pool = FakePool()
            pool.answer = b'"1"\n'
            protocol, transport = connect_securely(self.daemon, "ops")
            protocol.dataReceived(line_of("later"))
            self.pass_on(is_other_ca=is_other_ca)
            self.assertEqual(self.daemon.slot.callers, {} if is_other_ca else {"ops": 1})
            protocol.dataReceived(line_of("echo"))
            self.late.pop().callback("late")
            self.assertEqual((self.gist(transport), transport.disconnecting), (gist, True))

    def test_a_token_over_tls(self) -> None:
        """What a token grants depends on no authority for certificates."""
        protocol, transport = connect_securely(self.daemon)
        protocol.dataReceived(line_of("taskd.auth", WEB) + line_of("echo", 1))
        self.pass_on(is_other_ca=True)
        self.assertEqual(self.gist(transport), ["web", 1])
        self.assertTrue(transport.disconnecting)

    def test_a_handshake(self) -> None:
        """Who shakes hands meanwhile is cut off if certificates have another authority now."""
        for is_other_ca in (False, True):
            _, transport = connect_securely(self.daemon, None)
            self.pass_on(is_other_ca=is_other_ca)
            self.assertEqual(transport.disconnected, is_other_ca)
        self.assertEqual(transport.writes, [])

    def test_a_handshake_under_the_same_authority(self) -> None:
        """Otherwise it comes to its end, and the rules of those who stay are what counts."""
        for access, gist in (
            (self.RENEWED, ["unauthorized"]),
            (Access((), ()), ["here"]),
        ):
            self.daemon = self.new_daemon()
            pool = self.daemon.executor.pool = FakePool()
            pool.answer = b'"here"\n'
            protocol, transport = connect_securely(self.daemon, None)
            self.pass_on(access)
            protocol.handshakeCompleted()
            protocol.dataReceived(line_of("echo"))
            self.assertEqual(self.gist(transport), gist)

    def test_where_nobody_was_asked(self) -> None:
        """Who was asked for nothing has to show a token once those who stay ask for one."""
        self.daemon = self.new_daemon(access=ANYBODY)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("echo", 1))
        other, others = self.daemon.connect()
        other.dataReceived(line_of("echo", 1))
        self.pass_on()
        self.assertEqual(self.taken, [])
        protocol.dataReceived(line_of("echo", 2))
        self.assertEqual(self.gist(transport), [1, "unauthorized"])
        other.dataReceived(line_of("taskd.auth", WEB))
        self.assertEqual(self.gist(others), [1, "web"])
        self.assertEqual(self.taken, [digest_of(WEB).encode() + b" "])

    def test_who_has_not_asked_yet(self) -> None:
        """Who has not said anything yet is asked by the rules of those who stay."""
        protocol, transport = self.daemon.connect()
        self.pass_on()
        self.takes = False
        protocol.dataReceived(line_of("taskd.auth", OPS_NEXT) + line_of("taskd.auth", OPS))
        self.daemon.loop.advance(0.5)
        self.assertEqual(self.gist(transport), ["ops", "unauthorized"])

    def test_other_rules_again(self) -> None:
        """When the rules change once more it is looked at anew, and held still no more often."""
        protocol, transport = self.connect_as(OPS)
        protocol.dataReceived(line_of("later", id=1))
        self.pass_on(self.FORMER)
        timers = len(self.daemon.loop.getDelayedCalls())
        self.pass_on(self.RENEWED)
        self.assertEqual(len(self.daemon.loop.getDelayedCalls()), timers)
        self.assertEqual(self.daemon.slot.callers, {})
        protocol.dataReceived(line_of("echo", 1, id=2))
        self.late[0].callback("late")
        (refusal, reply) = transport.messages
        self.assertEqual((refusal["id"], refusal["error"]["code"]), (2, "unauthorized"))
        self.assertEqual(reply, {"id": 1, "result": "late"})

    def test_the_same_rules(self) -> None:
        """Where a worker retires under the same rules everybody keeps what they have."""
        for access in (None, self.FORMER):
            self.daemon = self.new_daemon()
            self.connect_as(OPS)
            self.taken.clear()
            self.pass_on(access)
            self.assertEqual(self.taken, [digest_of(OPS).encode() + b" "])


class ForeignTests(ServerTestCase):
    def test_who_speaks_http(self) -> None:
        """A browser is cut off at once, whatever it posts, and learns nothing but that."""
        log = log_of(self, "door")
        body = line_of("echo", "smuggled")
        self.protocol.dataReceived(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n" + body)
        self.protocol.dataReceived(body)
        self.assertTrue(self.transport.disconnected)
        self.assertEqual((self.transport.writes, self.transport.is_half_closed), ([], False))
        self.assertEqual(log, ["warn: a Unix socket: it speaks HTTP, and is cut off"])
        self.lose()
        self.assertEqual(self.daemon.loop.getDelayedCalls(), [])

    def test_who_speaks_tls(self) -> None:
        """A browser that begins TLS on a plain port is cut off, with or without a line feed."""
        for hello in (b"\x16\x03\x01\x02\x00", b"\x16\x03\x01\n", b"\x16\x03\x01" + b"x" * 5000):
            protocol, transport = self.daemon.connect()
            protocol.dataReceived(hello)
            self.assertEqual((transport.disconnected, transport.writes), (True, []), hello[:9])

    def test_http_without_an_end(self) -> None:
        """A first line of HTTP that is too long, or never ends, is not answered either."""
        self.protocol.dataReceived(b"GET /" + b"x" * 1025)
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(b"GET / HT")
        self.daemon.loop.advance(30.1)
        self.daemon.factory.sweep()
        for each in (self.transport, transport):
            self.assertEqual((each.disconnected, each.writes), (True, []))

    def test_in_the_middle(self) -> None:
        """What looks like TLS behind the beginning of a line is a part of the line."""
        self.protocol.dataReceived(b'{"function": "echo", "args": ["')
        self.protocol.dataReceived(b'\x16\x03\x01"]}\n')
        (reply,) = self.transport.messages
        self.assertEqual(reply["error"]["code"], "malformed")


class UnreadTests(ServerTestCase):
    """Peers that do not read."""

    def setUp(self) -> None:
        super().setUp()
        self.log = log_of(self, "door")
        self.transport.unsent_bytes = 100_000
        self.protocol.dataReceived(line_of("later", id=1) + line_of("echo"))
        self.assertFalse(self.transport.is_read)

    def sweep_after(self, seconds: float) -> None:
        self.daemon.loop.advance(seconds)
        self.daemon.factory.sweep()

    def test_one_that_does_not_read(self) -> None:
        """A peer that takes nothing for 60 s is cut off, though it is owed something."""
        self.sweep_after(60)
        self.assertFalse(self.transport.disconnected)
        self.sweep_after(0.1)
        self.assertTrue(self.transport.disconnected)
        told = "warn: a Unix socket: it does not read its replies, and is cut off"
        self.assertEqual(self.log, [told])

    def test_one_that_reads_a_little(self) -> None:
        """A peer that takes a byte now and then is not."""
        for _ in range(10):
            self.transport.unsent_bytes -= 1
            self.sweep_after(59)
        self.assertFalse(self.transport.disconnected)

    def test_one_that_reads_all(self) -> None:
        """A peer that has taken all has no such limit any more."""
        self.transport.unsent_bytes = 0
        assert self.transport.on_sent is not None
        self.transport.on_sent()
        self.sweep_after(3600)
        self.assertFalse(self.transport.disconnected)

    def test_replies_meanwhile(self) -> None:
        """To be sent more replies gives it no more time."""
        self.sweep_after(59)
        self.transport.unsent_bytes += len(b'{"id": 1, "result": null}\n')
        self.late[0].callback(None)
        self.sweep_after(1.1)
        self.assertTrue(self.transport.disconnected)

    def test_progress(self) -> None:
        """While a peer is behind with reading what tasks report is left out, replies are not."""
        self.transport.clear()
        self.protocol.report(b'"half"\n')
        self.late[0].callback(None)
        self.assertEqual(self.transport.messages, [{"id": 1, "result": None}])
        self.transport.unsent_bytes = 0
        assert self.transport.on_sent is not None
        self.transport.on_sent()
        self.protocol.report(b'"again"\n')
        self.assertEqual(self.transport.messages[1:], ["again"])

    def test_a_little(self) -> None:
        """A peer that leaves no more than 64 KiB unread may do so, and is told all."""
        protocol, transport = self.daemon.connect()
        transport.unsent_bytes = 64 * 1024
        protocol.dataReceived(line_of("echo", 1))
        protocol.report(b'"half"\n')
        self.sweep_after(3600)
        self.assertFalse(transport.disconnected)
        self.assertEqual(transport.messages, [1, "half"])


class FactoryTests(ServerTestCase):
    def test_connections_are_counted(self) -> None:
        """The open connections are known, here and on the scoreboard."""
        other, _ = self.daemon.connect()
        self.assertEqual(self.daemon.factory.open_connections, 2)
        for protocol, left in ((self.protocol, 1), (other, 0)):
            protocol.connectionLost(connectionDone)
            self.assertEqual(self.daemon.factory.open_connections, left)
            self.assertEqual(self.daemon.slot.status(0.0)["connections"], left)
        self.assertEqual(self.daemon.slot.status(0.0)["accepted"], 2)

    def test_room_is_told(self) -> None:
        """Who waits for room is told when a connection has gone, not before it has."""
        seen = []
        self.daemon.factory.on_room = lambda: seen.append(self.daemon.factory.open_connections)
        self.lose()
        self.assertEqual(seen, [0])

    def test_the_last_one_is_told(self) -> None:
        """Who waits for the end is told when the last connection has gone, and not before."""
        seen = []
        self.daemon.factory.on_empty = lambda: seen.append(self.daemon.factory.open_connections)
        other, _ = self.daemon.connect()
        self.lose()
        self.assertEqual(seen, [])
        other.connectionLost(connectionDone)
        self.assertEqual(seen, [0])

    def test_drain(self) -> None:
        """Draining says goodbye to who is owed nothing, and to the others after their replies."""
        busy, busy_transport = self.daemon.connect()
        busy.dataReceived(line_of("later"))
        self.daemon.factory.drain()
        self.assertTrue(self.transport.is_half_closed)
        self.assertFalse(busy_transport.is_half_closed)
        self.lose()
        self.late[0].callback("late")
        late, goodbye = busy_transport.messages
        self.assertEqual((late, goodbye["error"]["code"]), ("late", "shutting-down"))
        self.assertEqual(self.transport.messages, [goodbye])
        self.assertTrue(busy_transport.is_half_closed)

    def test_abandon(self) -> None:
        """Abandoning answers whatever is owed on every connection."""
        connections = [self.daemon.connect() for _ in range(3)]
        for protocol, _ in connections:
            protocol.dataReceived(line_of("later", id=1))
        self.daemon.factory.abandon(WorkerLost("the grace is over"))
        for _, transport in connections:
            self.assertEqual(transport.messages[0]["error"]["code"], "worker-lost")
        self.assertEqual(self.daemon.slot.status(0.0)["in_flight"], 0)


class CancellerTests(SynchronousTestCase):
    """A task's own canceller is foreign code: whatever it raises stays with it."""

    def setUp(self) -> None:
        def broken(_: Any) -> None:
            raise ZeroDivisionError

        @task(blocking=False)
        def later() -> Deferred[None]:
            return Deferred(broken)

        self.daemon = MemoryDaemon(later)

    def test_cancel(self) -> None:
        """Cancelling a task whose canceller raises is answered, and the connection goes on."""
        protocol, transport = self.daemon.connect()
        protocol.dataReceived(line_of("later", id=1) + line_of("taskd.cancel", 1, id=2))
        self.flushLoggedErrors(ZeroDivisionError)
        self.assertEqual([reply["id"] for reply in transport.messages], [1, 2])
        self.assertFalse(transport.disconnected)

    def test_abandon(self) -> None:
        """Abandoning answers every connection, whatever a canceller raises."""
        connections = [self.daemon.connect() for _ in range(2)]
        for protocol, _ in connections:
            protocol.dataReceived(line_of("later", id=1))
        self.daemon.factory.abandon(WorkerLost("the grace is over"))
        self.flushLoggedErrors(ZeroDivisionError)
        self.assertEqual([len(transport.messages) for _, transport in connections], [1, 1])
