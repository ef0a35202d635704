"""Replaying public logs: what a replay yields, its report, reading files, and a fence against features of the future.

A replay yields actions in time order. Features in an update count only what happened strictly before its time, and an
update comes right before the request that needs it. A driver must not write an update while a request that reads the
same entity still waits for its scores (that request would see its own future): `InFlight` says when to wait.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import FeatureBlock, SourceLayout
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.messages import Feedback, ScoreRequest

PROGRESS_ROWS = 1_000
NAMED_LINES = 10  # of each kind of dirt


class FeatureUpdate(NamedTuple):
    """Write these features (what the feature writer takes); they are the state strictly before ``at_ms``."""

    at_ms: int
    entity: Literal["user", "item"]
    ids: list[str]
    block: FeatureBlock


class Request(NamedTuple):
    """Ask for scores."""

    at_ms: int
    message: ScoreRequest


class FeedbackEvent(NamedTuple):
    """Tell what a user did."""

    at_ms: int
    message: Feedback


Action = FeatureUpdate | Request | FeedbackEvent


def _as_logged(at_ms: int) -> int:
    return at_ms


def _silent(_rows: int, _share: float) -> None:
    return


@dataclass(frozen=True)
class ReplayOptions:
    """``retime`` maps a moment of the log (ms) to the moment in messages; it must not decrease.

    ``progress`` is called with the rows read and the share of the file read, about every thousand rows.
    """

    limit: int = 0  # log rows, 0: all
    candidates: int = 1  # items a request: the one that was shown and others seen before
    seed: int = 7
    retime: Callable[[int], int] = _as_logged
    progress: Callable[[int, float], None] = _silent


@dataclass
class ReplayReport:
    """What was read and what became of it; complete when the replay is exhausted."""

    rows: int = 0
    dirty: Counter[str] = field(default_factory=Counter)  # rows not used, by reason
    dirty_lines: dict[str, list[int]] = field(default_factory=dict)  # the numbers of the first of them, by reason
    sorted_in_memory: bool = False
    sorted_on_disk: bool = False
    requests: int = 0
    impressions: int = 0
    clicks: int = 0
    clicks_implied: int = 0  # of the clicks: made up for a conversion that had none, at its time
    conversions: int = 0
    unattributed: int = 0  # clicks and conversions of something not shown before, or a second time
    first_ms: int = 0
    last_ms: int = 0

    def leave_out(self, reason: str, number: int) -> None:
        """Line ``number`` (from 1) cannot be used."""
        self.dirty[reason] += 1
        first = self.dirty_lines.setdefault(reason, [])
        if len(first) < NAMED_LINES:
            first.append(number)

    def fields(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"dirty": dict(self.dirty)}


@dataclass
class Replay:
    """Iterate once. ``first_ms`` is the log time of the first usable row, known before."""

    name: str
    schema_toml: str
    first_ms: int
    report: ReplayReport
    actions: Iterator[Action]

    def __iter__(self) -> Iterator[Action]:
        """The actions, in time order."""
        return self.actions


class InFlight:
    """Requests that wait for their scores, and the entities they read."""

    def __init__(self) -> None:
        self._readers: Counter[tuple[str, str]] = Counter()
        self._entities: dict[str, list[tuple[str, str]]] = {}

    def __len__(self) -> int:
        return len(self._entities)

    def asked(self, request: ScoreRequest) -> None:
        """A request was sent."""
        entities = [("user", request.user_id), *(("item", item) for item in request.items)]
        self._entities[request.request_id] = entities
        self._readers.update(entities)

    def answered(self, request_id: str) -> bool:
        """Its scores came; False when it was not waiting (a duplicate, or not ours)."""
        entities = self._entities.pop(request_id, None)
        if entities is None:
            return False
        for entity in entities:
            self._readers[entity] -= 1
            if not self._readers[entity]:
                del self._readers[entity]
        return True

    def must_wait(self, update: FeatureUpdate) -> bool:
        """Whether writing this update now could reach a request that was made before it."""
        return any((update.entity, name) in self._readers for name in update.ids)


@dataclass(frozen=True)
class Layouts:
    """Where the schema puts user and item features."""

    user: SourceLayout
    item: SourceLayout


class Lines:
    """Lines of a plain or gzipped text file, with the share of it that was read; every failure is one line."""

    def __init__(self, path: Path) -> None:
        """`ConfigurationError` when it cannot be opened."""
        self.path = path
        try:
            self._raw: BinaryIO = path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
        self._size = max(1, path.stat().st_size)
        packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        self._text = gzip.GzipFile(fileobj=self._raw) if packed else self._raw

    @property
    def share(self) -> float:
        """0 to 1."""
        return 1.0 if self._raw.closed else min(1.0, self._raw.tell() / self._size)

    def __iter__(self) -> Iterator[str]:
        """Without line ends; bytes that are not UTF-8 are replaced."""
        number = 0
        try:
            for line in self._text:
                number += 1
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigurationError(f"{self.path}: damaged after line {number}: {error}") from error
        finally:
            self._raw.close()


class Counts:
    """Growing tables, one row an entity: a dictionary from id to row, and int64 columns by name.

    Memory grows with the number of distinct ids (some 150 bytes each), not with the length of the log.
    """

    def __init__(self, **widths: int) -> None:
        """Columns and how many numbers each holds a row."""
        self._row: dict[Any, int] = {}
        self._columns = {name: np.zeros((1_024, width), np.int64) for name, width in widths.items()}

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, column: str) -> NDArray[np.int64]:
        """The whole column, ``(capacity, width)``; it is replaced when the table grows, so do not keep it."""
        return self._columns[column]

    def row(self, key: Any) -> int:
        """The entity's row, a new one full of zeros at first sight."""
        at = self._row.setdefault(key, len(self._row))
        if at >= len(next(iter(self._columns.values()))):
            for name, column in self._columns.items():
                self._columns[name] = np.concatenate([column, np.zeros_like(column)])
        return at


def refuse_mostly_dirty(path: Path, report: ReplayReport, hint: str) -> None:
    """`ConfigurationError` when most of what was read could not be used: that is not the file it should be."""
    bad = sum(report.dirty.values())
    if report.rows == 0 or bad * 2 > report.rows:
        raise ConfigurationError(f"{path}: {bad} of the first {report.rows} rows cannot be used; {hint}")


def unique(names: Sequence[Any]) -> list[Any]:
    """Without repetitions, in order."""
    return list(dict.fromkeys(names))
