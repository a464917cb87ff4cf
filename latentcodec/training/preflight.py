"""What can be refused before anything heavy is loaded: the machine, the folder of the run, the size of the images.

Everything here raises a ValueError that names the key or the folder and says what to do. Settings that contradict
each other are refused even earlier, in `config.py`. Shapes: f downsampling factor.
"""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import DynamoBackend, broadcast_object_list

from latentcodec.quality.metrics import SSIM_WINDOW
from latentcodec.quality.perceptual import SMALLEST_SIDE
from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.config import Config
from latentcodec.training.data.images import HeldOut
from latentcodec.training.data.order import bucket_sizes
from latentcodec.training.export.codec_folder import recover_codec
from latentcodec.training.lock import hold
from latentcodec.training.losses.regularizers import BLOCK, EQUIVARIANCE_SCALES

# Settings that a run is resumed with unchanged. Others would not fit its weights or its optimizer, or would be passed
# over in silence, since the weights of the checkpoint take the place of the start, or would leave the codec with the
# latents of one teacher and the numbers that normalise another's. Weights of losses, learning rates, data may change.
FIXED = (
    "train.seed",
    "loss.learn_scale",
    "model.init",
    "model.from_pretrained",
    "model.subfolder",
    "model.adapt.image_channels",
    "model.adapt.latent_channels",
    "model.teacher",
    "model.teacher_subfolder",
    "model.part",
    "model.image_channels",
    "model.latent_channels",
    "model.block_out_channels",
    "model.layers_per_block",
    "model.norm_num_groups",
    "model.mid_block_add_attention",
    "model.use_quant_conv",
)
FIXED_WITH_DISCRIMINATOR = ("discriminator.channels", "discriminator.layers")


def new_processes() -> PartialState:
    """The processes of the run, known to one another."""
    # Without `cpu` each process under torchrun would believe to be alone.
    return PartialState(cpu=not torch.accelerator.is_available())


def new_accelerator(config: Config, precision: str) -> Accelerator:
    """The number format, "no", "bf16" or "fp16". Refuses what this machine, or two optimizers, cannot do."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=config.train.trackers,
        project_dir=config.output_dir,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError("train.mixed_precision fp16 needs a GPU; take bf16 or no on this machine")
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{accelerator.distributed_type.value} cannot train the codec and its discriminator together; start with "
            "plain data parallelism (torchrun, or accelerate launch --multi_gpu)"
        )
    compiles = accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
    if compiles and config.discriminator.weight and config.discriminator.adaptive:
        raise ValueError(
            "discriminator.adaptive goes backward through the codec twice, which a compiled one cannot: start without "
            "--dynamo_backend, or set discriminator.adaptive false"
        )
    return accelerator


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that cannot change within a run, by key: part of every checkpoint's state."""
    keys = FIXED + (FIXED_WITH_DISCRIMINATOR if config.discriminator.weight else ())
    values = {key: attrgetter(key)(config) for key in keys}
    return values | {"optimizer": "muon", "discriminator": "on" if config.discriminator.weight else "off"}


def find_checkpoint(config: Config, processes: PartialState) -> checkpoints.Checkpoint | None:
    """The checkpoint in output_dir to go on from, None for a new run. Refuses the folder of another run."""
    output = Path(config.output_dir)
    if processes.is_main_process:
        checkpoints.prepare(output / "checkpoints")
        hold(output)
        recover_codec(output / "codec")
    processes.wait_for_everyone()
    saved = newest_checkpoint(output / "checkpoints", processes)
    if saved is not None:
        if "optimizer" not in saved.state:
            raise ValueError(
                f"the checkpoint {saved.path} was written by an earlier version, before Muon, and only that version "
                "resumes it; to train this configuration with this one, choose another output folder"
            )
        saved.require_same({}, fixed_settings(config))
        return saved
    for name in ("codec", "metrics.jsonl"):
        if (output / name).exists():
            raise ValueError(
                f"output_dir {output} has a {name} but no checkpoint to go on from; choose another folder, or take "
                "it away from there"
            )
    return None


def newest_checkpoint(folder: Path, processes: Accelerator | PartialState) -> checkpoints.Checkpoint | None:
    """The newest checkpoint that the main process can verify: all go on from that one.

    Raises CheckpointError where it has none that it can use, or where another process reads something else.
    """
    saved, choice = None, list[Any]([None])
    if processes.is_main_process:
        try:
            saved = checkpoints.newest(folder)
            choice = [None if saved is None else saved.path.name]
        except checkpoints.CheckpointError as error:
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], checkpoints.CheckpointError):
        raise choice[0]
    if processes.is_main_process or choice[0] is None:
        return saved
    try:
        return checkpoints.read(folder / choice[0])
    except checkpoints.DamagedCheckpoint as damage:
        raise checkpoints.CheckpointError(
            damage.errno,
            f"process {processes.process_index} cannot use the checkpoint that the main process goes on from: "
            f"{damage}. All processes must see the same output_dir.",
        ) from damage


def smallest_crop(config: Config, f: int) -> int:
    """The shortest side in pixels of anything that training decodes, for a codec of downsampling factor f.

    Refuses crops that are not made of whole latent cells, or of whole blocks where their spectra are masked, or are
    too small for LPIPS.
    """
    data, settings, loss = config.data, config.regularizer, config.loss
    sizes = bucket_sizes(data.resolution) if data.buckets else [(data.resolution, data.resolution)]
    sides = sorted({side for size in sizes for side in size})
    if torn := [side for side in sides if side % f]:
        raise ValueError(
            f"data.resolution {data.resolution} gives crops of {torn[0]} pixels, not a multiple of the codec's "
            f"downsampling factor {f}"
        )
    if settings.spectrum_masking:
        scales = (1.0, *EQUIVARIANCE_SCALES) if settings.low_resolution_probability else (1.0,)
        latents = {
            max(1, round(side // f * scale)) for side in sides for scale in scales
        }  # as `warp_image` rounds
        if torn := sorted(cells for cells in latents if cells % BLOCK):
            raise ValueError(
                f"regularizer.spectrum_masking works on {BLOCK} x {BLOCK} blocks, and data.resolution "
                f"{data.resolution} (with data.buckets {data.buckets}, regularizer.low_resolution_probability "
                f"{settings.low_resolution_probability:g}) gives latents of {torn[0]} cells a side"
            )
    cells = sides[0] // f
    if settings.equivariance_probability or settings.low_resolution_probability:
        cells = max(1, round(cells * min(EQUIVARIANCE_SCALES)))
    if loss.lpips_weight and cells * f < SMALLEST_SIDE[loss.lpips_net]:
        raise ValueError(
            f"loss.lpips_net {loss.lpips_net} needs images of {SMALLEST_SIDE[loss.lpips_net]} pixels a side, and "
            f"training shows it some of {cells * f}; raise data.resolution"
        )
    return cells * f


def check_held_out(images: HeldOut) -> None:
    """Refuses validation images on which a score cannot be computed."""
    for name, image in zip(images.names, images.images, strict=True):
        if min(image.shape[-2:]) < SSIM_WINDOW:
            raise ValueError(
                f"the validation image {name} has {image.shape[-2]} x {image.shape[-1]} pixels, and SSIM needs "
                f"{SSIM_WINDOW} a side; take it away, or give larger ones as data.val_path"
            )
