"""
What the operator can say: one table of options, for the command line and for a file.

The file is TOML; its keys are the options' names. What cannot be is refused with the
file and the key. Defaults are those of ``settings``.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeGuard

from taskd.errors import SettingsError
from taskd.settings import LOG_FORMATS, LOG_LEVELS, SMTP_TLS, Settings, SmtpSettings

__all__ = ["OPTIONS", "Option", "read_file", "rule_of"]

_DEFAULTS: Final = {field.name: field.default for field in fields(Settings)}
_SMTP_DEFAULTS: Final = {field.name: field.default for field in fields(SmtpSettings)}


@dataclass(frozen=True)
class Option:
    """
    One option.

    Attributes:
        name: As it is written behind ``--``, and in the file.
        help: What it is, for people.
        kind: ``int``, ``float``, ``str``, ``bool`` (a flag), ``list`` (it may be
            repeated) or ``dict`` (so may this, for a name each).
        default: What counts if it is not given; None: nothing, or for a flag no.
        unset: What is so if it is not given, where the default does not say it.
        short: Its letter, or None.
        is_path: True: a relative path, in a file, is relative to the file's directory.
    """

    name: str
    help: str
    kind: type = str
    default: Any = None
    unset: str = ""
    short: str | None = None
    is_path: bool = False

    @property
    def usage(self) -> str:
        """Give what ``--help`` says."""
        shown = self.unset
        if not shown and self.default is not None:
            shown = str(self.default)
        return f"{self.help} [default: {shown}]" if shown else self.help


OPTIONS: Final = (
    Option(
        "port",
        "TCP port to listen on; 0 lets the kernel choose",
        int,
        unset="12345, unless --listen says where",
        short="p",
    ),
    Option("interface", "Address to listen on", default=_DEFAULTS["interface"], short="i"),
    Option(
        "listen",
        "Listen there too: a server endpoint of Twisted (tcp: ssl: unix: systemd:); repeatable.",
        list,
    ),
    Option("socket-owner", "USER, USER:GROUP or :GROUP that Unix sockets are given to"),
    Option(
        "tls",
        "PEM file of the certificate to speak TLS with, on --tls-port or else on --port",
        is_path=True,
    ),
    Option("key", "PEM file of its private key", is_path=True),
    Option("tls-port", "TCP port that speaks TLS, beside --port", int),
    Option(
        "client-ca",
        "PEM file of the authorities that callers over TLS must have a certificate from",
        is_path=True,
    ),
    Option(
        "token-file",
        "File of the tokens that callers must show, IDENTITY:TOKEN in a line",
        unset="taskd.token among systemd's credentials, if there is one",
        is_path=True,
    ),
    Option(
        "allow",
        "Let IDENTITY=FUNCTION,... (glob patterns) call these and no others; repeatable.",
        dict,
    ),
    Option("insecure", "Listen where other machines can call, without asking who calls", bool),
    Option(
        "tasks",
        "Run the tasks of a module (dotted name, or path of a .py file); repeatable.",
        list,
        unset="tasks.py in the working directory, if there is one",
        is_path=True,
    ),
    Option(
        "procs",
        "Number of worker processes",
        int,
        unset="10 x the cores",
        short="n",
    ),
    Option(
        "threads",
        "Blocking tasks that one worker runs at a time",
        int,
        _DEFAULTS["threads"],
    ),
    Option("no-preload", "Have each worker import the task modules after its fork", bool),
    Option("max-line", "Longest request line, in bytes", int, _DEFAULTS["max_line_bytes"]),
    Option(
        "grace",
        "Seconds that running tasks get when the daemon stops",
        float,
        _DEFAULTS["grace_seconds"],
    ),
    Option(
        "drain-seconds",
        "Seconds that all goes on at a stop before that, while taskd.ping says draining",
        float,
        _DEFAULTS["drain_seconds"],
    ),
    Option(
        "backlog",
        "Tasks that may wait for a free worker; beyond it callers are told to come back",
        int,
        _DEFAULTS["backlog"],
    ),
    Option(
        "max-in-flight",
        "Calls in flight on one connection, beyond which it is not read from",
        int,
        _DEFAULTS["max_in_flight"],
    ),
    Option(
        "max-connections",
        "Connections of all workers together",
        int,
        unset="as many as file descriptors allow",
    ),
    Option(
        "first-line-timeout",
        "Seconds that a new connection may take to send a complete line",
        float,
        _DEFAULTS["first_line_seconds"],
    ),
    Option(
        "idle-timeout",
        "Seconds after which a connection without a task in flight is closed",
        float,
        unset="never",
    ),
    Option("max-tasks", "Tasks after which a worker is replaced", int, unset="never"),
    Option(
        "max-rss",
        "Resident memory in MiB above which a worker is replaced",
        float,
        unset="never",
    ),
    Option("debug", "Send callers the traceback of a task that failed", bool),
    Option(
        "log-format",
        f"How the log is written: {' or '.join(LOG_FORMATS)}",
        default=_DEFAULTS["log_format"],
    ),
    Option(
        "log-level",
        f"The lowest level that is logged: {', '.join(LOG_LEVELS)}",
        default=_DEFAULTS["log_level"],
    ),
    Option("smtp", "Mail server of send_mail, as HOST:PORT"),
    Option(
        "smtp-tls",
        f"Protection of mail: {', '.join(SMTP_TLS)}",
        unset=str(_SMTP_DEFAULTS["tls"]),
    ),
    Option(
        "smtp-login",
        "File with USER:PASSWORD",
        unset="the environment's TASKD_SMTP_LOGIN, if it is set",
        is_path=True,
    ),
)
"""All that can be said on the command line and in a file."""

_EXPECTED: Final = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "an array of strings",
    dict: 'a table of arrays, such as web = ["send_mail", "echo"]',
}


def read_file(path: str) -> dict[str, Any]:
    """
    Read a file of options.

    Args:
        path: Where it is.

    Returns:
        What it says, by the options' names, in the form that the command line gives.

    Raises:
        SettingsError: It cannot be read, is no TOML, or says what cannot be.
    """
    try:
        with open(path, "rb") as file:
            said = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"--config {path}: {why}") from None
    known = {option.name: option for option in OPTIONS}
    directory = os.path.dirname(os.path.abspath(path))
    taken = {}
    for key, value in said.items():
        if key not in known:
            raise SettingsError(f"{path}: there is no option {key!a}{_hint(key, value)}")
        taken[key] = _value_of(known[key], value, path, directory)
    return taken


def _hint(key: str, value: Any) -> str:
    """Help where a key was meant for another place, or for a command line."""
    names = {option.name for option in OPTIONS}
    if key.replace("_", "-") in names:
        return f"; it is written {key.replace('_', '-')}"
    if isinstance(value, Mapping) and names & value.keys():
        return f"; what stands under [{key}] belongs above every table"
    return ""


def _value_of(option: Option, value: Any, path: str, directory: str) -> Any:
    def refuse() -> SettingsError:
        try:
            shown = json.dumps(value)
        except (TypeError, ValueError):  # TOML has dates, too
            shown = str(value)
        return SettingsError(
            f"{path}: {option.name}: {_EXPECTED[option.kind]} is needed, not {shown:.100}"
        )

    if option.kind is dict:
        if not isinstance(value, dict):
            raise refuse()
        if not value:
            raise SettingsError(f"{path}: [allow] is empty: leave it out, or say who may call what")
        return [rule_of(who, names, f"{path}: allow") for who, names in value.items()]
    if option.kind is list:
        if not _is_strings(value):
            raise refuse()
        return [_resolve(option, text, directory) for text in value]
    if option.kind is float and type(value) is int:
        return float(value) if abs(value) < 2**53 else value
    if type(value) is not option.kind:
        raise refuse()
    if value == "":
        raise SettingsError(f"{path}: {option.name}: a value is needed; leave it out for none")
    return _resolve(option, str(value), directory) if option.kind is str else value


def _is_strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _resolve(option: Option, text: str, directory: str) -> str:
    """Give the path that a file means; what is no path stays as it is."""
    is_module = option.kind is list and not text.endswith(".py")
    return os.path.join(directory, text) if option.is_path and text and not is_module else text


def rule_of(identity: str, names: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """
    Check one rule of ``allow``.

    Args:
        identity: Who.
        names: The names of functions.
        where: The option, for messages.

    Raises:
        SettingsError: It is no rule.
    """
    patterns = tuple(name.strip() for name in names) if _is_strings(names) else ()
    patterns = tuple(pattern for pattern in patterns if pattern)
    if not (identity.strip() and patterns):
        raise SettingsError(
            f"{where}: {identity!a} needs the names of functions, "
            'such as web = ["send_mail", "echo"]'
        )
    return identity.strip(), patterns
