"""Streaming optimisers: embedding rows learn only when a batch touches them, dense weights learn in one vector.

The cost of a step depends on the rows of the batch, never on the size of a table. There is no torch.optim here: its
sparse gradients sort once a table, its Adam keeps one state a parameter, and its state has no safetensors form.

Shape suffixes: R rows of all tables of one width E, N rows looked up, U unique ones among them, P dense parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EmbeddingOptimiser = Literal["adagrad", "lazy-adam"]
_ALIGN = 16  # floats: every parameter starts on a cache line
_BETA_1, _BETA_2 = 0.9, 0.999
_EPS_SQUARE = 1e-16  # under the root, because sqrt is forty times slower on the denormal squares of tiny gradients


class DenseAdam:
    """Adam (Kingma and Ba, arXiv:1412.6980) over parameters moved into one vector, gradients into another."""

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, l2: float = 0.0) -> None:
        """Take the parameters over: ``data`` and ``grad`` become views of ``weight_P`` and ``grad_P``.

        ``l2`` adds ``l2 * weight`` to the gradient.
        """
        self.learning_rate, self.l2, self.steps = learning_rate, l2, 0
        taken = list(parameters)
        starts = [0]
        for parameter in taken:
            starts.append(-(-(starts[-1] + parameter.numel()) // _ALIGN) * _ALIGN)
        self.weight_P, self.grad_P, self.mean_P, self.square_P = torch.zeros(4, starts[-1]).unbind()
        for parameter, start in zip(taken, starts, strict=False):
            span = slice(start, start + parameter.numel())
            self.weight_P[span] = parameter.detach().flatten()
            parameter.data = self.weight_P[span].view(parameter.shape)
            parameter.grad = self.grad_P[span].view(parameter.shape)

    def zero(self) -> None:
        """Forget the gradient."""
        self.grad_P.zero_()

    def step(self, scale: float = 1.0) -> None:
        """Learn from ``scale`` times the gradient."""
        self.steps += 1
        if scale != 1.0:
            self.grad_P.mul_(scale)
        if self.l2:
            self.grad_P.add_(self.weight_P, alpha=self.l2)
        self.mean_P.lerp_(self.grad_P, 1 - _BETA_1)
        self.square_P.mul_(_BETA_2).addcmul_(self.grad_P, self.grad_P, value=1 - _BETA_2)
        inverse_root_P = (self.square_P / (1 - _BETA_2**self.steps)).add_(_EPS_SQUARE).rsqrt_()
        self.weight_P.addcmul_(self.mean_P, inverse_root_P, value=-self.learning_rate / (1 - _BETA_1**self.steps))

    def state(self) -> dict[str, Tensor]:
        """What a restart needs besides the parameters and ``steps``; not copied."""
        return {"mean": self.mean_P, "square": self.square_P}


@dataclass(frozen=True)
class RowRule:
    """How a touched row learns.

    ``adagrad`` keeps one number a row, the sum of its mean squared gradients, multiplied by ``decay`` at each touch so
    that a drifting row never stops learning. ``lazy-adam`` keeps both Adam moments of a row and its count of touches.
    ``l2`` adds ``l2 * row`` to the gradient of touched rows only.
    """

    optimiser: EmbeddingOptimiser = "adagrad"
    learning_rate: float = 0.02
    l2: float = 0.0
    decay: float = 0.9995


class Touched(NamedTuple):
    """The rows that a batch looked up in tables of one width, each once, and the loss's gradient there."""

    tables: TablesOfWidth
    rows_U: Tensor
    grad_UE: Tensor


