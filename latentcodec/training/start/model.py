"""The model that is trained: an AutoencoderKL, new or fine-tuned, and the one forward pass of training around it.

What a change of channels does to pretrained weights is in `adapt.py`, what a teacher is for in `losses/teacher.py`.

Shapes: B batch, C image channels, c latent channels, H W pixels, h w latent cells, f downsampling factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from latentcodec.adopt import build
from latentcodec.codec import LatentCodec
from latentcodec.latents import decode_raw, posterior_parameters
from latentcodec.training.losses.sample import ForwardPass
from latentcodec.training.losses.teacher import Teacher
from latentcodec.training.progress import phase
from latentcodec.training.start.adapt import AdaptConfig, change_image_channels, change_latent_channels
from latentcodec.training.start.architecture import architecture
from latentcodec.training.start.linear import linear_start, zero_residuals
from latentcodec.training.start.pixel_scale import Features, PixelScale
from latentcodec.vae.families import KL, family_of
from latentcodec.vae.padding import PADDING_KEY
from latentcodec.vae.posterior import mean_and_logvar, sample_posterior


@dataclass
class ModelConfig:
    """The architecture, in AutoencoderKL's terms, and where its weights start."""

    image_channels: PositiveInt = 3
    """Channels of the images, in and out: 1 grey, 3 RGB, 4 RGB with alpha."""
    latent_channels: PositiveInt = 16
    """Channels of the latents."""
    block_out_channels: list[PositiveInt] = field(default_factory=lambda: [32, 64, 96, 128])
    """Width of each stage, from the image's resolution down; each stage after the first halves the resolution."""
    layers_per_block: PositiveInt = 1
    """Residual blocks of each stage of the encoder; the decoder has one more."""
    norm_num_groups: PositiveInt = 8
    """Groups of every group norm; divides every width. The linear start needs 2 ceil(S / groups) + 2 channels a
    group: in the first width for S image channels, in the last for S latent channels."""
    mid_block_add_attention: bool = False
    """Attention at the lowest resolution, as in Stable Diffusion's VAE."""
    use_quant_conv: bool = False
    """The 1x1 convolutions around the latent that Stable Diffusion 1 and 2 and SDXL have."""
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    """What convolutions see beyond the border of a map; zeros leave bright borders dark. No class of diffusers can hold
    another mode: the codec's config.json does, in latentcodec_padding_mode, and diffusers alone decodes it wrongly."""
    init: Literal["linear", "default"] = "linear"
    """Start as the linear codec fitted to the data (start/linear.py), or with torch's default weights and residual
    branches at zero."""
    from_pretrained: str | None = None
    """Fine-tune this codec instead: folder, hub id, .safetensors file or bundled name. Its architecture counts, the
    keys above do not."""
    subfolder: str | None = None
    """Subfolder of from_pretrained, such as vae."""
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    """Change the channels of from_pretrained."""
    part: Literal["all", "decoder", "encoder"] = "all"
    """What is trained. With decoder, the latents of from_pretrained stay exactly as they are, and so do the numbers
    that normalise them."""
    teacher: str | None = None
    """Train into the latent space of this codec: folder, hub id, .safetensors file or bundled name. For a new model
    that is distillation; with from_pretrained, whose name may be given here too, the latents are anchored."""
    teacher_subfolder: str | None = None
    """Subfolder of teacher, such as vae."""
    teacher_weight: NonNegativeFloat = 1.0
    """Factor of the anchor: the mean squared distance of the latents from the teacher's, in units of their
    deviation, beside the likelihood in nats per pixel-channel. 1 distils, 0.01 to 0.1 holds gently."""
    teacher_latents: bool = False
    """Train the decoder on the teacher's latents instead of the student's own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time for a fraction of the memory."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for keys that contradict each other."""
        if not self.block_out_channels:
            raise ValueError("model.block_out_channels needs a width for each stage, and has none")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"model.block_out_channels: {width} is not divisible by model.norm_num_groups "
                    f"{self.norm_num_groups}"
                )
        if self.adapt != AdaptConfig() and self.from_pretrained is None:
            raise ValueError("model.adapt changes a pretrained codec; give model.from_pretrained")
        if self.part == "decoder" and self.adapt.latent_channels is not None:
            raise ValueError("model.part decoder keeps the latents, model.adapt.latent_channels changes them")
        if self.part == "decoder" and self.teacher is not None:
            raise ValueError("model.part decoder trains no encoder that could follow model.teacher")

    @property
    def must_keep_latents(self) -> bool:
        """Whether the latents are those of another codec: a teacher's, or those of a parent's own encoder."""
        return self.teacher is not None or (self.part == "decoder" and self.from_pretrained is not None)

    @property
    def keeps_latents(self) -> bool:
        """Whether another codec's normalisation holds for this one too: a teacher's or, if it has as many latent
        channels and `finish.normalise` is left out, a parent's. Denoisers were made for those numbers."""
        return self.teacher is not None or (
            self.from_pretrained is not None and self.adapt.latent_channels is None
        )


