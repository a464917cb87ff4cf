"""Cells read from the buffers of a column are those that Arrow gives."""

import pyarrow as pa
import pytest

from latentcodec.store.cells import cell_reader

COLUMNS = {
    "texts": pa.array(["a", "", "æøå 𝄞 猫", "x" * 300], pa.string()),
    "texts and gaps": pa.array([None, "a", "", None, "猫", None] * 3, pa.string()),
    "no text at all": pa.array([None, None], pa.string()),
    "empty texts": pa.array(["", ""], pa.string()),
    "numbers": pa.array([0, -1, 2**62, -(2**63)], pa.int64()),
    "numbers and gaps": pa.array([None, 3, None, -7, 0] * 5, pa.int64()),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_cell_is_that_of_arrow_in_a_slice_too(column, first):
    part = column.slice(first)
    read = cell_reader(part)
    assert [read(row) for row in range(len(part))] == part.to_pylist()


def test_offsets_that_lie_reach_no_foreign_memory():
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 2, 2**30, 5)))
    read = cell_reader(pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"hello")]))
    assert [read(row) for row in range(3)] == ["he", "llo", ""]
