"""LatentCodec: any image size in and out, unit-variance latents, every place a model can lie, and plain folders out."""

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import latentcodec.loading as module
from latentcodec import LatentCodec, files, load_image, optimize_vae, save_image
from latentcodec.adopt import build
from latentcodec.vae.networks import Decoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_vae(**others):
    """An f4 VAE with random weights."""
    config = dict(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
    )
    return build(config | others)


def stock(vae):
    """The same weights in diffusers' own encoder and decoder."""
    twin = AutoencoderKL.from_config(vae.config).eval()
    twin.load_state_dict(vae.state_dict())
    return twin


@pytest.fixture
def codec():
    return LatentCodec(tiny_vae())


@pytest.fixture
def folder(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


def same_weights(a, b):
    first, second = a.vae.state_dict(), b.vae.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- sizes and channels ----


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (8, 12), (13, 31), (30, 17)])
def test_every_size_is_encoded_and_comes_back(size, codec):
    height, width = size
    x = torch.rand(2, 3, height, width) * 2 - 1
    z = codec.encode(x)
    assert z.shape == (2, 4, -(-height // 4), -(-width // 4))
    assert codec.decode(z, size=size).shape == x.shape
    assert codec.decode(z).shape == (2, 3, 4 * z.shape[2], 4 * z.shape[3])


def test_an_odd_size_is_continued_by_its_last_row_and_column(codec):
    x = torch.rand(1, 3, 6, 7)
    whole = nn.functional.pad(x, (0, 1, 0, 2), mode="replicate")
    z = codec.encode(x)
    assert torch.equal(z, codec.encode(whole))
    assert torch.equal(codec.decode(z, size=(6, 7)), codec.decode(z)[..., :6, :7])


def test_a_batch_is_its_images_one_by_one(codec):
    x = torch.rand(3, 3, 8, 12)
    together, apart = codec.encode(x), torch.cat([codec.encode(image[None]) for image in x])
    assert torch.allclose(together, apart, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_numbers_of_channels(channels):
    codec = LatentCodec(tiny_vae(in_channels=channels, out_channels=channels))
    x = torch.rand(1, channels, 5, 6)
    assert codec.image_channels == channels
    assert codec.decode(codec.encode(x), size=(5, 6)).shape == x.shape


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 2, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(1, 3, 0, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["two channels", "one channel", "no batch", "no pixels", "integers"],
)
def test_what_is_no_image_batch_is_refused_with_its_shape_and_type(x, codec):
    with pytest.raises(
        ValueError, match=rf"3 channels, got {x.dtype} of shape \[{', '.join(map(str, x.shape))}"
    ):
        codec.encode(x)


def test_latents_of_another_model_are_refused(codec):
    with pytest.raises(ValueError, match=r"latent batch .* 4 channels, got .* \[1, 16, 2, 2\]"):
        codec.decode(torch.zeros(1, 16, 2, 2))


@pytest.mark.parametrize("size", [(9, 8), (4, 8), (8, 0), (1, 4, 8, 8)])
def test_a_size_that_these_latents_cannot_have_is_refused(size, codec):
    with pytest.raises(ValueError, match=r"does not belong to latents of 2 x 2, f = 4"):
        codec.decode(torch.zeros(1, 4, 2, 2), size=size)


# ---- the scale of the latents ----


def encoder_of_brightness(**others):
    """A VAE whose raw latent is known: channel i has the mean over all pixels times (i + 1), plus i."""
    vae = tiny_vae(**others)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        c = vae.config.latent_channels
        vae.quant_conv.bias[:c] = torch.arange(c)
        vae.quant_conv.bias[c:] = -2 * torch.arange(1, c + 1)  # log-variances
    return vae


def test_statistics_per_channel_are_divided_out_and_multiplied_back():
    mean, std = [1.0, -2.0, 0.5, 0.0], [2.0, 0.5, 1.0, 3.0]
    codec = LatentCodec(encoder_of_brightness(latents_mean=mean, latents_std=std, scaling_factor=7.0))
    z = codec.encode(torch.zeros(1, 3, 4, 4)).flatten()
    expected = (torch.arange(4) - torch.tensor(mean)) / torch.tensor(std) * 7  # as SDXL's pipelines have it
    assert torch.allclose(z, expected)
    raw = []
    codec.vae.decoder.conv_in.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    codec.vae.post_quant_conv = nn.Identity()
    codec.decode(z[None, :, None, None])
    assert torch.allclose(raw[0].flatten(), torch.arange(4).float())


def test_scale_and_shift_follow_the_convention_of_the_pipelines():
    """z = (raw - shift_factor) * scaling_factor, as in StableDiffusion3Pipeline and FluxPipeline."""
    vae = tiny_vae(scaling_factor=1.5305, shift_factor=0.0609)
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        raw = stock(vae).encode(x).latent_dist.mode()
        image = stock(vae).decode(raw).sample
    codec = LatentCodec(vae)
    z = codec.encode(x)
    assert torch.allclose(z, (raw - 0.0609) * 1.5305, atol=1e-4)
    assert torch.allclose(codec.decode(z), image, atol=1e-4)


def test_measured_statistics_give_latents_of_unit_variance():
    vae = tiny_vae()
    x = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = vae.eval().encode(x).latent_dist.mode()
    vae.register_to_config(
        latents_mean=raw.mean((0, 2, 3)).tolist(),
        latents_std=raw.std((0, 2, 3)).tolist(),
        scaling_factor=1.0,
    )
    z = LatentCodec(vae).encode(x)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=1e-3)


def test_a_sample_has_the_posteriors_mean_and_deviation_and_follows_its_generator():
    codec = LatentCodec(encoder_of_brightness(scaling_factor=1.0))
    x = torch.zeros(1, 3, 200, 200)

    def draw(seed):
        return codec.encode(x, sample=True, generator=torch.Generator().manual_seed(seed))

    z = draw(1)
    assert torch.equal(z, draw(1))
    assert not torch.equal(z, draw(2))
    assert not torch.equal(z, codec.encode(x))
    assert torch.allclose(z.mean((0, 2, 3)), torch.arange(4.0), atol=0.03)
    deviation = torch.exp(-torch.arange(1.0, 5.0))
    assert torch.allclose(z.std((0, 2, 3)), deviation, rtol=0.05)


def test_the_mode_is_the_default_and_needs_no_seed(codec):
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(codec.encode(x), codec.encode(x))


# ---- device and dtype ----


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


def test_encoding_leaves_no_graph_behind(codec):
    assert not codec.encode(torch.rand(1, 3, 4, 4, requires_grad=True)).requires_grad


# ---- where a codec can lie ----


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


# ---- damaged and foreign folders ----


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def only_pickle(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


FAULTS = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "a configuration that is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        "not a valid JSON file.*line 1 column 2",
    ),
    "a configuration in binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "not a valid JSON"),
    "a list as configuration": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json is not a JSON obj",
    ),
    "another class": (
        lambda f: edit(f, _class_name="AutoencoderTiny"),
        "config.json: the class AutoencoderTiny is not covered; covered are AutoencoderKL, ",
    ),
    "a typo in a key": (lambda f: edit(f, latent_chanels=4), "no configuration key 'latent_chanels'"),
    "a number for a list": (lambda f: edit(f, block_out_channels=8), "block_out_channels cannot be 8"),
    "words for numbers": (
        lambda f: edit(f, block_out_channels=["8"]),
        r"block_out_channels cannot be \['8'\]",
    ),
    "a word for a number": (lambda f: edit(f, latent_channels="4"), "latent_channels cannot be '4'"),
    "a negative number": (lambda f: edit(f, latent_channels=-4), "latent_channels cannot be -4"),
    "no scale": (lambda f: edit(f, scaling_factor=0), "scaling_factor cannot be 0"),
    "an endless scale": (lambda f: edit(f, scaling_factor=float("inf")), "scaling_factor cannot be inf"),
    "too few statistics": (
        lambda f: edit(f, latents_std=[1.0]),
        "latents_std has 1 entries for 4 latent channels",
    ),
    "an unknown block": (lambda f: edit(f, down_block_types=["A"] * 3), "down_block_types cannot hold 'A'"),
    "an unknown activation": (lambda f: edit(f, act_fn="tanh"), "act_fn: 'tanh' is unknown"),
    "other groups": (lambda f: edit(f, norm_num_groups=5), r"8 is not divisible by norm_num_groups \(5\)"),
    "other widths": (lambda f: edit(f, block_out_channels=[8, 8, 32]), r"expected shape \S+, but got \S+$"),
    "fewer stages": (
        lambda f: edit(f, block_out_channels=[8, 8]),
        "down_block_types has 3 entries for 2 widths",
    ),
    "only a pickle": (only_pickle, "holds no .safetensors weights; pickled .bin files are not loaded"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "header too small"),
    "garbage weights": (lambda f: (f / WEIGHTS).write_bytes(b"garbage " * 99), "header too large"),
    "truncated weights": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 1),
        "file not fully covered",
    ),
    "a missing tensor": (
        lambda f: change_weights(f, lambda state: state.pop("decoder.conv_in.weight")),
        "1 missing keys, the first is 'decoder.conv_in.weight'",
    ),
    "a tensor too many": (
        lambda f: change_weights(f, lambda state: state.update(bn=torch.zeros(1))),
        "1 unexpected keys, the first is 'bn'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_with_a_fault_is_refused_by_name_and_reason(fault, folder):
    damage, reason = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        LatentCodec.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_error_is_the_only_line(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # else caplog does not hear it
    edit(folder, layers_per_block=2)
    with pytest.raises(ValueError, match="missing keys"):
        LatentCodec.from_pretrained(folder)
    assert not caplog.records  # diffusers would list every missing tensor


def test_a_dtype_is_no_reason_for_a_warning(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert LatentCodec.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not caplog.records  # of modules to be kept in float32, of which there are none


def test_a_subfolder_that_is_not_there_is_not_replaced_by_the_folder(folder):
    with pytest.raises(ValueError, match=r"nothing is no folder of a VAE .*: it holds no config\.json"):
        LatentCodec.from_pretrained(folder, subfolder="nothing")


def test_a_subfolder_of_a_file_is_refused(folder):
    with pytest.raises(ValueError, match="is one file: it has no subfolder 'vae'"):
        LatentCodec.from_pretrained(folder / WEIGHTS, subfolder="vae")


# ---- saving ----


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


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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


def test_a_grey_codec_is_not_plugged_into_a_pipeline_of_colour_images():
    old = tiny_vae()
    pipe = SimpleNamespace(vae=old)
    with pytest.raises(ValueError, match="1 image channels, the pipeline's VAE has 3"):
        LatentCodec(tiny_vae(in_channels=1, out_channels=1)).plug_into(pipe)
    assert pipe.vae is old
