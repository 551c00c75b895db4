"""
The supervisor's side of its children: one record for each process, and its link.

A record knows its process, speaks with it, and tells the supervisor what has
happened; what is done about it is the supervisor's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from twisted.internet.interfaces import IFileDescriptorReceiver
from twisted.internet.process import registerReapProcessHandler, unregisterReapProcessHandler
from twisted.internet.protocol import ProcessProtocol, connectionDone
from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.credentials import Credentials
from taskd.dispatcher import Dispatcher, Task
from taskd.errors import CallError, StartFailed
from taskd.ledger import Ledger
from taskd.lines import LongLineReceiver
from taskd.link import Link, Offer, encode_due
from taskd.logs import from_worker
from taskd.process import describe_end
from taskd.states import Cause
from taskd.zygote import CONTROL_FD, LISTENING_FD, SCOREBOARD_FD

__all__ = ["NOT_FOR_CHILDREN", "Lineage", "Parent", "Worker", "Zygote"]

NOT_FOR_CHILDREN: Final = frozenset(
    {
        "LISTEN_FDNAMES",
        "LISTEN_FDS",
        "LISTEN_PID",
        "NOTIFY_SOCKET",
        "TASKD_SMTP_LOGIN",
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
    }
)
"""What the environment says to this process alone."""

_LONGEST_UNENDED: Final = 8192
"""Bytes of a line without an end, after which it is logged as it is."""

_STREAMS: Final = {1: "stdout", 2: "stderr"}


class Parent(Protocol):
    """What the records tell the supervisor."""

    @property
    def dispatcher(self) -> Dispatcher: ...  # noqa: D102
    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102

    def worker_forked(self, zygote: Zygote, number: int, pid: int, fd: int, /) -> None: ...  # noqa: D102
    def worker_not_forked(self, number: int, reason: str, /) -> None: ...  # noqa: D102
    def worker_ready(self, worker: Worker, /) -> None: ...  # noqa: D102
    def worker_worn(self, worker: Worker, cause: Cause, /) -> None: ...  # noqa: D102
    def worker_leaving(self, worker: Worker, /) -> None: ...  # noqa: D102
    def worker_gone(self, worker: Worker, /) -> None: ...  # noqa: D102
    def worker_exited(self, pid: int, status: int, /) -> None: ...  # noqa: D102
    def connection_moved(self, fd: int, unread: bytes, /) -> None: ...  # noqa: D102


class Lineage(Protocol):
    """What a zygote's record tells of the zygote itself."""

    def zygote_loaded(self, zygote: Zygote, /) -> None: ...  # noqa: D102
    def zygote_cannot_preload(self, reason: str, /) -> None: ...  # noqa: D102
    def zygote_failed(self, zygote: Zygote, reason: str, /) -> None: ...  # noqa: D102
    def zygote_gone(self, zygote: Zygote, status: int, /) -> None: ...  # noqa: D102


