"""What a step's columns are like, against float64 over copies of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from stream_scorer.core.columns import Columns


def run_of(rows_KC: np.ndarray, value_C: np.ndarray) -> list[int]:
    out = []
    for column, value in zip(rows_KC.T, value_C, strict=True):
        differ = np.flatnonzero(column != value)
        out.append(int(differ[0]) if len(differ) else len(column))
    return out


def step(seed: int, rows: int, picked: int) -> tuple[Columns, np.ndarray]:
    rng = np.random.default_rng(seed)
    user = rng.normal(1e5, 2.0, (rows, 3)).astype(np.float32)
    item = rng.choice([0.0, 1.0], (rows, 4), p=[0.95, 0.05]).astype(np.float32)
    item[:, 1] = 13.5  # never anything else
    item[rows // 2 :, 2] = 7.0
    nothing = np.zeros((rows, 0), np.float32)
    ids = rng.integers(0, 2, (rows, 2)) == 1
    rows_K = np.sort(rng.choice(rows, picked, replace=False))
    return Columns([user, item, nothing], [ids[:, :0], ids, ids[:, :0]], rows_K), np.hstack([user, item, ids])[rows_K]


@pytest.mark.parametrize(("rows", "picked"), [(1, 1), (30, 12), (400, 400), (3_000, 2_500)])
@pytest.mark.parametrize("reach", [None, 0.5, 3.0])
def test_moments_and_runs_are_those_of_float64(rows, picked, reach) -> None:
    columns, x_KC = step(rows, rows, picked)
    x_KC = x_KC.astype(np.float64)
    mean_C = x_KC.mean(axis=0) + 0.25
    reach_C = None if reach is None else np.full(len(mean_C), reach)
    found = columns.moments(mean_C, reach_C)
    cut_KC = x_KC.copy()
    if reach is not None:
        cut_KC[:, :7] = np.clip(x_KC, mean_C - reach_C, mean_C + reach_C)[:, :7]
    np.testing.assert_allclose(found.sum_C, x_KC.sum(axis=0), rtol=1e-6, atol=1e-6 * picked)
    np.testing.assert_allclose(found.cut_C, cut_KC.sum(axis=0), rtol=1e-6, atol=1e-6 * picked)
    np.testing.assert_allclose(found.mean_C, cut_KC.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance_C, cut_KC.var(axis=0), rtol=1e-3, atol=1e-6)
    for before_C in (x_KC[0], x_KC[-1]):
        lead_C, tail_C, last_C = columns.runs(before_C)
        assert lead_C[:7].tolist() == run_of(x_KC, before_C)[:7]
        assert tail_C[:7].tolist() == run_of(x_KC[::-1], x_KC[-1])[:7]
        np.testing.assert_array_equal(last_C[:7], x_KC[-1, :7])
    np.testing.assert_array_equal(columns.first_C, x_KC[0])
    assert columns.width == 9


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("there", [True, False])
def test_one_value_that_is_out_of_bounds_tells_of_its_column_only_and_only_where_it_was_picked(value, there) -> None:
    columns, x_KC = step(5, 50, 20)
    row = columns.rows_K[3] if there else next(iter(set(range(50)) - set(columns.rows_K.tolist())))
    columns.dense[0][row, 1] = value
    mean_C = x_KC.mean(axis=0)
    found, usual = columns.moments(mean_C, None), step(5, 50, 20)[0].moments(mean_C, None)
    others = [at for at in range(9) if at != 1 or not there]
    for column_C, usual_C in zip(found, usual, strict=True):
        np.testing.assert_allclose(column_C[others], usual_C[others], rtol=1e-6, atol=1e-6)
    assert there != (found.sum_C[1] == pytest.approx(usual.sum_C[1], rel=1e-6))
