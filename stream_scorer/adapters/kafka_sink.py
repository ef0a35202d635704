"""Kafka as a `Sink`: one idempotent producer, owned by one thread."""

from __future__ import annotations

import time
from collections import deque

from confluent_kafka import KafkaError, KafkaException, Producer

from stream_scorer.adapters.kafka_config import ClientLog, KafkaConfig
from stream_scorer.adapters.kafka_health import Outage, first_error, is_fatal, nothing
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.core.records import DeliveryReport, OutRecord


class KafkaSink:
    """An idempotent producer, ``acks=all`` (`stream_scorer.ports.Sink`); reports ``(KafkaError or None, Message)``."""

    def __init__(self, config: KafkaConfig) -> None:
        """Connects to nothing yet. `ConfigurationError` when an option is unknown or wrong."""
        self._config = config
        self._outage = Outage(config, nothing)
        self._refused: deque[tuple[DeliveryReport, KafkaError]] = deque()
        options = {
            "linger.ms": 1,  # a batch's results come at once: little is won by waiting longer
            "compression.type": "lz4",
            "message.timeout.ms": int(config.delivery_timeout_s * 1000),
            "message.max.bytes": 8 << 20,  # the broker's own limit decides
            "queue.buffering.max.kbytes": 128 << 10,
        } | config.client()
        options |= {"enable.idempotence": True, "acks": "all", "error_cb": self._outage.seen}
        try:
            self._producer = Producer(options, logger=ClientLog(config))
        except KafkaException as error:
            raise ConfigurationError(f"kafka settings: {config.redact(first_error(error).str())}") from None

    def send(self, record: OutRecord, report: DeliveryReport) -> None:
        """See `stream_scorer.ports.Sink`. A record the client refuses (too large) is reported at the next `poll`."""
        give_up: float | None = None
        while True:
            try:
                self._producer.produce(
                    record.topic, record.value, record.key, headers=list(record.headers) or None, on_delivery=report
                )
            except BufferError:
                now = time.monotonic()
                give_up = now + self._config.delivery_timeout_s if give_up is None else give_up
                if now > give_up:
                    raise FatalError(
                        f"the producer's queue stayed full for {self._config.delivery_timeout_s:.0f} s: "
                        f"Kafka at {self._config.bootstrap} does not take messages"
                    ) from None
                self._producer.poll(0.1)
                self._outage.check(_assume_down)
            except KafkaException as error:
                if is_fatal(first_error(error)):
                    raise FatalError(f"producing failed: {self._config.explain(first_error(error))}") from None
                self._refused.append((report, first_error(error)))
                return
            else:
                return

    def poll(self) -> None:
        """See `stream_scorer.ports.Sink`. `FatalError` when the producer has ended itself."""
        self._producer.poll(0)
        self._report_refused()
        self._outage.check(_assume_up)

    def flush(self, deadline: Deadline) -> bool:
        """See `stream_scorer.ports.Sink`."""
        left = self._producer.flush(deadline.left_s)
        self._report_refused()
        return left == 0

    def purge(self) -> None:
        """See `stream_scorer.ports.Sink`. Also ends retries of what is on its way: that may have arrived."""
        self._producer.purge(in_queue=True, in_flight=True, blocking=True)

    def close(self, deadline: Deadline) -> None:
        """See `stream_scorer.ports.Sink`. What could not be sent by the deadline is purged and reported."""
        if not self.flush(deadline):
            self.purge()
            self._producer.flush(1.0)

    def _report_refused(self) -> None:
        while self._refused:
            report, error = self._refused.popleft()
            report(error, None)


def _assume_down() -> bool:
    return False


def _assume_up() -> bool:
    return True
