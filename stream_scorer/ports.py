"""The seams: what the loops need from the world. Fakes and real adapters pass one contract suite (tests/contract)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from esmm.batch import Examples, Float32, RankBatch, Scores, StepStats
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.join_entry import JoinStore
from stream_scorer.core.metric_names import Metric
from stream_scorer.core.records import (
    CommitResult,
    DeliveryReport,
    Fetched,
    OutRecord,
    Record,
    TopicPartition,
)


class Clock(Protocol):
    """Time, asked for and never slept."""

    def now_ms(self) -> int:
        """Wall clock, milliseconds since the epoch."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back."""
        ...


class RebalanceListener(Protocol):
    """Called from inside `Source.poll`, on the polling thread."""

    def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions were added; their records carry the new epoch."""
        ...

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions will go when this returns: finish, publish and commit what is in flight for them."""
        ...

    def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Partitions are gone already: forget them, commit nothing."""
        ...


class Source(Protocol):
    """A consumer group member. Every method is called from one thread."""

    def subscribe(self, listener: RebalanceListener) -> None:
        """Join the group. Call once, before the first poll."""
        ...

    def poll(self, max_records: int, wait_s: float, linger_s: float) -> list[Record]:
        """Wait up to ``wait_s`` for a first record, then take what comes within ``linger_s``, up to ``max_records``."""
        ...

    def commit(self, next_offsets: Mapping[TopicPartition, int]) -> CommitResult:
        """Commit synchronously; a fenced commit is a value."""
        ...

    def seek(self, next_offsets: Mapping[TopicPartition, int]) -> None:
        """Read on from these offsets (of assigned partitions)."""
        ...

    def pause(self) -> None:
        """Deliver nothing from any assigned partition, staying in the group (poll must still be called)."""
        ...

    def resume(self) -> None:
        """Undo `pause`."""
        ...

    def lag(self) -> int:
        """Records between the position and the end of the assigned partitions, as last known to the client."""
        ...

    def positions(self) -> Mapping[TopicPartition, int]:
        """Where reading goes on, of assigned partitions for which that is known; in on_assign: what was committed."""
        ...

    def ended(self) -> Collection[TopicPartition]:
        """Assigned partitions that are known to have been read to their end, as of the last poll."""
        ...

    def close(self) -> None:
        """Leave the group (calls on_revoke first when partitions are held)."""
        ...


class Sink(Protocol):
    """A producer. ``report`` is called once a record, from inside `poll` or `flush`, with None or an error."""

    def send(self, record: OutRecord, report: DeliveryReport) -> None:
        """Enqueue; a full queue is waited out for a bounded time, then `FatalError`."""
        ...

    def poll(self) -> None:
        """Serve delivery reports that are ready, without waiting."""
        ...

    def flush(self, deadline: Deadline) -> bool:
        """Wait for all reports; False when the deadline passed first."""
        ...

    def purge(self) -> None:
        """Drop what was enqueued and not yet sent (reports come with an error)."""
        ...

    def close(self, deadline: Deadline) -> None:
        """Flush and stop."""
        ...


class StopSignal(Protocol):
    """A `threading.Event`, as far as a loop is concerned."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait until set, or for ``timeout`` seconds."""
        ...


class FeatureStore(Protocol):
    """Features by id."""

    def fetch(self, users: Sequence[str], items: Sequence[str], now_ms: int, deadline: Deadline) -> Fetched:
        """Features of R requests' users and B rows' items, repeats allowed; an outage never raises (degraded)."""
        ...


class Pending(Protocol):
    """A batch on its way through the model."""

    @property
    def rows(self) -> int:
        """B."""
        ...


class Predictor(Protocol):
    """One model version, ready to score. ``launch`` returns at once; ``collect`` waits. Both from one thread."""

    @property
    def version(self) -> int:
        """The model version."""
        ...

    def launch(self, batch: RankBatch) -> Pending:
        """Start computing; the arrays must not be changed until collected."""
        ...

    def collect(self, pending: Any) -> Scores:
        """The scores of a launched batch, in its row order."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


class Learner(Protocol):
    """A model that learns."""

    def step(self, examples: Examples) -> StepStats:
        """Predict every row, then take one optimiser step."""
        ...

    def predict(self, examples: Examples) -> tuple[Float32, Float32]:
        """Give pCTR and pCTCVR of every row with the weights as they are."""
        ...

    def embedding_rows(self) -> Mapping[str, int]:
        """Embedding rows ``admitted`` to training and ``evicted`` from it, ever; empty when all are trained."""
        ...

    def finite(self) -> bool:
        """Whether everything that `save` would write is: what is not may not be restored."""
        ...

    def save(self, directory: Path) -> None:
        """Write weights, optimiser and auxiliary state for an exact restart into an existing directory."""
        ...

    def restore(self, directory: Path) -> None:
        """Read what `save` wrote; raises ValueError that says what is wrong."""
        ...

    def export(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Write ``model.safetensors`` and ``manifest.json`` (schema, hyper-parameters, sha256 and the given fields)."""
        ...


class VersionInfo(NamedTuple):
    """One model version in a store."""

    version: int
    path: Path
    manifest: Mapping[str, Any]


class ModelStore(Protocol):
    """Versions of one model: directories named by number, and a pointer to the current one."""

    def versions(self) -> list[int]:
        """All complete versions, ascending."""
        ...

    def current(self) -> int | None:
        """The version that scorers should serve, or None when the store is empty."""
        ...

    def info(self, version: int) -> VersionInfo:
        """Where it is and what its manifest says; `ModelRefused` when missing or unreadable."""
        ...

    def publish(self, write: Callable[[Path, int], None], promote: bool = True) -> int:
        """``write(tmp_dir, version)`` fills a directory; it becomes the next version atomically, then ``current``."""
        ...

    def promote(self, version: int) -> None:
        """Point ``current`` at an existing version (also how a rollback is done)."""
        ...

    def prune(self, keep: int, also: Collection[int] = ()) -> list[int]:
        """Delete all but the newest ``keep`` versions, the current one and those in ``also``; says which went."""
        ...


class Judge(Protocol):
    """A published version, to compare a candidate with."""

    def predict(self, examples: Examples) -> tuple[Float32, Float32]:
        """Give pCTR and pCTCVR of every row, as a scorer would publish them."""
        ...


class JoinState(JoinStore, Protocol):
    """Where the join keeps what it remembers, and how that is saved. All of it belongs to one thread."""

    def __len__(self) -> int:
        """Requests held."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything into an existing, empty directory."""
        ...

    def restore(self, directory: Path) -> None:
        """Take over what `save` wrote, in place of what is held; ValueError says what is wrong with it."""
        ...

    def close(self) -> None:
        """Release files and memory."""
        ...


class SavedCheckpoint(NamedTuple):
    """A checkpoint that was verified: JSON data, arrays, and the directory with the parts' own files."""

    path: Path
    state: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


class Checkpoints(Protocol):
    """The trainer's own restart points: each appears whole or not at all."""

    def save(self, write: Callable[[Path], None], state: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> int:
        """``write`` fills a directory; with ``state`` and ``arrays`` it appears as the next number."""
        ...

    def restore(self, read: Callable[[SavedCheckpoint], None]) -> int | None:
        """``read`` takes the newest good one over; one it raises ValueError for is refused. None when there is none."""
        ...


class Metrics(Protocol):
    """Counters, gauges and histograms by typed name; labels are bound once, not on the hot path."""

    def inc(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...
