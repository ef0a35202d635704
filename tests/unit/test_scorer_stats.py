import math

import numpy as np

from stream_scorer.core.scorer_stats import VERSIONS_KEPT, LatencyWindow, Tally


def test_percentiles_of_nothing_are_nan() -> None:
    assert all(math.isnan(value) for value in LatencyWindow().percentiles())


def test_percentiles_are_of_the_last_requests() -> None:
    window = LatencyWindow(100)
    window.add(np.full(100, 9_000))
    for start in range(1, 101, 7):
        window.add(np.arange(start, min(start + 7, 101)))
    assert window.percentiles() == tuple(np.percentile(np.arange(1, 101), (50, 99)))


def test_a_batch_larger_than_the_window() -> None:
    window = LatencyWindow(10)
    window.add(np.arange(1000))
    assert window.percentiles()[0] == 994.5


def test_versions_are_counted_once_and_the_list_is_bounded() -> None:
    tally = Tally()
    for version in (1, 2, 2, 1):
        tally.served(version)
    assert tally.snapshot(0, "").versions == (2, 1)
    assert tally.snapshot(0, "").versions_served == 2
    for version in range(3, 203):
        tally.served(version)
    snapshot = tally.snapshot(5, "storm")
    assert snapshot.versions_served == 202
    assert len(snapshot.versions) == VERSIONS_KEPT
    assert snapshot.versions[-1] == 202
    assert (snapshot.scored, snapshot.hold) == (5, "storm")
