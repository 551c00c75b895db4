"""What hostile tasks, daemons and pages of other origins can do to the dashboard: nothing."""

from __future__ import annotations

import functools
import http.server
import json
import socketserver
import threading
from typing import Any, Final

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import WAIT_SECONDS
from tests.integration.test_dashboard import DashboardTestCase, Page

__all__ = ["ScriptedDaemon", "serve"]

LONG: Final = "<b>" + "x" * 8192

ATTACKS: Final = (
    '<img src=x onerror="window.pwned=1">',
    "<script>window.pwned=1</script>",
    '"><svg onload="window.pwned=1">',
    "'><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "</td></tr></table><form action=//evil.example><input name=q>",
    "javascript:window.pwned=1//",
    "{{constructor.constructor('window.pwned=1')()}}${window.pwned=1}",
    "&lt;img src=x onerror=window.pwned=1&gt;",
    "\u202egnp.exe\u202c \u2066left\u2069 \u200f\u200e\ufeff\u061c",
    "\x00\x07\x08\x1b[31mred\x1b[0m\x7f\x85\u2028\u2029",
    "Z" + "\u0351\u0324\u033a" * 40,
    "\U000e0041\U000e0042\u00ad\u200b\u3164",
)

SHAPE: Final = """
    const tags = {};
    for (const node of document.querySelectorAll("*")) tags[node.localName] =
        (tags[node.localName] || 0) + 1;
    return tags;
"""

FORBIDDEN: Final = (
    "img, iframe, form, object, embed, b > *, .text *, td script, [onerror], [onload]"
)

STEERING: Final = r"/[\p{Cc}\p{Cf}\u2028\u2029\u3164]/u"
"""What must not stand in the text of the page as it is."""


class ScriptedDaemon:
    """
    What answers as a daemon does, with whatever a test wants.

    Args:
        test: Ends it.
        answers: By function, what its result is; an exception holds an error.
    """

    def __init__(self, test: SynchronousTestCase, **answers: Any) -> None:
        replies = {f"taskd.{name}": answer for name, answer in answers.items()}

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                for line in self.rfile:
                    request = json.loads(line)
                    answer = replies.get(request["function"])
                    is_error = isinstance(answer, Exception)
                    told = {"error": answer.args[0]} if is_error else {"result": answer}
                    reply = {"id": request.get("id"), **told}
                    self.wfile.write(json.dumps(reply).encode() + b"\n")

        self.endpoint = f"tcp:127.0.0.1:{_start(test, ('127.0.0.1', 0), Handler)}"


