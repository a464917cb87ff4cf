"""Where the weights start: pretrained codecs, changes of channels, frozen parts, teachers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clean_processes import ranks, start_process
from small_runs import metrics, small, start, train, write_images
from torch import nn

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.latents import Normalisation, fold, latent_statistics
from latentcodec.training.config import Config, parse
from latentcodec.training.export.codec_folder import FinishConfig
from latentcodec.training.losses.objective import Inputs
from latentcodec.training.losses.teacher import Teacher, anchor_loss, deviation_loss
from latentcodec.training.start.adapt import AdaptConfig, change_image_channels, change_latent_channels
from latentcodec.training.start.linear import linear_start
from latentcodec.training.start.model import ModelConfig, image_channels, load_parent, new_vae
from latentcodec.vae.posterior import mean_and_logvar

CONFIGS = Path(__file__).parents[3] / "train/configs"


def tiny(quant=False, **settings):
    """An f4 codec with 4 latents of random weights, whose latents have other means and deviations each."""
    settings = {"latent_channels": 4, "block_out_channels": [8, 8, 16], **settings}
    stages = len(settings["block_out_channels"])
    vae = build(
        {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
            "norm_num_groups": 2,
            "mid_block_add_attention": False,
            "use_quant_conv": quant,
            "use_post_quant_conv": quant,
            **settings,
        }
    ).eval()
    c = vae.config.latent_channels
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        vae.encoder.conv_out.bias[:c] = torch.linspace(-1, 2, c)
        vae.encoder.conv_out.bias[c:] = torch.linspace(-4, -6, c)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    return vae.requires_grad_(False)


def saved(vae, folder):
    LatentCodec(vae).save_pretrained(folder)
    return str(folder)


def copy_of(vae):
    other = build({key: value for key, value in vae.config.items() if not key.startswith("_")}).eval()
    other.load_state_dict(vae.state_dict())
    return other.requires_grad_(False)


def reconstruction(vae, x):
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def crops(count=8, channels=3, side=32):
    coarse = torch.randn(count, channels, side // 4, side // 4)
    return list(nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1))


def no_crops():
    raise AssertionError("nothing of this start depends on images")


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", side=32)


def run_of(output, images, model, **settings) -> Config:
    return replace(small(output, images, **settings), model=model)


def reported(output, key):
    """All values of a key of metrics.jsonl."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


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


def test_the_images_have_the_channels_of_the_parent_unless_it_is_adapted():
    grey = tiny(in_channels=1, out_channels=1)
    assert image_channels(ModelConfig(), None) == 3
    assert image_channels(ModelConfig(from_pretrained="x"), grey) == 1
    adapted = ModelConfig(from_pretrained="x", adapt=AdaptConfig(image_channels=4))
    assert image_channels(adapted, grey) == 4


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


# ---- other image channels ----


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


def test_an_adapted_codec_is_saved_and_loaded_like_any_other(tmp_path):
    vae = tiny(quant=True)
    change_image_channels(vae, 4)
    change_latent_channels(vae, 6, lambda: crops(channels=4))
    x = torch.rand(1, 4, 16, 16)
    again = LatentCodec.from_pretrained(saved(vae, tmp_path / "codec")).vae
    assert torch.allclose(reconstruction(again, x), reconstruction(vae, x), atol=1e-6)


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


def test_the_same_number_of_channels_changes_nothing():
    vae = tiny()
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    change_image_channels(vae, 3)
    change_latent_channels(vae, 4, no_crops)
    assert all(torch.equal(before[key], value) for key, value in vae.state_dict().items())
    assert vae.config.scaling_factor == 0.5


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


def test_an_adapted_codec_trains(tmp_path, images):
    source = saved(tiny(), tmp_path / "parent")
    model = ModelConfig(from_pretrained=source, adapt=AdaptConfig(image_channels=1, latent_channels=6))
    trainer = start(run_of(tmp_path / "run", images, model, max_steps=1))
    train(trainer)
    codec = LatentCodec.from_pretrained(tmp_path / "run/codec")
    assert (codec.image_channels, codec.latent_channels) == (1, 6)
    assert len(codec.latents_std) == 6
    assert (codec.vae.config.scaling_factor, codec.vae.config.shift_factor) == (1, 0)  # folded


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


# ---- teachers ----


def teacher_of(vae, gives_latents=False):
    return Teacher(LatentCodec(vae), 1.0, gives_latents, bfloat16=False)


def test_the_anchor_is_in_units_of_the_teachers_deviation():
    unit = torch.tensor([2.0, 0.5])[:, None, None]
    target = torch.randn(3, 2, 4, 4)
    off = target + 3 * unit * torch.tensor([1.0, -1.0, 0.0])[:, None, None, None]
    assert torch.allclose(anchor_loss(off, target, unit), torch.tensor([9.0, 9.0, 0.0]), atol=1e-5)
    doubled = deviation_loss(target + 2 * math.log(2), target)
    assert torch.allclose(doubled, torch.full((3,), math.log(2) ** 2), atol=1e-5)


