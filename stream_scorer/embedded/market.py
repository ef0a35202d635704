"""A market with known truth: users, items, what they look like, and how likely they click and buy. All of it seeded.

    logit a(x) = bias + activity + appeal + <R(t) z_u, q_i> - (price - wealth)^2 / 6 + hour and category - shelf age
    logit p(x) = bias + intent + quality - price + <z_u, r_i>

``a`` is P(click | shown), **averaged over the display positions**: a position multiplies it by its examination share,
and the shares average to one (`stream_scorer.embedded.shop`). ``p`` is P(conversion | click); their product is
P(click and conversion | shown). R(t) turns tastes slowly, so what was learned wears out. Two of the eight dimensions of
z, q and r show in no feature (only an id embedding can learn them), and what does show is noisy.

Shapes: U users, M item slots (an item that retires gives its slot to a new one), N requests, K candidates, D latent
dimensions, S segments, C categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

LATENT = 8
HIDDEN = 2  # of the latent dimensions
SEGMENTS = 12
CATEGORIES = 20
BRANDS = 40
HOURS = 24
HISTORY = 8
_CLICK_BIAS = -3.45
_BUY_BIAS = -2.6


@dataclass(frozen=True)
class MarketPlan:
    """How large the market is and how fast it changes. Rates are per wall-clock second."""

    seed: int = 7
    users: int = 2_000
    items: int = 600
    candidates: int = 50
    time_scale: float = 36_000.0  # market seconds a second: 240 h of delays in 24 s
    drift_per_s: float = 0.004  # radians that tastes turn
    churn_per_s: float = 0.3  # items that retire, each replaced by a new one with a new id
    refresh_per_s: float = 0.02  # share of users and of items whose features are observed and written anew

    def __post_init__(self) -> None:
        """Refuse a market in which nothing could be asked."""
        if not 1 <= self.candidates <= self.items or self.users < 1 or self.time_scale <= 0:
            raise ValueError(
                f"a market needs users, candidates <= items and a positive time scale, got {self.users} users, "
                f"{self.items} items, {self.candidates} candidates, time scale {self.time_scale}"
            )


class Asked(NamedTuple):
    """N requests with their truth at the moment of asking."""

    user_N: Int64
    item_NK: Int64  # item numbers: an item's id is ``i<number>``, and numbers are never used twice
    category_NK: Int64
    hour_N: Int64
    click_NK: Float32  # a(x)
    buy_NK: Float32  # p(x)
    tilt_NK: Float32  # added to the log odds of a fast conversion


class Changes(NamedTuple):
    """Whose features are to be written: user numbers and item slots."""

    users: Int64
    slots: Int64


class Market:
    """The state of the world: `ask` draws requests, `advance` lets time pass, `clicked` moves the users' histories."""

    def __init__(self, plan: MarketPlan) -> None:
        """Everything is drawn from ``plan.seed``."""
        self.plan = plan
        self.rng = rng = np.random.default_rng(plan.seed)
        self._prototype_SD = _normal(rng, SEGMENTS, LATENT)
        self._center_CD = _normal(rng, CATEGORIES, LATENT)
        self._prototype_SD[:, :HIDDEN] = self._center_CD[:, :HIDDEN] = 0.0  # else segment and category would tell
        self._brand_B = _normal(rng, BRANDS) * 0.5
        self._hour_HC = self._hour_effects(rng)
        self._popularity_C = _normal(rng, CATEGORIES) * 0.5
        self._users(rng, plan.users)
        shape = (plan.items,)
        self.number_M = np.zeros(shape, np.int64)
        self.category_M, self.brand_M = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        self.price_M, self.quality_M, self.born_s_M = (np.zeros(shape, np.float32) for _ in range(3))
        self.quality_seen_M = np.zeros(shape, np.float32)
        self._taste_MD, self._worth_MD = (np.zeros((plan.items, LATENT), np.float32) for _ in range(2))
        self._appeal_M, self._exposure_M = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._next_number = 1
        self._now_s = 0.0
        self._churn_due = self._refresh_due = 0.0
        self._stock(np.arange(plan.items))
        self.born_s_M -= rng.exponential(120.0, plan.items).astype(np.float32)  # the first ones were there before

    @staticmethod
    def _hour_effects(rng: np.random.Generator) -> Float32:
        """Evenings are busy, and each category has an hour of its own."""
        hour_H1 = np.arange(HOURS)[:, None]
        peak_1C = rng.integers(0, HOURS, CATEGORIES)[None, :]
        daily_H1 = 0.25 * np.sin((hour_H1 - 14) / HOURS * 2 * np.pi)
        return np.asarray(daily_H1 + 0.2 * np.cos((hour_H1 - peak_1C) / HOURS * 2 * np.pi), np.float32)

    def _users(self, rng: np.random.Generator, count: int) -> None:
        self.segment_U = rng.integers(0, SEGMENTS, count)
        self._taste_UD = 0.8 * self._prototype_SD[self.segment_U] + _own_taste(rng, count)
        self.activity_U, self.wealth_U, self.intent_U = (_normal(rng, count) for _ in range(3))
        self.profile_seen_U4 = np.zeros((count, 4), np.float32)
        self._observe_users(np.arange(count))
        # A history of what they might have clicked: categories near their taste, most recent first, 0 where empty.
        liking_UC = self._taste_UD @ self._center_CD.T / LATENT**0.5
        gumbel_UHC = rng.gumbel(size=(count, HISTORY, CATEGORIES)).astype(np.float32)
        self.history_UH = 1 + np.argmax(2.0 * liking_UC[:, None] + gumbel_UHC, axis=2)
        filled_U = rng.integers(0, HISTORY + 1, count)
        self.history_UH[np.arange(HISTORY)[None, :] >= filled_U[:, None]] = 0

    def _stock(self, slots: Int64) -> None:
        """Fill these slots with new items."""
        rng, count = self.rng, len(slots)
        self.number_M[slots] = np.arange(self._next_number, self._next_number + count)
        self._next_number += count
        self.category_M[slots] = category = rng.integers(0, CATEGORIES, count)
        self.brand_M[slots] = rng.integers(0, BRANDS, count)
        self.price_M[slots], self.quality_M[slots] = _normal(rng, count), _normal(rng, count)
        self._taste_MD[slots] = 0.8 * self._center_CD[category] + _own_taste(rng, count)
        self._worth_MD[slots] = 0.6 * self._taste_MD[slots] + 0.8 * _normal(rng, count, LATENT)
        self._appeal_M[slots] = (
            0.7 * self.quality_M[slots] + self._brand_B[self.brand_M[slots]] + 0.25 * _normal(rng, count)
        )
        self._exposure_M[slots] = 0.5 * _normal(rng, count)  # how often retrieval brings it up, whatever it is worth
        self.born_s_M[slots] = self._now_s
        self._observe_items(slots)

    def _observe_users(self, users: Int64) -> None:
        true_N4 = np.stack(
            [self.activity_U[users], self.wealth_U[users], self.intent_U[users], self._taste_UD[users, HIDDEN]], axis=1
        )
        self.profile_seen_U4[users] = true_N4 + 0.25 * _normal(self.rng, len(users), 4)

    def _observe_items(self, slots: Int64) -> None:
        self.quality_seen_M[slots] = self.quality_M[slots] + 0.3 * _normal(self.rng, len(slots))

    def hour(self, at_s: float) -> int:
        """The market's hour of the day, 0 to 23."""
        return int(at_s * self.plan.time_scale / 3_600.0) % HOURS

    def ask(self, count: int) -> Asked:
        """``count`` requests now: a random user and the candidates that retrieval brings up for each."""
        rng, kept = self.rng, self.plan.candidates
        user_N = rng.integers(0, self.plan.users, count)
        lure_NM = self._exposure_M + rng.gumbel(size=(count, self.plan.items)).astype(np.float32)
        slot_NK = np.argpartition(-lure_NM, kept - 1, axis=1)[:, :kept]  # Gumbel top-k: a draw without replacement
        hour = self.hour(self._now_s)
        click_NK, buy_NK = self.truth(user_N, slot_NK, hour)
        return Asked(
            user_N,
            self.number_M[slot_NK],
            self.category_M[slot_NK],
            np.full(count, hour, np.int64),
            click_NK,
            buy_NK,
            -0.7 * self.price_M[slot_NK] + 0.4 * self.intent_U[user_N][:, None],  # the dear is slept over
        )

    def truth(self, user_N: Int64, slot_NK: Int64, hour: int) -> tuple[Float32, Float32]:
        """a(x) and p(x), each (N, K), for these users and item slots at this hour, now."""
        taste_ND = self._turned(self._taste_UD[user_N])
        category_NK = self.category_M[slot_NK]
        price_NK, wealth_N1 = self.price_M[slot_NK], self.wealth_U[user_N][:, None]
        liking_NK = np.matmul(self._taste_MD[slot_NK], taste_ND[:, :, None])[:, :, 0] / LATENT**0.5
        age_NK = np.minimum((self._now_s - self.born_s_M[slot_NK]) / 300.0, 1.0).astype(np.float32)
        click_NK = (
            _CLICK_BIAS
            + 0.6 * self.activity_U[user_N][:, None]
            + self._appeal_M[slot_NK]
            + self._popularity_C[category_NK]
            + 0.6 * liking_NK
            - (price_NK - wealth_N1) ** 2 / 6.0
            + self._hour_HC[hour][category_NK]
            - 0.3 * age_NK
        )
        worth_NK = np.matmul(self._worth_MD[slot_NK], self._taste_UD[user_N][:, :, None])[:, :, 0] / LATENT**0.5
        buy_NK = (
            _BUY_BIAS
            + 0.5 * self.intent_U[user_N][:, None]
            + 0.45 * self.quality_M[slot_NK]
            - 0.35 * price_NK
            + 0.5 * worth_NK
        )
        return _sigmoid(click_NK), _sigmoid(buy_NK)

    def _turned(self, taste_ND: Float32) -> Float32:
        """R(t) z: dimensions turn in pairs, all by the same angle."""
        angle = self.plan.drift_per_s * self._now_s
        even, odd = taste_ND[:, 0::2], taste_ND[:, 1::2]
        out_ND = np.empty_like(taste_ND)
        out_ND[:, 0::2] = np.cos(angle) * even - np.sin(angle) * odd
        out_ND[:, 1::2] = np.sin(angle) * even + np.cos(angle) * odd
        return out_ND

    def advance(self, at_s: float) -> Changes:
        """Let time pass to ``at_s`` seconds since the start: tastes turn, items come and go, features are seen anew."""
        passed = max(0.0, at_s - self._now_s)
        self._now_s = max(self._now_s, at_s)
        self._churn_due += passed * self.plan.churn_per_s
        self._refresh_due += passed * self.plan.refresh_per_s
        users = slots = np.zeros(0, np.int64)
        if self._churn_due >= 1.0:
            gone = min(int(self._churn_due), self.plan.items)
            self._churn_due -= gone
            slots = self.rng.choice(self.plan.items, gone, replace=False)
            self._stock(slots)
        share = min(self._refresh_due, 1.0)
        if share * self.plan.items >= 1.0:
            self._refresh_due = 0.0
            users = self.rng.integers(0, self.plan.users, int(share * self.plan.users))
            seen = self.rng.integers(0, self.plan.items, int(share * self.plan.items))
            self._observe_users(users)
            self._observe_items(seen)
            slots = np.concatenate([slots, seen])
        return Changes(np.unique(users), np.unique(slots))

    def clicked(self, users: Int64, categories: Int64) -> None:
        """Put these clicks, one a row, at the head of their users' histories."""
        for user, category in zip(users.tolist(), categories.tolist(), strict=True):  # a user may be here twice
            self.history_UH[user, 1:] = self.history_UH[user, :-1]
            self.history_UH[user, 0] = 1 + category

    @property
    def now_s(self) -> float:
        """Seconds since the market's start."""
        return self._now_s


def _normal(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.standard_normal(shape).astype(np.float32)


def _own_taste(rng: np.random.Generator, count: int) -> Float32:
    """What sets one apart from its segment or category; all there is in the hidden dimensions."""
    spread_D = np.full(LATENT, 0.6, np.float32)
    spread_D[:HIDDEN] = 1.0
    return spread_D * _normal(rng, count, LATENT)


def _sigmoid(logit: Float32) -> Float32:
    return np.asarray(1.0 / (1.0 + np.exp(-logit)), np.float32)
