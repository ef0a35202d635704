"""The towers by hand against autograd, and their gradient against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from esmm.batch import Examples, FeatureBlock
from esmm.delay import METHODS, Beliefs, fake_negative, head_targets, sample_classes
from esmm.features import SOURCES, DenseFeat, FeatureSchema, SparseFeat, VarLenSparseFeat
from esmm.graphs import scripted, traced
from esmm.heads import FULL_WEIGHT_ROWS, Heads
from esmm.learner import Learner, LearnerConfig
from esmm.loss import entire_space_loss
from esmm.model import ESMM
from esmm.optim import RowRule
from esmm.towers import CHUNK_ROWS, HandTowers, Numbers, StepRule, _step_of, _weigh, distinct
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


def learner(hidden: tuple[int, ...], method: str = "mp-es-dfm", **more) -> Learner:
    config = LearnerConfig(method, heads=replace(WARM, hidden_units=(6, 5)), **more)
    return Learner(ESMM(SCHEMA, hidden, init_std=0.3), config, lambda *_: None)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if not n.startswith("embedding_dict.")}


def by_hand(one: Learner, rows: Examples):
    parts = one._parts(rows, one.model.lookup)
    rule = StepRule(one.fallback, one._sampler.shift, FULL_WEIGHT_ROWS)
    return parts, one._hand.step(parts, rows, rule, (one._adam.grad_P, one._heads.adam.grad_P))


def in_float64(one: Learner, batch: Examples):
    """The same step under autograd: model, heads, the towers' input and the logits, with their gradients."""
    exact, heads = (
        ESMM.from_hyper(SCHEMA, one.model.hyper).double(),
        Heads(one.model.input_dim, one._heads.rule, 1).double(),
    )
    for copy, of in ((exact, one.model), (heads, one._heads)):
        copy.load_state_dict({name: value.double() for name, value in of.state_dict().items()})
        for parameter in copy.parameters():
            parameter.grad = torch.zeros_like(parameter)
    ids_BS, dense_BD = SCHEMA.pack(*batch[:3])
    x_BD = exact.embed(torch.from_numpy(ids_BS), torch.from_numpy(dense_BD).double()).detach().requires_grad_()
    logits_B2 = exact.towers(x_BD)
    columns = (batch.click_B, batch.conversion_B, batch.observed_B)
    rows = sample_classes(torch.tensor(batch.kind_B), *(torch.tensor(c, dtype=torch.float64) for c in columns))
    asked_B1 = (rows.pending_B + rows.matured_B > 0)[:, None] | one.method.needs_dp
    head_logits_B2 = torch.where(asked_B1 & one.method.needs_heads, heads(x_BD), 0.0)
    rn_B, dp_B = torch.sigmoid(head_logits_B2.detach()).unbind(1)
    beliefs = Beliefs(torch.sigmoid(logits_B2.detach()[:, 1]), rn_B, dp_B)
    weights = (fake_negative if one.fallback else one.method.weights)(rows, beliefs)
    click_B = torch.tensor(batch.click_B, dtype=torch.float64)
    shifted_B2 = logits_B2 + torch.tensor([one._sampler.shift, 0.0])
    loss = entire_space_loss(shifted_B2, click_B, rows.first_B, *weights)
    head_loss = heads.loss(head_logits_B2, head_targets(rows))
    (loss + head_loss).backward()
    return exact, heads, x_BD, logits_B2, loss, head_loss


