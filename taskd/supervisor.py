"""
The supervisor: bind the ports, keep N workers alive, stop them.

It runs in the twistd process. It never runs a task and never imports a task
module, so nothing that a task does can take it down. How soon something is
started again is decided in ``policy``; which worker gets a task that found none
free, in ``dispatcher``; what a worker does is ``worker``'s.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Final

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from taskd.children import Worker, Zygote
from taskd.dispatcher import Dispatcher
from taskd.errors import StartFailed
from taskd.ledger import Ledger
from taskd.lines import LongLineReceiver
from taskd.link import adopt_link
from taskd.notify import Notifier
from taskd.policy import YOUNG_SECONDS, Births, is_hung
from taskd.ports import Ports
from taskd.process import Strays, Title, adopt_orphans
from taskd.removals import Removals
from taskd.scoreboard import Scoreboard
from taskd.settings import Settings
from taskd.slots import SupervisorSlot
from taskd.states import Cause
from taskd.zygotes import Zygotes

__all__ = ["Supervisor"]

_BACKLOG_BYTES: Final = 256 * 1024 * 1024
"""Requests that wait may have so many bytes together: they lie in the supervisor's memory."""

_WATCH_SECONDS: Final = 0.1
"""How often workers are looked at, and the queue."""

_BEAT_SECONDS: Final = 0.5
"""How often workers are asked whether they are alive."""

_KILL_AFTER_GRACE_SECONDS: Final = 2.0
_KILL_AFTER_LINK_SECONDS: Final = 1.0
_KILL_AFTER_STACK_SECONDS: Final = 0.1


