"""
The zygotes of one daemon: the one that forks, and those of older and newer code.

At most times there is one. While new code is loaded there is a second; once it
has, the first stays until its last worker has gone. One that dies is replaced,
how soon is decided in ``policy``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from twisted.logger import Logger

from taskd.children import Zygote
from taskd.credentials import Credentials
from taskd.errors import StartFailed
from taskd.policy import Births
from taskd.process import describe_end
from taskd.settings import Settings
from taskd.slots import SupervisorSlot

__all__ = ["Owner", "Zygotes"]


class Owner(Protocol):
    """Who needs the zygotes."""

    @property
    def clock(self) -> Callable[[], float]: ...  # noqa: D102
    def credentials(self) -> Credentials: ...  # noqa: D102
    def zygote_loaded(self, is_reload: bool, /) -> None: ...  # noqa: D102
    def zygote_gone(self, zygote: Zygote, is_current: bool, /) -> None: ...  # noqa: D102


class Zygotes:
    """
    Keep a zygote that can fork.

    Args:
        owner: Is told when one can, and when one is gone.
        reactor: Keeps the delays.
        settings: What the operator decided.
        slot: Where it is shown how the last reload went.
        make: Spawns one that is to load what it is given.
    """

    _log = Logger(namespace="taskd.supervisor")

    def __init__(
        self,
        owner: Owner,
        reactor: Any,
        settings: Settings,
        slot: SupervisorSlot,
        make: Callable[[dict[str, Any]], Zygote],
    ) -> None:
        self._owner = owner
        self._reactor = reactor
        self._settings = settings
        self._slot = slot
        self._make = make
        self._births = Births()
        self._preload = settings.preload
        self._credentials = self._next_credentials = Credentials()
        self._current: Zygote | None = None
        self._next: Zygote | None = None
        self._old: set[Zygote] = set()
        self._reloads_again = False
        self._is_stopping = False

    @property
    def loaded(self) -> Zygote | None:
        """Give the one that can fork, or None."""
        current = self._current
        return current if current is not None and current.is_loaded else None

    @property
    def is_loading(self) -> bool:
        """Tell whether new code is loaded, or will be."""
        return self._next is not None or self._reloads_again

    @property
    def credentials(self) -> Credentials:
        """Give those of the newest code that was loaded."""
        return self._credentials

    def is_latest(self, zygote: Zygote) -> bool:
        """Tell whether no newer code than a zygote's has been loaded."""
        return zygote not in self._old

    def all(self) -> list[Zygote]:
        """Give all that are there."""
        return [*(z for z in (self._current, self._next) if z is not None), *self._old]

    def start(self, credentials: Credentials) -> None:
        """
        Spawn the first, and wait until it has loaded the code.

        Args:
            credentials: For it and its workers, until a reload reads them anew.

        Raises:
            StartFailed: It could not.
        """
        self._credentials = credentials
        self._current = self._spawn(self._credentials)
        self._current.wait_until_loaded()

    def stop(self) -> None:
        """Load and replace nothing more; have those that are there close the ports."""
        self._is_stopping = True
        for zygote in self.all():
            if zygote.is_loaded:
                zygote.unlisten()

    def dismiss_unused(self, used: set[Zygote]) -> None:
        """Let each old one go whose last worker has gone."""
        for zygote in self._old - used:
            zygote.dismiss()

    def _spawn(self, credentials: Credentials) -> Zygote:
        return self._make(
            {
                "boot": "taskd.worker",
                "directory": os.getcwd(),
                "preload": self._preload,
                "settings": self._settings.to_json(),
                "credentials": credentials.to_json(),
                "listening": len(credentials.key_pairs),
                "grace_seconds": self._settings.grace_seconds,
            }
        )

    def _respawn(self) -> None:
        if self._is_stopping or self._current is not None:
            return
        try:
            self._current = self._spawn(self._credentials)
            self._current.begin()
        except OSError as error:
            self._current = None
            delay = self._births.died(0.0)
            self._log.error(
                "no zygote can be spawned: {reason}; next try in {delay:g} s",
                reason=error,
                delay=delay,
            )
            self._reactor.callLater(delay, self._respawn)

    # The code anew.

    def reload(self) -> None:
        """
        Load the task modules anew, and have new workers take the places of the old.

        The keys and tokens are read anew, too. Until the new workers stand, the
        old ones serve on; for good if the code cannot be loaded, or the
        credentials cannot be used, and the log and ``taskd.status`` say why.
        """
        if self._is_stopping:
            return
        if self._next is not None or self.loaded is None:
            self._reloads_again = True
            return
        self._log.info("loading the task modules anew")
        try:
            self._next_credentials = self._owner.credentials()
            self._next = self._spawn(self._next_credentials)
            self._next.begin()
        except (OSError, StartFailed) as error:
            self._reload_failed(str(error))

    def _reload_failed(self, reason: str) -> None:
        self._next = None
        self._log.error("the new code cannot be loaded, the old serves on: {reason}", reason=reason)
        self._slot.show_reload(self._owner.clock(), reason)
        self._reload_if_told_again()

    def _reload_if_told_again(self) -> None:
        if self._reloads_again:
            self._reloads_again = False
            self.reload()

    # The zygotes tell this.

    def zygote_loaded(self, zygote: Zygote) -> None:
        """Have a zygote fork from now on."""
        zygote.loaded_at = self._owner.clock()
        if self._is_stopping:
            zygote.unlisten()  # it could not be told before
            return
        is_reload = zygote is self._next
        if is_reload:
            if self._current is not None:
                self._old.add(self._current)
            self._current, self._next = zygote, None
            self._credentials = self._next_credentials
            self._log.info("the new code is loaded; its workers take over")
            self._slot.show_reload(self._owner.clock(), "")
        self._owner.zygote_loaded(is_reload)
        self._reload_if_told_again()

    def zygote_cannot_preload(self, reason: str) -> None:
        """Remember, for every zygote to come, that the task modules cannot be shared."""
        self._log.warn("{reason}: each worker imports them after its fork", reason=reason)
        self._preload = False

    def zygote_failed(self, zygote: Zygote, reason: str) -> None:
        """Let a zygote go that could not import the task modules."""
        if zygote is self._next:
            self._reload_failed(reason)
        else:  # the next one tries again
            self._log.error("the zygote cannot start: {reason}", reason=reason)
        zygote.dismiss()

    def zygote_gone(self, zygote: Zygote, status: int) -> None:
        """Replace a zygote that died, unless it was to go."""
        is_current, is_old = zygote is self._current, zygote in self._old
        self._old.discard(zygote)
        if is_current:
            self._current = None
        elif zygote is self._next and self._is_stopping:
            self._next = None
        elif zygote is self._next:
            self._reload_failed(f"the zygote {describe_end(status)} while it loaded the code")
        if is_current and not self._is_stopping:
            delay = self._births.died(zygote.lived_seconds(self._owner.clock()))
            self._log.error(
                "the zygote (pid {pid}) {end}; another one starts in {delay:g} s",
                pid=zygote.pid,
                end=describe_end(status),
                delay=delay,
            )
            self._reactor.callLater(delay, self._respawn)
        elif is_old and status:
            self._log.error("the old zygote {end}", end=describe_end(status))
        self._owner.zygote_gone(zygote, is_current)
