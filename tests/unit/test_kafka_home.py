"""A real broker from a Kafka download: refusals always, a start where KAFKA_HOME says there is one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from stream_scorer.core.errors import ConfigurationError
from stream_scorer.embedded import kafka_home
from stream_scorer.embedded.kafka_home import KafkaHome, answers

HOME = os.environ.get("KAFKA_HOME")


def test_a_directory_without_kafka_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"no Kafka in {tmp_path}"):
        KafkaHome(tmp_path).start()


def test_missing_java_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka-clients-4.3.1.jar").touch()
    monkeypatch.setattr(kafka_home.shutil, "which", lambda _name: None)
    with pytest.raises(ConfigurationError, match="Java 17"):
        KafkaHome(tmp_path).start()


def test_nobody_answers_on_a_closed_port() -> None:
    port, _ = kafka_home._free_ports()
    assert not answers(port)


@pytest.mark.real_kafka
def test_a_real_broker_starts_takes_topics_and_goes() -> None:
    if HOME is None or shutil.which("java") is None:
        if os.environ.get("STREAM_SCORER_TEST_REQUIRE_REAL") == "1":
            pytest.fail("STREAM_SCORER_TEST_REQUIRE_REAL=1 needs KAFKA_HOME and Java 17")
        pytest.skip("needs KAFKA_HOME and Java 17")
    with KafkaHome(Path(HOME)) as broker:
        port = int(broker.bootstrap.rpartition(":")[2])
        admin = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
        admin.create_topics([NewTopic("t", 3, 1)])["t"].result(20)
        assert len(admin.list_topics("t", timeout=10).topics["t"].partitions) == 3
    assert not answers(port)
