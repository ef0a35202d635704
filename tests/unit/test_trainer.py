"""The trainer among fakes: it learns, publishes through the gate, and restarts exactly."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
from safetensors.numpy import load_file, save_file

from esmm.batch import Kind, StepStats
from stream_scorer.core import metric_names as names
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.drift import DriftPolicy
from stream_scorer.core.errors import CommitRefused, ConfigurationError, FatalError, ModelRefused
from stream_scorer.core.gate import GatePolicy
from stream_scorer.core.gate_rows import identity
from stream_scorer.core.records import TopicPartition
from stream_scorer.trainer.loop import NO_CHECKPOINT
from tests.fakes import LOST, REVOKE, FakeSink, Item
from tests.trainer_kit import POLICY, START_MS, Market, TinyLearner, TrainerWorld, TwoTopicSource

GATED = replace(POLICY, gate=GatePolicy(min_examples=50), publish_every_s=10.0)


def drained(world: TrainerWorld) -> bool:
    return world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))


def learned(world: TrainerWorld) -> int:
    return sum(world.learner.seen)


def test_what_was_served_and_what_came_of_it_is_learned(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.quiet(20)
    drained(world)
    stats = world.trainer.stats()
    assert (stats.served, stats.rejected, stats.open_requests) == (300, 0, 0)
    assert stats.examples["first"] == 1_200
    assert stats.examples["matured"] == stats.outcomes["click"]
    assert stats.examples["late_conversion"] == stats.outcomes["conversion_late"] > 0
    assert learned(world) == sum(stats.examples.values())
    assert stats.ctr["rows"] == stats.ctcvr["rows"] == 1_200
    assert world.learner.weights[0, 1] > 0.1  # dearer items are clicked more in this market
    assert world.metrics.count(names.EXAMPLES, "first") == 1_200
    assert world.metrics.count(names.JOIN_OUTCOME, "impression") == 1_200


def test_a_step_has_a_fixed_number_of_rows_or_waited_long_enough(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=100, gap_ms=10).fill(world.source)
    Market(requests=3, gap_ms=1, start_ms=START_MS + 60_000, name="late").fill(world.source)
    world.until_idle()
    seen = world.learner.seen
    assert seen.count(64) >= 5
    assert sum(rows < 64 for rows in seen) <= 8  # the ends of what was due, not one step a record
    before = len(seen)
    world.quiet(0.9)
    assert len(seen) == before
    world.quiet(20)
    assert learned(world) == 103 * 4 + sum(world.trainer.stats().examples[k] for k in ("matured", "late_conversion"))


def test_an_empty_store_gets_a_first_version_at_once(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    world.trainer.step()
    assert world.store.current() == 1
    assert world.store.info(1).manifest["parent"] is None
    world.restart()
    world.trainer.step()
    assert world.store.versions() == [1]


def test_versions_are_published_by_time_only_when_something_was_learned(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    Market(requests=300).fill(world.source)
    world.until_idle()
    assert world.store.versions() == [1]
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.versions() == [1, 2]
    manifest = world.store.info(2).manifest
    assert (manifest["parent"], manifest["version"]) == (1, 2)
    assert manifest["offsets"]["served/0"] + manifest["offsets"]["served/1"] == 300
    assert manifest["examples"]["first"] > 50
    assert manifest["gate"]["candidate_ctr_logloss"] < manifest["gate"]["live_ctr_logloss"]
    world.quiet(30)  # the rest of the rows falls due, and is published
    versions = world.store.versions()
    world.quiet(60)
    assert world.store.versions() == versions
    assert world.metrics.count(names.VERSIONS_PUBLISHED) == len(versions)


def test_versions_are_published_by_examples(tmp_path: Path) -> None:
    world = TrainerWorld(
        tmp_path, policy=replace(GATED, publish_every_s=1e9, publish_every_examples=200, max_records=100)
    )
    Market(requests=300).fill(world.source)
    world.until_idle()
    assert len(world.store.versions()) >= 3


class Spoiled(TinyLearner):
    """Turns bad when told to."""

    spoil = ""

    def predict(self, examples):
        ctr, ctcvr = super().predict(examples)
        if self.spoil == "nan":
            return ctr * np.nan, ctcvr
        return (1 - ctr, ctcvr) if self.spoil == "worse" else (ctr, ctcvr)


@pytest.mark.parametrize(("spoil", "reason"), [("worse", "logloss_ctr"), ("nan", "nonfinite")])
def test_a_bad_candidate_is_held_and_the_live_version_stays(tmp_path: Path, spoil: str, reason: str) -> None:
    world = TrainerWorld(tmp_path, policy=replace(GATED, gate_rows=400), make_learner=Spoiled)
    Market(requests=300).fill(world.source)
    world.until_idle()
    drained(world)
    world.learner.spoil = spoil
    world.clock.advance(10.1)
    if spoil == "nan":
        good = world.learner.weights.copy()
        world.learner.weights[:] = np.nan
    world.trainer.step()
    assert world.store.versions() == [1]
    assert world.metrics.count(names.GATE, "hold", reason) == 1
    if spoil == "nan":  # the learner is back at its checkpoint
        np.testing.assert_array_equal(world.learner.weights, good)
    world.learner.spoil = ""
    Market(requests=400, start_ms=START_MS + 30_000, name="more").fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.current() == 2


def test_weights_that_are_no_numbers_without_a_checkpoint_end_the_process(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED, make_learner=Spoiled)
    Market(requests=300).fill(world.source)
    world.until_idle()
    drained(world)
    shutil.rmtree(tmp_path / "checkpoints" / "000000000001")
    world.learner.spoil = "nan"
    world.clock.advance(10.1)
    with pytest.raises(FatalError, match="no checkpoint to go back to"):
        world.trainer.step()


def test_the_gate_compares_with_the_version_that_was_rolled_back_to(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    for number in range(3):
        start_ms = START_MS + number * 60_000  # after all that the quiet time made event time pass
        Market(requests=200, seed=number, start_ms=start_ms, name=f"m{number}-").fill(world.source)
        world.until_idle()
        world.clock.advance(10.1)
        world.trainer.step()
    assert world.store.current() == 4
    world.store.promote(2)
    Market(requests=200, start_ms=START_MS + 240_000, name="after").fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.info(5).manifest["parent"] == 2


def test_a_live_version_that_cannot_be_read_does_not_stop_publishing(tmp_path: Path) -> None:
    def refuse(info):
        raise ModelRefused(info.version, "corrupt", "torn")

    world = TrainerWorld(tmp_path, policy=GATED, open_version=refuse)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.current() == 2


class Memorising(TinyLearner):
    """Knows by heart what it has learned, and says 0.9 of everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, float] = {}

    def predict(self, examples):
        ctr, ctcvr = super().predict(examples)
        keys = identity(examples).tolist()
        if self.known:
            ctr = np.array([self.known.get(key, 0.9) for key in keys], np.float32)
        return ctr, np.minimum(ctcvr, ctr)

    def step(self, examples):
        stats = super().step(examples)
        first = np.flatnonzero(examples.kind_B == Kind.FIRST)
        labels = np.clip(examples.click_B[first], 0.01, 0.99).tolist()
        self.known |= dict(zip(identity(examples.take(first)).tolist(), labels, strict=True))
        return stats


