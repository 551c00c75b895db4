"""The zygotes of one daemon, with records that the test plays."""

from __future__ import annotations

import os
import signal
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from taskd.credentials import Credentials
from taskd.errors import StartFailed
from taskd.scoreboard import Scoreboard
from taskd.settings import Settings
from taskd.zygotes import Zygotes

KILLED = int(signal.SIGKILL)


class FakeZygote:
    """
    A zygote's record, played by the test.

    Attributes:
        spec: What it was told to load.
        told: What it was told since, and what was waited for.
    """

    def __init__(self, machine: Machine, spec: dict[str, Any], pid: int) -> None:
        self._machine = machine
        self.spec = spec
        self.pid = pid
        self.loaded_at: float | None = None
        self.told: list[str] = []

    @property
    def is_loaded(self) -> bool:
        return self.loaded_at is not None

    def lived_seconds(self, now: float) -> float:
        return 0.0 if self.loaded_at is None else now - self.loaded_at

    def wait_until_loaded(self) -> None:
        self.told.append("wait")
        self.load()
        self.begin()

    def begin(self) -> None:
        self.told.append("begin")

    def dismiss(self) -> None:
        self.told.append("dismiss")

    def unlisten(self) -> None:
        self.told.append("unlisten")

    # What it says.

    def load(self) -> None:
        """Say that it has loaded."""
        self._machine.zygotes.zygote_loaded(self)

    def fail(self, reason: str) -> None:
        """Say that it cannot load."""
        self._machine.zygotes.zygote_failed(self, reason)

    def die(self, status: int = KILLED) -> None:
        """End."""
        self._machine.zygotes.zygote_gone(self, status)


class Machine(Clock):
    """
    What the zygotes live on, and who owns them.

    Attributes:
        made: Every record that was made.
        spawn_errors: What the next spawnings fail with.
        refusals: Why the next credentials cannot be used.
        loaded: For each time that one could fork: which, and whether it was a reload.
        gone: For each that has gone: which, and whether it was the current one.
    """

    def __init__(self, scoreboard: Scoreboard, **settings: Any) -> None:
        super().__init__()
        self.rightNow = 1000.0
        self.clock = self.seconds
        self.made: list[FakeZygote] = []
        self.spawn_errors: list[OSError] = []
        self.refusals: list[str] = []
        self.loaded: list[tuple[int, bool]] = []
        self.gone: list[tuple[int, bool]] = []
        self.slot = scoreboard.supervisor_slot()
        self.zygotes = Zygotes(self, self, Settings(0, **settings), self.slot, self.make)

    def make(self, spec: dict[str, Any]) -> FakeZygote:
        if self.spawn_errors:
            raise self.spawn_errors.pop()
        self.made.append(FakeZygote(self, spec, 100 + len(self.made)))
        return self.made[-1]

    def number_of(self, zygote: Any) -> int:
        return self.made.index(zygote)

    def credentials(self) -> Credentials:
        if self.refusals:
            raise StartFailed(self.refusals.pop())
        return Credentials(tokens=(("web", str(len(self.made))),), key_pairs=(None,))

    def zygote_loaded(self, is_reload: bool) -> None:
        self.loaded.append((self.number_of(self.zygotes.loaded), is_reload))

    def zygote_gone(self, zygote: Any, is_current: bool) -> None:
        self.gone.append((self.number_of(zygote), is_current))

    @property
    def reload(self) -> dict[str, Any] | None:
        """What is shown of the last reload."""
        return self.slot.summary(self.seconds())[0]["reload"]


class ZygotesTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        fd = Scoreboard.create(1)
        self.addCleanup(os.close, fd)
        self.machine = Machine(Scoreboard(fd), grace_seconds=7.5)
        self.zygotes = self.machine.zygotes
        self.made = self.machine.made

    def start(self) -> FakeZygote:
        """Start, and have the first zygote live for a while."""
        self.zygotes.start(self.machine.credentials())
        self.machine.advance(60)
        return self.made[0]

    def assertNumbers(self, zygotes: list[Any], numbers: list[int]) -> None:
        self.assertCountEqual([self.machine.number_of(z) for z in zygotes], numbers)


