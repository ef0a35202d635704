"""A trainer on Apache Kafka, killed by SIGKILL at random moments, ends with the weights of one that was never killed.

The topics hold everything beforehand, so the order of records is a function of their content (`core/merge.py`). Time
does not enter: nothing is published or stepped by the clock within the test.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from stream_scorer.adapters.kafka import KafkaConfig
from stream_scorer.adapters.kafka_admin import TopicPlan, create_topics
from stream_scorer.wiring.processes import Child
from tests.integration.loop import until
from tests.trainer_kit import Market, TwoTopicSource

KILLS, PATIENCE_S = 3, 100.0
SCHEMA_TOML = "\n".join(
    f'[[features]]\nname = "{name}"\nsource = "{source}"\n{rest}\n'
    for name, source, rest in (
        ("user_id", "user", 'kind = "sparse"\nvocabulary_size = 20\nembedding_dim = 2'),
        ("item_id", "item", 'kind = "sparse"\nvocabulary_size = 10\nembedding_dim = 2'),
        ("price", "item", 'kind = "dense"'),
        ("mood", "user", 'kind = "dense"'),
        ("position", "context", 'kind = "sparse"\nvocabulary_size = 5\nembedding_dim = 2'),
    )
)


class Life:
    """One installation of the trainer: its own group, store and checkpoints, on topics that are shared."""

    def __init__(self, folder: Path, bootstrap: str, topics: dict[str, str], join_state: str) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "features.toml").write_text(SCHEMA_TOML)
        tables: dict[str, dict[str, Any]] = {
            "kafka": {
                "bootstrap": bootstrap, "trainer_group": folder.name + topics["served"], "session_timeout_ms": 6_000,
            },
            "kafka.topics": topics,
            "model": {
                "schema_file": str(folder / "features.toml"), "store": str(folder / "models"),
                "tower_hidden_units": [16, 8],
            },
            "trainer": {
                "click_window_s": 1.0, "observation_window_s": 2.0, "attribution_window_s": 8.0, "served_ttl_s": 5.0,
                "lateness_s": 0.2, "batch_rows": 4, "max_wait_s": 30.0, "publish_every_s": 1e6,
                "publish_every_examples": 800, "gate_min_examples": 50, "checkpoint_every_s": 0.25,
                "checkpoint_dir": str(folder / "checkpoints"), "join_state": join_state,
            },
        }  # fmt: skip
        lines = []
        for table, values in tables.items():
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        (folder / "config.toml").write_text("\n".join(lines) + "\n")

    def begin(self) -> Child:
        args = ["train", "--config", str(self.folder / "config.toml"), "--status-json"]
        child = Child("train", args, self.folder / "log", {"OMP_NUM_THREADS": "1"})
        until(lambda: bool(child.status.get("ready")) or not child.alive, "the trainer to be ready")
        assert child.alive, child.tail(10)
        return child

    def wait(self, child: Child, done: Callable[[], bool], what: str) -> None:
        """Until it is done, or fail with how far it came."""
        give_up = time.monotonic() + PATIENCE_S
        while not done():
            reached = {name: child.status.get(name) for name in ("served", "feedback", "lag", "steps")}
            assert child.alive, f"{what}: it ended at {reached}; {child.tail(20)}"
            assert time.monotonic() < give_up, f"{what}: it came to {reached}; {child.tail(20)}"
            time.sleep(0.05)

    def learn_everything(self, served: int, feedback: int) -> dict[str, Any]:
        """To the end of the topics; what it then was."""
        child = self.begin()
        try:
            everything = (served, feedback, 0)
            self.wait(
                child,
                lambda: (child.status["served"], child.status["feedback"], child.status["lag"]) == everything,
                f"{everything}",
            )
        finally:
            child.stop(30.0)
            child.close()
        assert child.exit_code == 0, child.tail(10)
        newest = max((self.folder / "checkpoints").glob("0*"))
        digest = hashlib.sha256()
        for path in sorted((newest / "learner").iterdir()):
            digest.update(path.read_bytes())
        state = json.loads((newest / "state.json").read_text())
        del state["tally"]["checkpoints"]
        return {
            "learner": digest.hexdigest(),
            **{name: state[name] for name in ("tally", "joiner", "merge", "offsets")},
        }


def fill(bootstrap: str, topics: dict[str, str]) -> tuple[int, int]:
    """The market's messages with their own times, two partitions each; how many of each kind."""
    forever = {"retention.ms": "-1"}  # the messages' own times are years ago
    create_topics(KafkaConfig(bootstrap), TopicPlan(list(topics.values()), 2, 1, forever), 20.0)
    source = TwoTopicSource()
    Market(requests=3_000).fill(source)  # some seconds of work: the first death must come before its end
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5, "log_level": 3})
    counts = {"served": 0, "feedback": 0}
    for where, items in source.log.items():
        for item in items:
            producer.produce(
                topics[where.topic], item.value, item.key, partition=where.partition, timestamp=item.timestamp_ms
            )
            producer.poll(0)
        counts[where.topic] += len(items)
    assert producer.flush(20) == 0
    return counts["served"], counts["feedback"]


@pytest.mark.real_kafka
@pytest.mark.timeout(300)
def test_killed_on_kafka_at_any_moment_it_reaches_the_same_weights_bit_for_bit(
    tmp_path: Path, kafka_bootstrap: str
) -> None:
    topics = {name: f"crash-{time.time_ns()}-{name}" for name in ("served", "feedback", "rejects")}
    served, feedback = fill(kafka_bootstrap, topics)
    expected = Life(tmp_path / "whole", kafka_bootstrap, topics, "memory").learn_everything(served, feedback)
    assert expected["tally"]["first"] > 2_000
    assert expected["tally"]["matured"] > 100

    cut, rng = Life(tmp_path / "cut", kafka_bootstrap, topics, "rocksdb"), random.Random(5)
    steps, deaths = expected["tally"]["steps"], []
    for number in range(KILLS):
        enough = rng.randrange(steps * number // (KILLS + 1), steps * (number + 1) // (KILLS + 1))
        child = cut.begin()
        cut.wait(child, lambda: child.status["steps"] >= enough, f"step {enough}")  # noqa: B023
        time.sleep(rng.uniform(0.0, 0.3))  # the test's subject: an arbitrary moment
        child.signal(signal.SIGKILL)
        assert child.wait(10)
        child.close()
        assert child.exit_code == -signal.SIGKILL, child.tail(10)
        deaths.append(child.status["steps"])
    assert deaths[0] < steps, f"it had learned everything before it was killed: {deaths} of {steps} steps"
    assert cut.learn_everything(served, feedback) == expected
