"""Rows on their way into the learner."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, FeatureBlock, concat_examples
from stream_scorer.core.emit import Emission, assemble
from stream_scorer.core.watermark import BEGINNING

Arrays = dict[str, NDArray[Any]]
_BLOCKS = ("user", "item", "context")


class Pending:
    """Emissions in order, cut into steps of any size. Restored rows come as `Examples`, ahead of new ones."""

    def __init__(self) -> None:
        """Empty."""
        self._carry: Examples | None = None
        self._emissions: deque[Emission] = deque()
        self._emitted = 0  # rows of them
        self._marks: deque[list[int]] = deque()  # rows, and the watermark after they were emitted
        self.settled_ms = BEGINNING  # every row due before this event time has been taken

    @property
    def rows(self) -> int:
        """Rows waiting."""
        return self._emitted + (self._carry.rows if self._carry is not None else 0)

    def extend(self, emissions: Sequence[Emission], watermark_ms: int) -> None:
        """Rows that follow those before, with the event time at which they were emitted."""
        if emissions:
            rows = sum(emission.rows for emission in emissions)
            self._emissions.extend(emissions)
            self._emitted += rows
            self._marks.append([rows, watermark_ms])
        elif self._marks:
            self._marks[-1][1] = watermark_ms
        else:
            self.settled_ms = max(self.settled_ms, watermark_ms)

    def take(self, rows: int) -> Examples:
        """The oldest ``rows`` rows, 1 <= rows <= `rows`."""
        self._settle(rows)
        carry, parts = self._carry, []
        if carry is not None:
            parts.append(carry.take(np.arange(min(rows, carry.rows))))
            self._carry = carry.take(np.arange(rows, carry.rows)) if carry.rows > rows else None
            rows -= parts[0].rows
        if rows:
            parts.append(assemble(self._oldest(rows)))
        return parts[0] if len(parts) == 1 else concat_examples(parts)

    def _oldest(self, rows: int) -> list[Emission]:
        """So many rows' emissions, the last one cut where it has more."""
        self._emitted -= rows
        out: list[Emission] = []
        while rows:
            emission = self._emissions.popleft()
            if emission.rows > rows:
                emission, rest = emission.split(rows)
                self._emissions.appendleft(rest)
            out.append(emission)
            rows -= emission.rows
        return out

    def _settle(self, rows: int) -> None:
        while self._marks and rows >= self._marks[0][0]:
            count, self.settled_ms = self._marks.popleft()
            rows -= count
        if rows:
            self._marks[0][0] -= rows

    def snapshot(self) -> Examples | None:
        """All rows, without taking them."""
        parts = [self._carry] if self._carry is not None else []
        if self._emissions:
            parts.append(assemble(self._emissions))
        return concat_examples(parts) if parts else None

    def restore(self, examples: Examples | None, watermark_ms: int) -> None:
        """Start from these rows, all emitted by this event time."""
        self._carry, self._emissions, self._emitted, self.settled_ms = examples, deque(), 0, BEGINNING
        self._marks = deque([[examples.rows, watermark_ms]] if examples is not None else [])


def to_arrays(prefix: str, examples: Examples | None) -> Arrays:
    """Named arrays of a batch, for a file; nothing for None."""
    if examples is None:
        return {}
    out: Arrays = {}
    for name in _BLOCKS:
        block: FeatureBlock = getattr(examples, name)
        out |= {f"{prefix}.{name}.ids_NS": block.ids_NS, f"{prefix}.{name}.dense_ND": block.dense_ND}
    for name in Examples._fields[len(_BLOCKS) :]:
        out[f"{prefix}.{name}"] = getattr(examples, name)
    return out


def from_arrays(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Examples | None:
    """The batch of `to_arrays`. ValueError when arrays are missing."""
    mine = {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}
    if not mine:
        return None
    try:
        user, item, context = (FeatureBlock(mine[f"{name}.ids_NS"], mine[f"{name}.dense_ND"]) for name in _BLOCKS)
        return Examples(user, item, context, *(mine[name] for name in Examples._fields[len(_BLOCKS) :]))
    except KeyError as error:
        raise ValueError(f"rows {prefix!r} lack the array {error.args[0]!r}") from error
