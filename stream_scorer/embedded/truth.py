"""How far served scores are from the known truth, without the noise of labels; all sums merge.

For N scored candidates with true probability t and served probability s:

    AUC      P(s of a click > s of a non-click) when clicks are drawn from the truth: candidate i counts t_i as a click
             and 1 - t_i as none, ties count half. ``auc_ceiling`` is the AUC of t itself: no scorer can rank better.
    logloss  mean of -t ln s - (1 - t) ln(1 - s), nats: its expectation; ``logloss_floor`` is that of s = t.
    mae      mean |s - t|.
    pcoc     sum of s over sum of t; 1 is calibrated.

AUC is computed over bins 0.02 wide in log odds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_LOW, _HIGH, _BINS = -14.0, 6.0, 1_000
_TINY = 1e-7


@dataclass(frozen=True, slots=True)
class TruthMetrics:
    """See the module. Everything is None over no candidates; an AUC also when one class has no mass."""

    candidates: int
    auc: float | None
    auc_ceiling: float | None
    logloss: float | None
    logloss_floor: float | None
    mae: float | None
    pcoc: float | None


@dataclass
class TruthTally:
    """Sufficient statistics of one task over some candidates."""

    candidates: int = 0
    sums_5: Float64 = field(default_factory=lambda: np.zeros(5))  # logloss, floor, |s - t|, s, t
    served_2B: Float64 = field(default_factory=lambda: np.zeros((2, _BINS)))  # clicks, non-clicks by bin of s
    ideal_2B: Float64 = field(default_factory=lambda: np.zeros((2, _BINS)))  # the same by bin of t

    def add(self, served_N: NDArray[np.floating], true_N: NDArray[np.floating]) -> None:
        """Count N candidates."""
        s_N = np.clip(served_N.astype(np.float64), _TINY, 1 - _TINY)
        t_N = np.clip(true_N.astype(np.float64), _TINY, 1 - _TINY)
        odds_N, ideal_N = _logit(s_N), _logit(t_N)
        # -t ln s - (1 - t) ln(1 - s) = -t logit(s) - ln(1 - s)
        losses = (-t_N * odds_N - np.log1p(-s_N), -t_N * ideal_N - np.log1p(-t_N))
        self.candidates += len(s_N)
        self.sums_5 = self.sums_5 + np.array([part.sum() for part in (*losses, np.abs(s_N - t_N), s_N, t_N)])
        self.served_2B = self.served_2B + _masses(odds_N, t_N)
        self.ideal_2B = self.ideal_2B + _masses(ideal_N, t_N)

    def merged(self, other: TruthTally) -> TruthTally:
        """Both together."""
        return TruthTally(
            self.candidates + other.candidates,
            self.sums_5 + other.sums_5,
            self.served_2B + other.served_2B,
            self.ideal_2B + other.ideal_2B,
        )

    def metrics(self) -> TruthMetrics:
        """The figures now."""
        if not self.candidates:
            return TruthMetrics(0, None, None, None, None, None, None)
        logloss, floor, error = (self.sums_5[:3] / self.candidates).tolist()
        pcoc = float(self.sums_5[3] / self.sums_5[4])
        return TruthMetrics(self.candidates, _auc(self.served_2B), _auc(self.ideal_2B), logloss, floor, error, pcoc)


def _logit(probability_N: Float64) -> Float64:
    return np.asarray(np.log(probability_N) - np.log1p(-probability_N))


def _masses(odds_N: Float64, true_N: Float64) -> Float64:
    bin_N = np.clip((odds_N - _LOW) * (_BINS / (_HIGH - _LOW)), 0, _BINS - 1).astype(np.int64)
    return np.stack([np.bincount(bin_N, true_N, _BINS), np.bincount(bin_N, 1.0 - true_N, _BINS)])


def _auc(mass_2B: Float64) -> float | None:
    positive, negative = mass_2B.sum(axis=1)
    if positive <= 0 or negative <= 0:
        return None
    below_B = np.cumsum(mass_2B[1]) - mass_2B[1] / 2
    return float(mass_2B[0] @ below_B / (positive * negative))
