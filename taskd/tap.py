"""
``twistd taskd``: the options, and the service made out of them.

The one place that knows everyone. It names the reactor and reads the
environment; everything below it is told.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Final

from twisted.application.service import IService
from twisted.logger import Logger
from twisted.python import usage

from taskd import __version__
from taskd.endpoints import listeners_from
from taskd.errors import SettingsError, StartFailed
from taskd.ports import Ports
from taskd.settings import DEFAULT_MAX_LINE_BYTES, SMTP_TLS, Settings, SmtpSettings
from taskd.supervisor import Supervisor

__all__ = ["Options", "makeService", "settings_from"]

_PORT: Final = 12345
_PROCS_PER_CORE: Final = 10
_TOKEN_CREDENTIAL: Final = "taskd.token"  # noqa: S105 (its name)
_SMTP_LOGIN_VARIABLE: Final = "TASKD_SMTP_LOGIN"


def _number(option: str, kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"--{option}: a number, not {text!r}") from None

    return read


class Options(usage.Options):
    """What ``twistd taskd`` can be told."""

    synopsis = "[options]"
    longdesc = (
        "A pool of worker processes that share one port and run tasks. A task is asked for by "
        'one line of JSON, such as {"function": "echo", "args": ["hello"]}, and answered by one.'
    )

    optParameters: ClassVar[list[list[Any]]] = [
        [
            "port",
            "p",
            None,
            f"TCP port to listen on; 0 lets the kernel choose [default: {_PORT}, "
            "unless --listen says where]",
            _number("port", int),
        ],
        ["interface", "i", "127.0.0.1", "Address to listen on"],
        [
            "tls",
            None,
            None,
            "PEM file of the certificate to speak TLS with, on --tls-port or else on --port",
        ],
        ["key", None, None, "PEM file of its private key"],
        [
            "tls-port",
            None,
            None,
            "TCP port that speaks TLS, beside --port",
            _number("tls-port", int),
        ],
        [
            "client-ca",
            None,
            None,
            "PEM file of the authorities that callers over TLS must have a certificate from",
        ],
        [
            "token-file",
            None,
            None,
            "File of the tokens that callers must show, IDENTITY:TOKEN in a line "
            f"[default: {_TOKEN_CREDENTIAL} among systemd's credentials, if there is one]",
        ],
        ["socket-owner", None, None, "USER, USER:GROUP or :GROUP that Unix sockets are given to"],
        [
            "procs",
            "n",
            None,
            "Number of worker processes [default: 10 x the cores]",
            _number("procs", int),
        ],
        [
            "threads",
            None,
            1,
            "Blocking tasks that one worker runs at a time",
            _number("threads", int),
        ],
        [
            "max-line",
            None,
            DEFAULT_MAX_LINE_BYTES,
            "Longest request line, in bytes",
            _number("max-line", int),
        ],
        [
            "grace",
            None,
            30.0,
            "Seconds that running tasks get when the daemon stops",
            _number("grace", float),
        ],
        [
            "backlog",
            None,
            10_000,
            "Tasks that may wait for a free worker; beyond it callers are told to come back",
            _number("backlog", int),
        ],
        [
            "max-in-flight",
            None,
            1024,
            "Calls in flight on one connection, beyond which it is not read from",
            _number("max-in-flight", int),
        ],
        [
            "max-connections",
            None,
            None,
            "Connections of all workers together [default: as many as file descriptors allow]",
            _number("max-connections", int),
        ],
        [
            "first-line-timeout",
            None,
            30.0,
            "Seconds that a new connection may take to send a complete line",
            _number("first-line-timeout", float),
        ],
        [
            "idle-timeout",
            None,
            None,
            "Seconds after which a connection without a task in flight is closed [default: never]",
            _number("idle-timeout", float),
        ],
        [
            "max-tasks",
            None,
            None,
            "Tasks after which a worker is replaced [default: never]",
            _number("max-tasks", int),
        ],
        [
            "max-rss",
            None,
            None,
            "Resident memory in MiB above which a worker is replaced [default: never]",
            _number("max-rss", float),
        ],
        ["smtp", None, None, "Mail server of send_mail, as HOST:PORT"],
        ["smtp-tls", None, None, f"Protection of mail: {', '.join(SMTP_TLS)} [default: none]"],
        ["smtp-login", None, None, f"File with USER:PASSWORD [or set {_SMTP_LOGIN_VARIABLE}]"],
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["no-preload", None, "Have each worker import the task modules after its fork"],
        ["debug", None, "Send callers the traceback of a task that failed"],
        ["insecure", None, "Listen where other machines can call, without asking who calls"],
    ]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["tasks"] = []
        self["listen"] = []
        self["allow"] = []

    def opt_tasks(self, modules: str) -> None:
        """Run the tasks of a module (dotted name, or path of a .py file); repeatable."""
        self["tasks"].extend(name.strip() for name in modules.split(",") if name.strip())

    def opt_listen(self, endpoint: str) -> None:
        """Listen there too: a server endpoint of Twisted (tcp: ssl: unix: systemd:); repeatable."""
        self["listen"].append(endpoint)

    def opt_allow(self, rule: str) -> None:
        """Let IDENTITY=FUNCTION,... (glob patterns) call these and no others; repeatable."""
        identity, equals, names = rule.rpartition("=")
        patterns = tuple(name.strip() for name in names.split(",") if name.strip())
        if not (equals and identity.strip() and patterns):
            raise usage.UsageError(
                f"--allow {rule}: give IDENTITY=FUNCTION,..., such as web=send_mail,echo"
            )
        self["allow"].append((identity.strip(), patterns))

    def opt_version(self) -> None:
        """Show taskd's version and exit."""
        print("taskd", __version__)  # noqa: T201
        sys.exit(0)

    def parseOptions(self, options: Any = None) -> None:
        """Parse, and say in one line what is wrong; the list of all options would bury it."""
        try:
            super().parseOptions(options)  # type: ignore[no-untyped-call]
        except usage.UsageError as error:
            told = str(error).removeprefix("Parameter type enforcement failed: ")
            raise SystemExit(f"twistd taskd: {told}; see twistd taskd --help") from None

    def postOptions(self) -> None:
        """Check everything that can be checked before the daemon starts."""
        try:
            self.settings = settings_from(self, os.environ)
            self.listeners = listeners_from(self.settings)
        except SettingsError as error:
            raise usage.UsageError(str(error)) from None


