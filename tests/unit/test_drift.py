"""The input alarm: broken streams stop learning, ordinary change does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esmm.batch import Examples, FeatureBlock, Kind
from stream_scorer.core.drift import DriftAlarm, DriftPolicy

POLICY = DriftPolicy(warmup_steps=20, heal_steps=2, adopt_steps=30)


def step(rng, rows: int = 400, ctr: float = 0.1, price: float = 3.0, hour: float = 13.0, **bad) -> Examples:
    """One step of an ordinary stream, unless told otherwise."""
    dense = np.stack([rng.normal(price, 1, rows), np.full(rows, hour), rng.normal(0, 1, rows)], axis=1)
    if bad.get("blank"):
        dense[:, 0] = 0
    if bad.get("constant"):
        dense[:, 2] = 0
    click = (rng.random(rows) < ctr).astype(np.float32)
    if bad.get("flip"):
        click = 1 - click
    conversion = click * (rng.random(rows) < bad.get("cvr", 0.3))
    ids = rng.integers(1, 100, (rows, 2))
    if bad.get("missing"):
        ids[:] = 0
    zeros, none = np.zeros((rows, 0), np.int64), np.zeros((rows, 0), np.float32)
    score = np.full(rows, 0.1, np.float32)
    return Examples(
        FeatureBlock(zeros, none), FeatureBlock(ids, dense.astype(np.float32)), FeatureBlock(zeros, none),
        np.full(rows, Kind.FIRST, np.uint8), click, conversion.astype(np.float32), conversion.astype(np.float32),
        score, score, np.ones(rows, np.int64), np.zeros(rows, np.int64),
    )  # fmt: skip


def warm(seed: int = 0, policy: DriftPolicy = POLICY, steps: int = 60):
    rng, alarm = np.random.default_rng(seed), DriftAlarm(policy)
    for _ in range(steps):
        assert alarm.check(step(rng)).learn
    return rng, alarm


@pytest.mark.parametrize(
    ("bad", "reason", "within"),
    [
        ({"blank": True}, "shift", 1),
        ({"price": 3_000.0}, "shift", 1),
        ({"missing": True}, "shift", 1),
        ({"flip": True}, "clicks", 3),
        ({"ctr": 0.0}, "clicks", 10),
        ({"cvr": 1.0}, "conversions", 10),
    ],
)
def test_a_broken_stream_stops_learning_and_healing_starts_it_again(bad, reason, within) -> None:
    rng, alarm = warm()
    learned = [alarm.check(step(rng, **bad)).learn for _ in range(25)]
    assert learned == sorted(learned, reverse=True)  # once off it stays off
    assert sum(learned) < within
    assert alarm.reason == reason
    healing = [alarm.check(step(rng)).learn for _ in range(15)]
    assert not healing[0]  # one ordinary step is not enough
    assert healing == sorted(healing)
    assert healing[-1]
    assert alarm.reason == ""


def test_a_column_that_stops_varying_is_found_within_steps() -> None:
    rng, alarm = warm()
    assert [alarm.check(step(rng, constant=True)).learn for _ in range(4)] == [True, True, False, False]
    assert alarm.reason == "constant"


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_change_is_learned(seed: int) -> None:
    rng, alarm = warm(seed)
    for at in range(600):
        examples = step(
            rng, ctr=0.1 + 0.05 * np.sin(at / 60), price=3 + at / 300, hour=float(at // 20 % 24), cvr=0.3 - at / 4_000
        )
        verdict = alarm.check(examples)
        assert verdict.learn, (at, verdict)


def test_small_steps_are_not_judged_but_do_not_end_an_alarm() -> None:
    rng, alarm = warm()
    assert alarm.check(step(rng, rows=10, blank=True)).learn
    assert not alarm.check(step(rng, blank=True)).learn
    assert not alarm.check(step(rng, rows=10)).learn


def test_what_stays_becomes_ordinary() -> None:
    rng, alarm = warm()
    learned = [alarm.check(step(rng, price=30.0)).learn for _ in range(60)]
    assert learned.index(True) == POLICY.adopt_steps - 1
    assert all(learned[POLICY.adopt_steps - 1 :])


def test_it_can_be_off() -> None:
    rng, alarm = warm(policy=DriftPolicy(enabled=False))
    assert alarm.check(step(rng, flip=True)).learn


def test_state_survives_json() -> None:
    rng, alarm = warm()
    alarm.check(step(rng, flip=True))
    other = DriftAlarm(POLICY)
    other.restore(json.loads(json.dumps(alarm.state())))
    for bad in ({}, {}, {"constant": True}, {"constant": True}, {"constant": True}, {"blank": True}, {}, {}, {}):
        examples = step(rng, **bad)
        assert alarm.check(examples) == other.check(examples)
