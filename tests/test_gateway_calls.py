"""Calls over HTTP, and who it is that calls, with a real daemon behind it."""

from __future__ import annotations

import gc
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address
from twisted.internet.error import ConnectError, ConnectionLost
from twisted.trial.unittest import SynchronousTestCase

from tests.support import ScriptedEndpoint
from tests.test_gateway_site import (
    EVIL,
    HOME,
    OWN,
    TOKEN,
    Answer,
    Caller,
    World,
)

OTHER = "another one's token 01"


class CallsTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.meet()

    def meet(self, **keywords: Any) -> World:
        self.world = World(**keywords)
        self.figures = self.world.figures
        return self.world

    def begin(self, function: str = "later", body: bytes = b"[]", **headers: str) -> Caller:
        caller = self.world.caller()
        caller.call(function, body, **headers)
        return caller

    def call(self, function: str, body: bytes = b"[]", **headers: str) -> Answer:
        return self.begin(function, body, **headers).answer

    def assertQuiet(self) -> None:
        """Nothing is in flight."""
        self.assertEqual(self.figures.get("in_flight"), 0)
        self.assertTrue(self.world.calls.is_quiet)


class BodyTests(CallsTestCase):
    def test_arguments(self) -> None:
        """An object is keywords, an array positions, and nothing is no arguments."""
        for body, result in (
            (b'[1, "\xc3\xa9", null]', [1, "é", None]),
            (b'{"a": 1, "args": [2]}', {"a": 1, "args": [2]}),
            (b"[]", []),
            (b"{}", []),
            (b"", []),
            (b" \r\n ", []),
            (b" \n[ 1 , 2 ]\r\n", [1, 2]),
            (b'\t{"a":\n1}\n', {"a": 1}),
            (b'["}", {"x": "]"}]', ["}", {"x": "]"}]),
        ):
            found = self.call("now", body)
            self.assertEqual((found.status, found.json), (200, {"result": result}), body)
        self.assertQuiet()
        self.assertEqual(self.figures.get("http_calls"), 9)
        self.assertEqual(self.figures.get("failed"), 0)

    def test_what_is_none(self) -> None:
        """What is no object and no array is malformed, however it would look when it is wrapped."""
        for body in (
            *(b"1", b'"a"', b"null", b"true", b"[", b"]", b"{", b"}", b"[1] 2", b"[1]}", b"[1],"),
            *(b"[1], [2]", b'[1], "args": [2]', b'[1], "function": "x"', b'[1]}\n{"args": [2]'),
            *(b'1, "x": []', b'[1],"args":[1]', b"[1]]", b"NaN", b"[NaN]", b"[1e400]", b"[01]"),
            *(b'{"a": 1, "a": 2}', b'{"a": 1} {"b": 2}', b'{"a": 1}, "b": 2', b"\xff", b'["\xff"]'),
            *(
                b'["\\ud800"]',
                b"[" * 65 + b"]" * 65,
                b'{"a":' * 65 + b"1" + b"}" * 65,
                b"\xef\xbb\xbf[]",
            ),
            *(b"a=1&b=2", b"-", b'[1] "', b"/**/[]", b"[1]//", b"'a'"),
        ):
            found = self.call("now", body)
            self.assertEqual(found.gist, (400, "malformed"), body)
        self.assertEqual(self.world.tasks.asked, [])
        self.assertQuiet()

    @settings(max_examples=80, deadline=None)
    @given(st.text('[]{}",:12 \\nargs', max_size=20).map(str.encode))
    def test_whatever_is_sent(self, body: bytes) -> None:
        """What is called has the arguments that the body alone says, or is not called."""
        world = World()
        caller = world.caller()
        caller.call("now", body)
        try:
            value = json.loads(body or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, (list, dict)) and body.strip():
            self.assertEqual(caller.answer.status, 400)
            self.assertEqual(world.tasks.asked, [])
        elif caller.answer.status == 200:
            self.assertEqual(world.tasks.asked, [value or []])

    def test_the_path(self) -> None:
        """The path names the function, whatever is in it; one that is unknown is told so."""
        for path, status in (
            ("now", 200),
            ("n%6Fw", 200),
            ("nowhere", 404),
            ("a/b", 404),
            ("now/", 404),
            ("%C3%A9", 404),
            ("%FF", 404),
            ("..%2Fnow", 404),
            ("", 400),
        ):
            self.assertEqual(self.call(path).status, status, path)
        caller = self.world.caller()
        caller.ask("POST", "/call", b"[]")
        self.assertEqual(caller.answer.gist, (400, "malformed"))

    def test_what_concerns_a_connection(self) -> None:
        """What concerns a WebSocket alone is unknown here: it would concern other callers'."""
        for name in ("taskd.auth", "taskd.cancel"):
            found = self.call(name, b'{"token": "x"}')
            self.assertEqual(found.gist, (404, "unknown-function"))
        self.assertEqual(self.world.shown, [None])  # the dashboard's alone
        self.assertQuiet()

    def test_failures(self) -> None:
        """A call that fails is answered with its error."""
        found = self.call("fails")
        self.assertEqual(found.gist, (500, "task-failed"))
        self.assertEqual(found.error["type"], "ValueError")
        self.assertEqual(self.call("later", b"[1, 2, 3]").gist, (422, "bad-arguments"))
        self.assertEqual(self.figures.get("failed"), 2)
        self.assertQuiet()
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)  # the daemon's


