"""
Doubles of the machine: time, threads' way back, connections and scoreboards in memory.

What taskd itself does is never doubled here; only what lies around it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Final

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import formatEvent, globalLogPublisher
from twisted.python.failure import Failure
from twisted.test.iosim import FakeTransport, IOPump, connect
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from taskd.access import Access
from taskd.call import Call
from taskd.client import TaskClientProtocol
from taskd.executor import Executor
from taskd.functions import Registry, task
from taskd.ledger import Ledger
from taskd.scoreboard import Scoreboard
from taskd.server import TaskProtocol, TaskServerFactory
from taskd.session import session_functions
from taskd.settings import Settings
from taskd.slots import Slot

__all__ = [
    "PATIENCE",
    "FakePool",
    "Loop",
    "MemoryDaemon",
    "MemoryEndpoint",
    "MemoryTransport",
    "ScriptedDaemon",
    "ScriptedEndpoint",
    "WatchedMemory",
    "counts_of",
    "line_of",
    "log_of",
    "new_ledger",
    "new_slot",
    "registry_of",
    "temporary_directory",
]

PATIENCE: Final = 20.0
"""Seconds after which a thread that should have done something is given up."""


class Loop(Clock):
    """A reactor where time passes, and calls from threads run, when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.rightNow = 1000.0  # no machine's clock stands at zero
        self._from_threads: SimpleQueue[Callable[[], object]] = SimpleQueue()

    @property
    def calls_waiting(self) -> int:
        """How many calls from threads have not been run."""
        return self._from_threads.qsize()

    def callFromThread(self, f: Callable[..., object], /, *args: object) -> None:
        self._from_threads.put(lambda: f(*args))

    def run_next(self) -> None:
        """Wait until a thread has called, and run what it called."""
        self._from_threads.get(timeout=PATIENCE)()

    def run_until(self, condition: Callable[[], object]) -> None:
        """Run what threads call until something is so."""
        while not condition():
            self.run_next()

    def run_waiting(self) -> None:
        """Run what threads have called so far."""
        while self.calls_waiting:
            self.run_next()


def new_slot() -> Slot:
    """Give a worker's slot on a scoreboard of its own."""
    fd = Scoreboard.create(1)
    try:
        return Scoreboard(fd).slot(1)
    finally:
        os.close(fd)


class WatchedMemory:
    """
    Shared memory whose other readers look at it after each byte, or word, that is written.

    Args:
        memory: What it is.
        look: Looks.
    """

    def __init__(self, memory: memoryview, look: Callable[[], object]) -> None:
        self._memory = memory
        self._look = look

    def __getitem__(self, key: Any) -> Any:
        value = self._memory[key]
        return WatchedMemory(value, self._look) if isinstance(key, slice) else value

    def __setitem__(self, key: Any, value: Any) -> None:
        written = self._memory[key]
        if isinstance(key, slice):
            for place, byte in enumerate(value):
                written[place] = byte
                self._look()
        else:
            self._memory[key] = value
            self._look()

    def __eq__(self, other: object) -> bool:
        return self._memory == other

    __hash__ = None  # type: ignore[assignment]

    def cast(self, kind: str) -> Any:
        return WatchedMemory(self._memory.cast(kind), self._look)  # type: ignore[call-overload]


def new_ledger(*, debug: bool = False) -> Ledger:
    """Give the books of a worker on a scoreboard that nobody reads."""
    fd = Scoreboard.create(1)
    try:
        board = Scoreboard(fd)
    finally:
        os.close(fd)
    return Ledger(board.tally(1), board.failures(1), 1, debug=debug)


def counts_of(slot: Slot) -> dict[str, int]:
    """Give what a slot counts of its tasks."""
    status = slot.status(0.0)
    return {name: status[name] for name in ("in_flight", "done", "failed")}


def line_of(function: str, *args: Any, **members: Any) -> bytes:
    """Write a request, its line feed included."""
    return json.dumps({"function": function, "args": args, **members}).encode() + b"\n"


