"""The trainer's world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stream_scorer.core.score_tracks import StatsKind
from stream_scorer.ports import (
    Checkpoints,
    Clock,
    JoinState,
    Judge,
    Learner,
    Metrics,
    ModelStore,
    Sink,
    Source,
    VersionInfo,
)


@dataclass(frozen=True)
class TrainerPorts:
    """``source`` reads both topics; ``open_version`` loads a published version for the gate (or `ModelRefused`)."""

    source: Source
    sink: Sink
    learner: Learner
    store: ModelStore
    open_version: Callable[[VersionInfo], Judge]
    join_state: JoinState
    checkpoints: Checkpoints
    stats_kind: StatsKind
    metrics: Metrics
    clock: Clock
