"""
The log: what an event looks like, and its way from a worker to the supervisor, who writes.

An event is one line of JSON, or of text; whatever its message holds, it can neither
fake another one nor send a terminal its own orders. Nothing is looked at or written
here that an event does not carry, and events carry no arguments of tasks.
"""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import syslog
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from twisted.logger import (
    FileLogObserver,
    FilteringLogObserver,
    ILogObserver,
    LegacyLogObserverWrapper,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
    formatEventAsClassicLogText,
)
from twisted.python.logfile import LogFile
from twisted.python.reflect import safe_str
from twisted.python.syslog import SyslogObserver
from zope.interface import implementer

__all__ = ["Forwarder", "as_json", "as_text", "from_worker", "observer_for"]

_LONGEST_MESSAGE: Final = 8192
_LONGEST_TRACEBACK: Final = 16384
_LONGEST_VALUE: Final = 1024
_MOST_FIELDS: Final = 32
"""What of one event is sent by a worker, in characters and in number."""

_BURST: Final = 1000
_EVENTS_A_SECOND: Final = 100
"""How many events one worker sends; the supervisor has others to listen to."""

_SAFE_INTEGER: Final = 2**63
_LEGACY: Final = frozenset({"format", "failure", "isError", "printed", "system"})
"""What ``twisted.python.log`` puts into events, for itself."""

_CONTROLS: Final = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What moves a cursor, ends a line or turns the direction of writing; tab and \\n stay."""

_PRIORITIES: Final = {
    LogLevel.debug: syslog.LOG_DEBUG,
    LogLevel.info: syslog.LOG_INFO,
    LogLevel.warn: syslog.LOG_WARNING,
    LogLevel.error: syslog.LOG_ERR,
    LogLevel.critical: syslog.LOG_CRIT,
}


# What an event looks like.


def as_json(event: LogEvent) -> str:
    """
    Write an event as one line of JSON, its line feed included.

    ``time``, ``level``, ``logger`` and ``message`` come first, then the event's own
    fields, flat; ``error`` and ``traceback`` if something was raised.
    """
    moment = datetime.fromtimestamp(event.get("log_time", 0.0), UTC)
    line = {
        "time": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "level": event.get("log_level", LogLevel.info).name,
        "logger": _logger_of(event),
        "message": _clean(_message_of(event)),
    }
    for name, value in _fields_of(event).items():
        line.setdefault(name, value)
    return json.dumps(line) + "\n"


def as_text(event: LogEvent) -> str | None:
    """
    Write an event as twistd does; what follows its first line is indented.

    None if there is nothing to write.
    """
    text = formatEventAsClassicLogText(event)
    return None if text is None else _CONTROLS.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _clean(text: str) -> str:
    """Give text without halves of surrogate pairs, which not every reader of JSON takes."""
    return text.encode(errors="backslashreplace").decode()


def _logger_of(event: LogEvent) -> str:
    """Name who says it; of taskd the room, not the class in it."""
    namespace = safe_str(event.get("log_namespace", ""))
    return ".".join(namespace.split(".")[:2]) if namespace.startswith("taskd.") else namespace


def _message_of(event: LogEvent) -> str:
    """Give the message, without the traceback; a worker's without what stands there for people."""
    text = event.get("log_text")
    return text if isinstance(text, str) else formatEvent(event)


def _fields_of(event: LogEvent) -> dict[str, Any]:
    """Give what an event carries besides its message, as JSON has it."""
    fields = {
        safe_str(name): _plain(value)
        for name, value in event.items()
        if not name.startswith("log_") and name not in _LEGACY
    }
    failure = event.get("log_failure")
    if failure is not None:
        fields.setdefault("error", _plain(f"{failure.type.__name__}: {safe_str(failure.value)}"))
        fields.setdefault("traceback", _clean(safe_str(failure.getTraceback())))
    return fields


def _plain(value: Any) -> Any:
    if value is None or type(value) is bool:
        return value
    if type(value) is int and abs(value) < _SAFE_INTEGER:
        return value
    if type(value) is float and math.isfinite(value):
        return round(value, 6)
    return _clean(value if type(value) is str else safe_str(value))


# From a worker to the supervisor.


