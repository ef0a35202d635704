r"""Ali-CCP (Ma et al., SIGIR 2018): impressions of Taobao's recommendation with click and purchase.

``sample_skeleton_*.csv`` holds a line an impression: sample, click, buy, index of the common features, number of
features, features. ``common_features_*.csv`` beside it holds what samples share: index, number of features, features.

The log has no times. Lines are said to be `STEP_MS` apart, a click `CLICK_MS` after its impression, a purchase `BUY_MS`
after that: good for learning from, not for measuring delays. The common index is the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.messages import ContextValue
from stream_scorer.embedded.ali_ccp_shared import CommonFeatures, Features, parse_features
from stream_scorer.embedded.labelled import LabelledReplay, Line, Problem, Row, Values, usable
from stream_scorer.embedded.replay import (
    PROGRESS_ROWS,
    Action,
    Layouts,
    Lines,
    Replay,
    ReplayOptions,
    ReplayReport,
    refuse_mostly_dirty,
)
from stream_scorer.embedded.schema_text import dense, sparse

START_MS, STEP_MS, CLICK_MS, BUY_MS = 1_500_000_000_000, 10, 1_000, 10_000
SKELETON, COMMON = "sample_skeleton", "common_features"
USER_IDS = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
USER_HISTORIES = ("109_14", "110_14", "127_14", "150_14")  # categories, shops, brands, intents
ITEM_IDS = ("205", "206", "207", "216")  # item, category, shop, brand
ITEM_HISTORIES = ("210",)  # intents
PLACE, CROSSES = "301", ("508", "509", "702", "853")  # where it was shown; user by item, with a value
HISTORY, INTENTS, PEEK_ROWS = 20, 8, 2_000
_HINT = "a sample skeleton has the columns sample, click, buy, common index, number of features, features"


def _varlen(name: str, source: str, size: int, maxlen: int) -> str:
    return (
        f'[[features]]\nname = "f{name}"\nkind = "varlen"\nsource = "{source}"\nvocabulary_size = {size}\n'
        f'embedding_dim = 8\nuse_hash = true\nmaxlen = {maxlen}\ncombiner = "mean"\n\n'
    )


ALI_CCP_TOML = "".join(
    (
        *(sparse(f"f{name}", "user", 262_144 if name == "101" else 1_024) for name in USER_IDS),
        *(_varlen(name, "user", 65_536, HISTORY) for name in USER_HISTORIES),
        *(sparse(f"f{name}", "item", 262_144 if name == "205" else 65_536) for name in ITEM_IDS),
        *(_varlen(name, "item", 65_536, INTENTS) for name in ITEM_HISTORIES),
        sparse(f"f{PLACE}", "context", 64),
        *(sparse(f"f{name}", "context", 65_536) for name in CROSSES),
        dense("crosses", "context", len(CROSSES)),
    )
)


def ali_ccp(path: Path, layouts: Layouts, options: ReplayOptions | None = None) -> Replay:
    """Replay a sample skeleton, plain or gzipped, with the common features beside it; `ConfigurationError` in a line.

    The common features are put into a temporary database first, as they do not fit into memory.
    """
    options, report = options or ReplayOptions(), ReplayReport()
    lines = _lines(path, report, options)
    head = list(islice(lines, PEEK_ROWS))
    refuse_mostly_dirty(path, report, _HINT)
    common = CommonFeatures(_beside(path), report)
    log = _Log(common)
    rows = usable(chain(head, lines), report, log.parse)
    first = next(rows, None)
    if first is None:
        common.close()
        raise ConfigurationError(f"{path}: none of the {report.rows} rows can be used; {_HINT}")
    report.first_ms = first.at_ms
    replay = LabelledReplay("ali", layouts, options, report)
    actions = _closing(replay.actions(chain([first], rows)), common)
    return Replay("ali-ccp", ALI_CCP_TOML, first.at_ms, report, actions)


def _closing(actions: Iterator[Action], common: CommonFeatures) -> Iterator[Action]:
    try:
        yield from actions
    finally:
        common.close()


def _beside(path: Path) -> Path:
    name = path.name.replace(SKELETON, COMMON)
    if name == path.name:
        raise ConfigurationError(f"{path} must be named {SKELETON}_*.csv, so that {COMMON}_*.csv is found beside it")
    plain = name.removesuffix(".gz")
    for candidate in (path.with_name(plain), path.with_name(f"{plain}.gz")):
        if candidate.exists():
            return candidate
    raise ConfigurationError(f"{path.with_name(plain)}[.gz] is missing: it holds the users' features of {path.name}")


def _lines(path: Path, report: ReplayReport, options: ReplayOptions) -> Iterator[Line]:
    lines = Lines(path)
    for number, text in enumerate(lines, 1):
        report.rows = number
        if number % PROGRESS_ROWS == 0:
            options.progress(number, lines.share)
        if text.count(",") == 5:
            yield Line(number, number, text)
        else:
            report.leave_out("columns", number)
        if number == options.limit:
            break
    options.progress(report.rows, 1.0)


class _Log:
    """Samples with their common features."""

    def __init__(self, common: CommonFeatures) -> None:
        self._common = common

    def parse(self, line: Line) -> Row | Problem:
        _, click, buy, index, count, text = line.text.split(",")
        if (click, buy) not in (("0", "0"), ("1", "0"), ("1", "1")):
            return Problem("label")
        own = parse_features(text, count)
        if own is None:
            return Problem("features")
        common = self._common.get(index)
        if common is None:
            return Problem("common-index")
        if "205" not in own:
            return Problem("item")
        at_ms = START_MS + STEP_MS * line.number
        return Row(
            line.number,
            at_ms,
            f"u{index}",
            f"i{own['205'][0][0]}",
            _values(common, USER_IDS, USER_HISTORIES, HISTORY),
            _values(own, ITEM_IDS, ITEM_HISTORIES, INTENTS),
            _context(own),
            at_ms + CLICK_MS if click == "1" else None,
            at_ms + CLICK_MS + BUY_MS if buy == "1" else None,
        )


def _id(features: Features, name: str) -> int:
    return features[name][0][0] if name in features else 0


def _values(features: Features, ids: tuple[str, ...], histories: tuple[str, ...], maxlen: int) -> Values:
    """Single ids, 0 where there is none; of a history the ids of the highest values."""
    values = {f"f{name}": np.array([_id(features, name)], np.int64) for name in ids}
    for name in histories:
        best = sorted(features.get(name, []), key=lambda pair: -pair[1])[:maxlen]
        padded = np.zeros(maxlen, np.int64)
        padded[: len(best)] = [id_ for id_, _ in best]
        values[f"f{name}"] = padded
    return values


def _context(features: Features) -> dict[str, ContextValue]:
    context: dict[str, ContextValue] = {f"f{name}": _id(features, name) for name in (PLACE, *CROSSES)}
    context["crosses"] = [features[name][0][1] if name in features else 0.0 for name in CROSSES]
    return context
