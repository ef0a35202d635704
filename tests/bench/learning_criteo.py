"""Criteo's conversion log through the benchmark: ``python -m tests.bench.learning --criteo data.txt``.

The published protocol (Yang et al., AAAI 2021): pretraining on the clicks of 30 days with their eventual labels, then
hour by hour all rows emitted in one hour are learned from once, and the clicks of the next are predicted. A metric is
the mean of its hourly values, weighted by clicks. First emissions wait a quarter of an hour.

Every click is an impression that was clicked at once, so pCTR is 1 and t is the conversion rate. What differs from the
published runs: our model and features, one pass of pretraining in order of time where they took five shuffled ones,
heads that go on learning, the trainer's default learning rates for all. So compare relative improvement, not AUC. As
there, pretraining knows how its last clicks will end, up to 30 days after it; no row of the stream knows its future.

Nobody could run this on the real log here: it cannot be downloaded where this was written.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from esmm.batch import FeatureBlock, concat_examples
from esmm.delay import METHODS
from esmm.features import FeatureSchema
from esmm.metrics import TaskStats
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.criteo_conversions import CRITEO_CONVERSIONS_TOML, START_MS, criteo_clicks
from stream_scorer.embedded.labelled import Row
from stream_scorer.embedded.replay import ReplayOptions, ReplayReport
from tests.bench.learning_report import relative_improvement, write_csv
from tests.bench.learning_stream import Predicted, pretrain, run
from tests.bench.learning_world import Plan, World, as_examples

PLAN, ATTRIBUTION, OBSERVATION = Plan(pretrain=720, warm_up=1, test=719), 720.0, 0.25
LEFT_OUT = ("full-wait", "vanilla-window")  # in none of the published tables
CHUNK, SEED, HOUR_MS = 50_000, 1, 3_600_000
COLUMNS = ("method", "auc", "pr_auc", "nll", "pcoc", "ri_auc", "ri_pr_auc", "ri_nll")
# Yang et al., AAAI 2021, table 1: AUC, PR-AUC, NLL.
PUBLISHED = {
    "pretrained": (0.8307, 0.6251, 0.4009),
    "oracle": (0.8450, 0.6469, 0.3868),
    "vanilla-dup": (0.8376, 0.6288, 0.4047),
    "fnw": (0.8373, 0.6313, 0.4033),
    "fnc": (0.8373, 0.6267, 0.4382),
    "es-dfm": (0.8402, 0.6393, 0.3924),
}
# Relative improvement of AUC in later papers, their own runs: Gu et al., KDD 2021; Chen et al., WWW 2022.
LATER = {"DEFER": {"defer": 90.1}, "DEFUSE": {"fnw": 35.8, "es-dfm": 46.1, "defer": 38.9, "defuse": 52.3}}


def world_of(path: Path, plan: Plan = PLAN, attribution: float = ATTRIBUTION) -> World:
    """The log's clicks as impressions; hours since the log's start. `ConfigurationError` when it is not such a log."""
    schema = FeatureSchema.from_toml(CRITEO_CONVERSIONS_TOML)
    rows = criteo_clicks(path, ReplayReport(), ReplayOptions())
    parts = []
    while chunk := list(islice(rows, CHUNK)):
        parts.append(_chunk(chunk, schema))
    at_N, converted_at_N = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    inside_N = converted_at_N <= at_N + attribution
    converted_at_N[~inside_N] = np.inf
    clicked_N, unknown_N = np.ones(len(at_N), bool), np.full(len(at_N), np.nan)
    return World(
        concat_examples([part[0] for part in parts]),
        at_N, clicked_N, at_N, inside_N, converted_at_N, clicked_N.astype(float), unknown_N, unknown_N,
        attribution, plan, schema, click_window=0.0, observation=OBSERVATION, gap=0.0,
    )  # fmt: skip


def _chunk(rows: list[Row], schema: FeatureSchema):
    """Examples, click times and conversion times (inf without)."""
    at_N = np.array([row.at_ms - START_MS for row in rows]) / HOUR_MS
    later = (np.inf if row.conversion_ms is None else row.conversion_ms - START_MS for row in rows)
    converted_at_N = np.fromiter(later, np.float64, len(rows)) / HOUR_MS
    values = {name: np.array([row.context[name] for row in rows]) for name in rows[0].context}
    none = FeatureBlock(np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), np.float32))
    return as_examples(none, none, fill(schema.layout("context"), len(rows), values)), at_N, converted_at_N


def hourly(world: World, predicted: Predicted) -> dict[str, float]:
    """AUC, PR-AUC and NLL as means of hours with both labels, weighted by clicks; PCOC of all."""
    label_N = world.converted_N[predicted.low : predicted.low + len(predicted.ctcvr_N)]
    hour_N = np.floor(world.at_N[predicted.low :][: len(label_N)]).astype(int)
    weights, values, total = [], [], TaskStats.empty()
    for hour in np.unique(hour_N):
        here_N = hour_N == hour
        stats = TaskStats.of(label_N[here_N], predicted.ctcvr_N[here_N])
        total += stats
        if 0 < stats.positives < stats.rows:
            weights.append(stats.rows)
            values.append((stats.auc(), stats.pr_auc(), stats.logloss()))
    auc, pr_auc, nll = np.average(values, axis=0, weights=weights).tolist()
    return {"auc": auc, "pr_auc": pr_auc, "nll": nll, "pcoc": total.pcoc()}


def compare(world: World) -> Iterator[dict[str, object]]:
    """A row a method, pretrained and oracle first; needs both for relative improvement."""
    with tempfile.TemporaryDirectory() as folder:
        start = pretrain(world, SEED, Path(folder))
        by: dict[str, dict[str, float]] = {}
        for method in chain(["pretrained"], (name for name in METHODS if name not in LEFT_OUT)):
            by[method] = hourly(world, run(world, None if method == "pretrained" else method, 1.0, SEED, start))
            if method == "pretrained":
                continue
            for name in ("pretrained", "oracle") if method == "oracle" else (method,):
                yield {"method": name, **by[name], **improvements(by[name], by["pretrained"], by["oracle"])}


def improvements(found: dict[str, float], low: dict[str, float], high: dict[str, float]) -> dict[str, float]:
    """RI in %; + 0.0 makes a negative zero positive."""
    return {f"ri_{m}": relative_improvement(found[m], low[m], high[m]) + 0.0 for m in ("auc", "pr_auc", "nll")}


def line(row: dict[str, object]) -> str:
    """Ours, then the published values of the same method, - where there are none."""
    method = str(row["method"])
    cells = [f"{float(row[name]):.4f}" for name in COLUMNS[1:5]] + [f"{float(row[name]):.1f}" for name in COLUMNS[5:]]
    theirs = ["-"] * 6
    if method in PUBLISHED:
        published = {m: dict(zip(("auc", "pr_auc", "nll"), v, strict=True)) for m, v in PUBLISHED.items()}
        ri = improvements(published[method], published["pretrained"], published["oracle"])
        theirs = [f"{v:.4f}" for v in PUBLISHED[method]] + [f"{v:.1f}" for v in ri.values()]
    later = [f"{of[method]:.1f}" if method in of else "-" for of in LATER.values()]
    return f"{method:<12}" + "".join(f"{cell:>9}" for cell in cells) + " |" + "".join(f"{c:>8}" for c in theirs + later)


def main(path: Path, out: Path) -> None:
    """Read, run, print a line a method as it is done, write learning_criteo.csv."""
    started = time.monotonic()
    world = world_of(path)
    say = f"{len(world.at_N)} clicks, {world.converted_N.sum()} converted within {world.attribution:.0f} h, one seed"
    print(f"{path}: {say}; right of the bar: published (ES-DFM's paper; RI-AUC in DEFER's and DEFUSE's)")
    heads = ("AUC", "PR-AUC", "NLL", "RI-AUC", "RI-PR", "RI-NLL")
    print(f"{'':<12}" + "".join(f"{h:>9}" for h in (*heads[:3], "PCOC", *heads[3:])), end=" |")
    print("".join(f"{h:>8}" for h in (*heads, *LATER)), flush=True)
    rows = []
    for row in compare(world):
        rows.append(row)
        print(line(row), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "learning_criteo.csv", COLUMNS, rows)
    print(f"{time.monotonic() - started:.0f} s; learning_criteo.csv in {out}")
