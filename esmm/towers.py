"""The learner's step from inputs to gradients by hand, as one graph: see `esmm.graphs` for why, `esmm.chunks` for how.

`esmm.model.ESMM.towers`, `esmm.loss` and `esmm.heads` under autograd are the oracle: exact up to the order of float32
sums, and the tests hold the gradient to float64.

A chunk of rows goes up both towers, through the loss and down again while it is in a core's cache; gradients are summed
and divided by the batch's count of rows at the end. The first layer is linear, so a source whose rows repeat in a batch
(ten impressions of one page share a user) is multiplied once a distinct row; on the way back its rows' gradients are
summed before the products. With ``precision`` bfloat16 operands are rounded to it and products are summed in float32
within a chunk; weights, optimiser and output layer stay float32.

Matured rows teach the towers nothing, under most methods: they go up only.

Shape suffixes: B rows, U distinct rows of one source, D its input columns, E those that are embeddings, C a chunk of
rows, T hidden of both towers, K rows that the heads are asked about, N as `Numbers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esmm import chunks
from esmm.batch import Examples, FeatureBlock, Int64, Kind
from esmm.delay import Beliefs, Method, WeightsOf, fake_negative, head_targets, sample_classes
from esmm.features import SOURCES, DenseFeat
from esmm.graphs import Graph, as_tensor, as_written, scripted, traced
from esmm.loss import entire_space_gradient
from esmm.model import ESMM

Precision = Literal["float32", "bfloat16"]
CHUNK_ROWS = 1024
REPEATED = 0.6  # a source with fewer distinct rows than this share of the batch is worth telling apart
_ROW_BY_ROW = torch.zeros(0, dtype=torch.int64)
_LABELS = (torch.uint8, torch.float32, torch.float32, torch.float32)  # kind, click, conversion, observed


class Part(NamedTuple):
    """One source's input: its distinct rows, and which of them each of the B rows is (empty: row by row)."""

    x_UD: Tensor
    row_of_B: Tensor


class StepRule(NamedTuple):
    """How to take a step."""

    fallback: bool  # weigh rows by `esmm.delay.fake_negative`
    shift: float  # of the CTR logit in the loss
    full: float  # matured rows from which on a batch weighs a whole step of the heads


class Numbers(NamedTuple):
    """Of one step: means in nats, norms of gradients, and sums."""

    loss: float  # a first emission
    norm: float  # of all parameters but embeddings and heads
    head_norm: float
    weighted: float  # how much there is to learn from
    first: float  # rows
    head_loss: float
    matured: float  # rows
    rn_rows: float  # matured rows that teach f_rn
    rn_predicted: float  # the sum of f_rn over them
    rn_labelled: float


class Passed(NamedTuple):
    """What a step found out; the parameters' gradients are set."""

    logits_B2: Tensor
    grads: list[Tensor]  # of each part's embedded columns (U, E)
    numbers_N: Tensor  # `Numbers`


def distinct(block: FeatureBlock) -> tuple[FeatureBlock, Tensor]:
    """The distinct rows of a block and each row's place among them; the block itself and nothing when few rows repeat.

    Rows are told apart by a 64-bit hash and then compared in full: a collision only costs the shortcut.
    """
    words = block.ids_NS.shape[1] + block.dense_ND.shape[1]
    if block.rows < 2 or words == 0:
        return block, _ROW_BY_ROW
    factors, most = torch.from_numpy(_multipliers(words)), int(REPEATED * block.rows)
    floats = block.dense_ND.shape[1]
    word = np.int64 if floats and floats % 2 == 0 else np.int32  # two floats a word halve the work
    bits_NW = np.ascontiguousarray(block.dense_ND, np.float32).view(word)
    with as_written():
        first_U, row_of_B = scripted(_distinct)(as_tensor(block.ids_NS), as_tensor(bits_NW), factors, most)
    return (block.take(first_U.numpy()), row_of_B) if len(row_of_B) else (block, _ROW_BY_ROW)


@cache
def _multipliers(words: int) -> Int64:
    return np.random.default_rng(words).integers(1, 2**62, words) | 1


