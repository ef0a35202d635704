"""What `ESMM.compile`, `fit` and `evaluate` are made of: training on arrays in memory, with metrics per task.

For a stream there is `esmm.learner`. Metrics are never flattened over tasks and never averaged over batches: training
metrics are the predictions made just before each step, added up over the epoch; validation metrics are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm import tqdm

from esmm.batch import Float32, Int64
from esmm.loss import entire_space_loss
from esmm.metrics import TaskStats, auc, logloss, pcoc

METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {"auc": auc, "logloss": logloss, "pcoc": pcoc}
ALIASES = {"binary_crossentropy": "logloss"}  # DeepCTR-Torch's other name for it
LOSS = "binary_crossentropy"
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


class Trainable(Protocol):
    """What fitting needs of a model."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""

    def train(self) -> Any:
        """Switch to training mode."""

    def logits(self, ids_BS: Tensor, dense_BD: Tensor) -> Tensor:
        """logits_B2, [CTR, CVR]."""

    def l2_penalty(self) -> Tensor:
        """A scalar that is added to the summed loss."""

    def score(self, ids_NS: Int64, dense_ND: Float32, batch_size: int) -> NDArray[np.float64]:
        """(N, 2) pCTR, pCTCVR in evaluation mode; the mode is restored."""


class Rows(NamedTuple):
    """N labelled rows; ``y_N2`` is [click, click and conversion]."""

    ids_NS: Int64
    dense_ND: Float32
    y_N2: Float32


@dataclass(frozen=True)
class Recipe:
    """What to train with and what to report, for which two tasks."""

    tasks: tuple[str, str]
    optimizer: torch.optim.Optimizer
    metrics: tuple[str, ...]

    @classmethod
    def of(
        cls,
        tasks: Sequence[str],
        parameters: Iterator[nn.Parameter],
        optimizer: str | torch.optim.Optimizer,
        loss: str | Sequence[str] | None,
        metrics: Sequence[str] | None,
    ) -> Recipe:
        """`ESMM.compile`'s arguments, checked: ValueError names what is unknown and the choices."""
        if isinstance(optimizer, str):
            if optimizer not in OPTIMIZERS:
                raise ValueError(f"unknown optimizer {optimizer!r}; choose {', '.join(OPTIMIZERS)} or pass an instance")
            optimizer = OPTIMIZERS[optimizer](parameters)
        if loss not in (None, LOSS) and list(loss or ()) != [LOSS, LOSS]:
            raise ValueError(f"ESMM learns both tasks with {LOSS!r}, got loss={loss!r}")
        names = [ALIASES.get(name, name) for name in (METRICS if metrics is None else metrics)]
        for name in names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        return cls((tasks[0], tasks[1]), optimizer, tuple(names))


@dataclass(frozen=True)
class Plan:
    """How `fit` goes over the rows."""

    batch_size: int
    epochs: int
    verbose: int  # 0 silent, 1 progress bar, 2 a line an epoch
    shuffle_seed: int | None  # None keeps the order given


@dataclass
class History:
    """Metric name -> one value an epoch, in the shape Keras and DeepCTR-Torch users expect."""

    epoch: list[int] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Append one epoch's values."""
        self.epoch.append(epoch)
        for name, value in values.items():
            self.history.setdefault(name, []).append(value)


def labels(y: ArrayLike, rows: int) -> Float32:
    """(N, 2) [click, click and conversion] -> float32; ValueError unless 0 or 1 and no conversion lacks its click."""
    y_N2 = np.asarray(y, np.float32)
    if y_N2.shape != (rows, 2):
        raise ValueError(f"y must be ({rows}, 2), [click, click and conversion], got {y_N2.shape}")
    if not np.all((y_N2 == 0) | (y_N2 == 1)):
        raise ValueError("labels must be 0 or 1")
    if np.any(y_N2[:, 1] > y_N2[:, 0]):
        raise ValueError(f"row {int(np.argmax(y_N2[:, 1] > y_N2[:, 0]))} has a conversion without a click")
    return y_N2


