"""Text over training crops: readable, drawn from (seed, position) alone, and only where it was asked for."""

import shutil

import numpy as np
import pytest
import torch

from latentcodec.training.data import text
from latentcodec.training.data.crops import Cropping

SIZE = (64, 64)


@pytest.fixture(scope="module")
def fonts():
    try:
        return tuple(text.find_fonts())
    except ValueError:
        pytest.skip("this machine has no fonts")


def crops(share, fonts, positions, channels=3):
    images = [torch.full((channels, *SIZE), 0.1) for _ in positions]
    return Cropping(0, 1.0, False, share, fonts).batch(positions, images, SIZE, [])["pixels"]


def test_a_crop_depends_on_its_position_and_not_on_its_batch(fonts):
    together = crops(1.0, fonts, [3, 4, 5])
    assert torch.equal(together[1:], crops(1.0, fonts, [4, 5]))
    assert not torch.equal(together[0], together[1])


def test_as_many_crops_as_the_share_says_carry_text(fonts):
    changed = (crops(0.25, fonts, list(range(200))) != 0.1).flatten(1).any(1).float().mean()
    assert 0.15 < changed < 0.35  # three deviations of 200 draws
    assert (crops(0.0, fonts, [0, 1, 2]) == 0.1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_text_stands_out_from_its_page_in_any_number_of_channels(fonts, channels):
    drawn = crops(1.0, fonts, list(range(24)), channels)
    assert drawn.shape[1] == channels
    assert drawn.abs().max() <= 1
    contrast = (drawn[:, :3].mean(1).flatten(1).amax(1) - drawn[:, :3].mean(1).flatten(1).amin(1)) * 127.5
    # Letters have edges; a page without them is flat, or goes from one colour to another in steps of 4 levels.
    lettered = drawn[:, :3].diff(dim=-1).abs().amax((1, 2, 3)) * 127.5 > 8
    assert lettered.float().mean() > 0.7
    assert contrast[lettered].min() > 30


def test_fonts_can_be_left_out_by_the_beginning_of_their_names(fonts):
    name = fonts[0].rsplit("/", 1)[-1]
    assert fonts[0] not in text.find_fonts([name])


def test_without_fonts_the_key_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "FONT_FOLDERS", dict.fromkeys(text.FONT_FOLDERS, (str(tmp_path),)))
    with pytest.raises(ValueError, match=r"data\.text_share needs fonts"):
        text.find_fonts()


def test_fonts_that_are_broken_or_of_one_fixed_size_are_drawn_nothing_with(fonts, monkeypatch, tmp_path):
    """An emoji font opens at the size of its pictures and at no other."""
    sound = next(font for font in fonts if text._letters_of(font))
    for name in ("emoji.ttf", "sound.ttf"):
        shutil.copy(sound, tmp_path / name)
    (tmp_path / "broken.ttf").write_bytes(b"")
    truetype = text.ImageFont.truetype

    def of_fixed_size(path, points):
        if path.endswith("emoji.ttf") and points != 16:
            raise OSError("invalid pixel size")
        return truetype(path, points)

    monkeypatch.setattr(text.ImageFont, "truetype", of_fixed_size)
    monkeypatch.setattr(text, "FONT_FOLDERS", dict.fromkeys(text.FONT_FOLDERS, (str(tmp_path),)))
    found = text.find_fonts()
    assert len(found) == 3
    assert [bool(text._letters_of(path)) for path in found] == [False, False, True]
    crops(1.0, found, list(range(12)))


def test_a_process_keeps_no_more_than_so_many_fonts_open(fonts):
    for points in range(1, text.FONTS_OPEN + 20):
        text._font(fonts[-1], points)
    assert text._font.cache_info().currsize <= text.FONTS_OPEN


def test_only_letters_that_a_font_has_are_drawn(fonts):
    """A font without a letter draws the same sign for all that it lacks."""
    for font in fonts[:: max(1, len(fonts) // 20)]:
        if not (letters := text._letters_of(font)):
            continue  # a font of one script of its own
        signs = {bytes(text._font(font, 16).getmask(letter)) for letter in letters}
        assert len(signs) > 0.6 * len(set(letters))


@pytest.fixture(scope="module")
def pages(fonts):
    return [text.draw_text(torch.zeros(3, *SIZE), fonts, np.random.default_rng(i)) for i in range(300)]


def test_pages_without_text_come_in_all_brightnesses(pages):
    flat = [float(page.mean()) for page in pages if page.std((1, 2)).max() == 0]
    assert len(flat) > 10
    assert min(flat) < -0.9
    assert max(flat) > 0.9


def test_some_pages_without_text_go_from_one_colour_to_another(pages):
    rows = sum(bool(p.std(1).max() > 0.05 and p.std(2).max() < 1e-3) for p in pages)
    columns = sum(bool(p.std(2).max() > 0.05 and p.std(1).max() < 1e-3) for p in pages)
    assert min(rows, columns) > 2


def test_pages_of_any_shape_can_be_drawn(fonts):
    for i in range(60):
        page = text.draw_text(torch.zeros(3, 48, 80), fonts, np.random.default_rng(i))
        assert page.shape == (3, 48, 80)
