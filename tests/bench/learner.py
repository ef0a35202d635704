"""Learner steps: what one costs, that a vocabulary does not matter, and DeepCTR-Torch's `fit` beside it.

    python -m tests.bench.learner [--rows 512] [--columns 20] [--vocabulary 1000000]

One thread unless told otherwise. Contenders take turns step by step, so that a noisy machine is as noisy for each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
import types
from collections.abc import Callable

import numpy as np
import torch

from esmm.batch import Examples, FeatureBlock, Kind
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM
from esmm.optim import RowRule

BATCHES = 20
DENSE = 40


def schema(columns: int, vocabulary: int) -> FeatureSchema:
    sparse = [SparseFeat(f"c{i}", vocabulary, 16, source=SOURCES[i % 3]) for i in range(columns)]
    return FeatureSchema([*sparse, DenseFeat("numbers", DENSE, source="item")])


def examples(of: FeatureSchema, rows: int, vocabulary: int, rng: np.random.Generator) -> Examples:
    """Skewed ids; nine first emissions in ten, one in ten of them clicked; late conversions and matured clicks."""
    blocks = []
    for source in SOURCES:
        layout = of.layout(source)
        ids = (rng.random((rows, layout.id_width)) ** 3 * vocabulary).astype(np.int64)
        blocks.append(FeatureBlock(ids, rng.standard_normal((rows, layout.dense_width)).astype(np.float32)))
    kind = rng.choice([Kind.FIRST, Kind.LATE_CONVERSION, Kind.MATURED], rows, p=[0.9, 0.04, 0.06]).astype(np.uint8)
    click = np.where(kind == Kind.FIRST, rng.random(rows) < 0.1, True)
    observed = click & (kind != Kind.LATE_CONVERSION) & (rng.random(rows) < 0.2)
    conversion = observed | (kind == Kind.LATE_CONVERSION)
    labels = (column.astype(np.float32) for column in (click, conversion, observed))
    zeros = np.zeros(rows)
    served, counts = zeros.astype(np.float32), zeros.astype(np.int64)
    return Examples(*blocks, kind, *labels, served, served, counts, counts)


def ours(rows: int, columns: int, vocabulary: int, optimiser: str, threads: int) -> Callable[[int], object]:
    of, rng = schema(columns, vocabulary), np.random.default_rng(0)
    config = LearnerConfig(embedding=RowRule(optimiser), threads=threads)
    learner = Learner(ESMM(of, init_std=0.01), config, lambda *_: None)
    batches = [examples(of, rows, vocabulary, rng) for _ in range(BATCHES)]
    return lambda step: learner.step(batches[step % BATCHES])


def deepctr(rows: int, columns: int, vocabulary: int) -> Callable[[int], object]:
    """One `fit` call a step, one batch each: its set-up (tensors, a loader) is part of the price of streaming with it."""
    answer = types.SimpleNamespace(status_code=0)  # on import it asks a package index for updates, through `requests`
    sys.modules["requests"] = types.SimpleNamespace(get=lambda _: answer, codes=types.SimpleNamespace(ok=200))
    theirs = importlib.import_module("deepctr_torch.models.multitask.esmm")
    inputs = importlib.import_module("deepctr_torch.inputs")
    features = [inputs.SparseFeat(f"c{i}", vocabulary, 16) for i in range(columns)]
    features.append(inputs.DenseFeat("numbers", DENSE))
    model = theirs.ESMM(features, task_types=["binary", "binary"], task_names=["ctr", "ctcvr"], device="cpu")
    model.compile("adam", loss=["binary_crossentropy", "binary_crossentropy"])
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        x = {f"c{i}": (rng.random(rows) ** 3 * vocabulary).astype(np.int64) for i in range(columns)}
        click = rng.random(rows) < 0.1
        y = np.stack([click, click & (rng.random(rows) < 0.2)], 1).astype(np.float32)
        batches.append((x | {"numbers": rng.standard_normal((rows, DENSE)).astype(np.float32)}, y))

    def step(number: int) -> None:
        with contextlib.redirect_stdout(None):  # it prints three lines a call
            model.fit(*batches[number % BATCHES], batch_size=rows, epochs=1, verbose=0, shuffle=False)

    return step


def compare(contenders: dict[str, Callable[[int], object]], steps: int, rows: int) -> None:
    """Median and best wall time a step, contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(-max(2, steps // 4), steps):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(step)
            if step >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    for name, ms in times.items():
        median, best = float(np.median(ms)), min(ms)
        print(
            f"{name:44} {median:9.2f} ms a step (best {best:9.2f})  {rows / median * 1e3:9.0f} examples/s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 512), ("columns", 20), ("vocabulary", 1_000_000), ("steps", 60), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.rows} rows, {args.columns} columns of width 16, {DENSE} numbers, towers 256-128")
    for optimiser in ("adagrad", "lazy-adam"):
        one = {  # two columns each: twenty million rows of width 16 are 1.3 GB
            f"{optimiser}, 2 columns x {size:,} ids": ours(args.rows, 2, size, optimiser, args.threads)
            for size in (10_000, 10_000_000)
        }
        compare(one, args.steps, args.rows)
        del one
    compare({f"ours, {args.rows * 8} rows a step": ours(args.rows * 8, args.columns, args.vocabulary, "adagrad", args.threads)},
            max(args.steps // 8, 5), args.rows * 8)  # fmt: skip
    both = {
        "stream-scorer": ours(args.rows, args.columns, args.vocabulary, "adagrad", args.threads),
        "deepctr-torch 0.3.0 fit, adam": deepctr(args.rows, args.columns, args.vocabulary),
    }
    compare(both, max(args.steps // 6, 5), args.rows)


if __name__ == "__main__":
    main()
