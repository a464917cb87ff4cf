"""Rates of latents: entropies that can be worked out, and errors that grow with the step."""

import math

import pytest
import torch

from latentcodec.quality.rate import ROUNDINGS, levels


def test_the_entropy_of_two_equal_values_is_one_bit_and_of_one_is_none():
    z = torch.zeros(1, 2, 4, 4)
    z[:, 0, :2] = 3.0
    rounded, bits = levels(z, 1.0)
    assert torch.equal(rounded, z)
    assert bits == pytest.approx(0.5)  # one bit in the first channel, none in the second


def test_a_normal_latent_takes_its_differential_entropy_less_the_log_of_the_step():
    z = torch.randn(1, 1, 512, 512)
    entropy = 0.5 * math.log2(2 * math.pi * math.e)
    for step in (0.125, 0.25, 0.5):
        assert levels(z, step)[1] == pytest.approx(entropy - math.log2(step), abs=0.02)


def test_fewer_bits_lose_more():
    z = torch.randn(1, 4, 32, 32)
    points = [change(z) for change in ROUNDINGS.values()]
    errors = {
        name: (rounded - z).square().mean().item()
        for name, (rounded, _) in zip(ROUNDINGS, points, strict=True)
    }
    assert errors["float32"] == 0
    assert (
        errors["float16"]
        < errors["bfloat16"]
        < errors["int8"]
        < errors["steps of 1/4"]
        < errors["steps of 1"]
    )
    bits = {name: value for name, (_, value) in zip(ROUNDINGS, points, strict=True)}
    assert bits["float32"] > bits["float16"] > bits["int8"] > bits["steps of 1/8"] > bits["steps of 1"]
