"""
What a worker knows of the others.

An interface, between who runs tasks and who relays them; nothing is done here.
"""

from __future__ import annotations

from typing import Protocol

from taskd.call import Call

__all__ = ["Pool"]


class Pool(Protocol):
    """The other workers, seen from here."""

    def take(self, calls: list[Call], /) -> None:
        """Have calls run by whoever is free; their ``abandon`` is the taker's."""

    def waits(self) -> int:
        """Tell how many tasks of all workers wait."""

    def idle(self) -> int:
        """Tell how many blocking tasks the other workers could start now."""

    def ask(self) -> None:
        """Ask for a task that waits."""

    def filled(self) -> None:
        """Take note that this worker has no thread to spare."""

    def freed(self) -> None:
        """Take note that it has one again."""

    def stuck(self) -> None:
        """Take note that a thread is lost to a call that was given up, and cannot be stopped."""
