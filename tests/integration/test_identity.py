"""Callers that have to say who they are, and may do no more than they are allowed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any, Final

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from taskd.client import TaskClient, call_once
from taskd.errors import Unauthorized
from tests.integration.callers import by_token, with_token
from tests.integration.case import DaemonTestCase, RefusedTestCase, lines_of
from tests.integration.daemon import (
    SAMPLE_TASKS,
    Connection,
    Daemon,
    temporary_directory,
    wait_until,
    write_secret,
)
from tests.integration.load import Load

WEB: Final = "web-0123456789abcdef0123456789"
NEW_WEB: Final = "web-of-tomorrow-0123456789abcdef"
OPS: Final = "ops-fedcba9876543210fedcba9876"
WRONG: Final = "wrong-0123456789abcdef0123456789"

FILE: Final = "tokens"
TOKENS: Final = f"# who calls\n\nweb:{WEB}\nops:{OPS}\n"

CREDENTIAL: Final = "taskd.token"

VERSION: Final = "from taskd import task\n@task\ndef version():\n    return {version}\n"

WATCH: Final = """
import json, os, sys

def note(event, args):
    if event == "socket.bind":
        bound, address = args
        is_path = isinstance(address, str)
        mode = os.stat(os.path.dirname(address)).st_mode & 0o777 if is_path else None
        with open("binds", "a") as file:
            print(json.dumps([bound.family.name, mode, address]), file=file)

sys.addaudithook(note)
"""
"""Has each process that is forked, and the one that forks them, note every socket it binds."""


def plainly(daemon: Daemon) -> Connection:
    """Connect, and say nothing."""
    return Connection("127.0.0.1", daemon.port)


class IdentityTestCase(DaemonTestCase):
    """Base of tests of daemons that ask; the daemon's own status is asked for by ``ops``."""

    def start_asking(self, *options: str, tokens: str = TOKENS, **more: Any) -> Daemon:
        return self.start(
            "--token-file", FILE, *options, secrets={FILE: tokens}, caller=by_token(OPS), **more
        )

    def connect_plainly(self, daemon: Daemon) -> Connection:
        connection = plainly(daemon)
        self.addCleanup(connection.close)
        return connection

    def connect_as(self, daemon: Daemon, token: str) -> Connection:
        return with_token(self.connect_plainly(daemon), token)

    def rewrite(self, daemon: Daemon, tokens: str) -> None:
        write_secret(daemon.directory / FILE, tokens)

    def callers(self, daemon: Daemon) -> dict[str, int]:
        """Tell how many connections each identity has, as the status shows it."""
        callers: Counter[str] = Counter()
        for worker in daemon.status()["workers"]:
            callers.update(worker["callers"])
        return dict(callers)

    def assert_turned_away(self, connection: Connection, function: str, args: Any = ()) -> None:
        """A call is not allowed, and neither it nor what stands behind it is looked at."""
        connection.request(function, args, id=1)
        self.assert_error(connection.reply(), "unauthorized")
        self.assertEqual(connection.rest(), b"")


