"""The whole configuration of a run, and how it is read: defaults, then the YAML file, then the command line.

Each section is a dataclass beside the code it configures; this file only puts them together. An unknown key or a
value of the wrong type ends the program with its name before any data or model is touched.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from latentcodec.model_folder import check_numbers
from latentcodec.training.data.config import DataConfig
from latentcodec.training.export.codec_folder import FinishConfig
from latentcodec.training.losses.discriminator import DiscriminatorConfig
from latentcodec.training.losses.regularizers import RegularizerConfig
from latentcodec.training.losses.terms import LossConfig
from latentcodec.training.optim.schedule import TrainConfig
from latentcodec.training.refusals import refusal, require_known
from latentcodec.training.start.adapt import AdaptConfig
from latentcodec.training.start.model import ModelConfig
from latentcodec.training.yaml_file import read_settings


@dataclass
class Config:
    """A training run."""

    output_dir: str
    """Folder of the run: codec/, metrics.jsonl, samples/, checkpoints/, config.yaml. The same command resumes it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    finish: FinishConfig = field(default_factory=FinishConfig)

    def __post_init__(self) -> None:
        _require_values(Config, self)
        for key, value in settings_of(self):
            _require_sound(key, value)
        check_numbers(asdict(self.model), "model")
        self.output_dir = _expanded("output_dir", self.output_dir)
        places = (
            "data.path",
            "data.val_path",
            "model.from_pretrained",
            "model.teacher",
            "loss.lpips_weights",
        )
        for key in places:
            if (place := attrgetter(key)(self)) is not None:
                _expanded(key, place)  # the home of nobody is refused here
        if self.finish.normalise is not None and self.model.must_keep_latents:
            raise ValueError(
                f"finish.normalise {self.finish.normalise} would change the numbers that a codec with "
                "model.teacher, or whose model.part is decoder, keeps; leave it out"
            )
        model, share = self.model, self.finish.parent_share
        if share and (model.from_pretrained is None or model.adapt != AdaptConfig()):
            raise ValueError(
                f"finish.parent_share {share} needs a model.from_pretrained of the same shape, without model.adapt"
            )
        if self.loss.has_pixel_scale and self.regularizer.scale_equivariance_weight:
            raise ValueError(
                "loss.scale per_pixel has no scale for the half-size images of regularizer.scale_equivariance_weight"
            )
        if self.regularizer.generations_share and self.discriminator.weight:
            raise ValueError(
                "discriminator.weight would take pictures of regularizer.generations_share for real ones, and the "
                "codec made them; train the two one after the other"
            )
        if self.model.part == "encoder" and self.discriminator.weight and self.discriminator.adaptive:
            raise ValueError(
                "discriminator.adaptive compares gradients in the decoder, which model.part encoder does not train; "
                "switch it off"
            )

    @property
    def normalise(self) -> str | None:
        """How the latents of the saved codec are normalised; None where it keeps the numbers that it has."""
        return self.finish.normalise or (None if self.model.keeps_latents else "per_channel")

    @property
    def notes(self) -> list[str]:
        """What a user may not expect of these settings, though a run can have them."""
        start, steps = self.discriminator.start_step, self.train.max_steps
        if self.discriminator.weight and start >= steps:
            does_nothing = "discriminator.weight does nothing in this run"
            return [f"{does_nothing}: discriminator.start_step is {start}, train.max_steps {steps}"]
        return []


def _expanded(key: str, path: str) -> str:
    """A path that may begin with ~, the home folder."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{key} {path}: {error}") from error


def _require_values(section: type, settings: Any, prefix: str = "") -> None:
    """Refuse `null` for a setting that must have a value: the library lets it pass where the default is a text."""
    for name, kind in get_type_hints(section).items():
        value = getattr(settings, name)
        if is_dataclass(kind) and isinstance(kind, type):
            _require_values(kind, value, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(kind):
            raise ValueError(f"{prefix}{name} cannot be null; leave it out for its default")


def _types(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The type of every setting with its key, such as ("train.lr", PositiveFloat)."""
    for name, kind in get_type_hints(section).items():
        if is_dataclass(kind) and isinstance(kind, type):
            yield from _types(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its key, such as "train.lr"; those of a list one by one."""
    for entry in fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.")
        elif isinstance(value, list | tuple):
            yield from ((key, item) for item in value)
        else:
            yield key, value


def _require_sound(key: str, value: Any) -> None:
    """Refuse what no setting can be: numbers that are not finite or have no place in 64 bits, texts that are empty."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} must be finite, not {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{key} must be below 2^63, not a number of {len(str(value))} digits")
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError(f"{key} must not be empty, or hold a zero byte; leave it out for its default")


class ConfigFile(ActionConfigFile):
    """A YAML file of keys. What keeps it from being read is said with its name, which the library leaves out."""

    def __call__(self, parser: Any, settings: Any, path: Any, option: Any = None) -> None:
        try:
            settings_file = read_settings(Path(path).expanduser())
            require_known(settings_file, dict(_types(Config)))
            super().__call__(parser, settings, json.dumps(settings_file), option)
        except OSError as error:
            raise ValueError(f"--config {path}: {error.strerror}") from error
        except ArgumentError as error:  # of a key or a value
            raise ValueError(f"--config {path}: {refusal(str(error), dict(_types(Config)))}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config {path}: {error}") from error


def parse(arguments: Sequence[str] | None = None, program: str = "train/train.py") -> Config:
    """The configuration of a command line such as `--config photos.yaml --output_dir runs/a --train.lr 1e-3`.

    Where a key is unknown, has a wrong value or contradicts another, ends the program with code 2 and one line that
    names it.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True
    )  # the strings under the fields, for --help
    parser = ArgumentParser(
        prog=program, description="Train a latent codec.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the keys below.")
    parser.add_class_arguments(Config)
    try:
        settings: Namespace = parser.parse_args(arguments)
        settings.pop("config")
        _require_sections(settings, parser.get_defaults())
        _require_values(Config, settings)  # before the sections compute with them
        config: Config = _plain(Config(**parser.instantiate(settings)))
        return config
    except (ArgumentError, ValueError) as error:
        print(f"error: {refusal(str(error), dict(_types(Config)))}", file=sys.stderr)
        sys.exit(2)


def _plain(value: Any) -> Any:
    """With plain numbers in place of those of the range types, which have done their work and are no plain YAML."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _plain(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    kinds = [kind for kind in (bool, int, float) if isinstance(value, kind)]
    return kinds[0](value) if kinds else value


def _require_sections(settings: Namespace, defaults: Namespace) -> None:
    """Refuse a section without keys, as one is whose lines are all commented out: the library lets it pass."""
    for key, value in defaults.items(branches=True):  # a section before what is in it
        if isinstance(value, Namespace) and not isinstance(settings[key], Namespace):
            raise ValueError(
                f"{key} is a section: it needs keys of its own, or must be left out, and cannot be {settings[key]!r}"
            )
