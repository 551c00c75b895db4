"""
Who a request is from: the token in its headers, and who may look at the page.

A program sends ``Authorization: Bearer TOKEN``; a page cannot, so a browser may have
the token in a cookie that the site has set, or say it in its first message. The
dashboard has tokens of its own; a browser asks its user for one (HTTP's Basic, as
the password) and gets a cookie for it, since a WebSocket has no such dialogue.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from typing import Any, Final

from taskd.access import digest_of

__all__ = ["DASHBOARD_COOKIE", "Watchers", "header_of", "token_of"]

DASHBOARD_COOKIE: Final = "taskd_dashboard"
_PURPOSE: Final = b"taskd dashboard"


def header_of(request: Any, name: str) -> str | None:
    """
    Give a header's value, or None if it is missing.

    Those that stand there twice are one, as RFC 9110 has it, section 5.3: with a
    comma, so that two origins or hosts are none that is known, nor are bytes that
    are no text.

    Args:
        request: A request of twisted.web's.
        name: The header's name.
    """
    values = request.requestHeaders.getRawHeaders(name.encode())
    return b", ".join(values).decode(errors="replace") if values else None


def token_of(request: Any, cookie: str) -> str:
    """
    Give the token that a request shows, or ''.

    A cookie comes along without the page's doing, so it counts only where the
    request names the page's origin, which has been looked at then.

    Args:
        request: A request of twisted.web's.
        cookie: The name of the cookie that may hold one, or ''.
    """
    scheme, _, value = (header_of(request, "authorization") or "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if cookie and header_of(request, "origin") is not None:
        return _cookie_of(request, cookie)
    return ""


def _cookie_of(request: Any, name: str) -> str:
    value: bytes | None = request.getCookie(name.encode())
    return "" if value is None else value.decode("latin-1")


class Watchers:
    """
    Who may look at the dashboard and the metrics.

    Args:
        tokens: Pairs of an identity and the digest of a token; none: everybody may.
    """

    def __init__(self, tokens: Iterable[tuple[str, str]]) -> None:
        self._digests = [digest for _, digest in tokens]

    @property
    def asks(self) -> bool:
        """Tell whether a token has to be shown."""
        return bool(self._digests)

    def token_of(self, request: Any) -> str:
        """Give the token that a request's header shows, or ''."""
        scheme, _, value = (header_of(request, "authorization") or "").partition(" ")
        if scheme.lower() == "bearer":
            return value.strip()
        if scheme.lower() == "basic":
            try:
                decoded = base64.b64decode(value.strip(), validate=True).decode()
            except (binascii.Error, ValueError):
                return ""
            return decoded.partition(":")[2]
        return ""

    def knows_cookie(self, request: Any) -> bool:
        """Tell whether a request has the cookie of somebody who has shown a token."""
        value = _cookie_of(request, DASHBOARD_COOKIE)
        known = False
        for digest in self._digests:
            known |= hmac.compare_digest(_cookie_for(digest).encode(), value.encode())
        return known

    def cookie_for(self, token: str) -> str | None:
        """Give the cookie for a token, or None if nobody has it."""
        found = None
        for digest in self._digests:
            if hmac.compare_digest(digest.encode(), digest_of(token).encode()):
                found = _cookie_for(digest)
        return found


def _cookie_for(digest: str) -> str:
    """Derive the cookie: it opens nothing but the page, and ends with its token."""
    return hmac.digest(digest.encode(), _PURPOSE, "sha256").hex()
