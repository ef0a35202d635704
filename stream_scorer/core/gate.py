"""May this candidate go live? The candidate against the live model on the same recent rows. Pure.

Slices: ``ctr`` on recent first emissions (the click label is final there), and ``cvr`` = CTCVR / CTR on recently
matured clicks (their conversion label is final). CTCVR on fresh rows does not decide: its labels lack the late
conversions, so a model that under-predicts would look better on them. AUC does not decide either: a loss that counts
positives twice gains AUC. What decides is logloss, calibration (PCOC), finiteness, and how far predictions moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, Float32

TINY = 1e-7


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What a candidate must keep to."""

    logloss_margin: float = 0.02  # relative: at most (1 + margin) times the live model's
    pcoc_min: float = 0.5
    pcoc_max: float = 2.0
    min_examples: int = 200  # first emissions needed to judge at all; as many matured clicks to judge cvr
    min_positives: int = 20  # fewer say too little about PCOC
    max_distance: float = 6.0  # mean |logit difference| from the live model: a step this large is no learning


class Judged(NamedTuple):
    """One model on one slice."""

    rows: int
    positives: int
    logloss: float
    pcoc: float


class Decision(NamedTuple):
    """``reason`` is a metric label: ok | few_examples | nonfinite | distance | logloss_<slice> | pcoc_<slice>."""

    promote: bool
    reason: str
    numbers: Mapping[str, float]


class Verdicts(NamedTuple):
    """One model's predictions judged: ``ctr`` on first emissions, ``cvr`` on matured clicks; None without rows."""

    ctr: Judged | None
    cvr: Judged | None
    finite: bool


def judge_rows(label_B: Float32, prediction_B: Float32) -> Judged:
    """Mean logloss in nats and PCOC (inf without a positive) of B >= 1 rows."""
    p_B: NDArray[np.float64] = np.clip(prediction_B.astype(np.float64), TINY, 1 - TINY)
    y_B = label_B.astype(np.float64)
    positives = float(y_B.sum())
    logloss = float(-(y_B * np.log(p_B) + (1 - y_B) * np.log1p(-p_B)).mean())
    return Judged(len(y_B), int(positives), logloss, float(p_B.sum()) / positives if positives else math.inf)


def verdicts(
    first: Examples | None, first_ctr_B: Float32, matured: Examples | None, matured_cvr_B: Float32
) -> Verdicts:
    """One model's predictions on the two slices: pCTR of first emissions, pCVR of matured clicks."""
    finite = bool(np.isfinite(first_ctr_B).all() and np.isfinite(matured_cvr_B).all())
    if not finite:
        return Verdicts(None, None, finite=False)
    ctr = judge_rows(first.click_B, first_ctr_B) if first is not None else None
    cvr = judge_rows(matured.conversion_B, matured_cvr_B) if matured is not None else None
    return Verdicts(ctr, cvr, finite=True)


def cvr_of(ctr_B: Float32, ctcvr_B: Float32) -> Float32:
    """CTCVR / CTR, in [0, 1]."""
    out: Float32 = np.minimum(ctcvr_B / np.maximum(ctr_B, TINY), 1.0).astype(np.float32)
    return out


def gap(before_B: Float32, after_B: Float32) -> float:
    """Mean |logit difference| of two models' probabilities for the same rows; 0 without rows, nan when not finite."""
    if not len(before_B):
        return 0.0
    return float(np.abs(_logit(after_B) - _logit(before_B)).mean())


def _logit(p_B: Float32) -> NDArray[np.float64]:
    clipped_B = np.clip(p_B.astype(np.float64), TINY, 1 - TINY)
    out: NDArray[np.float64] = np.log(clipped_B) - np.log1p(-clipped_B)
    return out


def decide(policy: GatePolicy, live: Verdicts | None, candidate: Verdicts, distance: float = 0.0) -> Decision:
    """Promote or hold. ``live`` is None when nothing is live yet; then only the candidate's own bounds count."""
    numbers = _numbers(live, candidate, distance)
    if not candidate.finite:
        return Decision(False, "nonfinite", numbers)
    if candidate.ctr is None or candidate.ctr.rows < policy.min_examples:
        return Decision(False, "few_examples", numbers)
    if not distance <= policy.max_distance:  # also NaN
        return Decision(False, "distance", numbers)
    before: Judged | None
    for name, after, before in (
        ("ctr", candidate.ctr, live.ctr if live else None),
        ("cvr", candidate.cvr, live.cvr if live else None),
    ):
        if after is None or after.rows < policy.min_examples:
            continue
        if before is not None and not after.logloss <= before.logloss * (1 + policy.logloss_margin):
            return Decision(False, f"logloss_{name}", numbers)
        if after.positives >= policy.min_positives and not _calibrated(policy, after, before):
            return Decision(False, f"pcoc_{name}", numbers)
    return Decision(True, "ok", numbers)


def _calibrated(policy: GatePolicy, after: Judged, before: Judged | None) -> bool:
    """In bounds, or out of them but nearer to 1 than the live model is: getting better is never held."""
    if policy.pcoc_min <= after.pcoc <= policy.pcoc_max:
        return True
    return before is not None and abs(math.log(after.pcoc)) < abs(math.log(before.pcoc))


def _numbers(live: Verdicts | None, candidate: Verdicts, distance: float) -> dict[str, float]:
    out = {"distance": distance}
    for who, verdict in (("live", live), ("candidate", candidate)):
        for name in ("ctr", "cvr"):
            judged: Judged | None = getattr(verdict, name) if verdict else None
            if judged is not None:
                out |= {f"{who}_{name}_logloss": judged.logloss, f"{who}_{name}_pcoc": judged.pcoc}
                out[f"{who}_{name}_rows"] = float(judged.rows)
    return out
