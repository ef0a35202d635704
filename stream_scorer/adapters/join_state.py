"""Join state in memory: the plain one, and the oracle that `adapters/join_rocks.py` is tested against."""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stream_scorer.core.join_entry import NEVER, Entry, pack_rows, pack_served, unpack_rows, unpack_served

FILE = "join.bin"
MAGIC = b"stream-scorer-join/2\n"
_SIZES = struct.Struct("<III")


class MemoryJoinState:
    """A dict of entries and heaps of timers. Saved as one file, entries in request order."""

    def __init__(self) -> None:
        """Empty."""
        self._entries: dict[str, Entry] = {}
        self._due: list[int] = []  # a heap of the times in ``_timers``
        self._timers: dict[int, list[str]] = {}  # time -> a heap of request ids

    def __len__(self) -> int:
        """Entries held."""
        return len(self._entries)

    def get(self, request_id: str) -> Entry | None:
        """The entry, or None."""
        return self._entries.get(request_id)

    def put(self, request_id: str, entry: Entry) -> None:
        """Keep it; changes made in place are seen at once."""
        self._entries[request_id] = entry

    def delete(self, request_id: str) -> None:
        """Forget it."""
        del self._entries[request_id]

    def arm(self, due_ms: int, request_id: str) -> None:
        """Add a timer."""
        ids = self._timers.get(due_ms)
        if ids is None:
            self._timers[due_ms] = [request_id]
            heapq.heappush(self._due, due_ms)
        else:
            heapq.heappush(ids, request_id)

    def next_due_ms(self) -> int:
        """The earliest timer, or `NEVER`."""
        return self._due[0] if self._due else NEVER

    def pop_due(self) -> tuple[int, str]:
        """Take the earliest timer, ties by request id."""
        due_ms = self._due[0]
        ids = self._timers[due_ms]
        request_id = heapq.heappop(ids)
        if not ids:
            del self._timers[due_ms]
            heapq.heappop(self._due)
        return due_ms, request_id

    def save(self, directory: Path) -> None:
        """Write ``join.bin`` into an existing directory."""
        with (directory / FILE).open("wb") as file:
            file.write(MAGIC)
            for request_id, entry in self._entries.items():
                served = b"" if entry.served is None else pack_served(entry.served)
                parts = (request_id.encode(), served, pack_rows(entry))
                file.write(_SIZES.pack(*map(len, parts)))
                file.writelines(parts)

    def restore(self, directory: Path) -> None:
        """Take over what `save` wrote, in place of what is held; ValueError when it is something else."""
        self._entries, self._due, self._timers = {}, [], {}
        with (directory / FILE).open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{FILE} is not join state of this version: it does not start with {MAGIC!r}")
            for request_id, entry in _entries(file):
                self._entries[request_id] = entry
                if entry.armed_ms != NEVER:
                    self.arm(entry.armed_ms, request_id)

    def close(self) -> None:
        """Nothing to release."""


def _entries(file: BinaryIO) -> Iterator[tuple[str, Entry]]:
    while head := file.read(_SIZES.size):
        if len(head) != _SIZES.size:
            raise ValueError(f"{FILE} ends in the middle of an entry")
        sizes = _SIZES.unpack(head)
        name, served, rows = (file.read(size) for size in sizes)
        if len(rows) != sizes[2]:
            raise ValueError(f"{FILE} ends in the middle of an entry")
        yield name.decode(), unpack_rows(rows, unpack_served(served) if served else None)
