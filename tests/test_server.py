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
from tests.support import PATIENCE, MemoryDaemon, line_of


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

        self.daemon = MemoryDaemon(echo, later, max_line_bytes=1024)
        self.protocol, self.transport = self.daemon.connect()

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
        self.assertClosed()
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
        self.daemon.loop.advance(60)
        self.assertFalse(self.transport.disconnected)
        self.transport.arrive()
        self.daemon.loop.advance(1.9)
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

    def test_drain_with_no_connection(self) -> None:
        """Draining is over at once if there is no connection."""
        self.lose()
        self.assertIsNone(self.successResultOf(self.daemon.factory.drain()))

    def test_drain(self) -> None:
        """Draining hangs up on who is owed nothing, and is over when the last one has gone."""
        busy, busy_transport = self.daemon.connect()
        busy.dataReceived(line_of("later"))
        drained = self.daemon.factory.drain()
        self.assertTrue(self.transport.is_half_closed)
        self.assertFalse(busy_transport.is_half_closed)
        self.lose()
        self.late[0].callback("late")
        self.assertEqual(busy_transport.messages, ["late"])
        self.assertTrue(busy_transport.is_half_closed)
        self.assertNoResult(drained)
        busy.connectionLost(connectionDone)
        self.assertIsNone(self.successResultOf(drained))

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
