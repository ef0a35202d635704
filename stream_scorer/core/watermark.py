"""How far event time has surely come: the slowest live partition's newest event, less the allowed lateness.

Everything here is a function of the record sequence, never of a clock, so a replay reaches the same watermarks: a
partition is idle when the others' *record* times (the broker's timestamps) have moved on by ``idle_ms`` without it.
A whole feedback topic without records is more likely stuck than idle: impressions whose clicks are only late must not
be taken for unclicked, so it is waited for much longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stream_scorer.core.join_entry import NEVER
from stream_scorer.core.records import TopicPartition

BEGINNING: Final = -(1 << 62)
MANY, FEW = 32, 64  # so many events, of so few partitions, are worth an array a partition


@dataclass(frozen=True, slots=True)
class WatermarkPolicy:
    """Milliseconds, but for ``confirm``."""

    lateness_ms: int = 5_000  # how far a partition's events may be out of order
    idle_ms: int = 10_000  # of record time: a partition silent for longer is not waited for
    topic_idle_ms: int = 600_000  # .. and this long when the whole feedback topic is silent
    max_jump_ms: int = 86_400_000  # an event further ahead of its partition is not believed ..
    confirm: int = 100  # .. until as many came in a row
    max_ahead_ms: int = 60_000  # an event this far ahead of its own record comes from a wrong clock


class _Progress:
    """One partition."""

    __slots__ = ("event_ms", "idle", "jumps", "record_ms")

    def __init__(self, record_ms: int) -> None:
        self.event_ms = BEGINNING  # newest believed event
        self.record_ms = record_ms  # newest record
        self.jumps = 0  # events in a row that were too far ahead
        self.idle = False


class Watermark:
    """Monotone event time; an event older than `value_ms` is late.

    A partition that is assigned and not idle holds the watermark back until its first event. A single event far ahead
    of its partition (a wrong clock somewhere) does not move it.
    """

    __slots__ = ("_feedback_topic", "_newest_record_ms", "_partitions", "_policy", "_slowest", "value_ms")

    def __init__(self, policy: WatermarkPolicy, feedback_topic: str = "") -> None:
        """No partition yet: the first to be observed decides. ``feedback_topic``: the one that may be stuck."""
        self._policy = policy
        self._feedback_topic = feedback_topic
        self._partitions: dict[TopicPartition, _Progress] = {}
        self._slowest: _Progress | None = None
        self._newest_record_ms = BEGINNING
        self.value_ms = BEGINNING

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Wait for these from now on."""
        for partition in partitions:
            self._partitions.setdefault(partition, _Progress(self._newest_record_ms))
        self._slowest = None

    def revoke(self, partitions: Iterable[TopicPartition]) -> None:
        """Wait for these no more."""
        for partition in partitions:
            self._partitions.pop(partition, None)
        self._slowest = None

    def observe(self, partition: TopicPartition, event_ms: int, record_ms: int) -> bool:
        """Take note of an event. False when it is so far ahead that it is not believed."""
        at = self._partitions.get(partition)
        if at is None:
            at = self._partitions[partition] = _Progress(record_ms)
            self._slowest = None
        at.record_ms = max(at.record_ms, record_ms)
        if record_ms > self._newest_record_ms:
            if self._newest_record_ms == BEGINNING:  # silence is counted from the first record on
                for other in self._partitions.values():
                    other.record_ms = max(other.record_ms, record_ms)
            self._newest_record_ms = record_ms
        if at.idle:
            at.idle, self._slowest = False, None
        if event_ms > record_ms + self._policy.max_ahead_ms:
            return False
        if event_ms > at.event_ms:
            if event_ms - at.event_ms > self._policy.max_jump_ms and at.event_ms != BEGINNING:
                at.jumps += 1
                if at.jumps < self._policy.confirm:
                    return False
            at.event_ms = event_ms
        at.jumps = 0
        slowest = self._slowest
        if slowest is None or slowest is at or self._newest_record_ms - slowest.record_ms > self._policy.idle_ms:
            self._advance()
        return True

    def observe_all(
        self, where: Sequence[TopicPartition], event_ms: Sequence[int], record_ms: Sequence[int]
    ) -> list[int]:
        """`observe` N events in order; `value_ms` after each."""
        found = self._observe_usual(where, event_ms, record_ms) if len(where) >= MANY else None
        if found is not None:
            return found
        values = []
        for partition, event, record in zip(where, event_ms, record_ms, strict=True):
            self.observe(partition, event, record)
            values.append(self.value_ms)
        return values

    def _observe_usual(
        self, where: Sequence[TopicPartition], event_ms: Sequence[int], record_ms: Sequence[int]
    ) -> list[int] | None:
        """The same at once while no partition is, or may become, idle and every clock is believed; else None.

        Then the slowest partition decides all along, and it is found by a running greatest of each partition's events.
        """
        policy, partitions = self._policy, self._partitions
        event_N, record_N = np.array(event_ms, np.int64), np.array(record_ms, np.int64)
        newest_ms = max(self._newest_record_ms, int(record_N.max()))
        number = {partition: index for index, partition in enumerate(dict.fromkeys(where))}
        if len(number) > FEW or self._newest_record_ms == BEGINNING or (event_N - record_N).max() > policy.max_ahead_ms:
            return None
        if any(at.idle or newest_ms - at.record_ms > policy.idle_ms for at in partitions.values()):
            return None
        of_N = np.array([number[partition] for partition in where])
        reached: list[tuple[_Progress, NDArray[np.int64], int]] = []  # with its events after each of N, newest record
        for partition, index in number.items():
            at, mine_N = partitions.get(partition), of_N == index
            if at is None or at.event_ms == BEGINNING:
                return None
            newest_N = np.maximum.accumulate(np.where(mine_N & (event_N > at.event_ms), event_N, at.event_ms))
            if newest_N[-1] - at.event_ms > policy.max_jump_ms:
                return None
            reached.append((at, newest_N, int(record_N[mine_N].max())))
        others_ms = (at.event_ms for partition, at in partitions.items() if partition not in number)
        slowest_N = np.full(len(where), min(others_ms, default=NEVER))
        for at, newest_N, newest_record_ms in reached:
            at.event_ms, at.jumps = int(newest_N[-1]), 0
            at.record_ms = max(at.record_ms, newest_record_ms)
            slowest_N = np.minimum(slowest_N, newest_N)
        self._newest_record_ms, self._slowest = newest_ms, None
        value_N = np.maximum(slowest_N - policy.lateness_ms, self.value_ms)
        self.value_ms = int(value_N[-1])
        values: list[int] = value_N.tolist()
        return values

    def advance(self, event_ms: int) -> None:
        """Time has come to ``event_ms`` although no event says so: nothing is left to read anywhere."""
        self.value_ms = max(self.value_ms, event_ms - self._policy.lateness_ms)

    @property
    def newest_ms(self) -> int:
        """The newest believed event of any partition, or `BEGINNING`."""
        return max((p.event_ms for p in self._partitions.values()), default=BEGINNING)

    def _advance(self) -> None:
        """Find the slowest partition that is not idle; the one just observed never is."""
        newest_ms, policy = self._newest_record_ms, self._policy
        feedback = [p.record_ms for where, p in self._partitions.items() if where.topic == self._feedback_topic]
        stuck = bool(feedback) and newest_ms - max(feedback) > policy.idle_ms
        slowest: _Progress | None = None
        for where, progress in self._partitions.items():
            patient = stuck and where.topic == self._feedback_topic
            if newest_ms - progress.record_ms > (policy.topic_idle_ms if patient else policy.idle_ms):
                progress.idle = True
            elif slowest is None or progress.event_ms < slowest.event_ms:
                slowest = progress
        self._slowest = slowest
        if slowest is not None:
            self.value_ms = max(self.value_ms, slowest.event_ms - self._policy.lateness_ms)

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        rows = [[*p, at.event_ms, at.record_ms, at.jumps, at.idle] for p, at in sorted(self._partitions.items())]
        return {"value_ms": self.value_ms, "newest_record_ms": self._newest_record_ms, "partitions": rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.value_ms, self._newest_record_ms = state["value_ms"], state["newest_record_ms"]
        self._partitions, self._slowest = {}, None
        for topic, number, event_ms, record_ms, jumps, idle in state["partitions"]:
            at = self._partitions[TopicPartition(topic, number)] = _Progress(record_ms)
            at.event_ms, at.jumps, at.idle = event_ms, jumps, idle
