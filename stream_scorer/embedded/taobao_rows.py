"""Reading a Taobao log: usable rows in time order, and a count of those that are not."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.replay import PROGRESS_ROWS, Lines, ReplayOptions, ReplayReport, refuse_mostly_dirty

BEHAVIOURS = ("pv", "cart", "fav", "buy")
PV, CART, FAV, BUY = range(4)
SORT_LIMIT = 10_000_000  # rows sorted in memory, 48 bytes each
PEEK_ROWS = 20_000
SPAN_S = 30 * 86_400  # a time further than this from the file's median time is dirt
_HINT = "a Taobao log has the columns user, item, category, pv|cart|fav|buy, unix seconds"


class Row(NamedTuple):
    """One usable line."""

    number: int  # of the line, from 1
    user: int
    item: int
    category: int
    behaviour: int  # index into BEHAVIOURS
    second: int


def rows_in_order(path: Path, report: ReplayReport, options: ReplayOptions) -> Iterator[Row]:
    """The usable rows of ``path`` in time order; `ConfigurationError` when it is not such a log.

    A file sorted by time is streamed. An unsorted one (the full public file is sorted by user) is sorted in memory, up
    to `SORT_LIMIT` rows, and the report says so.
    """
    rows = _read(path, report, options)
    head = list(islice(rows, PEEK_ROWS))
    refuse_mostly_dirty(path, report, _HINT)
    middle = sorted(row.second for row in head)[len(head) // 2]
    kept = [row for row in head if _in_span(row, middle, report)]
    rest = (row for row in rows if _in_span(row, middle, report))
    ordered = all(one.second <= two.second for one, two in pairwise(kept))
    return _forward(chain(kept, rest), report) if ordered else _sorted(path, chain(kept, rest), report)


def _read(path: Path, report: ReplayReport, options: ReplayOptions) -> Iterator[Row]:
    lines = Lines(path)
    codes = {name: code for code, name in enumerate(BEHAVIOURS)}
    for number, line in enumerate(lines, 1):
        report.rows = number
        if number % PROGRESS_ROWS == 0:
            options.progress(number, lines.share)
        parts = line.split(",")
        if len(parts) != 5:
            report.dirty["columns"] += 1
        elif parts[3] not in codes:
            report.dirty["behaviour"] += 1
        else:
            try:
                row = Row(number, int(parts[0]), int(parts[1]), int(parts[2]), codes[parts[3]], int(parts[4]))
            except ValueError:
                report.dirty["number"] += 1
            else:
                if max(abs(value) for value in row) < 1 << 62:
                    yield row
                else:
                    report.dirty["number"] += 1
        if number == options.limit:
            break
    options.progress(report.rows, 1.0)


def _in_span(row: Row, middle: int, report: ReplayReport) -> bool:
    if abs(row.second - middle) <= SPAN_S:
        return True
    report.dirty["time"] += 1
    return False


def _forward(rows: Iterable[Row], report: ReplayReport) -> Iterator[Row]:
    """Rows that do not go back in time; the odd one that does is reported, as its past was already used."""
    latest = 0
    for row in rows:
        if row.second < latest:
            report.dirty["order"] += 1
            continue
        latest = row.second
        yield row


def _sorted(path: Path, rows: Iterable[Row], report: ReplayReport) -> Iterator[Row]:
    flat = array("q")
    for row in rows:
        flat.extend(row)
        if len(flat) > SORT_LIMIT * len(Row._fields):
            raise ConfigurationError(
                f"{path} is not sorted by time and has more than {SORT_LIMIT} rows: sort it first "
                f"(sort -t, -k5,5n), or replay part of it with --limit"
            )
    table = np.frombuffer(flat, np.int64).reshape(-1, len(Row._fields))
    order = np.argsort(table[:, -1], kind="stable")
    report.sorted_in_memory = True
    for start in range(0, len(order), 10_000):
        for values in table[order[start : start + 10_000]].tolist():
            yield Row(*values)
