"""
A steady load: callers in threads, each on a connection of its own, that count what they get.

Every reply is checked. What is wrong is kept for the test to show, and nothing
is asked again: a connection that ends is a failure like any other.
"""

from __future__ import annotations

import json
import threading

from tests.integration.daemon import Connection, Daemon, wait_until

__all__ = ["Load"]

_FUNCTIONS = ("add", "at_once", "later")


class Load:
    """
    Callers of the sample tasks ``add``, ``at_once`` and ``later``, in turn.

    Args:
        daemon: Who is asked.
        windows: One caller for each: so many requests it has in flight at all times.
    """

    def __init__(self, daemon: Daemon, windows: tuple[int, ...] = (1, 1, 4, 16)) -> None:
        self._callers = [_Caller(daemon, window) for window in windows]

    def __enter__(self) -> Load:
        """Begin to ask."""
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        for caller in self._callers:
            caller.stop()

    @property
    def failures(self) -> list[str]:
        """Give what went wrong, whoever it went wrong for."""
        return [failure for caller in self._callers for failure in caller.failures]

    @property
    def answered(self) -> list[int]:
        """Give how many right replies each caller has had."""
        return [caller.answered for caller in self._callers]

    def wait_for_more(self, count: int = 50) -> None:
        """Wait until every caller has had so many more right replies, or something went wrong."""
        before = self.answered
        wait_until(
            lambda: (
                self.failures
                or all(n >= b + count for n, b in zip(self.answered, before, strict=True))
            ),
            what="more replies",
        )


class _Caller(threading.Thread):
    def __init__(self, daemon: Daemon, window: int) -> None:
        super().__init__(daemon=True)
        self._connection = daemon.connect()
        self._window = window
        self._asked = 0
        self._is_stopping = False
        self._outstanding: set[int] = set()
        self.answered = 0
        self.failures: list[str] = []

    def stop(self) -> None:
        """Ask nothing more, and wait for what is owed."""
        self._is_stopping = True
        self.join()
        self._connection.close()

    def run(self) -> None:
        try:
            for _ in range(self._window):
                self._ask(self._connection)
            while self._outstanding:
                self._take(self._connection.line())
                if not self._is_stopping:
                    self._ask(self._connection)
        except (OSError, EOFError) as error:
            self.failures.append(f"{error!r} with {len(self._outstanding)} requests in flight")

    def _ask(self, connection: Connection) -> None:
        n = self._asked
        self._asked += 1
        self._outstanding.add(n)
        name = _FUNCTIONS[n % len(_FUNCTIONS)]
        connection.request(name, [n, 0] if name == "add" else [n], id=n)

    def _take(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            raise EOFError("the daemon hung up")
        reply = json.loads(line)
        n = reply.get("id")
        if n not in self._outstanding or reply != {"id": n, "result": n}:
            self.failures.append(f"not asked for: {line!r}")
        else:
            self.answered += 1
        self._outstanding.discard(n)
