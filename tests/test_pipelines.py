"""A codec inside diffusers' pipelines: it runs there, is saved, and is loaded by people who do not have this package.

Six pipelines are put together from tiny random parts, run, saved, and run again from their folders by one fresh
process in which `latentcodec` cannot be imported. What pipelines and users do to a VAE beside that (tiling, casting,
checkpointing, adapters, compilation, attention processors, offloading) is tried on the VAE itself.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentcodec import LatentCodec
from latentcodec.adopt import build, optimize_vae
from latentcodec.engine.plan import STRIP_BYTES, Engine

SIZE = 32  # pixels
CELLS = SIZE // 8
TEXT = 16  # width of the text embeddings

WITHOUT_LATENTCODEC = """
import json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "latentcodec":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
try:
    import latentcodec
except ImportError as error:
    assert str(error) == "blocked: latentcodec"
else:
    raise SystemExit("latentcodec can be imported")

import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    index = json.loads((folder / "pipe" / "model_index.json").read_text())
    absent = {part: None for part, origin in index.items() if origin == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder / "pipe", **absent)
    pipe.set_progress_bar_config(disable=True)
    # Weights mapped from a file begin at any address, and matrix kernels round differently off a 64-byte boundary.
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    inputs = torch.load(folder / "inputs.pt")
    image = pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.save(folder / "there.npy", image)
    classes = [type(pipe).__name__, type(pipe.vae).__name__, type(pipe.vae.encoder).__module__]
    (folder / "classes.json").write_text(json.dumps(classes))
assert "latentcodec" not in sys.modules
"""

ROUNDING = 3e-5  # of Winograd's convolutions, in a picture from 0 to 1, after the denoiser as well


# ---- the parts ----


def tiny_vae(**others: Any) -> AutoencoderKL:
    """An f8 VAE of the kind that the public pipelines use, with random weights that give a lively picture."""
    config = dict(
        block_out_channels=[8, 8, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE // 2,  # so that diffusers would tile these images
    )
    vae = build(config | others).eval()
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(4)
    return vae


STABLE_DIFFUSION = dict(latent_channels=4, scaling_factor=0.18215)
SDXL = dict(latent_channels=4, scaling_factor=0.13025)
SD3 = dict(
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
FLUX = SD3 | dict(scaling_factor=0.3611, shift_factor=0.1159)


def tiny_unet(**others: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=CELLS,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        **others,
    )


def tiny_text(folder: Path) -> dict[str, Any]:
    """A tokenizer of single letters and a text encoder, made on the spot."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    return dict(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())


def stable_diffusion_parts(folder: Path) -> dict[str, Any]:
    return dict(
        **tiny_text(folder),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_parts(_: Path) -> dict[str, Any]:
    unet = tiny_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + TEXT,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    texts = dict.fromkeys(["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"])
    return dict(
        unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), add_watermarker=False, **texts
    )


def sd3_parts(_: Path) -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=CELLS,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=8,
    )
    texts = dict.fromkeys([f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in TEXTS])
    return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


TEXTS = ("", "_2", "_3")


def flux_parts(_: Path) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,  # 16 channels of 2 x 2 latent cells
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
    )
    texts = dict.fromkeys(
        [f"{part}{number}" for part in ("tokenizer", "text_encoder") for number in TEXTS[:2]]
    )
    return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


# ---- the pipelines ----


def text_embeddings(negative: bool, pooled: bool) -> dict[str, torch.Tensor]:
    shapes = {"prompt_embeds": (1, 4, TEXT)}
    if pooled:
        shapes["pooled_prompt_embeds"] = (1, TEXT)
    if negative:
        shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def picture() -> torch.Tensor:
    return torch.rand(1, 3, SIZE, SIZE)


@dataclass
class Case:
    """A pipeline, the VAE it needs, its other parts and what it is called with."""

    pipeline: type[DiffusionPipeline]
    vae: dict[str, Any]
    parts: Callable[[Path], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]
    plug_in: bool = field(default=False)
    """Whether the codec replaces the VAE of a finished pipeline, instead of being handed to a new one."""


SIZES = dict(height=SIZE, width=SIZE, num_inference_steps=2)
CASES = {
    "text2img": Case(
        StableDiffusionPipeline,
        STABLE_DIFFUSION,
        stable_diffusion_parts,
        lambda: dict(prompt="a cat", **SIZES),
    ),
    "sdxl": Case(
        StableDiffusionXLPipeline,
        SDXL,
        sdxl_parts,
        lambda: text_embeddings(negative=True, pooled=True) | SIZES,
        plug_in=True,
    ),
    "sd3": Case(
        StableDiffusion3Pipeline,
        SD3,
        sd3_parts,
        lambda: text_embeddings(negative=True, pooled=True) | SIZES,
    ),
    "flux": Case(
        FluxPipeline,
        FLUX,
        flux_parts,
        lambda: text_embeddings(negative=False, pooled=True) | SIZES,
        plug_in=True,
    ),
    "img2img": Case(
        StableDiffusionImg2ImgPipeline,
        STABLE_DIFFUSION,
        stable_diffusion_parts,
        lambda: dict(prompt="a dog", image=picture(), strength=0.9, num_inference_steps=2),
        plug_in=True,
    ),
    "inpaint": Case(
        StableDiffusionInpaintPipeline,
        STABLE_DIFFUSION,
        stable_diffusion_parts,
        lambda: dict(prompt="a fish", image=picture(), mask_image=picture()[:, :1].round(), **SIZES),
    ),
}


