"""The drawn digits: the same everywhere, ten classes in equal numbers, which are told apart by looking."""

import hashlib

import torch

from latentcodec.sources.digits import DigitSource, digit_of, draw_digit
from latentcodec.sources.images import Place, open_source


def test_a_digit_is_a_function_of_seed_and_number():
    assert (draw_digit(0, 3) == draw_digit(0, 3)).all()
    assert (draw_digit(0, 3) != draw_digit(1, 3)).any()
    source = open_source(Place(None), channels=1, drawn="digits")
    assert isinstance(source, DigitSource)
    assert torch.equal(source.read(5), DigitSource(1, length=6).read(5))
    assert source.read(5).shape == (1, 28, 28)
    assert torch.equal(DigitSource(3).read(5)[2:], source.read(5))


def test_every_ten_digits_hold_each_class_once():
    labels = DigitSource(1, length=200).labels
    assert sorted(labels.numbers[40:50].tolist()) == list(range(10))
    assert labels.name(7) == str(digit_of(0, 7))


def test_digits_look_like_their_class():
    """The nearest of 500 others, in pixels, is nearly always of the same class; no two are equal."""
    source = DigitSource(1, length=600)
    x = torch.stack([source.read(index) for index in range(600)]).flatten(1)
    labels = torch.from_numpy(source.labels.numbers)
    distance = torch.cdist(x[500:], x[:500])
    assert (labels[:500][distance.argmin(1)] == labels[500:]).float().mean() > 0.9
    assert len({hashlib.sha256(row.numpy().tobytes()).digest() for row in x}) == 600


def test_white_on_black_within_a_margin():
    x = torch.stack([DigitSource(1).read(index) for index in range(100)])
    ink = (x > 0).float().mean((1, 2, 3))
    assert ink.min() > 0.03
    assert ink.max() < 0.4
    assert x[..., 0, :].max() == x[..., :, 0].max() == -1
