"""What a trainer leaves behind when something fails: no checkpoint of half a step, no commit, a status that says so."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from confluent_kafka import KafkaError, KafkaException

from stream_scorer.adapters.checkpoints import DirectoryCheckpoints
from stream_scorer.adapters.kafka import COMMITTED_TRIES, KafkaConfig, KafkaSource
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.drift import DriftPolicy
from stream_scorer.core.gate import GatePolicy
from stream_scorer.core.merge import Merge
from stream_scorer.core.records import TopicPartition
from stream_scorer.trainer.steps import Steps
from tests.builders import record
from tests.fakes import FakeMetrics
from tests.servers import free_ports
from tests.trainer_kit import POLICY, START_MS, Market, TinyLearner, TrainerWorld


class Failing(TinyLearner):
    """Cannot take a step."""

    def step(self, examples):
        raise ZeroDivisionError


def test_a_last_step_that_failed_is_neither_saved_nor_committed(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, make_learner=Failing).with_policy(overlap=True, max_records=10)
    Market(requests=200).fill(world.source)
    while not world.trainer._steps.rows:
        world.turn()
    stop = threading.Event()
    stop.set()
    with pytest.raises(ZeroDivisionError):
        world.trainer.run(stop)
    world.source.close()  # revokes its partitions, at which a healthy trainer saves and commits
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert world.source.committed == {}


class Overflown(TinyLearner):
    """Refuses every step once its weights are no numbers, as a learner does whose loss is none then."""

    def step(self, examples):
        before = self.weights.copy()
        stats = super().step(examples)
        if not stats.finite:
            self.weights = before
        return stats


def test_weights_that_are_no_numbers_heal_although_nothing_can_be_learned_any_more(tmp_path: Path) -> None:
    policy = replace(POLICY, gate=GatePolicy(min_examples=50), publish_every_s=10.0)
    world = TrainerWorld(tmp_path, policy=policy, make_learner=Overflown)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.current() == 2
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    good = world.learner.weights.copy()
    world.learner.weights = np.full_like(good, np.nan)
    Market(requests=100, start_ms=START_MS + 60_000, name="more").fill(world.source)
    world.until_idle()
    assert world.trainer._tally.refused_steps > 0
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.trainer._publisher.tally.holds == {"nonfinite": 1}
    np.testing.assert_array_equal(world.learner.weights, good)


def test_a_checkpoint_never_holds_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """Two of them would push out the good ones, and no restart could go on."""
    world = TrainerWorld(tmp_path, policy=replace(POLICY, publish_every_s=1e9, checkpoint_every_s=10.0))
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    good = world.learner.weights.copy()
    for number in range(3):
        world.learner.weights = np.full_like(good, np.nan)
        Market(requests=3, start_ms=START_MS + 60_000 * (number + 1), name=f"more-{number}").fill(world.source)
        world.clock.advance(10.1)
        world.trainer.step()
    assert np.isfinite(world.learner.weights).all()
    world.restart()
    world.trainer.start()
    np.testing.assert_array_equal(world.learner.weights, good)  # every heal went back to them


def test_a_step_that_failed_at_once_is_not_in_flight() -> None:
    def fail(_):
        raise ZeroDivisionError

    steps = Steps(fail, lambda: 0.0, beside=False)
    with pytest.raises(ZeroDivisionError):
        steps.launch(SimpleNamespace(rows=3), 0)
    assert steps.rows == 0
    assert steps._flying is None  # so that whoever collects does not wait for good
    assert steps.collect() is None


def test_as_many_waiting_records_as_may_wait_end_the_waiting() -> None:
    """At the bound nothing more is polled: a merge that waited on there would wait until it stalls."""
    full, below = Merge(1.0, 3), Merge(1.0, 4)
    for merge in (full, below):
        merge.assign([TopicPartition("a", 0), TopicPartition("b", 0)], 0.0)
        merge.push([record(b"", at, 0, topic="a", timestamp_ms=at) for at in range(3)], 0.0)
    assert full.take(1, 0.0, ended=[]).records
    assert not below.take(1, 0.0, ended=[]).records


def test_what_was_held_out_is_forgotten_with_the_world_it_is_of(tmp_path: Path) -> None:
    drift = DriftPolicy(warmup_rows=500, heal_rows=100, cluster_rows=4, picked=0.5, adopt_rows=600)
    policy = replace(POLICY, gate=GatePolicy(min_examples=50), drift=drift, holdout=0.2)
    world = TrainerWorld(tmp_path, policy=policy)
    Market(requests=600).fill(world.source)
    world.until_idle()

    def prices() -> set[float]:
        first, _ = world.trainer._publisher._rows.held_out()
        assert first is not None
        return set(np.unique(first.examples.item.dense_ND).tolist())

    assert len(prices()) > 5
    Market(requests=900, blank=True, start_ms=START_MS + 20_000, name="bad").fill(world.source)
    world.until_idle()
    assert world.trainer._tally.skipped > 500
    assert world.trainer._drift.reason == ""  # adopted: the price stays away
    assert prices() == {0.0}


@pytest.fixture
def source() -> Iterator[KafkaSource]:
    config = KafkaConfig(f"127.0.0.1:{free_ports(1)[0]}")
    made = KafkaSource(config, ["t"], "g", FakeMetrics())
    real = made._consumer
    yield made
    real.close()


@pytest.mark.parametrize("failures", [0, COMMITTED_TRIES - 1, COMMITTED_TRIES])
def test_committed_offsets_are_asked_for_a_few_times(source: KafkaSource, failures: int) -> None:
    asked = []

    def committed(partitions, timeout):
        asked.append(timeout)
        if len(asked) <= failures:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        known = {0: 7, 1: -1001}  # the second one was never committed
        return [SimpleNamespace(topic="t", partition=n, offset=at, error=None) for n, at in known.items()]

    source._consumer = SimpleNamespace(committed=committed)
    with structlog.testing.capture_logs() as logs:
        found = source._committed([])
    assert found == ({} if failures == COMMITTED_TRIES else {TopicPartition("t", 0): 7})
    assert len(asked) == min(failures + 1, COMMITTED_TRIES)
    levels = [entry["log_level"] for entry in logs]
    assert levels == (["warning"] if failures == COMMITTED_TRIES else [])


REFUSED = """
import sys
import threading
from stream_scorer import cli
from stream_scorer.wiring import connect, run
from tests.fakes import FakeSink
from tests.trainer_kit import SCHEMA, Market, TwoTopicSource