def test_the_decoder_learns_from_the_teachers_draw_where_it_should():
    vae = tiny()
    x, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    inputs = Inputs(x, x, noise, [lambda z: 10 * z], x)
    with torch.no_grad():  # as the teacher runs
        mean, logvar = mean_and_logvar(vae.encode(x).latent_dist.parameters)
    lesson, changed = teacher_of(vae, gives_latents=True).lesson(inputs)
    assert torch.equal(lesson.mean, mean)
    drawn = 10 * (mean + (logvar / 2).exp() * noise)
    assert torch.allclose(changed.transform(torch.zeros_like(noise)), drawn, atol=1e-5)
    _, unchanged = teacher_of(vae).lesson(inputs)
    assert torch.equal(unchanged.transform(noise), 10 * noise)


def test_the_drift_is_the_rms_in_the_teachers_units_and_the_correlation():
    vae = tiny()
    student = copy_of(vae)
    x = torch.stack(crops())
    teacher = teacher_of(vae)
    still = teacher.drift(student, x.split(3))
    assert still.rms == 0
    assert still.correlation == pytest.approx([1, 1, 1, 1])
    student.encoder.conv_out.bias[:4] += 1  # half of the teacher's deviation, which its scale says to be 2
    student.encoder.conv_out.weight[0] *= -1
    moved = teacher.drift(student, x.split(3))
    student_z, teacher_z = (codec.encode(x).latent_dist.mode() for codec in (student, vae))
    assert moved.rms == pytest.approx(((student_z - teacher_z) / 2).square().mean().sqrt().item(), rel=1e-5)
    assert moved.correlation == pytest.approx([-1, 1, 1, 1])


def test_the_linear_start_of_a_student_is_the_teachers_where_that_is_linear():
    settings = ModelConfig(latent_channels=4, block_out_channels=[16, 16, 16], norm_num_groups=2, teacher="x")
    pictures = crops(32)
    x = torch.stack(pictures)
    linear = tiny(block_out_channels=[16, 16, 16])
    linear_start(linear, pictures)
    fold(
        linear,
        Normalisation(*(torch.randn(4, 4).double() for _ in "WV"), torch.randn(4).double(), torch.zeros(4)),
    )
    linear.register_to_config(scaling_factor=1 / latent_statistics(linear, [x]).std.mean().item())
    teacher = teacher_of(linear)
    drift = teacher.drift(new_vae(settings, None, teacher, lambda: pictures), [x])
    assert drift.rms < 0.1
    assert min(drift.correlation) > 0.99
    nonlinear = teacher_of(tiny())
    student = new_vae(settings, None, nonlinear, lambda: pictures)
    assert min(nonlinear.drift(student, [x]).correlation) > 0.2
    y = student.decode(nonlinear.latents(pictures)).sample
    assert (y - x).square().mean() < 0.9 * x.var()  # it decodes the teacher's latents, not its own


def test_distillation_reaches_the_teachers_latents_and_hands_on_its_numbers(tmp_path, images):
    source = saved(tiny(), tmp_path / "teacher")
    model = ModelConfig(
        latent_channels=4,
        block_out_channels=[8, 8, 16],
        norm_num_groups=2,
        init="default",
        teacher=source,
        teacher_latents=True,
    )
    trainer = start(run_of(tmp_path / "run", images, model, max_steps=16, checkpoint_every=8, lr=1e-2))
    train(trainer)
    anchors = reported(tmp_path / "run", "anchor")
    assert sum(anchors[-3:]) < 0.7 * sum(anchors[:3])
    drifts = reported(tmp_path / "run", "latent_drift")
    assert len(drifts) == 2
    assert drifts[1] < drifts[0]
    codec, teacher = (LatentCodec.from_pretrained(path) for path in (tmp_path / "run/codec", source))
    assert torch.equal(codec.latents_std, teacher.latents_std)
    assert codec.vae.config.shift_factor == 0.25
    assert f"off by {drifts[1]:.4f}" in (tmp_path / "run/codec/README.md").read_text()


@pytest.mark.slow
def test_a_distillation_that_was_stopped_goes_on_bit_for_bit(tmp_path, images):
    model = ModelConfig(
        latent_channels=4,
        block_out_channels=[16, 16, 16],
        norm_num_groups=2,
        teacher=saved(tiny(), tmp_path / "teacher"),
        teacher_latents=True,
    )
    undisturbed, config = (run_of(tmp_path / name, images, model, max_steps=4) for name in ("peace", "run"))
    train(start(undisturbed))
    train(start(config), kill_at=3)
    train(start(config))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "peace")


