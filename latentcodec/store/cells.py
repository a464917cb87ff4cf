"""Cells of an Arrow column as Python values, straight from its buffers: without an object of Arrow for each.

Layouts: Arrow columnar format, "Variable-size Binary Layout" and "Fixed-Size Primitive Layout". Slices of a buffer
end where it ends, so offsets that lie give wrong texts, which a row's checksum notices, and no foreign memory.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa


def cell_reader(column: pa.Array) -> Callable[[int], str | int | None]:
    """A function of the row that gives the text of a `string` column, or the number of an `int64` column."""
    known = _validity(column)
    read = _texts(column) if pa.types.is_string(column.type) else _numbers(column)
    return read if known is None else lambda row: read(row) if known(row) else None


def _texts(column: pa.Array) -> Callable[[int], str]:
    _, offsets, data = column.buffers()
    ends = memoryview(offsets).cast("i")[column.offset :]
    text = memoryview(data) if data is not None else memoryview(b"")
    return lambda row: str(text[ends[row] : ends[row + 1]], "utf-8")


def _numbers(column: pa.Array) -> Callable[[int], int]:
    values = memoryview(column.buffers()[1]).cast("q")[column.offset :]
    return lambda row: values[row]


def _validity(column: pa.Array) -> Callable[[int], bool] | None:
    """Whether the cell of a row holds anything; None where all do."""
    bits = column.buffers()[0]
    if bits is None or not column.null_count:
        return None
    octets, first = memoryview(bits), column.offset
    return lambda row: bool(octets[(first + row) >> 3] >> ((first + row) & 7) & 1)
