"""Child processes that never outlive us: started with a status pipe, stopped by SIGTERM, killed if they do not."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

_PR_SET_PDEATHSIG = 1
PARENT = "_STREAM_SCORER_PARENT"  # set for children: the process id they die with


def die_with_parent() -> None:
    """In a child of `Child`: ask Linux to send SIGTERM when the parent goes; elsewhere the closed pipes end us."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it went before we could ask
        os.kill(os.getpid(), signal.SIGTERM)


class Child:
    """One ``stream-scorer`` command in a process of its own; its last status line is at `status`."""

    def __init__(self, name: str, args: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Start it. ``args`` are what follows ``stream-scorer``; standard error goes to ``log``."""
        self.name = name
        self.status: dict[str, Any] = {}
        self.final: dict[str, Any] | None = None
        self.log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stream_scorer.cli", *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **(env or {}), PARENT: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
            )
        self._reader = threading.Thread(target=self._read, name=f"{name}-status", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        pipe = self._process.stdout
        if pipe is None:
            return
        for line in pipe:
            try:
                message = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue  # a human line, not a status
            if isinstance(message, dict):
                if message.get("final"):
                    self.final = message
                self.status = message

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal if it still runs."""
        if self.alive:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """True when it ended in time and its last status line was read."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(5.0)
        return True

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after ``timeout_s``."""
        self.signal()
        if not self.wait(timeout_s):
            self.signal(signal.SIGKILL)
            self.wait(5.0)

    def close(self) -> None:
        """Close the pipe of a process that ended."""
        if self._process.stdout is not None:
            self._process.stdout.close()

    def tail(self, lines: int = 3) -> str:
        """The last lines of its log, for an error message."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""
