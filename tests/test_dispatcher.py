"""Tasks that found no free worker, and the workers that they go to."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from taskd.dispatcher import Counts, Dispatcher, Task
from taskd.errors import CallError, Overloaded
from taskd.link import Offer

LINE = b'{"function":"work","args":[]}\n'


class MemoryPeer:
    """A worker, which writes down what it is told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.told: list[tuple[Any, ...]] = []
        self.errors: list[CallError] = []
        self.numbers: dict[int, int] = {}

    def run(self, task: Task) -> None:
        self.numbers[task.offer.ticket] = task.number
        self.told.append(("run", task.offer.ticket))

    def cancel(self, number: int) -> None:
        self.told.append(("cancel", number))

    def nothing_to_run(self) -> None:
        self.told.append(("nothing",))

    def ended(self, ticket: int, reply: bytes) -> None:
        self.told.append(("ended", ticket, reply))

    def failed(self, ticket: int, error: CallError) -> None:
        self.errors.append(error)
        self.told.append(("failed", ticket, error.code))

    def progressed(self, ticket: int, line: bytes) -> None:
        self.told.append(("progress", ticket, line))

    @property
    def ran(self) -> list[int]:
        """The tickets of what it was given, in their order."""
        return [message[1] for message in self.told if message[0] == "run"]


class DispatcherTestCase(SynchronousTestCase):
    threads = 1
    backlog = 100
    backlog_bytes = 10**6

    def setUp(self) -> None:
        self.occupied = [0] * 10
        self.shown: list[int] = []
        self.dispatcher = Dispatcher(
            self.threads,
            self.backlog,
            self.backlog_bytes,
            lambda: self.occupied,
            self.shown.append,
        )
        self.origin = self.join(1, occupied=self.threads)

    def join(self, number: int, *, occupied: int = 0) -> MemoryPeer:
        """Have a worker that has so many calls of its own."""
        peer = MemoryPeer(number)
        self.occupied[number] = occupied
        self.dispatcher.join(peer, 0.0)
        return peer

    def offer(
        self,
        ticket: int,
        *,
        priority: int = 0,
        deadline: float | None = None,
        ends_with_caller: bool = False,
        line: bytes = LINE,
        origin: MemoryPeer | None = None,
        now: float = 0.0,
    ) -> None:
        offer = Offer(ticket, priority, deadline, ends_with_caller, line)
        self.dispatcher.offer(origin or self.origin, offer, now)

    def end(self, peer: MemoryPeer, ticket: int, reply: bytes = b"1", now: float = 0.0) -> None:
        self.dispatcher.ended(peer, peer.numbers[ticket], reply, now)

    def give_back(self, peer: MemoryPeer, ticket: int, now: float = 0.0) -> None:
        self.dispatcher.returned(peer, peer.numbers[ticket], now)

    def drain(self, peer: MemoryPeer) -> list[int]:
        """Have a worker ask for all that waits, and tell in which order it came."""
        before = len(peer.ran)
        while self.dispatcher.waiting:
            self.dispatcher.ask(peer, 0.0)
            self.end(peer, peer.ran[-1])
        return peer.ran[before:]


