"""Folders of models that are broken, hostile or unusual are loaded right, or refused in one line and at once."""

import json
import os
import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentcodec import LatentCodec, loading
from latentcodec.adopt import build
from latentcodec.model_folder import CONFIG, WEIGHTS

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


def tiny_vae(**others):
    return build(
        {"block_out_channels": [4, 8], "norm_num_groups": 2, "latent_channels": 2, **BLOCKS, **others}
    )


@pytest.fixture
def folder(tmp_path):
    LatentCodec(tiny_vae()).save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def typed_weights(dtype):
    def change(folder):
        state = load_file(folder / WEIGHTS)
        state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"].to(dtype)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def set_weight(value):
    def change(folder):
        state = load_file(folder / WEIGHTS)
        state["decoder.conv_in.bias"][0] = value
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def scalar_weights(folder):
    state = {name: torch.tensor(0.0) for name in load_file(folder / WEIGHTS)}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


INDEX = f"{WEIGHTS}.index.json"
FAULTS = {
    "a number of 5000 digits": (write(CONFIG, '{"latent_channels": ' + "9" * 5000 + "}"), "not a valid JSON"),
    "a number of 30 digits": (
        lambda f: edit(f, latent_channels=10**30),
        "cannot be a number of 31 digits",
    ),
    "a billion layers": (lambda f: edit(f, layers_per_block=10**9), "layers_per_block cannot be"),
    "a width of a billion": (
        lambda f: edit(f, block_out_channels=[4, 10**9]),
        "block_out_channels cannot be",
    ),
    "100,000 stages": (
        lambda f: edit(f, block_out_channels=[4] * 100_000),
        "block_out_channels cannot have 100,000",
    ),
    "a million brackets": (write(CONFIG, "[" * 1_000_000), "not a valid JSON"),
    "20 MB of JSON": (write(CONFIG, '"' + "x" * 20_000_000 + '"'), "20,000,002 bytes"),
    "not a number as scale": (lambda f: edit(f, scaling_factor=float("nan")), "scaling_factor cannot be nan"),
    "a deviation of 0": (
        lambda f: edit(f, latents_mean=[0.0] * 2, latents_std=[1.0, 0.0]),
        "latents_std must be positive",
    ),
    "a negative deviation": (lambda f: edit(f, latents_std=[1.0, -1.0]), "latents_std must be positive"),
    "a deviation that is NaN": (
        lambda f: edit(f, latents_std=[1.0, float("nan")]),
        "latents_std cannot be nan",
    ),
    "words as deviations": (lambda f: edit(f, latents_std=["a", "b"]), "latents_std must be positive"),
    "an index that is no JSON": (write(INDEX, "{"), f"{INDEX} is not a valid JSON"),
    "an index that is a list": (write(INDEX, "[]"), "needs a weight_map"),
    "an index without a map": (write(INDEX, "{}"), "needs a weight_map"),
    "an index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), "needs a weight_map"),
    "an index of pickles": (
        write(INDEX, '{"weight_map": {"a": "a.bin"}}'),
        "names a.bin, which is no .safetensors",
    ),
    "an index that leads out": (
        write(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'),
        "no .safetensors file",
    ),
    "an index of pickled weights of a variant": (
        write("diffusion_pytorch_model.safetensors.index.fp16.json", '{"weight_map": {"a": "a.bin"}}'),
        "names a.bin, which is no .safetensors",
    ),
    "an index that names a device": (
        write(INDEX, '{"weight_map": {"a": "/dev/zero"}}'),
        "names /dev/zero, which is no .safetensors",
    ),
    "an index whose part is a device": (
        lambda f: (
            (f / "a.safetensors").symlink_to("/dev/zero"),
            (f / INDEX).write_text('{"weight_map": {"a": "a.safetensors"}}'),
        ),
        "a.safetensors, which is not there",
    ),
    "weights that are a device": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/dev/zero")),
        "no file named",
    ),
    "weights that are a FIFO": (
        lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)),
        "no file named",
    ),
    "a configuration that is a FIFO": (
        lambda f: ((f / CONFIG).unlink(), os.mkfifo(f / CONFIG)),
        "config.json",
    ),
    "an index to nothing": (
        write(INDEX, '{"weight_map": {"a": "a.safetensors"}}'),
        "which is not there",
    ),
    "weights of NaN": (set_weight(float("nan")), r"1 of \d+ numbers of decoder.conv_in.bias are NaN"),
    "infinite weights": (set_weight(float("inf")), r"1 of \d+ numbers of decoder.conv_in.bias are NaN"),
    "weights of int8": (
        typed_weights(torch.int8),
        "decoder.conv_in.bias is of type I8, as in a quantised model",
    ),
    "weights of true and false": (typed_weights(torch.bool), "is of type BOOL"),
    "complex weights": (typed_weights(torch.complex64), "is of type C64"),
    "a list as class": (lambda f: edit(f, _class_name=["AutoencoderKL"]), "_class_name cannot be"),
    "scalars as weights": (scalar_weights, "cannot be loaded|expected shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_fault_is_refused_in_one_line(fault, way, folder):
    damage, words = FAULTS[fault]
    damage(folder)
    if way == "file" and fault.startswith(("an index", "a list as class")):
        return  # of which a single file knows nothing
    with pytest.raises(ValueError, match=words if way == "folder" else ".") as caught:
        LatentCodec.from_pretrained(folder if way == "folder" else folder / WEIGHTS)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_home_of_nobody_is_a_value_error():
    with pytest.raises(ValueError, match=r"~nouser-here"):
        LatentCodec.from_pretrained("~nouser-here/codec")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_one_variant_alone_is_loaded(variant, folder):
    (folder / WEIGHTS).rename(folder / f"diffusion_pytorch_model.{variant}.safetensors")
    assert LatentCodec.from_pretrained(folder).dtype == torch.float32


def test_a_folder_with_several_variants_and_no_plain_one_names_them(folder):
    for variant in ("fp16", "ema"):
        shutil.copy(folder / WEIGHTS, folder / f"diffusion_pytorch_model.{variant}.safetensors")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"several variants; give the path of one.*\.ema\..*\.fp16\."):
        LatentCodec.from_pretrained(folder)


