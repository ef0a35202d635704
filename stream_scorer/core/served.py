"""The ``served`` message: the exact features a request was scored with, as safetensors bytes.

`safetensors.numpy.load` reads it. Tensors: ``user_ids`` (1, S), ``user_dense`` (1, D), ``item_ids``, ``item_dense``,
``context_ids``, ``context_dense`` (K rows), ``ctr``, ``ctcvr`` (K). Metadata, all strings: request_id, user_id, items
(a JSON list), model_version, ts, scored_at (milliseconds), schema (hash of the feature schema), degraded (0 or 1).
Dense features are float32 or float16. K is at most ``top_k``: the candidates with the best CTCVR, in request order.

Written by hand because the header of tensors repeats (one template a row count) and the arrays of a whole batch are
gathered at once: a message costs a few slices and one join.

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
from stream_scorer.core.records import Record
from stream_scorer.core.rejects import Reject

Dense = Literal["float32", "float16"]
Widths = tuple[int, int, int, int, int, int]  # ids of user, item, context, then dense of user, item, context
FLOAT16_MAX = 65504.0
ALIGN = 8  # tensors start at a multiple of 8 bytes, so that int64 views of a message are aligned
_DTYPES: Mapping[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_DENSE_NAMES: Mapping[Dense, str] = {"float32": "F32", "float16": "F16"}
_FLOATS = ("F32", "F16")
_LEAST, _GREATEST = np.minimum.reduce, np.maximum.reduce


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


class ServedRequest(NamedTuple):
    """One scored request as the trainer sees it: K kept candidates with the features and scores they had."""

    request_id: str
    user_id: str
    items: list[str]  # K
    user: FeatureBlock  # 1 row
    item: FeatureBlock  # K rows
    context: FeatureBlock  # K rows
    ctr_K: Float32
    ctcvr_K: Float32
    model_version: int
    ts_ms: int
    scored_at_ms: int
    degraded: bool


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
            _tensors(stop - start, layout.widths, _DENSE_NAMES[dense]),
        )
        yield header + b" " * (-len(header) % ALIGN)


@lru_cache(maxsize=4096)
def _tensors(rows: int, widths: Widths, dense: str) -> bytes:
    """The part of the header that names the tensors of a request with ``rows`` kept candidates."""
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
        end = at + int(np.prod(shape)) * _DTYPES[dtype].itemsize
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return orjson.dumps(out)[1:]


def decode_served(record: Record, layout: ServedLayout) -> ServedRequest | Reject:
    """Read and check one message. Refused: ``empty``, ``corrupt``, ``layout`` (other schema), ``nonfinite``."""
    value = record.value
    if not value:
        return Reject(record, "empty", "the message has no value")
    try:
        header, start = _read_header(value)
        meta = header["__metadata__"]
        if meta["schema"] != layout.schema_hash:
            detail = f"features of schema {str(meta['schema'])[:20]}, this trainer has {layout.schema_hash}"
            return Reject(record, "layout", detail)
        served = _read(value, start, header, layout)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return Reject(record, "corrupt", f"not a served message: {type(error).__name__}: {error}")
    dense = (served.user.dense_ND, served.item.dense_ND, served.context.dense_ND)
    if not all(np.isfinite(values).all() for values in dense if values.size):
        return Reject(record, "nonfinite", "a feature is not finite")
    ctr_K, ctcvr_K = served.ctr_K, served.ctcvr_K  # a comparison with NaN is false, and least and greatest keep NaN
    if not (_LEAST(ctcvr_K) >= 0 and _GREATEST(ctr_K) <= 1 and _LEAST(ctr_K - ctcvr_K) >= 0):
        return Reject(record, "nonfinite", "a score is no probability, or ctcvr is above ctr")
    return served


def _read_header(value: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin."""
    start = 8 + int.from_bytes(value[:8], "little")
    if start > len(value):
        raise ValueError("the header is longer than the message")
    header = orjson.loads(value[8:start])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("the header has no metadata")  # noqa: TRY004  a message's content, not a caller's mistake
    return header, start


