import time

import numpy as np
import orjson
import pytest

from esmm.batch import RankBatch, Scores, Slot, SourceLayout
from stream_scorer.core.assemble import assemble, plan
from stream_scorer.core.codec import (
    RequestLimits,
    ScoredBatch,
    decode_feedback,
    decode_request,
    encode_feedback,
    encode_request,
    encode_scores,
    feature_age_ms,
    missing_rows,
    valid_scores,
)
from stream_scorer.core.errors import FatalError
from stream_scorer.core.messages import Feedback, ScoreMessage, ScoreRequest
from stream_scorer.core.records import Fetched
from stream_scorer.core.rejects import Reject
from tests.builders import CONTEXT, LIMITS, NOW_MS, fetched, record, request, request_bytes, request_dict, scores


def decode(value: bytes | None, limits: RequestLimits = LIMITS) -> ScoreRequest | Reject:
    return decode_request(record(value), limits)


def test_a_request_with_everything() -> None:
    value = request_bytes(
        context={"hour": 13, "recent": [1, 2], "recent_length": 2, "place": [0.5, 1]},
        item_context={"position": [1, 2], "speed": [0.25, 3]},
        schema_version=1,
    )
    got = decode(value)
    assert isinstance(got, ScoreRequest)
    assert got.items == ["i1", "i2"]
    assert decode(encode_request(got)) == got


def wrong(**fields: object) -> bytes:
    return orjson.dumps(request_dict() | fields)


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (None, "empty", "no value"),
        (b"", "empty", "no value"),
        (b"x" * 2001, "too_large", "2001 bytes, at most 2000"),
        (b"{", "json", "JSON"),
        (b"\xff\xfe", "json", "JSON"),
        (b'{"request_id":"\xff"}', "json", "JSON"),
        (b'{"request_id":"\\ud800"}', "json", "JSON"),
        (b"[" * 1000, "json", "JSON"),
        (b"[]", "schema", "object"),
        (b"null", "schema", "object"),
        (wrong(extra=1), "schema", "extra"),
        (wrong(request_id=""), "schema", "request_id"),
        (wrong(request_id="x" * 257), "schema", "request_id"),
        (wrong(user_id=7), "schema", "user_id"),
        (wrong(items=[]), "schema", "items"),
        (wrong(items=["a", 1]), "schema", "items.1"),
        (wrong(schema_version=2), "schema", "schema_version"),
        (wrong(ts=-1), "timestamp", "ts"),
        (wrong(ts=1.5), "timestamp", "ts"),
        (wrong(ts="1700000000000"), "timestamp", "ts"),
        (wrong(ts=1 << 53), "timestamp", "ts"),
        (wrong(items=["a", "b", "c", "d"]), "too_many_items", "4 items, at most 3"),
        (wrong(items=["a", "a"]), "duplicate_item", "twice"),
        (wrong(context={"day": 1}), "context_unknown", "'day'"),
        (wrong(context={"hour": 1.5}), "context_shape", "'hour' takes whole numbers"),
        (b'{"request_id":"r","user_id":"u","items":["a"],"ts":1,"context":{"speed":NaN}}', "schema", "finite"),
        (b'{"request_id":"r","user_id":"u","items":["a"],"ts":1,"context":{"speed":1e999}}', "schema", "finite"),
        (b'{"request_id":"r","user_id":"u","items":["a"],"ts":1,"context":{"speed":true}}', "schema", "number"),
    ],
)
def test_every_refusal_has_its_reason(value: bytes | None, reason: str, detail: str) -> None:
    got = decode(value, RequestLimits(CONTEXT, max_bytes=2000, max_items=3))
    assert isinstance(got, Reject)
    assert got.reason == reason
    assert detail in got.detail
    assert got.record.value == value


def test_a_refusal_does_not_repeat_values() -> None:
    got = decode(wrong(user_id=["secret-name"]))
    assert isinstance(got, Reject)
    assert "secret-name" not in got.detail


def test_a_missing_timestamp_is_a_timestamp_problem() -> None:
    data = request_dict()
    del data["ts"]
    got = decode(orjson.dumps(data))
    assert isinstance(got, Reject)
    assert got.reason == "timestamp"


def test_a_message_full_of_problems_is_refused_quickly() -> None:
    value = b'{"request_id":"r","user_id":"u","ts":1,"items":[' + b",".join([b"1"] * 400_000) + b"]}"
    started = time.process_time()
    got = decode(value)
    assert isinstance(got, Reject)
    assert got.reason == "schema"
    assert time.process_time() - started < 1.0


def test_limits_of_another_model_know_other_context() -> None:
    other = RequestLimits(SourceLayout("context", (Slot("day", "sparse", 0, 1),), ()))
    assert isinstance(decode(wrong(context={"day": 1}), other), ScoreRequest)
    assert isinstance(decode(wrong(context={"hour": 1}), other), Reject)