class Worker(Link):
    """
    The supervisor's record of one worker, and its end of the link.

    To the dispatcher it is a ``Peer``.

    Attributes:
        zygote: Who forked it.
        number: The worker's slot.
        pid: Its process.
        ready_at: When it began to accept, or None.
        cause: Why a successor was asked for; None: it is to go on.
        is_retired: True once it was told to leave everything to the others.
        is_hung: True once it is to be killed because it does not answer.
        is_killed: True once it is killed because the daemon stops.
        is_gone: True once its link has ended.
        ran: The task that it ran when it died, or ''; set by the parent, as the next.
        ran_for_others: True if it ran tasks then whose callers others answer.
        is_orphan: True if its zygote is dead, and so this process its parent.
    """

    def __init__(self, parent: Parent, zygote: Zygote, number: int, pid: int) -> None:
        super().__init__(
            {
                b"ready": lambda _: parent.worker_ready(self),
                b"log": self._log,
                b"offer": self._offer,
                b"cancel": self._take_back,
                b"returned": self._returned,
                b"ended": self._ended,
                b"progress": self._progressed,
                b"ask": lambda _: parent.dispatcher.ask(self, parent.clock()),
                b"replace": lambda rest: parent.worker_worn(self, Cause[rest.decode()]),
                b"moved": self._moved,
                b"leaving": lambda _: parent.worker_leaving(self),
            }
        )
        self.zygote = zygote
        self.number = number
        self.pid = pid
        self.ready_at: float | None = None
        self.cause: Cause | None = None
        self.is_retired = False
        self.is_hung = False
        self.is_killed = False
        self.is_gone = False
        self.is_orphan = False
        self.ran = ""
        self.ran_for_others = False
        self._asked_at = 0.0
        self._parent = parent

    @property
    def serves(self) -> bool:
        """Tell whether it accepts, and is to go on doing so."""
        return self.ready_at is not None and self.cause is None and not self.is_gone

    def lived_seconds(self, now: float) -> float:
        """Tell how long it has served."""
        return 0.0 if self.ready_at is None else now - self.ready_at

    def stop(self) -> None:
        """Tell it to finish and go, as all are told."""
        self.tell(b"stop\n")

    def retire(self, credentials: Credentials) -> None:
        """
        Tell it to leave everything to the others and go.

        Args:
            credentials: Those of the others.
        """
        self.is_retired = True
        rules = {"tokens": credentials.tokens, "client_ca": credentials.client_ca}
        self.tell(b"retire %s\n" % json.dumps(rules).encode())

    def ask_for_beat(self, now: float, beat: float) -> None:
        """
        Have it show that its reactor runs.

        Args:
            now: CLOCK_MONOTONIC seconds.
            beat: When it has last shown that.
        """
        if self.silent_since(beat) is None:
            self._asked_at = now
        self.tell(b"beat\n")

    def silent_since(self, beat: float) -> float | None:
        """Tell since when it has not done what ``ask_for_beat`` asked for, or None."""
        return self._asked_at if self._asked_at > beat else None

    def let_go(self) -> None:
        """Tell it that no task will come any more."""
        self.tell(b"go\n")

    def adopt(self, fd: int, unread: bytes) -> bool:
        """Give it a connection to go on with; tell whether that was possible."""
        return self.give_connection(b"adopt", fd, unread)

    def bury(self, status: int, log: Logger, ledger: Ledger, *, is_worth_a_word: bool) -> None:
        """
        Say how it has ended.

        Args:
            status: Its wait status.
            log: Takes the words.
            ledger: Is told if it has died with a task.
            is_worth_a_word: False: its end is as it should be, unless it has failed.
        """
        who = {"worker": self.number, "pid": self.pid}
        if self.is_retired and not status and self.cause is not None:
            cause = self.cause.name.lower().replace("_", "-")
            log.info("worker {worker} (pid {pid}) was replaced: {cause}", cause=cause, **who)
        elif (status or is_worth_a_word) and not self.is_killed:
            end = describe_end(status)
            ran = {"function": self.ran} if self.ran else {}
            words = "worker {worker} (pid {pid}) {end}" + "; it ran {function}" * len(ran)
            log.warn(words, end=end, **who, **ran)
            if self.ran and self.cause is not Cause.TIME_LIMIT:  # else its caller was told that
                ledger.buried(self.number, self.ran, end, is_counted=self.ran_for_others)

    def await_death(self) -> None:
        """Reap it from now on, as its parent."""
        if not self.is_orphan:
            self.is_orphan = True
            registerReapProcessHandler(self.pid, self)

    # What it says.

    def _log(self, rest: bytes) -> None:
        globalLogPublisher(from_worker(self.number, self.pid, rest))

    def _offer(self, rest: bytes) -> None:
        self._parent.dispatcher.offer(self, Offer.decode(rest), self._parent.clock())

    def _take_back(self, rest: bytes) -> None:
        self._parent.dispatcher.cancel(self, int(rest))

    def _returned(self, rest: bytes) -> None:
        self._parent.dispatcher.returned(self, int(rest), self._parent.clock())

    def _ended(self, rest: bytes) -> None:
        number, _, reply = rest.partition(b" ")
        self._parent.dispatcher.ended(self, int(number), reply, self._parent.clock())

    def _moved(self, rest: bytes) -> None:
        fd, unread = self.take_connection(rest)
        if fd is not None:
            self._parent.connection_moved(fd, unread)

    def _progressed(self, rest: bytes) -> None:
        number, _, line = rest.partition(b" ")
        self._parent.dispatcher.progressed(int(number), line)

    # The dispatcher calls these.

    def run(self, task: Task) -> None:
        """Give it a task."""
        offer = task.offer
        self.tell(b"run %d %s %s" % (task.number, encode_due(offer.deadline), offer.line))

    def cancel(self, number: int) -> None:
        """Tell it that nobody wants a task any more that it was given."""
        self.tell(b"cancel %d\n" % number)

    def nothing_to_run(self) -> None:
        """Tell it that no task waits."""
        self.tell(b"nothing\n")

    def ended(self, ticket: int, reply: bytes) -> None:
        """Tell it the reply to what it has handed over."""
        self.tell(b"ended %d %s\n" % (ticket, reply))

    def failed(self, ticket: int, error: CallError) -> None:
        """Tell it what has become of a task that it has handed over."""
        fields = json.dumps({"code": error.code, "message": error.message, **error.details})
        self.tell(b"failed %d %s\n" % (ticket, fields.encode()))

    def progressed(self, ticket: int, line: bytes) -> None:
        """Tell it what a task reports that it has handed over."""
        self.tell(b"progress %d %s\n" % (ticket, line))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take it that the worker is dead, or as good as dead."""
        self.connected = 0
        self.close_strays()
        if not self.is_gone:
            self.is_gone = True
            self._parent.worker_gone(self)

    # twisted.internet.process calls these on what is registered for reaping.

    def reapProcess(self) -> None:  # noqa: N802
        """Reap the process if it has died."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0
        if pid:
            unregisterReapProcessHandler(self.pid, self)
            self.processEnded(status)

    def processEnded(self, status: int) -> None:
        """Take note that the process has been reaped."""
        self._parent.worker_exited(self.pid, status)


