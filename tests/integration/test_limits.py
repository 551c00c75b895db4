"""What becomes of a task that is not wanted any more, and of the worker that cannot stop it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import clientFromString
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from taskd.client import TaskClient, TaskClientFactory
from taskd.errors import ConnectionLost, TimeLimitExceeded
from tests.integration.case import DaemonTestCase, lines_of
from tests.integration.daemon import Connection, Daemon, shared_daemon, wait_until
from tests.integration.load import Load

LATER_SECONDS = 20.0


class LimitsTestCase(DaemonTestCase):
    """Base of tests in which a worker is replaced because its thread cannot be stopped."""

    def assert_replaced(self, daemon: Daemon, before: dict[int, int], **causes: int) -> None:
        """As many workers as *causes* tells are gone, and others have taken their place."""
        wait_until(lambda: daemon.restarts() == causes, what=f"restarts: {causes}")
        count = sum(causes.values())
        gone = wait_until(
            lambda: self.gone_if(daemon, before, count), what=f"{count} other workers"
        )
        self.wait_for_end_of(*gone)

    def gone_if(self, daemon: Daemon, before: dict[int, int], count: int) -> set[int]:
        gone = set(before.values()) - set(daemon.wait_until_settled().values())
        return gone if len(gone) == count else set()

    def assert_all_serve(self, *connections: Connection) -> None:
        for connection in connections:
            self.assertEqual(connection.ask("add", [1, 2], id="serves")["result"], 3)

    def hold_both(self, daemon: Daemon) -> tuple[dict[int, Connection], dict[int, str]]:
        """Have each of two workers hold a task of its own caller."""
        callers = self.connect_to_each(daemon)
        paths = {
            number: self.begin(daemon, caller, "hold", id="hold")
            for number, caller in callers.items()
        }
        return callers, paths


class TimeLimitTests(LimitsTestCase):
    def test_own_limit(self) -> None:
        """A blocking task fails at its own limit, and its worker is replaced, unnoticed."""
        self.check("hold_limited")

    def test_callers_limit(self) -> None:
        """A blocking task fails at its caller's limit, and its worker is replaced, unnoticed."""
        self.check("hold", timeout=0.1)

    def check(self, function: str, **members: Any) -> None:
        daemon = self.start()
        before = daemon.workers()
        connections = self.connect_to_each(daemon).values()
        caller, path = self.connect(daemon), self.path(daemon)
        reply = caller.ask(function, [path], id=1, **members)
        self.assert_error(reply, "time-limit", function, "0.1 s")
        self.assert_replaced(daemon, before, time_limit=1)
        self.wait_for_log(
            daemon, f"{function} was given up and goes on", "was replaced: time-limit"
        )
        stack = daemon.log.rpartition(f"{function} was given up and goes on")[2]
        self.assertIn("sample_tasks.py", stack)
        self.assertIn("in hold", stack)
        self.assertFalse(self.has_ended(path))
        self.assert_all_serve(caller, *connections)

    def test_queue_behind_it(self) -> None:
        """What stands behind a task that is given up is all run, in order."""
        daemon = self.start(procs=1)
        before = daemon.workers()
        caller, other, notes = self.connect(daemon), self.connect(daemon), self.path(daemon)
        caller.request("hold", [self.path(daemon)], id="stuck", timeout=1)
        words = [str(number) for number in range(50)]
        for number, word in enumerate(words):
            (caller, other)[number % 2].request("record", [notes, word], id=word)
        self.assert_error(caller.reply(), "time-limit")
        replies = {**caller.replies_by_id(25), **other.replies_by_id(25)}
        self.assertEqual({reply["result"] for reply in replies.values()}, set(words))
        self.assertEqual(sorted(lines_of(notes)), sorted(words))
        self.assert_replaced(daemon, before, time_limit=1)
        self.assert_all_serve(caller, other)

    def test_task_beside_it(self) -> None:
        """A task in the other thread of a worker that is replaced comes to its end."""
        daemon = self.start("--threads", "2", procs=1)
        before = daemon.workers()
        caller = self.connect(daemon)
        beside = self.begin(daemon, caller, "hold", id="beside")
        on_reactor = self.begin(daemon, caller, "hold_on_reactor", id="on reactor")
        self.assert_error(caller.ask("hold_limited", [self.path(daemon)], id=1), "time-limit")
        wait_until(
            lambda: set(daemon.wait_until_whole().values()) != set(before.values()),
            what="another worker",
        )
        # Its connection goes on meanwhile, and its tasks run at the other worker.
        self.assertEqual(caller.ask("add", [1, 2], id=2), {"id": 2, "result": 3})
        for path, name in ((beside, "beside"), (on_reactor, "on reactor")):
            self.assertFalse(self.has_ended(path))
            Path(path).touch()
            self.assertEqual(caller.reply(), {"id": name, "result": "released"})
        self.assert_replaced(daemon, before, time_limit=1)
        self.assert_all_serve(caller)

    def test_load(self) -> None:
        """Other callers lose nothing while one worker after the other is replaced."""
        daemon = self.start(procs=3)
        with Load(daemon) as load:
            for count in range(1, 6):
                caller = self.connect(daemon)
                reply = caller.ask("hold_limited", [self.path(daemon)], id=1)
                self.assert_error(reply, "time-limit")
                wait_until(
                    lambda count=count: daemon.restarts() == {"time_limit": count},
                    what="a replaced worker",
                )
                load.wait_for_more()
            daemon.wait_until_settled()
            load.wait_for_more()
        self.assertEqual(load.failures, [])

    def test_handed_over(self) -> None:
        """A task that another worker runs comes to its limit there, and that one is replaced."""
        daemon = self.start()
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        path = self.begin(daemon, callers[1], "hold", id="hold")
        reply = callers[1].ask("hold_limited", [self.path(daemon)], id=1)
        self.assert_error(reply, "time-limit", "hold_limited")
        self.assert_replaced(daemon, before, time_limit=1)
        self.assertIn(before[1], daemon.workers().values())
        self.assert_all_serve(callers[1], callers[2])
        Path(path).touch()
        self.assertEqual(callers[1].reply(), {"id": "hold", "result": "released"})


