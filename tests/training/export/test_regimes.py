"""The latents' regime at each validation: said when it is entered and when it is left, with the key to turn."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import small, start, train, write_images

from latentcodec.training.export.regimes import Regimes
from latentcodec.training.trackers import alert, show_pictures


class Planted:
    """One latent cell for 4 x 4 pixels: the mean of each channel, with a noise that the test chooses."""

    downsampling_factor, latent_channels = 4, 3

    def __init__(self, noise, gain=1.0):
        self.noise, self.gain = noise, gain

    def posterior(self, x):
        mean = self.gain * torch.nn.functional.avg_pool2d(x, 4)
        return mean, torch.full_like(mean, self.noise)

    def decode(self, z, size=None):
        return torch.nn.functional.interpolate(z / self.gain, size=size)


def images():
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(8, 3, 8, 8, generator=generator) * 2 - 1
    return list(torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear"))


def test_a_regime_is_said_once_when_it_is_entered_and_once_when_it_is_left():
    regimes = Regimes()
    healthy, collapsed = Planted(0.05), Planted(1.0, gain=1e-3)
    assert regimes.look(healthy, images())[1] == []
    numbers, ((text, failure),) = regimes.look(collapsed, images())
    assert failure
    assert "Posterior collapse" in text
    assert "loss.kl_weight" in text
    assert numbers["latents/signal_share"] < 1e-3
    assert regimes.look(collapsed, images())[1] == []
    assert regimes.look(healthy, images())[1] == [("left: posterior collapse", False)]


def test_an_autoencoder_is_a_failure_for_sampling_only():
    ((text, failure),) = Regimes().look(Planted(1e-5), images())[1]
    assert not failure
    assert "for a diffusion model: note; for sampling from N(0, I): failure" in text


def test_numbers_that_are_not_finite_are_left_out():
    numbers, ((text, failure),) = Regimes().look(Planted(0.1, gain=float("nan")), images())
    assert numbers == {}
    assert failure
    assert "not finite" in text


def test_images_without_a_whole_cell_are_not_looked_at_which_is_said_once():
    """As a codec of f32 has them on digits of 28 x 28."""
    regimes, tiny = Regimes(), [torch.zeros(3, 3, 9)] * 4
    numbers, ((text, failure),) = regimes.look(Planted(0.05), tiny)
    assert numbers == {}
    assert not failure
    assert "no held-out image has a whole cell of 4 x 4 pixels" in text
    assert regimes.look(Planted(0.05), tiny) == ({}, [])
    assert regimes.look(Planted(0.05), [*tiny, *images()[:1]])[0]["latents/signal_share"] > 0.9


def test_a_run_on_images_smaller_than_a_cell_is_validated_and_finished(tmp_path):
    config = small(tmp_path / "run", write_images(tmp_path / "images", side=28), max_steps=1)
    model = replace(config.model, block_out_channels=[8] * 6)
    assert train(start(replace(config, model=model))) == 0
    assert "psnr" in (tmp_path / "run/metrics.jsonl").read_text()
    assert (tmp_path / "run/codec").is_dir()


def test_every_validation_of_a_run_has_the_numbers_and_its_first_says_the_regime(tmp_path, capsys):
    train(start(small(tmp_path / "run", write_images(tmp_path / "images"))))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "psnr" in line]
    assert len(validations) == 2
    for line in validations:
        assert {"latents/rate_bits", "latents/signal_share", "latents/dead_share"} <= line.keys()
    capsys.readouterr()


class Recorder:
    """A tracker that keeps what it is called with."""

    def __init__(self, name):
        self.name, self.calls = name, []
        self.writer = SimpleNamespace(add_text=lambda *a, **k: self.calls.append((a, k)))
        self.run = SimpleNamespace(alert=lambda *a, **k: self.calls.append((a, k)))

    def log_images(self, *arguments, **settings):
        self.calls.append((arguments, settings))


def test_trackers_get_pictures_and_alerts_each_in_its_own_way():
    trackers = [Recorder("tensorboard"), Recorder("wandb"), Recorder("mlflow")]
    show_pictures(trackers, np.zeros((4, 6, 3), np.uint8), 7)
    alert(trackers, "text", True, 7)
    board, wandb, other = (tracker.calls for tracker in trackers)
    assert board[0][1]["dataformats"] == "NHWC"
    assert board[0][0][0]["samples"].shape == wandb[0][0][0]["samples"].shape == (1, 4, 6, 3)
    assert board[1] == (("latents", "text"), {"global_step": 7})
    assert wandb[1][1] == {"title": "latents", "text": "text", "level": "ERROR"}
    assert other == []


def test_trackio_gets_pictures_and_alerts(monkeypatch):
    trackio = pytest.importorskip("trackio")
    tracker = Recorder("trackio")
    tracker.log = lambda values, step: tracker.calls.append((values, step))
    show_pictures([tracker], np.zeros((4, 6, 1), np.uint8), 7)
    alert([tracker], "text", False, 7)
    assert isinstance(tracker.calls[0][0]["samples"], trackio.Image)
    assert tracker.calls[1][1]["level"] == trackio.AlertLevel.WARN
