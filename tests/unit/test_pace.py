"""Rows a batch, against a target time."""

import numpy as np

from stream_scorer.core.pace import LEAST_ROWS, Pace


def run(pace: Pace, seconds_a_row: float, batches: int, target_s: float, noise: float = 0.1) -> tuple[float, list[int]]:
    """The share of batches over the target, and their sizes, when every batch is full."""
    rng, late, sizes = np.random.default_rng(0), 0, []
    for _ in range(batches):
        rows = pace.rows
        took = rows * seconds_a_row * (1 + noise * rng.standard_normal())
        pace.took(rows, took)
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


def test_small_batches_do_not_raise_the_limit() -> None:
    pace = Pace(10_000, 0.010)
    pace.took(10_000, 1.0)
    pace.took(10_000, 0.001)
    before = pace.rows
    for _ in range(100):
        pace.took(50, 0.001)
    assert pace.rows == before < 10_000
    pace.took(50, 1.0)  # something else is slow: no larger than this one, then
    assert pace.rows == LEAST_ROWS