class AuthTests(IdentityTestCase):
    def test_nothing_before(self) -> None:
        """Of who has not said who it is nothing is called, nor looked at what stands behind it."""
        daemon = self.start_asking(procs=1)
        path = self.path(daemon)
        for function, args in (
            ("echo", [1]),
            ("touch", [path]),
            ("no_such_task", []),
            *((f"taskd.{name}", []) for name in ("ping", "status", "functions")),
            ("taskd.cancel", [1]),
        ):
            connection = self.connect_plainly(daemon)
            connection.request(function, args)
            connection.request("touch", [path])
            connection.request("taskd.auth", [WEB])
            connection.request("touch", [path])
            error = self.assert_error(connection.reply(), "unauthorized", "taskd.auth")
            self.assertFalse(error["retryable"])
            self.assertEqual(connection.rest(), b"", function)
        # The one worker's one thread would have run it before this.
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(path))
        self.wait_for_log(daemon, "it has not said who it is")

    def test_right_token(self) -> None:
        """A right token is answered by the identity, and what was pipelined behind it is run."""
        daemon = self.start_asking(procs=1)
        connection = self.connect_plainly(daemon)
        connection.request("taskd.auth", {"token": WEB}, id=0)
        connection.request("add", [1, 2], id=1)
        self.assertEqual(connection.reply(), {"id": 0, "result": "web"})
        self.assertEqual(connection.reply(), {"id": 1, "result": 3})
        self.assertEqual(connection.ask("taskd.ping"), "pong")
        self.assertEqual(connection.ask("taskd.auth", [OPS]), "ops")
        self.assertEqual(self.callers(daemon), {"ops": 2})

    def test_no_token(self) -> None:
        """What is no token at all is told so, and nothing behind it is looked at."""
        daemon = self.start_asking(procs=1)
        for args in ([1], [], [None], [WEB, WEB], {"name": WEB}):
            connection = self.connect_plainly(daemon)
            connection.request("taskd.auth", args)
            connection.request("taskd.auth", [WEB])
            self.assert_error(connection.reply(), "bad-arguments")
            self.assertEqual(connection.rest(), b"", args)

    def test_wrong_token(self) -> None:
        """A wrong token is answered after what others ask later, then the connection is closed."""
        daemon = self.start_asking(procs=1)
        known, guessing = (
            self.connect_as(daemon, WEB),
            socket.create_connection(("127.0.0.1", daemon.port), 20),
        )
        guess = Connection.over(guessing)
        self.addCleanup(guess.close)
        path = self.path(daemon)
        guess.request("taskd.auth", [WRONG], id=7)
        guess.request("touch", [path])
        self.assertEqual(known.ask("add", [1, 2]), 3)
        self.assertEqual(select.select([guessing], [], [], 0)[0], [])
        reply = guess.reply()
        self.assertEqual(reply["id"], 7)
        self.assert_error(reply, "unauthorized", "nobody has this token")
        self.assertEqual(guess.rest(), b"")
        self.assertEqual(known.ask("add", [1, 2]), 3)
        self.assertFalse(os.path.exists(path))
        self.wait_for_log(daemon, "a wrong token")
        self.assertEqual(with_token(self.connect_plainly(daemon), WEB).ask("add", [1, 2]), 3)

    def test_secrecy(self) -> None:
        """No token, right or wrong, and no digest of one is in the log, or shown by a process."""
        daemon = self.start_asking("--debug")
        self.connect_as(daemon, WEB)
        for request in (["taskd.auth", [WRONG]], ["taskd.auth", [WEB, WRONG]], ["add", [WRONG]]):
            with plainly(daemon) as connection:
                connection.ask(*request)
        self.load_anew(daemon)
        self.rewrite(daemon, f"web:{WEB}\n:{WRONG}\n")
        daemon.signal(signal.SIGHUP)
        self.wait_for_log(
            daemon, "a wrong token", f"--token-file {daemon.directory / FILE}, line 2"
        )
        shown = daemon.log + daemon.errors
        processes = daemon.processes()
        self.assertGreaterEqual(len(processes), 4)
        for process in processes:
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    words = Path(f"/proc/{process.pid}/{name}").read_bytes()
                    shown += words.decode(errors="replace")
        for token in (WEB, OPS, WRONG):
            self.assertNotIn(token, shown)
            self.assertNotIn(hashlib.sha256(token.encode()).hexdigest(), shown)

    def test_long_line_of_a_stranger(self) -> None:
        """Only who is known may send long lines."""
        daemon = self.start_asking(procs=1)
        text = "x" * 100_000
        with plainly(daemon) as connection:
            self.assert_error(connection.ask("echo", [text]), "line-too-long")
        self.assertEqual(self.connect_as(daemon, WEB).ask("echo", [text]), text)