class StartTests(ZygotesTestCase):
    def test_the_first_is_waited_for(self) -> None:
        """The start waits for the first zygote, and its owner is told."""
        zygote = self.start()
        self.assertEqual(zygote.told, ["wait", "begin"])
        self.assertIs(self.zygotes.loaded, zygote)
        self.assertEqual(self.machine.loaded, [(0, False)])
        self.assertIsNone(self.machine.reload)

    def test_what_it_is_told(self) -> None:
        """It is told what to load and with which settings, and where."""
        spec = self.start().spec
        self.assertEqual((spec["boot"], spec["preload"]), ("taskd.worker", True))
        self.assertEqual((spec["directory"], spec["grace_seconds"]), (os.getcwd(), 7.5))
        self.assertEqual(spec["settings"]["grace_seconds"], 7.5)

    def test_its_credentials(self) -> None:
        """It is told what callers are shown and have to show, and how many sockets there are."""
        spec = self.start().spec
        expected = Credentials(tokens=(("web", "0"),), key_pairs=(None,))
        self.assertEqual(Credentials.from_json(spec["credentials"]), expected)
        self.assertEqual(spec["listening"], 1)

    def test_imports_that_cannot_be_shared(self) -> None:
        """Once one could not share its imports, no later one tries to."""
        self.zygotes.zygote_cannot_preload("they start threads")
        self.assertFalse(self.start().spec["preload"])


class DeathTests(ZygotesTestCase):
    def test_one_that_has_served(self) -> None:
        """A zygote that dies after it has served for a while is replaced at once."""
        self.start().die()
        self.assertEqual(self.machine.gone, [(0, True)])
        self.assertIsNone(self.zygotes.loaded)
        self.machine.advance(0)
        self.assertEqual(self.made[1].told, ["begin"])
        self.assertIsNone(self.zygotes.loaded)
        self.made[1].load()
        self.assertIs(self.zygotes.loaded, self.made[1])
        self.assertEqual(self.machine.loaded, [(0, False), (1, False)])

    def test_one_that_dies_young(self) -> None:
        """Zygotes that die at their start are replaced ever later."""
        self.zygotes.start(self.machine.credentials())
        for number, delay in enumerate((0.1, 0.2, 0.4), 2):
            self.made[-1].die(1 << 8)
            self.machine.advance(delay - 0.01)
            self.assertEqual(len(self.made), number - 1)
            self.machine.advance(0.02)
            self.assertEqual(len(self.made), number)

    def test_one_that_cannot_load(self) -> None:
        """A new zygote that cannot import the tasks is let go, and is not the last one."""
        self.start().die()
        self.machine.advance(0)
        self.made[1].fail("--tasks x: broken for the moment")
        self.assertEqual(self.made[1].told, ["begin", "dismiss"])
        self.made[1].die(0)
        self.machine.advance(0.1)
        self.assertEqual(len(self.made), 3)
        self.assertIsNone(self.machine.reload)

    def test_one_that_cannot_be_spawned(self) -> None:
        """A zygote that the kernel refuses to start is started later, ever later."""
        self.start().die()
        self.machine.spawn_errors = [OSError(11, "no processes")] * 2
        self.machine.advance(0)
        for delay in (0.1, 0.2):
            self.assertEqual(len(self.made), 1)
            self.machine.advance(delay)
        self.assertEqual(len(self.made), 2)


