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
from typing import Any, ClassVar, Final, NoReturn, cast

from twisted.application.service import IService
from twisted.logger import (
    ILogObserver,
    LogEvent,
    LogLevel,
    formatEvent,
    globalLogPublisher,
)
from twisted.python import usage

from taskd.checking import check
from taskd.credentials import read_secret
from taskd.endpoints import listeners_from
from taskd.errors import SettingsError, StartFailed
from taskd.launch import CommandOptions, WritesItsLog, one_line_for_failed_starts
from taskd.notify import Notifier
from taskd.options import OPTIONS, Option, read_file
from taskd.ports import Ports
from taskd.settings import Settings, SmtpSettings
from taskd.supervisor import Supervisor

__all__ = ["Options", "makeService", "settings_from"]

_PORT: Final = 12345
_PROCS_PER_CORE: Final = 10
_TOKEN_CREDENTIAL: Final = "taskd.token"  # noqa: S105 (its name)
_SMTP_LOGIN_VARIABLE: Final = "TASKD_SMTP_LOGIN"


def _reader(option: Option) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not text:
            raise ValueError(f"--{option.name}: a value is needed; leave it out for none")
        try:
            return option.kind(text)
        except ValueError:
            raise ValueError(f"--{option.name}: a number, not {text!r}") from None

    return read


class Options(CommandOptions):
    """
    What ``twistd taskd`` can be told.

    The table of options is ``options.OPTIONS``. What stands on the command line wins
    over what a file says; of a flag that the file sets there is no opposite.
    """

    command = "taskd"
    synopsis = "[options]"
    longdesc = (
        "A pool of worker processes that share one port and run tasks. A task is asked for by "
        'one line of JSON, such as {"function": "echo", "args": ["hello"]}, and answered by one.'
    )

    optParameters: ClassVar[list[list[Any]]] = [
        [option.name, option.short, None, option.usage, _reader(option)]
        for option in OPTIONS
        if option.kind in (int, float, str)
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["check", None, "Say whether the daemon could start with all this, and exit"],
        *([option.name, None, option.usage] for option in OPTIONS if option.kind is bool),
    ]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.docs.update({option.name: option.usage for option in OPTIONS})
        self["config"] = None
        self._from_file: set[str] = set()
        self.update({option.name: None for option in OPTIONS})

    def opt_config(self, path: str) -> None:
        """Take what is not said here from a TOML file; its keys are these options' names."""
        if self["config"] is not None:
            raise usage.UsageError(f"--config {path}: there is one already, {self['config']}")
        self["config"] = path

    def opt_tasks(self, modules: str) -> None:
        """Add modules of tasks."""
        names = [name.strip() for name in modules.split(",") if name.strip()]
        self["tasks"] = [*(self["tasks"] or ()), *names]

    def opt_listen(self, endpoint: str) -> None:
        """Add a place to listen at."""
        self["listen"] = [*(self["listen"] or ()), endpoint]

    def opt_allow(self, rule: str) -> None:
        """Add a rule."""
        identity, equals, names = rule.rpartition("=")
        patterns = tuple(name.strip() for name in names.split(",") if name.strip())
        if not (equals and identity.strip() and patterns):
            raise usage.UsageError(
                f"--allow {rule}: give IDENTITY=FUNCTION,..., such as web=send_mail,echo"
            )
        self["allow"] = [*(self["allow"] or ()), (identity.strip(), patterns)]

    def postOptions(self) -> None:
        """Check everything that can be checked before the daemon starts."""
        try:
            self._complete()
            self.settings = settings_from(self, os.environ)
            self.listeners = listeners_from(self.settings)
            self.check_log()
        except SettingsError as error:
            raise usage.UsageError(self._with_its_file(str(error))) from None
        if self["check"]:
            self._check()

    def _complete(self) -> None:
        """Take what is not on the command line from the file, or else by default."""
        said = read_file(self["config"]) if self["config"] is not None else {}
        for option in OPTIONS:
            if self[option.name] is None:
                self[option.name] = said.get(option.name, option.default)
                self._from_file.update({option.name} & said.keys())

    def _with_its_file(self, told: str) -> str:
        """Name the file, not an option, for what stands in the file."""
        name = told.removeprefix("--").partition(" ")[0].rstrip(":")
        if told.startswith("--") and name in self._from_file:
            return f"{self['config']}: {told.removeprefix('--')}"
        return told

    def _check(self) -> NoReturn:
        """Say whether the daemon could start, and exit."""
        warnings: list[str] = []

        def take(event: LogEvent) -> None:
            if event.get("log_level", LogLevel.info) >= LogLevel.warn:
                warnings.append(formatEvent(event))

        observe = cast(ILogObserver, take)
        globalLogPublisher.addObserver(observe)
        try:
            good = check(self.settings, Ports(self.settings, self.listeners))
        except StartFailed as error:
            raise SystemExit(f"twistd taskd: {error}") from None
        finally:
            globalLogPublisher.removeObserver(observe)
        for warning in warnings:
            print(f"taskd: {warning}", file=sys.stderr)  # noqa: T201
        print(f"taskd: {good}")  # noqa: T201
        raise SystemExit(0)


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
    modules = options["tasks"] or ()
    if not modules and os.path.isfile("tasks.py"):
        modules = ["tasks.py"]
    port = options["port"]
    listen = tuple(options["listen"] or ())
    if port is None and not listen:
        port = _PORT
    return Settings(
        port=port,
        interface=options["interface"],
        listen=listen,
        certificate=_path(options["tls"]),
        key=_path(options["key"]),
        tls_port=options["tls-port"],
        client_ca=_path(options["client-ca"]),
        token_file=_path(options["token-file"]) or _token_credential(environ),
        allow=tuple(options["allow"] or ()),
        socket_owner=options["socket-owner"] or "",
        insecure=bool(options["insecure"]),
        procs=(os.cpu_count() or 1) * _PROCS_PER_CORE
        if options["procs"] is None
        else options["procs"],
        task_modules=tuple(dict.fromkeys(modules)),
        preload=not options["no-preload"],
        threads=options["threads"],
        max_line_bytes=options["max-line"],
        grace_seconds=options["grace"],
        drain_seconds=options["drain-seconds"],
        backlog=options["backlog"],
        max_in_flight=options["max-in-flight"],
        max_connections=options["max-connections"],
        first_line_seconds=options["first-line-timeout"],
        idle_seconds=options["idle-timeout"],
        max_tasks=options["max-tasks"],
        max_rss_bytes=_bytes_of(options["max-rss"]),
        debug=bool(options["debug"]),
        log_format=options["log-format"],
        log_level=options["log-level"],
        smtp=_smtp_from(options, environ),
    )


def _path(text: str | None) -> str:
    """Say where a file is, whatever directory twistd goes to; '' is none."""
    return os.path.abspath(text) if text else ""


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
            login = read_secret(options["smtp-login"], "--smtp-login").strip()
        except StartFailed as error:
            raise SettingsError(str(error)) from None
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

    sys.excepthook = one_line_for_failed_starts("taskd", sys.excepthook)
    daemon = _Daemon(
        options.settings,
        Ports(options.settings, options.listeners),
        reactor,
        notifier=Notifier.take(os.environ, os.getpid()),
    )
    daemon.observer = options.observer
    return daemon


class _Daemon(WritesItsLog, Supervisor):
    """The supervisor, which has its application write the log as it was told."""