class AllowTests(IdentityTestCase):
    def start_allowing(self, *options: str, **more: Any) -> Daemon:
        rules = ("web=add,hold*,mail.*,version", "w?b=later", "ops=*")
        return self.start_asking(*options, *(f"--allow={rule}" for rule in rules), **more)

    def test_allow(self) -> None:
        """An identity may call what its patterns name; a connection stays in any case."""
        daemon = self.start_allowing(procs=1)
        web, path = self.connect_as(daemon, WEB), self.path(daemon)
        for _ in range(2):
            for function, args in (
                ("touch", [path]),
                ("taskd.status", []),
                ("taskd.functions", []),
                ("ADD", [1, 2]),
                ("echo", [1]),
                ("no_such_task", []),
            ):
                reply = web.ask(function, args, id="x")
                self.assertEqual(reply["id"], "x")
                self.assert_error(reply, "unauthorized", "web may not call", function)
            self.assertEqual(web.ask("add", [1, 2]), 3)
            self.assertEqual(web.ask("later", [4]), 4)
            self.assertEqual(web.ask("mail.from", {"from": "me"}), ["me", "nobody"])
            self.assertEqual(web.ask("taskd.ping"), "pong")
            self.assertIs(web.ask("taskd.cancel", [1]), False)
        self.assertEqual(self.connect_as(daemon, OPS).ask("touch", [path]), None)
        self.assertTrue(os.path.exists(path))
        self.wait_for_log(daemon, "web may not call 'touch'")
        self.assertEqual(daemon.log.count("web may not call 'touch'"), 1)

    def test_order(self) -> None:
        """A call without an id that is not allowed is answered in its turn."""
        daemon = self.start_allowing()
        web, path = self.connect_as(daemon, WEB), self.path(daemon)
        web.request("hold", [path])
        web.request("touch", [path])
        web.request("add", [1, 2])
        self.wait_for_begin(path)
        self.assertEqual(daemon.ask("touch", [path]), None)
        self.assertEqual(web.reply(), "released")
        self.assert_error(web.reply(), "unauthorized")
        self.assertEqual(web.reply(), 3)

    def test_callers(self) -> None:
        """``taskd.status`` shows whose connections there are, and those that have gone no more."""
        daemon = self.start_asking()
        connections = [self.connect_as(daemon, token) for token in (WEB, WEB, WEB, OPS)]
        self.connect_plainly(daemon)
        self.assertEqual(self.callers(daemon), {"web": 3, "ops": 2})
        self.wait_for_log(daemon, ": it is web")
        for connection in connections[:2]:
            connection.close()
        wait_until(lambda: self.callers(daemon) == {"web": 1, "ops": 2}, what="fewer callers")

    def test_handed_over(self) -> None:
        """Tasks of one identity run side by side at other workers, and no others for it."""
        daemon = self.start_allowing("--allow=web=meet", procs=3)
        web, directory, path = (
            self.connect_as(daemon, WEB),
            self.directory(daemon),
            self.path(daemon),
        )
        for name in ("a", "b", "c"):
            web.request("meet", [str(directory), name, 3], id=name)
            web.request("touch", [path], id="not " + name)
        replies = web.replies_by_id(6)
        self.assertEqual({replies[n]["result"] for n in "abc"}, set(daemon.workers().values()))
        for name in "abc":
            self.assert_error(replies["not " + name], "unauthorized")
        self.assertFalse(os.path.exists(path))

    def assert_is_web(self, connection: Connection) -> None:
        """It may call what ``web`` may, and no more."""
        self.assertEqual(connection.ask("add", [1, 2]), 3)
        self.assert_error(connection.ask("echo", [1]), "unauthorized", "web may not")

    def test_reload(self) -> None:
        """Connections that change workers at a reload stay whose they were, or nobody's."""
        daemon = self.start_allowing()
        known = [self.connect_as(daemon, WEB) for _ in range(4)]
        owed = self.connect_as(daemon, WEB)
        silent, unknown = self.connect_plainly(daemon), self.connect_plainly(daemon)
        path = self.begin(daemon, owed, "hold", id="hold")
        before = daemon.workers()
        self.load_anew(daemon)
        wait_until(lambda: self.callers(daemon).get("web") == 5, what="all callers again")
        for connection in (*known, with_token(silent, WEB)):
            self.assert_is_web(connection)
        self.assertEqual(owed.ask("add", [1, 2], id=1), {"id": 1, "result": 3})
        self.assert_error(owed.ask("echo", [1], id=1), "unauthorized")
        Path(path).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})
        self.assert_is_web(owed)
        self.assert_turned_away(unknown, "add", [1, 2])
        self.wait_for_end_of(*before.values())
        for connection in (*known, owed, silent):
            self.assert_is_web(connection)

    def test_time_limit(self) -> None:
        """So they do when their worker is replaced because a blocking task is at its limit."""
        daemon = self.start_allowing()
        web, path = self.connect_as(daemon, WEB), self.path(daemon)
        before = set(daemon.workers().values())
        self.assert_error(web.ask("hold_limited", [path]), "time-limit")
        wait_until(lambda: daemon.restarts() == {"time_limit": 1}, what="a replacement")
        (replaced,) = before - set(daemon.wait_until_settled().values())
        self.assert_is_web(web)
        self.assertEqual(self.callers(daemon)["web"], 1)
        self.wait_for_end_of(replaced)
        self.assert_is_web(web)


