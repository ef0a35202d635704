"""Settings -> how Kafka, Redis and the schema are reached. No torch here, so that small commands start quickly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esmm.batch import SourceLayout
from esmm.features import FeatureSchema
from stream_scorer.adapters.kafka_admin import TopicPlan, check_topics, create_topics
from stream_scorer.adapters.kafka_config import KafkaConfig
from stream_scorer.adapters.redis_link import RedisConfig
from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.packed import Entity
from stream_scorer.settings import Settings


def kafka_config(settings: Settings) -> KafkaConfig:
    """How every client reaches Kafka."""
    kafka = settings.kafka
    return KafkaConfig(
        bootstrap=kafka.bootstrap,
        security_protocol=kafka.security_protocol,
        username=kafka.username,
        password=kafka.password.get_secret_value(),
        sasl_mechanism=kafka.sasl_mechanism,
        ca_file=kafka.ca_file,
        options=kafka.options,
        group_protocol=kafka.group_protocol,
        session_timeout_ms=kafka.session_timeout_ms,
        max_poll_interval_ms=kafka.max_poll_interval_ms,
        fetch_wait_ms=kafka.fetch_wait_ms,
        delivery_timeout_s=kafka.delivery_timeout_s,
    )


def all_topics(settings: Settings) -> list[str]:
    """The five topics."""
    topics = settings.kafka.topics
    return [topics.requests, topics.scores, topics.served, topics.feedback, topics.rejects]


REJECT_HEADROOM = 64 << 10  # a reject is the original and headers that say why
BROKER_DEFAULT = 1_048_588  # Kafka's own max.message.bytes


def make_topics(settings: Settings, partitions: int, replication: int, timeout_s: float) -> list[str]:
    """Create what is not there yet and say which; `score-rejects` takes messages that its headers made longer."""
    config, topics = kafka_config(settings), settings.kafka.topics
    largest = max(BROKER_DEFAULT, settings.scorer.max_bytes) + REJECT_HEADROOM
    others = [name for name in all_topics(settings) if name != topics.rejects]
    created = create_topics(config, TopicPlan(others, partitions, replication), timeout_s)
    room = {"max.message.bytes": str(largest)}
    return created + create_topics(config, TopicPlan([topics.rejects], partitions, replication, room), timeout_s)


def require_topics(settings: Settings, names: Sequence[str]) -> None:
    """`ConfigurationError` when Kafka is not reachable or lacks one of ``names``."""
    check_topics(kafka_config(settings), names, settings.kafka.connect_timeout_s)


def load_schema(settings: Settings) -> FeatureSchema:
    """The feature schema file; `ConfigurationError` says what is wrong with it."""
    path = Path(settings.model.schema_file)
    try:
        return FeatureSchema.from_toml(path.read_text())
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"feature schema {path} does not exist: write one (deploy/features.toml is an example) "
            "and name it in model.schema_file"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"feature schema {path}: {error}") from error


def redis_config(settings: Settings) -> RedisConfig:
    """How features are reached."""
    redis = settings.redis
    return RedisConfig(
        url=redis.url.get_secret_value(),
        prefix=redis.prefix,
        buckets=redis.buckets,
        budget_s=redis.budget_ms / 1000,
        cache_items=redis.cache_items,
        cache_ttl_s=redis.cache_ttl_s,
        stale_limit_s=redis.stale_limit_s,
    )


def entity_layouts(schema: FeatureSchema) -> dict[Entity, SourceLayout]:
    """The layouts of what the feature store holds."""
    return {"user": schema.layout("user"), "item": schema.layout("item")}
