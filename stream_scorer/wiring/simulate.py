"""``simulate``: the market in a process of its own."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import typer

from esmm.batch import FeatureBlock
from esmm.features import FeatureSchema
from stream_scorer import __version__
from stream_scorer.adapters.clock import SystemClock
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.adapters.kafka import KafkaSource
from stream_scorer.adapters.kafka_sink import KafkaSink
from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded.market import Market
from stream_scorer.embedded.market_features import MARKET_TOML
from stream_scorer.embedded.plan import DemoPlan, SimulatorPlan, Wire
from stream_scorer.embedded.simulator import Simulator
from stream_scorer.settings import Settings
from stream_scorer.wiring import connect
from stream_scorer.wiring.status import StatusLines

DRAIN_S = 15.0


def run_simulate(
    settings: Settings, rate: float, seed: int, duration_s: float, stop: threading.Event, status: bool
) -> int:
    """0 when every request was scored, else 1."""
    schema = connect.load_schema(settings)
    if schema != FeatureSchema.from_toml(MARKET_TOML):
        raise ConfigurationError(
            f"{settings.model.schema_file} is not the simulated market's schema: use deploy/features.toml"
        )
    topics = settings.kafka.topics
    connect.require_topics(settings, [topics.requests, topics.scores, topics.feedback])
    layouts, clock, kafka = connect.entity_layouts(schema), SystemClock(), connect.kafka_config(settings)
    run_id = f"sim-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        writer = FeatureWriter(connect.redis_config(settings), layouts)
        stack.callback(writer.close)
        source = KafkaSource(kafka, [topics.scores], run_id, PrometheusMetrics(__version__))
        stack.callback(source.close)
        sink = KafkaSink(kafka)
        stack.callback(lambda: sink.close(Deadline.after(DRAIN_S, clock.monotonic_s)))

        def write(kind: Literal["user", "item"], ids: Sequence[str], block: FeatureBlock, event_ms: int) -> None:
            writer.write(kind, ids, block, np.full(block.rows, event_ms, np.int64))

        wire = Wire(source, sink, write, clock, layouts["user"], layouts["item"], topics.requests, topics.feedback)
        plan = SimulatorPlan(rate=rate, run_id=run_id, shop=DemoPlan().shop)
        simulator = Simulator(Market(DemoPlan().market(seed)), wire, plan)
        stack.enter_context(StatusLines(status, "simulator", lambda: _fields(simulator)))
        simulator.start()
        simulator.run(duration_s, stop.is_set)
        stats = simulator.drain(Deadline.after(DRAIN_S, clock.monotonic_s))
    typer.echo(
        f"{stats.requests} requests, {stats.scored} scored, {stats.lost} lost, {stats.duplicates} duplicates", err=True
    )
    return 0 if stats.lost == 0 else 1


def _fields(simulator: Simulator) -> dict[str, Any]:
    return simulator.stats.fields()
