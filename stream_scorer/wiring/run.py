"""``score`` and ``train``: build the parts, run the loop until told to stop, take everything down in order."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
import typer

from esmm.metrics import TaskStats
from stream_scorer import __version__
from stream_scorer.adapters.checkpoints import DirectoryCheckpoints
from stream_scorer.adapters.clock import SystemClock
from stream_scorer.adapters.http import Endpoints, HttpConfig, HttpServer
from stream_scorer.adapters.kafka import KafkaSource
from stream_scorer.adapters.kafka_sink import KafkaSink
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.adapters.redis import RedisFeatures
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import FatalError
from stream_scorer.hotswap import Mailbox, Watcher
from stream_scorer.scorer import Scorer, ScorerPorts
from stream_scorer.settings import Settings
from stream_scorer.trainer import Trainer, TrainerPorts
from stream_scorer.wiring import build, connect, runtime
from stream_scorer.wiring.pretrain import start_from_live
from stream_scorer.wiring.processes import Child
from stream_scorer.wiring.status import StatusLines

_log = structlog.get_logger("stream_scorer")
CLOSE_S = 10.0


def run_score(settings: Settings, config: Path | None, workers: int, stop: threading.Event, status: bool) -> int:
    """Score until ``stop`` is set; 0 when everything in flight was published and committed."""
    if workers > 1:
        return _run_workers(settings, config, workers, stop)
    schema = connect.load_schema(settings)
    topics = settings.kafka.topics
    needed = [topics.requests, topics.scores, topics.rejects, *([topics.served] if settings.scorer.served else [])]
    connect.require_topics(settings, needed)
    clock, metrics = SystemClock(), PrometheusMetrics(__version__)
    kafka = connect.kafka_config(settings)
    features = RedisFeatures(connect.redis_config(settings), connect.entity_layouts(schema), metrics)
    features.verify()
    if settings.redis.tracking:
        features.track()
    mailbox = Mailbox()
    watcher = Watcher(
        DirectoryStore(Path(settings.model.store)),
        build.loader(schema, build.predictor_config(settings)),
        mailbox,
        metrics,
        clock,
    )
    source = KafkaSource(kafka, [topics.requests], settings.kafka.scorer_group, metrics)
    sink = KafkaSink(kafka)
    ports = ScorerPorts(source, sink, features, metrics, clock, mailbox)
    scorer = Scorer(ports, build.scorer_policy(settings, schema))
    with ExitStack() as stack:
        stack.callback(features.close)
        stack.callback(watcher.close)
        watcher.tick()
        watcher.start(settings.model.poll_s)
        stack.callback(lambda: sink.close(Deadline.after(CLOSE_S, clock.monotonic_s)))
        stack.callback(source.close)
        _serve_http(settings, stack, metrics, lambda: scorer.hold)
        stack.enter_context(StatusLines(status, "scorer", lambda: _scorer_status(scorer)))
        runtime.settle()
        scorer.run(stop)
    stats = scorer.stats()
    typer.echo(
        f"{stats.requests} requests, {stats.scored} scored, {stats.rejected} rejected, "
        f"{stats.versions_served} model versions",
        err=True,
    )
    return 0


def _scorer_status(scorer: Scorer) -> dict[str, Any]:
    stats = asdict(scorer.stats())
    versions = stats.pop("versions")
    return {
        **stats,
        "ready": stats["hold"] == "",
        "model_version": versions[-1] if versions else None,
        "latency_ms": {"p50": stats.pop("latency_p50_ms"), "p99": stats.pop("latency_p99_ms")},
    }


def run_train(settings: Settings, stop: threading.Event, status: bool) -> int:
    """Learn until ``stop`` is set; 0 when the last checkpoint was written and committed."""
    schema = connect.load_schema(settings)
    topics = settings.kafka.topics
    connect.require_topics(settings, [topics.served, topics.feedback, topics.rejects])
    clock, metrics, kafka = SystemClock(), PrometheusMetrics(__version__), connect.kafka_config(settings)
    source = KafkaSource(kafka, [topics.served, topics.feedback], settings.kafka.trainer_group, metrics, ends=True)
    sink = KafkaSink(kafka)
    learner, store = build.learner(settings, schema), DirectoryStore(Path(settings.model.store))
    start_from_live(learner, store, schema)
    checkpoints = DirectoryCheckpoints(Path(settings.trainer.checkpoint_dir))
    ports = TrainerPorts(
        source=source,
        sink=sink,
        learner=learner,
        store=store,
        open_version=build.judge_of(schema),
        join_state=build.join_state(settings),
        checkpoints=checkpoints,
        stats_kind=TaskStats,
        metrics=metrics,
        clock=clock,
    )
    trainer = Trainer(ports, build.trainer_policy(settings, schema))
    runtime.settle(runtime.JOINING)
    with ExitStack() as stack:
        stack.callback(ports.join_state.close)
        stack.callback(lambda: sink.close(Deadline.after(CLOSE_S, clock.monotonic_s)))
        stack.callback(source.close)
        _serve_http(settings, stack, metrics, lambda: "" if trainer.ready else "checkpoint")
        stack.enter_context(StatusLines(status, "trainer", lambda: _trainer_status(trainer)))
        trainer.run(stop)
    stats = trainer.stats()
    typer.echo(
        f"{stats.served} served and {stats.feedback} feedback messages joined into {stats.examples} examples, "
        f"{stats.versions_published} versions published",
        err=True,
    )
    return 0


def _trainer_status(trainer: Trainer) -> dict[str, Any]:
    return {**asdict(trainer.stats()), "ready": trainer.ready}


def _serve_http(settings: Settings, stack: ExitStack, metrics: PrometheusMetrics, hold: Any) -> None:
    """Health and metrics, when a port is set."""
    if settings.http.port == 0:
        return
    endpoints = Endpoints(
        ready=lambda: f"waiting for: {hold()}" if hold() else "",
        metrics=metrics.text,
        version={"version": __version__},
    )
    server = HttpServer(HttpConfig(settings.http.host, settings.http.port), endpoints)
    server.start()
    stack.callback(server.stop)


def _run_workers(settings: Settings, config: Path | None, workers: int, stop: threading.Event) -> int:
    """``--workers N``: N processes of one consumer group; when one fails the others are stopped.

    With ``http.port`` P they listen on P, P + 1, and so on.
    """
    folder, port = Path(settings.model.store), settings.http.port
    folder.mkdir(parents=True, exist_ok=True)
    patience_s = settings.scorer.drain_timeout_s + 2 * CLOSE_S
    args = ["score", *([] if config is None else ["--config", str(config)])]
    log = folder / f"workers-{os.getpid()}.log"
    ports = [{"STREAM_SCORER_HTTP__PORT": str(port + n)} if port else {} for n in range(workers)]
    children = [Child(f"worker {n}", args, log, env) for n, env in enumerate(ports)]
    try:
        while not stop.wait(0.25):
            failed = next((child for child in children if not child.alive), None)
            if failed is not None:
                raise FatalError(f"{failed.name} stopped with status {failed.exit_code}: {failed.tail()}")
    finally:
        for child in children:
            child.signal()
        for child in children:
            child.stop(patience_s)
            child.close()
    return int(any(child.exit_code != 0 for child in children))