class RotationTests(IdentityTestCase):
    def test_rotation(self) -> None:
        """A token is replaced by two reloads; who has shown the old one must show the new one."""
        daemon = self.start_asking()
        old, renewed, owed = (self.connect_as(daemon, WEB) for _ in range(3))
        self.rewrite(daemon, f"{TOKENS}web:{NEW_WEB}\n")
        self.load_anew(daemon)
        new = self.connect_as(daemon, NEW_WEB)
        for connection in (old, renewed, owed, new, self.connect_as(daemon, WEB)):
            self.assertEqual(connection.ask("add", [1, 2]), 3)
        path = self.begin(daemon, owed, "hold", id="hold")
        self.rewrite(daemon, f"web:{NEW_WEB}\nops:{OPS}\n")
        self.load_anew(daemon)
        self.assertEqual(new.ask("add", [1, 2]), 3)
        self.assertEqual(renewed.ask("taskd.auth", [NEW_WEB]), "web")
        self.assertEqual(renewed.ask("add", [1, 2]), 3)
        self.assert_turned_away(old, "add", [1, 2])
        with plainly(daemon) as connection:
            self.assert_error(connection.ask("taskd.auth", [WEB]), "unauthorized")
        Path(path).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})
        self.assert_turned_away(owed, "add", [1, 2])
        self.assertEqual(new.ask("add", [1, 2]), 3)

    def test_revoked_with_a_call_in_flight(self) -> None:
        """Who has a call in flight gets its reply, and no more is run for its revoked token."""
        daemon = self.start_asking(tokens=f"{TOKENS}web:{NEW_WEB}\n")
        revoked, stays = self.connect_as(daemon, WEB), self.connect_as(daemon, NEW_WEB)
        held = [self.begin(daemon, each, "hold", id="hold") for each in (revoked, stays)]
        self.rewrite(daemon, f"web:{NEW_WEB}\nops:{OPS}\n")
        self.load_anew(daemon)
        touched, path = self.path(daemon), self.path(daemon)
        revoked.request("touch", [path], id=1)
        stays.request("touch", [touched], id=1)
        reply = revoked.reply()
        self.assertEqual(reply["id"], 1)
        self.assert_error(reply, "unauthorized")
        self.assertEqual(stays.reply(), {"id": 1, "result": None})
        for each in held:
            Path(each).touch()
        for connection in (revoked, stays):
            self.assertEqual(connection.reply(), {"id": "hold", "result": "released"})
        self.assertEqual(revoked.rest(), b"")
        self.assertEqual(stays.ask("add", [1, 2]), 3)
        self.assertEqual((os.path.exists(path), os.path.exists(touched)), (False, True))

    def test_revoked_by_the_second_reload(self) -> None:
        """So it is where the call was in flight before the reload that brought the new token."""
        daemon = self.start_asking()
        owed = self.connect_as(daemon, WEB)
        held, path = self.begin(daemon, owed, "hold", id="hold"), self.path(daemon)
        self.rewrite(daemon, f"{TOKENS}web:{NEW_WEB}\n")
        self.load_anew(daemon)
        self.assertEqual(owed.ask("add", [1, 2], id=1), {"id": 1, "result": 3})
        self.rewrite(daemon, f"web:{NEW_WEB}\nops:{OPS}\n")
        self.load_anew(daemon)
        self.assert_error(owed.ask("touch", [path], id=1), "unauthorized")
        Path(held).touch()
        self.assertEqual(owed.reply(), {"id": "hold", "result": "released"})
        self.assertEqual((owed.rest(), os.path.exists(path)), (b"", False))

    def test_unusable_file(self) -> None:
        """A token file that cannot be used leaves the old tokens, and log and status say why."""
        daemon = self.start_asking()
        before, web = daemon.workers(), self.connect_as(daemon, WEB)
        path = daemon.directory / FILE
        for make, words in (
            (path.unlink, "No such file"),
            (lambda: write_secret(path, TOKENS, 0o644), "chmod 600"),
            (lambda: write_secret(path, "# none\n"), "no token"),
            (lambda: write_secret(path, TOKENS + "web:short\n"), "line 5"),
        ):
            make()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda words=words: words in self.reload_failure(daemon), what=words)
            self.wait_for_log(daemon, words)
            self.assertEqual(web.ask("add", [1, 2]), 3)
            self.assertEqual(self.connect_as(daemon, WEB).ask("add", [1, 2]), 3)
        self.assertEqual(daemon.workers(), before)
        self.rewrite(daemon, TOKENS)
        self.load_anew(daemon)
        self.assertEqual(self.reload_failure(daemon), "")

    def test_load(self) -> None:
        """While tokens come and go at reloads, callers whose token stays lose nothing."""
        daemon = self.start_asking(
            procs=3,
            tasks="tasks.py,sample_tasks.py",
            files={
                "tasks.py": VERSION.format(version=1),
                "sample_tasks.py": SAMPLE_TASKS.read_text(encoding="utf-8"),
            },
        )
        with Load(daemon) as load:
            for version in (2, 3):
                (daemon.directory / "tasks.py").write_text(
                    VERSION.format(version=version) + "#" * version, encoding="utf-8"
                )
                self.rewrite(daemon, f"web:{NEW_WEB}{version}\nops:{OPS}\n")
                self.load_anew(daemon)
                load.wait_for_more()
        self.assertEqual(load.failures, [])
        self.assertEqual(self.connect_as(daemon, f"{NEW_WEB}3").ask("version"), 3)


