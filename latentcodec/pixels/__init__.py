"""Pictures in every form, and the one form that the rest of the package knows: float32 NCHW in [-1, 1].

`folders` finds image files, `containers` opens them (with `png` and `jpeg`), `decode` and `colour` make pixels of
them, `save` makes files of pixels, `tensors` pads, cuts and lays out, `labelled` says what is what. Choosing, shuffling
and augmenting pictures is the data set's affair, not ours.

Shapes: B batch, C channels, H W pixels.
"""

from latentcodec.pixels.decode import decode_image, image_size, load_image
from latentcodec.pixels.folders import IMAGE_SUFFIXES, LeftOut, find_images, search_folder
from latentcodec.pixels.labelled import labelled_grid
from latentcodec.pixels.notes import ImageWarning, UnreadableImage, collect_notes
from latentcodec.pixels.save import WRITERS, encode_image, save_image
from latentcodec.pixels.tensors import crop, crop_middle, from_uint8, image_grid, pad_to_multiple, to_uint8

__all__ = [
    "IMAGE_SUFFIXES",
    "WRITERS",
    "ImageWarning",
    "LeftOut",
    "UnreadableImage",
    "collect_notes",
    "crop",
    "crop_middle",
    "decode_image",
    "encode_image",
    "find_images",
    "from_uint8",
    "image_grid",
    "image_size",
    "labelled_grid",
    "load_image",
    "pad_to_multiple",
    "save_image",
    "search_folder",
    "to_uint8",
]
