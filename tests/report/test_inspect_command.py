"""`latentcodec inspect CODEC --images`: verdicts on the screen, one page, its result, and one line for programs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from latentcodec.cli import run
from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image, save_image
from latentcodec.quality.health import cut_windows
from latentcodec.report import inspection


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The command takes all cores; tests run beside each other."""
    monkeypatch.setattr("latentcodec.machine.use_cores", lambda: 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("inspect")
    for number in range(4):
        save_image(torch.rand(1, 3, 16, 16) * 2 - 1, place / "images" / f"{number}.png")
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, latent_channels=3, **stages)
    LatentCodec(vae).save_pretrained(place / "codec")
    return place


def test_a_codec_is_judged_on_a_folder(place, tmp_path, capsys):
    code = run(
        ["inspect", str(place / "codec"), "--images", str(place / "images"), "--out", str(tmp_path), "--json"]
    )
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    assert code == 0
    assert summary.keys() == {"verdicts", "measures", "channels"}
    assert len(summary["channels"]) == 3
    assert summary["measures"]["images"] == 4
    for title in ("For a diffusion model", "For sampling from N(0, I)", "For storage"):
        assert title in out
    assert "Provisional" in out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".json"]
    (written,) = tmp_path.glob("*.json")
    data = json.loads(written.read_text())
    assert {key: data[key] for key in summary} == summary
    assert Path(written).with_suffix(".html").stat().st_size < 2 * 2**20


def test_images_that_cannot_be_used_are_named_and_the_exit_code_is_3(place, tmp_path, capsys):
    images = tmp_path / "images"
    save_image(torch.zeros(1, 3, 16, 16), images / "a.png")
    save_image(torch.ones(1, 3, 16, 16), images / "b.png")
    (images / "c.png").write_bytes(b"no image")
    assert run(["inspect", str(place / "codec"), "--images", str(images)]) == 3
    assert "c.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "{nowhere}"], "nowhere"),
        (["--out", "{nowhere}"], "needs --images"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(place, tmp_path, capsys, arguments, words):
    arguments = [argument.format(nowhere=tmp_path / "nowhere") for argument in arguments]
    assert run(["inspect", str(place / "codec"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert words in lines[0]


def test_of_one_image_alone_no_collapse_is_said(place, tmp_path, capsys):
    """Its decoded mean cannot vary from image to image, whatever the decoder makes of latents."""
    for name, count in (("one", 1), ("copies", 3)):
        (tmp_path / name).mkdir()
        for number in range(count):
            shutil.copy(place / "images" / "0.png", tmp_path / name / f"{number}.png")
        assert run(["inspect", str(place / "codec"), "--images", str(tmp_path / name), "--json"]) == 0
        out = capsys.readouterr().out
        assert json.loads(out.splitlines()[-1])["measures"]["decoder_spread"] is None
        assert "the decoder draws nearly the same picture" not in out


def test_photographs_are_kept_no_larger_than_what_is_looked_at(tmp_path, monkeypatch):
    for number, side in enumerate((300, 420, 200)):
        save_image(torch.rand(1, 1, side, 500) * 2 - 1, tmp_path / f"{number}.png")
    expected = cut_windows([load_image(tmp_path / f"{number}.png", 1)[0] for number in range(3)], 8)
    given = []

    def watched(images, f, sides=None):
        given.extend(images)
        return cut_windows(images, f, sides=sides)

    monkeypatch.setattr(inspection, "cut_windows", watched)
    opened = inspection.open_images(tmp_path, 1, 8)
    assert max(image.untyped_storage().nbytes() for image in given) <= 4 * 256**2
    order = [int(name[0]) for name in opened.names]
    assert sorted(order) == expected[1]
    assert torch.equal(opened.x[[order.index(number) for number in expected[1]]], expected[0])


def test_a_bundled_codec_has_no_share_in_the_run_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "codec").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "nll": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    assert inspection.training_curves(Path("photo-f8c16")) is None
    assert inspection.training_curves(Path("codec"))["curves"] == {"nll": [[1, 2.0]]}


def test_another_codec_is_shown_beside_it_or_refused(place, tmp_path, capsys, monkeypatch):
    codec, images = str(place / "codec"), ["--images", str(place / "images")]
    assert run(["inspect", codec, *images, "--beside", codec, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*.json")
    choices = [choice["label"] for choice in json.loads(written.read_text())["viewer"][0]["choices"]]
    assert choices[2].endswith("codec")
    monkeypatch.chdir(place)  # where both are called "codec", and each still has its own pictures
    assert run(["inspect", codec, *images, "--beside", "codec", "--out", str(tmp_path / "here")]) == 0
    (written,) = (tmp_path / "here").glob("*.json")
    choices = json.loads(written.read_text())["viewer"][0]["choices"]
    assert [choice["label"] for choice in choices[:3]] == ["original", "codec", "codec, beside it"]
    assert len({choice["picture"] for choice in choices}) == len(choices)
    assert run(["inspect", codec, "--beside", codec]) == 2
    assert "--beside" in capsys.readouterr().err
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    grey = AutoencoderKL(1, 1, block_out_channels=(8, 8), norm_num_groups=2, **stages)
    LatentCodec(grey).save_pretrained(tmp_path / "grey")
    assert run(["inspect", codec, *images, "--beside", str(tmp_path / "grey")]) == 2
    assert "takes images of 1 channels" in capsys.readouterr().err
