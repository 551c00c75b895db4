"""
``send_mail``: one mail to a real mail server, by SMTP.

A blocking function on the standard library's clients. It runs in a worker's
thread, so there are as many connections to the mail server as busy workers.
"""

from __future__ import annotations

import smtplib
import ssl
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
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
        recipients = [*_listed(to), *_listed(cc), *_listed(bcc)]
        if not recipients:
            raise ValueError("no recipient: 'to' is empty")
        mail = EmailMessage()
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
        with self._connect(self._smtp) as server:
            refused = server.send_message(mail, to_addrs=recipients)
        return {
            "message_id": mail["Message-ID"],
            "refused": {
                address: f"{code} {reply.decode(errors='replace')}"
                for address, (code, reply) in refused.items()
            },
        }

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
                server.login(smtp.user, smtp.password)
        except BaseException:
            server.close()
            raise
        return server


def _listed(addresses: str | list[str] | None) -> list[str]:
    if addresses is None or addresses == "":
        return []
    listed = [addresses] if isinstance(addresses, str) else addresses
    if not isinstance(listed, list) or not all(isinstance(a, str) for a in listed):
        raise ValueError(f"recipients must be a string or strings, not {addresses!r:.60}")
    return listed
