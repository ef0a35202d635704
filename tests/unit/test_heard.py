"""Feedback read the short way is feedback read the long way."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_scorer.core.codec import decode_feedback, encode_feedback
from stream_scorer.core.heard import Heard, hear
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import Position, Record
from stream_scorer.core.rejects import Reject

GOOD = {
    "event_id": "e1", "kind": "click", "request_id": "r1", "user_id": "u1", "item_id": "i1", "ts": 1_700_000_000_000
}  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1 << 60), st.floats(), st.text(max_size=300), st.just([]), st.just({}),
    st.sampled_from(["impression", "click", "conversion", "view", "x" * 257]),
)  # fmt: skip


def record(value: bytes | None) -> Record:
    return Record(Position("feedback", 0, 7), b"u1", value, (), 5, 1)


def same(value: bytes | None) -> object:
    short, long = hear(record(value)), decode_feedback(record(value))
    if isinstance(long, Reject):
        assert short == long
    else:
        names = ("kind", "request_id", "item_id", "ts")
        assert [getattr(short, n) for n in names] == [getattr(long, n) for n in names]
    return short


def test_a_plain_message_takes_the_short_way():
    assert same(orjson.dumps(GOOD)) == Heard("click", "r1", "i1", 1_700_000_000_000)
    assert type(same(encode_feedback(Feedback(**GOOD)))) is Heard


@given(st.dictionaries(st.sampled_from([*GOOD, "schema_version", "more"]), VALUES, max_size=4), st.booleans())
def test_any_fields_are_read_or_refused_alike(changed, whole):
    same(orjson.dumps((GOOD if whole else {}) | changed))


@given(st.binary(max_size=20), st.integers(0, 90))
def test_any_bytes_are_read_or_refused_alike(junk, at):
    good = orjson.dumps(GOOD)
    same(good[:at] + junk + good[at:])
    same(good[:at] + junk)


@pytest.mark.parametrize(
    "value",
    [
        None, b"", b"null", b"[]", b"3", b'{"event_id":NaN}', b"\xff", b"x" * 200_000,
        orjson.dumps(GOOD).replace(b'"e1"', b'"e1","event_id":""'),
        orjson.dumps(GOOD).replace(b'"r1"', b'"\\ud800"'), orjson.dumps(GOOD | {"item_id": "i" * 257}),
        orjson.dumps(GOOD | {"schema_version": 2}), orjson.dumps(GOOD | {"schema_version": True}),
        orjson.dumps(GOOD).replace(b"1700000000000", b"1700000000000.0"),
        orjson.dumps(GOOD).replace(b"1700000000000", b"9" * 30),
        b" \n" + orjson.dumps(GOOD) + b"\n",
    ],
)  # fmt: skip
def test_odd_messages(value):
    same(value)
