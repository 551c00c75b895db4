"""The framing, held against ``bytes.split`` and against Twisted's ``LineReceiver``."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.lines import EagerWrites, LongLineReceiver, OneConnection

examples = settings(max_examples=150, deadline=None)

LIMIT = 5

STEPS = [
    *(b"a", b"bb\n", b"ccc", b"\n", b"dddd\ne", b"p\n", b"p\nf\ng", b"pr\n", b"pr\nh\np\ni\n"),
    *(b"pl\n", b"pl\nj\nk"),
    *("pause", "resume"),
]


class Recorder(LongLineReceiver):
    """
    Note what comes, and obey some lines.

    The line ``p`` pauses, ``pr`` pauses and resumes, ``pl`` pauses when ``late``
    is on its way already, ``q`` hangs up, and ``>x`` is as if a transport
    brought ``x`` at once as the answer to it.
    """

    MAX_LENGTH = LIMIT

    def __init__(self) -> None:
        super().__init__()
        self.came: list[bytes] = []

    def lineReceived(self, line: bytes) -> None:
        self.came.append(line)
        if line in (b"p", b"pr", b"pl"):
            self.pauseProducing()
        if line == b"pr":
            self.resumeProducing()
        if line == b"pl":
            self.dataReceived(b"late\n")
        if line == b"q":
            self.transport.loseConnection()
        if line.startswith(b">"):
            self.dataReceived(line[1:] + b"\n")

    def lineLengthExceeded(self, line: bytes) -> None:
        self.came.append(b"too long")


class Reference(LineReceiver):
    """Twisted's own receiver, which does the same."""

    MAX_LENGTH = LIMIT
    delimiter = b"\n"
    lineReceived = Recorder.lineReceived
    lineLengthExceeded = Recorder.lineLengthExceeded

    def __init__(self) -> None:
        self.came: list[bytes] = []