@pytest.mark.parametrize(
    ("hidden", "method", "more"),
    [
        ((8,), "mp-es-dfm", {}),
        ((8, 4), "mp-es-dfm", {"negative_keep": 0.3}),
        ((8, 6, 4), "defuse", {}),
        ((8, 4), "ddfm", {}),
        ((8, 4), "vanilla-dup", {}),
    ],
)
@pytest.mark.parametrize(("rows", "users"), [(1, 1), (64, 5), (64, 64), (CHUNK_ROWS + 100, 7)])
@pytest.mark.parametrize("warm", [False, True])
def test_logits_and_gradients_are_those_of_float64(hidden, method, more, rows, users, warm):
    one = learner(hidden, method, **more)
    if warm:
        one._heads.trust.add(100, 50.0, 50.0, 1_000)
    batch_ = batch(3, rows, users)
    parts, passed = by_hand(one, batch_)
    exact, heads, x_BD, logits_B2, loss, head_loss = in_float64(one, batch_)

    torch.testing.assert_close(passed.logits_B2.double(), logits_B2, rtol=1e-5, atol=1e-6)
    for mine, theirs in ((one.model, exact), (one._heads, heads)):
        grads = gradients(mine)
        for name, grad in gradients(theirs).items():
            torch.testing.assert_close(grads[name].double(), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
    for source, part, grad_UE in zip(SOURCES, parts, passed.grads, strict=True):
        columns = torch.from_numpy(one.model.input_columns(source))[: grad_UE.shape[1]]
        row_of_B = part.row_of_B if len(part.row_of_B) else torch.arange(rows)
        sums = torch.zeros_like(grad_UE).double().index_add_(0, row_of_B, x_BD.grad[:, columns])
        torch.testing.assert_close(grad_UE.double(), sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max()))
    numbers = Numbers(*passed.numbers_N.tolist())
    norm, head_norm = (math.hypot(*(float(g.norm()) for g in gradients(m).values())) for m in (exact, heads))
    assert numbers[:3] == pytest.approx((float(loss.detach()), norm, head_norm), rel=1e-4)
    if one.method.needs_heads:
        assert numbers.head_loss == pytest.approx(float(head_loss.detach()), rel=1e-4)
    assert (len(parts[0].row_of_B) > 0) == (rows > 1 and users < 10)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["mp-es-dfm", "defuse"])
def test_the_graph_computes_what_its_functions_do(monkeypatch, precision, method):
    def run() -> list[torch.Tensor]:
        one = learner((8, 4), method, precision=precision, learning_rate=0.01, embedding=RowRule("lazy-adam"))
        for seed in range(4):
            assert one.step(batch(seed, 64, 6)).finite
        return [one._state()[name].clone() for name in sorted(one._state())]

    def forget() -> None:
        for kept in (_step_of, _weigh, scripted, traced):
            kept.cache_clear()

    assert isinstance(_step_of(METHODS[method].weights), torch.jit.ScriptFunction)
    graph = run()
    forget()
    monkeypatch.setattr("esmm.graphs._quietly", lambda _, function: function)
    assert not isinstance(_step_of(METHODS[method].weights), torch.jit.ScriptFunction)
    assert all(map(torch.equal, graph, run()))
    forget()


def test_a_step_is_a_few_calls():
    """Each operation that is called from Python waits for the interpreter lock while the loop is busy."""
    calls = 0

    class Counted(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal calls
            calls += 1
            return function(*args, **(kwargs or {}))

    schema = FeatureSchema([DenseFeat("user", 3, source="user"), DenseFeat("item", 3, source="item")])
    one = Learner(ESMM(schema, (8, 4), init_std=0.1), LearnerConfig(heads=WARM), lambda *_: None)
    one.step(batch(1, 64, 6, schema))
    with Counted():
        one.step(batch(2, 3_000, 300, schema))
    assert calls < 100


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
    assert distinct(block)[0] is block
    monkeypatch.setattr("esmm.towers._multipliers", lambda words: np.zeros(words, np.int64))
    found, row_of_B = distinct(block)
    assert found is block
    assert len(row_of_B) == 0


def test_rows_that_may_not_be_written_to_are_learned_from():
    one, other = (learner((8, 4), learning_rate=0.01) for _ in range(2))
    rows = batch(1, 64, 5)
    for array in (*rows.user, *rows.item, *rows.context, *rows[3:]):
        array.flags.writeable = False
    assert one.step(rows).loss == other.step(batch(1, 64, 5)).loss


@pytest.mark.parametrize("hyper", [{"dnn_dropout": 0.1}, {"dnn_use_bn": True}, {"dnn_activation": "prelu"}])
def test_other_models_take_the_plain_path(hyper):
    assert not HandTowers.fit(ESMM(SCHEMA, (4,), **hyper))


def test_a_schema_of_one_source_learns():
    schema = FeatureSchema([DenseFeat("item", 3, source="item")])
    one = Learner(ESMM(schema, (8, 4), init_std=0.1), LearnerConfig(heads=WARM), lambda *_: None)
    assert one.step(examples(1, 64, schema)).finite
