"""A run that goes on with other settings: which of them count, which are refused, and from which checkpoint."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small_runs import Stop, bad_draws, everything, metrics, new_trainer, small, start, train

from latentcodec.training import checkpoint, preflight


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 16),
        ({"batch_size": 2}, 16),
        ({"batch_size": 1, "accumulation": 4}, 16),
        ({"batch_size": 16}, 16),
        ({"batch_size": 6}, 18),  # rounded up to a whole step: no crop comes twice
    ],
    ids=str,
)
def test_a_run_of_another_batch_size_goes_on_behind_the_samples_it_has_drawn(
    tmp_path, images, capsys, settings, first
):
    config = small(tmp_path / "run", images, batch_size=4, validate_every=0)
    train(start(config), spoil=bad_draws(1), stop_at=3)  # four batches of four are drawn, one was skipped
    capsys.readouterr()
    trainer = start(replace(config, train=replace(config.train, **settings)))
    positions = [position for batch in next(trainer.steps(Stop())) for position in batch["position"].tolist()]
    said = capsys.readouterr().out
    now = trainer.hardware.global_batch
    assert positions == list(range(first, first + now))
    assert ("the global batch was" in said) == (now != 4)
    if now != 4:
        assert (
            f"the global batch was 4 images (processes: 1) up to step 3 and is {now} (processes: 1)" in said
        )
    (skipped,) = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["positions"] == [4, 5, 6, 7]
    trainer.state.draw += 1
    trainer.state.step += 1
    trainer.checkpoint()
    again = start(config)  # the batch of before
    assert again.state.draw == -(-(first + now) // 4)


def test_a_checkpoint_that_does_not_say_its_batch_goes_on_as_it_did(tmp_path, images, monkeypatch):
    config = small(tmp_path / "run", images, batch_size=4)
    train(start(config), stop_at=2)
    found = preflight.find_checkpoint
    monkeypatch.setattr(preflight, "find_checkpoint", lambda *told: without_batch(found(*told)))
    assert start(replace(config, train=replace(config.train, batch_size=2))).state.draw == 2


def without_batch(saved):
    del saved.state["global_batch"], saved.state["processes"]
    return saved


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, images):
    train(start(small(tmp_path / "run", images, max_steps=2, schedule="constant")))
    trainer = start(small(tmp_path / "run", images, max_steps=4, schedule="constant"))
    assert not trainer.finished
    train(trainer)
    assert [line["step"] for line in metrics(tmp_path / "run") if "total" in line] == [1, 2, 3, 4]


def test_settings_of_the_optimizers_are_those_of_the_command_and_not_of_the_checkpoint(tmp_path, images):
    config = everything(small(tmp_path / "run", images))
    train(start(config), stop_at=2)
    config = replace(
        config,
        train=replace(config.train, betas=(0.5, 0.6), weight_decay=0.7),
        discriminator=replace(config.discriminator, lr=0.123),
    )
    trainer = start(config)
    group = trainer.state.optimizer.param_groups[-1]
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.6), 0.7)
    assert trainer.state.adversary.optimizer.param_groups[0]["lr"] == 0.123


@pytest.mark.parametrize("learned", [False, True])
def test_the_scale_is_that_of_the_command_unless_it_is_learned(tmp_path, images, learned):
    config = small(tmp_path / "run", images, validate_every=0)
    config = replace(config, loss=replace(config.loss, scale=0.5, learn_scale=learned))
    start(config)
    trainer = start(replace(config, loss=replace(config.loss, scale=0.25)))
    assert trainer.state.codec.log_scale.exp().item() == pytest.approx(0.5 if learned else 0.25)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "latent_channels", 8),
        ("model", "block_out_channels", [8, 16, 16]),
        ("model", "part", "decoder"),
        ("model", "init", "linear"),
        ("model", "from_pretrained", "photo-f8c16"),
        ("model", "subfolder", "vae"),
        ("model", "teacher", "photo-f8c16"),
        ("model", "teacher_subfolder", "vae"),
        ("train", "seed", 1),
        ("loss", "learn_scale", True),
        ("discriminator", "weight", 0.1),
    ],
)
def test_another_architecture_or_start_in_the_folder_is_refused_and_nothing_overwritten(
    images, refused, section, key, value
):
    files = {path: path.read_bytes() for path in refused.rglob("*") if path.is_file()}
    config = small(refused, images)
    config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    old, new = getattr(getattr(small(refused, images), section), key), value
    if key == "weight":
        key, old, new = "discriminator", "off", "on"
    with pytest.raises(ValueError, match=key) as error:
        new_trainer(config)
    assert f"{old} in the checkpoint, {new} now" in str(error.value)
    assert files == {path: path.read_bytes() for path in refused.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, images):
    output = tmp_path_factory.mktemp("refused") / "run"
    train(start(small(output, images)), stop_at=1)
    return output


def test_a_resume_removes_the_checkpoints_that_a_kill_kept_from_being_removed(tmp_path, images):
    output = tmp_path / "run"
    train(start(small(output, images, keep_last=3)))
    assert len(list((output / "checkpoints").iterdir())) == 3
    start(small(output, images, keep_last=1))
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_checkpoint_from_before_muon_names_who_can_resume_it(tmp_path, images, monkeypatch):
    config = small(tmp_path / "run", images)
    old = {key: value for key, value in preflight.fixed_settings(config).items() if key != "optimizer"}
    monkeypatch.setattr("latentcodec.training.preflight.fixed_settings", lambda config: old)
    start(config)
    with pytest.raises(ValueError, match="earlier version, before Muon, and only that version resumes it"):
        new_trainer(config)


def broadcast_from_main(monkeypatch, choice):
    monkeypatch.setattr(preflight, "broadcast_object_list", lambda objects: objects.__setitem__(0, choice))
    return SimpleNamespace(is_main_process=False, process_index=3)


def test_all_processes_go_on_from_the_checkpoint_of_the_main_process(tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, tensors={}, objects={}, state={}, keep_last=2)
    other = broadcast_from_main(monkeypatch, "step-00000002")
    assert preflight.newest_checkpoint(tmp_path, other).step == 2
    (tmp_path / "step-00000002/state.json").write_text("{}")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"process 3 cannot use .*step-00000002.* same output_dir"
    ):
        preflight.newest_checkpoint(tmp_path, other)
    assert preflight.newest_checkpoint(tmp_path, broadcast_from_main(monkeypatch, None)) is None
    none = checkpoint.CheckpointError(74, "no checkpoint can be used")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint can be used"):
        preflight.newest_checkpoint(tmp_path, broadcast_from_main(monkeypatch, none))


@pytest.mark.parametrize("name", ["codec", "metrics.jsonl"])
def test_a_folder_with_results_but_no_checkpoint_is_not_begun_anew(tmp_path, images, name):
    (tmp_path / name).mkdir() if name == "codec" else (tmp_path / name).write_text("precious\n")
    with pytest.raises(ValueError, match=name):
        new_trainer(small(tmp_path, images))
    assert (tmp_path / name).exists()
