"""A poisoned stream never reaches the scorers: each failure from the healthy stream through the harm and out again.

The real learner and its join, alarm and gate over topics in memory; event time alone drives it. Every version that is
published is scored on impressions of the same market that nobody learned from, with their final labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest

from esmm.batch import Examples, Kind, concat_examples
from esmm.checkpoint import load_version, save_version
from esmm.learner import Evaluator, Learner, LearnerConfig
from esmm.metrics import TaskStats
from esmm.model import ESMM
from esmm.optim import RowRule
from stream_scorer.core.drift import DriftPolicy
from stream_scorer.core.gate import GatePolicy
from tests.fakes import Item
from tests.trainer_kit import POLICY, SCHEMA, START_MS, Market, TinyLearner, TrainerWorld, TwoTopicSource

Harm = Literal["", "flip", "blank", "nan", "stuck", "clock"]
GATE = GatePolicy()
LIMIT = 1 + GATE.logloss_margin
GAP_MS = 20
DAY_MS = 86_400_000
HEALTHY_MS = 40_000  # 4 impressions every `GAP_MS`
POISONED = replace(
    POLICY, gate=GATE, drift=DriftPolicy(heal_rows=300), batch_rows=64, publish_every_s=1e9,
    publish_every_examples=600, gate_rows=1_500, max_records=300, holdout=0.1,
)  # fmt: skip


@dataclass
class Poisoned(Market):
    """The market for some time, harmed in a way. One click in eight impressions."""

    harm: Harm = ""
    length_ms: int = 0
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.requests = self.length_ms // GAP_MS
        self.flip, self.blank = self.harm == "flip", self.harm == "blank"

    def _behaviour(self, rng, item: int, mood: float, ts: int):
        mood = 0.0 if math.isnan(mood) else mood
        return super()._behaviour(rng, item, mood - 2.2, ts)

    def _messages(self):
        until_ms = self.start_ms + self.length_ms
        for at, number, topic, partition, value in super()._messages():
            if self.harm == "nan" and topic == "served":
                yield at, number, topic, partition, not_a_number(value)
            elif self.harm == "stuck" and topic == "feedback":
                yield max(at, until_ms), number, topic, partition, value
            elif self.harm == "clock" and topic == "feedback":
                body = json.loads(value)
                yield at, number, topic, partition, json.dumps({**body, "ts": body["ts"] + 2 * DAY_MS}).encode()
            else:
                yield at, number, topic, partition, value


def not_a_number(served: bytes) -> bytes:
    """The user's dense feature, which lies first, becomes NaN."""
    from safetensors.numpy import load, save

    size = int.from_bytes(served[:8], "little")
    meta = json.loads(served[8 : 8 + size])["__metadata__"]
    tensors = load(served)
    tensors["user_dense"] = tensors["user_dense"] * np.nan
    return save(tensors, meta)


class Recording(TinyLearner):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Examples] = []

    def step(self, examples):
        self.given.append(examples)
        return super().step(examples)


@pytest.fixture(scope="module")
def final(tmp_path_factory) -> Examples:
    """Impressions of a healthy day with their final labels."""
    world = TrainerWorld(tmp_path_factory.mktemp("final"), make_learner=Recording)
    Poisoned(seed=99, name="f", length_ms=16_000).fill(world.source)
    world.until_idle()
    world.quiet(30)
    given = concat_examples(world.learner.given)
    final_B = (given.kind_B == Kind.MATURED) | ((given.kind_B == Kind.FIRST) & (given.click_B == 0))
    return given.take(np.flatnonzero(final_B))


class Loss(NamedTuple):
    """One version on the final labels."""

    version: int
    ctr: float
    ctcvr: float


def judged(world: TrainerWorld, version: int, final: Examples) -> Loss:
    ctr_B, ctcvr_B = Evaluator(load_version(world.store.info(version).path).model).predict(final)
    ctr, ctcvr = TaskStats.of(final.click_B, ctr_B), TaskStats.of(final.conversion_B, ctcvr_B)
    return Loss(version, ctr.logloss(), ctcvr.logloss())


def learner() -> Learner:
    model = ESMM(SCHEMA.columns, tower_dnn_hidden_units=(16,), seed=7)
    return Learner(model, LearnerConfig(learning_rate=0.003, embedding=RowRule(learning_rate=0.02)), save_version)


def fill(source: TwoTopicSource, harm: Harm, harmed_ms: int, healed_ms: int) -> list[int]:
    """Healthy, harmed, healed; when each phase begins."""
    start_ms, begins = START_MS, []
    lengths = (HEALTHY_MS, harmed_ms, healed_ms)
    arrivals = []
    for number, (name, length_ms) in enumerate(zip(("", harm, ""), lengths, strict=True)):
        market = Poisoned(seed=number, name=f"p{number}-", start_ms=start_ms, length_ms=length_ms, harm=name)
        arrivals += list(market._messages())
        begins.append(start_ms)
        start_ms += length_ms
    for at, _, topic, partition, value in sorted(arrivals, key=lambda m: (m[0], m[1])):
        source.put(topic, Item(value, partition, b"u", at))
    return begins


def live_versions(world: TrainerWorld, final: Examples) -> Iterator[tuple[int, Loss]]:
    """Turn by turn: event time, and the live version's loss."""
    known: dict[int, Loss] = {}
    while not known or not world.at_rest:
        world.turn()
        version = world.store.current()
        assert version is not None
        if version not in known:
            known[version] = judged(world, version, final)
        yield world.trainer._joiner.watermark.value_ms, known[version]


@pytest.mark.parametrize(
    ("harm", "harmed_ms", "healed_ms"),
    [
        ("flip", 1_500, 40_000),  # too short for the alarm: the gate holds what learned it
        ("flip", 16_000, 75_000),  # what was learned before the alarm has to be unlearned
        ("blank", 16_000, 30_000),
        ("nan", 16_000, 30_000),
        ("stuck", 16_000, 30_000),
        ("clock", 16_000, 30_000),
    ],
)
def test_a_poisoned_stream_harms_no_live_version_and_learning_resumes(
    tmp_path: Path, final: Examples, harm: Harm, harmed_ms: int, healed_ms: int
) -> None:
    world = TrainerWorld(
        tmp_path,
        policy=POISONED,
        make_learner=learner,
        open_version=lambda info: Evaluator(load_version(info.path).model),
    )
    _, harmed, healed = fill(world.source, harm, harmed_ms, healed_ms)
    before, after = [], []
    for now_ms, loss in live_versions(world, final):
        (before if now_ms < harmed else after).append(loss)
    live = before[-1]
    assert before[0].version == 1
    assert live.ctr < 0.9 * before[0].ctr, "it learned while the stream was healthy"
    for loss in after:
        assert loss.ctr <= LIMIT * live.ctr, (live, loss)
        assert loss.ctcvr <= LIMIT * live.ctcvr, (live, loss)
    world.trainer._refresh_stats(0)
    stats = world.trainer.stats()
    assert stats.alarm == ""
    newest = max(version for version in world.store.versions())
    assert after[-1].version == newest
    assert learned_until(world, newest) > healed, "learning resumed, and its versions are published"


def learned_until(world: TrainerWorld, version: int) -> int:
    """Record time of the last feedback that a version knows."""
    offsets = world.store.info(version).manifest["offsets"]
    of = {f"{where.topic}/{where.partition}": log for where, log in world.source.log.items()}
    return max(of[name][offset - 1].timestamp_ms for name, offset in offsets.items() if name.startswith("feedback"))
