"""``@task``, the registry, and the binding of arguments."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, DeferredList, inlineCallbacks
from twisted.trial.unittest import SynchronousTestCase

import taskd
from taskd.errors import BadArguments, SettingsError, UnknownFunction
from taskd.functions import Function, Kind, Registry, progress, reporting_to, task

examples = settings(max_examples=150, deadline=None)


def module(name: str = "tasks", **members: Any) -> ModuleType:
    """Make a module that holds *members*."""
    made = ModuleType(name)
    vars(made).update(members)
    return made


def registered(**members: Any) -> Registry:
    """Give a registry with what one module offers."""
    registry = Registry()
    registry.add_module(module(**members))
    return registry


def kind_of(call: Callable[..., Any]) -> Kind:
    """Tell where a marked function would run."""
    (function,) = registered(call=call)
    return function.kind


class TaskTests(SynchronousTestCase):
    """The decorator."""

    def test_the_function_stays_what_it_is(self) -> None:
        """A marked function is the same object and can be called as before."""

        def add(a: int, b: int) -> int:
            return a + b

        self.assertIs(task(add), add)
        self.assertIs(task(name="plus", timeout=5, blocking=False)(add), add)
        self.assertEqual(add(1, 2), 3)

    def test_plain(self) -> None:
        """Without options a function has its own name and no time limit."""

        @task
        def add(a: int, b: int = 2) -> int:
            """Add two numbers."""
            return a + b

        function = registered(add=add).find("add")
        self.assertEqual((function.name, function.call, function.timeout), ("add", add, None))
        self.assertEqual(function.doc, "Add two numbers.")
        self.assertEqual(function.signature, "(a: 'int', b: 'int' = 2) -> 'int'")

    def test_with_options(self) -> None:
        """Name and time limit are what the decorator was told."""

        @task(name="math.add-1", timeout=2.5)
        def add() -> None: ...

        registry = registered(add=add)
        function = registry.find("math.add-1")
        self.assertEqual((function.timeout, function.kind), (2.5, Kind.THREAD))
        self.assertEqual(function.doc, "")
        self.assertEqual([f.name for f in registry], ["math.add-1"])

    def test_empty_options(self) -> None:
        """Empty brackets are as good as none."""

        @task()
        def add() -> None: ...

        self.assertIs(registered(add=add).find("add").call, add)

    def test_both_ways_to_import_it(self) -> None:
        """The package itself offers the decorator and ``progress``."""
        self.assertIs(taskd.task, task)
        self.assertIs(taskd.progress, progress)

    def test_names_that_can_be(self) -> None:
        """Letters, digits, ``_``, ``.`` and ``-`` make a name, up to 128 of them."""
        for name in ("a", "_", "send_mail", "A.b-c", "taskd", "taskd_x", "x" * 128):
            registry = registered(f=task(name=name)(lambda: None))
            self.assertEqual(registry.find(name).label, name.encode().ljust(128, b"\0"))

    def test_names_that_cannot_be(self) -> None:
        """A name of other characters, too long, or in the daemon's own namespace is refused."""
        for name in ("", "1a", "-a", ".a", "a b", "a\n", "é", "a/b", "x" * 129):
            self.assertIn(repr(name), str(self.assertRaises(SettingsError, task, name=name)))
        for name in ("taskd.", "taskd.ping", "taskd.mine"):
            error = self.assertRaises(SettingsError, task, name=name)
            self.assertIn("taskd.* is reserved", str(error))

    def test_time_limits_that_cannot_be(self) -> None:
        """A time limit is a finite number of seconds above 0."""
        for timeout in (0, 0.0, -1, math.nan, math.inf, "5", [5]):
            error = self.assertRaises(SettingsError, task, timeout=timeout)
            self.assertIn("timeout must be seconds above 0", str(error))

    def test_what_is_of_another_type(self) -> None:
        """A name that is no text, a truth value or a number beyond all floats is refused too."""
        for options in ({"name": 5}, {"name": b"add"}, {"timeout": True}, {"timeout": 10**400}):
            self.assertRaises(SettingsError, task, **options)

    def test_only_functions(self) -> None:
        """What cannot be called cannot be a task; a name without its keyword is such a thing."""
        for thing in ("add", 5):
            error = self.assertRaises(SettingsError, task, thing)
            self.assertIn(f"{thing!r} is not a function", str(error))
            self.assertRaises(SettingsError, task(timeout=1), thing)


