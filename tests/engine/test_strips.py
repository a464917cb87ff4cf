"""Strips change nothing: whatever their height, the results are those of diffusers' own class on the whole image."""

import copy
import logging
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peft import LoraConfig
from safetensors.torch import save_file
from stock_pairs import ALL_MAPS, CONFIGS, config, differences, pair, whole_and_strips
from torch import nn
from torch._inductor.exc import InductorError

from latentcodec.adopt import adopt, optimize_vae, restore_vae
from latentcodec.engine import plan
from latentcodec.engine.plan import Engine
from latentcodec.engine.strips import StripPass
from latentcodec.machine import is_fast
from latentcodec.ops import onednn, pointwise
from latentcodec.ops.native.build import library
from latentcodec.ops.pointwise import REFERENCE_KERNELS, Moments, sums
from latentcodec.stock import stock_copy

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


def test_the_comparison_sees_a_missing_row(monkeypatch):
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


# ---- when strips run, and with which weights


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with every pass in strips."""
    passes = []
    for name in ("encode", "decode"):
        method = getattr(StripPass, name)
        monkeypatch.setattr(
            StripPass, name, lambda *args, method=method, name=name: passes.append(name) or method(*args)
        )
    return passes


def test_strips_run_wherever_no_gradient_is_asked_for(counted):
    _, ours = pair(CONFIGS["sd"])
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        ours(x)
    with torch.inference_mode():
        ours(torch.rand(1, 3, 32, 16))  # of another size, since a second one like the first is recorded
    assert counted == ["encode", "decode"] * 2


def test_results_of_inference_may_be_trained_on():
    _, ours = pair(CONFIGS["sd"])
    with torch.inference_mode():
        x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        z = ours.encoder(x)
    (torch.ones(1, requires_grad=True) * z).sum().backward()


def a_wrapper(ours):
    class Scaled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    block = ours.decoder.mid_block.resnets[0]
    block.conv1 = Scaled(block.conv1)


def float64(ours):
    ours.double()


@pytest.mark.parametrize("change", [a_wrapper, float64])
def test_what_strips_cannot_run_is_left_to_the_modules(change, counted):
    _, ours = pair(CONFIGS["sd"])
    change(ours)
    z = torch.randn(1, 4, 4, 4).to(ours.dtype)
    with torch.no_grad():
        without_gradient = ours.decode(z).sample
    assert torch.equal(without_gradient, ours.decode(z).sample)
    assert counted == []


def test_hooks_on_layers_are_not_lost_by_adopting():
    stock, _ = pair(CONFIGS["sd"])
    stock.decoder.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"mid_block.*first"):
        adopt(stock)


def test_weights_made_in_inference_mode_run_and_an_image_without_a_cell_is_refused():
    with torch.inference_mode():
        _, ours = pair(CONFIGS["sd"])
        assert ours.decode(torch.randn(1, 4, 4, 4)).sample.shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match="4 x 40 pixels is smaller than one latent cell"):
            ours.encoder(torch.rand(1, 3, 4, 40))


@pytest.mark.parametrize("what", ["gradients", "autocast", "a hook", "an adapter"])
def test_plain_modules_run_where_something_listens(what, counted):
    _, ours = pair(CONFIGS["sd"])
    x, heard = torch.rand(1, 3, 16, 16), []
    if what == "gradients":
        ours(x).sample.sum().backward()
        assert ours.decoder.conv_in.weight.grad is not None
    elif what == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours(x)
    elif what == "a hook":
        for part in (ours.encoder, ours.decoder):
            part.conv_in.register_forward_hook(lambda *_: heard.append(1))
        with torch.no_grad():
            ours(x)
        assert len(heard) == 2
    else:
        with torch.no_grad():
            before = ours(x).sample
            ours.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv_in"]))
            assert not torch.equal(ours(x).sample, before)
        counted.clear()
        with torch.no_grad():
            ours(x)
    assert counted == []


def test_a_changed_weight_is_seen():
    """By an optimizer's step, by a write behind autograd's back as adapters do it, by loading, by a cast."""
    reference, ours = pair(CONFIGS["sd"])
    z = torch.randn(1, 4, 4, 4)

    def compare():
        reference.load_state_dict(ours.state_dict())
        with torch.no_grad():
            expected = reference.decoder(z)
            assert (ours.decoder(z) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())

    compare()
    weights = [ours.decoder.conv_in.weight, ours.decoder.up_blocks[0].upsamplers[0].conv.weight]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    compare()
    for weight in weights:
        weight.data += 0.1
    compare()
    for weight in weights:
        weight.data[:, :, 1, 1] *= 2
    compare()
    other, _ = pair(CONFIGS["sd"])
    ours.load_state_dict(other.state_dict())
    compare()


def test_weights_that_cannot_be_packed_are_used_as_they_are(monkeypatch, caplog):
    def unknown(*_):
        raise AttributeError("no such operator")

    onednn.packs_correctly.cache_clear()
    monkeypatch.setattr(onednn, "packed_convolution", unknown)
    try:
        assert max(differences(*whole_and_strips(CONFIGS["sd"]))) <= 1e-4
        assert "does not pack" in caplog.text
    finally:
        onednn.packs_correctly.cache_clear()


# ---- memory


def test_a_bound_that_is_too_small_names_the_bytes():
    _, ours = pair(CONFIGS["sd"])
    optimize_vae(ours, max_memory=10_000)
    with torch.no_grad(), pytest.raises(ValueError, match=r"max_memory 10,000 bytes.*needs [\d,]+"):
        ours.decode(torch.randn(1, 4, 8, 8))


def test_attention_counts_for_the_bound():
    _, ours = pair(CONFIGS["sd"])
    widest = ours.config.block_out_channels[-1]
    maps = 64 * 64 * 7 * widest * 4
    with pytest.raises(ValueError, match="is too little"), torch.no_grad():
        optimize_vae(ours, max_memory=maps).decode(torch.randn(1, 4, 64, 64))


def test_a_bound_decides_which_stages_keep_their_inner_maps():
    _, ours = pair(CONFIGS["sd"])
    stages = [(8 << i, 8 << i, stage) for i, stage in enumerate(ours.decoder.up_blocks)]
    z = torch.randn(1, 4, 8, 8)
    plan = partial(Engine._plan, x=z, stages=stages, network=ours.decoder)
    widest = 64 * 64 * 32 * 4  # bytes of the map that enters the last stage, and of two within it
    with pytest.raises(ValueError, match="it needs") as error:
        plan(Engine(1))
    least = int(re.search(r"it needs ([\d,]+),", str(error.value))[1].replace(",", ""))

    def kept(bound: int) -> list[bool]:
        return list(plan(Engine(bound))._keeps(z, [(stage, h, w) for h, w, stage in stages]).values())

    assert kept(least) == [True, True, True, False]  # which is widest, and makes its inner maps twice
    assert kept(least + widest) == [True] * 4


# ---- taking it out again


def test_what_is_optimised_keeps_the_layout_of_its_weights_which_safetensors_needs(tmp_path):
    _, ours = pair(CONFIGS["sd"])
    save_file(optimize_vae(ours).state_dict(), tmp_path / "vae.safetensors")


def test_restore_gives_diffusers_its_own_networks_back():
    reference, ours = pair(CONFIGS["sd"])
    parameters = [id(p) for p in ours.parameters()]
    restore_vae(optimize_vae(ours).train())
    assert type(ours.encoder) is type(reference.encoder)
    assert type(ours.decoder) is type(reference.decoder)
    assert [id(p) for p in ours.parameters()] == parameters
    assert ours.decoder.training
    assert ours.tile_sample_min_size == reference.tile_sample_min_size
    assert ours.tile_latent_min_size == reference.tile_latent_min_size
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(ours.eval().decode(z).sample, reference.decode(z).sample)


def test_restore_leaves_what_was_never_adopted_and_refuses_what_is_no_vae():
    vae = AutoencoderKL(**CONFIGS["f1"])
    encoder = vae.encoder
    assert restore_vae(vae).encoder is encoder
    with pytest.raises(TypeError, match="AutoencoderKL"):
        restore_vae(encoder)


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


def test_the_check_compares_with_exact_float32_on_gpus_too(monkeypatch):
    """What is measured runs as it is set, diffusers' own class in the VAE's dtype too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    precisions = []

    def watched(vae, dtype):
        def note(*given):
            precisions.append(torch.backends.cudnn.conv.fp32_precision)

        copied = stock_copy(vae, dtype)
        for network in (copied.encoder, copied.decoder):
            network.register_forward_pre_hook(note)
        return copied

    monkeypatch.setattr("latentcodec.stock.stock_copy", watched)
    optimize_vae(AutoencoderKL(**CONFIGS["f4"]).eval(), check=True)
    assert precisions == ["ieee", "tf32"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_prints_what_it_measured(dtype, capsys):
    vae = AutoencoderKL(**CONFIGS["photo-f8c16"]).eval().type(dtype)
    assert library() is not None
    optimize_vae(vae, check=True)
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("  ")]
    forms = dict(line.strip().split(": ", 1) for line in printed if line.startswith("  "))
    convolutions = [name for name, layer in vae.named_modules() if isinstance(layer, nn.Conv2d)]
    assert list(forms) == [name for name in convolutions if "quant" not in name]
    assert forms["encoder.conv_in"] == "direct"
    if is_fast(dtype) and dtype == torch.float32:
        assert forms["decoder.up_blocks.0.upsamplers.0.conv"].startswith("F(4x4, 3x3) of a doubled map, ")
        middle = forms["decoder.mid_block.resnets.0.conv1"]
        assert re.fullmatch(r"F\(4x4, 3x3\), \d\.\de-0[67] from the direct convolution", middle)
    assert [line.split(" of the range")[0].rsplit(" ", 1)[0] for line in lines] == [
        f"{what} in {dtype}:" for what in ("encode", "decode")
    ]
    errors = [float(line.split(": ")[1].split(" ")[0]) for line in lines]
    assert max(errors) < (1e-4 if dtype == torch.float32 else 0.1)
    assert max(errors) > 0


def test_tiling_and_slicing_change_nothing():
    _, ours = pair(CONFIGS["sd"])
    x = torch.rand(2, 3, 80, 64)
    with torch.no_grad():
        before = ours(x).sample
        ours.enable_tiling()
        ours.enable_slicing()
        assert (ours(x).sample - before).abs().max() <= 1e-5


# ---- the fused functions


def test_a_compiler_that_fails_leaves_the_functions_as_they_are(monkeypatch, caplog):
    def fail(*_):
        raise InductorError(RuntimeError("Python.h: No such file"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(pointwise, "WORTH_COMPILING", 0)
    compiled = pointwise.compiled_function(sums)
    x, pivot = torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 1, 4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(compiled(x, pivot), sums(x, pivot))
        assert torch.equal(compiled(x, pivot), sums(x, pivot))
    assert caplog.text.count("Python.h") == 1
