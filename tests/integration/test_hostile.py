"""Peers that mean harm: slow ones, silent ones, those that vanish, and a storm of them."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import unittest
from typing import Final

from tests.integration.case import number_of_fds
from tests.integration.crowd import Crowd, HostileTestCase, Peer
from tests.integration.daemon import Daemon, wait_until

SLOW_SHARE: Final = 20
"""Of those that drip, one in so many sends a byte at each poll."""

_SYS_PIDFD_GETFD: Final = 438


class SlowTests(HostileTestCase):
    def drip_until_cut_off(self, crowd: Crowd) -> None:
        """Have each send a byte now and then, whatever it is told, until it cannot."""
        turn = itertools.cycle(range(SLOW_SHARE))

        def are_all_cut_off() -> bool:
            for peer in crowd[next(turn) :: SLOW_SHARE]:
                peer.hear()
                peer.say(b"x")
            return all(peer.is_cut_off for peer in crowd)

        wait_until(are_all_cut_off, what="the end of all that drip")

    def test_first_line_that_never_ends(self) -> None:
        """500 whose first line never ends are cut off in time, though they go on sending."""
        daemon = self.start("--first-line-timeout", "2", procs=1)
        with self.unharmed(daemon, most_mib=32) as others:
            crowd = self.crowd(daemon, 500)
            crowd.say(b'{"function": "echo", "args": ["')
            others.wait_for_more()
            self.drip_until_cut_off(crowd)
            for peer in crowd:
                self.assert_error(peer.replies()[0], "malformed", "2 s")

    def test_later_line_that_never_ends(self) -> None:
        """So are 500 who have asked properly once, with ``--idle-timeout``."""
        daemon = self.start("--first-line-timeout", "2", "--idle-timeout", "2", procs=1)
        with self.unharmed(daemon, most_mib=32) as others:
            crowd = self.crowd(daemon, 500, [b'{"function": "at_once", "args": [1]}\n'])
            wait_until(lambda: crowd.have_heard(1), what="an answer for all")
            crowd.say(b'{"function": "echo", "args": ["')
            others.wait_for_more()
            self.drip_until_cut_off(crowd)

    def test_line_in_tiny_pieces(self) -> None:
        """A long line takes little more memory than its bytes, however small its pieces."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=6, windows=()):
            crowd = self.crowd(daemon, 20)
            for _ in range(10_000):
                crowd.say(b"xy")
            self.assertEqual(daemon.ask("add", [1, 2]), 3)
            crowd.close()

    def test_lines_nearly_complete(self) -> None:
        """32 lines of 1 MiB that lack only their ends take no more memory than their bytes."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=64) as others:
            crowd = self.crowd(daemon, 32, [b"x" * 2**20])
            wait_until(
                lambda: not crowd.push() and all(p.is_all_sent for p in crowd),
                what="all that there is to send",
            )
            others.wait_for_more()
            crowd.close()

    def test_one_after_the_other(self) -> None:
        """300 who come one by one, and leave lines of 1 MiB unfinished, cost no more than a few."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=48):
            for number in range(300):
                (peer,) = crowd = self.crowd(daemon, 1, [b"x" * 2**20])
                wait_until(lambda crowd=crowd: not crowd.push() and crowd[0].is_all_sent)
                (peer.reset if number % 2 else peer.close)()


class SilentTests(HostileTestCase):
    def test_silence(self) -> None:
        """500 who connect and say nothing are told so and hung up on in time."""
        daemon = self.start("--first-line-timeout", "2", procs=1)
        with self.unharmed(daemon, most_mib=32) as others:
            crowd = self.crowd(daemon, 500)
            others.wait_for_more()
            wait_until(crowd.have_all_ended, what="all hung up on")
            for peer in crowd:
                self.assert_error(peer.replies()[0], "malformed", "2 s")

    def test_half_close_at_once(self) -> None:
        """500 who end their sending at once, mid-line or not, are hung up on at once."""
        daemon = self.start("--first-line-timeout", "600", procs=1)
        with self.unharmed(daemon, most_mib=32):
            crowd = self.crowd(daemon, 500)
            for peer in crowd[::2]:
                peer.say(b'{"function')
            for peer in crowd:
                peer.socket.shutdown(socket.SHUT_WR)
            wait_until(crowd.have_all_ended, what="all hung up on")
            for peer in crowd[::2]:
                self.assert_error(peer.replies()[0], "malformed", "line feed")
            for peer in crowd[1::2]:
                self.assertEqual(peer.heard, b"")

    def test_vanished(self) -> None:
        """Who vanishes without a word is given up at its time, before and after its first line."""
        daemon = self.start("--first-line-timeout", "2", "--idle-timeout", "2", procs=1)
        with self.unharmed(daemon, most_mib=32) as others:
            crowd = self.crowd(daemon, 200, [b'{"function": "at_once", "args": [1]}\n'])
            wait_until(lambda: crowd.have_heard(1), what="an answer for all")
            crowd += self.crowd(daemon, 200)
            for peer in crowd:
                peer.vanish()
            others.wait_for_more()
            # They are still open here, and have had no word: it is the daemon that lets go.
            (worker,) = daemon.workers().values()
            wait_until(lambda: number_of_fds(worker) < 200, what="closed files")
            for peer in crowd:
                self.assertFalse(peer.hear())
                self.assertFalse(peer.is_ended)

    def test_keep_alive(self) -> None:
        """Who vanishes while it may stay for ever is given up once the kernel misses it."""
        daemon = self.start(procs=1)
        with self.unharmed(daemon, most_mib=16) as others:
            (peer,) = self.crowd(daemon, 1, [b'{"function": "at_once", "args": [1]}\n'])
            wait_until(lambda: Crowd([peer]).have_heard(1), what="an answer")
            with self.other_end(daemon, peer) as end:
                self.assertEqual(end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1)
                self.assertEqual(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
                    end.setsockopt(socket.IPPROTO_TCP, option, 1)  # instead of minutes
            peer.vanish()
            others.wait_for_more()
            self.wait_for_connections(daemon, 2)  # who asks, and the other caller
            self.assertFalse(peer.hear())
            self.assertFalse(peer.is_ended)

    def other_end(self, daemon: Daemon, peer: Peer) -> socket.socket:
        """Give the worker's very own socket of a connection, as a debugger would."""
        (worker,) = daemon.workers().values()
        return wait_until(lambda: self.find_end(worker, peer.socket), what="the other end")

    def find_end(self, worker: int, ours: socket.socket) -> socket.socket | None:
        call, process = ctypes.CDLL(None, use_errno=True).syscall, os.pidfd_open(worker)
        try:
            for name in os.listdir(f"/proc/{worker}/fd"):
                if not os.readlink(f"/proc/{worker}/fd/{name}").startswith("socket:"):
                    continue
                fd = call(_SYS_PIDFD_GETFD, process, int(name), 0)
                if fd < 0:
                    raise unittest.SkipTest("this system lets no process look at another's files")
                end = socket.socket(fileno=fd)
                with contextlib.suppress(OSError):  # one that listens has no peer
                    if end.getpeername() == ours.getsockname():
                        return end
                end.close()
        finally:
            os.close(process)
        return None


class StormTests(HostileTestCase):
    def test_connect_and_close(self) -> None:
        """5000 who connect and go at once, with a reset or without, leave nothing behind."""
        daemon = self.start(procs=2)
        with self.unharmed(daemon, most_mib=32):
            for number in range(5000):
                peer = Peer(daemon)
                if number % 3 == 1:
                    peer.say(b'{"function": "add", "args": [1, 2]}\n')
                (peer.reset if number % 2 else peer.close)()
