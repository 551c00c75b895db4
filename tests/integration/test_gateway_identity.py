"""Who calls by way of a gateway, what it may call, and that the daemon knows it, too."""

from __future__ import annotations

import http
import json
from pathlib import Path
from typing import Any, Final

from websockets.exceptions import InvalidStatus

from tests.integration.callers import by_token
from tests.integration.daemon import Daemon, shared_daemon, wait_until
from tests.integration.gateway import Gateway, GatewayTestCase, WebSocket, shared_gateway

WEB: Final = "web-0123456789abcdef0123456789"
APP: Final = "app-fedcba9876543210fedcba9876"
OPS: Final = "ops-fedcba9876543210fedcba9876"
OWN: Final = "own-00112233445566778899aabbcc"
WRONG: Final = "wrong-0123456789abcdef0123456789"

TOKENS: Final = f"web:{WEB}\napp:{APP}\n"
SECRETS: Final = {"tokens": TOKENS, "own": f"{OWN}\n"}

UNAUTHORIZED: Final = 4401


def bearer(token: str) -> dict[str, str]:
    """Show a token as a program does."""
    return {"Authorization": f"Bearer {token}"}


class DefaultTests(GatewayTestCase):
    def setUp(self) -> None:
        self.daemon, self.gateway = shared_gateway()

    def test_echo_alone(self) -> None:
        """Without --allow, a browser may call echo, and nothing else; it stays connected."""
        web, path = self.open(self.gateway), self.path(self.daemon)
        for function, args in (
            ("touch", [path]),
            ("add", [1, 2]),
            ("no_such_task", []),
            ("taskd.status", []),
            ("taskd.functions", []),
            ("taskd.failures", []),
            ("send_mail", {}),
            ("ECHO", [1]),
        ):
            reply = web.ask(function, args, id=1)
            self.assertEqual(reply["id"], 1)
            self.assert_error(reply, "unauthorized", function, "--allow")
            answer = self.gateway.call(function, args)
            self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)
            self.assert_error(answer.json, "unauthorized", function)
        self.assertEqual(web.ask("echo", [1]), 1)
        self.assertEqual(self.gateway.call("echo", [1]).json, {"result": 1})
        self.assertEqual(web.ask("taskd.ping"), "pong")
        self.assertFalse(Path(path).exists())
        self.wait_for_log(self.gateway, "who shows nothing may not call 'touch'")


class AllowTests(GatewayTestCase):
    def test_allow(self) -> None:
        """With --allow, what its patterns name may be called, echo only if they do."""
        daemon = shared_daemon(procs=2)
        gateway = self.start_gateway(daemon, "--allow=add,mail.*", "--allow", "later*")
        web = self.open(gateway)
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assertEqual(web.ask("mail.from", ["me"]), ["me", "nobody"])
        self.assertEqual(web.ask("later_inline", [1]), 1)
        for function in ("echo", "at_once", "mail_from", "taskd.status"):
            self.assert_error(web.ask(function, [1]), "unauthorized")


class TokenTestCase(GatewayTestCase):
    """Base of tests of a gateway that asks, before a daemon that asks as well."""

    def start_both(self, *options: str, tokens: str = TOKENS) -> tuple[Daemon, Gateway]:
        daemon = self.start(
            "--token-file=tokens",
            caller=by_token(OPS),
            secrets={"tokens": f"{tokens}ops:{OPS}\ngateway:{OWN}\n"},
        )
        gateway = self.start_gateway(daemon, "--token-file=tokens", *options, secrets=SECRETS)
        return daemon, gateway

    def wait_for_caller(self, daemon: Daemon, identity: str) -> None:
        """Wait until the daemon's status shows connections of that identity."""
        wait_until(
            lambda: daemon.status()["totals"]["callers"].get(identity), what=f"calls of {identity}"
        )

    def assert_is(self, web: WebSocket, function: str, other: str) -> None:
        """It may call the first function, and not the other one."""
        self.assertEqual(web.ask(function, [1, 2]), 3)
        self.assert_error(web.ask(other, [1, 2]), "unauthorized", other)


