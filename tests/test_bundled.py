"""The bundled codecs are there, offline, small, and as good as their cards say."""

import pytest
import torch

from latentcodec import LatentCodec
from latentcodec.codec import BUNDLED
from latentcodec.metrics import evaluate
from latentcodec.pixels import find_images, load_image
from latentcodec.training.synthetic import SyntheticSource


def test_it_loads_by_name_and_reconstructs_what_it_was_not_trained_on():
    codec = LatentCodec.from_pretrained("photo-f8c16")
    assert (codec.downsampling_factor, codec.latent_channels, codec.dtype) == (8, 16, torch.float32)
    source = SyntheticSource(3)
    images = [source.read(index)[:, :128, :128] for index in (0, 1, 4)]
    assert evaluate(codec, images).mean("psnr") > 25


def test_it_is_small():
    size = sum(file.stat().st_size for file in (BUNDLED / "photo-f8c16").iterdir())
    assert size < 8e6, f"{size:,} bytes"


@pytest.mark.slow
def test_its_card_tells_the_truth(photos):
    images = [load_image(path)[0] for path in find_images(photos / "val")[::13]]
    codec = LatentCodec.from_pretrained("photo-f8c16")
    score = evaluate(codec, images).mean("psnr")
    assert 30 < score < 40, f"{score:.2f} dB; the card says 34.24 dB for all forty"
