"""Negative downsampling: the loss keeps its minimum at the truth, the model its calibration, restarts are exact."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from esmm.batch import Examples, Kind
from esmm.delay import METHODS
from esmm.heads import HeadRule
from esmm.learner import Learner, LearnerConfig
from esmm.loss import entire_space_loss
from esmm.model import ESMM
from esmm.sampling import NegativeSampler, impression_hash, kept_rows
from tests.unit import test_learning_from_delays as late
from tests.unit.test_delay import POINTS, beliefs, world
from tests.unit.test_learner import differing, examples, state


def minimum(method: str, keep: float, click_rate: float, p: float, s: float) -> tuple[float, float]:
    """(pCTR, pCVR) at the minimum of the expected sampled loss at one x, from the exact mass of each kind of row."""
    w = world(p, s, click_rate, eventual=METHODS[method].eventual_label)
    kept_B = w.mass_B * (1 - (1 - keep) * w.rows.unclicked_B)
    weights = METHODS[method].weights(w.rows, beliefs(w, p, w.f_rn))
    logits_2 = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS(
        [logits_2], max_iter=400, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        steps.zero_grad()
        logits_B2 = NegativeSampler(keep).shifted(logits_2.expand(len(kept_B), 2))
        click_B = 1 - w.rows.unclicked_B
        loss = entire_space_loss(logits_B2, click_B, w.rows.first_B * kept_B, *(each_B * kept_B for each_B in weights))
        loss.backward()
        return loss

    steps.step(closure)
    ctr, cvr = torch.sigmoid(logits_2.detach()).tolist()
    return ctr, cvr


@pytest.mark.parametrize("click_rate", [0.3, 0.02])
@pytest.mark.parametrize(("p", "s"), POINTS)
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1, 0.01])
def test_the_minimum_of_the_sampled_loss_is_the_truth(keep, p, s, click_rate):
    assert minimum("mp-es-dfm", keep, click_rate, p, s) == pytest.approx((click_rate, p), abs=1e-6)


@pytest.mark.parametrize("method", ["oracle", "full-wait", "fnw", "es-dfm", "defer", "defuse", "ddfm"])
def test_so_it_is_for_every_unbiased_method_whose_clicks_weigh_what_its_unclicked_rows_weigh(method):
    assert minimum(method, 0.1, 0.05, 0.2, 0.5) == pytest.approx((0.05, 0.2), abs=1e-6)


def test_without_the_shift_the_minimum_is_that_of_the_sample(monkeypatch):
    monkeypatch.setattr(NegativeSampler, "shifted", lambda _, logits_B2: logits_B2)
    ctr, cvr = minimum("mp-es-dfm", 0.1, 0.05, 0.2, 0.5)
    assert (ctr, cvr) == pytest.approx((0.05 / (0.05 + 0.95 * 0.1), 0.2), abs=1e-6)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        NegativeSampler(keep)


def test_fnc_is_refused_as_its_correction_is_of_the_unsampled_world():
    with pytest.raises(ValueError, match="negative_keep"):
        Learner(ESMM(late.SCHEMA), LearnerConfig("fnc", negative_keep=0.5), lambda *_: None)


def with_times(rows: Examples) -> Examples:
    return rows._replace(impression_ms_B=np.arange(rows.rows, dtype=np.int64))


def test_only_unclicked_first_emissions_are_dropped_in_the_share_asked_for():
    batch = with_times(examples(1, 20_000))
    negative_B = (batch.kind_B == Kind.FIRST) & (batch.click_B == 0)
    for keep in (0.5, 0.1):
        kept_B = kept_rows(batch, keep)
        assert kept_B[~negative_B].all()
        sd = math.sqrt(keep * (1 - keep) / negative_B.sum())
        assert kept_B[negative_B].mean() == pytest.approx(keep, abs=4 * sd)
    assert (
        kept_rows(batch, 0.1) <= kept_rows(batch, 0.5)
    ).all()  # a lower share keeps a part of what a higher one does
    assert kept_rows(batch, 1.0).all()


def test_an_impression_has_one_hash_in_any_batch_and_each_of_its_parts_counts():
    batch = with_times(examples(1, 500))
    order = np.random.default_rng(0).permutation(500)
    assert np.array_equal(impression_hash(batch.take(order)), impression_hash(batch)[order])
    assert len(np.unique(impression_hash(batch))) == 500
    other_item = batch.item._replace(dense_ND=batch.item.dense_ND + 1)
    other_user = batch.user._replace(ids_NS=batch.user.ids_NS + 1)
    for changed in ({"impression_ms_B": batch.impression_ms_B + 1}, {"item": other_item}, {"user": other_user}):
        assert (impression_hash(batch._replace(**changed)) != impression_hash(batch)).all()


def sampled(keep: float) -> Learner:
    config = LearnerConfig(heads=HeadRule(learning_rate=3e-3, min_rows=1_000), learning_rate=3e-3, negative_keep=keep)
    return Learner(ESMM(late.SCHEMA, (32, 16), init_std=0.05), config, lambda *_: None)


def test_every_row_is_predicted_and_what_is_learned_is_what_was_kept(tmp_path: Path):
    batch = with_times(late.stream(late.market(4_000, seed=1))).take(np.arange(512))
    whole, kept = sampled(0.1), batch.take(np.flatnonzero(kept_rows(batch, 0.1)))
    expected = whole.predict(batch)
    stats = whole.step(batch)
    assert (stats.rows, stats.first_rows) == (512, int((kept.kind_B == Kind.FIRST).sum()))
    for said_B, expected_B in zip(stats[3:5], expected, strict=True):
        np.testing.assert_allclose(said_B, expected_B, rtol=1e-5, atol=0)  # the products are summed in another order
    again = sampled(0.1)
    again.step(kept)
    assert differing(state(whole), state(again)) == set()


def test_a_batch_of_which_nothing_is_kept_changes_nothing():
    batch = with_times(examples(1, 400, late.SCHEMA, kinds={Kind.FIRST}))
    dropped = batch.take(np.flatnonzero(~kept_rows(batch, 0.1)))
    one = sampled(0.1)
    before = state(one)
    stats = one.step(dropped)
    assert (stats.rows, stats.first_rows, stats.finite, len(stats.ctr_B)) == (dropped.rows, 0, True, dropped.rows)
    assert differing(before, state(one)) == set()


def test_a_restart_continues_bit_for_bit(tmp_path: Path):
    rows = with_times(late.stream(late.market(8_000, seed=1)))
    batches = [rows.take(np.arange(at, at + 256)) for at in range(0, 20 * 256, 256)]
    whole, first, second = (sampled(0.3) for _ in range(3))
    for n, batch in enumerate(batches):
        whole.step(batch)
        if n < 10:
            first.step(batch)
    first.save(tmp_path)
    second.restore(tmp_path)
    for batch in batches[10:]:
        second.step(batch)
    assert differing(state(whole), state(second)) == set()


def pcoc(keep: float, rows: Examples, fresh: late.Truth, shift: float | None = None) -> tuple[float, float]:
    """CTR's and CTCVR's predicted over true mean on fresh impressions, averaged over the last third of the stream."""
    learner, fresh_rows, predictions = sampled(keep), late.examples(fresh, np.arange(5_000)), []
    if shift is not None:
        learner._sampler.shift = shift
    for at in range(0, rows.rows - 511, 512):
        assert learner.step(rows.take(np.arange(at, at + 512))).finite
        if at > rows.rows * 2 / 3 and at % 5_120 == 0:
            predictions.append(learner.predict(fresh_rows))
    assert not learner.fallback
    ctr, ctcvr = (float(np.mean(task)) for task in zip(*predictions, strict=True))
    rate_N = fresh.click_rate_N
    return ctr / float(rate_N.mean()), ctcvr / float((rate_N * fresh.conversion_rate_N).mean())


def test_a_tenth_of_the_negatives_leaves_a_model_calibrated_and_without_the_shift_it_is_not():
    rows, fresh = with_times(late.stream(late.market(240_000, seed=1))), late.market(5_000, seed=99)
    assert pcoc(0.1, rows, fresh) == pytest.approx((1.0, 1.0), abs=0.05)
    ctr, ctcvr = pcoc(0.1, rows, fresh, shift=0.0)
    assert ctr > 1.8
    assert ctcvr > 1.5
