"""Importing task modules, and the one line about what is wrong with them."""

from __future__ import annotations

import os
import sys
import tempfile

from twisted.trial.unittest import SynchronousTestCase

from taskd.errors import StartFailed
from taskd.functions import Function, Kind, Registry
from taskd.loading import load_tasks

ADD = """
from taskd import task
@task
def add(a, b):
    return a + b
"""


class LoadTasksTests(SynchronousTestCase):
    """Modules by name and by path."""

    def setUp(self) -> None:
        """Make a directory for modules, and let none of them outlive its test."""
        made = tempfile.TemporaryDirectory()
        self.addCleanup(made.cleanup)
        self.directory = os.path.realpath(made.name)
        path = sys.path[:]

        def restore() -> None:
            sys.path[:] = path
            for name in [name for name in sys.modules if name.startswith("unit_")]:
                del sys.modules[name]

        self.addCleanup(restore)
        self.registry = Registry()

    def write(self, name: str, source: str) -> str:
        """Write a file and give its path."""
        path = os.path.join(self.directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write(source)
        return path

    def names(self) -> list[str]:
        """Give the names of what was registered."""
        return [function.name for function in self.registry]

    def failure(self, *names: str) -> str:
        """Load what cannot be loaded, and give the one line about it."""
        text = str(self.assertRaises(StartFailed, load_tasks, names, self.registry))
        self.assertTrue(text.startswith(f"--tasks {names[-1]}: "), text)
        self.assertNotIn("\n", text)
        return text.removeprefix(f"--tasks {names[-1]}: ")

    def test_nothing(self) -> None:
        """No names load nothing."""
        load_tasks([], self.registry)
        self.assertEqual(self.names(), [])

    def test_a_path(self) -> None:
        """A file is loaded by its path, wherever it lies."""
        load_tasks([self.write("unit_tasks_path.py", ADD)], self.registry)
        self.assertEqual(self.names(), ["add"])
        self.assertEqual(self.registry.find("add").call(1, 2), 3)

    def test_a_relative_path(self) -> None:
        """A relative path is taken from the working directory."""
        path = os.path.relpath(self.write("unit_tasks_relative.py", ADD))
        load_tasks([path], self.registry)
        self.assertEqual(self.names(), ["add"])

    def test_a_dotted_name(self) -> None:
        """A module of a package on the import path is loaded by its dotted name."""
        self.write("unit_package/__init__.py", "")
        self.write("unit_package/math.py", ADD)
        sys.path.insert(0, self.directory)
        load_tasks(["unit_package.math"], self.registry)
        self.assertEqual(self.names(), ["add"])

    def test_neighbours(self) -> None:
        """A file can import what lies beside it, as if it were run."""
        self.write("unit_neighbour.py", ADD)
        path = self.write("unit_tasks_main.py", "from unit_neighbour import add\n")
        load_tasks([path], self.registry)
        self.assertEqual(self.names(), ["add"])

    def test_a_module_finds_itself(self) -> None:
        """A file's module stands under its name, so that its objects can be pickled."""
        source = ADD + "import pickle\nclass Row: pass\nrow = pickle.loads(pickle.dumps(Row()))\n"
        load_tasks([self.write("unit_tasks_self.py", source)], self.registry)
        self.assertEqual(sys.modules["unit_tasks_self"].row.__class__.__name__, "Row")

    def test_several(self) -> None:
        """All modules that are named come together in one registry."""
        one = self.write("unit_tasks_one.py", ADD)
        two = self.write("unit_tasks_two.py", ADD.replace("add", "plus"))
        load_tasks([one, two], self.registry)
        self.assertEqual(self.names(), ["add", "plus"])

    def test_a_built_in_function_replaced(self) -> None:
        """A module may replace what is built in, however it came into the registry."""
        path = self.write("unit_tasks_mine.py", ADD)
        built_in = Function("add", len, Kind.THREAD)
        added = Registry()
        added.add(built_in)
        for registry in (Registry([built_in]), added):
            load_tasks([path], registry)
            self.assertEqual(registry.find("add").call(1, 2), 3)

    def test_no_such_module(self) -> None:
        """A module that does not exist is named."""
        self.assertIn("No module named 'unit_nowhere'", self.failure("unit_nowhere"))
        self.assertIn("No module named 'unit_nowhere'", self.failure("unit_nowhere.tasks"))

    def test_no_such_file(self) -> None:
        """A file that does not exist, or is a directory, is named by its whole path."""
        for name in ("missing.py", "no/such/directory.py"):
            path = os.path.join(self.directory, name)
            self.assertEqual(self.failure(path), f"there is no file {path}")
        os.mkdir(os.path.join(self.directory, "unit_directory.py"))
        self.assertIn(
            "there is no file", self.failure(os.path.join(self.directory, "unit_directory.py"))
        )

    def test_no_task(self) -> None:
        """A module that offers nothing is refused: its decorator was forgotten."""
        path = self.write("unit_tasks_empty.py", "def add(a, b): return a + b\n")
        self.assertEqual(self.failure(path), "no function in it is marked with @task")

    def test_an_import_that_fails(self) -> None:
        """Whatever an import raises is told with its type, and with the line that raised it."""
        for number, (statement, words) in enumerate(
            (
                ("1 / 0", "ZeroDivisionError: division by zero"),
                ("import unit_nowhere", "No module named 'unit_nowhere'"),
                ("raise SystemExit('no')", "SystemExit: no"),
                ("raise KeyboardInterrupt", "KeyboardInterrupt"),
                ("raise ValueError('one\\n\\n  two')", "ValueError: one two"),
                ("class E(BaseException):\n  def __str__(self): 1 / 0\nraise E", "E: "),
            )
        ):
            line = statement.count("\n") + 2
            path = self.write(f"unit_tasks_bad{number}.py", f"import os\n{statement}\n")
            text = self.failure(path)
            self.assertIn(words, text)
            self.assertTrue(text.endswith(f"({path}, line {line})"), text)

    def test_the_line_of_a_neighbour(self) -> None:
        """What fails in a module that the task module imports is told with that one's line."""
        neighbour = self.write("unit_broken.py", "\n\n1 / 0\n")
        path = self.write("unit_tasks_imports.py", "import unit_broken\n")
        self.assertTrue(self.failure(path).endswith(f"({neighbour}, line 3)"))

    def test_a_syntax_error(self) -> None:
        """A syntax error is told with its file, by its whole path, and line, and nothing else."""
        path = self.write("unit_tasks_syntax.py", "\n\ndef f(:\n")
        self.assertEqual(self.failure(path), f"SyntaxError: invalid syntax ({path}, line 3)")
        path = self.write("unit_tasks_tabs.py", "if 1:\n        a = 1\n\tb = 2\n")
        text = self.failure(path)
        self.assertTrue(text.startswith("TabError: "), text)
        self.assertTrue(text.endswith(f"({path}, line 3)"), text)

    def test_a_syntax_error_of_nowhere(self) -> None:
        """A syntax error that was raised by hand is told with the line that raised it."""
        path = self.write("unit_tasks_raising.py", "\nraise SyntaxError('by hand')\n")
        self.assertEqual(self.failure(path), f"SyntaxError: by hand ({path}, line 2)")

    def test_a_syntax_error_of_a_neighbour(self) -> None:
        """A syntax error is told with its own line, not with the line that imports it."""
        neighbour = self.write("unit_unreadable.py", "\n\ndef f(:\n")
        text = self.failure(self.write("unit_tasks_importing.py", "import unit_unreadable\n"))
        self.assertEqual(text, f"SyntaxError: invalid syntax ({neighbour}, line 3)")

    def test_a_task_that_cannot_be(self) -> None:
        """A task of a name that is not allowed stops the load, and the name is told."""
        source = ADD.replace("@task", "@task(name='taskd.add')")
        self.assertIn("'taskd.add'", self.failure(self.write("unit_tasks_reserved.py", source)))
        source = ADD.replace("@task", "@task(blocking=True)").replace("def", "async def")
        self.assertIn("add is async", self.failure(self.write("unit_tasks_async.py", source)))

    def test_two_tasks_of_one_name(self) -> None:
        """Two modules that want one name are both named."""
        one, two = (self.write(f"unit_tasks_{n}.py", ADD) for n in ("first", "second"))
        text = self.failure(one, two)
        self.assertIn("unit_tasks_first", text)
        self.assertIn("unit_tasks_second", text)
