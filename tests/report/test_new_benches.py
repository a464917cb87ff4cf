"""rate_distortion.py and diffusability.py from the command line to the page, on a tiny codec; Frechet distances."""

import importlib.util
import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image, save_image
from latentcodec.quality.features import frechet_distance, gaussian_like, pixel_statistics
from latentcodec.report.build import write_page
from latentcodec.report.results import write_json

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The benches take all cores; tests run beside each other."""
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("benches")
    for number in range(8):
        picture = torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6) * 2 - 1, size=(72, 80), mode="bilinear"
        )
        save_image(picture, place / "images" / f"{number}.png")
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=2, latent_channels=3, **stages)
    LatentCodec(vae).save_pretrained(place / "codec")
    return place


def run(name, place, out, capsys, *more):
    bench = load(name)
    if name == "diffusability":
        tiny = {"crops": 16, "samples": 8, "widths": (16,)}
        bench.BUDGETS = {setting: replace(budget, **tiny) for setting, budget in bench.BUDGETS.items()}
        bench.SAMPLER_STEPS = 2
    bench.main(["--codec", str(place / "codec"), "--images", str(place / "images"), "--out", str(out), *more])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(Path(last["files"]["json"]).read_text())
    page = Path(last["files"]["html"]).read_text()
    assert write_page(written, out, Path(last["files"]["html"]).stem).read_text() == page
    return last, page


@pytest.mark.parametrize("name", ["rate_distortion", "robustness"])
def test_a_folder_is_read_picture_by_picture(name, place, tmp_path, capsys, monkeypatch):
    """As many photographs as people have would not fit into memory."""
    bench, here, most = load(name), set(), 0

    def watched(path, channels):
        """An image on memory of numpy's, of which is seen when its last view is gone."""
        nonlocal most
        pixels = load_image(path, channels).numpy().copy()
        here.add(id(pixels))
        weakref.finalize(pixels, here.discard, id(pixels))
        most = max(most, len(here))
        return torch.from_numpy(pixels)

    monkeypatch.setattr("latentcodec.sources.folders.load_image", watched)
    more = ["--formats"] if name == "rate_distortion" else []
    bench.main(
        ["--codec", str(place / "codec"), "--images", str(place / "images"), "--out", str(tmp_path), *more]
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 8
    assert most <= 3  # one that is used, one that is read, one that a loop has not let go of


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--steps", "-1"]])
def test_a_denoiser_that_would_learn_nothing_is_refused_before_anything_is_read(wrong, place, tmp_path):
    arguments = ["--codec", str(place / "codec"), "--images", str(place / "images"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=rf"^diffusability.py: {' '.join(wrong)}: at least 1"):
        load("diffusability").main([*arguments, "--smoke", *wrong])


@pytest.mark.slow
def test_rate_distortion(place, tmp_path, capsys):
    last, page = run("rate_distortion", place, tmp_path, capsys, "--formats", "JPEG")
    curves = last["curves"]
    codec = {point["label"]: point for point in curves[last["codecs"][0]["codec"]]}
    assert codec["float32"]["bits_per_pixel"] == pytest.approx(32 * 3 / 16)
    assert codec["int8"]["bits_per_pixel"] == pytest.approx(8 * 3 / 16)
    assert codec["float16"]["psnr"] == pytest.approx(codec["float32"]["psnr"], abs=0.01)
    rates = [point["bits_per_pixel"] for point in curves["JPEG"]]
    assert rates == sorted(rates)
    assert "PSNR by bits a pixel" in page


def test_two_results_of_rate_distortion_are_compared(place, tmp_path, capsys):
    last, page = run("rate_distortion", place, tmp_path, capsys, "--formats")  # no image format
    (entry,) = last["codecs"]
    assert entry["fingerprint"] == LatentCodec.from_pretrained(place / "codec").fingerprint
    assert entry["fingerprint"] in page
    written = last["files"]["json"]
    assert load("compare").main([written, written]) == 0
    for points in last["curves"].values():
        for point in points:
            point["psnr"] -= 1
    write_json(last, tmp_path / "worse.json")
    assert load("compare").main([written, str(tmp_path / "worse.json")]) == 3
    assert f"{len(points)} worse" in capsys.readouterr().out


def test_diffusability_in_its_smoke_setting_says_that_it_proves_nothing(place, tmp_path, capsys):
    last, page = run("diffusability", place, tmp_path, capsys, "--smoke", "--steps", "2", "--seeds", "2")
    (entry,) = last["codecs"]
    assert len(entry["seeds"]) == 2
    assert entry["spread"] > 0
    assert "Its numbers say nothing of a codec" in page
    if entry["distance"] >= entry["gaussian"]:
        assert "no answer" in page


def test_diffusability_in_its_small_setting_claims_what_it_measured(place, tmp_path, capsys):
    last, page = run("diffusability", place, tmp_path, capsys, "--small", "--steps", "2", "--seeds", "1")
    assert last["setting"] == "small"
    assert last["budget"]["side"] == 32
    assert "Its numbers say nothing of a codec" not in page


def test_held_out_crops_are_of_other_images_from_all_over_the_folder(tmp_path):
    bench = load("diffusability")
    for number in range(11):
        save_image(torch.full((1, 3, 72, 72), number / 10 - 0.5), tmp_path / f"{number:02}.png")
    budget = replace(bench.BUDGETS["smoke"], crops=16)
    train, held_out = bench.open_crops(tmp_path, budget, 3)

    def images(crops):
        return [round(10 * (value + 0.5)) for value in crops.mean((1, 2, 3)).tolist()]

    assert images(train)[:8] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert set(images(held_out)) == {0, 5, 10}


def test_the_denoiser_that_is_judged_is_an_average_over_its_steps():
    bench = load("diffusability")
    budget = replace(bench.BUDGETS["smoke"], widths=(16,), batch=2)
    torch.manual_seed(0)
    z = torch.randn(4, 3, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        averaged = bench.train_denoiser(z, budget, 10, 0, "averaged").state_dict()
        patch.setattr(bench, "AVERAGING", 0.0)
        last = bench.train_denoiser(z, budget, 10, 0, "last").state_dict()
    assert any((averaged[name] - last[name]).abs().max() > 1e-5 for name in last)


def test_too_few_images_are_named(place, tmp_path):
    (tmp_path / "images").mkdir()
    save_image(torch.zeros(1, 3, 80, 80), tmp_path / "images" / "a.png")
    arguments = [
        "--codec",
        str(place / "codec"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit, match=r"^diffusability.py: .*at least 5"):
        load("diffusability").main([*arguments, "--smoke"])


def test_the_distance_of_two_gaussians_is_the_formula():
    a, b = torch.randn(20000, 3, dtype=torch.float64), 2 * torch.randn(20000, 3, dtype=torch.float64) + 1
    # |m - n|^2 = 3; per dimension (1 - 2)^2 = 1; over tr B = 12
    assert frechet_distance(a, b) == pytest.approx(100 * (3 + 3) / 12, rel=0.03)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_the_gaussian_has_the_latents_own_covariance():
    z = torch.randn(500, 2, 2, 1) @ torch.ones(1, 3) + 0.3 * torch.randn(500, 2, 2, 3) + 5
    drawn = gaussian_like(z, 4000, 0)
    assert torch.allclose(torch.cov(z.flatten(1).T), torch.cov(drawn.flatten(1).T), atol=0.15)
    assert torch.allclose(z.mean(0), drawn.mean(0), atol=0.1)


def test_pixel_statistics_tell_noise_from_smooth_pictures():
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4) * 2 - 1, size=(32, 32), mode="bilinear")
    features = [pixel_statistics(x) for x in (smooth[:32], smooth[32:], torch.rand(32, 3, 32, 32) * 2 - 1)]
    assert frechet_distance(features[2], features[1]) > 10 * frechet_distance(features[0], features[1])