class ReloadTests(ZygotesTestCase):
    def test_a_reload(self) -> None:
        """The old zygote forks until the new one has loaded; then that one does."""
        old = self.start()
        self.zygotes.reload()
        new = self.made[1]
        self.assertEqual((new.told, old.told), (["begin"], ["wait", "begin"]))
        self.assertIs(self.zygotes.loaded, old)
        self.assertTrue(self.zygotes.is_latest(old))
        new.load()
        self.assertIs(self.zygotes.loaded, new)
        self.assertEqual(self.machine.loaded[1:], [(1, True)])
        self.assertFalse(self.zygotes.is_latest(old))
        self.assertTrue(self.zygotes.is_latest(new))
        self.assertNumbers(self.zygotes.all(), [0, 1])
        self.machine.advance(5)
        self.assertEqual(self.machine.reload, {"seconds_ago": 5.0, "failure": None})

    def test_the_old_one_goes_when_it_is_not_used(self) -> None:
        """The old zygote is let go when its last worker has gone, and its end changes nothing."""
        old = self.start()
        self.zygotes.reload()
        self.made[1].load()
        self.zygotes.dismiss_unused({old, self.made[1]})
        self.assertNotIn("dismiss", old.told)
        self.zygotes.dismiss_unused({self.made[1]})
        self.assertEqual(old.told[-1], "dismiss")
        self.assertNotIn("dismiss", self.made[1].told)
        old.die(0)
        self.assertEqual(self.machine.gone, [(0, False)])
        self.machine.advance(60)
        self.assertEqual(len(self.made), 2)
        self.assertNumbers(self.zygotes.all(), [1])

    def test_an_old_one_that_is_killed(self) -> None:
        """An old zygote that is killed is not replaced."""
        old = self.start()
        self.zygotes.reload()
        self.made[1].load()
        old.die()
        self.machine.advance(60)
        self.assertEqual(len(self.made), 2)

    def test_several_old_ones(self) -> None:
        """After several reloads each old zygote stays for its own workers."""
        self.start()
        for number in (1, 2):
            self.zygotes.reload()
            self.made[number].load()
        self.zygotes.dismiss_unused({self.made[0]})
        self.assertEqual(["dismiss" in z.told for z in self.made], [False, True, False])

    def test_code_that_cannot_be_loaded(self) -> None:
        """If the new code cannot be loaded the old serves on, and the reason is shown."""
        old = self.start()
        self.zygotes.reload()
        self.made[1].fail("--tasks x: SyntaxError")
        self.assertEqual(self.made[1].told, ["begin", "dismiss"])
        self.assertIs(self.zygotes.loaded, old)
        self.assertTrue(self.zygotes.is_latest(old))
        shown = {"seconds_ago": 0.0, "failure": "--tasks x: SyntaxError"}
        self.assertEqual(self.machine.reload, shown)
        self.made[1].die(0)
        self.machine.advance(60)
        self.assertEqual((len(self.made), self.machine.gone), (2, [(1, False)]))
        self.assertEqual(self.machine.loaded, [(0, False)])

    def test_a_new_one_that_dies_loading(self) -> None:
        """If the new zygote dies while it loads, that is the reason that is shown."""
        old = self.start()
        self.zygotes.reload()
        self.made[1].die(int(signal.SIGSEGV))
        assert self.machine.reload is not None
        self.assertEqual(
            self.machine.reload["failure"],
            "the zygote was killed by SIGSEGV while it loaded the code",
        )
        self.assertIs(self.zygotes.loaded, old)
        self.machine.advance(60)
        self.assertEqual(len(self.made), 2)

    def test_a_new_one_that_cannot_be_spawned(self) -> None:
        """If no new zygote can be spawned, that is the reason that is shown."""
        self.start()
        self.machine.spawn_errors = [OSError(11, "no processes")]
        self.zygotes.reload()
        assert self.machine.reload is not None
        self.assertIn("no processes", self.machine.reload["failure"])
        self.assertNumbers(self.zygotes.all(), [0])

    def test_credentials_are_read_anew(self) -> None:
        """A reload takes what is in the files then, and so does a zygote that is replaced later."""
        self.start()
        self.zygotes.reload()
        self.made[1].load()
        self.machine.advance(60)
        self.made[1].die()
        self.machine.advance(0)
        tokens = [zygote.spec["credentials"]["tokens"] for zygote in self.made]
        self.assertEqual(tokens, [(("web", "0"),), (("web", "1"),), (("web", "1"),)])

    def test_credentials_that_cannot_be_used(self) -> None:
        """If the credentials cannot be used the old ones are used on, and the reason is shown."""
        old = self.start()
        self.machine.refusals = ["--token-file tokens, line 1: no"]
        self.zygotes.reload()
        shown = {"seconds_ago": 0.0, "failure": "--token-file tokens, line 1: no"}
        self.assertEqual(self.machine.reload, shown)
        self.assertEqual(self.made, [old])
        self.assertIs(self.zygotes.loaded, old)
        old.die()
        self.machine.advance(0)
        self.assertEqual(self.made[1].spec["credentials"], old.spec["credentials"])

    def test_a_new_one_that_cannot_have_them(self) -> None:
        """If no new zygote can be spawned the old credentials are used on as well."""
        old = self.start()
        self.machine.spawn_errors = [OSError(11, "no processes")]
        self.zygotes.reload()
        old.die()
        self.machine.advance(0)
        self.assertEqual(self.made[1].spec["credentials"], old.spec["credentials"])

    def test_after_a_failure(self) -> None:
        """A reload that goes well ends the showing of an earlier failure."""
        self.start()
        self.zygotes.reload()
        self.made[1].fail("broken")
        self.zygotes.reload()
        self.made[2].load()
        self.assertEqual(self.machine.reload, {"seconds_ago": 0.0, "failure": None})

    def test_told_again_meanwhile(self) -> None:
        """Being told again while code is loaded, however often, loads it once more afterwards."""
        self.start()
        self.zygotes.reload()
        for _ in range(3):
            self.zygotes.reload()
        self.assertEqual(len(self.made), 2)
        self.made[1].load()
        self.assertEqual(len(self.made), 3)
        self.made[2].load()
        self.assertEqual(len(self.made), 3)
        self.assertEqual(self.machine.loaded, [(0, False), (1, True), (2, True)])

    def test_told_again_before_a_failure(self) -> None:
        """Being told again while code is loaded that cannot be loads it once more as well."""
        for end in (lambda zygote: zygote.fail("broken"), lambda zygote: zygote.die()):
            self.setUp()
            self.start()
            self.zygotes.reload()
            self.zygotes.reload()
            end(self.made[1])
            self.assertEqual(len(self.made), 3)

    def test_while_there_is_none(self) -> None:
        """Being told while there is no zygote loads the code once one is there, for the workers."""
        self.start().die()
        self.zygotes.reload()
        self.assertEqual(len(self.made), 1)
        self.machine.advance(0)
        self.made[1].load()
        self.assertEqual(len(self.made), 3)
        self.made[2].load()
        self.assertEqual(self.machine.loaded[1:], [(1, False), (2, True)])

    def test_the_current_one_dies_meanwhile(self) -> None:
        """A zygote that dies while new code is loaded is not replaced if that is there first."""
        self.start()
        self.zygotes.reload()
        self.made[0].die()
        self.made[1].load()
        self.machine.advance(60)
        self.assertEqual(len(self.made), 2)
        self.assertIs(self.zygotes.loaded, self.made[1])
        self.assertEqual(self.machine.loaded[1:], [(1, True)])


