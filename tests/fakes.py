"""The world in memory. Each fake keeps its port's contract: tests/contract runs the same suite on fake and real."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np

from esmm.batch import FeatureBlock, RankBatch, Scores, SourceLayout, zero_block
from stream_scorer.core.assemble import first_seen
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.metric_names import Metric
from stream_scorer.core.records import (
    CommitResult,
    DeliveryReport,
    FeatureRows,
    Fetched,
    OutRecord,
    Position,
    Record,
    TopicPartition,
)
from stream_scorer.ports import Predictor, RebalanceListener


class FakeClock:
    """A clock turned by hand."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._passed_s = 0.0

    def now_ms(self) -> int:
        return self._now_ms + int(self._passed_s * 1000)

    def monotonic_s(self) -> float:
        return self._passed_s

    def advance(self, seconds: float) -> None:
        self._passed_s += seconds


class FakeMetrics:
    """Remembers everything; a label that the metric does not declare is an error."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.gauges: dict[tuple[str, ...], float] = {}
        self.seen: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def inc(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        self.counts[self._key(metric, "counter", labels)] += amount

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.gauges[self._key(metric, "gauge", labels)] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.seen[self._key(metric, "histogram", labels)].append(value)

    def count(self, metric: Metric, *labels: str) -> float:
        return self.counts[metric.name, *labels]

    @staticmethod
    def _key(metric: Metric, kind: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        assert metric.kind == kind, f"{metric.name} is a {metric.kind}"
        assert set(labels) == set(metric.labels), f"{metric.name} has labels {metric.labels}, got {set(labels)}"
        return (metric.name, *(labels[name] for name in metric.labels))


class Aborted(BaseException):
    """The process was killed. Not an Exception: no handler in the code under test may survive it."""


class Fault(NamedTuple):
    """Something that happens to a source between two records. ``partitions`` None: all that are held."""

    kind: Literal["abort", "revoke", "lost", "pause"]
    partitions: tuple[int, ...] | None = None
    returns: bool = True  # the partitions come back at the next poll


ABORT = Fault("abort")  # poll raises Aborted
REVOKE = Fault("revoke")  # all partitions are revoked, and come back at the next poll
LOST = Fault("lost")  # the same, without a chance to finish
PAUSE = Fault("pause")  # nothing comes for one poll


class Item(NamedTuple):
    """A message that arrives."""

    value: bytes | None
    partition: int = 0
    key: bytes | None = b"u1"
    timestamp_ms: int = 1_700_000_000_000
    headers: tuple[tuple[str, bytes], ...] = ()


class FakeSource:
    """One topic in memory and its only consumer. Items arrive in order when nothing that has arrived is left to read.

    `committed` is the group's state and outlives the consumer: `restart` gives the next one.
    """

    def __init__(
        self, items: Iterable[Item | bytes | Fault] = (), topic: str = "score-requests", partitions: int = 1
    ) -> None:
        self.topic = topic
        self.script: deque[Item | Fault] = deque(Item(x) if isinstance(x, bytes) else x for x in items)
        self.log: dict[TopicPartition, list[Item]] = {TopicPartition(topic, n): [] for n in range(partitions)}
        self.committed: dict[TopicPartition, int] = {}
        self.commits: list[dict[TopicPartition, int]] = []
        self.fence = False  # the group moved on: commits are not taken
        self.polls: list[tuple[int, float, float]] = []
        self.epoch = 0
        self._restart()

    def _restart(self) -> None:
        self.paused = False
        self.held: dict[TopicPartition, int] = {}  # partition -> epoch
        self.position: dict[TopicPartition, int] = {}
        self._waiting: set[TopicPartition] = set(self.log)  # assigned at the next poll
        self._listener: RebalanceListener | None = None
        self.closed = False

    def restart(self) -> "FakeSource":
        """The process died and came back: a new consumer of the same group, reading on from what was committed."""
        self._restart()
        return self

    def append(self, item: Item | bytes) -> Position:
        """A message arrives now."""
        item = Item(item) if isinstance(item, bytes) else item
        where = TopicPartition(self.topic, item.partition)
        self.log[where].append(item)
        return Position(*where, len(self.log[where]) - 1)

    @property
    def exhausted(self) -> bool:
        """Everything has arrived and was read."""
        return not self.script and not self._waiting and all(self.position[p] >= len(self.log[p]) for p in self.held)

    def subscribe(self, listener: RebalanceListener) -> None:
        if self._listener is not None:
            raise ValueError("subscribe is called once")
        self._listener = listener

    def poll(self, max_records: int, wait_s: float, linger_s: float) -> list[Record]:
        assert max_records >= 1
        self.polls.append((max_records, wait_s, linger_s))
        self._assign()
        out: list[Record] = []
        while len(out) < max_records:
            found = None if self.paused else self._read()
            if found is not None:
                out.append(found)
            elif not self.script or (self.paused and isinstance(self.script[0], Item)):
                break
            elif isinstance(self.script[0], Item):
                self.append(self.script.popleft())
            elif out and self.script[0].kind in ("abort", "pause"):
                break  # what was read before is handed out first
            else:
                fault = self.script.popleft()
                if fault.kind == "pause":
                    return []
                self._suffer(fault)
                return [one for one in out if self.held.get(one.position.topic_partition) == one.epoch]
        return out

    def _assign(self) -> None:
        assert self._listener is not None, "subscribe first"
        assert not self.closed
        if not self._waiting:
            return
        self.epoch += 1
        fresh, self._waiting = sorted(self._waiting), set()
        for where in fresh:
            self.held[where] = self.epoch
            self.position[where] = self.committed.get(where, 0)
        self._listener.on_assign(fresh)

    def _read(self) -> Record | None:
        for where, epoch in self.held.items():
            offset = self.position[where]
            if offset < len(self.log[where]):
                self.position[where] += 1
                item = self.log[where][offset]
                return Record(Position(*where, offset), item.key, item.value, item.headers, item.timestamp_ms, epoch)
        return None

    def _suffer(self, fault: Fault) -> None:
        if fault.kind == "abort":
            raise Aborted
        gone = [where for where in self.held if fault.partitions is None or where.partition in fault.partitions]
        assert self._listener is not None
        if fault.kind == "revoke":
            self._listener.on_revoke(gone)
        for where in gone:
            del self.held[where]
        if fault.kind == "lost":
            self._listener.on_lost(gone)
        if fault.returns:
            self._waiting.update(gone)

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> CommitResult:
        if self.fence or not set(next_offsets) <= set(self.held):
            return CommitResult(committed=False, fenced=True, error="ILLEGAL_GENERATION")
        self.commits.append(dict(next_offsets))
        self.committed.update(next_offsets)
        return CommitResult(committed=True, fenced=False, error=None)

    def seek(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        self.position.update({where: offset for where, offset in next_offsets.items() if where in self.held})

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def lag(self) -> int:
        return sum(len(self.log[where]) - self.position[where] for where in self.held)

    def positions(self) -> dict[TopicPartition, int]:
        return {where: self.position[where] for where in self.held}

    def ended(self) -> set[TopicPartition]:
        return {where for where in self.held if self.position[where] >= len(self.log[where])}

    def close(self) -> None:
        if not self.closed and self.held and self._listener is not None:
            self._suffer(Fault("revoke", returns=False))
        self.closed = True


class FakeSink:
    """A broker's log. ``auto``: all is acknowledged at the next poll or flush; else by `ack`, in any order."""

    def __init__(self, auto: bool = True) -> None:
        self.auto = auto
        self.sent: list[OutRecord] = []
        self.delivered: list[OutRecord] = []  # acknowledged, in the order of acknowledgement
        self.waiting: list[tuple[OutRecord, DeliveryReport]] = []
        self.refuse: object | None = None  # an error: what is sent from now on fails with it
        self.closed = False
        self._ready: deque[tuple[OutRecord, DeliveryReport, object | None]] = deque()

    def send(self, record: OutRecord, report: DeliveryReport) -> None:
        self.sent.append(record)
        if self.refuse is not None:
            self._ready.append((record, report, self.refuse))
        elif self.auto:
            self._ready.append((record, report, None))
        else:
            self.waiting.append((record, report))

    def ack(self, *indices: int, error: object | None = None) -> None:
        """Acknowledge (or fail) these of the waiting messages, all when none are named; reported at the next poll."""
        chosen = set(indices or range(len(self.waiting)))
        for at in indices or range(len(self.waiting)):
            self._ready.append((*self.waiting[at], error))
        self.waiting = [pair for at, pair in enumerate(self.waiting) if at not in chosen]

    def poll(self) -> None:
        while self._ready:
            record, report, error = self._ready.popleft()
            if error is None:
                self.delivered.append(record)
            report(error, record)

    def flush(self, deadline: Deadline) -> bool:
        self.poll()
        return not self.waiting

    def purge(self) -> None:
        self._ready.extend((record, report, "_PURGE_QUEUE") for record, report in self.waiting)
        self.waiting = []

    def close(self, deadline: Deadline) -> None:
        self.flush(deadline)
        self.purge()
        self.poll()
        self.closed = True

    def on(self, topic: str) -> list[OutRecord]:
        """Delivered messages of one topic."""
        return [record for record in self.delivered if record.topic == topic]


