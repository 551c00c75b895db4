"""
The sockets that one daemon listens on, and what is shown and asked for on each.

They are opened once, while that is still allowed; keys and tokens are read again at
every reload. Who accepts is ``accept``'s, where they come from is ``endpoints``'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from twisted.logger import Logger

from taskd.credentials import Credentials, read_pem, read_tokens
from taskd.endpoints import Listener
from taskd.errors import StartFailed
from taskd.listening import address_of, address_text, is_exposed, is_exposed_host, listen
from taskd.settings import Settings
from taskd.tls import Secure

__all__ = ["Ports"]

_GLOB: Final = frozenset("*?[")


class Ports:
    """
    Open them all, or none.

    Args:
        settings: What the operator decided.
        listeners: Where to listen.
        wall_clock: Gives UTC epoch seconds, for what certificates say.

    Attributes:
        sockets: Those that are open.
    """

    _log = Logger(namespace="taskd.ports")

    def __init__(
        self,
        settings: Settings,
        listeners: Iterable[Listener],
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._listeners = list(listeners)
        self._wall_clock = wall_clock
        self.sockets: list[Any] = []

    def open(self) -> Credentials:
        """
        Bind and listen, where that is safe.

        Returns:
            The keys and tokens; who is asked for them later may not read them any more.

        Raises:
            StartFailed: A socket cannot be had, or other machines could run tasks
                without saying who they are; nothing is open then.
        """
        try:
            credentials = self.credentials()
            for listener in self._listeners:
                self.sockets.append(listener.bind())
                self._check(listener, self.sockets[-1], credentials)
            for listener, sock in zip(self._listeners, self.sockets, strict=True):
                listen(sock, listener.backlog)
        except StartFailed:
            self.close()
            raise
        return credentials

    def check(self) -> None:
        """
        Check, without opening any, what can be known beforehand.

        Raises:
            StartFailed: A key or the tokens cannot be used, an address is none, or
                other machines could run tasks without saying who they are.
        """
        credentials = self.credentials()
        for listener in self._listeners:
            if listener.address is not None:
                interface, port = listener.address
                host = address_of(interface, port)[-1][0]
                if is_exposed_host(host):
                    self._check_exposed(listener, f"{host} port {port}", credentials)

    @property
    def descriptions(self) -> str:
        """Tell where the daemon is to listen, as the options say it."""
        return ", ".join(
            listener.text.removeprefix("--listen ")
            if listener.address is None
            else "{} port {}".format(*listener.address)
            + (" (TLS)" if listener.read_keys is not None else "")
            for listener in self._listeners
        )

    def _check(self, listener: Listener, sock: Any, credentials: Credentials) -> None:
        if is_exposed(sock):
            self._check_exposed(listener, address_text(sock), credentials)

    def _check_exposed(self, listener: Listener, where: str, credentials: Credentials) -> None:
        is_secure = listener.read_keys is not None
        if not (credentials.tokens or (is_secure and credentials.client_ca)):
            if not self._settings.insecure:
                raise StartFailed(
                    f"{listener.text}: whoever can reach {where} could run tasks, since callers "
                    "are not asked who they are; give --token-file, or --client-ca with TLS, "
                    "or say --insecure if that is meant"
                )
            self._log.warn(
                "--insecure: whoever can reach {where} can run tasks without being asked",
                where=where,
            )
        elif not is_secure:
            self._log.warn(
                "{where} speaks no TLS: tokens, and all that is sent there, can be read on the way",
                where=where,
            )

    def credentials(self) -> Credentials:
        """
        Read the keys and tokens.

        Raises:
            StartFailed: They cannot be read, or cannot be used.
        """
        settings = self._settings
        credentials = Credentials(
            tokens=read_tokens(settings.token_file) if settings.token_file else (),
            key_pairs=tuple(
                listener.read_keys() if listener.read_keys is not None else None
                for listener in self._listeners
            ),
            client_ca=read_pem(settings.client_ca, "--client-ca") if settings.client_ca else "",
        )
        pairs = [pair for pair in credentials.key_pairs if pair is not None]
        if settings.client_ca and not pairs:
            raise StartFailed("--client-ca is of no use without TLS: give --tls, or --listen ssl:")
        for listener, sock in zip(self._listeners, self.sockets, strict=False):
            self._check(listener, sock, credentials)  # what was safe at the start has to stay so
        for pair in pairs:
            if Secure(pair, credentials.client_ca).is_expired(self._wall_clock()):
                self._log.warn("{origin}: the certificate has expired", origin=pair.origin)
        self._warn_of_unknown(credentials)
        return credentials

    def _warn_of_unknown(self, credentials: Credentials) -> None:
        known = {identity for identity, _ in credentials.tokens}
        for identity, _ in self._settings.allow:
            if not (credentials.client_ca or identity in known or _GLOB & set(identity)):
                self._log.warn("--allow {caller}=…: nobody has this identity", caller=identity)

    @property
    def addresses(self) -> str:
        """Tell where the daemon listens, for people."""
        return ", ".join(
            address_text(sock) + (" (TLS)" if listener.read_keys is not None else "")
            for listener, sock in zip(self._listeners, self.sockets, strict=True)
        )

    def close(self) -> None:
        """Close what is open, and remove the files of Unix sockets."""
        for listener in self._listeners:
            listener.remove_file()  # while its socket is open nobody else's file can pass for it
        while self.sockets:
            self.sockets.pop().close()
