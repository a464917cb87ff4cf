"""Line art for drawn pages: there, of any shape, smooth or sharp, a hatching of the pitch that was asked for."""

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from latentcodec.training.data import line_art, text


def drawn(seed, size=(96, 64)):
    return np.asarray(line_art.line_art(size, np.random.default_rng(seed)))


def test_a_drawing_depends_on_its_generator_alone():
    assert np.array_equal(drawn(3), drawn(3))
    assert not np.array_equal(drawn(3), drawn(4))


def test_lines_cover_a_part_of_nearly_every_page():
    pages = [drawn(seed) for seed in range(100)]
    assert {page.shape for page in pages} == {(64, 96)}
    inked = [page for page in pages if page.max() > 200]
    assert len(inked) > 90
    assert np.mean([(page > 127).mean() for page in inked]) < 0.5


def test_most_drawings_have_smooth_edges_and_some_have_those_of_whole_pixels(monkeypatch):
    monkeypatch.setattr(line_art, "_boxes", line_art._strokes)  # a box may be filled with any level
    sharp = np.mean([np.isin(drawn(seed), (0, 255)).all() for seed in range(100)])
    assert 0.15 < sharp < 0.45


@pytest.mark.parametrize("pitch", [4.0, 6.0, 10.0])
def test_the_lines_of_a_hatching_are_a_pitch_apart(pitch, monkeypatch):
    """Its spectrum has its peak at one line in `pitch` pixels, in whatever direction."""
    monkeypatch.setattr(line_art, "WIDTHS", (1.0, 1.0))
    monkeypatch.setattr(line_art, "PITCHES", (pitch, pitch))
    for name in ("_strokes", "_rings", "_boxes"):
        monkeypatch.setattr(line_art, name, line_art._hatching)
    found = []
    for seed in range(12):
        page = drawn(seed, (128, 128)) * np.outer(np.hanning(128), np.hanning(128))
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.rfftfreq(128), indexing="ij"))
        power = np.abs(np.fft.rfft2(page)) * (frequency > 0.05)  # below is the shape of the hatched part
        found.append(frequency.flat[power.argmax()])
    assert np.median(found) == pytest.approx(1 / pitch, abs=1 / 128)


def test_some_pages_of_training_have_line_art(monkeypatch):
    """With letters that leave no ink, what is left on a page with contrast is line art."""
    empty = lambda size, fonts, random: line_art.Image.new("L", size)  # noqa: E731
    monkeypatch.setattr(text, "_letters", empty)
    monkeypatch.setattr(text, "_shaded", lambda page, random: page)
    pages = [text.draw_text(torch.zeros(3, 64, 64), (), np.random.default_rng(seed)) for seed in range(600)]
    share = np.mean([bool(page.std((1, 2)).max() > 0) for page in pages])
    assert share == pytest.approx(0.125, abs=0.04)


def test_a_stroke_is_as_wide_as_it_was_asked_to_be():
    mask = line_art.Image.new("L", (64, 64))
    ImageDraw.Draw(mask).line([(0, 32), (63, 32)], 255, line_art._width(4, FixedDraw(0.5)))
    middle = sum(line_art.WIDTHS) / 2
    assert (np.asarray(mask)[:, 32] > 0).sum() == round(4 * middle)


class FixedDraw:
    """Draws the value at a fixed part of any range."""

    def __init__(self, part):
        self.part = part

    def uniform(self, low, high):
        return low + self.part * (high - low)
