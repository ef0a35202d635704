"""Reading Open Bandit data: every log in a directory, merged by time, and what is known of its items.

Two arrangements are understood: ``random_all.csv[.gz]`` beside ``item_context_all.csv``, and the published
``random/all/all.csv`` beside its ``item_context.csv``. Policies are ``random`` and ``bts``, campaigns ``all``, ``men``
and ``women``.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.replay import PROGRESS_ROWS, Lines, ReplayOptions, ReplayReport

POLICIES, CAMPAIGNS = ("random", "bts"), ("all", "men", "women")
USER_FEATURES = tuple(f"user_feature_{n}" for n in range(4))
ITEM_FEATURES = tuple(f"item_feature_{n}" for n in range(4))
AFFINITY = "user-item_affinity_"
_COLUMNS = ("timestamp", "item_id", "position", "click", *USER_FEATURES)


class Row(NamedTuple):
    """One usable line of one log."""

    at_ms: int
    log: str  # policy-campaign
    number: int  # of the line, from 1 below the header
    campaign: str
    item: int
    position: int
    click: bool
    user: tuple[str, ...]
    affinity: tuple[float, ...]  # to each of the campaign's items


class Item(NamedTuple):
    """What is known of an item of one campaign."""

    number: float
    hashes: tuple[int, int, int]


class Log(NamedTuple):
    """One file, and its campaign's items by id."""

    name: str
    campaign: str
    lines: Lines
    items: dict[int, Item]


def stable_hash(text: str) -> int:
    """A positive 63-bit integer, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def open_logs(directory: Path) -> list[Log]:
    """Every log found; `ConfigurationError` when there is none, or one lacks its items."""
    logs: list[Log] = []
    for policy, campaign in product(POLICIES, CAMPAIGNS):
        for stem, context in (
            (f"{policy}_{campaign}.csv", f"item_context_{campaign}.csv"),
            (f"{policy}/{campaign}/{campaign}.csv", f"{policy}/{campaign}/item_context.csv"),
        ):
            for path in (directory / stem, directory / f"{stem}.gz"):
                if path.exists():
                    items = _items(directory / context)
                    logs.append(Log(f"{policy}-{campaign}", campaign, Lines(path), items))
    if not logs:
        raise ConfigurationError(f"{directory} holds no Open Bandit log (random_all.csv.gz, or random/all/all.csv)")
    return logs


def rows_in_order(logs: list[Log], report: ReplayReport, options: ReplayOptions) -> Iterator[Row]:
    """The usable rows of all logs by time; each log must be in order, rows that go back are counted as dirt."""
    merged = heapq.merge(*(_rows(log, report) for log in logs), key=lambda row: row.at_ms)
    try:
        for number, row in enumerate(merged, 1):
            if number % PROGRESS_ROWS == 0:
                options.progress(number, sum(log.lines.share for log in logs) / len(logs))
            yield row
            if number == options.limit:
                break
    except csv.Error as error:
        raise ConfigurationError(f"{logs[0].lines.path.parent}: a log is not CSV: {error}") from error
    options.progress(report.rows, 1.0)


def _items(path: Path) -> dict[int, Item]:
    items: dict[int, Item] = {}
    try:
        for record in csv.DictReader(Lines(path)):
            one, two, three = (stable_hash(record[name]) for name in ITEM_FEATURES[1:])
            items[int(record["item_id"])] = Item(float(record[ITEM_FEATURES[0]]), (one, two, three))
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ConfigurationError(f"{path} is not an item context (item_id, item_feature_0 to 3): {error}") from error
    return items


def _rows(log: Log, report: ReplayReport) -> Iterator[Row]:
    lines = csv.reader(log.lines)
    header = next(lines, [])
    at = {name: index for index, name in enumerate(header)}
    missing = [name for name in _COLUMNS if name not in at]
    if missing:
        raise ConfigurationError(f"{log.lines.path}: column {missing[0]!r} is missing, so it is not an Open Bandit log")
    affinities = [at[name] for name in header if name.startswith(AFFINITY)]
    latest = 0
    for number, record in enumerate(lines, 1):
        report.rows += 1
        row = _row(log, number, record, at, affinities) if len(record) == len(header) else "columns"
        if isinstance(row, Row) and row.at_ms < latest:
            row = "order"
        if isinstance(row, str):
            report.dirty[row] += 1
            continue
        latest = row.at_ms
        yield row


def _row(log: Log, number: int, record: list[str], at: dict[str, int], affinities: list[int]) -> Row | str:
    """The row, or why not."""
    try:
        at_ms = int(datetime.fromisoformat(record[at["timestamp"]]).timestamp() * 1_000)
    except ValueError:
        return "time"
    try:
        item, position = int(record[at["item_id"]]), int(record[at["position"]])
        affinity = tuple(float(record[index]) for index in affinities)
    except ValueError:
        return "number"
    click = record[at["click"]]
    if click not in ("0", "1"):
        return "click"
    if item not in log.items:
        return "item"
    user = tuple(record[at[name]] for name in USER_FEATURES)
    return Row(at_ms, log.name, number, log.campaign, item, position, click == "1", user, affinity)