class QueryTests(CallsTestCase):
    def test_a_time(self) -> None:
        """A call may have a time of its own."""
        caller = self.begin("later?timeout=2.5", b'["a"]')
        self.world.settle(2.4)
        self.assertEqual(caller.answers, [])
        self.world.settle(0.2)
        self.assertEqual(caller.answer.gist, (504, "time-limit"))
        self.assertQuiet()

    def test_what_cannot_be(self) -> None:
        """A query of anything else, or of anything twice, is refused, and nothing called."""
        for query in (
            *("timeout=", "timeout=x", "timeout=0", "timeout=-1", "timeout=nan", "timeout=inf"),
            *("timeout=1e9", "timeout=1&timeout=1", "timeout=%FF", "timeout=1%002", "a=1"),
            *("cancel_on_disconnect=1", "cancel_on_disconnect=True", "cancel_on_disconnect="),
            *("cancel_on_disconnect=true&cancel_on_disconnect=true", "priority=5", "token=x"),
            *("Timeout=1", "timeout=1&x=2", "%74imeouts=1"),
        ):
            found = self.call(f"now?{query}")
            self.assertEqual(found.gist, (400, "malformed"), query)
        self.assertEqual(self.world.tasks.asked, [])

    def test_what_can(self) -> None:
        """These can be."""
        for query in (
            *("timeout=1", "timeout=0.001", "timeout=1e3", "cancel_on_disconnect=true", ""),
            *("timeout=5&cancel_on_disconnect=false",),
        ):
            self.assertEqual(self.call(f"now?{query}").status, 200, query)


