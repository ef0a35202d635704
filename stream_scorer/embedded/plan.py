"""What a simulated run is made of: how it reaches the loop, how much it asks, and time windows that fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from esmm.batch import FeatureBlock, SourceLayout
from stream_scorer.core.records import TopicPartition
from stream_scorer.embedded.delays import HOUR_S
from stream_scorer.embedded.market import MarketPlan
from stream_scorer.embedded.shop import ShopPlan
from stream_scorer.ports import Clock, Sink, Source

WriteFeatures = Callable[[Literal["user", "item"], Sequence[str], FeatureBlock, int], None]


@dataclass(frozen=True)
class Wire:
    """How the simulator reaches the loop. ``scores`` reads the scores topic in a group of its own."""

    scores: Source
    sink: Sink
    write_features: WriteFeatures
    clock: Clock
    user_layout: SourceLayout
    item_layout: SourceLayout
    requests_topic: str = "score-requests"
    feedback_topic: str = "feedback"


class Joined:
    """A `RebalanceListener` that only notes the assignment: nothing is committed, so nothing has to be finished."""

    def __init__(self) -> None:
        """Nothing is assigned yet."""
        self.partitions: set[TopicPartition] = set()

    def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Note them."""
        self.partitions |= set(partitions)

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget them."""
        self.partitions -= set(partitions)

    def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget them."""
        self.partitions -= set(partitions)


@dataclass(frozen=True)
class SimulatorPlan:
    """``rate`` requests a second; a request unanswered for ``lost_after_s`` counts as lost until its scores come."""

    rate: float = 60.0
    lost_after_s: float = 10.0
    run_id: str = "sim"
    join_timeout_s: float = 30.0
    shop: ShopPlan = field(default_factory=ShopPlan)


@dataclass(frozen=True)
class DemoPlan:
    """Windows for the trainer that fit the market's compressed time, so that a minute shows the whole loop.

    ``time_scale`` market seconds pass in one: at 36,000 the 240 h within which conversions come take 24 s, a day 2.4 s.
    Clicks come within seconds of what is shown and are not compressed.
    """

    time_scale: float = 36_000.0
    click_window_s: float = 3.0
    observation_window_s: float = 2.4  # a day: three conversions in four come within it
    attribution_window_s: float = 27.0
    lateness_s: float = 1.5
    served_ttl_s: float = 20.0
    publish_every_s: float = 5.0
    checkpoint_every_s: float = 10.0
    shop: ShopPlan = field(default_factory=ShopPlan)

    def __post_init__(self) -> None:
        """Refuse windows that would throw away what this market sends."""
        shop, conversions_s = self.shop, self.shop.delays.window_h * HOUR_S / self.time_scale
        problems = [
            text
            for wrong, text in (
                (shop.time_scale != self.time_scale, "the shop has another time scale"),
                (self.click_window_s < shop.click_delay_limit_s, "clicks come after the click window"),
                (self.lateness_s < shop.late_limit_s, "messages come later than the lateness allowed"),
                (self.observation_window_s > self.attribution_window_s, "observation outlasts attribution"),
                (
                    self.attribution_window_s < shop.click_delay_limit_s + conversions_s,
                    f"conversions come up to {shop.click_delay_limit_s + conversions_s:.1f} s after an impression",
                ),
            )
            if wrong
        ]
        if problems:
            raise ValueError(f"demo plan: {'; '.join(problems)}")

    def market(self, seed: int) -> MarketPlan:
        """The market that lives at this plan's time scale."""
        return MarketPlan(seed=seed, time_scale=self.time_scale)

    def trainer_settings(self) -> dict[str, float]:
        """The windows by their names in the ``[trainer]`` settings."""
        names = ("click_window_s", "observation_window_s", "attribution_window_s", "lateness_s", "served_ttl_s")
        return {name: getattr(self, name) for name in (*names, "publish_every_s", "checkpoint_every_s")}
