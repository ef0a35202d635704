"""Logs whose rows carry their own labels: each row asks for what was shown; what became of it is told when it happened.

A row of such a log knows its future. It is read at its own time, and every click and conversion is told at the time it
has: nothing is emitted before a moment that it makes use of. Conversions still to come wait in a heap, which holds as
many as an attribution window has.

Rows must come in time order. `in_order` sees to it: a sorted file is streamed, an unsorted one is sorted on disk, in
runs, so that memory stays bounded.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from esmm.batch import FeatureBlock, SourceLayout
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.messages import ContextValue, Feedback, ScoreRequest
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.replay import (
    PROGRESS_ROWS,
    Action,
    FeatureUpdate,
    FeedbackEvent,
    Layouts,
    Lines,
    ReplayOptions,
    ReplayReport,
    Request,
    refuse_mostly_dirty,
)

PEEK_ROWS = 20_000
RUN_ROWS = 100_000  # rows sorted in memory at a time, some kilobyte each

Values = Mapping[str, NDArray[np.generic]]  # one entity's features by slot name, each one row


class Row(NamedTuple):
    """One usable line. ``user`` and ``item`` name entities whose features are the two `Values`."""

    number: int  # of the line, from 1
    at_ms: int  # of the log
    user: str
    item: str
    user_values: Values
    item_values: Values
    context: dict[str, ContextValue]
    click_ms: int | None
    conversion_ms: int | None


class Line(NamedTuple):
    """A line that has a time; nothing else of it was looked at."""

    at: int
    number: int
    text: str


class Problem(NamedTuple):
    """Why a line cannot be used."""

    reason: str


@dataclass(frozen=True)
class LogFormat:
    """How a line's time is found (None: it has none), what such a log looks like, and its lines of header."""

    time_of: Callable[[str], int | None]
    hint: str
    header: int = 0


def in_order(path: Path, report: ReplayReport, options: ReplayOptions, log: LogFormat) -> Iterator[Line]:
    """The lines of ``path`` that have a time, in its order; `ConfigurationError` when most of the first have none.

    In a file that begins sorted, a line that goes back in time is left out and counted; another file is sorted on disk.
    """
    lines = _timed(path, report, options, log)
    head = list(islice(lines, PEEK_ROWS))
    refuse_mostly_dirty(path, report, log.hint)
    if all(one.at <= two.at for one, two in pairwise(head)):
        return _forward(chain(head, lines), report)
    report.sorted_on_disk = True
    return _sorted(chain(head, lines))


def _timed(path: Path, report: ReplayReport, options: ReplayOptions, log: LogFormat) -> Iterator[Line]:
    lines = Lines(path)
    for number, text in enumerate(lines, 1):
        if number <= log.header:
            continue
        report.rows += 1
        if report.rows % PROGRESS_ROWS == 0:
            options.progress(report.rows, lines.share)
        at = log.time_of(text)
        if at is None:
            report.leave_out("time", number)
        else:
            yield Line(at, number, text)
        if report.rows == options.limit:
            break
    options.progress(report.rows, 1.0)


def _forward(lines: Iterable[Line], report: ReplayReport) -> Iterator[Line]:
    latest = 0
    for line in lines:
        if line.at < latest:
            report.leave_out("order", line.number)
            continue
        latest = line.at
        yield line


def _sorted(lines: Iterator[Line]) -> Iterator[Line]:
    """By time, then by number; runs on disk, merged."""
    with tempfile.TemporaryDirectory(prefix="stream-scorer-") as directory:
        runs: list[TextIO] = []
        try:
            while run := sorted(islice(lines, RUN_ROWS)):
                file: TextIO = (Path(directory) / str(len(runs))).open("w+", encoding="utf-8", newline="\n")
                runs.append(file)
                file.writelines(f"{line.at} {line.number} {line.text}\n" for line in run)
                file.seek(0)
            yield from heapq.merge(*map(_read_run, runs))
        finally:
            for file in runs:
                file.close()