class RefusalTests(CallsTestCase):
    def test_methods(self) -> None:
        """A call is a POST and nothing else."""
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X"):
            caller = self.world.caller()
            caller.ask(method, "/call/now", b"[]" if method == "PUT" else None, origin=OWN)
            self.assertEqual(caller.answer.status, 405, method)
            self.assertEqual(caller.answer.headers["allow"], "POST")
        self.assertEqual(self.figures.get("http_calls"), 0)

    def test_what_a_form_can_send(self) -> None:
        """A body of another type is refused: forms and plain fetches of any page send those."""
        for kind in (
            *("text/plain", "application/x-www-form-urlencoded", ""),
            *("application/jsonp", "text/json", "json", "application/json, text/plain", "a"),
            "text/plain; application/json",
        ):
            self.assertEqual(
                self.call("now", b"[]", content_type=kind).gist, (415, "malformed"), kind
            )
        for kind in ("Application/JSON", "application/json; charset=utf-8", "application/json ;x"):
            self.assertEqual(self.call("now", b"[]", content_type=kind).status, 200, kind)
        self.assertEqual(self.figures.get("http_calls"), 3)
        caller = self.begin("now", b"[]", content_type="multipart/form-data; boundary=x")
        self.assertIn(b" 400 ", caller.transport.value())  # twisted.web's own
        self.assertEqual(len(self.world.tasks.asked), 3)

    def test_origins(self) -> None:
        """A page calls if it is of here; programs, which name no origin, as well."""
        self.meet(origins=("https://app.example",))
        for origin, status in (
            *((OWN, 200), ("", 200), ("https://app.example", 200), (EVIL, 403), ("null", 403)),
            *(("http://127.0.0.1:8081", 403), ("http://app.example", 403)),
        ):
            found = self.call("now", origin=origin)
            self.assertEqual(found.status, status, origin)
            if status == 403:
                self.assertEqual(found.error["code"], "unauthorized")
        self.assertEqual(self.figures.get("refused_origin"), 4)
        self.assertEqual(len(self.world.tasks.asked), 3)

    def test_two_origins(self) -> None:
        """Who names two origins has none of them."""
        caller = self.world.caller()
        caller.say(
            b"POST /call/now HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Length: 2\r\n"
            b"Content-Type: application/json\r\nOrigin: http://127.0.0.1:8080\r\n"
            b"Origin: http://127.0.0.1:8080\r\n\r\n[]"
        )
        self.assertEqual(caller.answer.gist, (403, "unauthorized"))
        self.assertEqual(self.world.tasks.asked, [])

    def test_room(self) -> None:
        """So many calls one caller may have in flight; the next is told to come again."""
        callers = [self.begin(body=b'["%d"]' % n) for n in range(2)]
        self.assertEqual(self.figures.get("in_flight"), 2)  # its share of three
        found = self.call("now")
        self.assertEqual(found.gist, (503, "overloaded"))
        self.assertEqual(found.headers["retry-after"], "1")
        self.assertEqual(self.figures.get("refused_room"), 1)
        self.world.finish("1")
        self.assertEqual(callers[1].answer.json, {"result": "done"})
        self.assertEqual(self.call("now").status, 200)

    def test_a_stop(self) -> None:
        """At a stop nothing more is taken, and it is told when what was taken is over."""
        caller = self.begin(body=b'["a"]')
        told: list[bool] = []
        self.world.calls.on_quiet = lambda: told.append(self.world.calls.is_quiet)
        self.world.calls.close()
        self.assertEqual(self.call("now").gist, (503, "shutting-down"))
        self.assertEqual((told, self.world.calls.is_quiet), ([], False))
        self.world.finish("a")
        self.assertEqual(caller.answer.json, {"result": "done"})
        self.assertEqual(told, [True])


