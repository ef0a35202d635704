"""Decoding never raises, whatever the bytes; what was encoded comes back equal."""

from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from esmm.batch import FeatureBlock
from stream_scorer.core.assemble import assemble, plan
from stream_scorer.core.codec import (
    ScoredBatch,
    decode_feedback,
    decode_request,
    encode_feedback,
    encode_request,
    encode_scores,
)
from stream_scorer.core.context import check_context, slots_by_name
from stream_scorer.core.messages import Feedback, ScoreMessage, ScoreRequest
from stream_scorer.core.packed import decode_records, encode_records, record_dtype
from stream_scorer.core.rejects import Reject, reject_record
from stream_scorer.core.served import ServedRequest, encode_served
from stream_scorer.core.served_read import decode_served
from tests.builders import CONTEXT, ITEM, LAYOUT, LIMITS, NOW_MS, fetched, record, request, scores

IDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from([*slots_by_name(CONTEXT), "unknown"])
INT64 = st.integers(-(2**63), 2**63 - 1)
FIELDS = ["request_id", "user_id", "items", "ts", "context", "item_context", "schema_version", "extra"]


@st.composite
def requests(draw: st.DrawFn) -> ScoreRequest:
    """A request whose context fits."""
    items = draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    one = {
        "hour": INT64,
        "position": INT64,
        "recent": st.lists(INT64, max_size=3),
        "recent_length": st.integers(0, 2**63 - 1),
        "speed": number,
        "place": st.lists(number, min_size=2, max_size=2),
    }
    where = {name: draw(st.sampled_from(["", "request", "row"])) for name in one}
    context = {name: draw(one[name]) for name in one if where[name] == "request"}
    item_context = {name: [draw(one[name]) for _ in items] for name in one if where[name] == "row"}
    return request(
        draw(IDS), items, user_id=draw(IDS), ts=draw(st.integers(0, 2**53 - 1)),
        context=context, item_context=item_context,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(given_request=requests())
def test_a_request_comes_back_equal(given_request: ScoreRequest) -> None:
    assert decode_request(record(encode_request(given_request)), LIMITS) == given_request


@settings(max_examples=300, deadline=None)
@given(
    value=st.binary(max_size=200)
    | JSON.map(
        lambda data: (
            orjson.dumps(data, option=orjson.OPT_PASSTHROUGH_SUBCLASS)
            if _fits(data)
            else repr(data).encode(errors="replace")
        )
    )
)
def test_any_bytes_are_a_value_or_a_reject(value: bytes) -> None:
    for decoded in (
        decode_request(record(value), LIMITS),
        decode_feedback(record(value)),
        decode_served(record(value), LAYOUT),
    ):
        if isinstance(decoded, Reject):
            assert reject_record(decoded, "score-rejects", "1").value == value


def _fits(data: Any) -> bool:
    try:
        orjson.dumps(data)
    except (TypeError, UnicodeEncodeError, orjson.JSONEncodeError):
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(given_request=requests(), field=st.sampled_from(FIELDS), value=JSON, name=NAMES, at_row=st.booleans())
def test_a_request_with_one_field_of_anything(
    given_request: ScoreRequest, field: str, value: Any, name: str, at_row: bool
) -> None:
    data = given_request.model_dump()
    if field == "context":
        data["context"] = {name: value}
    elif field == "item_context":
        data["item_context"] = {name: [value] * len(data["items"]) if at_row else value}
    else:
        data[field] = value
    if not _fits(data):
        return
    decoded = decode_request(record(orjson.dumps(data)), LIMITS)
    if isinstance(decoded, Reject):
        reject_record(decoded, "score-rejects", "1")
    else:  # whatever is let in can be assembled, scored and published
        assert check_context(decoded, LIMITS.context_slots) is None
        publish([decoded])


def publish(given_requests: list[ScoreRequest]) -> tuple[ScoredBatch, list[bytes], list[bytes]]:
    """Assemble, score and encode."""
    batch_plan = plan(given_requests)
    features = fetched(batch_plan)
    batch = assemble(given_requests, batch_plan, features, CONTEXT)
    assert np.isfinite(batch.context.dense_ND).all()
    scored = ScoredBatch(given_requests, batch_plan, batch, features, scores(batch_plan.rows), NOW_MS)
    return scored, encode_scores(scored), encode_served(scored, LAYOUT, 3, "float32")


@settings(max_examples=150, deadline=None)
@given(given_requests=st.lists(requests(), min_size=1, max_size=4))
def test_scores_and_served_say_what_was_scored(given_requests: list[ScoreRequest]) -> None:
    scored, bodies, served = publish(given_requests)
    for at, one in enumerate(given_requests):
        start, stop = scored.plan.starts[at : at + 2]
        message = ScoreMessage.model_validate_json(bodies[at])
        assert (message.request_id, message.user_id, message.items, message.ts) == (
            one.request_id, one.user_id, one.items, one.ts,
        )  # fmt: skip
        assert np.float32(message.ctr).tolist() == scored.scores.ctr_B[start:stop].tolist()
        assert all(0 <= ctcvr <= ctr <= 1 for ctr, ctcvr in zip(message.ctr, message.ctcvr, strict=True))
        decoded = decode_served(record(served[at]), LAYOUT)
        assert isinstance(decoded, ServedRequest)
        assert (decoded.request_id, decoded.user_id) == (one.request_id, one.user_id)
        assert len(decoded.items) == min(3, len(one.items))
        rows = [start + one.items.index(item) for item in decoded.items]
        np.testing.assert_array_equal(decoded.context.ids_NS, scored.batch.context.ids_NS[rows])
        np.testing.assert_array_equal(decoded.item.ids_NS, scored.batch.item.ids_NS[scored.batch.item_of_B[rows]])
        assert decoded.ctcvr_K.min() >= np.sort(scored.scores.ctcvr_B[start:stop])[-len(rows)]


SERVED = publish([request("r1", ["a", "b", "c"])])[2][0]


@settings(max_examples=400, deadline=None)
@given(at=st.integers(0, len(SERVED) - 1), bytes_=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_a_damaged_served_message_never_raises(at: int, bytes_: bytes, cut: bool) -> None:
    damaged = SERVED[:at] if cut else SERVED[:at] + bytes_ + SERVED[at + len(bytes_) :]
    decoded = decode_served(record(damaged), LAYOUT)
    if cut:
        assert isinstance(decoded, Reject)
    elif isinstance(decoded, ServedRequest):
        assert all(np.isfinite(part.dense_ND).all() for part in (decoded.user, decoded.item, decoded.context))
        assert len(decoded.items) == len(decoded.ctr_K) == decoded.item.rows == decoded.context.rows


@settings(max_examples=100, deadline=None)
@given(
    feedback=st.builds(
        Feedback,
        event_id=IDS,
        kind=st.sampled_from(["impression", "click", "conversion"]),
        request_id=IDS,
        user_id=IDS,
        item_id=IDS,
        ts=st.integers(0, 2**53 - 1),
        schema_version=st.just(1),
    )
)
def test_feedback_comes_back_equal(feedback: Feedback) -> None:
    assert decode_feedback(record(encode_feedback(feedback))) == feedback


VALUES = st.lists(
    st.none() | st.binary(max_size=8) | st.binary(min_size=36, max_size=36) | st.integers(0, 999), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(values=VALUES)
def test_packed_records_among_rubbish(values: list[Any]) -> None:
    """An int stands for a good record with that id."""
    assert record_dtype(ITEM).itemsize == 36
    good = [value for value in values if isinstance(value, int)]
    block = FeatureBlock(np.array(good, np.int64).reshape(-1, 1), np.array(good, np.float32).reshape(-1, 1))
    encoded = iter(encode_records(ITEM, block, np.array(good, np.int64) + 1))
    rows = decode_records(ITEM, [next(encoded) if isinstance(value, int) else value for value in values])
    assert (~rows.missing_N).tolist() == [isinstance(value, int) for value in values]
    want = [value if isinstance(value, int) else 0 for value in values]
    assert rows.block.ids_NS[:, 0].tolist() == want
    assert rows.block.dense_ND[:, 0].tolist() == want
    assert rows.event_ms_N.tolist() == [value + 1 if isinstance(value, int) else 0 for value in values]
    assert sum(rows.reasons().values()) == len(values) - len(good)
