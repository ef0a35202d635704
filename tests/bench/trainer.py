"""The whole trainer over topics in memory: decode `served` and `feedback`, join, emit, look at the input, learn, score.

    python -m tests.bench.trainer [--model speed|columns|tiny] [--rows 4096] [--state memory|rocks] [--repeats 3]
                                  [--overlap] [--pages] [--keep 0.1] [--kafka]

Ten of fifty candidates are shown, `served` keeps all fifty, one in ten is clicked and one click in five converts, some
of them late. Impressions of one page are told one after another as a user scrolls, so pages interleave. The rate is
taken over the part of the stream in which as many impressions fall due as are shown: examples learned a second of wall
time, and of processor time of the whole process. Kafka's client is part of it only with ``--kafka``: then a backlog is
read from a broker on the same processors. ``--pages``: one message for all impressions of a request. ``--keep`` is
`trainer.negative_keep`. ``--repeats`` runs alternate over the models asked for. Writes build/bench/trainer.json. ``--join-only`` learns nothing.

Models: ``speed`` is that of `make bench` (80 numbers a user and an item), ``columns`` that of tests/bench/learner.py
(20 embedded columns of width 16 and 40 numbers), ``tiny`` has nearly nothing to learn; towers are (256, 128) but (8).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from confluent_kafka import Producer

from esmm.batch import Examples, Float32, StepStats
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat
from esmm.learner import Learner, LearnerConfig
from esmm.metrics import TaskStats
from esmm.model import ESMM
from stream_scorer.adapters.checkpoints import DirectoryCheckpoints
from stream_scorer.adapters.clock import SystemClock
from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.adapters.kafka import KafkaSource
from stream_scorer.adapters.kafka_admin import TopicPlan, create_topics
from stream_scorer.adapters.kafka_config import KafkaConfig
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.core.codec import encode_feedback
from stream_scorer.core.join_entry import JoinPolicy
from stream_scorer.core.messages import Feedback
from stream_scorer.core.records import CommitResult, Position, Record, TopicPartition
from stream_scorer.core.scoreboard import ScoreboardPolicy
from stream_scorer.core.served import ServedLayout, tensor_header
from stream_scorer.embedded.kafka_home import KafkaHome
from stream_scorer.trainer import Trainer, TrainerPolicy, TrainerPorts
from stream_scorer.wiring import runtime
from stream_scorer.wiring.build import TICKS
from tests.bench.predictor import processor
from tests.fakes import FakeSink

START_MS = 1_700_000_000_000
CANDIDATES, SHOWN = 50, 10
VOCABULARY = 100_000
PARTITIONS = 2
RANK_MS = 5  # a page is seen within 45 ms of a click window of 1500: as 18 s are to ten minutes
OUT = Path(__file__).parents[2] / "build" / "bench" / "trainer.json"
JOIN = JoinPolicy(
    click_window_ms=1_500,
    observation_window_ms=3_000,
    attribution_window_ms=7_000,
    served_ttl_ms=3_000,
    held_ttl_ms=3_000,
    tick_ms=1_500 // TICKS,
)


def schema(model: str) -> FeatureSchema:
    if model == "speed":
        return FeatureSchema([DenseFeat("user", 80, source="user"), DenseFeat("item", 80, source="item")])
    if model == "tiny":
        return FeatureSchema([SparseFeat("user", 1000, 4, source="user"), DenseFeat("item", 2, source="item")])
    sparse = [SparseFeat(f"c{i}", VOCABULARY, 16, source=SOURCES[i % 3]) for i in range(20)]
    return FeatureSchema([*sparse, DenseFeat("numbers", 40, source="item")])


def layout_of(features: FeatureSchema) -> ServedLayout:
    return ServedLayout(*(features.layout(source) for source in SOURCES), features.hash)


@dataclass
class Stream:
    """Requests one millisecond apart, and what came of them."""

    features: FeatureSchema
    requests: int
    seed: int = 0
    pages: bool = False  # one message for all impressions of a request

    def records(self) -> list[Record]:
        """In order of record time: what a trainer that keeps up reads."""
        arrivals = sorted(self._messages(), key=lambda m: (m[0], m[1], m[2]))
        offsets: dict[TopicPartition, int] = {}
        out = []
        for at_ms, topic, partition, value in arrivals:
            where = TopicPartition(topic, partition)
            offset = offsets.get(where, 0)
            offsets[where] = offset + 1
            out.append(Record(Position(*where, offset), b"u", value, (), at_ms, 1))
        return out

    def _messages(self) -> Iterator[tuple[int, str, int, bytes]]:
        rng, layout = np.random.default_rng(self.seed), layout_of(self.features)
        blocks = [getattr(layout, source) for source in SOURCES]
        for number in range(self.requests):
            ts, user = START_MS + number, int(rng.integers(10_000))
            items = [f"item-{i}" for i in rng.choice(10_000, CANDIDATES, replace=False).tolist()]
            partition, name = user % PARTITIONS, f"request-{number:08d}"
            yield ts + 5, "served", partition, self._served(rng, blocks, layout, name, user, items, ts)
            order = rng.choice(CANDIDATES, SHOWN, replace=False).tolist()
            if self.pages:
                page = Feedback(
                    event_id=f"{name}-page", kind="impression", request_id=name, user_id=f"user-{user}",
                    items=[items[place] for place in order], ts=ts + 50,
                )  # fmt: skip
                yield ts + 50, "feedback", partition, encode_feedback(page)
            for place, kind, at_ms in self._behaviour(rng, order, ts):
                if self.pages and kind == "impression":
                    continue
                event = Feedback(
                    event_id=f"{name}-{place}-{kind}", kind=kind, request_id=name, user_id=f"user-{user}",
                    item_id=items[place], ts=at_ms,
                )  # fmt: skip
                yield at_ms, "feedback", partition, encode_feedback(event)

    def _behaviour(self, rng: Any, order: list[int], ts: int) -> Iterator[tuple[int, Any, int]]:
        for rank, place in enumerate(order):
            shown = ts + 50 + (0 if self.pages else RANK_MS * rank)
            yield place, "impression", shown
            if rng.random() < 0.1:
                click = shown + int(rng.integers(1, 1_400))
                yield place, "click", click
                if rng.random() < 0.2:
                    yield place, "conversion", click + int(rng.exponential(2_500))

    def _served(
        self, rng: Any, blocks: list[Any], layout: ServedLayout, name: str, user: int, items: list[str], ts: int
    ) -> bytes:
        rows = (1, CANDIDATES, CANDIDATES)
        ids = [(rng.random((n, b.id_width)) ** 3 * VOCABULARY).astype("<i8") for n, b in zip(rows, blocks, strict=True)]
        dense = [rng.standard_normal((n, b.dense_width), np.float32) for n, b in zip(rows, blocks, strict=True)]
        ctr = rng.random(CANDIDATES, np.float32)
        meta = {
            "degraded": "0", "model_version": "1", "scored_at": str(ts + 5), "schema": layout.schema_hash, "items": json.dumps(items),
            "request_id": name, "ts": str(ts), "user_id": f"user-{user}",
        }  # fmt: skip
        header = (
            b'{"__metadata__":' + json.dumps(meta).encode() + b"," + tensor_header(CANDIDATES, layout.widths, "F32")
        )
        header += b" " * (-len(header) % 8)
        arrays = [*ids, ctr, ctr * np.float32(0.1), *dense]
        return b"".join([len(header).to_bytes(8, "little"), header, *(a.tobytes() for a in arrays)])


class MemorySource:
    """Both topics, polled as they were written."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records, self._at = records, 0

    def subscribe(self, listener: Any) -> None:
        self._listener = listener
        listener.on_assign([TopicPartition(t, p) for t in ("served", "feedback") for p in range(PARTITIONS)])

    def poll(self, max_records: int, wait_s: float, linger_s: float) -> list[Record]:
        out = list(self._records[self._at : self._at + max_records])
        self._at += len(out)
        return out

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> CommitResult:
        return CommitResult(True, False, None)

    def seek(self, next_offsets: Mapping[TopicPartition, int]) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def lag(self) -> int:
        return len(self._records) - self._at

    def positions(self) -> Mapping[TopicPartition, int]:
        return {}

    def ended(self) -> set[TopicPartition]:
        return (
            {TopicPartition(t, p) for t in ("served", "feedback") for p in range(PARTITIONS)}
            if self._at >= len(self._records)
            else set()
        )

    def close(self) -> None: ...


