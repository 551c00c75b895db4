"""Which worker runs a blocking task, and in which order: nobody waits while one is idle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import gatherResults
from twisted.trial.unittest import TestCase

from taskd.client import TaskClient
from tests.integration.case import DaemonTestCase, lines_of
from tests.integration.daemon import Connection, Daemon, shared_daemon, wait_until

MANY = 16


class MeetingTests(DaemonTestCase):
    """Tasks of which none ends before all have begun, on as many workers."""

    def setUp(self) -> None:
        self.daemon = shared_daemon(procs=MANY)
        self.room = str(self.directory(self.daemon))

    def request_meeting(self, connection: Connection, name: str, count: int) -> None:
        connection.request("meet", [self.room, name, count], id=name)

    def assert_all_met(self, pids: list[int]) -> None:
        self.assertEqual(set(pids), set(self.daemon.workers().values()))
        self.assertEqual(len(pids), MANY)

    def test_one_connection(self) -> None:
        """Sixteen tasks over one connection run at once on sixteen workers."""
        caller = self.connect(self.daemon)
        for number in range(MANY):
            self.request_meeting(caller, str(number), MANY)
        replies = caller.replies_by_id(MANY)
        self.assert_all_met([reply["result"] for reply in replies.values()])

    def test_one_connection_without_ids(self) -> None:
        """Sixteen tasks over one connection run at once although their replies keep an order."""
        caller = self.connect(self.daemon)
        for number in range(MANY):
            caller.request("meet", [self.room, str(number), MANY])
        self.assert_all_met([caller.reply() for _ in range(MANY)])

    def test_open_connections(self) -> None:
        """Sixteen tasks over sixteen connections run at once, whichever workers hold those."""
        callers = [self.connect(self.daemon) for _ in range(MANY)]
        for caller in callers:
            self.assertEqual(caller.ask("taskd.ping"), "pong")
        for number, caller in enumerate(callers):
            self.request_meeting(caller, str(number), MANY)
        self.assert_all_met([caller.reply()["result"] for caller in callers])

    def test_new_connections(self) -> None:
        """Sixteen tasks, each over a connection that was opened for it, run at once."""
        callers = []
        for number in range(MANY):
            callers.append(self.connect(self.daemon))
            self.request_meeting(callers[-1], str(number), MANY)
        self.assert_all_met([caller.reply()["result"] for caller in callers])

    def test_one_after_the_other(self) -> None:
        """Sixteen tasks, each sent when the one before has begun, find an idle worker each."""
        caller = self.connect(self.daemon)
        for number in range(MANY):
            self.request_meeting(caller, str(number), MANY)
            wait_until(Path(self.room, str(number)).exists, what="the task's begin")
        replies = caller.replies_by_id(MANY)
        self.assert_all_met([reply["result"] for reply in replies.values()])

    def test_on_reactor(self) -> None:
        """Sixteen coroutines over one connection run at once on the one worker that has it."""
        caller = self.connect(self.daemon)
        for number in range(MANY):
            caller.request("meet_on_reactor", [self.room, str(number), MANY], id=number)
        replies = caller.replies_by_id(MANY)
        self.assertEqual(len({reply["result"] for reply in replies.values()}), 1)


class BehindLongTaskTests(DaemonTestCase):
    """Tasks behind one that goes on, in a pool of two."""

    def setUp(self) -> None:
        self.daemon = shared_daemon(procs=2)
        self.caller = self.connect(self.daemon)
        self.long = self.begin(self.daemon, self.caller, "hold", id="long")

    def release(self) -> None:
        Path(self.long).touch()
        self.assertEqual(self.caller.reply(), {"id": "long", "result": "released"})

    def own_pid(self) -> int:
        """Tell the pid of the worker that holds the connection."""
        reply = self.caller.ask("pid_at_once", id="own")
        self.assertEqual(reply["id"], "own")
        pid: int = reply["result"]
        return pid

    def other_pid(self) -> int:
        (other,) = set(self.daemon.workers().values()) - {self.own_pid()}
        return other

    def test_quick_tasks(self) -> None:
        """A hundred quick tasks behind a long one are answered while that goes on."""
        for number in range(100):
            self.caller.request("add", [number, 1], id=number)
        replies = self.caller.replies_by_id(100)
        self.assertEqual(
            {n: reply["result"] for n, reply in replies.items()}, {n: n + 1 for n in range(100)}
        )
        self.assertFalse(self.has_ended(self.long))
        self.release()

    def test_quick_tasks_in_one_write(self) -> None:
        """Quick tasks that come in one write with the long one before them do not wait for it."""
        other, path = self.connect(self.daemon), self.path(self.daemon)
        lines = [{"function": "hold", "args": [path], "id": "second"}]
        lines += [{"function": "add", "args": [n, 1], "id": n} for n in range(20)]
        Path(self.long).touch()
        self.assertEqual(self.caller.reply()["id"], "long")
        other.send("".join(json.dumps(line) + "\n" for line in lines))
        self.assertEqual(set(other.replies_by_id(20)), set(range(20)))
        self.assertFalse(self.has_ended(path))
        Path(path).touch()
        self.assertEqual(other.reply(), {"id": "second", "result": "released"})

    def test_replies_without_ids(self) -> None:
        """Replies without ids wait for the long task's, and keep their order."""
        caller, path = self.connect(self.daemon), self.path(self.daemon)
        Path(self.long).touch()
        self.assertEqual(self.caller.reply()["id"], "long")
        caller.request("hold", [path])
        self.wait_for_begin(path)
        notes = self.path(self.daemon)
        words = [str(number) for number in range(30)]
        for number, word in enumerate(words):
            if number % 3 == 0:
                caller.request("at_once", [word])
            else:
                caller.request("record", [notes, word])
        wait_until(lambda: len(lines_of(notes)) == 20, what="the end of what runs elsewhere")
        self.assertEqual(caller.ask("taskd.ping", id="ping"), {"id": "ping", "result": "pong"})
        Path(path).touch()
        self.assertEqual([caller.reply() for _ in range(1 + len(words))], ["released", *words])

    def test_progress(self) -> None:
        """What a task reports comes to its caller at once, though another worker runs it."""
        path = self.path(self.daemon)
        self.caller.request("climb", [path, 3], id="climb", progress=True)
        for step in (1, 2, 3):
            self.assertEqual(
                self.caller.reply(),
                {"id": "climb", "progress": {"done": step, "total": 3, "message": f"step {step}"}},
            )
            Path(f"{path}.{step}").touch()
        reply = self.caller.reply()
        self.assertEqual(reply["id"], "climb")
        self.assertEqual(reply["result"], self.other_pid())
        self.release()

    def test_last_report(self) -> None:
        """The last of many reports comes before the result, though another worker runs the task."""
        self.caller.request("count", [300], id=1, progress=True)
        done = []
        while "progress" in (reply := self.caller.reply()):
            done.append(reply["progress"]["done"])
        self.assertEqual(reply, {"id": 1, "result": 300})
        self.assertEqual(done, sorted(set(done)))
        self.assertEqual(done[-1], 300)
        self.release()

    def test_failures(self) -> None:
        """What a task raises, or cannot return, comes to its caller as if it had run here."""
        cases: list[tuple[str, list[Any]]] = [
            ("fail", ["It is é\n\u2028"]),
            ("leave", ["exit"]),
            ("leave", ["interrupt"]),
            ("deferred_by_mistake", [1]),
        ]
        cases += [
            ("not_json", [kind])
            for kind in ("set", "bytes", "nan", "infinity", "keys", "surrogate", "loop")
        ]
        before = self.daemon.workers()
        elsewhere = {}
        for number, (function, args) in enumerate(cases):
            elsewhere[number] = self.caller.ask(function, args, id=number)
        self.release()
        here = {
            n: self.caller.ask(function, args, id=n) for n, (function, args) in enumerate(cases)
        }
        for number in here:
            self.assert_error(here[number], "task-failed")
        self.assertEqual(elsewhere, here)
        self.assertEqual(self.daemon.workers(), before)

    def test_values(self) -> None:
        """Ids, arguments and results of every kind pass unchanged through another worker."""
        notes = self.path(self.daemon)
        for given in ("a", 1, 1.5, None, True, [1, {"x": []}], 10**30, "é\u2028", "", {"id": {}}):
            reply = self.caller.ask("record", [notes, 'é \u2028 {} \\ "'], id=given)
            self.assertEqual(reply, {"id": given, "result": 'é \u2028 {} \\ "'})
        self.assertEqual(self.caller.ask("add", {"a": 1, "b": 2}, id=1)["result"], 3)
        self.assertEqual(self.caller.ask("mail.from", {"from": "me"}, id=1)["result"][0], "me")
        text = "é" * 150_000
        self.assertEqual(self.caller.ask("record", [notes, text], id=1)["result"], text)
        self.assertEqual(len(self.caller.ask("letters", [5_000_000], id=1)["result"]), 5_000_000)
        self.release()

    def test_refusals(self) -> None:
        """What cannot be called is refused here, whoever is busy."""
        self.assert_error(self.caller.ask("no_such_task", id=1), "unknown-function")
        self.assert_error(self.caller.ask("add", [1], id=1), "bad-arguments", "'b'")
        self.release()

    def test_own_work(self) -> None:
        """Coroutines and what does not block are answered by the worker whose thread is busy."""
        own, other = self.own_pid(), self.other_pid()
        for function in ("pid_of_async", "pid_at_once"):
            self.assertEqual(self.caller.ask(function, id=1), {"id": 1, "result": own})
        self.assertEqual(self.caller.ask("pid_of_blocking", id=1), {"id": 1, "result": other})
        self.release()

    def test_two_long_tasks(self) -> None:
        """While both workers hold a task, everything that does not block is answered."""
        second = self.begin(self.daemon, self.caller, "hold", id="second")
        for function, args, result in (
            ("later", ["x"], "x"),
            ("later_deferred", ["y"], "y"),
            ("at_once", ["z"], "z"),
            ("taskd.ping", [], "pong"),
        ):
            self.assertEqual(self.caller.ask(function, args, id=1), {"id": 1, "result": result})
        Path(second).touch()
        self.assertEqual(self.caller.reply(), {"id": "second", "result": "released"})
        self.release()

    def test_gone_caller(self) -> None:
        """A task that another worker runs goes on when its caller has gone, and harms nobody."""
        path = self.begin(self.daemon, self.caller, "hold", id="other")
        self.caller.close()
        Path(path).touch()
        wait_until(lambda: self.has_ended(path), what="the task's end")
        Path(self.long).touch()
        wait_until(lambda: self.has_ended(self.long), what="the task's end")
        self.assertEqual(self.daemon.ask("add", [1, 2]), 3)

    def test_half_close(self) -> None:
        """A caller that closes its sending side still gets what another worker has done for it."""
        self.caller.request("add", [1, 2], id=1)
        self.caller.half_close()
        self.assertEqual(self.caller.reply(), {"id": 1, "result": 3})
        self.release()
        self.assertEqual(self.caller.rest(), b"")


