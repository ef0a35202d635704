"""The rows' part as one TorchScript call a batch: it holds no interpreter lock, and needs no compiler.

Operation by operation (rows.py) a batch of 10,000 rows asks for the interpreter lock some hundred times, and waits
each time that the caller's thread is busy with JSON and Kafka. Here it asks once. Same chunks, same results within
rounding.
TorchScript is deprecated, but nothing else in torch runs a graph without Python and without a compiler: where it is
gone, `script_rows` says None and the batch runs operation by operation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from esmm.batch import Float32, Int64
from esmm.predictor.fold import Folded
from esmm.predictor.rows import chunk_rows, pack

RowsGraph = Callable[..., Tensor]


class ScriptedRows:
    """As `EagerRows`; ``table`` is written by others and read here."""

    def __init__(self, graph: RowsGraph, folded: Folded, table: Tensor, dtype: torch.dtype) -> None:
        """``graph``: what `script_rows` gave."""
        self._graph = graph
        self._table = table.view(-1, folded.width // 2)
        self._dtype = dtype
        self._chunk = chunk_rows(folded.width * dtype.itemsize)
        context_DT = folded.first["context"]
        context_D2H = context_DT.view(len(context_DT), 2, folded.width // 2)
        self._context_2DH = context_D2H.transpose(0, 1).contiguous().to(dtype)
        packed = [pack(layer, dtype, self._chunk) for layer in folded.layers]
        self._fused = all(one is not None for one in packed)
        self._weights: list[Tensor] = []  # of later layers: CTR, CVR, CTR, CVR, ...
        self._biases: list[Tensor] = []
        for layer, ready in zip(folded.layers, packed, strict=True):
            plain = [weight.to(dtype).T.contiguous() for weight in layer.weight_2LK]
            self._weights += ready if ready is not None and self._fused else plain
            self._biases += [bias.to(dtype) for bias in layer.bias_2L]
        activations = [folded.activation, *(layer.activation for layer in folded.layers)]
        self._kinds = [activation.kind for activation in activations]
        self._slopes = [slope for activation in activations for slope in activation.slopes]
        self._final_2K = folded.final_2K
        self._final_bias = folded.final_bias

    def logits(self, parts_BS: Int64, context_BD: Tensor) -> Float32:
        """Table rows to add for every batch row, and the context's x -> logits_B2, float32."""
        logits_B2: Float32 = self._graph(
            self._table,
            torch.from_numpy(parts_BS),
            context_BD.to(self._dtype),
            self._context_2DH,
            self._weights,
            self._biases,
            self._kinds,
            self._slopes,
            self._final_2K,
            self._final_bias,
            self._chunk,
            self._fused,
        ).numpy()
        return logits_B2


@cache
def script_rows() -> RowsGraph | None:
    """The graph, compiled once a process; None where this torch cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            graph: RowsGraph = torch.jit.script(_graph)
        except Exception:  # noqa: BLE001  a front end that has gone fails in any way
            return None
    return graph


def _graph(
    table_RH: Tensor,
    parts_BS: Tensor,
    context_BD: Tensor,
    context_2DH: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    kinds: list[str],
    slopes: list[float],
    final_2K: Tensor,
    final_bias: float,
    chunk: int,
    fused: bool,
) -> Tensor:
    """B rows in chunks -> logits_B2. A table row is two rows of ``table_RH``: CTR's part, CVR's part."""
    rows, size = parts_BS.shape[0], parts_BS.shape[1]
    out_2B = torch.empty((2, rows))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        count = stop - start
        bags = parts_BS[start:stop].reshape(-1) * 2
        offsets = torch.arange(0, 2 * count * size, size)
        first = torch.embedding_bag(table_RH, torch.cat([bags, bags + 1]), offsets)[0]
        h_2CH = first.view(2, count, table_RH.shape[1])
        if context_BD.shape[1] > 0:
            context_CD = context_BD[start:stop]
            h_2CH.baddbmm_(context_CD.expand(2, count, context_CD.shape[1]), context_2DH)
        for tower in range(2):
            h = h_2CH[tower]
            for layer in range(len(kinds)):
                kind = kinds[layer]
                if layer > 0:
                    weight, bias = weights[2 * layer - 2 + tower], biases[2 * layer - 2 + tower]
                    if fused and kind == "relu":
                        h = torch.ops.mkldnn._linear_pointwise(h, weight, bias, "relu", [], "")  # noqa: SLF001
                        kind = "linear"
                    elif fused:
                        h = torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")  # noqa: SLF001
                    else:
                        h = torch.addmm(bias, h, weight)
                if kind == "relu":
                    h = h.relu_()
                elif kind == "sigmoid":
                    h = h.sigmoid_()
                elif kind == "prelu":
                    h = torch.nn.functional.leaky_relu(h, slopes[2 * layer + tower], True)
            torch.mv(h.float(), final_2K[tower], out=out_2B[tower, start:stop])
    out_2B += final_bias
    return out_2B.t().contiguous()
