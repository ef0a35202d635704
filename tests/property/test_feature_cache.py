"""The item cache against a dictionary: whatever is asked for, rows are right and (slot, generation) names content."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esmm.batch import FeatureBlock, Slot, SourceLayout
from stream_scorer.adapters.feature_cache import ItemCache
from stream_scorer.core.packed import DecodedRows

LAYOUT = SourceLayout("item", (Slot("a", "sparse", 0, 1),), (Slot("b", "dense", 0, 1),))
TTL_S = 10.0


def rows(values: list[int]) -> DecodedRows:
    """Value 0 is a record that is not there."""
    ids = np.array(values, np.int64).reshape(-1, 1)
    missing = ids[:, 0] == 0
    block = FeatureBlock(ids, ids.astype(np.float32))
    return DecodedRows(block, np.where(missing, 0, ids[:, 0]), missing, missing.astype(np.uint8))


batches = st.lists(
    st.tuples(st.lists(st.integers(0, 12), max_size=12), st.floats(0, 8), st.lists(st.integers(0, 3))),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(capacity=st.integers(0, 8), script=batches)
def test_rows_slots_and_generations(capacity: int, script: list[tuple[list[int], float, list[int]]]) -> None:
    cache = ItemCache(LAYOUT, capacity, TTL_S)
    truth = dict.fromkeys(range(13), 1)
    content: dict[tuple[int, int], int] = {}
    fetched_at: dict[int, float] = {}
    last_slots: dict[int, int] = {}
    now_s = 1_000.0
    for asked, passed_s, changes in script:
        now_s += passed_s
        for at, value in enumerate(changes):
            truth[(at * 5) % 13] = value
        numbers = list(dict.fromkeys(asked))  # once each, in first-seen order
        items = [f"i{n}" for n in numbers]
        found = cache.find([f"i{n}" for n in asked])
        assert [asked[at] for at in found.first_I.tolist()] == numbers
        assert [numbers[at] for at in found.of_B.tolist()] == asked
        slot = found.slot_I
        fresh = cache.fresh(slot, now_s)
        for at in np.flatnonzero(fresh).tolist():
            assert now_s - fetched_at[numbers[at]] < TTL_S
        wanted = np.flatnonzero(~fresh)
        values = [truth[numbers[at]] for at in wanted.tolist()]
        slot[wanted] = cache.put([items[at] for at in wanted.tolist()], slot[wanted], rows(values), now_s)
        fetched_at |= {numbers[at]: now_s for at in wanted.tolist()}
        held = np.flatnonzero(slot >= 0)
        assert len(set(slot[held].tolist())) == len(held), "two items of a batch in one slot"
        assert len(cache) <= capacity
        reused = set(last_slots) - set(numbers)
        for number in reused:  # a batch may still be in flight on the slots of the one before
            assert last_slots[number] not in slot[held].tolist()
        block, generation = cache.rows(slot[held]), cache.generation(slot)[held]
        for at, row in zip(held.tolist(), range(len(held)), strict=True):
            value = int(block.ids_NS[row, 0])
            assert content.setdefault((int(slot[at]), int(generation[row])), value) == value
            if at in wanted.tolist():
                assert value == truth[numbers[at]]
        last_slots = {numbers[at]: int(slot[at]) for at in held.tolist()}


def test_a_popular_item_stays_while_others_pass() -> None:
    cache = ItemCache(LAYOUT, 64, TTL_S)

    def ask(numbers: list[int]) -> int:
        items = [f"i{n}" for n in numbers]
        slot = cache.find(items).slot_I
        missed = np.flatnonzero(slot < 0)
        cache.put([items[at] for at in missed.tolist()], slot[missed], rows([1] * len(missed)), 0.0)
        return len(missed)

    ask(list(range(8)))
    misses = sum(ask([*range(8), *range(100 + 10 * at, 110 + 10 * at)]) - 10 for at in range(100))
    assert misses == 0, "a thousand items seen once must not push out eight that are always there"
