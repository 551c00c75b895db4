"""A real mail server for a test: aiosmtpd, which keeps what it gets."""

from __future__ import annotations

import ssl
import warnings
from asyncio import AbstractServer
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, Final, cast

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

__all__ = ["Mail", "MailServer"]

UNWANTED: Final = "unwanted"
"""Recipients whose address begins so are refused."""


@dataclass(frozen=True)
class Mail:
    """
    One mail as it came.

    Attributes:
        sender: The envelope's.
        recipients: The envelope's.
        message: What was sent to them.
        was_encrypted: True if it came over TLS.
        user: Who had logged in, or ''.
    """

    sender: str
    recipients: list[str]
    message: EmailMessage
    was_encrypted: bool
    user: str


class MailServer(Controller):
    """
    The server, in a thread, on 127.0.0.1, on a port that the kernel chooses.

    Args:
        starttls: A context: TLS is asked for by STARTTLS, and required.
        tls: A context: TLS from the first byte.
        login: User and password that are required.

    Attributes:
        mails: What has come.
        port: Where it listens, once it is started.
    """

    def __init__(
        self,
        *,
        starttls: ssl.SSLContext | None = None,
        tls: ssl.SSLContext | None = None,
        login: tuple[str, str] | None = None,
    ) -> None:
        self.mails: list[Mail] = []
        self._login = login
        super().__init__(
            self,
            hostname="127.0.0.1",
            port=0,
            ssl_context=tls,
            tls_context=starttls,
            require_starttls=starttls is not None,
            authenticator=self._authenticate,
            auth_required=login is not None,
            # It knows nothing of the TLS that it is wrapped in.
            auth_require_tls=starttls is not None,
            ready_timeout=20.0,
        )

    def stop(self, no_assert: bool = True) -> None:
        """Stop; without effect the second time."""
        if not self.loop.is_closed():
            super().stop(no_assert)

    def factory(self) -> SMTP:
        """Make the protocol of one connection."""
        with warnings.catch_warnings():
            # It takes a login without STARTTLS for one in the clear.
            warnings.simplefilter("ignore")
            return super().factory()

    async def _create_server(self) -> AbstractServer:
        server = await super()._create_server()
        self.port = server.sockets[0].getsockname()[1]
        return server

    def _authenticate(
        self, server: Any, session: Session, envelope: Envelope, mechanism: str, data: Any
    ) -> AuthResult:
        given = cast(LoginPassword, data)
        login = (given.login.decode(), given.password.decode())
        return AuthResult(success=login == self._login, handled=False, auth_data=login[0])

    # aiosmtpd calls these.

    async def handle_RCPT(
        self,
        server: Any,
        session: Session,
        envelope: Envelope,
        address: str,
        rcpt_options: list[str],
    ) -> str:
        """Take a recipient, unless it is unwanted."""
        if address.startswith(UNWANTED):
            return "550 nobody of that name, é"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Session, envelope: Envelope) -> str:
        """Take a mail."""
        content = cast(bytes, envelope.content)
        message = cast(EmailMessage, message_from_bytes(content, policy=policy.default))
        self.mails.append(
            Mail(
                sender=envelope.mail_from or "",
                recipients=list(envelope.rcpt_tos),
                message=message,
                was_encrypted=server.transport.get_extra_info("ssl_object") is not None,
                user=str(session.auth_data or ""),
            )
        )
        return "250 OK"
