"""Scoring speed against peers and the machine's limit.

Every contender reads the same requests and the same features, has the same weights, and runs on the same broker and
Redis, in turns, one at a time. Rates are read from outside, by the broker's append time on each contender's own output topic,
warm-up left out. Only ratios within one run count: the machine is rarely alone.

    python -m tests.bench.speed                    the table: about 15 minutes
    python -m tests.bench.speed --only stream-scorer,predictor --repeats 1
    python -m tests.bench.speed --latency          open loop at shares of the maximum
    python -m tests.bench.speed --sweep            candidates a request, catalogue sizes, popularity, cache on and off
    python -m tests.bench.speed --served           what publishing `served` costs
    python -m tests.bench.speed --soak 10          memory over ten minutes, at --rate candidates a second
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esmm.predictor.precision import processor_flags, supports_bfloat16
from tests.bench.predictor import processor
from tests.bench.speed import latency, limits, measure, report, soak, sweeps
from tests.bench.speed.contenders import Contender, ours, standard
from tests.bench.speed.world import ROOT, Workload, World, peers_python, world

PACKAGES = ("torch", "confluent-kafka", "redis", "orjson", "numpy", "deepctr-torch", "pydantic")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, each run")
    parser.add_argument("--warm", type=float, default=3.0, help="seconds after the first output, left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=400_000)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--only", default="", help="contenders whose name holds one of these words, by comma")
    parser.add_argument("--served", action="store_true", help="also with `served` published, top 50 and top 10")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--rate", type=float, default=100_000, help="candidates a second of --soak")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a [scorer] setting of ours")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench" / "speed.json")
    return parser.parse_args()


def machine(real: bool) -> dict[str, Any]:
    flags = sorted(f for f in processor_flags() if f.startswith(("avx512", "amx", "avx2")))
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "flags": flags,
        "system": platform.platform(),
        "broker": "Apache Kafka (KAFKA_HOME)"
        if real
        else "the embedded broker, which is not Kafka: KAFKA_HOME is not set",
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def chosen(args: argparse.Namespace) -> list[Contender]:
    every = standard(supports_bfloat16())
    if args.served:
        served = {"served": True}
        every += [
            ours("stream-scorer float32, served", **served),
            ours("stream-scorer float32, served top 10", **served, served_top_k=10),
        ]
    extra = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.set)}
    if extra:
        every = [
            Contender(one.name, one.kind, one.processes, one.batch, one.threads, {**one.scorer, **extra}, one.redis)
            if one.kind == "ours"
            else one
            for one in every
        ]
    words = [word for word in args.only.split(",") if word]
    return [one for one in every if not words or any(word in one.name for word in words)]


def alone(made: World, words: str, seconds: float) -> dict[str, float]:
    """Rates of what runs inside this process."""
    out = {}
    for precision in ("float32", *(["bfloat16"] if supports_bfloat16() else [])):
        out[f"predictor alone {precision}"] = lambda precision=precision: limits.predictor(made, precision, seconds)
        out[f"matrix products {precision}"] = lambda precision=precision: limits.products(
            getattr(torch, precision), seconds
        )
    wanted = [word for word in words.split(",") if word]
    return {name: run() for name, run in out.items() if not wanted or any(word in name for word in wanted)}


def table(made: World, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, so that whatever else the machine does reaches all alike."""
    runs: dict[str, list[dict[str, Any]]] = {}
    everyone = chosen(args)
    for repeat in range(args.repeats):
        for name, value in alone(made, args.only, 3.0).items():
            runs.setdefault(name, []).append({"candidates_per_s": value})
            report.line(name, runs[name][-1])
        for at, contender in enumerate(everyone):
            result = measure.run(made, contender, f"c{at}-{repeat}", args.warm, args.seconds)
            runs.setdefault(contender.name, []).append(result)
            report.line(contender.name, result)
    return runs


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    real = bool(os.environ.get("KAFKA_HOME"))
    if not real and (args.soak or args.latency):
        print("--soak and --latency need Apache Kafka: set KAFKA_HOME")
        return 2
    everyone = chosen(args)
    if any(one.kind == "quix" for one in everyone):
        peers_python()
    workload = Workload(requests=args.requests, candidates=args.candidates)
    out: dict[str, Any] = {"command": " ".join(["python -m tests.bench.speed", *sys.argv[1:]]), **machine(real)}
    report.head(out)
    topics = [f"out-c{at}-{repeat}" for at in range(len(everyone)) for repeat in range(args.repeats)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if args.soak:
            small = replace(workload, requests=1_000)
            with world(Path(folder), small, list(soak.TOPICS)) as made:
                out["soak"] = soak.run(made, args)
                print(out["soak"])
        elif args.sweep:
            out["sweep"] = sweeps.run(Path(folder), args)
        else:
            with world(Path(folder), workload, [*topics, *latency.TOPICS]) as made:
                if args.latency:
                    out["latency"] = latency.run(made, args)
                else:
                    runs = table(made, args)
                    out["runs"] = runs
                    out["contenders"] = {
                        name: {"candidates_per_s": spread([one["candidates_per_s"] for one in values])}
                        for name, values in runs.items()
                    }
                    out["ratios"] = report.ratios(out["contenders"])
                    report.show(out)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(merged(args.json, out), indent=1))
    if "contenders" in out:
        args.json.with_suffix(".svg").write_text(report.svg(out))
    print(f"written: {args.json}")
    return 0


def merged(path: Path, out: dict[str, Any]) -> dict[str, Any]:
    """The file as it was, with this run's part of it replaced; each part says which command made it."""
    old = json.loads(path.read_text()) if path.exists() else {}
    part = next((name for name in ("latency", "sweep", "soak") if name in out), None)
    if part is None:
        return {**{name: old[name] for name in old if name.startswith(("latency", "sweep", "soak"))}, **out}
    return {**old, part: out[part], f"{part}_command": out["command"]}


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


if __name__ == "__main__":
    raise SystemExit(main())
