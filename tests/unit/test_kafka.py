"""The Kafka adapters where no real broker is needed: options, secrets, errors; outages on the mock cluster."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from confluent_kafka import KafkaError

from stream_scorer.adapters.kafka import KafkaConfig, KafkaSink, KafkaSource
from stream_scorer.adapters.kafka_admin import check_topics, connect
from stream_scorer.adapters.kafka_config import OWNED, ClientLog
from stream_scorer.adapters.kafka_gaps import CHECK_S, OffsetGaps
from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.core.metric_names import KAFKA_ERRORS, OFFSET_GAPS
from stream_scorer.core.records import OutRecord, TopicPartition
from stream_scorer.embedded.broker import EmbeddedBroker
from tests.contract.worlds import PARTITIONS, KafkaWorld, Listener, Sent, poll_for, soon
from tests.fakes import FakeMetrics
from tests.servers import free_ports

CONFIG = KafkaConfig("127.0.0.1:1", username="scorer", password="hunter2-secret", security_protocol="SASL_PLAINTEXT")


def test_secrets_are_not_in_repr_errors_or_client_logs(capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, options={"ssl.key.password": "key-secret", "client.rack": "eu-1"})
    error = KafkaError(KafkaError._TRANSPORT, "hunter2-secret and key-secret were sent to eu-1")
    ClientLog(config).log(30, "%s [%s] %s", "BROKER", "client", "login hunter2-secret, key-secret")
    shown = repr(config) + config.explain(error) + capsys.readouterr().out
    assert "login ********, ********" in shown
    assert "********" in config.explain(error)
    assert "eu-1" in config.explain(error)
    for secret in ("hunter2-secret", "key-secret"):
        assert secret not in shown


@pytest.mark.parametrize("option", sorted(OWNED))
def test_options_that_would_break_a_promise_are_refused(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"must not set {option}"):
        replace(CONFIG, options={option: "x"}).client()


def test_options_pass_through_and_wrong_ones_are_said() -> None:
    assert replace(CONFIG, options={"client.rack": "eu-1"}).client()["client.rack"] == "eu-1"
    unknown = replace(CONFIG, options={"no.such.option": 1})
    for make in (KafkaSink, lambda config: KafkaSource(config, ["t"], "g", FakeMetrics()), lambda c: connect(c, 1.0)):
        with pytest.raises(ConfigurationError, match=r"kafka settings: .*no\.such\.option"):
            make(unknown)
    with pytest.raises(ConfigurationError, match="kafka settings"):
        KafkaSink(replace(CONFIG, security_protocol="CARRIER_PIGEON"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (KafkaError._AUTHENTICATION, r"refused user 'scorer'.*kafka\.username, kafka\.password"),
        (KafkaError._SSL, r"no TLS.*kafka\.ca_file"),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, r"does not allow user 'scorer'.*ACL"),
        (KafkaError._TRANSPORT, r"127\.0\.0\.1:1: _TRANSPORT"),
    ],
)
def test_errors_say_what_to_do_in_one_line(code: int, words: str) -> None:
    said = CONFIG.explain(KafkaError(code, "it went wrong"))
    assert "\n" not in said
    assert re.search(words, said)


def test_nobody_there_is_said_after_the_time_given() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"no Kafka at .* answered within 0\.5 s: check kafka\.bootstrap"):
        connect(KafkaConfig(f"127.0.0.1:{free_ports(1)[0]}"), 0.5)
    assert time.monotonic() - started < 3


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker({f"mock-{at}": PARTITIONS for at in range(60)}) as running:
        yield running


def test_a_missing_topic_is_named(mock_broker: EmbeddedBroker) -> None:
    config = KafkaConfig(mock_broker.bootstrap)
    assert check_topics(config, ["mock-1"], 5.0).topics["mock-1"] == PARTITIONS
    with pytest.raises(ConfigurationError, match=r"no topic nope, zilch .*stream-scorer topics create"):
        check_topics(config, ["mock-1", "zilch", "nope"], 5.0)


def test_a_short_outage_is_survived_and_a_long_one_ends_the_process(broker: EmbeddedBroker) -> None:
    config = KafkaConfig(broker.bootstrap, session_timeout_ms=2_000, outage_limit_s=1.5, delivery_timeout_s=3.0)
    world = KafkaWorld(config, mock=True)
    topic = world.topic()
    world.produce(topic, [Sent(0, b"before")])
    source, sink, reports = world.source(topic, "outage"), world.sink(), []
    source.subscribe(Listener())
    poll_for(source, 1)
    broker.set_down(True)
    sink.send(OutRecord(topic, b"k", b"after", ()), lambda error, _message: reports.append(error))
    for _ in range(5):
        assert source.poll(10, 0.1, 0.0) == []
    broker.set_down(False)
    assert sink.flush(soon())
    assert reports == [None]
    give_up = time.monotonic() + 10
    seen: list[bytes | None] = []
    while b"after" not in seen and time.monotonic() < give_up:
        seen += [record.value for record in source.poll(10, 0.1, 0.0)]
    assert b"after" in seen
    broker.set_down(True)
    sink.send(OutRecord(topic, b"k", b"never", ()), lambda error, _message: reports.append(error))
    with pytest.raises(FatalError, match=r"no Kafka broker at .* answered for 2 s"):
        poll_for(source, 1_000)
    assert world.metrics.count(KAFKA_ERRORS, "_ALL_BROKERS_DOWN") >= 1
    assert sink.flush(soon())  # reported, not raised: what to do is the caller's choice
    assert [error is None for error in reports] == [True, False]
    source.close()
    sink.close(soon(0.0))


def test_a_full_queue_is_waited_out_then_fatal() -> None:
    full = KafkaSink(
        KafkaConfig(
            f"127.0.0.1:{free_ports(1)[0]}", delivery_timeout_s=0.6, options={"queue.buffering.max.messages": 1}
        )
    )
    failed: list[object] = []
    full.send(OutRecord("t", None, b"1", ()), lambda error, _message: failed.append(error))
    started = time.monotonic()
    with pytest.raises(FatalError, match=r"queue stayed full.*does not take messages"):
        full.send(OutRecord("t", None, b"2", ()), lambda error, _message: failed.append(error))
    assert 0.5 < time.monotonic() - started < 5
    full.close(soon(0.0))
    assert len(failed) == 1


def test_gaps_count_only_what_the_log_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("stream_scorer.adapters.kafka_gaps.time.monotonic", lambda: now[0])
    asked: list[TopicPartition] = []
    low = {TopicPartition("t", 0): 15, TopicPartition("t", 1): 0}
    metrics = FakeMetrics()
    gaps = OffsetGaps(lambda where: (asked.append(where), low[where])[1], metrics)
    gaps.resolve()
    assert asked == []
    gaps.seen(TopicPartition("t", 0), 10, 20)  # five dropped, five were never there
    gaps.seen(TopicPartition("t", 1), 3, 4)  # a transaction's marker
    gaps.resolve()
    assert metrics.count(OFFSET_GAPS) == 5
    assert sorted(asked) == [TopicPartition("t", 0), TopicPartition("t", 1)]
    gaps.seen(TopicPartition("t", 1), 5, 6)
    gaps.resolve()
    assert len(asked) == 2, "not again within the second"
    low[TopicPartition("t", 1)] = 6
    now[0] += CHECK_S
    gaps.resolve()
    assert metrics.count(OFFSET_GAPS) == 6
