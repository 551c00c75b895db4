"""
The framing that both ends share: lines ended by a line feed, and how they leave.

No meaning here: what a line says is for the session, the client and the link.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import termios
from typing import Any, Final

from twisted.internet import tcp
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineReceiver
from twisted.protocols.policies import ProtocolWrapper
from twisted.python.failure import Failure

__all__ = [
    "EagerWrites",
    "LongLineReceiver",
    "OneConnection",
    "unsent_bytes_of",
    "write_at_once",
]


_FEW_PIECES: Final = 64
_LEAST_PIECE_BYTES: Final = 1024
"""Pieces of an unfinished line that are smaller, on average, are joined; each has its price."""


class EagerWrites:
    """
    Makes a transport of Twisted's send at once what the kernel takes.

    Twisted's own asks epoll to tell when it may write, which it may, nearly
    always: two system calls and a round of the reactor for each reply. Put it
    in front of a ``tcp.Connection``.
    """

    _tempDataBuffer: list[bytes]  # noqa: N815
    _tempDataLen: int  # noqa: N815
    dataBuffer: bytes  # noqa: N815
    connected: Any
    socket: Any

    @property
    def has_unsent(self) -> bool:
        """Tell whether something waits until the kernel takes it."""
        return bool(self._tempDataBuffer or self.dataBuffer)

    @property
    def unsent_bytes(self) -> int:
        """Tell how much waits."""
        return len(self.dataBuffer) + self._tempDataLen

    @property
    def unread_bytes(self) -> int:
        """
        Tell how much the peer's machine has not taken: what waits in the kernel counts, too.

        Source:
            tcp(7), SIOCOUTQ, which is TIOCOUTQ.
        """
        in_kernel = bytes(4)
        with contextlib.suppress(OSError, ValueError):  # the connection may be gone
            in_kernel = fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, in_kernel)
        return self.unsent_bytes + int.from_bytes(in_kernel, sys.byteorder)

    def write(self, data: bytes) -> bool:
        """
        Send now if nothing waits before it; what the kernel does not take goes Twisted's way.

        Returns:
            Whether all is sent.
        """
        if not self._tempDataBuffer and not self.dataBuffer and self.connected:
            # If it is full, or gone, the reactor will find out which.
            with contextlib.suppress(OSError):
                data = data[self.socket.send(data) :]
        if data:
            super().write(data)  # type: ignore[misc]
            return False
        return True

    def connectionLost(self, reason: Failure) -> None:
        """Let go of what nobody will read: a protocol may hold its transport for long."""
        super().connectionLost(reason)  # type: ignore[misc]
        if self.has_unsent:
            self._tempDataBuffer, self._tempDataLen, self.dataBuffer = [], 0, b""


def write_at_once(transport: Any, data: bytes) -> None:
    """
    Have a transport that Twisted has made send at once, as far as it can.

    Args:
        transport: Over a socket as it is, or of any other kind, which sends in its own time.
        data: What to send.
    """
    if isinstance(transport, tcp.Connection) and transport.connected:
        waits: Any = transport
        # After startTLS it is the same object still, and its socket no place for plain text.
        is_secure = getattr(transport, "TLS", False)
        if not (waits._tempDataBuffer or waits.dataBuffer or waits.disconnecting or is_secure):
            with contextlib.suppress(OSError):
                data = data[waits.socket.send(data) :]
    if data:
        transport.write(data)


def unsent_bytes_of(transport: Any) -> int:
    """
    Tell how much a transport has taken and not passed to the kernel.

    Args:
        transport: Of Twisted's, over TCP or TLS; of any other 0 is told.
    """
    waiting = sum(map(len, getattr(transport, "_appSendBuffer", ())))
    below: Any = transport.transport if isinstance(transport, ProtocolWrapper) else transport
    if isinstance(below, tcp.Connection):
        waits: Any = below
        waiting += len(waits.dataBuffer) + waits._tempDataLen
    return waiting


class LongLineReceiver(LineReceiver):
    """
    A ``LineReceiver`` whose cost is linear, in long lines and in many short ones.

    ``LineReceiver`` searches and copies all that it holds for each line, and
    again at each chunk of an unfinished one. Here a chunk is split once, and
    the pieces of an unfinished line wait in a list; tiny ones, which would take
    30 times the memory of what is in them, are joined now and then. Everything
    else is as in ``LineReceiver``, pausing included; there is no raw mode.

    Source:
        Twisted issues 6356 and 6357: one line of 16 MB takes 1.4 s there.
    """

    delimiter = b"\n"
    transport: Any

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._pieces_bytes = 0

    @property
    def unread(self) -> bytes:
        """Give what was received and not yet given to ``lineReceived``."""
        return b"".join(self._pieces) + self._buffer

    def forget_unread(self) -> None:
        """Let go of the memory, once the connection has ended."""
        self._forget_pieces()
        self._buffer = b""

    @property
    def is_mid_line(self) -> bool:
        """Tell whether the beginning of a line has come without its end."""
        if self._buffer:  # a pause, or a line, holds it back
            return not self._buffer.endswith(b"\n")
        return bool(self._pieces)

    def dataReceived(self, data: bytes) -> None:
        """Take a chunk; call ``lineReceived`` for each line that is complete."""
        self._buffer += data
        if self._busyReceiving:
            return
        self._busyReceiving = True
        try:
            # What comes while a line is taken is behind it.
            while self._buffer and not self.paused:
                data, self._buffer = self._buffer, b""
                if not self._give(data):
                    return
        finally:
            self._busyReceiving = False

    def _give(self, data: bytes) -> bool:
        """Give the lines of a chunk; tell whether to go on."""
        lines = data.split(b"\n")
        rest = lines.pop()
        if lines and self._pieces:
            lines[0] = b"".join([*self._pieces, lines[0]])
            self._forget_pieces()
        for number, line in enumerate(lines, 1):
            if len(line) > self.MAX_LENGTH + line.endswith(b"\r"):
                self.lineLengthExceeded(line)  # type: ignore[no-untyped-call]
                return False
            self.lineReceived(line)  # type: ignore[no-untyped-call]
            if self.paused:
                self._buffer = b"\n".join([*lines[number:], rest]) + self._buffer
                return False
            if self.transport.disconnecting:
                return False
        if rest:
            self._pieces.append(rest)
            self._pieces_bytes += len(rest)
            if self._pieces_bytes > self.MAX_LENGTH + rest.endswith(b"\r"):
                too_long = b"".join(self._pieces)
                self._forget_pieces()
                self.lineLengthExceeded(too_long)  # type: ignore[no-untyped-call]
                return False
            if len(self._pieces) > _FEW_PIECES + self._pieces_bytes // _LEAST_PIECE_BYTES:
                self._pieces = [b"".join(self._pieces)]
        return True

    def _forget_pieces(self) -> None:
        self._pieces.clear()
        self._pieces_bytes = 0


class OneConnection(Factory):
    """
    Give a protocol that exists already to the one connection that it is for.

    Args:
        protocol: The protocol.
    """

    noisy = False

    def __init__(self, protocol: LongLineReceiver) -> None:
        self._protocol = protocol

    def buildProtocol(self, addr: IAddress | None) -> LongLineReceiver:
        """Give the protocol."""
        return self._protocol
