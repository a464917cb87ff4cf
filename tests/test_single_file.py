"""One .safetensors file gives the model it came from, in every spelling, with a config.json beside it or without."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from latentcodec import LatentCodec
from latentcodec.adopt import build
from latentcodec.single_file import load_single_file


def vae_of(widths=(128, 128), **others):
    """A VAE that tells everything by its shapes: wide enough for 32 groups, random norms and biases included."""
    config = dict(
        block_out_channels=list(widths),
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    )
    vae = build(config | others).eval()
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return vae


def ldm(state):
    """The keys and shapes of the original latent-diffusion repositories, renamed by hand."""
    stages = 1 + max(int(match[1]) for key in state if (match := re.search(r"up_blocks\.(\d+)", key)))
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{stages - 1 - int(m[1])}.block.{m[2]}", key
        )
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{stages - 1 - int(m[1])}.upsample", key
        )
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = re.sub(r"down_blocks\.(\d+)\.attentions", r"down.\1.attn", key)
            key = re.sub(r"up_blocks\.(\d+)\.attentions", lambda m: f"up.{stages - 1 - int(m[1])}.attn", key)
            key = re.sub(r"to_([qkv])\.", r"\1.", key).replace("to_out.0", "proj_out")
            value = value[:, :, None, None] if value.ndim == 2 else value
        renamed[key] = value.contiguous()
    return renamed


def early_diffusers(state):
    """The names of the attention layers before diffusers called them to_q, to_k, to_v and to_out."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)")
    return {pattern.sub(lambda m: m[1] + names[m[2]], key): value for key, value in state.items()}


