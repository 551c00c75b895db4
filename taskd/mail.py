"""
``send_mail``: one mail to a real mail server, by SMTP.

A blocking function on the standard library's clients. It runs in a worker's
thread, so there are as many connections to the mail server as busy workers.
"""

from __future__ import annotations

import base64
import smtplib
import ssl
from contextlib import suppress
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import formataddr, formatdate, getaddresses, make_msgid, parseaddr
from typing import Any

from taskd.settings import SmtpSettings

__all__ = ["Mailer"]


class Mailer:
    """
    Send mail as the operator has set it up.

    Args:
        smtp: The mail server, or None if there is none.
    """

    def __init__(self, smtp: SmtpSettings | None) -> None:
        self._smtp = smtp

    def send_mail(
        self,
        from_: str,
        to: str | list[str],
        subject: str = "",
        contents: str = "",
        *,
        html: str | None = None,
        cc: str | list[str] | None = None,
        bcc: str | list[str] | None = None,
        reply_to: str | None = None,
    ) -> dict[str, Any]:
        """
        Send one mail.

        Args:
            from_: The sender; on the wire ``"from"``.
            to: Address or addresses.
            subject: One line.
            contents: The text.
            html: The same as HTML, for readers that show it.
            cc: Further addresses.
            bcc: Further addresses that nobody sees.
            reply_to: Where answers go.

        Returns:
            ``message_id``, and ``refused``: what the server said of each
            recipient that it did not take.

        Raises:
            ValueError: There is no recipient, or a header that cannot be.
            RuntimeError: The daemon has no mail server.
            OSError: The mail server cannot be reached, or refused the mail.
        """
        if self._smtp is None:
            raise RuntimeError("no mail server: start the daemon with --smtp HOST:PORT")
        for name, text in (("from", from_), ("subject", subject), ("contents", contents)):
            if not isinstance(text, str):
                raise ValueError(f"{name!r} must be a string, not {text!r:.60}")
        recipients = [_bare(a) for a in (*_listed(to), *_listed(cc), *_listed(bcc))]
        if not recipients:
            raise ValueError("no recipient: 'to' is empty")
        mail = EmailMessage()
        _bare(", ".join(_listed(from_)))
        try:
            mail["From"] = from_
            mail["To"] = ", ".join(_listed(to))
            if cc:
                mail["Cc"] = ", ".join(_listed(cc))
            if reply_to:
                mail["Reply-To"] = reply_to
            mail["Subject"] = subject
        except (MessageError, ValueError, TypeError, IndexError, AttributeError) as error:
            # What the standard library's parser stumbles over, it reports in all these ways.
            raise ValueError(f"a header cannot be written: {error}") from error
        mail["Date"] = formatdate(localtime=True)
        mail["Message-ID"] = make_msgid()
        mail.set_content(contents)
        if html is not None:
            mail.add_alternative(html, subtype="html")
        try:
            server = self._connect(self._smtp)
        except OSError as error:
            where = f"{self._smtp.host}:{self._smtp.port}"
            raise ConnectionError(f"the mail server {where}: {error}") from error
        try:
            refused = _readable(server.send_message(mail, to_addrs=recipients))
            # The mail is sent: whatever the server says to our goodbye, it is not to be sent again.
            with suppress(smtplib.SMTPException, OSError):
                server.quit()
        except smtplib.SMTPRecipientsRefused as error:
            # Its own text is a dictionary of bytes.
            each = _readable(error.recipients).items()
            told: Any = "; ".join(f"{address}: {said}" for address, said in each)
            error.args = (told,)
            raise
        finally:
            server.close()
        return {"message_id": mail["Message-ID"], "refused": refused}

    def _connect(self, smtp: SmtpSettings) -> smtplib.SMTP:
        timeout = smtp.timeout_seconds
        if smtp.tls == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(
                smtp.host, smtp.port, timeout=timeout, context=ssl.create_default_context()
            )
        else:
            server = smtplib.SMTP(smtp.host, smtp.port, timeout=timeout)
        try:
            if smtp.tls == "starttls":
                server.starttls(context=ssl.create_default_context())
            if smtp.user:
                _log_in(server, smtp.user, smtp.password)
        except BaseException:
            server.close()
            raise
        return server


def _readable(refused: dict[str, tuple[int, bytes]]) -> dict[str, str]:
    """Put into words what the server said of each recipient that it did not take."""
    return {
        address: f"{code} {reply.decode(errors='replace')}"
        for address, (code, reply) in refused.items()
    }


def _log_in(server: smtplib.SMTP, user: str, password: str) -> None:
    if user.isascii() and password.isascii():
        server.login(user, password)
        return
    # The standard library's login knows ASCII alone; RFC 4616 says UTF-8.
    server.ehlo_or_helo_if_needed()
    credentials = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
    code, reply = server.docmd("AUTH", f"PLAIN {credentials}")
    if code != 235:
        raise smtplib.SMTPAuthenticationError(code, reply)


def _listed(addresses: str | list[str] | None) -> list[str]:
    """Give the addresses one by one, with their names; a string may hold several."""
    if addresses is None or addresses == "":
        return []
    listed = [addresses] if isinstance(addresses, str) else addresses
    if not isinstance(listed, list) or not all(isinstance(a, str) for a in listed):
        raise ValueError(f"recipients must be a string or strings, not {addresses!r:.60}")
    if any(not c.isprintable() for address in listed for c in address):
        # The parser would take a line break for a space, and guess.
        raise ValueError(f"a header cannot be written: {addresses!r:.60} has a line break")
    try:
        return [formataddr(pair) for pair in getaddresses(listed)]
    except (UnicodeError, IndexError) as error:
        raise ValueError(f"a header cannot be written: {error}") from error


def _bare(address: str) -> str:
    bare = parseaddr(address)[1]
    if "@" not in bare or any(c.isspace() for c in bare):
        raise ValueError(f"a header cannot be written: {address!r:.60} is no mail address")
    return bare
