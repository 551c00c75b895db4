"""
What the gateway answers over HTTP: JSON, and errors as the wire has them.

Which request gets which answer is the pages'.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any, Final

from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from taskd.errors import CallError, Overloaded

__all__ = ["NOT_KNOWN", "Refusal", "answer", "refuse"]

_STATUSES: Final = {
    "malformed": 400,
    "line-too-long": 413,
    "unknown-function": 404,
    "bad-arguments": 422,
    "task-failed": 500,
    "time-limit": 504,
    "cancelled": 409,
    "worker-lost": 502,
    "overloaded": 503,
    "shutting-down": 503,
    "unauthorized": 403,
    "internal": 500,
}
"""The HTTP status of each error of the wire."""

NOT_KNOWN: Final = 401
"""The HTTP status for who has shown nothing, or what nobody knows."""


def answer(request: Any, status: int, body: object) -> int:
    """
    Answer a request in JSON.

    Args:
        request: The request.
        status: The HTTP status.
        body: What JSON can carry.

    Returns:
        What ``render`` returns for it.
    """
    request.setResponseCode(status, HTTPStatus(status).phrase.encode())
    request.setHeader(b"content-type", b"application/json")
    content = json.dumps(body).encode() + b"\n"
    request.setHeader(b"content-length", b"%d" % len(content))
    if request.method != b"HEAD":
        request.write(content)
    request.finish()
    return NOT_DONE_YET


def refuse(request: Any, error: CallError, status: int | None = None) -> int:
    """
    Answer a request with an error of the wire.

    Args:
        request: The request.
        error: What is wrong.
        status: The HTTP status; None: that of the error.

    Returns:
        What ``render`` returns for it.
    """
    fields = {
        "code": error.code,
        "message": error.message,
        "retryable": error.retryable,
        **error.details,
    }
    if isinstance(error, Overloaded) and error.retry_after:
        request.setHeader(b"retry-after", b"%d" % math.ceil(error.retry_after))
    return answer(request, status or _STATUSES[error.code], {"error": fields})


class Refusal(Resource):
    """
    Answers whatever is asked with an error.

    Args:
        status: The HTTP status.
        code: What is wrong, for programs.
        message: What is wrong, for people.
    """

    isLeaf = True

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._status = status
        self._error = {"code": code, "message": message, "retryable": False}

    def render(self, request: Any) -> int:
        """Answer."""
        return answer(request, self._status, {"error": self._error})
