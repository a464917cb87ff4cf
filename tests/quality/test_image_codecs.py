"""Image formats at equal bits, text similarity, confidence intervals, colour shift and round trips."""

import math

import pytest
import torch

from latentcodec.pixels import from_uint8
from latentcodec.quality import image_codecs, text
from latentcodec.quality.fidelity import colour_shift, interval, round_trips, student
from latentcodec.quality.metrics import psnr


def picture(side=96):
    wave = torch.linspace(0, 9, side).sin()
    rows = [wave[:, None] * wave, wave[:, None].expand(side, side), 0.3 * wave[None].expand(side, side)]
    return from_uint8((torch.stack(rows) * 100 + 127).to(torch.uint8))[None]


@pytest.mark.parametrize("form", image_codecs.available())
def test_a_format_keeps_to_its_bytes_and_uses_them(form):
    x = picture()
    few, many = (image_codecs.code(x, form, size) for size in (1000, 3000))
    assert few.size <= 1000
    assert many.size <= 3000
    assert few.image.shape == x.shape
    assert psnr(x, many.image) >= psnr(x, few.image)
    assert many.quality == 95 or many.quality > few.quality
    impossible = image_codecs.code(x, form, 10)
    assert impossible.quality == 1
    assert impossible.size > 10


def test_similarity_is_one_minus_the_normalised_edit_distance():
    assert text.similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert text.similarity("a b c", "abc") == 1
    assert text.similarity("abc", "") == 0


def test_text_is_read_where_rapidocr_is_installed_and_named_where_it_is_not():
    page = text.text_page(16)
    assert page.shape[0] == 3
    assert page.shape[1] % 32 == page.shape[2] % 32 == 0
    found = text.legibility(
        lambda x: torch.ones_like(x), 3, lambda p: "" if p.min() > 0.9 else " ".join(text.LINES)
    )
    assert set(found.original.values()) == {1.0}
    assert set(found.codec.values()) == {0.0}


@pytest.mark.slow
def test_rapidocr_reads_what_was_drawn():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    assert text.similarity(" ".join(text.LINES), text.open_reader()(text.text_page(24))) > 0.9


def test_the_interval_of_a_mean_covers_it_and_narrows():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (20, 2000))
    low, high = interval(many.tolist())
    assert low < many.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.15)
    assert interval(few.tolist())[1] - interval(few.tolist())[0] > 5 * (high - low)
    assert all(math.isnan(value) for value in interval([1.0]))


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_the_interval_of_a_few_values_holds_their_mean_as_often_as_it_says(count):
    """Resamples of two values are never outside of them, which half of all pairs have the mean between."""
    generator = torch.Generator().manual_seed(count)
    draws = torch.randn(200, count, generator=generator).tolist()
    found = [interval(values) for values in draws]
    assert sum(low <= 0 <= high for low, high in found) / len(found) > 0.9


def test_students_deviations_are_those_of_the_tables():
    expected = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    assert {freedom: student(freedom) for freedom in expected} == pytest.approx(expected, abs=0.004)


class Darker:
    """A codec that takes two 8-bit levels from the first channel."""

    def encode(self, x):
        return x

    def decode(self, z, size=None):
        y = z.clone()
        y[:, 0] -= 2 / 127.5
        return y


def test_colours_shift_and_round_trips_add_up():
    x = torch.zeros(1, 3, 16, 16)
    assert colour_shift(x, Darker().decode(x)) == pytest.approx([-2, 0, 0], abs=1e-4)
    trips = round_trips(Darker(), x, 4)
    assert trips[0] - trips[3] == pytest.approx(20 * math.log10(4), abs=0.01)