class CancelTests(LimitsTestCase):
    def cancel(self, caller: Connection, given: Any) -> None:
        """Cancel what the caller has in flight under an id, and see it end."""
        caller.request("taskd.cancel", {"id": given}, id="cancel")
        replies = caller.replies_by_id(2)
        self.assertEqual(replies["cancel"]["result"], True)
        self.assert_error(replies[given], "cancelled")

    def test_running_here(self) -> None:
        """A blocking task that is cancelled fails at once, and its worker is replaced."""
        daemon = self.start()
        before = daemon.workers()
        connections = self.connect_to_each(daemon)
        path = self.begin(daemon, connections[1], "hold", id="hold")
        self.cancel(connections[1], "hold")
        self.assert_replaced(daemon, before, time_limit=1)
        self.assertIn(before[2], daemon.workers().values())
        self.assertFalse(self.has_ended(path))
        self.wait_for_log(daemon, "hold was given up and goes on")
        self.assert_all_serve(*connections.values())

    def test_running_elsewhere(self) -> None:
        """A task that was handed over is cancelled where it runs; the caller's worker goes on."""
        daemon = self.start()
        before = daemon.workers()
        connections = self.connect_to_each(daemon)
        here = self.begin(daemon, connections[1], "hold", id="here")
        there = self.begin(daemon, connections[1], "hold", id="there")
        self.cancel(connections[1], "there")
        self.assert_replaced(daemon, before, time_limit=1)
        self.assertIn(before[1], daemon.workers().values())
        self.assertFalse(self.has_ended(there))
        self.assert_all_serve(*connections.values())
        Path(here).touch()
        self.assertEqual(connections[1].reply(), {"id": "here", "result": "released"})

    def test_waiting(self) -> None:
        """A task that waits in the queue is cancelled without a trace."""
        daemon = self.start()
        before = daemon.workers()
        callers, paths = self.hold_both(daemon)
        notes = self.path(daemon)
        for number in range(3):
            callers[1].request("record", [notes, str(number)], id=number)
        self.wait_for_waiting(daemon, 3)
        self.cancel(callers[1], 1)
        self.wait_for_waiting(daemon, 2)
        for number, path in paths.items():
            Path(path).touch()
            replies = callers[number].replies_by_id(3 if number == 1 else 1)
            self.assertEqual(replies["hold"]["result"], "released")
        self.assertEqual(sorted(lines_of(notes)), ["0", "2"])
        self.assertEqual(daemon.settled_restarts(), {})
        self.assertEqual(daemon.workers(), before)

    def test_all_that_waits(self) -> None:
        """A thousand tasks that wait are cancelled, and the queue is empty."""
        daemon = self.start(procs=1)
        caller, notes = self.connect(daemon), self.path(daemon)
        path = self.begin(daemon, caller, "hold", id="hold")
        for number in range(1000):
            caller.request("record", [notes, str(number)], id=number)
        self.wait_for_waiting(daemon, 1000)
        for number in range(1000):
            caller.request("taskd.cancel", [number], id=f"cancel {number}")
        replies = caller.replies_by_id(2000)
        for number in range(1000):
            self.assert_error(replies[number], "cancelled")
        self.wait_for_waiting(daemon, 0)
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": "hold", "result": "released"})
        self.assert_all_serve(caller)
        self.assertEqual(lines_of(notes), [])


