"""Negative downsampling with the log-odds correction inside the loss (He et al., ADKDD 2014; Monolith, 2022).

Of the unclicked first emissions a share r is learned from, of everything else all. At fixed x the rows that are left
click with q = a / (a + (1 - a) r), whose log odds are those of a minus log r, and convert with t_q = q p. So the loss
is given u - log r in place of the CTR logit u: its minimum is where sigmoid(u) = a and sigmoid(v) = p, and the model
itself stays calibrated. Nothing that serves, publishes or judges it has to know of r.

A method's clicked rows weigh, in total, what its unclicked row weighs (see `esmm.delay`), so this holds for each of
them; not for FNC, whose q = t / (1 + t) is undone when served, with a in place of q.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esmm.batch import Bool, Examples, Kind

_SEED = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finaliser
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


class NegativeSampler:
    """Which rows of a batch are learned from at keep rate r, and the logits that the loss must see for it."""

    def __init__(self, keep: float = 1.0) -> None:
        """``keep`` is r; ValueError unless 0 < r <= 1."""
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"the share of unclicked impressions to keep must be in (0, 1], got {keep:g}")
        self.keep = keep
        self.shift = -math.log(keep)  # of the CTR logit

    def kept(self, examples: Examples) -> Bool | None:
        """Which of B rows to learn from; None when those are all."""
        if self.keep == 1.0:
            return None
        kept_B = kept_rows(examples, self.keep)
        return None if kept_B.all() else kept_B

    def shifted(self, logits_B2: Tensor) -> Tensor:
        """[CTR, CVR] logits of the world as it is -> of the sampled one."""
        return logits_B2 if self.keep == 1.0 else logits_B2 + torch.tensor([self.shift, 0.0])


def kept_rows(examples: Examples, keep: float) -> Bool:
    """Which of B rows stay: all but a share 1 - ``keep`` of the unclicked first emissions."""
    certain_B = (examples.kind_B != Kind.FIRST) | (examples.click_B > 0)
    kept_B: Bool = certain_B | (impression_hash(examples) < np.uint64(min(keep * 2.0**64, 2.0**64 - 2.0**11)))
    return kept_B


def impression_hash(examples: Examples) -> NDArray[np.uint64]:
    """A hash of each row's impression: its time and its features as they were scored, whatever batch it lies in.

    Equal in every run and after every restart. Only impressions of one millisecond with equal features share one: they
    are kept or dropped together, which adds variance, not bias.
    """
    blocks = (examples.user, examples.item, examples.context)
    columns = [examples.impression_ms_B[:, None], *(block.ids_NS for block in blocks)]
    columns += [np.ascontiguousarray(block.dense_ND, np.float32).view(np.int32) for block in blocks]
    bits_BC = np.concatenate(columns, axis=1, dtype=np.int64).view(np.uint64)
    odd_C = np.random.default_rng(_SEED).integers(0, 1 << 63, bits_BC.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    hash_B: NDArray[np.uint64] = (_mixed(bits_BC) * odd_C).sum(axis=1, dtype=np.uint64)
    return _mixed(hash_B)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all of them."""
    bits = (bits ^ (bits >> _30)) * _MIX_1
    bits = (bits ^ (bits >> _27)) * _MIX_2
    return bits ^ (bits >> _31)
