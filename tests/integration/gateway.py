"""
A real gateway for a test: started by twistd beside a ``Daemon``, and surely stopped.

``Gateway`` is a ``Daemon`` as far as its life goes: its directory, its log, its processes,
its signals. What it is asked goes by HTTP (``Gateway.http``) and by WebSocket
(``Gateway.open``, which is the client of ``websockets``, as strict as any; ``RawSocket`` is
not). A test takes ``GatewayTestCase``, with ``start_gateway`` for one to itself, or
``shared_gateway`` for one that it leaves as it finds it.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.integration.case import DaemonTestCase
from tests.integration.daemon import WAIT_SECONDS, Daemon, children_of, shared_daemon, wait_until

__all__ = [
    "CLOSE",
    "CONTINUATION",
    "PING",
    "PONG",
    "TEXT",
    "Answer",
    "Gateway",
    "GatewayTestCase",
    "RawSocket",
    "WebSocket",
    "frame",
    "shared_gateway",
]

CONTINUATION: Final = 0
TEXT: Final = 1
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10
"""Kinds of WebSocket frames (RFC 6455, section 5.2)."""

_FIN: Final = 0x80
_JSON: Final = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """
    What HTTP has answered.

    Attributes:
        status: Its status.
        headers: Its headers; their names in lower case.
        body: All of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def read(cls, response: http.client.HTTPResponse) -> Answer:
        """Read one to its end."""
        body = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return cls(response.status, headers, body)

    @property
    def json(self) -> Any:
        """Give the body, which is JSON."""
        return json.loads(self.body)


class WebSocket:
    """One WebSocket, to be talked over as over a ``Connection``."""

    def __init__(self, connected: ClientConnection) -> None:
        self.connected = connected

    def send(self, data: str | bytes | Iterable[str]) -> None:
        """
        Send a message as it is: text, binary if it is bytes, or text in frames.

        If the gateway has closed meanwhile, that is for who reads next.
        """
        with contextlib.suppress(ConnectionClosed):
            self.connected.send(data)

    def request(self, function: str, args: Any = (), **members: Any) -> None:
        """Send one request; *members* are ``id``, ``timeout``, ``priority`` and so on."""
        self.send(json.dumps({"function": function, "args": args, **members}))

    def reply(self) -> Any:
        """Wait for the next message."""
        return json.loads(self.connected.recv(WAIT_SECONDS))

    def ask(self, function: str, args: Any = (), **members: Any) -> Any:
        """Send one request and wait for the next reply."""
        self.request(function, args, **members)
        return self.reply()

    def replies_by_id(self, count: int) -> dict[Any, Any]:
        """Wait for that many replies, and give them by their ids."""
        replies = [self.reply() for _ in range(count)]
        return {reply["id"]: reply for reply in replies}

    def rest(self) -> tuple[list[Any], int | None]:
        """Read until it is closed: what came, and the code it was closed with, or None."""
        messages = []
        try:
            while True:
                messages.append(self.reply())
        except ConnectionClosed as closed:
            return messages, closed.rcvd.code if closed.rcvd is not None else None

    def close(self) -> None:
        """Close it in order."""
        self.connected.close()


