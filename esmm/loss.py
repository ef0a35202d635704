"""The entire-space loss in log space: clicks and click-and-conversions over every impression.

Ma et al., SIGIR 2018 (arXiv:1804.07931), eq. 3, with weights a row for delayed labels (`esmm.delay` makes them).
With a = sigmoid(u) and c = sigmoid(v) the conversion probability of an impression is t = a c. Neither log t nor
log(1 - t) is computed from t itself, so nothing overflows, vanishes or is clamped: a confident wrong row keeps its
gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG_HALF = -0.6931471805599453


def log_ctcvr(logits_B2: Tensor) -> tuple[Tensor, Tensor]:
    """[CTR, CVR] logits u, v -> log t and log(1 - t), both accurate to float32 rounding for any finite logits.

    log t = log a + log c. Below one half log(1 - t) = log1p(-exp(log t)); above it 1 - t = (1 - a) + a (1 - c), a sum
    of positive numbers, is added in log space (log(-expm1(log t)) would lose the gradient once log t rounds to zero).
    """
    u_B, v_B = logits_B2.unbind(-1)
    click_B = F.logsigmoid(u_B)
    log_t_B = click_B + F.logsigmoid(v_B)
    small_B = torch.log1p(-torch.exp(log_t_B.clamp(max=_LOG_HALF)))
    large_B = torch.logaddexp(F.logsigmoid(-u_B), click_B + F.logsigmoid(-v_B))
    return log_t_B, torch.where(log_t_B < _LOG_HALF, small_B, large_B)


def entire_space_loss(
    logits_B2: Tensor, click_B: Tensor, first_B: Tensor, positive_B: Tensor, negative_B: Tensor
) -> Tensor:
    """Nats per first emission: CTR cross-entropy on first emissions plus the weighted CTCVR cross-entropy on all rows.

    ``first_B`` is 1 where the row is an impression's first emission, else 0: only those teach CTR (rule R2).
    ``positive_B`` weighs -log t, ``negative_B`` weighs -log(1 - t). Sums are divided by the number of first emissions,
    not of rows: duplicates carry mass that belongs to impressions counted already. A batch in which fewer than half of
    the weighted rows are first emissions is divided by that half, so a few late conversions alone are no giant step.
    """
    log_t_B, log_not_t_B = log_ctcvr(logits_B2)
    ctr = (first_B * F.binary_cross_entropy_with_logits(logits_B2[:, 0], click_B, reduction="none")).sum()
    ctcvr = -(positive_B * log_t_B + negative_B * log_not_t_B).sum()
    weighted = ((positive_B + negative_B) > 0).sum()
    return (ctr + ctcvr) / torch.maximum(first_B.sum(), weighted / 2).clamp(min=1.0)


def entire_space_gradient(
    logits_B2: Tensor, click_B: Tensor, first_B: Tensor, positive_B: Tensor, negative_B: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """The sum that `entire_space_loss` divides, of u + ``shift`` and v, and its gradient (2, B), without autograd.

    ``click_B`` is 0 or 1. By u, with a = sigmoid(u): d log t = 1 - a and d log(1 - t) = -(1 - a) t / (1 - t), by v
    likewise with c; the last one is at most 1, and is computed in log space. TorchScript runs this too.
    """
    z_2B = torch.stack([logits_B2[:, 0] + shift, logits_B2[:, 1]])
    log_half = -0.6931471805599453
    log_2B, log_not_2B = F.logsigmoid(z_2B), F.logsigmoid(-z_2B)
    log_t_B = log_2B[0] + log_2B[1]
    small_B = torch.log1p(-torch.exp(log_t_B.clamp(max=log_half)))
    log_not_t_B = torch.where(log_t_B < log_half, small_B, torch.logaddexp(log_not_2B[0], log_2B[0] + log_not_2B[1]))
    log_click_B = torch.where(click_B > 0, log_2B[0], log_not_2B[0])
    total = -(first_B * log_click_B + positive_B * log_t_B + negative_B * log_not_t_B).sum()
    grad_2B = negative_B * torch.exp(log_not_2B + (log_t_B - log_not_t_B)) - positive_B * torch.exp(log_not_2B)
    grad_2B[0] += first_B * (torch.exp(log_2B[0]) - click_B)
    return total, grad_2B


def masked_bce(logit_B: Tensor, label_B: Tensor, mask_B: Tensor, at_least: float = 1.0) -> Tensor:
    """Binary cross-entropy with logits over the rows where ``mask_B`` is 1, in nats a row, zero when there is none.

    The sum is divided by the number of those rows, or by ``at_least`` when they are fewer.
    """
    each_B = F.binary_cross_entropy_with_logits(logit_B, label_B, reduction="none")
    return (each_B * mask_B).sum() / mask_B.sum().clamp(min=at_least)
