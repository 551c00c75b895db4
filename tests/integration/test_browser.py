"""
A browser must not be able to reach a local taskd.

A page that somebody has opened may have the browser send nearly anything to
127.0.0.1, under any ``Host`` if its own name is made to point there. Here real
HTTP stacks send what a page can: none of it may be run, or be answered.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import unittest
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from tests.integration.callers import by_token
from tests.integration.case import DaemonTestCase
from tests.integration.daemon import WAIT_SECONDS, Daemon

TOKEN: Final = "web-0123456789abcdef0123456789"

ORIGIN: Final = "http://page.example"
REBOUND: Final = "page.example:80"
"""The ``Host`` of a request from a page whose name was made to point to this machine."""

FOUND: Final = "it speaks HTTP, and is cut off"
FOUND_TLS: Final = "it speaks TLS, and is cut off"

EMPTY_REPLY: Final = 52
SEND_FAILED: Final = 55
RECEIVE_FAILED: Final = 56
TLS_FAILED: Final = 35
NO_REPLIES: Final = (EMPTY_REPLY, SEND_FAILED, RECEIVE_FAILED, TLS_FAILED)
"""What curl ends with if nothing was answered."""

_NODE: Final = """
const http = require('node:http');
const [port, lines, host] = process.argv.slice(1);
const url = `http://127.0.0.1:${port}`;
const tries = [];
const add = (name, promise) => tries.push(promise.then(
    (answer) => [name, `answered ${answer.status || answer.statusCode}`],
    (error) => [name, (error.cause && error.cause.code) || error.code || String(error)]));
