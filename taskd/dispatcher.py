"""
Tasks that found no free worker, and the free workers that they go to.

One queue for the whole pool, in the supervisor: higher priority first, then
first come, first served. Sans-I/O: workers are told through the methods of
``Peer``, what they do is read from numbers that the caller brings, and time is
an argument. When a call is handed over in the first place is ``lane``'s.

A task is with exactly one of: the queue, one worker, or nobody any more. Its
origin, the worker that holds its caller's connection, is told exactly once what
became of it, unless it takes the task back or goes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from taskd.errors import CallError, Overloaded, ShuttingDown, TimeLimitExceeded, WorkerLost
from taskd.link import Offer
from taskd.policy import retry_after

__all__ = ["Counts", "Dispatcher", "Peer", "Task"]

_RECENT: Final = 256
"""So many of the latest starts tell how fast the queue moves."""

_DEAD_WEIGHT: Final = 64
"""So many tasks that were taken back may lie in the heap before it is cleared of them."""


class Peer(Protocol):
    """
    A worker, seen from here.

    Attributes:
        number: Its slot.
    """

    @property
    def number(self) -> int: ...  # noqa: D102
    def run(self, task: Task, /) -> None: ...  # noqa: D102
    def cancel(self, number: int, /) -> None: ...  # noqa: D102
    def nothing_to_run(self) -> None: ...  # noqa: D102
    def ended(self, ticket: int, reply: bytes, /) -> None: ...  # noqa: D102
    def failed(self, ticket: int, error: CallError, /) -> None: ...  # noqa: D102
    def progressed(self, ticket: int, line: bytes, /) -> None: ...  # noqa: D102


@dataclass(eq=False, slots=True)
class Task:
    """
    One task on its way.

    Attributes:
        number: The pool's number for it.
        origin: Who is told, or None if nobody is any more.
        offer: What was handed over.
        offered_at: When, in CLOCK_MONOTONIC seconds.
        runner: Whom it was given to, or None while it waits.
        is_unwanted: True once it was taken back.
        is_over: True once it is neither in the queue nor with a worker.
    """

    number: int
    origin: Peer | None
    offer: Offer
    offered_at: float
    runner: Peer | None = None
    is_unwanted: bool = False
    is_over: bool = False


@dataclass(slots=True)
class Counts:
    """
    What has happened since the start.

    Attributes:
        handed_over: Tasks that were put into the queue.
        refused: Tasks that were not, because it was full.
        expired: Tasks whose deadline passed in it.
    """

    handed_over: int = 0
    refused: int = 0
    expired: int = 0


@dataclass(eq=False, slots=True)
class _Standing:
    """What a worker has of the queue's tasks, and whether it may have more."""

    running: set[int] = field(default_factory=set)
    is_open: bool = True
    has_declined: bool = False
    """It has given a task back, and not been heard of since: it is not as free as it looks."""


