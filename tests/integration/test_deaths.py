"""What happens when a process of the daemon dies, and when the daemon is stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.integration.case import DaemonTestCase, lines_of, number_of_fds
from tests.integration.daemon import (
    Connection,
    Daemon,
    Process,
    children_of,
    wait_until,
)

REPLACED_SECONDS = 5.0
"""How soon a worker must be replaced; it takes milliseconds where nothing else runs."""

GONE_SECONDS = 8.0
"""How soon nothing may be left of a daemon that has a second of grace."""

OLD_SECONDS = 1.1
"""A worker that is older than this did not die of its start, and is replaced at once."""

FORGOTTEN_FDS = 3


class DeathsTestCase(DaemonTestCase):
    """Base of tests in which processes end."""

    def wait_until_replaced(
        self, daemon: Daemon, before: dict[int, int], number: int
    ) -> dict[int, int]:
        """Wait until a worker has a successor; all others must be the same."""
        after = wait_until(
            lambda: self.workers_if_without(daemon, before[number]),
            REPLACED_SECONDS,
            what="another worker",
        )
        others = {n: pid for n, pid in before.items() if n != number}
        self.assertEqual({n: pid for n, pid in after.items() if n != number}, others)
        return after

    def workers_if_without(self, daemon: Daemon, pid: int) -> dict[int, int]:
        workers = daemon.wait_until_whole()
        return {} if pid in workers.values() else workers


class WorkerDeathTests(DeathsTestCase):
    def test_killed_worker(self) -> None:
        """A killed worker's caller gets EOF, all others are served, and it is replaced."""
        daemon = self.start()
        before = daemon.workers()
        connections = self.connect_to_each(daemon)
        path = self.begin(daemon, connections[1], "hold", id=1)
        daemon.kill(before[1])
        self.assertTrue(connections[1].is_hung_up())
        self.assertEqual(connections[2].ask("add", [1, 2]), 3)
        self.wait_until_replaced(daemon, before, 1)
        self.assertEqual(daemon.restarts(), {"died": 1})
        self.assertFalse(os.path.exists(path + ".ended"))
        self.wait_for_log(daemon, f"worker 1 (pid {before[1]}) was killed by SIGKILL")
        for connection in self.connect_to_each(daemon).values():
            self.assertEqual(connection.ask("add", [1, 2]), 3)

    def test_killed_worker_is_reaped(self) -> None:
        """Nothing of a killed worker is left, not even a zombie."""
        daemon = self.start()
        before = daemon.workers()
        daemon.kill(before[2])
        self.wait_until_replaced(daemon, before, 2)
        wait_until(lambda: Process.read(before[2]) is None, what="the end of the process")

    def test_young_worker(self) -> None:
        """A worker that is killed as soon as it serves is replaced, if a little later."""
        daemon = self.start()
        before = daemon.workers()
        daemon.kill(before[1])
        self.wait_until_replaced(daemon, before, 1)

    def test_all_workers(self) -> None:
        """When all workers are killed at once, the pool is soon whole again."""
        daemon = self.start(procs=8, age=OLD_SECONDS)
        before = daemon.workers()
        for pid in before.values():
            daemon.kill(pid)
        daemon.wait_until_new(before)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.restarts(), {"died": 8})

    def test_tasks_that_end_the_worker(self) -> None:
        """The caller of a task that kills its worker gets EOF at once; the pool is made whole."""
        daemon = self.start()
        # Their workers are young, but it is the tasks that they die of.
        for function, args in (
            ("die", [0]),
            ("die", [7]),
            ("die_on_reactor", [0]),
            ("segfault", []),
        ):
            before = daemon.workers()
            caller = self.connect(daemon)
            number = caller.ask("taskd.status")["answered_by"]
            caller.request(function, args, id=1)
            self.assertTrue(caller.is_hung_up())
            self.wait_until_replaced(daemon, before, number)
        self.assertEqual(daemon.restarts(), {"died": 4})
        self.wait_for_log(daemon, "exited with status 7")
        self.wait_for_log(daemon, "SIGSEGV")

    def test_segfault_is_explained(self) -> None:
        """The log shows on which line of which task a worker has crashed."""
        daemon = self.start()
        self.assertTrue(self.asks_and_is_hung_up_on(daemon, "segfault"))
        wait_until(lambda: "in segfault" in daemon.log, what="the line in the log")

    def asks_and_is_hung_up_on(self, daemon: Daemon, function: str) -> bool:
        caller = self.connect(daemon)
        caller.request(function)
        return caller.is_hung_up()

    def test_no_storm(self) -> None:
        """Workers that die at their start are started ever more slowly."""
        daemon = Daemon(
            "--no-preload",
            procs=1,
            tasks="tasks.py",
            files={
                "tasks.py": (
                    "import os\nfrom taskd import task\n@task\ndef nothing(): pass\n"
                    "if os.path.exists('broken'):\n    raise RuntimeError('it is broken now')\n"
                )
            },
        )
        self.addCleanup(daemon.stop)
        daemon.start()
        broken = daemon.directory / "broken"
        broken.touch()
        daemon.kill(daemon.workers()[1])
        wait_until(
            lambda: "worker 1 died within 1 s of its start; next try in 0.8 s" in daemon.log,
            what="the fourth death",
        )
        self.wait_for_log(daemon, "it is broken now")
        self.assertLess(daemon.log.count("of its start; next try"), 6)
        broken.unlink()
        daemon.wait_until_whole()

    def test_child_of_dead_worker(self) -> None:
        """A process that a task has started, and that outlives the worker, is no zombie later."""
        daemon = self.start(procs=1)
        child = daemon.ask("leave_child", [1.0])
        worker = daemon.workers()[1]
        process = Process.read(child)
        assert process is not None
        self.assertEqual(process.parent, worker)
        daemon.kill(worker)
        wait_until(lambda: Process.read(child) is None, what="the end of the child")

    def test_no_leak(self) -> None:
        """Twenty dead workers leave no file descriptor open, here or there."""
        daemon = self.start(procs=20, age=OLD_SECONDS)
        pids = (daemon.pid, daemon.zygote)
        before = [number_of_fds(pid) for pid in pids]
        workers = daemon.workers()
        for number in range(1, 21):
            daemon.kill(workers[number])
            workers = self.wait_until_replaced(daemon, workers, number)
        for pid, count in zip(pids, before, strict=True):
            wait_until(
                lambda pid=pid, count=count: number_of_fds(pid) <= count + FORGOTTEN_FDS,
                what=f"at most {count + FORGOTTEN_FDS} open files",
            )


