"""From images to batches of training crops.

A crop is a pure function of (seed, position), whichever process cuts it. The streams here are what a
`DataLoader` reads from; it is started in `stream.py`. Shapes: B batch, C channels, H W pixels.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from latentcodec.pixels import UnreadableImage, collect_notes
from latentcodec.randomness import Purpose, keyed_generator, numpy_generator
from latentcodec.sources.images import ImageSource
from latentcodec.sources.remote import Cell, RemoteSource
from latentcodec.training.data.order import EpochOrder, Positions
from latentcodec.training.data.text import draw_text

PATIENCE_IMAGES = 1000  # as many unreadable images in a row mean that the whole set is broken
_UNREADABLE_SET = "{} images in a row cannot be read, the last of them: {}"


class Reject(NamedTuple):
    """An image that was left out: a line of rejects.jsonl."""

    path: str
    reason: str


def rejected(name: str, error: UnreadableImage) -> Reject:
    """The line for an image of this name; the error's message repeats the name, the line does not."""
    return Reject(name, str(error).removeprefix(f"{name}: "))


class Batch(TypedDict):
    """What the trainer receives for one micro-batch."""

    pixels: Tensor  # [B, C, H, W] float32 in [-1, 1], contiguous
    position: Tensor  # [B] int64
    rejects: list[Reject]  # one for each unreadable image that had to be replaced here
    labels: NotRequired[Tensor]  # [B] int64, where the set has labels; -1: none
    notes: NotRequired[list[str]]  # on images that were used though something beside their pixels is broken


@dataclass(frozen=True)
class Cropping:
    """How crops are cut: `random_crop` with draws that depend on the seed and the position alone."""

    seed: int
    min_scale: float
    flip: bool
    text_share: float = 0.0
    """Share of the crops over which text or line art is drawn (`text.py`)."""
    fonts: tuple[str, ...] = ()
    """Font files to draw it with."""
    padding: int = 0
    """Pixels of its edge that are repeated around every image."""

    def batch(
        self, positions: list[int], images: list[Tensor], size: tuple[int, int], rejects: list[Reject]
    ) -> Batch:
        """One crop of H x W from each of the images."""
        crops = []
        for position, image in zip(positions, images, strict=True):
            generator = keyed_generator(self.seed, Purpose.AUGMENTATION, position)
            draws = torch.rand(4, generator=generator).tolist()
            crop = random_crop(pad_edges(image, self.padding), size, self.min_scale, self.flip, draws)
            crops.append(self._with_text(crop, position) if self.text_share else crop)
        return {"pixels": torch.stack(crops), "position": torch.tensor(positions), "rejects": rejects}

    def _with_text(self, crop: Tensor, position: int) -> Tensor:
        random = numpy_generator(self.seed, Purpose.TEXT, position)
        return draw_text(crop, self.fonts, random) if random.random() < self.text_share else crop


def random_crop(
    image: Tensor, size: tuple[int, int], min_scale: float, flip: bool, draws: list[float]
) -> Tensor:
    """Cuts a [C, *size] crop; four draws from [0, 1) choose its scale, its place and whether it is mirrored.

    The image is scaled by a factor from [min_scale, 1], uniformly, but never below the crop; one that is
    smaller than the crop is scaled up to it. Only the window that becomes the crop is scaled, antialiased.
    """
    height, width = image.shape[-2:]
    cover = max(size[0] / height, size[1] / width)  # the scale at which the image just covers the crop
    least = max(min_scale, cover)
    scale = cover if cover > 1 else least + draws[0] * (1 - least)
    window = min(height, max(1, round(size[0] / scale))), min(width, max(1, round(size[1] / scale)))
    top, left = int(draws[1] * (height - window[0] + 1)), int(draws[2] * (width - window[1] + 1))
    crop = image[:, top : top + window[0], left : left + window[1]]
    if window != size:
        crop = interpolate(crop[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    return crop.flip(-1) if flip and draws[3] < 0.5 else crop


def pad_edges(image: Tensor, padding: int) -> Tensor:
    """[C, H, W] -> [C, H + 2 padding, W + 2 padding]: its edge repeated."""
    return pad(image, [padding] * 4, mode="replicate") if padding else image


class CropStream(Dataset[Batch | ValueError]):
    """The stream of a set that is wholly here, asked for by positions: `stream[[8, 9, 10]]` is that batch.

    A set of which nothing can be read gives a `ValueError` instead of raising it: what a worker raises reaches the
    user inside the worker's traceback. The reader of the stream raises it.
    """

    def __init__(self, source: ImageSource, order: EpochOrder, cropping: Cropping) -> None:
        self.source, self.order, self.cropping = source, order, cropping

    def __getitem__(self, positions: list[int]) -> Batch | ValueError:
        rejects: dict[Reject, None] = {}  # an ordered set
        try:
            with collect_notes() as notes:
                read = [self._read(position, rejects) for position in positions]
        except ValueError as error:
            return error
        images, size = [image for image, _ in read], self.order.crop_size(positions[0])
        batch = self.cropping.batch(positions, images, size, list(rejects))
        if (labels := self.source.labels) is not None:
            batch["labels"] = torch.from_numpy(labels.numbers[[index for _, index in read]])
        return {**batch, "notes": notes}

    def _read(self, position: int, rejects: dict[Reject, None]) -> tuple[Tensor, int]:
        """The image at a position, or the next of its epoch's order that can be read, and its number."""
        for tried, index in enumerate(self.order.images_from(position), start=1):
            try:
                return self.source.read(index), index
            except UnreadableImage as error:
                last = error
                rejects[rejected(self.source.name(index), error)] = None
                if tried == PATIENCE_IMAGES:
                    break
        raise ValueError(_UNREADABLE_SET.format(tried, last))


class RemoteCropStream(IterableDataset[Batch | ValueError]):
    """The stream of a remote set for one rank: each worker process makes every `workers`-th micro-batch."""

    def __init__(self, source: RemoteSource, positions: Positions, cropping: Cropping, side: int) -> None:
        self.source, self.positions, self.cropping, self.side = source, positions, cropping, side

    def __iter__(self) -> Iterator[Batch | ValueError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first = self.positions.first + number
        # Wherever a run resumes, the loader asks worker 0 first: lanes go by the batches they make.
        lane, skip = first % workers, first // workers * self.positions.batch_size
        lane, lanes = self.positions.rank * workers + lane, self.positions.world_size * workers
        images = readable(self.source, self.source.lane(lane, lanes, self.cropping.seed, skip))
        try:
            for positions in itertools.islice(self.positions, number, None, workers):
                drawn = list(itertools.islice(images, len(positions)))
                rejects = list(dict.fromkeys(reject for _, before in drawn for reject in before))
                size = (self.side, self.side)
                yield self.cropping.batch(positions, [image for image, _ in drawn], size, rejects)
        except ValueError as error:
            yield error  # for the same reason as in `CropStream`


def readable(source: RemoteSource, cells: Iterator[Cell]) -> Iterator[tuple[Tensor, list[Reject]]]:
    """Decodes cell after cell; an unreadable one is replaced by the next that can be read.

    Yields as many images as there are cells, each with the rejected cells whose place it takes.
    """
    rejects: list[Reject] = []
    for cell in cells:
        try:
            image = source.decode(cell)
        except UnreadableImage as error:
            rejects.append(rejected(source.name(cell), error))
            if len(rejects) == PATIENCE_IMAGES:
                raise ValueError(_UNREADABLE_SET.format(PATIENCE_IMAGES, error)) from error
            continue
        for _ in rejects:
            yield image, rejects
        yield image, []
        rejects = []
