"""Looking at a cluster before the loops start: is it there, may we in, are the topics there, and creating them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # its package exports them without saying so
    AdminClient,
    ClusterMetadata,
    NewTopic,
)

from stream_scorer.adapters.kafka_config import LOGIN_REFUSED, TLS_FAILED, ClientLog, KafkaConfig
from stream_scorer.adapters.kafka_health import first_error
from stream_scorer.core.errors import ConfigurationError

ATTEMPT_S = 1.0
_HOPELESS = LOGIN_REFUSED | TLS_FAILED  # waiting does not help


class ClusterInfo(NamedTuple):
    """What a cluster said of itself. ``topics`` maps each visible topic to its number of partitions."""

    cluster_id: str
    brokers: tuple[str, ...]
    topics: Mapping[str, int]


class _Admin:
    """An admin client that knows why it gets no answer."""

    def __init__(self, config: KafkaConfig) -> None:
        self._config = config
        self._errors: list[KafkaError] = []
        try:
            self.client = AdminClient(config.client() | {"error_cb": self._errors.append}, logger=ClientLog(config))
        except KafkaException as error:
            raise ConfigurationError(f"kafka settings: {config.redact(first_error(error).str())}") from None

    def metadata(self, timeout_s: float) -> ClusterMetadata:
        """The cluster's description; `ConfigurationError` that says why there is none."""
        give_up = time.monotonic() + timeout_s
        while True:
            left = give_up - time.monotonic()
            try:
                return self.client.list_topics(timeout=max(0.05, min(ATTEMPT_S, left)))
            except KafkaException as error:
                self._errors.append(first_error(error))
            self.client.poll(0)
            hopeless = next((e for e in self._errors if e.code() in _HOPELESS), None)
            if hopeless is not None:
                raise ConfigurationError(self._config.explain(hopeless))
            if time.monotonic() >= give_up:
                raise ConfigurationError(self._unreachable(timeout_s))

    def _unreachable(self, timeout_s: float) -> str:
        vague = {KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT}  # noqa: SLF001
        told = [e for e in self._errors if e.code() not in vague]
        reason = self._config.redact((told or self._errors)[-1].str())
        return (
            f"no Kafka at {self._config.bootstrap} answered within {timeout_s:g} s: check kafka.bootstrap and that the "
            f"broker runs ({reason})"
        )


def connect(config: KafkaConfig, timeout_s: float) -> ClusterInfo:
    """Describe the cluster.

    Raises `ConfigurationError`: not reachable within ``timeout_s``, login refused, TLS failed, option unknown.
    """
    return _info(_Admin(config).metadata(timeout_s))


def _info(metadata: ClusterMetadata) -> ClusterInfo:
    brokers = tuple(f"{broker.host}:{broker.port}" for _, broker in sorted(metadata.brokers.items()))
    topics = {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.error is None}
    return ClusterInfo(str(metadata.cluster_id), brokers, topics)


def check_topics(config: KafkaConfig, names: Sequence[str], timeout_s: float) -> ClusterInfo:
    """`connect`, and `ConfigurationError` that names each of ``names`` that does not exist."""
    info = connect(config, timeout_s)
    missing = [name for name in names if name not in info.topics]
    if missing:
        raise ConfigurationError(config.missing(missing))
    return info


class TopicPlan(NamedTuple):
    """Topics to make alike. ``settings`` are the broker's topic settings (``retention.ms`` and the like)."""

    names: Sequence[str]
    partitions: int
    replication: int
    settings: Mapping[str, str] = {}


def create_topics(config: KafkaConfig, plan: TopicPlan, timeout_s: float) -> list[str]:
    """Create what is not there yet and say which; returns when every broker asked shows them.

    Raises `ConfigurationError`: as `connect`, not allowed, more replicas than brokers, a name that Kafka refuses.
    """
    admin = _Admin(config)
    existing = _info(admin.metadata(timeout_s)).topics
    wanted = [name for name in dict.fromkeys(plan.names) if name not in existing]
    if not wanted:
        return []
    topics = [NewTopic(name, plan.partitions, plan.replication, config=dict(plan.settings)) for name in wanted]
    futures: dict[str, Future[None]] = admin.client.create_topics(topics, operation_timeout=timeout_s)
    created = [name for name, future in futures.items() if _created(config, name, future, timeout_s)]
    _await_visible(admin, wanted, timeout_s)
    return created


def delete_topics(config: KafkaConfig, names: Sequence[str], timeout_s: float) -> None:
    """Delete topics that are there. `ConfigurationError`: as `connect`, or not allowed."""
    admin = _Admin(config)
    existing = _info(admin.metadata(timeout_s)).topics
    present = [name for name in names if name in existing]
    if not present:
        return
    for name, future in admin.client.delete_topics(present, operation_timeout=timeout_s).items():
        try:
            future.result(timeout_s + ATTEMPT_S)
        except KafkaException as error:
            problem = first_error(error)
            if problem.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise ConfigurationError(f"topic {name!r} was not deleted: {config.explain(problem)}") from None


def _created(config: KafkaConfig, name: str, future: Future[None], timeout_s: float) -> bool:
    try:
        future.result(timeout_s + ATTEMPT_S)
    except KafkaException as error:
        problem = first_error(error)
        if problem.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        raise ConfigurationError(f"topic {name!r} was not created: {config.explain(problem)}") from None
    except TimeoutError:
        raise ConfigurationError(f"topic {name!r} was not created within {timeout_s:g} s") from None
    return True


def _await_visible(admin: _Admin, names: Sequence[str], timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while not set(names) <= _info(admin.metadata(timeout_s)).topics.keys():
        if time.monotonic() > give_up:
            raise ConfigurationError(f"topics {', '.join(names)} were created but are not shown after {timeout_s:g} s")
        time.sleep(ATTEMPT_S / 20)
