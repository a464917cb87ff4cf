"""The labels of a set of images: a number for each, and what the numbers are called.

Nothing is trained on them. They go with the batches and name what a page or a sample picture shows.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Labels:
    """What a set says of its images beside their pixels."""

    numbers: NDArray[np.int64]
    """[N]: the class of each image; -1 where it has none."""
    names: list[str]
    """Of the classes, by number."""

    def name(self, index: int) -> str:
        """The class of image `index`, or "?"."""
        number = int(self.numbers[index])
        return self.names[number] if number >= 0 else "?"

    @classmethod
    def of(cls, values: Sequence[Any], names: Sequence[str] | None, what: str) -> Labels:
        """From a column: numbers from 0 on, with or without names, or words; None stands for no class.

        Raises ValueError naming `what` holds something else.
        """
        known = [value for value in values if value is not None]
        words = all(isinstance(value, str) for value in known)
        if words and known:
            names = sorted(set(known))
            by_name = {name: number for number, name in enumerate(names)}
            numbers = [-1 if value is None else by_name[value] for value in values]
        else:
            wrong = next((value for value in known if not _is_whole(value)), None)
            if wrong is not None:
                raise ValueError(
                    f"{what}: {str(wrong)[:40]!r} is no label: a whole number or a word is needed"
                )
            numbers = [-1 if value is None else int(value) for value in values]
        array = np.array(numbers, dtype=np.int64)
        count = int(array.max(initial=-1)) + 1
        if count > max(len(array), len(names or ())):
            raise ValueError(f"{what}: a label is {count - 1}, and there are {len(array)} images: no classes")
        return cls(array, list(names or map(str, range(count))))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= -1