class KindTests(SynchronousTestCase):
    """Where a function runs."""

    def test_plain_functions_run_in_a_thread(self) -> None:
        """A function that says nothing may block."""

        @task
        def plain(a: int) -> dict[str, int]:
            return {}

        self.assertIs(kind_of(plain), Kind.THREAD)

    def test_coroutine_functions(self) -> None:
        """An ``async def`` runs on the reactor, behind a decorator as well."""

        @task
        async def plain() -> int:
            return 1

        @task
        @functools.wraps(plain)
        async def wrapped() -> int:
            return await plain()

        @task(blocking=False)
        async def told() -> int:
            return 1

        for call in (plain, wrapped, told):
            self.assertIs(kind_of(call), Kind.COROUTINE)

    def test_inline_callbacks(self) -> None:
        """A function of ``inlineCallbacks`` runs on the reactor."""

        @task
        @inlineCallbacks
        def fetch() -> Any:
            yield None

        self.assertIs(kind_of(fetch), Kind.REACTOR)

    def test_a_generator_function(self) -> None:
        """A bare generator function is not taken for one of ``inlineCallbacks``."""

        @task
        def numbers() -> Any:
            yield 1

        self.assertIs(kind_of(numbers), Kind.THREAD)

    def test_annotated(self) -> None:
        """A function annotated to return a Deferred runs on the reactor, however it is written."""

        def fetch() -> None: ...

        for annotation, kind in (
            (Deferred, Kind.REACTOR),
            (Deferred[int], Kind.REACTOR),
            ("Deferred", Kind.REACTOR),
            ("Deferred[int]", Kind.REACTOR),
            ("Deferred[dict[str, Any]]", Kind.REACTOR),
            ("defer.Deferred[int]", Kind.REACTOR),
            ("twisted.internet.defer.Deferred", Kind.REACTOR),
            ("DeferredQueue", Kind.THREAD),
            ("MyDeferred", Kind.THREAD),
            ("list[Deferred]", Kind.THREAD),
            (DeferredList, Kind.THREAD),
            (None, Kind.THREAD),
            (dict[str, int], Kind.THREAD),
        ):
            fetch.__annotations__["return"] = annotation
            self.assertIs(kind_of(task(fetch)), kind, annotation)

    def test_what_the_decorator_was_told_counts(self) -> None:
        """``blocking`` decides, whatever the function looks like."""

        def plain() -> None: ...

        def annotated() -> Deferred[int]:
            return Deferred()

        self.assertIs(kind_of(task(blocking=False)(plain)), Kind.REACTOR)
        self.assertIs(kind_of(task(blocking=True)(plain)), Kind.THREAD)
        self.assertIs(kind_of(task(blocking=True)(annotated)), Kind.THREAD)

    def test_a_blocking_coroutine(self) -> None:
        """An ``async def`` cannot be blocking: it is refused by its name."""

        @task(blocking=True)
        async def fetch() -> None: ...

        error = self.assertRaises(SettingsError, registered, fetch=fetch)
        self.assertIn("fetch is async", str(error))

    def test_what_runs_at_once(self) -> None:
        """Only a function on the reactor without a time limit needs nothing made ready."""
        for kind, timeout, expected in (
            (Kind.REACTOR, None, True),
            (Kind.REACTOR, 5.0, False),
            (Kind.THREAD, None, False),
            (Kind.COROUTINE, None, False),
            (Kind.SESSION, None, False),
        ):
            function = Function("f", lambda: None, kind, timeout)
            self.assertIs(function.runs_at_once, expected)


# Signatures of every shape. Each function returns what it was called with.


def _none() -> Any:
    return ()


def _two(a: Any, b: Any) -> Any:
    return a, b


def _default(a: Any, b: Any = "default") -> Any:
    return a, b


def _rest(a: Any, *args: Any) -> Any:
    return a, args


def _options(a: Any, **kwargs: Any) -> Any:
    return a, kwargs