class HandedOverTests(DeathsTestCase):
    """Workers that die while a task is with two of them."""

    def hold_at_first(self, daemon: Daemon) -> tuple[dict[int, Connection], str]:
        """Have the first of two workers hold a task, so that it hands over what comes."""
        callers = self.connect_to_each(daemon)
        return callers, self.begin(daemon, callers[1], "hold", id="here")

    def test_killed_runner(self) -> None:
        """The caller of a task whose worker is killed is told; its own worker goes on."""
        daemon = self.start()
        before = daemon.workers()
        callers, here = self.hold_at_first(daemon)
        there = self.begin(daemon, callers[1], "hold", id="there")
        daemon.kill(before[2])
        reply = callers[1].reply()
        self.assertEqual(reply["id"], "there")
        error = self.assert_error(reply, "worker-lost")
        self.assertTrue(error["retryable"])
        self.assertTrue(callers[2].is_hung_up())
        self.assertEqual(callers[1].ask("taskd.ping", id=1), {"id": 1, "result": "pong"})
        self.wait_until_replaced(daemon, before, 2)
        self.assertEqual(callers[1].ask("add", [1, 2], id=1), {"id": 1, "result": 3})
        Path(here).touch()
        self.assertEqual(callers[1].reply(), {"id": "here", "result": "released"})
        self.assertFalse(self.has_ended(there))
        self.assertEqual(daemon.restarts(), {"died": 1})

    def test_tasks_that_end_their_worker(self) -> None:
        """The caller of a task that kills another worker is told, and keeps its connection."""
        daemon = self.start()
        callers, here = self.hold_at_first(daemon)
        for count, (function, args) in enumerate((("die", [0]), ("die", [7]), ("segfault", [])), 1):
            self.assert_error(callers[1].ask(function, args, id=count), "worker-lost")
            wait_until(
                lambda count=count: daemon.restarts() == {"died": count}, what="the count of deaths"
            )
            daemon.wait_until_whole()
        Path(here).touch()
        self.assertEqual(callers[1].reply(), {"id": "here", "result": "released"})
        self.wait_for_log(daemon, "exited with status 7")
        self.wait_for_log(daemon, "SIGSEGV")

    def test_killed_origin_of_waiting(self) -> None:
        """When their caller's worker is killed, tasks that wait are run once, if at all wanted."""
        daemon = self.start()
        before = daemon.workers()
        callers, _ = self.hold_at_first(daemon)
        other = self.begin(daemon, callers[2], "hold", id="other")
        notes = self.path(daemon)
        for number in range(6):
            callers[1].request(
                "record", [notes, str(number)], id=number, cancel_on_disconnect=number % 2 == 0
            )
        self.wait_for_waiting(daemon, 6)
        daemon.kill(before[1])
        self.assertTrue(callers[1].is_hung_up())
        # The successor runs them, since the other worker still holds.
        wait_until(lambda: len(lines_of(notes)) == 3, what="the tasks that are wanted")
        self.wait_for_waiting(daemon, 0)
        Path(other).touch()
        self.assertEqual(callers[2].reply(), {"id": "other", "result": "released"})
        self.assertEqual(callers[2].ask("add", [1, 2]), 3)
        self.assertEqual(lines_of(notes), ["1", "3", "5"])

    def test_killed_origin_of_running(self) -> None:
        """When its caller's worker is killed, a task that runs elsewhere goes on, if wanted."""
        for is_bound in (False, True):
            daemon = self.start()
            before = daemon.workers()
            callers, _ = self.hold_at_first(daemon)
            there = self.begin(
                daemon, callers[1], "hold", id="there", cancel_on_disconnect=is_bound
            )
            daemon.kill(before[1])
            self.assertTrue(callers[1].is_hung_up())
            if is_bound:
                wait_until(
                    lambda: daemon.restarts() == {"died": 1, "time_limit": 1},  # noqa: B023
                    what="the end of both workers",
                )
                daemon.wait_until_new(before)
                self.wait_for_end_of(before[2])
                self.assertFalse(self.has_ended(there))
            else:
                self.wait_until_replaced(daemon, before, 1)
                Path(there).touch()
                wait_until(lambda: self.has_ended(there), what="the task's end")  # noqa: B023
                self.assertEqual(daemon.settled_restarts(), {"died": 1})
            self.assertEqual(callers[2].ask("add", [1, 2]), 3)
            for caller in callers.values():
                caller.close()
            daemon.stop()

    def test_killed_zygote(self) -> None:
        """Without the zygote tasks are handed over as before."""
        daemon = self.start()
        before, zygote = daemon.workers(), daemon.zygote
        callers, here = self.hold_at_first(daemon)
        there = self.begin(daemon, callers[1], "hold", id="there")
        daemon.kill(zygote)
        self.wait_for_end_of(zygote)
        callers[1].request("add", [1, 2], id="waits")
        self.wait_for_waiting(daemon, 1)
        Path(there).touch()
        replies = callers[1].replies_by_id(2)
        self.assertEqual(replies["there"]["result"], "released")
        self.assertEqual(replies["waits"]["result"], 3)
        Path(here).touch()
        self.assertEqual(callers[1].reply(), {"id": "here", "result": "released"})
        self.assertEqual(daemon.wait_until_settled(), before)

    def test_killed_supervisor(self) -> None:
        """When the supervisor is killed every caller of a task on its way is told."""
        daemon = self.start("--grace", "1")
        callers, here = self.hold_at_first(daemon)
        self.begin(daemon, callers[1], "hold", id="there")
        for number in range(20):
            callers[1 + number % 2].request("add", [number, 1], id=number)
        self.wait_for_waiting(daemon, 20)
        daemon.kill(daemon.pid)
        # What is not here is lost with the supervisor; what runs here has its grace.
        replies = callers[1].replies_by_id(11)
        self.assertEqual(set(replies), {"there", *range(0, 20, 2)})
        for reply in (*replies.values(), *callers[2].replies_by_id(10).values()):
            self.assert_error(reply, "worker-lost")
        Path(here).touch()
        rest = callers[1].rest()
        self.assertIn(b'{"id":"here",', rest)
        self.assert_goodbye(callers[2])
        daemon.wait_until_gone(GONE_SECONDS)
        self.assert_port_is_free(daemon)


