"""Reading ``served`` messages (`stream_scorer.core.served`): one at a time, or a whole poll at once.

`decode_served` takes any safetensors file of the right shapes. `decode_all` reads what this project writes: the end of
the header is a known text, so only the metadata is parsed, and tensors of all messages are gathered and checked
together. Whatever is not like that, or fails a check, goes to `decode_served`, which refuses or accepts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from esmm.batch import FeatureBlock, Float32
from stream_scorer.core.records import Record
from stream_scorer.core.rejects import Reject
from stream_scorer.core.served import (
    DTYPES,
    Candidates,
    RowTypes,
    ServedLayout,
    ServedRequest,
    Widths,
    pack_features,
    raw,
    row_types,
    tensor_header,
)

_FLOATS: Final = ("F32", "F16")
_META: Final = b'{"__metadata__":'


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
        items = _items(meta)
        user, candidates = _tensors(value, start, header, len(items), layout.widths)
        served = _request(meta, items, *pack_features(user, candidates))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return Reject(record, "corrupt", f"not a served message: {type(error).__name__}: {error}")
    if not (_finite(user.dense_ND) and _finite(candidates.item.dense_ND) and _finite(candidates.context.dense_ND)):
        return Reject(record, "nonfinite", "a feature is not finite")
    if not _probabilities(candidates.ctr_K, candidates.ctcvr_K):
        return Reject(record, "nonfinite", "a score is no probability, or ctcvr is above ctr")
    return served


def _finite(values: Float32) -> bool:
    """Whether all are; a sum of squares tells, and only where it overflows each one is asked."""
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)
    return bool(np.isfinite(squares) or np.isfinite(flat).all())


def _probabilities(ctr_K: Float32, ctcvr_K: Float32) -> bool:
    """0 <= ctcvr <= ctr <= 1 everywhere; a comparison with NaN is false."""
    return bool(((ctcvr_K >= 0) & (ctr_K <= 1) & (ctcvr_K <= ctr_K)).all())


def _read_header(value: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin."""
    start = 8 + int.from_bytes(value[:8], "little")
    if start > len(value):
        raise ValueError("the header is longer than the message")
    header = orjson.loads(value[8:start])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("the header has no metadata")  # noqa: TRY004  a message's content, not a caller's mistake
    return header, start


def _items(meta: dict[str, Any]) -> list[str]:
    items = orjson.loads(meta["items"])
    if not isinstance(items, list) or not items:
        raise ValueError("items is not a list of ids")
    "".join(items)  # TypeError unless all are text; the quickest way to ask
    return items


def _request(
    meta: dict[str, Any], items: list[str], types: RowTypes, user_1: NDArray[np.void], rows_K: NDArray[np.void]
) -> ServedRequest:
    request_id, user_id = meta["request_id"], meta["user_id"]
    if not (type(request_id) is type(user_id) is str and request_id and user_id):
        raise ValueError("an id is missing")
    return ServedRequest(
        request_id,
        user_id,
        items,
        types,
        user_1,
        rows_K,
        int(meta["model_version"]),
        int(meta["ts"]),
        int(meta["scored_at"]),
        meta["degraded"] == "1",
    )


def _tensors(
    value: bytes, start: int, header: dict[str, Any], rows: int, widths: Widths
) -> tuple[FeatureBlock, Candidates]:
    """Views of all tensors, each with its type, shape and bounds checked."""

    def tensor(name: str, shape: tuple[int, ...], *dtypes: str) -> NDArray[Any]:
        return _tensor(value, start, header[name], shape, dtypes)

    def block(source: str, count: int, at: int) -> FeatureBlock:
        ids = tensor(f"{source}_ids", (count, widths[at]), "I64")
        dense = tensor(f"{source}_dense", (count, widths[at + 3]), *_FLOATS)
        return FeatureBlock(ids, dense.astype(np.float32, copy=False))

    user, item, context = block("user", 1, 0), block("item", rows, 1), block("context", rows, 2)
    return user, Candidates(item, context, tensor("ctr", (rows,), "F32"), tensor("ctcvr", (rows,), "F32"))


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
    if begin < 0 or end - begin != count * DTYPES[dtype].itemsize or start + end > len(value):
        raise ValueError(f"a tensor's bytes {begin}:{end} do not fit its shape or the message")
    if count == 0:  # np.frombuffer refuses an empty read at the end of the buffer
        return np.zeros(shape, DTYPES[dtype])
    return np.frombuffer(value, DTYPES[dtype], count, start + begin).reshape(shape)


