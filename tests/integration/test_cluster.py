"""Three daemons on machines of their own: one dies, one drains, and both come back."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import SkipTest

import trustme
from twisted.internet import reactor
from twisted.internet.defer import Deferred, ensureDeferred, gatherResults
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from taskd.client import TaskClient
from taskd.errors import ConnectionLost, TaskdError
from tests.integration.daemon import (
    CHECKOUT,
    Connection,
    Daemon,
    Process,
    temporary_directory,
    wait_until,
)
from tests.integration.lab import BALANCER, Lab, why_no_lab

NAMES: Final = ("one", "two", "three")
PORT: Final = 12345
DRAIN_SECONDS: Final = 2.0
"""Longer than the checks of ``etc/haproxy.cfg`` take to find a daemon that drains."""

ENDED: Final = "the connection ended before the reply"

HAPROXY_CFG: Final = CHECKOUT / "etc" / "haproxy.cfg"
KEEPALIVED_CONF: Final = CHECKOUT / "etc" / "keepalived-lvs.conf"
CHECK_TASKD: Final = CHECKOUT / "etc" / "check-taskd"

TASKS: Final = """
import os, time
from taskd import task

@task
def where(number, seconds=0.004):
    time.sleep(seconds)
    return [number, os.environ["TASKD_TEST_NODE"]]
"""


def must_have(program: str) -> str:
    """Give a program's path, or skip the test."""
    path = shutil.which(program)
    if path is None:
        raise SkipTest(f"there is no {program}: apt-get install {program}")
    return path


class Tally:
    """
    What the callers have seen.

    Every request that was asked ends in one of two ways: acknowledged by the right
    reply, or failed, of which the caller was told. What the cluster told to be not
    run was asked again; what remains is lost.
    """

    def __init__(self) -> None:
        self.phase = "calm"
        self.asked = self.acknowledged = self.retried = 0
        self.failed: list[tuple[str, str, str]] = []
        self.strange: list[str] = []
        self.by_node: Counter[str] = Counter()
        self.by_caller: Counter[int] = Counter()
        self._lock = threading.Lock()

    def ask(self) -> None:
        with self._lock:
            self.asked += 1

    def retry(self) -> None:
        with self._lock:
            self.retried += 1

    def fail(self, phase: str, why: str) -> None:
        """Take the failure of what was sent over a connection, or by a call, of a phase."""
        with self._lock:
            self.failed.append((phase, self.phase, why))

    def take(self, caller: int, number: int, result: Any) -> None:
        """Take a reply to a request of that number."""
        with self._lock:
            if not (isinstance(result, list) and result[0] == number and result[1] in NAMES):
                self.strange.append(f"{number}: {result!r}")
            self.acknowledged += 1
            self.by_node[result[1]] += 1
            self.by_caller[caller] += 1

    def failed_otherwise(self, why: str) -> set[tuple[str, str, str]]:
        """Give what failed that was not under way as a node was killed, or not for that reason."""
        known = {("calm", "kill", why), ("kill", "kill", why)}
        return set(self.failed) - known

    @property
    def lost(self) -> int:
        return self.asked - self.acknowledged - len(self.failed)

    def wait_for_more(self, callers: int, count: int = 30) -> None:
        """Wait until every caller has had so many more replies."""
        before = Counter(self.by_caller)
        wait_until(
            lambda: all(self.by_caller[n] >= before[n] + count for n in range(callers)),
            what="more replies for everybody",
        )

    def told(self) -> str:
        return (
            f"asked {self.asked}, acknowledged {self.acknowledged}, lost {self.lost}, "
            f"failed {len(self.failed)} {dict(Counter(self.failed))}, retried {self.retried}, "
            f"by node {dict(self.by_node)}"
        )


def told(tally: Tally) -> None:
    """Say what was counted, for who wants to see (``pytest -s``)."""
    print(tally.told(), file=sys.stderr)  # noqa: T201


def wait_for_node(tallies: list[Tally], name: str, count: int = 20) -> None:
    """Wait until a node has answered so many more requests, whoever has asked."""

    def answered() -> int:
        return sum(tally.by_node[name] for tally in tallies)

    before = answered()
    wait_until(lambda: answered() >= before + count, what=f"replies of {name}")


