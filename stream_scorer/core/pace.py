"""How many rows a batch may have, so that most batches are done within a target time.

Additive increase, multiplicative decrease. A batch over the target cuts the rows by a fifth; one within it adds a
hundredth of the present size. It takes some twenty steps up to make up for one down, so that where the target binds
about one batch in twenty passes it: the 95th percentile.
"""

from __future__ import annotations

UP = 0.01
DOWN = 0.8
LEAST_ROWS = 64


class Pace:
    """The rows that the next batch may have."""

    def __init__(self, max_rows: int, target_s: float) -> None:
        """``target_s`` 0: always ``max_rows``."""
        self._max_rows = max_rows
        self._target_s = target_s
        self._rows = float(max_rows)
        self._cut = False

    @property
    def rows(self) -> int:
        """At most ``max_rows``, at least `LEAST_ROWS` of them."""
        return int(self._rows)

    def took(self, full: bool, seconds: float) -> None:
        """Hear that a batch took ``seconds``; ``full``: it held as many requests as were allowed.

        One that was not full says nothing about sizes, late or not. The one in flight behind a slow one was as large.
        """
        if self._target_s <= 0 or not full:
            return
        late = seconds > self._target_s
        if late and not self._cut:
            self._rows = max(self._rows * DOWN, min(LEAST_ROWS, self._max_rows))
        elif not late:
            self._rows = min(self._rows * (1 + UP), float(self._max_rows))
        self._cut = late and not self._cut
