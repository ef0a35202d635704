"""May this candidate go live? The candidate against published versions on rows that neither had learned from. Pure.

Slices: ``ctr`` on recent first emissions (the click label is final there), and ``cvr`` = CTCVR / CTR on recently
matured clicks (their conversion label is final). CTCVR on fresh rows does not decide: its labels lack the late
conversions, so a model that under-predicts would look better on them. AUC does not decide either: a loss that counts
positives twice gains AUC. What decides is logloss, calibration (PCOC), finiteness, and how far predictions moved.

Rivals: the live version, and the *best* one published lately. A candidate may be a little worse than the live one, so a
chain of candidates could get worse without end if nothing but the last was compared: the best one stays a rival until
a version beats it on the same rows.

The candidate is judged by progressive predictions (`core/gate_rows.py`), and by what it says of the same rows *now*:
it has learned them by now, so that says little for it, but a last step that spoilt it shows. Progressive predictions
cannot show what the newest rows taught: a burst of wrong labels looks bad to all models alike until it was learned. So
a share of impressions is *held out*, learned by no model, and candidate and live version are compared on these too:
they reach far enough back that a burst is a small part of them.
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
    max_distance: float = 6.0  # mean |logit difference| from the live model: that large must have been worth it


class Judged(NamedTuple):
    """One model on one slice."""

    rows: int
    positives: int
    logloss: float
    pcoc: float


class Decision(NamedTuple):
    """``reason`` is a metric label: ok | first | few_examples | nonfinite | distance | <what>_<slice>.

    What: logloss or pcoc, next to the live version; ratchet, logloss next to the best one lately; holdout, logloss on
    rows that nobody learns from. For these two the slice may be ``nonfinite``: they have numbers where it has none.
    """

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


class Contest(NamedTuple):
    """A candidate and a published version on the same rows."""

    candidate: Verdicts
    rival: Verdicts


def decide(
    policy: GatePolicy,
    live: Verdicts | None,
    candidate: Verdicts,
    distance: float = 0.0,
    *,
    now: Verdicts | None = None,
    best: Contest | None = None,
    held_out: Contest | None = None,
) -> Decision:
    """Promote or hold. ``live`` is None when nothing is live yet, or it cannot be read: the other rivals still count.

    ``candidate`` is judged by progressive predictions on the rows of ``live``, as in ``best``; ``now`` by those of the
    moment, as in ``held_out``. A rival that is not finite is no rival.
    """
    live = live if live is not None and _is_rival(live) else None
    numbers = _numbers({"live": live, "candidate": candidate, "now": now, "best": best.rival if best else None})
    if held_out is not None:
        numbers |= _numbers({"held_out_live": held_out.rival, "held_out": held_out.candidate})
    numbers["distance"] = distance
    reason = _hold(policy, live, candidate, now or candidate)
    for contest, what in ((best, "ratchet"), (held_out, "holdout")):
        if not reason and contest is not None and _is_rival(contest.rival):
            finite = contest.candidate.finite  # if not, there is nothing to compare; weights may be fine all the same
            reason = _worse(policy, contest.rival, contest.candidate, what) if finite else f"{what}_nonfinite"
    if not reason and live is not None and not distance <= policy.max_distance:  # also NaN
        improved = all(beats(policy, Contest(after, live)) for after in (candidate, now or candidate))
        reason = "" if improved else "distance"
    return Decision(not reason, reason or "ok", numbers)


def beats(policy: GatePolicy, contest: Contest) -> bool:
    """Whether the candidate's logloss is lower on first emissions, and not higher on matured clicks if these count."""
    after, before = contest
    if after.ctr is None or not after.ctr.rows >= policy.min_examples:
        return False
    if before.ctr is None:  # of the same rows it said what is no number
        return _is_rival(after) and not before.finite
    if after.cvr is not None and before.cvr is not None and after.cvr.rows >= policy.min_examples:
        return after.ctr.logloss < before.ctr.logloss and after.cvr.logloss <= before.cvr.logloss
    return after.ctr.logloss < before.ctr.logloss


def _is_rival(verdicts: Verdicts) -> bool:
    """Finite, in predictions and in loss."""
    judged = (verdicts.ctr, verdicts.cvr)
    return verdicts.finite and all(one is None or math.isfinite(one.logloss) for one in judged)


def _hold(policy: GatePolicy, live: Verdicts | None, candidate: Verdicts, now: Verdicts) -> str:
    """Why not, as far as the live version tells; empty when nothing speaks against it."""
    if not (candidate.finite and now.finite):
        return "nonfinite"
    if candidate.ctr is None or candidate.ctr.rows < policy.min_examples:
        return "few_examples"
    for after in (candidate, now):
        reason = _worse(policy, live, after, "logloss") or _uncalibrated(policy, live, after)
        if reason:
            return reason
    return ""


def _pairs(policy: GatePolicy, before: Verdicts | None, after: Verdicts) -> list[tuple[str, Judged, Judged | None]]:
    """Slices with enough rows: name, candidate, rival."""
    slices = (("ctr", after.ctr, before.ctr if before else None), ("cvr", after.cvr, before.cvr if before else None))
    return [(name, one, other) for name, one, other in slices if one is not None and one.rows >= policy.min_examples]


def _worse(policy: GatePolicy, before: Verdicts | None, after: Verdicts, reason: str) -> str:
    for name, judged, rival in _pairs(policy, before, after):
        if rival is not None and not judged.logloss <= rival.logloss * (1 + policy.logloss_margin):
            return f"{reason}_{name}"
    return ""


def _uncalibrated(policy: GatePolicy, before: Verdicts | None, after: Verdicts) -> str:
    for name, judged, rival in _pairs(policy, before, after):
        if judged.positives >= policy.min_positives and not _calibrated(policy, judged, rival):
            return f"pcoc_{name}"
    return ""


def _calibrated(policy: GatePolicy, after: Judged, before: Judged | None) -> bool:
    """In bounds, or out of them but nearer to 1 than the live model is: getting better is never held."""
    if policy.pcoc_min <= after.pcoc <= policy.pcoc_max:
        return True
    return before is not None and abs(math.log(after.pcoc)) < abs(math.log(before.pcoc))


def _numbers(models: Mapping[str, Verdicts | None]) -> dict[str, float]:
    out: dict[str, float] = {}
    for who, verdict in models.items():
        for name in ("ctr", "cvr"):
            judged: Judged | None = getattr(verdict, name) if verdict else None
            if judged is not None:
                out |= {f"{who}_{name}_logloss": judged.logloss, f"{who}_{name}_pcoc": judged.pcoc}
                out[f"{who}_{name}_rows"] = float(judged.rows)
    return out
