"""
What tests of peers that mean harm share: the crowd, and what must hold while there is one.

Each such test tells what it has measured on stdout (``pytest -s``).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import re
import socket
import ssl
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.integration.case import DaemonTestCase, number_of_fds
from tests.integration.daemon import Daemon, wait_until
from tests.integration.load import Load

__all__ = [
    "Crowd",
    "HostileTestCase",
    "Peer",
    "cpu_seconds",
    "peak_growth",
    "proportional_kib",
    "resident_kib",
]

STILL_POLLS: Final = 100
"""So many polls in a row without a byte, a second's worth, tell that nothing moves any more."""

_READ_BYTES: Final = 256 * 1024
_PUSH_BYTES: Final = 4 * 2**20
_SO_ATTACH_FILTER: Final = 26
_RESET_AT_CLOSE: Final = struct.pack("ii", 1, 0)
_RESET_PEAK: Final = "5"


class Peer:
    """
    One connection that never blocks its owner.

    Args:
        daemon: Who is attacked.
        lines: What it sends, as far as it is taken.
        connected: A connection to go on with, over TLS perhaps; None: make a plain one.

    Attributes:
        heard: What was read.
        sent: How many bytes were taken.
        is_ended: True: the daemon has ended its side.
        is_cut_off: True: the daemon has reset it.
    """

    def __init__(
        self,
        daemon: Daemon,
        lines: Iterable[bytes] = (),
        connected: socket.socket | None = None,
    ) -> None:
        if connected is None:
            connected = socket.create_connection(("127.0.0.1", daemon.port), timeout=20)
        self.socket = connected
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._lines = iter(lines)
        self._rest = b""
        self.heard = bytearray()
        self.sent = 0
        self.is_all_sent = False
        self.is_ended = False
        self.is_cut_off = False

    def push(self) -> bool:
        """Send what is taken now, but some MB at most; tell whether anything was."""
        before = self.sent
        with self._watching():
            while not self.is_all_sent and not self.is_cut_off and self.sent < before + _PUSH_BYTES:
                if not self._rest:
                    self._rest = next(self._lines, b"")
                    self.is_all_sent = not self._rest
                taken = self.socket.send(self._rest)
                self.sent += taken
                self._rest = self._rest[taken:]
        return self.sent > before

    def say(self, data: bytes) -> None:
        """Send something short, if it is taken."""
        with self._watching():
            self.sent += self.socket.send(data)

    def hear(self) -> bool:
        """Read what has come; tell whether anything did."""
        before = len(self.heard)
        with self._watching():
            while not self.is_ended:
                data = self.socket.recv(_READ_BYTES)
                self.heard += data
                self.is_ended = not data
        return len(self.heard) > before

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ConnectionError:
            self.is_ended = self.is_cut_off = True

    def replies(self) -> list[Any]:
        """Give what was heard."""
        return [json.loads(line) for line in self.heard.splitlines()]

    def vanish(self) -> None:
        """Answer nothing any more, not even the kernel's own questions: the cable is cut."""
        refuse_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        program = struct.pack("HxxxxxxP", 1, ctypes.addressof(refuse_all))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def reset(self) -> None:
        """Close it so that the daemon is sent a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.socket.close()

    def close(self) -> None:
        self.socket.close()


class Crowd(list[Peer]):
    """Many peers."""

    def say(self, data: bytes) -> None:
        for peer in self:
            peer.say(data)

    def push(self) -> bool:
        """Have each send what is taken; tell whether anything was."""
        return sum(peer.push() for peer in self) > 0

    def hear(self) -> bool:
        """Have each read what has come; tell whether anything did."""
        return sum(peer.hear() for peer in self) > 0

    def push_until_still(self) -> None:
        """Have each send, and read nothing, until no more is taken of anybody."""
        still = itertools.count(1)

        def is_still() -> bool:
            nonlocal still
            if self.push():
                still = itertools.count(1)
            return next(still) >= STILL_POLLS or all(peer.is_all_sent for peer in self)

        wait_until(is_still, 60, what="a crowd of which nothing is taken")

    def have_all_ended(self) -> bool:
        """Read; tell whether the daemon has ended its side for everybody."""
        self.hear()
        return all(peer.is_ended for peer in self)

    def have_heard(self, lines: int) -> bool:
        """Send and read; tell whether everybody has heard so many lines."""
        self.push()
        self.hear()
        return all(peer.heard.count(b"\n") >= lines for peer in self)

    def close(self) -> None:
        for peer in self:
            peer.close()


def resident_kib(pid: int, field: str = "VmRSS") -> int:
    """Tell how much memory a process has resident, or has had (``VmHWM``)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    (kib,) = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kib)


