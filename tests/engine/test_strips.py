"""Strips change nothing: whatever their height, the results are those of diffusers' own class on the whole image."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from stock_pairs import ALL_MAPS, CONFIGS, config, differences, pair, whole_and_strips
from torch import nn

from latentcodec.adopt import adopt, optimize_vae
from latentcodec.engine import plan
from latentcodec.machine import is_fast
from latentcodec.ops.native.build import library
from latentcodec.ops.pointwise import REFERENCE_KERNELS, Moments

WHOLE = 1 << 30  # bytes: the image is one strip


@pytest.mark.parametrize(
    "map_bytes",
    [
        pytest.param(ALL_MAPS, id="kept", marks=pytest.mark.slow),
        pytest.param(0, id="made again"),
        pytest.param(1 << 15, id="some kept"),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_thinnest_strips_equal_diffusers_in_every_configuration(name, map_bytes):
    f = 2 ** (len(CONFIGS[name]["block_out_channels"]) - 1)
    sizes = dict(height=5 * f + 1, width=3 * f + f // 2 + 1)  # odd, and no multiples of f
    assert max(differences(*whole_and_strips(CONFIGS[name], batch=2, map_bytes=map_bytes, **sizes))) <= 1e-4


@pytest.mark.parametrize(
    "narrow",
    [dict(channels=(2, 4), groups=2), dict(channels=(4,), groups=2, latent=16)],
    ids=["image wider than the first stage", "latent wider than the only stage"],
)
def test_networks_narrower_than_what_they_read_equal_diffusers(narrow):
    assert max(differences(*whole_and_strips(config(**narrow), strip_bytes=WHOLE))) <= 1e-4


@pytest.mark.parametrize("strip_bytes", [1, 3000, 20_000, 100_000, WHOLE])
@pytest.mark.parametrize("size", [(8, 8), (9, 15), (64, 8), (104, 72)])
def test_strips_of_every_height_equal_diffusers(size, strip_bytes):
    small = config(channels=(16, 32, 32, 32), layers=2)
    results = whole_and_strips(small, height=size[0], width=size[1], strip_bytes=strip_bytes)
    assert max(differences(*results)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2048, 8), (1999, 333), (2048, 2048)])
def test_large_and_odd_images_equal_diffusers(size):
    small = config(channels=(8, 8, 16, 16), groups=4, mid_block_add_attention=size != (2048, 2048))
    results = whole_and_strips(small, height=size[0], width=size[1], strip_bytes=200_000)
    assert max(differences(*results)) <= 1e-4


def test_keeping_and_making_again_are_bitwise_equal():
    torch.manual_seed(0)
    _, remade = whole_and_strips(CONFIGS["sd"], map_bytes=0)
    torch.manual_seed(0)
    _, kept = whole_and_strips(CONFIGS["sd"])
    assert all(map(torch.equal, kept, remade))


# ---- what would be wrong is seen


def without_the_variance_between_strips(self, strip, bias=None, residual=None):
    """The error of well-known tilers: the mean of the strips' variances is taken for the variance."""
    distance = strip.double() - strip.double().mean((1, 2), keepdim=True)
    if not self.pixels:
        self.pivot = torch.zeros(len(strip), 1, strip.shape[-1])
        self.means, self.squares = 0.0, 0.0
    pixels = strip.shape[1] * strip.shape[2]
    self.means = self.means + pixels * strip.double().mean((1, 2))
    self.squares = self.squares + distance.square().sum((1, 2))
    self.pixels += pixels
    mean = self.means / self.pixels
    self.sums = torch.stack([self.means, self.squares + self.pixels * mean.square()])


def test_the_comparison_sees_a_lost_variance_between_strips(monkeypatch):
    monkeypatch.setattr(Moments, "add", without_the_variance_between_strips)
    assert min(differences(*whole_and_strips(CONFIGS["sd"], height=80))) > 1e-4


def test_the_comparison_sees_a_constant_that_is_added():
    expected, actual = whole_and_strips(CONFIGS["sd"])
    assert min(differences(expected, [y + 100 for y in actual])) > 1e-4


def test_the_comparison_sees_a_missing_row():
    expected, actual = whole_and_strips(CONFIGS["sd"])
    assert min(differences(expected, [y[:, :, :-1] for y in actual])) > 1e-4


def test_a_mean_far_above_the_deviation_does_not_cancel():
    """Sums of squares in float32 would lose the variance at a mean of 3000 deviations."""
    x = 3000 + torch.randn(1, 64, 64, 32)
    moments = REFERENCE_KERNELS.moments()
    for strip in x.split(4, dim=1):
        moments.add(strip)
    norm = torch.nn.GroupNorm(8, 32, eps=1e-6)
    scale, shift, _ = moments.norm(norm.weight, norm.bias, 8, 1e-6, F.silu)
    expected = F.group_norm(x.permute(0, 3, 1, 2).double(), 8, eps=1e-6).permute(0, 2, 3, 1)
    assert (x.double() * scale + shift - expected).abs().max() < 2e-3  # the rounding of x itself is 1e-4


# ---- half precision


@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "photo-f8c16"))]
)
def test_bfloat16_errs_no_more_than_diffusers_in_bfloat16(name):
    """Root mean square against float32 with the same rounded weights, over four models and both directions."""
    squares = torch.zeros(2)
    for seed in range(4):
        torch.manual_seed(seed)
        stock = pair(CONFIGS[name])[0].type(torch.bfloat16)
        exact, ours = copy.deepcopy(stock).float(), adopt(copy.deepcopy(stock))
        cells = (
            (12, 8) if is_fast(torch.bfloat16) else (4, 3)
        )  # diffusers' own class is slow where it is emulated
        x = torch.rand(2, 3, 8 * cells[0], 8 * cells[1]) * 2 - 1
        z = torch.randn(2, ours.config.latent_channels, *cells)
        with torch.no_grad():
            for part, value in (("encoder", x.bfloat16()), ("decoder", z.bfloat16())):
                expected = getattr(exact, part)(value.float())
                for side, vae in enumerate((ours, stock)):
                    error = getattr(vae, part)(value).float() - expected
                    squares[side] += error.square().mean() / expected.var()
    assert squares[0] <= squares[1]


def test_half_precision_without_units_for_it_is_computed_in_float32(monkeypatch):
    monkeypatch.setattr(plan, "is_fast", lambda dtype: dtype == torch.float32)
    _, ours = pair(CONFIGS["sd"])
    half = copy.deepcopy(ours).type(torch.bfloat16)
    z = torch.randn(1, 4, 6, 6).bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(half).float().decoder(z.float())
        actual = half.decoder(z)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_formats_without_units_are_computed_in_float32(dtype, monkeypatch):
    monkeypatch.setenv("LATENTCODEC_DTYPE", "float32")  # as on a machine that would emulate bfloat16
    vae = AutoencoderKL(**CONFIGS["sd"]).eval()
    nn.Module.to(vae, dtype)
    exact = AutoencoderKL(**CONFIGS["sd"]).eval()
    exact.load_state_dict(vae.state_dict())
    assert library() is not None
    optimize_vae(vae)
    x = (torch.rand(1, 3, 40, 32) * 2 - 1).to(dtype)
    with torch.no_grad():
        expected = exact.encoder(x.float())
        for _ in range(3):  # a pass may be recorded
            error = (vae.encoder(x).float() - expected).abs().max() / expected.abs().max()
            assert error <= torch.finfo(dtype).eps
