"""What the page knows: one frozen snapshot of the whole loop, sent as a server-sent event once or twice a second.

This is the page's only input, and its contract: `stream_scorer/dashboard/static/app.js` reads these names and nothing
else. Counts are totals since the run began (the page takes rates from two snapshots), ``*_ms`` that name a moment are
milliseconds since the epoch, ``*_ms`` that name a span are milliseconds, shares are 0 to 1. Every part that may be
unknown may be None, and a number that is not finite is sent as null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import orjson

VersionState = Literal["live", "previous", "held", "refused"]
EventKind = Literal["start", "swap", "publish", "hold", "refuse", "reject", "degraded", "lost", "stop", "note"]


@dataclass(frozen=True, slots=True)
class LatencyMs:
    """Request timestamp to scored, milliseconds, over the recent window."""

    p50: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class ScorerPart:
    """The scoring loop, all scorer processes together."""

    requests: int
    scored: int
    rejected: int
    candidates_per_s: float | None
    latency_ms: LatencyMs | None
    lag: int | None = None  # records behind the end of the assigned partitions
    model_version: int | None = None
    degraded_share: float | None = None  # of score messages
    missing_share: float | None = None  # of candidates scored with a default vector
    batch_rows: float | None = None  # mean candidate rows a batch


@dataclass(frozen=True, slots=True)
class ExampleCounts:
    """Training rows by `esmm.batch.Kind`."""

    first: int
    late_conversion: int
    matured: int


@dataclass(frozen=True, slots=True)
class FeedbackCounts:
    """Feedback messages read by the trainer."""

    impression: int
    click: int
    conversion: int


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """Progressive metrics (each row is predicted before it is learned from) over the recent window."""

    auc: float | None
    logloss: float | None  # nats
    pcoc: float | None  # predicted over observed; 1.0 is calibrated


@dataclass(frozen=True, slots=True)
class TrainerPart:
    """Join, learning, gate."""

    examples: ExampleCounts
    versions_published: int
    gate_holds: int
    open_impressions: int | None = None
    step_ms: float | None = None  # mean optimiser step
    ctr: TaskMetrics | None = None
    ctcvr: TaskMetrics | None = None
    served: int | None = None  # `served` messages read
    feedback: FeedbackCounts | None = None


@dataclass(frozen=True, slots=True)
class TruthPart:
    """Only a simulated market knows it: how far the live scores are from the true probabilities."""

    auc_ctr: float | None
    mean_abs_error: float | None  # mean |pCTR - true P(click)|


@dataclass(frozen=True, slots=True)
class VersionPart:
    """One model version. ``logloss`` is CTCVR's, progressive, at the moment it was published."""

    version: int
    published_ms: int | None
    swapped_ms: int | None
    state: VersionState
    logloss: float | None = None


@dataclass(frozen=True, slots=True)
class PromisePart:
    """``lost``: requests with no score and no reject that are past their deadline. ``duplicates``: scored twice."""

    lost: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class EventPart:
    """Something worth a line, newest last."""

    t_ms: int
    kind: EventKind
    text: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The loop at ``t_ms``. ``profile`` says on what it runs, in words a newcomer understands."""

    t_ms: int
    profile: str
    uptime_s: float
    scorer: ScorerPart | None = None
    trainer: TrainerPart | None = None
    truth: TruthPart | None = None
    versions: tuple[VersionPart, ...] = ()
    promises: PromisePart | None = None
    events: tuple[EventPart, ...] = ()


def to_json(snapshot: Snapshot) -> bytes:
    """One line of JSON with exactly the field names above; NaN and infinities become null."""
    return orjson.dumps(snapshot)


def to_event(snapshot: Snapshot) -> bytes:
    """The snapshot as a server-sent event; its id lets the page drop what it has already drawn after a reconnect."""
    return b"id: %d\nevent: snapshot\ndata: %s\n\n" % (snapshot.t_ms, to_json(snapshot))


END_EVENT = b"event: end\ndata: {}\n\n"  # the run is over: the page says so instead of "connection lost"
