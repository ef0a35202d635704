"""The learner: exact restarts, refusals, what each kind of row may change, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from esmm.batch import Examples, FeatureBlock, Kind
from esmm.checkpoint import load_version, save_version
from esmm.delay import METHODS
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.heads import HeadRule
from esmm.learner import Evaluator, Learner, LearnerConfig
from esmm.model import ESMM
from esmm.optim import RowRule

SCHEMA = FeatureSchema(
    [
        SparseFeat("user", 50, 4, source="user"),
        SparseFeat("item", 40, 4, use_hash=True, source="item"),
        VarLenSparseFeat(SparseFeat("history", 40, 4, embedding_name="item", use_hash=True, source="user"), 3),
        SparseFeat("place", 6, 2, source="context"),
        DenseFeat("price", 2, source="item"),
    ]
)
ROWS = [  # kind, click, conversion, observed, share
    (Kind.FIRST, 0, 0, 0, 0.5),
    (Kind.FIRST, 1, 1, 1, 0.1),
    (Kind.FIRST, 1, 0, 0, 0.2),
    (Kind.LATE_CONVERSION, 1, 1, 0, 0.05),
    (Kind.MATURED, 1, 0, 0, 0.1),
    (Kind.MATURED, 1, 1, 0, 0.05),
]
WARM = HeadRule(min_rows=10, tolerance=10.0)


def examples(seed: int, rows: int = 64, schema: FeatureSchema = SCHEMA, kinds: set[Kind] | None = None) -> Examples:
    rng = np.random.default_rng(seed)
    table = [row for row in ROWS if kinds is None or row[0] in kinds]
    share = np.array([row[4] for row in table])
    picked = np.array([row[:4] for row in table])[rng.choice(len(table), rows, p=share / share.sum())]
    blocks = []
    for source in SOURCES:
        layout = schema.layout(source)
        ids = rng.integers(0, 6, (rows, layout.id_width))
        blocks.append(FeatureBlock(ids, rng.standard_normal((rows, layout.dense_width)).astype(np.float32)))
    columns = picked.T
    served = np.zeros(rows, np.float32)
    zeros = np.zeros(rows, np.int64)
    labels = (column.astype(np.float32) for column in columns[1:])
    return Examples(*blocks, columns[0].astype(np.uint8), *labels, served, served, zeros, zeros)


def learner(schema: FeatureSchema = SCHEMA, config: LearnerConfig | None = None, **hyper: object) -> Learner:
    model = ESMM(schema, (8, 4), init_std=0.1, **hyper)
    return Learner(model, config or LearnerConfig(heads=WARM, learning_rate=0.01), save_version)


def state(one: Learner) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in one._state().items()}


def differing(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name in before | after if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("optimiser", ["adagrad", "lazy-adam"])
@pytest.mark.parametrize("hyper", [{}, {"dnn_dropout": 0.3, "dnn_use_bn": True}])
@pytest.mark.parametrize("method", ["mp-es-dfm", "defuse", "fnc"])
def test_a_restart_continues_bit_for_bit(tmp_path: Path, optimiser, hyper, method):
    config = LearnerConfig(method, heads=WARM, embedding=RowRule(optimiser))
    whole, first = learner(config=config, **hyper), learner(config=config, **hyper)
    for seed in range(20):
        whole.step(examples(seed))
        if seed < 10:
            first.step(examples(seed))
    first.save(tmp_path)
    second = learner(config=config, **hyper)
    second.step(examples(99))  # a restart must not depend on a fresh learner
    second.restore(tmp_path)
    for seed in range(10, 20):
        stats = second.step(examples(seed))
    assert differing(state(whole), state(second)) == set()
    assert (second.steps, second._heads.trust) == (whole.steps, whole._heads.trust)
    assert stats.finite


@pytest.mark.parametrize("by_hand", [True, False])
def test_the_step_predicts_before_it_learns(by_hand):
    one = learner(config=LearnerConfig(heads=WARM, learning_rate=0.01, by_hand=by_hand))
    batch = examples(1)
    for _ in range(3):
        expected = one.predict(batch)
        stats = one.step(batch)
        rounding = {"rtol": 1e-5 if by_hand else 0.0, "atol": 0.0}  # the products are summed in another order
        np.testing.assert_allclose(stats.ctr_B, expected[0], **rounding)
        np.testing.assert_allclose(stats.ctcvr_B, expected[1], **rounding)
        assert stats.ctr_B.dtype == stats.ctcvr_B.dtype == np.float32
    assert (stats.rows, stats.first_rows) == (64, int((batch.kind_B == Kind.FIRST).sum()))


def test_progressive_predictions_of_a_model_with_dropout_and_batch_norm_are_those_that_would_be_served():
    one = learner(dnn_dropout=0.5, dnn_use_bn=True)
    batch = examples(1)
    one.step(batch)
    expected = one.predict(batch)
    stats = one.step(batch)
    assert np.array_equal(stats.ctr_B, expected[0])
    assert np.array_equal(stats.ctcvr_B, expected[1])


def test_it_learns_to_fit_what_it_repeats():
    one = learner(config=LearnerConfig("vanilla-window", learning_rate=0.01))
    losses = [one.step(examples(seed % 3)).loss for seed in range(400)]
    assert losses[-1] < losses[0] * 0.7


def with_dense(batch: Examples, value: float) -> Examples:
    dense = batch.item.dense_ND.copy()
    dense[3, 0] = value
    return batch._replace(item=FeatureBlock(batch.item.ids_NS, dense))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("hyper", [{}, {"dnn_use_bn": True}])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_learns(value, hyper):
    one = learner(**hyper)
    one.step(examples(0))
    before = state(one)
    stats = one.step(with_dense(examples(1), value))
    assert not stats.finite
    assert differing(before, state(one)) == set()
    assert one.step(examples(2)).finite
    assert differing(before, state(one)) != set()


def test_a_gradient_that_overflows_is_refused_even_when_the_loss_is_finite():
    one = learner()
    with torch.no_grad():
        first, second = one.model.ctr_dnn.linears
        first.weight.zero_()
        first.bias.fill_(2e-38)
        second.weight.fill_(1e38)
        one.model.ctr_dnn_final_layer.weight.fill_(100.0)
    before = state(one)
    stats = one.step(examples(1))
    assert np.isfinite(stats.loss)
    assert not stats.finite
    assert differing(before, state(one)) == set()


def test_the_gradient_is_clipped_as_a_whole():
    wild = learner(config=LearnerConfig("vanilla-dup", clip_norm=1e-3))
    wild.step(examples(0))
    norm = np.sqrt(float(wild._adam.grad_P.square().sum()))
    assert 0 < norm <= 1e-3 * 1.0001


def test_matured_rows_teach_the_heads_alone_and_the_embeddings_do_not_feel_it():
    one = learner()
    before = state(one)
    one.step(examples(0, kinds={Kind.MATURED}))
    moved = differing(before, state(one))
    assert moved
    assert all(name.startswith(("heads.", "head_adam.")) for name in moved), moved


def test_late_conversions_do_not_teach_ctr_directly():
    one = learner()
    batch = examples(0, kinds={Kind.LATE_CONVERSION})
    flipped = batch._replace(click_B=np.zeros_like(batch.click_B))
    other = learner()
    one.step(batch)
    other.step(flipped)
    assert differing(state(one), state(other)) == set()


def test_only_touched_rows_move():
    one = learner(config=LearnerConfig("vanilla-dup", embedding=RowRule(l2=0.1)))
    before = one.model.embedding_dict["user"].weight.detach().clone()
    one.step(examples(0))  # user ids are below 6
    moved = (one.model.embedding_dict["user"].weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 2, 3, 4, 5]


def test_cold_heads_fall_back_to_fake_negative_weights_and_warm_ones_do_not():
    rule = HeadRule(min_rows=40, tolerance=10.0)
    one = learner(config=LearnerConfig(heads=rule))
    assert one.fallback
    one.step(examples(0, 30, kinds={Kind.MATURED}))
    assert one.fallback
    one.step(examples(1, 30, kinds={Kind.MATURED}))
    assert not one.fallback
    assert not learner(config=LearnerConfig("fnw", heads=rule)).fallback


def test_heads_out_of_bounds_fall_back_until_they_agree_again():
    rule = HeadRule(min_rows=10, tolerance=0.1, horizon=100, learning_rate=0.01)
    one = learner(config=LearnerConfig(heads=rule))
    matured = examples(0, 200, kinds={Kind.MATURED})
    for _ in range(100):
        one.step(matured)
    assert not one.fallback
    converted = matured._replace(conversion_B=np.ones_like(matured.conversion_B))
    one.step(converted)
    assert one.fallback
    for _ in range(100):
        one.step(matured)
    assert not one.fallback


@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_on_a_mixed_stream(method):
    one = learner(config=LearnerConfig(method, heads=WARM))
    for seed in range(5):
        assert one.step(examples(seed)).finite
    ctr_B, ctcvr_B = one.predict(examples(9))
    assert np.all((ctcvr_B >= 0) & (ctcvr_B <= ctr_B) & (ctr_B <= 1))


def test_an_empty_batch_and_a_single_row_are_steps_too():
    one = learner()
    stats = one.step(examples(0).take(np.arange(0)))
    assert (stats.rows, stats.first_rows, stats.loss, stats.finite) == (0, 0, 0.0, True)
    assert one.step(examples(0).take(np.arange(1))).finite


def test_export_is_a_version_that_predicts_the_same(tmp_path: Path):
    one = learner()
    one.step(examples(0))
    one.export(tmp_path, {"version": 7})
    loaded = load_version(tmp_path, SCHEMA.hash)
    assert loaded.manifest["version"] == 7
    assert loaded.manifest["method"] == "mp-es-dfm"
    assert loaded.manifest["ctcvr_correction"] == "none"
    batch = examples(5)
    for mine_B, theirs_B in zip(one.predict(batch), Evaluator(loaded.model).predict(batch), strict=True):
        assert np.array_equal(mine_B, theirs_B)


def test_chunks_do_not_change_predictions():
    one = learner()
    batch = examples(5, rows=50)
    for whole_B, parts_B in zip(one.predict(batch), Evaluator(one.model, chunk_rows=7).predict(batch), strict=True):
        assert np.allclose(whole_B, parts_B, rtol=1e-6, atol=0)


def test_fnc_serves_corrected_odds(tmp_path: Path):
    one, plain = (learner(config=LearnerConfig(method)) for method in ("fnc", "vanilla-dup"))
    ctr_B, ctcvr_B = one.predict(examples(0))
    q_B = plain.predict(examples(0))[1]
    assert ctcvr_B == pytest.approx(np.minimum(q_B / (1 - q_B), ctr_B), rel=1e-6)
    one.export(tmp_path, {})
    assert load_version(tmp_path).manifest["ctcvr_correction"] == "odds"


def test_the_method_may_change_at_a_restart_but_not_what_it_learns(tmp_path: Path):
    one = learner(config=LearnerConfig("vanilla-dup"))
    one.step(examples(0))
    one.save(tmp_path)
    learner(config=LearnerConfig("defuse")).restore(tmp_path)
    with pytest.raises(ValueError, match="odds_correction is False, this learner has True"):
        learner(config=LearnerConfig("fnc")).restore(tmp_path)


def edit_meta(directory: Path, **changes: object) -> None:
    meta = json.loads((directory / "learner.json").read_text())
    (directory / "learner.json").write_text(json.dumps({k: v for k, v in {**meta, **changes}.items() if v is not None}))


def edit_tensors(directory: Path, name: str, value: np.ndarray | None) -> None:
    path = directory / "learner.safetensors"
    tensors = {k: v for k, v in {**load_file(path), name: value}.items() if v is not None}
    save_file(tensors, path)
    import hashlib

    edit_meta(directory, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


BROKEN = {
    "learner.json cannot be read": lambda d: (d / "learner.json").unlink(),
    "learner.json cannot be read: Expecting": lambda d: (d / "learner.json").write_text("{torn"),
    "format 'stream-scorer-learner/0', this build reads": lambda d: edit_meta(d, format="stream-scorer-learner/0"),
    "'head_rows' in learner.json is missing or no int": lambda d: edit_meta(d, head_rows=None),
    "schema_hash is 'feed', this learner has": lambda d: edit_meta(d, schema_hash="feed"),
    "embedding_optimiser is 'lazy-adam'": lambda d: edit_meta(d, embedding_optimiser="lazy-adam"),
    "is torn or changed": lambda d: (d / "learner.safetensors").write_bytes(
        (d / "learner.safetensors").read_bytes()[:-9]
    ),
    "learner.safetensors cannot be read": lambda d: (d / "learner.safetensors").unlink(),
    "tensor 'adam.mean' is missing": lambda d: edit_tensors(d, "adam.mean", None),
    "tensor 'adam.else' does not belong": lambda d: edit_tensors(d, "adam.else", np.zeros(3, np.float32)),
    r"tensor 'model.out.bias' is torch.float32 \[2\], this learner has torch.float32 \[1\]": lambda d: edit_tensors(
        d, "model.out.bias", np.zeros(2, np.float32)
    ),
    "tensor 'model.out.bias' holds NaN": lambda d: edit_tensors(d, "model.out.bias", np.full(1, np.nan, np.float32)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, message):
    one = learner()
    one.step(examples(0))
    one.save(tmp_path)
    BROKEN[message](tmp_path)
    other = learner()
    before = state(other)
    with pytest.raises(ValueError, match=message):
        other.restore(tmp_path)
    assert differing(before, state(other)) == set()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown delayed-feedback method"):
        learner(config=LearnerConfig("magic"))
