"""An alarm on the learner's input: stop learning before a broken feature or label stream does harm. Pure.

Each step's rows are compared with a slow average of the steps before: the mean of every dense column, the share of rows
with an id in every id slot, and over the last ``label_steps`` steps the shares of clicks (of first emissions) and of
conversions (of clicks). A step is alarming when one of them is further from its average than ``sigmas`` standard
deviations (the larger of that between steps and that of sampling) plus ``tolerance`` of its size, or when a dense
column that always varied within a step has been constant for some steps. What is often the same for all rows of a step
(the hour of the day) is not judged.

While the alarm is on nothing is learned and the average stands still. It ends after ``heal_steps`` ordinary steps, or
when ``adopt_steps`` steps in a row were alarming: then that is how the world is now, and the average starts afresh.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, Kind

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
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
    label_steps: int = 10
    label_sigmas: float = 5.0


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
    always_C: Bool  # judged even when it is constant: a user or an item without an id is never ordinary


class _Against(NamedTuple):
    """What is compared with the average: columns without rows are not."""

    mean_C: Float64
    rows_C: Float64
    between_C: Float64  # variance between values like these
    sigmas: float


class DriftAlarm:
    """Ask `check` before every step."""

    def __init__(self, policy: DriftPolicy) -> None:
        """Nothing known yet."""
        self._policy = policy
        self._steps = 0
        self._mean_C = self._between_C = self._within_C = np.zeros(0)
        self._constant_C = np.zeros(0, np.int64)  # steps in a row in which a column was constant
        self._often_C = np.zeros(0, np.bool_)  # ... and whether that is nothing new
        self._labels: deque[list[list[float]]] = deque(maxlen=policy.label_steps)  # a step: [share, rows] a label
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
        self._labels.append([[share, rows] for share, rows in zip(seen.mean_C[-2:], seen.rows_C[-2:], strict=True)])
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
        judged_C = seen.always_C | ~self._often_C
        for reason, at, mean in (
            self._furthest(_Against(seen.mean_C, seen.rows_C, self._between_C, self._policy.sigmas), judged_C),
            self._furthest(self._recent_labels(seen), judged_C),
        ):
            if reason:
                return reason, f"column {at}: mean {mean:.4g}, it was {self._mean_C[at]:.4g}"
        fallen_C = (self._constant_C >= CONSTANT_STEPS) & ~self._often_C
        if fallen_C.any():
            return "constant", f"column {int(fallen_C.argmax())} is the same in every row"
        return "", ""

    def _furthest(self, now: _Against, judged_C: Bool) -> tuple[str, int, float]:
        """The column furthest from its average, with a reason if that is too far."""
        noise_C = np.sqrt(np.maximum(now.between_C, self._within_C / np.maximum(now.rows_C, 1)))
        allowed_C = now.sigmas * noise_C + self._policy.tolerance * np.abs(self._mean_C) + 1e-6
        excess_C = np.where(judged_C & (now.rows_C > 0), np.abs(now.mean_C - self._mean_C) / allowed_C, 0.0)
        at = int(excess_C.argmax())
        names = {len(excess_C) - 2: "clicks", len(excess_C) - 1: "conversions"}
        return names.get(at, "shift") if excess_C[at] > 1 else "", at, float(now.mean_C[at])

    def _recent_labels(self, seen: _Seen) -> _Against:
        """The label shares over the last steps instead of this one: they are noisy, and so are judged together."""
        recent = np.array(self._labels)  # (steps, 2, 2)
        mean_C, rows_C, between_C = seen.mean_C.copy(), seen.rows_C.copy(), self._between_C.copy()
        rows_C[-2:] = recent[:, :, 1].sum(axis=0)
        mean_C[-2:] = (recent[:, :, 0] * recent[:, :, 1]).sum(axis=0) / np.maximum(rows_C[-2:], 1)
        between_C[-2:] /= len(recent)
        rows_C[:-2] = 0
        return _Against(mean_C, rows_C, between_C, self._policy.label_sigmas)

    def _learn(self, seen: _Seen) -> None:
        self._steps += 1
        self._often_C |= self._constant_C >= CONSTANT_STEPS
        share = max(1 / (self._steps + 1), 1 - 0.5 ** (1 / self._policy.half_life_steps))
        share_C = np.where(seen.rows_C > 0, share, 0.0)
        delta_C = seen.mean_C - self._mean_C
        usual_C = 3 * np.sqrt(np.maximum(self._between_C, self._within_C / np.maximum(seen.rows_C, 1))) + 1e-12
        self._mean_C += share_C * delta_C
        # a rare large step must not make large steps look ordinary
        self._between_C += share_C * (np.minimum(np.abs(delta_C), usual_C) ** 2 * (1 - share) - self._between_C)
        self._within_C += share_C * (seen.variance_C - self._within_C)

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {
            "steps": self._steps, "alarming": self.alarming, "ordinary": self._ordinary, "reason": self._reason,
            "mean": self._mean_C.tolist(), "between": self._between_C.tolist(), "within": self._within_C.tolist(),
            "constant": self._constant_C.tolist(), "often": self._often_C.tolist(), "labels": list(self._labels),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._steps, self.alarming, self._ordinary = state["steps"], state["alarming"], state["ordinary"]
        self._reason = state["reason"]
        self._mean_C, self._between_C = np.array(state["mean"]), np.array(state["between"])
        self._within_C = np.array(state["within"])
        self._labels = deque(state["labels"], maxlen=self._policy.label_steps)
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
    always_C = np.zeros(len(mean_C), np.bool_)
    ids_from = sum(b.dense_ND.shape[1] for b in blocks)
    always_C[ids_from : ids_from + sum(b.ids_NS.shape[1] for b in blocks[:2])] = True
    always_C[-2:] = True
    return _Seen(mean_C, variance_C, rows_C, always_C)


def _share(label_B: NDArray[np.float32], of_B: NDArray[np.bool_]) -> float:
    return float(label_B[of_B].mean()) if of_B.any() else 0.0
