"""What the daemons are doing: each is asked for its status, once a second or when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from twisted.internet.defer import Deferred, gatherResults, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd import __version__
from taskd.client import TaskClient
from taskd.errand import stop
from taskd.errors import CallError, TaskdError
from taskd.gateway.figures import GAUGES, Figures
from taskd.gateway.history import History, is_readable

__all__ = ["Node", "Watch"]

_INTERVAL_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 6.0
"""More than a client waits for a connection (``process``), which would be told as slowness."""

_PATIENCE_SECONDS: Final = 1.0
"""So long the others wait for one that does not answer."""

_METRICS_SECONDS: Final = 2.0
_FAILURES: Final = 50


class Node(NamedTuple):
    """
    One daemon, or several behind one address.

    Attributes:
        name: Its address, for people.
        client: The connection to it.
    """

    name: str
    client: TaskClient


class Watch:
    """
    Looks at all daemons, and tells the dashboards.

    Args:
        reactor: Keeps the delays.
        nodes: The daemons.
        figures: What the gateway counts.
        clock: Gives seconds that never go back.
        wall_clock: Gives UTC epoch seconds.

    Attributes:
        show: Takes what is new, for the dashboards.
    """

    _log = Logger(namespace="taskd.gateway")

    def __init__(
        self,
        reactor: Any,
        nodes: list[Node],
        figures: Figures,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._reactor = reactor
        self._nodes = nodes
        self._eyes = [_Eye(reactor, node.name, partial(self._look_at, node)) for node in nodes]
        self._figures = figures
        self._clock = clock
        self._wall_clock = wall_clock
        self._history = History()
        self._away: set[str] = set()
        self.show: Callable[[dict[str, Any]], None] = lambda _: None

    def start(self) -> None:
        """Look once a second from now on."""
        started = self._clock()

        def again(outcome: object) -> None:
            if isinstance(outcome, Failure):
                self._log.failure("the daemons' status cannot be shown", outcome)
            took = self._clock() - started
            self._reactor.callLater(max(0.0, _INTERVAL_SECONDS - took), self.start)

        self._look_and_show().addBoth(again)

    def greeting(self) -> dict[str, Any]:
        """Give what a dashboard is shown first."""
        return {
            "kind": "hello",
            "version": __version__,
            "interval": _INTERVAL_SECONDS,
            "history": list(self._history.samples),
        }

    def statuses(self) -> Deferred[dict[str, Mapping[str, Any] | None]]:
        """
        Ask all daemons.

        Returns:
            Fires with what ``taskd.status`` tells by daemon; None: it does not answer.
        """
        names = [node.name for node in self._nodes]
        asked = [self._ask(node, "taskd.status", {}, _METRICS_SECONDS) for node in self._nodes]
        return gatherResults(asked).addCallback(
            lambda told: {
                name: one if is_readable(one) else None
                for name, one in zip(names, told, strict=True)
            }
        )

    def _ask(
        self, node: Node, function: str, args: dict[str, Any], seconds: float = _ANSWER_SECONDS
    ) -> Deferred[Any]:
        """Ask a daemon; the Deferred fires with an exception, and does not fail."""
        called = node.client.call_with(function, args, timeout=seconds)

        def give(failure: Failure) -> Exception:
            failure.trap(TaskdError)
            assert isinstance(failure.value, Exception)
            return failure.value

        return called.addErrback(give)

    def _look_and_show(self) -> Deferred[Any]:
        return gatherResults([eye.see() for eye in self._eyes]).addCallback(self._tell)

    def _look_at(self, node: Node) -> Deferred[dict[str, Any]]:
        seen: dict[str, Any] = {"name": node.name, "error": None, "status": None, "failures": None}

        def failures(told: Any) -> dict[str, Any]:
            seen["failures"] = told if isinstance(told, list) else None
            return seen

        def status(told: Any) -> Deferred[dict[str, Any]]:
            if isinstance(told, CallError):
                seen["error"] = f"the daemon does not tell: {told}"
            elif isinstance(told, Exception):
                seen["error"] = f"the daemon cannot be reached: {told}"
            elif not is_readable(told):
                seen["error"] = "what the daemon tells is no status: is it no taskd?"
            else:
                seen["status"] = told
                return self._ask(node, "taskd.failures", {"limit": _FAILURES}).addCallback(failures)
            return succeed(seen)

        return self._ask(node, "taskd.status", {}).addCallback(status)

    def _log_changes(self, seen: list[dict[str, Any]]) -> None:
        """Log that a daemon does not tell, once, and that it does again."""
        for node in seen:
            name, error = node["name"], node["error"]
            if error is not None and name not in self._away:
                self._away.add(name)
                self._log.warn("{node}: {reason}", node=name, reason=error)
            elif error is None and name in self._away:
                self._away.discard(name)
                self._log.info("{node}: the daemon answers again", node=name)

    def _tell(self, seen: list[dict[str, Any]]) -> None:
        self._log_changes(seen)
        totals = self._figures.totals()
        sample = self._history.add(
            self._clock(),
            self._wall_clock(),
            {node["name"]: node["status"] for node in seen},
        )
        gateway = {
            **{name: totals[name] for name in GAUGES},
            "messages": totals["messages"],
            "refused": sum(count for name, count in totals.items() if name.startswith("refused_")),
        }
        self.show({"kind": "now", "sample": sample, "nodes": seen, "gateway": gateway})


class _Eye:
    """
    Looks at one daemon, of which the others' news do not wait for long.

    Args:
        reactor: Keeps the patience.
        name: The daemon's.
        look: Looks at it; the Deferred does not fail.
    """

    def __init__(
        self, reactor: Any, name: str, look: Callable[[], Deferred[dict[str, Any]]]
    ) -> None:
        self._reactor = reactor
        self._look = look
        self._nothing = {"name": name, "error": "", "status": None, "failures": None}
        self._trouble = ""
        self._is_looking = False
        self._seen: dict[str, Any] | None = None
        self._waiting: Deferred[dict[str, Any]] | None = None
        self._patience: IDelayedCall | None = None

    def see(self) -> Deferred[dict[str, Any]]:
        """
        Give what there is to see.

        Returns:
            Fires with what a look has found, or soon with an error: it takes long.
        """
        if not self._is_looking and self._seen is None:
            self._is_looking = True
            self._look().addCallback(self._has_seen)
        if self._seen is not None:
            seen, self._seen = self._seen, None
            return succeed(seen)
        self._waiting = Deferred()
        self._patience = self._reactor.callLater(_PATIENCE_SECONDS, self._give_up)
        return self._waiting

    def _has_seen(self, seen: dict[str, Any]) -> None:
        self._is_looking = False
        self._trouble = seen["error"] or ""
        if self._waiting is None:  # nobody has waited for it so long: it is for the next
            self._seen = seen
        else:
            stop(self._patience)
            self._answer(seen)

    def _give_up(self) -> None:
        self._answer({**self._nothing, "error": self._trouble or "the daemon does not answer"})

    def _answer(self, seen: dict[str, Any]) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(seen)
