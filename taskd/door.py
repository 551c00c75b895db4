"""
Who is let in at one worker: grants, waits for whoever guesses, and what the log says.

The rules are ``access``'s; here they meet connections. What is said is said
sparingly, since whoever knocks decides how often.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable
from ipaddress import ip_address, ip_network
from typing import Any, Final, Protocol

from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from taskd.access import Access, Grant
from taskd.slots import CALLERS_BYTES
from taskd.throttle import Penalties, Throttle
from taskd.tls import reason_of

__all__ = ["Door", "Shown", "Visitor", "host_of"]

_LONGEST_SHOWN_NAME: Final = 64
_REST: Final = "…"


class Shown(Protocol):
    """Where it is shown whose connections there are: a slot, seen from here."""

    def show_callers(self, callers: str, /) -> None: ...  # noqa: D102


class Door:
    """
    What the connections of one process have in common, before and after they are known.

    Args:
        access: The rules.
        slot: Where it is shown whose connections these are.
        clock: Gives seconds that never go back.

    Attributes:
        asks: True: whoever has no certificate has to show a token.
        unasked: What a connection may do that has shown nothing; None: it has to.
    """

    _log = Logger(namespace="taskd.door")

    def __init__(self, access: Access, slot: Shown, clock: Callable[[], float]) -> None:
        self._slot = slot
        self._clock = clock
        self._penalties = Penalties()
        self._throttle = Throttle()
        self._callers: Counter[str] = Counter()
        self.revise(access)

    def revise(self, access: Access) -> None:
        """Go by other rules from now on; what was granted stands until it is looked at."""
        self._access = access
        self.asks = access.asks
        self.unasked = access.unasked()
        self.by_certificate = access.by_certificate

    def still_grants(self, grant: Grant, is_other_ca: bool) -> bool:
        """Tell whether the rules of now know what a connection has shown."""
        if grant.token:
            found = self._access.by_digest(grant.token)
            return found is not None and found.identity == grant.identity
        return not is_other_ca if grant.identity else self.unasked is not None

    def penalty(self, host: str) -> float:
        """Tell how many seconds somebody waits who has guessed wrongly."""
        return self._penalties.seconds(host, self._clock())

    def by_token(self, host: str, token: str) -> Grant | None:
        """Give what a token grants, or None, which is remembered."""
        grant = self._access.by_token(token)
        if grant is None:
            self._penalties.failed(host, self._clock())
        return grant

    def by_digest(self, digest: str) -> Grant | None:
        """Give what was granted elsewhere for a token, or None if it is not known any more."""
        return self._access.by_digest(digest)

    def came(self, identity: str) -> None:
        """Show that one more connection is an identity's."""
        self._callers[identity] += 1
        self._show()

    def went(self, identity: str) -> None:
        """Show that one connection of an identity's has gone."""
        self._callers[identity] -= 1
        if not self._callers[identity]:
            del self._callers[identity]
        self._show()

    def _show(self) -> None:
        """Show the identities with most connections, as many as there is room for."""
        shown: dict[str, int] = {}
        rest = 0
        for identity, count in self._callers.most_common():
            name = identity[:_LONGEST_SHOWN_NAME]
            longer = {**shown, name: shown.get(name, 0) + count}
            if len(json.dumps({**longer, _REST: self._callers.total()})) <= CALLERS_BYTES:
                shown = longer
            else:
                rest += count
        if rest:
            shown[_REST] = rest
        self._slot.show_callers(json.dumps(shown) if shown else "")

    def say(self, key: Hashable, words: str, *, level: Any = LogLevel.warn, **more: Any) -> None:
        """
        Log a line, unless one of its kind was logged in the last minute.

        Args:
            key: Its kind.
            words: What is said, for the logger to fill in.
            level: How loud.
            more: What is filled in.
        """
        left_out = self._throttle.admit(key, self._clock())
        if left_out is not None:
            if left_out:
                words += " ({left_out} more were not logged)"
            self._log.emit(level, words, left_out=left_out, **more)


