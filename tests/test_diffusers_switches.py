"""What pipelines and users do to a VAE gives the numbers that it gives with diffusers' own class.

Casting, gradient checkpointing, adapters, compilation, attention processors and offloading, on the VAE itself.
"""

import copy

import accelerate
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from peft import LoraConfig
from tiny_pipelines import CASES, SIZE, draw, pipeline, tiny_vae


def reconstruction(vae: AutoencoderKL) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE).to(vae.device, vae.dtype)
    with torch.no_grad():
        return vae(x).sample


def stock(vae: AutoencoderKL) -> AutoencoderKL:
    """The same weights in diffusers' own encoder and decoder."""
    twin = AutoencoderKL.from_config(vae.config).eval()
    twin.load_state_dict(vae.state_dict())
    return twin


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the range: one was run in strips, the other as modules."""
    assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_diffusers(dtype):
    vae = tiny_vae()
    exact, theirs = reconstruction(vae), reconstruction(stock(vae).to(dtype))
    ours = reconstruction(vae.to(dtype))
    assert ours.dtype == dtype
    assert (ours.float() - exact).abs().mean() <= 1.01 * (theirs.float() - exact).abs().mean() + 1e-6


def test_gradient_checkpointing_gives_the_same_gradients():
    vae = tiny_vae().train()
    x = torch.rand(2, 3, SIZE, SIZE)
    gradients = []
    for switch in (vae.disable_gradient_checkpointing, vae.enable_gradient_checkpointing):
        switch()
        vae.zero_grad()
        vae(x).sample.square().sum().backward()
        gradients.append([copy.copy(p.grad) for p in vae.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 100
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_an_adapter_changes_the_output_and_fits_the_stock_class(tmp_path):
    vae = tiny_vae()
    before, twin = reconstruction(vae), stock(vae)
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q", "to_out.0"], init_lora_weights=False))
    adapted = reconstruction(vae)
    change = (adapted - before).abs().max()
    assert change > 0.1
    vae.save_lora_adapter(tmp_path)
    twin.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert (reconstruction(twin) - adapted).abs().max() < 1e-3 * change
    vae.disable_adapters()
    assert_close(reconstruction(vae), before)


def test_only_the_adapter_learns():
    vae = tiny_vae()
    vae.requires_grad_(False)
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv2", "to_v"]))
    vae(torch.rand(1, 3, SIZE, SIZE)).sample.square().sum().backward()
    learning = {name for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same_numbers():
    """Traced by dynamo in one graph, run eagerly: the modules, of which no operation stops `torch.compile`."""
    vae = tiny_vae()
    expected = reconstruction(vae)
    vae.decoder = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    assert_close(reconstruction(vae), expected)


def test_attention_processors_are_listed_as_diffusers_lists_them():
    """Our attention is already one fused call: the switches of diffusers stay callable and change nothing."""
    vae = tiny_vae()
    expected = reconstruction(vae)
    stock = AutoencoderKL.from_config(vae.config).attn_processors
    assert {name: type(p) for name, p in vae.attn_processors.items()} == {
        n: type(p) for n, p in stock.items()
    }
    assert stock
    for switch in (vae.set_default_attn_processor, vae.fuse_qkv_projections, vae.unfuse_qkv_projections):
        switch()
        assert torch.equal(reconstruction(vae), expected)


# ---- offloading


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same_numbers(kind):
    vae = tiny_vae()
    expected = reconstruction(vae)
    blocks = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
    vae.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
    assert_close(reconstruction(vae), expected)


def test_weights_offloaded_to_the_disk_give_the_same_numbers(tmp_path):
    vae = tiny_vae()
    expected = reconstruction(vae)
    accelerate.disk_offload(vae, tmp_path, execution_device=torch.device("cpu"))
    assert vae.decoder.conv_in.weight.device.type == "meta"
    x = torch.linspace(-1, 1, 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert_close(vae(x).sample, expected)


def test_model_cpu_offload_gives_the_same_image(tmp_path):
    if not torch.accelerator.is_available():
        pytest.skip("diffusers offloads from an accelerator to the CPU, and this machine has no accelerator")
    pipe, inputs = pipeline(CASES["text2img"], tmp_path), CASES["text2img"].inputs()
    expected = draw(pipe, inputs)
    pipe.enable_model_cpu_offload()
    assert np.abs(draw(pipe, inputs) - expected).max() < 1e-2
