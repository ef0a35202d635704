"""A client's health: fatal errors, and brokers that all stay away for too long."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog
from confluent_kafka import KafkaError, KafkaException

from stream_scorer.adapters.kafka_config import KafkaConfig
from stream_scorer.core.errors import FatalError

PROBE_S = 1.0

_log = structlog.get_logger("stream_scorer.kafka")


def nothing(*_words: object) -> None:
    """Nobody is interested."""


class Outage:
    """Watches a client's error callback: fatal errors, and brokers that all stay away."""

    def __init__(self, config: KafkaConfig, error: Callable[[str], None]) -> None:
        """``error`` is told the name of every error the client reports."""
        self._config = config
        self._error = error
        self._fatal: KafkaError | None = None
        self._down_since: float | None = None
        self._probed_at = 0.0
        self._last = ""

    def seen(self, error: KafkaError) -> None:
        """The client's ``error_cb``."""
        now = time.monotonic()
        if is_fatal(error):
            self._fatal = error
        elif error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001
            if self._down_since is None:
                _log.warning("no Kafka broker answers", bootstrap=self._config.bootstrap)
                self._down_since = self._probed_at = now
        else:
            self._last = self._config.explain(error)
        self._error(error.name())

    def progress(self) -> None:
        """Something came from a broker."""
        if self._down_since is not None:
            _log.info("Kafka answers again", bootstrap=self._config.bootstrap)
            self._down_since = None

    def check(self, probe: Callable[[], bool]) -> None:
        """`FatalError` for a fatal client error, or when no broker answered ``probe`` within the limit."""
        if self._fatal is not None:
            raise FatalError(f"the Kafka client cannot go on: {self._config.explain(self._fatal)}")
        if self._down_since is None or time.monotonic() - self._probed_at < PROBE_S:
            return
        self._probed_at = time.monotonic()
        if probe():
            self.progress()
        elif time.monotonic() - self._down_since > self._config.outage_limit_s:
            raise FatalError(
                f"no Kafka broker at {self._config.bootstrap} answered for {self._config.outage_limit_s:.0f} s: "
                f"nothing unpublished was committed; start again when it is back ({self._last or 'no reason given'})"
            )


def is_fatal(error: KafkaError) -> bool:
    """Whether the client has ended itself: a fenced static member, an idempotent producer out of sequence."""
    return error.fatal() or error.code() == KafkaError._FATAL  # noqa: SLF001


def first_error(error: KafkaException) -> KafkaError:
    """The client's error inside its exception."""
    found = error.args[0]
    return found if isinstance(found, KafkaError) else KafkaError(KafkaError._FAIL, str(found))  # noqa: SLF001
