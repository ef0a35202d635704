"""One method on one world: the rows that its joiner would emit, in order of emission, and what the learner makes of them.

Each hour of the test period is predicted with the model as it stands at the start of the hour, then the rows emitted
in that hour are learned (reference: prequential evaluation). Every method starts from the same pretrained state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esmm.batch import Examples, Kind
from esmm.delay import METHODS, Method
from esmm.learner import Learner, LearnerConfig
from esmm.metrics import TaskStats
from esmm.model import ESMM
from esmm.optim import RowRule
from tests.bench.learning_world import World

TOWERS, BATCH = (64, 32), 1_024
LEARNING_RATE, EMBEDDING_RATE = 1e-3, 0.02  # the trainer's defaults; a factor multiplies both
PRETRAIN_RATE, HEAD_EPOCHS = 1.0, 3
SYNC_HOURS = 48
TASKS = ("ctr", "cvr", "ctcvr")
METRICS = ("auc", "pr_auc", "nll", "pcoc", "ece")


class Rows(NamedTuple):
    """R emitted rows in order of time; columns as in `esmm.batch.Examples`."""

    at_R: np.ndarray
    impression_R: np.ndarray  # index into the world
    kind_R: np.ndarray
    conversion_R: np.ndarray
    observed_R: np.ndarray


def emitted(world: World, method: Method, start: float, end: float) -> Rows:
    """What the joiner emits in ``start <= t < end``, for a method's windows and kinds of rows."""
    wait = world.observation if method.observes else 0.0
    first_at_N = np.maximum(world.at_N + world.click_window, np.where(world.click_N, world.click_at_N + wait, -np.inf))
    seen_N = world.converted_N & (world.converted_at_N <= np.where(world.click_N, world.click_at_N, 0.0) + wait)
    if method.eventual_label:
        seen_N = world.converted_N
    parts = [(Kind.FIRST, np.arange(len(first_at_N)), first_at_N, seen_N)]
    if method.needs_late:
        late = np.flatnonzero(world.converted_N & ~seen_N)
        at_L = np.maximum(world.converted_at_N, first_at_N)[late]
        parts.append((Kind.LATE_CONVERSION, late, at_L, world.converted_N[late]))
    if method.needs_matured:
        clicked = np.flatnonzero(world.click_N)
        at_C = world.click_at_N[clicked] + world.attribution
        parts.append((Kind.MATURED, clicked, at_C, world.converted_N[clicked]))
    at_R = np.concatenate([part[2] for part in parts])
    order = np.argsort(at_R, kind="stable")
    order = order[(at_R[order] >= start) & (at_R[order] < end)]
    impression_R = np.concatenate([part[1] for part in parts])[order]
    kind_R = np.concatenate([np.full(len(part[1]), part[0], np.uint8) for part in parts])[order]
    conversion_R = np.concatenate([part[3] for part in parts])[order].astype(np.float32)
    return Rows(at_R[order], impression_R, kind_R, conversion_R, seen_N[impression_R].astype(np.float32))


def examples_of(world: World, rows: Rows, index: np.ndarray) -> Examples:
    """Some of the emitted rows, with their features as they were shown."""
    impression_B = rows.impression_R[index]
    return world.examples.take(impression_B)._replace(
        kind_B=rows.kind_R[index],
        click_B=world.click_N[impression_B].astype(np.float32),
        conversion_B=rows.conversion_R[index],
        observed_B=rows.observed_R[index],
    )


