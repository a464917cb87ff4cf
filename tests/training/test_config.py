"""The configuration is read strictly: what is not known, or cannot be, ends the program with one line that names it."""

import os
import threading
from dataclasses import asdict, replace

import pytest
import yaml
from accelerate import Accelerator

from latentcodec.training.config import Config, parse
from latentcodec.training.journal import Journal
from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.optim.schedule import TrainConfig


def refusal(capsys, *arguments: str) -> str:
    """What `parse` says before it ends the program; the way it must say it."""
    with pytest.raises(SystemExit) as end:
        parse(["--output_dir", "runs/x", *arguments])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_command_line_overrides_file_overrides_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  lr: 3e-4\n  batch_size: 5\nloss:\n  kl_weight: 1e-5\n")
    config = parse(["--config", str(file), "--output_dir", "runs/x", "--train.batch_size", "7"])
    assert config.train.batch_size == 7
    assert config.train.lr == 3e-4
    assert config.loss.kl_weight == 1e-5
    assert config.train.seed == TrainConfig().seed


def test_no_argument_but_the_folder_gives_the_defaults():
    assert parse(["--output_dir", "runs/x"]) == Config("runs/x")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--train.max_step", "3"], ["train.max_step"]),  # a prefix of a key is not that key
        (["--data.val_imagse", "3"], ["data.val_imagse"]),
        (["--trian.lr", "1"], ["trian.lr"]),
        (["stray"], ["stray"]),
        (["--train.lr", "fast"], ["train.lr", "fast"]),
        (["--train.max_steps", "1.5"], ["train.max_steps", "1.5"]),
        (["--train.betas", "[0.9]"], ["train.betas", "0.9"]),
        (["--train.schedule", "cosinus"], ["train.schedule", "cosinus", "cosine"]),
    ],
)
def test_unknown_key_or_wrong_type_on_the_command_line_is_named(capsys, arguments, names):
    said = refusal(capsys, *arguments)
    assert all(name in said for name in names), said


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("train:\n  max_step: 3\n", ["train", "max_step"]),
        ("trian:\n  lr: 1e-3\n", ["trian.lr"]),
        ("train:\n  lr: fast\n", ["train.lr", "fast"]),
        ("train: 5\n", ["train", "5"]),
        ("train:\n  # lr: 1e-3\n", ["train", "None"]),
        ("model:\n  adapt: 3\n", ["model.adapt", "3"]),
    ],
)
def test_unknown_key_or_wrong_type_in_the_file_is_named(capsys, tmp_path, text, names):
    (tmp_path / "a.yaml").write_text(text)
    said = refusal(capsys, "--config", str(tmp_path / "a.yaml"))
    assert all(name in said for name in names), said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "finish.normalise=none",
            "finish.normalise must be whitened, per_channel, one_scale or null, not none",
        ),
        ("model.part=decodr", "model.part must be all, decoder or encoder, not decodr"),
        ("train.lr=fast", "train.lr must be a number > 0, not fast"),
        ("train.lr=[1]", "train.lr must be a number > 0"),
        ("data.workers=1.5", "data.workers must be a whole number >= 0, not 1.5"),
        ("train.warmup=x", "train.warmup must be a number >= 0 and < 1, not x"),
        ("loss.scale=x", "loss.scale must be a number > 0 or per_pixel, not x"),
        ("train.max_minutes=x", "train.max_minutes must be a number > 0 or null, not x"),
        ("data.flip=maybe", "data.flip must be true or false, not maybe"),
        (
            "model.block_out_channels=3",
            "model.block_out_channels must be a list, each value a whole number > 0, not 3",
        ),
        (
            "train.betas=[0.5]",
            "train.betas must be a list of 2 values, each a number >= 0 and < 1, not [0.5]",
        ),
        ("trian.lr=1", "there is no setting trian.lr; did you mean train.lr?"),
        ("train.lpips_weight=1", "there is no setting train.lpips_weight; did you mean loss.lpips_weight?"),
        ("colour=1", "there is no setting colour; --help lists them"),
    ],
)
@pytest.mark.parametrize("place", ["command line", "file"])
def test_a_refused_setting_is_told_what_it_may_be_in_plain_words(setting, said, place, capsys, tmp_path):
    key, value = setting.split("=")
    if place == "command line":
        assert refusal(capsys, f"--{setting}") == f"error: {said}\n"
        return
    *sections, last = key.split(".")
    head = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    (tmp_path / "a.yaml").write_text(f"{head}{'  ' * len(sections)}{last}: {value}\n")
    assert (
        refusal(capsys, "--config", str(tmp_path / "a.yaml"))
        == f"error: --config {tmp_path / 'a.yaml'}: {said}\n"
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("train={lr: fast}", "train.lr must be a number > 0, not fast"),
        ("train={nothing: 3}", "there is no setting train.nothing; --help lists them"),
        ("model={adapt: {colours: 3}}", "there is no setting model.adapt.colours; --help lists them"),
    ],
)
def test_a_section_in_braces_is_refused_by_the_setting_within(section, said, capsys):
    assert refusal(capsys, f"--{section}") == f"error: {said}\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"train:\n  lr: [1\n", "line 2: while parsing a flow sequence; line 3: expected"),
        (b"train:\n\tlr: 1\n", "line 2: a tab; indent with spaces"),
        (b"train:\n  lr: 1\n lr: 2\n", "line 1: while parsing a block mapping; line 3: expected <block end>"),
        (b"train: {lr: !!python/name:os.system }\n", "line 1"),
        (b"caf\xe9: 1\n", "utf-8"),
        (b"\na: '\x01'\n", "line 2: the character #x0001"),
        (b"", "no keys"),
        (b"# train:\n", "no keys"),
        (b"- 1\n", "no keys"),
        (b"data: {path: !!set {a}}\n", "line 1: the tag"),
        (b"\ndata: {path: !!binary aGk=}\n", "line 2: the tag"),
        (b"data: {path: !!timestamp 2024-01-01}\n", "line 1: the tag"),
    ],
)
def test_a_file_that_holds_no_settings_is_named_with_its_fault(capsys, tmp_path, content, reason):
    (tmp_path / "a.yaml").write_bytes(content)
    said = refusal(capsys, "--config", str(tmp_path / "a.yaml"))
    assert str(tmp_path / "a.yaml") in said
    assert f"a.yaml: {reason}" in said if reason.startswith("line") else reason in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere.yaml", "No such file"), (".", "Is a directory"), ("file/a.yaml", "Not a directory")],
)
def test_a_file_that_cannot_be_read_is_named(capsys, tmp_path, name, reason):
    (tmp_path / "file").touch()
    said = refusal(capsys, "--config", str(tmp_path / name))
    assert f"{tmp_path / name}: {reason}" in said


