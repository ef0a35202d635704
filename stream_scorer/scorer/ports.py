"""The world as the scoring loop sees it, and how to score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from stream_scorer.core.codec import RequestLimits
from stream_scorer.core.output import OutputPolicy
from stream_scorer.core.rejects import StormPolicy
from stream_scorer.ports import Clock, FeatureStore, Metrics, Predictor, Sink, Source


class Mailbox(Protocol):
    """One slot between the watcher of model versions and the loop."""

    def take(self) -> Predictor | None:
        """The predictor that waits, or None. Its owner may close all but the last two that were taken.

        That is safe because the caller has nothing in flight except on the one it took last.
        """
        ...


@dataclass(frozen=True)
class ScorerPorts:
    """The world."""

    source: Source
    sink: Sink
    features: FeatureStore
    metrics: Metrics
    clock: Clock
    mailbox: Mailbox


@dataclass(frozen=True)
class ScorerPolicy:
    """How to score."""

    limits: RequestLimits
    output: OutputPolicy
    max_rows: int = 10_000  # candidate rows a batch
    max_records: int = 2_000  # requests a batch
    linger_s: float = 0.002
    target_s: float = 0.0  # from features to publishing, kept by 95 batches of 100; 0: as large as allowed
    idle_wait_s: float = 0.1  # how long a poll waits for a first request
    fetch_budget_s: float = 0.05
    on_outage: Literal["degrade", "pause", "fail"] = "degrade"
    storm: StormPolicy = field(default_factory=StormPolicy)
    drain_timeout_s: float = 10.0
    commit_every_s: float = 0.1
    overlap: bool = True  # False: finish each batch before the next is read; the plain path that tests compare with
