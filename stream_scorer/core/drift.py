"""An alarm on the learner's input: stop learning before a broken feature or label stream does harm. Pure.

Three questions, each over enough rows to be answered, and never over a step alone:

- *shift*: over the last 256, 1,024 and 4,096 rows, is the mean of a dense column, or the share of rows with an id in a
  slot, further from its slow average than ``sigmas`` standard errors, and by more than ``tolerance`` of its size? Rows
  come in clusters (the items of one request share a user), so ``cluster_rows`` rows say as much as one; a column that
  moves together more than that is known by its own history. Values far out are cut, so that a few of them are no shift.
  Columns of items may move by ``picked`` standard deviations too: a new model shows other items, and the best ten of
  fifty by a normal column lie 1.4 above the middle. Of ids only the loss is judged.
- *constant*: has a dense column shown one value for `CONSTANT_ROWS` rows that never did so for `OFTEN_ROWS` before?
- *clicks*, *conversions*: has the share of clicks (of impressions) or of conversions (of clicks) changed, over at least
  ``label_clicks`` clicks? Impressions count by when they were shown, once all their rows are known to be out.

Features are judged on unclicked first emissions only: clicked and matured rows are a selection, and come in bursts.

While the alarm is on nothing is learned and the averages stand still. It ends after ``heal_rows`` rows that would pass
at `HEAL` of what is allowed, or when ``adopt_rows`` in a row were alarming: then that is how the world is now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from esmm.batch import Examples, Float32, Int64, Kind
from stream_scorer.core.columns import Columns, Float64

SCALES: Final = (256, 1_024, 4_096)  # rows
ENTRY_ROWS: Final = 64  # smaller steps are put together
CUT_SIGMAS: Final = 5.0
CONSTANT_ROWS: Final = 2_000
OFTEN_ROWS: Final = 500
ID_SHARE: Final = 0.2  # a slot that is filled less often is not judged
ID_VARIANCE: Final = 0.01  # at least: a slot that was always filled may be empty now and then
LABEL_SCALES: Final = (1, 2, 5)  # times ``label_clicks``
LABEL_ROWS: Final = 256
LABEL_COHORTS: Final = 16  # a cohort of impressions is this share of the time after which its labels are known
CONVERSION_CLUSTER: Final = 3.0  # clicks of one user
HEAL: Final = 0.6  # a window that is half broken and half healed must not end the alarm, nor start it again


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """When to stop and when to go on. Counted in rows."""

    enabled: bool = True
    sigmas: float = 8.0
    label_sigmas: float = 5.0
    tolerance: float = 0.5  # of the average's size: slow change is the learner's business, not the alarm's
    picked: float = 1.5  # standard deviations that an item's column may move as well: a new model shows other items
    cluster_rows: float = 10.0  # this many rows say as much as one
    warmup_rows: int = 5_000
    half_life_rows: float = 20_000.0
    label_clicks: int = 200  # the least to judge a share by; the average needs twice as many
    label_half_life_clicks: float = 4_000.0
    heal_rows: int = 500
    adopt_rows: int = 50_000


class Verdict(NamedTuple):
    """``reason`` is empty when all is well, else what is wrong: constant | shift | clicks | conversions."""

    learn: bool
    reason: str
    detail: str


class DriftAlarm:
    """Ask `check` before every step."""

    def __init__(self, policy: DriftPolicy, click_window_ms: int = 0, observation_window_ms: int = 0) -> None:
        """Nothing known yet. The windows are the join's: they say when the labels of an impression are all out."""
        self._policy = policy
        self._columns = _Columns(policy)
        self._labels = _Labels(policy, click_window_ms, observation_window_ms)
        self.alarming = 0  # rows in a row
        self._ordinary = 0  # rows since
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why nothing is learned, or empty."""
        return self._reason

    def check(self, examples: Examples) -> Verdict:
        """Whether to learn from these rows."""
        if not self._policy.enabled:
            return Verdict(True, "", "")
        first_B = examples.kind_B == Kind.FIRST
        self._columns.add(examples, np.flatnonzero(first_B & (examples.click_B == 0)))
        columns = (examples.impression_ms_B, examples.click_B, examples.conversion_B)
        self._labels.add(*(column_B[first_B] for column_B in columns))
        strict = HEAL if self._reason else 1.0
        reason, detail = self._columns.judge(strict)
        if not reason:
            reason, detail = self._labels.judge(strict)
        if reason:
            return self._alarm(examples.rows, reason, detail)
        self.alarming = 0
        if self._reason:
            self._ordinary += examples.rows
            if self._ordinary < self._policy.heal_rows:
                return Verdict(False, self._reason, "waiting for ordinary rows")
            self._reason = ""
        self._columns.learn()
        self._labels.learn()
        return Verdict(True, "", "")

    def _alarm(self, rows: int, reason: str, detail: str) -> Verdict:
        self.alarming += rows
        self._ordinary = 0
        self._reason = reason
        if self.alarming < self._policy.adopt_rows:
            return Verdict(False, reason, detail)
        self._columns.forget()
        self._labels.forget()
        self.alarming, self._reason = 0, ""
        return Verdict(True, "", f"adopted after {self._policy.adopt_rows} rows: {detail}")

    def state(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {
            "alarming": self.alarming,
            "ordinary": self._ordinary,
            "reason": self._reason,
            "columns": self._columns.state(),
            "labels": self._labels.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.alarming, self._ordinary, self._reason = state["alarming"], state["ordinary"], state["reason"]
        self._columns.restore(state["columns"])
        self._labels.restore(state["labels"])


class _Step(NamedTuple):
    """What `_Columns.learn` needs of the rows just added; C columns, dense ones first."""

    rows: int
    mean_C: Float64  # of values that are cut
    variance_C: Float64
    ended_C: Float64  # how long the run of one value was that ended here


class _Columns:
    """Dense columns, then the shares of id slots, over windows of rows against a slow average."""

    def __init__(self, policy: DriftPolicy) -> None:
        self._policy = policy
        self._dense = 0  # so many of the columns
        self._picked = slice(0)  # of them, the items': which ones are shown is the model's choice
        self.forget()

    def forget(self) -> None:
        """Start afresh."""
        self._rows = 0  # in the average
        self._mean_C = self._variance_C = self._last_C = self._run_C = self._longest_C = np.zeros(0)
        self._effect_LC = np.zeros((len(SCALES), 0))  # how many times the variance of unrelated rows, at each scale
        self._window: deque[tuple[float, Float64, Float64]] = deque()  # rows, sum of values, sum of values cut
        self._step: _Step | None = None

    def add(self, examples: Examples, rows_K: Int64) -> None:
        """Unclicked first emissions: those at ``rows_K``."""
        self._step = None
        if not len(rows_K):
            return
        blocks = (examples.user, examples.item, examples.context)
        users, items, others = (block.dense_ND.shape[1] for block in blocks)
        self._dense, self._picked = users + items + others, slice(users, users + items)
        columns = Columns([block.dense_ND for block in blocks], [block.ids_NS != 0 for block in blocks], rows_K)
        if columns.width != len(self._mean_C):
            self._begin(columns)
        reach_C = CUT_SIGMAS * np.sqrt(self._variance_C) if self._rows >= self._policy.warmup_rows else None
        found, rows = columns.moments(self._mean_C, reach_C), len(rows_K)
        self._step = _Step(rows, found.mean_C, found.variance_C, self._runs(columns, rows))
        self._push(float(rows), found.sum_C, found.cut_C)

    def _begin(self, columns: Columns) -> None:
        self.forget()
        self._last_C = columns.first_C
        found = columns.moments(self._last_C, None)
        self._mean_C, self._variance_C = found.mean_C, found.variance_C
        self._run_C, self._longest_C = np.zeros(columns.width), np.zeros(columns.width)
        self._effect_LC = np.zeros((len(SCALES), columns.width))

    def _runs(self, columns: Columns, rows: int) -> Float64:
        """Count rows of one value on; how long the runs were that ended (0: none)."""
        lead_C, tail_C, self._last_C = columns.runs(self._last_C)
        ended_C = np.where(lead_C == rows, 0.0, self._run_C + lead_C)
        self._run_C = np.where(lead_C == rows, self._run_C + rows, tail_C)
        return ended_C

    def _push(self, rows: float, sum_C: Float64, cut_C: Float64) -> None:
        window = self._window
        if window and window[-1][0] < ENTRY_ROWS:
            before = window.pop()
            rows, sum_C, cut_C = rows + before[0], sum_C + before[1], cut_C + before[2]
        window.append((rows, sum_C, cut_C))
        kept = sum(entry[0] for entry in window)
        while kept - window[0][0] >= SCALES[-1]:
            kept -= window.popleft()[0]

    def _recent(self) -> list[tuple[int, float, Float64, Float64]]:
        """The scales that there are rows for: scale, rows, mean and mean of values cut."""
        if not self._window:
            return []
        rows_W, sum_WC, cut_WC = (np.cumsum(np.array(part)[::-1], axis=0) for part in zip(*self._window, strict=True))
        found = ((scale, int(np.searchsorted(rows_W, rows))) for scale, rows in enumerate(SCALES))
        known = [(scale, at) for scale, at in found if at < len(rows_W)]
        return [(scale, rows_W[at], sum_WC[at] / rows_W[at], cut_WC[at] / rows_W[at]) for scale, at in known]

    def judge(self, strict: float) -> tuple[str, str]:
        """Reason and detail, empty when all is well at ``strict`` times what is allowed."""
        if self._rows < self._policy.warmup_rows:
            return "", ""
        shift = self._shift(strict)
        stuck_C = ((self._run_C >= CONSTANT_ROWS) & (self._longest_C < OFTEN_ROWS))[: self._dense]
        if shift or not stuck_C.any():
            return ("shift", shift) if shift else ("", "")
        return "constant", f"{self._name(at := int(stuck_C.argmax()))}: the same value for {self._run_C[at]:.0f} rows"

    def _shift(self, strict: float) -> str:
        """Which column is too far from its average."""
        policy = self._policy
        judged_C = self._longest_C < OFTEN_ROWS
        judged_C[self._dense :] = self._mean_C[self._dense :] >= ID_SHARE
        variance_C = self._variances()
        size_C = np.maximum(np.abs(self._mean_C), np.sqrt(variance_C))
        room_C = policy.tolerance * size_C
        room_C[self._picked] = np.maximum(room_C, policy.picked * np.sqrt(variance_C))[self._picked]
        of_average = policy.cluster_rows / min(self._rows, policy.half_life_rows)
        for scale, rows, mean_C, cut_C in self._recent():
            effect_C = np.maximum(self._effect_LC[scale], policy.cluster_rows)
            allowed_C = strict * policy.sigmas * np.sqrt(variance_C * (effect_C / rows + of_average)) + 1e-12
            large_C = judged_C & (np.abs(mean_C - self._mean_C) > strict * room_C)
            large_C[self._dense :] &= (cut_C < self._mean_C)[self._dense :]
            excess_C = np.where(large_C, np.abs(cut_C - self._mean_C) / allowed_C, 0.0)
            at = int(excess_C.argmax()) if len(excess_C) else 0
            if len(excess_C) and excess_C[at] > 1:
                now, usual = mean_C[at], self._mean_C[at]
                return f"{self._name(at)}: mean {now:.4g} of {rows:.0f} rows, it was {usual:.4g}"
        return ""

    def _variances(self) -> Float64:
        variance_C = self._variance_C.copy()
        variance_C[self._dense :] = np.maximum(variance_C[self._dense :], ID_VARIANCE)
        return variance_C

    def _name(self, column: int) -> str:
        return f"dense column {column}" if column < self._dense else f"id slot {column - self._dense}"

    def learn(self) -> None:
        """The rows just added are ordinary."""
        if self._step is None:
            return
        rows, mean_C, variance_C, ended_C = self._step
        self._longest_C = np.maximum(self._longest_C, ended_C)
        if self._rows < self._policy.warmup_rows:
            self._longest_C = np.maximum(self._longest_C, self._run_C)
        share = max(rows / (self._rows + rows), 1 - 0.5 ** (rows / self._policy.half_life_rows))
        self._rows += rows
        delta_C = mean_C - self._mean_C
        self._mean_C = self._mean_C + share * delta_C
        self._variance_C = (1 - share) * (self._variance_C + share * delta_C**2) + share * variance_C
        for scale, seen, _, cut_C in self._recent():
            effect_C = self._effect_LC[scale]
            now_C = (cut_C - self._mean_C) ** 2 * seen / (self._variances() + 1e-12)
            # a rare large move must not make large moves look ordinary
            now_C = np.minimum(now_C, 9 * np.maximum(effect_C, self._policy.cluster_rows))
            self._effect_LC[scale] = effect_C + share * (now_C - effect_C)

    def state(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "rows": self._rows, "dense": self._dense, "mean": self._mean_C.tolist(), "last": self._last_C.tolist(),
            "variance": self._variance_C.tolist(), "run": self._run_C.tolist(), "longest": self._longest_C.tolist(),
            "picked": [self._picked.start or 0, self._picked.stop], "effect": self._effect_LC.tolist(),
            "window": [[n, a.tolist(), b.tolist()] for n, a, b in self._window],
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state`."""
        self._rows, self._dense, self._picked, self._step = state["rows"], state["dense"], slice(*state["picked"]), None
        self._mean_C, self._variance_C = np.array(state["mean"]), np.array(state["variance"])
        self._last_C, self._run_C = np.array(state["last"]), np.array(state["run"])
        self._longest_C, self._effect_LC = np.array(state["longest"]), np.array(state["effect"])
        self._window = deque((n, np.array(a), np.array(b)) for n, a, b in state["window"])


