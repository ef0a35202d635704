"""Item rows kept in process: a numpy arena of C slots, found by a dict from id to slot.

A slot keeps its *generation* for as long as its feature values stay the same, bit for bit, also across refetches: the
model may keep what it computed from (slot, generation). Rows are copied out; a slot used by this batch or the one
before it (which may still be in flight) is not given to another item.

Shapes: C slots, B rows of a batch, I different items of it, K of them written, S id slots, D dense floats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count, repeat
from typing import NamedTuple

import numpy as np

from esmm.batch import Bool, FeatureBlock, Int64, SourceLayout
from stream_scorer.core.packed import DecodedRows

NONE = -1
ABSENT_TTL_S = 1.0  # an item that is not in the store may be written any moment
_BATCHES_IN_FLIGHT = 2


class Found(NamedTuple):
    """B items of a batch: each of the I different ones once, in first-seen order."""

    slot_I: Int64  # -1 where there is none
    first_I: Int64  # the first row with this item
    of_B: Int64  # row -> index into I


class ItemCache:
    """A bounded cache with a time to live and second-chance eviction."""

    def __init__(self, layout: SourceLayout, capacity: int, ttl_s: float) -> None:
        """``capacity`` is C, the number of slots; 0 keeps nothing."""
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._slot_of: dict[str, int] = {}
        self._id_of: list[str] = []
        self._ids_CS = np.zeros((capacity, layout.id_width), np.int64)
        self._dense_CD = np.zeros((capacity, layout.dense_width), np.float32)
        self._event_ms_C = np.zeros(capacity, np.int64)
        self._missing_C = np.zeros(capacity, np.bool_)
        self._fetched_s_C = np.zeros(capacity, np.float64)
        self._expires_s_C = np.zeros(capacity, np.float64)
        self._generation_C = np.zeros(capacity, np.int64)
        self._used_C = np.full(capacity, -_BATCHES_IN_FLIGHT, np.int64)  # the last batch that used the slot
        self._second_chance_C = np.zeros(capacity, np.bool_)
        self._at_N = np.zeros(capacity, np.int64)  # scratch of `find`, by slot and then by number
        self._batch = 0
        self._hand = 0
        self._generations = 0

    def __len__(self) -> int:
        """How many items are held."""
        return len(self._slot_of)

    def find(self, items: Sequence[str]) -> Found:
        """Look up a new batch's items, repeats allowed. Starts a batch: the slots found stay put."""
        self._batch += 1
        number_B = np.fromiter(map(self._slot_of.get, items, repeat(NONE)), np.int64, len(items))
        self._number_unknown(items, number_B)
        rows_B, at_N = np.arange(len(items)), self._at_N
        at_N[number_B[::-1]] = rows_B[::-1]  # of several values for one index the last stays: the first row
        first_I = np.flatnonzero(at_N.take(number_B) == rows_B)
        number_I = number_B.take(first_I)
        at_N[number_I] = rows_B[: len(first_I)]
        slot_I = np.where(number_I < self._capacity, number_I, NONE)
        held = slot_I[slot_I >= 0]
        self._used_C[held] = self._batch
        self._second_chance_C[held] = True
        return Found(slot_I, first_I, at_N.take(number_B))

    def _number_unknown(self, items: Sequence[str], number_B: Int64) -> None:
        """Give items without a slot numbers from the capacity on, and room to look all numbers up."""
        new = np.flatnonzero(number_B < 0)
        if len(new):
            numbers: defaultdict[str, int] = defaultdict(count(self._capacity).__next__)
            number_B[new] = [numbers[items[at]] for at in new.tolist()]
        if len(self._at_N) < self._capacity + len(new):
            self._at_N = np.zeros(self._capacity + 2 * len(new), np.int64)

    def fresh(self, slot_I: Int64, now_s: float) -> Bool:
        """Which of these slots hold a row within its time to live."""
        if self._capacity == 0:
            return np.zeros(len(slot_I), np.bool_)
        in_time = (self._fetched_s_C[slot_I] <= now_s) & (now_s < self._expires_s_C[slot_I])  # clocks are set back, too
        return (slot_I >= 0) & in_time

    def usable(self, slot_I: Int64, now_s: float, limit_s: float) -> Bool:
        """Which of these slots hold a row found within the last ``limit_s``: good enough in an outage."""
        if self._capacity == 0:
            return np.zeros(len(slot_I), np.bool_)
        return (slot_I >= 0) & ~self._missing_C[slot_I] & (now_s - self._fetched_s_C[slot_I] <= limit_s)

    def expire(self, items: Iterable[str]) -> int:
        """These were written: the rows held of them, so many, are to be asked for again. Slots and generations stay."""
        slot_N = np.array([self._slot_of.get(item, NONE) for item in items], np.int64)
        held = slot_N[slot_N >= 0]
        self._expires_s_C[held] = -np.inf
        return len(held)

    def expire_all(self) -> None:
        """Any item may have been written."""
        self._expires_s_C[:] = -np.inf

    def rows(self, slot_K: Int64) -> FeatureBlock:
        """Copies of the rows in these slots."""
        return FeatureBlock(self._ids_CS.take(slot_K, axis=0), self._dense_CD.take(slot_K, axis=0))

    def event_ms(self, slot_K: Int64) -> Int64:
        """Event times of the rows in these slots, 0 where missing."""
        return self._event_ms_C[slot_K]

    def missing(self, slot_K: Int64) -> Bool:
        """Which of these slots hold the default vector because the store had no (good) record."""
        return self._missing_C[slot_K]

    def generation(self, slot_I: Int64) -> Int64:
        """Generations of these slots; 0 for slot -1."""
        if self._capacity == 0:
            return np.zeros(len(slot_I), np.int64)
        return np.where(slot_I >= 0, self._generation_C[slot_I], 0)

    def put(self, items: Sequence[str], slot_K: Int64, rows: DecodedRows, now_s: float) -> Int64:
        """Write K rows just fetched, of distinct items; ``slot_K`` are the slots `find` gave.

        Returns the slots now in use, -1 where no slot could be freed.
        """
        slot_K = slot_K.copy()
        new = np.flatnonzero(slot_K < 0)
        if len(new):
            slot_K[new] = self._claim([items[at] for at in new.tolist()])
        kept = np.flatnonzero(slot_K >= 0)
        slot, block, missing = slot_K[kept], rows.block.take(kept), rows.missing_N[kept]
        self._write(slot, block)
        self._event_ms_C[slot] = rows.event_ms_N[kept]
        self._missing_C[slot] = missing
        self._fetched_s_C[slot] = now_s
        self._expires_s_C[slot] = now_s + np.where(missing, min(ABSENT_TTL_S, self._ttl_s), self._ttl_s)
        self._used_C[slot] = self._batch
        return slot_K

    def _write(self, slot_K: Int64, block: FeatureBlock) -> None:
        """Give a new generation to the slots whose values differ in any bit, and only to them."""
        same = (self._ids_CS[slot_K] == block.ids_NS).all(axis=1) & (self._generation_C[slot_K] > 0)
        same &= (self._dense_CD[slot_K].view(np.int32) == block.dense_ND.view(np.int32)).all(axis=1)
        changed = slot_K[~same]
        self._generation_C[changed] = np.arange(self._generations + 1, self._generations + 1 + len(changed))
        self._generations += len(changed)
        self._ids_CS[changed] = block.ids_NS[~same]
        self._dense_CD[changed] = block.dense_ND[~same]

    def _claim(self, items: Sequence[str]) -> Int64:
        """Slots for items that have none: unused ones first, then those nobody asked for lately."""
        unused = min(len(items), self._capacity - len(self._id_of))
        slots = list(range(len(self._id_of), len(self._id_of) + unused))
        self._id_of.extend(items[:unused])
        self._used_C[slots] = self._batch  # or the next line takes them away again
        victims = self._evict(len(items) - unused).tolist() if len(items) > unused else []
        for slot, item in zip(victims, items[unused:], strict=False):
            self._slot_of.pop(self._id_of[slot], None)
            self._id_of[slot] = item
        slots += victims
        self._slot_of.update(zip(items, slots, strict=False))
        claimed_K = np.full(len(items), NONE, np.int64)
        claimed_K[: len(slots)] = slots
        self._generation_C[slots] = 0  # another item's content: never the same, even when its bytes are
        return claimed_K

    def _evict(self, wanted: int) -> Int64:
        """Up to ``wanted`` slots to reuse: the hand passes over what was used since it came by last, once."""
        found: list[Int64] = []
        scanned, step = 0, max(256, 2 * wanted)
        while wanted > 0 and scanned < 2 * self._capacity and self._capacity > 0:
            span = (self._hand + np.arange(min(step, self._capacity))) % self._capacity
            idle = self._batch - self._used_C[span] >= _BATCHES_IN_FLIGHT
            victims = span[idle & ~self._second_chance_C[span]][:wanted]
            stop = len(span) if len(victims) < wanted else int(np.flatnonzero(span == victims[-1])[0]) + 1
            self._second_chance_C[span[:stop]] = False
            self._used_C[victims] = self._batch
            self._hand = int(span[stop - 1] + 1) % self._capacity
            scanned += stop
            wanted -= len(victims)
            found.append(victims)
        return np.concatenate(found) if found else np.empty(0, np.int64)
