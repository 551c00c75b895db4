"""The section about the gateway: many WebSockets that stay, and what one's round trip costs."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench import QUIET_SHARE, Bench
from errors import BenchmarkError
from generator import Measurement
from machine import CpuUse, foreign_share, generations
from report import Row, at_least, at_most
from servers import POLL_SECONDS, READY_SECONDS, Server, TaskdServer

__all__ = ["gateway"]

SOCKETS = 5000
OPENING_AT_A_TIME = 64
PHASE_SECONDS = 60.0
PING_SECONDS = 5.0
"""Each is pinged within so long, and dropped when it does not answer within so long again."""

NO_PING_SECONDS = 3600.0
SETTLE_SECONDS = 0.5
LIMIT_KB = 20.0

TURNS_A_ROUND = 4
TURN_SECONDS = 0.5
SPARE_SECONDS = 10.0
DEEP = 64
LIMIT_RATIO = 2.5
SATURATED_CPU_SHARE = 0.9
FUNCTIONS = ("echo", "echo_thread")
ARGUMENTS = "[1,2]"

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
MASK = b"\x37\xfa\x21\x3d"


class GatewayServer(Server):
    """
    The gateway, with one process, as an operator runs it; programs are kept to no rate.

    Args:
        directory: As for every server.
        tasks_port: Where the daemon listens on 127.0.0.1.
        ping_seconds: Between signs of life.
    """

    name = "gateway"

    def __init__(self, directory: Path, tasks_port: int, ping_seconds: float) -> None:
        super().__init__(directory)
        self.tasks_port = tasks_port
        self.ping_seconds = ping_seconds

    @property
    def command(self) -> list[str]:
        """The command line."""
        twistd = Path(sys.executable).with_name("twistd")
        options = {
            "port": self.port,
            "tasks": f"tcp:127.0.0.1:{self.tasks_port}",
            "allow": ",".join(FUNCTIONS),
            "max-rate": 1_000_000,
            "ping": self.ping_seconds,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return [str(twistd), "--nodaemon", "--pidfile=", "taskd-gateway", *words, "--no-dashboard"]

    @property
    def process(self) -> int:
        """The process that serves; its parent only watches over it."""
        return generations(self.pid)[1][0].pid

    def _wait_until_ready(self, started: float) -> None:
        request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        while time.monotonic() < started + READY_SECONDS:
            if self._process.poll() is not None:
                raise BenchmarkError(self._complaint("ended before it was ready"))
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1.0) as connection,
            ):
                connection.sendall(request)
                if connection.recv(4096).startswith(b"HTTP/1.1 200"):
                    self.answered_after = self.ready_after = time.monotonic() - started
                    return
            time.sleep(POLL_SECONDS)
        raise BenchmarkError(self._complaint(f"was not ready within {READY_SECONDS:.0f} s"))


def gateway(bench: Bench) -> Iterator[Row]:
    """Hold many WebSockets open, then compare one's round trips with those of a plain line."""
    with TaskdServer(bench.directory, 2) as daemon:
        with GatewayServer(bench.directory, daemon.port, NO_PING_SECONDS):
            pass  # it compiles what is not compiled yet, which would leave room in the heap
        crowds = [_hold(bench, daemon) for _ in range(bench.rounds)]
        yield _alive_row(crowds)
        yield _memory_row(crowds)
        server = GatewayServer(bench.directory, daemon.port, NO_PING_SECONDS)
        with server:
            found = _take_turns(bench, daemon, server)
    for function in FUNCTIONS:
        yield _latency_row(function, found)


# Many that stay.


@dataclass(frozen=True)
class _Crowd:
    """What many WebSockets came to; memory in kB of 1000 bytes for each, seconds for all."""

    opening_seconds: float
    asking_seconds: float
    rss_kb: float
    pss_kb: float
    pings: int
    pinged: int
    idle_cpu_share: float
    alive: int


