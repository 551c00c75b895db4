"""The task module that the benchmarks run: tasks that cost nothing but their way through taskd."""

from __future__ import annotations

from taskd import task

__all__ = ["echo_now", "echo_thread"]


@task(blocking=False)
def echo_now(*args: object) -> list[object]:
    """Return the arguments; runs on the worker's reactor."""
    return list(args)


@task
def echo_thread(*args: object) -> list[object]:
    """Return the arguments; runs in the worker's executor thread."""
    return list(args)
