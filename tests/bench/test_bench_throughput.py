"""The bench of speed: its ratios and its headline, any choice of sides, its limit of time, and what it refuses."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_scripts import BENCH, CONFIG, last_line, references

from latentcodec.report.pages.throughput import headline
from latentcodec.speed import memory


def test_the_ratio_is_the_median_of_the_ratios_within_the_rounds(throughput):
    measured = {
        "ours": throughput.Measurement([1.0, 2.0, 1.0]),
        "diffusers": throughput.Measurement([3.0, 4.0, 1.0]),  # the machine slowed down in round 2
    }
    case = throughput.Case("decode", "float32", 100, 2)
    record = throughput.record(case, "diffusers", measured, floor=0.5)
    assert record["time_over_ours"] == 2.0
    assert record["ms"] == 3000.0
    assert record["images_per_s"] == pytest.approx(2 / 3)
    assert record["megapixels_per_s"] == pytest.approx(0.02 / 3)
    assert record["floor_ms"] == 500.0


def test_a_side_without_memory_has_no_numbers(throughput):
    measured = {"ours": throughput.Measurement([1.0]), "diffusers": throughput.Measurement()}
    record = throughput.record(throughput.Case("decode", "float32", 64, 1), "diffusers", measured, floor=0.5)
    assert math.isnan(record["ms"])
    assert math.isnan(record["time_over_ours"])


def test_the_headline_names_the_fastest_other_side_and_the_default():
    case = {"direction": "decode", "dtype": "float32", "size": 64, "batch": 1}
    ratios = {"ours": 1.0, "diffusers": 3.0, "diffusers channels_last": 2.0, "diffusers tiled": math.nan}
    records = [{**case, "side": side, "time_over_ours": ratio} for side, ratio in ratios.items()]
    ((number, meaning, level),) = headline(records)
    assert level == "healthy"
    assert number == "2.00x"
    assert meaning.endswith("speed of ours over diffusers channels_last; 3.00x over diffusers as it comes")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--codec": "nowhere/at/all"}, "nowhere/at/all"),
        ({"--codec": "missing.json"}, r"missing\.json"),
        ({"--codec": str(BENCH / "throughput.py")}, r"throughput\.py"),
        ({"--sizes": "33"}, "--sizes 33: not a multiple of the codec's 2"),
        ({"--repeats": "0"}, "--repeats"),
        ({"--max_memory": "0"}, "--max_memory 0"),
    ],
)
def test_throughput_names_what_it_cannot_use(throughput, codec_folder, tmp_path, changed, message):
    arguments = {"--codec": str(codec_folder), "--out": str(tmp_path / "out")} | changed
    with pytest.raises(SystemExit, match=f"^throughput.py: .*{message}"):
        throughput.main([text for pair in arguments.items() for text in pair])
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_ours_is_one_line(throughput, codec_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "use_cores", lambda threads: 1)
    small = ["--sizes", "32", "--batches", "1", "--dtypes", "float32", "--device", "cpu"]
    arguments = ["--codec", str(codec_folder), "--out", str(tmp_path), *small, "--max_memory", "1000"]
    with pytest.raises(SystemExit, match=r"^throughput.py: max_memory 1,000 bytes is too little .* needs"):
        throughput.main(arguments)


def test_a_configuration_file_with_an_unknown_key_is_refused_by_name(throughput, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(CONFIG | {"latent_chanels": 4}))
    with pytest.raises(SystemExit, match="latent_chanels"):
        throughput.main(["--codec", str(file), "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "headline"),
    [
        (["ours", "diffusers channels_last"], "speed of ours over diffusers channels_last<"),
        (["ours"], "megapixels a second, ours<"),
        (
            ["diffusers channels_last", "diffusers tiled"],
            "megapixels a second, diffusers (channels_last|tiled)<",
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_any_choice_of_sides_is_measured_and_reported(
    throughput, codec_folder, tmp_path, capsys, monkeypatch, sides, headline, dtype
):
    monkeypatch.setattr(throughput, "measure_memory", lambda *_: None)
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64})
    small = ["--sizes", "32", "--batches", "1", "--dtypes", dtype, "--repeats", "1", "--device", "cpu"]
    arguments = ["--codec", str(codec_folder), "--out", str(tmp_path), *small]
    throughput.main([*arguments, "--sides", *sides])
    printed = last_line(capsys.readouterr().out)
    assert [(r["direction"], r["side"]) for r in printed["results"]] == [
        (direction, side) for direction in ("encode", "decode") for side in sides
    ]
    for record in printed["results"]:
        assert (record["time_over_ours"] is None) == ("ours" not in sides)
        assert record["max_error"] < 0.5  # known without "diffusers" among the sides
    assert len(re.findall(headline, Path(printed["files"]["html"]).read_text())) == 2


def test_a_bench_out_of_time_measures_one_round_of_one_case_and_says_what_it_leaves_out(
    throughput, codec_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: pytest.fail("the time was over"))
    monkeypatch.setattr(throughput, "PEAK_SIDE", {"cpu": 64})
    small = ["--sizes", "32", "64", "--batches", "1", "--dtypes", "float32", "--device", "cpu"]
    throughput.main(["--codec", str(codec_folder), "--out", str(tmp_path), *small, "--seconds", "0"])
    said = capsys.readouterr()
    printed = last_line(said.out)
    assert {(r["direction"], r["size"]) for r in printed["results"]} == {("encode", 32)}
    assert printed["rounds"] == 1
    assert said.out.count("left out, since 0 seconds are over") == 3
    assert "memory of ours: not measured" in said.out


@pytest.mark.parametrize(("units", "dtypes"), [(True, ["float32", "bfloat16"]), (False, ["float32"])])
def test_a_number_format_that_is_emulated_is_measured_only_if_asked_for(
    throughput, monkeypatch, capsys, units, dtypes
):
    monkeypatch.setattr(throughput, "is_fast", lambda dtype, device: units or dtype == torch.float32)
    monkeypatch.setattr(throughput, "emulation_cost", lambda dtype, device: 9.0)
    needed = ["--codec", "x", "--out", "y", "--device", "cpu"]
    assert throughput.parse(needed).dtypes == dtypes
    throughput.warn_of_emulation(throughput.parse([*needed, "--dtypes", "bfloat16"]))
    assert ("warning: this machine is not fast in bfloat16" in capsys.readouterr().err) != units


@pytest.mark.slow
def test_throughput_runs_as_a_script_and_ends_with_one_line_of_json(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(CONFIG))
    small = ["--sizes", "64", "--batches", "1", "--dtypes", "float32", "--repeats", "2"]
    command = [sys.executable, BENCH / "throughput.py", "--codec", file, "--out", tmp_path / "out", *small]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    printed = last_line(finished.stdout)
    records = {(r["direction"], r["side"]): r for r in printed["results"]}
    assert set(records) == {
        (d, s) for d in ("encode", "decode") for s in ("ours", "diffusers", "diffusers channels_last")
    }
    for record in records.values():
        assert record["ms"] > 0
        assert record["max_error"] < 1e-4
        assert record["floor_ms"] > 0
    assert records["encode", "diffusers"]["max_error"] == 0
    page = Path(printed["files"]["html"]).read_text()
    assert references(page) == []
    assert "http" not in page
    assert len(json.loads(Path(printed["files"]["json"]).read_text())["results"][0]["rounds_ms"]) == 2
