"""A picture becomes the pixels that its file states: modes, bit depths, turns, frames and transparency."""

import io
import struct

import numpy as np
import pytest
import torch
from encoded_pictures import RAMP16, close, encoded, noise, pixels_of, png
from PIL import Image, ImageOps

from latentcodec.pixels import decode_image, find_images, from_uint8, image_size, load_image


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


def test_photographs_equal_pillows_reading_of_them(photos):
    for path in find_images(photos / "val")[:5]:
        with Image.open(path) as image:
            close(load_image(path)[0], pixels_of(ImageOps.exif_transpose(image).convert("RGB")))


# ---- transparency


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
