import numpy as np
import pytest

from esmm.batch import FeatureBlock, Slot, SourceLayout
from stream_scorer.core.packed import (
    Missing,
    bucket_of,
    decode_records,
    encode_records,
    entity_key,
    record_dtype,
)

LAYOUT = SourceLayout("item", (Slot("a", "sparse", 0, 1), Slot("h", "varlen", 1, 4)), (Slot("x", "dense", 0, 2),))
DENSE_ONLY = SourceLayout("user", (), (Slot("x", "dense", 0, 2),))
IDS_ONLY = SourceLayout("user", (Slot("a", "sparse", 0, 1),), ())


def block(rows: int, layout: SourceLayout = LAYOUT) -> FeatureBlock:
    ids = np.arange(rows * layout.id_width, dtype=np.int64).reshape(rows, layout.id_width) + (1 << 53) + 1
    dense = np.arange(rows * layout.dense_width, dtype=np.float32).reshape(rows, layout.dense_width) - 1.5
    return FeatureBlock(ids, dense)


@pytest.mark.parametrize("layout", [LAYOUT, DENSE_ONLY, IDS_ONLY], ids=["both", "dense", "ids"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_round_trip_is_exact(layout: SourceLayout, rows: int) -> None:
    given, times = block(rows, layout), np.arange(rows, dtype=np.int64) + 1_700_000_000_000
    values = encode_records(layout, given, times)
    assert [len(value) for value in values] == [record_dtype(layout).itemsize] * rows
    got = decode_records(layout, values)
    np.testing.assert_array_equal(got.block.ids_NS, given.ids_NS)
    np.testing.assert_array_equal(got.block.dense_ND, given.dense_ND)
    np.testing.assert_array_equal(got.event_ms_N, times)
    assert not got.missing_N.any()
    assert got.reasons() == {}
    assert got.block.ids_NS.dtype == np.int64
    assert got.block.dense_ND.flags.writeable


def test_the_layout_on_the_wire_is_fixed() -> None:
    value = encode_records(LAYOUT, block(1), np.array([7], np.int64))[0]
    assert len(value) == 24 + 8 * 4 + 4 * 2
    assert value[:4] == b"SSFR"
    assert value[4:8] == b"\x01\x00\x00\x00"
    assert int.from_bytes(value[8:16], "little") == LAYOUT.hash
    assert int.from_bytes(value[16:24], "little") == 7


def test_bad_rows_are_missing_with_their_reason_and_leave_the_others_alone() -> None:
    good = encode_records(LAYOUT, block(4), np.array([1, 2, 3, 4], np.int64))
    other = SourceLayout("item", (Slot("a", "sparse", 0, 1), Slot("g", "varlen", 1, 4)), LAYOUT.dense)
    foreign = encode_records(other, block(1), np.array([9], np.int64))[0]
    nan = np.frombuffer(good[1], record_dtype(LAYOUT)).copy()
    nan["dense"][0, 1] = np.nan
    newer = good[2][:4] + b"\x02\x00" + good[2][6:]
    values = [good[0], None, good[3][:-1], b"", b"XXXX" + good[0][4:], newer, foreign, nan.tobytes(), good[3]]
    got = decode_records(LAYOUT, values)
    assert [Missing(code).label for code in got.reason_N] == [
        "ok", "absent", "size", "size", "magic", "magic", "schema", "nonfinite", "ok",
    ]  # fmt: skip
    assert got.missing_N.tolist() == [False] + [True] * 7 + [False]
    assert got.event_ms_N.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 4]
    np.testing.assert_array_equal(got.block.ids_NS[[0, 8]], block(4).ids_NS[[0, 3]])
    assert not got.block.ids_NS[1:8].any()
    assert not got.block.dense_ND[1:8].any()
    assert got.reasons() == {"absent": 1, "size": 2, "magic": 2, "schema": 1, "nonfinite": 1}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encoding_refuses_what_decoding_would_drop(bad: float) -> None:
    given = block(3)
    given.dense_ND[1, 0] = bad
    with pytest.raises(ValueError, match="row 1 holds a value that is not finite"):
        encode_records(LAYOUT, given, np.zeros(3, np.int64))


def test_encoding_refuses_a_block_of_another_layout() -> None:
    with pytest.raises(ValueError, match="the schema wants"):
        encode_records(LAYOUT, block(2, DENSE_ONLY), np.zeros(2, np.int64))


def test_keys_carry_a_stable_bucket() -> None:
    assert entity_key("item", "i3", 64) == f"f:{{i{bucket_of('i3', 64)}}}:i3"
    assert entity_key("user", "u7", 1) == "f:{u0}:u7"
    assert bucket_of("abc", 1 << 32) == 0x352441C2  # crc32 test vector: keys must never move
    assert {bucket_of(str(n), 8) for n in range(200)} == set(range(8))
