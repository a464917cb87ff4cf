"""A run says what it leaves out, what changed and what it passes over, and nothing that is not finite is kept."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import metrics, new_trainer, small, start, train, write_config, write_images

from latentcodec.finite import NotFinite
from latentcodec.training import console, environment, loop
from latentcodec.training.checkpoint import newest
from latentcodec.training.config import parse
from latentcodec.training.data import stream
from latentcodec.training.data.config import DataConfig
from latentcodec.training.data.images import held_out, open_images
from latentcodec.training.journal import Journal
from latentcodec.training.loop import main
from latentcodec.training.losses.terms import LossConfig
from latentcodec.training.preflight import changed_settings
from latentcodec.training.same_inputs import require_same_images

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "set")


def grad_norms(folder):
    return [line["grad_norm"] for line in metrics(folder) if "grad_norm" in line]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001"),
        ("ACCELERATE_DOWNCAST_BF16", "yes"),
    ],
)
def test_the_environment_changes_no_number_and_is_said_to_be_passed_over(
    key, value, tmp_path, images, monkeypatch, capsys
):
    train(start(small(tmp_path / "peace", images, max_steps=2)))
    monkeypatch.setenv(key, value)
    train(start(small(tmp_path / "told", images, max_steps=2)))
    assert grad_norms(tmp_path / "told") == grad_norms(tmp_path / "peace")
    assert f"{key}={value} in the environment is passed over" in capsys.readouterr().out


@pytest.mark.parametrize("key", environment.REFUSED)
def test_the_environment_asks_for_no_shards(key, tmp_path, images, monkeypatch):
    monkeypatch.setenv(key, "true")
    with pytest.raises(ValueError, match=f"{key} is set"):
        new_trainer(small(tmp_path, images))
    monkeypatch.setenv(key, "false")
    new_trainer(small(tmp_path, images))


@pytest.mark.parametrize("count", environment.COUNTS)
def test_processes_that_do_not_know_of_one_another_are_refused(count, monkeypatch):
    for name in (*environment.COUNTS, *environment.RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(count, "2")
    with pytest.raises(ValueError, match=f"{count} is 2 and RANK is not set"):
        environment.take_environment()
    monkeypatch.setenv("RANK", "0")
    assert environment.take_environment() == []
    monkeypatch.delenv("RANK")
    monkeypatch.setenv(count, "1")
    assert environment.take_environment() == []


def test_an_unknown_precision_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"ACCELERATE_MIXED_PRECISION is fp8: set train\.mixed_precision"):
        environment.take_environment()


def test_what_is_left_out_is_counted_by_reason_at_start_and_end_and_listed(tmp_path, capsys):
    folder = write_images(tmp_path / "set")
    for name in ("a.jp2", "b.jp2", "c.psd"):
        (folder / name).touch()
    os.mkfifo(folder / "d.png")
    sound = (folder / "00.png").read_bytes()
    (folder / "e.png").write_bytes(sound[:-12])
    config = small(tmp_path / "run", folder, max_steps=4, batch_size=4)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 3
    said = capsys.readouterr().out
    convert = "files are not read; convert them)"
    reasons = f"left out: 2 (.jp2 {convert}, 1 (.psd {convert}, 1 (a FIFO"
    assert said.count(reasons) == 2
    assert f"used, though broken: {folder / 'e.png'}: no end marker" in said
    assert "used, though something beside the pixels is broken: 1 images" in said
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert sorted(Path(line["path"]).name for line in rejects) == ["a.jp2", "b.jp2", "c.psd", "d.png"]


def test_images_too_small_for_a_score_are_not_validated_on(tmp_path, capsys):
    folder = write_images(tmp_path / "set", count=10)
    write_images(tmp_path / "small", count=6, side=8)
    for file in (tmp_path / "small").iterdir():
        file.rename(folder / f"small{file.name}")
    trainer = start(small(tmp_path / "run", folder, max_steps=1))
    settings = replace(trainer.config.data, val_images=8)
    found = held_out(open_images(settings, 3, 0), 11)
    assert len(found.images) + len(found.too_small) == 8
    assert found.too_small
    assert found.rejects == []
    with pytest.raises(ValueError, match="all 6 validation images are smaller than 11 pixels a side"):
        held_out(open_images(replace(settings, val_path=str(write_images(tmp_path / "v", 6, 8))), 3, 0), 11)


# ----------------------------------------------------------------------------------------------------------
# What is not finite


def test_weights_that_are_not_finite_are_in_no_checkpoint(tmp_path, images):
    trainer = start(small(tmp_path, images))
    before = sorted((tmp_path / "checkpoints").iterdir())
    with torch.no_grad():
        trainer.state.codec.vae.decoder.conv_in.weight[0, 0, 0, 0] = math.nan
    trainer.state.step += 1
    with pytest.raises(NotFinite, match=r"step 1 is not saved.*conv_in\.weight"):
        trainer.checkpoint()
    assert sorted((tmp_path / "checkpoints").iterdir()) == before


def test_a_last_step_to_weights_that_are_not_finite_fails_and_saves_no_codec(
    tmp_path, images, monkeypatch, capsys
):
    config = small(tmp_path / "run", images, max_steps=2, checkpoint_every=100, validate_every=100)
    monkeypatch.setattr("latentcodec.training.state.learning_rate", lambda *_: math.inf)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "run" / "codec").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_images_that_are_gone_in_mid_run_are_a_failure_and_no_wrong_setting(tmp_path, monkeypatch, capsys):
    """As on a disk that was taken away: whoever starts runs again after code 1 goes on when it is back."""
    folder, log = write_images(tmp_path / "set"), Journal.log

    def take_away(journal, step, *rest):
        log(journal, step, *rest)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(Journal, "log", take_away)
    config = small(tmp_path / "run", folder, max_steps=4, validate_every=0)
    assert main(["--config", str(write_config(config, tmp_path / "run.yaml"))]) == 1
    assert "error: 10 images in a row cannot be read" in capsys.readouterr().err


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


# ----------------------------------------------------------------------------------------------------------
# Configuration files


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
    assert pytest.importorskip("re").search(words, said), said
    assert said.count("\n") == 1


def test_aliases_that_unfold_to_a_billion_values_take_no_time(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(SystemExit):
        settings_of(tmp_path, "\n".join(lines))
    assert "alias" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# A resume


def test_a_resume_says_what_changed_and_keeps_the_configuration_of_before(tmp_path, images, capsys):
    train(start(small(tmp_path, images, max_steps=4)), stop_at=2)
    before = (tmp_path / "config.yaml").read_bytes()
    capsys.readouterr()
    start(small(tmp_path, images, max_steps=8, lr=0.5))
    said = capsys.readouterr().out
    assert "train.lr was 0.001 up to step 2 and is 0.5 from here on" in said
    assert "train.max_steps was 4 up to step 2 and is 8" in said
    assert "train.seed" not in said
    (kept,) = tmp_path.glob("config.until-*.yaml")
    assert kept.read_bytes() == before
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["lr"] == 0.5


def test_a_resume_says_which_changes_it_passes_over(tmp_path, images):
    """A learned scale, and a weight that is steered to a target, are in the checkpoint."""
    config = small(tmp_path, images)
    learned = LossConfig(learn_scale=True, target_bits=2.0)
    for loss, passed_over in ((LossConfig(), False), (learned, True)):
        changed = replace(config, loss=replace(loss, scale=0.5, kl_weight=0.25))
        lines = changed_settings(asdict(replace(config, loss=loss)), changed, 5)
        assert ["changes nothing" in line for line in lines] == [passed_over] * 2
        assert ["from here on" in line for line in lines] == [not passed_over] * 2
    assert lines[0].startswith(
        "loss.scale was 1.0 and is 0.5 now, which changes nothing: with loss.learn_scale"
    )
    assert (
        "loss.kl_weight was 1e-06 and is 0.25 now, which changes nothing: with loss.target_bits" in lines[1]
    )


def test_a_resume_is_silent_where_older_runs_wrote_a_normalisation_that_nobody_asked_for(tmp_path, images):
    config = small(tmp_path, images)
    older = asdict(config) | {"finish": asdict(config.finish) | {"normalise": "per_channel"}}
    assert changed_settings(older, config, 5) == []
    asked = replace(config, finish=replace(config.finish, normalise="whitened"))
    (line,) = changed_settings(older, asked, 5)
    assert "finish.normalise was per_channel up to step 5 and is whitened" in line


@pytest.mark.parametrize(
    "changes",
    [{"val_images": 4}, {"split": "test"}, {"val_path": "elsewhere"}, {"path": "elsewhere"}],
    ids=str,
)
def test_a_resume_with_other_data_or_other_held_out_images_is_refused(changes, tmp_path, images):
    config = small(tmp_path / "run", images, max_steps=4)
    train(start(config), stop_at=2)
    before = (tmp_path / "run/config.yaml").read_bytes()
    key = next(iter(changes))
    with pytest.raises(
        ValueError, match=rf"another run:\s+data\.{key}: .* in the checkpoint, {changes[key]} now"
    ):
        new_trainer(replace(config, data=replace(config.data, **changes)))
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_a_resume_with_another_padding_is_refused(tmp_path, images):
    config = small(tmp_path / "run", images, max_steps=4)
    train(start(config), stop_at=2)
    with pytest.raises(ValueError, match=r"another run:\s+model\.padding_mode: zeros .*, reflect now"):
        new_trainer(replace(config, model=replace(config.model, padding_mode="reflect")))


def test_a_folder_that_has_gained_images_is_not_resumed_on(tmp_path):
    folder = write_images(tmp_path / "set")
    config = small(tmp_path / "run", folder, max_steps=4)
    train(start(config), stop_at=2)
    (folder / "new.png").write_bytes((folder / "00.png").read_bytes())
    with pytest.raises(ValueError, match="10 training and 2 validation images, and now there are 11 and 2"):
        start(config)


def exchange(folder, name):
    """Another picture, of another size as a file, under the same name."""
    write_images(folder.with_name("others"), side=64)
    (folder.with_name("others") / name).replace(folder / name)


def test_a_folder_whose_images_were_exchanged_is_not_resumed_on(tmp_path):
    folder = write_images(tmp_path / "set")
    config = small(tmp_path / "run", folder, max_steps=4)
    train(start(config), stop_at=2)
    exchange(folder, "03.png")
    with pytest.raises(ValueError, match=r"some were exchanged or renamed \(data\.path, data\.val_path\)"):
        start(config)


def test_a_held_out_image_that_was_exchanged_for_one_of_its_length_is_noticed(tmp_path):
    folder = write_images(tmp_path / "set")
    config = small(tmp_path / "run", folder, max_steps=4)
    trainer = start(config)
    name = Path(trainer.held_out.names[0])
    train(trainer, stop_at=2)
    content = bytearray(name.read_bytes())
    content[-20] ^= 1
    name.write_bytes(content)
    with pytest.raises(ValueError, match="some were exchanged"):
        start(config)


def test_an_exchanged_array_is_noticed_unless_the_checkpoint_is_of_before_arrays_were_looked_at(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 48, 48, 3), np.uint8)
    np.savez(tmp_path / "set.npz", x=pixels)
    config = small(tmp_path / "run", tmp_path / "set.npz", max_steps=4)
    trainer = start(config)
    held = int(trainer.images.val[0])
    assert trainer.images.digest_without_arrays == hashlib.blake2b(digest_size=16).hexdigest(), "of nothing"
    train(trainer, stop_at=2)
    pixels[held, 0, 0, 0] ^= 1
    np.savez(tmp_path / "set.npz", x=pixels)
    with pytest.raises(ValueError, match="some were exchanged"):
        start(config)
    found = newest(tmp_path / "run/checkpoints")
    before = {**found.state, "image_digest": trainer.images.digest_without_arrays}
    require_same_images(replace(found, state=before), open_images(config.data, 3, 0))


def test_images_are_the_same_wherever_their_folder_lies(tmp_path):
    config = small(tmp_path / "run", write_images(tmp_path / "set"), max_steps=4)
    digest = open_images(config.data, 3, 0).digest
    moved = (tmp_path / "set").rename(tmp_path / "elsewhere")
    assert open_images(replace(config.data, path=str(moved)), 3, 0).digest == digest


@pytest.mark.parametrize(
    "line", ['{"step": "2"}', '{"total": 1}', "[1]", '{"step": null}', "\x00\x00", '{"step": 1e400}', "\xff"]
)
def test_an_edited_line_at_the_end_of_the_metrics_is_dropped(line, tmp_path, images):
    config = small(tmp_path, images, max_steps=4)
    train(start(config), stop_at=2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    start(config)
    assert len(metrics(tmp_path)) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"step": "x"}', b"\xff"])
def test_a_damaged_result_is_as_none(content, tmp_path, images):
    config = small(tmp_path, images, max_steps=2)
    train(start(config))
    (tmp_path / "result.json").write_bytes(content)
    trainer = start(config)
    assert not trainer.finished
    train(trainer)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2


# ----------------------------------------------------------------------------------------------------------
# Shared memory, terminals, signals


def test_batches_go_through_pipes_where_shared_memory_is_too_small(tmp_path, images, monkeypatch):
    config = DataConfig(path=str(images), resolution=32, val_images=0, workers=2)
    opened = open_images(config, 3, 0)
    expected = list(stream.training_batches(opened, 4, steps=5))
    monkeypatch.setattr(stream, "SHARED_MEMORY_RESERVE", 1e12)
    with pytest.warns(stream.SharedMemoryWarning, match="sent through pipes"):
        batches = stream.training_batches(opened, 4, steps=5)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["pixels"], other["pixels"])
        assert torch.equal(batch["position"], other["position"])


def test_a_stream_that_fails_ends_nothing(tmp_path):
    script = (
        "import sys; from latentcodec.training.console import survive_broken_streams; survive_broken_streams()\n"
        "for _ in range(3): print('x' * 100_000)\n"
        "print('end', file=sys.stderr)"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT), "SCRIPT": script}
    for redirection in ("> /dev/full", ">&-", "| true"):
        command = ["bash", "-o", "pipefail", "-c", f"'{sys.executable}' -c \"$SCRIPT\" {redirection}"]
        done = subprocess.run(command, env=variables, capture_output=True, check=False)
        assert (done.returncode, done.stderr.strip()) == (0, b"end"), redirection
    command = ["bash", "-c", f"'{sys.executable}' -c \"$SCRIPT\" 2>/dev/full"]
    assert subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_an_interrupt_before_the_first_step_is_one_line():
    script = (
        "import os, signal; from latentcodec.training.console import end_at_interrupt\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); end_at_interrupt()\n"  # shells ignore it after `&`
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.decode().strip() == console.INTERRUPTED.strip()


def test_an_interrupt_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        console.end_at_interrupt()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "words",
    ["DataLoader worker (pid 7) is killed by signal: Killed. ", "Pin memory thread exited unexpectedly"],
)
def test_a_lost_data_worker_is_one_line_in_whichever_words_torch_says_it(monkeypatch, capsys, words):
    """With a GPU a thread reads what workers send, and ends with the one that is killed while it does."""

    def run(config, stop):
        raise RuntimeError(words)

    monkeypatch.setattr(loop, "run", run)
    for name in ("parse", "survive_broken_streams", "end_at_interrupt", "end_quietly", "StopRequest"):
        monkeypatch.setattr(loop, name, lambda *arguments: None)
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a data worker was ended from outside" in line
    assert words.strip() in line
