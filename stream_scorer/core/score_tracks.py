"""What scoreboards are made of: mergeable statistics from outside, windows of them, and cohorts of impressions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from esmm.batch import Float32, Int64

METRICS = ("auc", "pr_auc", "logloss", "ne", "pcoc", "ece")
OLDER = -1  # the version number of all versions that are no longer told apart


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

    def by_group(self, labels: Any, predictions: Any, group_N: Any, before: Any) -> Any:
        """``before[g]`` plus those of the rows of each group g, with None for no rows; ``before`` is used up."""
        ...

    def from_dict(self, data: Mapping[str, Any]) -> Any:
        """Of `Stats.to_dict`."""
        ...


class Track:
    """Statistics over time: the first window, the last window, and all of it. Windows are counted in rows."""

    def __init__(self, kind: StatsKind, first_rows: int, window_rows: int) -> None:
        """No rows yet."""
        self._kind = kind
        self._first_rows = first_rows
        self._window_rows = window_rows
        self._chunk_rows = max(1, window_rows // 20)
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
        """The recent window: at least ``window_rows`` rows once there are as many, and at most one addition more."""
        return add_up(self._kind, self._recent)

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


class Closed(NamedTuple):
    """What one model version scored in one cohort."""

    version: int
    stats: Stats


class Groups(NamedTuple):
    """Rows told apart: ``group_B`` is each row's place in ``keys``, which are (cohort, version), ascending."""

    keys: list[tuple[int, int]]
    group_B: Int64


def numbered(value_B: Int64) -> tuple[Int64, Int64]:
    """The distinct values of one or more rows, ascending, and each row's place among them."""
    lowest = int(value_B.min())
    if int(value_B.max()) - lowest > 4 * len(value_B):
        return np.unique(value_B, return_inverse=True)
    count_K = np.bincount(value_B - lowest)  # no sort: a step's rows are of few values near one another
    place_K = np.cumsum(count_K > 0) - 1
    return np.flatnonzero(count_K) + lowest, place_K[value_B - lowest]


class Cohorts:
    """Rows gathered by the time of their impression, until every label of that time is known.

    Rows become known in another order than they were shown (a click waits for its conversion, an impression without one
    does not): a window over them as they come has too few clicks at its start and too many at its end.
    """

    def __init__(self, kind: StatsKind, width_ms: int, settle_ms: int) -> None:
        """A cohort is ``width_ms`` wide, and complete ``settle_ms`` after its end."""
        self._kind, self._width_ms, self._settle_ms = kind, max(1, width_ms), settle_ms
        self._open: dict[tuple[int, int], Stats] = {}  # (cohort, version)

    def grouped(self, impression_ms_B: Int64, version_B: Int64) -> Groups:
        """B rows of any times and versions, told apart as `add` wants them."""
        cohort_N, of_cohort_B = numbered(impression_ms_B // self._width_ms)
        version_N, of_version_B = numbered(version_B)
        pair_N, group_B = numbered(of_cohort_B * len(version_N) + of_version_B)
        cohorts, versions = cohort_N[pair_N // len(version_N)], version_N[pair_N % len(version_N)]
        return Groups(list(zip(cohorts.tolist(), versions.tolist(), strict=True)), group_B)

    def add(self, groups: Groups, label_B: Float32, score_B: Float32) -> None:
        """Rows that were grouped by these cohorts, or by others of their width."""
        before = [self._open.get(key) for key in groups.keys]
        after = self._kind.by_group(label_B, score_B, groups.group_B, before)
        self._open.update(zip(groups.keys, after, strict=True))

    def _put(self, key: tuple[int, int], stats: Stats) -> None:
        self._open[key] = self._open[key] + stats if key in self._open else stats

    def close(self, watermark_ms: int) -> Iterator[Closed]:
        """Give out, oldest first, the cohorts that are complete at this event time."""
        before = (watermark_ms - self._settle_ms) // self._width_ms
        for key in sorted(key for key in self._open if key[0] < before):
            yield Closed(key[1], self._open.pop(key))

    def lump(self, oldest_kept: int) -> None:
        """Tell versions below ``oldest_kept`` apart no longer."""
        for key in sorted(key for key in self._open if OLDER < key[1] < oldest_kept):
            self._put((key[0], OLDER), self._open.pop(key))

    def to_list(self) -> list[list[Any]]:
        """JSON data."""
        return [[*key, stats.to_dict()] for key, stats in self._open.items()]

    def load(self, data: Iterable[list[Any]]) -> None:
        """Take over `to_list`."""
        self._open = {(cohort, version): self._kind.from_dict(stats) for cohort, version, stats in data}


def measures(stats: Stats) -> dict[str, float | None]:
    """Every metric, and ``rows``; an undefined metric is None."""
    return {"rows": stats.rows, **{metric: measure(stats, metric) for metric in METRICS}}


def measure(stats: Stats, metric: str) -> float | None:
    """One metric by name, None when undefined."""
    value = getattr(stats, metric)()
    return float(value) if np.isfinite(value) else None


def add_up(kind: StatsKind, parts: Iterable[Stats]) -> Stats:
    """All of them together."""
    total: Stats = kind.empty()
    for part in parts:
        total += part
    return total