def connected(receiver: Any) -> Any:
    """Give a receiver that has a transport."""
    receiver.makeConnection(StringTransport())
    return receiver


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut *data* into chunks of these sizes, over and over."""
    chunks = []
    while data:
        for size in sizes:
            chunks.append(data[:size])
            data = data[size:]
    return chunks


class LongLineReceiverTests(SynchronousTestCase):
    """Bytes to lines."""

    @examples
    @given(
        data=st.text("ab\n\r", max_size=40).map(str.encode),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    )
    def test_chunks_do_not_matter(self, data: bytes, sizes: list[int]) -> None:
        """The lines are the same however the bytes were cut, and only whole ones are given."""
        receiver = connected(Recorder())
        receiver.MAX_LENGTH = 100
        for chunk in pieces(data, sizes):
            receiver.dataReceived(chunk)
        *lines, rest = data.split(b"\n")
        self.assertEqual(receiver.came, lines)
        self.assertIs(receiver.is_mid_line, bool(rest))

    @examples
    @given(steps=st.lists(st.sampled_from(STEPS), max_size=12))
    def test_like_twisteds_own(self, steps: list[bytes | str]) -> None:
        """Lines, pauses and lines that are too long are as with Twisted's ``LineReceiver``."""
        ours, theirs = connected(Recorder()), connected(Reference())
        for step in steps:
            for receiver in (ours, theirs):
                if step == "pause":
                    receiver.pauseProducing()
                elif step == "resume":
                    receiver.resumeProducing()
                else:
                    receiver.dataReceived(step)
            self.assertEqual(ours.came, theirs.came)

    def test_the_longest_line(self) -> None:
        """A line of ``MAX_LENGTH`` bytes is given, whole or in pieces; one byte more is not."""
        for step in (1, 2, 100):
            for length, came in ((LIMIT, [b"x" * LIMIT, b"y"]), (LIMIT + 1, [b"too long"])):
                receiver = connected(Recorder())
                for chunk in pieces(b"x" * length + b"\n", [step]):
                    if b"too long" not in receiver.came:
                        receiver.dataReceived(chunk)
                if b"too long" not in receiver.came:
                    receiver.dataReceived(b"y\n")
                self.assertEqual(receiver.came, came)

    def test_a_carriage_return_does_not_count(self) -> None:
        """The carriage return before a line feed is not counted, wherever the line was cut."""
        for line, came in (
            (b"x" * LIMIT + b"\r", [b"x" * LIMIT + b"\r", b"y"]),
            (b"x" * (LIMIT + 1) + b"\r", [b"too long"]),
            (b"x" * LIMIT + b"\r\r", [b"too long"]),
            (b"x" * (LIMIT - 1) + b"\rx", [b"too long"]),
            (b"\r" * (LIMIT + 1), [b"\r" * (LIMIT + 1), b"y"]),
        ):
            for step in range(1, LIMIT + 5):
                receiver = connected(Recorder())
                for chunk in pieces(line + b"\ny\n", [step]):
                    if b"too long" not in receiver.came:
                        receiver.dataReceived(chunk)
                self.assertEqual(receiver.came, came, (line, step))

    def test_a_carriage_return_that_ends_nothing(self) -> None:
        """A carriage return that more follows was counted after all."""
        receiver = connected(Recorder())
        receiver.dataReceived(b"x" * LIMIT + b"\r")
        self.assertEqual((receiver.came, receiver.is_mid_line), ([], True))
        receiver.dataReceived(b"y")
        self.assertEqual(receiver.came, [b"too long"])

    @examples
    @given(
        data=st.text("ab\n\r", max_size=40).map(str.encode),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    )
    def test_chunks_do_not_matter_to_the_limit(self, data: bytes, sizes: list[int]) -> None:
        """The lines up to the first that is too long are the same however the bytes were cut."""
        seen = []
        for way in ([max(1, len(data))], sizes):
            receiver = connected(Recorder())
            for chunk in pieces(data, way):
                if b"too long" not in receiver.came:
                    receiver.dataReceived(chunk)
            seen.append(receiver.came)
        self.assertEqual(seen[0], seen[1])

    @examples
    @given(
        data=st.text("ap\n", max_size=30).map(str.encode),
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    )
    def test_what_is_unread(self, data: bytes, sizes: list[int]) -> None:
        """What was given as lines, and what is unread, make up what has come, pauses or not."""
        receiver = connected(Recorder())
        receiver.MAX_LENGTH = 100
        for chunk in pieces(data, sizes):
            receiver.dataReceived(chunk)
        read = b"".join(line + b"\n" for line in receiver.came)
        self.assertEqual(read + receiver.unread, data)

    def test_nothing_is_unread(self) -> None:
        """Between two lines nothing is unread."""
        receiver = connected(Recorder())
        self.assertEqual(receiver.unread, b"")
        receiver.dataReceived(b"a\nbb\n")
        self.assertEqual(receiver.unread, b"")

    def test_forgetting(self) -> None:
        """What is unread, in a line or behind a pause, can be let go of."""
        for sent in (b"a", b"p\nb\nc", b"p\n"):
            receiver = connected(Recorder())
            receiver.dataReceived(sent)
            receiver.forget_unread()
            self.assertEqual((receiver.unread, receiver.is_mid_line), (b"", False))

    def test_tiny_pieces(self) -> None:
        """However a line is cut, what waits of it takes few pieces, and comes whole."""
        receiver = connected(Recorder())
        receiver.MAX_LENGTH = 10**5
        most = 0
        for _ in range(10**5):
            receiver.dataReceived(b"x")
            most = max(most, len(receiver._pieces))
        self.assertLess(most, 200)
        receiver.dataReceived(b"\n")
        self.assertEqual(receiver.came, [b"x" * 10**5])

    def test_a_line_without_an_end(self) -> None:
        """A line that grows too long is told before its end comes, and nothing of it is kept."""
        receiver = connected(Recorder())
        receiver.dataReceived(b"x" * LIMIT)
        self.assertEqual((receiver.came, receiver.is_mid_line), ([], True))
        receiver.dataReceived(b"x")
        self.assertEqual((receiver.came, receiver.is_mid_line), ([b"too long"], False))

    def test_nothing_behind_a_line_that_is_too_long(self) -> None:
        """What came in one chunk behind a line that is too long is not given."""
        receiver = connected(Recorder())
        receiver.dataReceived(b"a\n" + b"x" * (LIMIT + 1) + b"\nb\nc")
        self.assertEqual((receiver.came, receiver.is_mid_line), ([b"a", b"too long"], False))

    def test_a_pause_keeps_the_rest(self) -> None:
        """While paused no line is given, and afterwards each comes once and in its order."""
        receiver = connected(Recorder())
        receiver.dataReceived(b"a\np\nb\nc")
        receiver.dataReceived(b"c\np\nd\n")
        self.assertEqual(receiver.came, [b"a", b"p"])
        receiver.resumeProducing()
        self.assertEqual(receiver.came, [b"a", b"p", b"b", b"cc", b"p"])
        receiver.resumeProducing()
        self.assertEqual(receiver.came, [b"a", b"p", b"b", b"cc", b"p", b"d"])

    def test_what_comes_late_in_a_pause(self) -> None:
        """Bytes that come although the receiver has just paused are kept, behind the rest."""
        receiver = connected(Recorder())
        receiver.dataReceived(b"pl\na\n")
        self.assertEqual(receiver.came, [b"pl"])
        receiver.resumeProducing()
        self.assertEqual(receiver.came, [b"pl", b"a", b"late"])

    def test_mid_line_while_paused(self) -> None:
        """Whole lines that wait for the end of a pause are not the beginning of one."""
        for behind, is_mid_line in ((b"", False), (b"a\nb\n", False), (b"a\nb", True)):
            receiver = connected(Recorder())
            receiver.dataReceived(b"p\n" + behind)
            self.assertIs(receiver.is_mid_line, is_mid_line, behind)

    def test_a_line_that_comes_during_a_line(self) -> None:
        """A line that a transport brings while another one is taken is given as well, behind it."""
        ours, theirs = connected(Recorder()), connected(Reference())
        for receiver in (ours, theirs):
            receiver.dataReceived(b">x\n")
        self.assertEqual(theirs.came, [b">x", b"x"])
        self.assertEqual(ours.came, theirs.came)

    def test_nothing_after_hanging_up(self) -> None:
        """What came in one chunk behind the line that made us hang up is not given."""
        ours, theirs = connected(Recorder()), connected(Reference())
        for receiver in (ours, theirs):
            receiver.dataReceived(b"a\nq\nb\nc\n")
        self.assertEqual(theirs.came, [b"a", b"q"])
        self.assertEqual(ours.came, theirs.came)

    def test_many_pieces_and_many_lines(self) -> None:
        """A line in 20 000 pieces, and 100 000 lines in one chunk, come as they are."""
        receiver = connected(Recorder())
        receiver.MAX_LENGTH = 10**6
        for _ in range(20_000):
            receiver.dataReceived(b"0123456789")
        receiver.dataReceived(b"\n" + b"x\n" * 100_000)
        self.assertEqual(receiver.came, [b"0123456789" * 20_000] + [b"x"] * 100_000)

    def test_sending(self) -> None:
        """A line is sent with a line feed alone behind it."""
        receiver = connected(Recorder())
        receiver.sendLine(b"a")
        self.assertEqual(receiver.transport.value(), b"a\n")