def _anything(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def _keyword_only(a: Any, *, b: Any) -> Any:
    return a, b


def _keyword_default(a: Any = "default", *, b: Any = "default") -> Any:
    return a, b


def _rest_and_keyword(*args: Any, b: Any) -> Any:
    return args, b


def _position_only(a: Any, /, b: Any) -> Any:
    return a, b


def _position_default(a: Any = "default", /, b: Any = "default") -> Any:
    return a, b


def _position_and_options(a: Any, /, **kwargs: Any) -> Any:
    return a, kwargs


def _position_default_and_options(a: Any = "default", /, b: Any = 1, **kwargs: Any) -> Any:
    return a, b, kwargs


def _reserved(from_: Any, to: Any = "default") -> Any:
    return from_, to


def _reserved_keyword(*, from_: Any = "default", class_: Any = "default") -> Any:
    return from_, class_


def _reserved_and_options(from_: Any, **kwargs: Any) -> Any:
    return from_, kwargs


def _reserved_position(from_: Any, /, a: Any = "default") -> Any:
    return from_, a


def _all_at_once(
    a: Any, /, b: Any, from_: Any = 1, *args: Any, c: Any, d: Any = 1, **kw: Any
) -> Any:
    return a, b, from_, args, c, d, kw


SHAPES = [
    _none,
    _two,
    _default,
    _rest,
    _options,
    _anything,
    _keyword_only,
    _keyword_default,
    _rest_and_keyword,
    _position_only,
    _position_default,
    _position_and_options,
    _position_default_and_options,
    _reserved,
    _reserved_keyword,
    _reserved_and_options,
    _reserved_position,
    _all_at_once,
]
ALIASES: dict[Any, dict[str, str]] = {
    _reserved: {"from": "from_"},
    _reserved_keyword: {"from": "from_", "class": "class_"},
    _reserved_and_options: {"from": "from_"},
    _all_at_once: {"from": "from_"},
}
NAMES = ("a", "b", "c", "d", "from", "from_", "class", "class_", "to", "args", "kwargs", "x")


def result_of(call: Callable[..., Any], args: list[Any] | dict[str, Any]) -> Any:
    """Call a function if ``inspect`` binds it, its reserved names given their underscore."""
    if isinstance(args, list):
        inspect.signature(call).bind(*args)
        return call(*args)
    aliases = ALIASES.get(call, {})
    keywords: dict[str, Any] = {}
    for name, value in args.items():
        if aliases.get(name, name) in keywords:
            raise TypeError("given twice")
        keywords[aliases.get(name, name)] = value
    inspect.signature(call).bind(**keywords)
    return call(**keywords)


class BindTests(SynchronousTestCase):
    """Fitting arguments to a signature."""

    def _check(self, call: Callable[..., Any], args: list[Any] | dict[str, Any]) -> None:
        try:
            expected = result_of(call, args)
        except TypeError:
            expected = "refused"
        try:
            positional, keywords = Function("f", call, Kind.THREAD).bind(args)
        except BadArguments:
            got = "refused"
        else:
            got = call(*positional, **keywords)
        self.assertEqual(got, expected, f"{call.__name__}{inspect.signature(call)} with {args}")

    def test_there_are_shapes(self) -> None:
        """The properties below go over every kind of parameter."""
        kinds = {p.kind for call in SHAPES for p in inspect.signature(call).parameters.values()}
        self.assertEqual((len(SHAPES), len(kinds)), (18, 5))

    @examples
    @given(call=st.sampled_from(SHAPES), args=st.lists(st.integers(0, 9), max_size=5))
    def test_positions(self, call: Callable[..., Any], args: list[Any]) -> None:
        """An array is taken exactly if Python's own binding takes it, and means the same."""
        self._check(call, args)

    @examples
    @given(
        call=st.sampled_from(SHAPES),
        args=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9), max_size=5),
    )
    def test_names(self, call: Callable[..., Any], args: dict[str, Any]) -> None:
        """An object is taken exactly if Python's own binding takes it, and means the same."""
        self._check(call, args)

    def test_every_shape_with_few_names(self) -> None:
        """No array up to five long and no object of up to two names is bound in another way."""
        for call in SHAPES:
            for count in range(6):
                self._check(call, list(range(count)))
            for one in NAMES:
                for other in NAMES:
                    self._check(call, {one: 1, other: 2})

    def test_a_name_cannot_stand_for_a_position(self) -> None:
        """A parameter that is positional only cannot be given by name, beside ``**kwargs`` too."""
        for call in (_position_only, _position_and_options):
            function = Function("f", call, Kind.THREAD)
            self.assertRaises(BadArguments, function.bind, {"a": 1, "b": 2})

    def test_messages_name_the_parameter(self) -> None:
        """What does not fit is told with the function, its signature and the parameter."""
        for call, args, words in (
            (_two, {"a": 1}, "missing a required argument: 'b'"),
            (_two, [1], "missing a required argument: 'b'"),
            (_two, [1, 2, 3], "too many positional arguments"),
            (_two, {"a": 1, "b": 2, "x": 3}, "unexpected keyword argument 'x'"),
            (_keyword_only, [1], "missing a required"),
            (_keyword_only, [1], "'b'"),
            (_none, [1], "too many positional arguments"),
            (_reserved, {"to": 1}, "'from_'"),
        ):
            function = Function("math.f", call, Kind.THREAD)
            error = self.assertRaises(BadArguments, function.bind, args)
            self.assertIn(words, error.message)
            self.assertIn(f"math.f{inspect.signature(call)}", error.message)

    def test_reserved_names(self) -> None:
        """A name that Python reserves binds the parameter with an underscore behind it."""
        function = Function("send", _reserved, Kind.THREAD)
        for args in ({"from": 1, "to": 2}, {"from_": 1, "to": 2}):
            self.assertEqual(function.bind(args), ([], {"from_": 1, "to": 2}))

    def test_reserved_names_given_twice(self) -> None:
        """Both spellings of one parameter in one call are refused, and both are named."""
        for call in (_reserved, _reserved_and_options):
            function = Function("send", call, Kind.THREAD)
            error = self.assertRaises(BadArguments, function.bind, {"from": 1, "from_": 1})
            self.assertIn("both 'from' and 'from_'", error.message)

    def test_other_underscores(self) -> None:
        """Only names that Python reserves have a second spelling."""
        function = Function("f", lambda x_, print_=1: None, Kind.THREAD)
        for args in ({"x": 1}, {"x_": 1, "print": 2}):
            self.assertRaises(BadArguments, function.bind, args)

    def test_no_arguments(self) -> None:
        """An empty array and an empty object are both no arguments."""
        for call in (_none, _anything, _keyword_default, _reserved_keyword):
            function = Function("f", call, Kind.THREAD)
            for args in ([], {}):
                self.assertEqual(function.bind(args), ([], {}))
        for args in ([], {}):
            self.assertRaises(BadArguments, Function("f", _two, Kind.THREAD).bind, args)

    def test_skipped_parameters(self) -> None:
        """Parameters that the daemon fills in are neither shown nor bound."""
        function = Function("f", _two, Kind.SESSION, skip=1)
        self.assertEqual(function.signature, "(b: 'Any') -> 'Any'")
        self.assertEqual(function.bind([1]), ([1], {}))
        for args in ([1, 2], {"a": 1, "b": 2}):
            self.assertRaises(BadArguments, function.bind, args)


