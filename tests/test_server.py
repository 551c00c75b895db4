"""The server's protocol: bytes to a session and back, and the end of a connection."""

from __future__ import annotations

from threading import Event
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import connectionDone
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import WorkerLost
from taskd.functions import Function, Kind, progress, task
from tests.support import PATIENCE, FakePool, MemoryDaemon, MemoryTransport, line_of


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
            self.protocol.dataReceived(b"POST / HTTP/1.1\n" + rest)
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
        """A connection that has sent a line, a keep-alive even, may be silent from then on."""
        other, others = self.daemon.connect()
        self.protocol.dataReceived(line_of("echo"))
        other.dataReceived(b"\n")
        self.sweep_after(86400)
        for transport in (self.transport, others):
            self.assertFalse(transport.is_half_closed)
            self.assertFalse(transport.disconnecting)

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

    def test_requests_count(self) -> None:
        """Each request, and each keep-alive, gives it the time anew."""
        for line in (line_of("echo"), b"\n"):
            self.sweep_after(9)
            self.protocol.dataReceived(line)
        self.sweep_after(9)
        self.assertFalse(self.transport.disconnecting)
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
        self.protocol.dataReceived(b"\n")

    def move(self, socket: Any, unread: bytes) -> bool:
        if self.takes:
            self.moved.append((socket, unread))
        return self.takes

    def pass_on(self) -> None:
        self.daemon.factory.pass_on(self.move)

    def test_nothing_is_owed(self) -> None:
        """Connections that are owed nothing go at once, and their peers notice nothing."""
        protocol, other = self.daemon.connect()
        protocol.dataReceived(b"\n")
        self.pass_on()
        self.assertCountEqual(self.moved, [(self.transport, b""), (other, b"")])
        self.assertEqual(self.daemon.factory.open_connections, 0)
        for transport in (self.transport, other):
            self.assertFalse(transport.disconnecting)
            self.assertFalse(transport.is_half_closed)
            self.assertEqual(transport.writes, [])

    def test_one_that_has_not_asked_yet(self) -> None:
        """A connection stays, with the time that it has for its first line, until that comes."""
        protocol, transport = self.daemon.connect()
        self.pass_on()
        self.assertNotIn((transport, b""), self.moved)
        protocol.dataReceived(b'\n{"func')
        self.assertIn((transport, b'\n{"func'), self.moved)

    def test_what_was_read_goes_with_it(self) -> None:
        """The beginning of a line that has come goes with the connection."""
        self.protocol.dataReceived(line_of("echo", 1) + b'{"func')
        self.pass_on()
        self.assertEqual(self.moved, [(self.transport, b'{"func')])
        self.assertEqual(self.transport.messages, [1])

    def test_a_reply_is_owed(self) -> None:
        """A connection that is owed a reply gets it here, and goes then."""
        self.protocol.dataReceived(line_of("later") + line_of("later", id=1))
        self.pass_on()
        self.late[1].callback("b")
        self.assertEqual(self.moved, [])
        self.late[0].callback("a")
        self.assertEqual(self.moved, [(self.transport, b"")])
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
        self.assertEqual(self.moved, [(transport, b"")])
        self.assertEqual(transport.messages, ["held"])

    def test_no_room_on_the_way(self) -> None:
        """A connection that cannot go at once is tried again, and is served meanwhile."""
        self.takes = False
        self.pass_on()
        self.assertEqual(self.daemon.factory.open_connections, 1)
        self.takes = True
        self.daemon.loop.pump([0.05, 0.1])
        self.assertEqual(self.moved, [(self.transport, b"")])

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

    def test_a_transport_that_cannot_be_given_away(self) -> None:
        """A connection that cannot be given away, such as TLS, stays."""
        protocol, transport = self.daemon.factory.buildProtocol(None), StringTransport()
        protocol.makeConnection(transport)
        self.lose()
        self.pass_on()
        self.assertEqual((self.moved, self.daemon.factory.open_connections), ([], 1))

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
        self.assertEqual(self.moved, [(self.transport, b'{"func')])

    def test_an_adopted_connection(self) -> None:
        """A connection that came from another worker goes on with what was read there."""
        protocol, transport = self.daemon.factory.buildProtocol(None), MemoryTransport()
        protocol.makeConnection(transport)
        protocol.adopted(line_of("echo", 1) + b'{"function":')
        protocol.dataReceived(b'"echo","args":[2]}\n')
        self.assertEqual(transport.messages, [1, 2])

    def test_an_adopted_connection_is_no_new_one(self) -> None:
        """It is not turned away for a crowd, and owes no first line: it has sent one elsewhere."""
        self.daemon = self.new_daemon(max_connections=1)
        self.daemon.connect()
        protocol, transport = self.daemon.factory.buildProtocol(None), MemoryTransport()
        protocol.makeConnection(transport)
        protocol.adopted(b"")
        self.daemon.loop.advance(60)
        self.daemon.factory.sweep()
        self.assertEqual((transport.messages, transport.is_half_closed), ([], False))
        self.assertEqual(self.daemon.factory.open_connections, 2)

    def test_cut_off(self) -> None:
        """Cutting off ends those that have asked and are owed nothing, and no others."""
        protocol, other = self.daemon.connect()
        protocol.dataReceived(b"\n")
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
        broken = Function("broken", lambda session: 1 / 0, Kind.SESSION, skip=1)
        self.daemon.registry.add(broken)
        other, others = self.daemon.connect()
        self.protocol.dataReceived(line_of("echo", 1) + line_of("broken"))
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertTrue(self.transport.disconnected)
        other.dataReceived(line_of("echo", 2))
        self.assertEqual(others.messages, [2])
        self.assertFalse(others.disconnected)


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
        """Draining hangs up on who is owed nothing, and on the others after their replies."""
        busy, busy_transport = self.daemon.connect()
        busy.dataReceived(line_of("later"))
        self.daemon.factory.drain()
        self.assertTrue(self.transport.is_half_closed)
        self.assertFalse(busy_transport.is_half_closed)
        self.lose()
        self.late[0].callback("late")
        self.assertEqual(busy_transport.messages, ["late"])
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
