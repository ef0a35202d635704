"""What a scorer has done so far, for its summary line and the dashboard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from esmm.batch import Int64

Hold = Literal["", "model", "storm", "features"]
WINDOW = 8_192  # requests behind the latency percentiles
VERSIONS_KEPT = 64


@dataclass(frozen=True, slots=True)
class ScorerStats:
    """A snapshot. Counts are since the start; latencies, in milliseconds, over the last requests (nan when none)."""

    requests: int
    scored: int  # acknowledged by the broker
    rejected: int
    candidates: int
    batches: int
    degraded: int  # batches scored without the feature store
    stale: int  # results dropped because their partition had moved
    latency_p50_ms: float
    latency_p99_ms: float
    versions: tuple[int, ...]  # model versions that scored something, the most recent last
    versions_served: int
    hold: Hold  # why nothing is being scored, empty when all is well


class LatencyWindow:
    """The latencies of the last requests, milliseconds."""

    def __init__(self, size: int = WINDOW) -> None:
        self._ring = np.zeros(size, np.int64)
        self._seen = 0

    def add(self, latency_ms_R: Int64) -> None:
        """Remember one batch's."""
        size = len(self._ring)
        recent = latency_ms_R[-size:]
        self._ring[(self._seen + np.arange(len(recent))) % size] = recent
        self._seen += len(recent)

    def percentiles(self) -> tuple[float, float]:
        """p50 and p99; nan when nothing was added."""
        if not self._seen:
            return float("nan"), float("nan")
        p50, p99 = np.percentile(self._ring[: self._seen], (50, 99)).tolist()
        return p50, p99


@dataclass(slots=True)
class Tally:
    """The running counts behind `ScorerStats`; changed by the loop's thread only."""

    requests: int = 0
    rejected: int = 0
    candidates: int = 0
    batches: int = 0
    degraded: int = 0
    stale: int = 0
    latency: LatencyWindow = field(default_factory=LatencyWindow)
    versions: dict[int, None] = field(default_factory=dict)  # in the order last seen, bounded
    versions_served: int = 0

    def served(self, version: int) -> None:
        """A batch was scored by this version."""
        if version in self.versions:
            del self.versions[version]
        else:
            self.versions_served += 1
        self.versions[version] = None
        if len(self.versions) > VERSIONS_KEPT:
            del self.versions[next(iter(self.versions))]

    def snapshot(self, scored: int, hold: Hold) -> ScorerStats:
        """The counts now."""
        p50, p99 = self.latency.percentiles()
        return ScorerStats(
            requests=self.requests,
            scored=scored,
            rejected=self.rejected,
            candidates=self.candidates,
            batches=self.batches,
            degraded=self.degraded,
            stale=self.stale,
            latency_p50_ms=p50,
            latency_p99_ms=p99,
            versions=tuple(self.versions),
            versions_served=self.versions_served,
            hold=hold,
        )
