"""A saved codec is a plain diffusers folder with a model card, whole or not at all, whatever interrupts it."""

import os

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_codecs import WEIGHTS, contents, same_weights, tiny_vae

from latentcodec import LatentCodec, files, load_image, optimize_vae, save_image


@pytest.fixture
def codec():
    return LatentCodec(tiny_vae())


@pytest.fixture
def folder(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


@pytest.mark.parametrize("prepare", [lambda vae: vae, optimize_vae], ids=["as built", "channels last"])
def test_a_saved_codec_is_a_plain_diffusers_folder(prepare, tmp_path):
    vae = prepare(tiny_vae(latents_mean=[0.5] * 4, latents_std=[2.0] * 4))
    LatentCodec(vae).save_pretrained(str(tmp_path / "a" / "codec"))
    assert {p.name for p in (tmp_path / "a" / "codec").iterdir()} == {"config.json", WEIGHTS, "README.md"}
    theirs = AutoencoderKL.from_pretrained(tmp_path / "a" / "codec").eval()
    assert theirs.config.latents_std == [2.0] * 4
    x = torch.rand(1, 3, 16, 8)
    with torch.no_grad():
        assert torch.allclose(theirs(x).sample, vae(x).sample, atol=1e-4)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_saved_files_have_the_permissions_that_the_umask_leaves(mask, codec, tmp_path):
    before = os.umask(mask)
    try:
        codec.save_pretrained(tmp_path / "codec")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "codec").iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("stage", ["weights", "card"])
def test_an_interrupted_save_leaves_what_was_there(stage, folder, monkeypatch):
    before = contents(folder)
    other = LatentCodec(tiny_vae(latent_channels=8))

    def half_a_file(path, _):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if stage == "weights":
        monkeypatch.setattr(files, "write_file", half_a_file)
    else:
        monkeypatch.setattr(LatentCodec, "model_card", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises((OSError, KeyboardInterrupt)):
        other.save_pretrained(folder)
    assert contents(folder) == before


def test_a_full_disk_is_an_os_error_that_names_the_folder(codec, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match=r"codec: the codec cannot be written \(No space left") as caught:
        codec.save_pretrained(tmp_path / "codec")
    assert str(tmp_path) in str(caught.value)
    assert not contents(tmp_path / "codec")


def test_a_new_folder_is_no_model_before_its_last_file(codec, tmp_path, monkeypatch):
    moved = []
    move = files.move_file
    monkeypatch.setattr(files, "move_file", lambda old, new: (moved.append(new.name), move(old, new)))
    codec.save_pretrained(tmp_path / "codec")
    assert moved[-1] == "config.json"
    assert len(moved) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_codec_that_is_not_finite_is_not_saved(value, dtype, folder):
    before = contents(folder)
    codec = LatentCodec(tiny_vae()).vae.to(dtype)
    with torch.no_grad():
        codec.decoder.conv_out.weight[0, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"not saved: 1 of \d+ numbers of decoder\.conv_out\.weight are NaN or inf"
    ):
        LatentCodec(codec).save_pretrained(folder)
    assert contents(folder) == before


def test_a_codec_saved_over_one_in_several_files_is_the_one_that_is_loaded(folder):
    first = LatentCodec(tiny_vae())
    for file in folder.iterdir():
        file.unlink()
    first.vae.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    torch.manual_seed(1)
    second = LatentCodec(tiny_vae())
    second.save_pretrained(folder)
    loaded = LatentCodec.from_pretrained(folder).vae.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in second.vae.state_dict().items())


def test_saving_over_another_codec_replaces_it(folder):
    other = LatentCodec(tiny_vae(latent_channels=8))
    other.save_pretrained(folder)
    assert same_weights(LatentCodec.from_pretrained(folder), other)


# ---- the model card


def test_the_model_card_tells_the_hub_and_the_reader_what_this_is(codec, folder):
    card = (folder / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert "library_name: diffusers" in front
    assert "f4, 4 latent channels" in body
    assert f"{sum(p.numel() for p in codec.vae.parameters()):,} parameters" in body
    assert "8, 8, 16" in body
    assert codec.model_card("PSNR 30 dB.").count("PSNR 30 dB.\n\n## Use") == 1
    codec.save_pretrained(folder, card="my own")
    assert (folder / "README.md").read_text() == "my own"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_code_in_the_model_card_runs(channels, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LatentCodec(tiny_vae(in_channels=channels, out_channels=channels)).save_pretrained(folder)
    save_image(torch.rand(1, 3, 9, 13), tmp_path / "photo.jpg")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    variables: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), variables)
    assert type(variables["vae"]) is AutoencoderKL
    with Image.open(tmp_path / "reconstruction.png") as image:
        assert image.size == (13, 9)
    shown = load_image(tmp_path / "reconstruction.png", channels)
    exact = variables["codec"].decode(variables["z"], size=(9, 13)).clamp(-1, 1)
    assert np.abs((shown - exact).numpy()).max() <= 1 / 255 + 1e-4
