"""Tasks for the integration tests: one of each kind, and some that do harm."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, inlineCallbacks

import taskd
from taskd import progress, task

LONGEST_HOLD_SECONDS = 30.0

_signals: dict[str, Deferred[Any]] = {}


def _signal_named(name: str) -> Deferred[Any]:
    return _signals.setdefault(name, Deferred())


# One of each kind.


@task
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@task
async def later(value: Any) -> Any:
    """Return the value a moment later."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    await deferLater(reactor, 0.01)
    return value


@task
def later_deferred(value: Any) -> Deferred[Any]:
    """Return a Deferred of the value."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    return deferLater(reactor, 0.01, lambda: value)


@task
@inlineCallbacks
def later_inline(value: Any) -> Generator[Deferred[Any], Any, Any]:
    """Return the value a moment later."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    yield deferLater(reactor, 0.01)
    return value


@task(blocking=False)
def at_once(value: Any) -> Any:
    """Return the value at once."""
    return value


@task(blocking=False)
def later_unannotated(value: Any):  # type: ignore[no-untyped-def]
    """Return a Deferred without saying so."""
    return later_deferred(value)


@task
def deferred_by_mistake(value: Any):  # type: ignore[no-untyped-def]
    """Return a Deferred from a thread."""
    return Deferred()


@task
def thread_of_blocking() -> str:
    """Name the thread that a blocking task runs in."""
    return threading.current_thread().name


@task
async def thread_of_async() -> str:
    """Name the thread that an async task runs in."""
    return threading.current_thread().name


@task(name="mail.from")
def mail_from(from_: str, to: str = "nobody") -> list[str]:
    """Take a parameter that Python reserves the name of."""
    return [from_, to]


# Those that wait for somebody.


@task
async def wait_for_signal(name: str) -> str:
    """Wait for ``give_signal`` on the same worker."""
    await _signal_named(name)
    return "came"


@task(blocking=False)
def give_signal(name: str) -> str:
    """Let ``wait_for_signal`` end."""
    # It is another one that who goes on may wait for next.
    waiting = _signals.pop(name, None)
    if waiting is None:
        return "nobody waits"
    waiting.callback(None)
    return "given"


@task
def hold(path: str) -> str:
    """Block until a file is there."""
    Path(path + ".begun").touch()
    deadline = time.monotonic() + LONGEST_HOLD_SECONDS
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.005)
    Path(path + ".ended").touch()
    return "released"


@task
async def hold_on_reactor(path: str) -> str:
    """Wait until a file is there."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    Path(path + ".begun").touch()
    while not os.path.exists(path):
        await deferLater(reactor, 0.005)
    return "released"


@task(timeout=0.1)
def hold_limited(path: str) -> str:
    """Block until a file is there, within a limit of the task's own."""
    return hold(path)


@task
async def tell_of_cancel(path: str) -> None:
    """Write a file when it is cancelled."""
    Path(path + ".begun").touch()
    try:
        await Deferred()
    except CancelledError:
        Path(path).write_text("cancelled", encoding="utf-8")
        raise


@task(timeout=0.1)
async def tell_of_own_limit(path: str) -> None:
    """Write a file when its own limit has passed."""
    await tell_of_cancel(path)


@task
def sleep(seconds: float) -> float:
    """Block in one call that nothing interrupts."""
    time.sleep(seconds)
    return seconds


# Those that meet.


@task
def meet(directory: str, name: str, count: int) -> int:
    """Wait until so many have come, and tell in which process."""
    Path(directory, name).touch()
    deadline = time.monotonic() + LONGEST_HOLD_SECONDS
    while len(os.listdir(directory)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {os.listdir(directory)} have come")
        time.sleep(0.005)
    return os.getpid()


@task
async def meet_on_reactor(directory: str, name: str, count: int) -> int:
    """Wait until so many have come, and tell in which process."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    Path(directory, name).touch()
    while len(os.listdir(directory)) < count:
        await deferLater(reactor, 0.005)
    return os.getpid()


@task
def pid_of_blocking() -> int:
    """Tell which worker runs a blocking task."""
    return os.getpid()


@task
async def pid_of_async() -> int:
    """Tell which worker runs a coroutine."""
    return os.getpid()


@task(blocking=False)
def pid_at_once() -> int:
    """Tell which worker runs what does not block."""
    return os.getpid()


# Those that report.


@task
async def walk(steps: int) -> str:
    """Report each step, and wait for ``give_signal("step")`` behind it."""
    for step in range(1, steps + 1):
        progress(step, steps, f"step {step}")
        await _signal_named("step")
    return "there"


@task
def count(steps: int) -> int:
    """Report each step from a thread."""
    for step in range(1, steps + 1):
        progress(step, steps)
    return steps


@task
def climb(path: str, steps: int) -> int:
    """Report each step from a thread, wait for its file, and tell in which process."""
    for step in range(1, steps + 1):
        progress(step, steps, f"step {step}")
        hold(f"{path}.{step}")
    return os.getpid()


@task
def record(path: str, word: str, seconds: float = 0.0) -> str:
    """Add a line to a file, in one piece, and give its word back."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{word}\n".encode())
    os.close(fd)
    time.sleep(seconds)
    return word


