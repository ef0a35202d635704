"""Features from Redis (`stream_scorer.ports.FeatureStore`): one round trip a batch, a cache for items, no exceptions.

In an outage: a cached item row within its age limit, else the default vector; the fetch says `degraded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np

from esmm.batch import Bool, FeatureBlock, Int64, SourceLayout, zero_block
from stream_scorer.adapters.feature_cache import NONE, ItemCache
from stream_scorer.adapters.feature_writer import FeatureWriter, check_meta, read_meta
from stream_scorer.adapters.redis_link import RedisConfig, RedisLink
from stream_scorer.adapters.redis_tracking import Invalidations
from stream_scorer.core.assemble import first_seen
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.metric_names import FEATURE_CACHE, FEATURE_TRACKING, FEATURES_MISSING
from stream_scorer.core.packed import DecodedRows, Entity, decode_records
from stream_scorer.core.records import FeatureRows, Fetched
from stream_scorer.ports import Metrics

__all__ = ["FeatureWriter", "RedisConfig", "RedisFeatures"]

OUTAGE = "outage"  # the reason beside those of `stream_scorer.core.packed.Missing`


class RedisFeatures:
    """Packed feature records of users and items by id."""

    def __init__(
        self,
        config: RedisConfig,
        layouts: Mapping[Entity, SourceLayout],
        metrics: Metrics,
        defaults: Mapping[Entity, FeatureBlock] | None = None,
    ) -> None:
        """Connects to nothing yet. ``defaults`` are one-row blocks for missing entities, zeros where not given."""
        self._link = RedisLink(config)
        self._config = config
        self._layouts = layouts
        self._metrics = metrics
        self._defaults = {kind: zero_block(layout, 1) for kind, layout in layouts.items()} | dict(defaults or {})
        self._cache = ItemCache(layouts["item"], config.cache_items, config.cache_ttl_s)
        self._tags = {kind: key_prefixes(kind, config) for kind in layouts}
        self._tracked = False  # as far as the metric knows
        self._item_keys = f"{config.prefix}:{{i"
        self._changes: Invalidations | None = None
        self._no_fetch = {kind: layout.id_width + layout.dense_width == 0 for kind, layout in layouts.items()}

    def verify(self) -> None:
        """`ConfigurationError` when Redis cannot be reached, or its features have another schema or bucket count."""
        check_meta(self._config, read_meta(self._config), self._layouts)

    def track(self) -> None:
        """Have the server tell which items are written, where it does; call once, after `verify`."""
        if not self._link.clustered:  # each node tells of its own keys only
            self._changes = Invalidations(self._config, self._item_keys)
            self._changes.start()

    @property
    def tracking(self) -> bool:
        """Whether cached items are asked for again as soon as they are written."""
        return self._changes is not None and self._changes.tracking

    @property
    def available(self) -> bool:
        """Whether Redis answered when it was last asked."""
        return self._link.available

    def fetch(self, users: Sequence[str], items: Sequence[str], now_ms: int, deadline: Deadline) -> Fetched:
        """See `stream_scorer.ports.FeatureStore`."""
        now_s = now_ms / 1000.0
        self._forget_changed()
        users, user_of_R = first_seen(users)
        slot_I, first_I, item_of_B = self._cache.find(items)
        fresh_I = self._cache.fresh(slot_I, now_s) | self._no_fetch["item"]
        wanted = np.flatnonzero(~fresh_I)
        wanted_items = [items[at] for at in first_I[wanted].tolist()]
        wanted_users: Sequence[str] = () if self._no_fetch["user"] else users
        values = self._get(wanted_users, wanted_items, deadline)
        self._count_cache(len(slot_I) - len(wanted), len(wanted))
        if values is None:
            found = self._stale_items(slot_I, fresh_I, now_s)
            return Fetched(self._no_users(len(users)), found, True, user_of_R, item_of_B)
        user_rows = self._decode("user", values[: len(wanted_users)], len(users))
        item_rows = self._decode("item", values[len(wanted_users) :], len(wanted))
        slot_K = self._cache.put(wanted_items, slot_I[wanted], item_rows, now_s)
        return Fetched(
            _uncached(user_rows.block, user_rows.event_ms_N, user_rows.missing_N),
            self._merge(slot_I, wanted, slot_K, item_rows),
            False,
            user_of_R,
            item_of_B,
        )

    def _forget_changed(self) -> None:
        """Before a batch looks items up. A write that races with its fetch is told, and forgotten, by the next."""
        if self._changes is None:
            return
        keys = self._changes.take()
        if keys is None:
            self._cache.expire_all()
        elif keys:
            start = len(self._item_keys.encode())
            held = self._cache.expire(key[start:].partition(b"}:")[2].decode(errors="replace") for key in keys)
            self._count_cache_outcome("changed", held)
        if self._tracked != self._changes.tracking:
            self._tracked = not self._tracked
            self._metrics.set(FEATURE_TRACKING, float(self._tracked))

    def _get(self, users: Sequence[str], items: Sequence[str], deadline: Deadline) -> list[bytes | None] | None:
        if not users and not items:
            return []
        if not self._link.available:
            return None
        keys = keys_of(self._tags["user"], users) + keys_of(self._tags["item"], items)
        return self._link.get(keys, deadline)

    def _decode(self, kind: Entity, values: list[bytes | None], rows: int) -> DecodedRows:
        """Rows of one kind, defaults filled in, missing ones counted."""
        if self._no_fetch[kind]:
            none = np.zeros(rows, np.bool_)
            return DecodedRows(
                zero_block(self._layouts[kind], rows), np.zeros(rows, np.int64), none, none.view(np.uint8)
            )
        decoded = decode_records(self._layouts[kind], values)
        for reason, count in decoded.reasons().items():
            self._metrics.inc(FEATURES_MISSING, count, entity=kind, reason=reason)
        self._fill(kind, decoded.block, decoded.missing_N)
        return decoded

    def _fill(self, kind: Entity, block: FeatureBlock, missing_N: Bool) -> None:
        if missing_N.any():
            block.ids_NS[missing_N] = self._defaults[kind].ids_NS
            block.dense_ND[missing_N] = self._defaults[kind].dense_ND

    def _merge(self, slot_I: Int64, wanted: Int64, slot_K: Int64, fetched: DecodedRows) -> FeatureRows:
        """The rows of all items: cached ones from their slots, the others as just fetched."""
        slot_I = slot_I.copy()
        slot_I[wanted] = slot_K
        if len(wanted) == len(slot_I):
            block, event_ms_I, missing_I = fetched.block, fetched.event_ms_N, fetched.missing_N
        else:
            block, event_ms_I, missing_I = self._from_cache(slot_I)
            block.ids_NS[wanted] = fetched.block.ids_NS
            block.dense_ND[wanted] = fetched.block.dense_ND
            event_ms_I[wanted] = fetched.event_ms_N
            missing_I[wanted] = fetched.missing_N
        return FeatureRows(block, event_ms_I, missing_I, slot_I, self._cache.generation(slot_I))

    def _from_cache(self, slot_I: Int64) -> tuple[FeatureBlock, Int64, Bool]:
        """Rows of these slots; slot -1 gives some row, to be written over."""
        if not len(slot_I) or self._config.cache_items == 0:
            rows = len(slot_I)
            return zero_block(self._layouts["item"], rows), np.zeros(rows, np.int64), np.zeros(rows, np.bool_)
        return self._cache.rows(slot_I), self._cache.event_ms(slot_I), self._cache.missing(slot_I)

    def _no_users(self, rows: int) -> FeatureRows:
        missing_N = np.full(rows, not self._no_fetch["user"])
        block = zero_block(self._layouts["user"], rows)
        self._fill("user", block, missing_N)
        self._count_outage("user", missing_N)
        return _uncached(block, np.zeros(rows, np.int64), missing_N)

    def _stale_items(self, slot_I: Int64, fresh_I: Bool, now_s: float) -> FeatureRows:
        usable_I = fresh_I | self._cache.usable(slot_I, now_s, self._config.stale_limit_s)
        block, event_ms_I, missing_I = self._from_cache(slot_I)
        missing_I |= ~usable_I
        event_ms_I[~usable_I] = 0
        self._fill("item", block, ~usable_I)
        self._count_outage("item", ~usable_I)
        self._count_cache_outcome("stale", int((usable_I & ~fresh_I).sum()))
        slot_I = np.where(usable_I, slot_I, NONE)
        return FeatureRows(block, event_ms_I, missing_I, slot_I, self._cache.generation(slot_I))

    def _count_outage(self, kind: Entity, missing_N: Bool) -> None:
        if missing_N.any():
            self._metrics.inc(FEATURES_MISSING, int(missing_N.sum()), entity=kind, reason=OUTAGE)

    def _count_cache(self, hits: int, misses: int) -> None:
        self._count_cache_outcome("hit", hits)
        self._count_cache_outcome("miss", misses)

    def _count_cache_outcome(self, outcome: str, count: int) -> None:
        if count:
            self._metrics.inc(FEATURE_CACHE, count, outcome=outcome)

    def close(self) -> None:
        """Hang up."""
        if self._changes is not None:
            self._changes.close()
        self._link.close()


def key_prefixes(kind: Entity, config: RedisConfig) -> list[str]:
    """The start of a key for each hash-tag bucket: all of `stream_scorer.core.packed.entity_key` but the id."""
    return [f"{config.prefix}:{{{kind[0]}{bucket}}}:" for bucket in range(config.buckets)]


def keys_of(prefixes: Sequence[str], ids: Sequence[str]) -> list[str]:
    """`stream_scorer.core.packed.entity_key` of many ids, at a third of the time."""
    buckets = len(prefixes)
    return [prefixes[crc32(id_.encode()) % buckets] + id_ for id_ in ids]


def _uncached(block: FeatureBlock, event_ms_N: Int64, missing_N: Bool) -> FeatureRows:
    rows = len(event_ms_N)
    return FeatureRows(block, event_ms_N, missing_N, np.full(rows, NONE), np.zeros(rows, np.int64))
