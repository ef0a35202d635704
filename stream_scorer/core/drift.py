"""An alarm on the learner's input: stop learning before a broken feature or label stream does harm. Pure.

Each step's rows are compared with a slow average of the steps before: the mean of every dense column, the share of rows
with an id in every id slot, and the shares of clicks (of first emissions) and of conversions (of clicks). A step is
alarming when one of them is further from its average than ``sigmas`` standard deviations (the larger of that between
steps and that of sampling) plus ``tolerance`` of its size, or when a column that always varied within a step has been
constant for some steps. A column that is often constant (the hour of the day) is not judged.

While the alarm is on nothing is learned and the average stands still. It ends after ``heal_steps`` ordinary steps, or
when ``adopt_steps`` steps in a row were alarming: then that is how the world is now, and the average starts afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, Kind

Float64 = NDArray[np.float64]
CONSTANT_STEPS = 3


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """When to stop and when to go on. Counted in steps."""

    enabled: bool = True
    sigmas: float = 8.0
    tolerance: float = 0.5  # of the average's size: slow change is the learner's business, not the alarm's
    warmup_steps: int = 30
    half_life_steps: float = 100.0
    min_rows: int = 64  # smaller steps are not judged
    heal_steps: int = 3
    adopt_steps: int = 500


class Verdict(NamedTuple):
    """``reason`` is empty when all is well, else what is wrong: constant | shift | clicks | conversions."""

    learn: bool
    reason: str
    detail: str


class _Seen(NamedTuple):
    """One step: C columns, then the two label shares."""

    mean_C: Float64
    variance_C: Float64  # within the step
    rows_C: Float64


class DriftAlarm:
    """Ask `check` before every step."""

    def __init__(self, policy: DriftPolicy) -> None:
        """Nothing known yet."""
        self._policy = policy
        self._steps = 0
        self._mean_C = self._between_C = self._within_C = np.zeros(0)
        self._constant_C = np.zeros(0, np.int64)  # steps in a row in which a column was constant
        self._often_C = np.zeros(0, np.bool_)  # ... and whether that is nothing new
        self.alarming = 0  # alarming steps in a row, less the ordinary ones since
        self._ordinary = 0
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why nothing is learned, or empty."""
        return self._reason

    def check(self, examples: Examples) -> Verdict:
        """Whether to learn from these rows."""
        if not self._policy.enabled or examples.rows < self._policy.min_rows:
            return Verdict(self._reason == "", self._reason, "")
        seen = _look(examples)
        if len(seen.mean_C) != len(self._mean_C):
            self._start(seen)
        self._constant_C = np.where(seen.variance_C == 0, self._constant_C + 1, 0)
        self._constant_C[-2:] = 0  # the label shares have a test of their own
        reason, detail = self._judge(seen)
        if reason:
            return self._alarm(seen, reason, detail)
        self.alarming = 0
        if self._reason:
            self._ordinary += 1
            if self._ordinary < self._policy.heal_steps:
                return Verdict(False, self._reason, "waiting for ordinary steps")
            self._reason = ""
        self._learn(seen)
        return Verdict(True, "", "")

    def _alarm(self, seen: _Seen, reason: str, detail: str) -> Verdict:
        self.alarming += 1
        self._ordinary = 0
        if self.alarming >= self._policy.adopt_steps:
            self._start(seen)
            self._reason = ""
            return Verdict(True, "", f"adopted after {self._policy.adopt_steps} steps: {detail}")
        self._reason = reason
        return Verdict(False, reason, detail)

    def _start(self, seen: _Seen) -> None:
        self._steps = self.alarming = self._ordinary = 0
        self._mean_C = seen.mean_C.copy()
        self._within_C = seen.variance_C.copy()
        self._between_C = np.zeros_like(seen.mean_C)
        self._constant_C = np.zeros(len(seen.mean_C), np.int64)
        self._often_C = np.zeros(len(seen.mean_C), np.bool_)

    def _judge(self, seen: _Seen) -> tuple[str, str]:
        if self._steps < self._policy.warmup_steps:
            return "", ""
        known_C = (seen.rows_C > 0) & ~self._often_C
        noise_C = np.sqrt(np.maximum(self._between_C, self._within_C / np.maximum(seen.rows_C, 1)))
        allowed_C = self._policy.sigmas * noise_C + self._policy.tolerance * np.abs(self._mean_C) + 1e-6
        excess_C = np.where(known_C, np.abs(seen.mean_C - self._mean_C) / allowed_C, 0.0)
        at = int(excess_C.argmax())
        if excess_C[at] > 1:
            names = {len(excess_C) - 2: "clicks", len(excess_C) - 1: "conversions"}
            detail = f"column {at}: mean {seen.mean_C[at]:.4g}, it was {self._mean_C[at]:.4g}"
            return names.get(at, "shift"), detail
        fallen_C = (self._constant_C >= CONSTANT_STEPS) & ~self._often_C
        if fallen_C.any():
            return "constant", f"column {int(fallen_C.argmax())} is the same in every row"
        return "", ""

    def _learn(self, seen: _Seen) -> None:
        self._steps += 1
        self._often_C |= self._constant_C >= CONSTANT_STEPS
        share = max(1 / (self._steps + 1), 1 - 0.5 ** (1 / self._policy.half_life_steps))
        share_C = np.where(seen.rows_C > 0, share, 0.0)
        delta_C = seen.mean_C - self._mean_C
        self._mean_C += share_C * delta_C
        self._between_C += share_C * (delta_C**2 * (1 - share) - self._between_C)
        self._within_C += share_C * (seen.variance_C - self._within_C)

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {
            "steps": self._steps, "alarming": self.alarming, "ordinary": self._ordinary, "reason": self._reason,
            "mean": self._mean_C.tolist(), "between": self._between_C.tolist(), "within": self._within_C.tolist(),
            "constant": self._constant_C.tolist(), "often": self._often_C.tolist(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._steps, self.alarming, self._ordinary = state["steps"], state["alarming"], state["ordinary"]
        self._reason = state["reason"]
        self._mean_C, self._between_C = np.array(state["mean"]), np.array(state["between"])
        self._within_C = np.array(state["within"])
        self._constant_C, self._often_C = np.array(state["constant"], np.int64), np.array(state["often"], np.bool_)


def _look(examples: Examples) -> _Seen:
    first_B = examples.kind_B == Kind.FIRST
    clicked_B = first_B & (examples.click_B == 1)
    blocks = (examples.user, examples.item, examples.context)
    parts = [b.dense_ND for b in blocks] + [b.ids_NS != 0 for b in blocks]
    columns_BC = np.concatenate([part.astype(np.float64) for part in parts], axis=1)
    shares = np.array([_share(examples.click_B, first_B), _share(examples.conversion_B, clicked_B)])
    mean_C = np.concatenate([columns_BC.mean(axis=0), shares])
    variance_C = np.concatenate([columns_BC.var(axis=0), shares * (1 - shares)])
    variance_C[:-2][(columns_BC == columns_BC[:1]).all(axis=0)] = 0.0  # rounding must not hide a constant
    rows_C = np.full(len(mean_C), examples.rows, np.float64)
    rows_C[-2:] = first_B.sum(), clicked_B.sum()
    return _Seen(mean_C, variance_C, rows_C)


def _share(label_B: NDArray[np.float32], of_B: NDArray[np.bool_]) -> float:
    return float(label_B[of_B].mean()) if of_B.any() else 0.0
