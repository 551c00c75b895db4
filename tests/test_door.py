"""Who is let in at one worker, and what the log says of it."""

from __future__ import annotations

import json
from typing import Any

from OpenSSL import SSL
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from taskd.access import Access, Grant, digest_of
from taskd.door import Door, Visitor
from taskd.slots import CALLERS_BYTES
from tests.support import Loop, log_of, new_slot

TOKEN = "web's token 0123"
WEB = Grant("web", digest_of(TOKEN))
HOME = IPv4Address("TCP", "192.0.2.1", 50001)


class DoorTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.slot = new_slot()
        self.log = log_of(self, "door")
        self.door = self.new_door(Access([("web", digest_of(TOKEN))], ()))

    def new_door(self, access: Access) -> Door:
        return Door(access, self.slot, self.loop.seconds)

    def visitor(self, address: Any = HOME) -> Visitor:
        return Visitor(self.door, address)


class CallersTests(DoorTestCase):
    """Whose connections these are, on the scoreboard."""

    def come(self, *identities: str) -> list[Visitor]:
        visitors = [self.visitor() for _ in identities]
        for visitor, identity in zip(visitors, identities, strict=True):
            visitor.is_let_in(Grant(identity))
        return visitors

    def test_nobody(self) -> None:
        """As long as nobody is known nothing is shown."""
        self.assertEqual(self.slot.callers, {})
        (stranger,) = self.come("")
        self.assertEqual(self.slot.callers, {})
        stranger.left()
        self.assertEqual(self.slot.callers, {})

    def test_coming_and_going(self) -> None:
        """Each identity is shown with its number of connections, as long as it has some."""
        web, ops, _ = self.come("web", "ops", "web")
        self.assertEqual(self.slot.callers, {"web": 2, "ops": 1})
        web.left()
        ops.left()
        self.assertEqual(self.slot.callers, {"web": 1})
        web.left()
        self.assertEqual(self.slot.callers, {"web": 1})

    def test_another_identity(self) -> None:
        """Who says to be somebody else is that one's from then on, and no longer the former's."""
        (visitor,) = self.come("web")
        visitor.is_let_in(Grant("ops"))
        self.assertEqual(self.slot.callers, {"ops": 1})
        visitor.is_let_in(None)
        self.assertEqual(self.slot.callers, {})

    def test_long_names(self) -> None:
        """Of a name the first 64 characters are shown, those that are alike there together."""
        self.come("x" * 64 + "a", "x" * 64 + "b", "y")
        self.assertEqual(self.slot.callers, {"x" * 64: 2, "y": 1})

    def test_more_than_there_is_room_for(self) -> None:
        """Where there is no room for all those with most connections are shown, and the rest."""
        names = [f"{number:064}" for number in range(10)]
        self.come(*(name for number, name in enumerate(names) for _ in range(number + 1)))
        shown = self.slot.callers
        self.assertEqual(sum(shown.values()), 55)
        self.assertEqual(list(shown)[:3], names[:-4:-1])
        self.assertEqual(list(shown)[3:], ["…"])

    def test_a_short_name_behind_long_ones(self) -> None:
        """A name that fits is shown, though one with more connections did not fit."""
        self.come(*[f"{number:064}" for number in range(10) for _ in range(2)], "web")
        self.assertEqual(self.slot.callers["web"], 1)

    def test_names_of_all_kinds(self) -> None:
        """However names are written, and however many, what is shown fits and counts all."""
        for letter in ("é", "\U0001f600", '"', "\\"):
            self.slot = new_slot()
            self.door = self.new_door(Access((), ()))
            self.come(*[letter * length for length in range(1, 65)])
            shown = self.slot.callers
            self.assertEqual(sum(shown.values()), 64, letter)
            self.assertLessEqual(len(json.dumps(shown)), CALLERS_BYTES)