class Visitor:
    """
    One connection, as the door sees it.

    Args:
        door: Where it comes in.
        address: Its peer's, as Twisted gives it, or None.
    """

    __slots__ = ("_address", "_caller", "_door", "_identity")

    def __init__(self, door: Door, address: Any) -> None:
        self._door = door
        self._address = address
        self._caller = self._identity = ""

    def about(self) -> dict[str, str]:
        """Give what the log says of whoever it is; a caller that has gone is named still."""
        fields = {"connection": str(self)}
        return {**fields, "caller": self._caller} if self._caller else fields

    @property
    def host(self) -> str:
        """Name its machine, as ``host_of`` does."""
        return host_of(self._address)

    def __str__(self) -> str:
        """Name it for the log."""
        host = getattr(self._address, "host", None)
        return "a Unix socket" if host is None else f"{host} port {self._address.port}"

    def identify(
        self,
        token: str,
        call_later: Callable[[float, Callable[[], None]], object],
        done: Callable[[Grant | None], None],
    ) -> None:
        """
        Find out what a token grants.

        Where a wrong one came from a while ago, the next is not looked at at
        once; and that it is wrong is not told at once.

        Args:
            token: What it shows.
            call_later: Calls something after so many seconds.
            done: Takes the grant, or None; possibly before this returns.
        """

        def look() -> None:
            grant = self._door.by_token(self.host, token)
            if grant is None:
                self._say("token", "a wrong token")
                call_later(self._door.penalty(self.host), lambda: done(None))
            else:
                done(grant)

        penalty = self._door.penalty(self.host)
        if penalty:
            call_later(penalty, look)
        else:
            look()

    def is_let_in(self, grant: Grant | None) -> None:
        """Take note of who it is, or that it has to say so again."""
        self.left()
        if grant is not None and grant.identity:
            self._caller = self._identity = grant.identity
            self._door.came(grant.identity)
            self._door.say(
                ("let in", grant.identity),
                "{connection}: it is {caller}",
                level=LogLevel.info,
                **self.about(),
            )

    def left(self) -> None:
        """Take note that it has gone."""
        if self._identity:
            self._door.went(self._identity)
            self._identity = ""

    # What the log says.

    def turned_down(self, name: str, grant: Grant | None) -> None:
        """Say that it may not call a function."""
        if grant is None:
            self._say("stranger", "it has not said who it is")
            return
        who = grant.identity or "who shows nothing"
        self._door.say(
            ("turned down", who),  # which names there are is the caller's to say
            "{connection}: {who} may not call {function}",
            who=who,
            function=ascii(name)[:_LONGEST_SHOWN_NAME],
            **self.about(),
        )

    def is_foreign(self, protocol: str) -> None:
        """Say that it speaks another protocol."""
        self._say("foreign", f"it speaks {protocol}, and is cut off")

    def has_no_handshake(self, why: Failure) -> None:
        """Say that it failed to begin TLS."""
        self._say("handshake", f"no TLS handshake: {reason_of(why)}")

    def does_not_read(self) -> None:
        """Say that it does not read what it asked for."""
        self._say("unread", "it does not read its replies, and is cut off")

    def _say(self, kind: str, what: str) -> None:
        key = (kind, what, self.host)
        self._door.say(key, "{connection}: {reason}", reason=what, **self.about())


def host_of(address: Any) -> str:
    """
    Name a peer's machine; of IPv6 the part that is one customer's, not one machine's.

    Args:
        address: As Twisted gives it, or None.
    """
    host = getattr(address, "host", None)
    if host is None:
        return "a Unix socket"
    numeric = ip_address(host)
    if numeric.version == 4:
        return str(numeric)
    return str(numeric.ipv4_mapped or ip_network((int(numeric), 64), strict=False))
