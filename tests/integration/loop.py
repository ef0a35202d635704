"""The whole loop as processes: settings, topics and schema, then commands run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, Message, Producer

from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.embedded.datasets import DATASETS
from stream_scorer.settings import Settings, Topics, load
from stream_scorer.wiring.processes import Child
from stream_scorer.wiring.world import announce

PATIENCE_S = 60.0
WINDOWS = {"click_window_s": 60.0, "observation_window_s": 120.0, "attribution_window_s": 3_600.0}


def until(done: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    """Look every 50 ms; fail with what was waited for."""
    give_up = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < give_up, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


class Loop:
    """One installation on one Kafka and one Redis, with topics, groups and keys of its own."""

    def __init__(self, folder: Path, bootstrap: str, redis_url: str, topics: Topics | None = None) -> None:
        self.folder = folder
        self.name = f"t{uuid.uuid4().hex[:8]}"
        own = {name: f"{self.name}-{value}" for name, value in Topics().model_dump().items()}
        self.topics = topics or Topics(**own)
        (folder / "features.toml").write_text(DATASETS["taobao"].schema_toml)
        self.config = folder / "stream-scorer.toml"
        self.config.write_text(self._settings(bootstrap, redis_url))
        self.settings: Settings = load(self.config, {})
        self.children: list[Child] = []

    def _settings(self, bootstrap: str, redis_url: str) -> str:
        tables: dict[str, dict[str, Any]] = {
            "kafka": {
                "bootstrap": bootstrap,
                "scorer_group": f"{self.name}-scorer",
                "trainer_group": f"{self.name}-trainer",
                "session_timeout_ms": 2_000,
                "partitions": 2,
                "fetch_wait_ms": 5,
            },
            "kafka.topics": self.topics.model_dump(),
            "redis": {"url": redis_url, "prefix": self.name, "budget_ms": 2_000, "cache_ttl_s": 1.0},
            "model": {
                "schema_file": str(self.folder / "features.toml"),
                "store": str(self.folder / "models"),
                "tower_hidden_units": [32, 16],
                "init_std": 0.1,
                "poll_s": 0.1,
            },
            "trainer": {
                **WINDOWS,
                "batch_rows": 64,
                "max_wait_s": 0.5,
                "publish_every_s": 1.0,
                "gate_min_examples": 50,
                "gate_logloss_margin": 0.5,
                "gate_pcoc": [0.01, 100.0],
                "checkpoint_every_s": 2.0,
                "checkpoint_dir": str(self.folder / "checkpoints"),
            },
        }
        lines = []
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"

    def prepare(self, create_topics: bool) -> None:
        """Topics as a user makes them, and the schema noted in Redis."""
        if create_topics:
            done = self.command("topics", "create")
            assert done.returncode == 0, done.stderr
        announce(self.settings)

    def command(self, *args: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        words = [sys.executable, "-m", "stream_scorer.cli", *args, "--config", str(self.config)]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False, env=_env())

    def start(self, command: str) -> Child:
        """``score`` or ``train``, ready when this returns."""
        child = self.begin(command)
        until(lambda: bool(child.status.get("ready")) or not child.alive, f"{command} to be ready")
        assert child.alive, child.tail(10)
        return child

    def begin(self, command: str, *args: str) -> Child:
        """Start a command and do not wait."""
        words = [command, "--config", str(self.config), *args]
        if command in ("score", "train"):
            words.append("--status-json")
        child = Child(command, words, self.folder / f"{command}.log")
        self.children.append(child)
        return child

    def produce(self, topic: str, messages: list[tuple[bytes | None, bytes | None]]) -> None:
        """(key, value) pairs, acknowledged."""
        address = self.settings.kafka.bootstrap
        producer = Producer({"bootstrap.servers": address, "message.max.bytes": 2 << 20, "log_level": 3})
        for key, value in messages:
            producer.produce(topic, value, key)
        assert producer.flush(20) == 0

    def read(self, topic: str, enough: Callable[[list[Message]], bool]) -> list[Message]:
        """Everything in a topic, until ``enough``."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.settings.kafka.bootstrap,
                "group.id": f"{self.name}-{uuid.uuid4().hex[:6]}",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
                "log_level": 3,
            }
        )
        consumer.subscribe([topic])
        messages: list[Message] = []
        give_up = time.monotonic() + PATIENCE_S
        try:
            while not enough(messages):
                assert time.monotonic() < give_up, f"{len(messages)} messages in {topic}, and more were expected"
                messages += [message for message in consumer.consume(500, 0.2) if message.error() is None]
        finally:
            consumer.close()
        return messages

    def stop(self) -> None:
        """Everything down, in the order of the stream."""
        for child in self.children:
            child.stop(30.0)
            child.close()

    def forget(self) -> None:
        """Leave no keys behind."""
        from stream_scorer.wiring import connect

        layouts = connect.entity_layouts(connect.load_schema(self.settings))
        writer = FeatureWriter(connect.redis_config(self.settings), layouts)
        writer.forget()
        writer.close()


def _env() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("STREAM_SCORER_")}


@contextmanager
def loop_on(folder: Path, bootstrap: str, redis_url: str, topics: Topics | None = None) -> Iterator[Loop]:
    """A loop that is prepared and goes away; ``topics`` exist already when given."""
    loop = Loop(folder, bootstrap, redis_url, topics)
    try:
        loop.prepare(create_topics=topics is None)
        yield loop
    finally:
        loop.stop()
        loop.forget()


def last_json(text: str) -> dict[str, Any]:
    """The object in the last line."""
    found = json.loads(text.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found
