"""What a caller of a running daemon sees: tasks, replies, their order, errors."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd import __version__
from tests.integration.daemon import (
    Connection,
    Daemon,
    Process,
    shared_daemon,
    touch_if_possible,
    wait_until,
)


class ServingTestCase(SynchronousTestCase):
    """Base of tests that ask one worker over one connection."""

    def setUp(self) -> None:
        self.daemon = self.make_daemon()
        self.connection = self.connect()

    def make_daemon(self) -> Daemon:
        return shared_daemon(procs=1)

    def connect(self) -> Connection:
        connection = self.daemon.connect()
        self.addCleanup(connection.close)
        return connection

    def path(self) -> str:
        """Name a file that is not there; at the end it is, so that no task holds for it."""
        path = self.daemon.directory / uuid.uuid4().hex
        self.addCleanup(touch_if_possible, path)
        return str(path)

    def release(self, path: str) -> None:
        """Let the task that holds for a file end, and see it end."""
        wait_until(lambda: os.path.exists(path + ".begun"), what="a task's begin")
        Path(path).touch()
        wait_until(lambda: os.path.exists(path + ".ended"), what="a task's end")

    def assert_error(self, reply: Any, code: str, *words: str) -> dict[str, Any]:
        self.assertEqual(reply["error"]["code"], code, reply)
        for word in words:
            self.assertIn(word, reply["error"]["message"])
        return reply["error"]

    def assert_hung_up(self, connection: Connection) -> None:
        self.assertEqual(connection.rest(), b"")

    def assert_serves(self, connection: Connection) -> None:
        self.assertEqual(connection.ask("add", [20, 22]), 42)


class KindTests(ServingTestCase):
    def test_plain_function(self) -> None:
        """A plain function is called with positional or with named arguments."""
        self.assertEqual(self.connection.ask("add", [1, 2]), 3)
        self.assertEqual(self.connection.ask("add", {"a": 3, "b": 4}), 7)

    def test_async_function(self) -> None:
        """An ``async def`` is awaited."""
        self.assertEqual(self.connection.ask("later", [["a", 1]]), ["a", 1])

    def test_deferred(self) -> None:
        """A function that returns a Deferred is answered when that fires."""
        self.assertEqual(self.connection.ask("later_deferred", ["b"]), "b")

    def test_inline_callbacks(self) -> None:
        """A function of ``inlineCallbacks`` is run to its end."""
        self.assertEqual(self.connection.ask("later_inline", ["c"]), "c")

    def test_not_blocking(self) -> None:
        """A function that does not block may return a value or a Deferred."""
        self.assertEqual(self.connection.ask("at_once", [{"d": None}]), {"d": None})
        self.assertEqual(self.connection.ask("later_unannotated", ["e"]), "e")

    def test_deferred_by_mistake(self) -> None:
        """A Deferred out of a thread is a failure that tells what to write."""
        reply = self.connection.ask("deferred_by_mistake", [1])
        self.assert_error(reply, "task-failed", "blocking=False")

    def test_threads(self) -> None:
        """A plain function runs in a thread of its own, an ``async def`` in the main thread."""
        self.assertNotEqual(self.connection.ask("thread_of_blocking"), "MainThread")
        self.assertEqual(self.connection.ask("thread_of_async"), "MainThread")

    def test_own_name(self) -> None:
        """A task is called by the name that ``@task(name=…)`` gave it."""
        self.assertEqual(self.connection.ask("mail.from", ["a", "b"]), ["a", "b"])
        self.assert_error(self.connection.ask("mail_from", ["a"]), "unknown-function")

    def test_reserved_word(self) -> None:
        """The keyword ``from`` binds the parameter ``from_``."""
        self.assertEqual(self.connection.ask("mail.from", {"from": "me"}), ["me", "nobody"])

    def test_reserved_word_twice(self) -> None:
        """``from`` and ``from_`` together are bad arguments."""
        reply = self.connection.ask("mail.from", {"from": "me", "from_": "you"})
        self.assert_error(reply, "bad-arguments", "from_")

    def test_echo(self) -> None:
        """The built-in ``echo`` gives back one argument, several, or named ones."""
        self.assertEqual(self.connection.ask("echo", ["hello"]), "hello")
        self.assertEqual(self.connection.ask("echo", [1, [2]]), [1, [2]])
        self.assertEqual(self.connection.ask("echo", {"a": "é"}), {"a": "é"})
        self.assertIsNone(self.connection.ask("echo"))


class WireTests(ServingTestCase):
    def test_bare_result(self) -> None:
        """Without an id the reply is the bare result, on one line."""
        self.connection.send(b'{"function": "echo", "args": [{"k": [1, 2.5, null, "\xc3\xa9"]}]}\n')
        self.assertEqual(self.connection.line(), '{"k":[1,2.5,null,"é"]}\n'.encode())

    def test_carriage_return(self) -> None:
        """A carriage return before the line feed is tolerated."""
        self.connection.send('{"function": "add", "args": [1, 2]}\r\n')
        self.assertEqual(self.connection.reply(), 3)

    def test_empty_lines(self) -> None:
        """Empty lines are keep-alives: nothing answers them."""
        self.connection.send('\n\r\n\r\r\n\n{"function": "add", "args": [1, 2]}\n\n')
        self.assertEqual(self.connection.reply(), 3)
        self.assert_serves(self.connection)

    def test_no_arguments(self) -> None:
        """``"args": []``, ``"args": {}`` and no ``args`` all mean no arguments."""
        for args in ({"args": []}, {"args": {}}, {}):
            self.connection.send(json.dumps({"function": "taskd.ping", **args}) + "\n")
            self.assertEqual(self.connection.reply(), "pong")

    def test_ids(self) -> None:
        """Every JSON value can be an id and comes back as it was."""
        for given in ("a", 1, 1.5, None, True, [1, {"x": []}], 10**30, "é\u2028", ""):
            reply = self.connection.ask("add", [1, 2], id=given)
            self.assertEqual(reply, {"id": given, "result": 3})

    def test_replies_with_ids_overtake(self) -> None:
        """With ids a quick task is answered before a slow one that came first."""
        self.connection.request("wait_for_signal", ["overtake"], id="slow")
        self.connection.request("add", [1, 2], id="quick")
        self.assertEqual(self.connection.reply(), {"id": "quick", "result": 3})
        self.connection.request("give_signal", ["overtake"], id="signal")
        self.assertEqual(
            self.connection.replies_by_id(2),
            {
                "signal": {"id": "signal", "result": "given"},
                "slow": {"id": "slow", "result": "came"},
            },
        )

    def test_replies_without_ids_keep_order(self) -> None:
        """Without ids tasks run side by side, and replies come in the order of the requests."""
        self.connection.request("wait_for_signal", ["order"])
        self.connection.request("echo", ["quick"])
        self.connection.request("no_such_task")
        self.connection.request("later", ["also quick"])
        # It ends the first one, which shows that they run side by side.
        self.connection.request("give_signal", ["order"])
        replies = [self.connection.reply() for _ in range(5)]
        self.assert_error(replies.pop(2), "unknown-function")
        self.assertEqual(replies, ["came", "quick", "also quick", "given"])

    def test_ids_do_not_wait_for_order(self) -> None:
        """A reply with an id does not wait for those without."""
        self.connection.request("wait_for_signal", ["mixed"])
        self.assertEqual(self.connection.ask("add", [1, 2], id=7), {"id": 7, "result": 3})
        self.connection.request("give_signal", ["mixed"])
        self.assertEqual([self.connection.reply(), self.connection.reply()], ["came", "given"])

    def test_pipelining(self) -> None:
        """A thousand requests in one write are each answered once."""
        names = ("add", "at_once", "later")
        lines = [
            json.dumps(
                {
                    "function": names[n % 3],
                    "args": [n, 1] if n % 3 == 0 else [n + 1],
                    "id": n,
                }
            )
            for n in range(1000)
        ]
        self.connection.send("\n".join(lines) + "\n")
        replies = self.connection.replies_by_id(1000)
        self.assertEqual(
            {n: reply["result"] for n, reply in replies.items()}, {n: n + 1 for n in range(1000)}
        )

    def test_pipelining_in_order(self) -> None:
        """A thousand requests without ids are answered in their order."""
        for n in range(1000):
            self.connection.request("later" if n % 3 else "at_once", [n])
        self.assertEqual([self.connection.reply() for _ in range(1000)], list(range(1000)))

    def test_request_in_pieces(self) -> None:
        """A request may come byte by byte, and the next one begin in the same piece."""
        for byte in b'{"function": "add", "args": [1, 2]}':
            self.connection.send(bytes([byte]))
        self.connection.send('\n{"function": "add", "args"')
        self.assertEqual(self.connection.reply(), 3)
        self.connection.send(": [3, 4]}\n")
        self.assertEqual(self.connection.reply(), 7)

    def test_large_messages(self) -> None:
        """Almost a megabyte goes in, and several come out."""
        text = "é" * 500_000
        self.connection.send(
            json.dumps({"function": "echo", "args": [text]}, ensure_ascii=False) + "\n"
        )
        self.assertEqual(self.connection.reply(), text)
        self.assertEqual(len(self.connection.ask("letters", [5_000_000])), 5_000_000)

    def test_half_close(self) -> None:
        """A caller that closes its sending side still gets every reply, then the end."""
        path = self.path()
        self.connection.request("hold", [path])
        self.connection.request("later", ["second"])
        self.connection.half_close()
        # Only now can the first task end.
        self.release(path)
        self.assertEqual(self.connection.rest(), b'"released"\n"second"\n')

    def test_half_close_is_over_with_the_reply(self) -> None:
        """When a caller that has half-closed is answered, the daemon keeps no connection for it."""
        before = self.daemon.status()["totals"]["connections"]
        caller = self.connect()
        caller.request("later", ["done"])
        caller.half_close()
        self.assertEqual(caller.rest(), b'"done"\n')
        wait_until(
            lambda: self.daemon.status()["totals"]["connections"] == before,
            1.0,
            what="the connection's end",
        )

    def test_half_close_without_request(self) -> None:
        """A caller that half-closes and is owed nothing is hung up on."""
        self.assert_serves(self.connection)
        self.connection.half_close()
        self.assert_hung_up(self.connection)

    def test_gone_caller(self) -> None:
        """A caller that goes away without waiting harms nobody, and its task runs on."""
        path = self.path()
        caller = self.daemon.connect()
        caller.request("hold", [path])
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        caller.close()
        self.release(path)
        self.assert_serves(self.connection)


class ProgressTests(ServingTestCase):
    def test_steps(self) -> None:
        """Each report comes while the task runs, all of them before the result."""
        self.connection.request("walk", [2], id="w", progress=True)
        for step in (1, 2):
            self.assertEqual(
                self.connection.reply(),
                {"id": "w", "progress": {"done": step, "total": 2, "message": f"step {step}"}},
            )
            self.assertEqual(self.connect().ask("give_signal", ["step"]), "given")
        self.assertEqual(self.connection.reply(), {"id": "w", "result": "there"})

    def test_blocking_task(self) -> None:
        """What a blocking task reports only grows, and the last report comes before the result."""
        self.connection.request("count", [500], id=1, progress=True)
        done = []
        while "progress" in (reply := self.connection.reply()):
            self.assertEqual(reply["progress"]["total"], 500)
            done.append(reply["progress"]["done"])
        self.assertEqual(reply, {"id": 1, "result": 500})
        self.assertEqual(done, sorted(set(done)))
        self.assertEqual(done[-1], 500)

    def test_not_asked_for(self) -> None:
        """Who does not ask for progress gets none."""
        self.assertEqual(self.connection.ask("count", [5], id=1), {"id": 1, "result": 5})
        self.assertEqual(self.connection.ask("count", [5]), 5)

    def test_needs_an_id(self) -> None:
        """Progress without an id is refused, since it could not be told apart."""
        reply = self.connection.ask("count", [5], progress=True)
        self.assert_error(reply, "malformed", "id")


class ClosingErrorTests(ServingTestCase):
    """Errors that end the conversation."""

    def test_malformed(self) -> None:
        """What is no request is answered, and then the connection is closed."""
        lines = (
            b"hello",
            b"[]",
            b"{}",
            b'{"function": 1}',
            b'{"function": "add", "args": 1}',
            b'{"function": "add", "argument": []}',
            b'{"function": "add", "timeout": 0}',
            b'{"function": "add", "timeout": "1"}',
            b'{"function": "echo", "args": [NaN]}',
            b'{"function": "echo", "args": [1e400]}',
            b'{"function": "echo", "args": [01]}',
            b'{"function": "echo", "args": ["\\ud800"]}',
            b'{"function": "echo", "function": "add"}',
            b'{"function": "echo", "args": ["\xff"]}',
            b'{"function": "echo", "args": ' + b"[" * 100 + b"]" * 100 + b"}",
            b'{"function": "echo", "args": [1]} {"function": "echo"}',
        )
        for line in lines:
            connection = self.connect()
            connection.send(line + b"\n")
            self.assert_error(connection.reply(), "malformed")
            self.assert_hung_up(connection)
        self.assert_serves(self.connection)

    def test_malformed_with_id(self) -> None:
        """If a malformed request's id can be read, the answer carries it."""
        reply = self.connection.ask("add", [1, 2], id=9, colour="red")
        self.assertEqual(reply["id"], 9)
        self.assert_error(reply, "malformed", "colour")
        self.assert_hung_up(self.connection)

    def test_nothing_behind_it_is_read(self) -> None:
        """A request behind a malformed line never runs, in the same write or a later one."""
        path = self.path()
        request = json.dumps({"function": "touch", "args": [path]}) + "\n"
        self.connection.send("GARBAGE\n" + request)
        self.assert_error(self.connection.reply(), "malformed")
        self.connection.send(request)
        self.assert_hung_up(self.connection)
        # The one worker's one thread would have run it before this.
        self.assert_serves(self.connect())
        self.assertFalse(os.path.exists(path))

    def test_browser(self) -> None:
        """A web page's POST with a request in its body is cut off, and runs nothing."""
        path = self.path()
        body = json.dumps({"function": "touch", "args": [path]}) + "\n"
        self.connection.send(
            "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
        self.assertTrue(self.connection.is_hung_up())
        self.assert_serves(self.connect())
        self.assertFalse(os.path.exists(path))

    def test_earlier_requests_are_answered(self) -> None:
        """What came before a malformed line is answered first, then the error, then the end."""
        path = self.path()
        self.connection.request("hold", [path])
        self.connection.request("later", [2], id="later")
        self.connection.send("GARBAGE\n")
        self.release(path)
        replies: Iterable[Any] = [self.connection.reply() for _ in range(3)]
        in_order = [reply for reply in replies if reply != {"id": "later", "result": 2}]
        self.assertEqual(len(in_order), 2)
        self.assertEqual(in_order[0], "released")
        self.assert_error(in_order[1], "malformed")
        self.assert_hung_up(self.connection)

    def test_unfinished_line(self) -> None:
        """A last line without its line feed is malformed; it does not run."""
        path = self.path()
        self.connection.send(json.dumps({"function": "touch", "args": [path]}))
        self.connection.half_close()
        self.assert_error(self.connection.reply(), "malformed", "line feed")
        self.assert_hung_up(self.connection)
        self.assert_serves(self.connect())
        self.assertFalse(os.path.exists(path))

    def test_line_too_long(self) -> None:
        """A line above the limit is answered before it ends, then the connection is closed."""
        self.connection.send(b'{"function": "echo", "args": ["' + b"x" * (1024 * 1024 + 10))
        self.assert_error(self.connection.reply(), "line-too-long", "1048576", "--max-line")
        self.assert_hung_up(self.connection)


class ErrorTests(ServingTestCase):
    """Errors that leave the connection as it is."""

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.assert_serves, self.connection)

    def test_unknown_function(self) -> None:
        """A function that is not registered is not called, whatever Python knows by its name."""
        for name in ("no_such_task", "os.system", "__import__", "print", "", "sub" * 100, "é"):
            error = self.assert_error(self.connection.ask(name, ["x"]), "unknown-function")
            self.assertFalse(error["retryable"])

    def test_bad_arguments(self) -> None:
        """Arguments that do not fit are refused by a message that names the parameter."""
        cases: tuple[tuple[Any, str], ...] = (
            ([1], "'b'"),
            ([], "'a'"),
            ({"a": 1}, "'b'"),
            ({"a": 1, "b": 2, "c": 3}, "'c'"),
            ([1, 2, 3], "too many"),
        )
        for args, word in cases:
            self.assert_error(self.connection.ask("add", args, id=1), "bad-arguments", word)

    def test_task_failed(self) -> None:
        """What a task raises comes back as its type and its message, without the traceback."""
        for name, kind in (
            ("fail", "ValueError"),
            ("fail_later", "LookupError"),
            ("fail_at_once", "ArithmeticError"),
        ):
            reply = self.connection.ask(name, ["It is é"], id=name)
            self.assertEqual(
                reply,
                {
                    "id": name,
                    "error": {
                        "code": "task-failed",
                        "message": "It is é",
                        "retryable": False,
                        "type": kind,
                    },
                },
            )

    def test_failure_is_logged(self) -> None:
        """The traceback of a task that failed is in the daemon's log, with the task's name."""
        for name in ("fail", "fail_later", "fail_at_once"):
            word = f"logged-{uuid.uuid4().hex}"
            self.connection.ask(name, [word])
            wait_until(lambda word=word: word in self.daemon.log, what="the failure in the log")
            told = self.daemon.log.partition(f"{name} failed")[2]
            self.assertIn("Traceback (most recent call last)", told)
            self.assertIn("sample_tasks.py", told)

    def test_system_exit(self) -> None:
        """A task that raises SystemExit or KeyboardInterrupt fails; its worker goes on."""
        before = self.daemon.workers()
        for name in ("leave", "leave_later"):
            for kind, type_name in (("exit", "SystemExit"), ("interrupt", "KeyboardInterrupt")):
                error = self.assert_error(self.connection.ask(name, [kind]), "task-failed")
                self.assertEqual(error["type"], type_name)
        self.assert_serves(self.connection)
        self.assertEqual(self.daemon.workers(), before)

    def test_result_that_is_not_json(self) -> None:
        """A result that JSON cannot carry is a failure that names the type."""
        for kind, word in (
            ("set", "set"),
            ("bytes", "bytes"),
            ("nan", "NaN"),
            ("infinity", "Infinity"),
            ("keys", "keys are strings"),
            ("object", "object"),
            ("surrogate", "surrogate"),
            ("loop", "nested"),
        ):
            self.assert_error(self.connection.ask("not_json", [kind]), "task-failed", word)

    def test_time_limit_of_async_task(self) -> None:
        """An async task is cancelled at its caller's time limit."""
        path = self.path()
        reply = self.connection.ask("tell_of_cancel", [path], id=1, timeout=0.1)
        self.assert_error(reply, "time-limit", "tell_of_cancel", "0.1 s")
        wait_until(lambda: os.path.exists(path), what="the task's note")

    def test_time_limit_of_its_own(self) -> None:
        """A task's own limit holds, also for a caller that would give it more."""
        path = self.path()
        reply = self.connection.ask("tell_of_own_limit", [path], timeout=3600)
        self.assert_error(reply, "time-limit")
        wait_until(lambda: os.path.exists(path), what="the task's note")

    def test_time_limit_of_blocking_task(self) -> None:
        """A blocking task is answered for at its limit, and the worker it is stuck in replaced."""
        for name, members in (("hold", {"timeout": 0.1}), ("hold_limited", {})):
            before, path = self.daemon.workers(), self.path()
            reply = self.connection.ask(name, [path], id=1, **members)
            self.assert_error(reply, "time-limit", name)
            self.daemon.wait_until_new(before)
            self.daemon.wait_until_settled()
            self.assertFalse(os.path.exists(path + ".ended"))
            self.assert_serves(self.connection)

    def test_time_limit_while_waiting(self) -> None:
        """A task that waits behind another one comes to its limit there, and never begins."""
        holding, waiting = self.path(), self.path()
        self.connection.request("hold", [holding], id="holding")
        reply = self.connection.ask("hold", [waiting], id="waiting", timeout=0.1)
        self.assertEqual(reply["id"], "waiting")
        self.assert_error(reply, "time-limit")
        self.release(holding)
        self.assertEqual(self.connection.reply(), {"id": "holding", "result": "released"})
        self.assert_serves(self.connection)
        self.assertFalse(os.path.exists(waiting + ".begun"))

    def test_cancel(self) -> None:
        """``taskd.cancel`` ends a call by its id, and stops an async task."""
        path = self.path()
        self.connection.request("tell_of_cancel", [path], id={"job": 1})
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        self.connection.request("taskd.cancel", {"id": {"job": 1}}, id="c")
        replies = [self.connection.reply(), self.connection.reply()]
        self.assertIn({"id": "c", "result": True}, replies)
        replies.remove({"id": "c", "result": True})
        self.assertEqual(replies[0]["id"], {"job": 1})
        self.assert_error(replies[0], "cancelled", "tell_of_cancel")
        wait_until(lambda: os.path.exists(path), what="the task's note")

    def test_cancel_of_blocking_task(self) -> None:
        """A blocking task that is cancelled is answered for at once, and its worker replaced."""
        before, path = self.daemon.workers(), self.path()
        self.connection.request("hold", [path], id=1)
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        self.connection.request("taskd.cancel", [1], id=2)
        replies = self.connection.replies_by_id(2)
        self.assert_error(replies[1], "cancelled")
        self.assertIs(replies[2]["result"], True)
        self.daemon.wait_until_new(before)
        self.daemon.wait_until_settled()
        self.assertFalse(os.path.exists(path + ".ended"))
        self.assert_serves(self.connection)

    def test_cancel_of_nothing(self) -> None:
        """Nothing under that id, or on another connection, is not cancelled."""
        path = self.path()
        self.connection.request("tell_of_cancel", [path], id="mine")
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        self.assertIs(self.connect().ask("taskd.cancel", {"id": "mine"}), False)
        self.assertIs(self.connection.ask("taskd.cancel", {"id": "other"}), False)
        self.connection.request("taskd.cancel", {"id": "mine"}, id=0)
        replies = self.connection.replies_by_id(2)
        self.assertIs(replies[0]["result"], True)
        self.assert_error(replies["mine"], "cancelled")


