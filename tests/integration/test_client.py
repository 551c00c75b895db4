"""The client against a real daemon: results, errors, lost connections, restarts."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from taskd.client import TaskClient, TaskClientFactory, call_once
from taskd.errors import (
    BadArguments,
    Cancelled,
    ClientClosed,
    ConnectFailed,
    ConnectionLost,
    LineTooLong,
    TaskFailed,
    TimeLimitExceeded,
    UnknownFunction,
    WorkerLost,
)
from tests.integration.daemon import Daemon, shared_daemon, touch_if_possible, wait_until

AT_ONCE_SECONDS = 2.0
"""How soon a loss must be noticed; the tasks in question would take much longer."""


class ClientTestCase(TestCase):
    """Base of tests that share a daemon of two workers."""

    timeout = 30

    def setUp(self) -> None:
        self.daemon = self.make_daemon()

    def make_daemon(self) -> Daemon:
        return shared_daemon(procs=2)

    def client(self, **options: Any) -> TaskClient:
        client = TaskClient(reactor, f"tcp:127.0.0.1:{self.daemon.port}", **options)
        self.addCleanup(client.close)
        return client

    def path(self) -> str:
        """Name a file that is not there; at the end it is, so that no task holds for it."""
        path = self.daemon.directory / uuid.uuid4().hex
        self.addCleanup(touch_if_possible, path)
        return str(path)

    async def until(self, condition: Any, what: str) -> None:
        """Wait as ``wait_until`` does, while the reactor goes on."""
        deadline = time.monotonic() + AT_ONCE_SECONDS * 5
        while not condition():
            self.assertLess(time.monotonic(), deadline, f"{what} was not seen")
            await deferLater(reactor, 0.01)

    async def notice(self) -> None:
        """Let the reactor see what has happened to the connections meanwhile."""
        for _ in range(3):
            await deferLater(reactor, 0)

    def connections(self) -> int:
        """Count the daemon's connections, the one that asks included."""
        count: int = self.daemon.status()["totals"]["connections"]
        return count

    async def begun(self, path: str) -> None:
        """Wait until the task has begun that was given this path."""
        await self.until(lambda: os.path.exists(path + ".begun"), "the task's begin")

    async def failure_of(self, called: Deferred[Any], kind: type[Exception]) -> Any:
        """Wait for a failure, and give the exception."""
        error = await self.assertFailure(called, kind)
        self.assertIs(type(error), kind)
        return error


