"""What the join emits, and how emissions become `Examples`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esmm.batch import Examples, FeatureBlock, Kind
from stream_scorer.core.served import ServedRequest


class Emission(NamedTuple):
    """N training rows of one request, alike but for candidate and impression, features by reference."""

    served: ServedRequest
    places: list[int]  # N, which of the candidates
    kind: Kind
    click: int
    conversion: int
    observed: int
    impression_ms: list[int]  # N

    @property
    def rows(self) -> int:
        """N."""
        return len(self.places)

    def split(self, rows: int) -> tuple[Emission, Emission]:
        """The first so many rows, and the others."""
        parts = (slice(rows), slice(rows, None))
        first, rest = (self._replace(places=self.places[p], impression_ms=self.impression_ms[p]) for p in parts)
        return first, rest


def assemble(emissions: Sequence[Emission]) -> Examples:
    """Emissions (at least one) as one batch of B rows, in order; the features are copied. G emissions."""
    served, places, kind, click, conversion, observed, impression_ms = zip(*emissions, strict=True)
    rows_G = np.fromiter(map(len, places), np.int64, len(places))
    emission_B = np.arange(len(places)).repeat(rows_G)
    place_B = np.fromiter(chain.from_iterable(places), np.int64, len(emission_B))
    stops = np.cumsum(rows_G).tolist()
    spans = zip(served, [0, *stops], stops, strict=False)
    types = served[0].types
    rows_B = np.concatenate([one.rows_K.take(place_B[start:stop]) for one, start, stop in spans]).view(types.candidate)
    user_G = np.concatenate([one.user_1 for one in served]).view(types.user)

    def column(values: Sequence[int], dtype: type[np.generic]) -> NDArray[Any]:
        return np.array(values, dtype).take(emission_B)

    return Examples(
        user=FeatureBlock(user_G["ids"].take(emission_B, axis=0), user_G["dense"].take(emission_B, axis=0)),
        item=FeatureBlock(rows_B["item_ids"].copy(), rows_B["item_dense"].copy()),
        context=FeatureBlock(rows_B["context_ids"].copy(), rows_B["context_dense"].copy()),
        kind_B=column(kind, np.uint8),
        click_B=column(click, np.float32),
        conversion_B=column(conversion, np.float32),
        observed_B=column(observed, np.float32),
        served_ctr_B=rows_B["ctr"].copy(),
        served_ctcvr_B=rows_B["ctcvr"].copy(),
        version_B=column([one.model_version for one in served], np.int64),
        impression_ms_B=np.fromiter(chain.from_iterable(impression_ms), np.int64, len(emission_B)),
    )
