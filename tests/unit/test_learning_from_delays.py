"""A small market with known truth and late conversions: the default method ends calibrated, the naive one does not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from esmm.batch import Bool, Examples, FeatureBlock, Float32, Int64, Kind
from esmm.features import DenseFeat, FeatureSchema, SparseFeat
from esmm.heads import HeadRule
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM

SCHEMA = FeatureSchema(
    [
        SparseFeat("user", 40, 4, source="user"),
        SparseFeat("item", 60, 4, source="item"),
        DenseFeat("price", source="context"),
    ]
)
OBSERVATION, ATTRIBUTION, IMPRESSIONS_PER_UNIT = 1.0, 8.0, 2_000  # windows in units of time


class Truth(NamedTuple):
    """N impressions: features, true probabilities, and what happened."""

    user_N: Int64
    item_N: Int64
    price_N: Float32
    click_rate_N: Float32
    conversion_rate_N: Float32  # given a click, within the attribution window
    at_N: Float32
    click_N: Bool
    delay_N: Float32  # from click to conversion, infinite when there is none within the attribution window


def market(impressions: int, seed: int) -> Truth:
    """Users and items move clicks, conversions and delays: late converters are not average ones."""
    taste = np.random.default_rng(0)
    user_U3, item_I3 = taste.normal(0, 0.6, (40, 3)), taste.normal(0, 0.6, (60, 3))
    rng = np.random.default_rng(seed)
    user_N, item_N = rng.integers(0, 40, impressions), rng.integers(0, 60, impressions)
    price_N = rng.standard_normal(impressions)
    logit_N3 = user_U3[user_N] + item_I3[item_N] + price_N[:, None] * np.array([0.3, -0.4, 0.3])
    click_rate_N, bought_N = (1 / (1 + np.exp(-logit_N3[:, i] - bias)) for i, bias in ((0, -1.0), (1, -0.5)))
    mean_N = np.exp(logit_N3[:, 2]) * 1.2
    click_N = rng.random(impressions) < click_rate_N
    delay_N = np.where(rng.random(impressions) < bought_N, rng.exponential(mean_N), np.inf)
    delay_N[delay_N > ATTRIBUTION] = np.inf
    return Truth(
        user_N, item_N, price_N.astype(np.float32), click_rate_N, bought_N * -np.expm1(-ATTRIBUTION / mean_N),
        np.arange(impressions) / IMPRESSIONS_PER_UNIT, click_N, delay_N,
    )  # fmt: skip


def stream(truth: Truth) -> Examples:
    """What a joiner emits up to the last impression, in the order it emits it (a tail of late rows is no market)."""
    clicked_C = np.flatnonzero(truth.click_N)
    seen_N = truth.click_N & (truth.delay_N <= OBSERVATION)
    late_L = np.flatnonzero(truth.click_N & np.isfinite(truth.delay_N) & ~seen_N)
    converted_N = truth.click_N & np.isfinite(truth.delay_N)
    everything = np.arange(len(truth.at_N))
    parts = [  # kind, rows, emitted, conversion
        (Kind.FIRST, everything, truth.at_N + OBSERVATION * truth.click_N, seen_N),
        (Kind.LATE_CONVERSION, late_L, truth.at_N[late_L] + truth.delay_N[late_L], converted_N[late_L]),
        (Kind.MATURED, clicked_C, truth.at_N[clicked_C] + ATTRIBUTION, converted_N[clicked_C]),
    ]
    emitted = np.concatenate([part[2] for part in parts])
    order = np.argsort(emitted, kind="stable")[: int((emitted <= truth.at_N[-1]).sum())]
    row = np.concatenate([part[1] for part in parts])[order]
    kind = np.concatenate([np.full(len(part[1]), part[0], np.uint8) for part in parts])[order]
    conversion = np.concatenate([part[3] for part in parts])[order]
    return examples(truth, row)._replace(kind_B=kind, conversion_B=conversion.astype(np.float32))


def examples(truth: Truth, row: Int64) -> Examples:
    """First emissions of some impressions."""
    rows, none = len(row), np.zeros(len(row), np.float32)
    seen_B = (truth.click_N & (truth.delay_N <= OBSERVATION))[row].astype(np.float32)
    return Examples(
        FeatureBlock(truth.user_N[row, None], np.zeros((rows, 0), np.float32)),
        FeatureBlock(truth.item_N[row, None], np.zeros((rows, 0), np.float32)),
        FeatureBlock(np.zeros((rows, 0), np.int64), truth.price_N[row, None]),
        np.zeros(rows, np.uint8), truth.click_N[row].astype(np.float32), seen_B, seen_B,
        none, none, np.zeros(rows, np.int64), np.zeros(rows, np.int64),
    )  # fmt: skip


class Outcome(NamedTuple):
    """Against the truth, on fresh impressions: predicted over true mean, and mean absolute error."""

    ctr_pcoc: float
    ctcvr_pcoc: float
    ctcvr_error: float


def outcome(method: str, truth: Truth) -> Outcome:
    """Averaged over the last third of the stream: a streaming learner's last step is as noisy as its last batch."""
    config = LearnerConfig(method, learning_rate=3e-3, heads=HeadRule(learning_rate=3e-3, min_rows=1_000))
    learner = Learner(ESMM(SCHEMA, (32, 16), init_std=0.05), config, lambda *_: None)
    rows, fresh = stream(truth), market(5_000, seed=99)
    fresh_examples = examples(fresh, np.arange(5_000))
    predictions = []
    for at in range(0, rows.rows - 255, 256):
        assert learner.step(rows.take(np.arange(at, at + 256))).finite
        if at > rows.rows * 2 / 3 and at % 2_560 == 0:
            predictions.append(learner.predict(fresh_examples))
    assert not learner.fallback
    ctr_KB, ctcvr_KB = (np.stack(task) for task in zip(*predictions, strict=True))
    true_B = fresh.click_rate_N * fresh.conversion_rate_N
    return Outcome(
        float(ctr_KB.mean() / fresh.click_rate_N.mean()),
        float(ctcvr_KB.mean() / true_B.mean()),
        float(np.abs(ctcvr_KB - true_B).mean()),
    )


def test_the_default_method_ends_near_the_truth_and_the_vanilla_window_does_not():
    truth = market(240_000, seed=1)
    default, vanilla = (outcome(method, truth) for method in ("mp-es-dfm", "vanilla-window"))
    converted_N = truth.click_N & np.isfinite(truth.delay_N)
    seen_share = (truth.delay_N[converted_N] <= OBSERVATION).mean()
    assert seen_share < 0.65
    assert default.ctr_pcoc == pytest.approx(1.0, abs=0.03)
    assert default.ctcvr_pcoc == pytest.approx(1.0, abs=0.03)
    assert vanilla.ctcvr_pcoc == pytest.approx(seen_share, abs=0.05)
    assert default.ctcvr_error < 0.75 * vanilla.ctcvr_error
