"""What a model may see of the market: the feature schema as TOML, and the features of users and items as blocks."""

from __future__ import annotations

import numpy as np

from esmm.batch import FeatureBlock, SourceLayout
from stream_scorer.embedded.blocks import fill
from stream_scorer.embedded.market import BRANDS, CATEGORIES, HISTORY, HOURS, SEGMENTS, Int64, Market

ID_BUCKETS = 4_096

MARKET_TOML = f"""\
[[features]]
name = "user_id"
kind = "sparse"
source = "user"
vocabulary_size = {ID_BUCKETS}
embedding_dim = 8
use_hash = true

[[features]]
name = "segment"
kind = "sparse"
source = "user"
vocabulary_size = {SEGMENTS}
embedding_dim = 8

[[features]]
name = "recent_categories"
kind = "varlen"
source = "user"
vocabulary_size = {CATEGORIES + 1}
embedding_dim = 8
embedding_name = "category"
maxlen = {HISTORY}
combiner = "mean"

[[features]]
name = "profile"
kind = "dense"
source = "user"
dimension = 4

[[features]]
name = "item_id"
kind = "sparse"
source = "item"
vocabulary_size = {ID_BUCKETS}
embedding_dim = 8
use_hash = true

[[features]]
name = "category"
kind = "sparse"
source = "item"
vocabulary_size = {CATEGORIES + 1}
embedding_dim = 8

[[features]]
name = "brand"
kind = "sparse"
source = "item"
vocabulary_size = {BRANDS}
embedding_dim = 8

[[features]]
name = "price_quality_age"
kind = "dense"
source = "item"
dimension = 3

[[features]]
name = "hour"
kind = "sparse"
source = "context"
vocabulary_size = {HOURS}
embedding_dim = 4
"""


def user_names(users: Int64) -> list[str]:
    """Ids as they appear in messages and in the feature store."""
    return [f"u{number}" for number in users.tolist()]


def item_names(numbers: Int64) -> list[str]:
    """Ids as they appear in messages and in the feature store; ``numbers`` are item numbers, not slots."""
    return [f"i{number}" for number in numbers.tolist()]


def user_block(market: Market, users: Int64, layout: SourceLayout) -> FeatureBlock:
    """The features of these users now, in the layout's order."""
    return fill(
        layout,
        len(users),
        {
            "user_id": users + 1,
            "segment": market.segment_U[users],
            "recent_categories": market.history_UH[users],
            "profile": market.profile_seen_U4[users],
        },
    )


def item_block(market: Market, slots: Int64, layout: SourceLayout) -> FeatureBlock:
    """The features of the items in these slots now, in the layout's order."""
    age_N = np.minimum((market.now_s - market.born_s_M[slots]) / 300.0, 1.0)
    return fill(
        layout,
        len(slots),
        {
            "item_id": market.number_M[slots],
            "category": market.category_M[slots] + 1,
            "brand": market.brand_M[slots],
            "price_quality_age": np.stack([market.price_M[slots], market.quality_seen_M[slots], age_N], axis=1),
        },
    )
