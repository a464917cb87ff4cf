"""The sheet of pictures for a card: what stands in its columns, at which size, and what it refuses."""

import math

import pytest
import torch
from bench_scripts import script
from tiny_codecs import tiny_vae

from latentcodec.codec import LatentCodec
from latentcodec.pixels import crop_middle, load_image, save_image, to_uint8
from latentcodec.quality import image_codecs
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import reconstruct


@pytest.fixture(scope="module")
def sheet():
    return script("sheet")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A codec, and a folder with two photographs and one that is too small for a sheet."""
    folder = tmp_path_factory.mktemp("sheet")
    torch.manual_seed(0)
    LatentCodec(tiny_vae()).save_pretrained(folder / "codec")
    for i, (height, width) in enumerate(((201, 222), (224, 193), (64, 64))):
        noise = torch.nn.functional.avg_pool2d(torch.randn(1, 3, height + 4, width + 4), 5, stride=1)
        save_image(noise[0].clamp(-1, 1), folder / f"photographs/{i}.png")
    return folder


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_each_row_is_the_original_the_codec_the_klt_and_jpeg_at_1_to_1(
    suffix, sheet, places, tmp_path, capsys
):
    photographs, out = places / "photographs", tmp_path / f"new/sheet.{suffix}"
    command = ["--codec", str(places / "codec"), "--klt_images", str(photographs), "--out", str(out)]
    sheet.main([*command, "--images", str(photographs)])
    assert str(out) in capsys.readouterr().out
    found = load_image(out, 3)[0]
    codec = LatentCodec.from_pretrained(places / "codec")
    images = [load_image(photographs / f"{i}.png", 3) for i in range(2)]
    small = load_image(photographs / "2.png", 3)[0]
    klt = KLT.fit([*(x[0] for x in images), small], codec.downsampling_factor, codec.latent_channels)
    for row, x in enumerate(images):
        height, width = x.shape[-2:]
        most = math.ceil(height / 4) * math.ceil(width / 4) * codec.latent_channels
        expected = (x, reconstruct(codec, x), reconstruct(klt, x), image_codecs.code(x, "JPEG", most).image)
        for column, y in enumerate(expected):
            top, left = sheet.LABEL + row * 194, column * 194
            shown = found[:, top : top + 192, left : left + 192]
            middle = crop_middle(y[0], 192)
            assert (to_uint8(shown).int() - to_uint8(middle).int()).abs().max() == 0, (row, column)


def test_drawn_pictures_are_leaves_text_line_art_and_a_screen(sheet):
    leaves, letters, lines, screen = sheet.drawn()
    assert {x.shape for x in (leaves, letters, lines, screen)} == {(3, 192, 192)}
    assert (letters == 1).float().mean() > 0.7
    assert {tuple(colour) for colour in to_uint8(lines).flatten(1).T.tolist()} == {(0, 0, 0), (255, 255, 255)}
    assert len(to_uint8(screen).flatten(1).unique(dim=1).T) > 100


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--out", "sheet.jpg", "must end in .png or .webp"), ("--images", "few", "192 a side are needed")],
)
def test_a_sheet_that_cannot_be_made_is_refused_with_its_option(
    sheet, places, tmp_path, option, value, message
):
    save_image(torch.zeros(3, 64, 64), tmp_path / "few/small.png")
    options = {
        "--codec": places / "codec",
        "--klt_images": places / "photographs",
        "--out": tmp_path / "a.png",
    }
    options[option] = tmp_path / value
    with pytest.raises(SystemExit, match=message):
        sheet.main([str(word) for pair in options.items() for word in pair])


def test_a_jpeg_that_cannot_be_so_small_is_known(sheet):
    codec = LatentCodec(tiny_vae(latent_channels=1))
    x = torch.rand(3, 192, 192).round() * 2 - 1
    klt = KLT.fit([torch.randn(3, 256, 256)], codec.downsampling_factor, 1)
    _, excess = sheet.versions(x, codec, klt)
    assert excess > 1.5
