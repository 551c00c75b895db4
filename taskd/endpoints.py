"""
From what the operator decided to the places where the daemon listens.

A description such as ``unix:/run/taskd.sock`` is not understood here: Twisted makes
its endpoint, which is then told to listen on a recorder in place of the reactor. What
it would have had the reactor do is taken down, and done later, with plain sockets that
workers can share. What an endpoint would do to each connection cannot be seen that
way, so one that wraps the factory is refused: else ``tls:`` would speak plain text.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

# Its grammar is public, its reader is not; one of our own could read something else.
from twisted.internet.endpoints import _parse as read_description
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import VerifyError
from twisted.internet.protocol import Factory
from twisted.internet.ssl import CertificateOptions
from twisted.python.failure import Failure

from taskd.credentials import KeyPair, read_key_pair, read_pem, read_secret
from taskd.errors import SettingsError, StartFailed
from taskd.listening import BACKLOG, SocketFile, adopt, bind_tcp, bind_unix
from taskd.settings import Settings

__all__ = ["Listener", "listeners_from"]

_Bound = tuple[socket.socket, SocketFile | None]

_TWISTED_BACKLOG: Final = 50
"""What an endpoint asks for that was told nothing."""

_UNIX_MODE: Final = 0o660
"""Who may connect, may run tasks; Twisted's own 0666 would be everybody on the machine."""

_UNFIT: Final = {
    "haproxy": "the PROXY protocol is not spoken here; have the proxy pass plain TCP",
    "stdio": "it takes no connections; give tcp:, tcp6:, ssl:, unix: or systemd:",
    "tls": "use ssl:PORT:privateKey=FILE:certKey=FILE",
}
"""Endpoints of Twisted that cannot be, and what to do instead."""

_SSL_ARGUMENTS: Final = (
    "port",
    "privateKey",
    "certKey",
    "sslmethod",
    "interface",
    "backlog",
    "extraCertChain",
    "dhParameters",
)
"""The arguments of ``ssl:`` in the order in which they may stand without their names."""


@dataclass(eq=False)
class Listener:
    """
    One place to listen at.

    Attributes:
        text: The option that asked for it, for messages.
        make: Gives its socket, and the file that goes with it.
        backlog: For ``listening.listen``.
        read_keys: Reads what it shows, anew at each call, or raises ``StartFailed``;
            None if it speaks no TLS.
        address: The interface and the port, if it is one of TCP that is not open yet.
    """

    text: str
    make: Callable[[], _Bound] = field(repr=False)
    backlog: int = BACKLOG
    read_keys: Callable[[], KeyPair] | None = field(default=None, repr=False)
    address: tuple[str, int] | None = None
    _file: SocketFile | None = field(default=None, init=False, repr=False)

    def bind(self) -> socket.socket:
        """
        Give the socket: bound and ready for ``listening.listen``, or listening already.

        Raises:
            StartFailed: It cannot be had; the message says why.
        """
        sock, self._file = self.make()
        return sock

    def remove_file(self) -> None:
        """Remove the file of a Unix socket, if there is one and it is still ours."""
        if self._file is not None:
            self._file.remove()


def listeners_from(settings: Settings) -> list[Listener]:
    """
    Give the places to listen at, in the order of their options.

    To be called once: what systemd passed is taken over here, and can be only once.

    ``lockfile=`` of a ``unix:`` description has no effect; a file that was left
    behind is recognized without it. ``certKey=`` gives one certificate, as Twisted
    has it; those that vouch for it come from ``extraCertChain=``.

    Args:
        settings: What the operator decided.

    Returns:
        At least one; none of them is bound yet.

    Raises:
        SettingsError: There is none, or one that cannot be.
    """
    owner = settings.socket_owner
    if owner and not any(text.startswith("unix:") for text in settings.listen):
        raise SettingsError("--socket-owner is of no use without a unix: endpoint of --listen")
    taken: set[int] = set()
    listeners = [
        *_ports(settings),
        *(_listener_of(text, owner, taken) for text in settings.listen),
    ]
    if not listeners:
        raise SettingsError("there is nowhere to listen: give --port or --listen")
    first: dict[tuple[str, int], Listener] = {}
    for listener in listeners:
        if listener.address is not None and listener.address[1]:
            other = first.setdefault(listener.address, listener)
            if other is not listener:
                raise SettingsError(f"{listener.text}: {other.text} listens there already")
    return listeners