class OfferTests(DispatcherTestCase):
    def test_fresh(self) -> None:
        """A fresh queue is empty, and has counted nothing."""
        self.assertEqual(self.dispatcher.waiting, 0)
        self.assertTrue(self.dispatcher.is_empty)
        self.assertIsNone(self.dispatcher.oldest())
        self.assertEqual(self.dispatcher.counts, Counts(0, 0, 0))

    def test_to_who_is_free(self) -> None:
        """A task goes at once to a worker that is free, and its reply to where it came from."""
        runner = self.join(2)
        self.offer(7)
        self.assertEqual((runner.told, self.dispatcher.waiting), ([("run", 7)], 0))
        self.assertFalse(self.dispatcher.is_empty)
        self.end(runner, 7, b"a reply")
        self.assertEqual(self.origin.told, [("ended", 7, b"a reply")])
        self.assertTrue(self.dispatcher.is_empty)
        self.assertEqual(self.dispatcher.counts, Counts(handed_over=1))

    def test_back_to_its_origin(self) -> None:
        """A worker that hands a task over and is free by now gets it back to run."""
        self.occupied[1] = 0
        self.offer(7)
        self.assertEqual(self.origin.told, [("run", 7)])

    def test_nobody_is_free(self) -> None:
        """Without a free worker a task waits, and the scoreboard shows it."""
        self.join(2, occupied=1)
        self.offer(7)
        self.assertEqual((self.dispatcher.waiting, self.shown), (1, [1]))
        self.assertEqual(self.origin.told, [])

    def test_a_worker_that_has_a_task_is_not_free(self) -> None:
        """Who was given a task is not free, though it may not have shown so yet."""
        runner = self.join(2)
        self.offer(1)
        self.offer(2)
        self.assertEqual((runner.ran, self.dispatcher.waiting), ([1], 1))

    def test_it_is_shown_before_the_workers_are_looked_at(self) -> None:
        """That a task waits is shown before the workers are looked at."""
        order: list[str] = []

        def occupied() -> list[int]:
            order.append("looks")
            return [1, 1]

        def show(waiting: int) -> None:
            order.append(f"shows {waiting}")

        self.dispatcher = Dispatcher(1, 9, 999, occupied, show)
        self.origin = self.join(1)
        self.offer(7)
        self.assertEqual(order, ["shows 1", "looks"])

    def test_tickets_are_their_workers_own(self) -> None:
        """Two workers may use the same number for two tasks; each is told of its own."""
        other = self.join(2, occupied=1)
        self.offer(7)
        self.offer(7, origin=other, priority=1)
        runner = self.join(3)
        self.end(runner, 7, b"other's")
        self.end(runner, 7, b"mine")
        self.assertEqual(other.told, [("ended", 7, b"other's")])
        self.assertEqual(self.origin.told, [("ended", 7, b"mine")])

    def test_oldest(self) -> None:
        """The oldest is the one that was handed over first of those that wait."""
        self.offer(1, now=3.0)
        self.offer(2, priority=9, now=4.0)
        self.assertEqual(self.dispatcher.oldest(), 3.0)
        self.dispatcher.cancel(self.origin, 1)
        self.assertEqual(self.dispatcher.oldest(), 4.0)
        self.join(2)
        self.assertIsNone(self.dispatcher.oldest())


class SeveralThreadsTests(DispatcherTestCase):
    threads = 3

    def test_as_many_as_it_has_threads(self) -> None:
        """A worker gets as many tasks as it has free threads."""
        for ticket in range(6):
            self.offer(ticket)
        one, other = self.join(2), self.join(3, occupied=1)
        self.assertEqual((one.ran, other.ran), ([0, 1, 2], [3, 4]))
        self.assertEqual(self.dispatcher.waiting, 1)

    def test_its_own_calls_and_those_it_was_given_are_not_added(self) -> None:
        """What a worker was given is among what it shows; the larger number counts."""
        runner = self.join(2)
        self.offer(1)
        self.occupied[2] = 1
        self.offer(2)
        self.occupied[2] = 3
        self.offer(3)
        self.assertEqual((runner.ran, self.dispatcher.waiting), ([1, 2], 1))

    def test_asking_with_all_threads_busy(self) -> None:
        """Who has as many tasks of the queue as threads gets no more, though it asks."""
        runner = self.join(2)
        for ticket in range(4):
            self.offer(ticket)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual(runner.told[3:], [("nothing",)])
        self.assertEqual(self.dispatcher.waiting, 1)