def test_the_settings_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("train:\n  batch_size: 5\n",))
    writer.start()
    config = parse(["--config", str(tmp_path / "pipe"), "--output_dir", "runs/x"])
    writer.join()
    assert config.train.batch_size == 5


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--loss.target_bits=1", "--loss.target_std=0.1"], ["loss.target_bits", "loss.target_std"]),
        (["--model.block_out_channels=[32,60]"], ["block_out_channels", "60", "norm_num_groups"]),
        (["--regularizer.additive_noise=1"], ["additive_noise", "latent_noise_share"]),
        (["--data.streaming=true"], ["data.streaming", "data.path"]),
        (["--model.part=encoder", "--discriminator.weight=1"], ["discriminator.adaptive", "model.part"]),
        (["--loss.likelihood=bernoulli", "--loss.learn_scale=true"], ["loss.learn_scale", "bernoulli"]),
    ],
)
def test_keys_that_contradict_each_other_are_named(capsys, arguments, names):
    said = refusal(capsys, *arguments)
    assert all(name in said for name in names), said


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.max_steps", "0", "> 0"),
        ("train.batch_size", "-1", "> 0"),
        ("train.accumulation", "0", "> 0"),
        ("train.checkpoint_every", "0", "> 0"),
        ("train.keep_last", "0", "> 0"),
        ("train.statistics_images", "0", "> 0"),
        ("train.threads", "0", "> 0"),
        ("train.lr", "0", "> 0"),
        ("train.lr", "nan", "> 0"),
        ("train.clip_norm", "0", "> 0"),
        ("train.max_minutes", "0", "> 0"),
        ("train.weight_decay", "-1", ">= 0"),
        ("train.validate_every", "-1", ">= 0"),
        ("train.ema_decay", "1", ">= 0 and < 1"),
        ("train.warmup", "1.5", ">= 0 and < 1"),
        ("loss.kl_weight", "-1", ">= 0"),
        ("loss.lpips_weight", "-1", ">= 0"),
        ("loss.free_bits", "-1", ">= 0"),
        ("loss.scale", "0", "> 0"),
        ("loss.target_bits", "0", "> 0"),
        ("loss.target_std", "1.5", "> 0 and < 1"),
        ("loss.high_frequency_weight", "-1", ">= 0"),
        ("discriminator.weight", "-1", ">= 0"),
        ("discriminator.layers", "0", "> 0"),
        ("regularizer.equivariance_probability", "1.5", ">= 0 and <= 1"),
        ("regularizer.interpolative_noise", "2", ">= 0 and <= 1"),
        ("regularizer.spectrum_weight", "-1", ">= 0"),
        ("regularizer.variance_expansion_weight", "-1", ">= 0"),
        ("regularizer.interpolative_noise_std", "-1", ">= 0"),
        ("model.latent_channels", "0", "> 0"),
        ("model.image_channels", "0", "> 0"),
        ("model.layers_per_block", "0", "> 0"),
        ("model.norm_num_groups", "0", "> 0"),
        ("model.adapt.latent_channels", "0", "> 0"),
        ("model.teacher_weight", "-1", ">= 0"),
        ("data.min_scale", "0", "> 0 and <= 1"),
        ("data.resolution", "0", "> 0"),
        ("data.workers", "-1", ">= 0"),
        ("finish.certificate_images", "-1", ">= 0"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_key_range_and_value(capsys, key, value, allowed):
    assert refusal(capsys, f"--{key}={value}") == f"error: {key} must be {allowed}, not {value}\n"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.betas", "[1.5,0.9]"),
        ("train.betas", "[0.9,-1]"),
        ("model.block_out_channels", "[]"),
        ("model.block_out_channels", "[0,8]"),
    ],
)
def test_an_impossible_list_is_refused_by_its_key(capsys, key, value):
    assert f"{key} " in refusal(capsys, f"--{key}={value}")


