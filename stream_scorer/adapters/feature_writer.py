"""Writing packed features to Redis, and the note beside them that says how they were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis

from esmm.batch import FeatureBlock, Int64, SourceLayout
from stream_scorer.adapters.redis_link import FAILURES, RedisConfig, open_client
from stream_scorer.core.errors import ConfigurationError, RecoverableError
from stream_scorer.core.packed import Entity, encode_records, entity_key

WRITE_TIMEOUT_S = 5.0
CHUNK = 1_000


class FeatureWriter:
    """Writes feature rows of users and items."""

    def __init__(self, config: RedisConfig, layouts: Mapping[Entity, SourceLayout]) -> None:
        """Connects now. `ConfigurationError`: not reachable, login refused, or written before with other buckets."""
        self._config = config
        self._layouts = layouts
        try:
            self._client: Any = open_client(config, WRITE_TIMEOUT_S)
            self._client.hsetnx(config.meta_key, "buckets", str(config.buckets))
            _check_buckets(config, _meta(self._client, config))
        except FAILURES as error:
            raise ConfigurationError(config.explain(error)) from None
        self._announced: set[Entity] = set()

    def write(
        self, entity: Entity, ids: Sequence[str], block: FeatureBlock, event_ms_N: Int64, ttl_s: float | None = None
    ) -> int:
        """Write N rows, in chunks; returns N.

        Raises ValueError for shapes that differ from the layout or values that are not finite (nothing is written),
        `RecoverableError` when Redis did not take them (some chunks may have been written: write again).
        """
        if len(ids) != block.rows:
            raise ValueError(f"{len(ids)} ids for {block.rows} rows of {entity} features")
        config, records = self._config, encode_records(self._layouts[entity], block, event_ms_N)
        try:
            self._announce(entity)
            for start in range(0, len(ids), CHUNK):
                pairs = zip(ids[start : start + CHUNK], records[start : start + CHUNK], strict=True)
                keyed = {entity_key(entity, id_, config.buckets, config.prefix): record for id_, record in pairs}
                self._write_chunk(keyed, ttl_s)
        except FAILURES as error:
            raise RecoverableError(f"{entity} features were not written: {self._config.explain(error)}") from error
        return len(ids)

    def _announce(self, entity: Entity) -> None:
        if entity not in self._announced:
            self._client.hset(self._config.meta_key, f"schema:{entity}", f"{self._layouts[entity].hash:016x}")
            self._announced.add(entity)

    def _write_chunk(self, keyed: Mapping[str, bytes], ttl_s: float | None) -> None:
        client = self._client
        if ttl_s is None and isinstance(client, Redis):
            client.mset(dict(keyed))
            return
        pipeline = client.pipeline(transaction=False) if isinstance(client, Redis) else client.pipeline()
        for key, record in keyed.items():
            pipeline.set(key, record, px=None if ttl_s is None else int(ttl_s * 1000))
        pipeline.execute()

    def forget(self) -> int:
        """Delete every key under the prefix, and say how many: for runs on a server that is somebody's."""
        count = 0
        try:
            for key in self._client.scan_iter(match=f"{self._config.prefix}:*", count=CHUNK):
                count += int(self._client.unlink(key))
        except FAILURES as error:
            raise RecoverableError(f"features were not deleted: {self._config.explain(error)}") from error
        return count

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def read_meta(config: RedisConfig) -> dict[str, str]:
    """How the features at ``config.url`` were written; empty when none were. `ConfigurationError` when unreachable."""
    try:
        client = open_client(config, WRITE_TIMEOUT_S)
        try:
            return _meta(client, config)
        finally:
            client.close()
    except FAILURES as error:
        raise ConfigurationError(config.explain(error)) from None


def _meta(client: Any, config: RedisConfig) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in client.hgetall(config.meta_key).items()}


def check_meta(config: RedisConfig, meta: Mapping[str, str], layouts: Mapping[Entity, SourceLayout]) -> None:
    """`ConfigurationError` unless features of these layouts, in these buckets, have been loaded."""
    _check_buckets(config, meta)
    for entity, layout in layouts.items():
        if layout.id_width + layout.dense_width == 0:
            continue
        written = meta.get(f"schema:{entity}")
        load = f"`stream-scorer features load --entity {entity} FILE`"
        if written is None:
            raise ConfigurationError(f"Redis at {config.where} holds no {entity} features: write them with {load}")
        if written != f"{layout.hash:016x}":
            raise ConfigurationError(
                f"{entity} features in Redis at {config.where} were written under another feature schema ({written}; "
                f"model.schema_file has {layout.hash:016x}): write them again with {load}, or use the schema they have"
            )


def _check_buckets(config: RedisConfig, meta: Mapping[str, str]) -> None:
    written = meta.get("buckets")
    if written is not None and written != str(config.buckets):
        raise ConfigurationError(
            f"features in Redis at {config.where} were written with redis.buckets = {written}, the setting is "
            f"{config.buckets}: set it to {written}, or write all features into an empty database"
        )