class OrderTests(DispatcherTestCase):
    def test_first_come_first_served(self) -> None:
        """Tasks of one priority leave in the order of their coming."""
        for ticket in (5, 3, 9, 1):
            self.offer(ticket)
        self.assertEqual(self.drain(self.join(2)), [3, 9, 1])

    def test_higher_priority_first(self) -> None:
        """A higher priority leaves first, whenever it came; below 0 is behind."""
        for ticket, priority in enumerate((0, -1, 5, 0, 5, 1)):
            self.offer(ticket, priority=priority)
        runner = self.join(2)
        self.end(runner, 2)
        rest = self.drain(runner)
        self.assertEqual(runner.ran, [2, 4, 5, 0, 3, 1])
        self.assertEqual(rest[-1], 1)

    def test_what_comes_back_keeps_its_place(self) -> None:
        """A task that was given back stands before those that came after it."""
        for ticket in range(4):
            self.offer(ticket)
        runner = self.join(2)
        self.give_back(runner, 0)
        self.assertEqual(self.dispatcher.waiting, 4)
        self.assertEqual(self.drain(runner), [0, 1, 2, 3])

    def test_what_comes_back_keeps_its_priority(self) -> None:
        """A task that was given back stands behind those of a higher priority."""
        self.offer(0)
        runner = self.join(2)
        self.offer(1, priority=1)
        self.offer(2)
        self.give_back(runner, 0)
        self.assertEqual(self.drain(runner), [1, 0, 2])

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["offer", "cancel", "take", "return"]), st.integers(-2, 2)),
            max_size=40,
        )
    )
    def test_any_order(self, steps: list[tuple[str, int]]) -> None:
        """Whatever comes, goes and comes back: the first of the highest priority leaves first."""
        self.setUp()
        runner = self.join(2, occupied=1)
        waiting: set[tuple[int, int]] = set()
        taken: list[tuple[int, int]] = []
        for ticket, (step, priority) in enumerate(steps):
            if step == "offer":
                self.offer(ticket, priority=priority)
                waiting.add((-priority, ticket))
            elif step == "cancel" and waiting:
                gone = sorted(waiting)[priority % len(waiting)]
                self.dispatcher.cancel(self.origin, gone[1])
                waiting.remove(gone)
            elif step == "take" and waiting and not taken:
                self.dispatcher.ask(runner, 0.0)
                taken.append(min(waiting))
                waiting.remove(taken[0])
                self.assertEqual(runner.ran[-1], taken[0][1])
            elif step == "return" and taken:
                self.give_back(runner, taken[0][1])
                waiting.add(taken.pop())
            self.assertEqual(self.dispatcher.waiting, len(waiting))
        for _, ticket in taken:
            self.end(runner, ticket)
            self.occupied[2] = 1
        self.assertEqual(self.drain(runner), [ticket for _, ticket in sorted(waiting)])
        self.assertTrue(self.dispatcher.is_empty)


class BacklogTests(DispatcherTestCase):
    backlog = 2

    def test_the_queue_is_full(self) -> None:
        """What finds as many waiting as may wait is refused, and told when to try again."""
        for ticket in range(4):
            self.offer(ticket)
        self.assertEqual(
            self.origin.told, [("failed", 2, "overloaded"), ("failed", 3, "overloaded")]
        )
        self.assertEqual(self.dispatcher.waiting, 2)
        self.assertEqual(self.dispatcher.counts, Counts(handed_over=2, refused=2))
        error = self.origin.errors[0]
        assert isinstance(error, Overloaded)
        self.assertEqual(error.retry_after, 1.0)  # nothing has left: the pace is unknown
        self.assertIn("2 tasks wait", error.message)

    def test_priority_is_refused_as_well(self) -> None:
        """A full queue is full for every priority."""
        for ticket in range(3):
            self.offer(ticket, priority=ticket)
        self.assertEqual(self.origin.told, [("failed", 2, "overloaded")])

    def test_room_again(self) -> None:
        """When a task has left the queue, another may come."""
        self.offer(0)
        self.offer(1)
        self.join(2)
        self.offer(2)
        self.assertEqual(self.origin.told, [])
        self.dispatcher.cancel(self.origin, 1)
        self.offer(3)
        self.offer(4)
        self.assertEqual(self.origin.told, [("failed", 4, "overloaded")])

    def test_what_comes_back_is_not_refused(self) -> None:
        """A task that is given back has its place, though the queue is full meanwhile."""
        runner = self.join(2)
        for ticket in range(3):
            self.offer(ticket)
        self.give_back(runner, 0)
        self.assertEqual((self.dispatcher.waiting, self.origin.told), (3, []))

    def test_the_pace(self) -> None:
        """Who is refused is told how long the queue takes at the pace of late."""
        runner = self.join(2)
        for ticket in range(4):
            self.offer(ticket, now=float(ticket))
            self.end(runner, ticket, now=float(ticket))
        self.occupied[2] = 1
        self.offer(4, now=4.0)
        self.offer(5, now=4.0)
        self.offer(6, now=8.0)
        # 4 have left since second 0, 8 seconds ago; 2 wait.
        error = self.origin.errors[-1]
        assert isinstance(error, Overloaded)
        self.assertEqual(error.retry_after, 4.0)


