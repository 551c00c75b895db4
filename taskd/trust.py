"""
Whom a caller trusts, and how it shows who it is: TLS and the token.

A connection over TLS is to be to the right daemon or not to be. What was wrong
with it is told by an exception of its own for each cause, since each has another
remedy. This is the caller's side alone; the files that say whom to trust are
``destination``'s.
"""

from __future__ import annotations

import re
from typing import Any, Final

from cryptography import x509
from OpenSSL import SSL
from OpenSSL.crypto import X509
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import extract_patterns
from service_identity.hazmat import (
    DNS_ID,
    DNSPattern,
    IPAddress_ID,
    IPAddressPattern,
    verify_service_identity,
)
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import CertificateOptions
from twisted.python.failure import Failure
from zope.interface import implementer

from taskd.errors import (
    CertificateExpired,
    CertificateNotTrusted,
    ClientCertificateRefused,
    TlsFailed,
    WrongServerName,
)
from taskd.wire import NO_TERMS, encode_request

__all__ = [
    "GREETING_ID",
    "Verified",
    "failure_of_handshake",
    "greeting",
    "refused_certificate",
    "words_of",
]

GREETING_ID: Final = 0
"""The id of the request that shows the token; calls count from 1."""

_NO_TOKEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and surrogates, which UTF-8 cannot carry."""

_MOST_NAMES_TOLD: Final = 5

_REFUSED_CERTIFICATE: Final = re.compile(
    "alert ((?:bad|unsupported) certificate|certificate (?:required|revoked|expired|unknown)"
    "|unknown ca|access denied|decrypt error)"
)
"""The alerts by which a server says that it does not take the client's certificate."""

_NO_TLS: Final = re.compile("wrong version number|packet length too long|http request")
"""What OpenSSL makes of bytes that are no TLS."""

_NO_COMMON_VERSION: Final = re.compile("unsupported protocol|alert protocol version")

_CODES: Final = SSL.X509VerificationCodes

_SELF_SIGNED: Final = frozenset(
    {_CODES.ERR_DEPTH_ZERO_SELF_SIGNED_CERT, _CODES.ERR_SELF_SIGNED_CERT_IN_CHAIN}
)
_UNKNOWN_ISSUER: Final = frozenset(
    {
        _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT,
        _CODES.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        _CODES.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
    }
)


def greeting(token: str | None) -> bytes:
    """
    Give what is sent first of all on every connection.

    Args:
        token: What the daemon knows the caller by, or None.

    Returns:
        The line that shows the token, or nothing if there is none.

    Raises:
        ValueError: *token* cannot be one. The message does not tell it.
    """
    if token is None:
        return b""
    if not isinstance(token, str) or not token:
        raise ValueError("token must be a string, and not an empty one")
    if _NO_TOKEN.search(token):
        raise ValueError(
            "token has a control character, such as the line's end of the file it was read from"
        )
    return encode_request(("taskd.auth", {"token": token}, str(GREETING_ID), NO_TERMS))


@implementer(IOpenSSLClientConnectionCreator)
class Verified:
    """
    Makes connections each of which keeps why its server was not trusted.

    Args:
        options: The terms of TLS, and whom to trust.
        host: The name or the IP address that the server's certificate must have.

    Raises:
        ValueError: *host* can be neither.
    """

    def __init__(self, options: CertificateOptions, host: str) -> None:
        self._options = options
        self._host = host
        is_address = isIPAddress(host) or isIPv6Address(host)
        self._identity = IPAddress_ID(host) if is_address else DNS_ID(host)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:  # noqa: N803
        """Make the TLS of one connection."""
        connection: SSL.Connection = self._options.clientConnectionForTLS(tlsProtocol)
        if isinstance(self._identity, DNS_ID):
            connection.set_tlsext_host_name(self._identity.hostname)
        verdict = _Verdict(self._host, self._identity)
        # Its application data is Twisted's, and a verdict told to Twisted would abort
        # the connection before the server has heard by an alert what is wrong with it.
        connection.taskd_verdict = verdict  # type: ignore[attr-defined]
        # Not by ``optionsForClientTLS``, which takes a certificate for any name at all
        # if one of its names is against the rules, such as DNS:127.0.0.1.
        connection.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verdict.is_good)
        return connection


