"""Workers that are replaced while they serve: by wear, by new code; and the daemon's end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from tests.integration.case import DaemonTestCase, lines_of
from tests.integration.daemon import SAMPLE_TASKS, Connection, Daemon, wait_until
from tests.integration.load import Load

VERSION = """
import os
from taskd import task

@task
def version():
    return {version}

@task(blocking=False)
def version_at_once():
    return {version}
"""

NEW_FUNCTIONS = """
@task
def fresh(a, b=2):
    return ["fresh", a, b]

@task(blocking=False)
def fresh_at_once():
    return "fresh at once"

@task
async def fresh_later():
    return "fresh later"
"""


class WearTests(DaemonTestCase):
    def test_max_tasks(self) -> None:
        """``--max-tasks`` replaces every worker, more than once, and no caller notices."""
        daemon = self.start("--max-tasks", "100", procs=3)
        with Load(daemon) as load:
            for _ in range(2):
                before = daemon.wait_until_whole()
                daemon.wait_until_new(before)
                load.wait_for_more()
        self.assertEqual(load.failures, [])
        restarts = daemon.restarts()
        self.assertEqual(set(restarts), {"max_tasks"})
        self.assertGreaterEqual(restarts["max_tasks"], 6)
        self.wait_for_log(daemon, "was replaced: max-tasks")
        daemon.wait_until_settled()

    def test_max_tasks_of_one_worker(self) -> None:
        """A pool of one worker is never without one: each task over one connection is answered."""
        daemon = self.start("--max-tasks", "5", procs=1)
        caller = self.connect(daemon)
        before = daemon.workers()
        for number in range(100):
            self.assertEqual(caller.ask("add", [number, 1]), number + 1)
        daemon.wait_until_new(before)
        self.assertEqual(caller.ask("add", [1, 2]), 3)

    def test_max_tasks_of_new_connections(self) -> None:
        """Tasks over connections of their own are all answered while workers are replaced."""
        daemon = self.start("--max-tasks", "20", procs=2)
        for number in range(300):
            self.assertEqual(daemon.ask("add", [number, 1]), number + 1)
        wait_until(lambda: daemon.restarts().get("max_tasks", 0) >= 4, what="four replacements")

    def test_max_rss(self) -> None:
        """A worker that grows beyond ``--max-rss`` is replaced; its callers go on."""
        daemon = self.start("--max-rss", "150", procs=2)
        before = daemon.workers()
        callers = self.connect_to_each(daemon)
        grown = callers[1].ask("grow", [200])
        self.assertIn(grown, before.values())
        wait_until(lambda: daemon.restarts() == {"max_rss": 1}, what="a replaced worker")
        self.wait_for_end_of(grown)
        after = set(daemon.wait_until_settled().values())
        self.assertEqual(after & set(before.values()), set(before.values()) - {grown})
        for caller in callers.values():
            self.assertEqual(caller.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.restarts(), {"max_rss": 1})


class ReloadTests(DaemonTestCase):
    """SIGHUP loads the task modules anew."""

    def start_version(self, *options: str, procs: int = 2) -> Daemon:
        text = SAMPLE_TASKS.read_text(encoding="utf-8")
        return self.start(
            *options,
            procs=procs,
            tasks="tasks.py,sample_tasks.py",
            files={"tasks.py": VERSION.format(version=1), "sample_tasks.py": text},
        )

    def write(self, daemon: Daemon, version: int, more: str = "") -> None:
        # Python looks at a source's size and at the second of its time, so each has its own size.
        text = VERSION.format(version=version) + "#" * version + more
        (daemon.directory / "tasks.py").write_text(text, encoding="utf-8")

    def reload(self, daemon: Daemon, version: int, more: str = "") -> None:
        """Have new code loaded, and wait until its workers have taken over."""
        before = daemon.workers()
        self.write(daemon, version, more)
        daemon.signal(signal.SIGHUP)
        daemon.wait_until_new(before)

    def failure(self, daemon: Daemon) -> str | None:
        """Tell why the last reload has failed, or None."""
        reload = daemon.status()["supervisor"]["reload"]
        return reload and reload["failure"]

    def test_new_code(self) -> None:
        """After SIGHUP new code is served, over new connections and over those that stood."""
        daemon = self.start_version()
        self.assertIsNone(daemon.status()["supervisor"]["reload"])
        before = daemon.workers()
        connections = self.connect_to_each(daemon)
        for caller in connections.values():
            self.assertEqual(caller.ask("version"), 1)
        self.reload(daemon, 2)
        for caller in (*connections.values(), self.connect(daemon)):
            self.assertEqual(caller.ask("version"), 2)
            self.assertEqual(caller.ask("version_at_once"), 2)
            self.assertEqual(caller.ask("taskd.ping", id=1), {"id": 1, "result": "pong"})
        self.wait_for_end_of(*before.values())
        daemon.wait_until_settled()
        self.assertEqual(daemon.restarts(), {"reload": 2})
        self.assertIsNone(self.failure(daemon))
        self.wait_for_log(daemon, "the new code is loaded", "was replaced: reload")

    def test_old_zygote(self) -> None:
        """Of the old code no process is left once its last worker has gone."""
        daemon = self.start_version()
        old = daemon.zygote
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold")
        self.reload(daemon, 2)
        Path(path).touch()
        self.assertEqual(caller.reply(), "released")
        self.wait_for_end_of(old)
        self.assertNotEqual(daemon.zygote, old)
        self.assertEqual(daemon.ask("version"), 2)
        self.assertNotIn(f"(pid {old})", daemon.log)

    def test_new_functions(self) -> None:
        """Functions that only the new code has are found over old connections, owed or not."""
        daemon = self.start_version()
        idle, owed = self.connect(daemon), self.connect(daemon)
        self.assert_error(idle.ask("fresh", [1]), "unknown-function")
        path = self.begin(daemon, owed, "hold", id="hold")
        self.reload(daemon, 2, NEW_FUNCTIONS)
        for caller in (idle, owed):
            for function, args, result in (
                ("fresh", [1], ["fresh", 1, 2]),
                ("fresh", {"a": 1, "b": 3}, ["fresh", 1, 3]),
                ("fresh_at_once", [], "fresh at once"),
                ("fresh_later", [], "fresh later"),
                ("version", [], 2),
                ("version_at_once", [], 2),
            ):
                self.assertEqual(caller.ask(function, args, id=1), {"id": 1, "result": result})
            self.assert_error(caller.ask("fresh", [], id=1), "bad-arguments", "'a'")
            self.assert_error(caller.ask("no_such_task", id=1), "unknown-function")
        self.assertFalse(self.has_ended(path))
        Path(path).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})
        self.assertEqual(owed.ask("fresh_at_once"), "fresh at once")

    def test_lost_functions(self) -> None:
        """Functions that the new code has no more are refused over old connections."""
        daemon = self.start_version()
        self.reload(daemon, 2, NEW_FUNCTIONS)
        idle, owed = self.connect(daemon), self.connect(daemon)
        self.assertEqual(idle.ask("fresh", [1]), ["fresh", 1, 2])
        path = self.begin(daemon, owed, "hold", id="hold")
        self.reload(daemon, 3)
        for caller in (idle, owed):
            self.assert_error(caller.ask("fresh", [1], id=1), "unknown-function")
        Path(path).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})

    def test_failed_import(self) -> None:
        """Code that cannot be imported leaves the old serving, and is told of until it can."""
        daemon = self.start_version()
        before, zygote = daemon.workers(), daemon.zygote
        caller = self.connect(daemon)
        for text, words in (
            ("1 / 0\n", ("--tasks tasks.py", "ZeroDivisionError")),
            ("def broken(:\n", ("SyntaxError",)),
            ("import os\nos._exit(3)\n", ("while it loaded the code",)),
        ):
            count = daemon.log.count("the new code cannot be loaded")
            (daemon.directory / "tasks.py").write_text(text, encoding="utf-8")
            daemon.signal(signal.SIGHUP)
            wait_until(
                lambda words=words: all(w in (self.failure(daemon) or "") for w in words),
                what=f"the failure {words}",
            )
            self.assertEqual(daemon.log.count("the new code cannot be loaded"), count + 1)
            for word in words:
                self.wait_for_log(daemon, word)
            self.assertEqual(caller.ask("version"), 1)
        self.assertEqual((daemon.workers(), daemon.zygote), (before, zygote))
        self.reload(daemon, 2)
        self.assertEqual(caller.ask("version"), 2)
        self.assertIsNone(self.failure(daemon))
        self.assertEqual(daemon.settled_restarts(), {"reload": 2})

    def test_long_tasks(self) -> None:
        """Tasks that run, wait, or were handed over when new code comes are all answered."""
        daemon = self.start_version()
        caller = self.connect(daemon)
        paths = {name: self.begin(daemon, caller, "hold", id=name) for name in ("here", "there")}
        on_reactor = self.begin(daemon, caller, "hold_on_reactor", id="on reactor")
        caller.request("add", [1, 2], id="waits")
        self.wait_for_waiting(daemon, 1)
        self.reload(daemon, 2)
        self.assertEqual(caller.reply(), {"id": "waits", "result": 3})
        self.assertEqual(caller.ask("version", id="new"), {"id": "new", "result": 2})
        for name, path in {**paths, "on reactor": on_reactor}.items():
            Path(path).touch()
            self.assertEqual(caller.reply(), {"id": name, "result": "released"})
        self.assertEqual(caller.ask("version"), 2)
        self.assertEqual(daemon.settled_restarts(), {"reload": 2})

    def test_replies_without_ids(self) -> None:
        """A conversation without ids keeps its order, though it changes workers in between."""
        daemon = self.start_version()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold")
        caller.request("version_at_once")
        self.reload(daemon, 2)
        for function in ("version", "version_at_once", "taskd.ping"):
            caller.request(function)
        Path(path).touch()
        self.assertEqual(caller.reply(), "released")
        self.assertIn(caller.reply(), (1, 2))
        self.assertEqual([caller.reply() for _ in range(3)], [2, 2, "pong"])

    def test_request_in_pieces(self) -> None:
        """A request of which half has come when its connection changes workers is served."""
        daemon = self.start_version()
        before = daemon.workers()
        caller = self.connect(daemon)
        self.assertEqual(caller.ask("version"), 1)
        caller.send('{"function": "ver')
        self.reload(daemon, 2)
        self.wait_for_end_of(*before.values())
        caller.send('sion"}\n')
        self.assertEqual(caller.reply(), 2)

    def test_progress(self) -> None:
        """What a task of the old code reports comes to its caller after the reload."""
        daemon = self.start_version()
        caller, path = self.connect(daemon), self.path(daemon)
        caller.request("climb", [path, 2], id=1, progress=True)
        self.assertEqual(caller.reply()["progress"]["done"], 1)
        self.reload(daemon, 2)
        Path(f"{path}.1").touch()
        self.assertEqual(caller.reply()["progress"]["done"], 2)
        Path(f"{path}.2").touch()
        self.assertEqual(caller.reply()["id"], 1)

    def test_cancel(self) -> None:
        """A task of the old code is cancelled over its old connection, which goes on."""
        daemon = self.start_version()
        caller = self.connect(daemon)
        note = self.begin(daemon, caller, "tell_of_cancel", id="job")
        self.reload(daemon, 2)
        caller.request("taskd.cancel", ["job"], id="cancel")
        replies = caller.replies_by_id(2)
        self.assertIs(replies["cancel"]["result"], True)
        self.assert_error(replies["job"], "cancelled")
        wait_until(Path(note).exists, what="the task's note")
        self.assertEqual(caller.ask("version"), 2)

    def test_several_at_once(self) -> None:
        """SIGHUP while new code is loaded has it loaded once more, so the last change counts."""
        daemon = self.start_version()
        caller = self.connect(daemon)
        self.write(daemon, 2, "\nimport time\nopen('loading', 'w').close()\ntime.sleep(0.5)\n")
        daemon.signal(signal.SIGHUP)
        wait_until((daemon.directory / "loading").exists, what="the import")
        self.write(daemon, 3)
        for _ in range(3):
            daemon.signal(signal.SIGHUP)
        wait_until(lambda: caller.ask("version") == 3, what="the last version")
        daemon.wait_until_settled()
        self.assertEqual(caller.ask("version"), 3)

    def test_no_preload(self) -> None:
        """With ``--no-preload``, SIGHUP brings new code as well, and keeps the old if it fails."""
        daemon = self.start_version("--no-preload")
        caller = self.connect(daemon)
        (daemon.directory / "tasks.py").write_text("1 / 0\n", encoding="utf-8")
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: "ZeroDivisionError" in (self.failure(daemon) or ""), what="the failure")
        self.assertEqual(caller.ask("version"), 1)
        self.reload(daemon, 2)
        self.assertEqual(caller.ask("version"), 2)

    def test_load(self) -> None:
        """Under a steady load, new code and worn workers cost no caller a reply."""
        daemon = self.start_version("--max-tasks", "400", procs=3)
        with Load(daemon) as load:
            for version in (2, 3, 4):
                self.reload(daemon, version)
                load.wait_for_more()
            wait_until(lambda: daemon.restarts().get("max_tasks", 0) >= 3, what="worn workers")
            load.wait_for_more()
        self.assertEqual(load.failures, [])
        self.assertEqual(daemon.ask("version"), 4)
        self.assertEqual(set(daemon.settled_restarts()), {"reload", "max_tasks"})

    def test_worker_that_starts_meanwhile(self) -> None:
        """A worker of old code that is ready only after the new code's goes, like the others."""
        slow = (
            "\nimport time\nwhile os.path.exists('slow'):\n"
            "    open('importing', 'w').close()\n    time.sleep(0.01)\n"
        )
        text = SAMPLE_TASKS.read_text(encoding="utf-8")
        daemon = self.start(
            "--no-preload",
            procs=1,
            tasks="tasks.py,sample_tasks.py",
            files={"tasks.py": VERSION.format(version=1) + slow, "sample_tasks.py": text},
        )
        before = daemon.workers()
        caller = self.connect(daemon)
        (daemon.directory / "slow").touch()
        self.assert_error(caller.ask("hold_limited", [self.path(daemon)]), "time-limit")
        wait_until((daemon.directory / "importing").exists, what="a worker that starts")
        self.reload(daemon, 2)
        self.wait_for_end_of(*before.values())
        (daemon.directory / "slow").unlink()
        wait_until(lambda: "was replaced: reload" in daemon.log, what="the end of the late one")
        daemon.wait_until_settled()
        for _ in range(10):
            self.assertEqual(daemon.ask("version"), 2)

    def test_dead_worker_meanwhile(self) -> None:
        """A worker that dies while new code is loaded is replaced, and the code comes."""
        daemon = self.start_version()
        before = daemon.workers()
        self.write(daemon, 2, "\nimport time\nopen('loading', 'w').close()\ntime.sleep(0.5)\n")
        daemon.signal(signal.SIGHUP)
        wait_until((daemon.directory / "loading").exists, what="the import")
        daemon.kill(before[1])
        daemon.wait_until_new(before)
        wait_until(lambda: daemon.ask("version") == 2, what="the new code")
        daemon.wait_until_settled()


