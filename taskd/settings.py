"""
What the operator decided: frozen, checked, units in the names.

Settings are made once, by ``tap``, and travel to the zygote and its workers as
JSON. Nothing else reads options or the environment.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Final

from taskd.errors import SettingsError

__all__ = [
    "DEFAULT_MAX_LINE_BYTES",
    "LOG_FORMATS",
    "LOG_LEVELS",
    "SMTP_TLS",
    "Settings",
    "SmtpSettings",
    "check_choice",
    "check_range",
]

DEFAULT_MAX_LINE_BYTES: Final = 1024 * 1024
"""Longest request line. Workerman's Text protocol allows ten times as much."""

SMTP_TLS: Final = ("none", "starttls", "tls")
"""How mail is protected on its way to the mail server."""

LOG_FORMATS: Final = ("text", "json")
"""How the log is written: for people, or one JSON object in a line."""

LOG_LEVELS: Final = ("debug", "info", "warn", "error")
"""What the log can be limited to, from all to least."""

_MODULE: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class SmtpSettings:
    """
    Where ``send_mail`` delivers to.

    Attributes:
        host: The mail server's name or address.
        port: Its port, 1 to 65535.
        tls: One of ``SMTP_TLS``; the server's certificate is always verified.
        user: Login name, or '' to send without a login.
        password: Its password.
        timeout_seconds: Longest wait for one answer of the server, above 0.
    """

    host: str
    port: int
    tls: str = "none"
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)
    timeout_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.host or not 1 <= self.port <= 65535:
            raise SettingsError("--smtp: give HOST:PORT, the port from 1 to 65535")
        check_choice("--smtp-tls", self.tls, SMTP_TLS)
        if self.timeout_seconds <= 0:
            raise SettingsError("--smtp: the timeout must be above 0 seconds")


