"""A turn of the trainer: records as read -> events as the join takes them, each with where and when it came."""

from __future__ import annotations

from typing import NamedTuple, cast

from stream_scorer.core.heard import Heard, Page, hear_all
from stream_scorer.core.merge import Taken
from stream_scorer.core.records import TopicPartition
from stream_scorer.core.rejects import Reject
from stream_scorer.core.served import ServedLayout, ServedRequest
from stream_scorer.core.served_read import decode_all

Event = ServedRequest | Heard | Page


class Inbox(NamedTuple):
    """N events in the order of their records, an entry of each list an event, and what was refused."""

    events: list[Event]
    where: list[TopicPartition]
    event_ms: list[int]
    record_ms: list[int]  # the broker's time
    rejects: list[Reject]

    @property
    def served(self) -> int:
        """How many of the events are served requests."""
        return sum(type(event) is ServedRequest for event in self.events)


def read(taken: Taken, served_topic: str, layout: ServedLayout) -> Inbox:
    """Decode records of both topics, in order."""
    records, where = taken
    is_served = [partition.topic == served_topic for partition in where]
    served = iter(decode_all([r for r, it_is in zip(records, is_served, strict=True) if it_is], layout))
    heard = iter(hear_all([r for r, it_is in zip(records, is_served, strict=True) if not it_is]))
    decoded = [next(served) if it_is else next(heard) for it_is in is_served]
    record_ms = [record.timestamp_ms for record in records]
    rejects = [one for one in decoded if type(one) is Reject]
    if rejects:
        kept = [at for at, one in enumerate(decoded) if type(one) is not Reject]
        decoded, where = [decoded[at] for at in kept], [where[at] for at in kept]
        record_ms = [record_ms[at] for at in kept]
    events = cast("list[Event]", decoded)
    return Inbox(events, where, [event.ts_ms for event in events], record_ms, rejects)
