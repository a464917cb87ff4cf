"""What cannot be read is refused with the name of the file and the reason, however it is damaged."""

import pickle
import random
import struct
import warnings

import pytest
import torch
from encoded_pictures import RAMP16, encoded, noise, png, swapped_primaries
from PIL import Image, ImageFile

from latentcodec.pixels import UnreadableImage, decode_image, load_image


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