class OwnFunctionTests(ServingTestCase):
    """What the daemon itself can be asked, of more than one worker."""

    def make_daemon(self) -> Daemon:
        return shared_daemon(procs=3)

    def test_ping(self) -> None:
        """``taskd.ping`` answers "pong"."""
        self.assertEqual(self.connection.ask("taskd.ping"), "pong")

    def test_functions(self) -> None:
        """``taskd.functions`` lists names, signatures, docs, kinds and limits."""
        found = {entry["name"]: entry for entry in self.connection.ask("taskd.functions")}
        self.assertEqual(
            found["add"],
            {
                "name": "add",
                "signature": "(a: 'int', b: 'int') -> 'int'",
                "doc": "Add two numbers.",
                "kind": "thread",
                "timeout": None,
            },
        )
        self.assertEqual(found["hold_limited"]["timeout"], 0.1)
        self.assertEqual(
            {found[name]["kind"] for name in ("later_deferred", "later_inline", "at_once")},
            {"reactor"},
        )
        self.assertEqual(found["later"]["kind"], "coroutine")
        for name in ("echo", "send_mail", "taskd.ping", "taskd.status", "taskd.cancel"):
            self.assertIn(name, found)
        self.assertNotIn("skip", found["taskd.cancel"]["signature"])

    def test_status(self) -> None:
        """``taskd.status`` tells of the supervisor, of each worker, and the totals."""
        status = self.connection.ask("taskd.status")
        self.assertEqual(status["version"], __version__)
        self.assertEqual(status["supervisor"]["pid"], self.daemon.pid)
        self.assertEqual([worker["worker"] for worker in status["workers"]], [1, 2, 3])
        for worker in status["workers"]:
            process = Process.read(worker["pid"])
            assert process is not None
            self.assertEqual(process.parent, self.daemon.zygote)
            self.assertGreater(worker["uptime"], 0)
        self.assertIn(status["answered_by"], (1, 2, 3))
        self.assertEqual(sum(status["totals"]["workers"].values()), 3)
        self.assertEqual(
            status["totals"]["restarts"],
            dict.fromkeys(("died", "time_limit", "hung", "max_tasks", "max_rss", "reload"), 0),
        )
        self.assertEqual(
            set(status["queue"]),
            {"waiting", "oldest_seconds", "handed_over", "refused", "expired"},
        )
        self.assertIsNone(status["supervisor"]["reload"])

    def test_counts(self) -> None:
        """The totals count what was done, what failed, and the connections."""
        before = self.connection.ask("taskd.status")["totals"]
        for _ in range(3):
            self.connection.ask("add", [1, 2])
        self.connection.ask("at_once", [1])
        self.connection.ask("fail", ["x"])
        other = self.connect()
        self.assert_serves(other)
        after = self.connection.ask("taskd.status")["totals"]
        # The first status itself was counted after it was taken.
        self.assertEqual(after["done"] - before["done"], 6)
        self.assertEqual(after["failed"] - before["failed"], 1)
        self.assertEqual(after["accepted"] - before["accepted"], 1)
        self.assertEqual(after["in_flight"], 0)

    def test_running_task(self) -> None:
        """While a task runs its worker is busy with it, in the status and for ``ps``."""
        path = self.path()
        connections = self.connect_to_each()
        connections[2].request("hold", [path], id=1)
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        worker = connections[3].ask("taskd.status")["workers"][1]
        self.assertEqual((worker["state"], worker["task"]), ("busy", "hold"))
        self.assertEqual(worker["in_flight"], 1)
        self.assertEqual(title_of(worker["pid"]), "taskd: worker 2 (hold)")
        self.release(path)
        self.assertEqual(connections[2].reply(), {"id": 1, "result": "released"})
        worker = connections[3].ask("taskd.status")["workers"][1]
        self.assertEqual((worker["state"], worker["task"]), ("idle", None))
        self.assertEqual(title_of(worker["pid"]), "taskd: worker 2 (idle)")

    def test_running_task_beside_quick_ones(self) -> None:
        """A quick call to a worker does not hide the task that it has been running for long."""
        path = self.path()
        connections = self.connect_to_each()
        connections[2].request("hold", [path], id="hold")
        wait_until(lambda: os.path.exists(path + ".begun"), what="the task's begin")
        before = connections[3].ask("taskd.status")["workers"][1]
        connections[2].ask("taskd.ping", id="ping")
        after = connections[3].ask("taskd.status")["workers"][1]
        self.assertEqual((after["state"], after["task"]), ("busy", "hold"))
        self.assertGreaterEqual(after["task_seconds"], before["task_seconds"])
        self.assertEqual(title_of(after["pid"]), "taskd: worker 2 (hold)")

    def test_titles(self) -> None:
        """``ps`` shows who is who."""
        titles = sorted(process.title for process in self.daemon.processes())
        self.assertEqual(
            titles,
            [
                "taskd: supervisor",
                "taskd: worker 1 (idle)",
                "taskd: worker 2 (idle)",
                "taskd: worker 3 (idle)",
                "taskd: zygote",
            ],
        )

    def test_no_task_waits_while_a_worker_is_idle(self) -> None:
        """Callers that come one after the other with a long task each run side by side."""
        callers = []
        for _ in range(3):
            path = self.path()
            caller = self.connect()
            caller.request("hold", [path])
            callers.append((caller, path))
            wait_until(lambda path=path: os.path.exists(path + ".begun"), 2.0, what="a free worker")
        for caller, path in callers:
            self.release(path)
            self.assertEqual(caller.reply(), "released")

    def test_every_worker_serves(self) -> None:
        """Connections reach every worker, and each runs tasks."""
        for connection in self.connect_to_each().values():
            self.assert_serves(connection)

    def connect_to_each(self) -> dict[int, Connection]:
        connections = self.daemon.connect_to_each()
        for connection in connections.values():
            self.addCleanup(connection.close)
        return connections


