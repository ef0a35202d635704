"""Small served requests and feedback events, and the brute-force join that the real one is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from esmm.batch import FeatureBlock, Kind
from stream_scorer.core.codec import encode_feedback
from stream_scorer.core.emit import Emission
from stream_scorer.core.heard import hear
from stream_scorer.core.inbox import Inbox
from stream_scorer.core.join import Joiner
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import Position, Record, TopicPartition
from stream_scorer.core.served import Candidates, ServedRequest, pack_features
from stream_scorer.core.watermark import Watermark, WatermarkPolicy

SERVED, FEEDBACK = TopicPartition("served", 0), TopicPartition("feedback", 0)
_numbers = count()


def served_request(request_id: str, ts: int, items: tuple[str, ...] = ("i0", "i1", "i2")) -> ServedRequest:
    """Features that say whose they are: item ids hold the candidate's place, context the request's time."""
    rows = len(items)
    place = np.arange(rows)
    candidates = Candidates(
        item=FeatureBlock(place[:, None].astype(np.int64) + 10, place[:, None].astype(np.float32)),
        context=FeatureBlock(np.full((rows, 1), ts, np.int64), np.zeros((rows, 0), np.float32)),
        ctr_K=(0.1 + 0.01 * place).astype(np.float32),
        ctcvr_K=(0.01 + 0.001 * place).astype(np.float32),
    )
    user = FeatureBlock(np.array([[ts, 1]], np.int64), np.array([[0.5]], np.float32))
    types, user_1, rows_K = pack_features(user, candidates)
    return ServedRequest(
        request_id=request_id,
        user_id=f"u-{request_id}",
        items=list(items),
        types=types,
        user_1=user_1,
        rows_K=rows_K,
        model_version=1,
        ts_ms=ts,
        scored_at_ms=ts + 3,
        degraded=False,
    )


def page(request_id: str, ts: int, items: list[str]) -> Feedback:
    """Several impressions in one message."""
    return Feedback(
        event_id=f"e{next(_numbers)}", kind="impression", request_id=request_id, user_id="u", items=items, ts=ts
    )


def feedback(kind: str, request_id: str, ts: int, item: str = "i0") -> Feedback:
    """One event."""
    return Feedback(
        event_id=f"e{next(_numbers)}", kind=kind, request_id=request_id, user_id=f"u-{request_id}", item_id=item, ts=ts
    )


def joiner(policy: JoinPolicy, store, lateness_ms: int = 0) -> Joiner:
    """A joiner that waits for both topics' only partition, and believes every clock."""
    watermark = Watermark(WatermarkPolicy(lateness_ms=lateness_ms, idle_ms=1 << 50, max_jump_ms=1 << 60))
    watermark.assign([SERVED, FEEDBACK])
    return Joiner(policy, store, watermark)


def send(join: Joiner, event: ServedRequest | Feedback) -> None:
    """To the right door."""
    assert join.take_in(join.arrivals(inbox([event])), 1 << 60) in (
        None,
        event.ts if isinstance(event, Feedback) else event.ts_ms,
    )


def inbox(events: Sequence[ServedRequest | Feedback]) -> Inbox:
    """As one turn of the trainer; records have the time of their events."""
    heard = [
        hear(Record(Position("feedback", 0, 0), None, encode_feedback(e), (), e.ts, 0))
        if isinstance(e, Feedback)
        else e
        for e in events
    ]
    where = [FEEDBACK if isinstance(e, Feedback) else SERVED for e in events]
    times = [event.ts_ms for event in heard]
    return Inbox(heard, where, times, times, [])


def rows_of(emissions: list[Emission]) -> Counter[tuple[object, ...]]:
    """What was emitted, order aside."""
    return Counter((row[0], row[1], *row[3:]) for row in rows_in_order(emissions))


def rows_in_order(emissions: Iterable[Emission]) -> list[tuple[object, ...]]:
    """Request, item, time of the request, kind, click, conversion, observed and impression of each row."""
    return [
        (e.served.request_id, e.served.items[place], e.served.ts_ms, Kind(e.kind).name, *e[3:6], impression_ms)
        for e in emissions
        for place, impression_ms in zip(e.places, e.impression_ms, strict=True)
    ]


def brute_force(policy: JoinPolicy, served: list[ServedRequest], events: list[Feedback]) -> Counter[tuple[object, ...]]:
    """The definition at the top of core/join.py, over everything that ever happens."""
    out: Counter[tuple[object, ...]] = Counter()
    for request in {s.request_id: s for s in reversed(served)}.values():
        for item in request.items:
            mine = [e for e in events if e.request_id == request.request_id and item in (e.item_id, *e.items)]
            impression, click, conversion = (
                min((e.ts for e in mine if e.kind == kind), default=None)
                for kind in ("impression", "click", "conversion")
            )
            if impression is None or impression > request.ts_ms + policy.served_ttl_ms:
                continue
            row = (request.request_id, item)
            if click is None or click > impression + policy.click_window_ms:
                out[(*row, "FIRST", 0, 0, 0, impression)] += 1
                continue
            delay = None if conversion is None else max(0, conversion - click)
            seen = int(delay is not None and delay <= policy.observation_window_ms)
            converts = int(delay is not None and delay <= policy.attribution_window_ms)
            out[(*row, "FIRST", 1, seen, seen, impression)] += 1
            out[(*row, "MATURED", 1, converts, seen, impression)] += 1
            if converts and not seen:
                out[(*row, "LATE_CONVERSION", 1, 1, 0, impression)] += 1
    return out