def test_a_candidate_is_not_judged_on_rows_it_has_learned(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED, make_learner=Memorising)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.versions() == [1]
    stats = world.trainer._publisher.tally
    assert stats.holds == {"logloss_ctr": 1}
    assert stats.numbers["now_ctr_logloss"] < 0.1
    assert stats.numbers["candidate_ctr_logloss"] > 0.7


def test_a_version_is_not_judged_on_rows_it_has_learned(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.store.current() == 2
    Market(requests=20, start_ms=START_MS + 60_000, name="few").fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    numbers = world.trainer._publisher.tally.numbers
    assert 80 <= numbers["candidate_ctr_rows"] == numbers["live_ctr_rows"] < 200  # not the 1,200 before
    assert numbers["best_ctr_rows"] == numbers["live_ctr_rows"]


class Decaying(TinyLearner):
    """Starts well and forgets: each version a little worse than the one before."""

    noise = 0.0

    def predict(self, examples):
        ctr, _ = super().predict(examples)
        ctr = np.clip(ctr + self.noise * (0.5 - ctr), 0.01, 0.99).astype(np.float32)
        return ctr, 0.35 * ctr

    def step(self, examples):
        ctr_B, ctcvr_B = self.predict(examples)
        return StepStats(examples.rows, examples.rows, 0.0, ctr_B, ctcvr_B, finite=True)

    def save(self, directory):
        save_file({"weights": self.weights, "noise": np.array([self.noise])}, directory / "weights.safetensors")


def open_decaying(info):
    learner = Decaying()
    learner.restore(info.path)
    learner.noise = float(load_file(info.path / "weights.safetensors")["noise"][0])
    return learner


def test_versions_do_not_get_worse_without_end_a_little_at_a_time(tmp_path: Path) -> None:
    policy = replace(GATED, gate=GatePolicy(min_examples=50, logloss_margin=0.05), keep_versions=2)
    world = TrainerWorld(tmp_path, policy=policy, make_learner=Decaying, open_version=open_decaying)
    world.learner.weights[0] = [-2.2, 3.0, 1.0]  # the market's truth
    tally = world.trainer._publisher.tally
    for number in range(12):
        Market(requests=100, seed=number, start_ms=START_MS + number * 60_000, name=f"m{number}-").fill(world.source)
        world.until_idle()
        world.learner.noise = 0.09 * number
        world.clock.advance(10.1)
        world.trainer.step()
        if tally.holds:
            break
    assert tally.holds == {"ratchet_ctr": 1}  # next to the live version nobody would object
    assert world.store.current() == tally.versions_published >= 3
    numbers = tally.numbers
    assert numbers["now_ctr_logloss"] <= 1.05 * numbers["live_ctr_logloss"]
    assert world.trainer._publisher._best in world.store.versions()
    assert len(world.store.versions()) == 3  # the best one is not pruned


def test_the_best_version_and_the_rows_to_judge_by_survive_a_restart(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    Market(requests=300).fill(world.source)
    world.until_idle()
    world.clock.advance(10.1)
    world.trainer.step()
    assert world.trainer._publisher._best == 2
    drained(world)
    before = world.trainer._publisher.arrays()
    world.restart()
    world.trainer.start()
    after = world.trainer._publisher.arrays()
    assert world.trainer._publisher._best == 2
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


LONG = Market(requests=300, gap_ms=60)  # long enough that clicks mature while there is more to read


def uninterrupted(tmp_path: Path, make_learner=TinyLearner) -> TrainerWorld:
    world = TrainerWorld(tmp_path, make_learner=make_learner)
    LONG.fill(world.source)
    world.until_idle()
    return world


def test_restarting_from_a_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path / "whole")
    world = TrainerWorld(tmp_path / "cut", policy=replace(POLICY, max_records=97))
    LONG.fill(world.source)
    turns = restarts = 0
    while not world.at_rest:
        turns += world.turn() > 0  # turns without records only fill the merge
        if turns == 3:
            drained(world)
        if turns == 5:
            world.restart()  # what came after the checkpoint is read and learned again
            restarts, turns = restarts + 1, 0
            world.trainer.start()
    assert restarts >= 5
    assert np.abs(world.learner.weights).min() > 0
    np.testing.assert_array_equal(world.learner.weights, whole.learner.weights)
    assert world.trainer._joiner.outcomes == whole.trainer._joiner.outcomes
    assert world.trainer._tally.first == whole.trainer._tally.first
    drained(world)
    drained(whole)
    assert world.trainer.stats().ctr == whole.trainer.stats().ctr


def test_stopping_in_order_changes_no_weights_either(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path / "whole")
    world = TrainerWorld(tmp_path / "cut", policy=replace(POLICY, max_records=300))
    LONG.fill(world.source)
    stops = 0
    while not world.at_rest:
        if world.turn() and not world.at_rest:
            drained(world)
            world.source.close()
            world.restart()
            world.trainer.start()
            stops += 1
    assert stops >= 4
    np.testing.assert_array_equal(world.learner.weights, whole.learner.weights)


def test_offsets_are_committed_only_after_the_checkpoint_that_holds_them(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=replace(POLICY, checkpoint_every_s=5.0))
    Market(requests=50).fill(world.source)
    world.until_idle()
    assert world.source.committed == {}
    world.clock.advance(5.1)
    world.trainer.step()
    saved = sorted((tmp_path / "checkpoints").glob("0*"))[-1]
    offsets = {f"{t}/{n}": at for t, n, at in json.loads((saved / "state.json").read_text())["offsets"]}
    assert offsets == {f"{p.topic}/{p.partition}": at for p, at in world.source.committed.items()}
    assert sum(offsets.values()) == sum(len(log) for log in world.source.log.values())


def test_a_commit_that_is_fenced_loses_nothing(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.until_idle()
    world.source.fence = True
    assert not drained(world)
    seen = world.trainer.stats().served
    world.source.fence = False
    world.restart()
    world.until_idle()
    drained(world)
    assert world.trainer.stats().served == seen == 50  # the checkpoint's offsets count, not the group's


def test_a_refused_final_commit_is_an_error_unless_it_is_taken_in_the_end(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.until_idle()
    world.source.fence = True
    stop = threading.Event()
    stop.set()
    with pytest.raises(CommitRefused, match="ILLEGAL_GENERATION"):
        world.trainer.run(stop)
    assert len(list((tmp_path / "checkpoints").glob("0*"))) == 1
    world.source.fence = False
    assert drained(world)  # nothing new to save, but the offsets are offered again
    assert sum(world.source.committed.values()) == sum(len(log) for log in world.source.log.values())


def test_without_its_checkpoint_it_reads_from_the_start_and_says_so(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.until_idle()
    drained(world)
    assert sum(world.source.committed.values()) > 50
    shutil.rmtree(tmp_path / "checkpoints")
    world.restart()
    with structlog.testing.capture_logs() as logs:
        world.until_idle()
    assert world.trainer._tally.served == 50
    said = [entry for entry in logs if entry.get("event_name") == NO_CHECKPOINT]
    assert len(said) == 1
    assert said[0]["log_level"] == "warning"
    assert set(said[0]["committed"]) == {"served/0", "served/1", "feedback/0", "feedback/1"}


def test_without_its_checkpoint_it_goes_on_where_it_was_told_not_to_go_back(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=replace(POLICY, rewind=False))
    Market(requests=50).fill(world.source)
    world.until_idle()
    drained(world)
    shutil.rmtree(tmp_path / "checkpoints")
    world.restart()
    Market(requests=10, name="more", start_ms=START_MS + 5_000).fill(world.source)
    with structlog.testing.capture_logs() as logs:
        world.until_idle()
    assert world.trainer._tally.served == 10
    assert any(entry.get("event_name") == NO_CHECKPOINT for entry in logs)


def test_a_first_start_warns_of_nothing(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=5).fill(world.source)
    with structlog.testing.capture_logs() as logs:
        world.until_idle()
    assert not [entry for entry in logs if entry["log_level"] == "warning"]


def test_a_partition_that_the_checkpoint_does_not_have_is_read_from_its_start(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.until_idle()
    drained(world)
    state = max((tmp_path / "checkpoints").rglob("state.json"))
    text = json.loads(state.read_text())
    text["offsets"] = [row for row in text["offsets"] if row[:2] != ["feedback", 1]]
    world.restart()
    world.trainer._next = {TopicPartition(t, n): at for t, n, at in text["offsets"]}
    world.trainer._started = True
    world.source.subscribe(world.trainer)
    world.trainer.step()
    world.until_idle()
    assert world.trainer._tally.served == 0
    assert world.trainer._tally.feedback == len(world.source.log[TopicPartition("feedback", 1)])


def test_a_torn_checkpoint_is_refused_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path / "whole")
    world = TrainerWorld(tmp_path / "cut", policy=replace(POLICY, max_records=300))
    LONG.fill(world.source)
    while len(list((tmp_path / "cut" / "checkpoints").glob("0*"))) < 2:
        world.turn()
        drained(world)
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("0*"))[-1]
    join = newest / "join" / "join.bin"
    join.write_bytes(join.read_bytes()[:-1])
    world.restart()
    world.trainer.start()
    assert 0 < sum(world.trainer._next.values()) <= 300  # the first checkpoint's place
    world.until_idle()
    np.testing.assert_array_equal(world.learner.weights, whole.learner.weights)


def test_when_every_checkpoint_is_refused_the_trainer_does_not_start(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.until_idle()
    drained(world)
    for state in (tmp_path / "checkpoints").rglob("state.json"):
        state.unlink()
    world.restart()
    with pytest.raises(ConfigurationError, match="no checkpoint is left"):
        world.trainer.step()


@pytest.mark.parametrize("fault", [REVOKE, LOST])
def test_a_rebalance_in_the_middle_changes_nothing(tmp_path: Path, fault) -> None:
    whole = uninterrupted(tmp_path / "whole")
    world = TrainerWorld(tmp_path / "cut", policy=replace(POLICY, max_records=200))
    LONG.fill(world.source)
    for _ in range(3):
        world.trainer.step()
    world.source._suffer(fault)
    world.until_idle()
    np.testing.assert_array_equal(world.learner.weights, whole.learner.weights)
    assert world.trainer._tally.served == 300


def test_malformed_messages_are_rejected_with_their_bytes(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    Market(requests=50).fill(world.source)
    world.source.put("served", Item(b"garbage", 0, b"u", START_MS + 400))
    world.source.put("feedback", Item(b'{"kind": "wish"}', 1, b"u", START_MS + 500))
    world.source.put("feedback", Item(None, 1, b"u", START_MS + 600))
    world.until_idle()
    drained(world)
    rejects = world.sink.on("score-rejects")
    assert sorted(r.value or b"" for r in rejects) == [b"", b"garbage", b'{"kind": "wish"}']
    assert {dict(r.headers)["reason"] for r in rejects} == {b"corrupt", b"schema", b"empty"}
    assert world.metrics.count(names.TRAINER_REJECTED, "empty") == 1
    assert world.trainer.stats().rejected == 3


def test_nothing_is_committed_when_a_reject_cannot_be_written(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path)
    world.source.put("served", Item(b"garbage", 0, b"u", START_MS))
    world.sink.refuse = "MSG_TIMED_OUT"
    world.until_idle()
    with pytest.raises(FatalError, match="MSG_TIMED_OUT"):
        drained(world)
    assert world.source.committed == {}


def test_rejects_that_are_not_acknowledged_in_time_fail_the_drain(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, sink=FakeSink(auto=False))
    world.source.put("served", Item(b"garbage", 0, b"u", START_MS))
    world.until_idle()
    stop = threading.Event()
    stop.set()
    with pytest.raises(FatalError, match="not acknowledged in time"):
        world.trainer.run(stop)


def test_a_broken_input_stops_learning_until_it_heals(tmp_path: Path) -> None:
    drift = DriftPolicy(warmup_rows=500, heal_rows=100, cluster_rows=4, picked=0.5)
    world = TrainerWorld(tmp_path, policy=replace(GATED, drift=drift))
    Market(requests=600).fill(world.source)
    world.until_idle()
    assert world.trainer.stats().alarm == ""
    healthy = world.learner.weights.copy()
    Market(requests=300, blank=True, start_ms=START_MS + 20_000, name="bad").fill(world.source)
    world.until_idle()
    world.trainer._refresh_stats(0)
    stats = world.trainer.stats()
    assert stats.alarm == "shift"  # the price is gone
    assert stats.examples["skipped"] > 200
    assert np.abs(world.learner.weights - healthy).max() < 1.0
    Market(requests=600, start_ms=START_MS + 40_000, name="good").fill(world.source)
    world.until_idle()
    world.trainer._refresh_stats(0)
    assert world.trainer.stats().alarm == ""
    assert world.trainer.stats().examples["first"] > stats.examples["first"] + 200


class Refusing(TinyLearner):
    def step(self, examples):
        stats = super().step(examples)
        return stats._replace(finite=False, ctr_B=stats.ctr_B * np.nan)


def test_steps_that_the_learner_refuses_are_counted_and_count_for_nothing(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, make_learner=Refusing)
    Market(requests=50).fill(world.source)
    world.until_idle()
    world.quiet(20)
    drained(world)
    stats = world.trainer.stats()
    assert stats.refused_steps == stats.steps > 0
    assert stats.examples["first"] == 0


def test_the_source_is_read_in_the_order_of_time_whatever_it_hands_out_first(tmp_path: Path) -> None:
    one = TrainerWorld(tmp_path / "one", source=TwoTopicSource(partitions=2), policy=replace(POLICY, max_records=11))
    two = TrainerWorld(tmp_path / "two", source=TwoTopicSource(partitions=2), policy=replace(POLICY, max_records=5_000))
    for world in (one, two):
        Market(requests=120).fill(world.source)
        world.until_idle()
    np.testing.assert_array_equal(one.learner.weights, two.learner.weights)
