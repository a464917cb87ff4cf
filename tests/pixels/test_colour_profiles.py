"""ICC profiles are followed to sRGB as the ICC and CIE formulas say; those that are broken cost a warning."""

import io
import struct

import numpy as np
import pytest
import torch
from encoded_pictures import LEVEL, RAMP16, SRGB, close, encoded, noise, pixels_of, swapped_primaries
from PIL import Image

from latentcodec.pixels import decode_image, load_image


def profile(space, connection, device_class, tags):
    """A version 2 ICC profile, written out by hand."""
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x",
        offset + len(body),
        b"lcms",
        0x02100000,
        device_class,
        space,
        connection,
        b"acsp",
    )
    return head + white + bytes(128 - len(head) - len(white)) + struct.pack(">I", len(tags)) + table + body


def linear_grey():
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    return profile(
        b"GRAY", b"XYZ ", b"mntr", {b"wtpt": white, b"kTRC": b"curv" + bytes(4) + struct.pack(">IH", 1, 256)}
    )


def black_ink_in_lightness():
    """CMYK where black ink alone counts, in equal steps of L*: 100 for none, 0 for all of it."""
    straight = bytes(range(256))
    nodes = b"".join(
        bytes([0 if node & 1 else 255, 128, 128]) for node in range(16)
    )  # K is the fastest index
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + straight * 4 + nodes + straight * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)
    return profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": white, b"A2B0": table})


def srgb_curve(linear):
    """IEC 61966-2-1: light to the value that is stored, both in 0..1."""
    return np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PIL"])
def test_a_profile_is_followed_to_srgb(file_format):
    data = encoded(noise(), "PNG" if file_format == "PIL" else file_format, icc_profile=swapped_primaries())
    x = decode_image(Image.open(io.BytesIO(data)) if file_format == "PIL" else data)
    close(x, pixels_of(noise())[[1, 0, 2]], levels=1.01)


def test_a_profile_leaves_alpha_alone():
    x = decode_image(encoded(noise("RGBA"), "PNG", icc_profile=swapped_primaries()), channels=4)
    close(x[3:], pixels_of(noise("RGBA"))[3:])
    close(x[:3], pixels_of(noise("RGBA"))[[1, 0, 2]], levels=1.01)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_profile_is_followed_to_srgb(bits):
    ramp = RAMP16[16:] if bits == 16 else np.arange(256, dtype=np.uint8)[None]
    x = decode_image(encoded(Image.fromarray(ramp), "PNG", icc_profile=linear_grey()), channels=1)
    expected = srgb_curve(ramp / (2**bits - 1)) * 2 - 1
    close(x[0], torch.from_numpy(expected).float(), levels=1.01)


def test_a_cmyk_jpeg_follows_its_profile_and_without_one_pillow():
    ramp = np.zeros((8, 256, 4), dtype=np.uint8)
    ramp[..., 3] = np.arange(256)
    image = Image.frombytes("CMYK", (256, 8), ramp.tobytes())
    bare = encoded(image, "JPEG", quality=100)
    with Image.open(io.BytesIO(bare)) as stored:
        black = np.asarray(stored)[..., 3].astype(np.float64)
        close(decode_image(bare), pixels_of(stored.convert("RGB")))
    lightness = 100 * (1 - black / 255)
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)  # CIE 1976
    expected = torch.from_numpy(srgb_curve(light) * 2 - 1).float().expand(3, -1, -1)
    x = decode_image(encoded(image, "JPEG", quality=100, icc_profile=black_ink_in_lightness()))
    close(x, expected, levels=2)
    assert (x - decode_image(bare)).abs().max() > 5 * LEVEL


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_srgb_profile_changes_no_bit(mode):
    assert torch.equal(decode_image(encoded(noise(mode), "PNG", icc_profile=SRGB)), decode_image(noise(mode)))


@pytest.mark.parametrize(
    "broken", [b"garbage" * 50, SRGB[:200], SRGB[:128] + bytes(400), linear_grey(), black_ink_in_lightness()]
)
def test_a_profile_that_cannot_be_used_costs_a_warning_and_no_pixels(tmp_path, broken):
    path = tmp_path / "photo.png"
    noise().save(path, icc_profile=broken)
    with pytest.warns(UserWarning, match=r"photo\.png: broken ICC profile"):
        x = load_image(path)
    close(x[0], pixels_of(noise()))
