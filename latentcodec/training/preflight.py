"""What can be refused before anything heavy is loaded: the machine, the folder of the run, the size of the images.

Everything here raises a ValueError that names the key or the folder and says what to do. Settings that contradict
each other are refused even earlier, in `config.py`. Shapes: f downsampling factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, broadcast_object_list

from latentcodec.quality.perceptual import SMALLEST_SIDE
from latentcodec.training import checkpoint as checkpoints
from latentcodec.training.config import Config
from latentcodec.training.data.order import bucket_sizes
from latentcodec.training.environment import take_environment
from latentcodec.training.exchange import wait_for_others
from latentcodec.training.export.codec_folder import recover_codec
from latentcodec.training.lock import hold
from latentcodec.training.losses.regularizers import EQUIVARIANCE_SCALES
from latentcodec.training.losses.spectra import BLOCK
from latentcodec.training.losses.terms import LossConfig
from latentcodec.training.watchdog import OTHERS, collective_timeout, doing
from latentcodec.vae.families import KL, family_of

# Settings that a run is resumed with unchanged. Others would not fit its weights or its optimizer, or would be passed
# over in silence, since the weights of the checkpoint take the place of the start, or would leave the codec with the
# latents of one teacher and the numbers that normalise another's, or would make its scores untrue. Weights of losses,
# learning rates, batches and crops may change: `changed_settings` says which did.
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
    "model.padding_mode",
    # What is trained on and what is held out: else images that were trained on would be validated on.
    "data.path",
    "data.drawn",
    "data.subset",
    "data.split",
    "data.image_column",
    "data.streaming",
    "data.train_images",
    "data.val_path",
    "data.val_split",
    "data.val_images",
)
FIXED_WITH_DISCRIMINATOR = ("discriminator.channels", "discriminator.layers")


def new_processes(config: Config) -> tuple[PartialState, list[str]]:
    """The processes of the run, known to one another, and a line for each variable that is passed over."""
    lines = take_environment()
    # Without `cpu` each process under torchrun would believe to be alone.
    timeout = collective_timeout(config.train.patience_minutes)
    doing(OTHERS)
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timeout), lines


def new_accelerator(config: Config, precision: str) -> Accelerator:
    """The number format, "no", "bf16" or "fp16". Refuses what this machine, or two optimizers, cannot do."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=config.train.trackers,
        project_dir=config.output_dir,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1
        ),  # else the environment would be asked
    )
    found = {"all", *(tracker.value for tracker in accelerator.log_with)}
    if missing := [name for name in config.train.trackers or () if name not in found]:
        raise ValueError(
            f"train.trackers: {', '.join(missing)} is not installed; install it, or leave it out"
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
    values["loss.scale per_pixel"] = "on" if config.loss.has_pixel_scale else "off"
    return values | {"optimizer": "muon", "discriminator": "on" if config.discriminator.weight else "off"}


def changed_settings(saved: Mapping[str, Any], config: Config, step: int) -> list[str]:
    """A line for each setting that is not as it was in the configuration `saved` with the checkpoint of `step`."""
    before, now = dict(_flat(saved)), dict(_flat(asdict(config)))
    if before.get("finish.normalise") == "per_channel" and now["finish.normalise"] is None:
        del (
            before["finish.normalise"],
            now["finish.normalise"],
        )  # how it once was written that nothing was asked for
    moved_by, lines = _moved_by(config.loss), []
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) == now.get(key) or key in ("output_dir", "train.mixed_precision"):
            continue
        was, given = before.get(key, "not there"), now.get(key, "not there")
        if key in moved_by:
            lines.append(
                f"{key} was {was} and is {given} now, which changes nothing: with {moved_by[key]} it is only what a "
                "run starts from, and this one keeps the value that it has come to"
            )
        else:
            lines.append(f"{key} was {was} up to step {step} and is {given} from here on")
    return lines


def _moved_by(loss: LossConfig) -> dict[str, str]:
    """The settings that training itself moves from where they start, and the setting that says so."""
    moved = {"loss.scale": "loss.learn_scale"} if loss.learn_scale else {}
    for name in ("target_bits", "target_std"):
        if getattr(loss, name) is not None:
            moved["loss.kl_weight"] = f"loss.{name}"
    return moved


def require_normalisable(config: Config, parent: Any) -> list[str]:
    """The note for a fine-tuned codec whose latents will be normalised anew.

    Raises ValueError where the class of the parent keeps its numbers elsewhere than in convolutions.
    """
    if parent is None or config.finish.normalise is None:
        return []
    family = family_of(parent)
    if family != KL:
        raise ValueError(
            f"finish.normalise {config.finish.normalise} needs an {KL.name}, and model.from_pretrained is an "
            f"{family.name}"
        )
    return [
        f"finish.normalise {config.finish.normalise}: the latents are normalised anew, so a denoiser that was made for "
        f"{config.model.from_pretrained} will not fit them"
    ]


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def fetches(config: Config) -> bool:
    """Whether models or images come from the network, which may take hours without being at a standstill."""
    model, data = config.model, config.data
    places = (model.from_pretrained, model.teacher, data.path, data.val_path)
    return any(place is not None and not Path(place).expanduser().exists() for place in places)


def find_checkpoint(config: Config, processes: PartialState) -> checkpoints.Checkpoint | None:
    """The checkpoint in output_dir to go on from, None for a new run. Refuses the folder of another run."""
    output = Path(config.output_dir)
    doing("looking for checkpoints")
    if processes.is_main_process:
        checkpoints.make_folder(output / "checkpoints")
        hold(output)
        # Not before: what looks half built may be what another run is just saving.
        checkpoints.prepare(output / "checkpoints")
        recover_codec(output / "codec")
    wait_for_others(processes)
    saved = newest_checkpoint(output / "checkpoints", processes)
    if saved is not None:
        if "optimizer" not in saved.state:
            raise ValueError(
                f"the checkpoint {saved.path} was written by an earlier version, before Muon, and only that version "
                "resumes it; to train this configuration with this one, choose another output folder"
            )
        # A checkpoint of an earlier version named fewer of them; what that version did not have was as by default.
        default = fixed_settings(Config(output_dir=config.output_dir))
        settings = dict(_flat(saved.state.get("config", {})))
        known = replace(saved, state={**default, **settings, **saved.state})
        known.require_same({}, fixed_settings(config))
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
    doing(OTHERS)
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
    smallest = round(sides[0] // f * (min(EQUIVARIANCE_SCALES) if settings.low_resolution_probability else 1))
    if settings.spectrum_weight and smallest < 2:
        raise ValueError(
            f"regularizer.spectrum_weight: data.resolution {data.resolution} gives latents of one cell, which have no "
            "spectrum; raise it"
        )
    if loss.lpips_weight and cells * f < SMALLEST_SIDE[loss.lpips_net]:
        raise ValueError(
            f"loss.lpips_net {loss.lpips_net} needs images of {SMALLEST_SIDE[loss.lpips_net]} pixels a side, and "
            f"training shows it some of {cells * f}; raise data.resolution"
        )
    return cells * f