class KernelSocket:
    """
    A socket whose kernel takes as much as the test says.

    Attributes:
        room: How many bytes it takes before it is full.
        taken: What it took.
    """

    def __init__(self) -> None:
        self.room = 1000
        self.taken = b""

    def send(self, data: bytes) -> int:
        if not self.room:
            raise BlockingIOError
        sent = data[: self.room]
        self.room -= len(sent)
        self.taken += sent
        return len(sent)


class PatientTransport:
    """What Twisted's transport does with what is to be written: keep it."""

    def __init__(self) -> None:
        self._tempDataBuffer: list[bytes] = []
        self._tempDataLen = 0
        self.dataBuffer = b""
        self.connected = True
        self.socket = KernelSocket()

    def write(self, data: bytes) -> None:
        self._tempDataBuffer.append(data)
        self._tempDataLen += len(data)

    def connectionLost(self, reason: Failure) -> None:
        self.connected = False


class EagerTransport(EagerWrites, PatientTransport):
    """The eager one."""


class EagerWritesTests(SynchronousTestCase):
    """What is sent at once, and what has to wait."""

    def setUp(self) -> None:
        """Make a transport whose kernel has room."""
        self.transport = EagerTransport()
        self.socket = self.transport.socket

    def test_at_once(self) -> None:
        """What the kernel takes is sent at once, and nothing waits."""
        self.transport.write(b"hello")
        self.assertEqual(self.socket.taken, b"hello")
        self.assertEqual((self.transport.has_unsent, self.transport.unsent_bytes), (False, 0))

    def test_what_the_kernel_does_not_take(self) -> None:
        """What the kernel does not take waits, and is counted."""
        self.socket.room = 3
        self.transport.write(b"hello")
        self.assertEqual((self.socket.taken, self.transport.unsent_bytes), (b"hel", 2))
        self.assertTrue(self.transport.has_unsent)

    def test_a_full_kernel(self) -> None:
        """Where the kernel takes nothing all of it waits, and nothing is raised."""
        self.socket.room = 0
        self.transport.write(b"hello")
        self.assertEqual((self.socket.taken, self.transport.unsent_bytes), (b"", 5))

    def test_the_order_is_kept(self) -> None:
        """Nothing passes what waits, in either of the places where Twisted lets it wait."""
        self.socket.room = 0
        self.transport.write(b"first")
        self.socket.room = 1000
        self.transport.write(b"second")
        self.assertEqual((self.socket.taken, self.transport.unsent_bytes), (b"", 11))
        self.transport.dataBuffer = b"".join(self.transport._tempDataBuffer)
        self.transport._tempDataBuffer, self.transport._tempDataLen = [], 0
        self.transport.write(b"third")
        self.assertEqual((self.socket.taken, self.transport.unsent_bytes), (b"", 16))
        self.assertTrue(self.transport.has_unsent)

    def test_what_nobody_will_read(self) -> None:
        """What waits when the connection has gone is let go of."""
        self.socket.room = 0
        self.transport.write(b"hello")
        self.transport.dataBuffer = b"before"
        self.transport.connectionLost(Failure(ConnectionDone()))
        self.assertEqual((self.transport.has_unsent, self.transport.unsent_bytes), (False, 0))
        self.assertFalse(self.transport.connected)

    def test_a_connection_that_is_gone(self) -> None:
        """On a connection that is gone nothing is sent."""
        self.transport.connected = False
        self.transport.write(b"hello")
        self.assertEqual(self.socket.taken, b"")


class OneConnectionTests(SynchronousTestCase):
    """The factory of a protocol that exists already."""

    def test_the_protocol_is_given(self) -> None:
        """The connection gets the very protocol that the factory was made for."""
        receiver = Recorder()
        self.assertIs(OneConnection(receiver).buildProtocol(None), receiver)
