"""
The scheduling of a whole pool, under generated schedules and a clock of the test's own.

What decides and what carries is real: ``Dispatcher``, ``Worker`` and ``Link`` on
the supervisor's side, ``Link``, ``Relay``, ``Executor``, ``Lane`` and
``Deadlines`` on each worker's, and one ``Scoreboard`` between them. Simulated is
the machine: threads that begin and end their calls when they are told to, a
socket that delivers each line when it is told to, a reactor that is late, and a
process that dies. Wherever a process reads or writes what others write or read,
another one may come in between.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty
from typing import Any, Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from taskd.call import Call
from taskd.children import Worker
from taskd.credentials import Credentials
from taskd.dispatcher import Dispatcher, Peer, Task
from taskd.errors import CallError, Cancelled
from taskd.executor import Executor
from taskd.functions import Registry, task
from taskd.lane import PATIENCE_SECONDS
from taskd.link import Link, Offer
from taskd.relay import Relay
from taskd.scoreboard import Scoreboard
from taskd.states import Cause
from taskd.wire import NO_TERMS, Terms, decode, encode_result
from tests.support import new_ledger, registry_of

_FUNCTION_SECONDS: Final = 0.2
"""The time limit of the function that has one."""

_SETTLED_SECONDS: Final = PATIENCE_SECONDS + 0.05
"""Within so much time a worker has found out whether its calls take long, or never end."""

_MOST_WORKERS: Final = 8

_ROUNDS: Final = 200
"""So many rounds are more than any schedule of these needs to come to its end."""

Action = tuple[object, Callable[[], None]]
"""Something that can happen next, and who does it."""


def job(number: int) -> int:
    """Stand for a blocking task; its thread is the test."""
    return number


@task(timeout=_FUNCTION_SECONDS)
def limited(number: int) -> int:
    """Do the same, within a time limit of its own."""
    return number


# The machine.


class Reactor(Clock):
    """A worker's reactor, which runs what is due when it comes to it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._time = clock
        self._from_threads: deque[Callable[[], None]] = deque()

    def seconds(self) -> float:
        return self._time()

    def callFromThread(self, f: Callable[..., object], /, *args: object) -> None:
        self._from_threads.append(lambda: f(*args))

    @property
    def has_work(self) -> bool:
        due = any(call.getTime() <= self.seconds() for call in self.getDelayedCalls())
        return bool(self._from_threads) or due

    def turn(self) -> None:
        for _ in range(len(self._from_threads)):
            self._from_threads.popleft()()
        self.advance(0)


class Wire:
    """One direction of a socket: a transport for the sender, lines for the receiver."""

    disconnecting = False

    def __init__(self) -> None:
        self.lines: deque[bytes] = deque()

    def write(self, data: bytes) -> None:
        self.lines.extend(data.splitlines(keepends=True))


class Shared:
    """A part of the scoreboard, as one sees it who can be interrupted before he looks at it."""

    def __init__(self, real: Any, names: set[str], interrupt: Callable[[], None]) -> None:
        self._real = real
        self._names = names
        self._interrupt = interrupt

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            self._interrupt()
        return getattr(self._real, name)