class TokenTests(DoorTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.answers: list[Grant | None] = []

    def identify(self, token: str, address: Any = HOME) -> None:
        self.visitor(address).identify(token, self.loop.callLater, self.answers.append)

    def waits(self, token: str, address: Any = HOME) -> float:
        """Tell how many seconds the answer to a token takes, which must be the right one."""
        self.answers.clear()
        began = self.loop.seconds()
        self.identify(token, address)
        while not self.answers:
            self.assertLess(self.loop.seconds() - began, 10)
            self.loop.advance(0.25)
        self.assertEqual(self.answers, [WEB if token == TOKEN else None])
        return self.loop.seconds() - began

    def test_the_right_one(self) -> None:
        """The right token is answered at once, and nothing is left behind."""
        self.assertEqual(self.waits(TOKEN), 0)
        self.assertEqual(self.loop.getDelayedCalls(), [])

    def test_a_wrong_one(self) -> None:
        """A wrong token is answered half a second later."""
        self.identify("wrong")
        self.loop.advance(0.49)
        self.assertEqual(self.answers, [])
        self.loop.advance(0.01)
        self.assertEqual(self.answers, [None])

    def test_wrong_ones(self) -> None:
        """Each wrong token is looked at later than the last, and answered later still."""
        waits = [self.waits("wrong") for _ in range(6)]
        self.assertEqual(waits, [0.5, 0.5 + 1, 1 + 2, 2 + 4, 4 + 4, 4 + 4])

    def test_the_right_one_after_wrong_ones(self) -> None:
        """The right one is looked at later where wrong ones came from, and answered then."""
        self.waits("wrong")
        self.assertEqual(self.waits(TOKEN), 0.5)
        for _ in range(6):
            self.waits("wrong")
        self.assertEqual(self.waits(TOKEN), 4.0)

    def test_it_is_not_looked_at_before(self) -> None:
        """As long as a token is not looked at it is no guess, and a wrong one is at its look."""
        self.waits("wrong")
        self.identify("wrong as well")
        self.loop.advance(0.49)
        self.assertEqual(self.door.penalty("192.0.2.1"), 0.5)
        self.loop.advance(0.01)
        self.assertEqual(self.door.penalty("192.0.2.1"), 1.0)

    def test_forgiven(self) -> None:
        """A minute after the last wrong one the next is looked at at once."""
        self.waits("wrong")
        self.loop.advance(60)
        self.assertEqual(self.waits(TOKEN), 0)

    def test_from_elsewhere(self) -> None:
        """Nobody waits for what others have guessed at other addresses."""
        self.waits("wrong")
        for host in ("192.0.2.2", "192.0.2.11"):
            self.assertEqual(self.waits(TOKEN, IPv4Address("TCP", host, 50001)), 0)

    def test_another_port(self) -> None:
        """A new connection from the same machine is no new beginning."""
        self.waits("wrong")
        self.assertEqual(self.waits(TOKEN, IPv4Address("TCP", "192.0.2.1", 50002)), 0.5)

    def test_ipv6(self) -> None:
        """Of IPv6 addresses the first 64 bits count, however they are written."""
        for one, same, other in (
            ("2001:db8:1:2::a", "2001:db8:1:2:3:4:5:6", "2001:db8:1:3::a"),
            ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"),
            ("2001:db8:0:5::1", "2001:db8:0:5:6::", "2001:db8:5::1"),
            ("fe80::1%1", "fe80::2%1", "fe80:0:0:1::1"),
            ("::1", "::2", "2001::1"),
        ):
            self.door = self.new_door(Access([("web", digest_of(TOKEN))], ()))
            self.waits("wrong", IPv6Address("TCP", one, 1))
            self.assertEqual(self.waits(TOKEN, IPv6Address("TCP", same, 1)), 0.5, same)
            self.assertEqual(self.waits(TOKEN, IPv6Address("TCP", other, 1)), 0, other)

    def test_ipv4_by_way_of_ipv6(self) -> None:
        """An IPv4 address counts as a whole where it comes over an IPv6 socket."""
        self.waits("wrong", IPv6Address("TCP", "::ffff:192.0.2.1", 1))
        self.assertEqual(self.waits(TOKEN, IPv6Address("TCP", "::ffff:192.0.2.2", 1)), 0)
        self.assertEqual(self.waits(TOKEN, IPv6Address("TCP", "::ffff:192.0.2.1", 2)), 0.5)
        self.assertEqual(self.waits(TOKEN, HOME), 0.5)

    def test_unix_sockets(self) -> None:
        """Callers over Unix sockets are one and the same."""
        self.waits("wrong", UNIXAddress(b""))
        self.assertEqual(self.waits(TOKEN, UNIXAddress(b"/tmp/a-name")), 0.5)
        self.assertEqual(self.waits(TOKEN, None), 0.5)
        self.assertEqual(self.waits(TOKEN, HOME), 0)

    def test_a_digest(self) -> None:
        """What another worker has let in needs no token, and a digest nobody has is no guess."""
        self.assertEqual(self.door.by_digest(digest_of(TOKEN)), WEB)
        self.assertIsNone(self.door.by_digest(digest_of("wrong")))
        self.assertEqual(self.waits(TOKEN), 0)

    def test_who_is_asked(self) -> None:
        """A token is asked for where there are some, and nothing is granted without one."""
        self.assertEqual((self.door.asks, self.door.unasked), (True, None))
        self.door = self.new_door(Access((), ()))
        self.assertEqual((self.door.asks, self.door.unasked), (False, Grant("")))


class ReviseTests(DoorTestCase):
    """Other rules than those by which somebody was let in."""

    OTHER = "web's next token 0"

    def assert_still_grants(self, grant: Grant, expected: tuple[bool, bool]) -> None:
        """A grant stands, or not, if the certificates' authority is the same, and if not."""
        found = tuple(self.door.still_grants(grant, is_other_ca) for is_other_ca in (False, True))
        self.assertEqual(found, expected, grant)

    def test_tokens(self) -> None:
        """A token that is no longer known grants nothing more; one that stays, or is new, does."""
        rules = Access([("web", digest_of(TOKEN)), ("ops", digest_of(self.OTHER))], ())
        self.door.revise(rules)
        self.assert_still_grants(WEB, (True, True))
        self.door.revise(Access([("ops", digest_of(self.OTHER))], ()))
        self.assert_still_grants(WEB, (False, False))
        self.assertIsNone(self.door.by_token("192.0.2.1", TOKEN))
        self.assertEqual(
            self.door.by_token("192.0.2.1", self.OTHER), Grant("ops", digest_of(self.OTHER))
        )

    def test_a_token_of_somebody_else(self) -> None:
        """A token that stands for another identity now does not go on to stand for the former."""
        self.door.revise(Access([("ops", digest_of(TOKEN))], ()))
        self.assert_still_grants(WEB, (False, False))

    def test_a_certificate(self) -> None:
        """What a certificate grants depends on the authority alone, and on no token."""
        for tokens in ([("web", digest_of(TOKEN))], []):
            self.door.revise(Access(tokens, ()))
            self.assert_still_grants(Grant("web"), (True, False))

    def test_who_has_shown_nothing(self) -> None:
        """Who has shown nothing may stay as long as nobody is asked."""
        self.assert_still_grants(Grant(""), (False, False))
        self.door.revise(Access((), ()))
        self.assert_still_grants(Grant(""), (True, True))

    def test_who_is_asked(self) -> None:
        """Whether somebody is asked is up to the rules of now, and so is what a certificate may."""
        self.door.revise(Access((), [("web", ["add"])]))
        self.assertFalse(self.door.asks)
        for grant in (self.door.unasked, self.door.by_certificate("web")):
            assert grant is not None
            assert grant.may_call is not None
            self.assertEqual(grant.may_call("add"), grant.identity == "web")

    def test_a_token_in_question(self) -> None:
        """A token that waits to be looked at is judged by the rules of the time of the look."""
        answers: list[Grant | None] = []
        self.visitor().identify("wrong", self.loop.callLater, answers.append)
        self.loop.advance(0.5)
        for token in (TOKEN, self.OTHER):
            self.visitor().identify(token, self.loop.callLater, answers.append)
        self.door.revise(Access([("web", digest_of(self.OTHER))], ()))
        self.loop.pump([0.5] * 10)
        self.assertCountEqual(answers, [None, None, Grant("web", digest_of(self.OTHER))])


class LogTests(DoorTestCase):
    def test_who_was_let_in(self) -> None:
        """It is told who came from where, once a minute for an identity."""
        for port in (1, 2, 3):
            self.visitor(IPv4Address("TCP", "192.0.2.1", port)).is_let_in(WEB)
        self.visitor().is_let_in(Grant("ops"))
        self.assertEqual(
            self.log,
            ["info: 192.0.2.1 port 1: it is web", "info: 192.0.2.1 port 50001: it is ops"],
        )
        self.log.clear()
        self.loop.advance(60)
        self.visitor(IPv6Address("TCP", "2001:db8::1", 7)).is_let_in(WEB)
        told = "info: 2001:db8::1 port 7: it is web (2 more were not logged)"
        self.assertEqual(self.log, [told])

    def test_who_is_not_asked(self) -> None:
        """Nothing is told of who shows nothing."""
        self.visitor().is_let_in(Grant(""))
        self.visitor().is_let_in(None)
        self.assertEqual(self.log, [])

    def test_wrong_tokens(self) -> None:
        """A wrong token is told once a minute for an address, and never itself."""
        for address in (HOME, HOME, UNIXAddress(b"")):
            self.visitor(address).identify("a guess", self.loop.callLater, lambda grant: None)
            self.loop.advance(5)
        self.assertEqual(
            self.log,
            [
                "warn: 192.0.2.1 port 50001: a wrong token",
                "warn: a Unix socket: a wrong token",
            ],
        )

    def test_a_braced_name(self) -> None:
        """What a caller chose is not taken for a part of what is said."""
        self.visitor().turned_down("{log_format} {0}", Grant("{x}"))
        told = "warn: 192.0.2.1 port 50001: {x} may not call '{log_format} {0}'"
        self.assertEqual(self.log, [told])

    def test_calls_that_are_not_allowed(self) -> None:
        """A call that is not allowed is told once a minute for an identity, whatever its name."""
        visitor = self.visitor()
        for number in range(50):
            visitor.turned_down(f"name {number}", WEB)
        visitor.turned_down("a\x1b[2Jé" + "x" * 500, Grant("ops"))
        visitor.turned_down("echo", Grant(""))
        first, second, third = self.log
        self.assertTrue(first.endswith("web may not call 'name 0'"), first)
        self.assertIn(r"ops may not call 'a\x1b[2J\xe9xxx", second)
        self.assertLess(len(second), 130)
        self.assertTrue(third.endswith("who shows nothing may not call 'echo'"), third)
        self.loop.advance(60)
        visitor.turned_down("name 50", WEB)
        self.assertTrue(self.log[-1].endswith("'name 50' (49 more were not logged)"))

    def test_strangers(self) -> None:
        """Who calls before it is known is told of, and its calls' names are not."""
        self.visitor().turned_down("secret_name", None)
        self.assertEqual(self.log, ["warn: 192.0.2.1 port 50001: it has not said who it is"])

    def test_whatever_else(self) -> None:
        """Other protocols, failed handshakes and full buffers are told, each once a minute."""
        for _ in range(3):
            visitor = self.visitor()
            visitor.is_foreign("HTTP")
            visitor.has_no_handshake(Failure(SSL.Error([("SSL", "", "http request")])))
            visitor.does_not_read()
        self.assertEqual(
            [line.removeprefix("warn: 192.0.2.1 port 50001: ") for line in self.log],
            [
                "it speaks HTTP, and is cut off",
                "no TLS handshake: http request",
                "it does not read its replies, and is cut off",
            ],
        )

    def test_a_network_of_ipv6(self) -> None:
        """Whoever has a whole network of addresses has one line, which names the address."""
        for number in range(1, 10):
            self.visitor(IPv6Address("TCP", f"2001:db8::{number}", 1)).is_foreign("TLS")
        told = "warn: 2001:db8::1 port 1: it speaks TLS, and is cut off"
        self.assertEqual(self.log, [told])