@dataclass
class FakeFeatures:
    """A feature store. Ids that were not `put` are derived from the id, so that a test need not prepare anything;
    ids that start with ``gone`` are missing."""

    user: SourceLayout
    item: SourceLayout
    down: bool = False
    event_ms: int = 1_700_000_000_000 - 5_000
    fetches: list[tuple[list[str], list[str]]] = field(default_factory=list)
    stored: dict[tuple[str, str], tuple[FeatureBlock, int]] = field(default_factory=dict)

    def put(self, layout: SourceLayout, entity: str, block: FeatureBlock, event_ms: int) -> None:
        """Store one row."""
        self.stored[layout.source, entity] = (block, event_ms)

    def fetch(self, users: Sequence[str], items: Sequence[str], now_ms: int, deadline: Deadline) -> Fetched:
        users, user_of_R = first_seen(users)
        items, item_of_B = first_seen(items)
        self.fetches.append((users, items))
        return Fetched(self._rows(self.user, users), self._rows(self.item, items), self.down, user_of_R, item_of_B)

    def _rows(self, layout: SourceLayout, ids: Sequence[str]) -> FeatureRows:
        block = zero_block(layout, len(ids))
        event_ms = np.zeros(len(ids), np.int64)
        missing = np.ones(len(ids), np.bool_)
        for at, entity in enumerate(ids):
            found = None if self.down else self.row(layout, entity)
            if found is not None:
                block.ids_NS[at], block.dense_ND[at] = found[0].ids_NS[0], found[0].dense_ND[0]
                event_ms[at], missing[at] = found[1], False
        return FeatureRows(block, event_ms, missing, np.full(len(ids), -1), np.zeros(len(ids), np.int64))

    def row(self, layout: SourceLayout, entity: str) -> tuple[FeatureBlock, int] | None:
        """What is known of one entity."""
        stored = self.stored.get((layout.source, entity))
        if stored is not None or entity.startswith("gone"):
            return stored
        rng = np.random.default_rng(crc32(f"{layout.source}:{entity}".encode()))
        ids = rng.integers(0, 1_000, (1, layout.id_width))
        return FeatureBlock(ids, rng.random((1, layout.dense_width), dtype=np.float32)), self.event_ms


