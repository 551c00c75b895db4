"""Who a caller is, and what it may call."""

from __future__ import annotations

import hashlib
import hmac

from twisted.trial.unittest import SynchronousTestCase

from taskd.access import ALWAYS_ALLOWED, AUTH, Access, Grant, digest_of

WEB, OPS, OPS_NEXT = "web's token 0123", "ops' token 01234", "ops' next token 0"
TOKENS = [("web", digest_of(WEB)), ("ops", digest_of(OPS)), ("ops", digest_of(OPS_NEXT))]

OPEN = Access((), ())
"""Nobody is asked, and everything may be called."""


class WatchedDigest(str):
    """A known digest that counts how often somebody looks at it."""

    looks = 0

    def encode(self, *args: str) -> bytes:  # type: ignore[override]
        self.looks += 1
        return super().encode(*args)


def may(grant: Grant | None, name: str) -> bool:
    """Tell whether a grant allows a call."""
    assert grant is not None
    return grant.may_call is None or grant.may_call(name)


class TokenTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.access = Access(TOKENS, ())

    def test_the_digest(self) -> None:
        """What is kept of a token is its SHA-256 in hexadecimal digits."""
        self.assertEqual(digest_of("é"), hashlib.sha256("é".encode()).hexdigest())

    def test_a_token(self) -> None:
        """A token grants its identity's rights, and the grant remembers its digest."""
        grant = self.access.by_token(WEB)
        self.assertEqual(grant, Grant("web", digest_of(WEB)))

    def test_several_tokens_of_one_identity(self) -> None:
        """Each token of an identity grants the same, and remembers its own digest."""
        for token in (OPS, OPS_NEXT):
            self.assertEqual(self.access.by_token(token), Grant("ops", digest_of(token)))

    def test_what_nobody_has(self) -> None:
        """A token that nobody has grants nothing, whether it is empty, a part, or a digest."""
        for token in ("", WEB[:-1], WEB + " ", WEB.upper(), digest_of(WEB), "ß" * 2000):
            self.assertIsNone(self.access.by_token(token))

    def test_a_digest(self) -> None:
        """A digest that is known grants what its token does, and no other does."""
        self.assertEqual(self.access.by_digest(digest_of(OPS)), self.access.by_token(OPS))
        for digest in ("", OPS, digest_of("another"), digest_of(OPS)[:-1], "é"):
            self.assertIsNone(self.access.by_digest(digest))

    def test_every_digest_is_looked_at(self) -> None:
        """Whatever is shown, the digest of every token is compared with it: none ends the look."""
        for shown in (WEB, OPS, OPS_NEXT, "nobody's"):
            digests = [WatchedDigest(digest) for _, digest in TOKENS]
            access = Access([("someone", digest) for digest in digests], ())
            access.by_token(shown)
            self.assertEqual([digest.looks for digest in digests], [1, 1, 1], shown)

    def test_how_digests_are_compared(self) -> None:
        """A watched digest equals its text, so that the test above sees true comparisons."""
        watched = WatchedDigest(digest_of(WEB))
        self.assertTrue(hmac.compare_digest(watched.encode(), digest_of(WEB).encode()))
        self.assertEqual(Access([("web", watched)], ()).by_token(WEB), Grant("web", watched))

    def test_who_is_asked(self) -> None:
        """Where there are tokens one has to be shown; where there are none nobody is asked."""
        self.assertTrue(self.access.asks)
        self.assertIsNone(self.access.unasked())
        self.assertFalse(OPEN.asks)
        self.assertEqual(OPEN.unasked(), Grant(""))
        self.assertIsNone(OPEN.by_token(WEB))

    def test_a_certificate(self) -> None:
        """A certificate's identity needs no token, and is nobody's who has one by another name."""
        self.assertEqual(self.access.by_certificate("alice"), Grant("alice"))
        self.assertEqual(OPEN.by_certificate("alice"), Grant("alice"))


class RuleTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.access = Access(
            TOKENS,
            [
                ("web", ["send_mail", "image.*"]),
                ("ops", ["*"]),
                ("alice@*.example", ["report_?"]),
                ("*", ["echo"]),
            ],
        )

    def assertMay(self, identity: str, allowed: list[str], forbidden: list[str]) -> None:
        grant = self.access.by_certificate(identity)
        self.assertEqual([name for name in allowed if not may(grant, name)], [])
        self.assertEqual([name for name in forbidden if may(grant, name)], [])

    def test_no_rules(self) -> None:
        """Without rules everybody who is known may call everything."""
        for grant in (OPEN.unasked(), OPEN.by_certificate("x"), Access(TOKENS, ()).by_token(WEB)):
            assert grant is not None
            self.assertIsNone(grant.may_call)

    def test_names(self) -> None:
        """An identity may call what its rules name, and what those for everybody do."""
        self.assertMay(
            "web",
            ["send_mail", "image.scale", "image.", "echo"],
            ["send_mail2", "Send_mail", "image", "images.scale", "report_1", "", "taskd.status"],
        )

    def test_everything(self) -> None:
        """A star allows every name."""
        self.assertMay("ops", ["anything", "taskd.status", "a.b.c", ""], [])

    def test_identities_are_patterns_too(self) -> None:
        """An identity is matched as a whole, by case."""
        self.assertMay("alice@eu.example", ["report_1", "echo"], ["report_12", "send_mail"])
        self.assertMay("malice@eu.example", ["echo"], ["report_1"])
        self.assertMay("WEB", ["echo"], ["send_mail"])

    def test_an_identity_is_no_pattern(self) -> None:
        """An identity that looks like a pattern has the rules that match it, and no more."""
        self.assertMay("*", ["echo"], ["send_mail", "report_1"])
        self.assertMay("[w]eb", ["echo"], ["send_mail"])

    def test_who_has_no_rule(self) -> None:
        """Where there are rules, whoever has none may call nothing but what concerns itself."""
        access = Access((), [("web", ["echo"])])
        for grant in (access.unasked(), access.by_certificate("alice")):
            for name in ALWAYS_ALLOWED:
                self.assertTrue(may(grant, name))
            for name in ("echo", "taskd.status", "taskd.functions", "taskd.pings"):
                self.assertFalse(may(grant, name))

    def test_what_is_always_allowed(self) -> None:
        """To say who one is, to cancel and to ping is always allowed, and nothing else is."""
        self.assertEqual(ALWAYS_ALLOWED, {AUTH, "taskd.cancel", "taskd.ping"})

    def test_a_token_has_its_identitys_rules(self) -> None:
        """The same rules hold for a token and for a certificate of the same name."""
        for grant in (self.access.by_token(WEB), self.access.by_digest(digest_of(WEB))):
            self.assertTrue(may(grant, "send_mail"))
            self.assertFalse(may(grant, "report_1"))

    def test_an_answer_does_not_change(self) -> None:
        """However many names were asked for before, each answer is that of the rules."""
        grant = self.access.by_certificate("web")
        for _ in range(2):
            for number in range(5000):
                self.assertEqual(may(grant, f"image.{number}"), True)
                self.assertEqual(may(grant, f"images.{number}"), False)

    def test_what_is_remembered_is_bounded(self) -> None:
        """A caller that asks for ever new names does not fill the memory with them."""
        grant = self.access.by_certificate("web")
        assert grant.may_call is not None
        for number in range(10_000):
            grant.may_call(f"name {number}")
        kept = [cell.cell_contents for cell in grant.may_call.__closure__ or ()]  # type: ignore[attr-defined]
        (known,) = (each for each in kept if isinstance(each, dict))
        self.assertEqual(len(known), 4096)

    def test_long_names_are_not_remembered(self) -> None:
        """Of a name with more than 128 characters the answer is given anew each time."""
        grant = Access((), [("*", ["x*"])]).unasked()
        assert grant is not None
        assert grant.may_call is not None
        for name in ("x" * 128, "y" * 128, "x" * 129, "y" * 129, "x" * 10**6):
            for _ in range(2):
                self.assertEqual(grant.may_call(name), name[0] == "x")
        kept = [cell.cell_contents for cell in grant.may_call.__closure__ or ()]  # type: ignore[attr-defined]
        (known,) = (each for each in kept if isinstance(each, dict))
        self.assertEqual(set(known) - ALWAYS_ALLOWED, {"x" * 128, "y" * 128})

    def test_one_memory_for_an_identity(self) -> None:
        """All connections of an identity share what is remembered."""
        first, second = (self.access.by_token(token) for token in (OPS, OPS_NEXT))
        assert first is not None
        assert second is not None
        self.assertIs(first.may_call, second.may_call)
