"""The command: every verb, from photographs to latents and back, and the exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from image_sets import write_bad_files
from safetensors.torch import save_file
from small_commands import ENCODE, encode_the_photographs, last
from stores import write_pictures

from latentcodec.codec import LatentCodec
from latentcodec.pixels import load_image

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def store(place):
    return encode_the_photographs(place)


def test_from_photographs_to_latents_and_back(place, store, call):
    code, out, _ = call("decode", store, "--out", place / "pictures", "--json")
    assert (code, last(out)) == (0, {"items": 5})
    assert load_image(place / "pictures/003.png").shape == (1, 3, 32, 32)
    code, out, _ = call("inspect", store, "--json")
    facts = last(out)
    assert (code, facts["items"], facts["shards"], facts["shapes"]) == (0, 5, 3, {"4x8x8": 5})
    assert "histogram" in out
    assert call("verify", store, "--json")[1].endswith('{"ok": true, "items": 5, "bad_shards": []}\n')


def test_encode_reports_in_json_and_resumes(place, tmp_path, call):
    arguments = (
        "encode",
        place / "photos",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        *ENCODE,
        "--json",
    )
    code, out, _ = call(*arguments)
    line = last(out)
    assert code == 0
    keys = {"items", "rejected", "seconds", "images_per_second", "psnr", "bits_per_value", "fingerprint"}
    assert set(line) == keys
    assert (line["items"], line["rejected"], line["bits_per_value"]) == (5, 0, 16.0)
    code, out, _ = call(*arguments)
    assert (code, last(out)["items"]) == (0, 5)


def test_left_out_pictures_end_with_3(place, tmp_path, call):
    photos = write_pictures(tmp_path / "photos", 2)
    bad = write_bad_files(photos)
    arguments = (
        "encode",
        photos,
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "store",
        "--size",
        32,
        *ENCODE,
    )
    code, out, _ = call(*arguments, "--json")
    assert (code, last(out)["rejected"]) == (3, len(bad))
    listed = (tmp_path / "store/rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in listed} == set(map(str, bad))
    code, _, _ = call("finish", tmp_path / "store")
    assert code == 3
    code, _, _ = call(*arguments, "--rank", 0, "--world", 2)  # other ranks would be stopped by another code
    assert code == 0


def test_damage_ends_with_3_and_names_the_picture(place, tmp_path, call):
    call("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    shard = next((tmp_path / "store").glob("shards/*/000001.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, out, _ = call("verify", tmp_path / "store", "--json")
    assert (code, last(out)["bad_shards"]) == (3, ["shards/4x8x8/000001.arrow"])
    assert str(shard) in out
    (tmp_path / "store/codec/config.json").write_text("{}")
    (tmp_path / "store/plan/0000.arrow").unlink()
    code, out, _ = call("verify", tmp_path / "store")
    assert (code, out.splitlines()[-1].split(", ", 1)[1]) == (3, "damaged: 1 of 3 shards, codec, plan")


def test_drop(place, tmp_path, call):
    call("encode", place / "photos", "--codec", place / "codec", "--out", tmp_path / "store", *ENCODE)
    code, out, _ = call("finish", tmp_path / "store", "--drop", "001.png", "--drop", "004.png", "--json")
    assert (code, last(out)["items"], last(out)["dropped"]) == (0, 3, 2)


def test_decode_a_file_of_latents(place, tmp_path, call):
    z = torch.randn(2, 4, 8, 8)
    save_file({"latents": z}, tmp_path / "z.safetensors")
    np.save(tmp_path / "one.npy", z[0].numpy())
    for name, count in (("z.safetensors", 2), ("one.npy", 1)):
        code, _, _ = call(
            "decode",
            tmp_path / name,
            "--codec",
            place / "codec",
            "--out",
            tmp_path / name[0],
            "--format",
            "webp",
        )
        assert code == 0
        assert len(list((tmp_path / name[0]).glob("*.webp"))) == count
    code, _, err = call("decode", tmp_path / "one.npy", "--out", tmp_path)
    assert (code, "give --codec" in err) == (2, True)


def test_no_more_latents_are_decoded_than_were_asked_for(place, tmp_path, call, monkeypatch):
    np.save(tmp_path / "z.npy", np.zeros((3, 4, 8, 8), np.float32))
    decoded, written = [], tmp_path / "out"
    decode = LatentCodec.decode

    def watched(codec, z, size=None):
        decoded.append(len(list(written.glob("*"))))  # the pictures that are on the disk by now
        return decode(codec, z, size)

    monkeypatch.setattr(LatentCodec, "decode", watched)
    arguments = ("decode", tmp_path / "z.npy", "--codec", place / "codec", "--out", written, "--first", 2)
    code, out, _ = call(*arguments, "--json")
    assert (code, last(out), decoded) == (0, {"items": 2}, [0, 1])
    assert {path.name for path in written.iterdir()} == {"z-0000.png", "z-0001.png"}


def test_reconstruct(place, tmp_path, call):
    code, out, _ = call(
        "reconstruct",
        place / "photos/001.png",
        "--codec",
        place / "codec",
        "--out",
        tmp_path / "a.png",
        "--json",
    )
    assert code == 0
    assert load_image(tmp_path / "a.png").shape == (1, 3, 32, 100)  # three pictures and two lines between
    assert "dB PSNR" in out
    assert set(last(out)) == {"items", "rejected", "psnr", "ssim"}
    code, out, _ = call(
        "reconstruct", place / "photos", "--codec", place / "codec", "--out", tmp_path / "all"
    )
    assert (code, len(list((tmp_path / "all").glob("*.png")))) == (0, 5)


def test_inspect_a_codec(place, call):
    code, out, _ = call("inspect", place / "codec", "--json")
    facts = last(out)
    assert (code, facts["class"], facts["latent"]) == (0, "AutoencoderKL", "[4, H/4, W/4]")
    assert len(facts["fingerprint"]) == 64


def test_export_and_import(place, store, tmp_path, call):
    code, out, _ = call("export", store, "--to", "parquet", "--out", tmp_path / "parquet", "--json")
    assert (code, last(out)) == (0, {"items": 5, "files": 3})
    np.savez(tmp_path / "a.npz", latents=np.zeros((4, 8, 8), np.float32))
    code, out, _ = call(
        "import",
        tmp_path,
        "--codec",
        place / "codec",
        "--latents",
        "raw",
        "--out",
        tmp_path / "store",
        "--json",
    )
    assert (code, last(out)["items"]) == (0, 1)


@pytest.mark.slow
def test_the_installed_command(place, tmp_path):
    command = [sys.executable, "-m", "latentcodec"]
    shown = subprocess.run([*command, "encode", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "latentcodec encode photos" in shown.stdout
    assert subprocess.run([*command, "verify", str(place)], capture_output=True).returncode == 2
