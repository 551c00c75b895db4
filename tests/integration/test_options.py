"""What the operator can tell the daemon, and how it says that something cannot be."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.case import QUICK_SECONDS, RefusedTestCase
from tests.integration.daemon import Daemon, Ended

TASKS = """
from taskd import task

@task
def add(a, b):
    return a + b
"""

IMPORTED_BY = """
import os
from taskd import task

importer = os.getpid()

@task
def who_imported():
    return importer

@task
def who_runs():
    return os.getpid()
"""

THREAD_AT_IMPORT = (
    """
import queue
import threading

asked = queue.Queue()

def work():
    while True:
        asked.get().put("from the thread")

threading.Thread(target=work, daemon=True).start()
"""
    + IMPORTED_BY
    + """
@task
def ask_thread():
    answer = queue.Queue()
    asked.put(answer)
    return answer.get(timeout=10)
"""
)

REACTOR_AT_IMPORT = (
    """
from twisted.internet import reactor
from twisted.internet.task import deferLater
"""
    + IMPORTED_BY
    + """
@task
async def later():
    await deferLater(reactor, 0.01)
    return "later"
"""
)


class RefusedTests(RefusedTestCase):
    def test_options_that_cannot_be(self) -> None:
        """An option that cannot be is named, with what it may be."""
        for options, words in (
            (("--port", "70000"), ("--port", "65535", "70000")),
            (("--procs", "0"), ("--procs", "1", "0")),
            (("--threads", "0"), ("--threads",)),
            (("--max-line", "10"), ("--max-line", "1024")),
            (("--grace", "-1"), ("--grace", "-1")),
            (("--grace", "nan"), ("--grace", "nan")),
            (("--backlog", "-1"), ("--backlog", "0", "-1")),
            (("--max-in-flight", "0"), ("--max-in-flight", "1", "0")),
            (("--max-connections", "0"), ("--max-connections", "1", "0")),
            (("--first-line-timeout", "0"), ("--first-line-timeout", "0.1")),
            (("--idle-timeout", "0"), ("--idle-timeout", "0.1")),
            (("--max-tasks", "0"), ("--max-tasks", "1", "0")),
            (("--max-rss", "inf"), ("--max-rss", "inf")),
            (("--smtp", "mail.example.org"), ("--smtp", "HOST:PORT")),
            (("--smtp", "mail:0"), ("--smtp", "HOST:PORT")),
            (("--smtp", "mail:25", "--smtp-tls", "ssl"), ("--smtp-tls", "starttls", "ssl")),
            (("--smtp", "mail:25", "--smtp-login", "/no/file"), ("--smtp-login", "/no/file")),
            (("--colour",), ("colour",)),
            (("word",), ("arguments",)),
        ):
            self.assert_refused(self.refuse(*options), *words)

    def test_options_that_are_no_numbers(self) -> None:
        """An option that must be a number and is none is named."""
        for option in ("--port", "--procs", "--threads", "--max-line", "--grace"):
            self.assert_refused(self.refuse(option, "many"), option[2:], "many")

    def test_login_that_cannot_be(self) -> None:
        """A login file without a colon is refused, and what stands in it is not shown."""
        ended = self.refuse(
            "--smtp", "mail:25", "--smtp-login", "login", secrets={"login": "only-a-secret\n"}
        )
        self.assert_refused(ended, "USER:PASSWORD")
        self.assertNotIn("only-a-secret", ended.errors + ended.output)

    def test_interface_that_others_reach(self) -> None:
        """An address that other machines reach needs ``--insecure``, and the message says so."""
        for address in ("0.0.0.0", "::"):
            self.assert_refused(self.refuse("--interface", address), "--interface", "--insecure")

    def test_interface_that_is_not_there(self) -> None:
        """An address that this machine does not have is named."""
        for options in ((), ("--insecure",)):
            ended = self.refuse("--interface", "192.0.2.1", *options)
            self.assert_refused(ended, "192.0.2.1", "no such address")

    def test_port_in_use(self) -> None:
        """A port that another process listens on is named."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            ended = Daemon(port=port).run(QUICK_SECONDS)
        self.assert_refused(ended, f"127.0.0.1 port {port}", "another process")

    def test_module_that_is_not_there(self) -> None:
        """A missing module or file is named."""
        self.assert_refused(self.refuse(tasks="no_such_module"), "--tasks no_such_module")
        self.assert_refused(self.refuse(tasks="no/such/file.py"), "no/such/file.py")

    def test_module_name_that_cannot_be(self) -> None:
        """What is neither a module's name nor a path of a Python file is refused."""
        for name in ("tasks/mail", "my-tasks", "a..b"):
            self.assert_refused(self.refuse(tasks=name), "--tasks", name)

    def test_module_with_syntax_error(self) -> None:
        """A syntax error is told with its file and line."""
        ended = self.refuse(tasks="broken.py", files={"broken.py": "import os\ndef broken(:\n"})
        self.assert_refused(ended, "--tasks broken.py", "SyntaxError", "line 2")

    def test_module_that_raises(self) -> None:
        """An exception at import is told with its file and line."""
        ended = self.refuse(
            tasks="raises.py", files={"raises.py": "\n\nraise KeyError('of\\nmany lines')\n"}
        )
        self.assert_refused(ended, "--tasks raises.py", "KeyError", "raises.py, line 3")

    def test_module_that_misses_a_module(self) -> None:
        """What a module cannot import is told, and where it wants to."""
        ended = self.refuse(tasks="tasks.py", files={"tasks.py": "import no_such_library\n"})
        self.assert_refused(ended, "no_such_library", "tasks.py, line 1")

    def test_module_that_exits(self) -> None:
        """A module that ends the process at import is named."""
        ended = self.refuse(tasks="leave.py", files={"leave.py": "import sys\nsys.exit(0)\n"})
        self.assert_refused(ended, "--tasks leave.py", "SystemExit")

    def test_module_that_kills(self) -> None:
        """A module that kills the process that imports it ends the start."""
        for text in ("import os\nos._exit(3)\n", "import os\nos.abort()\n"):
            for options in ((), ("--no-preload",)):
                ended = self.refuse(*options, tasks="die.py", files={"die.py": text})
                self.assert_refused(ended, "import")

    def test_module_that_ends_the_process_in_peace(self) -> None:
        """A module that ends the importing process with status 0 ends the start as well."""
        for options in ((), ("--no-preload",)):
            files = {"die.py": "import os\nos._exit(0)\n"}
            self.assert_refused(self.refuse(*options, tasks="die.py", files=files), "import")

    def test_module_without_tasks(self) -> None:
        """A module in which nothing is marked with ``@task`` is refused."""
        ended = self.refuse(tasks="plain.py", files={"plain.py": "def add(a, b): return a + b\n"})
        self.assert_refused(ended, "--tasks plain.py", "@task")

    def test_task_name_that_cannot_be(self) -> None:
        """A task's name that cannot be, or is the daemon's own, is refused."""
        for name in ("two words", "taskd.ping", ""):
            text = f"from taskd import task\n@task(name={name!r})\ndef add(): pass\n"
            ended = self.refuse(tasks="tasks.py", files={"tasks.py": text})
            self.assert_refused(ended, "--tasks tasks.py", repr(name))

    def test_name_that_is_taken_twice(self) -> None:
        """Two tasks of one name are refused, and both modules named."""
        ended = self.refuse(tasks="one.py,two.py", files={"one.py": TASKS, "two.py": TASKS})
        self.assert_refused(ended, "'add'", "one", "two")

    def test_without_preload(self) -> None:
        """With ``--no-preload`` a module that cannot be imported still ends the start."""
        ended = self.refuse("--no-preload", tasks="raises.py", files={"raises.py": "1 / 0\n"})
        self.assert_refused(ended, "--tasks raises.py", "ZeroDivisionError", "line 1")

    def test_default_module(self) -> None:
        """A ``tasks.py`` in the working directory that cannot be imported ends the start."""
        ended = self.refuse(files={"tasks.py": "1 / 0\n"})
        self.assert_refused(ended, "--tasks tasks.py", "ZeroDivisionError")


