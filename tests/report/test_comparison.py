"""Two results compared: a change beyond the noise is seen and signed, one within it is not."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from latentcodec.report import comparison
from latentcodec.report.build import PAGES, build_page
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


def denoised(distance=60.0, spread=0.5, skill=0.4):
    entry = {"codec": "a", "distance": distance, "spread": spread, "seeds": [distance] * 2, "skill": skill}
    entry |= {"floor": 10.0, "gaussian": 90.0, "noise": 400.0}
    return {"bench": "diffusability", "codecs": [entry], "features": "statistics of pixels"}


def curves(psnr=30.0, bits=2.0):
    point = {"label": "steps of 1/4", "bits_per_pixel": bits, "psnr": psnr}
    jpeg = {"label": "at most 1 bits", "bits_per_pixel": 1.0, "psnr": psnr}
    codecs = [{"codec": "a", "fingerprint": "f"}]
    return {"bench": "rate_distortion", "codecs": codecs, "curves": {"a": [point], "JPEG": [jpeg]}}


def run_of_training(psnr=20.0, minutes=60.0):
    run = {"psnr": psnr, "ssim": 0.8, "images_per_s": 9.0, "share_of_peak": 0.5, "minutes": minutes}
    return {"bench": "training", "runs": [run]}


def classic(psnr=20.0):
    looked = {"psnr_db": psnr, "kl_nats": 9.0, "sharpness": 0.7, "draw_precision": 0.5}
    return {"bench": "classic_vae", "runs": {"vae-2": {"looked": looked}}}


def inspected(psnr=30.0):
    measures = {
        "psnr_db": psnr,
        "sec": 0.4,
        "noise_1db": 0.1,
        "within_3": 0.99,
        "signal_share": 0.9,
        "images": 9,
    }
    measures |= {"decoder_spread": 0.9, "draw_cost_db": 0.1, "int8_loss_db": 0.01, "dead_share": 0.0}
    return {"bench": "inspect", "codec": "a", "measures": measures}


def borne(psnr=30.0):
    return {"bench": "robustness", "codec": "a", "psnr": {"none": psnr, "noise 0.1": psnr - 2}}


def flat_scores(psnr=30.0):
    return scores(psnr - 30, 0)


WORSE = {  # of each kind of result, one and a worse one
    "throughput": (timing(), timing(1.3, seed=2)),
    "reconstruction": (flat_scores(), flat_scores(29)),
    "rate_distortion": (curves(), curves(psnr=29.5)),
    "robustness": (borne(), borne(29.5)),
    "diffusability": (denoised(), denoised(70.0)),
    "inspect": (inspected(), inspected(29.5)),
    "training": (run_of_training(), run_of_training(19.5)),
    "classic_vae": (classic(), classic(19.5)),
}


@pytest.mark.parametrize("kind", sorted({*PAGES} - {"compare"}))
def test_every_kind_of_result_tells_a_worse_one(kind):
    before, after = WORSE[kind]
    assert compare(before, after)["regressions"] >= 1
    assert compare(after, before)["regressions"] == 0
    assert compare(before, before)["changes"]


def test_every_word_that_is_judged_is_one_that_a_result_has():
    words = {name.rsplit(" ", 1)[-1] for before, _ in WORSE.values() for name in comparison.numbers(before)}
    words |= {"lpips"}  # which `scores` leaves out, as a bench without the network's weights does
    assert {*comparison.BETTER_LARGE, *comparison.BETTER_SMALL} <= words


def test_a_kind_without_numbers_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"results of kind 'compare' cannot be compared; those of throughput, "
    ):
        compare(compare(timing(), timing()), compare(timing(), timing()))


def test_a_result_that_lacks_what_its_bench_writes_today_is_refused_in_one_line():
    old = curves() | {"codecs": ["a"]}
    with pytest.raises(ValueError, match="a result of rate_distortion is of another version") as caught:
        compare(old, old)
    assert "\n" not in str(caught.value)


def test_a_denoisers_distance_is_judged_by_the_spread_of_its_seeds():
    """Two seeds each: the standard error of the difference is the spread, Student's t of 2 degrees 4.303."""
    name = "codec distance"
    assert verdict_of(compare(denoised(60, 3), denoised(72, 3)), name)["verdict"] == ""
    change = verdict_of(compare(denoised(60, 3), denoised(73.5, 3)), name)
    assert (change["verdict"], change["noise"]) == ("worse", pytest.approx(3 * 4.303, abs=0.01))
    assert verdict_of(compare(denoised(60, 0), denoised(61, 0)), name)["verdict"] == ""  # by chance equal
    skills = denoised(60, 3, 0.5), denoised(60, 3, 0.33)  # a spread of 3 of 90 - 10 is 0.0375
    assert verdict_of(compare(*skills), "codec skill")["noise"] == pytest.approx(3 * 4.303 / 80, abs=1e-3)
    assert verdict_of(compare(*skills), "codec skill")["verdict"] == "worse"
    assert verdict_of(compare(denoised(60, None), denoised(67, None)), name)["verdict"] == "worse"


