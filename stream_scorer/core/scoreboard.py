"""Two scoreboards over mergeable statistics, per task and per model version, and the learner's own score beside them.

**fresh**: the scores as served against the labels of first emissions. CTR labels are final there. CTCVR labels are
those at the end of the observation window: a calibrated model's PCOC reads 1 / (share of conversions seen by then).

**matured**: the scores as served against final CTCVR labels.

Both take rows by *cohort* of impressions, when all of the cohort's labels are known (see `Cohorts`). **progressive**
takes rows as they are learned: what the learner predicted before it learned them. That is the earliest sign of trouble,
and biased while traffic or delays change.

The statistics come from outside (`StatsKind`, in practice `esmm.metrics.TaskStats`): core owns no metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from esmm.batch import Bool, Examples, Float32, Kind
from stream_scorer.core.score_tracks import METRICS, OLDER, Cohorts, Stats, StatsKind, Track, measure, measures
from stream_scorer.core.watermark import BEGINNING

TASKS: Final = ("ctr", "ctcvr")


class _Board(NamedTuple):
    """One task of one scoreboard."""

    cohorts: Cohorts
    track: Track


@dataclass(frozen=True, slots=True)
class ScoreboardPolicy:
    """How much is looked at. Windows in rows; times in milliseconds of event time."""

    first_rows: int = 2_000  # the early window that "first" metrics are over
    window_rows: int = 20_000  # the recent window
    settle_ms: int = 4_200_000  # first emissions are out this long after the impression: click + observation window
    mature_ms: int = 864_600_000  # final labels are: click + attribution window
    cohorts: int = 16  # a cohort is this share of those times
    keep_versions: int = 20  # older ones are not told apart


class Scoreboard:
    """Feed it every step's examples with the learner's predictions from before the step."""

    def __init__(self, kind: StatsKind, policy: ScoreboardPolicy) -> None:
        """Empty boards."""
        self._kind, self._policy = kind, policy
        self._boards = {
            "fresh.ctr": self._board(policy.settle_ms),
            "fresh.ctcvr": self._board(policy.settle_ms),
            "matured.ctcvr": self._board(policy.mature_ms),
        }
        self._progressive = {task: self._track() for task in TASKS}
        self._versions: dict[int, dict[str, Stats]] = {}  # version -> board -> all its rows

    def _board(self, settle_ms: int) -> _Board:
        return _Board(Cohorts(self._kind, settle_ms // self._policy.cohorts, settle_ms), self._track())

    def _track(self) -> Track:
        return Track(self._kind, self._policy.first_rows, self._policy.window_rows)

    def add(self, examples: Examples, ctr_B: Float32, ctcvr_B: Float32) -> None:
        """One step: ``ctr_B`` and ``ctcvr_B`` are what the learner predicted before it learned these rows."""
        first_B = examples.kind_B == Kind.FIRST
        final_B = (examples.kind_B == Kind.MATURED) | (first_B & (examples.click_B == 0))
        fresh = ("fresh.ctr", examples.click_B, examples.served_ctr_B), ("fresh.ctcvr", *_ctcvr(examples))
        self._gather(examples, first_B, fresh)
        self._gather(examples, final_B, [("matured.ctcvr", *_ctcvr(examples))])
        self._progressive["ctr"].add(self._kind.of(examples.click_B[first_B], ctr_B[first_B]))
        self._progressive["ctcvr"].add(self._kind.of(examples.conversion_B[first_B], ctcvr_B[first_B]))

    def _gather(self, examples: Examples, of_B: Bool, boards: Sequence[tuple[str, Float32, Float32]]) -> None:
        """Some rows into boards of one kind of cohorts: name, labels and scores each."""
        if not of_B.any():
            return
        cohorts = self._boards[boards[0][0]].cohorts
        groups = cohorts.grouped(examples.impression_ms_B[of_B], examples.version_B[of_B])
        for name, label_B, score_B in boards:
            self._boards[name].cohorts.add(groups, label_B[of_B], score_B[of_B])
        for _, version in groups.keys:
            self._versions.setdefault(version, {})

    def advance(self, watermark_ms: int) -> None:
        """Event time has come to ``watermark_ms``: cohorts that are complete enter their board."""
        if watermark_ms == BEGINNING:
            return
        for name, (cohorts, track) in self._boards.items():
            for version, stats in cohorts.close(watermark_ms):
                track.add(stats)
                board = self._versions.setdefault(version, {})
                board[name] = board[name] + stats if name in board else stats
        self._forget_versions()

    def _forget_versions(self) -> None:
        named = sorted(version for version in self._versions if version > OLDER)
        gone = named[: -self._policy.keep_versions]
        if not gone:
            return
        for cohorts, _ in self._boards.values():
            cohorts.lump(gone[-1] + 1)
        for version in gone:
            for name, stats in self._versions.pop(version).items():
                older = self._versions.setdefault(OLDER, {})
                older[name] = older[name] + stats if name in older else stats

    def summary(self) -> dict[str, dict[str, Any]]:
        """``{"ctr": {...}, "ctcvr": {...}}``: each metric of the scores as served, over the first and the last window.

        ``ctcvr`` is measured on matured labels as soon as their first window has a positive, else on fresh ones;
        ``labels`` says which. A metric is None while it is not defined (no rows, no positive).
        """
        matured = self._boards["matured.ctcvr"].track
        labels = "fresh" if measure(matured.first, "pcoc") is None else "matured"
        out: dict[str, dict[str, Any]] = {}
        for task, name in (("ctr", "fresh.ctr"), ("ctcvr", f"{labels}.ctcvr")):
            track = self._boards[name].track
            last = track.last()
            out[task] = {"labels": name.partition(".")[0], "rows": track.total.rows}
            for metric in METRICS:
                out[task][f"{metric}_first"] = measure(track.first, metric)
                out[task][f"{metric}_last"] = measure(last, metric)
        return out

    def progressive(self) -> dict[str, dict[str, float | None]]:
        """Task -> metrics of the learner's own predictions, made before it learned the row, over the last window."""
        return {task: measures(track.last()) for task, track in self._progressive.items()}

    def by_version(self) -> dict[int, dict[str, dict[str, float | None]]]:
        """Version (-1: all older ones) -> ``fresh.ctr``, ``fresh.ctcvr``, ``matured.ctcvr`` -> metrics, as served."""
        return {v: {name: measures(stats) for name, stats in board.items()} for v, board in self._versions.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON data for a checkpoint."""
        return {
            "cohorts": {name: board.cohorts.to_list() for name, board in self._boards.items()},
            "tracks": {name: board.track.to_dict() for name, board in self._boards.items()},
            "progressive": {task: track.to_dict() for task, track in self._progressive.items()},
            "versions": [[v, {n: s.to_dict() for n, s in board.items()}] for v, board in self._versions.items()],
        }

    def load(self, data: Mapping[str, Any]) -> None:
        """Take over `to_dict`."""
        for name, (cohorts, track) in self._boards.items():
            cohorts.load(data["cohorts"][name])
            track.load(data["tracks"][name])
        for task, track in self._progressive.items():
            track.load(data["progressive"][task])
        self._versions = {v: {n: self._kind.from_dict(s) for n, s in board.items()} for v, board in data["versions"]}


def _ctcvr(examples: Examples) -> tuple[Float32, Float32]:
    """Labels and scores as served."""
    return examples.conversion_B, examples.served_ctcvr_B