class Supervisor(Service):
    """
    The whole daemon, as a Twisted service.

    Args:
        settings: What the operator decided.
        ports: Where it listens.
        reactor: Spawns the zygote, carries the links, keeps the delays.
        clock: Gives CLOCK_MONOTONIC seconds.
        adopt: Lets the reactor carry a link.
        set_signal: Sets what a signal does, as ``signal.signal``.
        notifier: Is told how the daemon gets on.

    Attributes:
        clock: As it was given.
        dispatcher: The pool's queue.
    """

    name = "taskd"

    def __init__(
        self,
        settings: Settings,
        ports: Ports,
        reactor: Any,
        clock: Callable[[], float] = time.monotonic,
        adopt: Callable[[Any, int, LongLineReceiver], None] = adopt_link,
        set_signal: Callable[[int, Callable[..., object]], object] = signal.signal,
        notifier: Notifier | None = None,
    ) -> None:
        self._log = Logger(namespace="taskd.supervisor")  # whatever it is a part of
        self._settings = settings
        self._reactor = reactor
        self.clock = clock
        self._adopt = adopt
        self._set_signal = set_signal
        self._notifier = notifier or Notifier()
        self._births = Births()
        self._ports = ports
        self.credentials = ports.credentials
        self._zygotes: Zygotes
        self._workers: dict[int, Worker] = {}
        self._requested: dict[int, Zygote] = {}
        self._worn: deque[Worker] = deque()
        self._leaving: list[Worker] = []
        self._removals = Removals()
        self._started_at = 0.0
        self._next_beat = 0.0
        self._has_been_whole = False
        self._stopped: Deferred[None] | None = None
        self._strays = Strays(reactor, self._pids)

    # twistd calls these.

    def privilegedStartService(self) -> None:
        """
        Open the ports, while that is still allowed.

        Raises:
            StartFailed: One cannot be had, or is not safe.
        """
        self._started_at = self.clock()
        self._credentials = self._ports.open()

    def startService(self) -> None:
        """
        Spawn the zygote and have it import the task modules, then fork the workers.

        It waits for the imports, before the reactor runs, so that a module that
        cannot be imported ends the start where the operator sees it.

        Raises:
            StartFailed: The zygote did not come up, or a task module is not usable.
        """
        super().startService()  # type: ignore[no-untyped-call]
        adopt_orphans()
        settings = self._settings
        self._scoreboard_fd = Scoreboard.create(settings.procs)
        self._scoreboard = Scoreboard(self._scoreboard_fd)
        self._slot: SupervisorSlot = self._scoreboard.supervisor_slot()
        self._ledger = Ledger(self._scoreboard.tally(0), self._scoreboard.failures(0), 0)
        self._slots = [self._scoreboard.slot(n) for n in range(self._scoreboard.slots + 1)]
        self._slot.open(os.getpid(), self.clock())
        self._slot.ready()
        self.dispatcher = Dispatcher(
            settings.threads,
            settings.backlog,
            _BACKLOG_BYTES,
            self._scoreboard.occupied,
            self._slot.show_waiting,
        )
        if not self._ports.sockets:
            raise StartFailed("no port is open: privilegedStartService was not called")
        self._zygotes = Zygotes(self, self._reactor, settings, self._slot, self._make_zygote)
        self._notifier.starting()
        self._zygotes.start(self._credentials)
        self._reactor.callLater(_WATCH_SECONDS, self._watch)
        self._on_signal(signal.SIGHUP, self._reload)
        Title("taskd: supervisor")

    def _make_zygote(self, spec: dict[str, Any]) -> Zygote:
        return Zygote(
            self._zygotes,
            self,
            self._reactor,
            spec,
            self._scoreboard_fd,
            self._ports.sockets,
            self._adopt,
        )

    def _on_signal(self, number: signal.Signals, act: Callable[[], None]) -> None:
        self._set_signal(number, lambda *_: self._reactor.callFromThread(act))

    def _reload(self) -> None:
        self._notifier.reloading(self.clock())
        self._zygotes.reload()

    def stopService(self) -> Deferred[None]:
        """
        Stop taking tasks, let the running ones finish within the grace, kill the rest.

        Before that all goes on for a while, if the operator wants that.

        Returns:
            Fires with None when the last child has been reaped.
        """
        super().stopService()  # type: ignore[no-untyped-call]
        self._ending: Deferred[None] = Deferred()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._on_signal(number, self.hurry)
        self._slot.drain()
        drain, grace = self._settings.drain_seconds, self._settings.grace_seconds
        self._notifier.stopping(drain + grace + 2 * _KILL_AFTER_GRACE_SECONDS)
        if drain:
            self._log.info("all goes on for {seconds:g} s more, then it stops", seconds=drain)
            self._reactor.callLater(drain, self._stop)
        else:
            self._stop()
        return self._ending

    def _stop(self) -> None:
        if self._stopped is not None:  # told again meanwhile
            return
        self._stopped = self._ending
        grace = self._settings.grace_seconds
        self._ports.close()
        self._zygotes.stop()
        self._removals.close()
        busy = sum(self._slots[w.number].is_working for w in self._workers.values())
        if busy or self.dispatcher.waiting:
            text = "busy workers: {busy}, tasks that wait: {waiting}; they get {grace:g} s"
            self._log.info(text, busy=busy, waiting=self.dispatcher.waiting, grace=grace)
        for worker in list(self._workers.values()):
            worker.stop()
        self._reactor.callLater(grace, self.dispatcher.refuse_all)
        self._reactor.callLater(
            grace + _KILL_AFTER_GRACE_SECONDS, self._kill_all, "its grace is over"
        )
        self._check_stopped()

    def hurry(self) -> None:
        """Stop now, without waiting for the tasks that run."""
        if not self.running:
            self._stop()
            self._log.warn("told again to stop: what runs is killed")
            self._kill_all("told again to stop")

    def zygote_loaded(self, is_reload: bool) -> None:
        """Have the workers forked that are missing; after a reload, all."""
        if is_reload:
            for worker in list(self._workers.values()):
                self._wear_out(worker, Cause.RELOAD)
                if worker.is_retired:
                    worker.retire(self._zygotes.credentials)  # they may be others than it knows
        self._fill()

    def zygote_gone(self, zygote: Zygote, is_current: bool) -> None:
        """Become the parent of a dead zygote's workers, which serve on."""
        self._requested = {n: z for n, z in self._requested.items() if z is not zygote}
        for worker in list(self._workers.values()):  # one that is dead is reaped at once
            if worker.zygote is zygote:
                worker.await_death()
        if self._stopped is not None:
            self._check_stopped()
        else:
            self._strays.reap()  # what the tasks of orphaned workers leave behind
            self._fill()

    def _pids(self) -> set[int]:
        return {*self._workers, *(zygote.pid for zygote in self._zygotes.all())}

    # The workers.

    def worker_forked(self, zygote: Zygote, number: int, pid: int, fd: int) -> None:
        """Take in a worker that a zygote has forked."""
        self._requested.pop(number, None)
        worker = Worker(self, zygote, number, pid)
        self._workers[pid] = worker
        self._adopt(self._reactor, fd, worker)
        os.close(fd)
        if zygote not in self._zygotes.all():  # these were its last words
            worker.await_death()
        if self._stopped is not None:
            worker.stop()
        elif not self._zygotes.is_latest(zygote):
            self._wear_out(worker, Cause.RELOAD)
            self._fill()

    def worker_not_forked(self, number: int, reason: str) -> None:
        """Try again later what the kernel refused."""
        self._requested.pop(number, None)
        delay = self._births.died(0.0)
        text = "worker {worker} cannot be forked: {reason}; next try in {delay:g} s"
        self._log.error(text, worker=number, reason=reason, delay=delay)
        self._reactor.callLater(delay, self._fill)

    def worker_ready(self, worker: Worker) -> None:
        """Have a worker that accepts take the place of one that is to go."""
        worker.ready_at = self.clock()
        if worker.is_retired:  # nothing is to be given to it
            return
        self.dispatcher.join(worker, self.clock())
        if self._stopped is not None:  # it may be the one that is free for what waits
            return
        self._notifier.ready()
        for worn in self._worn:
            if worn.cause is Cause.RELOAD and worker.cause is None:
                self.dispatcher.close(worn)  # it may not know what newer code hands over
        self._retire_worn()
        self._house()
        if not self._has_been_whole:
            ready = sum(w.serves for w in self._workers.values())
            if ready == self._settings.procs:
                self._has_been_whole = True
                self._log.info(
                    "{procs} workers serve {address} after {seconds:.2f} s",
                    procs=ready,
                    address=self._ports.addresses,
                    seconds=self.clock() - self._started_at,
                )

    def worker_worn(self, worker: Worker, cause: Cause) -> None:
        """Have a worker replaced that asks for it."""
        if self._stopped is None:
            self._wear_out(worker, cause)
            if cause is Cause.TIME_LIMIT:
                self.dispatcher.close(worker)  # it has no thread for what it would be given
            self._fill()

    def _wear_out(self, worker: Worker, cause: Cause) -> None:
        """Count no longer on a worker; it retires when its successor accepts."""
        if worker.cause is None and not worker.is_gone:
            worker.cause = cause
            self._worn.append(worker)
            self._slot.count_restart(cause)

    def _retire_worn(self) -> None:
        """Let those of the worn go that do not accept yet, or are more than are needed."""
        present = [w for w in self._workers.values() if not (w.is_gone or w.is_retired)]
        spare = sum(w.ready_at is not None for w in present) - self._settings.procs
        worn, self._worn = self._worn, deque()
        for worker in worn:
            if worker.ready_at is not None and not worker.is_gone and spare <= 0:
                self._worn.append(worker)
            elif not worker.is_gone:
                spare -= worker.ready_at is not None
                self.dispatcher.close(worker)
                worker.retire(self._zygotes.credentials)

    def worker_leaving(self, worker: Worker) -> None:
        """Let a worker go that has nothing left to do, unless it may be needed for what waits."""
        self._leaving.append(worker)
        self._let_go()

    def _let_go(self) -> None:
        # While all stop, nobody will come after those who leave.
        if self._stopped is not None and self.dispatcher.waiting:
            return
        while self._leaving:
            worker = self._leaving.pop()
            self.dispatcher.close(worker)
            worker.let_go()

    def worker_gone(self, worker: Worker) -> None:
        """Replace a worker whose link has ended: it is dead, or as good as dead."""
        slot = self._slots[worker.number]
        # One that its task has killed did not die of its start, however young.
        lived = YOUNG_SECONDS if slot.is_working else worker.lived_seconds(self.clock())
        worker.ran = slot.task if slot.is_working else ""
        slot.close()
        worker.ran_for_others = self.dispatcher.lost(worker, self.clock())
        # A process may stay behind its link, so it is killed if it has not gone soon.
        self._reactor.callLater(_KILL_AFTER_LINK_SECONDS, self.kill, worker)
        if self._stopped is not None:
            return
        if worker.cause is not None:
            self._fill()  # its successor was asked for already
            return
        self._slot.count_restart(Cause.HUNG if worker.is_hung else Cause.DIED)
        delay = self._births.died(lived)
        if delay:
            self._log.error(
                "worker {worker} died within {young:g} s of its start; next try in {delay:g} s",
                worker=worker.number,
                young=YOUNG_SECONDS,
                delay=delay,
            )
            self._reactor.callLater(delay, self._fill)
        else:
            self._fill()

    def worker_exited(self, pid: int, status: int) -> None:
        """Take note that a worker has been reaped."""
        worker = self._workers.pop(pid, None)
        if worker is None:
            return
        if not worker.is_gone:
            worker.is_gone = True
            self.worker_gone(worker)
        worker.bury(status, self._log, self._ledger, is_worth_a_word=self._stopped is None)
        used = {worker.zygote for worker in self._workers.values()}
        self._zygotes.dismiss_unused(used.union(self._requested.values()))
        self._check_stopped()

    def _fill(self) -> None:
        """Have as many workers forked as are missing, each for the lowest slot that is free."""
        # Without a zygote the next one forks all that is missing, when it is loaded.
        zygote = self._zygotes.loaded
        if self._stopped is not None or zygote is None:
            return
        present = [worker for worker in self._workers.values() if not worker.is_gone]
        lasting = sum(worker.cause is None for worker in present)
        missing = self._settings.procs - lasting - len(self._requested)
        taken = {worker.number for worker in present}.union(self._requested)
        free = [n for n in range(1, self._scoreboard.slots + 1) if n not in taken]
        if missing > len(free):
            self._log.warn(
                "{missing} workers cannot be replaced before old ones are done with their tasks",
                missing=missing - len(free),
            )
        numbers = set(free[: max(0, missing)])
        if numbers:
            self._requested.update(dict.fromkeys(numbers, zygote))
            zygote.fork(numbers)

    # What is seen to now and then.

    def _watch(self) -> None:
        now = self.clock()
        if self._stopped is None or self._workers:
            self._reactor.callLater(_WATCH_SECONDS, self._watch)
        if self.dispatcher.waiting:
            self.dispatcher.sweep(now)
        counts = self.dispatcher.counts
        self._slot.show_queue(
            self.dispatcher.oldest(), counts.handed_over, counts.refused, counts.expired
        )
        asks = now >= self._next_beat
        roused = self._notify(now) if asks else ()
        if asks:
            self._next_beat = now + _BEAT_SECONDS
        for worker in list(self._workers.values()):
            slot = self._slots[worker.number]
            # The others have nothing to see to, and are left asleep.
            if asks and (self._settings.max_rss_bytes or slot.is_in_use or worker in roused):
                worker.ask_for_beat(now, slot.beat)
            silent_since = worker.silent_since(slot.beat)
            if not (worker.is_gone or worker.is_hung) and is_hung(now, silent_since, slot.due):
                self._end_hung(worker, slot.task)
        self._removals.have_arrived()
        self._house()
        self._let_go()

    def _notify(self, now: float) -> Collection[Worker]:
        there = [w for w in self._workers.values() if not (w.is_gone or w.is_retired)]
        return self._notifier.look(
            now,
            {w: self._slots[w.number].beat for w in there if w.ready_at is not None},
            self._scoreboard.figures,
            self._zygotes.is_loading or any(w.cause is Cause.RELOAD for w in there),
            self._slot.reload_failure,
        )

    def _end_hung(self, worker: Worker, task: str) -> None:
        worker.is_hung = True
        why = "worker {worker} does not answer, and {function} is past its time limit: it is killed"
        self._log.error(why, worker=worker.number, pid=worker.pid, function=task)
        self._signal(worker, signal.SIGUSR2)  # it prints where it stands
        self._reactor.callLater(_KILL_AFTER_STACK_SECONDS, self.kill, worker)

    def connection_moved(self, fd: int, luggage: bytes) -> None:
        """Take a connection from a worker that retires, for another one."""
        self._removals.take(fd, luggage)
        self._house()

    def _house(self) -> None:
        serving = [worker for worker in self._workers.values() if worker.serves]
        self._removals.house(serving, self._scoreboard.connections)

    # The end.

    def kill(self, worker: Worker) -> None:
        """End a worker's process now, if it has not been reaped."""
        self._signal(worker, signal.SIGKILL)

    def _signal(self, worker: Worker, number: signal.Signals) -> None:
        if worker.pid not in self._workers:
            return
        if worker.is_orphan:
            try:
                os.kill(worker.pid, number)
            except ProcessLookupError:  # somebody else has reaped it
                self.worker_exited(worker.pid, 0)
        else:
            worker.zygote.kill(worker.pid, number)

    def _kill_all(self, why: str) -> None:
        for worker in list(self._workers.values()):
            self._log.warn("worker {worker} is killed: {reason}", worker=worker.number, reason=why)
            worker.is_killed = True
            self.kill(worker)
        if self._workers:
            self._reactor.callLater(_KILL_AFTER_GRACE_SECONDS, self._kill_zygotes)
        else:
            self._kill_zygotes()

    def _kill_zygotes(self) -> None:
        for zygote in self._zygotes.all():
            zygote.end()

    def _check_stopped(self) -> None:
        """When the last worker is gone the zygotes may go; when those are gone all is done."""
        if self._stopped is None or self._workers:
            return
        zygotes = self._zygotes.all()
        for zygote in zygotes:
            zygote.dismiss()
        if not zygotes and not self._stopped.called:
            self._stopped.callback(None)
