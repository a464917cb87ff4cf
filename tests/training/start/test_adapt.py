"""A codec that is adapted to other image channels or to other latent channels does what its parent did."""

import pytest
import torch
from small_runs import start, train
from starting_codecs import copy_of, crops, no_crops, reconstruction, run_of, saved, tiny

from latentcodec.codec import LatentCodec
from latentcodec.latents import latent_statistics
from latentcodec.training.config import parse
from latentcodec.training.start.adapt import AdaptConfig, change_image_channels, change_latent_channels
from latentcodec.training.start.model import ModelConfig, image_channels

# ---- other image channels ----


def test_the_images_have_the_channels_of_the_parent_unless_it_is_adapted():
    grey = tiny(in_channels=1, out_channels=1)
    assert image_channels(ModelConfig(), None) == 3
    assert image_channels(ModelConfig(from_pretrained="x"), grey) == 1
    adapted = ModelConfig(from_pretrained="x", adapt=AdaptConfig(image_channels=4))
    assert image_channels(adapted, grey) == 4


@pytest.mark.parametrize(
    ("old", "new", "seen_by_parent"),
    [
        (3, 1, lambda x: x.expand(-1, 3, -1, -1)),
        (1, 3, lambda x: x.mean(1, keepdim=True)),
        (3, 4, lambda x: x[:, :3]),
        (4, 3, lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], 1)),
    ],
)
def test_other_image_channels_reconstruct_as_the_parent_by_the_rule(old, new, seen_by_parent):
    parent = tiny(in_channels=old, out_channels=old)
    vae = copy_of(parent)
    change_image_channels(vae, new)
    x = torch.rand(2, new, 16, 20) * 2 - 1
    y, expected = reconstruction(vae, x), reconstruction(parent, seen_by_parent(x))
    assert y.shape == x.shape
    if new == 1:
        expected = expected.mean(1, keepdim=True)
    elif old == 1:
        expected = expected.expand(-1, new, -1, -1)
    elif new > old:
        expected = torch.cat([expected, expected.mean(1, keepdim=True)], 1)
    assert torch.allclose(y, expected[:, :new], atol=1e-5)
    assert vae.config.in_channels == vae.config.out_channels == new


# ---- other latent channels ----


@pytest.mark.parametrize("quant", [False, True])
def test_more_latent_channels_leave_the_reconstruction_and_the_old_latents_as_they_were(quant):
    parent = tiny(quant)
    vae = copy_of(parent)
    change_latent_channels(vae, 7, crops)
    x = torch.rand(2, 3, 16, 20) * 2 - 1
    assert torch.allclose(reconstruction(vae, x), reconstruction(parent, x), atol=1e-5)
    ours, theirs = (codec.encode(x).latent_dist for codec in (vae, parent))
    assert torch.allclose(ours.mode()[:, :4], theirs.mode(), atol=1e-5)
    assert torch.allclose(ours.logvar[:, :4], theirs.logvar, atol=1e-5)


def test_new_latents_are_normal_and_learn_from_the_first_step():
    vae, pictures = tiny(), crops()
    target = latent_statistics(vae, [torch.stack(pictures)]).std.mean()
    change_latent_channels(vae, 7, lambda: pictures)
    statistics = latent_statistics(vae, [torch.stack(pictures)])
    assert torch.allclose(statistics.mean[4:], torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(statistics.std[4:], target.expand(3), rtol=1e-4)
    assert torch.allclose(statistics.logvar[4:].exp().sqrt(), 0.01 * target.expand(3), rtol=1e-4)
    vae.decoder.conv_in.requires_grad_(True)
    (reconstruction(vae, torch.stack(pictures)) - torch.stack(pictures)).square().sum().backward()
    assert vae.decoder.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0


@pytest.mark.parametrize("quant", [False, True])
def test_fewer_latent_channels_keep_those_that_explain_the_most_pixels(quant):
    parent, pictures = tiny(quant), crops(16)
    vae, full = copy_of(parent), copy_of(parent)
    change_latent_channels(vae, 3, lambda: pictures)
    x = torch.stack(pictures)
    statistics = latent_statistics(vae, [x])
    assert torch.allclose(statistics.covariance, torch.eye(3).double(), atol=1e-3)
    energy = statistics.pixels.square().sum(0)
    assert (energy.diff() <= 1e-4 * energy[0]).all()
    assert (vae.quant_conv is not None) == quant
    # What its decoder sees is the parent's latent, regressed on the kept ones, but for the outermost cells.
    raw, kept = (codec.encode(x).latent_dist.mode() for codec in (full, vae))
    rows, known = (z.transpose(0, 1).flatten(1).double() for z in (raw, kept))
    known = torch.cat([torch.ones_like(known[:1]), known])
    projected = (rows @ known.T @ torch.linalg.inv(known @ known.T) @ known).float()
    projected = projected.unflatten(1, (16, *raw.shape[2:])).transpose(0, 1)
    if quant:
        projected, kept = full.post_quant_conv(projected), vae.post_quant_conv(kept)
    ours, theirs = vae.decoder.conv_in(kept), full.decoder.conv_in(projected)
    assert (ours - theirs)[:, :, 1:-1, 1:-1].abs().max() < 1e-3 * theirs.abs().max()


# ---- either ----


def test_the_same_number_of_channels_changes_nothing():
    vae = tiny()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    change_image_channels(vae, 3)
    change_latent_channels(vae, 4, no_crops)
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())
    assert vae.config.scaling_factor == 0.5


def test_an_adapted_codec_is_saved_and_loaded_like_any_other(tmp_path):
    vae = tiny(quant=True)
    change_image_channels(vae, 4)
    change_latent_channels(vae, 6, lambda: crops(channels=4))
    x = torch.rand(1, 4, 16, 16)
    again = LatentCodec.from_pretrained(saved(vae, tmp_path / "codec")).vae
    assert torch.allclose(reconstruction(again, x), reconstruction(vae, x), atol=1e-6)


def test_an_adapted_codec_trains(tmp_path, images):
    source = saved(tiny(), tmp_path / "parent")
    model = ModelConfig(from_pretrained=source, adapt=AdaptConfig(image_channels=1, latent_channels=6))
    trainer = start(run_of(tmp_path / "run", images, model, max_steps=1))
    train(trainer)
    codec = LatentCodec.from_pretrained(tmp_path / "run/codec")
    assert (codec.image_channels, codec.latent_channels) == (1, 6)
    assert len(codec.latents_std) == 6
    assert (codec.vae.config.scaling_factor, codec.vae.config.shift_factor) == (1, 0)  # folded


def test_adapted_channels_can_be_given_on_the_command_line():
    arguments = ["--output_dir", "x", "--model.from_pretrained", "y", "--model.adapt.image_channels", "4"]
    assert parse(arguments).model.adapt == AdaptConfig(image_channels=4)
