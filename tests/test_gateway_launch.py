"""What the gateway shares with the daemon: its start, its ALPN, and writes that go at once."""

from __future__ import annotations

import io
import os
import socket
import sys
from types import TracebackType
from typing import Any

from twisted.application.service import Application, IServiceCollection, MultiService
from twisted.internet import tcp
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import ILogObserver, globalLogPublisher
from twisted.python import usage
from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import StartFailed
from taskd.launch import WritesItsLog, in_one_line, one_line_for_failed_starts
from taskd.lines import write_at_once
from taskd.tls import Secure, reason_of
from taskd.wire import ALPN
from tests.support import temporary_directory
from tests.test_tls import PAIR, CallersTerms, Meeting


class OneLineTests(SynchronousTestCase):
    def test_wrong_options(self) -> None:
        """What is wrong with options is said in one line, with where to read more."""
        ended = in_one_line("taskd-gateway", usage.UsageError("no such option"))
        self.assertEqual(
            str(ended), "twistd taskd-gateway: no such option; see twistd taskd-gateway --help"
        )

    def test_what_twisted_adds(self) -> None:
        """What Twisted puts before an option's own words is left out."""
        told = "Parameter type enforcement failed: --port: a number"
        self.assertEqual(
            str(in_one_line("x", usage.UsageError(told))),
            "twistd x: --port: a number; see twistd x --help",
        )

    def start_fails(self, error: BaseException) -> tuple[list[BaseException], str]:
        """Give what was shown as before, and what the standard error says."""
        shown: list[BaseException] = []

        def previous(
            kind: type[BaseException], error: BaseException, trace: TracebackType | None
        ) -> None:
            shown.append(error)

        self.addCleanup(setattr, sys, "__stderr__", sys.__stderr__)
        told = sys.__stderr__ = io.StringIO()  # type: ignore[misc, assignment]
        one_line_for_failed_starts("taskd-gateway", previous)(type(error), error, None)
        return shown, told.getvalue()

    def test_a_failed_start(self) -> None:
        """A start that fails is shown in one line and not as before."""
        shown, told = self.start_fails(StartFailed("the port is taken"))
        self.assertEqual((shown, told), ([], "twistd taskd-gateway: the port is taken\n"))

    def test_a_bug(self) -> None:
        """All else is shown as before."""
        bug = ValueError("a bug")
        self.assertEqual(self.start_fails(bug), ([bug], ""))

    def test_without_a_terminal(self) -> None:
        """Where nobody sees the standard error the log says so as well, and else it does not."""
        logged: list[Any] = []

        def observe(event: Any) -> None:
            if event["log_namespace"] == "taskd":
                logged.append(event["reason"])

        globalLogPublisher.addObserver(observe)
        self.addCleanup(globalLogPublisher.removeObserver, observe)
        error = StartFailed("the port is taken")
        for path, told in (
            (str(temporary_directory(self) / "err"), []),
            (os.devnull, [error]),
        ):
            before, fd = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT)
            os.dup2(fd, 2)
            try:
                self.start_fails(error)
            finally:
                os.dup2(before, 2)
                os.close(before)
                os.close(fd)
            self.assertEqual(logged, told)


class LogTests(SynchronousTestCase):
    def service(self, observer: Any) -> WritesItsLog:
        service = WritesItsLog()
        service.observer = lambda: observer
        return service

    def test_an_application(self) -> None:
        """The application that it becomes part of writes its log as it says."""
        application: Any = Application("x")

        def observer(event: Any) -> None:
            return None

        service: Any = self.service(observer)
        service.setServiceParent(application)
        self.assertIs(application.getComponent(ILogObserver), observer)
        self.assertIn(service, list(IServiceCollection(application)))

    def test_nothing_to_say(self) -> None:
        """Where it gives none that is left to others."""
        application: Any = Application("x")
        service: Any = self.service(None)
        service.setServiceParent(application)
        self.assertIsNone(application.getComponent(ILogObserver, None))

    def test_other_parents(self) -> None:
        """A parent that is no application is asked nothing."""
        parent: Any = MultiService()
        service: Any = self.service(lambda event: None)
        service.setServiceParent(parent)
        self.assertEqual(list(parent), [service])


