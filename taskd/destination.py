"""
Where a caller connects to: descriptions of endpoints, and the files that TLS needs.

What ``tls:`` strings of Twisted's say is read here too, so that all of them tell
why a handshake failed. Everything is read at once: what is wrong with it is
found where it was written, and not when a call is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from OpenSSL.crypto import X509, PKey
from OpenSSL.SSL import Error as OpenSslError
from twisted.internet.endpoints import HostnameEndpoint, clientFromString, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.ssl import Certificate as TrustedCertificate
from twisted.internet.ssl import CertificateOptions, platformTrust, trustRootFromCertificates

from taskd.trust import Verified, words_of
from taskd.wire import ALPN

__all__ = ["Certificate", "PemFile", "endpoint_of"]

PemFile = str | os.PathLike[str]

Certificate = PemFile | tuple[PemFile, PemFile]
"""A PEM file with a certificate chain and its private key, or one file for each."""

_TLS_PARAMETERS: Final = (
    "host",
    "port",
    "timeout",
    "bindAddress",
    "certificate",
    "privateKey",
    "trustRoots",
    "endpoint",
)
"""What Twisted's ``tls:`` strings may say, in the order of those without a name."""

_DEFAULT_CONNECT_SECONDS: Final = "30"

_UNKNOWN_KIND: Final = "Unknown endpoint type"
"""How Twisted begins to say that nothing by the first word of a string is known."""


def endpoint_of(
    reactor: Any,
    endpoint: str | IStreamClientEndpoint,
    *,
    ca: PemFile | None = None,
    certificate: Certificate | None = None,
) -> IStreamClientEndpoint:
    """
    Give the endpoint that a description stands for.

    One that begins with ``tls:`` says what Twisted's own may say, and what it
    makes tells why a handshake fails; others are Twisted's.

    Args:
        reactor: Makes the connections.
        endpoint: The description; an endpoint is given back as it is.
        ca: Path of the PEM file with the authorities to trust, or None for the
            platform's.
        certificate: Path of the PEM file with the client's certificate, its chain
            and its key; or the paths of certificate and key; or None.

    Raises:
        ValueError: *endpoint* describes none, or one that verifies no name; *ca*
            or *certificate* cannot be used, or *endpoint* has no use for it.
    """
    has_ours = ca is not None or certificate is not None
    if not isinstance(endpoint, str):
        if has_ours:
            raise ValueError(
                "ca and certificate are for an endpoint that is a string such as "
                "'tls:tasks.example.org:12345'; an endpoint object brings its own"
            )
        return endpoint
    try:
        kind, *parts = _parts_of(endpoint)
        if kind[1].upper() == "TLS":
            return _tls_endpoint(reactor, _named(parts), ca, certificate)
        if has_ours:
            raise ValueError("ca and certificate are for TLS: let it begin with tls:")
        if kind[1].upper() == "TCP":
            _check_port(parts)
        if kind[1].upper() == "SSL":
            raise ValueError("ssl: hardly verifies the server's name: write tls:HOST:PORT")
        made: IStreamClientEndpoint = clientFromString(reactor, endpoint)
    except (TypeError, ValueError, OSError) as error:
        hint = ": put tcp: or tls: before it" if str(error).startswith(_UNKNOWN_KIND) else ""
        raise ValueError(f"{endpoint!r} cannot be connected to: {error}{hint}") from None
    return made


def _parts_of(description: str) -> list[tuple[str, str]]:
    """Take a description apart as Twisted does: names and values, '' for what has no name."""
    parts, name, value = [], "", ""
    letters = iter(description)
    for letter in letters:
        if letter == "\\":
            value += next(letters, "")
        elif letter == ":":
            parts.append((name, value))
            name = value = ""
        elif letter == "=" and not name:
            name, value = value, ""
        else:
            value += letter
    return [*parts, (name, value)]


