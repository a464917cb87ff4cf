"""The weight of the KL: its warm-up, the rate that it is steered by, and the target that it leads a codec to."""

import json
import math

import pytest
import torch
from small_objectives import C
from torch import nn

from latentcodec.training.losses import rate as rate_control
from latentcodec.training.losses import terms as losses
from latentcodec.training.losses.rate import RateControl
from latentcodec.training.losses.terms import LossConfig
from latentcodec.vae.posterior import mean_and_logvar, sample_posterior


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


# ---- what the rate control is made of, and on a codec whose optimum is known ----


def test_warm_up_is_a_line_from_zero_to_one() -> None:
    assert [rate_control.kl_warmup(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert rate_control.kl_warmup(0, 0) == 1


def test_relative_std_is_that_of_the_noise_in_the_samples() -> None:
    mean = torch.randn(40, 2, 16, 16) * torch.tensor([2.0, 0.5]).view(1, 2, 1, 1) + 3
    logvar = torch.tensor([0.5, 0.2]).view(1, 2, 1, 1).square().log().expand_as(mean)
    z = sample_posterior(mean, logvar, torch.randn(mean.shape))
    measured = math.exp((torch.tensor([0.5, 0.2]) / z.std((0, 2, 3))).log().mean())
    assert rate_control.relative_std(rate_control.channel_statistics(mean, logvar)) == pytest.approx(
        measured, rel=0.01
    )


def test_channel_statistics_of_two_processes_average_to_those_of_one() -> None:
    mean, logvar = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    halves = [rate_control.channel_statistics(mean[i], logvar[i]) for i in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, rate_control.channel_statistics(mean, logvar))


def test_an_unused_latent_has_relative_std_one_and_no_bits() -> None:
    std = rate_control.relative_std(
        rate_control.channel_statistics(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    )
    assert std == 1
    assert rate_control.bits_of_std(std) == 0


def test_the_kl_weight_moves_by_the_stated_gain_and_stays_in_its_range() -> None:
    assert rate_control.next_kl_weight(1.0, 3.5, 3.0) == pytest.approx(2 ** (rate_control.CONTROL_GAIN * 0.5))
    assert rate_control.next_kl_weight(1.0, 3.0, 3.0) == 1
    assert rate_control.next_kl_weight(1.0, 0.0, 9.0) == pytest.approx(2**-rate_control.CONTROL_GAIN)
    low, high = rate_control.KL_WEIGHT_RANGE
    assert rate_control.next_kl_weight(low, 0.0, 5.0) == low
    assert rate_control.next_kl_weight(high, 5.0, 0.0) == high


@pytest.mark.slow
@pytest.mark.parametrize(("start", "key"), [(1e-3, "bits"), (10.0, "bits"), (10.0, "std")])
def test_rate_control_reaches_its_target_from_below_and_above(start: float, key: str) -> None:
    """A linear codec of gaussian data, whose optimum is known, trained by Adam while the weight is
    steered."""
    x = torch.randn(16, 2, 4, 4) * torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    encoder, decoder = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 0.03)
    weight, rates = start, []
    for _ in range(600):
        mean, logvar = mean_and_logvar(encoder(x))
        y = decoder(sample_posterior(mean, logvar, torch.randn_like(mean)))
        terms = {"nll": losses.gaussian_nll(y, x, -2.0), "kl": losses.kl_divergence(mean, logvar)}
        optimizer.zero_grad()
        losses.objective(terms, {"nll": 1.0, "kl": weight}, 32).backward()
        optimizer.step()
        if key == "bits":
            rate = rate_control.bits_per_element(losses.kl_per_channel(mean, logvar))
        else:
            rate = rate_control.bits_of_std(
                rate_control.relative_std(rate_control.channel_statistics(mean, logvar))
            )
        weight = rate_control.next_kl_weight(weight, rate, 2.0)
        rates.append(rate)
    assert sum(rates[-100:]) / 100 == pytest.approx(2.0, abs=0.1)
