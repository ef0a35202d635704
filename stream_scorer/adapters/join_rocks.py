"""Join state in RocksDB (`stream_scorer.ports.JoinState`): larger than memory, saved without stopping for long.

Recently used entries live in memory as objects and are written when they are pushed out or saved; timers far ahead live
on disk only. Features are written once a request, apart from its rows, so an impression rewrites a few dozen bytes.

The database is scratch: no log is kept, and it is made anew at every start. What counts is what `save` hard-links into
a checkpoint and `restore` links back. Keys: ``s`` + request id: features, ``r`` + request id: rows, ``t`` + due + id.
"""

from __future__ import annotations

import heapq
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

import orjson
from rocksdict import BlockBasedOptions, Cache, Checkpoint, Options, Rdict, WriteBatch, WriteOptions

from stream_scorer.core.join_entry import NEVER, Entry, pack_rows, pack_served, unpack_rows, unpack_served
from stream_scorer.core.served import ServedRequest

FORMAT = "stream-scorer-join-rocks/2"
META, DATABASE = "join.json", "rocks"
BLOCK_CACHE_BYTES = 64 << 20
WRITE_BUFFER_BYTES = 32 << 20
EVICT_SHARE = 16  # a sixteenth of the cache is written and dropped at once
_SIGN: Final = 1 << 63  # so that times before 1970 sort as well


class _Held:
    """An entry in memory."""

    __slots__ = ("dirty", "entry", "stored", "stored_served")

    def __init__(self, entry: Entry, stored: bool) -> None:
        self.entry = entry
        self.stored = stored  # the database knows this request
        self.stored_served: ServedRequest | None = entry.served if stored else None  # .. with these features
        self.dirty = not stored


