"""
What a gateway reads from files that others must not read: tokens, and its key.

They are read by the supervisor, at the start and at every reload, and go to its
processes over a pipe. What they are good for is ``access``'s, ``identity``'s and
``tls``'s.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from taskd.credentials import KeyPair, read_key_pair, read_secret, read_tokens
from taskd.errors import StartFailed
from taskd.gateway.settings import GatewaySettings

__all__ = ["Secrets"]


@dataclass(frozen=True)
class Secrets:
    """
    What one generation of processes was given.

    Attributes:
        tokens: Pairs of an identity and a token's digest: the callers'.
        watchers: The same, of those who may see the dashboard.
        own_token: What the gateway shows to the daemons, or ''.
        pair: Certificate and key, or None.
    """

    tokens: tuple[tuple[str, str], ...] = ()
    watchers: tuple[tuple[str, str], ...] = ()
    own_token: str = dataclasses.field(default="", repr=False)
    pair: KeyPair | None = None

    @classmethod
    def read(cls, settings: GatewaySettings) -> Secrets:
        """
        Read the files.

        Raises:
            StartFailed: One cannot be read, or has not what it should.
        """
        own_token = ""
        if settings.tasks_token_file:
            own_token = _own_token(settings.tasks_token_file)
        return cls(
            tokens=read_tokens(settings.token_file) if settings.token_file else (),
            watchers=read_tokens(settings.dashboard_token_file, "--dashboard-token")
            if settings.dashboard_token_file
            else (),
            own_token=own_token,
            pair=read_key_pair(settings.certificate, settings.key)
            if settings.certificate
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Give it as plain JSON types, for ``from_json`` in another process."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Secrets:
        """Make it again from what ``to_json`` gave."""
        pair = fields["pair"]
        return cls(
            tokens=tuple((who, digest) for who, digest in fields["tokens"]),
            watchers=tuple((who, digest) for who, digest in fields["watchers"]),
            own_token=fields["own_token"],
            pair=KeyPair(**pair) if pair else None,
        )


def _own_token(path: str) -> str:
    """Read the gateway's own token: one line, as a token file has it, or the token alone."""
    option = f"--tasks-token {path}"
    line = read_secret(path, "--tasks-token").strip()
    identity, colon, token = line.partition(":")
    if (colon and identity == "sha256") or token.startswith("sha256:"):
        raise StartFailed(f"{option}: the token itself is needed here, not its digest")
    if not line or not line.isprintable() or (colon and not token.strip()):
        raise StartFailed(f"{option}: give one token, on one line")
    return token.strip() if colon else line
