"""
The listening socket that all workers share.

Who accepts from it, and when, is ``accept``'s.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from taskd.errors import StartFailed

__all__ = ["bind"]

_BACKLOG: Final = 4096
"""Connections that the kernel holds until a worker accepts; net.core.somaxconn caps it."""

_KEEP_ALIVE_IDLE_SECONDS: Final = 60
"""After so long a silence the kernel asks whether a peer is still there; else it never would."""


def bind(interface: str, port: int) -> socket.socket:
    """
    Make the listening socket that all workers share.

    A plain socket, never a Twisted ``Port``: closing one of those shuts the
    socket down for every process that has it.

    Args:
        interface: A numeric address, IPv4 or IPv6, or a host name.
        port: 0 to 65535.

    Returns:
        The socket, listening and not blocking.

    Raises:
        StartFailed: It cannot be had; the message says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            interface, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise StartFailed(f"--interface {interface}: {why}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What is accepted inherits it: replies are whole, waiting could only delay them.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_IDLE_SECONDS)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: "another process listens there",
            errno.EACCES: "not allowed; ports below 1024 need a privilege",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }
        why = reasons.get(error.errno or 0, error.strerror)
        raise StartFailed(f"cannot listen on {interface} port {port}: {why}") from None
    listening.setblocking(False)
    return listening