def _hold(bench: Bench, daemon: Server) -> _Crowd:
    server = GatewayServer(bench.directory, daemon.port, PING_SECONDS)
    with server, _Browsers(server.port) as browsers:
        pid = server.process
        browsers.open(1)  # what is made when the first one comes is not the others'
        browsers.ask_all()
        before = _memory_kb(pid)
        began = time.monotonic()
        browsers.open(SOCKETS)
        opened = time.monotonic()
        browsers.ask_all()
        answered = time.monotonic()
        browsers.attend(SETTLE_SECONDS)
        after = _memory_kb(pid)
        browsers.pings = 0
        cpu = _cpu_seconds(pid)
        idled = time.monotonic()
        browsers.attend(2 * PING_SECONDS)  # pinged within the first, dropped within the second
        share = (_cpu_seconds(pid) - cpu) / (time.monotonic() - idled)
        pings = browsers.pings
        return _Crowd(
            opening_seconds=opened - began,
            asking_seconds=answered - opened,
            rss_kb=(after["Rss"] - before["Rss"]) / SOCKETS,
            pss_kb=(after["Pss"] - before["Pss"]) / SOCKETS,
            pings=pings,
            pinged=browsers.pinged,
            idle_cpu_share=share,
            alive=browsers.ask_all() - 1,
        )


def _memory_kb(pid: int) -> dict[str, float]:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"(?m)^(Rss|Pss): +(\d+) kB$", text)
    return {name: int(value) * 1024 / 1000 for name, value in found}


def _cpu_seconds(pid: int) -> float:
    """Tell what all threads of a process have run so far, to the nanosecond."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(text.split()[0]) for text in stats) / 1e9


def _frame(opcode: int, payload: bytes) -> bytes:
    """Make a client's frame of up to 125 bytes."""
    masked = bytes(byte ^ MASK[place % 4] for place, byte in enumerate(payload))
    return struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload)) + MASK + masked