@task
def hold_and_say(path: str) -> str:
    """Block until a file is there, and print."""
    hold(path)
    for stream in (sys.stdout, sys.stderr):
        print("it is there", file=stream, flush=True)
    return "said"


@task
def say(text: str) -> None:
    """Print."""
    print(text)  # noqa: T201


@task
def say_on_stderr(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr)  # noqa: T201


@task
def touch(path: str) -> None:
    """Leave a mark that it has run."""
    Path(path).touch()


@task
def environment(name: str) -> str | None:
    """Give a variable of the worker's environment."""
    return os.environ.get(name)


@task
def taskd_file() -> str:
    """Tell which taskd this is."""
    return taskd.__file__


# Those that fail.


@task
def fail(message: str) -> None:
    """Raise."""
    raise ValueError(message)


@task
async def fail_later(message: str) -> None:
    """Raise from a coroutine."""
    raise LookupError(message)


@task(blocking=False)
def fail_at_once(message: str) -> None:
    """Raise on the reactor."""
    raise ArithmeticError(message)


@task
def leave(kind: str) -> None:
    """Raise what is no ``Exception``."""
    raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt()}[kind]


@task
async def leave_later(kind: str) -> None:
    """Raise what is no ``Exception`` from a coroutine."""
    leave(kind)


@task
def not_json(kind: str) -> Any:
    """Return what JSON cannot carry."""
    loop: list[Any] = []
    loop.append(loop)
    return {
        "set": {1},
        "bytes": b"x",
        "nan": float("nan"),
        "infinity": [1.0, float("inf")],
        "keys": {1: 2},
        "object": object(),
        "surrogate": "\ud800",
        "loop": loop,
    }[kind]


@task
def letters(number: int, seconds: float = 0.0) -> str:
    """Return that many letters, after a while."""
    time.sleep(seconds)
    return "x" * number


# Those that do harm.


@task
def die(status: int) -> None:
    """End the worker at once."""
    os._exit(status)


@task
async def die_on_reactor(status: int) -> None:
    """End the worker at once, from its reactor."""
    os._exit(status)


@task
def segfault() -> None:
    """Read at address 0."""
    ctypes.string_at(0)


@task
def hold_lock(path: str) -> None:
    """Block for ever in C, without letting go of Python's lock, so that nothing runs here."""
    Path(path + ".begun").touch()
    lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # no signal interrupts this, as it would a sleep


@task
async def hold_up_reactor(path: str) -> None:
    """Block the reactor, as no coroutine should."""
    hold(path)


_kept: list[bytearray] = []


@task
def grow(mebibytes: int) -> int:
    """Keep memory for good, and tell in which process."""
    _kept.append(bytearray(b"x") * (mebibytes * 2**20))
    return os.getpid()


@task
def leave_child(seconds: float) -> int:
    """Start a process that goes on when the task is done, and give its pid."""
    return subprocess.Popen(["sleep", str(seconds)]).pid


_open: list[int] = []


@task(blocking=False)
def open_all_files() -> int:
    """Open files until the worker may have no more, and tell how many."""
    try:
        while True:
            _open.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return len(_open)


@task(blocking=False)
def close_all_files() -> int:
    """Close what ``open_all_files`` has opened, and tell how many they were."""
    count = len(_open)
    while _open:
        os.close(_open.pop())
    return count


@task
def report_quickly(path: str, reports: int, size: int) -> int:
    """Report from a thread, so many letters each time."""
    Path(path + ".begun").touch()
    for number in range(1, reports + 1):
        progress(number, reports, "x" * size)
        time.sleep(0)  # a moment for who sends it
    Path(path + ".ended").touch()
    return reports


@task
async def report_quickly_on_reactor(path: str, reports: int, size: int) -> int:
    """Report in each round of the reactor, so many letters each time."""
    from twisted.internet import reactor
    from twisted.internet.task import deferLater

    Path(path + ".begun").touch()
    for number in range(1, reports + 1):
        progress(number, reports, "x" * size)
        await deferLater(reactor, 0)
    Path(path + ".ended").touch()
    return reports
