"""One order for all partitions, however they were polled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream_scorer.core.merge import Merge
from stream_scorer.core.records import TopicPartition
from tests.builders import record

A, B = TopicPartition("a", 0), TopicPartition("b", 0)
ALL = [A, B, *(TopicPartition("t", n) for n in range(3))]


def make(times: dict[TopicPartition, list[int]]):
    return {
        where: [record(b"", at, where.partition, topic=where.topic, timestamp_ms=ts) for at, ts in enumerate(stamps)]
        for where, stamps in times.items()
    }


def names(records) -> list[tuple[str, int]]:
    return [(r.position.topic, r.position.offset) for r in records]


def test_records_come_in_the_order_of_their_time() -> None:
    merge = Merge(1.0, 1_000)
    records = make({A: [1, 5, 9], B: [2, 3]})
    merge.assign([A, B], 0.0)
    merge.push(records[A] + records[B], 0.0)
    assert names(merge.take(100, 0.0, ended=ALL).records) == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2)]
    assert len(merge) == 0


def test_an_empty_partition_is_waited_for_while_there_is_something_to_read() -> None:
    merge = Merge(1.0, 1_000)
    records = make({A: [1, 5], B: [2]})
    merge.assign([A, B], 0.0)
    merge.push(records[A], 0.0)
    assert merge.take(100, 0.5, ended=[A]).records == []  # nothing is known of b
    merge.push(records[B], 0.5)
    assert names(merge.take(100, 0.5, ended=[]).records) == [("a", 0), ("b", 0)]  # b may have more before 5
    assert merge.take(100, 1.4, ended=[B]).records == []  # it has not, but it is the live end
    assert names(merge.take(100, 1.5, ended=[B]).records) == [("a", 1)]
    assert merge.impatient == 0


def test_a_partition_that_has_more_is_waited_for_however_slow_it_is() -> None:
    merge = Merge(1.0, 1_000, stall_after_s=30.0)
    records = make({A: [1, 5], B: [2]})
    merge.assign([A, B], 0.0)
    merge.push(records[A], 0.0)
    assert merge.take(100, 29.9, ended=[A]).records == []
    assert merge.impatient == 0
    assert names(merge.take(100, 30.0, ended=[A]).records) == [("a", 0), ("a", 1)]
    assert merge.impatient > 0


def test_a_partition_without_any_record_is_not_waited_for_when_all_ends_are_known() -> None:
    merge = Merge(1.0, 1_000)
    merge.assign([A, B], 0.0)
    merge.push(make({A: [1]})[A], 0.0)
    assert names(merge.take(100, 0.0, ended=[A, B]).records) == [("a", 0)]


def test_too_many_waiting_records_end_the_waiting() -> None:
    merge = Merge(1.0, 2)
    merge.assign([A, B], 0.0)
    merge.push(make({A: [1, 2, 3, 4]})[A], 0.0)
    assert len(merge.take(100, 0.0, ended=[]).records) == 4
    assert merge.impatient > 0


def test_offset_order_within_a_partition_survives_times_that_go_back() -> None:
    merge = Merge(1.0, 1_000)
    records = make({A: [5, 1], B: [3, 6]})
    merge.push(records[A] + records[B], 0.0)
    assert names(merge.take(100, 0.0, ended=ALL).records) == [("b", 0), ("a", 0), ("a", 1), ("b", 1)]


def test_a_revoked_partition_is_dropped_and_its_time_remembered() -> None:
    merge = Merge(1.0, 1_000)
    records = make({A: [5, 7], B: [6]})
    merge.push(records[A] + records[B], 0.0)
    assert names(merge.take(1, 0.0, ended=ALL).records) == [("a", 0)]
    merge.revoke([A])
    assert len(merge) == 1
    later = Merge(1.0, 1_000)
    later.restore(merge.state())
    again = make({A: [5, 2]})[A][1:]  # the next record of a is older than the one before it
    later.push(again + make({B: [4]})[B], 0.0)
    assert names(later.take(10, 0.0, ended=ALL).records) == [("b", 0), ("a", 1)]


@given(
    times=st.lists(st.lists(st.integers(0, 20), max_size=8), min_size=3, max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 4)), max_size=30),
)
def test_how_records_were_polled_changes_nothing(times, cuts) -> None:
    partitions = [TopicPartition("t", n) for n in range(3)]
    records = make(dict(zip(partitions, times, strict=True)))
    whole = Merge(1.0, 1_000)
    whole.push([r for where in partitions for r in records[where]], 0.0)
    expected = names(whole.take(1_000, 9.0, ended=ALL).records)

    merge, out, left = Merge(1.0, 1_000), [], {p: list(records[p]) for p in partitions}
    merge.assign(partitions, 0.0)
    for number, count, limit in cuts:
        where = partitions[number]
        merge.push(left[where][:count], 0.0)
        del left[where][:count]
        out += merge.take(limit, 0.0, ended=[p for p in partitions if not left[p]]).records
    for where in partitions:
        merge.push(left[where], 0.0)
    out += merge.take(1_000, 9.0, ended=ALL).records
    assert [(r.position.offset) for r in out] == [offset for _, offset in expected]
    assert names(out) == expected
