"""
Send 1000 mails through taskd, while this program goes on with its own work.

Its own work is a tick every 10 ms, as a game or a chat server has. What a slow
mail server does to it is the longest gap between two ticks::

    .venv/bin/twistd -n taskd --port 12345 --procs 16 --smtp 127.0.0.1:8025
    .venv/bin/python examples/mail_1000.py tcp:127.0.0.1:12345 --domain example.org
"""

from __future__ import annotations

import argparse
import sys
from time import perf_counter
from typing import Any

from twisted.internet.defer import DeferredList
from twisted.internet.task import LoopingCall, react

from taskd.client import TaskClient

TICK_SECONDS = 0.01


class Ticker:
    """
    The work that must not be held up.

    Attributes:
        ticks: How many there were.
        longest_gap: Seconds between the two ticks that were the furthest apart.
    """

    def __init__(self) -> None:
        self.ticks = 0
        self.longest_gap = 0.0
        self._last = perf_counter()

    def tick(self) -> None:
        """Be called every 10 ms, if nothing is in the way."""
        now = perf_counter()
        self.ticks += 1
        self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Send many mails through taskd.")
    parser.add_argument("endpoint", nargs="?", default="tcp:127.0.0.1:12345")
    parser.add_argument("--count", type=int, default=1000, help="how many mails")
    parser.add_argument("--sender", default="news@example.org")
    parser.add_argument("--domain", default="example.org", help="of the recipients user1, user2 …")
    parser.add_argument("--pool", type=int, default=16, help="how many connections to taskd")
    return parser.parse_args(words)


async def main(reactor: Any, *words: str) -> None:
    """Send the mails, and tell how it went."""
    options = parse(list(words))
    client = TaskClient(reactor, options.endpoint, pool=options.pool)
    ticker = Ticker()
    ticking = LoopingCall(ticker.tick)
    ticking.start(TICK_SECONDS, now=False)
    began = perf_counter()

    calls = [
        client.call_with(
            "send_mail",
            {
                "from": options.sender,
                "to": f"user{number}@{options.domain}",
                "subject": f"News for user {number}",
                "contents": "Olá!\n",
            },
        )
        for number in range(1, options.count + 1)
    ]
    outcomes = await DeferredList(calls, consumeErrors=True)

    seconds = perf_counter() - began
    ticking.stop()
    await client.close()
    failures = [outcome for is_sent, outcome in outcomes if not is_sent]
    print(f"sent {len(calls) - len(failures)} of {len(calls)} mails in {seconds:.2f} s")
    print(f"{ticker.ticks} ticks; the longest gap between two: {ticker.longest_gap * 1000:.1f} ms")
    if failures:
        sys.exit(f"the first failure: {failures[0].getErrorMessage()}")


if __name__ == "__main__":
    react(main, sys.argv[1:])
