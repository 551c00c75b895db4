"""The processes that share a gateway's port: deaths, reloads, stops."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Final

from websockets.exceptions import InvalidStatus

from tests.integration.daemon import Process, shared_daemon, wait_until, write_secret
from tests.integration.gateway import Gateway, GatewayTestCase, WebSocket, shared_gateway

WEB: Final = "web-0123456789abcdef0123456789"
NEW_WEB: Final = "web-of-tomorrow-0123456789abcdef"

RESTART: Final = 1012
GOING_AWAY: Final = 1001


class ProcessTestCase(GatewayTestCase):
    """Base of tests of a gateway's processes."""

    def pid_of(self, gateway: Gateway, web: WebSocket) -> int:
        """Tell which process has a WebSocket."""
        pid = gateway.process_of(web.connected.socket)
        assert pid is not None
        return pid

    def open_to_each(self, gateway: Gateway) -> dict[int, WebSocket]:
        """Open WebSockets until there is one to each process."""
        found: dict[int, WebSocket] = {}

        def is_each() -> bool:
            web = self.open(gateway)
            found.setdefault(self.pid_of(gateway, web), web)
            return len(found) == gateway.procs

        wait_until(is_each, what="a WebSocket to each process")
        return found

    def is_refused(self, gateway: Gateway) -> bool:
        """Tell whether nobody listens there any more."""
        try:
            socket.create_connection(("127.0.0.1", gateway.port), 20).close()
        except ConnectionRefusedError:
            return True
        except ConnectionError:
            pass
        return False

    def wait_until_refused(self, gateway: Gateway) -> None:
        wait_until(lambda: self.is_refused(gateway), what="the end of listening")

    def wait_until_new(self, gateway: Gateway, before: dict[int, int]) -> None:  # type: ignore[override]
        """Wait until every process has a successor."""
        wait_until(
            lambda: (
                len(new := set(gateway.serving().values()) - set(before.values())) == gateway.procs
                and new
            ),
            what="new processes",
        )


