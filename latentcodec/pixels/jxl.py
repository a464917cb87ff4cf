"""The size that a JPEG XL file states in its first bytes, which the package that reads it says only with the pixels.

ISO/IEC 18181-1, section D.2 (SizeHeader, in a codestream), and ISO/IEC 18181-2 (boxes around it).
"""

from collections.abc import Iterator

CODESTREAM = b"\xff\x0a"
LONGEST = 64  # bytes of a codestream that are looked at; its size takes at most ten
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height, by number from 1
LENGTHS = (9, 13, 18, 30)  # bits of a side, by selector


def stated_size(content: bytes) -> tuple[int, int]:
    """Width and height in pixels, not turned. Raises ValueError where the file states none."""
    stream = content[:LONGEST] if content.startswith(CODESTREAM) else b"".join(_parts(content))[:LONGEST]
    if not stream.startswith(CODESTREAM) or len(stream) < 6:
        raise ValueError("a JPEG XL file that does not say how large its picture is")
    bits = _Bits(stream.ljust(LONGEST, b"\0")[len(CODESTREAM) :])
    is_small = bits.take(1)
    height = _side(bits, is_small)
    ratio = bits.take(3)
    if ratio == 0:
        return _side(bits, is_small), height
    across, down = RATIOS[ratio - 1]
    return height * across // down, height


class _Bits:
    """Bits of bytes, the lowest of each byte first."""

    def __init__(self, content: bytes) -> None:
        self.value = int.from_bytes(content, "little")

    def take(self, count: int) -> int:
        taken = self.value & (2**count - 1)
        self.value >>= count
        return taken


def _side(bits: _Bits, is_small: int) -> int:
    return (1 + bits.take(5)) * 8 if is_small else 1 + bits.take(LENGTHS[bits.take(2)])


def _parts(content: bytes) -> Iterator[bytes]:
    """The beginnings of the boxes that hold the codestream, in order."""
    place = 0
    while place + 8 <= len(content):
        length, kind, header = (
            int.from_bytes(content[place : place + 4], "big"),
            content[place + 4 : place + 8],
            8,
        )
        if length == 1:
            length, header = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        end = place + length if length else len(content)
        if kind == b"jxlc":
            yield content[place + header : min(end, place + header + LONGEST)]
        elif kind == b"jxlp":  # its first four bytes are its number
            yield content[
                place + header + 4 : max(place + header + 4, min(end, place + header + 4 + LONGEST))
            ]
        if length and length < header:
            return
        place = end