@dataclass(frozen=True)
class Settings:
    """
    Everything that one daemon was told.

    Attributes:
        port: TCP port, 0 to 65535; 0 lets the kernel choose. None: no port but
            those of *listen*.
        interface: Address to listen on.
        listen: Further places to listen at, as descriptions of Twisted endpoints.
        certificate: Path of the PEM file with the certificate that *port* shows,
            or *tls_port* if there is one; '': they speak no TLS.
        key: Path of the PEM file with its private key.
        tls_port: TCP port that speaks TLS beside a plain *port*, or None.
        client_ca: Path of the PEM file with the authorities whose certificates
            callers over TLS must have, or ''.
        token_file: Path of the file with the tokens that callers show, or ''.
        allow: What each identity may call: pairs of an identity and names, both
            as glob patterns. Empty: everybody may call everything.
        socket_owner: USER, USER:GROUP or :GROUP that Unix sockets are given to, or ''.
        insecure: True: listen on exposed addresses without asking who calls.
        procs: How many workers, 1 to 1000.
        task_modules: Modules that hold tasks, as dotted names or paths of ``.py`` files.
        preload: False: each worker imports the task modules after its fork.
        threads: Blocking tasks that one worker runs at a time, 1 to 100.
        max_line_bytes: Longest request line, from 1024.
        grace_seconds: How long running tasks may go on at a stop, from 0.
        drain_seconds: How long, before that, all goes on and ``taskd.ping`` tells
            of the stop, from 0.
        backlog: How many tasks may wait for a free worker, from 0.
        max_in_flight: Calls that one connection may have in flight, from 1.
        max_connections: Connections that all workers hold together, from 1, or
            None: as many as their file descriptors allow.
        first_line_seconds: How long a connection may stay without a complete
            line, above 0.
        idle_seconds: How long a connection may stay without a request and
            without a task in flight, above 0, or None: for ever.
        max_tasks: Tasks after which a worker is replaced, from 1, or None.
        max_rss_bytes: Resident memory above which a worker is replaced, or None.
        debug: True: a task's traceback is sent to its caller.
        smtp: Where ``send_mail`` delivers to, or None.
        log_format: One of ``LOG_FORMATS``.
        log_level: The lowest level that is logged, one of ``LOG_LEVELS``.
    """

    port: int | None
    interface: str = "127.0.0.1"
    listen: tuple[str, ...] = ()
    certificate: str = ""
    key: str = ""
    tls_port: int | None = None
    client_ca: str = ""
    token_file: str = ""
    allow: tuple[tuple[str, tuple[str, ...]], ...] = ()
    socket_owner: str = ""
    insecure: bool = False
    procs: int = 1
    task_modules: tuple[str, ...] = ()
    preload: bool = True
    threads: int = 1
    max_line_bytes: int = DEFAULT_MAX_LINE_BYTES
    grace_seconds: float = 30.0
    drain_seconds: float = 0.0
    backlog: int = 10_000
    max_in_flight: int = 1024
    max_connections: int | None = None
    first_line_seconds: float = 30.0
    idle_seconds: float | None = None
    max_tasks: int | None = None
    max_rss_bytes: int | None = None
    debug: bool = False
    smtp: SmtpSettings | None = None
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)
        check_range("--tls-port", self.tls_port, 0, 65535)
        self._check_tls()
        check_range("--procs", self.procs, 1, 1000)
        check_range("--threads", self.threads, 1, 100)
        check_range("--max-line", self.max_line_bytes, 1024, 1024**3)
        check_range("--grace", self.grace_seconds, 0, 86400)
        check_range("--drain-seconds", self.drain_seconds, 0, 86400)
        check_range("--backlog", self.backlog, 0, 1_000_000)
        check_range("--max-in-flight", self.max_in_flight, 1, 1_000_000)
        check_range("--max-connections", self.max_connections, 1, 10_000_000)
        check_range("--first-line-timeout", self.first_line_seconds, 0.1, 86400)
        check_range("--idle-timeout", self.idle_seconds, 0.1, 10 * 86400)
        check_range("--max-tasks", self.max_tasks, 1, 10**12)
        if self.max_rss_bytes is not None:
            check_range("--max-rss", self.max_rss_bytes / 2**20, 1, 2**30)
        check_choice("--log-format", self.log_format, LOG_FORMATS)
        check_choice("--log-level", self.log_level, LOG_LEVELS)
        for name in self.task_modules:
            if not name.endswith(".py") and not _MODULE.fullmatch(name):
                raise SettingsError(
                    f"--tasks: {name!r} is neither a module's dotted name nor a path to a .py file"
                )

    def _check_tls(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise SettingsError("--tls and --key: give both, the certificate and its private key")
        if self.tls_port is not None and not self.certificate:
            raise SettingsError("--tls-port is of no use without --tls CERT and --key KEY")
        if self.certificate and self.port is None and self.tls_port is None:
            raise SettingsError(
                "--tls is of no use without a port: give --port, or --tls-port; "
                "an ssl: endpoint of --listen has a certificate of its own"
            )

    def to_json(self) -> dict[str, Any]:
        """Give the settings as plain JSON types, for ``from_json`` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Settings:
        """Make settings again from what ``to_json`` gave."""
        smtp = fields["smtp"]
        return cls(
            **{
                **fields,
                "task_modules": tuple(fields["task_modules"]),
                "listen": tuple(fields["listen"]),
                "allow": tuple((who, tuple(names)) for who, names in fields["allow"]),
                "smtp": SmtpSettings(**smtp) if smtp else None,
            }
        )


def check_range(option: str, value: float | None, least: float, most: float) -> None:
    """
    Check a number that may be left out.

    Raises:
        SettingsError: It is not from *least* to *most*.
    """
    if value is not None and not least <= value <= most:
        raise SettingsError(f"{option}: a number from {least} to {most}, not {value}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Check a word.

    Raises:
        SettingsError: It is none of *choices*.
    """
    if value not in choices:
        raise SettingsError(f"{option}: one of {', '.join(choices)}, not {value!r}")