class DisconnectTests(LimitsTestCase):
    """What ``cancel_on_disconnect`` does when the caller's connection ends."""

    def test_running(self) -> None:
        """A blocking task that is to end with its caller does, and takes its worker with it."""
        daemon = self.start()
        before = daemon.workers()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", cancel_on_disconnect=True)
        caller.close()
        self.assert_replaced(daemon, before, time_limit=1)
        self.assertFalse(self.has_ended(path))
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_running_on_reactor(self) -> None:
        """A coroutine that is to end with its caller is cancelled, and costs no worker."""
        daemon = self.start()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "tell_of_cancel", cancel_on_disconnect=True)
        caller.close()
        wait_until(lambda: os.path.exists(path), what="the task's note")
        self.assertEqual(daemon.settled_restarts(), {})

    def test_running_elsewhere(self) -> None:
        """Of a gone caller's tasks the one that is to end with it does, at another worker."""
        daemon = self.start()
        before = daemon.workers()
        caller = self.connect_to_each(daemon)[1]
        here = self.begin(daemon, caller, "hold", id="here")
        there = self.begin(daemon, caller, "hold", id="there", cancel_on_disconnect=True)
        caller.close()
        self.assert_replaced(daemon, before, time_limit=1)
        self.assertIn(before[1], daemon.workers().values())
        self.assertFalse(self.has_ended(there))
        Path(here).touch()
        wait_until(lambda: self.has_ended(here), what="the task's end")

    def test_running_on(self) -> None:
        """A task whose caller has gone goes on, here and elsewhere, unless told otherwise."""
        daemon = self.start()
        before = daemon.workers()
        caller = self.connect(daemon)
        paths = [
            self.begin(daemon, caller, "hold", id=1, cancel_on_disconnect=False),
            self.begin(daemon, caller, "hold", id=2),
        ]
        caller.close()
        for path in paths:
            Path(path).touch()
            wait_until(lambda path=path: self.has_ended(path), what="the task's end")
        self.assertEqual(daemon.settled_restarts(), {})
        self.assertEqual(daemon.workers(), before)

    def test_waiting(self) -> None:
        """Of a gone caller's tasks that wait, only those are run that need no caller."""
        daemon = self.start()
        callers, paths = self.hold_both(daemon)
        gone, notes = self.connect(daemon), self.path(daemon)
        for number in range(6):
            gone.request(
                "record", [notes, str(number)], id=number, cancel_on_disconnect=number % 2 == 0
            )
        self.wait_for_waiting(daemon, 6)
        gone.close()
        self.wait_for_waiting(daemon, 3)
        for number, path in paths.items():
            Path(path).touch()
            self.assertEqual(callers[number].reply(), {"id": "hold", "result": "released"})
        wait_until(lambda: len(lines_of(notes)) >= 3, what="the tasks that were to run")
        self.assert_all_serve(*callers.values())
        self.assertEqual(sorted(lines_of(notes)), ["1", "3", "5"])
        self.assertEqual(daemon.settled_restarts(), {})


class HungTests(LimitsTestCase):
    """Tasks that hold up their whole worker."""

    def assert_killed(self, daemon: Daemon, pid: int, function: str, frame: str) -> None:
        wait_until(lambda: daemon.restarts() == {"hung": 1}, what="a killed worker")
        self.assertNotIn(pid, daemon.wait_until_settled().values())
        self.wait_for_end_of(pid)
        self.wait_for_log(
            daemon,
            f"does not answer, and {function} is past its time limit: it is killed",
            f"in {frame}",
            f"(pid {pid}) was killed by SIGKILL",
        )

    def test_lock(self) -> None:
        """A worker whose task holds Python's lock is killed after its limit; its callers see it."""
        daemon = self.start()
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        self.begin(daemon, callers[1], "hold_lock", id=1, timeout=1)
        self.assertTrue(callers[1].is_hung_up())
        self.assert_killed(daemon, before[1], "hold_lock", "hold_lock")
        self.assert_all_serve(callers[2])
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_lock_elsewhere(self) -> None:
        """The caller of a task that holds up another worker is answered, and keeps its own."""
        daemon = self.start()
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        path = self.begin(daemon, callers[1], "hold", id="hold")
        self.begin(daemon, callers[1], "hold_lock", id="lock", timeout=1)
        reply = callers[1].reply()
        self.assertEqual(reply["id"], "lock")
        self.assertIn(reply["error"]["code"], ("time-limit", "worker-lost"))
        self.assertTrue(callers[2].is_hung_up())
        self.assert_killed(daemon, before[2], "hold_lock", "hold_lock")
        self.assert_all_serve(callers[1])
        Path(path).touch()
        self.assertEqual(callers[1].reply(), {"id": "hold", "result": "released"})

    def test_reactor(self) -> None:
        """A coroutine that blocks its worker is ended with it after its limit."""
        daemon = self.start()
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        path = self.begin(daemon, callers[2], "hold_up_reactor", id=1, timeout=1)
        self.assertTrue(callers[2].is_hung_up())
        self.assert_killed(daemon, before[2], "hold_up_reactor", "hold_up_reactor")
        self.assert_all_serve(callers[1])
        self.assertFalse(self.has_ended(path))

    def test_without_limit(self) -> None:
        """A coroutine that blocks its worker, and has no limit, may; it is answered in the end."""
        daemon = self.start()
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        path = self.begin(daemon, callers[1], "hold_up_reactor", id=1)
        beat_by = daemon.status()["supervisor"]["uptime"] + 2.5
        wait_until(
            lambda: callers[2].ask("taskd.status")["supervisor"]["uptime"] > beat_by,
            what="some time without a beat",
        )
        Path(path).touch()
        self.assertEqual(callers[1].reply()["id"], 1)
        self.assertEqual(daemon.workers(), before)