class TokenTests(TokenTestCase):
    def test_ways_to_show_it(self) -> None:
        """A token is shown by a header, a cookie or the first message; each has its own rights."""
        _, gateway = self.start_both(
            "--allow=web=add,none", "--allow=app=ec*", "--cookie=session", "--tasks-token=own"
        )
        cookie = {"Cookie": f"other=1; session={APP}"}
        with_cookie = self.open(gateway, headers=cookie)
        self.assertEqual(with_cookie.ask("echo", [1]), 1)
        with_header = self.open(gateway, headers=bearer(WEB))
        first = self.open(gateway)
        first.request("taskd.auth", {"token": WEB}, id=0)
        first.request("add", [1, 2], id=1)
        self.assertEqual(first.reply(), {"id": 0, "result": "web"})
        self.assertEqual(first.reply(), {"id": 1, "result": 3})
        for web in (with_header, first):
            self.assertEqual(web.ask("add", [1, 2]), 3)
            self.assert_error(web.ask("echo", [1]), "unauthorized", "web may not call 'echo'")
        self.assert_error(with_cookie.ask("add", [1, 2]), "unauthorized", "app may not call 'add'")
        # Who shows another is somebody else.
        self.assertEqual(first.ask("taskd.auth", [APP]), "app")
        self.assertEqual(first.ask("echo", [1]), 1)
        self.assert_error(first.ask("add", [1, 2]), "unauthorized", "app may not")
        origin = {"Origin": gateway.origin}
        for headers, mine, others in (
            (bearer(WEB), "add", "echo"),
            ({**cookie, **origin}, "echo", "add"),
            ({**cookie, **origin, **bearer(WEB)}, "add", "echo"),
        ):
            answer = gateway.call(others, [1, 2], headers=headers)
            self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)
            self.assertNotEqual(gateway.call(mine, [1, 2], headers=headers).status, 403)
        self.wait_for_log(gateway, ": it is web", ": it is app", "web may not call 'echo'")
        self.assertNotIn(WEB, gateway.log)

    def test_no_token(self) -> None:
        """Of who has not said who it is nothing is called: 4401 by WebSocket, 401 by HTTP."""
        daemon, gateway = self.start_both("--allow=*")
        path = self.path(daemon)
        for function, args in (
            ("echo", [1]),
            ("taskd.ping", []),
            ("taskd.cancel", [1]),
            ("touch", [path]),
        ):
            web = self.open(gateway)
            web.request(function, args, id=1)
            web.request("touch", [path])
            web.request("taskd.auth", [WEB])
            messages, code = web.rest()
            self.assertEqual((len(messages), code), (1, UNAUTHORIZED), messages)
            self.assert_error(messages[0], "unauthorized", "taskd.auth")
        for function in ("echo", "taskd.ping", "touch"):
            answer = gateway.call(function, [path])
            self.assertEqual(answer.status, http.HTTPStatus.UNAUTHORIZED)
            self.assertEqual(answer.headers["www-authenticate"], "Bearer")
            self.assert_error(answer.json, "unauthorized", "token")
        self.assertEqual(gateway.get("/healthz").status, http.HTTPStatus.SERVICE_UNAVAILABLE)
        self.assertFalse(Path(path).exists())
        # What is no token at all is told so, and closed as well.
        web = self.open(gateway)
        web.request("taskd.auth", [1])
        (reply,), code = web.rest()
        self.assert_error(reply, "bad-arguments")
        self.assertEqual(code, UNAUTHORIZED)

    def test_wrong_token(self) -> None:
        """A wrong token gets 401, or 4401 as the first message, and nothing behind it is run."""
        daemon, gateway = self.start_both("--allow=*", "--tasks-token=own")
        path = self.path(daemon)
        known = self.open(gateway, headers=bearer(WEB))
        # Each guess comes from another machine, since the next from one waits longer.
        guess = self.open(gateway, source_address=("127.0.0.2", 0))
        guess.request("taskd.auth", [WRONG], id=1)
        guess.request("touch", [path])
        # Who is known does not wait for who guesses.
        self.assertEqual(known.ask("add", [1, 2]), 3)
        (reply,), code = guess.rest()
        self.assertEqual((reply["id"], code), (1, UNAUTHORIZED))
        self.assert_error(reply, "unauthorized", "nobody has this token")
        with self.assertRaises(InvalidStatus) as raised:
            gateway.open(headers=bearer(WRONG), source_address=("127.0.0.3", 0))
        self.assertEqual(raised.exception.response.status_code, http.HTTPStatus.UNAUTHORIZED)
        answer = gateway.call("touch", [path], headers=bearer(WRONG))
        self.assertEqual(answer.status, http.HTTPStatus.UNAUTHORIZED)
        self.assert_error(answer.json, "unauthorized", "nobody has this token")
        self.assertEqual(known.ask("add", [1, 2]), 3)
        self.assertFalse(Path(path).exists())
        self.wait_for_log(gateway, "a wrong token")
        self.assertNotIn(WRONG, gateway.log)
        self.assertNotIn("a wrong token", daemon.log)


