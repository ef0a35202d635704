"""What the join remembers: one `Entry` a request, one `Row` a candidate that anything was heard of.

Features are kept once a request (`Entry.served`), never per row. Times are event times in milliseconds; `NONE` is "not
seen", `NEVER` is later than any time. An entry packs to bytes and back without loss, for states that live on disk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

import numpy as np
import orjson

from esmm.batch import FeatureBlock
from stream_scorer.core.served import ServedRequest

NONE: Final = -1
NEVER: Final = 1 << 62
UNKNOWN: Final = -1  # the row's place in its request while `served` has not arrived


class Stage(IntEnum):
    """Where a row is in its life; it only moves down this list, and ends when it is forgotten."""

    WAITING = 0  # no impression yet, or `served` has not arrived
    OPEN = 1  # shown; the first emission is due at ``due_ms``
    CLICKED = 2  # first emission made with a click; matures at ``due_ms``
    UNCLICKED = 3  # first emission made without a click; remembered until the request is forgotten
    MATURE = 4  # final label emitted; remembered until ``due_ms`` so that what comes later still has a name


@dataclass(frozen=True, slots=True)
class JoinPolicy:
    """Windows in event time, milliseconds (DESIGN.md section 7)."""

    click_window_ms: int = 600_000
    observation_window_ms: int = 3_600_000
    attribution_window_ms: int = 864_000_000
    served_ttl_ms: int = 3_600_000  # an impression later than this after its request is not learned from
    held_ttl_ms: int = 3_600_000  # feedback waits this long for its `served`; a matured row is remembered this long
    max_held: int = 1_000_000  # requests known only by their feedback; more are refused and counted
    together: bool = False  # first emissions of clicked and unclicked rows wait equally long
    tick_ms: int = 1  # what falls due is due at the next multiple of it, so that a page's rows are emitted together

    def __post_init__(self) -> None:
        """Refuse windows that contradict one another."""
        windows = (self.click_window_ms, self.observation_window_ms, self.served_ttl_ms, self.held_ttl_ms)
        if min(windows) < 0 or self.tick_ms < 1:
            raise ValueError(f"join windows must not be negative: {self}")
        if self.attribution_window_ms < self.observation_window_ms:
            raise ValueError(
                f"attribution window ({self.attribution_window_ms} ms) must not be shorter than the observation window "
                f"({self.observation_window_ms} ms)"
            )


class Row:
    """One candidate of one request."""

    __slots__ = ("click_ms", "conversion_ms", "due_ms", "impression_ms", "index", "observed", "stage")

    def __init__(self, index: int, impression_ms: int = NONE) -> None:
        """Nothing is known of it but its ``index`` in the request (or `UNKNOWN`), and when it was shown if it was."""
        self.index = index
        self.stage = 0  # WAITING
        self.observed = 0  # v of the first emission
        self.impression_ms = impression_ms
        self.click_ms = NONE
        self.conversion_ms = NONE
        self.due_ms = NEVER


class Entry:
    """One request: its features once they arrived, and the rows that were heard of, by item id."""

    __slots__ = ("armed_ms", "closed", "expires_ms", "rows", "served")

    def __init__(self, served: ServedRequest | None, expires_ms: int) -> None:
        """``served`` is None while only feedback came. ``closed``: past ``expires_ms``, with unsettled rows only."""
        self.served = served
        self.rows: dict[str, Row] = {}
        self.expires_ms = expires_ms
        self.armed_ms = NEVER  # the timer outstanding for this entry
        self.closed = False

    def next_due_ms(self) -> int:
        """When something has to be done about it next."""
        due = NEVER if self.closed else self.expires_ms
        for row in self.rows.values():
            due = min(due, row.due_ms)
        return due


class JoinStore(Protocol):
    """Where entries and timers live. Entries change in place and are then `put`; timers may be stale (``armed_ms``)."""

    def get(self, request_id: str) -> Entry | None:
        """The entry, or None."""
        ...

    def put(self, request_id: str, entry: Entry) -> None:
        """Keep a new or changed entry."""
        ...

    def delete(self, request_id: str) -> None:
        """Forget an entry that exists."""
        ...

    def arm(self, due_ms: int, request_id: str) -> None:
        """Remember to look at this request when the watermark passes ``due_ms``; twice the same may count once."""
        ...

    def next_due_ms(self) -> int:
        """The earliest timer, or `NEVER`."""
        ...

    def pop_due(self) -> tuple[int, str]:
        """Take the earliest timer, ties by request id."""
        ...


def keep_rows(served: ServedRequest, indices: list[int]) -> ServedRequest:
    """The request with only these candidates, in this order, in memory of its own."""
    at = np.array(indices, np.int64)
    return served._replace(
        items=[served.items[i] for i in indices],
        user=FeatureBlock(served.user.ids_NS.copy(), served.user.dense_ND.copy()),
        item=served.item.take(at),
        context=served.context.take(at),
        ctr_K=served.ctr_K[at],
        ctcvr_K=served.ctcvr_K[at],
    )


_ENTRY = struct.Struct("<?qqI")  # closed, expires, armed, rows
_ROW = struct.Struct("<iBBqqqq")
_SERVED = struct.Struct("<IHHHHHHqqq?I")  # K, six widths, version, ts, scored_at, degraded, bytes of strings


def pack_rows(entry: Entry) -> bytes:
    """Everything of an entry but its features."""
    names = orjson.dumps(list(entry.rows))
    rows = b"".join(
        _ROW.pack(r.index, r.stage, r.observed, r.impression_ms, r.click_ms, r.conversion_ms, r.due_ms)
        for r in entry.rows.values()
    )
    return _ENTRY.pack(entry.closed, entry.expires_ms, entry.armed_ms, len(entry.rows)) + rows + names


def unpack_rows(data: bytes, served: ServedRequest | None) -> Entry:
    """The entry of `pack_rows`."""
    closed, expires_ms, armed_ms, count = _ENTRY.unpack_from(data)
    entry = Entry(served, expires_ms)
    entry.closed, entry.armed_ms = closed, armed_ms
    end = _ENTRY.size + count * _ROW.size
    fields = _ROW.iter_unpack(data[_ENTRY.size : end])
    for name, packed in zip(orjson.loads(data[end:]), fields, strict=True):
        row = Row(packed[0])
        row.stage, row.observed, row.impression_ms, row.click_ms, row.conversion_ms, row.due_ms = packed[1:]
        entry.rows[name] = row
    return entry


def pack_served(served: ServedRequest) -> bytes:
    """A served request as bytes: arrays raw and little-endian, then its strings as JSON."""
    names = orjson.dumps([served.request_id, served.user_id, *served.items])
    blocks = (served.user, served.item, served.context)
    widths = [w for b in blocks for w in (b.ids_NS.shape[1], b.dense_ND.shape[1])]
    times = (served.model_version, served.ts_ms, served.scored_at_ms)
    head = _SERVED.pack(len(served.items), *widths, *times, served.degraded, len(names))
    arrays = [a for b in blocks for a in (b.ids_NS.astype("<i8"), b.dense_ND.astype("<f4"))]
    arrays += [served.ctr_K.astype("<f4"), served.ctcvr_K.astype("<f4")]
    return b"".join([head, names, *(a.tobytes() for a in arrays)])


def unpack_served(data: bytes) -> ServedRequest:
    """The request of `pack_served`; its arrays are views of ``data``."""
    count, *widths, version, ts_ms, scored_at_ms, degraded, names_size = _SERVED.unpack_from(data)
    at = _SERVED.size + names_size
    request_id, user_id, *items = orjson.loads(data[_SERVED.size : at])
    blocks: list[FeatureBlock] = []
    for rows, ids_width, dense_width in zip((1, count, count), widths[::2], widths[1::2], strict=True):
        ids = np.frombuffer(data, "<i8", rows * ids_width, at).reshape(rows, ids_width)
        at += ids.nbytes
        dense = np.frombuffer(data, "<f4", rows * dense_width, at).reshape(rows, dense_width)
        at += dense.nbytes
        blocks.append(FeatureBlock(ids, dense))
    ctr = np.frombuffer(data, "<f4", count, at)
    ctcvr = np.frombuffer(data, "<f4", count, at + ctr.nbytes)
    return ServedRequest(
        request_id=request_id, user_id=user_id, items=items, user=blocks[0], item=blocks[1], context=blocks[2],
        ctr_K=ctr, ctcvr_K=ctcvr, model_version=version, ts_ms=ts_ms, scored_at_ms=scored_at_ms, degraded=degraded,
    )  # fmt: skip
