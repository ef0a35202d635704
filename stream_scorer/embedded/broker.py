"""The embedded broker: librdkafka's mock cluster in a process of its own, on real loopback TCP.

    python -m stream_scorer.embedded.broker --topics score-requests:4,scores:4

prints one JSON line, ``{"bootstrap": "127.0.0.1:PORT", "pid": N}``, when it can be used, and stops when its standard
input ends, on SIGTERM, or when its parent dies. In a process of its own, a scorer that restarts cannot take it along.

What it is not: there is no persistence, no transaction isolation, no topic creation by clients, and a partition holds
at most 5 MiB or 100,000 messages, oldest dropped first. librdkafka calls the interface experimental (rdkafka_mock.h),
so every symbol is looked up by name and a missing one is said, not crashed on.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.embedded import launch

START_TIMEOUT_S = 15.0
_PRODUCER = 0
_REPLICAS = 1
_SESSION_TIMEOUT_MS = 6_000  # of KIP-848 groups: how soon a killed member's partitions move (30 s by default)
_HEARTBEAT_MS = 500
_SETTLE_S = 0.005  # between topics: a request that follows on the last one's heels may wait out a poll of 1 s unnoticed
_SYMBOLS: dict[str, Any] = {  # name -> result type; every pointer is opaque
    "rd_kafka_conf_new": ctypes.c_void_p,
    "rd_kafka_conf_set": ctypes.c_int,
    "rd_kafka_new": ctypes.c_void_p,
    "rd_kafka_destroy": None,
    "rd_kafka_mock_cluster_new": ctypes.c_void_p,
    "rd_kafka_mock_cluster_destroy": None,
    "rd_kafka_mock_cluster_bootstraps": ctypes.c_char_p,
    "rd_kafka_mock_topic_create": ctypes.c_int,
    "rd_kafka_mock_group_initial_rebalance_delay_ms": None,
    "rd_kafka_mock_set_group_consumer_session_timeout_ms": None,
    "rd_kafka_mock_set_group_consumer_heartbeat_interval_ms": None,
    "rd_kafka_mock_broker_set_down": ctypes.c_int,
    "rd_kafka_mock_broker_set_up": ctypes.c_int,
}


def find_library() -> Path:
    """The librdkafka shared object of the installed confluent-kafka wheel; `ConfigurationError` when there is none."""
    spec = importlib.util.find_spec("confluent_kafka")
    if spec is None or spec.origin is None:
        raise ConfigurationError("confluent-kafka is not installed: pip install confluent-kafka")
    package = Path(spec.origin).parent
    places = (package.with_name("confluent_kafka.libs"), package / ".libs", package / ".dylibs", package)
    for place in places:
        for pattern in ("librdkafka*.so*", "librdkafka*.dylib"):
            found = sorted(place.glob(pattern))
            if found:
                return found[0]
    raise ConfigurationError(
        f"the embedded broker needs the librdkafka of a confluent-kafka wheel, and {package.parent} holds none "
        "(built from source?): install its wheel with pip's --only-binary confluent-kafka, or pass --bootstrap"
    )


class _Cluster:
    """The mock cluster inside this process."""

    def __init__(self, library: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        for name, result in _SYMBOLS.items():
            try:
                getattr(self._lib, name).restype = result
            except AttributeError as error:
                raise ConfigurationError(f"{library.name} has no {name}: confluent-kafka 2.15 is needed") from error
        conf = ctypes.c_void_p(self._lib.rd_kafka_conf_new())
        problem = ctypes.create_string_buffer(512)
        self._lib.rd_kafka_conf_set(conf, b"log_level", b"3", problem, len(problem))
        self._rk = ctypes.c_void_p(self._lib.rd_kafka_new(_PRODUCER, conf, problem, ctypes.c_size_t(len(problem))))
        if not self._rk:
            raise FatalError(f"the embedded broker did not start: {problem.value.decode(errors='replace')}")
        self._mock = ctypes.c_void_p(self._lib.rd_kafka_mock_cluster_new(self._rk, 1))
        if not self._mock:
            raise FatalError("the embedded broker did not start: librdkafka gave no mock cluster")
        self._lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._mock, ctypes.c_int32(0))
        self._lib.rd_kafka_mock_set_group_consumer_session_timeout_ms(self._mock, _SESSION_TIMEOUT_MS)
        self._lib.rd_kafka_mock_set_group_consumer_heartbeat_interval_ms(self._mock, _HEARTBEAT_MS)

    @property
    def bootstrap(self) -> str:
        return bytes(self._lib.rd_kafka_mock_cluster_bootstraps(self._mock)).decode()

    def create(self, topic: str, partitions: int) -> None:
        time.sleep(_SETTLE_S)
        error = self._lib.rd_kafka_mock_topic_create(self._mock, topic.encode(), partitions, _REPLICAS)
        if error:
            raise FatalError(f"the embedded broker did not make topic {topic!r} (librdkafka error {error})")

    def set_down(self, down: bool) -> None:
        name = "rd_kafka_mock_broker_set_down" if down else "rd_kafka_mock_broker_set_up"
        getattr(self._lib, name)(self._mock, ctypes.c_int32(1))

    def close(self) -> None:
        self._lib.rd_kafka_mock_cluster_destroy(self._mock)
        self._lib.rd_kafka_destroy(self._rk)


class EmbeddedBroker:
    """The embedded broker as a child process. Start it from a thread that lives as long as it should (the main one)."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        """``topics`` maps names to partition counts; clients cannot create more later."""
        self._topics = dict(topics)
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap = ""

    def start(self) -> str:
        """The bootstrap address, once it answers; `FatalError` with the reason otherwise."""
        if self._process is not None:
            raise ValueError("the embedded broker is started already")
        listed = ",".join(f"{name}:{count}" for name, count in self._topics.items())
        command = [sys.executable, "-m", "stream_scorer.embedded.broker", "--topics", listed, f"--parent={os.getpid()}"]
        with tempfile.TemporaryFile() as errors:  # a file: nobody reads it while the broker runs, so a pipe could fill
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
            line = self._answer()
            if "bootstrap" not in line:
                self.stop()
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-400:]
                raise FatalError(f"the embedded broker did not start: {said or 'no answer'}")
        self.bootstrap = str(line["bootstrap"])
        return self.bootstrap

    def _answer(self) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            return {}
        if not select.select([process.stdout], [], [], START_TIMEOUT_S)[0]:
            return {}
        line = process.stdout.readline()
        answer = json.loads(line or b"{}")
        return answer if isinstance(answer, dict) else {}

    @property
    def pid(self) -> int:
        """Its process id, 0 when not running."""
        return 0 if self._process is None else self._process.pid

    def set_down(self, down: bool) -> None:
        """Close the listener and every connection (True), or open it again (False): an outage on demand, data kept."""
        if self._process is None or self._process.stdin is None:
            raise ValueError("the embedded broker is not started")
        self._process.stdin.write(b"down\n" if down else b"up\n")
        self._process.stdin.flush()
        if self._answer().get("down") is not down:
            raise FatalError("the embedded broker did not obey")

    def stop(self) -> None:
        """Stop it; calling twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()  # it waits for this, and would see a signal only half a second later
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        launch.stop(process, 5.0)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def parse_topics(text: str) -> dict[str, int]:
    """``a:4,b:1`` as a mapping; `ConfigurationError` that shows the part which is wrong."""
    topics: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, count = part.rpartition(":")
        if not name or not count.isdigit() or int(count) < 1:
            raise ConfigurationError(f"--topics takes NAME:PARTITIONS,..., got {part!r}")
        topics[name] = int(count)
    return topics