def _ports(settings: Settings) -> Iterator[Listener]:
    read_keys = None
    if settings.certificate:
        read_keys = partial(read_key_pair, settings.certificate, settings.key)
    for option, port, keys in (
        ("--port", settings.port, read_keys if settings.tls_port is None else None),
        ("--tls-port", settings.tls_port, read_keys),
    ):
        if port is not None:
            address = _address(settings.interface, port)
            yield Listener(
                f"--interface {settings.interface} {option} {port}",
                partial(_bound_port, address),
                read_keys=keys,
                address=address,
            )


def _listener_of(description: str, owner: str, taken: set[int]) -> Listener:
    found = _evaluate(description, owner, taken)
    read_keys = partial(_read_keys_again, description) if found.key_pair is not None else None
    backlog = found.backlog if found.backlog > _TWISTED_BACKLOG else BACKLOG
    make = partial(found.make, backlog)
    return Listener(f"--listen {description}", make, backlog, read_keys, found.address)


def _read_keys_again(description: str) -> KeyPair:
    try:
        found = _evaluate(description, "", set())
    except SettingsError as error:
        raise StartFailed(str(error)) from None
    assert found.key_pair is not None
    return found.key_pair


@dataclass(frozen=True)
class _Found:
    """
    What an endpoint would have done.

    Attributes:
        make: Does it, given the backlog.
        backlog: What the endpoint asked for.
        key_pair: What it would have shown, or None if it speaks no TLS.
        address: Where it would have bound a TCP port, or None.
    """

    make: Callable[[int], _Bound]
    backlog: int
    key_pair: KeyPair | None = None
    address: tuple[str, int] | None = None


class _Marker(Factory):
    """The factory that an endpoint is given; it must arrive as it is."""

    def buildProtocol(self, addr: object) -> NoReturn:
        """Refuse: nothing was bound, so nothing can have connected."""
        raise SettingsError("it takes no connections")


class _Recorder:
    """
    Stand in for the reactor and take down what it is asked for.

    Args:
        args: The endpoint's kind, and its arguments that have no names.
        named: Its arguments that have.
        text: The option, for messages.
        owner: Whom Unix sockets are given to.
        taken: File descriptors that were taken over before.

    Attributes:
        marker: The factory that the endpoint is to listen with.
        found: What it asked for.
    """

    def __init__(
        self, args: list[str], named: dict[str, str], text: str, owner: str, taken: set[int]
    ) -> None:
        self._args = args
        self._named = named
        self._text = text
        self._owner = owner
        self._taken = taken
        self.marker = _Marker()
        self.found: list[_Found] = []

    def listenTCP(  # noqa: N802
        self, port: int, factory: object, backlog: int = _TWISTED_BACKLOG, interface: str = ""
    ) -> None:
        """Take a TCP port down."""
        self._add_port(factory, port, interface, backlog)

    def listenSSL(  # noqa: N802
        self,
        port: int,
        factory: object,
        contextFactory: object,  # noqa: N803
        backlog: int = _TWISTED_BACKLOG,
        interface: str = "",
    ) -> None:
        """Take a TCP port that speaks TLS down, and its key."""
        if self._args[0] != "ssl" or not isinstance(contextFactory, CertificateOptions):
            raise SettingsError("its key cannot be read again; use ssl:PORT:privateKey=FILE")
        pair = _key_pair_of(contextFactory, self._text)
        self._add_port(factory, port, interface, backlog, pair)

    def listenUNIX(  # noqa: N802
        self,
        address: str,
        factory: object,
        backlog: int = _TWISTED_BACKLOG,
        mode: int = 0o666,
        wantPID: object = 0,  # noqa: N803
    ) -> None:
        """Take a Unix socket down."""
        if len(self._args) < 3 and "mode" not in self._named:
            mode = _UNIX_MODE
        if not 0 <= mode <= 0o777:
            raise SettingsError(f"mode={mode:o}: give permissions such as mode=660")
        if not address:
            raise SettingsError("give the path of its file")
        # What a person types is meant from where it is typed; twistd may leave for --rundir.
        path = os.path.abspath(address)
        self._add(factory, partial(bind_unix, path, mode, self._owner), backlog)

    def adoptStreamPort(self, fileno: int, family: int, factory: object) -> None:  # noqa: N802
        """Take over a socket that listens; its address family is its own affair."""
        self._check(factory)
        # The endpoint closes what was taken over, and another file may have its number since.
        if fileno in self._taken:
            raise SettingsError("another --listen has this socket already")
        adopted = adopt(fileno)
        self._taken.add(fileno)
        self._add(factory, lambda _: (adopted, None), _TWISTED_BACKLOG)

    def _add_port(
        self,
        factory: object,
        port: int,
        interface: str,
        backlog: int,
        key_pair: KeyPair | None = None,
    ) -> None:
        self._check(factory)
        if not 0 <= port <= 65535:
            raise SettingsError(f"a port is a number from 0 to 65535, not {port}")
        address = _address(interface, port)
        self.found.append(_Found(lambda _: _bound_port(address), backlog, key_pair, address))

    def _add(self, factory: object, make: Callable[[int], _Bound], backlog: int) -> None:
        self._check(factory)
        self.found.append(_Found(make, backlog))

    def _check(self, factory: object) -> None:
        if factory is not self.marker:
            raise SettingsError(
                "it changes what is said on a connection, which the workers would not do; "
                "use tcp:, tcp6:, ssl:, unix: or systemd:"
            )


