"""A file whose pixels are whole is read, whatever else is broken in it; what is not whole, or has no end, is refused.

Broken files are written by hand after the PNG and JPEG specifications; the pixels to expect are the sound file's.
"""

import io
import os
import random
import socket
import struct
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from latentcodec.pixels import (
    ImageWarning,
    UnreadableImage,
    collect_notes,
    decode_image,
    image_size,
    jxl,
    load_image,
)
from latentcodec.pixels import decode as decoding
from latentcodec.pixels.containers import HEIF, JPEG_XL, enable

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def picture(size=(48, 32), mode="RGB"):
    """Smooth colours, so that JPEG keeps them."""
    random_ = np.random.default_rng(0)
    small = Image.fromarray(random_.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, data, broken=False):
    checksum = zlib.crc32(kind + data) ^ int(broken)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(*extra, after=b"", end=True, body=None):
    """A PNG of `picture()` with chunks between its header and its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(picture()))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 32, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows)) if body is None else body
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + after + chunk(b"IEND", b"") * end


HUGE = b"x" * 3_000_000
BEFORE = {
    "tEXt of 3 MB": chunk(b"tEXt", b"workflow\0" + HUGE),
    "zTXt of 3 MB": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(HUGE)),
    "iTXt of 3 MB": chunk(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(HUGE)),
    "iTXt of 3 MB, not packed": chunk(b"iTXt", b"workflow\0\0\0en\0\0" + HUGE),
    "XMP of 3 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(HUGE)),
    "65 texts of 1 MB": b"".join(chunk(b"tEXt", b"%d\0" % i + HUGE[:1_000_000]) for i in range(65)),
    "text packed in an unknown way": chunk(b"zTXt", b"Raw profile type exif\0\7abc"),
    "text that cannot be unpacked": chunk(b"zTXt", b"Raw profile type exif\0\0abc"),
    "text without a key": chunk(b"tEXt", b"\xff\xfe"),
    "private chunk": chunk(b"prVt", b"\0\1\2"),
    "animation of no frame": chunk(b"acTL", bytes(8)),
    "animation out of order": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 9, 48, 32, 0, 0, 1, 1, 0, 0)),
    "short animation": chunk(b"acTL", b"\0"),
    "short gamma": chunk(b"gAMA", b"\0"),
    "short chromaticities": chunk(b"cHRM", b"\0"),
    "short density": chunk(b"pHYs", b"\0"),
    "empty sRGB": chunk(b"sRGB", b""),
}
NOTED = {
    **{
        f"wrong checksum in {kind.decode()}": (
            chunk(kind, data, broken=True),
            f"checksum in its {kind.decode()}",
        )
        for kind, data in {
            b"tEXt": b"a\0b",
            b"zTXt": b"a\0\0b",
            b"iTXt": b"a\0\0\0\0\0b",
            b"tIME": bytes(7),
            b"pHYs": bytes(9),
            b"eXIf": b"II*\0\x08\0\0\0\0\0",
            b"iCCP": b"sRGB\0\0" + zlib.compress(SRGB),
            b"prVt": b"abc",
        }.items()
    },
    "profile that cannot be unpacked": (chunk(b"iCCP", b"p\0\0abcd"), "ICC profile"),
    "profile of 100 MB": (
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(100_000_000))),
        "ICC profile of more",
    ),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_chunks_that_pixels_do_not_need_cost_nothing(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_image(png(BEFORE[kind])), decode_image(picture()))
        assert image_size(png(BEFORE[kind])) == (32, 48)


@pytest.mark.parametrize("kind", NOTED)
def test_broken_chunks_that_pixels_do_not_need_cost_a_note(kind):
    broken, words = NOTED[kind]
    with pytest.warns(ImageWarning, match=f"photo: .*{words}"):
        assert torch.equal(decode_image(png(broken), name="photo"), decode_image(picture()))


def test_a_large_profile_is_followed():
    swapped = SRGB.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")
    large = struct.pack(">I", len(swapped) + 2_000_000) + swapped[4:] + bytes(2_000_000)
    file = png(chunk(b"iCCP", b"p\0\0" + zlib.compress(large)))
    assert torch.equal(
        decode_image(file), decode_image(png(chunk(b"iCCP", b"p\0\0" + zlib.compress(swapped))))
    )
    assert not torch.equal(decode_image(file), decode_image(picture()))


@pytest.mark.parametrize(
    "file",
    [
        png(end=False),
        png(end=False, after=b"garbage behind the pixels"),
        png(end=False, after=chunk(b"tEXt", b"a\0" + b"b" * 99)[:40]),
        png(end=False, after=b"\0\0\0"),
        encoded(picture(), "PNG")[:-12],
    ],
)
def test_a_png_that_is_broken_behind_its_pixels_is_read_with_a_note(file):
    with collect_notes() as notes:
        assert torch.equal(decode_image(file, name="photo"), decode_image(picture()))
    assert notes == ["photo: no end marker"]


@pytest.mark.parametrize(
    "file",
    [
        png(chunk(b"tRNS", bytes(6), broken=True)),
        png(chunk(b"PLTE", bytes(6), broken=True)),
        png(body=b""),
        encoded(picture(), "PNG")[:-40],
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 32, 8, 2, 0, 0, 0), broken=True),
    ],
)
def test_a_png_whose_pixels_are_in_doubt_is_refused(file):
    with pytest.raises(UnreadableImage, match="photo: "):
        decode_image(file, name="photo")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_has_the_bit_depth_of_the_picture(bits):
    samples = np.random.default_rng(0).integers(0, 2**bits, (8, 16))
    rows = b""
    for row in samples:
        binary = "".join(format(sample, f"0{bits}b") for sample in row)
        rows += b"\0" + int(binary, 2).to_bytes(len(binary) // 8, "big")
    for transparent in {0, 1, 2**bits - 1, int(samples[0, 0])}:
        for value in (
            transparent,
            transparent | 2**bits if bits < 16 else transparent,
        ):  # only the low bits count
            file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, bits, 0, 0, 0, 0))
            file += (
                chunk(b"tRNS", struct.pack(">H", value))
                + chunk(b"IDAT", zlib.compress(rows))
                + chunk(b"IEND", b"")
            )
            expected = np.where(samples == transparent, 1.0, samples / (2**bits - 1) * 2 - 1)
            assert np.abs(decode_image(file, 1)[0].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_has_the_bit_depth_of_the_picture(bits):
    samples = np.random.default_rng(0).integers(0, 2**bits, (4, 6, 3)).astype(f">u{bits // 8}")
    samples[1, 1] = samples[2, 3]
    samples[0, 0] = samples[2, 3]
    samples[0, 0, 1] ^= 1  # differs in its lowest bit alone
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    key = struct.pack(">HHH", *map(int, samples[2, 3]))
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 4, bits, 2, 0, 0, 0))
    file += chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    alpha = decode_image(file, 4)[3] > 0
    assert torch.equal(alpha, torch.from_numpy((samples != samples[2, 3]).any(2)))
    expected = samples.astype(np.float64).transpose(2, 0, 1) / (2**bits - 1) * 2 - 1
    assert np.abs(decode_image(file, 4)[:3].numpy() - expected).max() <= 2 / 255


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


def test_what_is_no_regular_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.jpg"))
    for path, kind in {
        tmp_path / "fifo.jpg": "FIFO",
        "/dev/zero": "device",
        "/dev/urandom": "device",
    }.items():
        with pytest.raises(UnreadableImage, match=f"a {kind}, not a file"):
            load_image(path)
        with pytest.raises(UnreadableImage, match=f"a {kind}, not a file"):
            image_size(path)
    with pytest.raises(UnreadableImage, match=r"socket\.jpg"):
        load_image(tmp_path / "socket.jpg")
    listening.close()


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


@pytest.mark.parametrize("plugin", [HEIF, JPEG_XL], ids=lambda plugin: plugin.format)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_formats_of_the_extra_are_read_upright(plugin, orientation):
    pytest.importorskip(plugin.module)
    assert enable(plugin)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {"exif": exif.tobytes()} if plugin is HEIF else {}
    file = encoded(picture(), plugin.format, quality=95, **turned)
    tagged = Image.open(io.BytesIO(encoded(picture(), "PNG", **turned)))
    expected = decode_image(ImageOps.exif_transpose(tagged))
    assert image_size(file) == expected.shape[1:]
    assert (decode_image(file) - expected).abs().mean() < 0.05


SIZES = [
    (1, 1),
    (8, 8),
    (48, 32),
    (33, 17),
    (600, 1),
    (1, 600),
    (520, 390),
    (640, 360),
    (1200, 1000),
    (3, 9000),
]


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"use_container": True}], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_size_that_a_jpeg_xl_file_states_is_that_of_its_picture(size, options):
    pytest.importorskip(JPEG_XL.module)
    assert enable(JPEG_XL)
    file = encoded(Image.new("RGB", size, (9, 200, 3)), "JXL", effort=1, **options)
    assert jxl.stated_size(file) == size


def test_a_jpeg_xl_file_that_states_no_size_is_refused():
    for start in (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x03jxlc"):
        with pytest.raises(ValueError, match="does not say how large"):
            jxl.stated_size(start)


@pytest.mark.parametrize("plugin", [HEIF, JPEG_XL], ids=lambda plugin: plugin.format)
def test_a_picture_too_large_is_refused_before_its_pixels_are_decoded(plugin, monkeypatch):
    """Noise-free, 40 million pixels are a few kilobytes of JPEG XL."""
    pytest.importorskip(plugin.module)
    assert enable(plugin)
    file = encoded(picture(), plugin.format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    decoder = {"HEIF": "pillow_heif.HeifImageFile.load", "JXL": "pillow_jxl.JpegXLImagePlugin.Decoder"}[
        plugin.format
    ]
    monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImage, match=r"1536 pixels( \(48 x 32\) are more than|\) exceeds limit)"):
        decode_image(file)


def test_a_jpeg_packed_as_jpeg_xl_keeps_the_turn_in_its_exif(tmp_path):
    pytest.importorskip(JPEG_XL.module)
    assert enable(JPEG_XL)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    picture().save(path, exif=exif.tobytes(), quality=95)
    with Image.open(path) as image:
        packed = encoded(image, "JXL", lossless_jpeg=True)
    torch.testing.assert_close(decode_image(packed), load_image(path)[0])


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\0\0\0\x18ftypheic", "HEIF picture needs the package pillow-heif"),
        (b"\xff\x0a", "JXL picture needs"),
    ],
)
def test_a_format_without_its_package_says_what_to_install(start, words, monkeypatch):
    monkeypatch.setattr("latentcodec.pixels.containers.enable", lambda plugin: False)
    with pytest.raises(UnreadableImage, match=rf"photo: a {words}.*pip install 'latentcodec\[formats\]'"):
        decode_image(start + bytes(100), name="photo")
