"""Taobao user behaviour as a funnel: user, item, category, behaviour (pv, fav, cart, buy), unix seconds; one a line.

Impression = pv. Click = the first cart or fav of the same item by the same user after it; conversion = the first buy
after it. A buy without a click before it implies one at its time, as a conversion without a click does not exist in the
model. Each goes to the latest impression of that user and item within the attribution window.

Events of one second have no order among themselves that could be trusted: features count only earlier seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import numpy as np

from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.replay import (
    Action,
    Counts,
    FeatureUpdate,
    FeedbackEvent,
    Layouts,
    Replay,
    ReplayOptions,
    ReplayReport,
    Request,
    unique,
)
from stream_scorer.embedded.taobao_rows import BUY, PV, Row, rows_in_order

RECENT = 8
ATTRIBUTION_S = 3 * 86_400
CHINA_S = 8 * 3_600  # the shop's time zone
POOL = 5_000  # items seen lately, to draw further candidates from

TAOBAO_TOML = f"""\
[[features]]
name = "user_id"
kind = "sparse"
source = "user"
vocabulary_size = 65536
embedding_dim = 8
use_hash = true

[[features]]
name = "recent_categories"
kind = "varlen"
source = "user"
vocabulary_size = 16384
embedding_dim = 8
embedding_name = "category_id"
use_hash = true
maxlen = {RECENT}
combiner = "mean"

[[features]]
name = "user_counts"
kind = "dense"
source = "user"
dimension = 4

[[features]]
name = "item_id"
kind = "sparse"
source = "item"
vocabulary_size = 65536
embedding_dim = 8
use_hash = true

[[features]]
name = "category_id"
kind = "sparse"
source = "item"
vocabulary_size = 16384
embedding_dim = 8
use_hash = true

[[features]]
name = "item_counts"
kind = "dense"
source = "item"
dimension = 4

