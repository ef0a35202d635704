"""Delayed-feedback methods side by side on a drifting market with known truth: ``python -m tests.bench.learning``.

For each delay setting and seed: pretraining on matured labels, a gap of one attribution window (so those labels are as
old as they would be), then a stream: a warm-up and a test period. Every hour of the test period is predicted before the
rows emitted in it are learned. All methods see the same impressions and start from the same pretrained state; each has
the learning rate that was best for it, by CTCVR log loss, on other seeds.

Writes build/bench/learning.csv (against eventual labels), learning_truth.csv (the same, each label replaced by the
probability it was drawn from: no label noise), learning_sync.csv and learning.svg. ``--quick``: one setting, two seeds,
no tuning. RI is relative improvement: 0 is the frozen pretrained model, 100 the oracle, which knows the future.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from esmm.delay import DEFAULT, METHODS
from tests.bench import learning_report as report
from tests.bench.learning_stream import measure, pretrain, run, sync_intervals
from tests.bench.learning_world import SETTINGS, Plan, make_world

RATES = (0.5, 1.0, 2.0)  # of the trainer's default learning rates, dense and embedding alike
TEST_SEEDS, TUNING_SEEDS = (11, 12, 13, 14, 15), (101, 102)
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Cell:
    """One world, and which methods to run on it at which rates."""

    setting: str
    seed: int
    plan: Plan
    trials: tuple[tuple[str, float], ...]
    sync_rate: float | None = None

    @property
    def cost(self) -> float:
        """Longest first keeps both processors busy to the end."""
        return len(self.trials) + SETTINGS[self.setting].window_h / 100 + (4 if self.sync_rate else 0)


def work(cell: Cell) -> report.Measured:
    """Everything about one cell; runs in a process of its own."""
    world = make_world(SETTINGS[cell.setting], cell.seed, cell.plan)
    found, sync = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        start = pretrain(world, cell.seed, Path(folder))
        for method, rate in cell.trials:
            name = None if method == PRETRAINED else method
            found[method, rate] = measure(world, run(world, name, rate, cell.seed, start))
        if cell.sync_rate is not None:
            served = sync_intervals(world, DEFAULT, cell.sync_rate, cell.seed, start)
            sync = {interval: measure(world, predicted)["truth"] for interval, predicted in served.items()}
    return report.Measured(cell.setting, cell.seed, found, sync)


def tuned(pool: Iterator[report.Measured]) -> dict[tuple[str, str], float]:
    """(setting, method) -> the rate of the lowest mean CTCVR log loss."""
    losses: dict[tuple[str, str], dict[float, list[float]]] = {}
    for done in pool:
        for (method, rate), by in done.found.items():
            losses.setdefault((done.setting, method), {}).setdefault(rate, []).append(by["truth"]["ctcvr"]["nll"])
    return {key: min(by_rate, key=lambda rate: sum(by_rate[rate])) for key, by_rate in losses.items()}


def test_cells(settings: list[str], seeds: tuple[int, ...], plan: Plan, rates: dict[tuple[str, str], float]) -> list:
    return [
        Cell(
            setting,
            seed,
            plan,
            ((PRETRAINED, 1.0), *((method, rates.get((setting, method), 1.0)) for method in METHODS)),
            rates.get((setting, DEFAULT), 1.0) if setting == "default" else None,
        )
        for setting, seed in itertools.product(settings, seeds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, two seeds, no tuning: one to two minutes")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(TEST_SEEDS))
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    settings, seeds, plan = options.settings, tuple(options.seeds), Plan()
    if options.quick:
        settings, seeds, plan = ["default"], seeds[:2], Plan(pretrain=48, warm_up=24, test=24)
    started, rates = time.monotonic(), {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        if not options.quick:
            trials = tuple(itertools.product(METHODS, RATES))
            short = replace(plan, pretrain=48, warm_up=18, test=18)
            cells = [Cell(s, seed, short, trials) for s, seed in itertools.product(settings, TUNING_SEEDS)]
            rates = tuned(pool.map(work, sorted(cells, key=lambda cell: -cell.cost)))
            print(f"tuned in {time.monotonic() - started:.0f} s on seeds {TUNING_SEEDS}", flush=True)
        cells = test_cells(settings, seeds, plan, rates)
        done = list(pool.map(work, sorted(cells, key=lambda cell: -cell.cost)))
    options.out.mkdir(parents=True, exist_ok=True)
    report.write(options.out, done, rates)
    print(report.text(done, rates))
    print(f"{time.monotonic() - started:.0f} s, {len(seeds)} test seeds {seeds}; files in {options.out}")


if __name__ == "__main__":
    main()
