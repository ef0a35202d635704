"""What the gate does with predictions that are no numbers, and how many rows it is given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stream_scorer.core.gate import Contest, GatePolicy, Judged, Verdicts, beats, decide
from stream_scorer.settings import load
from stream_scorer.wiring import build
from tests.trainer_kit import POLICY, SCHEMA, Market, TrainerWorld

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


@pytest.mark.parametrize("where", ["best", "held_out"])
def test_a_candidate_without_numbers_where_a_rival_has_some_is_held(where: str) -> None:
    decision = decide(GATE, FINE, FINE, now=FINE, **{where: Contest(BROKEN, FINE)})
    assert (decision.promote, decision.reason) == (False, "nonfinite")
    assert decide(GATE, FINE, FINE, now=FINE, **{where: Contest(BROKEN, BROKEN)}).promote  # nothing to compare with


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