class NoBacklogTests(DispatcherTestCase):
    backlog = 0

    def test_who_need_not_wait_is_taken(self) -> None:
        """With no room to wait a task is taken if a worker is free, else refused."""
        runner = self.join(2)
        self.offer(0)
        self.offer(1)
        self.assertEqual(runner.told, [("run", 0)])
        self.assertEqual(self.origin.told, [("failed", 1, "overloaded")])

    def test_a_worker_that_is_closed_or_has_declined_is_not_free(self) -> None:
        """A worker that takes nothing more, or has just given a task back, is none to wait for."""
        closed, declined = self.join(2), self.join(3)
        self.dispatcher.close(closed)
        self.offer(0)
        self.occupied[3] = 1
        self.give_back(declined, 0)
        self.occupied[3] = 0
        self.dispatcher.cancel(self.origin, 0)
        self.offer(1)
        self.assertEqual(self.origin.told, [("failed", 1, "overloaded")])


class BacklogBytesTests(DispatcherTestCase):
    backlog_bytes = 100

    def test_the_queue_is_full(self) -> None:
        """Requests that wait may have so many bytes together, and not one more."""
        self.offer(0, line=b"x" * 60)
        self.offer(1, line=b"x" * 41)
        self.offer(2, line=b"x" * 40)
        self.offer(3, line=b"x")
        self.assertEqual(
            self.origin.told, [("failed", 1, "overloaded"), ("failed", 3, "overloaded")]
        )

    def test_room_again(self) -> None:
        """Bytes are free again when their task is given out, taken back, or over."""
        self.offer(0, line=b"x" * 30)
        self.offer(1, line=b"x" * 30)
        self.offer(2, line=b"x" * 40, deadline=5.0)
        self.join(2)
        self.dispatcher.cancel(self.origin, 1)
        self.dispatcher.sweep(5.0)
        self.origin.told.clear()
        self.offer(3, line=b"x" * 100)
        self.assertEqual((self.origin.told, self.dispatcher.waiting), ([], 1))

    def test_a_long_one_that_need_not_wait(self) -> None:
        """A request longer than all that may wait is taken if a worker is free."""
        runner = self.join(2)
        self.offer(0, line=b"x" * 101)
        self.assertEqual(runner.ran, [0])


class DeadlineTests(DispatcherTestCase):
    def test_over_when_its_turn_comes(self) -> None:
        """A task whose time is over when its turn comes is answered, and the next one given."""
        self.offer(0, deadline=5.0)
        self.offer(1, deadline=5.5)
        runner = self.join(2, occupied=1)
        self.dispatcher.ask(runner, 5.0)
        self.assertEqual(runner.told, [("run", 1)])
        self.assertEqual(self.origin.told, [("failed", 0, "time-limit")])
        self.assertEqual(self.dispatcher.counts, Counts(handed_over=2, expired=1))

    def test_all_are_over(self) -> None:
        """If all that wait are over, who asks is told that there is nothing."""
        for ticket in range(3):
            self.offer(ticket, deadline=5.0)
        runner = self.join(2, occupied=1)
        self.dispatcher.ask(runner, 6.0)
        self.assertEqual(runner.told, [("nothing",)])
        self.assertEqual(len(self.origin.told), 3)
        self.assertEqual((self.dispatcher.waiting, self.shown[-1]), (0, 0))
        self.assertTrue(self.dispatcher.is_empty)

    def test_a_sweep(self) -> None:
        """A sweep answers what is over, wherever it stands, and nothing before its time."""
        for ticket, deadline in enumerate((9.0, 5.0, None, 4.0)):
            self.offer(ticket, deadline=deadline)
        self.dispatcher.sweep(3.9)
        self.assertEqual(self.origin.told, [])
        self.dispatcher.sweep(5.0)
        self.assertEqual(
            sorted(self.origin.told), [("failed", 1, "time-limit"), ("failed", 3, "time-limit")]
        )
        self.assertEqual(self.dispatcher.waiting, 2)

    def test_what_runs_is_its_workers(self) -> None:
        """A deadline that passes while the task runs is not the queue's to answer."""
        self.join(2)
        self.offer(0, deadline=5.0)
        self.dispatcher.sweep(9.0)
        self.assertEqual((self.origin.told, self.dispatcher.counts.expired), ([], 0))

    def test_over_when_it_comes_back(self) -> None:
        """A task that comes back too late is answered, not given out again."""
        runner, other = self.join(2), self.join(3, occupied=1)
        self.offer(0, deadline=5.0)
        self.occupied[3] = 0
        self.give_back(runner, 0, now=6.0)
        self.assertEqual((self.origin.told, other.told), ([("failed", 0, "time-limit")], []))


