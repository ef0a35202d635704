"""Feedback read the short way is feedback read the long way."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_scorer.core import heard
from stream_scorer.core.codec import decode_feedback, encode_feedback
from stream_scorer.core.heard import KINDS, Heard, Page, hear, hear_all
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
        names = ("kind", "request_id", "item_id")
        assert [getattr(short, n) for n in names] == [getattr(long, n) for n in names]
        assert short.ts_ms == long.ts
    return short


PAGE = {name: value for name, value in GOOD.items() if name != "item_id"} | {
    "kind": "impression",
    "items": ["i1", "i2"],
}


def test_a_page_is_an_impression_of_each_of_its_items():
    assert hear(record(orjson.dumps(PAGE))) == Page("r1", ["i1", "i2"], GOOD["ts"])
    assert hear(record(orjson.dumps(PAGE | {"schema_version": 1}))) == Page("r1", ["i1", "i2"], GOOD["ts"])
    assert encode_feedback(Feedback(**PAGE)).count(b"item") == 1


@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "items", "schema_version", "more"]),
        st.one_of(VALUES, st.lists(st.one_of(VALUES, st.text(min_size=1, max_size=3)), max_size=3)),
        max_size=3,
    )
)
@settings(deadline=None)
def test_any_page_is_read_or_refused_alike(changed):
    value = orjson.dumps(PAGE | changed)
    long = decode_feedback(record(value))
    short = hear(record(value))
    if isinstance(long, Reject):
        assert short == long
    elif long.items:
        assert short == Page(long.request_id, long.items, long.ts)
    else:
        assert short == Heard(long.kind, long.request_id, long.item_id, long.ts)


def test_pages_among_other_messages_keep_their_place():
    values = [
        orjson.dumps(GOOD),
        orjson.dumps(PAGE),
        b"?",
        orjson.dumps(GOOD | {"item_id": "i9"}),
        orjson.dumps(PAGE | {"ts": -1}),
    ]
    got = hear_all([record(value) for value in values])
    assert got == [hear(record(value)) for value in values]
    assert [type(one) for one in got] == [Heard, Page, Reject, Heard, Reject]


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


SOME = st.lists(
    st.one_of(
        st.builds(
            lambda number, kind: orjson.dumps(GOOD | {"event_id": f"e{number}", "kind": kind}),
            st.integers(0, 9),
            st.sampled_from(["impression", "click", "conversion"]),
        ),
        st.sampled_from([orjson.dumps(GOOD), orjson.dumps(GOOD | {"schema_version": 1}), b"", b"null", b"{}"]),
        st.tuples(st.integers(0, 120), st.sampled_from(["{", "}", '"', ",", '{"a":"', '"}', "},{", ""])).map(
            lambda cut: orjson.dumps(GOOD)[: cut[0]] + cut[1].encode()
        ),
        st.sampled_from([b',"x":1}', b'{"x":"', b'"}', orjson.dumps(GOOD) + b"," + orjson.dumps(GOOD)]),
    ),
    max_size=6,
)


@given(SOME)
@settings(deadline=None, max_examples=300)
def test_many_together_are_read_or_refused_as_each_alone(values):
    records = [record(value) for value in values]
    assert hear_all(records) == [hear(one) for one in records]


TS = st.one_of(st.integers(10**12, 10**13 - 1), st.just(0))
ID = st.one_of(
    st.sampled_from(["r1", "item 7", "a,b:{}", "é", 'q"', "\\\\", "\n", ""]), st.text("abz09", min_size=1, max_size=30)
)


@given(
    st.lists(
        st.tuples(ID, ID, ID, st.sampled_from([*KINDS, "view"]), TS),
        min_size=1, max_size=8,
    ),
    st.permutations(["event_id", "kind", "request_id", "user_id", "item_id", "ts", "schema_version"]),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]),
    st.integers(0, 7),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_messages_written_alike_are_read_as_each_alone(rows, order, separators, one_apart):
    values = []
    for at, (event_id, request_id, item_id, kind, ts) in enumerate(rows):
        message = {"event_id": event_id, "kind": kind, "request_id": request_id, "user_id": "u", "item_id": item_id}
        message |= {"ts": ts, "schema_version": 1}
        names = order if at != one_apart else order[::-1]
        values.append(json.dumps({name: message[name] for name in names}, separators=separators).encode())
    records = [record(value) for value in values]
    assert hear_all(records) == [hear(one) for one in records]


@pytest.mark.parametrize("write", [orjson.dumps, lambda message: json.dumps(message).encode()])
def test_messages_written_alike_take_the_shortest_way(write, monkeypatch):
    monkeypatch.setattr(heard, "_plain", None)
    values = [
        write(GOOD | {"item_id": f"i{'x' * n}", "kind": sorted(KINDS)[n % 3], "ts": 10**12 + n}) for n in range(9)
    ]
    got = hear_all([record(value) for value in values])
    assert [one.ts_ms for one in got] == [10**12 + n for n in range(9)]


def test_a_message_cannot_end_in_its_neighbour():
    """Joined by a comma these two are an array of two good messages, and neither is a message."""
    good = orjson.dumps(GOOD)
    halves = [good + b"," + good[:-1], b'"schema_version":1}']
    assert len(orjson.loads(b"[" + b",".join(halves) + b"]")) == 2
    assert all(isinstance(one, Reject) for one in hear_all([record(half) for half in halves]))


@pytest.mark.parametrize("around", [0, 1])
def test_a_brace_in_a_string_does_not_end_a_message(around):
    """Joined by a comma these two are one good message, and neither is a message."""
    halves = [b'{"event_id":"a}', b'{","kind":"click","request_id":"r1","user_id":"u1","item_id":"i1","ts":1}']
    assert len(orjson.loads(b"[" + b",".join(halves) + b"]")) == 1
    records = [record(value) for value in [*[orjson.dumps(GOOD)] * around, *halves]]
    got = hear_all(records)
    assert got == [hear(one) for one in records]
    assert [type(one) for one in got] == [*[Heard] * around, Reject, Reject]


def test_minus_nought_is_a_time():
    records = [record(orjson.dumps(GOOD | {"ts": 0}).replace(b":0", b":-0"))] * 2
    assert hear_all(records) == [hear(one) for one in records] == [Heard("click", "r1", "i1", 0)] * 2
