"""
What the operator of a gateway decided: frozen, checked, units in the names.

Settings are made once, by ``tap``, and travel to the gateway's processes as JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from taskd.errors import SettingsError
from taskd.settings import LOG_FORMATS, LOG_LEVELS, check_choice, check_range

__all__ = ["ALLOWED_BY_DEFAULT", "FIGURES_FD", "LISTENING_FD", "GatewaySettings", "rule_of"]

ALLOWED_BY_DEFAULT: Final = (("*", ("echo",)),)
"""What a browser may call before the operator has said anything."""

FIGURES_FD: Final = 3
LISTENING_FD: Final = 4
"""Where the supervisor puts what it passes to a process."""

_EVERYBODY: Final = "*"


@dataclass(frozen=True)
class GatewaySettings:
    """
    Everything that one gateway was told.

    Attributes:
        port: TCP port, 0 to 65535; 0 lets the kernel choose.
        interface: Address to listen on.
        certificate: Path of the PEM file with the certificate to show, or '': no TLS.
        key: Path of the PEM file with its private key.
        insecure: True: listen on exposed addresses without asking who calls.
        procs: How many processes share the port, 1 to 100.
        tasks: Where the daemons are, as descriptions of Twisted's client endpoints.
        tasks_ca: Path of a PEM file with the authorities to trust on the way there, or ''.
        tasks_certificate: Path of a PEM file with the certificate and key to show there, or ''.
        tasks_token_file: Path of the file with the gateway's own token there, or ''.
        keep_tokens: True: the callers' tokens are not passed on to the daemons.
        token_file: Path of the file with the tokens that callers show, or ''.
        cookie: Name of the cookie that may hold a token, or ''.
        allow: What each identity may call: pairs of an identity and names, both
            as glob patterns.
        origins: Further origins whose pages may call, such as ``https://example.org``.
        needs_origin: False: what names no origin, as programs do, may open WebSockets.
        dashboard: False: there is no page, and the daemons are not asked for it.
        dashboard_token_file: Path of the file with the tokens for the metrics and the
            page, or ''.
        max_message_bytes: Longest message, and longest body of a request, from 1024.
        max_rate: Messages a second that one connection may send, above 0.
        max_connections: WebSockets that one process holds, from 1.
        max_in_flight: Calls that one WebSocket may have in flight, from 1.
        max_calls: Calls that one process may have in flight, whoever waits for them, from 1.
        ping_seconds: How often a WebSocket is asked for a sign of life, and how long
            it may take, above 0.
        grace_seconds: How long calls in flight may go on at a stop, from 0.
        log_format: One of ``LOG_FORMATS``.
        log_level: The lowest level that is logged, one of ``LOG_LEVELS``.
    """

    port: int = 8080
    interface: str = "127.0.0.1"
    certificate: str = ""
    key: str = ""
    insecure: bool = False
    procs: int = 1
    tasks: tuple[str, ...] = ("tcp:127.0.0.1:12345",)
    tasks_ca: str = ""
    tasks_certificate: str = ""
    tasks_token_file: str = ""
    keep_tokens: bool = False
    token_file: str = ""
    cookie: str = ""
    allow: tuple[tuple[str, tuple[str, ...]], ...] = ALLOWED_BY_DEFAULT
    origins: tuple[str, ...] = ()
    needs_origin: bool = True
    dashboard: bool = True
    dashboard_token_file: str = ""
    max_message_bytes: int = 1024 * 1024
    max_rate: float = 100.0
    max_connections: int = 10_000
    max_in_flight: int = 64
    max_calls: int = 2000
    ping_seconds: float = 20.0
    grace_seconds: float = 30.0
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_range("--port", self.port, 0, 65535)
        check_range("--procs", self.procs, 1, 100)
        check_range("--max-message", self.max_message_bytes, 1024, 2**30)
        check_range("--max-rate", self.max_rate, 0.1, 1_000_000)
        check_range("--max-connections", self.max_connections, 1, 1_000_000)
        check_range("--max-in-flight", self.max_in_flight, 1, 100_000)
        check_range("--max-calls", self.max_calls, 1, 100_000)
        check_range("--ping", self.ping_seconds, 0.1, 86400)
        check_range("--grace", self.grace_seconds, 0, 86400)
        check_choice("--log-format", self.log_format, LOG_FORMATS)
        check_choice("--log-level", self.log_level, LOG_LEVELS)
        if bool(self.certificate) != bool(self.key):
            raise SettingsError("--tls and --key: give both, the certificate and its private key")
        if not self.tasks:
            raise SettingsError("--tasks: say where the daemon is, such as tcp:127.0.0.1:12345")
        is_tls = all(endpoint.startswith("tls:") for endpoint in self.tasks)
        if (self.tasks_ca or self.tasks_certificate) and not is_tls:
            raise SettingsError(
                "--tasks-ca and --tasks-certificate are for TLS: let each --tasks begin with tls:"
            )
        named = [identity for identity, _ in self.allow if identity.strip("*")]
        if named and not self.token_file:
            raise SettingsError(
                f"--allow {named[0]}=…: nobody has an identity without --token-file; "
                "a rule for everybody is --allow FUNCTION,..."
            )
        if self.cookie and not self.token_file:
            raise SettingsError(
                "--cookie is of no use without --token-file, which knows its values"
            )
        if self.keep_tokens and not self.token_file:
            raise SettingsError("--keep-tokens is of no use without --token-file")

    def to_json(self) -> dict[str, Any]:
        """Give the settings as plain JSON types, for ``from_json`` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GatewaySettings:
        """Make settings again from what ``to_json`` gave."""
        return cls(
            **{
                **fields,
                "tasks": tuple(fields["tasks"]),
                "origins": tuple(fields["origins"]),
                "allow": tuple((who, tuple(names)) for who, names in fields["allow"]),
            }
        )


def rule_of(text: str) -> tuple[str, tuple[str, ...]]:
    """
    Read one ``--allow``: ``FUNCTION,...`` for everybody, or ``IDENTITY=FUNCTION,...``.

    Raises:
        SettingsError: It is neither.
    """
    identity, equals, names = text.rpartition("=")
    patterns = tuple(name.strip() for name in names.split(",") if name.strip())
    if not patterns or (equals and not identity.strip()):
        raise SettingsError(
            f"--allow {text}: give FUNCTION,... or IDENTITY=FUNCTION,..., such as send_mail,echo"
        )
    return identity.strip() or _EVERYBODY, patterns
