"""Latency in an open loop: requests leave on a schedule that does not wait for answers."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
from confluent_kafka import Producer, TopicPartition

from tests.bench.speed import measure
from tests.bench.speed.contenders import Running, ours
from tests.bench.speed.world import Workload, World

SHARES = (0.25, 0.5, 0.75, 0.9)
TICK_S = 0.001
LINGER_MS = 2  # of the sender: one produce request a message would load the broker, not the scorer
WARM_S = 20.0  # the broker compiles what small requests need while it runs
LOW_RATE = 100.0  # requests a second of one candidate each
TOPICS: tuple[str, ...] = ("out-max", "out-latency")


def run(world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """p50, p99 and p99.9 at shares of the maximum, then one candidate a request at 100 requests a second."""
    maximum = measure.run(world, ours("max"), "max", args.warm, args.seconds)["candidates_per_s"]
    print(f"maximum {maximum / 1e3:.0f} thousand candidates a second", flush=True)
    rows = []
    for at, share in enumerate(SHARES):
        rate = share * maximum / world.workload.candidates
        rows.append({"share": share, **at_rate(world, world.workload, f"latency-{at}", rate, args.seconds)})
        print(rows[-1], flush=True)
    single = replace(world.workload, candidates=1)
    rows.append({"candidates": 1, **at_rate(world, single, "latency-one", LOW_RATE, args.seconds)})
    print(rows[-1], flush=True)
    return rows


def at_rate(world: World, workload: Workload, name: str, rate: float, seconds: float) -> dict[str, Any]:
    """Latencies in milliseconds at ``rate`` requests a second.

    ``scheduled``: from the instant a request should have left until its scores were appended: a late sender counts
    against us (coordinated omission). ``appended``: from the request's append to its scores'. The broker's clock is
    in whole milliseconds.
    """
    source, output = f"in-{name}", f"out-{name}"
    world.create(source, output)
    running = Running(world, ours("latency"), name, output, source)
    try:
        _send(world, workload, source, 50, 50.0)  # until it is there, some to wake it up
        measure._first_output(world, world.consumer(), running, output)
        count = int(rate * seconds)
        _send(world, workload, source, int(rate * WARM_S), rate)
        time.sleep(1.0)
        mark = int(time.time() * 1000)
        _send(world, workload, source, count, rate)
        time.sleep(3.0)
        running.check()
        asked, answered = _stamps(world, source, mark), _stamps(world, output, mark)
    finally:
        running.stop()
        world.delete(source, output)
    both = [
        (answered[one][0] - when, answered[one][0] - asked[one][0])
        for one, (_, when) in asked.items()
        if one in answered
    ]
    scheduled, appended = np.array(both).T
    return {
        "requests_per_s": round(rate, 1),
        "lost": len(asked) - len(both),
        "scheduled_ms": _quantiles(scheduled),
        "appended_ms": _quantiles(appended),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = {"p50": 50, "p99": 99, "p99.9": 99.9}
    return {name: float(np.percentile(values, at)) for name, at in names.items()} | {"max": float(values.max())}


def _send(world: World, workload: Workload, topic: str, count: int, rate: float) -> None:
    """Send on schedule; each request's ts is the instant it should have left, in milliseconds."""
    producer = Producer(world.client(**{"linger.ms": LINGER_MS, "queue.buffering.max.messages": 1_000_000}))
    bodies = [(key, orjson.loads(value)) for key, value in workload.bodies(count, seed=int(time.time()))]
    began = time.time()
    sent = 0
    while sent < count:
        due = min(count, int((time.time() - began) * rate) + 1)
        for at in range(sent, due):
            key, body = bodies[at]
            body["ts"] = int((began + at / rate) * 1000)
            body["request_id"] = f"{body['ts']}-{at}"
            producer.produce(topic, orjson.dumps(body), key)
        sent = due
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(10)


def _stamps(world: World, topic: str, since_ms: int) -> dict[str, tuple[int, int]]:
    """Request id -> (append time, scheduled time) of what was appended since."""
    consumer = world.consumer()
    found: dict[str, tuple[int, int]] = {}
    starts = consumer.offsets_for_times(world.where(topic, since_ms), timeout=30)
    ends = {p.partition: consumer.get_watermark_offsets(p, timeout=10, cached=False)[1] for p in world.where(topic)}
    left = {p.partition: ends[p.partition] - p.offset for p in starts if p.offset >= 0}
    consumer.assign([TopicPartition(topic, p.partition, p.offset) for p in starts if p.offset >= 0])
    missing = sum(left.values())
    while missing > 0:
        for message in consumer.consume(10_000, 0.5):
            if message.error() is None:
                body = orjson.loads(message.value())
                found[body["request_id"]] = (message.timestamp()[1], body["ts"])
                missing -= 1
    consumer.close()
    return found
