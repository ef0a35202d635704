"""Memory over a long run: requests at a steady rate, features that change under way, the resident set every few seconds."""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Producer

from esmm.batch import FeatureBlock
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.settings import load
from stream_scorer.wiring import connect
from tests.bench.speed import measure
from tests.bench.speed.contenders import Running, ours
from tests.bench.speed.world import FLOATS, OUTPUT_SETTINGS, World

SAMPLE_S = 5.0
KEPT = {**OUTPUT_SETTINGS, "segment.bytes": str(32 << 20), "retention.bytes": str(64 << 20)}
TOPICS = ("out-soak", "out-soak-served")
SETTLED = 0.4  # of the run: what is allocated before is warming up, not growth


def run(world: World, args: argparse.Namespace) -> dict[str, Any]:
    """``args.soak`` minutes at ``args.rate`` candidates a second, `served` published, 200 items rewritten a second."""
    world.create("in-soak", *TOPICS, config=KEPT)
    stop = threading.Event()
    feeds = [
        threading.Thread(target=_requests, args=(world, args.rate / world.workload.candidates, stop)),
        threading.Thread(target=_features, args=(world, stop)),
    ]
    running = Running(world, ours("soak", served=True), "soak", "out-soak", "in-soak")
    try:
        for feed in feeds:
            feed.start()
        measure._first_output(world, world.consumer(), running, "out-soak")
        began, first = time.monotonic(), measure._end(world, world.consumer(), "out-soak")
        samples: list[tuple[float, float]] = []
        while time.monotonic() - began < 60 * args.soak:
            time.sleep(SAMPLE_S)
            running.check()
            if not all(feed.is_alive() for feed in feeds):
                raise RuntimeError("a feed ended")
            samples.append((time.monotonic() - began, sum(map(_resident, running.pids)) / 2**20))
        scored = measure._end(world, world.consumer(), "out-soak") - first
        spent = time.monotonic() - began
    finally:
        stop.set()
        running.stop()
        for feed in feeds:
            feed.join()
    return _summary(np.array(samples), scored * world.workload.candidates / spent)


def _summary(samples_N2: np.ndarray, rate: float) -> dict[str, Any]:
    """Megabytes, and megabytes a minute by least squares after `SETTLED` of the run."""
    late = samples_N2[samples_N2[:, 0] > SETTLED * samples_N2[-1, 0]]
    slope, _ = np.polyfit(late[:, 0] / 60, late[:, 1], 1)
    return {
        "minutes": round(float(samples_N2[-1, 0]) / 60, 1),
        "candidates_per_s": round(rate),
        "megabytes_at": {f"{at:.0f} s": round(mb) for at, mb in samples_N2[:: max(1, len(samples_N2) // 12)]},
        "megabytes_end": round(float(late[-1, 1]), 1),
        "megabytes_a_minute": round(float(slope), 2),
    }


def _resident(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in fields.splitlines() if line.startswith("VmRSS")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024


def _requests(world: World, rate: float, stop: threading.Event) -> None:
    """The same requests over and over: the scorer does not know them again."""
    producer = Producer(world.client(**{"linger.ms": 5, "queue.buffering.max.messages": 1_000_000}))
    bodies = itertools.cycle(list(world.workload.bodies(50_000, seed=11)))
    began, sent = time.monotonic(), 0
    while not stop.wait(0.01):
        for key, value in itertools.islice(bodies, int((time.monotonic() - began) * rate) - sent):
            producer.produce("in-soak", value, key)
            sent += 1
        producer.poll(0)
    producer.flush(10)


def _features(world: World, stop: threading.Event) -> None:
    """Items get new values, so that caches are refilled all the time."""
    settings = load(world.folder / "features-writer.toml", {})
    writer = FeatureWriter(connect.redis_config(settings), connect.entity_layouts(connect.load_schema(settings)))
    rng = np.random.default_rng(2)
    while not stop.wait(0.1):
        ids = [f"i{n}" for n in rng.choice(world.workload.catalogue, 20, replace=False)]
        block = FeatureBlock(np.zeros((20, 0), np.int64), rng.standard_normal((20, FLOATS), np.float32))
        writer.write("item", ids, block, np.full(20, int(time.time() * 1000)))
    writer.close()
