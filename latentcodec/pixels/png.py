"""The container of a PNG file: what its pixels need of it, when texts, profiles or the end are broken or huge.

PNG specification, third edition, sections 5 and 11. The pixels themselves are decoded by Pillow.
"""

import re
import struct
import zlib
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_PROFILE = 64 * 2**20  # bytes, unpacked; those of printers reach some megabytes
LARGEST_TEXT = 2**20  # bytes, unpacked: what Pillow reads at most
GREY, RGB = 0, 2  # colour types
CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")
CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # whose texts may turn the picture
END = b"\0\0\0\0IEND\xaeB`\x82"


class SoundPNG(NamedTuple):
    """A PNG file that Pillow reads wherever its pixels are whole."""

    content: bytes
    profile: bytes | None
    """The ICC profile, unpacked."""
    notes: list[str]
    """What was broken beside the pixels."""


class _Chunk(NamedTuple):
    name: bytes
    start: int  # of its length, name, data and checksum within the file
    stop: int

    def data(self, content: bytes) -> bytes:
        return content[self.start + 8 : self.stop - 4]

    def is_whole(self, content: bytes) -> bool:
        (expected,) = struct.unpack(">I", content[self.stop - 4 : self.stop])
        return zlib.crc32(memoryview(content)[self.start + 4 : self.stop - 4]) == expected


def sound_png(content: bytes) -> SoundPNG:
    """`content` without texts, without animation and without its ICC profile, which is given beside it.

    A chunk that pixels do not need and whose checksum is wrong, and whatever is broken after the pixels, is left out
    with a note. Chunks that pixels need stay as they are, for Pillow to judge.
    """
    chunks, is_ended = _chunks(content)
    kept: list[bytes] = [SIGNATURE]
    notes: list[str] = []
    profile = None
    for chunk in chunks:
        if chunk.name not in CRITICAL and chunk.name != b"tRNS":
            if not _may_matter(chunk, content):
                if not chunk.is_whole(content):
                    notes.append(
                        f"a wrong checksum in its {chunk.name.decode()} chunk, which pixels do not need"
                    )
                continue
            if not chunk.is_whole(content):
                notes.append(f"a wrong checksum in its {chunk.name.decode()} chunk, which is left out")
                continue
            if chunk.name == b"iCCP":
                profile, note = _profile(chunk.data(content))
                notes += note
                continue
        kept.append(content[chunk.start : chunk.stop])
    if not is_ended and any(chunk.name == b"IDAT" for chunk in chunks):
        notes.append("no end marker")
        kept.append(END)
    elif not is_ended:
        kept.append(
            content[chunks[-1].stop if chunks else len(SIGNATURE) :]
        )  # for Pillow to say what is wrong
    return SoundPNG(b"".join(kept), profile, notes)


def transparent_sample(content: bytes) -> int:
    """The grey that a tRNS chunk calls transparent."""
    data = next(chunk.data(content) for chunk in _chunks(content)[0] if chunk.name == b"tRNS")
    return int.from_bytes(data[:2], "big")


def _chunks(content: bytes) -> tuple[list[_Chunk], bool]:
    """The chunks up to the end marker, or up to the first that is broken; and whether the marker is there.

    Image data that run beyond the file's end count as a chunk: whether they are whole is for the decoder to see.
    """
    chunks: list[_Chunk] = []
    start = len(SIGNATURE)
    while start + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        name, stop = content[start + 4 : start + 8], start + 12 + length
        if name == b"IDAT" and stop > len(content):
            return [*chunks, _Chunk(name, start, len(content))], True
        if not CHUNK_NAME.fullmatch(name) or stop > len(content):
            return chunks, False
        chunks.append(_Chunk(name, start, stop))
        if name == b"IEND":
            return chunks, True
        start = stop
    return chunks, False


def _may_matter(chunk: _Chunk, content: bytes) -> bool:
    """Whether a chunk can change what the picture looks like: its profile, and what may say that it is turned."""
    if chunk.name in (b"iCCP", b"eXIf"):
        return True
    if chunk.name not in (b"tEXt", b"zTXt", b"iTXt") or chunk.stop - chunk.start > LARGEST_TEXT:
        return False
    data = chunk.data(content)
    return data.startswith(ORIENTATION_TEXTS) and _is_read_by_pillow(chunk.name, data)


def _is_read_by_pillow(name: bytes, data: bytes) -> bool:
    """Whether a text is as it stands, or unpacks to no more than Pillow's bound."""
    rest = data.partition(b"\0")[2]
    if name == b"tEXt" or (name == b"iTXt" and rest[:1] == b"\0"):
        return True
    method, packed = (rest[:1], rest[1:]) if name == b"zTXt" else (rest[1:2], data.split(b"\0", 4)[-1])
    return method == b"\0" and len(_unpacked(packed, LARGEST_TEXT + 1)) <= LARGEST_TEXT


def _profile(data: bytes) -> tuple[bytes | None, list[str]]:
    packed = data.partition(b"\0")[2]
    profile = _unpacked(packed[1:], LARGEST_PROFILE + 1)
    if not profile:
        return None, ["an ICC profile that cannot be unpacked, which is left out"]
    if len(profile) > LARGEST_PROFILE:
        return None, [f"an ICC profile of more than {LARGEST_PROFILE:,} bytes, which is left out"]
    return profile, []


def _unpacked(packed: bytes, largest: int) -> bytes:
    """At most `largest` bytes of zlib data; none where they are broken."""
    try:
        return zlib.decompressobj().decompress(packed, largest)
    except zlib.error:
        return b""
