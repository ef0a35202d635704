"""Forward and backward of both towers by hand, for training: a user's part once, chunks that fit a core's cache.

Exact up to the order of float32 sums: `esmm.model.ESMM.towers` under autograd is the oracle, and the tests hold the
gradient to float64. The first layer is linear, so a source whose rows repeat in a batch (ten impressions of one page
share a user) is multiplied once a distinct row; on the way back its rows' gradients are summed before the products.
With ``precision`` bfloat16 operands are rounded to it and products are summed in float32 within a chunk; weights,
optimiser and output layer stay float32.

Shape suffixes: B rows, U distinct rows of one source, D its input columns, E those that are embeddings, H hidden, C a
chunk of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esmm.batch import FeatureBlock, Int64
from esmm.features import SOURCES, DenseFeat
from esmm.model import ESMM

Precision = Literal["float32", "bfloat16"]
CHUNK_ROWS = 512
REPEATED = 0.6  # a source with fewer distinct rows than this share of the batch is worth telling apart


class Part(NamedTuple):
    """One source's input: its distinct rows, and which of them each of the B rows is (None: row by row)."""

    x_UD: Tensor
    row_of_B: Tensor | None

    def rows(self, index_K: Tensor) -> Tensor:
        """The input at some of the B rows."""
        return self.x_UD.detach().index_select(0, index_K if self.row_of_B is None else self.row_of_B[index_K])


def distinct(block: FeatureBlock) -> tuple[FeatureBlock, Tensor | None]:
    """The distinct rows of a block and each row's place among them; the block itself when few rows repeat.

    Rows are told apart by a 64-bit hash and then compared in full: a collision only costs the shortcut.
    """
    if block.rows < 2:
        return block, None
    words_BW = _words(block)
    key_B = words_BW @ _multipliers(words_BW.shape[1])
    _, first_U, row_of_B = np.unique(key_B, return_index=True, return_inverse=True)
    if len(first_U) > REPEATED * block.rows or not np.array_equal(words_BW[first_U][row_of_B], words_BW):
        return block, None
    return block.take(first_U), torch.from_numpy(row_of_B)


def _words(block: FeatureBlock) -> Int64:
    bits: NDArray[np.int32] = np.ascontiguousarray(block.dense_ND, np.float32).view(np.int32)
    return np.concatenate([block.ids_NS, bits], axis=1, dtype=np.int64)


def _multipliers(words: int) -> Int64:
    return np.random.default_rng(words).integers(1, 2**62, words) | 1


@dataclass
class _Layers:
    """One tower's parameters, and its activations between forward and backward (no state outlives a step)."""

    linears: list[nn.Linear]
    final: nn.Linear
    hidden: list[Tensor] = field(default_factory=list)  # (B, H) of each layer, after the ReLU