class Dispatcher:
    """
    The pool's queue.

    Args:
        threads: How many blocking tasks one worker runs at a time, from 1.
        backlog: How many tasks may wait, from 0.
        backlog_bytes: How many bytes their requests may have together.
        occupied: Gives the number of blocking calls that each worker has, as
            the scoreboard shows it, by slot number.
        show: Takes how many tasks wait. It is called before the workers are
            looked at, as a worker takes note of what it does before it looks
            whether any task waits: so one of the two sees the other.

    Attributes:
        counts: What has happened so far.
    """

    def __init__(
        self,
        threads: int,
        backlog: int,
        backlog_bytes: int,
        occupied: Callable[[], Sequence[int]],
        show: Callable[[int], None],
    ) -> None:
        self._threads = threads
        self._backlog = backlog
        self._backlog_bytes = backlog_bytes
        self._occupied = occupied
        self._show = show
        self._peers: dict[Peer, _Standing] = {}
        self._tasks: dict[int, Task] = {}
        self._by_ticket: dict[tuple[Peer, int], Task] = {}
        self._heap: list[tuple[int, int, Task]] = []
        self._waiting = 0
        self._waiting_bytes = 0
        self._numbers = 0
        self._started: deque[float] = deque(maxlen=_RECENT)
        self._is_closed = False
        self.counts = Counts()

    @property
    def waiting(self) -> int:
        """Tell how many tasks wait."""
        return self._waiting

    @property
    def is_empty(self) -> bool:
        """Tell whether no task waits, and none runs that was handed over."""
        return not self._tasks

    def oldest(self) -> float | None:
        """Tell when the task was handed over that has been waiting longest, or None."""
        return min((task.offered_at for task in self._waiting_tasks()), default=None)

    def _waiting_tasks(self) -> Iterator[Task]:
        return (task for _, _, task in self._heap if not task.is_over and task.runner is None)

    # Workers come and go.

    def join(self, peer: Peer, now: float) -> None:
        """Take in a worker that is ready."""
        self._peers[peer] = _Standing()
        self._dispatch(now)

    def close(self, peer: Peer) -> None:
        """Give a worker nothing more; what it has, it keeps."""
        if peer in self._peers:
            self._peers[peer].is_open = False

    def lost(self, peer: Peer, now: float) -> bool:
        """
        Take note that a worker is dead.

        What it ran for others is answered; what it handed over goes on, unless
        its callers, whose connections have died with it, said otherwise.

        Returns:
            Whether it had tasks of others, who are told and count them.
        """
        standing = self._peers.pop(peer, _Standing())
        ran = [self._tasks[number] for number in standing.running]
        is_told = any(task.origin not in (None, peer) for task in ran)
        for task in ran:
            self._fail(task, WorkerLost("the worker that ran the task has died"))
        for task in [task for task in self._tasks.values() if task.origin is peer]:
            if task.offer.ends_with_caller:
                self._take_back(task)
            else:
                self._forget_origin(task)
        self._dispatch(now)
        return is_told

    # What workers say.

    def offer(self, origin: Peer, offer: Offer, now: float) -> None:
        """Take a task that a worker hands over; refuse it if too many wait."""
        size = len(offer.line)
        if self._is_closed:
            origin.failed(offer.ticket, ShuttingDown("the daemon is stopping; it was not started"))
            return
        is_full = self._waiting >= self._backlog or self._waiting_bytes + size > self._backlog_bytes
        # A queue of length 0 is no reason to refuse what need not wait.
        if is_full and (self._waiting or not self._is_anyone_free()):
            self.counts.refused += 1
            origin.failed(offer.ticket, self._overloaded(now))
            return
        self._numbers += 1
        self.counts.handed_over += 1
        task = Task(self._numbers, origin, offer, now)
        self._tasks[task.number] = task
        self._by_ticket[origin, offer.ticket] = task
        had_to_wait = self._waiting
        self._enqueue(task)
        if not had_to_wait:  # else whoever is free has been found, or is about to ask
            self._dispatch(now)

    def _overloaded(self, now: float) -> Overloaded:
        seconds = retry_after(self._waiting, self._rate(now))
        return Overloaded(
            f"{self._waiting} tasks wait already; try again in {seconds:g} s", retry_after=seconds
        )

    def _rate(self, now: float) -> float:
        """Tell how many tasks a second have left the queue of late."""
        started = self._started
        span = now - started[0] if started else 0.0
        return len(started) / span if span > 0 else 0.0

    def returned(self, peer: Peer, number: int, now: float) -> None:
        """Take back a task that its worker has not begun; it keeps its place."""
        task = self._given_to(peer, number)
        if task is not None:
            self._peers[peer].has_declined = True
            if task.is_unwanted:
                self._drop(task)
            elif self._is_closed:
                self._fail(task, ShuttingDown("the daemon is stopping; the task was not started"))
            else:
                task.runner = None
                self._enqueue(task)
            self._dispatch(now)

    def ended(self, peer: Peer, number: int, reply: bytes, now: float) -> None:
        """Take the reply to a task, and pass it on."""
        task = self._given_to(peer, number)
        if task is not None:
            self._peers[peer].has_declined = False
            origin = task.origin
            self._drop(task)
            if origin is not None:
                origin.ended(task.offer.ticket, reply)
            if self._waiting:
                self._fill(peer, self._occupied(), now)

    def _given_to(self, peer: Peer, number: int) -> Task | None:
        """Take from a worker what it had; None if it no longer counted."""
        standing = self._peers.get(peer)
        if standing is None or number not in standing.running:
            return None
        standing.running.discard(number)
        return self._tasks.get(number)

    def progressed(self, number: int, line: bytes) -> None:
        """Pass on what a task reports."""
        task = self._tasks.get(number)
        if task is not None and task.origin is not None:
            task.origin.progressed(task.offer.ticket, line)

    def cancel(self, origin: Peer, ticket: int) -> None:
        """Take note that a worker does not want a task any more that it handed over."""
        task = self._by_ticket.get((origin, ticket))
        if task is not None:
            self._take_back(task)

    def ask(self, peer: Peer, now: float) -> None:
        """Give a worker that asks for a task the first one, or tell it that there is none."""
        standing = self._peers.get(peer)
        if standing is not None and standing.is_open and len(standing.running) < self._threads:
            standing.has_declined = False
            task = self._next(now)
            if task is not None:
                self._give(task, peer, now)
                return
        peer.nothing_to_run()

    def sweep(self, now: float) -> None:
        """Answer what has waited too long, and give what waits to who is free."""
        for task in [t for t in self._waiting_tasks() if _is_past(t, now)]:
            self._expire(task)
        for standing in self._peers.values():
            standing.has_declined = False
        self._dispatch(now)

    def refuse_all(self) -> None:
        """Start nothing more, and answer all that waits."""
        self._is_closed = True
        for task in list(self._waiting_tasks()):
            self._fail(task, ShuttingDown("the daemon is stopping; the task was not started"))

    # The queue.

    def _enqueue(self, task: Task) -> None:
        heapq.heappush(self._heap, (-task.offer.priority, task.number, task))
        self._count_waiting(task, 1)

    def _count_waiting(self, task: Task, change: int) -> None:
        self._waiting += change
        self._waiting_bytes += change * len(task.offer.line)
        self._show(self._waiting)

    def _next(self, now: float) -> Task | None:
        """Take the first task out of the queue whose time has not passed."""
        while self._heap:
            _, _, task = heapq.heappop(self._heap)
            if task.is_over:
                continue
            if _is_past(task, now):
                self._expire(task)
                continue
            self._count_waiting(task, -1)
            return task
        return None

    def _dispatch(self, now: float) -> None:
        """Give what waits to who is free."""
        if self._waiting:
            occupied = self._occupied()
            for peer in self._peers:
                self._fill(peer, occupied, now)
                if not self._waiting:
                    return

    def _fill(self, peer: Peer, occupied: Sequence[int], now: float) -> None:
        """Give a worker what waits, as often as it has a free thread."""
        for _ in range(self._free_threads(peer, occupied)):
            task = self._next(now)
            if task is None:
                return
            self._give(task, peer, now)

    def _free_threads(self, peer: Peer, occupied: Sequence[int]) -> int:
        standing = self._peers[peer]
        if not standing.is_open or standing.has_declined:
            return 0
        # What it was given may be on its way, and is then not among what it shows.
        return max(0, self._threads - max(occupied[peer.number], len(standing.running)))

    def _is_anyone_free(self) -> bool:
        occupied = self._occupied()
        return any(self._free_threads(peer, occupied) for peer in self._peers)

    def _give(self, task: Task, peer: Peer, now: float) -> None:
        task.runner = peer
        self._peers[peer].running.add(task.number)
        self._started.append(now)
        peer.run(task)

    def _expire(self, task: Task) -> None:
        self.counts.expired += 1
        self._fail(task, TimeLimitExceeded("its time was over before a worker was free"))

    def _fail(self, task: Task, error: CallError) -> None:
        origin = task.origin
        self._drop(task)
        if origin is not None:
            origin.failed(task.offer.ticket, error)

    def _take_back(self, task: Task) -> None:
        """Forget a task that nobody wants; if it runs, its worker is told."""
        if task.runner is None:
            self._drop(task)
        else:
            task.is_unwanted = True
            self._forget_origin(task)
            task.runner.cancel(task.number)

    def _forget_origin(self, task: Task) -> None:
        if task.origin is not None:
            del self._by_ticket[task.origin, task.offer.ticket]
            task.origin = None

    def _drop(self, task: Task) -> None:
        if not task.is_over:
            task.is_over = True
            del self._tasks[task.number]
            self._forget_origin(task)
            if task.runner is None:
                self._count_waiting(task, -1)
                if len(self._heap) > 2 * self._waiting + _DEAD_WEIGHT:
                    self._heap = [item for item in self._heap if not item[2].is_over]
                    heapq.heapify(self._heap)


def _is_past(task: Task, now: float) -> bool:
    return task.offer.deadline is not None and task.offer.deadline <= now
