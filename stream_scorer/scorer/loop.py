"""The scoring loop: poll, decode, fetch, assemble, launch; finish the batch in flight; swap the model; commit.

One thread owns everything here. Rebalance callbacks fire inside `Source.poll`, on that thread. The state that matters
is the batch in flight; what may be committed is the ledger's business.

At least once: an offset is committed after the broker has acknowledged every message of every batch up to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from stream_scorer.core import metric_names as names
from stream_scorer.core.assemble import assemble, plan
from stream_scorer.core.deadline import Deadline
from stream_scorer.core.errors import CommitRefused, FatalError
from stream_scorer.core.intake import Intake
from stream_scorer.core.ledger import Ledger
from stream_scorer.core.messages import ScoreRequest
from stream_scorer.core.pace import Pace
from stream_scorer.core.records import Fetched, Record, TopicPartition
from stream_scorer.core.rejects import Reject, StormBreaker
from stream_scorer.core.scorer_stats import Hold, ScorerStats, Tally
from stream_scorer.ports import Predictor, StopSignal
from stream_scorer.scorer.ports import ScorerPolicy, ScorerPorts
from stream_scorer.scorer.publisher import Flight, Publisher, Work, timed

_log = structlog.get_logger("stream_scorer.scorer")

NO_MODEL_WAIT_S = 0.02
RETRY_S = 0.25  # between two tries of a feature store that is being waited for
LAG_EVERY_S = 1.0


class Scorer:
    """Scores requests until told to stop. Also the source's rebalance listener."""

    def __init__(self, ports: ScorerPorts, policy: ScorerPolicy) -> None:
        self._ports = ports
        self._policy = policy
        self._ledger = Ledger()
        self._intake = Intake(policy.limits, policy.max_rows, policy.max_records)
        self._pace = Pace(policy.max_rows, policy.target_s)
        self._breaker = StormBreaker(policy.storm)
        self._tally = Tally()
        self._predictor: Predictor | None = None
        self._retired: Predictor | None = None  # the one served before
        self._flying: Flight | None = None
        self._paused = False
        self._retry_at_s: float | None = None  # set while the feature store is being waited for
        self._rewound: dict[TopicPartition, int] = {}
        self._shutdown: Deadline | None = None
        self._refused: str | None = None  # why the last commit was not taken
        self._publisher = Publisher(ports, policy.output, self._ledger, self._tally)
        self._scored = 0  # acknowledged, as far as the metric knows
        self._committed_at_s = self._lag_at_s = float("-inf")

    def run(self, stop: StopSignal) -> None:
        """Score until ``stop`` is set, then drain. Raises FatalError when a promise cannot be kept."""
        while not stop.is_set():
            if not self.step():
                stop.wait(NO_MODEL_WAIT_S)
        self._shutdown = self._budget()
        if not self.drain(self._shutdown):
            if self._refused is not None:
                raise CommitRefused(f"the last offsets were not committed ({self._refused}): some requests come again")
            raise FatalError("what was in flight was not acknowledged in time; it is not committed and is read again")

    def step(self) -> bool:
        """One turn. False when there is no model yet: the group is joined with the first one."""
        if self._predictor is None and not self._start():
            return False
        self._hold_or_go()
        self._read()
        launched = self._launch()
        finishing, self._flying = self._flying, launched
        if finishing is not None:
            self._finish(finishing)
        if not self._policy.overlap:
            self._land()
        self._swap()
        self._settle()
        return True

    def drain(self, deadline: Deadline) -> bool:
        """Finish and publish the batch in flight, wait for its acknowledgement, commit.

        False when time ran out or the offsets were refused.
        """
        return self._publish_all(deadline) and self._refused is None

    def _publish_all(self, deadline: Deadline) -> bool:
        self._land()
        done = self._ports.sink.flush(deadline)
        self._commit()
        return done

    def stats(self) -> ScorerStats:
        """A snapshot; may be asked for from another thread."""
        return self._tally.snapshot(self._ledger.scored, self.hold)

    @property
    def hold(self) -> Hold:
        """Why nothing is being scored: no model yet, no features, a reject storm; empty when all is well."""
        if self._predictor is None:
            return "model"
        if self._retry_at_s is not None:
            return "features"
        return "storm" if self._paused else ""

    # Reading

    def _start(self) -> bool:
        self._swap()
        if self._predictor is None:
            return False
        self._ports.source.subscribe(self)
        return True

    def _hold_or_go(self) -> None:
        """Pause or resume the source when the reason to comes or goes."""
        hold = self._retry_at_s is not None or self._breaker.is_open(self._ports.clock.monotonic_s())
        if hold and not self._paused:
            self._ports.source.pause()
        elif self._paused and not hold:
            _log.info("scoring goes on")
            self._ports.source.resume()
        self._paused = hold

    def _read(self) -> None:
        """Poll and decode. While something is in flight or waiting the poll does not wait for a first record."""
        busy = self._flying is not None or (len(self._intake) > 0 and self._retry_at_s is None)
        wait_s = 0.0 if busy else self._policy.idle_wait_s
        asked_s = self._ports.clock.monotonic_s()
        records = self._ports.source.poll(self._intake.room, wait_s, self._policy.linger_s)
        if self._rewound:  # a revoke inside this poll sent us back: what it returned of these partitions comes again
            self._ports.source.seek(self._rewound)
            records = [record for record in records if record.position.topic_partition not in self._rewound]
            self._rewound = {}
        records = [record for record in records if self._ledger.admit(record)]
        if not records:
            return
        started = timed(self._ports, "read", asked_s)
        rejects = self._intake.add(records)
        self._tally.requests += len(records)
        self._ports.metrics.inc(names.REQUESTS, len(records))
        self._watch_storm(len(records), rejects, timed(self._ports, "decode", started))

    def _watch_storm(self, requests: int, rejects: int, now_s: float) -> None:
        if self._breaker.record(requests, rejects, now_s):
            _log.error(
                "too many rejects: scoring pauses; look at the newest messages of the reject topic",
                topic=self._policy.output.rejects_topic,
                seconds=self._policy.storm.cooldown_s,
            )

    # Launching

    def _launch(self) -> Flight | None:
        """Take a batch, fetch its features and start computing; None when there is nothing to do."""
        if self._retry_at_s is not None and self._ports.clock.monotonic_s() < self._retry_at_s:
            return None
        arrivals = self._intake.take()
        if not arrivals:
            self._retry_at_s = None  # what waited for features has gone to another scorer
            return None
        requests = [one.decoded for one in arrivals if isinstance(one.decoded, ScoreRequest)]
        work = None
        if requests:
            work = self._work(requests, [one.record for one in arrivals if isinstance(one.decoded, ScoreRequest)])
            if work is None:
                self._intake.put_back(arrivals)
                return None
        rejects = [one.decoded for one in arrivals if isinstance(one.decoded, Reject)]
        return Flight(self._ledger.open([one.record for one in arrivals]), rejects, work)

    def _work(self, requests: list[ScoreRequest], records: list[Record]) -> Work | None:
        """Features and a launched prediction; None when the feature store is to be waited for."""
        ports, predictor = self._ports, self._predictor
        if predictor is None:
            raise FatalError("a batch was read before there was a model")
        planned_s = ports.clock.monotonic_s()
        batch_plan = plan(requests)
        budget = Deadline.after(self._policy.fetch_budget_s, ports.clock.monotonic_s)
        fetched = ports.features.fetch(batch_plan.users, batch_plan.items, ports.clock.now_ms(), budget)
        fetched_s = timed(self._ports, "fetch", planned_s)
        if not self._accept(fetched, fetched_s):
            return None
        batch = assemble(requests, batch_plan, fetched, self._policy.limits.context)
        pending = predictor.launch(batch)
        launched_s = timed(self._ports, "assemble", fetched_s)
        return Work(
            requests, records, batch_plan, fetched, batch, predictor, pending, self._intake.full, planned_s, launched_s
        )

    def _accept(self, fetched: Fetched, now_s: float) -> bool:
        """Whether to score with what the feature store gave; it may have been out of reach."""
        if not fetched.degraded:
            self._retry_at_s = None
            return True
        if self._policy.on_outage == "fail":
            raise FatalError("the feature store did not answer in time (on_outage = fail); nothing of it was committed")
        if self._policy.on_outage == "pause":
            if self._retry_at_s is None:
                _log.warning("the feature store did not answer in time: scoring pauses")
            self._retry_at_s = now_s + RETRY_S
            return False
        self._tally.degraded += 1
        self._ports.metrics.inc(names.FEATURES_DEGRADED)
        return True

    # Finishing

    def _land(self) -> None:
        flying, self._flying = self._flying, None
        if flying is not None:
            self._finish(flying)

    def _finish(self, flight: Flight) -> None:
        unscorable = self._publisher.publish(flight)
        if flight.work is not None:
            began_s = flight.work.planned_s
            self._pace.took(flight.work.full, timed(self._ports, "batch", began_s) - began_s)
            self._intake.limit(self._pace.rows)
            self._ports.metrics.set(names.BATCH_LIMIT, self._pace.rows)
        if unscorable:
            self._watch_storm(0, unscorable, self._ports.clock.monotonic_s())

    def _settle(self) -> None:
        """Serve delivery reports; now and then commit and look at the lag."""
        self._ports.sink.poll()
        self._ledger.raise_if_failed()
        now_s = self._ports.clock.monotonic_s()
        if now_s - self._committed_at_s >= self._policy.commit_every_s:
            self._commit()
        if now_s - self._lag_at_s >= LAG_EVERY_S:
            self._lag_at_s = now_s
            self._ports.metrics.set(names.LAG, self._ports.source.lag())

    def _commit(self) -> None:
        """Commit what is settled. A commit that was not taken is offered again, unless the partition goes."""
        self._ledger.raise_if_failed()
        self._committed_at_s = self._ports.clock.monotonic_s()
        if self._ledger.scored > self._scored:
            self._ports.metrics.inc(names.SCORED, self._ledger.scored - self._scored)
            self._scored = self._ledger.scored
        offsets = self._ledger.settled()
        if not offsets:
            self._refused = None
            return
        result = self._ports.source.commit(offsets)
        self._refused = None if result.committed else result.error or "refused"
        if result.committed:
            self._ledger.committed(offsets)
        else:
            _log.warning("commit not taken", fenced=result.fenced, error=result.error)

    # The model

    def _swap(self) -> None:
        """Take the newest model between two batches; the batch in flight keeps the one it was launched on."""
        fresh = self._ports.mailbox.take()
        if fresh is None:
            return
        if self._retired is not None:  # replaced a swap ago, so nothing is in flight on it any more
            self._retired.close()
        self._retired, self._predictor = self._predictor, fresh
        self._ports.metrics.inc(names.MODEL_SWAPS)
        self._ports.metrics.set(names.MODEL_VERSION, fresh.version)
        _log.info("model taken into service", version=fresh.version)

    # Rebalancing: called from inside Source.poll and Source.close

    def on_assign(self, partitions: Sequence[TopicPartition]) -> None:
        """See `ports.RebalanceListener`."""
        self._ledger.assign(partitions)

    def on_revoke(self, partitions: Sequence[TopicPartition]) -> None:
        """Finish and commit under one deadline; past it nothing queued may land after the next owner has started."""
        if not self._publish_all(self._shutdown or self._budget()):
            _log.warning("not acknowledged in time before a rebalance: it will be scored again", partitions=partitions)
            self._go_back(partitions)
        self._ledger.forget(partitions)
        self._intake.drop(partitions)

    def on_lost(self, partitions: Sequence[TopicPartition]) -> None:
        """See `ports.RebalanceListener`."""
        _log.warning("partitions lost: what is in flight for them is dropped", partitions=partitions)
        self._ledger.forget(partitions)
        self._intake.drop(partitions)

    def _go_back(self, leaving: Sequence[TopicPartition]) -> None:
        """Abandon what is on its way and read it again, of the partitions that stay."""
        back = self._ledger.rewind()  # first: the reports of what is purged are errors, and must not count
        self._ports.sink.purge()
        self._ports.sink.poll()
        self._intake.drop(back)
        self._rewound |= {where: offset for where, offset in back.items() if where not in leaving}
        if self._rewound:
            self._ports.source.seek(self._rewound)

    def _budget(self) -> Deadline:
        return Deadline.after(self._policy.drain_timeout_s, self._ports.clock.monotonic_s)
