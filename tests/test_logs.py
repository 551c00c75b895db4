"""What a line of the log looks like, and how a worker's events come into it."""

from __future__ import annotations

import ast
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    Logger,
    LogLevel,
    LogPublisher,
    formatEvent,
)
from twisted.python import log as legacy_log
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

import taskd
from taskd.logs import Forwarder, as_json, as_text, from_worker, observer_for
from tests.support import temporary_directory

OLD = "2026-01-01T00:00:00+0000 [taskd#info] a line that never was"
NASTY = f"first\n{OLD}\r{OLD}\x1b[2Jred\x85\u2028\u202eright to left\ud800 tab\tend"


class Unshowable:
    def __str__(self) -> str:
        raise ValueError("this has no text")

    __repr__ = __str__


def event_of(words: str, *, level: str = "info", room: str = "taskd.test", **fields: Any) -> Any:
    """Give the event that a logger makes."""
    events: list[Any] = []
    logger = Logger(namespace=room, observer=events.append)  # type: ignore[arg-type]
    logger.emit(LogLevel.levelWithName(level), words, **fields)
    return {**events[0], "log_time": 1766664000.25}


def failure_of(error: BaseException) -> Failure:
    """Give what a logger is given of an exception that was raised."""
    try:
        raise error
    except type(error):
        return Failure()