def _read(value: bytes, start: int, header: dict[str, Any], layout: ServedLayout) -> ServedRequest:
    meta, widths = header["__metadata__"], layout.widths
    items = orjson.loads(meta["items"])
    if not isinstance(items, list) or not items or set(map(type, items)) != {str}:
        raise ValueError("items is not a list of ids")
    user, item, context, ctr_K, ctcvr_K = _arrays(value, start, header, len(items), widths)
    return ServedRequest(
        request_id=_text(meta["request_id"]),
        user_id=_text(meta["user_id"]),
        items=items,
        user=user,
        item=item,
        context=context,
        ctr_K=ctr_K,
        ctcvr_K=ctcvr_K,
        model_version=int(meta["model_version"]),
        ts_ms=int(meta["ts"]),
        scored_at_ms=int(meta["scored_at"]),
        degraded=meta["degraded"] == "1",
    )


class _Arrays(NamedTuple):
    """The tensors of one message."""

    user: FeatureBlock
    item: FeatureBlock
    context: FeatureBlock
    ctr_K: Float32
    ctcvr_K: Float32


def _arrays(value: bytes, start: int, header: dict[str, Any], rows: int, widths: Widths) -> _Arrays:
    """Views of the tensors. A header as this module writes it is known as a whole and not checked entry by entry."""
    usual = _usual(rows, widths)
    if len(value) == start + usual.size and header == {**usual.header, "__metadata__": header["__metadata__"]}:
        arrays = [np.ndarray(shape, dtype, value, start + at) for dtype, shape, at in usual.tensors]
        user_ids, item_ids, context_ids, ctr_K, ctcvr_K, user_dense, item_dense, context_dense = arrays
        blocks = (FeatureBlock(user_ids, user_dense), FeatureBlock(item_ids, item_dense))
        return _Arrays(*blocks, FeatureBlock(context_ids, context_dense), ctr_K, ctcvr_K)

    def tensor(name: str, shape: tuple[int, ...], *dtypes: str) -> NDArray[Any]:
        return _tensor(value, start, header[name], shape, dtypes)

    def block(source: str, count: int, at: int) -> FeatureBlock:
        ids = tensor(f"{source}_ids", (count, widths[at]), "I64")
        dense = tensor(f"{source}_dense", (count, widths[at + 3]), *_FLOATS)
        return FeatureBlock(ids, dense.astype(np.float32, copy=False))

    blocks = (block("user", 1, 0), block("item", rows, 1))
    ctr_K, ctcvr_K = tensor("ctr", (rows,), "F32"), tensor("ctcvr", (rows,), "F32")
    return _Arrays(*blocks, block("context", rows, 2), ctr_K, ctcvr_K)


class _Usual(NamedTuple):
    """How this module writes the tensors of a request in float32."""

    header: dict[str, Any]
    tensors: list[tuple[np.dtype[Any], tuple[int, ...], int]]  # type, shape, first byte
    size: int  # bytes of all of them


@lru_cache(maxsize=4096)
def _usual(rows: int, widths: Widths) -> _Usual:
    header: dict[str, Any] = orjson.loads(b"{" + _tensors(rows, widths, "F32"))
    entries = header.values()
    tensors = [(_DTYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"][0]) for e in entries]
    return _Usual(header, tensors, max(e["data_offsets"][1] for e in entries))


def _tensor(
    value: bytes, start: int, entry: dict[str, Any], shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> NDArray[Any]:
    """A view of one tensor, its type, shape and bounds checked."""
    dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
    if dtype not in dtypes or tuple(entry["shape"]) != shape:
        raise ValueError(f"a tensor is {dtype} {entry['shape']}, expected {dtypes[0]} {list(shape)}")
    count = 1
    for size in shape:
        count *= size
    if begin < 0 or end - begin != count * _DTYPES[dtype].itemsize or start + end > len(value):
        raise ValueError(f"a tensor's bytes {begin}:{end} do not fit its shape or the message")
    if count == 0:  # np.frombuffer refuses an empty read at the end of the buffer
        return np.zeros(shape, _DTYPES[dtype])
    return np.frombuffer(value, _DTYPES[dtype], count, start + begin).reshape(shape)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("an id is missing")
    return value
