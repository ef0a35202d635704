"""Delayed-feedback methods: what each row of the joiner's stream teaches, as weights of one entire-space loss.

A click's conversion may come long after the observation window w that its first emission waits for. At fixed x:
a = P(click), p = P(conversion within the attribution window | click), p0 = 1 - p, p_dp = P(converts after w | click),
p_ip = p - p_dp, f = the model's own p, detached. Two auxiliary heads, learned on matured rows (rule R7), estimate
f_rn = P(no conversion | none within w) = p0 / (p0 + p_dp) and f_dp = p_dp.

A method turns a row's sample class into two weights: ``positive`` on -log t, ``negative`` on -log(1 - t), t = a p.
Its fixed point is t = W+ / (W+ + W-), where W+ and W- sum the weights over all rows an impression emits. Unclicked
impressions are certain negatives (R3), but must weigh what a click at the same x weighs *in total*, else t is biased
although p would not be: 1 for mass-preserving methods, 1 + f_dp for ES-DFM, 2 for DEFER. Tests hold every fixed point
to 1e-6, in click space and in the entire space.

A fixed point takes for granted that x is still shown when its late conversions come. Where items leave sooner, those
positives find no row to balance, and for what is shown now the first emissions speak alone: at p = .256, 58% of it
late, they teach .42 p under FNW and FNC, .49 p under both ES-DFM, .57 p under DEFUSE, p under DDFM, 1.04 p under DEFER.

Sources: FNW, FNC (Ktena et al., RecSys 2019), ES-DFM (Yang et al., AAAI 2021), DEFER (Gu et al., KDD 2021), DEFUSE
(Chen et al., WWW 2022), DDFM (KID-22/DDFM). Formulas were derived again here: some public implementations are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esmm.batch import Float32, Kind

DEFAULT = "mp-es-dfm"
DEFER_CLIP = 1.8  # DEFER divides by f - f_dp / 2: f_dp is held below 1.8 f, away from the singularity


class Rows(NamedTuple):
    """Each row's sample class, 1.0 where it belongs and 0.0 elsewhere; all tensors are (B,) of one float type.

    A row in no class, a late conversion whose first emission carried one already (R5), teaches nothing.
    """

    first_B: Tensor  # any first emission: the only rows that teach CTR (R2)
    unclicked_B: Tensor  # first emission, no click
    immediate_B: Tensor  # first emission, click, conversion within w
    pending_B: Tensor  # first emission, click, no conversion within w: real or fake negative
    late_B: Tensor  # the conversion of a pending one
    matured_B: Tensor  # a click at the end of its attribution window
    converted_B: Tensor  # its final label, 0 on other kinds
    observed_B: Tensor  # its label within w, 0 on other kinds

    @property
    def real_negative_B(self) -> Tensor:
        """A matured click that never converted."""
        return self.matured_B * (1 - self.converted_B)


class Beliefs(NamedTuple):
    """What the model thinks of each row, detached: probabilities (B,)."""

    cvr_B: Tensor  # f
    rn_B: Tensor  # f_rn
    dp_B: Tensor  # f_dp


class Weights(NamedTuple):
    """Weights (B,) of -log t and -log(1 - t), never negative."""

    positive_B: Tensor
    negative_B: Tensor


class HeadTargets(NamedTuple):
    """What the auxiliary heads learn (R7): labels and 0/1 masks, each (B,)."""

    rn_label_B: Tensor
    rn_mask_B: Tensor  # matured clicks without a conversion within w
    dp_label_B: Tensor
    dp_mask_B: Tensor  # all matured clicks


def sample_classes(kind_B: Tensor, click_B: Tensor, conversion_B: Tensor, observed_B: Tensor) -> Rows:
    """Columns of `esmm.batch.Examples` as tensors -> sample classes, in the float type of ``click_B``."""
    first_B, late_B, matured_B = ((kind_B == kind).to(click_B.dtype) for kind in Kind)
    matured_B = matured_B * click_B
    clicked_B = first_B * click_B
    return Rows(
        first_B,
        first_B - clicked_B,
        clicked_B * conversion_B,
        clicked_B * (1 - conversion_B),
        late_B * (1 - observed_B),
        matured_B,
        matured_B * conversion_B,
        matured_B * observed_B,
    )


def head_targets(rows: Rows) -> HeadTargets:
    """Which rows teach f_rn and f_dp, and what."""
    delayed_B = rows.converted_B * (1 - rows.observed_B)
    return HeadTargets(1 - rows.converted_B, rows.matured_B - rows.observed_B, delayed_B, rows.matured_B)


WeightsOf = Callable[[Rows, Beliefs], Weights]


def _first_only(r: Rows, _: Beliefs) -> Weights:
    """First emissions taken at their word: t = a (p - p_dp), or a p when they carry the eventual label."""
    return Weights(r.immediate_B, r.unclicked_B + r.pending_B)


def _full_wait(r: Rows, _: Beliefs) -> Weights:
    """Clicks teach CTCVR only when matured: t = a p, as of one attribution window ago."""
    return Weights(r.converted_B, r.unclicked_B + r.real_negative_B)


def _vanilla_dup(r: Rows, _: Beliefs) -> Weights:
    """Both emissions taken at their word: t = a p / (1 + a p_dp)."""
    return Weights(r.immediate_B + r.late_B, r.unclicked_B + r.pending_B)


def fake_negative(r: Rows, b: Beliefs) -> Weights:
    """FNW over its total mass 1 + f, for any w: each click a negative of weight 1 - f, each conversion a positive.

    Needs no head, so it stands in while a head is cold or out of bounds. Its expected masses equal those of MP-ES-DFM
    emission by emission, so switching between the two at any row leaves t = a p.
    """
    clicked_B = r.immediate_B + r.pending_B
    return Weights(r.immediate_B + r.late_B, r.unclicked_B + clicked_B * (1 - b.cvr_B))


def _fnw(r: Rows, b: Beliefs) -> Weights:
    """FNW as published: positives weigh 1 + f, negatives (1 - f)(1 + f), so unclicked rows weigh 1 + f."""
    return _scaled(fake_negative(r, b), 1 + b.cvr_B)


def _fnc(r: Rows, _: Beliefs) -> Weights:
    """Every impression is a negative at once, every conversion a positive: q = t / (1 + t), undone when served."""
    return Weights(r.immediate_B + r.late_B, r.first_B)


def _mp_es_dfm(r: Rows, b: Beliefs) -> Weights:
    """Mass-preserving ES-DFM: W+ = a p, W- = 1 - a p. With the right f_rn, the oracle's expected loss; weights <= 1."""
    return Weights(r.immediate_B + r.late_B, r.unclicked_B + r.pending_B * b.rn_B)


