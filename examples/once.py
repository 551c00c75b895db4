"""
One short connection for one task, and then the program goes on.

The way of a server that seldom has heavy work, or that has a balancer in front
of several daemons choose anew each time::

    .venv/bin/python examples/once.py tcp:127.0.0.1:12345
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

from taskd.client import call_once


def on_message(reactor: Any, endpoint: str) -> Deferred[None]:
    """
    Do what a WebSocket server does with a message of its client: hand on the heavy work.

    It returns at once, so the server's other clients are not held up.
    """
    task_data = {"from": "me@example.org", "to": "you@example.org", "contents": "Olá!"}
    called = call_once(reactor, endpoint, "send_mail", task_data, timeout=60)

    def done(result: dict[str, Any]) -> None:
        print("the task is done:", result)

    return called.addCallback(done)


def main(reactor: Any, endpoint: str = "tcp:127.0.0.1:12345") -> Deferred[None]:
    """Get one message, and end when its task has ended."""
    handled = on_message(reactor, endpoint)
    print("the task is on its way")
    return handled.addErrback(lambda failure: sys.exit(failure.getErrorMessage()))


if __name__ == "__main__":
    react(main, sys.argv[1:])
