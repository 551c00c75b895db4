"""
What the daemon tells about itself, to any caller that asks.

What it tells is read elsewhere: from the registry and from the scoreboard.
"""

from __future__ import annotations

import time
from typing import Any

from taskd import __version__
from taskd.functions import Function, Kind, Registry
from taskd.scoreboard import Scoreboard
from taskd.slots import Slot
from taskd.states import State

__all__ = ["Introspection"]


class Introspection:
    """
    The daemon's functions that tell about itself.

    Attributes:
        scoreboard: Where the answers come from; set by each worker.
        slot: That of the worker that answers; set by each worker.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.scoreboard: Scoreboard | None = None
        self.slot: Slot | None = None

    def own_functions(self) -> list[Function]:
        """Give what callers can call of this."""
        return [
            Function("taskd.ping", self.ping, Kind.REACTOR),
            Function("taskd.functions", self.functions, Kind.REACTOR),
            Function("taskd.status", self.status, Kind.REACTOR),
            Function("taskd.failures", self.failures, Kind.REACTOR),
        ]

    def ping(self) -> str:
        """Answer "pong", or "draining" once the daemon has been told to stop."""
        board = self.scoreboard
        is_draining = board is not None and board.supervisor_slot().state is State.DRAINING
        return "draining" if is_draining else "pong"

    def functions(self) -> list[dict[str, Any]]:
        """List what can be called: name, signature, docstring, kind, time limit."""
        return [
            {
                "name": function.name,
                "signature": function.signature,
                "doc": function.doc,
                "kind": function.kind.value,
                "timeout": function.timeout,
            }
            for function in self._registry
        ]

    def status(self) -> dict[str, Any]:
        """Tell what the daemon and each of its workers do."""
        if self.scoreboard is None or self.slot is None:
            return {"version": __version__}
        self.slot.show_the_rest()  # that somebody asks is no work
        status = self.scoreboard.status(time.monotonic())
        return {"version": __version__, "answered_by": self.slot.number, **status}

    def failures(self, limit: int = 50) -> list[dict[str, Any]]:
        """List the latest failures, the newest first; as many as are asked for, and kept."""
        if type(limit) is not int or limit < 0:
            raise ValueError(f"limit is a whole number from 0, not {limit!r:.40}")
        return [] if self.scoreboard is None else self.scoreboard.latest_failures(limit)
