"""The packed feature record: one fixed-size binary value an entity; a whole batch decodes with one `np.frombuffer`.

Little-endian, no padding: magic u4, format version u2, flags u2, schema u8 (`SourceLayout.hash`), event_ms i8,
ids i8[S], dense f4[D]. Keys carry a hash-tag bucket, so MGET stays one command a bucket on Redis Cluster.

Shapes: N entities, S id slots, D dense floats.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Bool, FeatureBlock, Int64, SourceLayout, UInt8, zero_block

MAGIC = int.from_bytes(b"SSFR", "little")
FORMAT_VERSION = 1
Entity = Literal["user", "item"]


class Missing(IntEnum):
    """Why a row holds the default vector. The lower-case name is the metric label; `OK` is a row that was found."""

    OK = 0
    ABSENT = 1  # no such key
    SIZE = 2  # not the length of a record of this layout
    MAGIC = 3  # not a feature record, or a format version this code does not know
    SCHEMA = 4  # written under another feature schema
    NONFINITE = 5  # a dense value is NaN or infinite

    @property
    def label(self) -> str:
        """The metric label: ``absent``, ``size``, ``magic``, ``schema`` or ``nonfinite``."""
        return self.name.lower()


class DecodedRows(NamedTuple):
    """N decoded records; a missing row is all zeros with event time 0 and says why in ``reason_N`` (see `Missing`)."""

    block: FeatureBlock
    event_ms_N: Int64
    missing_N: Bool
    reason_N: UInt8

    def reasons(self) -> dict[str, int]:
        """How many rows are missing, by metric label."""
        if not self.missing_N.any():
            return {}
        counts = np.bincount(self.reason_N, minlength=len(Missing)).tolist()
        return {reason.label: counts[reason] for reason in Missing if reason and counts[reason]}


def record_dtype(layout: SourceLayout) -> np.dtype[np.void]:
    """The structured dtype of one record of ``layout``; ``itemsize`` is ``24 + 8 S + 4 D`` bytes."""
    return _dtype(layout.id_width, layout.dense_width)


@lru_cache(maxsize=64)
def _dtype(id_width: int, dense_width: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("magic", "<u4"),
            ("version", "<u2"),
            ("flags", "<u2"),
            ("schema", "<u8"),
            ("event_ms", "<i8"),
            ("ids", "<i8", (id_width,)),
            ("dense", "<f4", (dense_width,)),
        ]
    )


def encode_records(layout: SourceLayout, block: FeatureBlock, event_ms_N: Int64) -> list[bytes]:
    """One packed record a row. Raises ValueError when shapes differ from the layout or a value is not finite."""
    rows = len(event_ms_N)
    want = ((rows, layout.id_width), (rows, layout.dense_width))
    if (block.ids_NS.shape, block.dense_ND.shape) != want:
        raise ValueError(
            f"{layout.source} features have shapes {block.ids_NS.shape} and {block.dense_ND.shape}; "
            f"the schema wants {want[0]} ids and {want[1]} dense"
        )
    if not np.isfinite(block.dense_ND).all():
        bad = int(np.flatnonzero(~np.isfinite(block.dense_ND).all(axis=1))[0])
        raise ValueError(f"{layout.source} features: row {bad} holds a value that is not finite; clean it first")
    records = np.zeros(rows, record_dtype(layout))
    records["magic"] = MAGIC
    records["version"] = FORMAT_VERSION
    records["schema"] = layout.hash
    records["event_ms"] = event_ms_N
    records["ids"] = block.ids_NS
    records["dense"] = block.dense_ND
    size = records.dtype.itemsize
    data = records.tobytes()
    return [data[at : at + size] for at in range(0, len(data), size)]


def decode_records(layout: SourceLayout, values: Sequence[bytes | None]) -> DecodedRows:
    """Values in the order asked for (None: no such key) -> one row each. Bad data never raises: the row is missing."""
    size = record_dtype(layout).itemsize
    rows = len(values)
    good = [value for value in values if value is not None and len(value) == size]
    records = np.frombuffer(b"".join(good), record_dtype(layout))
    reason = _reasons(records, layout.hash)
    if len(good) == rows and not reason.any():  # the usual case: every row is there and fine
        block = FeatureBlock(records["ids"].copy(), records["dense"].copy())
        return DecodedRows(block, records["event_ms"].copy(), np.zeros(rows, np.bool_), reason)
    return _scatter(layout, values, records, reason)


def _reasons(records: NDArray[np.void], schema: int) -> UInt8:
    """Give the first thing wrong with each record of the right size."""
    reason = np.zeros(len(records), np.uint8)
    reason[~np.isfinite(records["dense"]).all(axis=1)] = Missing.NONFINITE
    reason[records["schema"] != np.uint64(schema)] = Missing.SCHEMA
    reason[(records["magic"] != MAGIC) | (records["version"] != FORMAT_VERSION)] = Missing.MAGIC
    return reason


def _scatter(
    layout: SourceLayout, values: Sequence[bytes | None], records: NDArray[np.void], reason: UInt8
) -> DecodedRows:
    """Place the good records among defaults."""
    rows = len(values)
    size = record_dtype(layout).itemsize
    length_N = np.array([-1 if value is None else len(value) for value in values], np.int64)
    reason_N = np.where(length_N < 0, Missing.ABSENT, Missing.SIZE).astype(np.uint8)
    reason_N[length_N == size] = reason
    missing_N = reason_N != Missing.OK
    to, good = np.flatnonzero(~missing_N), np.flatnonzero(reason == Missing.OK)
    block = zero_block(layout, rows)
    block.ids_NS[to] = records["ids"][good]
    block.dense_ND[to] = records["dense"][good]
    event_ms_N = np.zeros(rows, np.int64)
    event_ms_N[to] = records["event_ms"][good]
    return DecodedRows(block, event_ms_N, missing_N, reason_N)


def bucket_of(id: str, buckets: int) -> int:  # noqa: A002  the field's word
    """Hash-tag bucket in ``[0, buckets)``: crc32 of the UTF-8 id, the same on every machine."""
    return zlib.crc32(id.encode()) % buckets


def entity_key(kind: Entity, id: str, buckets: int, prefix: str = "f") -> str:  # noqa: A002  the field's word
    """Redis key ``f:{i<bucket>}:<id>`` for an item, ``f:{u<bucket>}:<id>`` for a user."""
    return f"{prefix}:{{{kind[0]}{bucket_of(id, buckets)}}}:{id}"
