"""The bench with a pipeline refuses codecs that Stable Diffusion's pipeline would take for something else."""

import pytest
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from test_bench import script

from latentcodec.codec import LatentCodec

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
