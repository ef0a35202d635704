"""The plain path's contract; the fast path's pieces."""

import threading

import numpy as np
import pytest
import torch

from esmm.batch import FeatureBlock, RankBatch
from esmm.checkpoint import golden_batch, golden_logits, random_golden
from esmm.features import DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.model import ESMM
from esmm.predictor import build, compiled
from esmm.predictor.compiled import has_compiler, plan
from esmm.predictor.config import PrecisionError, PredictorConfig
from esmm.predictor.fast import FastPredictor
from esmm.predictor.plain import PlainPredictor
from esmm.predictor.precision import PrecisionBound, precision_error, processor_flags, supports_bfloat16
from esmm.predictor.rows import EagerRows
from esmm.predictor.scripted import ScriptedRows, script_rows

SCHEMA = FeatureSchema(
    [
        SparseFeat("user_id", 50, 4, source="user"),
        DenseFeat("user_dense", 3, source="user"),
        SparseFeat("item_id", 40, 4, source="item"),
        VarLenSparseFeat(SparseFeat("tags", 20, 4, source="item"), 5),
        DenseFeat("hour", 2),
    ]
)


def make_model(**options) -> ESMM:
    return ESMM(SCHEMA, (8, 4), init_std=0.3, **options)


def make_batch(users: int, items: int, rows: int, seed: int = 0) -> RankBatch:
    """Random rows over ``users`` users and ``items`` items, item k in cache slot k with generation 1."""
    rng = np.random.default_rng(seed)
    user, item, context = (random_golden(SCHEMA, n, seed)[at] for at, n in enumerate((users, items, rows)))
    user_of_B, item_of_B = rng.integers(0, users, rows), rng.integers(0, items, rows)
    return RankBatch(user, item, context, user_of_B, item_of_B, np.arange(items), np.ones(items, np.int64))


def test_plain_scores_are_the_models() -> None:
    model, golden = make_model(), random_golden(SCHEMA)
    predictor = PlainPredictor(model, 7)
    pending = predictor.launch(golden_batch(golden))
    scores = predictor.collect(pending)
    ctr_B, cvr_B = 1 / (1 + np.exp(-golden_logits(model, golden).astype(np.float64))).T
    assert (pending.rows, scores.model_version) == (32, 7)
    np.testing.assert_allclose(scores.ctr_B, ctr_B, rtol=1e-5)
    np.testing.assert_allclose(scores.cvr_B, cvr_B, rtol=1e-5)
    np.testing.assert_allclose(scores.ctcvr_B, ctr_B * cvr_B, rtol=1e-5)
    assert {a.dtype for a in scores[:3]} == {np.dtype(np.float32)}


def test_plain_rows_take_their_own_user_and_item() -> None:
    batch = make_batch(3, 5, 11)
    whole = PlainPredictor(make_model(), 1).logits(batch)
    for row in range(11):
        one = batch._replace(
            context=batch.context.take(np.array([row])),
            user_of_B=batch.user_of_B[[row]],
            item_of_B=batch.item_of_B[[row]],
        )
        np.testing.assert_allclose(PlainPredictor(make_model(), 1).logits(one)[0], whole[row], rtol=1e-5, atol=1e-6)


def test_plain_errors_are_raised_by_collect() -> None:
    predictor = PlainPredictor(make_model(), 1)
    batch = make_batch(2, 2, 4)
    pending = predictor.launch(batch._replace(user=FeatureBlock(batch.user.ids_NS, batch.user.dense_ND[:, :1])))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        predictor.collect(pending)


def test_logits_of_an_extreme_model_stay_probabilities() -> None:
    model = make_model()
    with torch.no_grad():
        model.out.bias.fill_(200.0)
    scores = PlainPredictor(model, 1).collect(PlainPredictor(model, 1).launch(make_batch(2, 2, 4)))
    assert all((a >= 0).all() and (a <= 1).all() for a in scores[:3])


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "float16"},
        {"threads": 0},
        {"max_rows": 0},
        {"buckets": ()},
        {"buckets": (64, 32)},
        {"buckets": tuple(range(1, 10))},
    ],
)
def test_a_config_that_cannot_run_is_refused(options) -> None:
    with pytest.raises(ValueError, match="must be"):
        PredictorConfig(**options)


