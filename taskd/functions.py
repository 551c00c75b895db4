"""
The functions that callers may name: ``@task``, the registry, and the binding of arguments.

Only what stands in a registry can be called; a name from the wire is a key of
a dictionary and never reaches an import or a ``getattr``. Arguments are bound
here, before a task is queued, so that what does not fit is answered at once.

No wire format and no execution here, and no Twisted.
"""

from __future__ import annotations

import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from types import ModuleType
from typing import Any, Final, TypeVar, overload

from taskd.errors import BadArguments, SettingsError, UnknownFunction

__all__ = [
    "RESERVED_PREFIX",
    "Function",
    "Kind",
    "Registry",
    "Reporter",
    "label_of",
    "progress",
    "reporting_to",
    "task",
]

RESERVED_PREFIX: Final = "taskd."
"""Names of the daemon's own functions begin so; a task's may not."""

_LONGEST_NAME: Final = 128
_NAME: Final = re.compile(rf"[A-Za-z_][A-Za-z0-9_.-]{{0,{_LONGEST_NAME - 1}}}")
_OPTIONS_ATTRIBUTE: Final = "__taskd_options__"

_F = TypeVar("_F", bound=Callable[..., Any])
Reporter = Callable[[float, float | None, str | None], None]

reporting_to: Final[ContextVar[Reporter | None]] = ContextVar("reporting_to", default=None)
"""Where ``progress`` of the task that runs in this context goes; None: nobody asked."""


class Kind(Enum):
    """Where and how a function runs."""

    THREAD = "thread"
    """A plain function that may block: in the worker's executor thread."""
    REACTOR = "reactor"
    """A function that never blocks: called on the reactor; it may return a Deferred."""
    COROUTINE = "coroutine"
    """An ``async def``: run on the reactor."""
    SESSION = "session"
    """One of the daemon's own that concerns the connection it comes over."""


class _Options:
    def __init__(self, name: str | None, timeout: float | None, blocking: bool | None) -> None:
        self.name = name
        self.timeout = timeout
        self.blocking = blocking


@overload
def task(function: _F, /) -> _F: ...


@overload
def task(
    *, name: str | None = None, timeout: float | None = None, blocking: bool | None = None
) -> Callable[[_F], _F]: ...


def task(
    function: _F | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float | None = None,
    blocking: bool | None = None,
) -> _F | Callable[[_F], _F]:
    """
    Offer a function to callers.

    The function stays what it is and can be called and tested as before; it is
    only marked. The daemon registers what is marked in the modules that
    ``--tasks`` names.

    Args:
        function: A plain function, an ``async def``, or a function that returns
            a Deferred.
        name: What callers write; by default the function's own name.
        timeout: Seconds that one call may take, above 0. None: no limit but the
            caller's own.
        blocking: True: the function runs in a thread, so that it may block.
            False: it runs on the reactor, must return at once, and may return a
            Deferred. None: a coroutine function, one of ``inlineCallbacks`` or
            one annotated ``-> Deferred`` runs on the reactor, any other in a
            thread.

    Returns:
        The function itself, or a decorator if called with options alone.

    Raises:
        SettingsError: A name or a timeout that cannot be.
    """

    def mark(marked: _F) -> _F:
        if not callable(marked):
            raise SettingsError(f"@task: {marked!r} is not a function")
        setattr(marked, _OPTIONS_ATTRIBUTE, _Options(name, timeout, blocking))
        return marked

    if name is not None:
        _check_name(name)
    if blocking is not None and type(blocking) is not bool:
        raise SettingsError(f"@task: blocking must be True, False or None, not {blocking!r}")
    if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < 1e9):
        raise SettingsError(f"@task: timeout must be seconds above 0, not {timeout!r}")
    return mark if function is None else mark(function)


