"""The machine's clock."""

from __future__ import annotations

import time


class SystemClock:
    """Time as the machine has it (`stream_scorer.ports.Clock`)."""

    def now_ms(self) -> int:
        """Wall clock, milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()
