"""The bench of reconstruction: its numbers are those of the evaluator, and what it cannot open is named."""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_scripts import BENCH, CONFIG, last_line, references, save_white, script

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image, save_image
from latentcodec.quality.klt import KLT
from latentcodec.quality.metrics import evaluate
from latentcodec.report import results as report
from latentcodec.report.build import write_page
from latentcodec.report.crops import worst_window


@pytest.fixture(scope="module")
def reconstruction() -> ModuleType:
    return script("reconstruction")


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Five pictures of different sizes, one damaged and one too small."""
    folder = tmp_path / "images"
    for i in range(5):
        noise = torch.nn.functional.avg_pool2d(torch.randn(1, 3, 40 + 3 * i, 44), 5, stride=1)
        save_image(noise.clamp(-1, 1), folder / f"{i}.png")
    save_image(torch.zeros(3, 4, 40), folder / "small.png")
    (folder / "2a_damaged.png").write_bytes((folder / "2.png").read_bytes()[:200])
    return folder


def test_reconstruction_measures_what_the_evaluator_measures(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    images = [load_image(image_folder / f"{i}.png")[0] for i in range(5)]
    expected = evaluate(LatentCodec.from_pretrained(codec_folder), images)
    klt = evaluate(KLT.fit(images, 2, 3), images)
    (entry,) = printed["codecs"]
    for metric in ("psnr", "ssim"):
        low, high = entry[metric].pop("interval")
        assert low <= expected.mean(metric) <= high
        assert entry[metric] == {"mean": expected.mean(metric), "min": min(expected.values(metric))}
        entry[metric]["interval"] = [low, high]
    assert entry["lpips"] == {"mean": None, "max": None, "interval": [None, None]}
    assert entry["klt_psnr"]["mean"] == klt.mean("psnr")
    assert entry["psnr_over_klt"] == expected.mean("psnr") - klt.mean("psnr")
    assert (entry["latent"], entry["floats_per_pixel"]) == ("f2c3", 0.75)

    written = json.loads(Path(printed["files"]["json"]).read_text())
    assert [
        score["psnr"] for score in written["images"][report.short_path(str(codec_folder))]
    ] == expected.values("psnr")
    assert written["codecs"] == printed["codecs"]
    page = Path(printed["files"]["html"]).read_text()
    assert references(page) == []
    assert "http" not in page
    assert [sample["label"].split(":")[0] for sample in written["viewer"]] == ["worst", "median", "best"]
    choices = written["viewer"][0]["choices"]
    assert [choice["label"] for choice in choices[:3]] == ["original", entry["codec"], "KLT f2c3"]
    assert all(written["pictures"][choice["picture"]].startswith("data:image/webp") for choice in choices)
    assert len(entry["round_trips_psnr"]) == 10
    assert entry["round_trips_psnr"][0] == pytest.approx(sum(expected.values("psnr")[:4]) / 4)
    for key in ("commit", "versions", "command", "time", "hardware"):
        assert key in printed
    assert re.fullmatch("[0-9a-f]{64}", entry["fingerprint"])
    assert write_page(written, tmp_path / "out", Path(printed["files"]["html"]).stem).read_text() == page


def test_pictures_of_one_name_in_two_folders_are_told_apart(reconstruction, codec_folder, tmp_path, capsys):
    for folder in "ab":
        save_image(torch.rand(3, 20, 20) * 2 - 1, tmp_path / "images" / folder / "1.png")
    arguments = ["--codec", str(codec_folder), "--images", str(tmp_path / "images"), "--out", str(tmp_path)]
    reconstruction.main([*arguments, "--lpips_net", "none", "--rivals"])
    files = last_line(capsys.readouterr().out)["files"]
    (rows,) = json.loads(Path(files["json"]).read_text())["images"].values()
    assert [row["file"] for row in rows] == ["a/1.png", "b/1.png"]
    page = Path(files["html"]).read_text()
    assert "a/1.png" in page
    assert "b/1.png" in page


def test_pictures_that_come_back_unchanged_have_a_page(
    reconstruction, codec_folder, tmp_path, capsys, monkeypatch
):
    """Their PSNR is infinite, which JSON cannot hold."""
    monkeypatch.setattr(reconstruction, "use_cores", lambda: 1)
    codec, images = save_white(tmp_path)
    arguments = ["--images", images, "--out", str(tmp_path), "--lpips_net", "none"]
    reconstruction.main(["--codec", codec, *arguments])
    out = capsys.readouterr().out
    assert out.splitlines()[2].split()[2:7] == ["infinite", "-", "infinite", "-", "1.0000"]
    assert last_line(out)["codecs"][0]["psnr"]["mean"] is None
    page = Path(last_line(out)["files"]["html"]).read_text()
    assert "infinite dB</b>" in page
    assert "from infinite to infinite dB" in page
    assert re.search(r"best: \d.png, infinite dB", page)
    reconstruction.main(["--codec", str(codec_folder), codec, *arguments, "--rivals"])
    page = Path(last_line(capsys.readouterr().out)["files"]["html"]).read_text()
    assert "f2c3: - against the KLT" in page


@pytest.mark.slow
def test_damaged_and_tiny_images_are_skipped_and_listed(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    assert printed["evaluated"] == 5
    assert [Path(entry["file"]).name for entry in printed["skipped"]] == ["2a_damaged.png", "small.png"]
    assert "4 x 40 pixels" in printed["skipped"][1]["reason"]
    page = Path(printed["files"]["html"]).read_text()
    assert "2a_damaged.png" in page


@pytest.mark.slow
def test_several_codecs_share_a_page_and_the_klt_can_have_its_own_images(
    reconstruction, codec_folder, image_folder, tmp_path, capsys
):
    other = tmp_path / "other"
    LatentCodec(build(CONFIG | {"latent_channels": 2})).save_pretrained(other)
    codecs = ["--codec", str(codec_folder), str(other)]
    folders = [
        "--images",
        str(image_folder),
        "--klt_images",
        str(image_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    reconstruction.main([*codecs, *folders, "--lpips_net", "none"])
    printed = last_line(capsys.readouterr().out)
    assert [entry["latent"] for entry in printed["codecs"]] == ["f2c3", "f2c2"]
    assert printed["codecs"][0]["klt_psnr"]["mean"] > printed["codecs"][1]["klt_psnr"]["mean"]
    assert (
        printed["klt_fitted_on"] == f"6 images of {report.short_path(str(image_folder))}"
    )  # the small one has blocks too


def test_the_window_shown_is_the_one_with_the_largest_error():
    error = torch.zeros(600, 400)
    error[330:350, 100:120] = 1
    rows, columns = worst_window(error, 256)
    assert rows.start <= 330
    assert rows.stop >= 350
    assert columns.start <= 100
    assert columns.stop >= 120
    assert worst_window(torch.zeros(30, 500), 256) == (slice(0, 30), slice(0, 256))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--codec": "nowhere/at/all"}, "nowhere/at/all"),
        ({"--images": "no_such_folder"}, "no_such_folder"),
        ({"--klt_images": "no_such_folder"}, "no_such_folder"),
        ({"--lpips_net": "vgg", "--lpips_weights": "no_such_file"}, "no_such_file"),
        (
            {"--out": str(BENCH / "throughput.py" / "out")},
            r"--out .*throughput.py/out: no results can be wri",
        ),
    ],
)
def test_reconstruction_names_what_it_cannot_open(
    reconstruction, codec_folder, image_folder, tmp_path, monkeypatch, changed, message
):
    given = {"--codec": str(codec_folder), "--images": str(image_folder), "--out": str(tmp_path / "out")}
    arguments = given | {"--lpips_net": "none"} | changed
    monkeypatch.setattr(reconstruction, "measure", lambda *_: pytest.fail("measured before all was opened"))
    with pytest.raises(SystemExit, match=f"^reconstruction.py: .*{message}"):
        reconstruction.main([text for pair in arguments.items() for text in pair])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_no_earlier_report_and_not_the_table(
    reconstruction, codec_folder, image_folder, tmp_path, capsys, monkeypatch
):
    arguments = ["--codec", str(codec_folder), "--images", str(image_folder), "--out", str(tmp_path / "out")]
    reconstruction.main([*arguments, "--lpips_net", "none"])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    table = capsys.readouterr().out.splitlines()[:3]

    def full(path, content, durable):
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentcodec.files.write_file", full)
    with pytest.raises(SystemExit, match=r"No space left on device: '.*\.json'"):
        reconstruction.main([*arguments, "--lpips_net", "none"])
    assert capsys.readouterr().out.splitlines()[:3] == table
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_damaged_images_is_refused(reconstruction, codec_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    arguments = ["--codec", str(codec_folder), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"none of the 1 images in .* can be used.*bad\.png"):
        reconstruction.main([*arguments, "--lpips_net", "none"])
