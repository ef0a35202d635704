"""``replay``: a public log through the loop, features first, never from an event's future."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import typer
from tqdm import tqdm

from esmm.batch import FeatureBlock, concat_blocks
from esmm.features import FeatureSchema
from stream_scorer import __version__
from stream_scorer.adapters.clock import SystemClock
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.adapters.kafka import KafkaSource
from stream_scorer.adapters.kafka_sink import KafkaSink
from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.core.codec import encode_feedback, encode_request
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.core.messages import Feedback, ScoreRequest
from stream_scorer.core.packed import Entity
from stream_scorer.core.records import OutRecord
from stream_scorer.embedded.datasets import DATASETS
from stream_scorer.embedded.plan import Joined
from stream_scorer.embedded.replay import FeatureUpdate, InFlight, Layouts, Replay, ReplayOptions, ReplayReport, Request
from stream_scorer.settings import Settings
from stream_scorer.wiring import connect

OUTSTANDING = 2_000  # requests that may wait for their scores
BATCH = 200  # requests whose features are written in one go
STALL_S = 60.0  # without any score for this long, scorers are taken to be away
JOIN_S = 30.0


@dataclass(frozen=True)
class ReplayCommand:
    """The command's options. ``speed``: log seconds a second, 0 as fast as it goes."""

    dataset: str
    path: Path
    speed: float
    limit: int
    candidates: int
    as_json: bool


@dataclass
class Account:
    """What was asked and what came back."""

    requests: int = 0
    scored: int = 0
    duplicates: int = 0
    feedback: int = 0
    versions: set[int] = field(default_factory=set)


def schema_text(dataset: str) -> str:
    """The dataset's feature schema as TOML; `ConfigurationError` for a dataset that is not known."""
    if dataset not in DATASETS:
        raise ConfigurationError(f"dataset {dataset!r} is not known: use one of {', '.join(DATASETS)}")
    return DATASETS[dataset].schema_toml


def run_replay(settings: Settings, command: ReplayCommand, stop: threading.Event) -> int:
    """0 when every request was scored exactly once, else 1."""
    schema = connect.load_schema(settings)
    if schema != FeatureSchema.from_toml(schema_text(command.dataset)):
        raise ConfigurationError(
            f"{settings.model.schema_file} is not the schema of {command.dataset}: write it with "
            f"`stream-scorer replay {command.dataset} {command.path} --print-schema > {settings.model.schema_file}`"
        )
    topics = settings.kafka.topics
    connect.require_topics(settings, [topics.requests, topics.scores, topics.feedback])
    started_s = time.monotonic()
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=100, unit="%", desc=f"replay {command.dataset}", disable=not sys.stderr.isatty())
        )

        def progress(rows: int, share: float) -> None:
            bar.n = round(share * 100, 1)
            bar.set_postfix_str(f"{rows} rows")

        layouts = Layouts(schema.layout("user"), schema.layout("item"))
        options = ReplayOptions(limit=command.limit, candidates=command.candidates, progress=progress)
        replay = DATASETS[command.dataset].open(command.path, layouts, options)
        driver = _Driver(settings, schema, stack)
        driver.run(replay, command.speed, stop)
        driver.drain(stop)
    return _report(command, replay, driver.account, time.monotonic() - started_s)


def _report(command: ReplayCommand, replay: Replay, account: Account, elapsed_s: float) -> int:
    lost = account.requests - account.scored
    fields = {
        "dataset": command.dataset,
        "requests": account.requests,
        "scored": account.scored,
        "lost": lost,
        "duplicates": account.duplicates,
        "feedback": account.feedback,
        "versions_served": len(account.versions),
        "seconds": round(elapsed_s, 3),
        "log": replay.report.fields(),
    }
    typer.echo(
        f"{replay.report.rows} log rows, {account.requests} requests, "
        f"{account.scored} scored, "
        f"{lost} lost, {account.duplicates} duplicates, {account.feedback} feedback events, "
        f"{account.requests / max(elapsed_s, 1e-9):.0f} requests/s{dirt_text(replay.report)}",
        err=command.as_json,
    )
    if command.as_json:
        typer.echo(orjson.dumps(fields).decode())
    return 0 if lost == 0 and account.duplicates == 0 else 1


def dirt_text(report: ReplayReport) -> str:
    """What of a log could not be used, with the first line numbers where they are known; empty when all could."""
    kinds = []
    for reason, count in sorted(report.dirty.items()):
        lines = report.dirty_lines.get(reason, [])
        more = ", ..." if count > len(lines) else ""
        kinds.append(f"{count} {reason}" + (f" (lines {', '.join(map(str, lines))}{more})" if lines else ""))
    return f"; {sum(report.dirty.values())} dirty, left out: {'; '.join(kinds)}" if kinds else ""