def load_parent(config: ModelConfig) -> AutoencoderKL | None:
    """The codec to fine-tune, float32 on the CPU; None for a new one. Raises ValueError naming what is wrong."""
    if config.from_pretrained is None:
        return None
    vae = LatentCodec.from_pretrained(config.from_pretrained, config.subfolder).vae.float()
    family = family_of(vae)
    taken, given = family.image_channels(vae.config), family.output_channels(vae.config)
    if taken != given:
        raise ValueError(
            f"model.from_pretrained {config.from_pretrained} takes images of {taken} channels and "
            f"gives {given}: it cannot be trained to reconstruct"
        )
    return vae


def load_teacher(config: ModelConfig, device: torch.device, bfloat16: bool) -> Teacher | None:
    """The teacher that the configuration names, None without one. Raises ValueError where it cannot be loaded."""
    if config.teacher is None:
        return None
    codec = LatentCodec.from_pretrained(config.teacher, config.teacher_subfolder, device, torch.float32)
    return Teacher(codec, config.teacher_weight, config.teacher_latents, bfloat16)


def image_channels(config: ModelConfig, parent: AutoencoderKL | None) -> int:
    """C, of the images that will be trained on."""
    if parent is None:
        return config.image_channels
    return config.adapt.image_channels or family_of(parent).image_channels(parent.config)


def downsampling_factors(config: ModelConfig, parent: Any, teacher: Teacher | None) -> tuple[int, int]:
    """Pixels, along each side, per raw latent cell and per latent cell, of the model that is going to be trained."""
    if parent is not None:
        family, arguments = family_of(parent), parent.config
    elif teacher is not None:
        family = teacher.codec.family
        arguments = architecture(config, family, teacher.codec.vae.config)
    else:
        family, arguments = KL, architecture(config, KL, {})
    return family.raw_factor(arguments), family.downsampling_factor(arguments)


def new_vae(
    config: ModelConfig,
    parent: AutoencoderKL | None,
    teacher: Teacher | None,
    crops: Callable[[], Sequence[Tensor]],
) -> AutoencoderKL:
    """The VAE that training starts from, float32 on the CPU: `parent`, in place, or a new one of the teacher's class.

    `crops` gives training crops [C, H, W] of one size; it is called only where weights depend on them (the linear
    start, a change of latent channels). Raises ValueError naming the key that cannot be.
    """
    _require_possible(config, parent, teacher)
    vae = _new(config, teacher) if parent is None else _adapted(parent, config.adapt, crops)
    if teacher is not None:
        teacher.hand_over(vae)
    if parent is None:
        zero_residuals(vae)
    if parent is None and config.init == "linear":
        images = crops()
        with phase("fitting the linear start to them"):
            linear_start(vae, images, None if teacher is None else teacher.latents(images))
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    vae.encoder.requires_grad_(config.part != "decoder")
    vae.decoder.requires_grad_(config.part != "encoder")
    for conv, part in ((vae.quant_conv, "decoder"), (vae.post_quant_conv, "encoder")):
        if conv is not None:
            conv.requires_grad_(config.part != part)
    for name, parameter in vae.named_parameters():
        if "time_conv" in name:  # images do not pass it, and DDP waits for a gradient of every trained weight
            parameter.requires_grad_(False)
    return vae


