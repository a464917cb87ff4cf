"""What there is to say about a picture: why it cannot be read, or what is broken in its file beside its pixels.

A broken part that does not touch the pixels (a text, a profile, an end marker) costs a warning that names the file.
Whoever reads many pictures collects these notes instead, to count and to list them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

from PIL import UnidentifiedImageError


class UnreadableImage(ValueError):
    """A picture that cannot be read; the message names the file and the reason."""


class ImageWarning(UserWarning):
    """A picture whose pixels are whole in a file that is not; the message names the file and what is broken."""


_collected: ContextVar[list[str] | None] = ContextVar("notes", default=None)
_pillow = (
    Lock()
)  # `catch_warnings` is of the whole process: two threads inside would leave each other's filters


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Within, notes on broken files fill the list, in the order met, instead of being warnings."""
    notes: list[str] = []
    token = _collected.set(notes)
    try:
        yield notes
    finally:
        _collected.reset(token)


def note(name: str, text: str) -> None:
    """Say that the file `name` is broken in a way that does not touch its pixels."""
    notes = _collected.get()
    message = f"{name}: {text}"
    if notes is None:
        warnings.warn(message, ImageWarning, stacklevel=3)
    elif message not in notes:
        notes.append(message)


@contextmanager
def pillow_warnings_named(name: str) -> Iterator[None]:
    """Pillow's warnings name no file: within, they become notes that do."""
    with _pillow, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught):
        note(name, text.rstrip(". "))


def reason(error: Exception) -> str:
    """What an error of Pillow's, or of the system's, says, on one line and without the file's name."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the file again, or the address of a buffer
        return (
            "empty, damaged, not an image of a kind that is read, or with channels that have no meaning, such as two "
            "of which none is alpha"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