def title_of(pid: int) -> str:
    process = Process.read(pid)
    assert process is not None
    return process.title


class OutputTests(ServingTestCase):
    def test_print(self) -> None:
        """What a task prints, on stdout or stderr, comes into the daemon's log."""
        for name in ("say", "say_on_stderr"):
            word = f"said-{uuid.uuid4().hex}-é"
            self.assertIsNone(self.connection.ask(name, [word]))
            wait_until(lambda word=word: word in self.daemon.log, what="the word in the log")
        self.assertEqual(self.daemon.errors, "")

    def test_print_goes_to_no_caller(self) -> None:
        """What a task prints is not in its reply."""
        self.connection.request("say", ["{}"], id=1)
        self.assertEqual(self.connection.line(), b'{"id":1,"result":null}\n')


class DebugTests(ServingTestCase):
    def make_daemon(self) -> Daemon:
        return shared_daemon("--debug", "--max-line", "2000", procs=1)

    def test_traceback(self) -> None:
        """With ``--debug`` the caller gets a failed task's traceback."""
        for name in ("fail", "fail_later", "fail_at_once"):
            error = self.assert_error(self.connection.ask(name, ["why"]), "task-failed", "why")
            self.assertIn("Traceback (most recent call last)", error["traceback"])
            self.assertIn("sample_tasks.py", error["traceback"])

    def test_max_line(self) -> None:
        """``--max-line`` is the longest line, exactly."""
        frame = len('{"function":"echo","args":[""]}')
        line = '{"function":"echo","args":["%s"]}\n'
        self.connection.send(line % ("x" * (2000 - frame)))
        self.assertEqual(len(self.connection.reply()), 2000 - frame)
        self.connection.send(line % ("x" * (2001 - frame)))
        self.assert_error(self.connection.reply(), "line-too-long", "2000")
        self.assert_hung_up(self.connection)