SPELLINGS = {
    "diffusers": dict,
    "early diffusers": early_diffusers,
    "ldm": ldm,
    "ldm in a whole checkpoint": lambda state: (
        {"first_stage_model." + key: value for key, value in ldm(state).items()}
        | {"model.diffusion_model.out.weight": torch.zeros(2)}
    ),
    "diffusers in a whole checkpoint": lambda state: (
        {"vae." + key: value for key, value in state.items()} | {"unet.conv_out.weight": torch.zeros(2)}
    ),
}
KINDS = {
    "quant convs": dict(),
    "no quant convs": dict(use_quant_conv=False, use_post_quant_conv=False),
    "no attention": dict(mid_block_add_attention=False),
    "two layers": dict(layers_per_block=2, widths=(128, 160)),
    "one image channel": dict(in_channels=1, out_channels=1),
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {kind: vae_of(**config) for kind, config in KINDS.items()}


def output(vae):
    """Moments and image, of a fixed input."""
    x = torch.linspace(-1, 1, vae.config.in_channels * 64).reshape(1, vae.config.in_channels, 8, 8)
    with torch.no_grad():
        return torch.cat([vae.encode(x).latent_dist.parameters.flatten(), vae(x).sample.flatten()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lone_file_gives_the_model_it_came_from(kind, spelling, models, tmp_path):
    model = models[kind]
    save_file(SPELLINGS[spelling](model.state_dict()), tmp_path / "a.safetensors")
    loaded = load_single_file(tmp_path / "a.safetensors").eval()
    assert type(loaded) is AutoencoderKL
    assert torch.equal(output(loaded), output(model))
    described = {key for key in model.config if key[0] != "_"}
    assert {key: loaded.config[key] for key in described} == {key: model.config[key] for key in described}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_config_beside_the_file_tells_what_shapes_do_not(spelling, tmp_path):
    model = vae_of((8, 16), latent_channels=16, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159)
    model.save_config(tmp_path)
    save_file(SPELLINGS[spelling](model.state_dict()), tmp_path / "a.safetensors")
    codec = LatentCodec.from_pretrained(tmp_path / "a.safetensors")
    assert torch.equal(output(codec.vae), output(model))
    assert codec.vae.config.scaling_factor == 0.3611
    assert torch.allclose(codec.latents_mean, torch.tensor(0.1159))


@pytest.mark.parametrize("spelling", ["diffusers", "ldm"])
def test_attention_within_the_stages_is_found_or_refused_but_never_dropped(spelling, tmp_path):
    model = vae_of(
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    )
    state = SPELLINGS[spelling](model.state_dict())
    save_file(state, tmp_path / "a.safetensors")
    if spelling == "diffusers":
        assert torch.equal(output(load_single_file(tmp_path / "a.safetensors").eval()), output(model))
    else:  # diffusers' converter knows attention in the middle alone
        with pytest.raises(ValueError, match="tensors differ"):
            load_single_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("neighbour", "scale", "shift", "channels"),
    [
        ("conditioner.embedders.1.model.ln_final.bias", 0.13025, None, 4),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", 1.5305, 0.0609, 16),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.bias", 0.3611, 0.1159, 16),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", 0.18215, None, 4),
    ],
    ids=["sdxl", "sd3", "flux", "sd"],
)
def test_a_whole_checkpoint_tells_the_scale_of_its_latents(neighbour, scale, shift, channels, tmp_path):
    state = ldm(vae_of((128,), latent_channels=channels).state_dict())
    whole = {"first_stage_model." + key: value for key, value in state.items()}
    save_file(whole | {neighbour: torch.zeros(2)}, tmp_path / "a.safetensors")
    config = load_single_file(tmp_path / "a.safetensors").config
    assert (config.scaling_factor, config.shift_factor) == (scale, shift)


def test_half_precision_is_read_as_float32(models, tmp_path):
    state = {key: value.half() for key, value in models["quant convs"].state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_single_file(tmp_path / "a.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encoder.conv_in.weight, state["encoder.conv_in.weight"].float())


def test_the_config_of_another_model_beside_the_file_is_none_of_its_business(models, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", "in_channels": 9})
    )
    save_file(models["quant convs"].state_dict(), tmp_path / "a.safetensors")
    assert torch.equal(
        output(load_single_file(tmp_path / "a.safetensors").eval()), output(models["quant convs"])
    )


# ---- refused ----


def test_a_file_that_leaves_the_groups_open_is_refused(tmp_path):
    """Before, 8 groups were assumed for narrow models: a model of 4 groups loaded and gave other numbers."""
    save_file(vae_of((8, 16), norm_num_groups=4).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"a.safetensors: .*norm_num_groups for widths \[8, 16\]; put .*config.json"
    ):
        load_single_file(tmp_path / "a.safetensors")


def test_a_file_that_leaves_the_scale_open_is_refused(tmp_path):
    save_file(vae_of((128,), latent_channels=16).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"how these 16 latent channels are scaled; put .*config.json"):
        load_single_file(tmp_path / "a.safetensors")


def file_of(state):
    return lambda path: save_file(state, path)


STATE = vae_of((128,)).state_dict()
BAD_FILES = {
    "garbage": (lambda path: path.write_bytes(b"garbage " * 99), "cannot be read as safetensors"),
    "nothing": (lambda path: path.write_bytes(b""), "cannot be read as safetensors"),
    "another model": (
        file_of({"unet.conv_in.weight": torch.zeros(3)}),
        r"no VAE of a covered class \(AutoencoderKL, .*\): none of its 1 tensors",
    ),
    "Wan 2.2's original keys": (
        file_of({"encoder.downsamples.0.downsamples.0.residual.2.weight": torch.zeros(3)}),
        r"Wan 2.2's VAE under its original keys.*Wan2.2-TI2V-5B-Diffusers",
    ),
    "an encoder alone": (
        file_of({key: value for key, value in STATE.items() if key.startswith("encoder.")}),
        "only a part of a VAE: 'decoder.conv_in.weight' is missing",
    ),
    "an LDM encoder alone": (
        file_of({key: value for key, value in ldm(STATE).items() if key.startswith("encoder.")}),
        "only a part of a VAE: 'decoder.conv_in.weight' is missing",
    ),
    "a tensor missing": (
        file_of({key: value for key, value in STATE.items() if key != "encoder.conv_norm_out.bias"}),
        r"1 of \d+ tensors differ, the first is 'encoder.conv_norm_out.bias': expected \[128\], found none",
    ),
    "an LDM tensor missing": (
        file_of({key: value for key, value in ldm(STATE).items() if key != "encoder.norm_out.bias"}),
        "'encoder.conv_norm_out.bias': expected",
    ),
    "a tensor too many": (
        file_of(STATE | {"decoder.extra": torch.zeros(2)}),
        r"1 of \d+ tensors differ, the first is 'decoder.extra': expected none, found \[2\]",
    ),
    "an LDM tensor too many": (
        file_of(ldm(STATE) | {"decoder.extra": torch.zeros(2)}),
        r"diffusers can convert only (\d+) of its \d+ tensors",
    ),
    "another shape": (
        file_of(STATE | {"quant_conv.bias": torch.zeros(3)}),
        r"'quant_conv.bias': expected \[8\], found \[3\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_vae_is_refused_by_name_and_reason(kind, tmp_path):
    write, reason = BAD_FILES[kind]
    write(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=reason) as caught:
        load_single_file(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(caught.value)


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    with pytest.raises(
        ValueError, match=r"a.ckpt is not a .safetensors file; pickled weights are not loaded"
    ):
        load_single_file(tmp_path / "a.ckpt")


def test_a_broken_config_beside_the_file_is_named(models, tmp_path):
    save_file(models["quant convs"].state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not a valid JSON file"):
        load_single_file(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_chanels": 4}))
    with pytest.raises(
        ValueError, match=r"config.json: AutoencoderKL has no configuration key 'latent_chanels'"
    ):
        load_single_file(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 8}))
    with pytest.raises(ValueError, match=r"a.safetensors does not fit its configuration: \d+ of \d+ tensors"):
        load_single_file(tmp_path / "a.safetensors")
