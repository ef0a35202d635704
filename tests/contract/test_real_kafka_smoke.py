"""What only a real broker shows: fencing, kills, lost records, rights; and the older 3.9 line."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka import TopicPartition as ClientPartition
from confluent_kafka.admin import AdminClient

from stream_scorer.adapters.kafka import KafkaConfig, KafkaSink
from stream_scorer.adapters.kafka_admin import TopicPlan, check_topics, connect, create_topics
from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.core.metric_names import OFFSET_GAPS
from stream_scorer.core.records import OutRecord, Record, TopicPartition
from tests.contract.worlds import PARTITIONS, PATIENCE_S, KafkaWorld, Listener, Sent, poll_for, soon
from tests.fakes import FakeMetrics
from tests.servers import KafkaServer

pytestmark = pytest.mark.real_kafka
GROUPS = (f"smoke-{at}" for at in itertools.count())


@pytest.fixture
def world(kafka_bootstrap: str) -> KafkaWorld:
    return KafkaWorld(KafkaConfig(kafka_bootstrap, session_timeout_ms=6_000), mock=False)


def numbered(count: int) -> list[Sent]:
    return [Sent(at % PARTITIONS, b"%d" % at) for at in range(count)]


class Reports:
    def __init__(self) -> None:
        self.errors: list[object | None] = []

    def __call__(self, error: object | None, _message: object) -> None:
        self.errors.append(error)


class Draining(Listener):
    """Commits what was read of the partitions that go, as the scorer does."""

    def __init__(self, world: KafkaWorld, topic: str, group: str) -> None:
        super().__init__()
        self.read: list[Record] = []
        self.source = world.source(topic, group)
        self.source.subscribe(self)

    def poll(self) -> None:
        self.read += self.source.poll(100, 0.05, 0.0)

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        ends = {r.position.topic_partition: r.position.offset + 1 for r in self.read}
        assert self.source.commit({where: ends[where] for where in partitions if where in ends}).committed
        super().on_revoke(partitions)


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_second_member_gets_its_share_after_the_first_has_let_go(world: KafkaWorld, protocol: str) -> None:
    world.config = replace(world.config, group_protocol=protocol)
    topic, group = world.topic(), next(GROUPS)
    world.produce(topic, numbered(30))
    first = Draining(world, topic, group)
    while len(first.read) < 30:
        first.poll()
    second = Draining(world, topic, group)
    give_up = time.monotonic() + PATIENCE_S
    while not second.held:
        first.poll()
        assert not first.held & second.held  # never both
        second.poll()
        assert not first.held & second.held
        assert time.monotonic() < give_up
    world.produce(topic, numbered(30))
    while len(first.read) + len(second.read) < 60:
        first.poll()
        second.poll()
        assert time.monotonic() < give_up
    everything = [r.position for r in first.read + second.read]
    assert len(set(everything)) == 60, "each record once, though partitions moved"
    moved = {where.partition for where in second.held}
    assert {r.position.partition for r in second.read} == moved
    assert {r.epoch for r in first.read} == {1}, "what a member keeps keeps its epoch"
    second.source.close()
    while len(first.held) < PARTITIONS:
        first.poll()
        assert time.monotonic() < give_up
    world.produce(topic, [Sent(min(moved), b"again")])
    while len(first.read) + len(second.read) < 61:
        first.poll()
        assert time.monotonic() < give_up
    assert first.read[-1].epoch == 2, "what comes back comes with a new epoch"
    first.source.close()


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_member_that_was_thrown_out_commits_nothing_and_stops(world: KafkaWorld, protocol: str) -> None:
    slow = replace(world.config, session_timeout_ms=1_500, max_poll_interval_ms=1_500, group_protocol=protocol)
    world.config = slow
    topic, group = world.topic(), next(GROUPS)
    world.produce(topic, numbered(30))
    hung, other = world.source(topic, group), world.source(topic, group)
    hung.subscribe(Listener())
    poll_for(hung, 30)
    other.subscribe(Listener())
    poll_for(other, 30)  # comes only once the first member is out: it does not poll
    result = hung.commit({TopicPartition(topic, 0): 1})
    assert (result.committed, result.fenced) == (False, True)
    with pytest.raises(FatalError, match=r"no poll for 1500 ms.*max_poll_interval_ms"):
        poll_for(hung, 1_000)
    hung.close()
    other.close()


def test_a_static_member_that_another_one_replaced_stops(world: KafkaWorld) -> None:
    world.config = replace(world.config, options={"group.instance.id": "the-only-one"})
    topic, group = world.topic(), next(GROUPS)
    world.produce(topic, numbered(3))
    old, new = world.source(topic, group), world.source(topic, group)
    old.subscribe(Listener())
    poll_for(old, 3)
    new.subscribe(Listener())
    poll_for(new, 3)
    with pytest.raises(FatalError, match="fenced"):
        poll_for(old, 1_000)
    old.close()
    new.close()


def test_records_that_the_broker_dropped_are_counted(world: KafkaWorld) -> None:
    topic, group = world.topic(), next(GROUPS)
    world.produce(topic, [Sent(0, b"%d" % at) for at in range(20)])
    source = world.source(topic, group)
    source.subscribe(Listener())
    poll_for(source, 20)
    assert source.commit({TopicPartition(topic, 0): 3}).committed
    source.close()
    admin = AdminClient({"bootstrap.servers": world.config.bootstrap})
    for future in admin.delete_records([ClientPartition(topic, 0, 10)]).values():
        future.result(PATIENCE_S)
    source = world.source(topic, group)
    source.subscribe(Listener())
    assert [record.position.offset for record in poll_for(source, 10)] == list(range(10, 20))
    give_up = time.monotonic() + PATIENCE_S
    while not world.metrics.count(OFFSET_GAPS) and time.monotonic() < give_up:
        source.poll(1, 0.05, 0.0)
    assert world.metrics.count(OFFSET_GAPS) == 7
    source.close()


def test_markers_of_transactions_are_no_lost_records(world: KafkaWorld) -> None:
    topic = world.topic()
    producer = Producer({"bootstrap.servers": world.config.bootstrap, "transactional.id": topic})
    producer.init_transactions(PATIENCE_S)
    for at in range(5):
        producer.begin_transaction()
        producer.produce(topic, b"%d" % at, partition=0)
        producer.commit_transaction(PATIENCE_S)
    source = world.source(topic, next(GROUPS))
    source.subscribe(Listener())
    assert [record.position.offset for record in poll_for(source, 5)] == [0, 2, 4, 6, 8]
    resolved = time.monotonic() + 1.5
    while time.monotonic() < resolved:
        source.poll(1, 0.1, 0.0)
    assert world.metrics.count(OFFSET_GAPS) == 0
    source.close()


def test_a_killed_broker_costs_nothing_but_time(kafka_home: Path) -> None:
    with KafkaServer(kafka_home) as server:
        world = KafkaWorld(KafkaConfig(server.bootstrap, session_timeout_ms=6_000), mock=False)
        topic, group = world.topic(), next(GROUPS)
        sink, reports = world.sink(), Reports()
        source = world.source(topic, group)
        source.subscribe(Listener())
        for at in range(200):
            sink.send(OutRecord(topic, b"u1", b"%d" % at, ()), reports)
        records = poll_for(source, 100)
        server.kill()
        for at in range(200, 400):
            sink.send(OutRecord(topic, b"u1", b"%d" % at, ()), reports)
        assert not sink.flush(soon(0.2))
        records += source.poll(500, 0.2, 0.0)  # an outage is no exception
        server.start()
        assert sink.flush(soon(30))
        assert reports.errors == [None] * 400
        give_up = time.monotonic() + 30
        while records[-1].value != b"399":  # if the session timed out, all comes again
            records += source.poll(100, 0.1, 0.0)
            assert time.monotonic() < give_up
        assert {r.position.offset: r.value for r in records} == {at: b"%d" % at for at in range(400)}
        for epoch in {r.epoch for r in records}:
            offsets = [r.position.offset for r in records if r.epoch == epoch]
            assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
        assert source.commit({records[-1].position.topic_partition: 400}).committed
        source.close()
        sink.close(soon())


def test_an_unknown_topic_says_how_to_make_it(world: KafkaWorld) -> None:
    source = world.source("no-such-topic", next(GROUPS))
    source.subscribe(Listener())
    with pytest.raises(ConfigurationError, match=r"no topic no-such-topic.*stream-scorer topics create"):
        poll_for(source, 1_000)
    source.close()


def test_topics_are_created_once_and_checked(world: KafkaWorld) -> None:
    names = [f"made-{time.time_ns()}", f"made-{time.time_ns()}-b"]
    with pytest.raises(ConfigurationError, match="stream-scorer topics create"):
        check_topics(world.config, names, PATIENCE_S)
    plan = TopicPlan(names, 5, 1, {"retention.ms": "60000"})
    assert sorted(create_topics(world.config, plan, PATIENCE_S)) == sorted(names)
    assert create_topics(world.config, plan, PATIENCE_S) == []
    info = check_topics(world.config, names, PATIENCE_S)
    assert {info.topics[name] for name in names} == {5}
    with pytest.raises(ConfigurationError, match=r"was not created.*eplication"):
        create_topics(world.config, TopicPlan([f"{names[0]}-c"], 1, 9), PATIENCE_S)
    with pytest.raises(ConfigurationError, match="was not created"):
        create_topics(world.config, TopicPlan(["no spaces please"], 1, 1), PATIENCE_S)


def test_a_record_the_broker_finds_too_large_is_reported_not_raised(world: KafkaWorld) -> None:
    topic, sink, reports = world.topic(), world.sink(), Reports()
    sink.send(OutRecord(topic, b"k", os.urandom(9 << 20), ()), reports)  # the client's limit
    assert reports.errors == []  # reports come from poll and flush only
    sink.poll()
    sink.send(OutRecord(topic, b"k", os.urandom(2 << 20), ()), reports)  # the broker's
    sink.send(OutRecord(topic, b"k", b"fine", ()), reports)
    assert sink.flush(soon())
    assert [error is None for error in reports.errors] == [False, False, True]
    sink.close(soon())


@pytest.fixture
def secured(kafka_server: KafkaServer) -> KafkaConfig:
    return KafkaConfig(
        kafka_server.sasl_bootstrap,
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        username="scorer",
        password="scorer-secret",
        session_timeout_ms=6_000,
    )


def test_a_login_works_and_a_wrong_password_is_said_without_telling_it(secured: KafkaConfig) -> None:
    assert connect(secured, PATIENCE_S).brokers
    wrong = replace(secured, password="wrong-secret-42")
    with pytest.raises(ConfigurationError, match=r"refused user 'scorer'.*kafka.password") as caught:
        connect(wrong, PATIENCE_S)
    assert "wrong-secret-42" not in str(caught.value)
    assert "wrong-secret-42" not in repr(wrong)


def test_a_user_without_rights_is_told_to_ask_for_them(secured: KafkaConfig, world: KafkaWorld) -> None:
    topic = world.topic()
    intruder = replace(secured, username="intruder", password="intruder-secret")
    outsider = KafkaWorld(intruder, mock=False)
    source = outsider.source(topic, next(GROUPS))
    source.subscribe(Listener())
    with pytest.raises(ConfigurationError, match=r"does not allow user 'intruder'.*ACL|may not see it"):
        poll_for(source, 1_000)
    source.close()
    sink, reports = KafkaSink(replace(intruder, delivery_timeout_s=5.0)), Reports()
    sink.send(OutRecord(topic, b"k", b"v", ()), reports)
    assert sink.flush(soon())
    assert len(reports.errors) == 1
    assert reports.errors[0] is not None
    sink.close(soon())


def test_tls_spoken_to_a_plain_listener_is_said(kafka_bootstrap: str) -> None:
    with pytest.raises(ConfigurationError, match=r"TLS|answered within"):
        connect(KafkaConfig(kafka_bootstrap, security_protocol="SSL"), 3.0)


def test_3_9_reads_writes_commits_and_restarts(kafka39_bootstrap: str) -> None:
    world = KafkaWorld(KafkaConfig(kafka39_bootstrap, session_timeout_ms=6_000), False, FakeMetrics())
    topic, group = world.topic(), next(GROUPS)
    sink, reports = world.sink(), Reports()
    for at in range(1_000):
        sink.send(OutRecord(topic, b"u%d" % (at % 50), b"%d" % at, (("h", b"\xff"),)), reports)
    assert sink.flush(soon())
    assert reports.errors == [None] * 1_000
    first = Draining(world, topic, group)
    while len(first.read) < 1_000:
        first.poll()
    assert {tuple(record.headers) for record in first.read} == {(("h", b"\xff"),)}
    first.source.close()  # commits from on_revoke
    second = Draining(world, topic, group)
    sink.send(OutRecord(topic, b"u1", b"last", ()), reports)
    assert sink.flush(soon())
    give_up = time.monotonic() + PATIENCE_S
    while not second.read and time.monotonic() < give_up:
        second.poll()
    assert [record.value for record in second.read] == [b"last"]
    second.source.close()
    sink.close(soon())
