"""Kafka as a `Source`: one consumer group member, owned by one thread.

librdkafka's batch consume is not safe beside pause, seek and rebalances from another thread (its CHANGELOG, 2.0.0), so
every method here is called from the thread that polls; rebalance callbacks fire inside `KafkaSource.poll`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message
from confluent_kafka import TopicPartition as ClientPartition

from stream_scorer.adapters.kafka_config import NOT_ALLOWED, ClientLog, KafkaConfig
from stream_scorer.adapters.kafka_gaps import OffsetGaps
from stream_scorer.adapters.kafka_health import PROBE_S, Outage, first_error, is_fatal
from stream_scorer.adapters.kafka_sink import KafkaSink
from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.core.metric_names import KAFKA_ERRORS
from stream_scorer.core.records import CommitResult, Position, Record, TopicPartition
from stream_scorer.ports import Metrics, RebalanceListener

__all__ = ["KafkaConfig", "KafkaSink", "KafkaSource"]

_log = structlog.get_logger("stream_scorer.kafka")

UNKNOWN_OFFSET = -1
COMMITTED_TRIES = 3
COMMIT_BOUND_S = 5.0  # retriable commit errors are retried for this long (one attempt may wait a session time-out)
RETRY_S = 0.05
_FENCED = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.FENCED_MEMBER_EPOCH,
        KafkaError.STALE_MEMBER_EPOCH,
        KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001 - librdkafka's own codes start with an underscore
        KafkaError._FENCED,  # noqa: SLF001
    }
)
_TRANSIENT = frozenset(
    {
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._TIMED_OUT,  # noqa: SLF001
        KafkaError._WAIT_COORD,  # noqa: SLF001
    }
)
_UNKNOWN_TOPIC = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})  # noqa: SLF001


@dataclass(slots=True)
class _Held:
    """An assigned partition: its assignment epoch, and the offset expected next (-1 when unknown)."""

    epoch: int
    next_offset: int
    ended: bool = False  # read to the end, as far as the client knows


class KafkaSource:
    """A consumer group member (`stream_scorer.ports.Source`)."""

    def __init__(
        self, config: KafkaConfig, topics: Sequence[str], group: str, metrics: Metrics, *, ends: bool = False
    ) -> None:
        """Connects to nothing yet. `ConfigurationError` when an option is unknown or wrong.

        ``ends``: take note of partitions' ends, so that `ended` knows them.
        """
        self._ends = ends
        self._config = config
        self._topics = list(topics)
        self._metrics = metrics
        self._outage = Outage(config, self._count_error)
        self._listener: RebalanceListener | None = None
        self._held: dict[tuple[str, int], _Held] = {}
        self._epoch = 0
        self._joined = False
        self._paused = False
        self._gaps = OffsetGaps(self._low_watermark, metrics)
        try:
            self._consumer = Consumer(self._options(group), logger=ClientLog(config))
        except KafkaException as error:
            raise ConfigurationError(f"kafka settings: {config.redact(first_error(error).str())}") from None

    def _options(self, group: str) -> dict[str, Any]:
        config = self._config
        options: dict[str, Any] = {
            "auto.offset.reset": "earliest",
            "max.poll.interval.ms": config.max_poll_interval_ms,
            "fetch.wait.max.ms": config.fetch_wait_ms,
            "fetch.queue.backoff.ms": 10,  # its default, 1 s, is a stall each time the prefetch queue is full
            "queued.max.messages.kbytes": 16 * 1024,
            "topic.metadata.refresh.interval.ms": 30_000,
        } | config.client()
        options |= {
            "group.id": group,
            "group.protocol": config.group_protocol,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": self._ends,
            "error_cb": self._outage.seen,
        }
        if config.group_protocol == "classic":  # with `consumer` (KIP-848) both are the broker's
            options["partition.assignment.strategy"] = "cooperative-sticky"
            options.setdefault("session.timeout.ms", config.session_timeout_ms)
            options.setdefault("heartbeat.interval.ms", max(200, config.session_timeout_ms // 5))
        return options

    def _count_error(self, name: str) -> None:
        self._metrics.inc(KAFKA_ERRORS, error=name)

    def subscribe(self, listener: RebalanceListener) -> None:
        """See `stream_scorer.ports.Source`."""
        if self._listener is not None:
            raise ValueError("subscribe is called once")
        self._listener = listener
        self._consumer.subscribe(
            self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def poll(self, max_records: int, wait_s: float, linger_s: float) -> list[Record]:
        """See `stream_scorer.ports.Source`.

        ``consume(n, t)`` waits all of ``t`` unless it gets ``n`` messages, hence one `poll` for the first.
        Raises `FatalError` (poll interval exceeded, fatal client error, outage beyond the limit) and
        `ConfigurationError` (unknown topic, no right to read).
        """
        try:
            first = self._consumer.poll(wait_s)
            self._outage.check(self._probe)
            if first is None:
                self._gaps.resolve()
                return []
            records = self._records([first])
            if max_records > 1:
                rest = self._consumer.consume(max_records - 1, linger_s)
                records = [record for record in records if self._is_held(record)]  # consume may have rebalanced
                records += self._records(rest)
        except KafkaException as error:
            raise FatalError(f"polling failed: {self._config.explain(first_error(error))}") from None
        self._gaps.resolve()
        return self._unless_paused(records)

    def _records(self, messages: Sequence[Message]) -> list[Record]:
        records: list[Record] = []
        held = self._held
        for message in messages:
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
                    self._end(message)
                else:
                    self._message_error(error)
                continue
            topic, partition, offset = str(message.topic()), int(message.partition() or 0), int(message.offset() or 0)
            state = held.get((topic, partition))
            if state is None:  # revoked while it waited in the client's queue: its new owner will read it
                continue
            if offset > state.next_offset != UNKNOWN_OFFSET:
                self._gaps.seen(TopicPartition(topic, partition), state.next_offset, offset)
            state.next_offset, state.ended = offset + 1, False
            records.append(
                Record(
                    Position(topic, partition, offset),
                    message.key(),
                    message.value(),
                    _headers(message),
                    message.timestamp()[1],
                    state.epoch,
                )
            )
        if messages:
            self._outage.progress()
        return records

    def _end(self, message: Message) -> None:
        """The client has read a partition to its end; what lies between was not for us (markers of transactions)."""
        state = self._held.get((str(message.topic()), int(message.partition() or 0)))
        if state is not None:
            state.next_offset, state.ended = max(state.next_offset, int(message.offset() or 0)), True

    def _is_held(self, record: Record) -> bool:
        state = self._held.get(record.position.topic_partition)
        return state is not None and state.epoch == record.epoch

    def _message_error(self, error: KafkaError) -> None:
        code = error.code()
        if code == KafkaError._MAX_POLL_EXCEEDED:  # noqa: SLF001
            raise FatalError(
                f"no poll for {self._config.max_poll_interval_ms} ms, so the group gave the partitions away: "
                "make batches smaller or raise kafka.max_poll_interval_ms"
            )
        if is_fatal(error):
            raise FatalError(f"the Kafka client cannot go on: {self._config.explain(error)}")
        if code in NOT_ALLOWED:
            raise ConfigurationError(self._config.explain(error))
        if code in _UNKNOWN_TOPIC:
            self._require_topics()
        _log.warning("kafka read error", error=self._config.explain(error))
        self._count_error(error.name())

    def _require_topics(self) -> None:
        """`ConfigurationError` when a subscribed topic really is not there (a restarting broker may say so briefly)."""
        try:
            known = self._consumer.list_topics(timeout=5.0).topics
        except KafkaException:
            return
        missing = [name for name in self._topics if name not in known]
        if missing:
            raise ConfigurationError(self._config.missing(missing))

    def _probe(self) -> bool:
        try:
            self._consumer.list_topics(self._topics[0], timeout=PROBE_S)
        except KafkaException:
            return False
        return True

    def _unless_paused(self, records: list[Record]) -> list[Record]:
        if not self._paused or not records:
            return records
        back: dict[TopicPartition, int] = {}
        for record in records:
            back.setdefault(record.position.topic_partition, record.position.offset)
        self.seek(back)
        return []

    def _low_watermark(self, where: TopicPartition) -> int:
        try:
            marks = self._consumer.get_watermark_offsets(ClientPartition(*where), timeout=PROBE_S, cached=False)
        except KafkaException as error:
            _log.warning("no low watermark", partition=where, error=self._config.explain(first_error(error)))
            return 0
        return int(marks[0]) if marks else 0

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> CommitResult:
        """See `stream_scorer.ports.Source`. Retriable errors are retried for `COMMIT_BOUND_S`, then returned."""
        if not next_offsets:
            return CommitResult(committed=True, fenced=False, error=None)
        gone = next_offsets.keys() - self._held.keys()
        if gone:  # the broker would take it, and undo what the new owner has committed
            return CommitResult(committed=False, fenced=True, error=f"{sorted(gone)[0]} is not held any more")
        offsets = [ClientPartition(where.topic, where.partition, offset) for where, offset in next_offsets.items()]
        give_up = time.monotonic() + COMMIT_BOUND_S
        while True:
            error = self._commit_once(offsets)
            if error is None:
                self._outage.progress()
                return CommitResult(committed=True, fenced=False, error=None)
            if is_fatal(error):
                raise FatalError(f"commit failed: {self._config.explain(error)}")
            if error.code() in NOT_ALLOWED:
                raise ConfigurationError(self._config.explain(error))
            if error.code() not in _TRANSIENT or time.monotonic() > give_up:
                fenced = error.code() in _FENCED
                return CommitResult(committed=False, fenced=fenced, error=self._config.explain(error))
            self._count_error(error.name())
            time.sleep(RETRY_S)

    def _commit_once(self, offsets: list[ClientPartition]) -> KafkaError | None:
        try:
            done = self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            return first_error(error)
        return next((part.error for part in done or () if part.error is not None), None)

    def seek(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """See `stream_scorer.ports.Source`. A partition just assigned may not be ready: retried for a bounded time."""
        give_up = time.monotonic() + COMMIT_BOUND_S
        for where, offset in next_offsets.items():
            while where in self._held:
                try:
                    self._consumer.seek(ClientPartition(where.topic, where.partition, offset))
                except KafkaException as error:
                    problem = first_error(error)
                    if problem.code() != KafkaError._STATE or time.monotonic() > give_up:  # noqa: SLF001
                        raise FatalError(f"seek {where} to {offset}: {self._config.explain(problem)}") from None
                    time.sleep(RETRY_S)
                else:
                    self._held[where].next_offset, self._held[where].ended = offset, False
                    break

    @property
    def joined(self) -> bool:
        """Whether the group has taken us in, if only as a member in reserve."""
        return self._joined

    @property
    def assigned(self) -> int:
        """How many partitions are held."""
        return len(self._held)

    def pause(self) -> None:
        """See `stream_scorer.ports.Source`. Holds for partitions assigned later too."""
        self._paused = True
        self._consumer.pause([ClientPartition(*where) for where in self._held])

    def resume(self) -> None:
        """See `stream_scorer.ports.Source`."""
        self._paused = False
        self._consumer.resume([ClientPartition(*where) for where in self._held])

    def lag(self) -> int:
        """See `stream_scorer.ports.Source`. Asks no broker: a partition nothing is known of yet counts 0."""
        total = 0
        for where, state in self._held.items():
            marks = self._consumer.get_watermark_offsets(ClientPartition(*where), cached=True)
            if marks is not None and marks[1] >= 0:
                total += max(0, marks[1] - max(state.next_offset, marks[0], 0))
        return total

    def positions(self) -> Mapping[TopicPartition, int]:
        """See `stream_scorer.ports.Source`."""
        known = ((where, state.next_offset) for where, state in self._held.items())
        return {TopicPartition(*where): offset for where, offset in known if offset != UNKNOWN_OFFSET}

    def ended(self) -> Collection[TopicPartition]:
        """See `stream_scorer.ports.Source`. Empty unless made with ``ends``."""
        return {TopicPartition(*where) for where, state in self._held.items() if state.ended}

    def close(self) -> None:
        """See `stream_scorer.ports.Source`. Calling twice is fine."""
        try:
            self._consumer.close()
        except KafkaException as error:
            _log.warning("leaving the group failed", error=self._config.explain(first_error(error)))
        self._held.clear()

    def _on_assign(self, consumer: Consumer, partitions: list[ClientPartition]) -> None:
        consumer.incremental_assign(partitions)
        self._joined = True
        if not partitions:  # a rebalance that changed nothing for us
            return
        if self._paused:
            consumer.pause(partitions)
        self._epoch += 1
        committed = self._committed(partitions)
        for part in partitions:
            where = TopicPartition(part.topic, part.partition)
            self._held[where] = _Held(self._epoch, committed.get(where, UNKNOWN_OFFSET))
        self._told.on_assign([TopicPartition(part.topic, part.partition) for part in partitions])

    def _committed(self, partitions: list[ClientPartition]) -> dict[TopicPartition, int]:
        """Where reading goes on, so that a gap at the very start is seen too; empty when a few tries do not tell."""
        for left in reversed(range(COMMITTED_TRIES)):
            try:
                known = self._consumer.committed(partitions, timeout=PROBE_S)
                break
            except KafkaException as error:
                if not left:
                    _log.warning("committed offsets unknown", error=self._config.explain(first_error(error)))
                    return {}
        return {TopicPartition(p.topic, p.partition): p.offset for p in known if p.offset >= 0 and p.error is None}

    def _on_revoke(self, consumer: Consumer, partitions: list[ClientPartition]) -> None:
        leaving = [TopicPartition(part.topic, part.partition) for part in partitions]
        self._told.on_revoke(leaving)
        for where in leaving:
            self._held.pop(where, None)
        consumer.incremental_unassign(partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[ClientPartition]) -> None:
        gone = [TopicPartition(part.topic, part.partition) for part in partitions]
        for where in gone:
            self._held.pop(where, None)
        self._told.on_lost(gone)
        consumer.incremental_unassign(partitions)

    @property
    def _told(self) -> RebalanceListener:
        if self._listener is None:
            raise ValueError("subscribe first")
        return self._listener


def _headers(message: Message) -> list[tuple[str, bytes]]:
    """Headers as they are; a null value becomes empty bytes. A name that is not UTF-8 costs the message its headers."""
    try:
        headers = cast("list[tuple[str, bytes | None]] | None", message.headers())
    except UnicodeDecodeError:
        _log.warning("message with a header name that is not UTF-8", topic=message.topic(), offset=message.offset())
        return []
    return [(name, value or b"") for name, value in headers] if headers else []