@pytest.fixture
def fast():
    """Builds fast predictors and closes them."""
    made = []

    def build(model=None, **options) -> FastPredictor:
        made.append(FastPredictor(model or make_model(), 3, PredictorConfig(**options)))
        return made[-1]

    yield build
    for predictor in made:
        predictor.close()


def test_fast_scores_carry_the_version_and_dtype(fast) -> None:
    predictor = fast()
    pending = predictor.launch(make_batch(2, 3, 9))
    scores = predictor.collect(pending)
    assert (pending.rows, scores.model_version, predictor.version) == (9, 3, 3)
    assert {a.dtype for a in scores[:3]} == {np.dtype(np.float32)}
    assert {a.shape for a in scores[:3]} == {(9,)}


def test_items_of_the_batch_before_are_hits_until_their_generation_changes(fast) -> None:
    predictor = fast()
    batch = make_batch(2, 10, 30)
    for generation, hits in ((1, 0), (1, 10), (2, 10), (2, 20)):
        predictor.logits(batch._replace(item_generation_I=np.full(10, generation)))
        assert predictor.stats.item_hits == hits


def test_a_cache_without_room_still_scores(fast) -> None:
    predictor = fast(cache_megabytes=0)
    batch = make_batch(2, 10, 30)
    predictor.logits(batch)
    np.testing.assert_allclose(
        predictor.logits(batch), PlainPredictor(make_model(), 1).logits(batch), rtol=1e-5, atol=1e-5
    )
    assert predictor.stats.item_hits == 0


def test_launch_returns_before_the_batch_is_computed_and_waits_for_the_third(fast) -> None:
    predictor = fast()
    gate, started = threading.Event(), threading.Event()
    compute = predictor._scores

    def held(batch):
        started.set()
        assert gate.wait(10)
        return compute(batch)

    predictor._scores = held
    batch = make_batch(2, 3, 9)
    pending = [predictor.launch(batch), predictor.launch(batch)]
    assert started.wait(10)
    third = threading.Thread(target=lambda: pending.append(predictor.launch(batch)))
    third.start()
    third.join(0.05)
    assert third.is_alive()
    assert not pending[0].future.done()
    gate.set()
    third.join(10)
    assert len(pending) == 3
    assert all(predictor.collect(p).model_version == 3 for p in pending)


def test_what_goes_wrong_is_raised_by_collect_and_the_next_batch_is_fine(fast) -> None:
    predictor = fast()
    batch = make_batch(2, 3, 9)
    bad = batch._replace(item=FeatureBlock(batch.item.ids_NS, batch.item.dense_ND), user_of_B=batch.user_of_B + 10**9)
    failed = [predictor.launch(bad), predictor.launch(bad)]
    for pending in failed:
        with pytest.raises((RuntimeError, IndexError)):
            predictor.collect(pending)
    expected = PlainPredictor(make_model(), 3).logits(batch)
    np.testing.assert_allclose(predictor.logits(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_failed_item_part_leaves_no_false_tag(fast) -> None:
    predictor = fast()
    batch = make_batch(2, 3, 9)
    narrow = FeatureBlock(batch.item.ids_NS[:, :2], batch.item.dense_ND)
    with pytest.raises((RuntimeError, IndexError)):
        predictor.logits(batch._replace(item=narrow))
    predictor.logits(batch)
    assert predictor.stats.item_hits == 0


def test_what_could_not_be_prepared_leaves_no_false_tag_either(fast) -> None:
    predictor, batch = fast(), make_batch(2, 3, 9)
    with pytest.raises(IndexError):
        predictor.collect(predictor.launch(batch._replace(item_of_B=batch.item_of_B + 10**6)))
    expected = PlainPredictor(make_model(), 3).logits(batch)
    np.testing.assert_allclose(predictor.logits(batch), expected, rtol=1e-5, atol=1e-5)


def test_close_finishes_what_was_launched_and_then_refuses(fast) -> None:
    predictor = fast()
    pending = predictor.launch(make_batch(2, 3, 9))
    predictor.close()
    assert len(predictor.collect(pending).ctr_B) == 9
    for _ in range(3):  # a refused launch takes no place in the queue
        with pytest.raises(RuntimeError, match="shutdown"):
            predictor.launch(make_batch(2, 3, 9))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["user", "context"])
def test_a_value_that_is_no_number_never_becomes_a_score(fast, precision: str, value: float, source: str) -> None:
    predictor = fast(precision=precision)
    batch = make_batch(2, 3, 9)
    bad_B = batch.user_of_B == 0 if source == "user" else np.arange(9) == 4
    getattr(batch, source).dense_ND[0 if source == "user" else 4, 0] = value
    scores = predictor.collect(predictor.launch(batch))
    np.testing.assert_array_equal(np.isnan(scores.ctr_B), bad_B)
    np.testing.assert_array_equal(np.isnan(scores.ctcvr_B), bad_B)
    good = make_batch(2, 3, 9)
    assert np.isfinite(predictor.collect(predictor.launch(good)).ctr_B).all()


def test_an_unfinite_cached_item_stays_marked_until_it_is_replaced(fast) -> None:
    schema = FeatureSchema([DenseFeat("u", 1, source="user"), DenseFeat("i", 1, source="item")])
    predictor = fast(ESMM(schema, (4,), init_std=0.3))

    def batch_with(value, generation):
        user = FeatureBlock(np.zeros((1, 0), np.int64), np.ones((1, 1), np.float32))
        item = FeatureBlock(np.zeros((1, 0), np.int64), np.full((1, 1), value, np.float32))
        context = FeatureBlock(np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32))
        zero = np.zeros(1, np.int64)
        return RankBatch(user, item, context, zero, zero, zero, np.array([generation]))

    assert np.isnan(predictor.logits(batch_with(np.nan, 1))).all()
    assert np.isnan(predictor.logits(batch_with(np.nan, 1))).all()
    assert np.isfinite(predictor.logits(batch_with(1.0, 2))).all()
    assert predictor.stats.item_hits == 1


