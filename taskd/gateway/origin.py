"""
Where a request comes from, and where it meant to go: the headers Origin and Host.

A browser sends any page's WebSocket and forms to any address, this machine's own
too, with the user's cookies; it tells the page's origin along, and a page cannot
change that. So what is refused here is a page of somebody else's (cross-site
WebSocket hijacking), and a name of somebody else's that leads here (DNS rebinding).
Nothing here does I/O.

Source:
    RFC 6455, section 10.2; RFC 6454; CVE-2026-25253.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from taskd.errors import SettingsError

__all__ = ["Origins"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_HOST: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")

_Place = tuple[str, int | None]
"""A host in lower case, and a port; None: whichever is usual."""


class Origins:
    """
    The origins and hosts that are let in.

    A page that was served from here is always: its origin is the host that it
    asks. A host is let in if it is a numeric address, ``localhost``, or the host
    of an origin that the operator has named.

    Args:
        allowed: Further origins, such as ``https://example.org``.
        needs_one: False: what names none, as programs do, is let in.
        is_secure: True: pages are served over TLS here, so a plain one of the same host
            is somebody else's. So it is where *allowed* has the host by ``https`` alone.

    Raises:
        SettingsError: One is no origin.
    """

    def __init__(self, allowed: Iterable[str], *, needs_one: bool, is_secure: bool = False) -> None:
        self._allowed = frozenset(map(_named, allowed))
        self._hosts = frozenset(host for _, host, _ in self._allowed)
        self._secure_hosts = self._hosts - {
            host for scheme, host, _ in self._allowed if scheme == "http"
        }
        self._needs_one = needs_one
        self._is_secure = is_secure

    def admits_host(self, host: str | None) -> bool:
        """Tell whether a Host header names this place."""
        place = _place_of(host)
        if place is None:
            return False
        name = place[0]
        return name == "localhost" or name in self._hosts or _is_numeric(name)

    def admits(self, origin: str | None, host: str | None) -> bool:
        """
        Tell whether a page may call.

        Args:
            origin: The Origin header, or None.
            host: The Host header, or None; ``admits_host`` is asked first.
        """
        if origin is None:
            return not self._needs_one
        named = _origin_of(origin)
        if named is None:
            return False
        if named in self._allowed:
            return True
        scheme, name, port = named
        own = [(name, port), (name, None)] if port == _DEFAULT_PORTS[scheme] else [(name, port)]
        if scheme == "http" and (self._is_secure or name in self._secure_hosts):
            return False  # whoever is on the way could have made that page
        return _place_of(host) in own


def _named(text: str) -> tuple[str, str, int]:
    named = _origin_of(text)
    if named is None:
        raise SettingsError(
            f"--origin {text}: give scheme and host, and the port if it is not the usual one, "
            "such as https://example.org"
        )
    return named


def _origin_of(text: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    usual = _DEFAULT_PORTS.get(parts.scheme)
    if usual is None or text != f"{parts.scheme}://{parts.netloc}" or "@" in parts.netloc:
        return None
    place = _place_of(parts.netloc)
    return None if place is None else (parts.scheme, place[0], usual if port is None else port)


def _place_of(host: str | None) -> _Place | None:
    found = _HOST.fullmatch(host or "")
    if found is None:
        return None
    return found[1].lower(), None if found[2] is None else int(found[2])


def _is_numeric(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