class _Driver:
    """Writes features, asks, tells, and counts the scores that come back."""

    def __init__(self, settings: Settings, schema: FeatureSchema, stack: ExitStack) -> None:
        kafka, clock = connect.kafka_config(settings), SystemClock()
        self._topics = settings.kafka.topics
        self._run_id = f"replay-{uuid.uuid4().hex[:8]}"
        self._writer = FeatureWriter(connect.redis_config(settings), connect.entity_layouts(schema))
        stack.callback(self._writer.close)
        self._scores = KafkaSource(kafka, [self._topics.scores], self._run_id, PrometheusMetrics(__version__))
        stack.callback(self._scores.close)
        self._sink = KafkaSink(kafka)
        stack.callback(lambda: self._sink.close(Deadline.after(STALL_S, clock.monotonic_s)))
        self._in_flight, self._answered = InFlight(), set[str]()
        self._updates: list[FeatureUpdate] = []
        self._requests: list[ScoreRequest] = []
        self._heard_s = time.monotonic()
        self.account = Account()
        self._join()

    def _join(self) -> None:
        listener, give_up = Joined(), time.monotonic() + JOIN_S
        self._scores.subscribe(listener)
        while not listener.partitions:
            if time.monotonic() > give_up:
                raise FatalError(f"no partition of {self._topics.scores} was assigned within {JOIN_S:.0f} s")
            self._scores.poll(1, 0.1, 0.0)

    def run(self, replay: Replay, speed: float, stop: threading.Event) -> None:
        """Every action in order; ``speed`` 0 is as fast as the scores come back."""
        started_s = time.monotonic()
        for action in replay:
            if stop.is_set():
                return
            if speed > 0:
                self._wait_until(started_s + (action.at_ms - replay.first_ms) / 1000 / speed, stop)
            if isinstance(action, FeatureUpdate):
                if self._in_flight.must_wait(action):
                    self._flush()
                    self._wait(lambda update=action: self._in_flight.must_wait(update), stop)
                self._updates.append(action)
            elif isinstance(action, Request):
                self._ask(action.message)
                self._wait(lambda: len(self._in_flight) >= OUTSTANDING, stop)
            else:
                self._tell(action.message)
        self._flush()

    def drain(self, stop: threading.Event) -> None:
        """Wait for what was asked."""
        self._flush()
        self._wait(lambda: len(self._in_flight) > 0, stop)

    def _wait_until(self, moment_s: float, stop: threading.Event) -> None:
        if moment_s - time.monotonic() > 0:
            self._flush()
        while (left_s := moment_s - time.monotonic()) > 0 and not stop.is_set():
            self._read(min(left_s, 0.05))

    def _wait(self, still: Any, stop: threading.Event) -> None:
        while still() and not stop.is_set():
            self._flush()
            self._read(0.05)
            if time.monotonic() - self._heard_s > STALL_S:
                raise FatalError(
                    f"no scores for {STALL_S:.0f} s and {len(self._in_flight)} requests wait: is `stream-scorer score` "
                    f"running on {self._topics.requests}?"
                )

    def _ask(self, message: ScoreRequest) -> None:
        request = message.model_copy(update={"request_id": f"{self._run_id}-{message.request_id}"})
        if not self._in_flight:
            self._heard_s = time.monotonic()
        self._in_flight.asked(request)
        self._requests.append(request)
        if len(self._requests) >= BATCH:
            self._flush()
            self._read(0.0)

    def _tell(self, event: Feedback) -> None:
        ours = {name: f"{self._run_id}-{getattr(event, name)}" for name in ("request_id", "event_id")}
        value = encode_feedback(event.model_copy(update=ours))
        self._sink.send(OutRecord(self._topics.feedback, event.user_id.encode(), value, ()), self._sent)
        self.account.feedback += 1

    def _flush(self) -> None:
        """Features first, then the requests that read them."""
        entities: tuple[Entity, ...] = ("user", "item")
        for entity in entities:
            self._write(entity, [update for update in self._updates if update.entity == entity])
        self._updates.clear()
        for request in self._requests:
            record = OutRecord(self._topics.requests, request.user_id.encode(), encode_request(request), ())
            self._sink.send(record, self._sent)
        self.account.requests += len(self._requests)
        self._requests.clear()
        self._sink.poll()

    def _write(self, entity: Entity, updates: list[FeatureUpdate]) -> None:
        if not updates:
            return
        names = [name for update in updates for name in update.ids]
        block: FeatureBlock = concat_blocks([update.block for update in updates])
        times = np.repeat([update.at_ms for update in updates], [len(update.ids) for update in updates])
        self._writer.write(entity, names, block, times.astype(np.int64))

    def _sent(self, error: object | None, _message: object) -> None:
        if error is not None:
            raise FatalError(f"Kafka did not take a message of the replay: {error}")

    def _read(self, wait_s: float) -> None:
        records = self._scores.poll(2_000, wait_s, 0.0)
        self._sink.poll()
        for record in records:
            scores = orjson.loads(record.value or b"{}")
            request_id = str(scores.get("request_id"))
            if self._in_flight.answered(request_id):
                self._answered.add(request_id)
                self.account.scored += 1
                self.account.versions.add(int(scores["model_version"]))
                self._heard_s = time.monotonic()
            elif request_id in self._answered:
                self.account.duplicates += 1