def _es_dfm(r: Rows, b: Beliefs) -> Weights:
    """ES-DFM as published: the same times 1 + f_dp."""
    return _scaled(_mp_es_dfm(r, b), 1 + b.dp_B)


def _defer(r: Rows, b: Beliefs) -> Weights:
    """Every click twice: as observed and with its true label (immediate positives at once, hence their factor 2)."""
    half_B = torch.minimum(b.dp_B, DEFER_CLIP * b.cvr_B) / 2
    positive_B = b.cvr_B / (b.cvr_B - half_B)
    negative_B = (1 - b.cvr_B) / (1 - b.cvr_B + half_B)
    clicked_B = r.pending_B + r.real_negative_B
    return Weights((2 * r.immediate_B + r.late_B) * positive_B, 2 * r.unclicked_B + clicked_B * negative_B)


def _defuse(r: Rows, b: Beliefs) -> Weights:
    """A pending click is a mixture: a fake negative with probability z = 1 - f_rn, then worth f_dp as a positive."""
    mass_B = 1 + b.dp_B
    positive_B = r.immediate_B * mass_B + r.late_B + r.pending_B * (1 - b.rn_B) * b.dp_B
    return Weights(positive_B, (r.unclicked_B + r.pending_B * b.rn_B) * mass_B)


def _ddfm(r: Rows, b: Beliefs) -> Weights:
    """Two streams of soft labels, each unbiased: first emissions (z1 = f_rn), true labels (z2 = 1 - f + f_dp)."""
    seen_B = (b.cvr_B - b.dp_B).clamp(min=0.0)  # p_ip
    soft_B = r.real_negative_B * seen_B
    positive_B = r.immediate_B + r.late_B + r.pending_B * (1 - b.rn_B) + soft_B
    negative_B = r.unclicked_B * (2 - seen_B) + r.pending_B * b.rn_B + r.real_negative_B - soft_B
    return Weights(positive_B, negative_B)


def _scaled(weights: Weights, factor_B: Tensor) -> Weights:
    return Weights(weights.positive_B * factor_B, weights.negative_B * factor_B)


@dataclass(frozen=True, slots=True)
class Method:
    """One delayed-feedback method: its weights, and what it asks of the joiner, the heads and the scorer."""

    name: str
    weights: WeightsOf
    needs_late: bool = False  # learns from LATE_CONVERSION rows
    learns_matured: bool = False  # its own loss, not only a head's, learns from MATURED rows
    needs_rn: bool = False  # uses the f_rn head
    needs_dp: bool = False  # uses the f_dp head
    observes: bool = True  # False: a click need not wait; the joiner may use an observation window of 0
    eventual_label: bool = False  # FIRST rows must carry the final label: known offline only
    odds_correction: bool = False  # what it learns is t / (1 + t), see `served_ctcvr`

    @property
    def needs_heads(self) -> bool:
        """Uses an auxiliary head: `fake_negative` stands in while it is cold."""
        return self.needs_rn or self.needs_dp

    @property
    def needs_matured(self) -> bool:
        """Must be given MATURED rows."""
        return self.learns_matured or self.needs_heads


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("oracle", _first_only, observes=False, eventual_label=True),
        Method("full-wait", _full_wait, learns_matured=True),
        Method("vanilla-window", _first_only),
        Method("vanilla-dup", _vanilla_dup, needs_late=True),
        Method("fnw", _fnw, needs_late=True, observes=False),
        Method("fnc", _fnc, needs_late=True, observes=False, odds_correction=True),
        Method("es-dfm", _es_dfm, needs_late=True, needs_rn=True, needs_dp=True),
        Method("mp-es-dfm", _mp_es_dfm, needs_late=True, needs_rn=True),
        Method("defer", _defer, needs_late=True, learns_matured=True, needs_dp=True),
        Method("defuse", _defuse, needs_late=True, needs_rn=True, needs_dp=True),
        Method("ddfm", _ddfm, needs_late=True, learns_matured=True, needs_rn=True, needs_dp=True),
    )
}


def method_named(name: str) -> Method:
    """The method called ``name``; ValueError that lists the names otherwise."""
    if name not in METHODS:
        raise ValueError(f"unknown delayed-feedback method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def served_ctcvr(ctr_B: Float32, learned_B: Float32) -> Float32:
    """FNC's correction: the learned q = t / (1 + t) -> t = q / (1 - q), held at or below ``ctr_B``; float32 in [0, 1].

    The served pCVR is then t / pCTR. Only for methods with ``odds_correction``.
    """
    ctcvr_B: Float32 = (learned_B / (1 - learned_B).clip(min=1e-6)).clip(max=ctr_B)
    return ctcvr_B
