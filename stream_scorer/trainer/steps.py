"""Learner steps one at a time: at once, or in a thread of their own while the loop decodes and joins on.

Torch releases the interpreter lock, so with ``beside`` a step costs the loop little more than its hand-over. Batches
and their order are the same either way, and whoever looks at the learner collects first: weights, checkpoints and
versions are those of the plain path.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from esmm.batch import Examples, StepStats

NEWEST = 0.05  # the weight of the newest step in the mean


class Step(NamedTuple):
    """A step that was taken."""

    examples: Examples
    settled_ms: int  # every row due before this event time had been handed to the learner
    stats: StepStats
    took_s: float


class Steps:
    """Launch, then collect; never two at once."""

    def __init__(self, step: Callable[[Examples], StepStats], now_s: Callable[[], float], beside: bool) -> None:
        """``step`` is the learner's; ``beside``: in another thread."""
        self._step, self._now_s = step, now_s
        self._thread = ThreadPoolExecutor(1, "learner") if beside else None
        self._flying: Future[Step] | None = None
        self.rows = 0  # in flight
        self.mean_ms = 0.0  # what a step takes, lately

    def launch(self, examples: Examples, settled_ms: int) -> None:
        """Begin; the step before must have been collected. Not beside the loop it raises what the learner raises."""
        if self._flying is not None:
            raise AssertionError("the step before was not collected")
        if self._thread is not None:
            self._flying = self._thread.submit(self._take, examples, settled_ms)
        else:
            taken: Future[Step] = Future()
            taken.set_result(self._take(examples, settled_ms))  # when it raises nothing is in flight
            self._flying = taken
        self.rows = examples.rows

    def collect(self) -> Step | None:
        """The step in flight, waited for; None when there is none. Raises what the learner raised."""
        flying, self._flying, self.rows = self._flying, None, 0
        if flying is None:
            return None
        step = flying.result()
        took_ms = 1_000 * step.took_s
        self.mean_ms += NEWEST * (took_ms - self.mean_ms) if self.mean_ms else took_ms
        return step

    def close(self) -> None:
        """Let a step in flight end, and its thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _take(self, examples: Examples, settled_ms: int) -> Step:
        started_s = self._now_s()
        stats = self._step(examples)
        return Step(examples, settled_ms, stats, self._now_s() - started_s)
