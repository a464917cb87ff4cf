"""The bundled codecs are there, offline, small, and as good as their cards say."""

import copy
import re

import pytest
import torch

from latentcodec import LatentCodec, restore_vae
from latentcodec.loading import BUNDLED, bundled_names
from latentcodec.machine import is_fast
from latentcodec.pixels import find_images, load_image
from latentcodec.quality.metrics import evaluate
from latentcodec.sources.synthetic import SyntheticSource

LATENTS = {"photo-f8c16": 16, "photo-f8c16-2026-11-26": 16, "photo-f8c4": 4, "photo-f8c4-2026-11-26": 4}


def test_all_of_them_are_known_by_name():
    assert bundled_names() == sorted(LATENTS)


@pytest.mark.parametrize("name", LATENTS)
def test_it_loads_by_name_and_reconstructs_what_it_was_not_trained_on(name):
    codec = LatentCodec.from_pretrained(name)
    assert (codec.downsampling_factor, codec.latent_channels) == (8, LATENTS[name])
    assert codec.dtype == torch.float32
    source = SyntheticSource(3)
    images = [source.read(index)[:, :128, :128] for index in (0, 1, 4)]
    assert evaluate(codec, images).mean("psnr") > (25 if LATENTS[name] == 16 else 20)


@pytest.mark.slow  # where bfloat16 is emulated
def test_in_bfloat16_the_engine_errs_no_more_than_diffusers():
    """Root mean square over both codecs and directions; trained weights have means that biases cancel."""
    squares = torch.zeros(2)
    pixels = 192 if is_fast(torch.bfloat16) else 64  # diffusers' own class takes minutes where it is emulated
    for name in LATENTS:
        exact = LatentCodec.from_pretrained(name).vae
        ours = copy.deepcopy(exact).to(torch.bfloat16)
        stock = restore_vae(copy.deepcopy(ours))
        x = torch.stack([SyntheticSource(3).read(index)[:, :pixels, :pixels] for index in (0, 1, 4)])
        with torch.no_grad():
            z = exact.encode(x).latent_dist.mode()
            for run, value in ((moments, x), (lambda vae, z: vae.decode(z).sample, z)):
                expected = run(exact, value)
                for side, vae in enumerate((ours, stock)):
                    error = run(vae, value.bfloat16()).float() - expected
                    squares[side] += error.square().mean() / expected.var()
    assert squares[0] <= squares[1]


def moments(vae, x):
    return vae.encode(x).latent_dist.parameters


@pytest.mark.parametrize("name", LATENTS)
def test_it_is_small_and_names_no_place_of_the_machine_it_was_made_on(name):
    size = sum(file.stat().st_size for file in (BUNDLED / name).iterdir())
    assert size < 8e6, f"{size:,} bytes"
    assert "/" not in re.sub(r"\s", "", (BUNDLED / name / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENTS)
def test_its_latents_are_white(name, photos):
    """Over forty validation photographs, which it never saw: near zero mean, unit variance, no correlation."""
    codec = LatentCodec.from_pretrained(name)
    images = [load_image(path)[..., 100:356, 100:356] for path in find_images(photos / "val")]
    z = torch.cat([codec.encode(image).flatten(2)[0] for image in images], 1)  # [c, cells]
    assert z.mean(1).abs().max() < 0.7
    assert ((z.std(1) > 0.5) & (z.std(1) < 2)).all()
    correlation = torch.corrcoef(z) - torch.eye(len(z))
    assert correlation.abs().mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", LATENTS)
def test_its_card_tells_the_truth(name, photos):
    stated = float(re.search(rf"\| {name} \| ([\d.]+) dB", (BUNDLED / name / "README.md").read_text())[1])
    images = [load_image(path)[0] for path in find_images(photos / "val")[::13]]
    score = evaluate(LatentCodec.from_pretrained(name), images).mean("psnr")
    assert abs(score - stated) < 4, f"{score:.2f} dB; the card says {stated} dB for all forty"