source = TwoTopicSource()
source.fence = sys.argv.pop(1) == "refused"
Market(requests=20).fill(source)


class WhenRead(threading.Event):
    def is_set(self):
        return source.exhausted


cli._stop_on_signals = WhenRead
connect.require_topics = lambda *_: None
connect.load_schema = lambda _: SCHEMA
run.KafkaSource = lambda *_, **__: source
run.KafkaSink = lambda _: FakeSink()
cli.main()
"""


@pytest.mark.parametrize(("commits", "status"), [("taken", 0), ("refused", 1)])
def test_a_final_commit_that_the_group_refuses_is_an_exit_status(tmp_path: Path, commits: str, status: int) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[model]\nstore = "{tmp_path}/m"\n[trainer]\ncheckpoint_dir = "{tmp_path}/c"\n')
    command = [sys.executable, "-c", REFUSED, commits, "train", "--config", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == status, done.stderr[-2_000:]
    said = "the last offsets were not committed (ILLEGAL_GENERATION); the checkpoint has them"
    assert (said in done.stderr) == (status == 1)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "c" / "current").exists()  # all that was learned is safe either way


def test_refused_checkpoints_do_not_push_good_ones_out(tmp_path: Path) -> None:
    def save(store: DirectoryCheckpoints) -> None:
        store.save(lambda _: None, {}, {"x": np.zeros(1, np.float32)})

    store = DirectoryCheckpoints(tmp_path)
    save(store)
    save(store)
    (tmp_path / "000000000002" / "state.json").unlink()
    assert store.restore(lambda _: None) == 1
    save(store)  # were the torn one counted, this would be the only one left to start from
    (tmp_path / "000000000003" / "state.json").unlink()
    assert DirectoryCheckpoints(tmp_path).restore(lambda _: None) == 1


def test_a_checkpoint_whose_arrays_are_too_short_is_refused(tmp_path: Path) -> None:
    store = DirectoryCheckpoints(tmp_path)
    for rows in (1, 0):
        store.save(lambda _: None, {}, {"x": np.zeros(rows, np.float32)})
    assert store.restore(lambda saved: saved.arrays["x"][0]) == 1


def test_a_pointer_that_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".current-abc").write_text("000000000001\n")
    DirectoryCheckpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []
