"""The embedded broker: it starts, keeps messages, goes down on demand, and never outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer

from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.embedded import broker, launch
from stream_scorer.embedded.broker import EmbeddedBroker, find_library, parse_topics

QUIET = {"log_level": 0}


@pytest.fixture(scope="module")
def embedded() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker({"a": 3, "b": 1}) as running:
        yield running


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_topics_have_the_partitions_asked_for(embedded: EmbeddedBroker) -> None:
    producer = Producer({"bootstrap.servers": embedded.bootstrap, **QUIET})
    topics = producer.list_topics(timeout=5).topics
    assert {name: len(topic.partitions) for name, topic in topics.items()} == {"a": 3, "b": 1}


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_a_group_reads_what_was_produced(embedded: EmbeddedBroker, protocol: str) -> None:
    producer = Producer({"bootstrap.servers": embedded.bootstrap, "enable.idempotence": True, **QUIET})
    producer.produce("b", key=protocol.encode(), value=b"v", headers=[("h", b"1")])
    assert producer.flush(5) == 0
    consumer = Consumer(
        {
            "bootstrap.servers": embedded.bootstrap,
            "group.id": f"g-{protocol}",
            "group.protocol": protocol,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 10,
            **QUIET,
        }
    )
    consumer.subscribe(["b"])
    try:
        message = consumer.poll(8.0)
        while message is not None and message.key() != protocol.encode():
            message = consumer.poll(8.0)
    finally:
        consumer.close()
    assert message is not None
    assert (message.error(), message.value(), message.headers()) == (None, b"v", [("h", b"1")])


def test_down_refuses_and_up_delivers_what_waited() -> None:
    with EmbeddedBroker({"a": 1}) as running:
        producer = Producer({"bootstrap.servers": running.bootstrap, "reconnect.backoff.max.ms": 200, **QUIET})
        producer.list_topics(timeout=5)
        running.set_down(True)
        producer.produce("a", b"x")
        assert producer.flush(0.3) == 1
        running.set_down(False)
        assert producer.flush(8.0) == 0


def test_stop_ends_the_process_and_may_be_called_twice() -> None:
    running = EmbeddedBroker({"a": 1})
    running.start()
    pid = running.pid
    assert alive(pid)
    running.stop()
    running.stop()
    assert not alive(pid)
    with pytest.raises(ValueError, match="not started"):
        running.set_down(True)


def test_it_ends_when_its_standard_input_ends() -> None:
    command = [sys.executable, "-m", "stream_scorer.embedded.broker", "--topics", "a:1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert b"bootstrap" in process.stdout.readline()
        process.stdin.close()
        assert process.wait(5) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent death is a Linux signal")
def test_it_dies_with_a_parent_that_was_killed() -> None:
    code = (
        "import signal\n"
        "from stream_scorer.embedded.broker import EmbeddedBroker\n"
        "b = EmbeddedBroker({'a': 1}); b.start(); print(b.pid, flush=True); signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    gone = wait_until(lambda: not alive(pid))
    if not gone:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert gone


def test_topics_are_parsed_and_nonsense_is_named() -> None:
    assert parse_topics("a:4,b:1") == {"a": 4, "b": 1}
    for text in ("a", "a:0", "a:x", ":3", "a:-1"):
        with pytest.raises(ConfigurationError, match=text):
            parse_topics(text)


def test_a_start_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FatalError, match="NAME:PARTITIONS"):
        EmbeddedBroker({"a": 0}).start()
    running = EmbeddedBroker({"a": 1})
    with running, pytest.raises(ValueError, match="already"):
        running.start()
    monkeypatch.setattr(broker.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="pip install confluent-kafka"):
        find_library()


def test_a_wheel_without_the_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "confluent_kafka" / "__init__.py")

    monkeypatch.setattr(broker.importlib.util, "find_spec", lambda _name: Spec)
    with pytest.raises(ConfigurationError, match="only-binary"):
        find_library()


def test_the_launcher_becomes_the_program_and_stop_ends_it(tmp_path: Path) -> None:
    code = "import time; print('hi', flush=True); time.sleep(60)"
    process = launch.start([sys.executable, "-c", code], tmp_path / "log")
    try:
        assert wait_until(lambda: "hi" in launch.tail(tmp_path / "log"))
        assert alive(process.pid)
    finally:
        launch.stop(process, 5.0)
    assert process.returncode == -signal.SIGTERM
    assert launch.tail(tmp_path / "none").startswith("no log")