def test_more_bits_are_worse_and_image_formats_are_no_change_of_the_codec():
    result = compare(curves(), curves(bits=2.5))
    assert verdict_of(result, "codec steps of 1/4 bits_per_pixel")["verdict"] == "worse"
    assert not any("JPEG" in change["name"] for change in result["changes"])


def test_a_longer_training_is_not_a_worse_one():
    change = verdict_of(compare(run_of_training(), run_of_training(minutes=90.0)), "run 1 minutes")
    assert (change["difference"], change["verdict"]) == (30, "")


def test_a_loss_of_decibels_that_anybody_sees_is_no_noise():
    """Two per cent of 30 dB would hide more than half a decibel."""
    assert verdict_of(compare(borne(), borne(29.8)), "none psnr")["verdict"] == "worse"
    assert verdict_of(compare(borne(), borne(29.95)), "none psnr")["verdict"] == ""


def test_pictures_of_one_name_in_two_folders_are_two():
    """By their names alone half of them would be compared with the other folder's."""
    before, after = scores(noise=0), scores(-0.1, 0)
    for data in (before, after):
        for number, row in enumerate(data["images"]["a"]):
            row["file"] = f"{'ab'[number % 2]}/{number // 2}.png"
    after["images"]["a"].reverse()
    change = verdict_of(compare(before, after), "codec psnr")
    assert (change["verdict"], change["noise"]) == ("worse", pytest.approx(0.005))


def test_codecs_are_paired_by_name_in_whatever_order():
    """b has gained two decibels on some images and lost them on others; a has not changed."""
    data = [scores(noise=0), scores(noise=0)]
    for place, result in enumerate(data):
        (first,), rows = result["codecs"], result["images"]["a"]
        changed = [row | {"psnr": row["psnr"] + 2 * place * (-1) ** n} for n, row in enumerate(rows)]
        result["codecs"].append(first | {"codec": "b"})
        result["images"]["b"] = changed
    data[1]["codecs"].reverse()
    result = compare(*data)
    assert verdict_of(result, "a psnr")["noise"] == pytest.approx(0.005)
    assert verdict_of(result, "b psnr")["noise"] > 0.3


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


def test_the_gain_over_the_klt_is_as_sure_as_the_score():
    """It is the same difference of the same images, so chance explains as much of it."""
    before, after = scores(), scores(0.0, 0.3, 5)
    for data in (before, after):
        rows = data["images"]["a"]
        data["images"]["a"] = [row | {"klt_psnr": 29.0} for row in rows]
        data["codecs"][0]["psnr_over_klt"] = data["codecs"][0]["psnr"]["mean"] - 29.0
    after["codecs"][0]["psnr"]["mean"] -= 0.05
    after["codecs"][0]["psnr_over_klt"] -= 0.05
    changes = [verdict_of(compare(before, after), f"codec {key}") for key in ("psnr", "psnr_over_klt")]
    assert [change["verdict"] for change in changes] == ["", ""]
    assert changes[0]["noise"] == pytest.approx(changes[1]["noise"])


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
