"""What a run is resumed with unchanged beside its settings: its images, its parent and its teacher.

The names of all these are settings, and fixed ones (`preflight.py`); here it is what lies under the names.
"""

from __future__ import annotations

from typing import Any

from latentcodec.latents import fingerprint
from latentcodec.training.checkpoint import Checkpoint
from latentcodec.training.data.images import TrainingImages
from latentcodec.training.losses.teacher import Teacher


def require_same_images(found: Checkpoint, images: TrainingImages) -> None:
    """Refuse data that have gained, lost or exchanged images: others would be held out, and trained on before."""
    before, now = found.state.get("images"), images.counts
    way_out = (
        "Bring back the images of before, or take another output folder (model.from_pretrained goes on from the "
        "codec of this one)"
    )
    if before is not None and list(before) != now:
        raise ValueError(
            f"the checkpoint {found.path} is of {before[0]} training and {before[1]} validation images, and now "
            f"there are {now[0]} and {now[1]}: others would be held out. {way_out}"
        )
    digest = found.state.get("image_digest", images.digest)
    if digest != images.digest and digest != images.digest_without_arrays:
        raise ValueError(
            f"the checkpoint {found.path} is of as many images as there are now, but some were exchanged or renamed "
            f"(data.path, data.val_path): others would be held out. {way_out}"
        )


def fingerprints(parent: Any, teacher: Teacher | None) -> dict[str, str]:
    """Of the codecs that a run is given by name, by the setting that names them; before training moves the parent."""
    found = {} if parent is None else {"model.from_pretrained": fingerprint(parent)}
    return found if teacher is None else found | {"model.teacher": teacher.codec.fingerprint}


def require_same_codecs(found: Checkpoint, codecs: dict[str, str]) -> None:
    """Refuse a parent or a teacher with other weights or numbers than before, under the same name."""
    saved = found.state.get("codecs", {})  # older checkpoints have none
    for key, now in codecs.items():
        before = saved.get(key, now)
        if before != now:
            raise ValueError(
                f"{key} names another codec than it did up to the checkpoint {found.path}: its weights or its numbers "
                f"have changed (fingerprint {before[:16]}, now {now[:16]}). Bring back the codec of before, or take "
                "another output folder (model.from_pretrained goes on from the codec of this one)"
            )
