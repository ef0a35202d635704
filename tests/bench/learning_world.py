"""The world of the learning benchmark: impressions of a drifting market with known truth, clicks, conversions, delays.

It is the simulator's market (`stream_scorer.embedded.market`) without Kafka, and with conversions that drift too: one
market second is an hour here, tastes turn, items come and go, categories come into fashion, and a daily season moves
both rates. Of each request's candidates a noisy ranking by true worth is shown, the same for every method.

Times are hours. Shapes: N impressions, C categories, K waves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from esmm.batch import Examples, FeatureBlock, concat_examples
from esmm.features import FeatureSchema
from stream_scorer.embedded.delays import TAOBAO, DelayMixture
from stream_scorer.embedded.market import CATEGORIES, Market, MarketPlan
from stream_scorer.embedded.market_features import MARKET_TOML, item_block, user_block

SCHEMA = FeatureSchema.from_toml(MARKET_TOML)
# Fitted to published delay statistics; the share that comes after an hour is about .38, .51 and .65.
SETTINGS = {
    "short": DelayMixture((0.565, 0.125, 0.310), (0.114, 4.692, 88.03), 168.0),
    "default": TAOBAO,
    "long": DelayMixture((0.322, 0.115, 0.563), (0.211, 7.535, 274.7), 720.0),
}
CLICK_WINDOW, OBSERVATION_WINDOW = 0.25, 1.0
CLICK_DELAY, TICK = 1 / 30, 1 / 6
WAVES = 3


@dataclass(frozen=True)
class Plan:
    """How much of everything; hours. Pretraining, then one attribution window of nothing, warm-up, test.

    Late conversions say how much was bought days ago, so over two days PCOC is off by what buying changed meanwhile, up
    or down by the seed; a week of test evens that out. In the entire space the vanilla duplicate's bias is a p_dp: with
    one click in six impressions 3%, which no five seeds can tell from none. ``lift`` and ``sale`` make it 7%.
    """

    pretrain: int = 96
    warm_up: int = 24
    test: int = 168
    requests: int = 200  # an hour
    shown: int = 10
    candidates: int = 40
    lift: float = 2.0  # log odds of a click: what is shown was chosen well
    sale: float = 0.6  # log odds of a purchase: about .3 clicks an impression, .25 purchases a click
    taste: float = 0.006  # radians an hour that tastes turn
    fashion: float = 0.5  # of a category in log odds of buying
    week: float = 0.0  # of everything, over a week, in log odds of buying: not in any feature
    churn: float = 2.0  # items an hour


class World(NamedTuple):
    """N impressions in order of time; between pretraining and stream only the clicked ones are kept."""

    examples: Examples  # as unclicked first emissions
    at_N: np.ndarray
    click_N: np.ndarray  # bool
    click_at_N: np.ndarray  # inf without
    converted_N: np.ndarray  # bool, within the attribution window
    converted_at_N: np.ndarray  # inf without
    a_N: np.ndarray  # P(click)
    p_N: np.ndarray  # P(conversion | click)
    late_N: np.ndarray  # P(later than the observation window | conversion)
    attribution: float  # window
    plan: Plan
    schema: FeatureSchema = SCHEMA
    click_window: float = CLICK_WINDOW
    observation: float = OBSERVATION_WINDOW
    gap: float | None = None  # between pretraining and stream; None: one attribution window

    @property
    def start(self) -> float:
        """When the stream begins."""
        return self.plan.pretrain + (self.attribution if self.gap is None else self.gap)

    @property
    def test_start(self) -> float:
        return self.start + self.plan.warm_up

    @property
    def end(self) -> float:
        return self.test_start + self.plan.test


class DriftingMarket(Market):
    """A market whose purchases drift as well."""

    def __init__(self, seed: int, plan: Plan) -> None:
        rng = np.random.default_rng([seed, 1])
        self.fashion, self.lift, self.sale, self.week = plan.fashion, plan.lift, plan.sale, plan.week
        self._period_KC = rng.uniform(48.0, 240.0, (WAVES, CATEGORIES))
        self._phase_KC = rng.uniform(0.0, 2 * np.pi, (WAVES, CATEGORIES))
        self._phase_day, self._phase_week = rng.uniform(0.0, 2 * np.pi, 2)  # else every seed would test the same slope
        super().__init__(
            MarketPlan(
                seed=seed,
                candidates=plan.candidates,
                time_scale=3_600.0,
                drift_per_s=plan.taste,
                churn_per_s=plan.churn,
            )
        )

    def truth(self, user_N, slot_NK, hour):
        click_NK, buy_NK = super().truth(user_N, slot_NK, hour)
        now = self.now_s
        wave_C = np.sin(2 * np.pi * now / self._period_KC + self._phase_KC).sum(0) * (2 / WAVES) ** 0.5
        season = 0.15 * np.sin(2 * np.pi * now / 24.0 + self._phase_day)
        season += self.week * np.sin(2 * np.pi * now / 168.0 + self._phase_week)
        taste_ND = self._taste_UD[user_N]
        turned_ND = self._turned(taste_ND) - taste_ND
        worth_NK = np.matmul(self._worth_MD[slot_NK], turned_ND[:, :, None])[:, :, 0] / self._worth_MD.shape[1] ** 0.5
        shift_NK = self.sale + self.fashion * wave_C[self.category_M[slot_NK]] + season + 0.5 * worth_NK
        return lifted(click_NK, self.lift), lifted(buy_NK, shift_NK)


def facts_of(world: World) -> dict[str, float]:
    """What there is to find in the test period, whatever the method.

    ``vanilla_bias``: by how much t = a p / (1 + a p_dp) is too low on average. ``noise``: the standard error of PCOC that
    labels alone cause. ``lag``: conversions seen within the observation window and late ones as they arrive, over the
    conversions that these clicks will have, each a click; a method that learns late positives as they come is off by as
    much. ``lag_low`` and ``lag_high``: the lowest and highest of 48 hours.
    """
    test_N = world.at_N >= world.test_start
    a_N, t_N = world.a_N[test_N], (world.a_N * world.p_N)[test_N]
    late_N = world.converted_N & (world.converted_at_N > world.click_at_N + OBSERVATION_WINDOW)
    low, high = math.ceil(world.test_start), math.ceil(world.end)
    hour_N = np.floor(world.at_N).astype(int)

    def hourly(at_R: np.ndarray, weight_R: np.ndarray) -> np.ndarray:
        return np.bincount(at_R, weight_R, high)[low:high]

    clicks_H = np.maximum(hourly(hour_N, world.click_N), 1.0)
    late_at_R = np.floor(world.converted_at_N[late_N]).astype(int)
    inside_R = late_at_R[late_at_R < high]
    seen_H = (hourly(hour_N, world.converted_N & ~late_N) + hourly(inside_R, np.ones(len(inside_R)))) / clicks_H
    true_H = hourly(hour_N, world.click_N * world.p_N) / clicks_H
    spans = [slice(at, at + 48) for at in range(0, max(len(true_H) - 47, 1), 24)]
    lags = [float(seen_H[span].mean() / true_H[span].mean()) for span in spans]
    return {
        "ctr": float(a_N.mean()),
        "cvr": float(t_N.sum() / a_N.sum()),
        "late_share": float((t_N * world.late_N[test_N]).sum() / t_N.sum()),
        "vanilla_bias": float(1 - (t_N / (1 + t_N * world.late_N[test_N])).sum() / t_N.sum()),
        "noise": float(np.sqrt((t_N * (1 - t_N)).sum()) / t_N.sum()),
        "lag": float(seen_H.mean() / true_H.mean()),
        "lag_low": min(lags),
        "lag_high": max(lags),
    }


def lifted(probability_NK: np.ndarray, shift: float | np.ndarray) -> np.ndarray:
    """``shift`` is added to the log odds."""
    odds_NK = probability_NK / (1 - probability_NK) * np.exp(shift)
    return (odds_NK / (1 + odds_NK)).astype(np.float32)


def make_world(delays: DelayMixture, seed: int, plan: Plan) -> World:
    """Everything follows from the seed."""
    market = DriftingMarket(seed, plan)
    rng = np.random.default_rng([seed, 2])
    attribution = delays.window_h
    end = plan.pretrain + attribution + plan.warm_up + plan.test
    parts = []
    for tick in range(round(end / TICK)):
        now = tick * TICK
        market.advance(now)
        part = impressions(market, rng, delays, plan)
        if plan.pretrain <= now < plan.pretrain + attribution - 2.0:
            keep = np.flatnonzero(part[2])
            part = [part[0].take(keep), *(column[keep] for column in part[1:])]
        parts.append(part)
    examples = concat_examples([part[0] for part in parts])
    columns = [np.concatenate([part[i] for part in parts]) for i in range(1, len(parts[0]))]
    return World(examples, *columns, attribution, plan)


def impressions(market: DriftingMarket, rng: np.random.Generator, delays: DelayMixture, plan: Plan):
    """One tick: [examples, at, click, click_at, converted, converted_at, a, p, late]."""
    requests = round(plan.requests * TICK)
    asked = market.ask(requests)
    with np.errstate(divide="ignore"):
        worth_NK = np.log(asked.click_NK * asked.buy_NK) + rng.gumbel(size=asked.click_NK.shape)
    shown_NP = np.argsort(-worth_NK, axis=1)[:, : plan.shown]

    def pick(table_NK):
        return np.take_along_axis(table_NK, shown_NP, 1).ravel()

    number_B, category_B = pick(asked.item_NK), pick(asked.category_NK)
    a_B, p_B = (pick(part).astype(np.float64) for part in (asked.click_NK, asked.buy_NK))
    tilt_B, user_B = pick(asked.tilt_NK).astype(np.float64), np.repeat(asked.user_N, plan.shown)
    rows = len(user_B)
    at_B = market.now_s + np.repeat(np.arange(requests) / requests * TICK, plan.shown)
    click_B = rng.random(rows) < a_B
    click_at_B = np.where(click_B, at_B + np.minimum(rng.exponential(CLICK_DELAY, rows), CLICK_WINDOW), np.inf)
    converted_B = click_B & (rng.random(rows) < p_B)
    converted_at_B = np.full(rows, np.inf)
    bought = np.flatnonzero(converted_B)
    converted_at_B[bought] = click_at_B[bought] + delays.sample(rng, tilt_B[bought])
    slot_of = {number: slot for slot, number in enumerate(market.number_M.tolist())}
    slot_B = np.array([slot_of[number] for number in number_B.tolist()])
    hour_B = np.repeat(asked.hour_N, plan.shown)
    examples = as_examples(
        user_block(market, user_B, SCHEMA.layout("user")),
        item_block(market, slot_B, SCHEMA.layout("item")),
        FeatureBlock(hour_B[:, None].astype(np.int64), np.zeros((rows, 0), np.float32)),
    )
    clicked = np.flatnonzero(click_B)
    market.clicked(user_B[clicked], category_B[clicked])
    return [examples, at_B, click_B, click_at_B, converted_B, converted_at_B, a_B, p_B, late_share(delays, tilt_B)]


def late_share(delays: DelayMixture, tilt_B: np.ndarray) -> np.ndarray:
    """P(delay > observation window), given what `DelayMixture.sample` adds to the log odds of the fast component."""
    parts_C = [DelayMixture((1.0,), (mean,), delays.window_h).cdf(OBSERVATION_WINDOW) for mean in delays.means_h]
    fast, rest_C = delays.weights[0], np.asarray(delays.weights[1:])
    fast_B = 1 / (1 + (1 - fast) / fast * np.exp(-tilt_B))
    return 1 - fast_B * parts_C[0] - (1 - fast_B) * (rest_C @ np.asarray(parts_C[1:]) / rest_C.sum())


def as_examples(user: FeatureBlock, item: FeatureBlock, context: FeatureBlock) -> Examples:
    """Unclicked first emissions; one read-only zero column serves where nothing is said."""
    rows = user.rows
    zero_B, none_B = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    return Examples(
        user, item, context, np.zeros(rows, np.uint8), zero_B, zero_B, zero_B, zero_B, zero_B, none_B, none_B
    )
