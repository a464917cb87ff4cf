"""A picture of which a part is missing is not filled in silence; a whole one is read, whatever is cut beside it."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from latentcodec.pixels import UnreadableImage, collect_notes, decode_image


def picture():
    """112 x 80 pixels of smooth noise, every row and column of which differs."""
    small = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((112, 80), Image.Resampling.BICUBIC)


def jpeg(**options):
    file = io.BytesIO()
    picture().save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("every", [{"restart_marker_blocks": 1}, {"restart_marker_rows": 1}], ids=str)
def test_a_jpeg_that_breaks_off_at_a_restart_is_not_taken_for_whole(options, every):
    whole = jpeg(**options, **every)
    first, last = whole.find(b"\xff\xda"), whole.rfind(b"\xff\xda")
    starts = [i for i in range(first, len(whole)) if whole[i] == 0xFF and 0xD0 <= whole[i + 1] <= 0xD7]
    of_the_last_scan = [start for start in starts if start > last]
    for start in of_the_last_scan[:3] + of_the_last_scan[-3:]:
        with pytest.raises(UnreadableImage, match=r"photo: .*truncated"):
            decode_image(whole[:start], name="photo")
    with collect_notes() as notes:
        assert torch.equal(decode_image(whole[:-2], name="photo"), decode_image(whole))
    assert notes == ["photo: no end marker; its pixels are whole"]


@pytest.mark.parametrize(
    ("kind", "name"), [(0xE0, b"JFIF\0"), (0xE0, b"JFIF"), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe")]
)
def test_a_short_segment_of_an_application_costs_a_note(kind, name):
    whole = jpeg(quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    for file in (whole, jpeg(quality=90, exif=turned.tobytes())):
        broken = file[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(name) + 2) + name + file[2:]
        with collect_notes() as notes:
            assert torch.equal(decode_image(broken, name="photo"), decode_image(file))
        assert notes == ["photo: segments of applications that are cut short, passed over"]


def tiff(offsets, tags):
    """A TIFF of `picture()`: its pixels in four parts, and where the list of tags says that they lie."""
    first, counts, *others = tags
    pixels = np.asarray(picture())
    parts = np.split(pixels, 4) if first == 273 else [pixels[:, :, channel] for channel in range(3)]
    if first == 324:
        padded = np.pad(pixels, ((0, 16), (0, 16), (0, 0)))
        parts = [padded[y : y + 48, x : x + 64] for y in (0, 48) for x in (0, 64)]
    blob, places = b"", []
    for part in parts:
        places.append(8 + len(blob))
        blob += part.tobytes()
    places = [places[i] if i is not None else 0 for i in offsets]
    entries = [(256, [112]), (257, [80]), (258, [8, 8, 8]), (259, [1]), (262, [2]), (277, [3]), *others]
    entries += [(273 if first == 284 else first, places), (counts, [len(parts[0].tobytes())] * len(places))]
    tail, listed = b"", b""
    for tag, values in sorted(entries):
        data = struct.pack(f"<{len(values)}I", *values)
        if len(data) > 4:
            data, tail = struct.pack("<I", 8 + len(blob) + len(tail)), tail + data
        listed += struct.pack("<HHI", tag, 4, len(values)) + data
    head = b"II*\0" + struct.pack("<I", 8 + len(blob) + len(tail))
    return head + blob + tail + struct.pack("<H", len(entries)) + listed + bytes(4)


STRIPS, TILES = (273, 279, (278, [20])), (324, 325, (322, [64]), (323, [48]))
PLANES = (284, 279, (284, [2]), (278, [80]))


@pytest.mark.parametrize(
    ("tags", "parts"), [(STRIPS, 4), (TILES, 4), (PLANES, 3)], ids=["strips", "tiles", "planes"]
)
def test_a_tiff_that_lists_too_few_parts_is_not_filled_with_black(tags, parts):
    assert torch.equal(decode_image(tiff(range(parts), tags)), decode_image(picture()))
    for offsets in (range(parts - 1), [*range(parts - 1), None]):  # not listed, or in the file's header
        with pytest.raises(UnreadableImage, match=r"photo: .*strips or tiles"):
            decode_image(tiff(offsets, tags), name="photo")
