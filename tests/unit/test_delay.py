"""Closed forms: what every method converges to on exact masses of its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from esmm.batch import Kind
from esmm.delay import (
    METHODS,
    Beliefs,
    Method,
    Rows,
    Weights,
    WeightsOf,
    fake_negative,
    head_targets,
    method_named,
    sample_classes,
    served_ctcvr,
)

POINTS = [(0.20, 0.50), (0.05, 0.65), (0.40, 0.30), (0.01, 0.50)]  # (p, s): conversion rate, share of it that is late
CLICK_RATES = [1.0, 0.3, 0.02]
UNBIASED = ["oracle", "full-wait", "fnw", "fnc", "es-dfm", "mp-es-dfm", "defer", "defuse", "ddfm"]


class World(NamedTuple):
    """One x: its rows, and how many of each an impression emits."""

    rows: Rows
    mass_B: Tensor
    click_rate: float
    p: float
    p_dp: float

    @property
    def f_rn(self) -> float:
        return (1 - self.p) / (1 - self.p + self.p_dp)


def world(p: float, s: float, click_rate: float = 1.0, *, eventual: bool = False) -> World:
    p_dp, a = p * s, click_rate
    seen = p if eventual else p - p_dp
    table = [  # kind, click, conversion, observed, mass
        (Kind.FIRST, 0, 0, 0, 1 - a),
        (Kind.FIRST, 1, 1, 1, a * seen),
        (Kind.FIRST, 1, 0, 0, a * (1 - seen)),
        (Kind.LATE_CONVERSION, 1, 1, 0, a * p_dp),
        (Kind.MATURED, 1, 1, 1, a * (p - p_dp)),
        (Kind.MATURED, 1, 1, 0, a * p_dp),
        (Kind.MATURED, 1, 0, 0, a * (1 - p)),
    ]
    kind_B = torch.tensor([row[0] for row in table], dtype=torch.uint8)
    click_B, conversion_B, observed_B, mass_B = torch.tensor([row[1:] for row in table], dtype=torch.float64).unbind(1)
    return World(sample_classes(kind_B, click_B, conversion_B, observed_B), mass_B, a, p, p_dp)


def beliefs(w: World, f: float, f_rn: float) -> Beliefs:
    ones_B = torch.ones_like(w.mass_B)
    return Beliefs(ones_B * f, ones_B * f_rn, ones_B * w.p_dp)


def fixed_point(weights_of: WeightsOf, w: World, f_rn: float | None = None, start: float | None = None) -> float:
    """pCVR = t / a where t minimises the expected loss at x, iterated because weights may hold the model's own f."""
    f = w.p * 0.8 if start is None else start
    for _ in range(2_000):
        weights = weights_of(w.rows, beliefs(w, f, w.f_rn if f_rn is None else f_rn))
        positive, negative = ((w.mass_B * each_B).sum().item() for each_B in weights)
        f, before = positive / (positive + negative) / w.click_rate, f
        if abs(f - before) < 1e-12:
            break
    return f


def served(name: str, learned: float, click_rate: float) -> float:
    if not METHODS[name].odds_correction:
        return learned
    ctr, q = np.array([click_rate]), np.array([learned * click_rate])
    return float(served_ctcvr(ctr, q)[0]) / click_rate


@pytest.mark.parametrize("click_rate", CLICK_RATES)
@pytest.mark.parametrize(("p", "s"), POINTS)
@pytest.mark.parametrize("name", UNBIASED)
def test_fixed_point_is_the_truth_in_click_space_and_in_the_entire_space(name, p, s, click_rate):
    w = world(p, s, click_rate, eventual=METHODS[name].eventual_label)
    assert served(name, fixed_point(METHODS[name].weights, w), click_rate) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("click_rate", CLICK_RATES)
@pytest.mark.parametrize(("p", "s"), POINTS)
def test_the_vanilla_methods_are_biased_by_exactly_what_theory_says(p, s, click_rate):
    w = world(p, s, click_rate)
    assert fixed_point(METHODS["vanilla-window"].weights, w) == pytest.approx(p - w.p_dp, abs=1e-6)
    dup = p / (1 + click_rate * w.p_dp)
    assert fixed_point(METHODS["vanilla-dup"].weights, w) == pytest.approx(dup, abs=1e-6)