def _distinct(ids_NS: Tensor, bits_NW: Tensor, factors: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where each distinct row can be found, and each row's number among them; none if there are more than ``most``."""
    words_NW = bits_NW.to(torch.int64)
    if ids_NS.shape[1] > 0:
        words_NW = torch.cat([ids_NS, words_NW], 1)
    key_N = torch.mv(words_NW, factors[: words_NW.shape[1]])
    key_U, row_of_N, _ = torch.ops.aten._unique2(key_N, True, True, False)  # noqa: SLF001
    first_U = torch.zeros(key_U.shape[0], dtype=torch.int64)
    if key_U.shape[0] > most:
        return first_U, row_of_N[:0]
    first_U.scatter_(0, row_of_N, torch.arange(row_of_N.shape[0]))
    same = torch.equal(words_NW.index_select(0, first_U.index_select(0, row_of_N)), words_NW)
    return first_U, row_of_N if same else row_of_N[:0]


class HandTowers:
    """Towers, heads and loss of one learner, forward and backward."""

    def __init__(self, model: ESMM, heads: Sequence[nn.Linear], method: Method, precision: Precision) -> None:
        """Use the parameters as they are; each must have its ``grad`` already.

        ``heads``: the layers of `esmm.heads.Heads`, all but the last one with a ReLU.
        """
        pairs = ((model.ctr_dnn, model.ctr_dnn_final_layer), (model.cvr_dnn, model.cvr_dnn_final_layer))
        linears = [[one for one in tower.linears if isinstance(one, nn.Linear)] for tower, _ in pairs]
        layers = [one for layer in zip(*linears, strict=True) for one in layer]  # CTR, CVR, CTR, CVR, ...
        weights = [one.weight for one in layers] + [final.weight for _, final in pairs]
        self._towers = (weights, [one.bias for one in layers], [model.out.bias])
        self._heads = ([one.weight for one in heads], [one.bias for one in heads])
        self._columns = [torch.from_numpy(model.input_columns(source)) for source in SOURCES]
        columns = model.schema.columns
        of = [[c for c in columns if c.source == source and not isinstance(c, DenseFeat)] for source in SOURCES]
        self._embedded = [sum(c.dim for c in some) for some in of]
        self._asked = 0 if not method.needs_heads else 2 if method.needs_dp else 1
        self._idle = -1 if method.learns_matured else int(Kind.MATURED)  # rows that teach no tower anything
        self._bf16 = precision == "bfloat16"
        self._step = _step_of(method.weights)

    @staticmethod
    def fit(model: ESMM) -> bool:
        """Whether this model's towers can be done by hand: ReLU, no dropout, no batch norm."""
        hyper = model.hyper
        return hyper["dnn_activation"] == "relu" and not hyper["dnn_use_bn"] and hyper["dnn_dropout"] == 0

    def step(self, parts: Sequence[Part], examples: Examples, rule: StepRule, flat: tuple[Tensor, Tensor]) -> Passed:
        """Parts in the order of `SOURCES` -> what a step found out.

        ``flat``: the vectors that the gradients of the model's dense parameters, and of the heads, are views of.
        """
        labels = (examples.kind_B, examples.click_B, examples.conversion_B, examples.observed_B)
        with as_written():
            out = self._step(
                [part.x_UD.detach() for part in parts],
                [part.row_of_B for part in parts],
                [as_tensor(label_B) for label_B in labels],
                self._columns,
                self._embedded,
                self._towers,
                tuple([_gradients(some) for some in self._towers]),
                self._heads,
                tuple([_gradients(some) for some in self._heads]),
                flat,
                (self._asked, self._idle, *rule),
                (self._bf16, CHUNK_ROWS),
            )
        return Passed(*out)

    def logits(self, parts: Sequence[Part], rows: int) -> Tensor:
        """Parts in the order of `SOURCES` -> logits_B2 of ``rows`` rows."""
        with as_written():
            xs, rows_of = [part.x_UD.detach() for part in parts], [part.row_of_B for part in parts]
            logits_B2: Tensor = scripted(_logits)(
                xs, rows_of, self._columns, self._towers, rows, self._bf16, CHUNK_ROWS
            )
        return logits_B2


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(grads) != len(parameters):
        raise ValueError("a parameter has no gradient to write to")
    return grads


def _logits(
    xs: list[Tensor],
    rows_of: list[Tensor],
    columns: list[Tensor],
    tower: tuple[list[Tensor], list[Tensor], list[Tensor]],
    rows: int,
    bf16: bool,
    chunk: int,
) -> Tensor:
    xs, first, later, biases = chunks.ready(xs, columns, tower, bf16)
    shared = chunks.products(xs, rows_of, first, biases[0])
    logits_B2 = torch.empty(rows, 2)
    chunks.ascend(xs, rows_of, first, shared, later, biases, tower, logits_B2, 0, chunk)
    return logits_B2


@cache
def _weigh(weights: WeightsOf) -> Graph:
    """Kind, click, conversion, observed, f, f_rn, f_dp -> first_B and the weights."""

    def weigh(*columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = sample_classes(*columns[:4])
        return (rows.first_B, *weights(rows, Beliefs(*columns[4:])))

    return traced(weigh, *_LABELS, torch.float32, torch.float32, torch.float32)


def _lessons(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Kind, click, conversion, observed -> lesson_4B of `chunks.heads`, and which rows f_rn weighs or learns from."""
    rows = sample_classes(*columns)
    of = head_targets(rows)
    return torch.stack([of.rn_label_B, of.dp_label_B, of.rn_mask_B, of.dp_mask_B]), rows.pending_B + rows.matured_B


@cache
def _step_of(weights: WeightsOf) -> Graph:
    """The graph of a method's step."""
    weigh, weigh_instead, lessons = _weigh(weights), _weigh(fake_negative), traced(_lessons, *_LABELS)

    def step(
        xs: list[Tensor],
        rows_of: list[Tensor],
        labels: list[Tensor],
        columns: list[Tensor],
        embedded: list[int],
        tower: tuple[list[Tensor], list[Tensor], list[Tensor]],
        grads: tuple[list[Tensor], list[Tensor], list[Tensor]],
        head: tuple[list[Tensor], list[Tensor]],
        head_grads: tuple[list[Tensor], list[Tensor]],
        flat: tuple[Tensor, Tensor],
        rule: tuple[int, int, bool, float, float],
        how: tuple[bool, int],
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        asked, idle, instead, shift, full = rule
        for grad_P in flat:
            grad_P.zero_()
        xs, rows_of, labels, order_B, live = chunks.idle_last(xs, rows_of, labels, idle)
        kind, click, conversion, observed = labels[0], labels[1].float(), labels[2].float(), labels[3].float()
        rows, chunk = kind.shape[0], how[1]
        belief_2B, head_sums = torch.full((2, rows), 0.5), torch.zeros(5)
        if asked > 0:
            lesson_4B, of_rn_B = lessons(kind, click, conversion, observed)
            index_K = torch.arange(rows) if asked == 2 else of_rn_B.nonzero()[:, 0]
            x_KD, lesson_4K = chunks.rows_at(xs, rows_of, index_K), lesson_4B.index_select(1, index_K)
            p_2K, head_sums = chunks.heads(x_KD, torch.cat(columns), lesson_4K, head, head_grads, full)
            belief_2B.index_copy_(1, index_K, p_2K)
        xs, first, later, biases = chunks.ready(xs, columns, tower, how[0])
        shared = chunks.products(xs, rows_of, first, biases[0])
        first_grads, sums, grads_x = chunks.zeros(xs, rows_of, first, embedded)
        logits_B2, facts_4 = torch.empty(rows, 2), torch.zeros(4)
        chunks.ascend(xs, rows_of, first, shared, later, biases, tower, logits_B2, live, chunk)
        for start in range(0, live, chunk):
            stop = min(start + chunk, live)
            hidden = chunks.up(xs, rows_of, first, shared, later, biases, start, stop)
            logits_C2 = logits_B2[start:stop]
            chunks.out(hidden, tower[0], tower[2][0], logits_C2)
            k, o, v, w = kind[start:stop], click[start:stop], conversion[start:stop], observed[start:stop]
            f, rn, dp = torch.sigmoid(logits_C2[:, 1]), belief_2B[0, start:stop], belief_2B[1, start:stop]
            if instead:
                first_C, positive_C, negative_C = weigh_instead(k, o, v, w, f, rn, dp)
            else:
                first_C, positive_C, negative_C = weigh(k, o, v, w, f, rn, dp)
            total, grad_2C = entire_space_gradient(logits_C2, o, first_C, positive_C, negative_C, shift)
            mass_C = positive_C + negative_C
            facts_4 += torch.stack([total, first_C.sum(), (mass_C > 0).sum(), mass_C.sum()])
            d_CT = chunks.down(hidden, grad_2C, later, tower[0], grads)
            chunks.into_inputs(xs, rows_of, d_CT, first, first_grads, sums, grads_x, grads[1], start)
        chunks.finish(xs, rows_of, columns, first, first_grads, sums, grads_x, grads, chunk)
        scale = chunks.averaged(flat[0], grads_x, facts_4[1], facts_4[2])
        own = [facts_4[0] * scale, flat[0].norm(), flat[1].norm(), facts_4[1] + facts_4[3], facts_4[1]]
        logits_B2, grads_x = chunks.put_back(logits_B2, grads_x, rows_of, order_B)
        return logits_B2, grads_x, torch.cat([torch.stack(own), head_sums])

    return scripted(step)
