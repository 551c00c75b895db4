"""The shape of the code: who may import whom, and what every module has."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import taskd

FLOORS = {
    "errors": 0,
    "access": 1,
    "departure": 1,
    "lane": 1,
    "notify": 1,
    "patience": 1,
    "policy": 1,
    "process": 1,
    "removals": 1,
    "settings": 1,
    "states": 1,
    "throttle": 1,
    "balance": 2,
    "credentials": 2,
    "failures": 2,
    "functions": 2,
    "listening": 2,
    "options": 2,
    "slots": 2,
    "tally": 2,
    "wire": 2,
    "call": 3,
    "endpoints": 3,
    "lines": 3,
    "scoreboard": 3,
    "tls": 3,
    "loading": 3,
    "mail": 3,
    "wear": 3,
    "accept": 4,
    "deadlines": 4,
    "door": 4,
    "errand": 4,
    "introspection": 4,
    "ledger": 4,
    "link": 4,
    "logs": 3,
    "pool": 4,
    "ports": 4,
    "session": 4,
    "tracing": 4,
    "trust": 4,
    "connection": 5,
    "destination": 5,
    "dispatcher": 5,
    "executor": 5,
    "zygote": 5,
    "children": 6,
    "node": 6,
    "relay": 6,
    "server": 6,
    "client": 7,
    "worker": 7,
    "zygotes": 7,
    "checking": 8,
    "supervisor": 8,
    "tap": 9,
    "launch": 4,
    "gateway.answers": 3,
    "gateway.figures": 1,
    "gateway.history": 1,
    "gateway.origin": 1,
    "gateway.rate": 1,
    "gateway.identity": 2,
    "gateway.metrics": 2,
    "gateway.settings": 2,
    "gateway.secrets": 3,
    "gateway.site": 5,
    "gateway.websocket": 5,
    "gateway.supervisor": 7,
    "gateway.backend": 8,
    "gateway.watch": 8,
    "gateway.calls": 9,
    "gateway.conversation": 9,
    "gateway.pages": 9,
    "gateway.tap": 9,
    "gateway.sockets": 10,
    "gateway.process": 11,
}
"""A module imports only from floors below its own; the package itself stands apart."""

HIGHEST_WITHOUT_TWISTED = 2

LONGEST_MODULE_LINES = 500

BROAD_EXCEPTS = [
    "call:task_failed",
    "connection:TaskClientProtocol._report",
    "endpoints:_evaluate",
    "executor:Executor._start_on_reactor",
    "executor:Executor._cancel",
    "executor:Executor._settle",
    "executor:Executor._work",
    "executor:Executor.call_now",
    "loading:load_tasks",
    "mail:Mailer._connect",
    "server:TaskProtocol.dataReceived",
    "zygote:_Zygote._become_worker",
]
"""Where anything at all may be caught: around other people's code, and before an end."""

PACKAGE = Path(taskd.__file__).parent
SOURCES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path.read_text()
    for path in PACKAGE.rglob("*.py")
}
TREES = {
    name: ast.parse(source, name) for name, source in SOURCES.items() if name != "gateway.__init__"
}
MODULES = {name: tree for name, tree in TREES.items() if name != "__init__"}
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.rst"

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | _Function


def imports(tree: ast.Module) -> set[str]:
    """Give the dotted names of all that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = node.module == "taskd" and alias.name in MODULES
                found.add(inner if is_module else str(node.module))
    return found


def rooms(tree: ast.Module) -> set[str]:
    """Give the modules of the package that a module imports; the package itself is ''."""
    return {n.partition(".")[2] for n in imports(tree) if n == "taskd" or n.startswith("taskd.")}


def definitions(
    node: ast.AST, path: str = "", *, into_functions: bool = True
) -> Iterator[tuple[str, _Definition]]:
    """Give every class and function with its dotted path, outside in."""
    for child in ast.iter_child_nodes(node):
        inner = path
        if isinstance(child, _Definition):
            inner = f"{path}.{child.name}".lstrip(".")
            yield inner, child
        if into_functions or not isinstance(child, _Function):
            yield from definitions(child, inner, into_functions=into_functions)


def broad_excepts(tree: ast.Module) -> Iterator[str]:
    """Give the path of the function around each ``except`` that takes anything."""
    places = {}
    for path, definition in definitions(tree):
        places.update(dict.fromkeys(ast.walk(definition), path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = set() if node.type is None else {ast.unparse(n) for n in ast.walk(node.type)}
            if node.type is None or caught & {"Exception", "BaseException"}:
                yield places.get(node, "")


def is_stub(definition: _Definition) -> bool:
    """Tell whether a definition has no body but ``...``: an overload, or a protocol's method."""
    return [ast.unparse(statement) for statement in definition.body] == ["..."]


