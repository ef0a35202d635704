"""The trainer's numbers as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from stream_scorer.core import metric_names as names
from stream_scorer.core.trainer_stats import TrainerStats
from stream_scorer.ports import Metrics


class Teller:
    """Tells metrics what changed from one snapshot to the next."""

    def __init__(self, metrics: Metrics) -> None:
        """Nothing told yet."""
        self._metrics = metrics
        self._outcomes = _Told()  # of the join
        self._rows = _Told()  # of embeddings

    def start(self, outcomes: Mapping[str, int], embedding_rows: Mapping[str, int]) -> None:
        """These were counted by a process before this one, whose counters are gone."""
        self._outcomes.counts, self._rows.counts = Counter(outcomes), Counter(embedding_rows)

    def tell(self, stats: TrainerStats) -> None:
        """Counters by what was added, gauges as they are."""
        metrics = self._metrics
        for outcome, added in self._outcomes.added(stats.outcomes):
            metrics.inc(names.JOIN_OUTCOME, added, outcome=outcome)
        for change, added in self._rows.added(stats.embedding_rows):
            metrics.inc(names.EMBEDDING_ROWS, added, change=change)
        metrics.set(names.JOIN_OPEN, stats.open_requests, state="request")
        metrics.set(names.JOIN_OPEN, stats.open_impressions, state="impression")
        metrics.set(names.JOIN_OPEN, stats.open_clicks, state="click")
        for task, measured in stats.progressive.items():
            for measure, value in measured.items():
                if value is not None:
                    metrics.set(names.LEARNING, value, task=task, measure=measure)


class _Told:
    """Counts that metrics know of."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def added(self, counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        """What came since the last time; none where a learner went back to a checkpoint, with its counts."""
        told, self.counts = self.counts, Counter(counts)
        return ((name, max(0, count - told[name])) for name, count in counts.items())