def test_feedback_round_trip_and_refusals() -> None:
    feedback = Feedback(
        event_id="e1", kind="conversion", request_id="r1", user_id="u1", item_id="i1", ts=NOW_MS
    )  # fmt: skip
    assert decode_feedback(record(encode_feedback(feedback))) == feedback
    for value, reason in (
        (None, "empty"),
        (b"?", "json"),
        (encode_feedback(feedback).replace(b"conversion", b"purchase"), "schema"),
        (encode_feedback(feedback).replace(b'"ts":1', b'"ts":-1'), "timestamp"),
        (b"x" * 100_001, "too_large"),
    ):
        got = decode_feedback(record(value))
        assert isinstance(got, Reject)
        assert got.reason == reason


def scored(requests: list[ScoreRequest], features: Fetched, given: Scores | None = None) -> ScoredBatch:
    batch_plan = plan(requests)
    batch: RankBatch = assemble(requests, batch_plan, features, CONTEXT)
    return ScoredBatch(requests, batch_plan, batch, features, given or scores(batch_plan.rows), NOW_MS + 250)


def test_scores_are_columnar_and_keep_the_contract() -> None:
    requests = [request("r1", ["a", "b", "c"]), request("r2", ["c"], user_id="u2", ts=NOW_MS - 7)]
    batch = scored(requests, fetched(plan(requests)))
    first, second = (ScoreMessage.model_validate_json(body) for body in encode_scores(batch))
    assert (first.request_id, first.user_id, first.items) == ("r1", "u1", ["a", "b", "c"])
    assert (second.request_id, second.user_id, second.items, second.ts) == ("r2", "u2", ["c"], NOW_MS - 7)
    assert first.model_version == 3
    assert first.scored_at == NOW_MS + 250
    assert np.float32(first.ctr).tolist() == batch.scores.ctr_B[:3].tolist()
    assert np.float32(first.cvr).tolist() == batch.scores.cvr_B[:3].tolist()
    assert np.float32(second.ctcvr).tolist() == batch.scores.ctcvr_B[3:].tolist()
    assert not first.degraded
    assert first.missing == []


def test_rounding_never_puts_ctcvr_above_ctr() -> None:
    ctr = np.array([0.5], np.float32)
    above = np.nextafter(ctr, np.float32(1))
    given = Scores(ctr, np.ones(1, np.float32), above, 1)
    assert valid_scores(given, 1).all()
    requests = [request(items=["a"])]
    message = ScoreMessage.model_validate_json(encode_scores(scored(requests, fetched(plan(requests)), given))[0])
    assert message.ctcvr[0] <= message.ctr[0]


def test_missing_features_are_listed_and_do_not_age() -> None:
    requests = [request("r1", ["a", "b", "c"]), request("r2", ["c", "d"], user_id="u2")]
    features = fetched(plan(requests), degraded=True, missing_users=[1], missing_items=[0, 2])
    batch = scored(requests, features)
    assert missing_rows(batch.plan, features) == [[0, 2], [-1, 0]]
    # user 0 is 1 s old, item b (row 1) 2 s, item d (row 3) 4 s, and scoring was 250 ms later
    assert feature_age_ms(batch).tolist() == [2250, 4250]
    assert [ScoreMessage.model_validate_json(body).degraded for body in encode_scores(batch)] == [True, True]


def test_no_features_at_all_have_age_minus_one_and_future_ones_age_zero() -> None:
    asked = plan([request()])
    nothing = fetched(asked, missing_users=[0], missing_items=[0, 1])
    assert feature_age_ms(scored([request()], nothing)).tolist() == [-1]
    future = fetched(asked)
    future.users.event_ms_N[:] = future.items.event_ms_N[:] = NOW_MS + 10_000
    assert feature_age_ms(scored([request()], future)).tolist() == [0]


@pytest.mark.parametrize("field", ["ctr_B", "cvr_B", "ctcvr_B"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.01, 1.01])
def test_a_score_that_is_no_probability_is_found(field: str, bad: float) -> None:
    given = scores(4)
    values = getattr(given, field)
    values[2] = bad
    assert valid_scores(given, 4).tolist() == [True, True, False, True]


def test_ctcvr_above_ctr_is_found() -> None:
    given = Scores(np.full(2, 0.2, np.float32), np.full(2, 0.9, np.float32), np.array([0.18, 0.3], np.float32), 1)
    assert valid_scores(given, 2).tolist() == [True, False]


def test_scores_of_another_length_or_no_version_are_fatal() -> None:
    with pytest.raises(FatalError, match="for 5 rows"):
        valid_scores(scores(4), 5)
    with pytest.raises(FatalError, match="no model version"):
        valid_scores(scores(4)._replace(model_version=-1), 4)
