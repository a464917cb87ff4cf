"""Runs that start from a codec: where it is found, how it is normalised, which of its parts move."""

from dataclasses import replace

import pytest
import torch
from small_runs import start, train
from starting_codecs import no_crops, run_of, saved, tiny

from latentcodec.codec import LatentCodec
from latentcodec.training.export.codec_folder import FinishConfig
from latentcodec.training.start.adapt import AdaptConfig
from latentcodec.training.start.model import ModelConfig, load_parent, new_vae

# ---- starting from a codec ----


@pytest.mark.parametrize("kind", ["folder", "subfolder", "pipeline", "file"])
def test_a_parent_is_found_wherever_it_lies(tmp_path, kind):
    vae, subfolder = tiny(), None
    source = saved(vae, tmp_path / "codec" / "vae")
    if kind == "subfolder":
        source, subfolder = str(tmp_path / "codec"), "vae"
    elif kind == "pipeline":
        source = str(tmp_path / "codec")
        (tmp_path / "codec" / "model_index.json").write_text("{}")
    elif kind == "file":
        source = str(tmp_path / "codec" / "vae" / "diffusion_pytorch_model.safetensors")
    parent = load_parent(ModelConfig(from_pretrained=source, subfolder=subfolder))
    assert all(torch.equal(parent.state_dict()[key], value) for key, value in vae.state_dict().items())
    assert new_vae(ModelConfig(from_pretrained=source), parent, None, no_crops) is parent


def test_a_codec_that_does_not_reconstruct_its_input_is_refused(tmp_path):
    source = saved(tiny(in_channels=4), tmp_path / "codec")
    with pytest.raises(ValueError, match=r"model\.from_pretrained .*4 channels and gives 3"):
        load_parent(ModelConfig(from_pretrained=source))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapt": AdaptConfig(image_channels=4)}, r"model\.adapt .*model\.from_pretrained"),
        (
            {"from_pretrained": "x", "part": "decoder", "adapt": AdaptConfig(latent_channels=4)},
            r"model\.part decoder keeps the latents",
        ),
        ({"part": "decoder", "teacher": "x"}, r"model\.part decoder trains no encoder"),
    ],
)
def test_contradicting_keys_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize("settings", [dict(from_pretrained="x", part="decoder"), dict(teacher="x")])
def test_a_normalisation_that_would_leave_the_kept_latents_is_refused(tmp_path, images, settings):
    with pytest.raises(ValueError, match=r"finish\.normalise whitened would change"):
        replace(run_of(tmp_path, images, ModelConfig(**settings)), finish=FinishConfig(normalise="whitened"))


@pytest.mark.parametrize(
    ("settings", "named", "done"),
    [
        ({}, None, "per_channel"),
        ({}, "one_scale", "one_scale"),
        (dict(from_pretrained="x"), None, None),
        (dict(from_pretrained="x"), "whitened", "whitened"),
        (dict(from_pretrained="x", adapt=AdaptConfig(latent_channels=4)), None, "per_channel"),
        (dict(from_pretrained="x", part="decoder"), None, None),
        (dict(teacher="x"), None, None),
        (dict(part="decoder"), None, "per_channel"),
        (dict(part="decoder"), "whitened", "whitened"),
    ],
)
def test_a_codec_is_normalised_if_it_is_new_or_if_that_was_asked_for(tmp_path, images, settings, named, done):
    config = run_of(tmp_path, images, ModelConfig(**settings))
    assert replace(config, finish=FinishConfig(normalise=named)).normalise == done


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"from_pretrained": "another"}, r"model\.from_pretrained: .*parent in the checkpoint, another now"),
        ({"adapt": AdaptConfig()}, r"model\.adapt\.latent_channels: 6 in the checkpoint, None now"),
        ({"teacher": "another"}, r"model\.teacher: None in the checkpoint, another now"),
    ],
    ids=str,
)
def test_a_run_keeps_the_parent_that_it_began_with(tmp_path, images, changed, said):
    source = saved(tiny(), tmp_path / "parent")
    model = ModelConfig(from_pretrained=source, adapt=AdaptConfig(latent_channels=6))
    train(start(run_of(tmp_path / "run", images, model)), stop_at=1)
    with pytest.raises(ValueError, match=said):
        start(run_of(tmp_path / "run", images, replace(model, **changed)))


# ---- parts ----


def test_decoder_training_leaves_the_latents_bit_identical(tmp_path, images):
    source = saved(tiny(quant=True), tmp_path / "parent")
    model = ModelConfig(from_pretrained=source, part="decoder")
    trainer = start(run_of(tmp_path / "run", images, model, max_steps=2))
    train(trainer)
    parent, ours = (LatentCodec.from_pretrained(path) for path in (source, tmp_path / "run/codec"))
    x = torch.rand(3, 3, 32, 40) * 2 - 1
    assert torch.equal(ours.vae.encode(x).latent_dist.parameters, parent.vae.encode(x).latent_dist.parameters)
    assert torch.equal(ours.encode(x), parent.encode(x))
    for key in ("latents_mean", "latents_std", "shift_factor", "scaling_factor"):
        assert ours.vae.config[key] == parent.vae.config[key]
    moved = [
        key
        for key, value in ours.vae.state_dict().items()
        if not torch.equal(value, parent.vae.state_dict()[key])
    ]
    assert moved
    assert all(key.startswith(("decoder", "post_quant_conv")) for key in moved)


def test_encoder_training_leaves_the_decoder_as_it_was():
    parent = tiny(quant=True)
    vae = new_vae(ModelConfig(from_pretrained="x", part="encoder"), parent, None, no_crops)
    trained = {name for name, parameter in vae.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in vae.named_parameters() if n.startswith(("encoder", "quant_conv"))}
