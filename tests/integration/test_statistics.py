"""What real daemons tell of each function's calls, and of the latest failures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from tests.integration.callers import by_token
from tests.integration.case import DaemonTestCase
from tests.integration.daemon import Daemon, wait_until

WEB: Final = "web-0123456789abcdef0123456789"
OPS: Final = "ops-fedcba9876543210fedcba9876"


class StatisticsTests(DaemonTestCase):
    def functions(self, daemon: Daemon) -> dict[str, dict[str, Any]]:
        return {function["name"]: function for function in daemon.status()["functions"]}

    def counts(self, daemon: Daemon) -> dict[str, dict[str, int]]:
        """Give how many calls of each function came to what, ``done`` included."""
        return {
            name: {**({"done": f["done"]} if f["done"] else {}), **f["errors"]}
            for name, f in self.functions(daemon).items()
        }

    def wait_for_counts(self, daemon: Daemon, expected: dict[str, dict[str, int]]) -> None:
        """Wait until so much is counted; a reply may be read before that."""
        try:
            wait_until(lambda: self.counts(daemon) == expected, what="the counts")
        except AssertionError:
            self.assertEqual(self.counts(daemon), expected)

    def failures(self, daemon: Daemon, limit: int = 50) -> list[dict[str, Any]]:
        return daemon.ask("taskd.failures", {"limit": limit})

    def test_every_kind(self) -> None:
        """Calls are counted once, by function and what they came to, wherever they ran."""
        daemon = self.start(procs=3)
        self.assertEqual((self.counts(daemon), self.failures(daemon)), ({}, []))
        began = time.time()
        caller = self.connect(daemon)
        for number in range(20):
            caller.request("add", [number, 1], id=number)
            caller.request("at_once", [number], id=100 + number)
            caller.request("later", [number], id=200 + number)
        caller.replies_by_id(60)
        for function in ("fail", "fail_later", "fail_at_once"):
            self.assert_error(caller.ask(function, [f"{function}: no"]), "task-failed")
        self.assert_error(caller.ask("not_json", ["set"]), "task-failed")
        self.assert_error(caller.ask("add", [1]), "bad-arguments")
        self.assert_error(caller.ask("nothing"), "unknown-function")
        self.wait_for_counts(
            daemon,
            {
                "add": {"done": 20, "bad-arguments": 1},
                "at_once": {"done": 20},
                "fail": {"task-failed": 1},
                "fail_at_once": {"task-failed": 1},
                "fail_later": {"task-failed": 1},
                "later": {"done": 20},
                "not_json": {"task-failed": 1},
            },
        )
        functions = self.functions(daemon)
        self.assertEqual(list(functions), sorted(functions))
        for name, ran in (("add", 20), ("later", 20), ("fail", 1)):
            self.assertEqual(sum(functions[name]["latency"].values()), ran)
        self.assertEqual((functions["add"]["failed"], functions["fail"]["failed"]), (1, 1))
        self.assertGreater(functions["later"]["seconds"], 20 * 0.01)
        failures = self.failures(daemon)
        self.assertEqual(
            [(f["function"], f["code"], f["type"]) for f in failures],
            [
                ("not_json", "task-failed", "NotJson"),
                ("fail_at_once", "task-failed", "ArithmeticError"),
                ("fail_later", "task-failed", "LookupError"),
                ("fail", "task-failed", "ValueError"),
            ],
        )
        self.assertEqual(failures[3]["message"], "fail: no")
        for failure in failures:
            self.assertTrue(began - 1 <= failure["at"] <= time.time() + 1, failure)
            self.assertIn(failure["worker"], daemon.workers())
        self.assertEqual(self.failures(daemon, 2), failures[:2])

    def test_what_is_handed_over(self) -> None:
        """Calls that others run are counted once, also those whose time is over meanwhile."""
        daemon = self.start(procs=2)
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id=0)
        # The other worker runs these, while this one answers.
        for number in range(1, 51):
            caller.request("add", [number, 1], id=number)
        caller.request("fail", ["elsewhere"], id=51)
        self.assertEqual(set(caller.replies_by_id(51)), set(range(1, 52)))
        other = self.begin(daemon, caller, "hold", id=52, timeout=1.0)
        self.assert_error(caller.reply(), "time-limit")
        for file in (path, other):
            Path(file).touch()
        self.assertEqual(caller.reply()["result"], "released")
        self.wait_for_counts(
            daemon,
            {
                "add": {"done": 50},
                "fail": {"task-failed": 1},
                "hold": {"done": 1, "time-limit": 1},
            },
        )
        self.assertEqual(
            [(f["function"], f["code"]) for f in self.failures(daemon)],
            [("hold", "time-limit"), ("fail", "task-failed")],
        )

    def test_nothing_is_lost(self) -> None:
        """Counts outlive a kill, a replaced worker and a reload, and go on behind them."""
        daemon = self.start(procs=2)
        callers = self.connect_to_each(daemon)
        for caller in callers.values():
            for number in range(10):
                caller.ask("add", [number, 1])
        self.assert_error(daemon.ask("fail", ["first"]), "task-failed")
        expected = {"add": {"done": 20}, "fail": {"task-failed": 1}}
        self.wait_for_counts(daemon, expected)

        # A worker that dies with a task.
        number, caller = next(iter(callers.items()))
        self.begin(daemon, caller, "hold")
        victim = next(w for w in daemon.status()["workers"] if w["task"] == "hold")
        daemon.kill(victim["pid"])
        self.assertTrue(caller.is_hung_up())
        self.wait_for_log(daemon, "it ran hold")
        daemon.wait_until_settled()
        expected["hold"] = {"worker-lost": 1}
        self.wait_for_counts(daemon, expected)
        lost = self.failures(daemon)[0]
        self.assertEqual(
            (lost["function"], lost["code"], lost["type"], lost["worker"]),
            ("hold", "worker-lost", None, victim["worker"]),
        )
        self.assertIn(f"worker {victim['worker']} was killed by SIGKILL", lost["message"])
        self.assertEqual(number, victim["worker"])

        # One that is replaced, since its thread is lost to a limit.
        reply = daemon.ask("hold_limited", [self.path(daemon)])
        self.assert_error(reply, "time-limit")
        wait_until(lambda: daemon.restarts().get("time_limit"), what="a replacement")
        daemon.wait_until_settled()
        expected["hold_limited"] = {"time-limit": 1}
        self.wait_for_counts(daemon, expected)
        limited = self.functions(daemon)["hold_limited"]
        self.assertGreaterEqual(limited["seconds"], 0.1)
        self.assertEqual(sum(limited["latency"].values()), 1)

        # New code, and all workers new.
        self.load_anew(daemon)
        for _ in range(5):
            daemon.ask("add", [1, 2])
        expected["add"] = {"done": 25}
        self.wait_for_counts(daemon, expected)
        self.assertEqual(
            [(f["function"], f["code"]) for f in self.failures(daemon)],
            [("hold_limited", "time-limit"), ("hold", "worker-lost"), ("fail", "task-failed")],
        )

    def test_its_task_kills_anothers_worker(self) -> None:
        """What dies at another worker is counted once, by who answers its caller."""
        daemon = self.start(procs=2)
        caller = self.connect(daemon)
        path = self.begin(daemon, caller, "hold", id=0)
        caller.request("die", [3], id=1)
        self.assert_error(caller.reply(), "worker-lost")
        Path(path).touch()
        self.assertEqual(caller.reply()["result"], "released")
        daemon.wait_until_settled()
        self.wait_for_counts(daemon, {"die": {"worker-lost": 1}, "hold": {"done": 1}})
        wait_until(lambda: self.failures(daemon), what="the death")
        self.assertEqual(
            [(f["function"], f["code"]) for f in self.failures(daemon)], [("die", "worker-lost")]
        )

    def test_who_may_see_failures(self) -> None:
        """Where ``--allow`` leaves it out, failures are told to nobody else."""
        daemon = self.start(
            "--token-file=tokens",
            "--allow=ops=*",
            "--allow=web=fail,taskd.status",
            secrets={"tokens": f"web:{WEB}\nops:{OPS}\n"},
            caller=by_token(OPS),
        )
        web = by_token(WEB)(daemon)
        self.addCleanup(web.close)
        self.assert_error(web.ask("fail", ["private"]), "task-failed")
        self.assert_error(web.ask("taskd.failures"), "unauthorized")
        self.assertNotIn("private", str(web.ask("taskd.status")))
        self.assertEqual([f["message"] for f in self.failures(daemon)], ["private"])

    def test_hangs(self) -> None:
        """A worker that hangs and is killed for that has lost its task."""
        daemon = self.start(procs=2)
        caller = self.connect(daemon)
        self.begin(daemon, caller, "hold_lock", timeout=0.5)
        self.assertTrue(caller.is_hung_up())
        daemon.wait_until_settled()
        self.wait_for_counts(daemon, {"hold_lock": {"worker-lost": 1}})
        self.assertEqual([f["code"] for f in self.failures(daemon)], ["worker-lost"])
