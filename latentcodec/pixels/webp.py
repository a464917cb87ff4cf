"""The container of a WebP file: a wrong length, or an end that is missing behind the picture (RFC 9649, section 2).

The pixels themselves are decoded by Pillow.
"""

import struct

PICTURES = frozenset({b"VP8 ", b"VP8L", b"ANMF"})


def is_webp(start: bytes) -> bool:
    """Whether a file begins as a WebP does."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def sound_webp(content: bytes) -> tuple[bytes, list[str]]:
    """`content` with the length that it has, up to its last whole chunk, if the picture is whole; what was wrong."""
    (length,) = struct.unpack("<I", content[4:8])
    if length + 8 <= len(content):
        return content, []
    stop, has_picture = 12, False
    while stop + 8 <= len(content):
        name = content[stop : stop + 4]
        (size,) = struct.unpack("<I", content[stop + 4 : stop + 8])
        if stop + 8 + size > len(content):
            break
        has_picture = has_picture or name in PICTURES
        stop += 8 + size + size % 2
    if not has_picture:
        return content, []  # for Pillow to refuse
    body = content[8:stop]
    body += bytes(stop - 8 - len(body))  # the byte that makes a chunk's length even
    return b"RIFF" + struct.pack("<I", len(body)) + body, [
        "a length beyond the end of the file; its picture is whole"
    ]
