"""
The way to the daemons: whose connections a call takes, and what its failure is called.

Each token that callers have shown has connections of its own, so a daemon knows
whom a call is from; whoever has shown none shares the gateway's. What a call's
answer looks like is ``conversation``'s and ``pages``'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from taskd.client import TaskClient
from taskd.errand import stop
from taskd.errors import (
    CallError,
    ClientError,
    ConnectionLost,
    InternalError,
    Overloaded,
    WorkerLost,
)
from taskd.gateway.figures import Figures
from taskd.throttle import Throttle
from taskd.wire import Args

__all__ = ["Backend", "Tenant"]

_LINGER_SECONDS: Final = 60.0
"""So long connections are kept of a token that nobody shows any more."""

_MOST_BYTES: Final = 64 * 2**20
"""So many bytes of requests may be on their way to the daemons, or wait for them."""

_TRY_AGAIN_SECONDS: Final = 1.0


class _Load:
    """
    Bounds the calls of one process that no daemon has answered yet.

    A browser's own bound is not enough: it may leave its calls behind and come again.
    And nobody may have all there is room for: half of it is for others.

    Args:
        max_calls: How many there may be.
        figures: Where they are counted.
    """

    def __init__(self, max_calls: int, figures: Figures) -> None:
        self._max_calls = max_calls
        self._figures = figures
        self._share = math.ceil(max_calls / 2)
        self._calls = self._bytes = 0
        self._callers: Counter[str] = Counter()

    def take(self, who: str, size: int, unsent: int) -> bool:
        """
        Count a call, if there is room for it.

        Args:
            who: Whose it is.
            size: How many bytes it has.
            unsent: How many bytes of calls the daemons have not read, of those too
                that are over already.
        """
        is_full = self._calls >= self._max_calls or self._callers[who] >= self._share
        if is_full or max(self._bytes, unsent) + size > _MOST_BYTES:
            self._figures.add("refused_room")
            return False
        self._calls += 1
        self._bytes += size
        self._callers[who] += 1
        self._figures.add("outstanding")
        return True

    def give_back(self, outcome: Any, who: str, size: int) -> Any:
        """Take it that a call is over, and pass on what it has come to."""
        self._calls -= 1
        self._bytes -= size
        self._callers[who] -= 1
        if not self._callers[who]:
            del self._callers[who]
        self._figures.add("outstanding", -1)
        return outcome


class Tenant:
    """
    Somebody who calls by way of the gateway: whoever shows one token, or none.

    Made by ``Backend.tenant``.

    Args:
        client: The connections.
        load: Where its calls are counted.
        left: Called when one who has come has gone.
    """

    def __init__(self, client: TaskClient, load: _Load, left: Callable[[Tenant], None]) -> None:
        self.client = client
        self.visitors = 0
        self.linger: IDelayedCall | None = None
        self._load = load
        self._left = left

    @property
    def is_stuck(self) -> bool:
        """Tell whether the daemons do not read what they are asked."""
        return self.client.unsent_bytes > _MOST_BYTES

    def call(self, function: str, args: Args, size: int, who: str, **terms: Any) -> Deferred[Any]:
        """
        Ask for a task.

        Args:
            function: As for ``TaskClient.call_with``.
            args: The same.
            size: How many bytes the request has.
            who: Who asks, who may have half of all calls in flight.
            terms: The rest of it.

        Returns:
            Fires with what ``TaskClient.call_with`` fires with.

        Raises:
            Overloaded: Too much is in flight already.
        """
        if not self._load.take(who, size, self.client.unsent_bytes):
            error = Overloaded("too many calls are in flight", retry_after=_TRY_AGAIN_SECONDS)
            return fail(error)
        called = self.client.call_with(function, args, **terms)
        return called.addBoth(self._load.give_back, who, size)

    def leave(self) -> None:
        """Take it that one of those who have come has gone."""
        self.visitors -= 1
        self._left(self)


class Backend:
    """
    All connections to the daemons.

    Args:
        reactor: Keeps the delays.
        connect: Makes a client that shows a token, or none where that is None.
        own_token: The gateway's own token, or None.
        passes_on: False: callers' tokens stay here.
        max_calls: How many calls may be in flight, whoever waits for them.
        figures: Where they are counted.
    """

    _log = Logger(namespace="taskd.gateway")

    def __init__(
        self,
        reactor: Any,
        connect: Callable[[str | None], TaskClient],
        own_token: str | None,
        *,
        passes_on: bool,
        max_calls: int,
        figures: Figures,
    ) -> None:
        self._reactor = reactor
        self._connect = connect
        self._own_token = own_token
        self._passes_on = passes_on
        self._tenants: dict[str, Tenant] = {}
        self._load = _Load(max_calls, figures)
        self._throttle = Throttle()

    def tenant(self, token: str = "") -> Tenant:
        """
        Take in one who calls, until it leaves.

        Args:
            token: What it has shown, or ''.
        """
        key = token if self._passes_on else ""
        tenant = self._tenants.get(key)
        if tenant is None:
            client = self._connect(key or self._own_token)
            tenant = self._tenants[key] = Tenant(client, self._load, partial(self._left, key))
        stop(tenant.linger)
        tenant.visitors += 1
        return tenant

    def _left(self, key: str, tenant: Tenant) -> None:
        if not tenant.visitors and key:
            tenant.linger = self._reactor.callLater(_LINGER_SECONDS, self._forget, key, tenant)

    def _forget(self, key: str, tenant: Tenant) -> None:
        if self._tenants.get(key) is tenant:
            del self._tenants[key]
            tenant.client.close()

    def error_of(self, failure: Failure) -> CallError:
        """
        Say to a browser what has become of its call; where the daemons are is not its business.

        Args:
            failure: What the call has failed with.
        """
        error = failure.value
        if isinstance(error, ConnectionLost):
            self._say("a call was lost: {reason}", str(error))
            return _lost("the worker, or the way to it, was lost", error.may_have_started)
        if isinstance(error, CallError):
            return error
        if isinstance(error, ClientError):
            self._say("a call came to no daemon: {reason}", str(error))
            return _lost("the task service cannot be reached; nothing was run", False)
        self._log.failure("a call has failed in a way that nobody foresaw", failure)
        return InternalError("the gateway has failed; its log says more")

    def _say(self, words: str, reason: str) -> None:
        """Log what may be so for every call, and say how often it was left out."""
        left_out = self._throttle.admit(words, self._reactor.seconds())
        if left_out is not None:
            words += " ({left_out} more were not logged)" if left_out else ""
            self._log.warn(words, reason=reason, left_out=left_out)


def _lost(message: str, may_have_started: bool) -> WorkerLost:
    error = WorkerLost(message, may_have_started=may_have_started)
    if not may_have_started:
        error.details["may_have_started"] = False
    return error