def test_warm_leaves_nothing_cached_and_no_counts(fast) -> None:
    predictor = fast(buckets=(1, 5, 2000))
    predictor.warm()
    assert predictor.stats.rows == 0
    predictor.logits(make_batch(2, 10, 30))
    assert predictor.stats.item_hits == 0


def test_an_unknown_activation_is_refused(fast) -> None:
    model = make_model()
    model.ctr_dnn.activation_layers[0] = torch.nn.Tanh()
    with pytest.raises(ValueError, match="no activation Tanh"):
        fast(model)


@pytest.mark.parametrize(
    "options", [{}, {"dnn_activation": "prelu", "dnn_use_bn": True}, {"dnn_activation": "sigmoid"}]
)
def test_bfloat16_is_close_and_says_how_close(fast, options) -> None:
    model = make_model(**options)
    batch = make_batch(8, 30, 400)
    error = precision_error(fast(model, precision="bfloat16"), PlainPredictor(model, 3), batch)
    assert error.rows == 400
    assert 1e-6 < error.mean_abs < 0.01
    assert error.max_abs < 0.05
    assert error.pcoc_ratio == pytest.approx((1.0, 1.0), abs=0.01)
    assert -1e-9 <= error.logloss_excess[0] < 1e-3
    exact = precision_error(fast(model), PlainPredictor(model, 3), batch)
    assert exact.max_abs < 1e-5


def test_precision_error_needs_rows(fast) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        precision_error(fast(), PlainPredictor(make_model(), 3), make_batch(2, 2, 0))


def test_build_falls_back_to_float32_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    config, probe = PredictorConfig(precision="bfloat16", buckets=(8,)), make_batch(4, 9, 50)
    monkeypatch.setattr(build, "supports_bfloat16", lambda device: True)
    kept = build.build_predictor(make_model(), 3, config, probe)
    coarse = build.build_predictor(make_model(), 3, config, probe, PrecisionBound(mean_abs=1e-9))
    monkeypatch.setattr(build, "supports_bfloat16", lambda device: False)
    absent = build.build_predictor(make_model(), 3, config, probe)
    for predictor in (kept, coarse, absent):
        predictor.close()
    assert (kept.served.precision, kept.served.warning) == ("bfloat16", None)
    assert kept.served.error.mean_abs > 1e-6
    assert coarse.served.precision == "float32"
    assert "mean_abs" in coarse.served.warning
    assert coarse.served.error.max_abs < 1e-4
    assert absent.served.precision == "float32"
    assert "no bfloat16 units" in absent.served.warning


