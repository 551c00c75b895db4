"""
Connections on their way from a worker that retires to one that serves.

How they leave is ``server``'s, how they travel is ``link``'s.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

__all__ = ["Home", "Removals"]


class Home(Protocol):
    """
    A worker that takes connections.

    Attributes:
        number: Its slot.
    """

    @property
    def number(self) -> int: ...  # noqa: D102
    def adopt(self, fd: int, unread: bytes, /) -> bool: ...  # noqa: D102


class Removals:
    """Keep the connections that have no worker until they have one."""

    def __init__(self) -> None:
        self._homeless: deque[tuple[int, bytes]] = deque()
        self._on_their_way: dict[int, int] = {}
        self._is_closed = False

    def take(self, fd: int, unread: bytes) -> None:
        """
        Take a connection.

        Args:
            fd: The connection, to be closed here once another process has it.
            unread: What was read from it and not looked at.
        """
        if self._is_closed:
            os.close(fd)
        else:
            self._homeless.append((fd, unread))

    def house(self, homes: Iterable[Home], connections: Callable[[], list[int]]) -> None:
        """
        Give every connection to the worker that holds the fewest.

        Args:
            homes: The workers that take connections now.
            connections: Gives how many each holds, by slot number.
        """
        if not self._homeless:
            return
        held, free, given = connections(), list(homes), self._on_their_way
        while self._homeless and free:
            home = min(free, key=lambda one: held[one.number] + given.get(one.number, 0))
            fd, unread = self._homeless[0]
            if home.adopt(fd, unread):
                given[home.number] = given.get(home.number, 0) + 1
                os.close(fd)
                self._homeless.popleft()
            else:
                free.remove(home)  # there is no room on its link for the moment

    def have_arrived(self) -> None:
        """Take it that what was given is now among what its worker holds."""
        self._on_their_way.clear()

    def close(self) -> None:
        """Close what has no worker, and what may still come: nobody serves any more."""
        self._is_closed = True
        while self._homeless:
            os.close(self._homeless.popleft()[0])