class QueueTests(DaemonTestCase):
    """One worker, so that everything behind its task waits."""

    def setUp(self) -> None:
        self.daemon = shared_daemon(procs=1)
        self.caller = self.connect(self.daemon)
        self.notes = self.path(self.daemon)

    def record(self, caller: Connection, word: str, **members: Any) -> None:
        caller.request("record", [self.notes, word], id=word, **members)

    def test_priorities(self) -> None:
        """Tasks that wait are started by their priority, those of one in the order they came."""
        path = self.begin(self.daemon, self.caller, "hold", id="long")
        priorities = (0, 5, -5, 5, 0, 9, -1_000_000_000, 1_000_000_000, 0, -5)
        given = [(priority, f"{number}:{priority}") for number, priority in enumerate(priorities)]
        for count, (priority, word) in enumerate(given, 1):
            self.record(self.caller, word, **({"priority": priority} if priority else {}))
            self.wait_for_waiting(self.daemon, count)
        Path(path).touch()
        self.caller.replies_by_id(1 + len(given))
        # Sorting keeps the order of equals.
        given.sort(key=lambda item: -item[0])
        self.assertEqual(lines_of(self.notes), [word for _, word in given])

    def test_connections_take_turns(self) -> None:
        """Tasks of several connections are started in the order in which they came."""
        path = self.begin(self.daemon, self.caller, "hold", id="long")
        callers = [self.connect(self.daemon) for _ in range(3)]
        words = [str(number) for number in range(12)]
        for number, word in enumerate(words):
            self.record(callers[number % 3], word)
            self.wait_for_waiting(self.daemon, number + 1)
        Path(path).touch()
        self.assertEqual(self.caller.reply()["id"], "long")
        for number, word in enumerate(words):
            self.assertEqual(callers[number % 3].reply(), {"id": word, "result": word})
        self.assertEqual(lines_of(self.notes), words)

    def test_status(self) -> None:
        """The status tells how many wait, and since when; afterwards nothing waits."""
        queue = self.daemon.status()["queue"]
        self.assertEqual((queue["waiting"], queue["oldest_seconds"]), (0, None))
        path = self.begin(self.daemon, self.caller, "hold", id="long")
        for number in range(3):
            self.record(self.caller, str(number))
        queue = wait_until(self.queue_if_shown, what="the oldest task that waits")
        self.assertEqual(queue["waiting"], 3)
        self.assertGreater(queue["oldest_seconds"], 0)
        Path(path).touch()
        self.caller.replies_by_id(4)
        queue = self.daemon.status()["queue"]
        self.assertEqual((queue["waiting"], queue["oldest_seconds"]), (0, None))

    def queue_if_shown(self) -> dict[str, Any] | None:
        queue: dict[str, Any] = self.daemon.status()["queue"]
        return queue if queue["waiting"] == 3 and queue["oldest_seconds"] else None

    def test_many(self) -> None:
        """Two thousand tasks that wait are each run once."""
        path = self.begin(self.daemon, self.caller, "hold", id="long")
        callers = [self.connect(self.daemon) for _ in range(4)]
        for number in range(2000):
            self.record(callers[number % 4], str(number))
        self.wait_for_waiting(self.daemon, 2000)
        Path(path).touch()
        for caller in callers:
            self.assertEqual(len(caller.replies_by_id(500)), 500)
        self.assertEqual(self.caller.reply()["id"], "long")
        words = lines_of(self.notes)
        self.assertEqual(Counter(words), Counter(str(number) for number in range(2000)))


