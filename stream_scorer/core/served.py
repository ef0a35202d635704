"""The ``served`` message: the exact features a request was scored with, as safetensors bytes.

`safetensors.numpy.load` reads it. Tensors: ``user_ids`` (1, S), ``user_dense`` (1, D), ``item_ids``, ``item_dense``,
``context_ids``, ``context_dense`` (K rows), ``ctr``, ``ctcvr`` (K). Metadata, all strings: request_id, user_id, items
(a JSON list), model_version, ts, scored_at (milliseconds), schema (hash of the feature schema), degraded (0 or 1).
Dense features are float32 or float16. K is at most ``top_k``: the candidates with the best CTCVR, in request order.

Written by hand because the header of tensors repeats (one template a row count) and the arrays of a whole batch are
gathered at once: a message costs a few slices and one join. `stream_scorer.core.served_read` reads it.

Shapes: R requests, B candidate rows, K kept rows (of one request, or of the batch while encoding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from esmm.batch import FeatureBlock, Float32, Int64, SourceLayout
from stream_scorer.core.codec import ScoredBatch

Dense = Literal["float32", "float16"]
Widths = tuple[int, int, int, int, int, int]  # ids of user, item, context, then dense of user, item, context
FLOAT16_MAX = 65504.0
ALIGN = 8  # tensors start at a multiple of 8 bytes, so that int64 views of a message are aligned
DTYPES: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_DENSE_NAMES: Mapping[Dense, str] = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class ServedLayout:
    """What both ends must agree on: the three sources' columns and the hash of the whole feature schema."""

    user: SourceLayout
    item: SourceLayout
    context: SourceLayout
    schema_hash: str

    @cached_property
    def widths(self) -> Widths:
        """Columns of each tensor."""
        sources = (self.user, self.item, self.context)
        ids, dense = [one.id_width for one in sources], [one.dense_width for one in sources]
        return (ids[0], ids[1], ids[2], dense[0], dense[1], dense[2])


class RowTypes(NamedTuple):
    """How a served request lies in memory: structured types of its user's row and of each candidate's."""

    user: np.dtype[np.void]  # ids, dense
    candidate: np.dtype[np.void]  # item_ids, context_ids, item_dense, context_dense, ctr, ctcvr


@lru_cache(maxsize=64)
def row_types(widths: Widths) -> RowTypes:
    """The types for a layout's widths. Little-endian, no padding: their bytes may be stored."""
    return RowTypes(
        np.dtype([("ids", "<i8", (widths[0],)), ("dense", "<f4", (widths[3],))]),
        np.dtype(
            [
                ("item_ids", "<i8", (widths[1],)),
                ("context_ids", "<i8", (widths[2],)),
                ("item_dense", "<f4", (widths[4],)),
                ("context_dense", "<f4", (widths[5],)),
                ("ctr", "<f4"),
                ("ctcvr", "<f4"),
            ]
        ),
    )


class ServedRequest(NamedTuple):
    """One scored request as the trainer sees it: K kept candidates with the features and scores they had.

    A candidate's features lie side by side, so that one copy moves them all. They are kept as `raw` bytes, and read as
    rows of ``types``.
    """

    request_id: str
    user_id: str
    items: list[str]  # K
    types: RowTypes
    user_1: NDArray[np.void]  # raw
    rows_K: NDArray[np.void]  # raw
    model_version: int
    ts_ms: int
    scored_at_ms: int
    degraded: bool

    @property
    def user(self) -> FeatureBlock:
        """The user's features, 1 row; a view."""
        user_1 = self.user_1.view(self.types.user)
        return FeatureBlock(user_1["ids"], user_1["dense"])

    @property
    def item(self) -> FeatureBlock:
        """Item features, K rows; a view."""
        rows_K = self.rows_K.view(self.types.candidate)
        return FeatureBlock(rows_K["item_ids"], rows_K["item_dense"])

    @property
    def context(self) -> FeatureBlock:
        """Context features, K rows; a view."""
        rows_K = self.rows_K.view(self.types.candidate)
        return FeatureBlock(rows_K["context_ids"], rows_K["context_dense"])

    @property
    def ctr_K(self) -> Float32:
        """The CTR published for each candidate."""
        return self.rows_K.view(self.types.candidate)["ctr"]

    @property
    def ctcvr_K(self) -> Float32:
        """The CTCVR published for each candidate."""
        return self.rows_K.view(self.types.candidate)["ctcvr"]


