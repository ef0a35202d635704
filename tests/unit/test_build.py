"""What wiring adds to a predictor: the correction of a method that learns odds, refusals by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from esmm.admission import AdmissionRule
from esmm.checkpoint import load_version, save_version
from esmm.features import DenseFeat, FeatureSchema, SparseFeat
from esmm.model import ESMM
from esmm.predictor.config import PredictorConfig
from stream_scorer.adapters.join_rocks import RocksJoinState
from stream_scorer.adapters.join_state import MemoryJoinState
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError, ModelRefused
from stream_scorer.ports import VersionInfo
from stream_scorer.settings import load
from stream_scorer.wiring import build
from tests import trainer_kit

SCHEMA = FeatureSchema([SparseFeat("u", 9, 4, source="user"), DenseFeat("x", 2, source="item")])


def version(path: Path, **manifest: str) -> VersionInfo:
    path.mkdir()
    model = ESMM(SCHEMA, tower_dnn_hidden_units=(8, 4), init_std=0.5)
    return VersionInfo(3, path, save_version(path, model, manifest))


def scores(info: VersionInfo):
    from esmm.checkpoint import golden_batch

    golden = load_version(info.path).golden
    assert golden is not None
    predictor = build.loader(SCHEMA, PredictorConfig(cache_items=0))(info)
    try:
        return predictor.collect(predictor.launch(golden_batch(golden)))
    finally:
        predictor.close()


def test_odds_are_turned_back_into_probabilities(tmp_path):
    plain, odds = scores(version(tmp_path / "a")), scores(version(tmp_path / "b", ctcvr_correction="odds"))
    q = plain.ctcvr_B
    np.testing.assert_allclose(odds.ctcvr_B, np.minimum(q / (1 - q), plain.ctr_B), rtol=1e-5)
    np.testing.assert_allclose(odds.ctr_B * odds.cvr_B, odds.ctcvr_B, rtol=1e-5)
    assert odds.model_version == 3


def test_a_version_of_another_schema_is_refused_by_name(tmp_path):
    info = version(tmp_path / "a")
    other = FeatureSchema([SparseFeat("u", 9, 4, source="user")])
    with pytest.raises(ModelRefused) as caught:
        build.loader(other, PredictorConfig())(info)
    assert caught.value.reason == "schema"


def test_evicting_before_the_attribution_window_is_over_is_refused_and_a_rule_reaches_the_learner():
    rule = {"trainer.admit_after": 3, "trainer.evict_after_s": 864_000}
    assert build.learner(load(None, {}, rule), SCHEMA).config.admission == AdmissionRule(3, 864_000_000)
    with pytest.raises(ConfigurationError, match=r"evict_after_s.* shorter than attribution_window_s, 864000"):
        build.learner(load(None, {}, {"trainer.evict_after_s": 863_999}), SCHEMA)


def test_the_share_of_negatives_reaches_the_learner_and_is_refused_by_name_where_it_cannot_be():
    keep = {"trainer.negative_keep": 0.25}
    assert build.learner(load(None, {}, keep), SCHEMA).config.negative_keep == 0.25
    with pytest.raises(ConfigurationError, match=r"trainer\.negative_keep.* fnc"):
        build.learner(load(None, {}, {**keep, "trainer.method": "fnc"}), SCHEMA)


@pytest.mark.parametrize(("setting", "kind"), [("memory", MemoryJoinState), ("rocksdb", RocksJoinState)])
def test_the_join_state_is_the_one_that_was_set_and_restarts_from_its_checkpoint(tmp_path, setting, kind):
    settings = load(None, {}, {"trainer.join_state": setting, "trainer.checkpoint_dir": str(tmp_path)})
    policy = build.trainer_policy(settings, trainer_kit.SCHEMA)
    policy = replace(policy, max_wait_ms=10**9, drift=trainer_kit.POLICY.drift)
    world = trainer_kit.TrainerWorld(tmp_path, policy=policy, make_state=lambda: build.join_state(settings))
    assert isinstance(world.state, kind)
    assert (tmp_path / build.JOIN_SCRATCH).exists() == (setting == "rocksdb")
    trainer_kit.Market(requests=30).fill(world.source)
    world.until_idle()
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    opened = world.trainer.stats().open_impressions
    assert opened == 120
    world.restart()
    world.trainer.start()
    assert world.trainer.stats().open_requests == 0
    world.trainer._refresh_stats(0)
    assert (world.trainer.stats().open_requests, world.trainer.stats().open_impressions) == (30, opened)
    world.state.close()


def test_the_other_join_states_checkpoint_is_refused_by_the_settings_name(tmp_path):
    settings = [
        load(None, {}, {"trainer.join_state": name, "trainer.checkpoint_dir": str(tmp_path)})
        for name in ("memory", "rocksdb")
    ]
    world = trainer_kit.TrainerWorld(tmp_path, make_state=lambda: build.join_state(settings[0]))
    trainer_kit.Market(requests=5).fill(world.source)
    world.until_idle()
    assert world.trainer.drain(Deadline.after(5.0, world.clock.monotonic_s))
    world.make_state = lambda: build.join_state(settings[1])
    world.restart()
    with pytest.raises(ConfigurationError, match=r"was trainer\.join_state changed"):
        world.trainer.start()
    world.state.close()
