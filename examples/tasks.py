r"""
Tasks to begin with.

Start a pool that runs them with::

    .venv/bin/twistd -n taskd --port 12345 --procs 8 --tasks examples/tasks.py

and ask it from another terminal::

    printf '{"function": "add", "args": [1, 2]}\n' | nc -q1 127.0.0.1 12345

Every function that ``@task`` marks can be called by its name. Arguments and
results are whatever JSON can carry.
"""

from __future__ import annotations

from typing import Any

from taskd import progress, task

REPORT_EVERY = 10_000


@task
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@task(timeout=300)
def count_primes(below: int) -> int:
    """
    Count the primes below a number: heavy work, which blocks its worker.

    A plain function may take as long as it likes: it runs in a thread of one
    worker process, while the other workers serve everybody else. Who asks with
    ``"progress": true`` is told how far it is.
    """
    found = 0
    for number in range(2, below):
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            found += 1
        if number % REPORT_EVERY == 0:
            progress(number, below, f"{found} primes so far")
    return found


@task(timeout=10)
async def is_open(host: str, port: int) -> bool:
    """
    Tell whether something listens on a TCP port.

    An ``async def`` runs on the worker's Twisted reactor, so one worker can wait
    for thousands of slow services at a time. It must never block. The reactor
    is imported in the function: each worker makes its own.
    """
    from twisted.internet import reactor
    from twisted.internet.endpoints import HostnameEndpoint
    from twisted.internet.error import ConnectError
    from twisted.internet.protocol import Factory, Protocol

    endpoint: Any = HostnameEndpoint(reactor, host, port)
    try:
        protocol = await endpoint.connect(Factory.forProtocol(Protocol))
    except ConnectError:
        return False
    protocol.transport.loseConnection()
    return True