class LoadingTests(IdentityTestCase):
    """What a daemon does before it forks its workers, where nobody is asked yet."""

    def start_watched(self, **more: Any) -> Daemon:
        tasks = VERSION.format(version=1) + WATCH
        return self.start_asking(tasks="tasks.py", files={"tasks.py": tasks}, **more)

    def test_no_port(self) -> None:
        """It binds no TCP port, but one socket in a directory for itself, which goes at once."""
        daemon = self.start_watched()
        binds = str(daemon.directory / "binds")
        for times in range(1, 4):
            found = [json.loads(line) for line in lines_of(binds)]
            self.assertEqual(
                [(family, mode) for family, mode, _ in found], times * [("AF_UNIX", 0o700)]
            )
            for _, _, path in found:
                self.assertFalse(os.path.exists(os.path.dirname(path)))
            if times < 3:
                self.load_anew(daemon)
        self.assertEqual(daemon.ask("version"), 1)

    def test_no_room_for_it(self) -> None:
        """Where no such socket can be it goes without, and the daemon serves."""
        deep = temporary_directory(self) / ("x" * 110)
        deep.mkdir()
        daemon = self.start_watched(environ={"TMPDIR": str(deep)})
        self.load_anew(daemon)
        self.assertEqual(daemon.ask("version"), 1)
        self.assertEqual((lines_of(str(daemon.directory / "binds")), os.listdir(deep)), ([], []))


