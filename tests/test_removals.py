"""Connections on their way from one worker to another."""

from __future__ import annotations

import os
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from taskd.removals import Removals


class MemoryHome:
    """A worker that takes connections, as long as there is room on its link."""

    def __init__(self, number: int, room: int = 99) -> None:
        self.number = number
        self.room = room
        self.adopted: list[tuple[int, bytes]] = []

    def adopt(self, fd: int, unread: bytes) -> bool:
        os.fstat(fd)  # it is open
        if len(self.adopted) == self.room:
            return False
        self.adopted.append((fd, unread))
        return True


def is_open(fd: int) -> bool:
    """Tell whether a descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class RemovalsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.removals = Removals()
        self.fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        self.addCleanup(lambda: [os.close(fd) for fd in self.fds if is_open(fd)])

    def take(self, *fds: int) -> None:
        for fd in fds:
            self.removals.take(fd, b"unread %d" % fd)

    def held(self, *numbers: int) -> Callable[[], list[int]]:
        """Give how many connections each worker holds; slot 0 is nobody's."""
        return lambda: [0, *numbers]

    def test_nothing_to_do(self) -> None:
        """Without a homeless connection nobody's connections are counted."""
        self.removals.house([MemoryHome(1)], lambda: self.fail("counted"))

    def test_a_connection_finds_a_home(self) -> None:
        """A connection goes to a worker with what was not read of it, and is closed here."""
        home = MemoryHome(1)
        self.take(self.fds[0])
        self.assertTrue(is_open(self.fds[0]))
        self.removals.house([home], self.held(5))
        self.assertEqual(home.adopted, [(self.fds[0], b"unread %d" % self.fds[0])])
        self.assertFalse(is_open(self.fds[0]))
        self.removals.house([home], lambda: self.fail("it is housed twice"))

    def test_the_emptiest_is_chosen(self) -> None:
        """Each goes to the worker that holds the fewest, those counted that it was just given."""
        homes = [MemoryHome(1), MemoryHome(2), MemoryHome(3)]
        self.take(*self.fds)
        self.removals.house(homes, self.held(2, 0, 1))
        self.assertEqual([len(home.adopted) for home in homes], [1, 2, 1])
        self.assertFalse(any(map(is_open, self.fds)))

    def test_slots_are_told_apart(self) -> None:
        """A worker's connections are those of its slot, wherever it stands in the list."""
        homes = [MemoryHome(3), MemoryHome(1)]
        self.take(self.fds[0])
        self.removals.house(homes, self.held(0, 9, 1))
        self.assertEqual([len(home.adopted) for home in homes], [0, 1])

    def test_nobody_there(self) -> None:
        """Without a worker that serves, connections stay open, and wait for one."""
        self.take(self.fds[0])
        self.removals.house([], self.held())
        self.assertTrue(is_open(self.fds[0]))
        home = MemoryHome(1)
        self.removals.house([home], self.held(0))
        self.assertEqual(len(home.adopted), 1)

    def test_no_room_on_a_link(self) -> None:
        """A worker whose link is full is passed over, and its connection given to another."""
        full, other = MemoryHome(1, room=1), MemoryHome(2)
        self.take(*self.fds)
        self.removals.house([full, other], self.held(0, 9))
        self.assertEqual([fd for fd, _ in full.adopted], self.fds[:1])
        self.assertEqual([fd for fd, _ in other.adopted], self.fds[1:])

    def test_no_room_anywhere(self) -> None:
        """With every link full the rest stays open, in its order, until there is room."""
        home = MemoryHome(1, room=1)
        self.take(*self.fds)
        self.removals.house([home], self.held(0))
        self.assertEqual([is_open(fd) for fd in self.fds], [False, True, True, True])
        home.room = 99
        self.removals.house([home], self.held(1))
        self.assertEqual([fd for fd, _ in home.adopted], self.fds)
        self.assertFalse(any(map(is_open, self.fds)))

    def test_close(self) -> None:
        """Once closed, what has no home is closed, and so is what still comes."""
        self.take(*self.fds[:2])
        self.removals.close()
        self.assertEqual([is_open(fd) for fd in self.fds], [False, False, True, True])
        self.take(self.fds[2])
        self.assertFalse(is_open(self.fds[2]))
        self.removals.house([MemoryHome(1)], lambda: self.fail("there is something left"))
        self.removals.close()
