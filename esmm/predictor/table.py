"""First-layer parts in one table: cached items by slot, then this batch's other items, then its users.

One table, so that a row of the batch is the sum of two table rows: one gather-and-add for both. Its tags live in numpy:
a part is valid exactly when both the slot and the generation stored for its row are the ones asked for. Tags belong to
the thread that launches batches, parts to the thread that computes them, in the same order.
Shapes: I unique items of a batch, N rows written, T = 2 * H as in fold.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmm.batch import Bool, Int64

_NEVER = np.iinfo(np.int64).min


class Placement(NamedTuple):
    """Where each item's part is, and which parts must be computed and written before they are read."""

    row_I: Int64
    missed_M: Int64  # indices into I


class PartTable:
    """``capacity`` cached item parts and scratch space for ``scratch`` items and as many users."""

    def __init__(self, capacity: int, scratch: int, width: int, dtype: torch.dtype, device: str) -> None:
        """Memory is reserved, and touched only where parts are written."""
        self.capacity = capacity
        self.scratch = scratch
        self.parts = torch.empty((capacity + 2 * scratch, width), dtype=dtype, device=device)
        self._slot = np.full(capacity, _NEVER)
        self._generation = np.full(capacity, _NEVER)
        self._claim = np.zeros(capacity, np.int64)
        self.poisoned = np.zeros(len(self.parts), np.bool_)  # rows whose part holds NaN or infinity
        self.clean = True  # no row was ever poisoned: nothing to look up

    @property
    def first_user(self) -> int:
        """The table row of the batch's user 0."""
        return self.capacity + self.scratch

    def place(self, slot_I: Int64, generation_I: Int64) -> Placement:
        """A row for every item of a batch, at most ``scratch`` of them. Slot -1 is never cached.

        Slots beyond the capacity share rows (slot modulo capacity). A row that this batch reads is never given away
        within it: of several items that want one row a valid part wins, and the losers go to scratch.
        """
        row_I = np.arange(self.capacity, self.capacity + len(slot_I))
        if self.capacity == 0:
            return Placement(row_I, np.arange(len(slot_I)))
        wanted_I = slot_I % self.capacity
        cached_I = slot_I >= 0
        hit_I = cached_I & (self._slot[wanted_I] == slot_I) & (self._generation[wanted_I] == generation_I)
        index_I = np.arange(len(slot_I))
        self._claim[wanted_I[cached_I]] = index_I[cached_I]
        self._claim[wanted_I[hit_I]] = index_I[hit_I]
        kept_I = cached_I & ((self._claim[wanted_I] == index_I) | hit_I)
        return Placement(np.where(kept_I, wanted_I, row_I), index_I[~hit_I])

    def claim(self, placement: Placement, slot_I: Int64, generation_I: Int64) -> Int64:
        """Tag the missed parts as valid and say where they go (M): to be written before a later batch is computed."""
        rows_M = placement.row_I[placement.missed_M]
        kept_M = rows_M < self.capacity
        at, missed = rows_M[kept_M], placement.missed_M[kept_M]
        self._slot[at], self._generation[at] = slot_I[missed], generation_I[missed]
        return rows_M

    def forget(self) -> None:
        """No part is valid: one that was tagged was not written."""
        self._slot.fill(_NEVER)

    def write_items(self, rows_M: Int64, part_MT: Tensor) -> None:
        """Store the missed parts."""
        self.parts.index_copy_(0, torch.from_numpy(rows_M).to(self.parts.device), part_MT.to(self.parts.dtype))
        self.watch(rows_M, _bad(part_MT))

    def write_users(self, part_UT: Tensor) -> None:
        """Store the batch's user parts, at most ``scratch``."""
        self.parts[self.first_user : self.first_user + len(part_UT)].copy_(part_UT)
        self.watch_users(_bad(part_UT))

    def watch_users(self, bad_U: Bool) -> None:
        """As `watch`, of the batch's users."""
        self.watch(np.arange(self.first_user, self.first_user + len(bad_U)), bad_U)

    def watch(self, rows_N: Int64, bad_N: Bool) -> None:
        """Remember parts that are not finite: a fused activation makes 0 of NaN, and the score would look right."""
        if self.clean and not bad_N.any():
            return
        self.clean = False
        self.poisoned[rows_N] = bad_N


def _bad(part_NT: Tensor) -> Bool:
    bad_N: Bool = (~torch.isfinite(part_NT.sum(1))).cpu().numpy()
    return bad_N
