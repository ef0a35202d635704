"""``models rollback`` reaches a running scorer within two seconds, while it scores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Consumer, Producer

from stream_scorer.adapters.model_store import DirectoryStore
from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import Topics
from stream_scorer.wiring import build, connect
from tests.integration.loop import Loop, loop_on, until

LIMIT_S = 2.0
EVERY_S = 0.02

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    topics = Topics()
    with (
        EmbeddedBroker(dict.fromkeys(topics.model_dump().values(), 2)) as broker,
        EmbeddedRedis() as redis,
        loop_on(tmp_path, broker.bootstrap, redis.url, topics) as made,
    ):
        made.config.write_text(made.config.read_text().replace("poll_s = 0.1", "poll_s = 0.5"))  # the default
        yield made


def publish(loop: Loop, versions: int) -> DirectoryStore:
    """Versions as a trainer makes them."""
    store = DirectoryStore(Path(loop.settings.model.store))
    learner = build.learner(loop.settings, connect.load_schema(loop.settings))
    for _ in range(versions):
        store.publish(lambda path, number: learner.export(path, {"version": number}))
    return store


class Traffic:
    """Requests one after another, and which version scored each."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._stop = loop, threading.Event()
        self.seen: list[tuple[float, int]] = []  # scored at, in seconds of the wall clock; model version
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._ask, self._listen)]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(10)

    def _ask(self) -> None:
        producer, number = Producer({"bootstrap.servers": self._loop.settings.kafka.bootstrap, "log_level": 3}), 0
        while not self._stop.wait(EVERY_S):
            number += 1
            body = {"request_id": f"r{number}", "user_id": f"u{number % 5}", "items": ["1", "2", "3"]}
            request = orjson.dumps({**body, "ts": time.time_ns() // 1_000_000, "context": {"hour": 3}})
            producer.produce(self._loop.topics.requests, request, body["user_id"].encode())
            producer.poll(0)
        producer.flush(10)

    def _listen(self) -> None:
        kafka = self._loop.settings.kafka
        consumer = Consumer(
            {"bootstrap.servers": kafka.bootstrap, "group.id": "listener", "auto.offset.reset": "earliest"}
            | {"log_level": 3, "enable.auto.commit": False}
        )
        consumer.subscribe([self._loop.topics.scores])
        while not self._stop.is_set():
            for message in consumer.consume(100, 0.05):
                if message.error() is None:
                    score = orjson.loads(message.value() or b"")
                    self.seen.append((score["scored_at"] / 1000, score["model_version"]))
        consumer.close()


def test_a_rollback_reaches_a_running_scorer_within_two_seconds(loop: Loop) -> None:
    store = publish(loop, 3)
    scorer = loop.start("score")
    traffic = Traffic(loop)
    with traffic.flowing():
        until(lambda: len(traffic.seen) > 20, "scores to flow")
        assert {version for _, version in traffic.seen} == {3}
        for back_to in (2, 1):  # neither was ever loaded by this scorer
            done = loop.command("models", "rollback")
            done_s = time.time()
            assert done.returncode == 0, done.stderr
            assert store.current() == back_to
            until(lambda: traffic.seen[-1][1] == back_to, f"scores of version {back_to}", 20)  # noqa: B023
            first_s = min(at_s for at_s, version in traffic.seen if version == back_to)
            pointed_s = (Path(loop.settings.model.store) / "current").stat().st_mtime
            print(
                f"version {back_to}: {first_s - pointed_s:.2f} s after the pointer, {first_s - done_s:.2f} s after exit"
            )
            assert first_s - done_s < LIMIT_S
            assert first_s - pointed_s < LIMIT_S
        versions = [version for _, version in sorted(traffic.seen)]
        assert versions == sorted(versions, reverse=True), "no score of a version that was rolled back comes later"
        assert scorer.alive
