"""What may go live."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_scorer.core.gate import (
    Contest,
    GatePolicy,
    Judged,
    Verdicts,
    beats,
    cvr_of,
    decide,
    gap,
    judge_rows,
    verdicts,
)

POLICY = GatePolicy(logloss_margin=0.02, pcoc_min=0.5, pcoc_max=2.0, min_examples=100, min_positives=10, max_distance=3)
GOOD = Judged(1_000, 100, 0.30, 1.0)
LIVE = Verdicts(GOOD, GOOD, finite=True)


def candidate(ctr: Judged | None = GOOD, cvr: Judged | None = GOOD, finite: bool = True) -> Verdicts:
    return Verdicts(ctr, cvr, finite)


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (candidate(), "ok"),
        (candidate(ctr=GOOD._replace(logloss=0.305)), "ok"),
        (candidate(ctr=GOOD._replace(logloss=0.307)), "logloss_ctr"),
        (candidate(cvr=GOOD._replace(logloss=0.307)), "logloss_cvr"),
        (candidate(ctr=GOOD._replace(logloss=math.nan)), "logloss_ctr"),
        (candidate(ctr=GOOD._replace(pcoc=2.1)), "pcoc_ctr"),
        (candidate(cvr=GOOD._replace(pcoc=0.4)), "pcoc_cvr"),
        (candidate(cvr=GOOD._replace(pcoc=0.4, positives=9)), "ok"),  # too few to say anything
        (candidate(cvr=GOOD._replace(rows=99, logloss=9.0)), "ok"),
        (candidate(ctr=GOOD._replace(rows=99)), "few_examples"),
        (candidate(ctr=None), "few_examples"),
        (candidate(cvr=None), "ok"),
        (candidate(finite=False), "nonfinite"),
    ],
)
def test_decisions(verdict: Verdicts, reason: str) -> None:
    decision = decide(POLICY, LIVE, verdict)
    assert (decision.reason, decision.promote) == (reason, reason == "ok")


def test_getting_better_is_never_held_for_calibration() -> None:
    bad = Verdicts(GOOD._replace(pcoc=9.0, logloss=0.6), None, finite=True)
    assert decide(POLICY, bad, candidate(ctr=GOOD._replace(pcoc=3.0), cvr=None)).promote
    assert decide(POLICY, bad, candidate(ctr=GOOD._replace(pcoc=10.0), cvr=None)).reason == "pcoc_ctr"


def test_a_step_too_large_is_held_also_when_it_is_not_a_number() -> None:
    assert decide(POLICY, LIVE, candidate(), 3.1).reason == "distance"
    assert decide(POLICY, LIVE, candidate(), math.nan).reason == "distance"


def test_a_step_however_large_that_was_worth_it_is_not_held() -> None:
    better = candidate(ctr=GOOD._replace(logloss=0.2))
    assert decide(POLICY, LIVE, better, 9.0).promote
    assert decide(POLICY, LIVE, better, 9.0, now=candidate()).reason == "distance"  # it was, and is no more
    assert decide(POLICY, LIVE, better._replace(cvr=GOOD._replace(logloss=0.305)), 9.0).reason == "distance"


@pytest.mark.parametrize(
    "broken", [Verdicts(None, None, finite=False), Verdicts(GOOD._replace(logloss=math.nan), None, finite=True)]
)
def test_a_live_version_that_is_not_finite_counts_as_none(broken: Verdicts) -> None:
    assert decide(POLICY, broken, candidate(ctr=GOOD._replace(logloss=9.0)), math.nan).promote
    assert decide(POLICY, broken, candidate(ctr=GOOD._replace(pcoc=5.0)), math.nan).reason == "pcoc_ctr"


def test_what_it_says_now_counts_as_well() -> None:
    assert decide(POLICY, LIVE, candidate(), now=candidate(ctr=GOOD._replace(logloss=0.4))).reason == "logloss_ctr"
    assert decide(POLICY, LIVE, candidate(), now=candidate(finite=False)).reason == "nonfinite"
    assert decide(POLICY, LIVE, candidate(ctr=GOOD._replace(logloss=0.4)), now=candidate()).reason == "logloss_ctr"


def test_worse_than_the_best_version_lately_is_held_however_near_the_live_one() -> None:
    near = candidate(ctr=GOOD._replace(logloss=0.305))
    best = Verdicts(GOOD._replace(logloss=0.295), GOOD, finite=True)
    assert decide(POLICY, LIVE, near).promote
    assert decide(POLICY, LIVE, near, best=Contest(near, best)).reason == "ratchet_ctr"
    assert decide(POLICY, LIVE, near, best=Contest(near, Verdicts(None, None, finite=False))).promote


def test_worse_on_what_nobody_learned_is_held() -> None:
    worse = Contest(candidate(ctr=GOOD._replace(logloss=0.31)), LIVE)
    assert decide(POLICY, LIVE, candidate(), held_out=worse).reason == "holdout_ctr"
    assert decide(POLICY, LIVE, candidate(), held_out=Contest(candidate(), LIVE)).promote
    few = Contest(candidate(ctr=GOOD._replace(logloss=0.31, rows=99)), LIVE)
    assert decide(POLICY, LIVE, candidate(), held_out=few).promote


def test_only_a_lower_logloss_beats() -> None:
    lower = GOOD._replace(logloss=0.29)
    assert beats(POLICY, Contest(candidate(ctr=lower), LIVE))
    assert not beats(POLICY, Contest(candidate(), LIVE))
    assert not beats(POLICY, Contest(candidate(ctr=lower, cvr=GOOD._replace(logloss=0.301)), LIVE))
    assert beats(POLICY, Contest(candidate(ctr=lower, cvr=GOOD._replace(logloss=0.301, rows=99)), LIVE))
    assert not beats(POLICY, Contest(candidate(ctr=lower._replace(rows=99)), LIVE))


def test_without_a_live_version_the_bounds_alone_decide() -> None:
    assert decide(POLICY, None, candidate(ctr=GOOD._replace(logloss=9.0))).promote
    assert decide(POLICY, None, candidate(ctr=GOOD._replace(pcoc=5.0))).reason == "pcoc_ctr"


def test_numbers_say_what_was_compared() -> None:
    numbers = decide(POLICY, LIVE, candidate(), 0.5).numbers
    assert numbers["distance"] == 0.5
    assert numbers["live_ctr_logloss"] == numbers["candidate_cvr_logloss"] == 0.30


def test_judging_rows() -> None:
    judged = judge_rows(np.array([1, 0, 0, 0], np.float32), np.full(4, 0.5, np.float32))
    assert judged == Judged(4, 1, pytest.approx(math.log(2)), pytest.approx(2.0))
    assert judge_rows(np.zeros(2, np.float32), np.full(2, 0.5, np.float32)).pcoc == math.inf
    assert math.isfinite(judge_rows(np.ones(1, np.float32), np.zeros(1, np.float32)).logloss)


def test_a_prediction_that_is_no_number_makes_a_model_not_finite() -> None:
    nothing = np.zeros(0, np.float32)
    assert not verdicts(None, np.array([np.nan], np.float32), None, nothing).finite
    assert verdicts(None, nothing, None, nothing) == Verdicts(None, None, finite=True)


def test_gap_and_cvr() -> None:
    half, odds = np.full(3, 0.5, np.float32), np.full(3, np.e / (1 + np.e), np.float32)
    assert gap(half, odds) == pytest.approx(1.0, rel=1e-4)
    assert gap(half[:0], half[:0]) == 0
    assert math.isnan(gap(half, half * np.nan))
    np.testing.assert_allclose(cvr_of(np.array([0.5, 0.0], np.float32), np.array([0.1, 0.0], np.float32)), [0.2, 0])