class _Browser:
    """One WebSocket."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unread = b""
        self.is_open = False
        self.is_answered = False
        self.was_pinged = False


class _Browsers:
    """
    Many WebSockets, attended to by one thread.

    Args:
        port: Where the gateway listens on 127.0.0.1.

    Attributes:
        pings: How many were answered.
    """

    _QUESTION = _frame(TEXT, b'{"id":1,"function":"echo","args":%b}' % ARGUMENTS.encode())
    _ANSWER = b'{"id":1,"result":%b}' % ARGUMENTS.encode()

    def __init__(self, port: int) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._port = port
        self._handshake = (
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        self._epoll = select.epoll()
        self._browsers: dict[int, _Browser] = {}
        self._done = 0
        self.pings = 0

    def __enter__(self) -> _Browsers:
        return self

    def __exit__(self, *_: object) -> None:
        for browser in self._browsers.values():
            # By a reset, so that no port is kept for a minute.
            linger = struct.pack("ii", 1, 0)
            browser.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            browser.connection.close()
        self._epoll.close()

    @property
    def pinged(self) -> int:
        """How many of those that are left were pinged."""
        return sum(browser.was_pinged for browser in self._browsers.values())

    def open(self, count: int) -> None:
        """
        Open more, some at a time.

        Raises:
            BenchmarkError: Not all are open in time, or some were closed.
        """
        deadline = time.monotonic() + PHASE_SECONDS
        left = len(self._browsers)
        self._done = 0
        for number in range(count):
            while number - self._done >= OPENING_AT_A_TIME:
                self._attend_once(deadline)
            connection = socket.create_connection(("127.0.0.1", self._port), PHASE_SECONDS)
            connection.setblocking(False)
            connection.send(self._handshake)
            self._browsers[connection.fileno()] = _Browser(connection)
            self._epoll.register(connection, select.EPOLLIN)
        while self._done < count:
            self._attend_once(deadline)
        if len(self._browsers) < left + count:
            raise BenchmarkError(f"{left + count - len(self._browsers)} WebSockets were lost")

    def ask_all(self) -> int:
        """Have each that is left answer once, some at a time; tell how many have."""
        deadline = time.monotonic() + PHASE_SECONDS
        self._done = 0
        asked = list(self._browsers.values())
        for number, browser in enumerate(asked):
            browser.is_answered = False
            while number - self._done >= OPENING_AT_A_TIME:
                self._attend_once(deadline)
            self._send(browser, self._QUESTION)
        while self._done < len(asked):
            self._attend_once(deadline)
        return sum(browser.is_answered for browser in asked)

    def attend(self, seconds: float) -> None:
        """Answer pings for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for fd, _ in self._epoll.poll(left):
                self._read(self._browsers[fd])

    def _attend_once(self, deadline: float) -> None:
        events = self._epoll.poll(max(0.0, deadline - time.monotonic()))
        if not events:
            raise BenchmarkError(f"{self._done} of the WebSockets are done in {PHASE_SECONDS:g} s")
        for fd, _ in events:
            self._read(self._browsers[fd])

    def _send(self, browser: _Browser, data: bytes) -> None:
        try:
            browser.connection.send(data)
        except OSError:
            self._lose(browser)

    def _lose(self, browser: _Browser) -> None:
        """Count one that has gone as done: whoever waits for it waits no longer."""
        fd = browser.connection.fileno()
        if self._browsers.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            browser.connection.close()
            self._done += 1

    def _read(self, browser: _Browser) -> None:
        try:
            data = browser.connection.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._lose(browser)
            return
        data = browser.unread + data
        if not browser.is_open:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                browser.unread = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                raise BenchmarkError(f"no WebSocket: {head[:60]!r}")
            browser.is_open = True
            self._done += 1
        while len(data) >= 2 and len(data) >= 2 + data[1]:
            opcode, payload, data = data[0] & 15, data[2 : 2 + data[1]], data[2 + data[1] :]
            self._take(browser, opcode, payload)
        browser.unread = data

    def _take(self, browser: _Browser, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.pings += 1
            browser.was_pinged = True
            self._send(browser, _frame(PONG, payload))
        elif opcode == TEXT and payload == self._ANSWER:
            browser.is_answered = True
            self._done += 1
        else:
            raise BenchmarkError(f"the gateway sends {payload[:60]!r} (opcode {opcode})")


def _alive_row(crowds: Sequence[_Crowd]) -> Row:
    opening = median(crowd.opening_seconds for crowd in crowds)
    share = median(crowd.idle_cpu_share for crowd in crowds)
    pings = median(crowd.pings for crowd in crowds) / (2 * PING_SECONDS)
    unpinged = SOCKETS + 1 - min(crowd.pinged for crowd in crowds)
    return Row(
        section="gateway",
        name=f"{SOCKETS} WebSockets, alive",
        unit="",
        samples=[crowd.alive for crowd in crowds],
        target=at_least(SOCKETS),
        detail=f"opened in {opening:.1f} s ({opening / SOCKETS * 1e6:.0f} us each), "
        f"all answered in {median(crowd.asking_seconds for crowd in crowds):.1f} s more\n"
        f"idle, pinged every {PING_SECONDS:g} s: {share:.1%} of a core, {pings:.0f} pings/s, "
        f"{share / max(1.0, pings) * 1e6:.0f} us each",
        warnings=[f"{unpinged} were not pinged"] if unpinged else [],
        raw={"crowds": [asdict(crowd) for crowd in crowds]},
    )


def _memory_row(crowds: Sequence[_Crowd]) -> Row:
    return Row(
        section="gateway",
        name="memory of each, PSS",
        unit="kB",
        samples=[crowd.pss_kb for crowd in crowds],
        target=at_most(LIMIT_KB),
        detail=f"RSS {median(crowd.rss_kb for crowd in crowds):.1f} kB each; "
        f"what the kernel keeps for a connection is not in it",
    )


# One that asks.


@dataclass(frozen=True)
class _Turn:
    """One turn: the same caller, by line and by WebSocket."""

    line: Measurement
    socket: Measurement
    gateway_cpu_us: float
    foreign_share: float


def _take_turns(
    bench: Bench, daemon: Server, server: GatewayServer
) -> dict[tuple[str, int], list[_Turn]]:
    found: dict[tuple[str, int], list[_Turn]] = {}
    for turn in range(bench.rounds * TURNS_A_ROUND):
        for depth in (1, DEEP) if turn % TURNS_A_ROUND == 0 else (1,):
            for function in FUNCTIONS:
                one = _take_turn(bench, daemon, server, function, depth, bool(turn % 2))
                found.setdefault((function, depth), []).append(one)
    return found


def _take_turn(
    bench: Bench, daemon: Server, server: GatewayServer, function: str, depth: int, flipped: bool
) -> _Turn:
    roots = {daemon.pid, server.pid}
    before = CpuUse.until_now(roots)
    if flipped:
        line = _ask(bench, daemon.port, function, depth)
    cpu = _cpu_seconds(server.process)
    asked = _ask(bench, server.port, function, depth, "-u/ws")
    cpu = _cpu_seconds(server.process) - cpu
    if not flipped:
        line = _ask(bench, daemon.port, function, depth)
    share = foreign_share(before, CpuUse.until_now(roots))
    return _Turn(line, asked, cpu / asked.requests * 1e6, share)


def _ask(bench: Bench, port: int, function: str, depth: int, *more: str) -> Measurement:
    """Run the generator's program with its option for WebSockets."""
    command = [
        str(bench.directory / "lineload"),
        f"-p{port}",
        f'-l{{"id":%ID%,"function":"{function}","args":{ARGUMENTS}}}',
        f"-e{ARGUMENTS}",
        f"-d{depth}",
        f"-t{TURN_SECONDS}",
        "-w0",
        *more,
    ]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TURN_SECONDS + SPARE_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"lineload did not end in time: {command}") from error
    if not result.stdout:
        raise BenchmarkError(f"lineload printed no result: {result.stderr.strip()}")
    measurement = Measurement(**json.loads(result.stdout))
    if measurement.requests == 0:
        raise BenchmarkError(f"no reply to {function}: {result.stdout.strip()}")
    return measurement


