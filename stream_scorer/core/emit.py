"""What the join emits, and how emissions become `Examples`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esmm.batch import Examples, FeatureBlock, Kind
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
    served, place, kind, click, conversion, observed, impression_ms = zip(*emissions, strict=True)
    index_B = np.array(place, np.int64)
    request_B = np.fromiter(map(id, served), np.int64, len(served))
    starts = [0, *(np.flatnonzero(request_B[1:] != request_B[:-1]) + 1).tolist()]
    stops = [*starts[1:], len(served)]
    groups = [served[start] for start in starts]
    repeat_B = np.arange(len(groups)).repeat(np.array(stops) - np.array(starts))
    spans = zip(groups, starts, stops, strict=True)
    types = groups[0].types
    raw_B = np.concatenate([group.rows_K.take(index_B[start:stop]) for group, start, stop in spans])
    rows_B = raw_B.view(types.candidate)
    users_G = np.concatenate([group.user_1 for group in groups]).view(types.user)
    return Examples(
        user=FeatureBlock(users_G["ids"].take(repeat_B, axis=0), users_G["dense"].take(repeat_B, axis=0)),
        item=FeatureBlock(rows_B["item_ids"].copy(), rows_B["item_dense"].copy()),
        context=FeatureBlock(rows_B["context_ids"].copy(), rows_B["context_dense"].copy()),
        kind_B=np.array(kind, np.uint8),
        click_B=np.array(click, np.float32),
        conversion_B=np.array(conversion, np.float32),
        observed_B=np.array(observed, np.float32),
        served_ctr_B=rows_B["ctr"].copy(),
        served_ctcvr_B=rows_B["ctcvr"].copy(),
        version_B=np.array([group.model_version for group in groups], np.int64).take(repeat_B),
        impression_ms_B=np.array(impression_ms, np.int64),
    )
