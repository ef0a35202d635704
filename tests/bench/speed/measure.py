"""Rates from outside: how many messages the broker appended to a contender's output topic between two instants."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from confluent_kafka import Consumer, KafkaException, TopicPartition

from tests.bench.speed.contenders import Contender, Running
from tests.bench.speed.world import World, plain_scores

START_S = 120.0
CHECKED = 100  # messages whose scores are compared with the plain path, a run
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}  # of a probability
TICKS = os.sysconf("SC_CLK_TCK")


def run(world: World, contender: Contender, group: str, warm_s: float, seconds: float) -> dict[str, Any]:
    """Start, warm up, measure ``seconds``, check scores, stop."""
    output = f"out-{group}"
    served = contender.scorer.get("served")
    topics = [output, *([f"{output}-served"] if served else [])]
    world.create(*topics)
    consumer, running = world.consumer(), Running(world, contender, group, output)
    try:
        _first_output(world, consumer, running, output)
        time.sleep(warm_s)
        cpu = _cpu(running)
        begin_ms, marks = _instant(world, consumer, output)
        busy = _busy()
        time.sleep(seconds)
        end_ms, after = _instant(world, consumer, output)
        spent, others = _used(cpu, _cpu(running)), _busy() - busy
        running.check()
        count = _appended(world, consumer, output, begin_ms, end_ms) if world.real else after - marks
        halves = _appended(world, consumer, output, begin_ms, (begin_ms + end_ms) // 2) if world.real else 0
        checked = _check(world, consumer, contender, output) if contender.kind != "echo" else {}
        if contender.kind != "echo" and after >= world.workload.requests:
            raise RuntimeError(f"{contender.name} came to the end of the requests: ask for more with --requests")
    finally:
        running.stop()
        consumer.close()
        world.delete(*topics)
    span_s = (end_ms - begin_ms) / 1000
    return {
        "candidates_per_s": count * world.workload.candidates / span_s,
        "first_half_share": halves / max(count, 1),
        "seconds": span_s,
        "cpu_s_per_s": {name: round(used / span_s, 2) for name, used in spent.items()},
        "machine_busy": round(others / span_s, 2),
        **checked,
    }


def _first_output(world: World, consumer: Consumer, running: Running, output: str) -> None:
    give_up = time.monotonic() + START_S
    while _end(world, consumer, output) == 0:
        running.check()
        if time.monotonic() > give_up:
            raise RuntimeError(f"{running.contender.name} wrote nothing in {START_S:.0f} s; see {running.log}")
        time.sleep(0.1)


def _end(world: World, consumer: Consumer, topic: str) -> int:
    return sum(_mark(consumer, part)[1] for part in world.where(topic))


def _mark(consumer: Consumer, part: TopicPartition) -> tuple[int, int]:
    """Low and high watermark; a broker that has just made the topic may say that it leads nothing yet."""
    give_up = time.monotonic() + 10
    while True:
        try:
            return consumer.get_watermark_offsets(part, timeout=10, cached=False)
        except KafkaException:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def _instant(world: World, consumer: Consumer, topic: str) -> tuple[int, int]:
    """Now in milliseconds, and how many messages there are."""
    count = _end(world, consumer, topic)
    return int(time.time() * 1000), count


def _appended(world: World, consumer: Consumer, topic: str, begin_ms: int, end_ms: int) -> int:
    """Messages the broker stamped within [begin, end)."""
    return _before(world, consumer, topic, end_ms) - _before(world, consumer, topic, begin_ms)


def _before(world: World, consumer: Consumer, topic: str, instant_ms: int) -> int:
    found = consumer.offsets_for_times(world.where(topic, instant_ms), timeout=30)
    total = 0
    for part in found:
        if part.error is not None:
            raise RuntimeError(str(part.error))
        offset = part.offset
        if offset < 0:  # nothing that late: all of it was before
            offset = _mark(consumer, TopicPartition(topic, part.partition))[1]
        total += offset
    return total


def _cpu(running: Running) -> Counter[str]:
    """CPU seconds of each kind of thread so far."""
    used: Counter[str] = Counter()
    for pid in running.pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                text = (task / "stat").read_text()
            except OSError:
                continue
            name = text[text.index("(") + 1 : text.rindex(")")].rstrip("0123456789-/:")
            fields = text[text.rindex(")") + 2 :].split()
            used[name] += (int(fields[11]) + int(fields[12])) / TICKS
    return used


def _used(before: Counter[str], after: Counter[str]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after if after[name] - before[name] > 0.05}


def _busy() -> float:
    """Seconds that the machine's processors worked, all programs together."""
    fields = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS


def _check(world: World, consumer: Consumer, contender: Contender, topic: str) -> dict[str, float]:
    """The largest and mean difference of a probability from `ESMM.forward`; RuntimeError past the bound."""
    parts = world.where(topic)
    marks = {part.partition: _mark(consumer, part) for part in parts}
    consumer.assign([TopicPartition(topic, n, max(low, (low + high) // 2)) for n, (low, high) in marks.items()])
    messages: list[bytes] = []
    give_up = time.monotonic() + 20
    while len(messages) < CHECKED and time.monotonic() < give_up:
        messages += [m.value() for m in consumer.consume(CHECKED, 1.0) if m.error() is None]
    consumer.unassign()
    if not messages:
        raise RuntimeError(f"nothing to check in {topic}")
    worst, total, count = 0.0, 0.0, 0
    for value in messages[:CHECKED]:
        items, got_K2 = _parsed(orjson.loads(value))
        user = int(orjson.loads(value)["user_id"][1:])
        error_K2 = np.abs(got_K2 - plain_scores(world, user, np.array([int(item[1:]) for item in items])))
        worst, total, count = max(worst, float(error_K2.max())), total + float(error_K2.sum()), count + error_K2.size
    if not worst <= BOUNDS[contender.precision]:
        raise RuntimeError(f"{contender.name}: a probability is {worst} off the plain path's")
    return {"max_error": worst, "mean_error": total / count}


def _parsed(body: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Items and (K, 2) of CTR and CTCVR, in either form."""
    if "scores" in body:
        rows = body["scores"]
        return [row["item"] for row in rows], np.array([[row["ctr"], row["ctcvr"]] for row in rows])
    return body["items"], np.array([body["ctr"], body["ctcvr"]]).T
