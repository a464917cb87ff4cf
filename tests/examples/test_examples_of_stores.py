"""The examples that encode and train, in small: they run, learn, and leave what diffusers alone can load."""

import os
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from PIL import Image

from latentcodec.store import LatentStore, encode, prepare

sys.path.append(str(Path(__file__).parents[1] / "store"))
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import encode_a_folder
import train_on_latents
from stores import SMALL, tiny_codec, write_pictures

from latentcodec.pixels import load_image


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    codec = tiny_codec()
    codec.vae.register_to_config(scaling_factor=8.0)  # about unit variance, as a trained codec's latents have
    codec.save_pretrained(folder / "codec")
    write_pictures(folder / "photos", 12, captions=True)
    return folder


def test_encode_a_folder(place, capsys, monkeypatch):
    monkeypatch.setattr("latentcodec.store.job.physical_cores", lambda: 1)
    arguments = [
        str(place / "photos"),
        "--codec",
        str(place / "codec"),
        "--out",
        str(place / "latents"),
        "--size",
        "32",
    ]
    encode_a_folder.main(arguments)
    out = capsys.readouterr().out
    assert "12 pictures" in out
    assert "torch.Size([8, 4, 8, 8])" in out
    assert load_image(place / "decoded/000.png").shape == (1, 3, 32, 32)


def test_no_more_pictures_are_read_than_are_decoded_and_none_is_overwritten(place, tmp_path, monkeypatch):
    monkeypatch.setattr("latentcodec.store.job.physical_cores", lambda: 1)
    for name in ("a.png", "a.jpg", "b.png", "c.png", "d.png", "e.png"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (name.encode()[0],) * 3).save(tmp_path / "photos" / name)
    asked, get = [], LatentStore.__getitem__
    monkeypatch.setattr(LatentStore, "__getitem__", lambda store, i: asked.append(i) or get(store, i))
    arguments = [tmp_path / "photos", "--codec", place / "codec", "--out", tmp_path / "latents", "--size", 32]
    with suppress(ValueError):  # 6 pictures fill no batch of 8
        encode_a_folder.main(list(map(str, arguments)))
    assert asked == [0, 1, 2, 3]
    assert len(list((tmp_path / "decoded").iterdir())) == 4


@pytest.mark.parametrize(
    "arguments", [["nowhere", "--out", "latents"], ["--out", "latents", "--photo", "nowhere"]]
)
def test_a_mistake_of_the_user_is_one_line(place, tmp_path, monkeypatch, arguments):
    example = "plug_into_a_pipeline" if "--photo" in arguments else "encode_a_folder"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example, "--codec", str(place / "codec"), *arguments])
    with pytest.raises(SystemExit, match=r"^error: nowhere: "):
        runpy.run_path(str(Path(__file__).parents[2] / f"examples/{example}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def store(place):
    prepare(
        [str(place / "photos")],
        place / "store",
        str(place / "codec"),
        size=32,
        posterior="mean and std",
        **SMALL,
    )
    encode(place / "store", workers=0)
    return place / "store"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # diffusers' and Accelerate's own
def test_train_on_latents(place, store):
    small = ["--batch_size", "4", "--width", "8", "--workers", "0", "--minutes", "2"]
    first = train_on_latents.main([str(store), "--out", str(place / "few"), "--max_steps", "2", *small])
    last = train_on_latents.main([str(store), "--out", str(place / "more"), "--max_steps", "30", *small])
    assert last < first
    assert load_image(place / "more/samples.png").shape == (1, 3, 32, 4 * 32 + 3 * 2)
    assert type(AutoencoderKL.from_pretrained(place / "more/pipeline", subfolder="vae")) is AutoencoderKL


def test_no_time_and_no_steps_are_refused(store, capsys):
    for choice in (["--minutes", "0"], ["--max_steps", "0"]):
        with pytest.raises(SystemExit):
            train_on_latents.main([str(store), "--out", "unused", *choice])
        assert choice[0] in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_end_together_though_their_clocks_differ(place, store):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("two_clocks.py")), str(store), "--out", str(place / "two")]
    small = ["--batch_size", "2", "--width", "8", "--workers", "0", "--minutes", "0.15"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + small, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (place / "two/samples.png").exists()