class Caller(threading.Thread):
    """Asks through the balancer until it is stopped."""

    def __init__(self, lab: Lab, tally: Tally, number: int) -> None:
        super().__init__(daemon=True)
        self._lab = lab
        self._number = number
        self.tally = tally
        self._numbers = itertools.count()
        self._is_stopping = threading.Event()

    def stop(self) -> None:
        """Ask nothing new, and wait until all that was asked has come to its end."""
        self._is_stopping.set()
        self.join(30)
        if self.is_alive():
            self.tally.strange.append("a caller hangs")

    def run(self) -> None:
        try:
            self._lab.enter()
            self.serve()
        except Exception as error:
            self.tally.strange.append(repr(error))

    def serve(self) -> None:
        raise NotImplementedError

    @property
    def wants_more(self) -> bool:
        return not self._is_stopping.is_set()

    def connect(self) -> Connection:
        return Connection(BALANCER, PORT)

    def take(self, number: int, result: Any) -> None:
        self.tally.take(self._number, number, result)


class ShortCaller(Caller):
    """A connection for each task, without ids."""

    def serve(self) -> None:
        while self.wants_more:
            number = next(self._numbers)
            self.tally.ask()
            while not self._is_over(number):
                self.tally.retry()

    def _is_over(self, number: int) -> bool:
        """Ask once; tell whether that is the end of it."""
        phase = self.tally.phase
        with self.connect() as connection:
            try:
                reply = connection.ask("where", [number])
            except (OSError, EOFError):
                self.tally.fail(phase, ENDED)
                return True
        if isinstance(reply, dict) and reply["error"]["code"] == "shutting-down":
            return False
        self.take(number, reply)
        return True


class KeptCaller(Caller):
    """A connection that is kept, with four requests in flight at all times, by ids."""

    WINDOW = 4

    def serve(self) -> None:
        waiting: list[int] = []
        while self.wants_more or waiting:
            waiting = self._talk(waiting)

    def _talk(self, again: list[int]) -> list[int]:
        """Talk over one connection to its end; give what is to be asked again."""
        phase, waiting = self.tally.phase, set[int]()

        def send(number: int) -> None:
            waiting.add(number)
            connection.request("where", [number], id=number)

        with self.connect() as connection:
            try:
                for number in again:
                    send(number)
                while True:
                    while self.wants_more and len(waiting) < self.WINDOW:
                        self.tally.ask()
                        send(next(self._numbers))
                    if not waiting:
                        return []
                    reply = connection.reply()
                    if "id" not in reply:
                        break
                    if "error" in reply:
                        self.tally.retry()
                        send(reply["id"])
                    else:
                        waiting.remove(reply["id"])
                        self.take(reply["id"], reply["result"])
            except (OSError, EOFError):
                for _ in waiting:
                    self.tally.fail(phase, ENDED)
                return []
        if reply["error"]["code"] != "shutting-down":
            self.tally.strange.append(f"{reply!r}")
        for _ in waiting:
            self.tally.retry()
        return list(waiting)


