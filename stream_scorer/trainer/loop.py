"""The training loop: poll, merge, decode, join, learn; publish through the gate; checkpoint, then commit.

Guided tour: `core/merge.py` (one order for all partitions), `core/join.py` (what becomes of an event), `step` here.

What is exact: weights are a function of the checkpoint and of the order in which records are taken, and that order is a
function of the topics' content (see `core/merge.py`). A step has a fixed number of rows, or ends when *record* time has
moved on by ``max_wait_ms``: nothing that changes weights reads a clock while there is anything to read. Only when all
partitions are at their end, and stay so for ``max_wait_ms``, does the clock move event time and end a step early.

One trainer owns all partitions of ``served`` and ``feedback``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from esmm.batch import Examples, Kind
from stream_scorer.core import metric_names as names
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.drift import DriftAlarm
from stream_scorer.core.errors import CommitRefused, FatalError
from stream_scorer.core.gate_rows import is_held_out
from stream_scorer.core.inbox import read
from stream_scorer.core.join import Joiner
from stream_scorer.core.join_entry import NEVER
from stream_scorer.core.merge import Merge, Taken
from stream_scorer.core.pending import Pending, from_arrays, to_arrays
from stream_scorer.core.records import TopicPartition
from stream_scorer.core.rejects import Reject, reject_record
from stream_scorer.core.scoreboard import Scoreboard
from stream_scorer.core.trainer_stats import TrainerStats, TrainerTally
from stream_scorer.core.watermark import BEGINNING, Watermark
from stream_scorer.ports import SavedCheckpoint, StopSignal
from stream_scorer.trainer.policy import TrainerPolicy
from stream_scorer.trainer.ports import TrainerPorts
from stream_scorer.trainer.publisher import LINEAGE, Publisher
from stream_scorer.trainer.steps import Step, Steps
from stream_scorer.trainer.teller import Teller

_log = structlog.get_logger("stream_scorer.trainer")

STATS_EVERY_S = 1.0
NO_CHECKPOINT = "offsets_without_checkpoint"  # name of a warning
LOGGED_REJECTS = 10  # the first ones are logged, then one in a thousand


class Trainer:
    """Learns until told to stop. Also the source's rebalance listener."""

    def __init__(self, ports: TrainerPorts, policy: TrainerPolicy) -> None:
        self._ports = ports
        self._policy = policy
        self._joiner = Joiner(policy.join, ports.join_state, Watermark(policy.watermark, policy.feedback_topic))
        self._merge = Merge(policy.merge_idle_s, policy.merge_records)
        self._pending = Pending()
        self._board = Scoreboard(ports.stats_kind, policy.scoreboard)
        windows = (policy.join.click_window_ms, policy.join.observation_window_ms)
        self._drift = DriftAlarm(policy.drift, *(window + policy.join.tick_ms for window in windows))
        self._publisher = Publisher(ports, policy.gate, policy.gate_rows, policy.keep_versions)
        self._steps = Steps(ports.learner.step, ports.clock.monotonic_s, policy.overlap)
        self._tally = TrainerTally()
        self._stats = TrainerStats()
        self._teller = Teller(ports.metrics)
        self._next: dict[TopicPartition, int] = {}  # offset after the last record taken
        self._rewind: dict[TopicPartition, int] = {}  # assigned since the last poll: where to read on
        self._pending_since_ms = 0  # record time when the oldest row began to wait
        self._unpublished = 0  # rows learned, or refused: then the gate looks whether the weights are numbers
        self._reject_error: object | None = None
        self._refused: str | None = None  # why the group did not take the last checkpoint's offsets
        self._impatient = 0
        self._started = self._failed = self._unsaved = self._lineage_saved = False
        self._held: set[TopicPartition] = set()
        self._heard_s = self._published_s = self._saved_s = 0.0
        self._stats_s = float("-inf")

    # The loop

    def run(self, stop: StopSignal) -> None:
        """Learn until ``stop`` is set, then drain. Raises FatalError when a promise cannot be kept."""
        try:
            self.start()
            while not stop.is_set():
                self.step()
            drained = self.drain(Deadline.after(self._policy.drain_timeout_s, self._ports.clock.monotonic_s))
        except BaseException:
            self._failed = True  # half a step was applied: no checkpoint may be made of it on the way out
            raise
        finally:
            self._steps.close()
        if not drained:
            if self._refused is not None:
                raise CommitRefused(f"the last offsets were not committed ({self._refused}); the checkpoint has them")
            raise FatalError("rejects were not acknowledged in time; nothing was committed since the last checkpoint")

    def start(self) -> None:
        """Restore the newest good checkpoint, publish a first version into an empty store, join the group."""
        if self._started:
            return
        self._started = True
        number = self._ports.checkpoints.restore(self._restore)
        if number is not None:
            _log.info("restored from a checkpoint", checkpoint=number, steps=self._tally.steps)
        self._heard_s = self._published_s = self._saved_s = self._ports.clock.monotonic_s()
        self._publisher.publish_first(self._facts)
        self._ports.source.subscribe(self)

    def step(self) -> int:
        """One turn; how many records it took."""
        self.start()
        ended = self._read()
        caught_up = bool(self._held) and self._held <= set(ended)
        now_s = self._ports.clock.monotonic_s()
        taken = self._merge.take(self._policy.max_records, now_s, ended)
        self._warn_of_impatience()
        if taken.records:
            self._take(self._unread(taken))
        if taken.records or len(self._merge) or not caught_up:
            self._heard_s = now_s
        else:
            self._quiet(now_s)
        self._ports.sink.poll()
        self._housekeeping(now_s)
        return len(taken.records)

    def drain(self, deadline: Deadline) -> bool:
        """Checkpoint and commit; False when time ran out or the offsets were refused.

        Rows waiting for a full step wait in the checkpoint: stopping changes no weights.
        """
        done = self._ports.sink.flush(deadline)
        if done:
            self._checkpoint()
        self._refresh_stats(self._ports.clock.monotonic_s())
        return done and self._refused is None

    def stats(self) -> TrainerStats:
        """A snapshot, a second old at most; may be asked for from another thread."""
        return self._stats

    @property
    def ready(self) -> bool:
        """The checkpoint is restored and the group is being joined."""
        return self._started

    # Reading

    def _read(self) -> Collection[TopicPartition]:
        """Poll into the merge; the partitions of which nothing is left to read."""
        source, policy = self._ports.source, self._policy
        waiting = len(self._merge)
        if waiting < policy.merge_records:
            wait_s = policy.idle_wait_s if waiting < policy.max_records else 0.0
            records = source.poll(policy.max_records, wait_s, policy.linger_s)
            if self._rewind:  # what this poll returned of partitions just assigned comes again from where we want it
                source.seek(self._rewind)
                records = [r for r in records if r.position.topic_partition not in self._rewind]
                self._rewind = {}
            self._merge.push(records, self._ports.clock.monotonic_s())
        return source.ended()

    def _warn_of_impatience(self) -> None:
        if self._merge.impatient and not self._impatient:
            _log.warning("a partition with more to read was not waited for: a replay may take records in another order")
        self._impatient = self._merge.impatient

    def _unread(self, taken: Taken) -> Taken:
        """Without what was taken before: it is read again after a rebalance."""
        known, (records, where) = self._next, taken
        offsets = [record.position.offset for record in records]
        first = dict(zip(reversed(where), reversed(offsets), strict=True))
        if any(offset < known.get(partition, 0) for partition, offset in first.items()):
            new = [at for at, (p, offset) in enumerate(zip(where, offsets, strict=True)) if offset >= known.get(p, 0)]
            records, where = [records[at] for at in new], [where[at] for at in new]
            offsets = [offsets[at] for at in new]
        known |= {partition: offset + 1 for partition, offset in dict(zip(where, offsets, strict=True)).items()}
        return Taken(records, where)

    def _take(self, taken: Taken) -> None:
        """Records through the join; learn whenever enough rows have come of them."""
        inbox = read(taken, self._policy.served_topic, self._policy.layout)
        for reject in inbox.rejects:
            self._reject(reject)
        self._unsaved = self._unsaved or bool(taken.records)
        self._tally.served += (served := inbox.served)
        self._tally.feedback += len(inbox.events) - served
        arrivals = self._joiner.arrivals(inbox)
        while (record_ms := self._joiner.take_in(arrivals, self._patience_ms)) is not None:
            self._collect(record_ms)

    @property
    def _patience_ms(self) -> int:
        """The record time at which the oldest row has waited enough."""
        return self._pending_since_ms + self._policy.max_wait_ms if self._pending.rows else NEVER

    def _reject(self, reject: Reject) -> None:
        self._tally.rejected += 1
        self._ports.metrics.inc(names.TRAINER_REJECTED, reason=reject.reason)
        if self._tally.rejected <= LOGGED_REJECTS or self._tally.rejected % 1_000 == 0:
            _log.warning("message rejected", reason=reject.reason, detail=reject.detail, at=reject.record.position)
        out = reject_record(reject, self._policy.rejects_topic, self._policy.code_version)
        self._ports.sink.send(out, self._on_reject_sent)

    def _on_reject_sent(self, error: object | None, _: object) -> None:
        self._reject_error = error or self._reject_error

    def _quiet(self, now_s: float) -> None:
        """Nothing to read anywhere: event time goes on as the clock does, so that what is due becomes due."""
        silent_ms = int((now_s - self._heard_s) * 1_000)
        newest_ms = self._joiner.watermark.newest_ms
        if silent_ms < self._policy.max_wait_ms:
            return
        if newest_ms != BEGINNING:
            self._joiner.advance(newest_ms + silent_ms)
            self._pending.extend(self._joiner.take(), self._joiner.now_ms)
        while self._pending.rows:
            self._learn(self._pending.take(min(self._pending.rows, self._policy.batch_rows)))
        self._finish_step()

    # Learning

    def _collect(self, record_ms: int) -> None:
        """Take what the join emitted; learn full steps, and a smaller one when its oldest row has waited enough."""
        pending, rows = self._pending, self._policy.batch_rows
        if self._joiner.emitted:
            if not pending.rows:
                self._pending_since_ms = record_ms
            pending.extend(self._joiner.take(), self._joiner.now_ms)
            while pending.rows >= rows:
                self._learn(pending.take(rows))
                self._pending_since_ms = record_ms
        if record_ms >= self._patience_ms:
            self._learn(pending.take(pending.rows))

    def _learn(self, examples: Examples) -> None:
        self._unsaved = True
        was = self._drift.reason
        verdict = self._drift.check(examples)
        if self._drift.reason != was:
            _log.warning("input alarm", on=not verdict.learn, reason=verdict.reason or was, detail=verdict.detail)
        if not verdict.learn:
            self._tally.skipped += examples.rows
            self._ports.metrics.inc(names.EXAMPLES, examples.rows, kind="skipped")
            return
        if verdict.detail:  # the world has changed for good
            self._publisher.forget_held_out()
        examples = self._hold_out(examples)
        if not examples.rows:
            return
        self._finish_step()
        self._steps.launch(examples, self._pending.settled_ms)
        if not self._policy.overlap:
            self._finish_step()

    def _finish_step(self) -> None:
        """Wait for the step in flight, if there is one, and account for it."""
        step = self._steps.collect()
        if step is not None:
            self._ports.metrics.observe(names.STEP_SECONDS, step.took_s)
            self._account(step)

    def _hold_out(self, examples: Examples) -> Examples:
        """Give the gate its share; the rest."""
        held_B = is_held_out(examples, self._policy.holdout)
        if not held_B.any():
            return examples
        self._publisher.hold_out(held := examples.take(np.flatnonzero(held_B)))
        self._tally.held_out += held.rows
        self._ports.metrics.inc(names.EXAMPLES, held.rows, kind="held_out")
        return examples.take(np.flatnonzero(~held_B))

    def _account(self, step: Step) -> None:
        tally, examples, stats = self._tally, step.examples, step.stats
        tally.steps += 1
        self._unpublished += examples.rows
        if not stats.finite:
            tally.refused_steps += 1
            _log.error("a step was refused: its loss or gradient is not finite", rows=examples.rows)
            return
        rows_of = np.bincount(examples.kind_B, minlength=len(Kind)).tolist()
        tally.first += rows_of[Kind.FIRST]
        tally.late_conversion += rows_of[Kind.LATE_CONVERSION]
        tally.matured += rows_of[Kind.MATURED]
        for kind in Kind:
            self._ports.metrics.inc(names.EXAMPLES, rows_of[kind], kind=kind.name.lower())
        self._board.add(examples, stats.ctr_B, stats.ctcvr_B)
        self._board.advance(step.settled_ms)
        self._publisher.add(examples, stats.ctr_B, stats.ctcvr_B)

    # Publishing and restarting

    def _housekeeping(self, now_s: float) -> None:
        policy = self._policy
        by_time = now_s - self._published_s >= policy.publish_every_s
        if by_time or 0 < policy.publish_every_examples <= self._unpublished + self._steps.rows:
            self._finish_step()
        by_count = 0 < policy.publish_every_examples <= self._unpublished
        if (by_time or by_count) and self._unpublished:
            if not self._lineage_saved:  # a version's lineage must outlive this process
                self._unsaved = True
                self._checkpoint()
            self._published_s, self._unpublished, self._unsaved = now_s, 0, True
            decision = self._publisher.offer(self._facts)
            if decision is not None and decision.reason == "nonfinite":
                self._heal()
        if self._unsaved and now_s - self._saved_s >= policy.checkpoint_every_s:
            self._checkpoint()
        if now_s - self._stats_s >= STATS_EVERY_S:
            self._refresh_stats(now_s)

    def _facts(self) -> dict[str, Any]:
        """What a version's manifest says of how it came about."""
        offsets = {f"{where.topic}/{where.partition}": offset for where, offset in sorted(self._next.items())}
        return {"offsets": offsets, "examples": self._tally.examples, "metrics": self._board.summary()}

    def _heal(self) -> None:
        """The weights are not finite: go back to the last checkpoint's, and learn on from what comes next."""
        _log.error("the learner's weights are not finite: going back to the last checkpoint's")
        learner = self._ports.learner
        if self._ports.checkpoints.restore(lambda saved: learner.restore(saved.path / "learner")) is None:
            raise FatalError("the learner's weights are not finite and there is no checkpoint to go back to")
        self._publisher.forget()

    def _checkpoint(self) -> None:
        """Everything that a restart needs, at once; only then the offsets it has seen."""
        ports = self._ports
        self._finish_step()
        if not self._unsaved:
            if self._refused is not None:
                self._commit()
            return
        if not ports.sink.flush(Deadline.after(self._policy.drain_timeout_s, ports.clock.monotonic_s)):
            raise FatalError("rejects were not acknowledged in time")
        if self._reject_error is not None:
            raise FatalError(f"a reject could not be written: {self._reject_error}")
        if not ports.learner.finite():
            self._heal()
        self._tally.checkpoints += 1
        arrays = to_arrays("pending", self._pending.snapshot()) | self._publisher.arrays()
        ports.checkpoints.save(self._write_parts, self._state(), arrays)
        self._unsaved, self._lineage_saved, self._saved_s = False, True, ports.clock.monotonic_s()
        ports.metrics.inc(names.CHECKPOINTS)
        self._commit()

    def _commit(self) -> None:
        held = {where: offset for where, offset in self._next.items() if where in self._held}
        result = self._ports.source.commit(held)
        self._refused = None if result.committed else result.error or "refused"
        if not result.committed:
            _log.warning("offsets not committed; a restart goes by the checkpoint all the same", error=result.error)

    def _write_parts(self, directory: Path) -> None:
        for name, save in (("learner", self._ports.learner.save), ("join", self._ports.join_state.save)):
            (directory / name).mkdir()
            save(directory / name)

    def _state(self) -> dict[str, Any]:
        return {
            "offsets": [[*where, offset] for where, offset in sorted(self._next.items())],
            "joiner": self._joiner.state(),
            "merge": self._merge.state(),
            "board": self._board.to_dict(),
            "drift": self._drift.state(),
            "publisher": self._publisher.state(),
            "tally": asdict(self._tally),
            "pending_since_ms": self._pending_since_ms,
            "unpublished": self._unpublished,
        }

    def _restore(self, saved: SavedCheckpoint) -> None:
        state: Mapping[str, Any] = saved.state
        self._ports.learner.restore(saved.path / "learner")
        self._ports.join_state.restore(saved.path / "join")
        self._next = {TopicPartition(topic, number): offset for topic, number, offset in state["offsets"]}
        self._joiner.restore(state["joiner"])
        self._teller.start(self._joiner.outcomes, self._ports.learner.embedding_rows())
        self._merge.restore(state["merge"])
        self._board.load(state["board"])
        self._drift.restore(state["drift"])
        self._publisher.restore(state["publisher"], saved.arrays)
        self._pending.restore(from_arrays("pending", saved.arrays), self._joiner.watermark.value_ms)
        self._tally, self._lineage_saved = TrainerTally(**state["tally"]), LINEAGE in state["publisher"]
        self._pending_since_ms, self._unpublished = state["pending_since_ms"], state["unpublished"]

    # Rebalances, inside poll

    def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
        """Read on where this trainer stands, whatever was committed."""
        self._held |= set(partitions)
        self._heard_s = self._ports.clock.monotonic_s()
        self._merge.assign(partitions, self._ports.clock.monotonic_s())
        self._joiner.watermark.assign(partitions)
        self._rewind |= {where: self._next[where] for where in partitions if where in self._next}
        self._start_over([where for where in partitions if where not in self._next])

    def _start_over(self, unknown: Sequence[TopicPartition]) -> None:
        """No checkpoint knows these: what was committed of them was learned by weights that are gone."""
        positions = self._ports.source.positions()
        committed = {where: positions[where] for where in unknown if positions.get(where, 0) > 0}
        if not committed:
            return
        if self._policy.rewind:
            self._rewind |= dict.fromkeys(committed, 0)
        _log.warning(
            "no checkpoint has these partitions: reading from the earliest record kept"
            if self._policy.rewind
            else "no checkpoint has these partitions: going on at the offsets committed (auto.offset.reset)",
            event_name=NO_CHECKPOINT,
            committed={f"{where.topic}/{where.partition}": offset for where, offset in committed.items()},
        )

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        """Checkpoint and commit while it is allowed; drop what was polled and not taken."""
        if not self._failed:
            self._checkpoint()
        self.on_lost(partitions)

    def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """Forget what was polled and not taken; it is read again by whoever comes next."""
        self._held -= set(partitions)
        self._merge.revoke(partitions)
        self._joiner.watermark.revoke(partitions)
        self._rewind = {where: at for where, at in self._rewind.items() if where not in partitions}

    # Telling

    def _refresh_stats(self, now_s: float) -> None:
        self._stats_s = now_s
        joiner, tally, published = self._joiner, self._tally, self._publisher.tally
        newest_ms = joiner.watermark.newest_ms
        self._stats = TrainerStats(
            served=tally.served,
            feedback=tally.feedback,
            rejected=tally.rejected,
            examples=tally.examples,
            outcomes=dict(joiner.outcomes),
            steps=tally.steps,
            step_ms=self._steps.mean_ms,
            refused_steps=tally.refused_steps,
            checkpoints=tally.checkpoints,
            versions_published=published.versions_published,
            version=published.version,
            holds=dict(published.holds),
            gate=dict(published.numbers),
            alarm=self._drift.reason,
            embedding_rows=self._ports.learner.embedding_rows(),
            open_requests=len(self._ports.join_state),
            open_impressions=joiner.open_impressions,
            open_clicks=joiner.open_clicks,
            watermark_lag_ms=0 if newest_ms == BEGINNING else max(0, newest_ms - joiner.watermark.value_ms),
            lag=self._ports.source.lag() + len(self._merge),
            progressive=self._board.progressive(),
            **self._board.summary(),
        )
        self._teller.tell(self._stats)
