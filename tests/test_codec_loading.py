"""A codec is loaded from every place where a model can lie, on the device and in the dtype that are asked for."""

import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from tiny_codecs import WEIGHTS, same_weights, tiny_vae

import latentcodec.loading as module
from latentcodec import LatentCodec
from latentcodec.vae.networks import Decoder


@pytest.fixture
def codec():
    return LatentCodec(tiny_vae())


@pytest.fixture
def folder(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


# ---- device and dtype


def test_latents_and_images_are_float32_whatever_the_network_computes_in(folder):
    exact, half = (
        LatentCodec.from_pretrained(folder),
        LatentCodec.from_pretrained(folder, dtype=torch.bfloat16),
    )
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    x = torch.rand(1, 3, 9, 10)
    z = half.encode(x)
    assert z.dtype == torch.float32
    assert half.decode(z).dtype == torch.float32
    assert (z - exact.encode(x)).abs().max() < 0.1


def test_weights_saved_in_half_precision_are_read_as_float32(tmp_path):
    LatentCodec(tiny_vae().bfloat16()).save_pretrained(tmp_path)
    assert LatentCodec.from_pretrained(tmp_path).dtype == torch.float32
    assert LatentCodec.from_pretrained(tmp_path / WEIGHTS).dtype == torch.float32


def test_device_says_where_the_weights_go(folder):
    codec = LatentCodec.from_pretrained(folder, device="meta")
    assert codec.device.type == "meta"
    assert codec.latents_mean.device.type == "meta"


def test_a_dtype_is_no_reason_for_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert LatentCodec.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not caplog.records  # of modules to be kept in float32, of which there are none


# ---- where a codec can lie


def test_from_an_object_takes_it_over_in_place():
    vae = AutoencoderKL(
        **{key: value for key, value in tiny_vae().config.items() if key[0] != "_"}
    ).bfloat16()
    codec = LatentCodec.from_pretrained(vae)
    assert codec.vae is vae
    assert type(vae) is AutoencoderKL
    assert isinstance(vae.decoder, Decoder)
    assert not vae.training
    assert codec.dtype == torch.bfloat16
    assert LatentCodec.from_pretrained(vae, dtype=torch.float32).dtype == torch.float32


def test_from_a_folder_a_subfolder_a_pipeline_and_a_file(codec, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for source, subfolder in (
        (folder, None),
        (str(folder), None),
        (tmp_path, "codec"),
        (tmp_path / "pipe", None),
        (tmp_path / "pipe", "vae"),
        (folder / WEIGHTS, None),
    ):
        loaded = LatentCodec.from_pretrained(source, subfolder=subfolder)
        assert same_weights(loaded, codec), source
        assert loaded.vae.config.norm_num_groups == 4
        assert isinstance(loaded.vae.encoder, type(codec.vae.encoder))


def test_from_a_folder_of_the_home_directory(codec, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert same_weights(LatentCodec.from_pretrained("~/codec"), codec)


def test_from_a_bundled_name(codec, folder, monkeypatch):
    monkeypatch.setattr(module, "BUNDLED", folder.parent)
    monkeypatch.chdir(folder)
    assert module.bundled_names() == ["codec"]
    assert same_weights(LatentCodec.from_pretrained("codec"), codec)
    with pytest.raises(
        ValueError, match=r"'photo' is no file and no folder here, .* no bundled codec \(codec\)"
    ):
        LatentCodec.from_pretrained("photo")
    with pytest.raises(ValueError, match=r"^a{80}\.\.\.: File name too long"):
        LatentCodec.from_pretrained("a" * 300)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub as huggingface_hub leaves it; returns the function that puts a repository into it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, files):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(files, snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)

    return put


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # diffusers' own call of huggingface_hub
def test_from_the_hub_a_model_and_the_vae_of_a_pipeline(codec, folder, hub, tmp_path):
    shutil.copytree(folder, tmp_path / "pipe" / "vae")
    hub("someone/codec", folder)
    hub("someone/pipeline", tmp_path / "pipe")
    for name, subfolder in (
        ("someone/codec", None),
        ("someone/pipeline", None),
        ("someone/pipeline", "vae"),
    ):
        assert same_weights(LatentCodec.from_pretrained(name, subfolder=subfolder), codec)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
@pytest.mark.parametrize("subfolder", [None, "vae"])
def test_an_id_with_the_weights_of_one_variant_alone_is_loaded(codec, folder, hub, tmp_path, subfolder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copytree(folder, tmp_path / "half" / (subfolder or ""))
    hub("someone/half", tmp_path / "half")
    assert same_weights(LatentCodec.from_pretrained("someone/half"), codec)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")
def test_an_id_that_the_hub_does_not_have_is_named(hub, monkeypatch):
    asked = []
    load = AutoencoderKL.load_config

    def load_config(name, *, local_files_only, **place):
        asked.append(local_files_only)
        return load(name, local_files_only=local_files_only, **place)

    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    with pytest.raises(
        ValueError,
        match=r"'someone/nothing' is no file and no folder here, .* the hub: .*check your connection",
    ):
        LatentCodec.from_pretrained("someone/nothing")
    assert asked == [False, True]  # a hub out of reach is waited for once


@pytest.mark.parametrize("source", ["photo-f8c17", "/no/such/place", "runs/a/codec", "", "a.safetensors"])
def test_a_source_that_is_nothing_says_what_was_looked_for(source):
    with pytest.raises(ValueError, match=r"no file and no folder here, no hub id .* and no bundled codec"):
        LatentCodec.from_pretrained(source)


def test_an_object_of_another_class_is_a_type_error():
    unet = UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(TypeError, match=r"^UNet2DModel is not covered; covered are AutoencoderKL, "):
        LatentCodec.from_pretrained(unet)
