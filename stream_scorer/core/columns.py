"""What the columns of one step are like, for the input alarm: means, variances, and runs of one value. Pure.

Features stay the float32 they are. Sums are taken about a centre near the mean, so that nothing of the variance is lost
in them; a column with values far from it, or none at all, is summed in float64.

Shape suffixes: B rows, C all columns (dense ones first, then whether a slot holds an id), D those of one array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Float32, Int64

Float64 = NDArray[np.float64]
_FAR = 1e15  # in float32 the squares of such distances would be no numbers
_HEAD_ROWS = 16  # a run is looked for here, and in all rows only of columns that show one value so far


class Moments(NamedTuple):
    """Of all columns, float64 (C,). A value is *cut* to what is allowed, for all but ``sum_C``."""

    sum_C: Float64
    cut_C: Float64  # sum
    mean_C: Float64
    variance_C: Float64


class Columns(NamedTuple):
    """The columns of some rows of a step, one or more. Weights of 0 and 1 pick them: a copy would cost more."""

    dense: list[Float32]  # (B, D) each
    filled: list[NDArray[np.bool_]]  # (B, D) each: where a slot holds an id
    rows_K: Int64

    @property
    def width(self) -> int:
        """C."""
        return sum(part.shape[1] for part in (*self.dense, *self.filled))

    @property
    def first_C(self) -> Float64:
        """The first row."""
        return np.concatenate([part[self.rows_K[0]] for part in (*self.dense, *self.filled)]).astype(np.float64)

    def moments(self, mean_C: Float64, reach_C: Float64 | None) -> Moments:
        """Sums about ``mean_C``; dense values further from it than ``reach_C`` are cut."""
        found, start, rows = [], 0, len(self.rows_K)
        weight_B = np.zeros(len(self.filled[0]), np.float32)
        weight_B[self.rows_K] = 1
        for x_BD in self.dense:
            of = slice(start, start := start + x_BD.shape[1])
            found.append(_moments(x_BD, weight_B, self.rows_K, mean_C[of], None if reach_C is None else reach_C[of]))
        for filled_BD in self.filled:
            count_D = (weight_B @ filled_BD.astype(np.float32)).astype(np.float64)
            found.append(Moments(count_D, count_D, count_D / rows, count_D / rows * (1 - count_D / rows)))
        return Moments(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def runs(self, last_C: Float64) -> tuple[Float64, Float64, Float64]:
        """Rows that equal ``last_C`` at the start; rows that equal the last one at the end; that one. All (C,).

        Zero for slots of ids: nobody asks how long those were filled.
        """
        found_3C, start = np.zeros((3, self.width)), 0
        for x_BD in self.dense:
            of = slice(start, start := start + x_BD.shape[1])
            found_3C[2, of] = last_D = x_BD[self.rows_K[-1]]
            found_3C[0, of] = _run(x_BD, self.rows_K, last_C[of])
            found_3C[1, of] = _run(x_BD, self.rows_K[::-1], last_D)
        return found_3C[0], found_3C[1], found_3C[2]


def _moments(x_BD: Float32, weight_B: Float32, rows_K: Int64, mean_D: Float64, reach_D: Float64 | None) -> Moments:
    rows = len(rows_K)
    limit_D = np.full(len(mean_D), _FAR) if reach_D is None else np.minimum(reach_D, _FAR)
    with np.errstate(over="ignore", invalid="ignore"):
        centre_D = mean_D.astype(np.float32)
        away_BD = x_BD - centre_D
        sum_D = (weight_B @ away_BD).astype(np.float64)
        square_BD = np.multiply(away_BD, away_BD, out=away_BD)
        square_D = (weight_B @ square_BD).astype(np.float64)
        far_D = ~(square_BD.max(axis=0) <= limit_D**2)  # in a row that was not picked: no harm
        offset_D = sum_D / rows
        whole_D = rows * centre_D.astype(np.float64) + sum_D
        variance_D = np.maximum(square_D / rows - offset_D**2, 0.0)
        found = Moments(whole_D, whole_D.copy(), centre_D + offset_D, variance_D)
        if far_D.any():
            at = np.flatnonzero(far_D)
            far_KD = x_BD[:, at][rows_K].astype(np.float64)
            cut_KD = far_KD if reach_D is None else np.clip(far_KD, (mean_D - reach_D)[at], (mean_D + reach_D)[at])
            exact = (far_KD.sum(axis=0), cut_KD.sum(axis=0), cut_KD.mean(axis=0), cut_KD.var(axis=0))
            for column_D, value in zip(found, exact, strict=True):
                column_D[at] = value
    return found


def _run(x_BD: NDArray[Any], rows_K: Int64, value_D: NDArray[Any]) -> Int64:
    """How many rows equal ``value_D`` before the first that does not."""
    head_KD = x_BD[rows_K[:_HEAD_ROWS]] == value_D
    all_D = head_KD.all(axis=0)
    run_D: Int64 = np.where(all_D, len(head_KD), head_KD.argmin(axis=0))
    at = np.flatnonzero(all_D)
    if len(at) and len(rows_K) > _HEAD_ROWS:
        same_KD = x_BD[:, at][rows_K] == value_D[at]
        run_D[at] = np.where(same_KD.all(axis=0), len(rows_K), same_KD.argmin(axis=0))
    return run_D
