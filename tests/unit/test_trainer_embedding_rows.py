"""How many embedding rows were admitted and evicted: counted by the learner, told to metrics, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from esmm.admission import AdmissionRule
from esmm.checkpoint import save_version
from esmm.heads import HeadRule
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM
from esmm.restart import TENSORS, write_state
from stream_scorer.adapters.prometheus import PrometheusMetrics
from stream_scorer.core import metric_names as names
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.trainer_stats import TrainerStats
from stream_scorer.trainer.teller import Teller
from tests.fakes import FakeMetrics
from tests.trainer_kit import POLICY, SCHEMA, START_MS, Market, TrainerWorld
from tests.unit.test_admission import DAY, batch, learner


def test_a_row_is_admitted_once_however_often_it_is_looked_up() -> None:
    one = learner(AdmissionRule(admit_after=3))  # of tables item, user and place
    one.step(batch([5, 6, 6]))
    assert one.embedding_rows() == {"admitted": 2, "evicted": 0}  # the user and the place, three times each
    one.step(batch([6, 6, 6, 6]))
    assert one.embedding_rows() == {"admitted": 3, "evicted": 0}
    one.step(batch([6, 5, 5, 5]))
    assert one.embedding_rows() == {"admitted": 4, "evicted": 0}
    one.step(batch([5, 6]))
    assert one.embedding_rows() == {"admitted": 4, "evicted": 0}


def test_one_that_was_evicted_and_comes_back_is_admitted_again() -> None:
    one = learner(AdmissionRule(evict_after_ms=10 * DAY))
    one.step(batch([5], at_ms=DAY))
    assert one.embedding_rows() == {"admitted": 3, "evicted": 0}
    one.step(batch([7], at_ms=20 * DAY))
    assert one.embedding_rows() == {"admitted": 4, "evicted": 1}
    one.step(batch([5], at_ms=20 * DAY))
    assert one.embedding_rows() == {"admitted": 5, "evicted": 1}


def test_without_a_rule_there_is_nothing_to_count() -> None:
    assert learner(AdmissionRule()).embedding_rows() == {}


@pytest.mark.parametrize("older", [False, True])
def test_the_counts_survive_a_restart_and_a_checkpoint_without_them_is_taken(tmp_path: Path, older: bool) -> None:
    rule = AdmissionRule(admit_after=2)
    one, again = learner(rule), learner(rule)
    one.step(batch([5, 5]))
    one.save(tmp_path)
    if older:
        tensors = load_file(tmp_path / TENSORS)
        del tensors["admission.admitted"]
        write_state(tmp_path, tensors, one._numbers())
    again.step(batch([5, 5, 6, 6, 7, 7]))
    again.restore(tmp_path)
    assert again.embedding_rows() == {"admitted": 0 if older else 3, "evicted": 0}


def keeping_out() -> Learner:
    config = LearnerConfig(admission=AdmissionRule(admit_after=20), heads=HeadRule(min_rows=5))
    return Learner(ESMM(SCHEMA, (4,), init_std=0.1), config, save_version)


def test_the_trainer_tells_metrics_what_each_process_added(tmp_path: Path) -> None:
    world = TrainerWorld(tmp_path, policy=POLICY, make_learner=keeping_out)
    Market(requests=60).fill(world.source)
    world.until_idle()
    world.quiet(20)
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    admitted = world.learner.embedding_rows()["admitted"]
    assert world.trainer.stats().embedding_rows == {"admitted": admitted, "evicted": 0}
    assert world.metrics.count(names.EMBEDDING_ROWS, "admitted") == admitted > 5
    world.metrics = FakeMetrics()  # those of another process
    world.restart()
    Market(requests=60, seed=1, start_ms=START_MS + 60_000, name="more").fill(world.source)
    world.until_idle()
    world.quiet(20)
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    added = world.learner.embedding_rows()["admitted"] - admitted
    assert world.metrics.count(names.EMBEDDING_ROWS, "admitted") == added > 0


def test_a_learner_that_goes_back_to_a_checkpoint_takes_nothing_away() -> None:
    metrics = PrometheusMetrics("test")  # whose counters refuse to go back
    teller = Teller(metrics)
    told = []
    for evicted in (5, 3, 4):
        teller.tell(TrainerStats(embedding_rows={"admitted": 9, "evicted": evicted}))
        told.append(metrics.value(names.EMBEDDING_ROWS, change="evicted"))
    assert told == [5, 5, 6]  # the fourth was evicted twice, and both times it happened
    assert metrics.value(names.EMBEDDING_ROWS, change="admitted") == 9