class StopTests(ZygotesTestCase):
    def test_those_that_are_there(self) -> None:
        """Every zygote closes the ports, old ones too, once it can hear that."""
        self.start()
        self.zygotes.reload()
        self.made[1].load()
        self.zygotes.reload()
        self.zygotes.stop()
        self.assertEqual(["unlisten" in z.told for z in self.made], [True, True, False])
        self.made[2].load()
        self.assertEqual(self.made[2].told[-1], "unlisten")

    def test_one_that_loads_late(self) -> None:
        """Code that is loaded during the stop takes nobody's place, and its zygote is known."""
        old = self.start()
        self.zygotes.reload()
        self.zygotes.stop()
        self.made[1].load()
        self.assertEqual(self.machine.loaded, [(0, False)])
        self.assertTrue(self.zygotes.is_latest(old))
        self.assertNumbers(self.zygotes.all(), [0, 1])

    def test_nothing_is_loaded(self) -> None:
        """During the stop nothing is reloaded and nothing replaced."""
        self.start()
        self.zygotes.stop()
        self.zygotes.reload()
        self.made[0].die()
        self.machine.advance(60)
        self.assertEqual(len(self.made), 1)
        self.assertEqual(self.machine.gone, [(0, True)])

    def test_one_that_was_to_be_replaced(self) -> None:
        """A zygote that died before the stop is not replaced during it."""
        self.start().die(1 << 8)
        self.zygotes.stop()
        self.machine.advance(60)
        self.assertEqual(len(self.made), 1)
