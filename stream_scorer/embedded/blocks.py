"""Feature arrays by name, put into the order that a schema's layout wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from esmm.batch import FeatureBlock, SourceLayout, zero_block
from stream_scorer.core.errors import ConfigurationError


def fill(layout: SourceLayout, rows: int, values: Mapping[str, NDArray[Any]]) -> FeatureBlock:
    """A block of ``rows`` rows from one array a slot, ``(rows,)`` or ``(rows, width)``.

    A slot that ``values`` lacks, and a value that the layout lacks, are errors: a silent zero would be learned from.
    """
    wanted = {slot.name for slot in (*layout.ids, *layout.dense)}
    if wanted != set(values):
        odd = ", ".join(sorted(wanted ^ set(values)))
        raise ConfigurationError(f"the {layout.source} features of the schema and of the data differ in: {odd}")
    block = zero_block(layout, rows)
    for slots, array in ((layout.ids, block.ids_NS), (layout.dense, block.dense_ND)):
        for slot in slots:
            array[:, slot.start : slot.stop] = values[slot.name].reshape(rows, slot.width)
    return block
