"""A padding mode is kept through training, saving and loading, by us and by diffusers, and nobody is left unwarned."""

import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from small_vaes import SMALL, relative_error, small_vae

from latentcodec import LatentCodec, optimize_vae, restore_vae
from latentcodec.adopt import build
from latentcodec.quality.precision import certify
from latentcodec.training.start.model import ModelConfig, new_vae
from latentcodec.vae.padding import PADDING_KEY, padding_mode, padding_modes, set_padding_mode

MODES = ("reflect", "replicate", "circular")


def saved(codec, folder):
    with pytest.warns(UserWarning, match="pad by .* pads with zeros, and is wrong near the borders"):
        codec.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["kl", "flux2"])
def test_a_mode_outlives_saving_and_loading(name, mode, tmp_path):
    vae = small_vae(name)
    set_padding_mode(vae, mode)
    codec, x = LatentCodec(vae), torch.rand(1, 3, 48, 32) * 2 - 1
    z, y = codec.encode(x), codec.decode(codec.encode(x))
    again = LatentCodec.from_pretrained(saved(codec, tmp_path / "codec"))
    assert padding_mode(again.vae) == mode
    assert torch.equal(again.encode(x), z)
    assert torch.equal(again.decode(z), y)
    assert again.fingerprint == codec.fingerprint
    assert f"pad by `{mode}`" in (tmp_path / "codec" / "README.md").read_text()


def test_diffusers_loads_zero_padding_and_optimize_vae_mends_it(tmp_path):
    vae = small_vae("kl")
    set_padding_mode(vae, "reflect")
    codec = LatentCodec(vae)
    z = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        expected = codec.vae.decode(z).sample
    stock = AutoencoderKL.from_pretrained(saved(codec, tmp_path / "codec"))
    with torch.no_grad():
        assert relative_error(stock.decode(z).sample, expected) > 1e-3
        stock.save_pretrained(tmp_path / "by diffusers")  # as a pipeline does
        optimize_vae(stock)
        assert relative_error(stock.decode(z).sample, expected) <= 1e-5
        assert relative_error(restore_vae(stock).decode(z).sample, expected) <= 1e-5
    again = LatentCodec.from_pretrained(tmp_path / "by diffusers")
    with torch.no_grad():
        assert relative_error(again.vae.decode(z).sample, expected) <= 1e-5


def test_modes_set_on_the_layers_are_saved_too_unless_they_differ(tmp_path):
    codec = LatentCodec(small_vae("kl"))
    plain = codec.fingerprint
    for name in padding_modes_to_come(codec.vae):
        codec.vae.get_submodule(name).padding_mode = "circular"
    assert codec.fingerprint != plain
    assert padding_mode(LatentCodec.from_pretrained(saved(codec, tmp_path / "codec")).vae) == "circular"
    codec.vae.decoder.conv_in.padding_mode = "zeros"
    with pytest.raises(ValueError, match=r"pad by several modes \(circular, zeros\)"):
        codec.save_pretrained(tmp_path / "codec")
    set_padding_mode(codec.vae, "zeros")
    assert codec.fingerprint == plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.save_pretrained(tmp_path / "codec")
    assert json.loads((tmp_path / "codec" / "config.json").read_text())[PADDING_KEY] == "zeros"


def padding_modes_to_come(vae):
    """Names of the convolutions that pad by themselves."""
    kernels = {name for name, layer in vae.named_modules() if getattr(layer, "padding", None) == (1, 1)}
    assert len(kernels) > 20
    return kernels


def test_what_a_class_cannot_do_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{PADDING_KEY} cannot be 'mirror'; choose one of zeros, reflect"):
        build(SMALL["kl"][1] | {PADDING_KEY: "mirror"})
    with pytest.raises(ValueError, match="the layers of AutoencoderKLQwenImage pad with zeros only"):
        build(SMALL["qwen"][1] | {PADDING_KEY: "reflect"}, "AutoencoderKLQwenImage")
    LatentCodec(small_vae("kl")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {PADDING_KEY: 3}))
    with pytest.raises(ValueError, match=f"{PADDING_KEY} cannot be 3"):
        LatentCodec.from_pretrained(tmp_path)


def test_a_new_model_is_built_with_the_mode_and_its_certificate_measures_it():
    config = ModelConfig(
        latent_channels=4,
        block_out_channels=[8, 8],
        norm_num_groups=4,
        padding_mode="reflect",
        init="default",
    )
    vae = new_vae(config, None, None, list)
    assert padding_mode(vae) == vae.config[PADDING_KEY] == "reflect"
    assert not [name for name in padding_modes(vae) if "shortcut" in name or "downsamplers" in name]
    crop = torch.rand(3, 32, 32) * 2 - 1
    certificate = certify(vae, [crop])
    set_padding_mode(vae, "zeros")
    assert certify(vae, [crop]).activations != certificate.activations


def test_a_teacher_whose_class_has_no_other_padding_refuses_the_mode():
    from latentcodec.training.losses.teacher import Teacher

    teacher = Teacher(LatentCodec(small_vae("qwen")), 1.0, False, False)
    config = ModelConfig(block_out_channels=[8, 16], padding_mode="reflect", init="default")
    with pytest.raises(ValueError, match=r"model\.padding_mode reflect: AutoencoderKLQwenImage pads with"):
        new_vae(config, None, teacher, list)
    teacher = Teacher(LatentCodec(small_vae("flux2")), 1.0, False, False)
    vae = new_vae(ModelConfig(
        latent_channels=4, block_out_channels=[8, 8, 8, 16], norm_num_groups=4, padding_mode="replicate", init="default"
    ), None, teacher, list)  # fmt: skip
    assert isinstance(vae, AutoencoderKLFlux2)
    assert padding_mode(vae) == "replicate"