def serve(topics: Mapping[str, int], stopping: threading.Event) -> None:
    """Run the cluster until ``stopping`` is set or standard input ends; obeys the lines ``down`` and ``up``."""
    cluster = _Cluster(find_library())
    try:
        for name, partitions in topics.items():
            cluster.create(name, partitions)
        print(json.dumps({"bootstrap": cluster.bootstrap, "pid": os.getpid()}), flush=True)  # noqa: T201
        pending = b""
        while not stopping.is_set():
            if not select.select([0], [], [], 0.5)[0]:
                continue
            chunk = os.read(0, 4096)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                cluster.set_down(line == b"down")
                print(json.dumps({"down": line == b"down"}), flush=True)  # noqa: T201
    finally:
        cluster.close()


def main(argv: list[str] | None = None) -> int:
    """The process: 0 stopped as asked, 1 could not start, 78 wrong arguments or no librdkafka."""
    parser = argparse.ArgumentParser(prog="stream_scorer.embedded.broker", description=__doc__.splitlines()[0])
    parser.add_argument("--topics", required=True, help="NAME:PARTITIONS,...")
    parser.add_argument("--parent", type=int, help="stop with this process, our parent")
    args = parser.parse_args(argv)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if args.parent is not None:
        launch.die_with(args.parent)
    try:
        serve(parse_topics(args.topics), stopping)
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 78
    except FatalError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