class SteppedExecutor(Executor):
    """The executor, whose threads do nothing but what the test has them do."""

    def __init__(self, *args: Any, begins: Callable[[Call], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self.threads_running: dict[int, Call | None] = {}
        self._begins = begins

    def _start_thread(self) -> bool:
        self._threads_to_start -= 1
        self.threads_running[len(self.threads_running)] = None
        return True

    @property
    def backlog(self) -> int:
        """How many calls no thread has taken."""
        return self._waiting.qsize()

    def waiting_calls(self) -> list[Call]:
        """Give the calls that no thread has taken, and that have not ended otherwise."""
        calls = []
        for _ in range(self._waiting.qsize()):
            call = self._waiting.get_nowait()
            self._waiting.put(call)
            if call is not None and call.reply is None:
                calls.append(call)
        return calls

    def take_next(self, thread: int) -> None:
        """Have a thread take the next call, as ``_work`` does."""
        try:
            call = self._waiting.get_nowait()
        except Empty:
            return
        assert call is not None
        call.began = began = self._clock()
        if call.reply is not None:
            self._outcomes.append((call, None, None, 0.0))
            self._wake()
            return
        # Any key that is no thread's will do.
        self._threads[-1 - thread] = [call]
        self.threads_running[thread] = call
        self._begins(call)
        self._slot.run(call.function.label, began)
        if call.timer is not None:
            self._deadlines.show(call, began)

    def end_call(self, thread: int) -> None:
        """Have a thread come to the end of its call, as ``_work`` does."""
        call = self.threads_running[thread]
        assert call is not None
        assert call.began is not None
        reply = encode_result(call.id_json, call.positional[0])
        self._threads[-1 - thread] = [None]
        self.threads_running[thread] = None
        self._outcomes.append((call, reply, None, self._clock() - call.began))
        self._wake()


# Who sees that all is right.


@dataclass
class Job:
    """
    One task, and all that is known of what became of it.

    Attributes:
        place: Where it stands in the queue: higher priority first, then first come.
        given_to: Every process that it was given to.
        begun_by: Every process whose thread has begun it.
        told: How often its origin was told what became of it.
        is_closed: True once all know that nobody wants it any more.
    """

    number: int
    origin: Process
    terms: Terms
    is_limited: bool
    came_at: float
    follow_ups: int
    call: Call | None = None
    reply: dict[str, Any] | None = None
    place: tuple[int, int] | None = None
    given_to: list[Process] = field(default_factory=list)
    begun_by: list[Process] = field(default_factory=list)
    told: int = 0
    was_cancelled: bool = False
    is_orphan: bool = False
    is_unwanted: bool = False
    is_closed: bool = False

    def is_past(self, now: float) -> bool:
        """Tell whether its caller's time is over."""
        return self.terms.timeout is not None and self.came_at + self.terms.timeout <= now


class Record(Worker):
    """The supervisor's record of a worker, which has its witness see what it is told."""

    process: Process
    witness: Witness

    def run(self, task: Task) -> None:
        self.witness.gives(self, task)
        super().run(task)

    def ended(self, ticket: int, reply: bytes) -> None:
        self.witness.tells(self, ticket, None)
        super().ended(ticket, reply)

    def failed(self, ticket: int, error: CallError) -> None:
        self.witness.tells(self, ticket, error)
        super().failed(ticket, error)


class Witness(Dispatcher):
    """The queue, which keeps an account of its own of who waits in it, and where."""

    def __init__(self, pool: Pool, threads: int, backlog: int) -> None:
        def occupied() -> list[int]:
            pool.interrupt()
            seen = pool.scoreboard.occupied()
            pool.interrupt()
            return seen

        def show(waiting: int) -> None:
            pool.interrupt()
            pool.scoreboard.supervisor_slot().show_waiting(waiting)

        super().__init__(threads, backlog, 10**6, occupied, show)
        self._pool = pool
        self._most_waiting = backlog
        self.queue: dict[int, Job] = {}
        self._offered: dict[tuple[Peer, int], Job] = {}
        self._given: dict[tuple[Peer, int], Job] = {}
        self.declined: set[Peer] = set()
        self.is_refusing = False

    def gives(self, record: Record, task: Task) -> None:
        given = self.queue.pop(decode(task.offer.line[:-1])["id"], None)
        assert given is not None, "a task is given out that does not wait"
        for other in [j for j in self.queue.values() if j.place < given.place]:
            # Nobody is told of an orphan's end; anyone else would have left the queue by it.
            assert other.is_orphan, f"{given} is given out before {other}"
            assert other.is_past(self._pool.now), f"{given} is given out before {other}"
            del self.queue[other.number]
        assert record not in self.declined, "a worker is given a task after it has declined one"
        assert not record.is_gone, "a task is given to the dead"
        given.given_to.append(record.process)
        self._given[record, task.number] = given
        has = sum(peer is record for peer, _ in self._given)
        assert has <= self._pool.threads, "a worker is given more tasks than it has threads"

    def tells(self, record: Record, ticket: int, error: CallError | None) -> None:
        told = self._offered[record, ticket]
        told.told += 1
        if error is None:
            return
        self.queue.pop(told.number, None)
        if error.code == "overloaded":
            assert self._most_waiting <= len(self.queue), "a task is refused though there is room"
        elif error.code == "worker-lost":
            assert told.given_to[-1].was_killed, "a task is lost whose worker was not killed"
        elif error.code == "time-limit":
            assert told.is_past(self._pool.now), "a task has expired before its time"
        else:
            assert error.code == "shutting-down"
            assert self.is_refusing

    def offer(self, origin: Peer, offer: Offer, now: float) -> None:
        offered = self._pool.jobs[decode(offer.line[:-1])["id"]]
        assert offered.place is None, "a task is handed over twice"
        offered.place = (-offer.priority, len(self._offered))
        self._offered[origin, offer.ticket] = offered
        self.queue[offered.number] = offered
        waited = self.waiting
        super().offer(origin, offer, now)
        if waited and waited >= self._most_waiting:
            assert offered.number not in self.queue, "a task is taken though there is no room"

    def returned(self, peer: Peer, number: int, now: float) -> None:
        back = self._given.pop((peer, number))
        self.declined.add(peer)
        if not back.is_unwanted:
            self.queue[back.number] = back
        super().returned(peer, number, now)

    def ended(self, peer: Peer, number: int, reply: bytes, now: float) -> None:
        del self._given[peer, number]  # it is answered for once, or this fails
        self.declined.discard(peer)
        super().ended(peer, number, reply, now)

    def ask(self, peer: Peer, now: float) -> None:
        self.declined.discard(peer)
        super().ask(peer, now)

    def cancel(self, origin: Peer, ticket: int) -> None:
        self._nobody_wants(self._offered[origin, ticket])
        super().cancel(origin, ticket)

    def _nobody_wants(self, unwanted: Job) -> None:
        unwanted.is_unwanted = True
        self.queue.pop(unwanted.number, None)

    def lost(self, peer: Peer, now: float) -> bool:
        self._given = {key: given for key, given in self._given.items() if key[0] is not peer}
        for (origin, _), orphan in self._offered.items():
            if origin is peer:
                orphan.is_orphan = True
                if orphan.terms.ends_with_caller:
                    self._nobody_wants(orphan)
        return super().lost(peer, now)

    def sweep(self, now: float) -> None:
        self.declined.clear()
        super().sweep(now)
        for number in [n for n, j in self.queue.items() if j.is_orphan and j.is_past(now)]:
            del self.queue[number]

    def refuse_all(self) -> None:
        self.is_refusing = True
        super().refuse_all()
        for number in [n for n, j in self.queue.items() if j.is_orphan]:
            del self.queue[number]

    def check(self) -> None:
        """Compare the two accounts."""
        now = self._pool.now
        forgotten = sum(j.is_orphan and j.is_past(now) for j in self.queue.values())
        assert len(self.queue) - forgotten <= self.waiting <= len(self.queue)
        assert self._pool.scoreboard.waiting == self.waiting
        assert self.waiting == len(list(self._waiting_tasks()))
        if not forgotten:
            waiting = [task.offer.line for task in self._waiting_tasks()]
            assert self._waiting_bytes == sum(map(len, waiting))

    def check_empty(self) -> None:
        """See that nothing is left behind."""
        assert self.is_empty
        assert self.waiting == 0
        assert self.oldest() is None
        assert not self._by_ticket
        assert not self._waiting_bytes
        assert not any(standing.running for standing in self._peers.values())


# The processes.


class Process:
    """A worker's process: what ``worker`` makes of the parts that are real here."""

    def __init__(self, pool: Pool, number: int, threads: int) -> None:
        self.pool = pool
        self.number = number
        self.up = Wire()
        self.down = Wire()
        self.is_dead = self.was_killed = False
        self.is_retired = self.is_stopping = self.has_said_so = self.may_go = False
        self.owed: set[int] = set()
        self.slot = pool.scoreboard.slot(number)
        self.slot.open(1000 + number, pool.now)
        self.reactor = Reactor(lambda: pool.now)
        self.executor = SteppedExecutor(
            self.reactor,
            Shared(self.slot, {"take", "finish", "hand_over"}, pool.interrupt),
            new_ledger(),
            threads=threads,
            clock=lambda: pool.now,
            begins=self._begins,
        )
        board = Shared(pool.scoreboard, {"waiting"}, pool.interrupt)
        self.relay = Relay(pool.registry, self.executor, board, self.tell)  # type: ignore[arg-type]
        self.link = Link(
            {
                **self.relay.readers,
                b"retire": lambda _: self._retire(),
                b"stop": lambda _: self._stop(),
                b"go": lambda _: self._let_go(),
            }
        )
        self.link.makeConnection(self.up)  # type: ignore[arg-type]
        self.executor.on_idle = self.relay.on_quiet = self._go_if_done
        self.relay.on_stuck = self._lose_a_thread
        self.slot.ready()
        self.tell(b"ready\n")

    def tell(self, message: bytes) -> None:
        self.link.tell(message)

    @property
    def is_open(self) -> bool:
        """Tell whether a call that comes could be run here."""
        return not (self.is_dead or self.is_retired or self.is_stopping)

    @property
    def has_callers(self) -> bool:
        """Tell whether calls may still come: connections are passed on when nothing is owed."""
        return self.is_open or (self.is_retired and not self.is_dead and bool(self.owed))

    @property
    def free_threads(self) -> int:
        """Tell how many calls it could begin at once."""
        lane = self.executor.lane
        return 0 if lane.is_retired else max(0, lane.threads - lane.occupied)

    @property
    def runs_for_others(self) -> bool:
        """Tell whether it runs a task of another worker's callers."""
        running = self.executor.threads_running.values()
        return any(call is not None and call.positional[0] not in self.owed for call in running)

    def call(self, new: Job) -> None:
        """Have a caller of its own call."""
        self.owed.add(new.number)
        function = self.pool.registry.find("limited" if new.is_limited else "job")
        positional, keywords = function.bind([new.number])
        new.call = Call(
            function, positional, keywords, str(new.number), new.terms, self._is_answered, None
        )
        if self.is_retired:
            self.executor.send_on(new.call)
        else:
            self.executor.start(new.call)

    def _is_answered(self, call: Call) -> None:
        assert call.reply is not None
        self.pool.answered(call.positional[0], decode(call.reply[:-1]))
        self.owed.discard(call.positional[0])
        self._go_if_done()

    def _begins(self, call: Call) -> None:
        self.pool.begun(call.positional[0], self)

    def hear(self) -> None:
        self.link.dataReceived(self.down.lines.popleft())

    def die(self, unsent: int) -> None:
        """Be killed, with so many of the latest lines not yet sent."""
        self.was_killed = True
        for _ in range(min(unsent, len(self.up.lines))):
            self.up.lines.pop()
        self.is_dead = True

    # As in ``worker``.

    def _retire(self) -> None:
        if self.is_retired or self.is_stopping:
            return
        self.is_retired = True
        self.slot.drain()
        self.executor.lane.retire()
        self.executor.hand_over_all()
        self._go_if_done()

    def _stop(self) -> None:
        self.is_stopping = True
        self.slot.drain()
        self._go_if_done()

    def _let_go(self) -> None:
        self.may_go = True
        self._go_if_done()

    def _lose_a_thread(self) -> None:
        self.executor.hand_over_all()
        self.tell(b"replace %s\n" % Cause.TIME_LIMIT.name.encode())

    def _go_if_done(self) -> None:
        if (
            (self.is_stopping or self.is_retired)
            and not self.owed
            and self.executor.is_idle
            and self.relay.is_quiet
        ):
            if self.may_go:
                self.is_dead = True
            elif not self.has_said_so:
                self.has_said_so = True
                self.tell(b"leaving\n")


class Pool:
    """All processes, the supervisor's part of them, and what lies between."""

    def __init__(self, workers: int, threads: int, backlog: int) -> None:
        self.now = 1000.0
        self.threads = threads
        self.registry: Registry = registry_of(job, limited)
        fd = Scoreboard.create(4)
        self.scoreboard = Scoreboard(fd)
        os.close(fd)
        self.jobs: dict[int, Job] = {}
        self.dispatcher = Witness(self, threads, backlog)
        self.clock = lambda: self.now
        self.processes: list[Process] = []
        self.records: dict[Process, Record] = {}
        self.is_stopped = False
        self._worn: deque[Worker] = deque()
        self._leaving: list[Worker] = []
        self._joined: set[Worker] = set()
        self._acting: list[object] = []
        self._interruption: tuple[int, int] | None = None
        for _ in range(workers):
            self.fork()

    # Who acts, and who comes in between.

    def act(self, action: Action, interruption: tuple[int, int] | None = None) -> None:
        """
        Let something happen.

        Args:
            action: What.
            interruption: Before which look at what is shared something else
                happens, and which of all that could, or None.
        """
        who, do = action
        self._interruption = interruption
        self._acting.append(who)
        try:
            do()
        finally:
            self._acting.pop()
            self._interruption = None

    def interrupt(self) -> None:
        """Let another one act, if it is time."""
        if self._interruption is None:
            return
        left, pick = self._interruption
        self._interruption = (left - 1, pick) if left else None
        if left:
            return
        actions = [one for one in self.possible() if one[0] not in self._acting]
        if actions:
            who, do = actions[pick % len(actions)]
            self._acting.append(who)
            do()
            self._acting.pop()

    def possible(self) -> list[Action]:
        """Give what can happen next, without time going by or a task ending."""
        actions: list[Action] = []
        for process in self.processes:
            if process.up.lines or process.is_dead:
                actions.append((self, lambda process=process: self.hear(process)))
            if process.is_dead:
                continue
            if process.down.lines:
                actions.append((process, process.hear))
            if process.reactor.has_work:
                actions.append((process, process.reactor.turn))
            if process.executor.backlog:
                for thread, running in process.executor.threads_running.items():
                    if running is None:
                        actions.append(
                            (
                                (process, thread),
                                lambda process=process, thread=thread: process.executor.take_next(
                                    thread
                                ),
                            )
                        )
        return actions

    def endings(self) -> list[Action]:
        """Give the tasks that could end."""
        return [
            (
                (process, thread),
                lambda process=process, thread=thread: process.executor.end_call(thread),
            )
            for process in self.alive()
            for thread, running in process.executor.threads_running.items()
            if running is not None
        ]

    @property
    def is_served(self) -> bool:
        """Tell whether there is a worker that may be given tasks."""
        return bool(self._joined)

    def alive(self) -> Iterator[Process]:
        """Give the processes that are not dead."""
        return (process for process in self.processes if not process.is_dead)

    def run(self) -> None:
        """Let happen what can, until nothing can."""
        while actions := self.possible():
            for action in actions:
                if action[0] not in self.processes or not action[0].is_dead:  # type: ignore[attr-defined]
                    self.act(action)

    def settle(self) -> None:
        """Let as much time pass as workers need to see that their tasks take long."""
        end, come = self.now + _SETTLED_SECONDS, len(self.jobs)
        self.run()
        while True:
            timers = [
                timer.getTime()
                for process in self.alive()
                for timer in process.reactor.getDelayedCalls()
            ]
            self.now = max(self.now, min([*timers, end]))
            self.run()
            if len(self.jobs) > come:  # a caller that was answered has called again
                end, come = self.now + _SETTLED_SECONDS, len(self.jobs)
            if self.now >= end:
                return

    # As in ``supervisor``.

    def fork(self) -> None:
        taken = {process.number for process in self.processes}
        number = min(set(range(1, self.scoreboard.slots + 1)) - taken)
        process = Process(self, number, self.threads)
        record = Record(self, None, number, 1000 + number)  # type: ignore[arg-type]
        record.process, record.witness = process, self.dispatcher
        record.makeConnection(process.down)  # type: ignore[arg-type]
        self.processes.append(process)
        self.records[process] = record

    def hear(self, process: Process) -> None:
        record = self.records[process]
        if process.up.lines:
            record.dataReceived(process.up.lines.popleft())
        else:
            self.processes.remove(process)
            record.connectionLost()

    def worker_ready(self, worker: Worker) -> None:
        worker.ready_at = self.now
        if self.is_stopped or worker.is_retired:
            return
        self._joined.add(worker)
        self.dispatcher.join(worker, self.now)
        if worker.cause is None:
            self.retire_one()

    def retire_one(self) -> None:
        while self._worn:
            worker = self._worn.popleft()
            if not worker.is_gone:
                self._close(worker)
                worker.retire(Credentials())
                return

    def worker_worn(self, worker: Worker, cause: Cause) -> None:
        if not self.is_stopped:
            self.wear_out(worker, cause)
            if cause is Cause.TIME_LIMIT:
                self._close(worker)

    def wear_out(self, worker: Worker, cause: Cause) -> None:
        if worker.cause is None and not worker.is_gone:
            worker.cause = cause
            self._worn.append(worker)

    def worker_leaving(self, worker: Worker) -> None:
        self._leaving.append(worker)
        self._let_go()

    def _let_go(self) -> None:
        if self.is_stopped and self.dispatcher.waiting:
            return
        while self._leaving:
            worker = self._leaving.pop()
            self._close(worker)
            worker.let_go()

    def _close(self, worker: Worker) -> None:
        self._joined.discard(worker)
        self.dispatcher.close(worker)

    def worker_gone(self, worker: Worker) -> None:
        self._joined.discard(worker)
        self.scoreboard.slot(worker.number).close()
        self.dispatcher.lost(worker, self.now)

    def watch(self) -> None:
        if self.dispatcher.waiting:
            self.dispatcher.sweep(self.now)
        self._let_go()

    def stop(self) -> None:
        self.is_stopped = True
        for record in self.records.values():
            record.stop()

    # What callers see.

    def start(self, process: Process, terms: Terms, is_limited: bool, follow_ups: int) -> None:
        """Have a caller call."""
        number = len(self.jobs) + 1
        new = Job(number, process, terms, is_limited, self.now, follow_ups)
        self.jobs[number] = new
        process.call(new)

    def begun(self, number: int, process: Process) -> None:
        begun = self.jobs[number]
        assert not begun.begun_by, "a task is begun twice"
        assert not begun.is_closed, "a task is begun that nobody wants"
        begun.begun_by.append(process)

    def answered(self, number: int, reply: dict[str, Any]) -> None:
        """See that a reply is the right one; its caller may have more to ask."""
        answered = self.jobs[number]
        assert answered.reply is None
        answered.reply = reply
        assert reply["id"] == number
        if "result" in reply:
            assert reply["result"] == number
            assert answered.begun_by
        else:
            code = reply["error"]["code"]
            if code == "cancelled":
                assert answered.was_cancelled
            elif code == "time-limit":
                by_function = answered.is_limited and answered.begun_by
                assert answered.is_past(self.now) or by_function
            else:
                # The queue has said so, and is asked for its reasons there.
                assert code in ("worker-lost", "overloaded", "shutting-down")
                assert answered.told
        origin = answered.origin
        if answered.follow_ups and origin.has_callers:
            self.start(origin, answered.terms, answered.is_limited, answered.follow_ups - 1)

    def unanswered(self) -> list[Job]:
        """Give the tasks whose callers wait."""
        return [j for j in self.jobs.values() if j.reply is None and not j.origin.is_dead]

    @property
    def is_done(self) -> bool:
        """Tell whether nothing runs or waits, and nobody waits for anything."""
        return not (self.possible() or self.endings() or self.unanswered()) and (
            self.dispatcher.is_empty
        )

    # What has to be so.

    def check_nobody_idles(self, but: set[Peer]) -> None:
        """See that no task waits while a worker could begin it, some workers set aside."""
        free = [
            process.number
            for process in self.alive()
            if self.records[process] in self._joined - but and process.free_threads
        ]
        local = [call for process in self.alive() for call in process.executor.waiting_calls()]
        if free:
            assert not self.dispatcher.waiting, f"{free} are free, and the queue is not empty"
            assert not local, f"{free} are free, and tasks wait behind others"

    def check_times(self) -> None:
        """See that nobody waits longer than he wanted to, and that what is over stays so."""
        for one in self.unanswered():
            assert not one.is_past(self.now), "a caller waits though its time is over"
        for one in self.jobs.values():
            # What the dead have said last may never have been sent.
            is_over = one.reply is not None and not one.origin.was_killed
            one.is_closed = (is_over or one.is_unwanted) and not one.begun_by

    def check_all_done(self) -> None:
        """See that nothing is owed, and nothing left behind."""
        assert not self.unanswered()
        self.dispatcher.check_empty()
        for process in self.alive():
            assert process.relay.is_quiet
            assert process.executor.is_idle
            assert process.executor.lane.occupied == 0
            assert not process.slot.is_working
            assert process.slot.due == 0.0
        for one in self.jobs.values():
            assert one.told <= 1, "a worker is told twice what became of a task"


PICKS: Final = st.integers(0, 63)
INTERRUPTIONS: Final = st.none() | st.tuples(st.integers(0, 5), PICKS)
TERMS: Final = st.builds(
    Terms,
    timeout=st.sampled_from([None, None, None, 0.004, 0.1]),
    wants_progress=st.just(False),
    priority=st.sampled_from([0, 0, 0, 0, 1, 2, -1]),
    ends_with_caller=st.booleans(),
).map(lambda terms: NO_TERMS if terms == NO_TERMS else terms)


class PoolMachine(RuleBasedStateMachine):
    """Whatever happens, in whatever order, no task is lost, doubled, or left waiting."""

    pool: Pool

    @initialize(
        workers=st.integers(1, 4),
        threads=st.integers(1, 2),
        backlog=st.sampled_from([100, 100, 100, 2, 0]),
    )
    def begin(self, workers: int, threads: int, backlog: int) -> None:
        self.pool = Pool(workers, threads, backlog)
        self.pool.run()

    def _some_process(self, pick: int, can: Callable[[Process], bool]) -> Process | None:
        processes = [process for process in self.pool.alive() if can(process)]
        return processes[pick % len(processes)] if processes else None

    @rule(
        pick=PICKS,
        terms=TERMS,
        is_limited=st.integers(0, 7).map(lambda n: n == 7),
        follow_ups=st.sampled_from([0, 0, 0, 1, 3]),
        count=st.integers(1, 3),
        interruption=INTERRUPTIONS,
    )
    def callers_call(
        self,
        pick: int,
        terms: Terms,
        is_limited: bool,
        follow_ups: int,
        count: int,
        interruption: tuple[int, int] | None,
    ) -> None:
        process = self._some_process(pick, lambda process: process.has_callers)
        for _ in range(count):
            if process is not None and process.has_callers:
                self.pool.act(
                    (process, lambda: self.pool.start(process, terms, is_limited, follow_ups)),
                    interruption,
                )

    @rule(picks=st.lists(st.tuples(PICKS, INTERRUPTIONS), min_size=1, max_size=5))
    def things_happen(self, picks: list[tuple[int, tuple[int, int] | None]]) -> None:
        for pick, interruption in picks:
            if actions := self.pool.possible():
                self.pool.act(actions[pick % len(actions)], interruption)

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3))
    def tasks_end(self, picks: list[int]) -> None:
        for pick in picks:
            if endings := self.pool.endings():
                self.pool.act(endings[pick % len(endings)])

    @rule(seconds=st.sampled_from([0.0005, 0.001, 0.003, PATIENCE_SECONDS, 0.3]))
    def time_passes(self, seconds: float) -> None:
        self.pool.now += seconds

    @rule(pick=PICKS)
    def a_task_is_cancelled(self, pick: int) -> None:
        if jobs := self.pool.unanswered():
            chosen = jobs[pick % len(jobs)]
            assert chosen.call is not None
            chosen.was_cancelled = True
            call = chosen.call
            self.pool.act((chosen.origin, lambda: call.fail(Cancelled("taken back"))))

    @rule(pick=PICKS, unsent=st.integers(0, 2), is_helping=st.booleans())
    def a_worker_is_killed(self, pick: int, unsent: int, is_helping: bool) -> None:
        process = self._some_process(
            pick, lambda process: not is_helping or process.runs_for_others
        )
        if process is not None:
            process.die(unsent)

    @precondition(
        lambda self: not self.pool.is_stopped and len(self.pool.processes) < _MOST_WORKERS
    )
    @rule()
    def a_worker_is_forked(self) -> None:
        self.pool.fork()

    @rule(pick=PICKS)
    def a_worker_wears_out(self, pick: int) -> None:
        process = self._some_process(pick, lambda process: process.is_open)
        if process is not None:
            self.pool.wear_out(self.pool.records[process], Cause.MAX_TASKS)

    @rule(interruption=INTERRUPTIONS)
    def the_supervisor_watches(self, interruption: tuple[int, int] | None) -> None:
        self.pool.act((self.pool, self.pool.watch), interruption)

    @rule(pick=st.integers(0, 7))
    def the_daemon_stops(self, pick: int) -> None:
        if pick == 7 and not self.pool.is_stopped:
            self.pool.act((self.pool, self.pool.stop))

    @rule()
    def all_settles(self) -> None:
        self.pool.settle()
        self.pool.check_nobody_idles(but=self.pool.dispatcher.declined)
        self.pool.act((self.pool, self.pool.watch))
        self.pool.settle()
        self.pool.check_nobody_idles(but=set())
        self.pool.check_times()

    @invariant()
    def the_accounts_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.dispatcher.check()

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        self.all_settles()
        for _ in range(_ROUNDS):
            if pool.is_done:
                break
            for ending in pool.endings():
                pool.act(ending)
            self.all_settles()
            if pool.is_stopped:
                if not pool.endings():
                    pool.act((pool, pool.dispatcher.refuse_all))
            elif not pool.is_served and len(pool.processes) < pool.scoreboard.slots:
                pool.fork()
        pool.dispatcher.check()
        pool.check_all_done()


PoolMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
PoolTests = PoolMachine.TestCase


class LongRunTests(SynchronousTestCase):
    """The same, for longer: what it takes to be found is not made smaller, but there is more."""

    @settings(max_examples=250, deadline=None)
    @given(st.integers(0, 2**32))
    def test_long_runs(self, seed: int) -> None:
        """In hundreds of steps, thrown with dice that are loaded for work, all stays so."""
        machine, dice = PoolMachine(), random.Random(seed)
        machine.begin(dice.randint(1, 4), dice.randint(1, 2), dice.choice([100, 100, 2, 0]))
        steps = dice.choices(*zip(*self.steps(machine, dice), strict=True), k=150)
        for step in steps:
            step()
            machine.the_accounts_agree()
        machine.teardown()

    def steps(
        self, machine: PoolMachine, dice: random.Random
    ) -> list[tuple[Callable[[], None], float]]:
        """Give what can be done, and how often."""

        def pick() -> int:
            return dice.randint(0, 63)

        def interruption() -> tuple[int, int] | None:
            return (dice.randint(0, 5), pick()) if dice.random() < 0.5 else None

        def call() -> None:
            timeout = dice.choice([None, None, None, None, 0.004, 0.1])
            terms = Terms(timeout, False, dice.choice([0, 0, 0, 1, 2, -1]), dice.random() < 0.5)
            if dice.random() < 0.5:
                terms = NO_TERMS
            follow_ups = dice.choice([0, 0, 0, 1, 3])
            is_limited = dice.random() < 0.1
            count = dice.randint(1, 3)
            machine.callers_call(pick(), terms, is_limited, follow_ups, count, interruption())

        def fork() -> None:
            if not machine.pool.is_stopped and len(machine.pool.processes) < _MOST_WORKERS:
                machine.a_worker_is_forked()

        return [
            (call, 15),
            (lambda: machine.things_happen([(pick(), interruption()) for _ in range(4)]), 40),
            (lambda: machine.tasks_end([pick(), pick()]), 15),
            (lambda: machine.time_passes(dice.choice([0.001, 0.003, PATIENCE_SECONDS, 0.3])), 10),
            (lambda: machine.a_task_is_cancelled(pick()), 4),
            (lambda: machine.a_worker_is_killed(pick(), dice.randint(0, 2), True), 1),
            (lambda: machine.a_worker_wears_out(pick()), 1.5),
            (fork, 3),
            (lambda: machine.the_supervisor_watches(interruption()), 1),
            (lambda: machine.the_daemon_stops(pick() % 8), 0.5),
            (machine.all_settles, 2),
        ]


