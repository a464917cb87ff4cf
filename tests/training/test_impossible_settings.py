"""Settings and configuration files that cannot be meant are refused in one line; words mean what they say."""

import re

import pytest

from latentcodec.training.config import parse

SETTINGS = [
    ("train.lr", "inf"),
    ("train.weight_decay", "nan"),
    ("train.weight_decay", "inf"),
    ("train.clip_norm", "inf"),
    ("train.max_minutes", "nan"),
    ("train.seed", "9" * 30),
    ("model.layers_per_block", "1000000000"),
    ("model.latent_channels", "1000000000"),
    ("model.block_out_channels", "[8, 1000000000]"),
    ("loss.kl_weight", "nan"),
    ("loss.lpips_weight", "inf"),
    ("loss.scale", "inf"),
    ("discriminator.lr", "inf"),
    ("model.teacher_weight", "nan"),
    ("output_dir", ""),
    ("output_dir", " "),
    ("data.path", ""),
    ("data.split", ""),
    ("data.path", "~nobody-here/x"),
    ("data.val_path", "~nobody-here/x"),
    ("model.from_pretrained", "~nobody-here/x"),
    ("model.teacher", "~nobody-here/x"),
    ("loss.lpips_weights", "~nobody-here/x"),
    ("output_dir", "~nobody-here/x"),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_settings_that_nothing_can_be_are_refused_by_name(key, value, capsys):
    arguments = [] if key == "output_dir" else ["--output_dir", "x"]
    with pytest.raises(SystemExit) as caught:
        parse([*arguments, f"--{key}", value])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert key.rpartition(".")[2] in said
    assert said.count("\n") == 1


def test_the_output_folder_may_lie_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(["--output_dir", "~/runs/a"]).output_dir == str(tmp_path / "runs/a")


# ---- configuration files ----


def settings_of(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return parse(["--config", str(tmp_path / "run.yaml")])


def test_words_of_a_configuration_mean_what_they_say(tmp_path):
    config = settings_of(
        tmp_path,
        "output_dir: no\ntrain: {mixed_precision: no, weight_decay: 1e-4, max_steps: 1_000}\n"
        "data: {path: 12:30:00, subset: on, split: yes, image_column: 2024-01-01, flip: false}\n",
    )
    assert (config.output_dir, config.train.mixed_precision, config.train.weight_decay) == ("no", "no", 1e-4)
    assert config.train.max_steps == 1000
    assert (config.data.path, config.data.subset, config.data.split) == ("12:30:00", "on", "yes")
    assert (config.data.image_column, config.data.flip) == ("2024-01-01", False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("output_dir: x\ndata: {split: null}\n", "data.split cannot be null; leave it out for its default"),
        ("output_dir: x\ntrain: {lr: null}\n", "train.lr"),
        ("output_dir: x\ntrain: {schedule: ~}\n", "train.schedule"),
        ("output_dir: x\ntrain: {betas: [null, 0.9]}\n", "train.betas"),
        ("output_dir: x\nmodel: {block_out_channels: [8, null]}\n", "block_out_channels"),
        ("output_dir: x\nmodel: {block_out_channels: null}\n", "block_out_channels"),
        ("output_dir: null\n", "output_dir"),
        ("a: &a [x, x]\nb: [*a, *a]\n", r"line 2: an alias \(\*a\)"),
        ("output_dir: x\ntrain: {lr: 1e-3}\ntrain: {lr: 1e-4}\n", "line 3: the key 'train' comes twice"),
        ("a: " + "[" * 100 + "]" * 100, "more than 20 levels"),
        ("? [a, b]\n: 1\n", "a key must be a word"),
        ("- a\n- b\n", "holds no keys"),
        ("output_dir: !!python/object/apply:os.system [id]\n", "the tag tag:yaml.org,2002:python"),
        ("output_dir: x\ntrain: {lr: .inf}\n", "train.lr must be finite"),
        ("output_dir: x\ntrain: {weight_decay: .nan}\n", "train.weight_decay"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_in_one_line(text, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings_of(tmp_path, text)
    said = capsys.readouterr().err
    assert re.search(words, said), said
    assert said.count("\n") == 1


def test_aliases_that_unfold_to_a_billion_values_take_no_time(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(SystemExit):
        settings_of(tmp_path, "\n".join(lines))
    assert "alias" in capsys.readouterr().err