class LeavingTests(CallsTestCase):
    """Callers that go away while their calls run."""

    def setUp(self) -> None:
        super().setUp()
        self.told: list[bool] = []
        self.world.calls.on_quiet = lambda: self.told.append(self.world.calls.is_quiet)

    def test_the_task_goes_on(self) -> None:
        """A task whose caller has gone goes on, and its result is dropped."""
        for query in ("", "?cancel_on_disconnect=false"):
            caller = self.begin(f"later{query}", b'["a"]')
            caller.go(ConnectionLost())
            self.assertEqual(self.world.tasks.cancelled, [])
            self.assertEqual(self.figures.get("in_flight"), 0)
            self.assertEqual(self.figures.get("outstanding"), 1)
            self.world.finish("a")
            self.assertEqual(self.figures.get("outstanding"), 0)
            self.assertEqual(caller.transport.value(), b"")
            self.assertQuiet()
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_the_task_ends(self) -> None:
        """A task that is to end with its caller does, and nothing is logged of that."""
        caller = self.begin("later?cancel_on_disconnect=true", b'["a"]')
        self.assertEqual(self.world.tasks.cancelled, [])
        caller.go()
        self.assertEqual(self.world.tasks.cancelled, ["a"])
        self.assertQuiet()
        self.assertEqual(self.told, [True])
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_a_task_that_fails(self) -> None:
        """A task that fails when its caller has gone is no failure of the gateway's."""
        caller = self.begin(body=b'["a"]')
        caller.go()
        self.world.tasks.held.pop("a").errback(ValueError("it broke"))
        self.world.settle()
        self.assertQuiet()
        self.assertEqual(self.told, [True])
        self.assertEqual(self.flushLoggedErrors(ValueError)[1:], [])

    def test_no_daemon(self) -> None:
        """A call that comes to no daemon and whose caller has gone is over as well."""
        self.world.endpoint = ScriptedEndpoint()
        caller = self.begin("later", b'["a"]')
        caller.go()
        for _ in range(40):
            for number in self.world.endpoint.open_attempts:
                self.world.endpoint.refuse(ConnectError(string="no"), number)
            self.world.settle(0.25)
        self.assertQuiet()
        self.assertEqual(self.told, [True])
        gc.collect()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_before_it_is_known(self) -> None:
        """Who goes before it is known whose token that is has nothing run."""
        self.meet(tokens={"web": TOKEN})
        self.call("now", authorization="Bearer wrong")  # which is answered half a second later
        caller = self.begin(
            "later?cancel_on_disconnect=true", b'["a"]', authorization=f"Bearer {TOKEN}"
        )
        caller.go()
        self.world.settle(10)
        self.assertEqual(self.world.tasks.asked, [])
        self.assertQuiet()

    def call(self, function: str, body: bytes = b"[]", **headers: str) -> Any:
        caller = self.begin(function, body, **headers)
        self.world.settle(1)
        return caller.answer

    def test_tenants(self) -> None:
        """Whatever becomes of calls, and of their callers, nobody stays with the backend."""
        self.meet(tokens={"web": TOKEN})
        bearer = f"Bearer {TOKEN}"
        for function in ("now", "fails", "nowhere"):
            self.call(function, authorization=bearer)
        gone = self.begin("later", b'["a"]', authorization=bearer)
        gone.go()
        cancelled = self.begin("later?cancel_on_disconnect=true", b'["b"]', authorization=bearer)
        cancelled.go()
        tenant = self.world.backend.tenant(TOKEN)
        self.assertEqual(tenant.visitors, 2)
        self.world.finish("a")
        self.assertEqual(tenant.visitors, 1)
        tenant.leave()
        self.assertEqual(self.world.shown, [None, TOKEN])
        self.assertEqual(len(self.flushLoggedErrors(ValueError)), 1)  # the daemon's