class EndedTests(DispatcherTestCase):
    def test_the_next_one_follows(self) -> None:
        """Who ends a task is given the next one, if its scoreboard shows that it is free."""
        runner = self.join(2)
        for ticket in range(3):
            self.offer(ticket)
        self.end(runner, 0)
        self.assertEqual(runner.ran, [0, 1])
        self.occupied[2] = 1
        self.end(runner, 1)
        self.assertEqual(runner.ran, [0, 1])

    def test_a_second_reply(self) -> None:
        """A reply that comes twice, or for a task that its worker does not have, is dropped."""
        runner, other = self.join(2), self.join(3, occupied=1)
        self.offer(0)
        self.dispatcher.ended(other, runner.numbers[0], b"not mine", 0.0)
        self.end(runner, 0, b"first")
        self.end(runner, 0, b"second")
        self.dispatcher.ended(runner, 4711, b"none", 0.0)
        self.assertEqual(self.origin.told, [("ended", 0, b"first")])

    def test_progress(self) -> None:
        """What a task reports goes to its origin, until it has ended."""
        runner = self.join(2)
        self.offer(7)
        self.dispatcher.progressed(runner.numbers[7], b"half")
        self.end(runner, 7)
        self.dispatcher.progressed(runner.numbers[7], b"late")
        self.assertEqual(self.origin.told, [("progress", 7, b"half"), ("ended", 7, b"1")])


class ReturnedTests(DispatcherTestCase):
    def test_another_one_gets_it(self) -> None:
        """A task that is given back goes to another worker that is free."""
        runner = self.join(2)
        self.offer(0)
        other = self.join(3)
        self.give_back(runner, 0)
        self.assertEqual((runner.ran, other.ran, self.origin.told), ([0], [0], []))

    def test_not_straight_back(self) -> None:
        """Who has given a task back gets neither it nor another one, however free it looks."""
        runner = self.join(2)
        self.offer(0)
        self.give_back(runner, 0)
        self.offer(1)
        self.assertEqual((runner.ran, self.dispatcher.waiting, self.shown[-1]), ([0], 2, 2))

    def test_when_it_asks(self) -> None:
        """Who has declined gets the task when it asks, and is as free as any from then on."""
        runner = self.join(2)
        self.offer(0)
        self.give_back(runner, 0)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual(runner.ran, [0, 0])
        self.end(runner, 0)
        self.offer(1)
        self.assertEqual(runner.ran, [0, 0, 1])

    def test_asking_in_vain_counts_as_well(self) -> None:
        """Who has declined, and asks while nothing waits, is as free as any from then on."""
        runner, other = self.join(2), self.join(3)
        self.offer(0)
        self.give_back(runner, 0)
        self.assertEqual(other.ran, [0])
        self.dispatcher.ask(runner, 0.0)
        self.offer(1)
        self.assertEqual(runner.told[1:], [("nothing",), ("run", 1)])

    def test_when_it_is_swept(self) -> None:
        """A sweep gives what waits to whoever is free, who has declined before included."""
        runner = self.join(2)
        self.offer(0)
        self.give_back(runner, 0)
        self.dispatcher.sweep(0.0)
        self.assertEqual(runner.ran, [0, 0])

    def test_what_it_never_had(self) -> None:
        """Who gives back what it does not have, or gives it back twice, changes nothing."""
        runner, other = self.join(2), self.join(3, occupied=1)
        self.offer(0)
        self.dispatcher.returned(other, runner.numbers[0], 0.0)
        self.dispatcher.returned(runner, 4711, 0.0)
        self.assertEqual(self.dispatcher.waiting, 0)
        self.give_back(runner, 0)
        self.give_back(runner, 0)
        self.assertEqual(self.dispatcher.waiting, 1)


class DeclinedWithThreadsTests(DispatcherTestCase):
    threads = 2

    def test_when_it_ends_another(self) -> None:
        """Who has declined one task is as free as any when it ends another one."""
        runner = self.join(2)
        self.offer(0)
        self.offer(1)
        self.give_back(runner, 1)
        self.assertEqual(runner.ran, [0, 1])
        self.end(runner, 0)
        self.assertEqual(runner.ran, [0, 1, 1])


