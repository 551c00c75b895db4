"""``send_mail`` to real mail servers: envelope, text, refusals, TLS, login."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import trustme
from twisted.trial.unittest import SynchronousTestCase

from tests.integration.daemon import Daemon, temporary_directory, write_secret
from tests.integration.mail_server import MailServer

LOGIN = ("me@example.org", "pass:word-xyzzy")
LOGIN_TEXT = ":".join(LOGIN)


class MailTestCase(SynchronousTestCase):
    """Base of tests that have a mail server and a daemon."""

    def start_server(self, **options: Any) -> MailServer:
        server = MailServer(**options)
        server.start()
        self.addCleanup(server.stop)
        return server

    def start_daemon(self, *options: str, **environ: str) -> Daemon:
        daemon = Daemon(*options, environ=environ)
        self.addCleanup(daemon.stop)
        return daemon.start()

    def send(self, daemon: Daemon, **fields: Any) -> Any:
        """Ask for a mail as the seed's caller does, and give the reply."""
        return daemon.ask("send_mail", {"from": "me@example.org", **fields}, id=1)


class DeliveryTests(MailTestCase):
    def setUp(self) -> None:
        self.server = self.start_server()
        self.daemon = self.start_daemon("--smtp", f"127.0.0.1:{self.server.port}")

    def test_mail(self) -> None:
        """A mail arrives with its envelope, its headers, and its text in UTF-8."""
        reply = self.send(
            self.daemon,
            to="you@example.org",
            subject="Grüße aus 東京",
            contents="Olá,\ntudo bem?\n",
        )
        self.assertEqual(reply["result"]["refused"], {})
        (mail,) = self.server.mails
        self.assertEqual(mail.sender, "me@example.org")
        self.assertEqual(mail.recipients, ["you@example.org"])
        message = mail.message
        self.assertEqual(message["From"], "me@example.org")
        self.assertEqual(message["To"], "you@example.org")
        self.assertEqual(message["Subject"], "Grüße aus 東京")
        self.assertEqual(message["Message-ID"], reply["result"]["message_id"])
        self.assertIsNotNone(message["Date"].datetime)
        self.assertEqual(message.get_content_type(), "text/plain")
        self.assertEqual(message.get_content().replace("\r\n", "\n"), "Olá,\ntudo bem?\n")

    def test_recipients(self) -> None:
        """Every ``to``, ``cc`` and ``bcc`` gets the mail; nobody sees the ``bcc``."""
        self.send(
            self.daemon,
            to=["a@example.org", "b@example.org"],
            cc="c@example.org",
            bcc=["d@example.org"],
            reply_to="answers@example.org",
            contents="x",
        )
        (mail,) = self.server.mails
        self.assertEqual(mail.recipients, [f"{name}@example.org" for name in "abcd"])
        self.assertEqual(mail.message["To"], "a@example.org, b@example.org")
        self.assertEqual(mail.message["Cc"], "c@example.org")
        self.assertEqual(mail.message["Reply-To"], "answers@example.org")
        self.assertNotIn("d@example.org", mail.message.as_string())

    def test_names(self) -> None:
        """Addresses may have names; the envelope has the bare addresses."""
        self.daemon.ask("send_mail", {"from": "Zoë <z@example.org>", "to": "You <y@example.org>"})
        (mail,) = self.server.mails
        self.assertEqual((mail.sender, mail.recipients), ("z@example.org", ["y@example.org"]))
        self.assertEqual(mail.message["From"], "Zoë <z@example.org>")

    def test_html(self) -> None:
        """A mail may have its text as HTML too."""
        self.send(self.daemon, to="you@example.org", contents="plain", html="<p>rich</p>")
        (mail,) = self.server.mails
        kinds = [part.get_content_type() for part in mail.message.iter_parts()]
        self.assertEqual(kinds, ["text/plain", "text/html"])

    def test_some_refused(self) -> None:
        """Recipients that the server refuses are told; the others get the mail."""
        reply = self.send(self.daemon, to=["unwanted@example.org", "you@example.org"])
        refused = reply["result"]["refused"]
        self.assertEqual(list(refused), ["unwanted@example.org"])
        self.assertIn("550 nobody of that name", refused["unwanted@example.org"])
        self.assertEqual(self.server.mails[0].recipients, ["you@example.org"])

    def test_all_refused(self) -> None:
        """If the server refuses every recipient the task has failed, and tells why."""
        error = self.send(self.daemon, to="unwanted@example.org")["error"]
        self.assertEqual(error["code"], "task-failed")
        self.assertIn("unwanted@example.org", error["message"])
        self.assertIn("nobody of that name", error["message"])
        self.assertEqual(self.server.mails, [])

    def test_no_recipient(self) -> None:
        """A mail to nobody fails before it is sent."""
        for to in ("", []):
            error = self.send(self.daemon, to=to)["error"]
            self.assertEqual((error["code"], error["type"]), ("task-failed", "ValueError"))

    def test_header_injection(self) -> None:
        """A line feed in a header is refused."""
        for fields in (
            {"to": "you@example.org", "subject": "hello\nBcc: x@example.org"},
            {"to": "you@example.org\nBcc: x@example.org"},
            {"to": "you@example.org", "cc": ["x@example.org\r\nBcc: y@example.org"]},
        ):
            error = self.send(self.daemon, **fields)["error"]
            self.assertEqual((error["code"], error["type"]), ("task-failed", "ValueError"))
        self.assertEqual(self.server.mails, [])

    def test_addresses_in_one_string(self) -> None:
        """No address of a list in one string is lost: each gets the mail, or it is refused."""
        reply = self.send(self.daemon, to="a@example.org, b@example.org", bcc="c@e.org,d@e.org")
        if "error" in reply:
            self.assertEqual(reply["error"]["type"], "ValueError")
        else:
            (mail,) = self.server.mails
            self.assertEqual(
                mail.recipients, ["a@example.org", "b@example.org", "c@e.org", "d@e.org"]
            )

    def test_what_is_no_address(self) -> None:
        """What is no address is refused; nothing is guessed out of it."""
        for fields in (
            {"to": "not an address"},
            {"to": "you@example.org", "bcc": "nobody"},
            {"to": "you@example.org", "bcc": "x@example.org\r\nRCPT TO:<y@example.org>"},
            {"to": "you@example.org", "from": ""},
        ):
            reply = self.send(self.daemon, **fields)
            self.assertEqual(self.server.mails, [], fields)
            self.assertEqual(reply["error"]["type"], "ValueError", fields)

    def test_bad_arguments(self) -> None:
        """A mail without its recipient's parameter is refused by the parameter's name."""
        error = self.send(self.daemon)["error"]
        self.assertEqual(error["code"], "bad-arguments")
        self.assertIn("'to'", error["message"])


