"""The plain path's contract; the fast path's pieces."""

import numpy as np
import pytest
import torch

from esmm.batch import FeatureBlock, RankBatch
from esmm.checkpoint import golden_batch, golden_logits, random_golden
from esmm.features import DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.model import ESMM
from esmm.predictor.config import PredictorConfig
from esmm.predictor.plain import PlainPredictor

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
    assert all((0 <= a).all() and (a <= 1).all() for a in scores[:3])


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
