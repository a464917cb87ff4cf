"""The classic experiments, tiny: every run begins and is looked at, and the page says what the numbers say."""

import importlib.util
import json
from pathlib import Path

import pytest

from latentcodec.report import classic
from latentcodec.report.build import write_page
from latentcodec.report.pages.classic_claims import claims
from latentcodec.training.config import parse
from latentcodec.training.data import stream

FOLDER = Path(__file__).parents[2] / "experiments/classic_vae"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("classic_vae", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(stream, "START_CELLS", 144)
    for name, value in (("LOOKED_AT", 40), ("TRAIN_IMAGES", 60), ("THEORY_IMAGES", 200), ("BOUND_IMAGES", 2)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "BOUND_DRAWS", (1, 3))
    for name, value in (("ATLAS", 4), ("GRID", 4), ("DRAWS", 8)):
        monkeypatch.setattr(classic, name, value)
    return module


def configuration(name):
    return parse(["--config", str(FOLDER / "configs/base.yaml"), "--config", str(FOLDER / f"configs/{name}.yaml"),
                  "--output_dir", "unused"])  # fmt: skip


def test_every_configuration_is_a_run_and_says_what_is_its_own(script):
    assert {path.stem for path in (FOLDER / "configs").glob("*.yaml")} == {*script.RUNS, "base"}
    configs = {name: configuration(name) for name in script.RUNS}
    weights = {name: config.loss.kl_weight for name, config in configs.items()}
    assert (weights["ae-2"], weights["vae-2"], weights["collapsed-2"], weights["beta-0.01"]) == (
        0,
        1,
        100,
        0.01,
    )
    assert [configs[f"vae-{d}"].model.latent_channels for d in (2, 16, 128)] == [2, 16, 128]
    assert configs["pixel-scale"].loss.has_pixel_scale
    assert {configs[name].loss.likelihood for name in ("bernoulli", "laplace")} == {"bernoulli", "laplace"}
    assert configs["few-ae"].data.train_images == configs["few-vae"].data.train_images == 500
    assert all(config.data.padding == 2 and not config.data.flip for config in configs.values())


@pytest.mark.slow
def test_a_tiny_version_leaves_a_page_with_every_claim(script, tmp_path, monkeypatch, capsys):
    """Three runs of two steps stand for all sixteen."""
    tiny = {"vae-2": script.TWO, "vae-16": script.SIXTEEN, "pixel-scale": script.FEW}

    def train_all(configs, options):
        monkeypatch.setattr(script, "RUNS", {**script.RUNS, **tiny})
        done = {name: script.run(name, configs[name]) for name in tiny}
        chosen = {name: "vae-2" if name.endswith("-2") else "vae-16" for name in configs} | {
            n: n for n in tiny
        }
        weights = {name: {"kl_weight": config.loss.kl_weight} for name, config in configs.items()}
        return {name: done[chosen[name]] | weights[name] for name in configs}

    monkeypatch.setattr(script, "_train_all", train_all)
    assert script.main(["--out", str(tmp_path), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert said.index("predicted by the linear VAE") < said.index("core-minutes")
    data = json.loads((tmp_path / "classic_vae.json").read_text())
    found = claims(data)
    assert len(found) >= 25
    page = (tmp_path / "classic_vae.html").read_text()
    assert write_page(data, tmp_path, "classic_vae").read_text() == page, (
        "the page can be made again from its file"
    )
    for claim in found:
        assert claim.text.replace("'", "&#39;") in page
    assert "posterior collapse" in page
    assert "Cut off by the clock" not in page
    data["runs"]["vae-16"]["planned_steps"] = 180
    (tmp_path / "slow").mkdir()
    assert (
        "Cut off by the clock, so that little can be said of them: vae-16."
        in write_page(data, tmp_path / "slow", "classic_vae").read_text()
    )
    assert 'src="http' not in page
    assert len(page) < 3_000_000
    followed = data["runs"]["vae-2"]["followed"]
    assert [line["step"] for line in followed] == [0, 1, 2]
    again = script.run(
        "vae-2", script._config("vae-2", script._options(["--out", str(tmp_path), "--steps", "2"]), [])
    )
    assert again["looked"]["kl_nats"] == pytest.approx(data["runs"]["vae-2"]["looked"]["kl_nats"])


@pytest.mark.slow
def test_the_whole_shortened(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--steps", "2", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert all(f"] {name}: 2 of 2 steps" in said for name in script.RUNS)
    assert (tmp_path / "classic_vae.html").stat().st_size < 4_000_000


def test_data_that_do_not_fit_are_refused_in_one_line(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_idx_files_bring_their_labels_and_their_padding(script, tmp_path):
    images = bytes([0, 0, 8, 3, 0, 0, 0, 50, 0, 0, 0, 20, 0, 0, 0, 20]) + bytes(50 * 400)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 50]) + bytes(range(50)))
    options = script._options(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert script._data_settings(options)[-1] == "6"