class FileTests(RefusedTestCase):
    def test_unusable_file(self) -> None:
        """A token file that cannot be used ends the start, and what stands in it is not shown."""
        directory = temporary_directory(self)
        cases = (
            (0o644, TOKENS, "chmod 600"),
            (0o620, TOKENS, "chmod 600"),
            (0o600, "", "no token"),
            (0o600, "# web\n\n", "no token"),
            (0o600, f"two words:{WEB}\n", "line 1"),
            (0o600, f"{TOKENS}web:{WEB[:12]}\n", "line 5"),
        )
        for number, (mode, text, _) in enumerate(cases):
            write_secret(directory / str(number), text, mode)
        paths = [*(str(directory / str(number)) for number in range(len(cases))), "none", "."]
        reasons = [*(words for _, _, words in cases), "No such file", "directory"]
        refused = self.refuse_all(*(("--token-file", path) for path in paths))
        for ended, path, words in zip(refused, paths, reasons, strict=True):
            # What is not absolute is so in the daemon's directory.
            said = f"--token-file {path}" if path.startswith("/") else "--token-file /"
            self.assert_refused(ended, said, words)
            self.assertNotIn(WEB[:12], ended.errors + ended.output)

    def test_rules_that_cannot_be(self) -> None:
        """A rule of ``--allow`` that names nobody, or no function, is refused."""
        for ended in self.refuse_all(*(("--allow", r) for r in ("web", "=add", "web=", "web=,"))):
            self.assert_refused(ended, "--allow", "IDENTITY=FUNCTION")


class CredentialTests(DaemonTestCase):
    def test_systemds_credential(self) -> None:
        """The credential ``taskd.token`` that systemd passes is used without an option."""
        directory = temporary_directory(self)
        write_secret(directory / CREDENTIAL, f"{OPS}\n", 0o400)
        environ = {"CREDENTIALS_DIRECTORY": str(directory)}
        daemon = self.start(procs=1, environ=environ, caller=by_token(OPS))
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        self.assertEqual(daemon.status()["workers"][0]["callers"], {"token": 1})
        with plainly(daemon) as connection:
            self.assert_error(connection.ask("add", [1, 2]), "unauthorized")


class ClientTests(TestCase):
    """The Python client, which shows a token."""

    timeout = 30

    def setUp(self) -> None:
        self.daemon = Daemon(
            "--token-file",
            FILE,
            "--allow=web=add",
            "--allow=ops=*",
            procs=2,
            secrets={FILE: TOKENS},
            caller=by_token(OPS),
        )
        self.addCleanup(self.daemon.stop)
        self.daemon.start()
        self.endpoint = f"tcp:127.0.0.1:{self.daemon.port}"

    async def test_token(self) -> None:
        """A client may do what its token allows; all else fails alone, by the daemon's words."""
        client = TaskClient(reactor, self.endpoint, token=WEB, pool=2)
        self.addCleanup(client.close)
        calls = [client.call("add", n, 1) for n in range(20)]
        refused = [client.call("echo", n) for n in range(20)]
        self.assertEqual([await called for called in calls], list(range(1, 21)))
        for called in refused:
            await self.assertFailure(called, Unauthorized)
        self.assertEqual(await client.call("add", 1, 2), 3)
        for token, words in ((None, "say first who you are"), (WRONG, "nobody has this token")):
            called = call_once(reactor, self.endpoint, "add", [1, 2], token=token)
            error = await self.assertFailure(called, Unauthorized)
            self.assertIn(words, str(error))
