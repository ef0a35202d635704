"""Touched-rows optimisers against dense references written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esmm.optim import DenseAdam, RowRule, Tables


def tables(rule: RowRule, sizes: dict[str, tuple[int, int]]) -> tuple[dict[str, nn.Embedding], Tables]:
    torch.manual_seed(0)
    embeddings = {name: nn.Embedding(*size) for name, size in sizes.items()}
    return embeddings, Tables(dict(embeddings), rule)


def learn(t: Tables, lookups: list[tuple[str, list[int]]], scale: float = 1.0) -> None:
    """Each looked-up vector is pulled towards zero: the gradient of half its square is itself."""
    loss = sum((t.lookup(name, torch.tensor(rows)) ** 2).sum() / 2 for name, rows in lookups)
    loss.backward()
    for group, rows_U, grad_UE in t.collect():
        group.learn(rows_U, grad_UE, scale)


def test_tables_of_one_width_share_memory_and_the_modules_see_every_change():
    embeddings, t = tables(RowRule(), {"a": (5, 4), "b": (7, 4), "c": (3, 2)})
    assert {width: tuple(g.weight_RE.shape) for width, g in t.groups.items()} == {4: (12, 4), 2: (3, 2)}
    before = {name: e.weight.detach().clone() for name, e in embeddings.items()}
    learn(t, [("a", [1, 1, 2]), ("b", [0]), ("c", [2])])
    changed = {name: (e.weight != before[name]).any(1).nonzero().flatten().tolist() for name, e in embeddings.items()}
    assert changed == {"a": [1, 2], "b": [0], "c": [2]}


def test_adagrad_is_the_formula_with_repeats_summed_first():
    rule = RowRule(learning_rate=0.1, l2=0.01, decay=0.9)
    embeddings, t = tables(rule, {"a": (4, 3)})
    row, square = embeddings["a"].weight[1].detach().clone(), torch.tensor(0.0)
    for _ in range(3):
        grad = 2 * row + rule.l2 * row  # looked up twice
        square = square * rule.decay + (grad**2).mean()
        row = row - rule.learning_rate * grad / (square.sqrt() + 1e-8)
        learn(t, [("a", [1, 1])])
        assert torch.allclose(embeddings["a"].weight[1], row, rtol=1e-5, atol=1e-7)


def test_lazy_adam_is_adam_on_the_touches_of_each_row_alone():
    rule = RowRule("lazy-adam", learning_rate=0.1)
    embeddings, t = tables(rule, {"a": (4, 3)})
    rows = {i: nn.Parameter(embeddings["a"].weight[i].detach().clone()) for i in (0, 2)}
    adams = {i: torch.optim.Adam([p], lr=0.1) for i, p in rows.items()}
    for touched in ([0], [0, 2], [2], [0], [0, 2]):
        for i in touched:
            adams[i].zero_grad()
            (rows[i] ** 2 / 2).sum().backward()
            adams[i].step()
        learn(t, [("a", touched)])
    for i, expected in rows.items():
        assert torch.allclose(embeddings["a"].weight[i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimiser", ["adagrad", "lazy-adam"])
def test_a_row_without_gradient_is_left_alone_even_with_l2_and_momentum(optimiser):
    embeddings, t = tables(RowRule(optimiser, l2=0.1), {"a": (4, 3)})
    learn(t, [("a", [0, 1])])
    before = embeddings["a"].weight.detach().clone()
    state = {name: value.clone() for name, value in t.state().items()}
    (t.lookup("a", torch.tensor([0, 3])) * 0.0).sum().backward()
    for group, rows_U, grad_UE in t.collect():
        group.learn(rows_U, grad_UE, 1.0)
    assert torch.equal(embeddings["a"].weight, before)
    for name, value in t.state().items():
        assert torch.equal(value, state[name]), name


def test_a_decayed_accumulator_keeps_learning_where_a_plain_one_stops():
    moves = []
    for decay in (1.0, 0.99):
        embeddings, t = tables(RowRule(learning_rate=0.1, decay=decay), {"a": (1, 2)})
        for _ in range(2_000):
            (t.lookup("a", torch.tensor([0]))).sum().backward()
            for group, rows_U, grad_UE in t.collect():
                group.learn(rows_U, grad_UE, 1.0)
        before = embeddings["a"].weight.detach().clone()
        t.lookup("a", torch.tensor([0])).sum().backward()
        for group, rows_U, grad_UE in t.collect():
            group.learn(rows_U, grad_UE, 1.0)
        moves.append((embeddings["a"].weight - before).abs().max().item())
    assert moves[1] > 4 * moves[0]


def test_collecting_leaves_nothing_behind():
    _, t = tables(RowRule(), {"a": (4, 3)})
    t.lookup("a", torch.tensor([1])).sum().backward()
    assert len(t.collect()) == 1
    assert t.collect() == []


def test_something_that_is_no_embedding_is_refused():
    with pytest.raises(TypeError, match=r"table 'a' must be an nn\.Embedding, got Linear"):
        Tables({"a": nn.Linear(2, 2)}, RowRule())


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_dense_adam_is_torch_adam(l2):
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = DenseAdam(ours.parameters(), 0.01, l2)
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01, weight_decay=l2)
    for step in range(20):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        mine.zero()
        reference.zero_grad()
        for model in (ours, theirs):
            (model(x) - 1).square().mean().backward()
        mine.step()
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_dense_adam_scales_the_gradient_and_parameters_stay_views():
    layer = nn.Linear(3, 2)
    adam = DenseAdam(layer.parameters(), 0.1)
    layer(torch.ones(1, 3)).sum().backward()
    assert adam.grad_P.sum().item() == 8
    adam.step(0.5)
    assert adam.grad_P.sum().item() == 4
    assert layer.weight.data_ptr() == adam.weight_P.data_ptr()
    adam.zero()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() == 0
