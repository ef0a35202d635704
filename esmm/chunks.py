"""Both towers by hand, a chunk of rows at a time, and the heads: what `esmm.towers` makes one graph of.

CTR's and CVR's first layers lie side by side as one layer; later layers come as CTR, CVR, CTR, CVR, ... ``tower`` is
all weights (the two final ones last), the biases, and the output's bias; ``grads`` are theirs. ``xs`` are each source's
inputs (U, D), ``rows_of`` which of them each of the B rows is, empty where U is B. TorchScript runs these functions, so
they keep to what it knows.

Shape suffixes: B rows, U distinct rows of one source, D its input columns, E those that are embeddings, H hidden (T of
both towers side by side), C a chunk of rows, K rows that the heads are asked about.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ready(
    xs: list[Tensor], columns: list[Tensor], tower: tuple[list[Tensor], list[Tensor], list[Tensor]], bf16: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, each source's first layer (T, D), later layers' weights, and biases (T first) in the products' type."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights, biases, _ = tower
    first: list[Tensor] = []
    for columns_D in columns:
        both = torch.cat([weights[0].index_select(1, columns_D), weights[1].index_select(1, columns_D)])
        first.append(both.to(dtype))
    later = [weight.to(dtype) for weight in weights[2:-2]]
    sums = [torch.cat([biases[0], biases[1]])] + biases[2:]  # noqa: RUF005  TorchScript knows no star here
    return [x.to(dtype) for x in xs], first, later, [bias.to(dtype) for bias in sums]


def products(xs: list[Tensor], rows_of: list[Tensor], first: list[Tensor], bias_T: Tensor) -> list[Tensor]:
    """The first layer's products (U, T) of the sources that repeat, one of them with the bias; (0, T) of others."""
    out: list[Tensor] = []
    begun = False
    for at in range(len(xs)):
        if rows_of[at].shape[0] == 0:
            out.append(bias_T[:0])
        elif begun:
            out.append(torch.mm(xs[at], first[at].t()))
        else:
            out.append(torch.addmm(bias_T, xs[at], first[at].t()))
            begun = True
    return out


def idle_last(
    xs: list[Tensor], rows_of: list[Tensor], labels: list[Tensor], idle: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, int]:
    """All rows, those of kind ``idle`` (labels[0]) last; where each was (none if none moved); how many are not."""
    idle_B = labels[0] == idle
    rows = idle_B.shape[0]
    live = rows - int(idle_B.sum())
    if live == rows:
        return xs, rows_of, labels, torch.zeros(0, dtype=torch.int64), live
    order_B = torch.argsort(idle_B.to(torch.uint8), stable=True)
    moved_xs: list[Tensor] = []
    moved_rows: list[Tensor] = []
    for at in range(len(xs)):
        shared = rows_of[at].shape[0] > 0
        moved_xs.append(xs[at] if shared else xs[at].index_select(0, order_B))
        moved_rows.append(rows_of[at].index_select(0, order_B) if shared else rows_of[at])
    return moved_xs, moved_rows, [label.index_select(0, order_B) for label in labels], order_B, live


