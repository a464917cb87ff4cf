"""Pictures become pixels as Pillow, the ICC formulas and the bits of the file say, or they are refused."""

import io
import os
import pickle
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageFile, ImageOps

from latentcodec import files
from latentcodec.pixels import (
    UnreadableImage,
    crop,
    crop_middle,
    decode_image,
    find_images,
    from_uint8,
    image_grid,
    image_size,
    load_image,
    pad_to_multiple,
    save_image,
    to_uint8,
)

LEVEL = 2 / 255  # one 8-bit step in [-1, 1]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(mode="RGB", size=(7, 5), seed=0):
    """A picture of random pixels, width 7 and height 5, so that every turn shows."""
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(pixels[..., i])) for i in range(bands)])


def encoded(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixels_of(image):
    """[C, H, W] in [-1, 1] of an 8-bit L or RGB image: the definition, in float64."""
    values = np.asarray(image).astype(np.float64)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return torch.from_numpy(values / 255 * 2 - 1).float()


def close(actual, expected, levels=1e-4):
    """Within so many 8-bit steps, everywhere."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= levels * LEVEL


# ----------------------------------------------------------------------------------------------------------
# Tensors


def test_256_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1, 1]


def test_to_uint8_rounds_to_the_nearest_level_and_clamps():
    x = torch.linspace(-1.5, 1.5, 10001, dtype=torch.float64)
    expected = np.clip(np.rint(127.5 * (x.numpy() + 1)), 0, 255)
    assert np.abs(to_uint8(x).numpy() - expected).max() <= 1  # float32 may fall to the other side of a half
    assert (to_uint8(x).numpy() != expected).sum() <= 5
    assert to_uint8(torch.tensor([-1e9, 1e9])).tolist() == [0, 255]
    half = from_uint8(torch.arange(256, dtype=torch.uint8)).bfloat16()
    assert torch.equal(to_uint8(half), to_uint8(half.float()))  # the sum is not rounded to bfloat16 once more


@pytest.mark.parametrize("size", [(1, 1), (7, 16), (16, 9), (13, 31), (16, 32)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_padding_equals_replicate_padding_and_crop_undoes_it(size, memory_format):
    x = torch.rand(2, 3, *size).to(memory_format=memory_format)
    rows, columns = -size[0] % 8, -size[1] % 8
    padded = pad_to_multiple(x, 8)
    assert torch.equal(padded, F.pad(x, (0, columns, 0, rows), mode="replicate"))
    assert torch.equal(crop(padded, size), x)
    assert torch.equal(pad_to_multiple(x[0, 0], 8), padded[0, 0])  # any number of leading dimensions


def test_an_aligned_picture_is_not_copied():
    x = torch.rand(1, 3, 16, 8)
    assert pad_to_multiple(x, 8) is x


@pytest.mark.parametrize(
    ("height", "width", "side", "rows", "columns"),
    [
        (10, 16, 4, (3, 7), (6, 10)),
        (9, 7, 4, (2, 6), (1, 5)),  # an odd rest: one more below and on the right
        (3, 12, 6, (0, 3), (3, 9)),  # a side that is shorter is whole
        (5, 5, 5, (0, 5), (0, 5)),
    ],
)
def test_the_middle_is_exactly_in_the_middle(height, width, side, rows, columns):
    image = torch.arange(3 * height * width).view(3, height, width)
    part = crop_middle(image, side)
    assert torch.equal(part, image[:, rows[0] : rows[1], columns[0] : columns[1]])
    assert part.shape[-2:] == (min(side, height), min(side, width))


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (0, 8), (8, -1)])
def test_crop_refuses_a_size_that_is_not_inside(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels .* 8 x 8"):
        crop(torch.zeros(1, 3, 8, 8), size)


def test_a_grid_holds_its_images_with_white_between():
    images = [torch.rand(3, 4, 6) - 1 for _ in range(5)]
    grid = image_grid(images, columns=3)
    assert grid.shape == (3, 2 * 4 + 2, 3 * 6 + 2 * 2)
    covered = torch.zeros(grid.shape[1:], dtype=torch.bool)
    for i, image in enumerate(images):
        rows, columns = slice(i // 3 * 6, i // 3 * 6 + 4), slice(i % 3 * 8, i % 3 * 8 + 6)
        assert torch.equal(grid[:, rows, columns], image)
        covered[rows, columns] = True
    assert (grid[:, ~covered] == 1).all()


def test_a_grid_is_no_wider_than_its_images():
    assert image_grid([torch.zeros(1, 4, 6)] * 2, columns=8).shape == (1, 4, 14)


@pytest.mark.parametrize("shapes", [[], [(3, 4, 4), (3, 4, 5)]])
def test_a_grid_refuses_no_images_and_unequal_ones(shapes):
    with pytest.raises(ValueError, match="grid"):
        image_grid([torch.zeros(shape) for shape in shapes], columns=2)


# ----------------------------------------------------------------------------------------------------------
# What a file says, read exactly


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_equal_pillows_own_conversion_to_rgb(mode):
    image = noise("CMYK") if mode == "CMYK" else noise().convert(mode)
    close(decode_image(image), pixels_of(image.convert("RGB")))


def test_one_channel_is_the_luma_and_grey_stays_as_it_is():
    rgb, grey = noise("RGB"), noise("L")
    red, green, blue = pixels_of(rgb)
    close(decode_image(rgb, channels=1), (0.299 * red + 0.587 * green + 0.114 * blue)[None])
    close(decode_image(rgb, channels=1), pixels_of(rgb.convert("L")), levels=0.51)
    assert torch.equal(decode_image(grey, channels=1), from_uint8(torch.from_numpy(np.array(grey)))[None])


def tiff16(values, bits, white_is_zero=False, order="<"):
    """A little uncompressed TIFF of 12 or 16-bit grey, written out by hand."""
    height, width = values.shape
    if bits == 16:
        data = values.astype(order + "u2").tobytes()
    else:
        pairs = values.reshape(-1, 2).tolist()
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1, 278: height}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 279: len(data)}
    entries = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IH", 8, 9) + b"".join(entries) + bytes(4) + data


RAMP16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray(RAMP16), "PNG"),
        encoded(Image.fromarray(RAMP16), "TIFF", compression="tiff_deflate"),
        tiff16(RAMP16, 16),
        tiff16(RAMP16, 16, order=">"),
        tiff16(65535 - RAMP16, 16, white_is_zero=True),
        Image.fromarray(RAMP16),
    ],
    ids=["PNG", "TIFF deflate", "TIFF", "TIFF big-endian", "TIFF white is zero", "PIL"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_keeps_all_its_levels(source, channels):
    x = decode_image(source, channels)
    expected = torch.from_numpy(RAMP16.astype(np.float64) / 65535 * 2 - 1)
    assert (x.double() - expected).abs().max() <= 2 / 65535 / 8  # the range is 2 wide
    assert len(x[0].unique()) == 65536


def test_12_bit_grey_reaches_from_black_to_white():
    ramp = np.arange(4096).reshape(64, 64)
    x = decode_image(tiff16(ramp, 12), channels=1)
    assert (x[0].double() - torch.from_numpy(ramp / 4095 * 2 - 1)).abs().max() < 1e-6


def test_16_bit_colour_is_read_to_the_8_bits_that_pillow_keeps():
    rgb16 = np.random.default_rng(0).integers(0, 65536, (4, 6, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in rgb16)
    x = decode_image(png(struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0), rows))
    expected = rgb16.astype(np.float64).transpose(2, 0, 1) / 65535 * 2 - 1
    close(x, torch.from_numpy(expected).float(), levels=1)


def png(header, rows, *chunks):
    """A PNG from its header and its unfiltered rows, with more chunks before the picture."""
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "PNG 16 bit", "PIL"])
def test_every_exif_orientation_equals_exif_transpose(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(RAMP16[:5, :7]) if file_format == "PNG 16 bit" else noise()
    data = encoded(image, "PNG" if file_format == "PIL" else file_format.split()[0], exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.array(ImageOps.exif_transpose(stored), dtype=np.float64)
    expected = expected[None] / 65535 if expected.ndim == 2 else expected.transpose(2, 0, 1) / 255
    x = decode_image(Image.open(io.BytesIO(data)) if file_format == "PIL" else data, channels=len(expected))
    close(x, torch.from_numpy(expected * 2 - 1).float())


def test_broken_exif_data_cost_a_warning_and_no_pixels(tmp_path):
    path = tmp_path / "photo.png"
    noise().save(path, exif=b"Exif\0\0garbage instead of a directory")
    with pytest.warns(UserWarning, match=r"photo\.png: broken EXIF"):
        x = load_image(path)
    close(x[0], pixels_of(noise()))
    with pytest.warns(UserWarning, match=r"photo\.png: broken EXIF"):
        assert image_size(path) == x.shape[2:]


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_size_in_the_header_is_that_of_the_picture(orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), file_format, exif=exif.tobytes())
    assert image_size(data) == decode_image(data).shape[1:]


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_read(file_format):
    flat = [Image.new("RGB", (16, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(flat[0], file_format, save_all=True, append_images=flat[1:], **lossless)
    close(decode_image(data), pixels_of(flat[0]), levels=2)  # MPO is a JPEG


def test_a_path_its_bytes_and_its_picture_give_the_same_pixels(tmp_path):
    path = tmp_path / "photo.webp"
    noise("RGBA").save(path, lossless=True)
    x = load_image(path)
    assert x.shape == (1, 3, 5, 7)
    assert x.dtype == torch.float32
    assert torch.equal(decode_image(str(path)), x[0])
    assert torch.equal(decode_image(path.read_bytes()), x[0])
    with Image.open(path) as image:
        assert torch.equal(decode_image(image), x[0])
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0)) == noise("RGBA").getpixel((0, 0))  # neither closed nor changed


# ----------------------------------------------------------------------------------------------------------
# Transparency


def with_colour_key(image, key):
    return Image.open(io.BytesIO(encoded(image, "PNG", transparency=key)))


def palette_with_alphas():
    image = noise().quantize(8)
    return with_colour_key(image, bytes([0, 64, 128, 255]))


TRANSPARENT = {
    "RGBA": lambda: noise("RGBA"),
    "LA": lambda: noise("LA"),
    "PA": lambda: noise("RGBA").convert("PA"),
    "RGBa": lambda: noise("RGBA").convert("RGBa"),
    "La": lambda: noise("LA").convert("La"),
    "LA in TIFF": lambda: Image.open(io.BytesIO(encoded(noise("LA"), "TIFF"))),
    "palette with alphas": palette_with_alphas,
    "palette with a key": lambda: with_colour_key(noise().quantize(8), 3),
    "grey with a key": lambda: with_colour_key(noise("L"), noise("L").getpixel((3, 2))),
    "RGB with a key": lambda: with_colour_key(noise(), noise().getpixel((3, 2))),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_are_composited_on_white(kind):
    rgba = TRANSPARENT[kind]()
    rgba = (
        np.asarray((rgba.convert("LA") if rgba.mode == "La" else rgba).convert("RGBA")).astype(np.float64)
        / 255
    )
    assert (rgba[..., 3] < 1).any()
    expected = torch.from_numpy(rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]).permute(2, 0, 1) * 2 - 1
    close(decode_image(TRANSPARENT[kind]()), expected.float())
    luma = torch.einsum("chw,c->hw", expected, torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))
    close(decode_image(TRANSPARENT[kind](), channels=1), luma[None].float())


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_four_channels_keep_alpha_and_the_colour_below_it(kind):
    image = TRANSPARENT[kind]()
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    close(decode_image(TRANSPARENT[kind](), channels=4), pixels_of(rgba))


def test_16_bit_grey_with_a_transparent_value_is_composited():
    ramp = RAMP16[100:104, :6]
    x = decode_image(encoded(Image.fromarray(ramp), "PNG", transparency=int(ramp[2, 3])), channels=1)
    expected = torch.from_numpy(ramp.astype(np.float64) / 65535 * 2 - 1)[None].float()
    expected[0, 2, 3] = 1
    assert (x - expected).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_alpha_of_an_opaque_picture_is_one(mode):
    assert (decode_image(noise(mode), channels=4)[3] == 1).all()


# ----------------------------------------------------------------------------------------------------------
# Colour profiles


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


def swapped_primaries():
    """sRGB whose red is called green and whose green is called red."""
    return SRGB.replace(b"rXYZ", b"tmp.").replace(b"gXYZ", b"rXYZ").replace(b"tmp.", b"gXYZ")


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


# ----------------------------------------------------------------------------------------------------------
# What cannot be read


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels_are_a_mistake_of_the_caller(channels):
    with pytest.raises(ValueError, match=f"channels={channels}") as caught:
        decode_image(noise(), channels)
    assert not isinstance(caught.value, UnreadableImage)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_a_mode_without_a_meaning_is_refused_by_name(mode, tmp_path):
    path = tmp_path / "odd.tif"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(UnreadableImage, match=rf"odd\.tif: mode '{mode}'"):
        load_image(path)


@pytest.mark.parametrize("file_format", ["PPM", "ICO", "TGA", "PCX", "EPS", "PDF", "JPEG2000"])
def test_formats_off_the_list_are_refused(file_format, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(noise(size=(32, 32)), file_format))
    with pytest.raises(UnreadableImage, match=r"photo\.jpg: .*not an image"):
        load_image(path)


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow only warns of the first
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_decompression_bomb_is_refused_with_its_pixel_count(side, action):
    bomb = png(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), b"")
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(UnreadableImage, match=f"photo: .*{side * side}"):
            decode_image(bomb, name="photo")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_the_callers(monkeypatch):
    data = encoded(noise(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with pytest.raises(UnreadableImage, match=r"35 pixels"):
        decode_image(data)
    assert Image.MAX_IMAGE_PIXELS == 34
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data).shape == (3, 5, 7)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_refused(file_format, share, tmp_path):
    data = encoded(noise(size=(64, 64)), file_format)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UnreadableImage, match=r"photo\.jpg: \w"):
        load_image(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file"),
        ("folder", "Is a directory"),
        ("empty", "empty"),
        ("text", "not an image"),
        ("nul\0byte", "embedded null"),
    ],
)
def test_what_is_no_image_is_refused_with_file_and_reason(kind, reason, tmp_path):
    path = tmp_path / f"{kind}.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "text"):
        path.write_text("" if kind == "empty" else "not a photograph " * 100)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).count(str(tmp_path)) == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # data workers send it home


def test_two_channels_are_grey_and_alpha_or_refused_by_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "two.tif"
    Image.new("LA", (4, 4), (100, 255)).save(path)
    torch.testing.assert_close(load_image(path), torch.full((1, 3, 4, 4), 100 / 127.5 - 1))
    extra_samples = b"\x52\x01\x03\x00\x01\x00\x00\x00"  # tag 338, which says that the second is alpha
    data = path.read_bytes()
    assert data.count(extra_samples) == 1
    path.write_bytes(data.replace(extra_samples, b"\x53\x01" + extra_samples[2:]))
    with pytest.raises(UnreadableImage, match=r"two\.tif: .* such as two of which none is alpha"):
        load_image(path)


def test_a_failure_without_words_is_named_by_its_type():
    class Huge(Image.Image):
        def load(self):
            raise MemoryError

    with pytest.raises(UnreadableImage, match="scan: MemoryError"):
        decode_image(Huge(), name="scan")


def test_a_source_that_is_nothing_we_know_is_refused_by_its_type():
    with pytest.raises(UnreadableImage, match="NoneType"):
        decode_image(None)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused_and_never_anything_else(capfd):
    chance = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    extras = {"exif": exif.tobytes(), "icc_profile": swapped_primaries()}
    picture = noise(size=(24, 16))
    seeds = [encoded(picture, f, **extras) for f in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
    seeds += [
        encoded(picture.quantize(16), "PNG", transparency=1),
        encoded(Image.fromarray(RAMP16[:9, :9]), "PNG"),
    ]
    seeds += [
        encoded(picture, "GIF"),
        encoded(picture, "BMP"),
        encoded(picture, "TIFF", compression="tiff_lzw"),
    ]
    outcomes = {"read": 0, "refused": 0}
    for trial in range(400):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if trial % 4 == 0:
            del data[chance.randrange(len(data)) :]
        try:
            x = decode_image(bytes(data), channels=chance.choice([1, 3, 4]))
        except UnreadableImage:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert x.abs().max() <= 1 + 1e-6
    assert min(outcomes.values()) >= 40, outcomes
    capfd.readouterr()  # libtiff complains on the process's own stderr


# ----------------------------------------------------------------------------------------------------------
# Files that are written, folders that are searched


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_saved_without_loss_is_loaded_bit_for_bit(suffix, channels, tmp_path):
    levels = torch.randint(0, 256, (1, channels, 9, 13), dtype=torch.uint8)
    levels[:, 3:, ::2] = 0  # invisible pixels keep their colour
    path = tmp_path / "new" / "folder" / f"picture{suffix}"
    save_image(from_uint8(levels), path)
    assert torch.equal(to_uint8(load_image(path, channels)), levels)
    save_image(from_uint8(levels)[0], path)  # without the batch, over the earlier one
    assert torch.equal(to_uint8(load_image(path, channels)), levels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_jpeg_is_close_and_pixels_out_of_range_are_clamped(tmp_path):
    smooth = torch.linspace(-1.2, 1.2, 64).expand(1, 3, 64, 64)
    for name in ("a.jpg", "a.jpeg"):
        save_image(smooth.bfloat16().requires_grad_(), tmp_path / name)
        close(load_image(tmp_path / name), smooth.clamp(-1, 1), levels=4)


@pytest.mark.parametrize(
    ("x", "name", "words"),
    [
        (torch.zeros(3, 4, 4), "a.gif", r"\.png.*'\.gif'"),
        (torch.zeros(3, 4, 4), "a", r"not as ''"),
        (torch.zeros(2, 3, 4, 4), "a.png", r"\[2, 3, 4, 4\]"),
        (torch.zeros(2, 4, 4), "a.png", r"\[2, 4, 4\]"),
        (torch.zeros(3, 0, 4), "a.png", r"\[3, 0, 4\]"),
        (torch.zeros(4, 4), "a.png", r"\[4, 4\]"),
        (torch.full((3, 4, 4), torch.nan), "a.png", "NaN"),
        (torch.zeros(4, 4, 4), "a.jpg", "JPEG"),
        (torch.zeros(1, 1, 17_000), "a.webp", "WEBP"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_leaves_nothing(x, name, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        save_image(x, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "replace"])
def test_an_interrupted_save_leaves_the_earlier_file_and_no_litter(error, where, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_image(torch.zeros(3, 8, 8), path)
    before = path.read_bytes()

    def half(path, content, durable):
        path.write_bytes(content[: len(content) // 2])
        raise error

    def fail(*_):
        raise error

    monkeypatch.setattr(*((files, "write_file", half) if where == "write" else (os, "replace", fail)))
    with pytest.raises(type(error)) as caught:
        save_image(torch.ones(3, 8, 8), path)
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == before
    assert isinstance(error, KeyboardInterrupt) or str(path) in str(caught.value)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_saved_file_honours_the_umask(umask, mode, tmp_path):
    earlier = os.umask(umask)
    try:
        save_image(torch.zeros(3, 4, 4), tmp_path / "picture.png")
    finally:
        os.umask(earlier)
    assert (tmp_path / "picture.png").stat().st_mode & 0o777 == mode


def test_images_are_found_in_subfolders_in_order_and_hidden_ones_left_out(tmp_path):
    wanted = ["B.JPG", "a/c.png", "a/deep/d.avif", "z.tiff"]
    for name in [*wanted, "notes.txt", "a/._c.png", ".cache/e.png", "a/png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images(str(tmp_path))
    assert found == sorted(tmp_path / name for name in wanted)
    assert find_images(tmp_path / "a" / "deep") == [tmp_path / "a/deep/d.avif"]


@pytest.mark.parametrize(
    ("kind", "words"), [("nowhere", "no such folder"), ("empty", "no image"), ("a.png", "is no folder")]
)
def test_a_folder_without_images_is_refused_by_name(kind, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=words) as caught:
        find_images(tmp_path / kind)
    assert str(tmp_path / kind) in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    scandir = os.scandir

    def guarded(path):  # root may list any folder, so permissions cannot make this happen
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(ValueError, match=r"locked: .*Permission denied"):
        find_images(tmp_path)


def test_photographs_equal_pillows_reading_of_them(photos):
    for path in find_images(photos / "val")[:5]:
        with Image.open(path) as image:
            close(load_image(path)[0], pixels_of(ImageOps.exif_transpose(image).convert("RGB")))


def test_8_bit_tensors_are_written_as_they_are_and_other_integers_are_refused(tmp_path):
    picture = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    save_image(picture, tmp_path / "a.png")
    assert torch.equal(torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1), picture)
    with pytest.raises(ValueError, match=r"b\.png: .*int64"):
        save_image(picture.long(), tmp_path / "b.png")
