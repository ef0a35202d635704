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

from stream_scorer.core.served import ServedRequest, raw, row_types

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

    @property
    def first_ms(self) -> int:
        """How long after its impression an unclicked row is emitted, but for the tick."""
        return self.click_window_ms + (self.observation_window_ms if self.together else 0)

    def first_due_ms(self, row: Row) -> int:
        """When the first emission of a row that was shown is due."""
        click_by_ms = row.impression_ms + self.click_window_ms
        if self.together or row.click_ms == NONE or row.click_ms > click_by_ms:
            return self.at_tick(row.impression_ms + self.first_ms)
        return self.at_tick(max(click_by_ms, row.click_ms + self.observation_window_ms))

    def at_tick(self, due_ms: int) -> int:
        """The next multiple of the tick; labels go by the events' own times, whenever their row is emitted."""
        return due_ms + -due_ms % self.tick_ms


class Row:
    """One candidate of one request."""

    __slots__ = ("click_ms", "conversion_ms", "due_ms", "impression_ms", "index", "observed", "stage")

    def __init__(self, index: int, impression_ms: int = NONE, stage: int = 0, due_ms: int = NEVER) -> None:
        """``index``: its place in the request, or `UNKNOWN`. ``stage``: see `Stage`; a row begins as WAITING."""
        self.index = index
        self.stage = stage
        self.observed = 0  # v of the first emission
        self.impression_ms = impression_ms
        self.click_ms = NONE
        self.conversion_ms = NONE
        self.due_ms = due_ms

    @property
    def kinds(self) -> list[str]:
        """Kinds of events heard of."""
        times = {"impression": self.impression_ms, "click": self.click_ms, "conversion": self.conversion_ms}
        return [kind for kind, ts in times.items() if ts != NONE]


def earliest(seen_ms: int, ts_ms: int) -> int:
    """Of what was `seen` (`NONE`: nothing) and another time."""
    return ts_ms if seen_ms == NONE else min(seen_ms, ts_ms)


class Entry:
    """One request: its features once they arrived, and the candidates that were heard of, by item id.

    Most candidates are shown and nothing more is heard of them: they are an impression time in ``shown``, later in
    ``passed``. Any other is a `Row`; a candidate is in one of the three at most.
    """

    __slots__ = ("armed_ms", "closed", "expires_ms", "passed", "places", "rows", "served", "shown")

    def __init__(self, served: ServedRequest | None, expires_ms: int) -> None:
        """``served`` is None while only feedback came. ``closed``: past ``expires_ms``, with unsettled rows only."""
        self.served = served
        self.rows: dict[str, Row] = {}
        self.shown: dict[str, int] = {}  # OPEN
        self.passed: dict[str, int] = {}  # UNCLICKED; empty once closed
        self.expires_ms = expires_ms
        self.armed_ms = NEVER  # the timer outstanding for this entry
        self.closed = False
        self.places: dict[str, int] = {}  # what `find` found; of all in ``shown`` and ``passed``

    def find(self, item: str) -> int | None:
        """A candidate's place in the request (the first, should it come twice); None if it has none, or none yet."""
        place = self.places.get(item)
        if place is None and self.served is not None:
            try:  # a few of many are ever asked for: a table of all of them would cost more than it saves
                place = self.places[item] = self.served.items.index(item)
            except ValueError:
                return None
        return place

    def place(self, item: str) -> int | None:
        """Where a new row lies in the request: `UNKNOWN` until it was served, None when it can have no place."""
        if self.served is None:
            return UNKNOWN
        return None if self.closed else self.find(item)

    def narrow(self, items: list[str]) -> None:
        """Keep the features of these candidates only; ``rows`` of theirs get their new places."""
        if self.served is None:
            raise AssertionError("there is nothing to keep of a request that was not served")
        places = self.places | {item: row.index for item, row in self.rows.items()}
        self.served = keep_rows(self.served, [places[item] for item in items])
        self.places = {item: index for index, item in enumerate(items)}
        for item, row in self.rows.items():
            row.index = self.places[item]


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
    kept = served.rows_K.take(indices)
    return served._replace(items=[served.items[i] for i in indices], user_1=served.user_1.copy(), rows_K=kept)


_ENTRY = struct.Struct("<?qqI")  # closed, expires, armed, rows
_ROW = struct.Struct("<iBBqqqq")
_SERVED = struct.Struct("<IHHHHHHqqq?I")  # K, widths, version, ts, scored_at, degraded, bytes of strings


def pack_rows(entry: Entry) -> bytes:
    """Everything of an entry but its features."""
    names = orjson.dumps([list(entry.rows), entry.shown, entry.passed])
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
    names, entry.shown, entry.passed = orjson.loads(data[end:])
    if served is not None and (entry.shown or entry.passed):
        entry.places = {item: served.items.index(item) for item in (*entry.shown, *entry.passed)}
    for name, (index, stage, observed, impression_ms, click_ms, conversion_ms, due_ms) in zip(
        names, fields, strict=True
    ):
        row = entry.rows[name] = Row(index, impression_ms, stage, due_ms)
        row.observed, row.click_ms, row.conversion_ms = observed, click_ms, conversion_ms
    return entry


def pack_served(served: ServedRequest) -> bytes:
    """A served request as bytes: rows as they lie in memory, then its strings as JSON."""
    names = orjson.dumps([served.request_id, served.user_id, *served.items])
    blocks = (served.user, served.item, served.context)
    widths = [block.ids_NS.shape[1] for block in blocks] + [block.dense_ND.shape[1] for block in blocks]
    times = (served.model_version, served.ts_ms, served.scored_at_ms)
    head = _SERVED.pack(len(served.items), *widths, *times, served.degraded, len(names))
    return b"".join((head, names, served.user_1.tobytes(), served.rows_K.tobytes()))


def unpack_served(data: bytes) -> ServedRequest:
    """The request of `pack_served`; its arrays are views of ``data``."""
    head = _SERVED.unpack_from(data)
    count, widths, (version, ts_ms, scored_at_ms, degraded, names_size) = head[0], head[1:7], head[7:]
    at = _SERVED.size + names_size
    request_id, user_id, *items = orjson.loads(data[_SERVED.size : at])
    types = row_types(widths)
    user_1 = raw(np.frombuffer(data, types.user, 1, at))
    rows_K = raw(np.frombuffer(data, types.candidate, count, at + user_1.nbytes))
    return ServedRequest(request_id, user_id, items, types, user_1, rows_K, version, ts_ms, scored_at_ms, degraded)
