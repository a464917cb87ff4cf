"""optimize_vae and the way back: its bound on memory, the check that it prints, and restore_vae."""

import re
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from stock_pairs import CONFIGS, pair
from torch import nn

from latentcodec.adopt import optimize_vae, restore_vae
from latentcodec.engine.plan import Engine
from latentcodec.machine import is_fast
from latentcodec.ops.native.build import library
from latentcodec.stock import stock_copy

# ---- the bound on memory


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


# ---- the check


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


# ---- what stays as it was


def test_tiling_and_slicing_change_nothing():
    _, ours = pair(CONFIGS["sd"])
    x = torch.rand(2, 3, 80, 64)
    with torch.no_grad():
        before = ours(x).sample
        ours.enable_tiling()
        ours.enable_slicing()
        assert (ours(x).sample - before).abs().max() <= 1e-5


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