@dataclass
class TablesOfWidth:
    """All tables of one width, one after another in one block of memory, with their optimiser's state."""

    rule: RowRule
    weight_RE: Tensor
    state: dict[str, Tensor]
    looked_up: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (rows, leaf vectors) since the last collect

    def collect(self) -> Touched | None:
        """Sum each row's gradient over the places it was looked up in, and forget those; None when there were none."""
        pairs = [(rows_N, leaf) for rows_N, leaf in self.looked_up if leaf.grad is not None]
        self.looked_up.clear()
        if not pairs:
            return None
        width = self.weight_RE.shape[1]
        grad_NE = torch.cat([leaf.grad.reshape(-1, width) for _, leaf in pairs])  # type: ignore[union-attr]
        sorted_N, order_N = torch.sort(torch.cat([rows_N for rows_N, _ in pairs]), stable=True)
        rows_U, count_U = torch.unique_consecutive(sorted_N, return_counts=True)
        start_U = torch.cumsum(count_U, 0) - count_U
        grad_UE = F.embedding_bag(order_N, grad_NE, start_U, mode="sum")  # five times faster than index_add_
        return Touched(self, rows_U, grad_UE)

    def learn(self, rows_U: Tensor, grad_UE: Tensor, scale: float) -> None:
        """One step on unique rows; a row whose gradient is zero (padding, masked; or too small to square) stays.

        ``grad_UE`` is used up.
        """
        grad_UE.mul_(scale)
        moved_U = _squares(grad_UE) > 0
        if self.rule.l2:
            row_UE = self.weight_RE.index_select(0, rows_U)
            grad_UE.addcmul_(row_UE, moved_U[:, None].to(row_UE.dtype), value=self.rule.l2)
        step = self._adagrad if self.rule.optimiser == "adagrad" else self._lazy_adam
        self.weight_RE.index_add_(0, rows_U, step(rows_U, grad_UE, moved_U))  # its alpha would loop over rows

    def _adagrad(self, rows_U: Tensor, grad_UE: Tensor, moved_U: Tensor) -> Tensor:
        before_U = self.state["square"].index_select(0, rows_U)
        after_U = before_U * self.rule.decay + _squares(grad_UE) / grad_UE.shape[1]
        self.state["square"].index_copy_(0, rows_U, torch.where(moved_U, after_U, before_U))
        return grad_UE.mul_(((after_U + _EPS_SQUARE).rsqrt() * -self.rule.learning_rate)[:, None])

    def _lazy_adam(self, rows_U: Tensor, grad_UE: Tensor, moved_U: Tensor) -> Tensor:
        touches_U = self.state["touches"].index_select(0, rows_U) + moved_U
        mean_UE, square_UE = (self.state[name].index_select(0, rows_U) for name in ("mean", "square"))
        moved_U1 = moved_U[:, None]
        mean_UE = torch.where(moved_U1, mean_UE.lerp(grad_UE, 1 - _BETA_1), mean_UE)
        square_UE = torch.where(moved_U1, square_UE.lerp(grad_UE.square(), 1 - _BETA_2), square_UE)
        for name, value in (("touches", touches_U), ("mean", mean_UE), ("square", square_UE)):
            self.state[name].index_copy_(0, rows_U, value)
        age_U1 = touches_U.clamp(min=1)[:, None]
        bias_1_U1, bias_2_U1 = (-torch.expm1(age_U1 * math.log(beta)) for beta in (_BETA_1, _BETA_2))  # 1 - beta**age
        rate_U1 = moved_U1 * -self.rule.learning_rate / bias_1_U1
        return mean_UE * rate_U1 * (square_UE / bias_2_U1 + _EPS_SQUARE).rsqrt()


class Tables:
    """The model's embedding tables as a learner sees them: look rows up as leaves of the graph, then learn those."""

    def __init__(self, embeddings: Mapping[str, nn.Module], rule: RowRule) -> None:
        """Move tables of equal width into one block each; the modules' weights become views of it."""
        by_width: dict[int, list[tuple[str, nn.Embedding]]] = {}
        for name, module in embeddings.items():
            if not isinstance(module, nn.Embedding):
                raise TypeError(f"table {name!r} must be an nn.Embedding, got {type(module).__name__}")
            by_width.setdefault(module.embedding_dim, []).append((name, module))
        self.groups = {width: _joined([table for _, table in tables], rule) for width, tables in by_width.items()}
        self._where: dict[str, tuple[TablesOfWidth, int]] = {}
        for width, tables in by_width.items():
            start = 0
            for name, table in tables:
                self._where[name] = (self.groups[width], start)
                start += table.num_embeddings

    def lookup(self, table: str, rows: Tensor) -> Tensor:
        """Vectors of valid rows, any shape -> one more axis; a leaf whose gradient `collect` will find."""
        group, start = self._where[table]
        rows_N = (rows + start).flatten()
        leaf = group.weight_RE.index_select(0, rows_N).view(*rows.shape, group.weight_RE.shape[1]).requires_grad_()
        group.looked_up.append((rows_N, leaf))
        return leaf

    def place(self, table: str) -> tuple[TablesOfWidth, int]:
        """The block that a table lies in, and its first row there."""
        return self._where[table]

    def collect(self) -> list[Touched]:
        """Gradients of all rows looked up since the last call."""
        return [touched for group in self.groups.values() if (touched := group.collect()) is not None]

    def forget(self) -> None:
        """Drop what was looked up: the step will not be taken."""
        for group in self.groups.values():
            group.looked_up.clear()

    def state(self) -> dict[str, Tensor]:
        """What a restart needs besides the tables; not copied."""
        return {f"{width}.{name}": value for width, g in self.groups.items() for name, value in g.state.items()}


def _joined(tables: list[nn.Embedding], rule: RowRule) -> TablesOfWidth:
    """Tables of one width in one block. A table at a time, so that no more than one exists twice."""
    if len(tables) == 1:
        weight_RE = tables[0].weight.data
    else:
        weight_RE = torch.empty(sum(t.num_embeddings for t in tables), tables[0].embedding_dim)
        start = 0
        for table in tables:
            block = weight_RE[start : start + table.num_embeddings]
            block.copy_(table.weight.data)
            table.weight.data = block
            start += table.num_embeddings
    rows = len(weight_RE)
    if rule.optimiser == "adagrad":
        return TablesOfWidth(rule, weight_RE, {"square": _zeros(rows)})
    state = {name: _zeros(*weight_RE.shape) for name in ("mean", "square")}
    return TablesOfWidth(rule, weight_RE, {**state, "touches": _zeros(rows)})


def _squares(grad_UE: Tensor) -> Tensor:
    """Each row's squared length; as a product it takes a fifth of what a reduction over short rows does."""
    return grad_UE.square() @ torch.ones(grad_UE.shape[1])


def _zeros(*shape: int) -> Tensor:
    """Written, so that memory is taken now and not, a page fault each, in the first million steps."""
    return torch.empty(shape).zero_()
