"""The finish of a run: the trained weights become a codec folder that any pipeline can use.

Latents of zero mean and unit variance (`latents.py`), `force_upcast` as measured (`precision.py`), a model card, and
a folder that is replaced whole. The training itself is over here: nothing changes what the decoder puts out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from latentcodec.codec import LatentCodec
from latentcodec.files import make_durable
from latentcodec.latents import LatentStatistics, normalise, whiten, whitening
from latentcodec.loading import CONFIG
from latentcodec.quality.precision import certify
from latentcodec.training.progress import phase


@dataclass
class FinishConfig:
    """What is done to the saved codec, beside measuring its latents."""

    whiten: bool = False
    """Fold a whitening into quant_conv and post_quant_conv: latents of unit variance, uncorrelated, ordered by the
    pixels they explain, for every pipeline. Otherwise the statistics are numbers in the config, of which Stable
    Diffusion reads one scale, SD3 and FLUX one shift and one scale, and SDXL those of exactly four channels."""
    certificate_images: int = 4
    """Training crops for the half-precision certificate of a complete run (with six extreme images); 0: none, and
    force_upcast stays on, since nothing is known."""

    def __post_init__(self) -> None:
        if self.certificate_images < 0:
            raise ValueError(f"finish.certificate_images must not be negative, not {self.certificate_images}")


def finish(
    vae: AutoencoderKL, config: FinishConfig, statistics: LatentStatistics | None, crops: Sequence[Tensor]
) -> str:
    """Make `vae`, float32, fit for pipelines, in place; returns the model card's account of it.

    `statistics`: of its latents; None where the latents, and so the numbers in its config, are those of a parent or
    teacher. `crops` [C, H, W] in [-1, 1] for the certificate; without any, it is not measured.
    """
    sections = []
    if statistics is not None and config.whiten:
        whiten(vae, whitening(statistics))
        sections.append(WHITENED)
    elif statistics is not None:
        normalise(vae, statistics)
    vae.register_to_config(force_upcast=True)
    if crops:
        with phase("trying the codec in half precision"):
            certificate = certify(vae, crops)
        vae.register_to_config(force_upcast=not certificate.float16_is_safe)
        sections.append(certificate.card())
    return "\n\n".join(sections)


WHITENED = """## Latents

Whitened: over the training crops the latents have zero mean, unit variance and no correlation, and each channel
explains fewer pixels than the one before. The map is part of `quant_conv` and `post_quant_conv`, so no pipeline needs
to scale or shift. The spread of the posterior is that of each channel by itself, to first order."""


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
        for path in (*new.iterdir(), new):
            make_durable(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"cannot write the codec to {folder}: {error}; what was there is untouched") from error
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    make_durable(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _forget_parent(config: Path) -> None:
    """Without the path that a fine-tuned codec's parent was loaded from, which diffusers hands on: it is another model,
    and the path may be of this machine alone."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")  # diffusers' own layout


def recover_codec(folder: Path) -> None:
    """Bring back what `write_codec` was about to replace when it was killed between its renames.

    Linux could exchange two folders in one step, but Python has no name for that and network file systems refuse it.
    """
    _, old = _beside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    """The hidden names under which the new codec is built and the old one is put aside."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
