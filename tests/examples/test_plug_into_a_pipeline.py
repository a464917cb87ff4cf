"""The example that puts a codec into a pipeline: pictures come through, and diffusers alone loads what it saves."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import plug_into_a_pipeline

from latentcodec import LatentCodec, load_image, save_image
from latentcodec.extras import MissingPackage
from latentcodec.quality.metrics import psnr
from latentcodec.sources.synthetic import SyntheticSource


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # diffusers' own
@pytest.mark.parametrize("codec", ["photo-f8c4", "a folder"])
def test_the_picture_comes_through_with_the_codec_and_not_before(codec, tmp_path, capsys):
    if codec == "a folder":
        codec = str(tmp_path / "codec")
        LatentCodec.from_pretrained("photo-f8c16").save_pretrained(codec)
    photo = tmp_path / "photo.png"
    save_image(SyntheticSource(3, seed=1).read(3)[None, :, :67, :75], photo)
    plug_into_a_pipeline.main(["--codec", codec, "--out", str(tmp_path / "out"), "--photo", str(photo)])
    x, before, after = (
        load_image(file) for file in (photo, tmp_path / "out/before.png", tmp_path / "out/after.png")
    )
    assert after.shape == (1, 3, 64, 72)
    x = x[..., :64, :72]
    assert psnr(x, after).item() > psnr(x, before).item() + 8
    assert type(AutoencoderKL.from_pretrained(tmp_path / "out/pipeline", subfolder="vae")) is AutoencoderKL
    said = capsys.readouterr().out
    assert "by diffusers alone (AutoencoderKL)" in said
    assert float(re.search(r"within (\S+) of it", said)[1]) <= 1e-4


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("examples/plug_into_a_pipeline.py", ["--out", "out"]),
        ("examples/train_on_latents.py", ["latents", "--out", "out"]),
        ("bench/pipeline.py", ["--codec", "photo-f8c4", "--out", "out"]),
    ],
)
def test_without_transformers_the_extra_is_named_before_anything_is_done(
    program, arguments, tmp_path, monkeypatch
):
    """diffusers has no pipelines without it, and says so where they are made: after a training, or half way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latentcodec.extras.find_spec", lambda name: None if name == "transformers" else name)
    main = runpy.run_path(str(Path(__file__).parents[2] / program))["main"]
    with pytest.raises(
        MissingPackage, match=r"transformers: not installed; pip install 'latentcodec\[bench\]'"
    ):
        main(arguments)
    assert not list(tmp_path.iterdir())