class _Usual(NamedTuple):
    """A message as this project writes it: its metadata, and where its tensors lie."""

    at: int  # which record
    meta: dict[str, Any]
    items: list[str]
    tensors: memoryview


def decode_all(records: Sequence[Record], layout: ServedLayout) -> list[ServedRequest | Reject]:
    """`decode_served` of each, in order; many at once cost a fraction."""
    out: list[ServedRequest | Reject | None] = [None] * len(records)
    for dense in _FLOATS:
        usual = [
            found
            for at, record in enumerate(records)
            if out[at] is None and (found := _usual(at, record.value, layout, dense)) is not None
        ]
        if usual:
            for one, served in zip(usual, _gather(usual, layout.widths, dense), strict=True):
                out[one.at] = served
        if len(usual) == len(records):
            break
    return [decode_served(record, layout) if done is None else done for record, done in zip(records, out, strict=True)]


def _usual(at: int, value: bytes | None, layout: ServedLayout, dense: str) -> _Usual | None:
    """The message taken apart, or None when it is not as this project writes it with ``dense`` features."""
    if not value:
        return None
    start = 8 + int.from_bytes(value[:8], "little")
    fixed, each = _sizes(layout.widths, dense)
    rows, odd = divmod(len(value) - start - fixed, each)
    if odd or rows < 1:
        return None
    header, tail = value[8:start].rstrip(b" "), tensor_header(rows, layout.widths, dense)
    if not header.startswith(_META) or not header.endswith(b"," + tail):
        return None
    try:
        meta = orjson.loads(header[len(_META) : -len(tail) - 1])  # without the comma before the tensors
        if meta["schema"] != layout.schema_hash:
            return None
        items = _items(meta)
    except (KeyError, TypeError, ValueError):
        return None
    return _Usual(at, meta, items, memoryview(value)[start:]) if len(items) == rows else None


def _sizes(widths: Widths, dense: str) -> tuple[int, int]:
    """Bytes of the user's tensors, and of all others a candidate."""
    size = DTYPES[dense].itemsize
    user = 8 * widths[0] + size * widths[3]
    return user, 8 * (widths[1] + widths[2]) + 4 + 4 + size * (widths[4] + widths[5])


def _gather(usual: Sequence[_Usual], widths: Widths, dense: str) -> list[ServedRequest | None]:
    """The requests of these messages; all None when one of them has values that must be looked at one by one."""
    counts = [len(one.items) for one in usual]
    total = sum(counts)
    types = row_types(widths)
    users, rows = np.empty(len(usual), types.user), np.empty(total, types.candidate)
    size, floats = DTYPES[dense].itemsize, DTYPES[dense]
    places = (  # in the order of the message's tensors: into what, bytes a row, whether a row is a candidate
        (users["ids"], 8 * widths[0], False, DTYPES["I64"]),
        (rows["item_ids"], 8 * widths[1], True, DTYPES["I64"]),
        (rows["context_ids"], 8 * widths[2], True, DTYPES["I64"]),
        (rows["ctr"], 4, True, DTYPES["F32"]),
        (rows["ctcvr"], 4, True, DTYPES["F32"]),
        (users["dense"], size * widths[3], False, floats),
        (rows["item_dense"], size * widths[4], True, floats),
        (rows["context_dense"], size * widths[5], True, floats),
    )
    ends = [0] * len(usual)
    for into, width, candidate, dtype in places:
        if not width:
            continue
        begins = ends
        ends = [begin + width * (count if candidate else 1) for begin, count in zip(begins, counts, strict=True)]
        parts = [one.tensors[begin:end] for one, begin, end in zip(usual, begins, ends, strict=True)]
        flat = np.frombuffer(b"".join(parts), dtype)
        if dtype is floats and not _finite(flat.astype(np.float32, copy=False)):
            return [None] * len(usual)
        into[...] = flat.reshape(into.shape)
    if not _probabilities(rows["ctr"], rows["ctcvr"]):
        return [None] * len(usual)
    stops = np.cumsum(counts).tolist()
    raw_users, raw_rows = raw(users), raw(rows)
    return [
        _read_usual(one, types, raw_users[at : at + 1], raw_rows[stop - count : stop])
        for at, (one, count, stop) in enumerate(zip(usual, counts, stops, strict=True))
    ]


def _read_usual(
    one: _Usual, types: RowTypes, user_1: NDArray[np.void], rows_K: NDArray[np.void]
) -> ServedRequest | None:
    try:
        return _request(one.meta, one.items, types, user_1, rows_K)
    except (KeyError, TypeError, ValueError):
        return None
