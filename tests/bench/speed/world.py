"""The world that every contender runs in: one broker, one Redis, one request topic, one set of features and weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from esmm.batch import FeatureBlock
from esmm.checkpoint import save_version
from esmm.features import DenseFeat, FeatureSchema
from esmm.model import ESMM
from stream_scorer.adapters.feature_writer import FeatureWriter
from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import load
from stream_scorer.wiring import connect
from tests.servers import KafkaServer

ROOT = Path(__file__).parents[3]
PEERS = ROOT / "build" / "bench" / ".venv-peers"
FLOATS, TOWERS = 80, (256, 128)
OUTPUT_SETTINGS = {
    "message.timestamp.type": "LogAppendTime",
    "segment.bytes": str(256 << 20),
    "file.delete.delay.ms": "1000",
}
MOCK_PARTITIONS = 64  # a partition of the embedded broker keeps 5 MiB


@dataclass(frozen=True)
class Workload:
    """What is scored."""

    requests: int = 400_000
    candidates: int = 50
    catalogue: int = 10_000
    users: int = 10_000
    zipf: float = 0.0  # 0: every item is as popular as any other
    partitions: int = 4

    def ids(self, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Users (R) and distinct items a request (R, K)."""
        rng = np.random.default_rng(seed)
        users_R = rng.integers(0, self.users, count)
        edges = None
        if self.zipf:
            weight = 1.0 / np.arange(1, self.catalogue + 1) ** self.zipf
            edges = np.cumsum(weight / weight.sum())
        items_RK = np.zeros((count, self.candidates), np.int64)
        left = np.arange(count)
        while len(left):
            drawn = self._draw(rng, edges, (len(left), 3 * self.candidates))
            enough = _first_distinct(drawn, self.candidates)
            items_RK[left[enough[1]]] = enough[0]
            left = left[~enough[1]]
        return users_R, items_RK

    def bodies(self, count: int, seed: int = 0) -> Iterator[tuple[bytes, bytes]]:
        """(key, message) of each request."""
        users_R, items_RK = self.ids(count, seed)
        names = np.array([f"i{n}" for n in range(self.catalogue)], object)
        for at in range(count):
            user = f"u{users_R[at]}"
            request = {
                "request_id": f"r{at}",
                "user_id": user,
                "items": names[items_RK[at]].tolist(),
                "ts": 1_700_000_000_000,
            }
            yield user.encode(), orjson.dumps(request)

    def _draw(self, rng: np.random.Generator, edges: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
        if edges is None:
            return rng.integers(0, self.catalogue, shape)
        return np.searchsorted(edges, rng.random(shape)).clip(max=self.catalogue - 1)


def _first_distinct(drawn_RN: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``wanted`` different values of each row that has as many (a request lists an item once), and which do."""
    order = np.argsort(drawn_RN, 1, kind="stable")
    by_value = np.take_along_axis(drawn_RN, order, 1)
    first = np.ones_like(drawn_RN, np.bool_)
    np.put_along_axis(first, order[:, 1:], by_value[:, 1:] != by_value[:, :-1], 1)
    place = np.cumsum(first, 1)
    enough = place[:, -1] >= wanted
    kept = first & (place <= wanted) & enough[:, None]
    return drawn_RN[kept].reshape(-1, wanted), enough


class BenchKafka(KafkaServer):
    """Kafka as it is run for speed: the whole JIT compiler and a heap of 1 GiB."""

    def _run(self, main: str, *words: str) -> list[str]:
        slow = {"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx512m"}
        line = [word for word in super()._run(main, *words) if word not in slow]
        return [line[0], "-Xmx1g", "-XX:+UseG1GC", *line[1:]]


class World:
    """Addresses, and what goes in and out of them."""

    def __init__(self, folder: Path, bootstrap: str, redis_url: str, real: bool, workload: Workload) -> None:
        self.folder, self.bootstrap, self.redis_url, self.real, self.workload = (
            folder,
            bootstrap,
            redis_url,
            real,
            workload,
        )
        self.admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 3})
        self.partitions = workload.partitions if real else MOCK_PARTITIONS
        self.model: ESMM
        self.users_ND: np.ndarray
        self.items_ND: np.ndarray

    def client(self, **options: object) -> dict[str, object]:
        return {"bootstrap.servers": self.bootstrap, "log_level": 3, **options}

    def create(self, *names: str, config: dict[str, str] | None = None) -> None:
        """Topics stamped by the broker as messages are appended; those of the embedded broker exist already."""
        if not self.real:
            return
        topics = [NewTopic(name, self.partitions, 1, config=config or OUTPUT_SETTINGS) for name in names]
        for future in self.admin.create_topics(topics, operation_timeout=10).values():
            future.result(15)
        give_up = time.monotonic() + 15
        while not set(names) <= set(self.admin.list_topics(timeout=5).topics):
            assert time.monotonic() < give_up, names
            time.sleep(0.05)

    def delete(self, *names: str) -> None:
        if self.real:
            for future in self.admin.delete_topics(list(names), operation_timeout=10).values():
                future.result(15)

    def prepare(self) -> None:
        """Model, features, requests."""
        self._write_model()
        self._write_features()
        self.create("requests")
        self.produce("requests", self.workload.requests)

    def settings_text(
        self, name: str, topics: tuple[str, str], scorer: dict[str, object], redis: dict[str, object]
    ) -> str:
        """This scorer's settings file: what is not named here is the default."""
        tables: dict[str, dict[str, object]] = {
            "kafka": {"bootstrap": self.bootstrap, "scorer_group": name},
            "kafka.topics": {
                "requests": topics[0],
                "scores": topics[1],
                "served": f"{topics[1]}-served",
                "rejects": "rejects",
            },
            "redis": {"url": self.redis_url, "budget_ms": 5_000, "cache_ttl_s": 300.0, **redis},
            "scorer": scorer,
            "model": {
                "schema_file": str(self.folder / "features.toml"),
                "store": str(self.folder / "models"),
                "tower_hidden_units": list(TOWERS),
            },
        }
        lines = []
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        return "\n".join(lines) + "\n"

    def _write_model(self) -> None:
        schema = FeatureSchema([DenseFeat("user", FLOATS, source="user"), DenseFeat("item", FLOATS, source="item")])
        (self.folder / "features.toml").write_text(schema.to_toml())
        self.model = ESMM(schema, TOWERS, init_std=0.08, seed=3).eval()
        store = DirectoryStore(self.folder / "models")
        store.publish(lambda path, version: save_version(path, self.model, {"version": version}) and None)
        np.savez(self.folder / "weights.npz", **{k: v.numpy() for k, v in self.model.state_dict().items()})

    def _write_features(self) -> None:
        """Packed records for this scorer, and the same floats as plain bytes under ``user:ID``, ``item:ID`` for peers."""
        import redis

        rng = np.random.default_rng(1)
        load_, rows = self.workload, 20_000
        self.users_ND = rng.standard_normal((load_.users, FLOATS), np.float32)
        self.items_ND = rng.standard_normal((load_.catalogue, FLOATS), np.float32)
        path = self.folder / "features-writer.toml"
        path.write_text(self.settings_text("writer", ("requests", "none"), {}, {}))
        settings = load(path, {})
        writer = FeatureWriter(connect.redis_config(settings), connect.entity_layouts(connect.load_schema(settings)))
        peers = redis.Redis.from_url(self.redis_url)
        now = int(time.time() * 1000)
        for kind, letter, values in (("user", "u", self.users_ND), ("item", "i", self.items_ND)):
            for start in range(0, len(values), rows):
                part = values[start : start + rows]
                ids = [f"{letter}{start + at}" for at in range(len(part))]
                block = FeatureBlock(np.zeros((len(part), 0), np.int64), part)
                writer.write(kind, ids, block, np.full(len(part), now))
                peers.mset({f"{kind}:{id_}": row.tobytes() for id_, row in zip(ids, part, strict=True)})
        writer.close()
        peers.close()

    def produce(self, topic: str, count: int) -> None:
        producer = Producer(
            self.client(**{"linger.ms": 50, "compression.type": "lz4", "queue.buffering.max.messages": 1_000_000})
        )
        for start in range(0, count, 50_000):
            for key, value in self.workload.bodies(min(50_000, count - start), seed=start):
                producer.produce(topic, value, key)
            producer.flush()

    def consumer(self) -> Consumer:
        """One that stands outside every group."""
        return Consumer(
            self.client(**{"group.id": "bench", "enable.auto.commit": False, "auto.offset.reset": "earliest"})
        )

    def where(self, topic: str, offset: int = -1001) -> list[TopicPartition]:
        return [TopicPartition(topic, partition, offset) for partition in range(self.partitions)]


@contextmanager
def world(folder: Path, workload: Workload, topics: list[str]) -> Iterator[World]:
    """Apache Kafka from KAFKA_HOME, else the embedded broker with ``topics``; embedded Valkey."""
    home = os.environ.get("KAFKA_HOME", "")
    with EmbeddedRedis(max_memory_mb=6_000) as redis:
        if home:
            kafka = BenchKafka(Path(home), {"log.retention.check.interval.ms": "5000"})
            with kafka:
                yield _prepared(World(folder, kafka.bootstrap, redis.url, True, workload), ["rejects"])
        else:
            listed = dict.fromkeys(["requests", "rejects", *topics], MOCK_PARTITIONS)
            with EmbeddedBroker(listed) as broker:
                yield _prepared(World(folder, broker.bootstrap, redis.url, False, workload), [])


def _prepared(made: World, topics: list[str]) -> World:
    made.create(*topics)
    made.prepare()
    return made


def peers_python() -> str:
    """The interpreter of the peers' environment, made on first use."""
    python = PEERS / "bin" / "python"
    wanted = (ROOT / "tests" / "bench" / "requirements-peers.txt").read_text()
    done = PEERS / "requirements.txt"
    if not done.exists() or done.read_text() != wanted:
        shutil.rmtree(PEERS, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(ROOT / "tests" / "bench" / "requirements-peers.txt")], check=True)
        done.write_text(wanted)
    return str(python)


def plain_scores(made: World, user: int, items: np.ndarray) -> np.ndarray:
    """CTR and CTCVR (K, 2) by `ESMM.forward`."""
    rows = len(items)
    x = np.concatenate([np.repeat(made.users_ND[user : user + 1], rows, 0), made.items_ND[items]], 1)
    with torch.no_grad():
        return made.model(torch.from_numpy(x)).numpy()