@pytest.mark.parametrize(
    "key", ["model.norm_num_groups", "model.block_out_channels", "loss.scale", "data.path"]
)
def test_null_is_refused_by_its_key_where_a_value_is_needed(capsys, key):
    if key == "data.path":
        assert parse(["--output_dir", "runs/x", f"--{key}=null"]).data.path is None
    else:
        assert key in refusal(capsys, f"--{key}=null")


def test_every_setting_is_in_the_help_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for section, fields in asdict(Config("x")).items():
        for key in fields if isinstance(fields, dict) else ():
            assert f"--{section}.{key}" in said
    assert "Micro-batches per optimizer step." in said


def test_the_config_that_a_run_leaves_gives_the_same_settings(tmp_path):
    arguments = "--train.lr 1e-5 --loss.kl_weight 1e-6 --train.betas [0.5,0.9] --train.max_minutes 2"
    config = parse(["--output_dir", str(tmp_path / "run"), *arguments.split(), "--train.seed", "7"])
    Journal(tmp_path / "run", Accelerator(cpu=True), config).begin(0, 0, complete=False)
    left = tmp_path / "run/config.yaml"
    assert parse(["--config", str(left)]) == config
    assert yaml.safe_load(left.read_text())["train"]["betas"] == [0.5, 0.9]


def test_settings_are_plain_numbers_once_they_are_checked():
    """A number of a range type is no number to YAML, and may be none to a compiler."""
    config = parse(
        ["--output_dir", "runs/x", "--train.lr=1", "--train.betas=[0.5,0.9]", "--data.min_scale=1"]
    )
    assert type(config.train.lr) is type(config.train.betas[0]) is type(config.data.min_scale) is float
    assert type(config.train.max_steps) is type(config.model.block_out_channels[0]) is int


def test_a_discriminator_that_a_run_never_reaches_is_said():
    """Its default start is late: a weight alone does nothing in a short run."""
    train, late = TrainConfig(max_steps=100), DiscriminatorConfig(weight=0.5)
    (note,) = Config("runs/x", discriminator=late, train=train).notes
    assert note == (
        "discriminator.weight does nothing in this run: discriminator.start_step is 50000, train.max_steps 100"
    )
    assert not Config("runs/x", discriminator=replace(late, start_step=99), train=train).notes
    assert not Config("runs/x", train=train).notes
