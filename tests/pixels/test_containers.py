"""A file whose pixels are whole is read, whatever else is broken in it; what is not whole, or has no end, is refused.

JPEG, WebP and GIF, broken by hand after their specifications; the memory that decoding takes; notes and warnings.
"""

import io
import os
import random
import socket
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from encoded_pictures import encoded
from handmade_files import picture, png
from PIL import Image

from latentcodec.pixels import (
    ImageWarning,
    UnreadableImage,
    collect_notes,
    decode_image,
    image_size,
    load_image,
)
from latentcodec.pixels import decode as decoding


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_read_with_a_note(options, mode):
    whole = encoded(picture(mode=mode), "JPEG", **options)
    for tail in (b"", b"\xff"):
        with collect_notes() as notes:
            pixels = decode_image(whole[:-2] + tail, name="photo")
        assert torch.equal(pixels, decode_image(whole))
        assert notes == ["photo: no end marker; its pixels are whole"]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
@pytest.mark.parametrize("missing", [3, 4, 6, 20, 0.5])
def test_a_jpeg_that_lacks_pixels_is_refused(options, missing):
    whole = encoded(picture(), "JPEG", **options)
    cut = len(whole) - missing if missing >= 1 else int(len(whole) * missing)
    with pytest.raises(UnreadableImage, match="photo: "):
        decode_image(whole[:cut], name="photo")


def test_a_progressive_jpeg_that_lacks_its_last_scans_is_refused():
    whole = encoded(picture(), "JPEG", progressive=True)
    starts = [i for i in range(len(whole)) if whole[i : i + 2] == b"\xff\xda"]
    for start in starts[1:]:
        with pytest.raises(UnreadableImage):
            decode_image(whole[:start])


def test_what_follows_the_end_of_a_jpeg_is_nobodys_business():
    whole = encoded(picture(), "JPEG")
    video = random.Random(0).randbytes(1000) + b"\xff\xda" * 200
    with collect_notes() as notes:
        assert torch.equal(decode_image(whole + video), decode_image(whole))
        assert torch.equal(decode_image(whole + bytes(100)), decode_image(whole))
    assert notes == []


def test_a_jpeg_of_thousands_of_scans_is_refused_before_they_are_decoded():
    whole = encoded(picture((512, 512)), "JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    scan = whole[start:-2]
    sound = whole[:start] + scan * 20 + b"\xff\xd9"
    assert decode_image(sound).shape == (3, 512, 512)
    with pytest.raises(UnreadableImage, match="more than 100 scans"):
        decode_image(whole[:start] + scan * 5000 + b"\xff\xd9")


@pytest.mark.parametrize("options", [{}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}], ids=["plain", "extended"])
def test_a_webp_that_is_broken_behind_its_picture_is_read_with_a_note(options):
    whole = encoded(picture(), "WEBP", lossless=True, **options)
    longer = whole[:4] + struct.pack("<I", len(whole) + 100) + whole[8:]
    for file in (longer, longer + b"EXIF\xff\0\0\0abc", whole[:-1] if not options else longer):
        with collect_notes() as notes:
            assert torch.equal(decode_image(file, name="photo"), decode_image(picture()))
        assert notes[0] == "photo: a length beyond the end of the file; its picture is whole"
    with pytest.raises(UnreadableImage):
        decode_image(whole[: len(whole) // 2])


def test_a_gif_of_40_bytes_has_no_canvas_of_80_million_pixels():
    head = b"GIF89a" + struct.pack("<HHBBB", 9000, 9000, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    file = head + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0;"
    with pytest.raises(UnreadableImage, match="photo: a canvas of 9000 x 9000 pixels"):
        decode_image(file, name="photo")
    sound = encoded(Image.new("P", (3000, 3000)), "GIF")  # one colour, packed as far as GIF can
    assert decode_image(sound).shape == (3, 3000, 3000)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    for path, kind in {
        tmp_path / "fifo.jpg": "FIFO",
        "/dev/zero": "device",
        "/dev/urandom": "device",
    }.items():
        with pytest.raises(UnreadableImage, match=f"a {kind}, not a file"):
            load_image(path)
        with pytest.raises(UnreadableImage, match=f"a {kind}, not a file"):
            image_size(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
        with pytest.raises(UnreadableImage, match=r"socket\.jpg"):
            load_image(tmp_path / "socket.jpg")


# ---- memory


@pytest.mark.parametrize("mode", ["P", "RGBA", "L", "I;16", "RGB"])
def test_decoding_holds_little_more_than_its_result(mode):
    file = encoded(Image.new(mode, (3000, 3000)), "PNG")
    with Image.open(io.BytesIO(file)) as image:
        image.load()
        tracemalloc.start()  # numpy's and Python's memory; torch's result is counted by its size below
        decode_image(image)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3000 * 3000 * 4  # a band, not a second picture


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bands_change_no_bit(mode, channels, monkeypatch):
    image = Image.fromarray(np.arange(1536, dtype=np.uint16).reshape(32, 48) * 42)
    image = image if mode == "I;16" else picture().convert("RGB").convert(mode)
    if mode == "P":
        image = Image.open(io.BytesIO(encoded(image, "PNG", transparency=3)))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(image, "TIFF" if mode == "CMYK" else "PNG", exif=exif.tobytes())
    expected = decode_image(file, channels)
    monkeypatch.setattr(decoding, "BAND_PIXELS", 100)
    assert torch.equal(decode_image(file, channels), expected)


# ---- notes and warnings


def test_warnings_of_pillow_get_the_name_of_the_file():
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0f\x01\x02\0\xff\xff\0\0\x20\0\0\0\0\0\0\0"  # a text beyond the end
    )
    with pytest.warns(ImageWarning, match="holiday: ") as caught:
        decode_image(encoded(picture(), "JPEG", exif=exif), name="holiday")
    assert {str(warning.message).partition(":")[0] for warning in caught} == {"holiday"}


def test_notes_are_collected_by_each_thread_for_itself():
    found = {}

    def work(name):
        with collect_notes() as notes:
            for _ in range(20):
                decode_image(png(end=False), name=name)
        found[name] = notes

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {str(i): [f"{i}: no end marker"] for i in range(4)}