class NoLearner:
    """Learns nothing, at once."""

    def step(self, examples: Examples) -> StepStats:
        half_B = np.full(examples.rows, 0.5, np.float32)
        return StepStats(examples.rows, examples.rows, 0.0, half_B, half_B, True)

    def predict(self, examples: Examples) -> tuple[Float32, Float32]:
        half_B = np.full(examples.rows, 0.5, np.float32)
        return half_B, half_B

    def finite(self) -> bool:
        return True

    def embedding_rows(self) -> Mapping[str, int]:
        return {}

    def save(self, directory: Path) -> None: ...

    def restore(self, directory: Path) -> None: ...

    def export(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        (directory / "manifest.json").write_text("{}")


def learner_for(model: str, features: FeatureSchema, precision: Any, keep: float) -> Learner:
    towers = (8,) if model == "tiny" else (256, 128)
    return Learner(
        ESMM(features, towers, init_std=0.01), LearnerConfig(precision=precision, negative_keep=keep), lambda *_: None
    )


def fill(bootstrap: str, records: Sequence[Record]) -> None:
    """The stream as a backlog in Kafka, with its own times."""
    forever = {"retention.ms": "-1", "segment.bytes": str(1 << 30)}
    create_topics(KafkaConfig(bootstrap), TopicPlan(["served", "feedback"], PARTITIONS, 1, forever), 20.0)
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    for record in records:
        where, partition, _ = record.position
        while True:
            try:
                producer.produce(where, record.value, record.key, partition=partition, timestamp=record.timestamp_ms)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0


def run(
    model: str, records: Sequence[Record], args: argparse.Namespace, folder: Path, bootstrap: str
) -> dict[str, float]:
    """One pass over the stream by a fresh trainer, from memory or, with ``bootstrap``, from Kafka."""
    features = schema(model)
    policy = TrainerPolicy(
        "served", "feedback", "score-rejects", layout_of(features), join=JOIN,
        scoreboard=ScoreboardPolicy(settle_ms=JOIN.click_window_ms + JOIN.observation_window_ms,
                                    mature_ms=JOIN.click_window_ms + JOIN.attribution_window_ms),
        batch_rows=args.rows, overlap=args.overlap, publish_every_s=1e9, checkpoint_every_s=1e9, idle_wait_s=0.0, linger_s=0.0,
    )  # fmt: skip
    state = MemoryJoinState() if args.state == "memory" else RocksJoinState(folder / "rocks")
    learner: Any = NoLearner() if args.join_only else learner_for(model, features, args.precision, args.keep)
    metrics = PrometheusMetrics("bench")
    source: Any = MemorySource(records)
    if bootstrap:
        source = KafkaSource(
            KafkaConfig(bootstrap), ["served", "feedback"], f"bench-{time.time_ns()}", metrics, ends=True
        )
    ports = TrainerPorts(
        source=source, sink=FakeSink(), learner=learner, store=DirectoryStore(folder / "models"), open_version=lambda _: learner,
        join_state=state, checkpoints=DirectoryCheckpoints(folder / "checkpoints"), stats_kind=TaskStats,
        metrics=metrics, clock=SystemClock(),
    )  # fmt: skip
    trainer = Trainer(ports, policy)
    trainer.start()
    warm_ms = START_MS + JOIN.click_window_ms + JOIN.attribution_window_ms + 2_000  # as much falls due as is shown
    warm = next(at for at, record in enumerate(records) if record.timestamp_ms >= warm_ms)
    while _taken(trainer) < warm:
        trainer.step()
    trainer._finish_step()
    marks = [(time.perf_counter(), time.process_time(), _learned(trainer), _taken(trainer))]
    last_ms = START_MS + args.requests  # then only late conversions come, and event time would run away
    end = next(at for at, record in enumerate(records) if record.timestamp_ms > last_ms)
    while _taken(trainer) < end:
        trainer.step()
    trainer._finish_step()
    marks.append((time.perf_counter(), time.process_time(), _learned(trainer), _taken(trainer)))
    wall_s, cpu_s, examples, events = (b - a for a, b in zip(*marks, strict=True))
    assert trainer._tally.rejected == trainer._tally.refused_steps == trainer._tally.skipped == 0, trainer._tally
    state.close()
    source.close()
    return {
        "examples": examples, "events": events, "wall_s": wall_s, "cpu_s": cpu_s,
        "examples_per_s": examples / wall_s, "examples_per_cpu_s": examples / cpu_s, "events_per_s": events / wall_s,
    }  # fmt: skip


def _taken(trainer: Trainer) -> int:
    return trainer._tally.served + trainer._tally.feedback


def _learned(trainer: Trainer) -> int:
    tally = trainer._tally
    return tally.first + tally.late_conversion + tally.matured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("speed", "columns", "tiny"))
    parser.add_argument("--state", choices=("memory", "rocks"), default="memory")
    for name, default in (("rows", 4096), ("requests", 22_000), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--join-only", action="store_true")
    parser.add_argument("--overlap", action="store_true", help="learn in a thread beside the join")
    parser.add_argument("--kafka", action="store_true", help="read a backlog in Apache Kafka (KAFKA_HOME), not a list")
    parser.add_argument("--pages", action="store_true", help="one message for all impressions of a request")
    parser.add_argument("--keep", type=float, default=1.0, help="trainer.negative_keep")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, default=OUT)
    args = parser.parse_args()
    runtime.settle(runtime.JOINING)
    models = args.model or ["speed", "columns"]
    streams = {model: Stream(schema(model), args.requests, pages=args.pages).records() for model in models}
    found: dict[str, list[dict[str, float]]] = {model: [] for model in models}
    for _ in range(args.repeats):
        for model in models:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                bootstrap = ""
                if args.kafka:
                    bootstrap = stack.enter_context(KafkaHome(Path(os.environ["KAFKA_HOME"]))).bootstrap
                    fill(bootstrap, streams[model])
                found[model].append(run(model, streams[model], args, Path(folder), bootstrap))
    report: dict[str, Any] = {"processor": processor(), "torch": torch.__version__, "python": platform.python_version()}
    report |= {
        "rows": args.rows,
        "state": args.state,
        "join_only": args.join_only,
        "overlap": args.overlap,
        "pages": args.pages,
        "kafka": args.kafka,
        "negative_keep": args.keep,
        "precision": args.precision,
        "models": {},
    }
    for model, runs in found.items():
        rates = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        report["models"][model] = {**rates, "runs": runs}
        print(f"{model:8} {args.rows} rows a step, join state in {args.state}: "
              + ", ".join(f"{rates[key]:9.0f} {key}" for key in ("examples_per_s", "examples_per_cpu_s", "events_per_s")), flush=True)  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
