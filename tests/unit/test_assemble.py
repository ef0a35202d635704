import numpy as np
import pytest

from esmm.batch import SourceLayout
from stream_scorer.core.assemble import assemble, context_block, first_seen, plan
from stream_scorer.core.messages import ScoreRequest
from tests.builders import CONTEXT, fetched, request


def naive_context(requests: list[ScoreRequest], layout: SourceLayout) -> tuple[np.ndarray, np.ndarray]:
    """The same, one value at a time."""
    rows = [(one, at) for one in requests for at in range(len(one.items))]
    ids = np.zeros((len(rows), layout.id_width), np.int64)
    dense = np.zeros((len(rows), layout.dense_width), np.float32)
    for row, (one, at) in enumerate(rows):
        for slots, out in ((layout.ids, ids), (layout.dense, dense)):
            for slot in slots:
                value = one.context.get(slot.name, 0)
                if slot.name in one.item_context:
                    value = one.item_context[slot.name][at]
                for column, number in enumerate(value if isinstance(value, list) else [value]):
                    out[row, slot.start + column] = number
    return ids, dense


MIXED = [
    request("plain", ["a", "b"]),
    request("by-request", ["c"], context={"hour": 3, "recent": [7], "place": [1, 0.5], "speed": 2}),
    request("by-row", ["a", "d", "e"], item_context={"hour": [1, 2, 3], "recent": [[], [1, 2, 3], [9]]}),
    request("both", ["f", "g"], context={"hour": 2**60 + 1}, item_context={"place": [[1, 2], [3, 4]]}),
]


@pytest.mark.parametrize(
    "requests",
    [MIXED, MIXED[:1], MIXED[1:2], MIXED[2:3], MIXED[::-1], [MIXED[1], MIXED[3]], [MIXED[2], MIXED[2]], []],
)
def test_context_equals_one_value_at_a_time(requests: list[ScoreRequest]) -> None:
    starts = plan(requests).starts
    block = context_block(requests, starts, CONTEXT)
    ids, dense = naive_context(requests, CONTEXT)
    np.testing.assert_array_equal(block.ids_NS, ids)
    np.testing.assert_array_equal(block.dense_ND, dense)
    assert (block.ids_NS.dtype, block.dense_ND.dtype) == (np.int64, np.float32)


def test_a_plan_lists_users_and_items_request_after_request() -> None:
    got = plan(
        [
            request("r1", ["b", "a"], user_id="u2"),
            request("r2", ["c", "b", "d"], user_id="u1"),
            request("r3", ["a"], user_id="u2"),
        ]
    )
    assert got.users == ["u2", "u1", "u2"]
    assert got.items == ["b", "a", "c", "b", "d", "a"]
    assert got.starts.tolist() == [0, 2, 5, 6]
    assert got.rows == 6


def test_values_once_in_first_seen_order() -> None:
    values, of = first_seen(["b", "a", "c", "b", "d", "a"])
    assert values == ["b", "a", "c", "d"]
    assert of.tolist() == [0, 1, 2, 0, 3, 1]


def test_an_empty_plan() -> None:
    got = plan([])
    assert (got.rows, got.users, got.items, got.starts.tolist()) == (0, [], [], [0])


def test_a_batch_points_rows_at_what_was_fetched() -> None:
    requests = [request("r1", ["a", "b"]), request("r2", ["b"], user_id="u2", context={"hour": 5})]
    batch_plan, features = plan(requests), fetched(plan(requests))
    features.items.slot_N[:] = [4, -1]
    features.items.generation_N[:] = [9, 0]
    batch = assemble(requests, batch_plan, features, CONTEXT)
    assert batch.rows == 3
    assert batch.user is features.users.block
    assert batch.item is features.items.block
    assert batch.user_of_B.tolist() == [0, 0, 1]
    assert batch.item_of_B.tolist() == [0, 1, 1]
    assert batch.item_slot_I.tolist() == [4, -1]
    assert batch.item_generation_I.tolist() == [9, 0]
    assert batch.context.ids_NS[:, 0].tolist() == [0, 0, 5]
