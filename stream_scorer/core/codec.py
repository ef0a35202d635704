"""Bytes to values and back: score requests, scores, feedback. ``served`` has its own module.

Decoding never raises: a message that cannot be used is a `Reject`, a value that says why.
Shapes: R requests, B candidate rows, I unique items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import orjson
from pydantic import ValidationError

from esmm.batch import Bool, Int64, RankBatch, Scores, Slot, SourceLayout
from stream_scorer.core.assemble import BatchPlan
from stream_scorer.core.context import check_context, slots_by_name
from stream_scorer.core.errors import FatalError
from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.core.records import FeatureRows, Fetched, Record
from stream_scorer.core.rejects import Reason, Reject

NUMPY = orjson.OPT_SERIALIZE_NUMPY
ROUNDING = 1e-5  # relative: how far ctcvr may stand above ctr in float32
MANY_PROBLEMS = 100  # past this the problems of one message are not even listed: listing costs more than refusing
FEEDBACK_BYTES = 100_000  # of one message, a page at most


@dataclass(frozen=True)
class RequestLimits:
    """What a request may be. ``context`` is the model's context layout."""

    context: SourceLayout
    max_bytes: int = 1_000_000
    max_items: int = 2_000

    @cached_property
    def context_slots(self) -> dict[str, Slot]:
        """Context features by name."""
        return slots_by_name(self.context)


class ScoredBatch(NamedTuple):
    """A batch with its scores: everything the output messages are made of."""

    requests: Sequence[ScoreRequest]  # R
    plan: BatchPlan
    batch: RankBatch
    fetched: Fetched
    scores: Scores
    scored_at_ms: int


def decode_request(record: Record, limits: RequestLimits) -> ScoreRequest | Reject:
    """Validate a request straight from its bytes; see `rejects.Reason` for what it may be refused for."""
    value = record.value
    if not value:
        return Reject(record, "empty", "the message has no value")
    if len(value) > limits.max_bytes:
        return Reject(record, "too_large", f"{len(value)} bytes, at most {limits.max_bytes} are allowed")
    try:
        request = ScoreRequest.model_validate_json(value)
    except ValidationError as error:
        return _refused(record, error)
    items = request.items
    if len(items) > limits.max_items:
        return Reject(record, "too_many_items", f"{len(items)} items, at most {limits.max_items} are allowed")
    if len(set(items)) != len(items):
        return Reject(record, "duplicate_item", "an item is listed twice")
    if (request.context or request.item_context) and (problem := check_context(request, limits.context_slots)):
        return Reject(record, problem.reason, problem.detail)
    return request


def decode_feedback(record: Record, max_bytes: int = FEEDBACK_BYTES) -> Feedback | Reject:
    """Validate one feedback message straight from its bytes."""
    value = record.value
    if not value:
        return Reject(record, "empty", "the message has no value")
    if len(value) > max_bytes:
        return Reject(record, "too_large", f"{len(value)} bytes, at most {max_bytes} are allowed")
    try:
        return Feedback.model_validate_json(value)
    except ValidationError as error:
        return _refused(record, error)


def encode_feedback(feedback: Feedback) -> bytes:
    """JSON that `decode_feedback` reads back to an equal value."""
    return feedback.model_dump_json(exclude={"item_id"} if feedback.items else {"items"}).encode()


def encode_request(request: ScoreRequest) -> bytes:
    """JSON that `decode_request` reads back to an equal value; empty context is left out."""
    return request.model_dump_json(exclude_defaults=True).encode()


def _refused(record: Record, error: ValidationError) -> Reject:
    """Say the first thing that is wrong, without repeating the value."""
    if error.error_count() > MANY_PROBLEMS:
        return Reject(record, "schema", f"{error.error_count()} fields or values are wrong")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return Reject(record, "json", str(first["msg"]))
    reason: Reason = "timestamp" if where == "ts" else "schema"
    return Reject(record, reason, f"{where}: {first['msg']}" if where else str(first["msg"]))