class Reactor(Clock):
    """A reactor that notes who waits until it may write."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[Any] = set()

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)

    def removeReader(self, reader: Any) -> None:
        """Take note that nothing more is read."""


class AtOnceTests(SynchronousTestCase):
    """Writes over a real socket, under a transport of Twisted's."""

    def setUp(self) -> None:
        self.reactor = Reactor()
        ours, self.theirs = socket.socketpair()
        for each in (ours, self.theirs):
            each.setblocking(False)
            self.addCleanup(each.close)
        self.transport: Any = tcp.Connection(ours, StringTransport(), self.reactor)
        self.transport.connected = True
        self.socket = ours

    def came(self) -> bytes:
        found = b""
        try:
            while data := self.theirs.recv(2**20):
                found += data
        except BlockingIOError:
            pass
        return found

    def is_waiting(self) -> bool:
        return self.transport in self.reactor.writers

    def test_at_once(self) -> None:
        """What the kernel takes is there at once, and the reactor has nothing to wait for."""
        write_at_once(self.transport, b"hello")
        self.assertEqual(self.came(), b"hello")
        self.assertFalse(self.is_waiting())

    def test_what_the_kernel_does_not_take(self) -> None:
        """What the kernel does not take goes out later, in its order."""
        data = bytes(range(256)) * 2**14
        write_at_once(self.transport, data)
        self.assertTrue(self.is_waiting())
        write_at_once(self.transport, b"the end")
        found = self.came()
        self.assertLess(len(found), len(data))
        while self.is_waiting():
            self.transport.doWrite()
            found += self.came()
        self.assertEqual(found, data + b"the end")

    def test_nothing_passes_what_waits(self) -> None:
        """Nothing passes what waits, though the kernel has room by now."""
        self.transport.write(b"first ")
        write_at_once(self.transport, b"second")
        self.assertEqual(self.came(), b"")
        self.transport.doWrite()
        self.assertEqual(self.came(), b"first second")

    def test_a_connection_that_ends(self) -> None:
        """On one that is about to end it is left to Twisted what becomes of it."""
        self.transport.write(b"first ")
        self.transport.loseConnection()
        write_at_once(self.transport, b"second")
        self.assertEqual(self.came(), b"")

    def test_a_connection_that_is_to_end(self) -> None:
        """So it is if nothing waits on it."""
        self.transport.loseConnection()
        write_at_once(self.transport, b"hello")
        self.assertEqual(self.came(), b"")

    def test_tls_on_the_same_socket(self) -> None:
        """Where TLS was begun on the connection nothing passes it in plain text."""
        self.transport.TLS = True
        self.transport.protocol = StringTransport()
        write_at_once(self.transport, b"hello")
        self.assertEqual(self.came(), b"")

    def test_a_connection_that_is_gone(self) -> None:
        """On one that is gone nothing is sent, and nothing raised."""
        self.transport.connected = False
        write_at_once(self.transport, b"hello")
        self.assertEqual(self.came(), b"")

    def test_a_broken_connection(self) -> None:
        """If the kernel refuses it the reactor will find out why."""
        self.theirs.close()
        write_at_once(self.transport, b"hello")
        self.assertTrue(self.is_waiting())

    def test_other_transports(self) -> None:
        """What is no socket of Twisted's sends in its own time."""
        transport = StringTransport()
        write_at_once(transport, b"hello")
        self.assertEqual(transport.value(), b"hello")

    def test_nothing(self) -> None:
        """Of nothing nothing is sent."""
        write_at_once(self.transport, b"")
        self.assertEqual((self.came(), self.is_waiting()), (b"", False))


class ProtocolTests(SynchronousTestCase):
    """The name of what is spoken over TLS."""

    def test_http(self) -> None:
        """Where HTTP is spoken a browser is told so; who speaks only other things is refused."""
        secure = Secure(PAIR, protocol=b"http/1.1")
        for protocols, is_ours in (
            ((), True),
            ((b"http/1.1",), True),
            ((b"h2", b"http/1.1"), True),
            ((b"h2",), False),
            ((ALPN,), False),
        ):
            meeting = Meeting(secure, CallersTerms(protocols=protocols))
            self.assertEqual(meeting.server.handshakes, [b""] if is_ours else [], protocols)
            if is_ours:
                chosen = meeting.callers.get_alpn_proto_negotiated()
                self.assertEqual(chosen, b"http/1.1" if protocols else b"")
            else:
                self.assertEqual(
                    reason_of(meeting.server.lost), "it offers other protocols than http/1.1"
                )