class CancelTests(DispatcherTestCase):
    def test_while_it_waits(self) -> None:
        """A task that is taken back while it waits is gone, and nobody is told."""
        self.offer(0)
        self.offer(1)
        self.dispatcher.cancel(self.origin, 0)
        self.assertEqual((self.dispatcher.waiting, self.shown[-1]), (1, 1))
        runner = self.join(2)
        self.assertEqual((runner.ran, self.origin.told), ([1], []))

    def test_while_it_runs(self) -> None:
        """A task that is taken back while it runs: its worker is told, its reply is dropped."""
        runner = self.join(2)
        self.offer(0)
        self.dispatcher.cancel(self.origin, 0)
        self.assertEqual(runner.told, [("run", 0), ("cancel", runner.numbers[0])])
        self.assertFalse(self.dispatcher.is_empty)
        self.dispatcher.progressed(runner.numbers[0], b"half")
        self.end(runner, 0)
        self.assertEqual(self.origin.told, [])
        self.assertTrue(self.dispatcher.is_empty)

    def test_it_keeps_its_worker_busy(self) -> None:
        """A task that was taken back while it runs still holds its thread, until it ends."""
        runner = self.join(2)
        self.offer(0)
        self.dispatcher.cancel(self.origin, 0)
        self.offer(1)
        self.assertEqual(runner.ran, [0])
        self.end(runner, 0)
        self.assertEqual(runner.ran, [0, 1])

    def test_while_it_comes_back(self) -> None:
        """A task that was taken back, and is given back, is gone."""
        runner = self.join(2)
        self.offer(0)
        other = self.join(3)
        self.dispatcher.cancel(self.origin, 0)
        self.give_back(runner, 0)
        self.assertEqual((other.ran, self.dispatcher.waiting), ([], 0))
        self.assertTrue(self.dispatcher.is_empty)

    def test_its_worker_dies(self) -> None:
        """A task that was taken back, and whose worker dies, is nobody's any more."""
        runner = self.join(2)
        self.offer(0)
        self.dispatcher.cancel(self.origin, 0)
        self.dispatcher.lost(runner, 0.0)
        self.assertEqual(self.origin.told, [])
        self.assertTrue(self.dispatcher.is_empty)

    def test_what_is_over(self) -> None:
        """What was never offered, or has ended, or was taken back, cannot be taken back."""
        runner = self.join(2)
        self.offer(0)
        self.end(runner, 0)
        for ticket in (0, 4711):
            self.dispatcher.cancel(self.origin, ticket)
        self.dispatcher.cancel(runner, 0)
        self.offer(1)
        self.dispatcher.cancel(self.origin, 1)
        self.dispatcher.cancel(self.origin, 1)
        self.assertEqual(runner.told[2:], [("cancel", runner.numbers[1])])

    def test_a_ticket_may_be_used_again(self) -> None:
        """A ticket is free again when its task is over or was taken back."""
        self.offer(0)
        self.dispatcher.cancel(self.origin, 0)
        self.offer(0)
        runner = self.join(2)
        self.end(runner, 0, b"the second")
        self.assertEqual(self.origin.told, [("ended", 0, b"the second")])

    def test_many(self) -> None:
        """Thousands that are taken back leave nothing behind, and do not disturb the order."""
        for ticket in range(3000):
            self.offer(ticket, priority=ticket % 3)
            if ticket % 100:
                self.dispatcher.cancel(self.origin, ticket)
        self.assertEqual(self.dispatcher.waiting, 30)
        self.assertLessEqual(len(self.dispatcher._heap), 2 * 30 + 64 + 1)
        kept = sorted(range(0, 3000, 100), key=lambda ticket: (-(ticket % 3), ticket))
        runner = self.join(2, occupied=1)
        self.assertEqual(self.drain(runner), kept)
        self.assertTrue(self.dispatcher.is_empty)

    def setUp(self) -> None:
        self.backlog = 3000
        super().setUp()