class ZygoteDeathTests(DeathsTestCase):
    def test_killed_zygote(self) -> None:
        """Without their zygote the same workers serve on, and a new one forks the next."""
        daemon = self.start()
        zygote = daemon.zygote
        before = daemon.workers()
        connections = self.connect_to_each(daemon)
        path = self.begin(daemon, connections[1], "hold", id=1)
        daemon.kill(zygote)
        self.assertEqual(connections[2].ask("add", [1, 2]), 3)
        successor = wait_until(
            lambda: self.other_zygote(daemon, zygote), REPLACED_SECONDS, what="another zygote"
        )
        self.assertEqual(daemon.workers(), before)
        Path(path).touch()
        self.assertEqual(connections[1].reply(), {"id": 1, "result": "released"})
        daemon.kill(before[1])
        after = self.wait_until_replaced(daemon, before, 1)
        process = Process.read(after[1])
        assert process is not None
        self.assertEqual(process.parent, successor)
        for pid in (zygote, before[1]):
            wait_until(lambda pid=pid: Process.read(pid) is None, what="the end of a process")
        self.wait_for_log(daemon, f"the zygote (pid {zygote}) was killed by SIGKILL")

    def other_zygote(self, daemon: Daemon, before: int) -> int:
        zygote = daemon.zygote
        return 0 if zygote == before else zygote

    def test_zygote_and_worker(self) -> None:
        """A worker that dies together with its zygote is replaced by the next zygote."""
        daemon = self.start()
        zygote, before = daemon.zygote, daemon.workers()
        daemon.kill(zygote)
        daemon.kill(before[2])
        self.wait_until_replaced(daemon, before, 2)
        wait_until(lambda: Process.read(before[2]) is None, what="the end of the process")

    def test_zygote_and_all_workers(self) -> None:
        """When only the supervisor is left it makes everything anew."""
        daemon = self.start(age=OLD_SECONDS)
        zygote, before = daemon.zygote, daemon.workers()
        for pid in (zygote, *before.values()):
            daemon.kill(pid)
        daemon.wait_until_new(before)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_zygote_that_hung(self) -> None:
        """Workers that died unreaped, because their zygote hung, are replaced when it is killed."""
        daemon = self.start()
        zygote, before = daemon.zygote, daemon.workers()
        daemon.signal(signal.SIGSTOP, zygote)
        for pid in before.values():
            daemon.kill(pid)
            wait_until(lambda pid=pid: self.is_zombie(pid), what="a zombie")
        daemon.kill(zygote)
        daemon.wait_until_new(before)
        for pid in before.values():
            wait_until(lambda pid=pid: Process.read(pid) is None, what="the end of a process")

    def is_zombie(self, pid: int) -> bool:
        process = Process.read(pid)
        return process is not None and process.is_zombie

    def test_stop_after_it(self) -> None:
        """A daemon whose first zygote was killed stops in order, the old workers included."""
        daemon = self.start()
        zygote = daemon.zygote
        daemon.kill(zygote)
        wait_until(lambda: self.other_zygote(daemon, zygote), what="another zygote")
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone(GONE_SECONDS)
        self.assertNotIn("is killed", daemon.log)