def registry_of(*functions: Callable[..., Any]) -> Registry:
    """Register functions as a task module would offer them, and the connection's own."""
    module = ModuleType("tasks")
    for function in functions:
        marked = function if hasattr(function, "__taskd_options__") else task(function)
        setattr(module, function.__name__, marked)
    registry = Registry(session_functions())
    registry.add_module(module)
    return registry


def log_of(case: SynchronousTestCase, room: str) -> list[str]:
    """Give what one module logs from now on, each line with its level before it."""
    lines: list[str] = []

    def observe(event: Any) -> None:
        if event["log_namespace"].startswith(f"taskd.{room}."):
            lines.append(f"{event['log_level'].name}: {formatEvent(event)}")

    globalLogPublisher.addObserver(observe)
    case.addCleanup(globalLogPublisher.removeObserver, observe)
    return lines


def write_secret(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file with that mode."""
    path.write_text(text)
    path.chmod(mode)


def temporary_directory(case: SynchronousTestCase) -> Path:
    """Make a directory that goes with the test."""
    directory = tempfile.TemporaryDirectory()
    case.addCleanup(directory.cleanup)
    return Path(directory.name)


class MemoryTransport(StringTransport):
    """
    A connection's socket.

    Attributes:
        protocol: What is told of the connection's halves.
        writes: What was written, an item for each write.
        is_half_closed: True once this side is to be shut for sending.
        is_slow: True: what was written is under way until ``arrive``.
        unsent_bytes: How much of it the peer has left unread, in the kernel as well.
        on_sent: Called by who has all of it sent: the test.
    """

    def __init__(self, protocol: Any = None) -> None:
        super().__init__()
        self.protocol = protocol
        self.writes: list[bytes] = []
        self.is_half_closed = False
        self.is_slow = False
        self.unsent_bytes = 0
        self.on_sent: Callable[[], None] | None = None

    def write(self, data: bytes) -> bool:
        super().write(data)
        self.writes.append(data)
        return not self.unsent_bytes

    @property
    def unread_bytes(self) -> int:
        return self.unsent_bytes

    def loseWriteConnection(self) -> None:
        self.is_half_closed = True
        if not self.is_slow:
            self.arrive()

    def arrive(self) -> None:
        """Have sent what was written, and the end of it."""
        IHalfCloseableProtocol(self.protocol).writeConnectionLost()

    @property
    def is_read(self) -> bool:
        """Whether what the peer sends is read."""
        return self.producerState == "producing"

    def give_away(self, take: Callable[[Any], bool]) -> bool:
        """Part with the connection, as ``EagerServer`` does."""
        if self.unsent_bytes or self.disconnecting or not take(self):
            return False
        self.protocol.connectionLost(Failure(ConnectionDone()))
        return True

    @property
    def messages(self) -> list[Any]:
        """What was written, as JSON values."""
        return [json.loads(line) for line in self.value().splitlines()]


class FakePool:
    """
    The other workers, played by the test.

    Attributes:
        taken: The calls that they were given.
        told: What else they were told.
        waiting: How many tasks of all wait.
        idlers: How many they could start now; each that they are given is one less.
        answer: What ends each call at once, or None: the test ends it.
    """

    def __init__(self) -> None:
        self.taken: list[Call] = []
        self.told: list[str] = []
        self.waiting = 0
        self.idlers = 0
        self.answer: bytes | None = None

    def take(self, calls: list[Call]) -> None:
        self.taken += calls
        self.idlers = max(0, self.idlers - len(calls))
        if self.answer is not None:
            for call in calls:
                call.end(self.answer)

    def waits(self) -> int:
        return self.waiting

    def idle(self) -> int:
        return self.idlers

    def ask(self) -> None:
        self.told.append("ask")

    def filled(self) -> None:
        self.told.append("filled")

    def freed(self) -> None:
        self.told.append("freed")

    def stuck(self) -> None:
        self.told.append("stuck")


# A daemon that is real from its connections down to its threads.


ANYBODY = Access((), ())
"""Nobody is asked who they are, and everything may be called."""


class MemoryDaemon:
    """
    One worker's server, on a loop that the test runs.

    Args:
        functions: What may be called.
        max_line_bytes: Longest request line.
        threads: How many blocking tasks run at a time.
        debug: True: callers are told tracebacks.
        access: Who may call what; by default everybody everything.
        ledger: Where it is counted what calls come to; None: where nobody looks.
        settings: Others of the operator's settings.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        max_line_bytes: int = 1024 * 1024,
        threads: int = 1,
        debug: bool = False,
        access: Access = ANYBODY,
        ledger: Ledger | None = None,
        **settings: Any,
    ) -> None:
        self.loop = Loop()
        self.slot = new_slot()
        self.executor = Executor(
            self.loop,
            self.slot,
            ledger or new_ledger(debug=debug),
            threads=threads,
            clock=self.loop.seconds,
        )
        self.registry = registry_of(*functions)
        self.factory = TaskServerFactory(
            self.loop,
            self.registry,
            self.executor,
            self.slot,
            Settings(0, max_line_bytes=max_line_bytes, **settings),
            access,
            open_everywhere=lambda: self.slot.status(0.0)["connections"],
            clock=self.loop.seconds,
        )
        self._pumps: list[IOPump] = []

    def connect(self) -> tuple[TaskProtocol, MemoryTransport]:
        """Open a connection whose other end is the test."""
        protocol = self.factory.buildProtocol(None)
        transport = MemoryTransport(protocol)
        protocol.makeConnection(transport)
        protocol.accepted()
        return protocol, transport

    def join(self, client: Any) -> IOPump:
        """Open a connection whose other end is a client's protocol."""
        server = self.factory.buildProtocol(None)
        pump = connect(
            server,
            _ClosingTransport(server, isServer=True),
            client,
            _ClosingTransport(client, isServer=False),
            clock=self.loop,
        )
        server.accepted()
        self._pumps.append(pump)
        return pump

    def flush(self) -> None:
        """Carry what has been written to its other end, until nothing moves."""
        while sum(pump.flush() for pump in self._pumps):
            pass