def progress(done: float, total: float | None = None, message: str | None = None) -> None:
    """
    Tell the caller of the running task how far it is.

    Costs next to nothing if the caller did not ask for progress, and may be
    called as often as is handy: where messages come faster than they are sent,
    the latest wins.

    Args:
        done: How much is done, in any unit, such as mails sent.
        total: How much there is to do in the same unit, or None if unknown.
        message: What the task is doing now, for people, or None.
    """
    reporter = reporting_to.get()
    if reporter is not None:
        reporter(done, total, message)


def label_of(name: str) -> bytes:
    """Write a function's name as shared memory has it: with NULs behind it."""
    return name.encode().ljust(_LONGEST_NAME, b"\0")


class Function:
    """
    One registered function: how to call it, and what fits it.

    Attributes:
        name: What callers write.
        call: The callable behind it.
        kind: Where it runs.
        timeout: Seconds that one call may take, or None.
        runs_at_once: True if nothing has to be made ready for a call.
        label: The name as the scoreboard has it.
        signature: Its signature as text, for people.
        doc: Its docstring, or ''.
    """

    __slots__ = (
        "_accepts",
        "_aliases",
        "_by_position_only",
        "_fewest",
        "_most",
        "_needs",
        "_signature",
        "call",
        "doc",
        "kind",
        "label",
        "name",
        "runs_at_once",
        "signature",
        "timeout",
    )

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        kind: Kind,
        timeout: float | None = None,
        *,
        skip: int = 0,
    ) -> None:
        signature = inspect.signature(call)
        parameters = list(signature.parameters.values())[skip:]
        self.name = name
        self.call = call
        self.kind = kind
        self.timeout = timeout
        self.runs_at_once = kind is Kind.REACTOR and timeout is None
        self.label = label_of(name)
        self._signature = signature.replace(parameters=parameters)
        self.signature = str(self._signature)
        self.doc = inspect.getdoc(call) or ""
        by_position = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        needed = {
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        # JSON names that Python reserves: {"from": …} binds the parameter from_.
        self._aliases = {
            p.name[:-1]: p.name
            for p in by_keyword
            if p.name.endswith("_") and keyword.iskeyword(p.name[:-1])
        }
        # The bounds within which a call fits for certain; whatever is outside
        # them goes the slow way through inspect, which finds the words.
        self._needs = needed
        self._accepts: set[str] | None = {p.name for p in by_keyword}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_position_only = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
        if by_position_only and takes_any:
            self._accepts = set()
        elif takes_any:
            self._accepts = None
        # Python 3.13.0's inspect would take it for one of **keywords.
        self._by_position_only = next((n for n in by_position_only if n in needed), None)
        self._fewest = sum(p.name in needed for p in by_position)
        self._most = (
            math.inf if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(by_position)
        )
        if any(p.kind is p.KEYWORD_ONLY and p.name in needed for p in parameters):
            self._most = -1

    def bind(self, args: dict[str, Any] | list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """
        Fit the caller's arguments to the signature.

        Args:
            args: Keyword arguments as an object, or positional ones as an array.
                An empty array is no arguments at all: PHP writes both so.

        Returns:
            Positional and keyword arguments for ``call``.

        Raises:
            BadArguments: They do not fit; the message names the parameter.
        """
        if type(args) is list:
            if self._fewest <= len(args) <= self._most:
                return args, {}
            return self._bind_slowly(args, {})
        keywords: dict[str, Any] = args  # type: ignore[assignment]
        if self._by_position_only is not None:
            raise BadArguments(
                f"{self.name}{self.signature}: {self._by_position_only!r} can only be given by "
                "position; send args as an array"
            )
        if self._aliases:
            aliases = self._aliases
            for reserved in aliases.keys() & keywords.keys():
                if aliases[reserved] in keywords:
                    raise BadArguments(f"both {reserved!r} and {aliases[reserved]!r} are given")
            keywords = {aliases.get(name, name): value for name, value in keywords.items()}
        given = keywords.keys()
        if given >= self._needs and (self._accepts is None or given <= self._accepts):
            return [], keywords
        return self._bind_slowly([], keywords)

    def _bind_slowly(
        self, positional: list[Any], keywords: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        try:
            self._signature.bind(*positional, **keywords)
        except TypeError as error:
            raise BadArguments(f"{self.name}{self.signature}: {error!s:.140}") from None
        return positional, keywords


class Registry:
    """
    The functions of one worker, by name.

    Args:
        functions: The daemon's own and its built-in functions.
    """

    def __init__(self, functions: Iterable[Function] = ()) -> None:
        self._functions = {function.name: function for function in functions}
        self._built_in = set(self._functions)
        self._origins: dict[str, str] = {}

    def __iter__(self) -> Iterator[Function]:
        """Give the functions, sorted by name."""
        return iter(sorted(self._functions.values(), key=lambda f: f.name))

    def find(self, name: str) -> Function:
        """
        Give the function of a name.

        Raises:
            UnknownFunction: There is none; the message says what to do.
        """
        function = self._functions.get(name)
        if function is None:
            raise UnknownFunction(
                f"no function is named {name!a:.140}; taskd.functions lists those that are"
            )
        return function

    def add(self, function: Function) -> None:
        """Register one of the daemon's own functions, which a task may replace."""
        self._functions[function.name] = function
        self._built_in.add(function.name)

    def add_module(self, module: ModuleType) -> int:
        """
        Register every function of a module that ``@task`` has marked.

        A function that a module took from another one counts too, so that one
        module can gather the tasks of many. A task may take the place of a
        built-in one, such as ``send_mail``.

        Args:
            module: An imported module.

        Returns:
            How many functions it offers.

        Raises:
            SettingsError: Two different functions want one name, or a name is not allowed.
        """
        found = 0
        for value in list(vars(module).values()):
            options = getattr(value, "__dict__", {}).get(_OPTIONS_ATTRIBUTE)
            if isinstance(options, _Options):
                found += 1
                self._add(value, options, module.__name__)
        return found

    def _add(self, call: Callable[..., Any], options: _Options, origin: str) -> None:
        name = options.name or call.__name__
        _check_name(name)
        known = self._functions.get(name)
        if known is not None and known.call is not call and name not in self._built_in:
            raise SettingsError(
                f"two functions want the name {name!r}: one in {self._origins[name]}, "
                f"one in {origin}; give one of them @task(name=...)"
            )
        self._built_in.discard(name)
        self._origins[name] = origin
        self._functions[name] = Function(name, call, _kind_of(call, options), options.timeout)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be a task's name: letters, digits, '_', '.' and '-', 128 at most"
        )
    if name.startswith(RESERVED_PREFIX):
        raise SettingsError(f"{name!r} cannot be a task's name: {RESERVED_PREFIX}* is reserved")


def _kind_of(call: Callable[..., Any], options: _Options) -> Kind:
    if inspect.iscoroutinefunction(inspect.unwrap(call)) or inspect.iscoroutinefunction(call):
        if options.blocking:
            raise SettingsError(f"@task: {call.__name__} is async, so it cannot be blocking=True")
        return Kind.COROUTINE
    blocking = options.blocking
    if blocking is None:
        blocking = not _returns_deferred(call)
    return Kind.THREAD if blocking else Kind.REACTOR


def _returns_deferred(call: Callable[..., Any]) -> bool:
    """Recognise a Deferred by its name: this floor knows no Twisted."""
    if inspect.isgeneratorfunction(inspect.unwrap(call)):
        # A generator function within another function is inlineCallbacks' work;
        # one by itself would return a generator, which no caller can be sent.
        return call is not inspect.unwrap(call)
    annotation = getattr(call, "__annotations__", {}).get("return")
    annotation = getattr(annotation, "__origin__", annotation)
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return re.match(r"([A-Za-z_.]*\.)?Deferred\b", name) is not None
