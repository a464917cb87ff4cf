"""Latents are judged by pipelines: one stock pipeline for each distinct formula that diffusers has.

Each has a tiny denoiser and runs twice with the same seed, once to its latents and once to its picture: `codec.decode`
of the former is the latter, with numbers that are no defaults.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from einops import rearrange
from tiny_pipelines import (
    FLUX,
    SD3,
    SDXL,
    SIZE,
    SIZES,
    STABLE_DIFFUSION,
    TEXT,
    flux_parts,
    sd3_parts,
    sdxl_parts,
    stable_diffusion_parts,
    text_embeddings,
    tiny_vae,
)

sys.path.insert(0, str(Path(__file__).parent / "vae"))
from small_vaes import small_vae

from latentcodec import LatentCodec

PLAYGROUND = SDXL | dict(
    scaling_factor=0.5,
    latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
    latents_std=[8.4927, 5.9022, 6.5498, 5.2299],
)


def flux2_parts(_: Path) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    texts = dict.fromkeys(["text_encoder", "tokenizer"])
    return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


def qwen_parts(_: Path) -> dict[str, Any]:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,  # 4 channels of 2 x 2 latent cells
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )
    texts = dict.fromkeys(["text_encoder", "tokenizer"])
    return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


def wan_parts(_: Path) -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    texts = dict.fromkeys(["text_encoder", "tokenizer"])
    return dict(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **texts)


def words(pooled: bool = False, negative: bool = True) -> Callable[[], dict[str, Any]]:
    return lambda: text_embeddings(negative=negative, pooled=pooled) | SIZES


def qwen_words() -> dict[str, Any]:
    mask = dict(prompt_embeds_mask=torch.ones(1, 4, dtype=torch.int64))
    return dict(prompt_embeds=torch.randn(1, 4, TEXT)) | mask | SIZES


def as_map(cells: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A sequence of cells -> [B, c, h, w]."""
    return lambda z: rearrange(z, "b (h w) c -> b c h w", h=cells)


@dataclass
class Case:
    """A pipeline, its VAE and other parts, what it is called with, and how its latents become [B, c, h, w]."""

    pipeline: Any
    vae: Callable[[], Any]
    parts: Callable[[Path], dict[str, Any]]
    inputs: Callable[[], dict[str, Any]]
    latents: Callable[[torch.Tensor], torch.Tensor] = lambda z: z


CASES = {
    "stable diffusion": Case(
        StableDiffusionPipeline,
        lambda: tiny_vae(**STABLE_DIFFUSION),
        stable_diffusion_parts,
        lambda: dict(prompt="a cat", **SIZES),
    ),
    "sdxl": Case(StableDiffusionXLPipeline, lambda: tiny_vae(**SDXL), sdxl_parts, words(pooled=True)),
    "playground": Case(
        StableDiffusionXLPipeline, lambda: tiny_vae(**PLAYGROUND), sdxl_parts, words(pooled=True)
    ),
    "sd3": Case(StableDiffusion3Pipeline, lambda: tiny_vae(**SD3), sd3_parts, words(pooled=True)),
    "flux": Case(
        FluxPipeline,
        lambda: tiny_vae(**FLUX),
        flux_parts,
        words(pooled=True, negative=False),
        lambda z: FluxPipeline._unpack_latents(z, SIZE, SIZE, 8),
    ),
    "flux2": Case(
        Flux2Pipeline, lambda: small_vae("flux2"), flux2_parts, words(negative=False), as_map(SIZE // 16)
    ),
    "qwen": Case(
        QwenImagePipeline,
        lambda: small_vae("qwen"),
        qwen_parts,
        qwen_words,
        lambda z: QwenImagePipeline._unpack_latents(z, SIZE, SIZE, 8)[:, :, 0],
    ),
    "wan": Case(
        WanPipeline,
        lambda: small_vae("wan21"),
        wan_parts,
        lambda: words()() | dict(num_frames=1),
        lambda z: z[:, :, 0],
    ),
}


def made(name: str, folder: Path) -> tuple[Any, LatentCodec, dict[str, Any]]:
    case = CASES[name]
    codec = LatentCodec(case.vae())
    pipe = case.pipeline(vae=codec.vae, **case.parts(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe, codec, case.inputs()


def run(pipe: Any, inputs: dict[str, Any], kind: str) -> Any:
    result = pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type=kind)
    return result.frames if hasattr(result, "frames") else result.images


@pytest.mark.parametrize("name", CASES)
def test_the_codec_decodes_a_pipelines_latents_to_its_picture(name, tmp_path):
    pipe, codec, inputs = made(name, tmp_path)
    z = CASES[name].latents(run(pipe, inputs, "latent"))
    picture = np.asarray(run(pipe, inputs, "np")).reshape(SIZE, SIZE, 3)
    assert picture.std() > 0.02  # not a flat colour that any formula would give
    ours = (codec.decode(z) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - picture).max() <= 1e-5


def test_playgrounds_pictures_are_encoded_as_its_pipeline_encodes_them(tmp_path):
    codec = LatentCodec(tiny_vae(**PLAYGROUND))
    pipe = StableDiffusionXLImg2ImgPipeline(vae=codec.vae, **sdxl_parts(tmp_path))
    x = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    generator = torch.Generator().manual_seed(0)
    theirs = pipe.prepare_latents(
        x, torch.tensor([0]), 1, 1, torch.float32, torch.device("cpu"), generator, add_noise=False
    )
    ours = codec.encode(x, sample=True, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_flux2s_pictures_are_encoded_as_its_pipeline_encodes_them(tmp_path):
    pipe, codec, _ = made("flux2", tmp_path)
    x = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(codec.encode(x), pipe._encode_vae_image(x, None), atol=1e-5)


# ---- plugging in


def test_plugging_in_compares_what_pipelines_call(tmp_path):
    pipe, _, inputs = made("wan", tmp_path)
    expected = np.asarray(run(pipe, inputs, "np"))
    assert LatentCodec(small_vae("qwen")).plug_into(pipe) is pipe  # the same layers and numbers
    assert np.asarray(run(pipe, inputs, "np")).shape == expected.shape
    with pytest.raises(
        ValueError, match="calls its VAE as a AutoencoderKLQwenImage is called, and this codec's is a"
    ):
        LatentCodec(tiny_vae()).plug_into(pipe)
    with pytest.raises(ValueError, match="16 pixels a latent cell, the pipeline's VAE has 8"):
        LatentCodec(small_vae("wan22")).plug_into(pipe)
    flux2, _, _ = made("flux2", tmp_path)
    other = small_vae("flux2", latent_channels=8)
    with pytest.raises(ValueError, match="32 latent channels, the pipeline's VAE has 16"):
        LatentCodec(other).plug_into(flux2)
    assert LatentCodec(small_vae("flux2-small-decoder")).plug_into(flux2) is flux2