def exported(tree: ast.Module) -> list[str]:
    """Give what ``__all__`` lists, or nothing if there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def top_level_names(tree: ast.Module) -> set[str]:
    """Give the names that a module itself defines or imports."""
    names = set()
    for node in tree.body:
        if isinstance(node, _Definition):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(ast.unparse(target) for target in targets)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


class DirectionTests(SynchronousTestCase):
    """Who may import whom."""

    def test_every_module_has_its_floor(self) -> None:
        """The table names every module, and nothing that is not there."""
        self.assertEqual(sorted(FLOORS), sorted(MODULES))

    def test_the_document_says_the_same(self) -> None:
        """The table in the documentation gives every module the same floor."""
        rows = re.findall(r"^(\d+)  +([\w.]+) ", DOCUMENT.read_text(), re.MULTILINE)
        self.assertEqual({name: int(floor) for floor, name in rows}, FLOORS)
        self.assertEqual(len(rows), len(FLOORS))

    def test_only_downward(self) -> None:
        """Every module imports only from floors below its own."""
        wrong = [
            f"{name} ({FLOORS[name]}) imports {room} ({FLOORS[room]})"
            for name, tree in MODULES.items()
            for room in rooms(tree) - {""}
            if FLOORS[room] >= FLOORS[name]
        ]
        self.assertEqual(wrong, [])

    def test_no_cycles(self) -> None:
        """There is an order in which every module can be imported, the package included."""
        graph = {name.removeprefix("__init__"): rooms(tree) for name, tree in TREES.items()}
        order = list(graphlib.TopologicalSorter(graph).static_order())
        self.assertEqual(sorted(order), sorted(graph))

    def test_the_package_itself(self) -> None:
        """The package imports the functions and nothing else, so importing it costs little."""
        self.assertEqual(imports(TREES["__init__"]), {"__future__", "taskd.functions"})

    def test_the_lower_floors_know_no_twisted(self) -> None:
        """The lower floors import neither Twisted nor what it is made of."""
        for name, tree in MODULES.items():
            if FLOORS[name] <= HIGHEST_WITHOUT_TWISTED:
                outside = {imported.partition(".")[0] for imported in imports(tree)}
                self.assertEqual(outside & {"twisted", "zope"}, set(), name)

    def test_the_daemon_needs_no_gateway(self) -> None:
        """Nothing outside the gateway imports it, so its libraries need not be there."""
        for name, tree in MODULES.items():
            if not name.startswith("gateway."):
                inside = {room for room in rooms(tree) if room.startswith("gateway")}
                self.assertEqual(inside, set(), name)

    def test_the_zygote_imports_little(self) -> None:
        """The zygote imports the standard library, the errors, and what it tells the kernel."""
        imported = imports(TREES["zygote"])
        outside = {n for n in imported if n.partition(".")[0] not in sys.stdlib_module_names}
        self.assertEqual(outside, {"taskd.errors", "taskd.process"})


class ModuleTests(SynchronousTestCase):
    """What every module has."""

    def test_docstring(self) -> None:
        """Every module says in its docstring what it is."""
        self.assertEqual([name for name, tree in TREES.items() if not ast.get_docstring(tree)], [])

    def test_annotations_are_not_evaluated(self) -> None:
        """Every module imports ``annotations`` from the future."""
        without = [name for name, tree in TREES.items() if "__future__" not in imports(tree)]
        self.assertEqual(without, [])

    def test_exports(self) -> None:
        """Every module lists its public classes and functions, and no private or missing name."""
        for name, tree in TREES.items():
            listed, defined = exported(tree), top_level_names(tree)
            public = {
                node.name
                for node in tree.body
                if isinstance(node, _Definition) and not node.name.startswith("_")
            }
            self.assertNotEqual(listed, [], name)
            self.assertEqual(len(listed), len(set(listed)), name)
            self.assertEqual(public - set(listed), set(), name)
            self.assertEqual(set(listed) - defined, set(), name)
            private = [e for e in listed if e.startswith("_") and e != "__version__"]
            self.assertEqual(private, [], name)

    def test_length(self) -> None:
        """No module is longer than what can be kept in mind."""
        lines = {name: source.count("\n") for name, source in SOURCES.items()}
        long = {name: count for name, count in lines.items() if count > LONGEST_MODULE_LINES}
        self.assertEqual(long, {})

    def test_broad_excepts(self) -> None:
        """Anything at all is caught only in the places that are known for it."""
        found = [f"{name}:{path}" for name, tree in TREES.items() for path in broad_excepts(tree)]
        self.assertEqual(sorted(found), sorted(BROAD_EXCEPTS))

    def test_public_docstrings(self) -> None:
        """Every public class, method and function has a docstring; a stub's is its class's."""
        missing = [
            f"{name}:{path}"
            for name, tree in TREES.items()
            for path, definition in definitions(tree, into_functions=False)
            if not re.search(r"(^|\.)_", path)
            and not is_stub(definition)
            and not ast.get_docstring(definition)
        ]
        self.assertEqual(missing, [])


class ReaderTests(SynchronousTestCase):
    """The readers above see what they look for."""

    SOURCE = """
import os.path
from taskd import wire, task
from taskd.errors import NotJson
class A:
    def b(self):
        from twisted.internet import reactor
        try: pass
        except (ValueError, Exception): pass
        try: pass
        except ValueError: pass
try: pass
except: pass
"""

    def test_imports(self) -> None:
        """Modules, names of modules and imports inside functions are all seen."""
        tree = ast.parse(self.SOURCE)
        seen = {"os.path", "taskd", "taskd.wire", "taskd.errors", "twisted.internet"}
        self.assertEqual(imports(tree), seen)
        self.assertEqual(rooms(tree), {"", "wire", "errors"})

    def test_broad_excepts(self) -> None:
        """A bare ``except`` and one of several types that takes anything are seen."""
        self.assertEqual(sorted(broad_excepts(ast.parse(self.SOURCE))), ["", "A.b"])
