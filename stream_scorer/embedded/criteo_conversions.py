"""Criteo's conversion log (Chapelle, KDD 2014; ``data.txt``): clicks of 60 days, each with its conversion's time.

Tab-separated, no header: click time, conversion time or nothing (seconds from the log's start), eight integers, nine
hashed strings. There are no impressions, users or items: each click is an impression that was clicked at once, so CTR
means nothing here and the log is for CVR; rows are spread over `NAMES` users so that they spread over partitions; all
features are the request's own. The attribution window is 30 days: set ``trainer.attribution_window_s = 2592000``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.labelled import (
    LabelledReplay,
    Line,
    LogFormat,
    Problem,
    Row,
    in_order,
    signed_log,
    usable,
)
from stream_scorer.embedded.open_bandit_rows import stable_hash
from stream_scorer.embedded.replay import Layouts, Replay, ReplayOptions, ReplayReport
from stream_scorer.embedded.schema_text import dense, sparse

START_MS = 1_388_534_400_000  # the log counts from 0; messages say 2014
NAMES, ITEM = 1_000, "ad"
COUNTS, CATEGORIES = 8, 9
_HINT = (
    "Criteo's conversion log has 19 tab-separated columns: click time, conversion time or nothing, 8 integers, 9 hashes"
)

CRITEO_CONVERSIONS_TOML = "".join(
    (
        *(sparse(f"c{n}", "context", 65_536) for n in range(1, CATEGORIES + 1)),
        sparse("hour", "context", 24, hashed=False),
        dense("counts", "context", COUNTS),
    )
)


def criteo_conversions(path: Path, layouts: Layouts, options: ReplayOptions | None = None) -> Replay:
    """Replay ``path``, plain or gzipped; `ConfigurationError` in one line when it is not such a log."""
    options = options or ReplayOptions()
    report = ReplayReport()
    rows = criteo_clicks(path, report, options)
    first = next(rows)
    report.first_ms = first.at_ms
    replay = LabelledReplay("cc", layouts, options, report)
    return Replay(
        "criteo-conversions", CRITEO_CONVERSIONS_TOML, first.at_ms, report, replay.actions(chain([first], rows))
    )


def criteo_clicks(path: Path, report: ReplayReport, options: ReplayOptions) -> Iterator[Row]:
    """The log's usable rows in order of time, at least one; what is not usable is counted in ``report``.

    `ConfigurationError` in one line when it is not such a log.
    """
    rows = usable(in_order(path, report, options, LogFormat(_time, _HINT)), report, _parse)
    first = next(rows, None)
    if first is None:
        raise ConfigurationError(f"{path}: none of the {report.rows} rows can be used; {_HINT}")
    yield first
    yield from rows


def _time(text: str) -> int | None:
    second = text.partition("\t")[0]
    return int(second) if second.isascii() and second.isdecimal() and len(second) < 12 else None


def _parse(line: Line) -> Row | Problem:
    parts = line.text.split("\t")
    if len(parts) != 2 + COUNTS + CATEGORIES:
        return Problem("columns")
    try:
        converted = int(parts[1]) if parts[1] else None
        counts = [signed_log(int(part)) if part else -1.0 for part in parts[2 : 2 + COUNTS]]
    except ValueError:
        return Problem("number")
    if converted is not None and not line.at <= converted < 10**11:
        return Problem("conversion-time")
    context: dict[str, float | list[float | int]] = {
        f"c{n}": stable_hash(text) if text else 0 for n, text in enumerate(parts[2 + COUNTS :], 1)
    }
    context |= {"hour": line.at // 3_600 % 24, "counts": [*counts]}
    at_ms = START_MS + 1_000 * line.at
    conversion_ms = None if converted is None else START_MS + 1_000 * converted
    return Row(line.number, at_ms, f"u{line.number % NAMES}", ITEM, {}, {}, context, at_ms, conversion_ms)