class PassedOnTests(TokenTestCase):
    def test_passed_on(self) -> None:
        """A caller's token goes on to the daemon, which knows it; the gateway's own asks for all
        else."""
        daemon, gateway = self.start_both("--allow=*", "--tasks-token=own")
        web = self.open(gateway, headers=bearer(WEB))
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.wait_for_caller(daemon, "web")
        self.assertNotIn("app", daemon.status()["totals"]["callers"])
        first = self.open(gateway)
        first.request("taskd.auth", [APP])
        first.request("add", [1, 2])
        self.assertEqual([first.reply(), first.reply()], ["app", 3])
        self.wait_for_caller(daemon, "app")
        self.assertEqual(gateway.call("add", [1, 2], headers=bearer(APP)).status, 200)
        self.assertEqual(gateway.get("/healthz").json, {"status": "ok"})
        self.wait_for_caller(daemon, "gateway")
        self.wait_for_log(daemon, ": it is web", ": it is app", ": it is gateway")

    def test_the_daemons_rules_hold(self) -> None:
        """What the daemon does not allow an identity it is not, whatever the gateway allows."""
        daemon = self.start(
            "--token-file=tokens",
            "--allow=web=add",
            "--allow=ops=*",
            caller=by_token(OPS),
            secrets={"tokens": f"{TOKENS}ops:{OPS}\n"},
        )
        gateway = self.start_gateway(
            daemon, "--token-file=tokens", "--allow=*", secrets={"tokens": TOKENS}
        )
        path = self.path(daemon)
        web = self.open(gateway, headers=bearer(WEB))
        self.assertEqual(web.ask("add", [1, 2]), 3)
        self.assert_error(web.ask("touch", [path]), "unauthorized", "web may not call")
        answer = gateway.call("touch", [path], headers=bearer(WEB))
        self.assertEqual(answer.status, http.HTTPStatus.FORBIDDEN)
        self.assertFalse(Path(path).exists())

    def test_kept(self) -> None:
        """With --keep-tokens the daemon knows the gateway's own token alone."""
        daemon, gateway = self.start_both(
            "--allow=*", "--keep-tokens", "--tasks-token=own", tokens=""
        )
        for token in (WEB, APP):
            web = self.open(gateway, headers=bearer(token))
            self.assertEqual(web.ask("add", [1, 2]), 3)
            self.assertEqual(gateway.call("add", [1, 2], headers=bearer(token)).status, 200)
        self.wait_for_caller(daemon, "gateway")
        callers: dict[str, Any] = daemon.status()["totals"]["callers"]
        self.assertEqual(callers.keys(), {"gateway", "ops"})
        self.assertNotIn(WEB, daemon.log + json.dumps(daemon.status()))
        self.assertNotIn("a wrong token", daemon.log)

    def test_not_known_there(self) -> None:
        """A token that the daemon does not know is ``unauthorized`` there; nothing was run."""
        _, gateway = self.start_both("--allow=*", "--tasks-token=own", tokens=f"web:{WEB}\n")
        app = self.open(gateway, headers=bearer(APP))
        self.assert_error(app.ask("add", [1, 2]), "unauthorized")
        self.assertEqual(self.open(gateway, headers=bearer(WEB)).ask("add", [1, 2]), 3)
