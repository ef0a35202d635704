"""Records that the broker dropped before they were read: retention, or the mock cluster's hard cap."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from stream_scorer.core.metric_names import OFFSET_GAPS
from stream_scorer.core.records import TopicPartition
from stream_scorer.ports import Metrics

CHECK_S = 1.0  # how often low watermarks may be asked for: each costs a round trip

_log = structlog.get_logger("stream_scorer.kafka")


class OffsetGaps:
    """Counts a gap between offsets as a loss only as far as the log's start has passed it.

    Markers of transactions and compaction leave gaps as well, and nothing is lost with them.
    """

    def __init__(self, low_watermark: Callable[[TopicPartition], int], metrics: Metrics) -> None:
        """``low_watermark`` asks the broker for a partition's first offset; 0 when it cannot say."""
        self._low_watermark = low_watermark
        self._metrics = metrics
        self._open: list[tuple[TopicPartition, int, int]] = []
        self._checked_at_s = -CHECK_S

    def seen(self, where: TopicPartition, expected: int, found: int) -> None:
        """Offset ``found`` came where ``expected`` was due."""
        self._open.append((where, expected, found))

    def resolve(self) -> None:
        """Count what was lost, at most once a second."""
        if not self._open or time.monotonic() - self._checked_at_s < CHECK_S:
            return
        self._checked_at_s = time.monotonic()
        gaps, self._open = self._open, []
        low = {where: self._low_watermark(where) for where in {where for where, _, _ in gaps}}
        for where, expected, found in gaps:
            dropped = min(low[where], found) - expected
            if dropped > 0:
                _log.warning("records were dropped by the broker before we read them", partition=where, count=dropped)
                self._metrics.inc(OFFSET_GAPS, dropped)
