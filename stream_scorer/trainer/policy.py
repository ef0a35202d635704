"""How a trainer learns and publishes: plain values, read once."""

from __future__ import annotations

from dataclasses import dataclass, field

from stream_scorer.core.drift import DriftPolicy
from stream_scorer.core.gate import GatePolicy
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.scoreboard import ScoreboardPolicy
from stream_scorer.core.served import ServedLayout
from stream_scorer.core.watermark import WatermarkPolicy


@dataclass(frozen=True)
class TrainerPolicy:
    """How to learn and when to publish."""

    served_topic: str
    feedback_topic: str
    rejects_topic: str
    layout: ServedLayout
    join: JoinPolicy = field(default_factory=JoinPolicy)
    watermark: WatermarkPolicy = field(default_factory=WatermarkPolicy)
    scoreboard: ScoreboardPolicy = field(default_factory=ScoreboardPolicy)
    gate: GatePolicy = field(default_factory=GatePolicy)
    drift: DriftPolicy = field(default_factory=DriftPolicy)
    batch_rows: int = 512
    overlap: bool = False  # learn in a thread beside the join; the same batches and weights
    max_wait_ms: int = 1_000  # of record time; of the clock when there is nothing to read
    max_records: int = 2_000  # a turn
    linger_s: float = 0.002
    idle_wait_s: float = 0.1
    merge_idle_s: float = 1.0  # an empty partition is waited for this long while there is something to read ..
    merge_records: int = 100_000  # .. unless this many are waiting
    rewind: bool = True  # partitions that are committed but in no checkpoint are read from their start
    publish_every_s: float = 60.0
    publish_every_examples: int = 0  # 0: only by time
    checkpoint_every_s: float = 60.0
    gate_rows: int = 4_000  # recent first emissions, and as many matured clicks, that the gate may look at
    holdout: float = 0.0  # share of impressions that only the gate looks at
    keep_versions: int = 10
    drain_timeout_s: float = 10.0
    code_version: str = ""
