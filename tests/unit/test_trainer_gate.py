"""What the gate does with predictions that are no numbers, and how many rows it is given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stream_scorer.core.deadline import Deadline
from stream_scorer.core.gate import Contest, GatePolicy, Judged, Verdicts, beats, decide
from stream_scorer.core.gate_rows import is_held_out
from stream_scorer.settings import load
from stream_scorer.wiring import build
from tests.trainer_kit import POLICY, SCHEMA, START_MS, Market, TinyLearner, TrainerWorld

GATE = GatePolicy(min_examples=100)
GOOD = Judged(1_000, 100, 0.30, 1.0)
FINE = Verdicts(GOOD, GOOD, finite=True)
BROKEN = Verdicts(None, None, finite=False)


def test_a_rival_that_says_what_is_no_number_is_beaten_by_any_candidate_that_does_not() -> None:
    assert beats(GATE, Contest(FINE, BROKEN))
    assert not beats(GATE, Contest(BROKEN, BROKEN))
    assert not beats(GATE, Contest(FINE._replace(ctr=GOOD._replace(rows=99)), BROKEN))
    assert not beats(GATE, Contest(Verdicts(GOOD._replace(logloss=math.nan), None, finite=True), BROKEN))


def test_a_rival_that_said_nothing_of_the_rows_is_not_beaten() -> None:
    assert not beats(GATE, Contest(FINE, Verdicts(None, GOOD, finite=True)))


@pytest.mark.parametrize(("where", "what"), [("best", "ratchet"), ("held_out", "holdout")])
def test_a_candidate_without_numbers_where_a_rival_has_some_is_held(where: str, what: str) -> None:
    decision = decide(GATE, FINE, FINE, now=FINE, **{where: Contest(BROKEN, FINE)})
    assert (decision.promote, decision.reason) == (False, f"{what}_nonfinite")
    assert decide(GATE, FINE, FINE, now=FINE, **{where: Contest(BROKEN, BROKEN)}).promote  # nothing to compare with


class Sceptical(TinyLearner):
    """Says what is no number of rows that are held out, by weights that are numbers."""

    def predict(self, examples):
        ctr_B, ctcvr_B = super().predict(examples)
        return np.where(is_held_out(examples, 0.2), np.nan, ctr_B).astype(np.float32), ctcvr_B


def test_no_number_for_a_row_that_was_held_out_does_not_undo_what_was_learned(tmp_path: Path) -> None:
    policy = replace(POLICY, gate=GatePolicy(min_examples=50), holdout=0.2, publish_every_s=100.0)
    world = TrainerWorld(tmp_path, policy=policy, make_learner=Sceptical)
    Market(requests=100).fill(world.source)
    world.until_idle()
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    Market(requests=300, start_ms=START_MS + 60_000, name="more").fill(world.source)
    world.until_idle()
    world.quiet(50)  # so that nothing is left to learn
    learned = world.learner.weights.copy()
    world.clock.advance(60)
    world.trainer.step()
    assert world.trainer._publisher.tally.holds == {"holdout_nonfinite": 1}
    np.testing.assert_array_equal(world.learner.weights, learned)


def test_the_gate_is_given_twice_the_rows_it_needs() -> None:
    def rows_for(least: int) -> int:
        settings = load(None, {}, {"trainer.gate_min_examples": least})
        return build.trainer_policy(settings, SCHEMA).gate_rows

    assert [rows_for(least) for least in (200, 2_000, 9_000)] == [4_000, 4_000, 18_000]


def test_enough_rows_are_held_out_for_the_gate_to_judge_by(tmp_path: Path) -> None:
    policy = replace(POLICY, gate=GatePolicy(min_examples=1_300), holdout=0.5, publish_every_s=10.0)
    world = TrainerWorld(tmp_path, policy=policy)
    Market(requests=900, gap_ms=5).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.trainer._publisher.tally.numbers["held_out_ctr_rows"] >= 1_300
