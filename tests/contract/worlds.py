"""The same small world on each rung: in memory, on librdkafka's mock cluster, on Apache Kafka."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from confluent_kafka import Producer

from stream_scorer.adapters.kafka import KafkaConfig, KafkaSink, KafkaSource
from stream_scorer.adapters.kafka_admin import TopicPlan, create_topics
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.records import Record, TopicPartition
from stream_scorer.ports import Sink, Source
from tests.fakes import FakeMetrics, FakeSink, FakeSource, Item

PARTITIONS = 3
PATIENCE_S = 20.0
MOCK_TOPICS = {f"mock-{at}": PARTITIONS for at in range(60)}
_numbers = itertools.count()


class Sent(NamedTuple):
    """A message put on a topic by hand."""

    partition: int
    value: bytes | None
    key: bytes | None = b"u1"
    headers: tuple[tuple[str, bytes], ...] = ()


class World(Protocol):
    """Where the contract is checked."""

    def topic(self) -> str: ...

    def produce(self, topic: str, messages: Sequence[Sent]) -> None: ...

    def source(self, topic: str, group: str) -> Source: ...

    def restarted(self, source: Source, topic: str, group: str) -> Source: ...

    def sink(self, lazy: bool = False) -> Sink: ...

    def read(self, topic: str, count: int) -> list[Sent]: ...


class FakeWorld:
    """In memory."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Sent]] = {}
        self._sinks: list[FakeSink] = []

    def topic(self) -> str:
        return f"fake-{next(_numbers)}"

    def produce(self, topic: str, messages: Sequence[Sent]) -> None:
        self._waiting.setdefault(topic, []).extend(messages)

    def source(self, topic: str, group: str) -> Source:
        items = [Item(sent.value, sent.partition, sent.key, headers=sent.headers) for sent in self._waiting[topic]]
        return FakeSource(items, topic, PARTITIONS)

    def restarted(self, source: Source, topic: str, group: str) -> Source:
        assert isinstance(source, FakeSource)
        return source.restart()

    def sink(self, lazy: bool = False) -> Sink:
        self._sinks.append(FakeSink(auto=not lazy))
        return self._sinks[-1]

    def read(self, topic: str, count: int) -> list[Sent]:
        found = [record for sink in self._sinks for record in sink.on(topic)]
        assert len(found) == count
        return [Sent(0, record.value, record.key, tuple(record.headers)) for record in found]


@dataclass
class KafkaWorld:
    """On a broker; ``mock`` is one that cannot create topics."""

    config: KafkaConfig
    mock: bool
    metrics: FakeMetrics = field(default_factory=FakeMetrics)

    def topic(self) -> str:
        if self.mock:
            return f"mock-{next(_numbers) % len(MOCK_TOPICS)}"
        name = f"test-{time.time_ns()}-{next(_numbers)}"
        create_topics(self.config, TopicPlan([name], PARTITIONS, 1), PATIENCE_S)
        return name

    def produce(self, topic: str, messages: Sequence[Sent]) -> None:
        producer = Producer({"bootstrap.servers": self.config.bootstrap, "linger.ms": 1} | dict(self.config.options))
        failed: list[object] = []
        for sent in messages:
            producer.produce(
                topic,
                sent.value,
                sent.key,
                partition=sent.partition,
                headers=list(sent.headers),
                on_delivery=lambda error, _message: failed.append(error) if error else None,
            )
        assert producer.flush(PATIENCE_S) == 0
        assert not failed

    def source(self, topic: str, group: str) -> KafkaSource:
        return KafkaSource(self.config, [topic], group, self.metrics, ends=True)

    def restarted(self, source: Source, topic: str, group: str) -> KafkaSource:
        source.close()
        return self.source(topic, group)

    def sink(self, lazy: bool = False) -> KafkaSink:
        return KafkaSink(replace(self.config, options={"linger.ms": 20_000}) if lazy else self.config)

    def read(self, topic: str, count: int) -> list[Sent]:
        source = self.source(topic, f"reader-{next(_numbers)}")
        source.subscribe(Listener())
        records = poll_for(source, count)
        source.close()
        return [Sent(r.position.partition, r.value, r.key, tuple(r.headers)) for r in records]


class Listener:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[TopicPartition]]] = []
        self.held: set[TopicPartition] = set()

    def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
        self.calls.append(("assign", sorted(partitions)))
        self.held |= set(partitions)

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        self.calls.append(("revoke", sorted(partitions)))
        self.held -= set(partitions)

    def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        self.calls.append(("lost", sorted(partitions)))
        self.held -= set(partitions)


def poll_for(source: Source, count: int, seconds: float = PATIENCE_S) -> list[Record]:
    """Poll until ``count`` records came."""
    records: list[Record] = []
    give_up = time.monotonic() + seconds
    while len(records) < count:
        assert time.monotonic() < give_up, f"{len(records)} of {count} records within {seconds:g} s"
        records += source.poll(count - len(records), 0.1, 0.005)
    return records


def soon(seconds: float = PATIENCE_S) -> Deadline:
    """A deadline on the real clock."""
    return Deadline.after(seconds, time.monotonic)
