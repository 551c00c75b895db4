"""
The socket between the supervisor and a worker: what passes over it, and how.

One line for each message: a verb, numbers, and a body. A body is a line of the
wire's own, passed on as it is, so that the supervisor neither reads nor writes
a task's JSON. What the messages cause is ``relay``'s at the worker's end, and
``children``'s at the supervisor's.

=========== ========================== ==========================================
from        message                    meaning
=========== ========================== ==========================================
worker      ``ready``                  it accepts
            ``log`` JSON               an event for the log
            ``offer`` TICKET …         a task that it cannot run now
            ``cancel`` TICKET          it does not want that any more
            ``returned`` NUMBER        a task that it was given, not begun
            ``ended`` NUMBER END reply the reply to one
            ``progress`` NUMBER line   what one reports
            ``ask``                    it could run one more
            ``replace`` CAUSE          it should not go on for long
            ``moved`` INODE …, and fd  a connection that another worker may have
            ``leaving``                it has nothing left to do
supervisor  ``run`` NUMBER DUE request a task for it
            ``cancel`` NUMBER          nobody wants that any more
            ``nothing``                the answer to ``ask`` if no task waits
            ``ended`` TICKET END reply the reply to what it offered
            ``failed`` TICKET JSON     the error that it came to
            ``progress`` TICKET line   what it reports
            ``retire`` JSON            start nothing more; the others go on, by these rules
            ``stop``                   start nothing more; the daemon stops
            ``adopt`` INODE …, and fd  a connection to go on with
            ``beat``                   show that your reactor runs
            ``go``                     the answer to ``leaving``: no task will come
=========== ========================== ==========================================

END is what the worker that answers the caller counts, and the supervisor does not read:
the code of the error, and the seconds that it ran; ``-`` where there is none.
"""

from __future__ import annotations

import os
import socket
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet import unix
from twisted.internet.interfaces import IFileDescriptorReceiver
from twisted.logger import Logger
from zope.interface import implementer

from taskd.lines import EagerWrites, LongLineReceiver, OneConnection

__all__ = ["Link", "Offer", "Reader", "adopt_link", "decode_due", "encode_due"]

_NO_DUE: Final = b"-"

Reader = Callable[[bytes], object]
"""Takes what stands behind a message's verb."""


@dataclass(frozen=True, slots=True)
class Offer:
    """
    A task that a worker hands over.

    Attributes:
        ticket: The worker's own number for it.
        priority: Higher is earlier.
        deadline: CLOCK_MONOTONIC seconds after which nobody wants it, or None.
        ends_with_caller: True: it is not to run once its caller's connection is gone.
        line: The request, as its caller could have sent it, with its line feed.
    """

    ticket: int
    priority: int
    deadline: float | None
    ends_with_caller: bool
    line: bytes

    def encode(self) -> bytes:
        """Write the message."""
        due = encode_due(self.deadline)
        return b"offer %d %d %s %d %s" % (
            self.ticket,
            self.priority,
            due,
            self.ends_with_caller,
            self.line,
        )

    @classmethod
    def decode(cls, rest: bytes) -> Offer:
        """Read what stands behind the verb."""
        ticket, priority, due, ends_with_caller, line = rest.split(b" ", 4)
        return cls(
            int(ticket), int(priority), decode_due(due), ends_with_caller == b"1", line + b"\n"
        )


def encode_due(due: float | None) -> bytes:
    """Write a time, exactly, or that there is none."""
    return _NO_DUE if due is None else repr(due).encode()


def decode_due(text: bytes) -> float | None:
    """Read what ``encode_due`` has written."""
    return None if text == _NO_DUE else float(text)


@implementer(IFileDescriptorReceiver)
class Link(LongLineReceiver):
    """
    One end of the socket.

    Args:
        readers: What takes each message, by its verb.
    """

    _link_log = Logger(namespace="taskd.link")
    MAX_LENGTH = sys.maxsize

    def __init__(self, readers: dict[bytes, Reader]) -> None:
        super().__init__()
        self._readers = readers
        self._fds: list[int] = []

    def tell(self, message: bytes) -> None:
        """Send one message or several, line feeds included; without effect once it is over."""
        if self.connected:
            self.transport.write(message)

    def give_connection(self, verb: bytes, connection: socket.socket | int, unread: bytes) -> bool:
        """
        Send a connection.

        Args:
            verb: The message's.
            connection: It stays the caller's, to be closed.
            unread: What was read from it and not looked at.

        Returns:
            Whether it is on its way; if not, there was no room at the moment.
        """
        if not self.connected or getattr(self.transport, "has_unsent", True):
            return False
        fd = connection if isinstance(connection, int) else connection.fileno()
        message = b"%s %d %s\n" % (verb, os.fstat(fd).st_ino, b64encode(unread))
        try:
            sent = socket.send_fds(self.transport.socket, [message], [fd])
        except OSError:
            return False
        if sent < len(message):
            self.transport.write(message[sent:])
        return True

    @property
    def has_unsent(self) -> bool:
        """Tell whether something waits until the other end reads."""
        return bool(self.connected and getattr(self.transport, "has_unsent", False))

    def take_connection(self, rest: bytes) -> tuple[int | None, bytes]:
        """
        Give the connection that has come with a message, and what was read from it.

        None instead of the connection: this process has as many descriptors open
        as it may, and the kernel has closed it.
        """
        inode, _, unread = rest.partition(b" ")
        # Where one was closed by the kernel, the next one's may be here already.
        is_its = bool(self._fds) and os.fstat(self._fds[0]).st_ino == int(inode)
        return self._fds.pop(0) if is_its else None, b64decode(unread)

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keep a connection until its message is complete."""
        self._fds.append(descriptor)

    def lineReceived(self, line: bytes) -> None:
        """Have a message taken by who is there for its verb."""
        verb, _, rest = line.partition(b" ")
        reader = self._readers.get(verb)
        if reader is None:  # the other end is of another version
            self._link_log.warn(
                "nobody here knows the message {verb}", verb=verb.decode(errors="replace")
            )
        else:
            reader(rest)

    def close_strays(self) -> None:
        """Close what came without its message."""
        while self._fds:
            os.close(self._fds.pop())


class _LinkTransport(EagerWrites, unix.Server):  # type: ignore[misc]
    """A link's socket, on which nothing waits for the reactor's next round."""


def adopt_link(reactor: Any, fd: int, link: LongLineReceiver) -> None:
    """
    Let a reactor carry a link.

    Args:
        reactor: A reactor of Twisted's that knows file descriptors.
        fd: The socket, not blocking; it is duplicated.
        link: One end of it.
    """
    _LinkTransport._fromConnectedSocket(fd, OneConnection(link), reactor)  # type: ignore[no-untyped-call]
