"""Records waiting to be scored: decoded once, cut into batches by candidate rows, in the order they were read.

The poll is the micro-batcher: it is asked for as many records as recent requests suggest will fill a batch. What
does not fit waits here for the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from typing import NamedTuple

from stream_scorer.core.codec import RequestLimits, decode_request
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.records import Record, TopicPartition
from stream_scorer.core.rejects import Reject

START_ROWS = 50.0  # candidates a request, until some have been seen
DECAY = 0.8  # a batch of smaller requests moves the estimate by a fifth; larger ones count at once


class Arrival(NamedTuple):
    """One record and what it decoded to."""

    record: Record
    decoded: ScoreRequest | Reject


class Intake:
    """Arrivals in order, and how many more to ask for."""

    def __init__(self, limits: RequestLimits, max_rows: int, max_records: int) -> None:
        self._limits = limits
        self._max_rows = max_rows
        self._max_records = max_records
        self._waiting: deque[Arrival] = deque()
        self._waiting_rows = 0
        self.full = False  # the batch last taken had no room for another request
        self._rows_per_record = START_ROWS

    def __len__(self) -> int:
        """Arrivals waiting."""
        return len(self._waiting)

    def limit(self, max_rows: int) -> None:
        """From now on a batch has at most ``max_rows`` rows."""
        self._max_rows = max_rows

    @property
    def room(self) -> int:
        """How many records to read next: at least 1, so that the source is always polled."""
        rows = self._max_rows - self._waiting_rows
        return max(1, min(self._max_records - len(self._waiting), int(rows / self._rows_per_record)))

    def add(self, records: Sequence[Record]) -> int:
        """Decode and keep; says how many are rejects."""
        rejects = rows = 0
        for record in records:
            decoded = decode_request(record, self._limits)
            if isinstance(decoded, Reject):
                rejects += 1
            else:
                rows += len(decoded.items)
            self._waiting.append(Arrival(record, decoded))
        self._waiting_rows += rows
        if records:
            seen = max(rows / len(records), 1.0)
            self._rows_per_record = max(seen, DECAY * self._rows_per_record + (1 - DECAY) * seen)
        return rejects

    def take(self) -> list[Arrival]:
        """Remove the next batch: at most ``max_rows`` rows and ``max_records`` records, but at least one request."""
        out: list[Arrival] = []
        rows = 0
        waiting = self._waiting
        while waiting and len(out) < self._max_records:
            size = _rows(waiting[0])
            if rows and rows + size > self._max_rows:
                break
            rows += size
            out.append(waiting.popleft())
        self._waiting_rows -= rows
        # the poll asks for what is expected to fit, so that seldom anything is left over
        self.full = bool(waiting) or rows + 2 * self._rows_per_record > self._max_rows
        return out

    def put_back(self, arrivals: Sequence[Arrival]) -> None:
        """Undo `take`: they come first again."""
        self._waiting.extendleft(reversed(arrivals))
        self._waiting_rows += sum(map(_rows, arrivals))

    def drop(self, partitions: Container[TopicPartition]) -> None:
        """Forget what waits for these partitions: it will be read again, here or by their new owner."""
        kept = [one for one in self._waiting if one.record.position.topic_partition not in partitions]
        self._waiting = deque(kept)
        self._waiting_rows = sum(map(_rows, kept))


def _rows(arrival: Arrival) -> int:
    return 0 if isinstance(arrival.decoded, Reject) else len(arrival.decoded.items)
