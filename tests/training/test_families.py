"""Training of every covered class: fine-tuned, and distilled from a teacher into its latent space."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import small, start, train, write_images

sys.path.insert(0, str(Path(__file__).parents[1] / "vae"))
from small_vaes import SMALL, small_vae

from latentcodec import LatentCodec
from latentcodec.adopt import adopt
from latentcodec.latents import decode_raw, posterior_parameters
from latentcodec.training.config import parse
from latentcodec.training.export.codec_folder import FinishConfig
from latentcodec.training.start.adapt import AdaptConfig
from latentcodec.training.start.model import ModelConfig, load_teacher, new_vae
from latentcodec.vae.families import family_of
from latentcodec.vae.padding import PADDING_KEY

CONFIGS = Path(__file__).parents[2] / "train/configs"
TRAINED = ("flux2", "qwen", "wan21", "wan22")
STUDENT = dict(block_out_channels=[8, 8, 16, 16], latent_channels=4, norm_num_groups=4, init="default")


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", side=64)


def run_of(output, images, model, **settings):
    config = small(output, images, max_steps=2, batch_size=2, **settings)
    return replace(config, model=model, data=replace(config.data, resolution=64, val_resolution=64))


def saved(vae, folder):
    LatentCodec(vae).save_pretrained(folder)
    return str(folder)


def numbers(codec):
    """What normalises its latents, as its class keeps it."""
    values = [codec.vae.config[key] for key in codec.family.normalisation]
    return values, [buffer.tolist() for name, buffer in codec.vae.named_buffers() if "running" in name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_student_is_of_its_teachers_class_and_has_its_numbers(name, tmp_path, images):
    source = saved(small_vae(name), tmp_path / "teacher")
    config = run_of(tmp_path / "run", images, ModelConfig(teacher=source, **STUDENT))
    train(start(config))
    codec, teacher = (LatentCodec.from_pretrained(path) for path in (tmp_path / "run/codec", source))
    assert type(codec.vae) is SMALL[name][0]
    assert numbers(codec) == numbers(teacher)
    assert (codec.latent_channels, codec.downsampling_factor) == (
        teacher.latent_channels,
        teacher.downsampling_factor,
    )
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    drifts = [line["latent_drift"] for line in lines if "latent_drift" in line]
    assert drifts
    assert len(codec.latents_std) == codec.latent_channels
    assert all(drift > 0 for drift in drifts)
    stock = SMALL[name][0].from_pretrained(tmp_path / "run/codec")  # without this package
    assert stock.config == codec.vae.config or stock.state_dict().keys() == codec.vae.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["all", "decoder"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_fine_tuned_codec_keeps_its_parents_numbers_to_the_last_digit(name, part, tmp_path, images):
    source = saved(small_vae(name), tmp_path / "parent")
    before = Path(source, "config.json").read_text()
    train(start(run_of(tmp_path / "run", images, ModelConfig(from_pretrained=source, part=part))))
    codec, parent = (LatentCodec.from_pretrained(path) for path in (tmp_path / "run/codec", source))
    assert numbers(codec) == numbers(parent)
    moved = {
        key
        for key, value in codec.vae.state_dict().items()
        if not torch.equal(value, parent.vae.state_dict()[key])
    }
    assert any(key.startswith("decoder.") for key in moved)
    assert any(key.startswith("encoder.") for key in moved) == (part == "all")
    assert Path(source, "config.json").read_text() == before


def test_what_only_one_kind_of_class_can_do_is_refused_by_key(tmp_path):
    qwen = saved(small_vae("qwen"), tmp_path / "qwen")
    linear = ModelConfig(teacher=qwen, **STUDENT | dict(init="linear"))
    teacher = load_teacher(linear, torch.device("cpu"), False)
    with pytest.raises(ValueError, match=r"model\.init linear needs group norms, and AutoencoderKLQwenImage"):
        new_vae(linear, None, teacher, list)
    parent = small_vae("flux2")
    adapted = ModelConfig(from_pretrained="x", adapt=AdaptConfig(latent_channels=8))
    with pytest.raises(
        ValueError, match=r"model\.adapt changes an AutoencoderKL, .* is a AutoencoderKLFlux2"
    ):
        new_vae(adapted, parent, None, list)
    with pytest.raises(ValueError, match=r"model\.teacher is a AutoencoderKLQwenImage, .* a AutoencoderKL"):
        new_vae(ModelConfig(from_pretrained="x", teacher=qwen), small_vae("kl"), teacher, list)
    with pytest.raises(ValueError, match=r"model\.latent_channels 8: model\.teacher has 4"):
        new_vae(replace(linear, init="default", latent_channels=8), None, teacher, list)
    tuned = ModelConfig(from_pretrained="x", gradient_checkpointing=True)
    with pytest.raises(
        ValueError, match=r"model\.gradient_checkpointing: AutoencoderKLQwenImage .* set it to false"
    ):
        new_vae(tuned, small_vae("qwen"), None, list)


@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_that_is_trained_gets_a_gradient_from_images(name):
    """Or DDP waits for it and the second step of several processes fails."""
    vae = new_vae(ModelConfig(from_pretrained="x"), adopt(small_vae(name).train()), None, list)
    family, x = family_of(vae), torch.randn(1, 3, 32, 32)
    mean = posterior_parameters(vae, x).chunk(2, 1)[0]
    (decode_raw(vae, mean).square().mean() + mean.square().mean()).backward()
    missing = [key for key, p in vae.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    if family.has_frames:
        assert any("time_conv" in key for key, _ in vae.named_parameters())


def test_a_padding_that_the_parent_does_not_have_is_refused_and_its_own_is_kept():
    parent = adopt(small_vae("kl"))
    with pytest.raises(ValueError, match=r"model\.padding_mode circular: .*from_pretrained keeps its own"):
        new_vae(ModelConfig(from_pretrained="x", padding_mode="circular"), parent, None, list)
    parent.register_to_config(**{PADDING_KEY: "circular"})
    assert new_vae(ModelConfig(from_pretrained="x", padding_mode="circular"), parent, None, list) is parent
    assert new_vae(ModelConfig(from_pretrained="x"), parent, None, list) is parent


@pytest.mark.parametrize("name", ["flux2", "qwen-image"])
def test_the_configurations_with_such_teachers_can_be_built(name):
    config = parse(
        ["--config", str(CONFIGS / f"distill-{name}.yaml"), "--output_dir", "x", "--data.path", "y"]
    )
    kind = {"flux2": "flux2", "qwen-image": "qwen"}[name]
    channels = config.model.latent_channels
    others = {} if kind == "flux2" else dict(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    teacher = small_vae(kind, **{"latent_channels" if kind == "flux2" else "z_dim": channels}, **others)

    from latentcodec.training.losses.teacher import Teacher

    student = new_vae(
        replace(config.model, init="default"), None, Teacher(LatentCodec(teacher), 1.0, True, False), list
    )
    assert type(student) is type(teacher)
    assert sum(p.numel() for p in student.parameters()) < 15e6


def test_only_the_class_that_has_the_convolutions_is_normalised_anew(tmp_path, images):
    source = saved(small_vae("qwen"), tmp_path / "qwen")
    config = run_of(tmp_path / "run", images, ModelConfig(from_pretrained=source))
    with pytest.raises(
        ValueError, match=r"finish\.normalise whitened needs an AutoencoderKL, .* AutoencoderKLQwenImage"
    ):
        start(replace(config, finish=FinishConfig(normalise="whitened")))
