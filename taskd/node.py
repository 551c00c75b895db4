"""
The connections to one daemon, of those that a client has.

They are made when they are asked for, and not while the daemon is out, which
``balance`` decides. What waits for them is ``client``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IDelayedCall, IStreamClientEndpoint
from twisted.python.failure import Failure

from taskd.balance import Health, Load, Tier
from taskd.connection import TaskClientFactory, TaskClientProtocol
from taskd.errand import OnProgress, stop
from taskd.errors import (
    CallError,
    ConnectFailed,
    Overloaded,
    ShuttingDown,
    TaskFailed,
    TlsFailed,
)
from taskd.wire import Args, Terms

__all__ = ["Node", "Owner", "Way"]

_NO_ANSWER: Final = ConnectFailed("it did not answer")
_STOPS: Final = ConnectFailed("it is stopping")


class Owner(Protocol):
    """Who has the nodes, and what waits for them: a ``client.TaskClient``."""

    def opened(self) -> None:
        """Take note that a connection stands, or is lost again in the same breath."""

    def not_opened(self) -> None:
        """Take note that an attempt has failed."""

    def refused(self) -> None:
        """Take note that a daemon has refused a connection that stood."""

    def back(self, node: Node, /) -> None:
        """Take note that a daemon may be tried again."""

    def wants_no_more(self) -> bool:
        """Tell whether nobody will ask for a connection any more."""
        ...


class Way:
    """
    One connection that stands, and the node that it leads to.

    Args:
        node: That one.
        connection: The connection.

    Attributes:
        node: As it was given.
        connection: As it was given.
        has_served: True once a task was run over it.
    """

    __slots__ = ("connection", "has_served", "node")

    def __init__(self, node: Node, connection: TaskClientProtocol) -> None:
        self.node = node
        self.connection = connection
        self.has_served = False

    @property
    def in_flight(self) -> int:
        """Tell how many calls have no reply yet."""
        return self.connection.in_flight

    def call(
        self, function: str, args: Args, terms: Terms, on_progress: OnProgress | None
    ) -> Deferred[Any]:
        """Send one request; result and failures are those of ``TaskClient.call_with``."""
        called = self.connection.call(function, args, terms, on_progress)
        return called.addCallbacks(self._served, self._failed)

    def _served(self, result: Any) -> Any:
        self.has_served = True
        self.node.settled(self)
        return result

    def _failed(self, failure: Failure) -> Failure:
        if failure.check(TaskFailed):
            self.has_served = True
        self.node.note(failure, self)
        self.node.settled(self)
        return failure


class Node:
    """
    The connections to one daemon.

    Args:
        reactor: Keeps the time.
        number: The daemon's place among the client's, from 0.
        endpoint: Where it is.
        token: What it knows us by, or None.
        pool: Most connections to keep.
        has_others: True if other daemons can do what this one cannot.
        jitter: Gives draws from [0.0, 1.0).
        owner: Is told what happens.

    Attributes:
        number: As it was given.
        attempts: Those that are being made.
        last_failure: Why the last one could not be, or was lost.
    """

    def __init__(
        self,
        reactor: Any,
        number: int,
        endpoint: IStreamClientEndpoint,
        token: str | None,
        pool: int,
        has_others: bool,
        jitter: Callable[[], float],
        owner: Owner,
    ) -> None:
        self._reactor = reactor
        self.number = number
        self._endpoint = endpoint
        self._token = token
        self._pool = pool
        self._has_others = has_others
        self._jitter = jitter
        self._owner = owner
        self._health = Health()
        self._back_off: IDelayedCall | None = None
        self._leaving: list[Way] = []
        self._ways: list[Way] = []
        self.attempts: set[Deferred[Any]] = set()
        self.last_failure: BaseException = _NO_ANSWER

    @property
    def ways(self) -> list[Way]:
        """The connections that calls may take; where there are others, none that is in doubt."""
        if not self._has_others:
            return self._ways
        return [way for way in self._ways if not way.connection.is_in_doubt]

    @property
    def load(self) -> Load:
        """What it has to do for us; who is alone is as good as it is."""
        return Load(
            self.number,
            self._health.tier(self._reactor.seconds()) if self._has_others else Tier.SERVES,
            sum(way.in_flight for way in self.ways),
            len(self.ways) + len(self.attempts),
        )

    @property
    def may_open(self) -> bool:
        """
        Tell whether one more connection may be made now.

        Where there are others, a daemon has to answer one attempt before the next is made.
        """
        if self._health.is_out or len(self.ways) + len(self.attempts) >= self._pool:
            return False
        return bool(self.ways) or not self.attempts or not self._has_others

    @property
    def is_out(self) -> bool:
        """Tell whether it is not to be connected to now."""
        return self._health.is_out

    @property
    def is_hopeless(self) -> bool:
        """Tell whether waiting for it will not help: nobody will mend a certificate so soon."""
        return not (self.ways or self.attempts) and isinstance(
            self.last_failure, TlsFailed | CallError
        )

    def best_way(self) -> Way | None:
        """Give the connection with the fewest calls in flight."""
        best, fewest = None, 0
        for way in self.ways:  # it is asked twice for each call: min() takes three times as long
            in_flight = way.connection.in_flight
            if best is None or in_flight < fewest:
                best, fewest = way, in_flight
        return best

    def open(self) -> None:
        """Make one more connection, if that may be."""
        if self.may_open:
            factory = TaskClientFactory(self._reactor, self._lost, token=self._token)
            attempt: Deferred[Any] = self._endpoint.connect(factory)
            attempt.addCallback(_standing)
            self.attempts.add(attempt)
            attempt.addBoth(self._attempted, attempt)
            attempt.addCallbacks(self._connected, self._not_connected)

    def close(self) -> Deferred[Any]:
        """
        Give up what is being made, and close what stands.

        Returns:
            Fires with something once all connections are closed.
        """
        stop(self._back_off)
        for attempt in list(self.attempts):
            attempt.cancel()
        return gatherResults([way.connection.close() for way in self._ways + self._leaving])

    def note(self, failure: Failure, way: Way) -> None:
        """Take note of how a call has failed, if another daemon, or connection, could have it."""
        if failure.check(ShuttingDown):
            self._leave(way)
        elif isinstance(failure.value, Overloaded) and self._has_others:
            self._health.rest(self._reactor.seconds(), failure.value.retry_after)

    def settled(self, way: Way) -> None:
        """Close a connection to a daemon that stops, when it has answered what it has begun."""
        if way in self._leaving and not way.in_flight:
            way.connection.close()

    def _leave(self, way: Way) -> None:
        """
        Ask no more of a daemon that stops; what it has begun, it will answer.

        A daemon without others may be several, behind a balancer. Then only this
        connection is known to lead to the one that stops, and a new one may be made
        at once, unless this was a new one itself.
        """
        if way not in self._ways:
            return
        leaving = self._ways if self._has_others else [way]
        self._ways = [way for way in self._ways if way not in leaving]
        self._leaving += leaving
        for one in leaving:
            self.settled(one)
        if way.has_served and not self._has_others:
            self._health.answered()
            self.last_failure = _STOPS
        else:
            self._stay_away(_STOPS)

    def _attempted(self, result: Any, attempt: Deferred[Any]) -> Any:
        self.attempts.discard(attempt)
        return result

    def _connected(self, connection: TaskClientProtocol) -> None:
        if connection.connected:  # or it is lost again within the same breath
            way = Way(self, connection)
            self._ways.append(way)
            connection.on_goodbye = lambda _: self._leave(way)
        self._owner.opened()

    def _not_connected(self, reason: Failure) -> None:
        assert reason.value is not None
        self._stay_away(reason.value)
        self._owner.not_opened()

    def _lost(self, connection: TaskClientProtocol) -> None:
        if not connection.has_stood:
            return  # which its attempt tells
        was_leaving = any(way.connection is connection for way in self._leaving)
        self._ways = [way for way in self._ways if way.connection is not connection]
        self._leaving = [way for way in self._leaving if way.connection is not connection]
        if connection.refusal is not None:
            self._stay_away(connection.refusal)
            self._owner.refused()
        elif was_leaving:
            pass  # of which note was taken then
        elif not connection.has_answered:
            self._stay_away(_NO_ANSWER)
        else:
            self._health.answered()
            self.last_failure = _NO_ANSWER
            if self._has_others:
                self._stay_away(ConnectFailed("its connection was lost"))

    def _stay_away(self, failure: BaseException) -> None:
        """Connect no more for a while; a daemon that hangs up on us is as one that is not there."""
        self.last_failure = failure
        if self._owner.wants_no_more():
            return
        delay = self._health.failed(self._jitter())
        if delay is not None:
            self._back_off = self._reactor.callLater(delay, self._try_again)

    def _try_again(self) -> None:
        self._health.back()
        self._owner.back(self)


def _standing(connection: TaskClientProtocol) -> Deferred[TaskClientProtocol]:
    return connection.standing()