class CallTests(ClientTestCase):
    async def test_result(self) -> None:
        """A call fires with the result, whatever the task's kind."""
        client = self.client()
        self.assertEqual(await client.call("add", 1, 2), 3)
        self.assertEqual(await client.call("add", a=3, b=4), 7)
        value = {"é": [None, True, 1.5, "\u2028"], "big": 10**30}
        for name in ("later", "later_deferred", "later_inline", "at_once"):
            self.assertEqual(await client.call(name, value), value)
        self.assertEqual(await client.call_with("mail.from", {"from": "me"}), ["me", "nobody"])

    async def test_errors(self) -> None:
        """Each error comes as its own exception, with what the daemon tells."""
        client = self.client()
        error = await self.failure_of(client.call("no_such_task"), UnknownFunction)
        self.assertIn("no_such_task", error.message)
        error = await self.failure_of(client.call("add", 1), BadArguments)
        self.assertIn("'b'", error.message)
        error = await self.failure_of(client.call("add", b=1, c=2), BadArguments)
        error = await self.failure_of(client.call("fail", "why"), TaskFailed)
        self.assertEqual((error.message, error.type, error.traceback), ("why", "ValueError", ""))
        error = await self.failure_of(client.call("leave", "exit"), TaskFailed)
        self.assertEqual(error.type, "SystemExit")
        error = await self.failure_of(client.call("not_json", "bytes"), TaskFailed)
        self.assertIn("bytes", error.message)
        error = await self.failure_of(client.call("echo", object()), BadArguments)
        self.assertIn("object", error.message)

    async def test_time_limit(self) -> None:
        """A call's time limit is the daemon's to enforce, and async tasks are stopped by it."""
        path = self.path()
        called = self.client().call("tell_of_cancel", path, timeout=0.1)
        error = await self.failure_of(called, TimeLimitExceeded)
        self.assertIn("tell_of_cancel was not done within", error.message)
        await self.until(lambda: os.path.exists(path), "the task's note")

    async def test_time_limit_of_blocking_task(self) -> None:
        """A call's time limit fails it although the task cannot be stopped."""
        path = self.path()
        await self.failure_of(self.client().call("hold", path, timeout=0.1), TimeLimitExceeded)
        self.assertFalse(os.path.exists(path + ".ended"))

    async def test_line_too_long(self) -> None:
        """A request that is too long fails; the client connects again for the next."""
        client = self.client(pool=1)
        error = await self.failure_of(client.call("echo", "x" * 1100000), LineTooLong)
        self.assertIn("--max-line", error.message)
        self.assertEqual(await client.call("add", 1, 2), 3)

    async def test_thousand_calls(self) -> None:
        """A thousand calls at once, over four connections, each get their own result."""
        client = self.client(pool=4)
        names = ("add", "at_once", "later")
        calls = [
            client.call(names[n % 3], *((n, 1) if n % 3 == 0 else (n + 1,))) for n in range(1000)
        ]
        self.assertEqual(await gatherResults(calls), list(range(1, 1001)))
        await self.until(lambda: self.connections() <= 5, "four connections, and the one that asks")

    async def test_quick_calls_overtake(self) -> None:
        """A call that takes long holds up no other one on the same connection."""
        client = self.client(pool=1)
        slow = client.call("wait_for_signal", "overtake")
        self.assertEqual(await client.call("add", 1, 2), 3)
        self.assertNoResult(slow)
        await client.call("give_signal", "overtake")
        self.assertEqual(await slow, "came")

    async def test_progress(self) -> None:
        """What a task reports comes to the callback, before the result."""
        client = self.client(pool=1)
        reports: list[Any] = []

        def report(*told: Any) -> None:
            reports.append(told)
            client.call("give_signal", "step")

        self.assertEqual(await client.call("walk", 3, on_progress=report), "there")
        self.assertEqual(reports, [(step, 3, f"step {step}") for step in (1, 2, 3)])

    async def test_progress_of_blocking_task(self) -> None:
        """The last report of a blocking task comes before its result."""
        reports: list[Any] = []
        called = self.client().call(
            "count", 200, on_progress=lambda done, total, message: reports.append(done)
        )
        self.assertEqual(await called, 200)
        self.assertEqual(reports[-1], 200)
        self.assertEqual(reports, sorted(reports))

    async def test_cancel(self) -> None:
        """Cancelling the Deferred cancels the async task that runs for it."""
        path = self.path()
        client = self.client()
        called = client.call("tell_of_cancel", path)
        await self.begun(path)
        called.cancel()
        await self.failure_of(called, CancelledError)
        await self.until(lambda: os.path.exists(path), "the task's note")
        self.assertEqual(await client.call("add", 1, 2), 3)

    async def test_cancel_of_blocking_task(self) -> None:
        """Cancelling the call of a blocking task forgets it; its late end disturbs nobody."""
        path = self.path()
        client = self.client(pool=1)
        called = client.call("hold", path)
        await self.begun(path)
        called.cancel()
        await self.failure_of(called, CancelledError)
        Path(path).touch()
        self.assertEqual(await client.call("add", 1, 2), 3)

    async def test_cancel_before_the_connection(self) -> None:
        """A call that is cancelled before there is a connection is never sent."""
        path = self.path()
        client = self.client(pool=1)
        called = client.call("touch", path)
        called.cancel()
        await self.failure_of(called, CancelledError)
        # The one connection and its worker's one thread would have run it before this.
        self.assertEqual(await client.call("add", 1, 2), 3)
        self.assertFalse(os.path.exists(path))

    async def test_cancelled_by_id(self) -> None:
        """``taskd.cancel`` of a call that the client has in flight fails it with ``Cancelled``."""
        path = self.path()
        client = self.client(pool=1)
        called = client.call("tell_of_cancel", path)
        await self.begun(path)
        # The client numbers the calls of a connection from 1.
        self.assertIs(await client.call("taskd.cancel", 1), True)
        await self.failure_of(called, Cancelled)

    async def test_close(self) -> None:
        """``close`` waits for the calls in flight, refuses new ones, and then disconnects."""
        client = self.client(pool=2)
        slow = client.call("wait_for_signal", "close")
        await client.call("echo", "the connection stands")
        closed = client.close()
        await self.failure_of(client.call("add", 1, 2), ClientClosed)
        self.assertNoResult(closed)
        self.assertNoResult(slow)
        await self.signal_workers("close")
        self.assertEqual(await slow, "came")
        await closed
        await self.until(lambda: self.connections() == 1, "the end of all other connections")

    async def signal_workers(self, name: str) -> None:
        """Give the signal to the worker that has somebody who waits for it."""
        for connection in self.daemon.connect_to_each().values():
            connection.ask("give_signal", [name])
            connection.close()

    async def test_call_once(self) -> None:
        """``call_once`` gives the result when its connection is closed again."""
        endpoint = f"tcp:127.0.0.1:{self.daemon.port}"
        await self.until(lambda: self.connections() == 1, "the end of all other connections")
        self.assertEqual(await call_once(reactor, endpoint, "add", [1, 2]), 3)
        self.assertEqual(await call_once(reactor, endpoint, "add", {"a": 3, "b": 4}), 7)
        await self.failure_of(call_once(reactor, endpoint, "fail", ["why"]), TaskFailed)
        await self.until(lambda: self.connections() == 1, "the end of all other connections")

    async def test_connect_tcp(self) -> None:
        """A factory for ``reactor.connectTCP`` takes calls before and after it is connected."""
        factory = TaskClientFactory(reactor)
        first = factory.call("mail.from", **{"from": "xxx", "to": "yyy"})
        reactor.connectTCP("127.0.0.1", self.daemon.port, factory)
        self.assertEqual(await first, ["xxx", "yyy"])
        self.assertEqual(await factory.call("add", 1, 2), 3)
        await factory.close()
        await self.failure_of(factory.call("add", 1, 2), ClientClosed)


