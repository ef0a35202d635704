"""The fast path gives the plain path's scores: for every model a schema can express, however rows are batched."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esmm.batch import FeatureBlock, RankBatch
from esmm.checkpoint import random_golden
from esmm.features import Column, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.model import ESMM
from esmm.predictor.config import PredictorConfig
from esmm.predictor.fast import FastPredictor
from esmm.predictor.plain import PlainPredictor

SOURCES = st.sampled_from(["user", "item", "context"])
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def schemas(draw) -> FeatureSchema:
    """1 to 7 columns of every kind; tables ``t0`` and ``t1`` may be shared, also across sources."""
    shapes = [(draw(st.integers(2, 12)), draw(st.integers(1, 9))) for _ in range(2)]
    columns: list[Column] = []
    for n in range(draw(st.integers(1, 7))):
        source, kind = draw(SOURCES), draw(st.sampled_from(["sparse", "varlen", "dense"]))
        if kind == "dense":
            columns.append(DenseFeat(f"f{n}", draw(st.integers(1, 5)), source=source))
            continue
        shared = draw(st.integers(0, 2))
        vocabulary, dim = shapes[shared] if shared < 2 else (draw(st.integers(1, 20)), draw(st.integers(1, 9)))
        table = f"t{shared}" if shared < 2 else None
        use_hash = draw(st.booleans()) if table is None else False
        sparse = SparseFeat(f"f{n}", vocabulary, dim, use_hash=use_hash, embedding_name=table, source=source)
        if kind == "sparse":
            columns.append(sparse)
            continue
        length = f"n{n}" if draw(st.booleans()) else None
        combiner = draw(st.sampled_from(["sum", "mean", "max"]))
        columns.append(VarLenSparseFeat(sparse, draw(st.integers(1, 4)), combiner, length_name=length))
    return FeatureSchema(columns)


@st.composite
def models(draw) -> ESMM:
    """Any towers, activation, batch norm and dropout, with weights large enough for every unit to matter."""
    hidden = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    model = ESMM(
        draw(schemas()),
        hidden,
        dnn_activation=draw(st.sampled_from(["relu", "sigmoid", "linear", "prelu"])),
        dnn_use_bn=draw(st.booleans()),
        dnn_dropout=draw(st.sampled_from([0, 0.5])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.5, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.1)
    return model


def make_batch(schema: FeatureSchema, sizes: tuple[int, int, int], seed: int, slots: int = 50) -> RankBatch:
    """``sizes``: users, items, rows. Ids reach past the vocabulary; items have distinct slots, a few of them none."""
    users, items, rows = sizes
    rng = np.random.default_rng(seed)
    user, item, context = (random_golden(schema, n, seed + at)[at] for at, n in enumerate(sizes))
    slot_I = rng.permutation(slots)[:items].astype(np.int64)
    slot_I[rng.random(items) < 0.2] = -1
    return RankBatch(
        user,
        item,
        context,
        rng.integers(0, users, rows),
        rng.integers(0, items, rows),
        slot_I,
        np.ones(items, np.int64),
    )


def assert_close(got, expected) -> None:
    """Within float32 rounding of sums in another order."""
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 60))


@QUICK
@given(model=models(), sizes=SIZES, seed=st.integers(0, 999), cache=st.sampled_from([0, 7, 100]))
def test_fast_equals_plain_for_every_model(model: ESMM, sizes, seed: int, cache: int) -> None:
    plain, fast = PlainPredictor(model, 1), FastPredictor(model, 1, PredictorConfig(cache_items=cache, max_rows=64))
    try:
        for step in range(3):  # the second and third find parts of the first in the cache
            batch = make_batch(model.schema, sizes, seed)
            shuffled = np.random.default_rng(step).permutation(batch.rows)
            batch = batch._replace(user_of_B=batch.user_of_B[shuffled], item_of_B=batch.item_of_B[shuffled])
            assert_close(fast.logits(batch), plain.logits(batch))
            scores, expected = fast.collect(fast.launch(batch)), plain.collect(plain.launch(batch))
            for got, want in zip(scores[:3], expected[:3], strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
            assert (scores.ctcvr_B <= scores.ctr_B).all()
    finally:
        fast.close()


@QUICK
@given(
    model=models(), sizes=SIZES, seed=st.integers(0, 999), cut=st.integers(0, 60), limit=st.sampled_from([3, 16, 64])
)
def test_how_rows_are_batched_changes_no_score(model: ESMM, sizes, seed: int, cut: int, limit: int) -> None:
    """The whole batch, the same in two, and the same through a predictor that must split it into slices."""
    batch = make_batch(model.schema, sizes, seed)
    whole = FastPredictor(model, 1, PredictorConfig(max_rows=64))
    narrow = FastPredictor(model, 1, PredictorConfig(max_rows=limit, cache_items=5))
    try:
        expected_B2 = whole.logits(batch)
        parts = [
            batch._replace(
                context=FeatureBlock(batch.context.ids_NS[rows], batch.context.dense_ND[rows]),
                user_of_B=batch.user_of_B[rows],
                item_of_B=batch.item_of_B[rows],
            )
            for rows in (slice(0, cut), slice(cut, None))
        ]
        assert_close(np.concatenate([whole.logits(part) for part in parts]), expected_B2)
        assert_close(narrow.logits(batch), expected_B2)
    finally:
        whole.close()
        narrow.close()


@QUICK
@given(seed=st.integers(0, 999), capacity=st.integers(0, 12), steps=st.integers(2, 6))
def test_the_cache_never_serves_another_items_part(seed: int, capacity: int, steps: int) -> None:
    """Items get new features with a new generation, collide, have no slot: the score is always their own."""
    schema = FeatureSchema([DenseFeat("u", 2, source="user"), DenseFeat("i", 3, source="item")])
    model = ESMM(schema, (4,), init_std=0.5)
    plain, fast = PlainPredictor(model, 1), FastPredictor(model, 1, PredictorConfig(cache_items=capacity, max_rows=64))
    rng = np.random.default_rng(seed)
    generation = np.zeros(20, np.int64)
    features = rng.standard_normal((20, 3)).astype(np.float32)
    try:
        for _ in range(steps):
            changed = rng.random(20) < 0.3
            generation[changed] += 1
            features[changed] = rng.standard_normal((int(changed.sum()), 3))
            items = rng.permutation(20)[: rng.integers(1, 20)]
            slot_I = np.where(rng.random(len(items)) < 0.2, -1, items)
            batch = make_batch(schema, (2, len(items), 30), seed)._replace(
                item=FeatureBlock(np.zeros((len(items), 0), np.int64), features[items]),
                item_slot_I=slot_I,
                item_generation_I=generation[items],
            )
            assert_close(fast.logits(batch), plain.logits(batch))
    finally:
        fast.close()


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 5000])
def test_chunk_edges(rows: int) -> None:
    schema = FeatureSchema([DenseFeat("u", 4, source="user"), SparseFeat("i", 30, 4, source="item"), DenseFeat("c", 2)])
    model = ESMM(schema, (16, 8), init_std=0.5, dnn_activation="prelu")
    fast = FastPredictor(model, 1, PredictorConfig(max_rows=3000))
    try:
        batch = make_batch(schema, (9, 25, rows), 3)
        assert_close(fast.logits(batch), PlainPredictor(model, 1).logits(batch))
    finally:
        fast.close()
