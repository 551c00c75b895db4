"""The listening socket that all workers share."""

from __future__ import annotations

import socket

from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import StartFailed
from taskd.listening import bind


class BindTests(SynchronousTestCase):
    def bound(self, interface: str, port: int = 0) -> socket.socket:
        listening = bind(interface, port)
        self.addCleanup(listening.close)
        return listening

    def refused(self, interface: str, port: int = 0) -> str:
        with self.assertRaises(StartFailed) as caught:
            bind(interface, port)
        return str(caught.exception)

    def test_it_listens(self) -> None:
        """What is bound takes connections, does not block, and sends replies undelayed."""
        listening = self.bound("127.0.0.1")
        self.assertFalse(listening.getblocking())
        with socket.create_connection(listening.getsockname()):
            connection, _ = listening.accept()
        with connection:
            self.assertTrue(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_peers_that_vanish(self) -> None:
        """The kernel asks after a minute's silence whether the peer of a connection is there."""
        listening = self.bound("127.0.0.1")
        with socket.create_connection(listening.getsockname()):
            connection, _ = listening.accept()
        with connection:
            self.assertTrue(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            self.assertEqual(idle, 60)

    def test_names_and_families(self) -> None:
        """A name is as good as an address, and IPv6 as IPv4."""
        self.assertEqual(self.bound("::1").family, socket.AF_INET6)
        self.assertIn(self.bound("localhost").getsockname()[0], ("127.0.0.1", "::1"))

    def test_a_port_that_is_taken(self) -> None:
        """A port that another process listens on is refused, and the message says so."""
        port = self.bound("127.0.0.1").getsockname()[1]
        self.assertEqual(
            self.refused("127.0.0.1", port),
            f"cannot listen on 127.0.0.1 port {port}: another process listens there",
        )

    def test_an_address_of_another_machine(self) -> None:
        """An address that this machine has not is refused, and the message says so."""
        self.assertIn("this machine has no such address", self.refused("192.0.2.1"))

    def test_a_name_that_is_none(self) -> None:
        """An interface that cannot be resolved is refused by its option."""
        for interface in ("fe80::1%nosuch", "a..b", "x" * 70):
            self.assertIn("--interface", self.refused(interface))
