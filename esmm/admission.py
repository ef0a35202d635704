"""Admission by count and eviction by inactivity of embedding rows (Monolith, arXiv:2209.07663, section 3.2).

A row of a table, which is a hash bucket or an id, is *seen* by each impression that looks it up. Below ``admit_after``
sightings it is not trained and holds the default vector, zero, which is what an id outside its vocabulary is given
too; not seen for ``evict_after_ms`` of event time it becomes the default vector again, its count starts anew and the
optimiser forgets it. Serving needs to know of neither.

Event time is the median impression time of a batch's first emissions, and never goes back. A conversion comes within
the attribution window of its click, so an ``evict_after_ms`` not shorter than that leaves it a row to learn.

A step's cost does not depend on the tables' size: it touches the rows that were looked up, and looks through a slice
of ``scan_rows`` rows for stale ones, the next slice in the next step. So a row is evicted at most one round late.

Shape suffixes: R rows of all tables of one width, U unique rows of a batch, S id slots, B examples, N sightings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmm.batch import Examples, Kind
from esmm.model import ESMM, Inputs
from esmm.optim import Tables, TablesOfWidth, Touched

_NEVER, _GONE = -1, 2**62  # not seen yet, or loaded from a version; evicted, or never anything but the default


@dataclass(frozen=True)
class AdmissionRule:
    """Both off as it stands. ``admit_after`` 1 trains a row at first sight, ``evict_after_ms`` 0 keeps it for good."""

    admit_after: int = 1
    evict_after_ms: int = 0
    scan_rows: int = 8_192

    def __post_init__(self) -> None:
        """ValueError for a rule that means nothing."""
        if self.admit_after < 1 or self.evict_after_ms < 0 or self.scan_rows < 1:
            raise ValueError(f"admit after 1 or more, evict after 0 or more, scan 1 row or more; got {self}")

    @property
    def on(self) -> bool:
        """Whether it does anything."""
        return self.admit_after > 1 or self.evict_after_ms > 0


class _Rows(NamedTuple):
    """What is known of all rows of one width."""

    tables: TablesOfWidth
    count_R: Tensor  # int32, no more than admit_after
    seen_R: Tensor  # int64, event ms


class Admission:
    """Which rows are trained.

    Every table starts as zeros when the rule is on. What a version or an older checkpoint brings in instead is taken as
    admitted, because a row that is not zero was trained before.
    """

    def __init__(self, model: ESMM, tables: Tables, rule: AdmissionRule) -> None:
        """``tables`` are the model's, as its learner holds them."""
        self.rule = rule
        self._schema, self._inputs, self._tables = model.schema, Inputs(model.schema.columns), tables
        self._facts = torch.zeros(3, dtype=torch.int64)  # event time, slices scanned, rows evicted
        self._admitted = torch.zeros(1, dtype=torch.int64)  # apart: older checkpoints lack it
        self._rows: dict[int, _Rows] = {}
        if not rule.on:
            return
        for width, group in tables.groups.items():
            rows = len(group.weight_RE)
            group.weight_RE.zero_()
            seen_R = torch.full((rows,), _NEVER, dtype=torch.int64)
            self._rows[width] = _Rows(group, torch.zeros(rows, dtype=torch.int32), seen_R)

    @property
    def clock_ms(self) -> int:
        """Event time as far as eviction goes."""
        return int(self._facts[0])

    @property
    def evicted(self) -> int:
        """Rows evicted that held more than the default vector."""
        return int(self._facts[2])

    @property
    def admitted_rows(self) -> int:
        """Rows that were seen often enough; one that is evicted and comes back counts again."""
        return int(self._admitted[0])

    def see(self, examples: Examples) -> None:
        """Count who is looked up by first emissions, note when anybody was, and evict the stale rows of one slice."""
        if not self.rule.on or examples.rows == 0:
            return
        first_B = examples.kind_B == Kind.FIRST
        if first_B.any():
            middle = int(first_B.sum()) // 2
            median_ms = int(np.partition(examples.impression_ms_B[first_B], middle)[middle])
            self._facts[0] = max(self.clock_ms, median_ms)
        for width, (row_N, of_first_N) in self._looked_up(examples, torch.from_numpy(first_B)).items():
            self._note(self._rows[width], row_N, of_first_N)
        if self.rule.evict_after_ms:
            for rows in self._rows.values():
                self._scan(rows)
            self._facts[1] += 1

    def admitted(self, touched: Sequence[Touched]) -> Sequence[Touched]:
        """The same, without gradient where the row is not admitted: such a row is left as it is."""
        if self.rule.admit_after > 1:
            for tables, rows_U, grad_UE in touched:
                count_R = self._rows[tables.weight_RE.shape[1]].count_R
                trained_U = tables.weight_RE.index_select(0, rows_U).ne(0).any(1)
                allowed_U = trained_U | (count_R.index_select(0, rows_U) >= self.rule.admit_after)
                grad_UE.mul_(allowed_U[:, None])
        return touched

    def state(self) -> dict[str, Tensor]:
        """What a restart needs, nothing when the rule is off; not copied."""
        if not self.rule.on:
            return {}
        parts = {f"{width}.{name}": getattr(r, f"{name}_R") for width, r in self._rows.items() for name in _COLUMNS}
        return {"facts": self._facts, "admitted": self._admitted, **parts}

    def facts(self) -> dict[str, Any]:
        """JSON data for a version's manifest, nothing when the rule is off."""
        rule = self.rule
        facts = {"admit_after": rule.admit_after, "evict_after_ms": rule.evict_after_ms, **self.counts()}
        return {"embedding_rows": facts} if rule.on else {}

    def counts(self) -> dict[str, int]:
        """Rows ``admitted`` and rows ``evicted``, ever; nothing when the rule is off."""
        return {"admitted": self.admitted_rows, "evicted": self.evicted} if self.rule.on else {}

    def forget(self) -> None:
        """Know of no row: a checkpoint from before the rule was switched on is restored."""
        self._facts.zero_()
        self._admitted.zero_()
        for rows in self._rows.values():
            rows.count_R.zero_()
            rows.seen_R.fill_(_NEVER)

    def _looked_up(self, examples: Examples, first_B: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """By width, the rows that the examples look up, as often as they do, and whether by a first emission."""
        ids_BS, _ = self._schema.pack(examples.user, examples.item, examples.context)
        rows_SB, counts_SB = self._inputs.rows(torch.from_numpy(ids_BS))
        for history in self._inputs.histories:  # no padding
            span = slice(history.start, history.stop)
            if history.column.length_name is None:
                counts_SB[span] &= rows_SB[span] != 0
            else:
                counts_SB[span] &= torch.arange(history.column.maxlen)[:, None] < rows_SB[history.stop]
        slots = [(table, slot, slot + 1) for table, slot in self._inputs.sparse]
        slots += [(history.column.table, history.start, history.stop) for history in self._inputs.histories]
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for table, start, stop in slots:
            group, first_row = self._tables.place(table)
            counts_TB = counts_SB[start:stop]
            row_N = rows_SB[start:stop][counts_TB] + first_row
            found.setdefault(group.weight_RE.shape[1], []).append((row_N, first_B.expand_as(counts_TB)[counts_TB]))
        return {width: (torch.cat([r for r, _ in p]), torch.cat([f for _, f in p])) for width, p in found.items()}

    def _note(self, rows: _Rows, row_N: Tensor, of_first_N: Tensor) -> None:
        before_N = rows.count_R.index_select(0, row_N)
        rows.seen_R.index_fill_(0, row_N, self.clock_ms)
        rows.count_R.index_add_(0, row_N, of_first_N.to(torch.int32))
        enough_N = rows.count_R.index_select(0, row_N).clamp_(max=self.rule.admit_after)
        admitted_N = row_N[(before_N < enough_N) & (enough_N == self.rule.admit_after)]
        self._admitted += len(admitted_N.unique())  # type: ignore[no-untyped-call]
        rows.count_R.index_copy_(0, row_N, enough_N)  # equal where a row repeats; no count can overflow

    def _scan(self, rows: _Rows) -> None:
        """One slice: begin to time who was loaded, reset who was not seen for too long."""
        slices = -(-len(rows.seen_R) // self.rule.scan_rows)
        start = int(self._facts[1]) % slices * self.rule.scan_rows
        seen_R = rows.seen_R[start : start + self.rule.scan_rows]
        seen_R[seen_R == _NEVER] = self.clock_ms
        stale_U = (seen_R < self.clock_ms - self.rule.evict_after_ms).nonzero()[:, 0] + start
        if not len(stale_U):
            return
        weight_RE = rows.tables.weight_RE
        self._facts[2] += weight_RE.index_select(0, stale_U).ne(0).any(1).sum()
        for column in (weight_RE, *rows.tables.state.values(), rows.count_R):
            column.index_fill_(0, stale_U, 0)
        rows.seen_R.index_fill_(0, stale_U, _GONE)


_COLUMNS = ("count", "seen")
