"""The task module that the benchmarks run: tasks that cost nothing but their way, or their time."""

from __future__ import annotations

import time

from taskd import task

__all__ = ["echo_now", "echo_thread", "nap", "nap_limited"]


@task(blocking=False)
def echo_now(*args: object) -> list[object]:
    """Return the arguments; runs on the worker's reactor."""
    return list(args)


@task
def echo_thread(*args: object) -> list[object]:
    """Return the arguments; runs in the worker's executor thread."""
    return list(args)


@task
def nap(seconds: float) -> None:
    """Block for a while without using a core."""
    time.sleep(seconds)


@task(timeout=0.2)
def nap_limited(seconds: float) -> None:
    """Block for longer than is allowed."""
    time.sleep(seconds)
