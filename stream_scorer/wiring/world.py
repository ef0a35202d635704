"""Where the demo runs: an embedded broker and Valkey, or the user's own servers, with topics and keys of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esmm.batch import zero_block
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.adapters.kafka_admin import delete_topics
from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.kafka_home import KafkaHome
from stream_scorer.embedded.market_features import MARKET_TOML
from stream_scorer.embedded.plan import DemoPlan
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import Settings, Topics, load
from stream_scorer.wiring import connect

PARTITIONS = 2
TOPICS_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class World:
    """A place to run in. ``config`` is the settings file of every process, ``profile`` says in words what it is."""

    folder: Path
    config: Path
    profile: str


@dataclass(frozen=True)
class WorldOptions:
    """The user's own servers, or None for embedded ones. ``name`` marks topics, groups and keys on them."""

    bootstrap: str | None
    kafka_home: Path | None
    redis: str | None
    name: str


@contextlib.contextmanager
def prepare_world(folder: Path, options: WorldOptions) -> Iterator[World]:
    """Start what is needed, create topics, write settings and schema; on leaving remove what was made elsewhere."""
    shared = options.bootstrap is not None or options.kafka_home is not None
    topics = _topics(options.name if shared else "")
    with ExitStack() as stack:
        bootstrap, broker = _broker(stack, options, topics)
        redis_url, store = _redis(stack, options)
        (folder / "features.toml").write_text(MARKET_TOML)
        config = folder / "stream-scorer.toml"
        config.touch(mode=0o600)  # it may hold a password
        config.write_text(_settings_text(folder, options.name, topics, {"kafka": bootstrap, "redis": redis_url}))
        settings = load(config)
        if shared:
            _own_topics(stack, settings, topics)
        announce(settings)
        if options.redis is not None:
            stack.callback(_forget_features, settings)
        yield World(folder, config, f"{broker} and {store}")


def _topics(prefix: str) -> Topics:
    lead = f"{prefix}." if prefix else ""
    return Topics(**{name: lead + value for name, value in Topics().model_dump().items()})


def _broker(stack: ExitStack, options: WorldOptions, topics: Topics) -> tuple[str, str]:
    if options.bootstrap is not None:
        return options.bootstrap, f"Kafka at {options.bootstrap}"
    if options.kafka_home is not None:
        return stack.enter_context(KafkaHome(options.kafka_home)).bootstrap, "Apache Kafka started here"
    broker = EmbeddedBroker(dict.fromkeys(topics.model_dump().values(), PARTITIONS))
    return stack.enter_context(broker).bootstrap, "the embedded broker"


def _redis(stack: ExitStack, options: WorldOptions) -> tuple[str, str]:
    if options.redis is not None:
        return options.redis, "your Redis"
    return stack.enter_context(EmbeddedRedis()).url, "embedded Valkey"


def _own_topics(stack: ExitStack, settings: Settings, topics: Topics) -> None:
    config = connect.kafka_config(settings)
    names = list(topics.model_dump().values())
    connect.make_topics(settings, PARTITIONS, 1, TOPICS_TIMEOUT_S)
    stack.callback(delete_topics, config, names, TOPICS_TIMEOUT_S)


def announce(settings: Settings) -> None:
    """Note the schema in Redis before anything is written: a scorer refuses to start on features it cannot read."""
    layouts = connect.entity_layouts(connect.load_schema(settings))
    writer = FeatureWriter(connect.redis_config(settings), layouts)
    try:
        for entity, layout in layouts.items():
            writer.write(entity, [], zero_block(layout, 0), np.zeros(0, np.int64))
    finally:
        writer.close()


def _forget_features(settings: Settings) -> None:
    writer = FeatureWriter(connect.redis_config(settings), connect.entity_layouts(connect.load_schema(settings)))
    try:
        writer.forget()
    finally:
        writer.close()


def _settings_text(folder: Path, name: str, topics: Topics, where: dict[str, str]) -> str:
    """The settings as a file, so that a reader of ``--keep DIR`` sees what was run."""
    tables: dict[str, dict[str, object]] = {
        "kafka": {
            "bootstrap": where["kafka"],
            "scorer_group": f"{name}-scorer",
            "trainer_group": f"{name}-trainer",
            "fetch_wait_ms": 5,
        },
        "kafka.topics": dict(topics.model_dump()),
        "redis": {"url": where["redis"], "prefix": name, "cache_ttl_s": 2.0},
        "scorer": {"linger_ms": 2.0, "served_top_k": 50},
        "model": {
            "schema_file": str(folder / "features.toml"),
            "store": str(folder / "models"),
            "tower_hidden_units": [64, 32],
            "init_std": 0.1,
            "poll_s": 0.25,
        },
        "trainer": {
            **DemoPlan().trainer_settings(),
            "batch_rows": 64,
            "learning_rate": 0.01,
            "embedding_learning_rate": 0.05,
            "max_wait_s": 0.5,
            "window_examples": 2_000,
            "checkpoint_dir": str(folder / "checkpoints"),
        },
    }
    lines = ["# Written by stream-scorer demo."]
    for table, values in tables.items():
        lines.append(f"\n[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