def serve(test: SynchronousTestCase, pages: dict[str, str]) -> int:
    """Serve pages of another origin, and give the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((content or "").encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return _start(test, ("127.0.0.1", 0), Handler)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True


def _start(test: SynchronousTestCase, address: tuple[str, int], handler: Any) -> int:
    server = _Server(address, handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    test.addCleanup(thread.join, WAIT_SECONDS)
    test.addCleanup(server.server_close)
    test.addCleanup(server.shutdown)
    return server.server_address[1]


class InjectionTestCase(DashboardTestCase):
    """Base of tests of hostile texts."""

    def assert_harmless(self, page: Page) -> None:
        """Nothing was run, no element has come, nothing steers the text, nothing was violated."""
        self.assertIsNone(page.js("return window.pwned ?? null"))
        self.assertEqual(page.js(f"return document.querySelectorAll({FORBIDDEN!r}).length"), 0)
        self.assertEqual(page.js("return document.scripts.length"), 1)
        text = "document.querySelector('main').innerText.replace(/[\\n\\t]/g, '')"
        self.assertEqual(page.js(f"return {text}.match({STEERING})"), None)
        attributes = page.js(
            "return [...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])"
            ".filter(({name}) => name.startsWith('on') || name === 'srcdoc' || name === 'style')"
            ".length"
        )
        self.assertEqual(attributes, 0)
        wide = page.js("return document.scrollingElement.scrollWidth - innerWidth")
        self.assertLessEqual(wide, 0)
        self.assert_clean(page)


class InjectionTests(InjectionTestCase):
    def test_tasks(self) -> None:
        """Messages and names of exceptions of a real task are shown as text, whatever they hold."""
        module = (
            "from taskd import task\n@task\ndef raise_it(name, message):\n"
            "    raise type(name.replace(chr(0), ''), (Exception,), {})(message)\n"
        )
        daemon, page = self.start_all(tasks="hostile.py", files={"hostile.py": module})
        before = page.js(SHAPE)
        for attack in (*ATTACKS, LONG):
            self.assert_error(daemon.ask("raise_it", [attack, f"message {attack}"]), "task-failed")
        page.wait(lambda: len(page.failures()) == len(ATTACKS) + 1, "all failures")
        shown = [failure[2] for failure in page.failures()]
        for attack in ATTACKS[:8]:
            found = [text for text in shown if f"message {attack}" in text]
            self.assertEqual(len(found), 1, attack)
            self.assertTrue(found[0].startswith(attack), found)
        self.assertTrue(any("\u27e8U+202E\u27e9gnp.exe" in text for text in shown))
        self.assertTrue(any("\u27e8NUL\u27e9\u27e8U+0007\u27e9" in text for text in shown))
        for node in page.driver.find_elements("css selector", "#failures summary"):
            node.click()
        after = page.js(SHAPE)
        self.assertLessEqual(set(after) - set(before), {"tr", "td", "time", "details", "summary"})
        page.screenshot("dashboard-hostile")
        self.assert_harmless(page)
        page.shape(width=360, height=800)
        self.assert_harmless(page)
        page.screenshot("dashboard-hostile-360")

    def hostile(self, number: int, attack: str) -> dict[str, Any]:
        return {
            "worker": number,
            "pid": number,
            "state": attack,
            "task": attack,
            "task_seconds": 5.0,
            "uptime": 9.0,
            "in_flight": 1,
            "connections": 0,
            "done": 1,
            "failed": 0,
            "latency": {},
            "callers": {attack: 1},
        }

    def test_daemon(self) -> None:
        """So are states, functions, codes, causes, reasons and versions of a hostile daemon."""
        attacks = (*ATTACKS, LONG)
        status = {
            "version": ATTACKS[0],
            "supervisor": {
                "pid": 1,
                "uptime": 1.0,
                "reload": {"seconds_ago": 1.0, "failure": LONG},
            },
            "queue": {"waiting": 1, "oldest_seconds": 1.0, "refused": 0, "expired": 0},
            "workers": [self.hostile(n, attack) for n, attack in enumerate(attacks, 1)],
            "totals": {
                "done": 1,
                "failed": 1,
                "connections": 1,
                "workers": {"busy": 1},
                "restarts": dict.fromkeys(attacks, 1),
            },
            "functions": [
                {
                    "name": attack,
                    "done": 1,
                    "failed": 1,
                    "errors": dict.fromkeys(attacks, 1),
                    "seconds": 1.0,
                    "latency": {"1024": 2},
                }
                for attack in attacks
            ],
        }
        failures = [
            {
                "at": 1.7e9 + number,
                "function": attack,
                "code": attack,
                "type": attack,
                "message": attack,
                "worker": number,
            }
            for number, attack in enumerate(attacks)
        ]
        daemon = ScriptedDaemon(self, status=status, failures=failures)
        page = self.show(self.start_gateway(daemon.endpoint))
        page.wait(lambda: len(page.functions()) == len(attacks), "all functions")
        page.wait(lambda: len(page.failures()) == len(attacks), "all failures")
        page.wait(lambda: len(page.tiles()) == len(attacks), "all workers")
        self.assertEqual({state for state, _ in page.tiles().values()}, {"unknown"})
        self.assertLessEqual(set(ATTACKS[:8]), set(page.functions()))
        self.assertIn(ATTACKS[0], page.attribute('.tile[data-worker="1"]', "aria-label") or "")
        for tile in page.driver.find_elements("css selector", ".tile"):
            tile.click()
        page.fill("filter", "<img")
        page.wait(lambda: list(page.functions()) == [ATTACKS[0]], "what has the word")
        page.screenshot("dashboard-hostile-daemon")
        self.assert_harmless(page)
        page.shape(width=360, height=800)
        page.part("filter").clear()
        page.screenshot("dashboard-hostile-daemon-360")
        self.assert_harmless(page)

    def test_reasons(self) -> None:
        """What a daemon says instead of an answer is text in the banner."""
        for attack in (ATTACKS[0], LONG):
            error = {"code": attack, "message": attack, "retryable": False}
            daemon = ScriptedDaemon(self, status=ValueError(error))
            page = Page(self, width=360, height=800)
            page.open(self.start_gateway(daemon.endpoint).origin + "/")
            page.wait_for_link("daemon")
            page.wait_for("#banner-text", "does not tell", attack[:40])
            page.screenshot("dashboard-hostile-reason")
            self.assert_harmless(page)


class PolicyTests(DashboardTestCase):
    def tried(self, page: Page, script: str) -> list[str]:
        """Try something as the page itself would, and give what was violated."""
        page.js(f"violations.length = 0; setTimeout(() => {{ try {{ {script} }} catch {{}} }})")
        page.wait(lambda: page.js("return violations"), script)
        return page.js("return violations")

    def test_policy(self) -> None:
        """The browser runs, loads and sends nothing that the page was made to."""
        _, page = self.start_all()
        inline = (
            "const made = document.createElement('script');"
            "made.append(document.createTextNode('window.pwned = 1'));"
            "document.body.append(made)"
        )
        foreign = (
            "const made = document.createElement('%s'); made.src = 'http://127.0.0.1:1/x';"
            "document.body.append(made)"
        )
        body = "document.body"
        for script, directive in (
            (inline, "script"),
            ("eval('window.pwned = 1')", "script"),
            ("new Function('window.pwned = 1')()", "script"),
            (f"{body}.innerHTML = '<img src=x onerror=\"window.pwned = 1\">'", "script"),
            (f"{body}.setAttribute('onclick', 'window.pwned = 1')", "script"),
            (foreign % "img", "img-src"),
            (foreign % "iframe", "frame-src"),
            (
                f"{body}.append(document.createElement('style')); "
                f"{body}.lastChild.append('* {{ color: red }}')",
                "style-src",
            ),
            (f"{body}.setAttribute('style', 'color: red')", "style-src"),
            ("fetch('http://127.0.0.1:1/')", "connect-src"),
            ("new WebSocket('ws://127.0.0.1:1/')", "connect-src"),
            ("navigator.sendBeacon('http://127.0.0.1:1/')", "connect-src"),
            (
                f"const f = document.createElement('form'); f.action = '/ws'; {body}.append(f);"
                "f.submit()",
                "form-action",
            ),
            (
                "const b = document.createElement('base'); b.href = 'http://evil.example/';"
                "document.head.append(b)",
                "base-uri",
            ),
            ("new Worker('data:text/javascript,1')", "worker-src"),
        ):
            violated = self.tried(page, script)
            self.assertTrue(
                any(directive in v or "trusted-types" in v for v in violated), (script, violated)
            )
        self.assertIsNone(page.js("return window.pwned ?? null"))
        self.assertEqual(page.link, "live")
        self.assertTrue(any("Content Security Policy" in str(e) for e in page.console()))

    def test_click_by_devtools(self) -> None:
        """A script element that execute_script makes does not run either."""
        _, page = self.start_all()
        page.js(
            "const made = document.createElement('script');"
            "made.append('window.pwned = 1'); document.head.append(made)"
        )
        page.wait(lambda: page.js("return violations"), "a violation")
        self.assertIsNone(page.js("return window.pwned ?? null"))


FOREIGN_PAGE: Final = """
<!doctype html><title>foreign</title><script>
const gateway = "http://127.0.0.1:%d";
const results = {};
const note = (name) => (what) => { results[name] = String(what); };
const socket = (path) => new Promise((resolve) => {
    const made = new WebSocket(gateway.replace("http", "ws") + path);
    made.onopen = () => resolve("open");
    made.onmessage = ({data}) => resolve("read " + data);
    made.onclose = ({code}) => resolve(code);
});
const read = (path, options) => fetch(gateway + path, options).then(
    async (answer) => `${answer.type} ${answer.status} ${await answer.text()}`, () => "refused");