def peak_growth(before: dict[int, int]) -> int:
    """Tell by how many KiB these processes have grown at their peaks, together."""
    return sum(resident_kib(pid, "VmHWM") - kib for pid, kib in before.items())


def proportional_kib(pids: Iterable[int]) -> int:
    """Tell how much memory these take together; what they share counts once."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
        total += int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0])
    return total


def cpu_seconds(pids: Iterable[int]) -> float:
    """Tell how long these have run on a processor so far."""
    fields = (Path(f"/proc/{pid}/schedstat").read_text(encoding="utf-8") for pid in pids)
    return sum(int(text.split()[0]) for text in fields) / 1e9


class HostileTestCase(DaemonTestCase):
    """Base of tests in which others are served while somebody does harm."""

    def crowd(self, daemon: Daemon, count: int, lines: Iterable[bytes] = ()) -> Crowd:
        """Open that many connections, each of which has the same to send."""
        crowd = Crowd()
        self.addCleanup(crowd.close)
        for _ in range(count):
            crowd.append(Peer(daemon, lines))
        return crowd

    def tell(self, text: str) -> None:
        """Tell what was measured."""
        sys.stdout.write(f"\n[{self.id().rpartition('.')[2]}] {text}\n")

    def pids(self, daemon: Daemon) -> list[int]:
        return [process.pid for process in daemon.processes()]

    def wait_for_connections(self, daemon: Daemon, count: int, seconds: float = 20) -> None:
        """Wait until that many are open, the one that asks included."""
        wait_until(
            lambda: daemon.status()["totals"]["connections"] == count,
            seconds,
            what=f"{count} connections",
        )

    def wait_for_accepted(self, daemon: Daemon, count: int, seconds: float = 60) -> None:
        """Wait until that many connections have been accepted since the start."""
        wait_until(
            lambda: daemon.status()["totals"]["accepted"] >= count,
            seconds,
            what=f"{count} connections that were accepted",
        )

    @contextlib.contextmanager
    def unharmed(
        self, daemon: Daemon, *, most_mib: float, windows: tuple[int, ...] = (1,)
    ) -> Iterator[Load]:
        """
        Check that others are served within the block, and that nothing is left behind it.

        Args:
            daemon: Who is attacked; nobody is connected to it.
            most_mib: By so much its processes may grow, together, at their peaks.
            windows: The well-behaved callers; see ``Load``.
        """
        self.wait_for_connections(daemon, 1)
        workers = daemon.workers()
        fds = {pid: number_of_fds(pid) for pid in workers.values()}
        pids = self.pids(daemon)
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK, encoding="utf-8")
        pss, before = proportional_kib(pids), {pid: resident_kib(pid) for pid in pids}
        with Load(daemon, windows) as others:
            yield others
            if windows:
                others.wait_for_more()
        self.assertEqual(others.failures, [])
        self.wait_for_connections(daemon, 1)
        for pid, count in fds.items():
            # The connection of whoever asked for the status may still be there.
            wait_until(lambda: number_of_fds(pid) <= count, what="closed files")  # noqa: B023
        self.assertEqual(daemon.workers(), workers)
        self.assertEqual(daemon.restarts(), {})
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertNotIn("Traceback", daemon.log)
        growth, after = peak_growth(before) / 1024, proportional_kib(pids) / 1024
        self.tell(
            f"{pss / 1024:.0f} MiB before (PSS of the tree), at most {growth:.1f} MiB more (RSS), "
            f"{after:.0f} MiB after; others had {sum(others.answered)} right replies"
        )
        self.assertLess(growth, most_mib)
