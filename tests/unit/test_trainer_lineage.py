"""A version is judged on rows that it had not learned, also by a trainer that was killed after it had published it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ModelRefused, RecoverableError
from stream_scorer.core.gate import GatePolicy
from stream_scorer.trainer.publisher import LEARNED, LINEAGE
from tests.trainer_kit import POLICY, START_MS, Market, TinyLearner, TrainerWorld, open_tiny
from tests.unit.test_trainer import Decaying, open_decaying

GATED = replace(POLICY, gate=GatePolicy(min_examples=50), publish_every_s=10.0)


def save_all(world: TrainerWorld) -> None:
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))


def offer(world: TrainerWorld) -> None:
    """The next version is due."""
    world.clock.advance(10.1)
    world.trainer.step()


def learned(world: TrainerWorld) -> int:
    return world.trainer._publisher._rows.learned


def numbers(world: TrainerWorld) -> dict[str, float]:
    return world.trainer._publisher.tally.numbers


def more(world: TrainerWorld, requests: int, start_s: int, name: str) -> None:
    Market(requests=requests, start_ms=START_MS + 1_000 * start_s, name=name).fill(world.source)


def published_after_its_checkpoint(path: Path) -> TrainerWorld:
    """Version 2 is live and had learned several times as many rows as the only checkpoint; the trainer was killed."""
    world = TrainerWorld(path, policy=replace(GATED, max_records=50))
    more(world, 100, 0, "a")
    world.until_idle()
    save_all(world)
    at_checkpoint = learned(world)
    more(world, 300, 60, "b")
    world.until_idle()
    offer(world)
    assert world.store.current() == 2
    assert world.store.info(2).manifest[LEARNED] > 2 * at_checkpoint > 0
    world.restart()
    world.trainer.start()
    assert learned(world) == at_checkpoint
    return world


def test_after_a_crash_the_live_version_is_judged_on_rows_beyond_its_own_count(tmp_path: Path) -> None:
    world = published_after_its_checkpoint(tmp_path)
    of_live = world.store.info(2).manifest[LEARNED]
    while learned(world) < of_live / 2:
        world.turn()
    assert learned(world) < of_live
    offer(world)  # the live version knows all of these rows by heart
    assert world.trainer._publisher.tally.holds == {"few_examples": 1}
    assert "live_ctr_rows" not in numbers(world)
    more(world, 100, 120, "c")
    world.until_idle()
    offer(world)
    assert world.store.current() == 3
    beyond = learned(world) - of_live
    assert 200 < numbers(world)["live_ctr_rows"] == numbers(world)["candidate_ctr_rows"] <= beyond < 800
    lineages = {world.store.info(version).manifest[LINEAGE] for version in (1, 2, 3)}
    assert len(lineages) == 1


def test_a_version_of_another_lineage_is_judged_on_all_recent_rows(tmp_path: Path) -> None:
    world = published_after_its_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    world.restart()
    more(world, 50, 120, "c")
    world.until_idle()
    offer(world)
    assert learned(world) > world.store.info(2).manifest[LEARNED]  # a count that says nothing here
    rows = world.trainer._publisher._rows.first_since(0)
    assert rows is not None
    assert numbers(world)["live_ctr_rows"] == rows.examples.rows > 1_200


@pytest.mark.parametrize("drop", [LINEAGE, LEARNED])
def test_so_is_one_that_does_not_say_what_it_had_learned(tmp_path: Path, drop: str) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    more(world, 300, 0, "a")
    world.until_idle()
    offer(world)
    manifest = world.store.info(2).path / "manifest.json"
    said = json.loads(manifest.read_text())
    del said[drop]
    manifest.write_text(json.dumps(said))
    more(world, 30, 60, "b")
    world.until_idle()
    offer(world)
    assert numbers(world)["live_ctr_rows"] > 1_000


def test_the_lineage_is_the_checkpoints_and_each_start_from_nothing_has_its_own(tmp_path: Path) -> None:
    one, other = (TrainerWorld(tmp_path / name) for name in ("one", "other"))
    lineage = one.trainer._publisher.state()[LINEAGE]
    assert lineage
    assert other.trainer._publisher.state()[LINEAGE] != lineage
    more(one, 20, 0, "a")
    one.until_idle()
    save_all(one)
    one.restart()
    one.trainer.start()
    assert one.trainer._publisher.state()[LINEAGE] == lineage


def test_a_checkpoint_of_an_older_build_begins_a_lineage(tmp_path: Path) -> None:
    publisher = TrainerWorld(tmp_path).trainer._publisher
    state = publisher.state()
    del state[LINEAGE]
    publisher.restore(state, publisher.arrays())
    assert publisher.state()[LINEAGE]


def test_what_was_learned_is_in_a_checkpoint_before_it_is_published_for_the_first_time(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)
    more(world, 300, 0, "a")
    world.until_idle()
    offer(world)
    assert world.store.current() == 2
    world.restart()
    world.trainer.start()
    said = world.store.info(2).manifest
    assert (world.trainer._publisher.state()[LINEAGE], learned(world)) == (said[LINEAGE], said[LEARNED])


def test_so_is_the_lineage_that_begins_with_a_checkpoint_of_an_older_build(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=replace(GATED, max_records=50))
    state = world.trainer._publisher.state
    world.trainer._publisher.state = lambda: {key: value for key, value in state().items() if key != LINEAGE}
    more(world, 300, 0, "a")
    world.until_idle()
    save_all(world)
    world.restart()
    world.trainer.start()
    assert learned(world) > 50
    offer(world)  # at once: not a record was read since
    assert world.store.current() == 2
    world.restart()
    world.trainer.start()
    assert world.trainer._publisher.state()[LINEAGE] == world.store.info(2).manifest[LINEAGE]


def test_the_best_version_is_still_a_rival_when_the_live_one_cannot_be_read(tmp_path: Path) -> None:
    unreadable: set[int] = set()

    def open_version(info):
        if info.version in unreadable:
            raise ModelRefused(info.version, "corrupt", "torn")
        return open_decaying(info)

    policy = replace(GATED, gate=GatePolicy(min_examples=50, logloss_margin=0.05))
    world = TrainerWorld(tmp_path, policy=policy, make_learner=Decaying, open_version=open_version)
    world.learner.weights[0] = [-2.2, 3.0, 1.0]  # the market's truth

    def spoiled_by(noise: float, number: int) -> None:
        world.learner.noise = noise
        more(world, 100, 60 * number, f"m{number}-")
        world.until_idle()
        offer(world)

    spoiled_by(0.0, 0)
    spoiled_by(0.1, 1)
    tally = world.trainer._publisher.tally
    assert (world.store.current(), world.trainer._publisher._best, tally.holds) == (3, 1, {})
    unreadable.add(3)
    spoiled_by(0.9, 2)
    assert (world.store.current(), tally.holds) == (3, {"ratchet_ctr": 1})
    assert "live_ctr_rows" not in numbers(world)
    unreadable.clear()
    spoiled_by(0.9, 3)  # it was only for a moment
    assert (world.store.current(), tally.holds) == (3, {"ratchet_ctr": 1, "logloss_ctr": 1})
    assert numbers(world)["live_ctr_rows"] > 0


def test_a_version_counts_as_published_when_only_the_old_ones_could_not_be_deleted(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=GATED)

    def prune(*_):
        raise RecoverableError("the pointer is not readable")

    world.store.prune = prune
    more(world, 300, 0, "a")
    world.until_idle()
    offer(world)
    publisher = world.trainer._publisher
    assert (world.store.current(), publisher._best, publisher.tally.version) == (2, 2, 2)


class Undefined(TinyLearner):
    """A published version that says what is no number."""

    def predict(self, examples):
        ctr_B, ctcvr_B = super().predict(examples)
        return ctr_B * float("nan"), ctcvr_B


def test_a_manifest_is_json_whatever_the_gate_measured(tmp_path: Path) -> None:
    def open_version(info):
        if info.version > 1:
            return open_tiny(info)
        learner = Undefined()
        learner.restore(info.path)
        return learner

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    world = TrainerWorld(tmp_path, policy=GATED, open_version=open_version)
    more(world, 300, 0, "a")
    world.until_idle()
    offer(world)
    manifest = json.loads((world.store.info(2).path / "manifest.json").read_text(), parse_constant=refuse)
    assert manifest["gate"]["distance"] is None
    assert manifest["gate"]["candidate_ctr_rows"] > 1_000
