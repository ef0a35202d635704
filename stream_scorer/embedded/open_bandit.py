"""Open Bandit data (a fashion shop's impressions and clicks) as a stream: each row is a request for what was shown.

The log names no users: everybody with the same four features is one here. It has no click times either: a click is said
to come `CLICK_AFTER_MS` after its impression. There are no conversions. An item's counts are written at most once in
`REFRESH_MS` of log time, as a batch job would; they count what happened strictly before.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.open_bandit_rows import (
    ITEM_FEATURES,
    USER_FEATURES,
    Item,
    Row,
    open_logs,
    rows_in_order,
    stable_hash,
)
from stream_scorer.embedded.replay import (
    Action,
    FeatureUpdate,
    FeedbackEvent,
    Layouts,
    Replay,
    ReplayOptions,
    ReplayReport,
    Request,
)
from stream_scorer.embedded.schema_text import dense, sparse

CLICK_AFTER_MS = 1_000
REFRESH_MS = 600_000
JAPAN_MS = 9 * 3_600_000  # the shop's time zone
PRIOR_CLICKS, PRIOR_IMPRESSIONS = 0.5, 100.0  # of the smoothed click rate


OPEN_BANDIT_TOML = "".join(
    (
        *(sparse(name, "user", 1_024) for name in USER_FEATURES),
        sparse("item_id", "item", 4_096),
        dense(ITEM_FEATURES[0], "item", 1),
        *(sparse(name, "item", 1_024) for name in ITEM_FEATURES[1:]),
        dense("item_counts", "item", 3),
        sparse("position", "context", 4, hashed=False),
        dense("affinity", "context", 1),
        sparse("hour", "context", 24, hashed=False),
    )
)


def open_bandit(directory: Path, layouts: Layouts, options: ReplayOptions | None = None) -> Replay:
    """Replay every log found in ``directory``, merged by time; `ConfigurationError` in one line when there is none."""
    options = options or ReplayOptions()
    report = ReplayReport()
    logs = open_logs(directory)
    rows = rows_in_order(logs, report, options)
    first = next(rows, None)
    if first is None:
        raise ConfigurationError(f"{directory}: none of the {report.rows} rows can be used")
    report.first_ms = first.at_ms
    shop = _Shop(layouts, options, report, {log.campaign: log.items for log in logs})
    return Replay("open-bandit", OPEN_BANDIT_TOML, first.at_ms, report, shop.actions(chain([first], rows)))


@dataclass
class _Seen:
    """An item's counts, and when they were written."""

    impressions: int = 0
    clicks: int = 0
    written_ms: int | None = None


@dataclass
class _Shop:
    layouts: Layouts
    options: ReplayOptions
    report: ReplayReport
    items: dict[str, dict[int, Item]]
    seen: dict[tuple[str, int], _Seen] = field(default_factory=dict)
    users: set[str] = field(default_factory=set)
    ahead: list[tuple[int, int, bool, Row]] = field(default_factory=list)  # (when, order, is click, row): not yet past

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.options.seed)
        self.order = 0

    def actions(self, rows: Iterable[Row]) -> Iterator[Action]:
        for row in rows:
            yield from self._past(row.at_ms)
            self.report.last_ms = row.at_ms
            yield from self._request(row)
            self._later(row.at_ms, False, row)
            if row.click:
                self._later(row.at_ms + CLICK_AFTER_MS, True, row)
        yield from self._past(1 << 60)

    def _later(self, at_ms: int, click: bool, row: Row) -> None:
        self.order += 1
        heapq.heappush(self.ahead, (at_ms, self.order, click, row))

    def _past(self, before_ms: int) -> Iterator[Action]:
        """Count, and for clicks tell, what happened strictly before."""
        while self.ahead and self.ahead[0][0] < before_ms:
            at_ms, _, click, row = heapq.heappop(self.ahead)
            seen = self.seen[row.campaign, row.item]
            if click:
                seen.clicks += 1
                self.report.clicks += 1
                yield self._feedback(at_ms, "click", row)
            else:
                seen.impressions += 1

    def _request(self, row: Row) -> Iterator[Action]:
        at_ms = self.options.retime(row.at_ms)
        user = _user_name(row)
        if user not in self.users:
            self.users.add(user)
            values = {name: np.array([stable_hash(row.user[n])]) for n, name in enumerate(USER_FEATURES)}
            yield FeatureUpdate(at_ms, "user", [user], fill(self.layouts.user, 1, values))
        candidates = self._candidates(row)
        yield from self._items(at_ms, row, candidates)
        message = ScoreRequest(
            request_id=_request_id(row),
            user_id=user,
            items=[_item_name(row.campaign, item) for item in candidates],
            ts=at_ms,
            context={"hour": (row.at_ms + JAPAN_MS) // 3_600_000 % 24},
            item_context={
                "position": [row.position] * len(candidates),
                "affinity": [row.affinity[item] if item < len(row.affinity) else 0.0 for item in candidates],
            },
        )
        self.report.requests += 1
        yield Request(at_ms, message)
        self.report.impressions += 1
        yield self._feedback(row.at_ms, "impression", row)

    def _candidates(self, row: Row) -> list[int]:
        """The item shown and others of the campaign, in no particular order."""
        others = [item for item in self.items[row.campaign] if item != row.item]
        count = min(self.options.candidates - 1, len(others))
        chosen = [others[n] for n in self.rng.permutation(len(others))[:count].tolist()] if count > 0 else []
        chosen.insert(int(self.rng.integers(0, len(chosen) + 1)), row.item)
        return chosen

    def _items(self, at_ms: int, row: Row, candidates: list[int]) -> Iterator[Action]:
        due = [(item, self.seen.setdefault((row.campaign, item), _Seen())) for item in candidates]
        due = [(i, s) for i, s in due if s.written_ms is None or row.at_ms - s.written_ms >= REFRESH_MS]
        if not due:
            return
        known = [self.items[row.campaign][item] for item, _ in due]
        shown, clicks = (np.array([getattr(s, name) for _, s in due]) for name in ("impressions", "clicks"))
        rate = (clicks + PRIOR_CLICKS) / (shown + PRIOR_IMPRESSIONS)
        names = [_item_name(row.campaign, item) for item, _ in due]
        values = {
            "item_id": np.array([stable_hash(name) for name in names]),
            ITEM_FEATURES[0]: np.array([item.number for item in known]),
            **{name: np.array([item.hashes[n] for item in known]) for n, name in enumerate(ITEM_FEATURES[1:])},
            "item_counts": np.stack([np.log1p(shown), np.log1p(clicks), 100.0 * rate], axis=1),
        }
        for _, seen in due:
            seen.written_ms = row.at_ms
        yield FeatureUpdate(at_ms, "item", names, fill(self.layouts.item, len(due), values))

    def _feedback(self, log_ms: int, kind: Literal["impression", "click"], row: Row) -> FeedbackEvent:
        at_ms = self.options.retime(log_ms)
        message = Feedback(
            event_id=f"{_request_id(row)}:{kind}",
            kind=kind,
            request_id=_request_id(row),
            user_id=_user_name(row),
            item_id=_item_name(row.campaign, row.item),
            ts=at_ms,
        )
        return FeedbackEvent(at_ms, message)


def _request_id(row: Row) -> str:
    return f"ob-{row.log}-{row.number}"


def _user_name(row: Row) -> str:
    return f"c{stable_hash('/'.join(row.user)):x}"


def _item_name(campaign: str, item: int) -> str:
    return f"{campaign}:{item}"