class ScheduleTests(SynchronousTestCase):
    """Schedules that are too rare to be left to chance."""

    def pool_with_a_task_on_its_way(self, threads: int = 1) -> Pool:
        """
        Give a pool of two workers.

        The first is held up, and what it has handed over is on its way. The
        second one's threads have just come to an end, which its reactor does
        not know yet.
        """
        pool = Pool(2, threads, 100)
        pool.run()
        first, second = pool.processes
        for process in (second, first):
            for _ in range(threads):
                pool.start(process, NO_TERMS, False, 0)
        pool.run()
        pool.start(first, NO_TERMS, False, 0)
        while not first.up.lines:
            pool.now += 0.001
            first.reactor.turn()
        for ending in pool.endings():
            if ending[0][0] is second:  # type: ignore[index]
                pool.act(ending)
        return pool

    def assert_begun(self, pool: Pool, number: int) -> None:
        """See that a task is begun, without anybody having looked after it."""
        pool.run()
        self.assertEqual(pool.jobs[number].begun_by, [pool.processes[1]])

    def test_a_worker_is_free_while_the_supervisor_looks(self) -> None:
        """Whenever a worker becomes free while a task comes to the queue, it gets the task."""
        for moment in range(8):
            pool = self.pool_with_a_task_on_its_way()
            pool.act((pool, lambda pool=pool: pool.hear(pool.processes[0])), (moment, 0))
            self.assert_begun(pool, 3)

    def test_a_task_comes_while_a_worker_looks(self) -> None:
        """Whenever a task comes to the queue while a worker becomes free, it gets the task."""
        for moment in range(8):
            pool = self.pool_with_a_task_on_its_way()
            second = pool.processes[1]
            pool.act((second, second.reactor.turn), (moment, 0))
            self.assert_begun(pool, 3)

    def test_a_task_is_given_back_to_a_worker_that_is_free_by_then(self) -> None:
        """What a worker gives back just before it is free is not left waiting for another event."""
        pool = self.pool_with_a_task_on_its_way()
        first, second = pool.processes
        second.reactor.turn()
        pool.hear(first)
        pool.start(second, NO_TERMS, False, 0)
        second.executor.take_next(0)
        second.hear()
        while not second.up.lines:
            pool.now += 0.001
            second.reactor.turn()
        second.executor.end_call(0)
        second.reactor.turn()
        pool.run()
        pool.watch()
        self.assert_begun(pool, 3)

    def test_a_worker_dies_with_a_task_of_another(self) -> None:
        """A task whose worker dies comes to an error, once, and is not run again."""
        pool = self.pool_with_a_task_on_its_way()
        pool.run()
        pool.fork()
        pool.processes[1].die(0)
        pool.settle()
        reply = pool.jobs[3].reply
        assert reply is not None
        self.assertEqual(reply["error"]["code"], "worker-lost")
        self.assertEqual((pool.jobs[3].told, len(pool.jobs[3].begun_by)), (1, 1))
