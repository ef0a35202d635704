"""What a trainer has done so far, for its status line and the dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class TrainerTally:
    """Running counts, since the first start: they survive restarts."""

    served: int = 0
    feedback: int = 0
    rejected: int = 0
    first: int = 0  # examples learned, by kind
    late_conversion: int = 0
    matured: int = 0
    skipped: int = 0  # examples not learned because of an input alarm
    held_out: int = 0  # examples not learned, for the gate to judge by
    steps: int = 0
    refused_steps: int = 0  # the loss or its gradient was not finite
    checkpoints: int = 0

    @property
    def examples(self) -> dict[str, int]:
        """Rows by what became of them."""
        return {
            "first": self.first,
            "late_conversion": self.late_conversion,
            "matured": self.matured,
            "skipped": self.skipped,
            "held_out": self.held_out,
        }


@dataclass(frozen=True, slots=True)
class TrainerStats:
    """A snapshot.

    ``ctr`` and ``ctcvr`` are scores as served: ``auc_first``, ``auc_last``, ``logloss_first``, ``logloss_last``,
    ``pcoc_first``, ``pcoc_last`` and more (see `Scoreboard.summary`); None where a metric is not defined yet.
    """

    served: int = 0
    feedback: int = 0
    rejected: int = 0
    examples: Mapping[str, int] = field(default_factory=dict)  # first, late_conversion, matured, skipped, held_out
    outcomes: Mapping[str, int] = field(default_factory=dict)  # of the join
    steps: int = 0
    step_ms: float = 0.0  # a learning step, moving average
    refused_steps: int = 0
    checkpoints: int = 0
    versions_published: int = 0
    version: int = 0  # the last one published
    holds: Mapping[str, int] = field(default_factory=dict)  # gate holds by reason
    gate: Mapping[str, float] = field(default_factory=dict)  # numbers of the last decision
    alarm: str = ""  # why nothing is learned now
    embedding_rows: Mapping[str, int] = field(
        default_factory=dict
    )  # admitted, evicted; empty: all are trained for good
    open_requests: int = 0
    open_impressions: int = 0
    open_clicks: int = 0
    watermark_lag_ms: int = 0
    lag: int = 0  # records not taken yet
    ctr: Mapping[str, Any] = field(default_factory=dict)
    ctcvr: Mapping[str, Any] = field(default_factory=dict)
    progressive: Mapping[str, Any] = field(default_factory=dict)  # task -> the learner's own metrics, recent window

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)
