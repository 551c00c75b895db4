"""
Who a caller is, and what it may call.

An identity is a name: that of a token, or of a client certificate's subject.
Whoever need not show anything has the identity ''. Nothing here knows how a
token or a certificate comes; that is ``session``'s and ``tls``'s.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

__all__ = ["ALWAYS_ALLOWED", "AUTH", "CANCEL", "Access", "Grant", "digest_of"]

AUTH: Final = "taskd.auth"
"""The one function that a caller may call before it is known."""

CANCEL: Final = "taskd.cancel"
"""The function that takes back a call of the same connection."""

ALWAYS_ALLOWED: Final = frozenset({AUTH, CANCEL, "taskd.ping"})
"""What everybody who is known may call: it concerns their own connection alone."""

_LONGEST_KNOWN_NAME: Final = 128
_MOST_KNOWN_NAMES: Final = 4096
"""Answers that are remembered for one identity; a caller may ask for any name."""


@dataclass(frozen=True)
class Grant:
    """
    What a connection has shown, and may do for it.

    Attributes:
        identity: Its name, or '' for one that was not asked.
        token: The digest of the token that was shown, or ''.
        may_call: Tells whether a function may be called; None: every one may.
    """

    identity: str
    token: str = ""
    may_call: Callable[[str], bool] | None = None


def digest_of(token: str) -> str:
    """
    Give what is kept of a token.

    A token is random and long, so a plain digest is enough: there is no
    dictionary to try.
    """
    return hashlib.sha256(token.encode()).hexdigest()


class Access:
    """
    The daemon's rules.

    Args:
        tokens: Pairs of an identity and the digest of a token of its.
        allow: Pairs of an identity and the names that it may call, both as glob
            patterns; empty: everybody may call everything.
    """

    def __init__(
        self, tokens: Iterable[tuple[str, str]], allow: Iterable[tuple[str, Iterable[str]]]
    ) -> None:
        self._tokens = list(tokens)
        self._allow = [(who, tuple(names)) for who, names in allow]
        self._known: dict[str, Callable[[str], bool]] = {}

    @property
    def asks(self) -> bool:
        """Tell whether a caller without a certificate has to show a token."""
        return bool(self._tokens)

    def by_token(self, token: str) -> Grant | None:
        """
        Give what a token grants, or None if nobody has it.

        It takes as long for every token: the digests are compared to the last
        byte, and all of them.
        """
        return self.by_digest(digest_of(token))

    def by_digest(self, digest: str) -> Grant | None:
        """Give what the token of that digest grants; as ``by_token``."""
        found: Grant | None = None
        for identity, known in self._tokens:
            if hmac.compare_digest(known.encode(), digest.encode()):
                found = self._grant(identity, known)
        return found

    def by_certificate(self, identity: str) -> Grant:
        """Give what a certificate grants that was verified already."""
        return self._grant(identity)

    def unasked(self) -> Grant | None:
        """Give what a caller may do that shows nothing, or None if it has to show something."""
        return None if self._tokens else self._grant("")

    def _grant(self, identity: str, token: str = "") -> Grant:
        if not self._allow:
            return Grant(identity, token)
        may_call = self._known.get(identity)
        if may_call is None:
            may_call = _rule(
                [name for who, names in self._allow if fnmatchcase(identity, who) for name in names]
            )
            self._known[identity] = may_call  # the certificate authority bounds their number
        return Grant(identity, token, may_call)


def _rule(patterns: list[str]) -> Callable[[str], bool]:
    known = dict.fromkeys(ALWAYS_ALLOWED, True)

    def may_call(name: str) -> bool:
        answer = known.get(name)
        if answer is None:
            answer = any(fnmatchcase(name, pattern) for pattern in patterns)
            if len(known) < _MOST_KNOWN_NAMES and len(name) <= _LONGEST_KNOWN_NAME:
                known[name] = answer
        return answer

    return may_call