class NoServerTests(MailTestCase):
    def test_not_configured(self) -> None:
        """Without ``--smtp`` the task fails, and tells what to write."""
        error = self.send(self.start_daemon(), to="you@example.org")["error"]
        self.assertEqual(error["code"], "task-failed")
        self.assertIn("--smtp", error["message"])

    def test_server_down(self) -> None:
        """A mail server that is not there fails the task; the message tells which one."""
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        daemon = self.start_daemon("--smtp", f"127.0.0.1:{port}")
        error = self.send(daemon, to="you@example.org")["error"]
        self.assertEqual(error["code"], "task-failed")
        self.assertIn("refused", error["message"])
        self.assertIn(f"127.0.0.1:{port}", error["message"])


class ProtectedTests(MailTestCase):
    """TLS and login, with a certificate authority of the test's own."""

    def setUp(self) -> None:
        self.authority = trustme.CA()
        self.directory = temporary_directory(self)
        self.authority_file = self.directory / "authority.pem"
        self.authority.cert_pem.write_to_path(str(self.authority_file))

    def context(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    def start_for(self, server: MailServer, tls: str, *options: str, **environ: str) -> Daemon:
        return self.start_daemon(
            *("--smtp", f"localhost:{server.port}", "--smtp-tls", tls, *options),
            SSL_CERT_FILE=str(self.authority_file),
            **environ,
        )

    def login_file(self) -> str:
        path = self.directory / "login"
        write_secret(path, LOGIN_TEXT + "\n")
        return str(path)

    def assert_delivered(self, server: MailServer, daemon: Daemon) -> None:
        reply = self.send(daemon, to="you@example.org", contents="protected")
        self.assertEqual(reply["result"]["refused"], {})
        (mail,) = server.mails
        self.assertTrue(mail.was_encrypted)
        self.assertEqual(mail.message.get_content().strip(), "protected")

    def assert_failed(self, server: MailServer, daemon: Daemon, *words: str) -> None:
        error = self.send(daemon, to="you@example.org")["error"]
        self.assertEqual(error["code"], "task-failed")
        for word in words:
            self.assertIn(word, error["message"])
        self.assertEqual(server.mails, [])

    def assert_hidden(self, daemon: Daemon) -> None:
        """The password can be read nowhere in /proc, but in the environment of who was given it."""
        for process in daemon.processes():
            secrets = [LOGIN[1].encode(), LOGIN_TEXT.encode()]
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
            for secret in secrets:
                self.assertNotIn(secret, command)
                if process.pid != daemon.pid:
                    self.assertNotIn(secret, environ)
        self.assertNotIn(LOGIN[1], daemon.log + daemon.errors)

    def test_starttls_and_login_from_file(self) -> None:
        """With STARTTLS and a login from a file, the mail is sent encrypted by that user."""
        server = self.start_server(starttls=self.context("localhost"), login=LOGIN)
        daemon = self.start_for(server, "starttls", "--smtp-login", self.login_file())
        self.assert_delivered(server, daemon)
        self.assertEqual(server.mails[0].user, LOGIN[0])
        self.assert_hidden(daemon)

    def test_tls_and_login_from_environment(self) -> None:
        """With TLS and a login from the environment, the mail is sent encrypted by that user."""
        server = self.start_server(tls=self.context("localhost"), login=LOGIN)
        daemon = self.start_for(server, "tls", TASKD_SMTP_LOGIN=LOGIN_TEXT)
        self.assert_delivered(server, daemon)
        self.assertEqual(server.mails[0].user, LOGIN[0])
        self.assert_hidden(daemon)
        # A task cannot read it there either.
        self.assertIsNone(daemon.ask("environment", ["TASKD_SMTP_LOGIN"]))

    def test_file_before_environment(self) -> None:
        """A login from a file is taken before one from the environment."""
        server = self.start_server(starttls=self.context("localhost"), login=LOGIN)
        daemon = self.start_for(
            server, "starttls", "--smtp-login", self.login_file(), TASKD_SMTP_LOGIN="me:wrong"
        )
        self.assert_delivered(server, daemon)

    def test_wrong_password(self) -> None:
        """A login that the server refuses fails the task, and the password is not told."""
        server = self.start_server(starttls=self.context("localhost"), login=LOGIN)
        daemon = self.start_for(server, "starttls", TASKD_SMTP_LOGIN="me@example.org:wr0ng-one")
        error = self.send(daemon, to="you@example.org")["error"]
        self.assertEqual(error["code"], "task-failed")
        self.assertIn("535", error["message"])
        self.assertNotIn("wr0ng-one", str(error) + daemon.log)
        self.assertEqual(server.mails, [])

    def test_password_beyond_ascii(self) -> None:
        """A password may have any letters; it is sent in UTF-8 (RFC 4616)."""
        login = ("me@example.org", "pässwörd")
        server = self.start_server(starttls=self.context("localhost"), login=login)
        daemon = self.start_for(server, "starttls", TASKD_SMTP_LOGIN=":".join(login))
        self.assert_delivered(server, daemon)

    def test_other_name(self) -> None:
        """A server whose certificate is for another name gets neither mail nor login."""
        for tls in ("starttls", "tls"):
            server = self.start_server(**{tls: self.context("mail.example.org")}, login=LOGIN)
            daemon = self.start_for(server, tls, TASKD_SMTP_LOGIN=LOGIN_TEXT)
            self.assert_failed(server, daemon, "certificate", "localhost")

    def test_unknown_authority(self) -> None:
        """A server whose certificate nobody trusted has signed gets neither mail nor login."""
        stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("localhost").configure_cert(stranger)
        for tls in ("starttls", "tls"):
            server = self.start_server(**{tls: stranger}, login=LOGIN)
            daemon = self.start_for(server, tls, TASKD_SMTP_LOGIN=LOGIN_TEXT)
            self.assert_failed(server, daemon, "certificate")

    def test_server_without_starttls(self) -> None:
        """A server that offers no STARTTLS gets no mail in the clear instead."""
        server = self.start_server()
        daemon = self.start_for(server, "starttls")
        self.assert_failed(server, daemon, "STARTTLS")
