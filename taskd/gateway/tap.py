"""``twistd taskd-gateway``: the options, and the service made out of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, ClassVar, Final

from twisted.application.service import IService
from twisted.python import usage

from taskd.errors import SettingsError
from taskd.gateway.origin import Origins
from taskd.gateway.settings import GatewaySettings, rule_of
from taskd.gateway.supervisor import GatewaySupervisor
from taskd.launch import CommandOptions, WritesItsLog, one_line_for_failed_starts
from taskd.notify import sender_to

__all__ = ["Options", "makeService"]

_COMMAND: Final = "taskd-gateway"
_TWISTD_PIDFILE: Final = "twistd.pid"
_DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in fields(GatewaySettings)}


def _number(name: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"--{name}: a number, not {text!r}") from None

    return read


def _text(name: str, field: str, help: str, short: str | None = None) -> list[Any]:  # noqa: A002
    return [name, short, _DEFAULTS[field] or None, help, str]


def _count(
    name: str,
    field: str,
    help: str,  # noqa: A002
    kind: Callable[[str], Any] = int,
    short: str | None = None,
) -> list[Any]:
    return [name, short, _DEFAULTS[field], help, _number(name, kind)]


class Options(CommandOptions):
    """What ``twistd taskd-gateway`` can be told."""

    command = _COMMAND
    synopsis = "[options]"
    longdesc = (
        "Takes calls from browsers, over WebSocket and HTTP, and hands them to taskd; shows at / "
        "what its workers do."
    )

    optParameters: ClassVar[list[list[Any]]] = [
        _count("port", "port", "TCP port to listen on; 0 lets the kernel choose", short="p"),
        _text("interface", "interface", "Address to listen on", "i"),
        _text("tls", "certificate", "PEM file of the certificate to speak TLS with"),
        _text("key", "key", "PEM file of its private key"),
        _count("procs", "procs", "Number of processes that share the port", short="n"),
        _text("tasks-ca", "tasks_ca", "PEM file of the authorities to trust on the way to taskd"),
        _text(
            "tasks-certificate",
            "tasks_certificate",
            "PEM file of the certificate to show to taskd, and its key",
        ),
        _text(
            "tasks-token",
            "tasks_token_file",
            "File with the gateway's own token for taskd, shown for callers who show none",
        ),
        _text(
            "token-file",
            "token_file",
            "File of the tokens that callers must show, IDENTITY:TOKEN in a line",
        ),
        _text("cookie", "cookie", "Name of the cookie that may hold a caller's token"),
        _text(
            "dashboard-token",
            "dashboard_token_file",
            "File of the tokens that open the dashboard and the metrics",
        ),
        _count("max-message", "max_message_bytes", "Longest message or body, in bytes"),
        _count("max-rate", "max_rate", "Messages a second of one WebSocket", float),
        _count("max-connections", "max_connections", "WebSockets of one process"),
        _count("max-in-flight", "max_in_flight", "Calls in flight on one WebSocket"),
        _count("max-calls", "max_calls", "Calls in flight of one process, whoever waits"),
        _count("ping", "ping_seconds", "Seconds between signs of life, and to wait for one", float),
        _count("grace", "grace_seconds", "Seconds that calls in flight get at a stop", float),
        _text("log-format", "log_format", "How the log is written: text or json"),
        _text("log-level", "log_level", "The lowest level logged: debug, info, warn, error"),
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["keep-tokens", None, "Do not pass callers' tokens on to taskd"],
        ["no-origin-needed", None, "Let programs, which name no origin, open WebSockets"],
        ["no-dashboard", None, "Show no page"],
        ["insecure", None, "Listen where other machines can call, without asking who calls"],
    ]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self["tasks"] = []
        self["allow"] = []
        self["origin"] = []

    def opt_tasks(self, endpoint: str) -> None:
        """Where taskd is, such as tcp:127.0.0.1:12345 (default) or tls:HOST:PORT; repeatable."""
        self["tasks"].append(endpoint)

    def opt_allow(self, rule: str) -> None:
        """
        Let browsers call FUNCTION,... or, with a token, IDENTITY=FUNCTION,...

        Both are glob patterns; it can be repeated. [default: echo]
        """
        try:
            self["allow"].append(rule_of(rule))
        except SettingsError as error:
            raise usage.UsageError(str(error)) from None

    def opt_origin(self, origin: str) -> None:
        """Let this origin's pages call, such as https://example.org; repeatable."""
        self["origin"].append(origin)

    def postOptions(self) -> None:
        """Check everything that can be checked before the gateway starts."""
        missing = [name for name in ("autobahn", "prometheus_client") if find_spec(name) is None]
        if missing:
            raise usage.UsageError(
                f"{' and '.join(missing)} must be installed: pip install 'taskd[web]'"
            )
        if self.parent is not None and self.parent["pidfile"] == _TWISTD_PIDFILE:
            # The daemon beside it, started in the same directory, has that one.
            self.parent["pidfile"] = f"{_COMMAND}.pid"
        try:
            self.settings = _settings_from(self)
            Origins(self.settings.origins, needs_one=self.settings.needs_origin)
            self.check_log()
        except SettingsError as error:
            raise usage.UsageError(str(error)) from None


def _settings_from(options: Mapping[str, Any]) -> GatewaySettings:
    return GatewaySettings(
        port=options["port"],
        interface=options["interface"],
        certificate=_path(options["tls"]),
        key=_path(options["key"]),
        insecure=bool(options["insecure"]),
        procs=options["procs"],
        tasks=tuple(options["tasks"]) or _DEFAULTS["tasks"],
        tasks_ca=_path(options["tasks-ca"]),
        tasks_certificate=_path(options["tasks-certificate"]),
        tasks_token_file=_path(options["tasks-token"]),
        keep_tokens=bool(options["keep-tokens"]),
        token_file=_path(options["token-file"]),
        cookie=options["cookie"] or "",
        allow=tuple(options["allow"]) or _DEFAULTS["allow"],
        origins=tuple(options["origin"]),
        needs_origin=not options["no-origin-needed"],
        dashboard=not options["no-dashboard"],
        dashboard_token_file=_path(options["dashboard-token"]),
        max_message_bytes=options["max-message"],
        max_rate=options["max-rate"],
        max_connections=options["max-connections"],
        max_in_flight=options["max-in-flight"],
        max_calls=options["max-calls"],
        ping_seconds=options["ping"],
        grace_seconds=options["grace"],
        log_format=options["log-format"],
        log_level=options["log-level"],
    )


def _path(text: str | None) -> str:
    """Say where a file is, whatever directory twistd goes to; '' is none."""
    return os.path.abspath(text) if text else ""


def makeService(options: Options) -> IService:
    """
    Build the gateway; twistd starts it.

    Args:
        options: What the operator has written, parsed.

    Returns:
        The service.
    """
    from twisted.internet import reactor

    sys.excepthook = one_line_for_failed_starts(_COMMAND, sys.excepthook)
    say = sender_to(os.environ.pop("NOTIFY_SOCKET", ""))
    gateway = _Gateway(options.settings, reactor, say or (lambda _: False))
    gateway.observer = options.observer
    return gateway


class _Gateway(WritesItsLog, GatewaySupervisor):
    """The supervisor, which has its application write the log as it was told."""
