"""The folder of the codec is replaced whole: no write that fails or is killed loses the codec that was there."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from random_codecs import C_, random_vae
from small_runs import new_trainer, small, start, train, write_images

from latentcodec.codec import LatentCodec
from latentcodec.training.export.codec_folder import recover_codec, write_codec


def test_an_interrupted_write_leaves_the_codec_that_was_there(tmp_path, monkeypatch):
    folder, first, second = tmp_path / "codec", LatentCodec(random_vae()), LatentCodec(random_vae())
    write_codec(first, folder, "first")

    def full_disk(self, target, card):
        target.mkdir()
        (target / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LatentCodec, "save_pretrained", full_disk)
        with pytest.raises(OSError, match=r"cannot write the codec to .*codec.*No space left.*untouched"):
            write_codec(second, folder, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]
    assert (folder / "README.md").read_text() == "first"
    write_codec(second, folder, "second")
    assert (folder / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def killed_before_rename_to(target, work):
    """`work` in a forked child that kills itself just before it gives something the name `target`."""
    child = os.fork()
    if child == 0:

        def before(event, arguments):
            if event == "os.rename" and Path(arguments[1]) == target:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(before)
        work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", [".codec.old", "codec"])
def test_a_kill_before_either_rename_loses_nothing(tmp_path, name):
    folder, codec = tmp_path / "codec", LatentCodec(random_vae())
    write_codec(codec, folder, "first")
    killed_before_rename_to(tmp_path / name, lambda: write_codec(codec, folder, "second"))
    assert folder.exists() == (name == ".codec.old")
    recover_codec(folder)
    assert (folder / "README.md").read_text() == "first"
    assert json.loads((folder / "config.json").read_text())["latent_channels"] == C_
    write_codec(codec, folder, "third")
    assert (folder / "README.md").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_a_run_that_was_killed_while_it_replaced_its_codec_has_it_back_as_soon_as_it_starts(tmp_path):
    config = small(tmp_path / "run", write_images(tmp_path / "images"))
    trainer = start(config)
    train(trainer, kill_at=3)  # codec/ is that of step 2
    weights = tmp_path / "run/codec/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with torch.no_grad():
        next(trainer.state.ema.parameters()).zero_()
    killed_before_rename_to(tmp_path / "run/codec", trainer.exporter.save_codec)
    assert not weights.exists()
    new_trainer(config)
    assert weights.read_bytes() == before


def test_a_fine_tuned_codec_does_not_say_where_its_parent_lies(tmp_path):
    write_codec(LatentCodec(random_vae()), tmp_path / "parent", "card")
    parent = LatentCodec.from_pretrained(tmp_path / "parent")
    assert str(tmp_path) in parent.vae.config["_name_or_path"]
    write_codec(parent, tmp_path / "child", "card")
    assert (tmp_path / "child/config.json").read_bytes() == (tmp_path / "parent/config.json").read_bytes()
