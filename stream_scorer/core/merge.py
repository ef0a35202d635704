"""One order for records of many partitions that does not depend on how they were polled.

Records are released by (record time, topic, partition, offset). The smallest can only be known when every partition has
something to show, so an empty partition is waited for, until it is known to have nothing: the client has read it to
its end, and all others too, or it has been silent for ``idle_after_s``.

So for data that is in the topics already (a replay, or what a restarted trainer reads again) the order is a function
of the data alone, however slowly a partition is fetched. At the live end of a stream it is that of arrival within the
waiting time. Two things end the waiting for a partition that has more, and are counted, for then the order depends on
luck: silence of ``stall_after_s``, and ``max_buffered`` records waiting. Time is a parameter.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from stream_scorer.core.records import Position, Record, TopicPartition

_NOTHING: Final = -1  # no record yet


class _Queue:
    __slots__ = ("heard_s", "newest_ms", "partition", "records", "released_ms")

    def __init__(self, partition: TopicPartition, now_s: float, newest_ms: int) -> None:
        self.partition = partition
        self.records: deque[_Keyed] = deque()
        self.newest_ms = newest_ms  # record time is made monotone within a partition, which keeps offset order
        self.released_ms = newest_ms  # of the last record that was taken
        self.heard_s = now_s


_Keyed = tuple[int, Position, Record, _Queue]  # record time and position are the order; positions differ


class Taken(NamedTuple):
    """Records in order, and the partition of each."""

    records: list[Record]
    where: list[TopicPartition]


class Merge:
    """Push what was polled, take what is in order."""

    def __init__(self, idle_after_s: float, max_buffered: int, stall_after_s: float = 30.0) -> None:
        """From ``max_buffered`` records on nothing empty is waited for."""
        self.impatient = 0  # times that a partition was not waited for although it may have had more
        self._idle_after_s, self._stall_after_s = idle_after_s, stall_after_s
        self._max_buffered = max_buffered
        self._queues: dict[TopicPartition, _Queue] = {}
        self._buffered = 0
        self._newest_ms: dict[TopicPartition, int] = {}  # of the last record taken, where there is no queue

    def __len__(self) -> int:
        """Records buffered."""
        return self._buffered

    def assign(self, partitions: Iterable[TopicPartition], now_s: float) -> None:
        """Wait for these from now on."""
        for partition in partitions:
            self._queue(partition, now_s)

    def revoke(self, partitions: Iterable[TopicPartition]) -> None:
        """Drop what is buffered of these: whoever reads them next starts at the committed offset."""
        for partition in partitions:
            queue = self._queues.pop(partition, None)
            if queue is not None:
                self._buffered -= len(queue.records)
                self._newest_ms[partition] = queue.released_ms

    def push(self, records: Sequence[Record], now_s: float) -> None:
        """Polled records, in offset order within each partition."""
        queue: _Queue | None = None
        for record in records:
            position, timestamp_ms = record.position, record.timestamp_ms
            if queue is None or position[:2] != queue.partition:  # the client gives a partition's records in a row
                queue = self._queue(position.topic_partition, now_s)
                queue.heard_s = now_s
            if timestamp_ms > queue.newest_ms:  # noqa: PLR1730  max() costs a call a record
                queue.newest_ms = timestamp_ms
            queue.records.append((queue.newest_ms, position, record, queue))
        self._buffered += len(records)

    def take(self, limit: int, now_s: float, ended: Collection[TopicPartition]) -> Taken:
        """Up to ``limit`` records in order; fewer when the next one cannot be known yet. ``ended``: read to the end."""
        caught_up = all(partition in ended for partition in self._queues)
        records: list[Record] = []
        where: list[TopicPartition] = []
        heads: list[_Keyed] = []
        for partition, queue in self._queues.items():
            if queue.records:
                heads.append(queue.records[0])
            elif not self._is_idle(queue, now_s, partition in ended, caught_up):
                return Taken(records, where)
        heapq.heapify(heads)
        buffered = self._buffered
        while heads and len(records) < limit:
            newest_ms, _, record, queue = heads[0]
            waiting = queue.records
            waiting.popleft()
            records.append(record)
            where.append(queue.partition)
            queue.released_ms = newest_ms
            if waiting:
                heapq.heapreplace(heads, waiting[0])
                continue
            self._buffered = buffered - len(records)
            if not self._is_idle(queue, now_s, queue.partition in ended, caught_up):
                break
            heapq.heappop(heads)
        self._buffered = buffered - len(records)
        return Taken(records, where)

    def state(self) -> dict[str, int]:
        """Partition (``topic/number``) -> the newest record time taken, for a checkpoint."""
        known = self._newest_ms | {partition: queue.released_ms for partition, queue in self._queues.items()}
        return {f"{p.topic}/{p.partition}": at_ms for p, at_ms in sorted(known.items()) if at_ms != _NOTHING}

    def restore(self, state: Mapping[str, int]) -> None:
        """Take over `state`, before the first push."""
        self._newest_ms = {}
        for name, newest_ms in state.items():
            topic, _, number = name.rpartition("/")
            self._newest_ms[TopicPartition(topic, int(number))] = newest_ms

    def _queue(self, partition: TopicPartition, now_s: float) -> _Queue:
        queue = self._queues.get(partition)
        if queue is None:
            queue = self._queues[partition] = _Queue(partition, now_s, self._newest_ms.get(partition, _NOTHING))
        return queue

    def _is_idle(self, queue: _Queue, now_s: float, ended: bool, caught_up: bool) -> bool:
        if caught_up or (ended and now_s - queue.heard_s >= self._idle_after_s):
            return True
        hurried = self._buffered >= self._max_buffered or now_s - queue.heard_s >= self._stall_after_s
        self.impatient += hurried
        return hurried
