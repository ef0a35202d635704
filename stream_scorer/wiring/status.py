"""One JSON status line a second on standard output: how the demo, and anyone's script, watches a process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import orjson

OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def status_bytes(role: str, fields: Mapping[str, Any], final: bool) -> bytes:
    """One line: the role, the time, the fields."""
    line = {"role": role, "t_ms": time.time_ns() // 1_000_000, **fields, "final": final}
    return orjson.dumps(line, option=OPTIONS) + b"\n"


class StatusLines:
    """While entered, prints what ``read`` returns once a second, and once more, marked final, when left."""

    def __init__(self, enabled: bool, role: str, read: Callable[[], Mapping[str, Any]]) -> None:
        """``read`` is called from this object's own thread: it must only copy plain numbers."""
        self._enabled = enabled
        self._role = role
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._stop.set()
            self._thread.join()
            self._write(final=True)

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._write(final=False)

    def _write(self, final: bool) -> None:
        sys.stdout.buffer.write(status_bytes(self._role, self._read(), final))
        sys.stdout.buffer.flush()