def split(rows: Rows, share: float) -> tuple[Rows, Rows | None]:
    """Keep back the last ``share`` of the rows, in [0, 1); none when it is 0."""
    if not 0 <= share < 1:
        raise ValueError(f"validation_split must be in [0, 1), got {share}")
    at = int(len(rows.y_N2) * (1 - share))
    if share == 0:
        return rows, None
    return Rows(rows.ids_NS[:at], rows.dense_ND[:at], rows.y_N2[:at]), Rows(
        rows.ids_NS[at:], rows.dense_ND[at:], rows.y_N2[at:]
    )


def fit(model: Trainable, recipe: Recipe, train: Rows, held_out: Rows | None, plan: Plan) -> History:
    """Train for ``plan.epochs``; validation leaves the training mode on for the next epoch. Returns the history."""
    history = History()
    order = None if plan.shuffle_seed is None else torch.Generator().manual_seed(plan.shuffle_seed)
    for epoch in range(plan.epochs):
        model.train()
        name = f"epoch {epoch + 1}/{plan.epochs}"
        with tqdm(total=len(train.y_N2), desc=name, unit=" rows", disable=plan.verbose != 1) as bar:
            values = _epoch(model, recipe, train, batches_of(len(train.y_N2), plan.batch_size, order), bar)
            if held_out is not None:
                found = evaluate(model, recipe.tasks, recipe.metrics, held_out, plan.batch_size)
                values |= {f"val_{key}": value for key, value in found.items()}
            bar.set_postfix_str(_text(values))
        if plan.verbose == 2:
            tqdm.write(f"{name} {_text(values)}")
        history.add(epoch, values)
    return history


def evaluate(
    model: Trainable, tasks: Sequence[str], metrics: Sequence[str], rows: Rows, batch_size: int
) -> dict[str, float]:
    """``<task>_<metric>``, exact over all rows; nan where the rows do not define it (an AUC of one class)."""
    p_N2 = model.score(rows.ids_NS, rows.dense_ND, batch_size)
    return {
        f"{task}_{name}": METRICS[name](rows.y_N2[:, i], p_N2[:, i]) for i, task in enumerate(tasks) for name in metrics
    }


def batches_of(rows: int, size: int, order: torch.Generator | None) -> list[Tensor]:
    """Row indices in batches, shuffled when ``order`` is given.

    A last batch of one row joins the one before: batch norm cannot train on a single row.
    """
    if rows < 1 or size < 1:
        raise ValueError(f"need a row and a batch size of at least one, got {rows} rows in batches of {size}")
    index_N = torch.arange(rows) if order is None else torch.randperm(rows, generator=order)
    batches = list(torch.split(index_N, size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _epoch(model: Trainable, recipe: Recipe, rows: Rows, batches: list[Tensor], bar: tqdm[Any]) -> dict[str, float]:
    """One pass. The loss is DeepCTR-Torch 0.3.0's, *summed* over a batch, plus L2; the mean without L2 is reported."""
    tensors = [torch.from_numpy(a) for a in rows]
    total, stats = 0.0, [TaskStats.empty(), TaskStats.empty()]
    for index in batches:
        ids_BS, dense_BD, y_B2 = (a[index].to(model.device) for a in tensors)
        click_B, ctcvr_B = y_B2.unbind(1)
        logits_B2 = model.logits(ids_BS, dense_BD)
        loss = entire_space_loss(logits_B2, click_B, torch.ones_like(click_B), ctcvr_B, 1 - ctcvr_B)
        recipe.optimizer.zero_grad()
        (loss * len(index) + model.l2_penalty()).backward()  # type: ignore[no-untyped-call]
        recipe.optimizer.step()
        total += float(loss.detach()) * len(index)
        p_B2 = torch.sigmoid(logits_B2.detach()).cumprod(1).cpu().numpy()
        stats = [s + TaskStats.of(rows.y_N2[index, i], p_B2[:, i]) for i, s in enumerate(stats)]
        bar.update(len(index))
    by_task = zip(recipe.tasks, stats, strict=True)
    return {"loss": total / len(rows.y_N2)} | {
        f"{task}_{name}": getattr(s, name)() for task, s in by_task for name in recipe.metrics
    }


def _text(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.4f}" for name, value in values.items())
