"""
The listening sockets that all workers share: bound, or taken over from who bound them.

They are plain sockets, never Twisted ``Port`` objects: closing one of those shuts
the socket down for every process that has it. Who accepts from them, and when, is
``accept``'s.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import ipaddress
import os
import pwd
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from taskd.errors import StartFailed

__all__ = [
    "BACKLOG",
    "SocketFile",
    "address_of",
    "address_text",
    "adopt",
    "bind_tcp",
    "bind_unix",
    "is_exposed",
    "is_exposed_host",
    "listen",
]

BACKLOG: Final = 4096
"""Connections that the kernel holds until a worker accepts; net.core.somaxconn caps it."""

_KEEP_ALIVE_IDLE_SECONDS: Final = 60
"""After so long a silence the kernel asks whether a peer is still there; else it never would."""

_TURN_SECONDS: Final = 5.0
"""How long another process may take over binding a Unix socket at the same path."""

_LONGEST_PATH_BYTES: Final = 107
"""``sun_path`` of unix(7) has 108, and ends with a zero."""

_REASONS: Final = {
    errno.EADDRINUSE: "another process listens there",
    errno.EACCES: "not allowed; ports below 1024 need a privilege",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}

_UNIX_REASONS: Final = {
    errno.EACCES: "not allowed to write to its directory",
    errno.ENOENT: "there is no such directory",
    errno.EADDRINUSE: "another process has taken the path just now",
    errno.EAGAIN: "another process that is about to listen there takes too long",
}


@dataclass(frozen=True)
class SocketFile:
    """
    The file through which a Unix socket is reached.

    Attributes:
        path: Where it was bound.
        device: The file system that it is on.
        inode: Its number there.
    """

    path: str
    device: int
    inode: int

    @classmethod
    def at(cls, path: str) -> SocketFile:
        """Take down which file has a path now."""
        found = os.lstat(path)
        return cls(path, found.st_dev, found.st_ino)

    def remove(self) -> None:
        """
        Remove the file if it is still the one that was bound.

        Do it before the socket is closed: until then nobody takes its place, and
        the kernel gives the file's number to no other. A daemon that gave its
        privileges up may not be allowed to remove it; the next start then does.
        """
        try:
            if SocketFile.at(self.path) == self:
                os.unlink(self.path)
        except OSError:
            pass


def address_of(interface: str, port: int) -> tuple[int, int, int, Any]:
    """
    Give what a TCP socket is made of, and the address to bind it to.

    Raises:
        StartFailed: There is no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            interface, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise StartFailed(f"cannot listen on {interface} port {port}: {why}") from None
    return family, kind, protocol, address


def bind_tcp(interface: str, port: int) -> socket.socket:
    """
    Bind a TCP port, and do not listen yet.

    So its address can be looked at before anybody can connect.

    Args:
        interface: A numeric address, IPv4 or IPv6, or a host name.
        port: 0 to 65535.

    Returns:
        The socket, bound and not blocking.

    Raises:
        StartFailed: It cannot be had; the message says why.
    """
    refusal = f"cannot listen on {interface} port {port}"
    family, kind, protocol, address = address_of(interface, port)
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        why = _REASONS.get(error.errno or 0, error.strerror)
        raise StartFailed(f"{refusal}: {why}") from None
    _prepare(bound)
    return bound


def bind_unix(
    path: str, mode: int, owner: str = "", backlog: int = BACKLOG
) -> tuple[socket.socket, SocketFile]:
    """
    Bind a Unix socket, and listen.

    It listens at once: a file whose socket does not would look left behind to
    another daemon that starts. A file that was left behind is replaced.

    Args:
        path: Where its file goes.
        mode: The file's permissions; whoever may write to it may connect.
        owner: USER, USER:GROUP or :GROUP that the file is given to, as names or
            numbers; '' leaves it as it is.
        backlog: As for ``listen``.

    Returns:
        The socket, listening and not blocking, and its file.

    Raises:
        StartFailed: It cannot be had; the message says why.
    """
    user, group = _ids_of(owner)
    refusal = f"cannot listen on {path}"
    if (length := len(os.fsencode(path))) > _LONGEST_PATH_BYTES:
        raise StartFailed(
            f"{refusal}: the path has {length} bytes, {_LONGEST_PATH_BYTES} are possible"
        )
    if not path or "\0" in path:  # the kernel would take it for a name that has no file
        raise StartFailed(f"{refusal!r}: give the path of a file")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.setblocking(False)
    try:
        with _turn_at(path):
            _clear(path, refusal)
            # The file inherits it, so that nobody else can connect before the owner is right.
            os.fchmod(bound.fileno(), 0o600)
            bound.bind(path)
            file = SocketFile.at(path)
            try:
                bound.listen(backlog)
                _give(path, user, group, owner)
                _set_mode(path, mode)
            except (OSError, StartFailed):
                file.remove()
                raise
    except OSError as error:
        bound.close()
        why = _UNIX_REASONS.get(error.errno or 0, error.strerror)
        raise StartFailed(f"{refusal}: {why}") from None
    except StartFailed:
        bound.close()
        raise
    return bound, file


