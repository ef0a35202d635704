"""New model versions, taken into service between two batches.

A watcher looks at the store; when its pointer names another version than the one served, that version is loaded,
verified, warmed and probed in the watcher's thread, and put into a one-slot mailbox. The scorer takes it between two
batches. The version that was replaced is kept, ready, so that going back to it costs nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from esmm.batch import RankBatch, Scores
from stream_scorer.core.errors import ModelRefused
from stream_scorer.core.metric_names import MODEL_LOAD_SECONDS, MODEL_REFUSED
from stream_scorer.ports import Clock, Metrics, ModelStore, Pending, Predictor, VersionInfo

Loader = Callable[[VersionInfo], Predictor]
Stamp = tuple[tuple[str, int, int], ...]  # name, mtime in ns and size of each file

RETRY_S = 30.0  # after a failure that says nothing about the version itself

_log = structlog.get_logger("stream_scorer.hotswap")


class Lease:
    """A loaded predictor as the scorer holds it: closing gives it back, and the watcher decides how long it stays."""

    __slots__ = ("_predictor", "returned")

    def __init__(self, predictor: Predictor) -> None:
        """``predictor`` stays the watcher's."""
        self._predictor = predictor
        self.returned = False

    @property
    def version(self) -> int:
        """The model version."""
        return self._predictor.version

    def launch(self, batch: RankBatch) -> Pending:
        """See `stream_scorer.ports.Predictor`."""
        return self._predictor.launch(batch)

    def collect(self, pending: Any) -> Scores:
        """See `stream_scorer.ports.Predictor`."""
        return self._predictor.collect(pending)

    def close(self) -> None:
        """Give it back: no batch is in flight on it any more."""
        self.returned = True


class Mailbox:
    """Holds at most one predictor that is ready. Safe between the watcher's thread and the scorer's."""

    def __init__(self) -> None:
        """Empty."""
        self._lock = threading.Lock()
        self._waiting: Lease | None = None
        self._serving: int | None = None
        self._previous: int | None = None

    def offer(self, lease: Lease) -> None:
        """Put it in, in the place of one that was not taken. A version that is served already only clears the slot."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = lease if lease.version != self._serving else None
            if self._waiting is None:
                lease.close()

    def take(self) -> Lease | None:
        """The predictor waiting, once. The taker closes it when it is replaced and nothing is in flight on it."""
        if self._waiting is None:  # asked for once a batch: no lock for nothing
            return None
        with self._lock:
            taken, self._waiting = self._waiting, None
            if taken is not None:
                self._previous, self._serving = self._serving, taken.version
            return taken

    @property
    def heading(self) -> int | None:
        """The version that is served, or will be once what waits is taken."""
        with self._lock:
            return self._serving if self._waiting is None else self._waiting.version

    def kept(self) -> set[int | None]:
        """Versions to keep open: waiting, served, and the one served before, to go back to."""
        with self._lock:
            return {self._serving, self._previous, None if self._waiting is None else self._waiting.version}


@dataclass(slots=True)
class _Loaded:
    predictor: Predictor
    leases: list[Lease]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A version that failed, its files then, and when it is worth another try though neither changed."""

    version: int
    stamp: Stamp
    retry_at_s: float


class Watcher:
    """Follows the store's pointer. `tick` does one look; `start` runs it in a thread."""

    def __init__(self, store: ModelStore, loader: Loader, mailbox: Mailbox, metrics: Metrics, clock: Clock) -> None:
        """``loader`` verifies, loads, warms and probes; it raises `ModelRefused` (or anything) to refuse."""
        self._store = store
        self._loader = loader
        self._mailbox = mailbox
        self._metrics = metrics
        self._clock = clock
        self._open: dict[int, _Loaded] = {}
        self._refused: _Refusal | None = None
        self._trouble = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def tick(self) -> int | None:
        """Look once; returns the version that was offered, if one was. Never raises."""
        self._close_unused()
        version = self._current()
        if self._refused is not None and self._refused.version != version:
            self._refused = None
        if version is None or version == self._mailbox.heading:
            return None
        loaded = self._open.get(version) or self._load(version)
        if loaded is None:
            return None
        lease = Lease(loaded.predictor)
        loaded.leases.append(lease)
        self._mailbox.offer(lease)
        return version

    def _current(self) -> int | None:
        try:
            version = self._store.current()
        except Exception as error:  # noqa: BLE001 - a store that is away for a while must not end the watcher
            if str(error) != self._trouble:
                _log.error("model store not readable", error=str(error))
            self._trouble = str(error)
            return None
        self._trouble = ""
        return version

    def _load(self, version: int) -> _Loaded | None:
        started_s = self._clock.monotonic_s()
        stamp: Stamp = ()
        try:
            info = self._store.info(version)
            stamp = _stamp(info)
            if self._known_bad(stamp, started_s):
                return None
            predictor = self._loader(info)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the old one goes on serving
            if not self._known_bad(stamp, started_s):
                self._refuse(version, stamp, error)
            return None
        self._refused = None
        self._open[version] = _Loaded(predictor, [])
        self._metrics.observe(MODEL_LOAD_SECONDS, self._clock.monotonic_s() - started_s)
        _log.info("model version ready", version=version)
        return self._open[version]

    def _known_bad(self, stamp: Stamp, now_s: float) -> bool:
        return self._refused is not None and self._refused.stamp == stamp and now_s < self._refused.retry_at_s

    def _refuse(self, version: int, stamp: Stamp, error: Exception) -> None:
        final = isinstance(error, ModelRefused)
        reason = error.reason if isinstance(error, ModelRefused) else "error"
        self._refused = _Refusal(version, stamp, math.inf if final else self._clock.monotonic_s() + RETRY_S)
        self._metrics.inc(MODEL_REFUSED, reason=reason)
        _log.error("model version refused", version=version, reason=reason, error=str(error) or type(error).__name__)

    def _close_unused(self) -> None:
        kept = self._mailbox.kept()
        for version, loaded in list(self._open.items()):
            loaded.leases = [lease for lease in loaded.leases if not lease.returned]
            if version not in kept and not loaded.leases:
                del self._open[version]
                loaded.predictor.close()

    def start(self, poll_s: float) -> None:
        """Look every ``poll_s`` seconds until `stop`."""
        self._thread = threading.Thread(target=self._run, args=(poll_s,), name="model-watcher", daemon=True)
        self._thread.start()

    def _run(self, poll_s: float) -> None:
        while not self._stop.wait(poll_s):
            self.tick()

    def stop(self) -> None:
        """Stop looking; waits for a load under way. The predictors stay open: the scorer may be using one."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """`stop`, then close every predictor; call when nothing is scored any more."""
        self.stop()
        for loaded in self._open.values():
            loaded.predictor.close()
        self._open = {}


def _stamp(info: VersionInfo) -> Stamp:
    files = ((path.name, path.stat()) for path in sorted(info.path.iterdir()))
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in files)
