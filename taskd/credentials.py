"""
The files that hold secrets: tokens, private keys, and the certificates beside them.

They are read by the supervisor, at the start and at every reload, and go to the
workers over a socket; no argument and no environment of any process shows them.
What they are good for is decided in ``access`` and ``tls``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from taskd.access import digest_of
from taskd.errors import StartFailed

__all__ = ["Credentials", "KeyPair", "read_key_pair", "read_pem", "read_secret", "read_tokens"]

_IDENTITY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}")
_DIGEST_MARK: Final = "sha256"
_ASSIGNMENT: Final = re.compile(r"[A-Za-z0-9_.@-]{1,64}=[^=]")
_DIGEST: Final = re.compile(rf"{_DIGEST_MARK}:([0-9a-f]{{64}})")
_CERTIFICATE: Final = "-----BEGIN CERTIFICATE-----"
_SHORTEST_TOKEN: Final = 16
_LONGEST_TOKEN: Final = 1024
_ONLY_IDENTITY: Final = "token"
"""The identity of a token that stands alone on its line."""


@dataclass(frozen=True)
class KeyPair:
    """
    A certificate and its private key.

    Attributes:
        certificate: In PEM, those that vouch for it behind it.
        key: In PEM.
        origin: What it was read from, for messages.
    """

    certificate: str
    key: str = dataclasses.field(repr=False)
    origin: str


@dataclass(frozen=True)
class Credentials:
    """
    What one generation of workers was given.

    Attributes:
        tokens: Pairs of an identity and a token's digest.
        key_pairs: For each listening socket what it shows, or None if it speaks no TLS.
        client_ca: In PEM the authorities that callers' certificates must come from, or ''.
    """

    tokens: tuple[tuple[str, str], ...] = ()
    key_pairs: tuple[KeyPair | None, ...] = ()
    client_ca: str = ""

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON types, for ``from_json`` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Credentials:
        """Make it again from what ``to_json`` gave."""
        return cls(
            tokens=tuple((identity, digest) for identity, digest in fields["tokens"]),
            key_pairs=tuple(pair and KeyPair(**pair) for pair in fields["key_pairs"]),
            client_ca=fields["client_ca"],
        )


def read_tokens(path: str, name: str = "--token-file") -> tuple[tuple[str, str], ...]:
    """
    Read a file of tokens.

    A line holds ``IDENTITY:TOKEN``, or a token alone, whose identity is then
    ``token``; blank lines and those that begin with ``#`` are for people. An
    identity may have several tokens, so that one can be replaced without a
    moment at which neither works. Instead of a token there may be its digest,
    ``sha256:`` and 64 hexadecimal digits.

    Args:
        path: The file; nobody but its owner and its group may read it.
        name: The option that names it, for messages.

    Returns:
        Pairs of an identity and the digest of a token, at least one.

    Raises:
        StartFailed: The file cannot be read, others may read it, or a line is
            none of these; the message names the line and never its text.
    """
    option = f"{name} {path}"
    found: dict[str, str] = {}
    for number, identity, digest in _tokens_in(_read(path, option, is_secret=True), option):
        if found.setdefault(digest, identity) != identity:
            raise StartFailed(
                f"{option}, line {number}: this token is {found[digest]}'s already; "
                "each identity needs its own"
            )
    if not found:
        raise StartFailed(f"{option}: there is no token in it, so nobody could call anything")
    return tuple((identity, digest) for digest, identity in found.items())


def _tokens_in(text: str, option: str) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        identity, colon, token = words.partition(":")
        if not colon or identity == _DIGEST_MARK:  # a digest has a colon of its own
            identity, token = _ONLY_IDENTITY, words
            if _ASSIGNMENT.match(words):
                raise StartFailed(f"{option}, line {number}: give IDENTITY:TOKEN, with a colon")
        identity, token = identity.strip(), token.strip()
        if not _IDENTITY.fullmatch(identity):
            raise StartFailed(
                f"{option}, line {number}: give IDENTITY:TOKEN; an identity has letters, digits, "
                "'_', '.', '@' and '-', 64 at most"
            )
        if hashed := _DIGEST.fullmatch(token):
            yield number, identity, hashed[1]
            continue
        if token.startswith(f"{_DIGEST_MARK}:"):
            raise StartFailed(
                f"{option}, line {number}: a digest is {_DIGEST_MARK}: and 64 digits, 0-9 and a-f"
            )
        if not (_SHORTEST_TOKEN <= len(token) <= _LONGEST_TOKEN and token.isascii()):
            raise StartFailed(
                f"{option}, line {number}: give IDENTITY:TOKEN; a token has {_SHORTEST_TOKEN} to "
                f"{_LONGEST_TOKEN} characters of ASCII, `openssl rand -hex 32` makes a good one"
            )
        yield number, identity, digest_of(token)


def read_key_pair(certificate: str, key: str) -> KeyPair:
    """
    Read a certificate and its private key.

    Args:
        certificate: Path of a PEM file, the server's own certificate first.
        key: Path of a PEM file; nobody but its owner and its group may read it.

    Raises:
        StartFailed: One of them cannot be read, or others may read the key.
    """
    return KeyPair(
        read_pem(certificate, "--tls"),
        _read(key, f"--key {key}", is_secret=True),
        f"--tls {certificate}",
    )


def read_pem(path: str, option: str) -> str:
    """
    Read a PEM file of certificates, which is no secret.

    Raises:
        StartFailed: It cannot be read, or no certificate is in it.
    """
    text = _read(path, f"{option} {path}")
    if _CERTIFICATE not in text:
        raise StartFailed(f"{option} {path}: there is no certificate in PEM in it")
    return text


def read_secret(path: str, option: str) -> str:
    """
    Read a file that nobody but its owner and its group may read.

    Raises:
        StartFailed: It cannot be read, or others may read it.
    """
    return _read(path, f"{option} {path}", is_secret=True)


def _read(path: str, option: str, *, is_secret: bool = False) -> str:
    try:
        with open(path, encoding="utf-8", opener=_open_at_once) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise StartFailed(f"{option}: it is no regular file, so it cannot be read again")
            if is_secret and mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise StartFailed(
                    f"{option}: others may read or write it, so it is no secret; chmod 600 {path}"
                )
            return file.read()
    except OSError as error:
        raise StartFailed(f"{option}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartFailed(
            f"{option}: it is no text; `openssl x509 -inform der` makes PEM of DER"
        ) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, and wait for nobody: a pipe's other end may never come."""
    return os.open(path, flags | os.O_NONBLOCK)