def _new(config: ModelConfig, teacher: Teacher | None) -> Any:
    """A new model with torch's default weights."""
    family, of_teacher = (KL, {}) if teacher is None else (teacher.codec.family, teacher.codec.vae.config)
    arguments = architecture(config, family, of_teacher)
    if config.padding_mode != "zeros":
        arguments[PADDING_KEY] = config.padding_mode
    return build(arguments, family.name)


def _require_possible(config: ModelConfig, parent: Any, teacher: Teacher | None) -> None:
    """Raises ValueError for keys that the class of the model to be trained, or its parent, cannot follow."""
    if parent is not None:
        family = family_of(parent)
        if config.padding_mode not in ("zeros", parent.config.get(PADDING_KEY, "zeros")):
            raise ValueError(
                f"model.padding_mode {config.padding_mode}: the codec of model.from_pretrained keeps its own; leave "
                "the key out"
            )
    else:
        family = KL if teacher is None else teacher.codec.family
        if config.padding_mode != "zeros" and family.has_frames:
            raise ValueError(
                f"model.padding_mode {config.padding_mode}: {family.name} pads with zeros before its convolutions"
            )
        if config.init == "linear" and family.has_frames:
            raise ValueError(
                f"model.init linear needs group norms, and {family.name} has none: set model.init default"
            )
        if (
            teacher is not None and family.has_frames
        ):  # its numbers, one for each channel, go into the class at once
            raw = family.raw_channels(teacher.codec.vae.config)
            if raw != config.latent_channels:
                raise ValueError(f"model.latent_channels {config.latent_channels}: model.teacher has {raw}")
    if config.gradient_checkpointing and family.has_frames:
        raise ValueError(
            f"model.gradient_checkpointing: {family.name} cannot compute its layers a second time; set it to false"
        )


def _adapted(vae: Any, adapt: AdaptConfig, crops: Callable[[], Sequence[Tensor]]) -> Any:
    if adapt != AdaptConfig() and family_of(vae) != KL:
        raise ValueError(
            f"model.adapt changes an {KL.name}, and model.from_pretrained is a {type(vae).__name__}"
        )
    if adapt.image_channels is not None:
        change_image_channels(vae, adapt.image_channels)
    if adapt.latent_channels is not None:
        change_latent_channels(vae, adapt.latent_channels, crops)
    return vae


class TrainedCodec(nn.Module):
    """Encode, draw, decode in one forward: data parallelism synchronises only what runs inside `forward`.

    diffusers' own trainer calls `unwrap_model(vae).encode`, which skips the synchronisation, so that N processes
    train N different models.
    """

    def __init__(self, vae: AutoencoderKL, scale: float | str, learn_scale: bool) -> None:
        """`scale` of the likelihood, a number or "per_pixel"."""
        super().__init__()
        self.vae = vae
        self.pixel_scale = PixelScale(vae) if isinstance(scale, str) else None
        start = 1.0 if isinstance(scale, str) else scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)), requires_grad=learn_scale)

    def forward(self, x: Tensor, noise: Tensor, transform: Callable[[Tensor], Tensor]) -> ForwardPass:
        """x [B, C, H, W], noise [B, c, h, w] standard normal, transform: latent -> latent for the decoder."""
        mean, logvar = mean_and_logvar(posterior_parameters(self.vae, x))
        latent = sample_posterior(mean, logvar, noise)
        reconstruction, log_scale = self.decode(transform(latent))
        return ForwardPass(mean, logvar, latent, reconstruction, log_scale)

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Raw latents -> images [B, C, H, W] and the log-scale of their pixels, a scalar or [B, C, H, W]."""
        if self.pixel_scale is None:
            return decode_raw(self.vae, latent).float(), self.log_scale
        with Features(self.vae.decoder.conv_out) as features:
            reconstruction = decode_raw(self.vae, latent).float()
        assert features.last is not None
        return reconstruction, self.pixel_scale(features.last)