def _address(interface: str, port: int) -> tuple[str, int]:
    # Twisted takes '' for all addresses of IPv4, getaddrinfo for none.
    return interface or "0.0.0.0", port  # noqa: S104


def _bound_port(address: tuple[str, int]) -> _Bound:
    return bind_tcp(*address), None


def _evaluate(description: str, owner: str, taken: set[int]) -> _Found:
    """Have Twisted make an endpoint, and find out what it does; nothing is bound."""
    text = f"--listen {description}"
    failures: list[Failure] = []
    try:
        args, named = read_description(description)
        if args[0].lower() in _UNFIT:
            raise SettingsError(_UNFIT[args[0].lower()])
        if args[0] == "ssl":
            _check_files(dict(zip(_SSL_ARGUMENTS, args[1:], strict=False)) | named, text)
        recorder = _Recorder(args, named, text, owner, taken)
        endpoint = serverFromString(recorder, description)
        endpoint.listen(recorder.marker).addErrback(failures.append)
        for failure in failures:
            failure.raiseException()
    except (SettingsError, StartFailed) as error:
        raise SettingsError(f"{text}: {error}") from None
    except Exception as error:  # an endpoint's parser may be anybody's plugin
        raise SettingsError(f"{text}: {_reason_of(error, description)}") from None
    if len(recorder.found) != 1:
        raise SettingsError(f"{text}: it does not listen; use tcp:, tcp6:, ssl:, unix: or systemd:")
    return recorder.found[0]


def _reason_of(error: Exception, description: str) -> str:
    if description.startswith("systemd:") and isinstance(error, LookupError | OSError):
        return (
            "systemd passed no such socket, or it is taken already; "
            "compare with ListenStream= and FileDescriptorName= of the .socket unit"
        )
    if isinstance(error, VerifyError):
        return "the certificate and its key do not match"
    why = str(error) or type(error).__name__
    return f"{why}; it must be a server endpoint of Twisted, such as unix:/run/taskd.sock"


def _check_files(given: dict[str, str], text: str) -> None:
    """
    Look at the files of an ``ssl:`` description before Twisted does.

    It would not mind a key that everybody can read, and it would ask for the
    passphrase of an encrypted one on the terminal.
    """
    for argument in ("sslmethod", "dhParameters"):
        if argument in given:
            raise SettingsError(f"leave {argument}= out; TLS 1.2 and newer are spoken")
    key_path = given.get("privateKey", "server.pem")
    certificate_path = given.get("certKey", key_path)
    key = read_secret(key_path, "privateKey")
    certificate = read_pem(certificate_path, "certKey")
    if "PRIVATE KEY" in certificate:
        read_secret(certificate_path, "certKey")
    try:
        # Twisted takes the first key that it finds in the two, one behind the other.
        load_pem_private_key(f"{certificate}\n{key}".encode(), None)
    except TypeError:
        raise SettingsError(
            f"the key in {key_path} is encrypted, and a daemon cannot ask for its passphrase; "
            "`openssl pkey -in FILE -out FILE` decrypts it"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"there is no private key in {key_path}") from None


def _key_pair_of(options: CertificateOptions, origin: str) -> KeyPair:
    certificate, private = options.certificate, options.privateKey
    assert certificate is not None
    assert private is not None
    key: Any = private.to_cryptography_key()
    return KeyPair(
        certificate="".join(
            one.to_cryptography().public_bytes(Encoding.PEM).decode()
            for one in (certificate, *options.extraCertChain)
        ),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        origin=origin,
    )
