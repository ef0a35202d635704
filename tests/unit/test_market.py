"""The market: seeded, within its promised rates, drifting, churning, and seen through the schema it ships."""

from __future__ import annotations

import numpy as np
import pytest

from esmm.features import FeatureSchema
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.market import CATEGORIES, HISTORY, HOURS, Market, MarketPlan
from stream_scorer.embedded.market_features import (
    ID_BUCKETS,
    MARKET_TOML,
    item_block,
    item_names,
    user_block,
    user_names,
)

SMALL = MarketPlan(users=300, items=200, candidates=20)
SCHEMA = FeatureSchema.from_toml(MARKET_TOML)


def auc(score_N: np.ndarray, true_N: np.ndarray) -> float:
    order = np.argsort(score_N.ravel(), kind="stable")
    true = true_N.ravel()[order].astype(float)
    below = np.cumsum(1 - true) - (1 - true) / 2
    return float((true * below).sum() / (true.sum() * (1 - true).sum()))


def test_the_same_seed_is_the_same_market() -> None:
    first, second, other = Market(SMALL), Market(SMALL), Market(MarketPlan(seed=8, users=300, items=200, candidates=20))
    for market in (first, second, other):
        market.advance(5.0)
    asked, again, different = first.ask(7), second.ask(7), other.ask(7)
    for one, two in zip(asked, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(asked.click_NK, different.click_NK)


def test_rates_are_those_of_a_shop() -> None:
    asked = Market(MarketPlan()).ask(1_500)
    best_NP = np.argsort(-asked.click_NK * asked.buy_NK, axis=1)[:, :10]
    click, buy = (np.take_along_axis(part, best_NP, 1) for part in (asked.click_NK, asked.buy_NK))
    assert 0.03 < asked.click_NK.mean() < 0.06
    assert 0.05 < asked.buy_NK.mean() < 0.15
    assert 0.07 < click.mean() < 0.15
    assert (click * buy).sum() / click.sum() < 0.2
    assert 0.72 < auc(asked.click_NK, asked.click_NK) < 0.85  # room to learn, and no oracle either


def test_requests_never_repeat_a_candidate() -> None:
    asked = Market(SMALL).ask(50)
    assert all(len(set(row)) == SMALL.candidates for row in asked.item_NK.tolist())
    assert asked.item_NK.shape == asked.click_NK.shape == asked.tilt_NK.shape == (50, SMALL.candidates)


def test_tastes_turn_slowly_then_beyond_recognition() -> None:
    market = Market(MarketPlan(users=300, items=200, candidates=20, churn_per_s=0.0, refresh_per_s=0.0))
    users, slots = np.arange(100), np.tile(np.arange(20), (100, 1))
    market.advance(1_000.0)  # past the items' ageing
    before, bought = market.truth(users, slots, 3)
    market.advance(1_030.0)
    after, _ = market.truth(users, slots, 3)
    market.advance(1_000.0 + np.pi / market.plan.drift_per_s)
    opposite, still_bought = market.truth(users, slots, 3)
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.97
    assert not np.array_equal(before, after)
    assert np.corrcoef(before.ravel(), opposite.ravel())[0, 1] < 0.8
    np.testing.assert_array_equal(bought, still_bought)


def test_items_retire_and_new_ones_get_numbers_never_used() -> None:
    market = Market(SMALL)
    before = market.number_M.copy()
    changes = market.advance(10.0)  # 0.3 a second
    new = np.nonzero(market.number_M != before)[0]
    assert len(new) == 3
    assert set(new) <= set(changes.slots)
    assert market.number_M[new].min() > before.max()
    assert len(np.unique(market.number_M)) == SMALL.items
    assert len(market.advance(10.0).slots) == 0  # no time passed
    market.advance(4.0)  # a clock that goes back changes nothing
    assert market.now_s == 10.0


def test_features_are_seen_anew_at_the_rate_asked() -> None:
    market = Market(MarketPlan(users=1_000, items=1_000, candidates=5, churn_per_s=0.0, refresh_per_s=0.02))
    before = market.profile_seen_U4.copy()
    users = np.concatenate([market.advance(0.1 * (step + 1)).users for step in range(50)])
    changed = np.nonzero((market.profile_seen_U4 != before).any(axis=1))[0]
    assert set(changed) <= set(users)
    assert 80 <= len(users) <= 100


def test_clicks_move_histories_even_twice_for_one_user() -> None:
    market = Market(SMALL)
    before = market.history_UH[5].tolist()
    market.clicked(np.array([5, 5]), np.array([3, 9]))
    assert market.history_UH[5].tolist() == [10, 4, *before[:-2]]


def test_hours_pass_at_the_markets_pace() -> None:
    market = Market(SMALL)
    assert [market.hour(s) for s in (0.0, 0.1, 0.25, 2.3, 2.4)] == [0, 1, 2, 23, 0]
    market.advance(0.55)
    assert market.ask(3).hour_N.tolist() == [5, 5, 5]


def test_features_fit_the_schema_it_ships() -> None:
    market = Market(SMALL)
    users, slots = np.array([0, 7, 299]), np.array([0, 199])
    user, item = user_block(market, users, SCHEMA.layout("user")), item_block(market, slots, SCHEMA.layout("item"))
    at = {slot.name: slice(slot.start, slot.stop) for slot in (*SCHEMA.layout("user").ids, *SCHEMA.layout("item").ids)}
    assert user.ids_NS[:, at["user_id"]].ravel().tolist() == [1, 8, 300]
    assert item.ids_NS[:, at["item_id"]].ravel().tolist() == [1, 200]
    np.testing.assert_array_equal(user.ids_NS[:, at["recent_categories"]], market.history_UH[users])
    assert item.ids_NS[:, at["category"]].min() >= 1  # 0 is the histories' padding, and they share the table
    assert user.dense_ND.shape == (3, 4)
    assert item.dense_ND[:, 0].tolist() == market.price_M[slots].tolist()
    assert np.isfinite(user.dense_ND).all()
    assert user_names(users) == ["u0", "u7", "u299"]
    assert item_names(market.number_M[slots]) == ["i1", "i200"]


def test_ids_stay_inside_their_vocabularies() -> None:
    market = Market(SMALL)
    sizes = {column.name: column.vocabulary_size for column in SCHEMA.columns if hasattr(column, "vocabulary_size")}
    assert (sizes["hour"], sizes["user_id"], sizes["recent_categories"]) == (HOURS, ID_BUCKETS, CATEGORIES + 1)
    user = user_block(market, np.arange(SMALL.users), SCHEMA.layout("user"))
    item = item_block(market, np.arange(SMALL.items), SCHEMA.layout("item"))
    for block, source in ((user, "user"), (item, "item")):
        for slot in SCHEMA.layout(source).ids:
            assert block.ids_NS[:, slot.start : slot.stop].max() < sizes[slot.name]
            assert block.ids_NS[:, slot.start : slot.stop].min() >= 0
    assert market.history_UH.shape == (SMALL.users, HISTORY)


def test_what_is_seen_tells_of_the_truth_but_not_all() -> None:
    market = Market(MarketPlan())
    seen = np.corrcoef(market.quality_seen_M, market.quality_M)[0, 1]
    assert 0.9 < seen < 0.99


def test_a_schema_that_differs_is_refused_by_name() -> None:
    layout = SCHEMA.layout("item")
    with pytest.raises(ConfigurationError, match="brand, colour"):
        fill(layout, 1, {name: np.ones(1) for name in ("item_id", "category", "colour", "price_quality_age")})


@pytest.mark.parametrize("wrong", [{"candidates": 0}, {"candidates": 201}, {"users": 0}, {"time_scale": 0.0}])
def test_an_impossible_market_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a market needs"):
        MarketPlan(**{"users": 300, "items": 200, **wrong})  # type: ignore[arg-type]