const load = (tag, path) => new Promise((resolve) => {
    const made = document.createElement(tag);
    made.onload = () => resolve("loaded");
    made.onerror = () => resolve("refused");
    if (tag === "link") { made.rel = "stylesheet"; made.href = gateway + path; }
    else made.src = gateway + path;
    document.head.append(made);
});
socket("/live").then(note("live"));
socket("/ws").then(note("ws"));
read("/").then(note("page"));
read("/", {credentials: "include"}).then(note("page with cookies"));
read("/", {mode: "no-cors"}).then(note("page opaque"));
read("/metrics").then(note("metrics"));
read("/healthz").then(note("health"));
load("script", "/dashboard.js").then(note("script"));
load("link", "/dashboard.css").then(note("style"));
const frame = document.createElement("iframe");
frame.src = gateway + "/";
frame.onload = () => {
    let seen;
    try { seen = frame.contentDocument ? frame.contentDocument.body.innerHTML : "nothing"; }
    catch { seen = "nothing"; }
    note("frame")(seen || "nothing");
};
document.documentElement.append(frame);
</script>
"""


class ForeignPageTests(DashboardTestCase):
    def test_foreign_page(self) -> None:
        """A page of another origin, on this host too, opens, reads and frames nothing."""
        daemon = self.start(procs=1)
        gateway = self.start_gateway(daemon)
        port = serve(self, {"/": FOREIGN_PAGE % gateway.port})
        # A visitor who looks at the dashboard, too.
        page = self.show(gateway)
        for host in ("127.0.0.1", "localhost"):
            page.driver.switch_to.new_window("tab")
            page.driver.get(f"http://{host}:{port}/")
            self.look_at(page)
            page.driver.close()
            page.driver.switch_to.window(page.driver.window_handles[0])
        self.assertEqual(page.link, "live")
        figures = gateway.metrics()
        self.assertEqual(figures['taskd_gateway_refused_total{reason="origin"}'], 4)
        self.assertEqual(figures["taskd_gateway_websockets"], 1)  # a page in a frame has its own

    def look_at(self, page: Page) -> None:
        page.wait(lambda: len(page.js("return results")) == 10, "all attempts")
        self.assertEqual(
            page.js("return results"),
            {
                "live": "1006",
                "ws": "1006",
                "page": "refused",
                "page with cookies": "refused",
                "page opaque": "refused",
                "metrics": "refused",
                "health": "refused",
                "script": "refused",
                "style": "refused",
                "frame": "nothing",
            },
        )
        framing = [e for e in page.console() if "frame-ancestors" in e["message"]]
        self.assertTrue(framing)

    def test_opener(self) -> None:
        """A page that opens the dashboard in a window gets no hold of it."""
        gateway = self.start_gateway(self.start(procs=1))
        opener = "<button id=go onclick=\"window.other = window.open('%s/')\">go</button>"
        port = serve(self, {"/": opener % gateway.origin})
        page = Page(self)
        page.driver.get(f"http://127.0.0.1:{port}/")
        first = page.driver.current_window_handle
        page.part("go").click()
        page.wait(lambda: len(page.driver.window_handles) == 2, "the window")
        (second,) = {*page.driver.window_handles} - {first}
        page.driver.switch_to.window(second)
        page.wait_for_link("live")
        self.assertIsNone(page.js("return window.opener"))
        page.driver.switch_to.window(first)
        self.assertTrue(page.js("return window.other.closed"))