class IdentityTests(CallsTestCase):
    def setUp(self) -> None:
        self.meet(
            tokens={"web": TOKEN, "ops": OTHER},
            allow=(("web", ("now",)), ("ops", ("*",))),
            cookie="session",
        )

    def test_no_token(self) -> None:
        """Who shows no token is asked for one."""
        found = self.call("now")
        self.assertEqual(found.gist, (401, "unauthorized"))
        self.assertEqual(found.headers["www-authenticate"], "Bearer")
        self.assertEqual(self.world.tasks.asked, [])
        self.assertQuiet()

    def test_the_right_token(self) -> None:
        """Who shows a token has its call made over connections of its own."""
        for scheme in ("Bearer", "bearer"):
            found = self.call("now", authorization=f"{scheme} {TOKEN}")
            self.assertEqual(found.json, {"result": []})
        self.assertEqual(self.world.shown, [None, TOKEN])

    def test_what_it_may(self) -> None:
        """A token opens what its identity may call, and is told who that is."""
        found = self.call("later", authorization=f"Bearer {TOKEN}")
        self.assertEqual(found.gist, (403, "unauthorized"))
        self.assertIn("web may not call 'later'", found.error["message"])
        self.assertEqual(self.figures.get("refused_identity"), 1)
        self.assertEqual(self.call("now", authorization=f"Bearer {OTHER}").status, 200)
        self.assertQuiet()

    def test_a_wrong_token(self) -> None:
        """A wrong token is answered late, and later each time; the right one from there too."""
        waits = []
        for token, status in (("wrong", 401), ("wrong", 401), (TOKEN, 200)):
            caller = self.begin("now", authorization=f"Bearer {token}")
            began = self.world.loop.seconds()
            while not caller.answers:
                self.assertLess(self.world.loop.seconds() - began, 10)
                self.world.settle(0.5)
            self.assertEqual(caller.answer.status, status)
            self.assertNotIn(b"wrong'", caller.answer.body)
            waits.append(self.world.loop.seconds() - began)
        self.assertEqual(waits, [0.5, 1.5, 1.0])
        elsewhere = Caller(self.world, IPv4Address("TCP", "192.0.2.77", 1))
        elsewhere.call("now", authorization=f"Bearer {TOKEN}")
        self.assertEqual(elsewhere.answer.status, 200)

    def test_a_cookie(self) -> None:
        """A cookie counts only where the request names an origin, which must be one that may."""
        for origin, status in ((OWN, 200), ("", 401), (EVIL, 403), ("null", 403)):
            found = self.call("now", cookie=f"a=b; session={TOKEN}", origin=origin)
            self.assertEqual(found.status, status, origin)

    def test_another_cookie(self) -> None:
        """A cookie of another name is no token, and a token before it goes first."""
        self.assertEqual(self.call("now", cookie=f"other={TOKEN}", origin=OWN).status, 401)
        found = self.call(
            "later", cookie=f"session={OTHER}", origin=OWN, authorization=f"Bearer {TOKEN}"
        )
        self.assertEqual(found.status, 403)

    def test_no_cookie_by_default(self) -> None:
        """Where the operator has named no cookie none counts."""
        self.meet(tokens={"web": TOKEN})
        self.assertEqual(self.call("now", cookie=f"session={TOKEN}", origin=OWN).status, 401)

    def test_tokens_that_stay_here(self) -> None:
        """Where tokens are not passed on, the daemon is shown the gateway's own, here none."""
        self.meet(tokens={"web": TOKEN}, keep_tokens=True)
        self.assertEqual(self.call("now", authorization=f"Bearer {TOKEN}").status, 200)
        self.assertEqual(self.world.shown, [None, None])

    def test_nobody_is_asked(self) -> None:
        """Where nobody is asked, who shows no token may call what everybody may."""
        self.meet(allow=(("*", ("now",)),))
        self.assertEqual(self.call("now").status, 200)
        found = self.call("later", b'["a"]')
        self.assertEqual(found.gist, (403, "unauthorized"))
        self.assertIn("who shows no token may not call", found.error["message"])

    def test_a_long_name(self) -> None:
        """Of a name that may not be called an end is told, in ASCII."""
        found = self.call("%C3%A9" * 2000, authorization=f"Bearer {TOKEN}")
        self.assertEqual(found.status, 403)
        self.assertLess(len(found.body), 400)
        self.assertTrue(found.error["message"].isascii())

    def test_opening_a_websocket(self) -> None:
        """Who shows a wrong token opens no WebSocket; who shows none may say it later."""
        handshake = {
            "upgrade": "websocket",
            "connection": "Upgrade",
            "origin": OWN,
            "sec_websocket_key": "x3JJHMbDL1EzLkh9GBhXDw==",
            "sec_websocket_version": "13",
        }
        for more, status in (
            ({"authorization": "Bearer wrong"}, b"401"),
            ({"cookie": "session=wrong"}, b"401"),
            ({}, b"101"),
            ({"cookie": f"session={TOKEN}"}, b"101"),
            ({"authorization": f"Bearer {TOKEN}"}, b"101"),
        ):
            caller = Caller(self.world, HOME)
            caller.ask("GET", "/ws", **handshake, **more)
            self.world.settle(5)  # until it is looked at
            self.world.settle(5)  # until it is told
            self.assertTrue(
                caller.transport.value().startswith(b"HTTP/1.1 " + status),
                caller.transport.value(),
            )