def learn(learner: Learner, world: World, rows: Rows, low: int, high: int, batch: int = BATCH) -> None:
    """Rows ``low`` to ``high`` in equal batches of at most ``batch``."""
    if high <= low:
        return
    for index in np.array_split(np.arange(low, high), -(-(high - low) // batch)):
        if not learner.step(examples_of(world, rows, index)).finite:
            raise RuntimeError("a step was not finite")


def learner_for(world: World, method: str, rate: float, seed: int) -> Learner:
    """Deep towers over embeddings; ``rate`` multiplies the default learning rates."""
    config = LearnerConfig(
        method=method,
        learning_rate=LEARNING_RATE * rate,
        embedding=RowRule(learning_rate=EMBEDDING_RATE * rate),
        seed=seed,
    )
    return Learner(ESMM(world.schema, TOWERS, init_std=0.01, seed=seed), config, lambda *_: None)


@dataclass(frozen=True)
class Pretrained:
    """Where the state that every method starts from was saved: what t means differs for FNC."""

    plain: Path
    odds: Path

    def of(self, method: str) -> Path:
        return self.odds if METHODS[method].odds_correction else self.plain


def pretrain(world: World, seed: int, folder: Path) -> Pretrained:
    """One pass over the matured impressions of the pretraining period, then the heads on its matured clicks."""
    out = Pretrained(folder / "plain", folder / "odds")
    end = float(world.plan.pretrain)
    for path, method in ((out.plain, "oracle"), (out.odds, "fnc")):
        path.mkdir(parents=True)
        learner = learner_for(world, method, PRETRAIN_RATE, seed)
        rows = emitted(world, METHODS[method], 0.0, end)
        if method == "fnc":  # all conversions are known by now: each next to its impression
            rows = beside(world, end - world.click_window)
        learn(learner, world, rows, 0, len(rows.at_R))
        learner.save(path)
    heads = learner_for(world, "defuse", 1.0, seed)
    heads.restore(out.plain)
    rows = emitted(world, METHODS["defuse"], world.attribution, world.attribution + end)
    matured = np.flatnonzero((rows.kind_R == Kind.MATURED) & (world.at_N[rows.impression_R] < end))
    rows = Rows(*(column[matured] for column in rows))
    for _ in range(HEAD_EPOCHS):
        learn(heads, world, rows, 0, len(rows.at_R))
    heads.save(out.plain)
    return out


def beside(world: World, end: float) -> Rows:
    """FNC's rows of the impressions before ``end``, each conversion directly after its impression."""
    index = np.flatnonzero(world.at_N < end)
    late = index[world.converted_N[index]]
    impression_R = np.concatenate([index, late])
    at_R = world.at_N[impression_R]
    order = np.argsort(at_R, kind="stable")
    kind_R = np.repeat([Kind.FIRST, Kind.LATE_CONVERSION], [len(index), len(late)]).astype(np.uint8)
    none_R = np.zeros(len(order), np.float32)
    return Rows(at_R[order], impression_R[order], kind_R[order], (kind_R[order] == 1).astype(np.float32), none_R)


class Predicted(NamedTuple):
    """Predictions of the test period's impressions ``low:high`` of the world."""

    low: int
    ctr_N: np.ndarray
    ctcvr_N: np.ndarray


def run(world: World, method: str | None, rate: float, seed: int, start: Pretrained) -> Predicted:
    """Prequential predictions of the test period; None is the frozen pretrained model."""
    learner = learner_for(world, method or "oracle", rate, seed)
    learner.restore(start.of(method or "oracle"))
    rows = emitted(world, METHODS[method], world.start, world.end) if method else None
    parts = []
    for hour in np.arange(world.start, world.end):
        if hour >= world.test_start:
            low, high = np.searchsorted(world.at_N, [hour, hour + 1])
            parts.append(learner.predict(world.examples.take(np.arange(low, high))))
        if rows is not None:
            low, high = np.searchsorted(rows.at_R, [hour, hour + 1])
            learn(learner, world, rows, low, high)
    low = int(np.searchsorted(world.at_N, world.test_start))
    return Predicted(low, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def measure(world: World, predicted: Predicted) -> dict[str, dict[str, dict[str, float]]]:
    """``"labels"`` (eventual) and ``"truth"`` (each label replaced by its probability) -> task -> metric."""
    span = slice(predicted.low, predicted.low + len(predicted.ctr_N))
    ctr_N, ctcvr_N = predicted.ctr_N.astype(np.float64), predicted.ctcvr_N.astype(np.float64)
    cvr_N = np.clip(ctcvr_N / np.maximum(ctr_N, 1e-12), 0.0, 1.0)
    click_N, converted_N = world.click_N[span], world.converted_N[span]
    a_N, p_N = world.a_N[span], world.p_N[span]
    labels = {
        "ctr": TaskStats.of(click_N, ctr_N),
        "cvr": TaskStats.of(converted_N[click_N], cvr_N[click_N]),
        "ctcvr": TaskStats.of(converted_N, ctcvr_N),
    }
    truth = {
        "ctr": expected(a_N, ctr_N, np.ones(len(a_N))),
        "cvr": expected(p_N, cvr_N, a_N),
        "ctcvr": expected(a_N * p_N, ctcvr_N, np.ones(len(a_N))),
    }
    by = {"labels": labels, "truth": truth}
    return {kind: {task: metrics_of(stats) for task, stats in tasks.items()} for kind, tasks in by.items()}


def daily_pcoc(world: World, predicted: Predicted) -> list[float]:
    """Predicted over true CTCVR, a value a day of the test period."""
    span = slice(predicted.low, predicted.low + len(predicted.ctr_N))
    day_N = ((world.at_N[span] - world.test_start) // 24).astype(int)
    true_D = np.bincount(day_N, (world.a_N * world.p_N)[span])
    return [float(ratio) for ratio in np.bincount(day_N, predicted.ctcvr_N.astype(np.float64)) / true_D]


def expected(true_N: np.ndarray, predicted_N: np.ndarray, weight_N: np.ndarray) -> TaskStats:
    """Statistics as they are in expectation over labels drawn from ``true_N``."""
    label_2N = np.repeat([1.0, 0.0], len(true_N))
    return TaskStats.of(label_2N, np.tile(predicted_N, 2), np.concatenate([weight_N * true_N, weight_N * (1 - true_N)]))


def metrics_of(stats: TaskStats) -> dict[str, float]:
    values = (stats.auc(), stats.pr_auc(), stats.logloss(), stats.pcoc(), stats.ece())
    return dict(zip(METRICS, values, strict=True))


def sync_intervals(world: World, method: str, rate: float, seed: int, start: Pretrained) -> dict[str, Predicted]:
    """The same learner, a step a minute, served three ways: with weights a minute, up to an hour or up to a day old.

    Over the first `SYNC_HOURS` of the test period. A minute has about a thirtieth of a batch's rows; the rate is a
    quarter, so that small steps are not all noise.
    """
    learner = learner_for(world, method, rate / 4, seed)
    learner.restore(start.of(method))
    rows = emitted(world, METHODS[method], world.start, world.end)
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"minute": [], "hour": [], "day": []}

    def predict(interval: str, since: float, until: float) -> None:
        low, high = np.searchsorted(world.at_N, [since, min(until, world.end)])
        if high > low:
            parts[interval].append(learner.predict(world.examples.take(np.arange(low, high))))

    for hour in range(world.plan.warm_up + min(SYNC_HOURS, world.plan.test)):
        now, testing = world.start + hour, hour >= world.plan.warm_up
        if testing:
            predict("hour", now, now + 1)
        if testing and (hour - world.plan.warm_up) % 24 == 0:
            predict("day", now, now + 24)
        minutes = now + np.arange(61) / 60
        for since, until in zip(minutes[:-1], minutes[1:], strict=True):
            if testing:
                predict("minute", since, until)
            low, high = np.searchsorted(rows.at_R, [since, until])
            learn(learner, world, rows, low, high)
    low = int(np.searchsorted(world.at_N, world.test_start))
    return {
        interval: Predicted(low, *(np.concatenate(column) for column in zip(*got, strict=True)))
        for interval, got in parts.items()
    }