class JsonTests(SynchronousTestCase):
    def written(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Give the object that one event is written as, after it was seen to be one line."""
        text = as_json(event_of(*args, **more))
        self.assertTrue(text.endswith("}\n"))
        self.assertEqual(len(text.splitlines()), 1)
        self.assertTrue(text.isascii())
        written: dict[str, Any] = json.loads(text)
        return written

    def test_an_event(self) -> None:
        """A line has the time, the level, who says it, what, and the event's own fields, flat."""
        line = self.written("worker {worker} is {state}", worker=3, state="gone", room="taskd.x.Y")
        self.assertEqual(
            line,
            {
                "time": "2025-12-25T12:00:00.250000Z",
                "level": "info",
                "logger": "taskd.x",
                "message": "worker 3 is gone",
                "worker": 3,
                "state": "gone",
            },
        )
        self.assertEqual(list(line)[:4], ["time", "level", "logger", "message"])

    def test_the_names_of_others(self) -> None:
        """A logger that is not taskd's keeps its whole name."""
        self.assertEqual(self.written("x", room="my.tasks.Mail")["logger"], "my.tasks.Mail")

    def test_values(self) -> None:
        """What JSON has is kept, and anything else is told as text, whatever it is."""
        line = self.written(
            "x",
            a=True,
            b=None,
            c=0.1234567,
            d=float("nan"),
            e=[1],
            f=10**5000,
            g=Unshowable(),
            h="half \ud800",
        )
        self.assertEqual(
            (line["a"], line["b"], line["c"], line["d"]), (True, None, 0.123457, "nan")
        )
        self.assertEqual((line["e"], line["h"]), ("[1]", "half \\ud800"))
        for name in "fg":
            self.assertIsInstance(line[name], str)

    def test_a_message_that_would_be_several_lines(self) -> None:
        """Whatever a message holds is one line, from which it can be read again."""
        line = self.written("{x}", x=NASTY)
        self.assertEqual(line["message"], NASTY.replace("\ud800", "\\ud800"))

    def test_a_failure(self) -> None:
        """What was raised is a field, and its traceback one string; locals are not told."""
        secret = "hunter2"  # noqa: F841
        line = self.written("it failed", log_failure=failure_of(KeyError("of\nlines")))
        self.assertEqual(line["error"], "KeyError: 'of\\nlines'")
        self.assertIn("Traceback (most recent call last)", line["traceback"])
        self.assertNotIn("hunter2", line["traceback"].replace('secret = "hunter2"', ""))

    def test_reserved_names(self) -> None:
        """A field cannot pass for the time, the level, the logger or the message."""
        line = self.written("true", time="never", message="false", logger="me")
        self.assertEqual((line["message"], line["logger"]), ("true", "taskd.test"))
        self.assertEqual(line["time"], "2025-12-25T12:00:00.250000Z")

    def test_the_older_way_to_log(self) -> None:
        """What was logged the older way is a line like all others."""
        publisher: list[Any] = []
        legacy_log.addObserver(publisher.append)
        self.addCleanup(legacy_log.removeObserver, publisher.append)
        legacy_log.msg("an old", "message", custom=5)
        line = json.loads(as_json(publisher[0]))
        self.assertEqual((line["message"], line["custom"]), ("an old message", 5))
        self.assertEqual(line["level"], "info")
        self.assertNotIn("isError", line)

    def test_a_format_that_cannot_be(self) -> None:
        """An event that cannot be formatted is a line all the same."""
        self.assertIn("missing", self.written("{missing}")["message"])


class TextTests(SynchronousTestCase):
    def test_as_twistd_does(self) -> None:
        """A plain event is written as twistd writes it."""
        text = as_text(event_of("worker {n}", n=3))
        assert text is not None
        self.assertRegex(text, r"^2025-12-25T\S+ \[taskd\.test#info\] worker 3\n$")

    def test_nothing_to_write(self) -> None:
        """An event without words is not written."""
        self.assertIsNone(as_text({"log_level": LogLevel.info}))

    def test_a_message_of_several_lines(self) -> None:
        """Further lines of a message are indented, and nothing else ends a line or steers."""
        text = as_text(event_of("{x}", x=NASTY))
        assert text is not None
        lines = text.splitlines()
        self.assertEqual(len(lines), 2)
        self.assertTrue(lines[1].startswith("\t2026-01-01"))
        for shown in (r"\r2026", r"\x1b[2Jred\x85\u2028\u202eright", r"left\ud800 tab"):
            self.assertIn(shown, lines[1])

    def test_a_name_of_several_lines(self) -> None:
        """Who logs cannot have a line of its own either."""
        text = as_text(event_of("x", room=f"a\n{OLD}"))
        assert text is not None
        self.assertEqual([line for line in text.splitlines() if line == OLD], [])


class ForwardTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.sent: list[bytes] = []
        self.now = 100.0
        self.running: dict[str, str] = {}

    def forwarder(self, level: str = "info") -> Callable[[Any], None]:
        return Forwarder(level, self.sent.append, lambda: self.running)

    def forward(self, *args: Any, **more: Any) -> dict[str, Any]:
        """Give the event that the supervisor has of one that a worker logs."""
        self.forwarder()(event_of(*args, **more))
        return self.arrived(self.sent.pop())

    def arrived(self, message: bytes) -> dict[str, Any]:
        self.assertEqual(message.count(b"\n"), 1)
        verb, _, rest = message.rstrip(b"\n").partition(b" ")
        self.assertEqual(verb, b"log")
        return from_worker(3, 4321, rest)

    def test_what_arrives(self) -> None:
        """An event arrives with its time, level, logger and fields, and with who has sent it."""
        event = self.forward(
            "{function} failed",
            level="warn",
            room="taskd.executor.Executor",
            function="report",
            id='"a"',
            connection="10.0.0.1 port 5",
            caller="web",
            worker="nobody",
        )
        line = json.loads(as_json(event))
        self.assertEqual(
            line,
            {
                "time": "2025-12-25T12:00:00.250000Z",
                "level": "warn",
                "logger": "taskd.executor",
                "message": "report failed",
                "function": "report",
                "id": '"a"',
                "connection": "10.0.0.1 port 5",
                "caller": "web",
                "worker": 3,
                "pid": 4321,
            },
        )

    def test_for_people(self) -> None:
        """As text it says which worker it was, and what the message does not say of the task."""
        event = self.forward(
            "{connection}: {x}", x="{y}", id="7", connection="10.0.0.1 port 5", caller="web"
        )
        self.assertEqual(formatEvent(event), "worker 3: 10.0.0.1 port 5: {y} (id 7, caller web)")
        self.assertEqual(formatEvent(self.forward("a")), "worker 3: a")

    def test_a_failure(self) -> None:
        """What was raised arrives as text, below the message for people."""
        event = self.forward("it failed", log_failure=failure_of(ValueError("no")))
        self.assertIn("it failed\nTraceback (most", formatEvent(event))
        line = json.loads(as_json(event))
        self.assertEqual((line["message"], line["error"]), ("it failed", "ValueError: no"))

    def test_levels(self) -> None:
        """Nothing is sent that is below the lowest level."""
        for level, count in (("debug", 4), ("info", 3), ("warn", 2), ("error", 1)):
            forward = self.forwarder(level)
            for said in ("debug", "info", "warn", "critical"):
                forward(event_of("x", level=said))
            self.assertEqual(len(self.sent), count)
            self.sent.clear()

    def test_size(self) -> None:
        """However long an event is, little of it is sent, and of a traceback both ends."""
        much = "é" * 10**6
        failure = failure_of(ValueError(f"begin {much} end"))
        fields = {f"field{n}": much for n in range(100)}
        self.forwarder()(event_of("{x}", x=much, log_failure=failure, **fields))
        self.assertLess(len(self.sent[0]), 400_000)
        traceback = self.arrived(self.sent[0])["traceback"]
        self.assertTrue(traceback.startswith("Traceback (most"))
        self.assertTrue(traceback.rstrip().endswith("end"))
        self.assertLess(len(traceback), 17_000)

    def test_many(self) -> None:
        """Of very many events some are left out, and how many is said with the next."""
        forward = self.forwarder()
        for _ in range(5000):
            forward(event_of("x"))
        self.assertEqual(len(self.sent), 1000)
        later = {**event_of("y"), "log_time": 1766664000.25 + 0.025}
        forward(later)
        forward(later)
        self.assertEqual(len(self.sent), 1002)
        event = self.arrived(self.sent[1000])
        self.assertEqual(event["dropped"], 4000)
        self.assertEqual(formatEvent(event), "worker 3: y (4000 before it were left out)")
        self.assertNotIn("dropped", self.arrived(self.sent[1001]))

    def test_a_clock_that_goes_back(self) -> None:
        """When the clock is set back, events are sent on."""
        forward = self.forwarder()
        for time in (1e9, 1.0, 2.0):
            forward({**event_of("x"), "log_time": time})
        self.assertEqual(len(self.sent), 3)

    def test_a_task_that_logs(self) -> None:
        """What a task logs itself says which call's it is; what taskd says, says that itself."""
        self.running = {"function": "report", "id": "7", "connection": "c"}
        event = self.forward("halfway", room="my.tasks", id="own")
        self.assertEqual(
            (event["function"], event["id"], event["connection"]), ("report", "own", "c")
        )
        self.assertNotIn("function", self.forward("x", room="taskd.door.Door"))


class ObserverTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        self.directory = temporary_directory(self)
        os.chdir(self.directory)
        before = signal.getsignal(signal.SIGUSR1)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    def logged(self, log_format: str, level: str, **twistd: Any) -> str:
        """Give what is written to stdout of one event of each level."""
        with redirect_stdout(io.StringIO()) as out:
            observer = observer_for(log_format, level, twistd)
        self.assertTrue(ILogObserver.providedBy(observer))
        for said in ("debug", "info", "warn", "error", "critical"):
            observer(event_of("{x}", x=said, level=said))
        return out.getvalue()

    def test_standard_output(self) -> None:
        """In the foreground the log goes to stdout, in the format and from the level asked for."""
        for more in ({}, {"logfile": "-"}):
            lines = self.logged("json", "warn", nodaemon=True, **more).splitlines()
            levels = [json.loads(line)["level"] for line in lines]
            self.assertEqual(levels, ["warn", "error", "critical"])
        text = self.logged("text", "debug", nodaemon=True)
        self.assertEqual(len(text.splitlines()), 5)
        self.assertIn("[taskd.test#debug] debug", text)

    def test_a_file(self) -> None:
        """With a file, and in the background, the log goes there, and stdout has nothing."""
        self.assertEqual(self.logged("json", "error", nodaemon=True, logfile="my.log"), "")
        self.assertEqual(self.logged("text", "error"), "")
        lines = (self.directory / "my.log").read_text().splitlines()
        self.assertEqual([json.loads(line)["message"] for line in lines], ["error", "critical"])
        text = (self.directory / "twistd.log").read_text()
        self.assertEqual(len(text.splitlines()), 2)
        self.assertTrue(callable(signal.getsignal(signal.SIGUSR1)))

    def test_a_handler_that_is_there(self) -> None:
        """Somebody else's handler of SIGUSR1 stays."""
        signal.signal(signal.SIGUSR1, print)
        self.logged("json", "info", logfile="my.log")
        self.assertIs(signal.getsignal(signal.SIGUSR1), print)

    def test_no_terminal(self) -> None:
        """In the background the log cannot go to stdout."""
        self.assertRaises(SystemExit, observer_for, "json", "info", {"logfile": "-"})

    def test_syslog(self) -> None:
        """With twistd's --syslog nothing goes to stdout or a file, in either format."""
        for log_format in ("text", "json"):
            said = self.logged(log_format, "error", syslog=True, prefix="taskd-test", nodaemon=True)
            self.assertEqual(said, "")
        self.assertEqual(os.listdir(self.directory), [])

    def test_it_observes(self) -> None:
        """The observer takes what a publisher gives."""
        with redirect_stdout(io.StringIO()) as out:
            observer = observer_for("json", "info", {"nodaemon": True})
        self.assertIsInstance(observer, FilteringLogObserver)
        Logger(namespace="a", observer=LogPublisher(observer)).info("hello")
        self.assertEqual(json.loads(out.getvalue())["message"], "hello")
        self.assertIsNot(sys.stdout, out)


class DocumentTests(SynchronousTestCase):
    """``docs/operations.rst`` says what is in the log."""

    LEVELS = ("debug", "info", "warn", "error", "critical", "failure")
    ARGUMENTS = ("failure", "level", "log_text")
    OF_CALLERS = ("connection",)
    """A room of the caller's side, which logs in another program."""

    def calls(self) -> Iterator[ast.Call]:
        """Give each place in the code at which something is logged."""
        for path in Path(taskd.__file__).parent.glob("*.py"):
            if path.stem not in self.OF_CALLERS:
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                        logger = ast.unparse(node.func.value)
                        is_log = logger.endswith("log") or logger.startswith("Logger(")
                        if is_log and node.func.attr in (*self.LEVELS, "emit"):
                            yield node

    def setUp(self) -> None:
        path = Path(__file__).parent.parent / "docs" / "operations.rst"
        self.document = " ".join(path.read_text().split())

    def test_lines(self) -> None:
        """Every line that the code has is there, in the code's own words."""
        words = [
            node.args[0].value
            for node in self.calls()
            if node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ]
        self.assertGreater(len(words), 20)
        missing = {w for w in words if w != "{log_text}" and f"``{w}``" not in self.document}
        self.assertEqual(missing, set())

    def test_fields(self) -> None:
        """Every field that the code gives is there."""
        fields = {keyword.arg for node in self.calls() for keyword in node.keywords}
        fields -= {None, *self.ARGUMENTS}
        self.assertGreater(len(fields), 15)
        self.assertEqual({f for f in fields if f"``{f}`` " not in self.document}, set())
