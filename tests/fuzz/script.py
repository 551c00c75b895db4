"""
Bytes that choose a conversation: what is sent, and what happens meanwhile.

The first byte is a set of flags, the second the size of the chunks in which the
rest comes; of both the lower six bits count, so ``@`` is none. All that follows
is sent as it is, but for what begins with the byte 0xFE, which UTF-8 does not
have: the byte behind it names something that happens then, and some take one
byte or two more. So a file of requests is a conversation with ``@@`` before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["ESCAPE", "MOST_BYTES", "Flags", "steps_of"]

ESCAPE: Final = 0xFE
MOST_BYTES: Final = 24 * 1024
"""So much is sent at most, repetitions included."""

_REPEAT: Final = ord("*")
_AT_A_TIME: Final = 16
_WITH_A_NUMBER: Final = frozenset(b"rxjpc")


class Flags:
    """
    How a conversation is set up.

    Attributes:
        chunk_bytes: How much comes at a time; 0: all of it, up to what happens next.
    """

    def __init__(self, data: bytes) -> None:
        self._bits = data[0] & 0x3F if data else 0
        self.chunk_bytes = data[1] & 0x3F if len(data) > 1 else 0

    def has(self, number: int) -> bool:
        """Tell whether a flag is set."""
        return bool(self._bits >> number & 1)


def steps_of(data: bytes) -> Iterator[tuple[str, bytes]]:
    """
    Give what happens: ``("", bytes)`` for what is sent, else a letter and its number.

    Args:
        data: The whole input, its first two bytes included.
    """
    flags = Flags(data)
    size = flags.chunk_bytes
    sent, place = bytearray(), 2
    left = MOST_BYTES

    def chunks() -> Iterator[tuple[str, bytes]]:
        nonlocal left
        whole = bytes(sent[:left])
        left -= len(whole)
        sent.clear()
        for begin in range(0, len(whole), size or len(whole) or 1):
            yield "", whole[begin : begin + (size or len(whole))]

    while place < len(data):
        escape = data.find(ESCAPE, place)
        if escape < 0 or escape + 1 >= len(data):
            sent += data[place:]
            break
        sent += data[place:escape]
        what = data[escape + 1]
        place = escape + 2
        if what == _REPEAT:
            if place + 1 < len(data):
                sent += data[place : place + 1] * (data[place + 1] * _AT_A_TIME)
            place += 2
            continue
        yield from chunks()
        if what in _WITH_A_NUMBER:
            yield chr(what), data[place : place + 1]
            place += 1
        else:
            yield chr(what), b""
    yield from chunks()
