"""One contract for every source and sink: the fakes', the mock cluster's and Apache Kafka's."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pytest

from stream_scorer.adapters.kafka import KafkaConfig
from stream_scorer.core.records import CommitResult, OutRecord, Record, TopicPartition
from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.ports import Sink, Source
from tests.contract.worlds import PARTITIONS, FakeWorld, KafkaWorld, Listener, Sent, World, poll_for, soon
from tests.fakes import FakeSink

GROUPS = (f"contract-{at}" for at in itertools.count())


@pytest.fixture(params=["fake", "mock", pytest.param("kafka", marks=pytest.mark.real_kafka)])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "fake":
        return FakeWorld()
    if request.param == "mock":
        broker: EmbeddedBroker = request.getfixturevalue("mock_broker")
        return KafkaWorld(KafkaConfig(broker.bootstrap, session_timeout_ms=2_000), mock=True)
    bootstrap = request.getfixturevalue("kafka_bootstrap")
    return KafkaWorld(KafkaConfig(bootstrap, session_timeout_ms=6_000), mock=False)


def numbered(count: int) -> list[Sent]:
    return [Sent(at % PARTITIONS, b"%d" % at, b"u%d" % (at % 7)) for at in range(count)]


def opened(world: World, messages: Sequence[Sent], listener: Listener | None = None) -> tuple[Source, str, str]:
    topic, group = world.topic(), next(GROUPS)
    world.produce(topic, messages)
    source = world.source(topic, group)
    source.subscribe(listener or Listener())
    return source, topic, group


def by_partition(records: Sequence[Record]) -> Mapping[int, list[Record]]:
    found: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        found[record.position.partition].append(record)
    return found


def next_offsets(records: Sequence[Record]) -> dict[TopicPartition, int]:
    return {record.position.topic_partition: record.position.offset + 1 for record in records}


def test_everything_comes_once_in_order_with_its_position(world: World) -> None:
    listener = Listener()
    source, topic, _ = opened(world, numbered(300), listener)
    records = poll_for(source, 300)
    for partition, found in by_partition(records).items():
        assert [record.position.offset for record in found] == list(range(100))
        assert [record.value for record in found] == [b"%d" % at for at in range(partition, 300, PARTITIONS)]
    assert {record.position.topic for record in records} == {topic}
    assert {record.epoch for record in records} == {1}
    assert source.poll(10, 0.05, 0.0) == []
    assert listener.calls == [("assign", [TopicPartition(topic, p) for p in range(PARTITIONS)])]
    source.close()


def test_a_poll_gives_no_more_than_asked_for(world: World) -> None:
    source, _, _ = opened(world, numbered(30))
    sizes = []
    while sum(sizes) < 30:
        sizes.append(len(source.poll(7, 0.5, 0.01)))
    assert max(sizes) <= 7
    source.close()


def test_bytes_and_headers_are_untouched(world: World) -> None:
    messages = [
        Sent(0, bytes(range(256)), b"\x00\xff", (("a", b"1"), ("a", b""), ("b", b"\xff\x00"))),
        Sent(0, b"", b"", ()),
        Sent(0, None, None, (("only", b"headers"),)),
    ]
    source, _, _ = opened(world, messages)
    for record, sent in zip(poll_for(source, 3), messages, strict=True):
        assert (record.value, record.key, tuple(record.headers)) == (sent.value, sent.key, sent.headers)
        assert record.timestamp_ms > 1_600_000_000_000
    source.close()


def test_reading_goes_on_from_what_was_committed(world: World) -> None:
    source, topic, group = opened(world, numbered(60))
    records = poll_for(source, 60)
    first_half = [record for record in records if record.position.offset < 10]
    assert source.commit(next_offsets(first_half)) == CommitResult(committed=True, fenced=False, error=None)
    source = world.restarted(source, topic, group)
    source.subscribe(Listener())
    again = poll_for(source, 30)
    for found in by_partition(again).values():
        assert [record.position.offset for record in found] == list(range(10, 20))
    source.close()


def test_committing_nothing_is_fine_and_what_is_not_held_is_fenced(world: World) -> None:
    source, topic, _ = opened(world, numbered(3))
    assert source.commit({TopicPartition(topic, 0): 1}).fenced  # before the first poll nothing is held
    poll_for(source, 3)
    assert source.commit({}).committed
    result = source.commit({TopicPartition(topic, 99): 1})
    assert (result.committed, result.fenced) == (False, True)
    assert result.error
    source.close()


def test_seek_reads_on_from_there(world: World) -> None:
    source, topic, _ = opened(world, numbered(30))
    before = poll_for(source, 30)
    source.seek({TopicPartition(topic, 1): 4})
    again = poll_for(source, 6)
    assert [record.position for record in again] == [r.position for r in by_partition(before)[1][4:]]
    source.seek({TopicPartition(topic, 77): 0})  # not assigned: nothing to do
    source.close()


def test_paused_nothing_comes_and_resumed_nothing_is_missing(world: World) -> None:
    source, _, _ = opened(world, numbered(90))
    records = poll_for(source, 10)
    source.pause()
    assert [source.poll(100, 0.05, 0.0) for _ in range(4)] == [[], [], [], []]
    source.resume()
    records += poll_for(source, 80)
    for found in by_partition(records).values():
        assert [record.position.offset for record in found] == list(range(30))
    source.close()


def test_paused_before_the_first_assignment(world: World) -> None:
    source, _, _ = opened(world, numbered(9))
    source.pause()
    assert [source.poll(100, 0.3, 0.0) for _ in range(4)] == [[], [], [], []]
    source.resume()
    assert sorted(record.position.offset for record in poll_for(source, 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    source.close()


def test_lag_is_what_is_left_to_read(world: World) -> None:
    source, _, _ = opened(world, numbered(90))
    poll_for(source, 90)
    assert source.lag() == 0
    source.close()


def test_the_end_of_a_partition_is_known_once_it_was_read_to_there(world: World) -> None:
    source, topic, _ = opened(world, [Sent(0, b"a"), Sent(0, b"b"), Sent(1, b"c")])
    assert source.ended() == set()
    poll_for(source, 3)
    give_up = soon()
    while len(source.ended()) < PARTITIONS and not give_up.passed:
        source.poll(10, 0.1, 0.0)
    assert set(source.ended()) == {TopicPartition(topic, number) for number in range(PARTITIONS)}
    assert source.positions().items() >= {TopicPartition(topic, 0): 2, TopicPartition(topic, 1): 1}.items()
    source.seek({TopicPartition(topic, 0): 1})
    assert TopicPartition(topic, 0) not in source.ended()
    assert source.positions()[TopicPartition(topic, 0)] == 1
    for back_to in (1, 2):  # 2 is the end already
        source.seek({TopicPartition(topic, 0): back_to})
        give_up = soon()
        while len(source.ended()) < PARTITIONS and not give_up.passed:
            source.poll(10, 0.1, 0.0)
        assert len(source.ended()) == PARTITIONS
    source.close()


def test_what_was_committed_is_known_at_assignment(world: World) -> None:
    class Asking(Listener):
        source: Source
        found: dict[TopicPartition, int]

        def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
            super().on_assign(partitions)
            self.found = dict(self.source.positions())

    source, topic, group = opened(world, numbered(9))
    poll_for(source, 9)
    assert source.commit({TopicPartition(topic, 1): 2}).committed
    again, listener = world.restarted(source, topic, group), Asking()
    listener.source = again
    again.subscribe(listener)
    poll_for(again, 7)
    assert listener.found[TopicPartition(topic, 1)] == 2
    assert listener.found.get(TopicPartition(topic, 0), 0) == 0
    again.close()


def test_close_revokes_first_and_a_commit_then_still_counts(world: World) -> None:
    class Committing(Listener):
        source: Source
        seen: list[Record]

        def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
            super().on_revoke(partitions)
            assert self.source.commit(next_offsets(self.seen)).committed

    listener = Committing()
    source, topic, group = opened(world, numbered(30), listener)
    listener.source, listener.seen = source, poll_for(source, 30)
    source.close()
    assert [name for name, _ in listener.calls] == ["assign", "revoke"]
    assert listener.held == set()
    source = world.restarted(source, topic, group)
    source.subscribe(Listener())
    assert [source.poll(10, 0.2, 0.0) for _ in range(5)] == [[]] * 5
    source.close()


def test_subscribe_is_called_once(world: World) -> None:
    source, _, _ = opened(world, numbered(1))
    with pytest.raises(ValueError, match="once"):
        source.subscribe(Listener())
    source.close()


class Reports:
    """Collects delivery reports."""

    def __init__(self) -> None:
        self.errors: list[object | None] = []

    def __call__(self, error: object | None, _message: object) -> None:
        self.errors.append(error)


def fill(sink: Sink, topic: str, count: int) -> Reports:
    reports = Reports()
    for at in range(count):
        sink.send(OutRecord(topic, b"u1", b"%d" % at, (("n", b"%d" % at),)), reports)
    return reports


def test_every_record_sent_is_reported_once_and_arrives_untouched_in_order(world: World) -> None:
    topic, sink = world.topic(), world.sink()
    reports = fill(sink, topic, 500)
    sink.poll()
    assert sink.flush(soon())
    assert reports.errors == [None] * 500
    found = world.read(topic, 500)
    assert [sent.value for sent in found] == [b"%d" % at for at in range(500)]
    assert {sent.key for sent in found} == {b"u1"}
    assert found[7].headers == (("n", b"7"),)
    sink.close(soon())


def test_empty_and_absent_values_keys_and_headers(world: World) -> None:
    topic, sink, reports = world.topic(), world.sink(), Reports()
    sink.send(OutRecord(topic, b"k", None, ()), reports)
    sink.send(OutRecord(topic, b"k", b"", (("a", b""), ("a", b"\xff"))), reports)
    assert sink.flush(soon())
    assert reports.errors == [None, None]
    assert [sent[1:] for sent in world.read(topic, 2)] == [(None, b"k", ()), (b"", b"k", (("a", b""), ("a", b"\xff")))]
    sink.close(soon())


def test_flush_says_when_time_ran_out(world: World) -> None:
    topic, sink = world.topic(), world.sink(lazy=True)
    reports = fill(sink, topic, 3)
    if isinstance(sink, FakeSink):  # its messages wait to be acknowledged by hand; Kafka's flush does not linger
        assert not sink.flush(soon(0.0))
        sink.ack()
    assert sink.flush(soon())
    assert reports.errors == [None] * 3
    sink.close(soon())


def test_purge_reports_an_error_for_what_was_not_sent(world: World) -> None:
    topic, sink = world.topic(), world.sink(lazy=True)
    reports = fill(sink, topic, 5)
    sink.purge()
    sink.poll()
    assert len(reports.errors) == 5
    assert all(error is not None for error in reports.errors)
    assert sink.flush(soon(0.0))
    assert world.read(topic, 0) == []
    sink.close(soon())


def test_close_sends_what_is_waiting(world: World) -> None:
    topic, sink = world.topic(), world.sink()
    reports = fill(sink, topic, 20)
    sink.close(soon())
    assert reports.errors == [None] * 20
    assert len(world.read(topic, 20)) == 20