class _ClosingTransport(FakeTransport):
    """One end of a connection that closes as a whole."""

    def loseWriteConnection(self) -> None:
        self.loseConnection()


# A daemon of which the test plays every part.


class ScriptedDaemon:
    """
    The far end of one client connection.

    Args:
        client: The connection.
    """

    def __init__(self, client: TaskClientProtocol) -> None:
        self.client = client
        self.transport = MemoryTransport()
        client.makeConnection(self.transport)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request so far."""
        return self.transport.messages

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.client.dataReceived(json.dumps(message).encode() + b"\n")

    def hang_up(self, reason: Exception | None = None) -> None:
        """End the connection."""
        self.client.connectionLost(Failure(reason or ConnectionDone()))


@implementer(IStreamClientEndpoint)
class ScriptedEndpoint:
    """
    Where a client connects to, as far as the test lets it.

    Attributes:
        attempts: The Deferreds of all attempts.
    """

    def __init__(self) -> None:
        self.attempts: list[Deferred[Any]] = []
        self._factories: list[Any] = []

    @property
    def open_attempts(self) -> list[int]:
        """The numbers of the attempts that have not ended."""
        return [n for n, attempt in enumerate(self.attempts) if not attempt.called]

    def connect(self, factory: Any) -> Deferred[Any]:
        self.attempts.append(Deferred())
        self._factories.append(factory)
        return self.attempts[-1]

    def accept(self, number: int = -1) -> ScriptedDaemon:
        """Let an attempt succeed, by default the latest."""
        daemon = ScriptedDaemon(self._factories[number].buildProtocol(None))
        self.attempts[number].callback(daemon.client)
        return daemon

    def refuse(self, reason: Exception, number: int = -1) -> None:
        """Let an attempt fail, by default the latest."""
        self.attempts[number].errback(reason)


@implementer(IStreamClientEndpoint)
class MemoryEndpoint:
    """
    Connects to a daemon in memory, at once.

    Args:
        daemon: The daemon.
    """

    def __init__(self, daemon: MemoryDaemon) -> None:
        self._daemon = daemon

    def connect(self, factory: Any) -> Deferred[Any]:
        client = factory.buildProtocol(None)
        self._daemon.join(client)
        return succeed(client)
