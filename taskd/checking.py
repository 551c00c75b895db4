"""
``--check``: find out whether the daemon could start, and leave no trace of that.

Nothing is bound. The task modules are imported by a process of their own, as the
zygote would do it, which is killed afterwards with all that they have started.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from typing import Any, Final, NoReturn

from twisted.logger import Logger

from taskd.children import NOT_FOR_CHILDREN
from taskd.credentials import Credentials
from taskd.errors import StartFailed
from taskd.functions import RESERVED_PREFIX
from taskd.ports import Ports
from taskd.settings import Settings

__all__ = ["check", "main"]

_LONGEST_ANSWER: Final = 1024 * 1024
_MOST_SHOWN: Final = 20
"""So many tasks are named."""

_log: Final = Logger(namespace="taskd.checking")


def check(settings: Settings, ports: Ports) -> str:
    """
    Check all that can be checked without listening.

    Args:
        settings: What the operator decided, checked already.
        ports: Where it is to listen; they stay closed.

    Returns:
        What would be started, in one line.

    Raises:
        StartFailed: Something cannot be.
    """
    ports.check()
    names = sorted(_import(settings))
    for identity, functions in settings.allow:
        for name in functions:
            if not (name in names or name.startswith(RESERVED_PREFIX) or set("*?[") & set(name)):
                _log.warn("--allow {who}={name}: there is no such task", who=identity, name=name)
    tasks = ", ".join(names[:_MOST_SHOWN])
    if len(names) > _MOST_SHOWN:
        tasks += f" and {len(names) - _MOST_SHOWN} more"
    workers = "1 worker" if settings.procs == 1 else f"{settings.procs} workers"
    return f"the configuration is good: {workers}, tasks: {tasks}; listens on {ports.descriptions}"


def _import(settings: Settings) -> list[str]:
    """Import the task modules in another process, and give the names of the tasks."""
    spec = {
        "boot": "taskd.worker",
        "directory": os.getcwd(),
        "settings": settings.to_json(),
        "credentials": Credentials().to_json(),
    }
    program = f"import sys; sys.path[:] = {sys.path!r}; from taskd.checking import main; main()"
    reader, writer = os.pipe()
    with open(reader, "rb") as answer:
        try:
            child = subprocess.Popen(  # noqa: S603 (itself)
                [sys.executable, "-P", "-B", "-c", program, str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={k: v for k, v in os.environ.items() if k not in NOT_FOR_CHILDREN},
                pass_fds=(writer,),
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(spec).encode())
            # One line, not until the end: the modules may have started what keeps the pipe open.
            told = answer.readline(_LONGEST_ANSWER)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if not told.endswith(b"\n"):
        raise StartFailed("the process died while it imported the task modules")
    found: dict[str, Any] = json.loads(told)
    if "failed" in found:
        raise StartFailed(found["failed"])
    return list(found["tasks"])


def main() -> NoReturn:
    """Be the process that imports, and say what came of it."""
    spec = json.load(sys.stdin)
    boot = importlib.import_module(spec["boot"])
    sys.path.insert(0, spec["directory"])
    told: dict[str, Any]
    try:
        registry = boot.prepare(spec).registry
        told = {"tasks": [f.name for f in registry if not f.name.startswith("taskd.")]}
    except StartFailed as error:
        told = {"failed": str(error)}
    with open(int(sys.argv[1]), "wb") as answer:
        answer.write(json.dumps(told).encode() + b"\n")
    os._exit(0)  # whatever threads there are
