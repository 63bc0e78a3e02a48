"""What Rust does with the records of an index is what their definitions in NumPy and torch say."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laps import LapsTypeError, LapsValueError, _laps
from laps.index.checksum import checksum
from laps.index.records import DTYPES, Field, RecordLayout
from laps.index.shards import read_places


def slow_checksum(data: bytes) -> int:
    """As the module's text has it."""
    whole = len(data) // 512 * 512
    result = zlib.crc32(data[whole:])
    if whole:
        table = np.frombuffer(data[:whole], "<u8").reshape(-1, 64)
        for axis in (0, 1):
            result = zlib.crc32(table.sum(axis, dtype=np.uint64).tobytes(), result)
    return result


@given(st.binary(max_size=2100), st.integers(1, 5))
def test_a_checksum_is_its_definition(data: bytes, times: int) -> None:
    assert checksum(data * times) == slow_checksum(data * times)
    assert checksum(np.frombuffer(data, np.uint8)) == slow_checksum(data)


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), shapes), min_size=1, max_size=4), st.integers(1, 4)
)
def test_fields_are_unpacked_as_torch_does(kinds: list[tuple[str, tuple[int, ...]]], count: int) -> None:
    layout = RecordLayout(tuple(Field(f"f{i}", dtype, shape) for i, (dtype, shape) in enumerate(kinds)))
    generator = torch.Generator().manual_seed(count)
    records = torch.zeros(count, layout.nbytes, dtype=torch.uint8)
    expected, start = {}, 0
    for field in layout.fields:
        numbers = torch.randint(-128, 128, (count, *field.shape), generator=generator).to(DTYPES[field.dtype])
        scales = torch.rand(count, *field.shape[:-1], generator=generator)
        value = numbers.float()
        for row in range(count):
            front = scales[row].numpy().tobytes() if field.dtype == "int8" else b""
            stored = np.frombuffer(front + numbers[row].numpy().tobytes(), np.uint8)
            records[row, start : start + len(stored)] = torch.from_numpy(stored.copy())
        if field.dtype == "int8":
            value = value * (scales[..., None] if field.shape else scales)
        expected[field.name] = value
        start += field.nbytes
    found = layout.unpack(records, {})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_the_first_damaged_record_is_told(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 4 * 512 + 9, np.uint8)
    (tmp_path / "records").write_bytes(content.tobytes())
    rows = content[: 4 * 512].reshape(4, 512)
    file = os.open(tmp_path / "records", os.O_RDONLY)
    try:
        order = np.array([3, 0, 2])
        places = np.stack([np.full(3, file), 512 * order, [checksum(rows[row]) for row in order]])
        into = np.zeros((3, 512), np.uint8)
        assert read_places(places, into) is None
        assert (into == rows[order]).all()
        places[2, 1] ^= 1
        assert read_places(places, into) == (1, -1)
        places[1, 1:] = 4 * 512
        assert read_places(places, into) == (1, 0)
        places[0, 0] = -1
        assert read_places(places, into) == (0, 9)
    finally:
        os.close(file)
    assert read_places(np.empty((3, 0), np.int64), np.empty((0, 512), np.uint8)) is None


def test_what_does_not_fit_is_refused() -> None:
    one, records = np.zeros(1, np.int64), np.zeros((1, 512), np.uint8)
    out = np.zeros((1, 4), np.float32)
    with pytest.raises(LapsValueError, match="out_records has shape 2, expected 1 rows, as files has"):
        _laps.read_records(one, one, one, 1, np.zeros((2, 512), np.uint8))
    with pytest.raises(LapsValueError, match="offsets >= 0"):
        _laps.read_records(one, one - 1, one, 1, records)
    with pytest.raises(LapsTypeError, match="expected int64, got int32"):
        _laps.read_records(one.astype(np.int32), one, one, 1, records)
    with pytest.raises(LapsValueError, match="a field that ends within 512 bytes"):
        _laps.unpack_records(records, 505, "float16", 4, 1, out)
    with pytest.raises(LapsValueError, match="a field that ends within 512 bytes"):
        _laps.unpack_records(records, 2**64 - 1, "float32", 4, 1, out)
    with pytest.raises(LapsValueError, match="float16, float32 or int8, got bfloat16"):
        _laps.unpack_records(records, 0, "bfloat16", 4, 1, out)
    with pytest.raises(LapsValueError, match="a divisor of 4, got 3"):
        _laps.unpack_records(records, 0, "int8", 3, 1, out)
    with pytest.raises(LapsTypeError, match="a contiguous array"):
        _laps.unpack_records(
            np.zeros((2, 1024), np.uint8)[:, ::2], 0, "float16", 4, 1, np.zeros((2, 4), np.float32)
        )