class ClusterTestCase:
    """Three daemons in a lab."""

    lab: Lab
    nodes: dict[str, Daemon]
    addCleanup: Callable[..., None]

    def start_cluster(self) -> None:
        if why := why_no_lab():
            raise SkipTest(why)
        self.lab = Lab(len(NAMES))
        self.addCleanup(self.lab.close)
        self.nodes = {}
        for number, name in enumerate(NAMES, 1):
            daemon = Daemon(
                *("--interface", self.lab.address(number), "--insecure"),
                *("--drain-seconds", str(DRAIN_SECONDS), "--grace", "10"),
                procs=3,
                port=PORT,
                host=self.lab.address(number),
                tasks="tasks.py",
                files={"tasks.py": TASKS},
                environ={"TASKD_TEST_NODE": name},
                under=self.lab.under(number),
            )
            self.addCleanup(self.end, daemon)
            daemon.start()
            self.nodes[name] = daemon

    def start_haproxy(self) -> None:
        haproxy = must_have("haproxy")
        self.start_cluster()
        process = subprocess.Popen(
            [*self.lab.under(0), haproxy, "-db", "-f", str(HAPROXY_CFG)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait, 20)
        self.addCleanup(process.kill)
        wait_until(
            lambda: Connection(BALANCER, PORT).close() is None, what="a balancer that listens"
        )

    def end(self, daemon: Daemon) -> None:
        """End a daemon for which nobody has a call any more, without its time to drain."""
        with contextlib.suppress(ProcessLookupError):
            daemon.signal(signal.SIGTERM)
            daemon.signal(signal.SIGTERM)
        daemon.stop()

    def kill(self, daemon: Daemon) -> None:
        """Have a whole node die at once."""
        pids = [process.pid for process in daemon.processes()]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        for pid in pids:  # one that ends has no environment any more, and still its sockets
            wait_until(lambda pid=pid: self.has_ended(pid), what=f"the end of {pid}")
        daemon.wait_until_gone()

    def has_ended(self, pid: int) -> bool:
        process = Process.read(pid)
        return process is None or process.is_zombie

    def fault(self, tallies: list[Tally], wait_for_more: Callable[[], None]) -> None:
        """Kill one node, drain another under load, and bring both back."""

        def begin(phase: str) -> None:
            for tally in tallies:
                tally.phase = phase

        def bring_back(name: str) -> None:
            begin(f"{name} is gone")
            wait_for_more()
            begin(f"{name} comes back")
            self.nodes[name].start()
            wait_for_node(tallies, name)

        for name in NAMES:
            wait_for_node(tallies, name)
        wait_for_more()
        begin("kill")
        self.kill(self.nodes["one"])
        wait_for_more()  # by then everybody has seen it
        bring_back("one")
        begin("drain")
        self.nodes["two"].signal(signal.SIGTERM)
        self.nodes["two"].wait_until_gone()
        bring_back("two")
        begin("calm again")
        wait_for_more()


class BalancerTests(ClusterTestCase, SynchronousTestCase):
    """The cluster behind HAProxy, run by ``etc/haproxy.cfg`` as it is."""

    SHORT, KEPT = 5, 4

    def test_faults(self) -> None:
        """
        Behind a balancer nothing is lost silently, and a daemon that drains fails none.

        What fails was in flight as a node was killed, and its callers are told.
        """
        self.start_haproxy()
        tally = Tally()
        kinds = [ShortCaller] * self.SHORT + [KeptCaller] * self.KEPT
        callers = [kind(self.lab, tally, number) for number, kind in enumerate(kinds)]
        for caller in callers:
            caller.start()
        try:
            self.fault([tally], lambda: tally.wait_for_more(len(callers)))
        finally:
            for caller in callers:
                caller.stop()
        told(tally)
        self.assertEqual(tally.strange, [])
        self.assertEqual(tally.lost, 0, tally.told())
        self.assertEqual(tally.failed_otherwise(ENDED), set(), tally.told())
        # Twice: who is told at once may be connected to what is not quite dead yet.
        in_flight = self.SHORT + self.KEPT * KeptCaller.WINDOW
        self.assertLessEqual(len(tally.failed), 2 * in_flight, tally.told())

    def test_check(self) -> None:
        """``check-taskd`` succeeds while a daemon serves, and not while it drains or is gone."""
        self.start_cluster()
        daemon = self.nodes["two"]

        def is_well() -> bool:
            command = [str(CHECK_TASKD), "10.77.0.2", str(PORT)]
            return not subprocess.run(command, capture_output=True, timeout=10).returncode

        self.assertTrue(is_well())
        with daemon.connect() as kept:
            self.assertEqual(kept.ask("taskd.ping"), "pong")
            daemon.signal(signal.SIGTERM)
            wait_until(lambda: kept.ask("taskd.ping") == "draining", what="draining")
            self.assertFalse(is_well())
            self.assertEqual(kept.ask("where", [7]), [7, "two"])
        daemon.wait_until_gone()
        self.assertFalse(is_well())


class ClientTests(ClusterTestCase, TestCase):
    """The cluster as ``TaskClient`` sees it, mostly without a balancer."""

    timeout = 60
    AT_ONCE = 12

    SECONDS = 0.004

    async def call(self, client: TaskClient, tally: Tally, caller: int, **terms: Any) -> None:
        """Ask one task after the other."""
        for number in itertools.count():
            if self.is_stopping:
                return
            tally.ask()
            phase = tally.phase
            try:
                result = await client.call_with(
                    "where", [number, self.SECONDS], **{"timeout": 15, **terms}
                )
            except ConnectionLost as error:
                tally.fail(phase, f"ConnectionLost, may_have_started={error.may_have_started}")
            except TaskdError as error:
                tally.fail(phase, repr(error))
            else:
                tally.take(caller, number, result)

    def in_thread(self, act: Callable[[], None]) -> Deferred[None]:
        """Do what blocks in a thread of its own, in the lab."""
        done: Deferred[None] = Deferred()

        def run() -> None:
            try:
                self.lab.enter()
                act()
            except BaseException:
                reactor.callFromThread(done.errback, Failure())
            else:
                reactor.callFromThread(done.callback, None)

        threading.Thread(target=run, daemon=True).start()
        return done

    async def test_faults(self) -> None:
        """
        Under the same faults a client of all three loses and fails no idempotent call.

        Of the others only those fail that were in flight as a node was killed.
        """
        self.start_cluster()
        endpoints = [f"tcp:{self.lab.address(n)}:{PORT}" for n in (1, 2, 3)]
        client = TaskClient(reactor, endpoints, pool=2)
        self.addCleanup(client.close)
        self.is_stopping = False
        safe, plain = Tally(), Tally()
        callers = [
            ensureDeferred(self.call(client, tally, number, **terms))
            for tally, terms in ((safe, {"idempotent": True}), (plain, {}))
            for number in range(self.AT_ONCE)
        ]

        def wait_for_more() -> None:
            for tally in (safe, plain):
                tally.wait_for_more(self.AT_ONCE)

        try:
            await self.in_thread(lambda: self.fault([safe, plain], wait_for_more))
        finally:
            self.is_stopping = True
            await gatherResults(callers)
        told(safe)
        told(plain)
        self.assertEqual(safe.strange + plain.strange, [])
        self.assertEqual((safe.lost, plain.lost), (0, 0))
        self.assertEqual(safe.failed, [])
        in_flight = "ConnectionLost, may_have_started=True"
        self.assertEqual(plain.failed_otherwise(in_flight), set(), plain.told())
        self.assertLessEqual(len(plain.failed), self.AT_ONCE)

    async def test_a_drain_behind_a_balancer(self) -> None:
        """
        A client that knows only the balancer fails no call as one daemon drains.

        Its connection there, which ends a long call, has the fewest calls in flight.
        """
        self.start_haproxy()
        self.SECONDS = 0.1
        client = TaskClient(reactor, f"tcp:{BALANCER}:{PORT}", pool=3)
        self.addCleanup(client.close)
        self.is_stopping = False
        tally = Tally()
        _, name = await client.call("where", 0)
        long = client.call("where", 1, DRAIN_SECONDS + 1.0)  # over the same connection
        callers = [
            ensureDeferred(self.call(client, tally, number)) for number in range(self.AT_ONCE)
        ]
        try:
            await deferLater(reactor, 0.3)
            tally.phase = "drain"
            self.nodes[name].signal(signal.SIGTERM)
            self.assertEqual(await long, [1, name])
            await self.in_thread(lambda: tally.wait_for_more(self.AT_ONCE, 2))
        finally:
            self.is_stopping = True
            await gatherResults(callers)
        told(tally)
        self.assertEqual((tally.strange, tally.failed, tally.lost), ([], [], 0), tally.told())

    async def test_a_machine_that_vanishes(self) -> None:
        """
        A machine that is gone without a word costs the calls that it has, and no more.

        They fail by their time limits, later calls go elsewhere, and when it can be
        reached again it serves again.
        """
        self.start_cluster()
        endpoints = [f"tcp:{self.lab.address(n)}:{PORT}" for n in (1, 2, 3)]
        client = TaskClient(reactor, endpoints, pool=1)
        self.addCleanup(client.close)
        self.is_stopping = False
        tally = Tally()
        callers = [
            ensureDeferred(self.call(client, tally, number, timeout=1.0))
            for number in range(self.AT_ONCE)
        ]

        def wait_for_more() -> None:
            tally.wait_for_more(self.AT_ONCE)

        def vanish() -> None:
            for name in NAMES:
                wait_for_node([tally], name)
            tally.phase = "kill"
            self.lab.unplug(1)
            wait_for_more()
            tally.phase = "one is gone"
            wait_for_more()
            self.lab.plug_in(1)
            wait_for_node([tally], "one")

        try:
            await self.in_thread(vanish)
        finally:
            self.is_stopping = True
            await gatherResults(callers)
        told(tally)
        self.assertEqual((tally.strange, tally.lost), ([], 0))
        self.assertLessEqual({sent for sent, _, _ in tally.failed}, {"calm", "kill"}, tally.told())
        self.assertLessEqual(len(tally.failed), self.AT_ONCE, tally.told())


class ConfigurationTests(SynchronousTestCase):
    """The files in ``etc``, as their programs read them."""

    def haproxy_takes(self, path: Path) -> None:
        checked = subprocess.run(
            [must_have("haproxy"), "-c", "-f", str(path)], capture_output=True, timeout=20
        )
        self.assertEqual(checked.returncode, 0, checked.stderr.decode())
        self.assertNotIn(b"WARNING", checked.stderr)

    def test_haproxy(self) -> None:
        """HAProxy takes its configuration, without a warning."""
        self.haproxy_takes(HAPROXY_CFG)

    def test_haproxy_with_tls_and_tokens(self) -> None:
        """With what stands in comments its checks succeed over TLS, and by a token, too."""
        directory = temporary_directory(self)
        authority, token = trustme.CA(), "0123456789abcdef" * 2
        shown = authority.issue_cert("tasks.example.org")
        authority.cert_pem.write_to_path(directory / "ca.pem")
        daemon = Daemon(
            *("--tls", "server.pem", "--key", "server.key", "--tls-port", "0"),
            *("--token-file", "tokens"),
            files={"server.pem": shown.cert_chain_pems[0].bytes().decode()},
            secrets={
                "server.key": shown.private_key_pem.bytes().decode(),
                "tokens": f"haproxy:{token}\n",
            },
            caller=lambda daemon: self.with_token(daemon, token),
        )
        self.addCleanup(daemon.stop)
        daemon.start()
        plain, tls = re.findall(r" port (\d+)", daemon.addresses)
        text = re.sub(r"(?m)^#(?=frontend|backend| {4}\S|$)", "", HAPROXY_CFG.read_text())
        ask_token = [line for line in text.splitlines() if line.startswith("    #tcp-check")]
        self.assertEqual(len(ask_token), 2)
        text = "\n".join(line for line in text.splitlines() if line not in ask_token)
        connect = "    tcp-check connect default"
        self.assertEqual(text.count(connect), 2)
        text = text.replace(connect, "\n".join([connect, *ask_token]).replace("#", ""))
        for there, here in (
            ('\\"…\\"', f'\\"{token}\\"'),
            ("/etc/haproxy/taskd-ca.pem", str(directory / "ca.pem")),
            ("log /dev/log local0", f"stats socket {directory}/stats"),
            ("bind :12345", f"bind unix@{directory}/plain"),
            ("bind :12346", f"bind unix@{directory}/tls"),
        ):
            self.assertIn(there, text)
            text = text.replace(there, here)
        text = re.sub(r"10\.77\.0\.\d:12345", f"127.0.0.1:{plain}", text)
        text = re.sub(r"10\.77\.0\.\d:12346", f"127.0.0.1:{tls}", text)
        (directory / "haproxy.cfg").write_text(text + "\n")
        self.haproxy_takes(directory / "haproxy.cfg")
        process = subprocess.Popen(
            [must_have("haproxy"), "-db", "-f", str(directory / "haproxy.cfg")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait, 20)
        self.addCleanup(process.kill)
        wait_until(
            lambda: self.checks(directory / "stats").count("L7OK") == 6, what="six good checks"
        )

    def test_check_with_tls_and_tokens(self) -> None:
        """``check-taskd`` shows a token, over TLS too, and takes nobody else for the daemon."""
        directory = temporary_directory(self)
        authority, token = trustme.CA(), "0123456789abcdef" * 2
        shown = authority.issue_cert("tasks.example.org")
        authority.cert_pem.write_to_path(directory / "ca.pem")
        (directory / "token").write_text(f"{token}\n")
        (directory / "unended").write_text(token)
        (directory / "wrong").write_text("fedcba9876543210" * 2 + "\n")
        daemon = Daemon(
            *("--tls", "server.pem", "--key", "server.key", "--tls-port", "0"),
            *("--token-file", "tokens"),
            files={"server.pem": shown.cert_chain_pems[0].bytes().decode()},
            secrets={
                "server.key": shown.private_key_pem.bytes().decode(),
                "tokens": f"lvs:{token}\n",
            },
            caller=lambda daemon: self.with_token(daemon, token),
        )
        self.addCleanup(daemon.stop)
        daemon.start()
        plain, tls = re.findall(r" port (\d+)", daemon.addresses)
        over_tls = (str(directory / "ca.pem"), "tasks.example.org")
        for port, file, further, expected in (
            (plain, "token", (), True),
            (plain, "unended", (), True),
            (plain, "wrong", (), False),
            (plain, "none", (), False),
            (plain, "-", (), False),
            (tls, "token", over_tls, True),
            (tls, "wrong", over_tls, False),
            (tls, "token", (over_tls[0], "other.example.org"), False),
            (plain, "token", over_tls, False),
            (tls, "token", (), False),
        ):
            with self.subTest(port=port, file=file, further=further):
                path = file if file == "-" else str(directory / file)
                checked = subprocess.run(
                    [str(CHECK_TASKD), "127.0.0.1", port, path, *further],
                    capture_output=True,
                    timeout=10,
                )
                self.assertEqual(not checked.returncode, expected, checked.stderr)

    def with_token(self, daemon: Daemon, token: str) -> Connection:
        connection = Connection("127.0.0.1", daemon.port)
        connection.ask("taskd.auth", {"token": token})
        return connection

    def checks(self, path: Path) -> list[str]:
        """Give what HAProxy's latest checks of its servers have come to."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(path))
            asking.sendall(b"show stat typed\n")
            with asking.makefile() as answer:
                return re.findall(r"check_status\S*:str:(?:\* )?(\w*)", answer.read())

    def test_keepalived(self) -> None:
        """
        keepalived takes its configuration.

        Not quite as it is: version 2.2.7 ends itself by SIGTERM when it is to look at
        scripts of another user in its test mode, and both the script and the interface
        are elsewhere here.
        """
        keepalived = must_have("keepalived")
        if why := why_no_lab():
            raise SkipTest(why)
        lab = Lab(0)
        self.addCleanup(lab.close)
        directory = temporary_directory(self)
        shutil.copy(CHECK_TASKD, directory / "check-taskd")
        text = KEEPALIVED_CONF.read_text()
        for there, here in (
            ("script_user nobody", "script_user root"),
            ("/usr/local/bin/check-taskd", str(directory / "check-taskd")),
            ("eth0", "bridge"),
        ):
            self.assertIn(there, text)
            text = text.replace(there, here)
        self.assertEqual(text.count("#misc_path"), 2)
        for variant in (text, text.replace("#misc_path", "misc_path")):
            (directory / "keepalived.conf").write_text(variant)
            checked = subprocess.run(
                [*lab.under(0), keepalived, "-t", "-l", "-f", str(directory / "keepalived.conf")],
                capture_output=True,
                timeout=20,
                start_new_session=True,
            )
            self.assertEqual(checked.returncode, 0, checked.stderr.decode())
