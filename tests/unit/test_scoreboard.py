"""Scoreboards: honest windows, cohorts, versions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esmm.batch import Examples, FeatureBlock, Kind
from esmm.metrics import TaskStats
from stream_scorer.core.score_tracks import OLDER, Cohorts, Track, measures
from stream_scorer.core.scoreboard import Scoreboard, ScoreboardPolicy
from stream_scorer.core.watermark import BEGINNING

POLICY = ScoreboardPolicy(
    first_rows=40, window_rows=60, settle_ms=160, mature_ms=1_600, cohorts=16, keep_versions=3
)  # cohorts of 10 and 100 ms


def rows(kinds, clicks, conversions, served, when, version=1) -> Examples:
    count = len(kinds)
    block = FeatureBlock(np.zeros((count, 0), np.int64), np.zeros((count, 0), np.float32))
    as_floats = [np.array(a, np.float32) for a in (clicks, conversions, conversions, served)]
    return Examples(
        block, block, block, np.array(kinds, np.uint8), *as_floats, as_floats[3] / 2,
        np.full(count, version, np.int64), np.array(when, np.int64),
    )  # fmt: skip


def stats(labels, predictions) -> TaskStats:
    return TaskStats.of(np.array(labels, float), np.array(predictions, float))


def test_a_track_keeps_the_first_window_the_last_and_all() -> None:
    track = Track(TaskStats, first_rows=3, window_rows=4)
    for at in range(10):
        track.add(stats([at % 2], [at / 10]))
    assert (track.first.rows, track.total.rows, track.last().rows) == (3, 10, 4)
    assert track.last().mean_prediction == pytest.approx((6 + 7 + 8 + 9) / 40)
    other = Track(TaskStats, 3, 4)
    other.load(json.loads(json.dumps(track.to_dict())))
    assert measures(other.last()) == measures(track.last())


def test_a_cohort_is_given_out_when_it_is_complete() -> None:
    cohorts = Cohorts(TaskStats, width_ms=10, settle_ms=100)
    label, score = np.array([1, 0], np.float32), np.array([0.5, 0.25], np.float32)
    cohorts.add(cohorts.grouped(np.array([5, 15]), np.array([1, 2])), label, score)
    cohorts.add(cohorts.grouped(np.array([9, 5]), np.array([1, 2])), label, score)
    assert list(cohorts.close(109)) == []
    assert [(version, s.rows, s.positives) for version, s in cohorts.close(110)] == [(1, 2, 2), (2, 1, 0)]
    assert [(version, s.rows) for version, s in cohorts.close(10_000)] == [(2, 1)]


@pytest.mark.parametrize("far", [1, 1_000])  # versions and times near one another, and not
def test_rows_are_told_apart_by_cohort_and_version(far) -> None:
    rng = np.random.default_rng(far)
    when, version = rng.integers(-300, 300, 500) * far, rng.integers(1, 5, 500) * far
    label, score = (rng.random(500) < 0.3).astype(np.float32), rng.random(500).astype(np.float32)
    cohorts, expected = Cohorts(TaskStats, width_ms=50, settle_ms=100), {}
    for of in (slice(0, 200), slice(200, 500)):
        cohorts.add(cohorts.grouped(when[of], version[of]), label[of], score[of])
    for key in sorted({(int(w) // 50, int(v)) for w, v in zip(when, version, strict=True)}):
        of = (when // 50 == key[0]) & (version == key[1])
        expected[key] = TaskStats.of(label[of], score[of])
    closed = list(cohorts.close(10**9))
    assert [c.version for c in closed] == [version for _, version in expected]
    for one, other in zip((c.stats for c in closed), expected.values(), strict=True):
        assert (one.rows, one.positives, one.auc()) == (other.rows, other.positives, other.auc())
        assert one.logloss() == pytest.approx(other.logloss(), rel=1e-12)
        np.testing.assert_allclose(one.prediction_K, other.prediction_K, rtol=1e-12)


def test_fresh_and_matured_boards_take_the_right_rows_and_labels() -> None:
    board = Scoreboard(TaskStats, POLICY)
    unclicked = rows([Kind.FIRST] * 2, [0, 0], [0, 0], [0.2, 0.4], [5, 5])
    clicked = rows([Kind.FIRST], [1], [0], [0.6], [6])
    board.add(unclicked, unclicked.served_ctr_B + 0.1, unclicked.served_ctcvr_B)
    board.advance(100)
    assert board.summary()["ctr"]["rows"] == 0  # the clicked row of that time is still waiting
    board.add(clicked, clicked.served_ctr_B + 0.1, clicked.served_ctcvr_B)
    board.add(rows([Kind.LATE_CONVERSION], [1], [1], [0.6], [6]), *(np.array([0.6], np.float32),) * 2)
    board.advance(200)
    summary = board.summary()
    assert (summary["ctr"]["rows"], summary["ctr"]["pcoc_last"]) == (3, pytest.approx(1.2))
    assert (summary["ctcvr"]["labels"], summary["ctcvr"]["rows"], summary["ctcvr"]["pcoc_last"]) == ("fresh", 3, None)
    assert board.progressive()["ctr"]["pcoc"] == pytest.approx(1.5)

    board.add(rows([Kind.MATURED], [1], [1], [0.6], [6]), *(np.array([0.6], np.float32),) * 2)
    board.advance(1_800)
    summary = board.summary()
    assert (summary["ctcvr"]["labels"], summary["ctcvr"]["rows"]) == ("matured", 3)
    assert summary["ctcvr"]["pcoc_last"] == pytest.approx(0.6)
    assert summary["ctr"]["rows"] == 3  # matured rows are no second first emission
    assert board.by_version()[1]["matured.ctcvr"]["rows"] == 3


def test_first_and_last_windows_tell_improvement() -> None:
    board = Scoreboard(TaskStats, POLICY)
    rng = np.random.default_rng(0)
    for at in range(200):
        click = (rng.random(4) < 0.5).astype(np.float32)
        good = at > 100
        served = np.where(click == 1, 0.9, 0.1) if good else np.full(4, 0.5)
        examples = rows([Kind.FIRST] * 4, click, click * 0, served, [at * 10] * 4, version=1 + good)
        board.add(examples, examples.served_ctr_B, examples.served_ctcvr_B)
        board.advance(at * 10)
    ctr = board.summary()["ctr"]
    assert ctr["logloss_first"] == pytest.approx(np.log(2), abs=1e-3)
    assert ctr["logloss_last"] == pytest.approx(-np.log(0.9), abs=1e-3)
    assert ctr["auc_last"] == 1.0
    assert board.by_version()[1]["fresh.ctr"]["logloss"] > board.by_version()[2]["fresh.ctr"]["logloss"]


def test_old_versions_are_lumped_together_and_no_row_is_lost() -> None:
    board = Scoreboard(TaskStats, POLICY)
    for version in range(1, 8):
        examples = rows([Kind.FIRST] * 2, [1, 0], [0, 0], [0.5, 0.5], [version * 10] * 2, version)
        board.add(examples, examples.served_ctr_B, examples.served_ctcvr_B)
        board.advance(version * 10)
    board.advance(10_000)
    by_version = board.by_version()
    assert sorted(by_version) == [OLDER, 5, 6, 7]
    assert sum(boards["fresh.ctr"]["rows"] for boards in by_version.values()) == 14
    board.advance(BEGINNING)


def test_state_survives_json() -> None:
    board, other = Scoreboard(TaskStats, POLICY), Scoreboard(TaskStats, POLICY)
    for at in range(30):
        examples = rows([Kind.FIRST, Kind.MATURED], [0, 1], [0, at % 2], [0.25, 0.5], [at * 10] * 2, at // 10)
        board.add(examples, examples.served_ctr_B, examples.served_ctcvr_B)
        board.advance(at * 10)
    other.load(json.loads(json.dumps(board.to_dict())))
    for one in (board, other):
        one.advance(100_000)
    assert other.summary() == board.summary()
    assert other.by_version() == board.by_version()
    assert other.progressive() == board.progressive()
