"""How the rate depends on candidates a request, catalogue size, popularity and the cache; one run a point."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tests.bench.speed import measure, report
from tests.bench.speed.contenders import ours
from tests.bench.speed.world import Workload, world

MEGABYTES_OF_REQUESTS = 160


def points() -> list[tuple[str, Workload, dict[str, object]]]:
    """(name, workload, settings of redis)."""
    out: list[tuple[str, Workload, dict[str, object]]] = []
    for candidates in (1, 10, 50, 200, 1000):
        count = min(400_000, MEGABYTES_OF_REQUESTS * 1_000_000 // (100 + 9 * candidates))
        out.append((f"{candidates} candidates a request", Workload(requests=count, candidates=candidates), {}))
    for catalogue in (10_000, 100_000, 1_000_000):
        for zipf in (0.0, 1.0):
            popular = "Zipf" if zipf else "uniform"
            out.append((f"{catalogue} items, {popular}", Workload(catalogue=catalogue, zipf=zipf), {}))
    large = Workload(catalogue=1_000_000, zipf=1.0)
    out.append(("1000000 items, Zipf, cache of 300000", large, {"cache_items": 300_000}))
    out.append(("10000 items, uniform, no cache", Workload(), {"cache_items": 0}))
    return out


def run(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for at, (name, workload, redis) in enumerate(points()):
        if args.only and not any(word in name for word in args.only.split(",")):
            continue
        place = folder / f"{at}"
        place.mkdir()
        with world(place, workload, [f"out-s{at}"]) as made:
            result = measure.run(made, ours(name, redis=redis), f"s{at}", args.warm, args.seconds)
        report.line(name, result)
        rows.append({"name": name, **result})
    return rows