class RocksJoinState:
    """Entries and timers on disk, the recently used in memory."""

    def __init__(self, path: Path, cache_entries: int = 50_000, cache_timers: int = 200_000) -> None:
        """``path`` is a scratch directory of this process alone: what is there is deleted."""
        self._path = path
        self._cache_entries, self._cache_timers = cache_entries, cache_timers
        self._hot: OrderedDict[str, _Held] = OrderedDict()
        self._timers: list[tuple[int, str]] = []
        self._horizon: tuple[int, str] | None = None  # timers after it are on disk; None: all are in memory
        self._count = 0
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = _open(path)

    def __len__(self) -> int:
        """Entries held."""
        return self._count

    def get(self, request_id: str) -> Entry | None:
        """The entry, or None."""
        held = self._hot.get(request_id)
        if held is not None:
            self._hot.move_to_end(request_id)
            return held.entry
        name = request_id.encode()
        rows = self._db.get(b"r" + name)
        if rows is None:
            return None
        served = self._db.get(b"s" + name)
        entry = unpack_rows(rows, None if served is None else unpack_served(served))
        self._keep(request_id, _Held(entry, stored=True))
        return entry

    def put(self, request_id: str, entry: Entry) -> None:
        """Keep a new or changed entry."""
        held = self._hot.get(request_id)
        if held is None:
            self._count += 1
            self._keep(request_id, _Held(entry, stored=False))
        else:
            held.dirty = True

    def delete(self, request_id: str) -> None:
        """Forget an entry that `get` gave."""
        held = self._hot.pop(request_id)
        self._count -= 1
        if held.stored:
            batch = WriteBatch(raw_mode=True)
            batch.delete(b"r" + request_id.encode())
            batch.delete(b"s" + request_id.encode())
            self._db.write(batch)

    def _keep(self, request_id: str, held: _Held) -> None:
        self._hot[request_id] = held
        if len(self._hot) > self._cache_entries:
            self._evict()

    def _evict(self) -> None:
        """Write and drop the least recently used, and never the one just touched: its caller may still change it."""
        batch = WriteBatch(raw_mode=True)
        for _ in range(max(1, self._cache_entries // EVICT_SHARE)):
            if len(self._hot) <= 1:
                break
            request_id, held = self._hot.popitem(last=False)
            _write(batch, request_id, held)
        self._db.write(batch)

    # Timers

    def arm(self, due_ms: int, request_id: str) -> None:
        """Add a timer."""
        timer = (due_ms, request_id)
        if self._horizon is not None and timer > self._horizon:
            self._db.put(_timer_key(timer), b"")
            return
        heapq.heappush(self._timers, timer)
        if len(self._timers) > self._cache_timers:
            self._spill()

    def next_due_ms(self) -> int:
        """The earliest timer, or `NEVER`."""
        return self._timers[0][0] if self._timers else NEVER

    def pop_due(self) -> tuple[int, str]:
        """Take the earliest timer, ties by request id."""
        timer = heapq.heappop(self._timers)
        if not self._timers and self._horizon is not None:
            self._load_timers()
        return timer

    def _spill(self) -> None:
        """Put the later half of the timers on disk."""
        self._timers.sort()
        keep = len(self._timers) // 2
        batch = WriteBatch(raw_mode=True)
        for timer in self._timers[keep:]:
            batch.put(_timer_key(timer), b"")
        self._db.write(batch)
        del self._timers[keep:]
        self._horizon = self._timers[-1]

    def _load_timers(self) -> None:
        """Take the earliest timers back from disk."""
        batch = WriteBatch(raw_mode=True)
        iterator = self._db.iter()
        iterator.seek(_timer_key(self._horizon) if self._horizon is not None else b"t")
        loaded: list[tuple[int, str]] = []
        while iterator.valid() and len(loaded) < max(1, self._cache_timers // 2):
            key = iterator.key()
            if key[:1] != b"t":
                break
            loaded.append((int.from_bytes(key[1:9], "big") - _SIGN, key[9:].decode()))
            batch.delete(key)
            iterator.next()
        self._db.write(batch)
        self._timers = loaded  # in order, which a heap is
        self._horizon = loaded[-1] if loaded else None

    # Checkpoints

    def save(self, directory: Path) -> None:
        """Write everything into an existing, empty directory: hard links where the file system allows."""
        batch = WriteBatch(raw_mode=True)
        for request_id, held in self._hot.items():
            _write(batch, request_id, held)
        self._db.write(batch)
        self._db.flush()
        Checkpoint(self._db).create_checkpoint(str(directory / DATABASE))
        meta = {"format": FORMAT, "count": self._count, "timers": self._timers, "horizon": self._horizon}
        (directory / META).write_bytes(orjson.dumps(meta))

    def restore(self, directory: Path) -> None:
        """Take over what `save` wrote, in place of what is held; ValueError says what is wrong with it."""
        try:
            meta: dict[str, Any] = orjson.loads((directory / META).read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise ValueError(f"no join state of RocksDB here ({error}): was trainer.join_state changed?") from error
        if meta["format"] != FORMAT:
            raise ValueError(f"join state of format {meta['format']!r}, this build reads {FORMAT!r}")
        self._db.close()
        shutil.rmtree(self._path)
        shutil.copytree(directory / DATABASE, self._path, copy_function=_link)
        self._db = _open(self._path)
        self._hot.clear()
        self._count = meta["count"]
        self._timers = [(due_ms, request_id) for due_ms, request_id in meta["timers"]]
        heapq.heapify(self._timers)
        horizon = meta["horizon"]
        self._horizon = None if horizon is None else (horizon[0], horizon[1])

    def close(self) -> None:
        """Close and delete the scratch database."""
        self._db.close()
        shutil.rmtree(self._path, ignore_errors=True)


def _write(batch: WriteBatch, request_id: str, held: _Held) -> None:
    """Put what has changed into the batch."""
    if not held.dirty:
        return
    entry, name = held.entry, request_id.encode()
    if entry.served is not held.stored_served and entry.served is not None:
        batch.put(b"s" + name, pack_served(entry.served))
    batch.put(b"r" + name, pack_rows(entry))
    held.stored, held.stored_served, held.dirty = True, entry.served, False


def _timer_key(timer: tuple[int, str]) -> bytes:
    """Keys in the order of timers: bytes of UTF-8 sort as the strings do."""
    return b"t" + (timer[0] + _SIGN).to_bytes(8, "big") + timer[1].encode()


def _link(source: str, target: str) -> str:
    """Tables never change, so a link will do; all else is small and is copied."""
    if source.endswith(".sst"):
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, target)
    else:
        shutil.copy2(source, target)
    return target


def _open(path: Path) -> Rdict:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    table = BlockBasedOptions()
    table.set_bloom_filter(10, False)
    table.set_block_cache(Cache(BLOCK_CACHE_BYTES))
    options.set_block_based_table_factory(table)
    db = Rdict(str(path), options)
    unlogged: Any = WriteOptions()
    unlogged.disable_wal = True  # a property, whatever the client's type stubs say
    db.set_write_options(unlogged)
    return db
