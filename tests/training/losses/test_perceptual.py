"""LPIPS: its published number, its gradient, images of any channels, and files of weights that do not fit."""

import os
from pathlib import Path

import pytest
import torch
from random_pixels import pixels
from safetensors.torch import load_file, save_file

from latentcodec.quality import perceptual
from latentcodec.quality.perceptual import Perceptual, load_lpips


@pytest.fixture(scope="session")
def squeeze_file() -> Path:
    """All weights of LPIPS-squeeze; a checkout without them skips what needs the trained network."""
    default = Path(__file__).parents[4] / "shared/weights/lpips_squeeze_v0.1.safetensors"
    path = Path(os.environ.get("LATENTCODEC_LPIPS_SQUEEZE", default))
    if not path.is_file():
        pytest.skip(f"no LPIPS weights at {path}; point LATENTCODEC_LPIPS_SQUEEZE at them")
    return path


def test_lpips_of_a_local_file_equals_torchmetrics_documented_example(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file)
    torch.manual_seed(123)
    x, y = pixels(10, 3, 100, 100), pixels(10, 3, 100, 100)
    assert distance(y, x).mean().item() == pytest.approx(0.1008, abs=5e-5)


def test_lpips_gradient_equals_the_numeric_difference_and_lowers_the_distance(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file).double()
    x, y = pixels(1, 3, 32, 32).double(), pixels(1, 3, 32, 32).double().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(y, x).sum(), y)
    direction, step = torch.randn_like(y), 1e-6
    with torch.no_grad():
        numeric = (distance(y + step * direction, x) - distance(y - step * direction, x)) / (2 * step)
        lower = distance(y - 0.01 * gradient / gradient.abs().max(), x)
    assert numeric.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
    assert lower < distance(y, x)
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_lpips_of_other_channels_is_the_mean_over_grey_images(squeeze_file: Path) -> None:
    distance = Perceptual("squeeze", squeeze_file)
    x, y = pixels(2, 4, 32, 32), pixels(2, 4, 32, 32)
    channels = [distance.network(y[:, [i] * 3], x[:, [i] * 3]).flatten() for i in range(4)]
    torch.testing.assert_close(distance(y, x), torch.stack(channels).mean(0))
    torch.testing.assert_close(distance(y[:, :1], x[:, :1]), channels[0])


def test_lpips_stays_deterministic_in_training_mode_and_draws_no_random_numbers(squeeze_file: Path) -> None:
    before = torch.get_rng_state()
    distance = Perceptual("squeeze", squeeze_file).train()
    assert torch.equal(torch.get_rng_state(), before)
    x, y = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32)
    assert torch.equal(distance(y, x), distance(y, x))


def test_a_missing_network_names_both_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no cached network either
    for net in ("vgg", "alex", "squeeze"):
        with pytest.raises(ValueError, match=r"lpips_net.*no route.*lpips_weights"):
            load_lpips(net)
    with pytest.raises(ValueError, match="lpips_net: 'resnet'"):
        load_lpips("resnet")


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = perceptual._new_network("squeeze", download=False)
    own = {perceptual._stored_name(k): v for k, v in network.state_dict().items() if perceptual._is_weight(k)}
    path = tmp_path / "lpips.safetensors"
    with pytest.raises(ValueError, match=r"lpips_weights.*cannot be read"):
        load_lpips("squeeze", path)
    save_file({k: v.half() for k, v in own.items()}, path)
    assert len(load_file(path)) == 7 + 2 * (1 + 8 * 3)
    torch.testing.assert_close(
        load_lpips("squeeze", path).lin3.model[1].weight, own["lin3.weight"], atol=1e-3, rtol=1e-3
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (path, "~/lpips.safetensors"):
        with pytest.raises(ValueError, match=r"lpips_weights.*lpips_net 'alex'.*names differ"):
            load_lpips("alex", name)
    save_file({**own, "lin0.weight": torch.zeros(1, 3, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"'lin0.weight' has the shape \[1, 3, 1, 1\]"):
        load_lpips("squeeze", path)
