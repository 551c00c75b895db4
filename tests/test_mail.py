"""``send_mail``, as far as it goes without a mail server."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from taskd.functions import Function, Kind
from taskd.mail import Mailer
from taskd.settings import SmtpSettings

# Nobody listens there, so a mail that gets as far as the server is an OSError.
NOWHERE = SmtpSettings("127.0.0.1", 1, timeout_seconds=5.0)


def send(**fields: Any) -> Any:
    """Send a mail of which only *fields* matter."""
    return Mailer(NOWHERE).send_mail(**{"from_": "a@example.org", "to": "b@example.org", **fields})


class MailerTests(SynchronousTestCase):
    """What is refused before anything is sent."""

    def test_no_mail_server(self) -> None:
        """Without a mail server the error names the option that sets one."""
        mailer = Mailer(None)
        error = self.assertRaises(RuntimeError, mailer.send_mail, "a@example.org", "b@example.org")
        self.assertIn("--smtp HOST:PORT", str(error))

    def test_no_recipient(self) -> None:
        """A mail to nobody is refused, in each way in which nobody can be written."""
        for fields in ({"to": ""}, {"to": []}, {"to": "", "cc": [], "bcc": None}):
            error = self.assertRaises(ValueError, send, **fields)
            self.assertIn("no recipient", str(error))

    def test_one_recipient_is_enough(self) -> None:
        """A mail that has a recipient anywhere goes to the mail server."""
        for fields in ({}, {"to": "", "cc": "c@example.org"}, {"to": [], "bcc": ["c@example.org"]}):
            self.assertRaises(ConnectionError, send, **fields)

    def test_no_header_can_be_smuggled(self) -> None:
        """A line break in what becomes a header is refused."""
        for break_ in ("\n", "\r", "\r\n"):
            text = f"x@example.org{break_}Bcc: victim@example.org"
            for field in ("from_", "to", "cc", "reply_to", "subject"):
                error = self.assertRaises(ValueError, send, **{field: text})
                self.assertIn("a header cannot be written", str(error))

    def test_an_address_that_the_parser_stumbles_over(self) -> None:
        """An address that cannot be parsed is a ValueError, however the parser fails on it."""
        for address in (
            "@",
            "<",
            '"',
            "group::",
            "\\, .>=?utf-8?q?",
            '?:;"=group::[?',
            "a@[",
            ";(",
        ):
            for field in ("from_", "to", "cc", "reply_to"):
                with self.assertRaises((ValueError, ConnectionError)) as caught:
                    send(**{field: address})
                if isinstance(caught.exception, ValueError):
                    self.assertIn("a header cannot be written", str(caught.exception))

    def test_the_wire_name_of_the_sender(self) -> None:
        """A caller's ``from`` is the sender."""
        function = Function("send_mail", Mailer(None).send_mail, Kind.THREAD)
        _, keywords = function.bind({"from": "a@example.org", "to": "b@example.org"})
        self.assertEqual(keywords, {"from_": "a@example.org", "to": "b@example.org"})
