"""What the join emits, and how emissions become `Examples`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, FeatureBlock, Int64, Kind
from stream_scorer.core.served import ServedRequest


class Emission(NamedTuple):
    """One training row, features by reference: candidate ``place`` of ``served``."""

    served: ServedRequest
    place: int
    kind: Kind
    click: int
    conversion: int
    observed: int
    impression_ms: int


def assemble(emissions: Sequence[Emission]) -> Examples:
    """Emissions (at least one) as one batch of B rows, in order; the features are copied.

    Neighbours from one request are gathered together: an impression page usually falls due as one.
    """
    starts = [i for i, e in enumerate(emissions) if i == 0 or e.served is not emissions[i - 1].served]
    stops = [*starts[1:], len(emissions)]
    groups = [emissions[start].served for start in starts]
    index_B = np.fromiter((e.place for e in emissions), np.int64, len(emissions))
    at = [index_B[start:stop] for start, stop in zip(starts, stops, strict=True)]
    repeat_G = np.array(stops, np.int64) - np.array(starts, np.int64)
    labels_B3 = np.array([e[3:6] for e in emissions], np.float32)

    def rows(blocks: list[FeatureBlock]) -> FeatureBlock:
        return FeatureBlock(_taken([b.ids_NS for b in blocks], at), _taken([b.dense_ND for b in blocks], at))

    return Examples(
        user=FeatureBlock(
            np.concatenate([g.user.ids_NS for g in groups]).repeat(repeat_G, axis=0),
            np.concatenate([g.user.dense_ND for g in groups]).repeat(repeat_G, axis=0),
        ),
        item=rows([g.item for g in groups]),
        context=rows([g.context for g in groups]),
        kind_B=np.fromiter((e.kind for e in emissions), np.uint8, len(emissions)),
        click_B=labels_B3[:, 0].copy(),
        conversion_B=labels_B3[:, 1].copy(),
        observed_B=labels_B3[:, 2].copy(),
        served_ctr_B=np.concatenate([g.ctr_K[i] for g, i in zip(groups, at, strict=True)]).astype(np.float32),
        served_ctcvr_B=np.concatenate([g.ctcvr_K[i] for g, i in zip(groups, at, strict=True)]).astype(np.float32),
        version_B=np.array([g.model_version for g in groups], np.int64).repeat(repeat_G),
        impression_ms_B=np.fromiter((e.impression_ms for e in emissions), np.int64, len(emissions)),
    )


def _taken(arrays: list[NDArray[Any]], at: list[Int64]) -> NDArray[Any]:
    """The rows ``at`` of each array, one after another; nothing is gathered where there are no columns."""
    if not arrays[0].shape[1]:
        return np.zeros((sum(map(len, at)), 0), arrays[0].dtype)
    return np.concatenate([array.take(index, axis=0) for array, index in zip(arrays, at, strict=True)])