class SupervisorDeathTests(DeathsTestCase):
    def test_killed_supervisor(self) -> None:
        """When the supervisor is killed every other process ends, and the port is free again."""
        daemon = self.start("--grace", "1", procs=4)
        idle = self.connect(daemon)
        self.assertEqual(idle.ask("add", [1, 2]), 3)
        daemon.kill(daemon.pid)
        self.assert_goodbye(idle)
        daemon.wait_until_gone(GONE_SECONDS)
        self.assert_port_is_free(daemon)

    def test_killed_supervisor_of_busy_workers(self) -> None:
        """A task that does not end holds nobody up beyond the grace."""
        daemon = self.start("--grace", "1")
        connections = self.connect_to_each(daemon)
        self.begin(daemon, connections[1], "hold", id=1)
        connections[2].request("sleep", [30], id=2)
        daemon.kill(daemon.pid)
        daemon.wait_until_gone(GONE_SECONDS)
        self.assert_port_is_free(daemon)

    def test_killed_supervisor_while_a_task_ends(self) -> None:
        """A task that ends within the grace is still answered."""
        daemon = self.start("--grace", "10")
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id=1)
        daemon.kill(daemon.pid)
        daemon.wait_for_exit()
        wait_until(lambda: len(daemon.processes()) == 2, what="the end of all that is idle")
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": 1, "result": "released"})
        caller.close()
        daemon.wait_until_gone(GONE_SECONDS)

    def test_killed_supervisor_of_task_that_prints(self) -> None:
        """A task that prints, to nobody, when the supervisor has died is still answered."""
        daemon = self.start("--grace", "10")
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold_and_say", id=1)
        daemon.kill(daemon.pid)
        daemon.wait_for_exit()
        wait_until(lambda: len(daemon.processes()) == 2, what="the end of all that is idle")
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": 1, "result": "said"})
        caller.close()
        daemon.wait_until_gone(GONE_SECONDS)

    def test_killed_supervisor_and_zygote(self) -> None:
        """When the supervisor and the zygote are killed together, the workers end as well."""
        daemon = self.start("--grace", "1")
        caller = self.connect(daemon)
        self.begin(daemon, caller, "hold", id=1)
        zygote = daemon.zygote
        daemon.kill(daemon.pid)
        daemon.kill(zygote)
        daemon.wait_until_gone(GONE_SECONDS)

    def test_killed_while_importing(self) -> None:
        """A supervisor that is killed while modules are imported leaves nobody behind."""
        daemon = Daemon(
            tasks="tasks.py",
            files={"tasks.py": "import time\nopen('importing', 'w').close()\ntime.sleep(30)\n"},
        )
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        wait_until((daemon.directory / "importing").exists, what="the import")
        daemon.kill(daemon.pid)
        daemon.wait_until_gone(GONE_SECONDS)


