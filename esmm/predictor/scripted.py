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
from typing import NamedTuple

import torch
from torch import Tensor

from esmm.batch import Bool, Float32, Int64
from esmm.predictor.fold import Folded
from esmm.predictor.rows import chunk_rows, pack

RowsGraph = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Inputs(NamedTuple):
    """What a batch brings, float32: x of its users, of the items whose parts are missing, and of its rows' context."""

    user_UD: Tensor
    item_MD: Tensor
    rows_M: Int64  # table rows of the missing parts
    context_BD: Tensor


class Result(NamedTuple):
    """logits_B2, float32, and which of the parts written were not finite."""

    logits_B2: Float32
    bad_U: Bool
    bad_M: Bool


class ScriptedRows:
    """Writes the parts a batch brings into ``table``, and computes its rows."""

    def __init__(self, graph: RowsGraph, folded: Folded, table: Tensor, dtype: torch.dtype, first_user: int) -> None:
        """``graph``: what `script_rows` gave. ``first_user``: the table row of a batch's user 0."""
        self._graph = graph
        self._table_RT = table
        self._dtype = dtype
        self._first_user = first_user
        self._first = folded.first
        self._bias_T = folded.bias_T
        self._chunk = chunk_rows(folded.width * dtype.itemsize)
        self._context_2DH = folded.context_2DH.to(dtype)
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
        rows = 2 * self._chunk if dtype == torch.bfloat16 and self._kinds[0] == "relu" else 0
        self._hidden = torch.empty((rows, folded.width // 2), dtype=dtype)
        self._bits = self._hidden.view(torch.int16) if rows else torch.empty(0, dtype=torch.int16)
        self._final_2K = folded.final_2K
        self._final_bias = folded.final_bias

    def logits(self, parts_BS: Int64, inputs: Inputs) -> Result:
        """Table rows to add for every batch row -> its logits; first the parts that the batch brings are written."""
        logits_B2, bad_U, bad_M = self._graph(
            self._table_RT,
            (inputs.user_UD, self._first["user"], self._bias_T, self._first_user),
            (inputs.item_MD, self._first["item"], torch.from_numpy(inputs.rows_M)),
            torch.from_numpy(parts_BS),
            inputs.context_BD.to(self._dtype),
            self._context_2DH,
            self._weights,
            self._biases,
            self._kinds,
            self._slopes,
            self._final_2K,
            self._final_bias,
            self._chunk,
            self._fused,
            self._hidden,
            self._bits,
        )
        return Result(logits_B2.numpy(), bad_U.numpy(), bad_M.numpy())


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
    table_RT: Tensor,
    user: tuple[Tensor, Tensor, Tensor, int],
    item: tuple[Tensor, Tensor, Tensor],
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
    hidden: Tensor,
    bits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of the batch's users and of the items that have none -> table; B rows in chunks -> logits_B2.

    A table row is two rows of ``table_RH``: CTR's part, CVR's part. ``bits`` are those of ``hidden``, or empty: with
    them a ReLU of bfloat16 numbers is one of integers (negative bits are negative numbers), in less than half the time.
    """
    bad_U, bad_M = _write_parts(table_RT, user, item)
    table_RH = table_RT.view(-1, table_RT.shape[1] // 2)
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
        if bits.shape[0] > 0:
            hidden[: 2 * count].copy_(first)
            bits[: 2 * count].clamp_(min=0)
            h_2CH = hidden[: 2 * count].view(2, count, table_RH.shape[1])
        for tower in range(2):
            h = h_2CH[tower]
            if bits.shape[0] == 0:
                h = _activate(h, kinds[0], slopes[tower])
            for layer in range(1, len(kinds)):
                at = 2 * layer + tower
                h = _linear(h, weights[at - 2], biases[at - 2], kinds[layer], slopes[at], fused)
            torch.mv(h.float(), final_2K[tower], out=out_2B[tower, start:stop])
    out_2B += final_bias
    return out_2B.t().contiguous(), bad_U, bad_M


def _write_parts(
    table_RT: Tensor, user: tuple[Tensor, Tensor, Tensor, int], item: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The parts a batch brings -> table; which of them are not finite."""
    user_UD, user_DT, bias_T, first_user = user
    item_MD, item_DT, rows_M = item
    part_UT = torch.mm(user_UD, user_DT) + bias_T
    table_RT[first_user : first_user + part_UT.shape[0]].copy_(part_UT)
    bad_M = torch.zeros(0, dtype=torch.bool)
    if rows_M.shape[0] > 0:
        part_MT = torch.mm(item_MD, item_DT)
        table_RT.index_copy_(0, rows_M, part_MT.to(table_RT.dtype))
        bad_M = torch.isfinite(part_MT.sum(1)).logical_not()
    return torch.isfinite(part_UT.sum(1)).logical_not(), bad_M


def _linear(h: Tensor, weight: Tensor, bias: Tensor, kind: str, slope: float, fused: bool) -> Tensor:
    """One later layer of one tower, activated; oneDNN's packed form where torch has it."""
    if fused and kind == "relu":
        out: Tensor = torch.ops.mkldnn._linear_pointwise(h, weight, bias, "relu", [], "")  # noqa: SLF001
        return out
    if fused:
        return _activate(torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], ""), kind, slope)  # noqa: SLF001
    return _activate(torch.addmm(bias, h, weight), kind, slope)


def _activate(h: Tensor, kind: str, slope: float) -> Tensor:
    """In place."""
    if kind == "relu":
        return h.relu_()
    if kind == "sigmoid":
        return h.sigmoid_()
    if kind == "prelu":
        return torch.nn.functional.leaky_relu(h, slope, True)
    return h
