"""
Import the task modules, and say in one line what is wrong with them.

This is the only place that imports by name; the names come from the operator.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType

from taskd.errors import StartFailed, TaskdError
from taskd.functions import Registry

__all__ = ["load_tasks"]


def load_tasks(names: Iterable[str], registry: Registry) -> None:
    """
    Import modules and register what they offer.

    Args:
        names: Dotted names, or paths that end in ``.py``. A path's directory is
            put in front of the import path, as if the file were run.
        registry: Where the tasks go.

    Raises:
        StartFailed: A module cannot be imported, offers no task, or offers one
            that cannot be.
    """
    for name in names:
        try:
            found = registry.add_module(_load(name))
        except TaskdError as error:
            raise StartFailed(f"--tasks {name}: {error}") from None
        except BaseException as error:  # importing runs the operator's code: anything can come
            raise StartFailed(f"--tasks {name}: {_in_one_line(error)}") from error
        if not found:
            raise StartFailed(f"--tasks {name}: no function in it is marked with @task")


def _load(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = os.path.abspath(name)
    stem = os.path.basename(path)[: -len(".py")]
    spec = importlib.util.spec_from_file_location(stem, path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise StartFailed(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(path))
    sys.modules[stem] = module
    spec.loader.exec_module(module)
    return module


def _in_one_line(error: BaseException) -> str:
    """Name an exception and, where it came out of the operator's code, the line."""
    if isinstance(error, SyntaxError) and error.filename:  # its own text leaves the path out
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen", os.path.dirname(__file__)))
        and frame.filename != importlib.__file__
    ]
    if frames:
        text += f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return text
