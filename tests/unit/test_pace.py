"""Rows a batch, against a target time."""

import numpy as np

from stream_scorer.core.pace import LEAST_ROWS, Pace


def run(pace: Pace, seconds_a_row: float, batches: int, target_s: float, noise: float = 0.1) -> tuple[float, list[int]]:
    """The share of batches over the target, and their sizes, when every batch is full."""
    rng, late, sizes = np.random.default_rng(0), 0, []
    for _ in range(batches):
        rows = pace.rows
        took = rows * seconds_a_row * (1 + noise * rng.standard_normal())
        pace.took(True, took)
        late += took > target_s
        sizes.append(rows)
    return late / batches, sizes


def test_without_a_target_batches_are_as_large_as_allowed() -> None:
    pace = Pace(10_000, 0.0)
    assert set(run(pace, 1.0, 50, 0.0)[1]) == {10_000}


def test_about_one_batch_in_twenty_passes_a_target_that_binds() -> None:
    pace = Pace(10_000, 0.010)
    run(pace, 2e-6, 500, 0.010)
    share, sizes = run(pace, 2e-6, 5_000, 0.010)
    assert 0.02 < share < 0.08
    assert 3_500 < np.mean(sizes) < 5_000  # 5,000 rows take the target exactly


def test_a_target_out_of_reach_ends_at_the_least_rows_and_an_easy_one_at_the_most() -> None:
    pace = Pace(10_000, 0.001)
    assert run(pace, 1.0, 200, 0.001)[1][-1] == LEAST_ROWS
    assert run(pace, 1e-9, 1_000, 0.001)[1][-1] == 10_000
    assert Pace(10, 0.001).rows == 10
    small = Pace(10, 0.001)
    assert run(small, 1.0, 20, 0.001)[1][-1] == 10


def test_batches_that_are_not_full_change_nothing() -> None:
    pace = Pace(10_000, 0.010)
    pace.took(True, 1.0)
    before = pace.rows
    for seconds in (0.001, 1.0) * 50:
        pace.took(False, seconds)
    assert pace.rows == before == 8_000


def test_only_one_of_two_batches_in_flight_cuts() -> None:
    pace = Pace(10_000, 0.010)
    pace.took(True, 1.0)
    pace.took(True, 1.0)  # launched before the first was known to be late
    assert pace.rows == 8_000
