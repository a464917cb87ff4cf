"""Where a VAE lies: a folder, a pipeline's folder, a hub id, the name of a bundled codec, or one .safetensors file.

What the file itself does not say of its model is read off in `single_file.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers.utils import logging
from huggingface_hub.errors import LocalEntryNotFoundError

from latentcodec.finite import require_finite
from latentcodec.model_folder import CONFIG, check_folder, check_numbers, only_variant, variant_of
from latentcodec.single_file import load_single_file
from latentcodec.stock import CLASSES
from latentcodec.vae.families import KL, covered
from latentcodec.vae_config import check_config, class_named_in

BUNDLED = Path(__file__).parent / "weights"


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def bundled_names() -> list[str]:
    """The codecs that come with the package, by the name that `LatentCodec.from_pretrained` takes."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))


def load_vae(source: str, subfolder: str | None) -> Any:
    """The VAE of a covered class that lies at `source`, float32.

    Raises ValueError naming `source` and the reason, whatever is wrong.
    """
    try:
        vae = _found(source, subfolder)
        require_finite(vae.state_dict(), source)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source} holds no model that can be loaded: {said}") from error  # of hostile files
    return vae


def _found(source: str, subfolder: str | None) -> Any:
    path = Path(source).expanduser()
    try:
        path.exists()
    except OSError as error:  # a name that is too long
        raise ValueError(f"{source[:80]}...: {error.strerror}") from error
    if source in bundled_names():
        if any((path / (subfolder or "") / name).is_file() for name in (CONFIG, "model_index.json")):
            warnings.warn(
                f"the folder {path.resolve()} is loaded, not the bundled codec of its name", stacklevel=4
            )
        else:
            path = BUNDLED / source
    if path.is_file():
        if subfolder is not None:
            raise ValueError(f"{path} is one file: it has no subfolder {subfolder!r}")
        return load_single_file(path)
    if source and path.is_dir():
        is_pipeline = subfolder is None and (path / "model_index.json").is_file()
        return _from_folder(path / ("vae" if is_pipeline else subfolder or ""))
    if not HUB_ID.fullmatch(source):
        names = ", ".join(bundled_names()) or "none yet"
        raise ValueError(
            f"{source!r} is no file and no folder here, no hub id (owner/model) and no bundled codec ({names})"
        )
    return _from_hub(source, (None, "vae") if subfolder is None else (subfolder,))


def _from_folder(folder: Path) -> Any:
    if not (folder / CONFIG).is_file():
        inner = folder / "codec"  # as the folder of a run or of a store has one
        advice = f"; give {inner}" if (inner / CONFIG).is_file() else ""
        raise ValueError(f"{folder} is no folder of a VAE ({covered()}): it holds no {CONFIG}{advice}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no .safetensors weights; pickled .bin files are not loaded, they can run code"
        )
    check_folder(folder)
    return _from_diffusers(str(folder), None, variant_of(folder))


def _from_hub(name: str, subfolders: tuple[str | None, ...]) -> Any:
    """The VAE in the first of `subfolders` that has a configuration."""
    reason = ""
    unreachable = False  # then only the cache is asked: the hub would be tried for another half minute
    for subfolder in subfolders:
        try:
            CLASSES[KL.name].load_config(name, subfolder=subfolder, local_files_only=unreachable)
        except OSError as error:
            reason = reason or str(error.__context__ or error)  # diffusers' own words blame a missing file
            unreachable = isinstance(error.__context__, LocalEntryNotFoundError)
        else:
            return _with_the_weights_there_are(name, subfolder)
    raise ValueError(f"{name!r} is no file and no folder here, and cannot be fetched from the hub: {reason}")


def _with_the_weights_there_are(name: str, subfolder: str | None) -> Any:
    """From the hub, where only the weights of one variant may lie, such as fp16: its name is asked for then."""
    try:
        return _from_diffusers(name, subfolder)
    except ValueError:
        variant = only_variant(_names_on_hub(name, subfolder), f"{name}/{subfolder}" if subfolder else name)
        if variant is None:
            raise
    return _from_diffusers(name, subfolder, variant)


def _names_on_hub(name: str, subfolder: str | None) -> list[str]:
    """The files of a folder on the hub; of its cache here, where the hub cannot be asked."""
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception:  # the network's errors are of many types
        cached = huggingface_hub.try_to_load_from_cache(name, f"{prefix}{CONFIG}")
        return [file.name for file in Path(cached).parent.iterdir()] if isinstance(cached, str) else []
    return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]


def _from_diffusers(place: str, subfolder: str | None, variant: str | None = None) -> Any:
    """What diffusers loads from a folder or hub id, after the checks that it leaves out."""
    name = f"{place}/{subfolder}" if subfolder else place
    try:
        config = CLASSES[KL.name].load_config(place, subfolder=subfolder)
    except OSError as error:
        raise ValueError(f"cannot load a VAE from {name}: {_reason(error)}") from None
    check_numbers(config, f"{name}/{CONFIG}")
    check_config(config, f"{name}/{CONFIG}")
    kind = CLASSES[class_named_in(config, f"{name}/{CONFIG}")]
    try:
        with _only_errors():
            vae, report = kind.from_pretrained(
                place, subfolder=subfolder, variant=variant, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the weights in {name} cannot be loaded by its {CONFIG}: {_reason(error)}"
        ) from None
    for what in ("missing_keys", "unexpected_keys"):  # diffusers goes on with random weights, and only warns
        if keys := report[what]:
            raise ValueError(
                f"the weights in {name} are not those of its {CONFIG}: {len(keys)} {what.replace('_', ' ')}, the "
                f"first is {min(keys)!r}"
            )
    return vae


@contextmanager
def _only_errors() -> Iterator[None]:
    """Without diffusers' warnings: it lists by the hundred what `_from_diffusers` refuses in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """diffusers' words on one line, without its advice on its own arguments, and the fault that it met itself."""
    root: BaseException = error
    while deeper := root.__cause__ or root.__context__:
        root = deeper
    said = " ".join(str(error).partition(" If you want to instead")[0].split())
    return said if root is error else f"{said.removesuffix('.')} ({root})"
