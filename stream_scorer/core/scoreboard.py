"""Two scoreboards over mergeable statistics, per task and per model version.

**fresh**: every first emission, as it comes. CTR labels are final there; CTCVR labels are those at the end of the
observation window, so its PCOC reads 1 / (share of conversions seen by then) for a calibrated model. Kept twice: the
score *as served* and the learner's *progressive* score (predicted before it learned the row).

**matured**: the scores as served against final labels. Rows are gathered by the time of their impression, in *cohorts*,
and a cohort enters the board when all its labels are final: its unclicked rows do not run ahead of its clicked ones.

The statistics come from outside (`StatsKind`, in practice `esmm.metrics.TaskStats`): core owns no metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np

from esmm.batch import Bool, Examples, Float32, Int64, Kind
from stream_scorer.core.watermark import BEGINNING

Task = Literal["ctr", "ctcvr"]
TASKS: tuple[Task, ...] = ("ctr", "ctcvr")
METRICS = ("auc", "pr_auc", "logloss", "ne", "pcoc", "ece")


class Stats(Protocol):
    """Sufficient statistics of (label, prediction) rows; ``a + b`` is those of both. An undefined metric is nan."""

    @property
    def rows(self) -> int:
        """How many rows."""
        ...

    def __add__(self, other: Self) -> Self: ...

    def auc(self) -> float:
        """Area under the ROC curve."""
        ...

    def pr_auc(self) -> float:
        """Average precision."""
        ...

    def logloss(self) -> float:
        """Mean cross-entropy, nats."""
        ...

    def ne(self) -> float:
        """Normalised entropy."""
        ...

    def pcoc(self) -> float:
        """Predicted over observed positives."""
        ...

    def ece(self) -> float:
        """Expected calibration error."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        ...


class StatsKind(Protocol):
    """How to make `Stats`."""

    def empty(self) -> Any:
        """Of no rows."""
        ...

    def of(self, labels: Any, predictions: Any) -> Any:
        """Of (N,) labels of 0 and 1, and probabilities."""
        ...

    def from_dict(self, data: Mapping[str, Any]) -> Any:
        """Of `Stats.to_dict`."""
        ...


@dataclass(frozen=True, slots=True)
class ScoreboardPolicy:
    """How much is looked at. Windows in rows, cohorts in milliseconds of event time."""

    first_rows: int = 2_000  # the early window that "first" metrics are over
    window_rows: int = 20_000  # the recent window
    cohort_ms: int = 3_600_000
    mature_ms: int = 864_000_000  # a cohort's labels are final this long after its last impression
    keep_versions: int = 20


