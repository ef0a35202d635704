"""The learning benchmark's own rules: no row says what nobody can know yet, RI, paired errors, the search for rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esmm.batch import Kind
from esmm.delay import METHODS
from stream_scorer.embedded.delays import DelayMixture
from tests.bench.learning import POWERS, RATE_LIMIT, RATE_STEP, TEST_SEEDS, TUNING_SEEDS, cells_of, climb, searches
from tests.bench.learning_report import Measured, mean_error, paired, relative_improvement, text, write
from tests.bench.learning_stream import TASKS, beside, emitted
from tests.bench.learning_world import CLICK_WINDOW, OBSERVATION_WINDOW, Plan, World, facts_of, late_share, make_world

DELAYS = DelayMixture((0.4, 0.6), (0.2, 6.0), 12.0)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(DELAYS, 5, Plan(pretrain=6, warm_up=4, test=30, requests=60))


@pytest.mark.parametrize("method", [m for m in METHODS.values() if not m.eventual_label], ids=lambda m: m.name)
def test_a_row_is_emitted_no_earlier_than_anything_it_says(world: World, method) -> None:
    rows = emitted(world, method, 0.0, np.inf)
    at, i = rows.at_R, rows.impression_R
    click, converted = world.click_N[i], world.converted_N[i]
    wait = OBSERVATION_WINDOW if method.observes else 0.0
    assert (np.diff(at) >= 0).all()
    assert (at[click] >= world.click_at_N[i][click]).all()
    assert (at[~click] >= world.at_N[i][~click] + CLICK_WINDOW).all()
    assert (at[rows.conversion_R == 1] >= world.converted_at_N[i][rows.conversion_R == 1]).all()
    quiet = click & (rows.kind_R == Kind.FIRST) & (rows.conversion_R == 0)
    assert (world.converted_at_N[i][quiet] > world.click_at_N[i][quiet] + wait).all()
    matured = rows.kind_R == Kind.MATURED
    assert (at[matured] >= world.click_at_N[i][matured] + world.attribution).all()
    assert (rows.conversion_R[matured] == converted[matured]).all()


def test_each_conversion_is_sent_once(world: World) -> None:
    rows = emitted(world, METHODS["vanilla-dup"], 0.0, np.inf)
    positive = rows.impression_R[rows.conversion_R == 1]
    assert len(np.unique(positive)) == len(positive) == world.converted_N.sum()


def test_pretraining_ends_before_the_stream_says_anything(world: World) -> None:
    end = float(world.plan.pretrain)
    for rows in (emitted(world, METHODS["oracle"], 0.0, end), beside(world, end - CLICK_WINDOW)):
        said = world.converted_at_N[rows.impression_R[rows.conversion_R == 1]]
        assert len(said)
        assert said.max() <= world.start


def test_late_share_is_what_the_delays_draw() -> None:
    for tilt in (-1.0, 0.0, 1.5):
        drawn = DELAYS.sample(np.random.default_rng(3), np.full(40_000, tilt))
        assert late_share(DELAYS, np.array([tilt]))[0] == pytest.approx((drawn > OBSERVATION_WINDOW).mean(), abs=0.01)


def test_facts_of_a_world_agree_with_its_rows(world: World) -> None:
    facts = facts_of(world)
    test = world.at_N >= world.test_start
    clicks = test & world.click_N
    assert facts["ctr"] == pytest.approx(world.click_N[test].mean(), abs=0.02)
    assert facts["cvr"] == pytest.approx(world.converted_N[clicks].mean(), abs=0.03)
    late = world.converted_N & (world.converted_at_N > world.click_at_N + OBSERVATION_WINDOW)
    assert facts["late_share"] == pytest.approx(late.sum() / world.converted_N.sum(), abs=0.06)
    assert 0 < facts["vanilla_bias"] < facts["ctr"]
    assert facts["lag_low"] <= facts["lag_high"]


def test_relative_improvement_is_0_at_pretrained_and_100_at_the_oracle() -> None:
    assert relative_improvement(0.7, 0.7, 0.8) == 0
    assert relative_improvement(0.8, 0.7, 0.8) == 100
    assert relative_improvement(0.23, 0.25, 0.21) == pytest.approx(50)  # less is better for log loss
    assert relative_improvement(0.26, 0.25, 0.21) == pytest.approx(-25)
    assert math.isnan(relative_improvement(0.5, 0.5, 0.5))


def test_paired_error_leaves_out_what_seeds_have_in_common() -> None:
    theirs = [0.1, 0.2, 0.3, 0.4]
    ours = [value - gap for value, gap in zip(theirs, (0.01, 0.02, 0.01, 0.02), strict=True)]
    gap, error = paired(ours, theirs)
    assert gap == pytest.approx(-0.015)
    assert error == pytest.approx(np.std([0.01, 0.02, 0.01, 0.02], ddof=1) / 2)
    assert error < mean_error(theirs)[1] / 10
    assert math.isnan(mean_error([1.0])[1])


@pytest.mark.parametrize("best", [-4, 0, 2, 5])
def test_the_search_walks_until_the_best_rate_is_inside(best: int) -> None:
    losses = climb(lambda power: abs(power - best))
    assert min(losses, key=losses.__getitem__) == best
    assert min(losses) < best < max(losses)


def test_the_search_ends_at_its_limit() -> None:
    losses = climb(lambda power: -power)
    assert max(losses) == RATE_LIMIT


def test_each_setting_is_searched_for_every_method_and_tested_at_its_own_rates() -> None:
    tasks = searches(["default", "long"], Plan(), 2)
    of = {setting: [m for t in tasks if t.setting == setting for m in t.methods] for setting in ("default", "long")}
    assert {setting: sorted(methods) for setting, methods in of.items()} == dict.fromkeys(of, sorted(METHODS))
    assert {task.setting: task.plan.test for task in tasks} == {"default": 72, "long": Plan().test}
    rates = {setting: {m: RATE_STEP**power for m, power in powers.items()} for setting, powers in POWERS.items()}
    for cell in cells_of(["default", "long"], (1, 2), Plan(), rates):
        assert dict(cell.trials) == rates[cell.setting] | {"pretrained": 1.0}
    assert rates["default"] != rates["long"]


def test_no_seed_is_both_tuned_and_tested_on() -> None:
    assert not set(TEST_SEEDS) & set(TUNING_SEEDS)


def measured(seed: int, nll: dict[str, float]) -> Measured:
    """A world in which every task and kind has these log losses."""
    found = {}
    for method, value in nll.items():
        metrics = {"auc": 1 - value, "pr_auc": 0.1, "nll": value, "pcoc": 1.0, "ece": 0.0}
        found[method, 1.0] = {kind: dict.fromkeys(TASKS, metrics) for kind in ("labels", "truth")}
    return Measured("default", seed, found, {method: [0.9, 1.1] for method in nll}, {}, {"ctr": 0.3})


def test_a_report_has_every_file_and_says_what_was_missed(tmp_path) -> None:
    losses = {"pretrained": 0.3, "oracle": 0.2, "vanilla-dup": 0.22, "mp-es-dfm": 0.23}
    done = [measured(seed, {m: v + seed / 100 for m, v in losses.items()}) for seed in (1, 2)]
    tried = {"default": {"oracle": {1.0: 0.3, 2.0: 0.2, 3.0: 0.25}, "mp-es-dfm": {1.0: 0.3, 2.0: 0.2}}}
    write(tmp_path, done, tried)
    header, first = (tmp_path / "learning.csv").read_text().splitlines()[:2]
    assert header == "setting,method,seed,task,auc,pr_auc,nll,pcoc,ece,ri_auc,ri_nll"
    assert first.startswith("default,pretrained,1,ctr,")
    names = {"", "_truth", "_sync", "_days", "_facts", "_rates"}
    assert {path.name for path in tmp_path.iterdir()} == {f"learning{n}.csv" for n in names} | {"learning.svg"}
    said = text(done, {"default": {"oracle": 2.0}}, tried)
    assert "rate at the edge of those tried: default mp-es-dfm" in said
    assert "NO  NLL less vanilla-dup's +0.010000" in said
    assert "yes CTCVR PCOC 1.0000" in said
    assert "NO  RI-NLL 70.0 >= 75" in said
