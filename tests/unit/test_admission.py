"""Admission and eviction of embedding rows: who is trained, who is forgotten, at what cost; exact after a restart."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from esmm.admission import AdmissionRule
from esmm.batch import Examples, FeatureBlock, Kind
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.heads import HeadRule
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM
from esmm.optim import RowRule
from tests.unit.test_learner import differing, state

DAY = 86_400_000
SCHEMA = FeatureSchema(
    [
        SparseFeat("user", 30, 4, source="user"),
        SparseFeat("item", 40, 4, source="item"),
        VarLenSparseFeat(SparseFeat("history", 40, 4, embedding_name="item", source="user"), 3),
        SparseFeat("place", 6, 2, source="context"),
        DenseFeat("price", source="item"),
    ]
)


def batch(
    items: list[int],
    at_ms: int = 0,
    kind: Kind = Kind.FIRST,
    user: int = 1,
    history: tuple[int, int, int] = (0, 0, 0),
    schema: FeatureSchema = SCHEMA,
) -> Examples:
    rows = len(items)
    ids = {"user": [[user, *history]] * rows, "item": [[item] for item in items], "context": [[2]] * rows}
    blocks = []
    for source in SOURCES:
        dense_ND = np.ones((rows, schema.layout(source).dense_width), np.float32)
        blocks.append(FeatureBlock(np.array(ids[source], np.int64), dense_ND))
    clicked_B = np.ones(rows, np.float32)
    none_B, number_B = np.zeros(rows, np.float32), np.zeros(rows, np.int64)
    kind_B, at_B = np.full(rows, kind, np.uint8), np.full(rows, at_ms, np.int64)
    conversion_B = clicked_B if kind == Kind.LATE_CONVERSION else none_B
    return Examples(*blocks, kind_B, clicked_B, conversion_B, none_B, none_B, none_B, number_B, at_B)


def learner(rule: AdmissionRule, optimiser: str = "adagrad", schema: FeatureSchema = SCHEMA, **more: object) -> Learner:
    config = LearnerConfig(admission=rule, embedding=RowRule(optimiser), heads=HeadRule(min_rows=5), **more)
    return Learner(ESMM(schema, (8, 4), init_std=0.1), config, lambda *_: None)


def trained(one: Learner, table: str = "item") -> set[int]:
    """Rows that are not the default vector."""
    return set(torch.nonzero(one.model.embedding_dict[table].weight.detach().ne(0).any(1))[:, 0].tolist())


def test_a_row_is_trained_from_its_last_needed_sighting_on():
    one = learner(AdmissionRule(admit_after=3))
    assert trained(one) == trained(one, "user") == set()
    one.step(batch([5, 6, 6]))
    assert trained(one) == set()
    assert trained(one, "user") == {1}  # three sightings at once
    one.step(batch([5, 6]))
    assert trained(one) == {6}
    one.step(batch([5]))
    assert trained(one) == {5, 6}


def test_only_first_emissions_are_sightings():
    one = learner(AdmissionRule(admit_after=2))
    for kind in (Kind.FIRST, Kind.LATE_CONVERSION, Kind.MATURED, Kind.LATE_CONVERSION):
        one.step(batch([5], kind=kind))
    assert trained(one) == set()
    one.step(batch([5]))
    assert trained(one) == {5}


def test_histories_count_their_ids_and_not_their_padding():
    one = learner(AdmissionRule(admit_after=2))
    one.step(batch([5], history=(7, 8, 0)))
    one.step(batch([6], history=(7, 9, 0)))
    assert trained(one) == {7}
    assert one._admission._rows[4].count_R[one._tables.place("item")[1]] == 0


def test_rows_that_a_version_brings_in_are_admitted():
    one = learner(AdmissionRule(admit_after=100))
    weights = ESMM(SCHEMA, (8, 4), init_std=0.1).state_dict()
    one.model.load_state_dict(weights)
    one.step(batch([5]))
    moved = (one.model.embedding_dict["item"].weight.detach() != weights["embedding_dict.item.weight"]).any(1)
    assert moved.nonzero()[:, 0].tolist() == [5]


def test_without_a_rule_nothing_is_different_and_nothing_is_kept():
    one, other = learner(AdmissionRule()), learner(AdmissionRule(admit_after=1, scan_rows=7))
    one.step(batch([5, 6]))
    other.step(batch([5, 6]))
    assert differing(state(one), state(other)) == set()
    assert not [name for name in state(one) if name.startswith("admission")]


@pytest.mark.parametrize("optimiser", ["adagrad", "lazy-adam"])
def test_a_row_not_seen_for_too_long_is_the_default_again_and_its_optimiser_state_is_gone(optimiser):
    one = learner(AdmissionRule(admit_after=2, evict_after_ms=10 * DAY), optimiser)
    start = one._tables.place("item")[1]
    one.step(batch([5, 5, 6, 6, 7], at_ms=100 * DAY))
    assert trained(one) == {5, 6}
    one.step(batch([6], at_ms=110 * DAY))  # not longer than ten days
    assert trained(one) == {5, 6}
    one.step(batch([6], at_ms=110 * DAY + 1))
    assert trained(one) == {6}
    assert one._admission.evicted == 1
    for column in one._tables.groups[4].state.values():
        assert not column[start + 5].any()
        assert column[start + 6].any()
    one.step(batch([5], at_ms=111 * DAY))  # counts from the start
    one.step(batch([7], at_ms=111 * DAY))  # its one sighting is forgotten as well
    assert trained(one) == {6}
    one.step(batch([5], at_ms=111 * DAY))
    assert trained(one) == {5, 6}


def test_late_conversions_and_matured_rows_keep_a_row_alive_and_do_not_move_event_time():
    one = learner(AdmissionRule(evict_after_ms=10 * DAY))
    one.step(batch([5], at_ms=100 * DAY))
    one.step(batch([6], at_ms=109 * DAY))
    one.step(batch([5], at_ms=999 * DAY, kind=Kind.LATE_CONVERSION))
    one.step(batch([6], at_ms=112 * DAY))
    assert 5 in trained(one)
    assert one._admission.clock_ms == 112 * DAY


def test_one_event_from_the_future_evicts_nothing_and_time_does_not_go_back():
    one = learner(AdmissionRule(evict_after_ms=10 * DAY))
    one.step(batch([5], at_ms=100 * DAY))
    odd = batch([6, 6, 6], at_ms=100 * DAY)
    odd.impression_ms_B[1] = 900 * DAY
    one.step(odd)
    assert one._admission.clock_ms == 100 * DAY
    one.step(batch([6], at_ms=90 * DAY))
    assert one._admission.clock_ms == 100 * DAY
    assert {5, 6} <= trained(one)


def test_stale_rows_are_found_a_slice_a_step_and_within_a_round():
    one = learner(AdmissionRule(evict_after_ms=10 * DAY, scan_rows=8))
    one.step(batch([3, 13, 23, 33], at_ms=100 * DAY))
    left = []
    for _ in range(9):  # 30 users and 40 items of one width are nine slices of eight rows
        one.step(batch([39], at_ms=200 * DAY))
        left.append(len(trained(one)))
    assert left[-1] == 1
    assert sorted(left, reverse=True) == left
    assert len(set(left)) > 3
    assert one._admission.evicted == 4


def test_rows_of_a_loaded_version_are_evicted_when_nobody_ever_looks_them_up():
    one = learner(AdmissionRule(evict_after_ms=10 * DAY))
    one.model.load_state_dict(ESMM(SCHEMA, (8, 4), init_std=0.1).state_dict())
    one.step(batch([5], at_ms=100 * DAY))
    assert len(trained(one)) == 40
    one.step(batch([5], at_ms=111 * DAY))
    assert trained(one) == {5}


RULE = AdmissionRule(admit_after=2, evict_after_ms=10 * DAY, scan_rows=16)


def stream(seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    return batch(rng.integers(0, 40, 16).tolist(), at_ms=(100 + 2 * seed) * DAY, user=seed % 30)


@pytest.mark.parametrize("optimiser", ["adagrad", "lazy-adam"])
def test_a_restart_continues_bit_for_bit(tmp_path: Path, optimiser):
    whole, first, second = (learner(RULE, optimiser) for _ in range(3))
    for seed in range(40):
        whole.step(stream(seed))
        if seed < 20:
            first.step(stream(seed))
    first.save(tmp_path)
    second.step(stream(99))
    second.restore(tmp_path)
    for seed in range(20, 40):
        second.step(stream(seed))
    assert differing(state(whole), state(second)) == set()
    assert whole._admission.evicted == second._admission.evicted > 0


def test_the_rule_may_be_switched_on_and_off_between_runs(tmp_path: Path):
    without, with_rule = learner(AdmissionRule()), learner(RULE)
    without.step(stream(1))
    (tmp_path / "off").mkdir()
    without.save(tmp_path / "off")
    with_rule.step(stream(2))
    with_rule.restore(tmp_path / "off")
    assert with_rule._admission.clock_ms == 0
    assert not with_rule._admission._rows[4].count_R.any()
    assert differing(state(without), {n: a for n, a in state(with_rule).items() if not n.startswith("adm")}) == set()
    (tmp_path / "on").mkdir()
    with_rule.save(tmp_path / "on")
    without.restore(tmp_path / "on")
    assert without.steps == 1


def test_a_version_says_which_rows_are_trained_and_how_many_were_evicted(tmp_path: Path):
    written: list[dict[str, object]] = []
    evicted: list[int] = []
    admitted: list[int] = []
    for rule in (RULE, AdmissionRule()):
        config = LearnerConfig(admission=rule)
        one = Learner(ESMM(SCHEMA, (8, 4)), config, lambda *args: written.append(dict(args[2])))
        for seed in range(40):
            one.step(stream(seed))
        one.export(tmp_path, {"version": 3})
        evicted.append(one._admission.evicted)
        admitted.append(one._admission.admitted_rows)
    assert evicted[0] > evicted[1] == 0
    assert written[0]["embedding_rows"] == {
        "admit_after": 2, "evict_after_ms": 10 * DAY, "admitted": admitted[0], "evicted": evicted[0],
    }  # fmt: skip
    assert "embedding_rows" not in written[1]
    assert written[1]["version"] == 3


def test_a_torn_admission_state_is_refused(tmp_path: Path):
    one, other = learner(RULE), learner(AdmissionRule(2), schema=FeatureSchema(SCHEMA.columns[:2]))
    one.save(tmp_path)
    with pytest.raises(ValueError, match=r"tensor|schema_hash"):
        other.restore(tmp_path)
    meta = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps({**meta, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match="torn"):
        one.restore(tmp_path)


@pytest.mark.parametrize("rule", [{"admit_after": 0}, {"evict_after_ms": -1}, {"scan_rows": 0}])
def test_a_rule_that_means_nothing_is_refused(rule):
    with pytest.raises(ValueError, match="admit after 1 or more"):
        AdmissionRule(**rule)


def step_s(vocabulary: int) -> float:
    """CPU seconds of what admission adds to a step, at its best."""
    schema = FeatureSchema(
        [SparseFeat("user", vocabulary, 4, source="user"), SparseFeat("item", vocabulary, 4, source="item")]
    )
    one = learner(AdmissionRule(admit_after=2, evict_after_ms=10 * DAY), schema=schema)
    rng, took = np.random.default_rng(1), []
    empty = FeatureBlock(np.zeros((512, 0), np.int64), np.zeros((512, 0), np.float32))
    for day in range(30):
        base = batch([0] * 512, at_ms=(100 + day) * DAY)
        user, item = (FeatureBlock(rng.integers(0, 10_000, (512, 1)), empty.dense_ND) for _ in range(2))
        rows = base._replace(user=user, item=item, context=empty)
        started = time.thread_time()
        one._admission.see(rows)
        took.append(time.thread_time() - started)
    return statistics.median(took)


def test_the_cost_of_a_step_does_not_grow_with_the_tables():
    small, large = step_s(10_000), step_s(1_000_000)
    assert large < 4 * small + 0.001  # a scan of the whole table would be a hundred times dearer