PUBLISHED = {  # method -> values at POINTS, four digits
    "vanilla-window": (0.1000, 0.0175, 0.2800, 0.0050),
    "vanilla-dup": (0.1818, 0.0484, 0.3571, 0.0100),
    **dict.fromkeys(("fnw", "fnc", "es-dfm", "mp-es-dfm", "defer", "defuse", "ddfm"), (0.2, 0.05, 0.4, 0.01)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_four_digit_table(name):
    got = [served(name, fixed_point(METHODS[name].weights, world(p, s)), 1.0) for p, s in POINTS]
    assert got == pytest.approx(PUBLISHED[name], abs=5.1e-5)


ALONE = {"fnw": 0.42, "fnc": 0.42, "es-dfm": 0.49, "mp-es-dfm": 0.49, "defuse": 0.57, "ddfm": 1.0, "defer": 1.04}


@pytest.mark.parametrize("name", ALONE)
def test_what_first_emissions_teach_of_an_item_that_leaves_before_its_late_conversions(name):
    w = world(0.256, 0.583)
    early = w._replace(mass_B=w.mass_B * w.rows.first_B)
    got = served(name, fixed_point(METHODS[name].weights, early), 1.0)
    assert got / w.p == pytest.approx(ALONE[name], abs=0.0051)


def defuse_bug(r: Rows, b: Beliefs) -> Weights:
    """ychen216/DEFUSE loss.py:155: every positive, late ones too, weighs 1 for being one and 1 + f_dp again."""
    right = METHODS["defuse"].weights(r, b)
    positive_B = (r.immediate_B + r.late_B) * (2 + b.dp_B) + r.pending_B * (1 - b.rn_B) * b.dp_B
    return Weights(positive_B, right.negative_B)


@pytest.mark.parametrize(("p", "s", "published"), [(0.2, 0.5, 0.3282), (0.05, 0.65, 0.0948), (0.4, 0.3, 0.5620)])
def test_the_published_defuse_code_fails_the_bound(p, s, published):
    got = fixed_point(defuse_bug, world(p, s))
    assert got == pytest.approx(published, abs=5e-5)
    assert abs(got - p) > 1e-6


@pytest.mark.parametrize("name", ["fnw", "es-dfm", "defer", "defuse", "ddfm"])
def test_unclicked_rows_of_weight_one_would_bias_every_method_that_does_not_preserve_mass(name):
    def naive(r: Rows, b: Beliefs) -> Weights:
        right = METHODS[name].weights(r, b)
        return Weights(right.positive_B, torch.where(r.unclicked_B > 0, 1.0, right.negative_B))

    w = world(0.2, 0.5, 0.3)
    assert fixed_point(naive, w) > 0.2 * 1.03


@pytest.mark.parametrize("click_rate", CLICK_RATES)
@pytest.mark.parametrize(("p", "s"), POINTS)
@pytest.mark.parametrize("factor", [0.9, 1.05])
def test_a_wrong_f_rn_moves_ctcvr_by_the_closed_form(p, s, click_rate, factor):
    w, a = world(p, s, click_rate), click_rate
    f_rn = min(w.f_rn * factor, 1.0)
    t = a * p / (a * p + (1 - a) + a * (1 - p + w.p_dp) * f_rn)
    for name in ("mp-es-dfm", "es-dfm"):
        expected = t
        if name == "es-dfm":  # its mass is 1 + f_dp everywhere, so the factor cancels
            assert METHODS[name].weights(w.rows, beliefs(w, p, f_rn)).negative_B[0] == 1 + w.p_dp
        assert fixed_point(METHODS[name].weights, w, f_rn) * a == pytest.approx(expected, abs=1e-9)


def test_five_percent_too_much_f_rn():
    got = [fixed_point(METHODS["es-dfm"].weights, w, min(w.f_rn * 1.05, 1)) for w in (world(p, s) for p, s in POINTS)]
    assert got == pytest.approx((0.1923, 0.0484, 0.3883, 0.0100), abs=5.1e-5)


def test_mass_preserving_es_dfm_is_es_dfm_without_its_factor_bit_for_bit():
    w = world(0.2, 0.5, 0.3)
    b = beliefs(w, 0.17, 0.83)
    scaled = METHODS["es-dfm"].weights(w.rows, b)
    plain = METHODS["mp-es-dfm"].weights(w.rows, b)
    for with_factor_B, without_B in zip(scaled, plain, strict=True):
        assert torch.equal(with_factor_B, without_B * (1 + b.dp_B))


@pytest.mark.parametrize(("p", "s"), POINTS)
def test_mass_preserving_means_one_row_of_mass_an_impression_and_weights_within_one(p, s):
    w = world(p, s, 0.3)
    for weights_of in (METHODS["mp-es-dfm"].weights, fake_negative, METHODS["oracle"].weights):
        case = world(p, s, 0.3, eventual=True) if weights_of is METHODS["oracle"].weights else w
        weights = weights_of(case.rows, beliefs(case, p, case.f_rn))
        assert sum((case.mass_B * each_B).sum().item() for each_B in weights) == pytest.approx(1.0, abs=1e-12)
        assert all(((each_B >= 0) & (each_B <= 1)).all() for each_B in weights)


@pytest.mark.parametrize("start", [0.01, 0.5, 0.9])
def test_the_fallback_reaches_the_truth_from_afar_on_a_stream_that_waits(start):
    for w in (world(0.2, 0.5, 0.3), world(0.2, 1.0, 0.3), world(0.2, 0.0, 0.3)):  # any w, even 0 or endless
        assert fixed_point(fake_negative, w, start=start) == pytest.approx(0.2, abs=1e-6)


def test_the_fallback_and_the_default_have_the_same_mass_emission_by_emission():
    w = world(0.2, 0.5, 0.3)
    b = beliefs(w, w.p, w.f_rn)
    for part_B in (w.rows.first_B, w.rows.late_B):
        one, other = (weights_of(w.rows, b) for weights_of in (fake_negative, METHODS["mp-es-dfm"].weights))
        for one_B, other_B in zip(one, other, strict=True):
            assert (w.mass_B * part_B * one_B).sum().item() == pytest.approx(
                (w.mass_B * part_B * other_B).sum().item(), abs=1e-12
            )


def test_defer_survives_a_belief_below_half_of_f_dp():
    w = world(0.2, 0.9)
    weights = METHODS["defer"].weights(w.rows, beliefs(w, 0.05, w.f_rn))
    assert all((each_B >= 0).all() and torch.isfinite(each_B).all() for each_B in weights)
    assert weights.positive_B.max() <= 2 / (1 - 0.9) + 1e-9


@pytest.mark.parametrize(("p", "s"), POINTS)
def test_the_heads_learn_exactly_their_probabilities(p, s):
    w = world(p, s, 0.3)
    targets = head_targets(w.rows)
    rn_mass_B, dp_mass_B = targets.rn_mask_B * w.mass_B, targets.dp_mask_B * w.mass_B
    assert (targets.rn_label_B * rn_mass_B).sum().item() / rn_mass_B.sum().item() == pytest.approx(w.f_rn, abs=1e-12)
    assert (targets.dp_label_B * dp_mass_B).sum().item() / dp_mass_B.sum().item() == pytest.approx(w.p_dp, abs=1e-12)


def classes(kind: Kind, click: float, conversion: float, observed: float) -> Rows:
    columns = [torch.tensor([value]) for value in (click, conversion, observed)]
    return sample_classes(torch.tensor([kind], dtype=torch.uint8), *columns)


def test_only_first_emissions_teach_ctr_and_a_second_positive_teaches_nothing():
    assert classes(Kind.FIRST, 1, 0, 0).first_B == 1
    assert classes(Kind.LATE_CONVERSION, 1, 1, 0).first_B == 0
    assert classes(Kind.MATURED, 1, 1, 1).first_B == 0
    twice = classes(Kind.LATE_CONVERSION, 1, 1, 1)  # R5: the first emission carried the conversion already
    for method in METHODS.values():
        weights = method.weights(twice, Beliefs(*(torch.tensor([0.2]) for _ in range(3))))
        assert weights.positive_B == 0, method.name
        assert weights.negative_B == 0, method.name


def depends(method: Method, rows: Rows, b: Beliefs, other: Beliefs) -> bool:
    before, after = method.weights(rows, b), method.weights(rows, other)
    return not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_methods_say_truly_which_rows_they_need():
    w = world(0.2, 0.5, 0.3)
    b = beliefs(w, 0.17, 0.83)
    for method in METHODS.values():
        total_B = sum(method.weights(w.rows, b))
        assert bool(total_B[3] > 0) == method.needs_late, method.name
        assert bool((total_B[4:] > 0).any()) == method.learns_matured, method.name
        assert depends(method, w.rows, b, Beliefs(b.cvr_B, b.rn_B * 0.5, b.dp_B)) == method.needs_rn, method.name
        assert depends(method, w.rows, b, Beliefs(b.cvr_B, b.rn_B, b.dp_B * 0.5)) == method.needs_dp, method.name


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown delayed-feedback method 'esdfm'; choose one of oracle, .*mp-es-dfm"):
        method_named("esdfm")


def test_served_ctcvr_never_exceeds_ctr():
    ctr_B = np.array([0.5, 0.1, 1.0], np.float32)
    learned_B = np.array([0.2, 0.1, 1.0], np.float32)
    assert served_ctcvr(ctr_B, learned_B) == pytest.approx([0.25, 0.1, 1.0])
    assert served_ctcvr(ctr_B, learned_B).dtype == np.float32