def put_back(
    logits_B2: Tensor, grads_x: list[Tensor], rows_of: list[Tensor], order_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What `idle_last` moved, where it was."""
    if order_B.shape[0] == 0:
        return logits_B2, grads_x
    out: list[Tensor] = []
    for at in range(len(grads_x)):
        grad = grads_x[at]
        moved = rows_of[at].shape[0] == 0 and grad.shape[1] > 0
        out.append(torch.empty_like(grad).index_copy_(0, order_B, grad) if moved else grad)
    return torch.empty_like(logits_B2).index_copy_(0, order_B, logits_B2), out


def zeros(
    xs: list[Tensor], rows_of: list[Tensor], first: list[Tensor], embedded: list[int]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Where gradients are summed: first layers (D, T), first sums by distinct row (U, T), embedded inputs (U, E)."""
    first_grads = [torch.zeros(weight_TD.shape[1], weight_TD.shape[0]) for weight_TD in first]
    sums: list[Tensor] = []
    grads_x: list[Tensor] = []
    for at in range(len(xs)):
        rows = xs[at].shape[0]
        sums.append(torch.zeros(rows if rows_of[at].shape[0] > 0 else 0, first[at].shape[0]))
        grads_x.append(torch.zeros(rows, embedded[at]))
    return first_grads, sums, grads_x


def up(
    xs: list[Tensor],
    rows_of: list[Tensor],
    first: list[Tensor],
    shared: list[Tensor],
    later: list[Tensor],
    biases: list[Tensor],
    start: int,
    stop: int,
) -> list[Tensor]:
    """Rows ``start`` to ``stop`` through all layers: h_CT of the first, then h_CH of CTR, CVR, layer after layer."""
    h_CT = biases[0]
    begun = False
    for at in range(len(xs)):
        if rows_of[at].shape[0] > 0:
            part_CT = shared[at].index_select(0, rows_of[at][start:stop])
            h_CT = h_CT.add_(part_CT) if begun else part_CT
            begun = True
    for at in range(len(xs)):
        if rows_of[at].shape[0] == 0 and xs[at].shape[1] > 0:
            x_CD, weight_DT = xs[at][start:stop], first[at].t()
            h_CT = h_CT.addmm_(x_CD, weight_DT) if begun else torch.addmm(h_CT, x_CD, weight_DT)
            begun = True
    h_CT.relu_()
    half = h_CT.shape[1] // 2
    hidden = [h_CT, h_CT[:, :half], h_CT[:, half:]]
    for at in range(len(later)):
        hidden.append(torch.addmm(biases[at + 1], hidden[at + 1], later[at].t()).relu_())
    return hidden


def out(hidden: list[Tensor], weights: list[Tensor], bias: Tensor, logits_C2: Tensor) -> None:
    """The last layer's logits -> ``logits_C2``."""
    for tower in range(2):
        logits_C2[:, tower] = torch.mv(hidden[tower - 2].float(), weights[tower - 2][0])
    logits_C2 += bias


def ascend(
    xs: list[Tensor],
    rows_of: list[Tensor],
    first: list[Tensor],
    shared: list[Tensor],
    later: list[Tensor],
    biases: list[Tensor],
    tower: tuple[list[Tensor], list[Tensor], list[Tensor]],
    logits_B2: Tensor,
    begin: int,
    chunk: int,
) -> None:
    """The logits of the rows from ``begin`` on, of which nothing is learned."""
    rows = logits_B2.shape[0]
    for start in range(begin, rows, chunk):
        stop = min(start + chunk, rows)
        hidden = up(xs, rows_of, first, shared, later, biases, start, stop)
        out(hidden, tower[0], tower[2][0], logits_B2[start:stop])


def down(
    hidden: list[Tensor],
    grad_2C: Tensor,
    later: list[Tensor],
    weights: list[Tensor],
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> Tensor:
    """Gradient of the logits -> that of the first layer's sums (C, T); the later parameters' is added to ``grads``."""
    h_CT = hidden[0]
    d_CT, half = torch.empty_like(h_CT), h_CT.shape[1] // 2
    ones_C = torch.ones(h_CT.shape[0], dtype=h_CT.dtype)
    grads[2][0].add_(grad_2C.sum())
    for tower in range(2):
        at = len(hidden) - 2 + tower
        grad_C, final_H = grad_2C[tower], weights[tower - 2][0]
        grads[0][tower - 2][0].addmv_(hidden[at].float().t(), grad_C)
        first_CH = d_CT[:, tower * half : (tower + 1) * half]
        d_CH = torch.outer(grad_C, final_H).to(h_CT.dtype)
        if at <= 2:
            first_CH.copy_(d_CH)
        while at > 2:
            through_relu(d_CH, hidden[at])
            grads[1][at - 1].add_(torch.mv(d_CH.t(), ones_C))
            add_product(grads[0][at - 1], d_CH, hidden[at - 2])
            d_CH = torch.mm(d_CH, later[at - 3], out=first_CH) if at <= 4 else torch.mm(d_CH, later[at - 3])
            at -= 2
    through_relu(d_CT, h_CT)
    return d_CT


def into_inputs(
    xs: list[Tensor],
    rows_of: list[Tensor],
    d_CT: Tensor,
    first: list[Tensor],
    first_grads: list[Tensor],
    sums: list[Tensor],
    grads_x: list[Tensor],
    biases: list[Tensor],
    start: int,
) -> None:
    """One chunk's share of the first layer's gradient and the embeddings'; rows of one input are only summed here."""
    stop = start + d_CT.shape[0]
    summed = False
    for at in range(len(xs)):
        if rows_of[at].shape[0] > 0:
            summed = True
            sums[at].index_add_(0, rows_of[at][start:stop], d_CT.float())
        elif xs[at].shape[1] > 0:
            add_product(first_grads[at], xs[at][start:stop], d_CT)
            embedded = grads_x[at].shape[1]
            if embedded > 0:
                grads_x[at][start:stop] = torch.mm(d_CT, first[at][:, :embedded])
    if not summed:
        add_to_biases(biases, d_CT)


def add_to_biases(biases: list[Tensor], d_CT: Tensor) -> None:
    """The gradient of both towers' first biases."""
    half = d_CT.shape[1] // 2
    sum_T = torch.mv(d_CT.t(), torch.ones(d_CT.shape[0], dtype=d_CT.dtype))
    biases[0].add_(sum_T[:half])
    biases[1].add_(sum_T[half:])


def finish(
    xs: list[Tensor],
    rows_of: list[Tensor],
    columns: list[Tensor],
    first: list[Tensor],
    first_grads: list[Tensor],
    sums: list[Tensor],
    grads_x: list[Tensor],
    grads: tuple[list[Tensor], list[Tensor], list[Tensor]],
    chunk: int,
) -> None:
    """What was summed goes through the first layer's products; its gradient goes to the two towers' own."""
    summed = False
    for at in range(len(xs)):
        if xs[at].shape[1] == 0:
            continue
        if rows_of[at].shape[0] > 0:
            if not summed:
                add_to_biases(grads[1], sums[at])
            summed = True
            embedded = grads_x[at].shape[1]
            for start in range(0, xs[at].shape[0], chunk):
                stop = min(start + chunk, xs[at].shape[0])
                d_UT = sums[at][start:stop].to(xs[at].dtype)
                add_product(first_grads[at], xs[at][start:stop], d_UT)
                if embedded > 0:
                    grads_x[at][start:stop] = torch.mm(d_UT, first[at][:, :embedded])
    grad_DT = torch.cat(first_grads).index_select(0, torch.argsort(torch.cat(columns)))
    half = grad_DT.shape[1] // 2
    grads[0][0].add_(grad_DT[:, :half].t())
    grads[0][1].add_(grad_DT[:, half:].t())


def averaged(grad_P: Tensor, grads_x: list[Tensor], first: Tensor, weighted: Tensor) -> Tensor:
    """Sums over rows -> means as `esmm.loss.entire_space_loss` takes them, in place; the factor."""
    scale = 1.0 / torch.maximum(first, weighted / 2).clamp(min=1.0)
    grad_P.mul_(scale)
    for grad_UE in grads_x:
        grad_UE.mul_(scale)
    return scale


def through_relu(d_CH: Tensor, h_CH: Tensor) -> None:
    """Gradient of a ReLU's output -> of its input, in place."""
    torch.ops.aten.threshold_backward(d_CH, h_CH, 0, grad_input=d_CH)


def add_product(grad_GH: Tensor, a_CG: Tensor, b_CH: Tensor) -> None:
    """Add a^T b to a float32 gradient; the narrower one first is the faster."""
    if a_CG.dtype == torch.float32:
        grad_GH.addmm_(a_CG.t(), b_CH)
    else:
        grad_GH.add_(torch.mm(a_CG.t(), b_CH))


def rows_at(xs: list[Tensor], rows_of: list[Tensor], index_K: Tensor) -> Tensor:
    """The input x_KD at some of the B rows, a source after another."""
    parts: list[Tensor] = []
    for at in range(len(xs)):
        shared = rows_of[at].shape[0] > 0
        parts.append(xs[at].index_select(0, rows_of[at].index_select(0, index_K) if shared else index_K))
    return torch.cat(parts, 1)


def heads(
    x_KD: Tensor,
    columns_D: Tensor,
    lesson_4K: Tensor,
    parameters: tuple[list[Tensor], list[Tensor]],
    grads: tuple[list[Tensor], list[Tensor]],
    full: float,
) -> tuple[Tensor, Tensor]:
    """Probabilities (2, K) of f_rn and f_dp, and five sums; the gradient of `esmm.heads.Heads.loss` goes to ``grads``.

    ``lesson_4K``: the labels of both, then the masks. Sums: loss, matured rows, then of f_rn's rows: number, f_rn,
    labels. A mask with fewer rows than ``full`` weighs less.
    """
    weights, biases = parameters
    weight_HD = weights[0].index_select(1, columns_D)
    h_K = [x_KD]
    for at in range(len(weights)):
        h_KH = torch.addmm(biases[at], h_K[at], (weight_HD if at == 0 else weights[at]).t())
        h_K.append(h_KH.relu_() if at + 1 < len(weights) else h_KH)
    label_2K, mask_2K = lesson_4K[:2], lesson_4K[2:]
    logit_2K = h_K[-1].t()
    p_2K = torch.sigmoid(logit_2K)
    scale_21 = 1.0 / mask_2K.sum(1, keepdim=True).clamp(min=full)
    loss = (F.binary_cross_entropy_with_logits(logit_2K, label_2K, reduction="none") * mask_2K * scale_21).sum()
    d_KH = ((p_2K - label_2K) * mask_2K * scale_21).t()
    for back in range(len(weights)):
        at = len(weights) - 1 - back
        grads[1][at].add_(d_KH.sum(0))
        if at == 0:
            grads[0][0].add_(torch.mm(x_KD.t(), d_KH).index_select(0, torch.argsort(columns_D)).t())
        else:
            grads[0][at].addmm_(d_KH.t(), h_K[at])
            d_KH = torch.ops.aten.threshold_backward(torch.mm(d_KH, weights[at]), h_K[at], 0)
    rn_K = mask_2K[0]
    sums = torch.stack([loss, mask_2K[1].sum(), rn_K.sum(), (p_2K[0] * rn_K).sum(), (label_2K[0] * rn_K).sum()])
    return p_2K, sums
