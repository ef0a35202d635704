"""Delayed-feedback methods side by side on a drifting market with known truth: ``python -m tests.bench.learning``.

For each delay setting and seed: pretraining on matured labels, a gap of one attribution window (so those labels are as
old as they would be), then a stream: a warm-up and a test period. Every hour of the test period is predicted before the
rows emitted in it are learned. All methods see the same impressions and start from the same pretrained state; each has
the learning rate that was best for it, by CTCVR log loss, on other seeds: `POWERS`, which ``--tune`` finds anew (the
search walks on while the best rate is the highest or lowest tried). Long delays have rates of their own: the faster a
model learns single items, the more it suffers from positives that come when their item is gone.

Writes build/bench/learning.csv (against eventual labels), learning_truth.csv (the same, each label replaced by the
probability it was drawn from: no label noise), learning_sync.csv, learning_days.csv, learning_facts.csv, with
``--tune`` learning_rates.csv, and learning.svg. RI is relative improvement: 0 is the frozen pretrained model, 100 the
oracle, which knows the future.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

from esmm.delay import DEFAULT, METHODS
from tests.bench import learning_criteo
from tests.bench import learning_report as report
from tests.bench.learning_stream import daily_pcoc, measure, pretrain, run, sync_intervals
from tests.bench.learning_world import SETTINGS, Plan, facts_of, make_world

RATE_STEP, RATE_LIMIT = 1.5, 9  # rates are the trainer's default learning rates times powers of the step
TEST_SEEDS, TUNING_SEEDS = (21, 22, 23, 24, 25), (101, 102)
SHORT_HOURS = 72
TUNING_HOURS = {"long": 168}  # of test: what late positives do to a rate shows there after two days only
# As the search found them on the tuning seeds, in powers of the rate step; none is the highest or lowest that was tried.
POWERS = {
    "default": {
        "oracle": 6,
        "full-wait": -1,
        "vanilla-window": 5,
        "vanilla-dup": 3,
        "fnw": 2,
        "fnc": 2,
        "es-dfm": 2,
        "mp-es-dfm": 2,
        "defer": 2,
        "defuse": 2,
        "ddfm": 2,
    },
    "long": {
        "oracle": 6,
        "full-wait": -4,
        "vanilla-window": 3,
        "vanilla-dup": -1,
        "fnw": -1,
        "fnc": -1,
        "es-dfm": -1,
        "mp-es-dfm": -1,
        "defer": 1,
        "defuse": 0,
        "ddfm": -1,
    },
}
POWERS["short"] = POWERS["default"]  # not looked for on their own
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
        return len(self.trials) + SETTINGS[self.setting].window_h / 100 + (8 if self.sync_rate else 0)


@dataclass(frozen=True)
class Search:
    """Methods whose rates one process looks for, on all tuning seeds."""

    plan: Plan
    methods: tuple[str, ...]
    setting: str = "default"
    seeds: tuple[int, ...] = field(default=TUNING_SEEDS)


def work(cell: Cell) -> report.Measured:
    """Everything about one cell; runs in a process of its own."""
    world = make_world(SETTINGS[cell.setting], cell.seed, cell.plan)
    found, days, sync = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        start = pretrain(world, cell.seed, Path(folder))
        for method, rate in cell.trials:
            predicted = run(world, None if method == PRETRAINED else method, rate, cell.seed, start)
            found[method, rate], days[method] = measure(world, predicted), daily_pcoc(world, predicted)
        if cell.sync_rate is not None:
            served = sync_intervals(world, DEFAULT, cell.sync_rate, cell.seed, start)
            sync = {interval: measure(world, predicted)["truth"] for interval, predicted in served.items()}
    return report.Measured(cell.setting, cell.seed, found, days, sync, facts_of(world))


def climb(loss: Callable[[int], float], limit: int = RATE_LIMIT) -> dict[int, float]:
    """Losses at powers of the rate step, from 1, 2 and 3 on outwards until the lowest is inside or at ``limit``."""
    losses = {power: loss(power) for power in (1, 2, 3)}
    while abs(best := min(losses, key=losses.__getitem__)) < limit and best in (min(losses), max(losses)):
        outward = best - 1 if best == min(losses) else best + 1
        losses[outward] = loss(outward)
    return losses


def search(task: Search) -> dict[str, dict[float, float]]:
    """Method -> rate -> mean CTCVR log loss against the truth over the tuning seeds; runs in a process of its own."""
    worlds = [(seed, make_world(SETTINGS[task.setting], seed, task.plan)) for seed in task.seeds]
    tried: dict[str, dict[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        starts = [pretrain(world, seed, Path(folder, str(seed))) for seed, world in worlds]
        for method in task.methods:

            def loss(power: int, method: str = method) -> float:
                losses = []
                for (seed, world), start in zip(worlds, starts, strict=True):
                    predicted = run(world, method, RATE_STEP**power, seed, start)
                    losses.append(measure(world, predicted)["truth"]["ctcvr"]["nll"])
                return sum(losses) / len(losses)

            tried[method] = {RATE_STEP**power: found for power, found in climb(loss).items()}
    return tried


def cells_of(settings: list[str], seeds: tuple[int, ...], plan: Plan, rates: report.Rates) -> list[Cell]:
    """A cell a setting and seed, with every method at its rate there."""
    cells = []
    for setting, seed in itertools.product(settings, seeds):
        trials = ((PRETRAINED, 1.0), *((method, rates[setting][method]) for method in METHODS))
        cells.append(Cell(setting, seed, plan, trials, rates[setting][DEFAULT] if setting == "default" else None))
    return cells


def searches(settings: list[str], plan: Plan, processes: int) -> list[Search]:
    """The methods of every setting, shared out."""
    names = tuple(METHODS)
    shares = [names[at::processes] for at in range(min(processes, len(names)))]
    plans = {setting: replace(plan, test=TUNING_HOURS.get(setting, SHORT_HOURS)) for setting in settings}
    return [Search(plans[setting], share, setting) for setting in settings for share in shares]


def main() -> None:
    """Tune, test, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one setting, two seeds, two days: about a minute")
    parser.add_argument("--tune", action="store_true", help="look for the rates anew, instead of those in this file")
    parser.add_argument("--week", type=float, default=0.0, help="a weekly wave of all buying, log odds: see the lag")
    parser.add_argument("--churn", type=float, default=Plan.churn, help="items an hour that leave for new ones, of 600")
    parser.add_argument("--criteo", type=Path, metavar="FILE", help="Criteo's data.txt instead; see learning_criteo.py")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(TEST_SEEDS))
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    if options.criteo:
        learning_criteo.main(options.criteo, options.out)
        return
    if set(options.seeds) & set(TUNING_SEEDS):
        parser.error(f"seeds {TUNING_SEEDS} are those that rates are tuned on")
    settings, seeds, plan = options.settings, tuple(options.seeds), Plan(week=options.week, churn=options.churn)
    if options.quick:
        settings, seeds, plan = ["default"], seeds[:2], replace(plan, pretrain=48, test=48)
    started = time.monotonic()
    tried: report.Tried = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        if options.tune:
            tasks = searches(settings, plan, options.processes)
            for task, part in zip(tasks, pool.map(search, tasks), strict=True):
                tried.setdefault(task.setting, {}).update(part)
            print(f"tuned in {time.monotonic() - started:.0f} s on seeds {TUNING_SEEDS}", flush=True)
        rates = {name: {method: RATE_STEP**power for method, power in of.items()} for name, of in POWERS.items()}
        for setting, of in tried.items():
            rates[setting] = {method: min(losses, key=losses.__getitem__) for method, losses in of.items()}
        cells = cells_of(settings, seeds, plan, rates)
        done = list(pool.map(work, sorted(cells, key=lambda cell: -cell.cost)))
    options.out.mkdir(parents=True, exist_ok=True)
    report.write(options.out, done, tried)
    print(report.text(done, rates, tried))
    print(f"{time.monotonic() - started:.0f} s, {len(seeds)} test seeds {seeds}; files in {options.out}")


if __name__ == "__main__":
    main()
