"""A damaged or foreign folder of a codec is refused in one line: its name, and what is wrong with it."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_codecs import WEIGHTS, tiny_vae

from latentcodec import LatentCodec


@pytest.fixture
def codec():
    return LatentCodec(tiny_vae())


@pytest.fixture
def folder(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    return tmp_path / "codec"


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


def test_a_subfolder_that_is_not_there_is_not_replaced_by_the_folder(folder):
    with pytest.raises(ValueError, match=r"nothing is no folder of a VAE .*: it holds no config\.json"):
        LatentCodec.from_pretrained(folder, subfolder="nothing")


def test_a_subfolder_of_a_file_is_refused(folder):
    with pytest.raises(ValueError, match="is one file: it has no subfolder 'vae'"):
        LatentCodec.from_pretrained(folder / WEIGHTS, subfolder="vae")
