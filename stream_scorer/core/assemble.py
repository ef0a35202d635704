"""Requests and features -> one RankBatch: unique users, unique items, rows as indices.

Shapes: R requests, B candidate rows, W columns of one slot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import FeatureBlock, Int64, RankBatch, Slot, SourceLayout, zero_block
from stream_scorer.core.context import takes_list
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.records import Fetched


class BatchPlan(NamedTuple):
    """What to fetch for R requests, and which rows are whose: request r has rows ``starts[r]:starts[r + 1]``."""

    users: list[str]  # R, the user of each request
    items: list[str]  # B, the item of each row
    starts: Int64  # R + 1 row numbers, the last is B

    @property
    def rows(self) -> int:
        """B."""
        return len(self.items)


def plan(requests: Sequence[ScoreRequest]) -> BatchPlan:
    """Users and items of the requests, request after request, before anything is fetched."""
    lists = [request.items for request in requests]
    starts = np.zeros(len(requests) + 1, np.int64)
    np.cumsum(list(map(len, lists)), out=starts[1:])
    return BatchPlan([request.user_id for request in requests], list(chain.from_iterable(lists)), starts)


def first_seen(values: Sequence[str]) -> tuple[list[str], Int64]:
    """Each value once, in first-seen order, and the index of each of them there."""
    index: defaultdict[str, int] = defaultdict(count().__next__)
    of = np.fromiter(map(index.__getitem__, values), np.int64, len(values))
    return list(index), of


def assemble(
    requests: Sequence[ScoreRequest], batch_plan: BatchPlan, fetched: Fetched, context: SourceLayout
) -> RankBatch:
    """Build the batch of these requests with the features fetched for `plan`'s users and items."""
    return RankBatch(
        user=fetched.users.block,
        item=fetched.items.block,
        context=context_block(requests, batch_plan.starts, context),
        user_of_B=np.repeat(fetched.user_of_R, np.diff(batch_plan.starts)),
        item_of_B=fetched.item_of_B,
        item_slot_I=fetched.items.slot_N,
        item_generation_I=fetched.items.generation_N,
    )


def context_block(requests: Sequence[ScoreRequest], starts: Int64, layout: SourceLayout) -> FeatureBlock:
    """Context features of B rows: request values repeated over their rows, ``item_context`` a row, 0 where absent.

    The requests' context must have passed `context.check_context`.
    """
    block = zero_block(layout, int(starts[-1]))
    counts_R = np.diff(starts)
    for slots, columns in ((layout.ids, block.ids_NS), (layout.dense, block.dense_ND)):
        for slot in slots:
            _fill(requests, counts_R, slot, columns[:, slot.start : slot.stop])
    return block


def _fill(requests: Sequence[ScoreRequest], counts_R: Int64, slot: Slot, out_BW: NDArray[Any]) -> None:
    """Write one slot's values into its columns."""
    name = slot.name
    by_request = [name in request.context for request in requests]
    if any(by_request):
        values = [request.context[name] for request in requests if name in request.context]
        if all(by_request):
            out_BW[:] = np.repeat(_columns(values, slot, out_BW.dtype), counts_R, axis=0)
        else:
            has_R = np.array(by_request)
            out_BW[np.repeat(has_R, counts_R)] = np.repeat(
                _columns(values, slot, out_BW.dtype), counts_R[has_R], axis=0
            )
    by_row = [name in request.item_context for request in requests]
    if any(by_row):
        flat = list(chain.from_iterable([r.item_context[name] for r in requests if name in r.item_context]))
        if all(by_row):
            out_BW[:] = _columns(flat, slot, out_BW.dtype)
        else:
            out_BW[np.repeat(np.array(by_row), counts_R)] = _columns(flat, slot, out_BW.dtype)


def _columns(values: Sequence[Any], slot: Slot, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Numbers, or lists of at most W numbers, -> an array of (len(values), W), padded with 0."""
    if not takes_list(slot):
        return np.array(values, dtype).reshape(len(values), 1)
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    out = np.zeros((len(values), slot.width), dtype)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(values)), lengths)
    column = np.arange(len(row)) - np.repeat(ends - lengths, lengths)
    out[row, column] = np.fromiter(chain.from_iterable(values), dtype, len(row))
    return out
