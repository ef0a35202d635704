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
from torch import Tensor, nn

from esmm.graphs import as_written, scripted

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
        rates = (1 - _BETA_1, _BETA_2, 1 - _BETA_2**self.steps, -self.learning_rate / (1 - _BETA_1**self.steps))
        with as_written():
            scripted(_adam)(self.weight_P, self.mean_P, self.square_P, self.grad_P, scale, self.l2, rates, _EPS_SQUARE)

    def state(self) -> dict[str, Tensor]:
        """What a restart needs besides the parameters and ``steps``; not copied."""
        return {"mean": self.mean_P, "square": self.square_P}


def _adam(
    weight_P: Tensor,
    mean_P: Tensor,
    square_P: Tensor,
    grad_P: Tensor,
    scale: float,
    l2: float,
    rates: tuple[float, float, float, float],
    eps_square: float,
) -> None:
    """In place. ``rates``: of the mean, of the square, the square's bias, and the step's over the mean's bias."""
    if scale != 1.0:
        grad_P.mul_(scale)
    if l2 != 0.0:
        grad_P.add_(weight_P, alpha=l2)
    mean_P.lerp_(grad_P, rates[0])
    square_P.mul_(rates[1]).addcmul_(grad_P, grad_P, value=1 - rates[1])
    inverse_root_P = (square_P / rates[2]).add_(eps_square).rsqrt_()
    weight_P.addcmul_(mean_P, inverse_root_P, value=rates[3])


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
        grads = [leaf.grad for _, leaf in pairs if leaf.grad is not None]
        with as_written():
            rows_U, grad_UE = scripted(_by_row)([rows_N for rows_N, _ in pairs], grads, self.weight_RE.shape[1])
        return Touched(self, rows_U, grad_UE)

    def learn(self, rows_U: Tensor, grad_UE: Tensor, scale: float) -> None:
        """One step on unique rows; a row whose gradient is zero (padding, masked; or too small to square) stays.

        ``grad_UE`` is used up.
        """
        rule, state = self.rule, self.state
        with as_written():
            moved_U = scripted(_ready)(self.weight_RE, rows_U, grad_UE, scale, rule.l2)
            if rule.optimiser == "adagrad":
                decay = (rule.learning_rate, rule.decay, _EPS_SQUARE)
                scripted(_adagrad)(self.weight_RE, state["square"], rows_U, grad_UE, moved_U, decay)
            else:
                rates = (rule.learning_rate, _BETA_1, _BETA_2, _EPS_SQUARE)
                moments = (state["touches"], state["mean"], state["square"])
                scripted(_lazy_adam)(self.weight_RE, moments, rows_U, grad_UE, moved_U, rates)


def _by_row(rows: list[Tensor], grads: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Places that were looked up, a piece after another, and the gradients there -> each row once, and its sum."""
    pieces = [grad.reshape(-1, width) for grad in grads]
    sorted_N, order_N = torch.sort(torch.cat(rows), stable=True)
    rows_U, _, count_U = torch.ops.aten.unique_consecutive(sorted_N, False, True)
    start_U = torch.cumsum(count_U, 0) - count_U
    return rows_U, torch.embedding_bag(torch.cat(pieces), order_N, start_U)[0]  # five times faster than index_add_


def _ready(weight_RE: Tensor, rows_U: Tensor, grad_UE: Tensor, scale: float, l2: float) -> Tensor:
    """Scale and regularise the gradient in place; which rows move."""
    grad_UE.mul_(scale)
    moved_U = _squares(grad_UE) > 0
    if l2 != 0.0:
        row_UE = weight_RE.index_select(0, rows_U)
        grad_UE.addcmul_(row_UE, moved_U[:, None].to(row_UE.dtype), value=l2)
    return moved_U


def _adagrad(
    weight_RE: Tensor,
    square_R: Tensor,
    rows_U: Tensor,
    grad_UE: Tensor,
    moved_U: Tensor,
    rates: tuple[float, float, float],
) -> None:
    """``rates``: of learning, of decay, and what keeps the root from zero."""
    before_U = square_R.index_select(0, rows_U)
    after_U = before_U * rates[1] + _squares(grad_UE) / grad_UE.shape[1]
    square_R.index_copy_(0, rows_U, torch.where(moved_U, after_U, before_U))
    grad_UE.mul_(((after_U + rates[2]).rsqrt() * -rates[0])[:, None])
    weight_RE.index_add_(0, rows_U, grad_UE)  # its alpha would loop over rows


def _lazy_adam(
    weight_RE: Tensor,
    moments: tuple[Tensor, Tensor, Tensor],
    rows_U: Tensor,
    grad_UE: Tensor,
    moved_U: Tensor,
    rates: tuple[float, float, float, float],
) -> None:
    """``moments``: touches, mean, square. ``rates``: of learning, the two betas, and what keeps the root from zero."""
    rate, beta_1, beta_2, eps_square = rates
    touches_U = moments[0].index_select(0, rows_U) + moved_U
    mean_UE, square_UE = moments[1].index_select(0, rows_U), moments[2].index_select(0, rows_U)
    moved_U1 = moved_U[:, None]
    mean_UE = torch.where(moved_U1, mean_UE.lerp(grad_UE, 1 - beta_1), mean_UE)
    square_UE = torch.where(moved_U1, square_UE.lerp(grad_UE.square(), 1 - beta_2), square_UE)
    moments[0].index_copy_(0, rows_U, touches_U)
    moments[1].index_copy_(0, rows_U, mean_UE)
    moments[2].index_copy_(0, rows_U, square_UE)
    age_U1 = touches_U.clamp(min=1)[:, None]
    bias_1_U1 = -torch.expm1(age_U1 * math.log(beta_1))  # 1 - beta**age
    bias_2_U1 = -torch.expm1(age_U1 * math.log(beta_2))
    rate_U1 = moved_U1 * -rate / bias_1_U1
    weight_RE.index_add_(0, rows_U, mean_UE * rate_U1 * (square_UE / bias_2_U1 + eps_square).rsqrt())


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
