"""What the latents bear: that each disturbance is what its row says, and that the script runs."""

import json
import subprocess
import sys

import pytest
import torch
from bench_scripts import BENCH, CONFIG, last_line, references, save_white, script

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.finite import NotFinite
from latentcodec.pixels import save_image
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import evaluate


@pytest.fixture(scope="module")
def robustness():
    return script("robustness")


def test_eight_bits_are_256_levels_of_each_channel_of_each_image(robustness):
    z = (torch.rand(2, 3, 64, 64) - 0.5) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    rounded = robustness.int8(z)
    for channels, whole in zip(rounded.flatten(0, 1), z.flatten(0, 1), strict=True):
        assert 250 < len(channels.unique()) <= 256
        step = (whole.max() - whole.min()) / 255
        assert (channels - whole).abs().max() <= 0.5001 * step
        torch.testing.assert_close(channels.aminmax(), whole.aminmax())


def test_blocks_have_their_own_256_levels(robustness):
    z = torch.rand(1, 2, 40, 20) - 0.5
    z[:, :, :16, :16] *= 100
    rounded = robustness.int8_in_blocks(z)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 40)):
        for columns in (slice(0, 16), slice(16, 20)):
            block = z[:, :, rows, columns]
            assert torch.equal(rounded[:, :, rows, columns], robustness.int8(block))
    assert (rounded - z)[:, :, 16:].abs().max() <= 0.5001 / 255


def test_a_constant_channel_stays_as_it_is(robustness):
    z = torch.full((1, 2, 4, 4), 0.3)
    assert torch.equal(robustness.int8(z), z)


def test_noise_has_its_deviation_and_is_the_same_every_time(robustness):
    z = torch.zeros(1, 16, 64, 64)
    noise = robustness.noisy(z, 0.2)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(noise, robustness.noisy(z, 0.2))


def test_halved_latents_of_a_linear_transform_lose_as_much_as_averaging_its_coefficients(robustness):
    """The KLT of one-coefficient blocks is nearly their mean: halving latents then nearly halves the image."""
    images = [torch.nn.functional.avg_pool2d(torch.randn(1, 1, 72, 72), 9, 1)[0] for _ in range(3)]
    klt = KLT.fit(images, 2, 4)  # four coefficients of 2 x 2 grey pixels: nothing is lost
    scores = robustness.measure(klt, images, 2, "test")
    assert scores["none"] > 80
    assert scores["half-size latents"] < scores["half-size image"]
    assert scores["noise 0.05"] > scores["noise 0.1"] > scores["noise 0.4"]
    assert evaluate(klt, images).mean("psnr") == scores["none"]


def test_what_goes_wrong_after_the_images_were_read_is_one_line(robustness, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "use_cores", lambda: 1)
    codec, images = save_white(tmp_path)
    arguments = ["--codec", codec, "--images", images, "--out", str(tmp_path)]

    def refuse(*_):
        raise NotFinite("NaN")

    monkeypatch.setattr(robustness, "evaluate", refuse)
    with pytest.raises(SystemExit, match=r"^robustness.py: NaN"):
        robustness.main(arguments)


def test_pictures_that_come_back_unchanged_have_a_page(robustness, tmp_path, capsys, monkeypatch):
    """Their PSNR is infinite: there is no change of it to speak of."""
    monkeypatch.setattr(robustness, "use_cores", lambda: 1)
    codec, images = save_white(tmp_path)
    robustness.main(["--codec", codec, "--images", images, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.splitlines()[2].split() == ["none", "infinite", "-", "infinite", "-"]
    printed = last_line(out)
    assert printed["psnr"]["int8"] is None
    page = (tmp_path / printed["files"]["html"].split("/")[-1]).read_text()
    assert "from infinite dB without" in page
    assert "no number, since a picture came back unchanged" in page


@pytest.mark.slow
def test_robustness_runs_as_a_script_and_ends_with_one_line_of_json(tmp_path):
    LatentCodec(build(CONFIG)).save_pretrained(tmp_path / "tiny")
    for index in range(2):
        save_image(torch.rand(3, 48 + index, 40) * 2 - 1, tmp_path / "images" / f"{index}.png")
    command = [sys.executable, BENCH / "robustness.py", "--codec", tmp_path / "tiny"]
    command += ["--images", tmp_path / "images", "--out", tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    printed = last_line(finished.stdout)
    assert printed["psnr"].keys() == printed["klt_psnr"].keys()
    assert references((tmp_path / "out" / printed["files"]["html"].split("/")[-1]).read_text()) == []
    assert json.loads((tmp_path / "out" / printed["files"]["json"].split("/")[-1]).read_text())["images"] == 2
