"""Two results compared: a change beyond the noise is seen and signed, one within it is not."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from latentcodec.report.build import build_page
from latentcodec.report.comparison import compare

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("compare", BENCH / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def timing(factor=1.0, spread=0.02, seed=0, **changes):
    generator = random.Random(seed)
    rounds = [100 * factor * (1 + spread * generator.gauss(0, 1)) for _ in range(5)]
    record = {
        "direction": "decode",
        "dtype": "float32",
        "size": 256,
        "batch": 1,
        "side": "ours",
        "time_over_ours": 1.0,
    }
    record |= {"ms": sorted(rounds)[2], "rounds_ms": rounds, "peak_mib": 100.0, "rms_error": 1e-7}
    return {"bench": "throughput", "codec": "a", "results": [record], "date": "2026-01-01"} | changes


def scores(shift=0.0, noise=0.3, seed=0):
    generator = random.Random(1)
    other = random.Random(seed)
    rows = []
    for number in range(40):
        psnr = 30 + 5 * generator.gauss(0, 1)
        rows.append(
            {
                "file": f"{number}.png",
                "psnr": psnr + shift + noise * other.gauss(0, 1),
                "ssim": 0.9,
                "lpips": None,
            }
        )
    mean = sum(row["psnr"] for row in rows) / len(rows)
    entry = {
        "codec": "a",
        "psnr": {"mean": mean},
        "ssim": {"mean": 0.9},
        "lpips": {"mean": None},
        "psnr_over_klt": mean - 25,
    }
    return {"bench": "reconstruction", "codecs": [entry], "images": {"a": rows}}


def verdict_of(result, name):
    return next(change for change in result["changes"] if change["name"] == name)


def test_a_slower_program_is_worse_and_a_faster_one_better():
    name = "decode float32 1 x 256 ours ms"
    slower = verdict_of(compare(timing(), timing(1.2, seed=1)), name)
    assert slower["verdict"] == "worse"
    assert slower["difference"] > 0
    assert verdict_of(compare(timing(), timing(0.8, seed=1)), name)["verdict"] == "better"


def test_two_runs_of_one_program_differ_by_noise_only():
    for seed in range(1, 30):
        assert compare(timing(seed=seed), timing(seed=100 + seed))["regressions"] == 0


def test_scores_are_compared_image_by_image():
    """A tenth of a decibel is seen among images that differ by five, because they are the same images."""
    assert verdict_of(compare(scores(noise=0.02), scores(-0.1, 0.02, 5)), "codec psnr")["verdict"] == "worse"
    assert verdict_of(compare(scores(noise=0.02), scores(0.1, 0.02, 5)), "codec psnr")["verdict"] == "better"
    assert verdict_of(compare(scores(), scores(0.0, 0.3, 5)), "codec psnr")["verdict"] == ""


def test_what_else_differs_is_named_and_what_cannot_be_compared_refused():
    result = compare(
        timing(commit="a", hardware={"device": "x"}), timing(commit="b", hardware={"device": "y"})
    )
    assert {"commit", "device"} <= {*result["differs"]}
    with pytest.raises(ValueError, match="throughput and one of reconstruction"):
        compare(timing(), scores())
    with pytest.raises(ValueError, match="no case in common"):
        compare(timing(), timing() | {"results": []})


def test_the_command_ends_with_3_for_a_regression(command, tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, data in zip(paths, (timing(), timing(1.3, seed=2)), strict=True):
        path.write_text(json.dumps(data))
    assert command([*map(str, paths), "--out", str(tmp_path / "out")]) == 3
    assert "1 worse" in capsys.readouterr().out
    (written,) = (tmp_path / "out").glob("*.json")
    page = build_page(json.loads(written.read_text())).render()
    assert 'class=" worse"' in page
    assert command([str(paths[0]), str(paths[0])]) == 0
    assert command([str(paths[0]), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_subfolders_are_scored_by_themselves():
    from latentcodec.report.page import Page
    from latentcodec.report.pages.reconstruction import _groups

    entries = [
        {"group": "faces", "psnr": 30.0},
        {"group": "faces", "psnr": 32.0},
        {"group": "lines", "psnr": None},
    ]
    page = Page("a", "b")
    _groups(page, {"codec": entries})
    assert page.blocks[1]["rows"] == [["codec", "31.00", "-"]]
    _groups(page, {"codec": entries[:2]})
    assert len(page.blocks) == 2