class _Labels:
    """Impressions, clicks and conversions by cohort of impressions; a cohort counts when all its rows are out."""

    def __init__(self, policy: DriftPolicy, click_window_ms: int, observation_window_ms: int) -> None:
        self._policy = policy
        self._click_ms, self._observe_ms = click_window_ms, observation_window_ms
        self._width_ms = max(1, (click_window_ms + observation_window_ms) // LABEL_COHORTS)
        self._open: dict[int, Float64] = {}
        self._known_ms = -(1 << 62)  # of impressions before this all rows are out
        self.forget()

    def forget(self) -> None:
        """Start afresh."""
        self._window: deque[Float64] = deque()  # impressions, clicks, conversions
        self._average, self._fresh = np.zeros(3), np.zeros(3)  # the same: older ones fading; of this step

    def add(self, shown_B: Int64, click_B: Float32, conversion_B: Float32) -> None:
        """First emissions, in the order of the join: impression time in ms, labels."""
        self._fresh = np.zeros(3)
        if not len(shown_B):
            return
        clicked_B = click_B == 1
        cohorts_N, of_B = np.unique(shown_B // self._width_ms, return_inverse=True)
        weights = (np.ones(len(shown_B)), clicked_B, clicked_B & (conversion_B == 1))
        counts_N3 = np.stack([np.bincount(of_B, weight, len(cohorts_N)) for weight in weights], axis=1)
        for cohort, count in zip(cohorts_N.tolist(), counts_N3, strict=True):
            if (cohort + 1) * self._width_ms > self._known_ms:  # else it was counted
                self._open[cohort] = self._open.get(cohort, 0.0) + count
        # the join emits by time: unclicked when the click window ends, clicked an observation window after the click
        for rows_B, after_ms in ((~clicked_B, self._observe_ms), (clicked_B, self._click_ms)):
            if rows_B.any():
                self._known_ms = max(self._known_ms, int(shown_B[rows_B].max()) - after_ms)
        for cohort in sorted(self._open):
            if (cohort + 1) * self._width_ms > self._known_ms:
                break
            self._push(self._open.pop(cohort))

    def _push(self, count: Float64) -> None:
        self._fresh = self._fresh + count
        window = self._window
        window.append(count + window.pop() if window and window[-1][0] < LABEL_ROWS else count)
        clicks_W = self._clicks(np.cumsum(np.array(window)[::-1], axis=0))
        for _ in range(int((clicks_W[:-1] >= LABEL_SCALES[-1] * self._policy.label_clicks).sum())):
            window.popleft()

    def _clicks(self, sum_W3: Float64) -> Float64:
        """Clicks seen, or that should have been."""
        usual = self._average[1] / max(self._average[0], 1.0)
        clicks_W: Float64 = np.maximum(sum_W3[:, 1], sum_W3[:, 0] * usual)
        return clicks_W

    def judge(self, strict: float) -> tuple[str, str]:
        """Reason and detail, empty when all is well at ``strict`` times what is allowed."""
        policy, average = self._policy, self._average
        if average[1] < 2 * policy.label_clicks or average[0] < policy.warmup_rows or not self._window:
            return "", ""
        sum_W3 = np.cumsum(np.array(self._window)[::-1], axis=0)
        clicks_W = self._clicks(sum_W3)
        for times in LABEL_SCALES:
            at = int(np.searchsorted(clicks_W, times * policy.label_clicks))
            if at == len(clicks_W):
                break
            for reason, column, cluster in (
                ("clicks", 1, policy.cluster_rows),
                ("conversions", 2, min(CONVERSION_CLUSTER, policy.cluster_rows)),
            ):
                of, some = sum_W3[at, column - 1], sum_W3[at, column]
                if (column == 1 or of >= policy.label_clicks) and self._far(some, of, column, cluster) > strict:
                    usual = average[column] / average[column - 1]
                    return reason, f"{some:.0f} of {of:.0f}, a share of {some / of:.4g}, it was {usual:.4g}"
        return "", ""

    def _far(self, some: float, of: float, column: int, cluster: float) -> float:
        """How far a share is from its average, over what is allowed."""
        usual, share = self._average[column] / self._average[column - 1], some / of
        variance = max(usual * (1 - usual), share * (1 - share))
        noise = np.sqrt(variance * cluster * (1 / of + 1 / self._average[column - 1]))
        allowed = max(self._policy.label_sigmas * noise, self._policy.tolerance * usual)
        return float(abs(share - usual) / (allowed + 1e-12))

    def learn(self) -> None:
        """What was counted just now is ordinary."""
        fading = 0.5 ** (self._fresh[1] / self._policy.label_half_life_clicks)
        self._average = self._average * fading + self._fresh

    def state(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "open": [[cohort, count.tolist()] for cohort, count in self._open.items()],
            "known_ms": self._known_ms,
            "window": [count.tolist() for count in self._window],
            "average": self._average.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state`."""
        self._open = {cohort: np.array(count) for cohort, count in state["open"]}
        self._known_ms, self._average = state["known_ms"], np.array(state["average"])
        self._window, self._fresh = deque(np.array(count) for count in state["window"]), np.zeros(3)