class AskTests(DispatcherTestCase):
    def test_nothing_waits(self) -> None:
        """Who asks while nothing waits is told so."""
        runner = self.join(2)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual(runner.told, [("nothing",)])

    def test_the_first_task(self) -> None:
        """Who asks gets the first task, whatever its scoreboard shows."""
        runner = self.join(2, occupied=1)
        self.offer(0)
        self.offer(1, priority=1)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual((runner.told, self.dispatcher.waiting), ([("run", 1)], 1))

    def test_who_was_given_one_meanwhile(self) -> None:
        """Who asks, and was given a task on the way, gets no second one."""
        runner = self.join(2)
        self.offer(0)
        self.offer(1)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual(runner.told, [("run", 0), ("nothing",)])

    def test_who_is_closed(self) -> None:
        """Who is to get nothing more is told that nothing waits."""
        runner = self.join(2, occupied=1)
        self.offer(0)
        self.dispatcher.close(runner)
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual((runner.told, self.dispatcher.waiting), ([("nothing",)], 1))

    def test_a_stranger(self) -> None:
        """Who has not joined gets an answer, and no task."""
        self.offer(0)
        stranger = MemoryPeer(5)
        self.dispatcher.ask(stranger, 0.0)
        self.assertEqual(stranger.told, [("nothing",)])


class CloseTests(DispatcherTestCase):
    def test_nothing_more(self) -> None:
        """A closed worker gets nothing more, whatever happens."""
        runner = self.join(2)
        self.dispatcher.close(runner)
        self.offer(0)
        self.dispatcher.sweep(0.0)
        self.assertEqual((runner.told, self.dispatcher.waiting), ([], 1))

    def test_what_it_has_it_keeps(self) -> None:
        """What a closed worker has been given it may end, or give back."""
        runner = self.join(2)
        self.offer(0)
        self.dispatcher.close(runner)
        self.end(runner, 0, b"done")
        self.assertEqual(self.origin.told, [("ended", 0, b"done")])
        other = self.join(3)
        self.offer(1)
        self.dispatcher.close(other)
        self.give_back(other, 1)
        self.assertEqual((other.ran, self.dispatcher.waiting), ([1], 1))

    def test_what_it_has_handed_over_goes_on(self) -> None:
        """A closed worker's own tasks wait on, and their replies come to it."""
        self.offer(0)
        self.dispatcher.close(self.origin)
        runner = self.join(2)
        self.end(runner, 0, b"done")
        self.assertEqual(self.origin.told, [("ended", 0, b"done")])

    def test_a_stranger(self) -> None:
        """To close who has not joined, or is lost, changes nothing."""
        self.dispatcher.close(MemoryPeer(5))
        self.dispatcher.lost(self.origin, 0.0)
        self.dispatcher.close(self.origin)


class JoinTests(DispatcherTestCase):
    def test_who_joins_is_given_what_waits(self) -> None:
        """A worker that joins is given what waits, if it is free."""
        self.offer(0)
        self.assertEqual(self.join(2, occupied=1).told, [])
        self.assertEqual(self.join(3).told, [("run", 0)])