def settings_from(options: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """
    Make settings out of parsed options and the environment.

    Args:
        options: What ``Options`` has parsed.
        environ: The environment.

    Returns:
        The settings, checked.

    Raises:
        SettingsError: A value cannot be, or is not safe.
    """
    modules = options["tasks"]
    if not modules and os.path.isfile("tasks.py"):
        modules = ["tasks.py"]
    port = options["port"]
    if port is None and not options["listen"]:
        port = _PORT
    return Settings(
        port=port,
        interface=options["interface"],
        listen=tuple(options["listen"]),
        certificate=options["tls"] or "",
        key=options["key"] or "",
        tls_port=options["tls-port"],
        client_ca=options["client-ca"] or "",
        token_file=options["token-file"] or _token_credential(environ),
        allow=tuple(options["allow"]),
        socket_owner=options["socket-owner"] or "",
        insecure=bool(options["insecure"]),
        procs=(os.cpu_count() or 1) * _PROCS_PER_CORE
        if options["procs"] is None
        else options["procs"],
        task_modules=tuple(modules),
        preload=not options["no-preload"],
        threads=options["threads"],
        max_line_bytes=options["max-line"],
        grace_seconds=options["grace"],
        backlog=options["backlog"],
        max_in_flight=options["max-in-flight"],
        max_connections=options["max-connections"],
        first_line_seconds=options["first-line-timeout"],
        idle_seconds=options["idle-timeout"],
        max_tasks=options["max-tasks"],
        max_rss_bytes=_bytes_of(options["max-rss"]),
        debug=bool(options["debug"]),
        smtp=_smtp_from(options, environ),
    )


def _bytes_of(mib: Any) -> Any:
    """Give MiB in bytes; what is no integer is left to the settings, which refuse it."""
    if mib is None:
        return None
    size = mib * 2**20
    return int(size) if math.isfinite(size) else size


def _token_credential(environ: Mapping[str, str]) -> str:
    """Name the file of tokens that systemd passes (LoadCredential=), or give ''."""
    path = os.path.join(environ.get("CREDENTIALS_DIRECTORY", ""), _TOKEN_CREDENTIAL)
    return path if os.path.isabs(path) and os.path.exists(path) else ""


def _smtp_from(options: Mapping[str, Any], environ: Mapping[str, str]) -> SmtpSettings | None:
    if not options["smtp"]:
        for option in ("smtp-tls", "smtp-login"):
            if options[option]:
                raise SettingsError(f"--{option} is of no use without --smtp HOST:PORT")
        return None
    host, _, port = options["smtp"].rpartition(":")
    if not port.isdecimal():
        raise SettingsError(f"--smtp {options['smtp']}: give HOST:PORT, such as localhost:25")
    login = environ.get(_SMTP_LOGIN_VARIABLE, "")
    if options["smtp-login"]:
        try:
            with open(options["smtp-login"], encoding="utf-8") as file:
                login = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise SettingsError(f"--smtp-login {options['smtp-login']}: {why}") from None
    user, colon, password = login.partition(":")
    if login and not (user and colon):
        source = (
            f"--smtp-login {options['smtp-login']}"
            if options["smtp-login"]
            else _SMTP_LOGIN_VARIABLE
        )
        raise SettingsError(f"{source}: the login for the mail server must be USER:PASSWORD")
    return SmtpSettings(
        host=host.strip("[]"),
        port=int(port),
        tls=options["smtp-tls"] or "none",
        user=user,
        password=password,
    )


def makeService(options: Options) -> IService:
    """
    Build the daemon; twistd starts it.

    Args:
        options: What the operator has written, parsed.

    Returns:
        The service.
    """
    from twisted.internet import reactor

    sys.excepthook = _one_line_for_failed_starts(sys.excepthook)
    return Supervisor(options.settings, Ports(options.settings, options.listeners), reactor)


_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _one_line_for_failed_starts(previous: _Hook) -> _Hook:
    """
    Make twistd end with one line, instead of a traceback, when the daemon cannot start.

    twistd lets the exception through, so that its own cleaning up is done and
    the exit status is 1; only what is shown is left to us.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, StartFailed):
            previous(kind, error, trace)
            return
        print(f"twistd taskd: {error}", file=sys.__stderr__)
        if os.path.samestat(os.fstat(2), os.stat(os.devnull)):
            # A daemon has no terminal any more, and twistd says to look at the log.
            Logger(namespace="taskd").critical("cannot start: {why}", why=error)

    return hook
