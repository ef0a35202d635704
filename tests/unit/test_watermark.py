"""Event time moves with the slowest partition, and neither idle partitions nor wrong clocks stop it."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from stream_scorer.core.records import TopicPartition
from stream_scorer.core.watermark import BEGINNING, MANY, Watermark, WatermarkPolicy

A, B, C = (TopicPartition("t", n) for n in range(3))


def test_the_slowest_partition_decides() -> None:
    mark = Watermark(WatermarkPolicy(lateness_ms=5))
    mark.assign([A, B])
    mark.observe(A, 100, 100)
    assert mark.value_ms == BEGINNING  # b was not heard of yet
    mark.observe(B, 50, 100)
    assert mark.value_ms == 45
    mark.observe(B, 200, 101)
    assert mark.value_ms == 95
    mark.observe(A, 90, 102)
    assert mark.value_ms == 95  # it never goes back


def test_a_silent_partition_is_waited_for_only_so_long() -> None:
    mark = Watermark(WatermarkPolicy(lateness_ms=0, idle_ms=10))
    mark.assign([A, B, C])
    for where in (A, B):
        mark.observe(where, 100, 1_000)
    mark.observe(A, 200, 1_005)
    mark.observe(A, 300, 1_010)
    assert mark.value_ms == BEGINNING  # c has never spoken
    mark.observe(A, 400, 1_011)
    assert mark.value_ms == 400  # b and c are idle now
    mark.observe(B, 350, 1_012)
    mark.observe(A, 500, 1_012)
    assert mark.value_ms == 400
    mark.observe(B, 450, 1_012)
    assert mark.value_ms == 450  # b counts again


def test_a_topic_that_is_stuck_is_waited_for_longer_than_a_partition() -> None:
    served, feedback = TopicPartition("served", 0), [TopicPartition("feedback", n) for n in range(2)]
    mark = Watermark(WatermarkPolicy(lateness_ms=0, idle_ms=10, topic_idle_ms=1_000), "feedback")
    mark.assign([served, *feedback])
    for where in (served, *feedback):
        mark.observe(where, 100, 100)
    for at in range(110, 1_101, 10):
        mark.observe(served, at, at)
    assert mark.value_ms == 100  # no click can have been missed yet
    mark.observe(feedback[0], 105, 1_101)  # the topic lives: now its other partition is merely idle
    mark.observe(feedback[0], 400, 1_101)
    mark.observe(served, 1_102, 1_102)
    assert mark.value_ms == 400
    mark.observe(served, 2_200, 2_200)
    assert mark.value_ms == 2_200  # long enough: it goes on without feedback
    mark.observe(feedback[0], 2_300, 2_300)
    assert mark.value_ms == 2_300  # without new requests feedback alone moves it


def test_one_wrong_clock_moves_nothing_and_many_are_believed() -> None:
    mark = Watermark(WatermarkPolicy(lateness_ms=0, max_jump_ms=1_000, confirm=3))
    mark.observe(A, 100, 1)
    assert not mark.observe(A, 9_000, 2)
    assert mark.observe(A, 101, 3)
    assert mark.value_ms == 101
    assert [mark.observe(A, 9_000 + n, 4 + n) for n in range(3)] == [False, False, True]
    assert mark.value_ms == 9_002


def test_revoked_partitions_are_not_waited_for() -> None:
    mark = Watermark(WatermarkPolicy(lateness_ms=0))
    mark.assign([A, B])
    mark.observe(A, 100, 1)
    mark.revoke([B])
    mark.observe(A, 101, 2)
    assert mark.value_ms == 101


def test_state_survives_json() -> None:
    policy = WatermarkPolicy(lateness_ms=1, idle_ms=10, max_jump_ms=1_000, confirm=3)
    one, two = Watermark(policy), Watermark(policy)
    one.assign([A, B, C])
    for where, event, at in ((A, 100, 1), (B, 90, 2), (A, 5_000, 3), (A, 120, 20), (B, 130, 21), (A, 7_000, 22)):
        one.observe(where, event, at)
    two.restore(json.loads(json.dumps(one.state())))
    for where, event, at in ((A, 7_001, 23), (A, 7_002, 24), (B, 140, 25), (B, 150, 40), (C, 10, 41), (B, 8_000, 60)):
        assert one.observe(where, event, at) == two.observe(where, event, at)
        assert one.value_ms == two.value_ms
    assert one.newest_ms == two.newest_ms


def test_a_clock_that_is_ahead_of_the_broker_is_not_believed() -> None:
    mark = Watermark(WatermarkPolicy(lateness_ms=0))
    mark.observe(A, 1_000, 1_000)
    hours_ahead = 23 * 3_600_000
    assert not mark.observe(A, hours_ahead, 1_001)
    assert mark.newest_ms == 1_000  # so a quiet second cannot carry event time into the future
    assert not mark.observe(B, hours_ahead, 1_002)  # nor can a partition's first event
    assert mark.observe(A, 1_500, 1_003)
    assert mark.newest_ms == 1_500


def steps(event: int, record: int):
    """Events of partitions a, b and c, mostly near one another, seldom far."""
    far = st.integers(-event, event)
    near = st.integers(-3, 3)
    one = st.tuples(st.integers(0, 2), near, st.integers(0, record))
    return st.lists(st.tuples(one, st.one_of(*[near] * 12, far)), min_size=MANY, max_size=3 * MANY)


@given(steps(200, 3), st.integers(1, 60), st.integers(10, 400), st.integers(3, 100), st.booleans())
@settings(deadline=None, max_examples=300)
def test_many_events_move_it_as_one_after_another(moves, warm, idle_ms, max_jump_ms, all_assigned):
    policy = WatermarkPolicy(lateness_ms=5, idle_ms=idle_ms, max_jump_ms=max_jump_ms, confirm=3, max_ahead_ms=50)
    one, many = Watermark(policy, "t"), Watermark(policy, "t")
    for mark in (one, many):
        mark.assign([A, B, C] if all_assigned else [A])
    where, event_ms, record_ms, now = [], [], [], 1_000
    for (partition, jitter, passed), away in moves:
        now += passed
        where.append((A, B, C)[partition])
        event_ms.append(now + jitter + away)
        record_ms.append(now)
    values = []
    for at in zip(where, event_ms, record_ms, strict=True):
        one.observe(*at)
        values.append(one.value_ms)
    got = []
    for low in range(0, len(where), warm):
        part = slice(low, low + warm)
        got += many.observe_all(where[part], event_ms[part], record_ms[part])
    assert got == values
    assert many.state() == one.state()