class RawSocket:
    """
    A TCP connection that speaks as much HTTP and WebSocket as a test has it speak.

    Args:
        port: The gateway's.
        context: For TLS; None: it is plain.
        receive_bytes: The kernel's buffer for what is not read; 0: as it is.
    """

    def __init__(
        self, port: int, context: ssl.SSLContext | None = None, *, receive_bytes: int = 0
    ) -> None:
        self._port = port
        sock = socket.socket()
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(WAIT_SECONDS)
        sock.connect(("127.0.0.1", port))
        self.socket = sock if context is None else context.wrap_socket(sock)
        self._file = self.socket.makefile("rb")

    def send(self, data: str | bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def request(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        """Send a request of HTTP; Host is the gateway's unless *headers* name another."""
        fields = {"Host": f"127.0.0.1:{self._port}", **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)

    def answer(self, method: str = "GET") -> Answer:
        """Wait for the answer, and read it to its end, but nothing behind it."""
        status = int(self._file.readline().split()[1])
        message = http.client.parse_headers(self._file)
        headers = {name.lower(): value for name, value in message.items()}
        length = int(headers.get("content-length", 0))
        has_body = method != "HEAD" and status != http.HTTPStatus.SWITCHING_PROTOCOLS
        return Answer(status, headers, self._file.read(length) if has_body else b"")

    def upgrade(self, path: str = "/ws", headers: Mapping[str, str] | None = None) -> Answer:
        """Ask for a WebSocket as a page of the gateway's own does, and wait for the answer."""
        fields = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Origin": f"http://127.0.0.1:{self._port}",
        }
        self.request("GET", path, {**fields, **(headers or {})})
        return self.answer()

    def send_frame(
        self, kind: int, data: bytes = b"", *, ends: bool = True, is_masked: bool = True
    ) -> None:
        """Send one frame; *ends*: its message is whole then."""
        self.send(frame(kind, data, ends=ends, is_masked=is_masked))

    def ask(self, function: str, args: Any = (), **members: Any) -> None:
        """Send one request in a frame."""
        request = {"function": function, "args": args, **members}
        self.send_frame(TEXT, json.dumps(request).encode())

    def read_frame(self) -> tuple[int, bytes]:
        """
        Wait for a frame: its kind, and what it holds.

        Raises:
            EOFError: The gateway hung up instead.
        """
        head = self._read(2)
        length = head[1]
        if length == 126:
            (length,) = struct.unpack("!H", self._read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self._read(8))
        return head[0] & 0x0F, self._read(length)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError("the gateway hung up")
        return data

    def close_code(self) -> int | None:
        """Read until a close frame comes, and give its code; None: it is hung up on without."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                kind, data = self.read_frame()
                if kind == CLOSE:
                    return int.from_bytes(data[:2], "big")
        return None

    def is_hung_up(self) -> bool:
        """Read until the gateway hangs up, orderly or not."""
        with contextlib.suppress(ConnectionError):
            while self._file.read(65536):
                pass
        return True

    def close(self) -> None:
        """Close it."""
        self._file.close()
        self.socket.close()


def frame(kind: int, data: bytes = b"", *, ends: bool = True, is_masked: bool = True) -> bytes:
    """Write a frame as a browser does; its mask is zero, which changes nothing."""
    mark = _FIN if is_masked else 0
    if len(data) < 126:
        length = bytes([mark | len(data)])
    elif len(data) < 65536:
        length = bytes([mark | 126]) + struct.pack("!H", len(data))
    else:
        length = bytes([mark | 127]) + struct.pack("!Q", len(data))
    head = bytes([kind | (_FIN if ends else 0)]) + length
    return head + (bytes(4) if is_masked else b"") + data


class Gateway(Daemon):
    """
    One gateway, in a directory of its own.

    Args:
        daemons: The daemons that it calls, or their endpoints; none: the option is left out.
        options: Further words for ``twistd taskd-gateway``.
        procs: How many processes it has.
        port: Where it listens; 0 lets the kernel choose.
        context: What its callers speak TLS by; None: it speaks none.
        more: ``files``, ``secrets`` and ``environ``, as a ``Daemon`` takes them.
    """

    def __init__(
        self,
        daemons: Daemon | str | list[Daemon | str],
        *options: str,
        procs: int = 1,
        port: int = 0,
        context: ssl.SSLContext | None = None,
        **more: Any,
    ) -> None:
        places = [
            f"--tasks={place if isinstance(place, str) else f'tcp:127.0.0.1:{place.port}'}"
            for place in (daemons if isinstance(daemons, list) else [daemons])
        ]
        super().__init__(*places, *options, procs=procs, port=port, tasks=None, **more)
        self._command[self._command.index("taskd")] = "taskd-gateway"
        self._context = context

    def _has_said_its_port(self, process: Any) -> bool:
        status = process.poll()
        if status is not None:
            raise AssertionError(f"the gateway ended with status {status}")
        said = re.search(r"listening on \S+ port (\d+)", self.log)
        if said is not None:
            self.port = int(said[1])
        return said is not None

    def _workers_if_whole(self) -> dict[int, int]:
        serving = self.serving()
        return serving if len(serving) == self.procs == len(children_of(self.pid)) else {}

    def serving(self) -> dict[int, int]:
        """Give the pids of the processes, by their numbers; of one that still drains its heir's."""
        titles = {
            child.pid: re.fullmatch(r"taskd-gateway: process (\d+)", child.title)
            for child in children_of(self.pid)
        }
        return {int(title[1]): pid for pid, title in titles.items() if title is not None}

    workers = serving

    def process_of(self, local: socket.socket) -> int | None:
        """Tell which process has the other end of a connection; None: it is gone."""
        local_port = local.getsockname()[1]
        for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            ends = [int(place.rpartition(":")[2], 16) for place in fields[1:3]]
            if ends == [self.port, local_port]:
                pids = [process.pid for process in self.processes()]
                return _holder_of(f"socket:[{fields[9]}]", pids)
        return None

    # What it is asked.

    @property
    def origin(self) -> str:
        """Give the origin of its own pages."""
        return f"http{'s' if self._context else ''}://127.0.0.1:{self.port}"

    def open(self, path: str = "/ws", *, origin: str | None = "", **more: Any) -> WebSocket:
        """
        Open a WebSocket.

        Args:
            path: Where.
            origin: What it says that its page's origin is; '': the gateway's own.
            more: ``headers``, and whatever ``websockets`` takes.

        Raises:
            InvalidStatus: The gateway does not let it in.
        """
        return WebSocket(
            connect(
                f"ws{self.origin.removeprefix('http')}{path}",
                origin=self.origin if origin == "" else origin,  # type: ignore[arg-type]
                additional_headers=more.pop("headers", None),
                ssl=self._context,
                proxy=None,
                max_size=None,
                ping_interval=None,
                open_timeout=WAIT_SECONDS,
                legacy=True,  # which gives it at once, and not for the time of a block
                **more,
            )
        )

    @contextlib.contextmanager
    def http_connection(self) -> Iterator[http.client.HTTPConnection]:
        """Open a connection for HTTP, for the time of a block."""
        if self._context is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, WAIT_SECONDS)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=WAIT_SECONDS, context=self._context
            )
        with contextlib.closing(connection):
            yield connection

    def http(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask by HTTP, over a connection of its own."""
        with self.http_connection() as connection:
            connection.request(method, path, body, dict(headers or {}))
            return Answer.read(connection.getresponse())

    def get(self, path: str, **headers: str) -> Answer:
        """Ask for a page."""
        return self.http("GET", path, headers=headers)

    def call(
        self, function: str, args: Any = (), query: str = "", headers: Mapping[str, str] = _JSON
    ) -> Answer:
        """Call a function by HTTP."""
        path = f"/call/{function}{query}"
        return self.http("POST", path, json.dumps(args).encode(), {**_JSON, **headers})

    def metrics(self, **headers: str) -> dict[str, float]:
        """Give all samples of /metrics, by their names, with labels as Prometheus writes them."""
        answer = self.get("/metrics", **headers)
        if answer.status != http.HTTPStatus.OK:
            raise AssertionError(f"/metrics has answered {answer}")
        return {
            sample.name + _labels_text(sample.labels): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }

    def wait_for_figure(self, name: str, value: float) -> None:
        """Wait until one of its own figures in /metrics has come to a value."""
        wait_until(
            lambda: self.metrics().get(f"taskd_gateway_{name}") == value,
            what=f"taskd_gateway_{name} {value}",
        )


def _holder_of(file: str, pids: list[int]) -> int | None:
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # it has ended
            if any(_leads_to(link, file) for link in list(Path(f"/proc/{pid}/fd").iterdir())):
                return pid
    return None


def _leads_to(link: Path, file: str) -> bool:
    try:
        return os.readlink(link) == file
    except FileNotFoundError:  # closed meanwhile
        return False


def _labels_text(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inner}}}" if inner else ""


class GatewayTestCase(DaemonTestCase):
    """Base of tests of gateways; ``wait_for_log`` and the like take a gateway, too."""

    def start_gateway(
        self, daemons: Daemon | str | list[Daemon | str], *options: str, **more: Any
    ) -> Gateway:
        """Start a gateway, which ends with the test."""
        gateway = Gateway(daemons, *options, **more)
        self.addCleanup(gateway.stop)
        gateway.start()
        return gateway

    def open(self, gateway: Gateway, path: str = "/ws", **more: Any) -> WebSocket:
        """Open a WebSocket, which is closed when the test is over."""
        opened = gateway.open(path, **more)
        self.addCleanup(opened.close)
        return opened

    def raw(self, gateway: Gateway, **more: Any) -> RawSocket:
        """Connect, and say nothing."""
        raw = RawSocket(gateway.port, **more)
        self.addCleanup(raw.close)
        return raw

    def raw_socket(
        self, gateway: Gateway, path: str = "/ws", *, receive_bytes: int = 0
    ) -> RawSocket:
        """Open a WebSocket whose frames are the test's own."""
        raw = self.raw(gateway, receive_bytes=receive_bytes)
        self.assertEqual(raw.upgrade(path).status, http.HTTPStatus.SWITCHING_PROTOCOLS)
        return raw


_shared: dict[tuple[Any, ...], tuple[Daemon, Gateway]] = {}


def shared_gateway(*options: str, procs: int = 1) -> tuple[Daemon, Gateway]:
    """
    Give a gateway that tests share, and the shared daemon of two workers behind it.

    There is one at a time, as with ``shared_daemon``.

    Args:
        options: As for ``Gateway``.
        procs: How many processes.

    Returns:
        The daemon, and the gateway, both ready.
    """
    daemon = shared_daemon(procs=2)
    key = (daemon.port, options, procs)
    if key not in _shared:
        stop_shared_gateways()
        _shared[key] = daemon, Gateway(daemon, *options, procs=procs).start()
    return _shared[key]


def stop_shared_gateways() -> None:
    """Stop the shared gateway, if there is one."""
    while _shared:
        _shared.popitem()[1][1].stop()


atexit.register(stop_shared_gateways)
