"""Six of diffusers' pipelines put together from tiny random parts, with a codec of ours as their VAE."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentcodec import LatentCodec
from latentcodec.adopt import build

SIZE = 32  # pixels
CELLS = SIZE // 8
TEXT = 16  # width of the text embeddings
TEXTS = ("", "_2", "_3")
ROUNDING = 3e-5  # of Winograd's convolutions, in a picture from 0 to 1, after the denoiser as well


# ---- the parts


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


# ---- the pipelines


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
