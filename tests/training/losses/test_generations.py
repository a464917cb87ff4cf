"""Pictures that have been through the codec before: who they are, how often, and what they should come back as."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from latentcodec.pixels import from_uint8
from latentcodec.quality.fidelity import round_trips
from latentcodec.quality.metrics import psnr
from latentcodec.training.config import Config
from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.losses.generations import after_round_trips, draw_generations
from latentcodec.training.losses.regularizers import RegularizerConfig


class Blurring:
    """A codec of a quarter of the pixels, which loses a little more each time."""

    def encode(self, x):
        return F.avg_pool2d(x, 2)

    def decode(self, z, size=None):
        return F.interpolate(z, scale_factor=2, mode="bilinear")


CONFIG = RegularizerConfig(generations_share=0.25, generations=4)


def test_a_share_of_the_samples_has_been_coded_before_each_number_as_likely():
    drawn = draw_generations(CONFIG, 0, torch.arange(8000))
    counts = torch.bincount(drawn, minlength=5)
    assert len(counts) == 5
    assert counts[0] / 8000 == pytest.approx(0.75, abs=0.02)
    assert (counts[1:] / 8000 - 0.25 / 4).abs().max() < 0.01
    assert draw_generations(RegularizerConfig(), 0, torch.arange(100)).max() == 0
    assert draw_generations(replace(CONFIG, generations_share=1.0), 0, torch.arange(100)).min() == 1


def test_the_number_belongs_to_the_position_and_the_seed():
    drawn = draw_generations(CONFIG, 0, torch.arange(200))
    assert torch.equal(drawn[50:60], draw_generations(CONFIG, 0, torch.arange(50, 60)))
    assert not torch.equal(drawn, draw_generations(CONFIG, 1, torch.arange(200)))


def test_generations_are_those_of_a_codec_that_is_asked_again_and_again():
    """The reference is `round_trips`, which scores a codec's pictures as files of 8 bits."""
    codec, x = Blurring(), from_uint8(torch.randint(256, (3, 3, 32, 32)))
    numbers = torch.tensor([0, 3, 1])
    given, target = after_round_trips(x, numbers, lambda y: codec.decode(codec.encode(y)))
    assert torch.equal(given[0], x[0])
    assert torch.equal(target[0], x[0])
    for sample in (1, 2):
        scores = round_trips(codec, x[sample, None], 3)
        found = [psnr(x[sample, None], y[sample, None]).item() for y in (target, given)]
        assert found == pytest.approx([scores[0], scores[numbers[sample] - 1]], abs=1e-4)
    assert not torch.equal(given[1], target[1])
    assert torch.equal(given[2], target[2])


def test_no_gradient_and_each_pass_has_only_the_samples_that_need_it():
    weight, seen = torch.tensor(0.5, requires_grad=True), []

    def recode(y):
        seen.append(len(y))
        return y * weight

    given, target = after_round_trips(torch.ones(4, 3, 8, 8), torch.tensor([2, 0, 1, 3]), recode)
    assert not given.requires_grad
    assert not target.requires_grad
    assert seen == [3, 2, 1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_made_a_level(value):
    x = torch.zeros(2, 3, 8, 8)
    x[1, 0, 0, 0] = value
    given, target = after_round_trips(x, torch.tensor([2, 2]), lambda y: y)
    for pictures in (given, target):
        assert pictures[0].isfinite().all()
        assert not pictures[1, 0, 0, 0].isfinite()


@pytest.mark.parametrize("half", [{"generations_share": 0.5}, {"generations": 2}])
def test_a_share_without_a_number_is_refused_and_so_is_a_number_without_a_share(half):
    with pytest.raises(
        ValueError, match=r"regularizer\.generations_share .* regularizer\.generations how often"
    ):
        RegularizerConfig(**half)


def test_a_discriminator_beside_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"discriminator\.weight .* regularizer\.generations_share"):
        Config(str(tmp_path), regularizer=CONFIG, discriminator=DiscriminatorConfig(weight=0.5))