class LossTests(ClientTestCase):
    """Tests that end processes, and so have a daemon to themselves."""

    def make_daemon(self, port: int = 0) -> Daemon:
        daemon = Daemon("--grace", "5", procs=2, port=port)
        self.addCleanup(daemon.stop)
        return daemon.start()

    async def stop_daemon(self) -> None:
        """Stop the daemon while the reactor goes on, so that the client takes part."""
        self.daemon.signal(signal.SIGTERM)
        await self.until(lambda: not self.daemon.processes(), "the daemon's end")

    async def test_killed_worker(self) -> None:
        """Calls of a worker that is killed fail at once, and the next one is served."""
        client = self.client(pool=1)
        path = self.path()
        called = client.call("hold", path)
        waiting = client.call("hold", path)
        number = (await client.call("taskd.status"))["answered_by"]
        await self.begun(path)
        began = time.monotonic()
        self.daemon.kill(self.daemon.workers()[number])
        for deferred in (called, waiting):
            error = await self.failure_of(deferred, ConnectionLost)
            self.assertIsInstance(error, WorkerLost)
            self.assertTrue(error.may_have_started)
        self.assertLess(time.monotonic() - began, AT_ONCE_SECONDS)
        self.assertEqual(await client.call("add", 1, 2), 3)

    async def test_task_that_kills_its_worker(self) -> None:
        """A call whose task ends the worker fails, and the client goes on."""
        client = self.client(pool=1)
        for name, args in (("die", (3,)), ("segfault", ())):
            await self.failure_of(client.call(name, *args), ConnectionLost)
        self.assertEqual(await client.call("add", 1, 2), 3)

    async def test_restart(self) -> None:
        """A client finds a daemon again that was started anew on the same port."""
        client = self.client()
        self.assertEqual(await client.call("add", 1, 2), 3)
        await self.stop_daemon()
        self.daemon = self.make_daemon(self.daemon.port)
        self.assertEqual(await client.call("add", 3, 4), 7)
        await client.close()

    async def test_daemon_that_comes_late(self) -> None:
        """A call that is made while the daemon is away waits for it to come."""
        client = self.client(connect_timeout=20)
        port = self.daemon.port
        self.daemon.stop()
        called = client.call("add", 1, 2)
        await self.notice()
        self.assertNoResult(called)
        self.daemon = self.make_daemon(port)
        self.assertEqual(await called, 3)
        await client.close()

    async def test_stop(self) -> None:
        """A daemon that stops answers what it has begun; what comes later waits for another."""
        client = self.client(pool=1, connect_timeout=0.5)
        path = self.path()
        called = client.call("hold", path)
        await self.begun(path)
        self.daemon.signal(signal.SIGTERM)
        await self.until(lambda: "Received SIGTERM" in self.daemon.log, "the stop")
        await self.refused(client)
        Path(path).touch()
        self.assertEqual(await called, "released")
        await self.until(lambda: not self.daemon.processes(), "the daemon's end")
        await self.failure_of(client.call("add", 1, 2), ConnectFailed)

    async def refused(self, client: TaskClient) -> None:
        """Call until the worker says that it is stopping, and nobody else is there in time."""
        while True:
            try:
                await client.call("at_once", 1)
            except ConnectFailed:
                return

    async def test_unreachable_daemon(self) -> None:
        """Without a daemon a call fails within the time that it may wait for a connection."""
        self.daemon.stop()
        client = self.client(connect_timeout=0.3)
        began = time.monotonic()
        error = await self.failure_of(client.call("add", 1, 2), ConnectFailed)
        self.assertLess(time.monotonic() - began, AT_ONCE_SECONDS)
        self.assertIn("refused", str(error))
        endpoint = f"tcp:127.0.0.1:{self.daemon.port}"
        await self.failure_of(
            call_once(reactor, endpoint, "add", [1, 2], timeout=0.1), TimeLimitExceeded
        )

    async def test_connect_tcp_to_nobody(self) -> None:
        """Without a daemon the calls of a factory fail when connecting has failed."""
        self.daemon.stop()
        factory = TaskClientFactory(reactor)
        called = factory.call("add", 1, 2)
        reactor.connectTCP("127.0.0.1", self.daemon.port, factory)
        await self.failure_of(called, ConnectFailed)
        await self.failure_of(factory.call("add", 1, 2), ConnectFailed)

    async def test_silent_daemon(self) -> None:
        """A daemon that accepts and says nothing fails a call at its time limit."""
        self.daemon.stop()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            endpoint = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
            called = call_once(reactor, endpoint, "add", [1, 2], timeout=0.1)
            await self.failure_of(called, TimeLimitExceeded)

    async def test_close_with_lost_connection(self) -> None:
        """``close`` fires also when the daemon dies while it waits."""
        client = self.client(pool=1)
        path = self.path()
        called = client.call("hold", path)
        await self.begun(path)
        closed = client.close()
        self.daemon.kill(self.daemon.pid)
        for process in self.daemon.processes():
            self.daemon.kill(process.pid)
        await self.failure_of(called, ConnectionLost)
        await closed
        wait_until(lambda: not self.daemon.processes(), what="the daemon's end")
