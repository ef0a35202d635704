"""What is left to do for every row: add its parts, activate, and go through the rest of both towers.

Done in chunks that stay in the processor's second-level cache: a whole batch of 10,000 rows would stream its hidden
layer through memory after every operation. Shapes as in fold.py; B rows, C rows of a chunk, S parts a row (user, item).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esmm.batch import Float32, Int64
from esmm.predictor.fold import Activation, Folded, Layer

CHUNK_BYTES = 2 << 20  # of first hidden layer: 1,024 rows of two towers of 256 in float32, 2,048 in bfloat16, measured


def chunk_rows(bytes_a_row: int) -> int:
    """Rows of a chunk."""
    return min(max(CHUNK_BYTES // bytes_a_row, 128), 4096)


class EagerRows:
    """The rows' part on a CPU, operation by operation; ``table`` is written by others and read here."""

    def __init__(self, folded: Folded, table: Tensor, dtype: torch.dtype) -> None:
        """``dtype`` of the table, the activations and all layers but the last, which is float32."""
        self._bags_RH = table.view(-1, folded.width // 2)  # a table row is two bags: CTR's part, CVR's part
        self._dtype = dtype
        self._chunk = chunk_rows(folded.width * dtype.itemsize)
        self._activation = folded.activation
        self._context_2DH = folded.context_2DH.to(dtype)
        self._layers = [TwoLinears(layer, dtype, self._chunk) for layer in folded.layers]
        self._final_2K = folded.final_2K
        self._final_bias = folded.final_bias
        self._offsets: dict[tuple[int, int], Tensor] = {}

    def logits(self, parts_BS: Int64, context_BD: Tensor) -> Float32:
        """Table rows to add for every batch row, and the context's x -> logits_B2, float32."""
        rows = len(parts_BS)
        bags_2BS = np.stack([2 * parts_BS, 2 * parts_BS + 1])
        context_BD = context_BD.to(self._dtype)
        out_2B = torch.empty((2, rows))
        for start in range(0, rows, self._chunk):
            chunk = slice(start, min(start + self._chunk, rows))
            h_2CH = self._first(torch.from_numpy(bags_2BS[:, chunk].reshape(-1)), parts_BS.shape[1], context_BD[chunk])
            h: Any = activate(h_2CH, self._activation)
            for layer in self._layers:
                h = layer(h)
            for tower in (0, 1):
                torch.mv(h[tower].float(), self._final_2K[tower], out=out_2B[tower, chunk])
        out_2B += self._final_bias
        return out_2B.T.contiguous().numpy()

    def _first(self, bags: Tensor, size: int, context_CD: Tensor) -> Tensor:
        """The first layer's sums: one gather-and-add kernel for every part of a row."""
        key = (len(bags), size)
        if key not in self._offsets:
            if len(self._offsets) > 64:  # tails come in any length
                self._offsets.clear()
            self._offsets[key] = torch.arange(0, len(bags), size)
        h_2CH: Tensor = torch.embedding_bag(self._bags_RH, bags, self._offsets[key])[0].view(2, len(context_CD), -1)
        if context_CD.shape[1]:
            h_2CH.baddbmm_(context_CD.expand(2, *context_CD.shape), self._context_2DH)
        return h_2CH


class TwoLinears:
    """One later layer of both towers with its activation; oneDNN's packed, fused form where torch has it."""

    def __init__(self, layer: Layer, dtype: torch.dtype, rows: int) -> None:
        """Pack the weights once, for chunks of ``rows`` rows."""
        self._activation = layer.activation
        self._bias = [bias.to(dtype) for bias in layer.bias_2L]
        self._weight_KL = [weight.to(dtype).T.contiguous() for weight in layer.weight_2LK]
        self._packed = pack(layer, dtype, rows)

    def __call__(self, h: Any) -> list[Tensor]:
        """h[0], h[1] (C, K), contiguous -> two (C, L), activated."""
        if self._packed is not None:
            return [self._fused(h[tower], self._packed[tower], tower) for tower in (0, 1)]
        sums = [torch.addmm(self._bias[tower], h[tower], self._weight_KL[tower]) for tower in (0, 1)]
        return [activate_one(sums[tower], self._activation, tower) for tower in (0, 1)]

    def _fused(self, h_CK: Tensor, packed: Tensor, tower: int) -> Tensor:
        """The operation that torch.compile itself emits for a linear layer with frozen weights."""
        kind = self._activation.kind
        scalars = [self._activation.slopes[tower]] if kind == "prelu" else []
        fused = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
        out: Tensor = fused(h_CK, packed, self._bias[tower], _FUSED[kind], scalars, "")
        return out


_FUSED = {"relu": "relu", "sigmoid": "sigmoid", "linear": "none", "prelu": "leaky_relu"}


def pack(layer: Layer, dtype: torch.dtype, rows: int) -> list[Tensor] | None:
    """Weights in oneDNN's blocked layout, or None where this torch or processor cannot use it: asked by trying."""
    try:
        ops = torch.ops.mkldnn
        packed = [ops._reorder_linear_weight(weight.to(dtype).contiguous(), rows) for weight in layer.weight_2LK]  # noqa: SLF001
        one_1K, bias = layer.weight_2LK.new_zeros((1, layer.weight_2LK.shape[2]), dtype=dtype), layer.bias_2L[0]
        ops._linear_pointwise(one_1K, packed[0], bias.to(dtype), "none", [], "")  # noqa: SLF001
    except (RuntimeError, AttributeError):
        return None
    return packed


def activate(h_2CH: Tensor, activation: Activation) -> Tensor:
    """Both towers at once, in place."""
    if activation.kind == "prelu":
        for tower in (0, 1):
            activate_one(h_2CH[tower], activation, tower)
        return h_2CH
    return activate_one(h_2CH, activation, 0)


def activate_one(h: Tensor, activation: Activation, tower: int) -> Tensor:
    """One tower's activation, in place."""
    if activation.kind == "relu":
        if h.dtype == torch.bfloat16:  # as int16: negative bits are negative numbers, at four times the speed
            h.view(torch.int16).clamp_(min=0)
            return h
        return h.relu_()
    if activation.kind == "sigmoid":
        return h.sigmoid_()
    if activation.kind == "prelu":
        return F.leaky_relu_(h, activation.slopes[tower])
    return h
