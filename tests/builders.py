"""Values for tests: each call states only what matters to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from esmm.batch import FeatureBlock, Scores, Slot, SourceLayout
from stream_scorer.core.assemble import BatchPlan, first_seen
from stream_scorer.core.codec import RequestLimits
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.output import OutputPolicy
from stream_scorer.core.records import FeatureRows, Fetched, Position, Record
from stream_scorer.core.served import ServedLayout

NOW_MS = 1_700_000_000_000
USER = SourceLayout(
    "user", (Slot("user_id", "sparse", 0, 1), Slot("history", "varlen", 1, 4)), (Slot("affinity", "dense", 0, 2),)
)
ITEM = SourceLayout("item", (Slot("item_id", "sparse", 0, 1),), (Slot("price", "dense", 0, 1),))
CONTEXT = SourceLayout(
    "context",
    (
        Slot("hour", "sparse", 0, 1),
        Slot("position", "sparse", 1, 2),
        Slot("recent", "varlen", 2, 5),
        Slot("recent_length", "length", 5, 6),
    ),
    (Slot("speed", "dense", 0, 1), Slot("place", "dense", 1, 3)),
)
LAYOUT = ServedLayout(USER, ITEM, CONTEXT, "0123456789abcdef")
LIMITS = RequestLimits(CONTEXT)
OUTPUT = OutputPolicy("scores", "score-rejects", "served", LAYOUT, code_version="0.1.0")


def request_dict(request_id: str = "r1", items: Sequence[str] = ("i1", "i2"), **fields: Any) -> dict[str, Any]:
    """A request as JSON data."""
    return {"request_id": request_id, "user_id": "u1", "items": list(items), "ts": NOW_MS, **fields}


def request(request_id: str = "r1", items: Sequence[str] = ("i1", "i2"), **fields: Any) -> ScoreRequest:
    """A decoded request."""
    return ScoreRequest.model_validate(request_dict(request_id, items, **fields))


def request_bytes(request_id: str = "r1", items: Sequence[str] = ("i1", "i2"), **fields: Any) -> bytes:
    """A request on the wire."""
    return orjson.dumps(request_dict(request_id, items, **fields))


def record(value: bytes | None, offset: int = 0, partition: int = 0, epoch: int = 1, **fields: Any) -> Record:
    """A record as read."""
    position = Position(fields.pop("topic", "score-requests"), partition, offset)
    defaults = {"key": b"u1", "headers": (), "timestamp_ms": NOW_MS}
    return Record(position=position, value=value, epoch=epoch, **(defaults | fields))


def rows(layout: SourceLayout, count: int, seed: int = 0, missing: Sequence[int] = ()) -> FeatureRows:
    """Random features of ``count`` entities, recorded one to ``count`` seconds before NOW_MS; some missing."""
    rng = np.random.default_rng(seed)
    block = FeatureBlock(
        rng.integers(0, 1000, (count, layout.id_width)), rng.normal(size=(count, layout.dense_width)).astype(np.float32)
    )
    event_ms = NOW_MS - 1000 * np.arange(1, count + 1)
    gone = np.zeros(count, np.bool_)
    gone[list(missing)] = True
    block.ids_NS[gone] = 0
    block.dense_ND[gone] = 0
    event_ms[gone] = 0
    return FeatureRows(block, event_ms, gone, np.full(count, -1), np.zeros(count, np.int64))


def fetched(asked: BatchPlan, degraded: bool = False, **missing: Sequence[int]) -> Fetched:
    """A fetch; ``missing_users`` and ``missing_items`` list rows with the default vector."""
    users, user_of_R = first_seen(asked.users)
    items, item_of_B = first_seen(asked.items)
    return Fetched(
        rows(USER, len(users), 1, missing.get("missing_users", ())),
        rows(ITEM, len(items), 2, missing.get("missing_items", ())),
        degraded,
        user_of_R,
        item_of_B,
    )


def scores(rows_B: int, version: int = 3, seed: int = 0) -> Scores:
    """Random valid scores."""
    ctr, cvr = np.random.default_rng(seed).random((2, rows_B), dtype=np.float32)
    return Scores(ctr, cvr, ctr * cvr, version)