class _Verdict:
    """
    What was found of one server's certificate.

    Attributes:
        error: Why the server is not trusted, or None.
    """

    def __init__(self, host: str, identity: DNS_ID | IPAddress_ID) -> None:
        self._host = host
        self._identity = identity
        self.error: TlsFailed | None = None

    def is_good(self, _: SSL.Connection, shown: X509, code: int, depth: int, ok: int) -> bool:
        """Judge one certificate of the chain; what this raises is a no to OpenSSL, too."""
        if not ok:
            self.error = self.error or _why_not_trusted(shown.to_cryptography(), code, depth)
            return False
        if depth == 0:
            self.error = self.error or self._why_another(shown)
        return self.error is None

    def _why_another(self, shown: X509) -> WrongServerName | None:
        """Tell why a trusted certificate is not this server's."""
        try:
            patterns = extract_patterns(shown.to_cryptography())
            verify_service_identity(patterns, [self._identity], [])
        except VerificationError:
            names = [
                p.pattern.decode("ascii", "replace")
                if isinstance(p, DNSPattern)
                else str(p.pattern)
                for p in patterns
                if isinstance(p, DNSPattern | IPAddressPattern)
            ]
            told = ", ".join(names[:_MOST_NAMES_TOLD]) or "no name"
            told += ", …" if len(names) > _MOST_NAMES_TOLD else ""
            return WrongServerName(
                f"the server's certificate is for {told} and not for {self._host}: connect to a "
                "name that it has, or give the server a certificate that has this one"
            )
        except (CertificateError, ValueError) as error:
            return WrongServerName(
                f"the server's certificate does not show whether it is for {self._host}: {error} "
                "Give the server a certificate that has this as a subject alternative name"
            )
        return None


def _why_not_trusted(shown: x509.Certificate, code: int, depth: int) -> TlsFailed:
    """Give the error for one of OpenSSL's codes."""
    whose = "the server's certificate"
    if depth:
        whose = f"the certificate of the server's authority {_name_of(shown.subject)}"
    if code == _CODES.ERR_CERT_HAS_EXPIRED:
        return CertificateExpired(
            f"{whose} has expired, on {shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: renew it"
        )
    if code == _CODES.ERR_CERT_NOT_YET_VALID:
        return CertificateExpired(
            f"{whose} is not valid before {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
            "look whether the clock of this machine is right"
        )
    if code in _SELF_SIGNED:
        return CertificateNotTrusted(
            f"{whose} is self-signed and not among those that are trusted: if it is the right "
            "one, give its file as ca"
        )
    if code in _UNKNOWN_ISSUER:
        return CertificateNotTrusted(
            f"{whose} was issued by {_name_of(shown.issuer)}, which is not trusted: give the "
            "file of that authority as ca, or let the server send all of its chain"
        )
    return CertificateNotTrusted(
        f"{whose} is not trusted: OpenSSL's verification ended with code {code}"
    )


def _name_of(name: x509.Name) -> str:
    return repr(name.rfc4514_string())[:200]


def failure_of_handshake(transport: Any, reason: Failure) -> TlsFailed:
    """
    Tell why a TLS connection never stood.

    Args:
        transport: The connection's, of Twisted's TLS.
        reason: What its protocol was told as it was lost.

    Returns:
        The error for its cause, if that has one of its own.
    """
    verdict = getattr(transport.getHandle(), "taskd_verdict", None)
    if isinstance(verdict, _Verdict) and verdict.error is not None:
        return verdict.error
    error = reason.value
    if isinstance(error, VerificationError):  # from an endpoint that is not ours
        return WrongServerName(f"the server's certificate is for another name: {error}")
    if not isinstance(error, SSL.Error):
        return TlsFailed(
            f"the connection ended during the TLS handshake: {reason.getErrorMessage()} "
            "Try again later; if it always does, look whether the server speaks TLS there"
        )
    told = words_of(error)
    if _NO_TLS.search(told):
        return TlsFailed(
            f"the server does not speak TLS there ({told}): look whether the port is right, "
            "or connect by tcp: if the way to it is safe"
        )
    if _NO_COMMON_VERSION.search(told):
        return TlsFailed(f"the server speaks neither TLS 1.2 nor TLS 1.3 ({told}): update it")
    return refused_certificate(reason) or TlsFailed(
        f"the TLS handshake failed: {told}"
        + (" (perhaps the daemon wants a client certificate)" if "alert" in told else "")
    )


def refused_certificate(reason: Failure) -> ClientCertificateRefused | None:
    """
    Tell whether a connection was lost because the daemon did not take the client's certificate.

    In TLS 1.3 a client has finished its handshake before the daemon has looked
    at its certificate, so this comes behind it.

    Args:
        reason: What the connection's protocol was told as it was lost.
    """
    if not isinstance(reason.value, SSL.Error):
        return None
    found = _REFUSED_CERTIFICATE.search(words_of(reason.value))
    if found is None:
        return None
    if found[1] == "certificate required":
        return ClientCertificateRefused(
            "the daemon wants a client certificate, and got none: give one as certificate"
        )
    return ClientCertificateRefused(
        f"the daemon refused the client certificate ({found[1]}): give one as certificate that "
        "is valid, and that an authority has signed which the daemon trusts"
    )


def words_of(error: SSL.Error) -> str:
    """
    Give the words of OpenSSL.

    Args:
        error: What it raised.

    Returns:
        They, or the error's name if it has none.
    """
    queue = error.args[0] if error.args else ()
    if isinstance(queue, list):
        return "; ".join(entry[-1] for entry in queue if entry[-1]) or "no reason is known"
    return str(error) or type(error).__name__