def _latency_row(function: str, found: dict[tuple[str, int], list[_Turn]]) -> Row:
    turns, deep = found[function, 1], found[function, DEEP]
    both = [one for turn in [*turns, *deep] for one in (turn.line, turn.socket)]
    return Row(
        section="gateway",
        name=f"{function}, round trip",
        unit="x line",
        samples=[turn.socket.p50_us / turn.line.p50_us for turn in turns],
        target=at_most(LIMIT_RATIO),
        detail=f"{median(turn.socket.p50_us for turn in turns):,.0f} us beside "
        f"{median(turn.line.p50_us for turn in turns):,.0f} us, at best "
        f"{min(turn.socket.p50_us for turn in turns):,.0f} beside "
        f"{min(turn.line.p50_us for turn in turns):,.0f}; "
        f"the gateway's CPU {median(turn.gateway_cpu_us for turn in turns):.0f} us each\n"
        f"{DEEP} in flight: {median(turn.socket.rate for turn in deep):,.0f}/s beside "
        f"{median(turn.line.rate for turn in deep):,.0f}/s; "
        f"the gateway's CPU {median(turn.gateway_cpu_us for turn in deep):.0f} us each",
        warnings=list(_warnings(turns, both)),
        errors=sum(one.errors for one in both),
        raw={"turns": [asdict(turn) for turn in turns], "deep": [asdict(turn) for turn in deep]},
    )


def _warnings(turns: Sequence[_Turn], both: Sequence[Measurement]) -> Iterator[str]:
    if max(one.cpu_share for one in both) > SATURATED_CPU_SHARE:
        yield "the generator was the bottleneck; the ratio says little"
    if (share := median(turn.foreign_share for turn in turns)) > QUIET_SHARE:
        yield f"something else used {share:.0%} of all cores, in the median turn"
