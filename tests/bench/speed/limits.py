"""What one compute thread reaches alone: the predictor on batches in memory, and nothing but matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from esmm.batch import FeatureBlock, RankBatch
from esmm.predictor.config import PredictorConfig
from esmm.predictor.fast import FastPredictor
from tests.bench.speed.world import TOWERS, World

ROWS = 10_000
LIMIT_ROWS = 1024  # of one product: the size that runs fastest, so the strictest limit
BATCHES = 8


def rate(run: Callable[[], int], seconds: float) -> float:
    """Rows a second of ``run``, which says how many it did."""
    for _ in range(3):
        run()
    rows, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        rows += run()
    return rows / (time.perf_counter() - started)


def predictor(world: World, precision: str, seconds: float) -> float:
    """The predictor as the scorer runs it, two batches in flight."""
    config = PredictorConfig(precision=precision)
    made = FastPredictor(world.model, 1, config)
    made.warm()
    batches = _batches(world)
    at = 0

    def run() -> int:
        nonlocal at
        pending = made.launch(batches[0])
        for _ in range(len(batches)):
            at = (at + 1) % len(batches)
            following = made.launch(batches[at])
            made.collect(pending)
            pending = following
        made.collect(pending)
        return ROWS * (len(batches) + 1)

    try:
        return rate(run, seconds)
    finally:
        made.close()


def products(dtype: torch.dtype, seconds: float) -> float:
    """Both towers' products from the second layer on, one thread."""
    torch.set_num_threads(1)
    widths = [*TOWERS, 1]
    layers = [
        (
            torch.randn(LIMIT_ROWS, a, dtype=dtype),
            torch.randn(a, b, dtype=dtype),
            torch.empty(LIMIT_ROWS, b, dtype=dtype),
        )
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]

    def run() -> int:
        for x, w, out in layers * 2:
            torch.mm(x, w, out=out)
        return LIMIT_ROWS

    with torch.inference_mode():
        return rate(run, seconds)


def _batches(world: World) -> list[RankBatch]:
    load = world.workload
    requests = max(1, ROWS // load.candidates)
    users_R, items_RK = load.ids(requests * BATCHES, seed=5)
    out = []
    for at in range(0, len(users_R), requests):
        items, item_of_B = np.unique(items_RK[at : at + requests].reshape(-1), return_inverse=True)
        rows = len(item_of_B)
        out.append(
            RankBatch(
                _block(world.users_ND[users_R[at : at + requests]]),
                _block(world.items_ND[items]),
                _block(np.zeros((rows, 0), np.float32)),
                np.repeat(np.arange(requests), load.candidates),
                item_of_B,
                items.astype(np.int64),
                np.ones(len(items), np.int64),
            )
        )
    return out


def _block(dense_ND: np.ndarray) -> FeatureBlock:
    return FeatureBlock(np.zeros((len(dense_ND), 0), np.int64), np.ascontiguousarray(dense_ND))
