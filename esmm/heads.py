"""The auxiliary heads of the delayed-feedback methods: f_rn and f_dp of `esmm.delay`, and whether to trust them.

A tower of their own on detached embeddings, learned on matured rows (rule R7): labels as old as the attribution window
must not pull the embeddings back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esmm.delay import HeadTargets
from esmm.loss import masked_bce
from esmm.model import Tower
from esmm.optim import DenseAdam

FULL_WEIGHT_ROWS = 32  # fewer matured rows in a batch weigh less: Adam would blow a single row up to a whole step


@dataclass(frozen=True)
class HeadRule:
    """How the heads learn and when they count.

    They are cold until ``min_rows`` matured clicks without an immediate conversion were seen, and out of bounds while
    their mean f_rn, predicted before learning, is off the labels' mean by more than ``tolerance`` of it, over about the
    last ``horizon`` such rows: an error of f_rn goes into pCVR one to one.
    """

    hidden_units: tuple[int, ...] = (64,)
    learning_rate: float = 1e-3
    min_rows: int = 1_000
    tolerance: float = 0.1
    horizon: int = 2_000


@dataclass
class Trust:
    """Running sums behind the question whether f_rn may be used."""

    rows: int = 0
    predicted: float = 0.0
    labelled: float = 0.0

    def add(self, rows: int, predicted: float, labelled: float, horizon: int) -> None:
        """Count ``rows`` matured rows with these sums of f_rn, as predicted before learning them, and of its labels."""
        keep = (1 - 1 / horizon) ** rows
        self.rows += rows
        self.predicted = self.predicted * keep + predicted
        self.labelled = self.labelled * keep + labelled

    def earned(self, rule: HeadRule) -> bool:
        """Neither cold nor out of bounds."""
        off = abs(self.predicted - self.labelled)
        return self.rows >= rule.min_rows and off <= rule.tolerance * self.labelled


class Heads(nn.Module):
    """x_BD -> logits_B2 of [f_rn, f_dp]."""

    def __init__(self, input_dim: int, rule: HeadRule, seed: int) -> None:
        """The same seed gives the same weights; the caller's random state is left alone."""
        super().__init__()
        self.rule, self.trust = rule, Trust()
        widths: Sequence[int] = (input_dim, *rule.hidden_units)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.tower = Tower(widths, "relu", 0.0, False, 0.01)
            self.final = nn.Linear(widths[-1], 2)
        self.adam = DenseAdam(self.parameters(), rule.learning_rate)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers; all but the last have a ReLU."""
        return [*(one for one in self.tower.linears if isinstance(one, nn.Linear)), self.final]

    @property
    def trusted(self) -> bool:
        """Whether their probabilities may weigh rows now."""
        return self.trust.earned(self.rule)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits of both heads; ``x_BD`` is detached here."""
        logits_B2: Tensor = self.final(self.tower(x_BD.detach()))
        return logits_B2

    def loss(self, logits_B2: Tensor, targets: HeadTargets) -> Tensor:
        """Nats a matured row, both heads added."""
        rn = masked_bce(logits_B2[:, 0], targets.rn_label_B, targets.rn_mask_B, FULL_WEIGHT_ROWS)
        return rn + masked_bce(logits_B2[:, 1], targets.dp_label_B, targets.dp_mask_B, FULL_WEIGHT_ROWS)

    def learn(self, scale: float, rows: int, predicted: float, labelled: float) -> None:
        """Take the step of the gradient that backward left behind; the sums are those of `Trust.add`."""
        self.adam.step(scale)
        self.trust.add(rows, predicted, labelled, self.rule.horizon)
