"""The rows' part by `torch.compile`: one call a bucket that holds no interpreter lock while it computes.

Arithmetic is as fast as operation by operation (rows.py); what is won is the lock. A batch of 10,000 rows takes some
hundred operations, each of which waits for the lock again when the caller's thread is busy with JSON and Kafka.
Weights are arguments, not constants: the next version of a model runs at once, without compiling again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmm.batch import Float32, Int64
from esmm.predictor.fold import Activation, Folded
from esmm.predictor.rows import chunk_rows

GRAPHS = 128  # compiled shapes kept in one process: buckets x precisions x models of different towers
WASTE = 0.25  # a batch is padded up to a bucket when no more than this share of it is padding


class CompiledRows:
    """As `EagerRows`, for row counts padded to buckets; ``padded`` counts the rows of padding so far."""

    def __init__(self, folded: Folded, table: Tensor, dtype: torch.dtype, buckets: tuple[int, ...]) -> None:
        """``buckets``: ascending row counts; the first call of each compiles it, or finds it compiled."""
        self._bags_RH = table.view(-1, folded.width // 2)
        self._chunk = chunk_rows(folded.width * dtype.itemsize)
        self._buckets = buckets
        self._dtype = dtype
        self._context_2DH = folded.context_2DH.to(dtype)
        self._layers = [
            (layer.weight_2LK.to(dtype).transpose(1, 2).contiguous(), layer.bias_2L.to(dtype))
            for layer in folded.layers
        ]
        activations = [folded.activation, *(layer.activation for layer in folded.layers)]
        self._kinds = tuple(activation.kind for activation in activations)
        self._slopes_N2 = _slopes(activations, dtype)
        self._final_2K = folded.final_2K
        self._final_bias = folded.final_bias
        self.padded = 0

    def logits(self, parts_BS: Int64, context_BD: Tensor) -> Float32:
        """Table rows to add for every batch row, and the context's x -> logits_B2, float32."""
        rows, at = len(parts_BS), 0
        out_B2 = np.empty((rows, 2), np.float32)
        context_BD = context_BD.to(self._dtype)
        for bucket in plan(rows, self._buckets):
            part = slice(at, min(at + bucket, rows))
            out_B2[part] = self._run(bucket, parts_BS[part], context_BD[part])
            at += bucket
        self.padded += max(at - rows, 0)
        return out_B2 + np.float32(self._final_bias)

    def _run(self, bucket: int, parts_BS: Int64, context_BD: Tensor) -> Float32:
        """One bucket, in equal chunks; padding repeats the first row."""
        rows, size = parts_BS.shape
        chunks = -(-bucket // self._chunk)
        chunk = -(-bucket // chunks)
        padded_BS = np.concatenate([parts_BS, np.repeat(parts_BS[:1], chunks * chunk - rows, 0)])
        bags = padded_BS.reshape(chunks, 1, chunk, size) * 2
        bags_KM = torch.from_numpy(np.concatenate([bags, bags + 1], 1).reshape(chunks, -1))
        context_BD = torch.cat([context_BD, context_BD.new_zeros(chunks * chunk - rows, context_BD.shape[1])])
        _allow_shapes()
        out_K2C: Tensor = compiled_graph()(
            self._bags_RH,
            bags_KM,
            torch.arange(0, 2 * chunk * size, size),
            context_BD,
            self._context_2DH,
            self._layers,
            self._slopes_N2,
            self._final_2K,
            self._kinds,
        )
        logits_B2: Float32 = out_K2C.transpose(1, 2).reshape(-1, 2)[:rows].numpy()
        return logits_B2


def plan(rows: int, buckets: tuple[int, ...]) -> list[int]:
    """Buckets that cover ``rows`` one after another: few of them, with little padding in the last."""
    out: list[int] = []
    while rows > 0:
        fitting = next((bucket for bucket in buckets if bucket >= rows), None)
        below = max((bucket for bucket in buckets if bucket <= rows), default=None)
        if fitting is not None and (below is None or fitting - rows <= WASTE * fitting):
            return [*out, fitting]
        out.append(below or buckets[-1])
        rows -= out[-1]
    return out


def has_compiler() -> bool:
    """Whether a C++ compiler is where torch looks for one."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)


@cache
def compiled_graph() -> Callable[..., Tensor]:
    """The graph below, compiled on first use a shape; as C++, which lets go of the interpreter lock."""
    graph: Callable[..., Tensor] = torch.compile(_graph, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
    return graph


def _allow_shapes() -> None:
    """One graph a shape is wanted, not a mistake. The limit belongs to a thread, and each predictor has its own."""
    import torch._dynamo  # here: seconds of import that only this path pays

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)  # noqa: SLF001


def _graph(
    bags_RH: Tensor,
    bags_KM: Tensor,
    offsets: Tensor,
    context_BD: Tensor,
    context_2DH: Tensor,
    layers: list[tuple[Tensor, Tensor]],
    slopes_N2: Tensor,
    final_2K: Tensor,
    kinds: tuple[str, ...],
) -> Tensor:
    """K chunks of C rows, unrolled -> out_K2C without the final bias."""
    chunks, rows = bags_KM.shape[0], context_BD.shape[0] // bags_KM.shape[0]
    out = []
    for k in range(chunks):
        h: Any = torch.embedding_bag(bags_RH, bags_KM[k], offsets)[0].view(2, rows, -1)
        if context_BD.shape[1]:
            context_CD = context_BD[k * rows : (k + 1) * rows]
            h = torch.stack([torch.addmm(h[t], context_CD, context_2DH[t]) for t in (0, 1)])
        h = [_activate(h[t], kinds[0], slopes_N2[0, t]) for t in (0, 1)]
        for n, (weight_2KL, bias_2L) in enumerate(layers, 1):
            sums = [torch.addmm(bias_2L[t], h[t], weight_2KL[t]) for t in (0, 1)]
            h = [_activate(sums[t], kinds[n], slopes_N2[n, t]) for t in (0, 1)]
        out += [torch.mv(h[t].float(), final_2K[t]) for t in (0, 1)]
    return torch.cat(out).view(chunks, 2, rows)


def _activate(h_CH: Tensor, kind: str, slope: Tensor) -> Tensor:
    if kind == "relu":
        return torch.relu(h_CH)
    if kind == "sigmoid":
        return torch.sigmoid(h_CH)
    return torch.where(h_CH > 0, h_CH, slope * h_CH) if kind == "prelu" else h_CH


def _slopes(activations: list[Activation], dtype: torch.dtype) -> Tensor:
    return torch.tensor([activation.slopes for activation in activations]).to(dtype)
