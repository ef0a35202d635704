"""The towers by hand against autograd, and their gradient against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esmm.batch import FeatureBlock
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.learner import Learner, LearnerConfig
from esmm.model import ESMM
from esmm.towers import CHUNK_ROWS, HandTowers, Part, distinct
from tests.unit.test_learner import WARM, examples

SCHEMA = FeatureSchema(
    [
        SparseFeat("user", 50, 4, source="user"),
        SparseFeat("item", 40, 4, use_hash=True, source="item"),
        VarLenSparseFeat(SparseFeat("history", 40, 4, embedding_name="item", use_hash=True, source="user"), 3),
        SparseFeat("place", 6, 2, source="context"),
        DenseFeat("price", 3, source="item"),
        DenseFeat("age", source="user"),
    ]
)


def batch(seed: int, rows: int, users: int, schema: FeatureSchema = SCHEMA):
    """Examples in which ``users`` users come again and again."""
    one = examples(seed, rows, schema)
    return one._replace(user=one.user.take(np.random.default_rng(seed).integers(0, users, rows)))


def gradients(model: ESMM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if not n.startswith("embedding_dict.")}


def by_hand(model: ESMM, one, toward_B2: torch.Tensor, precision="float32"):
    towers = HandTowers(model, precision)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    parts = []
    for source, block in zip(SOURCES, one[:3], strict=True):
        unique, row_of_B = distinct(block)
        x = model.embed_source(source, torch.from_numpy(unique.ids_NS), torch.from_numpy(unique.dense_ND))
        parts.append(Part(x.detach(), row_of_B))
    logits = towers.forward(parts, one.rows)
    grads = towers.backward(toward_B2)
    at = torch.arange(one.rows)
    whole = [
        None if g is None else torch.zeros(len(p.x_UD), g.shape[1]).add_(g) for p, g in zip(parts, grads, strict=True)
    ]
    return logits, gradients(model), whole, [at if p.row_of_B is None else p.row_of_B for p in parts]


@pytest.mark.parametrize("hidden", [(8,), (8, 4), (8, 6, 4)])
@pytest.mark.parametrize(("rows", "users"), [(1, 1), (64, 5), (64, 60), (CHUNK_ROWS + 100, 7)])
def test_logits_and_gradients_are_those_of_float64(hidden, rows, users):
    model = ESMM(SCHEMA, hidden, init_std=0.3)
    one = batch(3, rows, users)
    toward_B2 = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    logits, grads, inputs, row_of = by_hand(model, one, toward_B2)

    exact = ESMM.from_hyper(SCHEMA, model.hyper).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    ids_BS, dense_BD = SCHEMA.pack(*one[:3])
    x_BD = exact.embed(torch.from_numpy(ids_BS), torch.from_numpy(dense_BD).double()).detach().requires_grad_()
    expected = exact.towers(x_BD)
    expected.backward(toward_B2.double())

    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(exact).items():
        torch.testing.assert_close(grads[name].double(), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    for source, grad_UE, row_of_B in zip(SOURCES, inputs, row_of, strict=True):
        columns = torch.from_numpy(model.input_columns(source))[: grad_UE.shape[1]]
        sums = torch.zeros_like(grad_UE).double().index_add_(0, row_of_B, x_BD.grad[:, columns])
        torch.testing.assert_close(grad_UE.double(), sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["mp-es-dfm", "defuse", "fnc"])
def test_a_run_by_hand_ends_where_one_under_autograd_does(method, precision):
    def run(config: LearnerConfig) -> np.ndarray:
        one = Learner(ESMM(SCHEMA, (8, 4), init_std=0.1), config, lambda *_: None)
        for seed in range(30):
            assert one.step(batch(seed, 64, 6)).finite
        return np.stack(one.predict(batch(100, 200, 20)))

    plain = run(LearnerConfig(method, heads=WARM, learning_rate=0.01, by_hand=False))
    hand = run(LearnerConfig(method, heads=WARM, learning_rate=0.01, precision=precision))
    start = run(LearnerConfig(method, heads=WARM, learning_rate=0.0))
    assert np.abs(hand - plain).max() < (1e-3 if precision == "float32" else 2e-2)
    assert np.abs(start - plain).max() > 5e-2, "nothing was learned: the comparison says nothing"


def test_distinct_rows_are_told_apart_bit_for_bit():
    ids = np.array([[1], [1], [2], [1], [1], [2]], np.int64)
    dense = np.array([[0.0], [0.0], [1.0], [-0.0], [0.0], [1.0]], np.float32)
    unique, row_of_B = distinct(FeatureBlock(ids, dense))
    assert unique.rows == 3
    again = unique.take(row_of_B.numpy())
    assert np.array_equal(again.ids_NS, ids)
    assert np.array_equal(again.dense_ND.view(np.int32), dense.view(np.int32))


def test_rows_that_do_not_repeat_or_hashes_that_collide_cost_only_the_shortcut(monkeypatch):
    ids = np.arange(8)[:, None]
    block = FeatureBlock(ids, np.zeros((8, 0), np.float32))
    assert distinct(block) == (block, None)
    monkeypatch.setattr("esmm.towers._multipliers", lambda words: np.zeros(words, np.int64))
    assert distinct(block) == (block, None)


@pytest.mark.parametrize("hyper", [{"dnn_dropout": 0.1}, {"dnn_use_bn": True}, {"dnn_activation": "prelu"}])
def test_other_models_take_the_plain_path(hyper):
    assert not HandTowers.fit(ESMM(SCHEMA, (4,), **hyper))


def test_a_schema_of_one_source_learns():
    schema = FeatureSchema([DenseFeat("item", 3, source="item")])
    one = Learner(ESMM(schema, (8, 4), init_std=0.1), LearnerConfig(heads=WARM), lambda *_: None)
    assert one.step(examples(1, 64, schema)).finite