class StopTests(DeathsTestCase):
    def assert_ended_by(self, daemon: Daemon, number: signal.Signals) -> None:
        # twistd ends itself by the signal that it got, once all is done.
        self.assertIn(daemon.wait_for_exit(), (0, -number))
        self.assertEqual(daemon.processes(), [])
        self.assertEqual(daemon.errors, "")
        self.assertNotIn("Traceback", daemon.log)
        self.assertNotIn("is killed", daemon.log)
        self.assert_port_is_free(daemon)

    def test_signals(self) -> None:
        """SIGTERM and SIGINT end an idle daemon, which says goodbye on its idle connections."""
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start(procs=4)
            callers = self.connect_to_each(daemon)
            self.assertEqual(callers[1].ask("add", [1, 2]), 3)
            daemon.signal(number)
            for caller in callers.values():
                self.assert_goodbye(caller)
                caller.close()
            self.assert_ended_by(daemon, number)

    def test_ctrl_c(self) -> None:
        """Ctrl-C, which the terminal sends to the whole process group, is one orderly stop."""
        daemon = self.start()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id=1)
        os.killpg(daemon.pid, signal.SIGINT)
        wait_until(lambda: "Received SIGINT" in daemon.log, what="the stop")
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": 1, "result": "released"})
        caller.close()
        self.assert_ended_by(daemon, signal.SIGINT)

    def test_stop_is_quick(self) -> None:
        """A stop is not held up by callers that have been served, however they went."""
        daemon = self.start()
        gone, half_closed, idle = (self.connect(daemon) for _ in range(3))
        for caller in (gone, half_closed, idle):
            caller.request("add", [1, 2])
        half_closed.half_close()
        self.assertEqual(half_closed.rest(), b"3\n")
        self.assertEqual((gone.reply(), idle.reply()), (3, 3))
        gone.close()
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        self.assert_goodbye(idle)
        idle.close()
        daemon.wait_until_gone()
        self.assertLess(time.monotonic() - began, 1.0)

    def test_running_tasks_are_answered(self) -> None:
        """Tasks that run when the stop comes end, are answered, and then the connection closes."""
        daemon = self.start()
        blocking, reactive = self.connect(daemon), self.connect(daemon)
        paths = [
            self.begin(daemon, blocking, "hold", id=1),
            self.begin(daemon, reactive, "hold_on_reactor", id=1),
        ]
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: "Received SIGTERM" in daemon.log, what="the stop")
        self.assertTrue(daemon.is_running)
        reply = self.ask_until_refused(blocking)
        self.assertEqual(reply["error"]["code"], "shutting-down")
        self.assertTrue(reply["error"]["retryable"])
        for path, caller in zip(paths, (blocking, reactive), strict=True):
            Path(path).touch()
            self.assertEqual(caller.reply(), {"id": 1, "result": "released"})
            self.assert_goodbye(caller)
            caller.close()
        self.assert_ended_by(daemon, signal.SIGTERM)

    def ask_until_refused(self, connection: Connection) -> Any:
        """Ask until the worker has heard of the stop."""
        return wait_until(
            lambda: self.if_refused(connection.ask("at_once", [1], id="late")), what="a refusal"
        )

    def if_refused(self, reply: dict[str, Any]) -> dict[str, Any] | None:
        return reply if "error" in reply else None

    def test_no_new_connections(self) -> None:
        """While the last tasks run, nobody listens on the port any more."""
        daemon = self.start()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id=1)
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: self.is_refused(daemon), 3.0, what="a refused connection")
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": 1, "result": "released"})
        caller.close()
        self.assert_ended_by(daemon, signal.SIGTERM)

    def is_refused(self, daemon: Daemon) -> bool:
        try:
            daemon.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    def test_grace(self) -> None:
        """A task that goes on beyond the grace is answered for, and its worker ended."""
        daemon = self.start("--grace", "0.5")
        blocking, reactive = self.connect(daemon), self.connect(daemon)
        self.begin(daemon, blocking, "hold", id=1)
        note = self.begin(daemon, reactive, "tell_of_cancel", id=2)
        daemon.signal(signal.SIGTERM)
        for caller in (blocking, reactive):
            reply = caller.reply()
            self.assertEqual(reply["error"]["code"], "worker-lost")
            self.assertTrue(reply["error"]["retryable"])
            self.assert_goodbye(caller)
        daemon.wait_until_gone(GONE_SECONDS)
        self.assertIn(daemon.wait_for_exit(), (0, -signal.SIGTERM))
        self.assertTrue(os.path.exists(note))

    def test_no_grace(self) -> None:
        """With ``--grace 0`` nothing is waited for."""
        daemon = self.start("--grace", "0")
        caller = self.connect(daemon)
        self.begin(daemon, caller, "hold", id=1)
        daemon.signal(signal.SIGTERM)
        self.assertEqual(caller.reply()["error"]["code"], "worker-lost")
        daemon.wait_until_gone(GONE_SECONDS)

    def test_stop_twice(self) -> None:
        """A second SIGTERM or SIGINT ends what runs at once, however long the grace."""
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start("--grace", "3600")
            connections = self.connect_to_each(daemon)
            path = self.begin(daemon, connections[1], "hold", id=1)
            self.begin(daemon, connections[2], "hold_on_reactor", id=1)
            daemon.signal(signal.SIGTERM)
            self.wait_for_log(daemon, "Received SIGTERM", "they get 3600 s")
            daemon.signal(number)
            for caller in connections.values():
                self.assertTrue(caller.is_hung_up())
            daemon.wait_until_gone()
            self.assertFalse(self.has_ended(path))
            self.assertIn(daemon.wait_for_exit(), (0, -signal.SIGTERM))
            self.wait_for_log(daemon, "told again to stop")
            self.assert_port_is_free(daemon)

    def test_stop_at_the_start(self) -> None:
        """A daemon that is stopped while its modules are imported leaves nobody behind."""
        daemon = Daemon(
            tasks="tasks.py",
            files={"tasks.py": "import time\nopen('importing', 'w').close()\ntime.sleep(30)\n"},
        )
        self.addCleanup(daemon.stop)
        daemon.start_without_waiting()
        wait_until((daemon.directory / "importing").exists, what="the import")
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone(GONE_SECONDS)

    def test_stop_while_a_worker_is_replaced(self) -> None:
        """A stop right after a worker's death leaves nobody behind."""
        daemon = self.start(age=OLD_SECONDS)
        daemon.kill(daemon.workers()[1])
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone(GONE_SECONDS)

    def test_no_child_is_left_unreaped(self) -> None:
        """The supervisor has no child but the zygote, and the zygote none but the workers."""
        daemon = self.start()
        self.assertEqual([child.pid for child in children_of(daemon.pid)], [daemon.zygote])
        self.assertEqual(
            {child.pid for child in children_of(daemon.zygote)}, set(daemon.workers().values())
        )
