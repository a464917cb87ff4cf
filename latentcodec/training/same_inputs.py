"""What a run is resumed with unchanged beside its settings: its images.

The names of all these are settings, and fixed ones (`preflight.py`); here it is what lies under the names.
"""

from __future__ import annotations

from latentcodec.training.checkpoint import Checkpoint
from latentcodec.training.data.images import TrainingImages


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
