"""One connection pool to Redis, Valkey or a Redis Cluster that fails fast and comes back by itself.

After a failure nobody asks again until a background probe has had an answer: an outage costs one timeout, not one a
batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import structlog
from redis import Redis, RedisCluster, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.secrets import mask_url

PROBE_FIRST_S = 0.25
PROBE_LONGEST_S = 5.0

FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError, ValueError)  # whatever redis-py raises

_log = structlog.get_logger("stream_scorer.redis")


@dataclass(frozen=True)
class RedisConfig:
    """Where features are and how long a batch may wait for them. ``url`` holds a password: it is never shown."""

    url: str = field(repr=False)
    prefix: str = "f"  # of every key
    buckets: int = 64  # hash-tag buckets a key falls into
    budget_s: float = 0.05
    cache_items: int = 100_000
    cache_ttl_s: float = 30.0
    stale_limit_s: float = 3_600.0
    connect_timeout_s: float = 0.25

    @property
    def meta_key(self) -> str:
        """A hash that says how the features were written: buckets, schema:user, schema:item."""
        return f"{self.prefix}:meta"

    @property
    def where(self) -> str:
        """The URL without its password."""
        return mask_url(self.url)

    def explain(self, error: Exception) -> str:
        """One line: what is wrong and what to do about it."""
        said = str(error)
        if isinstance(error, exceptions.AuthenticationError) or said.startswith(("NOAUTH", "WRONGPASS")):
            return f"Redis at {self.where} refused the login: check user and password in redis.url"
        if isinstance(error, exceptions.NoPermissionError):
            return f"Redis at {self.where} does not allow this user it: {said}; grant it with ACL SETUSER"
        if isinstance(error, exceptions.ResponseError):
            return f"Redis at {self.where} answered with an error: {said}"
        return f"no Redis at {self.where} answered: {said or type(error).__name__}; check redis.url and that it runs"


def open_client(config: RedisConfig, timeout_s: float) -> Any:
    """A `Redis` or a `RedisCluster`, whichever answers at ``config.url``; raises one of `FAILURES`."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": config.connect_timeout_s,
        "protocol": 2,  # servers before 6 know no other, and 3 gains nothing here
        "client_name": "stream-scorer",
    }
    once = Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,))  # the server had closed an idle one
    single = Redis.from_url(config.url, retry=once, **options)
    if not _in_cluster(single):
        return single
    single.close()
    options["socket_timeout"] = max(timeout_s, config.connect_timeout_s)  # redis-py finds the topology with it, too
    return RedisCluster.from_url(config.url, retry=Retry(NoBackoff(), 1), dynamic_startup_nodes=False, **options)


def _in_cluster(client: Any) -> bool:
    client.ping()
    try:
        said = client.execute_command("CLUSTER", "INFO")
    except exceptions.ResponseError:  # no cluster, or not ours to know
        return False
    return b"cluster_state" in (said if isinstance(said, bytes) else str(said).encode())


class RedisLink:
    """Answers `get` while the server does; None while it does not."""

    def __init__(self, config: RedisConfig) -> None:
        """Connects to nothing yet."""
        self.config = config
        self._client: Any = None
        self._available = True
        self._failures = 0  # in a row
        self._closing = threading.Event()
        self._prober: threading.Thread | None = None

    @property
    def available(self) -> bool:
        """False from a failure until a probe was answered."""
        return self._available

    def client(self) -> Any:
        """The client, connected now if it was not. `ConfigurationError` that says what is wrong."""
        if self._client is None:
            try:
                self._client = open_client(self.config, self.config.budget_s)
            except FAILURES as error:
                raise ConfigurationError(self.config.explain(error)) from None
        return self._client

    @property
    def clustered(self) -> bool:
        """Whether this is a cluster. `ConfigurationError` when nobody answers."""
        return isinstance(self.client(), RedisCluster)

    def get(self, keys: Sequence[str], deadline: Deadline) -> list[bytes | None] | None:
        """Values of ``keys`` in one round trip, None where there is none; in a cluster, one command a hash tag.

        Returns None, and starts probing, when the server did not answer. Waits at most the budget.
        """
        if not self._available or deadline.passed:
            return None
        try:
            values = self._mget(keys)
        except (*FAILURES, ConfigurationError) as error:
            self._failed(error)
            return None
        self._failures = 0
        return values

    def _mget(self, keys: Sequence[str]) -> list[bytes | None]:
        client = self.client()
        if isinstance(client, Redis):
            return cast("list[bytes | None]", client.mget(keys))
        places: dict[str, list[int]] = {}
        for at, key in enumerate(keys):
            places.setdefault(key[: key.index("}")], []).append(at)
        pipeline = client.pipeline()
        for where in places.values():  # keys of one tag share a slot, which redis-py does not know: it blocks `.mget`
            pipeline.execute_command("MGET", *(keys[at] for at in where))
        merged: list[bytes | None] = [None] * len(keys)
        for where, found in zip(places.values(), pipeline.execute(), strict=True):
            for at, value in zip(where, found, strict=True):
                merged[at] = value
        return merged

    def _failed(self, error: Exception) -> None:
        said = str(error) if isinstance(error, ConfigurationError) else self.config.explain(error)
        _log.warning("features unavailable", error=said)
        self._available = False
        self._failures += 1
        self._prober = threading.Thread(target=self._probe_until_answered, name="redis-probe", daemon=True)
        self._prober.start()

    def _probe_until_answered(self) -> None:
        wait_s = min(PROBE_LONGEST_S, PROBE_FIRST_S * 2.0 ** (self._failures - 1))
        while not self._closing.wait(wait_s):
            if self.probe():
                _log.info("features available again", redis=self.config.where)
                self._available = True
                return
            wait_s = min(PROBE_LONGEST_S, 2 * wait_s)

    def probe(self) -> bool:
        """Whether every server answers a ping now."""
        try:
            client = self.client()
            if isinstance(client, RedisCluster):
                client.ping(target_nodes=RedisCluster.PRIMARIES)
            else:
                client.ping()
        except (*FAILURES, ConfigurationError):
            return False
        return True

    def close(self) -> None:
        """Stop probing and hang up."""
        self._closing.set()
        if self._prober is not None:
            self._prober.join()
        if self._client is not None:
            self._client.close()
