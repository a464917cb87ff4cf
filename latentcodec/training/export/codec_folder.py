"""The finish of a run: the trained weights become a codec folder that any pipeline can use.

Latents of zero mean and unit variance (`latents.py`), `force_upcast` by the half-precision certificate
(`quality/precision.py`), a model card, and a folder that is replaced whole. Nothing here changes what is decoded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers import AutoencoderKL
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.files import make_durable, move_folder, write_whole
from latentcodec.latents import LatentStatistics, by_one_scale, fold, per_channel, whitening
from latentcodec.loading import CONFIG
from latentcodec.quality.precision import certify
from latentcodec.training.progress import phase


@dataclass
class FinishConfig:
    """What is done to the saved codec, beside measuring its latents."""

    normalise: Literal["whitened", "per_channel", "one_scale"] | None = None
    """How the latents get zero mean and unit variance, folded into quant_conv and post_quant_conv so that every
    pipeline sees it. whitened: uncorrelated, and ordered by the pixels they explain; per_channel: each by itself;
    one_scale: one shift and one scale for all. Left out, a new codec is normalised per_channel, and one of
    model.from_pretrained or model.teacher keeps the numbers it has. A fine-tuned encoder may be normalised anew, which
    makes another latent space: denoisers of the old one do not fit it."""
    parent_share: ClosedUnitInterval = 0.0
    """Share of the weights of model.from_pretrained in the codec that is scored and saved; the rest are those that were
    trained (Wortsman et al. 2022, "Robust fine-tuning"). It evens out what a short run learns by chance."""
    certificate_images: NonNegativeInt = 4
    """Training crops on which a complete run measures its half-precision certificate (with six extreme images): whether
    the VAE stays finite and exact in float16, which its config then states as force_upcast. 0: not measured, and
    force_upcast stays on."""


def finish(
    vae: AutoencoderKL, normalise: str | None, statistics: LatentStatistics | None, crops: Sequence[Tensor]
) -> str:
    """Make `vae`, float32, fit for pipelines, in place; returns the model card's account of it.

    `normalise`: how its latents are normalised by their `statistics`; both None where the latents, and so the
    numbers in its config, are those of a parent or teacher. `crops` [C, H, W] in [-1, 1] for the certificate; without
    any, it is not measured.
    """
    sections = []
    if normalise is not None:
        assert statistics is not None
        change, account = NORMALISATIONS[normalise]
        fold(vae, change(statistics))
        sections.append(f"## Latents\n\n{account} {FOLDED}")
    upcasts = "force_upcast" in vae.config  # which only AutoencoderKL's pipelines look at
    if upcasts:
        vae.register_to_config(force_upcast=True)
    if crops:
        with phase("trying the codec in half precision"):
            certificate = certify(vae, crops)
        if upcasts:
            vae.register_to_config(force_upcast=not certificate.float16_is_safe)
        sections.append(certificate.card())
    return "\n\n".join(sections)


FOLDED = """The map is part of `quant_conv` and `post_quant_conv`, so no pipeline needs to scale or shift
(`scaling_factor` 1, `shift_factor` 0)."""
NORMALISATIONS = {
    "whitened": (
        whitening,
        "Whitened: over crops of the training pictures the latents have zero mean, unit variance and no correlation, "
        "and each channel explains fewer pixels than the one before. The spread of the posterior is that of each "
        "channel by itself, to first order.",
    ),
    "per_channel": (
        per_channel,
        "Over crops of the training pictures each channel of the latents has zero mean and unit variance.",
    ),
    "one_scale": (
        by_one_scale,
        "Over crops of the training pictures all channels of the latents together have zero mean and unit variance.",
    ),
}
"""By the values of `finish.normalise`: the map, and what the card says of it."""


def write_codec(codec: LatentCodec, folder: Path, card: str) -> None:
    """Replace `folder` whole by this codec, in two renames: a kill leaves the old one or the new one.

    After a kill between the two `recover_codec` brings the old one back. Raises OSError naming the folder if anything
    cannot be written; what was there is untouched then.
    """
    recover_codec(folder)
    new, old = _beside(folder)
    for litter in (new, old):
        shutil.rmtree(litter, ignore_errors=True)
    try:
        codec.save_pretrained(new, card)
        _forget_parent(new / CONFIG)
        if folder.exists():
            move_folder(folder, old, CONFIG)
        move_folder(new, folder, CONFIG)
        make_durable(folder.parent)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        recover_codec(folder)
        raise OSError(f"cannot write the codec to {folder}: {error}; what was there is untouched") from error
    shutil.rmtree(old, ignore_errors=True)


def _forget_parent(config: Path) -> None:
    """Without the path that a fine-tuned codec's parent was loaded from, which diffusers hands on: it is another model,
    and the path may be of this machine alone."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"  # diffusers' own layout
    write_whole(config, text.encode())


def recover_codec(folder: Path) -> None:
    """Bring back what `write_codec` was about to replace when it was killed between its renames.

    Linux could exchange two folders in one step, but Python has no name for that and network file systems refuse it.
    """
    _, old = _beside(folder)
    if old.exists() and not (folder / CONFIG).exists():
        shutil.rmtree(folder, ignore_errors=True)  # at most a part, where folders are filled file by file
        move_folder(old, folder, CONFIG)


def _beside(folder: Path) -> tuple[Path, Path]:
    """The hidden names under which the new codec is built and the old one is put aside."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
