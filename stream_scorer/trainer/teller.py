"""The trainer's numbers as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from stream_scorer.core import metric_names as names
from stream_scorer.core.trainer_stats import TrainerStats
from stream_scorer.ports import Metrics


class Teller:
    """Tells metrics what changed from one snapshot to the next."""

    def __init__(self, metrics: Metrics) -> None:
        """Nothing told yet."""
        self._metrics = metrics
        self._told: Counter[str] = Counter()  # join outcomes that metrics know of

    def start(self, outcomes: Mapping[str, int]) -> None:
        """These were counted by a process before this one, whose counters are gone."""
        self._told = Counter(outcomes)

    def tell(self, stats: TrainerStats) -> None:
        """Counters by what was added, gauges as they are."""
        metrics = self._metrics
        for outcome, count in stats.outcomes.items():
            metrics.inc(names.JOIN_OUTCOME, count - self._told[outcome], outcome=outcome)
        self._told = Counter(stats.outcomes)
        metrics.set(names.JOIN_OPEN, stats.open_requests, state="request")
        metrics.set(names.JOIN_OPEN, stats.open_impressions, state="impression")
        metrics.set(names.JOIN_OPEN, stats.open_clicks, state="click")
        for task, measured in stats.progressive.items():
            for measure, value in measured.items():
                if value is not None:
                    metrics.set(names.LEARNING, value, task=task, measure=measure)
