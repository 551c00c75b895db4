"""
Every exception of taskd, and the code that each has on the wire.

::

    TaskdError
     +-- SettingsError            the operator: an option that cannot be
     +-- StartFailed              the operator: the daemon could not boot
     +-- NotJson                  a value that JSON cannot carry
     +-- ClientError              the caller's own side
     |    +-- ConnectFailed       no connection could be made; nothing was run
     |    |    +-- TlsFailed       one that TLS makes safe could not be made
     |    |         +-- WrongServerName            the certificate is for another name
     |    |         +-- CertificateExpired         it is out of date, or too early
     |    |         +-- CertificateNotTrusted      nobody trusted has signed it
     |    |         +-- ClientCertificateRefused   the daemon does not take ours
     |    +-- ClientClosed        the client was closed; nothing was sent
     +-- CallError                one call failed; it has a wire code
          +-- Malformed           malformed           (then the connection closes)
          +-- LineTooLong         line-too-long       (then the connection closes)
          +-- Unauthorized        unauthorized        (then the connection closes)
          +-- UnknownFunction     unknown-function
          +-- BadArguments        bad-arguments
          +-- TaskFailed          task-failed
          +-- TimeLimitExceeded   time-limit
          +-- Cancelled           cancelled
          +-- WorkerLost          worker-lost
          |    +-- ConnectionLost     (never on the wire: what EOF means to a caller)
          +-- Overloaded          overloaded
          +-- ShuttingDown        shutting-down
          +-- InternalError       internal

Nothing else lives here: no formatting of messages, no transport.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "BadArguments",
    "CallError",
    "Cancelled",
    "CertificateExpired",
    "CertificateNotTrusted",
    "ClientCertificateRefused",
    "ClientClosed",
    "ClientError",
    "ConnectFailed",
    "ConnectionLost",
    "InternalError",
    "LineTooLong",
    "Malformed",
    "NotJson",
    "Overloaded",
    "SettingsError",
    "ShuttingDown",
    "StartFailed",
    "TaskFailed",
    "TaskdError",
    "TimeLimitExceeded",
    "TlsFailed",
    "Unauthorized",
    "UnknownFunction",
    "WorkerLost",
    "WrongServerName",
    "error_from_wire",
]


class TaskdError(Exception):
    """Root of all that taskd raises."""


class SettingsError(TaskdError):
    """An option has a value that cannot be; the message says which and why."""


class StartFailed(TaskdError):
    """The daemon cannot start; the message is the one line that the operator sees."""


class NotJson(TaskdError):
    """A value cannot be carried by JSON; the message names the value's place and type."""


class ClientError(TaskdError):
    """The call never came to a daemon that would run it."""


class ConnectFailed(ClientError):
    """No connection to the daemon could be made; nothing was run."""


class TlsFailed(ConnectFailed):
    """The connection cannot be made safe by TLS; the message says why, and what to do."""


class WrongServerName(TlsFailed):
    """The server's certificate is good, but for other names than the one that was asked for."""


class CertificateExpired(TlsFailed):
    """The server's certificate, or its authority's, is not valid at this time."""


class CertificateNotTrusted(TlsFailed):
    """The server's certificate is signed by nobody that this client trusts."""


class ClientCertificateRefused(TlsFailed):
    """The daemon takes no calls without a client certificate, or not with this one."""


class ClientClosed(ClientError):
    """The client was closed before the call was sent."""


class CallError(TaskdError):
    """
    One call failed.

    Attributes:
        code: The name of the failure on the wire.
        retryable: True if the same call may succeed later as it is.
        closes_connection: True if the server hangs up after this answer.
        message: One sentence for people.
        details: Further members of the error object, such as ``type``.
    """

    code: ClassVar[str]
    retryable: ClassVar[bool] = False
    closes_connection: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class Malformed(CallError):
    """
    The line is not a message.

    Attributes:
        id_json: The request's id as JSON if it had one that could be read, or ''.
    """

    code = "malformed"
    closes_connection = True

    def __init__(self, message: str, *, id_json: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.id_json = id_json


class LineTooLong(CallError):
    """The line is longer than the server reads."""

    code = "line-too-long"
    closes_connection = True


class Unauthorized(CallError):
    """The caller has not shown who it is, or may not do this."""

    code = "unauthorized"
    closes_connection = True


class UnknownFunction(CallError):
    """No function of this name is registered."""

    code = "unknown-function"


class BadArguments(CallError):
    """The arguments do not fit the function's signature."""

    code = "bad-arguments"


class TaskFailed(CallError):
    """The task raised, or returned what JSON cannot carry."""

    code = "task-failed"

    @property
    def type(self) -> str:
        """Name the class of the exception that the task raised, or give ''."""
        return str(self.details.get("type", ""))

    @property
    def traceback(self) -> str:
        """Give the task's own traceback, or '' unless the daemon runs with ``--debug``."""
        return str(self.details.get("traceback", ""))


class TimeLimitExceeded(CallError):
    """The time limit passed before the task was done."""

    code = "time-limit"


class Cancelled(CallError):
    """The caller took the task back."""

    code = "cancelled"


class WorkerLost(CallError):
    """
    The worker went away before it answered.

    Attributes:
        may_have_started: False only if the task certainly did not run.
    """

    code = "worker-lost"
    retryable = True

    def __init__(self, message: str, *, may_have_started: bool = True, **details: Any) -> None:
        super().__init__(message, **details)
        self.may_have_started = may_have_started


class ConnectionLost(WorkerLost):
    """The connection ended with this call unanswered: its worker died, or the network did."""


class Overloaded(CallError):
    """Too many tasks wait already."""

    code = "overloaded"
    retryable = True

    @property
    def retry_after(self) -> float:
        """Give the seconds after which trying again makes sense, or 0.0 if not told."""
        told = self.details.get("retry_after")
        return float(told) if isinstance(told, (int, float)) else 0.0


class ShuttingDown(CallError):
    """The server is stopping; the task was not started."""

    code = "shutting-down"
    retryable = True


class InternalError(CallError):
    """taskd itself failed; its log says more."""

    code = "internal"


_BY_CODE: dict[str, type[CallError]] = {
    kind.code: kind
    for kind in (
        Malformed,
        LineTooLong,
        Unauthorized,
        UnknownFunction,
        BadArguments,
        TaskFailed,
        TimeLimitExceeded,
        Cancelled,
        WorkerLost,
        Overloaded,
        ShuttingDown,
        InternalError,
    )
}


def error_from_wire(fields: dict[str, Any]) -> CallError:
    """
    Turn the error object of a reply back into the exception that it stands for.

    A code that this version does not know becomes ``InternalError``, so that an
    older client stays able to talk to a newer daemon.

    Args:
        fields: The object behind ``"error"``: ``code``, ``message``, and more.

    Returns:
        The exception, not raised.
    """
    details = {k: v for k, v in fields.items() if k not in ("code", "message", "retryable")}
    code, message = str(fields.get("code", "")), str(fields.get("message", ""))
    kind = _BY_CODE.get(code)
    if kind is None:
        kind, message = InternalError, f"{code}: {message}"
    error = kind(message)
    error.details.update(details)
    if isinstance(error, WorkerLost):
        error.may_have_started = details.pop("may_have_started", True) is not False
    return error
