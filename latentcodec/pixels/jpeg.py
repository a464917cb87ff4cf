"""The container of a JPEG file: a missing end marker, cut segments, and progressive files of thousands of scans.

ITU-T T.81, annexes B and G. The pixels themselves are decoded by Pillow.
"""

import re
from dataclasses import dataclass, field

SIGNATURE = b"\xff\xd8\xff"
MOST_SCANS = 100  # cameras and encoders write ten or so; each costs a pass over the whole picture
START_OF_SCAN, END = b"\xff\xda", b"\xff\xd9"
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
AFTER_ENTROPY_CODED = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither stuffing nor a restart
COEFFICIENTS = 64
SHORTEST = {b"JFIF": 14, b"ICC_PROFILE\0": 14, b"Adobe": 12}  # segments of applications, in bytes
RESTARTS = [bytes([0xFF, 0xD0 + number]) for number in range(8)]  # they come in turn between parts of a scan
# What a decoder takes for more of a scan, if it needs any.
DATA = (b"\x55\x2b\x9c" * 400, b"\xaa\xd3\x17" * 400)


@dataclass
class JPEGStructure:
    """What the markers of the first picture in a file say."""

    is_ended: bool = False
    scans: int = 0
    components: set[int] = field(default_factory=set)
    precision: dict[tuple[int, int], int] = field(default_factory=dict)
    """(component, coefficient) -> how many of its low bits no scan so far has told."""

    @property
    def describes_all_coefficients(self) -> bool:
        """Whether the scans, if they are whole, tell every bit of every coefficient."""
        places = [(c, k) for c in self.components for k in range(COEFFICIENTS)]
        return bool(places) and all(self.precision.get(place) == 0 for place in places)


def is_suspicious(content: bytes) -> bool:
    """Whether a file does not end with the end marker, or may have too many scans: nearly none needs one."""
    return not content.endswith(END) or content.count(START_OF_SCAN) > MOST_SCANS


def structure(content: bytes) -> JPEGStructure:
    """Walk the markers up to the end of the first picture, the end of the file, or one scan too many."""
    found = JPEGStructure()
    place = 2
    while place + 4 <= len(content) and found.scans <= MOST_SCANS:
        if content[place] != 0xFF:
            return found
        kind = content[place + 1]
        if kind == 0xFF:  # a marker may be preceded by any number of these
            place += 1
            continue
        if kind == END[1]:
            found.is_ended = True
            return found
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place + 4 : place + 2 + length]
        place += 2 + length
        if kind in FRAMES:
            found.components = set(segment[6::3])
        elif kind == START_OF_SCAN[1]:
            _add_scan(found, segment)
            marker = AFTER_ENTROPY_CODED.search(content, place)
            if marker is None:
                return found
            place = marker.end() - 2
    found.is_ended = content[place : place + 2] == END
    return found


def without_short_segments(content: bytes) -> bytes:
    """The file without applications' segments that are too short for what their names say."""
    kept, place = bytearray(content[:2]), 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != START_OF_SCAN[1:]:
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        segment = content[place + 4 : place + 2 + length]
        if not any(segment.startswith(name) and length < 2 + least for name, least in SHORTEST.items()):
            kept += content[place : place + 2 + length]
        place += 2 + length
    return bytes(kept) + content[place:]


def tails(content: bytes) -> list[bytes]:
    """What may follow a file that breaks off in a scan: the end, or more data, with and without the next restart.

    A decoder passes over data where it waits for a restart, so that without one the rest of the picture would stay as
    it is, as if it were whole.
    """
    last = max(RESTARTS, key=content.rfind)
    follows = content.rfind(last) > content.rfind(START_OF_SCAN)
    restart = RESTARTS[(RESTARTS.index(last) + 1) % 8] if follows else RESTARTS[0]
    return [start + data + END for start in (b"", restart) for data in (b"", *DATA)]


def _add_scan(found: JPEGStructure, header: bytes) -> None:
    """Count a scan by its header: components, first and last coefficient, bits told before and by it."""
    found.scans += 1
    if len(header) < 4:
        return
    first, last, low = header[-3], header[-2], header[-1] & 15
    for component in header[1:-3:2]:
        for k in range(first, min(last, COEFFICIENTS - 1) + 1):
            found.precision[component, k] = low
