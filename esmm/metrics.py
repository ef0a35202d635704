"""AUC, PR-AUC, logloss, NE, PCOC and ECE: exact on arrays, and over sufficient statistics that merge.

`TaskStats` keeps exact sums and a histogram of scores in logit space, so hours, partitions and model versions add up in
any order and no metric is an average of averages: a batch without a positive adds its negatives and biases nothing.
A metric that its rows do not define is nan: AUC needs both classes, PCOC a positive. Scores of one bin count as tied.

NE is logloss over the entropy of the mean label and PCOC is predicted over observed positives (He et al., ADKDD 2014).
Predictions are clipped to ``[CLIP, 1 - CLIP]`` in logloss only. Shape suffixes: N rows, K score bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
CLIP = 1e-7  # a float32 sigmoid reaches exactly 0 and 1
LOGIT_LIMIT = 17.0  # logits beyond it share the outermost bins; float32 cannot tell such probabilities from 1
BINS = 8704  # 1/256 of a logit each
ECE_GROUPS = 20
NAN = float("nan")


@dataclass(frozen=True, eq=False)
class TaskStats:
    """Sufficient statistics of one task's (label, prediction, weight) rows. ``a + b`` is the statistics of both."""

    rows: int
    logloss_sum: float  # nats, weighted
    positive_K: Float64  # weight of the positives with a score in each bin
    negative_K: Float64
    prediction_K: Float64  # weighted sum of the predictions in each bin

    @classmethod
    def empty(cls) -> TaskStats:
        """No rows: what sums start from."""
        return cls(0, 0.0, np.zeros(BINS), np.zeros(BINS), np.zeros(BINS))

    @classmethod
    def of(cls, labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None = None) -> TaskStats:
        """(N,) labels of 0 and 1, probabilities, and weights (default 1 each). ValueError for anything else."""
        y_N, p_N, w_N = _checked(labels, predictions, weights)
        logs = _logs(p_N)
        bin_N = _bin_of(logs)
        return cls(
            len(y_N),
            float(np.sum(w_N * _logloss_of(y_N, logs))),
            _sums(bin_N, w_N * y_N, BINS),
            _sums(bin_N, w_N * (1 - y_N), BINS),
            _sums(bin_N, w_N * p_N, BINS),
        )

    @classmethod
    def by_group(
        cls, labels: ArrayLike, predictions: ArrayLike, group_N: NDArray[np.intp], before: Sequence[TaskStats | None]
    ) -> list[TaskStats]:
        """``before[g] + of(...)`` of the rows of each group g; None counts as no rows.

        The sums are added to those of ``before``, which its owner must not use any more: a step has rows of many
        groups, and fresh histograms for each would cost more than the rows.
        """
        y_N, p_N, _ = _checked(labels, predictions, None)
        logs, groups = _logs(p_N), len(before)
        loss_G = np.bincount(group_N, _logloss_of(y_N, logs), groups).tolist()
        order_N = np.argsort(group_N, kind="stable")
        bin_N, y_N, p_N = _bin_of(logs)[order_N], y_N[order_N], p_N[order_N]
        out, start = [], 0
        for stats, rows, loss in zip(before, np.bincount(group_N, minlength=groups).tolist(), loss_G, strict=True):
            of = slice(start, start := start + rows)
            sums = stats or cls.empty()
            np.add.at(sums.positive_K, bin_N[of], y_N[of])
            np.add.at(sums.negative_K, bin_N[of], 1 - y_N[of])
            np.add.at(sums.prediction_K, bin_N[of], p_N[of])
            arrays = (sums.positive_K, sums.negative_K, sums.prediction_K)
            out.append(cls(sums.rows + rows, sums.logloss_sum + loss, *arrays))
        return out

    def __add__(self, other: TaskStats) -> TaskStats:
        return TaskStats(
            self.rows + other.rows,
            self.logloss_sum + other.logloss_sum,
            self.positive_K + other.positive_K,
            self.negative_K + other.negative_K,
            self.prediction_K + other.prediction_K,
        )

    @property
    def positives(self) -> float:
        """Weight of the rows labelled 1."""
        return float(self.positive_K.sum())

    @property
    def weight(self) -> float:
        """Weight of all rows."""
        return self.positives + float(self.negative_K.sum())

    @property
    def base_rate(self) -> float:
        """Mean label."""
        return _ratio(self.positives, self.weight)

    @property
    def mean_prediction(self) -> float:
        """Mean prediction."""
        return _ratio(float(self.prediction_K.sum()), self.weight)

    def auc(self) -> float:
        """P(a positive scores above a negative), ties and rows of one bin counting half."""
        return _auc(self.positive_K, self.negative_K)

    def pr_auc(self) -> float:
        """Average precision, rows of one bin entering together."""
        return _average_precision(self.positive_K, self.negative_K)

    def logloss(self) -> float:
        """Mean binary cross-entropy in nats, exact."""
        return _ratio(self.logloss_sum, self.weight)

    def ne(self) -> float:
        """Normalised entropy: logloss over that of always predicting the mean label. Below 1 is better than that."""
        return _ratio(self.logloss(), _entropy(self.base_rate))

    def pcoc(self) -> float:
        """Predicted over observed positives, exact: 1 is calibrated, above it over-predicts."""
        return _ratio(float(self.prediction_K.sum()), self.positives)

    def ece(self, groups: int = ECE_GROUPS) -> float:
        """Expected calibration error: mean |mean prediction - mean label| over groups of about equal weight."""
        return _ece(self.positive_K, self.negative_K, self.prediction_K, groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; only the bins in use are written."""
        used = np.flatnonzero(self.positive_K + self.negative_K)
        return {
            "rows": self.rows,
            "logloss_sum": self.logloss_sum,
            "bins": used.tolist(),
            "positive": self.positive_K[used].tolist(),
            "negative": self.negative_K[used].tolist(),
            "prediction": self.prediction_K[used].tolist(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskStats:
        """What `to_dict` wrote, bit for bit."""
        columns = []
        for name in ("positive", "negative", "prediction"):
            column_K = np.zeros(BINS)
            column_K[np.asarray(data["bins"], np.int64)] = data[name]
            columns.append(column_K)
        return cls(int(data["rows"]), float(data["logloss_sum"]), *columns)


def auc(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Exact area under the ROC curve, ties counting half; nan without both classes."""
    return _auc(*_by_score(labels, predictions, weights))


def pr_auc(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Exact average precision, tied rows entering together; nan without a positive."""
    return _average_precision(*_by_score(labels, predictions, weights))


def logloss(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean binary cross-entropy in nats; nan without rows."""
    y_N, p_N, w_N = _checked(labels, predictions, weights)
    return _ratio(float(np.sum(w_N * _logloss_of(y_N, _logs(p_N)))), float(w_N.sum()))


def pcoc(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Predicted over observed positives; nan without a positive."""
    y_N, p_N, w_N = _checked(labels, predictions, weights)
    return _ratio(float(np.sum(w_N * p_N)), float(np.sum(w_N * y_N)))


def _checked(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None) -> tuple[Float64, Float64, Float64]:
    y_N, p_N = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    w_N = np.ones_like(y_N) if weights is None else np.asarray(weights, np.float64)
    if y_N.ndim != 1 or y_N.shape != p_N.shape or y_N.shape != w_N.shape:
        raise ValueError(f"labels, predictions and weights must be (N,), got {y_N.shape}, {p_N.shape}, {w_N.shape}")
    if not np.all((y_N == 0) | (y_N == 1)):
        raise ValueError("labels must be 0 or 1")
    if not np.all((p_N >= 0) & (p_N <= 1)):
        raise ValueError("predictions must be probabilities in [0, 1], and finite")
    if not np.all((w_N >= 0) & np.isfinite(w_N)):
        raise ValueError("weights must be finite and not negative")
    return y_N, p_N, w_N


class _Logs(NamedTuple):
    """log p and log(1 - p), -inf at the ends."""

    one_N: Float64
    other_N: Float64


def _logs(p_N: Float64) -> _Logs:
    with np.errstate(divide="ignore"):
        return _Logs(np.log(p_N), np.log1p(-p_N))


def _logloss_of(y_N: Float64, logs: _Logs) -> Float64:
    one_N = np.clip(logs.one_N, np.log(CLIP), np.log(1 - CLIP))
    out: Float64 = -np.where(y_N == 1, one_N, np.clip(logs.other_N, np.log1p(CLIP - 1), np.log1p(-CLIP)))
    return out


def _bin_of(logs: _Logs) -> NDArray[np.int64]:
    logit_N = np.clip(logs.one_N - logs.other_N, -LOGIT_LIMIT, LOGIT_LIMIT)  # those of 0 and 1 are infinite
    scaled_N = (logit_N + LOGIT_LIMIT) * (BINS / (2 * LOGIT_LIMIT))
    out: NDArray[np.int64] = np.minimum(scaled_N.astype(np.int64), BINS - 1)
    return out


def _sums(bin_N: NDArray[np.int64], value_N: Float64, bins: int) -> Float64:
    return np.bincount(bin_N, value_N, bins).astype(np.float64, copy=False)


def _by_score(labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike | None) -> tuple[Float64, Float64]:
    """Weight of the positives and of the negatives at each distinct score, ascending."""
    y_N, p_N, w_N = _checked(labels, predictions, weights)
    scores, at_N = np.unique(p_N, return_inverse=True)
    return _sums(at_N, w_N * y_N, len(scores)), _sums(at_N, w_N * (1 - y_N), len(scores))


def _auc(positive_K: Float64, negative_K: Float64) -> float:
    """Weights at ascending scores -> share of (positive, negative) pairs in the right order."""
    below_K = np.cumsum(negative_K) - negative_K
    right = float(np.sum(positive_K * (below_K + 0.5 * negative_K)))
    return _ratio(right, float(positive_K.sum()) * float(negative_K.sum()))


def _average_precision(positive_K: Float64, negative_K: Float64) -> float:
    """Weights at ascending scores -> sum over scores, from the top, of precision times the recall gained."""
    positive_K, negative_K = positive_K[::-1], negative_K[::-1]
    true_K = np.cumsum(positive_K)
    taken_K = true_K + np.cumsum(negative_K)
    gained = float(np.sum(positive_K * true_K / np.where(taken_K > 0, taken_K, 1.0)))
    return _ratio(gained, float(positive_K.sum()))


def _ece(positive_K: Float64, negative_K: Float64, prediction_K: Float64, groups: int) -> float:
    weight_K = positive_K + negative_K
    total = float(weight_K.sum())
    if total <= 0:
        return NAN
    middle_K = (np.cumsum(weight_K) - 0.5 * weight_K) / total  # a bin is not split: it goes where its middle lies
    group_K = np.minimum((middle_K * groups).astype(np.int64), groups - 1)
    gap = _sums(group_K, prediction_K - positive_K, groups)
    return float(np.sum(np.abs(gap)) / total)


def _entropy(rate: float) -> float:
    """Binary entropy in nats; 0 at the ends."""
    if not 0 < rate < 1:
        return 0.0
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else NAN
