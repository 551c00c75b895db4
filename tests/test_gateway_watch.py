"""What the daemons are doing, as the dashboards are told."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.error import ConnectError
from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from taskd.client import TaskClient
from taskd.gateway.watch import Node, Watch
from tests.support import Loop, ScriptedDaemon, ScriptedEndpoint, log_of
from tests.test_gateway_site import new_figures

NOBODY = {"code": "unauthorized", "message": "not for you", "retryable": False}


class WatchTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.endpoints = [ScriptedEndpoint(), ScriptedEndpoint()]
        self.figures = new_figures()
        self.shown: list[Any] = []
        nodes = [
            Node(
                name,
                TaskClient(self.loop, endpoint, pool=1, connect_timeout=5.0, jitter=lambda: 0.5),
            )
            for name, endpoint in zip("ab", self.endpoints, strict=True)
        ]
        self.watch = Watch(self.loop, nodes, self.figures, self.loop.seconds, lambda: 1e9)
        self.watch.show = self.shown.append

    def answer(self, daemon: ScriptedDaemon, **told: Any) -> None:
        """Answer what a daemon was asked last."""
        daemon.send(id=daemon.requests[-1]["id"], **told)

    def accept(self) -> list[ScriptedDaemon]:
        return [endpoint.accept() for endpoint in self.endpoints]


class LookTests(WatchTestCase):
    def test_a_look(self) -> None:
        """Each daemon is asked for its status, then for its failures, and all is shown."""
        self.figures.add("websockets", 3)
        self.figures.add("refused_rate", 2)
        self.figures.add("refused_origin", 1)
        self.watch.start()
        first, second = self.accept()
        self.assertEqual(first.requests[0]["function"], "taskd.status")
        self.answer(first, result={"queue": {"waiting": 4}, "functions": []})
        self.assertEqual(first.requests[-1]["function"], "taskd.failures")
        self.answer(first, result=[{"code": "task-failed"}])
        self.answer(second, result={"queue": {"waiting": 1}, "functions": []})
        self.assertEqual(self.shown, [])
        self.answer(second, result=[])
        (news,) = self.shown
        self.assertEqual(news["kind"], "now")
        self.assertEqual(news["sample"]["waiting"], 5)
        self.assertEqual([node["name"] for node in news["nodes"]], ["a", "b"])
        self.assertEqual(news["nodes"][0]["failures"], [{"code": "task-failed"}])
        self.assertIsNone(news["nodes"][0]["error"])
        self.assertEqual((news["gateway"]["websockets"], news["gateway"]["refused"]), (3, 3))
        json.dumps(news)

    def test_once_a_second(self) -> None:
        """The next look begins a second after the last one, and not before that has ended."""
        self.watch.start()
        daemons = self.accept()
        self.loop.advance(0.9)
        self.assertEqual([len(daemon.requests) for daemon in daemons], [1, 1])
        for daemon in daemons:
            self.answer(daemon, result={})
            self.answer(daemon, result=[])
        self.assertEqual(len(self.shown), 1)
        self.loop.advance(0.1)
        for daemon in daemons:
            self.assertEqual(len(daemon.requests), 3)
            self.answer(daemon, result={})
            self.answer(daemon, result=[])
        self.loop.advance(0.9)
        self.assertEqual(len(daemons[0].requests), 4)
        self.loop.advance(0.2)
        self.assertEqual(len(daemons[0].requests), 5)

    def test_what_does_not_tell(self) -> None:
        """A daemon that does not tell, and one that is not there, are shown so, each alone."""
        self.watch.start()
        daemon = self.endpoints[0].accept()
        answered = 0
        for _ in range(40):
            for number in self.endpoints[1].open_attempts:
                self.endpoints[1].refuse(ConnectError(string="no"), number)
            self.loop.advance(0.25)
            for request in daemon.requests[answered:]:
                daemon.send(id=request["id"], error=NOBODY)
            answered = len(daemon.requests)
        first, second = self.shown[-1]["nodes"]
        self.assertEqual(first["error"], "the daemon does not tell: not for you")
        self.assertTrue(second["error"].startswith("the daemon cannot be reached: "), second)
        self.assertEqual((first["status"], second["status"]), (None, None))
        self.assertEqual(self.watch.greeting()["history"], [])

    def test_one_that_is_slow(self) -> None:
        """Who does not answer keeps the others' news for a second, and is shown when it does."""
        self.watch.start()
        first, second = self.accept()
        for seconds in range(1, 4):
            self.answer(first, result={"functions": []})
            self.answer(first, result=[])
            self.loop.advance(1)
            self.assertEqual(len(self.shown), seconds)
            self.assertEqual(self.shown[-1]["nodes"][1]["error"], "the daemon does not answer")
            self.assertIsNotNone(self.shown[-1]["nodes"][0]["status"])
        self.assertEqual(len(second.requests), 1)
        self.answer(second, result={"functions": []})
        self.answer(second, result=[])
        self.answer(first, result={"functions": []})
        self.answer(first, result=[])
        self.loop.advance(1)
        self.assertIsNone(self.shown[-1]["nodes"][1]["error"])

    def test_what_is_logged(self) -> None:
        """That a daemon does not tell is logged once, and so is that it does again."""
        log = log_of(self, "gateway")
        self.watch.start()
        first, second = self.accept()
        for error in ({}, {"error": NOBODY}, {"error": NOBODY}, {}):
            for daemon in (first, second):
                self.answer(daemon, **(error if daemon is first and error else {"result": {}}))
                if daemon is second or not error:
                    self.answer(daemon, result=[])
            self.loop.advance(1)
        self.assertEqual(
            log,
            [
                "warn: a: the daemon does not tell: not for you",
                "info: a: the daemon answers again",
            ],
        )

    def test_no_failures(self) -> None:
        """A daemon that tells its status and no failures is shown with what it tells."""
        self.watch.start()
        for daemon in self.accept():
            self.answer(daemon, result={"functions": []})
            self.answer(daemon, error=NOBODY)
        node = self.shown[0]["nodes"][0]
        self.assertEqual(
            (node["error"], node["status"], node["failures"]), (None, {"functions": []}, None)
        )

    def test_the_greeting(self) -> None:
        """Who comes is shown what there was."""
        self.watch.start()
        for daemon in self.accept():
            self.answer(daemon, result={})
            self.answer(daemon, result=[])
        greeting = self.watch.greeting()
        self.assertEqual(greeting["kind"], "hello")
        self.assertEqual((greeting["version"], greeting["interval"]), (__version__, 1.0))
        self.assertEqual(greeting["history"], [self.shown[0]["sample"]])


class StatusTests(WatchTestCase):
    def test_statuses(self) -> None:
        """For metrics all are asked at once; None is who does not answer."""
        asked = self.watch.statuses()
        first, _ = self.accept()
        self.answer(first, result={"x": 1})
        self.assertNoResult(asked)
        self.loop.advance(3)
        self.assertEqual(self.successResultOf(asked), {"a": {"x": 1}, "b": None})