const ask = (options, body) => new Promise((resolve, reject) => {
    const request = http.request({port, host: '127.0.0.1', ...options}, resolve);
    request.on('upgrade', resolve);
    request.on('error', reject);
    request.end(body);
});
const plain = {'Content-Type': 'text/plain'};
const form = new FormData();
form.append('a', lines);
const upgrade = {
    Connection: 'Upgrade', Upgrade: 'websocket', 'Sec-WebSocket-Version': '13',
    'Sec-WebSocket-Key': 'x3JJHMbDL1EzLkh9GBhXDw==', Origin: 'http://page.example',
};
add('text', fetch(url, {method: 'POST', mode: 'no-cors', headers: plain, body: lines}));
add('bytes', fetch(url, {method: 'POST', mode: 'no-cors', body: new TextEncoder().encode(lines)}));
add('form', fetch(url, {method: 'POST', mode: 'no-cors', body: form}));
add('urlencoded', fetch(url, {method: 'POST', body: new URLSearchParams({a: lines})}));
add('query', fetch(`${url}/?${encodeURIComponent(lines)}`));
add('path', fetch(`${url}/${lines.trim()}`));
add('preflight', fetch(url, {method: 'OPTIONS', headers: {Origin: 'http://page.example'}}));
add('put', fetch(url, {method: 'PUT', body: lines}));
add('beacon', fetch(url, {method: 'POST', keepalive: true, body: lines}));
add('https', fetch(`https://127.0.0.1:${port}/`, {method: 'POST', body: lines}));
add('own method', fetch(url, {method: 'look-here', body: lines}));
add('websocket', ask({headers: upgrade}));
add('rebound', ask({method: 'POST', headers: {...plain, Host: host}}, lines));
add('chunked', ask({method: 'POST', headers: {'Transfer-Encoding': 'chunked'}}, lines));
add('http/1.0 path', ask({path: '/' + encodeURI(lines)}));
Promise.all(tries).then((all) => console.log(JSON.stringify(Object.fromEntries(all))));
"""

NODES_TRIES: Final = 15
NO_ANSWERS: Final = {"ECONNRESET", "UND_ERR_SOCKET", "EPIPE", "ECONNABORTED"}
"""How Node calls it that a connection has ended without an answer."""


class BrowserTestCase(DaemonTestCase):
    """Base of tests of what reaches a daemon with one worker, whose one thread runs all tasks."""

    def start_local(self, *, asking: bool = False) -> Daemon:
        """Start a daemon, that asks for a token or does not."""
        # Whoever is hung up on only because nothing more came would not end here.
        options = ("--first-line-timeout", "3600")
        if not asking:
            return self.start(*options, procs=1)
        return self.start(
            *options,
            "--token-file=tokens",
            procs=1,
            secrets={"tokens": f"web:{TOKEN}\n"},
            caller=by_token(TOKEN),
        )

    def for_both(self, check: Callable[[Daemon, str, str], None], found: str = FOUND) -> None:
        """
        Check a daemon that asks for no token and one that does; nothing has run afterwards.

        Args:
            check: Takes the daemon, the path that a task would touch, and lines
                that would have it do so.
            found: What the log says, once.
        """
        for asking in (False, True):
            daemon = self.start_local(asking=asking)
            path = self.path(daemon)
            task = {"function": "touch", "args": [path]}
            auth = {"function": "taskd.auth", "args": [TOKEN if asking else ""]}
            lines = "".join(json.dumps(line) + "\n" for line in (task, auth, task))
            check(daemon, path, "\n" + lines)
            # The one worker's one thread would have run it before this.
            self.assertEqual(daemon.ask("add", [1, 2]), 3)
            self.assertFalse(os.path.exists(path))
            self.wait_for_log(daemon, found)
            self.assertEqual(daemon.log.count(found), 1, daemon.log)
            self.assertRegex(daemon.log, rf"127\.0\.0\.1 port \d+: {found}")
            self.assertEqual(daemon.status()["totals"]["failed"], 0)
            # Sent by somebody else, the very same would run.
            with daemon.connect() as caller:
                caller.send("\n" + json.dumps(task) + "\n")
                self.assertIsNone(caller.reply())
            self.assertTrue(os.path.exists(path))
            daemon.stop()

    def program(self, name: str) -> str:
        """Find a program, or skip the test."""
        found = shutil.which(name)
        if found is None:
            raise unittest.SkipTest(f"{name} is not installed")
        return found

    def assert_no_answer(self, curl: str, url: str, *words: str) -> None:
        ended = subprocess.run(
            [curl, "-sS", "-k", "-m", str(WAIT_SECONDS), "--noproxy", "*", *words, url],
            capture_output=True,
            timeout=2 * WAIT_SECONDS,
            check=False,
        )
        self.assertIn(ended.returncode, NO_REPLIES, ended.stderr)
        self.assertEqual(ended.stdout, b"")

    def say(self, daemon: Daemon, data: bytes) -> bytes:
        """Send bytes, and give what is answered before the end."""
        with socket.create_connection(("127.0.0.1", daemon.port), WAIT_SECONDS) as sock:
            heard = b""
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
                while more := sock.recv(65536):
                    heard += more
        return heard


class HttpTests(BrowserTestCase):
    def test_python(self) -> None:
        """What ``http.client`` sends is cut off without an answer, whatever the ``Host``."""

        def check(daemon: Daemon, path: str, lines: str) -> None:
            upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Origin": ORIGIN}
            task = lines.strip().splitlines()[0]
            for method, target, body, headers in (
                ("POST", "/", lines, {"Content-Type": "text/plain"}),
                ("POST", "/", lines, {"Content-Type": "text/plain", "Host": REBOUND}),
                ("POST", "/", lines, {"Content-Type": "text/plain", "Host": task}),
                ("POST", "/", "a=" + quote(lines), {"Host": f"127.0.0.1:{daemon.port}"}),
                ("POST", f"http://{REBOUND}/", lines, {}),
                ("GET", "/" + quote(task), None, {}),
                ("GET", "/?" + quote(lines), None, {"Referer": ORIGIN + "/" + quote(lines)}),
                ("GET", "/", None, {"Cookie": task, "User-Agent": task}),
                ("GET", "/", lines, upgrade),
                ("OPTIONS", "*", None, {"Access-Control-Request-Method": "PUT"}),
                ("HEAD", "/", None, {}),
                ("PUT", "/", lines, {}),
                ("DELETE", "/", lines, {}),
                ("PATCH", "/", lines, {}),
                ("CONNECT", REBOUND, lines, {}),
            ):
                caller = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=WAIT_SECONDS)
                # Any byte of an answer would be a bad status line, which is no ConnectionError.
                with contextlib.closing(caller), self.assertRaises(ConnectionError):
                    caller.request(method, target, body, headers)
                    caller.getresponse()

        self.for_both(check)

    def test_raw(self) -> None:
        """Not a byte is answered, however the request is cut, and however long its target is."""

        def check(daemon: Daemon, path: str, lines: str) -> None:
            for head in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"GET / HTTP/1.1\n",
                b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"\r\nPOST / HTTP/1.1\r\n\r\n",
                b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
                b"GET /" + b"x" * 2_000_000 + b" HTTP/1.1\r\n\r\n",
                b"GET /" + lines.encode().replace(b"\n", b"") + b" HTTP/1.1\r\n\r\n",
                b"Host: x\r\n\r\n",
            ):
                self.assertEqual(self.say(daemon, head + lines.encode()), b"", head[:40])

        self.for_both(check)

    def test_node(self) -> None:
        """What Node's ``fetch`` and ``http`` send is cut off without an answer."""
        node = self.program("node")

        def check(daemon: Daemon, path: str, lines: str) -> None:
            ended = subprocess.run(
                [node, "-e", _NODE, "--", str(daemon.port), lines, REBOUND],
                capture_output=True,
                timeout=WAIT_SECONDS,
                check=False,
            )
            self.assertEqual(ended.returncode, 0, ended.stderr)
            outcomes = json.loads(ended.stdout)
            self.assertEqual(len(outcomes), NODES_TRIES)
            self.assertEqual({n: c for n, c in outcomes.items() if c not in NO_ANSWERS}, {})

        self.for_both(check)

    def test_curl(self) -> None:
        """What curl sends is cut off without an answer, by HTTP/0.9, 1.0, 1.1, 2 and over TLS."""
        curl = self.program("curl")

        def check(daemon: Daemon, path: str, lines: str) -> None:
            body = daemon.directory / "body"
            body.write_text(lines, encoding="utf-8")
            task = lines.strip().splitlines()[0]
            for words in (
                ("--data-binary", f"@{body}"),
                ("--data-binary", f"@{body}", "-H", "Content-Type: text/plain"),
                ("--data-binary", f"@{body}", "-H", f"Host: {REBOUND}"),
                ("-F", f"a=<{body}"),
                ("-F", f"file=@{body}"),
                ("--http1.0", "--data-binary", f"@{body}"),
                ("--http0.9", "--data-binary", f"@{body}"),
                ("--http2-prior-knowledge", "--data-binary", f"@{body}"),
                ("-T", str(body)),
                ("-G", "--data-urlencode", f"a@{body}"),
                ("-A", task, "-e", task, "-b", task),
            ):
                self.assert_no_answer(curl, f"http://127.0.0.1:{daemon.port}/", *words)
            url = f"https://127.0.0.1:{daemon.port}/"
            self.assert_no_answer(curl, url, "--data-binary", lines)
            self.wait_for_log(daemon, FOUND_TLS)
            self.assertEqual(daemon.log.count(FOUND_TLS), 1)

        self.for_both(check)


class TlsTests(BrowserTestCase):
    def test_lines_in_a_handshake(self) -> None:
        """A handshake that has a task's line in it, as a resumed one can, is cut off as well."""

        def check(daemon: Daemon, path: str, lines: str) -> None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            hello = self.hello(context, *(f"\n{line}\n" for line in lines.strip().splitlines()))
            self.assertEqual(self.say(daemon, hello), b"")

        self.for_both(check, FOUND_TLS)

    def hello(self, context: ssl.SSLContext, *protocols: str) -> bytes:
        """Give what a client says first that wants to speak one of these."""
        context.set_alpn_protocols(list(protocols))
        said, heard = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            context.wrap_bio(heard, said, server_hostname="page.example").do_handshake()
        hello = said.read()
        for protocol in protocols:
            self.assertIn(protocol.encode(), hello)
        return hello