def test_a_pickle_beside_an_index_runs_nothing(folder, tmp_path):
    (folder / WEIGHTS).write_bytes(b"")
    (folder / "a.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"encoder.conv_in.weight": "a.bin"}})
    )
    with pytest.raises(ValueError, match=r"a\.bin, which is no \.safetensors file"):
        LatentCodec.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_folder_named_like_a_bundled_codec_is_the_one_that_is_loaded(folder, tmp_path, monkeypatch):
    name = loading.bundled_names()[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LatentCodec.from_pretrained(name).latent_channels != 2  # an empty folder is no codec
    (tmp_path / name).rmdir()
    folder.rename(tmp_path / name)
    with pytest.warns(UserWarning, match="is loaded, not the bundled codec"):
        assert LatentCodec.from_pretrained(name).latent_channels == 2


def test_weights_that_count_no_versions_count_after_a_refresh():
    """Those that were made under inference mode: the sum over some of their values is all that is seen of a change."""
    with torch.inference_mode():
        codec = LatentCodec(tiny_vae())
    z = torch.randn(1, 2, 4, 4)
    for _ in range(3):
        before = codec.decode(z)
    for weight in codec.vae.decoder.parameters():
        with torch.inference_mode():
            weight.view(-1)[1 :: max(2, weight.numel() // 3)] *= -1
    codec.refresh()
    stock = AutoencoderKL.from_config(codec.vae.config).eval()
    stock.load_state_dict(codec.vae.state_dict())
    with torch.no_grad():
        expected = stock.decode(codec_raw(codec, z)).sample
    torch.testing.assert_close(codec.decode(z), expected, atol=1e-4, rtol=0)
    assert (before - expected).abs().max() > 1e-3


def test_weights_written_through_data_count_after_a_refresh():
    codec = LatentCodec(tiny_vae())
    z = torch.randn(1, 2, 4, 4)
    codec.decode(z)
    weight = codec.vae.decoder.conv_out.weight
    weight.data[0, 0, 0, 0] += 1.0
    codec.refresh()
    stock = AutoencoderKL.from_config(codec.vae.config).eval()
    stock.load_state_dict(codec.vae.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            codec.decode(z), stock.decode(codec_raw(codec, z)).sample, atol=1e-4, rtol=0
        )


def codec_raw(codec, z):
    return z * codec.latents_std + codec.latents_mean


def test_whole_numbers_beside_the_vae_of_a_checkpoint_are_no_fault(folder):
    state = {f"vae.{key}": value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(state | {"text.position_ids": torch.arange(3)}, folder / WEIGHTS)
    assert LatentCodec.from_pretrained(folder / WEIGHTS).latent_channels == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_every_floating_type_are_read(dtype, folder):
    typed_weights(dtype)(folder)
    assert LatentCodec.from_pretrained(folder).dtype == torch.float32
