"""What the service manager is told, and when."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from taskd.notify import Notifier, describe, sender_to, whom_to_ask

PID = 77
INTERVAL = 10.0
LOOK = 0.5
IDLE = {
    "starting": 0,
    "idle": 2,
    "busy": 0,
    "draining": 0,
    "waiting": 0,
    "done": 7,
    "failed": 1,
}
IDLE_TEXT = "2 workers: 2 idle, 0 busy; 0 tasks wait; 7 done, 1 failed"


class DescribeTests(SynchronousTestCase):
    def test_a_pool(self) -> None:
        """All that is always of interest is told."""
        self.assertEqual(describe(IDLE), IDLE_TEXT)

    def test_one(self) -> None:
        """One worker and one task are spoken of as one."""
        told = describe({**IDLE, "idle": 0, "busy": 1, "waiting": 1})
        self.assertEqual(told, "1 worker: 0 idle, 1 busy; 1 task waits; 7 done, 1 failed")

    def test_rare_states(self) -> None:
        """Workers that start or drain are told of when there are any, and counted."""
        told = describe({**IDLE, "starting": 3, "draining": 1})
        self.assertIn("6 workers: 3 starting, 2 idle, 0 busy, 1 draining;", told)


class WhomToAskTests(SynchronousTestCase):
    """Which workers are woken for the watchdog."""

    def asked(self, *silent_for: float) -> Collection[int]:
        """Ask with workers that have been silent so long, which are named by their places."""
        return set(whom_to_ask(100.0, INTERVAL, {n: 100.0 - s for n, s in enumerate(silent_for)}))

    def test_somebody_has_answered(self) -> None:
        """As long as one has answered of late, nobody is woken."""
        self.assertEqual(self.asked(80.0, 4.9, 60.0), set())

    def test_nobody_has_answered_of_late(self) -> None:
        """After half an interval the one is woken who was the last to answer."""
        self.assertEqual(self.asked(80.0, 5.0, 60.0), {1})

    def test_who_was_woken_does_not_answer(self) -> None:
        """After three quarters of it all are woken, so that one is enough who lives."""
        self.assertEqual(self.asked(80.0, 7.5, 60.0), {0, 1, 2})

    def test_nobody_is_there(self) -> None:
        """Without a worker nobody is asked."""
        self.assertEqual(self.asked(), set())


class NotifierTestCase(SynchronousTestCase):
    watchdog_seconds: float | None = None

    def setUp(self) -> None:
        self.sent: list[str] = []
        self.is_full = False
        self.now = 1000.0
        self.figures = dict(IDLE)
        self.counted = 0
        self.notifier = Notifier(self.send, self.watchdog_seconds)

    def send(self, message: bytes) -> bool:
        if not self.is_full:
            self.sent.append(message.decode())
        return not self.is_full

    def count(self) -> dict[str, int]:
        self.counted += 1
        return self.figures

    def look(
        self, *beats: float, is_reloading: bool = False, failure: str = "", after: float = LOOK
    ) -> Collection[int]:
        """Let time pass, and have the notifier look at workers with these last beats."""
        self.now += after
        return set(
            self.notifier.look(self.now, dict(enumerate(beats)), self.count, is_reloading, failure)
        )

    @property
    def told(self) -> list[str]:
        """What was sent since this was last asked."""
        sent, self.sent = self.sent, []
        return sent


class NotifierTests(NotifierTestCase):
    def test_ready(self) -> None:
        """READY is told when the first worker accepts, and once."""
        self.notifier.starting()
        self.assertEqual(self.told, ["STATUS=starting: the task modules are imported"])
        self.look()
        self.assertIn(f"STATUS=starting: {IDLE_TEXT}", self.told)
        self.notifier.ready()
        self.notifier.ready()
        self.assertEqual(self.told, ["READY=1"])

    def test_figures_that_change(self) -> None:
        """Figures are told when they have changed, and a second must have passed."""
        self.notifier.ready()
        self.look()
        self.assertEqual(self.told, ["READY=1", f"STATUS={IDLE_TEXT}"])
        self.figures["done"] = 8
        self.look()
        self.assertEqual(self.told, [])
        self.look()
        self.assertEqual(self.told, [f"STATUS={IDLE_TEXT.replace('7 done', '8 done')}"])

    def test_figures_that_stay(self) -> None:
        """A daemon in which nothing happens sends nothing, and counts once a second at most."""
        self.notifier.ready()
        self.look()
        self.sent, self.counted = [], 0
        for _ in range(100):
            self.look(after=0.1)
        self.assertEqual(self.told, [])
        self.assertLessEqual(self.counted, 10)

    def test_a_reload(self) -> None:
        """A reload is told at once, with its time, and over when nothing is left to replace."""
        self.notifier.ready()
        self.look()
        self.sent = []
        self.notifier.reloading(1234.5678901)
        self.assertEqual(self.told, ["RELOADING=1\nMONOTONIC_USEC=1234567890"])
        self.look(is_reloading=True, after=1.0)
        self.assertEqual(self.told, [f"STATUS=reloading: {IDLE_TEXT}"])
        self.look()
        self.assertEqual(self.told, [f"READY=1\nSTATUS={IDLE_TEXT}"])
        self.look(after=1.0)
        self.assertEqual(self.told, [])

    def test_a_reload_that_fails(self) -> None:
        """Why a reload has failed is told with its end, in one line, and until one succeeds."""
        self.notifier.ready()
        self.notifier.reloading(self.now)
        self.sent = []
        self.look(failure="no such\nmodule")
        told = f"{IDLE_TEXT}; the last reload failed, the old code serves on: no such module"
        self.assertEqual(self.told, [f"READY=1\nSTATUS={told}"])
        self.look(failure="no such\nmodule", after=1.0)
        self.assertEqual(self.told, [])
        self.notifier.reloading(self.now)
        self.look(is_reloading=True, failure="no such\nmodule", after=1.0)
        self.look()
        self.assertEqual(
            self.told[1:], [f"STATUS=reloading: {IDLE_TEXT}", f"READY=1\nSTATUS={IDLE_TEXT}"]
        )

    def test_a_reload_within_a_reload(self) -> None:
        """Another SIGHUP begins the reload anew, and one READY ends both."""
        self.notifier.ready()
        self.notifier.reloading(self.now)
        self.notifier.reloading(self.now)
        self.look(is_reloading=True)
        self.look()
        self.look()
        told = "\n".join(self.told)
        self.assertEqual((told.count("RELOADING=1"), told.count("READY=1")), (2, 2))

    def test_a_reload_before_the_start_is_over(self) -> None:
        """A reload of what does not serve yet is no reload."""
        self.notifier.reloading(self.now)
        self.assertEqual(self.told, [])
        self.notifier.ready()
        self.assertEqual(self.told, ["READY=1"])

    def test_a_stop(self) -> None:
        """A stop asks for all the time that it may take, and a little; only figures follow."""
        self.notifier.ready()
        self.notifier.stopping(34.0)
        self.assertEqual(self.told[1:], ["STOPPING=1\nEXTEND_TIMEOUT_USEC=39000000"])
        self.notifier.ready()
        self.notifier.reloading(self.now)
        self.look(failure="of old")
        self.assertEqual(self.told, [f"STATUS=stopping: {IDLE_TEXT}"])

    def test_a_manager_that_is_full(self) -> None:
        """What must arrive is sent again until it could be, in order; of figures the latest."""
        self.is_full = True
        self.notifier.starting()
        self.notifier.ready()
        self.look(after=1.0)
        self.notifier.reloading(self.now)
        self.look(is_reloading=True, after=1.0)
        self.is_full = False
        self.look(is_reloading=True, after=1.0)
        told = self.told
        self.assertEqual(
            [line.partition("=")[0] for line in told], ["STATUS", "READY", "RELOADING", "STATUS"]
        )
        self.assertEqual(told[-1], f"STATUS=reloading: {IDLE_TEXT}")

    def test_nobody_listens(self) -> None:
        """Without a manager nothing is said, counted or asked."""
        notifier = Notifier()
        notifier.starting()
        notifier.ready()
        notifier.reloading(self.now)
        notifier.stopping(1.0)
        self.assertEqual(set(notifier.look(self.now, {1: 0.0}, self.count, False, "")), set())
        self.assertEqual((self.sent, self.counted), ([], 0))


class WatchdogTests(NotifierTestCase):
    watchdog_seconds = INTERVAL

    def setUp(self) -> None:
        super().setUp()
        self.notifier.ready()
        self.sent = []

    def feedings(self, looks: int, beat: Callable[[], float]) -> list[float]:
        """Look so often, and tell when the watchdog was fed."""
        found = []
        for _ in range(looks):
            self.look(beat())
            found += [self.now] * self.told.count("WATCHDOG=1")
        return found

    def test_a_pool_that_answers(self) -> None:
        """It is fed at least twice in an interval as long as a worker answers, and not always."""
        fed = self.feedings(100, lambda: self.now)
        gaps = [later - sooner for sooner, later in pairwise(fed)]
        self.assertLessEqual(max(gaps), INTERVAL / 2)
        self.assertGreaterEqual(min(gaps), INTERVAL / 4)

    def test_a_short_interval(self) -> None:
        """At two looks in an interval it is fed at each."""
        self.notifier = Notifier(self.send, 2 * LOOK)
        self.assertEqual(len(self.feedings(10, lambda: self.now)), 10)

    def test_a_pool_that_does_not_answer(self) -> None:
        """An interval after the last answer it is not fed any more, and at once after another."""
        last = self.now
        fed = self.feedings(100, lambda: last)
        self.assertLess(max(fed), last + INTERVAL)
        self.assertEqual(len(self.feedings(1, lambda: self.now)), 1)

    def test_one_that_answers(self) -> None:
        """One worker that answers is enough."""
        for _ in range(100):
            self.look(0.0, self.now, 0.0)
        self.assertGreaterEqual(self.told.count("WATCHDOG=1"), 10)

    def test_no_worker(self) -> None:
        """A pool without a worker is not fed."""
        self.look()
        self.assertNotIn("WATCHDOG=1", self.told)

    def test_who_is_to_be_asked(self) -> None:
        """The workers are named that are to be woken."""
        self.assertEqual(self.look(self.now, self.now), set())
        self.assertEqual(self.look(self.now - 6.0, self.now - 5.0), {1})

    def test_a_stop(self) -> None:
        """While it stops, it is fed whoever answers."""
        self.notifier.stopping(1.0)
        self.assertGreaterEqual(len(self.feedings(100, lambda: 0.0)), 10)

    def test_a_manager_that_is_full(self) -> None:
        """A sign of life that could not be sent is sent at the next look."""
        self.is_full = True
        self.look(self.now)
        self.is_full = False
        self.look(self.now)
        self.assertIn("WATCHDOG=1", self.told)


class SenderTests(SynchronousTestCase):
    """What touches a socket."""

    def listen(self, address: str | bytes) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(listening.close)
        listening.bind(address)
        listening.setblocking(False)
        return listening

    def directory(self) -> Path:
        directory = tempfile.TemporaryDirectory(prefix="taskd-test-")
        self.addCleanup(directory.cleanup)
        return Path(directory.name)

    def test_a_path(self) -> None:
        """A message goes to the socket at the path, as one datagram."""
        path = str(self.directory() / "notify")
        listening = self.listen(path)
        send = sender_to(path)
        assert send is not None
        self.assertTrue(send(b"READY=1\nSTATUS=x"))
        self.assertEqual(listening.recv(100), b"READY=1\nSTATUS=x")

    def test_a_name_on_no_disk(self) -> None:
        """An address with an @ is the name of an abstract socket."""
        listening = self.listen(b"\0taskd-notify-%d" % os.getpid())
        send = sender_to(f"@taskd-notify-{os.getpid()}")
        assert send is not None
        self.assertTrue(send(b"READY=1"))
        self.assertEqual(listening.recv(100), b"READY=1")

    def test_nobody_there(self) -> None:
        """A socket that is not there, or cannot be, is no error."""
        for path in (self.directory() / "nobody", "/" + "x" * 200):
            send = sender_to(str(path))
            assert send is not None
            self.assertFalse(send(b"READY=1"))

    def test_a_full_socket(self) -> None:
        """A manager that does not read is not waited for."""
        path = str(self.directory() / "notify")
        listening = self.listen(path)
        send = sender_to(path)
        assert send is not None
        sent = 0
        while send(b"x" * 1000):
            sent += 1
        self.assertGreater(sent, 0)
        self.assertEqual(len(listening.recv(2000)), 1000)
        self.assertTrue(send(b"READY=1"))

    def test_other_addresses(self) -> None:
        """Addresses of other kinds are not understood."""
        for address in ("", "vsock:2:1", "notify"):
            self.assertIsNone(sender_to(address), address)


class TakeTests(SynchronousTestCase):
    """What is taken from the environment."""

    def take(self, **environ: str) -> Notifier:
        self.environ = {"HOME": "/", "NOTIFY_SOCKET": "@taskd-nobody", **environ}
        return Notifier.take(self.environ, PID)

    def has_watchdog(self, **environ: str) -> bool:
        """Tell whether workers are woken for a watchdog."""
        notifier = self.take(**environ)
        return bool(notifier.look(1e9, {"worker": 0.0}, lambda: IDLE, False, ""))

    def test_it_is_taken(self) -> None:
        """What was for this process alone is gone, and the rest is there."""
        self.take(WATCHDOG_USEC="1", WATCHDOG_PID="1")
        self.assertEqual(self.environ, {"HOME": "/"})

    def test_nothing_is_there(self) -> None:
        """Without a manager there is no watchdog either."""
        self.assertFalse(self.has_watchdog(WATCHDOG_USEC="30000000", NOTIFY_SOCKET=""))

    def test_a_watchdog(self) -> None:
        """A watchdog is this process's if it says so, or does not say whose it is."""
        self.assertTrue(self.has_watchdog(WATCHDOG_USEC="30000000"))
        self.assertTrue(self.has_watchdog(WATCHDOG_USEC="30000000", WATCHDOG_PID=str(PID)))
        self.assertFalse(self.has_watchdog(WATCHDOG_USEC="30000000", WATCHDOG_PID="78"))
        self.assertFalse(self.has_watchdog(WATCHDOG_PID=str(PID)))

    def test_nonsense(self) -> None:
        """What is no time is taken for none."""
        for text in ("", "0", "-1", "1.5", "often", "٣"):
            self.assertFalse(self.has_watchdog(WATCHDOG_USEC=text), text)