def test_a_teacher_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"model\.teacher has latent_channels 4, the codec .* has 16"):
        new_vae(ModelConfig(teacher="x"), None, teacher_of(tiny()), no_crops)


def _trained_weights(config) -> list[torch.Tensor]:
    trainer = start(config)
    train(trainer)
    return [parameter.detach().clone() for parameter in trainer.state.codec.parameters()]


def _one_of_two(config, results) -> None:
    torch.save(_trained_weights(config), results)
    torch.distributed.destroy_process_group()


def _train_in_two_processes(config, results) -> None:
    processes = [
        start_process(results / f"{rank}.log", variables, _one_of_two, config, results / f"{rank}.pt")
        for rank, variables in enumerate(ranks(2))
    ]
    for rank, process in enumerate(processes):
        process.join(timeout=120)
        assert process.exitcode == 0, (results / f"{rank}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("follows", ["nobody", "its latents"])
def test_two_processes_fine_tune_and_finish_as_one_does(tmp_path, images, follows):
    source = saved(tiny(), tmp_path / "parent")
    # Another one than the parent: where both are the same, gradients are rounding alone, and Muon makes steps of it.
    teacher = None if follows == "nobody" else saved(tiny(), tmp_path / "teacher")
    model = ModelConfig(from_pretrained=source, teacher=teacher, teacher_latents=follows == "its latents")
    one, two = (
        run_of(tmp_path / name, images, model, max_steps=3, batch_size=size, checkpoint_every=9)
        for name, size in (("one", 4), ("two", 2))
    )
    _train_in_two_processes(two, tmp_path)
    expected = _trained_weights(one)
    for rank in range(2):
        for ours, theirs in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5
    ours, theirs = (LatentCodec.from_pretrained(tmp_path / name / "codec") for name in ("two", "one"))
    assert torch.allclose(ours.latents_mean, theirs.latents_mean, atol=1e-4)
    assert torch.allclose(ours.latents_std, theirs.latents_std, rtol=1e-4)
    parent = LatentCodec.from_pretrained(source)
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        assert ours.vae.config[key] == parent.vae.config[key]
    drifts = [reported(tmp_path / name, "latent_drift") for name in ("one", "two")]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)
    assert bool(drifts[0]) == (follows != "nobody")


# ---- the configurations that come with the project ----


def a_short_run_of(name, output, images, *settings) -> Config:
    """A configuration of the project on small crops: its recipe, but for what is given here."""
    small = ["resolution=32", "val_images=2", "val_resolution=32", "workers=0"]
    short = ["max_steps=24", "batch_size=4", "checkpoint_every=8", "statistics_images=8", "lr=5e-3"]
    arguments = [f"--data.{text}" for text in [f"path={images}", *small]] + [f"--train.{t}" for t in short]
    return parse(
        ["--config", str(CONFIGS / f"{name}.yaml"), "--output_dir", str(output), *arguments, *settings]
    )


@pytest.mark.slow
def test_the_distillation_configuration_brings_a_student_closer_to_its_teacher(tmp_path, images):
    teacher = f"--model.teacher={saved(tiny(), tmp_path / 'teacher')}"
    student = ["--model.block_out_channels=[16,16,16]", "--model.norm_num_groups=2"]
    train(start(a_short_run_of("distill-f8c4", tmp_path / "run", images, teacher, *student)))
    first, _, last = reported(tmp_path / "run", "latent_drift")
    assert last < 0.95 * first
    assert f"off by {last:.4f}" in (tmp_path / "run/codec/README.md").read_text()


class RandomFeatures(nn.Module):
    """In the place of LPIPS, whose trained network is no part of a checkout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.requires_grad_(False)

    def forward(self, y, x):
        return (self.features(y) - self.features(x)).square().mean((1, 2, 3))


@pytest.mark.slow
def test_the_decoder_configuration_lowers_its_perceptual_loss_and_keeps_the_latents(
    tmp_path, images, monkeypatch
):
    monkeypatch.setattr("latentcodec.quality.perceptual.load_lpips", lambda *_: RandomFeatures())
    source = saved(tiny(), tmp_path / "parent")
    parent = [f"--model.from_pretrained={source}", "--loss.lpips_net=squeeze"]
    train(start(a_short_run_of("finetune-decoder", tmp_path / "run", images, *parent)))
    distances = reported(tmp_path / "run", "lpips")
    assert sum(distances[-6:]) < 0.9 * sum(distances[:6])
    x = torch.rand(1, 3, 32, 40) * 2 - 1
    ours, theirs = (LatentCodec.from_pretrained(path).encode(x) for path in (tmp_path / "run/codec", source))
    assert torch.equal(ours, theirs)


def test_adapted_channels_can_be_given_on_the_command_line():
    arguments = ["--output_dir", "x", "--model.from_pretrained", "y", "--model.adapt.image_channels", "4"]
    assert parse(arguments).model.adapt == AdaptConfig(image_channels=4)
