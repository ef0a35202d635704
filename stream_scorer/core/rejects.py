"""Messages that cannot be scored, as values: what is wrong with a record, the reject message, and the storm breaker.

A reject carries the original bytes and key untouched, so that it can be looked at, mended and replayed. A storm of
rejects means a bad rollout, not bad messages: the breaker keeps the scorer from draining the topic into the rejects.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stream_scorer.core.records import OutRecord, Record

Reason = Literal[
    "empty",  # no value: a tombstone
    "too_large",  # more bytes than a request may have
    "json",  # not JSON, or not UTF-8
    "schema",  # JSON of another shape: missing, unknown or mistyped fields
    "timestamp",  # `ts` is missing or no time in milliseconds
    "too_many_items",
    "duplicate_item",  # feedback could not say which of the two it means
    "context_unknown",  # a context feature that the model does not have
    "context_shape",  # a context feature of the wrong type, width or length
    "score",  # the model gave a value that is no probability
    "corrupt",  # served: not the bytes this project writes
    "layout",  # served: features of another schema
    "nonfinite",  # served: a value that is NaN or infinite
]
DETAIL_LIMIT = 200


class Reject(NamedTuple):
    """A record that is refused. ``reason`` is a metric label; ``detail`` is for a person, one short line."""

    record: Record
    reason: Reason
    detail: str


def reject_record(reject: Reject, topic: str, version: str) -> OutRecord:
    """Message for ``score-rejects``: original key and value; headers say why, and where and when it was read.

    ``version`` names the code that refused it. Headers: reason, detail, topic, partition, offset, time, version.
    """
    record, at = reject.record, reject.record.position
    headers = (
        ("reason", reject.reason.encode()),
        ("detail", _short(reject.detail).encode(errors="replace")),
        ("topic", at.topic.encode()),
        ("partition", b"%d" % at.partition),
        ("offset", b"%d" % at.offset),
        ("time", b"%d" % record.timestamp_ms),
        ("version", version.encode()),
    )
    return OutRecord(topic, record.key, record.value, headers)


def _short(detail: str) -> str:
    """One line of bounded length."""
    line = " ".join(detail.split())
    return line if len(line) <= DETAIL_LIMIT else line[: DETAIL_LIMIT - 3] + "..."


@dataclass(frozen=True, slots=True)
class StormPolicy:
    """``share`` of the last ``window`` requests rejected opens the breaker for ``cooldown_s`` seconds.

    At most ``share * window`` requests go to the reject topic in one go, and as many again after each cooldown.
    """

    share: float = 0.5
    window: int = 2_000
    cooldown_s: float = 30.0


class StormBreaker:
    """Counts requests and rejects of recent batches; open while a storm is being waited out."""

    def __init__(self, policy: StormPolicy) -> None:
        self._policy = policy
        self._recent: deque[tuple[int, int]] = deque()  # (requests, rejects) a batch, oldest first
        self._requests = 0
        self._rejects = 0
        self._open_until_s = 0.0

    def record(self, requests: int, rejects: int, now_s: float) -> bool:
        """Count one batch; True when it opened the breaker. ``now_s`` is monotonic."""
        if not requests and not rejects:
            return False
        self._recent.append((requests, rejects))
        self._requests += requests
        self._rejects += rejects
        while self._requests - self._recent[0][0] >= self._policy.window:
            old_requests, old_rejects = self._recent.popleft()
            self._requests -= old_requests
            self._rejects -= old_rejects
        if self._rejects < self._policy.share * self._policy.window:
            return False
        self._recent.clear()
        self._requests = self._rejects = 0
        self._open_until_s = now_s + self._policy.cooldown_s
        return True

    def is_open(self, now_s: float) -> bool:
        """Whether the scorer should be paused. ``now_s`` is monotonic."""
        return now_s < self._open_until_s
