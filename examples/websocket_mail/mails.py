"""
What a browser's message asks for: the mails to send, or what is wrong with it.

Nothing is sent here, and nothing can be taken for granted.
"""

from __future__ import annotations

import json
import re

MOST_RECIPIENTS = 1000
LONGEST_SUBJECT = 200
LONGEST_CONTENTS = 20_000
LONGEST_ADDRESS = 254
ADDRESS = re.compile(r"[^@\s<>,;]+@[^@\s<>,;]+")


def mails_of(payload: bytes, *, is_first: bool) -> list[dict[str, str]]:
    """
    Read a browser's message, of which nothing can be taken for granted.

    Args:
        payload: JSON: an object with ``from``, ``recipients``, ``subject`` and ``contents``.
        is_first: True if the connection has not asked for mails before.

    Returns:
        The arguments of ``send_mail``, for each recipient once.

    Raises:
        ValueError: There is something wrong, which the text tells the person at the page.
    """
    try:
        asked = json.loads(payload)
        sender, subject, contents = (asked[name] for name in ("from", "subject", "contents"))
        recipients = list(dict.fromkeys(asked["recipients"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError("This is not a message of the page.") from None
    if not is_first:
        raise ValueError("This connection has its mails already; open another one.")
    if not recipients:
        raise ValueError("There is no recipient.")
    if len(recipients) > MOST_RECIPIENTS:
        raise ValueError(f"{len(recipients)} recipients are too many: {MOST_RECIPIENTS} at most.")
    for address in (sender, *recipients):
        if not is_address(address):
            raise ValueError(f"“{str(address)[:LONGEST_ADDRESS]}” is not a mail address.")
    if not (isinstance(subject, str) and subject.isprintable() and len(subject) <= LONGEST_SUBJECT):
        raise ValueError(f"The subject must be one line, of {LONGEST_SUBJECT} characters at most.")
    if not (isinstance(contents, str) and len(contents) <= LONGEST_CONTENTS):
        raise ValueError(f"The contents may have {LONGEST_CONTENTS} characters at most.")
    mail = {"from": sender, "subject": subject, "contents": contents}
    return [{**mail, "to": recipient} for recipient in recipients]


def is_address(text: object) -> bool:
    """Tell whether this looks like a bare mail address; the mail server knows for sure."""
    return (
        isinstance(text, str)
        and text.isprintable()
        and len(text) <= LONGEST_ADDRESS
        and ADDRESS.fullmatch(text) is not None
    )