def _read_run(file: TextIO) -> Iterator[Line]:
    for text in file:
        at, number, rest = text[:-1].split(" ", 2)
        yield Line(int(at), int(number), rest)


@dataclass
class LabelledReplay:
    """Turns rows in time order into actions; ``prefix`` begins every request's id."""

    prefix: str
    layouts: Layouts
    options: ReplayOptions
    report: ReplayReport
    ahead: list[tuple[int, int, FeedbackEvent]] = field(default_factory=list)  # told when their time has come
    known: dict[tuple[str, str], int] = field(default_factory=dict)  # entity -> hash of what was written
    told: int = 0

    def __post_init__(self) -> None:
        """`ConfigurationError` for options that mean nothing here."""
        if self.options.candidates != 1:
            raise ConfigurationError("this log's features are those of one shown item: --candidates must be 1")

    def actions(self, rows: Iterable[Row]) -> Iterator[Action]:
        """Features of an entity when they are new, the request, its impression; clicks and conversions at their time.

        Rows must not go back in time.
        """
        for row in rows:
            yield from self._due(row.at_ms)
            self.report.last_ms = row.at_ms
            at_ms = self.options.retime(row.at_ms)
            yield from self._update(at_ms, self.layouts.user, row.user, row.user_values)
            yield from self._update(at_ms, self.layouts.item, row.item, row.item_values)
            message = ScoreRequest(
                request_id=f"{self.prefix}-{row.number}",
                user_id=row.user,
                items=[row.item],
                ts=at_ms,
                context=row.context,
            )
            self.report.requests += 1
            yield Request(at_ms, message)
            self.report.impressions += 1
            yield self._feedback(row, "impression", row.at_ms)
            if row.click_ms is not None:
                self.report.clicks += 1
                self._later(row, "click", row.click_ms)
            if row.conversion_ms is not None:
                self.report.conversions += 1
                self._later(row, "conversion", row.conversion_ms)
        yield from self._due(1 << 62)

    def _due(self, now_ms: int) -> Iterator[Action]:
        while self.ahead and self.ahead[0][0] <= now_ms:
            yield heapq.heappop(self.ahead)[2]

    def _later(self, row: Row, kind: Literal["click", "conversion"], log_ms: int) -> None:
        self.told += 1
        heapq.heappush(self.ahead, (log_ms, self.told, self._feedback(row, kind, log_ms)))

    def _feedback(self, row: Row, kind: Literal["impression", "click", "conversion"], log_ms: int) -> FeedbackEvent:
        at_ms = self.options.retime(log_ms)
        request_id = f"{self.prefix}-{row.number}"
        message = Feedback(
            event_id=f"{request_id}:{kind}",
            kind=kind,
            request_id=request_id,
            user_id=row.user,
            item_id=row.item,
            ts=at_ms,
        )
        return FeedbackEvent(at_ms, message)

    def _update(self, at_ms: int, layout: SourceLayout, name: str, values: Values) -> Iterator[Action]:
        content = hash(tuple(values[key].tobytes() for key in sorted(values)))
        if self.known.get((layout.source, name)) == content:
            return
        self.known[layout.source, name] = content
        block: FeatureBlock = fill(layout, 1, {key: value[None] for key, value in values.items()})
        yield FeatureUpdate(at_ms, "user" if layout.source == "user" else "item", [name], block)


def usable(lines: Iterable[Line], report: ReplayReport, parse: Callable[[Line], Row | Problem]) -> Iterator[Row]:
    """The rows that ``parse`` can make of lines; the others are counted by reason, with their numbers."""
    for line in lines:
        row = parse(line)
        if isinstance(row, Problem):
            report.leave_out(row.reason, line.number)
        else:
            yield row


def signed_log(value: float) -> float:
    """Counts and amounts of any size and sign, tamed."""
    return float(np.sign(value) * np.log1p(abs(value)))
