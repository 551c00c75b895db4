"""
TLS on the daemon's side: what it shows, what it asks for, and how bytes pass.

Which files the keys come from is ``credentials``'s; what an identity may do is
``access``'s; the caller's side is ``trust``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto
from twisted.internet.protocol import Factory
from twisted.internet.ssl import Certificate, CertificateOptions, trustRootFromCertificates
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from taskd.credentials import KeyPair
from taskd.errors import StartFailed
from taskd.wire import ALPN

__all__ = ["Secure", "SecureTransport", "identity_of", "reason_of"]


class SecureTransport(TLSMemoryBIOProtocol):
    """
    A TLS connection, seen from the protocol that is spoken over it.

    What it does not have itself it would lend from the socket underneath; what
    must not be done behind TLS's back is therefore taken away here.
    """

    is_secure: ClassVar[bool] = True
    give_away: ClassVar[None] = None
    """Its keys are this process's: it cannot go on in another one."""
    loseWriteConnection: ClassVar[None] = None
    """There is no half of a close."""

    transport: Any

    @property
    def has_unsent(self) -> bool:
        """Tell whether something waits until the kernel takes it."""
        return bool(self._appSendBuffer or self.transport.has_unsent)

    @property
    def unsent_bytes(self) -> int:
        """Tell how much waits."""
        waiting: int = self.transport.unsent_bytes
        return waiting + sum(map(len, self._appSendBuffer))

    @property
    def unread_bytes(self) -> int:
        """Tell how much the peer's machine has not taken."""
        waiting: int = self.transport.unread_bytes
        return waiting + sum(map(len, self._appSendBuffer))

    @property
    def on_sent(self) -> Callable[[], None] | None:
        """What is called when nothing waits to be sent any more."""
        called: Callable[[], None] | None = self.transport.on_sent
        return called

    @on_sent.setter
    def on_sent(self, called: Callable[[], None] | None) -> None:
        """Set what that is."""
        self.transport.on_sent = called

    def write(self, data: bytes) -> bool:
        """Send, and tell whether all is on its way, as ``EagerWrites.write``."""
        super().write(data)  # type: ignore[no-untyped-call]
        return not self.has_unsent

    def abortConnection(self) -> None:
        """
        End it with what is unsaid unsaid.

        Twisted would say goodbye first; but an orderly end tells a caller that
        what it has no answer to was not run.
        """
        self._aborted = True
        self.disconnecting = True
        self.transport.abortConnection()

    @property
    def peer_identity(self) -> str:
        """Give the identity that the peer's verified certificate stands for, or ''."""
        certificate = self.getPeerCertificate()  # type: ignore[no-untyped-call]
        return identity_of(certificate.to_cryptography()) if certificate is not None else ""


class Secure:
    """
    Makes the TLS connections of one listening socket.

    TLS 1.2 and 1.3; no compression, no renegotiation, no session tickets. A
    caller that names protocols (ALPN) and not ours has no handshake: a browser's
    request cannot be led here by who controls the network.

    Args:
        pair: What is shown to callers.
        client_ca: In PEM the authorities that callers' certificates must come
            from, or '' to ask for none.
        protocol: The name in ALPN of what is spoken over it.

    Attributes:
        expires: When the certificate does, in UTC.

    Raises:
        StartFailed: The key does not fit, or something is no PEM.
    """

    def __init__(self, pair: KeyPair, client_ca: str = "", protocol: bytes = ALPN) -> None:
        try:
            own, *chain = x509.load_pem_x509_certificates(pair.certificate.encode())
            key = load_pem_private_key(pair.key.encode(), password=None)
        except TypeError:
            raise StartFailed(
                f"{pair.origin}: the private key is encrypted, and nobody is there to be asked "
                "for its passphrase; `openssl pkey` takes it off"
            ) from None
        except (ValueError, UnsupportedAlgorithm) as error:
            raise StartFailed(f"{pair.origin}: the certificate or its key: {error}") from None
        trusted = _authorities(client_ca) if client_ca else None
        try:
            options = CertificateOptions(
                privateKey=crypto.PKey.from_cryptography_key(key),  # type: ignore[arg-type]
                certificate=crypto.X509.from_cryptography(own),
                extraCertChain=[crypto.X509.from_cryptography(one) for one in chain],
                trustRoot=trusted,
            )
            context = options.getContext()
            context.set_alpn_select_callback(partial(_choose_protocol, protocol))
            context.check_privatekey()
        except (SSL.Error, TypeError, ValueError) as error:
            raise StartFailed(
                f"{pair.origin}: the certificate cannot be used with this key: {reason_of(error)}"
            ) from None
        self.expires = own.not_valid_after_utc
        self._factory = TLSMemoryBIOFactory(options, False, Factory())

    def is_expired(self, now: float) -> bool:
        """Tell whether the certificate is worth nothing any more, at UTC epoch seconds *now*."""
        return self.expires <= datetime.fromtimestamp(now, UTC)

    def wrap(self, protocol: Any) -> SecureTransport:
        """Have a protocol speak TLS: give what is to be connected in its place."""
        return SecureTransport(self._factory, protocol)  # type: ignore[no-untyped-call]


def _choose_protocol(ours: bytes, connection: SSL.Connection, offered: list[bytes]) -> bytes:
    if ours not in offered:
        raise SSL.Error([("", "", f"it offers other protocols than {ours.decode()}")])
    return ours


def _authorities(pem: str) -> Any:
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        why = str(error).partition(" See ")[0]
        raise StartFailed(f"--client-ca: a certificate in it cannot be read: {why}") from None
    return trustRootFromCertificates(
        [Certificate(crypto.X509.from_cryptography(one)) for one in found]
    )


def identity_of(certificate: x509.Certificate) -> str:
    """
    Name the subject of a certificate.

    Its common name if it has just one that cannot be taken for anything else;
    otherwise the whole subject, as RFC 4514 writes it, such as ``O=acme,OU=web``.
    The former never has a '=' in it and the latter always, so no certificate can
    pass for another one's subject.

    Args:
        certificate: It must have been verified.
    """
    names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if len(names) == 1:
        name = str(names[0].value)
        if name and name.isprintable() and not set(name) & set("=,"):
            return name
    return certificate.subject.rfc4514_string() or "="


def reason_of(error: BaseException | Failure) -> str:
    """Say in words why OpenSSL gave up."""
    value = error.value if isinstance(error, Failure) else error
    if isinstance(value, SSL.Error) and value.args and value.args[0]:
        return "; ".join(str(each[-1]) for each in value.args[0])
    return str(value)
