"""The bench with a pipeline: which codecs it refuses, which pictures it leaves out, and its last line."""

import re

import pytest
import torch
from bench_scripts import last_line, save_white, script
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from latentcodec.codec import LatentCodec
from latentcodec.pixels import save_image

SMALL = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.mark.parametrize(
    ("vae", "words"),
    [
        (lambda: AutoencoderKL(4, 4, **SMALL), "pictures of 4 channels"),
        (lambda: AutoencoderKLFlux2(**SMALL), "takes an AutoencoderKL, not an AutoencoderKLFlux2"),
    ],
)
def test_a_codec_that_the_pipeline_cannot_hold_is_refused(vae, words, tmp_path, monkeypatch):
    bench = script("pipeline")
    monkeypatch.setattr(bench, "use_cores", lambda: 1)
    LatentCodec(vae()).save_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match=words):
        bench.main(["--codec", str(tmp_path / "codec"), "--out", str(tmp_path / "out")])


def test_pictures_that_a_pipeline_cannot_take_are_left_out_and_none_is_an_error(
    tmp_path, capsys, monkeypatch
):
    pipeline = script("pipeline")
    save_image(torch.zeros(3, 300, 200), tmp_path / "narrow.png")
    (tmp_path / "damaged.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"none of the 2 images in {tmp_path} can be used"):
        pipeline._images(str(tmp_path), channels=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert [re.search(r"(\w+)\.png", line)[1] for line in lines] == ["damaged", "narrow"]
    save_image(torch.zeros(3, 300, 280), tmp_path / "wide.png")
    assert [image.shape for image in pipeline._images(str(tmp_path), channels=3)] == [(1, 3, 256, 256)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(pipeline._images("~", channels=3)) == 1


def test_the_line_of_a_pipeline_that_changes_nothing_is_json(tmp_path, capsys, monkeypatch):
    codec, images = save_white(tmp_path, 32)
    pipeline = script("pipeline")
    monkeypatch.setattr(pipeline, "use_cores", lambda: 1)
    monkeypatch.setattr(pipeline, "SIDE", 32)
    pipeline.main(["--codec", codec, "--images", images, "--out", str(tmp_path / "out")])
    assert last_line(capsys.readouterr().out)["psnr"] is None
