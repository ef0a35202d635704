"""Learner steps beside the loop: the same batches, weights and state as one after another."""

from __future__ import annotations

from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

from esmm.checkpoint import save_version
from esmm.heads import HeadRule
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM
from stream_scorer.trainer.steps import Steps
from tests.trainer_kit import SCHEMA, Market, TinyLearner, TrainerWorld, TwoTopicSource


def outcome(path, overlap: bool, **policy):
    source = TwoTopicSource()
    Market(requests=150).fill(source)
    world = TrainerWorld(path, source).with_policy(overlap=overlap, **policy)
    world.until_idle()
    world.quiet(20.0)
    trainer = world.trainer
    trainer._checkpoint()
    state = trainer._state()
    del state["publisher"]["lineage"]  # drawn at random by each that starts from nothing
    trainer._steps.close()
    return world.learner.weights, world.learner.seen, state, world.store.versions()


@pytest.mark.parametrize("policy", [{}, {"publish_every_examples": 150}, {"batch_rows": 7}])
def test_beside_or_not_everything_learned_is_the_same(tmp_path, policy):
    plain = outcome(tmp_path / "plain", False, **policy)
    beside = outcome(tmp_path / "beside", True, **policy)
    assert np.array_equal(plain[0], beside[0])
    assert plain[1:] == beside[1:]
    assert sum(plain[1]) > 500


def test_a_checkpoint_waits_for_the_step_in_flight(tmp_path):
    source, may_end = TwoTopicSource(), Event()
    Market(requests=200).fill(source)

    class Slow(TinyLearner):
        def step(self, examples):
            assert may_end.wait(10)
            return super().step(examples)

    world = TrainerWorld(tmp_path, source, make_learner=Slow).with_policy(overlap=True, max_records=10, batch_rows=64)
    for _ in range(1_000):
        if not world.trainer._steps.rows:
            world.turn()
    assert world.trainer._steps.rows == 64
    assert world.learner.seen == []
    may_end.set()
    world.trainer._checkpoint()
    assert world.trainer._tally.steps == len(world.learner.seen) == 1
    world.trainer._steps.close()


@pytest.mark.parametrize("beside", [True, False])
def test_what_the_learner_raises_reaches_the_loop(beside):
    def fail(_):
        raise ZeroDivisionError

    steps = Steps(fail, lambda: 0.0, beside)

    def both():
        steps.launch(SimpleNamespace(rows=3), 0)
        steps.collect()

    with pytest.raises(ZeroDivisionError):
        both()
    steps.close()


def test_two_steps_at_once_are_a_mistake():
    steps = Steps(lambda _: None, lambda: 0.0, True)
    assert steps.collect() is None
    steps.launch(SimpleNamespace(rows=3), 0)
    with pytest.raises(AssertionError):
        steps.launch(SimpleNamespace(rows=3), 0)
    steps.collect()
    steps.close()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_real_learner_ends_bit_for_bit_where_it_ends_alone(tmp_path, precision):
    def run(overlap: bool) -> dict[str, np.ndarray]:
        source = TwoTopicSource()
        Market(requests=150).fill(source)
        config = LearnerConfig(precision=precision, heads=HeadRule(min_rows=10))
        world = TrainerWorld(
            tmp_path / str(overlap),
            source,
            make_learner=lambda: Learner(ESMM(SCHEMA, (8, 4), init_std=0.1), config, save_version),
        ).with_policy(overlap=overlap)
        world.until_idle()
        world.quiet(20.0)
        world.trainer._checkpoint()
        world.trainer._steps.close()
        assert world.learner.steps > 5
        return {name: tensor.numpy().copy() for name, tensor in world.learner._state().items()}

    plain, beside = run(False), run(True)
    assert all(np.array_equal(plain[name], beside[name]) for name in plain)
