"""
What the service manager is told, and what it asked for: the protocol of sd_notify(3).

systemd names a socket in the environment, and perhaps how often it wants a sign of
life. The ``Notifier`` decides what to say and when; time, figures and beats are
given to it. Only ``sender_to`` touches a socket.

The watchdog is fed for the pool, not for the supervisor alone: as long as one worker
that accepts has answered within the watchdog's interval. So a task that keeps one
worker from answering harms nobody, and a pool in which nobody answers is not fed: it
is killed, and started anew, within two intervals.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping
from enum import Enum
from typing import Final, TypeVar

__all__ = ["Notifier", "describe", "sender_to", "whom_to_ask"]

_T = TypeVar("_T")

_STATUS_SECONDS: Final = 1.0
"""So long a status stands at least."""

_FEEDS_PER_INTERVAL: Final = 3
"""sd_watchdog_enabled(3) advises two; what looks after it now and then may be a little late."""

_RESERVE_SECONDS: Final = 5.0
"""By so much more than it needs a stop asks for."""

_MOST_UNSENT: Final = 16

_OUT_OF_LINE: Final = {ord(end): " " for end in "\r\n"}


class _Phase(Enum):
    """Where the daemon stands, as far as the manager was told."""

    STARTING = "starting: "
    """No worker has accepted yet."""
    READY = ""
    """At least one has."""
    RELOADING = "reloading: "
    """New code is loaded, or its workers take over."""
    STOPPING = "stopping: "
    """It goes, and says nothing else any more."""


def sender_to(address: str) -> Callable[[bytes], bool] | None:
    """
    Make what sends one message.

    It never waits and never fails: a manager that does not listen is no reason
    for a daemon to do worse.

    Args:
        address: NOTIFY_SOCKET: a path, or '@' and a name that is on no disk.

    Returns:
        Sends a message and tells whether it could; None for an address of
        another kind.
    """
    if not address.startswith(("/", "@")):
        return None
    name = os.fsencode(address)
    where = b"\0" + name[1:] if address.startswith("@") else name

    def send(message: bytes) -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.sendto(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, where)
        except OSError:
            return False
        return True

    return send


def describe(figures: Mapping[str, int]) -> str:
    """
    Put the pool's figures into a line.

    Args:
        figures: How many workers are ``starting``, ``idle``, ``busy`` and
            ``draining``, how many tasks are ``waiting``, ``done`` and ``failed``.
    """
    states = ("starting", "idle", "busy", "draining")
    shown = [f"{figures[s]} {s}" for s in states if figures[s] or s in ("idle", "busy")]
    workers, waiting = sum(figures[state] for state in states), figures["waiting"]
    return (
        f"{workers} worker{'s' * (workers != 1)}: {', '.join(shown)}; "
        f"{waiting} {'task waits' if waiting == 1 else 'tasks wait'}; "
        f"{figures['done']} done, {figures['failed']} failed"
    )


def whom_to_ask(now: float, seconds: float, beats: Mapping[_T, float]) -> Collection[_T]:
    """
    Tell which workers must show that they live, though they have nothing to do.

    One that has answered last is woken, and only if nobody has answered for half
    an interval; all are, if that did not help.

    Args:
        now: CLOCK_MONOTONIC seconds.
        seconds: The watchdog's interval, above 0.
        beats: The workers that accept, and when each has last answered.
    """
    if not beats:
        return ()
    latest = max(beats, key=beats.__getitem__)
    silent = now - beats[latest]
    if silent < seconds / 2:
        return ()
    return (latest,) if silent < seconds * 3 / 4 else beats.keys()


class Notifier:
    """
    Tell the service manager how the daemon gets on.

    What it must not miss is said again until it could be sent; figures and signs
    of life come anew anyway.

    Args:
        send: Sends a message and tells whether it could; None: nobody listens.
        watchdog_seconds: How long the manager waits for a sign of life, above 0, or
            None: it wants none.
    """

    def __init__(
        self,
        send: Callable[[bytes], bool] | None = None,
        watchdog_seconds: float | None = None,
    ) -> None:
        self._send = send
        self._watchdog_seconds = watchdog_seconds
        self._phase = _Phase.STARTING
        self._unsent: deque[bytes] = deque(maxlen=_MOST_UNSENT)
        self._status = ""
        self._status_due = 0.0
        self._feed_due = 0.0

    @classmethod
    def take(cls, environ: MutableMapping[str, str], pid: int) -> Notifier:
        """
        Take from the environment what it says to this process alone.

        It is removed there, so that no child takes it for its own.

        Args:
            environ: The environment.
            pid: This process.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds = environ.pop("WATCHDOG_USEC", "")
        whose = environ.pop("WATCHDOG_PID", str(pid))
        is_fed = whose == str(pid) and microseconds.isascii() and microseconds.isdigit()
        seconds = int(microseconds) / 1e6 if is_fed else 0.0
        return cls(sender_to(address), seconds or None)

    # What happens is told at once.

    def starting(self) -> None:
        """Tell that the task modules are being imported, which may take long."""
        self._say("STATUS=starting: the task modules are imported")

    def ready(self) -> None:
        """Tell, the first time, that a worker accepts."""
        if self._phase is _Phase.STARTING:
            self._phase = _Phase.READY
            self._say("READY=1")

    def reloading(self, now: float) -> None:
        """
        Tell that new code is to be loaded; ``look`` tells when that is over.

        Args:
            now: CLOCK_MONOTONIC seconds.
        """
        if self._phase in (_Phase.READY, _Phase.RELOADING):
            self._phase = _Phase.RELOADING
            self._say("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")

    def stopping(self, seconds: float) -> None:
        """
        Tell that the daemon stops, and ask for the time that it needs.

        How much the manager would give (TimeoutStopSec=) it does not say. So all
        that is needed is asked for, every time and once: the manager never
        shortens what it gives because of that.

        Args:
            seconds: How long it may take until everything has been killed.
        """
        self._phase = _Phase.STOPPING
        microseconds = int((seconds + _RESERVE_SECONDS) * 1e6)
        self._say("STOPPING=1", f"EXTEND_TIMEOUT_USEC={microseconds}")

    # The rest is looked after now and then.

    def look(
        self,
        now: float,
        beats: Mapping[_T, float],
        figures: Callable[[], Mapping[str, int]],
        is_reloading: bool,
        failure: str,
    ) -> Collection[_T]:
        """
        Say what there is to say by now.

        To be called once a second or more often, and at least twice in the
        watchdog's interval. Until it is over, a stop needs no worker that answers:
        the manager's patience with it has an end of its own.

        Args:
            now: CLOCK_MONOTONIC seconds.
            beats: The workers that accept, and when each has last answered.
            figures: Gives what ``describe`` puts into a line.
            is_reloading: True while code is loaded, or old workers have to be replaced.
            failure: Why the last reload has failed, or ''.

        Returns:
            The workers that are to be asked for a beat, though they have nothing to do.
        """
        if self._send is None:
            return ()
        self._send_unsent()
        is_reloaded = self._phase is _Phase.RELOADING and not is_reloading
        if is_reloaded:
            self._phase = _Phase.READY
        if is_reloaded or now >= self._status_due:
            self._status_due = now + _STATUS_SECONDS
            status = self._phase.value + describe(figures())
            if failure and self._phase is _Phase.READY:
                status += f"; the last reload failed, the old code serves on: {failure}"
            self._show(status.translate(_OUT_OF_LINE), is_reloaded)
        if self._watchdog_seconds is None:
            return ()
        self._feed(now, self._watchdog_seconds, beats)
        return whom_to_ask(now, self._watchdog_seconds, beats)

    def _show(self, status: str, is_reloaded: bool) -> None:
        if is_reloaded:
            self._say("READY=1", f"STATUS={status}")
        elif status == self._status or not self._try(f"STATUS={status}"):
            return
        self._status = status

    def _feed(self, now: float, seconds: float, beats: Mapping[_T, float]) -> None:
        answers = any(now - beat < seconds for beat in beats.values())
        is_due = now >= self._feed_due and (answers or self._phase is _Phase.STOPPING)
        if is_due and self._try("WATCHDOG=1"):
            self._feed_due = now + seconds / _FEEDS_PER_INTERVAL

    def _say(self, *lines: str) -> None:
        if self._send is not None:
            self._unsent.append("\n".join(lines).encode(errors="backslashreplace"))
            self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent and self._send is not None and self._send(self._unsent[0]):
            self._unsent.popleft()

    def _try(self, line: str) -> bool:
        """Send what need not come in any case, and not before what must."""
        if self._unsent or self._send is None:
            return False
        return self._send(line.encode(errors="backslashreplace"))