def raw(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Structured rows as bytes, of which numpy gathers and joins many times faster; a view."""
    return rows.view(np.dtype((np.void, rows.dtype.itemsize)))


class Candidates(NamedTuple):
    """Features and scores of K candidates, an array each."""

    item: FeatureBlock
    context: FeatureBlock
    ctr_K: Float32
    ctcvr_K: Float32


def pack_features(user: FeatureBlock, of: Candidates) -> tuple[RowTypes, NDArray[np.void], NDArray[np.void]]:
    """One user (1 row) and K candidates as ``types``, ``user_1`` and ``rows_K`` of a `ServedRequest`."""
    blocks = (user, of.item, of.context)
    widths = [block.ids_NS.shape[1] for block in blocks] + [block.dense_ND.shape[1] for block in blocks]
    types = row_types((widths[0], widths[1], widths[2], widths[3], widths[4], widths[5]))
    user_1, rows_K = np.empty(1, types.user), np.empty(len(of.ctr_K), types.candidate)
    user_1["ids"], user_1["dense"] = user
    rows_K["item_ids"], rows_K["item_dense"] = of.item
    rows_K["context_ids"], rows_K["context_dense"] = of.context
    rows_K["ctr"], rows_K["ctcvr"] = of.ctr_K, of.ctcvr_K
    return types, raw(user_1), raw(rows_K)


class _Strip(NamedTuple):
    """One tensor of the whole batch as bytes, ``size`` bytes a row."""

    data: memoryview
    size: int


def encode_served(scored: ScoredBatch, layout: ServedLayout, top_k: int, dense: Dense) -> list[bytes]:
    """One message a request; every row must have passed `codec.valid_scores`."""
    rows_K, starts = kept_rows(scored.scores.ctcvr_B, scored.plan.starts, top_k)
    strips = _strips(scored, rows_K, dense)
    bounds = starts.tolist()
    out = []
    for at, header in enumerate(_headers(scored, rows_K, bounds, layout, dense)):
        request, rows = (at, at + 1), (bounds[at], bounds[at + 1])
        spans = (request, rows, rows, rows, rows, request, rows, rows)  # in the order of _strips
        body = [data[start * size : stop * size] for (data, size), (start, stop) in zip(strips, spans, strict=True)]
        out.append(b"".join((len(header).to_bytes(8, "little"), header, *body)))
    return out


def kept_rows(ctcvr_B: Float32, starts: Int64, top_k: int) -> tuple[Int64, Int64]:
    """Rows of the ``top_k`` best CTCVR of each request, in row order, and where each request's begin (R + 1)."""
    counts = np.diff(starts)
    over = np.flatnonzero(counts > top_k)
    if not len(over):
        return np.arange(len(ctcvr_B)), starts
    keep = np.ones(len(ctcvr_B), np.bool_)
    for at in over.tolist():
        start, stop = starts[at], starts[at + 1]
        keep[start:stop] = False
        keep[start + np.argsort(-ctcvr_B[start:stop], kind="stable")[:top_k]] = True
    return np.flatnonzero(keep), np.concatenate([starts[:1], np.cumsum(np.minimum(counts, top_k))])


def _strips(scored: ScoredBatch, rows_K: Int64, dense: Dense) -> list[_Strip]:
    """All tensors of the batch in the order they are written: eight-byte values first, then four, then two."""
    batch, scores = scored.batch, scored.scores
    user_R, item_K = scored.fetched.user_of_R, batch.item_of_B.take(rows_K)
    ctr_K = scores.ctr_B.take(rows_K)
    arrays: list[NDArray[Any]] = [  # `take` is several times faster than an index in brackets for narrow rows
        batch.user.ids_NS.take(user_R, axis=0),
        batch.item.ids_NS.take(item_K, axis=0),
        batch.context.ids_NS.take(rows_K, axis=0),
        ctr_K,
        np.minimum(scores.ctcvr_B.take(rows_K), ctr_K),
        _as(dense, batch.user.dense_ND).take(user_R, axis=0),
        _as(dense, batch.item.dense_ND).take(item_K, axis=0),
        _as(dense, batch.context.dense_ND).take(rows_K, axis=0),
    ]
    return [_Strip(array.reshape(-1).view(np.uint8).data, array[:1].nbytes) for array in arrays]


def _as(dense: Dense, values: Float32) -> NDArray[Any]:
    """float32 as it is, or float16 with what does not fit clipped to its largest value."""
    return values if dense == "float32" else np.clip(values, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16)


def _headers(
    scored: ScoredBatch, rows_K: Int64, bounds: list[int], layout: ServedLayout, dense: Dense
) -> Iterator[bytes]:
    """The JSON header of each request, padded; what the batch has in common is written once."""
    head = b'{"__metadata__":{"degraded":"%d","model_version":"%d","scored_at":"%d","schema":%b,"items":' % (
        scored.fetched.degraded,
        scored.scores.model_version,
        scored.scored_at_ms,
        orjson.dumps(layout.schema_hash),
    )
    kept = len(rows_K) < scored.plan.rows
    positions = rows_K.tolist() if kept else []
    firsts = scored.plan.starts.tolist()
    for at, request in enumerate(scored.requests):
        start, stop = bounds[at], bounds[at + 1]
        items = [request.items[row - firsts[at]] for row in positions[start:stop]] if kept else request.items
        header = b'%b%b,"request_id":%b,"ts":"%d","user_id":%b},%b' % (
            head,
            orjson.dumps(orjson.dumps(items).decode()),
            orjson.dumps(request.request_id),
            request.ts,
            orjson.dumps(request.user_id),
            tensor_header(stop - start, layout.widths, _DENSE_NAMES[dense]),
        )
        yield header + b" " * (-len(header) % ALIGN)


@lru_cache(maxsize=4096)
def tensor_header(rows: int, widths: Widths, dense: str) -> bytes:
    """The end of the header, which names the tensors of a request with ``rows`` kept candidates (I64, F32, F16)."""
    shapes = {
        "user_ids": ("I64", [1, widths[0]]),
        "item_ids": ("I64", [rows, widths[1]]),
        "context_ids": ("I64", [rows, widths[2]]),
        "ctr": ("F32", [rows]),
        "ctcvr": ("F32", [rows]),
        "user_dense": (dense, [1, widths[3]]),
        "item_dense": (dense, [rows, widths[4]]),
        "context_dense": (dense, [rows, widths[5]]),
    }
    out: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + int(np.prod(shape)) * DTYPES[dtype].itemsize
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return orjson.dumps(out)[1:]