class RegistryTests(SynchronousTestCase):
    """The functions of one worker."""

    def test_only_what_is_marked(self) -> None:
        """A module offers what ``@task`` has marked, and nothing else that it holds."""

        @task
        def one() -> None: ...

        registry = Registry()
        offered = module(
            one=one,
            two=task(name="two")(lambda: 2),
            os=inspect,
            helper=_rest,
            number=5,
            cls=Kind,
        )
        self.assertEqual(registry.add_module(offered), 2)
        self.assertEqual([f.name for f in registry], ["one", "two"])
        self.assertEqual(registry.add_module(module(helper=_options)), 0)

    def test_unknown_functions(self) -> None:
        """A name that nobody registered is refused, and the message says where to look."""
        registry = registered(f=task(name="known")(lambda: None))
        for name in ("unknown", "", "__class__", "known ", "Known", "os.system", "find"):
            error = self.assertRaises(UnknownFunction, registry.find, name)
            self.assertIn(repr(name), error.message)
            self.assertIn("taskd.functions", error.message)

    def test_unknown_functions_with_strange_names(self) -> None:
        """The message stays short and plain, whatever was asked for."""
        for name in ("x" * 10**6, "\u202e\n\x1b[2J"):
            error = self.assertRaises(UnknownFunction, Registry().find, name)
            self.assertLess(len(error.message), 250)
            self.assertTrue(error.message.isascii() and error.message.isprintable())

    def test_two_functions_of_one_name(self) -> None:
        """Two functions that want one name are refused, and both modules are named."""
        registry = Registry()
        registry.add_module(module("first", f=task(name="f")(lambda: 1)))
        second = module("second", f=task(name="f")(lambda: 2))
        error = self.assertRaises(SettingsError, registry.add_module, second)
        for words in ("'f'", "in first", "in second", "@task(name=...)"):
            self.assertIn(words, str(error))

    def test_two_functions_of_one_name_in_one_module(self) -> None:
        """One module cannot give one name to two functions either."""
        made = module("tasks", f=task(name="f")(lambda: 1), g=task(name="f")(lambda: 2))
        self.assertRaises(SettingsError, Registry().add_module, made)

    def test_one_function_through_two_modules(self) -> None:
        """One module can gather what others define, and all of them can be loaded."""
        shared = task(name="f")(lambda: 1)
        registry = Registry()
        self.assertEqual(registry.add_module(module("first", f=shared)), 1)
        self.assertEqual(registry.add_module(module("gathered", f=shared)), 1)
        self.assertEqual([f.call for f in registry], [shared])

    def test_a_task_can_replace_a_built_in_function(self) -> None:
        """A task may take the place of a built-in function, but only one task may."""
        registry = Registry([Function("send_mail", _none, Kind.THREAD)])
        self.assertIs(registry.find("send_mail").call, _none)
        mine = task(name="send_mail", blocking=False)(lambda: "mine")
        registry.add_module(module("first", send=mine))
        self.assertIs(registry.find("send_mail").call, mine)
        self.assertIs(registry.find("send_mail").kind, Kind.REACTOR)
        theirs = module("second", send=task(name="send_mail")(lambda: "theirs"))
        self.assertRaises(SettingsError, registry.add_module, theirs)

    def test_a_task_can_replace_what_was_added(self) -> None:
        """What the daemon added by itself may be replaced by a task, by only one as well."""
        registry = Registry()
        registry.add(Function("send_mail", _none, Kind.THREAD))
        mine = task(name="send_mail")(lambda: "mine")
        self.assertEqual(registry.add_module(module("first", send=mine)), 1)
        self.assertIs(registry.find("send_mail").call, mine)
        theirs = module("second", send=task(name="send_mail")(lambda: "theirs"))
        error = self.assertRaises(SettingsError, registry.add_module, theirs)
        self.assertIn("one in first, one in second", str(error))

    def test_reserved_names_of_functions(self) -> None:
        """A function whose own name cannot be a task's is refused when it is registered."""

        def taskd_like() -> None: ...

        taskd_like.__name__ = "taskd.ping"
        for call, words in ((taskd_like, "reserved"), (lambda: None, "<lambda>")):
            error = self.assertRaises(SettingsError, registered, call=task(call))
            self.assertIn(words, str(error))

    def test_the_daemons_own_functions(self) -> None:
        """The daemon itself may use the reserved namespace, and replace what it added."""
        registry = Registry([Function("taskd.cancel", _none, Kind.SESSION)])
        registry.add(Function("taskd.ping", _none, Kind.REACTOR))
        registry.add(Function("taskd.ping", _rest, Kind.REACTOR))
        self.assertEqual([f.name for f in registry], ["taskd.cancel", "taskd.ping"])
        self.assertIs(registry.find("taskd.ping").call, _rest)

    def test_sorted_by_name(self) -> None:
        """The functions come in the order of their names."""
        registry = Registry([Function(name, _none, Kind.THREAD) for name in ("b", "c", "a")])
        self.assertEqual([f.name for f in registry], ["a", "b", "c"])


class ProgressTests(SynchronousTestCase):
    """Telling the caller how far a task is."""

    def test_without_a_listener(self) -> None:
        """Where nobody asked for progress, a task can still tell it."""
        self.assertIsNone(reporting_to.get())
        self.assertIsNone(progress(1, 2, "mail 1"))

    def test_with_a_listener(self) -> None:
        """Who asked is told what the task said, in its order."""
        told: list[tuple[Any, ...]] = []
        token = reporting_to.set(lambda *report: told.append(report))
        try:
            progress(1)
            progress(2, 3)
            progress(3, total=3, message="done")
        finally:
            reporting_to.reset(token)
        progress(4)
        self.assertEqual(told, [(1, None, None), (2, 3, None), (3, 3, "done")])