def valid_scores(scores: Scores, rows: int) -> Bool:
    """Which of B rows hold probabilities with ``0 <= ctcvr <= ctr <= 1``, all finite: the check at the model's door.

    Raises FatalError when the model returned another number of rows or no version: then no row can be trusted.
    """
    shapes = {scores.ctr_B.shape, scores.cvr_B.shape, scores.ctcvr_B.shape}
    if shapes != {(rows,)}:
        raise FatalError(f"model version {scores.model_version} returned shapes {sorted(shapes)} for {rows} rows")
    if scores.model_version < 0:
        raise FatalError(f"scores carry no model version ({scores.model_version})")
    ctr, cvr, ctcvr = scores.ctr_B, scores.cvr_B, scores.ctcvr_B
    # a comparison with NaN is false, so finiteness needs no pass of its own
    return (ctr <= 1) & (cvr >= 0) & (cvr <= 1) & (ctcvr >= 0) & (ctcvr <= ctr * np.float32(1 + ROUNDING))


def encode_scores(scored: ScoredBatch) -> list[bytes]:
    """One `ScoreMessage` in JSON a request, columnar; every row must have passed `valid_scores`."""
    scores, starts = scored.scores, scored.plan.starts.tolist()
    ctcvr_B = np.minimum(scores.ctcvr_B, scores.ctr_B)  # float32 rounding must not break ctcvr <= ctr
    ctr_B, cvr_B = np.ascontiguousarray(scores.ctr_B), np.ascontiguousarray(scores.cvr_B)
    ages = feature_age_ms(scored).tolist()
    missing = missing_rows(scored.plan, scored.fetched)
    message: dict[str, Any] = {
        "schema_version": 1,
        "model_version": scores.model_version,
        "degraded": scored.fetched.degraded,
        "scored_at": scored.scored_at_ms,
    }
    out = []
    for at, request in enumerate(scored.requests):
        start, stop = starts[at], starts[at + 1]
        message["request_id"] = request.request_id
        message["user_id"] = request.user_id
        message["items"] = request.items
        message["ctr"] = ctr_B[start:stop]
        message["cvr"] = cvr_B[start:stop]
        message["ctcvr"] = ctcvr_B[start:stop]
        message["missing"] = missing[at]
        message["feature_age_ms"] = ages[at]
        message["ts"] = request.ts
        out.append(orjson.dumps(message, option=NUMPY))
    return out


def missing_rows(plan: BatchPlan, fetched: Fetched) -> list[list[int]]:
    """Per request: -1 when the user's features were missing, then the positions of candidates whose were."""
    user_R = fetched.users.missing_N[fetched.user_of_R]
    item_B = fetched.items.missing_N[fetched.item_of_B]
    out: list[list[int]] = [[-1] if user else [] for user in user_R.tolist()]
    if item_B.any():
        rows = np.flatnonzero(item_B)
        request = np.searchsorted(plan.starts, rows, side="right") - 1
        for at, position in zip(request.tolist(), (rows - plan.starts[request]).tolist(), strict=True):
            out[at].append(position)
    return out


def feature_age_ms(scored: ScoredBatch) -> Int64:
    """Age at ``scored_at`` of the oldest feature record a request used, R values; -1 when none was found."""
    none = np.iinfo(np.int64).max
    oldest_B = _event_ms(scored.fetched.items, none)[scored.fetched.item_of_B]
    oldest_R = np.minimum.reduceat(oldest_B, scored.plan.starts[:-1]) if len(oldest_B) else np.zeros(0, np.int64)
    oldest_R = np.minimum(oldest_R, _event_ms(scored.fetched.users, none)[scored.fetched.user_of_R])
    return np.where(oldest_R == none, -1, np.maximum(scored.scored_at_ms - oldest_R, 0))


def _event_ms(rows: FeatureRows, missing: int) -> Int64:
    return np.where(rows.missing_N, missing, rows.event_ms_N)
