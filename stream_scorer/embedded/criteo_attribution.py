"""Criteo's attribution log (Diemert et al., AdKDD 2017): 30 days of impressions with click and conversion.

Tab-separated with a header. An impression that was clicked and that a conversion followed within 30 days converted, at
``conversion_timestamp``; conversions of impressions that nobody clicked are counted as unattributed. The log has no
click times: a click is said to come with its impression. ``conversion_id``, ``attribution``, ``click_pos``,
``click_nb`` and ``cpo`` are known only afterwards and are no features here.
"""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import numpy as np

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.criteo_conversions import START_MS
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
from stream_scorer.embedded.replay import Layouts, Lines, Replay, ReplayOptions, ReplayReport
from stream_scorer.embedded.schema_text import dense, sparse

CATEGORIES = tuple(f"cat{n}" for n in range(1, 10))
COLUMNS = (
    *("timestamp", "uid", "campaign", "conversion", "conversion_timestamp", "conversion_id", "attribution", "click"),
    *("click_pos", "click_nb", "cost", "cpo", "time_since_last_click", *CATEGORIES),
)
_HINT = f"Criteo's attribution log has the tab-separated columns {', '.join(COLUMNS)}"

CRITEO_ATTRIBUTION_TOML = "".join(
    (
        sparse("uid", "user", 262_144),
        sparse("campaign", "item", 4_096),
        *(sparse(name, "context", 65_536) for name in CATEGORIES),
        sparse("hour", "context", 24, hashed=False),
        dense("cost", "context", 1),
        dense("since_click", "context", 1),
    )
)


def criteo_attribution(path: Path, layouts: Layouts, options: ReplayOptions | None = None) -> Replay:
    """Replay ``path``, plain or gzipped; `ConfigurationError` in one line when it is not such a log."""
    options = options or ReplayOptions()
    report = ReplayReport()
    header = next(iter(Lines(path)), "").split("\t")
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ConfigurationError(f"{path}: column {missing[0]!r} is missing from its first line; {_HINT}")
    log = _Log(tuple(header), report)
    rows = usable(in_order(path, report, options, LogFormat(log.time, _HINT, header=1)), report, log.parse)
    first = next(rows, None)
    if first is None:
        raise ConfigurationError(f"{path}: none of the {report.rows} rows can be used; {_HINT}")
    report.first_ms = first.at_ms
    replay = LabelledReplay("ca", layouts, options, report)
    return Replay(
        "criteo-attribution", CRITEO_ATTRIBUTION_TOML, first.at_ms, report, replay.actions(chain([first], rows))
    )


class _Log:
    """The columns of one file."""

    def __init__(self, header: tuple[str, ...], report: ReplayReport) -> None:
        self._width, self._at, self._report = len(header), {name: header.index(name) for name in COLUMNS}, report

    def time(self, text: str) -> int | None:
        parts = text.split("\t")
        part = parts[self._at["timestamp"]] if len(parts) > self._at["timestamp"] else ""
        return int(part) if part.isascii() and part.isdecimal() and len(part) < 12 else None

    def parse(self, line: Line) -> Row | Problem:
        parts = line.text.split("\t")
        if len(parts) != self._width:
            return Problem("columns")
        value = {name: parts[at] for name, at in self._at.items()}
        if value["click"] not in ("0", "1") or value["conversion"] not in ("0", "1"):
            return Problem("label")
        try:
            converted, since = int(value["conversion_timestamp"]), float(value["time_since_last_click"])
            cost = float(value["cost"])
            ids = {name: int(value[name]) for name in ("uid", "campaign", *CATEGORIES)}
        except ValueError:
            return Problem("number")
        if not (math.isfinite(since) and math.isfinite(cost) and max(map(abs, ids.values())) < 1 << 62):
            return Problem("number")
        clicked, has_converted = value["click"] == "1", value["conversion"] == "1"
        if has_converted and not line.at <= converted < 10**11:
            return Problem("conversion-time")
        if has_converted and not clicked:
            self._report.unattributed += 1
        return self._row(line, ids, (cost, since), clicked, converted if clicked and has_converted else None)

    def _row(
        self, line: Line, ids: dict[str, int], amounts: tuple[float, float], clicked: bool, converted: int | None
    ) -> Row:
        at_ms = START_MS + 1_000 * line.at
        cost, since = amounts
        return Row(
            line.number,
            at_ms,
            f"u{ids['uid']}",
            f"c{ids['campaign']}",
            {"uid": np.array([ids["uid"]])},
            {"campaign": np.array([ids["campaign"]])},
            {
                **{name: ids[name] for name in CATEGORIES},
                "hour": line.at // 3_600 % 24,
                "cost": signed_log(1e4 * cost),  # the log's unit: costs are some 1e-4
                "since_click": signed_log(since / 3_600) if since >= 0 else -1.0,
            },
            at_ms if clicked else None,
            None if converted is None else START_MS + 1_000 * converted,
        )