class ThreadsTests(DaemonTestCase):
    def test_threads(self) -> None:
        """With ``--threads 2``, two workers run four tasks of one connection at once."""
        daemon = self.start("--threads", "2")
        room = str(self.directory(daemon))
        caller = self.connect(daemon)
        for number in range(4):
            caller.request("meet", [room, str(number), 4], id=number)
        pids = Counter(reply["result"] for reply in caller.replies_by_id(4).values())
        self.assertEqual(pids, dict.fromkeys(daemon.workers().values(), 2))

    def test_queue(self) -> None:
        """With ``--threads 2`` what waits behind full workers is run when a thread is free."""
        daemon = self.start("--threads", "2")
        caller, notes = self.connect(daemon), self.path(daemon)
        paths = [self.begin(daemon, caller, "hold", id=f"hold {n}") for n in range(4)]
        for number in range(5):
            caller.request("record", [notes, str(number)], id=number)
        self.wait_for_waiting(daemon, 5)
        Path(paths[3]).touch()
        self.assertEqual(set(caller.replies_by_id(6)), {"hold 3", 0, 1, 2, 3, 4})
        for path in paths[:3]:
            self.assertFalse(self.has_ended(path))
            Path(path).touch()
        self.assertEqual(set(caller.replies_by_id(3)), {"hold 0", "hold 1", "hold 2"})
        self.assertEqual(sorted(lines_of(notes)), ["0", "1", "2", "3", "4"])


class ClientTests(TestCase):
    """The client, over its one connection."""

    timeout = 60

    def setUp(self) -> None:
        self.daemon = self.make_daemon()
        self.client = TaskClient(reactor, f"tcp:127.0.0.1:{self.daemon.port}", pool=1)
        self.addCleanup(self.client.close)

    def make_daemon(self) -> Daemon:
        return shared_daemon(procs=8)

    async def test_meeting(self) -> None:
        """Eight calls of a client with one connection run at once on eight workers."""
        room = self.daemon.directory / "client"
        room.mkdir()
        called = [self.client.call("meet", str(room), str(n), 8) for n in range(8)]
        self.assertEqual(set(await gatherResults(called)), set(self.daemon.workers().values()))

    async def test_priority(self) -> None:
        """A call takes a priority, and its result comes as ever."""
        called = [
            self.client.call_with("add", [n, 1], priority=n, on_progress=lambda *_: None)
            for n in range(-20, 20)
        ]
        self.assertEqual(await gatherResults(called), list(range(-19, 21)))