def _set_mode(path: str, mode: int) -> None:
    """Set a file's mode, and never that of another one which a link leads to."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def listen(bound: socket.socket, backlog: int = BACKLOG) -> None:
    """
    Let the kernel take connections; one that listens already is left as it is.

    Args:
        bound: What ``bind_tcp``, ``bind_unix`` or ``adopt`` gave.
        backlog: Connections that the kernel holds until a worker accepts.

    Raises:
        StartFailed: Another process was quicker; two may bind a port at once.
    """
    if _listens(bound):
        return
    try:
        bound.listen(backlog)
    except OSError as error:
        why = _REASONS.get(error.errno or 0, error.strerror)
        raise StartFailed(f"cannot listen on {address_text(bound)}: {why}") from None


def adopt(fd: int) -> socket.socket:
    """
    Take over a listening socket that somebody else made, such as systemd.

    Args:
        fd: The socket; it is duplicated, and stays its owner's.

    Returns:
        The socket, listening and not blocking; its backlog is as it was.

    Raises:
        StartFailed: It is no stream socket that listens.
    """
    refusal = f"cannot listen on file descriptor {fd}"
    try:
        with socket.socket(fileno=fd) as given:
            try:
                adopted = given.dup()
            finally:
                given.detach()
    except OSError as error:
        raise StartFailed(f"{refusal}: {error.strerror}") from None
    if adopted.type != socket.SOCK_STREAM or not _listens(adopted):
        adopted.close()
        raise StartFailed(
            f"{refusal}: it is no stream socket that listens; "
            "a systemd socket needs ListenStream= and Accept=no"
        )
    _prepare(adopted)
    return adopted


def is_exposed(bound: socket.socket) -> bool:
    """Tell whether other machines can reach a socket."""
    if bound.family == socket.AF_UNIX:
        return False
    if bound.family not in (socket.AF_INET, socket.AF_INET6):
        return True
    return is_exposed_host(bound.getsockname()[0])


def is_exposed_host(host: str) -> bool:
    """Tell whether other machines can reach a numeric address."""
    address = ipaddress.ip_address(host)
    # ::ffff:127.0.0.1 is not loopback for every Python.
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def address_text(bound: socket.socket) -> str:
    """Write a socket's address for people: ``127.0.0.1 port 12345``, ``/run/taskd.sock``."""
    name = bound.getsockname()
    if isinstance(name, tuple):
        return "{} port {}".format(*name[:2])
    text = os.fsdecode(name)
    return text.replace("\0", "@") or "a Unix socket without a name"


def _prepare(sock: socket.socket) -> None:
    """Set what accepted connections inherit, and that the socket itself does not block."""
    sock.setblocking(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # Replies are whole, waiting could only delay them.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_IDLE_SECONDS)


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


@contextmanager
def _turn_at(path: str) -> Iterator[None]:
    """
    Let one process at a time look whether a path is free, and take it.

    Whoever has the lock removes the lock's file, so one that waited for it may
    hold the lock of a file that is gone, and begins anew.
    """
    name = f"{path}.starting"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        lock = os.open(name, flags, 0o600)
        try:
            _lock(lock)
            if not _is_at(name, lock):
                continue
            try:
                yield
            finally:
                os.unlink(name)
            return
        finally:
            os.close(lock)


def _lock(fd: int) -> None:
    deadline = time.monotonic() + _TURN_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_TURN_SECONDS / 100)
        else:
            return


def _is_at(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _clear(path: str, refusal: str) -> None:
    """Remove a socket that nobody listens on; whatever else is there stays."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartFailed(f"{refusal}: something that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(path)
    if answer == errno.EACCES:
        raise StartFailed(f"{refusal}: a socket is there, and it may not be asked if it is alive")
    # A full backlog and a socket of another type are signs of life too.
    if answer != errno.ECONNREFUSED:
        raise StartFailed(f"{refusal}: another process listens there")
    os.unlink(path)


def _ids_of(owner: str) -> tuple[int, int]:
    """Give the numbers of USER, USER:GROUP or :GROUP; -1 leaves what it stands for."""
    user, _, group = owner.partition(":")

    def number(name: str, what: str, find: Callable[[str], int]) -> int:
        if not name:
            return -1
        try:
            found = int(name) if name.isascii() and name.isdigit() else find(name)
        except (KeyError, ValueError):
            found = -1
        if not 0 <= found < 2**32 - 1:  # the last one means "leave it" to the kernel
            raise StartFailed(f"--socket-owner {owner}: there is no {what} {name!r}")
        return found

    return (
        number(user, "user", lambda name: pwd.getpwnam(name).pw_uid),
        number(group, "group", lambda name: grp.getgrnam(name).gr_gid),
    )


def _give(path: str, user: int, group: int, owner: str) -> None:
    if (user, group) == (-1, -1):
        return
    try:
        os.chown(path, user, group, follow_symlinks=False)
    except OSError as error:
        why = "not allowed" if error.errno == errno.EPERM else error.strerror
        raise StartFailed(
            f"--socket-owner {owner}: {why}: {path} cannot be given to it; "
            "start as root, or name a group that the daemon's user is in"
        ) from None
