"""A PNG whose pixels are whole is read, whatever else is broken in it; one whose pixels are in doubt is refused."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from encoded_pictures import SRGB, encoded
from handmade_files import chunk, picture, png

from latentcodec.pixels import ImageWarning, UnreadableImage, collect_notes, decode_image, image_size

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
