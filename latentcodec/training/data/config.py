"""The settings of the data: which images a run trains on, how crops are cut from them and what is drawn over them.

Sizes are in pixels.
"""

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from latentcodec.training.ranges import ShareAboveZero


@dataclass
class DataConfig:
    """Which images to train on and how crops are cut from them."""

    path: str | None = None
    """A folder of images or tar shards, a Hugging Face data set (hub id, local folder, parquet file), an npz file, or
    idx files as MNIST has them (a file, or a folder of which split chooses train or test). None: a built-in set."""
    drawn: Literal["pictures", "digits"] = "pictures"
    """The built-in set that is taken without a path: pictures of 256 x 256 pixels, or grey digits of 28 x 28 with
    labels."""
    subset: str | None = None
    """The subset (configuration) of a Hugging Face data set that has several."""
    split: str = "train"
    """The split of a Hugging Face data set to train on; a slice such as train[:1000] works too."""
    image_column: str | None = None
    """The column of a Hugging Face data set that holds the images (in tar shards the part of the name after
    the dot, in an npz file the name of the array). None: the only one that is declared to hold images."""
    label_column: str | None = None
    """The column of a Hugging Face data set, or the array of an npz file, that holds the classes of the images: whole
    numbers or words. Nothing is trained on them: they name pictures. Idx files and drawn digits have them anyway."""
    resolution: PositiveInt = 128
    """Height and width of the training crops, in pixels."""
    min_scale: ShareAboveZero = 0.5
    """An image is scaled down by a random factor between this and 1 before it is cropped; 1 switches this
    off."""
    flip: bool = True
    """Mirror every second crop, left to right. Digits and letters want false, and min_scale 1."""
    padding: NonNegativeInt = 0
    """Pixels of its edge that are repeated around every image, of training and validation: 2 makes digits of 28 x 28
    fit a codec of f32."""
    text_share: ClosedUnitInterval = 0.0
    """Share of the training crops over which text is drawn with the fonts of this machine: half of them keep the
    photograph behind it, half are pages of one colour. Of the pages a quarter is empty, flat or shaded from one colour
    to another, and a quarter has line art, with or without text."""
    text_fonts_left_out: list[str] = field(default_factory=list)
    """Fonts whose file names begin with one of these are not drawn with, so that a test can use them."""
    buckets: bool = False
    """Aspect-ratio buckets: every optimizer step has one crop shape, of about resolution^2 pixels, and images
    whose own shape is near it. Reads the header of every image first."""
    train_images: PositiveInt | None = None
    """Train on at most so many images, chosen by the seed, to see what fewer do. None: on all that are not held out."""
    val_path: str | None = None
    """Validation images, understood like path, of which val_images are taken. Where they lie in a folder inside path,
    none of that folder is trained on. None: val_images of the training set are held out."""
    val_split: str | None = None
    """The split of a Hugging Face data set to validate on. None: the same as split."""
    val_images: NonNegativeInt = 16
    """How many images to validate on; 0 switches validation off."""
    val_resolution: PositiveInt = 512
    """Validation images are whole, but centre-cropped to at most this many pixels on a side."""
    streaming: bool = False
    """Read a Hugging Face data set over the network while training instead of fetching it first. The order
    then depends on the number of ranks and workers, and only with the same numbers is a resume exact."""
    shuffle_buffer: PositiveInt = 1000
    """With streaming: how many encoded images each worker keeps to draw the next one from."""
    workers: NonNegativeInt = 2
    """Processes that read and crop images; 0 reads them in the training process."""
    prefetch: PositiveInt = 4
    """Micro-batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for keys that contradict each other."""
        for key in ("label_column", "train_images"):
            if self.streaming and getattr(self, key) is not None:
                raise ValueError(f"data.{key} needs a set that is wholly here, without data.streaming")
        if self.streaming and self.path is None:
            raise ValueError("data.streaming needs a data.path; the drawn set is made on the spot")
        if self.streaming and self.buckets:
            raise ValueError("data.buckets needs the shapes of all images, which data.streaming cannot give")
