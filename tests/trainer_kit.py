"""A trainer among fakes: both topics in memory, a small market that fills them, and a learner of a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save, save_file

from esmm.batch import Examples, Kind, StepStats
from esmm.features import DenseFeat, FeatureSchema, SparseFeat
from esmm.metrics import TaskStats
from stream_scorer.adapters.checkpoints import DirectoryCheckpoints
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.core.codec import encode_feedback
from stream_scorer.core.drift import DriftPolicy
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import Position, TopicPartition
from stream_scorer.core.scoreboard import ScoreboardPolicy
from stream_scorer.core.served import ServedLayout
from stream_scorer.core.watermark import WatermarkPolicy
from stream_scorer.ports import Judge, VersionInfo
from stream_scorer.trainer import Trainer, TrainerPolicy, TrainerPorts
from tests.fakes import FakeClock, FakeMetrics, FakeSink, FakeSource, Item

SCHEMA = FeatureSchema(
    [
        SparseFeat("user_id", 20, 2, source="user"),
        SparseFeat("item_id", 10, 2, source="item"),
        DenseFeat("price", source="item"),
        DenseFeat("mood", source="user"),
        SparseFeat("position", 5, 2, source="context"),
    ]
)
LAYOUT = ServedLayout(SCHEMA.layout("user"), SCHEMA.layout("item"), SCHEMA.layout("context"), SCHEMA.hash)
START_MS = 1_700_000_000_000
JOIN = JoinPolicy(
    click_window_ms=1_000,
    observation_window_ms=2_000,
    attribution_window_ms=8_000,
    served_ttl_ms=5_000,
    held_ttl_ms=5_000,
)
POLICY = TrainerPolicy(
    "served", "feedback", "score-rejects", LAYOUT,
    join=JOIN,
    watermark=WatermarkPolicy(lateness_ms=200, idle_ms=60_000),
    scoreboard=ScoreboardPolicy(first_rows=500, window_rows=500, settle_ms=3_000, mature_ms=9_000),
    drift=DriftPolicy(enabled=False),
    batch_rows=64, publish_every_s=1e9, checkpoint_every_s=1e9, idle_wait_s=0.0,
)  # fmt: skip


class TwoTopicSource(FakeSource):
    """`served` and `feedback`, two partitions each. It reads a partition to its end before the next: merge has work."""

    def __init__(self, partitions: int = 2) -> None:
        super().__init__(topic="served", partitions=partitions)
        for number in range(partitions):
            self.log[TopicPartition("feedback", number)] = []
        self._restart()

    def put(self, topic: str, item: Item) -> Position:
        """A message arrives now."""
        where = TopicPartition(topic, item.partition)
        self.log[where].append(item)
        return Position(*where, len(self.log[where]) - 1)


def served_bytes(request_id: str, user: int, items: Sequence[int], ts: int, mood: float, version: int = 1) -> bytes:
    """A served message, written by the general writer."""
    rows = len(items)
    tensors = {
        "user_ids": np.array([[user]], np.int64),
        "item_ids": np.array(items, np.int64)[:, None],
        "context_ids": np.arange(rows)[:, None].astype(np.int64) % 5,
        "ctr": np.full(rows, 0.3, np.float32),
        "ctcvr": np.full(rows, 0.1, np.float32),
        "user_dense": np.array([[mood]], np.float32),
        "item_dense": (np.array(items, np.float32)[:, None] / 10),
        "context_dense": np.zeros((rows, 0), np.float32),
    }
    meta = {
        "request_id": request_id, "user_id": f"u{user}", "items": json.dumps([f"i{i}" for i in items]), "degraded": "0",
        "model_version": str(version), "ts": str(ts), "scored_at": str(ts + 5), "schema": LAYOUT.schema_hash,
    }  # fmt: skip
    return save(tensors, meta)


@dataclass
class Market:
    """Requests with true probabilities that depend on the features; fills a source in order of time."""

    seed: int = 0
    requests: int = 200
    gap_ms: int = 20
    flip: bool = False  # poison: labels turned round
    blank: bool = False  # poison: the price column is gone
    start_ms: int = START_MS
    name: str = "r"

    def fill(self, source: TwoTopicSource) -> int:
        """Append everything; the time of the last event."""
        arrivals = sorted(self._messages(), key=lambda m: (m[0], m[1]))
        for at, _, topic, partition, value in arrivals:
            source.put(topic, Item(value, partition, b"u", at))
        return arrivals[-1][0]

    def _messages(self):
        rng = np.random.default_rng(self.seed)
        number = 0
        for request in range(self.requests):
            ts = self.start_ms + request * self.gap_ms
            user = int(rng.integers(1, 20))
            items = [int(i) for i in rng.permutation(np.arange(1, 10))[:4]]
            mood = float(rng.normal())
            request_id = f"{self.name}{request}"
            partition = user % 2
            features = [0] * len(items) if self.blank else items
            named = served_bytes(request_id, user, features, ts, mood)
            if self.blank:
                named = served_bytes(request_id, user, items, ts, mood).replace(
                    (np.array(items, np.float32) / 10).tobytes(), np.zeros(len(items), np.float32).tobytes()
                )
            yield ts + 5, number, "served", partition, named
            for item in items:
                number += 1
                for kind, at in self._behaviour(rng, item, mood, ts):
                    event = Feedback(
                        event_id=f"{request_id}-{item}-{kind}", kind=kind, request_id=request_id, user_id=f"u{user}",
                        item_id=f"i{item}", ts=at,
                    )  # fmt: skip
                    yield at, number, "feedback", partition, encode_feedback(event)

    def _behaviour(self, rng, item: int, mood: float, ts: int):
        a = 1 / (1 + np.exp(-(-2.0 + 0.3 * item + mood)))
        p = 1 / (1 + np.exp(-(-1.5 + 0.2 * item)))
        clicked, converted = rng.random() < a, rng.random() < p
        if self.flip:
            clicked = not clicked
        shown = ts + 50
        yield "impression", shown
        if clicked:
            click = shown + int(rng.integers(1, 900))
            yield "click", click
            if converted:
                yield "conversion", click + int(rng.exponential(2_000))


class TinyLearner:
    """Two logistic regressions by SGD on (bias, price, mood). Exact to restart; ``poison`` makes its weights NaN."""

    def __init__(self, rate: float = 0.3) -> None:
        self.weights = np.zeros((2, 3))
        self.rate = rate
        self.seen: list[int] = []

    def _x(self, examples: Examples) -> np.ndarray:
        ones = np.ones((examples.rows, 1))
        return np.concatenate([ones, examples.item.dense_ND, examples.user.dense_ND], axis=1).astype(np.float64)

    def predict(self, examples: Examples):
        ctr, cvr = 1 / (1 + np.exp(-self._x(examples) @ self.weights.T)).T
        return ctr.astype(np.float32), (ctr * cvr).astype(np.float32)

    def step(self, examples: Examples) -> StepStats:
        ctr_B, ctcvr_B = self.predict(examples)
        x = self._x(examples)
        first, matured = examples.kind_B == Kind.FIRST, examples.kind_B == Kind.MATURED
        cvr_B = 1 / (1 + np.exp(-x @ self.weights[1]))
        self.weights[0] += self.rate * ((examples.click_B - ctr_B) * first) @ x / examples.rows
        self.weights[1] += self.rate * ((examples.conversion_B - cvr_B) * matured) @ x / examples.rows
        self.seen.append(examples.rows)
        return StepStats(examples.rows, int(first.sum()), 0.0, ctr_B, ctcvr_B, bool(np.isfinite(self.weights).all()))

    def finite(self) -> bool:
        return bool(np.isfinite(self.weights).all())

    def embedding_rows(self) -> dict[str, int]:
        return {}

    def save(self, directory: Path) -> None:
        save_file({"weights": self.weights}, directory / "weights.safetensors")

    def restore(self, directory: Path) -> None:
        self.weights = load_file(directory / "weights.safetensors")["weights"].copy()

    def export(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.save(directory)
        (directory / "manifest.json").write_text(json.dumps(manifest))


def open_tiny(info: VersionInfo) -> Judge:
    """A published version of a `TinyLearner`."""
    learner = TinyLearner()
    learner.restore(info.path)
    return learner


@dataclass
class TrainerWorld:
    """A trainer on a directory; `restart` is a new process after the old one was killed."""

    root: Path
    source: TwoTopicSource = field(default_factory=TwoTopicSource)
    policy: TrainerPolicy = POLICY
    make_learner: Any = TinyLearner
    open_version: Any = open_tiny
    make_state: Any = MemoryJoinState
    clock: FakeClock = field(default_factory=FakeClock)
    sink: FakeSink = field(default_factory=FakeSink)
    metrics: FakeMetrics = field(default_factory=FakeMetrics)
    learner: Any = field(init=False)
    trainer: Trainer = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.learner = self.make_learner()
        self.store = DirectoryStore(self.root / "models")
        self.state = self.make_state()
        ports = TrainerPorts(
            source=self.source, sink=self.sink, learner=self.learner, store=self.store, open_version=self.open_version,
            join_state=self.state, checkpoints=DirectoryCheckpoints(self.root / "checkpoints"), stats_kind=TaskStats,
            metrics=self.metrics, clock=self.clock,
        )  # fmt: skip
        self.trainer = Trainer(ports, self.policy)

    def restart(self) -> None:
        """Killed, and started again."""
        self.state.close()
        self.source.restart()
        self.start()

    def until_idle(self) -> None:
        """Step until everything that arrived was taken."""
        for _ in range(10_000):
            self.turn()
            if self.at_rest:
                return
        raise AssertionError("the trainer does not come to rest")

    @property
    def at_rest(self) -> bool:
        """Everything that arrived was read and taken."""
        return self.source.exhausted and not len(self.trainer._merge)

    def turn(self) -> int:
        """One step; how many records it took. Time passes only while the merge waits for a partition without any."""
        taken = self.trainer.step()
        if not taken and self.source.exhausted and not self.at_rest:
            self.clock.advance(0.25)
        return taken

    def quiet(self, seconds: float) -> None:
        """Nothing arrives for so long."""
        while seconds > 0:
            self.clock.advance(min(0.5, seconds))
            seconds -= 0.5
            self.trainer.step()

    def with_policy(self, **fields: Any) -> TrainerWorld:
        """Start with other fields in the policy."""
        self.policy = replace(self.policy, **fields)
        self.start()
        return self
