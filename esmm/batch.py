"""The hand-offs between rooms, as numpy NamedTuples: what is scored, what is learned from, what comes out.

Shape suffixes: B rows (one candidate of one request), U unique users, I unique items, N rows of any block,
S id slots, D dense floats. An *id slot* is one int64 column: a sparse feature takes one, a variable-length feature
takes ``maxlen`` and, when it has a length column, one more.

This module imports numpy and nothing else, so that the pure core can use it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Source = Literal["user", "item", "context"]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
UInt8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Slot:
    """Columns ``start:stop`` of a block that belong to one feature.

    ``kind`` is ``sparse`` (one id), ``varlen`` (padded ids), ``length`` (how many ids of a varlen count) or ``dense``.
    """

    name: str
    kind: Literal["sparse", "varlen", "length", "dense"]
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.stop - self.start


@dataclass(frozen=True)
class SourceLayout:
    """Where a source's features lie in its two arrays: ``ids_NS`` (int64) and ``dense_ND`` (float32)."""

    source: Source
    ids: tuple[Slot, ...]
    dense: tuple[Slot, ...]

    @property
    def id_width(self) -> int:
        """S, the number of int64 columns."""
        return self.ids[-1].stop if self.ids else 0

    @property
    def dense_width(self) -> int:
        """D, the number of float32 columns."""
        return self.dense[-1].stop if self.dense else 0

    @cached_property
    def hash(self) -> int:
        """A stable unsigned 64-bit hash of names, kinds and widths: a packed record carries it."""
        text = json.dumps([self.source, [[s.name, s.kind, s.start, s.stop] for s in (*self.ids, *self.dense)]])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class FeatureBlock(NamedTuple):
    """Feature values of N users, items or rows, in the order of a `SourceLayout`."""

    ids_NS: Int64
    dense_ND: Float32

    @property
    def rows(self) -> int:
        """N."""
        return len(self.ids_NS)

    def take(self, index: Int64) -> FeatureBlock:
        """The rows at ``index``, repeats allowed."""
        return FeatureBlock(self.ids_NS[index], self.dense_ND[index])


def zero_block(layout: SourceLayout, rows: int) -> FeatureBlock:
    """A block of ``rows`` rows of zeros: id 0 in every slot, 0.0 in every dense column."""
    return FeatureBlock(np.zeros((rows, layout.id_width), np.int64), np.zeros((rows, layout.dense_width), np.float32))


def concat_blocks(blocks: list[FeatureBlock]) -> FeatureBlock:
    """Blocks of one layout, stacked row after row."""
    return FeatureBlock(np.concatenate([b.ids_NS for b in blocks]), np.concatenate([b.dense_ND for b in blocks]))


class RankBatch(NamedTuple):
    """B candidate rows of some requests: unique users and unique items once, rows as indices into them."""

    user: FeatureBlock  # U rows
    item: FeatureBlock  # I rows
    context: FeatureBlock  # B rows
    user_of_B: Int64  # row -> index into user
    item_of_B: Int64  # row -> index into item
    item_slot_I: Int64  # the item's slot in the feature cache, a small stable number, or -1 when it has none
    item_generation_I: (
        Int64  # changes whenever the slot's content changes: (slot, generation) names exact feature values
    )

    @property
    def rows(self) -> int:
        """B."""
        return len(self.user_of_B)


class Scores(NamedTuple):
    """One probability triple a row; ``ctcvr == ctr * cvr`` within float32 rounding. All float32 in [0, 1], finite."""

    ctr_B: Float32
    cvr_B: Float32
    ctcvr_B: Float32
    model_version: int


class Kind(IntEnum):
    """Why a row is emitted by the joiner (see reference in ``esmm/delay.py``)."""

    FIRST = 0  # the impression's first and only emission for CTR, with the conversion seen within the window
    LATE_CONVERSION = 1  # the conversion came after a first emission that carried none
    MATURED = 2  # a clicked impression at the end of its attribution window, with its final label


class Examples(NamedTuple):
    """B training rows with the exact features that were scored.

    ``click_B`` is o. ``conversion_B`` is the conversion label as known when the row was emitted: v for FIRST, 1 for
    LATE_CONVERSION, y for MATURED. ``observed_B`` is v, the conversion label the FIRST row of this impression carried.
    """

    user: FeatureBlock
    item: FeatureBlock
    context: FeatureBlock
    kind_B: UInt8
    click_B: Float32
    conversion_B: Float32
    observed_B: Float32
    served_ctr_B: Float32  # what the scorer published for this row
    served_ctcvr_B: Float32
    version_B: Int64  # the model version that scored it
    impression_ms_B: Int64  # event time of the impression

    @property
    def rows(self) -> int:
        """B."""
        return len(self.kind_B)

    def take(self, index: Int64) -> Examples:
        """The rows at ``index``."""
        blocks = (self.user.take(index), self.item.take(index), self.context.take(index))
        return Examples._make((*blocks, *(column[index] for column in self[3:])))


def concat_examples(parts: list[Examples]) -> Examples:
    """Example batches of one schema, stacked row after row."""
    blocks = (
        concat_blocks([part.user for part in parts]),
        concat_blocks([part.item for part in parts]),
        concat_blocks([part.context for part in parts]),
    )
    columns = (np.concatenate([part[at] for part in parts]) for at in range(3, len(Examples._fields)))
    return Examples._make((*blocks, *columns))


class StepStats(NamedTuple):
    """What one optimiser step did. Losses are means over first emissions, in nats; predictions are from *before* it."""

    rows: int
    first_rows: int
    loss: float
    ctr_B: Float32  # progressive predictions: every row scored before it is learned from
    ctcvr_B: Float32
    finite: bool