def test_build_refuses_a_fast_path_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLOAT32_BOUND", PrecisionBound(max_abs=-1.0))
    with pytest.raises(ValueError, match="version 3: the fast path differs"):
        build.build_predictor(make_model(), 3, PredictorConfig(buckets=(8,)), make_batch(4, 9, 50))


def test_a_bound_also_catches_nan() -> None:
    error = PrecisionError(1, float("nan"), 0.0, 0.0, (0.0, 0.0), (1.0, 1.0))
    assert "max_abs" in PrecisionBound().exceeded(error)


def test_processor_flags_are_read(tmp_path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t: none\n")
    assert processor_flags(path) == {"fpu", "avx512f", "avx512_bf16"}
    assert processor_flags(tmp_path / "absent") == frozenset()


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, []), (1, [8]), (8, [8]), (9, [8, 8]), (30, [32]), (33, [32, 8]), (200, [100, 100])]
)
def test_plan_covers_the_rows_with_few_buckets(rows: int, expected: list[int]) -> None:
    assert plan(rows, (8, 32, 100)) == expected


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_scores_are_the_plain_ones_and_the_next_version_compiles_nothing(fast, precision: str) -> None:
    options = {"dnn_activation": "prelu", "dnn_use_bn": True}
    first, second = (make_model(seed=seed, **options) for seed in (1, 2))
    batch = make_batch(4, 20, 150)
    predictor = fast(first, precision=precision, compile=True, buckets=(8, 100))
    predictor.warm()
    assert predictor.served.warning is None
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[precision]
    np.testing.assert_allclose(predictor.logits(batch), PlainPredictor(first, 1).logits(batch), atol=tolerance)
    assert predictor.stats.padded == sum(plan(150, (8, 100))) - 150
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    following = fast(second, precision=precision, compile=True, buckets=(8, 100))
    following.warm()
    np.testing.assert_allclose(following.logits(batch), PlainPredictor(second, 1).logits(batch), atol=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_what_does_not_compile_is_served_eagerly_with_a_warning(fast, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(compiled, "compiled_graph", lambda: refuse)
    monkeypatch.setattr("esmm.predictor.fast.has_compiler", lambda: True)
    predictor = fast(compile=True, buckets=(8,))
    predictor.warm()
    assert "no such compiler" in predictor.served.warning
    batch = make_batch(2, 3, 9)
    expected = PlainPredictor(make_model(), 3).logits(batch)
    np.testing.assert_allclose(predictor.logits(batch), expected, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_nothing_is_tried(fast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esmm.predictor.fast.has_compiler", lambda: False)
    assert fast(compile=True).served.warning == "no C++ compiler: not compiled"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "prelu", "linear"])
@pytest.mark.parametrize("packed", [True, False])
def test_one_call_a_batch_gives_what_operation_by_operation_gives(
    fast, precision: str, activation: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr("esmm.predictor.rows.pack", lambda *_: None)
        monkeypatch.setattr("esmm.predictor.scripted.pack", lambda *_: None)
    model, batch = make_model(dnn_activation=activation), make_batch(5, 9, 300)
    scripted, eager = (fast(model, precision=precision, script=on) for on in (True, False))
    assert isinstance(scripted._rows, ScriptedRows)
    assert isinstance(eager._rows, EagerRows)
    emulated = precision == "bfloat16" and not supports_bfloat16()  # then torch's two ways round at different places
    if packed and activation != "sigmoid" and not emulated:  # the same kernels in the same order
        np.testing.assert_array_equal(scripted.logits(batch), eager.logits(batch))
    else:
        near = 1e-5 if precision == "float32" else 2e-2
        np.testing.assert_allclose(scripted.logits(batch), eager.logits(batch), rtol=near, atol=near)


def test_where_torchscript_has_gone_batches_run_operation_by_operation(fast, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("not supported in this Python")

    monkeypatch.setattr("torch.jit.script", gone)
    script_rows.cache_clear()
    try:
        assert isinstance(fast()._rows, EagerRows)
    finally:
        script_rows.cache_clear()