class StopTests(DaemonTestCase):
    """SIGTERM while tasks wait in the queue."""

    def start_and_queue(self, *options: str, count: int = 5) -> tuple[Daemon, Connection, str, str]:
        """One worker holds a task, and that many wait behind it."""
        daemon = self.start(*options, procs=1)
        caller, notes = self.connect(daemon), self.path(daemon)
        path = self.begin(daemon, caller, "hold", id="hold")
        for number in range(count):
            caller.request("record", [notes, str(number)], id=number)
        self.wait_for_waiting(daemon, count)
        return daemon, caller, path, notes

    def stop_and_see(self, daemon: Daemon) -> None:
        daemon.signal(signal.SIGTERM)
        self.wait_for_log(daemon, "tasks that wait: 5")

    def test_within_grace(self) -> None:
        """Tasks that wait when the stop comes are run, in order, and answered."""
        daemon, caller, path, notes = self.start_and_queue()
        self.stop_and_see(daemon)
        Path(path).touch()
        replies = caller.replies_by_id(6)
        self.assertEqual(replies.pop("hold")["result"], "released")
        self.assertEqual(
            {n: r["result"] for n, r in replies.items()}, {n: str(n) for n in range(5)}
        )
        self.assertEqual(lines_of(notes), ["0", "1", "2", "3", "4"])
        self.assert_goodbye(caller)
        caller.close()
        daemon.wait_until_gone()
        self.assertIn(daemon.wait_for_exit(), (0, -signal.SIGTERM))
        self.assertNotIn("is killed", daemon.log)

    def test_long_replies(self) -> None:
        """What a worker has run for another one's caller is all sent before it goes."""
        daemon = self.start()
        callers = self.connect_to_each(daemon)
        paths = {n: self.begin(daemon, caller, "hold", id="hold") for n, caller in callers.items()}
        for number in range(3):
            callers[1].request("letters", [4_000_000, 0.3], id=number)
        self.wait_for_waiting(daemon, 3)
        callers[2].close()
        daemon.signal(signal.SIGTERM)
        self.wait_for_log(daemon, "tasks that wait: 3")
        Path(paths[2]).touch()  # it runs them all, and has nothing else to stay for
        replies = callers[1].replies_by_id(3)
        self.assertEqual({len(reply.get("result", "")) for reply in replies.values()}, {4_000_000})
        Path(paths[1]).touch()

    def test_of_two_workers(self) -> None:
        """Tasks of two workers' callers that wait at the stop are run by whoever is free."""
        daemon = self.start()
        callers, notes = self.connect_to_each(daemon), self.path(daemon)
        paths = {n: self.begin(daemon, caller, "hold", id="hold") for n, caller in callers.items()}
        for number in range(6):
            callers[1 + number % 2].request("record", [notes, str(number)], id=number)
        self.wait_for_waiting(daemon, 6)
        daemon.signal(signal.SIGTERM)
        self.wait_for_log(daemon, "tasks that wait: 6")
        Path(paths[1]).touch()
        self.assertEqual(set(callers[1].replies_by_id(4)), {"hold", 0, 2, 4})
        self.assertEqual(set(callers[2].replies_by_id(3)), {1, 3, 5})
        Path(paths[2]).touch()
        self.assertEqual(callers[2].reply(), {"id": "hold", "result": "released"})
        for caller in callers.values():
            self.assert_goodbye(caller)
            caller.close()
        daemon.wait_until_gone()
        self.assertNotIn("is killed", daemon.log)

    def test_after_grace(self) -> None:
        """At the end of the grace those are told that have not begun, and run nowhere."""
        daemon, caller, _, notes = self.start_and_queue("--grace", "1")
        self.stop_and_see(daemon)
        replies = caller.replies_by_id(6)
        self.assert_error(replies.pop("hold"), "worker-lost")
        for reply in replies.values():
            error = self.assert_error(reply, "shutting-down")
            self.assertTrue(error["retryable"])
        self.assert_goodbye(caller)
        caller.close()
        daemon.wait_until_gone()
        self.assertEqual(lines_of(notes), [])

    def test_second_signal(self) -> None:
        """A second SIGTERM ends what runs and what waits at once, however long the grace."""
        daemon, caller, path, notes = self.start_and_queue("--grace", "3600")
        self.stop_and_see(daemon)
        daemon.signal(signal.SIGTERM)
        self.assertTrue(caller.is_hung_up())
        daemon.wait_until_gone()
        self.assertEqual(lines_of(notes), [])
        self.assertFalse(self.has_ended(path))

    def test_while_replacing(self) -> None:
        """A stop while workers drain after a reload waits for their tasks as well."""
        daemon = self.start()
        before = daemon.workers()
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id="hold")
        daemon.signal(signal.SIGHUP)
        daemon.wait_until_new(before)
        daemon.signal(signal.SIGTERM)
        self.wait_for_log(daemon, "Received SIGTERM")
        self.assert_not_hung_up(caller)
        Path(path).touch()
        self.assertEqual(caller.reply(), {"id": "hold", "result": "released"})
        caller.close()
        daemon.wait_until_gone()
        self.assertNotIn("is killed", daemon.log)

    def assert_not_hung_up(self, caller: Connection) -> None:
        """The worker answers, though it may refuse what is new."""
        reply: Any = caller.ask("taskd.ping", id="ping")
        self.assertEqual(reply["id"], "ping")