def pipeline(case: Case, folder: Path) -> DiffusionPipeline:
    """The pipeline of a case, running on a codec of ours."""
    parts = case.parts(folder)
    codec = LatentCodec(tiny_vae(**case.vae))
    if case.plug_in:
        pipe = codec.plug_into(case.pipeline(vae=AutoencoderKL(**tiny_vae(**case.vae).config), **parts))
    else:
        pipe = case.pipeline(vae=codec.vae, **parts)
    assert pipe.vae is codec.vae
    assert type(pipe.vae.encoder).__module__ == "latentcodec.engine.networks"
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, inputs: dict[str, Any]) -> np.ndarray:
    """[1, H, W, 3] float32 in [0, 1]: what the pipeline makes of its inputs and a fixed seed."""
    return pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case run here, saved, and run again by a fresh process without latentcodec."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("pipelines")
    for name, case in CASES.items():
        (root / name).mkdir()
        pipe, inputs = pipeline(case, root / name), case.inputs()
        np.save(root / name / "strips.npy", draw(pipe, inputs))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "applies", lambda self, network, x: False)
            np.save(root / name / "modules.npy", draw(pipe, inputs))
        torch.save(inputs, root / name / "inputs.pt")
        pipe.save_pretrained(root / name / "pipe")
    command = [sys.executable, "-c", WITHOUT_LATENTCODEC, *(str(root / name) for name in CASES)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: root / name for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_saved_pipeline_draws_the_same_image_where_latentcodec_is_not_installed(name, folders):
    """Run as modules bit for bit, as floats; in strips to the rounding of sums, and to the bit in the 8-bit image."""
    pipeline_class, vae_class, encoder_module = json.loads((folders[name] / "classes.json").read_text())
    assert pipeline_class == CASES[name].pipeline.__name__
    assert vae_class == "AutoencoderKL"
    assert encoder_module.startswith("diffusers.")
    strips, modules, there = (np.load(folders[name] / f"{run}.npy") for run in ("strips", "modules", "there"))
    assert there.shape == (1, SIZE, SIZE, 3)
    assert there.std() > 0.02  # a picture, not a flat colour that any decoder would draw
    assert np.array_equal(modules, there)
    assert np.abs(strips - there).max() < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_saved_pipeline_names_no_class_of_ours(name, folders):
    index = json.loads((folders[name] / "pipe" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    text = "".join(path.read_text() for path in (folders[name] / "pipe").rglob("*.json"))
    assert "latentcodec" not in text


@pytest.mark.parametrize("name", ["text2img", "inpaint"])
def test_tiling_and_slicing_of_a_pipeline_stay_exact(name, tmp_path):
    pipe, inputs = pipeline(CASES[name], tmp_path), CASES[name].inputs() | {"num_images_per_prompt": 2}
    expected = draw(pipe, inputs)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    assert np.abs(draw(pipe, inputs) - expected).max() < 1e-5
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert np.array_equal(draw(pipe, inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_an_optimized_pipeline_draws_the_same_image_in_the_thinnest_strips(name, tmp_path, monkeypatch):
    pipe, inputs = pipeline(CASES[name], tmp_path), CASES[name].inputs()
    expected = draw(pipe, inputs)
    optimize_vae(pipe.vae)
    monkeypatch.setitem(STRIP_BYTES, "cpu", 1)
    assert np.abs(draw(pipe, inputs) - expected).max() < ROUNDING


# ---- plugging in ----


def test_plugging_in_says_what_does_not_fit(tmp_path):
    pipe = pipeline(CASES["text2img"], tmp_path)
    vae = pipe.vae
    with pytest.raises(ValueError, match="16 latent channels, the pipeline's VAE has 4"):
        LatentCodec(tiny_vae(**FLUX)).plug_into(pipe)
    f4 = dict(block_out_channels=[8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 3)
    with pytest.raises(ValueError, match="4 pixels a latent cell, the pipeline's VAE has 8"):
        LatentCodec(tiny_vae(**f4, up_block_types=["UpDecoderBlock2D"] * 3)).plug_into(pipe)
    assert pipe.vae is vae
    pipe.vae = torch.nn.Identity()
    pipe.vae.config = {"z_dim": 16}
    with pytest.raises(ValueError, match="StableDiffusionPipeline works on the latents of Identity"):
        LatentCodec(tiny_vae()).plug_into(pipe)
    pipe.vae = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no component 'vae'"):
        LatentCodec(tiny_vae()).plug_into(pipe)


def test_plugging_in_replaces_a_tiny_autoencoder_and_takes_over_its_dtype(tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    pipe = StableDiffusionPipeline(vae=tiny.to(torch.bfloat16), **stable_diffusion_parts(tmp_path))
    codec = LatentCodec(tiny_vae())
    assert codec.plug_into(pipe) is pipe
    assert pipe.vae is codec.vae
    assert codec.dtype == torch.bfloat16


def test_plugging_into_an_offloaded_pipeline_is_refused(tmp_path):
    """The hooks that fetch weights sit in the old VAE; taking its place would leave the new one without."""
    pipe = pipeline(CASES["text2img"], tmp_path)
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="plug in first, then offload"):
        LatentCodec(tiny_vae()).plug_into(pipe)


# ---- what users do to a VAE ----


def reconstruction(vae: AutoencoderKL) -> torch.Tensor:
    x = torch.linspace(-1, 1, 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE).to(vae.device, vae.dtype)
    with torch.no_grad():
        return vae(x).sample


def stock(vae: AutoencoderKL) -> AutoencoderKL:
    """The same weights in diffusers' own encoder and decoder."""
    twin = AutoencoderKL.from_config(vae.config).eval()
    twin.load_state_dict(vae.state_dict())
    return twin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_diffusers(dtype):
    vae = tiny_vae()
    exact, theirs = reconstruction(vae), reconstruction(stock(vae).to(dtype))
    ours = reconstruction(vae.to(dtype))
    assert ours.dtype == dtype
    assert (ours.float() - exact).abs().mean() <= 1.01 * (theirs.float() - exact).abs().mean() + 1e-6


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the range: one was run in strips, the other as modules."""
    assert (actual - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def test_gradient_checkpointing_gives_the_same_gradients():
    vae = tiny_vae().train()
    x = torch.rand(2, 3, SIZE, SIZE)
    gradients = []
    for switch in (vae.disable_gradient_checkpointing, vae.enable_gradient_checkpointing):
        switch()
        vae.zero_grad()
        vae(x).sample.square().sum().backward()
        gradients.append([copy.copy(p.grad) for p in vae.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 100
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))


def test_an_adapter_changes_the_output_and_fits_the_stock_class(tmp_path):
    vae = tiny_vae()
    before, twin = reconstruction(vae), stock(vae)
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q", "to_out.0"], init_lora_weights=False))
    adapted = reconstruction(vae)
    change = (adapted - before).abs().max()
    assert change > 0.1
    vae.save_lora_adapter(tmp_path)
    twin.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert (reconstruction(twin) - adapted).abs().max() < 1e-3 * change
    vae.disable_adapters()
    assert_close(reconstruction(vae), before)


def test_only_the_adapter_learns():
    vae = tiny_vae()
    vae.requires_grad_(False)
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv2", "to_v"]))
    vae(torch.rand(1, 3, SIZE, SIZE)).sample.square().sum().backward()
    learning = {name for name, parameter in vae.named_parameters() if parameter.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)


@pytest.mark.slow
def test_a_compiled_decoder_gives_the_same_numbers():
    """Traced by dynamo in one graph, run eagerly: the modules, of which no operation stops `torch.compile`."""
    vae = tiny_vae()
    expected = reconstruction(vae)
    vae.decoder = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    assert_close(reconstruction(vae), expected)


def test_attention_processors_are_listed_as_diffusers_lists_them():
    """Our attention is already one fused call: the switches of diffusers stay callable and change nothing."""
    vae = tiny_vae()
    expected = reconstruction(vae)
    stock = AutoencoderKL.from_config(vae.config).attn_processors
    assert {name: type(p) for name, p in vae.attn_processors.items()} == {
        n: type(p) for n, p in stock.items()
    }
    assert stock
    for switch in (vae.set_default_attn_processor, vae.fuse_qkv_projections, vae.unfuse_qkv_projections):
        switch()
        assert torch.equal(reconstruction(vae), expected)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same_numbers(kind):
    vae = tiny_vae()
    expected = reconstruction(vae)
    blocks = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
    vae.enable_group_offload(torch.device("cpu"), offload_type=kind, **blocks)
    assert_close(reconstruction(vae), expected)


def test_weights_offloaded_to_the_disk_give_the_same_numbers(tmp_path):
    vae = tiny_vae()
    expected = reconstruction(vae)
    accelerate.disk_offload(vae, tmp_path, execution_device=torch.device("cpu"))
    assert vae.decoder.conv_in.weight.device.type == "meta"
    x = torch.linspace(-1, 1, 2 * 3 * SIZE * SIZE).reshape(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert_close(vae(x).sample, expected)


def test_model_cpu_offload_gives_the_same_image(tmp_path):
    if not torch.accelerator.is_available():
        pytest.skip("diffusers offloads from an accelerator to the CPU, and this machine has no accelerator")
    pipe, inputs = pipeline(CASES["text2img"], tmp_path), CASES["text2img"].inputs()
    expected = draw(pipe, inputs)
    pipe.enable_model_cpu_offload()
    assert np.abs(draw(pipe, inputs) - expected).max() < 1e-2