[[features]]
name = "hour"
kind = "sparse"
source = "context"
vocabulary_size = 24
embedding_dim = 4
"""


def taobao(path: Path, layouts: Layouts, options: ReplayOptions | None = None) -> Replay:
    """Replay ``path``, plain or gzipped; `ConfigurationError` in one line when it is not such a log.

    See `stream_scorer.embedded.taobao_rows.rows_in_order` for files that are not sorted by time.
    """
    options = options or ReplayOptions()
    report = ReplayReport()
    rows = rows_in_order(path, report, options)
    first = next(rows)
    report.first_ms = first.second * 1_000
    funnel = _Funnel(layouts, options, report)
    return Replay("taobao", TAOBAO_TOML, report.first_ms, report, funnel.actions(chain([first], rows)))


@dataclass
class _Shown:
    """The latest impression of one user and item."""

    request_id: str
    second: int
    clicked: bool = False
    bought: bool = False


@dataclass
class _Funnel:
    layouts: Layouts
    options: ReplayOptions
    report: ReplayReport
    users: Counts = field(default_factory=lambda: Counts(counts=4, recent=RECENT, clean=1, id=1))
    items: Counts = field(default_factory=lambda: Counts(counts=4, category=1, clean=1, id=1))
    shown: dict[tuple[int, int], _Shown] = field(default_factory=dict)
    ages: deque[tuple[int, tuple[int, int]]] = field(default_factory=deque)
    pool: deque[int] = field(default_factory=lambda: deque(maxlen=POOL))

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.options.seed)

    def actions(self, rows: Iterable[Row]) -> Iterator[Action]:
        for second, group in groupby(rows, key=lambda row: row.second):
            events = list(group)
            self.report.last_ms = second * 1_000
            at_ms = self.options.retime(second * 1_000)
            self._forget(second - ATTRIBUTION_S)
            requests = [(row, self._candidates(row)) for row in events if row.behaviour == PV]
            if requests:
                yield from self._updates(at_ms, requests)
            wanted = iter(requests)
            for row in events:
                if row.behaviour == PV:
                    yield from self._impression(at_ms, *next(wanted))
                else:
                    yield from self._reaction(at_ms, row)
            for row in events:
                self._learn(row)

    def _forget(self, before: int) -> None:
        while self.ages and self.ages[0][0] < before:
            second, key = self.ages.popleft()
            if key in self.shown and self.shown[key].second == second:
                del self.shown[key]

    def _candidates(self, row: Row) -> list[int]:
        """The item, and others seen before, in no particular order."""
        at = self.items.row(row.item)
        self.items["id"][at], self.items["category"][at] = row.item, row.category
        others = min(self.options.candidates - 1, len(self.pool))
        if others < 1:
            return [row.item]
        picked = self.rng.integers(0, len(self.pool), 2 * others)
        chosen = [item for item in unique([self.pool[at] for at in picked.tolist()]) if item != row.item][:others]
        chosen.insert(int(self.rng.integers(0, len(chosen) + 1)), row.item)
        return chosen

    def _updates(self, at_ms: int, requests: list[tuple[Row, list[int]]]) -> Iterator[Action]:
        users = [user for user in unique([row.user for row, _ in requests]) if self._is_stale(self.users, user)]
        if users:
            at = np.array([self.users.row(user) for user in users])
            self.users["id"][at, 0] = users
            values = {
                "user_id": self.users["id"][at],
                "recent_categories": self.users["recent"][at],
                "user_counts": np.log1p(self.users["counts"][at]),
            }
            self.users["clean"][at] = 1
            block = fill(self.layouts.user, len(users), values)
            yield FeatureUpdate(at_ms, "user", [f"u{user}" for user in users], block)
        items = [item for item in unique([i for _, c in requests for i in c]) if self._is_stale(self.items, item)]
        if items:
            at = np.array([self.items.row(item) for item in items])
            values = {
                "item_id": self.items["id"][at],
                "category_id": self.items["category"][at],
                "item_counts": np.log1p(self.items["counts"][at]),
            }
            self.items["clean"][at] = 1
            block = fill(self.layouts.item, len(items), values)
            yield FeatureUpdate(at_ms, "item", [f"i{item}" for item in items], block)

    @staticmethod
    def _is_stale(table: Counts, key: int) -> bool:
        at = table.row(key)  # may grow the table: before it is looked into
        return not table["clean"][at, 0]

    def _impression(self, at_ms: int, row: Row, candidates: list[int]) -> Iterator[Action]:
        request_id = f"tb-{row.number}"
        hour = (row.second + CHINA_S) // 3_600 % 24
        message = ScoreRequest(
            request_id=request_id,
            user_id=f"u{row.user}",
            items=[f"i{item}" for item in candidates],
            ts=at_ms,
            context={"hour": hour},
        )
        self.report.requests += 1
        yield Request(at_ms, message)
        key = (row.user, row.item)
        self.shown[key] = _Shown(request_id, row.second)
        self.ages.append((row.second, key))
        self.report.impressions += 1
        yield self._feedback(at_ms, "impression", request_id, row)

    def _reaction(self, at_ms: int, row: Row) -> Iterator[Action]:
        shown = self.shown.get((row.user, row.item))
        if shown is None or (shown.bought if row.behaviour == BUY else shown.clicked):
            self.report.unattributed += 1
            return
        if not shown.clicked:
            shown.clicked = True
            self.report.clicks += 1
            self.report.clicks_implied += row.behaviour == BUY
            yield self._feedback(at_ms, "click", shown.request_id, row)
        if row.behaviour == BUY:
            shown.bought = True
            self.report.conversions += 1
            yield self._feedback(at_ms, "conversion", shown.request_id, row)

    @staticmethod
    def _feedback(
        at_ms: int, kind: Literal["impression", "click", "conversion"], request_id: str, row: Row
    ) -> FeedbackEvent:
        message = Feedback(
            event_id=f"{request_id}:{kind}",
            kind=kind,
            request_id=request_id,
            user_id=f"u{row.user}",
            item_id=f"i{row.item}",
            ts=at_ms,
        )
        return FeedbackEvent(at_ms, message)

    def _learn(self, row: Row) -> None:
        user, item = self.users.row(row.user), self.items.row(row.item)
        self.users["counts"][user, row.behaviour] += 1
        self.items["counts"][item, row.behaviour] += 1
        recent = self.users["recent"][user]
        recent[1:] = recent[:-1].copy()
        recent[0] = row.category
        self.users["clean"][user] = self.items["clean"][item] = 0
        self.pool.append(row.item)
