"""Do a request's context values fit the model's context features? Checked once, where the request enters.

A sparse feature, the length of a history and a dense feature of width 1 take a number; a history takes a list of at
most ``maxlen`` ids; a wide dense feature a list of exactly its width. Ids are int64, dense values fit float32.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from esmm.batch import Slot, SourceLayout
from stream_scorer.core.messages import ScoreRequest

FLOAT32_MAX = float(np.finfo(np.float32).max)
Slots = Mapping[str, Slot]


class ContextProblem(NamedTuple):
    """What does not fit, for a reject."""

    reason: Literal["context_unknown", "context_shape"]
    detail: str


def slots_by_name(layout: SourceLayout) -> dict[str, Slot]:
    """Name -> slot of every context feature."""
    return {slot.name: slot for slot in (*layout.ids, *layout.dense)}


def takes_list(slot: Slot) -> bool:
    """Whether one value of this feature is a list of numbers rather than a number."""
    return slot.kind == "varlen" or slot.width > 1


def check_context(request: ScoreRequest, slots: Slots) -> ContextProblem | None:
    """Give the first value that does not fit, or None."""
    if request.context:
        for name, value in request.context.items():
            slot = slots.get(name)
            if slot is None:
                return _unknown(name, slots)
            if name in request.item_context:
                return _shape(name, "is given both in context and in item_context; give it once")
            if problem := _check([value], slot):
                return _shape(name, problem)
    if request.item_context:
        rows = len(request.items)
        for name, values in request.item_context.items():
            slot = slots.get(name)
            if slot is None:
                return _unknown(name, slots)
            if len(values) != rows:
                return _shape(name, f"has {len(values)} values for {rows} items")
            if problem := _check(values, slot):
                return _shape(name, problem)
    return None


def _unknown(name: str, slots: Slots) -> ContextProblem:
    known = ", ".join(slots) or "none"
    return ContextProblem("context_unknown", f"context feature {name[:50]!r} is not in the schema; known: {known}")


def _shape(name: str, problem: str) -> ContextProblem:
    return ContextProblem("context_shape", f"context feature {name!r} {problem}")


def _check(values: list[Any], slot: Slot) -> str | None:
    """What is wrong with values of one feature. C-level calls only: there may be one a candidate."""
    flat = values
    if takes_list(slot):
        if set(map(type, values)) != {list}:
            return "takes a list of numbers"
        lengths = set(map(len, values))
        if slot.kind == "varlen" and max(lengths) > slot.width:
            return f"takes at most {slot.width} ids, got {max(lengths)}"
        if slot.kind == "dense" and lengths != {slot.width}:
            return f"takes exactly {slot.width} numbers, got {max(lengths - {slot.width})}"
        flat = list(chain.from_iterable(values))
        if not flat:
            return None
    return _check_numbers(flat, slot)


def _check_numbers(values: list[Any], slot: Slot) -> str | None:
    """An array takes what fits in one C pass; only what it refuses is looked at again, to say why."""
    if slot.kind == "dense":
        try:
            array("d", values)
        except (TypeError, OverflowError):
            return "takes a number, not a list" if list in map(type, values) else "does not fit float32"
        return None if max(values) <= FLOAT32_MAX and min(values) >= -FLOAT32_MAX else "does not fit float32"
    try:
        ids = array("q", values)
    except OverflowError:
        return "does not fit int64"
    except TypeError:
        return "takes a number, not a list" if list in map(type, values) else "takes whole numbers"
    return "must not be negative" if slot.kind == "length" and min(ids) < 0 else None
