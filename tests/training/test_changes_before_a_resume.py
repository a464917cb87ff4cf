"""What changed before a resume: settings are said or refused, exchanged images noticed, edited files passed over."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import metrics, new_trainer, small, start, train, write_images

from latentcodec.training.checkpoint import newest
from latentcodec.training.data.images import open_images
from latentcodec.training.losses.terms import LossConfig
from latentcodec.training.preflight import changed_settings
from latentcodec.training.same_inputs import require_same_images

# ---- settings ----


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


# ---- images ----


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


# ---- files of the run ----


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
