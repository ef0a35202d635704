"""Real servers for tests, on free loopback ports, gone when the tests are: Apache Kafka, Redis, Valkey.

Kafka comes from any unpacked download (``libs/*.jar``) and Java; nothing of the package under test starts it, except
`launch`, which makes a child die with its parent. Every wait has a deadline.
"""

from __future__ import annotations

import base64
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_scorer.embedded import launch

READY_S = 60.0
USERS = {"scorer": "scorer-secret", "intruder": "intruder-secret"}
_JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xss512k", "-Djava.awt.headless=true")
_LOG = {
    "log4j2.properties": "status=error\nappender.c.type=Console\nappender.c.name=C\n"
    "appender.c.layout.type=PatternLayout\n"
    "appender.c.layout.pattern=%d %p %c{1} %m%n\nrootLogger.level=warn\nrootLogger.appenderRef.c.ref=C\n",
    "log4j.properties": "log4j.rootLogger=WARN, C\nlog4j.appender.C=org.apache.log4j.ConsoleAppender\n"
    "log4j.appender.C.layout=org.apache.log4j.PatternLayout\n",
}


def wait_until(done: Callable[[], bool], what: str, seconds: float = READY_S) -> None:
    """Ask every 20 ms; AssertionError that says ``what`` did not happen."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


class _Server:
    """A child process with a log, on fixed ports, that can be killed, frozen and started again on its data."""

    def __init__(self, name: str) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix=f"test-{name}-"))
        self.log = self.dir / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> Self:
        self._process = launch.start(self.command(), self.log)
        try:
            wait_until(lambda: not self.alive or self.answers(), f"{self.dir.name} answers")
            assert self.alive, f"{self.dir.name} ended: {launch.tail(self.log, 15)}"
        except AssertionError:
            self.stop()
            raise
        return self

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; `start` brings it back on the same ports and data."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            launch.stop(process, 5.0)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            launch.stop(process, 20.0)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self.dir, ignore_errors=True)


class KafkaServer(_Server):
    """One KRaft node with a plain listener (a super user) and a SASL_PLAINTEXT one (`USERS`, ACLs on)."""

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__("kafka")
        self.home = home.resolve()
        self.java = shutil.which("java") or "java"
        self.plain, self.sasl, controller = free_ports(3)
        for name, text in _LOG.items():
            (self.dir / name).write_text(text)
        properties = self._properties(controller) | dict(settings or {})
        (self.dir / "server.properties").write_text("".join(f"{key}={value}\n" for key, value in properties.items()))

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.plain}"

    @property
    def sasl_bootstrap(self) -> str:
        return f"127.0.0.1:{self.sasl}"

    def _properties(self, controller: int) -> dict[str, str]:
        users = " ".join(f'user_{name}="{secret}"' for name, secret in USERS.items())
        listeners = f"PLAINTEXT://127.0.0.1:{self.plain},SASL_PLAINTEXT://127.0.0.1:{self.sasl}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
            "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
                f"org.apache.kafka.common.security.plain.PlainLoginModule required {users};"
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS;User:scorer",
            "log.dirs": str(self.dir / "data"),
            "auto.create.topics.enable": "false",
            "default.replication.factor": "1",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "1000",
            "group.consumer.min.session.timeout.ms": "1000",
            "group.consumer.session.timeout.ms": "6000",
            "group.consumer.min.heartbeat.interval.ms": "100",
            "group.consumer.heartbeat.interval.ms": "500",
            "broker.session.timeout.ms": "3000",  # how long a killed broker must wait before it may register again
            "broker.heartbeat.interval.ms": "500",
            "controller.quorum.election.timeout.ms": "500",
            "num.network.threads": "2",
            "num.io.threads": "4",
            "log.segment.bytes": str(64 << 20),
            "log.cleaner.dedupe.buffer.size": str(8 << 20),
        }

    def _run(self, main: str, *words: str) -> list[str]:
        logs = (
            f"-Dlog4j2.configurationFile={self.dir}/log4j2.properties",
            f"-Dlog4j.configuration=file:{self.dir}/log4j.properties",
        )
        return [self.java, *_JVM, "-Xmx512m", *logs, "-cp", f"{self.home}/libs/*", main, *words]

    def command(self) -> list[str]:
        properties = str(self.dir / "server.properties")
        if not (self.dir / "data").exists():
            cluster = "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]  # never starts with a dash
            tool = self._run("kafka.tools.StorageTool", "format", "-t", cluster, "-c", properties)
            done = subprocess.run(tool, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"formatting failed: {done.stdout}{done.stderr}"
        return [shutil.which(self.java) or self.java, *self._run("kafka.Kafka", properties)[1:]]

    def answers(self) -> bool:
        """An ApiVersions request is answered once the broker is registered."""
        request = bytes.fromhex("0012000000000001ffff")
        try:
            with socket.create_connection(("127.0.0.1", self.plain), 0.5) as link:
                link.settimeout(1.0)
                link.sendall(len(request).to_bytes(4, "big") + request)
                return len(link.recv(8)) == 8
        except OSError:
            return False


class RedisServer(_Server):
    """``redis-server`` or ``valkey-server`` on a TCP port; ``cluster``: one node that owns all slots."""

    def __init__(self, program: Path, cluster: bool = False, password: str = "") -> None:
        super().__init__("redis")
        self.program = program
        self.port = free_ports(1)[0]
        self.cluster = cluster
        self.password = password

    @property
    def url(self) -> str:
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "dir": str(self.dir),
            "daemonize": "no",
            "cluster-enabled": "yes" if self.cluster else "no",
            "cluster-port": str(free_ports(1)[0]),
        }
        if self.password:
            options["requirepass"] = self.password
        return [str(self.program), *(word for key, value in options.items() for word in (f"--{key}", value))]

    def start(self) -> Self:
        super().start()
        if self.cluster:
            self.ask(b"CLUSTER ADDSLOTSRANGE 0 16383")
            wait_until(lambda: b"cluster_state:ok" in self.ask(b"CLUSTER INFO"), "the cluster is up")
        return self

    def answers(self) -> bool:
        try:
            return self.ask(b"PING").startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False

    def ask(self, command: bytes) -> bytes:
        """One inline command, up to 64 KiB of its reply."""
        with socket.create_connection(("127.0.0.1", self.port), 0.5) as link:
            link.settimeout(1.0)
            link.sendall(command + b"\r\n")
            return link.recv(65536)
