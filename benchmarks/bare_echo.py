"""
The reference server: one process that decodes a line, encodes its "args", and sends them back.

This is the least that a Twisted server can do for one line of JSON, so a rate or a
latency of taskd divided by that of this server is what taskd costs on top, whatever
the machine.

    python benchmarks/bare_echo.py PORT
"""

from __future__ import annotations

import sys

from twisted.internet import epollreactor

epollreactor.install()

import ujson  # noqa: E402
from twisted.internet import reactor  # noqa: E402
from twisted.internet.protocol import Factory  # noqa: E402
from twisted.protocols.basic import LineReceiver  # noqa: E402


class BareEcho(LineReceiver):
    """Answers each line with the "args" of the object in it."""

    delimiter = b"\n"

    def lineReceived(self, line: bytes) -> None:
        """Send back the arguments of one request."""
        self.sendLine(ujson.dumps(ujson.loads(line)["args"]).encode())


if __name__ == "__main__":
    factory = Factory.forProtocol(BareEcho)
    factory.noisy = False
    reactor.listenTCP(int(sys.argv[1]), factory, backlog=1024, interface="127.0.0.1")
    reactor.run()