class HandTowers:
    """`ESMM.towers` over parts by source. `forward` keeps what `backward` needs; call them in turns."""

    def __init__(self, model: ESMM, precision: Precision = "float32") -> None:
        """Use the model's own parameters; each must have its ``grad`` already, to be added to."""
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._bias = model.out.bias
        pairs = ((model.ctr_dnn, model.ctr_dnn_final_layer), (model.cvr_dnn, model.cvr_dnn_final_layer))
        self._towers = [_Layers([one for one in tower.linears if isinstance(one, nn.Linear)], f) for tower, f in pairs]
        self._columns = [torch.from_numpy(model.input_columns(source)) for source in SOURCES]
        columns = model.schema.columns
        of = [[c for c in columns if c.source == source and not isinstance(c, DenseFeat)] for source in SOURCES]
        self._embedded = [sum(c.dim for c in some) for some in of]
        self._x: list[Tensor] = []

    @staticmethod
    def fit(model: ESMM) -> bool:
        """Whether this model's towers can be done by hand: ReLU, no dropout, no batch norm."""
        hyper = model.hyper
        return hyper["dnn_activation"] == "relu" and not hyper["dnn_use_bn"] and hyper["dnn_dropout"] == 0

    @torch.no_grad()
    def forward(self, parts: Sequence[Part], rows: int) -> Tensor:
        """Parts in the order of `SOURCES` -> logits_B2, outside the graph."""
        self._parts = parts
        self._x = [part.x_UD.detach().to(self._dtype) for part in parts]
        logits_B2 = torch.empty(rows, 2)
        for at, tower in enumerate(self._towers):
            tower.hidden = [torch.empty(rows, one.out_features, dtype=self._dtype) for one in tower.linears]
            shared, own = self._first(tower.linears[0])
            for chunk in _chunks(rows):
                self._up(tower, chunk, shared, own)
                torch.mv(tower.hidden[-1][chunk].float(), tower.final.weight[0], out=logits_B2[chunk, at])
        return logits_B2.add_(self._bias)

    def _first(self, linear: nn.Linear) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """The first layer: (products of distinct rows, row_of_B) of some sources, (x_BD, weight_DH) of the others."""
        shared, own = [], []
        for x_UD, part, columns in zip(self._x, self._parts, self._columns, strict=True):
            if not len(columns):
                continue
            weight_DH = linear.weight.index_select(1, columns).to(self._dtype).T
            if part.row_of_B is None:
                own.append((x_UD, weight_DH))
            else:
                shared.append((x_UD @ weight_DH, part.row_of_B))
        return shared, own

    def _up(
        self,
        tower: _Layers,
        chunk: slice,
        shared: list[tuple[Tensor, Tensor]],
        own: list[tuple[Tensor, Tensor]],
    ) -> None:
        """All layers of one chunk of rows."""
        h_CH = tower.hidden[0][chunk]
        h_CH[:] = tower.linears[0].bias
        for product_UH, row_of_B in shared:
            h_CH.add_(product_UH.index_select(0, row_of_B[chunk]))
        for x_BD, weight_DH in own:
            h_CH.addmm_(x_BD[chunk], weight_DH)
        h_CH.relu_()
        for linear, out_BH in zip(tower.linears[1:], tower.hidden[1:], strict=True):
            bias_H, weight_HH = linear.bias.to(self._dtype), linear.weight.to(self._dtype)
            h_CH = torch.addmm(bias_H, h_CH, weight_HH.T, out=out_BH[chunk]).relu_()

    @torch.no_grad()
    def backward(self, grad_B2: Tensor) -> list[Tensor | None]:
        """Gradient of the logits -> that of each part's embedded columns (U, E); the parameters' is added in place."""
        self._grad_of(self._bias).add_(grad_B2.sum())
        grads = [
            torch.zeros(len(x_UD), embedded) if embedded else None
            for x_UD, embedded in zip(self._x, self._embedded, strict=True)
        ]
        for at, tower in enumerate(self._towers):
            first_BH = torch.empty_like(tower.hidden[0])
            for chunk in _chunks(len(grad_B2)):
                self._down(tower, chunk, grad_B2[chunk, at].contiguous(), first_BH[chunk])
            self._into_inputs(tower.linears[0], first_BH, grads)
            tower.hidden = []
        return grads

    def _down(self, tower: _Layers, chunk: slice, grad_C: Tensor, first_CH: Tensor) -> None:
        """One chunk from its logits down to the first layer's sums, whose gradient goes to ``first_CH``."""
        ones_C = torch.ones(len(grad_C), dtype=self._dtype)
        h_CH = tower.hidden[-1][chunk]
        self._grad_of(tower.final.weight)[0].addmv_(h_CH.float().T, grad_C)
        d_CH = torch.outer(grad_C, tower.final.weight[0]).to(self._dtype)
        for at in range(len(tower.linears) - 1, -1, -1):
            linear, h_CH = tower.linears[at], tower.hidden[at][chunk]
            d_CH = torch.ops.aten.threshold_backward(d_CH, h_CH, 0)
            self._grad_of(linear.bias).add_(torch.mv(d_CH.T, ones_C))
            if at == 0:
                first_CH.copy_(d_CH)
                return
            self._add_product(self._grad_of(linear.weight), d_CH, tower.hidden[at - 1][chunk])
            d_CH = d_CH @ linear.weight.to(self._dtype)

    def _into_inputs(self, linear: nn.Linear, d_BH: Tensor, grads: list[Tensor | None]) -> None:
        """The first layer: its weights' gradient, and that of what came in."""
        for x_UD, part, columns, grad_UE in zip(self._x, self._parts, self._columns, grads, strict=True):
            if not len(columns):
                continue
            d_UH = d_BH
            if part.row_of_B is not None:
                sum_UH = torch.zeros(len(x_UD), d_BH.shape[1])
                d_UH = sum_UH.index_add_(0, part.row_of_B, d_BH.float()).to(self._dtype)
            weight_HD = linear.weight.index_select(1, columns).to(self._dtype)
            grad_HD = torch.zeros(weight_HD.shape)
            for chunk in _chunks(len(x_UD)):
                self._add_product(grad_HD, d_UH[chunk], x_UD[chunk])
                if grad_UE is not None:
                    grad_UE[chunk].add_(d_UH[chunk] @ weight_HD[:, : grad_UE.shape[1]])
            self._grad_of(linear.weight).index_add_(1, columns, grad_HD)

    def _add_product(self, grad_HD: Tensor, d_CH: Tensor, x_CD: Tensor) -> None:
        if self._dtype == torch.float32:
            grad_HD.addmm_(d_CH.T, x_CD)
        else:
            grad_HD.add_(d_CH.T @ x_CD)

    @staticmethod
    def _grad_of(parameter: Tensor) -> Tensor:
        if parameter.grad is None:
            raise ValueError("a parameter has no gradient to add to")
        return parameter.grad


def _chunks(rows: int) -> list[slice]:
    return [slice(at, min(at + CHUNK_ROWS, rows)) for at in range(0, rows, CHUNK_ROWS)]