class ClientTests(TestCase):
    """The client, when a call's Deferred is cancelled or its time is over."""

    timeout = 60

    def setUp(self) -> None:
        self.daemon = shared_daemon(procs=2)
        self.client = TaskClient(reactor, f"tcp:127.0.0.1:{self.daemon.port}", pool=1)
        self.addCleanup(self.client.close)
        self.room = self.daemon.directory / self.id().rpartition(".")[2]
        self.room.mkdir()
        self.before = self.daemon.restarts().get("time_limit", 0)

    async def until(self, condition: Any, what: str) -> None:
        """Wait as ``wait_until`` does, while the reactor goes on."""
        deadline = reactor.seconds() + LATER_SECONDS
        while not condition():
            self.assertLess(reactor.seconds(), deadline, f"{what} was not seen")
            await deferLater(reactor, 0.01)

    async def begin(self, name: str, **members: Any) -> tuple[Any, Path]:
        path = self.room / name
        called = self.client.call_with("hold", [str(path)], **members)
        await self.until(Path(f"{path}.begun").exists, "the task's begin")
        return called, path

    def replaced(self) -> int:
        return self.daemon.restarts().get("time_limit", 0) - self.before

    async def test_cancel_of_running(self) -> None:
        """Cancelling the Deferreds of blocking tasks replaces the workers, not the connection."""
        for name in ("here", "there"):
            called, path = await self.begin(name)
            called.cancel()
            await self.assertFailure(called, CancelledError)
            self.assertEqual(await self.client.call("add", 1, 2), 3)
            self.assertFalse(Path(f"{path}.ended").exists())
        await self.until(lambda: self.replaced() == 2, "two replaced workers")
        self.assertEqual(await self.client.call("add", 1, 2), 3)

    async def test_cancel_of_waiting(self) -> None:
        """Cancelling the Deferred of a task that waits has it never run, and costs nothing."""
        holding = [await self.begin(name) for name in ("here", "there")]
        notes = self.room / "notes"
        called = [self.client.call("record", str(notes), str(n)) for n in range(3)]
        await self.until(lambda: self.daemon.status()["queue"]["waiting"] == 3, "what waits")
        called[1].cancel()
        await self.assertFailure(called.pop(1), CancelledError)
        await self.until(lambda: self.daemon.status()["queue"]["waiting"] == 2, "what waits")
        for holder, path in holding:
            path.touch()
            self.assertEqual(await holder, "released")
        self.assertEqual([await c for c in called], ["0", "2"])
        self.assertEqual(sorted(lines_of(str(notes))), ["0", "2"])
        self.assertEqual(self.replaced(), 0)

    async def test_time_limit(self) -> None:
        """A call's timeout fails it by the daemon, whose worker is replaced unnoticed."""
        called = self.client.call_with("hold", [str(self.room / "x")], timeout=0.2)
        beside = self.client.call_with("hold", [str(self.room / "y")])
        await self.assertFailure(called, TimeLimitExceeded)
        await self.until(lambda: self.replaced() == 1, "a replaced worker")
        (self.room / "y").touch()
        self.assertEqual(await beside, "released")

    async def test_cancel_on_disconnect(self) -> None:
        """A call with ``cancel_on_disconnect`` ends with the client's connection."""
        path = self.room / "x"
        factory = TaskClientFactory(reactor)
        endpoint = clientFromString(reactor, f"tcp:127.0.0.1:{self.daemon.port}")
        connection = await endpoint.connect(factory)
        called = factory.call_with("tell_of_cancel", [str(path)], cancel_on_disconnect=True)
        await self.until(Path(f"{path}.begun").exists, "the task's begin")
        connection.transport.abortConnection()
        await self.assertFailure(called, ConnectionLost)
        await self.until(path.exists, "the task's note")
