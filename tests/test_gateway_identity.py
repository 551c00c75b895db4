"""Who a request is from: headers and cookies, as browsers, programs and others send them."""

from __future__ import annotations

from base64 import b64encode

from twisted.trial.unittest import SynchronousTestCase
from twisted.web.test.requesthelper import DummyRequest

from taskd.access import digest_of
from taskd.gateway.identity import DASHBOARD_COOKIE, Watchers, header_of, token_of

TOKEN = "a watcher's token 0123"
OTHER = "another one's token 01"
OWN = "http://127.0.0.1:8080"


def request(cookies: dict[str, str] | None = None, **headers: str | list[str]) -> DummyRequest:
    made = DummyRequest([b""])
    for name, values in headers.items():
        each = [values] if isinstance(values, str) else values
        made.requestHeaders.setRawHeaders(name, each)
    raw = {name.encode(): value.encode("latin-1") for name, value in (cookies or {}).items()}
    made.getCookie = raw.get  # type: ignore[method-assign]
    return made


def basic(text: str) -> str:
    return "Basic " + b64encode(text.encode()).decode()


class HeaderTests(SynchronousTestCase):
    def test_one(self) -> None:
        """A header's name has no case, and its value is its text."""
        self.assertEqual(header_of(request(Origin=OWN), "origin"), OWN)
        self.assertEqual(header_of(request(host=""), "host"), "")
        self.assertIsNone(header_of(request(), "host"))

    def test_two(self) -> None:
        """What stands there twice is neither of the two."""
        self.assertEqual(header_of(request(host=["a", "a"]), "host"), "a, a")

    def test_no_text(self) -> None:
        """What is no UTF-8 is read as something, which is none of what is known."""
        made = request()
        made.requestHeaders.setRawHeaders(b"origin", [b"http://\xff"])
        self.assertEqual(header_of(made, "origin"), "http://\ufffd")


class TokenTests(SynchronousTestCase):
    def test_bearer(self) -> None:
        """A program's token stands in its header, whatever the case of the scheme."""
        for text in (f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN} "):
            self.assertEqual(token_of(request(authorization=text), ""), TOKEN)

    def test_other_schemes(self) -> None:
        """What is in other schemes, or in none, is no caller's token."""
        for text in (basic(f"u:{TOKEN}"), TOKEN, "", f"Token {TOKEN}", f"Bearer:{TOKEN}", "Bearer"):
            self.assertEqual(token_of(request(authorization=text), "session"), "", text)

    def test_a_cookie(self) -> None:
        """A cookie counts where the request names its page's origin, and where there is one."""
        for cookies, headers, name, token in (
            ({"session": TOKEN}, {"origin": OWN}, "session", TOKEN),
            ({"session": TOKEN}, {}, "session", ""),
            ({"session": TOKEN}, {"origin": OWN}, "", ""),
            ({"session": TOKEN}, {"origin": OWN}, "other", ""),
            ({}, {"origin": OWN}, "session", ""),
        ):
            self.assertEqual(token_of(request(cookies, **headers), name), token)

    def test_both(self) -> None:
        """What a program says itself goes before a cookie, also if it is nothing."""
        made = request({"session": OTHER}, authorization=f"Bearer {TOKEN}", origin=OWN)
        self.assertEqual(token_of(made, "session"), TOKEN)
        made = request({"session": OTHER}, authorization="Bearer ", origin=OWN)
        self.assertEqual(token_of(made, "session"), "")

    def test_a_cookie_of_bytes(self) -> None:
        """Whatever bytes a cookie has, it is read as text."""
        self.assertEqual(token_of(request({"s": "\xff\xe9"}, origin=OWN), "s"), "\xff\xe9")


class WatcherTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.watchers = Watchers([("ops", digest_of(TOKEN)), ("web", digest_of(OTHER))])

    def cookie(self, token: str = TOKEN) -> str:
        cookie = self.watchers.cookie_for(token)
        assert cookie is not None
        return cookie

    def test_who_is_asked(self) -> None:
        """A token is asked for where there are some."""
        self.assertTrue(self.watchers.asks)
        self.assertFalse(Watchers([]).asks)

    def test_bearer_and_basic(self) -> None:
        """Prometheus shows a token as Bearer, a browser as the password of whatever user."""
        for text in (
            *(f"Bearer {TOKEN}", f"bearer  {TOKEN} ", basic(f"me:{TOKEN}"), basic(f":{TOKEN}")),
            basic(f"é:{TOKEN}").replace("Basic", "bAsIc "),
        ):
            self.assertEqual(self.watchers.token_of(request(authorization=text)), TOKEN, text)

    def test_a_colon_in_a_token(self) -> None:
        """A password ends where the header does; a user has no colon."""
        self.assertEqual(self.watchers.token_of(request(authorization=basic("me:a:b"))), "a:b")

    def test_what_shows_none(self) -> None:
        """What cannot be read shows no token."""
        for text in (
            *("", "Basic", "Basic ", "Basic !!!!", "Basic YQ", "Basic é", "Digest x", TOKEN),
            *(basic(TOKEN), "Basic " + b64encode(b"me:\xff\xfe").decode(), f"Basic me:{TOKEN}"),
        ):
            self.assertEqual(self.watchers.token_of(request(authorization=text)), "", text)

    def test_cookies(self) -> None:
        """There is a cookie for each token, which is not told from it, and none for others."""
        cookie, other = self.cookie(), self.cookie(OTHER)
        self.assertNotEqual(cookie, other)
        self.assertEqual(self.cookie(), cookie)
        self.assertEqual((len(cookie), len(other)), (64, 64))
        self.assertNotIn(digest_of(TOKEN), (cookie, other))
        for token in ("", "wrong", TOKEN + " ", cookie, digest_of(TOKEN), "é"):
            self.assertIsNone(self.watchers.cookie_for(token), token)

    def test_who_comes_with_one(self) -> None:
        """A token's cookie opens the page, and nothing else does."""
        for token in (TOKEN, OTHER):
            made = request({DASHBOARD_COOKIE: self.cookie(token)})
            self.assertTrue(self.watchers.knows_cookie(made))
        for value in (TOKEN, digest_of(TOKEN), "", "0" * 64, self.cookie().upper(), "\xff"):
            made = request({DASHBOARD_COOKIE: value})
            self.assertFalse(self.watchers.knows_cookie(made), value)
        self.assertFalse(self.watchers.knows_cookie(request()))
        self.assertFalse(self.watchers.knows_cookie(request({"other": self.cookie()})))

    def test_a_token_that_has_gone(self) -> None:
        """A cookie ends with its token."""
        made = request({DASHBOARD_COOKIE: self.cookie()})
        for tokens in ([("web", digest_of(OTHER))], []):
            self.assertFalse(Watchers(tokens).knows_cookie(made))