class FakePending(NamedTuple):
    """A launched batch; nothing is computed yet, so that a caller who changes the arrays is found out."""

    batch: RankBatch
    number: int

    @property
    def rows(self) -> int:
        return self.batch.rows


POISON = np.float32(666)  # a dense value that makes the fake model give NaN for its rows


class FakePredictor:
    """Scores by a fixed function of the feature values and the version: see `fake_scores`."""

    def __init__(self, version: int = 1) -> None:
        self._version = version
        self.closed = False
        self.launched = 0
        self.collected = 0

    @property
    def version(self) -> int:
        return self._version

    def launch(self, batch: RankBatch) -> FakePending:
        assert not self.closed
        self.launched += 1
        return FakePending(batch, self.launched)

    def collect(self, pending: Any) -> Scores:
        assert not self.closed
        self.collected += 1
        assert pending.number == self.collected, "batches are collected in the order they were launched"
        batch = pending.batch
        user, item = batch.user.take(batch.user_of_B), batch.item.take(batch.item_of_B)
        return fake_scores(user, item, batch.context, self._version)

    def close(self) -> None:
        self.closed = True


def fake_scores(user: FeatureBlock, item: FeatureBlock, context: FeatureBlock, version: int) -> Scores:
    """Scores of B rows, exact and independent of the other rows. A POISON among the dense values gives NaN."""
    blocks = (user, item, context)
    mixed = np.full(user.rows, version, np.int64)
    for at, block in enumerate(blocks):
        columns = np.concatenate([block.ids_NS, block.dense_ND.view(np.int32).astype(np.int64)], axis=1)
        for column in columns.T:
            mixed = (mixed * 31 + column + at) % 1_000_003
    ctr = ((mixed % 1009 + 1) / np.float32(1010)).astype(np.float32)
    cvr = ((mixed % 997 + 1) / np.float32(998)).astype(np.float32)
    ctr[np.any([(block.dense_ND == POISON).any(axis=1) for block in blocks], axis=0)] = np.nan
    return Scores(ctr, cvr, ctr * cvr, version)


class FakeMailbox:
    """Predictors to be taken, one a take."""

    def __init__(self, *predictors: Predictor) -> None:
        self.waiting: deque[Predictor] = deque(predictors)

    def put(self, predictor: Predictor) -> None:
        self.waiting.append(predictor)

    def take(self) -> Predictor | None:
        return self.waiting.popleft() if self.waiting else None