class Forwarder:
    """
    Make messages for the supervisor of what is logged in a worker.

    An event takes little room, and of many events some are left out, since the
    supervisor has to listen to all workers; how many is said with the next.

    Args:
        level: The lowest that is sent.
        send: Takes a message; any thread may log.
        about: Tells which task it is that logs, if it is one.
    """

    def __init__(
        self,
        level: str,
        send: Callable[[bytes], None],
        about: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._level = LogLevel.levelWithName(level)
        self._send = send
        self._about = about
        self._room = float(_BURST)
        self._since = 0.0
        self._left_out = 0

    def __call__(self, event: LogEvent) -> None:
        """Send an event (``ILogObserver``)."""
        level = event.get("log_level", LogLevel.info)
        if level < self._level:
            return
        now: float = event.get("log_time", 0.0)
        refill = max(0.0, now - self._since) * _EVENTS_A_SECOND
        self._room, self._since = min(_BURST, self._room + refill), now
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        fields = _fields_of(event)
        if self._left_out:
            fields["dropped"], self._left_out = self._left_out, 0
        if not _logger_of(event).startswith(
            "taskd."
        ):  # what taskd says itself says whom it is about
            fields = {**self._about(), **fields}
        traceback = fields.pop("traceback", None)
        fields = {
            name[:_LONGEST_VALUE]: value[:_LONGEST_VALUE] if type(value) is str else value
            for name, value in list(fields.items())[:_MOST_FIELDS]
        }
        if traceback:
            fields["traceback"] = _middle_out(str(traceback))
        message = {
            "time": now,
            "level": level.name,
            "logger": safe_str(event.get("log_namespace", ""))[:_LONGEST_VALUE],
            "message": _clean(_message_of(event))[:_LONGEST_MESSAGE],
            "fields": fields,
        }
        self._send(b"log %s\n" % json.dumps(message).encode())


def _middle_out(text: str) -> str:
    """Shorten a traceback where it tells least: it begins and ends with what matters."""
    half = _LONGEST_TRACEBACK // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n…\n{text[-half:]}"


def from_worker(number: int, pid: int, message: bytes, kind: str = "worker") -> LogEvent:
    """
    Make an event again of what a ``Forwarder`` has sent.

    Args:
        number: The worker's.
        pid: Its process.
        message: What was sent, without its verb.
        kind: What it is, if it is no worker.

    Returns:
        The event, for ``twisted.logger.globalLogPublisher``.
    """
    told = json.loads(message)
    fields = told["fields"]
    event = {
        **{name: value for name, value in fields.items() if not name.startswith("log_")},
        kind: number,
        "pid": pid,
        "log_time": told["time"],
        "log_level": LogLevel.levelWithName(told["level"]),
        "log_namespace": told["logger"],
        "log_text": told["message"],
        "log_about": _about_text(told["message"], fields),
        "log_format": f"{kind} {{{kind}}}: {{log_text}}{{log_about}}",
    }
    if "traceback" in fields:
        event["log_format"] += "\n{traceback}"
    return event


def _about_text(message: str, fields: Mapping[str, Any]) -> str:
    """Say for people whose task it is, as far as the message does not."""
    said = [f"id {fields['id']}"] if "id" in fields else []
    for name in ("connection", "caller"):
        if name in fields and str(fields[name]) not in message:
            said.append(f"{name} {fields[name]}")
    if "dropped" in fields:
        said.append(f"{fields['dropped']} before it were left out")
    return f" ({', '.join(said)})" if said else ""


# Where it is written.


def observer_for(log_format: str, level: str, twistd: Mapping[str, Any]) -> ILogObserver:
    """
    Make what writes the log, where twistd would have written it.

    Args:
        log_format: ``text`` or ``json``.
        level: The lowest that is written.
        twistd: Its options.

    Returns:
        The observer. A file is open then, and turned over at SIGUSR1, as twistd does it.
    """
    if twistd.get("syslog"):
        observer = _syslog_observer(log_format, twistd.get("prefix", "twisted"))
    else:
        observer = FileLogObserver(_log_file(twistd), as_json if log_format == "json" else as_text)
    lowest = LogLevelFilterPredicate(defaultLogLevel=LogLevel.levelWithName(level))
    return FilteringLogObserver(observer, [lowest])


def _syslog_observer(log_format: str, prefix: str) -> ILogObserver:
    if log_format == "json":
        syslog.openlog(prefix, 0, syslog.LOG_USER)
        return _JsonToSyslog()
    legacy: Any = SyslogObserver(prefix).emit
    return LegacyLogObserverWrapper(legacy)


@implementer(ILogObserver)
class _JsonToSyslog:
    def __call__(self, event: LogEvent) -> None:
        priority = _PRIORITIES.get(event.get("log_level", LogLevel.info), syslog.LOG_INFO)
        syslog.syslog(priority, as_json(event).rstrip("\n"))


def _log_file(twistd: Mapping[str, Any]) -> Any:
    path = twistd.get("logfile")
    if path == "-" and not twistd.get("nodaemon"):
        sys.exit("Daemons cannot log to stdout, exiting!")
    if path == "-" or (twistd.get("nodaemon") and not path):
        return sys.stdout
    file = LogFile.fromFullPath(path or "twistd.log")
    if not signal.getsignal(signal.SIGUSR1):

        def turn_over(*_: object) -> None:
            from twisted.internet import reactor

            reactor.callFromThread(file.rotate)  # type: ignore[attr-defined]

        signal.signal(signal.SIGUSR1, turn_over)
    return file