class SharingTests(ProcessTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway("--allow=*", procs=3)

    def test_share(self) -> None:
        """Connections land on all processes, and each serves."""
        for web in self.open_to_each(self.gateway).values():
            self.assertEqual(web.ask("add", [1, 2]), 3)

    def test_figures(self) -> None:
        """/metrics sums up what all processes count, whichever is asked."""
        before = self.gateway.metrics()
        webs = self.open_to_each(self.gateway)
        for web in webs.values():
            self.assertEqual([web.ask("add", [1, 2]) for _ in range(5)], [3] * 5)
            self.assert_error(web.ask("no_such_task"), "unknown-function")
        for _ in range(6):
            after = self.gateway.metrics()
            self.assertEqual(after["taskd_gateway_processes"], 3)
            for name, more in (("messages_total", 6 * 3), ("failed_total", 3)):
                key = f"taskd_gateway_{name}"
                self.assertEqual(after[key] - before[key], more)
            self.assertGreaterEqual(after["taskd_gateway_websockets"], 3)

    def test_kill(self) -> None:
        """One that is killed takes its browsers along; the others serve, and it is replaced."""
        before = self.gateway.serving()
        webs = self.open_to_each(self.gateway)
        killed, victim = webs.popitem()
        path = self.path(self.daemon)
        for number, web in enumerate(webs.values()):
            web.request("hold_on_reactor", [path], id=number)
        victim.request("hold_on_reactor", [path], id="victim")
        self.gateway.wait_for_figure("in_flight", 3)
        self.gateway.kill(killed)
        self.assertEqual(victim.rest(), ([], None))
        self.assertEqual(self.open(self.gateway).ask("add", [1, 2]), 3)
        wait_until(lambda: self.gateway.wait_until_whole() != before, what="a process in its place")
        self.wait_for_log(self.gateway, f"(pid {killed})", "another one is started")
        self.assertEqual(len(set(self.gateway.serving().values()) & set(before.values())), 2)
        self.gateway.wait_for_figure("in_flight", 2)
        self.gateway.wait_for_figure("processes", 3)
        Path(path).touch()
        for number, web in enumerate(webs.values()):
            self.assertEqual(web.reply(), {"id": number, "result": "released"})
        self.open_to_each(self.gateway)


class ReloadTests(ProcessTestCase):
    def test_reload(self) -> None:
        """SIGHUP: new tokens count, calls in flight are answered, idle browsers come again."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(
            daemon,
            "--allow=*",
            "--token-file=tokens",
            "--keep-tokens",
            procs=2,
            secrets={"tokens": f"web:{WEB}\n"},
        )
        old, new = ({"Authorization": f"Bearer {token}"} for token in (WEB, NEW_WEB))
        before = gateway.serving()
        busy = self.open(gateway, headers=old)
        path = self.begin(daemon, busy, "hold", id="hold")
        idle = self.open(gateway, headers=old)
        feed = self.open(gateway, "/live")
        with self.assertRaises(InvalidStatus):
            gateway.open(headers=new, source_address=("127.0.0.2", 0))
        write_secret(gateway.directory / "tokens", f"web:{NEW_WEB}\n")
        gateway.signal(signal.SIGHUP)
        self.assertEqual(idle.rest(), ([], RESTART))
        self.assertEqual(feed.rest()[1], GOING_AWAY)
        self.wait_until_new(gateway, before)
        wait_until(lambda: self.is_told_to_go(busy), what="the drain of the busy process")
        self.wait_for_end_of(*(set(before.values()) - {self.pid_of(gateway, busy)}))
        # Nobody of before accepts any more.
        web = self.open(gateway, headers=new)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        with self.assertRaises(InvalidStatus):
            gateway.open(headers=old, source_address=("127.0.0.3", 0))
        Path(path).touch()
        self.assertEqual(busy.reply(), {"id": "hold", "result": "released"})
        self.assertEqual(busy.rest(), ([], RESTART))
        self.wait_for_end_of(*before.values())
        self.assertEqual(len(gateway.wait_until_whole()), 2)
        gateway.wait_for_figure("processes", 2)
        self.assertNotIn("another one is started", gateway.log)

    def is_told_to_go(self, web: WebSocket) -> bool:
        """Tell whether nothing new is begun for a WebSocket."""
        reply = web.ask("echo", [1], id="late")
        if "result" in reply:
            return False
        self.assert_error(reply, "shutting-down", "not started")
        return True

    def test_unusable_file(self) -> None:
        """A token file that cannot be used leaves all as it was, and the log says why."""
        gateway = self.start_gateway(
            shared_daemon(procs=2),
            "--token-file=tokens",
            "--keep-tokens",
            secrets={"tokens": f"web:{WEB}\n"},
        )
        before = gateway.serving()
        web = self.open(gateway, headers={"Authorization": f"Bearer {WEB}"})
        write_secret(gateway.directory / "tokens", f"web:{NEW_WEB}\n", 0o644)
        gateway.signal(signal.SIGHUP)
        self.wait_for_log(gateway, "no reload, all stays as it was", "chmod 600")
        self.assertEqual(web.ask("echo", [1]), 1)
        self.assertEqual(gateway.serving(), before)


class StopTests(ProcessTestCase):
    def test_stop(self) -> None:
        """SIGTERM: calls in flight are answered, others close at once, and nothing is left."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", procs=2)
        busy, idle, feed = self.open(gateway), self.open(gateway), self.open(gateway, "/live")
        path = self.begin(daemon, busy, "hold", id="hold")
        with gateway.http_connection() as http:
            body = f'["{path}"]'
            http.request(
                "POST", "/call/hold_on_reactor", body, {"Content-Type": "application/json"}
            )
            gateway.wait_for_figure("in_flight", 2)
            gateway.signal(signal.SIGTERM)
            self.assertEqual(idle.rest(), ([], RESTART))
            self.assertEqual(feed.rest()[1], GOING_AWAY)
            self.wait_until_refused(gateway)
            self.assert_error(busy.ask("echo", [1]), "shutting-down", "not started")
            Path(path).touch()
            self.assertEqual(busy.rest(), ([{"id": "hold", "result": "released"}], RESTART))
            self.assertEqual(http.getresponse().read(), b'{"result": "released"}\n')
        self.assertEqual(gateway.wait_for_exit(), -signal.SIGTERM)
        gateway.wait_until_gone()
        self.assertEqual(gateway.errors, "")
        self.assertNotIn("Traceback", gateway.log)

    def test_long_answer(self) -> None:
        """An answer over HTTP that is long goes out whole, whoever is told to go meanwhile."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*")
        raw, idle = self.raw(gateway, receive_bytes=4096), self.raw(gateway)
        idle.request("GET", "/healthz")
        self.assertEqual(idle.answer().status, 200)
        path = self.begin(daemon, self.open(gateway), "hold", id=1)
        size = 8 * 2**20
        body = f"[{size}]"
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        raw.request("POST", "/call/letters", headers, body.encode())
        gateway.wait_for_figure("in_flight", 1)
        gateway.signal(signal.SIGTERM)
        Path(path).touch()
        self.assertTrue(idle.is_hung_up())
        answer = raw.answer()
        self.assertEqual((answer.status, len(answer.json["result"])), (200, size))
        self.assertTrue(raw.is_hung_up())
        gateway.wait_until_gone()

    def test_grace(self) -> None:
        """Who is not answered within --grace is closed, and nothing is left."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", "--grace=0.2")
        busy = self.open(gateway)
        self.begin(daemon, busy, "hold", id="hold")
        gateway.signal(signal.SIGTERM)
        self.assertEqual(busy.rest(), ([], RESTART))
        self.assertEqual(gateway.wait_for_exit(), -signal.SIGTERM)
        gateway.wait_until_gone()

    def test_stop_twice(self) -> None:
        """The second SIGTERM ends everything at once."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", "--grace=3600", procs=2)
        busy = self.open(gateway)
        path = self.begin(daemon, busy, "hold", id="hold")
        gateway.signal(signal.SIGTERM)
        self.wait_until_refused(gateway)
        self.assertTrue(gateway.processes())
        gateway.signal(signal.SIGTERM)
        self.assertEqual(busy.rest(), ([], None))
        gateway.wait_for_exit()
        gateway.wait_until_gone()
        self.assertFalse(self.has_ended(path))

    def test_killed_supervisor(self) -> None:
        """Without their supervisor the processes answer what is in flight, and go."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=*", procs=2)
        before = gateway.serving()
        busy, idle = self.open(gateway), self.open(gateway)
        path = self.begin(daemon, busy, "hold", id="hold")
        keeper = self.pid_of(gateway, busy)
        gateway.kill(gateway.pid)
        self.assertEqual(idle.rest(), ([], RESTART))
        self.wait_until_refused(gateway)
        self.assertIsNotNone(Process.read(keeper))
        self.wait_for_end_of(*(set(before.values()) - {keeper}))
        Path(path).touch()
        self.assertEqual(busy.reply(), {"id": "hold", "result": "released"})
        self.assertEqual(busy.rest(), ([], RESTART))
        gateway.wait_until_gone()

    def test_stop_of_one(self) -> None:
        """One that is told to go by itself goes as at a stop, and is replaced."""
        gateway = self.start_gateway(shared_daemon(procs=2), "--allow=*", procs=2)
        before = gateway.serving()
        webs = self.open_to_each(gateway)
        pid, web = webs.popitem()
        gateway.signal(signal.SIGTERM, pid)
        self.assertEqual(web.rest(), ([], RESTART))
        self.wait_for_end_of(pid)
        wait_until(lambda: gateway.wait_until_whole() != before, what="a process in its place")
        for other in webs.values():
            self.assertEqual(other.ask("add", [1, 2]), 3)
