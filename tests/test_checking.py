"""Whether the daemon could start, found out without a trace."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.checking import check
from taskd.endpoints import listeners_from
from taskd.errors import StartFailed
from taskd.ports import Ports
from taskd.settings import Settings
from tests.support import temporary_directory

PATIENCE_SECONDS = 10.0

TASKS = "from taskd import task\n@task\ndef {0}(): pass\n"


class CheckTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.addCleanup(os.chdir, os.getcwd())
        self.directory = temporary_directory(self)
        os.chdir(self.directory)

    def check(self, text: str | None = None, **fields: Any) -> str:
        """Check settings, with a task module of that text."""
        if text is not None:
            (self.directory / "tasks_to_check.py").write_text(text)
            fields["task_modules"] = ("tasks_to_check.py",)
        settings = Settings(**{"port": 0, **fields})
        return check(settings, Ports(settings, listeners_from(settings)))

    def refused(self, *args: Any, **fields: Any) -> str:
        with self.assertRaises(StartFailed) as caught:
            self.check(*args, **fields)
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_good(self) -> None:
        """What would be started is told: how many workers, which tasks, and where."""
        self.assertEqual(
            self.check(TASKS.format("add"), procs=1, port=5, listen=("unix:/run/x",)),
            "the configuration is good: 1 worker, tasks: add, echo, send_mail; "
            "listens on 127.0.0.1 port 5, unix:/run/x",
        )

    def test_many_tasks(self) -> None:
        """Of very many tasks some are named, and how many others there are."""
        text = "".join(TASKS.format(f"a{n:02}") for n in range(30))
        self.assertIn("a00, a01, ", self.check(text))
        self.assertIn("a19 and 12 more; listens", self.check(text))

    def test_the_port_stays_free(self) -> None:
        """No port is bound: one that is taken is no obstacle, and no socket's file is made."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            self.assertIn(f"port {port}", self.check(port=port, listen=("unix:here",)))
        self.assertEqual(os.listdir(self.directory), [])

    def test_the_modules_stay_outside(self) -> None:
        """The task modules are imported in another process, as the daemon would do it."""
        (self.directory / "beside_check.py").write_text("name = 'from_beside'\n")
        text = "import beside_check\nfrom taskd import task\n" + (
            "@task(name=beside_check.name)\ndef add(): pass\n"
        )
        self.assertIn("from_beside", self.check(text))
        self.assertEqual({"tasks_to_check", "beside_check"} & set(sys.modules), set())
        self.assertNotIn(str(self.directory), sys.path)

    def test_modules_that_cannot_be(self) -> None:
        """A module that cannot be imported is told, and so is one that ends the process."""
        for text, words in (
            ("1 / 0\n", "ZeroDivisionError"),
            ("import sys\nsys.exit(0)\n", "SystemExit"),
            ("import os\nos._exit(0)\n", "the process died while it imported"),
            ("import os\nos.abort()\n", "the process died while it imported"),
            ("x = 1\n", "@task"),
        ):
            self.assertIn(words, self.refused(text))

    def test_modules_that_print(self) -> None:
        """What a module prints is no answer."""
        text = "import os\nprint('{}', flush=True)\nos.write(1, b'x')\nos.write(2, b'y')\n"
        self.assertIn("tasks: add", self.check(text + TASKS.format("add")))

    def test_modules_that_start_something(self) -> None:
        """What a module has started ends with the check: threads, and processes."""
        text = (
            "import subprocess, threading\n"
            "threading.Thread(target=threading.Event().wait).start()\n"
            "child = subprocess.Popen(['sleep', '1000'])\n"
            "from taskd import task\n@task(name=f'child_{child.pid}')\ndef add(): pass\n"
        )
        good = self.check(text)
        pid = int(good.partition("child_")[2].partition(",")[0])
        with contextlib.suppress(ProcessLookupError):
            self.assertTrue(select.select([os.pidfd_open(pid)], [], [], PATIENCE_SECONDS)[0])

    def test_addresses(self) -> None:
        """An address that others can reach, by whichever option, needs somebody to be asked."""
        for fields in ({"interface": "0.0.0.0"}, {"interface": "::"}, {"listen": ("tcp:1",)}):
            self.assertIn("could run tasks", self.refused(**fields))
            self.assertIn("listens on", self.check(insecure=True, **fields))
        self.assertIn("cannot listen on no.such.host.", self.refused(interface="no.such.host."))

    def test_files(self) -> None:
        """Tokens, keys and certificates are read."""
        self.assertIn("--token-file nowhere", self.refused(token_file="nowhere"))
        self.assertIn("nowhere.pem", self.refused(certificate="nowhere.pem", key="nowhere.key"))
