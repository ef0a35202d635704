"""The second half of a batch's life: collect, check, encode, send, and seal its ticket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from esmm.batch import Bool, RankBatch
from stream_scorer.core import metric_names as names
from stream_scorer.core.assemble import BatchPlan
from stream_scorer.core.codec import ScoredBatch, valid_scores
from stream_scorer.core.ledger import Ledger, Ticket
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.output import OutputPolicy, score_messages
from stream_scorer.core.records import Fetched, Record
from stream_scorer.core.rejects import Reject, reject_record
from stream_scorer.core.scorer_stats import Tally
from stream_scorer.ports import Predictor
from stream_scorer.scorer.ports import ScorerPorts


class Work(NamedTuple):
    """The part of a batch that goes through the model: R requests."""

    requests: list[ScoreRequest]
    records: list[Record]
    plan: BatchPlan
    fetched: Fetched
    batch: RankBatch
    predictor: Predictor
    pending: Any
    full: bool  # no room for another request
    planned_s: float  # when its features were asked for
    launched_s: float


class Flight(NamedTuple):
    """A batch in flight."""

    ticket: Ticket
    rejects: list[Reject]
    work: Work | None  # None: there was nothing but rejects


def timed(ports: ScorerPorts, stage: str, started_s: float) -> float:
    """Observe how long a stage took; the time now."""
    now_s = ports.clock.monotonic_s()
    ports.metrics.observe(names.STAGE_SECONDS, now_s - started_s, stage=stage)
    return now_s


class Publisher:
    """Turns a batch in flight into messages: the second half of a batch's life."""

    def __init__(self, ports: ScorerPorts, output: OutputPolicy, ledger: Ledger, tally: Tally) -> None:
        self._ports = ports
        self._output = output
        self._ledger = ledger
        self._tally = tally

    def publish(self, flight: Flight) -> int:
        """Collect, encode, send and seal. Says how many requests the model gave no usable scores for: rejects too."""
        rejects = list(flight.rejects)
        scored = 0 if flight.work is None else self._scores(flight.work, flight.ticket, rejects)
        unscorable = len(rejects) - len(flight.rejects)
        rejected = self._rejects(rejects, flight.ticket)
        flight.ticket.seal(scored * self._output.messages_a_request + rejected, scored)
        return unscorable

    def _scores(self, work: Work, ticket: Ticket, rejects: list[Reject]) -> int:
        """Send a batch's results, add to ``rejects`` what has none; how many requests got scores."""
        ports = self._ports
        collect_s = ports.clock.monotonic_s()
        scores = work.predictor.collect(work.pending)
        timed(ports, "collect", collect_s)  # how long the loop waited; "compute" is from launch on
        now_s = timed(ports, "compute", work.launched_s)
        good_R = np.logical_and.reduceat(valid_scores(scores, work.plan.rows), work.plan.starts[:-1])
        scored = ScoredBatch(work.requests, work.plan, work.batch, work.fetched, scores, ports.clock.now_ms())
        messages_R = score_messages(scored, work.records, self._output)
        now_s = timed(ports, "encode", now_s)
        current_R = self._current(work.records, ticket)
        if not (good_R & current_R).all():
            detail = f"model version {scores.model_version} gave a value that is no probability"
            bad = np.flatnonzero(current_R & ~good_R).tolist()
            rejects.extend(Reject(work.records[at], "score", detail) for at in bad)
            messages_R = [messages_R[at] for at in np.flatnonzero(current_R & good_R).tolist()]
        for messages in messages_R:
            for message in messages:
                ports.sink.send(message, ticket.report)
        timed(ports, "publish", now_s)
        self._count(scored)
        return len(messages_R)

    def _rejects(self, rejects: list[Reject], ticket: Ticket) -> int:
        """Send them; how many."""
        current = self._current([one.record for one in rejects], ticket).tolist()
        rejects = [reject for reject, keep in zip(rejects, current, strict=True) if keep]
        output = self._output
        for reject in rejects:
            self._ports.sink.send(reject_record(reject, output.rejects_topic, output.code_version), ticket.report)
        self._tally.rejected += len(rejects)
        for reason, count in Counter(reject.reason for reject in rejects).items():
            self._ports.metrics.inc(names.REJECTED, count, reason=reason)
        return len(rejects)

    def _current(self, records: Sequence[Record], ticket: Ticket) -> Bool:
        """Which records are still ours; results for the others are dropped and counted."""
        if not ticket.stale:
            return np.ones(len(records), np.bool_)
        current = np.array([self._ledger.current(record) for record in records], np.bool_)
        stale = len(records) - int(current.sum())
        self._tally.stale += stale
        self._ports.metrics.inc(names.STALE_EPOCH, stale)
        return current

    def _count(self, scored: ScoredBatch) -> None:
        metrics, tally = self._ports.metrics, self._tally
        rows = scored.plan.rows
        latency_ms_R = scored.scored_at_ms - np.array([request.ts for request in scored.requests], np.int64)
        tally.batches += 1
        tally.candidates += rows
        tally.latency.add(latency_ms_R)
        tally.served(scored.scores.model_version)
        metrics.inc(names.CANDIDATES, rows)
        metrics.observe(names.BATCH_ROWS, rows)
        metrics.observe(names.LATENCY_SECONDS, float(latency_ms_R.max()) / 1000)  # one a batch: its slowest
