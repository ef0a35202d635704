"""What crosses the edge between the pure core and the clients: bytes with positions, and packed feature records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from esmm.batch import Bool, FeatureBlock, Int64

Headers = Sequence[tuple[str, bytes]]
DeliveryReport = Callable[[object | None, object], None]  # (error or None, whatever the client passes along)


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


_topic_partition = lru_cache(maxsize=4_096)(TopicPartition)  # asked for with every record: found, not made


class Position(NamedTuple):
    """Where a record was read. A committed offset is ``offset + 1``."""

    topic: str
    partition: int
    offset: int

    @property
    def topic_partition(self) -> TopicPartition:
        """Without the offset."""
        return _topic_partition(*self[:2])


class Record(NamedTuple):
    """One message as read, untouched. ``epoch`` counts assignments: results of an older epoch are dropped."""

    position: Position
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int
    epoch: int


class OutRecord(NamedTuple):
    """One message to send."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


class FeatureRows(NamedTuple):
    """Features of N entities as fetched; a row that is missing holds the default vector."""

    block: FeatureBlock
    event_ms_N: Int64  # event time of the record, 0 where missing
    missing_N: Bool  # default vector used
    slot_N: Int64  # slot in the in-process cache, -1 when not cached
    generation_N: Int64  # see RankBatch.item_generation_I


class Fetched(NamedTuple):
    """One fetch for a batch of R requests and B rows: each user and each item once, in first-seen order.

    ``degraded`` is true when the store could not answer in time or at all.
    """

    users: FeatureRows  # U
    items: FeatureRows  # I
    degraded: bool
    user_of_R: Int64  # request -> index into users
    item_of_B: Int64  # row -> index into items


class CommitResult(NamedTuple):
    """A commit as a value: ``fenced`` means the group moved on and the offsets were not taken."""

    committed: bool
    fenced: bool
    error: str | None