class Zygote(ProcessProtocol):
    """
    The supervisor's record of one zygote.

    Args:
        lineage: Is told of it.
        parent: Is told of its workers.
        reactor: Spawns it.
        spec: What it is told to load.
        scoreboard_fd: Inherited by it.
        listening: Inherited by it.
        adopt: Lets the reactor carry a link, as ``adopt_link`` does.

    Attributes:
        loaded_at: Since when it can fork, or None; set by the parent.
    """

    def __init__(
        self,
        lineage: Lineage,
        parent: Parent,
        reactor: Any,
        spec: dict[str, Any],
        scoreboard_fd: int,
        listening: list[socket.socket],
        adopt: Callable[[Any, int, LongLineReceiver], None],
    ) -> None:
        self._output = Logger(namespace="taskd.output")
        self._lineage = lineage
        self._parent = parent
        self._reactor = reactor
        self._adopt = adopt
        self._spec = spec
        self.loaded_at: float | None = None
        self._unread = {1: b"", 2: b""}
        self._control, theirs = socket.socketpair()
        child_fds: dict[int, int | str] = {
            1: "r",
            2: "r",
            CONTROL_FD: theirs.fileno(),
            SCOREBOARD_FD: scoreboard_fd,
        }
        child_fds.update({LISTENING_FD + n: s.fileno() for n, s in enumerate(listening)})
        program = f"import sys; sys.path[:] = {sys.path!r}; from taskd.zygote import main; main()"
        try:
            with open(os.devnull, "rb") as devnull:
                child_fds[0] = devnull.fileno()
                self._process = reactor.spawnProcess(
                    self,
                    sys.executable,
                    [sys.executable, "-P", "-c", program],
                    env={k: v for k, v in os.environ.items() if k not in NOT_FOR_CHILDREN},
                    childFDs=child_fds,
                )
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.pid: int = self._process.pid
        self._link: _ZygoteLink | None = None
        self._send(load=spec)

    @property
    def is_loaded(self) -> bool:
        """Tell whether it can fork."""
        return self.loaded_at is not None

    def lived_seconds(self, now: float) -> float:
        """Tell how long it has been able to fork."""
        return 0.0 if self.loaded_at is None else now - self.loaded_at

    def wait_until_loaded(self) -> None:
        """
        Wait, without a reactor, until it has imported the task modules.

        What it and they print meanwhile is logged.

        Raises:
            StartFailed: It could not.
        """
        pipes = list(self._process.pipes.values())
        received = b""
        while self.loaded_at is None:
            ready, _, _ = select.select([self._control, *pipes], [], [])
            for pipe in ready:
                if pipe is not self._control and pipe.doRead() is not None:
                    pipes.remove(pipe)
            if self._control in ready:
                data = self._control.recv(65536)
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self.told(json.loads(line), self._raise)
                if not data:
                    self._raise("the zygote died while it imported the task modules")
        self.begin()

    def _raise(self, reason: str) -> None:
        self._control.close()
        raise StartFailed(reason)

    def begin(self) -> None:
        """Listen to it from the reactor from now on."""
        self._control.setblocking(False)
        self._link = _ZygoteLink(self)
        self._adopt(self._reactor, self._control.fileno(), self._link)
        self._control.close()

    def _send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        if self._link is None:
            self._control.sendall(data)
        else:
            self._link.transport.write(data)

    def told(self, message: dict[str, Any], failed: Callable[[str], None]) -> None:
        """
        Take what it says before it can fork.

        Args:
            message: ``loaded``, ``failed`` or ``again``.
            failed: Takes the reason why it cannot go on.
        """
        if "loaded" in message:
            self._lineage.zygote_loaded(self)
        elif "failed" in message:
            failed(message["failed"])
        elif "again" in message:
            self._lineage.zygote_cannot_preload(message["again"])
            self._spec["preload"] = False
            self._send(load=self._spec)

    def fork(self, numbers: set[int]) -> None:
        """Ask for workers."""
        self._send(fork=sorted(numbers))

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Have a worker sent a signal by the one who knows whether the pid is still its own."""
        self._send(kill=pid, signal=int(number))

    def unlisten(self) -> None:
        """Have it close its copies of the ports, so that nobody listens any more."""
        self._send(unlisten=True)

    def dismiss(self) -> None:
        """Let it go."""
        if self._link is not None:
            self._link.transport.loseConnection()

    def end(self) -> None:
        """Kill it."""
        self._process.signalProcess("KILL")

    def link_received(self, message: dict[str, Any], fds: list[int]) -> None:
        """Take a message that came over the link."""
        if "forked" in message and fds:
            self._parent.worker_forked(self, message["forked"], message["pid"], fds.pop(0))
        elif "forked" in message:  # the kernel has closed what came with it
            self.kill(message["pid"], signal.SIGKILL)
            self._parent.worker_not_forked(message["forked"], "too many open files")
        elif "exited" in message:
            self._parent.worker_exited(message["exited"], message["status"])
        elif "unforked" in message:
            self._parent.worker_not_forked(message["unforked"], message["reason"])
        else:
            self.told(message, partial(self._lineage.zygote_failed, self))

    # Twisted calls these.

    def childDataReceived(self, childFD: int, data: bytes) -> None:  # noqa: N803
        """Log what the zygote and all workers print, line by line."""
        *lines, rest = (self._unread[childFD] + data).split(b"\n")
        if len(rest) > _LONGEST_UNENDED:  # a bar of progress may never end its line
            lines.append(rest)
            rest = b""
        self._unread[childFD] = rest
        for line in lines:
            text = line.decode(errors="backslashreplace")
            self._output.info("{log_text}", log_text=text, stream=_STREAMS[childFD])

    def processExited(self, reason: Failure) -> None:
        """
        Tell the supervisor how it ended.

        Not ``processEnded``: that would wait for the pipes, which the workers keep open.
        """
        status = getattr(reason.value, "status", None)  # ProcessDone and ProcessTerminated have it
        self._lineage.zygote_gone(self, status or 0)


@implementer(IFileDescriptorReceiver)
class _ZygoteLink(LongLineReceiver):
    """The supervisor's end of the socket to the zygote."""

    def __init__(self, zygote: Zygote) -> None:
        super().__init__()
        self.MAX_LENGTH = sys.maxsize
        self._zygote = zygote
        self._fds: list[int] = []

    def fileDescriptorReceived(self, descriptor: int) -> None:
        """Keep a worker's socket until the message comes that says whose it is."""
        self._fds.append(descriptor)

    def lineReceived(self, line: bytes) -> None:
        """Hand a message on."""
        self._zygote.link_received(json.loads(line), self._fds)
