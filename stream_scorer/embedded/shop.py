"""The ranking service: shows the best candidates by CTCVR, and what the users then do, with known probabilities.

A request's K candidates are shown at positions 1 to P, best first; a share of the requests is shuffled instead, so that
the model also learns about what it does not believe in. P(click at position j) = a(x) * examination[j], and the
examination shares average to one over the positions. Feedback is as untidy as in life: a few events arrive twice, a few
late and therefore out of order, a few never. Times are wall-clock milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_scorer.embedded.delays import TAOBAO, DelayMixture, to_ms
from stream_scorer.embedded.market import Float32, Int64

KINDS = ("impression", "click", "conversion")
IMPRESSION, CLICK, CONVERSION = 0, 1, 2


@dataclass(frozen=True)
class ShopPlan:
    """How candidates are shown and how feedback travels. Shares are of events (``shuffled``: of requests)."""

    positions: int = 10
    shuffled: float = 0.1
    examination_first: float = 1.2  # falls linearly to 2 - this at the last position
    click_delay_s: float = 0.4  # mean of an exponential truncated at the next
    click_delay_limit_s: float = 2.5
    delays: DelayMixture = TAOBAO
    time_scale: float = 36_000.0
    twice: float = 0.01
    late: float = 0.02
    late_limit_s: float = 1.0
    never: float = 0.002

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1] and an examination that does not stay positive."""
        shares = (self.shuffled, self.twice, self.late, self.never)
        if min(shares) < 0 or max(shares) > 1 or not 1.0 <= self.examination_first < 2.0 or self.positions < 1:
            raise ValueError(f"shares are 0 to 1 and examination_first is 1 up to 2, got {self}")

    @property
    def examination_P(self) -> Float32:
        """What a position multiplies P(click) by; averages to one."""
        return np.linspace(self.examination_first, 2.0 - self.examination_first, self.positions, dtype=np.float32)


class Truth(NamedTuple):
    """What N requests' K candidates are worth; see `stream_scorer.embedded.market.Asked`."""

    click_NK: Float32
    buy_NK: Float32
    tilt_NK: Float32


class Events(NamedTuple):
    """E feedback events, in no order: ``at_ms`` is the event's time, ``arrive_ms`` when its message is sent."""

    row_E: Int64  # index of the request
    candidate_E: Int64  # index of the candidate within its request
    kind_E: Int64  # index into KINDS
    at_ms_E: Int64
    arrive_ms_E: Int64
    repeat_E: NDArray[np.bool_]  # the second message of an event
    never: int  # events that happened and are not among the E
    late: int  # how many of the E arrive after their time


def show(plan: ShopPlan, rng: np.random.Generator, ctcvr_NK: Float32) -> Int64:
    """The candidates shown, (N, P), by position."""
    shuffled_N1 = rng.random((len(ctcvr_NK), 1)) < plan.shuffled
    worth_NK = np.where(shuffled_N1, rng.random(ctcvr_NK.shape), ctcvr_NK)
    return np.argsort(-worth_NK, axis=1, kind="stable")[:, : plan.positions]


def react(plan: ShopPlan, rng: np.random.Generator, shown_NP: Int64, now_ms: int, truth: Truth) -> Events:
    """Draw clicks and conversions of what is shown now, with their delays, and how each event's message travels."""
    examination_P = plan.examination_P[: shown_NP.shape[1]]
    click_NP = np.take_along_axis(truth.click_NK, shown_NP, 1) * examination_P
    row_C, position_C = np.nonzero(rng.random(shown_NP.shape) < click_NP)
    candidate_C = shown_NP[row_C, position_C]
    click_ms_C = now_ms + _click_delays_ms(plan, rng, len(row_C))
    bought_C = rng.random(len(row_C)) < truth.buy_NK[row_C, candidate_C]
    row_V, candidate_V = row_C[bought_C], candidate_C[bought_C]
    delay_V = to_ms(plan.delays.sample(rng, truth.tilt_NK[row_V, candidate_V].astype(np.float64)), plan.time_scale)
    row_I = np.repeat(np.arange(len(shown_NP)), shown_NP.shape[1])
    happened = Events(
        np.concatenate([row_I, row_C, row_V]),
        np.concatenate([shown_NP.ravel(), candidate_C, candidate_V]),
        np.repeat([IMPRESSION, CLICK, CONVERSION], [len(row_I), len(row_C), len(row_V)]),
        np.concatenate([np.full(len(row_I), now_ms), click_ms_C, click_ms_C[bought_C] + delay_V]),
        np.zeros(0, np.int64),
        np.zeros(0, np.bool_),
        never=0,
        late=0,
    )
    return _travel(plan, rng, happened)


def _click_delays_ms(plan: ShopPlan, rng: np.random.Generator, count: int) -> Int64:
    once = DelayMixture((1.0,), (plan.click_delay_s,), plan.click_delay_limit_s)  # seconds here, hours there
    return np.ceil(once.sample(rng, np.zeros(count)) * 1_000.0).astype(np.int64)


def _travel(plan: ShopPlan, rng: np.random.Generator, happened: Events) -> Events:
    arrives_E = rng.random(len(happened.row_E)) >= plan.never
    twice_E = arrives_E & (rng.random(len(arrives_E)) < plan.twice)
    index_E = np.concatenate([np.nonzero(arrives_E)[0], np.nonzero(twice_E)[0]])
    repeat_E = np.arange(len(index_E)) >= int(arrives_E.sum())
    late_E = repeat_E | (rng.random(len(index_E)) < plan.late)
    wait_E = np.where(late_E, np.ceil(rng.random(len(index_E)) * plan.late_limit_s * 1_000.0), 0.0).astype(np.int64)
    row_E, candidate_E, kind_E, at_ms_E = (part[index_E] for part in happened[:4])
    never, late = int((~arrives_E).sum()), int(late_E.sum())
    return Events(row_E, candidate_E, kind_E, at_ms_E, at_ms_E + wait_E, repeat_E, never, late)
