"""The feature lists of Ali-CCP, and the common features of its samples, kept on disk: the file has gigabytes."""

from __future__ import annotations

import math
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.replay import Lines, ReplayReport

Features = dict[str, list[tuple[int, float]]]  # field -> (id, value) in the order of the file


def parse_features(text: str, count: str) -> Features | None:
    r"""``field\x02id\x03value`` parts joined by ``\x01``; None unless there are as many as said and all are numbers."""
    found: Features = {}
    parts = text.split("\x01") if text else []
    if not count.isdecimal() or int(count) != len(parts):
        return None
    for part in parts:
        name, _, rest = part.partition("\x02")
        id_, _, value = rest.partition("\x03")
        try:
            number, amount = int(id_), float(value)
        except ValueError:
            return None
        if not name or abs(number) >= 1 << 62 or not math.isfinite(amount):
            return None
        found.setdefault(name, []).append((number, amount))
    return found


class CommonFeatures:
    """The lines of ``common_features_*.csv`` by their index, in a temporary database."""

    def __init__(self, path: Path, report: ReplayReport) -> None:
        """Reads the whole file once; `ConfigurationError` when no line of it has the three columns."""
        self._path, self._report = path, report
        self._directory = tempfile.TemporaryDirectory(prefix="stream-scorer-")
        self._table = sqlite3.connect(Path(self._directory.name) / "common.sqlite")
        self._table.execute("pragma journal_mode = off")
        self._table.execute("pragma synchronous = off")
        self._table.execute("create table common (name text primary key, features text) without rowid")
        self._last: tuple[str, Features | None] = ("", None)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        self._table.executemany("insert or ignore into common values (?, ?)", self._lines())
        self._table.commit()
        if self._table.execute("select count(*) from common").fetchone()[0] == 0:
            raise ConfigurationError(
                f"{self._path}: no line can be used; common features have the columns index, count, features"
            )

    def _lines(self) -> Iterator[tuple[str, str]]:
        for number, text in enumerate(Lines(self._path), 1):
            parts = text.split(",", 2)
            if len(parts) != 3 or parse_features(parts[2], parts[1]) is None:
                self._report.leave_out("common-features", number)
            else:
                yield parts[0], f"{parts[1]},{parts[2]}"

    def get(self, name: str) -> Features | None:
        """The features of one index. Samples of one index follow each other, so the last one is kept."""
        if self._last[0] != name:
            found = self._table.execute("select features from common where name = ?", (name,)).fetchone()
            count, _, text = found[0].partition(",") if found else ("", "", "")
            self._last = (name, parse_features(text, count) if found else None)
        return self._last[1]

    def close(self) -> None:
        """Remove the database."""
        self._table.close()
        self._directory.cleanup()
