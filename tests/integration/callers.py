"""
Callers that a daemon knows: by a token, by a certificate, or by the socket they come over.

Each function gives what ``Daemon(caller=…)`` takes.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trustme

from tests.integration.daemon import WAIT_SECONDS, Connection, Daemon

__all__ = [
    "HOST",
    "Caller",
    "by_tls",
    "by_token",
    "by_unix",
    "certificate_pem",
    "context_of",
    "files_of",
    "key_pem",
    "ports_of",
    "secure",
    "with_token",
]

Caller = Callable[[Daemon], Connection]

HOST: Final = "localhost"
"""The name that the daemons' certificates are for."""


def with_token(connection: Connection, token: str) -> Connection:
    """Show a token, and give the connection over which it was shown."""
    reply = connection.ask("taskd.auth", [token])
    if not isinstance(reply, str):
        connection.close()
        raise AssertionError(f"the token was not taken: {reply}")
    return connection


def by_token(token: str) -> Caller:
    """Call by a plain connection, and a token."""
    return lambda daemon: with_token(Connection("127.0.0.1", daemon.port), token)


def by_unix(path: str) -> Caller:
    """Call through a Unix socket in the daemon's directory."""

    def call(daemon: Daemon) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(WAIT_SECONDS)
            sock.connect(str(daemon.directory / path))
        except BaseException:
            sock.close()
            raise
        return Connection.over(sock)

    return call


def by_tls(context: ssl.SSLContext, port: int | None = None) -> Caller:
    """Call over TLS; an end without TLS's goodbye is an error."""
    return lambda daemon: Connection.over(secure(context, port or daemon.port))


def secure(context: ssl.SSLContext, port: int) -> ssl.SSLSocket:
    """Connect, and shake hands."""
    sock = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)
    try:
        return context.wrap_socket(sock, server_hostname=HOST, suppress_ragged_eofs=False)
    except BaseException:
        sock.close()
        raise


def context_of(authority: trustme.CA, own: trustme.LeafCert | None = None) -> ssl.SSLContext:
    """Trust an authority, and show a certificate of one's own if there is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    if own is not None:
        own.configure_cert(context)
    return context


def certificate_pem(issued: trustme.LeafCert) -> str:
    """Give a certificate, and behind it those that vouch for it."""
    return b"".join(pem.bytes() for pem in issued.cert_chain_pems).decode()


def key_pem(issued: trustme.LeafCert) -> str:
    """Give its private key."""
    return issued.private_key_pem.bytes().decode()


def files_of(directory: Path, name: str, issued: trustme.LeafCert) -> tuple[str, str]:
    """Write a certificate and its key; give the paths."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.write_text(certificate_pem(issued), encoding="utf-8")
    key.write_text(key_pem(issued), encoding="utf-8")
    key.chmod(0o600)
    return str(certificate), str(key)


def ports_of(daemon: Daemon, *, tls: bool) -> list[int]:
    """Give the TCP ports that speak TLS, or those that do not."""
    found = re.findall(r" port (\d+)( \(TLS\))?", daemon.addresses)
    return [int(port) for port, mark in found if bool(mark) is tls]
