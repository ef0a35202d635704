"""One time budget, shared by every step of a shutdown, a revoke or a fetch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on a monotonic clock. ``now_s`` is that clock, passed in: core owns none."""

    at_s: float
    now_s: Callable[[], float]

    @classmethod
    def after(cls, seconds: float, now_s: Callable[[], float]) -> Deadline:
        """The moment ``seconds`` from now."""
        return cls(now_s() + seconds, now_s)

    @property
    def left_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - self.now_s())

    @property
    def passed(self) -> bool:
        """Whether nothing is left."""
        return self.left_s <= 0.0
