"""The predictor alone, one thread: ``python -m tests.bench.predictor``.

200 requests of 50 candidates, 80 floats per user and per item, towers (256, 128), 10,000 items, all of them cached.
Contenders take turns, so that whatever else the machine does reaches all alike; only ratios within one run count.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from esmm.batch import FeatureBlock, RankBatch
from esmm.features import DenseFeat, FeatureSchema
from esmm.model import ESMM
from esmm.predictor.config import PredictorConfig
from esmm.predictor.fast import FastPredictor
from esmm.predictor.plain import PlainPredictor
from esmm.predictor.precision import precision_error, processor_flags, supports_bfloat16

REQUESTS, CANDIDATES, CATALOGUE, FLOATS, TOWERS = 200, 50, 10_000, 80, (256, 128)
ROWS = REQUESTS * CANDIDATES
LIMIT_ROWS = 1024  # of one product in the limit: the size that runs fastest, so the strictest limit
BATCHES = 8


def make_batches(context: int, seed: int = 0) -> tuple[ESMM, list[RankBatch]]:
    """A model with random weights, and batches of random users and uniformly popular items."""
    rng = np.random.default_rng(seed)
    columns = [DenseFeat("user", FLOATS, source="user"), DenseFeat("item", FLOATS, source="item")]
    schema = FeatureSchema([*columns, *([DenseFeat("context", context)] if context else [])])
    model = ESMM(schema, TOWERS, init_std=0.05)
    items_ND = rng.standard_normal((CATALOGUE, FLOATS), np.float32)
    batches = []
    for _ in range(BATCHES):
        picked, item_of_B = np.unique(rng.integers(0, CATALOGUE, ROWS), return_inverse=True)
        batches.append(
            RankBatch(
                block(rng.standard_normal((REQUESTS, FLOATS), np.float32)),
                block(items_ND[picked]),
                block(rng.standard_normal((ROWS, context), np.float32)),
                np.repeat(np.arange(REQUESTS), CANDIDATES),
                item_of_B,
                picked,
                np.ones(len(picked), np.int64),
            )
        )
    return model, batches


def block(dense_ND: np.ndarray) -> FeatureBlock:
    return FeatureBlock(np.zeros((len(dense_ND), 0), np.int64), dense_ND)


def matrix_limit(dtype: torch.dtype) -> Callable[[RankBatch], None]:
    """Nothing but the products from the second layer on, both towers."""
    widths = [*TOWERS, 1]
    shapes = list(zip(widths[:-1], widths[1:], strict=True))
    layers = [
        [
            (
                torch.randn(LIMIT_ROWS, a, dtype=dtype),
                torch.randn(a, b, dtype=dtype),
                torch.empty(LIMIT_ROWS, b, dtype=dtype),
            )
        ]
        * 2
        for a, b in shapes
    ]

    def run(_: RankBatch) -> None:
        for _ in range(0, ROWS - LIMIT_ROWS // 2, LIMIT_ROWS):
            for towers in layers:
                for x, w, out in towers:
                    torch.mm(x, w, out=out)

    return run


def contenders(
    model: ESMM, batches: list[RankBatch], compiled: bool
) -> tuple[dict[str, Callable], list[FastPredictor]]:
    plain, fast = PlainPredictor(model, 1), {}
    packed = {}
    for batch in batches:
        user, item = batch.user.take(batch.user_of_B), batch.item.take(batch.item_of_B)
        packed[id(batch)] = torch.from_numpy(np.concatenate([user.dense_ND, item.dense_ND, batch.context.dense_ND], 1))
    precisions = ["float32", *(["bfloat16"] if supports_bfloat16() else [])]
    for precision in precisions:
        for kind in ["eager", *(["compiled"] if compiled else [])]:
            predictor = FastPredictor(model, 1, PredictorConfig(precision=precision, compile=kind == "compiled"))
            predictor.warm()
            fast[f"fast {precision} {kind}"] = predictor
    names = {
        "ESMM.forward": lambda batch: model(packed[id(batch)]),
        "plain predictor": plain.logits,
        "limit float32": matrix_limit(torch.float32),
        **({"limit bfloat16": matrix_limit(torch.bfloat16)} if "bfloat16" in precisions else {}),
        **{name: predictor.logits for name, predictor in fast.items()},
    }
    return names, list(fast.values())


def measure(names: dict[str, Callable], batches: list[RankBatch], seconds: float) -> dict[str, list[float]]:
    """Rows a second of each contender, a sample a turn, for about ``seconds`` each."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for batch in batches:  # fills the caches
            names[name](batch)
    spent = 0.0
    while spent < seconds:
        started = time.perf_counter()
        for name, run in names.items():
            begin = time.perf_counter()
            for batch in batches:
                run(batch)
            rates[name].append(len(batches) * ROWS / (time.perf_counter() - begin))
        spent += (time.perf_counter() - started) / len(names)
    return rates


def table(rates: dict[str, list[float]]) -> list[dict[str, object]]:
    """Each contender's minimum, median and maximum, and the median of its ratios to the limit beside it."""
    rows = []
    for name, values in rates.items():
        limit = rates["limit bfloat16" if "bfloat16" in name else "limit float32"]
        ratio = statistics.median(a / b for a, b in zip(values, limit, strict=True))
        low, middle, high = min(values), statistics.median(values), max(values)
        rows.append({"name": name, "min": low, "median": middle, "max": high, "of_limit": ratio})
    return rows


def profile(predictor: FastPredictor, batches: list[RankBatch]) -> str:
    """Where a batch's time goes, by operation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for batch in batches * 3:
            predictor._logits(predictor._prepare(batch))
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each contender")
    parser.add_argument("--context", type=int, default=0, help="floats of context a row")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, batches = make_batches(arguments.context)
    names, predictors = contenders(model, batches, arguments.compiled)
    rates = table(measure(names, batches, arguments.seconds))
    flags = sorted(f for f in processor_flags() if f.startswith(("avx512", "amx", "avx2")))
    print(f"{processor()}, torch {torch.__version__}, one thread; flags {' '.join(flags)}")
    print(f"{'':28}{'min':>9}{'median':>9}{'max':>9}   thousand candidates a second; share of the limit beside it")
    for row in rates:
        numbers = "".join(f"{row[key] / 1e3:9.0f}" for key in ("min", "median", "max"))
        print(f"{row['name']:28}{numbers}   {row['of_limit']:.2f}")
    errors = {}
    for predictor in predictors:
        errors[predictor.config.precision] = precision_error(predictor, PlainPredictor(model, 1), batches[0])
        print(predictor.config.precision, errors[predictor.config.precision]._asdict())
        if arguments.profile:
            print(profile(predictor, batches))
        predictor.close()
    if arguments.json:
        arguments.json.write_text(json.dumps({"processor": processor(), "flags": flags, "rates": rates}, indent=2))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