class LostTests(DispatcherTestCase):
    def test_as_runner(self) -> None:
        """What a dead worker ran is answered, and not run again; what waits goes to others."""
        runner, other = self.join(2), self.join(3, occupied=1)
        self.offer(0)
        self.offer(1)
        self.occupied[3] = 0
        self.dispatcher.lost(runner, 0.0)
        self.assertEqual(self.origin.told, [("failed", 0, "worker-lost")])
        self.assertTrue(self.origin.errors[0].retryable)
        self.assertEqual(other.ran, [1])

    def test_who_is_told(self) -> None:
        """It says whether somebody who lives was told; a dead worker's own calls are not."""
        runner = self.join(2)
        self.offer(0)
        self.assertTrue(self.dispatcher.lost(runner, 0.0))
        own = self.join(3)
        self.offer(7, origin=own)
        self.assertEqual(len(own.ran), 1)
        self.assertFalse(self.dispatcher.lost(own, 0.0))
        self.assertFalse(self.dispatcher.lost(self.join(4), 0.0))

    def test_its_last_words(self) -> None:
        """What a worker says after it was lost changes nothing."""
        runner = self.join(2)
        self.offer(0)
        self.dispatcher.lost(runner, 0.0)
        self.origin.told.clear()
        self.end(runner, 0)
        self.give_back(runner, 0)
        self.dispatcher.progressed(runner.numbers[0], b"half")
        self.dispatcher.ask(runner, 0.0)
        self.assertEqual((self.origin.told, runner.told[1:]), ([], [("nothing",)]))
        self.assertTrue(self.dispatcher.is_empty)

    def test_as_origin_while_they_wait(self) -> None:
        """What a dead worker has handed over goes on, unless it ends with its caller."""
        self.offer(0)
        self.offer(1, ends_with_caller=True)
        self.offer(2)
        self.dispatcher.lost(self.origin, 0.0)
        self.assertEqual((self.dispatcher.waiting, self.shown[-1]), (2, 2))
        runner = self.join(2)
        self.end(runner, 0)
        self.end(runner, 2)
        self.assertEqual((runner.ran, self.origin.told), ([0, 2], []))
        self.assertTrue(self.dispatcher.is_empty)

    def test_as_origin_while_they_run(self) -> None:
        """A dead worker's task that runs goes on; if it ends with its caller, it is cancelled."""
        one, other = self.join(2), self.join(3)
        self.offer(0)
        self.offer(1, ends_with_caller=True)
        self.dispatcher.lost(self.origin, 0.0)
        self.assertEqual(one.told, [("run", 0)])
        self.assertEqual(other.told, [("run", 1), ("cancel", other.numbers[1])])
        self.dispatcher.progressed(one.numbers[0], b"half")
        self.end(one, 0)
        self.end(other, 1)
        self.assertEqual(self.origin.told, [])
        self.assertTrue(self.dispatcher.is_empty)

    def test_orphans_have_an_end(self) -> None:
        """An orphan whose time is over, or whose worker dies, is nobody's any more."""
        runner = self.join(2)
        self.offer(0)
        self.offer(1, deadline=5.0)
        self.dispatcher.lost(self.origin, 0.0)
        self.dispatcher.sweep(5.0)
        self.assertEqual((self.dispatcher.waiting, self.dispatcher.counts.expired), (0, 1))
        self.dispatcher.lost(runner, 0.0)
        self.assertEqual(self.origin.told, [])
        self.assertTrue(self.dispatcher.is_empty)

    def test_as_both(self) -> None:
        """A worker that dies with a task of its own which it was given back leaves nothing."""
        self.occupied[1] = 0
        self.offer(0)
        self.assertEqual(self.origin.ran, [0])
        self.dispatcher.lost(self.origin, 0.0)
        self.assertTrue(self.dispatcher.is_empty)

    def test_an_orphan_that_comes_back(self) -> None:
        """An orphan that is given back goes to another, unless it was to end with its caller."""
        one, other = self.join(2), self.join(3)
        self.offer(0)
        self.offer(1, ends_with_caller=True)
        self.dispatcher.lost(self.origin, 0.0)
        self.give_back(one, 0)
        self.give_back(other, 1)
        self.assertEqual(self.dispatcher.waiting, 1)
        self.assertEqual(self.join(4).ran, [0])

    def test_its_slot_is_used_again(self) -> None:
        """A worker that joins under the number of a dead one is another worker."""
        self.offer(0)
        self.dispatcher.lost(self.origin, 0.0)
        again = self.join(1)
        self.assertEqual(again.told, [("run", 0)])
        self.end(again, 0)
        self.assertEqual((self.origin.told, again.told), ([], [("run", 0)]))

    def test_a_stranger(self) -> None:
        """Who dies before it was ready leaves nothing behind."""
        self.dispatcher.lost(MemoryPeer(5), 0.0)
        self.assertTrue(self.dispatcher.is_empty)


class RefuseAllTests(DispatcherTestCase):
    def test_what_waits(self) -> None:
        """All that waits is answered, and so is what still comes; what runs goes on."""
        runner = self.join(2)
        for ticket in range(3):
            self.offer(ticket)
        self.dispatcher.refuse_all()
        refused = [("failed", ticket, "shutting-down") for ticket in (1, 2)]
        self.assertEqual(self.origin.told, refused)
        self.assertEqual((self.dispatcher.waiting, self.shown[-1]), (0, 0))
        self.offer(3)
        self.assertEqual(self.origin.told[2:], [("failed", 3, "shutting-down")])
        self.end(runner, 0, b"done")
        self.assertEqual(self.origin.told[3:], [("ended", 0, b"done")])
        self.assertTrue(self.dispatcher.is_empty)
        self.assertEqual(self.dispatcher.counts, Counts(handed_over=3))

    def test_nothing_waits(self) -> None:
        """With nothing that waits nobody is told anything."""
        self.dispatcher.refuse_all()
        self.assertEqual(self.origin.told, [])