def _named(parts: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Give the parameters of a ``tls:`` string by their names."""
    names = iter(_TLS_PARAMETERS)
    parameters: dict[str, str] = {}
    for given, value in parts:
        name = given or next(names, "")
        if name not in _TLS_PARAMETERS:
            raise ValueError(f"tls: has no parameter {given or value!r}")
        if name in parameters:
            raise ValueError(f"{name} is given twice")
        parameters[name] = value
    return parameters


def _number(name: str, text: str) -> int:
    """Read a number, and tell which one it is if it is none: Twisted would not."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"a {name} is a number, not {text!r}")
    return int(text)


def _check_port(parts: Iterable[tuple[str, str]]) -> None:
    """Refuse a port of a ``tcp:`` string that is none; if there is none at all, Twisted does."""
    parts = list(parts)
    nameless = [value for name, value in parts if not name]
    named = dict(parts)
    for port in [*nameless[1:2], *([named["port"]] if "port" in named else [])]:
        if not 0 < _number("port", port) < 65536:
            raise ValueError(f"a port is a number from 1 to 65535, not {port}")


def _tls_endpoint(
    reactor: Any,
    parameters: dict[str, str],
    ca: PemFile | None,
    certificate: Certificate | None,
) -> IStreamClientEndpoint:
    host, port = parameters.get("host", ""), parameters.get("port", "")
    if not host or not 0 < _number("port", port or "0") < 65536:
        raise ValueError("it needs a host and a port, as in tls:tasks.example.org:12345")
    creator = _creator(
        host,
        _authorities(ca, parameters.get("trustRoots")),
        _own_certificate(certificate, parameters.get("certificate"), parameters.get("privateKey")),
    )
    below: IStreamClientEndpoint
    if "endpoint" in parameters:
        below = clientFromString(reactor, parameters["endpoint"])
    else:
        address = parameters.get("bindAddress")
        below = HostnameEndpoint(
            reactor,
            host,
            int(port),
            _number("timeout", parameters.get("timeout", _DEFAULT_CONNECT_SECONDS)),
            None if address is None else (address, 0),
        )
    wrapped: IStreamClientEndpoint = wrapClientTLS(creator, below, clock=reactor)
    return wrapped


def _authorities(ca: PemFile | None, directory: str | None) -> list[x509.Certificate] | None:
    """Read whom to trust; None: the platform's."""
    if ca is not None and directory is not None:
        raise ValueError("give ca or trustRoots, not both")
    if ca is not None:
        return _certificates("ca", ca)
    if directory is None:
        return None
    found = []
    for path in sorted(Path(directory).iterdir()):
        if path.suffix.lower() == ".pem":
            try:
                found += _certificates("trustRoots", path)
            except ValueError:
                continue  # as Twisted does: the directory is often somebody else's
    if not found:
        raise ValueError(f"trustRoots {directory}: no .pem file with a certificate")
    return found


def _own_certificate(
    certificate: Certificate | None, path: str | None, key_path: str | None
) -> tuple[list[x509.Certificate], PKey] | None:
    """Read what the client shows, leaf first; None: nothing."""
    if certificate is not None and (path is not None or key_path is not None):
        raise ValueError("give certificate by keyword or in the string, not both")
    if certificate is None:
        if path is None:
            if key_path is not None:
                raise ValueError("privateKey is of no use without certificate")
            return None
        certificate = (path, path if key_path is None else key_path)
    pair = certificate if isinstance(certificate, tuple) else (certificate, certificate)
    if len(pair) != 2:
        raise ValueError("certificate must be a path, or a pair of paths: certificate and key")
    chain, key = _certificates("certificate", pair[0]), _private_key(pair[1])
    if _spki(key.public_key()) != _spki(chain[0].public_key()):
        raise ValueError(
            f"certificate: the private key in {pair[1]} does not fit "
            f"the first certificate in {pair[0]}"
        )
    try:
        return chain, PKey.from_cryptography_key(key)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"certificate {pair[1]}: no key of a kind that TLS can use") from None


def _content(what: str, path: PemFile) -> bytes:
    try:
        return Path(path).read_bytes()
    except TypeError:
        raise ValueError(f"{what} must be a path, not {type(path).__name__}") from None
    except OSError as error:
        raise ValueError(f"{what} {path}: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise ValueError(f"{what} {path!r}: {error}") from None


def _certificates(what: str, path: PemFile) -> list[x509.Certificate]:
    """Read all certificates of a PEM file, of which there is one at least."""
    content = _content(what, path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ValueError(f"{what} {path}: no certificate in PEM can be read: {error}") from None


def _private_key(path: PemFile) -> PrivateKeyTypes:
    """Read a private key, and never ask anybody for a passphrase: OpenSSL's own reader would."""
    content = _content("certificate", path)
    try:
        return load_pem_private_key(content, None)
    except TypeError:
        raise ValueError(
            f"certificate {path}: the private key is encrypted: give one without a passphrase, "
            "in a file that only this program can read"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"certificate {path}: no private key in PEM can be read: {error}"
        ) from None


def _spki(key: Any) -> bytes:
    """Write a public key, so that two of any kinds can be compared."""
    written: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return written


def _creator(
    host: str,
    authorities: list[x509.Certificate] | None,
    own: tuple[list[x509.Certificate], PKey] | None,
) -> Verified:
    """Make what makes the connections. TLS 1.2 at least and no compression are Twisted's terms."""
    shown: dict[str, Any] = {}
    if own is not None:
        leaf, *chain = (X509.from_cryptography(certificate) for certificate in own[0])
        shown.update(certificate=leaf, privateKey=own[1], extraCertChain=chain)
    root = platformTrust()
    if authorities is not None:
        root = trustRootFromCertificates(
            [TrustedCertificate(X509.from_cryptography(authority)) for authority in authorities]
        )
    options = CertificateOptions(trustRoot=root, acceptableProtocols=[ALPN], **shown)
    try:
        options.getContext()  # What OpenSSL does not like of all this, it is to say now.
    except OpenSslError as error:
        raise ValueError(f"certificate cannot be used: {words_of(error)}") from None
    return Verified(options, host)
