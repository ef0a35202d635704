"""A real Apache Kafka broker (KRaft, one node) from an unpacked download, for ``demo --kafka-home DIR``.

Needs ``DIR/libs/*.jar`` and Java 17. Data lies in a temporary directory, removed at the end.
"""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.embedded import launch

START_TIMEOUT_S = 60.0
_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Djava.awt.headless=true")
_LOG4J2 = """status = error
appender.out.type = Console
appender.out.name = OUT
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %c{1} %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = OUT
"""
_LOG4J1 = """log4j.rootLogger=WARN, out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=%d %p %c{1} %m%n
"""


def find_java(home: Path) -> str:
    """Java's program; `ConfigurationError` when it, or Kafka's jars in ``home``, are missing."""
    if not any((home / "libs").glob("kafka-clients-*.jar")):
        raise ConfigurationError(
            f"no Kafka in {home} (looked for libs/kafka-clients-*.jar): pass the directory of an unpacked Apache Kafka"
        )
    java = shutil.which("java")
    if java is None:
        raise ConfigurationError("a real broker needs Java 17 or newer on PATH: install it, or leave --kafka-home out")
    return java


class KafkaHome:
    """One broker as a child process, gone when we are. Start it from a thread that lives as long as it should."""

    def __init__(self, home: Path, heap_mb: int = 512, settings: Mapping[str, str] | None = None) -> None:
        """``settings`` are broker settings that replace ours."""
        self._home = home.resolve()
        self._heap_mb = heap_mb
        self._more = dict(settings or {})
        self._dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap = ""

    def start(self) -> str:
        """The bootstrap address, once the broker answers; `FatalError` with the end of its log otherwise."""
        if self._process is not None:
            raise ValueError("the broker is started already")
        java = find_java(self._home)
        self._dir = Path(tempfile.mkdtemp(prefix="stream-scorer-kafka-"))
        plain, controller = _free_ports()
        properties, log = self._dir / "server.properties", self._dir / "broker.log"
        settings = _settings(plain, controller, self._dir / "data") | self._more
        properties.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
        (self._dir / "log4j2.properties").write_text(_LOG4J2)
        (self._dir / "log4j.properties").write_text(_LOG4J1)
        self._format(java, properties)
        self._process = launch.start(self._java(java, "kafka.Kafka", str(properties)), log)
        if not self._wait_ready(plain):
            said = launch.tail(log)
            self.stop()
            raise FatalError(f"the broker from {self._home} did not start: {said}")
        self.bootstrap = f"127.0.0.1:{plain}"
        return self.bootstrap

    def _java(self, java: str, main: str, *words: str) -> list[str]:
        logs = (
            f"-Dlog4j2.configurationFile={self._dir}/log4j2.properties",
            f"-Dlog4j.configuration=file:{self._dir}/log4j.properties",  # Kafka 3
        )
        return [java, *_JVM, f"-Xmx{self._heap_mb}m", *logs, "-cp", f"{self._home}/libs/*", main, *words]

    def _format(self, java: str, properties: Path) -> None:
        cluster = "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]  # never starts with a dash
        command = self._java(java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties))
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            self.stop()
            said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
            raise FatalError(f"formatting storage for the broker from {self._home} failed: {said}")

    def _wait_ready(self, port: int) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            if answers(port):
                return True
            time.sleep(0.05)
        return False

    @property
    def pid(self) -> int:
        """The broker's process id, 0 when not running."""
        return 0 if self._process is None else self._process.pid

    def stop(self) -> None:
        """Orderly stop, then SIGKILL after 20 s; removes its data. Calling twice is fine."""
        process, self._process = self._process, None
        if process is not None:
            launch.stop(process, 20.0)
        if self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def answers(port: int) -> bool:
    """Whether a broker on this loopback port answers an ApiVersions request (it does once it is registered)."""
    request = bytes.fromhex("0012000000000001ffff")  # key 18, version 0, correlation 1, no client id
    try:
        with socket.create_connection(("127.0.0.1", port), 0.5) as link:
            link.settimeout(1.0)
            link.sendall(len(request).to_bytes(4, "big") + request)
            return len(link.recv(8)) == 8
    except OSError:
        return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _settings(plain: int, controller: int, data: Path) -> dict[str, str]:
    """Small and quick: one copy of everything, groups form at once, topics are created by whoever wants them."""
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{plain}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": str(data),
        "auto.create.topics.enable": "false",
        "default.replication.factor": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",
        "num.network.threads": "2",
        "num.io.threads": "4",
        "log.segment.bytes": str(64 << 20),
        "log.cleaner.dedupe.buffer.size": str(8 << 20),
    }
