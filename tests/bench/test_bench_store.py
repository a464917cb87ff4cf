"""The benches of the store and of encoding run, and measure what their words say."""

import json
import sys
from pathlib import Path
from statistics import median

import pytest
from bench_scripts import last_line as strict_last_line
from bench_scripts import save_white, script

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
from stores import tiny_codec, write_pictures

from latentcodec.store import encoding


def last_line(captured):
    return json.loads(captured.readouterr().out.splitlines()[-1])


def test_the_store_beside_its_rivals(tmp_path, capsys):
    script("store").main(["--out", str(tmp_path), "--items", "16", "--rounds", "1"])
    formats = last_line(capsys)["formats"]
    assert {"store float16", "store int8", ".npz files", "parquet", "webdataset"} < formats.keys()
    assert formats["store int8"]["bytes_per_item"] < formats["store float16"]["bytes_per_item"]
    assert all(figures["write_items_per_second"] > 0 for figures in formats.values())
    assert json.loads((tmp_path / "store.json").read_text())["formats"] == formats


def test_a_loss_of_pictures_that_come_back_unchanged_is_null(tmp_path, capsys):
    codec, images = save_white(tmp_path)
    arguments = ["--items", "16", "--rounds", "1", "--codec", codec, "--images", images]
    script("store").main(["--out", str(tmp_path), *arguments])
    assert strict_last_line(capsys.readouterr().out)["loss_db"]["int8"] is None
    strict_last_line((tmp_path / "store.json").read_text().replace("\n", ""))


@pytest.mark.parametrize("half", [["--codec", "photo-f8c4"], ["--images", "photographs"]])
def test_half_of_what_a_loss_needs_is_refused(half, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("store").main(["--out", str(tmp_path), *half])
    assert "--codec and --images belong together" in capsys.readouterr().err


def test_decoding_and_encoding_together(tmp_path, capsys, monkeypatch):
    """Alone and together the model is put on the plan's device in one way."""
    placed = []

    def watched(codec, machine, device, store):
        placed.append(machine["device"])
        return as_it_is(codec, machine, device, store)

    bench, as_it_is = script("encoding"), encoding.placed
    monkeypatch.setattr(bench, "placed", watched, raising=False)
    monkeypatch.setattr(encoding, "placed", watched)
    tiny_codec().save_pretrained(tmp_path / "codec")
    photos = write_pictures(tmp_path / "photos", 12)
    arguments = ["--codec", str(tmp_path / "codec"), "--out", str(tmp_path), "--size", "32", "--batch", "2"]
    bench.main([str(photos), *arguments, "--workers", "0", "--rounds", "2"])
    assert len(placed) == 3  # once alone, and each round of both together
    result = last_line(capsys)
    rates = result["pictures_per_second"]
    assert set(rates) == {"decoding", "encoding", "together"}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    medians = {name: median(values) for name, values in rates.items()}
    smaller = min(medians["decoding"], medians["encoding"])
    assert (
        0.1 < result["share_of_the_smaller"] < 2
    )  # rates of twelve tiny pictures: milliseconds, and so chance
    assert result["share_of_the_smaller"] == pytest.approx(medians["together"] / smaller, rel=0.02)
