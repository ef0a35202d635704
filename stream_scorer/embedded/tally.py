"""What the simulator counted: requests, scores, latency and truth, and the figures made of them."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream_scorer.embedded.truth import TruthMetrics, TruthTally

WINDOW_S = 10  # of the recent figures
KEEP_VERSIONS = 20  # with figures of their own: the first and the latest; a run may see thousands
COUNTED = ("duplicates", "unknown", "wrong", "unsent", "unwritten", "degraded", "missing")  # fields kept as counters
_LATENCY_EDGES_MS = np.geomspace(0.1, 600_000.0, 1_600)  # 1% apart


@dataclass(frozen=True, slots=True)
class LatencyMs:
    """Milliseconds from the request's time to its scores being read by the ranking service; None before any."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class VersionTruth:
    """One model version: how many requests it scored, and how far from the truth over all its candidates."""

    version: int
    requests: int
    ctr: TruthMetrics
    ctcvr: TruthMetrics


@dataclass(frozen=True)
class SimulatorStats:
    """A moment of the run, or its end. Counts are totals."""

    ready: bool
    uptime_s: float
    requests: int
    scored: int  # requests with scores, each counted once
    lost: int  # no scores within `lost_after_s`; at the end, no scores at all
    duplicates: int  # score messages beyond a request's first
    unknown: int  # score messages for requests that are not ours
    wrong: int  # score messages whose candidates are not the request's, or that do not parse
    unsent: int  # requests and feedback events the broker did not take
    unwritten: int  # feature rows the store did not take at first; they are tried again
    outstanding: int
    candidates: int
    candidates_per_s: float
    latency_ms: LatencyMs
    latency_recent_ms: LatencyMs
    degraded: int  # score messages
    missing: int  # candidates scored with a default vector
    feedback: dict[str, int]  # impression, click, conversion (sent, repetitions too), twice, late, never, pending
    versions_served: int  # how many different ones
    versions: list[int]  # those of ``by_version``
    recent_ctr: TruthMetrics
    recent_ctcvr: TruthMetrics
    by_version: list[VersionTruth]

    def fields(self) -> dict[str, Any]:
        """Plain data for JSON; ``truth_auc_ctr`` is the recent window's."""
        data = asdict(self)
        recent = {"window_s": WINDOW_S, "ctr": data.pop("recent_ctr"), "ctcvr": data.pop("recent_ctcvr")}
        by_version = data.pop("by_version")
        first, last = (by_version[0], by_version[-1]) if by_version else (None, None)
        return data | {
            "truth_auc_ctr": self.recent_ctr.auc,
            "truth": {"recent": recent, "first": first, "last": last, "by_version": by_version},
        }


@dataclass
class _Pair:
    ctr: TruthTally = field(default_factory=TruthTally)
    ctcvr: TruthTally = field(default_factory=TruthTally)
    requests: int = 0


class Tally:
    """Collects scored candidates cheaply and folds them into sums once a second."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, NDArray[Any]]] = []  # version, rows of served ctr, ctcvr, true ctr, ctcvr
        self._versions: dict[int, _Pair] = {}
        self._window: deque[tuple[float, _Pair, NDArray[np.int64]]] = deque()
        self._latencies: list[float] = []
        self._latency_B = np.zeros(len(_LATENCY_EDGES_MS) + 1, np.int64)
        self._seen: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.requests = self.candidates = 0

    def scored(self, version: int, served_and_true_4K: NDArray[Any], latency_ms: float) -> None:
        """One request: rows are served ctr, served ctcvr, true ctr, true ctcvr."""
        self._waiting.append((version, served_and_true_4K))
        self._latencies.append(latency_ms)
        self.requests += 1
        self.candidates += served_and_true_4K.shape[1]

    def fold(self, now_s: float) -> None:
        """Take in what was scored since the last call; call about once a second."""
        by_version: dict[int, list[NDArray[Any]]] = {}
        for version, rows_4K in self._waiting:
            by_version.setdefault(version, []).append(rows_4K)
        recent = _Pair()
        for version, parts in by_version.items():
            ctr_N, ctcvr_N, true_ctr_N, true_ctcvr_N = np.concatenate(parts, axis=1)
            pair = self._version(version)
            fresh = _Pair()
            fresh.ctr.add(ctr_N, true_ctr_N)
            fresh.ctcvr.add(ctcvr_N, true_ctcvr_N)
            pair.requests += len(parts)
            for into in (pair, recent):
                into.ctr, into.ctcvr = into.ctr.merged(fresh.ctr), into.ctcvr.merged(fresh.ctcvr)
        latency_B = np.bincount(np.searchsorted(_LATENCY_EDGES_MS, self._latencies), minlength=len(self._latency_B))
        self._latency_B += latency_B
        self._window.append((now_s, recent, latency_B))
        while self._window[0][0] <= now_s - WINDOW_S:
            self._window.popleft()
        self._waiting, self._latencies = [], []

    def _version(self, version: int) -> _Pair:
        if version not in self._versions:
            self._seen.add(version)
            if len(self._versions) >= KEEP_VERSIONS:
                del self._versions[list(self._versions)[1]]  # the oldest but the first
        return self._versions.setdefault(version, _Pair())

    @property
    def versions_served(self) -> int:
        """How many different versions were seen."""
        return len(self._seen)

    def recent(self) -> tuple[TruthMetrics, TruthMetrics, LatencyMs]:
        """CTR, CTCVR and latency of the last `WINDOW_S` seconds."""
        ctr, ctcvr = TruthTally(), TruthTally()
        latency_B = np.zeros_like(self._latency_B)
        for _, pair, part_B in self._window:
            ctr, ctcvr = ctr.merged(pair.ctr), ctcvr.merged(pair.ctcvr)
            latency_B += part_B
        return ctr.metrics(), ctcvr.metrics(), _latency(latency_B)

    def latency(self) -> LatencyMs:
        """Of the whole run."""
        return _latency(self._latency_B)

    def by_version(self) -> list[VersionTruth]:
        """The first and the latest, in the order first seen."""
        return [
            VersionTruth(version, pair.requests, pair.ctr.metrics(), pair.ctcvr.metrics())
            for version, pair in self._versions.items()
        ]


def _latency(count_B: NDArray[np.int64]) -> LatencyMs:
    total = int(count_B.sum())
    if not total:
        return LatencyMs(None, None)
    below_B = np.cumsum(count_B)
    p50, p99 = (int(np.searchsorted(below_B, share * total)) for share in (0.5, 0.99))
    last = len(_LATENCY_EDGES_MS) - 1
    return LatencyMs(float(_LATENCY_EDGES_MS[min(p50, last)]), float(_LATENCY_EDGES_MS[min(p99, last)]))
