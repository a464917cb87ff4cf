"""The weight of the KL: its warm-up, the rate that it is steered by, and the target that it leads a codec to."""

import json
import math

import pytest
import torch
from small_objectives import C

from latentcodec.training.losses.rate import RateControl
from latentcodec.training.losses.terms import LossConfig


def test_the_kl_weight_warms_up_and_then_leads_the_rate_to_its_target():
    rate = RateControl(LossConfig(kl_weight=1e-3, kl_warmup_steps=10, target_bits=2.0), C)
    assert [rate.at(step) for step in (0, 5, 10)] == pytest.approx([0, 5e-4, 1e-3])
    bits = 6.0
    for step in range(400):
        said = rate.update(step, torch.full((C,), bits * math.log(2)), torch.ones(3, C))
        if step < 10:
            assert rate.weight == 1e-3
        bits = 2.5 - math.log2(max(rate.at(step + 1), 1e-9) / 1e-3) / 2  # a codec that follows at once
    assert said["latent_bits"] == pytest.approx(2.0, abs=0.01)
    assert rate.weight == pytest.approx(2e-3, rel=0.02)


def test_a_target_deviation_is_led_to_as_well():
    rate = RateControl(LossConfig(kl_weight=1e-3, target_std=0.25), C)
    for step in range(400):
        std = min(1.0, 0.5 * (rate.weight / 1e-3) ** 0.5)
        statistics = torch.stack([torch.zeros(C), torch.full((C,), 1 - std**2), torch.full((C,), std**2)])
        said = rate.update(step, torch.ones(C), statistics)
    assert said["latent_noise"] == pytest.approx(0.25, rel=0.01)


def test_rate_control_survives_a_checkpoint_to_the_bit():
    config = LossConfig(kl_weight=1e-3, target_bits=2.0)
    rate = RateControl(config, C)
    rate.update(3, torch.rand(C), torch.rand(3, C))
    other = RateControl(config, C)
    other.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert other.weight == rate.weight
    assert torch.equal(other.reference, rate.reference)


def test_a_weight_that_no_target_steers_is_that_of_the_configuration_after_a_resume():
    rate = RateControl(LossConfig(kl_weight=1e-3), C)
    other = RateControl(LossConfig(kl_weight=1e-5), C)
    other.load_state_dict(rate.state_dict())
    assert other.weight == 1e-5
