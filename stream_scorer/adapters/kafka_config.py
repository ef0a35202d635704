"""How to reach Kafka, as plain frozen values, and what its errors mean to whoever runs the process."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
from confluent_kafka import KafkaError

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.core.secrets import MASK, is_secret

Option = str | int | float | bool

OWNED = frozenset(  # our promises rest on these: a passed-through option must not undo them
    {
        "bootstrap.servers",
        "group.id",
        "group.protocol",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "partition.assignment.strategy",
        "enable.partition.eof",
        "enable.idempotence",
        "acks",
        "transactional.id",
    }
)
LOGIN_REFUSED = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})  # noqa: SLF001 - public names
TLS_FAILED = frozenset({KafkaError._SSL})  # noqa: SLF001
NOT_ALLOWED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)

_log = structlog.get_logger("stream_scorer.kafka")


@dataclass(frozen=True)
class KafkaConfig:
    """Where Kafka is and how to talk to it. Times end in their unit; ``options`` are librdkafka's own, as they are."""

    bootstrap: str
    security_protocol: str = "PLAINTEXT"
    username: str = ""
    password: str = field(default="", repr=False)
    sasl_mechanism: str = "SCRAM-SHA-512"
    ca_file: str = ""
    options: Mapping[str, Option] = field(default_factory=dict, repr=False)
    group_protocol: Literal["classic", "consumer"] = "classic"
    session_timeout_ms: int = 10_000
    max_poll_interval_ms: int = 60_000
    fetch_wait_ms: int = 10
    delivery_timeout_s: float = 30.0
    outage_limit_s: float = 60.0  # no broker answers for this long: the process stops
    client_id: str = "stream-scorer"

    def client(self) -> dict[str, Any]:
        """Options that every client shares; `ConfigurationError` when ``options`` names one that is ours to set."""
        taken = sorted(OWNED & self.options.keys())
        if taken:
            raise ConfigurationError(f"kafka.options must not set {', '.join(taken)}: stream-scorer sets it itself")
        common: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "client.id": self.client_id,
            "security.protocol": self.security_protocol,
            "socket.timeout.ms": 10_000,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1_000,
            "socket.keepalive.enable": True,
        }
        if self.security_protocol.startswith("SASL"):
            common["sasl.mechanism"] = self.sasl_mechanism
        if self.username:
            common |= {"sasl.username": self.username, "sasl.password": self.password}
        if self.ca_file:
            common["ssl.ca.location"] = self.ca_file
        return common | dict(self.options)

    def redact(self, text: str) -> str:
        """``text`` without any secret of this configuration."""
        secrets = [str(value) for key, value in self.options.items() if is_secret(key)]
        for secret in (self.password, *secrets):
            if secret:
                text = text.replace(secret, MASK)
        return text

    def explain(self, error: KafkaError) -> str:
        """One line: what is wrong and what to do about it."""
        said = self.redact(error.str())
        code = error.code()
        if code in LOGIN_REFUSED:
            who = f"user {self.username!r}" if self.username else "a login without kafka.username"
            return (
                f"Kafka at {self.bootstrap} refused {who} ({self.security_protocol}, {self.sasl_mechanism}): "
                "check kafka.username, kafka.password and kafka.sasl_mechanism"
            )
        if code in TLS_FAILED:
            return f"no TLS with Kafka at {self.bootstrap}: {said}; check kafka.ca_file and kafka.security_protocol"
        if code in NOT_ALLOWED:
            return f"Kafka at {self.bootstrap} does not allow user {self.username!r} this: {said}; grant it an ACL"
        return f"Kafka at {self.bootstrap}: {error.name()}: {said}"

    def missing(self, topics: Sequence[str]) -> str:
        """One line for topics that are not there."""
        return (
            f"Kafka at {self.bootstrap} has no topic {', '.join(sorted(topics))} (or user {self.username!r} may not "
            "see it): create what is missing with `stream-scorer topics create`"
        )


class ClientLog:
    """librdkafka's own log lines, sent to ours. Passed to a client as ``logger=``."""

    def __init__(self, config: KafkaConfig) -> None:
        """``config`` knows what must not be printed."""
        self._config = config

    def log(self, level: int, template: str, *words: object) -> None:
        """Called by the client from inside poll."""
        facility = str(words[0]) if words else ""
        text = self._config.redact(template % words if words else template)
        if facility in {"CONFWARN", "FAIL"}:  # a consumer's option given to a producer; errors come by callback too
            level = logging.DEBUG
        _log.log(level, "kafka client", text=text)
