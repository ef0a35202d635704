"""The log-space loss against closed forms and against 64 bits, up to logits that break the textbook formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esmm.loss import entire_space_gradient, entire_space_loss, log_ctcvr, masked_bce

GRID = [-110.0, -90.0, -40.0, -20.0, -8.0, -1.0, 0.0, 0.5, 3.0, 8.0, 17.0, 40.0, 90.0, 110.0]
PAIRS = [(u, v) for u in GRID for v in GRID]


def exact(u: float, v: float) -> tuple[float, float]:
    """log t and log(1 - t) from float64 sums of positive numbers only."""
    a = 1 / (1 + math.exp(-u))
    not_a, not_c = (1 / (1 + math.exp(x)) for x in (u, v))
    log_t = -math.log1p(math.exp(-u)) - math.log1p(math.exp(-v))
    t = math.exp(log_t)
    return log_t, math.log1p(-t) if t < 0.5 else math.log(not_a + a * not_c)


@pytest.mark.parametrize(("u", "v"), PAIRS)
def test_values_and_gradients_in_float32_match_the_closed_forms(u, v):
    logits = torch.tensor([[u, v]], requires_grad=True)
    log_t_B, log_not_t_B = log_ctcvr(logits)
    log_t, log_not_t = exact(u, v)
    assert log_t_B.item() == pytest.approx(log_t, rel=1e-6, abs=1e-37)
    assert log_not_t_B.item() == pytest.approx(log_not_t, rel=3e-6, abs=1e-37)
    (positive,) = torch.autograd.grad(log_t_B.sum(), logits, retain_graph=True)
    (negative,) = torch.autograd.grad(log_not_t_B.sum(), logits)
    log_not_a, log_not_c = (-math.log1p(math.exp(x)) for x in (u, v))
    assert positive.flatten().tolist() == pytest.approx([math.exp(log_not_a), math.exp(log_not_c)], rel=1e-5, abs=1e-37)
    odds = log_t - log_not_t  # d log(1-t) / du = -(1-a) t / (1-t), and so for v
    expected = [-math.exp(log_not_a + odds), -math.exp(log_not_c + odds)]
    assert negative.flatten().tolist() == pytest.approx(expected, rel=2e-5, abs=1e-37)


def random_batch(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(512, 2, generator=generator, dtype=torch.float64) * 6
    click_B, first_B = (torch.randint(0, 2, (2, 512), generator=generator)).double()
    weights = torch.rand(2, 512, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype).requires_grad_(), [x.to(dtype) for x in (click_B, first_B, *weights)]


def textbook(logits_B2: Tensor, click_B: Tensor, first_B: Tensor, positive_B: Tensor, negative_B: Tensor) -> Tensor:
    a_B, c_B = torch.sigmoid(logits_B2).unbind(-1)
    t_B = a_B * c_B
    ctr = -(first_B * (click_B * a_B.log() + (1 - click_B) * (1 - a_B).log())).sum()
    return (ctr - (positive_B * t_B.log() + negative_B * (1 - t_B).log()).sum()) / max(first_B.sum().item(), 256)


def test_loss_and_gradient_in_float32_equal_the_textbook_formula_in_float64():
    logits32, rest32 = random_batch(torch.float32)
    logits64 = logits32.detach().double().requires_grad_()
    rest64 = [x.double() for x in rest32]
    loss32, loss64 = entire_space_loss(logits32, *rest32), textbook(logits64, *rest64)
    assert loss32.item() == pytest.approx(loss64.item(), rel=1e-6)
    loss32.backward()
    loss64.backward()
    assert logits32.grad is not None
    assert logits64.grad is not None
    assert torch.allclose(logits32.grad.double(), logits64.grad, rtol=1e-5, atol=2e-9)


@pytest.mark.parametrize("shift", [0.0, 2.3])
def test_the_gradient_without_autograd_is_that_of_autograd(shift):
    logits64, rest64 = random_batch(torch.float64)
    shifted = logits64 + torch.tensor([shift, 0.0])
    first_B, weighted = rest64[1], (rest64[2] + rest64[3] > 0).sum()
    rows = float(torch.maximum(first_B.sum(), weighted / 2))
    loss = entire_space_loss(shifted, *rest64)
    loss.backward()
    before = logits64.detach().float()
    total, grad_2B = entire_space_gradient(before, *(x.float() for x in rest64), shift)
    assert total.item() / rows == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(grad_2B.t().double() / rows, logits64.grad, rtol=1e-5, atol=2e-9)
    assert torch.equal(before, logits64.detach().float())
    one = logits64.detach()[:1].clone()
    entire_space_gradient(one, *(x[:1] for x in rest64), shift)
    assert torch.equal(one, logits64.detach()[:1])


@pytest.mark.parametrize(("u", "v"), PAIRS)
def test_without_autograd_a_confident_wrong_row_keeps_its_gradient_too(u, v):
    one, none = torch.ones(1), torch.zeros(1)
    (_, positive_21), (_, negative_21) = (
        entire_space_gradient(torch.tensor([[u, v]]), none, none, p, n, 0.0) for p, n in ((one, none), (none, one))
    )
    log_t, log_not_t = exact(u, v)
    log_not = [-math.log1p(math.exp(x)) for x in (u, v)]
    assert positive_21.flatten().tolist() == pytest.approx([-math.exp(x) for x in log_not], rel=1e-5, abs=1e-37)
    expected = [math.exp(x + log_t - log_not_t) for x in log_not]
    assert negative_21.flatten().tolist() == pytest.approx(expected, rel=3e-5, abs=1e-37)


def test_gradients_pass_gradcheck_in_float64():
    logits, rest = random_batch(torch.float64)
    few = [x[:20] for x in rest]
    assert torch.autograd.gradcheck(lambda x: entire_space_loss(x, *few), (logits[:20].detach().requires_grad_(),))


def test_a_confident_wrong_row_keeps_its_gradient():
    logits = torch.tensor([[30.0, 30.0]], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    entire_space_loss(logits, one, one, zero, one).backward()
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


def test_only_first_emissions_reach_the_click_term_and_divide():
    logits = torch.zeros(4, 2)
    click, zero = torch.ones(4), torch.zeros(4)
    first = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert entire_space_loss(logits, click, first, zero, zero).item() == pytest.approx(math.log(2))
    late = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert entire_space_loss(logits, click, first, late, zero).item() == pytest.approx(math.log(2) + math.log(4) / 3)


def test_a_batch_of_late_conversions_alone_is_divided_by_half_its_rows():
    logits = torch.zeros(8, 2)
    one, zero = torch.ones(8), torch.zeros(8)
    assert entire_space_loss(logits, one, zero, one, zero).item() == pytest.approx(2 * math.log(4))
    assert entire_space_loss(logits[:0], one[:0], zero[:0], one[:0], zero[:0]).item() == 0


def test_masked_bce_is_a_mean_over_its_mask_and_zero_without_one():
    logit, label = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0])
    assert masked_bce(logit, label, torch.tensor([1.0, 0.0])).item() == pytest.approx(math.log(2))
    assert masked_bce(logit, label, torch.zeros(2)).item() == 0
