"""HEIC and JPEG XL: read upright, refused by their stated size before they are decoded; what to install for them."""

import io

import pytest
import torch
from encoded_pictures import encoded
from handmade_files import picture
from PIL import Image, ImageOps

from latentcodec.pixels import UnreadableImage, decode_image, image_size, jxl, load_image
from latentcodec.pixels.containers import HEIF, JPEG_XL, enable


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
