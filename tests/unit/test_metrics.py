"""Metrics against scikit-learn, their merging, and what they say when they are undefined."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from esmm import metrics
from esmm.metrics import TaskStats

VALUES = ("auc", "pr_auc", "logloss", "ne", "pcoc", "ece", "base_rate", "mean_prediction")


def value(stats: TaskStats, name: str) -> float:
    found = getattr(stats, name)
    return found() if callable(found) else found


def sample(mean: float, spread: float, slope: float = 1.0, rows: int = 50_000, seed: int = 0):
    """Labels drawn from sigmoid(z), predicted as sigmoid(slope z): slope 1 is calibrated."""
    rng = np.random.default_rng(seed)
    z_N = rng.normal(mean, spread, rows)
    return (rng.random(rows) < 1 / (1 + np.exp(-z_N))).astype(float), 1 / (1 + np.exp(-slope * z_N))


@pytest.mark.parametrize(
    ("mean", "spread", "slope"),
    [(-3, 1, 1), (-6, 1, 1), (-1, 0.1, 1), (-4, 0.02, 1), (0, 3, 1), (-3, 1.5, 0.5), (2, 4, 3)],
)
def test_binned_metrics_agree_with_scikit_learn(mean, spread, slope):
    y, p = sample(mean, spread, slope)
    stats = TaskStats.of(y, p)
    assert stats.auc() == pytest.approx(roc_auc_score(y, p), abs=1e-3)
    assert stats.pr_auc() == pytest.approx(average_precision_score(y, p), abs=2e-3)
    assert stats.logloss() == pytest.approx(log_loss(y, np.clip(p, metrics.CLIP, 1 - metrics.CLIP)), rel=1e-12)
    assert stats.pcoc() == pytest.approx(p.sum() / y.sum(), rel=1e-12)


ROW = st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.25001, 0.9, 1.0]))


@given(st.lists(ROW, min_size=2, max_size=40))
def test_exact_metrics_agree_with_scikit_learn_with_ties(rows):
    y, p = np.array([float(a) for a, _ in rows]), np.array([b for _, b in rows])
    if 0 < y.sum() < len(y):
        assert metrics.auc(y, p) == pytest.approx(roc_auc_score(y, p), abs=1e-12)
        assert metrics.pr_auc(y, p) == pytest.approx(average_precision_score(y, p), abs=1e-12)
        clipped = np.clip(p, metrics.CLIP, 1 - metrics.CLIP)
        assert metrics.logloss(y, p) == pytest.approx(log_loss(y, clipped), abs=1e-12)
        assert metrics.pcoc(y, p) == pytest.approx(p.sum() / y.sum(), abs=1e-12)


def test_weights_are_repeated_rows():
    y, p = sample(-1, 1, rows=500)
    w = np.random.default_rng(1).integers(0, 4, 500)
    repeated = TaskStats.of(np.repeat(y, w), np.repeat(p, w))
    weighted = TaskStats.of(y, p, w)
    for name in VALUES:
        assert value(weighted, name) == pytest.approx(value(repeated, name), rel=1e-12), name
    assert metrics.auc(y, p, w) == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=1e-12)
    assert metrics.logloss(y, p, w) == pytest.approx(metrics.logloss(np.repeat(y, w), np.repeat(p, w)), rel=1e-12)


@given(st.lists(st.integers(0, 120), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_merging_in_any_grouping_and_order_is_the_whole(cuts, random):
    y, p = sample(-2, 1, rows=120)
    parts = [TaskStats.of(a, b) for a, b in zip(np.split(y, sorted(cuts)), np.split(p, sorted(cuts)), strict=True)]
    random.shuffle(parts)
    merged = sum(parts, TaskStats.empty())
    whole = TaskStats.of(y, p)
    assert (merged.rows, merged.weight, merged.positives) == (120, 120, y.sum())
    assert merged.auc() == whole.auc()
    for name in VALUES:
        assert value(merged, name) == pytest.approx(value(whole, name), rel=1e-12), name


def test_a_batch_of_one_class_is_nan_alone_and_only_adds_its_rows_to_a_merge():
    y, p = sample(-3, 1, rows=2000)
    negatives = np.flatnonzero(y == 0)[:300]
    rest = np.setdiff1d(np.arange(2000), negatives)
    lonely = TaskStats.of(y[negatives], p[negatives])
    assert math.isnan(lonely.auc())
    assert math.isnan(lonely.pr_auc())
    assert math.isnan(lonely.pcoc())
    assert math.isnan(lonely.ne())
    assert lonely.logloss() > 0
    merged = TaskStats.of(y[rest], p[rest]) + lonely
    assert merged.auc() == pytest.approx(roc_auc_score(y, p), abs=1e-3)
    assert abs(TaskStats.of(y[rest], p[rest]).auc() - merged.auc()) > 1e-4, "dropping the batch would have shown"
    assert math.isnan(metrics.auc(y[negatives], p[negatives]))
    assert math.isnan(metrics.pcoc(y[negatives], p[negatives]))


def test_no_rows():
    empty = TaskStats.of([], [])
    assert empty.rows == 0
    assert all(math.isnan(value(empty, name)) for name in VALUES)
    assert math.isnan(metrics.auc([], []))
    assert math.isnan(metrics.logloss([], []))


def test_extreme_predictions_are_clipped_in_logloss_only():
    stats = TaskStats.of([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0])
    assert stats.logloss() == pytest.approx(0.5 * -math.log(metrics.CLIP), rel=1e-6)
    assert stats.pcoc() == 1.0
    assert stats.auc() == 0.5


def test_calibration():
    y, p = sample(-2, 1)
    assert TaskStats.of(y, p).ece() < 0.01
    assert TaskStats.of(y, p).pcoc() == pytest.approx(1, abs=0.03)
    doubled = TaskStats.of(y, np.minimum(2 * p, 1))
    assert doubled.pcoc() > 1.8
    assert doubled.ece() == pytest.approx(float(np.minimum(2 * p, 1).mean() - y.mean()), abs=0.005)
    assert doubled.auc() == pytest.approx(TaskStats.of(y, p).auc(), abs=1e-3), "ranking does not see it"


def test_ece_is_that_of_equal_mass_groups():
    y, p = sample(-1, 1, slope=0.5)
    order = np.argsort(p)
    gaps = [abs(p[i].mean() - y[i].mean()) * len(i) for i in np.array_split(order, 20)]
    assert TaskStats.of(y, p).ece(20) == pytest.approx(sum(gaps) / len(y), abs=2e-3)


def test_normalised_entropy_of_the_base_rate_is_one():
    y, _ = sample(-1, 1)
    stats = TaskStats.of(y, np.full_like(y, y.mean()))
    assert stats.ne() == pytest.approx(1, rel=1e-9)
    assert stats.auc() == 0.5
    assert TaskStats.of(*sample(-1, 1)).ne() < 1


def test_json_round_trip_is_bit_for_bit():
    stats = TaskStats.of(*sample(-2, 2, rows=777), np.random.default_rng(2).random(777))
    again = TaskStats.from_dict(json.loads(json.dumps(stats.to_dict())))
    assert again.to_dict() == stats.to_dict()
    for name in VALUES:
        assert value(again, name) == value(stats, name), name
    assert TaskStats.from_dict(TaskStats.empty().to_dict()).rows == 0


@pytest.mark.parametrize(
    ("labels", "predictions", "weights", "words"),
    [
        ([0.5], [0.5], None, "labels must be 0 or 1"),
        ([math.nan], [0.5], None, "labels must be 0 or 1"),
        ([1], [1.5], None, "probabilities"),
        ([1], [math.nan], None, "probabilities"),
        ([1], [0.5], [-1], "weights must be finite and not negative"),
        ([1], [0.5], [math.inf], "weights must be finite and not negative"),
        ([1, 0], [0.5], None, "must be"),
        ([[1]], [[0.5]], None, "must be"),
    ],
)
def test_bad_rows_are_refused(labels, predictions, weights, words):
    with pytest.raises(ValueError, match=words):
        TaskStats.of(labels, predictions, weights)
    with pytest.raises(ValueError, match=words):
        metrics.auc(labels, predictions, weights)


def test_float32_probabilities_of_zero_and_one_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskStats.of(np.float32([0, 1]), np.float32([0, 1]))