class Track:
    """One task's rows over time: the first window, the last window, and all of them."""

    def __init__(self, kind: StatsKind, policy: ScoreboardPolicy) -> None:
        """No rows yet."""
        self._kind = kind
        self._first_rows = policy.first_rows
        self._window_rows = policy.window_rows
        self._chunk_rows = max(1, policy.window_rows // 20)
        self.first: Stats = kind.empty()
        self.total: Stats = kind.empty()
        self._recent: deque[Stats] = deque()

    def add(self, stats: Stats) -> None:
        """Rows that follow those before."""
        if not stats.rows:
            return
        if self.first.rows < self._first_rows:
            self.first += stats
        self.total += stats
        if self._recent and self._recent[-1].rows < self._chunk_rows:
            self._recent[-1] += stats
        else:
            self._recent.append(stats)
        rows = sum(chunk.rows for chunk in self._recent)
        while rows - self._recent[0].rows >= self._window_rows:
            rows -= self._recent.popleft().rows

    def last(self) -> Stats:
        """The recent window: at least ``window_rows`` rows once there are as many, a twentieth of it more at most."""
        return _sum(self._kind, self._recent)

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "first": self.first.to_dict(),
            "total": self.total.to_dict(),
            "recent": [chunk.to_dict() for chunk in self._recent],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Take over `to_dict`."""
        self.first = self._kind.from_dict(data["first"])
        self.total = self._kind.from_dict(data["total"])
        self._recent = deque(self._kind.from_dict(chunk) for chunk in data["recent"])


class Scoreboard:
    """Feed it every step's examples with the learner's predictions from before the step."""

    def __init__(self, kind: StatsKind, policy: ScoreboardPolicy) -> None:
        """Empty boards."""
        self._kind = kind
        self._policy = policy
        names = [f"fresh.{by}.{task}" for by in ("served", "progressive") for task in TASKS]
        names += [f"matured.served.{task}" for task in TASKS]
        self.tracks: dict[str, Track] = {name: Track(kind, policy) for name in names}
        self.versions: dict[int, dict[str, Stats]] = {}  # version -> "fresh.ctr" .. "matured.ctcvr" -> statistics
        self._cohorts: dict[tuple[int, int, Task], Stats] = {}  # (cohort, version, task) -> final labels so far

    def add(self, examples: Examples, ctr_B: Float32, ctcvr_B: Float32) -> None:
        """One step: ``ctr_B`` and ``ctcvr_B`` are what the learner predicted before it learned these rows."""
        first_B = examples.kind_B == Kind.FIRST
        self._fresh(examples.take(np.flatnonzero(first_B)), ctr_B[first_B], ctcvr_B[first_B])
        final_ctcvr_B = (examples.kind_B == Kind.MATURED) | (first_B & (examples.click_B == 0))
        self._gather(examples, "ctr", first_B)
        self._gather(examples, "ctcvr", final_ctcvr_B)

    def _fresh(self, rows: Examples, ctr_B: Float32, ctcvr_B: Float32) -> None:
        served = {"ctr": rows.served_ctr_B, "ctcvr": rows.served_ctcvr_B}
        progressive = {"ctr": ctr_B, "ctcvr": ctcvr_B}
        labels = {"ctr": rows.click_B, "ctcvr": rows.conversion_B}
        for task in TASKS:
            self.tracks[f"fresh.served.{task}"].add(self._kind.of(labels[task], served[task]))
            self.tracks[f"fresh.progressive.{task}"].add(self._kind.of(labels[task], progressive[task]))
            for version in np.unique(rows.version_B).tolist():
                of_B = rows.version_B == version
                self._version(version, f"fresh.{task}", self._kind.of(labels[task][of_B], served[task][of_B]))

    def _gather(self, examples: Examples, task: Task, rows_B: Bool) -> None:
        """Put final labels into their cohorts."""
        cohort_B: Int64 = examples.impression_ms_B // self._policy.cohort_ms
        label_B = examples.click_B if task == "ctr" else examples.conversion_B
        score_B = examples.served_ctr_B if task == "ctr" else examples.served_ctcvr_B
        pairs = zip(cohort_B[rows_B].tolist(), examples.version_B[rows_B].tolist(), strict=True)
        for cohort, version in sorted(set(pairs)):
            of_B = rows_B & (cohort_B == cohort) & (examples.version_B == version)
            key = (cohort, version, task)
            stats = self._kind.of(label_B[of_B], score_B[of_B])
            self._cohorts[key] = self._cohorts[key] + stats if key in self._cohorts else stats

    def advance(self, watermark_ms: int) -> None:
        """Labels are final up to ``watermark_ms - mature_ms``: cohorts that ended by then enter the matured board."""
        if watermark_ms == BEGINNING:
            return
        before = (watermark_ms - self._policy.mature_ms) // self._policy.cohort_ms
        for key in sorted(key for key in self._cohorts if key[0] < before):
            _, version, task = key
            stats = self._cohorts.pop(key)
            self.tracks[f"matured.served.{task}"].add(stats)
            self._version(version, f"matured.{task}", stats)

    def _version(self, version: int, name: str, stats: Stats) -> None:
        board = self.versions.setdefault(version, {})
        board[name] = board[name] + stats if name in board else stats
        while len(self.versions) > self._policy.keep_versions:
            del self.versions[min(self.versions)]

    def summary(self) -> dict[str, dict[str, Any]]:
        """``{"ctr": {...}, "ctcvr": {...}}``: each metric as served, over the first and the last window.

        ``ctr`` labels are the fresh ones (final at once). ``ctcvr`` labels are matured ones as soon as their first
        window has a metric, else fresh; ``labels`` says which. An undefined metric (no positive yet) is None.
        """
        out: dict[str, dict[str, Any]] = {}
        for task in TASKS:
            matured = self.tracks[f"matured.served.{task}"]
            labels = "matured" if task == "ctcvr" and matured.first.auc() == matured.first.auc() else "fresh"
            track = self.tracks[f"{labels}.served.{task}"]
            last = track.last()
            out[task] = {"labels": labels, "rows": track.total.rows}
            for metric in METRICS:
                out[task][f"{metric}_first"] = _or_none(getattr(track.first, metric)())
                out[task][f"{metric}_last"] = _or_none(getattr(last, metric)())
        return out

    def by_version(self) -> dict[int, dict[str, dict[str, float | None]]]:
        """Version -> board (``fresh.ctr`` .. ``matured.ctcvr``) -> metrics over all its rows, as served."""
        return {v: {name: measures(stats) for name, stats in board.items()} for v, board in self.versions.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {
            "tracks": {name: track.to_dict() for name, track in self.tracks.items()},
            "versions": [[v, {n: s.to_dict() for n, s in board.items()}] for v, board in self.versions.items()],
            "cohorts": [[*key, stats.to_dict()] for key, stats in self._cohorts.items()],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Take over `to_dict`."""
        for name, track in self.tracks.items():
            track.load(data["tracks"][name])
        self.versions = {v: {n: self._kind.from_dict(s) for n, s in board.items()} for v, board in data["versions"]}
        self._cohorts = {(c, v, t): self._kind.from_dict(s) for c, v, t, s in data["cohorts"]}


def measures(stats: Stats) -> dict[str, float | None]:
    """Every metric, and ``rows``."""
    return {"rows": stats.rows, **{metric: _or_none(getattr(stats, metric)()) for metric in METRICS}}


def _sum(kind: StatsKind, parts: Iterable[Stats]) -> Stats:
    total: Stats = kind.empty()
    for part in parts:
        total += part
    return total


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