class RefusedInBackgroundTests(SynchronousTestCase):
    """Starts that fail behind twistd's own fork: status not 0, no process left."""

    def start(self, *options: str, files: Mapping[str, str], port: int = 0) -> Ended:
        return Daemon(
            *options,
            port=port,
            tasks="tasks.py",
            files=files,
            in_background=True,
        ).run(QUICK_SECONDS)

    def test_option(self) -> None:
        """An option that cannot be ends the start before the fork."""
        ended = self.start("--threads", "0", files={"tasks.py": TASKS})
        self.assertEqual(ended.status, 1)
        self.assertIn("--threads", ended.errors)

    def test_port_in_use(self) -> None:
        """A port that another process listens on ends the start, and the operator is told."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            ended = self.start(files={"tasks.py": TASKS}, port=other.getsockname()[1])
        self.assertNotEqual(ended.status, 0)
        self.assertIn("another process listens there", ended.errors + ended.output)

    def test_module(self) -> None:
        """A module that cannot be imported ends the start, and the operator is told."""
        ended = self.start(files={"tasks.py": "1 / 0\n"})
        self.assertNotEqual(ended.status, 0)
        self.assertIn("ZeroDivisionError", ended.errors + ended.output)


class AcceptedTests(SynchronousTestCase):
    """Starts that go well."""

    def start(
        self,
        *options: str,
        files: Mapping[str, str] | None = None,
        tasks: str | None = None,
        procs: int | None = 2,
    ) -> Daemon:
        daemon = Daemon(*options, files=files, tasks=tasks, procs=procs)
        self.addCleanup(daemon.stop)
        return daemon.start()

    def test_default_module(self) -> None:
        """Without ``--tasks``, the ``tasks.py`` in the working directory is used."""
        daemon = self.start(files={"tasks.py": TASKS})
        self.assertEqual(daemon.ask("add", [1, 2]), 3)

    def test_no_module(self) -> None:
        """Without any task module the built-in functions are served."""
        self.assertEqual(self.start().ask("echo", ["hello"]), "hello")

    def test_several_modules(self) -> None:
        """Several modules, by dotted name and by path, are all served."""
        daemon = self.start(
            "--tasks",
            "directory/third.py",
            tasks="first,package.second",
            files={
                "first.py": TASKS,
                "package/__init__.py": "",
                "package/second.py": TASKS.replace("add", "add_second"),
                "directory/third.py": "from beside import *\n",
                "directory/beside.py": TASKS.replace("add", "add_third"),
            },
        )
        for name in ("add", "add_second", "add_third"):
            self.assertEqual(daemon.ask(name, [1, 2]), 3)

    def test_number_of_processes(self) -> None:
        """By default there are ten workers a core."""
        daemon = self.start(procs=None)
        self.assertEqual(len(daemon.workers()), 10 * (os.cpu_count() or 1))

    def test_import_before_fork(self) -> None:
        """The modules are imported once, before the workers are forked."""
        daemon = self.start(tasks="tasks.py", files={"tasks.py": IMPORTED_BY})
        self.assertEqual(daemon.ask("who_imported"), daemon.zygote)
        self.assertNotIn("after its fork", daemon.log)

    def test_no_preload(self) -> None:
        """With ``--no-preload`` each worker imports the modules."""
        daemon = self.start("--no-preload", tasks="tasks.py", files={"tasks.py": IMPORTED_BY})
        with daemon.connect() as connection:
            self.assertEqual(connection.ask("who_imported"), connection.ask("who_runs"))

    def test_thread_at_import(self) -> None:
        """A module that starts a thread is imported by each worker, and the log says why."""
        daemon = self.start(tasks="tasks.py", files={"tasks.py": THREAD_AT_IMPORT})
        with daemon.connect() as connection:
            self.assertEqual(connection.ask("who_imported"), connection.ask("who_runs"))
            self.assertEqual(connection.ask("ask_thread"), "from the thread")
        self.assertIn("the task modules start 1 thread when imported", daemon.log)
        self.assertIn("after its fork", daemon.log)

    def test_thread_at_import_of_new_worker(self) -> None:
        """The worker that replaces another one imports such a module as well."""
        daemon = self.start(tasks="tasks.py", files={"tasks.py": THREAD_AT_IMPORT}, procs=1)
        before = daemon.workers()
        daemon.kill(before[1])
        daemon.wait_until_new(before)
        self.assertEqual(daemon.ask("ask_thread"), "from the thread")

    def test_reactor_at_import(self) -> None:
        """A module that imports the reactor gets the worker's own, and the log says why."""
        daemon = self.start(tasks="tasks.py", files={"tasks.py": REACTOR_AT_IMPORT})
        self.assertEqual(daemon.ask("later"), "later")
        self.assertIn("install a reactor when imported", daemon.log)
        self.assertIn("after its fork", daemon.log)

    def test_print_at_import(self) -> None:
        """What a module prints when it is imported comes into the log."""
        daemon = self.start(tasks="tasks.py", files={"tasks.py": TASKS + "print('imported')\n"})
        self.assertIn("imported", daemon.log)
        self.assertEqual(daemon.errors, "")

    def test_threads(self) -> None:
        """With ``--threads 2`` two blocking tasks run side by side in one worker."""
        meet = (
            "import threading\nfrom taskd import task\nbarrier = threading.Barrier(2)\n"
            "@task\ndef meet():\n    return barrier.wait(timeout=10) >= 0\n"
        )
        daemon = self.start("--threads", "2", tasks="meet.py", files={"meet.py": meet}, procs=1)
        with daemon.connect() as connection:
            connection.request("meet")
            connection.request("meet")
            self.assertEqual([connection.reply(), connection.reply()], [True, True])

    def test_interface(self) -> None:
        """``--interface`` takes another loopback address, and IPv6's."""
        for address in ("127.0.0.2", "::1"):
            daemon = Daemon("--interface", address, host=address)
            self.addCleanup(daemon.stop)
            self.assertEqual(daemon.start().ask("taskd.ping"), "pong")
            daemon.stop()

    def test_insecure(self) -> None:
        """With ``--insecure`` every address of the machine is listened on."""
        daemon = self.start("--interface", "0.0.0.0", "--insecure", procs=1)
        self.assertEqual(daemon.ask("taskd.ping"), "pong")

    def test_in_the_background(self) -> None:
        """Without ``-n`` twistd leaves the daemon behind, and its pid file ends it."""
        daemon = Daemon(tasks="tasks.py", files={"tasks.py": TASKS}, in_background=True)
        self.addCleanup(daemon.stop)
        daemon.start()
        self.assertEqual(daemon.wait_for_exit(), 0)
        self.assertEqual(daemon.ask("add", [1, 2]), 3)
        daemon.signal(signal.SIGTERM)
        daemon.wait_until_gone()
        self.assertFalse((daemon.directory / "twistd.pid").exists())


class HelpTests(SynchronousTestCase):
    def test_help(self) -> None:
        """``--help`` lists every option, on stdout, with status 0."""
        ended = Daemon("--help", tasks=None, procs=None).run()
        self.assertEqual((ended.status, ended.errors), (0, ""))
        for option in (
            *("port", "procs", "tasks", "interface", "smtp", "grace", "insecure"),
            *("threads", "backlog", "max-in-flight", "max-connections", "max-tasks", "max-rss"),
            *("first-line-timeout", "idle-timeout"),
        ):
            self.assertIn(f"--{option}", ended.output)

    def test_version(self) -> None:
        """``--version`` tells taskd's version, with status 0."""
        ended = Daemon("--version", tasks=None, procs=None).run()
        self.assertEqual(ended.status, 0)
        self.assertIn("taskd", ended.output)
