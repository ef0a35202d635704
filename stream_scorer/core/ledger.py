"""What may be committed: a ticket a batch, done when the broker has acknowledged all its output, settled in order.

A partition's offset moves only over a prefix of done tickets, and only forward. Losing a partition forgets it: what is
still on its way for it settles nothing. A failed delivery is latched and its ticket is never done.

Everything here runs on the loop's thread: delivery reports arrive inside `Sink.poll` and `Sink.flush`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stream_scorer.core.errors import FatalError
from stream_scorer.core.records import Record, TopicPartition


class Ticket:
    """One batch on its way: the records it stands for, and how many of its messages are acknowledged.

    `report` is the delivery callback of every message of the batch. Reports may arrive before `seal` says how many
    messages there are.
    """

    __slots__ = ("_acknowledged", "_expected", "_ledger", "_scored", "abandoned", "stale")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._expected = -1
        self._acknowledged = 0
        self._scored = 0
        self.stale = False  # some of its partitions were forgotten: check each record before publishing for it
        self.abandoned = False  # its records will be read again: whatever is reported of it no longer counts

    def seal(self, messages: int, scored: int) -> None:
        """All ``messages`` have been sent; ``scored`` of the records were requests that got their scores."""
        self._expected = messages
        self._scored = scored
        self._check()

    def report(self, error: object | None, _message: object) -> None:
        """Delivery report of one message."""
        if error is None:
            self._acknowledged += 1
            if self._acknowledged == self._expected:
                self._check()
        elif not self.abandoned:
            self._ledger.fail(error)

    @property
    def done(self) -> bool:
        """Sent, and all of it acknowledged."""
        return self._acknowledged == self._expected

    def _check(self) -> None:
        if self.done and not self.abandoned:
            self._ledger.finished(self, self._scored)


class _Span(NamedTuple):
    """A ticket's records of one partition: offsets ``first`` to ``next_offset - 1``."""

    ticket: Ticket
    first: int
    next_offset: int


class _Partition:
    """One held partition."""

    __slots__ = ("committed", "epoch", "opened", "settled", "spans")

    def __init__(self) -> None:
        self.epoch: int | None = None  # of its first record
        self.spans: deque[_Span] = deque()  # not settled yet, in order
        self.opened = -1  # next offset that may be opened
        self.settled = -1
        self.committed = -1

    def settle(self) -> int:
        """Move over the done tickets at the front; the next offset that may be committed, -1 when none."""
        spans = self.spans
        while spans and spans[0].ticket.done:
            self.settled = spans.popleft().next_offset
        return self.settled


class Ledger:
    """Tickets, and how far each held partition has come."""

    def __init__(self) -> None:
        self._held: dict[TopicPartition, _Partition] = {}
        self._open: set[Ticket] = set()
        self._scored = 0
        self._failure: str | None = None

    @property
    def in_flight(self) -> int:
        """Tickets opened and not done."""
        return len(self._open)

    @property
    def scored(self) -> int:
        """Requests whose scores the broker has acknowledged, since the start."""
        return self._scored

    @property
    def held(self) -> list[TopicPartition]:
        """Partitions assigned to us."""
        return list(self._held)

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Start these afresh: offsets may be anything again."""
        fresh = list(partitions)
        self.forget(fresh)
        self._held.update((partition, _Partition()) for partition in fresh)

    def forget(self, partitions: Iterable[TopicPartition]) -> None:
        """They are ours no longer: nothing on its way for them will be committed."""
        for where in partitions:
            gone = self._held.pop(where, None)
            if gone is not None:
                for span in gone.spans:
                    span.ticket.stale = True

    def admit(self, record: Record) -> bool:
        """Whether a record just read is of an assignment we have. Raises FatalError for one we were never told of."""
        part = self._held.get(record.position.topic_partition)
        if part is None:
            return False
        if part.epoch is None:
            part.epoch = record.epoch
        if record.epoch > part.epoch:
            raise FatalError(
                f"{_name(record.position.topic_partition)}: a record of assignment {record.epoch} while "
                f"{part.epoch} is held; the source did not announce it, restart the process"
            )
        return record.epoch == part.epoch

    def current(self, record: Record) -> bool:
        """Whether a record that was admitted is still ours: what it led to may be published."""
        part = self._held.get(record.position.topic_partition)
        return part is not None and part.epoch == record.epoch

    def open(self, records: Sequence[Record]) -> Ticket:
        """Give a ticket for admitted records, in the order read. FatalError when a partition would go backwards."""
        ticket = Ticket(self)
        spans: dict[TopicPartition, tuple[int, int]] = {}
        for record in records:
            topic, partition, offset = record.position
            where = TopicPartition(topic, partition)
            first, after = spans.get(where) or (offset, self._held[where].opened)
            if offset < after:
                raise FatalError(
                    f"{_name(where)}: offset {offset} was read after {after - 1}; refusing to go backwards"
                )
            spans[where] = (first, offset + 1)
        for where, (first, after) in spans.items():
            self._held[where].opened = after
            self._held[where].spans.append(_Span(ticket, first, after))
        self._open.add(ticket)
        return ticket

    def settled(self) -> dict[TopicPartition, int]:
        """Next offsets that may be committed and have not been, by partition."""
        return {where: part.settled for where, part in self._held.items() if part.settle() > part.committed}

    def committed(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """These were committed. Raises FatalError when one lies before an earlier commit or past what is settled."""
        for where, offset in next_offsets.items():
            part = self._held.get(where)
            if part is None:
                continue
            if not part.committed <= offset <= part.settled:
                raise FatalError(
                    f"{_name(where)}: committed {offset}, but {part.committed} was committed before and "
                    f"{part.settled} is settled; refusing to go on"
                )
            part.committed = offset

    def rewind(self) -> dict[TopicPartition, int]:
        """Abandon all that is on its way; the offsets to read again from, of partitions that had some."""
        back: dict[TopicPartition, int] = {}
        for where, part in self._held.items():
            part.settle()
            if part.spans:
                back[where] = part.opened = part.spans[0].first
                part.spans.clear()
        for ticket in self._open:
            ticket.abandoned = True
        self._open.clear()
        return back

    def raise_if_failed(self) -> None:
        """Raise FatalError when a delivery failed: its offsets are not, and will not be, committed."""
        if self._failure is not None:
            raise FatalError(
                f"a message could not be delivered: {self._failure}; nothing past it was committed, restart the process"
            )

    def fail(self, error: object) -> None:
        """Latch the first delivery error."""
        if self._failure is None:
            self._failure = str(error)

    def finished(self, ticket: Ticket, scored: int) -> None:
        """All messages of a ticket are acknowledged."""
        self._open.discard(ticket)
        self._scored += scored


def _name(where: TopicPartition) -> str:
    return f"{where.topic}/{where.partition}"
