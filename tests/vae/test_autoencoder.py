"""Our Encoder and Decoder are diffusers' own, number for number and key for key, in every public configuration."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from stock_pairs import CONFIGS, config, pair

from latentcodec.adopt import adopt, build, optimize_vae
from latentcodec.vae.networks import Decoder, Encoder, downsampling_factor

FROZEN_KEYS = Path(__file__).parent / "state_dict_keys.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_and_image_equal_diffusers_to_1e4_of_the_range(name):
    reference, ours = pair(CONFIGS[name])
    assert type(ours) is AutoencoderKL
    assert isinstance(ours.encoder, Encoder)
    assert isinstance(ours.decoder, Decoder)
    f = downsampling_factor(ours.config)
    x = torch.rand(2, ours.config.in_channels, 2 * f, 3 * f + f) * 2 - 1
    with torch.no_grad():
        moments = reference._encode(x)
        z = reference.encode(x).latent_dist.mode()
        image = reference.decode(z).sample
        assert (ours._encode(x) - moments).abs().max() <= 1e-4 * (moments.max() - moments.min())
        assert (ours.decode(z).sample - image).abs().max() <= 1e-4 * (image.max() - image.min())


@pytest.mark.parametrize("name", ["sd", "photo-f8c16", "attention in the stages"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_diffusers(name, checkpointing):
    reference, ours = pair(CONFIGS[name])
    if checkpointing:
        ours.enable_gradient_checkpointing()
    x = torch.rand(1, 3, 16, 24)
    for vae in (reference, ours):
        vae(x).sample.square().mean().backward()
    for (name, expected), (_, actual) in zip(
        reference.named_parameters(), ours.named_parameters(), strict=True
    ):
        if expected.grad is not None:
            scale = expected.grad.abs().max() + 1e-6  # the bias of to_k has a gradient of exactly zero
            assert (actual.grad - expected.grad).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_keys_and_shapes_equal_diffusers(name):
    """Also in the same order, which is what optimizer states and safetensors files are written in."""
    expected = AutoencoderKL(**CONFIGS[name]).state_dict()
    actual = build(CONFIGS[name]).state_dict()
    assert [(key, value.shape) for key, value in actual.items()] == [
        (k, v.shape) for k, v in expected.items()
    ]


def test_state_dict_keys_are_frozen():
    """Saved codecs are a public interface: a renamed key would orphan every checkpoint people own."""
    keys = sorted(build(CONFIGS["sd"]).state_dict())
    assert keys == json.loads(FROZEN_KEYS.read_text())


def test_train_and_eval_mode_give_the_same_numbers():
    _, ours = pair(CONFIGS["photo-f8c16"])
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.train()(x).sample, ours.eval()(x).sample)


def test_tiling_and_slicing_are_exact():
    reference, ours = pair(config(sample_size=16))
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        moments, image = reference._encode(x), reference(x).sample
        reference.enable_tiling()
        assert (reference(x).sample - image).abs().max() > 1e-2  # diffusers' tiles blend and differ
        ours.enable_tiling()
        ours.enable_slicing()
        assert (ours.encode(x).latent_dist.parameters - moments).abs().max() <= 1e-4 * moments.abs().max()
        assert (ours(x).sample - image).abs().max() <= 1e-4 * (image.max() - image.min())


def test_adopted_parameters_are_the_same_objects():
    vae = AutoencoderKL(**CONFIGS["sd"]).eval().to(torch.bfloat16)
    vae.encoder.requires_grad_(False)
    before = dict(vae.named_parameters())
    after = dict(adopt(vae).named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert not any(parameter.requires_grad for parameter in vae.encoder.parameters())
    assert not vae.encoder.training


def test_optimized_vae_gives_the_same_numbers_and_adopting_twice_is_harmless():
    reference, ours = pair(CONFIGS["photo-f8c16"])
    x = torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        assert (optimize_vae(optimize_vae(ours))(x).sample - reference(x).sample).abs().max() <= 1e-4


def test_saved_folder_is_plain_diffusers(tmp_path):
    _, ours = pair(CONFIGS["sd3"])
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert type(stock.encoder).__module__.startswith("diffusers.")
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert (stock(x).sample - ours(x).sample).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_chanels": 4}, "latent_chanels"),
        ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, "DownBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1"),
        ({"act_fn": "tanh"}, "act_fn"),
    ],
)
def test_an_impossible_config_names_its_key(change, words):
    with pytest.raises(ValueError, match=words):
        build({**config(), **change})


def test_what_is_no_autoencoder_is_refused():
    with pytest.raises(TypeError, match="UNet2DModel"):
        adopt(
            UNet2DModel(
                block_out_channels=(32, 32),
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            )
        )


def test_a_changed_vae_is_refused():
    vae = AutoencoderKL(**config())
    vae.encoder.conv_out = torch.nn.Conv2d(32, 12, 3, padding=1)
    with pytest.raises(ValueError, match="conv_out"):
        adopt(vae)
