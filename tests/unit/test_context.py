from typing import Any

import pytest

from esmm.batch import SourceLayout
from stream_scorer.core.context import check_context, slots_by_name
from tests.builders import CONTEXT, request

SLOTS = slots_by_name(CONTEXT)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"context": {"hour": -(2**63)}},
        {"context": {"hour": 2**63 - 1, "speed": 1}},
        {"context": {"recent": []}},
        {"context": {"recent": [1, 2, 3], "recent_length": 3}},
        {"context": {"place": [1, 2.5]}},
        {"item_context": {"recent": [[], [1]], "place": [[1, 2], [3, 4]], "recent_length": [0, 1]}},
        {"context": {"hour": 1}, "item_context": {"position": [1, 2]}},
    ],
)
def test_what_fits(fields: dict[str, Any]) -> None:
    assert check_context(request(**fields), SLOTS) is None


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ({"context": {"day": 1}}, "context_unknown", "known: hour, position"),
        ({"item_context": {"day": [1, 2]}}, "context_unknown", "'day'"),
        ({"context": {"hour": 1}, "item_context": {"hour": [1, 2]}}, "context_shape", "give it once"),
        ({"context": {"hour": [1]}}, "context_shape", "takes a number, not a list"),
        ({"context": {"hour": 0.5}}, "context_shape", "takes whole numbers"),
        ({"context": {"hour": 2**63}}, "context_shape", "does not fit int64"),
        ({"context": {"hour": -(2**63) - 1}}, "context_shape", "does not fit int64"),
        ({"context": {"recent_length": -1}}, "context_shape", "must not be negative"),
        ({"context": {"recent": 1}}, "context_shape", "takes a list"),
        ({"context": {"recent": [1, 2, 3, 4]}}, "context_shape", "at most 3 ids, got 4"),
        ({"context": {"recent": [1, 0.5]}}, "context_shape", "takes whole numbers"),
        ({"context": {"place": [1]}}, "context_shape", "exactly 2 numbers, got 1"),
        ({"context": {"place": [1, 2, 3]}}, "context_shape", "exactly 2 numbers, got 3"),
        ({"context": {"speed": 1e39}}, "context_shape", "does not fit float32"),
        ({"context": {"speed": -(10**400)}}, "context_shape", "does not fit float32"),
        ({"item_context": {"position": [1]}}, "context_shape", "1 values for 2 items"),
        ({"item_context": {"position": [1, 2, 3]}}, "context_shape", "3 values for 2 items"),
        ({"item_context": {"position": [1, [2]]}}, "context_shape", "takes a number, not a list"),
        ({"item_context": {"place": [[1, 2], [3]]}}, "context_shape", "exactly 2 numbers, got 1"),
        ({"item_context": {"place": [[1, 2], 3]}}, "context_shape", "takes a list"),
        ({"item_context": {"recent": [[], [1, 2, 3, 4]]}}, "context_shape", "at most 3 ids, got 4"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], reason: str, detail: str) -> None:
    problem = check_context(request(**fields), SLOTS)
    assert problem is not None
    assert problem.reason == reason
    assert detail in problem.detail


def test_a_model_without_context_says_so() -> None:
    problem = check_context(request(context={"hour": 1}), slots_by_name(SourceLayout("context", (), ())))
    assert problem is not None
    assert "known: none" in problem.detail
