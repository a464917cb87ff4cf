"""Ranges of settings that jsonargparse has no name for. Like its own, they are checked when a setting is read.

They stand beside `PositiveInt`, `NonNegativeFloat`, `ClosedUnitInterval` and the others of `jsonargparse.typing`.
"""

from typing import TYPE_CHECKING

from jsonargparse.typing import restricted_number_type

if TYPE_CHECKING:
    BelowOne = float
    ShareAboveZero = float
else:
    BelowOne = restricted_number_type("BelowOne", float, [(">=", 0), ("<", 1)], docstring="float in [0, 1)")
    ShareAboveZero = restricted_number_type(
        "ShareAboveZero", float, [(">", 0), ("<=", 1)], docstring="float in (0, 1]"
    )
